"""`python -m minirlhf.sample`: completions, scores of texts, and what it and the other commands do with --output,
standard input and standard output that are not as they should be."""
import contextlib
import functools
import io
import json
import math
import os
import random
import re
import sys

import pytest
import torch

import train_rm
from minirlhf import benchmark, checkpoint, evaluate, prepare, rewards, runtime, sample
from minirlhf.config import RunOptions
from minirlhf.data import (encode_preferences, encode_row, load_demonstrations, load_preferences,
                           load_prompts)
from minirlhf.model import GPT, GPTConfig
from minirlhf.tokenizer import Tokenizer

WORDS = ["cat", "dog", "kind", "warm", "cold", "bright", "caf\u00e9", "sun"]
CPU = runtime.Precision(torch.device("cpu"), "float32")


def text(rng, most=6):
    return "".join(" " + rng.choice(WORDS) for _ in range(rng.randint(1, most)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four checkpoints with weights that are large, so that every token shows: out/{sft,ppo,rm,judge}; other/rm has
    another tokenizer."""
    folder, rng = tmp_path_factory.mktemp("models"), random.Random(0)
    tokenizers = [Tokenizer.train([text(rng) for _ in range(60)], size) for size in (275, 280)]
    for seed, (name, stage) in enumerate((("out/sft", "sft"), ("out/ppo", "ppo"), ("out/rm", "rm"), ("out/judge", "rm"),
                                          ("other/rm", "rm"))):
        tokenizer = tokenizers[name == "other/rm"]
        model = GPT(GPTConfig(2, 2, 16, tokenizer.vocab_size, 32), "scalar" if stage == "rm" else "lm")
        generator = torch.Generator().manual_seed(seed)
        for parameter, p in model.named_parameters():
            torch.nn.init.normal_(p, float("ln_" in parameter and "weight" in parameter), 0.4, generator=generator)
        os.makedirs(folder / name)
        checkpoint.save(folder / name / "ckpt.pt", stage=stage, model=model, tokenizer=tokenizer, options=RunOptions(),
                        info={}, training={})
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A working folder of its own, where out/ and other/ are the models."""
    for name in ("out", "other"):
        os.symlink(models / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return str(path.name)


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@functools.cache
def load(path):
    return checkpoint.load(path, ["rm"], "cpu")


@torch.no_grad()
def by_hand(path, prompt, completion, eos=True):
    """The scalar head after prompt, completion and eos, of this text alone and in no batch."""
    model, tokenizer, _ = load(path)
    ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_completion(completion)[:None if eos else -1]
    return float(model(torch.tensor([ids]))[0, -1])


def close(x):
    return pytest.approx(x, rel=1e-4, abs=1e-5)


# ---- scores of records

def test_a_completion_gets_the_score_of_its_text(folder, capsys):
    """Prompt, completion, eos; each column is kept, each record in its place; mean and deviation in the last line."""
    rng = random.Random(1)
    records = [{"id": k, "prompt": text(rng), "completion": text(rng), "tags": [1, {"a": None}]} for k in range(30)]
    sample.main(["out/rm", "--prompts", write(folder / "r.jsonl", records), "--output", "s.jsonl"])
    scored = rows(folder / "s.jsonl")
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == records
    scores = [by_hand("out/rm", r["prompt"], r["completion"]) for r in records]
    assert [row["score"] for row in scored] == close(scores)
    mean = sum(scores) / 30
    deviation = (sum((s - mean) ** 2 for s in scores) / 30) ** 0.5
    out = capsys.readouterr().out
    assert f"out/rm: 30 texts, mean score {mean:.3f}, standard deviation {deviation:.3f}\n" in out
    assert "right on" not in out and out.endswith("written: s.jsonl, 30 lines\n")


def test_pairs_get_the_figures_of_stage_2(folder, capsys):
    """Score differences, accuracy and interval are those of stage 2's rows and evaluate's function."""
    rng = random.Random(2)
    records = [{"prompt": text(rng, 3), "chosen": text(rng), "rejected": text(rng), "kind": "a"} for _ in range(60)]
    records[3]["rejected"] = records[3]["chosen"]  # no pair
    records += [{"prompt": "the", "completions": [" cat", " dog", " sun"], "scores": [2, 1, 1]}]  # two pairs
    records += [{"chosen": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}],
                 "rejected": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "you"}]}]
    path = write(folder / "p.jsonl", records)
    sample.main(["out/rm", "--prompts", path, "--output", "s.jsonl"])
    scored, (model, tokenizer, _) = rows(folder / "s.jsonl"), load("out/rm")
    kept, _, _ = encode_preferences(tokenizer, load_preferences(path), 32, "drop")
    figures, differences = evaluate.reward_model_figures(model, CPU, kept, tokenizer.eos, True)
    found = [row["score_chosen"] - row["score_rejected"] for row in scored[:60] if row["chosen"] != row["rejected"]]
    best, *others = scored[60]["score_completions"]
    found += [best - other for other in others] + [scored[61]["score_chosen"] - scored[61]["score_rejected"]]
    assert found == close(differences.tolist())
    assert [{k: v for k, v in row.items() if not k.startswith("score_")} for row in scored] == records
    f = figures["all"]
    assert f"right on {f['accuracy']:.3f} of {f['pairs']} pairs (95% {f['low']:.3f}-{f['high']:.3f})" in (
        capsys.readouterr().out)
    assert f["pairs"] == len(found) > 50 and f["accuracy"] == pytest.approx(sum(d > 0 for d in found) / len(found))
    assert scored[61]["score_chosen"] == close(by_hand("out/rm", "\n\nHuman: who?\n\nAssistant:", " me"))


def test_ties_count_half(folder, capsys, monkeypatch):
    """All scores equal: half of the pairs are right."""
    monkeypatch.setattr(GPT, "scalar", lambda self, hidden: torch.full(hidden.shape[:-1], 2.0))
    sample.main(["out/rm", "--prompts", write(folder / "p.jsonl", [{"chosen": "a b", "rejected": "a c"}] * 3)])
    assert "6 texts, mean score 2.000, standard deviation 0.000; right on 0.500 of 3 pairs (too few for" in capsys.readouterr().out


def test_pairs_that_teach_nothing_have_no_accuracy(folder, capsys):
    """A sentence and no nan."""
    sample.main(["out/rm", "--prompts", write(folder / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])])
    out = capsys.readouterr().out
    assert "no pair of texts that differ and are not tied" in out and "nan" not in out


@pytest.mark.parametrize("way, trained", [(None, "drop"), ("drop", "trim"), ("trim", "drop"), (None, "trim")])
@torch.no_grad()
def test_what_is_too_long_has_no_score_or_is_trimmed(folder, capsys, way, trained):
    """As stage 2 does, and told with the count; its own default is what the model was trained with: dropped."""
    long, short = " cat dog" * 30, " dog"
    records = [{"prompt": long, "completion": short}, {"prompt": "a", "completion": short}]
    option = [] if way is None else ["--long_prompts", way]
    model, tokenizer, _ = load("out/rm")
    (folder / "rm").mkdir()
    checkpoint.save("rm/ckpt.pt", stage="rm", model=model, tokenizer=tokenizer, info={}, training={},
                    options=train_rm.Options(long_prompts=trained))
    sample.main(["rm", "--prompts", write(folder / "r.jsonl", records), "--output", "s.jsonl", *option])
    first, second = (row["score"] for row in rows(folder / "s.jsonl"))
    assert second == close(by_hand("out/rm", "a", short))
    out = capsys.readouterr().out
    if (way or trained) == "trim":
        row = encode_row(tokenizer, long, short, 32, "trim")
        assert first == close(float(model(torch.tensor([row.ids]))[0, -1])) and len(row.ids) == 32
        assert "1 of 2 longer than 32 tokens: trimmed at the left, or cut\n" in out
    else:
        assert first is None and "1 of 2 longer than 32 tokens: dropped, their score is null\n" in out
        assert "rm: 1 text, " in out


def test_a_pair_of_which_one_is_too_long_has_one_score_and_no_accuracy(folder, capsys):
    """Dropped: null in its own column. Cut: two texts that differ only behind the cut are no pair, as in stage 2."""
    long = " cat dog" * 40
    write(folder / "p.jsonl", [{"prompt": "a", "chosen": long + "x", "rejected": " b"}])
    write(folder / "q.jsonl", [{"prompt": "a", "chosen": long + "x", "rejected": long + "y"}])
    sample.main(["out/rm", "--prompts", "p.jsonl", "--output", "s.jsonl"])
    (row,) = rows(folder / "s.jsonl")
    assert row["score_chosen"] is None and row["score_rejected"] == close(by_hand("out/rm", "a", " b"))
    sample.main(["out/rm", "--prompts", "q.jsonl", "--long_prompts", "trim"])
    assert capsys.readouterr().out.count("no pair of texts that differ and are not tied") == 2


def test_several_reward_models_have_a_column_each(folder, capsys):
    """By their paths; each reads the text with its own tokenizer."""
    records = [{"prompt": "the", "completion": text(random.Random(k))} for k in range(5)]
    sample.main(["out/rm", "other/rm", "--prompts", write(folder / "r.jsonl", records), "--output", "s.jsonl"])
    for row in rows(folder / "s.jsonl"):
        assert set(row) == {"prompt", "completion", "score out/rm", "score other/rm"}
        for path in ("out/rm", "other/rm"):
            assert row[f"score {path}"] == close(by_hand(path, row["prompt"], row["completion"]))
    sample.main(["out/rm", "out/judge", "--prompts", "r.jsonl"])
    assert "scores by out/rm, out/judge\n" in capsys.readouterr().out


def test_a_column_of_that_name_is_kept(folder, refused, capsys):
    """The new one is named after the model; where that is taken as well, the line says so."""
    records = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " b", "score": "mine"}]
    sample.main(["out/rm", "--prompts", write(folder / "r.jsonl", records), "--output", "s.jsonl"])
    assert [row.get("score") for row in rows(folder / "s.jsonl")] == [None, "mine"]
    assert all("score out/rm" in row for row in rows(folder / "s.jsonl"))
    assert "a column 'score' of their own: the new one is 'score out/rm'" in capsys.readouterr().out
    assert "s.jsonl:1: the column 'score out/rm' is there already" in refused(
        sample.main, ["out/rm", "out/judge", "--prompts", "s.jsonl"])


def test_a_score_does_not_depend_on_what_stands_beside_it(folder):
    """One record in a batch, or all, gives the same to rounding."""
    rng = random.Random(3)
    write(folder / "r.jsonl", [{"prompt": text(rng, 2), "completion": text(rng)} for _ in range(20)])
    judge = sample.load("out/rm", torch.device("cpu"))
    a = sample.parse(["out/rm", "--prompts", "r.jsonl"])
    encoded = sample.encode(judge, sample.read_texts("r.jsonl")[1], a)
    together = [s for (s,) in sample.score(judge, encoded, CPU)]
    assert [sample.score(judge, [row], CPU)[0][0] for row in encoded] == close(together)
    backwards = sample.score(judge, encoded[::-1], CPU)[::-1]
    assert [s for (s,) in backwards] == close(together) and len(set(together)) > 15


def test_what_json_cannot_say_is_null_when_written_back(folder, capsys):
    """NaN and half a character in a column; texts are shown on one line."""
    write(folder / "r.jsonl", [{"prompt": "a\n", "completion": " \ud83d \x1b[1m", "x": [math.nan], "y": "\ud83d"}])
    sample.main(["out/rm", "--prompts", "r.jsonl", "--output", "s.jsonl"])
    (row,) = rows(folder / "s.jsonl")
    assert (row["x"], row["y"], row["completion"]) == ([None], "\ufffd", " \ufffd \x1b[1m")
    sample.main(["out/rm", "--prompts", "r.jsonl"])
    assert "\na\\n ...\n" in (out := capsys.readouterr().out) and "| \ufffd \\x1b[1m\n" in out


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "a", "label": False, "completion": " b"}, ("a", [" b"])),  # a bad answer may be scored
    ({"text": "a b"}, ("", ["a b"])),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
     ("\n\nHuman: q\n\nAssistant:", [" a"])),
    ({"prompt": "q", "chosen": " a", "rejected": " b"}, ("q", [" a", " b"]))])
def test_all_forms_of_records_are_read(folder, record, expected):
    """As the readers of stages 1 and 2 read them."""
    _, (p,) = sample.read_texts(write(folder / "r.jsonl", [record]))
    assert (p.prompt, p.completions) == expected


@pytest.mark.parametrize("argv, words", [
    (["out/rm"], "out/rm: holds a reward model, expected an SFT model or a policy, which writes answers"),
    (["out/rm", "--prompt", "a"], "or name a file of answers to score with --prompts"),
    (["out/rm", "--prompts", "p.jsonl"], "p.jsonl:1: a reward model scores answers, and here are none"),
    (["out/rm", "--prompts", "p.jsonl"], "the record has: 'prompt', 'domain'"),
    (["out/rm", "--prompts", "mixed.jsonl"], "mixed.jsonl:2: 'completion' is missing; the record has: 'prompt'"),
    (["out/rm", "--prompts", "c.jsonl", "--n", "1"], "--n: has no effect on reward models"),
    (["out/rm", "--prompts", "c.jsonl", "--prompt", "a"], "--prompt: has no effect on reward models"),
    (["out/rm", "--prompts", "deep.jsonl"], "deep.jsonl:1: a column is nested too deeply to be written back"),
    (["out/rm", "out/rm", "--prompts", "c.jsonl"], "out/rm: named twice"),
    (["out/sft", "other/rm", "--prompts", "c.jsonl"], "out/sft and other/rm have different tokenizers"),
    (["out/rm", "--prompts", "long.jsonl"], "no text fits the context of out/rm, 32 tokens"),
    (["out/sft", "--prompt", "a", "--response_length", "31"], "--response_length 31: leaves no room for a prompt"),
    (["out/sft", "--prompt", "a", "--response_length", "99"], "out/sft, 32 tokens; at most 30"),
    (["out/rm", "--prompts", "c.jsonl", "--output", "c.jsonl"], "--output c.jsonl: is c.jsonl, which this command"),
    (["out/sft", "--prompts", "c.jsonl", "--output", "link.jsonl"], "--output link.jsonl: is c.jsonl, which this"),
    (["out/sft", "--prompts", "c.jsonl", "--output", "hard.jsonl"], "--output hard.jsonl: is c.jsonl, which this"),
    (["out/sft", "--prompts", "link.jsonl", "--output", "./c.jsonl"], "--output ./c.jsonl: is link.jsonl, which"),
    (["out/sft", "--prompt", "a", "--output", "out/sft/ckpt.pt"], "is out/sft/ckpt.pt, which this command reads"),
    (["out/sft", "--prompt", "a", "--output", "model.jsonl"], "--output model.jsonl: is out/sft/ckpt.pt, which"),
    (["out/sft", "--prompt", "a", "--output", "out/ppo/ckpt.pt"], "exists and is no .jsonl file"),
    (["out/sft", "--prompt", "a", "--output", "samples.jsonl"], "belongs to the run of that folder"),
    (["out/sft", "--prompt", "a", "--output", "sft.train.jsonl"], "exists and has the name of a file of data"),
    (["out/sft", "--prompt", "a", "--output", "out"], "--output out: cannot be written (Is a directory)"),
    (["out/sft", "--prompt", "a", "--output", "no/o.jsonl"], "--output no/o.jsonl: cannot be written"),
    (["out/sft", "--prompt", "a", "--output", ""], "--output : cannot be written"),
])
def test_what_is_refused(folder, models, refused, argv, words):
    """In a line, and no file is new or changed."""
    write(folder / "p.jsonl", [{"prompt": "a", "domain": "x"}])
    write(folder / "c.jsonl", [{"prompt": "a", "completion": " b"}])
    write(folder / "mixed.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "a"}])
    write(folder / "long.jsonl", [{"prompt": "a", "completion": " cat dog" * 40}])
    write(folder / "sft.train.jsonl", [{"prompt": "a", "completion": " b"}])
    (folder / "deep.jsonl").write_text('{"prompt": "a", "completion": "b", "x": %s}' % ("[" * 700 + "]" * 700))
    os.symlink("c.jsonl", folder / "link.jsonl")
    os.link(folder / "c.jsonl", folder / "hard.jsonl")
    os.link(models / "out" / "sft" / "ckpt.pt", folder / "model.jsonl")

    def state():
        return {path: path.read_bytes() for top in (folder, models) for path in top.rglob("*") if path.is_file()}
    before = state()
    assert words in refused(sample.main, argv)
    assert state() == before


def test_progress_by_hand(monkeypatch, capsys):
    """A line when 5 seconds have passed since the last one: 10 of 40 in 6 s leave 18 s. None when all is done."""
    clock = iter([100.0, 104.0, 106.0, 110.0, 112.0, 130.0])
    monkeypatch.setattr(sample.time, "monotonic", lambda: next(clock))
    progress = sample.Progress(40, "records scored")
    for done in (5, 10, 15, 20, 40):
        progress(done)
    assert capsys.readouterr().err == "10 of 40 records scored  0:06<0:18\n20 of 40 records scored  0:12<0:12\n"


# ---- policies, and reward models beside them

def test_a_reward_model_scores_what_a_policy_writes(folder, capsys):
    """The score is that of prompt and completion as sampled; without the reward model the completions are the same."""
    prompts = ["--prompt", "the cat", "--prompt", "a", "--n", "3", "--response_length", "6"]
    sample.main(["out/sft", "out/ppo", "out/rm", *prompts, "--output", "s.jsonl"])
    out, scored = capsys.readouterr().out, rows(folder / "s.jsonl")
    sample.main(["out/sft", "out/ppo", *prompts, "--output", "plain.jsonl"])
    plain = rows(folder / "plain.jsonl")
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == plain and len(plain) == 12
    assert [row["checkpoint"] for row in plain[:4]] == ["out/sft", "out/ppo"] * 2
    checked = 0
    for row in scored:
        if "\ufffd" not in row["completion"]:  # the text says which tokens were sampled
            found = by_hand("out/rm", row["prompt"], row["completion"], row["finished"])
            checked += row["score"] == close(found)
    assert checked
    mean = sum(row["score"] for row in scored[1::2]) / 6
    assert "scores by out/rm\n" in out and f"out/ppo mean score {mean:.3f}, standard deviation" in out


@torch.no_grad()
def test_scores_beside_completions_are_those_of_stage_3(folder, monkeypatch):
    """The rollout that the reward model sees is the one whose completion stands in the row."""
    seen, call = [], rewards.RewardModel.__call__
    monkeypatch.setattr(rewards.RewardModel, "__call__", lambda self, rollout: seen.append(rollout) or call(
        self, rollout))
    sample.main(["out/ppo", "out/rm", "--prompt", "a", "--n", "70", "--response_length", "5", "--output", "s.jsonl"])
    model, tokenizer, _ = load("out/rm")
    tokens = [row[:n] for r in seen for row, n in zip(r.tokens.tolist(), r.lengths.tolist())]
    scored = rows(folder / "s.jsonl")
    assert len(tokens) == len(scored) == 70 and [len(r.lengths) for r in seen] == [64, 6]
    for row, ids in zip(scored, tokens):
        assert row["score"] == close(float(model(torch.tensor([ids]))[0, -1]))
        assert "a" + row["completion"] == tokenizer.decode(ids)
    sample.main(["out/ppo", "out/rm", "out/judge", "--prompt", "a", "--output", "several.jsonl"])
    assert rows(folder / "several.jsonl")[0].keys() == {
        "checkpoint", "prompt", "completion", "finished", "score out/rm", "score out/judge"}


def test_a_prompt_that_is_too_long_is_told(folder, capsys):
    """And trimmed at its left to what --response_length leaves."""
    sample.main(["out/sft", "--prompt", " cat dog" * 40, "--prompt", " ", "--response_length", "30"])
    error = capsys.readouterr().err
    assert "out/sft: 1 prompts longer than 2 tokens are trimmed at the left" in error
    assert "1 of 2 prompts end in a blank" in error


# ---- files, standard input, standard output

def test_an_interrupt_leaves_whole_lines(folder, capsys, monkeypatch):
    """What was scored so far stands there, and is told; nothing, where there was nothing to write yet."""
    records = [{"prompt": "a", "completion": f" {k}"} for k in range(600)]
    write(folder / "r.jsonl", records)
    calls, score = [], sample.score

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return score(*arguments)
    monkeypatch.setattr(sample, "score", interrupted)
    for stop, expected in ((1, None), (3, 512)):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            sample.main(["out/rm", "--prompts", "r.jsonl", "--output", "s.jsonl"])
        assert (folder / "s.jsonl").exists() == (expected is not None)
    assert [row["completion"] for row in rows(folder / "s.jsonl")] == [r["completion"] for r in records[:512]]
    assert "stopped; written: s.jsonl, 512 lines" in capsys.readouterr().out
    stop = 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        sample.main(["out/rm", "--prompts", "r.jsonl", "--output", "s.jsonl"])
    assert len(rows(folder / "s.jsonl")) == 512  # what was there stays until there is something to write


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path):
    """A call that writes only a part is no success: the part goes, exit 1 names the file and where it ends."""
    class Disk(io.FileIO):
        left = 25

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            taken = super().write(data[:self.left])
            self.left -= taken
            return taken
    with pytest.raises(SystemExit) as stop, runtime.Output(str(tmp_path / "o.jsonl"), ".jsonl", []) as output:
        output.file = Disk(tmp_path / "o.jsonl", "ab")
        for k in range(9):
            output.write(f'{{"row": {k}}}\n')
    assert "could not be written (No space left on device) at 22 bytes" in stop.value.code
    assert (tmp_path / "o.jsonl").read_text() == '{"row": 0}\n{"row": 1}\n'


def test_a_command_that_ends_before_it_has_written_leaves_its_predecessor(tmp_path):
    """An earlier file stays as it was, a new one is not left empty; a command that has nothing to say likewise."""
    for error in (SystemExit("error: no"), KeyboardInterrupt(), None):
        for name, before in (("old.jsonl", "{}\n"), ("new.jsonl", None)):
            path = tmp_path / name
            if before:
                path.write_text(before)
            with contextlib.suppress(SystemExit, KeyboardInterrupt), runtime.Output(str(path), ".jsonl", []):
                if error:
                    raise error
            assert (path.read_text() if before else path.exists()) == (before or False)


def test_an_output_replaces_its_predecessor(folder):
    """The same command twice: the second file, not both; a refused one after that changes nothing."""
    for n in ("3", "2"):
        sample.main(["out/sft", "--prompt", "a", "--n", n, "--output", "s.jsonl"])
    assert len(rows(folder / "s.jsonl")) == 2


@pytest.mark.parametrize("content, words", [
    (None, "standard input is closed"), (b"\0" * 3_000_000, "a line of 1,048,576 bytes or more"),
    (b"caf\xe9\n", "standard input: not UTF-8")])
def test_standard_input_that_holds_no_prompts(folder, refused, monkeypatch, content, words):
    """Closed, endless without a line's end, no text: a line each, and no file."""
    monkeypatch.setattr(sys, "stdin", content and io.TextIOWrapper(io.BytesIO(content)))
    assert words in refused(sample.main, ["out/sft", "--output", "s.jsonl"])
    assert not (folder / "s.jsonl").exists()


@pytest.mark.parametrize("content, prompts", [(b"", []), (b"the cat\r\n\ncaf\xc3\xa9", ["the cat", "", "caf\u00e9"])])
def test_standard_input_that_is_no_terminal(folder, monkeypatch, capsys, content, prompts):
    """A prompt a line, also an empty one and the last without an end; no input, no output."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    sample.main(["out/sft", "--output", "s.jsonl"])
    assert "prompt> " not in capsys.readouterr().out
    written = [row["prompt"] for row in rows(folder / "s.jsonl")] if os.path.exists("s.jsonl") else []
    assert written == prompts


def test_the_file_of_standard_input_is_not_written_over(folder):
    """`sample CKPT --output F < F`."""
    write(folder / "p.jsonl", [{"prompt": "a"}])
    before = (folder / "p.jsonl").read_bytes()
    with open(folder / "p.jsonl", "rb") as f, pytest.raises(SystemExit) as stop:
        keep = os.dup(0)
        os.dup2(f.fileno(), 0)
        try:
            sample.main(["out/sft", "--output", "p.jsonl"])
        finally:
            os.dup2(keep, 0)
            os.close(keep)
    assert stop.value.code == 2 and (folder / "p.jsonl").read_bytes() == before


EVALUATE = ["out/ppo", "--baseline", "out/sft", "--reward_model", "out/rm", "--response_length", "4", "--prompts",
            "p.jsonl"]
PRINTS = {"sample": (sample.main, ["out/sft", "--prompt", "a"]), "evaluate": (evaluate.main, EVALUATE),
          "scores": (sample.main, ["out/rm", "--prompts", "p.jsonl"]), "benchmark": (benchmark.main, ["--what", "sft"])}


@pytest.mark.parametrize("name", PRINTS)
@pytest.mark.parametrize("state", ["full", "gone", "closed"])
def test_a_result_that_cannot_be_printed_is_no_success(folder, monkeypatch, capsys, name, state):
    """Standard output full: exit 1 and the reason; closed: exit 2 before any work; its reader gone: a quiet end."""
    write(folder / "p.jsonl", [{"prompt": "a", "completion": " b"}])
    monkeypatch.setattr(benchmark, "measure", lambda o: {})
    monkeypatch.setattr(benchmark, "show", lambda result: benchmark.say("a line"))
    stream = None
    if state == "gone":
        stream = gone()
    elif state == "full":
        stream = open("/dev/full", "w")
    main, argv = PRINTS[name]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stdout", stream)
        main(argv)
    if state == "full":
        assert stop.value.code == "error: standard output could not be written (No space left on device)"
    else:
        assert stop.value.code == {"gone": 0, "closed": 2}[state]
    if stream:
        stream.close()


def gone():
    """A stream whose reader has gone."""
    read, end = os.pipe()
    os.close(read)
    return os.fdopen(end, "w")


@pytest.mark.parametrize("name", PRINTS)
def test_a_second_call_does_not_end_as_the_first_did(folder, monkeypatch, capsys, name):
    """In a notebook: the first call's reader went away, on the stream on which the second then prints all it has."""
    write(folder / "p.jsonl", [{"prompt": "a", "completion": " b"}])
    monkeypatch.setattr(benchmark, "measure", lambda o: {})
    monkeypatch.setattr(benchmark, "show", lambda result: [benchmark.say("a line") for _ in range(3)])
    main, argv = PRINTS[name]
    with gone() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        said = open(folder / "said", "w+")  # the same stream has a reader again
        os.dup2(said.fileno(), stream.fileno())
        main(argv)
        said.seek(0)
        assert len(said.readlines()) > 2


def test_all_prompts_are_answered_after_a_call_whose_reader_went(folder, monkeypatch, capsys):
    """Standard input ends early where nobody reads the answers, but not in the next call."""
    for stdout, answered in ((gone(), ["a"]), (sys.stdout, ["a", "b", "c"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\nc\n")))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            sample.main(["out/sft", "--output", "s.jsonl"])
        assert [row["prompt"] for row in rows(folder / "s.jsonl")] == answered


@pytest.mark.parametrize("name", ["sample", "scores", "evaluate"])
def test_an_output_without_its_folder_is_told_before_models_are_loaded(folder, monkeypatch, refused, name):
    """Loading may take a minute, fetching more."""
    main, argv = PRINTS[name]
    monkeypatch.setattr(checkpoint, "load", None)
    assert refused(main, [*argv, "--output", "nodir/x.jsonl"]) == (
        "error: --output nodir/x.jsonl: cannot be written (there is no folder nodir)\n")
    assert not (folder / "nodir").exists()


def test_a_name_steers_no_terminal(folder, refused):
    """A record file's, a column's, a model's, an output's."""
    (folder / "a\x1b[31m.jsonl").write_text('{"\\u001b[2J": 1}\n')
    error = refused(sample.main, ["out/rm", "--prompts", "a\x1b[31m.jsonl"])
    assert error.startswith("error: a\\x1b[31m.jsonl:1: ") and "\\x1b[2J" in error and "\x1b" not in error
    for argv in (["no\x1b[31m"], ["out/rm", "--prompts", "no\x1b[31m"],
                 ["out/sft", "--prompt", "a", "--output", "nowhere\x1b[31m/x"]):
        assert "\\x1b[31m" in (error := refused(sample.main, argv)) and "\x1b" not in error


@pytest.mark.parametrize("state", ["full", "closed"])
def test_a_result_in_a_file_is_a_success(folder, monkeypatch, state):
    """--output holds what standard output could not take."""
    write(folder / "p.jsonl", [{"prompt": "a"}])
    for (main, argv), name in ((PRINTS["sample"], "s.jsonl"), (PRINTS["evaluate"], "e.json")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open("/dev/full", "w") if state == "full" else None)
            main([*argv, "--output", name])
        assert (folder / name).read_text().endswith("}\n")


@pytest.mark.parametrize("output, words", [
    ("p.jsonl", "is p.jsonl, which this command reads"), ("link.json", "is p.jsonl, which this command reads"),
    ("model.json", "is out/rm/ckpt.pt, which this command reads"), ("f.json", "f.py, which this command reads"),
    ("notes.txt", "exists and is no .json file"), ("config.json", "belongs to the run"), ("out", "Is a directory")])
def test_evaluate_does_not_write_over_what_it_reads(folder, models, refused, output, words):
    """Prompts, models and the file of a reward function, under any name."""
    write(folder / "p.jsonl", [{"prompt": "a"}])
    (folder / "f.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n")
    (folder / "notes.txt").write_text("mine")
    os.symlink("p.jsonl", folder / "link.json")
    os.link(models / "out" / "rm" / "ckpt.pt", folder / "model.json")
    os.link(folder / "f.py", folder / "f.json")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert words in refused(evaluate.main, [*EVALUATE, "--judge", "f.py:f", "--output", output])
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_evaluate_that_fails_leaves_no_file(folder, capsys):
    """A judge that raises, a full disk: neither an empty file nor a part of one."""
    write(folder / "p.jsonl", [{"prompt": "a"}])
    (folder / "f.py").write_text("def f(prompts, completions):\n    return 1 / 0\n")
    (folder / "old.json").write_text("{}")
    for name in ("new.json", "old.json"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*EVALUATE, "--judge", "f.py:f", "--output", name])
        assert stop.value.code == 2
    assert not (folder / "new.json").exists() and (folder / "old.json").read_text() == "{}"
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*EVALUATE, "--output", "/dev/full"])
    assert "--output /dev/full: could not be written (No space left on device)" in stop.value.code


def test_prepare_does_not_replace_its_source(tmp_path, refused, monkeypatch):
    """The archive within the folder that --overwrite replaces, by its name or a link to it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_bytes(b"the archive, under another name")
    os.symlink(data / "README.md", tmp_path / "link.tar.gz")
    monkeypatch.setattr(prepare, "make_data", None)
    for source in (data / "README.md", tmp_path / "link.tar.gz"):
        error = refused(prepare.main, ["sentiment", "--data_dir", str(data), "--source", str(source), "--overwrite"])
        assert f"--source {source}: lies in --data_dir {data}, which is replaced" in error
    assert (data / "README.md").read_bytes() == b"the archive, under another name"
    assert "has the name of the archive" in refused(
        prepare.main, ["sentiment", "--data_dir", str(tmp_path / prepare.ARCHIVE)])


# ---- answers become records

def letters_e(folder):
    """A reward function: how many "e" an answer has."""
    (folder / "own.py").write_text("def score(prompts, completions):\n    return [c.count('e') for c in completions]\n")
    return "own.py:score"


@pytest.mark.parametrize("policies", [["out/sft"], ["out/sft", "out/ppo"]])
@pytest.mark.parametrize("function", [False, True])
def test_rankings_and_bests_of_what_is_sampled(folder, capsys, policies, function, monkeypatch):
    """The same completions as without --rank, those that ended, each text once, by falling score, with who wrote each
    of several policies'; --best: the first of them. What is left out is counted; stages 2 and 1 read the files."""
    monkeypatch.setattr(sample, "complete", functools.partial(ending, sample.complete))
    prompts = write(folder / "p.jsonl", [{"prompt": text(random.Random(k), 2)} for k in range(30)])
    common = [*policies, *(["--reward_model", letters_e(folder)] if function else ["out/rm"]), "--prompts", prompts,
              "--n", "5", "--response_length", "3", "--output"]
    sample.main([*common, "plain.jsonl"])
    for option in ("rank", "best"):
        capsys.readouterr()
        sample.main([*common, f"{option}.jsonl", f"--{option}"])
        out, expected, cut, repeated, all_scores = capsys.readouterr().out, [], 0, 0, []
        plain = rows(folder / "plain.jsonl")
        for at in range(0, len(plain), 5 * len(policies)):
            part, seen = plain[at:at + 5 * len(policies)], {}
            cut += sum(not row["finished"] for row in part)
            part = [row for path in policies for row in part if row["checkpoint"] == path and row["finished"]]
            for row in sorted(part, key=lambda row: row["score"], reverse=True):
                seen.setdefault(row["completion"], row)
            repeated, ranked = repeated + len(part) - len(seen), [*seen.values()]
            if len(ranked) < 1 + (option == "rank"):
                continue
            record = {"prompt": ranked[0]["prompt"], **(
                {"completion": ranked[0]["completion"], "score": ranked[0]["score"]} if option == "best" else
                {"completions": [*seen], "scores": [row["score"] for row in ranked]})}
            if option == "rank" and len(policies) > 1:
                record["checkpoints"] = [row["checkpoint"] for row in ranked]
            expected.append(record)
            all_scores.append([row["score"] for row in ranked])
        assert rows(folder / f"{option}.jsonl") == expected and 5 < len(expected) <= 30 and cut and repeated
        answers, pairs = sum(map(len, all_scores)), sum(x > y for s in all_scores for i, x in enumerate(s)
                                                        for y in s[i:])
        told = f", {pairs} pairs" if option == "rank" else ""
        assert (f"{len(expected)} records ({answers} answers{told}) of 30 prompts; left out: {cut} answers that were "
                f"cut, {repeated} that repeat another, {30 - len(expected)} prompts\n") in out
        means = [sum(x) / len(x) for x in ([s[0] for s in all_scores], [x for s in all_scores for x in s])]
        assert re.search(rf"best answers: mean score {means[0]:.3f}, .*; all: mean score {means[1]:.3f}, ", out)
        assert ("KL of the best from out/sft <= 0.81 nats" in out) == (len(policies) == 1)  # log 5 - 4/5
    found = load_preferences("rank.jsonl")
    assert [(p.prompt, p.completions, p.scores) for p in found] == [
        (r["prompt"], r["completions"], r["scores"]) for r in rows(folder / "rank.jsonl")]
    assert [(d.prompt, d.completion) for d in load_demonstrations("best.jsonl")] == [
        (r["prompt"], r["completion"]) for r in rows(folder / "best.jsonl")]


def ending(complete, policy, judges, prompts, a):
    """As `complete`, but that only every seventh answer was cut, and texts are shortened, so that some are the same."""
    for k, (prompt, completion, _, marks) in enumerate(complete(policy, judges, prompts, a)):
        yield prompt, completion[:1], k % 7 > 0, marks


def test_messages_stay_messages(folder, capsys):
    """A prompt of messages is written as such, calls of tools too, and read as the same prompt."""
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]},
        {"role": "tool", "content": "me"}, {"role": "user", "content": "so?"}]
    path = write(folder / "p.jsonl", [{"messages": talk}])
    (prompt,) = load_prompts(path)
    ranked = {" you": (2.0, "a"), " me": (1.0, "b")}
    record = sample.ranking(prompt, ranked, several=True)
    assert record == {"messages": talk, "completions": [" you", " me"], "scores": [2.0, 1.0], "checkpoints": ["a", "b"]}
    write(folder / "r.jsonl", [record])
    (read,) = load_preferences("r.jsonl")
    assert read.prompt == prompt and read.prompt.messages == prompt.messages and read.completions == [" you", " me"]
    write(folder / "d.jsonl", [{**sample.asked(prompt), "completion": " you"}])
    (read,) = load_demonstrations("d.jsonl")
    assert read.prompt.messages == prompt.messages and read.completion == " you"


@pytest.mark.parametrize("given, says", [
    (["--rank", "--n", "2"], "--rank: needs one reward model, found none; name it with --reward_model"),
    (["out/rm", "--reward_model", "out/judge", "--best", "--n", "2"], "found out/rm, out/judge"),
    (["out/rm", "--reward_model", "out/rm"], "out/rm: named twice"),
    (["out/rm", "--rank"], "--rank: chooses among the answers to a prompt; ask for several with --n"),
    (["out/rm", "--best", "--n", "2", "--temperature", "0"], "--temperature 0: the 2 answers of a policy would be"),
    (["--reward_model", "other/rm", "--rank", "--n", "2"], "different tokenizers"),
    (["--reward_model", "out/ppo", "--rank", "--n", "2"], "holds a PPO policy, expected a reward model"),
    (["--reward_model", "own.py:none", "--rank", "--n", "2"], "own.py:none: own.py has no function none"),
    (["--rank", "--best"], "--rank and --best exclude each other"),
])
def test_what_cannot_be_ranked(folder, refused, given, says):
    """One line, and no file."""
    letters_e(folder)
    write(folder / "p.jsonl", [{"prompt": "the"}])
    assert says in refused(sample.main, ["out/sft", *given, "--prompts", "p.jsonl", "--output", "o.jsonl"])
    assert not (folder / "o.jsonl").exists()


def test_answers_to_which_the_reward_does_not_apply_are_not_ranked(folder, capsys, monkeypatch):
    """None is no score: such answers are left out and counted, the others stand in order."""
    letters_e(folder)
    write(folder / "p.jsonl", [{"prompt": "the"}])
    answers = [("the", f" {text}", True, (score,)) for text, score in (("a", None), ("b", 1.0), ("c", 2.0), ("d", None))]
    monkeypatch.setattr(sample, "complete", lambda *a: iter(answers))
    sample.main(["out/sft", "--reward_model", "own.py:score", "--rank", "--n", "4", "--prompts", "p.jsonl", "--output",
                 "o.jsonl"])
    (record,) = map(json.loads, open(folder / "o.jsonl"))
    assert record == {"prompt": "the", "completions": [" c", " b"], "scores": [2.0, 1.0]}
    assert "0 that repeat another, 2 to which the reward does not apply, 0 prompts" in capsys.readouterr().out


def test_rankings_need_a_file_and_answers_that_end(folder, refused, monkeypatch):
    """No --output, no prompts, --chat, reward models alone, what it reads as --output, and answers that are all cut."""
    letters_e(folder)
    write(folder / "p.jsonl", [{"prompt": "the"}])
    ranking = ["out/sft", "--reward_model", "own.py:score", "--rank", "--n", "2"]
    assert "name their file with --output" in refused(sample.main, [*ranking, "--prompt", "the"])
    assert "and the prompts' with --prompts" in refused(sample.main, [*ranking, "--output", "o.jsonl"])
    assert "--reward_model: has no effect with --chat" in refused(sample.main, [*ranking[:3], "--chat"])
    assert "--rank: has no effect on reward models" in refused(
        sample.main, ["out/rm", "--rank", "--prompts", "p.jsonl"])
    assert "which this command reads" in refused(
        sample.main, [*ranking, "--prompt", "the", "--output", "own.py"])
    complete = sample.complete
    monkeypatch.setattr(sample, "complete", lambda *a: ((p, c, False, s) for p, c, _, s in complete(*a)))
    for option, what in (("--rank", "two answers that differ"), ("--best", "an answer")):
        assert f"{option}: no prompt has {what} and end within 4 tokens" in refused(sample.main, [
            *ranking[:3], option, "--n", "2", "--response_length", "4", "--prompts", "p.jsonl", "--output", "o.jsonl"])
    assert not (folder / "o.jsonl").exists()
