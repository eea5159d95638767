"""`python -m minirlhf.frontier`: what it runs, keeps, measures and says, on models of one narrow layer. Its runs happen
in this process, but for one test with real ones."""
import contextlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from conftest import ROOT, Tiny
from minirlhf import checkpoint, evaluate, frontier, runtime
from minirlhf.frontier import METHODS, Method, Options, Runner

TINY = """\
device = "cpu"
dtype = "float32"
lora_rank = 0
[sft]
init_from = scratch
n_layer = 1
n_head = 2
n_embd = 8
vocab_size = 260
block_size = 12
batch_size = 16
num_train_epochs = 12
learning_rate = 0.05
muon_learning_rate = 0.1
response_length = 4
eval_interval = 100
[rm]
batch_size = 4
num_scale_samples = 4
response_length = 4
[ppo]
total_episodes = 8
batch_size = 4
response_length = 3
num_eval_prompts = 2
num_mini_batches = 2
value_warmup = 0
micro_batch_size = 4
[dpo]
batch_size = 4
max_steps = 2
response_length = 3
num_eval_prompts = 2
"""
FEW = {"ppo": Method("train_ppo.py", "kl_coef", (0.01, 0.1), 0.1, (1e-3, 3e-3, 1e-2), ()),
       "rloo": Method("train_ppo.py", "kl_coef", (0.1,), 0.1, (3e-3, 1e-2),
                       ("--advantages", "rloo", "--group_size", "2")),
       "dpo": Method("minirlhf.dpo", "beta", (0.1, 1.0), 0.1, (3e-3, 1e-2), ()),
       "dpo-on-policy": Method("minirlhf.dpo", "beta", (0.1,), 0.1, (3e-3, 1e-2), ()), "best-of-n": None}
ALL = "ppo,rloo,dpo,dpo-on-policy,best-of-n"
START = ["--data_dir", "data", "--num_prompts", "6", "--jobs", "1"]


class Process:
    """In place of subprocess.Popen: a command that runs here, to its end."""
    calls, before = [], None  # before: called with the number of the call

    def __init__(self, argv, **settings):
        program, words = (argv[2], argv[3:]) if argv[1] == "-m" else (os.path.basename(argv[1])[:-3], argv[2:])
        self.calls.append((program, words))
        out, self.status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                if Process.before:
                    Process.before(len(self.calls))
                importlib.import_module(program).main(words)
            except SystemExit as stop:
                self.status = stop.code if isinstance(stop.code, int) else 1
                out.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
        if "stdout" in settings:
            settings["stdout"].write(out.getvalue().encode())
        self.threads = settings.get("env", {}).get("OMP_NUM_THREADS")

    def wait(self):
        return self.status

    poll = wait

    def send_signal(self, number):
        pass


@contextlib.contextmanager
def here(folder):
    """Frontiers of tiny runs in a folder, within this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(frontier, "PRESET", "@tiny.toml")
        patch.setattr(frontier, "METHODS", FEW)
        patch.setattr(frontier, "BEST_OF", (1, 2, 4))
        patch.setattr(frontier.subprocess, "Popen", Process)
        patch.setattr(os, "fsync", lambda number: None)
        patch.setattr(evaluate.accuracy_with_interval, "__defaults__", (0, 8))
        patch.setattr(Process, "calls", [])
        patch.setattr(Process, "before", None)
        yield patch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder whose frontier has been run, and what was run."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "data").mkdir()
    Tiny.write_data(folder / "data", other=False)
    lines = [json.dumps({"prompt": a + b}) + "\n" for a in "abcdefgh" for b in "abcde"]
    (folder / "data" / "prompts.train.jsonl").write_text("".join(lines))
    (folder / "tiny.toml").write_text(TINY)
    with here(folder):
        frontier.main(START)
        return folder, [*Process.calls]


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to work in."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    with here(tmp_path):
        yield tmp_path


def state(folder):
    return json.loads((folder / "out/frontier/frontier.json").read_text("utf-8"))


def timeless(rows):
    return {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in rows.items()}


def options(**changes):
    return types.SimpleNamespace(**{name: getattr(Options, name) for name in Options.__dataclass_fields__} | changes)


# ---- learning rates

def scored(scores, o, kl=0.0):
    """Rows of ppo at the middle kl_coef: {learning rate: score}, None for a run that failed."""
    rows = {}
    for rate, score in scores.items():
        job = frontier.job_of("ppo", METHODS["ppo"].middle, rate, 1337, o)
        rows[job.name] = job.row | ({"failed": "error"} if score is None else {"score": [score, 0], "kl": [kl, 0]})
    return rows


@pytest.mark.parametrize("scores, tried, best", [
    ({}, [1e-4, 3e-4, 1e-3], None), ({1e-4: 1, 3e-4: 2}, [1e-4, 3e-4, 1e-3], None),
    ({1e-4: 1, 3e-4: 2, 1e-3: 1.5}, [1e-4, 3e-4, 1e-3], 3e-4),
    ({1e-4: 1, 3e-4: 2, 1e-3: 3}, [1e-4, 3e-4, 1e-3, 3e-3], None),
    ({1e-4: 1, 3e-4: 2, 1e-3: 3, 3e-3: 2}, [1e-4, 3e-4, 1e-3, 3e-3], 1e-3),
    ({1e-4: 1, 3e-4: 2, 1e-3: 3, 3e-3: 4, 1e-2: 5}, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 1e-2),  # as many as are tried
    ({1e-4: 3, 3e-4: 2, 1e-3: 1}, [3e-5, 1e-4, 3e-4, 1e-3], None),
    ({1e-5: 5, 3e-5: 4, 1e-4: 3, 3e-4: 2, 1e-3: 1}, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], 1e-5),
    ({1e-4: 1, 3e-4: 2, 1e-3: None}, [1e-4, 3e-4, 1e-3], 3e-4)])
def test_more_learning_rates_are_tried_until_the_best_lies_within(scores, tried, best, monkeypatch):
    """Three at first; another beyond an end that is best; five at most. A run that failed is worth least."""
    o = options()
    jobs, rate = frontier.sweep("ppo", scored(scores, o), o)
    assert [job.row["learning_rate"] for job in jobs] == tried and rate == best
    monkeypatch.setattr(frontier, "MOST", 4)
    assert frontier.sweep("ppo", scored({1e-4: 1, 3e-4: 2, 1e-3: 3, 3e-3: 4}, o), o)[1] == 3e-3


def test_a_nat_costs_what_it_costs():
    """0.05 a nat: 1 at 2 nats is worth 0.9."""
    assert frontier.worth({"score": [1.0, 0.1], "kl": [2.0, 0.3]}) == pytest.approx(0.9)


def test_the_time_that_is_left():
    """Two runs of a kind of which one took 10 seconds, and one of a kind of which none has run: 30, less the 4 that the
    run in progress has taken. Before any has run nobody knows."""
    runner = Runner(options(jobs=1))
    runner.left = [("ppo", 2), ("dpo", 1)]
    assert runner.clock() == "0:00<?"
    for row in ({"method": "ppo", "seconds": 10.0}, {"method": "dpo", "failed": "error"}, {"method": "best-of-n"}):
        runner.took(row)
    assert runner.clock() == "0:00<0:30"
    job = frontier.job_of("ppo", 0.03, 1e-4, 1337, runner.o)
    runner.running["x"] = frontier.Running(job, None, time.monotonic() - 4, False)
    assert runner.clock() == "0:00<0:26"
    runner.o.jobs = 2
    assert runner.clock() == "0:00<0:13"
    runner.running["x"] = frontier.Running(frontier.base_jobs(runner.o)[0][0], None, time.monotonic() - 4, False)
    assert runner.clock() == "0:00<0:15"  # whose runs are not among those that are left
    runner.running["x"] = frontier.Running(job, None, time.monotonic() - 400, False)
    assert runner.clock() == "0:00<0:10"  # it is late by now; the two others take as long as they take
    runner.left = [("ppo", 1)]
    runner.running.clear()
    assert runner.clock() == "0:00<0:10"  # which nothing goes on beside


def test_how_many_runs_there_are():
    """Two seeds: the sweep has one, the points both at each value, of which one was run in the sweep."""
    o = options(seeds=2)
    jobs, more, points = frontier.jobs_of("ppo", scored({1e-4: 2, 3e-4: 1}, o), o)  # the best so far
    assert (len(jobs), more, points) == (3, 7, ["ppo-kl_coef-0.03-lr-0.0001-seed-1337"])
    assert frontier.jobs_of("ppo", scored({1e-4: 1, 3e-4: 2}, o), o)[2] == ["ppo-kl_coef-0.03-lr-0.0003-seed-1337"]
    jobs, more, points = frontier.jobs_of("ppo", scored({1e-4: 1, 3e-4: 2, 1e-3: 1}, o), o)
    assert (len(jobs), more, len(points)) == (3 + 7, 0, 8) and len({job.name for job in jobs}) == 10
    assert [name[-4:] for name in points] == ["1337"] * 4 + ["ed-1"] * 4 and all("lr-0.0003" in name for name in points)


# ---- what is told

def row(method, value, kl, score, judge, half=0.1, **more):
    where = {"n": value, "kl_bound": kl} if method == "best-of-n" else {METHODS[method].option: value, "kl": [kl, 0.5]}
    return {"method": method, **where, "score": [score, half], "judge_score": [judge, half], **more}


BASE = {"score": [0.1, 0.1], "judge_score": [0.2, 0.1]}
POINTS = {"ppo": {"a": row("ppo", 0.3, 1.0, 1.0, 0.8), "b": row("ppo", 0.1, 4.0, 2.0, 1.4),
                  "c": row("ppo", 0.03, 9.0, 3.0, 0.9)},
          "dpo": {"d": row("dpo", 1.0, 1.0, 0.4, 0.3), "e": row("dpo", 0.1, 4.0, 0.6, 0.5)},
          "best-of-n": {"f": row("best-of-n", 1, 0.0, 0.1, 0.2), "g": row("best-of-n", 4, 2.25, 1.2, 1.1)}}


def test_what_is_found_by_hand():
    """At the KL that all reach, 2.25 (the root is 1.5, half way from 1 to 2): PPO's judge (0.8 + 1.4) / 2 - 0.2 = 0.9,
    DPO's 0.4 - 0.2, best-of-n's 1.1 - 0.2; PPO's judge falls by 0.5, more than sqrt(2) 0.1, where its score rises by 1;
    1.1 of best-of-4 PPO has at 4 nats."""
    found = [*frontier.findings(POINTS, BASE, options(methods="ppo,dpo,best-of-n"))]
    assert found == [
        "At a KL of 2.25 nats, as far as each method went, the judge's score has risen most by PPO: PPO +0.90; best of "
        "n +0.90; DPO, people's pairs +0.20.",
        "PPO: over-optimised from a KL of 4.00 on: at 9.00 the reward model's score has risen by 1.00, and the judge's "
        "fallen by 0.50.",
        "DPO, people's pairs: up to a KL of 4.00 the judge's score does not fall where the reward model's rises.",
        "best of n: up to a KL of 2.25 the judge's score does not fall where the reward model's rises.",
        "Without any training the best of 4 answers has a judge's score of +1.10 and a reward model's of +1.20 at a KL "
        "of 2.25 at most; PPO has as much at 4.00 (kl_coef 0.1); DPO, people's pairs has as much nowhere."]


@pytest.mark.parametrize("last, over", [((9.0, 3.0, 0.9), True), ((9.0, 1.9, 0.9), False), ((9.0, 3.0, 1.3), False)])
def test_over_optimised_is_a_fall_beyond_the_noise_while_the_score_rises(last, over):
    """Of 0.5 yes; where the reward model's score falls too, or by 0.1 with intervals of 0.1, no."""
    line = [row("ppo", 0.1, 4.0, 2.0, 1.4), row("ppo", 0.03, *last)]
    assert frontier.over_optimised(line).startswith("over-optimised from a KL of 4.00 on") == over


def test_a_line_between_its_points():
    """Straight in the root of the KL from the SFT model on: 4 nats of 0 to 16, half way; nothing beyond the end."""
    line = [row("ppo", 0.1, 16.0, 0, 3.0)]
    assert [frontier.at(line, kl, 1.0, "judge_score") for kl in (0.0, 4.0, 16.0, 17.0)] == [1.0, 2.0, 3.0, None]


def test_the_figure_has_the_points(tmp_path):
    """Two panels; each point's tooltip has the root of its KL, its score and interval; each line begins at the SFT
    model; KL bars end at the roots of the interval's ends, below 0 at 0."""
    svg = frontier.figure(POINTS, BASE, options(methods="ppo,dpo,best-of-n"))
    titles = re.findall("<title>(.*?)</title>", svg)
    assert svg.count('class="chart"') == 3 and len(titles) == 2 * (3 + 1 + 2 + 1 + 2 + 1)
    for name, key in (("score", "The reward model"), ("judge_score", "A judge")):
        for method, found in POINTS.items():
            for r in found.values():
                kl = r.get("kl_bound", r.get("kl", [0])[0])
                mean, half = r[name]
                shown = (f"{frontier.CALLED[method]}, {frontier.strength(r)}, root of the KL from the SFT model, nats "
                         f"a response {frontier.chart.figure(math.sqrt(kl))}: ").replace("'", "&#x27;")
                ends = f"({frontier.chart.figure(mean - half)} to {frontier.chart.figure(mean + half)})"
                assert any(title.startswith(shown) and title.endswith(f" {frontier.chart.figure(mean)} {ends}")
                           for title in titles), (shown, ends)
    assert sum("the SFT model, root" in title for title in titles) == 6
    assert frontier.figure({"ppo": {}}, BASE, options(methods="ppo")) == ""


def test_several_seeds_are_one_point():
    """The mean of 1 and 2 is 1.5; as far as 0.5 from either; KL 3 of 2 and 4."""
    points = {"a": row("ppo", 0.1, 2.0, 1.0, 5.0), "b": row("ppo", 0.1, 4.0, 2.0, 6.0),
              "c": row("ppo", 0.3, 1.0, 0.5, 1)}
    first, second = frontier.over_seeds(points)
    assert first == points["c"] and second["kl"] == (3.0, 1.0)
    assert second["score"] == (1.5, 0.5) and second["judge_score"] == (5.5, 0.5)


# ---- what is run, kept and measured

def test_it_trains_what_is_missing_and_each_row_is_its_command_s(finished):
    """SFT model, reward model, judge and ranked samples once; then each row's own command, as it stands there: the
    learning rates of each method, then its points at the best of them, each once, into a folder of its own."""
    folder, calls = finished
    rows = state(folder)["rows"]
    assert [name for name, _ in calls[:4]] == ["train_sft", "train_rm", "train_rm", "minirlhf.sample"]
    trunk = "--init_from out/scratch/sft"
    for (_, words), last in zip(calls, ("--out_dir out/scratch/sft", f"{trunk} --out_dir out/scratch/rm",
                                        f"{trunk} --preferences judge --out_dir out/scratch/judge")):
        assert " ".join(words).endswith(last)  # the judge learns from other people's choices than the reward model
        assert ("--preferences" in words) == ("--preferences" in last)
    trained = {name: row for name, row in rows.items() if row["method"] != "best-of-n"}
    assert [words for _, words in calls[4:]] == [row["words"] for row in trained.values()]
    assert set(rows) - set(trained) == {"best-of-1", "best-of-2", "best-of-4"}
    for (program, words), (name, row) in zip(calls[4:], trained.items()):
        command = shlex.split(row["command"])
        at = next(i for i, word in enumerate(command) if word.endswith((".py", "minirlhf.dpo")))
        assert command[at + 1:] == words and os.path.basename(command[at]).removesuffix(".py") == program
        assert words[-2:] == ["--out_dir", f"out/frontier/{name}"] and (folder / words[-1] / "ckpt.pt").exists()
        m, option = FEW[row["method"]], dict(zip(words[-8::2], words[-7::2]))
        assert float(option[f"--{m.option}"]) == row[m.option] and option["--seed"] == str(row["seed"]) == "1337"
        assert float(option["--learning_rate"]) == row["learning_rate"] and row["seconds"] > 0
    for method, m in FEW.items():
        tried = {row["learning_rate"]: row for row in trained.values() if row["method"] == method
                 and row[m.option] == m.middle}
        if m:
            best = max(tried, key=lambda rate: tried[rate]["score"][0] - 0.05 * tried[rate]["kl"][0])
            assert {*m.rates} <= {*tried}
            assert [(row[m.option], row["learning_rate"]) for row in trained.values() if row["method"] == method
                    and row[m.option] != m.middle] == [(value, best) for value in m.values if value != m.middle]
            assert {*state(folder)["points"][frontier.CALLED[method]]} == {
                name for name, row in trained.items() if row["method"] == method and row["learning_rate"] == best}


def test_rows_are_what_evaluate_measures(folder, capsys):
    """`python -m minirlhf.evaluate`, with the options that frontier.md names, gives the same figures of each method's
    last point, of the SFT model and of the best of 4, whose KL is its bound: log 4 - 3/4."""
    found, o = state(folder), options(data_dir="data", num_prompts=6)
    last = [names[-1] for label, names in found["points"].items() if label != "best of n"]
    (line,) = [line for line in (folder / "out/frontier/frontier.md").read_text("utf-8").splitlines()
               if line.startswith("Measured by")]
    words = shlex.split(line[line.index(" RUN ") + 5:line.rindex("`")])
    assert words == [*frontier.measuring(o)]
    evaluate.main([*(f"out/frontier/{name}" for name in last), *words, "--best_of", "4", "--response_length", "6",
                   "--output", "e.json"])
    expected = json.loads((folder / "e.json").read_text("utf-8"))
    for name in last:
        figures = expected["policies"][f"out/frontier/{name}"]
        assert len(figures) > 10 and {k: found["rows"][name][k] for k in figures} == figures
    assert found["baseline"] == expected["policies"]["out/scratch/sft"]
    best = found["rows"]["best-of-4"]
    assert {k: v for k, v in expected["best_of"]["4"].items() if k not in ("kl", "kl_k3")}.items() <= best.items()
    assert best["kl_bound"] == pytest.approx(math.log(4) - 0.75) and "kl" not in best
    steps = [json.loads(line) for line in open(f"out/frontier/{last[0]}/metrics.jsonl")]
    assert found["rows"][last[0]]["seconds"] == pytest.approx(sum(s.get("seconds", 0) for s in steps))


def test_what_is_done_is_not_done_again(folder, capsys):
    """The second time nothing is run; a row that is missing is measured again, of the run that is there; a run that is
    missing is run again, and gives the same row."""
    before = state(folder)
    frontier.main(START)
    assert Process.calls == [] and state(folder) == before
    lost = dict(before["rows"])
    gone = [name for name in lost if name.startswith("dpo-beta")][-1]
    for path in (None, folder / "out/frontier/logs" / f"{gone}.log"):
        del lost[gone]
        (folder / "out/frontier/frontier.json").write_text(json.dumps(before | {"rows": lost}))
        if path:
            path.unlink()
            shutil.rmtree(folder / "out/frontier" / gone)
        frontier.main(START)
        assert len(Process.calls) == (path is not None)
        assert timeless(state(folder)["rows"]) == timeless(before["rows"])
        lost = dict(before["rows"])
    assert re.search(rf"0:0\d<\S+  1 to go: .*{gone}", capsys.readouterr().out)


@pytest.mark.parametrize("nth", [3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 6, 7))])
def test_killed_in_any_run_it_goes_on(finished, tmp_path, nth):
    """Within SFT, reward model, judge, sampling or a policy's run, as it begins or when it has saved: the next start
    comes to the same rows; a run that had saved is resumed, and no model is taken that is half trained."""
    for name in ("data", "tiny.toml"):
        (shutil.copytree if name == "data" else shutil.copy)(finished[0] / name, tmp_path / name)
    owner, name = (checkpoint.Training, "save") if nth % 2 else (runtime.Run, "start_logs")
    own, command = getattr(owner, name), [*START, "--methods", "dpo-on-policy"]

    def die(call):
        def killed(*arguments, **named):
            own(*arguments, **named)
            raise KeyboardInterrupt
        if call == nth == 4:  # the sampling
            raise KeyboardInterrupt
        if call == nth:
            patch.setattr(owner, name, killed)
    with here(tmp_path) as patch:
        patch.setattr(Process, "before", staticmethod(die))
        with pytest.raises(KeyboardInterrupt):
            frontier.main(command)
        patch.setattr(owner, name, own)
        patch.setattr(Process, "before", None)
        frontier.main(command)
        assert timeless(state(tmp_path)["rows"]) == timeless({
            name: row for name, row in state(finished[0])["rows"].items() if row["method"] == "dpo-on-policy"})
        assert ["--resume" in words for _, words in Process.calls].count(True) == nth % 2


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_in_progress_and_then_all(folder, capsys, number):
    """It is passed on as SIGTERM, on which a run saves; the exit status is 128 + its number, and the last line is the
    command that goes on. What was measured before is kept."""
    shutil.rmtree(folder / "out/frontier")
    sent = []
    Process.send_signal, own = lambda self, number: sent.append(number), Process.send_signal
    try:
        runner = Runner(options())
        job = frontier.job_of("ppo", 0.03, 1e-4, 1337, runner.o)
        for name in "ab":
            runner.running[name] = frontier.Running(job, Process(["python", "-m", "minirlhf.sample", "--help"]), 0, False)
        runner.on_signal(number, None)
        assert sent == [signal.SIGTERM] * 2 and runner.stop == number
        runner.end()  # which have been asked
        assert sent == [signal.SIGTERM] * 2 and not runner.running
    finally:
        Process.send_signal = own
    Process.calls.clear()
    Process.before = staticmethod(lambda call: call == 3 and os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        frontier.main([*START, "--methods", "dpo"])
    assert stop.value.code == 128 + number and signal.getsignal(number) == handler
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "python -m minirlhf.frontier --methods dpo --num_prompts 6 --jobs 1 --data_dir data")
    assert len(state(folder)["rows"]) == 2 and len(Process.calls) == 3
    Process.before = None
    frontier.main([*START, "--methods", "dpo"])
    assert len(Process.calls) == len(state(folder)["rows"]) + 1 and Process.calls[3][1][-1] == "--resume"


class Slow(Process):
    """One that ends when it has been asked three times whether it has, or is waited for."""
    going, together, signals = [], [], []  # by name; those that went on at each start; what was sent to whom

    def __init__(self, argv, **settings):
        self.name, self.left = os.path.basename(argv[-1] if argv[-2] == "--out_dir" else argv[1]), 3
        Slow.going.append(self.name)
        Slow.together.append([*Slow.going])
        super().__init__(argv, **settings)

    def poll(self):
        self.left -= 1
        return self.wait() if self.left <= 0 else None

    def wait(self):
        with contextlib.suppress(ValueError):
            Slow.going.remove(self.name)
        return self.status

    def send_signal(self, number):
        Slow.signals.append((self.name, number))


def test_two_runs_at_a_time(finished, tmp_path, monkeypatch, refused):
    """Two where there are two to do, never more; reward model and judge, but neither beside the SFT model; each with half
    the cores, unless the user has said how many, which its command tells; the rows are those of one at a time. Where
    one cannot go on, the other is asked to save, and waited for."""
    for name in ("data", "tiny.toml"):
        (shutil.copytree if name == "data" else shutil.copy)(finished[0] / name, tmp_path / name)
    command, beside, own = [*START[:-2], "--methods", "dpo,rloo,best-of-n"], [], frontier.Ground.answers
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(frontier.kernels, "cores_allowed", lambda: 6)
    monkeypatch.setattr(frontier.time, "sleep", lambda seconds: None)
    for name in ("going", "together", "signals"):
        monkeypatch.setattr(Slow, name, [])

    def answers(self, policy, draw=0):
        beside.extend([len(Slow.going)] * (draw > 0))
        return own(self, policy, draw)
    with here(tmp_path) as patch:
        patch.setattr(frontier.subprocess, "Popen", Slow)
        patch.setattr(frontier.Ground, "answers", answers)
        frontier.main(command)
        assert len(beside) == 3 and beside[0] == 2  # the SFT model's further answers
        rows = state(tmp_path)["rows"]
        both = [names for names in Slow.together if len(names) == 2]
        assert max(map(len, Slow.together)) == 2 and len(both) > 4 and not Slow.going and not Slow.signals
        assert ["rm", "judge"] in both and not any("sft" in names for names in both)
        assert all(r["command"].startswith("OMP_NUM_THREADS=3 ") for r in rows.values() if "seed" in r)

        def plain(rows):
            return {name: {k: v for k, v in r.items() if k not in ("seconds", "command")} for name, r in rows.items()}
        alone = state(finished[0])["rows"]
        assert plain(rows) == plain({name: alone[name] for name in rows}) and len(rows) == len(Slow.together)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert [job.threads for job in sum(frontier.base_jobs(options()), [])] == ["5"] * 4
        job = frontier.job_of("ppo", 0.03, 1e-4, 1337, options())
        assert job.command().startswith("OMP_NUM_THREADS=5 ") and frontier.threads(1) == "5"
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert [job.threads for job in sum(frontier.base_jobs(options()), [])] == ["", "3", "3", ""]  # where it is alone
        assert [frontier.threads(n) for n in (1, 2, 6, 7)] == ["", "3", "1", "1"]

        def crash(call):
            if call == 2:
                print("Traceback")
                raise SystemExit(2)
        Slow.together.clear()
        Process.calls.clear()
        patch.setattr(Process, "before", staticmethod(crash))
        assert "(exit status 2 of OMP_NUM_THREADS=3 " in refused(frontier.main, [*command, "--out", "out/other"])
        assert len(Slow.together) == 3 and not Slow.going  # the first was measured, and the third begun
        assert Slow.signals == [(Slow.together[2][-1], signal.SIGTERM)]


def test_a_model_that_is_half_trained_is_not_there(finished, tmp_path):
    """A run of stage 1 without its last step, one of stage 2 without its closing figures, is trained on where this
    command has no log of it; a whole one, a model by itself and one of another program's are there."""
    runner, o = Runner(options(out=str(tmp_path))), options()
    for name in ("sft", "rm"):
        whole = shutil.copytree(finished[0] / "out/scratch" / name, tmp_path / name)
        job = next(job for job in sum(frontier.base_jobs(o), []) if job.name == name)._replace(path=str(whole))
        assert runner.ended(job) is None and runner.there(job) and not frontier.half_done(str(whole))
        rows = (whole / "metrics.jsonl").read_text().splitlines(True)
        for some in (rows[:-1], rows[:-1] + [rows[-1][:-3]], []):
            (whole / "metrics.jsonl").write_text("".join(some))
            assert frontier.half_done(str(whole)) and not runner.there(job), some
        (whole / "metrics.jsonl").unlink()
        assert runner.there(job)
        (whole / "ckpt.pt").unlink()
        assert not runner.there(job)
    (policy,) = [path for path in (finished[0] / "out/frontier").glob("dpo-beta-1-*") if path.is_dir()]
    policy = shutil.copytree(policy, tmp_path / "policy")
    rows = (policy / "metrics.jsonl").read_text().splitlines(True)
    for some in (rows, rows[:-1]):  # no job of the first two stages goes on with a policy
        (policy / "metrics.jsonl").write_text("".join(some))
        assert not frontier.half_done(str(policy))
    assert not frontier.half_done(str(tmp_path / "nowhere")) and not frontier.half_done(str(tmp_path / "rm/config.json"))


@pytest.mark.parametrize("line, threads", [
    ("$ OMP_NUM_THREADS=3 python x", "3"), ("$ python x", ""), ("$ python OMP_NUM_THREADS=3", ""), (None, "1")])
def test_a_run_goes_on_with_the_threads_it_began_with(tmp_path, monkeypatch, line, threads):
    """Whatever --jobs and the user's own OMP_NUM_THREADS are now; its command tells them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    runner, seen = Runner(options(), lock=open(os.devnull)), []
    monkeypatch.setattr(frontier.subprocess, "Popen", lambda argv, **settings: seen.append(settings["env"]))
    os.makedirs("out/frontier/logs")
    job = frontier.job_of("ppo", 0.03, 1e-4, 1337, runner.o)
    if line:
        (tmp_path / runner.log_of(job)).write_text(f"{line}\n 3/60\nexit status 1\n")
    runner.start(job)
    assert seen[0].get("OMP_NUM_THREADS", "") == threads and seen[0]["PYTHONPATH"] and seen[0]["PATH"]
    assert runner.running[job.name].job.command().startswith(f"OMP_NUM_THREADS={threads} " if threads else "python")
    runner.lock.close()


def test_what_is_told_of_a_run(tmp_path, monkeypatch, capsys):
    """Its last line of steps since it began again, none of the reference's pass, and nothing where its log is gone."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/frontier/logs")
    runner, job = Runner(options()), frontier.job_of("dpo", 0.1, 1e-4, 1337, options())
    runner.running["x"] = frontier.Running(job, types.SimpleNamespace(poll=lambda: None), time.monotonic(), False)
    for text, told in (("$ a\n 9/60  15% 0:10<1:00  loss\n$ a --resume\n", ""),
                       ("$ a\n 9/60  15% 0:10<1:00  loss\n 10/60  16% 0:11<0:59  loss\n", "10/60  16% 0:11<0:59"),
                       ("$ a\n  9/60  15% 0:10<1:00  log-probabilities under the reference\n", ""), (None, "")):
        runner.told = -frontier.TOLD
        if text:
            (tmp_path / runner.log_of(job)).write_text(text)
        else:
            os.remove(runner.log_of(job))
        assert runner.any_ended() is None
        assert capsys.readouterr().out.strip() == (f"0:00<?  {job.name} {told}" if told else "")
    assert runner.ended(job) is None


def test_a_run_that_diverges_is_a_row_and_any_other_end_is_not(folder, capsys, refused):
    """"error: ..." of a run that had begun is kept as its outcome, worth less than any other; a refusal before it began
    ends the command with exit status 2 and its line, a crash with 1."""
    shutil.rmtree(folder / "out/frontier")

    def diverge(call):
        if call == 1:
            os.makedirs(Process.calls[-1][1][-1])
            open(os.path.join(Process.calls[-1][1][-1], "metrics.jsonl"), "w").close()
            raise SystemExit("error: step 2: the policy is leaving")
    Process.before = staticmethod(diverge)
    frontier.main([*START, "--methods", "dpo"])
    rows = state(folder)["rows"]
    (failed,) = [name for name, row in rows.items() if "failed" in row]
    assert rows[failed]["failed"] == "error: step 2: the policy is leaving"
    assert frontier.worth(rows[failed]) == -math.inf
    assert failed not in state(folder)["points"]["DPO, people's pairs"]
    assert "| error: step 2: the policy is leaving |" in (folder / "out/frontier/frontier.md").read_text("utf-8")

    def full(call):
        os.makedirs(Process.calls[-1][1][-1], exist_ok=True)
        open(os.path.join(Process.calls[-1][1][-1], "metrics.jsonl"), "w").close()
        raise SystemExit("error: out/x/ckpt.pt: could not be written (No space left on device)")
    Process.before = staticmethod(full)
    with pytest.raises(SystemExit, match="error: rloo-.*: out/x/ckpt.pt: could not be written .No space left"):
        frontier.main([*START, "--methods", "rloo", "--out", "out/full"])
    for message, code in (("ValueError: no", 1), (2, 2)):
        def crash(call):
            print("error: --beta 0: no" if code == 2 else "Traceback")
            raise SystemExit(message)
        Process.before = staticmethod(crash)
        if code == 2:
            assert ": --beta 0: no (exit status 2 of " in refused(frontier.main, [*START, "--methods", "rloo"])
        else:
            with pytest.raises(SystemExit, match="error: rloo-.*: ValueError: no .exit status 1 of python"):
                frontier.main([*START, "--methods", "rloo"])


# ---- what is refused

def test_another_ground_or_command_is_refused(folder, refused):
    """Rows of another SFT model, reward model, judge or other prompts, or made with other options, are not mixed."""
    before = state(folder)
    assert "--out out/frontier: its rows were measured with another prompts" in refused(
        frontier.main, ["--data_dir", "data", "--num_prompts", "5"])
    for option, name in (("sft", "sft"), ("reward_model", "reward model"), ("judge", "judge")):
        other = "out/scratch/judge" if option == "reward_model" else "out/scratch/rm" if option == "judge" else next(
            f"out/frontier/{n}" for n in before["rows"] if n.startswith("ppo"))
        assert f"another {name}" in refused(frontier.main, [*START, f"--{option}", other])
    ranked = folder / "out/frontier/ranked.jsonl"
    whole = ranked.read_bytes()
    ranked.write_bytes(whole + whole.splitlines(True)[-1])
    assert "another set of ranked samples" in refused(frontier.main, START)
    ranked.write_bytes(whole)
    name = next(iter(before["points"]["PPO"]))
    before["rows"][name]["words"][-3] = "1"
    (folder / "out/frontier/frontier.json").write_text(json.dumps(before))
    assert f"{name} was made by another command (" in refused(frontier.main, START)


def test_a_function_may_judge(folder):
    """It is not trained, and its scores are the judge's: how many letters an answer has."""
    (folder / "own.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    frontier.main([*START, "--judge", "own.py:score", "--sft", "out/scratch/sft/ckpt.pt", "--methods", "best-of-n",
                   "--out", "out/other"])
    found = json.loads((folder / "out/other/frontier.json").read_text("utf-8"))
    draws = [json.loads(line) for line in (folder / "out/other/draws.jsonl").read_text("utf-8").splitlines()]
    assert Process.calls == [] and len(draws) == 3 and all(r["judge"] == len(r["completion"]) for d in draws for r in d)
    assert found["rows"]["best-of-4"]["judge_score"][0] > 0 and "--judge own.py:score" in (
        found["rows"]["best-of-4"]["command"])


def test_a_judge_gets_columns_and_need_not_apply(folder, refused):
    """The columns of the held-out prompts; None is left out; a judge that applies to no answer ends it in a line."""
    path = folder / "data/prompts.val.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"level": n}) + "\n"
                            for n, line in enumerate(path.read_text().splitlines())))
    (folder / "own.py").write_text(
        "def score(prompts, completions, level): return [n if n % 2 else None for n in level]\n"
        "def never(prompts, completions): return [None] * len(prompts)\n"
        "def other(prompts, completions, gone): return level\n")
    words = [*START, "--methods", "best-of-n", "--out", "out/other", "--judge"]
    frontier.main([*words, "own.py:score"])
    row = json.loads((folder / "out/other/frontier.json").read_text("utf-8"))["rows"]["best-of-4"]
    assert row["judge_score"][0] == 3 and row["judge_win_rate"][0] == 0.5  # of levels 0 to 5
    words[words.index("out/other")] = "out/third"
    assert "--judge own.py:never: applies to no answer of out/scratch/sft" in refused(
        frontier.main, [*words, "own.py:never"])
    assert "asks for the column 'gone', which data/prompts.val.jsonl lacks" in refused(
        frontier.main, [*words, "own.py:other"])


def test_draws_are_taken_up_again(folder):
    """Of three draws the last is torn, and no row is there: the same rows again, and the same draws."""
    path, found = folder / "out/frontier/draws.jsonl", state(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    rows = {name: row for name, row in found["rows"].items() if row["method"] != "best-of-n"}
    (folder / "out/frontier/frontier.json").write_text(json.dumps(found | {"rows": rows}))
    frontier.main([*START, "--methods", "best-of-n"])
    assert state(folder)["rows"] == found["rows"] and path.read_bytes() == whole and whole.count(b"\n") == 3


@pytest.mark.parametrize("given, says", [
    (["--methods", "ppo,none"], "--methods ppo,none: 'none': name each of these once: ppo, rloo, dpo, dpo-on-policy"),
    (["--reward_model", "a.py:f"], "--reward_model a.py:f: expected a reward model, of which"),
    (["--methods", "ppo,ppo"], "'ppo': name each"), (["--methods", ""], "'': name each"),
    (["--out", "tiny.toml"], "--out tiny.toml: cannot be written"), (["--seeds", "0"], "--seeds 0"),
    (["--out", "odd"], "odd/frontier.json: cannot be read as a frontier"),
    (["--data_dir", "none"], "none/sft.train.jsonl: no such file (exit status 2 of "),
])
def test_bad_options(folder, refused, given, says):
    """One line; no folder is left but the logs of what was tried."""
    (folder / "odd").mkdir()
    (folder / "odd/frontier.json").write_text('{"rows": []}')
    if "none" in given:
        given = [*given, "--sft", "out/new", "--out", "out/new-frontier"]
    assert says in refused(frontier.main, given)


def test_two_commands_do_not_share_a_folder(folder, refused):
    """The second is told the pid of the first."""
    import fcntl
    with open(folder / "out/frontier/lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another run of this command, with pid {os.getpid()}, is writing there" in refused(frontier.main, START)


def test_a_dry_run_shows_the_commands_and_writes_nothing(finished, tmp_path, capsys):
    """What is there, what is to run, and how many more when the learning rates are known."""
    for name in ("data", "tiny.toml"):
        (shutil.copytree if name == "data" else shutil.copy)(finished[0] / name, tmp_path / name)
    with here(tmp_path):
        frontier.main([*START, "--dry_run", "--methods", "ppo,dpo-on-policy", "--seeds", "2"])
        out = capsys.readouterr().out.splitlines()
        assert sorted(os.listdir()) == ["data", "tiny.toml"] and Process.calls == []
    assert [line[:5] for line in out] == ["run  "] * len(out) and len(out) == 4 + 3 + 1 + 2 + 1
    assert out[7] == ("run    3 more of ppo at the best of these learning rates, --kl_coef 0.01, 0.1, with that of "
                      "above where it is the same") and "--preferences out/frontier/ranked.jsonl" in out[8]
    with here(finished[0]):
        frontier.main([*START, "--dry_run"])
        out = capsys.readouterr().out.splitlines()
        assert {line[:5] for line in out} == {"there"} and len(out) == 4 + len(state(finished[0])["rows"])


def test_the_table_shows_every_row(finished):
    """Points at the best learning rate first, the others below; each with its figures as frontier.json has them, and
    each command."""
    found, text = state(finished[0]), (finished[0] / "out/frontier/frontier.md").read_text("utf-8")
    upper, lower = text.split("## Learning rates that were not taken")
    chosen = {name for names in found["points"].values() for name in names}
    for name, r in found["rows"].items():
        assert f"- {name}: `{r['command']}`" in lower
        kl = f"<= {r['kl_bound']:.2f}" if "kl_bound" in r else "{:.2f} +- {:.2f}".format(*r["kl"])
        k3 = "" if "kl_bound" in r else "{:.2f} +- {:.2f}".format(*r["kl_k3"])
        rates = f"{r['learning_rate']:g} | {r['seed']}" if "seed" in r else " | "
        line = (f"| {frontier.CALLED[r['method']]} | {frontier.strength(r)} | {rates} | {kl} | {k3} | "
                "{:.3f} +- {:.3f} | {:.3f} +- {:.3f} | ".format(*r["score"], *r["judge_score"])
                + "{:.1%} ({:.1%}-{:.1%}) | {:.1%} ({:.1%}-{:.1%}) | ".format(*r["win_rate"], *r["judge_win_rate"])
                + f"{r['mean_length']:.1f} | {r['distinct_2']:.3f} | {r['repeated']:.1%} | {r['eos_rate']:.1%} | "
                f"{r['ref_logprob_per_token']:.3f} | " + (f"{r['seconds']:.0f}" if "seconds" in r else "") + " |")
        assert (line in upper) == (name in chosen) and (line in lower) == (name not in chosen), name
    assert all(f"- {sentence}" in upper for sentence in found["findings"])
    assert (finished[0] / "out/frontier/frontier.svg").read_text("utf-8").startswith("<svg")


@pytest.mark.slow
def test_real_processes_killed_and_resumed(finished, tmp_path):
    """Ctrl-C, SIGTERM and kill -9 of the command while its runs are in progress, again and again: the runs in progress
    end or outlive it, and are waited for; the last start comes to the rows of the command that was never stopped."""
    for name in ("stopped", "whole"):
        shutil.copytree(finished[0] / "data", tmp_path / name / "data")
        (tmp_path / name / "tiny.toml").write_text(TINY)
        (tmp_path / name / "tiny.py").write_text(
            f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport test_frontier\n"
            "from minirlhf import frontier\nfrontier.PRESET, frontier.METHODS = '@tiny.toml', test_frontier.FEW\n"
            "frontier.launch(frontier.main)\n")
    command = [sys.executable, "tiny.py", *START[:-2], "--methods", "ppo,dpo"]  # two at a time
    for seconds, number in ((9, signal.SIGINT), (14, signal.SIGKILL), (12, signal.SIGTERM), (17, signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=tmp_path / "stopped", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
        assert process.returncode in (0, 130, 143, -9) and "Traceback" not in out, out
    for name in ("stopped", "whole"):  # processes both: this one counts on other threads, so that it rounds otherwise
        done = subprocess.run(command, cwd=tmp_path / name, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
    assert timeless(state(tmp_path / "stopped")["rows"]) == timeless(state(tmp_path / "whole")["rows"])
