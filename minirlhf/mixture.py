"""Several rewards as one: a weighted sum is maximised, and the means of others are kept below a limit.

    --reward rm:1 --reward my.py:short:0.2            score = rm + 0.2 short
    --reward rm --reward my.py:cost --at_most 0.1     score = rm, E[cost] <= 0.1

A limit has a multiplier, which after each step follows the batch's mean: m <- max(0, m + rate (mean - limit)). What is
learned from is score - m cost, so that the policy tends to ref exp((score - m cost) / kl_coef) / Z with the m at which
the mean is the limit, or m = 0 where it is lower anyway.   Altman 1999; Ray et al. 2019, PPO-Lagrangian; Dai et al.
2023, Safe RLHF, whose division by 1 + m is left out: kl_coef keeps its meaning.

Invariant: each reward is scored, logged and judged apart. Where it does not apply (a function gave None) it counts 0,
and its mean leaves the answer out. A held-out score is the weighted sum alone: multipliers change from step to step.
"""
import math
import os
from typing import NamedTuple

import torch

from minirlhf import hub, rewards
from minirlhf.config import did_you_mean, fail, warn_idle, weighted
from minirlhf.objectives import moments


class Part(NamedTuple):
    """One --reward. source: FILE.py:FUNCTION, or a reward model; limit: what its mean may be at most, in place of a
    weight."""
    name: str
    source: str
    weight: float = 1.0
    limit: float | None = None


# ---- from the command line

def parts_of(o):
    """--reward, --at_most and --reward_model -> Parts. Exits 2 on what names none, or one thing twice."""
    limits = getattr(o, "at_most", ())
    if not o.reward:
        if limits:
            fail(f"--at_most {limits[0]}: is the limit of a --reward, and none is given")
        return [Part("rm", o.reward_model)]
    sources, weights = zip(*map(weighted, o.reward))
    for spec, source, weight in zip(o.reward, sources, weights):
        if weight is not None and not abs(weight) < 1e6:
            fail(f"--reward {spec}: a weight is a number below a million")
        if not (source == "rm" or rewards.is_function(source) or os.path.exists(source) or source in hub.NAMES):
            fail(f"--reward {spec}: expected FILE.py:FUNCTION, rm or a reward model's folder that exists, with :WEIGHT "
                 "behind it or not")
    names = names_of(sources)
    limit_of = limits_of(limits, names, sources, weights)
    parts = [Part(name, o.reward_model if source == "rm" else source, 1.0 if weight is None else weight,
                  limit_of.get(name)) for name, source, weight in zip(names, sources, weights)]
    if all(part.limit is not None for part in parts):
        if "rm" in sources:
            fail(f"--at_most {limits[0]}: every --reward has a limit; name one to be maximised")
        parts.insert(0, Part(o.reward_model if "rm" in names else "rm", o.reward_model))
    return parts


def names_of(sources):
    """What logs and --at_most call each: the function's name, or the reward model's folder's; all of the source where
    two would have one name."""
    short = [source.rpartition(":")[2] if rewards.is_function(source) else os.path.basename(
        source.removesuffix("ckpt.pt").rstrip("/")) or source for source in sources]
    names = [source if short.count(name) > 1 else name for source, name in zip(sources, short)]
    if twice := [name for name in names if names.count(name) > 1]:
        fail(f"--reward {twice[0]}: is given twice; one weight says how much it counts")
    return names


def limits_of(limits, names, sources, weights):
    """--at_most -> {name: limit}. A number alone is for the one --reward, other than rm, that has no weight."""
    found = {}
    for text in limits:
        name, limit = weighted(text)
        if limit is None:
            try:
                name, limit = "", float(text)
            except ValueError:
                fail(f"--at_most {text}: expected NUMBER or NAME:NUMBER, as {names[-1]}:0.1")
        if not abs(limit) < 1e6:
            fail(f"--at_most {text}: a limit is a number below a million")
        open_ones = [n for n, source, weight in zip(names, sources, weights) if weight is None and source != "rm"]
        if not name and len(open_ones) != 1:
            fail(f"--at_most {text}: of which --reward? Write it as " + " or ".join(f"{n}:{text}" for n in names))
        name = name or open_ones[0]
        name = names[sources.index(name)] if name in sources else name
        if name not in names:
            fail(f"--at_most {text}: there is no --reward {name}{did_you_mean(name, names)}; there is "
                 + ", ".join(names))
        if weights[names.index(name)] is not None:
            fail(f"--at_most {text}: {name} has a weight too; leave one of the two out")
        if name in found:
            fail(f"--at_most {text}: {name} has the limit {found[name]:g} already")
        found[name] = limit
    return found


def check_options(o):
    """Exits 2 where the rewards of stage 3 are no rewards, and tells what they leave without effect."""
    parts = parts_of(o)
    if rewards.is_function(o.reward_model) and any(part.source == o.reward_model for part in parts):
        fail(f"--reward_model {o.reward_model}: a function is named by --reward")
    models = [part for part in parts if not rewards.is_function(part.source) and part.limit is None]
    warn_idle(o, "reward", o.reward_model not in [part.source for part in parts], "reward_model")
    warn_idle(o, "reward", not models, "reward_clip", *["value_init"] * (o.advantages == "gae"))
    warn_idle(o, 'at_most ""', not o.at_most, "multiplier_rate")


def load(o, policy, tokenizer, policy_path, run):
    """What scores answers of `policy`, of --reward and --reward_model. Exits 2 where they do not fit."""
    parts = parts_of(o)
    return Reward(parts, [rewards.load(part.source, "--reward" if o.reward else "--reward_model", policy, tokenizer,
                                       policy_path, run) for part in parts], bool(o.reward))


def give_columns(scorers, prompts, where):
    """Functions among the scorers, or in one, learn which columns the prompts have beside their texts. Exits 2, before
    anything is trained, where one asks for another. where: the file or folder that the prompts are from."""
    texts = [getattr(prompt, "text", prompt) for prompt in prompts]
    known = [*dict.fromkeys(name for text in texts for name in getattr(text, "columns", {}))]
    for scorer in scorers:
        for one in getattr(scorer, "scorers", [scorer]):
            if isinstance(one, rewards.RewardFunction):
                one.know(known, where)


# ---- as one

class Reward:
    """Scores by Parts. named: whether each is logged by its name.

    multipliers: {place of a Part with a limit: its multiplier}. model: the reward model that is maximised, the first of
    several, or None; models: all.
    """

    def __init__(self, parts, scorers, named=True):
        self.parts, self.scorers, self.named = parts, scorers, named
        self.multipliers = {i: 0.0 for i, part in enumerate(parts) if part.limit is not None}
        self.judges = [scorer for scorer in scorers if scorer.model is not None]
        self.models = [scorer.model for scorer in self.judges]
        self.model, self.source = next(((scorer.model, part.source) for part, scorer in zip(parts, scorers)
                                        if scorer.model is not None and part.limit is None), (None, None))
        for scorer in self.judges:
            if scorer.model is not self.model:
                scorer.below = "below"  # what it shares, it shares with the policy

    def __str__(self):
        """The sum and its limits, for a person."""
        weighed = " + ".join(f"{part.weight:g} x " * (part.weight != 1) + part.source for part in self.parts
                             if part.limit is None)
        return "; ".join([weighed, *(f"{part.source} at most {part.limit:g}" for part in self.parts
                                     if part.limit is not None)])

    def __call__(self, rollout, micro_batch_size=None):
        """Rollout -> scores (B,), the weighted sum; `rollout.parts` gets each."""
        columns = [scorer(rollout, micro_batch_size) for scorer in self.scorers]
        if self.named:
            names = [part.name for part in self.parts]
            rollout.parts = [{name: None if math.isnan(score) else score for name, score in zip(names, row)}
                             for row in zip(*(column.tolist() for column in columns))]
        return self.total(columns)

    def total(self, columns, clip=0.0, multipliers={}):
        """Sum of weight x score, less multiplier x cost where there is one: a column (B,) for each part, NaN where it
        does not apply -> (B,). clip: the scores of reward models count up to +- this."""
        total = 0.0
        for i, (part, scorer, x) in enumerate(zip(self.parts, self.scorers, columns)):
            weight = part.weight if part.limit is None else -multipliers.get(i, 0.0)
            if clip and scorer.model is not None and part.limit is None:
                x = x.clamp(-clip, clip)
            total = total + weight * x.nan_to_num(0.0)
        return total

    def columns(self, batch):
        """What __call__ left on a batch: (B,) for each part."""
        return [torch.tensor([math.nan if row[part.name] is None else row[part.name] for row in batch.parts],
                             device=batch.scores.device, dtype=batch.scores.dtype) for part in self.parts]

    def learned(self, batch, clip):
        """The scores that a step learns from: with multipliers, and reward models clipped. Of a reward model alone, as
        they are: `credit` clips them."""
        return self.total(self.columns(batch), clip, self.multipliers) if self.named else batch.scores

    def figures(self, batch, run):
        """Mean and deviation of each part over the answers of all ranks to which it applies, and the multipliers."""
        found = {}
        for i, (part, x) in enumerate(zip(self.parts, self.columns(batch)) if self.named else ()):
            mean, variance = moments(x, ~x.isnan(), run.total)
            found |= {f"objective/scores/{part.name}": float(mean), f"objective/scores_std/{part.name}":
                      math.sqrt(variance)}
            if i in self.multipliers:
                found[f"objective/multiplier/{part.name}"] = self.multipliers[i]
        return found

    def follow(self, figures, rate):
        """After a step: each multiplier moves by rate x (mean - limit), but not below 0."""
        means = {i: figures[f"objective/scores/{self.parts[i].name}"] for i in self.multipliers}
        self.multipliers = {i: m if math.isnan(means[i]) else max(0.0, m + rate * (means[i] - self.parts[i].limit))
                            for i, m in self.multipliers.items()}

    def restore(self, multipliers):
        """Those of the checkpoint that a run goes on from."""
        if multipliers.keys() != self.multipliers.keys():
            fail("--resume: --at_most: the run began with limits of other rewards, which cannot change; leave the "
                 "option out or start another run")
        self.multipliers = {i: float(m) for i, m in multipliers.items()}

    def warnings(self, batch, step, run):
        """(cause, a warning) where no reward applies to some answers."""
        columns = zip(self.parts, self.columns(batch)) if self.named else ()
        if counted := [x for part, x in columns if part.limit is None and part.weight]:
            without = sum(x.isnan() for x in counted) == len(counted)
            rows, n = run.total(torch.stack([torch.ones_like(batch.scores), without.float()]).sum(1)).tolist()
            if n:
                yield "applies", (f"no reward applies to {n:.0f} of {rows:.0f} answers of step {step}: their score is "
                                  "0, which is learned from as any other")

    def kept(self, figures):
        """Lines: whether each limit is kept, of figures of held-out answers (`evaluate.summary`)."""
        for i, m in self.multipliers.items():
            part, (mean, half) = self.parts[i], figures["parts"][self.parts[i].name].get("score", (math.nan, 0.0))
            said = ("applies to none" if math.isnan(mean) else "kept" if mean <= part.limit else
                    "the limit lies within the interval" if mean - half <= part.limit else
                    "not kept; more steps or a higher --multiplier_rate may")
            yield (f"limit of {part.name}: mean {mean:.3f} +- {half:.3f}, at most {part.limit:g}: {said}; multiplier "
                   f"{m:.3f}")

    def inputs(self):
        """{what: files} of all that it is made of, which a resumed run must find unchanged."""
        return {f"the reward {part.source}": rewards.files(part.source) for part in self.parts}
