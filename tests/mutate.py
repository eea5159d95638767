"""How much the tests notice: `python tests/mutate.py` breaks one line at a time and runs the fast tests.

Each mutation is (file, text that stands there once, what replaces it). A copy of the project is broken, the tests that
are nearest run first, then the whole fast suite; a mutation that no test notices has survived and is printed. Exits 1
if one did. `--only TEXT` takes the mutations whose file or line holds TEXT. A quarter of an hour or two on two cores.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEAREST = {"minirlhf/objectives.py": ["objectives", "train_ppo"], "minirlhf/generate.py": ["generate", "parity"],
           "minirlhf/model.py": ["model", "generate", "parity"], "minirlhf/data.py": ["data"],
           "train_ppo.py": ["train_ppo"], "minirlhf/evaluate.py": ["train_ppo", "train_rm"], "minirlhf/checkpoint.py": ["checkpoint", "faults"],
           "minirlhf/runtime.py": ["runtime", "train_ppo", "faults"]}

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
    ("return (kl - share * sum_kl / n)", "return (kl + share * sum_kl / n)"),
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
    ("return -torch.min(ratio * advantages", "return -torch.max(ratio * advantages"),
    ("return -torch.min(ratio * advantages", "return torch.min(ratio * advantages"),
    ("return -torch.min(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)",
     "return -torch.min(ratio * advantages, ratio.clamp(1 + cliprange, 1 - cliprange) * advantages)"),
    ("return -torch.min(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)",
     "return -ratio * advantages"),
    ("return ratio.clamp(1 - cliprange, 1 + cliprange) * advantages < ratio * advantages",
     "return (ratio - 1).abs() > cliprange"),  # whatever the advantage's sign
    ("return 0.5 * torch.max((values", "return 0.5 * torch.min((values"),
    ("return 0.5 * torch.max((values", "return torch.max((values"),
    ("return (clipped - returns) ** 2 > (values - returns) ** 2",
     "return (clipped - returns) ** 2 < (values - returns) ** 2"),
    ("return 1 - unexplained / variance", "return 1 - variance / unexplained"),
    ("centre, half = p + z2 / (2 * n)", "centre, half = p + z2 / n"),
    ("z * float(x.std()) / math.sqrt(len(x))", "z * float(x.std())"),
]
GENERATE = [
    ("self.k[layer][rows, positions] = k", "self.k[layer][rows, (positions + 1) % self.k.shape[2]] = k"),
    ("self.v[layer][rows, positions] = v", "self.v[layer][rows, positions] = k"),
    ("self.k, self.v = self.k[:, rows], self.v[:, rows]", "self.k = self.k[:, rows]"),
    ("return (t >= self.prompt_lengths[:, None] - 1)", "return (t >= self.prompt_lengths[:, None])"),
    ("& (t < self.lengths[:, None] - 1)", "& (t < self.lengths[:, None])"),
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
    ("finished[rows] |= live & (new == eos)", "finished[rows] |= live & (new != eos)"),
    ("live = live & (new != eos)", "live = live & (new == new)"),  # goes on after eos
    ("rows, at, live = rows[kept], at[kept], live[kept]", "rows, at, live = rows[kept], at[:left], live[kept]"),
    ("kept = (~live).argsort(stable=True)[:left]", "kept = live.int().argsort(stable=True)[:left]"),  # drops live rows
    ("if left <= 0.8 * len(rows) and not decoder:", "if left <= 0.8 * len(rows):"),
    ("cache.filled = cache.k.shape[2]", "cache.filled = cache.k.shape[2] // 2"),
    ("cache.filled = P + n + 1", "cache.filled = P + n"),
    ("T = int(lengths.max())", "T = int(lengths.min())"),
    ("nullcontext() if decoder else packed(model)", "nullcontext()"),
]
MODEL = [
    ("mul_(1 / math.sqrt(C // self.n_head))", "mul_(1 / math.sqrt(C))"),
    (".add_(mask).softmax(-1)", ".add_(mask).softmax(-2)"),
    ("x = (x if counted is None else x.flatten(0, 1).index_select(0, counted)) + y", "x = y"),
    ("y = y if counted is None else y.flatten(0, 1).index_select(0, counted)",
     "y = y if counted is None else y.flatten(0, 1).index_select(0, counted - 1)"),
    ("return x + self.mlp(self.ln_2(x))", "return x + self.mlp(x)"),
    ('approximate="tanh"', 'approximate="none"'),
    ("unseen = slots > positions[:, None, :, None]", "unseen = slots > positions[:, None, :, None] + 1"),
    ("unseen = slots > positions[:, None, :, None]", "unseen = slots >= positions[:, None, :, None]"),
    ("x = self.wte(tokens) + self.wpe(positions)", "x = self.wte(tokens)"),
    ("return self.ln_f(x)", "return x"),
    ("* self.gain + self.bias", "* self.gain"),
    ("* self.gain + self.bias", "+ self.bias"),
    ("* T + lengths - 1  #", "* T + lengths - 2  #"),
    ("0.02 / math.sqrt(2 * self.config.n_layer)", "0.02 / math.sqrt(self.config.n_layer)"),
    ("std = 1 / math.sqrt(self.config.n_embd + 1)", "std = 1 / (self.config.n_embd + 1)"),
    ("return x.float() if x.dtype.itemsize < 4 else x", "return x"),
    ("weight, bias, *((", "weight, None, *(("),
    ('(("gelu", [], "tanh")', '(("gelu", [], "none")'),
    ("dtype == torch.float32 and model.config.n_embd", "model.config.n_embd"),  # double precision too
    ("_reorder_linear_weight(layer.weight.to(dtype))", "_reorder_linear_weight(2 * layer.weight.to(dtype))"),
    ("None if bias is None else bias.to(dtype)", "None"),
    ('layer.__dict__.pop("packed", None)', "pass"),
]
DATA = [
    ("(t >= starts[:, None] - 1)", "(t >= starts[:, None])"),
    ("(t >= starts[:, None] - 1)", "(t >= 0 * starts[:, None])"),  # prompts train too
    ("(t < lengths[:, None] - 1)", "(t < lengths[:, None] - 2)"),  # eos does not train
    ("pad_sequence([torch.tensor(row.ids) for row in rows], True, eos)",
     "pad_sequence([torch.tensor(row.ids) for row in rows], True, eos, 'left')"),
    ("c = c[:block_size - 1]", "c = c[-block_size + 1:]"),
    ("p = trim_left(p, block_size - len(c))", "p = p[:block_size - len(c)]"),
    ("prompt[:1] + prompt[len(prompt) - room + 1:]", "prompt[len(prompt) - room:]"),  # the opening eos is lost
    ("epoch, i = divmod(place, n)", "epoch, i = 0, place % n"),
    ("epoch, i = divmod(step, self.steps_per_epoch)", "epoch, i = 0, step % self.steps_per_epoch"),
]
PPO = [
    ("_, ref_logprobs = decisions(nets.ref", "_, ref_logprobs = decisions(nets.policy"),
    ("scores - o.missing_eos_penalty * ~rollout.finished", "scores - o.missing_eos_penalty * rollout.finished"),
    ("judged.scores.clamp(-o.reward_clip, o.reward_clip)", "judged.scores.clamp(0, o.reward_clip)"),
    ("if o.reward_clip and not o.reward else", "if o.reward_clip else"),
    ("charged = credit_length(k1(", "charged = credit_length(k3("),
    ("rewards = whiten(rewards, mask, keep_mean=True, total=total)", "rewards = whiten(rewards, mask, total=total)"),
    ("gae(rewards, judged.values, mask, o.gamma, o.lam)", "gae(rewards, judged.values, mask, o.lam, o.gamma)"),
    ("return whiten(advantages, mask, total=total), returns", "return advantages, returns"),
    ("return whiten(advantages, mask, total=total), returns",
     "advantages = whiten(advantages, mask, total=total)\n    return advantages, advantages + judged.values"),
    ("count = run.total(rollout.response_mask[minibatch].sum())", "count = rollout.response_mask[minibatch].sum()"),
    ("run.generator(step, \"rollout\"),\n                           nets.decoder)",
     "run.generator(step, \"rollout\"))"),
    ("for x in (judged.old_logprobs, advantages))", "for x in (judged.ref_logprobs, advantages))"),
    ("for x in (judged.values, returns))", "for x in (returns, judged.values))"),
    ("((loss - bonus).sum() / count)", "((loss + bonus).sum() / count)"),
    ("((loss - bonus).sum() / count)", "(loss - bonus).mean()"),
    ("(o.vf_coef * loss.sum() / count)", "(loss.sum() / count)"),
    ("(o.vf_coef * loss.sum() / count)", "(o.vf_coef * loss.mean())"),
    ("if step >= o.value_warmup:", "if step > o.value_warmup:"),
    ("[(part, batch, places(batch.response_mask))", "[(parts[0], batch, places(batch.response_mask))"),
    ("generator=run.generator(step, f\"epoch {epoch}\")", "generator=run.generator(step, \"epoch\")"),
    ("pg_loss, moved = (policy_sums[[0, 4]] / count)", "pg_loss, moved = policy_sums[[0, 4]]"),
    ("pg_loss, moved = (policy_sums[[0, 4]] / count)", "pg_loss, moved = (policy_sums[[0, 2]] / count)"),
    ("                    nets.policy.zero_grad(set_to_none=True)\n", ""),
    ("if moved > min(o.target_kl or BLOWN_UP, BLOWN_UP):", "if moved > (o.target_kl or math.inf):"),
    ("if moved > min(o.target_kl or BLOWN_UP, BLOWN_UP):", "if moved > BLOWN_UP:"),
    ("if not x.isfinite().all():", "if x.isnan().any():"),
    ("learn(nets.value, value_optimizer, float(value_sums[0] / count),", "learn(nets.value, value_optimizer, 0.0,"),
    ("optimizer.step()\n        optimizer.zero_grad(set_to_none=True)", "optimizer.step()"),  # they pile up
    ("@torch.no_grad()\ndef judgement", "def judgement"),
    ("d.exp(), k3(old, new))])", "d.exp(), k3(new, old))])"),
    ("lr = o.learning_rate * (1 - step / steps)", "lr = o.learning_rate"),
    ("on_grid(torch.cat(x), mask) for x in zip(*parts))", "on_grid(torch.cat(x), mask) for x in zip(*parts[::-1]))"),
    ("every, logprobs = decisions(nets.policy, batch.tokens, counted, o.temperature, nets.policy_hidden)",
     "every, logprobs = decisions(nets.policy, batch.tokens, counted, 1.0, nets.policy_hidden)"),
    ("-judged.old_logprobs, judged.scores, paid", "judged.old_logprobs, judged.scores, paid"),
    ("\"objective/non_score_reward\": -priced_kl", "\"objective/non_score_reward\": priced_kl"),
    ("\"objective/rlhf_reward\": rewarded - priced_kl", "\"objective/rlhf_reward\": rewarded + priced_kl"),
    ("H, gap = H / length, gap / length", "H, gap = H / n, gap / n"),
    ("kl_coef = adaptive_kl_coef(kl_coef, mean_kl,", "kl_coef = adaptive_kl_coef(kl_coef, mean_kl / length,"),
    ("high = high + 1 if far or blown else 0", "high = high + 1"),
    ("high = high + 1 if far or blown else 0", "high = high + 1 if far else 0"),
    ("replace(o, num_ppo_epochs=1) if far else o", "o"),
    ("return rollout.take(rollout.lengths.argsort(stable=True))",
     "rollout.lengths = rollout.lengths.sort().values\n    return rollout"),
]
EVALUATE = [
    ("model.logits(states / temperature)", "model.logits(states)"),
    ("counted=counted)  # (counted, C)", "counted=counted - 1)  # (counted, C)"),
    ("gather(1, tokens[:, 1:].flatten()[counted, None])", "gather(1, tokens[:, :-1].flatten()[counted, None])"),
    ("logprobs = logits.log_softmax(-1)", "logprobs = logits.log_softmax(0)"),  # wrong axis
    ("len(set(bigrams)) / max(1, len(bigrams))", "len(bigrams) / max(1, len(set(bigrams)))"),
    ("1 - len(set(texts)) / max(1, len(texts))", "len(set(texts)) / max(1, len(texts))"),
    ("wins = sum((r[\"score\"] > b[\"score\"])", "wins = sum((r[\"score\"] >= b[\"score\"])"),
]
CHECKPOINT = [
    ('return "" if value.isfinite().all() else name', 'return ""'),
    ("elif seal != SEAL + sha.digest():", "elif False:"),
    ("            sha.update(block)\n", "            sha.update(block[:1])\n"),
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
    ("            if name in structural:\n", "            if False:\n"),
]
RUNTIME = [
    ('if row["step"] <= step and "final" not in row:', 'if row["step"] <= step:'),
    ('if row["step"] <= step and "final" not in row:', 'if "final" not in row:'),
    ("all(map(math.isfinite, found))", "all(map(math.isfinite, found[:2]))"),
    ("all(map(math.isfinite, found))", "all(map(math.isfinite, found[1:]))"),
    ("if 0 < o.max_grad_norm < found[1]:", "if o.max_grad_norm < found[1]:"),
    ("if 0 < o.max_grad_norm < found[1]:", "if False:"),
    ("            self.lock.truncate(0)\n", ""),
]
MUTATIONS = [(file, *pair) for file, pairs in (
    ("minirlhf/objectives.py", OBJECTIVES), ("minirlhf/generate.py", GENERATE), ("minirlhf/model.py", MODEL),
    ("minirlhf/data.py", DATA), ("train_ppo.py", PPO), ("minirlhf/evaluate.py", EVALUATE), ("minirlhf/checkpoint.py", CHECKPOINT),
    ("minirlhf/runtime.py", RUNTIME)) for pair in pairs]


def misplaced():
    """Mutations whose text does not stand in their file exactly once."""
    return [(file, old) for file, old, _ in MUTATIONS if (ROOT / file).read_text().count(old) != 1]


def killed_by(file, old=None, new=None):
    """The first test that notices, or None. Without `old` the code stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "data", "out", "__pycache__", ".*cache"))
        path = copy / file
        if old is not None:
            path.write_text(path.read_text().replace(old, new))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
        for tests in ([f"tests/test_{name}.py" for name in NEAREST[file]], []):
            done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                                   "--ignore=tests/test_mutate.py", *tests],
                                  cwd=copy, env=env, capture_output=True, text=True, timeout=1800)
            if done.returncode == 1:
                return next(line.split()[1] for line in done.stdout.splitlines()
                            if line.startswith(("FAILED", "ERROR")))
            if done.returncode != 0:
                sys.exit(f"pytest could not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="the mutations whose file or line holds TEXT")
    only = parser.parse_args().only
    if misplaced():
        sys.exit("\n".join(f"{file} does not hold this once: {old}" for file, old in misplaced()))
    chosen = [m for m in MUTATIONS if only in m[0] or only in m[1]]
    if (test := killed_by(chosen[0][0])) is not None:
        sys.exit(f"{test} fails on the code as it is: mend that first")
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, old, new), test in zip(chosen, pool.map(lambda m: killed_by(*m), chosen)):
            survivors += test is None
            change = " => ".join(text.strip().splitlines()[0] for text in (old, new))
            print(f"{'SURVIVED' if test is None else 'killed  '} {file}: {change}" + (f"  [{test}]" if test else ""),
                  flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
