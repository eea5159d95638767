"""A folder without *.val.jsonl: every stage, and the evaluation after it, holds out the same prompts; sets that people
have go through all three stages."""
import json
import os
import random
import re
from types import SimpleNamespace

import pytest

from conftest import scratch
from minirlhf import evaluate, prepare
from minirlhf.data import (describe_sets, is_held_out, load_demonstrations, load_for_training, load_parts,
                           load_preferences, load_prompts, load_sets, opening)

WORDS = [a + b + c for a in "abcd" for b in "efgh" for c in "ij"]
SMALL = ("--device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 8 --vocab_size 260 --block_size 64 --batch_size "
         "4 --max_steps 2 --response_length 4").split()
STAGES = {"sft": SMALL, "rm": "--device cpu --dtype float32 --batch_size 4 --max_steps 2 --num_scale_samples 4 "
          "--response_length 4 --init_from out/sft".split(),
          "ppo": "--device cpu --dtype float32 --total_episodes 8 --batch_size 4 --response_length 4 --value_warmup 0 "
                 "--num_eval_prompts 6 --init_from out/sft --reward_model out/rm".split()}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(stem, words):
    return [{"sft": {"prompt": w, "completion": f" {w[::-1]}."}, "prompts": {"prompt": w},
             "preferences": {"prompt": w, "chosen": f" {w}.", "rejected": f" {w}?"}}[stem] for w in words]


@pytest.fixture
def folder(tmp_path):
    """A folder with three training files of the same prompts, some of them twice and in other letters."""
    for n, stem in enumerate(("sft", "preferences", "prompts")):
        words = random.Random(n).sample(WORDS, len(WORDS))
        write(tmp_path / "data" / f"{stem}.train.jsonl",
              records(stem, words + words[:9] + [w.upper() for w in words[9:15]]))
    return tmp_path


def options(folder, **changes):
    return SimpleNamespace(**{"data_dir": str(folder / "data"), "val_share": 0.3, "given": set()} | changes)


def stage(ran, folder, name, *more):
    return ran(folder, f"train_{name}.py", *scratch(name), *STAGES[name], "--data_dir", "data", "--out_dir",
               f"out/{name}", *more).out


# ---- what decides


def says(role, content):
    return {"role": role, "content": content}


TALK = [says("user", "Is it so?"), says("assistant", "Yes."), says("user", "Sure?")]


@pytest.mark.parametrize("record", [
    {"prompt": "Is it so?"}, {"prompt": " is it SO\n"}, {"prompt": "Is it so", "completion": "Yes."},
    {"messages": TALK},
    {"messages": TALK + [says("assistant", "Yes.")]},
    {"prompt": TALK, "chosen": [says("assistant", "a")], "rejected": [says("assistant", "b")]},
    {"prompt": None, "messages": TALK[:1]}, {"prompt": "\n\nHuman: Is it so?\n\nAssistant:"},
    {"prompt": "\n\nHuman: Is it so?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:", "completions": [" a", " b"]},
    {"chosen": TALK + [says("assistant", "a")], "rejected": TALK + [says("assistant", "b")]},
    {"chosen": "\n\nHuman: Is it so?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it so?\n\nAssistant: No."},
    {"chosen": "Is it so? Yes.", "rejected": "Is it so? No."}, {"completions": ["Is it so? Yes.", "Is it so? No."]},
    {"prompt": "", "text": "Is it so?"}, {"prompt": "", "completion": "Is it so?"},
    {"prompt": "", "chosen": "Is it so?", "rejected": "Is it?"},
    {"prompt": "", "completions": ["Is it so?", "Is it?"]}], ids=range(17))
def test_one_opening_in_all_forms(record):
    """What is said before the first answer, as text or messages, in any stage's record, in whatever case and
    punctuation; of a record without a prompt what its texts share, or the first of them."""
    assert opening(record) == "isitso"


def test_openings_that_differ():
    """Without letters the text itself counts; a system's words count; answers alone are told apart by their words."""
    assert opening({"prompt": "?!"}) == "?!" and opening({"prompt": "\U0001f600"}) == "\U0001f600"
    assert opening({"messages": [says("system", "Be kind."), *TALK]}) == "bekindisitso"
    assert opening({"chosen": [says("assistant", "One.")], "rejected": [says("assistant", "Two.")]}) == "one"
    assert opening({"prompt": "Is it\ud800 so"}) == "isit\ud800so".replace("\ud800", "")


def test_a_share_of_keys_is_held_out():
    """About the share; a function of the key alone; a larger share holds out what a smaller one does, and more."""
    keys = [f"key {n}" for n in range(4000)]
    few, many = ({key for key in keys if is_held_out(key, share)} for share in (0.05, 0.3))
    assert few < many and 150 < len(few) < 250 and 1100 < len(many) < 1300
    # the first 8 bytes of BLAKE2b of "isitso", as a number, are 0.5677 of 2 ** 64
    assert is_held_out("isitso", 0.5677 + 1e-3) and not is_held_out("isitso", 0.5677 - 1e-3)


def test_stages_hold_out_the_same_prompts(folder):
    """Whatever the order of the files: equal prompts, also in other letters, are on one side in all of them."""
    sides = {}
    for stem, load in (("sft", load_demonstrations), ("preferences", load_preferences), ("prompts", load_prompts)):
        *parts, paths, said = load_parts(load, stem, options(folder))
        assert paths == [str(folder / "data" / f"{stem}.train.jsonl")] * 2
        assert said == [f"there is no {stem}.val.jsonl: {len(parts[1])} of the {len(WORDS) + 15} rows of "
                        f"{stem}.train.jsonl are held out, by a hash of their prompts (--val_share 0.3)"]
        for part, rows in zip(("train", "val"), parts):
            for row in rows:
                sides.setdefault(getattr(row, "prompt", row).lower(), set()).add(part)
        assert load_for_training(load, stem, options(folder)) == parts[0]
    assert {*sides} == {*WORDS} and {*map(str, sides.values())} == {"{'train'}", "{'val'}"}
    held_out = {w for w in WORDS if is_held_out(w, 0.3)}
    assert {w for w in WORDS if sides[w] == {"val"}} == held_out and 3 < len(held_out) < 20


def test_a_val_file_goes_before_a_share(folder):
    """All of the training file is trained on; that --val_share has no effect is said where it was given."""
    path = write(folder / "data" / "prompts.val.jsonl", records("prompts", ["xyz"]))
    *parts, paths, said = load_parts(load_prompts, "prompts", options(folder))
    assert [len(parts[0]), parts[1], said] == [len(WORDS) + 15, ["xyz"], []] and paths[1] == str(path)
    assert load_for_training(load_prompts, "prompts", options(folder)) == parts[0]
    *_, said = load_parts(load_prompts, "prompts", options(folder, given={"val_share"}))
    assert said == [f"warning: --val_share has no effect: {path} is there"]


def test_a_share_that_leaves_nothing_is_refused(folder, refused):
    """Nothing held out, or nothing left: the file, the share, what to do."""
    write(folder / "data" / "sft.train.jsonl", records("sft", WORDS[:2]))
    for share, what in ((1e-9, "to be held out"), (1 - 1e-9, "for training")):
        error = refused(load_parts, load_demonstrations, "sft", options(folder, val_share=share))
        assert f"sft.train.jsonl: --val_share {share:g}: of 2 rows none is left {what}" in error
        assert "sft.val.jsonl" in error


# ---- the scripts


def test_all_stages_and_the_evaluation_after_them(folder, ran, declined):
    """Each says what it holds out; the command that follows has the share; python -m minirlhf.evaluate takes stage 3's
    held-out prompts, as many as it had, and has its figures; --resume cannot change the share."""
    for name, stem in (("sft", "sft"), ("rm", "preferences"), ("ppo", "prompts")):
        said = stage(ran, folder, name, "--val_share", "0.3")
        assert f"there is no {stem}.val.jsonl: " in said and "(--val_share 0.3)" in said
        assert name == "ppo" or " --val_share 0.3" in said.splitlines()[-1]
    said = ran(folder, "minirlhf.evaluate", "out/ppo", "--baseline", "out/sft", "--reward_model", "out/rm", "--prompts",
               "data/prompts.val.jsonl", "--output", "found.json").out
    assert "there is no data/prompts.val.jsonl: the " in said and "(--val_share 0.3)" in said
    found = json.loads((folder / "found.json").read_text())
    assert found["prompts"] == "data/prompts.train.jsonl"  # those it held out: there is no other file
    found = found["policies"]["out/ppo"]
    rows = [json.loads(line) for line in (folder / "out/ppo/metrics.jsonl").read_text().splitlines()]
    final = rows[-1]["final"]["after"]
    assert found == final
    seen = {json.loads(line)["prompt"].lower() for line in (folder / "out/ppo/samples.jsonl").read_text().splitlines()}
    assert seen and all(is_held_out(prompt, 0.3) for prompt in seen)
    assert "--val_share 0.2: this run had 0.3, which cannot change" in declined(
        folder, "train_ppo.py", "--resume", "--out_dir", "out/ppo", "--val_share", "0.2")
    error = declined(folder, "minirlhf.evaluate", "out/ppo", "--baseline", "out/sft", "--reward_model", "out/rm",
                     "--prompts", "data/nothing.val.jsonl")
    assert "data/nothing.val.jsonl: no such file" in error
    write(folder / "few.train.jsonl", records("prompts", [next(w for w in WORDS if not is_held_out(w, 0.3))]))
    error = declined(folder, "minirlhf.evaluate", "out/ppo", "--baseline", "out/sft", "--reward_model", "out/rm",
                     "--prompts", "few.val.jsonl")
    assert "few.train.jsonl: by the run's --val_share 0.3 no prompt is held out" in error


def test_as_many_prompts_as_the_run_had(tiny, tmp_path, monkeypatch):
    """What python -m minirlhf.evaluate takes by default: as many prompts as the first policy's run of stage 3 had; 512,
    where that is another model, whatever number its run had."""
    dpo, ppo = tiny.train("dpo", "--max_steps", "1"), tiny.train("ppo", "--num_eval_prompts", "3")
    assert not dpo.code and not ppo.code
    prompts, seen = write(tmp_path / "p.jsonl", records("prompts", [f"a{n}" for n in range(520)])), []
    monkeypatch.setattr(evaluate, "compare", lambda *arguments: seen.append(len(arguments[4])) or {})
    common = ["--baseline", tiny.sft, "--reward_model", tiny.rm, "--prompts", str(prompts), "--response_length", "3"]
    for policies in ([ppo.folder], [ppo.folder, dpo.folder], [dpo.folder, ppo.folder], [tiny.sft]):
        evaluate.main([*map(str, policies), *common])
    evaluate.main([str(ppo.folder), *common, "--num_prompts", "7"])
    assert seen == [3, 3, 512, 512, 7]


def egg(n, answer, part):
    return {"chosen": f"\n\nHuman: Egg {n}?\n\nAssistant: Yes.\n\nHuman: Now?\n\nAssistant: {answer}",
            "rejected": f"\n\nHuman: Egg {n}?\n\nAssistant: Yes.\n\nHuman: Now?\n\nAssistant: No."}


SETS = {
    "hh-rlhf": [("hh/helpful-base/train.jsonl", [egg(n, "Yes.", "") for n in range(24)]),
                ("hh/harmless-base/train.jsonl", [egg(n, "Sure.", "") for n in range(24, 48)]),
                ("hh/helpful-base/test.jsonl", [egg(n, "Yes.", "") for n in range(48, 56)]),
                ("hh/harmless-base/test.jsonl", [egg(n, "Sure.", "") for n in range(56, 64)])],
    "pku-saferlhf": [("pku/train.jsonl", [{"prompt": f"Do {n}?", "response_0": "So.", "response_1": "Not.",
                                           "better_response_id": n % 2,
                                           "safer_response_id": n // 2 % 2} for n in range(160)])],
    "summarize-from-feedback": [
        ("s/tldr_3_filtered/train.jsonl", [{"id": f"t{n}", "subreddit": "r", "title": "T", "post": f"P {n}",
                                            "summary": "S."}
                                           for n in range(160)]),
        ("s/comparisons/batch3.json", [{"info": {"id": f"t{n}", "subreddit": "r", "title": "T", "post": f"P {n}"},
                                        "choice": n % 2,
                                        "summaries": [{"text": " A."}, {"text": " B."}],
                                        "worker": f"w{n}"} for n in range(160)])]}


@pytest.mark.parametrize("name, kinds", [("hh-rlhf", ["helpful-base", "harmless-base"]),
                                         ("pku-saferlhf", ["better", "safer"]),
                                         ("summarize-from-feedback", [])])
def test_sets_that_people_have_go_through_all_stages(name, kinds, tmp_path, ran, monkeypatch):
    """Two steps of each stage on what prepare writes; stage 2 reports by kind."""
    for path, rows in SETS[name]:
        write(tmp_path / path, rows)
    source = SETS[name][0][0].split("/")[0]
    ran(tmp_path, "minirlhf.prepare", name, "--source", source, "--data_dir", "data")
    said = {stage_: stage(ran, tmp_path, stage_) for stage_ in STAGES}
    assert "warning" not in said["sft"] and not any("there is no" in text for text in said.values())
    for kind in kinds:
        assert re.search(rf"^{kind} +\d+ ", said["rm"], re.M)
    assert "held-out prompts, 95% intervals" in said["ppo"]
    assert prepare.STEMS == ("sft", "preferences", "prompts")


# ---- several sets of preferences

def test_sets_of_preferences(folder, refused):
    """Each holds out its own part, by its file or by the hash, which is the same for a prompt in all sets; they follow
    one another as they are named, by name, path of a pair, or path of a file; without a kind they get the set's name."""
    data = folder / "data"
    pair = {"prompt": "extra", "chosen": " y", "rejected": " n"}
    write(data / "mine.train.jsonl", [pair, pair | {"prompt": "more", "kind": "own"}])
    write(data / "mine.val.jsonl", [pair | {"prompt": "held"}])
    again = write(folder / "again.jsonl", records("preferences", WORDS))
    o = options(folder, preferences=("preferences", "mine", str(again)))
    train, val, paths, said = load_sets(o)
    alone = [load_parts(load_preferences, name, o) for name in o.preferences]
    for k, part in enumerate((train, val)):
        assert [(p.prompt, p.completions) for p in part] == [(p.prompt, p.completions) for a in alone for p in a[k]]
    assert [p.extra for p in train if p.prompt in ("extra", "more")] == [{"kind": "mine"}, {"kind": "own"}]
    assert train[0].extra == {"kind": "preferences"} and train[-1].extra == {"kind": str(again)}
    first = str(data / "preferences.train.jsonl")
    assert paths == [[first, str(data / "mine.train.jsonl"), str(again)],
                     [first, str(data / "mine.val.jsonl"), str(again)]]
    letters = [{p.prompt.lower() for p in part} for part in (train, val)]
    assert letters[0] & letters[1] == set() and len(letters[1]) > 5
    assert said[0].startswith("there is no preferences.val.jsonl: ") and said[1].endswith(
        "rows of again.jsonl are held out, by a hash of their prompts (--val_share 0.3)") and len(said) == 2
    assert describe_sets(o) == f"{data}/preferences.*.jsonl, {data}/mine.*.jsonl, {again}"
    o.preferences = (str(data / "mine"),)
    assert [p.extra for p in load_sets(o)[0]] == [{}, {"kind": "own"}]
    for o.preferences in (str(data / "mine.train.jsonl"),), ("mine",):
        assert [[p.prompt for p in part] for part in load_sets(o)[:2]] == [["extra", "more"], ["held"]]
    os.symlink("mine.train.jsonl", data / "linked.train.jsonl")
    for names in ((), ("mine", "mine"), ("mine", f"{data}/mine.train.jsonl"), (f"{data}/../data/mine", "mine"),
                  ("linked", "mine")):
        o.preferences = names
        assert f"--preferences {', '.join(names)}: name each set once, and one at least" in refused(load_sets, o)


def test_a_prompt_on_both_sides_of_two_sets_is_told(folder):
    """Held out by the file of one set, for training in another: a warning with the count; texts without a prompt are
    none."""
    data = folder / "data"
    for name, train, val in (("a", ["one", "two", ""], ["THREE?", "One"]), ("b", ["Three!", "three", "four"], ["", "two"])):
        write(data / f"{name}.train.jsonl", [{"prompt": w, "chosen": " y", "rejected": " n"} for w in train])
        write(data / f"{name}.val.jsonl", [{"prompt": w, "chosen": " y", "rejected": " n"} for w in val])
    said = load_sets(options(folder, preferences=("a", "b"), given={"val_share"}))[3]
    assert said[-1] == ("warning: 3 records for training answer prompts that another set holds out, which flatters the "
                        "held-out figures")
    assert load_sets(options(folder, preferences=("a",)))[3] == []
