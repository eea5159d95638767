"""Several answers to each prompt, and advantages without a value network: `--group_size` and `--advantages`.

Invariant: a group is the group_size answers to one drawing of a prompt, and all of it is on one rank, for ranks share
prompts and not answers. Microbatches and minibatches may divide it, as advantages are there by then.

The formulas are `objectives.rloo` and `objectives.grpo`. Left out: one prefill for a group; groups of different sizes.
"""
import torch

from minirlhf.config import fail, ranks, warn_idle
from minirlhf.objectives import rows_of_groups

OPTIONS = "advantages", "group_size"  # what a run cannot change


def check_options(o):
    """Exits 2 where answers do not make whole groups on each rank, or an answer would have none to be compared with.

    Without a value network there is no warm-up of one.
    """
    _, world = ranks()
    if o.advantages != "gae" and o.group_size < 2:
        fail(f"--group_size {o.group_size}: --advantages {o.advantages} compares an answer with the others to its "
             "prompt, so it takes 2 or more; try --group_size 4")
    if o.batch_size % (o.group_size * world):
        fail(f"--group_size {o.group_size}: must divide --batch_size {o.batch_size}"
             + (f" on each of {world} ranks" if world > 1 else ""))
    if o.advantages != "gae":
        warn_idle(o, f"advantages {o.advantages}", True, "value_init", "whiten_rewards", "gamma", "lam",
                  "value_learning_rate", "cliprange_value", "vf_coef", *["value_warmup"] * (o.value_warmup > 0))
        o.value_warmup = 0


def described(o, start):
    """What advantages come from, in a line of what the run is about to do. start: the value network's, if any."""
    several = f"{o.group_size} answers to each of {o.batch_size // o.group_size} prompts a step"
    if o.advantages == "gae":
        return f"value network: from {start}" + f"; {several}" * (o.group_size > 1)
    return f"no value network: {several}, compared with one another ({o.advantages})"


def figures(batch, run):
    """Of a batch after CREDIT, over all ranks: the share of groups whose answers' scores, as they count there, are all
    equal, so that they say nothing of which is better. Of single answers nothing."""
    scores = batch.final_rewards[rows_of_groups(batch.group)]  # (G, K)
    if scores.shape[1] == 1:
        return {}
    equal = (scores == scores[:, :1]).all(1)
    equal, all_groups = run.total(torch.stack([equal.sum(), equal.new_ones(len(equal)).sum()])).tolist()
    return {"groups/equal_scores": equal / all_groups}
