"""Whether sizes can be, and what is asked for fits the memory there is: told by the option's name, before any memory is
spent; and a model of shapes alone, which takes none.

Bounds are low ones: what they refuse cannot run; what they let pass may still need more than there is.
"""
import math
import os

import torch

from minirlhf.config import fail
from minirlhf.generate import KVCache
from minirlhf.model import GPT

TRAINING = 12  # bytes a parameter: weight, gradient and at least one moment
BLOCK = 20_000  # bytes of Python objects a block of layers
ROW = 100  # bytes of them a row


def memory_of(device):
    """Bytes of a GPU's memory, else of the machine's; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def check_room(option, what, size, device=torch.device("cpu")):
    """Exits 2 where `what`, of at least `size` bytes, takes more than the device's memory."""
    if size > memory_of(device):
        fail(f"{option}: {what} cannot be made: it takes at least {size / 1e9:,.1f} GB, and {device} has "
             f"{memory_of(device) / 1e9:,.1f} GB")


def check_batch(o):
    """Exits 2 where --batch_size rows do not fit, whatever is in them."""
    rows = getattr(o, "batch_size", 0)
    check_room(f"--batch_size {rows}", "a batch of so many rows", ROW * rows)


def parameters(n_layer, n_embd, block_size, vocab_size):
    """Numbers in a language model of GPT-2's family, and fewer than in one of Llama's: embeddings, blocks (matrices,
    biases, two LayerNorms), the last LayerNorm."""
    return (vocab_size + block_size) * n_embd + n_layer * (12 * n_embd ** 2 + 13 * n_embd) + 2 * n_embd


def check_options(o, names, resumes):
    """Exits 2 where a size is given for a model that has its own, or the heads cannot share the width out. names: of
    the sizes, block_size last, which may be given for any model."""
    if o.init_from != "scratch" and not resumes and "init_from" not in o.given:
        if sized := [f"--{name} {getattr(o, name)}" for name in names[:-1] if name in o.given]:
            fail(f"{sized[0]}: {o.init_from} has its own size and vocabulary; for a model from scratch give @scratch "
                 f"{' '.join(sized)}")
    if o.n_embd % (o.n_head if o.family == "gpt2" else 2 * o.n_head):
        fail(f"--n_head {o.n_head}: must divide --n_embd {o.n_embd}" + ", and with --family llama by an even number"
             * (o.family == "llama"))


def check_model(o, device):
    """Exits 2 where a new model of these options cannot be trained; names the one that is farthest from its default."""
    shape = {"n_layer": o.n_layer, "n_embd": o.n_embd, "block_size": o.block_size,
             "vocab_size": o.vocab_size if o.tokenizer == "bpe" else 50257}
    count = parameters(o.n_layer, o.n_embd, o.block_size if o.family == "gpt2" else 0, shape["vocab_size"])
    worst = max(shape, key=lambda name: shape[name] / getattr(type(o), name))
    others = ", ".join(f"{name} {size}" for name, size in shape.items() if name != worst)
    check_room(f"--{worst} {shape[worst]}", f"with {others} a model of {count:.3g} parameters",
               TRAINING * count + BLOCK * o.n_layer, device)


def check_rollout(option, model, rows, slots):
    """Exits 2 where the tokens, cache and logits of `rows` answers, each with its prompt of `slots`, do not fit."""
    cache = KVCache(model, 1, 1)
    size = slots * (cache.k.nbytes + cache.v.nbytes + 16) + 8 * model.config.vocab_size
    check_room(option, f"a batch of {rows:,} answers of up to {slots:,} tokens", rows * size, model.wte.weight.device)


class Uninitialised(torch.overrides.TorchFunctionMode):
    """Embeddings that are made within get no weights: for meta tensors torch would import torch._dynamo, 2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **(kwargs or {}))


def outline(config, head):
    """A model of shapes alone: it takes no memory, whatever sizes a wrong config asks for."""
    with torch.device("meta"), Uninitialised():
        return GPT(config, head)
