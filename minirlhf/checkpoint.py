"""Checkpoints: one file that holds a stage's weights, tokenizer and options, and what it takes to go on training.

    {"format", "stage", "config", "head", "tokenizer", "model", "options", "info", "environment", "training"}

"model" is what other programs use (the best, or the last); "training" holds the last weights, the optimizers' state,
the step and the data's fingerprint. Adapters on another program's model are kept by themselves: "model" then has what
they learned, and "base" where that model is, its fingerprint, and adapters that were trained on it before. A file is a
thirtieth as large so, and the published weights are never copied. Other adapters are merged into the weights.

Invariant: the name always holds a whole file, whose SHA-256 stands at its end as the zip's comment; the good file
before it is kept as ckpt.previous.pt. Files are read with weights_only=True, so that no code in them can run.
"""
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import time
import zipfile
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch

from minirlhf import adapters, fetch, hub, pretrained, runtime
from minirlhf import tokenizer as tokenizers
from minirlhf.chat import Form
from minirlhf.config import as_fields, check_ranges, did_you_mean, fail, fitting, one_line, ranks, say
from minirlhf.data import fingerprint
from minirlhf.model import GPT, GPTConfig
from minirlhf.runtime import sync_folder
from minirlhf.sizes import outline
from minirlhf.tokenizer import Tokenizer

FORMAT = 3  # what this program reads; it writes 3 with a form of messages, 2 with adapters on another's model, else 1
STAGES = {"sft": "an SFT model", "rm": "a reward model", "ppo": "a PPO policy", "dpo": "a DPO policy"}
MADE_BY = {**{stage: f"train_{stage}.py" for stage in ("sft", "rm", "ppo")}, "dpo": "python -m minirlhf.dpo"}
POLICIES = ["sft", "ppo", "dpo"]  # what answers prompts, and can be trained further
LENGTH = {**dict.fromkeys(("sft", "rm", "dpo"), "num_train_epochs"), "ppo": "total_episodes"}  # what ends a stage
PARTS = {"stage": str, "config": dict, "head": str, "tokenizer": dict, "model": dict, "options": dict, "info": dict,
         "training": dict}
SEAL = b"\x20\0"  # the last two bytes of a zip file without a comment are 0; these announce one of 32 bytes


class Damaged(Exception):
    """What is not, or no longer, a whole checkpoint."""


# ---- writing

def save(path, *, stage, model, tokenizer, options, info, training, environment=None, weights=None, also="",
         drop=()):
    """Write, read back, rename; the good file that was there becomes ckpt.previous.pt -> a line with size and seconds.

    weights: what others shall use where that is not the model's last (the best, say); environment: Run.environment();
    also: a path that the file gets too, in place of the files `drop`, while what was there before is still whole.
    Exits 1 as `write` does.
    """
    ids = tokenizer.state()
    return write(path, {
        "format": 3 if "form" in ids else 2 if is_on_base(model) else 1, "stage": stage,
        "config": sizes_of(model.config), "head": model.head, "tokenizer": ids, "options": asdict(options),
        "info": info, "environment": environment or {}, "training": training, **contents(model, weights)}, also, drop)


def write(path, payload, also="", drop=()):
    """The file of a payload, as `save` makes it -> a line with size and seconds.

    Exits 1 and leaves what was there when a weight is not finite, or, naming path and size, when the disk is full or
    the folder gone.
    """
    began, temporary, size = time.perf_counter(), f"{path}.tmp", 0
    if name := not_finite(payload):
        raise SystemExit(one_line(f"error: {path}: not written, for {name} is no longer finite; try a lower "
                                  "--learning_rate; what was there before is untouched"))
    try:
        try:
            with open(temporary, "wb") as f:
                digesting = Digesting(f)
                torch.save(payload, digesting)
                f.seek(-2, os.SEEK_END)
                f.write(SEAL + digesting.sha.digest())
                f.flush()
                os.fsync(f.fileno())
        finally:
            size = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        unpack(temporary, mmap=True)  # whole, and readable
        if also:
            second_name(temporary, also)
        keep_previous(path)  # where it is a copy, the disk may be full
        for old in drop:  # before the file has its name: a run that is killed here and resumed removes the rest
            with contextlib.suppress(FileNotFoundError):
                os.remove(old)
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except (OSError, RuntimeError, Damaged) as error:
        for unfinished in (temporary, f"{also}.tmp", f"{previous_of(path)}.tmp"):
            with contextlib.suppress(OSError):
                os.remove(unfinished)
        raise SystemExit(one_line(f"error: {path}: could not be written ({error}) after {size:,} bytes; what was there "
                                  "before is untouched"))
    return f"  saved {path}: {size / 1e6:.1f} MB in {time.perf_counter() - began:.2f} s"


def is_on_base(model):
    """Whether a file holds the model's adapters only, and not what they stand on."""
    return bool(model.base) and any("model" not in entry for entry in model.base["adapters"])


def is_merged(model):
    """Whether a file holds the model whole, what learns added to what is frozen."""
    return adapters.is_partial(model) and not is_on_base(model)


def contents(model, learned=None):
    """What a file holds of a model. learned: its weights of another time, as `learned_state` gives them."""
    if is_on_base(model):
        learned, entries = learned or learned_state(model), model.base["adapters"]
        return {"model": learned, "base": {**model.base, "chain": chain_hash([*entries[:-1],
                                                                              {**entries[-1], "model": learned}])}}
    return {"model": adapters.merged(model, learned)}


def chain_hash(entries):
    """A short hash of adapters, the one after the other: their options and tensors."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr([entry[name] for name in ("head", "lora_rank", "lora_alpha", "lora_layers")]).encode())
        for name, tensor in sorted(entry["model"].items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def learned_state(model):
    """{name: tensor} of what a run changes in a model: all of it, or what is not frozen."""
    return adapters.trained(model) if adapters.is_partial(model) else model.state_dict()


def sizes_of(config):
    """A GPTConfig's values; of GPT-2's family only those that every version of this program knows."""
    values = asdict(config)
    return values if config.family == "llama" else {k: values[k] for k in (
        "n_layer", "n_head", "n_embd", "vocab_size", "block_size", "dropout")}


class Digesting:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file):
        self.file, self.sha, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data):
        self.sha.update(data)
        return self.file.write(data)


def previous_of(path):
    return os.path.join(os.path.dirname(path), "ckpt.previous.pt")


def keep_previous(path):
    """A second name for the file, which is never without one; unless it is damaged, and an older one worth more."""
    with contextlib.suppress(FileNotFoundError, Damaged):
        check_whole(path)
        second_name(path, previous_of(path))


def second_name(path, name):
    """`name` for the same file, or for a copy where the file system has no second names: whole whenever it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{name}.tmp")  # of a save that was killed
    try:
        os.link(path, f"{name}.tmp")
    except OSError:
        with open(path, "rb") as source, open(f"{name}.tmp", "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    os.replace(f"{name}.tmp", name)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{name}.tmp")  # it is still there where both were names of one file: then a rename does nothing


def not_finite(value, name=""):
    """Dotted name of the first tensor in nested dicts and lists that holds NaN or infinity, or ""."""
    if isinstance(value, torch.Tensor):
        return "" if value.isfinite().all() else name
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next(filter(None, (not_finite(v, f"{name}.{k}".lstrip(".")) for k, v in inside)), "")


# ---- reading

def check_whole(path):
    """Raises Damaged where a byte is not as it was written. What torch.save alone wrote has the zip's CRCs only."""
    with open(path, "rb") as f:
        left, sha = os.fstat(f.fileno()).st_size - len(SEAL) - 32, hashlib.sha256()
        while left > 0 and (block := f.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        seal = f.read()
    sha.update(b"\0\0")  # where the seal begins, torch.save had left these
    if seal[-22:-18] == b"PK\5\6" and seal[-2:] == b"\0\0":
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise Damaged(f"{damaged} fails its checksum")
    elif seal != SEAL + sha.digest():
        raise Damaged("cut short, or a byte of it has changed")


def unpack(path, mmap=False):
    """-> what the file holds, on the CPU. Raises Damaged."""
    try:
        check_whole(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Damaged:
        raise
    except FileNotFoundError:
        raise Damaged("no such file")
    except OSError as error:  # which says nothing of the file's content
        fail(f"{path}: cannot be read ({error.strerror or error})")
    except pickle.UnpicklingError:
        raise Damaged("refused: it holds more than tensors and plain values, and could run code")
    except Exception as error:
        raise Damaged((str(error).splitlines() or [type(error).__name__])[0][:200])


def file_of(path):
    return os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path


def files_of(path):
    """All files that a model is made of: its checkpoint, or those of another program."""
    path = located(path)
    return pretrained.files(path) if is_foreign(path) else [file_of(path)]


def located(path, stages=()):
    """The path of a model that is named: one of `hub.NAMES` is fetched. Exits 2 where it cannot be of these stages, or
    a model of the user's has the same name: neither stands in for the other."""
    if path not in hub.NAMES:
        return path
    cached = os.path.join(fetch.cache_folder(), path)
    if (os.path.isfile(file_of(path)) or pretrained.is_foreign(path)) and not (
            os.path.exists(cached) and os.path.samefile(path, cached)):
        fail(f"{path}: the name of a published model, and here of one of yours: {os.path.join('.', path)} names yours; "
             "for the published one, rename yours or work in another folder")
    if stages == ["rm"]:
        fail(f"{path}: is a language model, expected a reward model: train_rm.py makes one, also from {path}")
    return hub.fetched(path)


def is_foreign(path):
    """Whether a path names a model of another program."""
    return path.endswith(".gguf") or not os.path.isfile(file_of(path)) and pretrained.is_foreign(path)


def read(path, stages):
    """A file, or the folder of a ckpt.pt -> the payload on the CPU, verified.

    Exits 2 where it is missing, damaged, newer, or of another stage.
    """
    path = file_of(path)
    if not os.path.isfile(path):
        needed = " or ".join(MADE_BY[s] for s in stages)
        fail(f"{path}: no such checkpoint; run {needed} first, or name another"
             + did_you_mean(os.path.basename(path.rstrip("/")), hub.NAMES))
    try:
        return verified(unpack(path), path, stages)
    except Damaged as error:
        earlier = previous_of(path)
        fail(f"{path}: not a checkpoint, or damaged ({error})"
             + (f"; there is an earlier one: {earlier}" if os.path.isfile(earlier) and earlier != path else ""))


def verified(payload, path, stages):
    """The payload. Exits 2 unless it is one of these stages', of this format or an older one, and finite."""
    if not isinstance(payload, dict) or type(payload.get("format")) is not int:
        fail(f"{path}: not a minirlhf checkpoint")
    if payload["format"] > FORMAT:
        fail(f"{path}: format {payload['format']}, this program reads up to {FORMAT}")
    if wrong := [part for part, kind in PARTS.items() if not isinstance(payload.get(part), kind)]:
        fail(f"{path}: lacks {', '.join(wrong)}, or holds something else there")
    if payload["stage"] not in stages:
        expected = " or ".join(filter(None, (", ".join(STAGES[s] for s in stages[:-1]), STAGES[stages[-1]])))
        fail(f"{path}: holds {STAGES.get(payload['stage'], payload['stage'])}, expected {expected}")
    if (payload["head"] == "scalar") != (payload["stage"] == "rm"):
        fail(f"{path}: holds {STAGES[payload['stage']]} with the head {payload['head']!r}")
    with fitting(path):
        if name := not_finite(payload):
            fail(f"{path}: {name} holds values that are not finite")
    return payload


def build(payload, path, device, dropout=0.0):
    """-> (model, tokenizer) of a payload, strictly: exits 2 on missing or extra weights, or other shapes."""
    with fitting(path):
        sizes, head = {k: v for k, v in payload["config"].items() if k != "dropout"}, payload["head"]
        kinds = {f.name: f.type for f in fields(GPTConfig)}
        if wrong := [name for name, v in sizes.items() if name != "family" and (
                type(v) is not kinds.get(name) or v is not False and not 0 < v < math.inf)]:
            fail(f"{path}: does not fit: {wrong[0]} is {str(sizes[wrong[0]])[:40]!r}")
        config = GPTConfig(**sizes, dropout=dropout)
        tokenizer = Tokenizer.from_state(payload["tokenizer"])
        if tokenizer.vocab_size != config.vocab_size:
            fail(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}")
        if "base" in payload:
            return on_base(payload, config, path).to(device), tokenizer
        if config.n_layer > len(payload["model"]):
            fail(f"{path}: does not fit: {config.n_layer} layers of {len(payload['model'])} weights")
        check_shapes(outline(config, head), payload["model"], path)
        model = GPT(config, head)
    load_weights(model, payload["model"], path)
    return model.to(device), tokenizer


def on_base(payload, config, path):
    """The model of a file that holds adapters only: another program's, to whose weights all of them are added."""
    named, place, entries = payload["base"]["path"], found_base(payload["base"], path), []
    base = {**payload["base"], "path": named if named in hub.NAMES else place}
    model = pretrained.load(place, None, config.block_size, f"{path}: does not fit: {config.block_size} tokens")[0]
    if ["model" in entry for entry in base["adapters"]] != [True] * (len(base["adapters"]) - 1) + [False]:
        fail(f"{path}: does not fit: the last of the adapters are the file's own, and no others")
    for entry in base["adapters"]:
        entry = {"model": payload["model"], **entry}
        rank, alpha, layers = (entry[name] for name in ("lora_rank", "lora_alpha", "lora_layers"))
        ranks = {len(t) for name, t in entry["model"].items() if name.endswith(".a")}
        if type(rank) is not int or ranks != {rank} or type(alpha) is not float or not 0 < alpha < math.inf:
            fail(f"{path}: does not fit: adapters of rank {str(rank)[:40]} and alpha {str(alpha)[:40]}")
        if odd := [name for name, tensor in entry["model"].items() if not tensor.is_floating_point()]:
            fail(f"{path}: does not fit: {odd[0]} is of {entry['model'][odd[0]].dtype}")
        if type(layers) is not int or not 0 <= layers <= model.config.n_layer or entry["head"] not in ("lm", "scalar"):
            fail(f"{path}: does not fit: adapters in {str(layers)[:40]} blocks, under the head {entry['head']!r:.40}")
        settings = SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_layers=layers, freeze_layers=0)
        adapted = adapters.learner(model, entry["head"], settings, torch.Generator())
        load_weights(adapted, entry["model"], path)
        model = adapters.merge(adapted)
        entries.append(entry)
    if base.get("chain", found := chain_hash(entries)) != found:  # files of early versions have none
        fail(f"{path}: does not fit: the adapters are not those that were saved, or not in their order")
    if replace(model.config, dropout=config.dropout) != config or model.head != payload["head"]:
        fail(f"{path}: does not fit the model that it is made from, {base['path']}")
    model.base = {**base, "adapters": entries}
    return with_dropout(model, config.dropout)


def found_base(base, path):
    """The absolute path of the model that a file's adapters stand on: where it was, beside the file, or in the cache of
    fetched ones. Exits 2 where there is none with its contents."""
    wanted = str(base["path"])
    places = [wanted, *(os.path.join(folder, os.path.basename(wanted)) for folder in (
        os.path.dirname(path) or ".", str(fetch.cache_folder())))]
    if wanted in hub.NAMES:
        places = [hub.fetched(wanted)]
    there = [place for place in places if os.path.exists(place)]
    for place in there:
        try:
            if fingerprint(*pretrained.files(place)) == base["files"]:
                return os.path.abspath(place)
        except OSError as error:
            fail(f"{path}: holds adapters on {wanted}, but {error.filename or place} cannot be read ({error.strerror})")
    fail(f"{path}: holds adapters on {wanted}, which " + (
        f"is another model now ({', '.join(there)})" if there else f"is not there, nor at {places[1]} or {places[2]}")
        + f"; put the model that they were trained on into {fetch.cache_folder()} (MINIRLHF_CACHE), where all files "
        "find it")


def with_dropout(model, dropout):
    model.config.dropout = dropout
    for block in model.h:
        block.attn.dropout = block.mlp.dropout = dropout
    return model


def check_shapes(model, state, path):
    own, wrong = learned_state(model), []
    for name in own | state:
        wanted, found = (tuple(x[name].shape) if name in x else None for x in (own, state))
        if wanted != found:
            wrong.append(f"missing {name}" if found is None else f"unexpected {name}" if wanted is None else
                         f"{name} has shape {found}, not {wanted}")
    if wrong:
        fail(f"{path}: does not fit the model: {', '.join(wrong[:4])}"
             + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))


def load_weights(model, state, path):
    with fitting(path):
        check_shapes(model, state, path)
        model.load_state_dict(state, strict=False)  # what is frozen is there already


def load_optimizers(optimizers, states, path):
    """Moments and step counts; rates and the like stay those of the options."""
    with fitting(path):
        for optimizer, state in zip(optimizers, states, strict=True):
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, own):
                group.update(values)
            for p, moments in optimizer.state.items():
                if wrong := [name for name, m in moments.items() if m.dim() and m.shape != p.shape]:
                    fail(f"{path}: does not fit: {wrong[0]} of a weight of shape {tuple(p.shape)}")


def load(path, stages, device, dropout=0.0, block_size=0):
    """A checkpoint, or a model of another program -> (model in eval mode, tokenizer, payload).

    Another program's language model counts as an SFT model, its classifier as a reward model; block_size, if not 0,
    shortens its context. Exits 2 as `read` and `pretrained.load` do.
    """
    named, path = path, located(path, stages)
    if not is_foreign(path):
        payload = read(path, stages)
        model, tokenizer = build(payload, file_of(path), device, dropout)
        return model.eval(), tokenizer, payload
    head = "scalar" if stages == ["rm"] else None if "rm" in stages else "lm"
    model, found, info = pretrained.load(path, head, block_size)
    with pretrained.readable(path):
        model.base = {"path": named if named != path else os.path.abspath(path),
                      "files": fingerprint(*pretrained.files(path)), "adapters": []}
    tokenizer = (tokenizers.from_gguf(path, found) if path.endswith(".gguf") else
                 tokenizers.from_folder(path, model.config.vocab_size))
    if tokenizer.vocab_size != model.config.vocab_size:
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}")
    stage = "rm" if model.head == "scalar" else "sft"
    return with_dropout(model, dropout).to(device), tokenizer, {
        "stage": stage, "config": sizes_of(model.config), "options": {}, "info": info}


def start(o, saved, device, block_size):
    """The model of stage 1 that goes on or starts from another, and learns as the options say -> as `load`.

    What is frozen is not in the run's own checkpoint, `saved`, but in the model of --init_from. Exits 2 where that has
    gone since.
    """
    partial = o.lora_rank or o.freeze_layers
    if saved and not partial:
        return *build(*saved, device, o.dropout), saved.payload
    if saved and o.init_from not in hub.NAMES and not os.path.exists(o.init_from):
        fail(f"--resume: {o.init_from}: is no longer there, which holds the run's frozen weights; name its new place "
             "with --init_from")
    model, tokenizer, payload = load(o.init_from, POLICIES, device, o.dropout, block_size)
    as_begun(tokenizer, saved)
    if partial:
        model = adapters.learner(model, "lm", o, runtime.generator(o.seed, 0, 0, "adapters"), o.dropout)
    return model, tokenizer, payload


def with_own_sizes(o, names, given, saved, payload, tokenizer):
    """Options with the sizes of the model that `start` gave, by these names. Exits 2 where one that was given is not
    the model's."""
    found = {"family": "gpt2", "tokenizer": o.tokenizer, **payload["config"], **payload["options"]}
    own = {name: found[name] for name in names}
    had = own | {"tokenizer": (saved.payload if saved else payload)["options"].get("tokenizer", tokenizer.name)}
    for name in names:
        if name in given and getattr(o, name) != had[name]:
            fail(f"--{name} {getattr(o, name)}: {saved.path if saved else o.init_from} has {had[name]}; leave the "
                 "option out")
    return replace(o, **own)


def as_begun(tokenizer, saved):
    """A run that goes on keeps its form of messages: earlier versions took all for Human/Assistant text."""
    if saved:
        with fitting(saved.path):
            tokenizer.form = Form.of(saved.payload["tokenizer"].get("form"), tokenizer.special)


def load_pair(init_from, reference, device):
    """-> the model that a policy starts from, its frozen reference, their tokenizer, and what the reference is called.

    reference: its path, or "" where it is the model of init_from itself. Exits 2 where the two cannot be compared.
    """
    ref, tokenizer, payload = load(reference or init_from, POLICIES, device)
    called = "SFT" if payload["stage"] == "sft" else "reference"
    if not reference:
        return ref, ref, tokenizer, called
    del payload  # so that no more than one is in memory
    policy, own_tokenizer = load(init_from, POLICIES, device)[:2]
    compatible((policy, own_tokenizer), init_from, (ref, tokenizer), reference)
    return policy, ref, tokenizer, called


def compatible(first, first_path, second, second_path):
    """Exits 2 unless two (model, tokenizer) turn text into the same ids and take as many of them."""
    (model, tokenizer), (other, other_tokenizer) = first, second
    if not tokenizer.same_ids(other_tokenizer):
        at = next((n for n, (a, b) in enumerate(zip(tokenizer.ranks, other_tokenizer.ranks)) if a != b), "its end")
        fail(f"{first_path} and {second_path} have different tokenizers ({tokenizer.name} with {tokenizer.vocab_size} "
             f"tokens, {other_tokenizer.name} with {other_tokenizer.vocab_size}; they differ from token {at} on)")
    if tokenizer.form != other_tokenizer.form:  # which matters where messages are read
        tokenizer.open_form = other_tokenizer.open_form = (
            f"{first_path} and {second_path} read them in different forms; make the second from the first")
    if model.config.block_size != other.config.block_size:
        fail(f"{first_path} has a context of {model.config.block_size} tokens, {second_path} one of "
             f"{other.config.block_size}; make the second from the first")


# ---- going on

class Saved(NamedTuple):
    """A checkpoint to go on from."""
    payload: dict
    path: str


class Training:
    """What a stage saves now and then and takes up again: its networks, optimizers, step, and which inputs it had.

    inputs: {what: [files]}, whose contents must be the same on resume, wherever they lie; a change of .py files is only
    told. networks: what is trained besides `model`, by the name in the file.
    """

    def __init__(self, run, tokenizer, model, optimizers, inputs, **networks):
        self.run, self.tokenizer, self.model, self.optimizers = run, tokenizer, model, optimizers
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(run, "rescue", None))
        self.networks, self.environment = networks, run.environment()
        self.fingerprints = {what: fingerprint(*paths) for what, paths in inputs.items()}
        self.code = [what for what, paths in inputs.items() if any(path.endswith(".py") for path in paths)]

    def restore(self, saved, steps):
        """saved: `Saved` or None -> steps taken so far, what else the stage kept; the weights others shall use, if
        they are not the last, under "best". Exits 2 where an input has changed or something does not fit."""
        if saved is None:
            return 0, {}
        payload, path = saved
        with fitting(path):
            state = payload["training"]
            before, names = state.pop("data"), [*self.fingerprints]
            if len(before) != len(names):
                odd = [*before][len(names):] or names[len(before):]
                fail(f"--resume: the run of {path} began {'with' if len(before) > len(names) else 'without'} {odd[0]}; "
                     "the inputs of a run cannot change")
            for (what, now), was in zip(self.fingerprints.items(), before.values()):
                if was != now and what in self.code:
                    self.run.say(f"resume: warning: {what} has changed since the run of {path} began")
                elif was != now:
                    fail(f"--resume: {what} is not what the run of {path} began with")
            if "best" in state:
                check_shapes(self.model, state["best"], path)
            apart = "model" in state and not is_merged(self.model)  # a merged model is no state of one that learns
            best = state.pop("best", payload["model"] if apart else None)
            load_weights(self.model, state.pop("model", payload["model"]), path)
            for name, network in self.networks.items():
                load_weights(network, state.pop(name), path)
            load_optimizers(self.optimizers, state.pop("optimizers"), path)
            self.environment = self.run.environment(payload.get("environment"))
            step = state["step"]
            if type(step) is not int or step < 0:
                fail(f"{path}: does not fit: step {str(step)[:40]!r}")
            if step > steps:
                length = LENGTH[self.run.stage]
                fail(f"--resume: --{length} {getattr(self.run.options, length)}: {steps} steps, but the run of {path} "
                     f"has taken {step}; ask for more, or start another run")
            payload.pop("model")  # a second copy of the weights
            return step, {**state, "info": payload["info"], "options": payload["options"], "best": best}

    def save(self, step, info, best=None, **state):
        """out_dir/ckpt.pt, by the first rank. best: the weights that others shall use, where not the last."""
        if self.run.main:
            self.run.sync()
            training = {"step": step, "data": self.fingerprints, **state,
                        **{name: learned_state(network) for name, network in self.networks.items()},
                        "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
            merged = is_merged(self.model)
            if best is not None or merged:
                training["model"] = learned_state(self.model)
            if best is not None and merged:
                training["best"] = best
            keep, name = self.run.options.keep_checkpoints, f"ckpt.{step:06}.pt"
            others = [other for other in self.run.numbered().values() if other != name] if keep else []
            self.run.say(save(self.run.path("ckpt.pt"), stage=self.run.stage, model=self.model, weights=best,
                              tokenizer=self.tokenizer, options=self.run.options, info=info,
                              environment=self.environment, training=training,
                              also=self.run.path(name) if keep else "",
                              drop=[self.run.path(other) for other in others[:max(0, len(others) + 1 - keep)]]))


def of_another_length(o, stage, was, tell):
    """What else changes where a run becomes longer (or shorter): its warm-up, a share of it, stays as long as it was.

    was: the run's own options. Exits 2 where the steps that were taken would have had other learning rates, with the
    command of a run that begins where this one ends.
    """
    length = LENGTH[stage]
    asked, had, ratio = getattr(o, length), was[length], was.get("warmup_ratio", 0.0)
    if was.get("lr_schedule") == "constant":
        if not ratio or "warmup_ratio" in o.given:
            return {}
        ratio = min(1.0, ratio * had / asked)
        tell(f"resume: --warmup_ratio {ratio:g}: the warm-up stays as long as it was")
        return {"warmup_ratio": ratio}
    told = f"--resume: --{length} {asked}: this run had {had}, over which its learning rate falls to 0"
    if asked < had:
        fail(f"{told}; leave the option out or start another run")
    changes = {"resume": False, "overwrite": False, "out_dir": os.path.normpath(o.out_dir) + "-longer",
               "init_from": os.path.join(o.out_dir, "ckpt.pt"), length: round(asked - had, 6)}
    if stage != "sft":
        changes["reference"] = was.get("reference") or was["init_from"]
    own = {f.name: was[f.name] for f in fields(o) if f.name in was} | changes
    fail(f"{told}; when it has ended, go on in another run: " + runtime.command_line(stage, replace(o, **own)))


def functions(rewards):
    """For each --reward its function's name, "" for a reward model: where files lie and how much each counts may change
    on resume."""
    return [match[1] if (match := re.fullmatch(r".*\.py:([^:]+)(?::[^:]*)?", str(spec))) else "" for spec in rewards]


def resume(o, stage, structural):
    """Options of --resume -> (options to go on with, Saved or None).

    What the command line does not name stays as the run had it; what it names and changes is listed, and refused where
    the run would no longer be the same one: `structural`, and LENGTH where the learning rate falls over it. Where a
    file lies is not: its content counts (`Training`). A damaged checkpoint gives way to the one before it; a run that
    ended before its first starts again.
    """
    if not o.resume:
        return o, None
    tell = say if ranks()[0] == 0 else lambda text: None
    if o.overwrite:
        fail("--resume and --overwrite exclude each other")
    path, payload = os.path.join(o.out_dir, "ckpt.pt"), None
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"--resume: {path} is no file; move it away")
    try:
        payload = unpack(path)
    except Damaged as error:
        earlier, begun = previous_of(path), os.path.join(o.out_dir, "config.json")
        if os.path.isfile(earlier):
            tell(f"resume: {path} cannot be used ({error}): goes on from {earlier}")
            path, payload = earlier, read(earlier, [stage])
        elif os.path.exists(path) or not os.path.isfile(begun):
            fail(f"--resume: {path}: {error}; start without --resume, with --overwrite where the folder holds a run")
    if payload:
        was = verified(payload, path, [stage])["options"]
        if not payload["training"]:
            fail(f"--resume: {path}: holds the model only, without what it takes to go on; begin another run with "
                 f"--init_from {path}")
    else:
        tell(f"resume: the run in {o.out_dir} ended before its first checkpoint: it starts again")
        with open(begun, encoding="utf-8") as f, fitting(begun):
            was = dict(json.load(f))
        if was.get("stage") != stage:
            fail(f"--resume: {begun}: holds the options of {STAGES.get(was.get('stage'), 'no run')}, expected those of "
                 f"{STAGES[stage]}")
    names, was = {f.name for f in fields(o)}, as_fields(type(o), was)
    if unknown := sorted(map(str, was.keys() - names - {"stage"})):
        fail(f"--resume: {path if payload else begun}: has options that this version does not know: "
             f"{', '.join(unknown)}; go on with the version that made it, or start another run")
    own, changes, length = names - {"resume", "overwrite", "check", "out_dir"}, {}, LENGTH[stage]
    defaults = {f.name: f.default for f in fields(o)} | {"lora_rank": 0, "num_eval_texts": 0, "max_steps": 0,
                                                         "last_turn_only": True}
    for name, value in (defaults | was).items():  # what an older run did not know yet, it did not do
        if name in own and name not in o.given:
            changes[name] = value
        elif name in own and value != getattr(o, name):
            new, old = (", ".join(map(str, v)) if type(v) is tuple else v for v in (getattr(o, name), value))
            text = f"--{name} {new}: this run had {old}"
            if name in structural and not (name == "reward" and functions(value) == functions(getattr(o, name))):
                fail(f"--resume: {text}, which cannot change; leave the option out or start another run")
            tell(f"resume: {text}")
    if payload and length in o.given and was.get(length) != getattr(o, length):
        if was.get("max_steps"):
            fail(f"--resume: --{length} {getattr(o, length)}: this run ends at --max_steps {was['max_steps']}, which "
                 "cannot change; start another run")
        with fitting(path):
            changes |= of_another_length(o, stage, was, tell)
    if payload is None:
        changes |= {"resume": False, "overwrite": True}
    given, asked, o = o.given, o.asked, replace(o, **changes)
    o.given, o.asked = given, asked
    check_ranges(o)
    return o, Saved(payload, path) if payload else None
