"""Other programs' models: folders that transformers wrote, GGUF files, and what must be refused."""
import io
import json
import os
import pickle
import shutil
import struct
from functools import partial

import numpy as np
import pytest
import torch

from conftest import LLAMA
import train_ppo
import train_rm
import train_sft
from minirlhf import checkpoint, evaluate, fetch, pretrained, sample
from minirlhf.model import GPT, GPTConfig
from minirlhf.pretrained import widen
from minirlhf.tokenizer import BYTE_OF
from test_fuzz import attempt, case, cases, mutated, mutated_value

GPT2_CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 13, "n_positions": 32}
KINDS = {"gpt2": {}, "llama": {**LLAMA, "qkv_bias": False, "qk_norm": False, "n_inner": 32},
         "qwen2": {**LLAMA, "qk_norm": False, "tied": True}, "qwen3": {**LLAMA, "qkv_bias": False}}


def config_of(kind, model):
    """What transformers would write of this model."""
    c = model.config
    if kind == "gpt2":
        return GPT2_CONFIG | {"activation_function": "gelu_new", "n_inner": None, "layer_norm_epsilon": 1e-05}
    return {"model_type": kind, "vocab_size": c.vocab_size, "hidden_size": c.n_embd, "intermediate_size": c.n_inner,
            "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
            "head_dim": c.head_size, "hidden_act": "silu", "max_position_embeddings": c.block_size,
            "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tied}


def tensors_of(model, gguf=False):
    """The model's weights under the names, and as the matrices, of a folder or of GGUF: {name: tensor}."""
    c, out = model.config, {}
    for name, tensor in model.state_dict().items():
        if name in ("gain", "bias", "score_head.bias"):  # which others do not have
            continue
        parts = pretrained.their_names(name, c, gguf)
        sizes = pretrained.rows_of(name, c, len(parts))
        for part, rows in zip(parts, tensor.split(sizes) if len(parts) > 1 else [tensor]):
            if gguf and c.family == "llama" and not c.qkv_bias and not c.qk_norm and part.endswith(
                    ("attn_q.weight", "attn_k.weight")):  # rows i and i + D/2 of a head become neighbours
                rows = rows.view(-1, 2, c.head_size // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
            elif not gguf and c.family == "gpt2":
                rows = rows.T if part.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else rows
                part = part if part.startswith("score") else f"transformer.{part}"
            elif not gguf:
                part = part if part.startswith(("lm_head", "score")) else f"model.{part}"
            out[part] = rows.contiguous()
    return out


def safetensors(tensors, **header):
    """The file's bytes."""
    at, body, entries = 0, b"", {}
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [at, at + len(raw)]}
        at, body = at + len(raw), body + raw
    head = json.dumps(entries | header).encode()
    return struct.pack("<Q", len(head)) + head + body


def quantised(tensor, kind):
    """Blocks of 32 numbers as GGUF stores them -> bytes."""
    if kind == "F32":
        return tensor.numpy().tobytes()
    x = tensor.numpy().astype(np.float32).reshape(-1, 32)
    if kind in ("F16", "BF16"):
        return tensor.to(torch.float16 if kind == "F16" else torch.bfloat16).view(torch.uint8).numpy().tobytes()
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    top = np.abs(x).max(1, keepdims=True)
    d = {"Q8_0": top / 127, "Q4_0": top / 7, "Q4_1": (high - low) / 15}[kind].astype(np.float16)
    scales = np.concatenate([d, low.astype(np.float16)], 1) if kind == "Q4_1" else d
    shift = {"Q8_0": 0, "Q4_0": -8, "Q4_1": low}[kind]
    q = np.round((x - (low if kind == "Q4_1" else 0)) / np.maximum(d.astype(np.float32), 1e-9)) - (
        shift if kind == "Q4_0" else 0)
    if kind == "Q8_0":
        packed = q.astype(np.int8).view(np.uint8)
    else:
        q = q.clip(0, 15).astype(np.uint8)
        packed = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([scales.view(np.uint8), packed], 1).tobytes()


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    kind = {bool: 7, int: 4, float: 6, str: 8, list: 9}[type(value)]
    if kind == 9 and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    body = (struct.pack("<IQ", 8, len(value)) + b"".join(map(gguf_text, value)) if kind == 9 else gguf_text(value)
            if kind == 8 else struct.pack({7: "<?", 4: "<I", 6: "<f"}[kind], value))
    return struct.pack("<I", kind) + body


def gguf(kind, model, numbers="F32", **changes):
    """The file's bytes; vectors are F32."""
    c = model.config
    sizes = {"block_count": c.n_layer, "context_length": c.block_size, "embedding_length": c.n_embd,
             "feed_forward_length": c.n_inner, "attention.head_count": c.n_head, "vocab_size": c.vocab_size}
    sizes |= {"attention.layer_norm_epsilon": 1e-5} if kind == "gpt2" else {
        "attention.head_count_kv": c.n_kv_head, "attention.key_length": c.head_size, "rope.freq_base": c.rope_theta,
        "attention.value_length": c.head_size, "attention.layer_norm_rms_epsilon": c.norm_eps}
    metadata = {"general.architecture": kind, **{f"{kind}.{k}": v for k, v in sizes.items()},
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(c.vocab_size)]}
    metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
    infos, body = b"", b""
    tensors = tensors_of(model, gguf=True)
    for name, tensor in tensors.items():
        own = "F32" if tensor.dim() == 1 or tensor.shape[-1] % 32 else numbers
        code = {name: code for code, name in pretrained.TYPES.items()}[own]
        shape = tensor.shape[::-1]
        infos += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, len(body))
        body += quantised(tensor, own)
        body += bytes(-len(body) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(
        gguf_text(k) + gguf_value(v) for k, v in metadata.items()) + infos
    return head + bytes(-len(head) % 32) + body


@pytest.fixture
def folder(tmp_path, make_model):
    """folder(kind, head="lm", config changes...) -> the path of a model's folder, and the model."""
    def make(kind="gpt2", head="lm", tensors=None, **changes):
        model = make_model(head, **KINDS[kind])
        if head == "scalar":  # theirs has no bias
            model.score_head.bias.data.zero_()
        config = {k: v for k, v in (config_of(kind, model) | changes).items() if v != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        named = tensors_of(model)
        (tmp_path / "model.safetensors").write_bytes(safetensors(tensors(named) if tensors else named))
        return str(tmp_path), model
    return make


def check(loaded, model):
    """The same sizes and weights, to the last bit."""
    assert loaded.config == model.config and loaded.head == model.head and not loaded.training
    own = model.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


# Models that are taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards", "old bin"])
def test_a_folder_comes_in(folder, kind, form):
    """Whole or in shards, as safetensors or pickles: the same weights."""
    path, model = folder(kind)
    tensors = tensors_of(model)
    name = "pytorch_model.bin" if "bin" in form else "model.safetensors"

    def write(file, part):
        if "bin" in form:
            torch.save(part, os.path.join(path, file), _use_new_zipfile_serialization=form != "old bin")
        else:
            with open(os.path.join(path, file), "wb") as f:
                f.write(safetensors(part, __metadata__={"format": "pt"}))

    os.remove(os.path.join(path, "model.safetensors"))
    if "shards" in form:
        names = [*tensors]
        where = {n: f"part-{i % 3}" for i, n in enumerate(names)}
        for i in range(3):
            write(f"part-{i}", {n: tensors[n] for n in names[i::3]})
        with open(os.path.join(path, f"{name}.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": 1}, "weight_map": where}, f)
    else:
        write(name, tensors)
    loaded, _, info = pretrained.load(path)
    check(loaded, model)
    assert info["model_type"] == kind and info["context"] == 32 and info["kinds"] == ["F32"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_output_of_its_own_is_what_a_missing_key_means(folder, kind):
    """transformers' classes tie none of these families' outputs unless they are told to."""
    path, model = folder(kind, tie_word_embeddings="absent")
    assert not model.config.tied
    check(pretrained.load(path)[0], model)


def test_half_precision_is_widened(folder):
    """bfloat16 and float16 numbers are float32's too."""
    for dtype in (torch.bfloat16, torch.float16):
        path, model = folder("llama", tensors=lambda named: {k: v.to(dtype) for k, v in named.items()})
        loaded, _, info = pretrained.load(path)
        assert info["kinds"] == ["BF16" if dtype == torch.bfloat16 else "F16"]
        assert all(torch.equal(p, q.to(dtype).float()) for p, q in zip(loaded.parameters(), model.parameters()))


@pytest.mark.parametrize("place", [("rope_theta",), ("rope_parameters", "rope_scaling"), ("rope_scaling",),
                                   ("rope_theta", "rope_scaling")])
def test_where_a_rotation_s_speed_is_named(folder, place):
    """At the top, as the newest transformers, or as older ones: the model's own, 50, not the default of 10,000."""
    own = {"rope_theta": 50.0}
    path, model = folder("llama", **{"rope_theta": "absent"} | {
        name: 50.0 if name == "rope_theta" else {"rope_type": "default", **own} for name in place})
    assert model.config.rope_theta == 50.0
    check(pretrained.load(path)[0], model)


def test_heads_of_their_own_size(refused):
    """head_dim need not be hidden_size / num_attention_heads, nor that a whole or even number."""
    config = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9,
              "max_position_embeddings": 8, "intermediate_size": 8}

    def sizes(**more):
        return pretrained.sizes(pretrained.Values(config | more, "config.json"))

    assert [sizes(hidden_size=size, head_dim=6).head_size for size in (16, 18, 20)] == [6, 6, 6]
    assert "head_dim 5: heads of 5: the size must be even" in refused(sizes, hidden_size=16, head_dim=5)
    assert "hidden_size 20: heads of 5" in refused(sizes, hidden_size=20)
    assert "num_attention_heads 4: must divide hidden_size, 18" in refused(sizes, hidden_size=18)


def test_rotations_at_two_speeds(refused):
    """Also where one of them is the usual one."""
    for one, other in ((10000.0, 50.0), (50.0, 10000.0)):
        config = {"model_type": "llama", "rope_theta": one, "rope_parameters": {"rope_theta": other}}
        values = pretrained.Values(config, "config.json")
        assert "rope_parameters.rope_theta" in refused(pretrained.sizes, values)


def test_what_is_no_parameter_stands_in_an_index(folder):
    """Of a pickle's shards, as older versions of transformers left it."""
    path, model = folder("llama")
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(3) for n in range(2)}
    tensors = tensors_of(model) | extra | {"model.rotary_emb.inv_freq": torch.ones(3)}
    os.remove(os.path.join(path, "model.safetensors"))
    for i in range(2):
        torch.save({n: tensors[n] for n in [*tensors][i::2]}, os.path.join(path, f"part-{i}"))
    with open(os.path.join(path, "pytorch_model.bin.index.json"), "w") as f:
        json.dump({"weight_map": {n: f"part-{i % 2}" for i, n in enumerate(tensors)}}, f)
    check(pretrained.load(path)[0], model)


def test_a_classifier_s_padding(folder):
    """A last row of zeros for padding is no token of a text; where it is eos, too, it is one."""
    def change(named):
        named["model.embed_tokens.weight"][-1] = 0
        return named

    path, model = folder("llama", "scalar", change, pad_token_id=12, eos_token_id=11)
    assert pretrained.load(path)[0].config.vocab_size == 12
    for eos in (12, [11, 12]):
        path, model = folder("llama", "scalar", change, pad_token_id=12, eos_token_id=eos)
        assert pretrained.load(path)[0].config.vocab_size == 13


def test_what_is_no_parameter_is_left_out(folder):
    """Masks among GPT-2's weights, whatever they hold, and a copy of the embedding as the output; names without the
    class's prefix."""
    def change(named):
        named = {k.removeprefix("transformer."): v for k, v in named.items()}
        mask = torch.full((1, 1, 4, 4), torch.nan, dtype=torch.float64)
        return named | {"h.0.attn.bias": mask, "h.1.attn.masked_bias": mask, "lm_head.weight": named["wte.weight"]}

    path, model = folder(tensors=change)
    check(pretrained.load(path)[0], model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_with_one_label_comes_in(folder, refused, kind):
    """As a reward model whose score has no bias and the scale 1; it is not taken where a language model is wanted."""
    path, model = folder(kind, "scalar")
    check(pretrained.load(path, "scalar")[0], model)
    assert "a sequence classifier, expected a language model" in refused(pretrained.load, path, "lm")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2ForSequenceClassification", "LlamaForCausalLM",
                                  "LlamaForSequenceClassification", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_gives_the_same_logits(tmp_path, name, tied):
    """Random models, weights scaled up, saved by transformers itself."""
    transformers = pytest.importorskip("transformers")
    family, what = name.split("For")[0].replace("LMHeadModel", ""), "Classification" in name
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=32) if family == "GPT2" else dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    if family == "Qwen3":
        sizes["head_dim"] = 6
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(
        vocab_size=13, pad_token_id=12, bos_token_id=0, eos_token_id=0, **sizes, **({"num_labels": 1} if what else {})))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.4)
    model.eval().save_pretrained(tmp_path)
    tokens = torch.randint(12, (3, 9))
    loaded, _, _ = pretrained.load(str(tmp_path))
    with torch.no_grad():
        expected = model(tokens).logits
        found = loaded.score(tokens, torch.tensor([9, 9, 9]))[:, None] if what else loaded(tokens)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_transformers_reads_the_same_from_gguf(tmp_path, make_model, kind):
    """Its own reader, which does not read the size of heads or GPT-2's context, gives the logits that ours gives."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    usual = {"n_embd": 32, "block_size": 1024} | ({} if kind == "gpt2" else {"head_size": 8})
    model = make_model(**KINDS[kind] | usual)
    (tmp_path / "x.gguf").write_bytes(gguf(kind, model, "Q8_0"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").eval()
    tokens = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(pretrained.load(str(tmp_path / "x.gguf"))[0](tokens), theirs(tokens).logits,
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_shorter_context(folder, refused, kind):
    """--block_size: the model is the same on what fits; a longer one than the model's own is refused."""
    path, model = folder(kind)
    loaded, _, _ = pretrained.load(path, block_size=7)
    tokens = torch.arange(7)[None]
    assert loaded.config.block_size == 7 and torch.equal(loaded(tokens), model(tokens))
    error = refused(pretrained.load, path, block_size=33)
    assert "--block_size 33" in error and "32" in error


@pytest.mark.parametrize("numbers", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_comes_in(tmp_path, make_model, kind, numbers):
    """F32: the same weights, Llama's rows of queries and keys put back in order. Fewer bits: as near as these are."""
    model = make_model(**KINDS[kind], n_embd=32)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(kind, model, numbers))
    loaded, tokenizer, info = pretrained.load(str(path))
    assert tokenizer["tokenizer.ggml.model"] == "gpt2" and len(tokenizer["tokenizer.ggml.tokens"]) == 13
    if numbers == "F32":
        check(loaded, model)
    step = {"F32": 0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 0.01, "Q4_0": 0.16, "Q4_1": 0.1}[numbers]
    for (name, p), q in zip(loaded.named_parameters(), model.parameters()):
        assert (p - q).abs().max() <= step * max(1, q.abs().max()), name
    assert numbers in info["kinds"]


def test_blocks_by_hand():
    """d = 2, q = 1, 2, 3, ...: d q in Q8_0, d (q - 8) in Q4_0, d q + m in Q4_1, low halves of bytes first."""
    two, three = np.float16(2).tobytes(), np.float16(3).tobytes()
    q8 = widen(two + bytes([1, 2, 255] + [0] * 29), "Q8_0")
    assert q8.tolist() == [2, 4, -2] + [0] * 29
    nibbles = bytes([0x21, 0x8f] + [0x88] * 14)
    assert widen(two + nibbles, "Q4_0").tolist() == [-14, 14] + [0] * 14 + [-12] + [0] * 15
    assert widen(two + three + nibbles, "Q4_1").tolist() == [5, 33] + [19] * 14 + [7] + [19] * 15
    assert widen(struct.pack("<2f", 1.5, -2), "F32").tolist() == [1.5, -2]
    assert widen(bytes([0, 0x3e]), "F16").tolist() == [1.5] and widen(bytes([0xc0, 0x3f]), "BF16").tolist() == [1.5]


# Models that are refused


@pytest.mark.parametrize("kind, key, value, reason", [
    ("gpt2", "activation_function", "gelu", "erf"), ("gpt2", "activation_function", "relu", "gelu_new"),
    ("gpt2", "n_inner", 48, "64"), ("gpt2", "layer_norm_epsilon", 1e-6, "1e-05"),
    ("gpt2", "scale_attn_weights", False, "sqrt(D)"), ("gpt2", "scale_attn_by_inverse_layer_idx", True, "layer"),
    ("gpt2", "add_cross_attention", True, "attend"), ("gpt2", "pruned_heads", {"0": [1]}, "heads"),
    ("gpt2", "tie_word_embeddings", False, "embedding"), ("gpt2", "quantization_config", {"bits": 4}, "packed"),
    ("gpt2", "auto_map", {"AutoModel": "x.Y"}, "code"), ("gpt2", "attn_mult", 2.0, "muP"),
    ("gpt2", "mup_scale", 2.0, "muP"), ("gpt2", "model_type", "gpt_neo", "local windows"),
    ("gpt2", "model_type", "bert", "not known"), ("gpt2", "model_type", None, "not known"),
    ("gpt2", "n_head", 3, "no multiple"), ("gpt2", "n_head", "2", "number"), ("gpt2", "n_layer", True, "number"),
    ("gpt2", "n_layer", 10 ** 9, "tensors"), ("gpt2", "n_embd", 10 ** 12, ""), ("gpt2", "hidden_size", 32, "differs"),
    ("gpt2", "vocab_size", 14, "(13, 16), not (14, 16)"), ("gpt2", "n_positions", "absent", "lacks n_positions"),
    ("llama", "hidden_act", "gelu", "silu"), ("llama", "attention_bias", True, "biases"),
    ("llama", "mlp_bias", True, "biases"), ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "unscaled"),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "unscaled"),
    ("llama", "rope_parameters", {"rope_type": "yarn", "rope_theta": 50.0}, "unscaled"),
    ("llama", "rope_parameters", {"rope_theta": 51.0}, "51"), ("llama", "rope_scaling", {"rope_theta": 51.0}, "51"),
    ("llama", "rope_scaling", 3, "unscaled"), ("llama", "is_causal", False, "follow"),
    ("gpt2", "is_causal", False, "follow"), ("gpt2", "score_bias", 1e308, "float32"),
    ("gpt2", "score_bias", 10 ** 400, "float32"),
    ("gpt2", "n_embd", 10 ** 30, "too large"), ("qwen2", "num_key_value_heads", "absent", "no multiple"),
    ("llama", "partial_rotary_factor", 0.5, "rotated"),
    ("qwen2", "use_sliding_window", True, "all"), ("qwen3", "layer_types", ["sliding_attention"] * 2, "full_attention"),
    ("llama", "num_local_experts", 8, "experts"), ("llama", "rope_theta", 0, "above 0"),
    ("llama", "rms_norm_eps", float("nan"), "above 0"), ("llama", "num_key_value_heads", 3, "multiple"),
    ("llama", "head_dim", 5, "even"), ("llama", "tie_word_embeddings", 1, "true or false"),
    ("llama", "num_key_value_heads", 4, "(12, 16), not (24, 16)"), ("llama", "model_type", "mistral", "window"),
    ("qwen3", "model_type", "llama", "q_norm"), ("qwen2", "model_type", "llama", "q_proj.bias"),
])
def test_a_config_that_is_not_computed_exactly(folder, refused, kind, key, value, reason):
    """Key, value and reason in one line."""
    path, _ = folder(kind, **{key: value})
    error = refused(pretrained.load, path)
    assert path in error and reason in error, error
    if reason not in ("", "tensors", "no multiple", "multiple", "even", "q_norm", "q_proj.bias", "lacks n_positions"):
        assert str(value)[:5].strip("({") in error or "shape" in error or "rope_parameters" in error or value in (
            None, True, False) or isinstance(value, (dict, list, float)), error


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("transformer.wpe.weight"), ["lacks wpe.weight"]),
    (lambda t: t.update({"v_head.summary.weight": torch.zeros(1, 16)}), ["v_head.summary.weight", "TRL"]),
    (lambda t: t.update({"extra": torch.zeros(2)}), ["extra is not a part"]),
    (lambda t: t.update({"lm_head.weight": torch.zeros(13, 16)}), ["lm_head.weight differs from wte.weight"]),
    (lambda t: t.update({"wte.weight": torch.zeros(13, 16)}), ["wte.weight twice"]),
    (lambda t: t["transformer.ln_f.bias"].fill_(torch.inf), ["ln_f.bias", "not finite"]),
    (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(17)}), ["ln_f.bias has shape (17,), not (16,)"]),
    (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16).double()}), ["ln_f.bias", "F64"]),
    (lambda t: t.update({"score.weight": torch.zeros(2, 16)}), ["score.weight", "(2, 16)", "one label"]),
    (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}), ["(64, 16), not (16, 64)"]),
])
def test_tensors_that_do_not_fit(folder, refused, change, words):
    path, _ = folder(tensors=lambda named: [change(named), named][1])
    error = refused(pretrained.load, path)
    assert path in error and all(word in error for word in words), error


def test_layers_without_tensors_cost_nothing(folder, refused):
    """A thousand layers need nine thousand tensors: as many empty ones of other names are no reason to make them."""
    path, _ = folder(tensors=lambda named: named | {f"x.{n}": torch.zeros(0) for n in range(1000)}, n_layer=1000)
    assert "1000 layers of 1028 tensors" in refused(pretrained.load, path)


@pytest.mark.parametrize("spoil, words", [
    (lambda raw: raw[:-1], ["cut short"]), (lambda raw: raw + b"\0", ["cut short"]), (lambda raw: b"", ["not a whole"]),
    (lambda raw: b"version git-lfs/spec/v1\noid sha256:0\n", ["Git LFS pointer"]),
    (lambda raw: struct.pack("<Q", 1 << 40) + raw[8:], ["not a whole"]),
    (lambda raw: raw[:8] + b"x" + raw[9:], ["not JSON"]), (lambda raw: raw.replace(b"[16]", b"[17]", 1), ["bytes"]),
    (lambda raw: raw.replace(b'"data_offsets"', b'"data_offsetz"', 1), ["does not say where"]),
    (lambda raw: raw.replace(b"h.0.ln_1.bias", b"h.1.ln_1.bias", 1), ["twice"]),
])
def test_a_safetensors_file_that_is_not_whole(folder, refused, spoil, words):
    path, _ = folder()
    file = os.path.join(path, "model.safetensors")
    with open(file, "rb") as f:
        raw = f.read()
    with open(file, "wb") as f:
        f.write(spoil(raw))
    error = refused(pretrained.load, path)
    assert file in error and all(word in error for word in words), error


@pytest.mark.parametrize("changes, words", [
    ({"llama.expert_count": 4}, ["llama.expert_count 4"]), ({"general.architecture": "gemma"}, ["gemma"]),
    ({"llama.rope.scaling.type": "yarn"}, ["yarn", "none"]), ({"llama.rope.dimension_count": 4}, ["4", "6"]),
    ({"llama.block_count": None}, ["lacks llama.block_count"]), ({"llama.block_count": 3}, ["lacks blk.2."]),
    ({"llama.attention.head_count": "4"}, ['llama.attention.head_count "4"']),
    ({"general.alignment": 0}, ["alignment"]),
    ({"llama.attention.layer_norm_rms_epsilon": None}, ["lacks llama.attention.layer_norm_rms_epsilon"]),
    ({"llama.block_count": 1000}, ["1000 layers of 21 tensors"]),
    ({"llama.attention.value_length": 8}, ["value_length 8"]),
    ({"llama.vocab_size": 14}, ["(13, 16), not (14, 16)"]),
])
def test_metadata_that_is_not_computed_exactly(tmp_path, make_model, refused, changes, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf("llama", make_model(**KINDS["llama"]), **changes))
    error = refused(pretrained.load, str(path))
    assert str(path) in error and all(word in error for word in words), error


# Anything else


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{kind: (bytes of config.json, safetensors, pickle, GGUF)} of small models, and these models."""
    made = {}
    for seed, kind in enumerate(KINDS):
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 5, "block_size": 8} | KINDS[kind]
        model = GPT(GPTConfig(**shape)).init_weights(torch.Generator().manual_seed(seed)).eval()
        pickled = io.BytesIO()
        torch.save(tensors_of(model), pickled)
        config = config_of(kind, model) | ({"n_layer": 1, "n_embd": 8, "vocab_size": 5, "n_positions": 8}
                                           if kind == "gpt2" else {})
        made[kind] = model, config, safetensors(tensors_of(model)), pickled.getvalue(), gguf(kind, model)
    return made


def attempt_to_load(path, model):
    """A clear refusal, or a model of finite weights of the shapes that were there."""
    loaded, error = attempt(pretrained.load, str(path))
    if loaded is None:
        assert str(path) in error
        return None
    own = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert {name: tensor.numel() for name, tensor in loaded[0].state_dict().items()} == own
    assert all(p.isfinite().all() for p in loaded[0].parameters())
    return loaded[0]


@cases(200, 20_000)
def test_any_bytes(numbers, tmp_path, whole):
    """Weights and GGUF files in which some bytes differ: refused in a line, or read as a model of the same shapes."""
    files = {2: "model.safetensors", 3: "pytorch_model.bin"}
    for number in numbers:
        with case(number) as rng:
            kind, which = rng.choice([*KINDS]), rng.randrange(2, 5)
            model, config, *_ = whole[kind]
            content = whole[kind][which]
            if rng.random() < 0.6:  # where it says what is where
                at = len(content) // 3
                content = mutated(rng, content[:at]) + content[at:]
            else:
                content = mutated(rng, content)
            path = tmp_path / f"{number}.gguf" if which == 4 else tmp_path / str(number)
            if which != 4:
                path.mkdir()
                (path / "config.json").write_text(json.dumps(config))
            (path if which == 4 else path / files[which]).write_bytes(content)
            attempt_to_load(path, model)
            shutil.rmtree(path) if which != 4 else path.unlink()


@cases(200, 20_000)
def test_any_values(numbers, tmp_path, whole):
    """Configs, indexes and headers in which a value is another, missing or doubled: refused, or the same weights."""
    for number in numbers:
        with case(number) as rng:
            kind = rng.choice([*KINDS])
            model, config, content, *_ = whole[kind]
            where = rng.randrange(3)
            length = int.from_bytes(content[:8], "little")
            header, body = json.loads(content[8:8 + length]), content[8 + length:]
            index = {"weight_map": dict.fromkeys(header, "a.bin")}
            if where == 0:
                config = mutated_value(rng, config)
            elif where == 1:
                header = mutated_value(rng, header)
            elif where == 2:
                index = mutated_value(rng, index)
            path = tmp_path / str(number)
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config, default=str))
            head = json.dumps(header, default=str).encode()
            (path / ("a.bin" if where == 2 else "model.safetensors")).write_bytes(
                struct.pack("<Q", len(head)) + head + body)
            if where == 2:
                (path / "model.safetensors.index.json").write_text(json.dumps(index, default=str))
            loaded = attempt_to_load(path, model)
            if loaded is not None:
                own = model.state_dict()
                assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
            shutil.rmtree(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content, words", [
    ({"transformer.wte.weight": Trap()}, ["refused or damaged"]), ([1], ["more than plain tensors"]),
    ({"transformer.wte.weight": 3}, ["more than plain tensors"]), ({7: torch.zeros(1)}, ["more than plain tensors"]),
    ({"transformer.wte.weight": torch.zeros(13, 16).to_sparse()}, ["more than plain tensors"]),
    ({"transformer.wte.weight": torch.zeros(13, 16, dtype=torch.int64)}, ["2 layers of 1 tensors"]),
])
def test_a_pickle_that_holds_something_else(folder, refused, tmp_path, monkeypatch, content, words):
    """Code is not run, whichever protocol it comes in; what is no tensor is not taken for one."""
    monkeypatch.chdir(tmp_path)
    path, _ = folder()
    os.remove(os.path.join(path, "model.safetensors"))
    for write in (lambda file: torch.save(content, file), lambda file: file.write(pickle.dumps(content, 4))):
        with open(os.path.join(path, "pytorch_model.bin"), "wb") as f:
            write(f)
        error = refused(pretrained.load, path)
        assert path in error and (words[0] in error or "refused or damaged" in error)
        assert not os.path.exists("trapped")


def test_what_a_pickle_would_call_is_named(folder, refused):
    path, _ = folder()
    os.remove(os.path.join(path, "model.safetensors"))
    torch.save({"transformer.wte.weight": Trap()}, os.path.join(path, "pytorch_model.bin"))
    assert "unsupported GLOBAL posix.mkdir" in refused(pretrained.load, path)


def test_what_cannot_be_read_is_named(folder, refused, tmp_path):
    """No folder, no weights, a folder in a file's place."""
    assert "nothing/config.json" in refused(pretrained.load, str(tmp_path / "nothing"))
    path, _ = folder()
    os.remove(os.path.join(path, "model.safetensors"))
    assert "holds neither model.safetensors nor pytorch_model.bin" in refused(pretrained.load, path)
    os.mkdir(os.path.join(path, "merges.txt")), os.mkdir(os.path.join(path, "pytorch_model.bin"))
    assert "holds neither" in refused(pretrained.load, path)


def test_a_folder_of_ours_is_not_another_program_s(tmp_path, folder):
    """A run's config.json holds its stage."""
    assert pretrained.is_foreign(folder()[0]) and pretrained.is_foreign("x.gguf")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "sft", "seed": 1}))
    assert not pretrained.is_foreign(str(tmp_path)) and not pretrained.is_foreign(str(tmp_path / "nothing"))


# ---- where a model is named


@pytest.fixture
def speaker(folder, tmp_path, monkeypatch):
    """A folder with a model of the Llama family and a tokenizer of all bytes, and a data folder."""
    monkeypatch.setitem(KINDS, "llama", KINDS["llama"] | {"vocab_size": 259})
    path, model = folder("llama")
    letters = {letter: i for i, letter in enumerate(BYTE_OF)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": 258, "content": "<|endoftext|>"}], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": letters | {"th": 256, "the": 257}, "merges": ["t h", "th e"]}}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "data").mkdir()
    rows = {"sft": {"prompt": "the", "completion": " cat"}, "prompts": {"prompt": "the"},
            "preferences": {"prompt": "the", "chosen": " cat", "rejected": " dog"}}
    for name, row in rows.items():
        for split in ("train", "val"):
            (tmp_path / "data" / f"{name}.{split}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return str(path), model


def test_a_model_of_another_program_goes_through_all_stages(speaker, tmp_path, monkeypatch, capsys):
    """--init_from of each stage, sample and evaluate take it as they take an SFT model; what is trained is a checkpoint
    like any other, which resumes; --block_size shortens the context."""
    path, model = speaker
    monkeypatch.chdir(tmp_path)
    for share in (0.3, 0.0):
        loaded, _, _ = checkpoint.load(path, ["sft"], "cpu", share)
        assert {part.dropout for part in loaded.modules() if hasattr(part, "dropout")} == {share}
        assert loaded.config.dropout == share
    run = ["--data_dir", "data", "--device", "cpu", "--response_length", "4", "--batch_size", "4"]
    train_sft.main(["--init_from", path, "--out_dir", "out/sft", "--block_size", "16", *run])
    train_sft.main(["--resume", "--out_dir", "out/sft"])
    assert "this run is finished" in capsys.readouterr().out
    trained, tokenizer, payload = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))
    assert trained.config.family == "llama" and trained.config.block_size == 16 < model.config.block_size
    assert tokenizer.encode("the") == [257] and payload["options"]["init_from"] == path
    train_sft.main(["--init_from", path, "--out_dir", "out/long", *run])
    train_rm.main(["--init_from", path, "--out_dir", "out/rm", "--num_scale_samples", "4", *run])
    train_ppo.main(["--init_from", "out/long", "--reference", path, "--reward_model", "out/rm", "--out_dir", "out/ppo",
                    "--total_episodes", "8", "--value_warmup", "0", *run])
    sample.main([path, "out/ppo", "out/rm", "--prompt", "the", "--response_length", "4"])
    evaluate.main(["out/ppo", "--baseline", path, "--reward_model", "out/rm", "--prompts", "data/prompts.val.jsonl"])
    assert f"{path} " in capsys.readouterr().out


def test_what_is_named_must_be_of_the_right_kind(speaker, refused, tmp_path, monkeypatch):
    """A classifier is no SFT model, a language model no reward model, a size cannot be chosen, no file no model; a model
    of another size than its tokenizer is refused."""
    path, _ = speaker
    load = partial(checkpoint.load, device=torch.device("cpu"))
    assert "holds a language model, expected a sequence classifier" in refused(load, path, ["rm"])
    monkeypatch.chdir(tmp_path)
    base = ["--data_dir", "data", "--device", "cpu", "--init_from", path]
    assert f"--n_layer 5: {path} has " in refused(train_sft.main, [*base, "--n_layer", "5"])
    assert "--block_size 999: " in refused(train_sft.main, [*base, "--block_size", "999"])
    monkeypatch.setattr(fetch, "smollm2", lambda: path)
    assert load("smollm2", ["sft"])[2]["stage"] == "sft" and path in checkpoint.files_of("smollm2")[0]
    (tmp_path / "smollm2").mkdir()
    assert load("smollm2", ["sft"])[2]["stage"] == "sft"  # which is no model
    (tmp_path / "smollm2" / "ckpt.pt").write_text("x")
    assert "smollm2/ckpt.pt: not a checkpoint" in refused(load, "./smollm2", ["sft"])
