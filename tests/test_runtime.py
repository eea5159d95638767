"""Seeds, devices, the output folder and its lock, signals, log files and the learning rate's course."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from conftest import both_families
from minirlhf import adapters, evaluate, kernels, runtime
from minirlhf.config import RunOptions
from minirlhf.model import GPT, GPTConfig
from minirlhf.runtime import Run, rate_factor


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Options(RunOptions):
    out_dir: str = ""
    device: str = "cpu"


@pytest.fixture
def start(tmp_path):
    """start(**options) -> a Run in tmp_path/out; signal handlers are put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runs = []

    def make(**options):
        runs.append(Run(Options(**{"out_dir": str(tmp_path / "out")} | options), "sft"))
        return runs[-1]

    yield make
    for run in runs:
        run.release()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def numbers(*arguments):
    return torch.rand(4, generator=runtime.generator(*arguments)).tolist()


# Seeds


def test_generators_depend_on_each_of_four_things():
    """(seed, step, rank, purpose): the same four give the same numbers, a change of any one gives others."""
    torch.manual_seed(1)
    first = numbers(1, 2, 3, "rollout")
    torch.manual_seed(2)
    assert numbers(1, 2, 3, "rollout") == first
    others = [(0, 2, 3, "rollout"), (1, 0, 3, "rollout"), (1, 2, 0, "rollout"), (1, 2, 3, "order"),
              (2, 1, 3, "rollout"), (1, 3, 2, "rollout")]
    assert len({tuple(numbers(*arguments)) for arguments in [(1, 2, 3, "rollout"), *others]}) == 7
    assert numbers(1, 23, 3, "x") != numbers(12, 3, 3, "x") != numbers(1, 2, 33, "x")  # the same digits


def test_seeds_are_the_same_everywhere():
    """Not Python's hash, which changes with every process: a known value, in 63 bits."""
    expected = int(hashlib.blake2b(b"1 2 3 rollout", digest_size=8).hexdigest(), 16) // 2
    assert runtime.seed_of(1, 2, 3, "rollout") == expected < 2 ** 63


def test_a_run_s_generators(start):
    """Run.generator takes the run's seed and rank; seed_dropout sets the global generator by step."""
    run = start(seed=5)
    run.rank = 2
    assert torch.rand(4, generator=run.generator(7, "rollout")).tolist() == numbers(5, 7, 2, "rollout")
    draws = []
    for step in (1, 2, 1):
        run.seed_dropout(step)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[2] != draws[1]


# Devices


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_refused(monkeypatch, refused, name):
    """Exit 2: no such device, use --device cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(runtime.pick_device, name)
    assert f"--device {name}" in error and "--device cpu" in error


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, refused):
    """cuda:3 of two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.pick_device("cuda:1") == torch.device("cuda:1")
    assert "--device cuda:3" in refused(runtime.pick_device, "cuda:3")


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cpu:x"])
def test_an_unknown_device_is_refused(refused, name):
    """The value and the choices."""
    error = refused(runtime.pick_device, name)
    assert f"--device {name}" in error and "auto" in error


def test_auto_takes_what_there_is(monkeypatch):
    """The CPU without a GPU, CUDA with one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.pick_device("auto") == torch.device("cuda")


def test_dtype_is_autocast_s(start, tmp_path):
    """bfloat16 matmuls under autocast, none for float32."""
    x = torch.ones(2, 2)
    with start(overwrite=True, dtype="float32").autocast():
        assert (x @ x).dtype == torch.float32
    with start(overwrite=True, out_dir=str(tmp_path / "other"), dtype="bfloat16").autocast():
        assert (x @ x).dtype == torch.bfloat16


# The output folder


@pytest.fixture
def held(tmp_path):
    """tmp_path/out as a run left it."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("ckpt.pt", "config.json", "metrics.jsonl", "samples.jsonl", "notes.txt"):
        (folder / name).write_text("old")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_made(start, tmp_path):
    """Parents included; nothing but the lock is in it, and that goes with the run, and so do folders left empty."""
    run = start(out_dir=str(tmp_path / "a" / "b"))
    assert names(tmp_path / "a" / "b") == ["lock"] and run.path("ckpt.pt") == str(tmp_path / "a" / "b" / "ckpt.pt")
    with run:
        pass
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with start(out_dir=str(tmp_path / "mine" / "b")) as run:
        run.write("metrics.jsonl", {"step": 1})
    assert names(tmp_path / "mine" / "b") == ["metrics.jsonl"]
    with start(out_dir=str(tmp_path / "mine" / "c")):
        pass
    assert names(tmp_path / "mine") == ["b"]  # what was there before stays


@pytest.mark.parametrize("kept", ["ckpt.pt", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_is_refused(start, held, refused, kept):
    """Unless --resume or --overwrite; nothing is touched, no lock stays."""
    other = {"ckpt.pt": "metrics.jsonl", "metrics.jsonl": "ckpt.pt"}[kept]
    (held / other).unlink()
    before = names(held)
    error = refused(start)
    assert str(held) in error and kept in error and "--resume" in error and "--overwrite" in error
    assert names(held) == before and (held / kept).read_text() == "old"


def test_overwrite_removes_the_run_and_nothing_else(start, held):
    """The old run goes when the new one is ready to write, not before; other files stay."""
    run = start(overwrite=True)
    assert (held / "ckpt.pt").read_text() == "old"
    run.start_logs(0)
    assert not (held / "ckpt.pt").exists() and (held / "notes.txt").read_text() == "old"
    assert names(held) == ["config.json", "lock", "notes.txt"]


def test_resume_keeps_everything(start, held):
    """The checkpoint is there; without one there is nothing to resume."""
    start(resume=True)
    assert names(held) == sorted(["ckpt.pt", "config.json", "lock", "metrics.jsonl", "notes.txt", "samples.jsonl"])


def test_a_lock_of_a_live_run_is_refused_and_a_dead_one_taken_over(start, tmp_path, refused):
    """The second run names the first's pid, even with --overwrite, and leaves its lock and files; once that process has
    ended, its lock is ours."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("the first run's")
    hold = ("import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print(os.getpid(), end='', file=f, flush=True); print(); time.sleep(600)")
    first = subprocess.Popen([sys.executable, "-c", hold, str(folder / "lock")], stdout=subprocess.PIPE)
    try:
        first.stdout.readline()
        for options in ({}, {"overwrite": True}):
            error = refused(start, **options)
            assert str(first.pid) in error and str(folder) in error
        assert (folder / "lock").read_text() == str(first.pid) and (folder / "metrics.jsonl").read_text()
    finally:
        first.kill()
        first.wait()
    run = start(overwrite=True)
    assert (folder / "lock").read_text() == str(os.getpid())
    run.release()
    assert not (folder / "lock").exists()


@pytest.mark.parametrize("content", ["", "1", "not a pid"])
def test_a_stale_lock_is_taken_over(start, tmp_path, content):
    """What counts is the lock on the file, not the pid in it, which another process may have by now."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").write_text(content)
    start()
    assert (tmp_path / "out" / "lock").read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_written(start, tmp_path, refused):
    """A file in its place, or in a parent's: refused before training."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        error = refused(start, out_dir=str(path))
        assert f"--out_dir {path}" in error
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(start, tmp_path, refused):
    """The system's reason is given."""
    (tmp_path / "out").mkdir(mode=0o500)
    assert "Permission denied" in refused(start)


# Logs


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").removesuffix("\n").split("\n")]


def test_logs_are_cut_to_the_checkpoint(start, tmp_path, monkeypatch):
    """On resume at step 2, later rows and a torn last line go; steps that follow are written once, each with the
    seconds since the process began or since the row before."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "ckpt.pt").write_text("")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    (folder / "samples.jsonl").write_text('{"step": 2, "completion": "a"}\n{"step": 3, "completion": "b"}\n')
    run = start(resume=True)
    run.start_logs(2)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: run.started + 74.0)
    run.write("metrics.jsonl", {"step": 3, "loss": 0.5})
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: run.started + 76.5)
    run.write("metrics.jsonl", {"step": 4})
    assert lines(folder / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5, "elapsed": 74.0},
                                               {"step": 4, "elapsed": 2.5}]
    assert lines(folder / "samples.jsonl") == [{"step": 2, "completion": "a"}]
    assert json.loads((folder / "config.json").read_text())["stage"] == "sft"


@pytest.mark.parametrize("torn", [
    '{"step": 2, "completion": "caf\u00e9'.encode()[:-1],  # within a character
    b'{"step": 2}',  # the record is whole, its newline is not there
], ids=["character", "newline"])
def test_a_line_torn_anywhere_is_repaired(start, tmp_path, torn):
    """Whichever byte was the last one written, the file holds one object a line afterwards."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "ckpt.pt").write_text("")
    (folder / "samples.jsonl").write_bytes('{"step": 1, "completion": "\u00e9"}\n'.encode() + torn)
    run = start(resume=True)
    run.start_logs(2)
    run.write("samples.jsonl", {"step": 3})
    rows = lines(folder / "samples.jsonl")
    assert rows[0] == {"step": 1, "completion": "\u00e9"} and rows[-1] == {"step": 3}


def test_records_hold_any_text(start, tmp_path):
    """Emoji and newlines in a sample: still one line, readable as UTF-8."""
    run = start()
    run.start_logs(0)
    run.write("samples.jsonl", {"step": 1, "completion": "\U0001f600\n\u2028\0"})
    assert lines(tmp_path / "out" / "samples.jsonl") == [{"step": 1, "completion": "\U0001f600\n\u2028\0"}]
    assert "\U0001f600".encode() in (tmp_path / "out" / "samples.jsonl").read_bytes()


def test_a_reader_that_went_away_does_not_stop_the_run(monkeypatch):
    """Standard output closed, as by `| head`: what is said afterwards goes nowhere, quietly."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in range(3):
            runtime.say("a line")


def test_the_time_left_by_hand():
    """Steps of 100 tokens usually: one of 50 counts as three quarters, two passes over 400 as three. The first does not
    count beside others, nor does one that was slow: 4, 6 and 40 seconds a step are 6. What has not come yet takes a
    share of what it is like; what nothing is known of, nothing."""
    pace = runtime.Pace(100)
    assert [pace.steps(50), pace.steps(400, 2), pace.steps(100)] == [0.75, 3.0, 1.0]
    assert pace.left("steps", 10) == pace.left("looks", 10, "steps") == 0.0
    pace.add("steps", 90.0)
    assert pace.left("steps", 10) == 900.0
    for seconds, tokens in ((3.0, 50), (6.0, 100), (120.0, 500)):
        pace.add("steps", seconds, pace.steps(tokens))
    assert pace.left("steps", 10) == 60.0 and pace.left("looks", 2.5, "steps", 0.5) == 7.5
    pace.add("looks", 30.0, 2.5)
    assert pace.left("looks", 5.0, "steps", 0.5) == 60.0
    for _ in range(2 * runtime.LATELY):
        pace.add("steps", 1.0)
    assert pace.left("steps", 10) == 10.0  # a machine that is quicker by now


@pytest.mark.parametrize("steps, every, known", [(24, 12, {1: 2, 12: 2, 13: 1, 24: 1}), (25, 12, {12: 3, 13: 2, 25: 1}),
                                                 (5, 100, {1: 1, 5: 1}), (3, 1, {1: 3, 2: 2, 3: 1})])
def test_evaluations_that_are_to_come(steps, every, known):
    """Each `every` steps and at the end; that of the step itself has not come when its line is printed."""
    assert {done: runtime.looks_left(done, steps, every) for done in known} == known


@both_families
def test_the_share_of_the_forward_pass(shape, make_model):
    """A third where all learns; with adapters in the last of four blocks four of five, in all of them half."""
    model = make_model(n_layer=4, **shape)
    o = SimpleNamespace(lora_rank=0, lora_alpha=1.0, lora_layers=0, freeze_layers=0)
    shares = [runtime.forward_share(model, o)]
    for changes in ({"lora_rank": 2, "lora_layers": 1}, {"lora_rank": 2}, {"freeze_layers": 2}):
        own = SimpleNamespace(**{**vars(o), **changes})
        shares.append(runtime.forward_share(adapters.learner(make_model(n_layer=4, **shape), "lm", own,
                                                             torch.Generator()), own))
    assert shares == pytest.approx([1 / 3, 4 / 5, 1 / 2, 1 / 2])


@pytest.mark.parametrize("usual, first, steps, look, left", [
    (192.5, [(181, 1.443), (49, 0.255), (168, 0.471)], 178, (12_478, 500 / 8, 1 / 2), 101.5),
    (697.4, [(463, 0.693), (813, 0.878), (804, 1.063)], 76, (13_074, 13_074 / 697.4, 1 / 1.4), 74.6)],
    ids=["sft", "rm"])
def test_the_time_left_of_a_default_run(usual, first, steps, look, left):
    """After three steps within 20 % of what came then, measured on two cores: tokens and seconds of the first three,
    the steps there are, an evaluation's tokens, passes and share of a training step."""
    pace = runtime.Pace(usual)
    for tokens, seconds in first:
        pace.add("steps", seconds, pace.steps(tokens))
    tokens, passes, share = look
    told = pace.left("steps", steps - 3) + pace.left("looks", share * pace.steps(tokens, passes), "steps")
    assert told == pytest.approx(left, rel=0.2)


def test_the_time_left_while_only_the_value_network_learns(make_model):
    """Of 24 steps the first 4 last 9 + 3 seconds; later ones take 3 more, and as much again as the head has numbers
    beside the blocks, twice, on 40 of 64 tokens. When such a step has come, it is what tells: 9 + 6 seconds."""
    policy, o = make_model(n_layer=1, n_embd=16, vocab_size=200), SimpleNamespace(value_warmup=4)
    batch = SimpleNamespace(response_mask=torch.ones(4, 10, dtype=torch.bool), lengths=torch.full((4,), 16))
    pace, blocks = runtime.Pace(), 12 * 16 ** 2 + 13 * 16
    for step in range(6):
        pace.add("judged", 9.0 if step else 30.0)
        pace.add("warm-up" if step < 4 else "update", 3.0 if step < 4 else 6.0)
        told = evaluate.ppo_time_left(pace, policy, batch, step + 1, 24, o)
        more = 2 * 200 * 16 / blocks * 40 / 64
        if step in (1, 2):
            assert told == pytest.approx((23 - step) * 9.0 + (3 - step) * 3.0 + 20 * 3.0 * (2 + more))
        if step == 5:
            assert told == 18 * (9.0 + 6.0)


def test_progress_by_hand(start, monkeypatch):
    """Step 37 of 200 after 74 seconds, with 326 to come."""
    run = start()
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: run.started + 74.0)
    assert run.progress(37, 200, 326.0) == " 37/200  18% 1:14<5:26"
    shown = [runtime.clock(seconds) for seconds in (0, 59.4, 59.6, 3599.5, 36_061)]
    assert shown == ["0:00", "0:59", "1:00", "1:00:00", "10:01:01"]


# Signals and ranks


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(start, tmp_path, capfd, number, status):
    """The handler takes note and says so; the loop asks, saves, and exits 128 + the signal's number, lock released."""
    run = start()
    assert not run.should_stop()
    os.kill(os.getpid(), number)
    assert run.should_stop() and "finishing this step" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stop, run:
        run.exit_stopped()
    assert stop.value.code == status and not (tmp_path / "out" / "lock").exists()
    assert "--resume" in capfd.readouterr().out


def test_ranks_share_a_batch(start):
    """Of seven rows three ranks take every third; together they have each once. One process has all."""
    run = start()
    assert run.share([*range(7)]) == [*range(7)] and run.total(torch.tensor(3.0)) == 3
    run.world, shares = 3, []
    for run.rank in range(3):
        shares.append(run.share([*range(7)]))
    run.world, run.rank = 1, 0
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


# Matmuls


def test_matmuls_stay_float32(precision):
    """Whatever was picked on this CPU: a sum of 512 terms errs by float32's 1e-4, where bfloat16 would by 1e-1."""
    precision("highest")
    plain = kernels.matmul_error()
    kernels.pick_matmul(GPT(GPTConfig(1, 1, 128, 5, 4)))
    assert kernels.matmul_error() < kernels.MATMUL_ERROR and 1e-5 < plain < kernels.MATMUL_ERROR
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    rough = (a.bfloat16() @ b.bfloat16()).double() - a.double() @ b.double()
    assert rough.abs().max() > 100 * kernels.MATMUL_ERROR


@pytest.mark.parametrize("device, width, name, error, picked", [
    ("cpu", 128, "AMD EPYC", 1e-4, "medium"), ("cpu", 128, "Intel(R) Xeon(R)", 1e-4, "highest"),
    ("cpu", 128, None, 1e-4, "highest"), ("cpu", 128, "AMD EPYC", 1e-2, "highest"),
    ("cpu", 128, "AMD EPYC", 1e-1, "highest"), ("cpu", 127, "AMD EPYC", 1e-4, "highest"),
    ("meta", 128, "AMD EPYC", 1e-4, "highest")])
def test_other_matmuls_only_where_they_are_exact(monkeypatch, precision, device, width, name, error, picked):
    """A chip that rounds to TF32 or bfloat16, is not AMD's or not known, keeps the matmuls it had; so do other devices
    and narrow models."""
    precision("highest")
    monkeypatch.setattr(kernels, "matmul_error", lambda: error)
    if name is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    kernels.pick_matmul(GPT(GPTConfig(1, 1, width, 5, 4)).to(device))
    assert torch.get_float32_matmul_precision() == picked


# Optimizers and learning rate


def test_adamw_is_torch_s(make_model):
    """Three steps and a state that was saved and loaded: the same weights to the last bit."""
    weights = []
    for kind in (torch.optim.AdamW, kernels.AdamW):
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        for step in range(3):
            model(torch.tensor([[1, 2, 3 + step]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state = optimizer.state_dict()
            optimizer = kind(model.parameters(), lr=0.5, fused=True)
            optimizer.load_state_dict(state)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_no_gradient_is_left_after_a_step(make_model):
    """The next batch's would be added to it; each optimizer moves its own weights once."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = [torch.optim.SGD([p for name, p in model.named_parameters() if name.startswith("h.") == blocks],
                                  lr=0.5) for blocks in (True, False)]
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    runtime.optimizer_step(model, optimizers, 1.0, "here", SimpleNamespace(max_grad_norm=0.0))
    for name, p in model.named_parameters():
        assert p.grad is None
        torch.testing.assert_close(p, before[name] - 0.5 * gradients[name])


def test_optimizers_import_no_compiler():
    """torch._dynamo takes longer to import than all else that a step needs."""
    code = ("import sys, torch; from types import SimpleNamespace as N; from minirlhf import runtime, model\n"
            "net = model.GPT(model.GPTConfig(1, 1, 4, 5, 8))\n"
            "o = N(optimizer='muon', learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.1)\n"
            "optimizers = runtime.make_optimizers(net, o)\n"
            "net(torch.tensor([[1, 2]])).sum().backward()\n"
            "for one in optimizers: one.step(); one.zero_grad(); one.load_state_dict(one.state_dict())\n"
            "print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))})
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_who_optimises_what(make_model, optimizer):
    """Every parameter once; Muon has the blocks' matrices and nothing else; biases and LayerNorms are not decayed."""
    model = make_model()
    o = SimpleNamespace(optimizer=optimizer, learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.1)
    optimizers = runtime.make_optimizers(model, o)
    groups = [group for one in optimizers for group in one.param_groups]
    names = {p: name for name, p in model.named_parameters()}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    for group in groups:
        assert all((p.dim() == 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    matrices = {name for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    by_muon = {names[p] for one in optimizers if isinstance(one, torch.optim.Muon)
               for group in one.param_groups for p in group["params"]}
    assert by_muon == (matrices if optimizer == "muon" else set())
    runtime.set_rate(optimizers, 0.5)
    assert [one.param_groups[0]["lr"] for one in optimizers] == [0.005, 0.01][:len(optimizers)]


@pytest.mark.parametrize("limit, scaled", [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_clip_gradients_by_hand(refused, limit, scaled):
    """A gradient (3, 4) of norm 5 is scaled down to the limit, never up, and not at all by 0; a loss that is not finite
    is refused, whatever its gradient."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    o = SimpleNamespace(max_grad_norm=limit, out_dir="out/x", learning_rate=0.1)
    assert runtime.clip_gradients(model, 1.0, "step 1", o) == 5.0
    assert model.weight.grad[0].tolist() == pytest.approx(scaled, abs=1e-5)
    assert "step 7: not finite (loss nan" in refused(runtime.clip_gradients, model, float("nan"), "step 7", o)


def test_a_cosine_with_warmup_by_hand():
    """Ten steps, a fifth of them warm-up: 1/2, 1, then (1 + cos(pi k/8)) / 2 for k = 0, 1, ...; 0 after the last."""
    rates = [rate_factor("cosine", step, 10, 0.2) for step in range(11)]
    expected = [0.5, 1.0, 1.0, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806, 0.0]
    assert rates == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps, ratio", [(1, 0.0), (1, 1.0), (2, 0.5), (5, 0.0), (5, 1.0), (1000, 0.05)])
def test_a_cosine_with_warmup_stays_between_0_and_1(steps, ratio):
    """Never 0 in a step that is taken, never above the peak, which is reached; extremes included."""
    rates = [rate_factor("cosine", step, steps, ratio) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1


def test_count_parameters(make_model):
    """A tied matrix counts once: 13 x 16 embeddings, 32 x 16 places, two blocks, the last LayerNorm."""
    block = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16 + 4 * 16
    assert runtime.count_parameters(make_model()) == 13 * 16 + 32 * 16 + 2 * block + 2 * 16


def test_muon_in_float32_equals_torch_s(monkeypatch):
    """Five steps with weight decay, on tall, wide and square matrices and one without a gradient, are those of
    torch.optim.Muon where that does not round to bfloat16; their state goes into torch's own and back."""
    g = torch.Generator().manual_seed(0)
    shapes = ((12, 4), (4, 12), (8, 8), (3, 3))
    start = [torch.randn(shape, generator=g) for shape in shapes]
    gradients = [[torch.randn(shape, generator=g) for shape in shapes[:3]] for _ in range(5)]
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    ends, states = [], []
    for kind in (torch.optim.Muon, kernels.Muon):
        weights = [w.clone().requires_grad_() for w in start]
        optimizer = kind(weights, lr=0.1, weight_decay=0.3)
        for step in gradients:
            for p, gradient in zip(weights, step):
                p.grad = gradient.clone()
            optimizer.step()
        ends.append(weights), states.append(optimizer.state_dict())
    torch.testing.assert_close(ends[1], ends[0])
    assert torch.equal(ends[1][3], start[3]) and not torch.allclose(ends[1][0], start[0], atol=0.1)
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.parametrize("native", [True, False])
def test_muon_is_torch_s_where_the_chip_has_bfloat16(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    model = torch.nn.Module()
    model.h = torch.nn.Linear(2, 2)
    o = SimpleNamespace(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.1)
    assert (type(runtime.make_optimizers(model, o)[1]) is torch.optim.Muon) is native


# ---- beside other processes

def looks(monkeypatch, shares, cores=2, threads=2):
    """What `kernels.watch` does at looks that find these shares of the cores taken by others: idle threads after each."""
    found, at = [], iter(shares)

    class Load:
        def others(self):
            return next(at)

    def sleep(seconds):
        found.append(sum(thread.name == "idle_team" for thread in threading.enumerate()))

    class Named(threading.Thread):
        def __init__(self, **settings):
            super().__init__(**settings, name="idle_team")

    def idle_team(leave):
        leave.wait()

    monkeypatch.setattr(kernels, "Load", Load)
    monkeypatch.setattr(kernels, "cores_allowed", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "time", SimpleNamespace(sleep=lambda seconds: (time.sleep(0.05), sleep(seconds))))
    monkeypatch.setattr(kernels, "threading", SimpleNamespace(Thread=Named, Event=threading.Event))
    monkeypatch.setattr(kernels, "idle_team", idle_team)
    with pytest.raises(StopIteration):
        kernels.watch(0)
    return found[1:]


def test_a_team_sleeps_while_others_want_the_cores(monkeypatch):
    """Two threads on two cores: others may have 0.3 cores, a share of 0.15, and 0.15 cores once the team is there."""
    assert looks(monkeypatch, [0.14, 0.16, 0.08, 0.07, 0.14, 0.5, 0.0]) == [0, 1, 1, 0, 0, 1, 0]


def test_threads_and_teams_add_up_to_more_than_the_cores(monkeypatch):
    """Four cores, two threads: nothing stands still until others take 2.3 cores; then 2 + 3 threads are more than 4."""
    assert looks(monkeypatch, [0.57, 0.58, 0.0], cores=4) == [0, 3, 0]
    assert looks(monkeypatch, [0.9, 0.9], cores=2, threads=3) == [0, 0]  # more than the cores as it is


SPINNING = """
import sys, threading, time, torch
from minirlhf import kernels
torch.set_num_threads(2)
kernels.cores_allowed = lambda: 2
x = torch.zeros(1 << 17)
def used():
    began = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.002)
    return time.process_time() - began
used()
alone, leave = used(), threading.Event()
teams = [threading.Thread(target=kernels.idle_team, args=(leave,)) for _ in range(%d)]
for team in teams: team.start()
time.sleep(0.3)
beside = used()
leave.set()
for team in teams: team.join()
time.sleep(0.3)
print(alone, beside, used())
"""


@pytest.mark.skipif("GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ or sys.platform != "linux",
                    reason="how to wait is set, or there is no GNU OpenMP")
def test_threads_spin_only_while_there_is_no_idle_team():
    """Between loops of two threads 2 ms pass, 100 times: a thread that spins burns most of these 0.2 s, in its user's
    name; one that sleeps does not. It spins again when the team is gone."""
    teams = len(os.sched_getaffinity(0)) - 1
    out = subprocess.run([sys.executable, "-c", SPINNING % teams], capture_output=True, text=True, check=True, cwd=ROOT)
    alone, beside, after = map(float, out.stdout.split())
    assert beside < 0.5 * alone and beside < 0.5 * after


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_has_said_of_waiting_stands(monkeypatch, name):
    """Nothing watches where the environment says how threads wait, or where one thread has nobody to wait for."""
    started = []
    monkeypatch.setattr(kernels, "threading", SimpleNamespace(Thread=lambda **settings: started.append(settings) or
                                                              SimpleNamespace(start=lambda: None)))
    for other in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    kernels.share_cores.__wrapped__()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setenv(name, "active")
        kernels.share_cores.__wrapped__()
    assert not started
    if os.path.exists("/proc/stat"):
        kernels.share_cores.__wrapped__()
        assert [settings["target"] for settings in started] == [kernels.watch]
