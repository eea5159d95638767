"""The report: its figures are those of the files, what is missing it says, and no text of data or models does anything
but show. What a browser makes of it is in the slow tests."""
import base64
import hashlib
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

from browser import Browser, needs_browser
from conftest import tree
from minirlhf import chart, evaluate, report, runtime
from test_chart import contrast

VOID = ("meta", "input", "br")
EVIL = {"markup": "</p></section><b id=owned>x</b>",
        "script": "<script>window.owned = 1</script><img src=x onerror=owned=1>",
        "right to left": "\u202egnp.exe \u2066abc", "long": "x" * 10_000, "NUL": "a\x00b", "surrogate": "a\ud800b",
        "quotes": "\" onload='owned=1' `${1}`", "comment": "<!-- --!> ]]> </style></script></title>",
        "ansi": "\x1b[31mred"}
SEEN = {"right to left": r"\u202egnp.exe \u2066abc", "NUL": r"a\x00b", "surrogate": r"a\ud800b", "ansi": r"\x1b[31mred"}


class Tree(HTMLParser):
    """HTML as an ElementTree, every tag closed where it was opened."""

    def __init__(self, html):
        super().__init__()
        self.builder, self.open = ET.TreeBuilder(), []
        self.feed(html)
        assert self.open == []
        self.root = self.builder.close()

    def handle_starttag(self, tag, attributes):
        assert len({*(name for name, _ in attributes)}) == len(attributes)
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        self.builder.end(tag) if tag in VOID else self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.builder.start(tag, dict(attributes))
        self.builder.end(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)


def read(folder):
    """The page on a folder, as a tree."""
    return Tree(report.page(str(folder))).root


def words(element):
    return "".join(element.itertext())


def told(root):
    """What the page says is missing."""
    return [words(p) for p in root.iter("p") if p.get("class") == "missing"]


def table_of(root, caption):
    """The rows of the table of that caption, cells as texts."""
    found = next(t for t in root.iter("table") if words(t.find("caption")).startswith(caption))
    return [[words(cell) for cell in row] for row in found.iter("tr")]


def tooltips(root, title):
    """Those of the chart of that title."""
    figure = next(f for f in root.iter("figure") if f.get("aria-label").startswith(f"{title}:"))
    return [words(t) for t in figure.iter("title")]


def short(x):
    return str(int(x)) if x == int(x) else "%.4g" % x


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def ppo_row(step, **more):
    return {"step": step, "objective/scores": 0.1 * step, "objective/kl": 0.3 * step, "objective/kl_k3": 0.31 * step,
            "completions/mean_length": 17.0 + step, "completions/eos_rate": 0.97, "policy/entropy_avg": 4 - 0.1 * step,
            "policy/clipfrac_avg": 0.01 * step, "val/explained_variance": 0.05 * step, "loss/policy_avg": -0.01,
            "loss/value_avg": 0.2, "elapsed": 2.5} | more


def rollout(step=4, tokens=(" good", "!"), **more):
    n = len(tokens)
    return {"step": step, "prompt": "The film", "score": 1.25, "reward": 1.25, "finished": True, "length": n,
            "tokens": [*tokens], **{key: [0.1 * k - 0.3 for k in range(n)] for key in report.COLUMNS.values()},
            "ratios": [1 + 0.3 * (-1) ** k for k in range(n)]} | more


SUMMARY = {"prompts": 2, "score": [0.5, 0.1], "kl": [3.25, 0.2], "kl_k3": [3.5, 0.3], "win_rate": [0.75, 0.7, 0.8],
           "eos_rate": 0.9, "mean_length": 17.25, "distinct_2": 0.875, "repeated": 0.01,
           "ref_logprob_per_token": -4.125}


def answer(k, **more):
    return {"step": 2, "final": True, "prompt": f"prompt {k}", "completion": f" after {k}", "score": float(k % 7),
            "sft_completion": f" before {k}", "sft_score": float(k % 5)} | more


def made(folder, **files):
    """A finished PPO run as its files, each replaced by what is given: rows, or an object."""
    files = {"config": {"stage": "ppo", "data_dir": "data/mine", "total_episodes": 16, "batch_size": 8,
                        "cliprange": 0.2}, "metrics": [ppo_row(1), ppo_row(2, eval=SUMMARY),
                                                       {"step": 2, "final": {"before": SUMMARY, "after": SUMMARY},
                                                        "elapsed": 60.0}],
             "samples": [answer(k) for k in range(3)], "tokens": [rollout()]} | files
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name == "config":
            (folder / "config.json").write_text(json.dumps(content))
        else:
            write(folder / f"{name}.jsonl", content)
    return folder


@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory):
    """The three stages in one folder, PPO of 3 looks; and what PPO printed."""
    folder = tmp_path_factory.mktemp("report") / "out"
    ended = {"sft": tiny.train("sft", "--eval_interval", "2", out=folder / "sft"),
             "rm": tiny.train("rm", "--eval_interval", "2", out=folder / "rm"),
             "ppo": tiny.train("ppo", "--total_episodes", "12", "--eval_interval", "1", "--num_eval_prompts", "8",
                               "--judge", tiny.rm, "--gamma", "0.9", out=folder / "ppo")}
    assert not any(e.code for e in ended.values())
    return folder, ended


@pytest.fixture(scope="module")
def root(out):
    return read(out[0])


# ---- the figures are those of the files

CHARTS = {  # title: {line: path in a row}, and which stage
    "SFT loss": ("sft", {"training batch": ["loss"], "held out": ["eval", "all", "nats_per_token"]}),
    "Reward model's loss": ("rm", {"": ["loss"]}),
    "Score": ("ppo", {"training batch": ["objective/scores"], "held out": ["eval", "score", 0]}),
    "Preferred to the reference's answer": ("ppo", {"by the reward model": ["eval", "win_rate", 0],
                                                    "by the judge": ["eval", "judge_win_rate", 0]}),
    "KL from the reference": ("ppo", {"k1": ["objective/kl"], "k3": ["objective/kl_k3"],
                                      "held out, k1": ["eval", "kl", 0]}),
    "Length": ("ppo", {"": ["completions/mean_length"]}), "Entropy": ("ppo", {"": ["policy/entropy_avg"]}),
    "Clip fraction": ("ppo", {"": ["policy/clipfrac_avg"]}), "Value network": ("ppo", {"": ["val/explained_variance"]})}


@pytest.mark.parametrize("title", CHARTS)
def test_curves_have_the_points_of_the_metrics(out, root, title):
    """Each row of metrics.jsonl that has the figure is a point of the chart, with its step and its value; no other."""
    stage, named = CHARTS[title]
    expected = []
    for name, path in named.items():
        for row in rows_of(out[0] / stage / "metrics.jsonl"):
            value = row
            for key in path:
                value = value[key] if isinstance(value, list) or isinstance(value, dict) and key in value else None
            if value is not None and "final" not in row:
                expected.append((name, short(row["step"]), short(value)))
    found = [re.fullmatch(r"(?:(.*?), )?step (\S+): .*? (\S+)(?: \(\S+ to \S+\))?", tip).groups("")
             for tip in tooltips(root, title)]
    assert found == expected and len(found) >= 2


def test_held_out_points_have_their_intervals(out, root):
    """A mean has its half-width on either side, a share its own interval."""
    looks = [row for row in rows_of(out[0] / "ppo" / "metrics.jsonl") if "eval" in row]
    assert len(looks) == 3
    for title, key in (("Score", "score"), ("Preferred to the reference's answer", "win_rate")):
        tips = [tip for tip in tooltips(root, title) if tip.startswith(("held out", "by the reward model"))]
        for tip, row in zip(tips, looks, strict=True):
            value = row["eval"][key]
            ends = value[1:] if len(value) == 3 else [value[0] - value[1], value[0] + value[1]]
            assert tip.endswith(f"{short(value[0])} ({short(ends[0])} to {short(ends[1])})")


def test_a_mean_of_one_prompt_has_no_interval():
    """A number alone, [mean, half-width], [share, low, high]; a half-width that is null leaves the mean."""
    values = 2.0, [2.0, 0.5], [0.5, 0.25, 0.75], [2.0, None], None
    rows = [{"step": k, "x": {"y": value}} for k, value in enumerate(values)]
    assert [*report.points(rows, "x", "y")] == [chart.Point(0, 2.0), chart.Point(1, 2.0, 1.5, 2.5),
                                                chart.Point(2, 0.5, 0.25, 0.75), chart.Point(3, 2.0)]


def test_the_table_before_and_after_is_what_was_printed(out, root):
    """Each cell of the closing comparison stands so in what train_ppo.py printed, in the same order."""
    folder, ended = out
    rows = table_of(root, "Held-out prompts, with 95 % intervals: ")
    assert rows[0] == ["figure", "before", "after"] and len(rows) == 12
    printed = [line.split() for line in ended["ppo"].said.splitlines()]
    for row in rows[1:]:
        assert " ".join(row).split() in printed


def test_the_table_of_the_reward_model_is_what_was_printed(out, root):
    folder, ended = out
    printed = [line.split() for line in ended["rm"].said.splitlines()]
    rows = table_of(root, "What the reward model is worth")
    assert len(rows) > 2 and all(" ".join(row).split() in printed for row in rows[1:])
    said = next(line for line in ended["rm"].said.splitlines() if line.startswith("calibration: ECE"))
    told_here = next(words(p) for p in root.iter("p") if words(p).startswith("Calibration error"))
    assert re.findall(r"\d\.\d+", said) == re.findall(r"\d\.\d+", told_here)
    final = rows_of(folder / "rm" / "metrics.jsonl")[-1]["final"]
    assert final["verdict"] in words(root)


def test_steps_and_seconds_add_up(out, root):
    """The first table: steps done and the sum of all rows' `elapsed`, which evaluations are part of."""
    for row, stage in zip(table_of(root, "Runs")[1:], ("sft", "rm", "ppo"), strict=True):
        rows = rows_of(out[0] / stage / "metrics.jsonl")
        total = int(sum(r["elapsed"] for r in rows) + 0.5)
        assert row[0].endswith(f"/{stage}") and row[-1] == f"{total // 60}:{total % 60:02}"
        assert row[-2] == f"{rows[-1]['step']} of {rows[-1]['step']} steps"
        assert all(r["elapsed"] >= r.get("seconds", 0) >= 0 for r in rows)


def test_figures_of_steps_stand_in_tables_too(out, root):
    """For who reads no chart: each step's figures, "" where a row has none."""
    rows = rows_of(out[0] / "ppo" / "metrics.jsonl")[:-1]
    found = table_of(root, f"{out[0]}/ppo, all steps")
    assert found[0][:3] == ["step", "score", "KL, nats a response"] and len(found) == 4
    for cells, row in zip(found[1:], rows):
        assert cells[:3] == [short(row[k]) for k in ("step", "objective/scores", "objective/kl")]
        assert cells[-1] == short(row["eval"]["win_rate"][0])


def test_commands_repeat_the_runs(out, root):
    """Each stage's command with the options that are not usual, as a shell takes it; what resumes or overwrites is not
    among them."""
    lines = words(next(root.iter("pre"))).splitlines()
    assert [re.search(r"train_(\w+)\.py", line)[1] for line in lines] == ["sft", "rm", "ppo"]
    assert "--eval_interval 1" in lines[2] and "--gamma 0.9" in lines[2]
    assert not re.search("--(resume|overwrite)", " ".join(lines))


def test_the_command_of_a_pretrained_model_leaves_its_sizes_out(tmp_path):
    """The run notes the sizes of the model that it began with, which the script would refuse as options; a value of
    another kind, and an option that is unknown today, are left out too."""
    config = {"stage": "sft", "init_from": "smollm2", "n_layer": 30, "vocab_size": 49152, "family": "llama", "seed": 7,
              "block_size": 512, "batch_size": "8", "gone": 3, "resume": True, "overwrite": True}
    made(tmp_path / "sft", config=config)
    line = words(next(read(tmp_path).iter("pre")))
    assert line.split()[2:] == ["--seed", "7", "--block_size", "512"]
    for name, value in (("a", ["judge", "old"]), ("b", "judge"), ("c", 5)):  # an older run has one set
        made(tmp_path / name / "rm", config={"stage": "rm", "preferences": value})
    assert [words(next(read(tmp_path / name).iter("pre"))).split()[2:] for name in "abc"] == [
        ["--preferences", "judge", "--preferences", "old"], ["--preferences", "judge"], []]
    made(tmp_path / "sft", config=config | {"init_from": "scratch"})
    assert "--n_layer 30" in words(next(read(tmp_path).iter("pre")))


def test_the_command_has_options_that_were_given_again(tmp_path, monkeypatch):
    """All of their values, which config.json holds as a list; a run of before has one word. Trackers are left out: this
    machine may not have the package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    again = {"reward": ["rm:0.5", "my.py:cost"], "at_most": ["0.1"], "tensorboard": True, "wandb": True}
    made(tmp_path / "ppo", config={"stage": "ppo"} | again)
    assert words(next(read(tmp_path).iter("pre"))).endswith(
        "train_ppo.py --reward rm:0.5 --reward my.py:cost --at_most 0.1")
    made(tmp_path / "ppo", config={"stage": "ppo", "reward": "my.py:cost"})
    assert words(next(read(tmp_path).iter("pre"))).endswith("train_ppo.py --reward my.py:cost")
    for preferences, of in ((["preferences"], ""), ("preferences", ""),
                            (["judge", "./new.jsonl"], ", judge, ./new.jsonl")):
        made(tmp_path / "rm", config={"stage": "rm", "data_dir": "data/mine", "preferences": preferences})
        assert table_of(read(tmp_path), "Runs")[1][2] == f"data/mine{of}"
    assert "train_rm.py --data_dir data/mine --preferences judge --preferences ./new.jsonl" in words(
        next(read(tmp_path).iter("pre")))


def test_a_run_of_dpo(tmp_path):
    """Its command, its figures of training and held-out pairs, and the KL of its answers; none is missed where there is
    none."""
    eval_ = {"loss": 0.7, "rewards/accuracies": 0.625, "logps/chosen": -21.5, "logps/rejected": -22.5,
             "answers": {"kl": [0.5, 0.25]}}
    rows = [{"step": k, "epoch": k / 4, "loss": 0.75, "rewards/accuracies": 0.5, "rewards/margins": 0.125,
             "logps/chosen": -20.5, "logps/rejected": -23.5, "lr": 1e-4, "grad_norm": 2.0} for k in (1, 2)]
    rows[1]["eval"] = eval_
    config = {"stage": "dpo", "data_dir": "data/mine", "max_steps": 2, "num_train_epochs": 1, "beta": 0.3,
              "preferences": ["mine"]}
    root = read(made(tmp_path / "dpo", config=config, metrics=rows, samples=[], tokens=[]))
    assert words(next(root.iter("pre"))).endswith(
        "python -m minirlhf.dpo --data_dir data/mine --preferences mine --beta 0.3 --max_steps 2")
    assert table_of(root, "Runs")[1][:4] == [f"{tmp_path}/dpo", "DPO policy", "data/mine, mine", "2 of 2 steps"]
    assert f"{tmp_path}/dpo: held-out pairs ordered rightly 62.5%; KL 0.5 nats a response" in [
        words(p) for p in root.iter("p")]
    for title, lines in (("DPO loss", {"training batch": [0.75, 0.75], "held out": [0.7]}),
                         ("Pairs ordered rightly by the policy", {"training batch": [0.5, 0.5], "held out": [0.625]}),
                         ("KL of answers from the reference", {"": [0.5]})):
        assert [short(y) in tip for ys in lines.values() for y, tip in zip(ys, tooltips(root, title))], title
        assert len(tooltips(root, title)) == sum(map(len, lines.values())), title
    assert len(tooltips(root, "Log-probability of texts")) == 6
    assert table_of(root, f"{tmp_path}/dpo, all steps")[2] == [
        "2", *map(short, (0.75, 0.5, 0.125, -20.5, -23.5, 0.7, 0.625, -21.5, -22.5, 0.5, 1e-4, 2.0))]
    assert not any("no run of the DPO" in line for line in told(read(made(tmp_path / "other" / "ppo"))))


def test_several_rewards_are_shown_apart(tmp_path):
    """The mean of each and the multipliers of limits by step, and the closing figures of each; of one reward nothing
    more than its score."""
    rows = [ppo_row(k, **{"objective/scores/rm": 0.5 * k, "objective/scores/cost": None if k == 1 else 0.25,
                          "objective/multiplier/cost": 0.125 * k}) for k in (1, 2)]
    parts = {"rm": {"score": [1.5, 0.25], "win_rate": [0.75, 0.5, 0.875]}, "cost": {"score": [0.25, 0.125]}}
    rows.append({"step": 2, "final": {"before": SUMMARY, "after": SUMMARY | {"parts": parts}}})
    root = read(made(tmp_path / "ppo", metrics=rows))
    assert [len(tooltips(root, title)) for title in ("Each reward", "Multipliers")] == [3, 2]
    assert all(y in tip for y, tip in zip(("0.5", "1", "0.25"), tooltips(root, "Each reward")))
    assert all(y in tip for y, tip in zip(("0.125", "0.25"), tooltips(root, "Multipliers")))
    found = {row[0]: row[1:] for row in table_of(root, "Held-out prompts")}
    assert found["rm: mean score"] == ["", "1.500 +- 0.250"] and found["cost: mean score"] == ["", "0.250 +- 0.125"]
    found = table_of(root, f"{tmp_path}/ppo, all steps")
    assert [found[0][-3:], *(row[-3:] for row in found[1:3])] == [
        ["scores/rm", "scores/cost", "multiplier/cost"], ["0.5", "", "0.125"], ["1", "0.25", "0.25"]]
    one = {k: v for k, v in rows[0].items() if not k.endswith("/cost")}
    page = read(made(tmp_path / "ppo", metrics=[one]))
    assert not any(f.get("aria-label").startswith(("Each reward", "Multipliers")) for f in page.iter("figure"))


def test_answers_that_are_compared_have_no_value_network(tmp_path):
    """The share of groups that say nothing stands in its place."""
    rows = [{k: v for k, v in ppo_row(1).items() if k != "val/explained_variance"} | {"groups/equal_scores": 0.25}]
    root = read(made(tmp_path / "ppo", config={"stage": "ppo", "advantages": "rloo"}, metrics=rows))
    assert "0.25" in tooltips(root, "Groups of equal scores")[0]
    assert not any("Value network" in line for line in told(root))


def test_every_answer_is_there_with_its_scores(tmp_path):
    """The first twelve in sight, the others hidden; prompt, both answers, both scores as in samples.jsonl."""
    rows = [answer(k) for k in range(30)]
    found = [*read(made(tmp_path / "ppo", samples=rows)).iter("article")]
    assert len(found) == 30 and [("hidden" in a.keys()) for a in found] == [k >= 12 for k in range(30)]
    for a, row in zip(found, rows):
        assert words(a.find("h4")) == row["prompt"]
        assert [words(p) for p in a.iter("p")] == [row["sft_completion"], row["completion"]]
        assert [words(b) for b in a.iter("b")] == [f"before {short(row['sft_score'])}", f"after {short(row['score'])}"]
        assert (a.get("data-before"), a.get("data-after")) == (short(row["sft_score"]), short(row["score"]))


def test_of_too_many_answers_the_first_best_and_worst_stay(tmp_path, monkeypatch):
    """Where not all have room: the twelve first, best and worst are there, in the file's order, and it is said."""
    monkeypatch.setattr(report, "ANSWERS", 20_000)
    rows = [answer(k, score=float((37 * k) % 1000)) for k in range(1000)]
    root = read(made(tmp_path / "ppo", samples=rows))
    kept = [int(words(a.find("h4"))[7:]) for a in root.iter("article")]
    ranked = sorted(range(1000), key=lambda k: rows[k]["score"])
    assert kept == sorted(kept) and {*range(12), *ranked[:12], *ranked[-12:]} <= {*kept} and len(kept) < 100
    assert f"{len(kept)} of the 1000 held-out prompts are on this page" in words(root)


# ---- reliability

def test_the_reliability_diagram_is_what_the_calibration_errors_are_of():
    """sum_b n_b/n |share_b - probability_b| of the bins is each ECE; bins by hand: of the odd pairs, each second one is
    asked the other way round."""
    d = torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0, -1.0, 0.0, 0.1], dtype=torch.double)
    s = [1 / (1 + math.exp(-x)) for x in (2, -2, -1, -0.1)]  # the 1st and 3rd asked as they are, 2nd and 4th reversed
    expected = sorted([(s[0], 1.0, 1), (s[1], 0.0, 1), (s[2], 1.0, 1), (s[3], 0.0, 1)])
    found = evaluate.reliability(d)
    assert found["as_is"] == [pytest.approx(row) for row in expected]
    g = torch.Generator().manual_seed(0)
    d = torch.randn(501, generator=g, dtype=torch.double) + 0.5
    found, errors = evaluate.reliability(d), evaluate.calibration(d)
    for name, error in (("as_is", "ece"), ("with_temperature", "ece_with_temperature")):
        bins = found[name]
        assert sum(n for *_, n in bins) == 250 and all(0 <= p <= 1 and 0 <= share <= 1 for p, share, _ in bins)
        assert sum(n * abs(share - p) for p, share, n in bins) / 250 == pytest.approx(errors[error])


def test_the_reliability_diagram_on_the_page(out, root):
    """A point a bin, at the probability given and the share that was right, with Wilson's interval; by hand: 3 of 4 has
    (0.75 + 1.96^2 / 8 -+ 1.96 sqrt(0.1875 / 4 + 1.96^2 / 64)) / (1 + 1.96^2 / 4) = 0.3006 to 0.9544."""
    kept = rows_of(out[0] / "rm" / "metrics.jsonl")[-1]["final"]["reliability"]
    tips = tooltips(root, "Reliability diagram")
    assert len(tips) == sum(map(len, kept.values())) >= 2
    for tip, (given, share, n) in zip(tips, [*kept["as_is"], *kept["with_temperature"]], strict=True):
        assert f"{n} pairs" in tip
        assert f"predicted {short(given)}: share of pairs in which it was {short(share)} (" in tip
    assert [*report.reliability_points([[0.7, 0.75, 4], "x", [1, None, 2], [0.1, 0.2, 0]])] == [
        chart.Point(0.7, 0.75, pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4), name="4 pairs")]


def test_accuracy_by_margin_lies_at_the_middle_of_its_range():
    """0.5 to 1 at 0.75, "> 4" at 4; the sum over all margins above 1 is none of them, a kind may be named as a margin,
    and few pairs have no interval."""
    f = {"accuracy": 0.75, "low": 0.5, "high": 0.875, "pairs": 60}
    few = f | {"pairs": 49}
    found = report.by_margin({"all": f, "a": f, "a, margin > 4": f, "a, margin 0.5-1": f, "a, margin > 1": f,
                              "b, margin 3-x, margin 0-0.5": few, "c, margin 1-2": {"accuracy": None}})
    assert {k: [tuple(p) for p in points] for k, points in found.items()} == {
        "a": [(0.75, 0.75, 0.5, 0.875, None, None, "margin 0.5-1, 60 pairs"),
              (4.0, 0.75, 0.5, 0.875, None, None, "margin > 4, 60 pairs")],
        "b, margin 3-x": [(0.25, 0.75, None, None, None, None, "margin 0-0.5, 49 pairs")]}


# ---- answers token by token

@pytest.fixture(scope="module")
def looked(tiny):
    """A run of three looks -> what `save_tokens` was given at each, and the rows of tokens.jsonl."""
    calls, own = [], evaluate.save_tokens

    def noting(batch, policy, done, *rest):
        logits = policy.logits(policy.hidden(batch.tokens[:, :-1]))
        calls.append((batch, logits.detach().clone(), done))
        own(batch, policy, done, *rest)
    evaluate.save_tokens = noting
    try:
        ended = tiny.train("ppo", "--total_episodes", "24", "--batch_size", "8", "--eval_interval", "1",
                           "--gamma", "0.9", "--lam", "0.5", "--temperature", "0.7", "--cliprange", "0.1")
    finally:
        evaluate.save_tokens = own
    assert not ended.code and len(calls) == 3
    return calls, ended.rows("tokens.jsonl"), ended


def test_tokens_are_saved_with_what_each_paragraph_made_of_them(looked, tiny):
    """Four of eight answers a look, from the lowest score to the highest, with each column at the answer's decisions;
    KL is log p - log p_ref, the reward-to-go the discounted sum of what follows, the ratio by the updated policy's own
    softmax at the sampling temperature."""
    calls, rows, _ = looked
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for batch, logits, done in calls:
        own = [row for row in rows if row["step"] == done]
        order = sorted(range(8), key=lambda i: float(batch.scores[i]))
        for row, i in zip(own, [order[0], order[2], order[5], order[7]]):  # 0, 7/3, 14/3, 7, rounded
            start, stop = int(batch.prompt_lengths[i]), int(batch.lengths[i])
            at = range(start - 1, stop - 1)
            assert row["score"] == pytest.approx(float(batch.scores[i])) and row["length"] == stop - start == len(at)
            assert row["reward"] == pytest.approx(float(batch.final_rewards[i]))
            assert row["finished"] == bool(batch.finished[i]) and len(row["tokens"]) == len(at)
            for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
                assert row[name] == pytest.approx([float(getattr(batch, name)[i, t]) for t in at], abs=6e-5), name
            assert row["kl"] == pytest.approx([float(batch.logprobs[i, t] - batch.ref_logprobs[i, t]) for t in at],
                                              abs=6e-5)
            to_go = [sum(0.9 ** (u - t) * float(batch.rewards[i, u]) for u in range(t, stop - 1)) for t in at]
            assert row["rewards_to_go"] == pytest.approx(to_go, abs=1e-4)
            after = [float((logits[i, t] / 0.7).log_softmax(-1)[batch.tokens[i, t + 1]]) for t in at]
            assert row["ratios"] == pytest.approx(
                [math.exp(a - float(batch.logprobs[i, t])) for a, t in zip(after, at)], abs=1e-3)
    assert any(abs(r - 1) > 0.05 for row in rows for r in row["ratios"])  # the policy has moved


def test_looks_are_few_and_the_last_is_among_them(looked, monkeypatch):
    """Up to 8 looks are all kept; of 100 eight, spread evenly; of a run whose steps are no multiple of the interval the
    last step too. Another rank writes nothing."""
    (batch, _, _), *_ = looked[0]

    class Policy:
        def logprobs(self, tokens, decisions, *rest):
            return batch.logprobs.new_zeros(len(decisions)), None

    class Tokenizer:
        bytes = [b"\xff", "é".encode()[:1], b" a"] * 100

        def decode(self, ids):
            return "p"

    def kept(steps, interval, main=True):
        class Run:
            def write(self, name, row):
                assert name == "tokens.jsonl"
                rows.append(row)

            def autocast(self):
                return torch.autocast("cpu", enabled=False)
        rows, Run.main = [], main
        o = type("O", (), {"eval_interval": interval, "temperature": 1.0, "gamma": 1.0})
        for done in range(1, steps + 1):
            if done % interval == 0 or done == steps:
                evaluate.save_tokens(batch, Policy(), done, steps, Tokenizer(), o, Run())
        assert all({*row["tokens"]} <= {"\\xff", "\\xc3", " a"} for row in rows)
        return [*dict.fromkeys(row["step"] for row in rows)]

    assert kept(8, 1) == [*range(1, 9)] and kept(36, 12) == [12, 24, 36] and kept(10, 4) == [4, 8, 10]
    assert kept(100, 1) == [13, 25, 38, 50, 63, 75, 88, 100]
    assert kept(67, 4) == [12, 20, 28, 36, 44, 52, 60, 67]
    assert kept(3, 100) == [3] and kept(3, 1, main=False) == []


def test_what_is_saved_of_a_run_is_less_than_a_megabyte():
    """8 looks x 4 answers x 256 tokens, each number of 8 characters (-12.3456), tokens of 8 bytes, prompts of 2,000."""
    n = evaluate.TOKENS
    row = rollout(100000, [" wordier"] * n, prompt="x" * 2000) | {k: [-12.3456] * n for k in report.COLUMNS.values()}
    assert evaluate.TOKEN_LOOKS * evaluate.TOKEN_ROWS * len(json.dumps(row)) < 1_000_000
    assert n == 256


def test_a_resumed_run_goes_on_with_its_tokens(tiny, monkeypatch):
    """Stopped after step 2 of 4 and resumed, tokens.jsonl is that of the run that never stopped, to the last byte; what
    a kill left beyond the checkpoint, torn too, is cut."""
    options = ["--total_episodes", "16", "--eval_interval", "1"]
    straight = tiny.train("ppo", *options)
    with monkeypatch.context() as patch:
        count = iter(range(100))
        patch.setattr(runtime.Run, "should_stop", lambda run: next(count) == 1)
        patch.setattr(runtime.Run, "exit_stopped", lambda run: (_ for _ in ()).throw(SystemExit(143)))
        stopped = tiny.train("ppo", *options)
    assert stopped.code == 143 and {row["step"] for row in stopped.rows("tokens.jsonl")} == {1, 2}
    with open(stopped.folder / "tokens.jsonl", "a") as f:
        f.write('{"step": 3, "tokens": []}\n{"step": 3, "tok')
    resumed = tiny.train("ppo", *options, "--resume", out=stopped.folder)
    assert resumed.code == 0
    assert (resumed.folder / "tokens.jsonl").read_bytes() == (straight.folder / "tokens.jsonl").read_bytes()


def test_the_viewer_has_each_token_and_each_figure(looked):
    """Every answer of tokens.jsonl, the latest first; the table holds what the file holds, "" for null."""
    calls, rows, ended = looked
    root = read(ended.folder)
    sections = [*root.iter("section")]
    assert len(sections) == 12 == len(rows) and [("hidden" in s.keys()) for s in sections] == [False] + [True] * 11
    for section, row in zip(sections, rows[::-1]):
        assert words(section.find("h3")).startswith(f"Step {row['step']}: score {row['score']:.4g}, reward at")
        cells = [[words(c) for c in tr] for tr in section.iter("tr")]
        assert cells[0][2:] == [*report.COLUMNS]
        for t, line in enumerate(cells[1:]):
            assert line[0] == str(t + 1) and line[2:] == [short(row[key][t]) for key in report.COLUMNS.values()]
        spans = [words(s) for p in section.iter("p") if p.get("class") == "tokens panel" for s in p]
        assert spans == [chart.HIDDEN.sub(lambda c: c[0].encode("unicode_escape").decode(), t.replace("\n", "↵\n"))
                         for t in row["tokens"]]
    options = [[words(o) for o in s] for s in root.iter("select")][1:]
    assert options[0][0] == f"step {rows[-1]['step']}, score {rows[-1]['score']:+.2f}" and len(options[0]) == 12
    assert options[1] == ["advantage", "KL, nats", "value", "reward-to-go", "ratio after the update"]


@pytest.mark.parametrize("value, name, clip, expected", [
    (0.0, "advantage", None, "none"), (0.24, "advantage", None, "none"), (0.26, "advantage", None, "high1"),
    (-0.26, "advantage", None, "low1"), (1.0, "value", None, "high2"), (-2.0, "value", None, "low4"),
    (99.0, "KL, nats", None, "high4"), (None, "value", None, "none"),
    (1.0, "ratio after the update", 0.2, "none"), (1.21, "ratio after the update", 0.2, "high4"),
    (0.79, "ratio after the update", 0.2, "low4"), (1.19, "ratio after the update", 0.2, "high3"),
    (0.87, "ratio after the update", 0.2, "low2"), (3.0, "ratio after the update", None, "high4")])
def test_a_shade_is_a_quarter_of_the_scale(value, name, clip, expected):
    """Of a scale of 2, a quarter is 0.5, and shades begin half way; a ratio has the darkest where it is clipped,
    whatever the scale, and only there."""
    assert report.shade(value, name, 2.0, clip) == expected


def test_the_darkest_begins_where_a_twentieth_of_the_tokens_is(tmp_path):
    """Sizes 1 to 100: 95; a ratio's is its distance from 1; nothing at all: 1. The legend's ends say so."""
    row = {"kl": [(-1) ** k * float(k) for k in range(1, 101)], "ratios": [1.0 + k / 100 for k in range(1, 101)]}
    assert (report.scale([row], "kl"), report.scale([row], "ratios")) == (95.0, pytest.approx(0.95))
    assert report.scale([{"kl": [None, 0.0]}], "kl") == 1.0 == report.scale([{"kl": [None]}], "kl")
    swatches = Tree(f"<p>{report.legend('KL, nats', 2.0, 0.2)}</p>").root
    assert [(s.get("class"), words(s)) for s in swatches] == [
        ("low4", "-2"), ("low3", "-1.5"), ("low2", "-1"), ("low1", "-0.5"), ("none", "0"),
        ("high1", "0.5"), ("high2", "1"), ("high3", "1.5"), ("high4", "2")]
    assert "below 0.8" in report.legend("ratio after the update", 2.0, 0.2)
    assert ">1.5<" in report.legend("ratio after the update", 1.0, None)


def test_a_column_that_a_run_has_not_is_empty(tmp_path):
    """As the value of a run without a value network, or a figure that was not finite: no colour, an empty cell."""
    row = rollout(kl=[None, 0.5])
    del row["values"]
    root = read(made(tmp_path / "ppo", tokens=[row]))
    (section,) = root.iter("section")
    cells = [[words(c) for c in tr] for tr in section.iter("tr")]
    at = {name: k for k, name in enumerate(cells[0])}
    assert [line[at["value"]] for line in cells[1:]] == ["", ""]
    assert [line[at["KL, nats"]] for line in cells[1:]] == ["", "0.5"]
    classes = [s.get("data-c").split() for s in section.iter("span")]
    assert [c[2] for c in classes] == ["none"] * 2 and [c[1] for c in classes] == ["none", "high4"]


def test_rollouts_that_have_no_room_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROLLOUTS", 10_000)
    root = read(made(tmp_path / "ppo", tokens=[rollout(k, ["a"] * 20) for k in range(1, 9)]))
    kept = len([*root.iter("section")])
    assert 1 <= kept < 8 and f"{8 - kept} earlier answers" in words(root)
    assert [words(s.find("h3")).split(":")[0] for s in root.iter("section")][0] == "Step 8"


# ---- the frontier

def compared():
    """A frontier.json of two methods, as `minirlhf.frontier` writes it; one run failed and one row lacks the judge."""
    def row(kl, score, **more):
        return {"method": "ppo", "kl": [kl, 0.5], "score": [score, 0.125], "judge_score": [score / 2, 0.25],
                "win_rate": [0.75, 0.7, 0.8], "mean_length": 17.25, "command": "python train_ppo.py"} | more
    best = {"method": "best-of-n", "n": 4, "kl_bound": 0.64, "score": [1.0, 0.1], "judge_score": [0.9, 0.1]}
    return {"rows": {"a": row(4.0, 1.5), "b": row(0.25, 0.5), "c": {"failed": "x"}, "best-of-4": best,
                     "d": row(9.0, 2.0, judge_score=None)},
            "points": {"PPO": ["a", "b", "c", "gone", 3, "d"], "best of n": ["best-of-4"]},
            "baseline": {"score": [0.0, 0.1], "judge_score": [-0.25, 0.1]}, "findings": ["PPO is <b>first</b>.", 3]}


@pytest.mark.parametrize("where", ["frontier/frontier.json", "frontier.json"])
def test_the_frontier_is_drawn_from_its_file(tmp_path, where):
    """Each method's points at the root of their KL, from the SFT model on, with intervals on both axes: of 4 +- 0.5
    from root 3.5 to root 4.5; best-of-n at its bound; a row that failed, is not there or lacks the figure is left
    out."""
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)  # and no run beside it
    path.write_text(json.dumps(compared()))
    root = read(tmp_path)
    tips = [re.sub("root of the KL from the SFT model, nats a response", "x", tip)
            for tip in tooltips(root, "The reward model that was optimised")]
    assert tips == ["PPO, the SFT model, x 0: mean score 0", "PPO, b, x 0.5: mean score 0.5 (0.375 to 0.625)",
                    "PPO, a, x 2: mean score 1.5 (1.375 to 1.625)", "PPO, d, x 3: mean score 2 (1.875 to 2.125)",
                    "best of n, the SFT model, x 0: mean score 0",
                    "best of n, best-of-4, x 0.8: mean score 1 (0.9 to 1.1)"]
    assert len(tooltips(root, "A judge that looks on")) == 5
    point = report.at_kl(compared()["rows"]["a"], "score", "a")
    assert (point.left, point.right) == (pytest.approx(math.sqrt(3.5)), pytest.approx(math.sqrt(4.5)))
    assert report.at_kl(compared()["rows"]["b"], "score", "b").left == 0  # 0.25 - 0.5 is no KL
    cells = table_of(root, f"The points of {path}")
    assert [row[:5] for row in cells[1:]] == [
        ["PPO", "a", "4", "1.500 +- 0.125", "75.0% (70.0%-80.0%)"],
        ["PPO", "b", "0.25", "0.500 +- 0.125", "75.0% (70.0%-80.0%)"],
        ["PPO", "d", "9", "2.000 +- 0.125", "75.0% (70.0%-80.0%)"],
        ["best of n", "best-of-4", "<= 0.64", "1.000 +- 0.100", ""]]
    assert "PPO is <b>first</b>." in [words(p) for p in root.iter("p")]


@pytest.mark.parametrize("content, says", [
    (None, "frontier.json is missing"), ("{", "is no JSON"), ("[]", "is no JSON object"),
    ("{}", "holds no rows and points"), ('{"rows": [], "points": {}}', "holds no rows and points")])
def test_a_frontier_that_cannot_be_read_is_left_out(tmp_path, content, says):
    """A line says so, and the rest of the page stands; rows and points of another kind are no traceback."""
    made(tmp_path / "ppo")
    if content is not None:
        (tmp_path / "frontier.json").write_text(content)
    assert any(line.startswith("No frontier: ") and says in line for line in told(read(tmp_path)))
    (tmp_path / "frontier.json").write_text(json.dumps({
        "rows": {"a": 3, "b": {"kl": [1, "x"]}}, "points": {"PPO": ["a", "b"], "x": 3}, "baseline": [],
        "findings": "f"}))
    assert any("The reward model that was optimised" in line for line in told(read(tmp_path)))


# ---- what is missing is said

def test_a_stage_that_was_not_run_is_named(tmp_path, out):
    """One stage alone: the page stands, and says of each of the others that there is none."""
    shutil.copytree(out[0] / "sft", tmp_path / "sft", ignore=shutil.ignore_patterns("*.pt"))
    found = told(read(tmp_path))
    assert all(any(f"no run of the {name}" in line for line in found) for name in ("reward model", "PPO policy"))
    assert any("SFT loss" in f.get("aria-label") for f in read(tmp_path / "sft").iter("figure"))


@pytest.mark.parametrize("change, says", [
    ({"metrics": [ppo_row(1)], "samples": [], "tokens": []},
     ["no answers before and after", "no answers token by token"]),
    ({"metrics": []}, ["Score: ", "Entropy: "]),
    ({"metrics": [{"step": 1, "objective/scores": 0.5}]}, ["Entropy: ", "KL from the reference: "]),
    ({"tokens": [{"step": 1}]}, ["no answers token by token"]),
    ({"tokens": [rollout(logprobs=[0.1])]}, ["no answers token by token"]),
    ({"tokens": [rollout(values=["x", 1])]}, ["no answers token by token"]),
    ({"samples": [{"step": 1, "final": True, "prompt": "p"}]}, ["no answers before and after"]),
    ({"config": ["no object"]}, ["config.json is no JSON object"]),
    ({"metrics": [{"step": 1, "final": {"before": [], "after": 3}}, ppo_row(2, eval="x")]}, ["Preferred"])])
def test_runs_that_are_half_done_or_of_another_version(tmp_path, change, says):
    """Missing rows, fields and files, and values of another kind: no traceback, and the page names what it lacks."""
    found = told(read(made(tmp_path / "ppo", **change)))
    for words_ in says:
        assert any(words_ in line for line in found), (words_, found)


def test_files_that_are_torn_missing_or_no_files(tmp_path):
    """A torn last line is left out and said; so is a line in the middle that is none; a folder in a file's place and no
    files at all are named; numbers that are no numbers are gaps."""
    folder = made(tmp_path / "ppo", metrics=[ppo_row(1), ppo_row(2) | {"objective/scores": "NaN", "elapsed": None}])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "objective/sc')
    root = read(folder)
    assert any("torn" in line for line in told(root)) and len(tooltips(root, "Entropy")) == 2
    assert len(tooltips(root, "Score")) == 1
    (folder / "metrics.jsonl").write_text('[1]\n{"step": true}\n\n{"no": 1}\n' + json.dumps(ppo_row(1)) + "\nnull\n")
    assert any("4 lines are no rows and are left out, the first is 1." in line for line in told(read(folder)))
    (folder / "metrics.jsonl").write_text("{torn}\n" + json.dumps(ppo_row(1)) + "\n")
    assert any("1 line is no row and is left out: 1." in line for line in told(read(folder)))
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    (folder / "config.json").write_bytes(b"\xff{")
    found = told(read(folder))
    assert any("config.json is no JSON." in line for line in found) and any("has not logged a step" in x for x in found)
    (folder / "samples.jsonl").write_text("[" * 100_000 + "\n")
    assert any("samples.jsonl" in line for line in told(read(folder)))


@pytest.mark.parametrize("stage", report.STAGES)
@pytest.mark.parametrize("value", [None, 3, "x", [], [[1]], {}, {"all": 3}, {"figures": [1], "after": "x"}, True])
def test_values_of_any_other_kind_are_no_traceback(tmp_path, stage, value):
    """In the place of each thing that rows and options hold."""
    made(tmp_path / stage, config={"stage": stage, "data_dir": value, "total_episodes": value, "cliprange": value},
         metrics=[{"step": 1, "loss": value, "eval": value, "elapsed": value}, {"step": 1, "final": value},
                  {"step": 2, "final": {"figures": {"a": value}, "calibration": value, "reliability": value,
                                        "verdict": value, "before": value,
                                        "after": {"score": value, "prompts": value}}}],
         samples=[answer(1, score=value), answer(2, prompt=value), {"step": 1, "final": value}],
         tokens=[rollout() | {"tokens": value}, rollout() | {"prompt": value}, rollout() | {"score": value}])
    (tmp_path / "frontier.json").write_text(json.dumps({"rows": {"a": value, "b": {"kl": value, "score": value}},
                                                        "points": {"m": ["a", "b"], "n": value}, "findings": value}))
    assert len([*read(tmp_path).iter("h2")]) == 5


def test_an_older_run_without_clock_tells_its_steps_alone(tmp_path):
    """No `elapsed`: the sum of its steps' seconds, called that; neither: not recorded."""
    rows = [{k: v for k, v in ppo_row(k).items() if k != "elapsed"} | {"seconds": 40.0} for k in (1, 2, 3)]
    assert table_of(read(made(tmp_path / "ppo", metrics=rows)), "Runs")[1][-1] == "2:00 in steps"
    for row in rows:
        del row["seconds"]
    assert table_of(read(made(tmp_path / "ppo", metrics=rows)), "Runs")[1][-1] == "not recorded"


@pytest.mark.parametrize("stage, options, rows, expected", [
    ("sft", {"num_train_epochs": 1.5, "max_steps": 0}, [{"step": 4, "epoch": 0.4}], "4 of 15 steps, not finished"),
    ("sft", {"num_train_epochs": 4, "max_steps": 12}, [{"step": 12, "epoch": 1.2}], "12 of 12 steps"),
    ("sft", {"num_train_epochs": 0.01, "max_steps": 0}, [{"step": 1, "epoch": 0.1}], "1 of 1 steps"),
    ("sft", {"num_train_epochs": 1, "max_steps": 0}, [{"step": 1e99, "epoch": 1e-300}], "1e+99 steps"),
    ("ppo", {"total_episodes": 1e99, "batch_size": 1e-300}, [{"step": 7}], "7 steps, not finished"),
    ("sft", {}, [{"step": 4, "epoch": 0.4}], "4 steps"), ("sft", {"max_steps": "x"}, [], "0 steps"),
    ("rm", {"num_train_epochs": 1, "max_steps": 5}, [{"step": 5, "epoch": 0.5}], "5 of 5 steps, not finished"),
    ("rm", {"num_train_epochs": 1, "max_steps": 5}, [{"step": 5, "epoch": 0.5}, {"step": 5, "final": {"figures": {}}}],
     "5 of 5 steps"),
    ("ppo", {"total_episodes": 100, "batch_size": 8}, [{"step": 7}], "7 of 13 steps, not finished"),
    ("ppo", {"total_episodes": 100, "batch_size": 0}, [{"step": 7}, {"step": 7, "final": {"after": {}}}], "7 steps")])
def test_how_far_a_run_is(stage, options, rows, expected):
    """As the scripts count steps: epochs rounded, one at least, max_steps at most; batches rounded up. A reward model
    and a policy are finished with their closing figures, an SFT model with its last step."""
    assert report.progress(report.Run("", stage, options, rows, [], [], [])) == expected


def test_of_several_runs_of_a_stage_the_one_of_its_name_is_shown(tmp_path):
    """All are in the first table; in full: out/ppo, or where there is none the latest."""
    for name in ("alone", "ppo", "zeta"):
        made(tmp_path / name)
    os.utime(tmp_path / "ppo" / "metrics.jsonl", (1, 1))
    os.utime(tmp_path / "zeta" / "metrics.jsonl", (2, 2))
    root = read(tmp_path)
    assert [row[0] for row in table_of(root, "Runs")[1:]] == [str(tmp_path / n) for n in ("alone", "ppo", "zeta")]
    assert f"PPO policy: {tmp_path / 'ppo'}" in [words(h) for h in root.iter("h3")]
    shutil.rmtree(tmp_path / "ppo")
    assert f"PPO policy: {tmp_path / 'alone'}" in [words(h) for h in read(tmp_path).iter("h3")]


# ---- text is text

@pytest.mark.parametrize("name", EVIL)
def test_no_text_does_anything_but_show(tmp_path, name):
    """In prompts, answers, tokens, kinds, options and the folder's name: the page has the elements that it has with
    harmless text, and the text is there as it can be seen; of a long one the beginning, and how much more."""
    def page(value, folder):
        write(folder / "sft" / "metrics.jsonl", [{"step": 1, "loss": 2.0, "eval": {value: {"bits_per_byte": 1.0}}}])
        (folder / "sft" / "config.json").write_text(json.dumps({"stage": "sft", "data_dir": value, "init_from": value}))
        made(folder / "ppo", samples=[answer(0, prompt=value, completion=value, sft_completion=value)],
             tokens=[rollout(tokens=[value[:40], "!"], prompt=value)],
             config={"stage": "ppo", "data_dir": value, "init_from": value, "reward": value, "cliprange": value})
        return report.page(str(folder))

    value = EVIL[name]
    inside = "".join(c for c in value if c not in "/\x00" and not "\ud800" <= c <= "\udfff")[:100]
    harmless, evil = page("harmless", tmp_path / "harmless"), page(value, tmp_path / inside)
    evil.encode()  # no lone surrogate
    root = Tree(evil).root
    def shape(html):
        return [(e.tag, sorted(e.keys())) for e in Tree(html).root.iter()]
    assert shape(evil) == shape(harmless)[:len(shape(evil))] or name == "long"  # which has "more characters"
    seen = SEEN.get(name, value)
    article = next(root.iter("article"))
    if name == "long":
        assert words(article.find("h4")) == "x" * 2000 + " (8,000 more characters)"
    else:
        assert words(article.find("h4")) == seen
        assert [words(p) for p in article.iter("p")] == [seen] * 2
        assert seen[:40] in next(words(p) for p in root.iter("p") if p.get("class") == "tokens panel")
        assert seen in words(next(root.iter("table")))
    assert not chart.HIDDEN.search(evil)


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(root, out):
    """No address, no event handler, no style attribute; the security policy is that of this one script and style, by
    their hashes; links lead into the page."""
    html = report.page(str(out[0]))
    assert not re.search(r"https?:", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    for element in root.iter():
        assert not [k for k in element.keys() if k.startswith("on") or k in ("style", "src", "srcset", "action")]
        assert element.get("href", "#").startswith("#")
        assert "href" not in element.keys() or [e for e in root.iter() if e.get("id") == element.get("href")[1:]]
    policy = next(m.get("content") for m in root.iter("meta") if m.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for kind, tag in (("style", "style"), ("script", "script")):
        (element,) = root.iter(tag)
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "base-uri 'none'" in policy


# ---- for who does not see or point

def test_structure_that_a_screen_reader_needs(root):
    """A language, one h1, headings without a jump, ids once, a name for each control, chart, region and table."""
    assert root.get("lang") == "en" and len([*root.iter("h1")]) == 1 and len([*root.iter("main")]) == 1
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch("h[1-6]", e.tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len({*ids})
    for element in root.iter():
        if element.get("tabindex"):
            assert element.get("aria-label") and element.get("role") in ("region", "group")
        if element.tag == "svg":
            assert element.get("role") == "img" and element.get("aria-label")
        if element.tag == "table":
            assert words(element.find("caption"))
    for tag in ("select", "input"):
        for element in root.iter(tag):
            assert [label for label in root.iter("label") if element in [*label]]
    assert all(words(b).strip() for b in root.iter("button"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_the_page_s_own_style(root, scheme):
    """As the page's style sheet has them: every pair of text and ground that a rule sets is 4.5 or more."""
    style = next(root.iter("style")).text
    blocks = re.findall(r":root \{(.*?)\}", style)
    palette = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme == "dark"]))
    grounds = {*re.findall(r"background: var\(--(\w+)\)", style)} - {"ink"}
    texts = {*re.findall(r"[{;\s](?:color|fill): var\(--(\w+)\)", style)} - {"paper"}
    assert {"paper", "panel", "low4", "high4"} <= grounds and {"ink", "faint", "line0"} <= texts
    for ground in grounds:
        for name in texts if ground in ("paper", "panel") else {"ink"}:
            assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
    assert contrast(palette["paper"], palette["ink"]) >= 4.5
    assert contrast(palette["focus"], palette["paper"]) >= 4.5


# ---- size

@pytest.mark.parametrize("letter", "c\u8a9e")
def test_a_page_of_large_runs_is_less_than_a_megabyte(tmp_path, letter):
    """All three stages of 2,000 steps whose figures go up and down, 500 answers of 3,000 characters, of which one may
    take three bytes, tokens as many as a run can leave."""
    n, rows = evaluate.TOKENS, range(1, 2001)

    def figures(names, k):
        return {name: (7919 * k + 31 * j) % 1009 / 1009 for j, name in enumerate(names)}
    made(tmp_path / "ppo", metrics=[ppo_row(k) | figures([p[0] for p in report.PPO_COLUMNS.values() if len(p) == 1], k)
                                    for k in rows],
         samples=[answer(k, **{name: letter * 3000 for name in ("prompt", "completion", "sft_completion")})
                  for k in range(500)],
         tokens=[rollout(k, [letter * 7] * n) for k in range(1, 33)])
    made(tmp_path / "rm", config={"stage": "rm"}, metrics=[
        {"step": k} | figures(["loss", "accuracy"], k) for k in rows])
    made(tmp_path / "sft", config={"stage": "sft"}, metrics=[
        {"step": k, "eval": {kind: figures(["nats_per_token", "bits_per_byte"], k) for kind in ("all", *"abcdefgh")}}
        | figures(["loss", "lr"], k) for k in rows])
    assert len(report.page(str(tmp_path)).encode()) < 1_000_000


def test_many_steps_are_drawn_by_their_extremes_and_listed_evenly():
    """Rows at most a hundred, the first and the last among them."""
    assert report.evenly([*range(100)]) == [*range(100)]
    found = report.evenly([*range(1000)])
    assert len(found) == 100 and (found[0], found[-1]) == (0, 999) and found == sorted({*found})


# ---- the command

def test_the_command_writes_beside_the_runs_or_where_it_is_told(tmp_path, ran, monkeypatch):
    """report.html in the folder; what was there of it is replaced; the same page each time."""
    made(tmp_path / "out" / "ppo")
    said = ran(tmp_path, "minirlhf.report", "out").out
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert said == f"written: out/report.html\n{len(html.encode()):,} bytes; open it in a browser\n"
    assert html == report.page("out") and html.endswith("</html>\n")
    ran(tmp_path, "minirlhf.report", "out", "--output", "mine.html")
    assert (tmp_path / "mine.html").read_text("utf-8") == html
    ran(tmp_path, "minirlhf.report")  # out by default, once more
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "out" / "report.html").read_text("utf-8") == html


@pytest.mark.parametrize("argv, says", [
    (["nowhere"], "nowhere: is no folder"), (["file.txt"], "file.txt: is no folder"),
    (["empty"], "empty: holds no run"),
    (["out", "--output", "file.txt"], "file.txt: exists and is no .html file"),
    (["out", "--output", "no/r.html"], "there is no folder no"),
    (["out", "--output", "out/ppo/metrics.jsonl"], "metrics.jsonl"), (["out", "--output", "out"], "--output out: ")])
def test_what_is_refused_leaves_nothing(tmp_path, declined, argv, says):
    """One line that names the folder or file, exit status 2, and no file made or changed."""
    made(tmp_path / "out" / "ppo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    assert says in declined(tmp_path, "minirlhf.report", *argv)


def test_the_runs_are_as_they_were(tmp_path, ran):
    """Reading changes nothing of them."""
    made(tmp_path / "out" / "ppo")
    before = tree(tmp_path)
    ran(tmp_path, "minirlhf.report", "out", "--output", "r.html")
    after = tree(tmp_path)
    after.pop(tmp_path / "r.html")
    assert after == before


# ---- in a browser

IN_SIGHT = "const seen = e => e.checkVisibility() && e.getClientRects().length > 0;"
OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBBox()]), box = svg.viewBox.baseVal;
  texts.forEach(([a, p], i) => {
    if (p.x < -1 || p.y < -1 || p.x + p.width > box.width + 1 || p.y + p.height > box.height + 1)
      found.push([a, "out"]);
    for (const [b, q] of texts.slice(i + 1))
      if (p.x + p.width > q.x + 1 && q.x + q.width > p.x + 1 && p.y + p.height > q.y + 3 && q.y + q.height > p.y + 3)
        found.push([a, b]);
  });
}
return found;
"""


@pytest.fixture(scope="module")
def seen(out, looked, tmp_path_factory):
    """A browser, and the address of a page with all that a page can have."""
    folder = tmp_path_factory.mktemp("seen")
    for name in ("sft", "rm", "ppo"):
        shutil.copytree(out[0] / name, folder / name, ignore=shutil.ignore_patterns("*.pt"))
    with open(folder / "ppo" / "samples.jsonl", "a") as f:
        f.writelines(json.dumps(answer(k)) + "\n" for k in range(30))
    shutil.copy(looked[2].folder / "tokens.jsonl", folder / "ppo")
    with Browser() as browser:
        yield browser, f"file://{page_of(folder)}"


def page_of(folder):
    path = folder / "report.html"
    path.write_text(report.page(str(folder)), "utf-8")
    return path


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme, palette", [("light", chart.LIGHT), ("dark", chart.DARK)])
@pytest.mark.parametrize("width, zoom", [(1440, 1), (800, 1), (390, 1), (1280, 2), (780, 2)])
def test_the_page_in_every_width_and_light(seen, scheme, palette, width, zoom):
    """No console message, nothing wider than the window, no text of a chart over another or outside; ground and text
    have the palette's colours."""
    browser, url = seen
    browser.resize(width, 900, zoom)
    browser.scheme(scheme)
    browser.open(url)
    assert browser.console() == [] and browser.overflow() <= 0 and browser.run(OVERLAPS) == []
    found = browser.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert found == [f"rgb({', '.join(str(int(palette[name][i:i + 2], 16)) for i in (1, 3, 5))})"
                     for name in ("paper", "ink")]
    assert browser.run("return innerWidth") == width / zoom


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", EVIL)
def test_hostile_text_in_a_browser(seen, tmp_path, name):
    """It does nothing, is as wide as the window, and prints nothing on the console."""
    browser, _ = seen
    value = EVIL[name]
    folder = made(tmp_path / "ppo", samples=[answer(0, prompt=value, completion=value, sft_completion=value)],
                  tokens=[rollout(tokens=[value[:40], "!"], prompt=value)], config={"stage": "ppo", "data_dir": value})
    browser.resize(390, 900)
    browser.open(f"file://{page_of(folder)}")
    assert browser.console() == [] and browser.overflow() <= 0
    assert browser.run("return [window.owned, document.getElementById('owned')]") == [None, None]
    assert browser.run("return document.querySelectorAll('article').length") == 1


@pytest.mark.slow
@needs_browser
def test_every_control_has_a_name_and_is_reached_by_keys(seen):
    """Tab goes to every control and region in sight, each with a ring around it and, in the browser's accessibility
    tree, a name."""
    browser, url = seen
    browser.resize(1440, 900)
    browser.scheme("light")
    browser.open(url)
    nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    focusable = [n for n in nodes if not n["ignored"] and any(
        p["name"] == "focusable" and p["value"]["value"] for p in n.get("properties", ()))
        and n["role"]["value"] != "RootWebArea"]
    assert len(focusable) > 20
    assert [n["role"]["value"] for n in focusable if not n.get("name", {}).get("value")] == []
    expected = browser.run(IN_SIGHT + """return [...document.querySelectorAll(
        "a, button:not([disabled]), select, input, summary, [tabindex]")].filter(seen).length""")
    reached = []
    for _ in range(expected):
        browser.press("Tab")
        width, tag = browser.run("""const e = document.activeElement, s = getComputedStyle(e);
            return [s.outlineStyle == "none" ? 0 : parseFloat(s.outlineWidth), e.tagName]""")
        assert width >= 2 and tag != "BODY", reached
        reached.append(tag)
    assert {"A", "SELECT", "INPUT", "BUTTON", "FIGURE", "SUMMARY", "P", "DIV"} == {*reached}


@pytest.mark.slow
@needs_browser
def test_charts_are_read_by_keys_and_by_the_mouse(seen):
    """Arrow keys go from point to point and stay within them; the mouse reads the point that it is nearest to."""
    browser, url = seen
    browser.resize(1440, 900)
    browser.open(url)
    browser.run("""window.figure = [...document.querySelectorAll("figure")].find(
        f => f.getAttribute("aria-label").startsWith("Score")); figure.id = "score"; figure.focus()""")
    tips = browser.run("return [...figure.querySelectorAll('title')].map(t => t.textContent)")
    read = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "End", "ArrowRight", "Home"):
        browser.press(key)
        read.append(browser.run("return figure.querySelector('output').textContent"))
    assert len(tips) == 6 and read == [tips[k] for k in (0, 1, 0, 0, 5, 5, 0)]
    assert browser.run("return figure.querySelectorAll('.now').length") == 1
    browser.run("figure.querySelectorAll('path:has(title)')[2].id = 'third'")
    browser.point("#third", dx=2, dy=-2)
    assert browser.run("return figure.querySelector('output').textContent") == tips[2]
    assert browser.console() == []


@pytest.mark.slow
@needs_browser
def test_answers_are_ordered_filtered_and_shown(seen):
    """By keys: twelve, twelve more; the best, the worst, the most gained first; those that hold some words."""
    browser, url = seen
    browser.resize(1440, 900)
    browser.open(url)

    def shown():
        return browser.run(IN_SIGHT + """return [...document.querySelectorAll("article")].filter(seen).map(
            a => [a.querySelector("h4").textContent, Number(a.dataset.before), Number(a.dataset.after)])""")

    total = browser.run("return document.querySelectorAll('article').length")
    assert total > 30 and len(first := shown()) == 12
    assert browser.run("return document.querySelector('#count').textContent") == f"12 of {total} shown"
    browser.run("document.querySelector('#more').focus()")
    browser.press("Enter")
    assert len(shown()) == 24 and shown()[:12] == first
    browser.run("document.querySelector('#order').focus()")
    for key in (lambda row: -row[2], lambda row: row[2], lambda row: row[1] - row[2], lambda row: row[2] - row[1]):
        browser.press("ArrowDown")
        found = shown()
        assert len(found) == 12 and [key(row) for row in found] == sorted(map(key, found))
        everything = browser.run("""return [...document.querySelectorAll("article")].map(
            a => [0, Number(a.dataset.before), Number(a.dataset.after)])""")
        assert key(found[0]) == min(map(key, everything))
    browser.run("document.querySelector('#filter').focus()")
    browser.press(*"PROMPT 1")
    assert {row[0] for row in shown()} <= {"prompt 1", *(f"prompt {k}" for k in range(10, 20))} and len(shown()) == 11
    browser.press(*"xyz")
    assert shown() == [] and browser.run("return document.querySelector('#count').textContent") == "0 of 0 shown"
    assert browser.console() == []


@pytest.mark.slow
@needs_browser
def test_tokens_are_coloured_and_read(seen, looked):
    """By keys: another answer, another measure whose shades and legend are its own; from token to token, each with its
    figures read out and its row marked; a click on a token does the same."""
    browser, url = seen
    browser.resize(1440, 900)
    browser.open(url)
    rows = looked[1][::-1]
    browser.run("document.querySelector('#answer').focus()")
    browser.press("ArrowDown")
    row = rows[1]
    assert browser.run(IN_SIGHT + "return [...document.querySelectorAll('section')].findIndex(seen)") == 1
    scales = {name: report.scale(rows, key) for name, key in report.MEASURES.items()}
    browser.run("document.querySelector('#measure').focus()")
    for k, (name, key) in enumerate(report.MEASURES.items()):
        found = browser.run("return [...document.querySelectorAll('section:not([hidden]) .tokens span')].map("
                            "s => s.className)")
        assert found == [report.shade(v, name, scales[name], 0.2) for v in row[key]], name
        assert browser.run("return [...document.querySelectorAll('.legend')].findIndex(l => !l.hidden)") == k
        browser.press("ArrowDown")
    browser.run("document.querySelector('section:not([hidden]) .tokens').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    told_here = browser.run("return document.querySelector('section:not([hidden]) output').textContent")
    assert told_here.startswith(f"token 1 of {len(row['tokens'])} ")
    assert told_here.endswith("; ".join(f"{name} {short(row[key][0])}" for name, key in report.COLUMNS.items()))
    assert browser.run("return [...document.querySelectorAll('section:not([hidden]) tbody tr')].map("
                       "r => r.className == 'now')") == [True] + [False] * (len(row["tokens"]) - 1)
    browser.point("section:not([hidden]) .tokens span:last-child", click=True)
    assert browser.run("return document.querySelector('section:not([hidden]) output').textContent").startswith(
        f"token {len(row['tokens'])} of ")
    assert browser.console() == []


@pytest.mark.slow
@needs_browser
def test_the_page_on_paper(seen):
    """Printed from a dark screen: light, without controls, and no wider than the sheet."""
    browser, url = seen
    browser.resize(720, 1000)
    browser.open(url)
    browser.scheme("dark", "print")
    try:
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.run(IN_SIGHT + "return [...document.querySelectorAll('.controls, button')].filter(seen).length"
                           ) == 0
        pdf = base64.b64decode(browser.devtools("Page.printToPDF", printBackground=True)["data"])
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    finally:
        browser.scheme("light")
