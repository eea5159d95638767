"""`--advantages rloo` and `grpo`, `--group_size`: what a run makes, says, saves and refuses without a value network."""
import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from conftest import ROOT, scratch
from minirlhf import adapters, checkpoint, evaluate, export, groups, memory, objectives, runtime, sample
from minirlhf.config import parse
from minirlhf.data import endless_batch
from minirlhf.model import Block
from test_memory import options, run_of
from test_state import equal, stopping, tensors, without_clocks  # noqa: F401 (a fixture)
from test_train_ppo import options as ppo_options
from test_train_ppo import run_of as ppo_run
from test_train_ppo import score, update, world  # noqa: F401 (a fixture)

RLOO = ["--advantages", "rloo", "--group_size", "2", "--batch_size", "4"]
VALUE_OPTIONS = {"value_init": "sft", "value_learning_rate": "0.1", "cliprange_value": "0.1", "vf_coef": "1",
                 "value_warmup": "9", "gamma": "0.5", "lam": "0.5", "whiten_rewards": "true"}


@pytest.fixture(scope="module")
def run(tiny):
    """A run of rloo: two steps of two prompts, with answers kept."""
    ended = tiny.train("ppo", *RLOO, "--save_rollouts")
    assert ended.code == 0, ended
    return ended


# ---- a run


def test_there_is_no_value_network(tiny, monkeypatch):
    """None is made, none is trained, one optimizer remains; no figure, line or checkpoint speaks of one."""
    made, trained, learner, optimizers = [], [], adapters.learner, train_ppo.make_optimizers
    monkeypatch.setattr(adapters, "learner", lambda model, head, *more: made.append(head) or learner(
        model, head, *more))
    monkeypatch.setattr(train_ppo, "make_optimizers", lambda *a: trained.append(optimizers(*a)) or trained[-1])
    for advantages, nets in (("rloo", 1), ("grpo", 1), ("gae", 2)):
        made.clear(), trained.clear()
        ended = tiny.train("ppo", *RLOO, "--advantages", advantages)
        assert ended.code == 0, ended
        assert made == ["lm", "scalar"][:nets] and len(trained[0]) == nets
        steps = [row for row in ended.rows() if "final" not in row]
        for name in ("val/explained_variance", "loss/value_avg", "val/clipfrac_avg"):
            assert [name in step for step in steps] == [nets == 2] * 2
        assert ("value ev" in ended.said) == (nets == 2)
        payload = ended.payload()["training"]
        assert ("value_model" in payload) == (nets == 2) and len(payload["optimizers"]) == nets
        assert all("groups/equal_scores" in step for step in steps)
        said = ("value network: from " + tiny.rm + "; 2 answers to each of 2 prompts a step; " if nets == 2 else
                f"no value network: 2 answers to each of 2 prompts a step, compared with one another ({advantages}); ")
        assert said in ended.said


def test_the_answers_of_a_step(run, tiny):
    """Twice two answers to the prompts that (seed, step) names, in rollouts.jsonl too; as many steps as with single
    answers."""
    rows, steps = run.rows("rollouts.jsonl"), [row for row in run.rows() if "final" not in row]
    prompts = [json.loads(line)["prompt"] for line in (tiny.folder / "data" / "prompts.train.jsonl").open()][:9]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 and [step["episode"] for step in steps] == [4, 8]
    for step in (0, 1):
        asked = [prompts[i] for i in endless_batch(9, 2, 1337, step)]
        assert sorted(row["prompt"] for row in rows if row["step"] == step + 1) == sorted(2 * asked)


def test_more_groups_than_prompts(tiny, monkeypatch):
    """Nine prompts in batches of twelve groups: a prompt that comes twice has two groups of its own."""
    seen, credit = [], train_ppo.credit

    def look(batch, *more):
        credit(batch, *more)
        seen.append(batch)
    monkeypatch.setattr(train_ppo, "credit", look)
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *a: None)
    assert tiny.train("ppo", *RLOO, "--batch_size", "24", "--total_episodes", "48", "--learning_rate", "1e-4").code == 0
    assert len(seen) == 2
    for step, batch in enumerate(seen):
        rows = objectives.rows_of_groups(batch.group)
        of_group = batch.prompt_index[rows]
        assert of_group[:, 0].tolist() == of_group[:, 1].tolist() == endless_batch(9, 12, 1337, step)
        A = torch.stack([batch.advantages[b, batch.response_mask[b]][0] for b in range(24)])[rows]
        torch.testing.assert_close(A[:, 0], -A[:, 1])  # of two, one is as much better as the other is worse
        assert A.any()


def test_the_policy_learns_from_the_first_step(tiny, tmp_path, capsys):
    """--value_warmup, as long as the run and longer, is idle; without the named options nothing is said to be."""
    ended = tiny.train("ppo", *RLOO, *(word for name, value in VALUE_OPTIONS.items() for word in (f"--{name}", value)))
    assert ended.code == 0 and "(value warm-up)" not in ended.said, ended
    assert all(row["policy/updates"] > 0 for row in ended.rows()[:1])
    idle = [line for line in ended.said.splitlines() if line.endswith(" has no effect with --advantages rloo")]
    assert sorted(idle) == sorted(f"warning: --{name} has no effect with --advantages rloo" for name in VALUE_OPTIONS)
    (tmp_path / "own.toml").write_text("value_learning_rate = 0.5\n")
    for file, told in (("@scratch", ["gamma"]), (f"@{tmp_path}/own.toml", ["gamma", "value_learning_rate"])):
        o = parse(train_ppo.Options, [file, *RLOO, "--gamma", "0.9"])  # a preset speaks for nobody, own files do
        groups.check_options(o)
        assert capsys.readouterr().out.split() == " ".join(
            f"warning: --{name} has no effect with --advantages rloo" for name in told).split()
    same = tiny.train("ppo", *RLOO)  # the tiny world's own --value_warmup 0 is what it would be
    assert "--value_warmup" not in same.said
    assert equal(ended.payload()["model"], same.payload()["model"])
    assert "no effect" not in tiny.train("ppo", "--group_size", "2", "--value_warmup", "1").said


@pytest.mark.parametrize("words, says", [
    (["--advantages", "rloo"], "--group_size 1: --advantages rloo compares an answer with the others to its prompt, "
                               "so it takes 2 or more; try --group_size 4"),
    (["--advantages", "grpo", "--group_size", "1"], "--group_size 1: --advantages grpo"),
    (["--group_size", "0"], "--group_size 0: must be at least 1"),
    (["--group_size", "3"], "--group_size 3: must divide --batch_size 4"),
    ([*RLOO, "--group_size", "8"], "--group_size 8: must divide --batch_size 4"),
    (["--advantages", "ppo"], "argument --advantages: invalid choice: 'ppo'")])
def test_what_makes_no_groups_is_refused(tiny, words, says):
    """In one line, before a folder is made."""
    ended = tiny.train("ppo", *words)
    assert ended.code == 2 and says in ended.error and not ended.folder.exists()


def test_each_rank_has_whole_groups(monkeypatch, refused):
    """Four answers in pairs are one pair for each of two ranks, and none for three or four."""
    for number, says in ((1, None), (2, None), (4, "--group_size 2: must divide --batch_size 4 on each of 4 ranks")):
        monkeypatch.setattr(groups, "ranks", lambda: (0, number))
        o = options("ppo", advantages="rloo", group_size=2, batch_size=4)
        assert groups.check_options(o) is None if says is None else says in refused(groups.check_options, o)


def test_ranks_share_prompts(tiny, monkeypatch):
    """The prompts of two ranks are those of one, none of them on both."""
    seen, roll_out = [], train_ppo.roll_out
    monkeypatch.setattr(train_ppo, "roll_out", lambda policy, prompts, index, *more: seen.append(index) or roll_out(
        policy, prompts, index, *more))
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *a: None)
    for rank in (0, 1):
        monkeypatch.setattr(runtime.Run, "share", lambda run, rows: rows[rank::2])
        assert tiny.train("ppo", *RLOO, "--batch_size", "8", "--total_episodes", "8").code == 0
    assert [len(index) for index in seen] == [2, 2]
    assert sorted(seen[0] + seen[1]) == sorted(endless_batch(9, 4, 1337, 0))


def test_states_are_shared_with_the_reward_model(world, monkeypatch):  # noqa: F811
    """Adapters in the last of two blocks, and a first one that is policy's, reference's and reward model's: it takes
    each of ten answers once for all three. Scores are those of the reward model by itself."""
    o = ppo_options(advantages="rloo", group_size=2, lora_rank=2, lora_layers=1)
    nets, reward, batch = world(o)
    for name, p in adapters.below(nets.policy, 1):
        reward.model.get_parameter(name).data = p.data
    where = {id(model.h[0]): name for name, model in (("policy", nets.policy), ("ref", nets.ref),
                                                      ("reward", reward.model))}
    passes, forward = Counter(), Block.forward

    def counted(self, x, *more, **rest):
        passes[where.get(id(self))] += len(x)
        return forward(self, x, *more, **rest)
    monkeypatch.setattr(Block, "forward", counted)
    score(batch, nets, reward, o)
    assert passes == {"policy": 10, None: 30} and batch.values is None
    torch.testing.assert_close(batch.scores, reward.model.score(batch.tokens, batch.lengths), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("advantages", ["gae", "rloo"])
def test_an_update_that_ends_at_once(world, advantages):  # noqa: F811
    """Its first minibatch is too far from the batch's policy: nothing moves, means are 0, those of a value network are
    there with one only."""
    o = ppo_options(advantages=advantages, group_size=2, max_update_kl=1e-3)
    nets, reward, batch = world(o)
    score(batch, nets, reward, o)
    train_ppo.credit(batch, 0.1, o, ppo_run(o))
    batch.logprobs = batch.logprobs + 0.3 * batch.response_mask
    figures, update_kl = update(batch, nets, train_ppo.make_optimizers(nets.policy, nets.value, o), 0, o)
    assert update_kl > 0.03 and figures == {
        "policy/approxkl_avg": 0.0, "policy/clipfrac_avg": 0.0, "policy/updates": 0, "loss/policy_avg": 0.0,
        **({"loss/value_avg": 0.0, "val/clipfrac_avg": 0.0} if advantages == "gae" else {}), "val/ratio": 1.0,
        "val/ratio_var": 0.0}


# ---- what is left of it


@pytest.mark.parametrize("advantages", ["rloo", "grpo"])
def test_a_resumed_run_is_the_same(tiny, stopping, monkeypatch, advantages):  # noqa: F811
    """Stopped after step 1 and gone on with: weights, optimizer and figures to the last bit."""
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *a: None)
    words = [*RLOO, "--advantages", advantages, "--total_episodes", "12", "--learning_rate", "1e-3"]
    whole = tiny.train("ppo", *words)
    stopping(1)
    part = tiny.train("ppo", *words)
    assert part.code and "saved" in part.said, part
    stopping()
    on = tiny.train("ppo", *words, "--resume", out=part.folder)
    assert on.code == 0 and "1/3" not in on.said
    assert equal(whole.payload(), on.payload()) and len(tensors(on.payload()["training"])) > 20
    assert without_clocks(whole.rows()) == without_clocks(on.rows())


@pytest.mark.parametrize("words, says", [
    (["--advantages", "grpo"], "--advantages grpo: this run had rloo, which cannot change"),
    (["--advantages", "gae"], "--advantages gae: this run had rloo, which cannot change"),
    (["--group_size", "4"], "--group_size 4: this run had 2, which cannot change")])
def test_a_run_cannot_become_another(run, tiny, words, says):
    ended = tiny.train("ppo", "--resume", *words, out=run.folder)
    assert ended.code == 2 and says in ended.error


def test_a_run_of_before_had_single_answers(tiny):
    """A checkpoint without the two options goes on as gae, whatever the defaults may become."""
    folder = tiny.train("ppo").folder
    payload = torch.load(folder / "ckpt.pt", weights_only=True)
    for name in groups.OPTIONS:
        del payload["options"][name]
    checkpoint.write(str(folder / "ckpt.pt"), payload)
    assert "this run is finished" in tiny.train("ppo", "--resume", out=folder).said
    ended = tiny.train("ppo", "--resume", "--advantages", "rloo", out=folder)
    assert ended.code == 2 and "--advantages rloo: this run had gae" in ended.error


def test_every_command_reads_the_policy(run, tiny, capsys, monkeypatch, tmp_path):
    """sample, evaluate, export and inspect, and stages 1 and 3 that start from it, with a value network and without."""
    path, prompts = str(run.folder), str(tiny.folder / "data" / "prompts.val.jsonl")
    sample.main([path, "--prompt", "ad"])
    evaluate.main([path, "--baseline", tiny.sft, "--reward_model", tiny.rm, "--prompts", prompts])
    export.main(["export", path, str(tmp_path / "folder")])
    export.main(["export", path, str(tmp_path / "small.pt"), "--weights_only"])
    export.main(["inspect", path])
    said = capsys.readouterr().out
    assert f"verdict on {path}: " in said and (tmp_path / "folder" / "config.json").exists()
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *a: None)
    small = str(tmp_path / "small.pt")
    for words in (["--init_from", path], ["--init_from", small, "--reference", tiny.sft], [*RLOO, "--init_from", path]):
        assert tiny.train("ppo", *words).code == 0
    assert tiny.train("sft", "--init_from", path).code == 0


# ---- warnings, figures, memory, --check


FIGURES = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": 0.05, "completions/mean_length": 10.0,
           "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9, "groups/equal_scores": 0.51}
EQUAL = "in 51% of the groups of step 7 the 4 answers have the same score: "


@pytest.mark.parametrize("changes, more, white, words", [
    ({}, {}, 1.0, ["groups", EQUAL + "only their KL says which is better; raise --group_size above 4"]),
    ({"objective/kl_coef": 0.0}, {}, 1.0, ["groups", EQUAL + "nothing says which is better; raise"]),
    ({"groups/equal_scores": 0.5}, {}, 0.0, None),  # small advantages are not whitened
    ({}, {"advantages": "gae"}, 1.0, None), ({}, {"advantages": "gae"}, 0.0, ["advantages", "whitened they are 0"])])
def test_what_a_person_is_told_of_groups(changes, more, white, words):
    """A warning where more than half of the groups have equal scores, without a value network alone."""
    o = options("ppo", **{"advantages": "grpo", "group_size": 4, "value_warmup": 0} | more)
    sft = {"mean_length": 10.0, "ref_logprob_per_token": -4.0}
    found = [*evaluate.concerns(FIGURES | changes, 1.0, sft, o, white)]
    assert not found if words is None else [cause for cause, _ in found] == words[:1] and words[1] in found[0][1]


@pytest.mark.parametrize("kl_coef, ent_coef, moving", [
    (0.1, 0.02, "the KL penalty, the entropy bonus (--ent_coef 0.02)"), (0.1, 0.0, "the KL penalty"),
    (0.0, 0.0, "what is left of earlier gradients in the optimizer")])
def test_what_moves_a_policy_whose_scores_are_equal(kl_coef, ent_coef, moving):
    """Said once, and without a value network's errors."""
    o = options("ppo", advantages="rloo", group_size=4, ent_coef=ent_coef)
    figures = FIGURES | {"groups/equal_scores": 1.0, "objective/kl_coef": kl_coef}
    (cause, text), = evaluate.concerns(figures, 0.0, {"mean_length": 10.0, "ref_logprob_per_token": -4.0}, o)
    assert cause == "variance" and text.endswith(f"what moves the policy is {moving}")


def test_memory_without_a_value_network(make_model):
    """What stays is less by its numbers and their moments; of what comes and goes the gradients' peak is the policy's;
    with adapters the states of the reward model are counted where they are kept apart."""
    ref, rm = make_model(), make_model("scalar")
    policy, value = ref.with_head("lm"), rm.with_head("scalar")
    o = options("ppo", batch_size=8, group_size=4, advantages="rloo", response_length=4)
    with_it, without = (memory.of_ppo(o, run_of(o), policy, network, [ref, rm], 3) for network in (value, None))
    numbers = sum(p.numel() for p in value.parameters())
    assert with_it[0]["weights"] - without[0]["weights"] == 4 * (numbers + 2)  # its gain and bias
    assert with_it[0]["moments"] - without[0]["moments"] == 8 * numbers
    assert max(phase.get("gradients", 0) for phase in without[1]) == memory.gradients(o, policy)["gradients"]
    o = options("ppo", lora_rank=2, lora_layers=1, batch_size=8, group_size=4, advantages="rloo", response_length=4)
    policy = adapters.learner(ref, "lm", o, torch.Generator())
    states = []
    for first in (0, 1):
        rm.first = first
        phases = memory.of_ppo(o, run_of(o), policy, None, [ref, rm], 3)[1]
        states.append(max(phase.get("states", 0) for phase in phases))
    assert states[1] == 2 * states[0] > 0
    assert memory.of_ppo(o, run_of(o), policy, None, [ref, None], 3)[1][2]["states"] == 4 * 7 * 16 * 8  # a function


def test_smaller_batches_hold_whole_groups(monkeypatch):
    """What is advised where memory is short divides by minibatches and groups, on all ranks."""
    monkeypatch.setattr(memory, "ranks", lambda: (0, 2))
    o = options("ppo", batch_size=96, num_mini_batches=4, group_size=6, advantages="rloo")
    assert [way["batch_size"] for way in memory.smaller(o) if "batch_size" in way] == [48, 24]
    assert [way["batch_size"] for way in memory.smaller(options("ppo", batch_size=96, num_mini_batches=4))
            if "batch_size" in way] == [48, 24]


CLAIMS = ["a group is all the answers to one drawing of a prompt", "the answers to a prompt are drawn one by one",
          "the advantages of a group sum to 0, each the same for a whole answer"]


@pytest.mark.parametrize("advantages, claims", [("rloo", CLAIMS), ("grpo", CLAIMS), ("gae", CLAIMS[:2])])
def test_what_is_right_passes_its_check(tiny, advantages, claims):
    """--check has the lines of groups, and those of a value network only where there is one."""
    ended = tiny.train("ppo", *RLOO, "--advantages", advantages, "--check")
    lines = [line[6:].split(": ")[0] for line in ended.said.splitlines() if line.startswith("ok    ")]
    assert ended.code == 0 and [claim for claim in lines if claim in CLAIMS] == claims
    assert len(lines) == 12 + len(claims) - (advantages != "gae")
    assert ("padding changes nothing in the value network" in lines) == (advantages == "gae")
    assert " 9 groups of 2" in ended.said


def apart(credit):
    """An advantage that is not the same for a whole answer, whose sums are."""
    def broken(batch, *more):
        credit(batch, *more)
        first = batch.response_mask.int().argmax(1)
        rows = torch.arange(len(first))
        batch.advantages[rows, first + 1] += batch.advantages[rows, first] * batch.response_mask[rows, first + 1]
        batch.advantages[rows, first] -= batch.advantages[rows, first] * batch.response_mask[rows, first + 1]
    return broken


@pytest.mark.parametrize("claim, place, how", [
    (CLAIMS[0], "roll_out", lambda f: lambda *a: scrambled(f(*a))),
    (CLAIMS[1], "roll_out", lambda f: lambda policy, prompts, index, eos, step, o, run: f(
        policy, prompts, index, eos, step, SimpleNamespace(**vars(o) | {"temperature": 0.01}), run)),
    (CLAIMS[2], "rloo", lambda f: lambda R, group: f(R, group).roll(1)),
    (CLAIMS[2], "rloo", lambda f: lambda R, group: R), (CLAIMS[2], "credit", apart)])
def test_a_sabotage_of_groups_is_found(tiny, monkeypatch, claim, place, how):
    """Rows that lost their group, answers that are all the most likely one, advantages of other rows, rewards that
    nothing is subtracted from, decisions with advantages of their own."""
    monkeypatch.setattr(train_ppo, place, how(getattr(train_ppo, place)))
    ended = tiny.train("ppo", *RLOO, "--check")
    failed = [line[6:].split(": ")[0] for line in ended.said.splitlines() if line.startswith("FAIL  ")]
    assert ended.code == 1 and claim in failed and (claim == CLAIMS[1] or len(failed) < 3), ended.said


def scrambled(batch):
    batch.group = batch.group.roll(1)
    return batch


@pytest.mark.slow
def test_two_ranks_compare_answers_to_their_own_prompts(tiny, tmp_path):
    """Under torchrun the answers that each rank has kept are whole groups, the figures those of all of them."""
    words = [*scratch("ppo"), *tiny.STAGES["ppo"].split(), *RLOO, "--batch_size", "8", "--total_episodes", "24",
             "--save_rollouts", "--data_dir", tiny.folder / "data", "--init_from", tiny.sft, "--reward_model", tiny.rm,
             "--device", "cpu", "--learning_rate", "1e-3", "--out_dir", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train_ppo.py"),
                    *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    rows, steps = ([json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()]
                   for name in ("rollouts", "metrics"))
    prompts = [json.loads(line)["prompt"] for line in (tiny.folder / "data" / "prompts.train.jsonl").open()][:9]
    for step in range(3):
        own, index = [row for row in rows if row["step"] == step + 1], endless_batch(9, 4, 1337, step)
        for rank in (0, 1):  # rows come in the order of ranks
            assert sorted(row["prompt"] for row in own[4 * rank:4 * rank + 4]) == sorted(
                2 * [prompts[i] for i in index[rank::2]])
        equal_scores = 0
        for rank in (0, 1):
            for i in index[rank::2]:
                pair = [row["reward"] for row in own[4 * rank:4 * rank + 4] if row["prompt"] == prompts[i]]
                equal_scores += len(pair) == 2 and pair[0] == pair[1]
        assert steps[step]["groups/equal_scores"] == equal_scores / 4
        assert steps[step]["objective/scores"] == pytest.approx(sum(row["score"] for row in own) / 8, abs=1e-5)
