"""Stage 3, PPO: the SFT model + a reward -> a policy that people prefer, kept near the SFT model by a KL penalty.

Each step reads as five paragraphs: ROLLOUT, JUDGEMENT, CREDIT, UPDATE, LOOK. All per-token tensors share the grid
(B, T-1): index t means "having read tokens[:, :t+1], choose tokens[:, t+1]".
"""
import math
import os
import shlex
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from minirlhf import checkpoint, prepare, runtime
from minirlhf.config import RunOptions, fail, launch, parse
from minirlhf.data import encode_prompts, endless_batch, fingerprint, load_prompts, repeats
from minirlhf.evaluate import answer, concerns, decisions, on_grid, report, summary
from minirlhf.generate import Decoder, generate
from minirlhf.model import GPT, places
from minirlhf.objectives import (adaptive_kl_coef, best_of_n_kl, credit_length, entropy, explained_variance, gae, k1,
                                 k3, log_ratio, moments, policy_clipped, policy_loss, shape_rewards, value_clipped,
                                 value_loss, whiten)
from minirlhf.rewards import Judge, load_function


@dataclass
class Options(RunOptions):
    """Stage 3, PPO: SFT model + reward -> policy. Reads prompts.{train,val}.jsonl of --data_dir."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of the products; float32: sampler and trainer agree
    data_dir: str = "data/sentiment"  # folder of the prompts; the default is prepared when it is missing
    out_dir: str = "out/ppo"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "out/sft/ckpt.pt"  # the SFT model: the policy starts from it, and it is the reference of the KL
    reward_model: str = "out/rm/ckpt.pt"  # the reward model
    reward: str = ""  # module.py:function instead of it: fn(prompts: list[str], completions: list[str]) -> list[float]
    value_init: Literal["rm", "sft"] = "rm"  # the value network's start: the reward model, or the SFT trunk, zero head
    judge: str = ""  # a second reward model that only looks on: whether it prefers the policy's answers is reported
    total_episodes: int = 11520  # answers to sample in all, rounded up to whole batches [1..]
    batch_size: int = 192  # prompts a step, over all ranks [1..]
    num_ppo_epochs: int = 2  # passes over each batch [1..]
    num_mini_batches: int = 2  # optimizer steps a pass; must divide batch_size [1..]
    micro_batch_size: int = 64  # rows a forward pass: for memory; changes no gradient [1..]
    response_length: int = 48  # longest answer in tokens, eos included [1..]
    temperature: float = 1.0  # of sampling, and so of every log-probability [0.01..]
    learning_rate: float = 3e-4  # of policy and value network; falls linearly to 0 [0..]
    adam_eps: float = 1e-5  # AdamW's epsilon; there is no weight decay (0..]
    max_grad_norm: float = 1.0  # the gradient of each of the two networks is scaled down to this norm; 0 = never [0..]
    kl_coef: float = 0.055  # beta, the price of a nat of KL from the SFT model, in deviations of the reward [0..]
    kl_length_credit: float = 0.14  # share of the mean KL a token that is not charged, lest short answers pay [0..1]
    kl_target: float = 0.0  # nats a response; kl_coef follows it, by 20% in 10,000 answers at most; 0 = it stays [0..]
    gamma: float = 1.0  # discount [0..1]
    lam: float = 0.95  # GAE's lambda [0..1]
    cliprange: float = 0.2  # of the policy's ratio (0..]
    cliprange_value: float = 0.2  # of the value's change (0..]
    vf_coef: float = 0.1  # weight of the value loss [0..]
    ent_coef: float = 0.0245  # weight of an entropy bonus (Schulman et al. 2017, eq. 9): keeps answers diverse [0..]
    value_warmup: int = 4  # first steps in which only the value network learns [0..]
    reward_clip: float = 2.0  # the reward model's scores count up to +- this, lest a few words take over; 0 = off [0..]
    missing_eos_penalty: float = 1.0  # subtracted from the score of an answer that did not end; 0 = off [0..]
    whiten_rewards: bool = False  # divide rewards by their deviation, their mean kept
    target_kl: float = 0.0  # k3 between new and old policy above which a batch's epochs end; 0 = never [0..]
    max_kl: float = 60.0  # nats a response from SFT; above it a batch has one epoch, three in a row end the run [0..]
    long_prompts: Literal["drop", "trim"] = "drop"  # prompts too long for the context: drop, or trim at the left
    eval_interval: int = 20  # steps between looks at held-out prompts and checkpoints; the last step always does [1..]
    num_eval_prompts: int = 128  # held-out prompts at each look [1..]
    num_final_prompts: int = 512  # held-out prompts for the closing comparison [1..]
    num_samples: int = 4  # answers shown at each look [0..]
    best_of_n: int = 4  # the closing report compares with the best of n SFT answers; 0 = leave it out [0..]


BLOWN_UP = 1.0  # nats a decision (k3) between new and old policy: a sound update moves by a hundredth of it


# ---- the paragraphs of a step

@dataclass
class Networks:
    """What a step trains, `policy` and `value`, and what it holds against them: the frozen SFT model `ref`."""
    policy: GPT
    ref: GPT
    value: GPT
    compile: bool = False

    def __post_init__(self):
        self.policy_hidden, self.value_hidden = (
            torch.compile(m.hidden, dynamic=True) if self.compile else m.hidden for m in (self.policy, self.value))
        self.decoder = Decoder(self.policy) if self.compile else None


@dataclass
class Judgement:
    """What the networks say of a rollout: scores (B,), the rest (B, T-1) and 0 outside the response."""
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor
    scores: torch.Tensor


def roll_out(nets, prompts, eos, step, o, run):
    """Ids of prompts -> Rollout of the policy's answers, shortest first: rows of like length share a microbatch."""
    with run.autocast():
        rollout = generate(nets.policy, prompts, o.response_length, eos, o.temperature, run.generator(step, "rollout"),
                           nets.decoder)
    return rollout.take(rollout.lengths.argsort(stable=True))


def microbatches(rollout, rows, o):
    """Some rows in parts of micro_batch_size -> list of (their numbers, their Rollout cut to the longest, the places of
    its decisions on the grid)."""
    parts = rows.sort().values.split(o.micro_batch_size)
    return [(part, batch, places(batch.response_mask)) for part in parts for batch in [rollout.take(part)]]


@torch.no_grad()
def judgement(nets, rollout, judge, o, run):
    """Rollout -> Judgement: log-probabilities of what was sampled under policy and reference, values, scores."""
    mask, rows = rollout.response_mask, torch.arange(len(rollout.lengths), device=run.device)

    def forward(batch, counted):
        with run.autocast():
            every, logprobs = decisions(nets.policy, batch.tokens, counted, o.temperature, nets.policy_hidden)
            entropies = entropy(every)
            del every
            _, ref_logprobs = decisions(nets.ref, batch.tokens, counted, o.temperature)
            values = nets.value.scalar(nets.value_hidden(batch.tokens[:, :-1], counted=counted))
        return logprobs, ref_logprobs, values, entropies

    parts = [forward(batch, counted) for _, batch, counted in microbatches(rollout, rows, o)]
    whole = o.micro_batch_size if judge.model is not None else len(rows)  # a function gets all answers at once
    scores = torch.cat([judge(rollout.take(part)) for part in rows.split(whole)])
    return Judgement(*(on_grid(torch.cat(x), mask) for x in zip(*parts)), scores)


def credit(rollout, judged, kl_coef, o, total):
    """Rollout, Judgement -> advantages, returns, charged (B, T-1), paid (B,).

    charged: the KL a decision pays for; paid: the score, clipped, less the penalty of an answer that did not end.
    """
    mask = rollout.response_mask
    scores = judged.scores.clamp(-o.reward_clip, o.reward_clip) if o.reward_clip and not o.reward else judged.scores
    paid = scores - o.missing_eos_penalty * ~rollout.finished
    charged = credit_length(k1(judged.old_logprobs, judged.ref_logprobs), mask, o.kl_length_credit, total)
    rewards = shape_rewards(paid, charged, mask, kl_coef)  # (B, T-1)
    if o.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True, total=total)
    advantages, returns = gae(rewards, judged.values, mask, o.gamma, o.lam)
    return whiten(advantages, mask, total=total), returns, charged, paid


def policy_gradients(nets, parts, count, judged, advantages, o, run):
    """Add to each .grad of the policy that of its clipped loss over some microbatches -> sums (5,).

    count: the decisions of all microbatches and ranks; the gradient is that of the loss's sum / count, whatever the
    microbatch size. sums, of all ranks too: loss, 0.5 log-ratio^2, clipped, ratio, k3 of new and old policy.
    """
    sums = torch.zeros(5, device=run.device)
    for rows, batch, counted in parts:
        old, A = (x[rows, :batch.tokens.shape[1] - 1].flatten()[counted] for x in (judged.old_logprobs, advantages))
        with run.autocast():
            every, new = decisions(nets.policy, batch.tokens, counted, o.temperature, nets.policy_hidden)
            bonus = o.ent_coef * entropy(every) if o.ent_coef else 0.0
        del every  # what the backward pass needs of them is kept
        loss = policy_loss(new, old, A, o.cliprange)
        ((loss - bonus).sum() / count).backward()
        with torch.no_grad():
            d = log_ratio(new, old)
            sums += torch.stack([x.sum() for x in (
                loss, 0.5 * d ** 2, policy_clipped(new, old, A, o.cliprange), d.exp(), k3(old, new))])
    run.sum_gradients(nets.policy.parameters())
    return run.total(sums)


def value_gradients(nets, parts, count, judged, returns, o, run):
    """The same for the value network -> sums (2,): loss, clipped."""
    sums = torch.zeros(2, device=run.device)
    for rows, batch, counted in parts:
        V_old, R = (x[rows, :batch.tokens.shape[1] - 1].flatten()[counted] for x in (judged.values, returns))
        with run.autocast():
            V = nets.value.scalar(nets.value_hidden(batch.tokens[:, :-1], counted=counted))
        loss = value_loss(V, V_old, R, o.cliprange_value)
        (o.vf_coef * loss.sum() / count).backward()
        with torch.no_grad():
            sums += torch.stack([loss.sum(), value_clipped(V, V_old, R, o.cliprange_value).sum()])
    run.sum_gradients(nets.value.parameters())
    return run.total(sums)


def update(nets, optimizers, rollout, judged, advantages, returns, step, o, run):
    """Epochs x minibatches of clipped losses -> (sums (7,), their count, mean ratio of each minibatch, ended).

    One network after the other, so that the gradient of one is in memory; in the first value_warmup steps the policy
    rests. ended: the k3 between new and old policy at which the epochs ended early, the gradient dropped, or 0. Exits
    2 on what is not finite: before any step on advantages and returns, before the network's own on loss and gradient.
    """
    for name, x in (("advantages", advantages), ("returns", returns)):
        if not x.isfinite().all():
            runtime.fail_before_update(f"step {step + 1}: the {name} are not finite", o)

    def learn(model, optimizer, loss, epoch, look):
        runtime.clip_gradients(model, loss, f"step {step + 1}, epoch {epoch + 1}", o, weights=look)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    policy_optimizer, value_optimizer = optimizers
    totals, counted, ratios = torch.zeros(7, device=run.device), 0, []
    for epoch in range(o.num_ppo_epochs):
        shuffled = torch.randperm(len(rollout.lengths), generator=run.generator(step, f"epoch {epoch}")).to(run.device)
        for i, minibatch in enumerate(shuffled.tensor_split(o.num_mini_batches)):
            look = epoch == 0 and i == 0  # once a batch at the weights; a bad one spoils the losses that follow anyway
            parts = microbatches(rollout, minibatch, o)
            count = run.total(rollout.response_mask[minibatch].sum())  # divide once, by the decisions of all ranks
            policy_sums = torch.zeros(5, device=run.device)
            if step >= o.value_warmup:
                policy_sums = policy_gradients(nets, parts, count, judged, advantages, o, run)
                pg_loss, moved = (policy_sums[[0, 4]] / count).tolist()
                if moved > min(o.target_kl or BLOWN_UP, BLOWN_UP):
                    nets.policy.zero_grad(set_to_none=True)
                    return totals, counted, ratios, moved
                learn(nets.policy, policy_optimizer, pg_loss, epoch, look)
                ratios.append(policy_sums[3] / count)
            value_sums = value_gradients(nets, parts, count, judged, returns, o, run)
            learn(nets.value, value_optimizer, float(value_sums[0] / count), epoch, look)
            totals, counted = totals + torch.cat([policy_sums, value_sums]), counted + count
    return totals, counted, ratios, 0.0


def make_optimizers(policy, value, o):
    """AdamW for each of the two networks, so that each keeps its own gradient norm."""
    return [runtime.AdamW(model.parameters(), lr=o.learning_rate, eps=o.adam_eps, weight_decay=0.0, fused=True)
            for model in (policy, value)]


def main():
    o, start, start_path = checkpoint.resume(parse(Options), "ppo", (
        "seed", "init_from", "reward_model", "reward", "value_init", "batch_size", "total_episodes", "temperature",
        "response_length", "long_prompts", "data_dir"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if o.batch_size % (o.num_mini_batches * world):
        fail(f"--num_mini_batches {o.num_mini_batches}: must divide --batch_size {o.batch_size}"
             + (f" on each of {world} ranks" if world > 1 else ""))
    if o.kl_target and not o.kl_coef:
        fail(f"--kl_target {o.kl_target:g}: follows --kl_coef, which is 0 and would stay so")
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    paths = [os.path.join(o.data_dir, f"prompts.{split}.jsonl") for split in ("train", "val")]
    train, val = map(load_prompts, paths)
    with runtime.Run(o, "ppo") as run:
        # ---- four networks: policy and its frozen reference, value and reward
        ref, tokenizer, _ = checkpoint.load(o.init_from, ["sft"], run.device)
        policy = ref.with_head("lm")
        runtime.pick_products(policy)
        if o.reward:
            reward_model, judges = None, [Judge(run, tokenizer, function=load_function(o.reward), name=o.reward)]
        else:
            reward_model, rm_tokenizer, _ = checkpoint.load(o.reward_model, ["rm"], run.device)
            checkpoint.compatible((ref, tokenizer), o.init_from, (reward_model, rm_tokenizer), o.reward_model)
            judges = [Judge(run, rm_tokenizer, reward_model, name=o.reward_model)]
        if o.judge:
            judge_model, judge_tokenizer, _ = checkpoint.load(o.judge, ["rm"], run.device)
            checkpoint.compatible((ref, tokenizer), o.init_from, (judge_model, judge_tokenizer), o.judge)
            judges.append(Judge(run, tokenizer, judge_model, name=o.judge))
        if reward_model is not None and o.value_init == "rm":
            value_model = reward_model.with_head("scalar")
        else:
            value_model = ref.with_head("scalar")
        context = policy.config.block_size
        room = context - o.response_length
        if room < 2:
            fail(f"--response_length {o.response_length}: leaves no room for a prompt in a context of {context} tokens")
        (prompts, long_train), (val_prompts, long_val) = (encode_prompts(tokenizer, texts, room, o.long_prompts)
                                                          for texts in (train, val))
        for path, kept in zip(paths, (prompts, val_prompts)):
            if not kept:
                fail(f"{path}: no prompt fits {room} tokens (context {context} less --response_length "
                     f"{o.response_length}); use --long_prompts trim or a shorter --response_length")
        final_prompts = val_prompts[:o.num_final_prompts]
        look = min(o.num_eval_prompts, len(final_prompts))
        steps = math.ceil(o.total_episodes / o.batch_size)
        if o.value_warmup >= steps:
            fail(f"--value_warmup {o.value_warmup}: must be less than the run's {steps} steps (--total_episodes "
                 f"{o.total_episodes} / --batch_size {o.batch_size}), or the policy never learns")
        optimizers = make_optimizers(policy, value_model, o)
        first, kl_coef, high, surroundings = 0, o.kl_coef, 0, run.surroundings()
        prints = {f"{o.data_dir}/prompts.*.jsonl": fingerprint(*paths)}
        for path in (o.init_from, o.reward_model)[:1 if o.reward else 2]:
            prints[path] = fingerprint(checkpoint.file_of(path))
        if o.resume:
            with checkpoint.fitting(start_path):
                state = start["training"]
                checkpoint.same_inputs(state["data"], prints, start_path)
                checkpoint.load_weights(policy, start["model"], start_path)
                checkpoint.load_weights(value_model, state["value_model"], start_path)
                checkpoint.load_optimizers(optimizers, state["optimizers"], start_path)
                first, high = checkpoint.step_of(state, steps, start_path), int(state["high"])
                if o.kl_coef == start["options"]["kl_coef"]:
                    kl_coef = float(state["kl_coef"])  # as far as it has adapted
                surroundings = run.surroundings(start.get("environment"))
                start = state = None  # a second copy of weights and moments
        nets = Networks(policy, ref, value_model, o.compile)
        if o.check:
            from minirlhf import check
            check.ppo(nets, judges[0], tokenizer, prompts[:64], room, first, o, run)

        # ---- what is about to happen
        run.say(f"PPO: {len(prompts):,} prompts for training, {len(val_prompts):,} held out, from {o.data_dir}")
        for long, texts, name in ((long_train, train, "training"), (long_val, val, "held-out")):
            if long:
                run.say(f"     {name} prompts: {long} of {len(texts)} longer than {room} tokens: "
                        + {"drop": "dropped", "trim": "trimmed at the left"}[o.long_prompts])
        for warning in repeats(train, val, "prompts"):
            run.say(warning)
        run.say(f"     policy: {runtime.count_parameters(policy):,} parameters from {o.init_from}; value: from "
                f"{o.reward_model if reward_model is not None and o.value_init == 'rm' else o.init_from}; reward: "
                f"{o.reward or o.reward_model}")
        run.say(f"     {run.hardware}; {steps} steps of {o.batch_size} answers of up to {o.response_length} tokens, "
                f"{o.num_ppo_epochs} epochs x {o.num_mini_batches} minibatches each")
        run.say(f"     output: {o.out_dir}" + (f"; goes on from step {first}" if 0 < first < steps else ""))
        if first >= steps:
            run.say(f"     this run is finished ({first} steps); its closing report again:")
        before = answer(ref, ref, judges, run, tokenizer, final_prompts, o)
        base, warned = summary(before, before), set()
        run.start_logs(first)  # an old run stays until the reward has worked once

        for step in range(first, steps):
            began = time.perf_counter()
            lr = o.learning_rate * (1 - step / steps)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr

            # ---- ROLLOUT: the policy answers a batch of prompts
            batch = [prompts[i] for i in run.share(endless_batch(len(prompts), o.batch_size, o.seed, step))]
            rollout = roll_out(nets, batch, tokenizer.eos, step, o, run)
            sampled = time.perf_counter()

            # ---- JUDGEMENT: old and reference log-probabilities, values, scores; no gradients
            judged = judgement(nets, rollout, judges[0], o, run)
            n = run.total(torch.tensor([float(len(batch))], device=run.device))
            mean_kl = float(run.total(k1(judged.old_logprobs, judged.ref_logprobs).sum()) / n)
            far = 0 < o.max_kl < mean_kl

            # ---- CREDIT: a KL penalty a token, the score at the last decision, GAE, whitening
            advantages, returns, charged, paid = credit(rollout, judged, kl_coef, o, run.total)

            # ---- UPDATE: epochs x minibatches x microbatches of the clipped losses
            totals, counted, ratios, ended = update(nets, optimizers, rollout, judged, advantages, returns, step,
                                                    replace(o, num_ppo_epochs=1) if far else o, run)

            # ---- LOOK: one log line, now and then held-out prompts and a checkpoint
            mask = rollout.response_mask
            means = run.total(torch.stack([x.float().sum() for x in (
                k3(judged.old_logprobs, judged.ref_logprobs), -judged.old_logprobs, judged.scores, paid,
                kl_coef * charged, mask, rollout.finished, judged.entropies,
                (judged.old_logprobs - rollout.sampler_logprobs).abs())])) / n
            mean_k3, neg_logprob, score, rewarded, priced_kl, length, eos_rate, H, gap = means.tolist()
            H, gap = H / length, gap / length  # a decision, over all decisions of all ranks
            policy_avg, approxkl, clipfrac, _, _, value_avg, value_clipfrac = (totals / max(1, counted)).tolist()
            updates, ratios = len(ratios), torch.stack(ratios) if ratios else torch.ones(1)
            seconds = time.perf_counter() - began
            done, stopping = step + 1, run.should_stop()
            record = {
                "step": done, "episode": done * o.batch_size, "lr": lr, "eps": float(n) / seconds,
                "tokens_per_second": float(n) * length / seconds, "rollout_seconds": sampled - began,
                "seconds": seconds,
                "objective/kl": mean_kl, "objective/kl_k3": mean_k3, "objective/entropy": neg_logprob,
                "objective/scores": score, "objective/non_score_reward": -priced_kl,
                "objective/rlhf_reward": rewarded - priced_kl, "objective/kl_coef": kl_coef,
                "policy/approxkl_avg": approxkl, "policy/clipfrac_avg": clipfrac, "policy/entropy_avg": H,
                "loss/policy_avg": policy_avg, "loss/value_avg": value_avg,
                "val/clipfrac_avg": value_clipfrac, "val/ratio": float(ratios.mean()),
                "val/ratio_var": float(ratios.var(correction=0)), "val/sampler_gap": gap,
                "val/explained_variance": float(explained_variance(judged.values, returns, mask, run.total)),
                "completions/mean_length": length, "completions/eos_rate": eos_rate,
                "policy/updates": updates}
            run.say(f"{run.progress(done, steps, first)}  score {score:+.3f}  kl {mean_kl:.2f} (k3 {mean_k3:.2f})  "
                    f"entropy {H:.2f}  clip {clipfrac:.3f}  value ev {record['val/explained_variance']:+.2f}  length "
                    f"{length:.1f}  eos {eos_rate:.2f}  {record['tokens_per_second']:,.0f} tokens/s"
                    + ("  (value warm-up)" if step < o.value_warmup else ""))
            _, spread = moments(judged.scores, torch.ones_like(judged.scores, dtype=torch.bool), run.total)
            for about, text in concerns(record, float(spread), base, o):
                if about not in warned:
                    warned.add(about)
                    run.say(f"warning: {text}")
            blown = ended > BLOWN_UP
            high = high + 1 if far or blown else 0
            if far:
                trouble = f"the KL from the SFT model is {mean_kl:.1f} nats a response, --max_kl is {o.max_kl:g}"
                advice = f"raise --kl_coef above {kl_coef:g} or lower --learning_rate below {o.learning_rate:g}"
            elif blown:
                trouble = f"one update moved the policy by {ended:.2g} nats a decision (k3), more than {BLOWN_UP:g}"
                advice = (f"lower --learning_rate below {o.learning_rate:g}"
                          + (f" or --num_ppo_epochs below {o.num_ppo_epochs}" if o.num_ppo_epochs > 1 else ""))
            if high:
                run.say(f"warning: {trouble}: this batch's epochs end early ({high} in a row; the third ends the run)")
            if o.kl_target:
                kl_coef = adaptive_kl_coef(kl_coef, mean_kl, o.kl_target, o.batch_size)

            if high == 3:
                run.write("metrics.jsonl", record)
                raise SystemExit(f"error: step {done}: for the third batch in a row {trouble}: the policy is leaving "
                                 f"the language it knows; {advice}. A checkpoint of an earlier policy, if any, is in "
                                 f"{o.out_dir}: --resume goes on from it, with other options if they are named.")
            scheduled = done % o.eval_interval == 0 or done == steps
            if scheduled:
                now = answer(policy, ref, judges, run, tokenizer, val_prompts[:look], o, decoder=nets.decoder)
                record["eval"] = summary(now, before[:look])
                run.say(f"  held out: score {record['eval']['score'][0]:+.3f}, kl {record['eval']['kl'][0]:.2f}, "
                        f"preferred to the SFT answer {record['eval']['win_rate'][0]:.1%}, eos "
                        f"{record['eval']['eos_rate']:.2f}")
                for old_row, row in list(zip(before, now))[:o.num_samples]:
                    run.say(f"    {row['prompt']} |{row['completion']}  ({old_row['score']:+.2f} -> "
                            f"{row['score']:+.2f})")
                    run.write("samples.jsonl", {"step": done, **{k: row[k] for k in ("prompt", "completion", "score")}})
            run.write("metrics.jsonl", record)
            if (scheduled or stopping) and run.main:
                run.sync()
                run.say(checkpoint.save(
                    run.path("ckpt.pt"), stage="ppo", model=policy, tokenizer=tokenizer, options=o, info=record,
                    environment=surroundings, training={
                        "step": done, "value_model": value_model.state_dict(), "kl_coef": kl_coef, "high": high,
                        "data": prints, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}))
            if stopping:
                run.exit_stopped()

        # ---- before and after, on held-out prompts
        after = answer(policy, ref, judges, run, tokenizer, final_prompts, o, decoder=nets.decoder)
        if run.should_stop():
            run.exit_stopped()
        final = {"before": base, "after": summary(after, before)}
        run.write("metrics.jsonl", {"step": max(first, steps), "final": final})
        run.say()
        report(run, **final)
        if o.best_of_n:
            some = final_prompts[:look]
            draws = [before[:look], *(answer(ref, ref, judges, run, tokenizer, some, o, draw)
                                      for draw in range(1, o.best_of_n))]
            best = summary([max(rows, key=lambda row: row["score"]) for rows in zip(*draws)], before[:look])
            run.say(f"for comparison, the best of {o.best_of_n} SFT answers to {len(some)} of them: mean score "
                    f"{best['score'][0]:.3f}, KL <= {best_of_n_kl(o.best_of_n):.2f}")
        for old_row, row in list(zip(before, after))[:8]:
            run.say(f"\n  {row['prompt']} ...\n    SFT {old_row['score']:+.2f} |{old_row['completion']}\n"
                    f"    PPO {row['score']:+.2f} |{row['completion']}")
        for old_row, row in zip(before, after):
            run.write("samples.jsonl", {"step": max(first, steps), "final": True, "prompt": row["prompt"],
                                        "completion": row["completion"], "score": row["score"],
                                        "sft_completion": old_row["completion"], "sft_score": old_row["score"]})
        run.say(f"\nsaved {run.path('ckpt.pt')} after {runtime.clock(time.perf_counter() - run.started)}; next: python "
                f"-m minirlhf.sample {shlex.quote(o.init_from)} {shlex.quote(run.path('ckpt.pt'))} --prompt "
                f"{shlex.quote(tokenizer.decode(val_prompts[0]))}")


if __name__ == "__main__":
    launch(main)
