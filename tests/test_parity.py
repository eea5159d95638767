"""Parity with implementations that others wrote: transformers, TRL. Weights are random and large, rows ragged."""
import math
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from minirlhf import dpo
from minirlhf import objectives as O
from minirlhf.data import Row
from minirlhf.generate import generate, sample

EXACT = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float64: dict(rtol=1e-10, atol=1e-10)}
LENGTHS = torch.tensor([9, 3, 6, 1])


def ragged_tokens(vocab_size=13):
    """(4, 9) tokens, and True at the real ones."""
    tokens = torch.randint(vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(9) < LENGTHS[:, None]


# transformers' GPT-2


def hugging_face(model, name, **options):
    """transformers' model of the same weights: its Conv1D weights are (in, out), ours (out, in)."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = getattr(transformers, name)(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, **options)).eval()
    state = {"score.weight" if k == "score_head.weight" else f"transformer.{k}": v.T if is_conv(k) else v
             for k, v in model.state_dict().items() if k not in ("score_head.bias", "gain", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.to(model.wte.weight.dtype)


def is_conv(name):
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def compare_gradients(model, theirs, dtype):
    theirs = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        other = theirs["score.weight" if name == "score_head.weight" else name]
        other = other.T if is_conv(name) else other
        assert (p.grad - other).norm() <= EXACT[dtype]["rtol"] * other.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_language_model_equals_gpt2(make_model, dtype):
    """transformers' GPT2LMHeadModel, same weights, ragged rows: the same logits and the same gradients."""
    model, (tokens, real) = make_model(dtype=dtype), ragged_tokens()
    theirs = hugging_face(model, "GPT2LMHeadModel")
    expected = theirs(tokens, attention_mask=real.long()).logits[real]
    logits = model.hidden(tokens)[real] @ model.wte.weight.T
    torch.testing.assert_close(logits, expected, **EXACT[dtype])
    torch.testing.assert_close(model(tokens)[real], expected, **EXACT[dtype])
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for out in (logits, expected):
        (out * weights).sum().backward()
    compare_gradients(model, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_head_equals_gpt2_for_sequence_classification(make_model, dtype):
    """transformers' scalar head reads the last real token too: same scores and gradients, bias and scale aside."""
    model, (tokens, real) = make_model("scalar", dtype=dtype, vocab_size=14), ragged_tokens()
    theirs = hugging_face(model, "GPT2ForSequenceClassification", num_labels=1, pad_token_id=13)
    expected = theirs(tokens.masked_fill(~real, 13), attention_mask=real.long()).logits.squeeze(1)
    scores = model.hidden(tokens)[torch.arange(4), LENGTHS - 1] @ model.score_head.weight[0]
    torch.testing.assert_close(scores, expected, **EXACT[dtype])
    torch.testing.assert_close(model.score(tokens, LENGTHS) - model.score_head.bias, expected, **EXACT[dtype])
    for out in (scores, expected):
        out.pow(2).sum().backward()
    compare_gradients(model, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_answers_equal_gpt2_s(make_model, dtype):
    """transformers' generate, prompts padded on the left as it needs, takes the same tokens."""
    model = make_model(dtype=dtype)
    model.wte.weight.data[0] *= 0.2  # eos is seldom the likeliest
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9, 10], [12, 12]]
    ours = generate(model, prompts, 20, 0, temperature=0)
    tokens = pad_sequence([torch.tensor(p[::-1]) for p in prompts], True).flip(1)
    theirs = hugging_face(model, "GPT2LMHeadModel").generate(
        tokens, attention_mask=(tokens != 0).long(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    for answer, other in zip(ours.responses(), theirs[:, 6:].tolist()):
        assert answer == other[:len(answer)] and not any(other[len(answer):])
        assert len(answer) == 20 or answer[-1] == 0
    assert max(map(len, ours.responses())) == 20


# transformers' Llama, Qwen2 and Qwen3


LLAMA = {"family": "llama", "n_head": 4, "n_inner": 24, "rope_theta": 50.0, "norm_eps": 1e-3}
KINDS = {  # what each has that the others lack
    "LlamaForCausalLM": {"n_kv_head": 2}, "LlamaForCausalLM plain": {"n_inner": 0, "n_kv_head": 0},
    "LlamaForCausalLM own size": {"n_kv_head": 1, "head_size": 6, "tied": False},
    "Qwen2ForCausalLM": {"n_kv_head": 2, "qkv_bias": True},
    "Qwen2ForCausalLM untied": {"qkv_bias": True, "tied": False},
    "Qwen3ForCausalLM": {"n_kv_head": 2, "head_size": 8, "qk_norm": True},
    "Qwen3ForCausalLM untied": {"n_kv_head": 1, "head_size": 2, "qk_norm": True, "tied": False}}


def their_names(model):
    """[(name in the Llama family's files, ours, rows of ours or None)]: two of our matrices hold several of theirs."""
    c = model.config
    names = [("model.embed_tokens.weight", "wte.weight", None), ("model.norm.weight", "ln_f.weight", None)]
    names += [("lm_head.weight", "lm_head.weight", None)] if model.head == "lm" and not c.tied else []
    names += [("score.weight", "score_head.weight", None)] if model.head == "scalar" else []
    q, kv, inner = c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_inner
    parts = {"self_attn.q_proj": ("attn.c_attn", slice(q)), "self_attn.k_proj": ("attn.c_attn", slice(q, q + kv)),
             "self_attn.v_proj": ("attn.c_attn", slice(q + kv, None)), "self_attn.o_proj": ("attn.c_proj", None),
             "mlp.gate_proj": ("mlp.c_fc", slice(inner)), "mlp.up_proj": ("mlp.c_fc", slice(inner, None)),
             "mlp.down_proj": ("mlp.c_proj", None), "input_layernorm": ("ln_1", None),
             "post_attention_layernorm": ("ln_2", None)}
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        parts[f"self_attn.{name}"] = f"attn.{name}", None
    for n in range(c.n_layer):
        names += [(f"model.layers.{n}.{theirs}.weight", f"h.{n}.{ours}.weight", rows)
                  for theirs, (ours, rows) in parts.items()]
        names += [(f"model.layers.{n}.{theirs}.bias", f"h.{n}.{ours}.bias", rows)
                  for theirs, (ours, rows) in parts.items() if c.qkv_bias and "c_attn" in ours]
    return names


def their_llama(model, kind, **options):
    """transformers' model of the same weights. Its norms round float64 to float32: here they take torch's instead."""
    transformers = pytest.importorskip("transformers")
    kind, c, state = kind.split()[0], model.config, model.state_dict()
    classes = getattr(transformers, kind), getattr(transformers, kind.split("For")[0] + "Config")
    theirs = classes[0](classes[1](
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied, bos_token_id=0, eos_token_id=0, **options)).eval().to(model.wte.weight.dtype)
    theirs.load_state_dict({name: state[ours] if rows is None else state[ours][rows]
                            for name, ours, rows in their_names(model)}, strict=not c.tied)
    theirs.tie_weights()
    for norm in theirs.modules():
        if type(norm).__name__.endswith("RMSNorm") and model.wte.weight.dtype == torch.float64:
            norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=c.norm_eps)
    return theirs


def compare_llama_gradients(model, theirs, dtype):
    own, others = dict(model.named_parameters()), dict(theirs.named_parameters())
    for name, ours, rows in their_names(model):
        grad, other = own[ours].grad if rows is None else own[ours].grad[rows], others[name].grad
        assert other.norm() > 0 and (grad - other).norm() <= EXACT[dtype]["rtol"] * other.norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_language_model_equals_the_llama_family_s(make_model, kind, dtype):
    """transformers' models, same weights, ragged rows: the same logits and the same gradients, whether or not heads
    share keys, have a width of their own, biases, norms, or an output of its own."""
    model, (tokens, real) = make_model(dtype=dtype, **LLAMA | KINDS[kind]), ragged_tokens()
    theirs = their_llama(model, kind)
    expected = theirs(tokens, attention_mask=real.long()).logits[real]
    logits = model(tokens)[real]
    assert logits.std() > 1
    torch.testing.assert_close(logits, expected, **EXACT[dtype])
    weights = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for out in (logits, expected):
        (out * weights).sum().backward()
    compare_llama_gradients(model, theirs, dtype)


def test_scalar_head_equals_llama_for_sequence_classification(make_model):
    """The last real token is read: same scores and gradients, bias and scale aside."""
    model, (tokens, real) = make_model("scalar", vocab_size=14, **LLAMA, n_kv_head=2), ragged_tokens()
    theirs = their_llama(model, "LlamaForSequenceClassification", num_labels=1, pad_token_id=13)
    expected = theirs(tokens.masked_fill(~real, 13), attention_mask=real.long()).logits.squeeze(1)
    scores = model.score(tokens, LENGTHS) - model.score_head.bias
    torch.testing.assert_close(scores, expected, **EXACT[torch.float32])
    for out in (scores, expected):
        out.pow(2).sum().backward()
    compare_llama_gradients(model, theirs, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_the_llama_family_s(make_model, kind):
    """Ragged prompts, cached: transformers' generate, prompts padded on the left as it needs, takes the same tokens."""
    model = make_model(**LLAMA | KINDS[kind])
    model.unembedding.data[0] *= 0.2  # eos is seldom the likeliest
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9, 10], [12, 12]]
    ours = generate(model, prompts, 20, 0, temperature=0)
    tokens = pad_sequence([torch.tensor(p[::-1]) for p in prompts], True).flip(1)
    theirs = their_llama(model, kind).generate(
        tokens, attention_mask=(tokens != 0).long(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    for answer, other in zip(ours.responses(), theirs[:, 6:].tolist()):
        assert answer == other[:len(answer)] and not any(other[len(answer):])
        assert len(answer) == 20 or answer[-1] == 0
    assert max(map(len, ours.responses())) == 20


# TRL's functions: rewards, whitening, truncation, log-probabilities


@pytest.fixture
def trl(monkeypatch):
    """TRL 1.12, the last release that had a PPO trainer."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return pytest.importorskip("trl.experimental.ppo.ppo_trainer", exc_type=ImportError)


@pytest.mark.parametrize("seed", range(3))
def test_whitening_equals_trl_s(trl, seed):
    """TRL divides by the unbiased deviation: ours times sqrt((n - 1) / n) is theirs, with and without the mean."""
    g = torch.Generator().manual_seed(seed)
    x, mask = 3 * torch.randn(6, 9, generator=g, dtype=torch.double) + 2, torch.rand(6, 9, generator=g) < 0.6
    n, mean = int(mask.sum()), x[mask].mean()
    factor = math.sqrt((n - 1) / n)
    torch.testing.assert_close(O.whiten(x, mask)[mask] * factor, trl.masked_whiten(x, mask)[mask])
    kept = (O.whiten(x, mask, keep_mean=True)[mask] - mean) * factor + mean
    torch.testing.assert_close(kept, trl.masked_whiten(x, mask, shift_mean=False)[mask])
    torch.testing.assert_close(O.moments(x, mask)[0], trl.masked_mean(x, mask))


def test_truncation_equals_trl_s(trl, make_model):
    """After the first eos there is nothing but padding: TRL's cut of an answer's tokens changes none of ours."""
    rollout = generate(make_model(), [[b + 1] for b in range(12)], 12, 0, generator=torch.Generator().manual_seed(0))
    answers = rollout.tokens[:, 1:]
    assert 0 < rollout.finished.sum() < 12
    assert torch.equal(trl.truncate_response(0, 0, answers), answers)
    lengths = trl.first_true_indices(answers == 0)  # before the eos
    assert torch.equal(rollout.lengths - 1, lengths + rollout.finished)


def test_scores_equal_trl_s(trl, make_model):
    """TRL's get_reward reads the last token before its padding, over ragged answers: the same scores."""
    model = make_model("scalar", vocab_size=14)
    tokens, real = ragged_tokens()
    theirs = hugging_face(model, "GPT2ForSequenceClassification", num_labels=1, pad_token_id=13)
    _, expected, last = trl.get_reward(theirs, tokens.masked_fill(~real, 13), 13, 1)
    assert torch.equal(last[LENGTHS > 1], LENGTHS[LENGTHS > 1] - 1)
    torch.testing.assert_close((model.score(tokens, LENGTHS) - model.score_head.bias)[LENGTHS > 1],
                               expected[LENGTHS > 1], **EXACT[torch.float32])


def test_log_probabilities_and_entropy_equal_trl_s(trl):
    """selective_log_softmax and entropy_from_logits, and the sampler's own log-probabilities."""
    utils = pytest.importorskip("trl.trainer.utils")
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, 7, 11, generator=g, dtype=torch.double)
    tokens, logprobs = sample(logits.flatten(0, 1), 0.7, torch.rand(35, generator=g))
    expected = utils.selective_log_softmax(logits / 0.7, tokens.view(5, 7))
    torch.testing.assert_close(O.token_logprobs(logits / 0.7, tokens.view(5, 7)), expected)
    torch.testing.assert_close(logprobs.view(5, 7), expected)
    torch.testing.assert_close(O.entropy(logits.log_softmax(-1)), utils.entropy_from_logits(logits))


# TRL's direct alignment: DPOTrainer's own loss of a batch, CPOTrainer's of log-probabilities


PAIRS = [([1, 5, 7], [3, 4, 0], [9, 8, 11, 2, 0]), ([1], [2, 0], [6, 6, 3, 0]), ([1, 2], [4, 12, 10, 0], [0])]
ONE_TOKEN = [([1, 5, 7], [3], [9]), ([1], [2], [6]), ([1, 2], [4], [0])]


def of_trl(policy, ref, pairs, loss, **options):
    """The loss of TRL's DPOTrainer for pairs (prompt, chosen, rejected) of ids, in one batch -> (loss with its
    gradient, what it logs)."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError)
    rows = [prompt + pair[k] for k in (0, 1) for prompt, *pair in pairs]
    tokens = pad_sequence([torch.tensor(row) for row in rows], True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    answers = real & (torch.arange(tokens.shape[1]) >= torch.tensor([len(p) for p, *_ in pairs] * 2)[:, None])
    logged = {"train": defaultdict(list), "eval": defaultdict(list)}
    own = SimpleNamespace(
        model=policy, ref_model=ref, loss_types=[loss], loss_weights=[1.0], ld_alpha=None,
        f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=False, aux_loss_enabled=False,
        _metrics=logged, _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x), **options)
    inputs = {"input_ids": tokens, "attention_mask": real.long(), "completion_mask": answers.long()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "disable_gradient_checkpointing", lambda *_: nullcontext())
        found = trainer.DPOTrainer._compute_loss(own, policy, inputs, False)
    return found, {name: values[0] for name, values in (logged["train"] if policy.training else logged["eval"]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("loss, pairs", [("sigmoid", PAIRS), ("ipo", ONE_TOKEN)])
def test_direct_alignment_equals_trl_s(make_model, loss, pairs):
    """TRL's DPOTrainer on transformers' GPT-2 of the same weights, ragged pairs: the same loss, gradients, rewards and
    log-probabilities. Its IPO divides by the length, so answers of one token alone are the same there."""
    policy, ref = (make_model(seed=seed, dtype=torch.double) for seed in (1, 2))
    theirs, other = (hugging_face(model, "GPT2LMHeadModel") for model in (policy, ref))
    expected, logged = of_trl(theirs, other, pairs, loss, beta=0.3, label_smoothing=0.0)
    expected.backward()
    run = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, share=lambda rows: rows,
                          sum_gradients=lambda parameters: None, totals=lambda sums: sums)
    records = [([Row(prompt + answer, len(prompt)) for answer in two], [(0, 1)]) for prompt, *two in pairs]
    with torch.no_grad():
        batch = [(*record, dpo.answer_logprobs(ref, run, record[0], 0)) for record in records]
    figures, _ = dpo.batch_gradients(policy, batch, 0, dpo.Options(loss=loss, beta=0.3, micro_batch_size=2), run)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-9)
    names = {*dpo.FIGURES} - {"loss"}
    assert names <= logged.keys()
    assert {name: figures[name] for name in names} == pytest.approx({name: logged[name] for name in names}, rel=1e-6)
    compare_gradients(policy, theirs, torch.double)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "ipo", "sigmoid"])
def test_losses_of_pairs_equal_trl_s(loss):
    """CPOTrainer's losses of what they compare: SimPO's of means, IPO's of sums as in its paper, and DPO's with a share
    of wrong labels."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", exc_type=ImportError)
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(9, generator=g, dtype=torch.double) for _ in range(2))
    own = SimpleNamespace(alpha=0.0, beta=1.7, loss_type=loss, simpo_gamma=0.6,
                          label_smoothing=0.15 * (loss == "sigmoid"),
                          accelerator=SimpleNamespace(device=torch.device("cpu")))
    losses, *rewards = cpo.CPOTrainer.cpo_loss(own, chosen, rejected)
    ours = {"simpo": lambda: O.simpo_loss(chosen, rejected, 1.7, 0.6), "ipo": lambda: O.ipo_loss(chosen, rejected, 1.7),
            "sigmoid": lambda: O.dpo_loss(chosen, rejected, 1.7, 0.15)}[loss]()
    torch.testing.assert_close(ours, losses)
    for reward, x in zip(rewards, (chosen, rejected)):
        torch.testing.assert_close(1.7 * x, reward)
