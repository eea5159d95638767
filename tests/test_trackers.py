"""TensorBoard and Weights & Biases beside a run: they get what metrics.jsonl has, and nothing that they do reaches the
run. The second is played by a module that does what it is told to."""
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT
from minirlhf import config, trackers
from minirlhf.config import RunOptions
from minirlhf.runtime import Run
from test_state import EVERY, LONGER, equal, without_clocks

PLAYED = '''
import json, os, random, signal, sys, time
WAYS = dict(way.split("=") for way in os.environ["PLAYED"].split())  # {what it does: when}

def note(*what):
    with open(os.environ["NOTES"], "a") as f:
        f.write(json.dumps(what) + "\\n")

def misbehave(when):
    for way in (way for way, at in WAYS.items() if at == when):
        random.seed(0)
        if way == "raises":
            raise RuntimeError("no such day\\nand a second line")
        if way == "exits":
            sys.exit("goodbye")
        if way == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if way == "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        if way == "floods":
            for stream in (sys.stdout, sys.stderr):
                stream.write("flood\\n" * 10 ** 5), stream.flush()
        if way == "fills":
            with open(os.environ["NOTES"] + ".large", "wb") as f:
                f.truncate(1 << 28)
                f.seek(1 << 28)
                f.write(b"more"), f.flush()
        if way == "asks":
            note("answer", sys.stdin.read())

class Run:
    url = "a.place/of/runs"
    def log(self, figures, step):
        misbehave("log")
        note("log", step, figures)
    def finish(self):
        misbehave("finish")
        note("finish")

def init(**given):
    misbehave("init")
    note("init", given, {k: v for k, v in os.environ.items() if k.startswith("WANDB")})
    return Run()

misbehave("import")
'''


@dataclass
class Options(RunOptions):
    out_dir: str = ""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """played("raises=log", ...): the package wandb from now on, which does so then; -> what was asked of it so far."""
    (tmp_path / "played").mkdir()
    (tmp_path / "played" / "wandb.py").write_text(PLAYED)
    notes = tmp_path / "notes"
    monkeypatch.syspath_prepend(tmp_path / "played")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)  # another package may have imported the real one
    monkeypatch.setenv("NOTES", str(notes))
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)

    def play(*ways):
        monkeypatch.setenv("PLAYED", " ".join(ways))
        return lambda: [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    yield play
    sys.modules.pop("wandb", None)


@pytest.fixture(scope="module")
def alone(tiny):
    """A run of stage 1 that no tracker hears of."""
    return tiny.train("sft", "--eval_interval", "2")


def lines_of(ended, name="wandb"):
    return [line for line in ended.said.splitlines() if line.startswith(f"{name}: ")]


def told(rows):
    """What a tracker shall have of metrics: [step, {name: number}]."""
    return [[row["step"], {k: v for k, v in trackers.figures(row).items() if k != "step"}] for row in rows]


# ---- what is told

def test_figures_by_hand():
    """Names within names are joined, intervals spelled out; texts, truth values and null are no numbers."""
    row = {"step": 3, "loss": 0.5, "null": None, "text": "x", "flag": True, "none": [], "many": [1, 2, 3, 4],
           "eval": {"score": [1.5, 0.25], "win_rate": [0.75, 0.5, 0.875], "all, margin > 1": {"accuracy": 1}}}
    assert trackers.figures(row) == {
        "step": 3, "loss": 0.5, "eval/score": 1.5, "eval/score_half_width": 0.25, "eval/win_rate": 0.75,
        "eval/win_rate_low": 0.5, "eval/win_rate_high": 0.875, "eval/all, margin > 1/accuracy": 1}


def test_a_row_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    """Also where the cut goes through a character, and where there is no file yet."""
    assert trackers.whole_rows(tmp_path) == ([], 0)
    data = '{"step": 1}\n{"step": 2, "kind": "é"}\n'.encode()
    (tmp_path / "metrics.jsonl").write_bytes(data[:-4])
    assert trackers.whole_rows(tmp_path) == ([{"step": 1}], 12)
    (tmp_path / "metrics.jsonl").write_bytes(data)
    assert trackers.whole_rows(tmp_path, 12) == ([{"step": 2, "kind": "é"}], len(data))
    assert trackers.whole_rows(tmp_path, len(data)) == ([], len(data))


# ---- beside a run

@EVERY
def test_a_tracker_gets_what_the_metrics_have(tiny, played, stage):
    """Each number of each row at its step, evaluations and closing report included, and the options; once."""
    notes = played()
    ended = tiny.train(stage, "--wandb", "--eval_interval", "1")
    assert ended.code == 0 and lines_of(ended) == ["wandb: a.place/of/runs"]
    (first, given, environment), *logs, last = notes()
    assert first == "init" and last == ["finish"]
    assert [log[1:] for log in logs] == told(ended.rows())
    assert any(name.startswith("eval/") for _, step, numbers in logs for name in numbers)
    assert any(name.startswith("final/") for _, step, numbers in logs for name in numbers) == (
        stage in ("rm", "ppo"))
    assert given.pop("config") == json.loads((ended.folder / "config.json").read_text())
    assert given == {"id": given["id"], "resume": "allow", "dir": str(ended.folder), "job_type": stage}
    assert environment == {"WANDB_PROJECT": "minirlhf", "WANDB_NAME": str(ended.folder), "WANDB_CONSOLE": "off"}


@pytest.mark.parametrize("way", ["raises=import", "raises=init", "raises=log", "raises=finish", "exits=log",
                                 "dies=log", "hangs=import", "hangs=log", "hangs=finish", "fills=log"])
def test_a_tracker_that_fails_or_hangs_leaves_the_run_as_it_is(tiny, played, alone, monkeypatch, way):
    """The run ends well with the weights and metrics of one without, says once why, and what the tracker lacks."""
    monkeypatch.setattr(trackers, "PATIENCE", 0.3 if "hangs" in way else 60)
    notes, before = played(way), random.getstate()
    ended = tiny.train("sft", "--wandb", "--eval_interval", "2")
    assert ended.code == 0 and ended.error == "" and random.getstate() == before
    assert equal(ended.payload(), alone.payload())
    assert without_clocks(ended.rows()) == without_clocks(alone.rows())
    said = [line for line in lines_of(ended) if "a.place" not in line]
    why = {"raises": "the run goes on without it: RuntimeError: no such day and a second line",
           "exits": "the run goes on without it: SystemExit: goodbye",
           "dies": "the run goes on without it: its process was ended by signal 11",
           "hangs": "has not ended within 0.3 seconds of the run's end, and was stopped",
           "fills": "the run goes on without it: OSError: [Errno 27] File too large"}[way.partition("=")[0]]
    lacks = [f"wandb: lacks {len(alone.rows())} of {len(alone.rows())} rows of metrics.jsonl; it gets them by: "
             f"python -m minirlhf.trackers {ended.folder} --wandb"]
    said = [re.sub("PYTHONPATH=.* python", "python", line) for line in said]
    assert said[0] == f"wandb: {why}" and (said[1:] == lacks or "finish" in way and not said[1:])
    if way == "raises=finish":
        assert len(said) == 1 and [kind for kind, *_ in notes()] == ["init"] + ["log"] * len(alone.rows())


@pytest.mark.parametrize("when", ["import", "init", "log", "finish"])
def test_what_a_tracker_prints_or_asks_meets_nobody(tiny, played, alone, capfd, when):
    """Megabytes of it; and an answer to its question is empty at once."""
    played_notes = played(f"floods={when}", f"asks={when}")
    ended = tiny.train("sft", "--wandb", "--eval_interval", "2")
    assert lines_of(ended) == ["wandb: a.place/of/runs"] and capfd.readouterr() == ("", "")
    assert equal(ended.payload(), alone.payload())
    assert {tuple(note) for note in played_notes() if note[0] == "answer"} == {("answer", "")}
    assert [note[1:] for note in played_notes() if note[0] == "log"] == told(ended.rows())


def test_a_process_that_cannot_start_is_said(tiny, played, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    played()
    ended = tiny.train("sft", "--wandb")
    assert ended.code == 0 and lines_of(ended)[0].startswith(
        "wandb: the run goes on without it: its process cannot be started ([Errno 2] No such file")


def test_what_a_tracker_has_to_say_is_asked_for_at_each_step(tiny, played, monkeypatch):
    """So that a run of hours says at once that it goes on without one."""
    look, looks = trackers.Follower.look, []
    monkeypatch.setattr(trackers.Follower, "look", lambda self: (looks.append(self.name), look(self)))
    played()
    rows = tiny.train("sft", "--wandb").rows()
    assert len(looks) > len(rows)  # and once at the end


def test_nothing_is_told_unasked(tiny, played):
    notes = played()
    assert not {"wandb.json", "tensorboard.json", "wandb", "tensorboard"} & {
        path.name for path in tiny.train("ppo").folder.iterdir()}
    assert notes() == []


# ---- going on

@EVERY
def test_a_run_that_goes_on_goes_on_there(tiny, played, stage):
    """With the same id, at the next step; the option stays the run's. --overwrite has another id, and all again."""
    notes = played()
    constant = ["--lr_schedule", "constant", "--eval_interval", "1"]
    first = tiny.train(stage, "--wandb", *constant)
    before, steps = notes(), [row["step"] for row in first.rows() if "final" not in row]
    longer = tiny.train(stage, "--resume", *LONGER[stage], out=first.folder)
    assert longer.code == 0, longer.error
    after = notes()[len(before):]
    assert [after[0][1][name] == before[0][1][name] for name in ("id", "dir")] == [True, True]
    assert [log[1:] for log in after[1:-1]] == told(row for row in longer.rows() if row["step"] > max(steps))
    again = tiny.train(stage, "--wandb", "--overwrite", out=first.folder)
    latest = notes()[len(before) + len(after):]
    assert latest[0][1]["id"] != before[0][1]["id"]
    assert [log[1:] for log in latest[1:-1]] == told(again.rows())


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(*steps, **more) -> the folder of a run whose metrics have those steps; more: numbers of each row."""
    def write(*steps, **more):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"stage": "ppo", "out_dir": "out/ppo", "seed": 7, "judge": ""}))
        rows = [{"step": abs(n), "x": n + 0.5, **more} | ({"final": {}} if n < 0 else {}) for n in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)
    return write


@pytest.fixture
def heard(monkeypatch):
    """What Weights & Biases is told within this process: [id, [steps]] of each time."""
    times = []

    def to(folder, known, options, first, say):
        times.append([known.id, []])
        return lambda numbers, step: times[-1][1].append(step), lambda: None
    monkeypatch.setattr(trackers, "to_wandb", to)
    return times


def once(folder, name="wandb"):
    return trackers.tell(name, folder, lambda: False, lambda text: None)


def test_steps_that_are_taken_again_are_not_told_twice(run_folder, heard):
    """A run that was killed after step 5 goes on from its checkpoint of step 3. What a process that was killed had not
    told yet is told by the next one."""
    assert once(run_folder(1, 2, 3, 4, 5)) == 5
    assert once(run_folder(1, 2, 3, 4, 5, 6, 7, -7)) == 3
    assert once(run_folder(1, 2, 3, 4, 5, 6, 7, -7)) == 0
    assert [steps for _, steps in heard] == [[1, 2, 3, 4, 5], [6, 7, 7], []]
    assert len({run for run, _ in heard}) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "x"}', '{"id": "x", "sent": [null]}',
                                     '{"id": 1, "sent": 2}'])
def test_what_is_known_of_a_tracker_may_be_torn(run_folder, heard, content):
    """Then all is told again, as another run."""
    folder = run_folder(1, 2)
    (ROOT / folder / "wandb.json").write_text(content)
    assert once(folder) == 2 and heard[0][0] != "x"
    assert trackers.read_known("wandb", folder) == (heard[0][0], [2, False])


def test_a_note_that_cannot_be_written_leaves_the_one_before(run_folder, heard, monkeypatch):
    """One write, of one length: there is no moment at which the note is cut."""
    folder = run_folder(1, 2)
    known = trackers.Known("wandb", folder, False)
    writes = []
    for sent in ([1000, True], [2, False], [3, False]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *write: writes.append(write) or len(write[1]))
            before = (ROOT / folder / "wandb.json").read_bytes()
            known.save(sent)
            assert (ROOT / folder / "wandb.json").read_bytes() == before  # nothing else touches it
        assert os.pwrite(*writes[-1]) == 100
        assert trackers.read_known("wandb", folder) == (known.id, sent)


def test_a_disk_that_is_nearly_full_is_left_to_the_run(run_folder, heard, monkeypatch):
    """What was told before stays known."""
    free = iter([1 << 40, 1 << 28, (1 << 28) - 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    folder = run_folder(1, 2, 3)
    with pytest.raises(OSError, match="less than 268 MB are free|less than 256 MB are free"):
        once(folder)
    assert heard[0][1] == [1, 2] and trackers.read_known("wandb", folder)[1] == [2, False]


def test_all_is_read_once_more_when_the_run_has_ended(run_folder, heard):
    """What it wrote between the last look and its end is told too; before the first row nothing is made."""
    folder, written = run_folder(), iter([[], [1, 2], [1, 2, 3], [1, 2, 3, 4]])

    def going_on():
        steps = next(written)
        assert os.path.exists(f"{folder}/wandb.json") == (len(steps) > 2)
        run_folder(*steps)
        return len(steps) < 4
    assert trackers.tell("wandb", folder, going_on, print) == 4
    assert heard == [[heard[0][0], [1, 2, 3, 4]]]
    empty = run_folder()
    os.remove(f"{empty}/wandb.json")
    assert once(empty) == 0 and not os.path.exists(f"{empty}/wandb.json")


# ---- processes

def processes_of(folder):
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(entry)}/cmdline", "rb") as f:
                if str(folder).encode() in f.read().split(b"\0"):
                    found.append(int(entry))
    return found


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are looked up there")
def test_a_process_ends_after_its_run_was_killed(run_folder, played):
    """Also while the run's own children live on, which hold its end of the pipe; what was written is told."""
    notes, folder = played(), run_folder(1, 2)
    run = subprocess.Popen([sys.executable, "-c", (
        "import os, sys, time\nfrom minirlhf.trackers import Follower\n"
        f"follower = Follower('wandb', {folder!r}, print, '')\n"
        "if os.fork() == 0:\n    time.sleep(30)\nprint(1, flush=True)\ntime.sleep(1000)")],
        stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *sys.path])})
    try:
        assert run.stdout.readline() == b"1\n" and until(lambda: len(notes()) == 3) and processes_of(folder)
        os.kill(run.pid, signal.SIGKILL)
        run_folder(1, 2, 3)
        run.wait()
        assert until(lambda: not processes_of(folder))
        assert [note[0] for note in notes()] == ["init", "log", "log", "log", "finish"]
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()


def test_a_call_that_does_not_return_ends_its_process(run_folder, played, monkeypatch):
    """After ten minutes, here one second, whatever it waits for; the run says so at its next step."""
    played("hangs=log")
    process = subprocess.Popen([sys.executable, "-c", (
        "import os\nfrom minirlhf import trackers\ntrackers.HANGS = 1\n"
        f"trackers.follow('wandb', {run_folder(1)!r}, os.getppid())")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    try:
        assert process.wait(20) == -signal.SIGALRM
    finally:
        process.kill()
    said, follower = [], trackers.Follower.__new__(trackers.Follower)
    follower.name, follower.say, follower.process = "wandb", said.append, process
    follower.look(), follower.look()
    assert said[-1:] == ["wandb: the run goes on without it: its process was ended by signal 14, as a call took 600 "
                         "seconds"] and sum("signal" in line for line in said) == 1


def test_one_process_at_a_time_tells(run_folder, heard, refused):
    """The command beside a run that is telling is refused; the process of the next run waits."""
    folder = run_folder(1)
    known = trackers.Known("wandb", folder, False)
    assert "its run is telling wandb now" in refused(once, folder)
    threading.Timer(0.2, known.file.close).start()
    assert trackers.tell("wandb", folder, lambda: False, print, wait=True) == 1


def test_a_forked_child_of_the_run_has_no_trackers():
    """It would end them, or wait for them, when it ends."""
    run = Run.__new__(Run)
    run.signals, run.lock, run.trackers = {}, None, [object()]
    run.disown()
    assert run.trackers == []


def test_one_rank_has_trackers_and_no_terminal_reaches_them(tmp_path, played, capfd):
    """The first, whose metrics they read. Ctrl-C goes to the processes of a session; theirs is another."""
    played()
    for rank in (1, 0):
        run = Run(Options(out_dir=str(tmp_path / "out"), device="cpu", wandb=True), "sft")
        run.main = rank == 0
        run.start_logs(0)
        sessions = [os.getsid(tracker.process.pid) for tracker in run.trackers]
        assert len(sessions) == (rank == 0) and os.getsid(0) not in sessions
        run.__exit__(None, None, None)
    assert not (tmp_path / "out").exists()


# ---- a package that is missing

@EVERY
@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_missing_package_is_named_before_anything_is_read(declined, tmp_path, monkeypatch, stage, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert declined(tmp_path, "minirlhf.dpo" if stage == "dpo" else f"train_{stage}.py", f"--{name}", "--data_dir", "none") == (
        f"error: --{name}: the package {name} is not installed; get it by: pip install {name}; or leave the option out "
        f"(--{name} false, where a run that goes on has it)\n")


def test_a_folder_of_the_name_is_no_package(refused, tmp_path, monkeypatch):
    """Weights & Biases makes one where a run is started."""
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip install only_a_folder" in refused(config.installed, "only_a_folder")
    config.installed("json")


def test_a_run_that_goes_on_says_that_its_package_has_gone(tiny, played, monkeypatch):
    played()
    first = tiny.train("sft", "--wandb", "--lr_schedule", "constant")
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda package: None)
    more = ["--resume", *LONGER["sft"]]
    refused = tiny.train("sft", *more, out=first.folder)
    assert refused.code == 2 and "--wandb false, where a run that goes on has it" in refused.error
    assert tiny.train("sft", *more, "--wandb", "false", out=first.folder).code == 0


# ---- the command

def test_the_command_tells_what_is_missing(run_folder, played, capsys, monkeypatch):
    """Of several runs; what they know already is not told again."""
    notes, folder = played(), run_folder(1, 2)
    trackers.main([folder, "--wandb"])
    run_folder(1, 2, 3)
    trackers.main([folder, "--wandb"])
    assert capsys.readouterr().out.splitlines() == [
        "wandb: a.place/of/runs", f"wandb: {folder}: 2 rows of metrics.jsonl",
        "wandb: a.place/of/runs", f"wandb: {folder}: 1 row of metrics.jsonl"]
    assert [note[1] for note in notes() if note[0] == "log"] == [1, 2, 3]


def test_what_the_command_refuses(run_folder, played, refused, tmp_path, monkeypatch):
    played()
    assert "name a tracker" in refused(trackers.main, [run_folder(1)])
    assert f"{tmp_path}: no folder of a run" in refused(trackers.main, [str(tmp_path), "--wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert "the package wandb is not installed" in refused(trackers.main, [run_folder(1), "--wandb"])


# ---- the packages themselves

@pytest.fixture
def events():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        """{name: [(step, value)]} as TensorBoard has them, once it has read all files of a folder."""
        found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        found.Reload()
        return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    return read


def expected(rows):
    """The same of metrics.jsonl: TensorBoard's numbers are float32."""
    found = {}
    for step, numbers in told(rows):
        for name, value in numbers.items():
            found.setdefault(name, []).append((step, float(np.float32(value))))
    return found


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_tensorboard_takes_the_options_of_every_stage(run_folder, events, stage):
    """Those that are lists too, which are no hyperparameter of its own kinds."""
    folder, options = run_folder(1, 2), asdict(importlib.import_module(f"train_{stage}").Options())
    Path(folder, "config.json").write_text(json.dumps(options | {"stage": stage, "a": [1, "b"], "c": None}))
    assert once(folder, "tensorboard") == 2
    assert events(Path(folder))["x"] == [(1, 1.5), (2, 2.5)]


@pytest.mark.slow
@EVERY
def test_tensorboard_shows_the_metrics(tiny, events, stage):
    """Each value, also after the run went on from a checkpoint and took steps again; options as hyperparameters."""
    constant = ["--lr_schedule", "constant", "--eval_interval", "1"]
    first = tiny.train(stage, "--tensorboard", *constant)
    assert lines_of(first, "tensorboard") == [f"tensorboard: look at it by: tensorboard --logdir {first.folder}"]
    assert events(first.folder) == expected(first.rows()) and len(expected(first.rows())) > 10
    longer = tiny.train(stage, "--resume", *LONGER[stage], out=first.folder)
    assert len(longer.rows()) > len(first.rows()[:-1]) and events(first.folder) == expected(longer.rows())
    again = tiny.train(stage, "--tensorboard", "--overwrite", out=first.folder)
    assert events(first.folder) == expected(again.rows())


@pytest.mark.slow
def test_an_open_tensorboard_forgets_what_a_run_takes_again(run_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2
    folder = run_folder(1, 2, 3, 4, 5)
    once(folder, "tensorboard")
    shown = EventAccumulator(os.path.join(folder, "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    time.sleep(1.1)  # files of the same second are in no order
    run_folder(1, 2, 3, 4)
    once(folder, "tensorboard")
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("x")] == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]
    start = plugin_data_pb2.HParamsPluginData.FromString(
        shown.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info.hparams
    assert {k: v.string_value or v.number_value for k, v in start.items()} == {
        "stage": "ppo", "out_dir": "out/ppo", "seed": 7, "judge": 0}


def log_records(data):
    """The records of LevelDB's log format, after seven bytes of the package's own: blocks of 32 kB, in each of them
    checksum (4 bytes), length (2), kind (1: whole; 2, 3, 4: first, middle, last part), content."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_weights_and_biases_gets_the_metrics(tiny, monkeypatch):
    """The real package, which sends nothing: its file of the run holds each value of metrics.jsonl."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "PATIENCE", 60)
    ended = tiny.train("ppo", "--wandb", "--eval_interval", "1")
    (path,) = ended.folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                     for item in record.history.item}
            found.append((record.history.step.num, {k: v for k, v in items.items() if k[0] != "_"}))
    wanted = {}
    for step, numbers in told(ended.rows()):
        wanted.setdefault(step, {}).update(numbers)
    assert dict(found) == wanted and len(wanted) == 2
    assert torch.get_num_threads() == 1
