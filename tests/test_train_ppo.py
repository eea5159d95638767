"""The paragraphs of train_ppo.py against a second implementation without vectors, and against known optima; the
figures, verdicts and warnings of stage 3 by hand."""
import contextlib
import copy
import math
import types
from dataclasses import replace

import pytest
import torch

import train_ppo
from minirlhf import adapters, evaluate, groups, mixture, objectives, rewards
from minirlhf.config import parse
from minirlhf.generate import KVCache, compile_model, generate
from minirlhf.model import GPT, GPTConfig, flat_indices
from minirlhf.runtime import generator

EOS = 0
DOUBLE = {"rtol": 1e-9, "atol": 1e-10}


def options(**changes):
    return replace(parse(train_ppo.Options, ["@scratch"]), **{
        "value_warmup": 0, "ent_coef": 0.0, "kl_baseline": 0.0, "reward_clip": 0.0, "micro_batch_size": 3,
        "response_length": 6, "out_dir": "out"} | changes)


def run_of(o, ranks=1):
    """What the paragraphs need of a Run: no autocast, nothing written; `ranks` of them with the same rows."""
    return types.SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext,
                                 total=lambda t: ranks * t,
                                 totals=lambda sums: {name: ranks * x for name, x in sums.items()},
                                 sum_gradients=lambda parameters: None,
                                 generator=lambda step, purpose: generator(o.seed, step, 0, purpose))


class Table:
    """A reward that looks an answer's ids up."""
    model = None

    def __init__(self, score):
        self.score = score

    def __call__(self, rollout, micro_batch_size=None):
        return torch.tensor([self.score(tuple(ids)) for ids in rollout.responses()], dtype=torch.double)


class Recorder:
    """In an optimizer's place: keeps each parameter's gradient and moves nothing."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = [p.grad if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)


@pytest.fixture
def world(make_model):
    """world(o, ...) -> networks in float64 that differ from one another, a reward model, a ragged batch of 10 rows.

    Where a part only learns, as o says, the rest of the policy is the reference, of the value network the reward model.
    """
    def make(o, rows=10):
        policy, ref = (make_model(seed=seed, dtype=torch.double) for seed in (1, 2))
        value, reward = (make_model("scalar", seed=seed, dtype=torch.double) for seed in (3, 4))
        for model in (policy, ref):
            model.wte.weight.data *= 0.5  # less sharp, so that answers of several tokens end by eos or by the limit
        reward.gain.fill_(0.7), reward.bias.fill_(-0.3)
        if o.lora_rank or o.freeze_layers:
            g = torch.Generator().manual_seed(5)
            policy, value = (adapters.learner(model, model.head, o, g) for model in (ref, reward))
            for p in (p for model in (policy, value) for p in model.parameters() if p.requires_grad):
                p.data += 0.2 * torch.randn(p.shape, dtype=p.dtype, generator=g)
        nets = types.SimpleNamespace(policy=policy, ref=ref, value=value if o.advantages == "gae" else None)
        group = torch.arange(rows) // o.group_size
        prompts = [[(5 * b + t) % 12 + 1 for t in range(1 + b % 4)] for b in group.tolist()]
        batch = train_ppo.Batch(**vars(generate(policy, prompts, o.response_length, EOS, o.temperature,
                                                torch.Generator().manual_seed(3))), group=group)
        if o.group_size > 1:  # as roll_out leaves them, groups mixed
            batch = batch.take(batch.lengths.argsort(stable=True))
        assert 0 < batch.finished.sum() < rows and len(set(batch.lengths.tolist())) > 2
        return nets, rewards.RewardModel(reward, None, run_of(o)), batch
    return make


def score(batch, nets, reward, o, run=None):
    train_ppo.score_rollout(batch, nets.policy, nets.ref, nets.value, reward, o, run or run_of(o))


def update(batch, nets, optimizers, step, o, run=None):
    return train_ppo.update(batch, nets.policy, nets.value, optimizers, step, o.num_ppo_epochs, o, run or run_of(o))


def optimizers(nets, o, lr):
    return train_ppo.make_optimizers(nets.policy, nets.value, replace(o, learning_rate=lr))


# A second implementation: rows, tokens and terms one at a time, Python's floats where no gradient is needed


def naive_logits(model, ids):
    """Logits after the last of some ids: a pass over these ids alone."""
    return (model.hidden(torch.tensor([ids]))[0, -1] @ model.wte.weight.T)


def naive_logprob(model, ids, token, temperature):
    scaled = [x / temperature for x in naive_logits(model, ids)]
    return scaled[token] - torch.logsumexp(torch.stack(scaled), 0)


def naive_value(model, ids):
    h = model.hidden(torch.tensor([ids]))[0, -1]
    return ((h * model.score_head.weight[0]).sum() + model.score_head.bias[0]) * model.gain + model.bias


def naive_batch(nets, reward, rollout, o, kl_coef):
    """[(ids before, token, old logprob, advantage, return, value), ...] for each row; GAE's advantages whitened, others
    the same for a row as its return, which is the sum of its rewards."""
    batch, kls = [], []
    for b in range(len(rollout.lengths)):
        start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
        ids = rollout.tokens[b, :end].tolist()
        row = []
        for n in range(start, end):
            old, ref = (naive_logprob(m, ids[:n], ids[n], o.temperature).item() for m in (nets.policy, nets.ref))
            value = naive_value(nets.value, ids[:n]).item() if nets.value else 0.0
            row.append([ids[:n], ids[n], old, old - ref, value])
            kls.append(old - ref)
        score = naive_value(reward, ids).item()
        score = max(-o.reward_clip, min(score, o.reward_clip)) if o.reward_clip else score
        if ids[-1] != EOS:
            score -= o.missing_eos_penalty
        batch.append((row, score))
    free = o.kl_baseline * sum(kls) / len(kls)
    if o.advantages != "gae":
        returns = [score - kl_coef * sum(kl - free for _, _, _, kl, _ in row) for row, score in batch]
        return [[[*step[:3], naive_comparison(b, returns, rollout.group.tolist(), o), returns[b], 0.0] for step in row]
                for b, (row, _) in enumerate(batch)]
    out = []
    for row, score in batch:
        rewards = [-kl_coef * (kl - free) for _, _, _, kl, _ in row]
        rewards[-1] += score
        values = [v for *_, v in row] + [0.0]
        done = []
        for t in range(len(row)):
            A = sum((o.gamma * o.lam) ** (k - t) * (rewards[k] + o.gamma * values[k + 1] - values[k])
                    for k in range(t, len(row)))
            done.append([*row[t][:3], A, A + values[t], values[t]])
        out.append(done)
    every = [d[3] for row in out for d in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
    for row in out:
        for d in row:
            d[3] = (d[3] - mean) / deviation
    return out


def naive_comparison(b, returns, group, o):
    """The advantage of row b beside those that answer the same prompt."""
    others = [R for n, R in enumerate(returns) if group[n] == group[b] and n != b]
    assert len(others) == o.group_size - 1
    if o.advantages == "rloo":
        return returns[b] - sum(others) / len(others)
    mean = (returns[b] + sum(others)) / o.group_size
    squares = (returns[b] - mean) ** 2 + sum((R - mean) ** 2 for R in others)
    return (returns[b] - mean) / (math.sqrt(squares / len(others)) + 1e-4)


def naive_entropy(model, ids, temperature):
    p = (naive_logits(model, ids) / temperature).softmax(0)
    return -sum(x * x.log() for x in p)


def naive_update(nets, batch, o, lr, step):
    """Every epoch and minibatch, one decision after another; AdamW written out.   Kingma & Ba 2015, algorithm 1.

    -> the sums of policy loss, half squared log-ratio, clipped decisions, ratio, k3; value loss, clipped values; the
    count of decisions; the mean ratio of each minibatch.
    """
    moments, sums, ratios, count = {}, [0.0] * 7, [], 0
    for epoch in range(o.num_ppo_epochs):
        order = torch.randperm(len(batch), generator=generator(o.seed, step, 0, f"epoch {epoch}")).tolist()
        size = math.ceil(len(batch) / o.num_mini_batches)
        for at in range(0, len(order), size):
            rows = [batch[b] for b in order[at:at + size]]
            losses, ratio_sum = [], 0.0
            for ids, token, old, A, R, V_old in (d for row in rows for d in row):
                ratio = (naive_logprob(nets.policy, ids, token, o.temperature) - old).exp()
                low, high = 1 - o.cliprange, 1 + o.cliprange
                clipped = low if ratio < low else high if ratio > high else ratio
                gain = ratio * A if ratio * A < clipped * A else clipped * A
                V = naive_value(nets.value, ids) if nets.value else R  # without one there is no error
                low, high = (V_old - o.cliprange_value, V_old + o.cliprange_value) if nets.value else (R, R)
                near = low if V < low else high if V > high else V
                worse = (V - R) ** 2 if (V - R) ** 2 > (near - R) ** 2 else (near - R) ** 2
                d, ratio_sum = math.log(ratio.item()), ratio_sum + ratio.item()
                for k, term in enumerate((-gain, d * d / 2, clipped * A < ratio * A, ratio, math.exp(d) - 1 - d,
                                          0.5 * worse, (near - R) ** 2 > (V - R) ** 2)):
                    sums[k] += term.item() if isinstance(term, torch.Tensor) else term
                losses.append(-gain + o.vf_coef * 0.5 * worse
                              - o.ent_coef * naive_entropy(nets.policy, ids, o.temperature))
            (sum(losses) / len(losses)).backward()
            ratios.append(ratio_sum / len(losses))
            count += len(losses)
            for model in filter(None, (nets.policy, nets.value)):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # all of its decisions were clipped
                norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
                for p in model.parameters():
                    g = p.grad * min(1.0, o.max_grad_norm / (norm + 1e-6))
                    m, v, n = moments.get(p, (0.0, 0.0, 0))
                    m, v, n = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2, n + 1
                    moments[p] = m, v, n
                    p.data -= lr * (m / (1 - 0.9 ** n)) / ((v / (1 - 0.999 ** n)).sqrt() + 1e-5)
                    p.grad = None
    return sums, count, ratios


@pytest.mark.parametrize("changes", [
    {},
    {"temperature": 0.7, "ent_coef": 0.05, "kl_baseline": 0.5, "gamma": 0.9, "lam": 0.8},
    {"num_ppo_epochs": 3, "num_mini_batches": 5, "max_grad_norm": 0.01, "missing_eos_penalty": 2.0,
     "reward_clip": 0.5, "vf_coef": 1.0, "cliprange": 0.1, "cliprange_value": 0.3},
    {"lora_rank": 3, "lora_layers": 1, "num_ppo_epochs": 3}, {"freeze_layers": 1, "temperature": 0.7},
    {"group_size": 2}, {"advantages": "rloo", "group_size": 5, "num_ppo_epochs": 3, "whiten_rewards": True},
    {"advantages": "grpo", "group_size": 2, "kl_baseline": 0.5, "reward_clip": 0.5, "missing_eos_penalty": 2.0},
    {"advantages": "rloo", "group_size": 2, "lora_rank": 3, "lora_layers": 1, "num_ppo_epochs": 3, "temperature": 0.7,
     "ent_coef": 0.05},
], ids=["defaults", "other credit", "other update", "adapters in the last block", "the first block frozen",
        "several answers", "rloo", "grpo", "rloo with adapters"])
def test_a_step_equals_the_naive_one(world, changes):
    """Same weights, same rollout: log-probabilities, advantages and returns, and the weights after all epochs and
    minibatches, are those of loops over rows and tokens, in float64; ratios were clipped on the way."""
    o = options(**changes, max_update_kl=math.inf)  # the steps are large, so that clips bite
    nets, reward, batch = world(o)
    run, kl_coef, lr, sums = run_of(o), 0.3, 3e-3, {}
    run.totals = lambda found: sums.update({k: sums.get(k, 0.0) + float(x) for k, x in found.items()}) or found
    other = copy.deepcopy(nets)
    score(batch, nets, reward, o, run)
    train_ppo.credit(batch, kl_coef, o, run)
    naive = naive_batch(other, reward.model, batch, o, kl_coef)
    mask = batch.response_mask
    assert (batch.values is None) == (o.advantages != "gae")
    for place, ours in [(2, batch.logprobs), (3, batch.advantages), (4, batch.returns), (5, batch.values)][
            :4 if nets.value else 3]:
        torch.testing.assert_close(ours[mask], torch.tensor([d[place] for row in naive for d in row],
                                                            dtype=torch.double), **DOUBLE)
        assert not ours[~mask].any()
    figures, update_kl = update(batch, nets, optimizers(nets, o, lr), 7, o, run)
    expected, count, ratios = naive_update(other, naive, o, lr, 7)
    names = ["policy_loss", "approxkl", "policy_clipped", "ratio", "k3", "value_loss", "value_clipped"]
    assert sums == pytest.approx(dict(zip(names if nets.value else names[:5], expected)), rel=1e-5)
    assert count == o.num_ppo_epochs * mask.sum() and sums["policy_clipped"] > 0  # some were clipped
    loss, approxkl, clipped, _, _, value_loss, value_clipped = (x / count for x in expected)
    mean = sum(ratios) / len(ratios)
    assert figures == pytest.approx({
        "policy/approxkl_avg": approxkl, "policy/clipfrac_avg": clipped, "policy/updates": len(ratios),
        "loss/policy_avg": loss, "val/ratio": mean,
        **({"loss/value_avg": value_loss, "val/clipfrac_avg": value_clipped} if nets.value else {}),
        "val/ratio_var": sum((r - mean) ** 2 for r in ratios) / len(ratios)}, rel=1e-5)
    assert update_kl == 0 and len(ratios) == o.num_ppo_epochs * o.num_mini_batches
    for ours, theirs in [(nets.policy, other.policy), (nets.value, other.value)][:2 if nets.value else 1]:
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **DOUBLE)


# Paragraph by paragraph


PARTS = pytest.mark.parametrize("part", [{}, {"lora_rank": 3, "lora_layers": 1}, {"freeze_layers": 1}],
                                ids=["all learns", "adapters", "a frozen block"])


@PARTS
def test_scoring_does_not_depend_on_microbatches(world, part):
    """Scores, log-probabilities, values and entropies of ten rows at once are those of one row at a time."""
    o = options(micro_batch_size=10, **part)
    nets, reward, once = world(o)
    each = replace(once)
    for batch, size in ((once, 10), (each, 1)):
        score(batch, nets, reward, options(micro_batch_size=size))
    for name in ("logprobs", "ref_logprobs", "values", "entropies", "scores"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), **DOUBLE)
    assert not once.scores.requires_grad and not once.values.requires_grad


def test_scoring_recomputes_what_the_sampler_said(world):
    """Whatever the sampler noted, the old log-probabilities are the trainer's, so that in one epoch of one minibatch
    the ratio is 1, with several microbatches too."""
    o = options(num_ppo_epochs=1, num_mini_batches=1)
    nets, reward, batch = world(o)
    batch.sampler_logprobs.fill_(-9.0)
    score(batch, nets, reward, o)
    train_ppo.credit(batch, 0.3, o, run_of(o))
    run, squares = run_of(o), {}
    run.totals = lambda found: squares.update(found) or found
    figures, _ = update(batch, nets, optimizers(nets, o, 1e-2), 0, o, run)
    assert figures["policy/updates"] == 1 and figures["val/ratio"] == pytest.approx(1.0, abs=1e-12)
    assert float(squares["approxkl"]) < 1e-20


def test_a_rollout_is_shortest_first_and_knows_its_prompts(world):
    o = options()
    nets, *_ = world(o)
    prompts = [[(5 * b + t) % 12 + 1 for t in range(1 + b % 4)] for b in range(12)]
    batch = train_ppo.roll_out(nets.policy, prompts, [*range(11, 1, -1)], EOS, 0, o, run_of(o))
    assert batch.lengths.tolist() == sorted(batch.lengths.tolist())
    assert sorted(batch.prompt_index.tolist()) == [*range(2, 12)] and len(set(batch.lengths.tolist())) > 2
    for i, row, n in zip(batch.prompt_index.tolist(), batch.tokens.tolist(), batch.prompt_lengths.tolist()):
        assert row[:n] == prompts[i]


def test_a_rollout_of_several_answers(world):
    """Three answers to each prompt that is named, each drawn by itself; a prompt named twice has two groups, which
    stay apart as rows are put in order of length."""
    o = options(group_size=3)
    nets, *_ = world(options())
    prompts = [[(5 * b + t) % 12 + 1 for t in range(1 + b % 4)] for b in range(12)]
    batch = train_ppo.roll_out(nets.policy, prompts, [7, 2, 7, 10], EOS, 0, o, run_of(o))
    assert batch.lengths.tolist() == sorted(batch.lengths.tolist()) and len(batch.tokens) == 12
    assert batch.group.tolist() != sorted(batch.group.tolist())
    rows = objectives.rows_of_groups(batch.group)
    assert batch.prompt_index[rows].tolist() == [[i] * 3 for i in (7, 2, 7, 10)]
    answers = batch.responses()
    for i, group in zip((7, 2, 7, 10), rows.tolist()):
        assert all(batch.tokens[row, :len(prompts[i])].tolist() == prompts[i] for row in group)
    assert sum(len({tuple(answers[row]) for row in group}) > 1 for group in rows.tolist()) > 2


def test_microbatches_are_of_like_length(world):
    """Whatever the order of a minibatch's rows, which are shortest first in the batch: each part is cut to its longest,
    so that little is padding."""
    o = options(micro_batch_size=3)
    nets, _, batch = world(o)
    batch = batch.take(batch.lengths.argsort(stable=True))
    parts = train_ppo.microbatches(batch, torch.tensor([9, 0, 4, 7, 1, 5]), o)
    assert [part.lengths.tolist() for part in parts] == [batch.lengths[[0, 1, 4]].tolist(),
                                                         batch.lengths[[5, 7, 9]].tolist()]
    assert parts[0].tokens.shape == (3, int(batch.lengths[4])) != parts[1].tokens.shape


def test_summary_by_hand():
    """Four answers against four others: 2 wins and a tie of 4; 4 different of 5 bigrams; one text twice."""
    def row(score, ids, length, text, **more):
        return {"score": score, "k1": 2.0, "k3": 1.0, "finished": score > 0, "length": length, "ref_logprob": -3.0,
                "ids": ids, "completion": text} | more

    base = [row(0.0, [1], 1, "x", judge=0.0)] * 4
    rows = [row(1.0, [1, 2, 3], 4, "a", judge=1.0), row(2.0, [1, 2], 3, "b", judge=-1.0),
            row(0.0, [4, 5, 6], 4, "a", judge=0.0), row(-1.0, [7], 1, "c", judge=2.0)]
    out = evaluate.summary(rows, base)
    assert out["win_rate"][0] == 2.5 / 4 and out["judge_win_rate"][0] == 2.5 / 4
    assert out["score"][0] == 0.5 and out["kl"] == (2.0, 0.0) and out["kl_k3"] == (1.0, 0.0)
    assert out["eos_rate"] == 0.5 and out["mean_length"] == 3.0 and out["prompts"] == 4
    assert out["distinct_2"] == pytest.approx(4 / 5) and out["repeated"] == pytest.approx(1 / 4)
    assert out["ref_logprob_per_token"] == pytest.approx(-12 / 12)


def test_logprobs_at_another_temperature(make_model):
    """Logits are divided by it before the softmax: at T, log p = logit/T - logsumexp(logits/T), of all and of chosen
    tokens."""
    model, tokens = make_model(), torch.tensor([[1, 2, 3, 4]])
    mask = torch.tensor([[False, True, True]])
    chosen, of_all = model.logprobs(tokens, flat_indices(mask), 0.5)
    expected = (model(tokens)[0, 1:3] * 2).log_softmax(-1)
    torch.testing.assert_close(of_all, expected)
    torch.testing.assert_close(chosen, expected[[0, 1], [3, 4]])


def hand_batch(**columns):
    """Two answers: [3, eos] after one prompt token, and [4, 5] without eos after two; all other columns are 0."""
    tokens, zeros = torch.tensor([[1, 3, EOS, EOS], [1, 2, 4, 5]]), torch.zeros(2, 3)
    return train_ppo.Batch(tokens, torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([True, False]), zeros, **{
        "logprobs": zeros, "ref_logprobs": zeros, "values": zeros, "entropies": zeros} | columns)


def test_credit_by_hand():
    """Scores 2 and 1, no eos costs .5, KL 1 a token at beta .1, V 0, gamma lambda 1: to go are
    1.8, 1.9 and .3, .4; whitened, returns not."""
    mask = hand_batch().response_mask
    assert mask.tolist() == [[True, True, False], [False, True, True]]
    batch = hand_batch(ref_logprobs=-mask.float(), scores=torch.tensor([2.0, 1.0]))
    o = options(lam=1.0, missing_eos_penalty=0.5)
    train_ppo.credit(batch, 0.1, o, run_of(o))
    torch.testing.assert_close(batch.rewards, torch.tensor([[-0.1, 1.9, 0], [0, -0.1, 0.4]]))
    torch.testing.assert_close(batch.returns, torch.tensor([[1.8, 1.9, 0], [0, 0.3, 0.4]]))
    assert batch.final_rewards.tolist() == [2.0, 0.5] and batch.penalised_kl[mask].tolist() == [1, 1, 1, 1]
    a = torch.tensor([1.8, 1.9, 0.3, 0.4])
    torch.testing.assert_close(batch.advantages[mask], (a - 1.1) / a.std(correction=0))
    # A fifth of the mean KL is free: each decision loses .08.
    train_ppo.credit(batch, 0.1, options(lam=1.0, missing_eos_penalty=0.5, kl_baseline=0.2), run_of(o))
    torch.testing.assert_close(batch.returns, torch.tensor([[1.84, 1.92, 0], [0, 0.34, 0.42]]))


def test_scores_count_up_to_the_clip():
    """Scores 5 and -3 count as 2 and -2, a function's own as they are; the penalty comes after."""
    batch = hand_batch(scores=torch.tensor([5.0, -3.0]))
    for changes, expected in (({}, [2.0, -2.5]), ({"reward": "mine.py:f"}, [5.0, -3.5]),
                              ({"reward_clip": 0.0}, [5.0, -3.5])):
        o = options(**{"reward_clip": 2.0, "missing_eos_penalty": 0.5} | changes)
        train_ppo.credit(batch, 0.1, o, run_of(o))
        assert batch.final_rewards.tolist() == expected and batch.scores.tolist() == [5.0, -3.0]


def test_whitened_rewards_keep_their_mean():
    """--whiten_rewards divides rewards by their deviation before GAE: -.1, 1.9, -.1, .4 about their mean .525."""
    batch = hand_batch(ref_logprobs=-hand_batch().response_mask.float(), scores=torch.tensor([2.0, 1.0]))
    o = options(lam=1.0, missing_eos_penalty=0.5, whiten_rewards=True)
    train_ppo.credit(batch, 0.1, o, run_of(o))
    r = torch.tensor([-0.1, 1.9, -0.1, 0.4])
    r = (r - 0.525) / r.std(correction=0) + 0.525
    torch.testing.assert_close(batch.returns, torch.tensor([[r[0] + r[1], r[1], 0], [0, r[2] + r[3], r[3]]]))


@pytest.mark.parametrize("advantages", ["rloo", "grpo"])
def test_credit_of_compared_answers_by_hand(advantages):
    """Scores 2 and 1, no eos costs .5, KL 1 a token at beta .1: whole answers get 1.8 and .3, and so 1.5 and -1.5 at
    each decision, or these over 1.5 / sqrt(2); nothing is whitened, nor does gamma or lambda count."""
    batch = hand_batch(ref_logprobs=-hand_batch().response_mask.float(), scores=torch.tensor([2.0, 1.0]),
                       group=torch.tensor([0, 0]), values=None)
    o = options(advantages=advantages, group_size=2, missing_eos_penalty=0.5, gamma=0.5, lam=0.5, whiten_rewards=True)
    train_ppo.credit(batch, 0.1, o, run_of(o))
    A = 1.5 if advantages == "rloo" else 0.75 / (1.5 / math.sqrt(2) + 1e-4)
    torch.testing.assert_close(batch.advantages, torch.tensor([[A, A, 0], [0, -A, -A]]))
    torch.testing.assert_close(batch.returns, torch.tensor([[1.8, 1.8, 0], [0, 0.3, 0.3]]))
    torch.testing.assert_close(batch.rewards, torch.tensor([[-0.1, 1.9, 0], [0, -0.1, 0.4]]))


@pytest.mark.parametrize("scores, group, ranks, expected", [
    ([2.0, 2.0, 1.0, 0.5], [0, 0, 1, 1], 1, 0.5), ([2.0, 1.0, 2.0, 1.0], [0, 1, 0, 1], 2, 1.0),
    ([2.0, 1.0, 2.0, 1.0], [0, 0, 1, 1], 1, 0.0), ([1.0] * 4, [0] * 4, 1, 1.0),
    ([1.0] * 4, [0, 1, 2, 3], 1, None)])  # single answers are no groups
def test_groups_of_equal_scores_by_hand(scores, group, ranks, expected):
    """The share of groups whose answers all count the same after clip and penalty, on all ranks."""
    batch = types.SimpleNamespace(final_rewards=torch.tensor(scores), group=torch.tensor(group))
    found = groups.figures(batch, run_of(options(), ranks))
    assert found == ({} if expected is None else {"groups/equal_scores": expected})


def test_a_ratio_of_one_is_reinforce(world):
    """RLOO in one epoch of one minibatch: the gradient of -sum A log pi over all decisions, divided by their number."""
    o = options(advantages="rloo", group_size=5, num_ppo_epochs=1, num_mini_batches=1)
    nets, batch = ready(world, o)
    recorder = Recorder(nets.policy)
    update(batch, nets, [recorder], 0, replace(o, max_grad_norm=0.0))
    logprobs = nets.policy.logprobs(batch.tokens, batch.decisions, o.temperature)[0]
    A = torch.cat([batch.advantages[b, batch.response_mask[b]][:1].expand(int(batch.response_mask[b].sum()))
                   for b in range(10)])
    (-(A * logprobs).sum() / len(A)).backward()
    for p, gradient in zip(nets.policy.parameters(), recorder.gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, **DOUBLE)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_microbatches_may_divide_groups(world, size):
    """Gradients and means of two groups of five rows in microbatches are those of all rows at once; the same on two
    ranks, each with these rows, whose gradients are summed."""
    o = options(advantages="grpo", group_size=5, ent_coef=0.1, num_ppo_epochs=1, num_mini_batches=1, max_grad_norm=0.0)
    nets, batch = ready(world, o)
    found = []
    for micro_batch_size, ranks in ((10, 1), (size, 1), (size, 2)):
        recorder = Recorder(nets.policy)
        figures, _ = update(batch, nets, [recorder], 0, replace(o, micro_batch_size=micro_batch_size), run_of(o, ranks))
        found.append(([ranks * g for g in recorder.gradients], figures))
    for gradients, figures in found[1:]:
        torch.testing.assert_close(gradients, found[0][0], **DOUBLE)
        assert figures == pytest.approx(found[0][1])


def ready(world, o):
    """-> networks and a batch that only the update has not seen."""
    nets, reward, batch = world(o)
    score(batch, nets, reward, o)
    train_ppo.credit(batch, 0.3, o, run_of(o))
    return nets, batch


def gradients(nets, batch, o, run):
    """Of each parameter of policy and value network, all rows in one minibatch -> two lists, and the means."""
    recorders = [Recorder(nets.policy), Recorder(nets.value)]
    figures, _ = update(batch, nets, recorders, 0,
                        replace(o, num_ppo_epochs=1, num_mini_batches=1, max_grad_norm=0.0), run)
    return [recorder.gradients for recorder in recorders], figures


@PARTS
@pytest.mark.parametrize("size", [1, 4, 7])
def test_microbatch_size_changes_no_gradient(world, size, part):
    """Gradients and means of ten ragged rows in microbatches are those of all rows at once."""
    nets, batch = ready(world, options(ent_coef=0.1, **part))
    (once, figures), (each, other) = (
        gradients(nets, batch, o, run_of(o)) for o in (options(ent_coef=0.1, micro_batch_size=n) for n in (10, size)))
    torch.testing.assert_close(figures, other)
    for a, b in zip(sum(once, []), sum(each, []), strict=True):
        assert (a is None) == (b is None)  # of what is frozen
        torch.testing.assert_close(a, b, **DOUBLE) if a is not None else None


def test_gradients_come_from_the_policy_and_value_network_alone(world):
    """The reference and the reward model stay frozen, and so do the columns of the batch: no graph leads to them."""
    o = options()
    nets, reward, batch = world(o)
    score(batch, nets, reward, o)
    train_ppo.credit(batch, 0.3, o, run_of(o))
    found, _ = gradients(nets, batch, o, run_of(o))
    assert all(p.grad is None for model in (nets.ref, reward.model) for p in model.parameters())
    assert all(g is not None and g.any() for of_one in found for g in of_one)
    assert not any(x.requires_grad for x in vars(batch).values() if x is not None)


def test_ranks_divide_by_the_count_of_all(world):
    """Two ranks with the same rows: each one's gradient is half of a single rank's, the means are the same."""
    o = options()
    nets, batch = ready(world, o)
    (alone, figures), (half, other) = (gradients(nets, batch, o, run_of(o, ranks)) for ranks in (1, 2))
    torch.testing.assert_close(alone, [[2 * g for g in of_one] for of_one in half], **DOUBLE)
    assert figures == pytest.approx(other)
    assert all(sum(float(g.norm()) for g in of_one) > 0 for of_one in half)
    recorders = [Recorder(nets.policy), Recorder(nets.value)]
    (figures, _), (other, _) = (update(batch, nets, recorders, 0, o, run_of(o, ranks)) for ranks in (1, 2))
    assert figures == pytest.approx(other) and figures["policy/updates"] == o.num_ppo_epochs * o.num_mini_batches


def test_the_policy_rests_in_the_value_warmup(world):
    """In the first value_warmup steps the policy's weights stay bit-equal while the value network's move; then both."""
    o = options(value_warmup=3)
    for step, rests in ((2, True), (3, False)):
        nets, batch = ready(world, o)
        before = copy.deepcopy(nets)
        figures, _ = update(batch, nets, optimizers(nets, o, 1e-3), step, o)
        assert torch.equal(nets.policy.wte.weight, before.policy.wte.weight) is rests
        assert not torch.equal(nets.value.wte.weight, before.value.wte.weight)
        assert figures["policy/updates"] == (0 if rests else o.num_ppo_epochs * o.num_mini_batches)


def test_max_update_kl_ends_the_epochs(world):
    """Above it the batch's epochs end before another step, and no gradient is left."""
    k3 = []

    def minibatches(max_update_kl):
        o = options(max_update_kl=max_update_kl, num_mini_batches=5)
        (nets, batch), run = ready(world, o), run_of(o)
        counts = []
        k3.clear()

        def totals(found):
            if "k3" in found:
                k3.append(float(found["k3"] / counts[-1]))
            return found

        run.total, run.totals = lambda n: counts.append(n) or n, totals
        figures, update_kl = update(batch, nets, optimizers(nets, o, 1e-2), 0, o, run)
        assert all(p.grad is None for m in (nets.policy, nets.value) for p in m.parameters())
        return figures["policy/updates"], update_kl

    assert minibatches(1.0) == (10, 0.0)
    highest = max(k3)
    where = k3.index(highest)
    assert len(k3) == 10 and k3[0] < 1e-9 and 0 < where  # the first minibatch's ratio is 1
    assert minibatches(highest * 1.01) == (10, 0.0)
    first = next(i for i, value in enumerate(k3) if value > highest / 2)
    assert minibatches(highest / 2) == (first, k3[-1]) and k3[-1] > highest / 2


@pytest.mark.parametrize("where, value, says", [
    ("advantages", -math.inf, "step 5: the advantages are not finite"),
    ("advantages", math.nan, "step 5: the advantages are not finite"),
    ("returns", math.inf, "step 5: the returns are not finite"),
    ("logprobs", math.nan, "step 5, epoch 1: not finite (loss nan"),
    ("values", math.nan, "step 5, epoch 1: not finite (loss nan")])
def test_what_is_not_finite_stops_before_the_update(world, refused, where, value, says):
    """Advantages, returns and log-probabilities end the run with exit status 2 before a weight moves; values, which
    only one loss meets, before one of the network that they would spoil."""
    o = options()
    nets, batch = ready(world, o)
    before = copy.deepcopy(nets)
    getattr(batch, where)[batch.response_mask] = value
    error = refused(update, batch, nets, optimizers(nets, o, 1e-2), 4, o)
    assert says in error and "stopped before the update" in error
    for name in ["value"] if where == "values" else ["policy", "value"]:
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)


def test_a_weight_that_is_not_finite_stops_before_the_update(world, refused):
    """Also one that no row of the batch reads, whose loss and gradient are fine."""
    o = options()
    nets, batch = ready(world, o)
    nets.policy.wpe.weight.data[-1] = math.nan
    error = refused(update, batch, nets, optimizers(nets, o, 1e-2), 4, o)
    assert "step 5, epoch 1" in error and "of the weights nan" in error


def test_a_score_that_is_not_finite_is_refused(world, refused):
    """The reward model's name and the completion are named, before anything is learned from it."""
    o = options()
    _, reward, batch = world(o)
    reward.model.gain.fill_(math.inf)
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"<{len(ids)} tokens>")
    error = refused(rewards.RewardModel(reward.model, tokenizer, run_of(o), "rm.pt"), batch, 3)
    assert "rm.pt: gives the score" in error and "inf" in error and "tokens>" in error


FIGURES = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": 0.05, "completions/mean_length": 10.0,
           "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9}


@pytest.mark.parametrize("changes, variance, words", [
    ({}, 1.0, []),
    ({"objective/scores": 3.25}, 0.0, ["variance", "all scores of step 7 are 3.2500"]),
    ({"objective/scores": -300.0}, 1e-8, ["variance", "all scores of step 7 are -300.0000"]),  # rounding of large ones
    ({"objective/scores": -3.0}, 1e-8, []),
    ({"completions/eos_rate": 0.25}, 1.0, ["eos", "25% of the answers", "--missing_eos_penalty above 1"]),
    ({"completions/mean_length": 4.9}, 1.0, ["length", "shrunk to 4.9 tokens", "10.0; raise --kl_baseline above"]),
    ({"completions/mean_length": 20.1}, 1.0, ["length", "grown to 20.1 tokens", "--kl_coef above 0.05"]),
    ({"policy/entropy_avg": 1.9}, 1.0, ["entropy", "1.90 nats a decision", "4.00", "--ent_coef above 0"]),
])
def test_what_a_person_is_warned_about(changes, variance, words):
    """Half the SFT model's length or entropy, twice its length, fewer than half ended, equal scores; else nothing."""
    sft = {"mean_length": 10.0, "ref_logprob_per_token": -4.0}
    found = [*evaluate.concerns(FIGURES | changes, variance, sft, options())]
    assert len(found) == (1 if words else 0)
    assert all(word in " ".join(found[0]) for word in words)


def test_rollouts_and_looks_take_the_compiled_steps(world, monkeypatch):
    """Where there is a decoder, every token but the first of an answer comes from it."""
    class Counting:
        steps = 0

        def __init__(self, model, compiled):
            assert compiled
            self.model, self.cache = model, lambda rows, slots: KVCache(model, rows, slots)

        def step(self, tokens, cache, positions):
            Counting.steps += 1
            cache.filled = cache.k.shape[3]
            return self.model.logits(self.model.hidden(tokens, cache, positions)[:, 0])

    monkeypatch.setattr("minirlhf.generate.Decoder", Counting)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    o = options(response_length=5)
    nets, *_ = world(o)

    def rolled():
        return train_ppo.roll_out(nets.policy, [[1], [2]], [0, 1] * 4, 99, 0, o, run_of(o)).tokens

    plain = rolled()
    assert Counting.steps == 0
    compile_model(nets.policy, decode=True)
    assert torch.equal(plain, rolled()) and Counting.steps == 4
    tokenizer = types.SimpleNamespace(decode=str, eos=99)
    evaluate.answer(nets.policy, nets.ref, {}, [[1], [2]], tokenizer, o, run_of(o))
    assert Counting.steps == 8


@pytest.mark.slow
@pytest.mark.parametrize("without_padding", [False, True])
def test_a_compiled_step_equals_the_plain_one(world, monkeypatch, without_padding):
    """--compile: the same columns, means and weights after two epochs of microbatches of several lengths."""
    monkeypatch.setattr(GPTConfig, "leaves_padding_out", without_padding)
    o, found = options(micro_batch_size=3, ent_coef=0.1), []
    for compiled in (False, True):
        nets, reward, batch = world(o)
        if compiled:
            compile_model(nets.policy, decode=True), compile_model(nets.value)
        score(batch, nets, reward, o)
        train_ppo.credit(batch, 0.3, o, run_of(o))
        figures, _ = update(batch, nets, optimizers(nets, o, 1e-2), 0, o)
        found.append((batch.logprobs, batch.values, figures, nets.policy.state_dict(), nets.value.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_every_row_once_an_epoch_in_as_many_minibatches_as_asked(world, monkeypatch):
    """Each epoch deals all rows to num_mini_batches steps, in another order."""
    o = options(num_ppo_epochs=3, num_mini_batches=5)
    nets, batch = ready(world, o)
    dealt, real = [], train_ppo.microbatches
    monkeypatch.setattr(train_ppo, "microbatches", lambda *a: dealt.append(a[1].tolist()) or real(*a))
    update(batch, nets, optimizers(nets, o, 1e-3), 0, o)
    epochs = [sum(dealt[i:i + 5], []) for i in (0, 5, 10)]
    assert [len(part) for part in dealt] == [2] * 15
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_entropies_are_those_of_the_whole_distribution(world):
    """At each decision of the first two rows -sum p log p of the policy, at the run's temperature, one by one."""
    o = options(temperature=0.7)
    nets, batch = ready(world, o)
    for b in range(2):
        for n in range(int(batch.prompt_lengths[b]), int(batch.lengths[b])):
            expected = naive_entropy(nets.policy, batch.tokens[b, :n].tolist(), o.temperature)
            assert float(batch.entropies[b, n - 1]) == pytest.approx(float(expected), rel=1e-9)


def test_a_batch_too_far_from_the_sft_model_has_one_epoch(world):
    """update takes as many epochs as it is told, whatever the option says."""
    o = options(num_ppo_epochs=3, num_mini_batches=2)
    nets, batch = ready(world, o)
    figures, _ = train_ppo.update(batch, nets.policy, nets.value, optimizers(nets, o, 1e-3), 0, 1, o, run_of(o))
    assert figures["policy/updates"] == 2


# Figures of answers, by hand


def rows_of(scores, lengths=None, **columns):
    columns = {"score": scores, "length": lengths or [1] * len(scores)} | columns
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def test_ties_are_half_a_preference():
    """A win, three ties, a defeat and another win: 3.5 of 6, and Wilson's interval of it."""
    rows = rows_of([1.0, 2.0, 2.0, 0.0, -1.0, 0.5], judge=[0.0] * 6)
    base = rows_of([0.0, 2.0, 2.0, 0.0, 0.0, 0.0], judge=[1.0] * 6)
    rate, low, high = evaluate.preference(rows, base, "score")
    p, n, z = 3.5 / 6, 6, 1.96
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rate == pytest.approx(p)
    assert (low, high) == pytest.approx([(p + z * z / (2 * n) + s * half) / (1 + z * z / n) for s in (-1, 1)])
    assert evaluate.preference(rows, base, "judge")[0] == 0
    assert evaluate.preference(base, rows, "score")[0] == pytest.approx(1 - p)


def test_preferences_by_length_by_hand():
    """Nine answers that are -4, -3, -2; 0, 0, 1; 3, 5, 6 tokens longer than the baseline's: the shorter third loses,
    the middle one wins, ties and loses, the longer one wins. Lengths alone would order them otherwise."""
    longer = [3, -2, 0, 6, -4, 1, 5, -3, 0]
    base_lengths = [9, 30, 20, 8, 40, 15, 7, 35, 10]
    wins = [1, -1, 1, 1, -1, 0, 1, -1, -1]
    rows = rows_of([0.5 + w for w in wins], [n + d for n, d in zip(base_lengths, longer)])
    base = rows_of([0.5] * 9, base_lengths)
    z2 = 1.96 ** 2
    half = 1.96 * math.sqrt(0.25 / 3 + z2 / 36) / (1 + z2 / 3)
    expected = [(-4, -2, 0.0, 0.0, z2 / (3 + z2)), (0, 1, 0.5, 0.5 - half, 0.5 + half), (3, 6, 1.0, 3 / (3 + z2), 1.0)]
    found = evaluate.by_length(rows, base)
    assert len(found) == 3
    for ours, theirs in zip(found, expected):
        assert ours == pytest.approx(theirs)
    assert [(a, b) for a, b, *_ in evaluate.by_length(rows[:1], base[:1])] == [(3, 3)]  # no third is empty
    assert [(a, b) for a, b, *_ in evaluate.by_length(rows[:2], base[:2])] == [(-2, -2), (3, 3)]


def test_paired_differences_by_hand():
    """Equal answers differ by 0, a constant shift is found exactly, both without doubt; else the interval is about
    1.96 s / sqrt(n), of the named score, and the same each time."""
    scores = [k / 4 for k in range(-20, 20)]
    rows = rows_of(scores, judge=scores[::-1])
    shifted = rows_of([s + 1.5 for s in scores], judge=[s - 0.25 for s in scores[::-1]])
    assert evaluate.paired_difference(rows, rows) == (0.0, 0.0, 0.0)
    assert evaluate.paired_difference(shifted, rows) == (1.5, 1.5, 1.5)
    assert evaluate.paired_difference(shifted, rows, "judge") == (-0.25, -0.25, -0.25)
    some = rows_of([float(k % 2) for k in range(400)])
    mean, low, high = found = evaluate.paired_difference(some, rows_of([0.0] * 400))
    assert mean == 0.5 and (low, high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.006)
    assert found == evaluate.paired_difference(some, rows_of([0.0] * 400))


EVEN = [(-9, -2, 0.7, 0.6, 0.8), (-1, 1, 0.7, 0.6, 0.8), (2, 9, 0.7, 0.6, 0.8)]
LONGER = [(-9, -2, 0.5, 0.4, 0.6), (-1, 1, 0.55, 0.45, 0.65), (2, 9, 0.9, 0.85, 0.95)]
SHORTER = [(-9, -2, 0.9, 0.85, 0.95), (-1, 1, 0.55, 0.45, 0.65), (2, 9, 0.5, 0.4, 0.6)]


@pytest.mark.parametrize("win_rate, judge, thirds, sentence", [
    ((0.52, 0.48, 0.56), None, EVEN, "not to be told from the baseline: the reward model prefers 52.0% (48.0%-56.0%)"),
    ((0.52, 0.50, 0.56), (0.9, 0.8, 1.0), EVEN, "not to be told from the baseline: the reward model prefers 52.0% "
                                                "(50.0%-56.0%)"),
    ((0.4, 0.35, 0.45), (0.9, 0.8, 1.0), EVEN, "worse than the baseline: the reward model prefers 40.0% (35.0%-45.0%)"),
    ((0.7, 0.65, 0.75), (0.9, 0.8, 1.0), LONGER,
     "longer only: preferred where answers are longer, not where lengths are alike (55.0%)"),
    ((0.7, 0.65, 0.75), None, SHORTER,
     "shorter only: preferred where answers are shorter, not where lengths are alike (55.0%)"),
    ((0.7, 0.65, 0.75), None, [(-9, -2, 0.55, 0.45, 0.65), *LONGER[1:]],  # which may be chance among the shorter
     "longer only: preferred where answers are longer, not where lengths are alike (55.0%)"),
    ((0.7, 0.65, 0.75), None, EVEN,
     "preferred by the reward model (70.0%); whether that is real needs a --judge it was not trained on"),
    ((0.7, 0.65, 0.75), (0.6, 0.55, 0.65), EVEN,
     "believable: preferred by the reward model (70.0%) and by the judge (60.0%)"),
    ((0.7, 0.65, 0.75), (0.52, 0.5, 0.56), EVEN,
     "over-optimised: the reward model prefers 70.0%, the judge 52.0% (50.0%-56.0%)"),
    ((0.7, 0.65, 0.75), None, LONGER[1:],
     "preferred by the reward model (70.0%); whether that is real needs a --judge it was not trained on"),
])
def test_the_verdict_on_a_policy(win_rate, judge, thirds, sentence):
    """Each sentence, on figures at its border: an interval that touches one half tells nothing."""
    figures = {"win_rate": win_rate} | ({"judge_win_rate": judge} if judge else {})
    assert evaluate.verdict_on_policy(figures, thirds, judge is not None) == sentence
    assert evaluate.verdict_on_policy(figures, thirds, judge is not None, "reward") == sentence.replace(
        "the reward model", "the reward")


def test_figures_of_a_rollout_by_hand():
    """Two answers of 1 and 3 tokens: KL and the like are means a response, entropy and the sampler's gap a decision;
    on two ranks with the same rows they are the same."""
    batch = train_ppo.Batch(
        torch.tensor([[1, 2, EOS, EOS], [1, 4, 5, 6]]), torch.tensor([2, 1]), torch.tensor([3, 4]),
        torch.tensor([True, False]), torch.tensor([[0, -1.5, 0], [-2.0, -3, -4]]),
        logprobs=torch.tensor([[0, -1.0, 0], [-2, -3, -4]]), ref_logprobs=torch.tensor([[0, -1.5, 0], [-2, -3, -3]]),
        entropies=torch.tensor([[0, 3.0, 0], [1, 3, 1]]), values=torch.tensor([[0, 1.0, 0], [2, 0, 3]]),
        returns=torch.tensor([[0, 1.0, 0], [3, 1, 3]]), scores=torch.tensor([2.0, 1.0]),
        final_rewards=torch.tensor([2.0, 0.5]), penalised_kl=torch.tensor([[0, 1.0, 0], [0.5, 0.5, 1]]),
        group=torch.tensor([0, 1]))
    expected = {
        "objective/kl": (0.5 + 0 + 0 - 1) / 2, "objective/kl_k3": ((math.exp(-0.5) - 0.5) + (math.e - 2)) / 2,
        "objective/entropy": (1 + 9) / 2, "objective/scores": 1.5, "objective/non_score_reward": -0.1 * 3 / 2,
        "objective/rlhf_reward": 2.5 / 2 - 0.1 * 3 / 2, "objective/kl_coef": 0.1, "policy/entropy_avg": 8 / 4,
        "val/sampler_gap": 0.5 / 4, "val/explained_variance": 1 - 0.25 / 1, "completions/mean_length": 2.0,
        "completions/eos_rate": 0.5}
    for ranks in (1, 2):
        assert evaluate.rollout_figures(batch, 0.1, run_of(options(), ranks)) == pytest.approx(expected, rel=1e-6)


class Diary:
    """A Run that keeps what it is told."""

    def __init__(self):
        self.said, self.written = [], []

    def say(self, text):
        self.said.append(text)

    def write(self, name, record):
        self.written.append((name, record))


RECORD = {"step": 9, "objective/kl_coef": 0.05}
FAR = "the KL from the SFT model is 61.0 nats a response, --max_ref_kl is 60"
UNSOUND = "one update moved the policy by 1.5 nats a token (k3), more than 1"


@pytest.mark.parametrize("ref_kl, update_kl, epochs, fault, advice", [
    (61.0, 0.0, 1, FAR, "raise --kl_coef above 0.05 or lower --learning_rate below 0.0003"),
    (61.0, 1.5, 1, FAR, "raise --kl_coef above 0.05 or lower --learning_rate below 0.0003"),
    (60.0, 1.5, 2, UNSOUND, "lower --learning_rate below 0.0003 or --num_ppo_epochs below 2"),
])
def test_three_divergent_batches_end_the_run(ref_kl, update_kl, epochs, fault, advice):
    """In a row: each is warned of, the third's record is written and the run ends with exit status 1 and advice."""
    guard, run = evaluate.DivergenceGuard(options(max_ref_kl=60.0)), Diary()
    for n in (1, 2):
        assert guard.epochs(ref_kl) == epochs
        guard.after_update(RECORD, update_kl, run)
        assert guard.in_a_row == n and not run.written
    with pytest.raises(SystemExit) as stop:
        guard.epochs(ref_kl)
        guard.after_update(RECORD, update_kl, run)
    assert stop.value.code.startswith(f"error: step 9: for the third batch in a row {fault}: ")  # text is status 1
    assert f"; {advice}. A checkpoint" in stop.value.code and "is in out: --resume" in stop.value.code
    assert run.said == [f"warning: {fault}: this batch's epochs end early ({n} in a row; the third ends the run)"
                        for n in (1, 2, 3)]
    assert run.written == [("metrics.jsonl", RECORD)]


def test_a_sound_batch_between_divergent_ones_begins_the_count_again():
    """Up to the limits themselves a batch is sound and has all epochs; max_ref_kl 0 has no limit."""
    guard, run = evaluate.DivergenceGuard(options(max_ref_kl=60.0)), Diary()
    for ref_kl, update_kl, epochs, in_a_row in ((61.0, 0.0, 1, 1), (5.0, 1.01, 2, 2), (60.0, 1.0, 2, 0),
                                                (5.0, 2.0, 2, 1), (99.0, 0.0, 1, 2), (5.0, 0.0, 2, 0)):
        assert guard.epochs(ref_kl) == epochs
        guard.after_update(RECORD, update_kl, run)
        assert guard.in_a_row == in_a_row
    assert len(run.said) == 4 and not run.written
    guard = evaluate.DivergenceGuard(options(max_ref_kl=0.0))
    assert guard.epochs(1e9) == 2
    guard.after_update(RECORD, 0.0, run)
    assert guard.in_a_row == 0 and len(run.said) == 4


def test_the_count_of_divergent_batches_survives_a_restart():
    """Two before and one after make three."""
    before, run = evaluate.DivergenceGuard(options()), Diary()
    for _ in range(2):
        before.epochs(1e3)
        before.after_update(RECORD, 0.0, run)
    after = evaluate.DivergenceGuard(options(), before.in_a_row)
    after.epochs(1e3)
    with pytest.raises(SystemExit, match="third batch in a row"):
        after.after_update(RECORD, 0.0, run)


# Known optima: the best policy under a KL penalty is ref(y) exp(r(y) / beta) / Z.   Ziegler et al. 2019


def converge(reward, beta, response_length, steps, rows, lam=0.95, **changes):
    """The scripts' own paragraphs from a small random model -> {answer: probability}, of the SFT model and the
    policy. reward: a function of an answer's ids, or several rewards."""
    o = options(response_length=response_length, missing_eos_penalty=0.0, lam=lam, micro_batch_size=rows,
                num_ppo_epochs=4, num_mini_batches=1, vf_coef=1.0, **changes)
    run = run_of(o)
    ref = GPT(GPTConfig(1, 1, 16, 5, 4)).init_weights(torch.Generator().manual_seed(0)).eval()
    ref.wte.weight.data *= 6  # an uneven start
    nets = types.SimpleNamespace(policy=ref.with_head("lm"), ref=ref,
                                 value=ref.with_head("scalar") if o.advantages == "gae" else None)
    adam, several = optimizers(nets, o, 0.0), isinstance(reward, mixture.Reward)
    reward = reward if several else Table(reward)
    for step in range(steps):
        for optimizer in adam:
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        batch = train_ppo.roll_out(nets.policy, [[1]] * rows, [*range(rows // o.group_size)], EOS, step, o, run)
        score(batch, nets, reward, o, run)
        batch.scores = reward.learned(batch, o.reward_clip) if several else batch.scores
        train_ppo.credit(batch, beta, o, run)
        update(batch, nets, adam, step, o, run)
        if several:
            reward.follow(reward.figures(batch, run), o.multiplier_rate)
    return [answers(model, response_length) for model in (ref, nets.policy)]


@torch.no_grad()
def answers(model, left, before=(1,), p=1.0):
    """Probability of every answer of up to `left` tokens."""
    out = {}
    for token, q in enumerate(naive_logits(model, list(before)).softmax(0).tolist()):
        if token == EOS or left == 1:
            out[(*before, token)[1:]] = p * q
        else:
            out |= answers(model, left - 1, (*before, token), p * q)
    return out


def distance(policy, ref, score, beta):
    """Total variation between the policy and ref exp(r / beta) / Z."""
    best = {y: p * math.exp(score(y) / beta) for y, p in ref.items()}
    Z = sum(best.values())
    return 0.5 * sum(abs(policy[y] - best[y] / Z) for y in best)


@pytest.mark.slow  # two tokens, below, need all that one does
def test_one_token_reaches_the_known_optimum():
    """A fixed table of rewards: total variation from ref exp(r / beta) / Z below .02, from above .3 at the start."""
    table = {(0,): 0.5, (1,): -1.0, (2,): 1.0, (3,): 0.0, (4,): -0.5}
    ref, policy = converge(table.__getitem__, 0.7, 1, steps=60, rows=512)
    assert distance(ref, ref, table.__getitem__, 0.7) > 0.3
    assert distance(policy, ref, table.__getitem__, 0.7) < 0.02


def test_one_token_reaches_the_constrained_optimum():
    """Fixed tables of rewards and costs, a mean cost of at most 0.3: total variation from ref exp((r - m c) / beta) / Z
    below .02, with the m at which the mean is the limit; above .3 at the start, and from the optimum without a limit."""
    table = {(0,): 0.5, (1,): -1.0, (2,): 1.0, (3,): 0.0, (4,): -0.5}
    cost = {(0,): 0.0, (1,): 0.0, (2,): 1.0, (3,): 0.5, (4,): 0.0}
    reward = mixture.Reward([mixture.Part("r", "r"), mixture.Part("c", "c", limit=0.3)],
                            [Table(table.__getitem__), Table(cost.__getitem__)])
    ref, policy = converge(reward, 0.7, 1, steps=60, rows=128)

    def mean_cost(m):
        weights = {y: p * math.exp((table[y] - m * cost[y]) / 0.7) for y, p in ref.items()}
        return sum(weights[y] * cost[y] for y in ref) / sum(weights.values())

    low, high = 0.0, 10.0
    for _ in range(50):
        low, high = ((low + high) / 2, high) if mean_cost((low + high) / 2) > 0.3 else (low, (low + high) / 2)
    assert mean_cost(low) == pytest.approx(0.3) and 0.9 < low < 1.0
    assert reward.multipliers[1] == pytest.approx(low, abs=0.1)
    assert sum(policy[y] * cost[y] for y in cost) == pytest.approx(0.3, abs=0.02)
    for m, start, end in ((low, ref, policy), (0.0, policy, policy)):
        score_of = lambda y: table[y] - m * cost[y]  # noqa: E731, B023
        assert distance(start, ref, score_of, 0.7) > 0.3 and (m == 0 or distance(end, ref, score_of, 0.7) < 0.02)


def test_two_tokens_share_the_credit():
    """The reward comes after the second token and depends on both: the first is chosen for what can follow it."""
    def score(y):
        return {0: 0.5, 1: -1.0, 2: 1.0, 3: 0.5, 4: 0.0}[y[0]] * (1.5 if y[-1] in (2, 3) else -0.5)

    ref, policy = converge(score, 0.7, 2, steps=60, rows=384)
    assert distance(ref, ref, score, 0.7) > 0.25
    assert distance(policy, ref, score, 0.7) < 0.03


@pytest.mark.parametrize("advantages, K, length, rows", [
    ("rloo", 4, 2, 96), ("grpo", 8, 1, 96), pytest.param("rloo", 2, 2, 512, marks=pytest.mark.slow),
    pytest.param("grpo", 8, 2, 384, marks=pytest.mark.slow)])
def test_answers_to_a_prompt_reach_the_known_optimum(advantages, K, length, rows):
    """Without a value network, compared with one another, they lead to ref exp(r / beta) / Z as well."""
    def score(y):
        return {0: 0.5, 1: -1.0, 2: 1.0, 3: 0.5, 4: 0.0}[y[0]] * (1.5 if y[-1] in (2, 3) else -0.5)

    ref, policy = converge(score, 0.7, length, steps=60, rows=rows, advantages=advantages, group_size=K)
    assert distance(ref, ref, score, 0.7) > 0.25
    assert distance(policy, ref, score, 0.7) < 0.03
