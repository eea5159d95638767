"""A person's own preferences, or a judge's: `python -m minirlhf.label POLICY --prompts FILE.jsonl --output FILE.jsonl`.

A person sees two answers to a prompt, blind, in a page or a terminal, and chooses; a judge, which is a reward model or
a function, orders any number of them. The output is what train_rm.py reads.

Invariant: a session is its file of choices (choices.py), each of which is there before the next pair shows. So it may
end by anything, and goes on where it was. Pair k is a function of (seed, k), and is drawn while the person reads.

Left out: several people in one file, degrees of preference.
"""
import contextlib
import math
import os
import queue
import random
import select
import signal
import sys
import termios
import threading
import time
import tty
import webbrowser
from typing import NamedTuple

from minirlhf import chart, checkpoint, kernels, mixture, rewards, runtime, server
from minirlhf.chat import about
from minirlhf.choices import PERSON, Choices, Pair, figures, visible
from minirlhf.config import (Parser, all_printed, check_spelling, escaped, fail, launch, one_line, positive_int, say,
                             temperature_number, unprinted)
from minirlhf.data import blank_ends, encode_prompts, endless_batch, load_asked, present, read_records
from minirlhf.generate import generate

BLOCK = 8  # prompts that are answered at a time
AHEAD = 16  # pairs that wait for a person
EVERY = 10  # each such pair is one that was shown before
RECENT = 3  # pairs that are not shown again yet
LONGEST_LINE = 4096  # bytes of standard input
PATIENCE = 40  # blocks in a row without two answers that differ
CHOICES = {"left": [1, 0], "right": [0, 1], "tie": [0, 0], "skip": [0, 0]}  # and the scores of both answers
SAID = {"left": "left is better", "right": "right is better", "tie": "equally good", "skip": "skipped"}
KEYS = {"\x1b[D": "left", "\x1bOD": "left", "l": "left", "\x1b[C": "right", "\x1bOC": "right", "r": "right",
        "\x1b[B": "tie", "\x1bOB": "tie", "t": "tie", "s": "skip", "u": "undo", "q": "end", "\x04": "end"}
ASKED = "left arrow or l, right arrow or r, down arrow or t for a tie, s skip, u undo, q end"
DESCRIPTION = """Preferences between the answers of a policy, or of two, as train_rm.py reads them. A page opens on this
machine: a prompt, two answers, the arrow keys to choose. Each choice is in --output before the next pair shows, and the
same command goes on with that file. With --judge no person is asked."""


def parse(argv=None):
    parser = Parser(prog="python -m minirlhf.label", description=DESCRIPTION)
    parser.add_argument("policy", metavar="POLICY", help="ckpt.pt of train_sft.py or train_ppo.py, its folder, another "
                        "program's model, or the name of a published one")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help='of {"prompt"} or {"messages"} records')
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="where the choices go, as "
                        "data/mine/preferences.train.jsonl; with a file of its own the command goes on")
    parser.add_argument("--against", metavar="POLICY", help="one answer of each pair is this policy's; which one, is "
                        "not shown; how often it is preferred, is")
    parser.add_argument("--judge", metavar="PATH", help="a reward model, or FILE.py:FUNCTION as train_ppo.py --reward "
                        "takes it, that scores the answers in place of a person")
    parser.add_argument("--n", type=positive_int, default=2, help="answers to a prompt, which the judge orders "
                        "(default: 2)")
    parser.add_argument("--num_pairs", type=positive_int, help="end when the file has so many (default: when a person "
                        "says so, or the judge had each prompt once)")
    parser.add_argument("--temperature", type=temperature_number, default=1.0, help="(default: 1)")
    parser.add_argument("--response_length", type=positive_int, help="longest answer in tokens (default: that of "
                        "POLICY's run, or 48)")
    parser.add_argument("--long_prompts", choices=("drop", "trim"), default="drop", help="(default: drop)")
    parser.add_argument("--seed", type=int, default=1337, help="of the prompts' order, the answers and their sides "
                        "(default: 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--terminal", action="store_true", help="ask in this terminal in place of a page")
    parser.add_argument("--port", type=int, default=0, help="of the page, on 127.0.0.1 (default: 0, any that is free)")
    parser.add_argument("--no_browser", action="store_true", help="print the page's address, open nothing")
    a = parser.parse_args(argv)
    for path in (a.policy, a.prompts, a.output, a.against or "", a.judge or ""):
        check_spelling("file", path)
    a.policy, a.against = (path and (path.rstrip("/") or path) for path in (a.policy, a.against))  # as records name it
    if a.against and len({os.path.realpath(checkpoint.file_of(path)) for path in (a.policy, a.against)}) == 1:
        fail(f"--against {a.against}: is POLICY itself; name another, or leave it out for two answers of one")
    if a.n < 2 or a.n > 2 and not a.judge:
        fail(f"--n {a.n}: " + ("there must be two or more to choose from" if a.n < 2 else
                               "a person is shown two answers, only a --judge can order more"))
    if a.temperature == 0 and not (a.against and a.n == 2):
        fail("--temperature 0: a policy's answers to a prompt would all be the same")
    if not 0 <= a.port < 65536:
        fail(f"--port {a.port}: must be from 0 to 65535")
    for name, idle in (("terminal", a.judge), ("port", a.judge or a.terminal), ("no_browser", a.judge or a.terminal)):
        if idle and getattr(a, name):
            fail(f"--{name}: has no effect with --{'judge' if a.judge else 'terminal'}; leave it out")
    return a


# ---- answers

class Writer(NamedTuple):
    """A policy. name: its path, as it was given; answers: how many to a prompt are its."""
    name: str
    model: object
    answers: int


class Answers:
    """What the writers say. prompts: [(as it stands in its record, ids)]; judge: what scores a Rollout, or None. An
    answer to which the judge does not apply is left out."""

    def __init__(self, writers, tokenizer, prompts, judge, run, a):
        self.writers, self.tokenizer, self.prompts = writers, tokenizer, prompts
        self.judge, self.run, self.a = judge, run, a

    def block(self, n):
        """-> Pairs BLOCK * n and those that follow it, a function of (seed, n)."""
        a, numbers = self.a, range(BLOCK * n, BLOCK * (n + 1))
        asked = [self.prompts[endless_batch(len(self.prompts), 1, a.seed, k)[0]] for k in numbers]
        answers = [[] for _ in numbers]  # (text, writer, finished, score)
        for w, writer in enumerate(self.writers):
            rows = [ids for _, ids in asked for _ in range(writer.answers)]
            with self.run.autocast():
                rollout = generate(writer.model, rows, a.response_length, self.tokenizer.eos, a.temperature,
                                   runtime.generator(a.seed, n, w, "label"))
            scores = self.judge(rollout).tolist() if self.judge else [0.0] * len(rows)
            for i, (ids, finished, score) in enumerate(zip(rollout.responses(), rollout.finished.tolist(), scores)):
                i, text = i // writer.answers, self.tokenizer.decode(ids)
                if not isinstance(asked[i][0], str) and not self.tokenizer.form:
                    text = text.removeprefix(" ")  # which stands between "Assistant:" and what is said
                if not math.isnan(score):
                    answers[i].append((text, writer.name, finished, score))
        for k, rows in zip(numbers, answers):
            random.Random(f"sides {a.seed} {k}").shuffle(rows)
        return [Pair(k, prompt, *map(list, zip(*rows))) for k, (prompt, _), rows in zip(numbers, asked, answers)
                if rows]

    def blocks(self, first, stop=10 ** 12):
        """Yields lists of Pairs from number `first` on, without those that leave nothing to choose.

        Raises RuntimeError where that is so of all for long.
        """
        idle = 0
        for n in range(first // BLOCK, math.ceil(stop / BLOCK)):
            pairs = [pair for pair in self.block(n) if first <= pair.number < stop and len(set(pair.texts)) > 1
                     and pair.reads_back()]
            yield pairs
            idle = 0 if pairs else idle + 1
            if idle == PATIENCE:
                raise RuntimeError(f"the answers to each of {PATIENCE * BLOCK} prompts in a row were the same"
                                   + ", or the judge did not apply to them" * bool(self.judge)
                                   + "; raise --temperature")


class Ahead(threading.Thread):
    """Draws pairs while a person reads. `problem`: why it cannot go on, or ""."""

    def __init__(self, answers, first):
        super().__init__(daemon=True)
        self.answers, self.first, self.problem = answers, first, ""
        self.ready, self.ended = queue.Queue(AHEAD), threading.Event()
        for writer in answers.writers:
            writer.model.h[0].register_forward_pre_hook(self.end_if_asked)

    def end_if_asked(self, *_):
        if self.ended.is_set():
            raise InterruptedError

    def run(self):
        try:
            for pair in (pair for block in self.answers.blocks(self.first) for pair in block):
                while True:
                    self.end_if_asked()
                    with contextlib.suppress(queue.Full):
                        self.ready.put(pair, timeout=0.1)
                        break
        except InterruptedError:
            pass
        except SystemExit as stop:
            self.problem = f"exit status {stop.code}, of which the terminal says why"
        except BaseException as error:
            self.problem = f"{type(error).__name__}: {error}"

    def end(self):
        self.ended.set()
        if self.ident:
            self.join()


# ---- a person's session

class Session:
    """What a person sees, chooses and takes back, in whatever way.

    A turn is what is to be seen until something changes. Who chooses names the turn: no key can choose for a pair that
    was not seen.
    """

    def __init__(self, choices, ahead, a):
        self.choices, self.ahead, self.a = choices, ahead, a
        self.turn, self.pair, self.undone, self.since = 0, None, [], 0.0  # undone: pairs to be shown before others
        self.news, self.problem, self.lock, self.ended = "", "", threading.RLock(), threading.Event()

    def own(self):
        return [r for r in self.choices.records if r["judge"] == PERSON]

    def complete(self):
        done = sum("again" not in r and r["choice"] != "skip" for r in self.own())
        return bool(self.a.num_pairs) and done >= self.a.num_pairs

    def show(self, pair):
        self.turn, self.pair, self.since = self.turn + 1, pair, time.monotonic()

    def repeated(self):
        """Where it is time: a pair that was decided before, with its sides exchanged, or None."""
        own = self.own()
        since = next((i for i, r in enumerate(reversed(own)) if "again" in r), len(own))
        told = {r["again"] for r in own if "again" in r}
        known = [r for r in own[:-RECENT] if "chosen" in r and r["pair"] not in told]
        if since < EVERY - 1 or not known:
            return None
        pair = Pair.of(random.Random(f"again {self.a.seed} {len(own)}").choice(known))
        return pair.ordered([1, 0])._replace(again=pair.number)

    def look(self):
        """All that is to be seen, for JSON."""
        with self.lock:
            over, problem, news = self.ended.is_set(), self.problem, self.news
            waits = self.pair is None and not over and not self.complete()
            if waits:
                with contextlib.suppress(queue.Empty):
                    self.show(self.undone.pop() if self.undone else self.repeated() or self.ahead.ready.get_nowait())
                    waits = False
            if waits and self.ahead.problem and self.ahead.ready.empty():
                waits = False
                problem = f"No more answers can be written ({self.ahead.problem}). All choices are saved."
            elif waits:
                news += " One moment: answers are being written."
            elif self.pair is None and not over:
                news += " All are done: undo takes the last one back, end ends."
            return {"turn": self.turn, "pair": self.pair.shown() if self.pair and not over else None, "waits": waits,
                    "undo": self.undoable(), "ended": over, "news": news.strip(), "problem": visible(problem),
                    "file": visible(self.choices.path),
                    "figures": [[visible(name), text] for name, text in figures(self.choices.records, self.a)]}

    def undoable(self):
        return bool(self.choices.records) and self.choices.records[-1]["judge"] == PERSON

    def choose(self, asked):
        """asked: {"turn", "choice"} -> `look`. Raises ValueError where that is no choice."""
        choice = asked.get("choice")
        if not isinstance(choice, str) or choice not in CHOICES:
            raise ValueError(f"no choice: {choice}")
        with self.lock:
            if self.current(asked) and self.pair:
                more = {"choice": choice, "seconds": round(time.monotonic() - self.since, 1)}
                if self.pair.again is not None:
                    more |= {"again": self.pair.again} | self.agreement(choice)
                with self.saving():
                    self.choices.add(self.pair.record(CHOICES[choice], PERSON, self.a.seed, **more))
                    self.news = f"Saved in line {len(self.choices.records)}: {SAID[choice]}."
                    self.show(None)
            return self.look()

    def agreement(self, choice):
        """1 where the same answer was chosen as before, 0.5 where they are tied now. Nothing where this one is skipped,
        or the first one was taken back and not decided again."""
        first = next(r for r in self.own() if r["pair"] == self.pair.again)
        same = choice != first["choice"]  # the sides are exchanged
        return {} if choice == "skip" or "chosen" not in first else {"agrees": 0.5 if choice == "tie" else float(same)}

    def undo(self, asked):
        with self.lock:
            if self.current(asked) and self.undoable():
                with self.saving():
                    record = self.choices.undo()
                    self.undone += [self.pair] if self.pair else []
                    self.news = f"Line {len(self.choices.records) + 1} is taken back: {SAID[record['choice']]}."
                    self.show(Pair.of(record))
            elif not self.undoable():
                self.news = "There is nothing to undo."
            return self.look()

    def end(self, asked):
        with self.lock:
            self.news = "This session has ended; the same command goes on with it."
            self.ended.set()
            return self.look()

    def current(self, asked):
        """Whether what was asked is meant of what is shown, and may be done."""
        if type(asked.get("turn")) is not int:
            raise ValueError("no turn")
        if asked["turn"] != self.turn or self.ended.is_set():
            self.news = "Nothing was changed: another pair is shown by now."
            return False
        return True

    @contextlib.contextmanager
    def saving(self):
        """The file changes first. Where it cannot, nothing else does, and the person is told."""
        try:
            yield
            self.problem = ""
        except OSError as error:
            self.problem = (f"{self.choices.path} could not be written ({error.strerror}). What was chosen last is not "
                            "saved, all before it is: see to it, then choose again.")


# ---- where a person is asked

def in_page(session, a):
    with open(os.path.join(os.path.dirname(__file__), "label.html"), encoding="utf-8") as f:
        page = f.read().replace("LOOK", chart.look(chart.PAGE))
    try:
        served = server.Server(a.port, page, session.look, {
            "choose": session.choose, "undo": session.undo, "end": session.end})
    except OSError as error:
        fail(f"--port {a.port}: cannot be served on ({error.strerror})")
    with served:
        say(f"choose at {served.url} (End there, or Ctrl-C here, ends it)")
        if not a.no_browser and (sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(served.url)
        else:
            all_printed()  # or nobody knows the address
        session.ended.wait()


def in_terminal(session):
    say(f"keys: {ASKED}")
    with pressed_keys() as press:
        told = None
        while not session.ended.is_set() and not unprinted:
            state = session.look()
            if state["waits"]:
                if told != state["news"]:
                    say(told := state["news"])
                time.sleep(0.05)
                continue
            told = None
            for line in as_lines(state):
                say(line)
            if not state["pair"] and state["problem"]:
                return
            choice = press()
            if choice in CHOICES:
                session.choose({"turn": state["turn"], "choice": choice})
            elif choice == "undo":
                session.undo(state)
            elif choice == "end":
                session.end(state)
            else:
                say(f"keys: {ASKED}")


def as_lines(state):
    """Yields what a terminal shows of `Session.look`."""
    yield "\n" + "  ".join(f"{name}: {text}" for name, text in state["figures"])
    yield from (line for line in (state["news"], state["problem"]) if line)
    if pair := state["pair"]:
        shown = (pair["prompt"], *pair["texts"]), ("", *pair["notes"])
        for name, text, note in zip(("prompt", "left", "right"), *shown):
            yield f"{name}:"
            yield from (f"    {escaped(line)}" for line in text.split("\n"))
            yield from [f"    {note}"] if note else []


@contextlib.contextmanager
def pressed_keys():
    """Gives a function that waits for a key and returns what it means, or None. What was pressed before is dropped, for
    the pair was not seen then. Where standard input is no terminal, each line of it is a key or a choice's name."""
    if sys.stdin is None:
        fail("standard input is closed: --terminal takes the choices from it")
    if not sys.stdin.isatty():
        yield from_lines
        return
    terminal = sys.stdin.fileno()

    def press():
        try:
            termios.tcflush(terminal, termios.TCIFLUSH)
            key = os.read(terminal, 64) or b"q"
            while key in (b"\x1b", b"\x1b[", b"\x1bO") and select.select([terminal], [], [], 0.05)[0]:
                key += os.read(terminal, 1)
        except (OSError, termios.error):  # the terminal is gone
            key = b"q"
        key = key.decode("utf-8", "replace")
        return KEYS.get(key, KEYS.get(key.lower()))

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield press
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def from_lines():
    line = sys.stdin.buffer.readline(LONGEST_LINE)
    word = line.decode("utf-8", "replace").strip()
    if len(line) == LONGEST_LINE:
        fail(f"standard input: a line of {LONGEST_LINE} bytes or more; each line is a choice: {ASKED}")
    return (word if word in (*CHOICES, "undo", "end") else KEYS.get(word)) if line else "end"


# ---- a judge

def ask_judge(choices, answers, first, a):
    """Appends a record a prompt, block by block."""
    done = sum(r["judge"] == a.judge for r in choices.records)
    left = max(a.num_pairs - done, 0) if a.num_pairs else len(answers.prompts) - first
    total, began, told = left, time.monotonic(), time.monotonic()
    for pairs in answers.blocks(first, *([] if a.num_pairs else [len(answers.prompts)])) if left > 0 else ():
        pairs = pairs[:left] if a.num_pairs else pairs
        try:
            choices.add(*(pair.record(pair.scores, a.judge, a.seed, scores=sorted(pair.scores, reverse=True))
                          for pair in pairs))
        except OSError as error:
            raise SystemExit(one_line(f"error: --output {a.output}: could not be written ({error.strerror}); the same "
                                      "command goes on with it"))
        left = left - len(pairs) if a.num_pairs else len(answers.prompts) - pairs[-1].number - 1 if pairs else left
        if left <= 0:
            return
        if (now := time.monotonic()) > told + 5:
            told, used = now, now - began
            print(f"{total - left:,} of {total:,} prompts  {runtime.clock(used)}<"
                  f"{runtime.clock(used / max(total - left, 1) * left)}", file=sys.stderr, flush=True)


# ---- the command

def load(a, device):
    """-> the writers, their tokenizer. Exits 2 where two cannot be compared."""
    first, tokenizer, payload = checkpoint.load(a.policy, checkpoint.POLICIES, device)
    a.response_length = a.response_length or payload["options"].get("response_length", 48)
    writers = [Writer(a.policy, first, a.n - a.n // 2 if a.against else a.n)]
    if a.against:
        second, own_tokenizer, _ = checkpoint.load(a.against, checkpoint.POLICIES, device)
        checkpoint.compatible((second, own_tokenizer), a.against, (first, tokenizer), a.policy)
        writers.append(Writer(a.against, second, a.n // 2))
    for writer in writers:
        kernels.pick_matmul(writer.model)
    return writers, tokenizer


def read_prompts(a, tokenizer, block_size):
    """-> [(the prompt as it stands in its record, its ids)]"""
    room = block_size - a.response_length
    if room < 2:
        fail(f"--response_length {a.response_length}: leaves no room for a prompt in a context of {block_size} tokens")
    texts, found, long = load_asked(a.prompts), [], 0
    for text, (_, record) in zip(texts, read_records(a.prompts), strict=True):
        fitting, too_long = encode_prompts(tokenizer, [text], room, a.long_prompts)
        found += [(record[present(record, "prompt", "messages") or "prompt"], ids) for ids in fitting]
        long += too_long
    if not found:
        fail(f"{a.prompts}: no prompt fits {room} tokens; use --long_prompts trim or a shorter --response_length")
    if long:
        say(f"{long} of {len(texts)} prompts are longer than {room} tokens: "
            + {"drop": "dropped", "trim": "trimmed at the left"}[a.long_prompts])
    for line in (*blank_ends(texts, "prompts"), *about(tokenizer, texts, "prompts")):
        say(line)
    return found


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    a = parse(argv)
    all_printed()
    device = runtime.pick_device(a.device)
    run = runtime.Precision(device, "auto")
    writers, tokenizer = load(a, device)
    judge = a.judge and rewards.load(a.judge, "--judge", writers[0].model, tokenizer, a.policy, run)
    prompts = read_prompts(a, tokenizer, writers[0].model.config.block_size)
    if judge:
        mixture.give_columns([judge], [ids for _, ids in prompts], a.prompts)
    answers = Answers(writers, tokenizer, prompts, judge, run, a)
    reads = [a.prompts, *(file for writer in writers for file in checkpoint.files_of(writer.name))]
    choices = Choices(a.output, reads + (rewards.files(a.judge) if a.judge else []))
    begun, first = len(choices.records), 1 + max([-1, *(r["pair"] for r in choices.records)])
    ahead = Ahead(answers, first)
    try:
        if begun:
            say(escaped(f"{a.output}: goes on behind the {begun:,} lines that it holds"))
        if a.judge:
            ask_judge(choices, answers, first, a)
        else:
            with terminated():
                ahead.start()
                session = Session(choices, ahead, a)
                in_terminal(session) if a.terminal else in_page(session, a)
    except RuntimeError as error:
        fail(str(error))
    finally:
        ahead.end()
        choices.close()
        if choices.records:
            for line in closing(choices, begun, a):
                say(escaped(line))
    if ahead.problem:
        raise SystemExit(one_line(f"error: no more answers could be written: {ahead.problem}"))


@contextlib.contextmanager
def terminated():
    """SIGTERM ends a session as Ctrl-C does, with the terminal as it was."""
    def stop(*_):
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def closing(choices, begun, a):
    """Yields what there is to say at the end."""
    yield ""
    yield from (f"{name}: {text}" for name, text in figures(choices.records, a))
    if any("agrees" in r for r in choices.records):
        yield "(a reward model cannot be expected to agree with you more often than you do yourself)"
    new = choices.records[begun:]
    yield f"{a.output}: {len(choices.records):,} lines, {len(new):,} of them new"
    if a.judge and (alike := sum(len({*r["scores"]}) == 1 for r in new)):
        yield f"warning: the judge gave all answers to {alike:,} of {len(new):,} prompts one score: they train nothing"
    folder, name = os.path.split(a.output)
    if name.endswith(".train.jsonl"):
        rm, n = os.path.join("out", os.path.basename(os.path.abspath(folder)), "rm"), 1
        earlier, out_dir = a.policy, rm  # or the reward model of the choices so far
        while os.path.exists(out_dir):
            earlier, n = out_dir, n + 1
            out_dir = f"{rm}{n}"
        words = {"data_dir": folder or ".", "preferences": name.removesuffix(".train.jsonl"), "init_from": earlier,
                 "val_share": 0.2, "out_dir": out_dir}
        yield f"next: {runtime.start_of('train_rm.py')} {' '.join(runtime.option(*word) for word in words.items())}"


if __name__ == "__main__":
    launch(main)
