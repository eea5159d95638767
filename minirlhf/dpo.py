"""Direct alignment: the SFT model + people's preferences -> a policy, with neither a reward model nor rollouts.

`python -m minirlhf.dpo` minimises DPO's loss, IPO's or SimPO's over all pairs of each record. What they compare are
log-probabilities of whole answers: sums over the decisions of an answer, eos included, prompt excluded. Those of the
reference never change: they are computed before the first step, in the same passes and precision as the policy's, so
that at the start all log-ratios are 0.

Left out: losses of single answers (KTO), and pairs that the policy samples itself. Dropout: the loss would compare a
thinned policy with a whole reference.
"""
import os
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch

from minirlhf import adapters, checkpoint, evaluate, kernels, memory, prepare, runtime
from minirlhf.chat import Talk
from minirlhf.config import RunOptions, fail, launch, parse, ranks, say, warn_idle
from minirlhf.data import (Order, collate, describe_sets, encode_prompts, load_prompts, load_sets, read_preferences,
                           response_mask)
from minirlhf.generate import compile_model
from minirlhf.memory import ROWS
from minirlhf.model import flat_indices
from minirlhf.objectives import dpo_loss, ipo_loss, simpo_loss, token_logprobs, wins

FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected")  # means over pairs, by TRL's names


@dataclass
class Options(RunOptions):
    """Direct alignment: SFT model + people's preferences -> policy, without a reward model.

    Reads preferences.{train,val}.jsonl of --data_dir (other sets with --preferences).
    """
    stage = "dpo"
    # ---- models, data, output
    data_dir: str = "data/sentiment"  # folder of the preferences; the default is prepared when it is missing
    preferences: tuple[str, ...] = ("preferences",)  # NAME of NAME.{train,val}.jsonl, or a path
    out_dir: str = "out/dpo"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "out/sft/ckpt.pt"  # what the policy starts from: the SFT model, or a policy to train further
    reference: str = ""  # the model that the policy's log-probabilities are compared with; "" = that of init_from
    lora_layers: int = 12  # adapters in the last so many blocks, where there are more; 0 = in all [0..]
    long_prompts: Literal["drop", "trim"] = "drop"  # texts over the context: drop them, or trim the prompt at its left
    # ---- loss
    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"  # sigmoid: DPO; simpo: means a token, and no reference
    beta: float = 0.1  # the higher, the nearer the policy stays to the reference; simpo takes 2 or more (0..]
    label_smoothing: float = 0.0  # sigmoid: the share of pairs that are taken to be labelled wrongly [0..0.5)
    simpo_gamma: float = 0.5  # simpo: the margin that beta times the difference shall have [0..]
    # ---- training
    num_train_epochs: float = 1  # passes over the training data (0..1000000]
    max_steps: int = 180  # at most so many optimizer steps, whatever the epochs; 0 = no limit [0..]
    batch_size: int = 4  # records (pairs or rankings) an optimizer step, over all ranks [1..]
    micro_batch_size: int = 4  # records a forward and backward pass: for memory; changes no gradient [1..]
    learning_rate: float = 3e-4  # AdamW's peak [0..]
    warmup_ratio: float = 0.1  # share of the steps in which the rate rises [0..1]
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # how it falls to 0; constant runs can be prolonged
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never [0..]
    # ---- evaluations and checkpoints
    eval_interval: int = 90  # steps between evaluations and checkpoints; the last step always has both [1..]
    num_eval_texts: int = 512  # held-out texts of an evaluation, which takes all pairs of them; 0 = all [0..]
    num_eval_prompts: int = 128  # held-out prompts that are answered, for the KL and samples [1..1000000]
    log_interval: int = 5  # steps between log lines [1..]
    response_length: int = 48  # longest answer to them in tokens [1..]


# ---- log-probabilities of answers

def answers_of(rows, eos, device):
    """-> tokens (R, T), mask (R, T-1): the decisions of each row's answer, its eos included; no earlier answer's, which
    stand in its prompt."""
    tokens, _, lengths = collate(rows, eos, device)
    prompt_lengths = torch.tensor([row.prompt_length for row in rows], device=device)
    return tokens, response_mask(prompt_lengths, lengths, tokens.shape[1])


def answer_logprobs(model, run, rows, eos):
    """log pi(y|x) of some rows in one pass, the sum over the decisions of y: R rows -> (R,), nats."""
    tokens, mask = answers_of(rows, eos, run.device)
    with run.autocast():
        logits = model.logits(model.states(tokens[:, :-1], flat_indices(mask)))  # (N, V)
    logprobs = token_logprobs(logits, tokens[:, 1:][mask])  # (N,)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)


@torch.no_grad()
def text_logprobs(model, run, rows, eos):
    """The same of many rows, each different one once, rows of like length together: (R,)."""
    def key(row):
        return row.prompt_length, *row.ids

    unique = sorted({key(row): row for row in rows}.values(), key=lambda row: len(row.ids))
    found = torch.cat([answer_logprobs(model, run, unique[at:at + ROWS], eos) for at in range(0, len(unique), ROWS)])
    place = {key(row): i for i, row in enumerate(unique)}
    return found[[place[key(row)] for row in rows]]


@torch.no_grad()
def reference_logprobs(ref, records, order, first, steps, eos, o, run):
    """log ref(y|x) of the texts of each record that steps first..steps train -> a tensor (K,) a record.

    A record is taken with those that its first epoch puts beside it, whatever comes later: so its numbers are the same
    to the last bit however often the run is stopped, or prolonged.
    """
    sizes, epoch = [len(rows) for rows, _, _ in records], order.steps_per_epoch
    found = torch.zeros(sum(sizes), device=run.device)
    parts, visits = found.split(sizes), range(first if steps <= epoch else 0, min(steps, epoch))
    began = time.perf_counter()
    for n, step in enumerate(visits, 1):
        share = run.share(order.batch(step))
        for at in range(0, len(share), o.micro_batch_size):
            some = share[at:at + o.micro_batch_size]
            logps = answer_logprobs(ref, run, [row for i in some for row in records[i][0]], eos)
            for i, own in zip(some, logps.split([sizes[i] for i in some])):
                parts[i].copy_(own)
        if run.should_stop():
            run.rescue()
            run.exit_stopped()
        if 10 * n // len(visits) > 10 * (n - 1) // len(visits):  # ten lines in all
            left = (len(visits) - n) * (time.perf_counter() - began) / n
            run.say(f"{run.progress(n, len(visits), left)}  log-probabilities under the reference")
    return run.total(found).split(sizes)


# ---- the loss

def compare(logps, ref_logps, lengths, better, worse, o):
    """-> {name of FIGURES: (P,)} of pairs; the loss alone has a gradient.

    logps, ref_logps, lengths (R,): of the texts; better, worse: P indices into them. The implicit reward of a text is
    beta (log pi - log ref), in SimPO beta log pi / |y|.
    """
    ratios = logps / lengths if o.loss == "simpo" else logps - ref_logps  # (R,)
    chosen, rejected = ratios[better], ratios[worse]  # (P,)
    if o.loss == "ipo":
        loss = ipo_loss(chosen, rejected, o.beta)
    elif o.loss == "simpo":
        loss = simpo_loss(chosen, rejected, o.beta, o.simpo_gamma)
    else:
        loss = dpo_loss(chosen, rejected, o.beta, o.label_smoothing)
    chosen, rejected, logps = o.beta * chosen.detach(), o.beta * rejected.detach(), logps.detach()
    right = wins(chosen.cpu(), rejected.cpu()).to(chosen)
    return dict(zip(FIGURES, (loss, chosen, rejected, right, chosen - rejected, logps[better], logps[worse])))


def batch_gradients(policy, batch, eos, o, run):
    """Add to each .grad the gradient of the mean loss over all pairs of some records, in microbatches and over all
    ranks -> {name of FIGURES: mean over these pairs}, pairs.

    batch: [(rows, pairs, their log-probabilities under the reference (K,))]. All pairs of a record come out of one pass
    over its texts, and the loss is divided once, by the pairs of the whole batch.
    """
    n_pairs = sum(len(pairs) for _, pairs, _ in batch)
    share, sums = run.share(batch), dict.fromkeys(FIGURES, torch.zeros((), device=run.device))
    for at in range(0, len(share), o.micro_batch_size):
        rows, better, worse, ref_logps = [], [], [], []
        for record_rows, pairs, own in share[at:at + o.micro_batch_size]:
            better += [len(rows) + i for i, _ in pairs]
            worse += [len(rows) + j for _, j in pairs]
            rows += record_rows
            ref_logps.append(own)
        lengths = torch.tensor([len(row.ids) - row.prompt_length for row in rows], device=run.device)
        found = compare(answer_logprobs(policy, run, rows, eos), torch.cat(ref_logps), lengths, better, worse, o)
        (found["loss"].sum() / n_pairs).backward()
        sums = {name: sums[name] + x.detach().sum() for name, x in found.items()}
    run.sum_gradients(policy.parameters())
    return {name: float(x / n_pairs) for name, x in run.totals(sums).items()}, n_pairs


# ---- held-out pairs, and answers to held-out prompts

class HeldOut:
    """What an evaluation looks at: pairs with their log-probabilities under the reference, prompts with its answers."""

    def __init__(self, ref, records, prompts, prefer_longer, tokenizer, o, run, ref_name):
        self.ref, self.pairs, self.prompts, self.tokenizer, self.o, self.run = (
            ref, evaluate.pairs_of(records), prompts, tokenizer, o, run)
        self.prefer_longer, self.ref_name, self.warned = prefer_longer, ref_name, set()
        self.rows = [row for better, worse, _ in self.pairs for row in (better, worse)]
        self.ref_logps = text_logprobs(ref, run, self.rows, tokenizer.eos)
        self.base = self.answers(ref)
        self.before = evaluate.summary(self.base, self.base)

    def answers(self, policy):
        """To the same prompts with the same random numbers each time; those of `python -m minirlhf.evaluate`."""
        o = SimpleNamespace(seed=self.o.seed, temperature=1.0, response_length=self.o.response_length)
        return evaluate.answer(policy, self.ref, {}, self.prompts, self.tokenizer, o, self.run)

    def evaluation(self, policy, step):
        """Prints and keeps what the policy does at a step -> its figures: of FIGURES, "pairs" by kind, "answers"."""
        run, o = self.run, self.o
        logps = text_logprobs(policy, run, self.rows, self.tokenizer.eos)
        lengths = torch.tensor([len(row.ids) - row.prompt_length for row in self.rows], device=run.device)
        found = compare(logps, self.ref_logps, lengths, slice(0, None, 2), slice(1, None, 2), o)
        means = {name: float(x.cpu().double().mean()) for name, x in found.items()}
        before = self.ref_logps.cpu().double().view(-1, 2).mean(0).tolist()
        means |= {"ref_logps/chosen": before[0], "ref_logps/rejected": before[1]}
        by_kind = evaluate.accuracy_figures(self.pairs, found["rewards/chosen"].cpu(), found["rewards/rejected"].cpu(),
                                            self.prefer_longer)
        rows = self.answers(policy)
        after = evaluate.summary(rows, self.base)
        run.say(f"  held out: {describe(means)}\n  answers: KL {after['kl'][0]:.2f} nats from the {self.ref_name} "
                f"model's, {after['eos_rate']:.1%} end, {after['mean_length']:.1f} tokens")
        for row in rows[:evaluate.SHOWN]:
            run.say(f"    {row['prompt']} |{row['completion']}")
            run.write("samples.jsonl", {"step": step, **{k: row[k] for k in ("prompt", "completion")}})
        for cause, text in concerns(means, self.before, after, o):
            if cause not in self.warned:
                self.warned.add(cause)
                run.say(f"warning: {text}")
        return {**means, "pairs": by_kind, "before": self.before, "answers": after}

    def closing_report(self, figures):
        """Prints an evaluation's figures whole."""
        self.run.say()
        for line in evaluate.accuracy_table(figures["pairs"]):
            self.run.say(line)
        self.run.say()
        columns = {"before" if not self.o.reference else "reference": self.before, "after": figures["answers"]}
        for line in evaluate.table(columns, f"held-out prompts, 95% intervals: {len(self.prompts)}", self.ref_name):
            self.run.say(line)


def describe(means):
    """What an evaluation says of pairs."""
    chosen, rejected = (f"{means[f'logps/{name}']:.1f} ({means[f'logps/{name}'] - means[f'ref_logps/{name}']:+.1f})"
                        for name in ("chosen", "rejected"))
    return (f"loss {means['loss']:.4f}, accuracy {means['rewards/accuracies']:.3f}, margin "
            f"{means['rewards/margins']:+.3f}; log-probability of chosen texts {chosen}, of rejected {rejected}")


def concerns(means, before, after, o):
    """Yields (cause, a warning) where a held-out figure tells that the policy loses what it could."""
    lost = means["ref_logps/chosen"] - means["logps/chosen"]
    if lost > 0.1 * -means["ref_logps/chosen"]:
        yield "chosen", (f"chosen texts have lost {lost:.1f} nats of log-probability, more than a tenth of all: what "
                         f"gains is neither they nor the rejected; raise --beta above {o.beta:g} or lower "
                         f"--learning_rate below {o.learning_rate:g}")
    if after["eos_rate"] < 0.5 * before["eos_rate"]:
        yield "eos", (f"{after['eos_rate']:.0%} of the answers end within {o.response_length} tokens, of the "
                      f"reference's {before['eos_rate']:.0%}: raise --beta above {o.beta:g}, or lower --learning_rate "
                      f"below {o.learning_rate:g}")


def read_prompts(o, tokenizer, block_size):
    """-> the prompts that evaluations answer: of prompts.val.jsonl, else of the held-out preferences. Exits 2 where
    none leaves room for an answer."""
    path, room = os.path.join(o.data_dir, "prompts.val.jsonl"), block_size - o.response_length
    texts = load_prompts(path) if os.path.lexists(path) else [*dict.fromkeys(
        p.prompt for p in load_sets(o)[1])]
    prompts = encode_prompts(tokenizer, texts, room, o.long_prompts)[0] if room >= 2 else []
    if not prompts:
        fail(f"--response_length {o.response_length}: no held-out prompt of {o.data_dir} leaves room for it in the "
             f"context of {block_size} tokens")
    return prompts[:o.num_eval_prompts]


# ---- the run

def make_optimizers(policy, o):
    """AdamW without weight decay, which would pull towards 0 and not towards the reference."""
    return [kernels.AdamW([{"params": runtime.learning(policy), "peak": o.learning_rate}], lr=o.learning_rate,
                          weight_decay=0.0, fused=True)]


def read_options(argv):
    """-> Options, and what --resume goes on from."""
    o, saved = checkpoint.resume(parse(Options, argv), "dpo", (
        "seed", "val_share", "loss", "batch_size", "max_steps", "long_prompts", "lr_schedule", *adapters.OPTIONS))
    adapters.check_options(o)
    warn_idle(o, f"loss {o.loss}", o.loss != "sigmoid", "label_smoothing")
    warn_idle(o, f"loss {o.loss}", o.loss != "simpo", "simpo_gamma")
    if o.loss == "simpo" and o.beta < 1 and ranks()[0] == 0:
        say(f"warning: --beta {o.beta:g} with --loss simpo, which takes means a token: its paper has 2 and more")
    return o, saved


def main(argv=None):
    o, saved = read_options(argv)
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    with runtime.Run(o, "dpo") as run:
        # ---- the policy and its frozen reference
        start, ref, tokenizer, ref_name = checkpoint.load_pair(o.init_from, o.reference, run.device)
        checkpoint.as_begun(tokenizer, saved)
        policy = adapters.learner(start, "lm", o, runtime.generator(o.seed, 0, 0, "policy"))
        kernels.pick_matmul(policy)
        adapters.share_below(policy, ref)
        kernels.pack_frozen(run, [policy], [ref])
        block_size = policy.config.block_size
        train_set, val_set, about_data, paths = read_preferences(o, tokenizer, block_size)
        prompts = read_prompts(o, tokenizer, block_size)
        order = Order([max(len(row.ids) for row in rows) for rows, _, _ in train_set], o.batch_size, o.seed)
        steps = order.steps(o.num_train_epochs, o.max_steps)
        optimizers = make_optimizers(policy, o)

        # ---- a new run, or one that goes on
        training = checkpoint.Training(run, tokenizer, policy, optimizers, {
            describe_sets(o): paths, f"--init_from {o.init_from}": checkpoint.files_of(o.init_from),
            **({f"--reference {o.reference}": checkpoint.files_of(o.reference)} if o.reference else {})})
        first, kept = training.restore(saved, steps)
        saved, info = None, kept.get("info", {})
        if first >= steps:
            run.say(f"{o.out_dir}: this run is finished ({first} steps)")
            return
        about_memory = memory.check(run, o, memory.of_dpo, policy, ref, [
            [train_set[i] for i in batch] for batch in memory.heaviest(order, steps)],
            [row for rows, _, _ in val_set for row in rows], max(map(len, prompts)))
        if o.checkpoint_activations:
            memory.recompute(policy)
        if o.check:
            from minirlhf import check
            check.dpo(policy, ref, tokenizer, [train_set[i] for i in order.batch(0)], optimizers, first, o, run)
        if o.compile:
            compile_model(policy), compile_model(ref)
        tokens_per_epoch = sum(len(row.ids) for rows, _, _ in train_set for row in rows)
        run.announce("DPO", [
            *about_data, f"policy: {runtime.describe_parameters(policy)} from {o.init_from}; reference: "
            f"{o.reference or 'the same model'}",
            f"loss: {o.loss}, beta {o.beta:g}; {run.hardware}; {steps} steps of {o.batch_size} records, about "
            f"{tokens_per_epoch // order.steps_per_epoch:,} tokens each", about_memory], first)
        prefer_longer = sum((len(rows[i].ids) > len(rows[j].ids)) - (len(rows[i].ids) < len(rows[j].ids))
                            for rows, pairs, _ in train_set for i, j in pairs) > 0
        run.start_logs(first)

        # ---- what the reference says of all texts, once
        run.rescue = partial(training.save, first, info)
        held_out = HeldOut(ref, val_set, prompts, prefer_longer, tokenizer, o, run, ref_name)
        ref_logps = reference_logprobs(ref, train_set, order, first, steps, tokenizer.eos, o, run)

        seen, seen_seconds, pace = 0, 0.0, runtime.Pace(tokens_per_epoch / order.steps_per_epoch)
        look = sum(evaluate.work_between(pace, policy, val_set, prompts, o))  # what an evaluation takes, in steps
        for step in range(first, steps):
            began = time.perf_counter()
            # ---- one optimizer step over all pairs of all records, divided once by their number
            factor = runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)
            runtime.set_rate(optimizers, factor)
            batch = [(*train_set[i][:2], ref_logps[i]) for i in order.batch(step)]
            figures, n_pairs = batch_gradients(policy, batch, tokenizer.eos, o, run)
            norm = runtime.optimizer_step(policy, optimizers, figures["loss"], f"step {step + 1}", o)
            tokens, seconds = sum(len(row.ids) for rows, _, _ in batch for row in rows), time.perf_counter() - began
            seen, seen_seconds = seen + tokens, seen_seconds + seconds
            pace.add("steps", seconds, pace.steps(tokens))
            done, stopping = step + 1, run.should_stop()
            record = {"step": done, "epoch": done / order.steps_per_epoch, **figures, "pairs": n_pairs,
                      "lr": o.learning_rate * factor, "grad_norm": norm, "seconds": seconds,
                      "tokens_per_second": seen / seen_seconds}
            if done % o.log_interval == 0 or done == steps:
                left = pace.left("steps", steps - done) + pace.left(
                    "looks", look * runtime.looks_left(done, steps, o.eval_interval), "steps")
                run.say(f"{run.progress(done, steps, left)}  loss {figures['loss']:.3f}  accuracy "
                        f"{figures['rewards/accuracies']:.3f}  rewards {figures['rewards/chosen']:+.2f} "
                        f"{figures['rewards/rejected']:+.2f}  lr {o.learning_rate * factor:.1e}  grad {norm:.2f}  "
                        f"{seen / seen_seconds:,.0f} tokens/s")
                seen, seen_seconds = 0, 0.0

            # ---- now and then: held-out pairs, answers to held-out prompts, a checkpoint
            scheduled = done % o.eval_interval == 0 or done == steps
            if scheduled:
                began = time.perf_counter()
                info = record["eval"] = held_out.evaluation(policy, done)
                pace.add("looks", time.perf_counter() - began, look)
            run.write("metrics.jsonl", record)
            run.rescue = partial(training.save, done, info)
            if scheduled or stopping:
                run.rescue()
            if stopping and done < steps:
                run.exit_stopped()
        held_out.closing_report(info)
        before, after = map(runtime.as_path, (o.init_from, run.path("ckpt.pt")))
        run.saved(" ".join([runtime.start_of("minirlhf.sample"), *(
            [after, "--chat"] if isinstance(prompts[0].text, Talk) else
            [before, after, runtime.option("prompt", tokenizer.decode(prompts[0]))])]))


if __name__ == "__main__":
    launch(main)
