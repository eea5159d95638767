"""Other programs' models: a folder as transformers writes it, or a .gguf file -> a GPT of the same function.

    folder: config.json with model.safetensors, pytorch_model.bin, or shards of either with their index
    .gguf:  tensors of F32, F16, BF16, Q8_0, Q4_0, Q4_1

Of the families gpt2, llama, qwen2 and qwen3, with a language model's head or a sequence classifier's with one label.
Invariant: what this program cannot compute exactly is refused by key, value and reason, before memory is spent. Weights
are read in pieces, each straight to its place, so that they are in memory once; 4 and 8 bits are widened to float32.

`export.py` writes such folders, and has the command `python -m minirlhf.pretrained`.

Left out: weights that stay in a mapped file, whose pages would count as memory until the system wants them back.
"""
import contextlib
import json
import math
import os
import re
import struct
import warnings
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch

from minirlhf.config import fail, fitting, launch
from minirlhf.model import GPTConfig
from minirlhf.sizes import check_room, outline

PIECE = 1 << 20  # numbers that are widened at once
LARGEST_JSON, LARGEST_HEADER = 256 << 20, 100_000_000  # bytes
CONSTANT = "score_bias"  # of a classifier's config.json: what is added to its scores, whose class has no place for it
WEIGHTS = "model.safetensors", "pytorch_model.bin"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
# of each way to store numbers: how many make a block, and its bytes


class Stored(NamedTuple):
    """A tensor in a file, and how its numbers are stored there."""
    shape: tuple
    kind: str  # of BLOCKS, or what is not known here
    pieces: Callable  # -> its numbers in order, as flat float32 tensors
    take: Callable = None  # -> the tensor itself, where it is in memory anyway, which is then let go of


def is_foreign(path):
    """Is this a model of another program? A config.json of ours holds a run's options."""
    config = os.path.join(path, "config.json")
    return path.endswith(".gguf") or os.path.isfile(config) and "stage" not in read_json(config)


def load(path, head=None, block_size=0, asked=""):
    """A folder or .gguf file -> (GPT on the CPU in eval mode, what its tokenizer is made of, info).

    head: "lm" or "scalar" where only that will do. block_size: a shorter context than the model's own; 0 = its own;
    asked: who wants it, for the refusal of a longer one; "" = the option.
    The second is what `tokenizer_files` gives, or the "tokenizer." part of GGUF's metadata. info: source,
    model_type, context, vocab_size, kinds of tensors. Exits 2 where the model is not whole or cannot be computed
    exactly.
    """
    with fitting(path), readable(path):
        gguf = os.path.isfile(path)
        if gguf:
            metadata, stored = read_gguf(path)
            values = of_gguf(metadata, "output.weight" not in stored, path)
            tokenizer = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
        else:
            values, tokenizer = Values(read_json(os.path.join(path, "config.json")), f"{path}/config.json"), None
        config = sizes(values)
        if block_size > config.block_size:
            fail(f"{asked or f'--block_size {block_size}'}: {path} has a context of {config.block_size} tokens")
        if not gguf:
            stored, tokenizer = read_folder(path), tokenizer_files(path)
        stored = own_names(stored, config, gguf, path)
        kinds, constant = sorted({tensor.kind for tensor in stored.values()}), values.finite(CONSTANT)
        info = {"source": path, "model_type": values.of["model_type"], "context": config.block_size}
        model = assemble(config, stored, path, head, block_size or config.block_size, gguf)
        if model.head == "scalar":
            model.bias.fill_(constant)
            padding, eos = values.of.get("pad_token_id"), values.of.get("eos_token_id")
            if padding not in (eos if isinstance(eos, list) else [eos]):
                drop_padding(model, padding)
    return model.eval(), tokenizer, info | {"vocab_size": model.config.vocab_size, "kinds": kinds}


@contextlib.contextmanager
def readable(path):
    """A file that the system does not let us read is refused by name."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename or path}: {error.strerror or error}")


# ---- what the sizes may be

class Values:
    """config.json's values, or GGUF's under config.json's names; `shown` has the names that the file has itself."""

    def __init__(self, of, path, shown=()):
        self.of, self.path, self.shown = of, path, dict(shown)

    def refuse(self, key, reason):
        value = json.dumps(self.of.get(key), default=str)[:60]
        fail(f"{self.path}: {self.shown.get(key, key)} {value}: {reason}")

    def must_be(self, key, accepted, reason):
        """accepted: values that are fine, the first of them where the key is missing or null."""
        value = self.of.get(key)
        if value is not None and not any(type(value) is type(a) and value == a or
                                         isinstance(a, float) and type(value) is int and value == a for a in accepted):
            self.refuse(key, reason)

    def number(self, key, default=None, kind=int):
        value = self.of.get(key)
        if value is None:
            if default is None:
                fail(f"{self.path}: lacks {self.shown.get(key, key)}")
            return default
        if type(value) is not int and (kind is int or type(value) is not float) or not 0 < value:
            self.refuse(key, "must be a number above 0")
        if value >= 1 << 40:
            self.refuse(key, "is too large")
        return kind(value)

    def finite(self, key):
        value = self.of.get(key, 0.0)
        if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float32).max:
            self.refuse(key, "must be a finite number of float32")
        return value

    def flag(self, key, default):
        value = self.of.get(key)
        if value is not None and type(value) is not bool:
            self.refuse(key, "must be true or false")
        return default if value is None else value


OTHERS = {"gpt_neo": "attends within local windows and does not divide by sqrt(D)", "gptj": "rotates part of each head",
          "gpt_neox": "rotates part of each head", "gpt_bigcode": "shares one head of keys",
          "mistral": "slides a window", "opt": "uses ReLU", "openai-gpt": "puts its norms after the blocks",
          "gemma": "scales its embeddings"}
NEVER = {"quantization_config": "packed weights; take the model's unpacked ones, or a .gguf file",
         "auto_map": "its forward pass is code of its own", "num_experts": "mixtures of experts are not known here",
         "num_local_experts": "mixtures of experts are not known here", "attn_mult": "scales attention (muP)",
         "embeddings_scale": "scales embeddings (muP)", "output_logits_scale": "scales logits (muP)",
         "mup_scale_qk_dot_by_d": "scales attention (muP)", "mup_width_scale": "scales logits (muP)",
         "mup_embeddings_scale": "scales embeddings (muP)", "mup_output_alpha": "scales logits (muP)"}


def sizes(values) -> GPTConfig:
    """What a config describes, if it is what this program computes. Exits 2 naming key, value and reason."""
    family = values.of.get("model_type")
    if family not in ("gpt2", "llama", "qwen2", "qwen3"):
        reason = OTHERS.get(str(family), "not known here")
        values.refuse("model_type", f"{reason}; gpt2, llama, qwen2 and qwen3 are known")
    for key, value in values.of.items():
        if (key in NEVER or key.startswith("mup_")) and value not in (None, {}, [], False):
            values.refuse(key, NEVER.get(key, "scales something (muP)"))
    values.must_be("is_causal", (True,), "a token sees none of those that follow it")
    return gpt2_sizes(values) if family == "gpt2" else llama_sizes(values, family)


def gpt2_sizes(values):
    for ours, alias in (("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"),
                        ("n_positions", "max_position_embeddings")):
        if alias in values.of and values.of[alias] != values.of.setdefault(ours, values.of[alias]):
            values.refuse(alias, f"differs from {ours}")
    n_embd = values.number("n_embd")
    values.must_be("activation_function", ("gelu_new", "gelu_pytorch_tanh"),
                   '"gelu" is the exact one with erf, this program computes GPT-2\'s, with tanh'
                   if values.of.get("activation_function") == "gelu" else "GPT-2's is gelu_new")
    values.must_be("n_inner", (4 * n_embd,), f"GPT-2's MLP is 4 n_embd wide, {4 * n_embd}")
    values.must_be("layer_norm_epsilon", (1e-5,), "GPT-2's is 1e-05")
    values.must_be("scale_attn_weights", (True,), "attention would not be divided by sqrt(D)")
    values.must_be("scale_attn_by_inverse_layer_idx", (False,), "attention would be divided by its layer's number too")
    values.must_be("add_cross_attention", (False,), "there is nothing to attend to but the row itself")
    values.must_be("pruned_heads", ({}, []), "all blocks must have all heads")
    values.must_be("tie_word_embeddings", (True,), "GPT-2's output is its token embedding")
    return GPTConfig(values.number("n_layer"), values.number("n_head"), n_embd, values.number("vocab_size"),
                     values.number("n_positions"))


def llama_sizes(values, family):
    values.must_be("hidden_act", ("silu", "swish"), "the MLP's is silu")
    values.must_be("attention_bias", (False,), "biases stand on qwen2's queries, keys and values alone")
    values.must_be("mlp_bias", (False,), "the MLP has no biases")
    values.must_be("use_sliding_window", (False,), "attention sees all that came before")
    values.must_be("partial_rotary_factor", (1.0,), "the whole head is rotated")
    layers = values.of.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers)):
        values.refuse("layer_types", "all layers must be full_attention")
    usual = (("type", "default"), ("rope_type", "default"), ("partial_rotary_factor", 1.0))
    theta = values.number("rope_theta", 0.0, float)
    for key in ("rope_parameters", "rope_scaling"):
        inner = values.of.get(key)
        inner = Values({} if inner is None else inner, values.path)
        if not isinstance(inner.of, dict):
            values.refuse(key, "rotary positions are known here unscaled (default) only")
        inner.shown = {name: f"{key}.{name}" for name in inner.of}
        for item in inner.of.items():
            if item[0] != "rope_theta" and item not in usual:
                inner.refuse(item[0], "rotary positions are known here unscaled (default) only")
        own = inner.number("rope_theta", theta, float)
        if theta not in (0, own):
            inner.refuse("rope_theta", f"differs from another rope_theta of this file, {theta:g}")
        theta = own
    n_embd, n_head = values.number("hidden_size"), values.number("num_attention_heads")
    absent = 128 if family == "qwen3" and "head_dim" not in values.of else 0
    kv_absent = n_head if family == "llama" or "num_key_value_heads" in values.of else 32
    n_kv_head, head_size = values.number("num_key_value_heads", kv_absent), values.number("head_dim", absent)
    if n_head % n_kv_head:
        values.refuse("num_key_value_heads", f"num_attention_heads, {n_head}, is no multiple of {n_kv_head}")
    if not head_size and n_embd % n_head:
        values.refuse("num_attention_heads", f"must divide hidden_size, {n_embd}, where head_dim is not given")
    if (head_size or n_embd // n_head) % 2:
        values.refuse("head_dim" if head_size else "hidden_size",
                      f"heads of {head_size or n_embd // n_head}: the size must be even")
    return GPTConfig(
        values.number("num_hidden_layers"), n_head, n_embd, values.number("vocab_size"),
        values.number("max_position_embeddings"), family="llama", n_inner=values.number("intermediate_size"),
        n_kv_head=n_kv_head, head_size=head_size, rope_theta=theta or 10000.0,
        norm_eps=values.number("rms_norm_eps", 1e-6, float), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        tied=values.flag("tie_word_embeddings", False))


# ---- from their tensors to ours

GPT2 = {"score_head": "score"}
LLAMA = {"wte": "embed_tokens", "ln_f": "norm", "score_head": "score", "ln_1": "input_layernorm",
         "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "ln_2": "post_attention_layernorm",
         "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
GGUF = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output", "ln_1": "attn_norm",
        "attn.c_attn": "attn_q attn_k attn_v", "attn.c_proj": "attn_output", "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_gate ffn_up", "mlp.c_proj": "ffn_down"}
GGUF_GPT2 = GGUF | {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up"}
IGNORED = re.compile(  # no parameters
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def own_names(stored, config, gguf, path):
    """Their tensors by names without the prefix of a class, what is no parameter left out."""
    if gguf:
        return stored
    prefix, short = "transformer." if config.family == "gpt2" else "model.", {}
    for name, tensor in stored.items():
        name = name.removeprefix(prefix)
        if name in short:
            fail(f"{path}: holds {name} twice, with {prefix} before it and without")
        if name.startswith("v_head."):
            fail(f"{path}: {name} is a value head of TRL's; save the model without it")
        if not IGNORED.fullmatch(name):
            short[name] = tensor
    return short


def their_names(name, config, gguf):
    """The tensors that one of our parameters holds, one below the other."""
    names, layer = (GGUF if config.family == "llama" else GGUF_GPT2, "blk") if gguf else (
        (LLAMA, "layers") if config.family == "llama" else (GPT2, "h"))
    module, kind = name.rsplit(".", 1)
    if not module.startswith("h."):
        return [f"{names.get(module, module)}.{kind}"]
    _, n, module = module.split(".", 2)
    return [f"{layer}.{n}.{part}.{kind}" for part in names.get(module, module).split()]


def rows_of(name, config, parts):
    """How many rows each of these parts has."""
    if parts == 1:
        return [None]
    q, kv = config.n_head * config.head_size, config.n_kv_head * config.head_size
    return [q, kv, kv] if "c_attn" in name else [config.n_inner] * 2


def is_transposed(name, config):
    """Whether a folder has this matrix of ours as (in, out)."""
    return config.family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def assemble(config, stored, path, head, block_size, gguf):
    """-> the GPT. All names and shapes are compared before a weight is read."""
    found = "scalar" if "score.weight" in stored else "lm"
    if head not in (None, found):
        kinds = {"lm": "a language model", "scalar": "a sequence classifier"}
        fail(f"{path}: holds {kinds[found]}, expected {kinds[head]}")
    if config.n_layer > min(len(stored), max(len(stored) // 9, 500)):  # Llama has nine tensors a layer, GPT-2 twelve
        fail(f"{path}: {config.n_layer} layers of {len(stored)} tensors")
    model = outline(config, found)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {"score_head.bias": torch.zeros(1), "gain": torch.ones(()), "bias": torch.zeros(())}
    plan = {name: their_names(name, config, gguf) for name in shapes if found == "lm" or name not in own}
    transposed = {name for name in plan if not gguf and is_transposed(name, config)}
    wanted = {}
    for name, parts in plan.items():
        shape = shapes[name]
        for part, rows in zip(parts, rows_of(name, config, len(parts))):
            wanted[part] = shape[::-1] if name in transposed else shape if rows is None else (rows, *shape[1:])
    embedding, output = plan["wte.weight"][0], "output.weight" if gguf else "lm_head.weight"
    if config.tied and output in stored:
        wanted[output] = wanted[embedding]
    compare_shapes(wanted, stored, path)
    count = sum(tensor.numel() for tensor in model.parameters())
    check_room(path, f"a model of {count:,} parameters", 4 * count)
    if config.tied and output in stored:
        copy = stored.pop(output)
        if not same(copy, stored[embedding]):
            fail(f"{path}: {output} differs from {embedding}, to which the output is tied")
        if copy.take:
            copy.take()
    # Room first for what is read in pieces: if pieces came and went in between, holes would stay that count as memory.
    state = {name: torch.empty(shape) if name in plan else own[name] for name, shape in shapes.items()
             if name not in plan or not stored[plan[name][0]].take}
    in_pairs = gguf and not config.qkv_bias and not config.qk_norm  # what is Llama's own in GGUF
    for name, parts in plan.items():
        whole = stored[parts[0]].take if len(parts) == 1 and name not in transposed else None
        if name not in state:
            state[name] = whole() if whole else torch.empty(shapes[name])
        slices = state[name].split([wanted[part][0] for part in parts]) if len(parts) > 1 else [state[name]]
        for part, rows in zip(parts, slices):
            pairs = config.head_size // 2 if in_pairs and part.endswith(("attn_q.weight", "attn_k.weight")) else 0
            tensor = stored.pop(part)
            fill(rows, rows.flatten().split(PIECE) if whole else tensor.pieces(), f"{path}: {part}",
                 name in transposed, pairs)
            if tensor.take and not whole:
                tensor.take()
    model.load_state_dict(state, assign=True)
    if block_size < config.block_size:
        model.config.block_size = block_size
        if config.family == "gpt2":
            model.wpe = torch.nn.Embedding.from_pretrained(model.wpe.weight.data[:block_size].clone(), freeze=False)
    return model


def drop_padding(model, padding):
    """A row of zeros at the end of a classifier's embedding, for a token that no text holds: without it the model has
    the vocabulary of the others."""
    rows = model.wte.weight.data
    if padding == len(rows) - 1 and not rows[-1].any():
        model.config.vocab_size -= 1
        model.wte = torch.nn.Embedding.from_pretrained(rows[:-1].clone(), freeze=False)


def compare_shapes(wanted, stored, path):
    """Exits 2 unless the tensors are exactly these, in a way of storing numbers that is known."""
    wrong = [f"lacks {name}" for name in wanted.keys() - stored.keys()]
    wrong += [f"{name} is not a part of such a model" + (
        ": it scales rotary positions" if name.startswith("rope_freqs") else "")
        for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        tensor = stored[name]
        if tensor.shape != wanted[name]:
            wrong.append(f"{name} has shape {tensor.shape}, not {wanted[name]}" + (
                ": only one label makes a score" if name == "score.weight" else ""))
        elif tensor.kind not in BLOCKS:
            wrong.append(f"{name} is stored as {tensor.kind}; known here: {', '.join(BLOCKS)}")
    if wrong:
        wrong.sort()
        fail(f"{path}: {'; '.join(wrong[:4])[:1000]}" + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))


def fill(rows, pieces, what, transposed, pairs):
    """Write a tensor's pieces into `rows`. pairs: D/2 where rows i and i + D/2 of each head lie next to each other, as
    GGUF's converter puts Llama's; here they go back into two halves."""
    out = torch.empty(rows.shape[::-1]) if transposed else torch.empty(rows.shape) if pairs else rows
    flat, at = out.view(-1), 0
    for piece in pieces:
        if not piece.isfinite().all():
            fail(f"{what} holds values that are not finite")
        flat[at:at + len(piece)] = piece
        at += len(piece)
    if at != len(flat):
        fail(f"{what} changed while it was read")
    if transposed:
        rows.copy_(out.T)
    elif pairs:
        rows.copy_(out.view(-1, pairs, 2, out.shape[1]).transpose(1, 2).reshape(out.shape))


def same(a, b):
    """Are the numbers of two stored tensors of one shape the same?"""
    return all(torch.equal(x, y) for x, y in zip(a.pieces(), b.pieces(), strict=True))


# ---- numbers in a file

def in_file(path, kind, shape, offset):
    """A tensor of the file at a byte -> Stored, read in pieces when its numbers are wanted."""
    def pieces():
        numbers, size = BLOCKS[kind]
        left = math.prod(shape) // numbers
        with open(path, "rb") as f:
            f.seek(offset)
            while left:
                count = min(left, PIECE // numbers)
                raw = f.read(count * size)
                if len(raw) != count * size:
                    fail(f"{path}: ended while it was read")
                yield widen(raw, kind)
                left -= count
    return Stored(tuple(shape), kind, pieces)


def widen(raw, kind):
    """Bytes -> a flat float32 tensor. A block of 32 holds a half-precision scale d, in Q4_1 a minimum m, and whole
    numbers q: d q in Q8_0, d (q - 8) in Q4_0, d q + m in Q4_1; of 16 bytes of 4 bits the low halves come first."""
    if kind in DTYPES:
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[kind]).float()
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, BLOCKS[kind][1])
    halves = 2 if kind == "Q4_1" else 1
    scales = blocks[:, :2 * halves].copy().view(np.float16).astype(np.float32)
    q = blocks[:, 2 * halves:]
    q = q.view(np.int8) if kind == "Q8_0" else np.concatenate([q & 15, q >> 4], 1)
    x = scales[:, :1] * (q.astype(np.float32) - (8 if kind == "Q4_0" else 0))
    return torch.from_numpy((x + scales[:, 1:] if kind == "Q4_1" else x).reshape(-1))


# ---- a folder

def unique(pairs):
    """A JSON object's pairs as a dict. Raises ValueError for a name that stands twice."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name[:80]!r} stands twice")
        values[name] = value
    return values


def read_json(path):
    """An object in a file. Exits 2 naming it."""
    try:
        if os.path.getsize(path) > LARGEST_JSON:
            fail(f"{path}: larger than {LARGEST_JSON >> 20} MB")
        with open(path, "rb") as f:
            values = json.loads(f.read().decode("utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON ({' '.join(str(error).split())[:200]})" + pointer(path))
    if not isinstance(values, dict):
        fail(f"{path}: expected an object")
    return values


def pointer(path):
    """What to say of a file that Git LFS left in the place of data."""
    with open(path, "rb") as f:
        start = f.read(100)
    return "; it is a Git LFS pointer: git lfs pull" if start.startswith(b"version ") and b"git-lfs" in start else ""


def read_folder(folder):
    """-> {name: Stored} of all weights. Exits 2 where a file is missing, cut short, or not what its name says."""
    for name, read in zip(WEIGHTS, (read_safetensors, read_pickle)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return read(path)
        if os.path.isfile(f"{path}.index.json"):
            return read_shards(f"{path}.index.json", read)
    fail(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, nor an index of either")


def weight_map(index):
    """{tensor: file} of an index."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) and os.path.basename(file) == file and file
                                              for file in where.values()):
        fail(f"{index}: weight_map must name a file of this folder for each tensor")
    return where


def read_shards(index, read):
    where, stored = weight_map(index), {}
    for file in sorted(set(where.values())):
        path = os.path.join(os.path.dirname(index), file)
        if not os.path.isfile(path):
            fail(f"{path}: no such file, though {index} names it")
        tensors = read(path)
        if wrong := sorted(name for name in tensors.keys() ^ {name for name, named in where.items() if named == file}
                           if not IGNORED.fullmatch(name)):
            fail(f"{path}: {wrong[0]} is {'not in it' if wrong[0] in where else 'not in the index'}, against {index}")
        stored |= tensors
    return stored


def read_safetensors(path):
    """8 bytes of the header's length, little-endian; the header {name: {dtype, shape, data_offsets}}; the numbers."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
            fail(f"{path}: not a whole safetensors file{pointer(path)}")
        try:
            header = json.loads(f.read(length).decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            fail(f"{path}: its header is not JSON ({str(error)[:100]})")
    if not isinstance(header, dict):
        fail(f"{path}: its header is no object")
    header.pop("__metadata__", None)
    entries, stored, end = [], {}, 0
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(place, list) and len(place) == 2
                and all(type(n) is int and n >= 0 for n in shape + place)):
            fail(f"{path}: its header does not say where {name[:80]} is, or how large")
        entries.append((*place, name, dtype, shape))
    for begin, after, name, dtype, shape in sorted(entries):
        if begin != end or after < begin:
            fail(f"{path}: {name[:80]} does not begin where the tensor before it ends")
        if dtype in DTYPES and math.prod(shape) * BLOCKS[dtype][1] != after - begin:
            fail(f"{path}: {name[:80]} of shape {shape} does not take {after - begin} bytes")
        stored[name] = in_file(path, dtype if dtype in DTYPES else f"safetensors' {dtype[:20]}", shape,
                               8 + length + begin)
        end = after
    if 8 + length + end != size:
        fail(f"{path}: has {size} bytes, its header tells of {8 + length + end}: cut short, or not whole")
    return stored


def read_pickle(path):
    """torch.save's {name: tensor}, whose shapes are read first. Only tensors and plain values are let in.

    A zip is mapped, and anew after every 16 MB, for what was read of a mapping counts as memory; an old file, which is
    none, is read whole.
    """
    with open(path, "rb") as f:
        zipped = f.read(4) == b"PK\3\4"  # as torch decides it

    def unpickle(device):
        try:
            with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
                tensors = torch.load(path, map_location=device, weights_only=True, mmap=zipped and device == "cpu")
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]  # in the first of many torch gives its advice
            reason = next((line for line in lines if "unsupported" in line.lower()), lines[0])
            fail(f"{path}: refused or damaged ({reason[:150]}){pointer(path)}")
        if not isinstance(tensors, dict) or not all(
                isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout is torch.strided
                and not t.is_quantized for name, t in tensors.items()):
            fail(f"{path}: holds more than plain tensors by name")
        return {name: t.detach() for name, t in tensors.items() if not IGNORED.fullmatch(name)}

    kinds, tensors, read = {dtype: kind for kind, dtype in DTYPES.items()}, {}, 0

    def take(name, keep=False):
        if not tensors:
            tensors.update(unpickle("cpu"))
        return tensors[name] if keep else tensors.pop(name).float().contiguous()

    def pieces(name):
        nonlocal read
        if zipped and read > 16 << 20:
            tensors.clear()
            read = 0
        tensor = take(name, keep=True)
        read += tensor.nbytes
        return (piece.float() for piece in tensor.flatten().split(PIECE))

    return {name: Stored(tuple(t.shape), kinds.get(t.dtype, str(t.dtype)), partial(pieces, name),
                         None if zipped else partial(take, name)) for name, t in unpickle("meta").items()}


def files(path):
    """The files that a folder's or .gguf file's model is made of: those that this program takes it from, in order."""
    if os.path.isfile(path):
        return [path]
    there = {*os.listdir(path)}
    weights = next((name for whole in WEIGHTS for name in (whole, f"{whole}.index.json")
                    if os.path.isfile(os.path.join(path, name))), WEIGHTS[0])
    tokens = ["tokenizer.json"] if "tokenizer.json" in there else ["vocab.json", "merges.txt"]
    names = {"config.json", "tokenizer_config.json", weights, *tokens}
    if weights.endswith(".index.json"):
        names |= {*weight_map(os.path.join(path, weights)).values()}
    return [os.path.join(path, name) for name in sorted(names & there)]


def tokenizer_files(folder):
    """{name: contents} of the tokenizer's files that there are: JSON as values, merges.txt as text."""
    found = {name: read_json(os.path.join(folder, name)) for name in (
        "tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
        "generation_config.json")
        if os.path.isfile(os.path.join(folder, name))}
    merges = os.path.join(folder, "merges.txt")
    if os.path.isfile(merges):
        with open(merges, encoding="utf-8") as f:
            found["merges.txt"] = f.read(LARGEST_JSON)
    return found


# ---- a .gguf file

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
NAMES = {"block_count": "num_hidden_layers n_layer", "embedding_length": "hidden_size n_embd",
         "context_length": "max_position_embeddings n_positions", "feed_forward_length": "intermediate_size n_inner",
         "attention.head_count": "num_attention_heads n_head", "attention.head_count_kv": "num_key_value_heads -",
         "attention.key_length": "head_dim -", "rope.freq_base": "rope_theta -", "vocab_size": "vocab_size vocab_size",
         "attention.layer_norm_rms_epsilon": "rms_norm_eps -", "attention.layer_norm_epsilon": "- layer_norm_epsilon"}


def read_gguf(path):
    """-> metadata, {name: Stored}. Exits 2 where the file is not whole, or a count in it is absurd."""
    size, listed = os.path.getsize(path), 0
    with open(path, "rb") as f:
        def take(length):
            raw = f.read(length) if length <= min(size, 1 << 26) else b""
            if len(raw) < length:
                fail(f"{path}: cut short in its header, or damaged")
            return raw

        def numbers(kind, count):
            if kind not in SCALARS:
                fail(f"{path}: damaged: a value of kind {kind}")
            return struct.unpack(f"<{count}{SCALARS[kind]}", take(count * struct.calcsize(f"<{SCALARS[kind]}")))

        def number(layout):
            return struct.unpack(layout, take(struct.calcsize(layout)))[0]

        def string():
            return take(number("<Q")).decode("utf-8", "surrogateescape")

        def value(kind):
            nonlocal listed
            if kind == 8:
                return string()
            if kind == 9:
                kind, count = number("<I"), number("<Q")
                listed += count
                if kind == 9 or listed > 1 << 23:
                    fail(f"{path}: damaged: a list of {count} values of kind {kind}")
                if kind == 8:
                    return [string() for _ in range(count)]
                return list(numbers(kind, count))
            return numbers(kind, 1)[0]

        if f.read(4) != b"GGUF":
            fail(f"{path}: not a GGUF file{pointer(path)}")
        version, n_tensors, n_values = number("<I"), number("<Q"), number("<Q")
        if version not in (2, 3):
            fail(f"{path}: GGUF version {version}; 2 and 3, little-endian, are known here")
        if max(n_tensors, n_values) > 1 << 16:
            fail(f"{path}: damaged: {n_tensors} tensors and {n_values} values")
        metadata = unique([(string(), value(number("<I"))) for _ in range(n_values)])
        entries = []
        for _ in range(n_tensors):
            name, dimensions = string(), number("<I")
            if dimensions > 4:
                fail(f"{path}: damaged: {name[:80]} has {dimensions} dimensions")
            shape = [number("<Q") for _ in range(dimensions)][::-1]
            entries.append((name, shape, number("<I"), number("<Q")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            fail(f"{path}: general.alignment {str(alignment)[:40]}: must be a number above 0")
        begin = -(-f.tell() // alignment) * alignment
    stored, end = {}, 0
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        if kind not in TYPES:
            fail(f"{path}: {name[:80]} is stored as type {kind} of GGUF; known here: {', '.join(TYPES.values())}")
        count, block = BLOCKS[TYPES[kind]]
        if not shape or shape[-1] % count or name in stored or offset < end or offset % alignment:
            fail(f"{path}: damaged: {name[:80]} of shape {shape} at byte {offset}")
        end = offset + math.prod(shape) // count * block
        stored[name] = in_file(path, TYPES[kind], shape, begin + offset)
    if begin + end > size:
        fail(f"{path}: has {size} bytes, its header tells of {begin + end}: cut short")
    return metadata, {name: stored[name] for name, *_ in entries}


def of_gguf(metadata, tied, path):
    """GGUF's metadata -> Values under config.json's names. A size that is not known here could change the function."""
    family = metadata.get("general.architecture")
    values, shown = {"model_type": family}, {"model_type": "general.architecture"}
    if family not in ("gpt2", "llama", "qwen2", "qwen3"):
        return Values(values, path, shown)
    harmless = {"rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.finetuned"}
    for key, value in metadata.items():
        short = key.removeprefix(f"{family}.")
        if short == key or short in harmless:
            continue
        if short not in NAMES:
            fail(f"{path}: {key} {str(value)[:60]}: not known here, it could change the model's function")
        name = NAMES[short].split()[family == "gpt2"]
        values[name] = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999975e-06
    shown |= {names.split()[family == "gpt2"]: f"{family}.{short}" for short, names in NAMES.items()}
    tokens = metadata.get("tokenizer.ggml.tokens")
    values.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    if family != "gpt2":
        whole = Values(values, path, shown)
        size = values.setdefault("head_dim", whole.number("hidden_size") // whole.number("num_attention_heads"))
        for key, accepted in (("rope.dimension_count", size), ("attention.value_length", size),
                              ("rope.scaling.type", "none")):
            if metadata.get(f"{family}.{key}", accepted) != accepted:
                fail(f"{path}: {family}.{key} {metadata[f'{family}.{key}']}: must be {accepted}")
        values.setdefault("num_key_value_heads", None)
        values["tie_word_embeddings"] = tied
    Values(values, path, shown).number("layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps", kind=float)
    return Values(values, path, shown)


if __name__ == "__main__":
    from minirlhf.export import main
    launch(main)
