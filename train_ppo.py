"""Stage 3, PPO: the SFT model + a reward -> a policy that people prefer, kept near the SFT model by a KL penalty.

Each step reads as five paragraphs: ROLLOUT, JUDGEMENT, CREDIT, UPDATE, LOOK. A batch's columns lie on a grid (B, T-1):
index t means "having read tokens[:, :t+1], choose tokens[:, t+1]". Networks and losses see the answers' decisions only,
(N,): `decisions` are their flat indices, `flat` picks them, `grid` puts them back.   Schulman et al. 2017
"""
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from minirlhf import (adapters, checkpoint, evaluate, groups, kernels, memory, mixture, prepare, rewards, runtime,
                      sizes)
from minirlhf.chat import Talk, about
from minirlhf.config import RunOptions, fail, launch, parse, ranks, warn_idle
from minirlhf.data import blank_ends, encode_prompts, endless_batch, load_asked, load_parts, repeats
from minirlhf.generate import Rollout, compile_model, generate
from minirlhf.objectives import (adaptive_kl_coef, entropy, gae, grpo, k1, k2, k3, kl_above_baseline, log_ratio,
                                 policy_loss, rloo, shape_rewards, value_loss, whiten)


@dataclass
class Options(RunOptions):
    """Stage 3, PPO: SFT model + reward -> policy. Reads prompts.{train,val}.jsonl of --data_dir. A reward function is
    f(prompts: list[str], completions: list[str], **columns of the prompts: list) -> list[float | None]."""
    stage = "ppo"
    # ---- models, data, output
    data_dir: str = "data/sentiment"  # folder of the prompts; the default is prepared when it is missing
    out_dir: str = "out/ppo"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "out/sft/ckpt.pt"  # what the policy starts from: the SFT model, or a policy to train further
    reference: str = ""  # the model that the KL is measured from, and answers compared with; "" = that of init_from
    reward_model: str = "out/rm/ckpt.pt"  # the reward model
    reward: tuple[str, ...] = ()  # instead of it FILE.py:FUNCTION, another's path, or rm (it), each [:WEIGHT], summed
    at_most: tuple[str, ...] = ()  # NUMBER, or NAME:NUMBER: the limit of the mean of the --reward that has no weight
    multiplier_rate: float = 0.3  # what a limit's multiplier moves by a step, times how far the mean is over it (0..]
    value_init: Literal["rm", "sft"] = "rm"  # the value network's start: the reward model, or init_from's trunk
    judge: str = ""  # a second reward model or FILE.py:FUNCTION, never trained on: its preferences are reported
    lora_layers: int = 12  # adapters in the last so many blocks, where there are more; 0 = in all [0..]
    long_prompts: Literal["drop", "trim"] = "drop"  # prompts too long for the context: drop, or trim at the left
    # ---- rollouts
    total_episodes: int = 1920  # answers to sample in all, rounded up to whole batches [1..]
    batch_size: int = 64  # answers a step, over all ranks [1..]
    response_length: int = 48  # longest answer in tokens, eos included [1..]
    temperature: float = 1.0  # of sampling, and so of every log-probability [0.01..]
    group_size: int = 1  # answers to each prompt: batch_size / group_size prompts a step [1..]
    # ---- rewards and advantages
    advantages: Literal["gae", "rloo", "grpo"] = "gae"  # by a value network, or the other answers to a prompt
    kl_coef: float = 0.04  # beta, the reward lost for a nat of KL from the reference [0..]
    kl_baseline: float = 0.3  # share of the mean KL per token taken off each token's: length costs less [0..1]
    adaptive_kl_target: float = 0.0  # nats a response that kl_coef is adapted to reach; 0 = kl_coef stays [0..]
    reward_clip: float = 2.0  # the reward model's scores are clipped to +- this; 0 = never [0..]
    missing_eos_penalty: float = 0.7  # subtracted from the score of an answer that did not end; 0 = off [0..]
    whiten_rewards: bool = False  # divide rewards by their standard deviation, their mean kept
    gamma: float = 1.0  # discount [0..1]
    lam: float = 0.95  # GAE's lambda [0..1]
    # ---- updates
    num_ppo_epochs: int = 1  # passes over each batch [1..]
    num_mini_batches: int = 4  # optimizer steps a pass; must divide batch_size [1..]
    micro_batch_size: int = 32  # rows a forward pass: for memory; changes no gradient [1..]
    learning_rate: float = 1e-3  # of policy and value network, at its peak [0..]
    value_learning_rate: float = 3e-3  # of the value network, where it has its own; 0 = learning_rate [0..]
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # how it falls to 0; constant runs can be prolonged
    max_grad_norm: float = 1.0  # the gradient of each of the two networks is scaled down to this norm; 0 = never [0..]
    cliprange: float = 0.2  # of the policy's ratio (0..]
    cliprange_value: float = 0.2  # of the value's change (0..]
    vf_coef: float = 0.1  # weight of the value loss: matters for clipping its gradient, as the network is its own [0..]
    ent_coef: float = 0.007  # weight of an entropy bonus: keeps answers diverse [0..]
    value_warmup: int = 3  # first steps in which only the value network learns [0..]
    # ---- guards
    max_update_kl: float = 1.0  # nats a token from old to new policy (k3) above which a batch's epochs end (0..1]
    max_ref_kl: float = 60.0  # nats a response from the reference; three batches above it end the run; 0 = off [0..]
    # ---- evaluations and checkpoints
    eval_interval: int = 15  # steps between evaluations and checkpoints; the last step always has both [1..]
    num_eval_prompts: int = 256  # held-out prompts of the closing comparison, a quarter of them earlier [1..1000000]
    save_rollouts: bool = False  # keep each training answer with its score, reward and KL in rollouts.jsonl


@dataclass
class Batch(Rollout):
    """A rollout that each paragraph adds columns to: (B,) or (B, T-1), 0 outside the response."""
    prompt_index: torch.Tensor = None  # (B,) which of the prompts a row answers
    group: torch.Tensor = None  # (B,) which group of group_size answers to one prompt a row belongs to
    logprobs: torch.Tensor = None  # JUDGEMENT: log pi of what was sampled, under the policy that sampled it
    ref_logprobs: torch.Tensor = None  # the same under the reference
    entropies: torch.Tensor = None  # of the policy; for the log only
    values: torch.Tensor = None  # of the value network, if there is one
    scores: torch.Tensor = None  # (B,) of the reward model or function
    final_rewards: torch.Tensor = None  # CREDIT: (B,) the score, clipped, less the penalty for a missing eos
    penalised_kl: torch.Tensor = None  # log-ratio of policy to reference, less its baseline
    rewards: torch.Tensor = None  # -kl_coef * penalised_kl, and final_rewards at the last decision
    advantages: torch.Tensor = None  # of GAE, whitened; of RLOO or GRPO
    returns: torch.Tensor = None  # GAE's + values: what the value network learns; else the whole answer's reward


def roll_out(policy, prompts, index, eos, step, o, run):
    """group_size answers of the policy to prompts[i] for each i in index -> Batch, shortest first: microbatches of like
    length."""
    group = torch.arange(len(index), device=run.device).repeat_interleave(o.group_size)
    asked = [prompts[i] for i in index for _ in range(o.group_size)]
    with run.autocast():
        rollout = generate(policy, asked, o.response_length, eos, o.temperature, run.generator(step, "rollout"))
    batch = Batch(**vars(rollout), prompt_index=torch.tensor(index, device=run.device)[group], group=group)
    return batch.take(batch.lengths.argsort(stable=True))


@torch.no_grad()
def score_rollout(batch, policy, ref, value, reward, o, run):
    """Adds log-probabilities of what was sampled under policy and reference, entropies, values, scores."""
    adapters.add_states_below(batch, policy, value or reward.model, run, o.micro_batch_size)
    columns = []
    for part in microbatches(batch, torch.arange(len(batch.lengths), device=run.device), o):
        with run.autocast():
            logprobs, all_logprobs = policy.logprobs(part.tokens, part.decisions, o.temperature, part.below)  # (N, V)
            entropies = entropy(all_logprobs)
            del all_logprobs
            ref_logprobs = ref.logprobs(part.tokens, part.decisions, o.temperature, part.below)[0]
            values = [value.values(part.tokens, part.decisions, part.value_below)] if value else []
            columns.append([logprobs, ref_logprobs, entropies, *values])
    for name, column in zip(("logprobs", "ref_logprobs", "entropies", "values"), zip(*columns)):
        setattr(batch, name, batch.grid(torch.cat(column)))  # parts follow one another row by row
    batch.scores = reward(batch, o.micro_batch_size)


def credit(batch, kl_coef, o, run):
    """Adds rewards, advantages and returns."""
    mask = batch.response_mask
    scores = batch.scores.clamp(-o.reward_clip, o.reward_clip) if o.reward_clip and not o.reward else batch.scores
    batch.final_rewards = scores - o.missing_eos_penalty * ~batch.finished
    batch.penalised_kl = kl_above_baseline(k1(batch.logprobs, batch.ref_logprobs), mask, o.kl_baseline, run.total)
    batch.rewards = shape_rewards(batch.final_rewards, batch.penalised_kl, mask, kl_coef)
    if o.advantages == "gae":
        if o.whiten_rewards:
            batch.rewards = whiten(batch.rewards, mask, keep_mean=True, total=run.total)
        advantages, batch.returns = gae(batch.rewards, batch.values, mask, o.gamma, o.lam)
        batch.advantages = whiten(advantages, mask, total=run.total)
    else:  # the same at every decision of an answer
        R = batch.rewards.sum(1)  # (B,) score - kl_coef * KL of the answer
        A = {"rloo": rloo, "grpo": grpo}[o.advantages](R, batch.group)
        batch.advantages, batch.returns = A[:, None] * mask, R[:, None] * mask


def update(batch, policy, value, optimizers, step, epochs, o, run):
    """Epochs x minibatches x microbatches of the clipped losses -> (means over decisions by name, update_kl).

    One network after the other, to hold one's gradients; in the first value_warmup steps the policy rests. update_kl:
    the k3 between new and old policy at which the epochs ended early, its minibatch moving neither network; else 0.
    """
    runtime.check_finite(o, f"step {step + 1}", advantages=batch.advantages, returns=batch.returns)
    sums, count, ratios = {"value_loss": 0.0, "value_clipped": 0.0} if value else {}, 0, []  # over all minibatches
    for epoch in range(epochs):
        order = torch.randperm(len(batch.lengths), generator=run.generator(step, f"epoch {epoch}")).to(run.device)
        for i, rows in enumerate(order.tensor_split(o.num_mini_batches)):
            parts, where = microbatches(batch, rows, o), f"step {step + 1}, epoch {epoch + 1}"
            n = run.total(batch.response_mask[rows].sum())  # losses are divided once, by the decisions of all ranks
            check_weights, policy_sums, value_sums = epoch == i == 0, {}, {}  # weights are looked at once a batch
            if step >= o.value_warmup:
                for part in parts:
                    old_logprobs, advantages = part.flat(part.logprobs), part.flat(part.advantages)  # (N,)
                    with run.autocast():
                        logprobs, all_logprobs = policy.logprobs(part.tokens, part.decisions, o.temperature, part.below)
                        bonus = o.ent_coef * entropy(all_logprobs) if o.ent_coef else 0.0
                    del all_logprobs
                    loss, clipped = policy_loss(logprobs, old_logprobs, advantages, o.cliprange)
                    ((loss - bonus).sum() / n).backward()
                    with torch.no_grad():
                        add(policy_sums, policy_loss=loss, approxkl=k2(logprobs, old_logprobs), policy_clipped=clipped,
                            ratio=log_ratio(logprobs, old_logprobs).exp(), k3=k3(old_logprobs, logprobs))
                run.sum_gradients(policy.parameters())
                policy_sums = run.totals(policy_sums)
                mean_loss, update_kl = (torch.stack([policy_sums["policy_loss"], policy_sums["k3"]]) / n).tolist()
                if update_kl > o.max_update_kl:
                    policy.zero_grad(set_to_none=True)
                    return means(sums, count, ratios), update_kl
                runtime.optimizer_step(policy, optimizers[:1], mean_loss, where, o, check_weights)
                ratios.append(policy_sums["ratio"] / n)
            if value:
                for part in parts:
                    old_values, returns = part.flat(part.values), part.flat(part.returns)
                    with run.autocast():
                        values = value.values(part.tokens, part.decisions, part.value_below)
                    loss, clipped = value_loss(values, old_values, returns, o.cliprange_value)
                    (o.vf_coef * loss.sum() / n).backward()
                    add(value_sums, value_loss=loss.detach(), value_clipped=clipped)
                run.sum_gradients(value.parameters())
                value_sums = run.totals(value_sums)
                mean_loss = float(value_sums["value_loss"] / n)
                runtime.optimizer_step(value, optimizers[1:], mean_loss, where, o, check_weights)
            add(sums, **policy_sums, **value_sums)
            count = count + n
    return means(sums, count, ratios), 0.0


def microbatches(batch, rows, o):
    """Some rows, shortest first as roll_out left them, as Batches of micro_batch_size, each cut to its longest row."""
    return [batch.take(part) for part in rows.sort().values.split(o.micro_batch_size)]


def add(sums, **terms):
    """sums[name] += the sum of a term."""
    for name, term in terms.items():
        sums[name] = sums.get(name, 0.0) + term.sum()


def means(sums, count, ratios):
    """Sums over `count` decisions of all minibatches, and the mean ratio of each minibatch -> means by TRL's names."""
    mean = {name: float(total / max(count, 1)) for name, total in sums.items()}
    of_value = {"loss/value_avg": "value_loss", "val/clipfrac_avg": "value_clipped"}
    updates, ratios = len(ratios), torch.stack(ratios) if ratios else torch.ones(1)
    return {"policy/approxkl_avg": mean.get("approxkl", 0.0), "policy/clipfrac_avg": mean.get("policy_clipped", 0.0),
            "policy/updates": updates, "loss/policy_avg": mean.get("policy_loss", 0.0),
            **{ours: mean[name] for ours, name in of_value.items() if name in mean},
            "val/ratio": float(ratios.mean()), "val/ratio_var": float(ratios.var(correction=0))}


def make_optimizers(policy, value, o):
    """AdamW for each network that there is, so that each keeps its own gradient norm. No weight decay."""
    rates = o.learning_rate, o.value_learning_rate or o.learning_rate
    return [kernels.AdamW([{"params": runtime.learning(model), "peak": rate}], lr=rate, eps=1e-5, weight_decay=0.0,
                          fused=True) for model, rate in zip((policy, value), rates) if model]


def read_options(argv):
    """-> Options, and what --resume goes on from. Exits 2 on options that exclude each other."""
    o, saved = checkpoint.resume(parse(Options, argv), "ppo", (
        "seed", "val_share", "reward", "value_init", "batch_size", "temperature", "response_length", "long_prompts",
        "lr_schedule", *groups.OPTIONS, *adapters.OPTIONS))
    sizes.check_batch(o)
    _, world = ranks()
    if o.batch_size % (o.num_mini_batches * world):
        fail(f"--num_mini_batches {o.num_mini_batches}: must divide --batch_size {o.batch_size}"
             + (f" on each of {world} ranks" if world > 1 else ""))
    if o.adaptive_kl_target and not o.kl_coef:
        fail(f"--adaptive_kl_target {o.adaptive_kl_target:g}: adapts --kl_coef, which is 0 and would stay so")
    groups.check_options(o)
    steps = -(-o.total_episodes // o.batch_size)  # rounded up
    if o.value_warmup >= steps:
        fail(f"--value_warmup {o.value_warmup}: must be less than the run's {steps} steps (--total_episodes "
             f"{o.total_episodes} / --batch_size {o.batch_size}), or the policy never learns")
    mixture.check_options(o)
    adapters.check_options(o)
    warn_idle(o, "kl_coef 0", not o.kl_coef, "kl_baseline")
    warn_idle(o, "vf_coef 0", not o.vf_coef, "cliprange_value", "value_learning_rate")
    return o, saved, steps


def read_prompts(o, tokenizer, context):
    """-> ids of the prompts for training and of those held out, and the lines to say of them. Exits 2 if none fits."""
    room, encoded = context - o.response_length, []
    if room < 2:
        fail(f"--response_length {o.response_length}: leaves no room for a prompt in a context of {context} tokens")
    *texts, paths, lines = load_parts(load_asked, "prompts", o)
    for path, part, name in zip(paths, texts, ("training", "held-out")):
        kept, long = encode_prompts(tokenizer, part, room, o.long_prompts)
        if not kept:
            fail(f"{path}: no prompt fits {room} tokens (context {context} less --response_length "
                 f"{o.response_length}); use --long_prompts trim or a shorter --response_length")
        encoded.append(kept)
        if long:
            lines.append(f"{name} prompts: {long} of {len(part)} longer than {room} tokens: "
                         + {"drop": "dropped", "trim": "trimmed at the left"}[o.long_prompts])
        lines += blank_ends(part, f"{name} prompts")
    head = f"{len(encoded[0]):,} prompts for training, {len(encoded[1]):,} held out, from {o.data_dir}"
    return *encoded, [head, *lines, *repeats(*texts, "prompts"), *about(tokenizer, texts[0], "prompts")], paths


def main(argv=None):
    o, saved, steps = read_options(argv)
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    with runtime.Run(o, "ppo") as run:
        # ---- the policy, its frozen reference, what scores an answer, the value network
        start, ref, tokenizer, ref_name = checkpoint.load_pair(o.init_from, o.reference, run.device)
        checkpoint.as_begun(tokenizer, saved)
        policy = adapters.learner(start, "lm", o, runtime.generator(o.seed, 0, 0, "policy"))
        kernels.pick_matmul(policy)
        reward = mixture.load(o, ref, tokenizer, o.init_from, run)
        judge = rewards.load(o.judge, "--judge", ref, tokenizer, o.init_from, run) if o.judge else None
        from_rm = reward.model is not None and o.value_init == "rm"
        adapters.share_below(policy, ref, *reward.models)
        value = adapters.learner(reward.model if from_rm else start, "scalar", o, runtime.generator(
            o.seed, 0, 0, "value")) if o.advantages == "gae" else None
        prompts, val_prompts, about_prompts, paths = read_prompts(o, tokenizer, policy.config.block_size)
        mixture.give_columns([reward, judge], prompts + val_prompts, o.data_dir)
        kernels.pack_frozen(run, [policy, value], [ref, *reward.models, judge and judge.model])
        optimizers = make_optimizers(policy, value, o)

        # ---- a new run, or one that goes on
        training = checkpoint.Training(
            run, tokenizer, policy, optimizers, {
                f"the prompts of {o.data_dir}": paths, f"--init_from {o.init_from}": checkpoint.files_of(o.init_from),
                **reward.inputs(),
                **({f"--reference {o.reference}": checkpoint.files_of(o.reference)} if o.reference else {})},
            **({"value_model": value} if value else {}))
        first, kept = training.restore(saved, steps)
        kl_coef, guard = o.kl_coef, evaluate.DivergenceGuard(o, ref_name=ref_name)
        with checkpoint.fitting(o.out_dir):
            if kept:
                guard.in_a_row = int(kept["high"])
                if o.kl_coef == kept["options"]["kl_coef"]:
                    kl_coef = float(kept["kl_coef"])  # as far as it has adapted
                reward.restore(kept.get("multipliers", {}))
        saved = kept = None
        about_memory = memory.check(run, o, memory.of_ppo, policy, value, [ref, *reward.models, judge and judge.model],
                                    max(map(len, prompts + val_prompts)))
        if o.checkpoint_activations:
            memory.recompute(policy), value and memory.recompute(value)
        if o.compile:
            compile_model(policy, decode=True), value and compile_model(value)
        if o.check:
            from minirlhf import check
            check.ppo(policy, ref, value, reward, tokenizer, prompts[:64], first, o, run)
        run.announce("PPO", [
            *about_prompts,
            f"policy: {runtime.describe_parameters(policy)} from {o.init_from}; reference of the KL: "
            f"{o.reference or 'the same model'}",
            f"{groups.described(o, reward.source if from_rm else o.init_from)}; reward: {reward}",
            f"{run.hardware}; {steps} steps of {o.batch_size} answers of up to {o.response_length} tokens, "
            f"{o.num_ppo_epochs} epochs x {o.num_mini_batches} minibatches each",
            about_memory], first if first < steps else 0)
        if first >= steps:
            run.say(f"     this run is finished ({first} steps); its closing report again:")
        against_sft = evaluate.AgainstSFT(ref, tokenizer, reward, judge, val_prompts, o, run, ref_name)
        run.start_logs(first)  # an old run stays until the reward has worked once
        pace = runtime.Pace()

        for step in range(first, steps):
            began = time.perf_counter()
            runtime.set_rate(optimizers, runtime.rate_factor(o.lr_schedule, step, steps))

            # ---- ROLLOUT: the policy answers a batch of prompts
            index = run.share(endless_batch(len(prompts), o.batch_size // o.group_size, o.seed, step))
            batch = roll_out(policy, prompts, index, tokenizer.eos, step, o, run)
            rollout_seconds = time.perf_counter() - began

            # ---- JUDGEMENT: log-probabilities under policy and reference, values, scores; no gradients
            score_rollout(batch, policy, ref, value, reward, o, run)
            batch.scores = reward.learned(batch, o.reward_clip)  # with --reward: clipped, less multiplier x cost

            # ---- CREDIT: a KL penalty at each token, the score at the last one, GAE, whitening; or RLOO, GRPO
            credit(batch, kl_coef, o, run)

            # ---- UPDATE: epochs x minibatches x microbatches of the clipped losses
            figures = evaluate.rollout_figures(batch, kl_coef, run) | reward.figures(batch, run)
            epochs = guard.epochs(figures["objective/kl"])  # one only, where the policy is far from the reference
            judged_seconds = time.perf_counter() - began
            update_figures, update_kl = update(batch, policy, value, optimizers, step, epochs, o, run)

            # ---- LOOK: one log line, now and then held-out prompts and a checkpoint
            done, seconds = step + 1, time.perf_counter() - began
            pace.add("judged", judged_seconds)
            pace.add("warm-up" if step < o.value_warmup else "update", seconds - judged_seconds)
            scheduled, stopping = done % o.eval_interval == 0 or done == steps, run.should_stop()
            length = figures["completions/mean_length"]
            record = {"step": done, "episode": done * o.batch_size, "lr": optimizers[0].param_groups[0]["lr"],
                      "eps": o.batch_size / seconds, "tokens_per_second": o.batch_size * length / seconds,
                      "rollout_seconds": rollout_seconds, "seconds": seconds, **figures, **update_figures}
            left = evaluate.ppo_time_left(pace, policy, batch, done, steps, o) + against_sft.time_left(done, steps)
            run.say(f"{run.progress(done, steps, left)}  {evaluate.describe_step(record)}"
                    + ("  (value warm-up)" if step < o.value_warmup else ""))
            for warning in against_sft.warnings(batch, record):
                run.say(warning)
            if o.save_rollouts:
                evaluate.save_rollouts(batch, done, tokenizer, run)
            guard.after_update(record, update_kl, run)
            if o.adaptive_kl_target:
                kl_coef = adaptive_kl_coef(kl_coef, record["objective/kl"], o.adaptive_kl_target, o.batch_size)
            if done > o.value_warmup:  # until then the policy cannot follow
                reward.follow(record, o.multiplier_rate)
            if scheduled:
                record["eval"] = against_sft.evaluation(policy, done)
                evaluate.save_tokens(batch, policy, done, steps, tokenizer, o, run)
            run.write("metrics.jsonl", record)
            run.rescue = partial(training.save, done, record, kl_coef=kl_coef, high=guard.in_a_row,
                                 multipliers=reward.multipliers)
            if scheduled or stopping:
                run.rescue()
            if stopping:
                run.exit_stopped()

        # ---- before and after, on held-out prompts
        against_sft.closing_report(policy, max(first, steps))
        before, after = map(runtime.as_path, (o.init_from, run.path("ckpt.pt")))
        run.saved(" ".join([runtime.start_of("minirlhf.sample"), *(
            [after, "--chat"] if isinstance(val_prompts[0].text, Talk) else
            [before, after, runtime.option("prompt", tokenizer.decode(val_prompts[0]))])]))


if __name__ == "__main__":
    launch(main)
