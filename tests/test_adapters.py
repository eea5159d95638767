"""Adapters and frozen blocks: the same function as whole matrices, one memory for what does not learn, and runs and
files that hold what they learned alone.

The worlds of whole runs have two narrow blocks and the data of `tiny`. They start from our own SFT model, and from
another program's: a folder of Llama's family, and a .gguf file of GPT-2's.
"""
import copy
import json
import os
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train_ppo
import train_sft
from conftest import both_families
from minirlhf import adapters, checkpoint, data, evaluate, kernels, pretrained, runtime, sample
from minirlhf.adapters import LowRank, learner, merge, merged
from minirlhf.config import RunOptions
from minirlhf.data import Row, spread
from minirlhf.generate import generate
from minirlhf.model import GPT, Block, GPTConfig, flat_indices
from minirlhf.tokenizer import BYTE_OF
from test_fuzz import attempt, case, cases, mutated_value
from test_pretrained import config_of, gguf, safetensors, tensors_of
from test_state import equal, stopping, tensors, without_clocks  # noqa: F401 (a fixture)
from test_train_ppo import EOS, options, run_of, score, update, world  # noqa: F401 (a fixture)

DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
CPU = torch.device("cpu")
TOKENS = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))
FULL = torch.tensor([9, 9, 9])
HEADS = pytest.mark.parametrize("head", ["lm", "scalar"])


def part(rank=0, alpha=6.0, layers=0, frozen=0):
    """The options of what learns."""
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_layers=layers, freeze_layers=frozen)


PARTS = {"adapters": part(rank=3), "adapters in the last block": part(rank=2, layers=1),
         "a frozen block": part(frozen=1)}
EVERY = pytest.mark.parametrize("o", PARTS.values(), ids=PARTS)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def trained(model, seed=2, size=0.3):
    """The model, after what learns has moved by N(0, size^2)."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn(p.shape, generator=seeded(seed + p.numel()), dtype=p.dtype)
    return model


def what_learns(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- the layer


def test_an_adapter_by_hand():
    """W = (1 2), b = 10, A = (1 -1), B = 3, alpha 4, rank 1: x + 2 y + 10 + 4 3 (x - y), at (5, 3) 11 + 10 + 24."""
    linear = torch.nn.Linear(2, 1)
    layer = LowRank(linear, 1, 4.0, seeded())
    for tensor, values in ((linear.weight, [[1., 2]]), (linear.bias, [10.]), (layer.a, [[1., -1]]), (layer.b, [[3.]])):
        tensor.data = torch.tensor(values)
    assert layer(torch.tensor([5., 3])).tolist() == [45] and layer.weight.tolist() == [[13, -10]]
    assert LowRank(linear, 2, 4.0, seeded()).scale == 2 and layer.bias is linear.bias


def test_where_an_adapter_begins():
    """B is 0 and A uniform within 1 / sqrt(in), which its entries nearly reach; another generator gives another A."""
    linear = torch.nn.Linear(16, 400)
    layers = [LowRank(linear, 300, 1.0, seeded(seed)) for seed in (1, 1, 2)]
    assert not layers[0].b.any() and layers[0].a.shape == (300, 16) and layers[0].b.shape == (400, 300)
    a = layers[0].a.detach()
    assert 0.249 < a.max() <= 0.25 and -0.25 <= a.min() < -0.249 and 0.13 < a.std() < 0.16
    assert torch.equal(layers[0].a, layers[1].a) and not torch.equal(layers[0].a, layers[2].a)


@pytest.mark.slow  # to import both takes as long as all else here
def test_peft_gives_the_same(tmp_path):
    """A GPT-2 of transformers under peft's LoRA, and ours with the same A and B: logits and gradients, in float64."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=32, vocab_size=13, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.4)
    theirs.save_pretrained(tmp_path)
    ours = trained(learner(pretrained.load(str(tmp_path))[0].double(), "lm", part(rank=3, alpha=5.0), seeded()))
    theirs = peft.get_peft_model(theirs.double(), peft.LoraConfig(
        r=3, lora_alpha=5.0, lora_dropout=0.0, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]))
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, LowRank):
            other = theirs.base_model.model.transformer.get_submodule(name)
            for own, their in ((layer.a, other.lora_A["default"].weight), (layer.b, other.lora_B["default"].weight)):
                their.data = own.detach().clone()
                pairs.append((own, their))
    assert len(pairs) == 2 * 4 * 2 == len(what_learns(ours)) == len(what_learns(theirs))
    logits = ours(TOKENS), theirs.eval()(TOKENS).logits
    torch.testing.assert_close(*logits, **DOUBLE)
    for found in logits:
        found.logsumexp(-1).square().sum().backward()
    for own, their in pairs:
        assert own.grad.norm() > 0.1
        torch.testing.assert_close(own.grad, their.grad, **DOUBLE)


# ---- the model


@both_families
@HEADS
@EVERY
def test_at_the_start_nothing_changes(make_model, head, shape, o):
    """To the last bit."""
    model = make_model(head, **shape)
    assert torch.equal(learner(model, head, o, seeded())(TOKENS), model(TOKENS))


def test_without_the_options_it_is_a_copy(make_model):
    """All of it learns, and nothing is shared."""
    model = make_model()
    other = learner(model, "lm", part(), seeded(), 0.25)
    assert other.config.dropout == 0.25 and what_learns(other) == {name for name, _ in model.named_parameters()}
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


@both_families
@HEADS
def test_an_adapted_model_as_a_plain_one(make_model, head, shape):
    """`merged` gives the weights of a plain GPT of the same function, also at another time's weights, and leaves the
    model as it is; `merge` makes it one, of the same bits."""
    model = make_model(head, dtype=torch.float64, **shape)
    if head == "scalar":
        model.gain.fill_(0.7), model.bias.fill_(-0.3)
    adapted = trained(learner(model, head, part(rank=3), seeded()))
    expected, source = adapted(TOKENS), {k: v.clone() for k, v in model.state_dict().items()}
    assert (expected - model(TOKENS)).abs().max() > 0.1
    then = {name: tensor.clone() for name, tensor in adapters.trained(adapted).items()}
    plain, weights = GPT(model.config, head).double(), merged(adapted)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(TOKENS), expected, **DOUBLE)
    trained(adapted, 7)
    plain.load_state_dict(merged(adapted, then))
    torch.testing.assert_close(plain(TOKENS), expected, **DOUBLE)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    weights = merged(adapted)
    whole = merge(adapted)
    assert equal(whole.state_dict(), weights) and whole.first == 0
    assert what_learns(whole) == {name for name, _ in plain.named_parameters()}
    assert not any(isinstance(layer, LowRank) for layer in whole.modules())


def packing(dtype=torch.bfloat16, compiled=False, device=CPU):
    return SimpleNamespace(dtype=dtype, device=device, options=SimpleNamespace(compile=compiled))


@pytest.mark.skipif(not kernels.CAN_PACK_BFLOAT16, reason="no bfloat16 by oneDNN")
@EVERY
@both_families
def test_frozen_weights_are_packed_once(monkeypatch, make_model, shape, o):
    """The gradients of a language model and of a scalar head under autocast lie as near to those of float32 as without
    packing, and no weight is packed a second time, by no other model that shares it either."""
    packed, real = [], kernels.packed_linear
    monkeypatch.setattr(kernels, "packed_linear", lambda weight, *more: packed.append(weight.shape) or real(
        weight, *more))

    def gradients(model, autocast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model.logprobs(TOKENS, torch.arange(24))[0] if model.head == "lm" else model.values(
                TOKENS, torch.arange(24))
        (y.float() * torch.linspace(-1, 2, 24)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    lm, scalar = make_model(**shape), make_model("scalar", **shape)
    learners = [trained(learner(model, model.head, o, seeded()), size=0.05) for model in (lm, lm, scalar)]
    exact, plain = ([gradients(model, autocast) for model in learners] for autocast in (False, True))
    kernels.pack_frozen(packing(), learners, [lm])
    for model, truth, near in zip(learners, exact, plain):
        error = (gradients(model, True) - truth).norm()
        assert error < 1.2 * (near - truth).norm() < 0.1 * truth.norm()
        assert torch.equal(gradients(model, False), truth)  # without autocast the weights themselves
    before = len(packed)
    for model in learners:
        gradients(model, True)
    own = len(adapters.layers_of(lm.h[0], torch.nn.Linear)) * (len(lm.h) - learners[0].first)  # of a learner
    frozen = 4 * len(lm.h) - (0 if o.lora_rank else own)
    assert before == len(packed) > 0 and len({*map(len, packed)}) == 1
    head = lm.config.tied or o.lora_rank > 0  # is frozen, and packed forward and backward
    back = (own - 1) * (o.lora_rank > 0)  # what enters the first block that learns needs no gradient
    assert before == 2 * (frozen + back) + 2 * head


@pytest.mark.skipif(not kernels.CAN_PACK_BFLOAT16, reason="no bfloat16 by oneDNN")
def test_layers_that_share_a_matrix_keep_their_biases():
    packs, weight, biases = {}, torch.eye(2), [torch.tensor([1.0, 2]), torch.tensor([3.0, 4]), None]
    with torch.autocast("cpu", torch.bfloat16):
        found = [kernels.frozen_linear(packs, weight, bias, torch.zeros(1, 2)).tolist() for bias in biases]
    assert found == [[[1, 2]], [[3, 4]], [[0, 0]]]


@pytest.mark.skipif(not kernels.CAN_PACK_BFLOAT16, reason="no bfloat16 by oneDNN")
def test_what_packs_nothing(make_model):
    """Other types, other devices, --compile, and weights that learn."""
    model, full = (learner(make_model(), "lm", o, seeded()) for o in (part(rank=2), part()))
    for run in (packing(torch.float32), packing(compiled=True), packing(device=torch.device("cuda"))):
        kernels.pack_frozen(run, [model], [full])
    kernels.pack_frozen(packing(), [full, None], [None])
    assert not any("forward" in vars(m) or "logits" in vars(m) for one in (model, full) for m in one.modules())
    kernels.pack_frozen(packing(), [], [full])  # it does not learn here
    assert sum("forward" in vars(m) for m in full.modules()) == 4 * len(full.h) and "logits" in vars(full)


@pytest.mark.skipif(not kernels.CAN_PACK_BFLOAT16, reason="no bfloat16 by oneDNN")
def test_sampling_leaves_the_packed_weights(make_model):
    """`packed` puts back what it found: afterwards gradients flow through the frozen layers as before."""
    model = learner(make_model(), "lm", part(rank=2), seeded())
    kernels.pack_frozen(packing(), [model])
    before = [(m, name, vars(m)[name]) for m in model.modules() for name in ("forward", "logits") if name in vars(m)]
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, [[1, 2], [3]], 4, EOS, 1.0, seeded())
    assert len(before) == 1 + 4 * len(model.h)
    assert [(m, name, vars(m)[name]) for m in model.modules() for name in ("forward", "logits")
            if name in vars(m)] == before


@both_families
def test_the_sampler_s_packed_weights_hold_the_adapters(make_model, shape):
    """A wide model, whose layers are packed while it samples: what the sampler notes are the trainer's log-
    probabilities, and those of the model without adapters are others."""
    model = make_model(n_embd=128, **shape | {"n_layer": 2})
    for p in model.parameters():
        p.data *= 0.3 if p.dim() == 2 else 1.0
    adapted = trained(learner(model, "lm", part(rank=4), seeded()), size=0.05)
    with kernels.packed(adapted):
        packed = {type(m) for m in adapted.modules() if "forward" in vars(m)}
    assert not kernels.CAN_PACK or LowRank in packed
    found = generate(adapted, [[1, 2], [3], [4, 5, 6]], 8, EOS, 1.0, seeded())
    with torch.no_grad():
        own, other = (m.logprobs(found.tokens, found.decisions)[0] for m in (adapted, model))
    torch.testing.assert_close(found.flat(found.sampler_logprobs), own, rtol=1e-3, atol=1e-3)
    assert (own - other).abs().max() > 0.1


BLOCKS = [f"{name}.{part}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") for part in "ab"]
WHOLE = [f"{name}.{part}" for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
         for part in ("weight", "bias")]


@HEADS
@pytest.mark.parametrize("o, blocks, inside, more", [
    (PARTS["adapters"], (0, 1), BLOCKS, []), (PARTS["adapters in the last block"], (1,), BLOCKS, []),
    (part(rank=2, layers=2), (0, 1), BLOCKS, []), (PARTS["a frozen block"], (1,), WHOLE, ["ln_f.weight", "ln_f.bias"])])
def test_what_learns(make_model, head, o, blocks, inside, more):
    """Adapters of each linear layer of the last blocks, or these blocks and the last norm; a scalar head in any case.
    Gradients and optimizers' moments are of these alone, and no graph leads below the first block that learns."""
    model = learner(make_model("scalar"), "scalar", o, seeded()) if head == "scalar" else learner(
        make_model(), "lm", o, seeded())
    names = {f"h.{i}.{name}" for i in blocks for name in inside} | {*more} | (
        {"score_head.weight", "score_head.bias"} if head == "scalar" else set())
    assert what_learns(model) == names and {*adapters.trained(model)} == names | (
        {"gain", "bias"} if head == "scalar" else set())
    assert model.first == blocks[0] and adapters.is_partial(model)
    entering = {}
    for i, block in enumerate(model.h):
        block.register_forward_pre_hook(lambda block, given, i=i: entering.update({i: given[0].requires_grad}))
    trained(model)(TOKENS).square().sum().backward()
    assert entering == {0: False, 1: 0 in blocks}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    for o in (train_sft.Options(), train_sft.Options(optimizer="adamw"), None):
        made = train_ppo.make_optimizers(model, model, train_ppo.Options())[:1] if o is None else (
            runtime.make_optimizers(model, o))
        held = [id(p) for optimizer in made for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for name, p in model.named_parameters() if name in names)
        for optimizer in made:
            optimizer.step()
        assert sum(bool(optimizer.state[p]) for optimizer in made for p in optimizer.state) == len(names)


def test_an_output_of_its_own_learns_beside_a_frozen_block(make_model):
    """Where it is not the embedding; under adapters it is frozen like all else."""
    model = make_model(family="llama", tied=False)
    for o, learns in ((part(frozen=1), True), (part(rank=2), False)):
        other = learner(model, "lm", o, seeded())
        assert other.lm_head.weight.requires_grad is learns is not (
            other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr())


def test_how_many_learn_is_told(make_model):
    """Of rank 2, A of (in, out) = (16, 48), (16, 16), (16, 64), (64, 16) has 2 in numbers and B 2 out."""
    model = make_model()
    every = sum(p.numel() for p in model.parameters())
    assert runtime.describe_parameters(model) == f"{every:,} parameters"
    adapted = learner(model, "lm", part(rank=2, layers=1), seeded())
    ab = 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    assert runtime.describe_parameters(adapted) == f"{every + ab:,} parameters ({ab:,} of them learn)"


# ---- one memory


@both_families
@EVERY
def test_what_is_frozen_is_one_memory(make_model, shape, o):
    """A policy and its reference, a value network and its reward model: two trunks in four models. What learns is a
    network's own, and the scalar head's scale too; to train them leaves the two others as they were."""
    ref, reward = make_model(**shape), make_model("scalar", 3, **shape)
    reward.gain.fill_(0.7)
    policy, value = learner(ref, "lm", o, seeded()), learner(reward, "scalar", o, seeded(2))
    for own, source in ((policy, ref), (value, reward)):
        places = {p.data_ptr() for p in source.state_dict().values()}
        shared = {name for name, tensor in own.state_dict().items() if tensor.data_ptr() in places}
        assert shared == {*own.state_dict()} - {*adapters.trained(own)}
        assert len(shared) >= 10 and not any(own.get_parameter(name).requires_grad for name in shared)
    assert torch.equal(value.gain, reward.gain) and torch.equal(value.score_head.weight, reward.score_head.weight)
    stored = {t.data_ptr(): t.numel() for m in (ref, reward, policy, value) for t in m.state_dict().values()}
    own = sum(t.numel() for m in (policy, value) for t in adapters.trained(m).values())
    assert sum(stored.values()) == own + sum(t.numel() for m in (ref, reward) for t in m.state_dict().values())
    before = [m(TOKENS) for m in (ref, reward)]
    for model, source in ((policy, ref), (value, reward)):
        model(TOKENS).square().sum().backward()
        for optimizer in runtime.make_optimizers(model, train_sft.Options(learning_rate=0.1)):
            optimizer.step()
        if model is value:
            value.gain.fill_(3.0), value.bias.fill_(3.0)
        assert (model(TOKENS) - source(TOKENS)).abs().max() > 0.01
    assert all(torch.equal(m(TOKENS), b) for m, b in zip((ref, reward), before))


@EVERY
def test_a_value_network_on_a_language_model_s_trunk(make_model, o):
    """Its head is 0 and the scale 1, its trunk the model's memory."""
    model = make_model()
    value = learner(model, "scalar", o, seeded())
    assert not value(TOKENS).any() and value.gain == 1 and value.bias == 0
    assert value.wte.weight.data_ptr() == model.wte.weight.data_ptr() and value.head == "scalar"
    assert torch.equal(value.hidden(TOKENS), model.hidden(TOKENS))


def test_dropout_and_mode_are_the_copy_s(make_model):
    """The adapted copy has the dropout that is asked for, and its source keeps its own."""
    model = make_model()
    other = learner(model, "lm", part(rank=2), seeded(), 0.5)
    assert other.config.dropout == 0.5 and other.h[0].attn.dropout == 0.5 and model.h[0].attn.dropout == 0
    assert not other.training and learner(model.train(), "lm", part(rank=2), seeded()).training


# ---- what lies below


@both_families
@pytest.mark.parametrize("o", [PARTS["adapters in the last block"], PARTS["a frozen block"]], ids=["lora", "frozen"])
def test_states_from_below_are_the_states(make_model, shape, o):
    """Log-probabilities, values, scores and hidden states from what enters the first block that learns are those from
    tokens, of the policy and of its reference, of the value network and of its reward model."""
    shape = shape | {"n_layer": 3, "dtype": torch.float64}
    o = copy.copy(o)
    o.freeze_layers *= 2
    lm, scalar = make_model(**shape), make_model("scalar", 3, **shape)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:5], mask[1, 7], mask[2, 0:8] = True, True, True
    decisions, lengths = flat_indices(mask), torch.tensor([9, 4, 7])
    policy, value = (trained(learner(model, model.head, o, seeded())) for model in (lm, scalar))
    below = policy.below(TOKENS, FULL)
    assert below.shape == (3, 9, 16) and not below.requires_grad and policy.first == lm.first == 2
    assert torch.equal(below, lm.below(TOKENS, FULL)) and not torch.equal(below, value.below(TOKENS, FULL))
    for model in (policy, lm):
        found, expected = (model.logprobs(TOKENS, decisions, 0.7, b) for b in (below, None))
        torch.testing.assert_close(found, expected, **DOUBLE)
        assert torch.equal(model.hidden(TOKENS, below=below), model.hidden(TOKENS))
        select = torch.tensor([1, 20])
        assert torch.equal(model.hidden(TOKENS, select=select, below=below), model.hidden(TOKENS, select=select))
    below = value.below(TOKENS, FULL)
    for model in (value, scalar):
        torch.testing.assert_close(model.values(TOKENS, decisions, below), model.values(TOKENS, decisions), **DOUBLE)
        torch.testing.assert_close(model.score(TOKENS, lengths, below), model.score(TOKENS, lengths), **DOUBLE)
    changed = [model.values(TOKENS, decisions, below.flip(-1)) for model in (value, scalar)]  # so it is what they read
    assert all((a - m.values(TOKENS, decisions)).abs().max() > 0.01 for a, m in zip(changed, (value, scalar)))


def test_nothing_lies_below_the_first_block(make_model):
    """Models whose first block learns, or that were not made to learn a part, take none and give none."""
    model = make_model()
    learner(make_model(), "lm", part(rank=2, layers=1), seeded())
    whole = learner(model, "lm", part(rank=2), seeded())
    assert model.below(TOKENS, FULL) is None and whole.below(TOKENS, FULL) is None and whole.first == 0
    wrong = torch.full((3, 9, 16), 1e6)
    assert torch.equal(model.hidden(TOKENS, below=wrong), model.hidden(TOKENS))


def test_lower_blocks_run_once_an_answer(world, monkeypatch):  # noqa: F811
    """Ten answers, three epochs, adapters in the last of two blocks. The first block takes each answer once for policy
    and reference, once for value network and reward model. The last takes it once in each of the four, and once more
    an epoch in those that learn."""
    o = options(lora_rank=2, lora_layers=1, num_ppo_epochs=3, max_update_kl=1.0)
    nets, reward, batch = world(o)
    named = {"policy": nets.policy, "ref": nets.ref, "value": nets.value, "reward": reward.model}
    where = {id(block): (name, i) for name, model in named.items() for i, block in enumerate(model.h)}
    passes, forward = Counter(), Block.forward

    def counted(self, x, *more, **rest):
        passes[where[id(self)]] += len(x)
        return forward(self, x, *more, **rest)
    monkeypatch.setattr(Block, "forward", counted)
    score(batch, nets, reward, o)
    assert passes == {("policy", 0): 10, ("value", 0): 10, **{(name, 1): 10 for name in named}}
    assert batch.below.shape == batch.value_below.shape == (*batch.tokens.shape, 16)
    train_ppo.credit(batch, 0.3, o, run_of(o))
    passes.clear()
    update(batch, nets, train_ppo.make_optimizers(nets.policy, nets.value, o), 0, o)
    assert passes == {("policy", 1): 30, ("value", 1): 30}


def test_held_out_answers_are_read_from_below_once(make_model, monkeypatch):
    """`evaluate.answer` with adapters in the last block: the KL is that of two passes over all blocks."""
    ref = make_model()
    policy = trained(learner(ref, "lm", part(rank=2, layers=1), seeded()))
    o = SimpleNamespace(response_length=6, temperature=0.8, seed=3)
    run = runtime.Precision(CPU, "float32")
    tokenizer = SimpleNamespace(eos=EOS, decode=str)
    found = []
    for first in (1, 0):
        policy.first = ref.first = first
        with monkeypatch.context() as patch:
            lower, forward = [], ref.h[0].forward
            patch.setattr(ref.h[0], "forward", lambda *a, **b: lower.append(1) or forward(*a, **b))
            found.append((evaluate.answer(policy, ref, {}, [[1, 2], [3]], tokenizer, o, run), len(lower)))
    (rows, shared), (expected, apart) = found
    assert (shared, apart) == (0, 1) and abs(rows[0]["k1"]) > 0.1
    assert [row["ids"] for row in rows] == [row["ids"] for row in expected]
    for name in ("k1", "k3", "ref_logprob"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-4)


def test_a_reference_of_its_own_is_read_in_full(make_model):
    """A policy's states are another model's only where both stand on one trunk: others take no notice of them."""
    start, other = make_model(), make_model(seed=4)
    policy = learner(start, "lm", part(rank=2, layers=1), seeded())
    below, decisions = policy.below(TOKENS, FULL), torch.tensor([3, 9, 20])
    assert torch.equal(other.logprobs(TOKENS, decisions, 1.0, below)[0], other.logprobs(TOKENS, decisions)[0])


def test_equal_weights_below_are_shared(make_model):
    """Each of them; the states are another model's only where all are equal."""
    start, same, other = (make_model(n_layer=3) for _ in range(3))
    policy = learner(start, "lm", part(rank=2, layers=1), seeded())
    other.h[1].mlp.c_fc.weight.data += 1
    before = other(TOKENS)
    adapters.share_below(policy, same, None, other)
    assert (same.first, other.first) == (2, 0) and torch.equal(other(TOKENS), before)
    assert adapters.same_memory(policy, same, 2) and not adapters.same_memory(policy, other, 2)
    shared = {name for name, p in adapters.below(other, 2) if p.data_ptr() == policy.get_parameter(name).data_ptr()}
    assert {"wte.weight", "h.1.mlp.c_proj.weight"} <= shared
    assert {name for name, _ in adapters.below(other, 2)} - shared == {"h.1.mlp.c_fc.weight"}


@pytest.mark.parametrize("reference, first", [("the same", 1), ("another", 0)])
def test_a_reference_of_the_same_weights_shares_them(runs, quick, monkeypatch, tmp_path, reference, first):
    """--reference: a copy of the SFT model is read from the policy's states below, a model of other weights in full."""
    path = shutil.copytree(runs.starts["own"], tmp_path / "copy") if reference == "the same" else runs.tiny.train(
        "sft", *SHAPE["own"], "--seed", "2").folder
    seen, real = [], train_ppo.score_rollout
    monkeypatch.setattr(train_ppo, "score_rollout", lambda *more: seen.append(more[1:3]) or real(*more))
    ended = runs.train("ppo", "own", *LAST, "--reference", path)
    assert ended.code == 0 and len(seen) > 0, ended
    policy, ref = seen[0]
    assert policy.first == 1 and ref.first == first
    assert adapters.same_memory(policy, ref, 1) == bool(first)


def test_ranks_add_the_gradients_of_what_learns(make_model, monkeypatch):
    """Each tensor that learns is summed over ranks, with a gradient here or not; what is frozen stays without one."""
    model = learner(make_model(), "lm", part(rank=2, layers=1), seeded())
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: summed.append(t) or t.add_(1))
    model.h[1].mlp.c_fc.a.grad = torch.ones_like(model.h[1].mlp.c_fc.a)
    run = SimpleNamespace(world=2, together=lambda: runtime.Run.together(run), rank=0)
    runtime.Run.sum_gradients(run, model.parameters())
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(summed) == 8 and found == what_learns(model)
    assert (model.h[1].mlp.c_fc.a.grad == 2).all() and (model.h[1].mlp.c_fc.b.grad == 1).all()


# ---- whole runs

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 260, "block_size": 12}
LLAMA = SIZES | {"family": "llama", "n_kv_head": 1, "head_size": 8, "n_inner": 48, "tied": False}
SHAPE = {"own": ["--n_layer", "2"], "folder": ["--n_layer", "2", "--n_embd", "32"]}
LORA = ["--lora_rank", "2", "--lora_alpha", "8"]
LAST = [*LORA, "--lora_layers", "1"]
STAGES = pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])


class World:
    """`tiny`, with SFT and reward models of two blocks that are our own ("own") or another program's ("folder"; its
    reward model's file holds adapters). `chain`: SFT model, reward model and policy of adapters on the folder."""

    def __init__(self, tiny, make_model):
        self.tiny, self.count = tiny, 0
        self.starts = {"own": self.made("sft", *SHAPE["own"], "--num_train_epochs", "4", "--learning_rate", "0.05"),
                       "folder": self.write("llama", make_model(**LLAMA))}
        self.rms = {"own": self.made("rm", "--init_from", self.starts["own"])}
        sft = self.made("sft", *LORA, *SHAPE["folder"], "--init_from", self.starts["folder"], "--eval_interval", "2")
        self.rms["folder"] = self.made("rm", *LAST, "--lora_rank", "3", "--init_from", sft)
        ppo = self.made("ppo", *LAST, "--init_from", sft, "--reward_model", self.rms["folder"])
        self.chain = {"sft": sft, "rm": self.rms["folder"], "ppo": ppo}

    def made(self, stage, *more):
        ended = self.tiny.train(stage, *more)
        assert ended.code == 0, ended
        return str(ended.folder)

    def write(self, kind, model):
        """Another program's folder or .gguf file, with a tokenizer of bytes and three pairs."""
        self.count += 1
        folder = self.tiny.folder / f"theirs.{self.count}"
        folder.mkdir()
        letters = {letter: i for i, letter in enumerate(BYTE_OF)} | {"de": 256, "df": 257, "dg": 258}
        merges = ["d e", "d f", "d g"]
        if kind == "gguf":
            path = folder / "base.gguf"
            path.write_bytes(gguf("gpt2", model, **{
                "tokenizer.ggml.tokens": [*letters, "<|endoftext|>"], "tokenizer.ggml.merges": merges,
                "tokenizer.ggml.token_type": [1] * 259 + [3], "tokenizer.ggml.pre": "gpt-2",
                "tokenizer.ggml.eos_token_id": 259}))
            return str(path)
        (folder / "config.json").write_text(json.dumps(config_of(kind, model)))
        (folder / "model.safetensors").write_bytes(safetensors(tensors_of(model)))
        (folder / "tokenizer.json").write_text(json.dumps({
            "added_tokens": [{"id": 259, "content": "<|endoftext|>"}], "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {"type": "BPE", "vocab": letters, "merges": merges}}))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        return str(folder)

    def train(self, stage, start, *more, **where):
        more = [*SHAPE[start], *more] if stage == "sft" else more
        more = ["--reward_model", self.rms[start], *more] if stage == "ppo" else more
        return self.tiny.train(stage, "--init_from", self.starts[start], *more, **where)


@pytest.fixture(scope="module")
def runs(tiny):
    """None of them waits for the disk."""
    def make_model(head="lm", **shape):
        model = GPT(GPTConfig(**shape), head)
        for name, p in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(p, mean, 0.2, generator=seeded(5))
        model.get_parameter("wte.weight" if model.config.tied else "lm_head.weight").data[259] *= 6  # ends now and then
        return model.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        made = World(tiny, make_model)
        made.make_model = make_model
        yield made


@pytest.fixture
def quick(monkeypatch):
    """Stage 3 without evaluations, which take longer than its steps; stage 1's best model is its last."""
    real, losses = evaluate.held_out_loss, iter(range(99, 0, -1))

    def held_out_loss(model, *more):
        real(model, *more)
        return {"all": {"nats_per_token": float(next(losses) % 2), "bits_per_byte": 1.0}}
    monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)
    monkeypatch.setattr(evaluate.AgainstSFT, "evaluation", lambda *arguments: {})
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *arguments: None)


@pytest.fixture
def saved(monkeypatch):
    """Each model that is saved, the very one."""
    models, real = [], checkpoint.save

    def noting(path, *, model, **more):
        models.append(model)
        return real(path, model=model, **more)
    monkeypatch.setattr(checkpoint, "save", noting)
    return models


WAYS = {"adapters": ("own", LORA), "adapters of another's": ("folder", LAST),
        "a frozen block": ("own", ["--freeze_layers", "1"])}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@STAGES
@EVERY_WAY
def test_a_run_goes_on_to_the_last_bit(runs, stopping, saved, quick, stage, way):  # noqa: F811
    """Stopped before its first evaluation, or in the middle: weights, moments and figures end as those of one process.
    The file gives the logits, or scores, of the model that was trained, up to rounding."""
    start, options = WAYS[way]
    options = [*options, *{"sft": ["--dropout", "0.3", "--eval_interval", "2"], "rm": ["--dropout", "0.3"],
                           "ppo": ["--total_episodes", "12"]}[stage]]
    straight = runs.train(stage, start, *options)
    assert straight.code == 0, straight
    stopping(1 if stage == "sft" else 2)
    ended = runs.train(stage, start, *options)
    assert ended.code == 143, ended
    ended = runs.train(stage, start, *options, "--resume", out=ended.folder)
    assert ended.code == 0 and len(straight.rows()) >= 3
    one, other = straight.payload(), ended.payload()
    for key in ("model", "training"):
        assert equal(one[key], other[key]) and tensors(one[key])
    assert without_clocks(straight.rows()) == without_clocks(ended.rows())
    assert stage == "ppo" or straight.rows("samples.jsonl") == ended.rows("samples.jsonl")
    assert [("base" in p, p["format"]) for p in (one, other)] == [(True, 2) if start == "folder" else (False, 1)] * 2
    loaded = checkpoint.load(str(ended.folder), [stage], CPU)[0]
    assert adapters.is_partial(saved[-1]) and not adapters.is_partial(loaded) and loaded.first == 0
    with torch.no_grad():
        tokens = torch.randint(260, (4, 9), generator=seeded())
        torch.testing.assert_close(loaded(tokens), saved[-1].eval()(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_best_weights_outlive_a_stop(runs, stopping, monkeypatch, way):  # noqa: F811
    """Held-out losses of 1, 2, 3: others get the weights of the first evaluation, though the run was stopped and went
    on twice since, from its last weights."""
    start, options = WAYS[way]
    seen, real = [], evaluate.held_out_loss

    def held_out_loss(model, *more):
        real(model, *more)
        seen.append((merged(model), {k: v.clone() for k, v in adapters.trained(model).items()}))
        return {"all": {"nats_per_token": float(len(seen)), "bits_per_byte": 1.0}}
    monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)
    options = [*options, "--eval_interval", "1", "--learning_rate", "0.05", "--muon_learning_rate", "0.1"]
    stopping(1, 2)
    ended = runs.train("sft", start, *options)
    while ended.code == 143:
        ended = runs.train("sft", start, *options, "--resume", out=ended.folder)
    payload = ended.payload()
    assert len(seen) == 3 and payload["info"]["nats_per_token"] == 1 and not equal(seen[0][1], seen[2][1])
    assert equal(payload["training"]["model"], seen[2][1])
    assert equal(payload["model"], seen[0][start == "folder"])
    assert (start == "folder") != ("best" in payload["training"])
    loaded = checkpoint.load(str(ended.folder), ["sft"], CPU)[0]
    assert equal(loaded.state_dict(), {k: v for k, v in seen[0][0].items()})


@pytest.mark.parametrize("best", [7, {}, {"h.0.attn.c_attn.a": torch.zeros(2, 8)}])
def test_best_weights_that_are_damaged(runs, stopping, best):  # noqa: F811
    """A run does not go on to save them."""
    stopping(2)
    ended = runs.train("sft", "own", *LORA, "--eval_interval", "1")
    payload = ended.payload()
    payload["training"]["best"] = best
    torch.save(payload, ended.folder / "ckpt.pt")
    again = runs.train("sft", "own", "--resume", out=ended.folder)
    assert again.code == 2 and "does not fit" in again.error and again.error.count("\n") == 1


@pytest.mark.parametrize("stage, way", [(stage, way) for stage in ("sft", "rm", "ppo") for way in WAYS if stage == "sft"
                                        or way != "adapters"])
def test_check_passes(runs, stage, way):
    """Each of its lines."""
    start, options = WAYS[way]
    ended = runs.train(stage, start, *options, "--check")
    assert ended.code == 0 and ended.said.endswith("all checks passed\n"), ended
    assert ended.said.count("\nok    ") >= 6 and "FAIL" not in ended.said


@pytest.mark.parametrize("options", [LORA, LAST, ["--freeze_layers", "1"]], ids=["all", "last", "frozen"])
def test_a_run_writes_to_nothing_that_is_frozen(runs, quick, loaded, options):
    """Stage 3: reference and reward model are as they were, and in the policy's file all but what learns is theirs."""
    payload = runs.train("ppo", "own", *options).payload()
    assert len(loaded) == 2 and all(equal(model.state_dict(), before) for model, before in loaded.values())
    moved = {name for name, tensor in payload["model"].items() if not torch.equal(tensor, loaded["sft"][1][name])}
    blocks = (0, 1) if options is LORA else (1,)
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    matrices = {f"h.{i}.{layer}.weight" for i in blocks for layer in layers}
    more = {f"h.1.{name}" for name in WHOLE} | {"ln_f.weight", "ln_f.bias"} if "--freeze_layers" in options else set()
    assert moved == matrices | more
    kept = payload["training"]
    assert "wte.weight" not in kept["value_model"] and {"score_head.weight", "gain"} <= kept["value_model"].keys()
    assert kept["model"].keys() == kept["value_model"].keys() - {"score_head.weight", "score_head.bias", "gain", "bias"}
    assert [len(o["state"]) for o in kept["optimizers"]] == [len(kept["model"]), len(kept["model"]) + 2]


# ---- files


def test_a_chain_on_another_program_s_model(runs, tmp_path, monkeypatch, capsys):
    """SFT model, reward model and policy hold what each learned, their predecessors' adapters, and where the base is.
    `load` gives the model that the run had in memory; `sample` and `evaluate` take it."""
    size = os.path.getsize(os.path.join(runs.starts["folder"], "model.safetensors"))
    expected = {"sft": [("lm", 2, 2)], "rm": [("lm", 2, 2), ("scalar", 3, 1)], "ppo": [("lm", 2, 2), ("lm", 2, 1)]}
    for stage, path in runs.chain.items():
        payload = torch.load(f"{path}/ckpt.pt", weights_only=True)
        entries = payload["base"]["adapters"]
        assert payload["format"] == 2 and payload["base"]["path"] == runs.starts["folder"]
        assert [(e["head"], e["lora_rank"], e["lora_layers"]) for e in entries] == expected[stage]
        assert all(e["lora_alpha"] == 8 for e in entries)
        assert ["model" in e for e in entries] == [True] * (len(entries) - 1) + [False]
        assert all(name.rpartition(".")[2] in "ab" or name in ("score_head.weight", "score_head.bias", "gain", "bias")
                   for e in [payload, *entries[:-1]] for name in e["model"])
        held = sum(t.numel() * 4 for t in tensors({k: payload[k] for k in ("model", "base")}).values())
        assert held < size / 5 and os.path.getsize(f"{path}/ckpt.pt") < (1.2 if stage == "ppo" else 1) * size
    # By hand: W + (8 / 2) B A of stage 1, then the same of stage 3 in the last block.
    base = checkpoint.load(runs.starts["folder"], ["sft"], CPU)[0]
    policy = checkpoint.load(runs.chain["ppo"], ["ppo"], CPU)[0]
    payload = torch.load(f"{runs.chain['ppo']}/ckpt.pt", weights_only=True)
    for i in (0, 1):
        weight = base.h[i].attn.c_attn.weight.clone()
        for model in [payload["base"]["adapters"][0]["model"], payload["model"]][:i + 1]:
            a, b = (model[f"h.{i}.attn.c_attn.{x}"] for x in "ab")
            assert b.any()
            weight += 4.0 * b @ a
        torch.testing.assert_close(policy.h[i].attn.c_attn.weight, weight)
    monkeypatch.chdir(tmp_path)
    prompts = str(runs.tiny.folder / "data" / "prompts.val.jsonl")
    sample.main([runs.starts["folder"], *runs.chain.values(), "--prompt", "ad", "--response_length", "3",
                 "--device", "cpu"])
    evaluate.main([runs.chain["ppo"], "--baseline", runs.chain["sft"], "--reward_model", runs.chain["rm"],
                   "--prompts", prompts, "--device", "cpu"])
    assert "ad" in capsys.readouterr().out


def test_full_training_of_another_s_model_holds_all_of_it(runs):
    """Also where it has adapters already; so does a frozen block's. Format 1, which older versions read."""
    for more in ([], ["--freeze_layers", "1"]):
        payload = runs.tiny.train("sft", *SHAPE["folder"], *more, "--init_from", runs.chain["sft"]).payload()
        assert payload["format"] == 1 and "base" not in payload and "wte.weight" in payload["model"]


def test_adapters_on_a_gguf_file(runs, tmp_path, monkeypatch):
    """As on a folder; the file may move beside the checkpoint or into MINIRLHF_CACHE, and stages that go on from it
    there note its new place."""
    base = runs.write("gguf", runs.make_model(**SIZES))
    folder = runs.tiny.train("sft", *SHAPE["folder"], *LORA, "--init_from", base).folder
    model, tokenizer, _ = checkpoint.load(str(folder), ["sft"], CPU)
    before = model.state_dict()
    assert tokenizer.name == "base"  # the file's, wherever it lies
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path))
    for place in (tmp_path, folder):
        moved = shutil.move(base, place / "base.gguf")
        assert equal(checkpoint.load(str(folder / "ckpt.pt"), ["sft"], CPU)[0].state_dict(), before)
        base = moved
    monkeypatch.chdir(folder)
    assert equal(checkpoint.load("ckpt.pt", ["sft"], CPU)[0].state_dict(), before)
    rm = runs.tiny.train("rm", *LORA, "--init_from", folder).folder
    assert torch.load(rm / "ckpt.pt", weights_only=True)["base"]["path"] == str(folder / "base.gguf")
    assert checkpoint.load(str(rm), ["rm"], CPU)[0].head == "scalar"
    assert runs.tiny.train("rm", "--resume", *LORA, "--init_from", folder, out=rm).code == 0


def test_a_base_that_is_gone_or_another(runs, tmp_path, monkeypatch, refused):
    """One line that names the file, the base and what to do."""
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    copied = shutil.copytree(runs.chain["sft"], tmp_path / "sft")
    payload = torch.load(copied / "ckpt.pt", weights_only=True)
    base = shutil.copytree(runs.starts["folder"], tmp_path / "away" / "theirs")
    payload["base"]["path"] = str(base)
    torch.save(payload, copied / "ckpt.pt")
    load = checkpoint.load
    assert load(str(copied), ["sft"], CPU)[0].config.n_layer == 2
    with open(base / "config.json", "a") as f:
        f.write(" ")
    error = refused(load, str(copied), ["sft"], CPU)
    assert str(copied / "ckpt.pt") in error and str(base) in error and "another model now" in error
    shutil.rmtree(base)
    error = refused(load, str(copied), ["sft"], CPU)
    for words in (copied / "ckpt.pt", base, "is not there", copied / "theirs", tmp_path / "cache" / "theirs",
                  "put the model that they were trained on into", "MINIRLHF_CACHE"):
        assert str(words) in error
    os.mkdir(base)
    os.symlink("nowhere", base / "config.json")
    error = refused(load, str(copied), ["sft"], CPU)
    assert str(copied / "ckpt.pt") in error and f"{base / 'config.json'} cannot be read" in error
    shutil.rmtree(base)
    (tmp_path / "cache" / "theirs").mkdir(parents=True)
    assert "another model now" in refused(load, str(copied), ["sft"], CPU)
    sample_of = tmp_path / "sft"
    assert str(base) in refused(sample.main, [str(sample_of), "--prompt", "ad", "--device", "cpu"])


def test_a_name_in_the_working_folder_is_not_the_fetched_base(runs, tmp_path, monkeypatch, refused):
    """Adapters on smollm2 stand on the file that was fetched, whatever model has the name where the user is (by which
    neither can then be named); a folder of other things does not hide it either."""
    base, other = (runs.write("gguf", runs.make_model(**SIZES | more)) for more in ({}, {"n_layer": 1}))
    monkeypatch.setattr(checkpoint.fetch, "smollm2", lambda: base)
    monkeypatch.chdir(tmp_path)
    os.makedirs("smollm2/sft")
    assert checkpoint.files_of("smollm2") == [base]
    folder = runs.tiny.train("sft", *SHAPE["folder"], *LORA, "--init_from", "smollm2").folder
    payload = torch.load(folder / "ckpt.pt", weights_only=True)
    before = checkpoint.load(str(folder), ["sft"], CPU)[0]
    assert payload["base"]["path"] == "smollm2" == before.base["path"]
    shutil.copy(runs.tiny.train("sft", "--n_layer", "1").folder / "ckpt.pt", "smollm2")
    assert checkpoint.files_of("./smollm2") == [os.path.join(".", "smollm2", "ckpt.pt")]
    assert "here of one of yours" in refused(checkpoint.files_of, "smollm2")
    assert equal(checkpoint.load(str(folder), ["sft"], CPU)[0].state_dict(), before.state_dict())


def test_only_files_that_are_read_are_compared(runs, tmp_path):
    """What else lies in a base's folder may come, go and change."""
    copied = shutil.copytree(runs.starts["folder"], tmp_path / "base")
    before = pretrained.files(str(copied))
    assert [os.path.basename(path) for path in before] == ["config.json", "model.safetensors", "tokenizer.json",
                                                           "tokenizer_config.json"]
    for name in ("training_args.bin", "tokenizer.model.json", "adapter.safetensors", "merges.txt", "pytorch_model.bin"):
        (copied / name).write_text("x")
    assert pretrained.files(str(copied)) == before
    (copied / "model.safetensors").rename(copied / "a.safetensors")
    (copied / "pytorch_model.bin").unlink()
    (copied / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert {"a.safetensors", "model.safetensors.index.json"} == {
        os.path.basename(path) for path in pretrained.files(str(copied)) if "safetensors" in path}


def test_a_base_that_has_moved_is_named_anew(runs, stopping, tmp_path):  # noqa: F811
    """--resume of stage 1 says how, and goes on so."""
    stopping(1)
    base = shutil.copytree(runs.starts["folder"], tmp_path / "base")
    ended = runs.train("sft", "folder", *LORA, "--init_from", base)
    stopping()
    moved = shutil.move(base, tmp_path / "moved")
    again = runs.tiny.train("sft", *SHAPE["folder"], "--resume", out=ended.folder)
    assert again.code == 2 and f"{base}: is no longer there" in again.error and "place with --init_from" in again.error
    assert runs.tiny.train("sft", *SHAPE["folder"], "--resume", "--init_from", moved, out=ended.folder).code == 0


def test_a_merged_model_is_not_kept_for_a_stage_without_a_best(runs, stopping, monkeypatch):  # noqa: F811
    """Stage 2, whose file holds the whole model: it has no use for it."""
    kept, real = [], checkpoint.Training.restore
    monkeypatch.setattr(checkpoint.Training, "restore", lambda *more: kept.append(real(*more)) or kept[-1])
    stopping(1)
    ended = runs.train("rm", "own", *LORA)
    stopping()
    assert runs.train("rm", "own", "--resume", out=ended.folder).code == 0
    assert [more.get("best") for _, more in kept] == [None, None] and kept[1][0] == 1


def test_a_resumed_run_compares_its_base(runs, stopping):  # noqa: F811
    """A run of adapters goes on from the very model it began with."""
    stopping(1)
    ended = runs.train("sft", "folder", *LORA)
    stopping()
    other = runs.write("llama", runs.make_model(**LLAMA | {"rope_theta": 99.0}))
    again = runs.train("sft", "folder", *LORA, "--resume", "--init_from", other, out=ended.folder)
    assert again.code == 2 and "is not what the run of" in again.error and "--init_from" in again.error


def change(payload, *keys, to):
    for key in keys[:-1]:
        payload = payload[key]
    payload[keys[-1]] = to


@pytest.mark.parametrize("keys, value, words", [
    (("lora_rank",), 3, "rank 3"), (("lora_rank",), 10 ** 12, "rank 1000000000000"), (("lora_rank",), 2.0, "rank 2.0"),
    (("lora_rank",), 0, "rank 0"), (("lora_rank",), -2, "rank -2"), (("lora_rank",), True, "rank True"),
    (("lora_alpha",), float("inf"), "alpha inf"), (("lora_alpha",), float("nan"), "alpha nan"),
    (("lora_alpha",), "8", "alpha 8"), (("lora_alpha",), 0.0, "alpha 0"), (("lora_layers",), 3, "3 blocks"),
    (("lora_layers",), -1, "-1 blocks"), (("lora_layers",), 10 ** 30, "blocks"), (("lora_layers",), 1, "does not fit"),
    (("head",), "scalar", "does not fit"), (("head",), "x", "under the head 'x'"), (("head",), [1], "head"),
    (("model",), {}, "the last of the adapters are the file's own"),
    (("lora_alpha",), 9.0, "not those that were saved")])
def test_an_entry_of_adapters_that_is_damaged(runs, tmp_path, refused, keys, value, words):
    """Wrong types, ranks, blocks, heads: one line that names the file."""
    payload = torch.load(f"{runs.chain['sft']}/ckpt.pt", weights_only=True)
    change(payload, "base", "adapters", 0, *keys, to=value)
    torch.save(payload, tmp_path / "ckpt.pt")
    error = refused(checkpoint.load, str(tmp_path), ["sft"], CPU)
    assert str(tmp_path / "ckpt.pt") in error and words in error, error


def test_a_rank_is_that_of_weights(runs, tmp_path, refused):
    """Before anything of its size is made."""
    payload = torch.load(f"{runs.chain['sft']}/ckpt.pt", weights_only=True)
    payload["model"] = {}
    change(payload, "base", "adapters", 0, "lora_rank", to=10 ** 9)
    torch.save(payload, tmp_path / "ckpt.pt")
    assert "adapters of rank 1000000000 and" in refused(checkpoint.load, str(tmp_path), ["sft"], CPU)


@pytest.mark.parametrize("spoil", [
    lambda p: p["base"].pop("path"), lambda p: p["base"].pop("files"), lambda p: p["base"].pop("adapters"),
    lambda p: p["base"].update(path="/"), lambda p: p["base"].update(path=["x"]),
    lambda p: p["base"].update(path="a\0b"),
    lambda p: p["base"].update(files=None), lambda p: p.update(base=[]), lambda p: p["base"].update(adapters=5),
    lambda p: p["base"].update(adapters=[]), lambda p: p["base"]["adapters"].append({}),
    lambda p: p["base"]["adapters"][0].pop("head"), lambda p: p.update(model={}),
    lambda p: p["model"].pop("h.1.mlp.c_fc.b"),
    lambda p: p["model"].update({"h.1.mlp.c_fc.b": torch.zeros(96, 3)}), lambda p: p["model"].update(x=torch.zeros(1)),
    lambda p: p["config"].update(n_layer=3), lambda p: p["config"].update(block_size=99),
    lambda p: p["config"].update(norm_eps=0.5), lambda p: p.update(format=1) or p["base"].update(adapters=[None])])
def test_a_base_that_is_damaged(runs, tmp_path, refused, spoil):
    """Keys that are missing, or hold something else: one line."""
    payload = torch.load(f"{runs.chain['sft']}/ckpt.pt", weights_only=True)
    spoil(payload)
    torch.save(payload, tmp_path / "ckpt.pt")
    refused(checkpoint.load, str(tmp_path), ["sft"], CPU)


def test_a_chain_is_the_one_that_was_saved(runs, tmp_path, refused):
    """Without its first adapters, with other numbers in them, or numbers of another kind."""
    def spoiled(spoil):
        payload = torch.load(f"{runs.chain['ppo']}/ckpt.pt", weights_only=True)
        spoil(payload)
        torch.save(payload, tmp_path / "ckpt.pt")
        return refused(checkpoint.load, str(tmp_path), ["ppo"], CPU)
    assert "not those that were saved" in spoiled(lambda p: p["base"]["adapters"].pop(0))
    assert "not those that were saved" in spoiled(lambda p: p["model"]["h.1.mlp.c_fc.b"].add_(1))
    assert "not those that were saved" in spoiled(
        lambda p: p["base"]["adapters"][0]["model"]["h.0.mlp.c_fc.a"].neg_())
    for change in (lambda p: p["base"]["adapters"][0]["model"], lambda p: p["model"]):
        assert "h.1.mlp.c_fc.b is of torch.int64" in spoiled(
            lambda p: change(p).update({"h.1.mlp.c_fc.b": change(p)["h.1.mlp.c_fc.b"].long()}))
    payload = torch.load(f"{runs.chain['ppo']}/ckpt.pt", weights_only=True)
    del payload["base"]["chain"]  # as in files of early versions
    torch.save(payload, tmp_path / "ckpt.pt")
    assert checkpoint.load(str(tmp_path), ["ppo"], CPU)


def test_a_context_that_the_base_does_not_have(runs, tmp_path, refused):
    payload = torch.load(f"{runs.chain['sft']}/ckpt.pt", weights_only=True)
    payload["config"]["block_size"] = 99
    torch.save(payload, tmp_path / "ckpt.pt")
    error = refused(checkpoint.load, str(tmp_path), ["sft"], CPU)
    assert f"{tmp_path / 'ckpt.pt'}: does not fit: 99 tokens" in error and "--block_size" not in error


@cases(25, 3000)
def test_any_base(numbers, runs, tmp_path):
    """A value of "base", "model" or "config", however deep, replaced, left out or doubled: refused in a line, or a
    model of finite weights of the base's shapes."""
    payload = torch.load(f"{runs.chain['rm']}/ckpt.pt", weights_only=True)
    shapes = {k: v.shape for k, v in checkpoint.load(runs.chain["rm"], ["rm"], CPU)[0].state_dict().items()}
    path = tmp_path / "ckpt.pt"
    for number in numbers:
        with case(number) as rng:
            what = rng.choice(["base", "base", "model", "config"])
            torch.save({**payload, what: mutated_value(rng, payload[what])}, path)
            loaded, error = attempt(checkpoint.load, str(path), ["rm"], CPU)
            if loaded is None:
                assert str(path) in error or "--" in error
            else:
                state = loaded[0].state_dict()
                assert {k: v.shape for k, v in state.items()} == shapes
                assert all(v.isfinite().all() for v in state.values())


# ---- options


@STAGES
@pytest.mark.parametrize("options, words", [
    ([*LORA, "--freeze_layers", "1"], "--freeze_layers 1: excludes --lora_rank 2"),
    (["--freeze_layers", "2"], "--freeze_layers 2: the model has 2 blocks, and one at least must learn"),
    (["--lora_rank", "2", "--lora_alpha", "0"], "--lora_alpha"), (["--lora_rank", "-1"], "--lora_rank"),
    (["--lora_rank", "5000"], "--lora_rank")])
def test_options_that_do_not_go_together(runs, stage, options, words):
    ended = runs.train(stage, "own", *options)
    assert ended.code == 2 and words in ended.error and ended.error.count("\n") == 1 and not ended.folder.exists()


@pytest.mark.parametrize("options", [LORA, ["--freeze_layers", "1"]])
def test_random_weights_are_not_frozen(tiny, options):
    """--init_from scratch."""
    ended = tiny.train("sft", *options)
    assert ended.code == 2 and f"{options[0]} {options[1]}: freezes random weights" in ended.error


def test_a_folder_named_scratch_is_a_model_to_other_stages(runs, tmp_path, monkeypatch):
    """Random weights are what the name says in stage 1 alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs.starts["own"], "scratch")
    assert runs.train("rm", "own", *LORA, "--init_from", "scratch").code == 0


@pytest.mark.parametrize("words", [["--n_layer", "2"], ["--vocab_size", "300", "--n_embd", "32"],
                                   ["--tokenizer", "gpt2"]])
def test_sizes_without_scratch(monkeypatch, refused, words):
    """Refused before anything is fetched or read, with the way to a model of that size."""
    monkeypatch.setattr(checkpoint, "located", lambda path: pytest.fail("fetched"))
    error = refused(train_sft.main, words)
    assert f"@scratch {' '.join(words)}" in error


def test_another_program_s_tokenizer_stays(runs):
    """--tokenizer is of models from scratch, as the sizes are."""
    ended = runs.train("sft", "folder", *LORA, "--tokenizer", "gpt2")
    assert ended.code == 2 and "--tokenizer gpt2: " in ended.error and "leave the option out" in ended.error


def test_options_without_adapters_are_idle(runs):
    """--lora_alpha and --lora_layers are told to have no effect, however many layers; they have none."""
    ended = runs.train("rm", "own", "--lora_alpha", "9", "--lora_layers", "7")
    for name in ("lora_alpha", "lora_layers"):
        assert f"warning: --{name} has no effect with --lora_rank 0" in ended.said
    assert ended.code == 0 and "of them learn" not in ended.said and " parameters, trunk from " in ended.said
    assert equal(ended.payload()["model"], torch.load(f"{runs.rms['own']}/ckpt.pt", weights_only=True)["model"])


@STAGES
@pytest.mark.parametrize("name, value", [("lora_rank", "3"), ("lora_alpha", "2"), ("lora_layers", "2"),
                                         ("freeze_layers", "1")])
def test_what_learns_cannot_change_on_resume(runs, finished, stage, name, value):
    ended = runs.train(stage, "own", "--resume", f"--{name}", value, out=finished[stage])
    assert ended.code == 2 and f"--resume: --{name} {value}" in ended.error and "cannot change" in ended.error


@pytest.fixture(scope="module")
def finished(runs):
    return {stage: runs.train(stage, "own", *LAST).folder for stage in ("sft", "rm", "ppo")}


def test_every_stage_has_the_four(runs):
    """In the same words, and each of them stays."""
    assert {*adapters.OPTIONS} <= {name for name in vars(RunOptions())}
    assert [getattr(RunOptions(), name) for name in adapters.OPTIONS] == [16, 32.0, 0, 0]


# ---- fewer held-out texts


def test_rows_spread_evenly():
    """Row i of n of N is row i N / n, rounded down; 0 and what is not fewer take all."""
    rows = [*range(10)]
    assert spread(rows, 3) == [0, 3, 6] and spread(rows, 4) == [0, 2, 5, 7] and spread(rows, 1) == [0]
    assert spread(rows, 9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert spread(rows, 0) == spread(rows, 10) == spread(rows, 11) == rows


def test_pairs_among_few_texts(monkeypatch):
    """Records are drawn in the order z, y, x until two texts are chosen: z has c and d, which are also a pair of x.
    Three texts: y adds a and b. All texts of a record are chosen, also where they are more than were asked for."""
    a, b, c, d = (Row([i], 0) for i in range(4))
    records = [([a, c, d], [(0, 1), (2, 1)], "x"), ([a, b], [(0, 1)], "y"), ([Row([3], 0), Row([2], 0)], [(1, 0)], "z")]
    monkeypatch.setattr(data.torch, "randperm", lambda n, generator: torch.tensor([2, 1, 0]))
    assert data.among(records, 2) == [(records[0][0], [(2, 1)], "x"), records[2]] == data.among(records, 1)
    assert data.among(records, 3) == records == data.among(records, 99)


def test_a_sample_of_pairs():
    """Of 1,000 pairs that share no texts, 250 have 500 texts; of all pairs of 40 texts, 20 texts have about a quarter,
    and come from all over. A second time they are the same ones."""
    apart = [([Row([2 * i], 1), Row([2 * i + 1], 1)], [(0, 1)], None) for i in range(1000)]
    assert len(data.among(apart, 500)) == 250
    texts = [Row([i, i + 1], 1) for i in range(40)]
    records = [([texts[i], texts[j]], [(0, 1)], None) for i in range(40) for j in range(i)]
    found = data.among(records, 20)
    few = {row.ids[0] for rows, _, _ in found for row in rows}
    assert len(few) in (20, 21) and len(found) == len(few) * (len(few) - 1) / 2 and found == data.among(records, 20)
    assert 5 <= len(few & {*range(20)}) <= 15


@pytest.mark.parametrize("stage, rows", [("sft", 2), ("rm", 3)])
def test_fewer_texts_are_evaluated(runs, monkeypatch, stage, rows):
    """--num_eval_texts: an evaluation takes that many, training all; of pairs it says how many are left out."""
    name = {"sft": "held_out_loss", "rm": "reward_model_figures"}[stage]
    real, seen = getattr(evaluate, name), []

    def look(model, run, held_out, *more):
        seen.append(held_out)
        return real(model, run, held_out, *more)
    monkeypatch.setattr(evaluate, name, look)
    first, few = (runs.train(stage, "own", *more) for more in ([], ["--num_eval_texts", str(rows)]))
    assert len(first.rows()) == len(few.rows()) and len(seen) == 2
    if stage == "sft":
        assert seen[1] == tuple(spread(seen[0], rows)) and len(seen[1]) == rows
    else:
        assert seen[1] == data.among(seen[0], rows) and len(seen[1]) < len(seen[0])
        assert f"held-out records: {len(seen[0]) - len(seen[1])} of {len(seen[0])} left out" in few.said
