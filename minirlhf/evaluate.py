"""Figures of answers, of a reward model, and of a held-out loss: with intervals, tables, verdicts and warnings.

`python -m minirlhf.evaluate POLICY [POLICY ...]` compares policies with a baseline on held-out prompts; what
train_ppo.py prints at its end is the same code and gives the same numbers.
"""
import json
import math
import os
import time
from collections import Counter, defaultdict

import torch

from minirlhf import adapters, checkpoint, groups, kernels, mixture, rewards, runtime
from minirlhf.config import (Parser, RunOptions, all_printed, check_spelling, fail, launch, one_line, positive_int,
                             say, temperature_number, unprinted)
from minirlhf.data import collate, divide, encode_prompts, label_of, load_asked, number
from minirlhf.generate import generate
from minirlhf.memory import BATCH, ROWS
from minirlhf.model import flat_indices
from minirlhf.objectives import (best_of_n_kl, expected_calibration_error, explained_variance, fit_temperature, gae, k1,
                                 k3, log_ratio, mean_interval, moments, reliability_sums, sft_loss, wilson_interval,
                                 win_rate, wins)

BINS = (0, 0.5, 1, 2, 4, math.inf)  # of `margin`, for the accuracy by how clear a preference was
FEW = 50  # pairs, fewer of which say nothing of how good a reward model is
SHOWN = 4  # samples printed at each evaluation
TOKEN_LOOKS, TOKEN_ROWS, TOKENS = 8, 4, 256  # in tokens.jsonl: looks of a run, answers of a look, tokens of an answer
BEST_OF = 4  # SFT answers of which the closing report keeps the best
UNSOUND_KL = 1.0  # nats a token (k3) between new and old policy: a sound update moves by a hundredth of it


# ---- stage 1: a held-out loss

@torch.no_grad()
def held_out_loss(model, run, rows, byte_counts, kinds, tokenizer, batch_size):
    """Held-out loss -> {kind: {"nats_per_token", "bits_per_byte"}}, with kind "all" over everything."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    nats = {}
    for at in range(0, len(order), batch_size):
        batch = order[at:at + batch_size]
        tokens, mask, _ = collate([rows[i] for i in batch], tokenizer.eos, run.device)
        with run.autocast():
            logits = model.logits(model.states(tokens[:, :-1], flat_indices(mask)))
        losses = torch.zeros(mask.shape, device=run.device).masked_scatter_(mask, sft_loss(logits, tokens[:, 1:][mask]))
        nats.update(zip(batch, losses.sum(1).tolist()))
    model.train()
    sums = defaultdict(lambda: [0.0, 0, 0])
    for i, row in enumerate(rows):
        for kind in ("all", kinds[i]):
            for k, amount in enumerate((nats[i], row.trained, byte_counts[i])):
                sums[kind][k] += amount
    return {kind: {"nats_per_token": n / t, "bits_per_byte": n / math.log(2) / max(b, 1)} for kind, (n, t, b) in
            sorted(sums.items()) if kind}


def describe(held_out):
    """"4.9 nats/token, 2.0 bits/byte (amazon 1.8, ...)"."""
    kinds = ", ".join(f"{kind} {f['bits_per_byte']:.3f}" for kind, f in held_out.items() if kind != "all")
    return (f"{held_out['all']['nats_per_token']:.4f} nats/token, {held_out['all']['bits_per_byte']:.3f} bits/byte"
            + (f" ({kinds})" if kinds else ""))


# ---- stage 2: a reward model

def score_all(model, run, rows, eos, batch_size=ROWS):
    """Scores of many rows, each different row once, rows of like length together, which saves padding: (N,)."""
    unique = sorted({tuple(row.ids): row for row in rows}.values(), key=lambda row: len(row.ids))
    scores = []
    for at in range(0, len(unique), batch_size):
        tokens, _, lengths = collate(unique[at:at + batch_size], eos, run.device)
        with run.autocast():
            scores.append(model.score(tokens, lengths))
    place = {tuple(row.ids): i for i, row in enumerate(unique)}
    return torch.cat(scores)[[place[tuple(row.ids)] for row in rows]]


def accuracy_with_interval(better, worse, texts, seed=0, replicates=400):
    """Share of pairs with better > worse (ties half), and its 95 % bootstrap interval over texts.

    Pairs share texts and so are not independent: texts are resampled, a pair weighs the product of its texts' counts.
    texts: (i, j) for each pair.   Efron 1979; Owen 2007 for the product weights.
    """
    right = wins(better, worse)
    names = {t: k for k, t in enumerate(sorted({t for pair in texts for t in pair}))}
    i, j = (torch.tensor([names[pair[k]] for pair in texts]) for k in (0, 1))
    g = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(replicates):
        counts = torch.bincount(torch.randint(len(names), (len(names),), generator=g), minlength=len(names)).double()
        weight = counts[i] * counts[j]
        if weight.sum() > 0:
            means.append(float((weight * right).sum() / weight.sum()))
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(right.mean()), low, high


@torch.no_grad()
def reward_model_figures(model, run, records, eos, prefer_longer):
    """Held-out figures of a set of pairs -> (dict of figures, differences r_better - r_worse)."""
    model.eval()
    pairs = pairs_of(records)
    scores = score_all(model, run, [row for a, b, _ in pairs for row in (a, b)], eos).cpu().view(-1, 2)
    model.train()
    better, worse = scores.T
    return accuracy_figures(pairs, better, worse, prefer_longer), (better - worse).double()


def pairs_of(records):
    """[(better row, worse row, columns beside them)] of all records."""
    return [(rows[i], rows[j], extra) for rows, index, extra in records for i, j in index]


def accuracy_figures(pairs, better, worse, prefer_longer):
    """{kind or margin: {"pairs", "accuracy", "low", "high", "length_only"[, "ceiling"]}} of some pairs and the scores
    of their two texts."""
    texts = [(tuple(a.ids), tuple(b.ids)) for a, b, _ in pairs]
    length = torch.tensor([[len(a.ids), len(b.ids)] for a, b, _ in pairs]).double() * (1 if prefer_longer else -1)

    def figures(keep):
        k = torch.tensor(keep)
        accuracy, low, high = accuracy_with_interval(better[k], worse[k], [texts[i] for i in keep])
        out = {"pairs": len(keep), "accuracy": accuracy, "low": low, "high": high,
               "length_only": win_rate(length[k, 0], length[k, 1])}
        others = [number(pairs[i][2].get("others_margin")) for i in keep]
        if None not in others:
            out["ceiling"] = win_rate(torch.tensor(others), torch.zeros(len(others)))
        return out

    kinds, bins = defaultdict(list), defaultdict(list)
    named = [label_of(e["kind"], ("all", "pairs")) if "kind" in e else "pairs" for _, _, e in pairs]
    shown = {kind for kind, _ in Counter(named).most_common(20)}
    for i, (_, _, extra) in enumerate(pairs):
        kind, margin = named[i] if named[i] in shown else "(others)", number(extra.get("margin"))
        kinds[kind].append(i)
        if margin is not None and margin > 0:
            low, high = next((a, b) for a, b in zip(BINS, BINS[1:]) if a < margin <= b)
            bins[f"{kind}, margin {low}-{high}" if high < math.inf else f"{kind}, margin > {low}"].append(i)
            if margin > 1:
                bins[f"{kind}, margin > 1"].append(i)
    groups = {"all": list(range(len(pairs))), **(kinds if len(kinds) > 1 else {}), **dict(sorted(bins.items()))}
    return {name: figures(keep) for name, keep in groups.items()}


def calibration(differences):
    """ECE before and after a temperature. T is fitted on even pairs and judged on odd ones; then fitted on all."""
    def ece(temperature):
        asked = predicted(differences, temperature)
        return expected_calibration_error(*asked) if len(asked[0]) else math.nan

    return {"temperature": fit_temperature(differences), "ece": ece(1.0),
            "ece_with_temperature": ece(fit_temperature(differences[::2]))}


def predicted(differences, temperature):
    """Of the odd pairs, half of them asked the other way round: the probability that the first is better, and whether
    it is."""
    sign = torch.where(torch.arange(len(differences)) % 4 < 2, 1.0, -1.0)[1::2]
    return torch.sigmoid(sign * differences[1::2] / temperature), sign > 0


def reliability(differences):
    """The reliability diagram whose gaps are the two ECEs of `calibration`: each a list, for the tenths of probability
    that have pairs, of (mean probability, share that was better, pairs)."""
    def bins(temperature):
        return [(given / n, happened / n, int(n)) for given, happened, n in
                reliability_sums(*predicted(differences, temperature)).T.tolist() if n]

    return {"as_is": bins(1.0), "with_temperature": bins(fit_temperature(differences[::2]))}


def verdict(figures, calibrated):
    """One sentence: may a policy be optimised against this model?"""
    a = figures["all"]
    span = f"held-out accuracy {a['accuracy']:.3f} (95% {a['low']:.3f}-{a['high']:.3f})"
    if a["pairs"] < FEW:
        return f"Too few held-out pairs ({a['pairs']}) to say whether this model is good enough to optimise against."
    if a["low"] <= 0.5:
        return (f"Not good enough to optimise against: {span} cannot be told from chance; it needs more or clearer "
                "preferences.")
    if a["low"] <= a["length_only"]:
        return (f"Not good enough to optimise against: {span} does not beat preferring one length "
                f"({a['length_only']:.3f}); a policy would learn length.")
    if a["accuracy"] < 0.65:
        return (f"Weak: {span} beats chance, but a policy would find its errors soon; keep the KL small (a high "
                "--kl_coef).")
    return (f"Good enough to optimise against, under a KL penalty: {span}, length alone {a['length_only']:.3f}, "
            f"calibration error {calibrated['ece_with_temperature']:.3f} at temperature "
            f"{calibrated['temperature']:.2f}.")


@torch.no_grad()
def show_pairs(model, run, tokenizer, records, step, count=SHOWN):
    """Print and keep a few held-out pairs with the scores of both texts."""
    model.eval()
    for rows, index, _ in records[:count]:
        i, j = index[0]
        scores = score_all(model, run, [rows[i], rows[j]], tokenizer.eos).tolist()
        texts = [tokenizer.decode(rows[k].ids) for k in (i, j)]
        word = "right" if scores[0] > scores[1] else "tied" if scores[0] == scores[1] else "wrong"
        run.say(f"    {word}: {scores[0]:+.2f} {texts[0]}  >  {scores[1]:+.2f} {texts[1]}")
        run.write("samples.jsonl", {"step": step, "chosen": texts[0], "rejected": texts[1], "scores": scores})
    model.train()


def spelled(low, high, pairs, what=""):
    """"(0.717-0.756)", `what` before the numbers; of few pairs no numbers: texts drawn from so few say too little."""
    return f"({what}{low:.3f}-{high:.3f})" if pairs >= FEW else "(too few for an interval)"


def reward_model_table(figures, calibrated):
    """Lines: what the model is worth on held-out pairs, by kind and margin, and how well it is calibrated."""
    yield from accuracy_table(figures)
    yield (f"calibration: ECE {calibrated['ece']:.3f}; {calibrated['ece_with_temperature']:.3f} after dividing score "
           f"differences by a temperature of {calibrated['temperature']:.2f}")


def accuracy_table(figures):
    """Its lines by kind and margin, of `accuracy_figures`."""
    yield f"{'held out':<28}{'pairs':>7}  {'accuracy (95% interval)':<32}length only   ceiling"
    for name, f in figures.items():
        yield (f"{name:<28}{f['pairs']:>7}  {f['accuracy']:.3f}  {spelled(f['low'], f['high'], f['pairs']):<25}"
               f"{f['length_only']:>11.3f}" + (f"{f['ceiling']:>10.3f}" if "ceiling" in f else ""))


# ---- stage 3: answers against a baseline's answers

@torch.no_grad()
def answer(policy, ref, scorers, prompts, tokenizer, o, run, draw=0, batch_size=BATCH, micro_batch_size=ROWS):
    """The policy's answers to held-out prompts with fixed seeds, other ones for each `draw` -> list of dicts.

    scorers: {column: what scores a Rollout}, as {"score": the reward model, "judge": another}; None where it does not
    apply. o: seed, temperature, response_length. micro_batch_size: rows a forward pass. An answer does not depend on
    how many prompts there are.
    """
    rows = [None] * len(prompts)
    for at in range(0, len(prompts), batch_size):
        with run.autocast():
            rollout = generate(policy, prompts[at:at + batch_size], o.response_length, tokenizer.eos, o.temperature,
                               runtime.generator(o.seed, at, 0, f"held-out {draw}"))
            order = rollout.lengths.argsort(stable=True)  # microbatches of like length
            rollout = rollout.take(order)
            adapters.add_states_below(rollout, policy, getattr(scorers.get("score"), "model", None), run,
                                      micro_batch_size)
            parts = map(rollout.take, torch.arange(len(rollout.lengths), device=run.device).split(micro_batch_size))
            models = [policy] if policy is ref else [policy, ref]
            both = [[m.logprobs(part.tokens, part.decisions, o.temperature, part.below)[0] for m in models]
                    for part in parts]
            grids = [rollout.grid(torch.cat(column)) for column in zip(*both)]
            logprobs, ref_logprobs = grids[0], grids[-1]
        columns = {"k1": k1(logprobs, ref_logprobs).sum(1), "k3": k3(logprobs, ref_logprobs).sum(1),
                   "ref_logprob": ref_logprobs.sum(1), "length": rollout.response_mask.sum(1),
                   "finished": rollout.finished,
                   **{name: scorer(rollout, micro_batch_size) for name, scorer in scorers.items()}}
        for i, (at_prompt, response) in enumerate(zip((at + order).tolist(), rollout.responses())):
            row = {name: column[i].item() for name, column in columns.items()}
            row |= {name: None for name in scorers if math.isnan(row[name])}
            row |= {f"part {name}": score for name, score in (rollout.parts[i] if rollout.parts else {}).items()}
            rows[at_prompt] = {"prompt": tokenizer.decode(prompts[at_prompt]), "completion": tokenizer.decode(response),
                               "ids": response[:-1] if row["finished"] else response, **row}
    return rows


def column(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.double)


def judged(rows, base, name):
    """The rows, and those of `base` to the same prompts, where both have a score of that name."""
    pairs = [(row, other) for row, other in zip(rows, base) if row[name] is not None and other[name] is not None]
    return tuple(map(list, zip(*pairs))) or ([], [])


def preference(rows, base, name):
    """Share of rows preferred to those of `base` by a score, ties half, with its 95 % interval."""
    rows, base = judged(rows, base, name)
    rate = win_rate(column(rows, name), column(base, name))
    return (rate, *wilson_interval(rate * len(rows), len(rows)))


def opinion(rows, base, name, score, win_rate):
    """{score: its mean, win_rate: `preference`} of the answers that have one; what none has is left out."""
    scored = [row for row in rows if row[name] is not None]
    return ({score: mean_interval(column(scored, name))} if scored else {}) | (
        {win_rate: preference(rows, base, name)} if judged(rows, base, name)[0] else {})


def summary(rows, base):
    """Figures of answers against other answers to the same prompts: numbers, or (mean, half-width) or (share, low,
    high) of 95 % intervals; those of scores where the answers have some. "parts": those of each --reward by itself."""
    n, tokens = len(rows), max(1, sum(r["length"] for r in rows))
    bigrams = [pair for r in rows for pair in zip(r["ids"], r["ids"][1:])]
    texts = [r["completion"] for r in rows]
    out = {"prompts": n, "kl": mean_interval(column(rows, "k1")), "kl_k3": mean_interval(column(rows, "k3")),
           "eos_rate": sum(r["finished"] for r in rows) / n, "mean_length": sum(r["length"] for r in rows) / n,
           "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
           "repeated": 1 - len(set(texts)) / max(1, len(texts)),
           "ref_logprob_per_token": sum(r["ref_logprob"] for r in rows) / tokens}
    for name, prefix in (("score", ""), ("judge", "judge_")):
        if name in rows[0]:
            out |= opinion(rows, base, name, f"{prefix}score", f"{prefix}win_rate")
    if parts := [name for name in rows[0] if name.startswith("part ")]:
        out["parts"] = {name[5:]: opinion(rows, base, name, "score", "win_rate") for name in parts}
    return out


FIGURES = (("score", "mean score", "{:.3f} +- {:.3f}"),
           ("win_rate", "preferred to the SFT answer", "{:.1%} ({:.1%}-{:.1%})"),
           ("judge_score", "mean score by the judge", "{:.3f} +- {:.3f}"),
           ("judge_win_rate", "preferred by the judge", "{:.1%} ({:.1%}-{:.1%})"),
           ("kl", "KL from SFT, nats a response (k1)", "{:.2f} +- {:.2f}"),
           ("kl_k3", "the same by k3", "{:.2f} +- {:.2f}"),
           ("eos_rate", "answers that end", "{:.1%}"), ("mean_length", "mean length, tokens", "{:.1f}"),
           ("distinct_2", "distinct bigrams", "{:.3f}"), ("repeated", "repeated answers", "{:.1%}"),
           ("ref_logprob_per_token", "log-probability a token under SFT", "{:.3f}"))


def table(columns, title, ref_name="SFT"):
    """Lines of a table of summaries {name: summary}, one column each, under a title; of several rewards each by itself.
    ref_name: in place of "SFT"."""
    def lines(found, figures):
        for key, label, form in figures:
            if any(key in one for one in found):
                cells = [one.get(key, "") for one in found]
                cells = ["" if v == "" else form.format(*(v if isinstance(v, (tuple, list)) else [v])) for v in cells]
                yield f"{label.replace('SFT', ref_name):<38}" + "".join(f"{cell:>24}" for cell in cells)

    yield f"{title:<38}" + "".join(f"{name:>24}" for name in columns)
    found, parts = [*columns.values()], next(iter(columns.values())).get("parts", {})
    yield from lines(found, FIGURES[:2])
    for name in parts if len(parts) > 1 else ():
        own = ("score", f"  {label_of(name)}"), ("win_rate", "    above the SFT answer's")
        yield from lines([one["parts"][name] for one in found], [(*a, form) for a, (*_, form) in zip(own, FIGURES)])
    yield from lines(found, FIGURES[2:])


def best_of(draws):
    """Several lists of answers to the same prompts -> for each prompt the answer of the highest score."""
    return [max(rows, key=lambda row: row["score"]) for rows in zip(*draws)]


class AgainstSFT:
    """The policy's answers to held-out prompts beside the SFT model's, which are sampled once, at the start.

    Evaluations take the first quarter of the prompts of the closing comparison. Where the reference is no SFT model, it
    stands in its place, and `ref_name` in that of its name.
    """

    def __init__(self, ref, tokenizer, reward, judge, prompts, o, run, ref_name="SFT"):
        self.ref, self.tokenizer, self.o, self.run, self.warned = ref, tokenizer, o, run, set()
        self.ref_name = ref_name
        self.scorers = {"score": reward} | ({"judge": judge} if judge else {})
        self.prompts = prompts[:o.num_eval_prompts]
        self.few = min(max(1, o.num_eval_prompts // 4), len(self.prompts))
        self.pace = runtime.Pace(BATCH)
        self.sft_rows = self.answers(ref, self.prompts)
        self.sft = summary(self.sft_rows, self.sft_rows)

    def answers(self, policy, prompts, draw=0):
        began = time.perf_counter()
        rows = answer(policy, self.ref, self.scorers, prompts, self.tokenizer, self.o, self.run, draw,
                      micro_batch_size=min(self.o.micro_batch_size, ROWS))
        self.pace.add("answers", time.perf_counter() - began, self.work(len(prompts)))
        return rows

    def work(self, prompts):
        """Of answering so many prompts, in batches of the usual size."""
        return self.pace.steps(prompts, math.ceil(prompts / BATCH))

    def time_left(self, done, steps):
        """Seconds that the evaluations to come and the closing report will take."""
        looks = runtime.looks_left(done, steps, self.o.eval_interval) + BEST_OF - 1
        return self.pace.left("answers", looks * self.work(self.few) + self.work(len(self.prompts)))

    def evaluation(self, policy, step):
        """Prints and keeps a few answers -> their summary."""
        rows, base = self.answers(policy, self.prompts[:self.few]), self.sft_rows[:self.few]
        found = summary(rows, base)
        self.run.say(f"  held out: score {found['score'][0]:+.3f}, kl {found['kl'][0]:.2f}, preferred to the "
                     f"{self.ref_name} answer {found['win_rate'][0]:.1%}, eos {found['eos_rate']:.2f}"
                     + (f"; judge: score {found['judge_score'][0]:+.3f}, preferred {found['judge_win_rate'][0]:.1%}"
                        if "judge_win_rate" in found else ""))
        if len(found.get("parts", {})) > 1:
            self.run.say("    " + "; ".join(f"{name} {one['score'][0]:+.3f}" if one else f"{name} applies to none"
                                            for name, one in found["parts"].items()))
        for before, row in list(zip(base, rows))[:SHOWN]:
            self.run.say(f"    {row['prompt']} |{row['completion']}  ({before['score']:+.2f} -> {row['score']:+.2f})")
            self.run.write("samples.jsonl", {"step": step, **{k: row[k] for k in ("prompt", "completion", "score")}})
        return found

    def closing_report(self, policy, step):
        """Prints and keeps all answers before and after, their figures, and the best of some SFT answers."""
        run, name = self.run, self.ref_name
        rows = self.answers(policy, self.prompts)
        if run.should_stop():
            run.exit_stopped()
        final = {"before": self.sft, "after": summary(rows, self.sft_rows)}
        run.write("metrics.jsonl", {"step": step, "final": final})
        run.say()
        shown = {"reference": self.sft, "after": final["after"]} if self.o.reference else final
        for line in table(shown, f"held-out prompts, 95% intervals: {len(rows)}", name):
            run.say(line)
        for line in self.scorers["score"].kept(final["after"]):
            run.say(line)
        draws = [self.sft_rows[:self.few], *(self.answers(self.ref, self.prompts[:self.few], draw)
                                             for draw in range(1, BEST_OF))]
        best = summary(best_of(draws), self.sft_rows[:self.few])
        run.say(f"for comparison, the best of {BEST_OF} {name} answers to {self.few} of them: mean score "
                f"{best['score'][0]:.3f}, KL <= {best_of_n_kl(BEST_OF):.2f}")
        for before, row in list(zip(self.sft_rows, rows))[:2 * SHOWN]:
            run.say(f"\n  {row['prompt']} ...\n    {name} {before['score']:+.2f} |{before['completion']}\n"
                    f"    {'PPO':<{len(name)}} {row['score']:+.2f} |{row['completion']}")
        for before, row in zip(self.sft_rows, rows):
            run.write("samples.jsonl", {"step": step, "final": True, "prompt": row["prompt"],
                                        "completion": row["completion"], "score": row["score"],
                                        "sft_completion": before["completion"], "sft_score": before["score"]})

    def warnings(self, batch, record):
        """Yields what a step's figures give cause for, each cause once a run."""
        _, variance = moments(batch.scores, torch.ones_like(batch.scores, dtype=torch.bool), self.run.total)
        _, white = moments(batch.advantages, batch.response_mask, self.run.total)
        for cause, text in [*concerns(record, float(variance), self.sft, self.o, float(white), self.ref_name),
                            *self.scorers["score"].warnings(batch, record["step"], self.run)]:
            if cause not in self.warned:
                self.warned.add(cause)
                yield f"warning: {text}"


# ---- stage 3: figures of a step

def ppo_time_left(pace, policy, batch, done, steps, o):
    """Seconds that the steps to come will take. As long as the policy rests, its part of an update is told by the value
    network's: it has the head as well, on the decisions, and their softmax and entropy take as long again."""
    blocks = sum(p.numel() for block in policy.h[policy.first:] for p in block.parameters())
    more = 2 * policy.unembedding.numel() / blocks * float(batch.response_mask.sum() / batch.lengths.sum())
    resting = max(0, o.value_warmup - done)  # steps
    return (pace.left("judged", steps - done) + pace.left("warm-up", resting)
            + pace.left("update", steps - done - resting, "warm-up", 2 + more))


def work_between(pace, model, records, prompts, o):
    """What an evaluation of these records takes, and the samples that set the scale, as numbers of training steps.

    A token is sampled for all rows at once, in about a quarter of the time that comes with every pass.
    """
    texts, share = {tuple(row.ids) for rows, _, _ in records for row in rows}, runtime.forward_share(model, o)
    sampled = sum(map(len, prompts)) + len(prompts) * o.response_length / 2
    return share * sum(map(len, texts)) / pace.tokens, share * pace.steps(sampled, o.response_length / 4)


def save_rollouts(batch, step, tokenizer, run):
    """The answers that a step trains on, of all ranks, into rollouts.jsonl, one a line, KL by k1 in nats a response."""
    kl, tokens = k1(batch.logprobs, batch.ref_logprobs).sum(1).tolist(), batch.response_mask.sum(1).tolist()
    prompts = batch.prompt_texts or [tokenizer.decode(row[:n]) for row, n in zip(batch.tokens.tolist(),
                                                                                batch.prompt_lengths.tolist())]
    rows = [{"step": step, "prompt": prompt, "completion": tokenizer.decode(response),
             "score": score, "reward": reward, "kl": nats, "length": length, "finished": finished, **parts}
            for prompt, response, score, reward, nats, length, finished, parts in zip(
                prompts, batch.responses(), batch.scores.tolist(), batch.final_rewards.tolist(), kl, tokens,
                batch.finished.tolist(), [{"scores": row} for row in batch.parts] if batch.parts else [{}] * len(kl))]
    run.write("rollouts.jsonl", *run.gather(rows))


@torch.no_grad()
def save_tokens(batch, policy, done, steps, tokenizer, o, run):
    """A few answers of a look's batch, from its lowest score to its highest, into tokens.jsonl, one a line: what each
    token's decision got from PPO's paragraphs, and the ratio of the policy after the update to that before it.

    TOKEN_LOOKS of a run's looks at most, spread evenly and the last among them, and of an answer at most TOKENS: with
    about 100 bytes a token less than 1 MB a run.
    """
    looks, look = runtime.looks_left(1, steps, o.eval_interval), -(-done // o.eval_interval)
    if not run.main or TOKEN_LOOKS * look // looks == TOKEN_LOOKS * (look - 1) // looks:
        return
    some = torch.linspace(0, len(batch.scores) - 1, min(TOKEN_ROWS, len(batch.scores))).round().long()
    some = batch.take(batch.scores.argsort(stable=True)[some.to(batch.scores.device)])
    with run.autocast():
        logprobs = some.grid(policy.logprobs(some.tokens, some.decisions, o.temperature, some.below)[0])
    columns = {"logprobs": some.logprobs, "ref_logprobs": some.ref_logprobs, "kl": k1(some.logprobs, some.ref_logprobs),
               "values": some.values, "rewards": some.rewards, "advantages": some.advantages, "returns": some.returns,
               "rewards_to_go": gae(some.rewards, torch.zeros_like(some.rewards), some.response_mask, o.gamma, 1.0)[1],
               "ratios": log_ratio(logprobs, some.logprobs).exp()}
    for i, (response, n) in enumerate(zip(some.responses(), some.prompt_lengths.tolist())):
        prompt = some.prompt_texts[i] if some.prompt_texts else tokenizer.decode(some.tokens[i, :n].tolist())
        run.write("tokens.jsonl", {
            "step": done, "prompt": prompt[-2000:], "score": float(some.scores[i]),
            "reward": float(some.final_rewards[i]), "finished": bool(some.finished[i]), "length": len(response),
            "tokens": [tokenizer.bytes[t].decode("utf-8", "backslashreplace")[:40] for t in response[:TOKENS]],
            **{name: [round(v, 4) for v in x[i, n - 1:n - 1 + len(response[:TOKENS])].tolist()]
               for name, x in columns.items() if x is not None}})


def rollout_figures(batch, kl_coef, run):
    """A scored rollout's figures, over all ranks, by TRL's names: KL and the like in nats a response."""
    sums = run.totals({name: x.float().sum() for name, x in {
        "rows": torch.ones_like(batch.scores), "kl": k1(batch.logprobs, batch.ref_logprobs),
        "k3": k3(batch.logprobs, batch.ref_logprobs), "surprise": -batch.logprobs, "score": batch.scores,
        "final_reward": batch.final_rewards, "kl_penalty": kl_coef * batch.penalised_kl, "length": batch.response_mask,
        "finished": batch.finished, "entropy": batch.entropies,
        "gap": (batch.logprobs - batch.sampler_logprobs).abs()}.items()})
    a_row = {name: float(x / sums["rows"]) for name, x in sums.items()}
    length = a_row["length"]
    return {"objective/kl": a_row["kl"], "objective/kl_k3": a_row["k3"], "objective/entropy": a_row["surprise"],
            "objective/scores": a_row["score"], "objective/non_score_reward": -a_row["kl_penalty"],
            "objective/rlhf_reward": a_row["final_reward"] - a_row["kl_penalty"], "objective/kl_coef": kl_coef,
            "policy/entropy_avg": a_row["entropy"] / length, "val/sampler_gap": a_row["gap"] / length,
            **({} if batch.values is None else {"val/explained_variance": float(explained_variance(
                batch.values, batch.returns, batch.response_mask, run.total))}),
            "completions/mean_length": length, "completions/eos_rate": a_row["finished"], **groups.figures(batch, run)}


def describe_step(record):
    """The log line of a step, with each reward's mean where there are several."""
    parts = {name[17:]: mean for name, mean in record.items() if name.startswith("objective/scores/")}
    apart = ", ".join(f"{name} " + ("none" if math.isnan(mean) else f"{mean:+.3f}") + (
        f" x -{record[multiplier]:.3f}" if (multiplier := f"objective/multiplier/{name}") in record else "")
        for name, mean in parts.items())
    explained = record.get("val/explained_variance")
    return (f"score {record['objective/scores']:+.3f}" + f" ({apart})" * (len(parts) > 1)
            + f"  kl {record['objective/kl']:.2f} (k3 "
            f"{record['objective/kl_k3']:.2f})  entropy {record['policy/entropy_avg']:.2f}  clip "
            f"{record['policy/clipfrac_avg']:.3f}  " + (f"value ev {explained:+.2f}  " if explained is not None else "")
            + f"length {record['completions/mean_length']:.1f}  eos {record['completions/eos_rate']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s")


def concerns(record, variance, sft, o, white=1.0, ref_name="SFT"):
    """Yields (cause, a warning) where a step's figures have left those of the SFT model's answers, `sft`.

    variance: of the step's scores; white: of its advantages, 1 where they are whitened unless they hardly differ.
    """
    done, score, kl_coef = (record[k] for k in ("step", "objective/scores", "objective/kl_coef"))
    length, H, eos = (record[k] for k in ("completions/mean_length", "policy/entropy_avg", "completions/eos_rate"))
    usual_length, usual_H = sft["mean_length"], -sft["ref_logprob_per_token"]
    bonus = [f"the entropy bonus (--ent_coef {o.ent_coef:g})"] * (o.ent_coef > 0)
    compared, momentum = o.advantages != "gae", "what is left of earlier gradients in the optimizer"
    if variance <= 1e-12 * (1 + score ** 2) and o.batch_size > 1:
        moving = ["the KL penalty"] * (kl_coef > 0) + ["the value network's errors"] * (not compared) + bonus
        yield "variance", (f"all scores of step {done} are {score:.4f}: there is nothing to learn from; what moves the "
                           f"policy is {', '.join(moving or [momentum])}")
    elif compared and record["groups/equal_scores"] > 0.5:
        yield "groups", (f"in {record['groups/equal_scores']:.0%} of the groups of step {done} the {o.group_size} "
                         f"answers have the same score: {'only their KL' if kl_coef > 0 else 'nothing'} says which is "
                         f"better; raise --group_size above {o.group_size}, or --reward_clip if scores lie beyond it")
    if white < 0.01 and done > o.value_warmup and not compared:
        yield "advantages", (f"the advantages of step {done} do not differ, so that whitened they are 0 and teach "
                             f"nothing; what moved the policy is {', '.join(bonus + [momentum])}; a "
                             "larger --batch_size gives more to compare")
    if eos < 0.5:
        yield "eos", (f"{eos:.0%} of the answers of step {done} ended within {o.response_length} tokens; raise "
                      f"--response_length, or --missing_eos_penalty above {o.missing_eos_penalty:g}")
    if length < 0.5 * usual_length:
        yield "length", (f"answers have shrunk to {length:.1f} tokens from the {ref_name} model's {usual_length:.1f}; "
                         f"raise --kl_baseline above {o.kl_baseline:g} or --kl_coef above {kl_coef:g}")
    if length > 2 * usual_length:
        yield "length", (f"answers have grown to {length:.1f} tokens from the {ref_name} model's {usual_length:.1f}; "
                         f"lower --kl_baseline below {o.kl_baseline:g} or raise --kl_coef above {kl_coef:g}")
    if H < 0.5 * usual_H:
        yield "entropy", (f"entropy has fallen to {H:.2f} nats a decision from the {ref_name} model's {usual_H:.2f}: "
                          f"answers grow alike; raise --ent_coef above {o.ent_coef:g} or --kl_coef above {kl_coef:g}")


class DivergenceGuard:
    """Ends a run whose policy leaves the SFT model, or itself, too far behind in three batches in a row.

    Too far: a KL from the SFT model above --max_ref_kl, for which the batch has one epoch only, or an update that moves
    the policy by more than UNSOUND_KL.
    """

    def __init__(self, o, in_a_row=0, ref_name="SFT"):
        self.o, self.in_a_row, self.ref_kl, self.ref_name = o, in_a_row, 0.0, ref_name

    def epochs(self, ref_kl):
        """ref_kl: nats a response from the SFT model -> how many epochs this batch gets."""
        self.ref_kl = ref_kl
        return 1 if self.too_far() else self.o.num_ppo_epochs

    def too_far(self):
        return 0 < self.o.max_ref_kl < self.ref_kl

    def after_update(self, record, update_kl, run):
        """Warns, or ends the run with exit status 1 and advice. update_kl: where the epochs ended early, else 0."""
        o = self.o
        if self.too_far():
            fault = (f"the KL from the {self.ref_name} model is {self.ref_kl:.1f} nats a response, --max_ref_kl is "
                     f"{o.max_ref_kl:g}")
            advice = (f"raise --kl_coef above {record['objective/kl_coef']:g} or lower --learning_rate below "
                      f"{o.learning_rate:g}")
        elif update_kl > UNSOUND_KL:
            fault = f"one update moved the policy by {update_kl:.2g} nats a token (k3), more than {UNSOUND_KL:g}"
            advice = (f"lower --learning_rate below {o.learning_rate:g}"
                      + (f" or --num_ppo_epochs below {o.num_ppo_epochs}" if o.num_ppo_epochs > 1 else ""))
        else:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        run.say(f"warning: {fault}: this batch's epochs end early ({self.in_a_row} in a row; the third ends the run)")
        if self.in_a_row == 3:
            run.write("metrics.jsonl", record)
            raise SystemExit(one_line(
                f"error: step {record['step']}: for the third batch in a row {fault}: the policy is leaving the "
                f"language it knows; {advice}. A checkpoint of an earlier policy, if any, is in {o.out_dir}: --resume "
                "goes on from it, with other options if they are named."))


# ---- python -m minirlhf.evaluate

def by_length(rows, base):
    """Win rates in thirds of the length difference to the baseline's answer: [(least, most tokens, share, low, high)].

    If only the longer (or shorter) third wins, length is what wins.
    """
    ordered = sorted(zip(rows, base), key=lambda pair: pair[0]["length"] - pair[1]["length"])
    thirds = [ordered[len(ordered) * k // 3:len(ordered) * (k + 1) // 3] for k in range(3)]
    out = []
    for third in filter(None, thirds):
        a, b = zip(*third)
        out.append((a[0]["length"] - b[0]["length"], a[-1]["length"] - b[-1]["length"], *preference(a, b, "score")))
    return out


def paired_difference(rows, others, name="score", replicates=2000, seed=0):
    """Mean of score differences on the same prompts and its 95 % bootstrap interval over prompts.   Efron 1979."""
    rows, others = judged(rows, others, name)
    d = column(rows, name) - column(others, name)
    drawn = torch.randint(len(d), (replicates, len(d)), generator=torch.Generator().manual_seed(seed))
    low, high = d[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return float(d.mean()), low, high


def verdict_on_policy(figures, thirds, has_judge, reward="reward model"):
    """One sentence: is the policy better than the baseline? figures: `summary`; thirds: `by_length`; reward: what
    scores."""
    rate, low, high = figures["win_rate"]
    if low <= 0.5 <= high:
        return f"not to be told from the baseline: the {reward} prefers {rate:.1%} ({low:.1%}-{high:.1%})"
    if high < 0.5:
        return f"worse than the baseline: the {reward} prefers {rate:.1%} ({low:.1%}-{high:.1%})"
    if len(thirds) == 3 and thirds[1][3] <= 0.5 and (thirds[0][3] > 0.5) != (thirds[2][3] > 0.5):
        longer = thirds[2][3] > 0.5
        return (f"{'longer' if longer else 'shorter'} only: preferred where answers are "
                f"{'longer' if longer else 'shorter'}, not where lengths are alike ({thirds[1][2]:.1%})")
    if not has_judge or "judge_win_rate" not in figures:
        return f"preferred by the {reward} ({rate:.1%}); whether that is real needs a --judge it was not trained on"
    judge_rate, judge_low, judge_high = figures["judge_win_rate"]
    if judge_low > 0.5:
        return f"believable: preferred by the {reward} ({rate:.1%}) and by the judge ({judge_rate:.1%})"
    return (f"over-optimised: the {reward} prefers {rate:.1%}, the judge {judge_rate:.1%} "
            f"({judge_low:.1%}-{judge_high:.1%})")


def parse(argv=None):
    parser = Parser(
        prog="python -m minirlhf.evaluate", description="Policies against a baseline on held-out "
        "prompts, by a reward model and a judge, with 95 % intervals. Temperature, response length, number of prompts, "
        "seed and dtype are those of the first policy's run unless given, so that the figures are those that "
        "train_ppo.py printed.")
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="ckpt.pt of train_ppo.py, "
                        "minirlhf.dpo or train_sft.py, or its folder")
    parser.add_argument("--baseline", default="out/sft", metavar="PATH", help="the SFT model whose answers theirs are "
                        "compared with, and the reference of the KL (default: %(default)s)")
    parser.add_argument("--reward_model", default="out/rm", metavar="PATH", help="reward model, or FILE.py:FUNCTION "
                        "(default: %(default)s)")
    parser.add_argument("--reward", action="append", default=[], metavar="NAME[:WEIGHT]", help="several rewards, as "
                        "train_ppo.py takes them: FILE.py:FUNCTION, a path, or rm, the one of --reward_model; may be "
                        "given again; the score is their weighted sum, and each is shown by itself")
    parser.add_argument("--judge", metavar="PATH", help="a reward model or FILE.py:FUNCTION that no policy was trained "
                        "on")
    parser.add_argument("--prompts", default="data/sentiment/prompts.val.jsonl", metavar="FILE.jsonl",
                        help="(default: %(default)s)")
    parser.add_argument("--num_prompts", type=positive_int, help="the first so many (default: as many as "
                        "the first policy's run of train_ppo.py had, else 512)")
    parser.add_argument("--best_of", default="", metavar="1,4,16", help="rows for the best of n answers of the "
                        "baseline")
    parser.add_argument("--temperature", type=temperature_number)
    parser.add_argument("--response_length", type=positive_int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--long_prompts", choices=("drop", "trim"), default="drop", help="(default: drop)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where the chip has it")
    parser.add_argument("--output", metavar="FILE.json", help="also write all figures there")
    a = parser.parse_args(argv)
    for path in (*a.policies, a.baseline, a.reward_model, *a.reward, a.judge or "", a.prompts, a.output or ""):
        check_spelling("file", path)  # --output holds them
    try:
        a.best_of = sorted({int(n) for n in a.best_of.split(",") if n.strip()})
    except ValueError:
        fail(f"--best_of {a.best_of}: expected numbers, as in 1,4,16")
    if any(not 1 <= n <= 1024 for n in a.best_of):
        fail(f"--best_of {','.join(map(str, a.best_of))}: each n must be from 1 to 1024")
    if a.temperature == 0:
        fail("--temperature 0: answers would not be samples, and their KL would mean nothing")
    return a


def held_out_prompts(path, share):
    """-> prompts, and their file. Of a FILE.val.jsonl that is not there: those of FILE.train.jsonl that stage 3 holds
    out, of which share the first policy's run says."""
    whole = path.removesuffix(".val.jsonl") + ".train.jsonl"
    if os.path.lexists(path) or not path.endswith(".val.jsonl") or not os.path.lexists(whole):
        return load_asked(path), path
    _, held_out = divide(load_asked, whole, share)
    if not held_out:
        fail(f"{whole}: by the run's --val_share {share:g} no prompt is held out; name another file with --prompts")
    say(f"there is no {path}: the {len(held_out):,} prompts of {whole} that the run holds out (--val_share {share:g})")
    return held_out, whole


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    a = parse(argv)
    runtime.check_output(a.output)
    if a.output is None:
        all_printed()
    device = runtime.pick_device(a.device)
    baseline, tokenizer, payload = checkpoint.load(a.baseline, checkpoint.POLICIES, device)
    called = "SFT" if payload["stage"] == "sft" else "baseline"
    kernels.pick_matmul(baseline)
    policies, share = {}, None
    for path in a.policies:
        policy, own_tokenizer, payload = checkpoint.load(path, checkpoint.POLICIES, device)
        checkpoint.compatible((policy, own_tokenizer), path, (baseline, tokenizer), a.baseline)
        policies[path], share = policy, share or payload["options"].get("val_share", RunOptions.val_share)
        for name, usual in (("temperature", 1.0), ("response_length", 48), ("seed", RunOptions.seed),
                            ("dtype", "float32")):
            if getattr(a, name) is None:
                setattr(a, name, payload["options"].get(name, usual))
        if a.num_prompts is None:
            a.num_prompts = (payload["options"] if payload["stage"] == "ppo" else {}).get("num_eval_prompts", 512)
    scorer = runtime.Precision(device, a.dtype)
    scorers = {"score": mixture.load(a, baseline, tokenizer, a.baseline, scorer)}
    if a.judge:
        scorers["judge"] = rewards.load(a.judge, "--judge", baseline, tokenizer, a.baseline, scorer)
    room = baseline.config.block_size - a.response_length
    if room < 2:
        fail(f"--response_length {a.response_length}: leaves no room for a prompt in a context of "
             f"{baseline.config.block_size} tokens")
    texts, a.prompts = held_out_prompts(a.prompts, share)
    prompts, long = encode_prompts(tokenizer, texts, room, a.long_prompts)
    if not prompts:
        fail(f"{a.prompts}: no prompt fits {room} tokens; use --long_prompts trim or a shorter --response_length")
    mixture.give_columns(scorers.values(), prompts, a.prompts)
    reads = [a.prompts, *(file for path in (a.baseline, *a.policies) for file in checkpoint.files_of(path))]
    for files in (*scorers["score"].inputs().values(), rewards.files(a.judge) if a.judge else []):
        reads += files
    with runtime.Output(a.output, ".json", reads) as output:
        if long:
            say(f"{long} of {len(texts)} prompts are longer than {room} tokens: "
                + {"drop": "dropped", "trim": "trimmed at the left"}[a.long_prompts])
        result = compare(policies, baseline, called, scorers, prompts[:a.num_prompts], tokenizer, scorer, a)
        output.write(json.dumps(runtime.finite(result), ensure_ascii=False, indent=1) + "\n")
    if a.output is None:
        all_printed()


def compare(policies, baseline, called, scorers, prompts, tokenizer, run, a):
    """Prints what the command has to say of policies {path: model} -> all of it, for JSON. a: its options.

    called: what the table calls the baseline.
    """
    def answers(policy, draw=0):
        return answer(policy, baseline, scorers, prompts, tokenizer, a, run, draw)

    base = answers(baseline)
    found = {path: answers(policy) for path, policy in policies.items()}
    columns = {a.baseline: summary(base, base), **{path: summary(rows, base) for path, rows in found.items()}}
    for line in table(columns, f"held-out prompts, 95% intervals: {len(prompts)}", called):
        say(line)
    say(f"{'perplexity under the baseline':<38}"
        + "".join(f"{math.exp(-f['ref_logprob_per_token']):>24.1f}" for f in columns.values()))
    result = {"prompts": a.prompts, "num_prompts": len(prompts), "baseline": a.baseline, "temperature": a.temperature,
              "response_length": a.response_length, "seed": a.seed, "reward_model": a.reward_model, "reward": a.reward,
              "judge": a.judge, "policies": columns, "by_length": {}, "differences": [], "best_of": {}, "verdicts": {}}
    if a.best_of:
        say()
        draws = [base]
        for n in a.best_of:
            draws += [answers(baseline, draw) for draw in range(len(draws), n)]
            best = result["best_of"][n] = summary(best_of(draws[:n]), base) | {"kl_bound": best_of_n_kl(n)}
            judge = f", by the judge {best['judge_win_rate'][0]:.1%}" if "judge_win_rate" in best else ""
            say(f"best of {n} answers of the baseline: mean score {best['score'][0]:.3f}, preferred "
                f"{best['win_rate'][0]:.1%}{judge}, KL <= {best['kl_bound']:.2f}")
    for path, rows in found.items():
        thirds = result["by_length"][path] = by_length(rows, base)
        say(f"\n{path}: preferred, by how much longer the answer is than the baseline's: " + "; ".join(
            f"{least:+d} to {most:+d} tokens {rate:.1%} ({low:.1%}-{high:.1%})"
            for least, most, rate, low, high in thirds))
        sentence = result["verdicts"][path] = verdict_on_policy(
            columns[path], thirds, a.judge, "reward" if a.reward else "reward function" if rewards.is_function(
                a.reward_model) else "reward model")
        say(f"verdict on {path}: {sentence}")
    paths = [*found]
    for i, one in enumerate(paths):
        for other in paths[i + 1:]:
            for name in (name for name in scorers if judged(found[one], found[other], name)[0]):
                mean, low, high = paired_difference(found[one], found[other], name)
                result["differences"].append({"of": one, "from": other, "by": name, "mean": mean,
                                              "interval": [low, high]})
                say(f"{one} less {other}, mean difference of the {name} on the same prompts: {mean:+.3f} ({low:+.3f} "
                    f"to {high:+.3f})")
    return result


if __name__ == "__main__":
    launch(main)
