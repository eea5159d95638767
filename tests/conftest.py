"""What the test files share: the package on the path, small models whose leaks would show, and the command line."""
import multiprocessing
import os
import resource
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minirlhf.model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)  # the models are small, and a machine that does other things slows two threads down most


# every option of the Llama family at once; tests of what holds in both families take `shape`
LLAMA = {"family": "llama", "n_head": 4, "n_kv_head": 2, "head_size": 6, "n_inner": 24, "rope_theta": 50.0,
         "norm_eps": 1e-3, "qkv_bias": True, "qk_norm": True, "tied": False}
both_families = pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])


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
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "minirlhf.check"])
    count, running = 0, []

    def __init__(self, *argv, cwd, env=(), largest_file=None):
        Command.count += 1
        logs = [os.path.join(cwd, f".{name}.{Command.count}") for name in ("out", "err")]
        for log in logs:
            Path(log).touch()
        self.process = self.context.Process(target=self.run, daemon=True, args=(
            [*map(str, argv)], str(cwd), logs, dict(env), largest_file))
        threads, path = os.environ.get("OMP_NUM_THREADS"), os.environ.get("PYTHONPATH")
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # for the first process, which the others fork
        self.process.start()
        for name, value in (("OMP_NUM_THREADS", threads), ("PYTHONPATH", path)):
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.pid, self.logs = self.process.pid, logs
        Command.running.append(self.process)

    @staticmethod
    def run(argv, cwd, logs, env, largest_file):
        for number, log in enumerate(logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        os.chdir(cwd)
        os.environ.update(env)
        sys.stdout.reconfigure(encoding=env.get("PYTHONIOENCODING", "utf-8"))
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.argv = argv
        if argv[0].endswith(".py"):
            sys.argv[0] = str(ROOT / argv[0])
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.modules.pop(argv[0], None)  # as in a process of its own, where nothing has imported it yet
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)

    def wait(self, timeout=120):
        """-> exit status (128 + N where signal N killed it), standard output, standard error."""
        self.process.join(timeout)
        status = self.process.exitcode
        assert status is not None, "still running"
        Command.running.remove(self.process)
        self.process.close()
        return 128 - status if status < 0 else status, *(Path(log).read_text("utf-8") for log in self.logs)


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
