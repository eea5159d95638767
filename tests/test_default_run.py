"""The README's first command on the real weights and data, with a judge, and `@scratch`: each cut short, but still
minutes, so they carry the marker `slow`."""
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


def test_default_run(tmp_path):
    """Fetched weights and data, a part of the default run: the SFT model has learned what the sentences are like, the
    reward model and a judge trained on other sentences tell which people prefer, and the policy's answers score higher
    by both, not far from the SFT model. All that is left on the disk is small."""
    seconds = {"sft": run(script("sft"), "--max_steps", "80", "--num_eval_texts", "300", cwd=tmp_path)}
    few = "--num_eval_texts", "300", "--num_scale_samples", "64"
    seconds["rm"] = run(script("rm"), "--max_steps", "30", *few, cwd=tmp_path)
    seconds["judge"] = run(script("rm"), "--preferences", "judge", "--max_steps", "30", *few, "--out_dir",
                           "out/judge", cwd=tmp_path)
    seconds["ppo"] = run(script("ppo"), "--total_episodes", "704", "--num_eval_prompts", "128", "--eval_interval", "50",
                         "--learning_rate", "2e-3", "--missing_eos_penalty", "1.5", "--ent_coef", "0",
                         "--judge", "out/judge", cwd=tmp_path)  # a reward model of 30 steps likes long answers
    print({stage: round(s) for stage, s in seconds.items()}, "seconds")
    bits = rows(tmp_path / "out/sft/metrics.jsonl", "eval")[-1]["all"]["bits_per_byte"]
    accuracy = rows(tmp_path / "out/rm/metrics.jsonl", "final")[-1]["figures"]["mean"]["accuracy"]
    (final,) = rows(tmp_path / "out/ppo/metrics.jsonl", "final")
    before, after = final["before"], final["after"]
    assert bits < 1.45 and accuracy > 0.68
    assert after["score"][0] > before["score"][0] + 0.1 and after["judge_score"][0] > before["judge_score"][0]
    assert after["win_rate"][0] > 0.5 and 0 < after["kl"][0] < 15 and after["eos_rate"] > 0.5
    left = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left < 2e9, f"{left:,} bytes"


def test_scratch_run(tmp_path):
    """`@scratch`, a fifth of it: a vocabulary and a model from random weights learn to continue sentences and to tell
    which people prefer, and the policy's answers score higher."""
    run(script("sft"), "@scratch", "--num_train_epochs", "0.8", cwd=tmp_path)
    run(script("rm"), "@scratch", "--num_train_epochs", "0.2", "--num_scale_samples", "256", cwd=tmp_path)
    run(script("ppo"), "@scratch", "--total_episodes", "2304", "--num_eval_prompts", "256", cwd=tmp_path)
    bits = rows(tmp_path / "out/scratch/sft/metrics.jsonl", "eval")[-1]["all"]["bits_per_byte"]
    accuracy = rows(tmp_path / "out/scratch/rm/metrics.jsonl", "final")[-1]["figures"]["mean"]["accuracy"]
    (final,) = rows(tmp_path / "out/scratch/ppo/metrics.jsonl", "final")
    assert bits < 2.4 and accuracy > 0.62 and final["after"]["score"][0] > final["before"]["score"][0] + 0.1
