"""Checkpoints: one file that holds a stage's weights, tokenizer and options, and what it takes to go on training.

    {"format", "stage", "config", "head", "tokenizer", "model", "options", "info", "training"}

"model" is what other programs use (the best, or the last); "training" holds the last weights, the optimizers' state,
the step and the data's fingerprint.

Invariant: written to a temporary file in the same folder, synced, then renamed, so that the name always holds a whole
file; read with weights_only=True, so that no code in it can run.
"""
import os
import zipfile
from dataclasses import asdict, fields, replace

import torch

from minirlhf.config import fail
from minirlhf.model import GPT, GPTConfig
from minirlhf.tokenizer import Tokenizer

FORMAT = 1
STAGES = {"sft": "an SFT model", "rm": "a reward model", "ppo": "a PPO policy"}
MADE_BY = {"sft": "train_sft.py", "rm": "train_rm.py", "ppo": "train_ppo.py"}


def save(path, *, stage, model, tokenizer, options, info, training, weights=None):
    """Write atomically. weights: what others shall use where that is not the model's last (the best, say).

    Exits 1 naming path and size when the disk is full or the folder is gone; the file that was there stays.
    """
    payload = {"format": FORMAT, "stage": stage, "config": asdict(model.config), "head": model.head,
               "tokenizer": tokenizer.state(), "model": weights or model.state_dict(), "options": asdict(options),
               "info": info, "training": training}
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(payload, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        size = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        if os.path.exists(temporary):
            os.remove(temporary)
        raise SystemExit(f"error: {path}: could not be written ({error}) after {size:,} bytes; what was there before "
                         "is untouched")


def read(path, stages):
    """A file, or the folder of a ckpt.pt -> the payload on the CPU, verified.

    Exits 2 where it is missing, damaged, newer, or of another stage.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        needed = " or ".join(MADE_BY[s] for s in stages)
        fail(f"{path}: no such checkpoint; run {needed} first, or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not check the CRCs
        if damaged:
            fail(f"{path}: damaged ({damaged} fails its checksum)")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except SystemExit:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        fail(f"{path}: not a checkpoint, or damaged ({reason})")
    if not isinstance(payload, dict) or type(payload.get("format")) is not int:
        fail(f"{path}: not a minirlhf checkpoint")
    if payload["format"] > FORMAT:
        fail(f"{path}: format {payload['format']}, this program reads up to {FORMAT}")
    missing = {"stage", "config", "head", "tokenizer", "model", "options", "info", "training"} - payload.keys()
    if missing:
        fail(f"{path}: lacks {', '.join(sorted(missing))}")
    if payload["stage"] not in stages:
        expected = " or ".join(STAGES[s] for s in stages)
        fail(f"{path}: holds {STAGES.get(payload['stage'], payload['stage'])}, expected {expected}")
    return payload


def resume(o, stage, structural):
    """Options of --resume -> (options to go on with, payload), or (o, None) without --resume.

    What the command line does not name stays as the run had it; what it names and changes is listed, and refused where
    the run would no longer be the same one: `structural`.
    """
    if not o.resume:
        return o, None
    path = os.path.join(o.out_dir, "ckpt.pt")
    if not os.path.exists(path):
        fail(f"--resume: {path} does not exist; start without --resume")
    payload = read(path, [stage])
    own, changes = {f.name for f in fields(o)} - {"resume", "overwrite", "check", "out_dir"}, {}
    for name, value in payload["options"].items():
        if name in own and name not in o.given:
            changes[name] = value
        elif name in own and value != getattr(o, name):
            text = f"--{name} {getattr(o, name)}: this run had {value}"
            if name in structural:
                fail(f"--resume: {text}, which cannot change; leave the option out or start another run")
            print(f"resume: {text}")
    return replace(o, **changes), payload


def build(payload, path, device, dropout=0.0):
    """-> (model, tokenizer) of a payload, strictly: exits 2 on missing or extra keys, other shapes, or NaN."""
    try:
        model = GPT(GPTConfig(**{**payload["config"], "dropout": dropout}), payload["head"])
        tokenizer = Tokenizer.from_state(payload["tokenizer"])
        if tokenizer.vocab_size != model.config.vocab_size:
            fail(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}")
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        fail(f"{path}: its model or tokenizer cannot be built ({type(error).__name__}: {error})")
    load_weights(model, payload["model"], path)
    return model.to(device), tokenizer


def load_weights(model, state, path):
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        fail(f"{path}: does not fit the model: {' '.join(str(error).split())[:400]}")
    for name, p in model.state_dict().items():
        if not p.isfinite().all():
            fail(f"{path}: {name} holds values that are not finite")


def load(path, stages, device):
    """-> (model in eval mode, tokenizer, payload)."""
    payload = read(path, stages)
    model, tokenizer = build(payload, path, device)
    return model.eval(), tokenizer, payload


def same_tokenizer(first, first_path, second, second_path):
    """Exits 2 unless both checkpoints turn text into the same ids."""
    if first.ranks != second.ranks:
        at = next((n for n, (a, b) in enumerate(zip(first.ranks, second.ranks)) if a != b), "its end")
        fail(f"{first_path} and {second_path} have different tokenizers ({first.name} with {first.vocab_size} tokens, "
             f"{second.name} with {second.vocab_size}; they differ from token {at} on)")
