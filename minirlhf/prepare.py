"""Other people's records -> the JSON-lines files that the scripts read: `python -m minirlhf.prepare NAME`.

NAME is the default data (sentiment.py) or a set that people have (dialects.py). Here is what both share, a data folder
that is complete or not there, and what the sets share: their files are read twice and row by row, first to learn what
is held out, then to write the rest, so that memory grows with the keys of rows and not with their texts.

Invariant: no record for training has a key (post, film, conversation, prompt) in common with one that is held out.
"""
import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import stat
import tempfile
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path

from minirlhf.config import Parser, fail, launch, ranks, say
from minirlhf.data import clean, is_held_out, label_of, records_in, texts_in, what_it_is
from minirlhf.dialects import JSONL_KEYS, SETS, Row
from minirlhf.fetch import sha256_of
from minirlhf.runtime import clock, fcntl, option, start_of
from minirlhf.sentiment import ARCHIVE, FILES, make_data, table

VAL_SHARE = 0.05  # of the keys, where a set has no held-out files of its own
STEMS = ("sft", "preferences", "prompts")
HELD_OUT = {"test", "valid", "validation", "val", "eval", "dev"}  # words in the names of held-out files
SEVERAL = 40  # source files that README.md lists one by one; of more it has one hash
STALE = 60  # seconds
BLANK = re.compile(r"[ \t\r\n]*")  # of JSON
spell = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one of these each time


# ---- a folder that is complete or not there

@contextlib.contextmanager
def new_folder(data_dir, overwrite, sources=()):
    """A folder beside `data_dir`, to be written into, which takes its place at the end. `sources`: what is read."""
    data_dir = Path(data_dir).resolve()
    try:
        held = sorted(path.name for path in data_dir.iterdir()) if data_dir.exists() else []
    except NotADirectoryError:
        fail(f"--data_dir {data_dir}: is a file; name a folder")
    except OSError as error:
        fail(f"--data_dir {data_dir}: cannot be read ({error.strerror})")
    if data_dir.name == ARCHIVE:
        fail(f"--data_dir {data_dir}: has the name of the archive that the data are made from; name another folder")
    for source in sources:
        own = [data_dir, *(data_dir / name for name in held)]
        if any(os.path.samefile(source, path) for path in own if os.path.exists(source) and path.exists()):
            fail(f"--source {source}: lies in --data_dir {data_dir}, which is replaced; move it elsewhere")
        if Path(source).resolve() in data_dir.parents:
            fail(f"--data_dir {data_dir}: lies in --source {source}, whose files are all read; name another folder")
    if held and not overwrite:
        fail(f"--data_dir {data_dir}: the folder is not empty; pass --overwrite to replace it")
    if foreign := [name for name in held if name not in FILES + ["README.md"]]:
        fail(f"--data_dir {data_dir}: holds {foreign[0]}, which is not prepare's to replace; name another folder")
    absent = [folder for folder in data_dir.parents if not folder.exists()]
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(data_dir)
        with tempfile.TemporaryDirectory(prefix=f".{data_dir.name}.", dir=data_dir.parent) as temporary:
            with locked(temporary, or_not=True):
                made = Path(temporary) / data_dir.name
                made.mkdir()
                yield made
                if data_dir.exists():
                    os.replace(data_dir, made.with_name(f"{made.name}.old"))  # deleting it in place could stop halfway
                os.replace(made, data_dir)
    except OSError as error:
        fail(f"cannot prepare {data_dir}: {error}")
    finally:
        for folder in absent:
            with contextlib.suppress(OSError):  # where something has come of it
                folder.rmdir()


@contextlib.contextmanager
def locked(folder, or_not=False):
    """A folder's lock, which a process that dies lets go. Raises OSError where another has it, or, unless or_not, where
    the file system knows no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError if or_not else ()):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_stale(data_dir):
    """Removes the unfinished folders that killed processes have left beside `data_dir`."""
    parts = {data_dir.name, f"{data_dir.name}.old", f"{data_dir.name}.lines"}
    for path in data_dir.parent.glob(f".{glob.escape(data_dir.name)}.????????"):
        with contextlib.suppress(OSError):  # another process is at work in it, or has just removed it
            if time.time() - path.stat().st_mtime > STALE and {*os.listdir(path)} <= parts:
                with locked(path):
                    shutil.rmtree(path)


def sentiment(data_dir="data/sentiment", seed=0, source=None, overwrite=False):
    """Writes the folder `data_dir`: eight files of records and a README.md. `source`: the archive, if it is at hand."""
    with new_folder(data_dir, overwrite, [source] if source else []) as made:
        files, readme = make_data(Path(data_dir).resolve().parent, seed, source)
        for name, records in files.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (made / name).write_text("".join(lines), encoding="utf-8", newline="\n")
        (made / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    say(f"wrote {Path(data_dir).resolve()}; its README.md says what is in it")


def ensure(data_dir):
    """Prepares the default data where they are missing. Of several ranks the first does; the others wait in Run."""
    if not os.path.isdir(data_dir) and ranks()[0] == 0:
        sentiment(data_dir)


# ---- files of a set

def find_files(sources, wanted):
    """-> [(path, part)] of the files that are named, or in folders that are, those whose path fits `wanted`. part: as
    the set's publisher divided it, "train" or "val", "" where no name tells."""
    found = {}
    for source in map(Path, sources):
        try:
            mode = source.stat().st_mode
        except (OSError, ValueError) as error:
            fail(f"--source {source}: {'may not be read' if isinstance(error, PermissionError) else 'no such file'}")
        if stat.S_ISREG(mode):
            found[source] = part_of(Path(source.name))
        elif not stat.S_ISDIR(mode):
            fail(f"--source {source}: a pipe or device, which can be read only once; write what it gives to a file")
        else:
            inside = sorted(Path(folder, name) for folder, _, names in os.walk(source) for name in names)
            visible = [path for path in inside if not any(
                part.startswith(".") for part in path.relative_to(source).parts)]
            own = [path for path in visible if re.search(wanted, path.relative_to(source).as_posix())]
            if not own:
                fail(f"--source {source}: no file of this set is in it" + other_files(visible))
            found |= {path: part_of(path.relative_to(source)) for path in own}

    def place(path):  # files 0_9.txt of all folders before files 1_2.txt: of either kind there soon is one
        return int(re.match("[0-9]{0,9}", path.name)[0] or 0), str(path)
    return [(path, found[path]) for path in sorted(found, key=place)]


def part_of(path):
    """"val" or "train", by the nearest name in a path that tells, or ""."""
    for name in reversed(path.parts):
        words = {*re.split("[^a-z]+", name.lower())}
        if words & HELD_OUT or "train" in words:
            return "val" if words & HELD_OUT else "train"
    return ""


def other_files(paths):
    """What a folder has in place of a set's files, and the way out."""
    endings = Counter(path.suffix for path in paths)
    what = ", ".join(f"{n:,} {ending or 'without an ending'}" for ending, n in endings.most_common(4))
    first = next((path for path in paths if path.suffix == ".parquet"), None)
    way = f"; {what_it_is(first, b'PAR1').removeprefix('; the file looks like ')}" if first else ""
    return f" (files: {what}){way}" if what else ", nor any other"


class Meter:
    """A line every 5 seconds: how much of the files has been read, time used and time left."""

    def __init__(self, files, passes):
        self.sizes = {path: os.path.getsize(path) for path, _ in files}
        self.total, self.before, self.rows = passes * sum(self.sizes.values()), 0, 0
        self.began = self.told = time.monotonic()

    def __call__(self, position):
        self.rows += 1
        if self.rows % 256 == 0 and (now := time.monotonic()) > self.told + 5:
            self.told, done, used = now, self.before + position, now - self.began
            say(f"{100 * done // self.total:>3}% of {self.total / 1e6:,.0f} MB  {clock(used)}<"
                f"{clock(used / max(done, 1) * max(self.total - done, 0))}")


def read_rows(files, max_rows, meter, notes):
    """Yields Rows; of each file no more than its even share of max_rows, if that is not 0."""
    share = max_rows // len(files) if max_rows else None
    for path, part in files:
        with opened(path, notes) as (f, raw):
            for where, record in itertools.islice(f, share):
                meter(raw.tell())
                notes.row = Row(where, record, part, path)
                yield notes.row
        meter.before += meter.sizes[path]


@contextlib.contextmanager
def opened(path, notes):
    """-> (iterator over ("file:line", object) of a file of JSON lines, one JSON list or, .txt, one text, compressed or
    not; the file itself). Exits 2 where it is something else."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            if path.suffix == ".gz" and not zipped:
                notes(Row(str(path), {}, "", path), "a file named .gz that is none", "read as it is")
            f = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 16) if zipped else raw
            start = f.peek(4096)[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
            what = what_it_is(path, start.splitlines()[0] + b"\n" if start else b"")
            if path.suffix == ".txt":
                yield [(str(path), {"text": decoded(f.read(), path)})], raw
            elif start.startswith(b"[") and not start.startswith(b"[\0"):
                yield items_in(f, path), raw
            elif what:
                fail(f"{path}: {what.removeprefix('; ')}" + f"; unpack it first: gzip -d {shlex.quote(str(path))}"
                     * zipped)
            else:
                yield records_in(f, path), raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fail(f"{path}: compressed, and damaged or cut short ({error}); fetch it again")
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror or error})")


def decoded(data, path):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}:{data.count(10, 0, error.start) + 1}: not UTF-8 at byte {error.start} of the file "
             f"({error.reason})")


class Text:
    """A file's text, read piece by piece. text[at:]: what is not used yet; line: that in which `text` begins."""

    def __init__(self, f, path):
        self.f, self.path, self.decoder = f, path, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.line, self.bytes = "", 0, 1, 0

    def read(self):
        """Reads on, as much again as is not used yet, so that long items take linear time; False at the end."""
        piece, left = self.f.read(max(1 << 16, len(self.text) - self.at)), self.text[self.at:]
        self.line, self.at = self.here(), 0
        try:
            new = self.decoder.decode(piece, not piece)
        except UnicodeDecodeError as error:
            line = self.line + left.count("\n") + error.object.count(10, 0, error.start)
            start = self.bytes - len(self.decoder.getstate()[0]) + error.start
            fail(f"{self.path}:{line}: not UTF-8 at byte {start} of the file ({error.reason})")
        self.text = left + (new if self.bytes else new.removeprefix("\ufeff"))
        self.bytes += len(piece)
        return bool(piece)

    def sign(self):
        """The next character that is no blank, or "" at the end."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.read():
                return self.text[self.at:self.at + 1]

    def here(self):
        return self.line + self.text.count("\n", 0, self.at)

    def stop(self, reason):
        fail(f"{self.path}:{self.here()}: {reason}")


def items_in(f, path):
    """Yields ("file:line", object) of one JSON list."""
    text, scan, count = Text(f, path), json.JSONDecoder().raw_decode, 0
    text.sign()  # the list's [
    while True:
        text.at += 1
        if text.sign() == "]" and not count:
            fail(f"{path}: holds no records")
        try:
            record, end = scan(text.text, text.at)
        except RecursionError as error:
            text.stop(f"not JSON: {error}")
        except json.JSONDecodeError as error:  # a fault, or where what was read so far ends
            place = f"in item {count + 1}, character {error.pos - text.at + 1} of it"
            cut = error.msg.startswith("Unterminated string") or error.pos > len(text.text) - 16
            if not cut or not text.read():
                text.stop(f"not JSON: {error.msg} {place}")
            text.at -= 1  # once more
            continue
        if not isinstance(record, dict):
            text.stop(f"expected an object, found {type(record).__name__}")
        count += 1
        yield f"{path}:{text.here()}", record
        text.at = end
        if text.sign() == "]":
            text.at += 1
            if text.sign():
                text.stop("the list ends, and more follows")
            return
        if text.sign() != ",":
            text.stop(f"expected , or ] behind item {count}, found {text.sign()!r}" if text.sign() else
                      f"the list is cut short behind item {count}")


# ---- what is found, and what is written

class Notes:
    """{(what was found, what was done): [times, where first]}; the row that was read last."""

    def __init__(self):
        self.found, self.row = {}, None

    def __call__(self, row, what, done="left out"):
        self.found.setdefault((what, done), [0, row.where])[0] += 1

    def rows(self):
        return [[what, done, f"{n:,}", f"`{where}`"] for (what, done), (n, where) in
                sorted(self.found.items(), key=lambda item: -item[1][0])]


class Lines:
    """The lines of a file, kept on the disk in the order they come in, written in a random one."""

    def __init__(self, path):
        self.name, self.file, self.starts, self.kinds = path.name, open(path, "w+b"), array("Q", [0]), Counter()

    def add(self, line, kind):
        self.file.write(line)
        self.starts.append(self.starts[-1] + len(line))
        self.kinds[kind] += 1

    def __len__(self):
        return len(self.starts) - 1

    def write(self, path):
        self.file.flush()
        order = [*range(len(self))]
        random.Random(f"order {path.name}").shuffle(order)
        with open(path, "wb") as out:
            for i in order:
                out.write(os.pread(self.file.fileno(), self.starts[i + 1] - self.starts[i], self.starts[i]))
            out.flush()
            os.fsync(out.fileno())


def learn_what_is_held_out(found, share):
    """found: Made -> hashes of the keys that are held out, and whether by the set's own division, which counts where it
    has both parts and no share is asked for."""
    own, drawn, parts = set(), set(), set()
    for made in found:
        hashes = [*map(hash, made.keys)]
        parts.add(made.part)
        own.update(hashes if made.part == "val" else ())
        drawn.update(hashes if is_held_out(made.keys[0], share or VAL_SHARE) else ())
    divided = share is None and "val" in parts and len(parts) > 1
    return own if divided else drawn, divided


def write_lines(found, held, divided, share, folder, notes):
    """Writes what is found into files in `folder`, which it makes -> {(stem, part): Lines}."""
    folder.mkdir()
    lines = {(stem, part): Lines(folder / f"{stem}.{part}") for stem in STEMS for part in ("train", "val")}
    seen, orders = {stem: set() for stem in STEMS}, {}
    for made in found:
        val = made.part == "val" if divided else is_held_out(made.keys[0], share or VAL_SHARE)
        if not val and not held.isdisjoint(map(hash, made.keys)):
            notes(notes.row, "for training, with a post, film, conversation or prompt that is held out")
            continue
        for stem in STEMS:
            for record in getattr(made, stem):
                line = clean(spell(record) + "\n").encode()
                if hash(line) in seen[stem]:
                    if stem != "prompts":
                        notes(notes.row, f"a record that is in {stem} already")
                    continue
                seen[stem].add(hash(line))
                if stem == "preferences" and in_both_orders(record, orders):
                    notes(notes.row, "a pair that is in preferences in the other order", "kept, both")
                kind = record.get("kind", record.get("domain"))
                lines[stem, "val" if val else "train"].add(line, "" if kind is None else label_of(kind))
    return lines


def with_odd_characters_noted(rows, notes):
    """The rows. Every text that is read from them goes through `clean`."""
    for row in rows:
        text = spell(row.record)
        if "\\u0000" in text and any("\0" in part for part in texts_in(row.record)):
            notes(row, "a row with NUL in a text", "kept")
        if clean(text) != text:
            notes(row, "a row with a lone surrogate in a text", "made U+FFFD")
        yield row


def in_both_orders(record, orders):
    """Whether a pair of this kind came before with the other answer chosen. orders: {pair: the answer chosen first}."""
    chosen, rejected = hash(str(record["chosen"])), hash(str(record["rejected"]))
    pair = hash((str(record["prompt"]), str(record.get("kind")), min(chosen, rejected), max(chosen, rejected)))
    return orders.setdefault(pair, chosen) != chosen


def prepare(name, sources, data_dir, max_rows=0, val_share=None, overwrite=False, keys=None):
    """Writes the folder `data_dir` of a set's files. keys: of `jsonl`, {our name: the column's}."""
    read = functools.partial(SETS[name].read, keys=keys) if keys else SETS[name].read
    files = find_files(sources, SETS[name].files)[:max_rows or None]
    with new_folder(data_dir, overwrite, sources) as folder:
        meter, notes, ignored = Meter(files, 2), Notes(), Notes()
        say(f"reading {len(files):,} file{'s' * (len(files) > 1)} of {meter.total / 2e6:,.1f} MB, for what is held out")
        held, divided = learn_what_is_held_out(read(read_rows(files, max_rows, meter, ignored), ignored), val_share)
        counted = meter.rows
        say(f"reading {counted:,} rows again, and writing")
        found = read(with_odd_characters_noted(read_rows(files, max_rows, meter, notes), notes), notes)
        lines = write_lines(found, held, divided, val_share, folder.with_name(f"{folder.name}.lines"), notes)
        said = []
        for stem in STEMS:
            train, val = (lines[stem, part] for part in ("train", "val"))
            for part in filter(len, (train, val) if train else ()):
                part.write(folder / f"{part.name}.jsonl")
            if val and not train:
                said.append(f"no {stem} files: {len(val):,} such records are held out, but none is left for training")
            if train and not val:
                said.append(f"no {stem}.val.jsonl: none of these records is held out; the scripts hold out some of "
                            f"{stem}.train.jsonl (--val_share)")
        if not any(folder.iterdir()):
            why = "; ".join(f"{what} ({n} times, first {where[1:-1]})" for what, _, n, where in notes.rows()[:3])
            fail(f"--source {sources[0]}: of {counted:,} rows no record for training is left: {why or 'nothing odd'}")
        split = ("Files or rows that their publisher named test, valid, validation, val, eval or dev are held out."
                 if divided else f"A share of {val_share or VAL_SHARE:g} of the posts, films, conversations or prompts "
                 "is held out, by a hash of each.")
        readme = describe(
            name, files, lines, notes, split=split, read=f"{counted:,}", said=said,
            command=command_of(name, sources, max_rows, val_share, keys),
            limit=f" (--max_rows {max_rows}: the first ones of each file)" if max_rows else "")
        (folder / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    say(f"wrote {data_dir}; its README.md says what is in it; next: {start_of('train_sft.py')} "
        f"{option('data_dir', data_dir)}")


# ---- what was made

README = """\
# {name}: {about}

Made by

    {command}

The texts are other people's: their terms, and whom to cite, stand where you have them from.

## Where it comes from

{sources}

{read} rows were read{limit}.

## Records

{records}

{columns}

## How it was split

{split} No record for training has its post, film, conversation or prompt in common with one that is held out, letter
case, blanks and punctuation apart: those that had were left out, and are counted below. The order of the records is
random, and the same each time.
{said}
## What was found in the rows

{found}
"""
COLUMNS = {
    "sft": "`messages`, the last of which is the answer", "preferences": "`prompt`, `chosen` and `rejected`, lists of "
    "messages", "prompts": "`prompt`, a list of messages that ends before the answer"}
COLUMNS_OF_TEXTS = {
    "sft": "`prompt` and `completion`", "preferences": "`prompt`, `chosen` and `rejected`", "prompts": "`prompt`"}
ALSO = {"sft": "\n  `domain` breaks down the held-out loss", "preferences": "\n  `kind` and `margin`, how much better "
        "the chosen answer is, break down the accuracy; other columns are as they were", "prompts": ", each once"}


def describe(name, files, lines, notes, said, **words):
    """README.md, and the counts on the screen."""
    written = [of for (stem, _), of in lines.items() if of and lines[stem, "train"]]
    records = table(["file", "records", "of kind"], *(
        [f"{of.name}.jsonl", f"{len(of):,}", ", ".join(f"{kind} {n:,}" for kind, n in of.kinds.most_common(20) if kind)]
        for of in written))
    found = table(["found", "what was done", "times", "first"], *notes.rows()) if notes.found else "Nothing odd."
    say(f"\n{records}\n\n{found}\n")
    for line in said:
        say(line)
    listed = [(path, os.path.getsize(path), sha256_of(path)) for path, _ in files]
    if len(listed) > SEVERAL:
        paths, sizes, hashes = zip(*listed)
        listed = [(f"{paths[0]} ... {paths[-1]}: {len(paths):,} files", sum(sizes),
                   f"{hashlib.sha256(''.join(hashes).encode()).hexdigest()} (of their SHA-256s)")]
    columns = COLUMNS_OF_TEXTS if name in ("summarize-from-feedback", "imdb", "jsonl") else COLUMNS
    return README.format(
        name=name, about=SETS[name].about, records=records, found=found, **words,
        sources=table(["file", "bytes", "SHA-256"], *([path, f"{size:,}", sha256] for path, size, sha256 in listed)),
        columns="\n".join(f"- `{stem}.*`: {columns[stem]}{ALSO[stem]}" for stem in STEMS if lines[stem, "train"]),
        said="".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in said))


def command_of(name, sources, max_rows, val_share, keys):
    given = {"max_rows": max_rows or None, "val_share": val_share} | {
        f"{ours}_key": theirs for ours, theirs in (keys or {}).items() if theirs != ours}
    return " ".join(["python -m minirlhf.prepare", name, "--source", shlex.join(map(str, sources)),
                     *(option(key, value) for key, value in given.items() if value is not None)])


# ---- the command

def main(argv=None):
    parser = Parser(prog="python -m minirlhf.prepare",
                    description="Makes the JSON-lines files that the scripts train on.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    command = commands.add_parser("sentiment", help="sentences from four sources, each rated by 15 to 99 people",
                                  description="Demonstrations, preferences and prompts from 23,703 sentences of film "
                                  "and product reviews, newspaper editorials and tweets, each rated from -4 to 4 by 15 "
                                  "to 99 people (Hutto and Gilbert 2014).")
    command.add_argument("--data_dir", default="data/sentiment", help="folder to write (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="decides split, prompts and pairs (default: %(default)s)")
    command.add_argument("--source", metavar="FILE", help=f"{ARCHIVE}, if it is at hand (default: fetched by pip)")
    command.add_argument("--overwrite", action="store_true", help="replace a data folder that prepare made before")
    for name, dialect in SETS.items():
        command = commands.add_parser(name, help=dialect.about, description=f"{dialect.about[0].upper()}"
                                      f"{dialect.about[1:]} -> demonstrations, preferences and prompts. "
                                      f"{' '.join((dialect.read.__doc__ or '').split())}")
        command.add_argument("--source", nargs="+", required=True, metavar="FILE_OR_FOLDER",
                             help="where the set lies: JSON lines or one JSON list, .gz or not; of a folder all its "
                             "files that belong to the set")
        command.add_argument("--data_dir", default=f"data/{name}", help="folder to write (default: %(default)s)")
        command.add_argument("--max_rows", type=int, default=0, metavar="N", help="read at most so many rows, the "
                             "first ones of each file (default: 0, all)")
        command.add_argument("--val_share", type=float, metavar="SHARE", help="share to hold out (default: the set's "
                             f"own test files where the source has some, else {VAL_SHARE:g})")
        command.add_argument("--overwrite", action="store_true", help="replace a data folder that prepare made before")
        for key in JSONL_KEYS if name == "jsonl" else ():
            command.add_argument(f"--{key}_key", default=key, metavar="COLUMN", help={
                "kind": "what the preferences are told apart by", "group": "rows that have it in common stay together",
            }.get(key, f"the column of the {key}").strip() + " (default: %(default)s)")
    o = parser.parse_args(argv)
    if o.name == "sentiment":
        return sentiment(o.data_dir, o.seed, o.source, o.overwrite)
    if o.max_rows < 0:
        fail(f"--max_rows {o.max_rows}: must be at least 0, which means all")
    if o.val_share is not None and not 0 < o.val_share < 1:
        fail(f"--val_share {o.val_share:g}: must be greater than 0 and less than 1")
    keys = {key: getattr(o, f"{key}_key") for key in JSONL_KEYS} if o.name == "jsonl" else None
    prepare(o.name, o.source, o.data_dir, o.max_rows, o.val_share, o.overwrite, keys)


if __name__ == "__main__":
    launch(main)
