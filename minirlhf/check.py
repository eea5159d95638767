"""--check: what must hold of any run, tested on the user's own model, data and device, a line for each.

Differences are given in standard deviations of what is compared, so that a new model's small numbers hide nothing.

Left out: anything that needs training. That a run improves is seen in the run.
"""
import os
import tempfile

import torch

from minirlhf import checkpoint
from minirlhf.data import Row, collate
from minirlhf.generate import KVCache


class Checks:
    """Prints a line for each check and counts the failures. `limit`: what rounding may do, by the run's precision."""

    def __init__(self, run):
        self.run, self.failed, self.limit = run, 0, 1e-4 if run.dtype == torch.float32 else 0.03
        run.say(f"checks on {run.hardware}:")

    def __call__(self, claim, holds, found, cause):
        """claim: what must hold; found: what was measured; cause: the likely cause if it does not hold."""
        self.run.say(f"{'ok  ' if holds else 'FAIL'}  {claim}: {found}" + ("" if holds else f"; likely cause: {cause}"))
        self.failed += not holds

    def close(self, claim, a, b, cause):
        """Tensors a and b differ by rounding only."""
        gap = float((a - b).float().pow(2).mean().sqrt() / a.float().std(correction=0).clamp_min(1e-12))
        self(claim, gap <= self.limit, f"they differ by {gap:.1e} deviations, at most {self.limit:.0e}", cause)

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
    with run.autocast():
        together = model.hidden(noise(model, tokens, lengths))
        alone = [model.hidden(tokens[i:i + 1, :n])[0] for i, n in enumerate(lengths.tolist())]
    checks.close(f"padding changes nothing in the {name}", torch.cat(alone),
                 torch.cat([row[:n] for row, n in zip(together, lengths.tolist())]),
                 "the causal mask lets a token see what follows it, or positions depend on the padding")


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
        every = torch.arange(len(rows), device=run.device)
        for n in range(int((lengths - halves).max())):
            at = (halves + n).clamp_max(tokens.shape[1] - 1)
            kv.filled = int(at.max()) + 1
            cached[every, at] = model.hidden(tokens[every, at][:, None], kv, at[:, None])[:, 0]
    real = torch.arange(tokens.shape[1], device=run.device) < lengths[:, None]
    checks.close("the KV cache changes nothing", plain[real], cached[real],
                 "a cache slot or position is off by one, or an unwritten slot is seen")


def gradients(models):
    """All gradients in one vector, then none."""
    flat = torch.cat([p.grad.flatten() for model in models for p in model.parameters() if p.grad is not None])
    for model in models:
        model.zero_grad(set_to_none=True)
    return flat


def microbatches(checks, whole, parts):
    """Gradients of one batch, taken at once and in microbatches of one row."""
    gap = float((whole - parts).norm() / whole.norm().clamp_min(1e-20))
    checks("microbatch size changes no gradient", gap <= checks.limit, f"they differ by {gap:.1e} of their norm, at "
           f"most {checks.limit:.0e}", "a microbatch's mean was taken where the batch's sum is divided once")


def saved(checks, model, tokenizer, stage):
    """A checkpoint of the model gives the same weights, buffers and ids, to the last bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        checkpoint.save(path, stage=stage, model=model, tokenizer=tokenizer, options=checks.run.options, info={},
                        training={})
        other, other_tokenizer, _ = checkpoint.load(path, [stage], checks.run.device)
    own, loaded = model.state_dict(), other.state_dict()
    different = [name for name in own if not torch.equal(own[name], loaded[name])]
    checks("saved and loaded is the same to the last bit", not different and other_tokenizer.ranks == tokenizer.ranks,
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


def texts(tokenizer, rows):
    """[(prompt, completion), ...] as the rows' ids decode."""
    return [(tokenizer.decode(row.ids[:row.prompt_length]), tokenizer.decode(row.ids[row.prompt_length:]))
            for row in rows]


def same_ids(checks, tokenizer, rows):
    """Text that came from ids gives these ids again. rows: data.Row, none of them cut."""
    same = sum(tokenizer.encode_prompt(prompt) + tokenizer.encode_completion(completion) == row.ids
               for (prompt, completion), row in zip(texts(tokenizer, rows), rows))
    checks("prompts and completions have the same ids wherever they are encoded", same == len(rows),
           f"{same} of {len(rows)}",
           "prompt and completion were encoded together in one place and apart in another, or by another tokenizer")
