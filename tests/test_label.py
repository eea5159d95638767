"""`python -m minirlhf.label`: the file of choices, a person's session in page and terminal, answers, judges, the page's
server; test_label_page.py has what needs a browser."""
import contextlib
import http.client
import io
import json
import os
import pty
import random
import re
import signal
import socket
import statistics
import sys
import termios
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from minirlhf import chart, checkpoint, choices, label, rewards, runtime, server
from minirlhf.choices import Choices, Pair
from minirlhf.data import Message, Talk, encode_row, load_preferences
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig
from player import Page, address, play
from test_chat import END, FORMS, STOP, tokenizer

POLICY = "out/sft"
HOSTILE = ["<script>document.title='x'</script><img src=x onerror=alert(1)>", "&lt;b&gt; \" ' `${1}`",
           "\u202egnp.exe\u2066", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "x" * 10_000,
           "a\0b\x1b[31mred\x07\r", "\ud800 half", "line\nbreak\u2028and\ttab",
           "</script><style>*{display:none}</style>", "-->", "{{7*7}}"]


def pair(k=0, left=" a", right=" b", prompt="p", again=None, writers=(POLICY, POLICY)):
    return Pair(k, prompt, [left, right], [*writers], [True, False], again=again)


def options(**changes):
    usual = {"policy": POLICY, "against": None, "judge": None, "num_pairs": None, "seed": 1337, "n": 2,
             "temperature": 1.0, "response_length": 4, "prompts": "prompts.jsonl", "output": "c.jsonl"}
    return SimpleNamespace(**usual | changes)


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


@pytest.fixture
def file(tmp_path):
    """file() -> Choices of tmp_path/c.jsonl, as a start of the command opens it; the one before is closed."""
    opened = []

    def open_it():
        for one in opened:
            one.close()
        opened.append(Choices(str(tmp_path / "c.jsonl"), []))
        return opened[-1]
    yield open_it
    opened[-1].close()


class Ready:
    """What Session sees of Ahead: pairs that are drawn already."""

    def __init__(self, *pairs, problem=""):
        self.ready, self.problem = label.queue.Queue(), problem
        for one in pairs:
            self.ready.put(one)


def session_of(choices, *pairs, problem="", **changes):
    return label.Session(choices, Ready(*pairs, problem=problem), options(**changes))


def press(session, *keys):
    for key in keys:
        asked = {"turn": session.look()["turn"], "choice": key}
        state = getattr(session, key)(asked) if key in ("undo", "end") else session.choose(asked)
    return state


# ---- the file

@pytest.mark.parametrize("choice", label.CHOICES)
@pytest.mark.parametrize("again", [None, 0])
@pytest.mark.parametrize("prompt", ["p", [{"role": "user", "content": "who?"}]])
def test_a_line_says_what_was_shown_and_trains_only_where_one_answer_was_better(choice, again, prompt, file, tmp_path):
    shown = pair(4, prompt=prompt, again=again, writers=("out/sft", "out/ppo"))
    more = {"choice": choice, "seconds": 1.5} | ({"again": again} if again is not None else {})
    file().add(shown.record(label.CHOICES[choice], choices.PERSON, 7, **more))
    (record,), (read,) = lines(tmp_path / "c.jsonl"), load_preferences(str(tmp_path / "c.jsonl"))
    assert Pair.of(record) == shown and Pair.of(file().records[0]) == shown
    assert record["seed"] == 7 and record["judge"] == "person" and record["pair"] == 4 and record["choice"] == choice
    assert abs(time.time() - time.mktime(time.strptime(record["time"], "%Y-%m-%dT%H:%M:%SZ")) + time.timezone) < 60
    best = ["out/ppo", "out/sft"] if choice == "right" else ["out/sft", "out/ppo"]
    assert record["writers"] == best and record["finished"] == [by == "out/sft" for by in best]
    if choice in ("tie", "skip") or again is not None:
        assert read.pairs() == [] and len(read.completions) == 2
    else:
        assert read.pairs() == [(0, 1)]
        assert [text.strip() for text in read.completions] == (["a", "b"] if choice == "left" else ["b", "a"])
    assert read.prompt == (prompt if prompt == "p" else "\n\nHuman: who?\n\nAssistant:")


def test_messages_are_read_back_as_messages(file, tmp_path):
    """With the system's turn, as the model's own form needs them, not as text."""
    asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who?"}]
    file().add(pair(prompt=asked, left="me", right="you").record([0, 1], "person", 1, choice="right", seconds=1.0))
    (read,) = load_preferences(str(tmp_path / "c.jsonl"))
    assert type(read.prompt) is Talk and read.prompt.messages == [Message("system", "be kind"), Message("user", "who?")]
    assert [talk.messages for talk in read.completions] == [[Message("assistant", "you")], [Message("assistant", "me")]]


def test_whatever_part_of_the_file_is_there_whole_lines_are_kept_and_it_goes_on(file, tmp_path):
    """Cut at any byte, as a crash may leave it."""
    path, records = tmp_path / "c.jsonl", [pair(k, "\u00e9", "\u2028").record([1, 0], "person", 1, choice="left",
                                                                             seconds=0.5) for k in range(3)]
    file().add(*records)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 3
    cuts = {*range(0, len(whole), 29), *(end + k for end in [0, *ends] for k in (-1, 0, 1))}
    for cut in sorted(cuts & {*range(len(whole) + 1)}):
        path.write_bytes(whole[:cut])
        opened = file()
        kept = sum(end <= cut for end in ends)
        assert opened.records == records[:kept] and path.read_bytes() == whole[:[0, *ends][kept]]
        if cut % 2:
            opened.add(records[0])
            assert lines(path) == [*records[:kept], records[0]]
    for rest in (b"\0" * 100, b'{"prompt": "p' + bytes(9)):  # a block that a power cut has left unwritten
        path.write_bytes(whole + rest)
        assert file().records == records and path.read_bytes() == whole


class Died(BaseException):
    """The process is gone: nothing of it runs any more."""


def test_a_death_between_any_two_steps_of_a_choice_loses_at_most_that_choice(file, tmp_path, monkeypatch):
    """And of an undo: it is done, or it is not."""
    path, steps = tmp_path / "c.jsonl", ["write", "truncate", "fsync", "fstat", "stat"]
    for undo in (False, True):
        for death in range(20):
            path.unlink(missing_ok=True)
            opened = file()
            session = session_of(opened, pair(0), pair(1))
            press(session, "left")
            session.look()
            before, count = path.read_bytes(), 0

            def step(real):
                def call(*arguments):
                    nonlocal count
                    count += 1
                    if count == death:
                        raise Died
                    return real(*arguments)
                return call

            class Steps:
                def __init__(self, real):
                    self.real = real
                    self.write, self.truncate = step(lambda data: real.write(data[:7])), step(real.truncate)

                def __getattr__(self, name):
                    return getattr(self.real, name)
            with monkeypatch.context() as patch:
                patch.setattr(opened, "file", Steps(opened.file))
                for name in steps[2:]:
                    patch.setattr(choices.os, name, step(getattr(os, name)))
                try:
                    press(session, "undo" if undo else "right")
                    died = False
                except Died:
                    died = True
            opened.file.close()
            kept = file().records
            assert path.read_bytes().startswith(before) or undo and kept == []
            assert len(kept) in ((0, 1) if undo else (1, 2)) and (died or len(kept) == (0 if undo else 2))
            if not died:
                assert count > 3
                break
        else:
            assert False, "the steps do not end"


def test_a_choice_is_on_the_disk_before_anything_follows(file, tmp_path, monkeypatch):
    """fsync sees the file as it will be, for choices and for undo."""
    opened, seen, sync = file(), [], os.fsync

    def noting(descriptor):
        seen.append(os.fstat(descriptor).st_size)
        sync(descriptor)
    monkeypatch.setattr(choices.os, "fsync", noting)
    session = session_of(opened, pair(0), pair(1))
    press(session, "left")
    first = (tmp_path / "c.jsonl").stat().st_size
    press(session, "tie")
    second = (tmp_path / "c.jsonl").stat().st_size
    press(session, "undo")
    assert seen == [first, second, first] and 0 < first < second and len(lines(tmp_path / "c.jsonl")) == 1


def test_on_a_full_disk_the_pair_stays_and_the_person_is_told(file, tmp_path):
    opened = file()
    session = session_of(opened, pair(0), pair(1))
    press(session, "left")
    before, real, told = (tmp_path / "c.jsonl").read_bytes(), opened.file, session.look()

    class Full:
        def write(self, data):
            if real.seek(0, 2) > len(before):
                raise OSError(28, "No space left on device")
            return real.write(data[:10])

        def __getattr__(self, name):
            return getattr(real, name)
    opened.file = Full()
    state = press(session, "right")
    assert "could not be written (No space left on device)" in state["problem"] and state["turn"] == told["turn"]
    assert state["pair"] == pair(1).shown() and (tmp_path / "c.jsonl").read_bytes() == before
    opened.file = real
    assert press(session, "right")["problem"] == "" and len(lines(tmp_path / "c.jsonl")) == 2


def test_what_cannot_be_taken_back_stays(file, tmp_path, monkeypatch):
    """The disk fails when the file is shorter already: it has its last line again."""
    session = session_of(file(), pair(0), pair(1))
    press(session, "left", "right")
    before = (tmp_path / "c.jsonl").read_bytes()

    def fails(number):
        raise OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        assert "could not be written (Input/output error)" in press(session, "undo")["problem"]
    assert (tmp_path / "c.jsonl").read_bytes() == before
    press(session, "undo")
    assert (tmp_path / "c.jsonl").read_bytes() == before[:before.index(b"\n") + 1]


@pytest.mark.parametrize("damage", ["append", "remove", "replace"])
def test_a_file_that_another_program_changes_is_not_written_to(damage, file, tmp_path):
    path, opened = tmp_path / "c.jsonl", file()
    session = session_of(opened, pair(0), pair(1))
    press(session, "left")
    if damage == "append":
        path.write_text(path.read_text() + '{"by": "an editor"}\n')
    else:
        path.unlink()
        if damage == "replace":
            path.write_text("{}\n")
    before = path.read_bytes() if path.exists() else None
    for key in ("left", "undo"):
        assert "another program has changed or removed it" in press(session, key)["problem"]
    assert before == (path.read_bytes() if path.exists() else None)


def test_one_session_at_a_time_has_the_file(file, tmp_path, refused):
    """Also while a child lives that a judge's function has forked; when the session is dead the next one has it."""
    opened = file()
    opened.add(pair().record([1, 0], "person", 1, choice="left", seconds=1.0))
    assert "another session is writing there" in refused(Choices, opened.path, [])
    assert len(opened.records) == len(lines(tmp_path / "c.jsonl")) == 1
    reading, writing = os.pipe()
    up, told = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writing)
        os.write(told, b"1")
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    os.read(up, 1)
    opened.file.close()  # as when its process has died
    assert len(file().records) == 1
    os.close(writing)
    os.waitpid(child, 0)


def test_what_is_no_file_of_choices_is_refused_and_stays(tmp_path, refused):
    for name, content, why in (
            ("p.jsonl", '{"prompt": "a"}\n', "p.jsonl:1: was not written by this command"),
            ("q.jsonl", '{"pair": 1, "judge": "person"}\n', "was not written"), ("t.txt", "", ".jsonl"),
            ("r.jsonl", '{"pair": }\n', "r.jsonl:1: not JSON"), ("metrics.jsonl", "", "log of a run"),
            # whose last line has no end, which a crash of this command leaves too
            ("s.jsonl", '{"prompt": "a"}\n{"prompt": "b"}', "s.jsonl:1: was not written"),
            ("u.jsonl", '{"prompt": "b", "chosen": "c", "rejected": "d"}', "u.jsonl:1: was not written"),
            ("v.jsonl", "notes", "v.jsonl:1: was not written"), ("w.jsonl", "7", "w.jsonl:1: was not written")):
        (tmp_path / name).write_text(content)
        assert why in refused(Choices, str(tmp_path / name), [])
        assert (tmp_path / name).read_text() == content
    (tmp_path / "f.jsonl").mkdir()
    assert "is no file" in refused(Choices, str(tmp_path / "f.jsonl"), [])
    os.symlink(tmp_path / "p.jsonl", tmp_path / "l.jsonl")
    assert "which this command reads" in refused(Choices, str(tmp_path / "l.jsonl"), [str(tmp_path / "p.jsonl")])
    (tmp_path / "file").write_text("")
    assert "cannot be written (File exists)" in refused(Choices, str(tmp_path / "file" / "c.jsonl"), [])


def test_a_session_without_a_choice_leaves_nothing(tmp_path):
    opened = Choices(str(tmp_path / "a" / "b" / "c.jsonl"), [])
    assert os.path.exists(opened.path)
    opened.close()
    assert [*tmp_path.iterdir()] == []
    opened = Choices(str(tmp_path / "a" / "c.jsonl"), [])
    opened.add(pair().record([1, 0], "person", 1, choice="left", seconds=1.0))
    opened.close()
    assert len(lines(tmp_path / "a" / "c.jsonl")) == 1


# ---- figures

def test_figures_by_hand():
    """Seven pairs, two shown again; ties half, what was skipped and what was repeated not counted."""
    def told(k, choice, writers=("out/sft", "out/ppo"), seconds=4.0, **more):
        return pair(k, writers=writers).record(label.CHOICES[choice], "person", 1, choice=choice, seconds=seconds,
                                               **more)
    ppo_left = ("out/ppo", "out/sft")
    records = [told(0, "left"), told(1, "right"), told(2, "left", ppo_left), told(3, "tie", seconds=1.0),
               told(4, "skip", seconds=90.0), told(5, "right"), told(6, "right", seconds=2.0),
               told(7, "left", ("out/sft", "out/other"))]
    records += [pair(0, again=0, writers=ppo_left).record([1, 0], "person", 1, choice="left", seconds=4.0, again=0,
                                                          agrees=0.0),
                pair(1, again=1, writers=ppo_left).record([1, 0], "person", 1, choice="left", seconds=4.0, again=1,
                                                          agrees=1.0),
                told(8, "right") | {"judge": "out/rm"}]
    found = dict(choices.figures(records, options(against="out/ppo")))
    # of sft against ppo: 0 lost, 1, 2 won, 3 tied, 5, 6 won: 4.5 of 6; Wilson: centre .75 + 3.8416/12 = 1.0701, half
    # 1.96 sqrt(.75 * .25 / 6 + 3.8416 / 144) = .4714, both over 1 + 3.8416 / 6 = 1.6403
    assert found == {"choices": "7 (1 tied, 1 skipped)", "pairs an hour": "900",
                     "agreement with yourself": "50.0% (95% 9.5%-90.5%) of 2",
                     "out/ppo preferred to out/sft": "75.0% (95% 36.5%-94.0%) of 6"}
    assert dict(choices.figures(records, options(judge="out/rm", num_pairs=9)))["rankings"] == "1 of 9"
    assert choices.figures([], options(against="out/ppo")) == [("choices", "0")]


def test_the_pace_is_the_median_of_what_came_lately():
    """A pause for lunch changes nothing; 3600 / 8 = 450 pairs an hour, though the first hundred took a second each."""
    records = [pair(k).record([1, 0], "person", 1, choice="left", seconds=s)
               for k, s in enumerate([1.0] * 100 + [8.0] * 49 + [5000.0])]
    assert dict(choices.figures(records, options()))["pairs an hour"] == "450"


def test_a_ranking_counts_its_share_of_pairs_between_the_two():
    """a > b > b = a: of its four pairs of an a with a b a wins 2, ties 1, loses 1: 2.5 of 4."""
    record = {"completions": ["w", "x", "y", "z"], "scores": [3, 2, 1, 1], "writers": ["a", "b", "b", "a"]}
    assert choices.preferred([record], "a", "b") == [0.625] and choices.preferred([record], "b", "a") == [0.375]
    assert choices.preferred([record | {"choice": "skip"}], "a", "b") == choices.preferred([record], "a", "c") == []


# ---- a session

def test_every_tenth_pair_is_one_shown_before_with_its_sides_exchanged(file, tmp_path):
    session = session_of(file(), *(pair(k, f" l{k}", f" r{k}") for k in range(40)))
    rng = random.Random(0)
    for _ in range(40):
        press(session, rng.choice(["left", "right"]))
    records = lines(tmp_path / "c.jsonl")
    assert [n for n, r in enumerate(records) if "again" in r] == [9, 19, 29, 39]
    fresh = [r for r in records if "again" not in r]
    assert [r["pair"] for r in fresh] == [*range(36)]
    again = [r["again"] for r in records if "again" in r]
    assert len(set(again)) == 4
    for n, r in enumerate(records):
        if "again" in r:
            first = next(f for f in fresh if f["pair"] == r["again"])
            assert records.index(first) < n - label.RECENT  # not one of the last
            assert Pair.of(r).texts == Pair.of(first).texts[::-1] and r["scores"] == [0, 0]
            same = Pair.of(r).texts[r["choice"] == "right"] == first["chosen"]
            assert r["agrees"] == same
    rates = [r["agrees"] for r in records if "again" in r]
    assert {0.0, 1.0} == {*rates}
    assert f"{sum(rates) / 4:.1%} (95% " in dict(session.look()["figures"])["agreement with yourself"]


def test_agreement_of_ties_and_skips(file, tmp_path):
    """Half where it is tied the second time, nothing where it is skipped; of all ties nothing is repeated."""
    for k, (key, more) in enumerate((("tie", {"agrees": 0.5}), ("skip", {}))):
        session = session_of(file(), *(pair(10 * k + i) for i in range(10)))
        press(session, *["left"] * 9, key)
        last = lines(tmp_path / "c.jsonl")[-1]
        assert "again" in last and {name: last[name] for name in ("agrees",) if name in last} == more
    (tmp_path / "c.jsonl").unlink()
    session = session_of(file(), *(pair(k) for k in range(12)))
    press(session, *["tie"] * 6, *["skip"] * 6)
    assert not any("again" in r for r in lines(tmp_path / "c.jsonl"))


def test_what_is_repeated_and_then_taken_back_says_nothing_of_agreement(file, tmp_path):
    """The tenth pair repeats one of the nine; all ten are taken back, and the one is tied the second time."""
    session = session_of(file(), *(pair(k) for k in range(10)))
    press(session, *["left"] * 9)
    again = session.look()["turn"] and session.pair.again
    press(session, *["undo"] * 9, *["tie" if k == again else "left" for k in range(9)], "left")
    last = lines(tmp_path / "c.jsonl")[-1]
    assert last["again"] == again and "agrees" not in last
    assert "agreement with yourself" not in dict(session.look()["figures"])


def test_an_interrupted_session_goes_on_as_one_that_was_not(file, tmp_path):
    """Also what is repeated is the same, and what was undone comes again first."""
    def pairs(first):
        return [pair(k, f" l{k}", f" r{k}") for k in range(first, 30)]
    keys = random.Random(1).choices(["left", "right", "tie", "skip"], k=25)
    press(session_of(file(), *pairs(0)), *keys)
    whole = lines(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").unlink()
    for at in range(25):
        opened = file()
        first = 1 + max([-1, *(r["pair"] for r in opened.records)])
        press(session_of(opened, *pairs(first)), keys[at], *["left", "undo"] * (at % 3 == 0))
    strip = [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in whole]
    assert strip == [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in lines(tmp_path / "c.jsonl")]


def test_undo_goes_back_through_the_file_and_forth_again(file, tmp_path):
    """Through a session of yesterday's; each pair is shown as it was, and the one that was left comes after."""
    press(session_of(file(), pair(0), pair(1)), "left", "right")
    session = session_of(file(), pair(2))
    assert session.look()["pair"] == pair(2).shown()
    assert press(session, "undo")["pair"] == pair(1).shown()
    assert press(session, "undo")["pair"] == pair(0).shown() and lines(tmp_path / "c.jsonl") == []
    state = press(session, "undo")
    assert state["news"] == "There is nothing to undo." and not state["undo"] and state["pair"] == pair(0).shown()
    for k in range(3):
        assert session.look()["pair"] == pair(k).shown()
        press(session, "right")
    assert [r["pair"] for r in lines(tmp_path / "c.jsonl")] == [0, 1, 2]


def test_a_key_pressed_for_an_earlier_pair_changes_nothing(file, tmp_path):
    """Twice in a row, from another window, or when the answer was lost on its way."""
    session = session_of(file(), pair(0), pair(1))
    asked = {"turn": session.look()["turn"], "choice": "left"}
    session.choose(asked)
    for late in (session.choose, session.undo):
        assert "Nothing was changed" in late(asked)["news"]
    assert len(lines(tmp_path / "c.jsonl")) == 1 and session.look()["pair"] == pair(1).shown()
    for bad in ({}, {"turn": 1}, {"turn": True, "choice": "left"}, {"turn": 1, "choice": ["left"]},
                {"turn": 1, "choice": "end"}):
        with pytest.raises(ValueError):
            session.choose(bad)


def test_a_session_is_complete_when_the_file_has_so_many(file):
    """Ties count, what was skipped or repeated does not."""
    session = session_of(file(), *(pair(k) for k in range(20)), num_pairs=10)
    state = press(session, "left", "tie", "skip", *["left"] * 9)
    assert state["pair"] is None and not state["waits"] and "All are done" in state["news"] and state["undo"]
    assert dict(state["figures"])["choices"] == "10 of 10 (1 tied, 1 skipped)"
    assert press(session, "undo")["pair"] and press(session, "left")["pair"] is None
    state = press(session, "end")
    assert state["ended"] and session.ended.is_set() and "has ended" in state["news"]


def test_when_no_more_answers_come_the_person_is_told_and_may_choose_between_those_that_are_there(file):
    session = session_of(file(), pair(0), problem="RuntimeError: <b>")
    assert session.look()["pair"] and session.look()["problem"] == ""
    state = press(session, "left")
    assert state["pair"] is None and not state["waits"] and state["undo"]
    assert "No more answers can be written (RuntimeError: <b>). All choices are saved." in state["problem"]
    assert session_of(file()).look()["waits"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text_and_kept_as_it_is(text, file, tmp_path):
    """In prompt and answers; what is invisible or turns its neighbours is spelled out; nothing else changes."""
    session = session_of(file(), pair(0, text, "other", prompt=text))
    shown = session.look()["pair"]
    assert shown["prompt"] == shown["texts"][0] or "\ud800" in text
    assert not chart.HIDDEN.search(json.dumps(shown, ensure_ascii=False))
    if not chart.HIDDEN.search(text):
        assert shown["texts"][0] == text
    press(session, "left")
    (read,) = load_preferences(str(tmp_path / "c.jsonl"))
    assert read.completions[0] == text.replace("\ud800", "\ufffd") and read.prompt == text.replace("\ud800", "\ufffd")


# ---- answers

@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A working folder with out/sft, out/ppo (another model with the same tokenizer), out/rm and prompts.jsonl."""
    (tmp_path / "out").mkdir()
    for name, real in (("sft", "sft"), ("ppo", "other_sft"), ("rm", "rm")):
        os.symlink(tiny.folder / real, tmp_path / "out" / name)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}{b}"}}\n' for a in "abc" for b in "defg"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers_of(judge=None, prompts="prompts.jsonl", **changes):
    a = options(**{"prompts": prompts, "temperature": 2.0, "long_prompts": "drop"} | changes)
    writers, tokenizer = label.load(a, torch.device("cpu"))
    run = runtime.Precision(torch.device("cpu"), "float32")
    judge = judge and rewards.load(judge, "--judge", writers[0].model, tokenizer, a.policy, run)
    return label.Answers(writers, tokenizer, label.read_prompts(a, tokenizer, 12), judge, run, a)


def flat(blocks):
    return [one for block in blocks for one in block]


def test_a_pair_is_a_function_of_seed_and_number(folder):
    """Wherever a session begins; each prompt comes once before one comes twice, with other answers then."""
    pairs = flat(answers_of().blocks(0, 40))
    assert flat(answers_of().blocks(11, 30)) == [one for one in pairs if 11 <= one.number < 30]
    assert flat(answers_of(seed=3).blocks(0, 40)) != pairs
    block = answers_of().block(0) + answers_of().block(1) + answers_of().block(2)
    assert sorted(one.prompt for one in block[:12]) == sorted(one.prompt for one in block[12:])
    assert {one.prompt: one.texts for one in block[:12]} != {one.prompt: one.texts for one in block[12:]}
    assert all(one.texts[0] != one.texts[1] for one in pairs) and len({one.texts[0] for one in pairs}) > 10


def test_each_policy_writes_one_answer_and_sides_are_random(folder):
    """The texts are those that the named model samples."""
    answers = answers_of(against="out/ppo")
    pairs = flat(answers.block(n) for n in range(12))
    assert all(sorted(one.writers) == ["out/ppo", "out/sft"] for one in pairs)
    left = sum(one.writers[0] == "out/ppo" for one in pairs)
    assert 30 < left < 66  # of 96
    model, tokenizer, _ = checkpoint.load("out/ppo", ["sft"], "cpu")
    rows = [ids for _, ids in (answers.prompts[i] for i in [
        next(i for i, (text, _) in enumerate(answers.prompts) if text == one.prompt) for one in pairs[:8]])]
    rollout = generate(model, rows, 4, tokenizer.eos, 2.0, runtime.generator(1337, 0, 1, "label"))
    assert [one.texts[one.writers.index("out/ppo")] for one in pairs[:8]] == [*map(tokenizer.decode,
                                                                                    rollout.responses())]
    assert [one.finished[one.writers.index("out/ppo")] for one in pairs[:8]] == rollout.finished.tolist()


def test_pairs_that_leave_nothing_to_choose_are_passed_over(folder, monkeypatch):
    """Equal answers; answers that a reader of preferences would take to hold the prompt. For ever is an error."""
    answers, n = answers_of(), iter(range(2000))
    monkeypatch.setattr(answers, "block", lambda b: [
        Pair(next(n), "the old king", texts, [POLICY] * 2, [True] * 2) for texts in (
            [" a", " a"], [" a", " b"], ["the old king a", "the old king b"], ["the old king a", " b"])])
    assert [one.number for one in flat(answers.blocks(0, 16))] == [1, 3, 5, 7]
    monkeypatch.setattr(answers, "block", lambda b: [pair(next(n), " a", " a")])
    with pytest.raises(RuntimeError, match="raise --temperature"):
        flat(answers.blocks(0))


def test_answers_to_messages_are_kept_as_messages(folder):
    """Human/Assistant text has a blank before what the assistant says, which is not part of it."""
    asked = [[{"role": "user", "content": a}] for a in "abc"]
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (
        {"messages": asked[0]}, {"prompt": asked[1]}, {"messages": asked[2]})))
    answers = answers_of(prompts="m.jsonl", long_prompts="trim")
    assert sorted(prompt[0]["content"] for prompt, _ in answers.prompts) == ["a", "b", "c"]
    one = answers.block(0)[0]
    assert one.prompt in asked and not any(text.startswith("  ") for text in one.texts)
    assert one.shown()["prompt"] == f"Human: {one.prompt[0]['content']}"


@pytest.mark.parametrize("name", FORMS)
def test_answers_in_a_model_s_own_form_train_behind_the_ids_that_they_were_sampled_after(name, tmp_path, monkeypatch):
    """ChatML's tokens are no part of a text; what stage 2 reads has the prompt's ids and, byte for byte, the answer."""
    own = tokenizer(FORMS[name], STOP if name == "chatml" else END)
    model = GPT(GPTConfig(1, 2, 16, own.vocab_size, 128))
    model.init_weights(torch.Generator().manual_seed(0))
    asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "<|im_end|> who?"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    a = options(prompts=str(tmp_path / "m.jsonl"), long_prompts="drop", response_length=8)
    prompts = label.read_prompts(a, own, 128)

    def answer(model, rows, limit, eos, temperature, generator):
        texts = [f" Yo{k} <|im_end|>" for k in range(len(rows))]
        return SimpleNamespace(responses=lambda: [[*own.encode(text), row.end] for text, row in zip(texts, rows)],
                               finished=torch.ones(len(rows), dtype=bool))
    monkeypatch.setattr(label, "generate", answer)
    run = runtime.Precision(torch.device("cpu"), "float32")
    one = label.Answers([label.Writer(POLICY, model, 2)], own, prompts, None, run, a).block(0)[0]
    blank = "" if name == "text" else " "
    assert sorted(one.texts) == [f"{blank}Yo{k} <|im_end|>" for k in range(2)]
    assert one.shown()["prompt"] == "be kind\n\nHuman: <|im_end|> who?"
    (tmp_path / "c.jsonl").write_text(json.dumps(one.record([1, 0], "person", 1, choice="left", seconds=1.0)) + "\n")
    (read,) = load_preferences(str(tmp_path / "c.jsonl"))
    for text, shown in zip(read.completions, one.texts):
        row = encode_row(own, read.prompt, text, 128, "drop")
        assert row.ids[:row.prompt_length] == [*prompts[0][1]]
        assert own.decode(row.ids[row.prompt_length:]).removeprefix(" ") == shown.removeprefix(" ")
        assert row.ids[-1] == prompts[0][1].end


def test_the_sampler_ends_at_once_when_it_is_asked_to(folder, monkeypatch):
    """Within a block, too; and says why it cannot go on."""
    answers = answers_of(response_length=4)
    ahead = label.Ahead(answers, 0)
    monkeypatch.setattr(label.Answers, "block", lambda self, n: [self.writers[0].model.h[0](torch.zeros(1, 1, 8), None)
                                                                for _ in range(30_000)])
    ahead.start()
    ahead.end()
    assert not ahead.is_alive() and ahead.problem == ""

    def broken(self, n):
        raise RuntimeError("no memory")
    monkeypatch.setattr(label.Answers, "block", broken)
    ahead = label.Ahead(answers, 0)
    ahead.start()
    ahead.join(10)
    assert ahead.problem == "RuntimeError: no memory"


# ---- the command in a page

@contextlib.contextmanager
def started(monkeypatch, *argv):
    """The command in a thread, with a page -> Page, what it said, and how it ended: [] or [exit status]."""
    said, ended, up = [], [], threading.Event()

    def say(line=""):
        said.append(line)
        if address(line):
            up.set()

    def run():
        try:
            label.main([POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--no_browser", "--temperature",
                        "2", *argv])
        except SystemExit as stop:
            ended.append(stop.code)
        finally:
            up.set()
    for module in (label, choices):
        monkeypatch.setattr(module, "say", say)
    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(60) and not ended, (said, ended)
    page = Page(next(filter(None, map(address, said))))
    try:
        yield page, said, ended
    finally:
        with contextlib.suppress(OSError):
            page.ask("end", {"turn": 0})
        thread.join(60)
        assert not thread.is_alive()


def test_a_session_through_the_page(folder, monkeypatch):
    """A rule chooses between two policies; the file, the figures and what is said at the end are recomputed from what
    was seen alone. The page never tells who wrote an answer."""
    seen, writers = [], {}
    real = Pair.shown

    def noting(self):
        writers.update({(self.prompt, text): by for text, by in zip(self.texts, self.writers)})
        return real(self)
    monkeypatch.setattr(Pair, "shown", noting)
    with started(monkeypatch, "--against", "out/ppo", "--num_pairs", "20") as (page, said, ended):
        play(page, lambda prompt, text: (len(text), text), seen)  # the longer one, then by letters: never a tie
        state = page.state
    records = lines(folder / "c.jsonl")
    assert len(records) == len(seen) == 22 and ended == []
    won = lost = 0
    for record, shown in zip(records, seen):
        best, worst = sorted(shown["texts"], key=lambda text: (len(text), text), reverse=True)
        if "again" in record:
            assert record["agrees"] == 1.0
        else:
            texts = record["chosen"], record["rejected"]
            assert (record["prompt"], *map(choices.visible, texts)) == (shown["prompt"], best, worst)
            assert record["writers"] == [writers[record["prompt"], text] for text in texts]
            won, lost = won + (record["writers"][0] == "out/ppo"), lost + (record["writers"][0] == "out/sft")
    assert won + lost == 20 and not any("out/ppo" in json.dumps(shown) for shown in seen)
    found = dict(map(tuple, state["figures"]))
    assert found["choices"] == "20 of 20" and found["agreement with yourself"] == "100.0% (95% 34.2%-100.0%) of 2"
    assert found["out/ppo preferred to out/sft"].startswith(f"{won / 20:.1%} (95% ")
    assert found["pairs an hour"] == f"{3600 / max(0.1, statistics.median(r['seconds'] for r in records)):,.0f}"
    assert all(f"{name}: {text}" in said for name, text in found.items())
    assert "c.jsonl: 22 lines, 22 of them new" in said
    pairs = [p for r in load_preferences("c.jsonl") for p in r.pairs()]
    assert len(pairs) == 20


def test_the_reward_model_learns_from_the_file(folder, monkeypatch, tiny):
    """train_rm.py reads it as it stands, and counts ties and repeats as what does not train."""
    (folder / "mine").mkdir()
    with started(monkeypatch, "--output", "mine/preferences.train.jsonl", "--num_pairs", "30") as (page, said, _):
        play(page, lambda prompt, text: min(len(text), 3))
    records = lines(folder / "mine" / "preferences.train.jsonl")
    ties = sum(r["choice"] == "tie" for r in records)
    assert ties and sum("again" in r for r in records) and any(
        line.startswith("next: ") for line in said)
    words = next(line for line in said if line.startswith("next: ")).split("train_rm.py ")[1].split()
    assert words[:4] == ["--data_dir", "mine", "--preferences", "preferences"] and words[-1] == "out/mine/rm"
    ended = tiny.train("rm", *words, "--val_share", "0.4", out="out/mine/rm")
    assert ended.code == 0, ended.error
    dropped = re.findall(r"records dropped, no two texts that differ and are not tied: (\d+)", ended.said)
    assert sum(map(int, dropped)) == ties + sum("again" in r and r["choice"] != "tie" for r in records)
    # the next one goes on from it, and takes nothing's place
    for there, place in (("out/mine/rm", "out/mine/rm2"), ("out/mine/rm2", "out/mine/rm3")):
        (folder / there).mkdir(parents=True, exist_ok=True)
        *_, said = label.closing(SimpleNamespace(records=records), 0, options(output="mine/preferences.train.jsonl"))
        assert f"--init_from {there} " in said and said.endswith(f"--out_dir {place}")


def test_two_sessions_on_one_file_are_refused_and_the_first_goes_on(folder, monkeypatch, refused):
    with started(monkeypatch) as (page, _, _):
        page.look()
        page.press("left")
        with monkeypatch.context() as patch:
            patch.setattr(label, "say", print)
            error = refused(label.main, [POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--terminal"])
        assert "another session is writing there" in error
        page.look()
        page.press("right")
    assert len(lines(folder / "c.jsonl")) == 2


def test_a_sampler_that_fails_is_told_on_the_page_and_ends_the_command_with_1(folder, monkeypatch):
    real = label.Answers.block

    def failing(self, n):
        if n:
            raise RuntimeError("the weights are <gone>")
        return real(self, n)
    monkeypatch.setattr(label.Answers, "block", failing)
    with started(monkeypatch) as (page, _, ended):
        while page.look()["pair"]:
            page.press("left")
        assert "the weights are <gone>" in page.state["problem"] and page.state["undo"]
        page.press("end")
    assert len(lines(folder / "c.jsonl")) > 4 and "the weights are <gone>" in ended[0]


def test_kill_9_loses_nothing_that_was_told_as_saved_and_the_next_start_goes_on(folder, tiny):
    """What the page was told is saved is in the file; the same command then shows the pair that was shown."""
    from conftest import Command
    argv = ["minirlhf.label", POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--no_browser",
            "--temperature", "2"]

    def start():
        process = Command(*argv, cwd=folder)
        until = time.monotonic() + 60
        while not (url := address(open(process.logs[0]).read())):
            assert time.monotonic() < until and process.process.is_alive(), open(process.logs[1]).read()
            time.sleep(0.01)
        return process, Page(url)
    process, page = start()
    for k in range(13):
        page.look()
        page.press(["left", "right", "tie"][k % 3])
    shown = page.look()["pair"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(lines(folder / "c.jsonl")) == 13
    process, page = start()
    assert page.look()["pair"] == shown and page.press("undo")["undo"]
    os.kill(process.pid, signal.SIGTERM)  # ends it as Ctrl-C does
    status, out, error = process.wait()
    assert status == 143 and "12 lines" in out and error == "" and len(lines(folder / "c.jsonl")) == 12


# ---- a terminal

def in_terminal(monkeypatch, text, *argv):
    """The command with these bytes as its standard input."""
    monkeypatch.setattr(label.sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    label.main([POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--terminal", "--temperature", "2", *argv])


def test_a_session_by_lines(folder, monkeypatch, capsys):
    """Keys or their names; what is none is answered with the keys; the end of input ends it."""
    in_terminal(monkeypatch, b"l\n\x1b[C\nwhat\nskip\ntie\nundo\n\x1b[B\nr")
    records = lines(folder / "c.jsonl")
    assert [r["choice"] for r in records] == ["left", "right", "skip", "tie", "right"]
    out = capsys.readouterr().out
    assert out.count(f"keys: {label.ASKED}") == 2 and "c.jsonl: 5 lines, 5 of them new" in out
    for r in records:
        assert f"prompt:\n    {r['prompt']}\n" in out
    in_terminal(monkeypatch, b"left\nq\nleft\n")
    assert len(lines(folder / "c.jsonl")) == 6 and "goes on behind the 5 lines that it holds" in capsys.readouterr().out


def test_hostile_text_does_not_steer_the_terminal(capsys):
    state = {"figures": [], "news": "", "problem": "", "pair": pair(0, "a\x1b[2J\nb", "\u202ec", prompt="\0").shown()}
    shown = [*label.as_lines(state)]
    assert all(line.strip("\n").isprintable() for line in shown)
    assert [line.strip() for line in shown if line.startswith(" ")] == [
        "\\x00", "a\\x1b[2J", "b", "\\u202ec", "(cut: it is longer)"]


def test_keys_in_a_terminal(folder, monkeypatch):
    """One key a choice, without Return; keys pressed ahead are dropped, for their pair was not seen; the terminal is
    given back as it was."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(label.sys, "stdin", os.fdopen(theirs))
    before, read = termios.tcgetattr(theirs), os.read
    keys = [b"\x1b[D", b"\x1b[C", b"T", b"x", b"s", b"u", b"lll", b"\x1b[D", b"q"]

    def reading(descriptor, n):
        if descriptor == theirs and keys:
            os.write(ours, keys.pop(0))
        found = read(descriptor, n)
        if found == b"\x1b":  # of an arrow key whose rest comes later
            os.write(ours, b"[B")
        return found
    monkeypatch.setattr(label.os, "read", reading)
    label.main([POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--terminal", "--temperature", "2"])
    assert [r["choice"] for r in lines(folder / "c.jsonl")] == ["left", "right", "tie", "left"]
    after = termios.tcgetattr(theirs)
    assert after[:6] == before[:6]
    os.write(ours, b"lll")
    with label.pressed_keys() as press:
        keys[:] = [b"r"]
        assert press() == "right"  # what was there before is gone
        keys[:] = [b"\x1b"]
        assert press() == "tie"
    os.close(ours)


def test_a_terminal_that_goes_away_ends_the_session(folder, monkeypatch, capsys):
    """As under nohup, when its window is closed: what was chosen is there, and no traceback."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(label.sys, "stdin", os.fdopen(theirs))
    keys, read = [b"l", b"r"], os.read

    def reading(descriptor, n):
        if descriptor == theirs:
            os.write(ours, keys.pop(0)) if keys else os.close(ours)
        return read(descriptor, n)
    monkeypatch.setattr(label.os, "read", reading)
    label.main([POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--terminal", "--temperature", "2"])
    assert [r["choice"] for r in lines(folder / "c.jsonl")] == ["left", "right"]
    assert "c.jsonl: 2 lines, 2 of them new" in capsys.readouterr().out


@pytest.mark.parametrize("text, why", [(b"x" * 5000, "a line of 4096 bytes"), (None, "standard input is closed")])
def test_standard_input_that_is_no_terminal_s(text, why, folder, monkeypatch, refused):
    if text is None:
        monkeypatch.setattr(label.sys, "stdin", None)
        error = refused(label.main, [POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--terminal"])
    else:
        error = refused(in_terminal, monkeypatch, text)
    assert why in error and not (folder / "c.jsonl").exists()


# ---- judges

def judged(*argv):
    label.main([POLICY, "--prompts", "prompts.jsonl", "--output", "c.jsonl", "--temperature", "2", *argv])


def test_a_reward_model_orders_n_answers_into_a_ranking(folder, capsys):
    """Scores are the scalar head's at the last token that was sampled; all six pairs of four answers train."""
    judged("--judge", "out/rm", "--n", "4")
    records, read = lines(folder / "c.jsonl"), load_preferences("c.jsonl")
    assert sorted(r["prompt"] for r in records) == sorted(a + b for a in "abc" for b in "defg")
    (model, tokenizer, _), answers = checkpoint.load("out/rm", ["rm"], "cpu"), answers_of()
    ids = {text: ids for text, ids in answers.prompts}
    rows = [ids[r["prompt"]] for r in records[:8] for _ in range(4)]
    run, scores = runtime.Precision(torch.device("cpu"), "auto"), {}
    with run.autocast():
        rollout = generate(answers.writers[0].model, rows, 4, tokenizer.eos, 2.0,
                           runtime.generator(1337, 0, 0, "label"))
    for row, response in zip(rows, rollout.responses()):
        with torch.no_grad(), run.autocast():
            scores.setdefault((row.text, tokenizer.decode(response)), []).append(float(model.score(
                torch.tensor([[*row, *response]]), torch.tensor([len(row) + len(response)]))))
    for n, (r, p) in enumerate(zip(records, read)):
        assert r["scores"] == sorted(r["scores"], reverse=True) and r["judge"] == "out/rm" and len(p.pairs()) <= 6
        for text, score in zip(r["completions"], r["scores"]) if n < 8 else ():
            assert min(abs(score - x) for x in scores[r["prompt"], text]) < 0.1, (score, scores[r["prompt"], text])
    assert sum(len(p.pairs()) for p in read) > 50
    assert "rankings: 12\n" in capsys.readouterr().out


def test_a_judge_of_two_writes_pairs_and_the_win_rate(folder, capsys):
    """Of a function, between two policies; ties half."""
    (folder / "judge.py").write_text("def score(prompts, completions):\n    return [len(c) for c in completions]\n")
    judged("--judge", "judge.py:score", "--against", "out/ppo", "--num_pairs", "30")
    records = lines(folder / "c.jsonl")
    assert len(records) == 30
    rates = []
    for r in records:
        best, worst = (r["chosen"], r["rejected"]) if "chosen" in r else r["completions"]
        assert r["scores"] == [len(best), len(worst)] and ("chosen" in r) == (len(best) > len(worst))
        rates.append(0.5 if len(best) == len(worst) else float(r["writers"][0] == "out/ppo"))
    assert f"out/ppo preferred to out/sft: {sum(rates) / 30:.1%} (95% " in capsys.readouterr().out


def test_a_judge_that_sees_no_difference_is_told(folder, capsys):
    """Records of equal scores train nothing: how many of the new ones are such is said, none of a judge who sees it."""
    (folder / "judge.py").write_text(
        "def none(prompts, completions):\n    return [1.0 for c in completions]\n"
        "def place(prompts, completions):\n    return [float(n) for n, _ in enumerate(completions)]\n")
    for judge, number, told in (("none", "12", 1), ("place", "6", 0), ("none", "24", 1)):  # each behind the one before
        judged("--judge", f"judge.py:{judge}", "--num_pairs", number)
        said = "warning: the judge gave all answers to 12 of 12 prompts one score: they train nothing"
        assert capsys.readouterr().out.count(said) == told, judge


def test_a_judge_gets_columns_and_leaves_out_what_it_does_not_apply_to(folder, refused):
    """None makes neither a number nor a loser; a column that the prompts lack is refused before anything is written."""
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}d", "level": {n}}}\n' for n, a in enumerate("abc")))
    (folder / "judge.py").write_text(
        "def score(prompts, completions, level):\n"
        "    return [None if n == 0 or len(c) % 2 else n + len(c) for n, c in zip(level, completions)]\n"
        "def other(prompts, completions, gone): pass\n")
    assert "asks for the column 'gone'" in refused(judged, "--judge", "judge.py:other", "--n", "4")
    assert not (folder / "c.jsonl").exists()
    judged("--judge", "judge.py:score", "--n", "4", "--num_pairs", "12")
    records = lines(folder / "c.jsonl")
    assert len(records) == 12 and {r["prompt"] for r in records} == {"bd", "cd"}
    for r in records:
        texts = r.get("completions") or [r["chosen"], r["rejected"]]
        assert r["scores"] == [len(text) + "abc".index(r["prompt"][0]) for text in texts]


def test_a_judge_that_fails_keeps_what_it_has_judged_and_goes_on_as_if_it_had_not(folder, refused, capsys):
    good = "def score(prompts, completions):\n    return [c.count('d') for c in completions]\n"
    (folder / "judge.py").write_text(good)
    judged("--judge", "judge.py:score", "--n", "3", "--num_pairs", "20")
    whole = (folder / "c.jsonl").read_text()
    (folder / "c.jsonl").unlink()
    (folder / "judge.py").write_text("calls = []\n" + good.replace(
        "    return", "    calls.append(1)\n    assert len(calls) < 3, 'the server is gone'\n    return"))
    error = refused(judged, "--judge", "judge.py:score", "--n", "3", "--num_pairs", "20")
    assert "AssertionError: the server is gone" in error and 8 < len(lines(folder / "c.jsonl")) < 20
    (folder / "judge.py").write_text(good)
    judged("--judge", "judge.py:score", "--n", "3", "--num_pairs", "20")

    def known(text):
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.splitlines()]
    assert known((folder / "c.jsonl").read_text()) == known(whole)
    before = (folder / "c.jsonl").read_text()
    judged("--judge", "judge.py:score", "--n", "3", "--num_pairs", "20")  # has so many already
    assert (folder / "c.jsonl").read_text() == before


class Rude(BaseHTTPRequestHandler):
    """A local server of chat completions with moods; its grade is 1 + how many "d" the question's answer has."""
    moods, asked = [], []

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mood = Rude.moods.pop(0) if Rude.moods else "good"
        Rude.asked.append((mood, question))
        text = question["messages"][-1]["content"]
        grade = 1 + re.search(r"Continuation:\n(.*?)\n\n", text, re.S)[1].count("d")
        said = {"good": f" {grade}/10\n", "words": "I like it very much"}.get(mood)
        answer = {"garbage": b"<html>", "list": b"[]", "deep": b"[" * 5000, "empty": b'{"choices": []}',
                  "null": b'{"choices": [{"message": {"content": null}}]}', "error": b'{"error": "busy"}'}.get(
            mood, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode())
        if mood == "hang":
            time.sleep(0.5)
        if mood == "close":
            return
        with contextlib.suppress(OSError):  # who asked does not wait
            self.send_response(500 if mood == "500" else 200)
            self.send_header("Content-Length", str(len(answer) + 100 * (mood == "short")))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *arguments):
        """No log."""


def test_the_reference_s_judge_asks_a_local_server_that_is_slow_wrong_and_rude(folder, monkeypatch, refused):
    """It asks again after a timeout, an error, garbage, no choices, words for a number; and gives up in one line."""
    text = (ROOT / "minirlhf" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(\"\"\"Grades .*?)```", text, re.S)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Rude)
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    for old, new in (("http://127.0.0.1:8080", f"http://127.0.0.1:{served.server_port}"), ("timeout=60", "timeout=0.2"),
                     ("time.sleep(2 ** attempt)", "time.sleep(0.01)"), ("Executor(4)", "Executor(1)")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (folder / "judge.py").write_text(code)
    monkeypatch.setattr(Rude, "asked", [])
    moods = ["hang", "500", "garbage", "list", "deep", "empty", "null", "error", "words", "short", "close"]
    monkeypatch.setattr(Rude, "moods", [*moods[:4], "good", *moods[4:8], "good", *moods[8:]])
    judged("--judge", "judge.py:score", "--num_pairs", "6")
    assert Rude.moods == [] and len(lines(folder / "c.jsonl")) == 6
    for r in lines(folder / "c.jsonl"):
        best, worst = (r["chosen"], r["rejected"]) if "chosen" in r else r["completions"]
        assert r["scores"] == [1 + best.count("d"), 1 + worst.count("d")]
    monkeypatch.setattr(Rude, "moods", ["500"] * 1000)
    error = refused(judged, "--judge", "judge.py:score", "--num_pairs", "12")
    assert "gave no grade in 5 tries" in error and len(lines(folder / "c.jsonl")) == 6
    served.shutdown()
    served.server_close()


# ---- options

@pytest.mark.parametrize("argv, why", [
    (["--against", POLICY], "is POLICY itself"), (["--against", POLICY + "/"], "is POLICY itself"),
    (["--against", f"./{POLICY}/ckpt.pt"], "is POLICY itself"), (["--n", "3"], "only a --judge can order more"),
    (["--n", "1"], "two or more"), (["--temperature", "0"], "would all be the same"),
    (["--port", "65536"], "--port 65536"),
    (["--terminal", "--no_browser"], "--no_browser: has no effect with --terminal"),
    (["--judge", "out/rm", "--terminal"], "--terminal: has no effect with --judge"),
    (["--response_length", "11"], "leaves no room"), (["--output", "prompts.jsonl"], "which this command reads"),
    (["--against", "out/rm"], "out/rm"), (["--judge", "out/sft"], "out/sft"), (["--judge", "x.py:f"], "x.py:f"),
    (["--prompts", "none.jsonl"], "none.jsonl"), (["--output", "a\ud800.jsonl"], "cannot be spelled")])
def test_what_cannot_be_is_refused_and_leaves_nothing(argv, why, folder, declined):
    error = declined(folder, "minirlhf.label", POLICY, "--prompts", "prompts.jsonl", "--output", "new/c.jsonl", *argv)
    assert why in error


def test_a_page_whose_address_nobody_can_read_ends(file, monkeypatch):
    """Standard output is full, and no browser is opened: one line, exit status 1."""
    monkeypatch.setattr(label, "say", lambda line: label.unprinted.append((sys.stdout, OSError(28, "No space left"))))
    with pytest.raises(SystemExit, match="^error: standard output could not be written .No space left"):
        label.in_page(session_of(file(), pair()), SimpleNamespace(port=0, no_browser=True))
    label.unprinted.clear()


def test_a_port_that_is_taken_is_refused(folder, declined):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot be served on" in declined(
            folder, "minirlhf.label", POLICY, "--prompts", "prompts.jsonl", "--output", "new/c.jsonl", "--port", port)


# ---- the page's server

@pytest.fixture
def served():
    """served.page, served.changes: what POSTs have done."""
    changes, text = [], (ROOT / "minirlhf" / "label.html").read_text("utf-8").replace("LOOK", chart.look(chart.PAGE))

    def change(asked):
        if "turn" not in asked:
            raise ValueError("no\r\nturn: 1")
        changes.append(asked)
        return {"changes": len(changes)}
    with server.Server(0, text, lambda: {"waits": False, "changes": len(changes)}, {"choose": change}) as running:
        yield SimpleNamespace(page=Page(running.url), changes=changes, server=running, text=text)


def speak(port, data, seconds=20):
    """What the server answers to some bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", port), seconds) as s:
        with contextlib.suppress(OSError):
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(OSError):
            while more := s.recv(65536):
                found += more
        return found


def test_a_browser_leaves_out_the_usual_port():
    assert server.hosts_of(80) == ["127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost"]
    assert server.hosts_of(8080) == ["127.0.0.1:8080", "localhost:8080"]


def test_a_request_needs_token_host_origin_and_method(served):
    page, token, port = served.page, served.server.token, served.server.server_port
    good = {"turn": 1}
    assert len(token) >= 32 and page.url == f"http://127.0.0.1:{port}/{token}/"
    for path in ("", f"{token[:-1]}/", f"{token}x/", f"./{token}/", f"%2e/{token}/", f"{token.swapcase()}/"):
        other = Page(f"http://127.0.0.1:{port}/{path}")
        assert other.refusal() == other.refusal("state") == other.refusal("choose", good) == 404
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"[::1]:{port}", ""):
        assert page.refusal(Host=host) == page.refusal("choose", good, Host=host) == 403
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port}".replace("http", "https"),
                   f"http://127.0.0.1:{port}.evil.example",
                   f"http://127.0.0.1:{port + 1}", ""):
        assert page.refusal("choose", good, Origin=origin) == page.refusal("state", Origin=origin) == 403
    assert page.refusal("choose") == 405 and page.refusal("state", {}) == page.refusal("", {}) == 404
    assert page.refusal("elsewhere") == page.refusal("state?x=1") == page.refusal("choose/", good) == 404
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert page.refusal("choose", good, Content_Type=kind) == 415
    for body in (b"", b"[]", b"1", b"{", b'{"turn": 1}}', b"\xff", b"[" * 4000, b"{}"):
        assert page.refusal("choose", body) == 400
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"):
        request = f"{method} /{token}/choose HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        assert speak(port, request.encode()).split()[1] == b"501"
    assert served.changes == []
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert json.loads(page.ask("choose", good, Host=host, Origin=f"http://{host}"))["changes"]
    assert len(served.changes) == 2 and json.loads(page.ask("state")) == {"waits": False, "changes": 2}


@pytest.mark.parametrize("head", [
    "Content-Length: 100000000", "Content-Length: 4097", "Content-Length: -1", "Content-Length: x", "",
    "Transfer-Encoding: chunked", "Content-Length: 11\r\nTransfer-Encoding: chunked", "Content-Length: +11",
    "Content-Length: " + "9" * 30])
def test_a_body_that_is_large_or_has_no_length_is_refused_unread(head, served):
    request = (f"POST /{served.server.token}/choose HTTP/1.1\r\nHost: 127.0.0.1:{served.server.server_port}\r\n"
               f"Content-Type: application/json\r\n{head}\r\n\r\n").encode()
    answer = speak(served.server.server_port, request + b'{"turn": 1}' * (8 if "100000000" in head else 1))
    assert answer.split()[1] in (b"411", b"413") and served.changes == []


def test_what_is_no_http_is_survived(served):
    port, token = served.server.server_port, served.server.token
    for data in (b"", b"\0" * 100_000, b"GET", b"GET /\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0",
                 f"GET /{token}/ HTTP/1.1\r\n".encode() + b"X: y\r\n" * 50_000, b"A" * 200_000,
                 f"GET /{token}/\xff HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode("latin-1"),
                 f"POST /{token}/choose HTTP/1.1\r\nHost: a\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode(),
                 f"POST /{token}/choose HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
                 f'Content-Length: 50\r\n\r\n{{"turn": 1}}'.encode()):  # ends too early
        speak(port, data)
    assert served.changes == [] and served.page.ask("choose", {"turn": 1})


def test_slow_and_silent_clients_in_hundreds_keep_nobody_waiting(served, monkeypatch):
    """200 connections that say nothing or a byte now and then: the person's choices go through meanwhile; when their
    time is over they are closed."""
    monkeypatch.setattr(server, "SECONDS", 0.5)
    port, slow = served.server.server_port, []
    for k in range(200):
        slow.append(socket.create_connection(("127.0.0.1", port), 20))
        if k % 2:
            slow[-1].sendall(b"POST /")
    for k in range(5):
        assert json.loads(served.page.ask("choose", {"turn": k}))["changes"] == k + 1
        for s in slow[1::20]:
            with contextlib.suppress(OSError):
                s.sendall(b"a")
    began = time.monotonic()
    for s in slow:
        s.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while s.recv(1000):
                pass
        s.close()
    assert time.monotonic() - began < 10 and len(served.changes) == 5


def test_more_connections_than_there_is_room_for_are_closed(served, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    held = [socket.create_connection(("127.0.0.1", served.server.server_port), 20) for _ in range(3)]
    until = time.monotonic() + 20
    while len(served.server.busy) < 3:
        assert time.monotonic() < until
    assert speak(served.server.server_port, b"GET / HTTP/1.0\r\n\r\n") == b""
    for s in held:
        s.close()
    while served.server.busy:
        assert time.monotonic() < until
    assert served.page.ask("state")


def test_a_client_that_does_not_read_its_answer_is_left(served, monkeypatch):
    monkeypatch.setattr(server, "SECONDS", 0.3)
    monkeypatch.setattr(served.server, "page", b"x" * 50_000_000)
    s = socket.create_connection(("127.0.0.1", served.server.server_port))
    s.sendall(f"GET /{served.server.token}/ HTTP/1.0\r\nHost: 127.0.0.1:{served.server.server_port}\r\n\r\n".encode())
    assert s.recv(1)
    assert served.page.ask("state")
    until = time.monotonic() + 20
    while served.server.busy:
        assert time.monotonic() < until
        time.sleep(0.01)
    s.close()


def test_every_answer_forbids_what_the_page_does_not_need(served):
    """Scripts and styles are those of the file, by their hashes, on every answer, also refusals."""
    port, token = served.server.server_port, served.server.token
    for path, host in ((f"/{token}/", ""), (f"/{token}/state", ""), ("/", ""), (f"/{token}/", "evil.example")):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        found, policy = dict(answer.getheaders()), answer.getheader("Content-Security-Policy")
        assert found["X-Content-Type-Options"] == "nosniff" and found["Cache-Control"] == "no-store"
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert found["Server"] == "minirlhf " or found["Server"] == "minirlhf"
        assert token not in str(found)
        connection.close()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    import base64
    import hashlib
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", served.text, re.S)
        assert len(inside) == 1 and rules[rule] == "'sha256-%s'" % base64.b64encode(
            hashlib.sha256(inside[0].encode()).digest()).decode()


# ---- the page

class Elements(HTMLParser):
    """Elements of the page: (tag, attributes, text)."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in ("meta", "link", "input"):
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data


PAGE = (ROOT / "minirlhf" / "label.html").read_text("utf-8")


def test_every_control_has_a_name_and_no_script_stands_in_an_attribute():
    found = Elements(PAGE).found
    names = {a["data-choice"]: text for tag, a, text in found if tag == "button"}
    assert names.keys() == {*label.CHOICES, "undo", "end"} and all(len(text.strip()) > 2 for text in names.values())
    labels = [text for tag, _, text in found if tag == "label"]
    assert sum(tag == "input" for tag, _, _ in found) == len(labels) == 1 and labels[0].strip()
    ids = {a["id"] for _, a, _ in found if "id" in a}
    assert all(a["aria-labelledby"] in ids for _, a, _ in found if "aria-labelledby" in a)
    assert not any(name.startswith("on") or name == "style" for _, a, _ in found for name in a)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|\.style\b|https?:", PAGE)
    assert next(a for tag, a, _ in found if tag == "html")["lang"] == "en"
    assert {a.get("role") for _, a, _ in found} >= {"alert", "status"}


def test_text_and_borders_of_controls_stand_out():
    """Contrast by WCAG 2.2's formula from the style's own colours, light and dark: 4.5 for text, 3 for what shows where
    a control is and has the focus. The page has no colours of its own."""
    css = re.search(r"<style>(.*?)</style>", PAGE, re.S)[1]
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", re.sub(r"#\w+[^{};]*\{", "{", css))

    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(c * weight for c, weight in zip(parts, (0.2126, 0.7152, 0.0722)))

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=0.001)
    for palette in (chart.LIGHT, chart.DARK):
        for ground in ("paper", "panel"):
            assert all(contrast(palette[text], palette[ground]) >= 4.5 for text in ("ink", "faint"))
            assert all(contrast(palette[mark], palette[ground]) >= 3 for mark in ("ink", "faint", "focus", "line1"))
