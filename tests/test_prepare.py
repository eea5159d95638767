"""`python -m minirlhf.prepare NAME` on files as people have them: what is read, how it is divided, what is told."""
import bz2
import contextlib
import gzip
import hashlib
import json
import os
import random
import shlex
import signal
import time
import tracemalloc
from pathlib import Path

import pytest

from conftest import Command, tree
from minirlhf import prepare
from minirlhf.data import is_held_out
from minirlhf.dialects import SETS
from minirlhf.prepare import Notes, find_files, items_in, main, opened, part_of


def hh(n, answer="Yes.", other="No.", asked="Is it {}?"):
    asked = f"\n\nHuman: {asked.format(n)}\n\nAssistant: "
    return {"chosen": asked + answer, "rejected": asked + other}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def load(folder):
    return {path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in Path(folder).glob("*.jsonl")}


def asked(record):
    """The words of a record's first turn."""
    return (record.get("prompt") or record["messages"])[0]["content"]


def made(folder, *sources, name="hh-rlhf", **options):
    """What is made of some sources: {file: records}."""
    argv = [name, "--source", *sources, "--data_dir", folder, *(
        word for key, value in options.items() for word in (f"--{key}", value))]
    main([*map(str, argv)])
    return load(folder)


@pytest.fixture
def source(tmp_path):
    """hh-rlhf in small: two of its parts with training and test files; a prompt of a test file in another's training
    file, in other letters; pairs that are equal, in both orders, twice there."""
    rows = [hh(n) for n in range(40)]
    write(tmp_path / "hh/helpful-base/train.jsonl.gz", gzip.compress(lines(*rows[:20], hh("35 ??"),
                                                                           hh(7, "Same.", "Same."),
                                                                           hh(3, "No.", "Yes."))))
    write(tmp_path / "hh/harmless-base/train.jsonl.gz", gzip.compress(lines(*rows[20:30], rows[20])))
    write(tmp_path / "hh/helpful-base/test.jsonl.gz", gzip.compress(lines(*rows[30:36])))
    write(tmp_path / "hh/harmless-base/test.jsonl", lines(*rows[36:]))
    write(tmp_path / "hh/red-team-attempts/red_team_attempts.jsonl.gz", gzip.compress(lines({"transcript": "x"})))
    return tmp_path / "hh"


# ---- files in, files out


def test_a_folder_becomes_the_six_files(source, tmp_path, capsys):
    """The set's own test files are held out, and no prompt of theirs is trained on; what was found is told; other files
    of the folder are not the set's."""
    files = made(tmp_path / "data", source)
    assert {name: len(records) for name, records in files.items()} == {
        f"{stem}.{part}.jsonl": n for stem in ("sft", "preferences", "prompts")
        for part, n in (("train", {"sft": 31, "preferences": 31, "prompts": 30}[stem]), ("val", 10))}
    assert {asked(r) for r in files["prompts.val.jsonl"]} == {f"Is it {n}?" for n in range(30, 40)}
    assert {asked(r) for r in files["preferences.train.jsonl"]} == {f"Is it {n}?" for n in range(30)}
    assert {r["kind"] for r in files["preferences.val.jsonl"]} == {"helpful-base", "harmless-base"}
    said = capsys.readouterr().out
    for words in ("| both answers are the same | left out | 1 | ", "helpful-base/train.jsonl.gz:22` |",
                  "| for training, with a post, film, conversation or prompt that is held out | left out | 1 | ",
                  "| a pair that is in preferences in the other order | kept, both | 1 | ",
                  "| a record that is in preferences already | left out | 1 | ",
                  f"train_sft.py --data_dir {tmp_path}/data"):
        assert words in said


def test_the_readme_says_where_everything_is_from(source, tmp_path):
    """Command, files with size and SHA-256, counts, the rule of the split, what was found."""
    files = made(tmp_path / "data", source)
    readme = (tmp_path / "data" / "README.md").read_text("utf-8")
    assert f"    python -m minirlhf.prepare hh-rlhf --source {source}\n" in readme and "{" not in readme
    for path in source.glob("h*/*"):
        assert f"| {path} | {path.stat().st_size:,} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in readme
    assert "44 rows were read." in readme and "red_team" not in readme
    assert "Files or rows that their publisher named test" in readme
    for name, records in files.items():
        assert f"| {name} | {len(records):,} | " in readme
    assert "| preferences.val.jsonl | 10 | helpful-base 6, harmless-base 4 |" in readme


def test_the_command_in_the_readme_makes_the_same_folder(source, tmp_path):
    """With all its options; every byte is a function of source and options, and the order is no order of the source."""
    made(tmp_path / "a b" / "data", source, max_rows=24, val_share=0.25)
    text = (tmp_path / "a b" / "data" / "README.md").read_text("utf-8")
    command = next(line.strip() for line in text.splitlines() if line.startswith("    python -m"))
    assert "--max_rows 24 --val_share 0.25" in command and "the first ones of each file" in text
    main([*shlex.split(command)[3:], "--data_dir", str(tmp_path / "again")])
    for path in (tmp_path / "a b" / "data").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    numbers = [int(asked(r)[6:-1]) for r in load(tmp_path / "again")["sft.train.jsonl"]]
    runs = sum(b == a + 1 for a, b in zip(numbers, numbers[1:]))
    assert len(numbers) > 12 and runs < len(numbers) // 3


def test_max_rows_are_the_first_of_each_file(source, tmp_path):
    """Divided evenly; of more files than rows only the first ones are read."""
    files = made(tmp_path / "data", source, max_rows=8)
    assert {asked(r) for name in files for r in files[name]} == {f"Is it {n}?" for n in (0, 1, 20, 21, 30, 31, 36, 37)}
    made(tmp_path / "few", source / "helpful-base", source / "harmless-base", max_rows=3, val_share=0.5)
    assert "3 rows were read" in (tmp_path / "few" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path, part", [
    ("train.jsonl.gz", "train"), ("helpful-base/test.jsonl.gz", "val"), ("askculinary/validation.json", "val"),
    ("train/pos/0_9.txt", "train"), ("test/neg/0_1.txt", "val"), ("test_prefs-00000-of-00001.jsonl", "val"),
    ("a.json", ""),
    ("latest/contest.json", ""), ("comparisons/batch3.json", ""), ("test/train.json", "train"),
    ("valid.jsonl", "val")])
def test_the_part_stands_in_a_name(path, part):
    """A word of the nearest name that has one; within other words it says nothing."""
    assert part_of(Path(path)) == part


def test_reviews_of_all_folders_come_in_step(tmp_path):
    """The first review of each folder, then the second: none waits long for one of the other kind."""
    for name in ("train/pos/10_9", "train/pos/2_7", "train/neg/2_1", "train/neg/10_3", "test/pos/2_8"):
        write(tmp_path / f"{name}.txt", b"x")
    write(tmp_path / "train/urls_pos.txt", b"x")
    found = [(str(path.relative_to(tmp_path)), part) for path, part in find_files([tmp_path], SETS["imdb"].files)]
    assert found == [("test/pos/2_8.txt", "val"), ("train/neg/2_1.txt", "train"), ("train/pos/2_7.txt", "train"),
                     ("train/neg/10_3.txt", "train"), ("train/pos/10_9.txt", "train")]


# ---- how it is divided


def test_a_share_by_hash_where_the_set_has_no_test_files(tmp_path):
    """The keys that are held out are a function of their letters alone: not of the order, of other rows, or of case."""
    rows = [hh(n) for n in range(300)]
    files = made(tmp_path / "one", write(tmp_path / "x.jsonl", lines(*rows)))
    random.Random(0).shuffle(rows)
    upper = [json.loads(json.dumps(row).replace("Is it", "IS IT")) for row in rows[:200]]
    others = made(tmp_path / "other", write(tmp_path / "y.jsonl", lines(*upper)))
    held_out = {asked(r) for r in files["prompts.val.jsonl"]}
    assert held_out == {f"Is it {n}?" for n in range(300) if is_held_out(f"isit{n}", 0.05)} and 5 < len(held_out) < 30
    assert {asked(r).lower() for r in others["prompts.val.jsonl"]} <= {text.lower() for text in held_out}
    assert not {asked(r).lower() for r in others["prompts.train.jsonl"]} & {text.lower() for text in held_out}


def test_val_share_goes_before_the_set_s_own_division(source, tmp_path):
    """Of all files together; without both parts there is no own division."""
    files = made(tmp_path / "data", source, val_share=0.5)
    held_out = {f"Is it {n}?" for n in range(40) if is_held_out(f"isit{n}", 0.5)}
    assert {asked(r) for r in files["prompts.val.jsonl"]} == held_out
    only = made(tmp_path / "only", source / "helpful-base" / "test.jsonl.gz", val_share=0.5)
    assert only["prompts.train.jsonl"] and only["prompts.val.jsonl"]
    files = made(tmp_path / "lone", write(tmp_path / "test.jsonl", lines(*map(hh, range(200)))))
    assert len(files["sft.train.jsonl"]) > 150


def test_pieces_and_posts_are_never_divided(tmp_path):
    """Conversations that open alike, posts of one id, near-duplicates: all on one side, by whatever key they hang
    together, also where the key that decides differs."""
    rng = random.Random(1)
    rows = [{"id": f"talk{rng.randrange(60)}_{rng.randrange(9)}", "conversations": [
        {"from": "human", "value": f"Question {rng.randrange(200)}!" + "?" * rng.randrange(3)},
        {"from": "gpt", "value": f"Answer {n}."}]}
        for n in range(600)]
    files = made(tmp_path / "data", write(tmp_path / "x.json", json.dumps(rows).encode()), name="sharegpt",
                 val_share=0.2)
    where = {}
    for part in ("train", "val"):
        for r in files[f"sft.{part}.jsonl"]:
            n = int(r["messages"][-1]["content"].split()[1].rstrip("."))
            for key in (rows[n]["id"].split("_")[0], rows[n]["conversations"][0]["value"].rstrip("?!")):
                where.setdefault(key, set()).add(part)
    assert len(where) > 100 and all(len(parts) == 1 for parts in where.values())
    assert files["sft.val.jsonl"] and files["sft.train.jsonl"]


def test_what_has_no_part_of_its_own_is_told(tmp_path, capsys):
    """Demonstrations of which none is held out are written without a val file; those that all are, not at all."""
    post = {"id": "t3_a", "subreddit": "r", "title": "t", "post": "p1", "summary": "s"}
    pair = {"info": {"id": "t3_b", "subreddit": "r", "title": "t", "post": "p2"}, "choice": 0,
            "summaries": [{"text": " A"}, {"text": " B"}]}
    write(tmp_path / "tldr_3_filtered/train.jsonl", lines(post))
    write(tmp_path / "comparisons/batch3.json", lines(pair | {"split": "valid1"}))
    files = made(tmp_path / "data", tmp_path / "tldr_3_filtered", tmp_path / "comparisons",
                 name="summarize-from-feedback")
    assert files.keys() == {"sft.train.jsonl", "prompts.train.jsonl", "prompts.val.jsonl"}
    said, readme = capsys.readouterr().out, (tmp_path / "data" / "README.md").read_text("utf-8")
    for text in ("o sft.val.jsonl: none of these records is held out",
                 "o preferences files: 1 such records are held out"):
        assert text in said and text in readme


# ---- forms of files


RECORDS = [hh(n, answer="Yes.\n\u2028é 漢 \U0001f600 \\ \" [{]},") for n in range(7)]


@pytest.mark.parametrize("content", [
    lines(*RECORDS), b"\xef\xbb\xbf" + lines(*RECORDS).replace(b"\n", b"\r\n\r\n").rstrip(),
    gzip.compress(lines(*RECORDS)),
    gzip.compress(lines(*RECORDS[:3])) + gzip.compress(lines(*RECORDS[3:])), json.dumps(RECORDS).encode(),
    json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    b"\xef\xbb\xbf \n" + json.dumps(RECORDS).encode() + b"\n ",
    gzip.compress(json.dumps(RECORDS).encode())], ids=range(8))
def test_forms_of_a_file(content, tmp_path):
    """Lines or one list, compressed in one piece or several or not, BOM, CRLF, blank lines, no final newline."""
    with opened(write(tmp_path / "x", content), Notes()) as (found, _):
        assert [record for _, record in found] == RECORDS


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_a_list_is_read_in_pieces(step, tmp_path):
    """However few bytes come at a time: the same items, each with the line that it begins in."""
    class Slow:
        def __init__(self, data):
            self.data, self.at = data, 0

        def read(self, size):
            self.at += step
            return self.data[self.at - step:self.at]

    text = json.dumps(RECORDS, indent=2, ensure_ascii=False)
    found = [*items_in(Slow(text.encode()), "x.json")]
    assert [record for _, record in found] == RECORDS
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"]
    assert [where for where, _ in found] == [f"x.json:{number}" for number in starts]


@pytest.mark.parametrize("content, words", [
    (b'[{"prompt": "a"}, {"prompt": b}]', ":1: not JSON: Expecting value in item 2, character 12 of it"),
    (b'[{"prompt": "a"},\n\n {"prompt": "b"},\n {"x" 1}]', ":4: not JSON: Expecting ':' delimiter in item 3"),
    (b'[{"prompt": "a"},\n 3]', ":2: expected an object, found int"), (b"[[]]", ":1: expected an object, found list"),
    (b'[{"prompt": "a"}', ":1: the list is cut short behind item 1"),
    (b'[{"prompt": "a"},', ":1: not JSON: Expecting value"),
    (b'[{"prompt": "a"},\n{"prompt": "b', ":2: not JSON: Unterminated string"),
    (b'[{"prompt": "a"} {"prompt": "b"}]', ":1: expected , or ] behind item 1, found '{'"),
    (b'[{"prompt": "a"}]\n{"prompt": "b"}', ":2: the list ends, and more follows"), (b"[]", ": holds no records"),
    (b'[{"a": "b"},\n{"c": "caf\xe9"}]', ":2: not UTF-8 at byte 23 of the file"),
    (b"[" * 100000, ":1: not JSON: maximum recursion"),
    (b'{"prompt": "a"}\n{"prompt": b}\n', ":2: not JSON: Expecting value"),
    (b'{"prompt": "a"}\n[1]\n', ":2: expected an object"),
    (b'{"prompt": "caf\xe9"}\n', ":1: not UTF-8 at byte 15 of the line"), (b"", ": holds no records"),
    (b"\n \n", ": holds no records"),
    (b'{"a": "b"}\n', ":1: 'prompt' is missing; the record has: 'a'"),
    (lines({"prompt": 3}), ":1: 'prompt' must be a string, found int"),
    (b"PAR1\x15\x04", ": the file looks like Parquet: python -c \"import pandas"),
    (b"chosen,rejected\na,b\n", ": the file looks like CSV: python -c"),
    (b"chosen\trejected\na\tb\n", "delimiter='\\t'"),
    (b"version https:" + b"//git-lfs.example/spec/v1\n", ": the file looks like a Git LFS pointer: git lfs pull"),
    (b"<!DOCTYPE html>\n", "a web page"), (bz2.compress(b"x"), "bzip2"), (b"PK\3\4x", "a zip archive"),
    ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"), (b'{\n"prompt": "a"\n}\n', "objects over several lines"),
    (gzip.compress(b"chosen,rejected\na,b\n"), "unpack it first: gzip -d"),
    (gzip.compress(b"PAR1"), "unpack it first: gzip -d"),
    (gzip.compress(lines(*RECORDS))[:-30], "compressed, and damaged or cut short"),
    (b"\x1f\x8b" + b"x" * 100, "compressed, and damaged or cut short"),
    (gzip.compress(lines(*RECORDS)).replace(gzip.compress(lines(*RECORDS))[20:40], b"\0" * 20), "damaged or cut short"),
], ids=range(33))
def test_files_that_hold_no_records(content, words, tmp_path, refused):
    """One line: file and line, the reason, the way out; nothing is left behind."""
    path = write(tmp_path / "x.jsonl", content)
    before = tree(tmp_path)
    error = refused(made, tmp_path / "data", path, name="jsonl")
    assert str(path) + words in error or str(path) in error and words in error
    assert tree(tmp_path) == before


def test_a_file_named_gz_that_is_none(tmp_path, capsys):
    """It is read, and told."""
    made(tmp_path / "data", write(tmp_path / "x.jsonl.gz", lines(*map(hh, range(30)))), val_share=0.5)
    assert "| a file named .gz that is none | read as it is | 1 | " in capsys.readouterr().out


def test_texts_with_nul_and_lone_surrogates(tmp_path, capsys):
    """NUL stays, a lone surrogate becomes U+FFFD, and both are counted."""
    rows = [{"prompt": f"P{n}\0", "completion": " a\ud800"} for n in range(30)]
    rows += [{"prompt": "\\u0000", "completion": " b"}]  # a backslash and letters
    files = made(tmp_path / "data", write(tmp_path / "x.jsonl", lines(*rows)), name="jsonl", val_share=0.5)
    texts = [r["completion"] for name in ("sft.train.jsonl", "sft.val.jsonl") for r in files[name]]
    assert sorted(texts) == [" a\ufffd"] * 30 + [" b"] and any("\0" in r["prompt"] for r in files["sft.train.jsonl"])
    said = capsys.readouterr().out
    assert "| a row with a lone surrogate in a text | made U+FFFD | 30 |" in said
    assert "| a row with NUL in a text | kept | 30 |" in said


def test_several_files_of_several_forms(tmp_path):
    """Named one by one, in any order: a list, lines and compressed lines make the folder that one file makes."""
    rows = [{"instruction": f"Do {n}.", "input": "", "output": "Done."} for n in range(60)]
    a, b, c = (write(tmp_path / name, content) for name, content in (
        ("a.json", json.dumps(rows[:20]).encode()), ("b.jsonl", lines(*rows[20:40])),
        ("c.json.gz", gzip.compress(lines(*rows[40:])))))
    several = made(tmp_path / "several", c, a, b, name="alpaca")
    assert several == made(tmp_path / "one", write(tmp_path / "all.jsonl", lines(*rows)), name="alpaca")


def test_jsonl_by_its_own_column_names(tmp_path):
    """The names of the columns stand in README.md's command."""
    rows = [{"q": f"Q{n}?", "good": " yes", "bad": " no", "topic": "ab"[n % 2]} for n in range(40)]
    path = write(tmp_path / "x.jsonl", lines(*rows))
    files = made(tmp_path / "data", path, name="jsonl", val_share=0.5, prompt_key="q", chosen_key="good",
                 rejected_key="bad",
                 kind_key="topic")
    record = files["preferences.val.jsonl"][0]
    assert record | {"kind": "a"} == {"prompt": record["prompt"], "chosen": " yes", "rejected": " no", "kind": "a"}
    assert not any(name.startswith("sft") for name in files)
    readme = (tmp_path / "data" / "README.md").read_text("utf-8")
    assert "--prompt_key q --chosen_key good --rejected_key bad --kind_key topic" in readme


def test_imdb_s_folder(tmp_path):
    """Texts in folders by kind, films in a list beside them: every review once, films disjoint, pairs of both kinds."""
    rng = random.Random(0)
    for part in ("train", "test"):
        for kind, ratings in (("pos", (7, 10)), ("neg", (1, 4))):
            films = [f"tt{part}{rng.randrange(20)}" for _ in range(30)]
            write(tmp_path / f"aclImdb/{part}/urls_{kind}.txt",
                  "".join(f"host/title/{f}/usercomments\n" for f in films).encode())
            for n in range(30):
                text = f"{part} {kind} " + " ".join("".join(rng.choices("abcdefg", k=4)) for _ in range(20))
                write(tmp_path / f"aclImdb/{part}/{kind}/{n}_{rng.randint(*ratings)}.txt", text.encode())
    write(tmp_path / "aclImdb/README", b"x")
    files = made(tmp_path / "data", tmp_path / "aclImdb", name="imdb")
    assert [len(files[f"sft.{part}.jsonl"]) for part in ("train", "val")] == [60, 60]
    assert [len(files[f"preferences.{part}.jsonl"]) for part in ("train", "val")] == [30, 30]
    for r in files["preferences.val.jsonl"]:
        assert r["chosen"].startswith("test pos ") and r["rejected"].startswith("test neg ") and r["margin"] >= 3
    readme = (tmp_path / "data" / "README.md").read_text("utf-8")
    assert "120 files | " in readme and "(of their SHA-256s)" in readme
    mixed = made(tmp_path / "mixed", tmp_path / "aclImdb", name="imdb", val_share=0.2)
    assert mixed["sft.val.jsonl"] and len(mixed["sft.train.jsonl"]) < 100  # films of held-out pairs are left out


ROWS = {  # with a # that becomes a number
    "hh-rlhf": {"chosen": "\n\nHuman: Q#\n\nAssistant: A", "rejected": "\n\nHuman: Q#\n\nAssistant: B"},
    "summarize-from-feedback": {"info": {"id": "#", "subreddit": "r", "title": "t", "post": "P#"}, "choice": 0,
                                "summaries": [{"text": " A"}, {"text": " B"}], "extra": {"confidence": 1}},
    "shp": {"post_id": "#", "history": "Q#", "human_ref_A": "A", "human_ref_B": "B", "labels": 1, "score_ratio": 2.0},
    "helpsteer2": {"prompt": "Q#", "response": "A", "helpfulness": 3},
    "alpaca": {"instruction": "Q#", "input": "", "output": "x"},
    "sharegpt": {"id": "#_0", "conversations": [{"from": "human", "value": "Q#"}, {"from": "gpt", "value": "Yes"}]},
    "ultrafeedback": {"prompt": "Q#", "chosen": [{"role": "user", "content": "Q#"},
                                                 {"role": "assistant", "content": "A"}],
                      "rejected": [{"role": "user", "content": "Q#"}, {"role": "assistant", "content": "B"}],
                      "score_chosen": 2,
                      "score_rejected": 1},
    "pku-saferlhf": {"prompt": "Q#", "response_0": "A", "response_1": "B", "better_response_id": 0,
                     "safer_response_id": 1},
    "jsonl": {"prompt": "Q#", "chosen": " A", "rejected": " B", "kind": "k"}}
ODD = [None, True, 0, -1, 7, 10 ** 400, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud800", "x" * 999,
       "\n\nHuman: a\n\nAssistant: b",
       "\n\nAssistant: ", "<br />&amp;amp;", [], [None], [[]], {}, {"a": 1},
       [{"role": "user"}], [{"from": "human", "value": None}], [{"role": "user", "content": "x"}] * 2]


def spoil(value, rng):
    """The value with one place in it, however deep, replaced by something odd, left out or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        key = rng.choice([*(value if isinstance(value, dict) else range(len(value)))])
        if rng.random() < 0.1:
            return value + value if isinstance(value, list) else {k: v for k, v in value.items() if k != key}
        changed = value.copy()
        changed[key] = spoil(value[key], rng)
        return changed
    return rng.choice(ODD)


@pytest.mark.parametrize("name", ROWS)
def test_spoiled_rows_and_files(name, tmp_path, capsys, monkeypatch):
    """Odd values anywhere in a row, and bytes of a file that are changed, cut or doubled, as lines, list or gzip: the
    folder is made, or one line is said and nothing is there."""
    rng, ended = random.Random(name), {0: 0, 2: 0}
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for n in range(30):
        rows = [json.loads(json.dumps(ROWS[name]).replace("#", str(i))) for i in range(9)]
        rows[rng.randrange(9)] = spoil(rows[0], rng)
        content = lines(*rows) if n % 3 else json.dumps(rows).encode()
        content = gzip.compress(content) if n % 5 == 0 else content
        if n % 4 == 0:
            at = rng.randrange(len(content))
            content = content[:at] + rng.choice([b"", b"\xff", b"\n", b'"', b"}", content[at:]]) + content[at + 1:]
        path = write(tmp_path / f"{n}.jsonl", content)
        before = tree(tmp_path)
        try:
            main([name, "--source", str(path), "--data_dir", str(tmp_path / "data"), "--val_share", "0.5"])
            ended[0] += 1
            assert load(tmp_path / "data")
            prepare.shutil.rmtree(tmp_path / "data")
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            ended[2] += 1
        assert tree(tmp_path) == before
    assert min(ended.values()) > 1


# ---- refusals, and what a killed process leaves


@pytest.mark.parametrize("argv, words", [
    ([], "--source nowhere: no such file"), (["--val_share", "0"], "--val_share 0: must be greater than 0"),
    (["--val_share", "1"], "--val_share 1: must be"), (["--val_share", "nan"], "--val_share nan: must be"),
    (["--max_rows", "-1"], "--max_rows -1: must be at least 0")])
def test_values_that_are_refused(argv, words, tmp_path, refused):
    assert words in refused(main, ["hh-rlhf", "--source", "nowhere", "--data_dir", str(tmp_path / "x"), *argv])
    assert not tree(tmp_path)


def test_sources_that_are_refused(tmp_path, refused):
    """A pipe; a folder without files of the set, where Parquet is named with the way; the data folder's own place."""
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe or device" in refused(made, tmp_path / "data", tmp_path / "pipe")
    write(tmp_path / "u" / "train-0.parquet", b"PAR1")
    error = refused(made, tmp_path / "data", tmp_path / "u")
    assert "no file of this set is in it (files: 1 .parquet); Parquet: python -c" in error
    assert f"{tmp_path / 'u' / 'train-0.parquet'} " in error
    (tmp_path / "empty").mkdir()
    assert "no file of this set is in it, nor any other" in refused(made, tmp_path / "data", tmp_path / "empty")
    path = write(tmp_path / "hh" / "x.jsonl", lines(*map(hh, range(30))))
    assert f"lies in --source {tmp_path / 'hh'}, whose files" in refused(made, tmp_path / "hh" / "data",
                                                                         tmp_path / "hh")
    argv = ["hh-rlhf", "--source", str(path), "--data_dir", str(path.parent), "--overwrite"]
    assert f"--source {path}: lies in --data_dir {path.parent}, which is replaced" in refused(main, argv)
    write(tmp_path / "other" / "thesis.txt", b"mine")
    argv[4] = str(tmp_path / "other")
    assert "holds thesis.txt, which is not prepare's to replace" in refused(main, argv)


def test_nothing_left_is_an_error(tmp_path, refused):
    """Every row left out: why, how often and where first."""
    path = write(tmp_path / "x.jsonl", lines(hh(1, "A", "A"), hh(2, "", "A"), hh(3, "B", "B")))
    before = tree(tmp_path)
    error = refused(made, tmp_path / "new" / "data", path)
    assert "of 3 rows no record for training is left: both answers are the same (2 times, first " in error
    assert f"{path}:1); an empty answer (1 times, first {path}:2)" in error
    assert tree(tmp_path) == before


def test_a_folder_is_replaced_on_request_only(source, tmp_path, refused):
    """As with the default data: never one with a file that is not prepare's; files that the new set lacks are gone."""
    made(tmp_path / "data", source)
    before = tree(tmp_path)
    assert "pass --overwrite to replace it" in refused(made, tmp_path / "data", source)
    assert tree(tmp_path) == before
    path = write(tmp_path / "x.json", json.dumps([{"instruction": f"Do {n}.",
                                                   "output": "x"} for n in range(60)]).encode())
    main(["alpaca", "--source", str(path), "--data_dir", str(tmp_path / "data"), "--overwrite"])
    assert load(tmp_path / "data").keys() == {f"{stem}.{part}.jsonl" for stem in ("sft",
                                                                                  "prompts") for part in ("train",
                                                                                                          "val")}


class Killed(BaseException):
    """The process ends here, and nothing that would still be done is done."""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(overwrite, tmp_path, monkeypatch):
    """At each line that is written and each rename, with and without an old folder: the folder is the old one, the new
    one or not there, and the next command makes it and clears away what was left."""
    source, folder = write(tmp_path / "x.jsonl", lines(*map(hh, range(3)))), tmp_path / "place" / "data"
    argv = ["hh-rlhf", "--source", str(source), "--val_share", "0.5", "--data_dir", str(folder)]
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    main(argv)
    whole, old, ended = load(folder), {"sft.train.jsonl": [{"prompt": "old"}]}, False
    for moment in range(100):
        prepare.shutil.rmtree(folder)
        if overwrite:
            write(folder / "sft.train.jsonl", lines({"prompt": "old"}))
        calls = []

        def counted(real):
            def call(*arguments):
                result = None
                for after in range(2):
                    if len(calls) == moment:
                        raise Killed
                    calls.append(arguments)
                    result = result if after else real(*arguments)
                return result
            return call

        with monkeypatch.context() as m:
            m.setattr(prepare.tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
            m.setattr(os, "replace", counted(os.replace))
            m.setattr(os, "pread", counted(os.pread))
            try:
                main(argv + ["--overwrite"] * overwrite)
                ended = True
            except Killed:
                pass
        assert load(folder) in ([whole, old] if folder.exists() and overwrite else [whole] if folder.exists() else [{}])
        for left in folder.parent.glob(".data.*"):
            os.utime(left, (0, 0))
        main([*argv, "--overwrite"])
        assert load(folder) == whole and [path.name for path in folder.parent.iterdir()] == ["data"]
        if ended:
            break
    assert ended and moment > 15


def test_the_folder_of_a_process_at_work_is_left_alone(tmp_path):
    """Whatever its age: it is locked, if not in its first moment. One that holds something else is not prepare's."""
    busy, foreign, dead, young = (tmp_path / f".data.{name}" for name in "busy0000 foreign0 dead0000 young000".split())
    for folder in (busy, foreign, dead, young):
        write(folder / "data" / "sft.train.jsonl", b"half")
    write(foreign / "thesis.txt", b"mine")
    for folder in (busy, foreign, dead):
        os.utime(folder, (0, 0))
    with prepare.locked(busy):
        prepare.remove_stale(tmp_path / "data")
    assert {*tmp_path.iterdir()} == {busy, foreign, young}
    prepare.remove_stale(tmp_path / "data")
    assert {*tmp_path.iterdir()} == {foreign, young}


@pytest.mark.slow
def test_kill_9(tmp_path):
    """A real signal at random moments: the folder is whole or not there, and the last run succeeds."""
    rows = [hh(n, "Yes. " * 50) for n in range(4000)]
    source = write(tmp_path / "x.jsonl", lines(*rows))
    argv = ["minirlhf.prepare", "hh-rlhf", "--source", source, "--data_dir", tmp_path / "data", "--overwrite"]
    began = time.monotonic()
    assert Command(*argv, cwd=tmp_path).wait()[0] == 0
    whole, seconds, rng = load(tmp_path / "data"), time.monotonic() - began, random.Random(0)
    for _ in range(8):
        process = Command(*argv, cwd=tmp_path)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "data").exists() or load(tmp_path / "data") == whole
    assert Command(*argv, cwd=tmp_path).wait()[0] == 0 and load(tmp_path / "data") == whole


# ---- as large as they are


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """Eighty times as long texts in as many rows take little more memory, also in one list."""
    def peak(name, length, as_list):
        rows = [hh(n, answer="x" * length) for n in range(80)]
        path = write(tmp_path / name, json.dumps(rows).encode() if as_list else lines(*rows))
        del rows
        tracemalloc.start()
        main(["hh-rlhf", "--source", str(path), "--data_dir", str(tmp_path / f"{name}.data")])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak("warm", 10, False)
    for as_list in (False, True):
        few, many = peak(f"few{as_list}", 1000, as_list), peak(f"many{as_list}", 80000, as_list)
        assert many < few + 3e6, (few, many)  # of 6 MB of texts


def test_progress_is_told(source, tmp_path, capsys, monkeypatch):
    """A line now and then: the share of what is to be read, the time used and left."""
    path = write(tmp_path / "x.jsonl", lines(*(hh(n) for n in range(2000))))
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    made(tmp_path / "data", path)
    told = [line for line in capsys.readouterr().out.splitlines() if "% of 0 MB" in line]
    assert len(told) > 1 and all("<" in line for line in told)
    shares = [int(line.split("%")[0]) for line in told]
    assert shares == sorted(shares) and shares[-1] <= 100
