"""Command-line options from a dataclass: each field is one line, and its comment is the --help text.

    @dataclass
    class Options(RunOptions):
        "What this script does."
        batch_size: int = 64  # rows a step [1..]

A line `# ---- heading` opens a group of the help. A range at the end of a comment, as in [1..], [0..1] or (0..], is
enforced as well as shown ("(" excludes the end). A Literal type gives choices. `--name=value` and `--name value` both
work, `--flag` alone means True, `@file` reads options from a file with one `name = value` a line. An unknown name is
refused, abbreviations too.

Left out: nesting, YAML and overriding by environment. A run's options fit one flat list.
"""
import argparse
import functools
import inspect
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from typing import Literal, NoReturn, get_args, get_origin

RANGE = re.compile(r"\s*([\[(])(-?[\d.]+?)?\.\.(-?[\d.]+)?([\])])$")


def fail(message: str) -> NoReturn:
    """Bad input or use: one line on standard error, exit status 2, no traceback."""
    print("error: " + " ".join(message.split("\n")), file=sys.stderr)
    raise SystemExit(2)


def say(text=""):
    """Print a line at once. A reader that went away (| head), a full disk under a log, or a terminal that lacks a
    character does not stop a run."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode())
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def launch(main):
    """Run a command. Ctrl-C while it still reads its input ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130)


def warn_idle(options, what, makes_idle, *names):
    """One line for each named option that was given though `what` leaves it without effect."""
    for name in names:
        if makes_idle and name in getattr(options, "given", ()) and os.environ.get("RANK", "0") == "0":
            say(f"warning: --{name} has no effect with --{what}")


def positive_int(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def temperature_number(text):
    if float(text) != 0 and not 0.01 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be 0, or a finite number from 0.01 on")
    return float(text)


@dataclass
class RunOptions:
    """What every stage has in common."""
    # ---- the run
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto takes the GPU when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls; auto: bfloat16 where the chip has it
    compile: bool = False  # run networks and decode steps through torch.compile: worth its warm-up on a GPU only
    seed: int = 1337  # every random choice is a function of (seed, step, rank, purpose) [0..]
    resume: bool = False  # go on from out_dir's checkpoint
    overwrite: bool = False  # let a new run replace what out_dir holds
    check: bool = False  # test what must hold on this model, data and device, a line for each, and write nothing


def parse(cls, argv=None):
    """An instance of dataclass `cls` from the command line. Prints help or an error and exits as argparse does."""
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(cls.__doc__), fromfile_prefix_chars="@", allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110))
    parser.convert_arg_line_to_args = _preset_line
    comments, headings, group = _comments(cls), _headings(cls), parser
    for field in fields(cls):
        if field.name in headings:
            group = parser.add_argument_group(headings[field.name])
        text, kind = comments[field.name], field.type
        shown = "" if field.default in ("", None) else f" (default: {field.default})"
        extra = {}
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
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        if words and re.fullmatch(r"--\w+", words[-1]) and re.fullmatch(r"-[\d.]+(e[-+]?\d+)?|-inf|-nan", word.lower()):
            words[-1] += "=" + word  # argparse takes -1e-4 for an option
        else:
            words.append(word)
    try:
        given = vars(parser.parse_args(words))
    except UnicodeDecodeError as error:
        parser.error(f"a file of options is not UTF-8: {error}")
    if [] in given.values():  # what Python before 3.13 makes of --name=--
        parser.error("expected a value, found '--'")
    options = cls(**given)
    options.given = set(given)  # what --resume may not overrule
    check_ranges(options)
    return options


def check_ranges(options):
    """Exits 2 where a value is not of its field's type, or not within the range of its comment."""
    comments = _comments(type(options))
    for field in fields(options):
        value, kinds = getattr(options, field.name), (field.type, int) if field.type is float else (field.type,)
        if get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                fail(f"--{field.name} {value}: must be one of {', '.join(get_args(field.type))}")
        elif type(value) not in kinds:
            fail(f"--{field.name} {str(value)[:40]}: must be of type {field.type.__name__}")
        _check_range(field.name, value, comments[field.name])


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
    """{first option under it: heading}, of the lines "# ---- heading"."""
    found, heading = {}, None
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            heading = line.strip()[7:] if line.startswith("    # ---- ") else heading
            if heading and (match := re.match(r"    (\w+): .*?  # ", line)):
                found[match[1]], heading = heading, None
    return found


def _boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")


def _preset_line(line):
    """`name = value`, `--name=value`, `--flag`; blank lines and # comments are skipped."""
    line = line.split(" #")[0].strip()
    if not line or line.startswith("#"):
        return []
    name, equals, value = (part.strip() for part in line.partition("="))
    return [("" if name.startswith("--") else "--") + name + equals + value]


def _check_range(name, value, comment):
    match = RANGE.search(comment)
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"--{name} {value}: must be a finite number")
    if isinstance(value, int) and value > 10 ** 12 and name != "seed":
        fail(f"--{name} {str(value)[:40]}: more than any machine can do; at most {10 ** 12}")
    if match is None or value is None:
        return
    left, low, high, right = match.groups()
    if low is not None and (value < float(low) or (left == "(" and value == float(low))):
        fail(f"--{name} {value}: must be {'greater than' if left == '(' else 'at least'} {low}")
    if high is not None and (value > float(high) or (right == ")" and value == float(high))):
        fail(f"--{name} {value}: must be {'less than' if right == ')' else 'at most'} {high}")
