"""Memory and time do not creep: what a long run holds, and what opening a large file costs."""
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

from conftest import scratch
from minirlhf import export, fetch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
SIZE = 200_000_000  # bytes of the large file
WORDS = [f"{head}{body}{tail}" for head in ("b", "d", "fr", "k", "pl", "st") for body in ("a", "e", "ina", "o", "ulo")
         for tail in ("", "ck", "lly", "nd", "rs")]
TINY = "--device cpu --dtype float32 --n_layer 1 --n_head 2 --vocab_size 320".split()


def write(path, make_record, size):
    """Records, one a line, until the file has `size` bytes."""
    rng, written = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as f:
        while written < size:
            written += f.write(json.dumps(make_record(rng)) + "\n")


def sentence(rng, least, most):
    return " " + " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def field(pid, file, name):
    """A number of /proc/PID/FILE; what is given in kB comes in bytes."""
    with open(f"/proc/{pid}/{file}") as f:
        number, *unit = next(line for line in f if line.startswith(f"{name}:")).split()[1:]
    return int(number) * (1024 if unit else 1)


def steps_of(path):
    """Lines of a run's metrics.jsonl, 0 while there is none."""
    return open(path, "rb").read().count(b"\n") if os.path.exists(path) else 0


def start(stage, folder, *options):
    command = [sys.executable, os.path.join(ROOT, f"train_{stage}.py"), *scratch(stage), "--data_dir", "data", *options]
    with open(folder / f"{stage}.log", "wb") as log:
        return subprocess.Popen(command, cwd=folder, env=ENV, stdout=log, stderr=log)


@pytest.mark.slow
def test_ppo_s_memory_stays(tmp_path):
    """300 steps, a look at held-out prompts and a checkpoint every 10, end with the resident size of step 50 within 5%,
    and at no step between them is it larger."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write(tmp_path / "data" / f"sft.{split}.jsonl",
              lambda rng: {"prompt": "the", "completion": sentence(rng, 1, 4)}, 20_000)
        write(tmp_path / "data" / f"prompts.{split}.jsonl", lambda rng: {"prompt": "the" + sentence(rng, 1, 4)}, 4000)
    (tmp_path / "reward.py").write_text("def score(prompts, answers):\n    return [len(text) for text in answers]\n")
    sft = start("sft", tmp_path, *TINY, "--n_embd", "32", "--block_size", "48", "--num_train_epochs", "1")
    assert sft.wait(120) == 0, (tmp_path / "sft.log").read_text()[-3000:]
    ppo = start("ppo", tmp_path, "--device", "cpu", "--reward", "reward.py:score", "--total_episodes", "9600",
                "--batch_size", "32", "--num_mini_batches", "4", "--response_length", "16", "--max_ref_kl", "0",
                "--eval_interval", "10", "--num_eval_prompts", "32")
    resident, metrics = {}, tmp_path / "out" / "ppo" / "metrics.jsonl"
    while ppo.poll() is None:
        if (step := steps_of(metrics)) > max(resident, default=0):
            resident[step] = field(ppo.pid, "status", "VmRSS")
        time.sleep(0.01)
    assert ppo.returncode == 0 and steps_of(metrics) == 301, (tmp_path / "ppo.log").read_text()[-3000:]
    at_50 = resident[min(step for step in resident if step >= 50)]
    print({step: f"{size / at_50:.3f}" for step, size in resident.items() if step % 50 == 0})
    assert max(resident) >= 299 and len(resident) > 250
    assert max(size for step, size in resident.items() if step >= 50) <= 1.05 * at_50


LOAD = """
import sys, time
from minirlhf import data

def number(file, name):  # VmHWM and not ru_maxrss, which begins with the size of the process that started this one
    return int(open(f"/proc/self/{file}").read().split(f"{name}:")[1].split()[0])

load, path = getattr(data, sys.argv[1]), sys.argv[2]
peak, read, began = number("status", "VmHWM"), number("io", "rchar"), time.process_time()
rows = load(path)
seconds = time.process_time() - began
print(len(rows), 1024 * (number("status", "VmHWM") - peak), number("io", "rchar") - read, seconds)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a large file of demonstrations and one of preferences, of short rows and long."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "data").mkdir()
    write(folder / "data" / "sft.train.jsonl",
          lambda rng: {"prompt": sentence(rng, 4, 60), "completion": sentence(rng, 4, 200)}, SIZE)
    write(folder / "data" / "sft.val.jsonl",
          lambda rng: {"prompt": sentence(rng, 4, 60), "completion": sentence(rng, 4, 200)}, 100_000)
    write(folder / "preferences.jsonl", lambda rng: {
        "prompt": sentence(rng, 4, 60), "chosen": sentence(rng, 4, 100), "rejected": sentence(rng, 4, 100)}, SIZE)
    yield folder
    for path in (folder / "data" / "sft.train.jsonl", folder / "preferences.jsonl"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("load, name, most", [("load_demonstrations", "data/sft.train.jsonl", 2.5),
                                              ("load_preferences", "preferences.jsonl", 2.5),
                                              ("load_prompts", "data/sft.train.jsonl", 1.0)])
def test_loading_costs_a_small_multiple(large, load, name, most):
    """A file of 200 MB is read once, at more than 5 MB a second, and all rows of it together take at most `most` times
    its size."""
    path = str(large / name)
    out = subprocess.run([sys.executable, "-c", LOAD, load, path], env=ENV, capture_output=True, text=True, check=True)
    rows, memory, read, seconds = map(float, out.stdout.split())
    size = os.path.getsize(path)
    print(f"{load}: {memory / size:.2f} times the size in memory, {read / size:.3f} read, {seconds:.1f} s")
    assert rows == sum(1 for _ in open(path, "rb"))
    assert size <= read < 1.01 * size and memory < most * size and seconds < 40


def begin(folder):
    """Stage 1 as far as its first step -> bytes of memory at most, bytes read."""
    metrics, began = folder / "out" / "sft" / "metrics.jsonl", time.monotonic()
    sft = start("sft", folder, *TINY, "--n_embd", "8", "--block_size", "512", "--batch_size", "4",
                "--long_prompts", "trim", "--eval_interval", "1000000", "--num_train_epochs", "100")
    try:
        while not steps_of(metrics) and sft.poll() is None and time.monotonic() - began < 600:
            time.sleep(0.1)
        assert steps_of(metrics) and sft.poll() is None, (folder / "sft.log").read_text()[-3000:]
        return field(sft.pid, "status", "VmHWM"), field(sft.pid, "io", "rchar")
    finally:
        sft.kill()
        sft.wait()


@pytest.mark.slow
def test_stage_1_begins_with_a_small_multiple(large, tmp_path):
    """From such a file to the first step, tokenizer and ids included, takes at most 6 times its size more than from a
    small one; 2 of it are read, for the rows and for the fingerprint."""
    size = os.path.getsize(large / "data" / "sft.train.jsonl")
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copy(large / "data" / "sft.val.jsonl", tmp_path / "data" / f"sft.{split}.jsonl")
    memory, read = (a - b for a, b in zip(begin(large), begin(tmp_path)))
    print(f"stage 1: {memory / size:.2f} times the size in memory, {read / size:.3f} read")
    assert memory < 6 * size and read < 2.1 * size


READ = """
import sys, torch
from minirlhf import checkpoint, memory
torch.ones(9) @ torch.ones(9)
began = memory.field("/proc/self/status", "VmRSS")
model, *_ = checkpoint.load(sys.argv[1], ["sft"], torch.device("cpu"))
print(sum(4 * p.numel() for p in model.parameters()), memory.field("/proc/self/status", "VmHWM") - began)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{kind: SmolLM2 in a file of that kind}"""
    weights, folder = pytest.importorskip("safetensors.torch"), tmp_path_factory.mktemp("published")
    export.export(fetch.smollm2(), str(folder / "safetensors"))
    loaded = weights.load_file(folder / "safetensors" / "model.safetensors")
    for kind in ("bfloat16", "pickle"):
        shutil.copytree(folder / "safetensors", folder / kind, ignore=shutil.ignore_patterns("model.safetensors"))
    weights.save_file({name: w.bfloat16() for name, w in loaded.items()}, folder / "bfloat16" / "model.safetensors")
    torch.save(loaded, folder / "pickle" / "pytorch_model.bin")
    yield {"gguf": fetch.smollm2(), **{kind: str(folder / kind) for kind in ("safetensors", "bfloat16", "pickle")}}
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "safetensors", "bfloat16", "pickle"])
def test_reading_a_model_costs_little_more_than_its_weights(published, kind):
    """At most 1.3 times its weights in float32, whatever the file holds."""
    out = subprocess.run([sys.executable, "-c", READ, published[kind]], env=ENV, stdout=subprocess.PIPE, check=True)
    weights, most = map(int, out.stdout.split())
    print(f"{kind}: {most / weights:.2f} times the float32 weights of {weights:,} bytes")
    assert weights < most < 1.3 * weights
