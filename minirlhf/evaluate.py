"""Figures of answers, of a reward model and of a held-out loss: with intervals, tables, verdicts and warnings."""
import math
from collections import defaultdict

import torch

from minirlhf import runtime
from minirlhf.data import collate
from minirlhf.generate import generate
from minirlhf.model import places
from minirlhf.objectives import (expected_calibration_error, fit_temperature, k1, k3, mean_interval, sft_loss,
                                 wilson_interval)

BINS = (0, 0.5, 1, 2, 4, math.inf)  # of `margin`, for the accuracy by how clear a preference was
def score_all(model, run, rows, eos, batch_size=128, forward=None):
    """Scores of many rows, each different row once, rows of like length together, which saves padding: (N,)."""
    unique = sorted({tuple(row.ids): row for row in rows}.values(), key=lambda row: len(row.ids))
    scores = []
    for at in range(0, len(unique), batch_size):
        tokens, _, lengths = collate(unique[at:at + batch_size], eos, run.device)
        with run.autocast():
            scores.append(model.score(tokens, lengths, forward))
    place = {tuple(row.ids): i for i, row in enumerate(unique)}
    return torch.cat(scores)[[place[tuple(row.ids)] for row in rows]]


def accuracy_with_interval(better, worse, texts, seed=0, replicates=400):
    """Share of pairs with better > worse (ties half), and its 95 % bootstrap interval over texts.

    Pairs share texts and so are not independent: texts are resampled, a pair weighs the product of its texts' counts.
    texts: (i, j) for each pair.   Efron 1979; Owen 2007 for the product weights.
    """
    right = (better > worse).double() + 0.5 * (better == worse)
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
    pairs = [(rows[i], rows[j], extra) for rows, index, extra in records for i, j in index]
    scores = score_all(model, run, [row for a, b, _ in pairs for row in (a, b)], eos).cpu().view(-1, 2)
    model.train()
    better, worse = scores.T
    texts = [(tuple(a.ids), tuple(b.ids)) for a, b, _ in pairs]
    length = torch.tensor([[len(a.ids), len(b.ids)] for a, b, _ in pairs]).double() * (1 if prefer_longer else -1)

    def figures(keep):
        k = torch.tensor(keep)
        accuracy, low, high = accuracy_with_interval(better[k], worse[k], [texts[i] for i in keep])
        by_length = ((length[k, 0] > length[k, 1]).double() + 0.5 * (length[k, 0] == length[k, 1])).mean()
        out = {"pairs": len(keep), "accuracy": accuracy, "low": low, "high": high, "length_only": float(by_length)}
        others = [pairs[i][2].get("others_margin") for i in keep]
        others = [m for m in others if isinstance(m, (int, float))]
        if len(others) == len(keep):
            out["ceiling"] = sum((m > 0) + 0.5 * (m == 0) for m in others) / len(others)
        return out

    kinds, bins = defaultdict(list), defaultdict(list)
    for i, (_, _, extra) in enumerate(pairs):
        kind, margin = str(extra.get("kind", "pairs")), extra.get("margin")
        kind = "kind all" if kind == "all" else kind  # "all" is the name of all pairs
        kinds[kind].append(i)
        if isinstance(margin, (int, float)) and margin > 0:
            low, high = next((a, b) for a, b in zip(BINS, BINS[1:]) if a < margin <= b)
            bins[f"{kind}, margin {low}-{high}" if high < math.inf else f"{kind}, margin > {low}"].append(i)
            if margin > 1:
                bins[f"{kind}, margin > 1"].append(i)
    groups = {"all": list(range(len(pairs))), **(kinds if len(kinds) > 1 else {}), **dict(sorted(bins.items()))}
    return {name: figures(keep) for name, keep in groups.items()}, (better - worse).double()


def calibration(differences):
    """ECE before and after a temperature. T is fitted on even pairs and judged on odd ones; then fitted on all."""
    flip = torch.where(torch.arange(len(differences)) % 4 < 2, 1.0, -1.0)  # half are asked the other way round
    half = fit_temperature(differences[::2])

    def ece(temperature):
        d, sign = differences[1::2], flip[1::2]
        return expected_calibration_error(torch.sigmoid(sign * d / temperature), sign > 0) if len(d) else math.nan

    return {"temperature": fit_temperature(differences), "ece": ece(1.0), "ece_with_temperature": ece(half)}


def verdict(figures, calibrated):
    """One sentence: may a policy be optimised against this model?"""
    a = figures["all"]
    span = f"held-out accuracy {a['accuracy']:.3f} (95% {a['low']:.3f}-{a['high']:.3f})"
    if a["pairs"] < 50:
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
def show_pairs(model, run, tokenizer, records, step, count):
    """Print and keep a few held-out pairs with the scores of both texts."""
    model.eval()
    for rows, index, _ in records[:count]:
        i, j = index[0]
        scores = score_all(model, run, [rows[i], rows[j]], tokenizer.eos).tolist()
        texts = [tokenizer.decode(rows[k].ids) for k in (i, j)]
        run.say(f"    {'right' if scores[0] > scores[1] else 'wrong'}: {scores[0]:+.2f} {texts[0]}  >  "
                f"{scores[1]:+.2f} {texts[1]}")
        run.write("samples.jsonl", {"step": step, "chosen": texts[0], "rejected": texts[1], "scores": scores})
    model.train()


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
            logits = model.logits(model.hidden(tokens[:, :-1], counted=places(mask)))
        losses = torch.zeros(mask.shape, device=run.device).masked_scatter_(mask, sft_loss(logits, tokens[:, 1:][mask]))
        nats.update(zip(batch, losses.sum(1).tolist()))
    model.train()
    sums = defaultdict(lambda: [0.0, 0, 0])
    for i, row in enumerate(rows):
        for kind in ("all", kinds[i]):
            for k, amount in enumerate((nats[i], len(row.ids) - row.prompt_length, byte_counts[i])):
                sums[kind][k] += amount
    return {kind: {"nats_per_token": n / t, "bits_per_byte": n / math.log(2) / max(b, 1)} for kind, (n, t, b) in
            sorted(sums.items()) if kind}


def describe(held_out):
    """"4.9 nats/token, 2.0 bits/byte (amazon 1.8, ...)"."""
    kinds = ", ".join(f"{kind} {f['bits_per_byte']:.3f}" for kind, f in held_out.items() if kind != "all")
    return (f"{held_out['all']['nats_per_token']:.4f} nats/token, {held_out['all']['bits_per_byte']:.3f} bits/byte"
            + (f" ({kinds})" if kinds else ""))


# ---- forward passes on the grid

def decisions(model, tokens, counted, temperature, hidden=None):
    """Log-probabilities (counted, V) of some decisions at the sampling temperature, and those of what was chosen,
    (counted,). counted: their `places` on the grid; the head and most of the last block run on them only.
    """
    states = (hidden or model.hidden)(tokens[:, :-1], counted=counted)  # (counted, C)
    logits = model.logits(states / temperature)  # of the C states, not of the V logits: less to divide and to keep
    logprobs = logits.log_softmax(-1)
    return logprobs, logprobs.gather(1, tokens[:, 1:].flatten()[counted, None]).squeeze(1)


def on_grid(counted, mask):
    """(counted,) -> (B, T-1), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=counted.dtype, device=mask.device).masked_scatter(mask, counted)


# ---- looking at held-out prompts

@torch.no_grad()
def answer(policy, ref, judges, run, tokenizer, prompts, o, draw=0, decoder=None, batch_size=128):
    """The policy's answers to held-out prompts with fixed seeds, another set for each `draw` -> list of dicts."""
    rows = []
    for at in range(0, len(prompts), batch_size):
        with run.autocast():
            rollout = generate(policy, prompts[at:at + batch_size], o.response_length, tokenizer.eos, o.temperature,
                               runtime.generator(o.seed, at, 0, f"held-out {draw}"), decoder)
            mask = rollout.response_mask
            logprobs, ref_logprobs = (on_grid(decisions(m, rollout.tokens, places(mask), o.temperature)[1], mask)
                                      for m in (policy, ref))
        scores = [judge(rollout) for judge in judges]
        columns = {"k1": k1(logprobs, ref_logprobs).sum(1), "k3": k3(logprobs, ref_logprobs).sum(1),
                   "ref_logprob": ref_logprobs.sum(1), "length": mask.sum(1), "finished": rollout.finished,
                   **dict(zip(("score", "judge"), scores))}
        for i, (prompt, response) in enumerate(zip(prompts[at:at + batch_size], rollout.responses())):
            row = {name: column[i].item() for name, column in columns.items()}
            rows.append({"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(response),
                         "ids": [token for token in response if token != tokenizer.eos], **row})
    return rows


def summary(rows, base):
    """Figures of answers against the SFT model's answers to the same prompts."""
    n = len(rows)
    wins = sum((r["score"] > b["score"]) + 0.5 * (r["score"] == b["score"]) for r, b in zip(rows, base))
    bigrams = [pair for r in rows for pair in zip(r["ids"], r["ids"][1:])]
    texts = [r["completion"] for r in rows]
    out = {"prompts": n, "score": mean_interval(torch.tensor([r["score"] for r in rows])),
           "kl": mean_interval(torch.tensor([r["k1"] for r in rows])),
           "kl_k3": mean_interval(torch.tensor([r["k3"] for r in rows])),
           "win_rate": (wins / n, *wilson_interval(wins, n)),
           "eos_rate": sum(r["finished"] for r in rows) / n, "mean_length": sum(r["length"] for r in rows) / n,
           "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
           "repeated": 1 - len(set(texts)) / max(1, len(texts)),
           "ref_logprob_per_token": sum(r["ref_logprob"] for r in rows) / max(1, sum(r["length"] for r in rows))}
    if "judge" in rows[0]:
        judged = sum((r["judge"] > b["judge"]) + 0.5 * (r["judge"] == b["judge"]) for r, b in zip(rows, base))
        out["judge_win_rate"] = (judged / n, *wilson_interval(judged, n))
    return out


FIGURES = (("score", "mean score", "{:.3f} +- {:.3f}"),
           ("win_rate", "preferred to the SFT answer", "{:.1%} ({:.1%}-{:.1%})"),
           ("judge_win_rate", "the same, by the judge", "{:.1%} ({:.1%}-{:.1%})"),
           ("kl", "KL from SFT, nats a response (k1)", "{:.2f} +- {:.2f}"),
           ("kl_k3", "the same by k3", "{:.2f} +- {:.2f}"),
           ("eos_rate", "answers that end", "{:.1%}"), ("mean_length", "mean length, tokens", "{:.1f}"),
           ("distinct_2", "distinct bigrams", "{:.3f}"), ("repeated", "repeated answers", "{:.1%}"),
           ("ref_logprob_per_token", "log-probability a token under SFT", "{:.3f}"))


def report(run, before, after):
    """The closing table: held-out figures before and after."""
    run.say(f"{'held-out prompts, 95% intervals: ' + str(after['prompts']):<38}{'before':>24}{'after':>24}")
    for key, label, form in FIGURES:
        if key in after:
            cells = (form.format(*(v if isinstance(v, (tuple, list)) else [v])) for v in (before[key], after[key]))
            run.say("".join([f"{label:<38}", *(f"{cell:>24}" for cell in cells)]))


def concerns(record, spread, base, o):
    """Yields (what about, a warning) where a step's figures have left those of the SFT model's answers, `base`.

    spread: the variance of the step's scores.
    """
    done, score, kl_coef = (record[k] for k in ("step", "objective/scores", "objective/kl_coef"))
    length, H, eos = (record[k] for k in ("completions/mean_length", "policy/entropy_avg", "completions/eos_rate"))
    usual_length, usual_H = base["mean_length"], -base["ref_logprob_per_token"]
    if spread <= 1e-12 * (1 + score ** 2) and o.batch_size > 1:
        yield "variance", f"all scores of step {done} are {score:.4f}: there is nothing to learn from"
    if eos < 0.5:
        yield "eos", (f"{eos:.0%} of the answers of step {done} ended within {o.response_length} tokens; raise "
                      f"--response_length, or --missing_eos_penalty above {o.missing_eos_penalty:g}")
    if length < 0.5 * usual_length:
        yield "length", (f"answers have shrunk to {length:.1f} tokens from the SFT model's {usual_length:.1f}; raise "
                         f"--kl_length_credit above {o.kl_length_credit:g} or --kl_coef above {kl_coef:g}")
    if length > 2 * usual_length:
        yield "length", (f"answers have grown to {length:.1f} tokens from the SFT model's {usual_length:.1f}; lower "
                         f"--kl_length_credit below {o.kl_length_credit:g} or raise --kl_coef above {kl_coef:g}")
    if H < 0.5 * usual_H:
        yield "entropy", (f"entropy has fallen to {H:.2f} nats a decision from the SFT model's {usual_H:.2f}: answers "
                          f"grow alike; raise --ent_coef above {o.ent_coef:g} or --kl_coef above {kl_coef:g}")


