"""Stage 2, the reward model: people's preferences -> a score of a text.

Starts from the SFT trunk with a new scalar head and minimises -log sigmoid(r_better - r_worse) over all pairs of each
record. Its accuracy is set against chance, against length alone, and against how well people predict one another.
"""
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from minirlhf import adapters, checkpoint, evaluate, hub, kernels, memory, prepare, runtime
from minirlhf.config import RunOptions, fail, launch, parse, warn_idle
from minirlhf.data import (Order, Row, describe_sets, encode_prompts, load_for_training, load_preferences, load_prompts,
                           read_preferences)
from minirlhf.evaluate import score_all
from minirlhf.generate import compile_model, generate
from minirlhf.objectives import bradley_terry_loss, wins


@dataclass
class Options(RunOptions):
    """Stage 2, the reward model: people's preferences -> reward model.

    Reads preferences.{train,val}.jsonl of --data_dir (other sets with --preferences).
    """
    stage = "rm"
    # ---- model, data, output
    data_dir: str = "data/sentiment"  # folder of the preferences; the default is prepared when it is missing
    preferences: tuple[str, ...] = ("preferences",)  # NAME of NAME.{train,val}.jsonl ("judge": for a judge), or a path
    out_dir: str = "out/rm"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "out/sft/ckpt.pt"  # the trunk's start: the SFT model, a policy, or, with its head, a reward model
    reference: str = ""  # the model whose samples set the scale; "" = init_from, or what that reward model had
    dropout: float = 0.0  # in training only [0..1)
    lora_layers: int = 12  # adapters in the last so many blocks, where there are more; 0 = in all [0..]
    long_prompts: Literal["drop", "trim"] = "drop"  # texts over the context: drop them, or trim the prompt at its left
    # ---- training
    num_train_epochs: float = 1  # passes over the training data; more overfit fast (0..1000000]
    max_steps: int = 150  # at most so many optimizer steps, whatever the epochs; 0 = no limit [0..]
    batch_size: int = 4  # records (pairs or rankings) an optimizer step, over all ranks [1..]
    micro_batch_size: int = 4  # records a backward pass: for memory; changes no gradient [1..]
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 1e-3  # AdamW's peak [0..]
    muon_learning_rate: float = 1e-2  # Muon's peak [0..]
    weight_decay: float = 0.0  # on matrices only [0..]
    warmup_ratio: float = 0.05  # share of the steps in which the rate rises [0..1]
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # how it falls to 0; constant runs can be prolonged
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never [0..]
    # ---- evaluations, checkpoints, scale
    eval_interval: int = 250  # steps between evaluations and checkpoints; the last step always does [1..]
    num_eval_texts: int = 0  # held-out texts of an evaluation, which takes all pairs of them; 0 = all [0..]
    log_interval: int = 5  # steps between log lines [1..]
    response_length: int = 48  # longest SFT sample in tokens, as in stage 3, when the scale is set [1..]
    num_scale_samples: int = 128  # SFT samples whose scores shall have mean 0 and standard deviation 1 [2..1000000]


def batch_gradients(model, batch, eos, o, run):
    """Add to each .grad the gradient of the mean loss over all pairs of some records, in microbatches and over all
    ranks -> the loss in nats a pair, pairs ordered rightly (ties half), pairs."""
    n_pairs = sum(len(pairs) for _, pairs, _ in batch)
    share, sums = run.share(batch), torch.zeros(2, device=run.device)
    for at in range(0, len(share), o.micro_batch_size):
        rows, better, worse = [], [], []
        for record_rows, pairs, _ in share[at:at + o.micro_batch_size]:
            better += [len(rows) + i for i, _ in pairs]
            worse += [len(rows) + j for _, j in pairs]
            rows += record_rows
        scores = score_all(model, run, rows, eos)  # (texts,), in however many pairs
        loss = bradley_terry_loss(scores[better], scores[worse]).sum() / n_pairs
        loss.backward()
        sums += torch.stack([loss.detach(), wins(scores[better].cpu(), scores[worse].cpu()).sum().to(loss)])
    run.sum_gradients(model.parameters())
    return *run.total(sums).tolist(), n_pairs


@torch.no_grad()
def set_scale(model, sft, run, tokenizer, prompts, o):
    """Gain and bias such that scores of SFT samples, cut as stage 3 cuts them, have mean 0 and standard deviation 1."""
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


def read_scale_prompts(o, tokenizer, block_size):
    """-> ids of num_scale_samples prompts, repeated where there are fewer, and the files they are from."""
    path = os.path.join(o.data_dir, "prompts.train.jsonl")
    texts = load_for_training(load_prompts, "prompts", o) if os.path.lexists(path) else [
        p.prompt for stem in o.preferences for p in load_for_training(load_preferences, stem, o)]
    prompts, _ = encode_prompts(tokenizer, texts, block_size - o.response_length, o.long_prompts)
    if block_size - o.response_length < 2 or not prompts:
        fail(f"--response_length {o.response_length}: no prompt of {o.data_dir} leaves room for it in the context "
             f"of {block_size} tokens, and SFT samples set the reward's scale")
    return [prompts[i % len(prompts)] for i in range(o.num_scale_samples)], [*filter(os.path.exists, [path])]


def load_start(o, run):
    """-> the model of --init_from, the one whose samples set the scale, their tokenizer. An earlier reward model knows
    which that was. Exits 2 where it does not, or the two cannot be compared."""
    start, tokenizer, payload = checkpoint.load(o.init_from, [*checkpoint.STAGES], run.device)
    if payload["stage"] == "rm" and not o.reference:
        was = payload["options"]
        o.reference = str(was.get("reference") or was.get("init_from", ""))
        if not os.path.exists(o.reference) and o.reference not in hub.NAMES:
            fail(f"--init_from {o.init_from}: a reward model; name the SFT model whose samples set the scale of its "
                 "scores with --reference" + f" ({o.reference} is not there)" * bool(o.reference))
        run.spare("reference")
    if not o.reference:
        return start, start, tokenizer
    sft, own_tokenizer = checkpoint.load(o.reference, checkpoint.POLICIES, run.device)[:2]
    checkpoint.compatible((sft, own_tokenizer), o.reference, (start, tokenizer), o.init_from)
    return start, sft, tokenizer


def main(argv=None):
    o, saved = checkpoint.resume(parse(Options, argv), "rm", (
        "seed", "val_share", "batch_size", "max_steps", "optimizer", "long_prompts", "lr_schedule", *adapters.OPTIONS))
    adapters.check_options(o)
    warn_idle(o, "optimizer adamw", o.optimizer == "adamw", "muon_learning_rate")
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    with runtime.Run(o, "rm") as run:
        # ---- the SFT model's trunk under a new head, or an earlier reward model with its own
        start, sft, tokenizer = load_start(o, run)
        checkpoint.as_begun(tokenizer, saved)
        model = adapters.learner(start, "scalar", o, runtime.generator(o.seed, 0, 0, "reward"), o.dropout)
        if start.head == "lm":
            model.init_score(runtime.generator(o.seed, 0, 0, "head"))
        model.gain.fill_(1), model.bias.zero_()  # in training; the scale is set at the end
        if saved and not model.base:
            checkpoint.compatible((sft, tokenizer), o.reference or o.init_from,
                                  checkpoint.build(*saved, run.device, o.dropout), saved.path)
        kernels.pick_matmul(model)
        kernels.pack_frozen(run, [model])
        block_size = model.config.block_size
        train_set, val_set, about_data, paths = read_preferences(o, tokenizer, block_size)
        scale_prompts, scale_paths = read_scale_prompts(o, tokenizer, block_size)
        order = Order([max(len(row.ids) for row in rows) for rows, _, _ in train_set], o.batch_size, o.seed)
        steps = order.steps(o.num_train_epochs, o.max_steps)
        optimizers = runtime.make_optimizers(model, o)

        # ---- a new run, or one that goes on
        training = checkpoint.Training(run, tokenizer, model, optimizers, {
            describe_sets(o): paths, "prompts.train.jsonl": scale_paths,
            f"--init_from {o.init_from}": checkpoint.files_of(o.init_from),
            **({f"--reference {o.reference}": checkpoint.files_of(o.reference)} if o.reference else {})})
        first, kept = training.restore(saved, steps)
        saved = None
        longer = kept.get("finished") and first < steps
        if kept.get("finished") and not longer:
            run.say(f"{o.out_dir}: this run is finished ({first} steps)")
            return
        about_memory = memory.check(run, o, memory.of_rm, model, sft, [
            [train_set[i] for i in batch] for batch in memory.heaviest(order, steps)],
            max(len(row.ids) for rows, _, _ in val_set for row in rows), max(map(len, scale_prompts)))
        if o.checkpoint_activations:
            memory.recompute(model)
        if o.check:
            from minirlhf import check
            check.rm(model, tokenizer, [train_set[i] for i in order.batch(0)], optimizers, o, run)
        if o.compile:
            compile_model(model)
        tokens_per_epoch = sum(len(row.ids) for rows, _, _ in train_set for row in rows)
        run.announce("RM", [
            *about_data, f"model: {model.config.n_layer} layers x {model.config.n_embd}, "
            f"{runtime.describe_parameters(model)}, {'trunk' if start.head == 'lm' else 'trunk and head'} from "
            f"{o.init_from}",
            f"{run.hardware}; {steps} steps of {o.batch_size} records, about "
            f"{tokens_per_epoch // order.steps_per_epoch:,} tokens each", about_memory], first)
        prefer_longer = sum((len(rows[i].ids) > len(rows[j].ids)) - (len(rows[i].ids) < len(rows[j].ids))
                            for rows, pairs, _ in train_set for i, j in pairs) > 0

        model.train()
        seen, seen_seconds, right, seen_pairs = 0, 0.0, 0, 0
        pace = runtime.Pace(tokens_per_epoch / order.steps_per_epoch)
        look, scale = evaluate.work_between(pace, model, val_set, scale_prompts, o)
        if longer:
            model.gain.fill_(1), model.bias.zero_()
            training.save(first, {}, finished=False)
        run.start_logs(first)
        for step in range(first, steps):
            began = time.perf_counter()
            # ---- one optimizer step over all pairs of all records, divided once by their number
            factor = runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)
            runtime.set_rate(optimizers, factor)
            batch = [train_set[i] for i in order.batch(step)]
            run.seed_dropout(step)
            loss, correct, n_pairs = batch_gradients(model, batch, tokenizer.eos, o, run)
            norm = runtime.optimizer_step(model, optimizers, loss, f"step {step + 1}", o)
            tokens, seconds = sum(len(row.ids) for rows, _, _ in batch for row in rows), time.perf_counter() - began
            seen, seen_seconds = seen + tokens, seen_seconds + seconds
            right, seen_pairs = right + correct, seen_pairs + n_pairs
            pace.add("steps", seconds, pace.steps(tokens))
            done, stopping = step + 1, run.should_stop()
            record = {"step": done, "epoch": done / order.steps_per_epoch, "loss": loss, "accuracy": correct / n_pairs,
                      "lr": o.learning_rate * factor, "grad_norm": norm, "tokens_per_second": seen / seen_seconds}
            if done % o.log_interval == 0 or done == steps:
                looks = look * runtime.looks_left(done, steps, o.eval_interval)
                left = pace.left("steps", steps - done + scale) + pace.left("looks", looks, "steps")
                run.say(f"{run.progress(done, steps, left)}  loss {loss:.3f} nats/pair  accuracy "
                        f"{right / seen_pairs:.3f}  lr {o.learning_rate * factor:.1e}  grad {norm:.2f}  "
                        f"{seen / seen_seconds:,.0f} tokens/s")
                seen, seen_seconds, right, seen_pairs = 0, 0.0, 0, 0

            # ---- now and then: held-out accuracy, a checkpoint
            scheduled = done % o.eval_interval == 0 and done < steps
            if scheduled:
                began = time.perf_counter()
                record["eval"], _ = evaluate.reward_model_figures(model, run, val_set, tokenizer.eos, prefer_longer)
                run.say("  held out: " + ", ".join(f"{name} {f['accuracy']:.3f}" for name, f in record["eval"].items()
                                                   if ", margin " not in name or name.startswith('"')))
                evaluate.show_pairs(model, run, tokenizer, val_set, done)
                pace.add("looks", time.perf_counter() - began, look)
            run.write("metrics.jsonl", record)
            run.rescue = partial(training.save, done, {}, finished=False)
            if scheduled or stopping and done < steps:
                run.rescue()
            if stopping and done < steps:  # after the last step what is left is short
                run.exit_stopped()

        # ---- the reward's scale, then what the model is worth
        mean, std = set_scale(model, sft, run, tokenizer, scale_prompts, o)
        figures, differences = evaluate.reward_model_figures(model, run, val_set, tokenizer.eos, prefer_longer)
        calibrated = evaluate.calibration(differences)
        info = {"figures": figures, "calibration": calibrated, "reliability": evaluate.reliability(differences),
                "verdict": evaluate.verdict(figures, calibrated)}
        run.write("metrics.jsonl", {"step": steps, "final": info})
        run.say(f"\nscale: scores of {o.num_scale_samples} samples of {o.reference or o.init_from} "
                f"had mean {mean:.3f} and standard deviation {std:.3f}; gain and bias make them 0 and 1")
        evaluate.show_pairs(model, run, tokenizer, val_set, steps)
        for line in (*evaluate.reward_model_table(figures, calibrated), info["verdict"]):
            run.say(line)
        training.save(steps, info, finished=True)
        path = run.path("ckpt.pt")
        if o.preferences == ("judge",):
            return run.saved(runtime.next_command("train_ppo.py", o, judge=path) + " --resume")
        run.saved(runtime.next_command("train_ppo.py", o, data_dir=o.data_dir, init_from=o.reference or o.init_from,
                                       reward_model=path, val_share=o.val_share))


if __name__ == "__main__":
    launch(main)
