"""Stage 2, the reward model: people's preferences -> a score of a text.

Starts from the SFT trunk with a new scalar head and minimises -log sigmoid(r_better - r_worse) over all pairs of each
record. Its accuracy is set against chance, against length alone, and against how well people predict one another.
"""
import os
import shlex
import time
from dataclasses import dataclass
from typing import Literal

import torch

from minirlhf import checkpoint, prepare, runtime
from minirlhf.config import RunOptions, fail, launch, parse
from minirlhf.data import (Order, Row, encode_prompts, encode_row, fingerprint, load_preferences,
                           load_prompts, repeats, too_long)
from minirlhf.evaluate import calibration, reward_model_figures, score_all, show_pairs, verdict
from minirlhf.generate import generate
from minirlhf.objectives import bradley_terry_loss



@dataclass
class Options(RunOptions):
    """Stage 2, the reward model: people's preferences -> reward model.

    Reads preferences.{train,val}.jsonl of --data_dir (another stem with --preferences).
    """
    data_dir: str = "data/sentiment"  # folder of the preferences; the default is prepared when it is missing
    preferences: str = "preferences"  # stem of the two files: "judge" trains a judge on sentences this model never sees
    out_dir: str = "out/rm"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "out/sft/ckpt.pt"  # the SFT model: its trunk is the start, its samples set the scale of the reward
    dropout: float = 0.0  # in training only [0..1)
    long_prompts: Literal["drop", "trim"] = "drop"  # texts over the context: drop them, or trim the prompt at its left
    num_train_epochs: float = 1  # passes over the training data; more overfit fast (0..1000000]
    batch_size: int = 16  # records (pairs or rankings) an optimizer step, over all ranks [1..]
    micro_batch_size: int = 16  # records a backward pass: for memory; changes no gradient [1..]
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 2e-3  # AdamW's peak [0..]
    muon_learning_rate: float = 1e-2  # Muon's peak [0..]
    weight_decay: float = 0.1  # on matrices only [0..]
    warmup_ratio: float = 0.05  # share of the steps in which the rate rises; then it falls to 0 as a cosine [0..1]
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never [0..]
    eval_interval: int = 250  # steps between evaluations and checkpoints; the last step always does [1..]
    log_interval: int = 10  # steps between log lines [1..]
    num_samples: int = 4  # held-out pairs shown with their scores at each evaluation [0..]
    response_length: int = 48  # longest SFT sample in tokens, as in stage 3, when the scale is set [1..]
    num_scale_samples: int = 1024  # SFT samples over whose scores the reward gets mean 0 and deviation 1 [2..]


def encode_preferences(tokenizer, preferences, block_size, long_prompts):
    """-> [(rows, pairs, extra)], the number of records dropped as without two different, untied texts, and all rows."""
    kept, dropped, every = [], 0, []
    for p in preferences:
        rows = [encode_row(tokenizer, p.prompt, c, block_size, long_prompts) for c in p.completions]
        every += rows
        pairs = [(i, j) for i, j in p.pairs() if rows[i] and rows[j] and rows[i].ids != rows[j].ids]
        if pairs:
            used = sorted({i for pair in pairs for i in pair})
            kept.append(([rows[i] for i in used], [(used.index(i), used.index(j)) for i, j in pairs], p.extra))
        else:
            dropped += 1
    return kept, dropped, every


def batch_gradients(model, forward, batch, eos, o, run):
    """Add to each .grad the gradient of the mean loss over all pairs of some records, in microbatches and over all
    ranks -> the loss in nats a pair, pairs ordered rightly, pairs."""
    count = sum(len(index) for _, index, _ in batch)
    share, sums = run.share(batch), torch.zeros(2, device=run.device)
    for at in range(0, len(share), o.micro_batch_size):
        rows, better, worse = [], [], []
        for record_rows, index, _ in share[at:at + o.micro_batch_size]:
            better += [len(rows) + i for i, _ in index]
            worse += [len(rows) + j for _, j in index]
            rows += record_rows
        scores = score_all(model, run, rows, eos, 32, forward)  # (texts,), in however many pairs
        loss = bradley_terry_loss(scores[better], scores[worse]).sum() / count
        loss.backward()
        sums += torch.stack([loss.detach(), (scores[better] > scores[worse]).sum()])
    run.sum_gradients(model.parameters())
    return *run.total(sums).tolist(), count


@torch.no_grad()
def set_scale(model, sft, run, tokenizer, prompts, o):
    """Gain and bias such that scores of SFT samples, cut as stage 3 cuts them, have mean 0 and deviation 1."""
    rows = []
    for at in range(0, len(prompts), 128):
        part = prompts[at:at + 128]
        with run.autocast():
            rollout = generate(sft, part, o.response_length, tokenizer.eos,
                               generator=runtime.generator(o.seed, at, 0, "scale"))
        rows += [Row(p + r, len(p)) for p, r in zip(part, rollout.responses())]
    model.eval()
    scores = score_all(model, run, rows, tokenizer.eos).cpu().double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if not std > 1e-6:
        fail(f"the reward model gives all SFT samples the same score ({mean:.4f}): it has learned nothing to optimise")
    model.gain.div_(std)
    model.bias.copy_((model.bias - mean) / std)
    return mean, std


def main():
    o, start, start_path = checkpoint.resume(parse(Options), "rm", (
        "seed", "init_from", "preferences", "batch_size", "num_train_epochs", "optimizer", "long_prompts", "data_dir"))
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    train_path, val_path = (os.path.join(o.data_dir, f"{o.preferences}.{split}.jsonl") for split in ("train", "val"))
    train, val = load_preferences(train_path), load_preferences(val_path)
    prompts_path = os.path.join(o.data_dir, "prompts.train.jsonl")
    scale_prompts = load_prompts(prompts_path) if os.path.exists(prompts_path) else [p.prompt for p in train]
    with runtime.Run(o, "rm") as run:
        # ---- the SFT model's trunk under a new head, or the run to resume
        sft, tokenizer, _ = checkpoint.load(o.init_from, ["sft"], run.device)
        if o.resume:
            model, own_tokenizer = checkpoint.build(start, start_path, run.device, o.dropout)
            checkpoint.compatible((sft, tokenizer), o.init_from, (model, own_tokenizer), start_path)
        else:
            model = sft.with_head("scalar", o.dropout).init_score(runtime.generator(o.seed, 0, 0, "head"))
        runtime.pick_products(model)
        block_size = model.config.block_size
        (train_set, train_dropped, train_rows), (val_set, val_dropped, val_rows) = (
            encode_preferences(tokenizer, part, block_size, o.long_prompts) for part in (train, val))
        room = block_size - o.response_length
        prompts, _ = encode_prompts(tokenizer, scale_prompts, room, o.long_prompts)
        if room < 2 or not prompts:
            fail(f"--response_length {o.response_length}: no prompt of {o.data_dir} leaves room for it in the context "
                 f"of {block_size} tokens, and SFT samples set the reward's scale")
        prompts = [prompts[i % len(prompts)] for i in range(o.num_scale_samples)]
        for path, kept in ((train_path, train_set), (val_path, val_set)):
            if not kept:
                fail(f"{path}: no record is left: each is longer than the context of {block_size} tokens, or its texts "
                     "are the same or tied")
        order = Order([max(len(row.ids) for row in rows) for rows, _, _ in train_set], o.batch_size, o.seed)
        steps = max(1, round(o.num_train_epochs * order.steps_per_epoch))
        optimizers = runtime.make_optimizers(model, o)
        first, surroundings = 0, run.surroundings()
        prints = {f"{o.data_dir}/{o.preferences}.*.jsonl": fingerprint(train_path, val_path),
                  o.init_from: fingerprint(checkpoint.file_of(o.init_from)),
                  "prompts.train.jsonl": fingerprint(*filter(os.path.exists, [prompts_path]))}
        if start:
            with checkpoint.fitting(start_path):
                state = start["training"]
                checkpoint.same_inputs(state["data"], prints, start_path)
                checkpoint.load_optimizers(optimizers, state["optimizers"], start_path)
                first, finished = checkpoint.step_of(state, steps, start_path), bool(state["finished"])
                surroundings = run.surroundings(start.get("environment"))
                start = state = None  # a second copy of weights and moments
            if finished:
                run.say(f"{o.out_dir}: this run is finished ({first} steps)")
                return
        if o.check:
            from minirlhf import check
            check.rm(model, tokenizer, [train_set[i] for i in order.batch(0)], optimizers, o, run)
        forward = torch.compile(model.hidden, dynamic=True) if o.compile else model.hidden

        # ---- what is about to happen
        texts, pairs = sum(len(rows) for rows, _, _ in train_set), sum(len(index) for _, index, _ in train_set)
        tokens_per_epoch = sum(len(row.ids) for rows, _, _ in train_set for row in rows)
        run.say(f"RM: {len(train_set):,} records with {texts:,} texts and {pairs:,} pairs for training, "
                f"{len(val_set):,} records held out, from {o.data_dir}/{o.preferences}.*.jsonl")
        for rows, dropped, name in ((train_rows, train_dropped, "training"), (val_rows, val_dropped, "held-out")):
            if long := too_long(rows, block_size, o.long_prompts):
                run.say(f"    {name} texts: {long}")
            if dropped:
                run.say(f"    {name} records without two texts that differ and are not tied: {dropped} dropped")
        for warning in repeats(*([(p.prompt, *p.completions) for p in part] for part in (train, val)), "preferences"):
            run.say(warning)
        run.say(f"    model: {model.config.n_layer} layers x {model.config.n_embd}, "
                f"{runtime.count_parameters(model):,} parameters, trunk from {o.init_from}")
        run.say(f"    {run.hardware}; {steps} steps of {o.batch_size} "
                f"records, about {tokens_per_epoch // order.steps_per_epoch:,} tokens each")
        run.say(f"    output: {o.out_dir}" + (f"; goes on from step {first}" if first else ""))
        longer = sum((len(rows[i].ids) > len(rows[j].ids)) - (len(rows[i].ids) < len(rows[j].ids))
                     for rows, index, _ in train_set for i, j in index) > 0

        def save(step, info, finished=False):
            if run.main:
                run.sync()
                run.say(checkpoint.save(
                    run.path("ckpt.pt"), stage="rm", model=model, tokenizer=tokenizer, options=o, info=info,
                    environment=surroundings, training={"step": step, "data": prints, "finished": finished,
                              "optimizers": [optimizer.state_dict() for optimizer in optimizers]}))

        model.train()
        seen, seen_seconds, right, judged = 0, 0.0, 0, 0
        run.start_logs(first)
        for step in range(first, steps):
            began = time.perf_counter()
            # ---- one optimizer step over all pairs of all records, divided once by their number
            factor = runtime.warmup_cosine(step, steps, o.warmup_ratio)
            runtime.set_rate(optimizers, factor)
            batch = [train_set[i] for i in order.batch(step)]
            run.seed_dropout(step)
            loss, correct, count = batch_gradients(model, forward, batch, tokenizer.eos, o, run)
            norm = runtime.clip_gradients(model, loss, f"step {step + 1}", o)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += sum(len(row.ids) for rows, _, _ in batch for row in rows)
            right, judged = right + correct, judged + count
            seen_seconds += time.perf_counter() - began
            done, stopping = step + 1, run.should_stop()
            record = {"step": done, "epoch": done / order.steps_per_epoch, "loss": loss, "accuracy": correct / count,
                      "lr": o.learning_rate * factor, "grad_norm": norm, "tokens_per_second": seen / seen_seconds}
            if done % o.log_interval == 0 or done == steps:
                run.say(f"{run.progress(done, steps, first)}  loss {loss:.3f} nats/pair  accuracy "
                        f"{right / judged:.3f}  lr {o.learning_rate * factor:.1e}  grad {norm:.2f}  "
                        f"{seen / seen_seconds:,.0f} tokens/s")
                seen, seen_seconds, right, judged = 0, 0.0, 0, 0

            # ---- now and then: held-out accuracy, a checkpoint
            scheduled = done % o.eval_interval == 0 and done < steps
            if scheduled:
                record["eval"], _ = reward_model_figures(model, run, val_set, tokenizer.eos, longer)
                run.say("  held out: " + ", ".join(f"{name} {f['accuracy']:.3f}" for name, f in record["eval"].items()
                                                   if "margin" not in name))
                show_pairs(model, run, tokenizer, val_set, done, o.num_samples)
            run.write("metrics.jsonl", record)
            if scheduled or stopping and done < steps:
                save(done, {})
            if stopping and done < steps:  # after the last step what is left is short
                run.exit_stopped()

        # ---- the reward's scale, then what the model is worth
        mean, std = set_scale(model, sft, run, tokenizer, prompts, o)
        figures, differences = reward_model_figures(model, run, val_set, tokenizer.eos, longer)
        calibrated = calibration(differences)
        info = {"figures": figures, "calibration": calibrated, "verdict": verdict(figures, calibrated)}
        run.write("metrics.jsonl", {"step": steps, "final": info})
        run.say(f"\nscale: scores of {o.num_scale_samples} SFT samples had mean {mean:.3f} and deviation {std:.3f}; "
                "gain and bias make them 0 and 1")
        show_pairs(model, run, tokenizer, val_set, steps, o.num_samples)
        run.say(f"{'held out':<28}{'pairs':>7}  accuracy (95% interval)   length only   ceiling")
        for name, f in figures.items():
            run.say(f"{name:<28}{f['pairs']:>7}  {f['accuracy']:.3f}  ({f['low']:.3f}-{f['high']:.3f})"
                    f"{f['length_only']:>15.3f}" + (f"{f['ceiling']:>10.3f}" if "ceiling" in f else ""))
        run.say(f"calibration: ECE {calibrated['ece']:.3f}; {calibrated['ece_with_temperature']:.3f} after dividing "
                f"score differences by a temperature of {calibrated['temperature']:.2f}")
        run.say(info["verdict"])
        save(steps, info, finished=True)
        done = f"saved {run.path('ckpt.pt')} after {runtime.clock(time.perf_counter() - run.started)}"
        names = {"data_dir": o.data_dir, "init_from": o.init_from, "reward_model": run.path("ckpt.pt")}
        usual = {"data_dir": Options.data_dir, "init_from": Options.init_from, "reward_model": "out/rm/ckpt.pt"}
        if o.preferences == Options.preferences:
            done += "; next: python train_ppo.py" + "".join(
                f" --{name} {shlex.quote(path)}" for name, path in names.items() if path != usual[name])
        elif o.preferences == "judge":
            done += f"; next: python train_ppo.py --resume --judge {shlex.quote(run.path('ckpt.pt'))}"
        run.say(done)


if __name__ == "__main__":
    launch(main)
