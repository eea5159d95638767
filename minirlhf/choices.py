"""Choices between answers, on the disk: the file that `minirlhf.label` writes and train_rm.py reads.

Invariant: a line is what was shown and what was chosen, written and on the disk before anything else happens; all
figures are functions of these lines. Whenever the process dies, the file holds whole lines; at most the last one is
torn, and is cut off at the next start.

A line that shall not train is a ranking with equal scores, of which `data.Preference.pairs` makes none: a tie, a pair
that was skipped, and one shown a second time to measure agreement.
"""
import contextlib
import fcntl
import json
import os
import statistics
import time
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

from minirlhf import chart, runtime
from minirlhf.chat import as_text
from minirlhf.config import fail, say
from minirlhf.data import answers_to, clean, read_messages, records_in
from minirlhf.objectives import wilson_interval

LATELY = 50  # choices whose pace is told
PERSON = "person"  # who judged, in a record
BEGINS = b'{"prompt": '  # each line


class Choices:
    """The records of --output, each on the disk before `add` returns; `undo` takes the last one back.

    One process at a time has the file. Exits 2 where it is not of this command. Raises OSError where it cannot be
    written, and then holds what it held.
    """

    def __init__(self, path, reads):
        self.path, self.records, self.ends, self.made, self.file = path, [], [0], [], None
        if not path.endswith(".jsonl") or os.path.basename(os.path.realpath(path)) in runtime.KEPT:
            fail(f"--output {path}: expected the name of a .jsonl file that is no log of a run")
        if os.path.lexists(path) and not os.path.isfile(path):
            fail(f"--output {path}: is no file; name another")
        for read in filter(os.path.exists, reads):
            if os.path.exists(path) and os.path.samefile(path, read):
                fail(f"--output {path}: is {read}, which this command reads; name another file")
        try:
            while self.file is None:
                self.claim()
            self.read()
        except OSError as error:
            self.close()
            fail(f"--output {path}: cannot be written ({error.strerror})")
        except SystemExit:
            self.close()
            raise
        runtime.RUNS.add(self)  # which tells forked children to `disown`

    def claim(self):
        """Opens the file, with its folder if that is missing, and takes its lock, which ends with the process."""
        folder = os.path.dirname(os.path.abspath(self.path))
        missing, parent = [] if os.path.lexists(self.path) else [self.path], folder
        while not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        self.made = missing
        os.makedirs(folder, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output {self.path}: another session is writing there; end it, or name another file")
        if not self.is_there():  # the session that had it ended meanwhile, and removed it, for it was empty
            self.file.close()
            self.file = None
            return
        for path in missing:
            runtime.sync_folder(os.path.dirname(os.path.abspath(path)))

    def is_there(self):
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        return False

    def read(self):
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        sizes = [*accumulate(map(len, lines))]
        for where, record in records_in(lines, self.path) if lines else ():
            if not is_choice(record):
                self.refuse(where)
            self.records.append(record)
            self.ends.append(sizes[int(where.rpartition(":")[2]) - 1])
        self.ends[-1] = sum(map(len, lines))  # blank lines at the end, if any
        if rest and not is_torn(rest):
            self.refuse(f"{self.path}:{len(lines) + 1}")
        if rest:
            say(f"{self.path}: the last line is not whole, as a crash may leave it, and is cut off")
            self.file.truncate(self.ends[-1])

    def refuse(self, where):
        fail(f"--output {where}: was not written by this command, which goes on with its own files only; name another "
             "file")

    def add(self, *records):
        lines = [clean(json.dumps(runtime.finite(record), ensure_ascii=False) + "\n").encode() for record in records]
        with self.changing():
            data = b"".join(lines)
            while data:  # one call may take only a part
                data = data[self.file.write(data):]
        for record, line in zip(records, lines):
            self.records.append(record)
            self.ends.append(self.ends[-1] + len(line))

    def undo(self):
        """-> the last record, which is no longer there."""
        line = os.pread(self.file.fileno(), self.ends[-1] - self.ends[-2], self.ends[-2])
        with self.changing(line):
            self.file.truncate(self.ends[-2])
        self.ends.pop()
        return self.records.pop()

    @contextlib.contextmanager
    def changing(self, taken=b""):
        """What changes the file is on the disk afterwards, or, where that fails, not in it. taken: off its end."""
        if not self.is_there() or os.fstat(self.file.fileno()).st_size != self.ends[-1]:
            raise OSError(0, "another program has changed or removed it")
        try:
            yield
            os.fsync(self.file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(self.ends[-1] - len(taken))
                self.file.write(taken)
            raise

    def disown(self):
        """In a forked child, as of a judge's function: it must not keep the lock."""
        self.file.close()

    def close(self):
        """Leaves no file and no folder that it made where nothing was chosen."""
        runtime.RUNS.discard(self)
        if self.file and not self.file.closed:
            empty = not os.fstat(self.file.fileno()).st_size and self.is_there()
            for path in self.made if empty else []:
                with contextlib.suppress(OSError):
                    os.remove(path) if path == self.path else os.rmdir(path)
            self.file.close()


# ---- pairs

def is_choice(record):
    kinds = {"pair": int, "writers": list, "finished": list, "judge": str, "prompt": (str, list)}
    kinds |= {"chosen": (str, list), "rejected": (str, list)} if "chosen" in record else {
        "completions": list, "scores": list}
    kinds |= {"choice": str, "seconds": float} if record.get("judge") == PERSON else {}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def is_torn(rest):
    """Whether a last line without its end is the beginning of a record, or the zeros of a block that was never written.
    A whole record of another program's is neither."""
    begun = rest.rstrip(b"\0")
    with contextlib.suppress(ValueError):
        record = json.loads(begun)
        return isinstance(record, dict) and is_choice(record)
    return begun.startswith(BEGINS[:len(begun)])


class Pair(NamedTuple):
    """Answers to a prompt, two or more, in the order in which they are shown; a column an answer.

    prompt: a string or a list of messages, as it stands in its record. again: the number of the pair that this repeats.
    """
    number: int
    prompt: object
    texts: list
    writers: list
    finished: list
    scores: list = ()
    again: int | None = None

    def ordered(self, order):
        texts, writers, finished = ([column[i] for i in order] for column in (self.texts, self.writers, self.finished))
        return self._replace(texts=texts, writers=writers, finished=finished)

    def record(self, scores, judge, seed, /, **more):
        """As a line of the output, best answer first. scores: a number an answer; equal ones are tied."""
        pair = self.ordered(sorted(range(len(scores)), key=lambda i: -scores[i]))
        scores = sorted(scores, reverse=True)
        if len(scores) == 2 and scores[0] > scores[1] and self.again is None:
            texts = pair.texts if isinstance(self.prompt, str) else [
                [{"role": "assistant", "content": text}] for text in pair.texts]
            answers = {"chosen": texts[0], "rejected": texts[1]}
        else:
            answers = {"completions": pair.texts, "scores": scores if self.again is None else [0, 0]}
        return {"prompt": self.prompt, **answers, "writers": pair.writers, "finished": pair.finished,
                "pair": self.number, "judge": judge, "seed": seed,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **more}

    @classmethod
    def of(cls, record):
        """A person's pair as it was shown."""
        texts = record.get("completions") or [record["chosen"], record["rejected"]]
        texts = [text if isinstance(text, str) else text[0]["content"] for text in texts]
        pair = cls(record["pair"], record["prompt"], texts, record["writers"], record["finished"],
                   again=record.get("again"))
        return pair.ordered([1, 0] if record["choice"] == "right" else [0, 1])

    def shown(self):
        """What a person sees of it: prompt, texts, a note to each. What would be invisible, or would turn the direction
        of the page, is written as Python writes it."""
        prompt = clean(self.prompt) if isinstance(self.prompt, str) else as_text(
            read_messages("", "prompt", self.prompt)).strip()
        notes = ["(an empty answer)" if not text.strip() else "" if finished else "(cut: it is longer)"
                 for text, finished in zip(self.texts, self.finished)]
        return {"prompt": visible(prompt), "texts": [*map(visible, self.texts)], "notes": notes}

    def reads_back(self):
        """Whether a reader of preferences finds these answers: it takes such as all begin with the prompt's words to
        hold the prompt."""
        _, texts = answers_to("", {"prompt": self.prompt}, "prompt", self.texts, [None] * len(self.texts))
        return [text.removeprefix(" ") for text in texts] == [text.removeprefix(" ") for text in self.texts]


def visible(text):
    return chart.HIDDEN.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


# ---- figures: functions of the records

def figures(records, a):
    """[(name, text)] of what one judge, the person or a.judge, has chosen."""
    own = [r for r in records if r["judge"] == (a.judge or PERSON)]
    fresh = [r for r in own if "again" not in r]
    words = Counter(r.get("choice") for r in own)
    done = len(fresh) - sum(r.get("choice") == "skip" for r in fresh)
    less = ", ".join(f"{words[word]} {name}" for word, name in (("tie", "tied"), ("skip", "skipped")) if words[word])
    found = [("rankings" if a.judge else "choices", f"{done:,}" + (f" of {a.num_pairs:,}" if a.num_pairs else "")
              + f" ({less})" * bool(less))]
    if seconds := [r["seconds"] for r in own if "seconds" in r][-LATELY:]:
        found.append(("pairs an hour", f"{3600 / max(statistics.median(seconds), 0.1):,.0f}"))
    for name, rates in (("agreement with yourself", [r["agrees"] for r in own if "agrees" in r]),
                        (f"{a.against} preferred to {a.policy}", preferred(fresh, a.against, a.policy))):
        if rates:
            share, (low, high) = sum(rates) / len(rates), wilson_interval(sum(rates), len(rates))
            found.append((name, f"{share:.1%} (95% {low:.1%}-{high:.1%}) of {len(rates):,}"))
    return found


def preferred(records, writer, other):
    """For each record that has answers of both: the share of its pairs in which the writer's is better, ties half."""
    rates = []
    for r in records:
        scores = [1, 0] if "chosen" in r else r["scores"]
        wins = [(x > y) + 0.5 * (x == y) for x, by in zip(scores, r["writers"]) for y, than in zip(scores, r["writers"])
                if (by, than) == (writer, other)]
        if wins and r.get("choice") != "skip":
            rates.append(sum(wins) / len(wins))
    return rates
