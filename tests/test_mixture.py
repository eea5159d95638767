"""Several rewards: their names, weights and limits, what each counts, what is logged and judged of each; the other
columns of the prompts; and whole runs, whose figures are computed a second time from what they wrote."""
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from conftest import ROOT, tree
from minirlhf import checkpoint, evaluate, mixture, rewards, sample
from minirlhf.config import parse, weighted
from minirlhf.data import Asked, Prompt, load_asked
from minirlhf.mixture import Part, Reward, parts_of
from test_rewards import CPU, TOKENIZER, rollout

ONE = SimpleNamespace(total=lambda t: t)
FUNCTIONS = """
import json
seen = []
def dots(prompts, completions): return [c.count(".") for c in completions]
def length(prompts, completions): return [len(c) / 4 for c in completions]
def some(prompts, completions): return [None if p < "b" else len(c) for p, c in zip(prompts, completions)]
def never(prompts, completions): return [None] * len(prompts)
def wanted(prompts, completions, wanted):
    seen.extend(zip(map(str, prompts), wanted))
    return [None if w is None else float(w in c) for w, c in zip(wanted, completions)]
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """options(words of a command line) -> train_ppo's, in a folder with my.py and reward models' folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("out/helpful", "out/safe", "other/safe", "a:b", "c:0.5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out" / "helpful" / "ckpt.pt").touch()
    (tmp_path / "my.py").write_text(FUNCTIONS)
    return lambda words: parse(train_ppo.Options, ["--reward_model=out/rm", *words.split()])


# ---- what is asked for

@pytest.mark.parametrize("text, name, number", [
    ("rm", "rm", None), ("rm:1", "rm", 1.0), ("rm:-.5e-1", "rm", -0.05), ("a.py:f", "a.py:f", None),
    ("a.py:f:0.2", "a.py:f", 0.2), ("x:y/a.py:f", "x:y/a.py:f", None), ("x:y/a.py:f:2", "x:y/a.py:f", 2.0),
    ("a.py:1", "a.py:1", None), ("a.py:nan", "a.py:nan", None), ("a:b", "a:b", None), ("a:b:3", "a:b", 3.0),
    ("c:0.5", "c:0.5", None), ("c:0.5:2", "c:0.5", 2.0), ("0.1", "0.1", None), (":1", ":1", None),
    ("rm:", "rm:", None)])
def test_a_name_and_its_number(options, text, name, number):
    """The number stands behind the last colon; what is a file or folder as a whole has none."""
    assert weighted(text) == (name, number)


@pytest.mark.parametrize("words, parts, shown", [
    ("", [Part("rm", "out/rm")], "out/rm"),
    ("--reward my.py:dots", [Part("dots", "my.py:dots")], "my.py:dots"),
    ("--reward rm:1 --reward my.py:dots:0.2", [Part("rm", "out/rm"), Part("dots", "my.py:dots", 0.2)],
     "out/rm + 0.2 x my.py:dots"),
    ("--reward out/helpful/ckpt.pt:1 --reward=out/safe/:0.5",
     [Part("helpful", "out/helpful/ckpt.pt"), Part("safe", "out/safe/", 0.5)], "out/helpful/ckpt.pt + 0.5 x out/safe/"),
    ("--reward out/safe --reward other/safe:-2",
     [Part("out/safe", "out/safe"), Part("other/safe", "other/safe", -2.0)], "out/safe + -2 x other/safe"),
    ("--reward my.py:dots --at_most 0.1", [Part("rm", "out/rm"), Part("dots", "my.py:dots", 1.0, 0.1)],
     "out/rm; my.py:dots at most 0.1"),
    ("--reward rm --reward my.py:dots --at_most 0.1", [Part("rm", "out/rm"), Part("dots", "my.py:dots", 1.0, 0.1)],
     "out/rm; my.py:dots at most 0.1"),
    ("--reward my.py:dots --at_most -0.1 --reward rm:2",
     [Part("dots", "my.py:dots", 1.0, -0.1), Part("rm", "out/rm", 2.0)], "2 x out/rm; my.py:dots at most -0.1"),
    ("--reward my.py:length --reward my.py:dots --at_most dots:3 --at_most=my.py:length:1",
     [Part("rm", "out/rm"), Part("length", "my.py:length", 1.0, 1.0), Part("dots", "my.py:dots", 1.0, 3.0)],
     "out/rm; my.py:length at most 1; my.py:dots at most 3"),
    ("--reward out/helpful --reward out/safe:1 --at_most 0", [Part("helpful", "out/helpful", 1.0, 0.0),
                                                              Part("safe", "out/safe", 1.0)],
     "out/safe; out/helpful at most 0"),
    ("--reward other/rm --at_most 0.1", [Part("out/rm", "out/rm"), Part("rm", "other/rm", 1.0, 0.1)],
     "out/rm; other/rm at most 0.1")])
def test_what_a_command_line_asks_for(options, tmp_path, words, parts, shown):
    """Names, weights, limits; where all have limits, the reward model is maximised. As a person reads it."""
    (tmp_path / "other" / "rm").mkdir()
    o = options(words)
    assert parts_of(o) == parts
    mixture.check_options(o)
    assert str(Reward(parts, [SimpleNamespace(model=None)] * len(parts))) == shown


@pytest.mark.parametrize("words, says", [
    ("--reward nowhere", "--reward nowhere: expected FILE.py:FUNCTION, rm or a reward model's folder"),
    ("--reward my.py:dots:x", "--reward my.py:dots:x: expected FILE.py:FUNCTION"),
    ("--reward rm:", "--reward rm:: expected"),
    ("--reward rm:nan", "--reward rm:nan: a weight is a number below a million"),
    ("--reward rm:1e6", "--reward rm:1e6: a weight is a number"), ("--reward rm:-inf", "a weight is a number"),
    ("--reward rm --reward rm:2", "--reward rm: is given twice"),
    ("--reward my.py:dots --reward my.py:dots:2", "--reward my.py:dots: is given twice"),
    ("--at_most 0.1", "--at_most 0.1: is the limit of a --reward, and none is given"),
    ("--reward rm --at_most rm:0.1", "--at_most rm:0.1: every --reward has a limit; name one to be maximised"),
    ("--reward my.py:dots --at_most x", "--at_most x: expected NUMBER or NAME:NUMBER, as dots:0.1"),
    ("--reward my.py:dots --at_most dot:0.1", "there is no --reward dot; did you mean dots?; there is dots"),
    ("--reward my.py:dots --at_most nan", "--at_most nan: a limit is a number below a million"),
    ("--reward my.py:dots --at_most dots:-1e7", "a limit is a number below a million"),
    ("--reward my.py:dots --reward my.py:length --at_most 1",
     "--at_most 1: of which --reward? Write it as dots:1 or length:1"),
    ("--reward rm --at_most 1", "--at_most 1: of which --reward? Write it as rm:1"),
    ("--reward my.py:dots:2 --at_most 1", "--at_most 1: of which --reward?"),
    ("--reward my.py:dots:2 --at_most dots:1", "--at_most dots:1: dots has a weight too; leave one of the two out"),
    ("--reward my.py:dots --at_most 1 --at_most dots:2", "--at_most dots:2: dots has the limit 1 already"),
    ("--reward_model my.py:dots", "--reward_model my.py:dots: a function is named by --reward"),
    ("--reward my.py:length --at_most 1 --reward_model my.py:dots", "--reward_model my.py:dots: a function is named")])
def test_what_a_command_line_may_not_ask_for(options, refused, words, says):
    """One line that names option and value, before anything is loaded."""
    assert says in refused(lambda: train_ppo.read_options(["--reward_model=out/rm", *words.split()]))


def test_options_that_have_no_effect(options, capsys):
    """The reward model's, where none is among the rewards that are maximised; the rate of multipliers, where there is
    no limit. Each is told once."""
    given = "--reward_model x --reward_clip 1 --value_init rm --multiplier_rate 1 "
    for words, idle in (("", ["multiplier_rate"]), ("--reward rm --reward my.py:dots", ["multiplier_rate"]),
                        ("--reward my.py:dots --at_most 1", []),
                        ("--reward out/safe", ["reward_model", "multiplier_rate"]),
                        ("--reward my.py:dots", ["reward_model", "reward_clip", "value_init", "multiplier_rate"]),
                        ("--reward my.py:dots:1 --reward out/safe --at_most 1",
                         ["reward_model", "reward_clip", "value_init"]),
                        ("--reward my.py:dots --advantages rloo --group_size 4",
                         ["value_init", "reward_model", "reward_clip", "multiplier_rate"])):
        train_ppo.read_options((given + words).split())
        assert re.findall(r"warning: --(\w+) has no effect", capsys.readouterr().out) == idle


def test_the_help_says_how(capsys):
    """Both options, that they may be given again, and the rate's default."""
    with pytest.raises(SystemExit):
        parse(train_ppo.Options, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "FILE.py:FUNCTION, another's path, or rm (it), each [:WEIGHT], summed (may be given again)" in text
    assert "NAME:NUMBER: the limit of the mean of the --reward that has no weight (may be given again)" in text
    assert "**columns of the prompts: list) -> list[float | None]" in text and "(default: 0.3)" in text


# ---- the columns of the prompts

def asked(text, **columns):
    prompt = Asked(text)
    prompt.columns = columns
    return prompt


@pytest.fixture
def function(tmp_path):
    """function(parameters, what it returns) -> RewardFunction."""
    def make(parameters, returns):
        (tmp_path / "mine.py").write_text(f"got = []\ndef f({parameters}):\n    got.append({returns})\n"
                                          "    return [0] * 2\n")
        return rewards.RewardFunction(f"{tmp_path / 'mine.py'}:f", TOKENIZER, CPU)
    return make


TEXTS = [asked("why", answer="because", label=[1, {"x": None}], prompts="?", bad="x"), asked("who", answer=None, n=3)]


@pytest.mark.parametrize("parameters, columns", [
    ("prompts, completions", []), ("completions, answer, prompts", ["answer"]), ("a, b, answer", ["answer"]),
    ("prompts, completions, *, label, n=5", ["label", "n"]), ("prompts, completions, weight=5", []),
    ("prompts, completions, **columns", ["answer", "label", "bad", "n"]), ("a, b, **columns", None),
    ("prompts, completions, answer, **others", ["answer", "label", "bad", "n"]), ("*texts, **columns", []),
    ("*texts", []), ("a, b, prompts", ["prompts"])])
def test_a_function_gets_the_columns_that_it_takes(function, parameters, columns):
    """By name, or all by **; a list of a value a row, None where a record lacks it, of any type that JSON has. The
    texts' own names are never a column's, where it takes the texts by name; a wrapper (*args, **kwargs) gets none."""
    f = function(parameters, "dict(locals())")
    columns = ["answer", "label", "prompts", "bad", "n"] if columns is None else columns
    mixture.give_columns([f], TEXTS, "x.jsonl")
    f(rollout(("why", "so"), ("who", "nobody"), texts=TEXTS))
    got = sys.modules["mine"].got[0]
    got |= got.get("columns", {}) | got.get("others", {})
    expected = {"answer": ["because", None], "label": [[1, {"x": None}], None], "prompts": ["?", None],
                "bad": ["x", None], "n": [None, 3]}
    assert {name: got[name] for name in columns} == {name: expected[name] for name in columns}
    assert f.columns == columns


def test_a_function_s_changes_of_a_column_have_no_effect(function):
    """A list in a record is the same at the next call."""
    f = function("prompts, completions, label", "label[0].append(2) or label[0]")
    mixture.give_columns([f], TEXTS, "x.jsonl")
    for _ in range(2):
        f(rollout(("why", "so"), ("who", "nobody"), texts=TEXTS))
    assert sys.modules["mine"].got == [[1, {"x": None}, 2]] * 2


def test_a_column_that_is_not_there(function, refused):
    """Refused by its name, with those that are there, before the function is called."""
    f = function("prompts, completions, answers", "0")
    assert refused(mixture.give_columns, [f], TEXTS, "x.jsonl").endswith(
        "asks for the column 'answers', which x.jsonl lacks; did you mean answer?; the columns beside the prompt are: "
        "'answer', 'label', 'prompts', 'bad', 'n'\n")
    assert refused(mixture.give_columns, [None, Reward([Part("f", "f")], [f])], ["plain"], "x").endswith("are: none\n")
    many = [asked("x", **{f"column{n}": n for n in range(999)})]
    assert refused(mixture.give_columns, [f], many, "x").endswith("'column14', 'column15', ...\n")


def test_columns_come_from_the_file_of_prompts(tmp_path):
    """All that is not read as the prompt, null left out; beside messages too. Texts are as they were."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "answer": "\\ud83d", "n": [1, {"b": 2}], "none": null}\n'
                    '{"messages": [{"role": "user", "content": "hi"}], "ok": true}\n{"prompt": "c"}\n')
    found = load_asked(path)
    assert found == ["a", "\n\nHuman: hi\n\nAssistant:", "c"] and [text.columns for text in found] == [
        {"answer": "\ufffd", "n": [1, {"b": 2}]}, {"ok": True}, {}]


def test_ids_alone_have_no_columns(function):
    """As where a prompt is decoded."""
    f = function("prompts, completions, answer", "answer")
    mixture.give_columns([f], [Prompt([1], TEXTS[0], 0)], "x")
    f(rollout(("why", "so"), ("who", "nobody")))
    assert sys.modules["mine"].got == [[None, None]]


# ---- as one

class Column:
    """A scorer that gives these."""

    def __init__(self, *scores, model=None):
        self.scores, self.model = torch.tensor([math.nan if s is None else s for s in scores]), model

    def __call__(self, rollout, micro_batch_size=None):
        return self.scores


def batch_of(reward):
    batch = SimpleNamespace()
    batch.scores = reward(batch)
    return batch


def hand_made():
    """A reward model, a function that is left out twice, a function that counts against, and a limit."""
    return Reward([Part("rm", "x"), Part("a", "a", 0.5), Part("b", "b", -2.0), Part("cost", "c", 1.0, 0.5)],
                  [Column(3.0, -1.0, None, 0.5, model=object()), Column(None, 4.0, None, 1.0),
                   Column(1.0, 0.0, None, 0.25), Column(1.0, None, 1.0, 0.0)])


def test_a_sum_by_hand():
    """3 - 2; -1 + 2; nothing; 0.5 + 0.5 - 0.5. Learned from with a clip of 2 and a multiplier of 4: 2 - 2 - 4, the same
    1, -4, the same 0.5."""
    reward = hand_made()
    batch = batch_of(reward)
    assert batch.scores.tolist() == [1.0, 1.0, 0.0, 0.5]
    assert batch.parts == [dict(zip(("rm", "a", "b", "cost"), row)) for row in (
        (3.0, None, 1.0, 1.0), (-1.0, 4.0, 0.0, None), (None, None, None, 1.0), (0.5, 1.0, 0.25, 0.0))]
    reward.multipliers = {3: 4.0}
    assert reward.learned(batch, 2.0).tolist() == [-4.0, 1.0, -4.0, 0.5]
    assert reward.learned(batch, 0.0).tolist() == [-3.0, 1.0, -4.0, 0.5]
    assert reward(batch).tolist() == [1.0, 1.0, 0.0, 0.5]  # a held-out score knows no multiplier


def test_one_reward_is_as_it_was():
    """Without --reward the scores are the reward model's own and nothing is named; one function's are not clipped."""
    scores = Column(3.0, -0.1, 0.7, model=object())
    plain = Reward([Part("rm", "x")], [scores], named=False)
    batch = batch_of(plain)
    assert torch.equal(batch.scores, scores.scores) and not hasattr(batch, "parts") and plain.model is scores.model
    assert plain.learned(batch, 2.0) is batch.scores and plain.figures(batch, ONE) == {}
    assert [*plain.warnings(batch, 1, ONE)] == []
    alone = Reward([Part("f", "x")], [Column(3.0, -0.1, 0.7)])
    batch = batch_of(alone)
    assert torch.equal(alone.learned(batch, 2.0), scores.scores) and alone.model is None


def test_figures_by_hand():
    """Mean and deviation of those that apply: rm of 3, -1, 0.5, a of 4 and 1, cost of 1, 1, 0."""
    reward = hand_made()
    reward.multipliers = {3: 4.0}
    found = reward.figures(batch_of(reward), ONE)
    assert found.pop("objective/multiplier/cost") == 4.0
    expected = {"rm": (3.0, -1.0, 0.5), "a": (4.0, 1.0), "b": (1.0, 0.0, 0.25), "cost": (1.0, 1.0, 0.0)}
    assert found == {key: pytest.approx(value) for name, x in expected.items() for key, value in (
        (f"objective/scores/{name}", statistics.fmean(x)), (f"objective/scores_std/{name}", statistics.pstdev(x)))}


def ranks(work, count=2):
    """work(rank, run) on threads, whose run.total sums over all of them -> results."""
    barrier, given, found = threading.Barrier(count), [None] * count, [None] * count

    def start(rank):
        def total(t):
            given[rank] = t
            barrier.wait(20)
            result = sum(given)
            barrier.wait(20)
            return result
        found[rank] = work(rank, SimpleNamespace(total=total))
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return found


def test_ranks_have_the_figures_of_all():
    """Two ranks with half of the answers each, one of them without a cost; multipliers then move alike."""
    whole, parts = [(1.0, 2.0), (3.0, None), (None, None), (5.0, 4.0)], [Part("a", "a"), Part("cost", "c", 1.0, 1.0)]

    def half(rank, run):
        own = whole[rank::2] if rank else whole[::2]
        reward = Reward(parts, [Column(*column) for column in zip(*own)])
        batch = batch_of(reward)
        figures = reward.figures(batch, run)
        reward.follow(figures, 0.5)
        return figures, reward.multipliers, [*reward.warnings(batch, 7, run)]

    alone = Reward(parts, [Column(*column) for column in zip(*whole)])
    expected = alone.figures(batch_of(alone), ONE)
    assert expected["objective/scores/cost"] == 3.0
    for figures, multipliers, warned in ranks(half):
        assert figures == pytest.approx(expected) and multipliers == {1: 1.0}
        assert warned == [("applies", "no reward applies to 1 of 4 answers of step 7: their score is 0, which is "
                           "learned from as any other")]


def test_a_multiplier_follows_its_mean():
    """m <- max(0, m + 0.5 (mean - 0.2)): 0.4 above, 0.6 below, none to apply to."""
    reward = Reward([Part("cost", "c", 1.0, 0.2)], [Column()])
    for mean, expected in ((0.6, 0.2), (0.6, 0.4), (-0.2, 0.2), (-0.4, 0.0), (math.nan, 0.0), (1.2, 0.5)):
        before = reward.multipliers
        reward.follow({"objective/scores/cost": mean}, 0.5)
        assert reward.multipliers[0] == pytest.approx(expected) and before is not reward.multipliers  # saved later
    reward.restore({0: 0.25})
    assert reward.multipliers == {0: 0.25}


def test_limits_of_a_run_stay_on_their_rewards(refused):
    """How high they are may change on resume, not of what they are."""
    reward = Reward([Part("a", "a", 1.0, 0.2), Part("b", "b")], [Column(), Column()])
    for other in ({}, {1: 0.5}, {0: 1.0, 1: 0.5}):
        assert "--at_most: the run began with limits of other rewards" in refused(reward.restore, other)


@pytest.mark.parametrize("score, says", [
    ((0.1, 0.05), "mean 0.100 +- 0.050, at most 0.1: kept"),
    ((0.14, 0.05), "0.1: the limit lies within the interval; multiplier"),
    ((0.16, 0.05), "at most 0.1: not kept; more steps or a higher --multiplier_rate may; multiplier 1.500"),
    (None, "mean nan +- 0.000, at most 0.1: applies to none")])
def test_whether_a_limit_is_kept(score, says):
    reward = Reward([Part("cost", "c", 1.0, 0.1)], [Column()])
    reward.multipliers = {0: 1.5}
    (line,) = reward.kept({"parts": {"cost": {"score": score} if score else {}}})
    assert line.startswith("limit of cost: ") and says in line


def test_what_the_value_network_starts_from():
    """The first reward model that is maximised; the states below the first block that learns are another's only by what
    it shares with the policy."""
    models = [Column(model=object()) for _ in range(3)]
    reward = Reward([Part("cost", "c", 1.0, 1.0), Part("f", "f"), Part("a", "a"), Part("b", "b")],
                    [models[0], Column(), models[1], models[2]])
    assert reward.model is models[1].model and reward.source == "a" and reward.models == [m.model for m in models]
    assert [getattr(m, "below", "its own") for m in models] == ["below", "its own", "below"]
    assert Reward([Part("cost", "c", 1.0, 1.0), Part("f", "f")], [models[0], Column()]).model is None


# ---- held-out answers

def row(score, judge=1.0, **parts):
    return {"score": score, "judge": judge, "k1": 0.0, "k3": 0.0, "ref_logprob": -1.0, "length": 1, "finished": True,
            "ids": [1], "completion": "x", **{f"part {name}": value for name, value in parts.items()}}


def test_held_out_figures_of_each_by_hand():
    """Means over the answers that have a score, preferences over the pairs in which both have one."""
    base = [row(0.0, 1.0, a=1.0, b=None), row(0.0, None, a=2.0, b=0.0), row(0.0, 3.0, a=3.0, b=None)]
    rows = [row(1.0, None, a=2.0, b=5.0), row(0.0, 2.0, a=1.0, b=None), row(1.0, 4.0, a=3.0, b=None)]
    found = evaluate.summary(rows, base)
    assert found["judge_score"][0] == 3.0 and found["judge_win_rate"][0] == 1.0  # of the third alone
    assert found["parts"]["a"]["score"][0] == 2.0 and found["parts"]["a"]["win_rate"][0] == 0.5
    assert found["parts"]["b"] == {"score": (5.0, math.inf)}
    assert evaluate.summary([row(0.0, None)], [row(0.0)]).keys() & {"judge_score", "judge_win_rate", "parts"} == set()
    assert evaluate.paired_difference(rows, base, "judge")[0] == 1.0
    lines = [*evaluate.table({"before": evaluate.summary(base, base), "after": found}, "title", "SFT")]
    assert [line[:38].rstrip() for line in lines[3:8]] == [
        "  a", "    above the SFT answer's", "  b", "    above the SFT answer's", "mean score by the judge"]
    assert lines[5].split() == ["b", "0.000", "+-", "inf", "5.000", "+-", "inf"]


# ---- whole runs

def last_report(ended):
    return ended.rows()[-1]["final"]


@pytest.fixture(scope="module")
def several(tiny):
    """`tiny` with functions and columns, and a run of two reward models, a function that is left out of some, and a
    limit: what it wrote is what it said."""
    (tiny.folder / "my.py").write_text(FUNCTIONS)
    for split in ("train", "val"):
        path = tiny.folder / "data" / f"prompts.{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.with_name(f"asked.{split}.jsonl").write_text("".join(
            json.dumps(r | {"domain": ("tweets", "nyt")[i % 2]} | ({"wanted": "dfe"[i % 3]} if i % 4 else {})) + "\n"
            for i, r in enumerate(rows)))
    (tiny.folder / "asked").mkdir()
    for split in ("train", "val"):
        (tiny.folder / "data" / f"asked.{split}.jsonl").rename(tiny.folder / "asked" / f"prompts.{split}.jsonl")
    f = f"{tiny.folder}/my.py"
    words = ["--reward", "rm:1", "--reward", f"{tiny.folder}/other_rm:0.5", "--reward", f"{f}:some:0.25", "--reward",
             f"{f}:dots", "--at_most", "0.2", "--reward_clip", "0.6", "--data_dir", f"{tiny.folder}/asked",
             "--save_rollouts", "--total_episodes", "16", "--eval_interval", "2"]
    return SimpleNamespace(words=words, ended=tiny.train("ppo", *words), function=f)


def test_a_run_s_figures_are_those_of_its_answers(several):
    """Each step's means, deviations, scores and multipliers from the answers it kept, with statistics' functions."""
    ended = several.ended
    assert ended.code == 0, ended
    steps = [r for r in ended.rows() if "lr" in r]
    multiplier, rate = 0.0, train_ppo.Options.multiplier_rate
    names = ["rm", "other_rm", "some", "dots"]
    for number, record in enumerate(steps, 1):
        rows = [r for r in ended.rows("rollouts.jsonl") if r["step"] == number]
        assert len(rows) == 4 and [*rows[0]["scores"]] == names
        for name in names:
            x = [r["scores"][name] for r in rows if r["scores"][name] is not None]
            mean = record[f"objective/scores/{name}"]
            assert (mean is None) == (not x) and (not x or (mean, record[f"objective/scores_std/{name}"]) == (
                pytest.approx(statistics.fmean(x), abs=1e-6), pytest.approx(statistics.pstdev(x), abs=1e-6)))
        assert record["objective/multiplier/dots"] == pytest.approx(multiplier)
        for r in rows:
            s = r["scores"]
            assert s["dots"] == r["completion"].count(".") and (s["some"] is None) == (r["prompt"] < "b")
            assert r["score"] == pytest.approx(
                max(-0.6, min(0.6, s["rm"])) + 0.5 * max(-0.6, min(0.6, s["other_rm"])) + 0.25 * (s["some"] or 0)
                - multiplier * s["dots"], abs=1e-5)
        assert record["objective/scores"] == pytest.approx(statistics.fmean(r["score"] for r in rows), abs=1e-5)
        multiplier = max(0.0, multiplier + rate * (record["objective/scores/dots"] - 0.2))
    assert multiplier > 0 and any(r["scores"]["some"] is None for r in ended.rows("rollouts.jsonl"))
    assert f"multiplier {multiplier:.3f}" in ended.said


def test_a_run_s_log_shows_each_reward(several):
    """Before it starts, at each step, at each look, at the end: means of the file of metrics."""
    said, rows, f = several.ended.said, several.ended.rows(), several.function
    assert f"value network: from {several.ended.payload()['options']['reward_model']}; reward: " in said
    assert f" + 0.25 x {f}:some; {f}:dots at most 0.2" in said
    for r in (r for r in rows if "lr" in r):
        shown = ", ".join(f"{n} " + (f"{m:+.3f}" if (m := r[f'objective/scores/{n}']) is not None else "none")
                          for n in ("rm", "other_rm", "some", "dots"))
        assert f"({shown} x -{r['objective/multiplier/dots']:.3f})" in said
        if "eval" in r:
            assert "; ".join(f"{n} {p['score'][0]:+.3f}" if p else f"{n} applies to none"
                             for n, p in r["eval"]["parts"].items()) in said
    final = last_report(several.ended)
    for name in ("rm", "other_rm", "some", "dots"):
        line = next(line for line in said.splitlines() if line.startswith(f"  {name} "))
        assert line.split()[1:] == [word for when in ("before", "after") for word in
                                    "{:.3f} +- {:.3f}".format(*final[when]["parts"][name]["score"]).split()]
    assert f"limit of dots: mean {final['after']['parts']['dots']['score'][0]:.3f} +- " in said
    assert several.ended.payload()["options"]["reward"] == tuple(several.words[1:8:2])
    assert json.loads((several.ended.folder / "config.json").read_text())["reward"] == several.words[1:8:2]


def same(a, b):
    networks = [{k: v for k, v in e.payload()["training"].items() if k not in ("data", "optimizers")} for e in (a, b)]
    clocks = {"eps", "tokens_per_second", "rollout_seconds", "seconds", "elapsed"}
    rows = [[{k: v for k, v in r.items() if k not in clocks} for r in e.rows()] for e in (a, b)]
    model = [e.payload()["model"] for e in (a, b)]
    return (str(networks[0]) == str(networks[1]) and rows[0] == rows[1]
            and all(torch.equal(x, model[1][name]) for name, x in model[0].items()))


def test_a_run_with_a_limit_goes_on_to_the_last_bit(tiny, several):
    """Stopped after half of its steps: weights, multipliers and figures are those of the run that never stopped. The
    limit may change, and is told; on which reward it is may not."""
    constant = ["--lr_schedule", "constant"]
    same_data = ["--data_dir", f"{tiny.folder}/asked", "--total_episodes", "16"]
    straight = tiny.train("ppo", *several.words, *constant)
    half = tiny.train("ppo", *several.words, *constant, "--total_episodes", "8")
    assert half.payload()["training"]["multipliers"][3] > 0
    resumed = tiny.train("ppo", "--resume", *same_data, out=half.folder)
    assert resumed.code == 0 and same(resumed, straight), resumed
    assert resumed.payload()["training"]["multipliers"] == straight.payload()["training"]["multipliers"]
    again = tiny.train("ppo", "--resume", "--at_most", "dots:0.3", *same_data, out=half.folder)
    assert again.code == 0 and "resume: --at_most dots:0.3: this run had 0.2" in again.said
    other = tiny.train("ppo", "--resume", "--at_most", "other_rm:0.3", "--reward", "rm:1", "--reward",
                       f"{tiny.folder}/other_rm", "--reward", f"{several.function}:some:0.25", "--reward",
                       f"{several.function}:dots:1", *same_data, out=half.folder)
    assert other.code == 2 and "the run began with limits of other rewards" in other.error


def test_a_multiplier_rests_while_the_policy_does(tiny, several):
    """In the steps of --value_warmup nothing could follow it."""
    ended = tiny.train("ppo", "--reward", f"{several.function}:dots", "--at_most", "-1", "--value_warmup", "1",
                       "--total_episodes", "12")
    found = [r["objective/multiplier/dots"] for r in ended.rows() if "lr" in r]
    assert found[:2] == [0.0, 0.0] and found[2] > 0.29, ended


def test_resume_knows_the_content_of_each(tiny, several, tmp_path):
    """A function's file that has changed is told, a reward model that has is refused, whichever of several it is; a
    weight may change; another function, or one more, may not. Files may lie elsewhere."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(FUNCTIONS)
    (tmp_path / "rm").mkdir()
    model = tmp_path / "rm" / "ckpt.pt"
    model.write_bytes((tiny.folder / "other_rm" / "ckpt.pt").read_bytes())
    rewards_of = lambda folder, weight=2: ["--reward", f"{folder}/one.py:dots", "--reward",  # noqa: E731
                                           f"{folder}/two.py:length:{weight}", "--reward", f"{folder}/rm"]
    ended = tiny.train("ppo", *rewards_of(tmp_path))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("one.py", "two.py", "rm"):
        (tmp_path / name).rename(moved / name)
    go_on = lambda *words: tiny.train("ppo", "--resume", *words, out=ended.folder)  # noqa: E731
    found = go_on(*rewards_of(moved, 3))
    assert found.code == 0 and "has changed" not in found.said
    now, before = (", ".join(words[1::2]) for words in (rewards_of(moved, 3), rewards_of(tmp_path)))
    assert f"resume: --reward {now}: this run had {before}" in found.said
    (moved / "two.py").write_text(FUNCTIONS + "# changed")
    found = go_on(*rewards_of(moved))
    assert found.code == 0 and f"the reward {moved}/two.py:length has changed since" in found.said
    assert found.said.count("has changed") == 1
    (moved / "rm" / "ckpt.pt").write_bytes((tiny.folder / "rm" / "ckpt.pt").read_bytes())
    found = go_on(*rewards_of(moved))
    assert found.code == 2 and f"the reward {moved}/rm is not what the run of" in found.error
    for others in (rewards_of(moved)[:4], [*rewards_of(moved)[:2], "--reward", f"{moved}/two.py:some",
                                           *rewards_of(moved)[4:]]):
        found = go_on(*others)
        assert found.code == 2 and "which cannot change" in found.error


def test_the_reward_model_by_its_name_is_the_reward_model(tiny, several):
    """--reward rm, or its folder, trains to the last bit what no --reward trains: scores are clipped as ever. One
    function trains what the same function with a reward model of weight 0 beside it trains, from the same start."""
    plain, named, path = (tiny.train("ppo", *words, "--reward_clip", "0.3") for words in (
        [], ["--reward", "rm"], ["--reward", f"{tiny.folder}/rm"]))
    for other in (named, path):
        assert all(torch.equal(x, other.payload()["model"][k]) for k, x in plain.payload()["model"].items())
    f, value = f"{several.function}:length", ["--value_init", "sft"]
    one, both = (tiny.train("ppo", *words, *value) for words in (["--reward", f], ["--reward", f, "--reward", "rm:0"]))
    assert all(torch.equal(x, both.payload()["model"][k]) for k, x in one.payload()["model"].items())
    assert "(length" not in one.said and "(length" in both.said  # a score alone is not shown twice
    assert "--value_init has no effect" in one.said and "--value_init has no effect" not in both.said


def test_columns_reach_the_function_in_training_and_held_out(tiny, several):
    """Rollouts, looks and the closing report: each prompt with its own value, None where its record lacks it."""
    ended = tiny.train("ppo", "--reward", f"{several.function}:wanted", "--judge", f"{several.function}:wanted",
                       "--data_dir", f"{tiny.folder}/asked")
    assert ended.code == 0, ended
    records = [json.loads(line) for split in ("train", "val")
               for line in (tiny.folder / "asked" / f"prompts.{split}.jsonl").read_text().splitlines()]
    seen = {*sys.modules["my"].seen}
    assert seen <= {(r["prompt"], r.get("wanted")) for r in records} and len(seen) > 6
    assert None in {w for _, w in seen} and {"d", "e", "f"} & {w for _, w in seen}
    assert "no reward applies to" in ended.said and "their score is 0" in ended.said


def test_a_column_that_the_prompts_lack_is_refused_before_anything(tiny, several):
    """By both options; nothing is written."""
    before = tree(tiny.folder)
    for option in ("--reward", "--judge"):
        ended = tiny.train("ppo", option, f"{several.function}:wanted", out=tiny.folder / "none")
        assert ended.code == 2 and ended.error.count("\n") == 1 and (
            f"{option} {several.function}:wanted: asks for the column 'wanted', which {tiny.folder}/data lacks; the "
            "columns beside the prompt are: none") in ended.error
    assert {path for path in tree(tiny.folder)} == {*before}


HOSTILE = [("raise ValueError('boom')", "raised ValueError: boom ("), ("sys.exit(0)", "raised SystemExit: 0 ("),
           ("return [1.0]", "returned 1 scores for "), ("return [float('nan')] * len(prompts)", "row 0: nan"),
           ("return [1e9] * len(prompts)", "no number below a million"), ("return None", "returned None; expected"),
           ("return ['1'] * len(prompts)", "found str; None is for where")]


@pytest.mark.parametrize("doing, says", HOSTILE)
def test_an_error_names_its_reward(tiny, several, tmp_path, doing, says):
    """The second of three: one line, exit status 2, before training."""
    (tmp_path / "bad.py").write_text(f"import sys\ndef g(prompts, completions):\n    {doing}\n")
    ended = tiny.train("ppo", "--reward", f"{several.function}:dots", "--reward", f"{tmp_path}/bad.py:g:0.5",
                       "--reward", f"{several.function}:length", "--at_most", "length:3", out=tmp_path / "out")
    assert ended.code == 2 and ended.error.startswith(f"error: --reward {tmp_path}/bad.py:g: ") and says in ended.error
    assert ended.error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_reward_model_that_does_not_fit_is_refused(tiny, several, tmp_path):
    """An SFT model in its place; one of the run's own folder; none at all."""
    for words, says in ((["--reward", tiny.sft], "holds an SFT model, expected a reward model"),
                        (["--reward", "nowhere"], "expected FILE.py:FUNCTION, rm or")):
        ended = tiny.train("ppo", "--reward", "rm", *words, out=tmp_path / "out")
        assert ended.code == 2 and says in ended.error and not (tmp_path / "out").exists()
    ended = tiny.train("ppo", "--reward", f"{tiny.folder}/other_rm:2", "--overwrite", out=tiny.folder / "other_rm")
    assert ended.code == 2 and f"holds --reward {tiny.folder}/other_rm, which the run would replace" in ended.error


def test_check_with_several(tiny, several, tmp_path):
    """Each reward model by its name; nothing is written."""
    ended = tiny.train("ppo", *several.words, "--check", out=tmp_path / "out")
    assert ended.code == 0 and "all checks passed" in ended.said and not (tmp_path / "out").exists()
    for name in (f"{tiny.rm}", f"{tiny.folder}/other_rm"):
        assert f"ok    padding changes nothing in the reward model {name}: " in ended.said
        assert f"ok    policy and reward model {name} see the same ids" in ended.said


def test_memory_counts_every_reward_model(tiny, several):
    """One more model of the same shape: its weights, as often as it is named."""
    def weights(*words):
        return float(re.search(r"memory: weights ([\d.]+) MB", tiny.train("ppo", *words).said)[1])
    size = sum(t.numel() * 4 for t in torch.load(tiny.rm, weights_only=True)["model"].values()) / 1e6
    one = weights("--reward", "rm")
    assert weights("--reward", "rm", "--reward", f"{tiny.folder}/other_rm") - one == pytest.approx(size, rel=0.1)


def test_reward_models_that_share_blocks_score_as_they_do_alone(tiny, several, monkeypatch):
    """With adapters in the policy, states below them are computed once: each model's scores are those of a pass over
    all of its own blocks."""
    words, scored = ["--reward", f"{tiny.folder}/other_rm", "--reward", "rm:0.5", "--lora_rank", "2"], []
    learned = Reward.learned

    def looked(self, batch, clip):
        for part, name in zip(self.parts, ("other_rm", "rm")):
            model, _, _ = checkpoint.load(f"{tiny.folder}/{name}", ["rm"], "cpu")
            with torch.no_grad():
                torch.testing.assert_close(model.score(batch.tokens, batch.lengths),
                                           torch.tensor([row[part.name] for row in batch.parts]))
            scored.append(name)
        return learned(self, batch, clip)
    monkeypatch.setattr(Reward, "learned", looked)
    ended = tiny.train("ppo", *words)
    assert ended.code == 0 and scored == ["other_rm", "rm"] * 2


# ---- commands

def test_evaluate_judges_each_apart(tiny, several, tmp_path, capsys):
    """The same rewards, named once more, give the training's closing figures; a weight of 0 only looks on."""
    capsys.readouterr()
    prompts = tiny.folder / "asked" / "prompts.val.jsonl"
    common = [str(several.ended.folder), "--baseline", tiny.sft, "--reward_model", tiny.rm, "--prompts", str(prompts),
              "--num_prompts", "4", "--device", "cpu"]
    evaluate.main([*common, *several.words[:6], "--reward", f"{several.function}:dots:0", "--output",
                   str(tmp_path / "x.json")])
    found, final = json.loads((tmp_path / "x.json").read_text()), last_report(several.ended)
    for name, when in ((tiny.sft, "before"), (str(several.ended.folder), "after")):
        for key in ("parts", "score", "win_rate"):
            assert found["policies"][name][key] == json.loads(json.dumps(final[when][key]))
    assert found["reward"] == [*several.words[1:6:2], f"{several.function}:dots:0"]
    said = capsys.readouterr().out
    assert re.search(r"^verdict on .* the reward( prefers| \()", said, re.M)
    assert re.search(r"^  other_rm +-?\d", said, re.M) and re.search(r"^    above the SFT answer's +50.0%", said, re.M)


def test_evaluate_gives_columns_to_functions(tiny, several, capsys, refused):
    """As reward model and as judge, also one that applies to some answers, or to none."""
    prompts = tiny.folder / "asked" / "prompts.val.jsonl"
    common = [str(several.ended.folder), "--baseline", tiny.sft, "--num_prompts", "6", "--device", "cpu"]
    f = several.function
    evaluate.main([*common, "--reward_model", f"{f}:wanted", "--judge", f"{f}:never", "--prompts", str(prompts),
                   "--best_of", "2"])
    said = capsys.readouterr().out
    assert "by the judge" not in said and "mean score" in said
    assert re.search(r"^verdict on .* the reward function( prefers| \()", said, re.M)
    evaluate.main([*common, "--reward_model", tiny.rm, "--judge", f"{f}:wanted", "--prompts", str(prompts)])
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    said = capsys.readouterr().out
    assert "preferred by the judge" in said and any("wanted" not in r for r in rows[:6])
    assert re.search(r"^verdict on .* the reward model( prefers|.* \()", said, re.M)
    plain = tiny.folder / "data" / "prompts.val.jsonl"
    assert f"--judge {f}:wanted: asks for the column 'wanted', which {plain} lacks" in refused(
        evaluate.main, [*common, "--reward_model", tiny.rm, "--judge", f"{f}:wanted", "--prompts", str(plain)])


def test_sample_shows_a_function_s_scores(tiny, several, tmp_path, capsys, refused):
    """Beside policies, with the columns of --prompts; null where it does not apply. Alone it has nothing to score."""
    prompts, f = tiny.folder / "asked" / "prompts.val.jsonl", f"{several.function}:wanted"
    policies = [tiny.sft, str(several.ended.folder)]
    sample.main([*policies, f, "--prompts", str(prompts), "--device", "cpu", "--response_length", "3", "--output",
                 str(tmp_path / "x.jsonl")])
    asked_for = {r["prompt"]: r.get("wanted") for r in map(json.loads, prompts.read_text().splitlines())}
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(asked_for) and any(r["score"] is None for r in rows)
    for r in rows:
        w = asked_for[r["prompt"]]
        assert r["score"] == (None if w is None else float(w in r["completion"]))
    said = capsys.readouterr().out
    mean = statistics.fmean(r["score"] for r in rows if r["checkpoint"] == tiny.sft and r["score"] is not None)
    assert f"{f}: {tiny.sft} mean score {mean:.3f}" in said and " null |" in said
    sample.main([tiny.sft, f"{several.function}:never", "--prompt", "a", "--device", "cpu", "--response_length", "3"])
    assert f"{tiny.sft} applies to none" in capsys.readouterr().out
    for words in ([f], ["--reward_model", f]):
        assert f"{' '.join(words)}: asks for the column 'wanted', which the prompt lacks" in refused(
            sample.main, [tiny.sft, *words, "--prompt", "a", "--device", "cpu", "--response_length", "3"])
    assert "a function scores what policies write; name a policy too" in refused(
        sample.main, [f, "--prompts", str(prompts), "--device", "cpu"])


# ---- the reference

def test_the_commands_of_the_reference_run(tiny, several, tmp_path, monkeypatch, main):
    """Those of the section on rewards, with its file of functions, from its start to its end on small models."""
    section = (ROOT / "minirlhf" / "README.md").read_text("utf-8").partition("\n## Several rewards\n")[2]
    section = section.partition("\n## ")[0]
    blocks = re.findall(r"\n\n((?:    .*\n|\n)+)", section)
    code = [re.sub(r"^    ", "", b, flags=re.M) for b in blocks]
    (tmp_path / "my_reward.py").write_text(next(b for b in code if b.startswith("def ")))
    commands = [shlex.split(line) for b in code for line in b.replace("\\\n", " ").splitlines()
                if line.startswith(("python ", "python -m minirlhf.evaluate"))]
    for name, model in (("sft", tiny.sft), ("rm", tiny.rm), ("rm_helpful", tiny.rm),
                        ("rm_safe", f"{tiny.folder}/other_rm/ckpt.pt"), ("rm_harmful", tiny.rm)):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "ckpt.pt").write_bytes(open(model, "rb").read())
    (tmp_path / "data").mkdir()
    for name in ("sentiment", "pku"):
        (tmp_path / "data" / name).symlink_to(tiny.folder / "asked")
    monkeypatch.setattr("minirlhf.prepare.ensure", lambda folder: None)
    small = tiny.STAGES["ppo"].split() + ["--device", "cpu", "--lora_rank", "0"]
    ran = []
    folder = tmp_path / "shell" / "data" / "pku"
    folder.mkdir(parents=True)
    pair = {"prompt": "a", "chosen": 'say "chosen"', "rejected": "no", "margin": 1}
    for part in ("train", "val"):
        (folder / f"preferences.{part}.jsonl").write_text("".join(
            json.dumps(pair | {"kind": kind, "part": part}) + "\n" for kind in ("better", "safer")))
    for block in re.findall(r"^for part.*?^done$", "\n".join(code), re.M | re.S):
        subprocess.run(["bash", "-ec", block], cwd=tmp_path / "shell", check=True)
    made = {path.name: json.loads(path.read_text()) for path in folder.iterdir() if "preferences" not in path.name}
    assert made == {f"{name}.{part}.jsonl": pair | {"kind": kind, "part": part} | (
        {"chosen": "no", "rejected": pair["chosen"]} if name == "harmful" else {})
        for name, kind in (("helpful", "better"), ("safe", "safer"), ("harmful", "safer")) for part in ("train", "val")}
    for words in commands:
        if words[1] == "train_ppo.py":
            main(tmp_path, "train_ppo.py", *words[2:], *small)
        elif words[1:3] == ["-m", "minirlhf.evaluate"]:
            monkeypatch.chdir(tmp_path)
            evaluate.main([*words[3:], "--device", "cpu", "--num_prompts", "4"])
        else:
            assert words[1] == "train_rm.py" or words[2] == "minirlhf.prepare"
            continue
        ran.append(words[1])
    assert ran.count("train_ppo.py") >= 4 and ran.count("-m") >= 1
