"""Sampling against the model without a cache, and against chains whose answers are known by hand."""
import contextlib
import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from conftest import LLAMA, both_families
from minirlhf import generate as generation
from minirlhf.generate import Decoder, KVCache, Rollout, generate, sample
from minirlhf.kernels import CAN_PACK, packed
from minirlhf.model import GPTConfig
from minirlhf.objectives import token_logprobs

PROMPTS = [[1], [2, 3, 4, 5, 6, 7], [8, 0, 9], [1, 1], [0], [5, 4, 3, 2, 1], [12, 12, 12], [0, 0], [6, 2], [3]]
EOS = 0  # some prompts hold it, and begin or end with it
STEPS = 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def uniform(seed=0, rows=len(PROMPTS), steps=STEPS):
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def draw(monkeypatch):
    """draw(u): the numbers that `generate` will draw."""
    return lambda u: monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: u.reshape(shape).clone())


@pytest.fixture(autouse=True)
def dropped(monkeypatch):
    """Few rows leave the batch too."""
    monkeypatch.setattr(generation, "ROW_MULTIPLE", 1)


class Chain(torch.nn.Module):
    """A model whose next token depends on the last one alone: logits = table[token]. `calls`: each pass's shape."""
    decoder = None

    def __init__(self, table, block_size=64):
        super().__init__()
        self.config = GPTConfig(1, 1, 2, len(table), block_size)
        self.wte = torch.nn.Embedding(len(table), 2)
        self.table, self.calls = table, []

    def needed(self, tokens, select):
        return None

    def hidden(self, tokens, cache, positions, select=None, places=None):
        self.calls.append(tuple(tokens.shape))
        return self.table[tokens] if select is None else self.table[tokens.flatten()[select]]

    def logits(self, hidden):
        return hidden


def sure(*following):
    """The chain in which token i is followed by following[i] for certain."""
    return Chain(torch.full((len(following),) * 2, -torch.inf).scatter(1, torch.tensor(following)[:, None], 0.0))


# Cache


@both_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_equals_uncached_at_every_step(make_model, dtype, shape):
    """Prefill of ragged prompts, then one token a row: hidden states and logits are those of a pass without a cache."""
    model = make_model(dtype=dtype, **shape)
    rows = [torch.randint(13, (n + 8,), generator=torch.Generator().manual_seed(n)) for n in (1, 6, 3)]
    lengths = torch.tensor([1, 6, 3])
    tokens = pad_sequence([row[:n] for row, n in zip(rows, lengths)], True, 12)
    cache = KVCache(model, 3, 14)
    cache.k.fill_(1e4), cache.v.fill_(1e4)  # an unwritten slot that is read shows
    cache.filled = 6
    hidden = model.hidden(tokens, cache, torch.arange(6)[None])[torch.arange(3), lengths - 1]
    for n in range(9):
        for b, row in enumerate(rows):
            alone = model.hidden(row[None, :lengths[b] + n])[0, -1]
            torch.testing.assert_close(hidden[b], alone, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)
            torch.testing.assert_close(model.logits(hidden[b]), model.logits(alone), rtol=1e-4, atol=1e-4)
        if n < 8:
            at = lengths + n
            cache.filled = 6 + n + 1
            hidden = model.hidden(torch.stack([row[i] for row, i in zip(rows, at)])[:, None], cache, at[:, None])[:, 0]


@both_families
def test_a_cache_takes_several_tokens_at_once(make_model, shape):
    """Prefill in pieces of any size equals prefill in one."""
    model, tokens = make_model(**shape), torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    cache, parts = KVCache(model, 2, 9), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        cache.filled = end
        parts.append(model.hidden(tokens[:, start:end], cache, torch.arange(start, end)[None]))
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(tokens), rtol=1e-4, atol=1e-4)


@both_families
def test_a_prefill_leaves_padding_out(make_model, monkeypatch, shape):
    """What is computed of prompts of 1, 6 and 3 tokens is 10 places of 18, where the model leaves padding out at all;
    their answers are the same."""
    model, places, rollouts = make_model(**shape), [], []
    model.h[0].mlp.register_forward_pre_hook(lambda _, x: places.append(x[0].numel() // x[0].shape[-1]))
    for without_padding in (False, True):
        monkeypatch.setattr(GPTConfig, "leaves_padding_out", without_padding)
        places.clear()
        rollouts.append(generate(model, [[1], [2] * 6, [3] * 3], 8, EOS, generator=torch.Generator().manual_seed(1)))
        assert places[0] == (10 if without_padding else 18)
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens) and rollouts[0].lengths.max() > 8
    torch.testing.assert_close(rollouts[0].sampler_logprobs, rollouts[1].sampler_logprobs)


# Sampling


def test_sample_by_hand():
    """Probabilities 1/2, 1/4, 1/4: u below 1/2 takes token 0, below 3/4 token 1, else token 2; each with its log p."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(6, 3) + 3
    tokens, logprobs = sample(logits, 1.0, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2 ** -24]))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25]).log())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    """Weights 1, 4, 16 become 1, 4^(1/T), 16^(1/T): at T = 2 that is 1/7, 2/7, 4/7 of the draws."""
    n, weights = 100_000, torch.tensor([1.0, 4.0, 16.0])
    expected = weights ** (1 / temperature) / (weights ** (1 / temperature)).sum()
    u = (torch.arange(n) + 0.5) / n  # evenly spread: shares are right to 1/n
    tokens, logprobs = sample(weights.log().expand(n, 3), temperature, u)
    torch.testing.assert_close(tokens.bincount(minlength=3) / n, expected, atol=2 / n, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("impossible", [[0], [4], [0, 1, 3, 4], [2], [1, 2, 3]])
def test_a_token_of_probability_0_is_never_sampled(temperature, impossible):
    """Whatever the uniform number, its extremes and what rounds to 1 included."""
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    logits[:, impossible] = -torch.inf
    for u in (0.0, 2 ** -24, 0.5, 1 - 2 ** -24, 1.0):
        tokens, logprobs = sample(logits, temperature, torch.full((200,), u))
        assert not set(tokens.tolist()) & set(impossible)
        assert logprobs.isfinite().all()


def test_frequencies_of_generated_tokens():
    """From token 1 the chain goes to 1, 2, 3 with .2, .3, .5, and from 2 to 0 or 3 with 1/2: so do 20,000 rollouts."""
    table = torch.tensor([[1, 0, 0, 0], [0, 0.2, 0.3, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]]).log()
    rollout = generate(Chain(table), [[1]] * 20_000, 2, EOS, generator=torch.Generator().manual_seed(0))
    first, second = rollout.tokens[:, 1], rollout.tokens[:, 2]
    shares = first.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0, 0.2, 0.3, 0.5]), atol=0.01, rtol=0)  # 3 standard errors
    ended = (second[first == 2] == EOS).double().mean().item()
    assert ended == pytest.approx(0.5, abs=0.02)  # .0065 a standard error: draws of the two steps are independent


# Whole answers


@both_families
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_generate_equals_a_loop_without_cache_or_batch(make_model, draw, temperature, shape):
    """Ragged prompts, rows ending at different steps: tokens, lengths and log-probabilities are those of each row
    alone, run through the whole model again for each token."""
    model, u = make_model(**shape), uniform()
    draw(u)
    rollout = generate(model, PROMPTS, STEPS, EOS, temperature)
    for b, prompt in enumerate(PROMPTS):
        row, logprobs = list(prompt), []
        while len(row) < len(prompt) + STEPS and (len(row) == len(prompt) or row[-1] != EOS):
            logits = model(torch.tensor([row]))[:, -1]
            token, logprob = sample(logits, temperature, u[b, len(row) - len(prompt)][None])
            row.append(token.item())
            logprobs.append(logprob)
        assert rollout.responses()[b] == row[len(prompt):]
        assert rollout.prompt_lengths[b] == len(prompt) and rollout.lengths[b] == len(row)
        assert rollout.finished[b] == (row[-1] == EOS)
        assert rollout.tokens[b].tolist() == row + [EOS] * (rollout.tokens.shape[1] - len(row))
        seen = rollout.sampler_logprobs[b]
        torch.testing.assert_close(seen[rollout.response_mask[b]], torch.cat(logprobs), rtol=1e-4, atol=1e-4)
        assert not seen[~rollout.response_mask[b]].any()
    assert rollout.tokens.shape[1] == rollout.lengths.max()  # cut to the longest row
    # the case is a fair one: rows end early, late and, of GPT-2's, not at all
    assert len(set((rollout.lengths - rollout.prompt_lengths).tolist())) > 4 and (shape or not rollout.finished.all())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampler_logprobs_equal_the_recomputed_ones(make_model, temperature):
    """One training forward over the finished rows gives the log-probabilities that the sampler saw."""
    model = make_model()
    rollout = generate(model, PROMPTS, STEPS, EOS, temperature, torch.Generator().manual_seed(3))
    logprobs = token_logprobs(model(rollout.tokens[:, :-1]) / temperature, rollout.tokens[:, 1:])
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.sampler_logprobs[mask], logprobs[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[3], [9, 2, 4], [1, 7], list(range(10))[::-1]])
def test_an_answer_does_not_depend_on_its_neighbours(make_model, draw, rows):
    """The same prompts with the same uniform numbers in other company, or alone: the same answers."""
    model, u = make_model(), uniform(1)
    draw(u)
    together = generate(model, PROMPTS, STEPS, EOS)
    draw(u[rows])
    apart = generate(model, [PROMPTS[r] for r in rows], STEPS, EOS)
    assert apart.responses() == [together.responses()[r] for r in rows]
    T = apart.tokens.shape[1]
    torch.testing.assert_close(apart.sampler_logprobs, together.sampler_logprobs[rows, :T - 1], rtol=1e-4, atol=1e-4)


def test_draws_come_from_the_generator_alone(make_model):
    """The same seed gives the same answers, another seed others; torch's global generator is neither read nor moved."""
    model, state = make_model(), torch.get_rng_state()

    def answers(seed):
        return generate(model, PROMPTS, STEPS, EOS, generator=torch.Generator().manual_seed(seed)).responses()

    first = answers(1)
    torch.manual_seed(5)
    assert answers(1) == first != answers(2)
    torch.set_rng_state(state)
    answers(1)
    assert torch.equal(torch.get_rng_state(), state)


# Ends


def test_a_known_chain():
    """1 -> 2 -> 3 -> 0 (eos): answers end with eos; a row that a limit of 2 stops before it is not finished."""
    rollout = generate(sure(1, 2, 3, 0), [[1], [3, 2], [3]], 5, EOS)
    assert rollout.responses() == [[2, 3, 0], [3, 0], [0]]
    assert rollout.tokens.tolist() == [[1, 2, 3, 0], [3, 2, 3, 0], [3, 0, 0, 0]]
    assert rollout.lengths.tolist() == [4, 4, 2] and rollout.finished.tolist() == [True] * 3
    short = generate(sure(1, 2, 3, 0), [[1], [3, 2], [3]], 2, EOS)
    assert short.responses() == [[2, 3], [3, 0], [0]]
    assert short.lengths.tolist() == [3, 4, 2] and short.finished.tolist() == [False, True, True]


def test_the_mask_is_made_from_lengths():
    """Prompts that hold eos, end with it, or are nothing else: the mask covers the response alone, its eos included."""
    rollout = generate(sure(1, 2, 3, 0), [[0, 1, 0], [0], [0, 0, 3]], 4, EOS)
    # 0 is followed by 1: eos of a prompt ends nothing
    assert rollout.tokens.tolist() == [[0, 1, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 0, 0], [0, 0, 3, 0, 0, 0, 0]]
    o, x = False, True
    assert rollout.response_mask.tolist() == [[o, o, x, x, x, x], [x, x, x, x, o, o], [o, o, x, o, o, o]]
    assert rollout.finished.tolist() == [True] * 3


def test_generation_ends_with_the_last_row(monkeypatch):
    """Allowed 40 tokens, the longest answer takes 3: a prefill and two more passes, rows that ended being dropped, but
    for those that make their number a multiple of 16."""
    monkeypatch.setattr(generation, "ROW_MULTIPLE", 16)
    chain = sure(1, 2, 3, 0)
    rollout = generate(chain, [[1]] + [[3]] * 38 + [[2]], 40, EOS)
    assert chain.calls == [(40, 1), (16, 1), (16, 1)]
    assert rollout.responses() == [[2, 3, 0]] + [[0]] * 38 + [[3, 0]]
    chain.calls.clear()
    generate(chain, [[3], [3, 3]], 40, EOS)
    assert chain.calls == [(2, 2)]


def test_no_pass_follows_the_last_token():
    """n tokens take n passes: the prefill gives the first, and the last is not read."""
    chain = sure(1, 1, 1)
    assert generate(chain, [[1]], 7, EOS).responses() == [[1] * 7] and len(chain.calls) == 7


def test_temperature_0_is_greedy():
    """The most likely token at each step, no generator needed, log-probability 0 because the choice is certain."""
    table = torch.tensor([[0, 0, 0, 0], [0, 0, 2, 1.9], [0, -1, -2, 0.1], [5, 4, 3, 2.0]])
    rollouts = [generate(Chain(table), [[1], [2]], 5, EOS, 0.0, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for rollout in rollouts:
        assert rollout.responses() == [[2, 3, 0], [3, 0]]
        assert not rollout.sampler_logprobs.any()


@pytest.mark.parametrize("prompts, response_length, words", [
    ([[1], []], 4, ["at least one token"]),
    ([[1], [2] * 30], 4, ["30", "4", "32"]),  # 30 + 4 > 32
])
def test_prompts_that_do_not_fit_are_refused(make_model, prompts, response_length, words):
    """An empty prompt has nothing to condition on; one over the context names prompt, response and context."""
    with pytest.raises(ValueError) as error:
        generate(make_model(), prompts, response_length, EOS)
    assert all(word in str(error.value) for word in words)


def test_a_context_can_be_filled_to_its_last_slot(make_model):
    """28 + 4 = 32: allowed."""
    rollout = generate(make_model(), [[1] * 28], 4, eos=99, generator=torch.Generator().manual_seed(0))
    assert rollout.tokens.shape == (1, 32) and rollout.lengths.tolist() == [32] and not rollout.finished.any()


@both_families
def test_bfloat16_rollouts(make_model, shape):
    """Under autocast the cache is bfloat16 too, and the sampler's log-probabilities are near the recomputed ones."""
    model = make_model(**shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert KVCache(model, 1, 1).k.dtype == torch.bfloat16
        rollout = generate(model, PROMPTS, STEPS, EOS, generator=torch.Generator().manual_seed(0))
        logprobs = token_logprobs(model(rollout.tokens[:, :-1]), rollout.tokens[:, 1:])
    mask = rollout.response_mask
    assert rollout.sampler_logprobs.dtype == torch.float32
    assert (rollout.sampler_logprobs - logprobs)[mask].abs().mean() < 0.1


@pytest.mark.skipif(not CAN_PACK, reason="not an x86 CPU with oneDNN")
@both_families
def test_packed_weights_give_the_same_answers(make_model, monkeypatch, shape):
    """Ragged prompts, rows that leave, one token a step: tokens and ends are those of the weights as they are."""
    model, used = make_model(n_embd=128, **shape), []
    model.unembedding.data *= 0.15  # less sharp, so that answers end at many lengths
    rollouts = []
    for context in (packed, lambda *model: contextlib.nullcontext()):
        monkeypatch.setattr(generation, "packed", lambda *model: used.append(len(used)) or context(*model))
        rollouts.append(generate(model, 4 * PROMPTS, STEPS, EOS, generator=torch.Generator().manual_seed(3)))
    a, b = rollouts
    assert len(set(a.lengths.tolist())) > 4 and used == [0, 1]
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    torch.testing.assert_close(a.sampler_logprobs, b.sampler_logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [3, 8])
def test_how_often_one_looks_changes_nothing(make_model, monkeypatch, every):
    """Rows that ended stay for some tokens where a look at them costs more: the same answers, lengths and ends."""
    model = make_model()
    model.wte.weight.data *= 0.5  # less sharp, so that answers end at many lengths
    prompts = [[(5 * b + t) % 12 + 1 for t in range(1 + b % 4)] for b in range(12)]
    rollouts = []
    for n in (1, every):
        monkeypatch.setitem(generation.POLL_INTERVAL, "cpu", n)
        rollouts.append(generate(model, prompts, 20, EOS, generator=torch.Generator().manual_seed(3)))
    a, b = rollouts
    assert len(set(a.lengths.tolist())) > 4 and (a.lengths - a.prompt_lengths).max() > every
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths) and torch.equal(a.finished, b.finished)
    torch.testing.assert_close(a.sampler_logprobs, b.sampler_logprobs)


@pytest.mark.parametrize("shape", [{}, pytest.param(LLAMA, marks=pytest.mark.slow)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("options", [
    {"compiled": True, "backend": "aot_eager"}, pytest.param({"compiled": True}, marks=pytest.mark.slow), {},
    pytest.param({"device": "cuda"}, marks=needs_gpu), pytest.param({"device": "cuda", "compiled": True},
                                                                    marks=[needs_gpu, pytest.mark.slow])])
def test_a_decoder_s_steps_equal_the_plain_ones(make_model, monkeypatch, options, shape):
    """Static shapes, a cache of a power of two slots that earlier answers have filled, and rows that stay after their
    end: the same answers of ragged prompts, three times in the same cache, then of a longer batch in another, which
    ends with the context."""
    device, options = options.get("device", "cpu"), {k: v for k, v in options.items() if k != "device"}
    model = make_model(n_layer=1, block_size=24, **shape).to(device)
    model.unembedding.data *= 0.5  # less sharp, so that answers end at many lengths
    decoder = Decoder(model, **options)
    for seed, rows, steps in ((0, 40, 8), (1, 40, 9), (2, 40, 8), (3, 6, 16)):
        prompts = (4 * PROMPTS)[:rows]
        rollouts = []
        for model.decoder in (None, decoder):
            monkeypatch.setattr(generation, "Decoder", lambda model: None)  # which a GPU's model would get
            rollouts.append(generate(model, prompts, steps, EOS, generator=torch.Generator().manual_seed(seed)))
        a, b = rollouts
        assert len(set(a.lengths.tolist())) > 2
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
        torch.testing.assert_close(a.sampler_logprobs, b.sampler_logprobs)
    assert list(decoder.caches) == [(40, 16, torch.float32), (6, 24, torch.float32)]
    assert len(decoder.graphs) == (2 if device == "cuda" else 0)


def test_a_decoder_keeps_few_caches(make_model, monkeypatch):
    """One for each number of rows, slots rounded up to a power of two, and precision; what was used longest ago goes,
    with its graph, and all graphs go when a weight has another place."""
    monkeypatch.setattr(generation, "SHAPES", 2)
    model = make_model()
    decoder = Decoder(model)
    first, second = decoder.cache(3, 9), decoder.cache(3, 17)
    assert first.k.shape[1::2] == (3, 16) and decoder.cache(3, 16) is first and second.k.shape[1::2] == (3, 32)
    decoder.graphs |= {first: "one", second: "two"}
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.cache(3, 9).k.dtype == torch.bfloat16
    assert [*decoder.caches] == [(3, 16, torch.float32), (3, 16, torch.bfloat16)] and decoder.graphs == {first: "one"}
    model.wte.weight.data.mul_(2)
    assert decoder.cache(3, 9) is first and decoder.graphs == {first: "one"}
    model.wte.weight = torch.nn.Parameter(model.wte.weight.detach() * 2)
    assert decoder.cache(3, 9) is first and decoder.graphs == {}


@needs_gpu
@both_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_see_what_was_learned(make_model, dtype, shape):
    """A step after the weights have changed in their places, and one after they were replaced, is that of a model
    without graphs: in bfloat16 too, of which the graph has copies."""
    model, tokens = make_model(**shape).cuda(), torch.tensor([[3], [5]], device="cuda")
    positions, graphs = torch.zeros_like(tokens), []
    model.decoder = decoder = Decoder(model)

    def replace():
        model.wte.weight = torch.nn.Parameter(model.wte.weight.detach() * 2)

    for change in (lambda: None, lambda: model.h[0].mlp.c_fc.weight.data.mul_(-1), replace):
        change()
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            with packed(model, decoder.copies):
                found = decoder.step(tokens, decoder.cache(2, 8), positions).clone()
            plain = KVCache(model, 2, 8)
            plain.filled = 8
            exact = model.logits(model.hidden(tokens, plain, positions)[:, 0])
        torch.testing.assert_close(found, exact, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=1e-4
                                   if dtype == torch.float32 else 0.1)
        graphs += [*decoder.graphs.values()]
    assert graphs[0] is graphs[1] is not graphs[2]


# Rollout


def test_take_by_hand():
    """Some rows in a given order, cut to the longest of them, every column alike."""
    rollout = Rollout(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1], [4, 0, 0, 0]]), torch.tensor([1, 2, 1]),
                      torch.tensor([3, 4, 2]), torch.tensor([True, False, True]),
                      torch.tensor([[-1.0, -2, 0], [0, -3, -4], [-5, 0, 0]]))
    some = rollout.take(torch.tensor([2, 0]))
    assert some.tokens.tolist() == [[4, 0, 0], [5, 6, 0]]
    assert some.prompt_lengths.tolist() == [1, 1] and some.lengths.tolist() == [2, 3]
    assert some.finished.tolist() == [True, True] and some.responses() == [[0], [6, 0]]
    assert some.sampler_logprobs.tolist() == [[-5, 0], [-1, -2]]
    assert some.response_mask.tolist() == [[True, False], [True, True]]
    assert rollout.take(torch.tensor([1])).finished.tolist() == [False]


def test_generation_needs_no_gradients(make_model):
    """A rollout holds no graph."""
    rollout = generate(make_model(), [[1]], 3, EOS, generator=torch.Generator().manual_seed(0))
    assert not rollout.sampler_logprobs.requires_grad and math.isfinite(rollout.sampler_logprobs.sum())
