"""--check: what must hold of any run, tested on the user's own model, data and device, a line for each.

Differences are given in standard deviations of what is compared, so that a new model's small numbers hide
nothing.

Left out: anything that needs training. That a run improves is seen in the run.
"""
import math
import os
import tempfile
from dataclasses import replace

import torch

from minirlhf import adapters, checkpoint
from minirlhf.chat import encode_prompt
from minirlhf.data import Row, collate
from minirlhf.evaluate import score_all
from minirlhf.generate import KVCache
from minirlhf.model import flat_indices
from minirlhf.objectives import k1, rows_of_groups


class Checks:
    """Prints a line for each check and counts the failures. `limit`: what rounding may do, by the run's precision."""

    def __init__(self, run):
        self.run, self.done, self.failed = run, 0, 0
        self.limit = 1e-4 if run.dtype == torch.float32 else 0.03
        run.say(f"checks on {run.hardware}:")
        self.go_on()

    def __call__(self, claim, holds, found, cause):
        """claim: what must hold, on every rank; found: what was measured; cause: the likely one if it does not hold."""
        failing, world = int(self.run.total(torch.tensor(float(not holds)))), self.run.world
        where = f" on {failing} of {world} ranks" if failing and world > 1 else ""
        self.run.say(f"{'FAIL' if failing else 'ok  '}  {claim}: {found}{where}"
                     + (f"; likely cause: {cause}" if failing else ""))
        self.done, self.failed = self.done + 1, self.failed + (failing > 0)
        self.go_on()

    def go_on(self):
        """Exits 128 + the signal's number where one has come: what was not checked is not said to hold."""
        if self.run.stop:
            self.run.say(f"interrupted: {self.failed} of {self.done} checks failed, the others were not made")
            raise SystemExit(128 + self.run.stop)

    def close(self, claim, a, b, cause):
        """Tensors a and b differ by rounding only."""
        gap = float((a - b).float().pow(2).mean().sqrt() / a.float().std(correction=0).clamp_min(1e-12))
        self(claim, gap <= self.limit, f"they differ by {gap:.1e} standard deviations, at most {self.limit:.0e}", cause)

    def end(self):
        """Exits 1 if a check failed."""
        self.run.say(f"{self.failed} checks failed" if self.failed else "all checks passed")
        raise SystemExit(1 if self.failed else 0)


def noise(model, tokens, lengths):
    """The tokens with random ids in place of their padding: whoever reads padding gives itself away."""
    other = torch.randint(model.config.vocab_size, tokens.shape, generator=torch.Generator().manual_seed(0))
    t = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(t < lengths[:, None], tokens, other.to(tokens.device))


def ragged(rows):
    """Beginnings of a few rows, of every length from short to whole: batches hold rows of like length otherwise."""
    rows = rows[:8]
    return [Row(row.ids[:max(1, len(row.ids) * (i + 1) // len(rows))], 1) for i, row in enumerate(rows)]


@torch.no_grad()
def padding(checks, model, rows, name):
    """Each row alone gives what it gives in a batch whose padding is noise."""
    run = checks.run
    tokens, _, lengths = collate(ragged(rows), 0, run.device)
    real = torch.arange(tokens.shape[1], device=run.device) < lengths[:, None]
    with run.autocast():
        together = model.states(noise(model, tokens, lengths), flat_indices(real))
        alone = [model.hidden(tokens[i:i + 1, :n])[0] for i, n in enumerate(lengths.tolist())]
    checks.close(f"padding changes nothing in the {name}", torch.cat(alone), together,
                 "the causal mask lets a token see what follows it, positions depend on padding, or torch.compile errs")


@torch.no_grad()
def cache(checks, model, rows):
    """Half of each row at once, the rest token by token with a KV cache: hidden states are those without one."""
    run, rows = checks.run, ragged(rows)
    tokens, _, lengths = collate(rows, 0, run.device)
    halves = (lengths + 1) // 2
    with run.autocast():
        plain = model.hidden(tokens)
        kv = KVCache(model, len(rows), tokens.shape[1])
        kv.filled = int(halves.max())
        at = torch.arange(kv.filled, device=run.device)
        cached = plain.new_zeros(plain.shape)
        cached[:, :kv.filled] = model.hidden(noise(model, tokens, halves)[:, :kv.filled], kv, at[None])
        rows_index = torch.arange(len(rows), device=run.device)
        for n in range(int((lengths - halves).max())):
            at = (halves + n).clamp_max(tokens.shape[1] - 1)
            kv.filled = int(at.max()) + 1
            cached[rows_index, at] = model.hidden(tokens[rows_index, at][:, None], kv, at[:, None])[:, 0]
    real = torch.arange(tokens.shape[1], device=run.device) < lengths[:, None]
    checks.close("the KV cache changes nothing", plain[real], cached[real],
                 "a cache slot or position is off by one, or an unwritten slot is seen")


def gradients(models):
    """All gradients in one vector, then none."""
    flat = torch.cat([p.grad.flatten() for model in models for p in model.parameters() if p.grad is not None])
    for model in models:
        model.zero_grad(set_to_none=True)
    return flat


def microbatches(checks, at_once, parts):
    """Gradients of one batch, taken at once and in microbatches of one row."""
    gap = float((at_once - parts).norm() / at_once.norm().clamp_min(1e-20))
    checks("microbatch size changes no gradient", gap <= checks.limit, f"they differ by {gap:.1e} of their norm, at "
           f"most {checks.limit:.0e}", "a microbatch's mean was taken where the batch's sum is divided once")


def saved(checks, model, tokenizer, stage):
    """A checkpoint of the model gives the same weights, buffers and ids, to the last bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        checkpoint.save(path, stage=stage, model=model, tokenizer=tokenizer, options=checks.run.options, info={},
                        training={})
        other, other_tokenizer, _ = checkpoint.load(path, [stage], checks.run.device)
    on_cpu = {k: v.cpu() for k, v in model.state_dict().items()} if checkpoint.is_on_base(model) else None
    own, loaded = adapters.merged(model, on_cpu), other.state_dict()  # each is added where `load` or `save` adds it
    different = [name for name in own if not torch.equal(own[name].cpu(), loaded[name].cpu())]
    checks("saved and loaded is the same to the last bit", not different and other_tokenizer.same_ids(tokenizer),
           f"{len(own)} tensors and {tokenizer.vocab_size:,} tokens" + ", ".join(["", *different[:3]]),
           "the checkpoint leaves something out or changes its precision")


def same_weights(models, copies):
    """True where no parameter has moved from its copy."""
    return all(torch.equal(p, q) for model, copy in zip(models, copies) for p, q in zip(model.parameters(), copy))


def stillness(checks, model, optimizers):
    """With gradients in place, a step of every optimizer at learning rate 0 leaves each weight as it was."""
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    checks("at learning rate 0 no weight moves", same_weights([model], [before]), "one step",
           "something besides the optimizers changes the weights")


def again(tokenizer, row):
    """The ids of the text of a row's ids: special tokens stay, and divide it as answers do."""
    special, seams = {*tokenizer.special.values()}, {at for span in row.spans for at in span}
    ids, piece = [], []
    for n, token in enumerate(row.ids):
        if token in special or n in seams:
            ids, piece = ids + tokenizer.encode(tokenizer.decode(piece)), []
        if token in special:
            ids.append(token)
        else:
            piece.append(token)
    return ids + tokenizer.encode(tokenizer.decode(piece))


def same_ids(checks, tokenizer, rows):
    """Text that came from ids gives these ids again. rows: data.Row, none of them cut."""
    same = sum(again(tokenizer, row) == row.ids for row in rows)
    checks("prompts and completions have the same ids wherever they are encoded", same == len(rows),
           f"{same} of {len(rows)}",
           "prompt and completion were encoded together in one place and apart in another, or by another tokenizer")


# ---- the stages

def sft(model, tokenizer, batch, optimizers, o, run):
    """--check: what must hold of this stage, on one batch of training rows."""
    import train_sft

    checks, eos = Checks(run), tokenizer.eos
    model.eval()
    padding(checks, model, batch, "model")
    cache(checks, model, batch)
    found = []
    for size in (len(batch), 1):
        loss = train_sft.batch_gradients(model, batch, eos, replace(o, micro_batch_size=size), run)
        found.append(gradients([model]))
    microbatches(checks, *found)
    if o.init_from == "scratch" and not o.resume:
        uniform = math.log(tokenizer.vocab_size)
        checks("a new model knows nothing", abs(loss - uniform) < 0.1 * uniform,
               f"{loss:.2f} nats a token, {uniform:.2f} for an even guess", "the initial weights have another scale")
    train_sft.batch_gradients(model, batch, eos, o, run)
    stillness(checks, model, optimizers)
    uncut = [row for row in batch if not row.trimmed]
    if uncut:  # a cut row has neither its text's ids nor its end
        same_ids(checks, tokenizer, uncut)
        tokens, mask, _ = collate(uncut, eos, run.device)
        last = mask.sum(1).cumsum(0) - 1  # of each row's decisions that train
        ends = sum(token in tokenizer.ends() for token in tokens[:, 1:][mask][last].tolist())
        checks("eos is reachable", ends == len(uncut), f"{ends} of {len(uncut)} completions train it",
               "eos is masked as if it were padding, so a model never learns to stop")
    saved(checks, model, tokenizer, "sft")
    checks.end()


def rm(model, tokenizer, batch, optimizers, o, run):
    """--check: what must hold of this stage, on one batch of training records."""
    import train_rm

    checks, eos, rows = Checks(run), tokenizer.eos, [row for rows, _, _ in batch for row in rows]
    model.eval()
    padding(checks, model, rows, "reward model")
    with torch.no_grad():
        parts = ragged(rows)
        scores = [score_all(model, run, parts, eos, size) for size in (len(parts), 1)]
    checks.close("a score does not depend on what else is scored", *scores,
                 "the score is not read at the last real token")
    found = []
    for size in (len(batch), 1):
        train_rm.batch_gradients(model, batch, eos, replace(o, micro_batch_size=size), run)
        found.append(gradients([model]))
    microbatches(checks, *found)
    train_rm.batch_gradients(model, batch, eos, o, run)
    stillness(checks, model, optimizers)
    uncut = [row for row in rows if not row.trimmed]
    same_ids(checks, tokenizer, uncut)
    ends = sum(row.ids[-1] in tokenizer.ends() for row in uncut)
    checks("a text is scored at its eos", ends == len(uncut), f"{ends} of {len(uncut)} texts",
           "completions are encoded without eos, which is where stage 3 reads the score")
    saved(checks, model, tokenizer, "rm")
    checks.end()


def along_gradient(checks, policy, ref, batch, eos, o, run):
    """A step along the gradient and one against it, whose lengths should change the loss by 2 %, differ by about twice
    that; what is frozen and the reference have not moved. Shorter for means a token, times a beta below 1: to change
    them by so much takes steps on which the loss is no line."""
    from minirlhf import dpo

    before = dpo.batch_gradients(policy, batch, eos, o, run)[0]["loss"]
    learn, still = [p for p in policy.parameters() if p.grad is not None], [
        *ref.parameters(), *(p for p in policy.parameters() if not p.requires_grad)]
    kept, slopes, copies = ([x.detach().clone() for x in xs] for xs in (learn, [p.grad for p in learn], still))
    wanted = 0.02 * abs(before) * (min(1.0, o.beta) if o.loss == "simpo" else 1.0)
    size, losses, moved = wanted / max(sum(float(g.pow(2).sum()) for g in slopes), 1e-20), [], 0
    for sign in (1, -1):
        for p, own, slope in zip(learn, kept, slopes):
            p.data.copy_(own + sign * size * slope)
        gradients([policy])
        losses.append(dpo.batch_gradients(policy, batch, eos, o, run)[0]["loss"])
        moved += sum(not torch.equal(p, copy) for p, copy in zip(still, copies))
    gradients([policy])
    for p, own in zip(learn, kept):
        p.data.copy_(own)
    found, slack = (losses[0] - losses[1]) / 2, 0.2 if run.dtype == torch.float32 else 0.5  # long sums are rounded
    checks("the loss changes along its gradient as it should", abs(found / wanted - 1) < slack,
           f"by {found:.2g} of {before:.3g}, expected {wanted:.2g}",
           "the gradient is not that of the loss: chosen and rejected are exchanged, or a part is detached")
    checks("the reference stays as it is", not moved, f"{len(still)} tensors, {moved} moved by steps of the policy",
           "policy and reference share weights that learn")


def dpo(policy, ref, tokenizer, batch, optimizers, first, o, run):
    """--check: what must hold of this stage, on one batch of training records. first: the steps that were taken
    before."""
    from minirlhf import dpo as stage

    checks, eos, rows = Checks(run), tokenizer.eos, [row for rows, _, _ in batch for row in rows]
    policy.eval()
    padding(checks, policy, rows, "policy")
    cache(checks, policy, rows)
    with torch.no_grad():
        parts = ragged(rows)
        apart = torch.cat([stage.answer_logprobs(policy, run, [row], eos) for row in parts])
        checks.close("a log-probability does not depend on what else is in the pass", apart,
                     stage.answer_logprobs(policy, run, parts, eos), "decisions of another row, or of padding, count")
        logps, ref_logps = ([stage.answer_logprobs(model, run, texts, eos) for texts, _, _ in batch]
                            for model in (policy, ref))
        ratios = torch.cat(logps) - torch.cat(ref_logps)
    if not (first or o.reference):
        checks("all log-ratios are 0 at the start", bool((ratios.abs() <= checks.limit).all()),
               f"at most {float(ratios.abs().max()):.1e} nats a text", "policy and reference start from different "
               "weights, or are run in different precision")
    batch, found = [(rows, pairs, own) for (rows, pairs, _), own in zip(batch, ref_logps)], []
    for size in (len(batch), 1):
        stage.batch_gradients(policy, batch, eos, replace(o, micro_batch_size=size), run)
        found.append(gradients([policy]))
    microbatches(checks, *found)
    along_gradient(checks, policy, ref, batch, eos, o, run)
    stage.batch_gradients(policy, batch, eos, o, run)
    stillness(checks, policy, optimizers)
    uncut = [row for row in rows if not row.trimmed]
    if uncut:
        same_ids(checks, tokenizer, uncut)
        tokens, mask = stage.answers_of(uncut, eos, run.device)
        last = mask.sum(1).cumsum(0) - 1  # of each row's decisions
        ends = sum(token in tokenizer.ends() for token in tokens[:, 1:][mask][last].tolist())
        checks("eos is a part of each answer", ends == len(uncut), f"{ends} of {len(uncut)} answers",
               "it is masked as if it were padding, so that the policy unlearns to stop")
    saved(checks, policy, tokenizer, "dpo")
    checks.end()


def answer_groups(checks, batch, o):
    """The answers to a prompt lie together on one rank, and each is drawn by itself; without a value network their
    advantages sum to 0, and an answer has one for all its decisions."""
    rows, mask, A = rows_of_groups(batch.group), batch.response_mask, batch.advantages  # rows (G, K)
    prompts = [{tuple(batch.tokens[i, :batch.prompt_lengths[i]].tolist()) for i in group} for group in rows.tolist()]
    checks("a group is all the answers to one drawing of a prompt",
           rows.shape[1] == o.group_size and all(len(found) == 1 for found in prompts),
           f"{len(rows)} groups of {rows.shape[1]}", "ranks share answers instead of prompts, or rows lost their group")
    answers = batch.responses()
    differ = sum(len({tuple(answers[i]) for i in group}) > 1 for group in rows.tolist())
    checks("the answers to a prompt are drawn one by one", differ > 0, f"they differ in {differ} of {len(rows)} groups",
           "they take the same random numbers, or the temperature is so low that all are the same")
    if o.advantages != "gae":
        of_answer = A.sum(1) / mask.sum(1)
        off = float(of_answer[rows].sum(1).abs().max() / A.abs().max().clamp_min(1e-12))
        apart = float((A - of_answer[:, None])[mask].abs().max())
        checks("the advantages of a group sum to 0, each the same for a whole answer", max(off, apart) <= 1e-3,
               f"{off:.1e} of the largest, {apart:.1e}, at most 1e-03",
               "rows were put in another order between their rewards and their advantages")


class GradientRecorder:
    """In an optimizer's place: keeps the gradient and moves nothing."""

    def __init__(self, model):
        self.model, self.gradient = model, None

    def step(self):
        self.gradient = gradients([self.model])

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)


def ppo(policy, ref, value, reward, tokenizer, prompts, first, o, run):
    """--check: what must hold of this stage, on one batch of answers. value: None where there is no such network;
    first: the steps that were taken before."""
    import train_ppo

    checks, learners, prompts = Checks(run), [policy, value] if value else [policy], prompts[:-(-64 // o.group_size)]
    o = replace(o, value_warmup=0, max_update_kl=1.0, max_grad_norm=0.0,
                micro_batch_size=max(1, len(prompts) * o.group_size // 4))
    for model in learners:
        model.eval()
    batch = train_ppo.roll_out(policy, prompts, [*range(len(prompts))], tokenizer.eos, first, o, run)
    rows = [Row(row[:n], p) for row, n, p in
            zip(batch.tokens.tolist(), batch.lengths.tolist(), batch.prompt_lengths.tolist())]
    several = len(reward.judges) > 1
    judges = {"reward model" + f" {judge.name}" * several: judge for judge in reward.judges}
    models = {"policy": policy, **({"value network": value} if value else {}),
              **{name: judge.model for name, judge in judges.items()}}
    for name, model in models.items():
        padding(checks, model, rows, name)
    cache(checks, policy, rows)
    train_ppo.score_rollout(batch, policy, ref, value, reward, o, run)
    train_ppo.credit(batch, o.kl_coef, o, run)
    if o.group_size > 1:
        answer_groups(checks, batch, o)
    checks.close("the sampler's log-probabilities are the trainer's", batch.flat(batch.sampler_logprobs),
                 batch.flat(batch.logprobs), "the temperature is missing in one of them, or positions differ")
    found = []
    for size in (len(rows), 1):
        recorders = [GradientRecorder(model) for model in learners]
        figures, _ = train_ppo.update(batch, policy, value, recorders, first, 1,
                                      replace(o, num_mini_batches=1, micro_batch_size=size), run)
        found.append(torch.cat([recorder.gradient for recorder in recorders]))
    off = math.sqrt(2 * figures["policy/approxkl_avg"])
    checks("the ratio is 1 before the first update", off <= checks.limit, f"log-ratios of {off:.1e} nats (root mean "
           f"square), at most {checks.limit:.0e}",
           "dropout is on, or old and new log-probabilities differ in temperature")
    microbatches(checks, *found)
    kl = k1(batch.logprobs, batch.ref_logprobs).sum(1).mean()
    if not first and not o.reference:
        checks("the KL from the SFT model is 0 at the start", abs(kl) <= 10 * checks.limit, f"{float(kl):.1e} nats a "
               "response", "policy and reference start from different weights")
    before = [[p.detach().clone() for p in model.parameters()] for model in learners]
    optimizers = train_ppo.make_optimizers(policy, value, replace(o, learning_rate=0.0, value_learning_rate=0.0))
    figures, _ = train_ppo.update(batch, policy, value, optimizers, first, o.num_ppo_epochs, o, run)
    approxkl, clipfrac = figures["policy/approxkl_avg"], figures["policy/clipfrac_avg"]
    moved = not same_weights(learners, before)
    train_ppo.score_rollout(batch, policy, ref, value, reward, o, run)
    drift = abs(float(k1(batch.logprobs, batch.ref_logprobs).sum(1).mean() - kl))
    checks("at learning rate 0 KL, approxkl and clipfrac stay 0",
           not moved and max(drift, approxkl) <= checks.limit and clipfrac <= checks.limit / 3,
           f"{drift:.1e}, {approxkl:.1e}, {clipfrac:.1e}",
           "something besides the optimizers changes the weights, or the ratio's denominator is not the old policy")
    for name, judge in judges.items():
        room = policy.config.block_size - o.response_length
        short = [(text, row.ids[:row.prompt_length], row.ids[row.prompt_length:]) for text, row in
                 zip(batch.prompt_texts, rows) if row.prompt_length < room]  # a trimmed prompt may begin within a word
        own, theirs = ([(encode_prompt(t, text)[0], again(t, Row(answer, 0))) for text, _, answer in short]
                       for t in (tokenizer, judge.tokenizer))
        prompts_too = all(prompt == encoded for (_, prompt, _), (encoded, _) in zip(short, own))
        sampled = sum(answer == encoded for (_, _, answer), (_, encoded) in zip(short, own))
        checks(f"policy and {name} see the same ids for the same text", own == theirs and prompts_too,
               f"{len(own)} answers; {sampled} of them were sampled as their text is encoded",
               "their tokenizers differ, or prompts are encoded otherwise than in stages 1 and 2")
    eos_rate = float(batch.finished.float().mean())
    checks("eos is reachable", eos_rate > 0,
           f"{eos_rate:.0%} of {len(rows)} answers end within {o.response_length} tokens",
           "the SFT model was not trained on eos, or --response_length is too short")
    saved(checks, policy, tokenizer, "ppo")
    checks.end()
