"""Stage 1, supervised fine-tuning: demonstrations -> a model that answers like them.

Minimises the cross-entropy of completion tokens and eos given the prompt, from random weights or from a checkpoint.
"""
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from minirlhf import adapters, checkpoint, evaluate, kernels, memory, prepare, runtime, sizes
from minirlhf.config import RunOptions, fail, launch, parse, warn_idle
from minirlhf.data import (Order, collate, encode_demonstrations, encode_prompts, labels_of, load_demonstrations,
                           load_parts, load_prompts)
from minirlhf.generate import compile_model, generate
from minirlhf.model import GPT, GPTConfig, flat_indices
from minirlhf.objectives import sft_loss
from minirlhf.tokenizer import Tokenizer

SIZES = ("tokenizer", "vocab_size", "family", "n_layer", "n_head", "n_embd", "block_size")  # of a model from scratch


@dataclass
class Options(RunOptions):
    """Stage 1, supervised fine-tuning: demonstrations -> SFT model. Reads sft.{train,val}.jsonl of --data_dir."""
    stage = "sft"
    # ---- model, data, output
    data_dir: str = "data/sentiment"  # folder of sft.{train,val}.jsonl; the default is prepared when it is missing
    out_dir: str = "out/sft"  # where ckpt.pt, config.json, metrics.jsonl and samples.jsonl go
    init_from: str = "smollm2"  # a name, fetched once (minirlhf/README.md); a folder or file of a model, or scratch
    tokenizer: Literal["bpe", "gpt2"] = "bpe"  # bpe learns byte-level ranks from the training text; gpt2 takes GPT-2's
    vocab_size: int = 8192  # size of a learned vocabulary, end of text included [257..]
    family: Literal["gpt2", "llama"] = "gpt2"  # llama: RMSNorm, rotary positions and SwiGLU instead of GPT-2's parts
    n_layer: int = 4  # blocks; size, vocabulary and context are for a model from scratch [1..]
    n_head: int = 4  # attention heads; must divide n_embd [1..]
    n_embd: int = 128  # width [1..]
    block_size: int = 128  # longest row in tokens, prompt and completion [4..]
    dropout: float = 0.0  # on embeddings, attention and residual branches, in training only [0..1)
    long_prompts: Literal["drop", "trim"] = "drop"  # rows over block_size: drop them, or trim the prompt at its left
    last_turn_only: bool = False  # of a conversation train the last answer only, not all of the assistant's
    # ---- training
    num_train_epochs: float = 1  # passes over the training data (0..1000000]
    max_steps: int = 200  # at most so many optimizer steps, whatever the epochs; 0 = no limit [0..]
    batch_size: int = 16  # rows an optimizer step, over all ranks [1..]
    micro_batch_size: int = 16  # rows a forward and backward pass: for memory; changes no gradient [1..]
    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 2e-3  # AdamW's peak [0..]
    muon_learning_rate: float = 2e-2  # Muon's peak, for updates of spectral norm about 1; adapters diverge at it [0..]
    weight_decay: float = 0.0  # on matrices only [0..]
    warmup_ratio: float = 0.05  # share of the steps in which the rate rises [0..1]
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"  # how it falls to 0; constant runs can be prolonged
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0 = never [0..]
    # ---- evaluations and checkpoints
    eval_interval: int = 200  # steps between evaluations, checkpoints and samples; the last step always does [1..]
    num_eval_texts: int = 0  # held-out rows of an evaluation, evenly spread over all of them; 0 = all [0..]
    log_interval: int = 10  # steps between log lines [1..]
    response_length: int = 48  # longest sample in tokens [1..]


def batch_gradients(model, batch, eos, o, run):
    """Add to each .grad the gradient of a batch's loss, in microbatches and over all ranks -> the loss, nats a token.

    Each microbatch's sum is divided by the whole batch's tokens, so its size changes nothing.
    """
    n_tokens = sum(row.trained for row in batch)  # of answers, eos included
    share, loss_sum = run.share(batch), torch.zeros((), device=run.device)
    for at in range(0, len(share), o.micro_batch_size):
        tokens, mask, _ = collate(share[at:at + o.micro_batch_size], eos, run.device)
        with run.autocast():
            logits = model.logits(model.states(tokens[:, :-1], flat_indices(mask)))  # (N, V)
        loss = sft_loss(logits, tokens[:, 1:][mask]).sum() / n_tokens
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


def main(argv=None):
    given = parse(Options, argv)
    o, saved = checkpoint.resume(given, "sft", (
        *SIZES, "seed", "val_share", "batch_size", "max_steps", "optimizer", "long_prompts",
        "last_turn_only", "lr_schedule", *adapters.OPTIONS))
    sizes.check_options(o, SIZES, given.resume)
    adapters.check_options(o)
    warn_idle(o, "optimizer adamw", o.optimizer == "adamw", "muon_learning_rate")
    warn_idle(o, "tokenizer gpt2", o.tokenizer == "gpt2", "vocab_size")
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    with runtime.Run(o, "sft") as run:
        scratch = not saved and o.init_from == "scratch"
        if scratch:
            sizes.check_model(o, run.device)
        *parts, paths, about_parts = load_parts(load_demonstrations, "sft", o)
        # ---- tokenizer and model: new, or a checkpoint's
        if not scratch:
            shorter = o.block_size if saved or "block_size" in given.given else 0
            model, tokenizer, payload = checkpoint.start(o, saved, run.device, shorter)
            run.options = o = checkpoint.with_own_sizes(o, SIZES, given.given, saved, payload, tokenizer)
        else:
            tokenizer = Tokenizer.gpt2() if o.tokenizer == "gpt2" else Tokenizer.train(
                (d.prompt + d.completion for d in parts[0]), o.vocab_size, say=run.say)
            config = GPTConfig(o.n_layer, o.n_head, o.n_embd, tokenizer.vocab_size, o.block_size, o.dropout, o.family)
        block_size = (config if scratch else model.config).block_size
        train_rows, val_rows, val, about_data = encode_demonstrations(parts, paths, o, tokenizer, block_size)
        if scratch:
            try:
                model = GPT(config).init_weights(runtime.generator(o.seed, 0, 0, "init")).to(run.device)
            except RuntimeError as error:  # no room
                fail(f"a model of --n_layer {o.n_layer} and --n_embd {o.n_embd} cannot be made: {error}")
        kernels.pick_matmul(model)
        kernels.pack_frozen(run, [model])
        order = Order([len(row.ids) for row in train_rows], o.batch_size, o.seed)
        steps = order.steps(o.num_train_epochs, o.max_steps)
        optimizers = runtime.make_optimizers(model, o)

        # ---- a new run, or one that goes on
        training = checkpoint.Training(run, tokenizer, model, optimizers, {
            f"the data of {o.data_dir}": paths, **({f"--init_from {o.init_from}": checkpoint.files_of(o.init_from)}
                                                   if adapters.is_partial(model) else {})})
        first, kept = training.restore(saved, steps)
        best, best_weights, best_figures = math.inf, None, None  # the lowest held-out loss so far
        with checkpoint.fitting(o.out_dir):  # what cannot be described is refused now, not at the end
            if kept and float(kept["info"]["nats_per_token"]) < math.inf:
                best, best_weights = float(kept["info"]["nats_per_token"]), kept["best"]
                best_figures = kept["info"]["held_out"]
                evaluate.describe(best_figures)
        payload = saved = kept = None
        if first >= steps:
            run.say(f"{o.out_dir}: this run is finished ({first} steps)")
            return
        room = block_size - o.response_length
        if room < 2 and "response_length" in given.given:
            fail(f"--response_length {o.response_length}: leaves no room for a prompt in a context of {block_size} "
                 "tokens")
        prompts_path = os.path.join(o.data_dir, "prompts.val.jsonl")
        shown, _ = encode_prompts(tokenizer, load_prompts(prompts_path) if os.path.lexists(prompts_path) else
                                  [d.prompt for d in val], room if room >= 2 else block_size // 2, "trim")
        shown = shown[:evaluate.SHOWN]
        about_memory = memory.check(run, o, memory.of_sft, model, [
            [train_rows[i] for i in batch] for batch in memory.heaviest(order, steps)], val_rows)
        if o.checkpoint_activations:
            memory.recompute(model)
        if o.check:
            from minirlhf import check
            check.sft(model, tokenizer, [train_rows[i] for i in order.batch(0)], optimizers, o, run)
        if o.compile:
            compile_model(model)
        tokens_per_epoch = sum(len(row.ids) - 1 for row in train_rows)
        trained = sum(row.trained for row in train_rows)
        earlier = sum(stop - start for row in train_rows for start, stop in row.earlier)
        run.announce("SFT", [
            *about_data, *about_parts,
            f"{tokens_per_epoch:,} tokens an epoch, {trained:,} of them are trained"
            + (f", {earlier:,} of these in earlier answers of conversations" if earlier else "")
            + f"; vocabulary {tokenizer.vocab_size:,} ({tokenizer.name})",
            f"model: {model.config.n_layer} layers x {model.config.n_embd}, {model.config.n_head} heads, "
            f"{runtime.describe_parameters(model)}, from {o.init_from}",
            f"{run.hardware}; {steps} steps of {o.batch_size} rows, about "
            f"{tokens_per_epoch // order.steps_per_epoch:,} tokens each; {o.optimizer}",
            about_memory], first)

        byte_counts = [sum(tokenizer.count_bytes(row.ids[start:stop]) for start, stop in row.spans) for row in val_rows]
        kinds = labels_of(val, "domain", "")
        model.train()
        seen, seen_seconds, pace = 0, 0.0, runtime.Pace(tokens_per_epoch / order.steps_per_epoch)
        look = pace.steps(sum(len(row.ids) - 1 for row in val_rows), len(val_rows) / o.micro_batch_size
                          ) * runtime.forward_share(model, o)  # what an evaluation takes, in steps
        run.start_logs(first)
        for step in range(first, steps):
            began = time.perf_counter()
            # ---- one optimizer step: the loss is summed over microbatches and ranks and divided once
            factor = runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)
            runtime.set_rate(optimizers, factor)
            batch = [train_rows[i] for i in order.batch(step)]
            run.seed_dropout(step)
            loss = batch_gradients(model, batch, tokenizer.eos, o, run)
            norm = runtime.optimizer_step(model, optimizers, loss, f"step {step + 1}", o)
            tokens, seconds = sum(len(row.ids) - 1 for row in batch), time.perf_counter() - began
            seen, seen_seconds = seen + tokens, seen_seconds + seconds
            pace.add("steps", seconds, pace.steps(tokens))
            done, stopping = step + 1, run.should_stop()
            record = {"step": done, "epoch": done / order.steps_per_epoch, "loss": loss, "lr": o.learning_rate * factor,
                      "grad_norm": norm, "tokens_per_second": seen / seen_seconds}
            if done % o.log_interval == 0 or done == steps:
                left = pace.left("steps", steps - done) + pace.left(
                    "looks", look * runtime.looks_left(done, steps, o.eval_interval), "steps")
                run.say(f"{run.progress(done, steps, left)}  loss {loss:.3f} nats/token  lr "
                        f"{o.learning_rate * factor:.1e}  grad {norm:.2f}  {seen / seen_seconds:,.0f} tokens/s")
                seen, seen_seconds = 0, 0.0

            # ---- now and then: held-out loss, samples, a checkpoint
            scheduled = done % o.eval_interval == 0 or done == steps
            if scheduled:
                began = time.perf_counter()
                held_out = evaluate.held_out_loss(model, run, val_rows, byte_counts, kinds, tokenizer,
                                                  o.micro_batch_size)
                record["eval"], now = held_out, held_out["all"]["nats_per_token"]
                run.say(f"  held out: {evaluate.describe(held_out)}{'  best so far' if now < best else ''}")
                if not math.isfinite(now):
                    fail(f"step {done}: the held-out loss is {now}: stopped; a checkpoint, if any, is in {o.out_dir}; "
                         f"try a --learning_rate below {o.learning_rate:g}")
                show_samples(model, run, tokenizer, shown, done, o)
                pace.add("looks", time.perf_counter() - began, look)
                if now < best:
                    best, best_figures = now, held_out
                    best_weights = {k: tensor.clone() for k, tensor in checkpoint.learned_state(model).items()}
            run.write("metrics.jsonl", record)
            run.rescue = partial(training.save, done, {"nats_per_token": best, "held_out": best_figures}, best_weights)
            if scheduled or stopping:
                run.rescue()
            if stopping and done < steps:
                run.exit_stopped()
        run.say(f"\nbest held-out loss: {evaluate.describe(best_figures)}")
        run.saved(runtime.next_command("train_rm.py", o, data_dir=o.data_dir, init_from=run.path("ckpt.pt"),
                                       val_share=o.val_share))


if __name__ == "__main__":
    launch(main)
