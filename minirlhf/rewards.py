"""What scores an answer: a reward model, or a user's function of texts.

Both are called with a Rollout and give scores (B,), one an answer, each answer scored by itself. A user's function is a
user's program: `RewardFunction.users_turn` keeps what it raises and changes from the run, `load_module` imports it.
"""
import builtins
import contextlib
import copy
import importlib.util
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Set
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch

from minirlhf import checkpoint
from minirlhf.config import did_you_mean, fail


class RewardModel:
    """Scores by the scalar head at each answer's last token, on ids as they were sampled."""

    def __init__(self, model, tokenizer, run, name=""):
        self.model, self.tokenizer, self.run, self.name = model, tokenizer, run, name
        self.below = "value_below"  # the column that has its states below the first block that learns, where one has

    @torch.no_grad()
    def __call__(self, rollout, micro_batch_size=None):
        """Rollout -> scores (B,), float32. Exits 2 on one that is not finite, before anything is learned from it."""
        rows = torch.arange(len(rollout.lengths), device=rollout.lengths.device)
        scores = []
        for part in map(rollout.take, rows.split(micro_batch_size or len(rows))):
            with self.run.autocast():
                scores.append(self.model.score(part.tokens, part.lengths, getattr(part, self.below, None)))
        scores = torch.cat(scores)
        if not scores.isfinite().all():
            row = int(scores.isfinite().int().argmin())
            fail(f"{self.name}: gives the score {float(scores[row])} to the completion "
                 f"{self.tokenizer.decode(rollout.responses()[row])[:60]!r}: stopped before the update; try "
                 "--dtype float32")
        return scores


class RewardFunction:
    """Scores by a function(prompts: list[str], completions: list[str], **columns) -> list of numbers or None, in
    FILE.py:FUNCTION. columns: those of the prompts file that it takes, each a list with None where a record lacks it.
    """
    model = None

    def __init__(self, spec, tokenizer, run, option="--reward"):
        self.told, self.tokenizer, self.run, self.changes = f"{option} {spec}", tokenizer, run, {}
        path, colon, name = spec.rpartition(":")
        if not colon or not path.endswith(".py") or not os.path.isfile(path):
            fail(f"{self.told}: expected FILE.py:FUNCTION, with a file that exists")
        self.path = os.path.abspath(path)
        with self.users_turn("importing it "):
            module = load_module(self.path)
            if self.path not in sys.path:
                sys.path.append(self.path)  # for `Again`
            self.function = getattr(module, name, None)
        if not callable(self.function):
            fail(f"{self.told}: {path} has no function {name}")
        self.by_name, self.columns = takes_names(self.function, self.told), []

    def know(self, columns, where):
        """The names of the columns that the prompts have, of which it gets those that it takes."""
        self.columns = columns_of(self.function, self.by_name, columns, self.told, where)

    def __call__(self, rollout, micro_batch_size=None):
        """Rollout -> scores (B,), float32, all answers at once, NaN where it gives None: it does not apply there. Exits
        2 where it does not give numbers."""
        prompts = rollout.prompt_texts or [self.tokenizer.decode(row[:n]) for row, n in zip(
            rollout.tokens.tolist(), rollout.prompt_lengths.tolist())]
        completions = [self.tokenizer.decode(ids) for ids in rollout.responses()]
        given = {"prompts": [*map(str, prompts)], "completions": [*completions]}  # messages as text alone
        with self.users_turn():
            columns = {name: [copy.deepcopy(getattr(prompt, "columns", {}).get(name)) for prompt in prompts]
                       for name in self.columns}
            returned = self.function(*([] if self.by_name else given.values()),
                                     **(given if self.by_name else {}), **columns)
            values, problem = in_a_row(returned, len(completions))
        if problem:
            fail(f"{self.told}: {problem}")
        scores = []
        for i, value in enumerate(values):
            if value is None:
                scores.append(math.nan)
                continue
            with self.users_turn(f"row {i}: "):  # what a value of a class of the user's does as it becomes a float
                score = number_of(value)
            if score is None:
                fail(f"{self.told}: row {i}: expected a number, found {type(value).__name__}; None is "
                     "for where this reward does not apply")
            if not abs(score) < 1e6:
                fail(f"{self.told}: row {i}: {score}, no number below a million, for the completion "
                     f"{completions[i][:60]!r}")
            scores.append(score)
        return torch.tensor(scores, device=self.run.device, dtype=torch.float32)

    @contextlib.contextmanager
    def users_turn(self, doing=""):
        """While it lasts the surroundings are the user's program's, afterwards again the run's.

        Whatever it raises ends the run in one line with its place; a forked child that comes out of it ends there.
        Ctrl-C is passed on where no run has a handler for it, or it has come twice.
        """
        pid, ours, raised = os.getpid(), surroundings(), None
        surround(ours | self.changes)
        try:
            yield
        except BaseException as error:
            raised = error
        if os.getpid() != pid:
            end_child(raised)
        self.changes = {name: value for name, value in surroundings().items() if value != ours[name]}
        surround(ours)
        if isinstance(raised, KeyboardInterrupt) and (
                getattr(self.run, "stop", 0) or signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            raise raised
        if raised is not None:
            fail(f"{self.told}: {doing}raised {described(raised, os.path.dirname(self.path))}")


# ---- a user's program within ours

def surroundings():
    """What a program may change of its process that ours depends on."""
    return {"folder": working_folder(), "stdout": getattr(sys, "stdout", None),
            "stderr": getattr(sys, "stderr", None), "dtype": torch.get_default_dtype(), "device": default_device(),
            "gradients": torch.is_grad_enabled()}


def default_device():
    """Where torch makes new tensors, None for the CPU."""
    try:
        device = torch.get_default_device()
    except (RuntimeError, AssertionError):  # it makes a tensor there to see which of several it is
        return torch.device("cuda")  # which this machine lacks
    return None if device.type == "cpu" else device


def working_folder():
    try:
        return os.getcwd()
    except OSError:  # it is gone
        return None


def surround(s):
    """Put `surroundings` in place."""
    if s["folder"] not in (None, working_folder()):
        with contextlib.suppress(OSError):
            os.chdir(s["folder"])
    sys.stdout, sys.stderr = usable(s["stdout"], 1), usable(s["stderr"], 2)
    torch.set_default_dtype(s["dtype"])
    if s["device"] != default_device():
        torch.set_default_device(s["device"])
    torch.set_grad_enabled(s["gradients"])


def usable(stream, descriptor):
    """The stream or, where it was closed or detached, another on the same descriptor."""
    try:
        if not getattr(stream, "closed", False):
            return stream
    except ValueError:
        pass
    try:
        return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    except OSError:
        return open(os.devnull, "w")


def end_child(error):
    """A forked child ends as a program does that raises this, or nothing."""
    status = int(error is not None)
    try:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            status = error.code or 0
        elif isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        elif error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 255)


def described(error, folder):
    """"ValueError: its message (/path/file.py:12)": the last place in the files of that folder, the user's own."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    try:
        text = str(error)
    except Exception:
        text = ""
    if isinstance(error, SyntaxError) and error.filename:
        places, text = [*places, (error.filename, error.lineno)], error.msg
    own = [(file, line) for file, line in places if os.path.dirname(file + os.sep).startswith(folder + os.sep)
           and "-packages" + os.sep not in file and file != __file__]
    return type(error).__name__ + f": {text}" * bool(text) + " ({}:{})".format(*(own or places)[-1])


# ---- what it gives

def in_a_row(returned, n):
    """What a function returned -> (n values, ""), or (None, what is wrong with it)."""
    kind = type(returned).__name__
    if inspect.isawaitable(returned) and hasattr(returned, "close"):
        returned.close()  # or Python tells that it was never awaited
    if len(getattr(returned, "shape", [n])) != 1:
        return None, f"returned a {kind} of shape {tuple(returned.shape)}; expected {n} numbers, of shape ({n},)"
    if isinstance(returned, (str, bytes, bytearray, memoryview, Mapping, Set)) or not hasattr(returned, "__iter__"):
        return None, f"returned {'None' if returned is None else f'a {kind}'}; expected a list of {n} numbers"
    values = list(islice(returned.tolist() if hasattr(returned, "tolist") else returned, n + 1))  # it may be endless
    if len(values) != n:
        found = len(returned) if hasattr(returned, "__len__") else f"more than {n}" if len(values) > n else len(values)
        return None, f"returned {found} scores for {n} answers"
    return values, ""


def number_of(value):
    """float(value), infinity where it is too large for one; None of a text, an array and whatever is no number."""
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except TypeError:
        return None
    except OverflowError:
        return math.inf


def takes_names(function, told):
    """True where it is called as function(prompts=, completions=), False for function(prompts, completions).

    By name where a parameter is called so, or nothing else fits; its other parameters are columns. Exits 2 where it
    takes other arguments, or names that say that it takes them in another order.
    """
    if any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):
        fail(f"{told}: is an async function; expected a plain one, in which asyncio.run calls it")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return False
    fits, needed = {}, {p.name: 0 for p in signature.parameters.values() if p.default is p.empty and named(p)}
    others = {name: 0 for name in needed if name not in first_two(signature)}
    for by_name, arguments in ((True, ([], needed | {"prompts": 0, "completions": 0})), (False, ([0, 0], others))):
        with contextlib.suppress(TypeError):
            fits[by_name] = signature.bind(*arguments[0], **arguments[1]).arguments
    if True in fits and fits[True].keys() & {"prompts", "completions"}:
        return True
    names = [name for name in fits.get(False, {}) if signature.parameters[name].kind.name != "VAR_POSITIONAL"]
    exchanged = any(names[i:i + 1] and names[i].startswith(words) for i, words in enumerate((
        ("completion", "response", "answer"), ("prompt", "question", "query"))))
    if not fits or exchanged:
        fail(f"{told}: takes {signature}; expected (prompts, completions), by these names in any order, and columns of "
             "the prompts file by theirs")
    return False not in fits


def named(parameter):
    """Whether it can be given by its name."""
    return parameter.kind.name in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")


def first_two(signature):
    """Names of the parameters that two arguments without a name go to."""
    return [p.name for p in signature.parameters.values() if p.kind.name.startswith("POSITIONAL")][:2]


def columns_of(function, by_name, known, told, where):
    """Which of the known columns a function takes: those that its other parameters name, or all, if it has **columns.

    One that takes (*args, **kwargs) stands for another and gets no more than the texts. Exits 2 where a parameter that
    has no default is no column.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    texts, parameters = ["prompts", "completions"] if by_name else first_two(signature), signature.parameters.values()
    others = [p for p in parameters if named(p) and p.name not in texts]
    if missing := [p.name for p in others if p.default is p.empty and p.name not in known]:
        found = ", ".join(repr(name[:40]) for name in known[:16]) + ", ..." * (len(known) > 16)
        fail(f"{told}: asks for the column {missing[0]!r}, which {where} lacks{did_you_mean(missing[0], known)}; the "
             f"columns beside the prompt are: {found or 'none'}")
    if any(p.kind.name == "VAR_KEYWORD" for p in parameters) and texts:
        return [name for name in known if name not in texts]
    return [p.name for p in others if p.name in known]


# ---- its modules

class Loaded(NamedTuple):
    """A file of a user's that was imported."""
    source: bytes
    module: Any
    imports: set  # paths of files beside it


LOADED, TRIED = {}, set()  # {path: Loaded}, and the paths of those that failed too


def load_module(path):
    """A user's file as a module, which pickle finds under the file's own name, in workers of any start method.

    Its folder stands in sys.path behind the standard library: no other module may get a file of it for one of its own.
    Where the name is another's, the standard library's or a second user's, it is NAME_2.
    """
    with open(path, "rb") as f:
        source = f.read()
    if path in LOADED and LOADED[path].source == source:
        return LOADED[path].module
    TRIED.add(path)
    name = name_of(path)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    LOADED[path], spec.loader = Loaded(source, module, set()), Again
    module.__builtins__ = {**vars(builtins), "__import__": partial(import_beside, path)}
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException:
        del LOADED[path], sys.modules[name]
        raise
    return module


def import_beside(importer, name, *arguments, **options):
    """What `import` means in a user's file: a file beside it, whatever other module has its name; else as always."""
    path = os.path.join(os.path.dirname(importer), f"{name}.py")
    level = options.get("level", arguments[3] if len(arguments) > 3 else 0)
    known = name in sys.modules and path not in LOADED and owner(name) == os.path.realpath(path)
    if level or path == importer or known or not os.path.isfile(path):
        return builtins.__import__(name, *arguments, **options)
    LOADED[importer].imports.add(path)
    module = load_module(path)
    if name in sys.stdlib_module_names:  # json.py: what it lacks may be meant of the standard one
        vars(module).setdefault("__getattr__", partial(getattr, builtins.__import__(name)))
    return module


def name_of(path):
    """The name to import a file by: with its packages where it lies in some, else its own, or one that is free."""
    folder, stem = os.path.split(path.removesuffix(".py"))
    packages, root = [], folder
    while os.path.isfile(os.path.join(root, "__init__.py")) and os.path.basename(root).isidentifier():
        root, package = os.path.split(root)
        packages.insert(0, package)
    for place in (root, folder) if packages else (folder,):
        if place not in map(os.path.abspath, sys.path):
            sys.path.insert(next((i for i, p in enumerate(sys.path) if p.endswith("-packages")), len(sys.path)), place)
    if packages and folder in map(os.path.abspath, importlib.import_module(".".join(packages)).__path__):
        return ".".join([*packages, stem])
    stem = stem.replace(".", "_")
    names = (f"{stem}_{n}" if n > 1 else stem for n in count(1))
    return next(name for name in names if owner(name) in (None, os.path.realpath(path)))


def owner(name):
    """The file that has, or on import would get, this module name: None where there is none."""
    if name in sys.modules:
        return os.path.realpath(getattr(sys.modules[name], "__file__", None) or "built in")
    spec = importlib.util.find_spec(name)
    return spec and spec.origin and os.path.realpath(spec.origin)


class Again:
    """In a worker that multiprocessing has started anew: the files that its parent has loaded, under the same names.

    They stand in sys.path, which such a worker gets from its parent, and where a file that is no archive means nothing.
    Stands in sys.meta_path; before the worker's next import it loads them.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        new = [path for path in sys.path if path.endswith(".py") and path not in TRIED and os.path.isfile(path)]
        TRIED.update(new)  # loading them imports, too
        for path in new:
            with contextlib.suppress(Exception):  # raised again where the worker needs it
                load_module(path)
        if new and name in sys.modules:
            return sys.modules[name].__spec__

    @staticmethod
    def create_module(spec):
        return sys.modules[spec.name]

    @staticmethod
    def exec_module(module):
        """It is whole already."""


sys.meta_path.insert(0, Again)


# ---- one or the other

def is_function(spec):
    """True for "FILE.py:FUNCTION", as against the path of a reward model."""
    return spec.rpartition(":")[0].endswith(".py")


def load(spec, option, policy, tokenizer, policy_path, run):
    """A reward model's path, or FILE.py:FUNCTION -> what scores answers of `policy`. Exits 2 where they do not fit."""
    if is_function(spec):
        return RewardFunction(spec, tokenizer, run, option)
    model, own_tokenizer, _ = checkpoint.load(spec, ["rm"], run.device)
    checkpoint.compatible((policy, tokenizer), policy_path, (model, own_tokenizer), spec)
    return RewardModel(model, own_tokenizer, run, spec)


def files(spec):
    """The files that a reward is made of: what a resumed run must find unchanged."""
    if not is_function(spec):
        return checkpoint.files_of(spec)
    found, new = [], [os.path.abspath(spec.rpartition(":")[0])]
    while new:
        found.append(new.pop())
        new += sorted(LOADED[found[-1]].imports - {*found, *new}) if found[-1] in LOADED else []
    return found
