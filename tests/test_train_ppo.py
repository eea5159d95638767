"""The paragraphs of train_ppo.py against a second implementation without vectors, and against known optima."""
import contextlib
import copy
import math
import types

import pytest
import torch

import train_ppo
from minirlhf import evaluate, rewards
from minirlhf.generate import KVCache, Rollout, generate
from minirlhf.model import GPT, GPTConfig, places
from minirlhf.runtime import generator

EOS = 0
DOUBLE = {"rtol": 1e-9, "atol": 1e-10}


def options(**changes):
    return train_ppo.Options(**{"value_warmup": 0, "ent_coef": 0.0, "kl_length_credit": 0.0, "reward_clip": 0.0,
                                "micro_batch_size": 3, "response_length": 6, "out_dir": "out"} | changes)


def run_of(o):
    """What the paragraphs need of a Run: one rank, no autocast, nothing written."""
    return types.SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext, total=lambda t: t,
                                 sum_gradients=lambda parameters: None,
                                 generator=lambda step, purpose: generator(o.seed, step, 0, purpose))


class Table:
    """A judge that looks an answer's ids up."""
    model = None

    def __init__(self, score):
        self.score = score

    def __call__(self, rollout):
        return torch.tensor([self.score(tuple(ids)) for ids in rollout.responses()], dtype=torch.double)


class Networked:
    """A judge that is a network, as the reward model is."""
    function, name = None, "model"

    def __init__(self, model):
        self.model = model

    def __call__(self, rollout):
        return self.model.score(rollout.tokens, rollout.lengths).detach()


@pytest.fixture
def world(make_model):
    """world(o, ...) -> networks in float64 that differ from one another, and a ragged rollout of 10 rows."""
    def make(o, rows=10):
        policy, ref = (make_model(seed=seed, dtype=torch.double) for seed in (1, 2))
        value, reward = (make_model("scalar", seed=seed, dtype=torch.double) for seed in (3, 4))
        for model in (policy, ref):
            model.wte.weight.data *= 0.5  # less sharp, so that answers of several tokens end by eos or by the limit
        reward.gain.fill_(0.7), reward.bias.fill_(-0.3)
        nets = train_ppo.Networks(policy, ref, value)
        prompts = [[(5 * b + t) % 12 + 1 for t in range(1 + b % 4)] for b in range(rows)]
        rollout = generate(policy, prompts, o.response_length, EOS, o.temperature,
                           torch.Generator().manual_seed(3))
        assert 0 < rollout.finished.sum() < rows and len(set(rollout.lengths.tolist())) > 2
        return nets, Networked(reward), rollout
    return make


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
    """[(ids before, token, old logprob, advantage, return, value), ...] for each row, advantages whitened."""
    batch, charges = [], []
    for b in range(len(rollout.lengths)):
        start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
        ids = rollout.tokens[b, :end].tolist()
        row = []
        for n in range(start, end):
            old, ref = (naive_logprob(m, ids[:n], ids[n], o.temperature).item() for m in (nets.policy, nets.ref))
            row.append([ids[:n], ids[n], old, old - ref, naive_value(nets.value, ids[:n]).item()])
            charges.append(old - ref)
        score = naive_value(reward, ids).item()
        score = max(-o.reward_clip, min(score, o.reward_clip)) if o.reward_clip else score
        if ids[-1] != EOS:
            score -= o.missing_eos_penalty
        batch.append((row, score))
    credit = o.kl_length_credit * sum(charges) / len(charges)
    out = []
    for row, score in batch:
        rewards = [-kl_coef * (kl - credit) for _, _, _, kl, _ in row]
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


def naive_entropy(model, ids, temperature):
    p = (naive_logits(model, ids) / temperature).softmax(0)
    return -sum(x * x.log() for x in p)


def naive_update(nets, batch, o, lr, step):
    """Every epoch and minibatch, one decision after another; AdamW written out.   Kingma & Ba 2015, algorithm 1.

    -> the sums of policy loss, half squared log-ratio, clipped decisions, ratio, k3; value loss, clipped values.
    """
    moments, sums = {}, [0.0] * 7
    for epoch in range(o.num_ppo_epochs):
        order = torch.randperm(len(batch), generator=generator(o.seed, step, 0, f"epoch {epoch}")).tolist()
        size = math.ceil(len(batch) / o.num_mini_batches)
        for at in range(0, len(order), size):
            rows = [batch[b] for b in order[at:at + size]]
            losses = []
            for ids, token, old, A, R, V_old in (d for row in rows for d in row):
                ratio = (naive_logprob(nets.policy, ids, token, o.temperature) - old).exp()
                low, high = 1 - o.cliprange, 1 + o.cliprange
                clipped = low if ratio < low else high if ratio > high else ratio
                gain = ratio * A if ratio * A < clipped * A else clipped * A
                V, low, high = naive_value(nets.value, ids), V_old - o.cliprange_value, V_old + o.cliprange_value
                near = low if V < low else high if V > high else V
                worse = (V - R) ** 2 if (V - R) ** 2 > (near - R) ** 2 else (near - R) ** 2
                d = math.log(ratio.item())
                for k, term in enumerate((-gain, d * d / 2, clipped * A < ratio * A, ratio, math.exp(d) - 1 - d,
                                          0.5 * worse, (near - R) ** 2 > (V - R) ** 2)):
                    sums[k] += term.item() if isinstance(term, torch.Tensor) else term
                losses.append(-gain + o.vf_coef * 0.5 * worse
                              - o.ent_coef * naive_entropy(nets.policy, ids, o.temperature))
            (sum(losses) / len(losses)).backward()
            for model in (nets.policy, nets.value):
                for p in model.parameters():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # all of its decisions were clipped
                norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
                for p in model.parameters():
                    g = p.grad * min(1.0, o.max_grad_norm / (norm + 1e-6))
                    m, v, n = moments.get(p, (0.0, 0.0, 0))
                    m, v, n = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2, n + 1
                    moments[p] = m, v, n
                    p.data -= lr * (m / (1 - 0.9 ** n)) / ((v / (1 - 0.999 ** n)).sqrt() + o.adam_eps)
                    p.grad = None
    return sums


def optimizers(nets, o, lr):
    return [torch.optim.AdamW(m.parameters(), lr=lr, eps=o.adam_eps, weight_decay=0.0)
            for m in (nets.policy, nets.value)]


@pytest.mark.parametrize("changes", [
    {},
    {"temperature": 0.7, "ent_coef": 0.05, "kl_length_credit": 0.5, "gamma": 0.9, "lam": 0.8},
    {"num_ppo_epochs": 3, "num_mini_batches": 5, "max_grad_norm": 0.01, "missing_eos_penalty": 2.0,
     "reward_clip": 0.5, "vf_coef": 1.0},
], ids=["defaults", "other credit", "other update"])
def test_a_step_equals_the_naive_one(world, monkeypatch, changes):
    """Same weights, same rollout: log-probabilities, advantages and returns, and the weights after all epochs and
    minibatches, are those of loops over rows and tokens, in float64; ratios were clipped on the way."""
    monkeypatch.setattr(train_ppo, "BLOWN_UP", math.inf)  # the steps are large, so that clips bite
    o = options(**changes)
    nets, judge, rollout = world(o)
    run, kl_coef, lr = run_of(o), 0.3, 3e-3
    other = copy.deepcopy(nets)
    judged = train_ppo.judgement(nets, rollout, judge, o, run)
    advantages, returns, _, _ = train_ppo.credit(rollout, judged, kl_coef, o, run.total)
    batch = naive_batch(other, judge.model, rollout, o, kl_coef)
    mask = rollout.response_mask
    for place, ours in ((2, judged.old_logprobs), (3, advantages), (4, returns), (5, judged.values)):
        torch.testing.assert_close(ours[mask], torch.tensor([d[place] for row in batch for d in row],
                                                            dtype=torch.double), **DOUBLE)
        assert not ours[~mask].any()
    totals, counted, _, _ = train_ppo.update(nets, optimizers(nets, o, lr), rollout, judged, advantages, returns, 7, o,
                                             run)
    sums = naive_update(other, batch, o, lr, 7)
    assert totals.tolist() == pytest.approx(sums, rel=1e-5)
    assert counted == o.num_ppo_epochs * mask.sum() and totals[2] > 0  # some were clipped
    for ours, theirs in ((nets.policy, other.policy), (nets.value, other.value)):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **DOUBLE)


# Paragraph by paragraph


def test_judgement_does_not_depend_on_microbatches(world):
    """Scores, log-probabilities, values and entropies of ten rows at once are those of one row at a time."""
    o = options(micro_batch_size=10)
    nets, judge, rollout = world(o)
    once, each = (train_ppo.judgement(nets, rollout, judge, options(micro_batch_size=size), run_of(o))
                  for size in (10, 1))
    for name in ("old_logprobs", "ref_logprobs", "values", "entropies", "scores"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), **DOUBLE)
    assert not once.scores.requires_grad and not once.values.requires_grad


def test_judgement_recomputes_what_the_sampler_said(world):
    """Whatever the sampler noted, the old log-probabilities are the trainer's, so that in one epoch of one minibatch
    the ratio is 1, with several microbatches too."""
    o = options(num_ppo_epochs=1, num_mini_batches=1)
    nets, judge, rollout = world(o)
    rollout.sampler_logprobs.fill_(-9.0)
    judged = train_ppo.judgement(nets, rollout, judge, o, run_of(o))
    advantages, returns, _, _ = train_ppo.credit(rollout, judged, 0.3, o, lambda t: t)
    totals, counted, ratios, _ = train_ppo.update(nets, optimizers(nets, o, 1e-2), rollout, judged, advantages, returns,
                                                  0, o, run_of(o))
    assert [float(r) for r in ratios] == pytest.approx([1.0], abs=1e-12) and float(totals[1]) < 1e-20


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


def test_decisions_at_another_temperature(make_model):
    """Logits are divided by it before the softmax: at T, log p = logit/T - logsumexp(logits/T), of all and of chosen
    tokens."""
    model, tokens = make_model(), torch.tensor([[1, 2, 3, 4]])
    mask = torch.tensor([[False, True, True]])
    every, chosen = evaluate.decisions(model, tokens, places(mask), 0.5)
    expected = (model(tokens)[0, 1:3] * 2).log_softmax(-1)
    torch.testing.assert_close(every, expected)
    torch.testing.assert_close(chosen, expected[[0, 1], [3, 4]])


def hand_rollout():
    """Two answers: [3, eos] after one prompt token, and [4, 5] without eos after two."""
    tokens = torch.tensor([[1, 3, EOS, EOS], [1, 2, 4, 5]])
    return Rollout(tokens, torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([True, False]), torch.zeros(2, 3))


def test_credit_by_hand():
    """Scores 2 and 1, no eos costs .5, KL 1 a token at beta .1, V 0, gamma lambda 1: to go are
    1.8, 1.9 and .3, .4; whitened, returns not."""
    rollout = hand_rollout()
    mask = rollout.response_mask
    assert mask.tolist() == [[True, True, False], [False, True, True]]
    zeros = torch.zeros(2, 3)
    judged = train_ppo.Judgement(zeros, -mask.float(), zeros, zeros, torch.tensor([2.0, 1.0]))
    o = options(lam=1.0, missing_eos_penalty=0.5)
    advantages, returns, charged, paid = train_ppo.credit(rollout, judged, 0.1, o, lambda t: t)
    torch.testing.assert_close(returns, torch.tensor([[1.8, 1.9, 0], [0, 0.3, 0.4]]))
    assert paid.tolist() == [2.0, 0.5] and charged[mask].tolist() == [1, 1, 1, 1]
    a = torch.tensor([1.8, 1.9, 0.3, 0.4])
    torch.testing.assert_close(advantages[mask], (a - 1.1) / a.std(correction=0))
    # A fifth of the mean KL is free: each decision pays .08.
    returns = train_ppo.credit(rollout, judged, 0.1, options(lam=1.0, missing_eos_penalty=0.5, kl_length_credit=0.2),
                               lambda t: t)[1]
    torch.testing.assert_close(returns, torch.tensor([[1.84, 1.92, 0], [0, 0.34, 0.42]]))


def test_scores_count_up_to_the_clip():
    """Scores 5 and -3 count as 2 and -2, a function's own as they are; the penalty comes after."""
    rollout, zeros = hand_rollout(), torch.zeros(2, 3)
    judged = train_ppo.Judgement(zeros, zeros, zeros, zeros, torch.tensor([5.0, -3.0]))
    for changes, expected in (({}, [2.0, -2.5]), ({"reward": "mine.py:f"}, [5.0, -3.5]),
                              ({"reward_clip": 0.0}, [5.0, -3.5])):
        o = options(**{"reward_clip": 2.0, "missing_eos_penalty": 0.5} | changes)
        assert train_ppo.credit(rollout, judged, 0.1, o, lambda t: t)[3].tolist() == expected


def test_whitened_rewards_keep_their_mean():
    """--whiten_rewards divides rewards by their deviation before GAE: -.1, 1.9, -.1, .4 about their mean .525."""
    rollout, zeros = hand_rollout(), torch.zeros(2, 3)
    judged = train_ppo.Judgement(zeros, -rollout.response_mask.float(), zeros, zeros, torch.tensor([2.0, 1.0]))
    o = options(lam=1.0, missing_eos_penalty=0.5, whiten_rewards=True)
    _, returns, _, _ = train_ppo.credit(rollout, judged, 0.1, o, lambda t: t)
    r = torch.tensor([-0.1, 1.9, -0.1, 0.4])
    r = (r - 0.525) / r.std(correction=0) + 0.525
    torch.testing.assert_close(returns, torch.tensor([[r[0] + r[1], r[1], 0], [0, r[2] + r[3], r[3]]]))


def ready(world, o):
    nets, judge, rollout = world(o)
    judged = train_ppo.judgement(nets, rollout, judge, o, run_of(o))
    advantages, returns, _, _ = train_ppo.credit(rollout, judged, 0.3, o, lambda t: t)
    return nets, rollout, judged, advantages, returns


def gradients(nets, rollout, judged, advantages, returns, o, run):
    """Of both networks over all rows, into their .grad -> the sums (7,)."""
    parts, count = train_ppo.microbatches(rollout, torch.randperm(10), o), run.total(rollout.response_mask.sum())
    return torch.cat([train_ppo.policy_gradients(nets, parts, count, judged, advantages, o, run),
                      train_ppo.value_gradients(nets, parts, count, judged, returns, o, run)])


@pytest.mark.parametrize("size", [1, 4, 7])
def test_microbatch_size_changes_no_gradient(world, size):
    """Gradients and sums of ten ragged rows in microbatches are those of all rows at once."""
    o = options(ent_coef=0.1)
    nets, *rest = ready(world, o)
    found = []
    for size in (10, size):
        sums = gradients(nets, *rest, options(ent_coef=0.1, micro_batch_size=size), run_of(o))
        found.append((sums, torch.cat([p.grad.flatten() for m in (nets.policy, nets.value) for p in m.parameters()])))
        nets.policy.zero_grad(), nets.value.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], **DOUBLE)


def test_gradients_come_from_the_policy_and_value_network_alone(world):
    """The reference stays frozen, and so do the numbers of the judgement: no graph leads to them."""
    o = options()
    nets, *rest = ready(world, o)
    gradients(nets, *rest, o, run_of(o))
    assert all(p.grad is None for p in nets.ref.parameters())
    assert all(p.grad is not None for m in (nets.policy, nets.value) for p in m.parameters())


def test_ranks_divide_by_the_count_of_all(world):
    """With `total` doubling, as two ranks with the same rows would, each rank's gradient is half of one rank's."""
    o = options()
    nets, *rest = ready(world, o)
    norms = []
    for factor in (1, 2):
        run = run_of(o)
        run.total = lambda t, factor=factor: factor * t
        gradients(nets, *rest, o, run)
        norms.append([float(m.wte.weight.grad.norm()) for m in (nets.policy, nets.value)])
        nets.policy.zero_grad(), nets.value.zero_grad()
    assert norms[0] == pytest.approx([2 * norm for norm in norms[1]])
    _, counted, _, _ = train_ppo.update(nets, optimizers(nets, o, 1e-3), *rest, 0, o, run)
    assert counted == 2 * o.num_ppo_epochs * rest[0].response_mask.sum()


def test_the_policy_rests_in_the_value_warmup(world):
    """In the first value_warmup steps the policy's weights stay bit-equal while the value network's move; then both."""
    o = options(value_warmup=3)
    for step, rests in ((2, True), (3, False)):
        nets, *rest = ready(world, o)
        before = copy.deepcopy(nets)
        train_ppo.update(nets, optimizers(nets, o, 1e-3), *rest, step, o, run_of(o))
        assert torch.equal(nets.policy.wte.weight, before.policy.wte.weight) is rests
        assert not torch.equal(nets.value.wte.weight, before.value.wte.weight)


def test_target_kl_ends_the_epochs(world, monkeypatch):
    """Above it the batch's epochs end before another step, and no gradient is left; 0 never stops."""
    k3, real = [], train_ppo.policy_gradients

    def watched(*arguments):
        sums = real(*arguments)
        k3.append(float(sums[4] / arguments[2]))
        return sums

    def minibatches(target_kl):
        o = options(target_kl=target_kl, num_mini_batches=5)
        nets, *rest = ready(world, o)
        k3.clear()
        _, counted, ratios, stopped = train_ppo.update(nets, optimizers(nets, o, 1e-2), *rest, 0, o, run_of(o))
        assert all(p.grad is None for m in (nets.policy, nets.value) for p in m.parameters())
        return len(ratios), stopped

    monkeypatch.setattr(train_ppo, "policy_gradients", watched)
    assert minibatches(0.0) == (10, 0.0)
    highest = max(k3)
    where = k3.index(highest)
    assert k3[0] < 1e-9 and 0 < where  # the first minibatch's ratio is 1
    assert minibatches(highest * 1.01) == (10, False)
    first = next(i for i, value in enumerate(k3) if value > highest / 2)
    assert minibatches(highest / 2) == (first, k3[-1]) and k3[-1] > highest / 2
    monkeypatch.setattr(train_ppo, "BLOWN_UP", highest / 2)  # without target_kl too
    assert minibatches(0.0) == (first, k3[-1]) == minibatches(2 * highest)


@pytest.mark.parametrize("where, value, says", [
    ("advantages", -math.inf, "step 5: the advantages are not finite"),
    ("advantages", math.nan, "step 5: the advantages are not finite"),
    ("returns", math.inf, "step 5: the returns are not finite"),
    ("old_logprobs", math.nan, "step 5, epoch 1: not finite (loss nan"),
    ("values", math.nan, "step 5, epoch 1: not finite (loss nan")])
def test_what_is_not_finite_stops_before_the_update(world, refused, where, value, says):
    """Advantages, returns and log-probabilities end the run with exit status 2 before a weight moves; values, which
    only one loss meets, before one of the network that they would spoil."""
    o = options()
    nets, rollout, judged, advantages, returns = ready(world, o)
    before = copy.deepcopy(nets)
    columns = {"advantages": advantages, "returns": returns, **vars(judged)}
    columns[where][rollout.response_mask] = value
    error = refused(train_ppo.update, nets, optimizers(nets, o, 1e-2), rollout, judged, advantages, returns, 4, o,
                    run_of(o))
    assert says in error and "stopped before the update" in error
    for name in ["value"] if where == "values" else ["policy", "value"]:
        pairs = zip(getattr(nets, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)


def test_a_weight_that_is_not_finite_stops_before_the_update(world, refused):
    """Also one that no row of the batch reads, whose loss and gradient are fine."""
    o = options()
    nets, *rest = ready(world, o)
    nets.policy.wpe.weight.data[-1] = math.nan
    error = refused(train_ppo.update, nets, optimizers(nets, o, 1e-2), *rest, 4, o, run_of(o))
    assert "step 5, epoch 1" in error and "of the weights nan" in error


def test_a_score_that_is_not_finite_is_refused(world, refused):
    """The reward model's name and the completion are named, before anything is learned from it."""
    o = options()
    _, judge, rollout = world(o)
    judge.model.gain.fill_(math.inf)
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"<{len(ids)} tokens>")
    error = refused(rewards.Judge(run_of(o), tokenizer, judge.model, name="rm.pt"), rollout)
    assert "rm.pt: gives the score" in error and "inf" in error and "tokens>" in error


FIGURES = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": 0.05, "completions/mean_length": 10.0,
           "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9}


@pytest.mark.parametrize("changes, spread, words", [
    ({}, 1.0, []),
    ({"objective/scores": 3.25}, 0.0, ["variance", "all scores of step 7 are 3.2500"]),
    ({"completions/eos_rate": 0.25}, 1.0, ["eos", "25% of the answers", "--missing_eos_penalty above 1"]),
    ({"completions/mean_length": 4.9}, 1.0, ["length", "shrunk to 4.9 tokens", "10.0; raise --kl_length_credit above"]),
    ({"completions/mean_length": 20.1}, 1.0, ["length", "grown to 20.1 tokens", "--kl_coef above 0.05"]),
    ({"policy/entropy_avg": 1.9}, 1.0, ["entropy", "1.90 nats a decision", "4.00", "--ent_coef above 0"]),
])
def test_what_a_person_is_warned_about(changes, spread, words):
    """Half the SFT model's length or entropy, twice its length, fewer than half ended, equal scores; else nothing."""
    base = {"mean_length": 10.0, "ref_logprob_per_token": -4.0}
    found = [*evaluate.concerns(FIGURES | changes, spread, base, options())]
    assert len(found) == (1 if words else 0)
    assert all(word in " ".join(found[0]) for word in words)


def test_rollouts_and_looks_take_the_compiled_steps(world, monkeypatch):
    """Where there is a decoder, every token but the first of an answer comes from it."""
    class Counting:
        steps = 0

        def __init__(self, model):
            self.model, self.cache = model, lambda rows, slots: KVCache(model, rows, slots)

        def step(self, tokens, cache, positions):
            Counting.steps += 1
            cache.filled = cache.k.shape[2]
            return self.model.logits(self.model.hidden(tokens, cache, positions)[:, 0])

    monkeypatch.setattr(train_ppo, "Decoder", Counting)
    o = options(response_length=5)
    nets, *_ = world(o)
    plain, compiled = nets, train_ppo.Networks(nets.policy, nets.ref, nets.value, True)
    a, b = (train_ppo.roll_out(n, [[1], [2]] * 4, 99, 0, o, run_of(o)) for n in (plain, compiled))
    assert torch.equal(a.tokens, b.tokens) and Counting.steps == 4
    tokenizer = types.SimpleNamespace(decode=str, eos=99)
    evaluate.answer(nets.policy, nets.ref, [], run_of(o), tokenizer, [[1], [2]], o, decoder=compiled.decoder)
    assert Counting.steps == 8


@pytest.mark.slow
def test_a_compiled_step_equals_the_plain_one(world):
    """--compile: the same judgement, sums and weights after two epochs of microbatches of several lengths."""
    o, found = options(micro_batch_size=3, ent_coef=0.1), []
    for compiled in (False, True):
        nets, judge, rollout = world(o)
        nets = train_ppo.Networks(nets.policy, nets.ref, nets.value, compiled)
        judged = train_ppo.judgement(nets, rollout, judge, o, run_of(o))
        advantages, returns, _, _ = train_ppo.credit(rollout, judged, 0.3, o, lambda t: t)
        totals, *_ = train_ppo.update(nets, optimizers(nets, o, 1e-2), rollout, judged, advantages, returns, 0, o,
                                      run_of(o))
        found.append((judged.old_logprobs, judged.values, totals, nets.policy.state_dict(), nets.value.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_every_row_once_an_epoch_in_as_many_minibatches_as_asked(world, monkeypatch):
    """Each epoch deals all rows to num_mini_batches steps, in another order."""
    o = options(num_ppo_epochs=3, num_mini_batches=5)
    nets, *rest = ready(world, o)
    dealt, real = [], train_ppo.microbatches
    monkeypatch.setattr(train_ppo, "microbatches", lambda *a: dealt.append(a[1].tolist()) or real(*a))
    train_ppo.update(nets, optimizers(nets, o, 1e-3), *rest, 0, o, run_of(o))
    epochs = [sum(dealt[i:i + 5], []) for i in (0, 5, 10)]
    assert [len(part) for part in dealt] == [2] * 15
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


# Known optima: the best policy under a KL penalty is ref(y) exp(r(y) / beta) / Z.   Ziegler et al. 2019


def converge(score, beta, response_length, steps, rows, lam=0.95, **changes):
    """The scripts' own paragraphs from a small random model -> {answer: probability}, of the SFT model and the
    policy."""
    o = options(response_length=response_length, missing_eos_penalty=0.0, lam=lam, micro_batch_size=rows,
                num_ppo_epochs=4, num_mini_batches=1, vf_coef=1.0, **changes)
    run = run_of(o)
    ref = GPT(GPTConfig(1, 1, 16, 5, 4)).init_weights(torch.Generator().manual_seed(0)).eval()
    ref.wte.weight.data *= 6  # an uneven start
    nets = train_ppo.Networks(ref.with_head("lm"), ref, ref.with_head("scalar"))
    adam = optimizers(nets, o, 0.0)
    for step in range(steps):
        for optimizer in adam:
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rollout = generate(nets.policy, [[1]] * rows, response_length, EOS, 1.0, run.generator(step, "rollout"))
        judged = train_ppo.judgement(nets, rollout, Table(score), o, run)
        advantages, returns, _, _ = train_ppo.credit(rollout, judged, beta, o, run.total)
        train_ppo.update(nets, adam, rollout, judged, advantages, returns, step, o, run)
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


def test_one_token_reaches_the_known_optimum():
    """A fixed table of rewards: total variation from ref exp(r / beta) / Z below .02, from above .3 at the start."""
    table = {(0,): 0.5, (1,): -1.0, (2,): 1.0, (3,): 0.0, (4,): -0.5}
    ref, policy = converge(table.__getitem__, 0.7, 1, steps=60, rows=512)
    assert distance(ref, ref, table.__getitem__, 0.7) > 0.3
    assert distance(policy, ref, table.__getitem__, 0.7) < 0.02


def test_two_tokens_share_the_credit():
    """The reward comes after the second token and depends on both: the first is chosen for what can follow it."""
    def score(y):
        return {0: 0.5, 1: -1.0, 2: 1.0, 3: 0.5, 4: 0.0}[y[0]] * (1.5 if y[-1] in (2, 3) else -0.5)

    ref, policy = converge(score, 0.7, 2, steps=80, rows=512)
    assert distance(ref, ref, score, 0.7) > 0.25
    assert distance(policy, ref, score, 0.7) < 0.03
