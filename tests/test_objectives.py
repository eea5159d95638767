"""Every formula against numbers worked out by hand, an independent oracle, or its own gradient."""
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minirlhf import objectives as O
from minirlhf.generate import sample

LOUD = (1e9, -1e9, math.nan)


def tensor(*rows, grad=False):
    return torch.tensor(rows, dtype=torch.double, requires_grad=grad)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), **tolerance)


def some(*shape, seed=0, grad=False):
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def on_ranks(function, shares):
    """function(share, total) of each rank, all at once, where total sums a tensor over them -> what each gives."""
    parts, meeting = [None] * len(shares), threading.Barrier(len(shares), timeout=60)

    def rank(k):
        def total(t):
            parts[k] = t
            meeting.wait()
            whole = sum(parts)
            meeting.wait()
            return whole
        return function(shares[k], total)

    with ThreadPoolExecutor(len(shares)) as pool:
        return [*pool.map(rank, range(len(shares)))]


# Log-probabilities


def test_token_logprobs_by_hand():
    """logits (0, log 3) are probabilities 1/4 and 3/4, whatever constant is added to the logits."""
    logits = torch.tensor([[0.0, math.log(3)], [1e4, 1e4 + math.log(3)]], dtype=torch.double).expand(3, 2, 2)
    tokens = torch.tensor([[0, 0], [1, 1], [0, 1]])
    quarter, rest = math.log(1 / 4), math.log(3 / 4)
    close(O.token_logprobs(logits, tokens), [[quarter, quarter], [rest, rest], [quarter, rest]])


def test_sft_loss_is_the_surprise():
    """-log p of the token: log V for uniform logits, and its gradient is p - onehot."""
    logits = torch.zeros(1, 4, dtype=torch.double, requires_grad=True)
    loss = O.sft_loss(logits, torch.tensor([2]))
    close(loss, [math.log(4)])
    loss.sum().backward()
    close(logits.grad, [[0.25, 0.25, -0.75, 0.25]])


@pytest.mark.parametrize("probabilities, expected", [
    ([1 / 4] * 4, math.log(4)),
    ([1 / 2, 1 / 4, 1 / 4], 1.5 * math.log(2)),  # 1/2 log 2 + 2 * 1/4 log 4
    ([0.0, 1.0, 0.0], 0.0),  # impossible tokens add nothing: p log p -> 0
    ([0.0, 1 / 2, 1 / 2], math.log(2)),
])
def test_entropy_by_hand(probabilities, expected):
    """-sum p log p, tokens of probability 0 (logit -inf) included; d H / d logit = -p (log p + H), 0 for those too."""
    logits = (tensor(*probabilities).log() + 7).requires_grad_()
    H = O.entropy(logits.log_softmax(-1))
    close(H, expected)
    (3 * H).backward()
    close(logits.grad, [-3 * p * (math.log(p) + expected) if p else 0.0 for p in probabilities])


# Stages 1 and 2


def test_bradley_terry_by_hand():
    """Equal scores cost log 2; log 3 ahead costs log 4/3; the scores' gradients are -(1 - p) and 1 - p."""
    chosen, rejected = tensor(0.5, 2 + math.log(3), 0.0, grad=True), tensor(0.5, 2.0, 1e4, grad=True)
    loss = O.bradley_terry_loss(chosen, rejected)
    close(loss, [math.log(2), math.log(4 / 3), 1e4])  # far behind: linear, not inf
    loss.sum().backward()
    close(chosen.grad, [-1 / 2, -1 / 4, -1.0])
    close(rejected.grad, -chosen.grad)


# Direct alignment: each pair's two texts


def test_dpo_loss_by_hand():
    """h = 2 - (-1) = 3 at beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5). Of labels that are wrong in a quarter of the
    cases: 3/4 log(1 + e^-1.5) + 1/4 log(1 + e^1.5). Gradient: -beta sigmoid(-1.5) in h, and less a quarter of it all."""
    chosen, rejected = tensor(2.0, 0.7, grad=True), tensor(-1.0, 0.7)
    right, wrong = math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.5))
    close(O.dpo_loss(chosen, rejected, 0.5), [right, math.log(2)])
    loss = O.dpo_loss(chosen, rejected, 0.5, 0.25)
    close(loss, [0.75 * right + 0.25 * wrong, math.log(2)])
    # d/dh: -beta (1-e) sigmoid(-beta h) + beta e sigmoid(beta h)
    down, up = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))
    close(torch.autograd.grad(loss.sum(), chosen)[0], [0.5 * (-0.75 * down + 0.25 * up), 0.5 * (-0.75 + 0.25) / 2])


def test_dpo_loss_is_bradley_terry_s_of_implicit_rewards():
    """Rewards beta (log pi - log ref) in stage 2's loss; only the difference of a pair counts."""
    chosen, rejected = some(9), some(9, seed=1)
    close(O.dpo_loss(chosen, rejected, 0.3), O.bradley_terry_loss(0.3 * chosen, 0.3 * rejected))
    for loss in (O.dpo_loss, O.ipo_loss):
        close(loss(chosen + 7.0, rejected + 7.0, 0.3), loss(chosen, rejected, 0.3))


def test_smoothed_labels_have_their_own_best_margin():
    """A share e of wrong labels is best met by sigmoid(beta h) = 1 - e, not by a margin without end."""
    h = torch.linspace(-40, 40, 8001, dtype=torch.double)
    best = h[O.dpo_loss(h, torch.zeros_like(h), 0.1, 0.2).argmin()]
    assert float(best) == pytest.approx(math.log(0.8 / 0.2) / 0.1, abs=0.01)
    assert h[O.dpo_loss(h, torch.zeros_like(h), 0.1).argmin()] == 40


def test_ipo_loss_by_hand():
    """h = 3 at beta 0.25 shall be 1 / (2 beta) = 2: a loss of 1; none at h = 2; gradient 2 (h - 2), also downwards."""
    chosen, rejected = tensor(2.0, 2.0, 0.0, grad=True), tensor(-1.0, 0.0, 0.0)
    loss = O.ipo_loss(chosen, rejected, 0.25)
    close(loss, [1.0, 0.0, 4.0])
    close(torch.autograd.grad(loss.sum(), chosen)[0], [2.0, 0.0, -4.0])


def test_simpo_loss_by_hand():
    """Means a token of -1 and -2 at beta 2: a difference of 2, less a margin of 0.5: log(1 + e^-1.5)."""
    close(O.simpo_loss(tensor(-1.0, -1.0), tensor(-2.0, -1.0), 2.0, 0.5),
          [math.log1p(math.exp(-1.5)), math.log1p(math.exp(0.5))])


@pytest.mark.parametrize("name, more", [("dpo_loss", (0.5, 0.1)), ("ipo_loss", (0.5,)), ("simpo_loss", (2.0, 0.7))])
def test_alignment_losses_and_their_gradients(name, more):
    """Autograd's are those of finite differences, each pair has its own, and chosen's is minus rejected's; finite where
    log-ratios are hundreds of nats."""
    chosen, rejected, loss = some(5, grad=True), some(5, seed=1, grad=True), getattr(O, name)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *more), (chosen, rejected))
    gradients = torch.autograd.grad(loss(chosen, rejected, *more)[3], (chosen, rejected))
    close(gradients[0], -gradients[1])
    assert gradients[0].count_nonzero() == 1
    for far in (tensor(-900.0, 900.0, grad=True),):
        found = loss(far, -far, *more)
        assert found.isfinite().all() and torch.autograd.grad(found.sum(), far)[0].isfinite().all()


def test_expected_calibration_error_by_hand():
    """Bin .9-1: four at .95 of which 3 happened, gap .2; bin .1-.2: one at .15 that did not; 4/5 .2 + 1/5 .15 = .19."""
    p, happened = torch.tensor([0.95, 0.95, 0.15, 0.95, 0.95]), torch.tensor([True, True, False, True, False])
    assert O.expected_calibration_error(p, happened) == pytest.approx(0.19, abs=1e-6)
    # in one single bin: mean p .79, 3 of 5 happened
    assert O.expected_calibration_error(p, happened, bins=1) == pytest.approx(0.19, abs=1e-6)
    # two errors that would cancel in one bin do not in two: 1/2 .9 + 1/2 .9
    p, happened = torch.tensor([0.1, 0.9]), torch.tensor([True, False])
    assert O.expected_calibration_error(p, happened) == pytest.approx(0.9, abs=1e-6)
    assert O.expected_calibration_error(p, happened, bins=1) == pytest.approx(0.0, abs=1e-6)
    assert O.expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0  # the edges


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_fit_temperature_by_hand(scale):
    """Three pairs a gap `scale` ahead and one as far behind: sigmoid(scale/T) = 3/4, so T = scale / log 3."""
    d = scale * torch.tensor([1.0, 1, 1, -1])
    assert O.fit_temperature(d) == pytest.approx(scale / math.log(3), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_fit_temperature_is_the_minimum(seed):
    """At the fitted T the loss is lower than anywhere around it, heavy tails included."""
    d = some(200, seed=seed) ** 3
    d = d - d.mean() + 0.3  # more right than wrong: otherwise no T is best
    T = O.fit_temperature(d)

    def loss(T):
        return float(O.bradley_terry_loss(d / T, torch.zeros_like(d)).mean())

    assert all(loss(T) < loss(T * factor) for factor in (0.3, 0.9, 0.999, 1.001, 1.1, 3.0))


def test_fit_temperature_stays_finite_without_an_optimum():
    """All pairs right: T far below their gaps; all wrong: far above; all tied: any finite T."""
    assert 0 < O.fit_temperature(torch.tensor([1.0, 3.0])) < 0.1
    assert 100 < O.fit_temperature(torch.tensor([-1.0, -3.0])) < math.inf
    assert 0 < O.fit_temperature(torch.zeros(3)) < math.inf


# KL estimators


def test_kl_estimators_by_hand():
    """log p - log q = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2."""
    p, q = tensor(math.log(1 / 2)), tensor(math.log(1 / 4))
    close(O.k1(p, q), [math.log(2)])
    close(O.k2(p, q), [math.log(2) ** 2 / 2])
    close(O.k3(p, q), [1 / 2 - 1 + math.log(2)])
    close(O.k3(q, p), [2 - 1 - math.log(2)])


def test_k1_and_k3_are_unbiased():
    """Over samples of p both average to KL(p || q), exactly: sum_x p(x) k(x); k3 is never negative."""
    p, q = tensor(0.7, 0.2, 0.1), tensor(0.2, 0.5, 0.3)
    kl = (p * (p / q).log()).sum()
    for k in (O.k1, O.k3):
        close((p * k(p.log(), q.log())).sum(), kl)
    assert (O.k3(p.log(), q.log()) >= 0).all() and (O.k1(p.log(), q.log()) < 0).any()


def test_k3_keeps_its_digits_near_zero():
    """In float32, a log-ratio of 1e-3 gives 5e-7 to four digits, where exp(x) - 1 - x would lose most of them."""
    assert float(O.k3(torch.tensor(-1.0), torch.tensor(-1.001))) == pytest.approx(0.001 ** 2 / 2, rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_best_of_n_kl_is_an_upper_bound(n):
    """Best of n over two equally likely answers takes the better one with 1 - 2^-n; its KL stays below the formula."""
    better = 1 - 0.5 ** n
    kl = better * math.log(2 * better) + (1 - better) * math.log(2 * (1 - better))
    assert kl <= O.best_of_n_kl(n) == math.log(n) - (n - 1) / n


@pytest.mark.parametrize("kl, factor", [
    (5.0, 1.0),
    (5.5, 1.01),  # 10 % over: 1 + .1 * 100/1000
    (50.0, 1.02),  # the error is clipped to .2
    (4.5, 0.99),
    (0.0, 0.98),
])
def test_adaptive_kl_coef_by_hand(kl, factor):
    """Target 5 nats a response, 100 responses, horizon 1000."""
    assert O.adaptive_kl_coef(0.05, kl, 5.0, n=100, horizon=1000) == pytest.approx(0.05 * factor)


# Reward and credit


def test_moments_by_hand():
    """(1 + 2 + 6) / 3 = 3; (4 + 1 + 9) / 3; what is not counted is not read."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for loud in LOUD:
        x = torch.tensor([[1, 2, loud], [6, loud, loud]], requires_grad=True)
        mean, variance = O.moments(x, mask)
        close(mean, 3.0)
        close(variance, 14 / 3)
        mean.backward()
        close(x.grad, mask / 3)


MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])  # decisions of two responses


def test_shape_rewards_by_hand():
    """-beta KL at each decision of the response, and the score at its last: beta .5."""
    for loud in LOUD:
        kl = torch.tensor([[loud, 1, 2, 4], [6, -8, loud, loud]])
        rewards = O.shape_rewards(torch.tensor([10.0, -1.0]), kl, MASK, kl_coef=0.5)
        close(rewards, [[0, -0.5, -1, 10 - 2], [-3, 4 - 1, 0, 0]])


@pytest.mark.parametrize("share, expected", [(0, [1.0, 3.0, 2.0]), (1, [-1.0, 1.0, 0.0]), (0.5, [0.0, 2.0, 1.0])])
def test_kl_above_baseline_by_hand(share, expected):
    """The mean KL of three tokens 1, 3, 2 is 2; `share` of it is taken off each; the rest is 0."""
    kl = torch.tensor([[1.0, 3.0], [2.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    penalised = O.kl_above_baseline(kl, mask, share)
    assert penalised[mask].tolist() == pytest.approx(expected) and penalised[~mask].tolist() == [0.0]
    # Two ranks with the same rows have the same mean.
    assert torch.equal(O.kl_above_baseline(kl, mask, share, total=lambda t: 2 * t), penalised)


def test_gae_by_hand():
    """gamma .9, lambda .8 on three decisions, with V = 0 after the end."""
    rewards, values = tensor([1.0, 2.0, 3.0]), tensor([0.5, 0.4, 0.3])
    # deltas: 1 + .9*.4 - .5 = .86;  2 + .9*.3 - .4 = 1.87;  3 - .3 = 2.7
    # A_2 = 2.7;  A_1 = 1.87 + .72*2.7 = 3.814;  A_0 = .86 + .72*3.814 = 3.60608
    advantages, returns = O.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)
    close(advantages, [[3.60608, 3.814, 2.7]])
    close(returns, [[4.10608, 4.214, 3.0]])


def gae_oracle(rewards, values, mask, gamma, lam):
    """The definition with Python's floats: one row, one decision and one term of the sum at a time."""
    advantages = torch.zeros(mask.shape, dtype=torch.double)
    for b in range(len(mask)):
        steps = [t for t in range(mask.shape[1]) if mask[b, t]]
        r, V = [float(rewards[b, t]) for t in steps], [float(values[b, t]) for t in steps] + [0.0]
        deltas = [r[i] + gamma * V[i + 1] - V[i] for i in range(len(r))]
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(r)))
    return advantages


def ragged(seed):
    """rewards, values (8, 12), and a mask of contiguous responses of every kind of place and length."""
    generator = torch.Generator().manual_seed(seed)
    start, length = (torch.randint(*span, (8, 1), generator=generator) for span in ((0, 6), (1, 7)))
    t = torch.arange(12)
    return some(8, 12, seed=seed), some(8, 12, seed=seed + 1), (t >= start) & (t < start + length)


@pytest.mark.parametrize("loud", LOUD)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_equals_the_scalar_oracle(gamma, lam, loud):
    """Ragged responses, loud garbage outside them: equal to the sum of the definition, and 0 outside."""
    rewards, values, mask = ragged(1)
    expected = gae_oracle(rewards, values, mask, gamma, lam)
    advantages, returns = O.gae(rewards.masked_fill(~mask, loud), values.masked_fill(~mask, loud), mask, gamma, lam)
    close(advantages, expected)
    close(returns, (expected + values).masked_fill(~mask, 0))


def test_gae_limits():
    """lambda 1: Monte Carlo return minus V. lambda 0: the TD error. A perfect critic: 0."""
    rewards, values, mask = ragged(2)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    to_go = rewards.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0)
    advantages, returns = O.gae(rewards, values, mask, 1.0, 1.0)
    close(advantages, to_go - values)
    close(returns, to_go)
    following = torch.cat([values[:, 1:], torch.zeros(8, 1)], 1)
    close(O.gae(rewards, values, mask, 0.9, 0.0)[0], (rewards + 0.9 * following - values).masked_fill(~mask, 0))
    for lam in (0.0, 0.5, 1.0):
        close(O.gae(rewards, to_go, mask, 1.0, lam)[0], torch.zeros(8, 12))


def test_gae_leaves_its_inputs_alone():
    """Pure: rewards and values are as before."""
    rewards, values, mask = ragged(3)
    copies = rewards.clone(), values.clone()
    O.gae(rewards, values, mask, 1.0, 0.95)
    assert torch.equal(rewards, copies[0]) and torch.equal(values, copies[1])


# Several answers to a prompt


SHUFFLED = torch.tensor([1, 0, 0, 1, 2, 1, 2, 0, 2])  # which group each of nine rows is of


def test_rows_of_groups_by_hand():
    """Rows 1, 2 and 7 are of group 0, rows 0, 3 and 5 of group 1, the others of group 2."""
    assert O.rows_of_groups(SHUFFLED).tolist() == [[1, 2, 7], [0, 3, 5], [4, 6, 8]]
    assert O.rows_of_groups(torch.tensor([0, 1, 2])).tolist() == [[0], [1], [2]]
    assert O.rows_of_groups(torch.tensor([0, 0])).tolist() == [[0, 1]]


def test_rloo_by_hand():
    """Rewards 1, 2, 6: each less the mean of the other two, 4, 3.5, 1.5. Two answers: their difference, both ways."""
    one = torch.zeros(3, dtype=torch.long)
    close(O.rloo(torch.tensor([1.0, 2.0, 6.0]), one), [-3.0, -1.5, 4.5])
    close(O.rloo(torch.tensor([0.25, 7.0, -1.0, 3.0]), torch.tensor([0, 1, 0, 1])), [1.25, 4.0, -1.25, -4.0])


def test_grpo_by_hand():
    """Rewards 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7. Two answers: s = |d| / sqrt(2), so +-1/sqrt(2)."""
    one, s = torch.zeros(3, dtype=torch.long), math.sqrt(7) + 1e-4
    close(O.grpo(tensor(1.0, 2.0, 6.0), one), [-2 / s, -1 / s, 3 / s])
    close(O.grpo(tensor(5.0, -3.0), one[:2]), [4 / (math.sqrt(32) + 1e-4), -4 / (math.sqrt(32) + 1e-4)])


def group_oracle(rewards, group, name):
    """One answer after another, with Python's floats."""
    out = []
    for i, (R, g) in enumerate(zip(rewards, group)):
        others = [x for j, (x, h) in enumerate(zip(rewards, group)) if h == g and j != i]
        if name == "rloo":
            out.append(R - sum(others) / len(others))
        else:
            mean = (R + sum(others)) / (1 + len(others))
            squares = sum((x - mean) ** 2 for x in [R, *others])
            out.append((R - mean) / (math.sqrt(squares / len(others)) + 1e-4))
    return out


@pytest.mark.parametrize("name", ["rloo", "grpo"])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_group_advantages_equal_the_scalar_oracle(name, K):
    """Groups whose rows lie anywhere in the batch, of rewards of several scales; each group's sum is 0, and what was
    given stays as it was."""
    group = torch.arange(6).repeat_interleave(K)[torch.randperm(6 * K, generator=torch.Generator().manual_seed(K))]
    rewards = some(6 * K, seed=K) * 10.0 ** (group - 2)
    copies = rewards.clone(), group.clone()
    found = getattr(O, name)(rewards, group)
    close(found, group_oracle(rewards.tolist(), group.tolist(), name))
    close(torch.zeros(6, dtype=torch.double).index_add(0, group, found), torch.zeros(6), atol=1e-9, rtol=0)
    assert torch.equal(rewards, copies[0]) and torch.equal(group, copies[1])


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_equal_answers_teach_nothing(name):
    """All rewards of a group equal: 0 but for rounding, not NaN, whatever the other groups have."""
    found = getattr(O, name)(torch.tensor([0.3, 0.3, 5.0, 0.3, -1.0, 2.0]), torch.tensor([0, 0, 1, 0, 1, 1]))
    assert found.isfinite().all() and found[[0, 1, 3]].abs().max() < 1e-3 and found[2] > 0.9


def test_group_advantages_in_other_units():
    """A constant added to a prompt's rewards changes nothing; ten times the rewards are ten times RLOO's advantages,
    and the same of GRPO's."""
    rewards, group = some(12), torch.arange(12) % 3
    for name, scale in (("rloo", 10.0), ("grpo", 1.0)):
        advantages = getattr(O, name)(rewards, group)
        close(getattr(O, name)(rewards + tensor(3.0, -7.0, 0.0)[group], group), advantages)
        close(getattr(O, name)(10 * rewards, group), scale * advantages, rtol=1e-3, atol=0)


@pytest.mark.parametrize("K", [2, 3])
def test_rloo_is_an_unbiased_policy_gradient(K):
    """Over all tuples of K answers out of 3, each as probable as the policy makes it, the mean of A grad log pi is the
    gradient of the expected reward; with its own reward in the baseline it would be (K-1)/K of it."""
    logits, table = tensor(0.3, -0.8, 0.4, grad=True), tensor(1.0, -2.0, 0.7)
    logp = logits.log_softmax(0)
    expected, = torch.autograd.grad((logp.exp() * table).sum(), logits, retain_graph=True)
    total = 0.0
    for answers in itertools.product(range(3), repeat=K):
        A = O.rloo(table[[*answers]], torch.zeros(K, dtype=torch.long))
        total = total + logp[[*answers]].sum().exp().detach() * (A * logp[[*answers]]).mean()
    close(torch.autograd.grad(total, logits)[0], expected)


GRID = [[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]]


def test_whiten_golden_numbers():
    """Mean 1.6, biased variance .6/9, deviation .2582: (1.2 - 1.6)/.2582 + 1.6 = .0508."""
    x, mask = torch.tensor(GRID), torch.ones(3, 3, dtype=torch.bool)
    kept = O.whiten(x, mask, keep_mean=True)
    close(kept, [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]], atol=5e-5, rtol=0)
    close(O.whiten(x, mask), kept - 1.6, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loud", LOUD)
@pytest.mark.parametrize("keep_mean", [False, True])
def test_whiten_counts_only_the_mask(loud, keep_mean):
    """With garbage around it, the counted part is whitened as if alone; the rest is 0."""
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[3], mask[:, :2] = False, False
    x = torch.full((4, 5), loud)
    x[:3, 2:] = torch.tensor(GRID)
    white = O.whiten(x, mask, keep_mean)
    close(white[:3, 2:], O.whiten(torch.tensor(GRID), mask[:3, 2:], keep_mean))
    assert not white[~mask].any()


def test_whiten_over_ranks_is_whitening_the_whole_batch():
    """Two ranks whose sums are added up get the rows that one rank with all rows gets."""
    x, (_, _, mask) = some(8, 12) + 3, ragged(4)
    shares = [slice(0, 8, 2), slice(1, 8, 2)]
    for share, white in zip(shares, on_ranks(lambda s, total: O.whiten(x[s], mask[s], total=total), shares)):
        close(white, O.whiten(x, mask)[share])


def test_whiten_survives_equal_numbers():
    """All rewards equal: 0, not NaN; the mean stays if asked for."""
    x, mask = torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool)
    close(O.whiten(x, mask), torch.zeros(2, 3))
    close(O.whiten(x, mask, keep_mean=True), x)


# PPO's losses


@pytest.mark.parametrize("ratio, A, loss, gradient, clipped", [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.1, 2.0, -2.2, -2.2, False),
    (1.5, 2.0, -2.4, 0.0, True),  # far enough in the right direction: 1.2 * 2, no gradient
    (1.5, -2.0, 3.0, 3.0, False),  # in the wrong direction: the whole way back
    (0.5, 2.0, -1.0, -1.0, False),
    (0.5, -2.0, 1.6, 0.0, True),  # .8 * 2
])
def test_policy_loss_by_hand(ratio, A, loss, gradient, clipped):
    """-min(rho A, clip(rho, .8, 1.2) A); d rho / d log pi = rho, so an unclipped gradient is -rho A."""
    new, old, A = tensor(math.log(ratio) - 3, grad=True), tensor(-3.0), tensor(A)
    out, was_clipped = O.policy_loss(new, old, A, 0.2)
    close(out, [loss])
    out.sum().backward()
    close(new.grad, [gradient])
    assert was_clipped.tolist() == [clipped]


def test_log_ratio_is_bounded():
    """A token that became e^100 times likelier gives a finite loss: the log-ratio ends at 20 on either side."""
    close(O.log_ratio(tensor(0.0, -100.0, -1.0), tensor(-100.0, 0.0, -1.5)), [20, -20, 0.5])
    close(O.policy_loss(tensor(0.0), tensor(-1000.0), tensor(-1.0), 0.2)[0], [math.exp(20)])


@pytest.mark.parametrize("V, R, loss, gradient, clipped", [
    (1.1, 2.0, 0.405, -0.9, False),  # within the range: .5 * .9^2
    (1.5, 2.0, 0.32, 0.0, True),  # V counts as 1.2: .5 * .8^2 > .5 * .5^2
    (1.5, 1.0, 0.125, 0.5, False),  # .5 * .5^2 > .5 * .2^2
    (0.5, 0.0, 0.32, 0.0, True),  # V counts as .8
    (0.5, 1.0, 0.125, -0.5, False),
])
def test_value_loss_by_hand(V, R, loss, gradient, clipped):
    """.5 max((V - R)^2, (clip(V, .8, 1.2) - R)^2) with V_old = 1."""
    V, V_old, R = tensor(V, grad=True), tensor(1.0), tensor(R)
    out, was_clipped = O.value_loss(V, V_old, R, 0.2)
    close(out, [loss])
    out.sum().backward()
    close(V.grad, [gradient])
    assert was_clipped.tolist() == [clipped]


TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4]])


@pytest.mark.parametrize("name, function, inputs", [
    ("sft_loss", lambda x: O.sft_loss(x, TOKENS), [some(2, 3, 5, grad=True)]),
    ("entropy", lambda x: O.entropy(x.log_softmax(-1)), [some(2, 3, 5, grad=True)]),
    ("bradley_terry_loss", O.bradley_terry_loss, [some(6, grad=True), some(6, seed=1, grad=True)]),
    ("k1", O.k1, [some(6, grad=True), some(6, seed=1, grad=True)]),
    ("k2", O.k2, [some(6, grad=True), some(6, seed=1, grad=True)]),
    ("k3", O.k3, [some(6, grad=True), some(6, seed=1, grad=True)]),
    ("policy_loss", lambda x: O.policy_loss(x, some(20, seed=1), some(20, seed=2), 0.2)[0], [some(20, grad=True)]),
    ("value_loss", lambda x: O.value_loss(x, some(20, seed=1), some(20, seed=2), 0.2)[0], [some(20, grad=True)]),
    ("whiten", lambda x: O.whiten(x, MASK), [some(2, 4, grad=True)]),
    ("gae", lambda r, v: O.gae(r, v, MASK, 0.9, 0.8), [some(2, 4, grad=True), some(2, 4, seed=1, grad=True)]),
    ("shape_rewards", lambda s, kl: O.shape_rewards(s, kl, MASK, 0.3),
     [some(2, grad=True), some(2, 4, seed=1, grad=True)]),
    ("kl_above_baseline", lambda kl: O.kl_above_baseline(kl, MASK, 0.4), [some(2, 4, grad=True)]),
    ("moments", lambda x: O.moments(x, MASK), [some(2, 4, grad=True)]),
])
def test_gradients_are_the_difference_quotients(name, function, inputs):
    """Autograd's gradient is the slope of the function, in float64."""
    assert torch.autograd.gradcheck(function, inputs)


# Second implementations: Python's floats, one number at a time


def scalar_logprob(logits, token):
    return logits[token] - math.log(sum(math.exp(x) for x in logits))


def scalar_policy_loss(new, old, A, eps):
    ratio = math.exp(new - old)
    return max(-ratio * A, -min(max(ratio, 1 - eps), 1 + eps) * A)


def scalar_value_loss(V, old, R, eps):
    near = old + min(max(V - old, -eps), eps)
    return max((V - R) ** 2, (near - R) ** 2) / 2


def scalar_entropy(logits):
    return -sum(math.exp(scalar_logprob(logits, v)) * scalar_logprob(logits, v) for v in range(len(logits)))


SCALAR = {  # name: function of tensors (N,), the same of N floats, how many arguments
    "bradley_terry_loss": (O.bradley_terry_loss, lambda a, b: math.log(1 + math.exp(b - a)), 2),
    "k1": (O.k1, lambda p, q: p - q, 2),
    "k2": (O.k2, lambda p, q: (p - q) ** 2 / 2, 2),
    "k3": (O.k3, lambda p, q: math.exp(q) / math.exp(p) - 1 - (q - p), 2),
    "log_ratio": (O.log_ratio, lambda a, b: min(max(a - b, -20), 20), 2),
    "policy_loss": (lambda *x: O.policy_loss(*x, 0.2)[0], lambda *x: scalar_policy_loss(*x, 0.2), 3),
    "policy_clipped": (lambda *x: O.policy_loss(*x, 0.2)[1], lambda new, old, A: abs(
        scalar_policy_loss(new, old, A, 0.2) + math.exp(new - old) * A) > 1e-12, 3),
    "value_loss": (lambda *x: O.value_loss(*x, 0.3)[0], lambda *x: scalar_value_loss(*x, 0.3), 3),
    "value_clipped": (lambda *x: O.value_loss(*x, 0.3)[1], lambda V, old, R: scalar_value_loss(V, old, R, 0.3) > (
        V - R) ** 2 / 2 + 1e-12, 3),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCALAR)
def test_equal_to_one_number_at_a_time(name, seed):
    """40 random arguments, in float64."""
    function, scalar, arguments = SCALAR[name]
    x = some(arguments, 40, seed=seed)
    expected = [scalar(*column) for column in zip(*x.tolist())]
    torch.testing.assert_close(function(*x), torch.tensor(expected, dtype=function(*x).dtype))


@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_one_number_at_a_time(seed):
    """token_logprobs, sft_loss and entropy of 2 x 3 rows of 5 logits."""
    logits, tokens = 3 * some(2, 3, 5, seed=seed), TOKENS
    rows = [(row, int(token)) for row, token in zip(logits.flatten(0, 1).tolist(), tokens.flatten())]
    expected = torch.tensor([scalar_logprob(*row) for row in rows], dtype=torch.double).view(2, 3)
    close(O.token_logprobs(logits, tokens), expected)
    close(O.sft_loss(logits, tokens), -expected)
    expected = torch.tensor([scalar_entropy(row) for row, _ in rows], dtype=torch.double).view(2, 3)
    close(O.entropy(logits.log_softmax(-1)), expected)


def counted(x, mask):
    """[(row, column, number), ...] of the counted entries."""
    return [(b, t, float(x[b, t])) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]


def grid(numbers, mask):
    out = torch.zeros(mask.shape, dtype=torch.double)
    for b, t, number in numbers:
        out[b, t] = number
    return out


def scalar_moments(x, mask):
    numbers = [number for *_, number in counted(x, mask)]
    mean = sum(numbers) / len(numbers)
    return mean, sum((number - mean) ** 2 for number in numbers) / len(numbers)


def scalar_whiten(x, mask, keep_mean):
    mean, variance = scalar_moments(x, mask)
    return grid([(b, t, (number - mean) / math.sqrt(variance + 1e-8) + keep_mean * mean)
                 for b, t, number in counted(x, mask)], mask)


def scalar_shape_rewards(scores, kl, mask):
    out = grid([(b, t, -0.3 * number) for b, t, number in counted(kl, mask)], mask)
    for b in range(len(mask)):
        out[b, max(t for t in range(mask.shape[1]) if mask[b, t])] += float(scores[b])
    return out


def scalar_explained(values, returns, mask):
    return 1 - scalar_moments(returns - values, mask)[1] / scalar_moments(returns, mask)[1]


MASKED = {  # name: function of (x, y, mask), the same by loops
    "mean": (lambda x, y, m: O.moments(x, m)[0], lambda x, y, m: scalar_moments(x, m)[0]),
    "variance": (lambda x, y, m: O.moments(x, m)[1], lambda x, y, m: scalar_moments(x, m)[1]),
    "whiten": (lambda x, y, m: O.whiten(x, m), lambda x, y, m: scalar_whiten(x, m, False)),
    "whiten, mean kept": (lambda x, y, m: O.whiten(x, m, True), lambda x, y, m: scalar_whiten(x, m, True)),
    "shape_rewards": (lambda x, y, m: O.shape_rewards(x[:, 0].nan_to_num(7).clamp(-7, 7), y, m, 0.3),
                      lambda x, y, m: scalar_shape_rewards(x[:, 0].nan_to_num(7).clamp(-7, 7), y, m)),
    "kl_above_baseline": (lambda x, y, m: O.kl_above_baseline(x, m, 0.4), lambda x, y, m: grid(
        [(b, t, n - 0.4 * scalar_moments(x, m)[0]) for b, t, n in counted(x, m)], m)),
    "advantages": (lambda x, y, m: O.gae(x, y, m, 0.9, 0.7)[0], lambda x, y, m: gae_oracle(x, y, m, 0.9, 0.7)),
    "returns": (lambda x, y, m: O.gae(x, y, m, 0.9, 0.7)[1], lambda x, y, m: gae_oracle(x, y, m, 0.9, 0.7) + grid(
        counted(y, m), m)),
    "explained_variance": (O.explained_variance, scalar_explained),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MASKED)
def test_masked_functions_one_number_at_a_time(name, seed):
    """Random ragged responses: the loops' values; and with loud garbage outside the mask the same values and the same
    gradients, which are 0 there."""
    function, loops = MASKED[name]
    x, y, mask = ragged(10 * seed)
    seen = []
    for loud in (0.0, *LOUD):
        inputs = [z.masked_fill(~mask, loud).requires_grad_() for z in (x, y)]
        out = function(*inputs, mask)
        with torch.no_grad():
            close(out, loops(*inputs, mask))
        weights = some(*out.shape, seed=1)
        (out * weights).sum().backward()
        gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in inputs]
        if name != "shape_rewards":  # there x[:, 0] are the scores of rows, which are always counted
            assert not any(g[~mask].any() for g in gradients)
        seen.append([out.detach(), *(g.masked_fill(~mask, 0) for g in gradients)])
    for other in seen[1:]:
        if name != "shape_rewards":
            torch.testing.assert_close(other, seen[0])


@pytest.mark.parametrize("seed", range(3))
def test_calibration_one_number_at_a_time(seed):
    """Bins filled one pair at a time; each counts by its share of the pairs."""
    p, happened = some(60, seed=seed).sigmoid(), some(60, seed=seed + 9) > 0
    bins = [[] for _ in range(10)]
    for probability, event in zip(p.tolist(), happened.tolist()):
        bins[min(int(probability * 10), 9)].append((probability, event))
    expected = sum(len(b) / 60 * abs(sum(e for _, e in b) / len(b) - sum(q for q, _ in b) / len(b)) for b in bins if b)
    assert O.expected_calibration_error(p, happened) == pytest.approx(expected)


def test_a_one_token_policy_reaches_its_known_optimum():
    """PPO against a fixed table of rewards, beta a nat, ends at pi_ref exp(r / beta) / Z.   Ziegler et al. 2019."""
    ref, rewards, beta, n = tensor(0.1, 0.2, 0.3, 0.4).log(), tensor(1.0, 0.5, -0.5, 0.0), 0.5, 2000
    u = (torch.arange(n, dtype=torch.double) + 0.5) / n  # evenly spread: sampling without noise
    logits, mask = ref.clone().requires_grad_(), torch.ones(n, 1, dtype=torch.bool)
    optimizer = torch.optim.Adam([logits])
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 120)
        with torch.no_grad():
            tokens, old = sample(logits.expand(n, 4), 1.0, u)
            shaped = O.shape_rewards(rewards[tokens], O.k1(old, ref[tokens])[:, None], mask, beta)
            advantages, _ = O.gae(shaped, shaped.mean().expand(n, 1), mask, 1.0, 0.95)
        for _ in range(4):
            new = O.token_logprobs(logits.expand(n, 4), tokens)
            optimizer.zero_grad()
            O.policy_loss(new, old, advantages[:, 0], 0.2)[0].mean().backward()
            optimizer.step()
    close(logits.detach().softmax(-1), (ref + rewards / beta).softmax(-1), atol=5e-3, rtol=0)


# Figures


def test_explained_variance_by_hand():
    """Returns 1, 2, 3 vary by 2/3: errors 0, 0, 1 by 2/9, so 2/3 is explained; a constant explains nothing."""
    mask = torch.tensor([[True, True, True, False]])
    for loud in LOUD:
        returns = torch.tensor([[1, 2, 3, loud]])

        def explained(*values):
            return O.explained_variance(torch.tensor([[*values, loud]]), returns, mask)

        close(explained(1.0, 2.0, 2.0), 1 - (2 / 9) / (2 / 3))
        close(explained(11.0, 12.0, 13.0), 1.0)  # an offset alone is no variance
        close(explained(7.0, 7.0, 7.0), 0.0)
        close(explained(3.0, 2.0, 1.0), -3.0)  # errors -2, 0, 2 vary by 8/3
    assert O.explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]), torch.tensor([True, True])).isnan()


def test_explained_variance_over_ranks_is_that_of_the_whole_batch():
    """Errors and returns of both ranks, about the means of both."""
    values, returns, (_, _, mask) = some(8, 12), some(8, 12, seed=1) + torch.arange(8)[:, None], ragged(4)
    found = on_ranks(lambda s, total: O.explained_variance(values[s], returns[s], mask[s], total),
                     [slice(0, 3), slice(3, 8)])
    close(torch.stack(found), [O.explained_variance(values, returns, mask)] * 2)


def test_intervals_by_hand():
    """Wilson for 8 of 10: .49 to .94; for 0 of 10 it starts at 0. A mean of 1, 2, 3: 2 +- 1.96 * 1 / sqrt(3)."""
    assert O.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # 0 of 10: (0 + z2/20 -+ sqrt(z2/400) z) / (1 + z2/10), that is 0 and (z2/10) / (1 + z2/10)
    assert O.wilson_interval(0, 10) == pytest.approx((0.0, 0.38416 / 1.38416), abs=1e-9)
    assert O.mean_interval(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2.0, 1.96 / math.sqrt(3)))
    assert O.mean_interval(torch.tensor([4.0])) == (4.0, math.inf)
