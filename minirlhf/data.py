"""JSONL records -> token ids -> right-padded batches, in an order that is a function of (seed, step).

Invariant: prompt and completion are encoded apart and joined as ids, here and everywhere; masks are made from
lengths, never from token ids.

A file holds one JSON object a line; a column that is null is absent. TEXT is a string, taken as it is, or a list of
messages [{"role", "content"}, ...], which become ids in the form of the model that reads them (chat.py).

    file         columns                            what is read
    sft          prompt, completion: TEXT           the completion is trained, given the prompt
                 messages                           the last answer is the completion, what stands before it the prompt
                 messages, completion: TEXT         the messages are the prompt and end with the question
                 text: a string                     all of it is trained; no prompt
    preferences  prompt, chosen, rejected: TEXT     answers to a prompt
                 messages, chosen, rejected: TEXT   the messages are the prompt
                 chosen, rejected: TEXT             what both share is the prompt
                 [prompt or messages,] completions  a ranking, best first: a list of strings
                 [, scores]                         their numbers; equal ones are tied
    prompts      prompt: TEXT                       a list of messages ends before the answer
                 messages                           the same
                 [others]                           a reward function's that asks for them

Answers that stand earlier in a prompt of messages are trained as well, if the stage is not told otherwise. Answers may
be whole conversations, as messages or text, that hold the prompt too: it is read once. Beside messages a string is a
turn, or several where it has "\\n\\nHuman:" in it. What would lose a text is refused: a question under another name
(QUESTIONS), unless its words stand in what is read. All other columns are kept in `extra`.

Left out: streaming and memory mapping. Human feedback fits in memory.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import stat
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf.chat import (ASSISTANT, HUMAN, ROLES, Message, Talk, about, as_text, encode_completion, encode_prompt,
                           end_of)
from minirlhf.config import fail

QUESTIONS = {"prompt", "messages", "question", "questions", "instruction", "instructions", "input", "inputs", "query",
             "system", "system_prompt", "system_message", "user_prompt", "context", "history", "problem", "post",
             "article", "conversation", "conversations", "dialogue", "dialog"}
ANSWERS = ("completion", "answer", "response", "output", "target")  # names of what may answer a "text"
AS_LINES = 'python -c "import csv, json, sys; [print(json.dumps(r)) for r in %s]" OLD > NEW'
AS_UTF8 = ("UTF-16: python -c \"import sys; open(sys.argv[2], 'w', encoding='utf-8').write(open(sys.argv[1], "
           "encoding='utf-16%s').read())\" OLD NEW")
FOREIGN = {  # how files begin that hold no JSON lines
    b"\x1f\x8b": "gzip: gzip -dc < OLD > NEW",
    b"PAR1": 'Parquet: python -c "import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], '
             "orient='records', lines=True)\" OLD NEW",
    b"PK\3\4": "a zip archive: unpack it", b"\x28\xb5\x2f\xfd": "zstd: zstd -dc < OLD > NEW",
    b"BZh": "bzip2: bzip2 -dc < OLD > NEW", b"version https://git-lfs": "a Git LFS pointer: git lfs pull",
    b"<": "a web page: download the file itself", b"\xff\xfe": AS_UTF8 % "", b"\xfe\xff": AS_UTF8 % "",
    b"{\0": AS_UTF8 % "-le", b"[\0": AS_UTF8 % "-le", b"\0": AS_UTF8 % "-be",
    b"[": "one JSON list, not an object a line: " + AS_LINES % "json.load(open(sys.argv[1], 'rb'))",
    b"{\n": "objects over several lines: write one a line", b"{\r": "objects over several lines: write one a line"}
PREPARE = "python -m minirlhf.prepare"
DIALECTS = {  # what other programs' records have, and the way to ours
    ("conversations",): f"ShareGPT: {PREPARE} sharegpt", ("instruction", "output"): f"Alpaca: {PREPARE} alpaca",
    ("question", "answer"): f"questions and answers: {PREPARE} jsonl --prompt_key question --completion_key answer",
    ("prompt", "response", "helpfulness"): f"HelpSteer2: {PREPARE} helpsteer2",
    ("prompt", "response"): f"prompts and responses: {PREPARE} jsonl --completion_key response",
    ("completions", "labels"): "TRL's stepwise supervision: no stage reads labels of steps",
    ("completion", "label"): "TRL's unpaired preference: keep the good ones without 'label', or make pairs",
    ("response_0", "response_1"): f"PKU-SafeRLHF: {PREPARE} pku-saferlhf",
    ("response_1", "response_2"): f"HelpSteer2: {PREPARE} helpsteer2",
    ("history", "human_ref_A", "human_ref_B"): f"SHP: {PREPARE} shp",
    ("summaries", "choice"): f"comparisons of summaries: {PREPARE} summarize-from-feedback"}


@dataclass
class Demonstration:
    prompt: str
    completion: str
    extra: dict = field(default_factory=dict)


@dataclass
class Preference:
    """Texts that answer one prompt, best first; scores, if given, say which are tied (equal scores teach nothing)."""
    prompt: str
    completions: list[str]
    scores: list[float] | None = None
    extra: dict = field(default_factory=dict)

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for all K(K-1)/2 pairs that are not tied.   Ouyang et al. 2022, section 3.5."""
        K, s = len(self.completions), self.scores
        return [(i, j) for i in range(K) for j in range(i + 1, K)
                if (s is None or s[i] > s[j]) and self.completions[i] != self.completions[j]]


# ---- reading

def read_records(path):
    """Yields ("file:line", object) for each line that is not blank. Exits 2 on what is not UTF-8, JSON or an object.

    A pipe is refused: a run reads its files more than once.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        fail(f"{path}: {'may not be read' if isinstance(error, PermissionError) else 'no such file'}")
    if not stat.S_ISREG(mode):
        fail(f"{path}: " + ("a folder; name a file in it" if stat.S_ISDIR(mode) else
                            "a pipe or device, which can be read only once; write what it gives to a file first"))
    if not os.access(path, os.R_OK):
        fail(f"{path}: may not be read")
    with open(path, "rb") as f:
        yield from records_in(f, path)


def records_in(lines, path):
    """The same, of a file's lines."""
    count = 0
    for number, line in enumerate(lines, 1):
        where, reason = f"{path}:{number}", ""
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8").strip()
            if not text:
                continue
            record = json.loads(text)
            if not isinstance(record, dict):
                reason = f"expected an object, found {type(record).__name__}"
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 at byte {error.start} of the line ({error.reason})"
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
        if reason:
            fail(f"{where}: {reason}" + (what_it_is(path, line) if not count else ""))
        count += 1
        yield where, record
    if not count:
        fail(f"{path}: holds no records")


def what_it_is(path, line):
    """What a file seems to be whose first line is no record, and the way out; "" where it does not tell."""
    start = line.lstrip()
    what = next((what for begin, what in FOREIGN.items() if start.startswith(begin)), "")
    if not what and not start.startswith(b"{") and (b"," in start or b"\t" in start):
        what = "CSV: " + AS_LINES % ("csv.DictReader(open(sys.argv[1], newline='')%s)" % (
            "" if b"," in start else ", delimiter='\\t'"))
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.new")
    return "; the file looks like " + what.replace("OLD", old).replace("NEW", new) if what else ""


def clean(text):
    """Lone surrogates, which JSON can hold and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def other_columns(record, *known):
    """What stands beside a row; the scripts print some of it."""
    return {k: clean(v) if isinstance(v, str) else v for k, v in record.items() if k not in known and v is not None}


def refuse(where, record, problem):
    """Exits 2 with the columns that are there, and the dialect that has them."""
    found = ", ".join(repr(name[:40]) for name in [*record][:16]) + ", ..." * (len(record) > 16)
    dialect = next((d for names, d in DIALECTS.items() if all(record.get(n) is not None for n in names)), None)
    question = next((n for n in record if n.lower() in QUESTIONS and "system" not in n and texts_in(record[n])), None)
    way = f"; this looks like {dialect}" if dialect else ""
    if question and not dialect and not present(record, "prompt", "messages"):
        way = f"; name {question!r} 'prompt'"
    fail(f"{where}: {problem}; the record has: {found or 'nothing'}{way}")


def take_text(where, record, name):
    if not isinstance(record.get(name), str):
        found = "is missing" if name not in record else f"must be a string, found {type(record[name]).__name__}"
        refuse(where, record, f"{name!r} {found}")
    return clean(record[name])


def take(where, record, name):
    """-> the text of a column of TEXT, and its messages, None for a string."""
    value = record.get(name)
    if name == "messages" or isinstance(value, list) and (not value or isinstance(value[0], dict)):
        messages = read_messages(where, name, value)
        return as_text(messages), messages
    return take_text(where, record, name), None


def read_messages(where, name, messages) -> list[Message]:
    """[{"role", "content"}, ...] as they stand in a record. Exits 2 on what is none."""
    if not isinstance(messages, list) or not messages:
        fail(f"{where}: {name!r} must be a list of messages that is not empty")
    return [read_message(f"{where}: {name!r}: message {n}", message) for n, message in enumerate(messages, 1)]


def read_message(where, message):
    message = message if isinstance(message, dict) else {}
    role, content, calls = map(message.get, ("role", "content", "tool_calls"))
    if isinstance(content, list) and content:
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type") == "text"
                   for part in content):
            fail(f"{where}: a part of 'content' that is no {{'type': 'text', 'text': ...}}: images and the like cannot "
                 "be read; leave the record out")
        content = "".join(part["text"] for part in content)
    if calls:
        calls = [read_call(where, call) for call in calls if role == "assistant"] if isinstance(calls, list) else None
        if not calls:
            fail(f"{where}: 'tool_calls' must be a list, in a message of the assistant")
        content = "" if content is None else content
    if not isinstance(content, str):
        fail(f"{where} needs a string 'role' and a string 'content'")
    if not isinstance(role, str) or role not in ROLES:
        fail(f"{where}: a role is {', '.join(ROLES)}, found {str(role)[:40]!r}")
    return Message(role, clean(content), tuple(calls or ()))


def read_call(where, call):
    """A call of a tool, as OpenAI's and transformers' records have it, as JSON."""
    call = call.get("function", call) if isinstance(call, dict) else None
    name, arguments = map(call.get, ("name", "arguments")) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        fail(f"{where}: a call in 'tool_calls' needs a string 'name' and an object 'arguments' (of a string, what "
             "json.loads makes of it)")
    return clean('{"name": "%s", "arguments": %s}' % (name, json.dumps(arguments, ensure_ascii=False)))


def open_answer(where, name, messages):
    """Messages as a prompt."""
    if messages and messages[-1].role == "assistant":
        fail(f"{where}: {name!r} must end before the assistant's answer")
    return Talk.prompt(messages, where)


def texts_in(value):
    """All strings in a column that are not blank, however deep, but for the names of roles and of kinds of parts."""
    found, rest = [], [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str) and value.strip():
            found.append(clean(value).strip())
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            rest += [v for k, v in value.items() if k not in ("role", "from", "type")]
    return found


def stands_in(read, text):
    """Whether the text stands in what was read, and not within a word."""
    at = read.find(text)
    while at >= 0:
        end = at + len(text)
        seams = (read[max(at - 1, 0):at], text[0]), (text[-1], read[end:end + 1])
        if not any(a.isalnum() and b.isalnum() for a, b in seams):
            return True
        at = read.find(text, end)
    return False


def lose_nothing(where, record, prompt, texts, used, *also):
    """Exits 2 where a question, or a column named in `also`, holds text that is not in what was read."""
    for name, value in record.items():
        if (name.lower() in QUESTIONS or name in also) and name not in used:
            read = "\n".join([prompt, *texts, *(prompt + text for text in texts)])
            if not all(stands_in(read, text) for text in texts_in(value)):
                refuse(where, record, f"the text of {name!r} would be lost, for no column that is read holds it: put "
                                      "it into one, or leave it out")


def shared_prompt(texts):
    """The prompt that texts share: up to the last "Assistant:" in their common prefix, else to the last whole word."""
    prefix = os.path.commonprefix(texts)
    at = prefix.rfind(ASSISTANT)
    if at >= 0:
        return prefix[:at + len(ASSISTANT)]
    if all(t[len(prefix):len(prefix) + 1].isspace() for t in texts):
        return prefix
    words = prefix.rsplit(None, 1)
    return prefix[:max(len(prefix) - 1 - (len(words[-1]) if words and not prefix[-1].isspace() else 0), 0)]


def turns_of(talk):
    return [turn.strip() for turn in re.split(f"{HUMAN}|{ASSISTANT}", talk)]


def holds(talk, question):
    """Whether the question, with its roles or as the words of one turn, stands in the talk."""
    words = question.strip()
    if HUMAN.strip() in words or ASSISTANT.strip() in words:
        return words in talk
    return bool(words) and words in turns_of(talk)


def doubled(question, texts):
    """Whether all texts begin with the question, as answers by chance do not: up to a blank, or for three words."""
    return (bool(question.strip()) and all(t.startswith(question) for t in texts) and max(texts, key=len) != question
            and (question[-1].isspace() or len(question.split(None, 3)) > 2
                 or all(t[len(question):len(question) + 1].isspace() for t in texts if t != question)))


def in_turns(text):
    """Messages of Human/Assistant text; what stands before the first turn is the system's, without any the user's."""
    first, *turns = re.split(f"({HUMAN}|{ASSISTANT})", text)
    messages = [Message("system" if turns else "user", first)] if first.strip() else []
    for opening, said in zip(turns[::2], turns[1::2]):
        messages.append(Message("user" if opening == HUMAN else "assistant", said.removeprefix(" ")))
    opened = messages and messages[-1].role == "assistant" and not messages[-1].text.strip()
    return messages[:-1] if opened else messages


def answers_to(where, record, asked, texts, talks):
    """-> (prompt, the answers alone). asked: the column of the question, or None; talks: the texts' messages, or Nones.

    Answers that hold the question, as UltraFeedback's do, lose it; those that are turns follow turns.
    """
    shared = shared_prompt(texts)
    whole, rest = (shared if shared.endswith(ASSISTANT) else ""), [t[len(shared):] for t in texts]
    if len({talk is None for talk in talks}) > 1:
        refuse(where, record, "the answers must be strings, or all lists of messages")
    if asked is None and talks[0] is None:
        return shared, rest
    question, messages = take(where, record, asked) if asked else ("", None)
    question = open_answer(where, asked, messages) if messages else question
    if talks[0] is None:
        said = [turn for turn in turns_of(question) if turn][-1:] if HUMAN in question else [question]
        before = whole if whole and holds(whole, question) else ""
        if before:
            texts = rest
        elif said and doubled(said[0], texts):
            texts = [t[len(said[0]):] for t in texts]
        if not messages:
            return before or question, texts
        talks = [[*in_turns(before), Message("assistant", t.removeprefix(" "))] for t in texts]
    prompt, talks = shared_messages(where, record, talks)
    if not prompt or prompt[0].role == "assistant":  # answers alone
        prompt = [*(messages or in_turns(question)), *prompt]
    elif question.strip() and not holds(Talk.prompt(prompt, where), question):
        refuse(where, record, f"{asked!r} is no turn of the conversation that the answers share: keep one of them")
    return Talk.prompt(prompt, where), [Talk.completion(talk, where) for talk in talks]


def shared_messages(where, record, talks):
    """-> the messages that talks share, up to the last answer before which they are the same; the rest of each."""
    last = None
    for n, turn in enumerate(zip(*talks)):
        last = n if all(m.role == "assistant" for m in turn) else last
        if len({*turn}) > 1:
            break
    if last is None or any(talk[-1].role != "assistant" for talk in talks):
        refuse(where, record, "the answers must end with the assistant's, and follow the same messages")
    return talks[0][:last], [talk[last:] for talk in talks]


def present(record, *names):
    """The first of the names whose column is there and not null, or None."""
    return next((name for name in names if record.get(name) is not None), None)


def load_demonstrations(path, trained=True) -> list[Demonstration]:
    """trained: whether each completion is an example to follow; else one that is marked as bad may be among them."""
    rows = []
    for where, record in read_records(path):
        asked, answer = "prompt", present(record, "completion")
        if trained and answer and record.get("label") in (True, False):  # TRL's; 0 and 1 are equal to these
            refuse(where, record, "'label' says which completions are bad, and all would be trained")
        if present(record, "messages"):
            (_, talk), asked = take(where, record, "messages"), "messages"
            if talk[-1].role == "assistant":
                answer, prompt = "messages", Talk.prompt(talk[:-1], where)
                completion = Talk.completion(talk[-1:], where)
            elif not answer:
                fail(f"{where}: 'messages' must end with the assistant's answer")
        elif present(record, "text") and not answer:
            prompt, completion, asked, answer = "", take_text(where, record, "text"), "text", "text"
        if answer in (None, "completion"):
            text, talk = take(where, record, "completion")
            if talk and talk[-1].role != "assistant":
                fail(f"{where}: 'completion' must end with the assistant's answer")
            prompt, (completion,) = answers_to(where, record, asked, [text], [talk])
        also = ANSWERS if asked == "text" else ["completion"]
        lose_nothing(where, record, prompt, [completion], (asked, answer), *also)
        extra = other_columns(record, "prompt", "completion", "text", "messages")
        rows.append(Demonstration(prompt, completion, extra))
    return rows


def load_preferences(path) -> list[Preference]:
    rows = []
    for where, record in read_records(path):
        asked, scores, also = present(record, "prompt", "messages"), None, []
        if present(record, "completions"):
            texts, scores, also = record["completions"], record.get("scores"), ["chosen", "rejected"]
            if present(record, "labels"):
                refuse(where, record, "'labels' of 'completions' say which steps are right, not which answer is better")
            if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
                fail(f"{where}: 'completions' must be a list of two or more strings, best first")
            if scores is not None:
                if not isinstance(scores, list) or len(scores) != len(texts) or not all(
                        type(s) in (int, float) and abs(s) < 1e300 for s in scores):
                    fail(f"{where}: 'scores' must be a list of {len(texts)} numbers, one a completion")
                if any(a < b for a, b in zip(scores, scores[1:])):
                    fail(f"{where}: 'scores' must fall: 'completions' are listed best first")
            texts, talks = [clean(t) for t in texts], [None] * len(texts)
        else:
            texts, talks = zip(*(take(where, record, name) for name in ("chosen", "rejected")))
        if asked == "messages" and take(where, record, asked)[0] in texts:
            asked = None  # the whole conversation once more
        prompt, texts = answers_to(where, record, asked, texts, talks)
        lose_nothing(where, record, prompt, texts, (asked,), *also, *([] if asked else ["text"]))
        extra = other_columns(record, "prompt", "messages", "chosen", "rejected", "completions", "scores")
        rows.append(Preference(prompt, [*texts], scores, extra))
    return rows


class Asked(str):
    """A prompt's text that knows the other columns of its record, for a reward function. So does a Talk."""


def load_prompts(path, columns=False) -> list[str]:
    """columns: each text knows the others of its record, as `columns`, for a reward function that asks for one."""
    rows = []
    for where, record in read_records(path):
        name = present(record, "prompt", "messages") or "prompt"
        text, messages = take(where, record, name)
        text = text if messages is None else open_answer(where, name, messages)
        if columns:
            text = Asked(text) if messages is None else text
            text.columns = other_columns(record, name)
        rows.append(text)
        lose_nothing(where, record, rows[-1], [], (name, "messages", "conversation", "conversations"))
    return rows


load_asked = functools.partial(load_prompts, columns=True)


def fingerprint(*paths) -> str:
    """A short hash of the files' bytes, to tell whether a resumed run has its own data."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def spread(rows, count):
    """`count` of the rows, evenly spread over all of them and in their order; all where it is 0 or they are no more."""
    return [rows[i * len(rows) // count] for i in range(count)] if 0 < count < len(rows) else rows


def repeats(train, val, what):
    """Warnings, with counts, of rows repeated or shared by training and held-out data."""
    repeated, shared = len(train) - len(set(train)), len(set(train) & set(val))
    if repeated:
        yield f"warning: {repeated} of {len(train)} {what} for training are repeats"
    if shared:
        yield f"warning: {shared} {what} stand in both training and held-out data, which flatters the held-out figures"


def blank_ends(prompts, what):
    """A warning, with the count, of prompts that end in a blank: tokens of words begin with theirs."""
    if count := sum(prompt[-1:].isspace() for prompt in prompts):
        yield (f"warning: {count} of {len(prompts)} {what} end in a blank; a prompt should end before it, and its "
               "answer begin with it, as words do")


# ---- columns beside the texts

def number(value):
    """A column's value where it is a finite number, else None: no string, NaN or true."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def label_of(value, taken=("all",)):
    """A short name for tables, on one line, of what a column holds: "movie". Values that differ have names that differ;
    none is one of `taken`, which have "kind " in front, or holds commas, quotes or brackets but in quotes."""
    try:
        text = clean(value) if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        text = "(deep)"
    if not text.isprintable() or text != text.strip() or not text or set(text) & set(",\"'()"):
        text = json.dumps(text)
    if text.replace("kind ", "") in taken:
        return "kind " + text
    return text if len(text) <= 32 else f"{text[:21]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def labels_of(rows, column, default, taken=("all",), most=20):
    """A label a row, `default` where the column is missing; of more than `most` labels the rare ones are "(others)"."""
    labels = [label_of(row.extra[column], taken) if column in row.extra else default for row in rows]
    shown = {label for label, _ in Counter(labels).most_common(most)}
    return [label if label in shown else "(others)" for label in labels]


def doubtful_columns(rows, what):
    """Lines, with counts, of columns beside the texts: those that should hold numbers and do not, and text unread."""
    for name in ("margin", "others_margin"):
        wrong = [row.extra[name] for row in rows if name in row.extra and number(row.extra[name]) is None]
        if wrong:
            yield (f"warning: {name!r} is no number in {len(wrong)} of {len(rows)} {what} (as {label_of(wrong[0])}); "
                   "figures leave it out there")
    unread = Counter(name for row in rows for name, value in row.extra.items()
                     if any(len(text.split(None, 3)) > 2 for text in texts_in(value)))
    if unread:
        yield (f"note: columns of {what} that hold text and are not read: "
               + ", ".join(f"{label_of(name)} ({n})" for name, n in unread.most_common(8)))


# ---- held out

def letters(text):
    """What near-duplicates have in common: letters and digits, lower case."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text.strip()


def opening(record):
    """What decides on which side of a split a record is, in any of its forms: the letters of what is said before the
    first answer, so that the pieces of a conversation stay together; without a prompt, those of its first text."""
    asked = next((value for value in map(record.get, ("prompt", "messages"))
                  if (value.strip() if isinstance(value, str) else value)), None)
    if asked is None:
        asked = next((record[name] for name in ("text", "completion", "chosen", "completions")
                      if record.get(name) is not None), "")
        if isinstance(asked, list) and isinstance(asked[0], str):
            asked = shared_prompt(asked) * ("prompt" not in record) or asked[0]
        elif isinstance(asked, str) and isinstance(record.get("rejected"), str) and "prompt" not in record:
            asked = shared_prompt([asked, record["rejected"]]) or asked
    if isinstance(asked, list):
        before = [*itertools.takewhile(lambda message: message.get("role") != "assistant", asked)]
        return letters(" ".join(texts_in((before or asked)[::-1])))
    return letters(asked.split(ASSISTANT)[0].replace(HUMAN, ""))


def is_held_out(key, share):
    """Whether a key is among the share of all keys that are held out: a function of the two alone."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2 ** 64


def divide(load, path, share):
    """A file's rows -> (for training, held out), by their opening."""
    rows, parts = load(path), ([], [])
    for row, (_, record) in zip(rows, read_records(path), strict=True):
        parts[is_held_out(opening(record), share)].append(row)
    return parts


def files_of_set(stem, data_dir):
    """A set's file for training and that of its held-out rows: STEM.train.jsonl and STEM.val.jsonl, of data_dir unless
    the stem is a path, with a "/" in it. Any other FILE.jsonl is by itself: "" in second place."""
    path = stem if "/" in stem or stem.endswith(".jsonl") else os.path.join(data_dir, stem)
    if path.endswith(".jsonl") and not path.endswith(".train.jsonl"):
        return [path, ""]
    return [f"{path.removesuffix('.train.jsonl')}.{part}.jsonl" for part in ("train", "val")]


def load_parts(load, stem, o):
    """The files of a set (`files_of_set`) or, where there is no second one, two parts of the first
    -> rows for training, rows held out, the file of each, lines to say."""
    paths = files_of_set(stem, o.data_dir)
    if os.path.lexists(paths[1]):
        idle = [f"warning: --val_share has no effect: {paths[1]} is there"] * ("val_share" in getattr(o, "given", ()))
        return *map(load, paths), paths, idle
    train, val = divide(load, paths[0], o.val_share)
    if not train or not val:
        fail(f"{paths[0]}: --val_share {o.val_share:g}: of {len(train) + len(val):,} rows none is left "
             f"{'to be held out' if train else 'for training'}, as those of one prompt stay together: choose another "
             f"share, or write {paths[1] or 'NAME.train.jsonl and NAME.val.jsonl'}")
    missing = f"there is no {os.path.basename(paths[1])}: " if paths[1] else ""
    return train, val, [paths[0]] * 2, [
        f"{missing}{len(val):,} of the {len(train) + len(val):,} rows of {os.path.basename(paths[0])} are held out, by "
        f"a hash of their prompts (--val_share {o.val_share:g})"]


def load_for_training(load, stem, o):
    """The rows of a set's training file, without those that `load_parts` holds out."""
    train, val = files_of_set(stem, o.data_dir)
    return load(train) if os.path.lexists(val) else divide(load, train, o.val_share)[0]


def load_sets(o):
    """The sets of --preferences, one after another -> rows for training, rows held out, [the files of each], lines to
    say.

    Each holds out its own; where that is by the hash, a prompt is on one side in all sets. Of several, rows without a
    "kind" get the set's name for one, so that figures tell them apart.
    """
    files = {os.path.realpath(files_of_set(stem, o.data_dir)[0]) for stem in o.preferences}
    if not o.preferences or len(files) < len(o.preferences):
        fail(f"--preferences {', '.join(o.preferences)}: name each set once, and one at least")
    sets = {stem: load_parts(load_preferences, stem, o) for stem in o.preferences}
    for stem, (*parts, _, _) in sets.items() if len(sets) > 1 else ():
        for p in itertools.chain(*parts):
            p.extra.setdefault("kind", stem)
    asked = {stem: {letters(p.prompt) for p in val if p.prompt.strip()} for stem, (_, val, *_) in sets.items()}
    known = sum(any(letters(p.prompt) in asked[other] for other in sets if other != stem)
                for stem, (train, *_) in sets.items() for p in train)
    train, val, paths, lines = zip(*sets.values())
    return *(list(itertools.chain(*part)) for part in (train, val)), [[*part] for part in zip(*paths)], [
        *dict.fromkeys(itertools.chain(*lines)),
        *[f"warning: {known} records for training answer prompts that another set holds out, which flatters the "
          "held-out figures"] * (known > 0)]


def describe_sets(o):
    """"data/mine/preferences.*.jsonl, more.jsonl": the sets of --preferences."""
    return ", ".join(f"{train.removesuffix('.train.jsonl')}.*.jsonl" if val else train
                     for train, val in (files_of_set(stem, o.data_dir) for stem in o.preferences))


# ---- encoding

@dataclass
class Row:
    """Ids of one prompt and completion, joined: the completion is ids[prompt_length:]. earlier: the (start, stop) of
    answers in the prompt that train as well."""
    ids: list[int]
    prompt_length: int
    trimmed: bool = False
    earlier: tuple[tuple[int, int], ...] = ()

    @property
    def spans(self):
        """(start, stop) of all that trains."""
        return [*self.earlier, (self.prompt_length, len(self.ids))]

    @property
    def trained(self):
        """How many tokens train."""
        return sum(stop - start for start, stop in self.spans)


def encode_row(tokenizer, prompt, completion, block_size, long_prompts, last_turn_only=False):
    """-> Row, or None when it is too long and dropped.

    A prompt that leaves no room is trimmed at its left ("trim") or the row is dropped ("drop"); a completion that is
    too long by itself is cut at its right, and then has no eos. last_turn_only: no earlier answers.
    """
    (p, earlier), c = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, completion)
    long, whole = len(p) + len(c) > block_size, len(p)
    if long:
        if long_prompts == "drop":
            return None
        c = c[:block_size - 1]
        p = trim_left(p, block_size - len(c))
    cut = whole - len(p)  # tokens behind the first one
    earlier = [(max(start - cut, 1), stop - cut) for start, stop in earlier if stop - cut > 1 and not last_turn_only]
    return Row(p + c, len(p), long, tuple(earlier))


def trim_left(prompt, room):
    """The prompt's opening eos and its last tokens, `room` in all."""
    return prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1:]


class Prompt(list):
    """Ids of a prompt that know its whole text, which a reward function gets also where they were trimmed, and the
    token that ends its answer."""

    def __init__(self, ids, text, end):
        super().__init__(ids)
        self.text, self.end = text, end


def encode_prompts(tokenizer, texts, room, long_prompts):
    """-> Prompts, those that fit `room` tokens, and how many did not and were dropped or trimmed."""
    encoded = [Prompt(encode_prompt(tokenizer, text)[0], text, end_of(tokenizer, text)) for text in texts]
    long = sum(len(ids) > room for ids in encoded)
    if long_prompts == "drop":
        return [ids for ids in encoded if len(ids) <= room], long
    return [Prompt(trim_left(ids, room), ids.text, ids.end) for ids in encoded], long


def response_mask(prompt_lengths, lengths, T):
    """(B,) tokens of each prompt, (B,) of the whole row -> mask (B, T-1): True where a decision chose a token of the
    response, its eos included."""
    t = torch.arange(T - 1, device=lengths.device)
    return (t >= prompt_lengths[:, None] - 1) & (t < lengths[:, None] - 1)


def collate(rows: list[Row], eos: int, device="cpu"):
    """-> tokens (B, T) padded on the right with eos, mask (B, T-1) of the decisions that train, lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], True, eos).to(device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    prompt_lengths = torch.tensor([row.prompt_length for row in rows], device=device)
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    for i, row in enumerate(rows):
        for start, stop in row.earlier:
            mask[i, start - 1:stop - 1] = True
    return tokens, mask, lengths


def too_long(rows: list[Row | None], limit, long_prompts):
    """How many rows were dropped or trimmed, as a line for the person, or "" for none."""
    count = sum(row is None or row.trimmed for row in rows)
    what = {"drop": "dropped", "trim": "trimmed at the left, or cut"}[long_prompts]
    return f"{count} of {len(rows)} longer than {limit} tokens: {what}" if count else ""


# ---- preferences, of which a record gives all its pairs

def encode_preferences(tokenizer, preferences, block_size, long_prompts):
    """-> [(rows, pairs, extra)] with pairs as (better, worse) indices into rows; Counter of why records were dropped;
    all rows."""
    kept, dropped, all_rows = [], Counter(), []
    for p in preferences:
        rows = [encode_row(tokenizer, p.prompt, c, block_size, long_prompts) for c in p.completions]
        all_rows += rows
        pairs = [(i, j) for i, j in p.pairs() if rows[i] and rows[j] and rows[i].ids != rows[j].ids]
        if pairs:
            used = sorted({i for pair in pairs for i in pair})
            kept.append(([rows[i] for i in used], [(used.index(i), used.index(j)) for i, j in pairs], p.extra))
        else:
            long = p.pairs() and all(rows[i] is None or rows[j] is None for i, j in p.pairs())
            dropped["too long" if long else "no two texts that differ and are not tied"] += 1
    return kept, dropped, all_rows


def among(records, count):
    """All pairs of about `count` texts, those of records drawn at random, the same in each run -> records.

    Where pairs share texts, as in rankings and in the default data, more pairs come with the same texts.
    """
    chosen = set()
    for i in torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist():
        if len(chosen) >= count:
            break
        chosen |= {tuple(row.ids) for row in records[i][0]}
    found = [(rows, [(i, j) for i, j in pairs if {tuple(rows[i].ids), tuple(rows[j].ids)} <= chosen], extra)
             for rows, pairs, extra in records]
    return [record for record in found if record[1]]


def read_preferences(o, tokenizer, block_size):
    """-> training and held-out records, encoded, and the lines to say of them. Exits 2 where none is left."""
    *parts, paths, lines = load_sets(o)
    sets = []
    for files, part, name in zip(paths, parts, ("training", "held-out")):
        kept, dropped, rows = encode_preferences(tokenizer, part, block_size, o.long_prompts)
        if not kept:
            fail(f"{', '.join(files)}: no record is left: each is longer than the context of {block_size} tokens, or "
                 "its texts are the same or tied")
        sets.append(kept)
        if name == "held-out" and o.num_eval_texts:
            sets[-1] = among(kept, o.num_eval_texts)
            if len(sets[-1]) < len(kept):
                lines.append(f"held-out records: {len(kept) - len(sets[-1]):,} of {len(kept):,} left out, for about "
                             f"{o.num_eval_texts:,} texts are evaluated (--num_eval_texts 0: all)")
        if long := too_long(rows, block_size, o.long_prompts):
            lines.append(f"{name} texts: {long}")
        lines += [f"{name} records dropped, {why}: {count}" for why, count in dropped.items()]
        lines += [*doubtful_columns(part, f"{name} preferences"),
                  *blank_ends([p.prompt for p in part], f"prompts of {name} preferences")]
    n_texts, n_pairs = (sum(len(record[k]) for record in sets[0]) for k in (0, 1))
    head = (f"{len(sets[0]):,} records with {n_texts:,} texts and {n_pairs:,} pairs for training, {len(sets[1]):,} "
            f"records held out, from {describe_sets(o)}")
    lines += [*repeats(*([(p.prompt, *p.completions) for p in part] for part in parts), "preferences"),
              *about(tokenizer, [p.prompt for p in parts[0]], "training records")]
    return *sets, [head, *lines], sum(paths, [])


def encode_demonstrations(parts, paths, o, tokenizer, block_size):
    """-> training rows, held-out rows, held-out demonstrations, and the lines to say. Exits 2 where no row fits."""
    encoded, lines = [], []
    for part, path, name in zip(parts, paths, ("training", "held-out")):
        rows = [encode_row(tokenizer, d.prompt, d.completion, block_size, o.long_prompts, o.last_turn_only)
                for d in part]
        if not any(rows):
            fail(f"{path}: every row is longer than the context of {block_size} tokens; use --long_prompts trim or a "
                 "larger --block_size")
        if long := too_long(rows, block_size, o.long_prompts):
            lines.append(f"{name} rows: {long}")
        lines += [*doubtful_columns(part, f"{name} rows"), *blank_ends([d.prompt for d in part],
                                                                       f"prompts of {name} rows")]
        kept = [(d, row) for d, row in zip(part, rows) if row]
        encoded.append(spread(kept, o.num_eval_texts) if name == "held-out" else kept)
    train_rows, (val, val_rows) = [row for _, row in encoded[0]], zip(*encoded[1])
    head = f"{len(train_rows):,} rows for training, {len(val_rows):,} held out, from {o.data_dir}"
    lines += [*repeats(*([(d.prompt, d.completion) for d in part] for part in parts), "demonstrations"),
              *about(tokenizer, [d.prompt for d in parts[0]], "training rows")]
    return train_rows, val_rows, val, [head, *lines]


# ---- order

class Order:
    """Which rows make batch number `step`: a fresh permutation each epoch, a function of (seed, step) alone.

    Rows of like length meet in a batch (sorted within runs of `pool` batches, then the batches shuffled), which saves
    padding. The last batch of an epoch may be smaller; every row comes once an epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, pool: int = 16):
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self.epoch, self.batches = None, []

    def steps(self, epochs: float, most: int) -> int:
        """Of so many epochs, rounded, one at least; no more than `most`, if that is not 0."""
        steps = max(1, round(epochs * self.steps_per_epoch))
        return min(steps, most) if most else steps

    def batch(self, step: int) -> list[int]:
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self._batches(random.Random(f"order {self.seed} {epoch}"))
        return self.batches[i]

    def _batches(self, rng):
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        run = self.batch_size * self.pool
        rows = [r for i in range(0, len(rows), run) for r in sorted(rows[i:i + run], key=self.lengths.__getitem__)]
        batches = [rows[i:i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rng.shuffle(batches)
        return batches


def endless_batch(n, batch_size, seed, step):
    """Rows of batch `step` of an endless stream of fresh permutations of range(n): always batch_size of them."""
    rows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(place, n)
        if i == 0 or not rows:
            order = list(range(n))
            random.Random(f"prompts {seed} {epoch}").shuffle(order)
        rows.append(order[i])
    return rows
