"""Random and broken input: each file, state or option is refused in one line that names it, or read rightly.

A case is a function of its number. A few hundred run with the fast tests, thousands under the marker `slow`.
"""
import contextlib
import copy
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import zipfile
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from conftest import scratch
from minirlhf import checkpoint, config, data, runtime
from minirlhf.model import GPT, GPTConfig
from minirlhf.tokenizer import EOS, Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle", "ignore:Casting complex", "ignore:Using a non-tuple",
                                         "ignore:TypedStorage")  # torch's, of what it did not write


class Hang(BaseException):
    """A case that takes too long; no handler of Exception swallows it."""


def ring(number, frame):
    raise Hang("not done after 20 seconds")


@contextlib.contextmanager
def case(number):
    """The random numbers of a case, for 20 seconds. A failure names the case."""
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield random.Random(number)
    except (Exception, SystemExit, Hang) as error:
        raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def cases(few, many):
    """Parametrizes `numbers`: a few cases, and under the marker slow many others."""
    return pytest.mark.parametrize("numbers", [
        range(few), pytest.param(range(few, few + many), marks=pytest.mark.slow)], ids=["few", "many"])


def attempt(function, *arguments, statuses=(2,)):
    """-> (result, ""), or (None, the one line on standard error with which it exited)."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return function(*arguments), ""
    except SystemExit as stop:
        line, status = (f"{stop.code}\n", 1) if isinstance(stop.code, str) else (error.getvalue(), stop.code)
        assert status in statuses, (status, line)
        assert line.startswith("error: ") and line.endswith("\n") and len(line.splitlines()) == 1, line
        return None, line


# What cases are made of

PIECES = ["the", " cat", "é", "漢字", " 12", "'ll", "\u0301", "\U0001f600", "👩\u200d👩\u200d👧", "שלום", "\0", "\x1b[1m",
          "\ufeff", "\u2028", "\u00a0", " ", "   ", "\n", "\r\n", "\t", "\n\n", EOS, "<|endof", "\ud83d", "\udc00",
          "\ud83d\ude00", "\udc00\ud83d", "\n\nHuman:", "\n\nAssistant:", "\n\nAssistant: yes", '"', "\\", "{",
          "a" * 70]
FIELDS = ["prompt", "completion", "text", "messages", "chosen", "rejected", "completions", "scores", "role", "content",
          "margin", "kind", "", "\ud800"]
NUMBERS = [0, 1, -1, 3, 0.5, -0.0, 2 ** 63, -10 ** 30, 10 ** 400, 1e300, 1e308, 5e-324, math.nan, math.inf, -math.inf]


def random_text(rng, most=8):
    return "".join(rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000))
                   for _ in range(rng.randrange(most + 1)))


def random_json(rng, depth=3):
    """Any value that json.dumps takes."""
    kind = rng.randrange(6 if depth else 4)
    if kind < 2:
        return random_text(rng)
    if kind < 4:
        return rng.choice([None, True, False, *NUMBERS])
    if kind == 4:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated(rng, content):
    """Bytes that differ from `content`: one place flipped, or a range lost, doubled, replaced, moved, cut or added."""
    while True:
        at, n = rng.randrange(len(content)), rng.choice([1, 1, 2, 3, 16, 64, 512, 4096])
        head, part, tail = content[:at], content[at:at + n], content[at + n:]
        noise = rng.choice([rng.randbytes(n), bytes(n), b"\n", b"\r\n", b"\xef\xbb\xbf", b'"', b"[" * n, b"\xff"])
        other = rng.randrange(len(head) + 1)
        changed = rng.choice([
            head + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:], head + tail, head + part * 2 + tail,
            head + noise + part + tail, head + noise + tail, head, content + noise, head + part[::-1] + tail,
            head[:other] + part + head[other:] + tail])
        if changed != content:
            return changed


def mutated_value(rng, value):
    """A payload or record with one value in it, however deep, replaced by another, left out or doubled."""
    value = copy.copy(value)
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = rng.randrange(10)
        if what == 0:
            del value[key]
        elif what == 1 and isinstance(value, dict):
            value[rng.choice([*FIELDS, 0, 10 ** 6])] = value[key]
        elif what == 1:
            value.append(value[key])
        else:
            value[key] = mutated_value(rng, value[key])
        return value
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return mutated_tensor(rng, value)
    if type(value) in (int, float) and rng.random() < 0.7:
        return rng.choice([*NUMBERS, -value, value + 1, -2, 2.0, str(value), bool(value)])
    other = [None, True, "", "x", "é\n", "漢", b"x", [], {}, [[]], {"a": {}}, (1, 2), torch.zeros(3)]
    return rng.choice([*other, *NUMBERS])


def mutated_tensor(rng, t):
    if t.dim() and rng.random() < 0.3:
        return rng.choice([t[:-1], t[None], t.flatten(), torch.cat([t, t]), t.mT if t.dim() == 2 else t[:0]])
    if rng.random() < 0.3:
        return t.to(rng.choice([torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]))
    t = t.clone()
    t.view(-1)[rng.randrange(t.numel())] = rng.choice([math.nan, math.inf, -math.inf, -1.0, 1e30])
    return t


# The loader: what a file must give, told by other means

OPENINGS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}


class Refused(Exception):
    """A record that does not fit."""


class Open(Exception):
    """A record that holds a text twice, or more texts than one form: test_data says what becomes of these."""


def need(condition):
    if not condition:
        raise Refused


def clear(condition):
    if not condition:
        raise Open


def well_formed(text):
    """Pairs of surrogates are characters, lone ones U+FFFD."""
    need(isinstance(text, str))
    text = re.sub("([\ud800-\udbff])([\udc00-\udfff])", lambda m: chr(
        0x10000 + (ord(m[1]) - 0xd800) * 0x400 + ord(m[2]) - 0xdc00), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def turns(messages):
    """-> [(role, content)]"""
    need(isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages))
    for m in messages:
        need(isinstance(m.get("role"), str) and m["role"] in OPENINGS)
    return [(m["role"], well_formed(m.get("content"))) for m in messages]


def talk(pairs):
    return "".join(OPENINGS[role] + content for role, content in pairs)


def asked(messages):
    pairs = turns(messages)
    need(pairs[-1][0] != "assistant")
    return talk(pairs) + "\n\nAssistant:"


def apart(question, texts):
    """The answers do not begin with the question, nor hold turns that may be it."""
    clear(not question.strip() or not any("\n\nAssistant:" in t or "\n\nHuman:" in question + t
                                          or t.startswith(question.strip()) or t.startswith(question) for t in texts))


def demonstration(record):
    forms = {"prompt", "completion", "text", "messages"} & record.keys()
    if "messages" in record:
        clear(forms == {"messages"})
        *before, (role, answer) = turns(record["messages"])
        need(role == "assistant")
        return talk(before) + "\n\nAssistant:", " " + answer
    if "text" in record and "completion" not in record:
        clear(forms == {"text"})
        return "", well_formed(record["text"])
    need("prompt" in record and "completion" in record)
    clear(not isinstance(record["prompt"], list) and not isinstance(record["completion"], list))
    prompt, completion = well_formed(record["prompt"]), well_formed(record["completion"])
    apart(prompt, [completion])
    return prompt, completion


def preference(record):
    scores, prompt = None, record.get("prompt")
    if "completions" in record:
        clear("chosen" not in record and "rejected" not in record)
        texts, scores = record["completions"], record.get("scores")
        need(isinstance(texts, list) and len(texts) > 1)
        texts = [well_formed(t) for t in texts]
        if scores is not None:
            need(isinstance(scores, list) and len(scores) == len(texts))
            need(all(type(s) in (int, float) and -1e300 < s < 1e300 for s in scores))
            need(sorted(scores, reverse=True) == scores)
    else:
        texts = [turns(t) if isinstance(t, list) else well_formed(t) for t in (record.get("chosen"),
                                                                              record.get("rejected"))]
        need(isinstance(texts[0], list) == isinstance(texts[1], list))
        clear(prompt is None or isinstance(prompt, list) or not isinstance(texts[0], list))
    clear("messages" not in record and (prompt is not None or "text" not in record))
    if isinstance(texts[0], list):
        shared = [n for n in range(min(map(len, texts))) if all(
            pairs[:n] == texts[0][:n] and pairs[n][0] == "assistant" for pairs in texts)]
        need(shared and all(pairs[-1][0] == "assistant" for pairs in texts))
        before, n = [] if prompt is None else turns(prompt), shared[-1]
        need(not before or before[-1][0] != "assistant")
        clear(not before or n == 0 or texts[0][0][0] == "assistant")
        answers = [talk(pairs[n:]).removeprefix("\n\nAssistant:") for pairs in texts]
        return talk(before + texts[0][:n]) + "\n\nAssistant:", answers, scores
    if isinstance(prompt, list):
        question = asked(prompt)
        apart(prompt[-1]["content"] or "x", texts)
        return question, [t if t[:1] == " " else " " + t for t in texts], scores
    if prompt is not None:
        question = well_formed(prompt)
        apart(question, texts)
        return question, texts, scores
    shared = [n for n in range(min(map(len, texts)) + 1) if all(t[:n] == texts[0][:n] for t in texts)]
    turn = [n for n in shared if texts[0][:n].endswith("\n\nAssistant:")]
    word = [n for n in shared if all(t[n:n + 1].isspace() for t in texts)]
    n = max(turn or word or [0])
    return texts[0][:n], [t[n:] for t in texts], scores


def question(record):
    if "prompt" in record:
        return asked(record["prompt"]) if isinstance(record["prompt"], list) else well_formed(record["prompt"])
    return asked(record.get("messages"))


LOADERS = {data.load_demonstrations: (demonstration, {"prompt", "completion", "text", "messages"}),
           data.load_preferences: (preference, {"prompt", "messages", "chosen", "rejected", "completions", "scores"}),
           data.load_prompts: (question, set())}


def expected(content, read, known):
    """-> (what each line that is not blank must give, None), or (None, the first line at fault; 0: the file), or, where
    that is open, (None, None)."""
    rows = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            if line.decode().strip():
                record = json.loads(line.decode().strip())
                need(isinstance(record, dict))
                record = {k: v for k, v in record.items() if v is not None}
                rest = {k: well_formed(v) if isinstance(v, str) else v for k, v in record.items() if k not in known}
                rows.append((read(record), rest))
        except (ValueError, RecursionError, Refused):
            return None, number
        except Open:
            return None, None
    return (rows, None) if rows else (None, 0)


def found(row):
    """A loaded row in the form of `expected`; prompts have no other columns."""
    if isinstance(row, data.Demonstration):
        return (row.prompt, row.completion), row.extra
    if isinstance(row, data.Preference):
        return (row.prompt, row.completions, row.scores), row.extra
    return row, None


def random_messages(rng, last):
    return [{"role": rng.choice(["system", "user", "assistant"]), "content": random_text(rng)}
            for _ in range(rng.randrange(3))] + [{"role": last, "content": random_text(rng)}]


def random_record(rng):
    """A record of one of the forms, fit for one loader or more."""
    forms = [
        {"prompt": random_text(rng), "completion": random_text(rng), "chosen": random_text(rng),
         "rejected": random_text(rng)},
        {"text": random_text(rng), "kind": random_json(rng)},
        {"prompt": random_text(rng), "completions": [random_text(rng), random_text(rng)],
         "scores": sorted(rng.choices([0, 1, 2.5, 10 ** 20, -1e9], k=2), reverse=True)},
        {"messages": random_messages(rng, rng.choice(["user", "assistant"])), "kind": random_json(rng)},
        {"prompt": random_messages(rng, "user"), "chosen": [{"role": "assistant", "content": random_text(rng)}],
         "rejected": [{"role": "assistant", "content": random_text(rng)}]}]
    shared, start = random_messages(rng, "user"), random_text(rng)
    forms.append({name: shared + random_messages(rng, last)[rng.choice([0, -1, -1, -1]):] for name, last in
                  (("chosen", "assistant"), ("rejected", rng.choice(["assistant"] * 7 + ["user"])))})
    forms.append({"completions": [start + random_text(rng) for _ in range(3)], "margin": rng.choice(NUMBERS)})
    return rng.choice(forms)


def random_line(rng):
    """A good record, most often; else one with a fault, any JSON, or what no parser likes."""
    what = rng.randrange(30)
    if what == 0:
        line = json.dumps(random_json(rng))
    elif what == 1:
        deep = rng.choice([5, 200, 100_000])
        line = f'{{"prompt": "a", "completion": "b", "x": {"[" * deep}{"]" * deep}}}'
    elif what == 2:
        number = rng.choice(["9" * 5000, "1e999", "-01", "NaN", "-Infinity"])
        line = f'{{"prompt": "a", "text": "b", "prompt": "c", "margin": {number}}}'
    elif what == 3:
        line = rng.choice(["", "  ", "\r", "\u00a0", "\ufeff", "{}", "null", "{'prompt': 1}"])
    else:
        record = random_record(rng)
        if what < 8:
            record = mutated_value(rng, record)
        ascii_only = rng.random() < 0.7
        return json.dumps(record, ensure_ascii=ascii_only, default=repr).encode("utf-8", "surrogatepass")
    return line.encode()


def random_file(rng):
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    content = rng.choice([b"\n", b"\r\n"]).join(random_line(rng) for _ in range(rng.choice([1, 1, 2, 4])))
    content = rng.choice([b"", b"", b"", b"\xef\xbb\xbf"]) + content + rng.choice([b"", b"\n"])
    for _ in range(rng.choice([0, 0, 1, 3]) if content else 0):
        content = mutated(rng, content) or b"\n"
    return content


@cases(300, 12_000)
def test_loader(numbers, tmp_path):
    """A file gives as many rows as it has lines that are not blank, with the very texts and columns, or is refused at
    the first line at fault. Some of each kind are met."""
    path, refused, accepted = str(tmp_path / "x.jsonl"), 0, 0
    for number in numbers:
        with case(number) as rng:
            content = random_file(rng)
            with open(path, "wb") as f:
                f.write(content)
            for load, (read, known) in LOADERS.items():
                wanted, at = expected(content, read, known)
                rows, error = attempt(load, path)
                if wanted is None and at is None:
                    continue
                if wanted is None:
                    assert rows is None and error.startswith(f"error: {path}:{at}: " if at else f"error: {path}: ")
                    refused += 1
                else:
                    assert not error and len(rows) == len(wanted)
                    for row, (texts, rest) in zip(map(found, rows), wanted):
                        assert row[0] == texts
                        assert row[1] is None or json.dumps(row[1]) == json.dumps(rest)  # where NaN is NaN
                        json.dumps(row[0], ensure_ascii=False).encode()  # no surrogate is left
                    accepted += 1
    assert refused > len(numbers) / 4 and accepted > len(numbers) / 4


# The tokenizer


def check_round_trip(tokenizer, text):
    """Ids in range, none of them eos, that give the text back; rows open and close with eos."""
    ids, whole = tokenizer.encode(text), well_formed(text)
    assert all(type(i) is int and 0 <= i < tokenizer.eos for i in ids)
    assert tokenizer.decode(ids) == whole and tokenizer.count_bytes(ids) == len(whole.encode())
    assert tokenizer.encode_prompt(text) == [tokenizer.eos, *ids]
    assert tokenizer.encode_completion(text) == [*ids, tokenizer.eos]
    assert tokenizer.decode([tokenizer.eos, *ids, tokenizer.eos]) == whole


@cases(30, 1000)
def test_tokenizer(numbers):
    """Trained on any texts, it gives any text back; it is a function of the texts and survives its state. Ids at random
    have a text."""
    for number in numbers:
        with case(number) as rng:
            texts = [random_text(rng, 30) * rng.choice([1, 1, 3]) for _ in range(rng.randrange(12))]
            if rng.random() < 0.05:
                texts.append(rng.choice(["a", "ab", " ", "1", "!", "\0", "é", "\U0001f600", "\ud800"]) * 20_000)
            size = rng.choice([257, 258, 300, 700])
            tokenizer = Tokenizer.train(texts, size)
            assert 257 <= tokenizer.vocab_size <= size and tokenizer.eos == tokenizer.vocab_size - 1
            again = Tokenizer.from_state(tokenizer.state())
            assert again.ranks == tokenizer.ranks == Tokenizer.train(texts, size).ranks
            for text in [*texts, random_text(rng, 30)]:
                check_round_trip(tokenizer, text)
                assert again.encode(text) == tokenizer.encode(text)
            ids = rng.choices(range(tokenizer.vocab_size), k=20)
            tokenizer.decode(ids).encode()
            tokens = [*tokenizer.ranks, EOS.encode()]
            within = ids[ids[0] == tokenizer.eos:20 - (ids[-1] == tokenizer.eos)]  # at its ends eos says nothing
            assert tokenizer.count_bytes(ids) == sum(len(tokens[i]) for i in within)


@cases(40, 1500)
def test_tokenizer_state(numbers):
    """Ranks dropped, doubled, swapped, of another type or alphabet: refused, or a tokenizer of as many tokens as the
    model has, which gives any text back."""
    good = Tokenizer.train(["abab abc"] * 3, 260)
    model = GPT(GPTConfig(1, 1, 4, good.vocab_size, 8))
    payload = {"config": vars(model.config), "head": "lm", "tokenizer": good.state(), "model": model.state_dict()}
    for number in numbers:
        with case(number) as rng:
            state = copy.deepcopy(payload["tokenizer"])
            ranks, at, other = state["ranks"], rng.randrange(259), rng.randrange(259)
            what = rng.randrange(8)
            if what == 0:
                ranks[at], ranks[other] = ranks[other], ranks[at]
            elif what == 1:
                ranks[at] = rng.choice(["", "zz", "漢", "\ud800", ranks[other], "\xff" * 1000, b"a", 7, None, ["a"]])
            elif what == 2:
                ranks.insert(at, ranks.pop(other) + rng.choice(["", "a"]))
            elif what == 3:
                state["name"] = rng.choice(["", "漢", "x" * 10 ** 5])
            elif what == 4:
                state["ranks"] = rng.choice([tuple(ranks), dict.fromkeys(ranks), "".join(ranks), ranks * 2, ranks[:-1]])
            else:
                state = mutated_value(rng, state)
            built, error = attempt(checkpoint.build, {**payload, "tokenizer": state}, "x.pt", "cpu")
            if built is None:
                assert "x.pt" in error
            else:
                assert built[1].vocab_size == model.config.vocab_size
                check_round_trip(built[1], random_text(rng))


# The checkpoint reader


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint as stage 1 writes it -> its bytes."""
    path = str(tmp_path_factory.mktemp("good") / "ckpt.pt")
    tokenizer = Tokenizer.train(["abab"] * 3, 258)
    model = GPT(GPTConfig(1, 2, 4, 258, 8)).init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    checkpoint.save(path, stage="sft", model=model, tokenizer=tokenizer, options=config.RunOptions(), info={"x": 0.5},
                    training={"step": 7, "model": model.state_dict(), "optimizers": [optimizer.state_dict()]})
    return open(path, "rb").read()


@cases(60, 3000)
def test_checkpoint_bytes(numbers, good, tmp_path):
    """A sealed file in which any bytes differ is refused, whatever they are; --resume goes on from the file before it,
    if there is one."""
    path, earlier = str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt.previous.pt")
    options = config.RunOptions(resume=True)
    options.out_dir, options.given = str(tmp_path), set()
    for number in numbers:
        with case(number) as rng:
            content = mutated(rng, good)
            for _ in range(rng.choice([0, 0, 2])):
                content = mutated(rng, content or b"PK")
            if content == good:
                continue
            with open(path, "wb") as f:
                f.write(content)
            payload, error = attempt(checkpoint.read, path, ["sft"])
            assert payload is None and error.startswith(f"error: {path}: ")
            if rng.random() < 0.2:
                resumed, error = attempt(checkpoint.resume, options, "sft", ())
                assert resumed is None and path in error
                with open(earlier, "wb") as f:
                    f.write(good)
                (_, (payload, start)), _ = attempt(checkpoint.resume, options, "sft", ())
                assert start == earlier and payload["training"]["step"] == 7
                os.remove(earlier)


def check_loaded(path, stages=("sft",)):
    """The file is refused, or its model has the weights that the file holds and runs -> whether it was refused."""
    loaded, error = attempt(checkpoint.load, path, stages, "cpu")
    if loaded is None:
        assert error.startswith(f"error: {path}: ")
        return True
    model, tokenizer, payload = loaded
    assert model.head == ("scalar" if payload["stage"] == "rm" else "lm")
    assert model.state_dict().keys() == payload["model"].keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, payload["model"][name].to(value.dtype))
    tokens = torch.tensor([tokenizer.encode_prompt("ab")])
    assert model(tokens).shape == (*tokens.shape, tokenizer.vocab_size)[:2 + (model.head == "lm")]
    check_round_trip(tokenizer, "ab \U0001f600")
    return False


@cases(60, 2000)
def test_checkpoint_payload(numbers, good, tmp_path):
    """One value of a checkpoint replaced, removed or doubled, and the file written anew: refused, or a model with the
    weights that it holds, which runs."""
    path, payload = str(tmp_path / "x.pt"), torch.load(io.BytesIO(good), weights_only=True)
    refused = 0
    for number in numbers:
        with case(number) as rng:
            changed = {**payload, "stage": rng.choice(["sft", "rm"])} if rng.random() < 0.03 else payload
            name = rng.choice(["", "config", "model", "tokenizer"])
            changed = {**changed, name: mutated_value(rng, changed[name])} if name else mutated_value(rng, changed)
            torch.save(changed, path)
            refused += check_loaded(path, ["sft", "rm"])
    assert refused > len(numbers) / 4


class Trap:
    """What a hostile pickle does when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def archive(members):
    """A zip file, uncompressed as torch's, with CRCs that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


@cases(60, 3000)
def test_checkpoint_strangers(numbers, good, tmp_path):
    """Random bytes, JSON, zips and pickles, and a checkpoint whose pickle was changed within a sound zip: refused, or a
    model that runs; what they would have run never does."""
    path, mark = str(tmp_path / "x.pt"), str(tmp_path / "mark")
    with zipfile.ZipFile(io.BytesIO(good)) as opened:
        members = {member.filename: opened.read(member) for member in opened.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    for number in numbers:
        with case(number) as rng:
            thing = rng.choice([random_json(rng), Trap(mark), {"format": 1, "stage": "sft", "model": Trap(mark)}])
            protocol = rng.randrange(6)
            try:
                thing = pickle.dumps(thing, protocol)
            except (pickle.PicklingError, UnicodeEncodeError):  # protocol 0 has no lone surrogates
                thing = pickle.dumps(Trap(mark), protocol)
            content = rng.choice([
                lambda: rng.randbytes(rng.choice([0, 1, 4, 100, 5000])),
                lambda: b"PK\3\4" + rng.randbytes(200) + b"PK\5\6" + bytes(18),
                lambda: json.dumps(random_json(rng)).encode(),
                lambda: thing, lambda: mutated(rng, thing),
                lambda: archive({"x/data.pkl": thing, "x/version": b"3\n"}),
                lambda: archive({**members, pickled: thing}),
                lambda: archive({**members, pickled: mutated(rng, members[pickled])}),
                lambda: archive({**members, pickled: mutated(rng, members[pickled])}),
                lambda: archive(dict(rng.sample(sorted(members.items()), rng.randrange(len(members))))),
            ])()
            with open(path, "wb") as f:
                f.write(content)
            check_loaded(path, ["sft", "rm", "ppo"])
            assert not os.path.exists(mark)
    pickle.loads(pickle.dumps(Trap(mark)))
    assert os.path.exists(mark)  # the trap was a real one


# --resume: what the scripts do with the rest of a checkpoint

TINY = {"sft": "--n_layer 1 --n_head 2 --n_embd 8 --vocab_size 260 --block_size 24 --num_train_epochs 3 "
               "--learning_rate 1e-3 --response_length 4",
        "rm": "--init_from sft --num_train_epochs 3 --num_scale_samples 4 --response_length 4",
        "ppo": "--init_from sft --reward_model rm --total_episodes 24 --num_mini_batches 1 --num_ppo_epochs 1 "
               "--response_length 4 --num_eval_prompts 4 --value_warmup 1"}


def run_script(stage, *arguments):
    """A stage in this process; its signal handlers are not kept. -> the step it began at, and how many it has."""
    script, began = importlib.import_module(f"train_{stage}"), []
    claim, handlers = runtime.Run.start_logs, [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]

    def start_logs(run, step):
        assert 0 <= step <= 3, f"began at step {step} of 3"
        began.append(step)
        claim(run, step)

    argv, sys.argv = sys.argv, [f"train_{stage}.py", "--data_dir", "data", "--out_dir", stage, *arguments]
    runtime.Run.start_logs = start_logs
    try:
        script.main()
    finally:
        sys.argv, runtime.Run.start_logs = argv, claim
        for number, handler in handlers:
            signal.signal(number, handler)
    return began


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which each stage has taken three steps -> that folder, and each stage's payload after the second."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    (folder / "data").mkdir()
    lines = [{"prompt": "the cat", "completion": f" is {word}", "chosen": f" is {word}", "rejected": " is not"}
             for word in ("warm", "cold", "kind", "calm", "rude", "dull", "gray", "blue")]
    for name in ("sft", "preferences", "prompts"):
        for split in ("train", "val"):
            (folder / "data" / f"{name}.{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    os.chdir(folder)
    try:
        for stage, options in TINY.items():
            _, error = attempt(run_script, stage, *scratch(stage), "--device", "cpu", "--dtype=float32", "--batch_size", "8",
                               "--eval_interval", "1", *options.split())
            assert not error
    finally:
        os.chdir(here)
    payloads = {stage: torch.load(folder / stage / "ckpt.previous.pt", weights_only=True) for stage in TINY}
    payloads["sft"]["info"]["nats_per_token"] = 0.0  # the third step is not better: the best of before is saved again
    return folder, payloads


@pytest.mark.parametrize("stage", TINY)
@cases(3, 60)
def test_resume(numbers, stage, trained, tmp_path, monkeypatch):
    """A run goes on from a checkpoint in which one value is another, at the step that it names, and saves one that can
    be used; or ends with one line."""
    folder, payloads = trained
    payload = payloads[stage]
    assert payload["training"]["step"] == 2
    shutil.copytree(folder / "data", tmp_path / "data")
    for name in TINY:
        (tmp_path / name).mkdir()
        shutil.copy(folder / name / "ckpt.pt", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for number in numbers:
        with case(number) as rng:
            part = rng.choice(["training", "training", "training", "info", "environment"])
            changed = {**payload, part: mutated_value(rng, payload[part])}
            torch.save(changed, os.path.join(stage, "ckpt.pt"))
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(stage, "ckpt.previous.pt"))
            began, error = attempt(run_script, stage, "--resume", statuses=(1, 2))  # 1: new weights are not finite
            assert error or began in ([], [changed["training"]["step"]])
            if not error and began:
                checkpoint.load(stage, [stage], "cpu")  # what it saved at its end


# Options


@dataclass
class Options(config.RunOptions):
    """A made-up stage."""
    out_dir: str = "out/x"  # where the output goes
    batch_size: int = 8  # rows a step [1..]
    dropout: float = 0.1  # share of numbers that are dropped [0..1)
    temperature: float = 1.0  # of sampling (0..]
    margin: float = 0.0  # any finite number
    optimizer: Literal["muon", "adamw"] = "muon"  # which one
    shuffle: bool = True  # on unless turned off


FITS = {"device": lambda v: type(v) is str, "dtype": lambda v: v in ("auto", "float32", "bfloat16"),
        "compile": lambda v: type(v) is bool, "seed": lambda v: type(v) is int and v >= 0,
        "resume": lambda v: type(v) is bool, "overwrite": lambda v: type(v) is bool,
        "check": lambda v: type(v) is bool, "out_dir": lambda v: type(v) is str,
        "batch_size": lambda v: type(v) is int and v >= 1, "dropout": lambda v: type(v) is float and 0 <= v < 1,
        "temperature": lambda v: type(v) is float and 0 < v < math.inf,
        "margin": lambda v: type(v) is float and abs(v) < math.inf, "optimizer": lambda v: v in ("muon", "adamw"),
        "shuffle": lambda v: type(v) is bool}
VALUES = ["", "0", "1", "-1", "3", "0.5", "1.0", "1e9", "nan", "inf", "-inf", "1e-400", "9" * 5000, "true", "No", "x",
          "auto", "float32", "adamw", "muon ", "٣", "1_000", "0x1", " 7", "--", "-", "--seed", "%s", "\ud800", "a=b"]


def random_argument(rng):
    name, value = rng.choice([*FITS, "x", ""]), rng.choice([*VALUES, *VALUES[:9], random_text(rng)])
    value = os.fsdecode(value.encode("utf-8", "surrogatepass").replace(b"\0", b""))  # what a shell can hand over
    return rng.choice([[f"--{name}={value}"], [f"--{name}={value}"], [f"--{name}", value], [f"--{name}"],
                       [f"--{name[:-1]}={value}"], [f"-{name}", value], [value], [f"@{value}"]][:rng.choice([4, 8])])


@cases(500, 5000)
def test_options(numbers, tmp_path):
    """Arguments at random, on the command line or in a preset file: options of the right types and within their ranges,
    or exit 2 with a message that begins with the usage or is one line."""
    preset, accepted = tmp_path / "preset.txt", 0
    for number in numbers:
        with case(number) as rng:
            argv = [word for _ in range(rng.randrange(4)) for word in random_argument(rng)]
            if rng.random() < 0.2:
                lines = [rng.choice([" = ", "="]).join(random_argument(rng)) for _ in range(3)]
                preset.write_bytes(rng.choice(["\n", "\r\n", " # x\n"]).join(lines).encode("utf-8", "surrogateescape"))
                argv.insert(0, f"@{preset}")
            error = io.StringIO()
            try:
                with contextlib.redirect_stderr(error):
                    options = config.parse(Options, argv)
            except SystemExit as stop:
                assert stop.code == 2 and re.match("error: .*\n$|usage: ", error.getvalue())
                continue
            assert all(fits(getattr(options, name)) for name, fits in FITS.items()) and not error.getvalue()
            assert all(name in options.given or getattr(options, name) == getattr(Options, name) for name in FITS)
            accepted += 1
    assert accepted > len(numbers) / 10

