"""JSONL records -> token ids -> right-padded batches, in an order that is a function of (seed, step).

Invariant: prompt and completion are encoded apart and joined as ids, here and everywhere; masks are made from
lengths, never from token ids.

Records: {"prompt", "completion"}, {"text"}, {"prompt"}, {"prompt", "chosen", "rejected"}, {"prompt", "completions"
[, "scores"]} (best first), {"messages": [{"role", "content"}, ...]}; chosen and rejected may be message lists too.
Where a preference has no prompt, what the texts share is the prompt. Other columns are kept in `extra`.

Left out: streaming and memory mapping. Human feedback fits in memory.
"""
import hashlib
import json
import math
import os
import random
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf.config import fail

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how messages become text: the form of Anthropic's hh-rlhf


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
    """Yields ("file:line", object) for each line that is not blank. Exits 2 on what is not UTF-8, JSON or an object."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        fail(f"{path}: {'may not be read' if os.path.isfile(path) else 'no such file'}")
    count = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                fail(f"{where}: not UTF-8 at byte {error.start} of the line ({error.reason})")
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                fail(f"{where}: not JSON: {error}")
            if not isinstance(record, dict):
                fail(f"{where}: expected an object, found {type(record).__name__}")
            count += 1
            yield where, record
    if not count:
        fail(f"{path}: holds no records")


def clean(text):
    """Lone surrogates, which JSON can hold and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def other_columns(record, *known):
    """What stands beside a row; the scripts print some of it."""
    return {k: clean(v) if isinstance(v, str) else v for k, v in record.items() if k not in known}


def take_text(where, record, name):
    if not isinstance(record.get(name), str):
        found = "is missing" if name not in record else f"must be a string, found {type(record[name]).__name__}"
        fail(f"{where}: {name!r} {found}; the record has: {', '.join(map(repr, record)) or 'nothing'}")
    return clean(record[name])


def join_messages(where, name, messages):
    """[{"role", "content"}, ...] -> text of all messages, each opened by its role."""
    if not isinstance(messages, list) or not messages:
        fail(f"{where}: {name!r} must be a list of messages that is not empty")
    parts = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            fail(f"{where}: {name!r}: a message needs a string 'role' and a string 'content'")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            fail(f"{where}: {name!r}: a role is system, user or assistant, found {role!r}")
        opening = {"user": HUMAN + " ", "assistant": ASSISTANT + " ", "system": ""}[role]
        parts.append(opening + clean(message["content"]))
    return "".join(parts)


def open_answer(where, name, messages):
    """Messages as a prompt: their text, then "Assistant:"."""
    text = join_messages(where, name, messages)
    if messages[-1]["role"] == "assistant":
        fail(f"{where}: {name!r} must end before the assistant's answer")
    return text + ASSISTANT


def load_demonstrations(path) -> list[Demonstration]:
    rows = []
    for where, record in read_records(path):
        if "messages" in record:
            messages = record["messages"]
            text = join_messages(where, "messages", messages)
            if messages[-1]["role"] != "assistant":
                fail(f"{where}: 'messages' must end with the assistant's answer")
            completion = " " + clean(messages[-1]["content"])
            prompt = text.removesuffix(completion)
        elif "text" in record and "completion" not in record:
            prompt, completion = "", take_text(where, record, "text")
        else:
            prompt, completion = take_text(where, record, "prompt"), take_text(where, record, "completion")
        extra = other_columns(record, "prompt", "completion", "text", "messages")
        rows.append(Demonstration(prompt, completion, extra))
    return rows


def shared_prompt(texts):
    """The prompt that texts share: up to the last "Assistant:" in their common prefix, else to the last whole word."""
    prefix = os.path.commonprefix(texts)
    at = prefix.rfind(ASSISTANT)
    if at >= 0:
        return prefix[:at + len(ASSISTANT)]
    while prefix and not all(t[len(prefix):len(prefix) + 1].isspace() for t in texts):
        prefix = prefix[:-1]
    return prefix


def load_preferences(path) -> list[Preference]:
    rows = []
    for where, record in read_records(path):
        if "completions" in record:
            texts, scores = record["completions"], record.get("scores")
            if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
                fail(f"{where}: 'completions' must be a list of two or more strings, best first")
            if scores is not None:
                if not isinstance(scores, list) or len(scores) != len(texts) or not all(
                        type(s) in (int, float) and abs(s) < 1e300 for s in scores):
                    fail(f"{where}: 'scores' must be a list of {len(texts)} numbers, one a completion")
                if any(a < b for a, b in zip(scores, scores[1:])):
                    fail(f"{where}: 'scores' must fall: 'completions' are listed best first")
            texts = [clean(t) for t in texts]
        else:
            for name in ("chosen", "rejected"):
                if isinstance(record.get(name), list):
                    record[name] = join_messages(where, name, record[name])
            texts, scores = [take_text(where, record, "chosen"), take_text(where, record, "rejected")], None
        if "prompt" in record:
            if isinstance(record["prompt"], list):
                prompt = open_answer(where, "prompt", record["prompt"])
                texts = [t.removeprefix(ASSISTANT) for t in texts]
                texts = [t if t.startswith(" ") else " " + t for t in texts]
            else:
                prompt = take_text(where, record, "prompt")
        else:
            prompt = shared_prompt(texts)
            texts = [t[len(prompt):] for t in texts]
        extra = other_columns(record, "prompt", "chosen", "rejected", "completions", "scores")
        rows.append(Preference(prompt, texts, scores, extra))
    return rows


def load_prompts(path) -> list[str]:
    rows = []
    for where, record in read_records(path):
        if "messages" in record:
            rows.append(open_answer(where, "messages", record["messages"]))
        elif isinstance(record.get("prompt"), list):
            rows.append(open_answer(where, "prompt", record["prompt"]))
        else:
            rows.append(take_text(where, record, "prompt"))
    return rows


def fingerprint(*paths) -> str:
    """A short hash of the files' bytes, to tell whether a resumed run has its own data."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def repeats(train, val, what):
    """Warnings, with counts, of rows repeated or shared by training and held-out data."""
    repeated, shared = len(train) - len(set(train)), len(set(train) & set(val))
    if repeated:
        yield f"warning: {repeated} of {len(train)} {what} for training are repeats"
    if shared:
        yield f"warning: {shared} {what} stand in both training and held-out data, which flatters the held-out figures"


# ---- encoding

@dataclass
class Row:
    """Ids of one prompt and completion, joined. The counted decisions choose tokens prompt_length..len(ids)-1."""
    ids: list[int]
    prompt_length: int
    trimmed: bool = False


def encode_row(tokenizer, prompt, completion, block_size, long_prompts):
    """-> Row, or None when it is too long and dropped.

    A prompt that leaves no room is trimmed at its left ("trim") or the row is dropped ("drop"); a completion that is
    too long by itself is cut at its right, and then has no eos.
    """
    p, c = tokenizer.encode_prompt(prompt), tokenizer.encode_completion(completion)
    if len(p) + len(c) > block_size:
        if long_prompts == "drop":
            return None
        c = c[:block_size - 1]
        p = trim_left(p, block_size - len(c))
        return Row(p + c, len(p), trimmed=True)
    return Row(p + c, len(p))


def trim_left(prompt, room):
    """The prompt's opening eos and its last tokens, `room` in all."""
    return prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1:]


def encode_prompts(tokenizer, texts, room, long_prompts):
    """-> ids of the prompts that fit `room` tokens, and how many did not and were dropped or trimmed."""
    encoded = [tokenizer.encode_prompt(text) for text in texts]
    long = sum(len(ids) > room for ids in encoded)
    if long_prompts == "drop":
        return [ids for ids in encoded if len(ids) <= room], long
    return [trim_left(ids, room) for ids in encoded], long


def collate(rows: list[Row], eos: int, device="cpu"):
    """-> tokens (B, T) padded on the right with eos, mask (B, T-1) of the completions' decisions, lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row.ids) for row in rows], True, eos).to(device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    starts = torch.tensor([row.prompt_length for row in rows], device=device)
    t = torch.arange(tokens.shape[1] - 1, device=device)
    return tokens, (t >= starts[:, None] - 1) & (t < lengths[:, None] - 1), lengths


def too_long(rows: list[Row | None], limit, long_prompts):
    """How many rows were dropped or trimmed, as a line for the person, or "" for none."""
    count = sum(row is None or row.trimmed for row in rows)
    what = {"drop": "dropped", "trim": "trimmed at the left, or cut"}[long_prompts]
    return f"{count} of {len(rows)} longer than {limit} tokens: {what}" if count else ""


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
