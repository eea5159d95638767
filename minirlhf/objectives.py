"""Every formula of the stages as a pure function of tensors, each with its equation and source.

Invariant: all per-decision tensors share one grid (B, T-1); a mask is bool, True counts. Losses return one number a
decision (or pair); the training loop masks, sums and divides once.

Left out: anything with state, and reductions that would hide what is averaged over.
"""
import math

import torch
import torch.nn.functional as F


def moments(x, mask, total=lambda t: t):
    """Mean and biased variance where the mask is True; other entries are never read, NaN included.

    total: sums a tensor over all ranks.
    """
    x = x.masked_fill(~mask, 0)
    n, sum_x = total(torch.stack([mask.sum().to(x.dtype), x.sum()]))
    mean = sum_x / n
    return mean, total(((x - mean) ** 2).masked_fill(~mask, 0).sum()) / n


# ---- log-probabilities

def token_logprobs(logits, tokens):
    """log p(token) = logit - logsumexp(logits): logits (..., V), tokens (...) -> (...), nats."""
    return -F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)


def entropy(logprobs):
    """H = -sum_v p_v log p_v: log-probabilities (..., V) that sum to 1 as probabilities -> (...), nats.

    A token of probability 0 (-inf) adds nothing: p log p -> 0.
    """
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)


# ---- stages 1 and 2

def sft_loss(logits, tokens):
    """Cross-entropy -log p(token | what came before) of each decision, nats.   Radford et al. 2018, eq. 1."""
    return -token_logprobs(logits, tokens)


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), nats a pair.   Bradley & Terry 1952; Ouyang et al. 2022, eq. 1."""
    return -F.logsigmoid(chosen - rejected)


def expected_calibration_error(probability, correct, bins=10):
    """sum_b n_b/n |mean(correct) - mean(probability)| over equal-width bins of [0, 1].   Guo et al. 2017, eq. 3.

    probability (N,) of the event, correct (N,) bool whether it happened -> a number in [0, 1].
    """
    given, happened, _ = reliability_sums(probability, correct, bins)
    return float((happened - given).abs().sum() / len(probability))


def reliability_sums(probability, correct, bins=10):
    """In each of the equal-width bins of [0, 1]: sum of the probabilities, events that happened, how many (3, bins)."""
    index = (probability * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.double, device=probability.device)
    return sums.index_add_(1, index, torch.stack([probability.double(), correct.double(),
                                                  torch.ones_like(probability, dtype=torch.double)]))


def fit_temperature(differences, steps=50):
    """The T > 0 that minimises mean -log sigmoid(d / T) over pairs.   Guo et al. 2017, section 4.2.

    differences (N,): r_chosen - r_rejected. The loss is convex in 1/T: Newton's method in 1/T, kept positive. Where
    every pair is ordered rightly there is no optimum; T then stays finite and small.
    """
    d = differences.double()
    b = torch.tensor(1.0 / max(float(d.abs().mean()), 1e-6), dtype=torch.double)
    low, high = 1e-3 * float(b), 1e3 * float(b)
    for _ in range(steps):
        p = torch.sigmoid(-b * d)
        gradient, curvature = -(p * d).mean(), (p * (1 - p) * d * d).mean()
        b = torch.clamp(b - gradient / curvature.clamp_min(1e-12), low, high)
    return 1 / float(b)


# ---- direct alignment: chosen and rejected are (P,), of each pair's two texts, nats

def dpo_loss(chosen, rejected, beta, label_smoothing=0.0):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = chosen - rejected, nats a pair.

    chosen, rejected: log pi(y|x) - log ref(y|x), sums over the answer's tokens.   Rafailov et al. 2023, eq. 7;
    e, the share of labels that are wrong: Mitchell 2023, cDPO
    """
    h = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def ipo_loss(chosen, rejected, beta):
    """(h - 1 / (2 beta))^2, h = chosen - rejected, DPO's sums.   Azar et al. 2023, eq. 17 (beta is its tau)"""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen, rejected, beta, gamma):
    """-log sigmoid(beta (chosen - rejected) - gamma), nats a pair.   Meng et al. 2024, eq. 6

    chosen, rejected: log pi(y|x) / |y|, means over the answer's tokens; there is no reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# ---- KL estimators (Schulman 2020, "Approximating KL divergence"), of KL(p || q) from samples of p

def k1(logprobs, ref_logprobs):
    """log p - log q: unbiased, can be negative."""
    return logprobs - ref_logprobs


def k2(logprobs, ref_logprobs):
    """(log p - log q)^2 / 2: biased, low variance."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs, ref_logprobs):
    """q/p - 1 - log(q/p): unbiased, never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def best_of_n_kl(n):
    """log n - (n-1)/n: an upper bound of KL(best-of-n || base), nats.   Stiennon et al. 2020; Beirami et al. 2024."""
    return math.log(n) - (n - 1) / n


def adaptive_kl_coef(kl_coef, kl, kl_target, n, horizon=10_000):
    """beta (1 + clip(KL/target - 1, -0.2, 0.2) n/horizon); KL in nats a response.   Ziegler et al. 2019, sec. 2.2."""
    return kl_coef * (1 + min(max(kl / kl_target - 1, -0.2), 0.2) * n / horizon)


# ---- rewards and advantages

def shape_rewards(scores, kl, response_mask, kl_coef):
    """r_t = -beta KL_t, plus the reward model's score at the response's last decision.   Ziegler et al. 2019, eq. 2.

    scores (B,), kl (B, T-1), response_mask (B, T-1) -> rewards (B, T-1), 0 outside the mask
    """
    rewards = (-kl_coef * kl).masked_fill(~response_mask, 0)
    t = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (response_mask * t).argmax(1)  # (B,) the response's last decision
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def kl_above_baseline(kl, response_mask, baseline, total=lambda t: t):
    """KL_t - baseline * (mean KL of a decision): what is penalised.

    With baseline 0 each further token costs KL, so that shorter answers are rewarded; with baseline 1 a token of mean
    KL is free, and only where the KL is spent matters, not how many tokens there are.

    kl, response_mask (B, T-1) -> (B, T-1), 0 outside the mask. total: sums a tensor over all ranks.
    """
    sum_kl, n = total(torch.stack([kl.masked_fill(~response_mask, 0).sum(), response_mask.sum().to(kl.dtype)]))
    return (kl - baseline * sum_kl / n).masked_fill(~response_mask, 0)


def gae(rewards, values, response_mask, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.   Schulman et al. 2016, eq. 16.

    (B, T-1) each -> advantages, returns = advantages + values; 0 outside the mask. V after the end is 0.
    """
    values = values.masked_fill(~response_mask, 0)
    advantages = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running).masked_fill(~response_mask[:, t], 0)
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(x, mask, keep_mean=False, total=lambda t: t):
    """(x - mean) / sqrt(var + 1e-8) over entries where the mask is True, biased variance; 0 outside the mask.

    keep_mean leaves the mean where it was (for rewards, whose sign means something). total: sums a tensor over all
    ranks, so that the statistics are those of the whole batch.
    """
    x = x.masked_fill(~mask, 0)  # before it meets the mean: 0 * NaN is NaN, in gradients too
    mean, variance = moments(x, mask, total)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white + mean if keep_mean else white).masked_fill(~mask, 0)


def rows_of_groups(group):
    """(B,) which group each row belongs to, all groups of K rows, numbered from 0 -> (G, K) the rows of each."""
    return group.argsort(stable=True).view(int(group.max()) + 1, -1)


def rloo(rewards, group):
    """A_i = R_i - mean of R_j over the other K-1 answers to its prompt.   Kool et al. 2019; Ahmadian et al. 2024.

    The others know nothing of answer i, so that subtracting their mean leaves the policy gradient unbiased.

    rewards (B,) of whole answers, group (B,) as in `rows_of_groups`, K > 1 -> (B,)
    """
    rows = rows_of_groups(group)
    R = rewards[rows]  # (G, K)
    return rewards.index_put((rows,), R - (R.sum(1, keepdim=True) - R) / (R.shape[1] - 1))


def grpo(rewards, group):
    """A_i = (R_i - mean) / (s + 1e-4), with mean and deviation of the K answers to its prompt.   Shao et al. 2024.

    s^2 = sum_i (R_i - mean)^2 / (K-1), as TRL has it. Arguments and result as those of `rloo`.
    """
    rows = rows_of_groups(group)
    R = rewards[rows]
    return rewards.index_put((rows,), (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4))


# ---- PPO's losses

def log_ratio(logprobs, old_logprobs):
    """log pi_new - log pi_old, within +-20: exp(20) is finite and far beyond any clip."""
    return (logprobs - old_logprobs).clamp(-20, 20)


def policy_loss(logprobs, old_logprobs, advantages, cliprange):
    """-min(rho A, clip(rho, 1-eps, 1+eps) A), rho = exp(log pi_new - log pi_old).   Schulman et al. 2017, eq. 7.

    -> the loss of each decision, and True where the clipped term is the smaller one, so that it has no gradient.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.min(plain, clipped), clipped < plain


def value_loss(values, old_values, returns, cliprange_value):
    """0.5 max((V - R)^2, (clip(V, V_old +- eps) - R)^2).   Dhariwal et al. 2017, OpenAI baselines, ppo2.

    -> the loss of each decision, and True where the clipped term is the larger one.
    """
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.max(plain, clipped), clipped > plain


def explained_variance(values, returns, mask, total=lambda t: t):
    """1 - Var(R - V) / Var(R) where the mask is True: 1 is a perfect critic, 0 a constant one, below 0 a harmful one.

    NaN where the returns do not vary. total: sums a tensor over all ranks.
    """
    _, variance = moments(returns, mask, total)
    _, unexplained = moments(returns - values, mask, total)
    return 1 - unexplained / variance if variance > 0 else variance * torch.nan


# ---- comparisons and intervals

def win_rate(x, y):
    """Share of x > y, ties half: (N,), (N,) -> a number in [0, 1]."""
    return float(wins(x, y).mean())


def wins(x, y):
    """1 where x > y, 0.5 where they tie, else 0: (N,), (N,) -> (N,)."""
    return (x > y).double() + 0.5 * (x == y)


def wilson_interval(successes, n, z=1.96):
    """95 % interval of a proportion.   Wilson 1927.   -> (low, high)"""
    p, z2 = successes / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def mean_interval(x, z=1.96):
    """Mean of x (N,) and the half-width of its 95 % interval, z s/sqrt(N)."""
    x = x.double()
    return float(x.mean()), z * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf
