"""Records in, batches out: every form that is accepted, every fault that is named, masks and orders by hand."""
import bz2
import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from minirlhf import data
from minirlhf.data import (Demonstration, Order, Preference, Row, blank_ends, collate, doubtful_columns, encode_prompts,
                           encode_row, endless_batch, label_of, labels_of, load_demonstrations, load_preferences,
                           load_prompts, number, shared_prompt, trim_left)
from minirlhf.tokenizer import EOS, Tokenizer


@pytest.fixture
def write(tmp_path):
    """write(record or text or bytes, ...) -> the path of a file with one a line."""
    def make(*lines):
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps(line) if isinstance(line, (dict, list)) else line for line in lines]
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return str(path)
    return make


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes alone: an id is a byte, eos is 256."""
    return Tokenizer.train([], 257)


def says(role, content):
    return {"role": role, "content": content}


TALK = [says("system", "Be kind."), says("user", "Hi"), says("assistant", "Hello"), says("user", "Bye")]
TALK_TEXT = "Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye"
GOOD, BAD = says("assistant", "See you!"), says("assistant", "Go.")


# Forms that are accepted


@pytest.mark.parametrize("record, prompt, completion", [
    ({"prompt": "A b", "completion": " c"}, "A b", " c"),
    ({"prompt": "", "completion": ""}, "", ""),
    ({"text": "A b c"}, "", "A b c"),
    ({"prompt": "A", "completion": "b", "text": "ignored"}, "A", "b"),
    ({"messages": TALK + [GOOD]}, TALK_TEXT + "\n\nAssistant:", " See you!"),
    ({"messages": [says("user", "Hi"), says("assistant", "")]}, "\n\nHuman: Hi\n\nAssistant:", " "),
    ({"messages": TALK, "completion": "See you!"}, TALK_TEXT + "\n\nAssistant:", " See you!"),
    ({"messages": TALK, "completion": [GOOD]}, TALK_TEXT + "\n\nAssistant:", " See you!"),
    ({"prompt": TALK, "completion": [GOOD]}, TALK_TEXT + "\n\nAssistant:", " See you!"),
    ({"prompt": "Bye", "completion": [GOOD]}, "\n\nHuman: Bye\n\nAssistant:", " See you!"),
    ({"prompt": "Bye", "completion": TALK + [GOOD]}, TALK_TEXT + "\n\nAssistant:", " See you!"),  # the question once
    ({"prompt": "Bye", "messages": TALK + [GOOD], "completion": "See you!"}, TALK_TEXT + "\n\nAssistant:", " See you!"),
    ({"prompt": "Name a tree.", "completion": "Name a tree. Oak."}, "Name a tree.", " Oak."),
    ({"prompt": "Hello", "completion": "Hello! There."}, "Hello", "Hello! There."),  # an answer, by chance alike
    # null is absent, and an empty text loses nothing
    ({"messages": None, "prompt": "A", "completion": "b", "n": None}, "A", "b"),
    ({"prompt": None, "completion": None, "messages": None, "text": "A"}, "", "A"),
    ({"prompt": "", "text": "A"}, "", "A"),
])
def test_demonstrations(write, record, prompt, completion):
    """{"prompt", "completion"}, {"text"}, {"messages"}: a prompt ends with the role whose turn it is."""
    assert load_demonstrations(write(record)) == [Demonstration(prompt, completion)]


@pytest.mark.parametrize("record, prompt, completions", [
    ({"prompt": "P", "chosen": " good", "rejected": " bad"}, "P", [" good", " bad"]),
    ({"prompt": "P", "completions": [" a", " b", " c"]}, "P", [" a", " b", " c"]),
    # without a prompt: what the texts share, up to a whole word
    ({"chosen": "A film that is good", "rejected": "A film that gets bad"}, "A film that", [" is good", " gets bad"]),
    ({"chosen": "A film", "rejected": "A fish"}, "A", [" film", " fish"]),
    ({"chosen": "One", "rejected": "Two"}, "", ["One", "Two"]),
    ({"chosen": "A film is on", "rejected": "A film"}, "A", [" film is on", " film"]),  # neither answer is empty
    ({"completions": ["A b c", "A b d", "A b"]}, "A", [" b c", " b d", " b"]),
    # up to the last turn that they share
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: I do", "rejected": "\n\nHuman: Hi\n\nAssistant: I did"},
     "\n\nHuman: Hi\n\nAssistant:", [" I do", " I did"]),
    ({"chosen": TALK + [GOOD], "rejected": TALK + [BAD]}, TALK_TEXT + "\n\nAssistant:", [" See you!", " Go."]),
    ({"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]}, TALK_TEXT + "\n\nAssistant:", [" See you!", " Go."]),
    # a string beside messages is the user's turn, unless it has its roles
    ({"prompt": "Bye", "chosen": [GOOD], "rejected": [BAD]}, "\n\nHuman: Bye\n\nAssistant:", [" See you!", " Go."]),
    ({"prompt": "\n\nHuman: Bye", "chosen": [GOOD], "rejected": [BAD]}, "\n\nHuman: Bye\n\nAssistant:",
     [" See you!", " Go."]),
    ({"prompt": None, "chosen": "A b", "rejected": "A c", "completions": None}, "A", [" b", " c"]),
    ({"messages": TALK, "completions": ["a", " b"]}, TALK_TEXT + "\n\nAssistant:", [" a", " b"]),
    ({"prompt": TALK[1:2], "chosen": "Hi there", "rejected": "Hi you"}, "\n\nHuman: Hi\n\nAssistant:",
     [" there", " you"]),
    ({"prompt": "Hello", "chosen": "Hello! You", "rejected": "Hello."}, "Hello", ["Hello! You", "Hello."]),  # by chance
])
def test_preferences(write, record, prompt, completions):
    """Pairs and rankings, texts and messages, with a prompt or with what the texts share as one."""
    (row,) = load_preferences(write(record))
    assert (row.prompt, row.completions, row.scores) == (prompt, completions, None)


WHOLE = {"chosen": TALK + [GOOD], "rejected": TALK + [BAD]}
SPOKEN = {"chosen": TALK_TEXT + "\n\nAssistant: See you!", "rejected": TALK_TEXT + "\n\nAssistant: Go."}


@pytest.mark.parametrize("record", [
    {"prompt": "Bye", **WHOLE, "score_chosen": 8.5},  # UltraFeedback: the last question, or the first
    {"prompt": "Hi ", **WHOLE},
    {"prompt": "Bye", "messages": TALK + [GOOD], **WHOLE},
    {"prompt": TALK, **WHOLE},
    {"prompt": TALK[1:], **WHOLE},  # without the system's words, which the answers have
    {"prompt": TALK_TEXT, **WHOLE},
    {"prompt": None, "messages": TALK, **WHOLE},
    {"messages": TALK + [GOOD], **WHOLE},
    {"messages": TALK, "chosen": [GOOD], "rejected": [BAD]},
    {"messages": TALK, "chosen": "See you!", "rejected": " Go."},
    {"prompt": TALK, **SPOKEN},
    {"prompt": "Bye", **SPOKEN},
    {"prompt": TALK_TEXT + "\n\nAssistant:", **SPOKEN},
    {"prompt": TALK_TEXT + "\n\nAssistant:", "question": "Bye", "system": "Be kind.", **SPOKEN},  # nothing is lost
    {"prompt": "Bye", "question": "", "input": None, "history": [], **WHOLE},
    {"prompt": "Bye", "completions": [*SPOKEN.values()], "chosen": "See you!"},
], ids=range(16))
def test_a_question_that_stands_twice_is_read_once(write, record):
    """In `prompt` or `messages`, and again in whole conversations, as messages or text: one question, two answers."""
    (row,) = load_preferences(write(record))
    assert (row.prompt, row.completions) == (TALK_TEXT + "\n\nAssistant:", [" See you!", " Go."])


WORD = re.compile("[a-h]{8}")


def words_of(value):
    return set(WORD.findall(json.dumps(value)))


def random_record(rng):
    """-> a record of made-up words of 8 letters, each in one message or more, and its answers' columns."""
    def words():
        return " ".join("".join(rng.choices("abcdefgh", k=8)) for _ in range(rng.randint(1, 4)))

    def spoken(talk):
        return "".join({"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}[m["role"]] + m["content"]
                       for m in talk)

    talk = [says("system", words())] * rng.randint(0, 1)
    for _ in range(rng.randint(0, 2)):
        talk += [says("user", words()), says("assistant", words())]
    talk += [says("user", words())]
    other = [says("user", words())]
    answers = [says("assistant", words()) for _ in range(2)]
    form = rng.choice([lambda a: a["content"], lambda a: " " + a["content"], lambda a: [a], lambda a: talk + [a],
                       lambda a: spoken(talk + [a]), lambda a: talk[-1]["content"] + " " + a["content"]])
    values = [*map(form, answers)]
    record = rng.choice([dict(zip(("chosen", "rejected"), values)), {"completion": values[0]}, {"completions": values}])
    names = (*record,)
    asked = [talk, talk[-1:], talk[-1]["content"], talk[0]["content"], spoken(talk), spoken(talk) + "\n\nAssistant:",
             None, "", other[0]["content"], other]
    for name in ("prompt", "messages", "Question", "system", "history"):
        if rng.random() < (0.8 if name == "prompt" else 0.25):
            record[name] = rng.choice(asked + [talk + answers[:1]])
    if rng.random() < 0.2:
        record["text"] = rng.choice([words(), spoken(talk)])
    return {name: record[name] for name in rng.sample([*record], len(record))}, names


def test_no_text_is_lost_or_doubled(tmp_path):
    """Random records in all forms, right and wrong: each is refused in one line, or all its words are read, but for a
    `text` beside a prompt, and none stands twice in a prompt and its answer."""
    rng, read, path = random.Random(0), Counter(), tmp_path / "x.jsonl"
    for _ in range(1500):
        record, names = random_record(rng)
        path.write_text(json.dumps(record))
        for load in (load_demonstrations, load_preferences):
            try:
                (row,) = load(path)
            except SystemExit as stop:
                assert stop.code == 2
                read[load, "refused"] += 1
                continue
            read[load, "read"] += 1
            prompt, answers = row.prompt, [row.completion] if load is load_demonstrations else row.completions
            others = ("text", *names) if load is load_demonstrations and names != ("completion",) else ("text",)
            held = {name: value for name, value in record.items() if name not in others}
            assert words_of(held) <= words_of([prompt, *answers]), record
            assert all(Counter(WORD.findall(prompt + a)).most_common(1)[0][1] == 1 for a in answers), record
    assert min(read.values()) > 250, read


@pytest.mark.parametrize("record, prompt", [
    ({"prompt": "A b"}, "A b"),
    ({"prompt": ""}, ""),
    ({"messages": TALK}, TALK_TEXT + "\n\nAssistant:"),
    ({"prompt": TALK}, TALK_TEXT + "\n\nAssistant:"),
    ({"prompt": None, "messages": TALK}, TALK_TEXT + "\n\nAssistant:"),
    ({"prompt": "A", "messages": TALK}, "A"),  # a good prompt is not overruled
    ({"prompt": "A", "messages": None, "system": "", "completion": "b", "label": False}, "A"),
])
def test_prompts(write, record, prompt):
    """{"prompt"} as text or messages, {"messages"}."""
    assert load_prompts(write(record)) == [prompt]


def test_scores_of_a_ranking(write):
    """They fall or stay, and say who is tied; whole numbers and fractions."""
    (row,) = load_preferences(write({"prompt": "P", "completions": ["a", "b", "c"], "scores": [2, 0.5, 0.5]}))
    assert row.scores == [2, 0.5, 0.5] and row.pairs() == [(0, 1), (0, 2)]


def test_other_columns_are_kept(write):
    """What the loader does not know stays beside the row."""
    assert load_demonstrations(write({"text": "a", "kind": "x", "n": 2}))[0].extra == {"kind": "x", "n": 2}
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5}
    assert load_preferences(write(record))[0].extra == {"margin": 1.5}


def test_pairs_by_hand():
    """K texts, best first, give K(K-1)/2 pairs; ties and equal texts teach nothing."""
    assert Preference("", ["a", "b", "c"]).pairs() == [(0, 1), (0, 2), (1, 2)]
    assert Preference("", ["a", "b", "c"], [2, 1, 1]).pairs() == [(0, 1), (0, 2)]
    assert Preference("", ["a", "b", "a"]).pairs() == [(0, 1), (1, 2)]
    assert Preference("", ["a", "a"]).pairs() == Preference("", ["a", "b"], [0.5, 0.5]).pairs() == []


@pytest.mark.parametrize("content", [
    b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n',  # a byte order mark
    b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
    b'\n\n{"prompt": "a"}\n  \n\t{"prompt": "b"}  \n\n',
    b'{"prompt": "a"}\n{"prompt": "b"}',  # no final newline
])
def test_forms_of_lines(tmp_path, content):
    """BOM, CRLF, blank lines and a missing last newline change nothing."""
    (tmp_path / "x.jsonl").write_bytes(content)
    assert load_prompts(tmp_path / "x.jsonl") == ["a", "b"]


def test_odd_characters(write, tokenizer):
    """Emoji, NUL and line separators survive; a pair of escaped surrogates is its character, a lone one U+FFFD."""
    path = write('{"prompt": "\U0001f600 \\u0000 \u2028 \\ud83d\\ude00 \\ud83d!"}')
    assert load_prompts(path) == ["\U0001f600 \0 \u2028 \U0001f600 \ufffd!"]
    path = write('{"prompt": "\\udc00", "completion": "\\ud83dx"}')
    assert load_demonstrations(path) == [Demonstration("\ufffd", "\ufffdx")]
    (row,) = load_preferences(write('{"prompt": "", "completions": ["a\\udc00", "b"]}'))
    assert row.completions == ["a\ufffd", "b"]
    (prompt,) = load_prompts(write({"messages": [says("user", "\ud83d")]}))
    assert "\ufffd" in prompt and tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_the_end_of_text_marker_is_text(write, tokenizer):
    """A record that holds it has the one eos at its start and the one at its end."""
    (row,) = load_demonstrations(write({"prompt": f"a{EOS}", "completion": f"{EOS}b"}))
    ids = encode_row(tokenizer, row.prompt, row.completion, 64, "drop").ids
    assert ids == [256, *f"a{EOS}{EOS}b".encode(), 256]


# Faults


@pytest.mark.parametrize("line, words", [
    ("{'prompt': 1}", ["not JSON", "property name"]),
    ('{"prompt": "a"', ["not JSON"]),
    ('{"prompt": "a"} {"prompt": "b"}', ["not JSON", "Extra data"]),
    ("[" * 100_000, ["not JSON"]),
    ('{"n": ' + "9" * 5000 + "}", ["not JSON"]),
    ('["a"]', ["expected an object", "list"]),
    ('"a"', ["expected an object", "str"]),
    ("null", ["expected an object", "NoneType"]),
    ("3", ["expected an object", "int"]),
    (b'{"prompt": "caf\xe9"}', ["not UTF-8", "byte 15"]),
    (b"\xff\xfe{\x00", ["not UTF-8", "byte 0"]),
], ids=range(11))
def test_lines_that_are_no_record(write, refused, line, words):
    """Exit 2 with file:line and the parser's reason; blank lines count."""
    fine = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    path = write(fine, "", line, fine)
    for load in (load_demonstrations, load_preferences, load_prompts):
        error = refused(load, path)
        assert f"{path}:3: " in error and all(word in error for word in words)


@pytest.mark.parametrize("load, record, words", [
    (load_prompts, {"text": "a", "kind": "b"}, ["'prompt' is missing", "'text', 'kind'"]),
    (load_prompts, {}, ["'prompt' is missing", "nothing"]),
    (load_prompts, {"prompt": None}, ["'prompt' must be a string, found NoneType"]),
    (load_prompts, {"prompt": 3}, ["'prompt' must be a string, found int"]),
    (load_prompts, {"prompt": []}, ["'prompt' must be a list of messages that is not empty"]),
    (load_prompts, {"messages": "a"}, ["'messages' must be a list of messages"]),
    (load_prompts, {"messages": ["a"]}, ["'messages'", "'role'", "'content'"]),
    (load_prompts, {"messages": [{"role": "user"}]}, ["'messages'", "'content'"]),
    (load_prompts, {"messages": [says("user", None)]}, ["'messages'", "'content'"]),
    (load_prompts, {"messages": [{"content": "a"}]}, ["role", "None"]),
    (load_prompts, {"messages": [says("robot", "a")]}, ["role", "'robot'"]),
    (load_demonstrations, {"prompt": "a"}, ["'completion' is missing", "'prompt'"]),
    (load_demonstrations, {"completion": "a"}, ["'prompt' is missing", "'completion'"]),
    (load_demonstrations, {"prompt": "a", "completion": None}, ["'completion' must be a string, found NoneType"]),
    (load_demonstrations, {"prompt": ["a"], "completion": "b"}, ["'prompt' must be a string, found list"]),
    (load_demonstrations, {"text": 1}, ["'text' must be a string, found int"]),
    (load_demonstrations, {"messages": TALK}, ["must end with the assistant's answer"]),
    (load_demonstrations, {"messages": []}, ["'messages'", "not empty"]),
    (load_preferences, {"prompt": "a", "chosen": "b"}, ["'rejected' is missing", "'prompt', 'chosen'"]),
    (load_preferences, {"prompt": "a", "rejected": "b"}, ["'chosen' is missing"]),
    (load_preferences, {"prompt": "a", "chosen": 1, "rejected": "c"}, ["'chosen' must be a string, found int"]),
    (load_preferences, {"chosen": [], "rejected": []}, ["'chosen' must be a list of messages that is not empty"]),
    (load_preferences, {"prompt": "a", "completions": ["b"]}, ["'completions'", "two or more"]),
    (load_preferences, {"prompt": "a", "completions": ["b", None]}, ["'completions'", "strings"]),
    (load_preferences, {"prompt": "a", "completions": "bc"}, ["'completions' must be a list"]),
    (load_preferences, {"prompt": "a", "completions": ["b", "c"], "scores": [1]}, ["'scores'", "2 numbers"]),
    (load_preferences, {"prompt": "a", "completions": ["b", "c"], "scores": [1, "0"]}, ["'scores'", "numbers"]),
    (load_preferences, {"prompt": "a", "completions": ["b", "c"], "scores": [True, False]}, ["'scores'", "numbers"]),
    (load_preferences, {"prompt": "a", "completions": ["b", "c"], "scores": [1, math.nan]}, ["'scores'", "numbers"]),
    (load_preferences, {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}, ["'scores' must fall", "best"]),
], ids=range(30))
def test_records_that_do_not_fit(write, refused, load, record, words):
    """Exit 2 with file:line, the field and what is there instead."""
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    path = write(good, record, good)
    error = refused(load, path)
    assert f"{path}:2: " in error and all(word in error for word in words)


@pytest.mark.parametrize("load, record, words", [
    (load_preferences, {"question": "Q", "chosen": "b", "rejected": "c"}, ["'question' would be lost", "'question', "]),
    (load_preferences, {"Instruction": "Q", "completions": ["b", "c"]}, ["'Instruction' would be lost"]),
    (load_preferences, {"system": "S", "prompt": "Q", "chosen": "b", "rejected": "c"}, ["'system' would be lost"]),
    (load_preferences, {"input": "Q", "chosen": [GOOD], "rejected": [BAD]}, ["'input'", "name 'input' 'prompt'"]),
    (load_preferences, {"text": "Q", "chosen": "b", "rejected": "c"}, ["'text' would be lost"]),
    (load_preferences, {"prompt": "Q", "messages": TALK, "chosen": "b", "rejected": "c"}, ["'messages' would be lost"]),
    (load_preferences, {"prompt": "Q", **WHOLE}, ["'prompt' is no turn of the conversation"]),
    (load_preferences, {"prompt": "Q", "chosen": [GOOD], "rejected": TALK + [BAD]}, ["follow the same messages"]),
    (load_preferences, {"prompt": "Q", "chosen": [GOOD], "rejected": "b"}, ["strings, or all lists of messages"]),
    (load_preferences, {"messages": TALK + [GOOD], "chosen": "b", "rejected": "c"}, ["'messages' must end before"]),
    (load_preferences, {"prompt": "Q", "completions": ["a", "b"], "chosen": "c"}, ["'chosen' would be lost"]),
    (load_preferences, {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}, ["TRL's stepwise"]),
    (load_preferences, {"prompt": "Q", "completion": "a", "label": True}, ["'chosen' is missing", "TRL's unpaired"]),
    (load_preferences, {"prompt": "Q", "chosen": None, "rejected": "b"}, ["'chosen' must be a string, found NoneType"]),
    (load_demonstrations, {"prompt": "Q", "completion": "a", "label": False}, ["'label'", "TRL's unpaired"]),
    (load_demonstrations, {"prompt": "Q", "completions": ["a"], "labels": [True]}, ["TRL's stepwise"]),
    (load_demonstrations, {"question": "Q", "answer": "A"}, ["'question', 'answer'", "--prompt_key question"]),
    (load_demonstrations, {"instruction": "Q", "input": "", "output": "A"}, ["Alpaca: python -m minirlhf.prepare alpaca"]),
    (load_demonstrations, {"conversations": [{"from": "human", "value": "Hi"}]}, ["ShareGPT: python -m minirlhf.prepare"]),
    (load_demonstrations, {"prompt": "Q", "text": "A"}, ["'prompt' would be lost"]),
    (load_demonstrations, {"text": "Q", "response": "A"}, ["'response' would be lost"]),
    (load_demonstrations, {"system": "S", "messages": TALK + [GOOD]}, ["'system' would be lost"]),
    (load_demonstrations, {"prompt": "Q", "messages": TALK + [GOOD]}, ["'prompt' would be lost"]),
    (load_demonstrations, {"completion": "Q", "messages": TALK + [GOOD]}, ["'completion' would be lost"]),
    (load_demonstrations, {"prompt": "Q", "completion": [GOOD, TALK[1]]}, ["'completion' must end with"]),
    (load_demonstrations, {"prompt": TALK + [GOOD], "completion": "a"}, ["'prompt' must end before"]),
    (load_prompts, {"question": "Q"}, ["'prompt' is missing", "name 'question' 'prompt'"]),
    (load_prompts, {"prompt": "Q", "system": "S"}, ["'system' would be lost"]),
    (load_prompts, {"prompt": None, "Query": "Q"}, ["'prompt' must be a string, found NoneType"]),
    (load_prompts, {str(n): n for n in range(9999)}, ["'prompt' is missing", "'15', ..."]),
], ids=range(30))
def test_dialects_are_refused_by_name(write, refused, load, record, words):
    """Columns of other programs, and texts that would be lost or doubled: file:line, what is there, the way out."""
    error = refused(load, write(record))
    assert "rows.jsonl:1: " in error and all(word in error for word in words) and len(error) < 500


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_files_without_records(tmp_path, refused, content):
    """Empty, or blank lines alone: exit 2 naming the file."""
    (tmp_path / "x.jsonl").write_bytes(content)
    for load in (load_demonstrations, load_preferences, load_prompts):
        assert f"{tmp_path / 'x.jsonl'}: holds no records" in refused(load, tmp_path / "x.jsonl")


def test_files_that_are_none(tmp_path, refused):
    """Missing, a folder, a pipe that nobody writes to (which must not wait), a device without an end."""
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "none.jsonl", "no such file"), (tmp_path / "a\0b", "no such file"),
                        (tmp_path, "a folder; name a file in it"), (tmp_path / "pipe", "a pipe or device"),
                        (Path("/dev/zero"), "a pipe or device")):
        assert f"{path}: {words}".replace("\0", "\\x00") in refused(load_prompts, path)


ROWS = [{"prompt": "caf\u00e9, \u6f22", "completion": " a"}, {"prompt": "b", "completion": " c"}]
LINES = "\n".join(map(json.dumps, ROWS))


LIST, CSV = "one JSON list, not an object a line: ", "CSV: "


@pytest.mark.parametrize("content, kinds", [
    (json.dumps(ROWS), [LIST]),
    ("\n" + json.dumps(ROWS, indent=1, ensure_ascii=False), [LIST]),
    ('prompt,completion\n"caf\u00e9, \u6f22", a\nb, c\n', [CSV]),
    ('"prompt","completion"\r\n"caf\u00e9, \u6f22"," a"\r\n"b"," c"\r\n', [CSV]),
    ("prompt\tcompletion\ncaf\u00e9, \u6f22\t a\nb\t c\n", [CSV]),
    (gzip.compress(LINES.encode()), ["gzip: "]),
    (bz2.compress(LINES.encode()), ["bzip2: "]),
    (LINES.encode("utf-16"), ["UTF-16: "]),
    (LINES.encode("utf-16-le"), ["UTF-16: "]),
    (LINES.encode("utf-16-be"), ["UTF-16: "]),
    (gzip.compress(json.dumps(ROWS).encode("utf-16")), ["gzip: ", "UTF-16: ", LIST]),
], ids=range(11))
def test_the_command_that_is_named_converts_the_file(tmp_path, refused, content, kinds):
    """A file of another kind is named, and the shell command in the message writes one that loads, or, where it was
    wrapped twice, one that is named in its turn."""
    path = tmp_path / "it's mine.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for kind in kinds:
        error = refused(load_demonstrations, path)
        assert f"{path}:{1 + (path.read_bytes()[:1] == bytes([10]))}: " in error
        before, _, command = error.partition(f"; the file looks like {kind}")
        assert before and subprocess.run(command, shell=True).returncode == 0
        path = Path(f"{path}.new")
    assert [(row.prompt, row.completion) for row in load_demonstrations(path)] == [(*r.values(),) for r in ROWS]


def test_parquet_is_named_with_a_command(tmp_path, refused):
    """Messages in Parquet, too, come out as the lists that they are."""
    pandas, rows = pytest.importorskip("pandas"), [{"messages": [says("user", "Hi"), says("assistant", "Ho")]}]
    pytest.importorskip("pyarrow")
    pandas.DataFrame(rows).to_parquet(tmp_path / "x")
    _, _, command = refused(load_demonstrations, tmp_path / "x").partition("; the file looks like Parquet: ")
    surroundings = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    assert subprocess.run(command, shell=True, env=surroundings).returncode == 0
    assert load_demonstrations(tmp_path / "x.new") == [Demonstration("\n\nHuman: Hi\n\nAssistant:", " Ho")]


@pytest.mark.parametrize("content, words", [
    (b"PK\3\4\x14", "a zip archive"), (b"\x28\xb5\x2f\xfd\0", "zstd"), (b"<!DOCTYPE html>\n", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer: git lfs pull"),
    (b'{\n  "prompt": "a"\n}\n', "objects over several lines"),
])
def test_other_kinds_of_files_are_named(tmp_path, refused, content, words):
    """What no short command converts; a fault in a later line is that line's alone."""
    (tmp_path / "x").write_bytes(content)
    assert f"{tmp_path / 'x'}:1: " in (error := refused(load_prompts, tmp_path / "x")) and words in error
    (tmp_path / "x").write_bytes(b'{"prompt": "a"}\n' + content)
    assert f"{tmp_path / 'x'}:2: " in (error := refused(load_prompts, tmp_path / "x")) and "looks like" not in error


def test_repeats_are_counted():
    """Rows twice in training, and rows both trained on and held out, are each counted; none, nothing said."""
    (warning,) = data.repeats(["a", "b", "a", "a"], ["c"], "prompts")
    assert "2 of 4 prompts" in warning
    (warning,) = data.repeats(["a", "b", "c"], ["c", "b", "c", "d"], "prompts")
    assert "2 prompts" in warning
    assert len([*data.repeats(["a", "a"], ["a"], "prompts")]) == 2
    assert not [*data.repeats(["a", "b"], ["c", "c"], "prompts")]


def test_prompts_that_end_in_a_blank_are_counted():
    """Spaces, line ends and no-break spaces; an empty prompt ends in nothing."""
    (line,) = blank_ends(["a", "a ", "b\n", "", "\u00a0", "a b"], "prompts")
    assert "3 of 6 prompts end in a blank" in line
    assert not [*blank_ends(["a", "", "\n\nHuman: b\n\nAssistant:"], "prompts")]


def test_numbers_by_hand():
    """A finite number is one; text, true, NaN, infinities and what overflows are none."""
    assert [number(x) for x in (2, -0.5, 0, 10 ** 20)] == [2, -0.5, 0, 1e20]
    assert {number(x) for x in ("2", True, False, None, math.nan, math.inf, -math.inf, 10 ** 400, [], {})} == {None}


def test_doubtful_columns_are_told():
    """Margins that are no numbers, and text that is not read, each with a count; short names are not text."""
    margins = [1.5, "1.5", math.nan, True, -2, [3]]
    rows = [Preference("", ["a", "b"], None, {"margin": m, "kind": "x", "domains": ["a b", "c"]}) for m in margins]
    (line,) = doubtful_columns(rows, "preferences")
    assert "'margin' is no number in 4 of 6 preferences (as 1.5)" in line
    rows = [Preference("", ["a", "b"], None, {"others_margin": "\n", "ask": "Why is that?", "said": [{"x": "a b c"}]})]
    number_line, text_line = doubtful_columns(rows, "rows")
    assert '\'others_margin\' is no number in 1 of 1 rows (as "\\n")' in number_line
    assert text_line.endswith("are not read: ask (1), said (1)")
    assert not [*doubtful_columns([Preference("", ["a", "b"])], "rows")]


@pytest.mark.parametrize("value, label", [
    ("movie", "movie"), ("Caf\u00e9 au lait", "Caf\u00e9 au lait"), (3, "3"), (True, "true"), (0.5, "0.5"),
    ("all", "kind all"), ("kind all", "kind kind all"), ("all films", "all films"),
    ("a\nb", '"a\\nb"'), ("\x1b[1m", '"\\u001b[1m"'), ("\u202e", '"\\u202e"'), ("", '""'), (" a", '" a"'),
    ("mean, margin > 1", '"mean, margin > 1"'), ("(others)", '"(others)"'), ("\ud800", "\ufffd"),
])
def test_labels_by_hand(value, label):
    """What a table can show stays; the rest is quoted and escaped; the name of the total is not taken."""
    assert label_of(value) == label


def test_labels_are_short_and_differ():
    """One printable line of at most 32 characters whatever the column holds; 3,000 long names with one beginning have
    3,000 labels, of which a table shows the 20 most frequent."""
    deep = json.loads("[" * 900 + "]" * 900)
    names = ["x" * 100 + str(n) for n in range(3000)]
    labels = [label_of(value) for value in [*names, deep, {"a": ["\n"]}, "\0" * 99, 10 ** 400, "\u2028", math.nan]]
    assert len(set(labels)) == len(labels) and all(label.isprintable() and len(label) <= 32 for label in labels)
    rows = [Demonstration("", "", {"kind": name}) for name in names + ["a", "a"]] + [Demonstration("", "")] * 3
    labels = Counter(labels_of(rows, "kind", "none"))
    assert len(labels) == 21 and labels["a"] == 2 and labels["none"] == 3 and labels["(others)"] == 3005 - 2 - 3 - 18
    assert labels_of(rows[-1:] + [Demonstration("", "", {"kind": "pairs"})], "kind", "pairs", ("all", "pairs")) == [
        "pairs", "kind pairs"]


def test_long_texts_take_linear_time(write):
    """Megabytes without a blank, alike in both answers but for the end, are read in a moment."""
    began = time.process_time()
    (row,) = load_preferences(write({"chosen": "a" * 2_000_000 + "b", "rejected": "a" * 2_000_000 + "c"}))
    assert row.prompt == "" and shared_prompt(["a" + "b" * 10 ** 6] * 2) == "" and time.process_time() - began < 5


def test_fingerprint_tells_files_apart(tmp_path):
    """One byte, or the order of the files, changes it; their names and times do not."""
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"x" * 3000), b.write_bytes(b"x" * 2999 + b"y"), c.write_bytes(b"x" * 3000)
    assert data.fingerprint(a, b) == data.fingerprint(c, b) != data.fingerprint(b, a)
    assert data.fingerprint(a) != data.fingerprint(b)


# Ids and masks


def test_encode_row_by_hand(tokenizer):
    """eos "ab" + "cd" eos: encoded apart and joined, the completion begins after three ids."""
    assert encode_row(tokenizer, "ab", "cd", 6, "drop") == Row([256, 97, 98, 99, 100, 256], 3)
    assert encode_row(tokenizer, "", "", 6, "drop") == Row([256, 256], 1)  # an empty completion trains eos alone


def test_prompt_and_completion_are_encoded_apart():
    """"ab" is one token, yet "a" + "b" stays two: the same ids as when the policy answers "a"."""
    tokenizer = Tokenizer.train(["ab"] * 9, 258)
    assert tokenizer.encode("ab") == [256]
    assert encode_row(tokenizer, "a", "b", 9, "drop").ids == [257, 97, 98, 257]


@pytest.mark.parametrize("block_size, ids, prompt_length", [
    (8, [256, *b"abcde", *b"x", 256], 6),
    (7, [256, *b"bcde", *b"x", 256], 5),  # the prompt loses its left, not its opening eos
    (4, [256, *b"e", *b"x", 256], 2),
    (3, [256, *b"x", 256], 1),
    (2, [256, *b"x"], 1),  # the completion alone is too long: cut at its right, without eos
])
def test_long_rows_are_trimmed_at_the_left(tokenizer, block_size, ids, prompt_length):
    """eos abcde + x eos in ever less room; with "drop" all but the first are dropped."""
    assert encode_row(tokenizer, "abcde", "x", block_size, "trim") == Row(ids, prompt_length, trimmed=block_size < 8)
    dropped = encode_row(tokenizer, "abcde", "x", block_size, "drop")
    assert dropped == (Row(ids, prompt_length) if block_size == 8 else None)


def test_trim_left_by_hand():
    """The opening eos and the last tokens, `room` in all."""
    assert [trim_left([9, 1, 2, 3], room) for room in (5, 4, 3, 2, 1)] == [
        [9, 1, 2, 3], [9, 1, 2, 3], [9, 2, 3], [9, 3], [9]]


def test_encode_prompts_counts_the_long_ones(tokenizer):
    """Room for 3 ids: "ab" fits with its eos; "abc" and "abcd" are dropped or trimmed, and counted either way."""
    texts = ["abc", "ab", "abcd", ""]
    assert encode_prompts(tokenizer, texts, 3, "drop") == ([[256, 97, 98], [256]], 2)
    assert encode_prompts(tokenizer, texts, 3, "trim") == ([[256, 98, 99], [256, 97, 98], [256, 99, 100], [256]], 2)


def test_collate_by_hand():
    """T tokens hold T-1 decisions; True where a decision chose a token of the completion, its eos (9) included, though
    padding and prompts hold eos as well."""
    tokens, mask, lengths = collate([Row([9, 1, 2, 3, 9], 2), Row([9, 9], 1), Row([9, 9, 4, 5], 3)], 9)
    o, x = False, True
    assert tokens.tolist() == [[9, 1, 2, 3, 9], [9, 9, 9, 9, 9], [9, 9, 4, 5, 9]]
    assert mask.tolist() == [[o, x, x, x], [x, o, o, o], [o, o, x, o]]
    assert mask.dtype == torch.bool and lengths.tolist() == [5, 2, 4]


# Order


LENGTHS = [(7 * i) % 23 + 1 for i in range(103)]


@pytest.mark.parametrize("batch_size", [1, 8, 102, 103, 500])
def test_an_epoch_holds_each_row_once(batch_size):
    """103 rows: every epoch a permutation, in full batches but for one; other epochs are others."""
    order = Order(LENGTHS, batch_size, seed=0)
    assert order.steps_per_epoch == -(-103 // batch_size)
    epochs = []
    for epoch in range(3):
        batches = [order.batch(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert Counter(row for batch in batches for row in batch) == Counter(range(103))
        short = [len(batch) for batch in batches if len(batch) != batch_size]
        assert short == [103 % batch_size] * (103 % batch_size > 0)
        epochs.append(batches)
    if batch_size < 103:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_steps_of_a_run():
    """Four batches an epoch: 1.5 epochs are 6 steps, and 0.7 are 2.8, so 3; never none; `most` ends them earlier."""
    order = Order([1] * 13, 4, 0)
    assert [order.steps(epochs, 0) for epochs in (1.5, 0.7, 0.01)] == [6, 3, 1]
    assert [order.steps(1.5, most) for most in (2, 6, 99)] == [2, 6, 6]



def test_order_is_a_function_of_seed_and_step():
    """Asked for in any order, by a fresh object or by one in use, a step's batch is the same; another seed's is not."""
    one = Order(LENGTHS, 8, seed=5)
    batches = {step: one.batch(step) for step in range(40)}
    assert all(Order(LENGTHS, 8, seed=5).batch(step) == batches[step] for step in (0, 39, 17))
    assert [one.batch(step) for step in (30, 2, 14)] == [batches[step] for step in (30, 2, 14)]
    assert Order(LENGTHS, 8, seed=6).batch(0) != batches[0]


def test_rows_of_like_length_meet():
    """Within a pool, batches hold neighbours in length, and do not come in the order of their lengths."""
    order = Order(LENGTHS, 8, seed=0)  # one pool of 128 holds all
    spans = [[LENGTHS[row] for row in order.batch(step)] for step in range(13)]
    spans_in_order = sorted(spans)
    assert all(max(a) <= min(b) for a, b in zip(spans_in_order, spans_in_order[1:]))
    assert spans != spans_in_order
    unpooled = Order(LENGTHS, 8, seed=0, pool=1)
    loose = [[LENGTHS[row] for row in unpooled.batch(step)] for step in range(13)]
    assert sum(max(span) - min(span) for span in loose) > 2 * sum(max(span) - min(span) for span in spans)


@pytest.mark.parametrize("n, batch_size", [(10, 4), (10, 10), (3, 8), (1, 2)])
def test_endless_batch_covers_each_row_once_an_epoch(n, batch_size):
    """Full batches for ever, a batch over an epoch's end included; n draws in a row are a permutation."""
    stream = [row for step in range(30) for row in endless_batch(n, batch_size, 0, step)]
    assert len(stream) == 30 * batch_size
    epochs = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 10:
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_endless_batch_is_a_function_of_seed_and_step():
    """The same again; another seed or step gives other rows."""
    assert endless_batch(100, 8, 1, 7) == endless_batch(100, 8, 1, 7)
    assert endless_batch(100, 8, 1, 7) != endless_batch(100, 8, 2, 7)
    assert endless_batch(100, 8, 1, 7) != endless_batch(100, 8, 1, 8)
