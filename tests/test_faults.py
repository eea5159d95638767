"""Bad input and faults: what each must do, on the commands that a person runs: from outside, with real signals, where a
process dies or is told to end; within this process where it would make no difference.

A refusal is one line on standard error that names the file, line, flag or value, exit status 2, and nothing written.
What kills a run costs it nothing: it goes on to the same last bit.
"""
import contextlib
import errno
import fcntl
import importlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, Command, scratch, tree
from minirlhf import check, checkpoint, fetch, prepare, runtime, sizes
from minirlhf.config import parse

NOUNS, WORDS = ["cat", "dog", "sun", "sea", "king", "tree"], ["kind", "bright", "warm", "calm", "cold", "rude"]
SFT = ["train_sft.py", *scratch("sft")] + (
       "--data_dir data --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --vocab_size 300 "
       "--block_size 32 --batch_size 8 --num_train_epochs 1 --eval_interval 3 --log_interval 4 "
       "--response_length 8 --out_dir out/sft").split()
RM = ["train_rm.py", *scratch("rm")] + ("--data_dir data --device cpu --dtype float32 --batch_size 8 --eval_interval 3 "
      "--num_scale_samples 16 --response_length 8 --out_dir out/rm").split()
PPO = ["train_ppo.py", *scratch("ppo")] + (
       "--data_dir data --device cpu --total_episodes 64 --batch_size 8 --response_length 8 "
       "--eval_interval 3 --num_eval_prompts 8 --num_ppo_epochs 1 "
       "--value_warmup 1 --out_dir out/ppo").split()
STAGES = {"sft": SFT, "rm": RM, "ppo": PPO}
READS = {"sft": "sft.train.jsonl", "rm": "preferences.train.jsonl", "ppo": "prompts.train.jsonl"}
EVERY = pytest.mark.parametrize("stage", STAGES)
CLOCKS = ("tokens_per_second", "eps", "seconds", "rollout_seconds", "elapsed")


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, command):
    """A folder with a small data set and all three stages run on it."""
    folder, rng = tmp_path_factory.mktemp("finished"), random.Random(0)
    (folder / "data").mkdir()
    for split, n in (("train", 64), ("val", 12)):
        texts = sorted({f"the {rng.choice(NOUNS)} is {' and '.join(rng.sample(WORDS, 2))}." for _ in range(4 * n)})
        rng.shuffle(texts)
        rows = [{"prompt": t[:7], "completion": t[7:]} for t in texts[:n]]
        write(folder / "data" / f"sft.{split}.jsonl", rows)
        write(folder / "data" / f"preferences.{split}.jsonl",
              [{"prompt": "", "chosen": min(pair), "rejected": max(pair)} for pair in zip(texts, texts[1:])][:n])
        write(folder / "data" / f"prompts.{split}.jsonl", [{"prompt": f"the {noun}"} for noun in NOUNS])
    for options in STAGES.values():
        command(*options, cwd=folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def rejected(command):
    """rejected(folder, *argv) -> the same of a command in a process of its own, from outside."""
    def call(folder, *argv, **surroundings):
        before = tree(folder)
        _, error = command(*argv, cwd=folder, code=2, **surroundings)
        assert error.startswith("error: ") and error.count("\n") == 1 and tree(folder) == before
        return error
    return call


def fresh(stage, *more):
    """The stage's command with a new out_dir."""
    return [*STAGES[stage][:-1], "out/new", *more]


def again(stage, *more):
    return [*STAGES[stage], *more]


# ---- data


@EVERY
@pytest.mark.parametrize("line, words", [
    (b'{"prompt": "a",}', ["not JSON"]),
    (b'["a"]', ["expected an object"]),
    (b'{"prompt": null, "completion": 3, "chosen": 1, "rejected": 2}', ["must be a string", "has: 'prompt', 'complet"]),
    (b'{"prompt": "caf\xe9"}', ["not UTF-8", "byte 15"]),
], ids=["JSON", "object", "field", "UTF-8"])
def test_a_bad_line_is_named(folder, declined, stage, line, words):
    """Rows 1-4: file:line and the reason."""
    path = folder / "data" / READS[stage]
    path.write_bytes(b"\n".join([*path.read_bytes().splitlines()[:2], line, b""]))
    error = declined(folder, *fresh(stage))
    assert f"data/{READS[stage]}:3: " in error and all(word in error for word in words)


def test_a_bad_line_of_sample_s_prompts_is_named(folder, declined):
    """Rows 1-4 for python -m minirlhf.sample --prompts."""
    (folder / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    error = declined(folder, "minirlhf.sample", "out/sft", "--prompts", "p.jsonl")
    assert "p.jsonl:2: 'prompt' must be a string" in error


@EVERY
def test_forms_of_files_are_accepted(folder, ran, stage):
    """Row 5: a byte order mark, CRLF, blank lines and no final newline give the run that plain files gave."""
    for path in (folder / "data").iterdir():
        path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n\r\n").rstrip())
    ran(folder, *fresh(stage))
    assert same_weights(folder / "out" / stage, folder / "out" / "new")


@EVERY
def test_a_file_without_records_is_named(folder, rejected, stage):
    """Row 6: nothing in it. From outside, where `declined` is from within."""
    (folder / "data" / READS[stage]).write_text("\n\n")
    assert f"data/{READS[stage]}: holds no records" in rejected(folder, *fresh(stage))


@pytest.mark.parametrize("stage, options, words", [
    ("sft", ["--block_size", "5"], ["sft.train.jsonl", "every row is longer", "5 tokens"]),
    ("rm", ["--response_length", "31"], ["--response_length 31", "32 tokens"]),
    ("ppo", ["--response_length", "30"], ["prompts.train.jsonl", "no prompt fits 2 tokens"]),
])
def test_when_every_row_is_dropped(folder, declined, stage, options, words):
    """Row 6: there are rows, none fits."""
    error = declined(folder, *fresh(stage, *options))
    assert all(word in error for word in words)


def test_empty_completions(folder, ran):
    """Row 7: SFT trains their eos alone, a preference may prefer silence, a policy may answer nothing: no NaN."""
    for name in ("sft.train", "sft.val"):
        write(folder / "data" / f"{name}.jsonl", [{"prompt": f"the {noun}", "completion": ""} for noun in NOUNS] * 4)
    write(folder / "data" / "preferences.train.jsonl",
          [{"prompt": f"the {noun}", "chosen": "", "rejected": " is rude."} for noun in NOUNS])
    out, _ = ran(folder, *fresh("sft", "--num_train_epochs", "40", "--learning_rate", "0.03"))
    assert "24 of them are trained" in out
    ran(folder, *again("rm", "--overwrite", "--init_from", "out/new"))
    ran(folder, *again("ppo", "--overwrite", "--init_from", "out/new"))
    rows = metrics(folder / "out" / "ppo")
    assert rows[0]["completions/mean_length"] < 3 and all(row["objective/kl"] is not None for row in rows[:-1])
    for stage in ("new", "rm", "ppo"):
        assert all(tensor.isfinite().all() for tensor in load(folder / "out" / stage)["model"].values())


@pytest.mark.parametrize("how, word", [("drop", "dropped"), ("trim", "trimmed at the left")])
@EVERY
def test_long_prompts_are_counted(folder, ran, stage, how, word):
    """Row 8: three prompts beyond the context are dropped or trimmed, and the first lines say how many."""
    path, long = folder / "data" / READS[stage], "so " * 40
    more = {"sft": {"completion": " x"}, "rm": {"chosen": " x", "rejected": " y"}, "ppo": {}}[stage]
    with path.open("a") as f:
        f.writelines(json.dumps({"prompt": f"{long}{noun}", **more}) + "\n" for noun in NOUNS[:3])
    out, _ = ran(folder, *fresh(stage, "--long_prompts", how))
    assert any(f"{n} of " in out and word in out for n in (3, 6)), out  # a preference has two texts


def test_pairs_of_equal_texts(folder, ran, declined):
    """Row 9: dropped and counted; nothing else left, refused."""
    path = folder / "data" / "preferences.train.jsonl"
    same = [{"prompt": noun, "chosen": " a", "rejected": " a"} for noun in NOUNS]
    whole = path.read_text()
    with path.open("a") as f:
        f.writelines(json.dumps(record) + "\n" for record in same)
    out, _ = ran(folder, *fresh("rm"))
    assert "training records dropped, no two texts that differ and are not tied: 6" in out
    write(path, same)
    assert "no record is left" in declined(folder, *fresh("rm", "--overwrite"))
    path.write_text(whole)
    cut = [{"prompt": noun, "chosen": " a" * 50 + "b", "rejected": " a" * 50 + "c"} for noun in NOUNS]
    write(path, cut)  # the same ids once they are cut to the context
    assert "no record is left" in declined(folder, *fresh("rm", "--overwrite", "--long_prompts", "trim"))


@EVERY
def test_repeats_are_warned_about(folder, ran, stage):
    """Row 10: rows twice in training, and rows that are held out as well, each with their number."""
    path = folder / "data" / READS[stage]
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, *rows[:5]]) + "\n")
    held_out = folder / "data" / READS[stage].replace("train", "val")
    held_out.write_text("\n".join([*rows[:4], '{"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}']))
    out, _ = ran(folder, *fresh(stage))
    assert f"warning: 5 of {len(rows) + 5}" in out and "for training are repeats" in out
    assert "warning: 4 " in out and "both training and held-out" in out


def test_odd_text_goes_through_everything(folder, ran):
    """Rows 11, 12: the end-of-text marker is text; emoji and NUL survive, a lone surrogate becomes U+FFFD."""
    odd = ["a<|endoftext|>b", "\U0001f600 \u0000 \u2028", "lone \ud83d here", "\ufeff"]
    write(folder / "data" / "sft.train.jsonl", [{"prompt": t, "completion": " " + t} for t in odd] * 3)
    write(folder / "data" / "preferences.train.jsonl",
          [{"prompt": t, "chosen": " yes " + t, "rejected": t} for t in odd])
    write(folder / "data" / "prompts.train.jsonl", [{"prompt": t} for t in odd])
    write(folder / "data" / "prompts.val.jsonl", [{"prompt": t} for t in odd])
    for stage in STAGES:
        ran(folder, *again(stage, "--overwrite", "--long_prompts", "trim"))
    ran(folder, "minirlhf.sample", "out/sft", "out/ppo", "--prompts", "data/prompts.val.jsonl", "--output", "o.jsonl")
    prompts = [json.loads(line)["prompt"] for line in (folder / "o.jsonl").open(encoding="utf-8")]
    assert prompts[::2] == [odd[0], odd[1], "lone \ufffd here", odd[3]]


@EVERY
def test_one_row_is_enough(folder, ran, stage):
    """Row 13: less data than a batch gives a run of at least a step, its figures finite."""
    for name in ("sft", "preferences", "prompts"):
        for split in ("train", "val"):
            path = folder / "data" / f"{name}.{split}.jsonl"
            path.write_text(path.read_text().splitlines()[0])
    ran(folder, *fresh(stage, "--batch_size", "64", *(["--value_warmup", "0"] if stage == "ppo" else [])))
    rows = [row for row in metrics(folder / "out" / "new") if "lr" in row]
    assert rows and all(row[key] is not None for row in rows for key in ("loss", "objective/kl") if key in row)


# ---- options


@pytest.mark.parametrize("stage, options, words", [
    ("sft", ["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
    ("sft", ["--learning_rate", "-1"], ["--learning_rate -1", "at least 0"]),
    ("sft", ["--learning_rate", "nan"], ["--learning_rate nan", "finite"]),
    ("sft", ["--n_head", "3"], ["--n_head 3", "--n_embd 16"]),
    ("sft", ["--vocab_size", "200"], ["--vocab_size 200", "257"]),
    ("rm", ["--batch_size", "-3"], ["--batch_size -3", "at least 1"]),
    ("rm", ["--num_train_epochs", "0"], ["--num_train_epochs 0", "greater than 0"]),
    ("ppo", ["--learning_rate", "-1e-4"], ["--learning_rate -0.0001", "at least 0"]),
    ("ppo", ["--num_mini_batches", "3"], ["--num_mini_batches 3", "--batch_size 8"]),
    ("ppo", ["--temperature", "0"], ["--temperature 0", "at least 0.01"]),
    ("sft", ["--num_train_epochs", "1e300"], ["--num_train_epochs 1e+300", "at most 1000000"]),
    ("sft", ["--n_embd", "1000000000"], ["--n_embd 1000000000", "cannot be made"]),
    ("ppo", ["--reward", "data/prompts.val.jsonl:f"], ["--reward data/prompts.val.jsonl:f", "FILE.py:FUNCTION"]),
    ("ppo", ["--gamma", "1.5"], ["--gamma 1.5", "at most 1"]),
    ("ppo", ["--value_warmup", "8"], ["--value_warmup 8", "8 steps"]),
    ("ppo", ["--response_length", "31"], ["--response_length 31", "32 tokens"]),
    *[(stage, ["--device", "cuda"], ["--device cuda", "use --device cpu"]) for stage in STAGES],
])
def test_a_bad_value_is_named(finished, declined, stage, options, words):
    """Rows 14, 16: the flag and its value."""
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    error = declined(finished, *fresh(stage, *options))
    assert all(word in error for word in words)


BILLION, TRILLION = 10 ** 9, 10 ** 12


@pytest.mark.parametrize("stage, option, value, words", [
    ("sft", "--n_layer", BILLION, ["3.28e+12 parameters", "59,360.0 GB", "16.0 GB"]),
    ("sft", "--n_embd", BILLION, ["parameters"]), ("sft", "--n_embd", TRILLION, ["parameters"]),
    ("sft", "--block_size", TRILLION, ["1.6e+13 parameters"]), ("sft", "--vocab_size", TRILLION, ["parameters"]),
    ("sft", "--n_embd", 40_000, ["1.92e+10 parameters"]),
    ("sft", "--response_length", BILLION, ["leaves no room"]), ("sft", "--response_length", 31, ["leaves no room"]),
    ("ppo", "--response_length", BILLION, ["leaves no room"]), ("rm", "--response_length", BILLION, ["leaves room"]),
    ("rm", "--num_scale_samples", BILLION, ["at most 1000000"]),
    ("ppo", "--num_eval_prompts", BILLION, ["at most 1000000"]),
    ("ppo", "--batch_size", 80_000_000, ["memory: ", "and cpu has ", " needs ", "--force starts all the same"]),
    *[(stage, "--batch_size", TRILLION, ["100,000.0 GB", "16.0 GB"]) for stage in STAGES],
    *[(stage, "--batch_size", 10 ** 21, ["more than any machine can do"]) for stage in STAGES],
])
def test_sizes_that_no_machine_has(finished, declined, monkeypatch, stage, option, value, words):
    """Row 50: refused by the option's name, with what it would take and what there is, before it is taken."""
    monkeypatch.setattr(sizes, "memory_of", lambda device: 16e9)
    more = ["--total_episodes", TRILLION] if value == 80_000_000 else []
    error = declined(finished, *fresh(stage, option, value, *more))
    assert f"{option} {value}" in error and all(word in error for word in words)


@pytest.mark.parametrize("argv", [
    ["minirlhf.benchmark", "--what", "ppo", "--batch", 10 ** 6],
    ["minirlhf.evaluate", "out/ppo", "--num_prompts", TRILLION], ["minirlhf.evaluate", "out/ppo", "--best_of", 2000],
    ["minirlhf.evaluate", "out/ppo", "--response_length", TRILLION],
    ["minirlhf.evaluate", "out/ppo", "--prompts", "data/prompts.val.jsonl", "--response_length", 31],
    ["minirlhf.sample", "out/ppo", "--n", TRILLION], ["minirlhf.prepare", "sentiment", "--seeds", 3]], ids=str)
def test_sizes_of_commands(finished, main, capsys, monkeypatch, argv):
    """Row 50 for what is no run: exit 2, the option and its value named."""
    monkeypatch.setattr(sizes, "memory_of", lambda device: 1e9)
    before = tree(finished)
    with pytest.raises(SystemExit) as stop:
        main(finished, *argv)
    assert stop.value.code == 2 and tree(finished) == before
    error = capsys.readouterr().err.splitlines()[-1]
    assert argv[-2] in error and str(argv[-1]) in error


def test_a_model_s_size_is_known_before_it_is_made(make_model):
    """parameters() counts what GPT holds."""
    model = make_model()
    shape = [getattr(model.config, name) for name in ("n_layer", "n_embd", "block_size", "vocab_size")]
    assert sizes.parameters(*shape) == runtime.count_parameters(model)


def test_the_size_that_is_farthest_from_its_default_is_named(refused, monkeypatch):
    """30,000 layers, not a vocabulary of 100,000: 7,500 and 12 times the defaults."""
    monkeypatch.setattr(sizes, "memory_of", lambda device: 16e9)
    o = importlib.import_module("train_sft").Options(n_layer=30_000, vocab_size=100_000)
    error = refused(sizes.check_model, o, torch.device("cpu"))
    assert "--n_layer 30000: with n_embd 128, block_size 128, vocab_size 100000 a model of 5.96e+09" in error


def test_what_a_batch_of_answers_takes(make_model, refused, monkeypatch):
    """For each of ten places keys and values of two layers x 16 in float32 and 16 bytes of tokens and the like, and 8
    bytes for each of 13 words: 10 (2 x 2 x 16 x 4 + 16) + 104 = 2,824 bytes a row."""
    for memory, told in ((2.823e9, "at least 2.8 GB, and cpu has 2.8 GB"), (2.824e9, "")):
        monkeypatch.setattr(sizes, "memory_of", lambda device: memory)
        if told:
            assert told in refused(sizes.check_rollout, "--batch_size 1000000", make_model(), 10 ** 6, 10)
        else:
            sizes.check_rollout("--batch_size 1000000", make_model(), 10 ** 6, 10)


@pytest.mark.parametrize("argv, words", [
    *[(fresh(stage, "--lerning_rate", "1"), ["unrecognized arguments: --lerning_rate"]) for stage in STAGES],
    *[(fresh(stage, "--dtype", "float8"), ["--dtype", "invalid choice"]) for stage in STAGES],
    *[(fresh(stage, "--batch_size", "x"), ["--batch_size", "invalid int value: 'x'"]) for stage in STAGES],
    (["minirlhf.sample", "out/sft", "--top_k", "3"], ["unrecognized arguments: --top_k"]),
    (["minirlhf.prepare", "nothing"], ["invalid choice: 'nothing'"]),
], ids=str)
def test_the_parser_refuses(finished, main, capsys, argv, words):
    """Row 15: an unknown flag, a bad choice, a word for a number: usage, then the reason."""
    with pytest.raises(SystemExit) as stop:
        main(finished, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("usage: ") and all(word in error for word in words)


@pytest.mark.parametrize("argv, words", [
    (["nowhere.pt"], ["nowhere.pt", "no such checkpoint"]),
    (["out/rm"], ["holds a reward model", "expected an SFT model or a policy, which writes answers"]),
    (["out/sft", "--prompt", "a", "--response_length", "99"], ["--response_length 99", "32 tokens"]),
    (["out/sft", "--prompt", "a", "--output", "nowhere/o.jsonl"], ["--output nowhere/o.jsonl", "cannot be written"]),
    (["out/sft", "--prompt", "a", "--device", "cuda:9"], ["--device cuda:9"]),
    (["out/sft", "--prompt", "a", "--response_length", "99", "--output", "out/sft/ckpt.pt"], ["--response_length 99"]),
])
def test_what_sample_refuses(finished, declined, argv, words):
    """Rows 16, 19, 23 for python -m minirlhf.sample."""
    error = declined(finished, "minirlhf.sample", *argv)
    assert all(word in error for word in words)


# ---- the output folder


@EVERY
def test_a_run_is_not_overwritten(folder, ran, declined, stage):
    """Row 17: refused without --resume or --overwrite; then --overwrite makes the same run again."""
    assert f"out/{stage} holds a run" in declined(folder, *again(stage))
    before = load(folder / "out" / stage)["model"]
    ran(folder, *again(stage, "--overwrite"))
    assert equal(before, load(folder / "out" / stage)["model"])


def test_two_runs_do_not_share_a_folder(folder, main, refused):
    """Row 18: the second names the first's pid; killed, its lock is taken over."""
    first = begin(folder, *fresh("rm", *LONG["rm"]))
    for option in ("--overwrite", "--resume"):
        error = refused(main, folder, *fresh("rm", *LONG["rm"], option))
        assert f"a run with pid {first.pid} is writing there" in error
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait()[0] == 128 + signal.SIGKILL
    second = begin(folder, *fresh("rm", *LONG["rm"], "--overwrite"))
    assert (folder / "out" / "new" / "lock").read_text() == str(second.pid)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()


NAMES = ("lock", "config.json", *runtime.KEPT, *runtime.HALF)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "a pipe"])
def test_what_bears_the_name_of_a_run_s_file(tmp_path, declined, name, kind):
    """Row 19: named and kept, with every option, before anything is read."""
    path = tmp_path / "out" / name
    path.parent.mkdir()
    {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path),
     "a link to nothing": lambda: path.symlink_to("nowhere")}[kind]()
    for option in ([], ["--overwrite"]):
        error = declined(tmp_path, "train_sft.py", "--out_dir", "out", "--data_dir", "x", "--device", "cpu", *option)
        assert f"--out_dir out: out/{name} is {kind}" in error


@pytest.mark.parametrize("kind, word", [(os.mkdir, "a folder"), (os.mkfifo, "a pipe"),
                                        (lambda path: os.symlink("nowhere", path), "no such file")])
@pytest.mark.parametrize("stage, name", [("sft", "sft.train"), ("sft", "prompts.val"), ("rm", "preferences.val"),
                                         ("rm", "prompts.train"), ("ppo", "prompts.train")])
def test_data_that_are_no_file(folder, declined, stage, name, kind, word):
    """A folder, a pipe that would never end, a link to nothing under a data file's name."""
    (folder / "data" / f"{name}.jsonl").unlink()
    kind(folder / "data" / f"{name}.jsonl")
    error = declined(folder, *fresh(stage, "--out_dir", "new/er/out"))
    assert f"data/{name}.jsonl: {word}" in error


@EVERY
@pytest.mark.parametrize("options", [
    ["--data_dir", "nowhere"], ["--init_from", "nowhere"], ["--batch_size", "0"], ["--device", "cuda:9"],
    ["--response_length", "31"], ["--out_dir", "new/er/x" + "x" * 300], ["--out_dir", "out/sft/ckpt.pt/x"],
    ["--out_dir", "new/er/\udcff"], ["--data_dir", "\udcff"]], ids=str)
def test_a_refusal_leaves_no_folder(finished, declined, stage, options):
    """Row 54: neither the out_dir nor the folders above it that were made for it."""
    declined(finished, *fresh(stage, "--out_dir", "new/er/out", *options))


def test_no_folder_is_left_where_the_data_cannot_be_had(tmp_path, refused, monkeypatch):
    """Row 54: neither data/ nor the data's own."""
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "no network"))
    assert "no network" in refused(prepare.sentiment, tmp_path / "a" / "b" / "sentiment") and not tree(tmp_path)


class Killed(BaseException):
    """The process ends here, and nothing that would still be done is done."""


def test_overwrite_killed_at_any_moment(folder, main, monkeypatch):
    """Row 53: before and after every removal and rename of --overwrite, the folder holds the old run, which --resume
    takes, or what --overwrite takes; --resume says which."""
    options = parse(importlib.import_module("train_sft").Options, again("sft", "--overwrite")[1:])
    resume = parse(type(options), ["--resume", "--out_dir", "killed"])
    options.out_dir = "killed"
    monkeypatch.chdir(folder)
    for moment in range(100):
        shutil.rmtree("killed", ignore_errors=True)
        shutil.copytree("out/sft", "killed")
        (folder / "killed" / "ckpt.pt.tmp").write_text("half")
        calls = []

        def counted(real):
            def call(*arguments):
                for _ in range(2):
                    if len(calls) == moment:
                        raise Killed
                    calls.append(arguments)
                    if len(calls) % 2:
                        real(*arguments)
            return call

        run, ended = runtime.Run(options, "sft"), True
        with monkeypatch.context() as m:
            for name in ("remove", "replace"):
                m.setattr(os, name, counted(getattr(os, name)))
            try:
                run.start_logs(0)
            except Killed:
                ended = False
        run.lock.close()  # as the system does for a dead process
        run.lock, run.made = None, []
        if ended:
            break
        try:
            _, saved = checkpoint.resume(resume, "sft", ())
            found = "the old run" if saved else "a run that starts again"
        except SystemExit:
            found = "nothing"
        assert (found == "the old run") == any((folder / "killed" / name).exists() for name in runtime.KEPT[:2])
        second = runtime.Run(options, "sft")
        second.start_logs(0)
        assert sorted(path.name for path in (folder / "killed").iterdir()) == ["config.json", "lock"]
        second.release()
    assert moment > 12


@EVERY
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/minirlhf"])
def test_a_folder_that_cannot_be_written(folder, declined, stage, place):
    """Row 19: a file, a folder below a file, a file system that takes no folders: before training."""
    (folder / "file").write_text("mine")
    error = declined(folder, *STAGES[stage][:-1], place)
    assert f"--out_dir {place}: cannot be written" in error


def test_a_folder_that_another_run_removes(tmp_path, monkeypatch, main):
    """Two runs begin at once in a new folder, and one is refused: it removes the folder that it had made while the
    other is about to lock it. The other makes it again."""
    real, removed = os.makedirs, []

    def makedirs(path, **options):
        real(path, **options)
        if len(removed) < 3:
            removed.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "makedirs", makedirs)
    options = importlib.import_module("train_sft").Options(out_dir=str(tmp_path / "a" / "b"), device="cpu")
    with runtime.Run(options, "sft"):
        assert (tmp_path / "a" / "b" / "lock").read_text() == str(os.getpid()) and len(removed) == 3
    assert not tree(tmp_path)


def test_a_file_system_without_locks(tmp_path, declined, monkeypatch):
    """Row 54: named, and neither lock nor folder stays."""
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    error = declined(tmp_path, "train_sft.py", "--out_dir", "a/b", "--device", "cpu", "--data_dir", "x")
    assert "--out_dir a/b: cannot be written (No locks available)" in error


def test_the_lock_goes_last(tmp_path, monkeypatch, main):
    """When another run may begin, nothing of the ended one is still to be removed but empty folders."""
    run = runtime.Run(importlib.import_module("train_sft").Options(out_dir=str(tmp_path / "out"), device="cpu"), "sft")
    run.start_logs(0)
    removed, real = [], os.remove
    monkeypatch.setattr(os, "remove", lambda path: (removed.append(os.path.basename(path)), real(path)))
    run.release()
    assert removed == ["config.json", "lock"] and not tree(tmp_path)


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "two\nlines", "-x", "@x", "$HOME;`ls`", "caf\u00e9"])
def test_printed_commands_run(finished, main, capsys, name):
    """Whatever a folder is called, a shell takes what is printed for the run that was meant, wherever the user
    stands."""
    options = importlib.import_module("train_ppo").Options(out_dir=name, data_dir=name, seed=5, whiten_rewards=True)
    words = shlex.split(runtime.command_line("ppo", options))
    assert words[:2] == ["python", os.path.relpath(ROOT / "train_ppo.py")]
    assert parse(type(options), words[2:]) == options
    words = shlex.split(runtime.next_command("train_rm.py", options, data_dir=name, init_from=name))
    found = parse(importlib.import_module("train_rm").Options, words[2:])
    assert (found.data_dir, found.init_from) == (name, name)
    assert shlex.split(runtime.as_path(name)) == ["./-x" if name == "-x" else name]


def test_where_scripts_lie(tmp_path, monkeypatch):
    """Beside the user, above, or elsewhere; of several ranks by torchrun; modules need the package's folder."""
    root = os.path.dirname(os.path.dirname(runtime.__file__))
    for here, path in ((root, "train_rm.py"), (os.path.join(root, "tests"), "../train_rm.py"),
                       (tmp_path, os.path.join(root, "train_rm.py"))):
        monkeypatch.chdir(here)
        assert runtime.start_of("train_rm.py") == f"python {path}"
        elsewhere = "" if here == root else f"PYTHONPATH={root} "
        assert runtime.start_of("minirlhf.sample") == f"{elsewhere}python -m minirlhf.sample"
    monkeypatch.setattr(runtime, "ranks", lambda: (0, 4))
    assert runtime.start_of("train_rm.py").startswith("torchrun --nproc_per_node=4 /")


# ---- checkpoints


def truncated(path):
    os.truncate(path, os.path.getsize(path) * 2 // 3)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@EVERY
@pytest.mark.parametrize("damage", [truncated, emptied, flipped, os.remove], ids=lambda f: f.__name__)
def test_resume_falls_back_to_the_checkpoint_before(folder, ran, stage, damage):
    """Rows 20, 21: it says so, and ends as the run that was never harmed."""
    straight = snapshot(folder / "out" / stage)
    path = folder / "out" / stage / "ckpt.pt"
    damage(path)
    out, _ = ran(folder, *again(stage, "--resume"))
    assert f"out/{stage}/ckpt.pt cannot be used" in out and "goes on from out/" in out and "goes on from step 6" in out
    same_run(snapshot(folder / "out" / stage), straight)


USES = {"sft": fresh("sft", "--init_from", "BAD"), "rm": fresh("rm", "--init_from", "BAD"),
        "ppo": fresh("ppo", "--init_from", "BAD"), "sample": ["minirlhf.sample", "BAD", "--prompt", "a"],
        "reward": fresh("ppo", "--reward_model", "BAD"), "judge": fresh("ppo", "--judge", "BAD")}


def use(name):
    """A command that reads the checkpoint bad/ckpt.pt, and the stage that it expects there."""
    return ["bad/ckpt.pt" if x == "BAD" else x for x in USES[name]], "rm" if name in ("reward", "judge") else "sft"


def spoil(folder, stage, damage=None, change=None):
    """bad/ckpt.pt: a stage's checkpoint with its file damaged, or with its content changed."""
    (folder / "bad").mkdir()
    path = folder / "bad" / "ckpt.pt"
    shutil.copy(folder / "out" / stage / "ckpt.pt", path)
    if damage:
        damage(path)
    else:
        payload = torch.load(path, weights_only=True)
        change(payload)
        torch.save(payload, path)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("damage", [truncated, emptied, flipped], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named(folder, declined, name, damage):
    """Rows 20, 21, wherever one is read; without an earlier one, resume refuses too."""
    argv, stage = use(name)
    spoil(folder, stage, damage)
    assert "bad/ckpt.pt: not a checkpoint, or damaged" in declined(folder, *argv)


@EVERY
def test_resume_without_a_good_checkpoint(folder, declined, stage):
    """Rows 20, 21: both are damaged."""
    for path in (folder / "out" / stage).glob("*.pt"):
        flipped(path)
    error = declined(folder, *again(stage, "--resume"))
    assert f"out/{stage}/ckpt.previous.pt: not a checkpoint, or damaged" in error


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("bare", [True, False], ids=["pickle", "torch"])
def test_code_in_a_checkpoint_never_runs(folder, declined, name, bare):
    """Row 22: refused, and what the pickle would have done is not done."""
    argv, _ = use(name)
    (folder / "bad").mkdir()
    (pickle.dump if bare else torch.save)({"format": 1, "model": Payload()}, open(folder / "bad" / "ckpt.pt", "wb"))
    assert "bad/ckpt.pt" in declined(folder, *argv) and not (folder / "ran").exists()


@pytest.mark.parametrize("name", sorted(USES.keys() - {"rm"}))
def test_another_stage_s_checkpoint(folder, declined, name):
    """Row 23: stage found, stage expected. Stage 2 takes a reward model too, and goes on from it."""
    argv, stage = use(name)
    spoil(folder, {"sft": "rm", "rm": "sft"}[stage], change=lambda payload: None)
    error = declined(folder, *argv)
    assert ("holds a reward model, expected an SFT model" if stage == "sft" else
            "holds an SFT model, expected a reward model") in error


def test_another_tokenizer_or_context(folder, ran, declined):
    """Row 24: a reward model of another SFT model; sizes named beside a checkpoint that has others. Both values."""
    for name, option, value in (("vocab", "--vocab_size", "290"), ("context", "--block_size", "40")):
        ran(folder, *SFT[:-1], f"{name}/sft", option, value)
        ran(folder, *RM[:-1], f"{name}/rm", "--init_from", f"{name}/sft")
    error = declined(folder, *fresh("ppo", "--reward_model", "vocab/rm"))
    assert "out/sft/ckpt.pt and vocab/rm have different tokenizers" in error and "with 290" in error
    error = declined(folder, *fresh("ppo", "--reward_model", "context/rm"))
    assert "out/sft/ckpt.pt has a context of 32 tokens, context/rm one of 40" in error
    error = declined(folder, *fresh("sft", "--init_from", "vocab/sft"))
    assert "--vocab_size 300: vocab/sft has 290" in error
    error = declined(folder, *again("rm", "--resume", "--init_from", "vocab/sft"))
    assert "vocab/sft and out/rm/ckpt.pt have different tokenizers" in error


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("change, words", [
    (lambda p: [p["model"].pop(k) for k in [*p["model"]][:9]], ["missing wte.weight, missing wpe.weight", "5 more"]),
    (lambda p: p["model"].update(extra=torch.zeros(2)), ["unexpected extra"]),
    (lambda p: p["model"].update({"ln_f.bias": torch.zeros(17)}), ["ln_f.bias has shape (17,), not (16,)"]),
    (lambda p: p["model"]["ln_f.bias"].fill_(torch.nan), ["ln_f.bias", "not finite"]),
    (lambda p: p.update(format=99), ["format 99", "up to 3"]),
], ids=["missing", "extra", "shape", "NaN", "newer"])
def test_contents_that_do_not_fit(folder, declined, name, change, words):
    """Rows 25-27: strict, finite, and of a format that is known."""
    argv, stage = use(name)
    spoil(folder, stage, change=change)
    error = declined(folder, *argv)
    assert "bad/ckpt.pt" in error and all(word in error for word in words)


# ---- stops, and going on


LONG = {"sft": ["--num_train_epochs", "10000"], "rm": ["--num_train_epochs", "10000"],
        "ppo": ["--total_episodes", "1000000"]}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def begin(folder, *argv, rows=1, **surroundings):
    """The command, running, once its metrics hold a few rows."""
    log, since = folder / argv[argv.index("--out_dir") + 1] / "metrics.jsonl", time.time()
    running = Command(*argv, cwd=folder, **surroundings)

    def written():
        with contextlib.suppress(FileNotFoundError):  # it may be removed between any two looks
            return log.read_bytes().count(b"\n") if log.stat().st_mtime > since else 0
        return 0

    while written() < rows:
        assert running.process.is_alive(), running.wait(1)
        time.sleep(0.005)
    return running


@pytest.fixture
def stopped(main, monkeypatch):
    """stopped(folder, stage, rows) -> the out_dir of a new run that SIGTERM has ended once its metrics held so many."""
    def call(folder, stage, rows):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(runtime.Run, "write", runtime.Run.write)  # which is put back
            Command.stop_after(rows)
            main(folder, *fresh(stage))
        assert stop.value.code == 143
        return folder / "out" / "new"
    return call


def load(run):
    return torch.load(run / "ckpt.pt", weights_only=True)


def equal(a, b):
    """The same to the last bit, whatever they hold."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b


def snapshot(run):
    """What a run leaves: its checkpoint's weights, optimizer and figures, its metrics and its samples."""
    payload = load(run)
    return {**{k: payload[k] for k in ("model", "training", "info")}, "metrics": metrics(run),
            "samples": (run / "samples.jsonl").read_text("utf-8")}


def same_run(a, b):
    for part in a:
        assert equal(a[part], b[part]), part


def same_weights(a, b):
    return equal(load(a)["model"], load(b)["model"])


@EVERY
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(folder, stage, number, status):
    """Row 29: it finishes the step, saves, says how to go on, and exits with 128 + the signal's number."""
    running = begin(folder, *fresh(stage, *LONG[stage]), rows=2)
    os.kill(running.pid, number)
    code, out, error = running.wait()
    assert code == status and "finishing this step" in error and "Traceback" not in error
    assert f"python {ROOT}/train_{stage}.py" in out and "--resume" in out.splitlines()[-1]
    rows = metrics(folder / "out" / "new")
    assert load(folder / "out" / "new")["training"]["step"] == rows[-1]["step"] >= 2
    assert not (folder / "out" / "new" / "lock").exists()


def test_a_second_signal_quits_at_once(folder):
    """Row 29: in the middle of a step that does not end, with the checkpoint that was there."""
    (folder / "slow.py").write_text("import time\ndef f(prompts, completions):\n    if len(prompts) == 8:\n"
                                    "        print('in', flush=True); time.sleep(1000)\n"
                                    "    return [0.0] * len(prompts)\n")
    running = Command(*fresh("ppo", "--reward", "slow.py:f", "--num_eval_prompts", "4"), cwd=folder)
    while "in" not in open(running.logs[0]).read().split():
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGTERM)
    while "finishing this step" not in open(running.logs[1]).read():
        time.sleep(0.01)
    assert running.process.is_alive()
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait()[0] == 143


@EVERY
def test_two_stops_change_nothing(folder, command, stage):
    """Row 30: stopped by SIGTERM, resumed and killed, and resumed again: weights, optimizer, metrics and samples are
    those of the run that went straight, to the last bit."""
    running = begin(folder, *fresh(stage), rows=1 + random.randrange(2))
    os.kill(running.pid, signal.SIGTERM)
    code = running.wait()[0]
    if code == 143:
        running = begin(folder, *fresh(stage, "--resume"), rows=random.randrange(3, 6))
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    command(*fresh(stage, "--resume"), cwd=folder)
    same_run(snapshot(folder / "out" / "new"), snapshot(folder / "out" / stage))


KILLER = """
import os, signal
import torch
from minirlhf import checkpoint
saves = 0
def when(moment):
    global saves
    saves += moment == "a save begins"
    if saves == 2 and moment == "MOMENT":
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, moment):
    real = getattr(owner, name)
    def call(*arguments, **options):
        when(moment)
        return real(*arguments, **options)
    setattr(owner, name, call)
write = checkpoint.Digesting.write
def half(self, data):
    if len(data) > 1000:
        when("while it is written")
    return write(self, data)
checkpoint.Digesting.write = half
before(checkpoint, "save", "a save begins")
before(checkpoint, "unpack", "before it is read back")
before(checkpoint, "keep_previous", "before the old one gets its second name")
before(os, "link", "before the first step to a second name")
link = os.link
def linked(*arguments):
    link(*arguments)
    when("before the rename")
os.link = linked
before(os, "fsync", "before it is on the disk")
def f(prompts, completions):
    return [len(c) / 10 for c in completions]
"""


KILLED = ["--reward", "r.py:f", "--eval_interval", "2", "--total_episodes", "40"]


@pytest.fixture(scope="module")
def never_killed(finished, tmp_path_factory, command):
    """What that run leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("never_killed")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    (folder / "r.py").write_text(KILLER)
    command(*fresh("ppo", *KILLED), cwd=folder)
    return snapshot(folder / "out" / "new")


@pytest.mark.parametrize("moment", ["a save begins", "while it is written", "before it is on the disk",
                                    "before it is read back", "before the old one gets its second name",
                                    "before the first step to a second name", "before the rename"])
def test_killed_while_it_saves(folder, ran, never_killed, moment):
    """Row 28: at whatever moment of the second save, the first checkpoint loads; the run ends as if nothing had been,
    and what the save had begun is gone."""
    (folder / "r.py").write_text(KILLER.replace("MOMENT", moment))
    code, _, _ = Command(*fresh("ppo", *KILLED), cwd=folder).wait()
    assert code == 128 + signal.SIGKILL
    new = folder / "out" / "new"
    assert load(new)["training"]["step"] == 2 and metrics(new)[-1]["step"] == 4
    (folder / "r.py").write_text(KILLER)
    ran(folder, *fresh("ppo", *KILLED, "--resume"))
    same_run(snapshot(new), never_killed)
    assert not [*new.glob("*.tmp")]


@pytest.mark.slow
@EVERY
def test_killed_at_random(folder, command, stage):
    """Rows 28, 30: kill -9 forty times a stage, some while it starts, most when it has just logged a step or is within
    a save, in runs that are resumed until they end: each ends as the one that went straight."""
    rng, kills, new = random.Random(stage), 0, folder / "out" / "new"
    options = ["--eval_interval", "1"]  # a checkpoint every step
    command(*STAGES[stage][:-1], "straight", *options, cwd=folder)
    expected = snapshot(folder / "straight")

    def rows():
        with contextlib.suppress(FileNotFoundError):
            return (new / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    while kills < 40:
        shutil.rmtree(new, ignore_errors=True)
        resume, status = [], None
        while status != 0:
            before, running, since = rows(), Command(*fresh(stage, *options, *resume), cwd=folder), time.monotonic()
            kind, more = rng.choice(["start", "log", "log", "save", "save", "save"]), rng.uniform(0, 0.1)
            while running.process.is_alive() and not (
                    kind == "start" and time.monotonic() > since + 4 * more
                    or kind == "log" and rows() > before
                    or kind == "save" and rows() > before and (new / "ckpt.pt.tmp").exists()):
                time.sleep(0.0005)
            time.sleep(more if kind == "log" else 0.01 * more)
            running.process.kill()
            status = running.wait()[0]
            assert status in (0, 128 + signal.SIGKILL)
            kills += status != 0
            resume = ["--resume"] if (new / "config.json").exists() else ["--overwrite"]
        same_run(snapshot(new), expected)
    assert not [*new.glob("*.tmp")]


@EVERY
def test_a_run_killed_before_its_first_checkpoint_starts_again(folder, command, stage):
    """With --resume and its own options, from step 0."""
    kept = "lam" if stage == "ppo" else "weight_decay"
    running = begin(folder, *fresh(stage, "--eval_interval", "1000000", *LONG[stage], f"--{kept}", "0.5"))
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    running = begin(folder, f"train_{stage}.py", "--resume", "--max_grad_norm", "0.5", "--out_dir", "out/new")
    os.kill(running.pid, signal.SIGTERM)
    code, out, _ = running.wait()
    assert code == 143 and "ended before its first checkpoint: it starts again" in out
    assert "resume: --max_grad_norm 0.5: this run had 1.0" in out
    assert load(folder / "out" / "new")["options"][kept] == 0.5


@EVERY
def test_resume_lists_what_differs(folder, stopped, ran, declined, stage):
    """Row 31: other hyperparameters are listed, and hold from there on; what would make it another run is refused."""
    before = snapshot(stopped(folder, stage, rows=2))
    error = declined(folder, *fresh(stage, "--resume", "--batch_size", "4"))
    assert "--batch_size 4: this run had 8, which cannot change" in error
    error = declined(folder, *fresh(stage, "--resume", "--seed", "1"))
    assert "--seed 1: this run had 1337" in error
    out, _ = ran(folder, *fresh(stage, "--resume", "--learning_rate", "0"))
    assert "resume: --learning_rate 0.0: this run had" in out
    after = load(folder / "out" / "new")
    rows = [row for row in metrics(folder / "out" / "new") if "lr" in row]
    assert rows[-1]["lr"] == 0 < rows[0]["lr"] and after["training"]["step"] == 8 > before["training"]["step"]
    if stage == "ppo":
        assert equal(after["model"], before["model"])


@EVERY
def test_resume_warns_of_another_environment(folder, ran, stage):
    """Another number of threads, torch or precision: bits may differ, and it says so."""
    path = folder / "out" / stage / "ckpt.pt"
    payload = torch.load(path, weights_only=True)
    payload["environment"].update(torch="2.0", threads=64, hardware="cuda x 8, bfloat16")
    payload["training"]["finished"] = False
    torch.save(payload, path)
    out, _ = ran(folder, *again(stage, "--resume"))
    for text in (f"warning: this run had torch 2.0, now {torch.__version__}", "had threads 64, now 1",
                 "had hardware cuda x 8, bfloat16, now cpu x 1, float32", "to the last bit"):
        assert text in out


@pytest.mark.parametrize("stage, path", [
    ("sft", "data/sft.val.jsonl"), ("rm", "data/preferences.train.jsonl"), ("rm", "data/prompts.train.jsonl"),
    ("rm", "out/sft/ckpt.pt"), ("ppo", "data/prompts.val.jsonl"), ("ppo", "out/sft/ckpt.pt"),
    ("ppo", "out/rm/ckpt.pt")])
def test_resume_needs_the_same_inputs(folder, ran, declined, stage, path):
    """A run does not go on with other data, nor from another SFT or reward model."""
    if path.endswith("jsonl"):
        (folder / path).write_text("".join(reversed((folder / path).open().readlines())))
    else:
        made_by = path.split("/")[1]
        ran(folder, *STAGES[made_by], "--overwrite", "--learning_rate", "1e-4")
    payload = load(folder / "out" / stage)
    payload["training"] |= {"finished": False, "step": 4}
    torch.save(payload, folder / "out" / stage / "ckpt.pt")
    error = declined(folder, *again(stage, "--resume"))
    assert f"is not what the run of out/{stage}/ckpt.pt began with" in error


@EVERY
def test_a_run_goes_on_wherever_it_lies(folder, main, stage, capsys):
    """The run, its data and its models moved, from another working folder and spelled otherwise: the same contents,
    so the same end to the last bit."""
    straight, new = snapshot(folder / "out" / stage), folder / "a" / "models" / "new"
    shutil.copytree(folder / "out" / stage, folder / "out" / "new")
    shutil.move(folder / "data", folder / "a" / "d")
    shutil.move(folder / "out", folder / "a" / "models")
    shutil.copy(new / "ckpt.previous.pt", new / "ckpt.pt")  # as it was at step 6
    (folder / "elsewhere").mkdir()
    more = {"sft": [], "rm": ["--init_from", "../a/models/sft"],
            "ppo": ["--init_from", folder / "a/models/sft", "--reward_model", "../a/models/../models/rm"]}[stage]
    main(folder / "elsewhere", f"train_{stage}.py", "--resume", "--out_dir", "../a/models/new",
         "--data_dir", "../a/./d/", *more)
    assert "goes on from step 6" in capsys.readouterr().out
    moved = snapshot(new)
    for run in (moved, straight):  # under the names that were given
        run["training"]["data"] = [*run["training"]["data"].values()]
    same_run(moved, straight)


def test_a_reward_function_s_file_may_move(folder, monkeypatch, refused, capsys):
    """Its content is told by a fingerprint; another function of it, or a reward model, would be another run."""
    payload = load(folder / "out" / "ppo")
    torch.save(payload | {"options": payload["options"] | {"reward": "r.py:f"}}, folder / "out" / "ppo" / "ckpt.pt")
    monkeypatch.chdir(folder)

    def resume(reward):
        options = parse(importlib.import_module("train_ppo").Options, ["--resume", "--reward", reward])
        return checkpoint.resume(options, "ppo", ("reward",))[0].reward

    assert resume("../w/s.py:f") == ("../w/s.py:f",)
    assert "resume: --reward ../w/s.py:f: this run had r.py:f" in capsys.readouterr().out
    for other in ("r.py:g", ""):
        assert f"--reward {other}: this run had r.py:f, which cannot change" in refused(resume, other)


def test_the_printed_command_goes_on(folder, command):
    """The line that a stopped run prints, with an adaptive kl_coef and options that differ from their defaults, is what
    goes on with it: the same to the last bit."""
    more = ["--kl_coef", "0.1", "--adaptive_kl_target", "0.5", "--total_episodes", "160", "--eval_interval", "100"]
    command(*PPO[:-1], "straight", *more, cwd=folder)
    _, out, _ = Command(*fresh("ppo", *more), cwd=folder, stop_after=2).wait()
    printed = shlex.split(out.splitlines()[-1].partition("go on with: ")[2])
    assert printed[0] == "python" and "--kl_coef" in printed
    command(*printed[1:], cwd=folder)
    same_run(snapshot(folder / "out" / "new"), snapshot(folder / "straight"))


def test_a_folder_of_somebody_s_own(folder, declined, command):
    """A config.json that is not a run's stays, also when a run is refused there; --resume does not take it for one, nor
    that of another stage's run."""
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text('{"my": 1}')
    declined(folder, *PPO[:-1], "mine", "--reward_model", "nowhere")
    assert "holds the options of no run" in declined(folder, *PPO[:-1], "mine", "--resume")
    (folder / "mine" / "config.json").write_text((folder / "out" / "rm" / "config.json").read_text())
    error = declined(folder, *PPO[:-1], "mine", "--resume")
    assert "holds the options of a reward model, expected those of a PPO policy" in error


@pytest.mark.parametrize("stage, option", [("sft", "--init_from"), ("rm", "--init_from"), ("ppo", "--init_from"),
                                           ("ppo", "--reward_model")])
def test_a_run_does_not_replace_what_it_starts_from(folder, declined, stage, option):
    """out_dir is the folder of the model that it reads."""
    source = "out/rm" if option == "--reward_model" else "out/sft"
    error = declined(folder, *STAGES[stage][:-1], source, option, f"{source}/ckpt.pt", "--overwrite")
    assert f"--out_dir {source}: holds {option} {source}/ckpt.pt" in error


def test_a_terminal_without_unicode(folder, command):
    """Samples that it cannot show are shown in escapes."""
    write(folder / "data" / "prompts.val.jsonl", [{"prompt": "caf\u00e9 \u6f22"}])
    out, _ = command("minirlhf.sample", "out/sft", "--prompts", "data/prompts.val.jsonl", cwd=folder,
                     env={"PYTHONIOENCODING": "ascii"})
    assert "caf\\xe9 \\u6f22 ..." in out


def test_sample_on_a_full_disk(folder, command):
    """Row 33 for python -m minirlhf.sample --output."""
    _, error = command("minirlhf.sample", "out/sft", "--prompt", "a", "--output", "/dev/full", cwd=folder, code=1)
    assert error == "error: --output /dev/full: could not be written (No space left on device) at 0 bytes\n"


@EVERY
def test_a_finished_run_says_so(folder, ran, stage):
    """Row 32: exit 0, nothing repeated."""
    before = snapshot(folder / "out" / stage)
    out, _ = ran(folder, *again(stage, "--resume"))
    assert "this run is finished (8 steps)" in out
    same_run(snapshot(folder / "out" / stage), before)


@EVERY
def test_a_full_disk(folder, command, stopped, ran, stage):
    """Row 33: a file system that takes no more than a part of a checkpoint: path and size, the old checkpoint whole."""
    new = stopped(folder, stage, rows=4)
    before = (new / "ckpt.pt").read_bytes()
    _, error = command(*fresh(stage, "--resume"), cwd=folder, code=1, largest_file=len(before) // 2)
    assert "out/new/ckpt.pt: could not be written" in error and f"{len(before) // 2:,} bytes" in error
    assert (new / "ckpt.pt").read_bytes() == before and not [*new.glob("*.tmp")]
    ran(folder, *fresh(stage, "--resume"))
    same_run(snapshot(new), snapshot(folder / "out" / stage))


@EVERY
def test_a_full_disk_under_the_log(folder, command, stage):
    """Row 33: not even a line of metrics fits."""
    _, error = command(*fresh(stage), cwd=folder, code=1, largest_file=200)
    assert "out/new/" in error and "could not be written" in error and error.count("\n") == 1


@EVERY
def test_logs_are_repaired(folder, stopped, ran, stage):
    """Row 34: a torn last line and rows later than the checkpoint go, no step stands twice."""
    new = stopped(folder, stage, rows=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(new / name, "ab") as f:
            f.write(b'{"step": 7, "loss": 1}\n{"step": 9, "completion": "caf\xc3')
    ran(folder, *fresh(stage, "--resume"))
    same_run(snapshot(new), snapshot(folder / "out" / stage))
    steps = [row["step"] for row in metrics(new) if "final" not in row]
    assert steps == [*range(1, 9)]


# ---- checks, and ranks


@EVERY
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_check_that_is_interrupted_says_so(finished, main, monkeypatch, capfd, stage, number, status):
    """It ends after the check at hand, says what was made, and does not exit 0."""
    before, real = tree(finished), check.padding
    monkeypatch.setattr(check, "padding", lambda *a: (os.kill(os.getpid(), number), real(*a)))
    with pytest.raises(SystemExit) as stop:
        main(finished, *again(stage, "--check"))
    out, error = capfd.readouterr()
    assert stop.value.code == status and "interrupted: 0 of 1 checks failed" in out and "all checks" not in out
    assert "ending after this check" in error and "saving" not in error and tree(finished) == before


def two_ranks(folder, *commands):
    """(exit status, standard error) of two commands that are ranks 0 and 1 of one run."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    ranks = [Command(*argv, cwd=folder, env={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port)}) for rank, argv in enumerate(commands)]
    return [(status, error) for status, _, error in (rank.wait() for rank in ranks)]


@pytest.mark.parametrize("stage, wrong, rank, words", [
    ("sft", ["--overwrite", "--data_dir", "nowhere"], 1, "nowhere/sft.train.jsonl: no such file"),  # in the middle
    ("ppo", ["--overwrite", "--batch_size", "0"], 0, "--batch_size 0"),  # before they have met
    ("rm", [], 0, "out/rm holds a run"),  # which only the first can see
])
def test_one_rank_is_refused(finished, stage, wrong, rank, words):
    """Row 55: all ranks end, each with one line, status 2; an old run that --overwrite would replace is as it was."""
    before, commands = tree(finished), [again(stage, *wrong[:1]) for _ in range(2)]
    commands[rank] += wrong[1:]
    found = two_ranks(finished, *commands)
    assert [status for status, _ in found] == [2, 2] and tree(finished) == before
    assert words in found[rank][1] and f"rank {1 - rank} of 2: stopped, for another rank" in found[1 - rank][1]
    own = [[line for line in error.splitlines() if not re.match(r"\[W|Exception raised from |frame #|$", line)]
           for _, error in found]  # torch logs, too: that a store was lost, with the frames of its own program
    assert all(len(lines) == 1 and lines[0].startswith("error: ") for lines in own), own


def test_a_stray_rank(finished, rejected):
    """Row 55: RANK alone, from outside."""
    assert "RANK=1 but not WORLD_SIZE" in rejected(finished, *fresh("sft"), env={"RANK": "1"})


# ---- guards


@EVERY
def test_what_is_not_finite_stops_the_run(folder, stopped, main, refused, stage):
    """Row 35: a learning rate that ruins the weights: the next step stops before its update, the last good checkpoint
    is whole."""
    new = stopped(folder, stage, rows=2)
    before = (new / "ckpt.pt").read_bytes()
    error = refused(main, folder, *fresh(stage, "--resume", "--learning_rate", "1e38", "--eval_interval", "100"))
    assert "finite" in error
    assert (new / "ckpt.pt").read_bytes() == before


def test_a_policy_that_runs_away_ends_the_run(folder, command):
    """Row 36: each batch's epochs end early with a warning; the third in a row ends the run with advice."""
    out, error = command(*fresh("ppo", "--learning_rate", "0.3", "--num_ppo_epochs", "4", "--num_mini_batches", "4"),
                         cwd=folder, code=1)
    assert "this batch's epochs end early (2 in a row; the third ends the run)" in out
    assert "for the third batch in a row" in error and "--learning_rate below 0.3" in error
    assert error.count("\n") == 1


def test_equal_rewards_are_warned_about_once(folder, ran):
    """Row 37: no NaN in weights or metrics but where there is no variance to explain."""
    (folder / "flat.py").write_text("def f(prompts, completions):\n    return [0.5] * len(prompts)\n")
    out, _ = ran(folder, *fresh("ppo", "--reward", "flat.py:f", "--missing_eos_penalty", "0"))
    assert out.count("warning: all scores of step 1 are 0.5000") == 1 == out.count("there is nothing to learn from")
    rows = [row for row in metrics(folder / "out" / "new") if "lr" in row]
    assert all(value is not None for row in rows for key, value in row.items() if key != "val/explained_variance")


@pytest.mark.parametrize("body, words", [
    ("raise KeyError('boom')", ["raised KeyError", "boom"]),
    ("return [1.0]", ["returned 1 scores for"]),
    ("return [1.0] * (len(prompts) - 1) + [float('nan')]", ["row 5", "nan"]),
    ("return [1.0] * (len(prompts) - 1) + ['x']", ["row 5", "expected a number, found str"]),
    ("return None", ["returned None; expected a list of"]),
    ("return [10 ** 400] * len(prompts)", ["row 0", "inf, no number below a million"]),
])
def test_a_bad_reward_function(finished, declined, body, words):
    """Row 38: the function and the row."""
    (finished / "bad.py").write_text(f"def f(prompts, completions):\n    {body}\n")
    error = declined(finished, *fresh("ppo", "--reward", "bad.py:f"))
    assert "--reward bad.py:f" in error and all(word in error for word in words)


def test_answers_that_do_not_end_are_warned_about_once(folder, ran):
    """Row 39: with the rate."""
    out, _ = ran(folder, *fresh("ppo", "--response_length", "1"))
    assert out.count("of the answers of step 1 ended within 1 tokens; raise --response_length") == 1
    assert out.count("raise --response_length") == 1


# ---- the network, and the terminal


OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
           "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}


def test_gpt2_s_ranks_without_a_network(folder, rejected):
    """Row 40: where they were looked for and what to do."""
    error = rejected(folder, *fresh("sft", "--tokenizer", "gpt2"), env={**OFFLINE, "TIKTOKEN_CACHE_DIR": "cache"})
    assert "GPT-2's ranks are not in cache" in error and "TIKTOKEN_CACHE_DIR" in error and "--tokenizer bpe" in error


@pytest.mark.parametrize("argv", [["train_rm.py"], ["minirlhf.prepare", "sentiment"]])
def test_the_data_set_without_a_network(tmp_path, command, argv):
    """Row 41: what to download by hand and where to put it."""
    _, error = command(*argv, cwd=tmp_path, code=2, env={**OFFLINE, "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull,
                                                         "PIP_INDEX_URL": "http://127.0.0.1:9/simple"})
    assert "vaderSentiment-3.3.2.tar.gz" in error and "source distribution" in error and f"{tmp_path}/data" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [
    fresh("sft"), pytest.param(["-m", "minirlhf.sample", "out/sft", "--prompt", "the cat", "--n", "50"],
                               marks=pytest.mark.slow)], ids=["script", "sample"])
def test_a_reader_that_goes_away(folder, argv):
    """Row 42: `| head -1` sees its line, the run goes on to its end, in plain lines."""
    argv = [str(ROOT / argv[0]) if argv[0].endswith(".py") else argv[0], *argv[1:]]
    command = f"{shlex.join([sys.executable, *argv])} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr and done.stdout.count("\n") == 1
    assert "\x1b" not in done.stdout
    if argv[0].endswith(".py"):
        assert same_weights(folder / "out" / "sft", folder / "out" / "new")
