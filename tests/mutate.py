"""How much the tests notice: `python tests/mutate.py` breaks one line at a time and runs the fast tests.

Each mutation is (file, text that stands there once, what replaces it). A copy of the project is broken, the tests that
are nearest run first, then the whole fast suite; a mutation that no test notices has survived and is printed. Exits 1
if one did. `--only TEXT` takes the mutations whose file or line holds TEXT. An hour on two cores, the second time a
quarter of it: .mutate_cache keeps which test noticed, and that one is tried first.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KILLERS = ROOT / ".mutate_cache"
CONTEXT = multiprocessing.get_context("forkserver")
NEAREST = {
    "minirlhf/objectives.py": ["objectives", "train_ppo"],
    "minirlhf/data.py": ["data", "held_out", "chat"],
    "minirlhf/model.py": ["model", "train_ppo", "adapters", "generate", "parity"],
    "minirlhf/generate.py": ["generate", "train_ppo", "parity"],
    "minirlhf/kernels.py": ["model", "runtime", "benchmark"],
    "train_sft.py": ["figures", "state", "check", "further", "held_out", "chat"],
    "train_rm.py": ["figures", "train_rm", "state", "check", "held_out", "further"],
    "train_ppo.py": ["figures", "train_ppo", "state", "further", "held_out"],
    "minirlhf/prepare.py": ["prepare"],
    "minirlhf/evaluate.py": ["figures", "train_ppo", "train_rm", "state", "held_out", "runtime"],
    "minirlhf/sizes.py": ["faults"],
    "minirlhf/checkpoint.py": ["state", "checkpoint", "adapters", "further", "pretrained", "faults", "hub", "export"],
    "minirlhf/check.py": ["check", "figures"],
    "minirlhf/runtime.py": ["runtime", "figures", "state", "train_ppo", "faults"],
    "minirlhf/sample.py": ["figures", "state", "sample", "chat"],
    "minirlhf/benchmark.py": ["figures", "benchmark"],
    "minirlhf/config.py": ["config"],
    "minirlhf/adapters.py": ["adapters", "state", "train_ppo"],
    "minirlhf/rewards.py": ["rewards", "adapters", "train_ppo"],
    "minirlhf/fetch.py": ["fetch", "hub"],
    "minirlhf/hub.py": ["hub"],
    "minirlhf/tokenizer.py": ["tokenizer", "pretrained", "export"],
    "minirlhf/pretrained.py": ["pretrained", "export"],
    "minirlhf/export.py": ["export"],
    "minirlhf/sentiment.py": ["sentiment"],
    "minirlhf/dialects.py": ["dialects", "prepare"],
    "minirlhf/chat.py": ["chat"],
    "minirlhf/memory.py": ["memory"],
}

OBJECTIVES = [
    ("mean = sum_x / n", "mean = sum_x / mask.numel()"),  # over padding
    ("return mean, total(((x - mean) ** 2).masked_fill(~mask, 0).sum()) / n",
     "return mean, total(((x - mean) ** 2).sum()) / n"),  # padding in the variance
    ("return mean, total(((x - mean) ** 2).masked_fill(~mask, 0).sum()) / n",
     "return mean, total(((x - mean) ** 2).masked_fill(~mask, 0).sum()) / (n - 1)"),  # unbiased
    ("return mean, total(((x - mean) ** 2).masked_fill(~mask, 0).sum()) / n",
     "return mean, ((x - mean) ** 2).masked_fill(~mask, 0).sum() / n"),  # of one rank
    ("n, sum_x = total(torch.stack([mask.sum().to(x.dtype), x.sum()]))",
     "n, sum_x = torch.stack([mask.sum().to(x.dtype), x.sum()])"),  # of one rank
    ("return -F.cross_entropy(logits.flatten(0, -2)", "return F.cross_entropy(logits.flatten(0, -2)"),
    ("return -(logprobs.exp() * logprobs", "return (logprobs.exp() * logprobs"),
    ("logprobs.clamp(min=-1e4)", "logprobs"),
    ("logprobs.clamp(min=-1e4)", "logprobs.clamp(min=-4)"),
    ("logprobs.clamp(min=-1e4)).sum(-1)", "logprobs.clamp(min=-1e4)).sum(0)"),  # wrong axis
    ("return -token_logprobs(logits, tokens)", "return -token_logprobs(logits, tokens).mean()"),
    ("return -F.logsigmoid(chosen - rejected)", "return -F.logsigmoid(rejected - chosen)"),
    ("return -F.logsigmoid(chosen - rejected)", "return -torch.sigmoid(chosen - rejected).log()"),  # -log 0
    (".clamp(0, bins - 1)", ".clamp(0, bins - 2)"),
    ("gradient, curvature = -(p * d).mean()", "gradient, curvature = (p * d).mean()"),
    ("return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
    ("return 0.5 * (logprobs - ref_logprobs) ** 2", "return (logprobs - ref_logprobs) ** 2"),
    ("log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs"),
    ("return torch.expm1(log_ratio) - log_ratio", "return log_ratio.exp() - 1 - log_ratio"),  # loses digits
    ("return math.log(n) - (n - 1) / n", "return math.log(n) - (n - 1)"),
    ("min(max(kl / kl_target - 1, -0.2), 0.2)", "min(max(kl / kl_target - 1, -0.2), 1.0)"),
    ("min(max(kl / kl_target - 1, -0.2), 0.2)", "min(max(1 - kl / kl_target, -0.2), 0.2)"),
    ("rewards = (-kl_coef * kl)", "rewards = (kl_coef * kl)"),
    ("rewards = (-kl_coef * kl).masked_fill(~response_mask, 0)", "rewards = -kl_coef * kl"),
    ("last = (response_mask * t).argmax(1)", "last = (response_mask * t).argmax(1) - 1"),  # one before eos
    ("last = (response_mask * t).argmax(1)", "last = (response_mask.sum(1) - 1)"),  # forgets the prompt
    ("return rewards.scatter_add(1", "return rewards.scatter(1"),  # the score replaces the KL
    ("return (kl - baseline * sum_kl / n)", "return (kl + baseline * sum_kl / n)"),
    ("sum_kl, n = total(torch.stack([kl.masked_fill(~response_mask, 0).sum()",
     "sum_kl, n = total(torch.stack([kl.sum()"),
    ("values.masked_fill(~response_mask, 0)\n    advantages", "values\n    advantages"),  # V after the end
    ("delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + next_value - values[:, t]"),
    ("delta = rewards[:, t] + gamma * next_value - values[:, t]",
     "delta = rewards[:, t] + gamma * next_value + values[:, t]"),
    ("next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0", "next_value = values[:, t]"),
    ("running = (delta + gamma * lam * running)", "running = (delta + lam * running)"),
    ("running = (delta + gamma * lam * running).masked_fill(~response_mask[:, t], 0)",
     "running = delta + gamma * lam * running"),
    ("for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):"),
    ("return advantages, advantages + values", "return advantages, advantages"),
    ("white = (x - mean) * torch.rsqrt(variance + 1e-8)", "white = x * torch.rsqrt(variance + 1e-8)"),
    ("white = (x - mean) * torch.rsqrt(variance + 1e-8)", "white = (x - mean) / (variance + 1e-8)"),
    ("return (white + mean if keep_mean else white)", "return (white if keep_mean else white + mean)"),
    ("return (logprobs - old_logprobs).clamp(-20, 20)", "return logprobs - old_logprobs"),
    ("return (logprobs - old_logprobs).clamp(-20, 20)", "return (old_logprobs - logprobs).clamp(-20, 20)"),
    ("return -torch.min(plain, clipped), clipped < plain", "return -torch.max(plain, clipped), clipped < plain"),
    ("return -torch.min(plain, clipped), clipped < plain", "return torch.min(plain, clipped), clipped < plain"),
    ("return -torch.min(plain, clipped), clipped < plain", "return -plain, clipped < plain"),
    ("return -torch.min(plain, clipped), clipped < plain", "return -torch.min(plain, clipped), clipped != plain"),
    ("ratio.clamp(1 - cliprange, 1 + cliprange) * advantages", "ratio.clamp(1 + cliprange, 1 - cliprange) * advantages"),
    ("return 0.5 * torch.max(plain, clipped)", "return 0.5 * torch.min(plain, clipped)"),
    ("return 0.5 * torch.max(plain, clipped)", "return torch.max(plain, clipped)"),
    ("clipped), clipped > plain", "clipped), clipped < plain"),
    ("return (x > y).double() + 0.5 * (x == y)", "return (x > y).double() + (x == y)"),
    ("return (x > y).double() + 0.5 * (x == y)", "return (x > y).double()"),
    ("return (x > y).double() + 0.5 * (x == y)", "return (x < y).double() + 0.5 * (x == y)"),
    ("return 1 - unexplained / variance", "return 1 - variance / unexplained"),
    ("moments(returns - values, mask, total)", "moments(returns - values, mask)"),  # of one rank
    ("centre, half = p + z2 / (2 * n)", "centre, half = p + z2 / n"),
    ("z * float(x.std()) / math.sqrt(len(x))", "z * float(x.std())"),
]
GENERATE = [
    ("self.k[layer][rows, positions] = k", "self.k[layer][rows, (positions + 1) % self.k.shape[2]] = k"),
    ("self.v[layer][rows, positions] = v", "self.v[layer][rows, positions] = k"),
    ("self.k, self.v = self.k[:, rows], self.v[:, rows]", "self.k = self.k[:, rows]"),
    ("x[rows, :T - padded + x.shape[1]]", "x[rows, :T]"),
    ("return x.flatten()[self.decisions]", "return x.flatten()[:len(self.decisions)]"),
    ("return logits.argmax(-1)", "return logits.argmin(-1)"),
    ("(logits if temperature == 1 else logits / temperature)", "(logits * temperature)"),
    ("(logits if temperature == 1 else logits / temperature)", "logits"),
    ("cdf = probabilities.cumsum(-1)", "cdf = probabilities.cummax(-1).values"),
    ("target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))", "target = u * total"),
    ("torch.searchsorted(cdf, target[:, None], right=True)", "torch.searchsorted(cdf, target[:, None])"),
    ("rows * P + prompt_lengths - 1  #", "rows * P + P - 1  #"),  # reads padding
    ("at = prompt_lengths[rows] + n", "at = P + n"),
    ("sample(logits, temperature, u[rows, n])", "sample(logits, 1.0, u[rows, n])"),
    ("sample(logits, temperature, u[rows, n])", "sample(logits, temperature, u[rows, 0])"),
    ("sample(logits, temperature, u[rows, n])", "sample(logits, temperature, u[:len(rows), n])"),  # other rows'
    ("logprobs[rows, at - 1] = logprob.masked_fill(~live, 0)", "logprobs[rows, at - 1] = logprob"),
    ("finished[rows] |= live & (new == ends[rows])", "finished[rows] |= live & (new != ends[rows])"),
    ("live = live & (new != ends[rows])", "live = live & (new == new)"),  # goes on after eos
    ("rows, at, live = rows[kept], at[kept], live[kept]", "rows, at, live = rows[kept], at[:left], live[kept]"),
    ("kept = (~live).argsort(stable=True)[:left]", "kept = live.int().argsort(stable=True)[:left]"),  # drops live rows
    ("if left <= 0.8 * len(rows) and not decoder:", "if left <= 0.8 * len(rows):"),
    ("cache.filled = cache.k.shape[2]", "cache.filled = cache.k.shape[2] // 2"),
    ("min(2 ** math.ceil(math.log2(slots)), self.model.config.block_size)", "2 ** math.ceil(math.log2(slots))"),
    ("cache.filled = P + n + 1", "cache.filled = P + n"),
    ("T = int(lengths.max())", "T = int(lengths.min())"),
    ("if all(isinstance(prompt, Prompt) for", "if any(isinstance(prompt, Prompt) for"),
    ("nullcontext() if decoder else packed(model)", "nullcontext()"),
]
MODEL = [
    ("mul_(1 / math.sqrt(D))", "mul_(1 / math.sqrt(C))"),
    (".add_(mask).softmax(-1)", ".add_(mask).softmax(-2)"),
    ("x = (x if select is None else x.flatten(0, 1).index_select(0, select)) + y", "x = y"),
    ("y = y if select is None else y.flatten(0, 1).index_select(0, select)",
     "y = y if select is None else y.flatten(0, 1).index_select(0, select - 1)"),
    ("return x + self.mlp(self.ln_2(x))", "return x + self.mlp(x)"),
    ('approximate="tanh"', 'approximate="none"'),
    ("unseen = slots > positions[:, None, :, None]", "unseen = slots > positions[:, None, :, None] + 1"),
    ("unseen = slots > positions[:, None, :, None]", "unseen = slots >= positions[:, None, :, None]"),
    ("F.dropout(x + self.wpe(positions) if rope is None else x,", "F.dropout(x,"),
    ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),  # the other way round
    ("torch.arange(0, D, 2, device=positions.device).float() / D", "torch.arange(0, D // 2).float() / D"),
    ("else turns(positions, self.config)\n", "else turns(positions * 0, self.config)\n"),
    ("x = F.silu(gate) * x", "x = gate * F.silu(x)"),
    ("wide.square().mean(-1, keepdim=True) + self.eps", "wide.square().mean(-1, keepdim=True)"),
    ("q.reshape(B, K, -1, D)", "q.transpose(1, 2).reshape(B, K, -1, D)"),  # heads with others' keys
    ("return self.wte.weight if self.config.tied else self.lm_head.weight", "return self.wte.weight"),
    ("return self.ln_f(x)", "return x"),
    ("* self.gain + self.bias", "* self.gain"),
    ("* self.gain + self.bias", "+ self.bias"),
    ("* T + lengths - 1  #", "* T + lengths - 2  #"),
    ("0.02 / math.sqrt(2 * self.config.n_layer)", "0.02 / math.sqrt(self.config.n_layer)"),
    ("std = 1 / math.sqrt(self.config.n_embd + 1)", "std = 1 / (self.config.n_embd + 1)"),
    ("return x.float() if x.dtype.itemsize < 4 else x", "return x"),
    ("self.logits(states / temperature)", "self.logits(states)"),
    ("states = self.states(tokens[:, :-1], decisions,", "states = self.states(tokens[:, :-1], decisions - 1,"),
    ("logprobs = logits.log_softmax(-1)", "logprobs = logits.log_softmax(0)"),  # wrong axis
    ("gather(1, tokens[:, 1:].flatten()[decisions, None])", "gather(1, tokens[:, :-1].flatten()[decisions, None])"),
    ("return self.scalar(self.states(tokens[:, :-1], decisions,", "return self.scalar(self.states(tokens[:, 1:], decisions,"),
]
KERNELS = [
    ("_linear_pointwise(x.to(dtype), weight, bias, *post)", "_linear_pointwise(x.to(dtype), weight, None, *post)"),
    ('("gelu", [], "tanh")', '("gelu", [], "none")'),
    ("c_fc.bias, dtype, gelu=gpt2)", "c_fc.bias, dtype, gelu=True)"),
    ("    if (dtype == torch.float32 and model.config.n_embd >= 128", "    if (dtype is not None and model.config.n_embd >= 128"),
    ("_reorder_linear_weight(weight.detach().to(dtype))", "_reorder_linear_weight(2 * weight.detach().to(dtype))"),
    ("None if bias is None else bias.detach().to(dtype)", "None"),
    ("            del owner.__dict__[name]", "            pass"),
    ("momentum = state[\"momentum_buffer\"].lerp_(p.grad, 1 - group[\"momentum\"])",
     "momentum = state[\"momentum_buffer\"].lerp_(p.grad, group[\"momentum\"])"),
    ("x, tall = p.grad.lerp(momentum, group[\"momentum\"]), len(p) > p.shape[1]", "x, tall = momentum, len(p) > p.shape[1]"),
    ("p.mul_(1 - lr * group[\"weight_decay\"])", "pass"),
    ("/ wall / cores_allowed(), 3)", "/ wall, 3)"),
    ("cores - threads + (0.15 if leave else 0.3)", "cores - threads + 0.3"),  # to and fro
    ("load.others() * cores > cores - threads", "load.others() > cores - threads"),
    ("-(-(cores - threads + 1) // max(1, threads - 1))", "1"),  # too few where threads leave cores free
    ("            leave.set()\n", ""),  # asleep for ever
    ("    leave.wait()\n", ""),  # a team that goes at once
    ("torch.zeros(torch.get_num_threads() << 16).add_(1)", "pass"),  # a thread without a team
    ('{"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}', '{"OMP_WAIT_POLICY"} & {*os.environ}'),
    ("if torch.get_num_threads() > 1 and Load().at", "if Load().at"),
    ("math.sqrt(max(1, len(p) / p.shape[1]))", "math.sqrt(max(1, p.shape[1] / len(p)))"),
    ("beta=b, alpha=c), x, beta=a)", "beta=b, alpha=c), x, beta=b)"),
]
DATA = [
    ("(t >= prompt_lengths[:, None] - 1)", "(t >= prompt_lengths[:, None])"),
    ("(t >= prompt_lengths[:, None] - 1)", "(t >= 0 * prompt_lengths[:, None])"),  # prompts train too
    ("(t < lengths[:, None] - 1)", "(t < lengths[:, None] - 2)"),  # eos does not train
    ("(t < lengths[:, None] - 1)", "(t < lengths[:, None])"),
    ("pad_sequence([torch.tensor(row.ids) for row in rows], True, eos)",
     "pad_sequence([torch.tensor(row.ids) for row in rows], True, eos, 'left')"),
    ("c = c[:block_size - 1]", "c = c[-block_size + 1:]"),
    ("p = trim_left(p, block_size - len(c))", "p = p[:block_size - len(c)]"),
    ("prompt[:1] + prompt[len(prompt) - room + 1:]", "prompt[len(prompt) - room:]"),  # the opening eos is lost
    ("epoch, i = divmod(place, n)", "epoch, i = 0, place % n"),
    ("max(1, round(epochs * self.steps_per_epoch))", "max(1, int(epochs) * self.steps_per_epoch)"),
    ("return min(steps, most) if most else steps", "return max(steps, most) if most else steps"),
    ("epoch, i = divmod(step, self.steps_per_epoch)", "epoch, i = 0, step % self.steps_per_epoch"),
    ("mask[i, start - 1:stop - 1] = True", "mask[i, start:stop] = True"),  # read, not chosen
    ("mask[i, start - 1:stop - 1] = True", "mask[i, start - 1:stop - 2] = True"),  # the end does not train
    ("(max(start - cut, 1), stop - cut)", "(start, stop)"),
    ("(max(start - cut, 1), stop - cut)", "(start - cut, stop - cut)"),  # trains the token that opens a row
    ("stop - cut > 1 and not last_turn_only", "not last_turn_only"),
    ("last = n if all(m.role ==", "last = n if any(m.role =="),
    ('prompt[0].role == "assistant":  # answers alone', "False:  # answers alone"),
]
CHAT = [
    ("p.token and p.text in tokenizer.special", "p.text in tokenizer.special"),  # a text can be a token
    ("yield from (END._replace(answer=answer), Piece(", "yield from (END, Piece("),  # its end does not train
    ("Piece(m.text, answer=answer))", "Piece(m.text, answer=True))"),  # prompts train
    ("not (messages and messages[0].role == \"system\")", "not messages"),
    ("[*chatml(text.messages, tokenizer.form)][2:-1]", "[*chatml(text.messages, tokenizer.form)][2:]"),  # a line end more
    ("Piece(ASSISTANT)], [tokenizer.opening])", "Piece(ASSISTANT)])"),
    ("[*spoken(text.messages)][1:])[0] + [tokenizer.eos]", "[*spoken(text.messages)][1:])[0]"),
    ("return tokenizer.special[END.text] if isinstance(text, Talk) and tokenizer.form else", "return"),
    ("spans[-1] = spans[-1][0], len(ids)", "pass"),
    ("yield from () if beside[0] else (START", "yield from (START"),
    ("yield from () if beside[1] else (END", "yield from (END"),
    ("if not as_made(form, REQUIRED) or", "if"),
    ("if as_made(other, OPTIONAL[name])), form)", "), form)"),
    ("think=as_made(form, OPTIONAL[\"think\"])", "think=True"),
    ("    if tokenizer.open_form:\n", "    if False:\n"),
    ("or START.text in rest or END.text in (form.system or \"\")", ""),
    ("m.calls and not (form and form.calls)", "m.calls and not form"),
    ("trim_blocks=True, lstrip_blocks=True,", ""),
    ("{\"ensure_ascii\": False} | options", "options"),
    ("from jinja2.sandbox import ImmutableSandboxedEnvironment", "from jinja2 import Environment as ImmutableSandboxedEnvironment"),
]
PPO = [
    ("ref_logprobs = ref.logprobs(", "ref_logprobs = policy.logprobs("),
    ("entropies = entropy(all_logprobs)", "entropies = -logprobs"),
    ("part.decisions, o.temperature, part.below)  # (N, V)", "part.decisions, 1.0, part.below)  # (N, V)"),
    ("batch.grid(torch.cat(column)) for column in zip(*columns))",
     "batch.grid(torch.cat(column)) for column in zip(*columns[::-1]))"),
    ("@torch.no_grad()\ndef score_rollout", "def score_rollout"),
    ("scores - o.missing_eos_penalty * ~batch.finished", "scores - o.missing_eos_penalty * batch.finished"),
    ("batch.scores.clamp(-o.reward_clip, o.reward_clip)", "batch.scores.clamp(0, o.reward_clip)"),
    ("if o.reward_clip and not o.reward else", "if o.reward_clip else"),
    ("kl_above_baseline(k1(", "kl_above_baseline(k3("),
    ("mask, o.kl_baseline, run.total)", "mask, 0.0, run.total)"),
    ("shape_rewards(batch.final_rewards,", "shape_rewards(batch.scores,"),
    ("whiten(batch.rewards, mask, keep_mean=True, total=run.total)", "whiten(batch.rewards, mask, total=run.total)"),
    ("gae(batch.rewards, batch.values, mask, o.gamma, o.lam)", "gae(batch.rewards, batch.values, mask, o.lam, o.gamma)"),
    ("batch.advantages = whiten(advantages, mask, total=run.total)", "batch.advantages = advantages"),
    ("batch.advantages = whiten(advantages, mask, total=run.total)",
     "batch.advantages = whiten(advantages, mask, total=run.total)\n    batch.returns = batch.advantages + batch.values"),
    ("n = run.total(batch.response_mask[rows].sum())", "n = batch.response_mask[rows].sum()"),
    ("old_logprobs, advantages = part.flat(part.logprobs), part", "old_logprobs, advantages = part.flat(part.ref_logprobs), part"),
    ("part.flat(part.logprobs), part.flat(part.advantages)", "part.flat(part.logprobs), part.flat(part.returns)"),
    ("old_values, returns = part.flat(part.values), part.flat(part.returns)",
     "returns, old_values = part.flat(part.values), part.flat(part.returns)"),
    ("((loss - bonus).sum() / n)", "((loss + bonus).sum() / n)"),
    ("((loss - bonus).sum() / n)", "(loss - bonus).mean()"),
    ("value_loss(values, old_values, returns, o.cliprange_value)", "value_loss(values, old_values, returns, o.cliprange)"),
    ("(o.vf_coef * loss.sum() / n)", "(loss.sum() / n)"),
    ("(o.vf_coef * loss.sum() / n)", "(o.vf_coef * loss.mean())"),
    ("            if step >= o.value_warmup:", "            if step > o.value_warmup:"),
    ("run.generator(step, f\"epoch {epoch}\")", "run.generator(step, \"epoch\")"),
    ("(torch.stack([policy_sums[\"policy_loss\"], policy_sums[\"k3\"]]) / n)",
     "torch.stack([policy_sums[\"policy_loss\"], policy_sums[\"k3\"]])"),
    ("policy_sums[\"k3\"]]", "policy_sums[\"approxkl\"]]"),
    ("                    policy.zero_grad(set_to_none=True)\n", ""),
    ("if update_kl > o.max_update_kl:", "if False:"),
    ("mean_loss = float(value_sums[\"value_loss\"] / n)", "mean_loss = 0.0"),
    ("approxkl=k2(logprobs, old_logprobs)", "approxkl=k3(logprobs, old_logprobs)"),
    ("k3=k3(old_logprobs, logprobs))", "k3=k3(logprobs, old_logprobs))"),
    ("policy_clipped=clipped", "policy_clipped=~clipped"),
    ("add(sums, **policy_sums, **value_sums)", "sums = {**policy_sums, **value_sums}"),  # of the last minibatch only
    ("            count = count + n\n", "            count = n\n"),
    ("sums[name] = sums.get(name, 0.0) + term.sum()", "sums[name] = term.sum()"),
    ("float(ratios.var(correction=0))", "float(ratios.std(correction=0))"),
    ("runtime.rate_factor(o.lr_schedule, step, steps))", "1.0)"),
    ("adaptive_kl_coef(kl_coef, record[\"objective/kl\"],", "adaptive_kl_coef(kl_coef, record[\"objective/kl\"] / length,"),
    ("return batch.take(batch.lengths.argsort(stable=True))", "batch.lengths = batch.lengths.sort().values\n    return batch"),
    ("update(batch, policy, value, optimizers, step, epochs, o, run)\n\n            # ----",
     "update(batch, policy, value, optimizers, step, o.num_ppo_epochs, o, run)\n\n            # ----"),
]
EVALUATE = [
    ("len(set(bigrams)) / max(1, len(bigrams))", "len(bigrams) / max(1, len(set(bigrams)))"),
    ("1 - len(set(texts)) / max(1, len(texts))", "len(set(texts)) / max(1, len(texts))"),
    ("win_rate(column(rows, name), column(base, name))", "win_rate(column(base, name), column(rows, name))"),
    ("wilson_interval(rate * len(rows), len(rows))", "wilson_interval(rate, len(rows))"),
    ("\"surprise\": -batch.logprobs", "\"surprise\": batch.logprobs"),
    ("\"objective/non_score_reward\": -a_row", "\"objective/non_score_reward\": a_row"),
    ("a_row[\"final_reward\"] - a_row[\"kl_penalty\"]", "a_row[\"final_reward\"] + a_row[\"kl_penalty\"]"),
    ("a_row[\"entropy\"] / length", "a_row[\"entropy\"]"),
    ("a_row[\"gap\"] / length", "a_row[\"gap\"]"),
    ("kl_coef * batch.penalised_kl", "batch.penalised_kl"),
    ("            self.in_a_row = 0\n", ""),
    ("        self.in_a_row += 1\n", "        self.in_a_row = 1\n"),
    ("elif update_kl > UNSOUND_KL:", "elif False:"),
    ("return 0 < self.o.max_ref_kl < self.ref_kl", "return self.o.max_ref_kl < self.ref_kl"),
    ("key=lambda pair: pair[0][\"length\"] - pair[1][\"length\"])", "key=lambda pair: pair[0][\"length\"])"),
    ("d = column(rows, name) - column(others, name)", "d = column(others, name) - column(rows, name)"),
    ("if low <= 0.5 <= high:", "if low <= 0.4 <= high:"),
    ("(thirds[0][3] > 0.5) != (thirds[2][3] > 0.5):", "(thirds[0][2] > 0.5) != (thirds[2][2] > 0.5):"),
    ("if variance <= 1e-12 * (1 + score ** 2) and", "if variance <= 1e-12 and"),
    ("    if judge_low > 0.5:", "    if judge_rate > 0.5:"),
    ("max(rows, key=lambda row: row[\"score\"])", "min(rows, key=lambda row: row[\"score\"])"),
]
CHECKPOINT = [
    ('return "" if value.isfinite().all() else name', 'return ""'),
    ("elif seal != SEAL + sha.digest():", "elif False:"),
    ("            sha.update(block)\n", "            sha.update(block[:1])\n"),
    ("            left -= len(block)\n", "            left -= len(block) + 1\n"),  # of one block nothing is lost
    ('if (payload["head"] == "scalar") != (payload["stage"] == "rm"):',
     'if payload["head"] == "scalar" and payload["stage"] != "rm":'),
    ("if damaged := archive.testzip():", "if damaged := None:"),
    ('map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False'),
    ("        keep_previous(path)\n", ""),
    ("        check_whole(path)\n        with contextlib.suppress", "        with contextlib.suppress"),
    ("                os.fsync(f.fileno())\n", ""),
    ("        if wanted != found:\n", "        if False:\n"),
    ("                group.update(values)\n", "                pass\n"),
    ("if m.dim() and m.shape != p.shape", "if False"),
    ('if payload["format"] > FORMAT:', "if False:"),
    ('if payload["stage"] not in stages:', "if False:"),
    ("            if name in structural and not (", "            if False and not ("),
    ("bool(a and b) and str(a).rpartition", "str(a).rpartition"),
    ("            copy.flush()\n            os.fsync(copy.fileno())\n", "            copy.flush()\n"),
    ("block.attn.dropout = block.mlp.dropout = dropout", "block.attn.dropout = dropout"),
]
RUNTIME = [
    ("out_of_memory(error) else", "isinstance(error, RuntimeError) else"),
    ("                self.rescue()\n", "                pass\n"),
    ('if self.logging and self.held() else {}', 'if self.logging else {}'),
    ("if options.checkpoint_activations and options.compile:", "if False:"),
    ("        if not x.isfinite().all():\n            fail_before", "        if x.isnan().any():\n            fail_before"),
    ('if row["step"] <= step and "final" not in row:', 'if row["step"] <= step:'),
    ('if row["step"] <= step and "final" not in row:', 'if "final" not in row:'),
    ("all(map(math.isfinite, found))", "all(map(math.isfinite, found[:2]))"),
    ("all(map(math.isfinite, found))", "all(map(math.isfinite, found[1:]))"),
    ("if 0 < o.max_grad_norm < found[1]:", "if o.max_grad_norm < found[1]:"),
    ("if 0 < o.max_grad_norm < found[1]:", "if False:"),
    ("self.lock.truncate(0)\n", "pass\n"),
    (r"ckpt\.(\d{6,})\.pt", r"ckpt\.(\d{6})\.pt"),
    ("if attempt == 999:", "if attempt == 0:"),
    ("                if not stat.S_ISREG(mode):\n", "                if stat.S_ISDIR(mode):\n"),
    ("if stat.S_ISLNK(mode) and os.path.exists(self.path(name)):", "if stat.S_ISLNK(mode):"),
    ("        for folder in self.made:\n            with contextlib.suppress(OSError):\n                os.rmdir(folder)\n", ""),
    ("        self.total(torch.zeros(()))\n", ""),
    ("{'=' if str(value).startswith('-') else ' '}", " "),
    ("{shlex.quote(str(value))}", "{value}"),
    ('"ending after this check" if self.options.check else ', ""),
]
CONFIG = [
    ('decode("utf-8-sig")', 'decode("utf-8")'),
    ("        if name in seen and one_of(kinds[name]) is kinds[name]:\n", "        if False:\n"),
    ("        if name in seen and one_of(kinds[name]) is kinds[name]:\n", "        if name in seen:\n"),
    (') if v != "")', "))"),
    ("if isinstance(value, (list, tuple)) else [value]", "if isinstance(value, tuple) else [value]"),
    ("before, words = (without(name, part) for part in (before, words))", "pass"),
    ("before, words = (without(name, part) for part in (before, words))", "words = without(name, words)"),
    ("                words = without(name, words)\n", "                pass\n"),
    ("            before = words\n", "            before = ()\n"),
    ("for value in values if kind is not field.type else [values]:", "for value in [values][kind is not field.type:]:"),
    ("if kind is kinds[name] else \"write a line for each\"", "if kind else \"\""),
    ("[*values.get(name, []), value]", "[value]"),
    ('r"\\r\\n|\\r|\\n"', 'r"\\r|\\n"'),  # lines are counted twice
    ('if "\\0" in text:', "if False:"),
    ('end = text[-1] if text[-1] in ",;" else ""', 'end = ""'),
    ("text, end = quoted[1][1:-1], quoted[2]", 'text, end = quoted[1][1:-1], ""'),
    ('if not stat.S_ISREG(status.st_mode) or', 'if'),  # a pipe hangs
    ('        if " --" in text:\n', "        if False:\n"),
    ('r"[ \\t]#", value)[0]', 'r"#", value)[0]'),
    ("if numbers[\"RANK\"] >= numbers", "if numbers[\"RANK\"] > numbers"),
    ('if missing := [name for name in RANKS if', 'if missing := [name for name in RANKS[:2] if'),
    ("        ranks()  # before", "        pass  # before"),
    ("places.pop(name := word.partition", "(lambda *a: 0)(name := word.partition"),  # blames the file for the command line's value
]
MEMORY = [
    ('matrices = 2 if c.family == "gpt2" else 3  # of', 'matrices = 3  # of'),
    ("c.n_layer - o.freeze_layers", "c.n_layer"),
    ("{p.untyped_storage().data_ptr(): p", "{id(p): p"),  # what is shared is counted twice
    ("(sum(map(sum, then)) - sum(map(sum, now)))", "(sum(map(sum, then)))"),
    ("sum(one * a + 2 * b for a, b in then)", "sum(2 * a + 2 * b for a, b in then)"),
    ('if model.wte.weight.requires_grad and model.head == "lm"]', 'if model.head == "scalar"]'),
    ('norm = FLOAT * C * (1 if c.family == "gpt2" or rank else 2)', "norm = FLOAT * C"),
    ("(C + own + 2 * shared + rank) + c.qk_norm * heads", "(C + own + 2 * shared + rank)"),
    ("h = w * c.n_head * (3 if dropped else 1) * cpu", "h = w * c.n_head * cpu"),
    ("h = w * c.n_head * (3 if dropped else 1) * cpu", "h = w * c.n_head * (3 if dropped else 1)"),
    ("+ 2 * C * dropped + 3 * rank)", "+ 3 * rank)"),
    ("kept = (blocks - 1) * block + last", "kept = blocks * block"),
    ("for rows, length, _ in passes), 2 * block", "for rows, length, _ in passes), block"),
    ('kept + max(0, again - logits), "logits"', 'kept + again, "logits"'),
    ("n) for n in (rows // o.num_mini_batches, rows))", "n) for n in (rows, rows))"),
    ("(5 if o.ent_coef else 3) * logits", "5 * logits"),
    ("for n in (rows, min(BATCH, o.num_eval_prompts)))", "for n in (rows, BATCH))"),
    ("return [passes | gradients] if several else", "return"),
    ("if need <= there:", "if need < there:"),
    ("for limit in (there, min(0.9 * need, there)))", "for limit in (there, 0.9 * need))"),
    ("for limit in (there, min(0.9 * need, there)))", "for limit in (need, min(0.9 * need, there)))"),
    ("    if o.resume:\n        return\n", ""),
    (" * (not o.checkpoint_activations and not o.compile)", ""),
    ("if size % (o.num_mini_batches * world) == 0)", ")"),
    ("return min(free / beside + resident(), sizes.memory_of(device))", "return free / beside + resident()"),
    ("return min(free / beside + resident(), sizes", "return min(free / beside, sizes"),
    ("min(field(\"/proc/meminfo\", \"MemAvailable\"), group_room())", "field(\"/proc/meminfo\", \"MemAvailable\")"),
    ("for inner in (group, *map(str, Path(group).parents)):", "for inner in (group,):"),
    ("return most - used + int(counts.get(reclaimable, 0))", "return most - used"),
    ("    if not torch.is_grad_enabled() or extend is not None:", "    if not torch.is_grad_enabled():"),
    ("        random_state(x.device, ctx.random)\n", ""),
    ("        random_state(x.device, now)\n", ""),
    ("with torch.enable_grad(), torch.autocast(**ctx.precision):", "with torch.enable_grad():"),
    ("cache_enabled=False,", "cache_enabled=True,"),
    ("(found if x.requires_grad else (None, *found))", "found"),
]
SIZES = [
    ("(vocab_size + block_size) * n_embd", "vocab_size * n_embd"),
    ("TRAINING * count + BLOCK * o.n_layer", "4 * count"),
    ("slots * (cache.k.nbytes", "(cache.k.nbytes"),
    ("shape[name] / getattr(type(o), name))", "shape[name])"),
]
# modes, what survives a resume, options, streams of numbers, --check, what is on the disk when: (file, old, new)
STATE = [
    ("train_sft.py", '    model.train()\n    for ids, response', '    for ids, response'),  # no dropout after samples
    ("train_sft.py", '    model.eval()\n    with run.autocast():', '    with run.autocast():'),  # samples with dropout
    ("train_sft.py", 'runtime.generator(o.seed, 0, 0, "samples")', 'run.generator(step, "samples")'),
    ("train_sft.py", '            run.seed_dropout(step)\n', ''),
    ("train_sft.py", '            run.seed_dropout(step)\n', '            run.seed_dropout(0)\n'),
    ("train_sft.py", 'k: tensor.clone() for k, tensor', 'k: tensor for k, tensor'),  # an alias of what training changes
    ("train_sft.py", '                if now < best:\n', '                if now <= best:\n'),
    ("train_sft.py", 'best, best_weights = float(kept["info"]["nats_per_token"]), kept["best"]',
     'best_weights = kept["best"]'),
    ("train_sft.py", 'best, best_weights = float(kept["info"]["nats_per_token"]), kept["best"]',
     'best = float(kept["info"]["nats_per_token"])'),
    ("train_sft.py", '"held_out": best_figures}, best_weights)', '"held_out": best_figures})'),
    ("train_sft.py", '"held_out": best_figures}, best_weights)', '"held_out": held_out}, best_weights)'),
    ("minirlhf/checkpoint.py", "POLICIES, device, o.dropout, block_size)", "POLICIES, device, 0.0, block_size)"),
    ("train_sft.py", 'o.block_size, o.dropout, o.family)', 'o.block_size, 0.0, o.family)'),
    ("train_sft.py", '            runtime.set_rate(optimizers, factor)\n', ''),
    ("train_sft.py", 'min(o.response_length, model.config.block_size - max(map(len, prompts)))',
     'model.config.block_size - max(map(len, prompts))'),
    ("train_sft.py", 'if done % o.log_interval == 0 or done == steps:', 'if done == steps:'),
    ("train_sft.py", 'scheduled = done % o.eval_interval == 0 or done == steps', 'scheduled = done == steps'),
    ("train_sft.py", 'runtime.generator(o.seed, 0, 0, "init")', 'torch.Generator()'),
    ("train_sft.py", '            if scheduled or stopping:\n                run.rescue',
     '            if scheduled:\n                run.rescue'),
    ("train_sft.py", 'for row in train_rows], o.batch_size, o.seed)', 'for row in train_rows], o.batch_size, 0)'),
    ("train_rm.py", '    model.eval()\n    scores = score_all(model, run, rows, tokenizer.eos).cpu()',
     '    scores = score_all(model, run, rows, tokenizer.eos).cpu()'),
    ("train_rm.py", '            run.seed_dropout(step)\n', ''),
    ("train_rm.py", '            run.seed_dropout(step)\n', '            run.seed_dropout(first)\n'),
    ("train_rm.py", '"reward"), o.dropout)', '"reward"))'),
    ("train_rm.py", 'runtime.generator(o.seed, at, 0, "scale")', 'runtime.generator(o.seed, 0, 0, "scale")'),
    ("train_rm.py", 'runtime.generator(o.seed, at, 0, "scale")', 'run.generator(at, "scale")'),
    ("train_rm.py", 'runtime.generator(o.seed, 0, 0, "head")', 'runtime.generator(o.seed, 0, 0, "init")'),
    ("train_rm.py", 'rollout = generate(sft, part, o.response_length, tokenizer.eos,',
     'rollout = generate(sft, part, model.config.block_size - max(map(len, part)), tokenizer.eos,'),
    ("train_rm.py", 'training.save, done, {}, finished=False)', 'training.save, done, {}, finished=True)'),
    ("train_rm.py", 'if scheduled or stopping and done < steps:', 'if scheduled:'),
    ("train_rm.py", '            runtime.set_rate(optimizers, factor)\n', ''),
    ("minirlhf/data.py", "for stem in o.preferences}", 'for stem in ("preferences",)}'),
    ("minirlhf/data.py", "for stem in o.preferences}", "for stem in sorted(o.preferences)}"),
    ("minirlhf/data.py", "for stem in o.preferences}", "for stem in o.preferences[-1:]}"),
    ("minirlhf/data.py", "if not o.preferences or len({*o.preferences}) < len(o.preferences):", "if not o.preferences:"),
    ("minirlhf/data.py", "if len(sets) > 1 else ():", "if False else ():"),
    ("minirlhf/data.py", "if len(sets) > 1 else ():", "if sets else ():"),
    ("minirlhf/data.py", 'p.extra.setdefault("kind", stem)', 'p.extra["kind"] = stem'),
    ("minirlhf/data.py", "for other in sets if other != stem)", "for other in sets)"),
    ("minirlhf/data.py", "for p in val if p.prompt.strip()}", "for p in val}"),
    ("minirlhf/data.py", "{letters(p.prompt) for p in val", "{p.prompt for p in val"),
    ("minirlhf/data.py", "return *(list(itertools.chain(*part)) for part in (train, val)), [[*part] for part in zip(*paths)]",
     "return *(list(itertools.chain(*part)) for part in (train, val)), [[*part] for part in paths]"),
    ("minirlhf/data.py", 'if "/" in stem or stem.endswith(".jsonl")', 'if stem.endswith(".jsonl")'),
    ("minirlhf/data.py", 'if "/" in stem or stem.endswith(".jsonl")', 'if "/" in stem'),
    ("minirlhf/data.py", 'if path.endswith(".jsonl") and not path.endswith(".train.jsonl"):', 'if path.endswith(".jsonl"):'),
    ("train_rm.py", 'if start.head == "lm":\n            model.init', 'if True:\n            model.init'),
    ("train_rm.py", "        model.gain.fill_(1), model.bias.zero_()  # in", "        model.bias.zero_()  # in"),
    ("train_rm.py", "        model.gain.fill_(1), model.bias.zero_()  # in", "        model.gain.fill_(1)  # in"),
    ("train_rm.py", 'o.reference = str(was.get("reference") or was.get("init_from", ""))',
     'o.reference = str(was.get("init_from", ""))'),
    ("train_rm.py", 'if payload["stage"] == "rm" and not o.reference:', 'if payload["stage"] == "rm":'),
    ("train_rm.py", "    return start, sft, tokenizer\n", "    return sft, sft, tokenizer\n"),
    ("train_rm.py", "    checkpoint.compatible((sft, own_tokenizer), o.reference, (start, tokenizer), o.init_from)\n", ""),
    ("train_rm.py", '        run.spare("reference")\n', ""),
    ("train_rm.py", "init_from=o.reference or o.init_from,\n", "init_from=o.init_from,\n"),
    ("train_rm.py", "            **({f\"--reference {o.reference}\": checkpoint.files_of(o.reference)} if o.reference else {})})",
     "            })"),
    ("minirlhf/data.py", "return *sets, [head, *lines], sum(paths, [])", "return *sets, [head, *lines], paths[0]"),
    ("train_ppo.py", 'guard.in_a_row = int(kept["high"])', 'pass'),
    ("train_ppo.py", 'high=guard.in_a_row)', 'high=0)'),
    ("train_ppo.py", '                    kl_coef = float(kept["kl_coef"])', '                    pass'),
    ("train_ppo.py", 'if o.kl_coef == kept["options"]["kl_coef"]:', 'if True:'),
    ("train_ppo.py", 'training.save, done, record, kl_coef=kl_coef,', 'training.save, done, record, kl_coef=o.kl_coef,'),
    ("train_ppo.py", 'run.generator(step, "rollout")', 'run.generator(0, "rollout")'),
    ("train_ppo.py", 'run.generator(step, "rollout")', 'runtime.generator(o.seed, step, 0, "rollout")'),  # of all ranks
    ("train_ppo.py", 'run.generator(step, "rollout")', 'run.generator(step, "epoch 0")'),  # of the minibatches too
    ("train_ppo.py", 'endless_batch(len(prompts), o.batch_size, o.seed, step)',
     'endless_batch(len(prompts), o.batch_size, o.seed, step - first)'),
    ("train_ppo.py", 'endless_batch(len(prompts), o.batch_size, o.seed, step)',
     'endless_batch(len(prompts), o.batch_size, 0, step)'),
    ("minirlhf/adapters.py", 'return model.with_head(head, dropout)',
     'return model if head == model.head else model.with_head(head, dropout)'),  # reference and reward are trained too
    ("train_ppo.py", 'from_rm = reward.model is not None and o.value_init == "rm"',
     'from_rm = reward.model is not None'),
    ("train_ppo.py", '            if scheduled or stopping:\n', '            if scheduled:\n'),
    ("train_ppo.py", 'asked, o.response_length, eos, o.temperature,', 'asked, o.response_length, eos, 1.0,'),
    ("train_ppo.py", '            value_model=value)', '            )'),
    ("train_ppo.py", 'if o.adaptive_kl_target:\n                kl_coef', 'if False:\n                kl_coef'),
    ("minirlhf/evaluate.py", '    model.train()\n    sums = defaultdict', '    sums = defaultdict'),
    ("minirlhf/evaluate.py", '    model.eval()\n    order = sorted', '    order = sorted'),
    ("minirlhf/evaluate.py", '    model.eval()\n    pairs = ', '    pairs = '),
    ("minirlhf/evaluate.py", '    model.train()\n    better, worse', '    better, worse'),
    ("minirlhf/evaluate.py", '    model.eval()\n    for rows, index, _ in', '    for rows, index, _ in'),
    ("minirlhf/evaluate.py", '"scores": scores})\n    model.train()', '"scores": scores})'),
    ("minirlhf/evaluate.py", 'runtime.generator(o.seed, at, 0, f"held-out {draw}")',
     'runtime.generator(o.seed, 0, 0, f"held-out {draw}")'),  # every batch draws alike
    ("minirlhf/evaluate.py", 'runtime.generator(o.seed, at, 0, f"held-out {draw}")',
     'runtime.generator(o.seed, at, 0, "held-out")'),  # every draw is the same one
    ("minirlhf/evaluate.py", 'runtime.generator(o.seed, at, 0, f"held-out {draw}")',
     'runtime.generator(o.seed, at, draw, "rollout")'),  # as the first training step
    ("minirlhf/evaluate.py", 'runtime.generator(o.seed, at, 0, f"held-out {draw}")',
     'runtime.generator(o.seed, at, run.rank, f"held-out {draw}")'),
    ("minirlhf/evaluate.py", 'for draw in range(1, BEST_OF))', 'for draw in range(BEST_OF - 1))'),
    ("minirlhf/evaluate.py", 'for draw in range(len(draws), n)]', 'for draw in range(n)]'),
    ("minirlhf/sample.py", 'runtime.generator(a.seed, at, 0, "sample")', 'runtime.generator(a.seed, 0, 0, "sample")'),
    ("minirlhf/runtime.py", 'seed_of(self.options.seed, step, self.rank, "dropout")',
     'seed_of(self.options.seed, step, 0, "dropout")'),
    ("minirlhf/runtime.py", 'return generator(self.options.seed, step, self.rank, purpose)',
     'return generator(self.options.seed, step, 0, purpose)'),
    ("minirlhf/runtime.py", 'f"{seed} {step} {rank} {purpose}"', 'f"{seed} {step + rank} {purpose}"'),
    ("minirlhf/runtime.py", '                f.flush()\n', ''),
    ("minirlhf/runtime.py", '                f.flush()\n                os.fsync(f.fileno())\n',
     '                f.flush()\n'),
    ("minirlhf/runtime.py", 'self.path(name))\n            sync_folder(self.out_dir)\n', 'self.path(name))\n'),
    ("minirlhf/runtime.py", '                os.fsync(f.fileno())\n        sync_folder',
     '                pass\n        sync_folder'),
    ("minirlhf/runtime.py", '                os.fsync(f.fileno())\n        sync_folder(self.out_dir)\n',
     '                os.fsync(f.fileno())\n'),
    ("minirlhf/runtime.py", '            sync_folder(os.path.dirname(folder))', '            pass'),
    ("minirlhf/runtime.py", 'old += ["config.json", *self.held()]', 'old += [*self.held(), "config.json"]'),
    ("minirlhf/runtime.py", 'KEPT = ("ckpt.previous.pt", "ckpt.pt", *LOGS)',
     'KEPT = (*LOGS, "ckpt.previous.pt", "ckpt.pt")'),
    ("minirlhf/runtime.py", 'if error.errno != errno.EINVAL:', 'if True:'),
    ("minirlhf/runtime.py", 'if error.errno != errno.EINVAL:', 'if False:'),
    ("minirlhf/runtime.py", '        os.close(handle)\n', '        pass\n'),
    ("minirlhf/checkpoint.py", '                f.write(SEAL + digesting.sha.digest())\n                f.flush()\n',
     '                f.write(SEAL + digesting.sha.digest())\n'),
    ("minirlhf/checkpoint.py", '        sync_folder(os.path.dirname(path))\n', ''),
    ("minirlhf/checkpoint.py", '        keep_previous(path)\n        os.replace(temporary, path)\n',
     '        os.replace(temporary, path)\n        keep_previous(path)\n'),
    ("minirlhf/checkpoint.py", '            self.run.sync()\n', ''),
    ("minirlhf/checkpoint.py", 'payload["model"] if apart else None)', 'self.model.state_dict() if apart else None)'),
    ("minirlhf/checkpoint.py", '"model" in state and not is_merged(self.model)', '"model" in state'),
    ("minirlhf/checkpoint.py", 'load_weights(network, state.pop(name), path)', 'state.pop(name)'),
    ("minirlhf/checkpoint.py", 'load_optimizers(self.optimizers, state.pop("optimizers"), path)',
     'state.pop("optimizers")'),
    ("minirlhf/checkpoint.py", '**contents(model, weights)}', '**contents(model)}'),
    ("minirlhf/checkpoint.py", 'training["model"] = learned_state(self.model)', 'training["model"] = best'),
    ("minirlhf/checkpoint.py", 'load_weights(self.model, state.pop("model", payload["model"]), path)',
     'state.pop("model", None), load_weights(self.model, payload["model"], path)'),  # goes on from the best
    ("minirlhf/check.py", 'self.failed + (failing > 0)', 'self.failed + (not holds)'),  # of this rank
    ("minirlhf/check.py", 'raise SystemExit(1 if self.failed else 0)', 'raise SystemExit(0)'),
    ("minirlhf/check.py", 'self(claim, gap <= self.limit,', 'self(claim, not gap > self.limit,'),  # true of NaN
    ("minirlhf/check.py", 'return torch.where(t < lengths[:, None], tokens, other.to(tokens.device))', 'return tokens'),
    ("minirlhf/check.py", 'for size in (len(batch), 1):\n        loss', 'for size in (1, 1):\n        loss'),
    ("minirlhf/check.py", 'for size in (len(batch), 1):\n        train_rm', 'for size in (1, 1):\n        train_rm'),
    ("minirlhf/check.py", 'for size in (len(rows), 1):', 'for size in (1, 1):'),
    ("minirlhf/check.py", '        for group in optimizer.param_groups:\n            group["lr"] = 0.0\n', ''),
    ("minirlhf/check.py", 'return all(torch.equal(p, q)', 'return any(torch.equal(p, q)'),
    ("minirlhf/check.py", 'not different and other_tokenizer.same_ids(tokenizer)', 'not different'),
    ("minirlhf/check.py", 'not different and other_tokenizer.same_ids(tokenizer)',
     'other_tokenizer.same_ids(tokenizer)'),
    ("minirlhf/check.py", 'for size in (len(parts), 1)]', 'for size in (1, 1)]'),
    ("minirlhf/check.py", '    if not first and not o.reference:\n', '    if True:\n'),
    ("minirlhf/check.py", '("value network", value), ("reward model", reward.model)',
     '("value network", policy), ("reward model", value)'),
    ("minirlhf/check.py", '    model.eval()\n    padding(checks, model, batch, "model")',
     '    padding(checks, model, batch, "model")'),
    ("minirlhf/check.py", '    model.eval()\n    padding(checks, model, rows, "reward model")',
     '    padding(checks, model, rows, "reward model")'),
    ("minirlhf/check.py", 'checks("eos is reachable", eos_rate > 0,', 'checks("eos is reachable", eos_rate >= 0,'),
    ("minirlhf/check.py", 'abs(loss - uniform) < 0.1 * uniform', 'loss > 0.9 * uniform'),
    ("minirlhf/check.py", 'ends == len(uncut), f"{ends} of {len(uncut)} completions',
     'ends > 0, f"{ends} of {len(uncut)} completions'),
    ("minirlhf/check.py", 'same == len(rows),\n', 'same > 0,\n'),
]
SFT = [
    ("n_tokens = sum(row.trained for row in batch)", "n_tokens = sum(len(row.ids) for row in batch)"),
    ("n_tokens = sum(row.trained for row in batch)", "n_tokens = sum(row.trained for row in run.share(batch))"),
    ("n_tokens = sum(row.trained for row in batch)", "n_tokens = sum(len(row.ids) - row.prompt_length for row in batch)"),
    ("    return float(run.total(loss_sum))", "    return float(loss_sum)"),
    ("        loss_sum += loss.detach()", "        loss_sum = loss.detach()"),
    ("room if room >= 2 else block_size // 2", "room if room >= 2 else block_size"),
    (".sum() / n_tokens", ".mean()"),
    ('"epoch": done / order.steps_per_epoch, "loss": loss', '"epoch": step / order.steps_per_epoch, "loss": loss'),
    ('"epoch": done / order.steps_per_epoch, "loss": loss',
     '"epoch": done * o.batch_size / len(train_rows), "loss": loss'),
    ('"lr": o.learning_rate * factor,\n', '"lr": o.learning_rate,\n'),
    ("runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)",
     "runtime.rate_factor(o.lr_schedule, step + 1, steps, o.warmup_ratio)"),
    ("runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)",
     "runtime.rate_factor(o.lr_schedule, step - first, steps, o.warmup_ratio)"),
    ("tokens, seconds = sum(len(row.ids) - 1 for row in batch)", "tokens, seconds = sum(len(row.ids) for row in batch)"),
    ("tokens, seconds = sum(len(row.ids) - 1 for row in batch)",
     "tokens, seconds = sum(len(row.ids) - 1 for row in run.share(batch))"),
    ("seen, seen_seconds = seen + tokens, seen_seconds + seconds", "seen, seen_seconds = tokens, seen_seconds + seconds"),
    ("                seen, seen_seconds = 0, 0.0\n", ""),
    ("                seen, seen_seconds = 0, 0.0\n", "                seen = 0\n"),
    ("seen, seen_seconds = seen + tokens, seen_seconds + seconds", "seen, seen_seconds = seen + tokens, seconds"),
    ("{run.progress(done, steps, left)}  loss", "{run.progress(step, steps, left)}  loss"),
    ('left = pace.left("steps", steps - done)', 'left = pace.left("steps", steps - step)'),
    ("look * runtime.looks_left(done, steps, o.eval_interval)", "look * runtime.looks_left(done, steps, steps)"),
    ('"steps")\n                run.say', '"")\n                run.say'),
    ('pace.add("looks", time.perf_counter() - began, look)', 'pace.add("looks", time.perf_counter() - began, 1.0)'),
    (") * runtime.forward_share(model, o)", ")"),
    ("{o.learning_rate * factor:.1e}  grad", "{o.learning_rate:.1e}  grad"),
    ("if done % o.log_interval == 0 or done == steps:", "if step % o.log_interval == 0 or done == steps:"),
    ("scheduled = done % o.eval_interval == 0 or done == steps\n            if scheduled:\n                began",
     "scheduled = done % o.eval_interval == 0\n            if scheduled:\n                began"),
    ("'  best so far' if now < best else ''", "'  best so far' if now <= best else ''"),
    ("'  best so far' if now < best else ''", "'  best so far' if now > best else ''"),
    ("                if now < best:\n", "                if now <= best:\n"),
    ("                if now < best:\n", "                if now < math.inf:\n"),
    ("best, best_figures = now, held_out", "best, best_figures = now, best_figures or held_out"),
    ('{"nats_per_token": best, "held_out": best_figures}', '{"nats_per_token": now, "held_out": best_figures}'),
    ("tokens_per_epoch = sum(len(row.ids) - 1 for row in train_rows)",
     "tokens_per_epoch = sum(len(row.ids) for row in train_rows)"),
    ("trained = sum(row.trained for row in train_rows)", "trained = sum(row.trained - 1 for row in train_rows)"),
    ("earlier = sum(stop - start for row in train_rows", "earlier = sum(1 for row in train_rows"),
    ("block_size, o.long_prompts, o.last_turn_only)", "block_size, o.long_prompts, False)"),
    ('"last_turn_only", "lr_schedule"', '"lr_schedule"'),
    ("{tokens_per_epoch // order.steps_per_epoch:,} tokens each; {o.optimizer}",
     "{tokens_per_epoch // steps:,} tokens each; {o.optimizer}"),
    ("tokenizer.count_bytes(row.ids[start:stop]) for start, stop in row.spans)", "tokenizer.count_bytes(row.ids) for _ in [0])"),
    ("tokenizer.count_bytes(row.ids[start:stop]) for", "len(tokenizer.decode(row.ids[start:stop])) for"),
    ("for start, stop in row.spans) for row in val_rows", "for start, stop in row.spans[-1:]) for row in val_rows"),
    ("run, val_rows, byte_counts, kinds, tokenizer,",
     "run, train_rows[:len(val_rows)], byte_counts, kinds, tokenizer,"),
    ('{evaluate.describe(best_figures)}")\n        run.saved', '{evaluate.describe(held_out)}")\n        run.saved'),
    ('head = f"{len(train_rows):,} rows for training', 'head = f"{len(parts[0]):,} rows for training'),
]
RM = [
    ("n_pairs = sum(len(pairs) for _, pairs, _ in batch)", "n_pairs = len(batch)"),
    ("n_pairs = sum(len(pairs) for _, pairs, _ in batch)",
     "n_pairs = sum(len(pairs) for _, pairs, _ in run.share(batch))"),
    ("wins(scores[better].cpu(), scores[worse].cpu())", "(scores[better] > scores[worse])"),
    ("wins(scores[better].cpu(), scores[worse].cpu())", "wins(scores[worse].cpu(), scores[better].cpu())"),
    ("        sums += torch.stack([loss", "        sums = torch.stack([loss"),
    ("    return *run.total(sums).tolist(), n_pairs", "    return *sums.tolist(), n_pairs"),
    ("tokens, seconds = sum(len(row.ids) for rows, _, _ in batch for row in rows)",
     "tokens, seconds = sum(len(row.ids) for rows, _, _ in run.share(batch) for row in rows)"),
    ("steps - done + scale", "steps - done"),
    ("right, seen_pairs = right + correct, seen_pairs + n_pairs", "right, seen_pairs = correct, n_pairs"),
    ("right, seen_pairs = right + correct, seen_pairs + n_pairs",
     "right, seen_pairs = right + correct / n_pairs, seen_pairs + 1"),
    ("seen, seen_seconds, right, seen_pairs = 0, 0.0, 0, 0\n\n", "seen, seen_seconds = 0, 0.0\n\n"),
    ('"accuracy": correct / n_pairs', '"accuracy": right / seen_pairs'),
    ('"epoch": done / order.steps_per_epoch, "loss": loss', '"epoch": done / steps, "loss": loss'),
    ("{run.progress(done, steps, left)}  loss", "{run.progress(step, steps, left)}  loss"),
    ("runtime.rate_factor(o.lr_schedule, step, steps, o.warmup_ratio)",
     "runtime.rate_factor(o.lr_schedule, done, steps, o.warmup_ratio)"),
    ("for rows, pairs, _ in train_set for i, j in pairs) > 0", "for rows, pairs, _ in val_set for i, j in pairs) > 0"),
    ("for rows, pairs, _ in train_set for i, j in pairs) > 0",
     "for rows, pairs, _ in train_set for i, j in pairs[:1]) > 0"),
    ("for rows, pairs, _ in train_set for i, j in pairs) > 0",
     "for rows, pairs, _ in train_set for i, j in pairs) < 0"),
    ("float(scores.std(correction=0))", "float(scores.std())"),
    ("    model.gain.div_(std)", "    model.gain.mul_(std)"),
    ("model.bias.copy_((model.bias - mean) / std)", "model.bias.copy_((model.bias + mean) / std)"),
    ("model.bias.copy_((model.bias - mean) / std)", "model.bias.copy_(model.bias - mean / std)"),
    ("rows += [Row(p + r, len(p)) for", "rows = [Row(p + r, len(p)) for"),
    ("[prompts[i % len(prompts)] for i in", "[prompts[0] for i in"),
    ('path = os.path.join(o.data_dir, "prompts.train.jsonl")', 'path = os.path.join(o.data_dir, "prompts.val.jsonl")'),
    ("rows += [Row(p + r, len(p)) for", "rows += [Row(r, 0) for"),
    ('runtime.generator(o.seed, at, 0, "scale")', 'runtime.generator(o.seed, 0, 0, "scale")'),
    ("calibrated = evaluate.calibration(differences)", "calibrated = evaluate.calibration(differences * std)"),
    ("figures, differences = evaluate.reward_model_figures(model, run, val_set,",
     "figures, differences = evaluate.reward_model_figures(model, run, train_set,"),
    ("{right / seen_pairs:.3f}", "{correct / n_pairs:.3f}"),
    ('had mean {mean:.3f} and', 'had mean {std:.3f} and'),
    ('{tokens_per_epoch // order.steps_per_epoch:,} tokens each"',
     '{tokens_per_epoch // len(train_set):,} tokens each"'),
    ("(sum(len(record[k]) for record in sets[0]) for k in (0, 1))",
     "(sum(len(record[k]) for record in sets[0]) for k in (1, 0))"),
    ('"too long" if long else', '"too long" if not long else'),
    ("{o.num_scale_samples} samples of", "{len(set(map(tuple, scale_prompts)))} samples of"),
]
PPO_FIGURES = [
    ('"episode": done * o.batch_size', '"episode": step * o.batch_size'),
    ('"episode": done * o.batch_size', '"episode": done * len(batch.scores)'),
    ('"eps": o.batch_size / seconds', '"eps": len(batch.scores) / seconds'),
    ('"tokens_per_second": o.batch_size * length / seconds',
     '"tokens_per_second": len(batch.scores) * length / seconds'),
    ('"tokens_per_second": o.batch_size * length / seconds',
     '"tokens_per_second": o.batch_size * length / rollout_seconds'),
    ("runtime.rate_factor(o.lr_schedule, step, steps)", "runtime.rate_factor(o.lr_schedule, step + 1, steps)"),
    ("runtime.rate_factor(o.lr_schedule, step, steps)", "runtime.rate_factor(o.lr_schedule, step - first, steps)"),
    ("{run.progress(done, steps, left)}  {evaluate", "{run.progress(step, steps, left)}  {evaluate"),
    (" + against_sft.time_left(done, steps)\n", "\n"),
    ('pace.add("judged", judged_seconds)', 'pace.add("judged", seconds)'),
    ("figures = evaluate.rollout_figures(batch, kl_coef, run)",
     "figures = evaluate.rollout_figures(batch, o.kl_coef, run)"),
    ("steps = -(-o.total_episodes // o.batch_size)", "steps = o.total_episodes // o.batch_size"),
    ('kl_coef = adaptive_kl_coef(kl_coef, record["objective/kl"],',
     'kl_coef = adaptive_kl_coef(o.kl_coef, record["objective/kl"],'),
    ('                    kl_coef = float(kept["kl_coef"])', "                    pass"),
    ("o.adaptive_kl_target, o.batch_size)", "o.adaptive_kl_target, len(batch.scores))"),
    ("rows.sort().values.split(o.micro_batch_size)", "rows.split(o.micro_batch_size)"),
    ("evaluate.DivergenceGuard(o, ref_name=ref_name)", "evaluate.DivergenceGuard(o)"),
    ("done % o.eval_interval == 0 or done == steps, run", "done % o.eval_interval == 0, run"),
    ('head = f"{len(encoded[0]):,} prompts for training, {len(encoded[1]):,} held out',
     'head = f"{len(encoded[1]):,} prompts for training, {len(encoded[0]):,} held out'),
    ("against_sft.closing_report(policy, max(first, steps))", "against_sft.closing_report(ref, max(first, steps))"),
    ('record["eval"] = against_sft.evaluation(policy, done)', 'record["eval"] = against_sft.evaluation(ref, done)'),
    ("rollout_seconds = time.perf_counter() - began\n\n", "rollout_seconds = time.perf_counter()\n\n"),
]
EVALUATE_FIGURES = [
    ("share * sum(map(len, texts)) / pace.tokens", "share * sum(map(len, texts))"),
    ("share * pace.steps(sampled, o.response_length / 4)", "pace.steps(sampled, o.response_length / 4)"),
    ('pace.left("judged", steps - done)', 'pace.left("judged", steps)'),
    ("resting = max(0, o.value_warmup - done)", "resting = o.value_warmup"),
    ('"warm-up", 2 + more)', '"warm-up", 1 + more)'),
    ("more = 2 * policy", "more = policy"),
    ("row.trained, byte_counts[i]))", "row.trained - 1, byte_counts[i]))"),
    ("row.trained, byte_counts[i]))", "len(row.ids), byte_counts[i]))"),
    ("n / math.log(2) / max(b, 1)", "n * math.log(2) / max(b, 1)"),
    ("n / math.log(2) / max(b, 1)", "n / math.log(2) / t"),
    ('for kind in ("all", kinds[i]):', 'for kind in {"all", kinds[0]}:'),
    ("nats.update(zip(batch, losses.sum(1).tolist()))",
     "nats.update(zip(range(at, at + len(batch)), losses.sum(1).tolist()))"),
    ("torch.tensor([0.025, 0.975])).tolist()\n    return float(right.mean())",
     "torch.tensor([0.05, 0.95])).tolist()\n    return float(right.mean())"),
    ("weight = counts[i] * counts[j]", "weight = counts[i] + counts[j]"),
    ("weight = counts[i] * counts[j]", "weight = counts[i]"),
    ("means.append(float((weight * right).sum() / weight.sum()))",
     "means.append(float((weight * right).sum() / len(right)))"),
    ("    right = wins(better, worse)\n", "    right = (better > worse).double()\n"),
    ("* (1 if prefer_longer else -1)", "* (-1 if prefer_longer else 1)"),
    ('"length_only": win_rate(length[k, 0], length[k, 1])',
     '"length_only": float((length[k, 0] > length[k, 1]).double().mean())'),
    ("win_rate(torch.tensor(others), torch.zeros(len(others)))",
     "win_rate(torch.zeros(len(others)), torch.tensor(others))"),
    ("win_rate(torch.tensor(others), torch.zeros(len(others)))", "sum(o > 0 for o in others) / len(others)"),
    ("        if None not in others:\n", "        if any(others := [o for o in others if o is not None]):\n"),
    ("if a < margin <= b)", "if a <= margin < b)"),
    ("            if margin > 1:\n", "            if margin >= 1:\n"),
    ("if margin is not None and margin > 0:", "if margin is not None and (margin := abs(margin)) > 0:"),
    ("half = fit_temperature(differences[::2])", "half = fit_temperature(differences[1::2])"),
    ("half = fit_temperature(differences[::2])", "half = fit_temperature(differences)"),
    ("d, sign = differences[1::2], flip[1::2]", "d, sign = differences[::2], flip[::2]"),
    ("d, sign = differences[1::2], flip[1::2]", "d, sign = differences, flip"),
    ("sigmoid(sign * d / temperature), sign > 0)", "sigmoid(d / temperature), sign > 0)"),
    ('"temperature": fit_temperature(differences), "ece"', '"temperature": half, "ece"'),
    ('"ece": ece(1.0), "ece_with_temperature": ece(half)', '"ece": ece(half), "ece_with_temperature": ece(1.0)'),
    ("% 4 < 2, 1.0, -1.0)", "% 2 < 1, 1.0, -1.0)"),
    ("return {name: figures(keep) for name, keep in groups.items()}, (better - worse).double()",
     "return {name: figures(keep) for name, keep in groups.items()}, (worse - better).double()"),
    ('"right" if scores[0] > scores[1] else', '"right" if scores[0] >= scores[1] else'),
    ('    if a["pairs"] < FEW:', '    if a["pairs"] <= FEW:'),
    ('if pairs >= FEW else "(too few', 'if pairs > FEW else "(too few'),
    ('    if a["low"] <= 0.5:\n', '    if a["accuracy"] <= 0.5:\n'),
    ('    if a["low"] <= a["length_only"]:', '    if a["low"] < a["length_only"]:'),
    ('    if a["accuracy"] < 0.65:', '    if a["accuracy"] <= 0.65:'),
    ("{calibrated['ece_with_temperature']:.3f} at temperature", "{calibrated['ece']:.3f} at temperature"),
    ("rollout = generate(policy, prompts[at:at + batch_size], o.response_length, tokenizer.eos, o.temperature,",
     "rollout = generate(policy, prompts[at:at + batch_size], o.response_length, tokenizer.eos, 1.0,"),
    ("m.logprobs(part.tokens, part.decisions, o.temperature,", "m.logprobs(part.tokens, part.decisions, 1.0,"),
    ("for m in (policy, ref)]", "for m in (ref, policy)]"),
    ("began = time.perf_counter()\n        rows", "began = 0.0\n        rows"),
    ("self.work(len(prompts)))", "self.work(1))"),
    ("self.pace.steps(prompts, math.ceil(prompts / BATCH))", "self.pace.steps(prompts, 1 + math.ceil(prompts / BATCH))"),
    ("self.o.eval_interval) + BEST_OF - 1", "self.o.eval_interval) + BEST_OF"),
    ("looks * self.work(self.few) + self.work(len(self.prompts))", "looks * self.work(self.few)"),
    ('f"held-out {draw}"))', '"held-out"))'),
    ('"k3": k3(logprobs, ref_logprobs).sum(1)', '"k3": k3(ref_logprobs, logprobs).sum(1)'),
    ('"ref_logprob": ref_logprobs.sum(1)', '"ref_logprob": logprobs.sum(1)'),
    ('"length": rollout.response_mask.sum(1)', '"length": rollout.lengths'),
    ('"ids": response[:-1] if row["finished"] else response, **row}', '"ids": response, **row}'),
    ('tokens = len(rows), max(1, sum(r["length"] for r in rows))',
     'tokens = len(rows), max(1, sum(len(r["ids"]) for r in rows))'),
    ('sum(r["ref_logprob"] for r in rows) / tokens', 'sum(r["ref_logprob"] / r["length"] for r in rows) / n'),
    ('"kl_k3": mean_interval(column(rows, "k3"))', '"kl_k3": mean_interval(column(rows, "k1"))'),
    ('"win_rate": preference(rows, base, "score")', '"win_rate": preference(base, rows, "score")'),
    ('"judge_win_rate": preference(rows, base, "judge")', '"judge_win_rate": preference(rows, base, "score")'),
    ('"judge_score": mean_interval(column(rows, "judge"))', '"judge_score": mean_interval(column(base, "judge"))'),
    ("self.few = min(max(1, o.num_eval_prompts // 4), len(self.prompts))", "self.few = max(1, len(self.prompts) // 4)"),
    ("rows, base = self.answers(policy, self.prompts[:self.few]), self.sft_rows[:self.few]",
     "rows, base = self.answers(policy, self.prompts[:self.few]), self.sft_rows[-self.few:]"),
    ("({before['score']:+.2f} -> {row['score']:+.2f})", "({row['score']:+.2f} -> {before['score']:+.2f})"),
    ('final = {"before": self.sft, "after": summary(rows, self.sft_rows)}',
     'final = {"after": summary(rows, self.sft_rows), "before": self.sft}'),
    ('final = {"before": self.sft, "after": summary(rows, self.sft_rows)}',
     'final = {"before": self.sft, "after": summary(self.sft_rows, rows)}'),
    ("for draw in range(1, BEST_OF))]", "for draw in range(BEST_OF - 1))]"),
    ("for draw in range(1, BEST_OF))]", "for draw in range(1, BEST_OF - 1))]"),
    ("self.answers(self.ref, self.prompts[:self.few], draw)", "self.answers(policy, self.prompts[:self.few], draw)"),
    ('"sft_completion": before["completion"], "sft_score": before["score"]})',
     '"sft_completion": row["completion"], "sft_score": before["score"]})'),
    ('a_row = {name: float(x / sums["rows"])', "a_row = {name: float(x / len(batch.scores))"),
    ('"score": batch.scores,\n', '"score": batch.final_rewards,\n'),
    ('"rows": torch.ones_like(batch.scores), "kl": k1(batch.logprobs, batch.ref_logprobs)',
     '"rows": torch.ones_like(batch.scores), "kl": k1(batch.ref_logprobs, batch.logprobs)'),
    ("explained_variance(batch.values, batch.returns,", "explained_variance(batch.returns, batch.values,"),
    ('{record[\'objective/kl\']:.2f} (k3 "', '{record[\'objective/kl_k3\']:.2f} (k3 "'),
    ("{record['policy/clipfrac_avg']:.3f}", "{record['val/clipfrac_avg']:.3f}"),
    ("{record['policy/entropy_avg']:.2f}  clip", "{record['objective/entropy']:.2f}  clip"),
    ("d[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]", "d[drawn].mean(1).quantile(torch.tensor([0.05, 0.95]"),
    ("for draw in range(len(draws), n)]", "for draw in range(n - len(draws))]"),
    ("math.exp(-f['ref_logprob_per_token'])", "math.exp(f['ref_logprob_per_token'])"),
    ("paired_difference(found[one], found[other], name)", "paired_difference(found[other], found[one], name)"),
    ("paired_difference(found[one], found[other], name)", "paired_difference(found[one], found[other])"),
    ('("temperature", 1.0), ("response_length", 48)', '("response_length", 48)'),
    ("columns = {a.baseline: summary(base, base), **", "columns = {**"),
    ("len(ordered) * k // 3:len(ordered) * (k + 1) // 3", "len(ordered) // 3 * k:len(ordered) // 3 * (k + 1)"),
]
INTERVALS = [
    ("def wilson_interval(successes, n, z=1.96):", "def wilson_interval(successes, n, z=1.645):"),
    ("def mean_interval(x, z=1.96):", "def mean_interval(x, z=2.576):"),
    ("z * float(x.std()) / math.sqrt(len(x))", "z * float(x.std(correction=0)) / math.sqrt(len(x))"),
    ("return float(gap.abs().sum() / len(probability))", "return float(gap.abs().sum() / bins)"),
    ("return float(gap.abs().sum() / len(probability))", "return float(gap.sum().abs() / len(probability))"),
]
RATES_AND_TIMES = [
    ("return (passes + tokens / self.tokens) / 2", "return (passes + tokens / self.tokens) / 3"),
    ("return (passes + tokens / self.tokens) / 2", "return tokens / self.tokens"),
    ("append(seconds / steps)", "append(seconds)"),
    ("return share * self.left(like, steps) if like else 0.0", "return self.left(like, steps) if like else 0.0"),
    ("statistics.median(found[1:] or found)", "statistics.median(found)"),
    ("statistics.median(found[1:] or found)", "statistics.fmean(found[1:] or found)"),
    ("deque(maxlen=LATELY)", "deque()"),
    ("steps // interval - (done - 1) // interval", "steps // interval - done // interval"),
    ("// interval + (steps % interval > 0)", "// interval"),
    ("(1 if o.lora_rank else 2) * (1 - model.first", "2 * (1 - model.first"),
    ("* (1 - model.first / len(model.h))", ""),
    ("{100 * done // total:>3}%", "{round(100 * done / total):>3}%"),
    ("{clock(used)}<{clock(left)}", "{clock(left)}<{clock(used)}"),
    ("divmod(int(seconds + 0.5), 60)", "divmod(int(seconds), 60)"),
    ("{hours}:{minutes:02}:{seconds:02}", "{hours}:{minutes}:{seconds:02}"),
    ("return dict(zip(sums, self.total(torch.stack([*sums.values()]))))",
     "return dict(zip(sorted(sums), self.total(torch.stack([*sums.values()]))))"),
    ("return dict(zip(sums, self.total(torch.stack([*sums.values()]))))",
     "return dict(zip(sums, torch.stack([*sums.values()])))"),
    ("        return (step + 1) / warmup", "        return step / warmup"),
    ("step - warmup, max(1, steps - warmup)", "step - warmup, max(1, steps - 1)"),
    ("else max(1, round(warmup_ratio * steps))", "else max(1, math.ceil(warmup_ratio * steps))"),
    ('group["lr"] = group["peak"] * factor', 'group["lr"] = group["lr"] * factor'),
    ("        optimizer.zero_grad(set_to_none=True)\n    return norm", "    return norm"),
    ("    return found[1]\n", "    return min(found[1], o.max_grad_norm or found[1])\n"),
    ("norm = torch.nn.utils.get_total_norm(p.grad for p in", "norm = max(p.grad.norm() for p in"),
    ("used = time.perf_counter() - self.started\n", "used = time.perf_counter()\n"),
]
SENTIMENT = [
    ("mean = round(sum(ratings) / len(ratings), 3)", "mean = round(published, 3)"),
    ("mean = round(sum(ratings) / len(ratings), 3)", "mean = round(sum(ratings) / len(ratings), 2)"),
    ('counts[domain, "ratings"] += len(ratings)', 'counts[domain, "ratings"] += len(set(ratings))'),
    ('counts[domain, "text cleaned"] += text != raw', 'counts[domain, "text cleaned"] += key != raw'),
    ("abs(mean - published) > 0.001", "mean - published > 0.001"),
    ("abs(mean - published) > 0.001", "mean != published"),
    ('            counts[domain, "kept"] += 1', '            counts[domain, "kept"] = len(sentences)'),
    ('counts["movie", "blocks"] = len(people)', 'counts["movie", "blocks"] = len(sentences) // BLOCK'),
    ("sum(len(numbers) > 1 for numbers in people.values())",
     "sum(len(numbers) - 1 for numbers in people.values()) * 2"),
    ("- chosen.ratings[person] + rejected.ratings[person]", "- chosen.ratings[person]"),
    ("- chosen.ratings[person] + rejected.ratings[person]", "+ chosen.ratings[person] - rejected.ratings[person]"),
    ("return total / (len(chosen.ratings) - 1)", "return total / len(chosen.ratings)"),
    ('people_for": sum(x > y for x, y in both)', 'people_for": sum(x >= y for x, y in both)'),
    ('people_against": sum(x < y for x, y in both)', 'people_against": sum(x <= y for x, y in both)'),
    ("if abs(margin) >= gap}", "if abs(margin) > gap}"),
    ("if abs(margin) >= gap}", "if margin >= gap}"),
    ("((margin > 0) + (margin >= 0)) / 2 for", "(margin > 0) for"),
    ("((margin > 0) + (margin >= 0)) / 2 for", "(margin >= 0) for"),
    ("for margin, n in far.items()) / sum(far.values())", "for margin, n in far.items()) / sum(margins.values())"),
    ("for margin, n in far.items()) / sum(far.values())", "for margin, n in far.items()) / len(far)"),
    ("margins = Counter(others_margin(*choice)", "margins = Counter(round(others_margin(*choice))"),
    ("return [name, *numbers, sum(numbers)]", "return [name, *numbers, max(numbers)]"),
    ("[sum(s.domain == domain for s in members) for domain in DOMAINS]",
     "[len({s.group for s in members if s.domain == domain}) for domain in DOMAINS]"),
    ('Counter(record.get("kind", "") for record in records)',
     'Counter(record.get("kind", "") for record in records[::2])'),
    ("all=ceilings[0], half=ceilings[0.5], one=ceilings[1])", "all=ceilings[0], half=ceilings[1], one=ceilings[0.5])"),
    ("film review in {ceilings[0]:.3f} of cases", "film review in {ceilings[0.5]:.3f} of cases"),
    ('"margin": round(chosen.mean - rejected.mean, 3),\n                            "domains"',
     '"margin": round(chosen.mean - rejected.mean),\n                            "domains"'),
    ("if i < j and chosen.mean > rejected.mean and", "if i < j and chosen.mean >= rejected.mean and"),
]
PREPARE = [
    ('divided = share is None and "val" in parts', 'divided = "val" in parts'),  # --val_share has no effect
    ('"val" in parts and len(parts) > 1', '"val" in parts'),  # nothing left for training
    ("if not val and not held.isdisjoint(map(hash, made.keys)):", "if False:"),
    ('own.update(hashes if made.part == "val" else ())', 'own.update(hashes[:0] if made.part == "val" else ())'),
    ("drawn.update(hashes if", "drawn.update(hashes[:1] if"),  # only the key that decides
    ("if hash(line) in seen[stem]:", "if False:"),
    ("return orders.setdefault(pair, chosen) != chosen", "return pair in orders"),
    ("share = max_rows // len(files) if max_rows else None", "share = max_rows or None"),
    ('random.Random(f"order {path.name}").shuffle(order)', "pass"),
    ("if time.time() - path.stat().st_mtime > STALE and", "if"),
    ("                with locked(path):\n", "                if True:\n"),
    ("<= parts:", "& parts:"),  # somebody else's folder goes
    ("error.pos > len(text.text) - 16", "False"),
    ("self.line, self.at = self.here(), 0", "self.at = 0"),
    ("for name in reversed(path.parts):", "for name in path.parts:"),
    ("return int(re.match(\"[0-9]{0,9}\", path.name)[0] or 0), str(path)", "return 0, str(path)"),
    ("new.removeprefix(\"\\ufeff\")", "new"),
    ("if clean(text) != text:", "if False:"),
]
DIALECTS = [
    ("elif fault := fault_of(chosen) or fault_of(rejected):\n            note(row, fault)\n        elif len(short)",
     "elif fault := fault_of(chosen):\n            note(row, fault)\n        elif len(short)"),
    ("elif short[:-1] != long[:-1]:", "elif False:"),
    ('keys, prompts = [f"post', 'keys, prompts = [letters(text), f"post'),  # another key decides
    ('"val") if isinstance(r.get("split"), str) else row.part', '"train") if isinstance(r.get("split"), str) else row.part'),
    ('if s.get("policy") == "ref"]', 'if s.get("policy") != "ref"]'),
    ('return " " + text.strip() if text.strip() else ""', "return text"),
    ("if 4 < rating < 7:", "if 4 < rating < 5:"),
    ("waiting[row.part, rating > 5].append", "waiting[0, rating > 5].append"),
    ("own + other, [], [preference", "own, [], [preference"),
    ("> MOST_PAIRS:", ">= MOST_PAIRS:"),
    ("chosen, rejected = answers if label else answers[::-1]", "chosen, rejected = answers[::-1] if label else answers"),
    ("round(math.log2(ratio), 3)", "round(ratio, 3)"),
    ("answers if strength <= 0 else answers[::-1]", "answers if strength >= 0 else answers[::-1]"),
    ("or pending[0][1] != prompt or", "or"),
    ("re.sub(r'_[0-9]+$', '', name)", "name"),
    ("elif margin is not None and margin <= 0:", "elif margin is not None and margin < 0:"),
    ('found["better"] == found["safer"]', "True"),
    ("while (undone := html.unescape(found)) != found:", "if (undone := html.unescape(found)) != found:"),
    ("if chosen.startswith(rejected) or rejected.startswith(chosen):", "if chosen.startswith(rejected):"),
    ('"an empty turn before the answer" if not all', '"" if not all'),
]
HELD_OUT = [
    ("minirlhf/data.py", 'lambda message: message.get("role") != "assistant", asked)', "lambda message: True, asked)"),
    ("minirlhf/data.py", "return letters(asked.split(ASSISTANT)[0].replace(HUMAN", "return letters(asked.replace(HUMAN"),
    ("minirlhf/data.py", 'text.casefold()) or text.strip()', 'text) or text.strip()'),
    ("minirlhf/data.py", "    if os.path.lexists(paths[1]):\n        idle", "    if True:\n        idle"),
    ("minirlhf/data.py", "return load(train) if os.path.lexists(val) else divide(load, train, o.val_share)[0]",
     "return load(train)"),
    ("minirlhf/data.py", '* ("val_share" in getattr(o, "given", ()))', ""),
    ("minirlhf/evaluate.py", "_, held_out = divide(load_prompts, whole, share)",
     "_, held_out = divide(load_prompts, whole, 0.05)"),
    ("train_ppo.py", '"seed", "val_share", "reward"', '"seed", "reward"'),
    ("train_rm.py", 'reward_model=path, val_share=o.val_share)', 'reward_model=path)'),
    ("train_sft.py", "*about_data, *about_parts,", "*about_data,"),
]
SAMPLE = [
    ("for _, text, finished, (score,) in itertools.islice(stream, a.n) if finished]",
     "for _, text, finished, (score,) in itertools.islice(stream, a.n)]"),  # cut answers, too
    ("key=lambda answer: -answer[0])", "key=lambda answer: answer[0])"),  # worst first
    ("ranked.setdefault(text, (score, path))", "ranked[text] = score, path"),  # the lowest score of equal texts
    ("if len(ranked) > a.rank:", "if len(ranked) > 1:"),
    ("if len(ranked) > a.rank:", "if ranked:"),
    ('counts["pairs"] += sum(x > y', 'counts["pairs"] += sum(x >= y'),
    ('(("best", marks[:1]), ("all", marks))', '(("best", marks[-1:]), ("all", marks))'),
    ('**({"checkpoints": [*paths]} if several else {})}', '}'),
    ("    if not isinstance(prompt, Talk):\n", "    if True:\n"),
    ("if a.n * len(policies) < 2:", "if a.n < 1:"),
    ("if a.temperature == 0 and a.n > 1:", "if False:"),
    ("    if len(judges) != 1:\n        fail(f\"{option}", "    if not judges:\n        fail(f\"{option}"),
    ("                checkpoint.compatible(policy[1:3], policy.path, (judge.model, judge.tokenizer), path)",
     "                pass"),
    ("scoring = rewards.files(a.reward_model) if a.reward_model else []", "scoring = []"),
    ("encode_prompts(policy.tokenizer, prompts, room,", "encode_prompts(policy.tokenizer, prompts, room - 1,"),
    ("in zip(prompts, encoded) for _ in range(a.n)]", "in [*zip(prompts, encoded)] * a.n]"),
    ('completion, "finished": finished}', 'completion, "finished": not finished}'),
    ('policy.tokenizer.eos, a.temperature,\n', 'policy.tokenizer.eos, 1.0,\n'),
    ("kept = kept[2:]", "kept = kept[1:]"),  # an answer without its turn
    ("talk = [*kept, Message", "talk = [*talk, Message"),  # the turn is forgotten
    ("answer if tokenizer.form else answer.removeprefix", "answer if False else answer.removeprefix"),
    ("runtime.generator(a.seed, turn, 0", "runtime.generator(a.seed, 0, 0"),
]
CHECK = [
    ("gap = float((a - b).float().pow(2).mean().sqrt() / a", "gap = float((a - b).float().mean().abs() / a"),
    ("/ a.float().std(correction=0).clamp_min(1e-12))", "/ a.float().abs().mean().clamp_min(1e-12))"),
    ("self(claim, gap <= self.limit", "self(claim, gap <= 100 * self.limit"),
    ("gap = float((at_once - parts).norm() / at_once.norm()", "gap = float((at_once - parts).norm() / len(at_once)"),
    ("self.failed + (failing > 0)", "(failing > 0)"),
    ("len(row.ids) * (i + 1) // len(rows)", "len(row.ids) * i // len(rows)"),
    ("self.limit = 1e-4 if run.dtype == torch.float32 else 0.03", "self.limit = 1e-4"),
    ("torch.equal(own[name].cpu(), loaded[name].cpu())]", "torch.allclose(own[name].cpu(), loaded[name].cpu())]"),
    ("drift = abs(float(k1(batch.logprobs, batch.ref_logprobs).sum(1).mean() - kl))",
     "drift = float(k1(batch.logprobs, batch.ref_logprobs).sum(1).mean() - kl)"),
]
BENCHMARK = [
    ("total = statistics.median(totals)", "total = statistics.fmean(totals)"),
    ("map(statistics.median, zip(*seconds))", "map(min, zip(*seconds))"),
    ('"min_total_s": min(totals)', '"min_total_s": totals[0]'),
    ('"samples_s": w.batch / total, "tok_s": new / total',
     '"samples_s": w.batch / total, "tok_s": new / phases["rollout"]'),
    ('tokens, phases = batch * LENGTH * (1 if o.what == "sft" else 2)', "tokens, phases = batch * LENGTH"),
    ("step, cost = statistics.median(seconds)", "step, cost = min(seconds)"),
    ("floor = {name: max(flops / peak, moved / bandwidth) / 1e9",
     "floor = {name: min(flops / peak, moved / bandwidth) / 1e9"),
    ('"floor_ratio": {name: phases[name] / floor[name]', '"floor_ratio": {name: floor[name] / phases[name]'),
    ('"mfu": {name: cost[name][0] / phases[name] / peak / 1e9',
     '"mfu": {name: cost[name][0] / floor[name] / peak / 1e9'),
    ('(result["epochs"] if phase == "update" else 1)', "1"),
    ('result["length"] * (2 if what == "reward" else 1)', 'result["length"]'),
    ('floor["total"] = total, sum(floor.values())', 'floor["total"] = total, max(floor.values())'),
]
ADAPTERS = [  # with their files: what learns, what is shared, what lies below, files of adapters
    ("minirlhf/adapters.py", "alpha / rank\n", "alpha\n"),
    ("minirlhf/adapters.py", "bound = 1 / math.sqrt(linear.in_features)", "bound = 1 / linear.in_features"),
    ("minirlhf/adapters.py", "uniform_(-bound, bound, generator=generator)", "uniform_(0, bound, generator=generator)"),
    ("minirlhf/adapters.py", "linear.weight.new_zeros(linear.out_features, rank)",
     "linear.weight.new_ones(linear.out_features, rank)"),
    ("minirlhf/adapters.py", "torch.addmm(self.linear.weight, self.b, self.a, alpha=self.scale)", "self.linear.weight"),
    ("minirlhf/adapters.py", "self.b * self.scale)", "self.b)"),
    ("minirlhf/adapters.py", "return self.linear.bias", "return None"),
    ("minirlhf/adapters.py", "if o.lora_rank and o.freeze_layers:", "if False:"),
    ("minirlhf/adapters.py", 'and o.init_from == "scratch"', "and False"),
    ("minirlhf/adapters.py", 'not o.lora_rank, "lora_alpha", "lora_layers")', 'not o.lora_rank, "lora_alpha")'),
    ("minirlhf/adapters.py", "if o.freeze_layers >= layers:", "if o.freeze_layers > layers:"),  # only the last norm learns
    ("minirlhf/adapters.py", "layers - (o.lora_layers or layers))", "layers - max(1, o.lora_layers))"),
    ("minirlhf/adapters.py", "for block in other.h[first:]:", "for block in other.h:"),  # below is not what it was
    ("minirlhf/adapters.py", '["score_head"] if o.lora_rank else ["score_head", "ln_f", "lm_head"]', '["score_head"]'),
    ("minirlhf/adapters.py", '["score_head"] if o.lora_rank else ["score_head", "ln_f", "lm_head"]',
     '["score_head", "ln_f", "lm_head"]'),  # under adapters too
    ("minirlhf/adapters.py", '["score_head", "ln_f", "lm_head"]', '["score_head", "ln_f"]'),
    ("minirlhf/adapters.py", "other.first = model.first = first", "other.first = first"),  # the reference runs in full
    ("minirlhf/adapters.py", '[*model.base["adapters"], own]', "[own]"),  # forgets the earlier ones
    ("minirlhf/adapters.py", "return other.train(model.training)", "return other"),
    ("minirlhf/adapters.py", "outline(replace(model.config, dropout=dropout), head)", "outline(model.config, head)"),
    ("minirlhf/adapters.py", "(state[name].clone() if name in state else", "(state[name] if name in state else"),  # gain
    ("minirlhf/adapters.py", "assign=True)\n    return other.requires_grad_(False)", "assign=True)\n    return other"),
    ("minirlhf/adapters.py", "    state = model.state_dict()\n",  # a trunk of its own
     "    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}\n"),
    ("minirlhf/adapters.py", "for part in (block.attn, block.mlp) for name, layer",
     "for part in (block.attn,) for name, layer"),
    ("minirlhf/adapters.py", "nn.Parameter(p.detach().clone())", "nn.Parameter(p.detach())"),  # writes to the reference
    ("minirlhf/adapters.py", "return not all(p.requires_grad", "return not any(p.requires_grad"),
    ("minirlhf/adapters.py", "model.named_parameters() if p.requires_grad} | {name for name, _ in\n", "model."
     "named_parameters() if p.requires_grad} & {name for name, _ in\n"),
    ("minirlhf/adapters.py", "found = model.state_dict() | (state or {})", "found = model.state_dict()"),
    ("minirlhf/adapters.py", 'found[f"{name}.weight"], b, a, alpha=layer.scale)', 'found[f"{name}.weight"], b, a)'),
    ("minirlhf/adapters.py", "layer.linear.weight.addmm_(layer.b, layer.a, alpha=layer.scale)", "pass"),
    ("minirlhf/adapters.py", "    model.first = 0\n    return model.requires_grad_(True)",
     "    return model.requires_grad_(True)"),
    ("minirlhf/adapters.py", "return model.requires_grad_(True)", "return model"),
    ("minirlhf/adapters.py", '("value_below", value)', '("value_below", policy)'),
    ("minirlhf/adapters.py", "column[part, :tokens.shape[1]]", "column[part - 1, :tokens.shape[1]]"),
    ("minirlhf/model.py", "return self.hidden(tokens, last=self.first)", "return self.hidden(tokens, last=self.first - 1)"),
    ("minirlhf/model.py", "return self.ln_f(x) if last is None else x", "return self.ln_f(x)"),
    ("minirlhf/model.py", "for i in range(self.first if from_below else 0,", "for i in range(0,"),
    ("minirlhf/model.py", "from_below = below is not None and self.first", "from_below = below is not None"),
    ("minirlhf/model.py", "return self.scalar(self.states(tokens, last, below))", "return self.scalar(self.states(tokens, "
     "last))"),
    ("minirlhf/rewards.py", 'getattr(part, "value_below", None)', 'getattr(part, "below", None)'),
    ("minirlhf/rewards.py", 'getattr(part, "value_below", None)', "None"),  # lower blocks once more
    ("train_ppo.py", "ref.logprobs(part.tokens, part.decisions, o.temperature, part.below)",
     "ref.logprobs(part.tokens, part.decisions, o.temperature)"),
    ("train_ppo.py", "                    values = value.values(part.tokens, part.decisions, part.value_below)",
     "                    values = value.values(part.tokens, part.decisions)"),
    ("train_ppo.py", '[{"params": runtime.learning(model)', '[{"params": [*model.parameters()]'),
    ("train_sft.py", "        model.train()\n        seen", "        seen"),  # no dropout before the first evaluation
    ("train_sft.py", 'if adapters.is_partial(model) else {})})', "if False else {})})"),  # another base on resume
    ("train_sft.py", 'spread(kept, o.num_eval_texts) if name == "held-out" else kept', "spread(kept, o.num_eval_texts)"),
    ("train_rm.py", "if len(chosen) >= count:", "if len(chosen) > count:"),
    ("train_rm.py", "tuple(rows[j].ids)} <= chosen", "tuple(rows[j].ids)} & chosen"),  # pairs of which one text is there
    ("train_rm.py", "for rows, pairs, extra in records]\n    return [record for record in found if record[1]]",
     "for rows, pairs, extra in records]\n    return found"),
    ("minirlhf/data.py", "rows[i * len(rows) // count]", "rows[i]"),
    ("minirlhf/data.py", "if 0 < count < len(rows) else rows", "if count < len(rows) else rows"),
    ("minirlhf/runtime.py", "                    if not p.requires_grad:\n                        continue\n", ""),
    ("minirlhf/runtime.py", 'learns = {name: p for name, p in model.named_parameters() if p.requires_grad}',
     'learns = {name: p for name, p in model.named_parameters()}'),
    ("minirlhf/evaluate.py", "adapters.add_states_below(rollout, policy,", "adapters.add_states_below(rollout, ref,"),
    ("minirlhf/adapters.py", " and same_memory(model, policy, policy.first):", ":"),
    ("minirlhf/adapters.py", "if torch.equal(p, theirs[name]):", "if True:"),
    ("minirlhf/adapters.py", "if same_memory(model, other, model.first):", "if True:"),
    ("minirlhf/adapters.py", "return pointers[0] == pointers[1]",
     "return a.wte.weight.data_ptr() == b.wte.weight.data_ptr()"),
    ("minirlhf/adapters.py", "theirs[name].data = p.data", "pass"),
    ("minirlhf/check.py", "adapters.merged(model, on_cpu)", "model.state_dict()"),
    ("minirlhf/checkpoint.py", 'if not payload["training"]:', "if False:"),  # what cannot go on
    ("minirlhf/checkpoint.py", '"format": 3 if "form" in ids else 2 if is_on_base(model) else 1', '"format": FORMAT'),
    ("minirlhf/checkpoint.py", 'any("model" not in entry for', 'all("model" not in entry for'),
    ("minirlhf/checkpoint.py", 'learned or learned_state(model), model.base', 'learned_state(model), model.base'),
    ("minirlhf/checkpoint.py", 'return {"model": adapters.merged(model, learned)}',
     'return {"model": adapters.merged(model)}'),
    ("minirlhf/checkpoint.py", 'training["best"] = best', "pass"),
    ("minirlhf/checkpoint.py", "if best is not None or merged:", "if best is not None:"),  # a merged run cannot go on
    ("minirlhf/checkpoint.py", '"path": named if named in hub.NAMES else place}', '"path": named}'),
    ("minirlhf/checkpoint.py", '!= found:  # files of early', '== 0:  # files of early'),
    ("minirlhf/checkpoint.py", 'pretrained.load(place, None,', 'pretrained.load(located(named), None,'),
    ("minirlhf/checkpoint.py", '== base["files"]:', '!= "":'),  # any model will do
    ("minirlhf/checkpoint.py", "os.path.dirname(path) or", "os.path.dirname(wanted) or"),  # not beside the file
    ("minirlhf/checkpoint.py", "build(payload, file_of(path), device, dropout)", "build(payload, path, device, dropout)"),
    ("minirlhf/checkpoint.py", "ranks != {rank} or", "ranks - {rank} or"),  # none at all, of a rank beyond memory
    ("minirlhf/checkpoint.py", "not 0 < alpha < math.inf", "not 0 < alpha"),
    ("minirlhf/checkpoint.py", "0 <= layers <= model.config.n_layer", "0 <= layers"),
    ("minirlhf/checkpoint.py", 'if ["model" in entry for', 'if False and ["model" in entry for'),
    ("minirlhf/checkpoint.py", "        entries.append(entry)\n", ""),  # a chain forgets what it stands on
]
PRETRAINED = [
    ('values.flag("tie_word_embeddings", False)', 'values.flag("tie_word_embeddings", True)'),
    ('("attn_q.weight", "attn_k.weight")', '("attn_q.weight",)'),
    ("np.concatenate([q & 15, q >> 4], 1)", "np.concatenate([q >> 4, q & 15], 1)"),
    ("weight.data[:block_size]", "weight.data[-block_size:]"),
    ("model.bias.fill_(constant)", "pass"),  # a Llama's scores come back without their constant
    ("if padding == len(rows) - 1 and not rows[-1].any():", "if padding == len(rows) - 1:"),
    ("if padding == len(rows) - 1 and not rows[-1].any():", "if not rows[-1].any():"),
    ('check_room(path, f"a model of {count:,} parameters", 4 * count)', "pass"),
]
EXPORT = [
    (".double(), gain * b + bias", ".double(), b + bias"),
    ('w, constant = gain * state["score_head.weight"]', 'w, constant = state["score_head.weight"]'),
    ("+ constant * w[0] / w.square().sum()", "+ constant * w[0] / w.square().sum().sqrt()"),
    ('if "ln_f.bias" in state and w.any():', 'if "ln_f.bias" in state:'),
    ("if i not in (tokenizer.eos, tokenizer.opening))", "if i != tokenizer.opening)"),  # eos pads
    ("if i not in (tokenizer.eos, tokenizer.opening))", "if i != tokenizer.eos)"),
    ("tensor = tensor.T if pretrained.is_transposed(name, model.config) else tensor", "pass"),
    ('"padding_side": "right" if scalar else "left"', '"padding_side": "right"'),
    ('"tie_word_embeddings": c.tied}', '"tie_word_embeddings": True}'),
    ('"num_key_value_heads": c.n_kv_head', '"num_key_value_heads": c.n_head'),
    ('header, end = {"__metadata__": {"format": "pt"}}, 0', "header, end = {}, 0"),
    ('head += b" " * (-len(head) % 8)', 'head += b""'),
    ('"do_sample": True, "temperature": options.get("temperature") or 1.0, "top_k": 0',
     '"do_sample": True, "temperature": options.get("temperature") or 1.0, "top_k": 50'),
    ("torch.zeros(1, model.config.n_embd)", "torch.ones(1, model.config.n_embd)"),
    ("            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none\n", "            pass\n"),
    ("{*os.listdir(temporary)} - {*FILES}", "set()"),
    ("        if not whole:\n", "        if False:\n"),
    ("    check_out(out, weights_only)\n", ""),
    ('payload | {"training": {}}', "payload"),
    ("rank * sum(layer.in_features + layer.out_features for", "rank * sum(layer.in_features for"),
    ("(tokenizer.pattern, tokenizer.nfc) != (tokenizers.QWEN2, True)", "False"),
]
TOKENIZER = [
    ('"pair": [opening, first, second, eos]', '"pair": [opening, first, second]'),
    ('"ignore_merges": whole', '"ignore_merges": False'),
    ('"normalizer": {"type": "NFC"} if tokenizer.nfc else None', '"normalizer": None'),
    ('[{"type": "Digits", "individual_digits": True}, level]', "[level]"),
    ("[[*range(n)], {EOS: n}, n, n, n + 1]", "[[*range(n)], {EOS: n}, n, n, self.vocab_size]"),
    ("if vocab_size and type(i) is int and i >= vocab_size}", "if False}"),
    ("if -n < 2:", "if -n < 1:"),
    ("(-pair_counts[a, b], names[a], names[b], (a, b)))", "(-pair_counts[a, b], names[b], names[a], (a, b)))"),
    ("special, eos, opening, size, nfc)\n    probe", "special, eos, eos, size, nfc)\n    probe"),
    ("len(self.bytes[i]) for i in self._said(ids))", "len(self.bytes[i]) for i in ids)"),
]
REWARDS = [
    ('getattr(self.run, "stop", 0) or signal', "signal"),
    ("n + 1))  # it may be endless", "n))  # it may be endless"),
    ("self.model.score(part.tokens, part.lengths,", "self.model.score(part.tokens, part.prompt_lengths,"),
    ("    except OverflowError:\n        return math.inf\n", ""),
    ("        torch.set_default_device(s[\"device\"])\n", "        pass\n"),
]
FETCH = [
    ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),  # two at once
    ("if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):", "if False:"),  # a lock that was removed
    ("                path.rmdir()\n", "                pass\n"),
    ("absent |= {path for path in (folder, *folder.parents) if", "absent |= {path for path in (folder, *folder.parents) "
     "if not told and"),  # made anew after another's end
    ("raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)", "pass"),
    ("signal.signal(number, handler or signal.SIG_DFL)", "pass"),
    ("state.st_size, state.st_mtime_ns)", "state.st_size)"),
]
HUB = [
    ("            for file, sha256 in record[\"sha256\"].items():\n", "            for file, sha256 in ():\n"),
    ("(file != OPTIONAL or file in record", "(file or file in record"),
    ("tries = 1 if server.have >= furthest + PIECE else tries + 1", "tries = 1 if server.have >= PIECE else tries + 1"),
    ("tries = 1 if server.have >= furthest + PIECE else tries + 1", "tries += 1"),
    ("if wait > LONGEST_WAIT:", "if False:"),
    ("if other != part or not published.etag or", "if other != part or"),  # goes on as another file
    ("other.stat().st_size > published.size:", "False:"),
    ("{hashlib.sha256(published.etag.encode()).hexdigest()[:16]}", "{published.size}"),
    ("if digest != published.digest else", "if False else"),
    ('"" if looks_right(part, file) else', '"" if True else'),
    ("        part.unlink()\n        raise (Again if begun", "        raise (Again if begun"),
    ("raise (Again if begun else Refused)(problem)", "raise Refused(problem)"),
    ('b"blob %d\\0" % published.size', 'b""'),
    ('record["revision"] = published.commit or record["revision"]', "pass"),
    ("thread.join(CONNECT)", "thread.join()"),
    ("raise (Again if self.answered else Refused)", "raise Again"),
    ("if host(url) in self.own:", "if True:"),  # another host's ETag
    ("at_home and host(following) not in self.own", "False"),
    ('or told.get("ETag", "") * bool(commit)', 'or told.get("ETag", "")'),
    ('told.get("X-Linked-Size") or (', 'False or ('),
    ("if (free := shutil.disk_usage(part.parent).free) < size - begun:", "if (free := 0) > size:"),
    ('begun = begun if answer.code == 206 else 0', "pass"),
    ('!= (\n                    f"bytes {begun}-{size - 1}/{size}"):', '== "":'),
    ('if etag_of(told) not in ("", published.etag):', "if False:"),
    ('!= str(size - begun):\n', '== "":\n'),
    ("                        f.flush()  #", "                        #"),
    ("if self.have > size:", "if False:"),
    ('if answer.headers.get_content_type() == "text/html":', "if False:"),
    ('scheme == "https" or urlsplit(following).scheme == urlsplit(url).scheme:', 'scheme:'),
    ("if answer.code == 429 else None", "if False else None"),
    ("return address.rstrip(\"/\")", "return address"),
]
HUB_IN_CHECKPOINT = [
    ("if path not in hub.NAMES:\n        return path", "if path not in hub.NAMES or os.path.exists(path):\n        return path"),
    ("os.path.exists(cached) and os.path.samefile(path, cached)", "False"),
    ('    if stages == ["rm"]:\n        fail(f"{path}: is a language', '    if False:\n        fail(f"{path}: is a language'),
    ("+ did_you_mean(os.path.basename(path.rstrip(\"/\")), hub.NAMES))", ")"),
    ("if saved and o.init_from not in hub.NAMES and not", "if saved and not"),
]
MUTATIONS = [(file, *pair) for file, pairs in (
    ("minirlhf/fetch.py", FETCH), ("minirlhf/hub.py", HUB), ("minirlhf/checkpoint.py", HUB_IN_CHECKPOINT),
    ("minirlhf/objectives.py", OBJECTIVES), ("minirlhf/generate.py", GENERATE), ("minirlhf/model.py", MODEL),
    ("minirlhf/data.py", DATA), ("train_ppo.py", PPO), ("minirlhf/evaluate.py", EVALUATE),
    ("minirlhf/kernels.py", KERNELS), ("minirlhf/checkpoint.py", CHECKPOINT), ("minirlhf/runtime.py", RUNTIME),
    ("train_sft.py", SFT), ("train_rm.py", RM), ("train_ppo.py", PPO_FIGURES),
    ("minirlhf/evaluate.py", EVALUATE_FIGURES), ("minirlhf/objectives.py", INTERVALS),
    ("minirlhf/runtime.py", RATES_AND_TIMES), ("minirlhf/prepare.py", PREPARE), ("minirlhf/sample.py", SAMPLE),
    ("minirlhf/check.py", CHECK), ("minirlhf/benchmark.py", BENCHMARK), ("minirlhf/config.py", CONFIG),
    ("minirlhf/sizes.py", SIZES), ("minirlhf/pretrained.py", PRETRAINED), ("minirlhf/tokenizer.py", TOKENIZER),
    ("minirlhf/rewards.py", REWARDS), ("minirlhf/export.py", EXPORT), ("minirlhf/sentiment.py", SENTIMENT),
    ("minirlhf/dialects.py", DIALECTS), ("minirlhf/chat.py", CHAT), ("minirlhf/memory.py", MEMORY)) for pair in pairs] + STATE + ADAPTERS + HELD_OUT


def misplaced():
    """Mutations whose text does not stand in their file exactly once."""
    return [(file, old) for file, old, _ in MUTATIONS if (ROOT / file).read_text().count(old) != 1]


def pytest_in(folder, log, arguments):
    """Runs pytest in a folder, in a process that was forked from one that has imported torch already."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    sys.dont_write_bytecode = True
    sys.path = [folder, *(path for path in sys.path if not path.startswith(str(ROOT)))]
    os._exit(pytest.main(["-x", "-q", "--processes", "1", "-p", "no:cacheprovider", "--ignore=tests/test_mutate.py",
                          *arguments]))


def killed_by(file, old=None, new=None, first=None):
    """The first test that notices, or None. Without `old` the code stays as it is. first: the test to try first."""
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder) / "project", Path(folder) / "log"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "data", "out", "__pycache__", ".*cache"))
        path = copy / file
        if old is not None:
            path.write_text(path.read_text().replace(old, new))
        nearest = [f"tests/test_{name}.py" for name in NEAREST[file]]
        for tests in ([[first]] if first and (copy / first.split("::")[0]).exists() else []) + [nearest, []]:
            log.write_text("")
            process = CONTEXT.Process(target=pytest_in, args=(str(copy), str(log), tests))
            process.start()
            process.join(1800)
            status, said = process.exitcode, log.read_text()
            if status is None:
                process.kill()
                return "(no end after half an hour)"
            if status == 1:
                return next(line.split(" - ")[0].split(maxsplit=1)[1] for line in said.splitlines()
                            if line.startswith(("FAILED", "ERROR")))
            if status != 0 and tests != [first]:  # a test that is gone is no answer
                return f"(pytest ended with {status}: {said[-300:]})" if old else sys.exit(said[-3000:])
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="the mutations whose file or line holds TEXT")
    only = parser.parse_args().only
    CONTEXT.set_forkserver_preload(["torch", "pytest"])
    if misplaced():
        sys.exit("\n".join(f"{file} does not hold this once: {old}" for file, old in misplaced()))
    chosen = [m for m in MUTATIONS if only in m[0] or only in m[1]]
    if not only and (test := killed_by(chosen[0][0])) is not None:
        sys.exit(f"{test} fails on the code as it is: mend that first")
    killers, survivors = json.loads(KILLERS.read_text()) if KILLERS.exists() else {}, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, old, new), test in zip(chosen, pool.map(lambda m: killed_by(*m, killers.get(str(m))), chosen)):
            survivors += test is None
            if test and test.startswith("tests/"):
                killers[str((file, old, new))] = test
                KILLERS.write_text(json.dumps(killers))
            change = " => ".join((text.strip().splitlines() or ["nothing"])[0] for text in (old, new))
            print(f"{'SURVIVED' if test is None else 'killed  '} {file}: {change}" + (f"  [{test}]" if test else ""),
                  flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
