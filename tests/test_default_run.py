"""The README's first command on the real data, and an independent judge; the same from random weights, cut short.
Minutes each, so they carry the marker `slow`."""
import json
import os
import subprocess
import sys
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
pytestmark = pytest.mark.slow


def run(*command, cwd):
    """One process, its output passed on; returns seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=cwd, env={**os.environ, "PYTHONPATH": ROOT}, timeout=2400,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ {' '.join(command)}\n{done.stdout}")
    assert done.returncode == 0
    return time.perf_counter() - began


def script(stage):
    return os.path.join(ROOT, f"train_{stage}.py")


def rows(path, key):
    return [row[key] for row in map(json.loads, open(path)) if key in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("default")


def test_default_run(folder):
    """Fetched weights and data, three scripts at their defaults: the policy's answers are preferred, near the SFT model
    and fluent; a judge trained on other sentences agrees. All that it leaves on the disk is small."""
    seconds = {stage: run(script(stage), cwd=folder) for stage in ("sft", "rm")}
    run(script("rm"), "--preferences", "judge", "--out_dir", "out/judge", cwd=folder)
    seconds["ppo"] = run(script("ppo"), "--judge", "out/judge", cwd=folder)
    print({stage: round(s) for stage, s in seconds.items()}, "seconds")
    bits = rows(folder / "out/sft/metrics.jsonl", "eval")[-1]["all"]["bits_per_byte"]
    accuracy = rows(folder / "out/rm/metrics.jsonl", "final")[-1]["figures"]["mean"]["accuracy"]
    (final,) = rows(folder / "out/ppo/metrics.jsonl", "final")
    before, after = final["before"], final["after"]
    assert bits < 1.4 and accuracy > 0.77
    assert after["prompts"] >= 250 and after["win_rate"][0] > 0.85 and after["judge_win_rate"][0] > 0.75
    # seeds, and processors' rounding, spread about as widely as these limits lie from the README's figures
    assert after["kl"][0] < 20 and after["eos_rate"] > 0.9 and after["repeated"] < 0.15
    assert after["distinct_2"] > 0.7 * before["distinct_2"]
    assert 0.5 < after["mean_length"] / before["mean_length"] < 1.6
    assert after["ref_logprob_per_token"] > before["ref_logprob_per_token"] - 0.7
    left = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    assert left < 2e9, f"{left:,} bytes"


def test_scratch_run(folder):
    """`@scratch`, a fifth of it: a vocabulary and a model from random weights learn to continue sentences and to tell
    which people prefer, and the policy's answers score higher."""
    run(script("sft"), "@scratch", "--num_train_epochs", "0.8", cwd=folder)
    run(script("rm"), "@scratch", "--num_train_epochs", "0.2", "--num_scale_samples", "256", cwd=folder)
    run(script("ppo"), "@scratch", "--total_episodes", "2304", "--num_eval_prompts", "256", cwd=folder)
    bits = rows(folder / "out/scratch/sft/metrics.jsonl", "eval")[-1]["all"]["bits_per_byte"]
    accuracy = rows(folder / "out/scratch/rm/metrics.jsonl", "final")[-1]["figures"]["mean"]["accuracy"]
    (final,) = rows(folder / "out/scratch/ppo/metrics.jsonl", "final")
    assert bits < 2.4 and accuracy > 0.62 and final["after"]["score"][0] > final["before"]["score"][0] + 0.1
