"""Command-line options from a dataclass: each field is one line, and its comment is the --help text.

    @dataclass
    class Options(RunOptions):
        "What this script does."
        batch_size: int = 64  # rows a step [1..]

A line `# ---- heading` opens a group of the help. A range at the end of a comment, as in [1..], [0..1] or (0..], is
enforced as well as shown ("(" excludes the end). A Literal type gives choices. `--name=value` and `--name value` both
work, `--flag` alone means True. A field of type tuple[str, ...] may be given again: it holds all values, in their
order, and none after `--name ""`. An unknown name is refused, abbreviations too, with the one that was meant.

`@file` reads options from a file, one a line, as in a nanoGPT config or flat TOML: `name = value  # comment`, also
`--name value`, `--name=value` and `flag`; a value may stand in quotes, which hold anything but themselves. What comes
later on the command line wins; a name may stand once in a file, unless it may be given again. Lines under `[sft]`,
`[rm]`, `[ppo]` or `[dpo]` are for that stage alone. Where no file has the name, `@scratch` is minirlhf/scratch.toml.

Left out: nesting, YAML and overriding by environment. A run's options fit one flat list.
"""
import argparse
import contextlib
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
import stat
import sys
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Literal, NoReturn, get_args, get_origin

RANGE = re.compile(r"\s*([\[(])(-?[\d.]+?)?\.\.(-?[\d.]+)?([\])])$")
WRONG = (LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RuntimeError)


def fail(message: str) -> NoReturn:
    """Bad input or use: one line on standard error, exit status 2, no traceback."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def one_line(message):
    """What a file's name or a text may hold breaks no line and steers no terminal: line ends become blanks, and what
    is not printable is written as Python writes it."""
    return escaped(" ".join(message.splitlines()))


def escaped(text):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def fitting(path):
    """What goes wrong within comes from the file's contents: exits 2 naming it."""
    try:
        yield
    except WRONG as error:
        if out_of_memory(error):
            raise
        fail(f"{path}: does not fit: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def out_of_memory(error):
    """Whether an exception says that there is no memory left: Python's, a CPU allocation's, CUDA's."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(re.search(
        "can't allocate memory|out of memory|bad_alloc|ALLOC_FAILED", str(error), re.IGNORECASE))


def say(text=""):
    """Print a line at once. A reader that went away (| head), a full disk under a log, or a terminal that lacks a
    character does not stop a run."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode())
    except OSError as error:
        unprinted.append((sys.stdout, error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


unprinted = []  # (where `say` could not print, why), since the command began


def all_printed():
    """For a command whose result is what it prints. Exits 2 where standard output is closed, 1 where it is full, and 0
    where its reader has gone (| head), for then nobody waits for more."""
    if sys.stdout is None:
        fail("standard output is closed: nobody would see the result")
    for stream, error in unprinted:
        if stream is sys.stdout:
            raise SystemExit(0 if isinstance(error, BrokenPipeError) else
                             f"error: standard output could not be written ({error.strerror})")


def launch(main):
    """Run a command. Ctrl-C while it still reads its input ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130)
    except SystemExit as stop:
        _, world, fault = _ranks()
        if stop.code and world > 1 and not fault:
            part_from_others()
        raise


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process


def ranks():
    """torchrun's variables -> (this process's rank, number of ranks); (0, 1) where there are none.

    Exits 2 where one stands without the others, or they contradict one another.
    """
    rank, world, fault = _ranks()
    if fault:
        fail(f"{fault}; start with torchrun --nproc_per_node=N, which sets them all, or, for one process, without "
             f"them: env {' '.join(f'-u {name}' for name in RANKS[:3])} python ...")
    return rank, world


def _ranks():
    """-> (rank, number of ranks, what is wrong with them or "")."""
    found = {name: os.environ[name] for name in RANKS if os.environ.get(name)}
    numbers = {name: int(found[name]) for name in RANKS[:3] if found.get(name, "").isdecimal()}
    if not found.keys() & {*RANKS[:3]} or numbers.get("WORLD_SIZE") == 1 and numbers.get("RANK", 0) == 0:
        return 0, 1, ""
    stray = "the environment has " + ", ".join(f"{name}={found[name][:40]}" for name in RANKS[:3] if name in found)
    fault = ""
    if missing := [name for name in RANKS if name not in found]:
        fault = f"{stray} but not {', '.join(missing)}"
    elif len(numbers) < 3 or not found["MASTER_PORT"].isdecimal():
        fault = f"{stray}, MASTER_PORT={found['MASTER_PORT'][:40]}, where each must be a number"
    elif numbers["RANK"] >= numbers["WORLD_SIZE"]:
        fault = f"{stray}: a rank must be below the number of ranks"
    return numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1), fault


def part_from_others():
    """For a rank that ends before it has met the others, who wait for it: it meets them, and as it goes they end."""
    import torch

    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
        except (RuntimeError, ValueError, OSError):  # they were not there, or went first
            pass


def warn_idle(options, what, makes_idle, *names):
    """One line for each named option that was given, by the user, though `what` leaves it without effect."""
    for name in names:
        if makes_idle and name in getattr(options, "asked", ()) and ranks()[0] == 0:
            say(f"warning: --{name} has no effect with --{what}")


def positive_int(text):
    if not 1 <= int(text) <= 10 ** 6:
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be from 1 to {10 ** 6}")
    return int(text)


def temperature_number(text):
    if float(text) != 0 and not 0.01 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be 0, or a finite number from 0.01 on")
    return float(text)


@dataclass
class RunOptions:
    """What every stage has in common."""
    stage = ""
    given = asked = frozenset()  # names of options, as `parse` finds them
    # ---- the run
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto takes the GPU when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bfloat16 where the chip has it
    compile: bool = False  # run networks and decode steps through torch.compile: minutes of warm-up, no gain on a CPU
    seed: int = 1337  # every random choice is a function of (seed, step, rank, purpose) [0..]
    val_share: float = 0.05  # share of the prompts held out, by their hash, where data_dir has no *.val.jsonl (0..1)
    resume: bool = False  # go on from out_dir's checkpoint
    overwrite: bool = False  # let a new run replace what out_dir holds
    keep_checkpoints: int = 0  # keep the latest so many as ckpt.STEP.pt too; 0 = ckpt.pt and the one before it [0..]
    checkpoint_activations: bool = False  # keep a block's input only, compute the rest again: less memory, more time
    force: bool = False  # start although the device seems to have too little memory
    check: bool = False  # test what must hold on this model, data and device, a line for each, and write nothing
    tensorboard: bool = False  # what metrics.jsonl gets, TensorBoard shows, from out_dir (pip install tensorboard)
    wandb: bool = False  # what metrics.jsonl gets, and the options, go to Weights & Biases (pip install wandb)
    # ---- what learns
    lora_rank: int = 16  # rank of adapters on the linear layers, all else frozen; 0 = no adapters, all learns [0..4096]
    lora_alpha: float = 32.0  # what adapters add is multiplied by alpha / rank (0..]
    lora_layers: int = 0  # adapters in the last so many blocks, where there are more; 0 = in all [0..]
    freeze_layers: int = 0  # embeddings and the first so many blocks stay as they are, the rest learns in full [0..]

    def __post_init__(self):
        for name in ("tensorboard", "wandb"):
            if getattr(self, name):
                installed(name)


def installed(name):
    """Exits 2 where a package of an option's name is not there. A folder of that name alone, as a tracker makes one for
    its files, is no package."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        fail(f"--{name}: the package {name} is not installed; get it by: pip install {name}; or leave the option out "
             f"(--{name} false, where a run that goes on has it)")


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations; it answers an unknown option with the one that was meant."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [name[2:] for action in self._actions for name in action.option_strings if name[:2] == "--"]
            word = next((word for word in unknown if word.startswith("-")), unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}"
                       + did_you_mean(word.lstrip("-").partition("=")[0], names, "--"))
        return known, unknown


def did_you_mean(word, names, dashes=""):
    """"; did you mean A or B?", of the names that are spelled or abbreviated like the word, or ""."""
    word = re.sub("[-_]", "", word).lower()
    plain = {name: re.sub("[-_]", "", name) for name in names}
    found = [name for name in names if word and word in (plain[name], "".join(part[0] for part in name.split("_")))]
    found = found or [name for name in names if len(word) > 2 and word in plain[name]]
    close = difflib.get_close_matches(word, plain.values(), 3, 0.7)
    found = (found or [name for name in names if plain[name] in close])[:3]
    return f"; did you mean {' or '.join(dashes + name for name in found)}?" if found else ""


def parse(cls, argv=None):
    """An instance of dataclass `cls` from the command line. Prints help or an error and exits as argparse does."""
    parser = Parser(
        description=inspect.cleandoc(cls.__doc__),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110))
    comments, headings, group = _comments(cls), _headings(cls), parser
    for field in fields(cls):
        if field.name in headings:
            group = parser.add_argument_group(headings[field.name])
        text, kind = comments[field.name], field.type
        shown = "" if field.default in ("", None, ()) else f" (default: {field.default})"
        extra = {}
        if get_origin(kind) is tuple:
            kind, shown, extra["action"] = one_of(kind), " (may be given again)" + shown, "append"
        if get_origin(kind) is Literal:
            extra["choices"] = get_args(kind)
            kind = str
        elif kind is bool:
            extra.update(nargs="?", const=True, metavar="BOOL")
            kind = _boolean
        else:
            extra["metavar"] = kind.__name__.upper()
        group.add_argument(f"--{field.name}", type=kind, default=argparse.SUPPRESS,
                            help=(text + shown).replace("%", "%%"), **extra)
    words, places = _words(cls, sys.argv[1:] if argv is None else argv)
    given = vars(parser.parse_args(words))
    if issubclass(cls, RunOptions):
        ranks()  # before anything is done by one of them
    if [] in given.values() or [[]] in given.values():  # what Python before 3.13 makes of --name=--
        parser.error("expected a value, found '--'")
    options = cls(**as_fields(cls, given))
    options.given = set(given)  # what --resume may not overrule
    preset = tuple(presets().values())
    options.asked = {name for name in given if not places.get(name, "").startswith(preset)}  # and not by a preset
    check_ranges(options, places)
    return options


def one_of(kind):
    """The type of one value of an option: of each, where it may be given again."""
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def weighted(text):
    """"NAME:NUMBER" -> NAME, the number. Where no number stands behind the last colon, a file has the whole name, or it
    is FILE.py:FUNCTION -> the text, None."""
    name, _, number = text.rpartition(":")
    try:
        found = float(number)
    except ValueError:
        return text, None
    return (text, None) if not name or name.endswith(".py") or os.path.exists(text) else (name, found)


def as_fields(cls, values):
    """{name: value} with a tuple for each option that may be given again: of a list, or of the one value, "" for none,
    that a run has which knew no other."""
    again = {field.name for field in fields(cls) if get_origin(field.type) is tuple}
    return {name: tuple(v for v in (value if isinstance(value, (list, tuple)) else [value]) if v != "")
            if name in again else value for name, value in values.items()}


def check_ranges(options, places={}):
    """Exits 2 where a value is not of its field's type, or not within the range of its comment.

    places: {name: "FILE:LINE: "} of values that a file gave.
    """
    comments = _comments(type(options))
    for field in fields(options):
        values, kind = getattr(options, field.name), one_of(field.type)
        option = f"{places.get(field.name, '')}--{field.name}"
        for value in values if kind is not field.type else [values]:
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    fail(f"{option} {value}: must be one of {', '.join(get_args(kind))}")
            elif type(value) not in ((kind, int) if kind is float else (kind,)):
                fail(f"{option} {str(value)[:40]}: must be of type {kind.__name__}")
            if isinstance(value, str):
                check_spelling(option, value)
            _check_range(option, value, comments[field.name])


def check_spelling(option, value):
    """Exits 2 where a name cannot be written down: a checkpoint and the logs hold it."""
    spelled = value.encode("utf-8", "backslashreplace").decode()
    if spelled != value or "\0" in value:
        fail(f"{option} {spelled!r}: cannot be spelled in UTF-8; give the file or folder another name")


@functools.cache
def _comments(cls):
    found = {}
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            match = re.match(r"    (\w+): .*?  # (.*)", line)
            if match:
                found[match[1]] = match[2]
    return found


@functools.cache
def _headings(cls):
    """{first option under it: heading}, of the lines "# ---- heading". A field that a class declares again stays in its
    place, under the heading there."""
    found, heading, known = {}, None, set()
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            heading = line.strip()[7:] if line.startswith("    # ---- ") else heading
            if heading and (match := re.match(r"    (\w+): .*?  # ", line)) and match[1] not in known:
                found[match[1]], heading = heading, None
        known |= {*inspect.get_annotations(owner)}
    return found


def _boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")


# ---- files of options

def presets():
    """{name: path} of the files of options that come with the package."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return {name[:-5]: os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".toml")}


def preset_values(cls, path):
    """{name: value} of what a file of options sets in dataclass `cls`."""
    kinds, values = {field.name: field.type for field in fields(cls)}, {}
    for name, text, _ in read_options(path, cls):
        value = {bool: _boolean, int: int, float: float}.get(one_of(kinds[name]), str)(text)
        values[name] = value if kinds[name] is one_of(kinds[name]) else [*values.get(name, []), value]
    return as_fields(cls, values)


def _words(cls, argv):
    """-> (argv with what each @FILE holds in its place, {name: "FILE:LINE: "} of the values that files gave).

    A word after an option that needs a value is its value, also where it begins with "@". What a file or the command
    line says later takes the place of all that the other said of the option.
    """
    kinds = {field.name: field.type for field in fields(cls)}
    words, places = [], {}
    for word in argv:
        name = words[-1][2:] if words and re.fullmatch(r"--\w+", words[-1]) else ""
        if word.startswith("@") and kinds.get(name, bool) is bool:
            before = words
            for name, text, place in read_options(word[1:], cls):
                if any(word.partition("=")[0] == f"--{name}" for word in before):
                    note = f"{place}{name} = {text} takes the place of the --{name} before the file"
                    print(one_line(note), file=sys.stderr)
                    before, words = (without(name, part) for part in (before, words))
                words = [*words, f"--{name}={text}"]
                places[name] = place
        elif name in kinds and not word.startswith("-") or name and re.fullmatch(
                r"-[\d.]+(e[-+]?\d+)?|-inf|-nan", word.lower()):
            words[-1] += "=" + word  # argparse takes -1e-4 for an option
        else:
            if places.pop(name := word.partition("=")[0][2:], None):
                words = without(name, words)
            words.append(word)
    return words, places


def without(name, words):
    return [word for word in words if word.partition("=")[0] != f"--{name}"]


def read_options(path, cls):
    """Yields (name, text of the value, "FILE:LINE: ") for each option in a file. Exits 2 on what is none."""
    kinds, seen = {field.name: field.type for field in fields(cls)}, {}
    if not os.path.isfile(path):
        path = presets().get(path, path)
    for number, line in lines_for(path, getattr(cls, "stage", "")):
        name, text = _setting(line, f"{path}:{number}", kinds)
        if name in seen and one_of(kinds[name]) is kinds[name]:
            fail(f"{path}:{number}: {name} stands in line {seen[name]} already; keep one of the two")
        seen[name] = number
        yield name, text, f"{path}:{number}: "


def lines_for(path, stage):
    """Yields (number, line) of a file of options that are for the script of a stage, or for all."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > 10 ** 6:
            what = "a folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size:,} bytes" if status.st_size else \
                "a pipe or device"
            fail(f"@{path}: {what}; name a file of options")
        with open(path, "rb") as f:
            text = f.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}:{error.object[:error.start].count(10) + 1}: not UTF-8 at byte {error.start}; save it as UTF-8")
    except OSError as error:
        fail(f"@{path}: a file of options that cannot be read ({error.strerror})"
             + did_you_mean(path, presets(), "@"))
    if "\0" in text:
        fail(f"@{path}: no text in UTF-8: it holds NUL bytes")
    section = ""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip()
        heading = re.fullmatch(r"\[(sft|rm|ppo|dpo)\]\s*(#.*)?", line) if stage else None
        section = heading[1] if heading else section
        if line.startswith("[") and not heading:
            fail(f"{path}:{number}: {line[:60]}: " + (
                "there are no sections but [sft], [rm], [ppo] and [dpo], for those stages; leave the line out, one "
                "`name = value` a line is all" if stage else "this command takes no sections; leave the line out"))
        if line and not heading and section in ("", stage) and not line.startswith("#"):
            yield number, line


def _setting(line, where, kinds):
    """A line -> (name, text of the value); `where` is its file and number."""
    match = re.fullmatch(r"(--)?([\w.-]+)[ \t]*(=?)[ \t]*(.*)", line)
    if line.startswith("@"):
        fail(f"{where}: {line[:60]}: such a file names no other; put both on the command line")
    if colon := re.match(r"""(--)?["']?([\w.-]+)["']?[ \t]*:""", line):
        fail(f"{where}: {line[:60]}: expected `{colon[2]} = value`, with = in place of the colon")
    if not match or match[4] and not match[4].startswith("#") and not match[1] and not match[3]:
        fail(f"{where}: expected `name = value`, found {line[:60]!r}")
    _, name, equals, value = match.groups()
    if name not in kinds:
        fail(f"{where}: there is no option {name}{did_you_mean(name, kinds)}")
    kind = one_of(kinds[name])
    if not value or value.startswith("#"):
        if kind is bool and not equals:
            return name, "true"
        fail(f'{where}: {name}: a value is missing; leave the line out for the default, or write "" for none')
    if value[0] in "\"'":
        quoted = re.fullmatch(r"""("[^"\\]*"|'[^']*')[ \t]*([,;]?)[ \t]*(#.*)?""", value)
        if not quoted:
            fail(f"{where}: {name}: expected one text in quotes, without a backslash, found {value[:60]}")
        text, end = quoted[1][1:-1], quoted[2]
    else:
        text = re.split(r"[ \t]#", value)[0].rstrip()
        end = text[-1] if text[-1] in ",;" else ""
        if text[0] in "[{(" or text in ("None", "null"):
            fail(f"{where}: {name}: {text[:60]}: each option takes one number, word or text in quotes; " + (
                "leave the line out for the default" if kind is kinds[name] else "write a line for each"))
        if " --" in text:
            fail(f"{where}: {name}: {text[:60]}: one option a line")
    if end:
        fail(f"{where}: {name}: {value[:60]}: nothing ends a value but its line; leave the {end!r} out"
             + ", or put the value in quotes if it is a part of it" * (kind is str))
    _check_kind(text, kind, f"{where}: {name} = {text[:60]}")
    return name, text


def _check_kind(text, kind, what):
    """Exits 2 where the text does not spell a value of the type."""
    choices = get_args(kind) if get_origin(kind) is Literal else None
    try:
        fits = text in choices if choices else (_boolean if kind is bool else kind)(text) is not None
    except (ValueError, argparse.ArgumentTypeError):
        fits = False
    if not fits:
        expected = f"one of {', '.join(choices)}" if choices else {
            int: "a whole number", float: "a number", bool: "true or false"}[kind]
        sums = kind in (int, float) and re.search(r"\d\s*[-+*/]|\w\(", text)
        fail(f"{what}: expected {expected}" + ("; nothing is computed, write the result" if sums else ""))


def _check_range(option, value, comment):
    match = RANGE.search(comment)
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"{option} {value}: must be a finite number")
    if isinstance(value, int) and value > 10 ** 12 and not option.endswith("--seed"):
        fail(f"{option} {str(value)[:40]}: more than any machine can do; at most {10 ** 12}")
    if match is None or value is None:
        return
    left, low, high, right = match.groups()
    if low is not None and (value < float(low) or (left == "(" and value == float(low))):
        fail(f"{option} {value}: must be {'greater than' if left == '(' else 'at least'} {low}")
    if high is not None and (value > float(high) or (right == ")" and value == float(high))):
        fail(f"{option} {value}: must be {'less than' if right == ')' else 'at most'} {high}")
