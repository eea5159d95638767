"""Stage 1, supervised fine-tuning: demonstrations -> a model that answers in their manner.

Minimises the cross-entropy of completion tokens and eos given the prompt, from random weights or from a checkpoint.
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
from minirlhf.data import (Order, collate, encode_prompts, encode_row, fingerprint, load_demonstrations, load_prompts,
                           repeats, too_long)
from minirlhf.evaluate import describe, held_out_loss
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig, places
from minirlhf.objectives import sft_loss
from minirlhf.tokenizer import Tokenizer

SIZES = ("tokenizer", "vocab_size", "n_layer", "n_head", "n_embd", "block_size")  # options of a model from scratch


@dataclass
class Options(RunOptions):
    """Stage 1, supervised fine-tuning: demonstrations -> SFT model. Reads sft.{train,val}.jsonl of --data_dir."""
    data_dir: str = "data/sentiment"  # folder of sft.{train,val}.jsonl; the default is prepared when it is missing
    out_dir: str = "out/sft"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "scratch"  # scratch, or a checkpoint of this stage whose weights and tokenizer to start from
    tokenizer: Literal["bpe", "gpt2"] = "bpe"  # bpe learns byte-level ranks from the training text; gpt2 takes GPT-2's
    vocab_size: int = 8192  # size of a learned vocabulary, end of text included [257..]
    n_layer: int = 4  # blocks; size, vocabulary and context are for a model from scratch [1..]
    n_head: int = 4  # attention heads; must divide n_embd [1..]
    n_embd: int = 128  # width [1..]
    block_size: int = 128  # longest row in tokens, prompt and completion [4..]
    dropout: float = 0.0  # on embeddings, attention and residual branches, in training only [0..1)
    long_prompts: Literal["drop", "trim"] = "drop"  # rows over block_size: drop them, or trim the prompt at its left
    num_train_epochs: float = 4  # passes over the training data (0..1000000]
    batch_size: int = 64  # rows an optimizer step, over all ranks [1..]
    micro_batch_size: int = 64  # rows a forward and backward pass: for memory; changes no gradient [1..]
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 1e-2  # AdamW's peak [0..]
    muon_learning_rate: float = 2e-2  # Muon's peak, for updates of spectral norm about 1 [0..]
    weight_decay: float = 0.1  # on matrices only [0..]
    warmup_ratio: float = 0.05  # share of the steps in which the rate rises; then it falls to 0 as a cosine [0..1]
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never [0..]
    eval_interval: int = 250  # steps between evaluations, checkpoints and samples; the last step always does [1..]
    log_interval: int = 10  # steps between log lines [1..]
    num_samples: int = 4  # completions of held-out prompts shown at each evaluation [0..]
    response_length: int = 48  # longest sample in tokens [1..]


def batch_gradients(model, forward, batch, eos, o, run):
    """Add to each .grad the gradient of a batch's loss, in microbatches and over all ranks -> the loss, nats a token.

    Each microbatch's sum is divided by the whole batch's count, so its size changes nothing.
    """
    count = sum(len(row.ids) - row.prompt_length for row in batch)
    share, loss_sum = run.share(batch), torch.zeros((), device=run.device)
    for at in range(0, len(share), o.micro_batch_size):
        tokens, mask, _ = collate(share[at:at + o.micro_batch_size], eos, run.device)
        with run.autocast():
            logits = model.logits(forward(tokens[:, :-1], counted=places(mask)))  # (counted, V)
        loss = sft_loss(logits, tokens[:, 1:][mask]).sum() / count
        loss.backward()
        loss_sum += loss.detach()
    run.sum_gradients(model.parameters())
    return float(run.total(loss_sum))


def show_samples(model, run, tokenizer, prompts, step, o):
    """Print and keep completions of a few held-out prompts, drawn with the same numbers each time."""
    if not prompts:
        return
    model.eval()
    with run.autocast():
        rollout = generate(model, prompts, min(o.response_length, model.config.block_size - max(map(len, prompts))),
                           tokenizer.eos, generator=runtime.generator(o.seed, 0, 0, "samples"))
    model.train()
    for ids, response in zip(prompts, rollout.responses()):
        prompt, completion = tokenizer.decode(ids), tokenizer.decode(response)
        run.say(f"    {prompt} |{completion}")
        run.write("samples.jsonl", {"step": step, "prompt": prompt, "completion": completion})


def main():
    given = parse(Options)
    o, start, start_path = checkpoint.resume(given, "sft", (
        *SIZES, "seed", "init_from", "batch_size", "num_train_epochs", "optimizer", "long_prompts", "data_dir"))
    if o.n_embd % o.n_head:
        fail(f"--n_head {o.n_head}: must divide --n_embd {o.n_embd}")
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    train_path, val_path = (os.path.join(o.data_dir, f"sft.{split}.jsonl") for split in ("train", "val"))
    train, val = load_demonstrations(train_path), load_demonstrations(val_path)
    with runtime.Run(o, "sft") as run:
        # ---- tokenizer and rows, then model and optimizers: new, of a checkpoint, or of the run to resume
        if o.init_from != "scratch" and not o.resume:
            start, start_path = checkpoint.read(o.init_from, ["sft"]), o.init_from
        if start:
            model, tokenizer = checkpoint.build(start, start_path, run.device, o.dropout)
            config, own = model.config, {name: start["options"].get(name, getattr(o, name)) for name in SIZES}
            for name in own.keys() & given.given:
                if getattr(o, name) != own[name]:
                    fail(f"--{name} {getattr(o, name)}: {start_path} has {own[name]}; leave the option out")
            o = replace(o, **own)
        else:
            tokenizer = Tokenizer.gpt2() if o.tokenizer == "gpt2" else Tokenizer.train(
                (d.prompt + d.completion for d in train), o.vocab_size)
            config = GPTConfig(o.n_layer, o.n_head, o.n_embd, tokenizer.vocab_size, o.block_size, o.dropout)
        block_size = config.block_size
        encoded = [[encode_row(tokenizer, d.prompt, d.completion, block_size, o.long_prompts) for d in part]
                   for part in (train, val)]
        train_rows = [row for row in encoded[0] if row]
        val, val_rows = [d for d, row in zip(val, encoded[1]) if row], [row for row in encoded[1] if row]
        if not train_rows or not val_rows:
            fail(f"{train_path if not train_rows else val_path}: every row is longer than the context of {block_size} "
                 "tokens; use --long_prompts trim or a larger --block_size")
        if not start:
            try:
                model = GPT(config).init_weights(runtime.generator(o.seed, 0, 0, "init")).to(run.device)
            except RuntimeError as error:  # no room
                fail(f"a model of --n_layer {o.n_layer} and --n_embd {o.n_embd} cannot be made: {error}")
        runtime.pick_products(model)
        order = Order([len(row.ids) for row in train_rows], o.batch_size, o.seed)
        steps = max(1, round(o.num_train_epochs * order.steps_per_epoch))
        optimizers, first = runtime.make_optimizers(model, o), 0
        best, best_state, best_figures = math.inf, None, None
        prints, surroundings = {o.data_dir: fingerprint(train_path, val_path)}, run.surroundings()
        if o.resume:
            with checkpoint.fitting(start_path):
                state = start["training"]
                checkpoint.same_inputs(state["data"], prints, start_path)
                checkpoint.load_weights(model, state["model"], start_path)
                checkpoint.load_optimizers(optimizers, state["optimizers"], start_path)
                first, best = checkpoint.step_of(state, steps, start_path), float(start["info"]["nats_per_token"])
                if best < math.inf:  # what cannot be described is refused now, not at the end
                    best_state, best_figures = start["model"], start["info"]["held_out"]
                    describe(best_figures)
                surroundings = run.surroundings(start.get("environment"))
                start = state = None  # a second copy of weights and moments
            if first >= steps:
                run.say(f"{o.out_dir}: this run is finished ({first} steps)")
                return
        prompts_path = os.path.join(o.data_dir, "prompts.val.jsonl")
        shown, _ = encode_prompts(tokenizer, load_prompts(prompts_path) if os.path.exists(prompts_path) else
                                  [d.prompt for d in val], max(2, block_size - o.response_length), "trim")
        shown = shown[:o.num_samples]
        if o.check:
            from minirlhf import check
            check.sft(model, tokenizer, [train_rows[i] for i in order.batch(0)], optimizers, o, run)
        forward = torch.compile(model.hidden, dynamic=True) if o.compile else model.hidden

        # ---- what is about to happen
        tokens_per_epoch = sum(len(row.ids) - 1 for row in train_rows)
        counted = sum(len(row.ids) - row.prompt_length for row in train_rows)
        run.say(f"SFT: {len(train_rows):,} rows for training, {len(val_rows):,} held out, from {o.data_dir}")
        for part, name in zip(encoded, ("training", "held-out")):
            if long := too_long(part, block_size, o.long_prompts):
                run.say(f"     {name} rows: {long}")
        for warning in repeats(*([(d.prompt, d.completion) for d in part] for part in (train, val)), "demonstrations"):
            run.say(warning)
        run.say(f"     {tokens_per_epoch:,} tokens an epoch, {counted:,} of them count; vocabulary "
                f"{tokenizer.vocab_size:,} ({tokenizer.name})")
        run.say(f"     model: {model.config.n_layer} layers x {model.config.n_embd}, {model.config.n_head} heads, "
                f"{runtime.count_parameters(model):,} parameters, from {o.init_from}")
        run.say(f"     {run.hardware}; {steps} steps of {o.batch_size} "
                f"rows, about {tokens_per_epoch // order.steps_per_epoch:,} tokens each; {o.optimizer}")
        run.say(f"     output: {o.out_dir}" + (f"; goes on from step {first}" if first else ""))

        byte_counts = [tokenizer.count_bytes(row.ids[row.prompt_length:]) for row in val_rows]
        kinds = [str(d.extra.get("domain", "")) for d in val]
        seen, seen_seconds = 0, 0.0
        run.start_logs(first)
        for step in range(first, steps):
            began = time.perf_counter()
            # ---- one optimizer step: the loss is summed over microbatches and ranks and divided once
            factor = runtime.warmup_cosine(step, steps, o.warmup_ratio)
            runtime.set_rate(optimizers, factor)
            batch = [train_rows[i] for i in order.batch(step)]
            run.seed_dropout(step)
            loss = batch_gradients(model, forward, batch, tokenizer.eos, o, run)
            norm = runtime.clip_gradients(model, loss, f"step {step + 1}", o)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += sum(len(row.ids) - 1 for row in batch)
            seen_seconds += time.perf_counter() - began
            done, stopping = step + 1, run.should_stop()
            record = {"step": done, "epoch": done / order.steps_per_epoch, "loss": loss, "lr": o.learning_rate * factor,
                      "grad_norm": norm, "tokens_per_second": seen / seen_seconds}
            if done % o.log_interval == 0 or done == steps:
                run.say(f"{run.progress(done, steps, first)}  loss {loss:.3f} nats/token  lr "
                        f"{o.learning_rate * factor:.1e}  grad {norm:.2f}  {seen / seen_seconds:,.0f} tokens/s")
                seen, seen_seconds = 0, 0.0

            # ---- now and then: held-out loss, samples, a checkpoint
            if done % o.eval_interval == 0 or done == steps:
                held_out = held_out_loss(model, run, val_rows, byte_counts, kinds, tokenizer, o.micro_batch_size)
                record["eval"], now = held_out, held_out["all"]["nats_per_token"]
                run.say(f"  held out: {describe(held_out)}{'  best so far' if now < best else ''}")
                if not math.isfinite(now):
                    fail(f"step {done}: the held-out loss is {now}: stopped; a checkpoint, if any, is in {o.out_dir}; "
                         f"try a --learning_rate below {o.learning_rate:g}")
                show_samples(model, run, tokenizer, shown, done, o)
                if now < best:
                    best, best_figures = now, held_out
                    best_state = {name: value.clone() for name, value in model.state_dict().items()}
            run.write("metrics.jsonl", record)
            if (done % o.eval_interval == 0 or done == steps or stopping) and run.main:
                run.sync()
                run.say(checkpoint.save(
                    run.path("ckpt.pt"), stage="sft", model=model, weights=best_state, tokenizer=tokenizer, options=o,
                    environment=surroundings, info={"nats_per_token": best, "held_out": best_figures},
                    training={"step": done, "model": model.state_dict(), "data": prints,
                              "optimizers": [optimizer.state_dict() for optimizer in optimizers]}))
            if stopping and done < steps:
                run.exit_stopped()
        run.say(f"\nbest held-out loss: {describe(best_figures)}")
        run.say(f"saved {run.path('ckpt.pt')} after {runtime.clock(time.perf_counter() - run.started)}; next: python "
                f"train_rm.py{'' if o.data_dir == Options.data_dir else ' --data_dir ' + shlex.quote(o.data_dir)}"
                f"{'' if o.out_dir == Options.out_dir else ' --init_from ' + shlex.quote(run.path('ckpt.pt'))}")


if __name__ == "__main__":
    launch(main)
