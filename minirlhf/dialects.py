"""The sets of records that people have -> demonstrations, preferences and prompts, for `python -m minirlhf.prepare`.

One generator a set, and a table of them at the end. Each takes rows as their publisher wrote them and yields what they
make; what cannot be read as it stands is left out or mended, and `note` counts it either way: nothing in silence. What
is no record of the set at all is refused by file, line and column.

Invariant: what must not stand on both sides of a split (a post, film, conversation, prompt) has a key in common.

Sets of conversations and instructions become messages, which every model sees in its own form; sets of texts to be
continued (TL;DR, film reviews) become strings. Left out: Parquet and CSV, which `prepare` names with the way to lines.
"""
import functools
import hashlib
import html
import math
import re
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from minirlhf.data import clean, letters, number, open_answer, opening, refuse, shared_prompt, take, take_text

MOST_PAIRS = 5  # of one post in SHP, whose largest posts would else outweigh all others
WORDS = (2, 8)  # fewest and most words of a prompt that opens a film review
EMPTY, SAME, TIE = "an empty answer", "both answers are the same", "the answers are tied"
ODD_ROLE = "a role that is neither system, user nor assistant"


class Row(NamedTuple):
    """A record of a set's file."""
    where: str  # "file:line"
    record: dict
    part: str  # "train" or "val" as its publisher divided them, by the file's name; "" where that does not tell
    path: Path


class Made(NamedTuple):
    """What comes of a row. keys: names of what must not be divided, that which decides first."""
    part: str
    keys: list[str]
    sft: list[dict] = []
    preferences: list[dict] = []
    prompts: list[dict] = []


# ---- pieces of records

def said(role, content):
    return {"role": role, "content": content}


def demonstration(prompt, answer, **columns):
    """prompt: text, or a list of messages."""
    record = ({"prompt": prompt, "completion": answer} if isinstance(prompt, str) else
              {"messages": [*prompt, said("assistant", answer)]})
    return record | {name: value for name, value in columns.items() if value is not None}


def preference(prompt, chosen, rejected, **columns):
    """prompt: text, or a list of messages."""
    pair = (chosen, rejected) if isinstance(prompt, str) else ([said("assistant", a)] for a in (chosen, rejected))
    return dict(zip(("prompt", "chosen", "rejected"), (prompt, *pair))) | {
        name: value for name, value in columns.items() if value is not None}


def differ(row, note, chosen, rejected):
    """Whether two answers make a preference; else it is noted why they do not."""
    if not chosen.strip() or not rejected.strip():
        return note(row, EMPTY)
    if chosen == rejected:
        return note(row, SAME)
    if chosen.startswith(rejected) or rejected.startswith(chosen):
        note(row, "one answer is the beginning of the other", "kept")
    return True


def column(row, name, kind, what):
    """A column of a row that must be of a type: a list, dict or whole number."""
    value = row.record.get(name)
    if type(value) is not kind:
        refuse(row.where, row.record, f"{name!r} is missing" if value is None else
               f"{name!r} must be {what}, found {type(value).__name__}")
    return value


def plain(row, note, text):
    """A text without HTML entities, undone however often they were escaped."""
    found = text
    while (undone := html.unescape(found)) != found:
        found = undone
    if found != text:
        note(row, "HTML entities in a text", "undone")
    return found


def fault_of(talk):
    """Why a list of messages is no conversation that ends with an answer, or ""."""
    roles = [m["role"] for m in talk]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        return "an empty conversation"
    if turns[0] != "user":
        return "a conversation that does not begin with the person's turn"
    if any(a == b for a, b in zip(turns, turns[1:])) or "system" in turns:
        return "turns that do not alternate"
    if turns[-1] != "assistant":
        return "the last turn is not the assistant's"
    if not talk[-1]["content"]:
        return EMPTY
    return "an empty turn before the answer" if not all(m["content"] for m in talk) else ""


def key_of(prompt):
    """Of a prompt, text or messages: what near-duplicates and the pieces of a conversation have in common."""
    return opening({"prompt": prompt})


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "system": "system"}


def messages_in(row, name):
    """A column's list of {"role", "content"} or {"from", "value"} -> messages, blanks around them left out, or None
    where a role is of another kind."""
    talk = []
    for m in column(row, name, list, "a list of messages"):
        role, content = (m.get("role", m.get("from")), m.get("content", m.get("value"))) if isinstance(
            m, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            refuse(row.where, row.record, f"{name!r}: a message needs a string 'role' (or 'from') and a string "
                                          "'content' (or 'value')")
        talk.append(said(ROLES.get(role), clean(content).strip()))
    return None if any(m["role"] is None for m in talk) else talk


# ---- the sets

HH = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh_rlhf(rows, note):
    """Conversations that are the same up to the last answer; `kind`: which of the four parts a pair is from."""
    def turns(row, name):
        before, *parts = HH_TURN.split(take_text(row.where, row.record, name))
        talk = [said({"Human": "user"}.get(role, "assistant"), text.strip())
                for role, text in zip(parts[::2], parts[1::2])]
        return [said("assistant", before.strip()), *talk] if before.strip() else talk

    for row in rows:
        chosen, rejected = turns(row, "chosen"), turns(row, "rejected")
        kind = next((name for name in reversed(row.path.parts) if name in HH), None)
        short, long = sorted((chosen, rejected), key=len)
        if chosen == rejected:
            note(row, SAME)
        elif fault := fault_of(chosen) or fault_of(rejected):
            note(row, fault)
        elif len(short) < len(long) and short[:-1] == long[:len(short) - 1]:
            note(row, 'one conversation goes on where the other ends, or "\\n\\nHuman:" stands within an answer')
        elif short[:-1] != long[:-1]:
            note(row, "the conversations differ before the last answer")
        elif differ(row, note, chosen[-1]["content"], rejected[-1]["content"]):
            prompt, answers = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
            yield Made(row.part, [key_of(prompt)], [demonstration(prompt, answers[0], domain=kind)],
                       [preference(prompt, *answers, kind=kind)], [{"prompt": prompt}])


def summarize(rows, note):
    """TL;DR posts with their own summaries, and comparisons of summaries, of news (`kind` cnn) as well.

    Several workers may have judged one pair: `worker` and `confidence` stay beside it. Of comparisons the summaries of
    policy "ref", which people wrote, are demonstrations too.
    """
    def answer(row, text):
        text = clean(text)
        if text.strip() and text == text.lstrip():
            note(row, "a summary without its leading blank", "given one")
        return " " + text.strip() if text.strip() else ""

    def question(row, info):
        kind = "tldr" if info.get("post") is not None else "cnn"
        names = ("subreddit", "title", "post") if kind == "tldr" else ("title", "article")
        texts = {name: take_text(row.where, info, name).strip() for name in names if name != "title" or info.get(name)}
        title = f"TITLE: {texts['title']}\n\n" if texts.get("title") else ""
        if kind == "cnn":
            return kind, f"{title}ARTICLE: {texts['article']}\n\nTL;DR:", texts["article"]
        return kind, f"SUBREDDIT: r/{texts['subreddit']}\n\n{title}POST: {texts['post']}\n\nTL;DR:", texts["post"]

    for row in rows:
        r = row.record
        info = column(row, "info", dict, "an object") if "summaries" in r or "info" in r else r
        kind, prompt, text = question(row, info)
        keys, prompts = [f"post {take_text(row.where, info, 'id')}", letters(text)], [{"prompt": prompt}]
        if info is r:
            summary = answer(row, take_text(row.where, r, "summary"))
            if summary or note(row, EMPTY):
                yield Made(row.part, keys, [demonstration(prompt, summary)], [], prompts)
            continue
        pair, choice = column(row, "summaries", list, "a list"), column(row, "choice", int, "0 or 1")
        if choice not in (0, 1) or len(pair) != 2 or not all(
                isinstance(s, dict) and isinstance(s.get("text"), str) for s in pair):
            refuse(row.where, r, "'summaries' must be two objects with a 'text', and 'choice' 0 or 1")
        confidence = number(r["extra"].get("confidence")) if isinstance(r.get("extra"), dict) else None
        if confidence is None:
            note(row, "a choice without its confidence", "kept")
        part = {"train": "train"}.get(r["split"], "val") if isinstance(r.get("split"), str) else row.part
        chosen, rejected = answer(row, pair[choice]["text"]), answer(row, pair[1 - choice]["text"])
        people = [answer(row, s["text"]) for s in pair if s.get("policy") == "ref"]
        if differ(row, note, chosen, rejected):
            yield Made(part, keys, [demonstration(prompt, text) for text in people if text], [preference(
                prompt, chosen, rejected, confidence=confidence, worker=r.get("worker"), kind=kind)], prompts)


@functools.cache
def films(folder):
    """The film of each review in train/pos and the like, as urls_pos.txt beside it has them; [] where it is not."""
    path = folder.parent / f"urls_{folder.name}.txt"
    return re.findall(r"/title/(\w+)", path.read_text("latin-1")) if path.is_file() else []


def imdb(rows, note):
    """Film reviews: whole ones as demonstrations; a favourable one (7 to 10) goes before an unfavourable one (1 to 4)
    of the same part, each in one pair; prompts are the first words of rated ones."""
    waiting = defaultdict(deque)  # (part, whether favourable) -> reviews without a partner
    for row in rows:
        index, rating = map(int, row.path.stem.split("_"))
        text = clean(row.record["text"])
        review = re.sub(r"\s*(<br\s*/?>\s*)+", "\n\n", text).strip()
        if "<br" in text:
            note(row, "line breaks written as <br />", "made line breaks")
        if not review:
            note(row, "an empty review")
            continue
        known = films(row.path.parent)
        if index >= len(known):
            note(row, "a review whose film is not known (urls_*.txt is missing or too short)", "split by its own text")
        keys = ([f"film {known[index]}"] if index < len(known) else []) + [letters(review)]
        rated = row.path.parent.name in ("pos", "neg")
        yield Made(row.part, keys, [demonstration("", review, domain=row.path.parent.name, rating=rating or None)])
        if not rated:
            continue
        words = review.split()
        count = WORDS[0] + hashlib.sha256(review.encode()).digest()[0] % (WORDS[1] - WORDS[0] + 1)
        if len(words) > count:
            prompt = " ".join(words[:count])
            yield Made(row.part, [*keys, letters(prompt)], prompts=[{"prompt": prompt}])
        if 4 < rating < 7:
            note(row, "a rating between 4 and 7", "no preference made of it")
            continue
        waiting[row.part, rating > 5].append((rating, review, keys))
        both = waiting[row.part, True], waiting[row.part, False]
        if all(both):
            (high, chosen, own), (low, rejected, other) = (queue.popleft() for queue in both)
            yield Made(row.part, own + other, [], [preference("", chosen, rejected, margin=high - low)])


def shp(rows, note):
    """Questions on Reddit and two answers, of which the one has more votes; `kind` is the forum, `margin` the base-2
    logarithm of how many times as many votes."""
    pairs = Counter()
    for row in rows:
        r = row.record
        history, *answers = (plain(row, note, take_text(row.where, r, name)).strip()
                             for name in ("history", "human_ref_A", "human_ref_B"))
        if (label := column(row, "labels", int, "0 or 1")) not in (0, 1):
            refuse(row.where, r, "'labels' must be 1 where A is preferred, else 0")
        post = take_text(row.where, r, "post_id")
        if r.get("score_A") is not None and r.get("score_A") == r.get("score_B"):
            note(row, TIE)
            continue
        chosen, rejected = answers if label else answers[::-1]
        if not history:
            note(row, "an empty question")
        elif differ(row, note, chosen, rejected):
            pairs[hash(post)] += 1
            if pairs[hash(post)] > MOST_PAIRS:
                note(row, f"a post that has {MOST_PAIRS} pairs already")
                continue
            kind = re.sub("_(train|validation|test)$", "", str(r.get("domain") or row.path.parent.name))
            ratio = number(r.get("score_ratio"))
            margin = round(math.log2(ratio), 3) if ratio and ratio > 0 else None
            prompt = [said("user", history)]
            yield Made(row.part, [f"post {post}", key_of(prompt)], [demonstration(prompt, chosen, domain=kind)],
                       [preference(prompt, chosen, rejected, margin=margin, kind=kind)], [{"prompt": prompt}])


NVIDIA_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def helpsteer2(rows, note):
    """Two answers to a prompt, in two rows with ratings (`kind` helpfulness) or in one with the strength of the
    preference (`kind` preference); `margin` is by how much."""
    def question(row):
        first, *parts = NVIDIA_TURN.split(take_text(row.where, row.record, "prompt"))
        return [said("user", first.strip()), *(said({"User": "user"}.get(role, "assistant"), text.strip())
                                               for role, text in zip(parts[::2], parts[1::2]))]

    def made(row, prompt, answers, margin, kind):
        """answers: the better one first."""
        part = {"train": "train", "validation": "val"}.get(row.record.get("split"), row.part)
        fault, pairs = fault_of([*prompt, said("assistant", answers[0])]), []
        if fault:
            return note(row, fault)
        if len(answers) == 1 or not margin:
            note(row, TIE if len(answers) > 1 else "a prompt with one answer only", "a demonstration only")
        elif differ(row, note, *answers):
            pairs = [preference(prompt, *answers, margin=margin, kind=kind)]
        yield Made(part, [key_of(prompt)], [demonstration(prompt, answers[0])], pairs, [{"prompt": prompt}])

    def rated(pending):
        pending = sorted(pending, key=lambda rated: -rated[2])  # of equal ones the first stays first
        row, prompt, *_ = pending[0]
        return made(row, prompt, [text for *_, text in pending], pending[0][2] - pending[-1][2], "helpfulness")

    pending = []  # rows of the prompt at hand: (row, prompt, helpfulness, answer)
    for row in rows:
        r = row.record
        in_pairs = "response" not in r and "preference_strength" in r
        prompt = question(row)
        if pending and (in_pairs or len(pending) == 2 or pending[0][1] != prompt or pending[0][0].path != row.path):
            yield from rated(pending)
            pending = []
        if in_pairs:
            strength = column(row, "preference_strength", int, "a whole number")
            answers = [take_text(row.where, r, name).strip() for name in ("response_1", "response_2")]
            yield from made(row, prompt, answers if strength <= 0 else answers[::-1], abs(strength), "preference")
        else:
            answer = take_text(row.where, r, "response").strip()
            pending.append((row, prompt, column(row, "helpfulness", int, "a whole number"), answer))
    if pending:
        yield from rated(pending)


def alpaca(rows, note):
    """An instruction, with or without an input below it, and what should be answered."""
    for row in rows:
        instruction, output = (take_text(row.where, row.record, name).strip() for name in ("instruction", "output"))
        below = take_text(row.where, row.record, "input").strip() if row.record.get("input") is not None else ""
        if not output or not instruction:
            note(row, EMPTY if instruction else "an empty instruction")
            continue
        prompt = [said("user", f"{instruction}\n\n{below}" if below else instruction)]
        yield Made(row.part, [key_of(prompt)], [demonstration(prompt, output)], [], [{"prompt": prompt}])


def sharegpt(rows, note):
    """Conversations, whole; ids x_0, x_1, ... are pieces of one. What the assistant says before the person does, and a
    last turn without an answer, are cut off."""
    for row in rows:
        talk = messages_in(row, "messages" if "conversations" not in row.record else "conversations")
        if talk is None:
            note(row, ODD_ROLE)
            continue
        system = talk[:1] if talk[:1] and talk[0]["role"] == "system" else []
        turns = talk[len(system):]
        if turns and turns[0]["role"] == "assistant":
            note(row, "the first turn is the assistant's", "that turn cut off")
            turns = turns[1:]
        if turns and turns[-1]["role"] == "user":
            note(row, "the last turn is not the assistant's", "that turn cut off")
            turns = turns[:-1]
        talk = [m for m in system if m["content"]] + turns
        if fault := fault_of(talk):
            note(row, fault)
            continue
        name = row.record.get("id")
        piece = [f"talk {re.sub(r'_[0-9]+$', '', name)}"] if isinstance(name, str) and name else []
        yield Made(row.part, [*piece, key_of(talk)], [{"messages": talk}], [], [{"prompt": talk[:-1]}])


def ultrafeedback(rows, note):
    """Two conversations that differ in the last answer, the prompt once more beside them; `margin`: of the scores."""
    for row in rows:
        r = row.record
        chosen, rejected = messages_in(row, "chosen"), messages_in(row, "rejected")
        if chosen is None or rejected is None:
            note(row, ODD_ROLE)
            continue
        asked = take_text(row.where, r, "prompt").strip() if r.get("prompt") is not None else None
        high, low = number(r.get("score_chosen")), number(r.get("score_rejected"))
        margin = None if high is None or low is None else round(high - low, 3)
        if margin is None:
            note(row, "a pair without scores", "kept")
        if fault := fault_of(chosen) or fault_of(rejected):
            note(row, fault)
        elif chosen[:-1] != rejected[:-1]:
            note(row, "the conversations differ before the last answer")
        elif asked is not None and asked not in [m["content"] for m in chosen if m["role"] == "user"]:
            note(row, "'prompt' is no turn of the conversations")
        elif margin is not None and margin <= 0:
            note(row, TIE if margin == 0 else "the chosen answer has the lower score")
        elif differ(row, note, chosen[-1]["content"], rejected[-1]["content"]):
            prompt, answers = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
            yield Made(row.part, [key_of(prompt)], [demonstration(prompt, answers[0])],
                       [preference(prompt, *answers, margin=margin)], [{"prompt": prompt}])


def pku_saferlhf(rows, note):
    """Two preferences of a pair: `kind` better, and `kind` safer. A demonstration is what both prefer."""
    for row in rows:
        prompt, *answers = (take_text(row.where, row.record, name).strip()
                            for name in ("prompt", "response_0", "response_1"))
        found = {kind: column(row, f"{kind}_response_id", int, "0 or 1") for kind in ("better", "safer")}
        if not {*found.values()} <= {0, 1}:
            refuse(row.where, row.record, "'better_response_id' and 'safer_response_id' must be 0 or 1")
        if not prompt:
            note(row, "an empty question")
        elif differ(row, note, *answers):
            asked, agreed = [said("user", prompt)], found["better"] == found["safer"]
            if not agreed:
                note(row, "the better answer is not the safer one", "both preferences kept, no demonstration")
            yield Made(row.part, [key_of(asked)],
                       [demonstration(asked, answers[found["better"]])] if agreed else [],
                       [preference(asked, answers[i], answers[1 - i], kind=kind) for kind, i in found.items()],
                       [{"prompt": asked}])


def jsonl(rows, note, keys):
    """Any records of objects. keys: {our name: the column's name}, of prompt, completion, chosen, rejected, kind,
    group. A row with chosen and rejected makes a preference, one with a completion a demonstration."""
    for row in rows:
        r, (asked, completion, chosen, rejected, kind, group) = row.record, (keys[name] for name in JSONL_KEYS)
        answers = [name for name in (completion, chosen, rejected) if r.get(name) is not None]
        if r.get("label") in (True, False) and answers == [completion] or r.get("labels") is not None:
            refuse(row.where, r, "no column says which answer of a prompt is better")
        if (chosen in answers) != (rejected in answers) or not answers and r.get(asked) is None:
            refuse(row.where, r, f"{rejected if chosen in answers else chosen if rejected in answers else asked!r} is "
                                 "missing")
        texts = {name: take(row.where, r, name)[0] for name in answers}
        values = {name: r[name] if isinstance(r[name], list) else texts[name] for name in answers}
        if r.get(asked) is not None:
            prompt, talk = take(row.where, r, asked)
            if talk:
                open_answer(row.where, asked, talk)  # which it must be possible to do
                prompt = r[asked]
        else:
            prompt = shared_prompt([texts[chosen], texts[rejected]]) if chosen in answers else ""
            values = {name: value[len(prompt):] if isinstance(value, str) else value for name, value in values.items()}
            if any(isinstance(value, list) for value in values.values()):
                refuse(row.where, r, f"{asked!r} is missing, and messages are cut from no answer")
        if len({isinstance(value, list) for value in values.values()}) > 1:
            refuse(row.where, r, "the answers must be strings, or all lists of messages")
        marks = {"kind": r.get(kind)} if r.get(kind) is not None else {}
        own = [] if r.get(group) is None else [f"group {r[group]}"]
        own += [key_of(prompt)] if isinstance(prompt, list) or prompt.strip() else map(letters, texts.values())
        sft, pairs = [], []
        if completion in answers:
            if texts[completion].strip() or note(row, EMPTY):
                sft.append({"prompt": prompt, "completion": values[completion]} | (
                    {"domain": marks["kind"]} if marks else {}))
        if chosen in answers and differ(row, note, texts[chosen], texts[rejected]):
            pairs.append({"prompt": prompt, "chosen": values[chosen], "rejected": values[rejected]} | marks)
        if sft or pairs or not answers:
            yield Made(row.part, own or [""], sft, pairs, [{"prompt": prompt}] if prompt else [])


JSONL_KEYS = ("prompt", "completion", "chosen", "rejected", "kind", "group")
RECORDS = r"^(?!.*dataset_infos?\.json).*\.jsonl?(\.gz)?$"


class Dialect(NamedTuple):
    read: Callable[..., Iterator[Made]]
    about: str  # what it is, for --help and README.md
    files: str = RECORDS  # those of a folder that are its own


SETS = {
    "hh-rlhf": Dialect(hh_rlhf, "Anthropic's conversations, with the better of two answers",
                       r"^(?!.*red-team).*\.jsonl?(\.gz)?$"),
    "summarize-from-feedback": Dialect(
        summarize, "OpenAI's comparisons of summaries, and the TL;DR posts of tldr_3_filtered",
        r"^(?!.*axis_evals).*\.jsonl?(\.gz)?$"),
    "imdb": Dialect(imdb, "film reviews with ratings (aclImdb)", r"(^|/)(pos|neg|unsup)/\d+_\d+\.txt$"),
    "shp": Dialect(shp, "Stanford's questions on Reddit, and which of two answers got more votes"),
    "helpsteer2": Dialect(helpsteer2, "NVIDIA's answers with ratings, and preferences with their strength",
                          r"^(?!.*(disagreements|dataset_info)).*\.jsonl?(\.gz)?$"),
    "alpaca": Dialect(alpaca, "instructions and what should be answered, one JSON list"),
    "sharegpt": Dialect(sharegpt, "conversations, also in minimind's form"),
    "ultrafeedback": Dialect(ultrafeedback, "pairs of conversations with scores, binarized, converted from Parquet"),
    "pku-saferlhf": Dialect(pku_saferlhf, "pairs of answers, which is better and which is safer"),
    "jsonl": Dialect(jsonl, "any objects with columns for prompt and answers"),
}
