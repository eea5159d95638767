"""The network against a naive second implementation, against itself with other kernels, and against leaks."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import LLAMA, ROOT, both_families
from minirlhf import kernels
from minirlhf.kernels import CAN_PACK, packed
from minirlhf.model import GPT, Attention, GPTConfig, flat_indices

LENGTHS = torch.tensor([9, 3, 6, 1])


def ragged_tokens(vocab_size=13, seed=0):
    """(4, 9) tokens, and True at the real ones."""
    tokens = torch.randint(vocab_size, (4, 9), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(9) < LENGTHS[:, None]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Leaks


@both_families
def test_the_future_is_unseen(make_model, shape):
    """Another token at place t changes the logits at t and after, and not one bit before."""
    model, (tokens, _) = make_model(**shape), ragged_tokens()
    logits = model(tokens)
    for t in range(1, 9):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 13
        changed = (model(other) != logits).any(-1)
        assert not changed[:, :t].any() and changed[:, t:].all()


@both_families
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_padding_on_the_right_changes_nothing(make_model, head, shape):
    """Whatever stands in the padding, real tokens' outputs and all gradients are the same; a row is as if alone."""
    model, (tokens, real) = make_model(head, **shape), ragged_tokens()
    seen = []
    for filler in (0, 5, 12):
        model.zero_grad()
        out = model(tokens.masked_fill(~real, filler))[real]
        out.pow(2).sum().backward()
        seen.append((out.detach(), gradients(model)))
    for out, grads in seen[1:]:
        torch.testing.assert_close(out, seen[0][0])
        torch.testing.assert_close(grads, seen[0][1], rtol=1e-4, atol=1e-3)  # gradients here are of size 100
    alone = torch.cat([model(row[None, :n])[0] for row, n in zip(tokens, LENGTHS)])
    torch.testing.assert_close(seen[0][0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", ["causal", "slots"])
def test_explicit_attention_equals_the_fused_kernel(masked):
    """Values and gradients of the matmuls written out are those of F.scaled_dot_product_attention."""
    torch.manual_seed(0)
    attention = Attention(GPTConfig(1, 2, 16, 13, 32))
    x = 3 * torch.randn(3, 7, 16)
    if masked == "causal":  # rows of T slots; without a mask the fused kernel is asked for causal attention
        unseen, extend = torch.ones(7, 7, dtype=torch.bool).triu(1)[None, None], None
    else:  # each row has its own visible slots, in a cache of 11
        slots, at = torch.arange(11), torch.tensor([0, 4, 2])[:, None] + torch.arange(7)
        unseen, extra = slots > at[:, None, :, None], torch.randn(3, 2, 4, 8)
        extend = lambda k, v: (torch.cat([extra, k], 2), torch.cat([v, extra], 2))  # noqa: E731
    mask = torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)
    ours = attention(x, mask, extend)
    ours.pow(2).sum().backward()
    grads = gradients(attention)
    attention.zero_grad()
    if masked == "causal":
        fused = attention(x, None)
    else:
        q, k, v = (y.transpose(1, 2) for y in attention.c_attn(x).view(3, 7, 3, 2, 8).unbind(2))
        k, v = extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=~unseen)
        fused = attention.c_proj(y.transpose(1, 2).reshape(3, 7, 16))
    fused.pow(2).sum().backward()
    torch.testing.assert_close(ours, fused)
    torch.testing.assert_close(grads, gradients(attention), rtol=1e-4, atol=1e-4)


# The Llama family, naively


def naive_llama(state, ids, c):
    """Logits of one row by loops over tokens, heads and pairs of channels, from the formulas: float64 lists of numbers.

    RMSNorm x / sqrt(mean x^2 + eps) w; pair i at place t turned by t theta^(-2i/D); softmax(q k / sqrt(D)) over what is
    not later, query head h with head h // (H / K) of keys and values; down(silu(gate) up).
    """
    H, K, D = c.n_head, c.n_kv_head, c.head_size

    def norm(x, name):
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * state[f"{name}.weight"]

    def turned(x, t):
        out = x.clone()
        for i in range(D // 2):
            angle = t * c.rope_theta ** (-2 * i / D)
            out[i] = x[i] * math.cos(angle) - x[i + D // 2] * math.sin(angle)
            out[i + D // 2] = x[i] * math.sin(angle) + x[i + D // 2] * math.cos(angle)
        return out

    stream = [state["wte.weight"][i] for i in ids]
    for n in range(c.n_layer):
        qs, ks, vs = [], [], []
        for t, x in enumerate(stream):
            y = state[f"h.{n}.attn.c_attn.weight"] @ norm(x, f"h.{n}.ln_1") + state[f"h.{n}.attn.c_attn.bias"]
            heads = [y[i * D:(i + 1) * D] for i in range(H + 2 * K)]
            qs.append([turned(norm(q, f"h.{n}.attn.q_norm"), t) for q in heads[:H]])
            ks.append([turned(norm(k, f"h.{n}.attn.k_norm"), t) for k in heads[H:H + K]])
            vs.append(heads[H + K:])
        for t in range(len(ids)):
            seen = []
            for h in range(H):
                scores = torch.stack([qs[t][h] @ ks[u][h // (H // K)] for u in range(t + 1)]) / math.sqrt(D)
                weights = scores.exp() / scores.exp().sum()
                seen.append(sum(w * vs[u][h // (H // K)] for u, w in enumerate(weights)))
            stream[t] = stream[t] + state[f"h.{n}.attn.c_proj.weight"] @ torch.cat(seen)
            y = state[f"h.{n}.mlp.c_fc.weight"] @ norm(stream[t], f"h.{n}.ln_2")
            gate, up = y[:c.n_inner], y[c.n_inner:]
            stream[t] = stream[t] + state[f"h.{n}.mlp.c_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return torch.stack([state["lm_head.weight"] @ norm(x, "ln_f") for x in stream])


def test_llama_equals_a_naive_implementation(make_model):
    """Biases, norms of queries and keys, shared heads of a width of their own, an output of its own."""
    model, (tokens, _) = make_model(dtype=torch.float64, **LLAMA), ragged_tokens()
    expected = torch.stack([naive_llama(model.state_dict(), row, model.config) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)  # angles are float32


def packs(model):
    """For the model, whose logits are replaced, and each of its modules, whose pass is: is it?"""
    return ["logits" in model.__dict__, *("forward" in m.__dict__ for m in model.modules())]


@pytest.mark.skipif(not CAN_PACK, reason="not an x86 CPU with oneDNN")
@pytest.mark.parametrize("setting", ["highest", "medium"])
@pytest.mark.parametrize("rows", [1, 4, 40])
@both_families
def test_packed_weights_give_the_same_logits(make_model, precision, setting, rows, shape):
    """Of several tokens a row and of one; afterwards, and after an error too, no copy of the weights is left and
    gradients flow as before."""
    precision(setting)
    if kernels.matmul_error() > kernels.MATMUL_ERROR:
        pytest.skip("this CPU rounds float32 to bfloat16 then")
    model, (tokens, _) = make_model(n_embd=128, **shape), ragged_tokens()
    model.unembedding.data *= 0.2
    tokens = tokens.repeat(10, 1)[:rows]
    plain = model(tokens)
    with packed(model):
        assert sum(packs(model)) == 1 + 4 * 2  # the head; of each block three layers and GPT-2's MLP or the fourth
        torch.testing.assert_close(model(tokens), plain.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(tokens[:, :1]), plain[:, :1].detach(), rtol=1e-4, atol=1e-4)
        model.h[1].mlp.c_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 128)
        assert (model(tokens) - plain).abs().max() > 0.1  # it is the copies that are multiplied with
    with pytest.raises(ZeroDivisionError), packed(model):
        1 / 0
    assert not any(packs(model)) and torch.equal(model(tokens), plain) and model(tokens).requires_grad


@pytest.mark.skipif(not CAN_PACK or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 by oneDNN")
@both_families
def test_packed_weights_of_bfloat16(make_model, shape):
    """Under autocast the copies are bfloat16's, and the logits are as near to float32's as autocast's own are."""
    model, (tokens, _) = make_model(**shape), ragged_tokens()
    with torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            error = (model(tokens) - exact).norm()
            with packed(model):
                assert model.h[0].attn.c_attn(torch.zeros(1, 16)).dtype == torch.bfloat16 and all(
                    packs(model)[:1])
                assert 0 < (model(tokens) - exact).norm() < 1.5 * error


@pytest.mark.slow
@pytest.mark.skipif(not kernels.CAN_PACK_BFLOAT16 or not os.path.exists("/proc/self/statm"), reason="no bfloat16 by "
                    "oneDNN, or not Linux")
def test_products_of_many_row_counts_do_not_creep_up_on_memory():
    """oneDNN's caches hold a kernel for each number of rows: 400 more of them take no 100 MB (uncapped, 250)."""
    grown = subprocess.run([sys.executable, "-c", """
import torch
from minirlhf import kernels

def pages():
    return int(open("/proc/self/statm").read().split()[1])

torch.set_num_threads(1)
product = kernels.packed_linear(torch.randn(512, 512), None, torch.bfloat16)
for n in range(1, 700):
    product(torch.zeros(n, 512))
    before = pages() if n == 300 else before if n > 300 else 0
print((pages() - before) * 4096)
"""], cwd=ROOT, capture_output=True, text=True, check=True, env={
        k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}).stdout
    assert int(grown) < 100e6


@pytest.mark.parametrize("with_bias, gelu", [(True, True), (True, False), (False, False)])
def test_copies_for_a_gpu(with_bias, gelu):
    """A linear layer, and GELU, of weights and biases that were cast once."""
    x, weight, bias = torch.randn(5, 7).bfloat16(), torch.randn(3, 7), torch.randn(3) if with_bias else None
    found = kernels.cast_linear(weight, bias, torch.bfloat16, gelu=gelu)(x)
    exact = F.linear(x, weight.bfloat16(), bias.bfloat16() if with_bias else None)
    assert torch.equal(found, F.gelu(exact, approximate="tanh") if gelu else exact)


def test_copies_stay_where_they_are():
    """A graph reads them at the address of the first: later ones are written there."""
    kept, first = {}, torch.ones(2)
    assert kernels.in_place(kept, "a", first) is first and kernels.in_place(kept, "b", torch.zeros(2)) is not first
    again = kernels.in_place(kept, "a", torch.full((2,), 7.0))
    assert again.data_ptr() == first.data_ptr() and first.tolist() == [7, 7] and kept["b"].tolist() == [0, 0]


@pytest.mark.parametrize("device, dtype, width", [
    ("cpu", torch.float32, 126), ("cpu", torch.float64, 128), ("meta", torch.float32, 128)])
def test_other_matmuls_take_the_weights_as_they_are(make_model, device, dtype, width):
    """Those of narrow models, of double precision, and in float32 those of other devices than CPUs."""
    model = make_model(dtype=dtype, n_embd=width).to(device)
    with packed(model):
        assert not any(packs(model))


# Heads


def test_score_is_the_scalar_at_the_last_real_token(make_model):
    """score(tokens, lengths)[b] = forward(tokens)[b, lengths[b] - 1], and what follows that token is not read."""
    model, (tokens, real) = make_model("scalar"), ragged_tokens()
    scores = model.score(tokens, LENGTHS)
    torch.testing.assert_close(scores, torch.stack([row[n - 1] for row, n in zip(model(tokens), LENGTHS)]))
    torch.testing.assert_close(model.score(tokens.masked_fill(~real, 7), LENGTHS), scores)
    assert len(set(scores.tolist())) == 4


@both_families
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_selected_tokens_alone_are_as_among_all(make_model, monkeypatch, head, shape):
    """The last block works for the selected tokens only, and no layer for those that come after the last one of their
    row: states and all gradients are those of a whole pass."""
    model, (tokens, _) = make_model(head, n_layer=3, **shape), ragged_tokens()
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[1] = False  # a row without any
    found = []
    monkeypatch.setattr(GPTConfig, "leaves_padding_out", True)
    select, read = flat_indices(mask), []
    for pick in (lambda: model.hidden(tokens)[mask], lambda: model.hidden(tokens, select=select),
                 lambda: model.states(tokens, select)):
        with monkeypatch.context() as patch:
            patch.setattr(model.h[1].mlp.c_fc, "forward", lambda x, forward=model.h[1].mlp.c_fc.forward: (
                read.append(x.numel() // 16) or forward(x)))
            states = pick()
        (states * torch.arange(1.0, 1 + len(states))[:, None]).square().sum().backward()
        found.append((states.detach(), gradients(model)))
        model.zero_grad()
    for states, gradient in found[1:]:
        torch.testing.assert_close(states, found[0][0], rtol=1e-4, atol=1e-4)
        for name, plain in found[0][1].items():
            torch.testing.assert_close(gradient[name], plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    needed = sum(int(row.nonzero().max()) + 1 for row in mask if row.any())
    assert read == [36, 36, needed] and needed < 30


@both_families
def test_padding_is_left_out_of_wide_models(make_model, monkeypatch, shape):
    """What lies below a block is 0 where a row has ended, and what is made of it as if nothing had been left out; a
    narrow model, and rows without padding, are computed whole."""
    model, (tokens, real) = make_model(n_layer=3, **shape), ragged_tokens()
    model.first, select = 2, flat_indices(real)
    whole = model.below(tokens, LENGTHS)
    assert model.needed(tokens, select) is None and whole.shape == (4, 9, 16) and not (whole == 0).any()
    assert GPTConfig(1, 1, 256, 9, 9).leaves_padding_out and not GPTConfig(1, 1, 255, 9, 9).leaves_padding_out
    monkeypatch.setattr(GPTConfig, "leaves_padding_out", True)
    below = model.below(tokens, LENGTHS)
    assert torch.equal(model.needed(tokens, select), select) and model.needed(tokens, torch.arange(36)) is None
    assert model.needed(tokens, torch.tensor([2, 9, 30])).tolist() == [0, 1, 2, 9, 27, 28, 29, 30]
    torch.testing.assert_close(below, whole * real[:, :, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.states(tokens, select, below), model.hidden(tokens)[real], rtol=1e-4, atol=1e-4)


def test_gain_and_bias_set_the_scale(make_model):
    """scalar = (hidden @ w + b) * gain + bias: with the gain 2 and the bias -3 a raw 1.5 becomes 0."""
    model = make_model("scalar")
    torch.nn.init.zeros_(model.score_head.weight)
    torch.nn.init.constant_(model.score_head.bias, 1.5)
    assert model.scalar(torch.randn(2, 16)).tolist() == [1.5, 1.5]
    model.gain.fill_(2.0), model.bias.fill_(-3.0)
    assert model.scalar(torch.randn(2, 16)).tolist() == [0.0, 0.0]


@both_families
def test_with_head_carries_what_fits(make_model, shape):
    """lm -> lm: all. lm -> scalar: the trunk, a zero head. scalar -> scalar: head and scale too. Nothing is shared."""
    tokens, _ = ragged_tokens()
    model = make_model("lm", **shape)
    assert torch.equal(model.with_head("lm")(tokens), model(tokens))
    value = model.with_head("scalar")
    torch.testing.assert_close(value.hidden(tokens), model.hidden(tokens))
    assert not value(tokens).any()
    reward = make_model("scalar", **shape)
    reward.gain.fill_(2.0), reward.bias.fill_(-3.0)
    copy = reward.with_head("scalar")
    torch.testing.assert_close(copy(tokens), reward(tokens), rtol=0, atol=0)
    before = reward(tokens)
    for p in [*copy.parameters(), copy.gain]:
        p.data.add_(1)
    assert torch.equal(reward(tokens), before) and not torch.equal(copy(tokens), before)


def test_dropout_is_off_unless_training(make_model):
    """In eval mode the same input gives the same output; in training mode another; with_head's is none at all."""
    model, (tokens, _) = make_model(dropout=0.5), ragged_tokens()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    copy = model.with_head("lm").train()
    assert torch.equal(copy(tokens), copy(tokens)) and torch.equal(copy(tokens), model.eval()(tokens))
    assert model.with_head("lm", dropout=0.3).config.dropout == 0.3 and model.config.dropout == 0.5


def test_dropout_reaches_every_part(make_model):
    """GPT-2's places: embeddings, attention weights, and what attention and MLP add to the stream."""
    model, (tokens, _) = make_model(n_layer=1).train(), ragged_tokens()
    attention, mlp, x = model.h[0].attn, model.h[0].mlp, torch.randn(1, 4, 16)
    causal = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    model.config.dropout = 1.0  # no token and no place is left: all look the same
    torch.testing.assert_close(model(tokens), model(tokens)[:1, :1].expand(4, 9, 13))
    attention.dropout = mlp.dropout = 1.0
    assert not attention(x, causal).any() and not attention(x, None).any() and not mlp(x).any()
    attention.dropout = 0.5  # with all values 1, what is kept of the weights shows: without their dropout it is 0 or 2
    torch.nn.init.zeros_(attention.c_attn.weight), torch.nn.init.ones_(attention.c_attn.bias)
    torch.nn.init.eye_(attention.c_proj.weight), torch.nn.init.zeros_(attention.c_proj.bias)
    torch.manual_seed(0)
    for mask in (causal, None):
        assert set(attention(x, mask).flatten().tolist()) - {0.0, 2.0}


# Initial weights


@both_families
@pytest.mark.parametrize("n_layer", [2, 8])
def test_initial_scales(n_layer, shape):
    """N(0, 0.02); what adds to the residual stream is divided by sqrt(2 n_layer); biases 0, norms 1."""
    config = GPTConfig(**{"n_layer": n_layer, "n_head": 2, "n_embd": 64, "vocab_size": 500, "block_size": 64} | shape)
    model = GPT(config, "scalar").init_weights(torch.Generator().manual_seed(0))
    output = [] if config.tied else [("lm_head.weight", GPT(config).init_weights(torch.Generator()).lm_head.weight)]
    for name, p in [*model.named_parameters(), *output]:
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        elif name == "score_head.weight":
            assert p.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.3)  # 64 draws
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * std, name


def test_reward_head_scale():
    """Standard deviation 1/sqrt(d+1), which is not 1/(d+1): hidden states of unit size give scores of about 1."""
    model = GPT(GPTConfig(1, 2, 512, 3, 2), "scalar").init_score(torch.Generator().manual_seed(0))
    assert model.score_head.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert model.score_head.bias.item() == 0


def test_initial_weights_are_the_generator_s():
    """The same seed gives the same weights, whatever torch's global generator is at; another seed gives others."""
    def weights(seed):
        torch.rand(seed)
        return GPT(GPTConfig(1, 2, 16, 13, 8)).init_weights(torch.Generator().manual_seed(seed % 2)).state_dict()

    a, b, c = weights(1), weights(3), weights(2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"]) and not torch.equal(a["wpe.weight"], c["wpe.weight"])


@pytest.mark.parametrize("shape", [{}, LLAMA | {"tied": True}], ids=["gpt2", "llama"])
def test_output_is_tied_to_the_embedding(make_model, shape):
    """One matrix reads and writes tokens: the language model has no head of its own, and logits are hidden @ wte.T."""
    model, (tokens, _) = make_model(**shape), ragged_tokens()
    assert not [name for name in model.state_dict() if "head" in name]
    hidden = model.hidden(tokens)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.wte.weight.T)


@both_families
def test_log_probabilities_stay_float32_under_autocast(make_model, shape):
    """With bfloat16 matmuls, logits and scalars still come out as float32."""
    tokens, _ = ragged_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert make_model(**shape)(tokens).dtype == make_model("scalar", **shape)(tokens).dtype == torch.float32


# Sizes


@pytest.mark.parametrize("changes, words", [
    ({"n_head": 3}, ["n_embd 16", "n_head 3"]),
    ({"n_kv_head": 1}, ["n_kv_head 1", "GPT-2", "2"]),
    ({"tied": False}, ["tied", "GPT-2"]),
    ({"family": "mamba"}, ["'mamba'", "gpt2", "llama"]),
    ({**LLAMA, "n_kv_head": 3}, ["n_head 4", "n_kv_head 3"]),
    ({**LLAMA, "head_size": 5}, ["head_size 5"]),
    ({"family": "llama", "n_head": 3, "n_embd": 9}, ["head_size 3"]),
])
def test_sizes_that_make_no_network(changes, words):
    """Refused by name and value: GPT-2's family takes nothing of Llama's, whose heads must fit each other and halve."""
    with pytest.raises(ValueError) as error:
        GPTConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 13, "block_size": 8} | changes)
    assert all(word in str(error.value) for word in words)
