"""What the test files share: the package on the path, small models whose leaks would show, the command line, and a
world so small that a stage takes a tenth of a second."""
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minirlhf import checkpoint, config, evaluate, rewards  # noqa: E402
from minirlhf.model import GPT, GPTConfig  # noqa: E402

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to look for a GPU starts no CUDA, which no fork survives
torch.set_num_threads(1)  # the models are small, and a machine that does other things slows two threads down most


# every option of the Llama family at once; tests of what holds in both families take `shape`
LLAMA = {"family": "llama", "n_head": 4, "n_kv_head": 2, "head_size": 6, "n_inner": 24, "rope_theta": 50.0,
         "norm_eps": 1e-3, "qkv_bias": True, "qk_norm": True, "tied": False}
both_families = pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])


def script(stage):
    """The module that trains a stage."""
    return importlib.import_module("minirlhf.dpo" if stage == "dpo" else f"train_{stage}")


def scratch(stage):
    """Words that make a stage train a small model in full, as `@scratch` does, in the usual folders."""
    found = config.preset_values(script(stage).Options, config.presets()["scratch"])
    return [f"--{name}={value}" for name, value in found.items()
            if name not in ("out_dir", "reward_model") and (name != "init_from" or stage == "sft")]


# ---- two processes

def pytest_addoption(parser):
    parser.addoption("--processes", type=int, choices=(1, 2), default=2, help="that share the fast tests (default: 2)")


def pytest_runtestloop(session):
    """The fast tests run in two processes: this one takes them from the front, a fork of it from the back, until they
    meet. The fork sends its reports here, where they are printed and counted as one's own."""
    config = session.config
    if (config.option.processes == 1 or config.option.markexpr != "not slow" or len(session.items) < 100
            or config.option.usepdb or config.option.collectonly or config.option.basetemp or session.testsfailed
            or not hasattr(os, "fork") or os.cpu_count() < 2):
        return None  # as pytest does it
    config._tmp_path_factory.getbasetemp()  # one for both
    front, back = multiprocessing.Value("i", 0), multiprocessing.Value("i", len(session.items) - 1)
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def items(own, step):
        """This process's next test, until there is none that nobody has taken."""
        while True:
            with front.get_lock():
                if front.value > back.value:
                    return
                own.value += step
                at = own.value - step
            yield session.items[at]

    def run(mine, after_each=lambda: None):
        item = next(mine, None)
        while item is not None:
            following = next(mine, None)
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            after_each()
            item = following

    sys.stdout.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            capture = config.pluginmanager.getplugin("capturemanager")
            capture.stop_global_capturing()  # its files are the parent's
            capture.start_global_capturing()
            config.pluginmanager.unregister(config.pluginmanager.getplugin("terminalreporter"))
            config.pluginmanager.register(Sender(config, sending))
            run(items(back, -1))
            sending.send(None)
            status = 0
        finally:
            os._exit(status)

    sending.close()
    finished = False

    def receive(seconds=0):
        nonlocal finished
        while not finished and receiving.poll(seconds):
            data = receiving.recv()
            finished = data is None
            if not finished:
                config.hook.pytest_runtest_logreport(
                    report=config.hook.pytest_report_from_serializable(config=config, data=data))
            stop()

    def stop():
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    try:
        run(items(front, 1), lambda: (stop(), receive()))
        while not finished:
            receive(None)
    except EOFError:
        pytest.exit("the second of two processes died", 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return True


class Sender:
    """Sends each test's reports to the process that prints them."""

    def __init__(self, config, pipe):
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report):
        self.pipe.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


@pytest.fixture
def make_model():
    """make_model(head="lm", **shape) -> GPT in eval mode, every parameter N(0, 0.4), norms' weights N(1, 0.4).

    That is 20 times GPT-2's initial weights: attention is sharp and biases are not 0, so that whatever reaches a token
    that should not moves its numbers by far more than rounding does.
    """
    def make(head="lm", seed=9, dtype=torch.float32, **shape):
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 13, "block_size": 32} | shape
        model = GPT(GPTConfig(**shape), head)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") or "_norm" in name else 0.0
            torch.nn.init.normal_(p, mean, 0.4, generator=generator)
        return model.to(dtype).eval()
    return make


@pytest.fixture
def precision():
    """Sets how torch multiplies float32, and puts it back."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def refused(capsys):
    """refused(function, *arguments) -> what it said on standard error, having ended with exit status 2 in one line."""
    def check(function, *arguments, **options):
        with pytest.raises(SystemExit) as stop:
            function(*arguments, **options)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error
    return check


class Command:
    """A command line, `train_sft.py --help` or `minirlhf.sample --help` for -m, running as a process in folder `cwd`.

    The process is forked from one that has imported torch, which saves the second that this takes, and has one thread.
    stop_after: it gets SIGTERM when it has written so many rows of metrics, however busy the machine is. memory: bytes
    that it may take beside those it has when it begins.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minirlhf.check"])
    count, running = 0, []

    def __init__(self, *argv, cwd, env=(), largest_file=None, stop_after=None, memory=None):
        Command.count += 1
        logs = [os.path.join(cwd, f".{name}.{Command.count}") for name in ("out", "err")]
        for log in logs:
            Path(log).touch()
        self.process = self.context.Process(target=self.run, daemon=True, args=(
            [*map(str, argv)], str(cwd), logs, dict(env), largest_file, stop_after, memory))
        threads, path = os.environ.get("OMP_NUM_THREADS"), os.environ.get("PYTHONPATH")
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # for the first process, which the others fork
        self.process.start()
        for name, value in (("OMP_NUM_THREADS", threads), ("PYTHONPATH", path)):
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.pid, self.logs = self.process.pid, logs
        Command.running.append(self.process)

    @staticmethod
    def run(argv, cwd, logs, env, largest_file, stop_after, memory):
        for number, log in enumerate(logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        os.chdir(cwd)
        os.environ.update(env)
        sys.stdout.reconfigure(encoding=env.get("PYTHONIOENCODING", "utf-8"))
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if memory:
            memory += os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if stop_after:
            Command.stop_after(stop_after)
        sys.argv = argv
        if argv[0].endswith(".py"):
            sys.argv[0] = str(ROOT / argv[0])
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.modules.pop(argv[0], None)  # as in a process of its own, where nothing has imported it yet
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)

    @staticmethod
    def stop_after(rows):
        from minirlhf.runtime import Run
        write, written = Run.write, []

        def write_and_stop(self, name, record):
            write(self, name, record)
            written.append(name)
            if name == "metrics.jsonl" and written.count(name) == rows:
                os.kill(os.getpid(), signal.SIGTERM)
        Run.write = write_and_stop

    def wait(self, timeout=600):
        """-> exit status (128 + N where signal N killed it), standard output, standard error."""
        self.process.join(timeout)
        status = self.process.exitcode
        assert status is not None, "still running"
        Command.running.remove(self.process)
        self.process.close()
        return 128 - status if status < 0 else status, *(Path(log).read_text("utf-8") for log in self.logs)


@pytest.fixture(autouse=True)
def no_reward_file_outlives_its_test():
    path = [*sys.path]
    yield
    for loaded in rewards.LOADED.values():
        sys.modules.pop(loaded.module.__name__, None)
    rewards.LOADED.clear(), rewards.TRIED.clear()
    sys.path[:] = [place for place in path if not place.endswith(".py")]  # nor that of a fixture, which is older


@pytest.fixture(autouse=True)
def nothing_is_unprinted_when_a_test_begins():
    config.unprinted.clear()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while Command.running:
        Command.running.pop().kill()


@pytest.fixture(scope="session")
def command():
    """command(*argv, cwd, code=0) -> what a command printed, output and error; it ended so, and without a traceback."""
    def call(*argv, cwd, code=0, **surroundings):
        status, out, error = Command(*argv, cwd=cwd, **surroundings).wait()
        assert status == code, f"{argv}: exit {status}\n{out[-3000:]}\n{error[-3000:]}"
        assert "Traceback" not in error
        return out, error
    return call


# ---- commands within this process

def tree(folder):
    """What lies below a folder: {path: when it was changed}."""
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in folder.rglob("*")
            if not path.name.startswith((".out", ".err")) and path.suffix != ".pyc" and path.name != "__pycache__"}


@pytest.fixture
def main(monkeypatch):
    """main(folder, *argv): a script's command within this process, in that folder; signals and threads are given
    back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    matmuls = torch.get_float32_matmul_precision()

    def call(folder, script, *argv):
        monkeypatch.chdir(folder)
        importlib.import_module(script.removesuffix(".py")).main([*map(str, argv)])

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(matmuls)


@pytest.fixture
def ran(main, capsys):
    """ran(folder, *argv) -> what a command printed, output and error, that ran within this process to its end."""
    def call(folder, *argv):
        capsys.readouterr()
        main(folder, *argv)
        return capsys.readouterr()
    return call


@pytest.fixture
def declined(main, refused):
    """declined(folder, *argv) -> the one line with which the command was refused; nothing has come or gone."""
    def call(folder, *argv):
        before = tree(folder)
        error = refused(main, folder, *argv)
        assert tree(folder) == before
        return error
    return call


# ---- stages so small that each takes a tenth of a second

class Ended(NamedTuple):
    """How a stage that ran in this process ended."""
    code: int
    said: str
    error: str
    folder: Path

    def rows(self, name="metrics.jsonl"):
        return [json.loads(line) for line in (self.folder / name).read_text("utf-8").splitlines()]

    def payload(self):
        return torch.load(self.folder / "ckpt.pt", weights_only=True)


class Tiny:
    """Data of a few letters, models of one narrow layer: each stage as `main([...])` in this process.

    `sft`, `rm`: checkpoints that stages start from. The SFT model was trained with dropout, and for so long that about
    half of its answers end. Of another seed: `folder`/other_sft and other_rm; other data: `folder`/other.
    """
    SHAPE = "--n_layer 1 --n_head 2 --n_embd 8 --vocab_size 260 --block_size 12".split()
    STAGES = {"sft": f"{' '.join(SHAPE)} --batch_size 4 --num_train_epochs 1 --response_length 4 --eval_interval 100",
              "rm": "--batch_size 4 --num_scale_samples 4 --response_length 4 --eval_interval 100",
              "ppo": "--total_episodes 8 --batch_size 4 --response_length 3 --num_eval_prompts 4 --value_warmup 0 "
                     "--micro_batch_size 4 --learning_rate 0.03 --eval_interval 100",
              "dpo": "--batch_size 4 --learning_rate 0.01 --response_length 3 --num_eval_prompts 4 --eval_interval 100"}

    def __init__(self, folder):
        self.folder, self.count, self.read = folder, 0, {}
        for name in ("data", "other"):
            (folder / name).mkdir()
            self.write_data(folder / name, name == "other")
        self.sft = self.rm = ""
        longer = "--dropout 0.1 --num_train_epochs 12 --batch_size 16 --learning_rate 0.05 --muon_learning_rate 0.1"
        for name, options in (("", longer.split()), ("other_", ["--seed", "7"])):
            sft, rm = folder / f"{name}sft", folder / f"{name}rm"
            assert not self.train("sft", *options, out=sft).code
            self.sft = str(sft / "ckpt.pt")
            assert not self.train("rm", out=rm).code
        self.sft, self.rm = str(folder / "sft" / "ckpt.pt"), str(folder / "rm" / "ckpt.pt")

    @staticmethod
    def write_data(folder, other):
        """Rows of 4 to 7 tokens and a long one; other data hold the same letters, so that tokenizers are the same."""
        words = [a + b + c for a in "abc" for b in "de" for c in "fgh"]
        words = words[::-1] if other else words
        for split, part in (("train", words[::2]), ("val", words[1::3])):
            def write(name, rows):
                (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            write("sft", [{"prompt": w[0], "completion": w[1:] + "." * (i % 3), "domain": w[1]}
                          for i, w in enumerate(part)] + [{"prompt": "abcdefgh" * 2, "completion": "df"}])
            pairs = [{"prompt": w[0], "chosen": w[1:] + ".", "rejected": w[:0:-1] + "." * (i % 2), "margin": 1 + i % 2}
                     for i, w in enumerate(part)] + [{"prompt": "abcdefgh" * 2, "chosen": "df", "rejected": "fd"}]
            write("preferences", pairs)
            write("judge", [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs])
            write("prompts", [{"prompt": w[:2]} for w in part] + [{"prompt": "abcdefgh" * n} for n in (2, 3, 4)])

    def train(self, stage, *options, out=None):
        """Run a stage with more options in a folder, a new one unless given -> Ended."""
        self.count += 1
        folder = Path(out or self.folder / "out" / str(self.count))
        argv = [] if "--resume" in options else scratch(stage)
        argv += ["--device", "cpu", "--dtype", "float32", "--data_dir", self.folder / "data", "--out_dir", folder,
                 *self.STAGES[stage].split()]
        argv += ["--init_from", self.sft] if stage != "sft" else []
        argv += ["--reward_model", self.rm] if stage == "ppo" else []
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        unpack = checkpoint.unpack

        def read_once(path, mmap=False):  # what every run starts from
            if mmap or path not in (self.sft, self.rm):
                return unpack(path, mmap)
            if path not in self.read:
                self.read[path] = unpack(path)
            return {**self.read[path]}
        said, error, code, interval = io.StringIO(), io.StringIO(), 0, evaluate.accuracy_with_interval
        replicates, interval.__defaults__ = interval.__defaults__, (0, 8)  # the bootstrap takes longer than all else
        checkpoint.unpack = read_once
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
                script(stage).main([*map(str, argv), *map(str, options)])
        except SystemExit as stop:
            code = stop.code if type(stop.code) is int else 1
            error.write("" if type(stop.code) is int else f"{stop.code}\n")
        finally:
            interval.__defaults__, checkpoint.unpack = replicates, unpack
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ended(code, said.getvalue(), error.getvalue(), folder)


@pytest.fixture
def loaded(monkeypatch):
    """{first stage that would do: (model, its weights as they were)} of what runs load from now on."""
    noted, load = {}, checkpoint.load

    def noting(path, stages, device):
        model, *rest = load(path, stages, device)
        noted[stages[0]] = model, {name: value.clone() for name, value in model.state_dict().items()}
        return model, *rest
    monkeypatch.setattr(checkpoint, "load", noting)
    return noted


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))
