"""Reward functions: what they are called with, what they may give, raise and change, how their files are imported, and
that processes which they start are none of the run's. And `main` called from other programs."""
import ctypes
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from conftest import scratch
from minirlhf import evaluate, rewards, runtime
from minirlhf.config import RunOptions
from minirlhf.data import Prompt, encode_prompts
from minirlhf.generate import Rollout, generate
from minirlhf.runtime import Run

TOKENIZER = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)), eos=0,
                            encode_prompt=lambda text: [0, *map(ord, text)])
CPU = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_stays():
    """Modules, sys.path, streams and handlers are those of before."""
    path, modules, streams = [*sys.path], {*sys.modules}, (sys.stdout, sys.stderr)
    handlers = {number: signal.getsignal(number) for number in runtime.STOPS}
    yield
    rewards.LOADED.clear(), rewards.TRIED.clear()
    sys.path[:], (sys.stdout, sys.stderr) = path, streams
    for name in {*sys.modules} - modules:
        if not name.startswith(("torch", "numpy")):
            del sys.modules[name]
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def function(tmp_path):
    """function(text of a file, name of it) -> RewardFunction of its f, whose run is not there."""
    def make(text, name="mine.py", option="--reward"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return rewards.RewardFunction(f"{path}:f", TOKENIZER, CPU, option)
    return make


def rollout(*pairs, texts=None):
    """A Rollout of (prompt, completion), a token a letter."""
    lengths = [len(p + c) for p, c in pairs]
    tokens = torch.zeros(len(pairs), max(lengths), dtype=torch.long)
    for row, (p, c) in zip(tokens, pairs):
        row[:len(p + c)] = torch.tensor([*map(ord, p + c)])
    return Rollout(tokens, torch.tensor([len(p) for p, _ in pairs]), torch.tensor(lengths),
                   torch.ones(len(pairs), dtype=torch.bool), torch.zeros(len(pairs), max(lengths) - 1), texts)


TWO = rollout(("why", "so"), ("who", "nobody"))


# ---- what it is called with

LENGTHS = "[len(c) - len(p) / 10 for p, c in zip(prompts, completions)]"


@pytest.mark.parametrize("text", [
    f"def f(prompts, completions): return {LENGTHS}",
    f"def f(completions, prompts): return {LENGTHS}",
    f"def f(*, completions, weight=1, prompts): return {LENGTHS}",
    f"def f(prompts, completions, **others): return {LENGTHS}",
    "def f(completions, **others): return [len(c) - len(p) / 10 for p, c in zip(others['prompts'], completions)]",
    "def f(**all): return [len(c) - len(p) / 10 for p, c in zip(all['prompts'], all['completions'])]",
    f"def f(prompts, completions, /): return {LENGTHS}",
    "def f(asked, said, weight=10): return [len(c) - len(p) / weight for p, c in zip(asked, said)]",
    "def f(*both): return [len(c) - len(p) / 10 for p, c in zip(*both)]",
    f"from functools import partial\ndef g(weight, completions, prompts): return {LENGTHS}\nf = partial(g, 3)",
    f"class F:\n    def __call__(self, completions, prompts): return {LENGTHS}\nf = F()",
    f"class F:\n    def g(self, completions, prompts): return {LENGTHS}\nf = F().g",
    "import functools\ndef same(g):\n    @functools.wraps(g)\n    def h(*a, **k): return g(*a, **k)\n    return h\n"
    f"@same\ndef f(completions, prompts): return {LENGTHS}",
    "def same(g): return lambda *a, **k: g(*a, **k)\n@same\ndef f(asked, said): return [len(c) - len(p) / 10 "
    "for p, c in zip(asked, said)]",
])
def test_each_text_reaches_its_parameter(function, text):
    """"why" -> "so" scores 2 - 0.3, "who" -> "nobody" 6 - 0.3: by name, in any order, wherever its names are prompts
    and completions, else prompts first."""
    scores = function(text)(TWO)
    torch.testing.assert_close(scores, torch.tensor([1.7, 5.7]))


@pytest.mark.parametrize("arguments", ["", "prompts", "completions", "a, b, c, /", "completions, texts",
                                       "texts, prompts", "completion, prompt", "answers, asked",
                                       "completions, prompts, /", "a, query"])
def test_other_parameters_are_refused_at_load(function, refused, arguments):
    """Too few, such as no column's name reaches, or such as say that completions come first."""
    error = refused(function, f"def f({arguments}): return [0.0] * 2")
    assert "mine.py:f: takes (" in error and "expected (prompts, completions)" in error


@pytest.mark.parametrize("text", ["async def f(prompts, completions): return [0.0] * len(prompts)",
                                  "class F:\n    async def __call__(self, prompts, completions): return [0]\nf = F()"])
def test_an_async_function_is_refused_at_load(function, refused, text):
    """It would return before it has begun."""
    assert "is an async function" in refused(function, text)


def test_builtins_and_what_is_no_function(function, refused):
    """What has no signature is called with prompts first; a number is no function, nor is a name that is not there."""
    scores = function("import operator\nclass N(list):\n    def __sub__(self, o): return [3.0, 4.0]\n"
                      "f = max\n")
    assert scores.by_name is False
    assert "has no function f" in refused(function, "f = 3") and "has no function f" in refused(function, "g = 3")


def test_its_changes_of_the_lists_have_no_effect(function):
    """What it does to its arguments stays with it: the rollout's texts are the same at the next call."""
    texts = ["why?", "who?"]
    f = function("def f(prompts, completions):\n    n = [len(p) for p in prompts]\n    prompts.clear()\n"
                 "    completions.pop()\n    return n")
    batch = rollout(("why", "so"), ("who", "nobody"), texts=texts)
    assert f(batch).tolist() == f(batch).tolist() == [4, 4] and texts == ["why?", "who?"]


def test_prompts_reach_it_whole(function, make_model):
    """Where training trims two prompts to the same last letters, the function still gets each as it stands in the file,
    through every reordering of rows and in held-out answers too; ids alone are decoded."""
    model = make_model(vocab_size=128, block_size=12)
    long = ["x" * 30 + "abc", "y" * 20 + "abc", "ab"]
    prompts, trimmed = encode_prompts(TOKENIZER, long, 4, "trim")
    assert trimmed == 2 and prompts == [[0, *map(ord, "abc")], [0, *map(ord, "abc")], [0, *map(ord, "ab")]]
    f = function("seen = []\ndef f(prompts, completions):\n    seen.append(prompts)\n"
                 "    return [len(p) for p in prompts]")
    batch = generate(model, prompts, 3, 0, 1.0, torch.Generator().manual_seed(0))
    assert f(batch).tolist() == [33, 23, 2]
    assert f(batch.take(torch.tensor([2, 0, 1])).take(torch.tensor([1, 2]))).tolist() == [33, 23]
    assert sys.modules["mine"].seen[-1] == long[:2]
    rows = evaluate.answer(model, model, {"score": f}, prompts, TOKENIZER, SimpleNamespace(
        seed=1, temperature=1.0, response_length=3), SimpleNamespace(device=CPU.device, autocast=lambda: NO_CONTEXT))
    assert [row["score"] for row in rows] == [33, 23, 2]
    plain = generate(model, [[*ids] for ids in prompts], 3, 0, 1.0, torch.Generator().manual_seed(0))
    assert plain.prompt_texts is None and f(plain).tolist() == [4, 4, 3]
    assert torch.equal(plain.tokens, batch.tokens)
    mixed = generate(model, [prompts[0], [*prompts[1]]], 3, 0, 1.0, torch.Generator().manual_seed(0))
    assert mixed.prompt_texts is None  # of one row its text is not known


class NoContext:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


NO_CONTEXT = NoContext()


def test_a_step_s_rollout_carries_whole_prompts(make_model):
    """Stage 3's own rollout, which sorts its rows by length: each row has the text of the prompt that it answers."""
    import train_ppo

    model, prompts = make_model(), [Prompt([0, 1 + i], f"prompt {i}", 0) for i in range(6)]
    run = SimpleNamespace(device=CPU.device, autocast=lambda: NO_CONTEXT,
                          generator=lambda step, purpose: torch.Generator().manual_seed(3))
    o = SimpleNamespace(response_length=8, temperature=1.0, group_size=1)
    batch = train_ppo.roll_out(model, prompts, [4, 0, 5, 2, 2, 1], 0, 0, o, run)
    assert batch.prompt_texts == [f"prompt {i}" for i in batch.prompt_index.tolist()]
    assert batch.prompt_index.tolist() != [4, 0, 5, 2, 2, 1]


# ---- what it gives

@pytest.mark.parametrize("value", [
    "[1.5, 2]", "(1.5, 2)", "(x for x in (1.5, 2))", "iter([1.5, 2])", "map(float, ('1.5', '2'))",
    "{'a': 1.5, 'b': 2}.values()", "array.array('f', [1.5, 2])", "np.array([1.5, 2])",
    "np.array([1.5, 2], dtype=np.float16)", "np.array([1.5, 2], dtype=object)", "[np.float32(1.5), np.int64(2)]",
    "torch.tensor([1.5, 2])", "torch.tensor([1.5, 2], requires_grad=True)", "torch.tensor([1.5, 2]).bfloat16()",
    "[torch.tensor(1.5), torch.tensor(2., requires_grad=True)]", "[Decimal('1.5'), Fraction(2)]",
    "[np.array(1.5), 2]", "Series([1.5, 2])", "collections.deque([1.5, 2])"])
def test_numbers_in_a_row(function, recwarn, value):
    """A list, an array of that shape, anything that gives one number an answer, in order."""
    f = function(f"import array, collections\nimport numpy as np, torch\nfrom decimal import Decimal\n"
                 f"from fractions import Fraction\n{SERIES}\ndef f(prompts, completions): return {value}")
    scores = f(TWO)
    assert scores.tolist() == [1.5, 2] and scores.dtype == torch.float32 and not scores.requires_grad
    assert not recwarn.list


SERIES = """
class Series:  # as pandas has it: its items go by labels
    def __init__(self, values): self.values, self.shape = values, (len(values),)
    def tolist(self): return self.values
    def __iter__(self): return iter(self.values)
    def __len__(self): return len(self.values)
"""


def test_booleans_are_numbers(function):
    """True is 1, False 0."""
    assert function("def f(prompts, completions): return [c == 'so' for c in completions]")(TWO).tolist() == [1, 0]


ODD = """class Odd:
    def __init__(self, value): self.value = value
    def __float__(self):
        print("made a float")
        if isinstance(self.value, BaseException): raise self.value
        return self.value
class Item(Odd):
    def item(self): return float(self)
"""


@pytest.mark.parametrize("value", ["Odd(2.5)", "Item(2.5)"])
def test_a_value_of_the_user_s_own_class_is_the_user_s_program(function, capsys, value):
    """What it prints goes where the function's own output goes, what it changes is put back, Ctrl-C within it counts."""
    f = function("import io, sys\n" + ODD + f"def f(prompts, completions):\n    sys.stdout = f.quiet = io.StringIO()\n"
                 f"    return [{value}, 1]\n")
    assert f(TWO).tolist() == [2.5, 1.0]
    print("still here")
    assert capsys.readouterr().out == "still here\n" and f.function.quiet.getvalue() == "made a float\n"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        function(ODD + "def f(prompts, completions): return [Item(KeyboardInterrupt()), 1]", "other.py")(TWO)


@pytest.mark.parametrize("value, words", [
    ("None", "returned None; expected a list of 2 numbers"), ("3.0", "returned a float; expected"),
    ("'12'", "returned a str"), ("b'12'", "returned a bytes"), ("bytearray(2)", "returned a bytearray"),
    ("{1.0, 2.0}", "returned a set"), ("{0: 1.0, 1: 2.0}", "returned a dict"), ("{0: 1., 1: 2.}.keys()", "a dict_keys"),
    ("memoryview(b'12')", "returned a memoryview"), ("lambda: 0", "returned a function"),
    ("np.array(1.5)", "a ndarray of shape ()"), ("np.ones((2, 1))", "a ndarray of shape (2, 1)"),
    ("torch.ones(1, 2)", "a Tensor of shape (1, 2); expected 2 numbers, of shape (2,)"), ("torch.ones(())", "shape ()"),
    ("np.float64(1)", "shape ()"), ("np.ones(3)", "returned 3 scores for 2 answers"), ("[]", "returned 0 scores for 2"),
    ("[1.0] * 9", "returned 9 scores for 2"), ("itertools.count()", "returned more than 2 scores for 2"),
    ("(x for x in [1.0])", "returned 1 scores for 2"), ("wait()", "returned a coroutine"),
    ("[1.0, '1.0']", "row 1: expected a number, found str; None is for where this reward does not apply"),
    ("['1.0', 1.0]", "row 0: expected a number, found str"), ("[1.0, b'1']", "row 1: expected a number, found bytes"),
    ("[1.0, [1.0]]", "row 1: expected a number, found list"), ("[1.0, 1j]", "number, found complex"),
    ("[1.0, np.complex64(1)]", "number, found complex64"), ("np.array([1, 1j])", "found complex"),
    ("[1.0, np.ones(1)]", "number, found ndarray"), ("[1.0, torch.ones(1)]", "row 1: expected a num"),
    ("[1.0, float('nan')]", "row 1: nan"), ("[1.0, float('inf')]", "row 1: inf"), ("[10 ** 400, 1.0]", "row 0: inf, no number below a million, for the completion 'so'"),
    ("torch.tensor([1., float('nan')])", "row 1: nan"), ("[1.0, -1e7]", "row 1: -10000000.0, no number below a mil"),
    ("np.array(['1', '2'])", "row 0: expected a number, found str"), ("prompts", "row 0: expected a number, found str"),
    ("[1.0, Odd(SystemExit(3))]", "row 1: raised SystemExit: 3 ("), ("[Odd(GeneratorExit())] * 2", "row 0: raised Gen"),
    ("[1.0, Odd(ValueError('not yet'))]", "row 1: raised ValueError: not yet ("), ("[Odd(2.0), {}]", "row 1: expected"),
    ("(1 / 0 for p in prompts)", "raised ZeroDivisionError: division by zero ("),
    ("torch.ones(2, device='meta')", "raised "),
])
def test_what_is_no_row_of_numbers(function, refused, recwarn, value, words):
    """One line that says what was found, at which row, or of which shape."""
    f = function("import itertools\nimport numpy as np, torch\nasync def wait(): pass\n" + ODD +
                 f"def f(prompts, completions): return {value}")
    error = refused(f, TWO)
    assert "--reward " in error and words in error
    assert not recwarn.list


# ---- what it raises

RAISES = [("raise ValueError('boom')", "raised ValueError: boom ("), ("raise ValueError", "raised ValueError ("),
          ("assert prompts == 0", "raised AssertionError ("), ("raise SystemExit", "raised SystemExit ("),
          ("sys.exit(0)", "raised SystemExit: 0 ("), ("sys.exit('bye')", "raised SystemExit: bye ("),
          ("raise KeyboardInterrupt", "raised KeyboardInterrupt ("), ("raise GeneratorExit", "raised GeneratorExit ("),
          ("raise StopIteration", "raised StopIteration ("), ("raise BaseException('a\\nb')", "BaseException: a b ("),
          ("raise BaseExceptionGroup('two', [SystemExit(0)])", "raised BaseExceptionGroup: two (1 sub-exception) ("),
          ("raise Mute", "raised Mute ("), ("json.loads('{')", "raised JSONDecodeError: "),
          ("eval('1 +')", "raised SyntaxError: invalid syntax ("), ("f(prompts, completions)", "raised RecursionError")]


@pytest.mark.parametrize("doing, words", RAISES)
def test_what_it_raises_is_shown_with_its_place(function, refused, doing, words):
    """Whatever it is, one line: its name, its message if there is one, file and line, of the user's own files."""
    class Handler:
        def __call__(self, number, frame):
            pass
    signal.signal(signal.SIGINT, Handler())  # as in a run
    f = function("import json, sys\nclass Mute(Exception):\n    def __str__(self): raise ValueError\n"
                 f"def f(prompts, completions):\n    {doing}\n")
    error = refused(f, TWO)
    assert "mine.py:f: raised " in error and words in error and error.endswith("mine.py:5)\n")


def test_the_place_is_the_last_in_the_user_s_folder(function, refused, tmp_path):
    """An error in a file beside it is shown there, one within a library at the line that called it."""
    (tmp_path / "near.py").write_text("def go():\n\n    return int('x')\n")
    assert refused(function("import near\ndef f(prompts, completions): near.go()"), TWO).endswith("near.py:3)\n")


@pytest.mark.parametrize("text, words, place", [
    ("\nraise ValueError('boom')", "raised ValueError: boom (", "mine.py:2)\n"),
    ("import sys\nsys.exit(0)", "raised SystemExit: 0 (", "mine.py:2)\n"),
    ("\n\ndef f(:", "raised SyntaxError: invalid syntax (", "mine.py:3)\n"),
    ("import nowhere", "raised ModuleNotFoundError: No module named 'nowhere' (", "mine.py:1)\n"),
    ("x = '\\0'\nimport bad", "raised SyntaxError: ", "bad.py:1)\n")])
def test_what_its_import_raises(function, refused, tmp_path, text, words, place):
    """The same, also of a file beside it; no module stays behind."""
    (tmp_path / "bad.py").write_text("(")
    error = refused(function, text)
    assert f"mine.py:f: importing it {words}" in error and error.endswith(place)
    assert "mine" not in sys.modules and not rewards.LOADED


def test_ctrl_c_is_passed_on_where_no_run_handles_it(function):
    """python -m minirlhf.evaluate has Python's own handler: Ctrl-C ends the command, not as an error of the function;
    so does a run's second, in a notebook."""
    f = function("def f(prompts, completions): raise KeyboardInterrupt")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        f(TWO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    f.run = SimpleNamespace(stop=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        f(TWO)


# ---- what it changes

CHANGES = ["sys.stdout.close()", "sys.stderr.close()", "sys.stdout = sys.stderr = io.StringIO()",
           "sys.stdout = io.TextIOWrapper(sys.stdout.detach())", "sys.stdout = sys.stderr = None", "del sys.stdout",
           "torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)", "os.chdir('/')",
           "torch.set_default_device('meta')"]


@pytest.mark.parametrize("when", ["import", "call"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_it_changes_of_the_process_is_put_back(function, tmp_path, monkeypatch, capfd, change, when):
    """Streams closed, detached or replaced, the working folder, torch's defaults: the run goes on with its own."""
    monkeypatch.chdir(tmp_path)
    # streams of its own, so that pytest's stay whole
    sys.stdout, sys.stderr = (open(n, "w", closefd=False, buffering=1) for n in (1, 2))
    at = {"import": 1, "call": 0, when: 1}
    f = function("import io, os, sys, torch\n" + (change if at["import"] and when == "import" else "")
                 + f"\ndef f(prompts, completions):\n    {change if when == 'call' else 'pass'}\n    return [1, 2]\n")
    for _ in range(2):
        assert f(TWO).dtype == torch.float32
        print("out", flush=True)
        print("err", file=sys.stderr, flush=True)
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and os.getcwd() == str(tmp_path)
        assert torch.empty(1).device.type == "cpu"
    assert capfd.readouterr() == ("out\nout\n", "err\nerr\n")


def test_its_own_surroundings_come_back_with_its_turn(function, tmp_path, monkeypatch):
    """A file that on import goes to its own folder and silences a library finds both as it left them."""
    monkeypatch.chdir(tmp_path)
    f = function("import io, os, sys\nos.chdir(os.path.dirname(__file__))\nsys.stdout = quiet = io.StringIO()\n"
                 "def f(prompts, completions):\n    print('loud')\n    return [float(open('weight').read())] * 2",
                 "below/mine.py")
    (tmp_path / "below" / "weight").write_text("3")
    assert f(TWO).tolist() == [3, 3] and os.getcwd() == str(tmp_path)
    assert sys.modules["mine"].quiet.getvalue() == "loud\n"


@pytest.mark.parametrize("device", ["meta", "cuda", "cuda:7"])
def test_a_default_device_is_the_function_s_alone(function, device):
    """It is there again in the next turn; one that the machine lacks stops the function, not the run."""
    f = function(f"import torch\ntorch.set_default_device('{device}')\ndef f(prompts, completions):\n"
                 f"    return [len(str(torch.empty(1, device='cpu' if '{device}' != 'meta' else None).device))] * 2")
    assert f(TWO).tolist() == [len("meta" if device == "meta" else "cpu")] * 2
    assert torch.empty(1).device.type == "cpu"


# ---- how its files are imported

def test_its_module_has_its_file_s_name(function):
    """So pickle finds its functions in a worker."""
    f = function("def f(prompts, completions): return [1, 2]")
    assert f.function.__module__ == "mine" and sys.modules["mine"].f is f.function
    assert multiprocessing.reduction.ForkingPickler.dumps(f.function)


def test_helpers_of_any_name(function, tmp_path):
    """Files beside it are found first in its own imports, and in theirs, whatever other module has the name; what
    json.py lacks is the standard one's. Everybody else's json stays the standard one, also when imported later."""
    standard = json
    (tmp_path / "json.py").write_text("import csv\nbonus = csv.bonus\ndef loads(text): return 'mine'\n")
    (tmp_path / "csv.py").write_text("bonus = 2\n")
    (tmp_path / "reward.py").write_text("from json import bonus\n")
    sys.modules.pop("csv", None)
    f = function("import json\nfrom json import bonus, dumps\nimport reward, os.path as where\n"
                 "def f(prompts, completions):\n    import csv\n    assert json.loads('3') == 'mine' and where.join\n"
                 "    return [json.bonus + reward.bonus, float(dumps(csv.bonus))]\n")
    assert f(TWO).tolist() == [4, 2]
    assert sys.modules["json"] is standard and standard.loads("3") == 3
    import csv
    assert csv.reader and not hasattr(csv, "bonus")
    assert sys.modules["json_2"].bonus == 2 and f.function.__module__ == "mine" and "reward" in sys.modules


def test_a_reward_file_that_has_a_standard_name(function):
    """json.py:f scores, and is nobody's json but its own."""
    standard = json
    f = function("import json\ndef f(prompts, completions): return [float(json.dumps(3))] * 2", "json.py")
    assert f(TWO).tolist() == [3, 3] and sys.modules["json"] is standard and f.function.__module__ == "json_2"


@pytest.mark.parametrize("name", ["my-reward.py", "my.reward.py", "1.py", "torch.py", "minirlhf.py", "train_ppo.py"])
def test_a_reward_file_of_any_name(function, name):
    """Hyphens, dots, digits, and names that other modules have."""
    before = sys.modules.get(name[:-3])
    f = function("import torch\ndef f(prompts, completions): return torch.ones(2)", name)
    assert f(TWO).tolist() == [1, 1] and sys.modules.get(name[:-3]) in (before, sys.modules[f.function.__module__])
    assert multiprocessing.reduction.ForkingPickler.dumps(f.function)
    import minirlhf, train_ppo
    assert train_ppo.Options and minirlhf.rewards


def test_two_files_of_one_name(function, tmp_path):
    """--reward a/score.py:f --judge b/score.py:f, each with its own common.py: each is right, as is one file twice."""
    for folder, n in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "common.py").write_text(f"number = {n}\n")
    text = "import common\ndef f(prompts, completions): return [common.number] * 2"
    a, b, again = function(text, "a/score.py"), function(text, "b/score.py"), function(text, "a/score.py", "--judge")
    assert a(TWO).tolist() == [1, 1] == again(TWO).tolist() and b(TWO).tolist() == [2, 2]
    assert a.function is again.function and (a.function.__module__, b.function.__module__) == ("score", "score_2")
    for f in (a, b):
        assert multiprocessing.reduction.ForkingPickler.dumps(f.function)


def test_a_file_that_is_imported_already_stays_one_module(function, tmp_path, monkeypatch):
    """As train_ppo for a reward file that stands beside it: its classes are not made a second time."""
    (tmp_path / "near.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    near = importlib.import_module("near")
    f = function("import near\ndef f(prompts, completions): return [near is first] * 2\nfirst = None")
    sys.modules["mine"].first = near
    assert f(TWO).tolist() == [1, 1] and sys.modules["near"] is near


def test_a_changed_file_is_read_again(function):
    """In a notebook: the file is edited, main called again."""
    assert function("def f(prompts, completions): return [1, 1]")(TWO).tolist() == [1, 1]
    f = function("def f(prompts, completions): return [2, 2]")
    assert f(TWO).tolist() == [2, 2] and f.function.__module__ == "mine"


def test_a_file_that_is_edited_during_the_run_is_not(function, tmp_path):
    """What is loaded stays, whatever is imported later."""
    f = function("def f(prompts, completions): return [1, 1]")
    (tmp_path / "mine.py").write_text("f = 3")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("one_that_is_not_there")
    assert sys.modules["mine"].f is f.function


def test_a_worker_s_other_imports_do_not_fail_with_a_file(tmp_path):
    """What cannot be loaded again there is raised where it is asked for, not at the worker's next import."""
    (tmp_path / "broken.py").write_text("1 / 0")
    sys.path.append(str(tmp_path / "broken.py"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("one_that_is_not_there")


def test_relative_imports_in_a_package(function, tmp_path):
    """A file among others with __init__.py is package.module: `from .near import x`, `from .. import y` work."""
    for folder, text in (("pack", "y = 1\n"), ("pack/sub", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(text)
    (tmp_path / "pack" / "sub" / "near.py").write_text("from .. import y\nx = 10 + y\n")
    f = function("from .near import x\nfrom .. import y\nimport near\n"
                 "def f(prompts, completions): return [x, y]", "pack/sub/mine.py")
    assert f(TWO).tolist() == [11, 1] and f.function.__module__ == "pack.sub.mine"
    assert sys.modules["pack.sub.near"].x == 11
    assert multiprocessing.reduction.ForkingPickler.dumps(f.function)


def test_its_files_belong_to_the_run(function, tmp_path):
    """What a resumed run compares: the file, and those beside it that it imports, whatever was loaded besides."""
    for name, text in (("near.py", "import far\n"), ("far.py", "import near\n"), ("other.py", "")):
        (tmp_path / name).write_text(text)
    function("import other\ndef f(prompts, completions): pass", "judge.py")
    f = function("import near, os\ndef f(prompts, completions): pass")
    spec = f"{tmp_path}/mine.py:f"
    assert rewards.files(spec) == [str(tmp_path / name) for name in ("mine.py", "near.py", "far.py")]
    assert rewards.files(f"{tmp_path}/unread.py:f") == [str(tmp_path / "unread.py")]
    assert f.path == str(tmp_path / "mine.py")


POOLED = """
import multiprocessing, os
from {helper} import bonus
def one(pair): return len(pair[1]) + bonus(), os.getpid()
def f(prompts, completions):
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        scores, pids = zip(*pool.map(one, zip(prompts, completions)))
    assert os.getpid() not in pids
    return scores
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_its_pools_find_its_functions(function, tmp_path, method):
    """Every start method, with a helper beside it: a worker that begins anew finds both by sys.path."""
    (tmp_path / "reward.py").write_text("def bonus(): return 0.5\n")
    f = function(POOLED.format(helper="reward", method=method))
    assert f(TWO).tolist() == [2.5, 6.5]


def test_a_worker_repeats_what_its_parent_loaded(function, tmp_path, monkeypatch):
    """Under every start method names that are taken, as b/score.py and json.py, mean the same file as in the parent:
    the worker's sys.path, which is the parent's, names the reward files, and they are loaded before another import."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"def bonus(): return {folder!r}\n")
    names = [function("from json import bonus\ndef f(prompts, completions): return bonus()",
                      f"{folder}/score.py").function.__module__ for folder in "ab"]
    assert names == ["score", "score_2"]
    rewards.LOADED.clear(), rewards.TRIED.clear()
    for name in ("score", "score_2", "json_2", "json_3"):
        del sys.modules[name]
    assert importlib.import_module("score_2").f(0, 0) == "b" and importlib.import_module("score").f(0, 0) == "a"
    assert sys.modules["json"] is json and sys.modules["json_3"].bonus() == "b"


def test_options_that_a_function_makes_idle_are_named(tmp_path, capsys, refused):
    """--reward_model, --reward_clip and --value_init beside --reward: a line each; none where they are not given. A
    function under the name of a reward model, whose options would half apply, is refused."""
    import train_ppo

    said = []
    for more in ([], ["--reward_model", "x.pt", "--reward_clip", "1", "--value_init", "rm"]):
        train_ppo.read_options(["--reward", "mine.py:f", *more])
        said.append(capsys.readouterr().out)
    assert said == ["", "".join(f"warning: --{name} has no effect with --reward\n"
                                for name in ("reward_model", "reward_clip", "value_init"))]
    error = refused(train_ppo.read_options, ["--reward_model", "mine.py:f"])
    assert error == "error: --reward_model mine.py:f: a function is named by --reward\n"


# ---- its processes

@dataclass
class Options(RunOptions):
    out_dir: str = ""
    device: str = "cpu"


@pytest.fixture
def run(tmp_path):
    """A run that has begun, in tmp_path/out, where signals do what they usually do in Python."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Run(Options(out_dir=str(tmp_path / "out")), "ppo") as run:
        run.start_logs(0)
        yield run


def fork(child, behind=False):
    """A process that has no more than this one, forked by Python or behind its back, runs child() -> its pid.

    It prints nothing and ends with status 7 where it gets KeyboardInterrupt, else 0."""
    sys.stdout.flush()
    pid = ctypes.CDLL(None).fork() if behind else os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child()
        except KeyboardInterrupt:
            os._exit(7)
        finally:
            os._exit(0)
    return pid


def told_to_end(child, *numbers, behind=False):
    """Status of a forked child that was sent the signals, one after the other, once it had begun child()."""
    begun, begin = os.pipe()
    pid = fork(lambda: (os.write(begin, b"."), child()), behind)
    os.read(begun, 1)
    for number in numbers:
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("behind", [False, True], ids=["os.fork", "fork in C"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_forked_child_dies_when_told_to(run, capfd, stopped, behind):
    """By SIGTERM at once, also where the run itself has been told to stop before; the run's folder stays as it is."""
    if stopped:
        os.kill(os.getpid(), signal.SIGINT)
    held = names(run.out_dir)
    assert told_to_end(lambda: time.sleep(60), signal.SIGTERM, behind=behind) == -signal.SIGTERM
    assert names(run.out_dir) == held == ["config.json", "lock"]
    assert capfd.readouterr().err.count("finishing this step") == stopped and bool(run.stop) == stopped
    run.stop = 0


def test_ctrl_c_in_a_forked_child(run):
    """Raises KeyboardInterrupt there, as it did before the run; the run's own handler stands on."""
    assert told_to_end(lambda: time.sleep(60), signal.SIGINT) == 7
    assert signal.getsignal(signal.SIGINT) == run._on_signal and not run.stop


def test_a_handler_of_the_user_s_own_stays(run):
    """In its children too; what stood before the run stands after it."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(9))
    assert told_to_end(lambda: time.sleep(60), signal.SIGTERM) == 9


def test_a_signal_at_the_fork_is_not_lost(run, monkeypatch):
    """It waits in the child until the child's handlers are right: Pool.terminate() ends workers that just began."""
    pid = os.fork()
    # what Python does in a child, with the signal there already
    if not pid:
        runtime.before_fork()
        os.kill(os.getpid(), signal.SIGTERM)
        runtime.after_fork_in_child()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_signals_are_held_while_it_forks(run):
    """Both, from before the fork until after it, in parent and child; then none."""
    vars(runtime.FORKING).clear()
    pid = fork(lambda: os._exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert runtime.FORKING.mask == signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    runtime.before_fork()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(runtime.STOPS)
    runtime.after_fork()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("behind", [False, True], ids=["os.fork", "fork in C"])
@pytest.mark.parametrize("leave", [lambda run: run.release(), lambda run: run.__exit__(None, None, None)])
def test_a_child_never_releases_the_run(run, leave, behind):
    """Whatever of the run it calls on its way out."""
    os.waitpid(fork(lambda: leave(run), behind), 0)
    assert names(run.out_dir) == ["config.json", "lock"] and run.lock


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    """kill -9 of the run: its orphan goes on, and another run may have the folder."""
    (told, tell), (ready, begun) = os.pipe(), os.pipe()

    def begin():
        run = Run(Options(out_dir=str(tmp_path / "out")), "ppo")
        os.write(tell, b"%d\n" % fork(lambda: (os.write(begun, b"."), time.sleep(60))))
        assert run.lock and os.read(ready, 1)  # the orphan has let go of the lock
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(begin), 0)
    orphan = int(os.read(told, 20))
    try:
        os.kill(orphan, 0)  # it lives
        with Run(Options(out_dir=str(tmp_path / "out")), "ppo") as run:
            assert run.lock
    finally:
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("ending, status", [("return [0]", 0), ("sys.exit(5)", 5), ("sys.exit()", 0), ("1 / 0", 1),
                                            ("sys.exit('no')", 1), ("raise KeyboardInterrupt", 1)])
def test_a_child_that_comes_out_of_the_function_ends(function, run, ending, status):
    """It does not train on: it exits as a program would, and the parent has its scores."""
    f = function(f"""
import os, sys
def f(prompts, completions):
    pid = os.fork()
    if not pid:
        os.close(2)
        {ending}
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0]
""")
    pid = os.getpid()
    scores = f(TWO)
    if os.getpid() != pid:
        os._exit(99)
    assert scores[0] == status and names(run.out_dir) == ["config.json", "lock"]


def test_a_child_that_comes_out_of_the_import_ends(function):
    """The same where the file forks a server."""
    pid = os.getpid()
    f = function("import os\nchild = os.fork()\nif child:\n    status = os.waitpid(child, 0)[1]\n"
                 "def f(prompts, completions): return [status, status]")
    if os.getpid() != pid:
        os._exit(99)
    assert f(TWO).tolist() == [0, 0]


def test_a_pool_around_a_busy_worker_ends(function, run):
    """Leaving `with Pool(2)` tells its workers to end, and they do, within the run too."""
    f = function("import multiprocessing, time\ndef busy(n):\n    time.sleep(60)\ndef f(prompts, completions):\n"
                 "    with multiprocessing.get_context('fork').Pool(2) as pool:\n        pool.map_async(busy, [1, 2])\n"
                 "        time.sleep(0.1)\n    return [1, 2]")
    since = time.monotonic()
    assert f(TWO).tolist() == [1, 2] and time.monotonic() < since + 30


# ---- main from other programs

def test_signals_are_given_back(tmp_path):
    """To whatever stood there, also when the run fails; twice in one process; the lock is gone."""
    others = {*runtime.RUNS}
    def mine(number, frame):
        pass
    signal.signal(signal.SIGINT, mine)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for error in (None, KeyError, SystemExit):
        try:
            with Run(Options(out_dir=str(tmp_path / "out")), "ppo") as run:
                assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == run._on_signal
                if error:
                    raise error
        except (KeyError, SystemExit):
            pass
        assert signal.getsignal(signal.SIGINT) is mine and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert not (tmp_path / "out" / "lock").exists() and not {*runtime.RUNS} - others


def test_a_run_in_a_thread(tmp_path):
    """Only the main thread may handle signals: elsewhere the run leaves them, and all else is as ever."""
    seen = []

    def work():
        with Run(Options(out_dir=str(tmp_path / "out")), "ppo") as run:
            seen.append((signal.getsignal(signal.SIGINT), run.lock is not None))
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, True)] and not (tmp_path / "out" / "lock").exists()


def test_a_second_ctrl_c_leaves_a_notebook_alive(tmp_path, monkeypatch):
    """Where a prompt outlives the run it raises KeyboardInterrupt, and the run leaves as it does by any error."""
    monkeypatch.setattr(sys, "ps1", "In", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Run(Options(out_dir=str(tmp_path / "out")), "ppo") as run:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert run.stop == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "out" / "lock").exists()


def test_windows_is_told_in_a_sentence(monkeypatch, refused):
    """There is no fcntl there."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("elsewhere", runtime.__file__)
    assert "within WSL" in refused(spec.loader.exec_module, importlib.util.module_from_spec(spec))


TINY = ("--data_dir data --device cpu --dtype float32 --batch_size 4 --response_length 6 --eval_interval 9 "
        "--overwrite").split()
SFT = scratch("sft") + ("--n_layer 1 --n_head 2 --n_embd 8 --vocab_size 257 --block_size 16 --num_train_epochs 1 --long_prompts trim "
       "--out_dir out/sft").split()
PPO = scratch("ppo") + ("--init_from out/sft/ckpt.pt --total_episodes 4 --num_mini_batches 1 --num_ppo_epochs 1 --value_warmup 0 "
       "--num_eval_prompts 3 --long_prompts trim --reward mine.py:f --judge mine.py:g --out_dir out/ppo").split()


def test_main_from_a_notebook(tmp_path, monkeypatch, capsys):
    """train_sft.main and train_ppo.main from a thread and then, twice, from the main one: all works, handlers and locks
    are as before, the reward and the judge see every prompt whole, in training, evaluations and the closing report."""
    import train_ppo
    import train_sft

    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    prompts = [f"the {word} of a long story" for word in ("beginning", "middle", "end")]
    for name, records in (("sft", [{"prompt": "a", "completion": " b."}] * 8),
                          ("prompts", [{"prompt": p} for p in prompts])):
        for split in ("train", "val"):
            with open(f"data/{name}.{split}.jsonl", "w") as f:
                f.writelines(json.dumps(record) + "\n" for record in records)
    with open("mine.py", "w") as f:
        f.write("seen = []\ndef f(completions, prompts):\n    seen.extend(prompts)\n"
                "    return [len(p) for p in prompts]\n"
                "def g(prompts, completions): return [-x for x in f(completions, prompts)]\n")
    before, threads = [signal.getsignal(number) for number in runtime.STOPS], torch.get_num_threads()
    others = {*runtime.RUNS}
    thread = threading.Thread(target=train_sft.main, args=([*SFT, *TINY],))
    thread.start()
    thread.join()
    for _ in range(2):
        train_ppo.main([*PPO, *TINY])
    seen = sys.modules["mine"].seen
    assert set(seen) == set(prompts) and len(seen) > 30 and threads == torch.get_num_threads()
    rows = [json.loads(line) for line in open("out/ppo/metrics.jsonl")]
    lengths = [len(p) for p in prompts]
    assert rows[-1]["final"]["after"]["score"][0] == pytest.approx(sum(lengths) / 3)
    assert rows[-1]["final"]["after"]["judge_score"][0] == pytest.approx(-sum(lengths) / 3)
    assert [signal.getsignal(number) for number in runtime.STOPS] == before and not {*runtime.RUNS} - others
    assert not os.path.exists("out/sft/lock") and not os.path.exists("out/ppo/lock")
    assert "longer than 10 tokens: trimmed at the left" in capsys.readouterr().out
