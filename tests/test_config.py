"""A dataclass as a command line: types, ranges, choices, presets, and what is refused."""
import argparse
import importlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import train_ppo
import train_rm
import train_sft
from minirlhf import adapters, config, hub, runtime
from minirlhf.config import Parser, RunOptions, did_you_mean, fail, parse, positive_int, ranks


@dataclass
class Options(RunOptions):
    """A made-up stage."""
    out_dir: str = "out/x"  # where the output goes
    batch_size: int = 8  # rows a step [1..]
    dropout: float = 0.1  # share of numbers that are dropped [0..1)
    temperature: float = 1.0  # of sampling (0..]
    share: float = 0.5  # a closed range [0.25..0.75]
    margin: float = 0.0  # any finite number; 50% is a lot
    optimizer: Literal["muon", "adamw"] = "muon"  # which one
    whiten_rewards: bool = False  # divide rewards by their deviation
    shuffle: bool = True  # on unless turned off
    more: tuple[str, ...] = ()  # texts
    rates: tuple[float, ...] = (0.5,)  # numbers [0..1]


@dataclass
class Stage(RunOptions):
    """Another."""
    seed: int = 7  # of this stage [5..8]


def bad(capsys, *argv):
    """What is said on standard error; the exit status is 2, nothing is printed on standard output."""
    with pytest.raises(SystemExit) as stop:
        parse(Options, list(argv))
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and not out and "Traceback" not in error
    return error


def test_defaults_are_the_dataclass_s():
    """No argument: Options()."""
    assert parse(Options, []) == Options()


@pytest.mark.parametrize("argv", [["--batch_size=3", "--out_dir=a b", "--dropout=0"],
                                  ["--batch_size", "3", "--out_dir", "a b", "--dropout", "0"]])
def test_both_forms_of_a_value(argv):
    """--name=value and --name value, converted to the field's type."""
    options = parse(Options, argv)
    assert (options.batch_size, options.out_dir, options.dropout) == (3, "a b", 0.0)
    assert type(options.dropout) is float and options.share == 0.5


@pytest.mark.parametrize("words, value", [
    (["--X"], True), (["--X=true"], True), (["--X", "True"], True), (["--X=1"], True), (["--X", "yes"], True),
    (["--X=false"], False), (["--X", "False"], False), (["--X=0"], False), (["--X=no"], False),
])
def test_forms_of_a_flag(words, value):
    """Alone it means True; true, 1, yes and false, 0, no are read in either form, whatever the default."""
    for name in ("whiten_rewards", "shuffle"):
        assert getattr(parse(Options, [word.replace("X", name) for word in words]), name) is value


@pytest.mark.parametrize("name, allowed, refused", [
    ("batch_size", ["1", "1000000"], ["0", "-3"]),
    ("dropout", ["0", "0.999"], ["1", "1.0", "-0.001", "2"]),
    ("temperature", ["1e-9", "50"], ["0", "0.0", "-1"]),
    ("share", ["0.25", "0.75"], ["0.2499", "0.7501"]),
    ("seed", ["0"], ["-1"]),  # an inherited option
    ("margin", ["-1e30", "0"], ["nan", "inf", "-inf"]),  # without a range, but a number all the same
    ("share", [], ["nan"]),
])
def test_ranges(capsys, name, allowed, refused):
    """"[" and "]" include an end, "(" and ")" exclude it; flag and value are named."""
    for value in allowed:
        assert getattr(parse(Options, [f"--{name}={value}"]), name) == float(value)
    for value in refused:
        error = bad(capsys, f"--{name}={value}")
        assert f"--{name} {value}" in error or f"--{name} {float(value)}" in error
        assert "must be" in error and error.count("\n") == 1


@pytest.mark.parametrize("argv, word", [
    (["--optimizer=sgd"], "sgd"),
    (["--batch_size=3.5"], "3.5"),
    (["--batch_size=many"], "many"),
    (["--dropout=x"], "x"),
    (["--whiten_rewards=maybe"], "maybe"),
    (["--batch_size"], "--batch_size"),  # no value
    (["--batchsize=3"], "--batchsize"),  # unknown
    (["--batch=3"], "--batch"),  # abbreviated
    (["--whiten"], "--whiten"),
    (["-batch_size=3"], "-batch_size"),
    (["3"], "3"),  # no name
])
def test_what_is_refused(capsys, argv, word):
    """A bad choice or type, a missing value, unknown and abbreviated names: the parser's error, which names it."""
    assert word in bad(capsys, *argv)


@pytest.mark.parametrize("words, more", [
    ([], ()), (["--more", "a"], ("a",)), (["--more=b", "--seed", "3", "--more", "a"], ("b", "a")),
    (["--more", "a", "--more=a"], ("a", "a")), (["--more", ""], ()), (["--more", "@x", "--more="], ("@x",)),
    (["--more", "a b,c=d"], ("a b,c=d",)),
])
def test_an_option_that_may_be_given_again(words, more):
    """All its values in their order, in both forms; "" is none."""
    assert parse(Options, words).more == more and parse(Options, words).rates == (0.5,)
    assert ("more" in parse(Options, words).given) == bool(words)


def test_each_value_of_several_is_looked_at(capsys, refused):
    """By the type and the range of one; the default gives way to the first that is given."""
    assert parse(Options, ["--rates", "1", "--rates=0.25", "--rates", "1e-1"]).rates == (1.0, 0.25, 0.1)
    assert bad(capsys, "--rates=1", "--rates=2") == "error: --rates 2.0: must be at most 1\n"
    assert "'x'" in bad(capsys, "--rates=1", "--rates=x") and "one argument" in bad(capsys, "--more=a", "--more")
    assert "expected one argument" in bad(capsys, "--more", "--seed", "3")
    assert "--more '\\\\udcff'" in bad(capsys, "--more", "a", "--more", "\udcff")
    assert bad(capsys, "--more=--") if sys.version_info < (3, 13) else parse(Options, ["--more=--"]).more == ("--",)
    assert refused(config.check_ranges, Options(more=("a", 3))) == "error: --more 3: must be of type str\n"


def test_files_and_an_option_that_may_be_given_again(preset, capsys):
    """A line for each value. What comes later takes the place of all that was said before: a file of the command
    line's, the command line of a file's, and one file of another's."""
    file = preset('more = "a"\nseed = 3\n--more b')
    assert parse(Options, [file]).more == ("a", "b") and not capsys.readouterr().err
    assert config.preset_values(Options, file[1:]) == {"more": ("a", "b"), "seed": 3}
    assert parse(Options, [file, "--more", "c", "--seed", "4", "--more=d"]).more == ("c", "d")
    assert parse(Options, [file, "--more="]).more == ()
    assert not capsys.readouterr().err
    for before in (["--more", "c", "--more=d"], [file]):
        assert parse(Options, [*before, file]) == Options(more=("a", "b"), seed=3)
        notes = capsys.readouterr().err
        assert notes.count("more = a takes the place of the --more before the file") == 1 and "more = b" not in notes
    assert parse(Options, ["--more", "c", preset("seed = 3"), "--more", "d"]).more == ("c", "d")
    assert f"{file[1:]}:1: --rates 3.0: must be at most 1" in bad(capsys, preset("rates = 3"))
    assert "more: ['a']: each option takes one number, word or text in quotes; write a line for each" in bad(
        capsys, preset("more = ['a']"))
    assert "rates = x: expected a number" in bad(capsys, preset("rates = x"))
    assert "put the value in quotes if it is a part" in bad(capsys, preset("more = a,"))


def test_a_command_line_that_gives_several(monkeypatch):
    """What --resume's advice and the next command print is read back as it was."""
    monkeypatch.setattr(Options, "stage", "")
    for o in (Options(more=("a b", "-c", "@d")), Options(more=("x",), rates=(0.25, 1.0))):
        assert parse(Options, shlex.split(" ".join(runtime.shortest(o)))) == o
    assert runtime.shortest(Options(more=("a", "b"))) == ["--more a --more b"]
    assert parse(Options, ["--rates", "1"]).rates == (1.0,)


def test_several_values_in_what_a_run_wrote():
    """Of config.json (a list), of a checkpoint (a tuple), of a run that knew one value only (a text, "" for none)."""
    for written, more in ((["a", "b"], ("a", "b")), (("a",), ("a",)), ("a", ("a",)), ("", ()), ([], ())):
        assert config.as_fields(Options, {"more": written, "seed": 1, "out_dir": ""}) == {
            "more": more, "seed": 1, "out_dir": ""}


def test_presets(tmp_path, capsys):
    """@file reads `name = value`, `--name=value` and `flag` lines, comments and blank ones aside; what comes later
    on the command line wins."""
    preset = tmp_path / "small.txt"
    preset.write_text("# small and quick\n\nbatch_size = 2\n  out_dir=out/small # beside the others\n--dropout=0.5\n"
                      "whiten_rewards\nshuffle = false\n   # done\nmargin=-1.5")
    options = parse(Options, [f"@{preset}"])
    assert options == Options(batch_size=2, out_dir="out/small", dropout=0.5, whiten_rewards=True, shuffle=False,
                              margin=-1.5)
    assert parse(Options, [f"@{preset}", "--batch_size=5"]).batch_size == 5
    assert parse(Options, ["--batch_size=5", f"@{preset}"]).batch_size == 2
    preset.write_text("batch_size = 0")
    assert "--batch_size 0" in bad(capsys, f"@{preset}")
    preset.write_text("batchsize = 1")
    assert "batchsize" in bad(capsys, f"@{preset}")
    assert "none.txt" in bad(capsys, f"@{tmp_path / 'none.txt'}")


def test_comments_are_the_help(capsys):
    """--help shows each option, own and inherited, with its comment, choices and default, and exits 0."""
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "A made-up stage." in text
    for words in ("--batch_size INT rows a step [1..] (default: 8)",
                  "--optimizer {muon,adamw} which one (default: muon)", "any finite number; 50% is a lot",
                  "--whiten_rewards [BOOL] divide rewards by their deviation",
                  "--more STR texts (may be given again) --rates", "numbers [0..1] (may be given again) (default: (0.5,))",
                  "--seed INT every random choice is a function of"):
        assert words in text


def test_a_stage_may_give_an_inherited_option_its_own_line():
    """Its default, comment and range are what counts."""
    assert parse(Stage, []).seed == 7
    for seed in (4, 9):
        with pytest.raises(SystemExit):
            parse(Stage, [f"--seed={seed}"])


# ---- files of options


@pytest.fixture
def preset(tmp_path):
    """preset(content) -> "@FILE" of a file that holds it."""
    def make(content):
        (tmp_path / "o.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"@{tmp_path / 'o.txt'}"
    return make


@pytest.mark.parametrize("content, expected", [
    ("\ufeffbatch_size = 2\r\nmargin=1\r\n", {"batch_size": 2, "margin": 1.0}),  # Windows
    ('out_dir = "my run # 1"  # a comment', {"out_dir": "my run # 1"}),
    ("out_dir = 'say \"x\"'", {"out_dir": 'say "x"'}),
    ('out_dir = "" # none', {"out_dir": ""}),
    ("out_dir = a#b\t# c", {"out_dir": "a#b"}), ("out_dir = 'a;' # b,", {"out_dir": "a;"}),
    ("out_dir = C:/a,b # c;", {"out_dir": "C:/a,b"}), ("--out_dir C:/a", {"out_dir": "C:/a"}),
    ("whiten_rewards = True # as in Python\nshuffle=false", {"whiten_rewards": True, "shuffle": False}),
    ("batch_size = 1_000\ndropout = 5e-1", {"batch_size": 1000, "dropout": 0.5}),
    ("optimizer = 'adamw'", {"optimizer": "adamw"}),
    ("--batch_size 3\n--whiten_rewards\nshuffle # alone", {"batch_size": 3, "whiten_rewards": True, "shuffle": True}),
    ("margin = -1.5", {"margin": -1.5}),
    ("out_dir = @x", {"out_dir": "@x"}),
    ("", {}),
])
def test_habits_of_other_programs_are_read(preset, content, expected):
    """A byte order mark, quotes, TOML's and nanoGPT's spellings, options as a shell takes them."""
    assert parse(Options, [preset(content)]) == Options(**expected)


@pytest.mark.parametrize("content, line, words", [
    ("[training]\nbatch_size = 2", 1, ["[training]", "no sections"]),
    ("[sft]\nbatch_size = 2", 1, ["[sft]", "this command takes no sections"]),
    ("batch_size: 2", 1, ["`batch_size = value`", "batch_size: 2", "= in place of the colon"]),
    ("--out_dir : x", 1, ["`out_dir = value`", "= in place of the colon"]),
    ('"batch_size": 2,', 1, ["`batch_size = value`", "= in place of the colon"]),
    ("import os", 1, ["`name = value`"]),
    ('{"batch_size": 2}', 1, ["`name = value`"]),
    ("\n# two\nbatch_size = [1, 2]", 3, ["batch_size", "one number"]),
    ("batch_size = 12*1024", 1, ["a whole number", "nothing is computed"]),
    ("dropout = 1/3", 1, ["a number", "nothing is computed"]),
    ("batch_size = 1e3", 1, ["batch_size = 1e3", "a whole number"]),
    ("batch_size = 8,", 1, ["batch_size: 8,", "leave the ',' out"]), ("margin = 2 ;", 1, ["2 ;", "leave the ';' out"]),
    ("out_dir = a;  # x", 1, ["leave the ';' out, or put the value in quotes"]),
    ("--check true;", 1, ["leave the ';' out"]),
    ("out_dir = 'a', # x", 1, ["leave the ',' out"]), ('optimizer = "adamw";', 1, ["leave the ';' out"]),
    ("whiten_rewards = maybe", 1, ["true or false"]),
    ("optimizer = sgd", 1, ["one of muon, adamw"]),
    ("batch_size = 2\n\nmargin=1\nbatch_size = 3", 4, ["batch_size", "line 1 already"]),
    ("batch_size = 0", 1, ["--batch_size 0: must be at least 1"]), ("margin=1\r\nbatch_size = x", 2, ["a whole number"]),
    ("margin = 1\ndropout = inf", 2, ["must be a finite number"]),
    ("batch-size = 3", 1, ["no option batch-size; did you mean batch_size?"]),
    ("@other.txt", 1, ["@other.txt", "names no other"]),
    ("batch_size =", 1, ["a value is missing"]),
    ("batch_size # how many?", 1, ["a value is missing"]),
    ("out_dir = None", 1, ["None", "leave the line out"]),
    ("out_dir = 'a' + 'b'", 1, ["one text in quotes"]),
    ('out_dir = """a"""', 1, ["one text in quotes"]),
    ("--out_dir x --batch_size 3", 1, ["one option a line"]),
    (b"batch_size = 2\nout_dir = caf\xe9", 2, ["not UTF-8 at byte 28"]),
])
def test_a_bad_line_of_a_file_is_named(preset, capsys, content, line, words):
    """File, line, what stands there; one line, exit status 2."""
    file = preset(content)
    error = bad(capsys, file)
    assert error.startswith(f"error: {file[1:]}:{line}: ") and error.count("\n") == 1
    assert all(word in error for word in words)


def test_what_is_no_file_of_options(preset, tmp_path, capsys):
    """A folder, a pipe that nobody writes to, another encoding, a checkpoint: named at once."""
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("", "cannot be read")):
        assert word in bad(capsys, f"@{path}")
    for content, word in ((b"a\0b", "NUL"), ("a = 2".encode("utf-16"), "not UTF-8"), (b"a" * 1_000_001, "bytes")):
        assert word in bad(capsys, preset(content))


def test_a_file_and_the_command_line(preset, capsys):
    """What comes later wins; where that is the file, it is told. A value may begin with @."""
    file = preset("batch_size = 2")
    assert parse(Options, [file, "--batch_size", "5"]).batch_size == 5 and not capsys.readouterr().err
    assert parse(Options, ["--batch_size", "5", file]).batch_size == 2
    assert f"{file[1:]}:1: batch_size = 2 takes the place of the --batch_size before" in capsys.readouterr().err
    assert bad(capsys, file, "--batch_size", "0").startswith("error: --batch_size 0")  # which the file did not say
    assert parse(Options, ["--out_dir", "@x", "--check", file]) == Options(out_dir="@x", check=True, batch_size=2)


@pytest.mark.parametrize("word, meant", [
    ("--batch-size", "--batch_size"), ("--batchsize", "--batch_size"), ("-bs", "--batch_size"),
    ("--batch", "--batch_size"), ("--Batch_Size", "--batch_size"), ("--optimiser", "--optimizer"),
    ("--wr", "--whiten_rewards"), ("--drop-out", "--dropout"), ("--outdir", "--out_dir"), ("batch_size", "--batch_size"),
])
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(capsys, word, meant):
    """Dashes, initials, beginnings, slips."""
    for words in ([word, "3"], [f"{word}=3"]):
        assert f"unrecognized arguments: {word}" in (error := bad(capsys, *words)) and f"did you mean {meant}?" in error
    assert "did you mean" not in bad(capsys, "--zzz", "3")


def test_commands_answer_so_too(capsys):
    """Also those with commands of their own; learning rates by their initials."""
    parser = Parser(prog="x")
    parser.add_subparsers(dest="name", required=True).add_parser("one").add_argument("--data_dir")
    with pytest.raises(SystemExit):
        parser.parse_args(["one", "--data-dir", "3"])
    assert "did you mean --data_dir?" in capsys.readouterr().err
    rates = ["learning_rate", "muon_learning_rate"]
    assert did_you_mean("lr", rates) == "; did you mean learning_rate?"
    assert did_you_mean("learning-rate", rates, "--") == "; did you mean --learning_rate?"
    assert did_you_mean("rate", rates) == "; did you mean learning_rate or muon_learning_rate?"


@pytest.mark.parametrize("name", ["out/\udcff", "a\0b"])
def test_a_name_that_cannot_be_spelled(refused, name):
    """No checkpoint could hold it."""
    assert "cannot be spelled in UTF-8" in refused(parse, Options, ["--out_dir", name])


def test_an_error_is_one_line(refused):
    """Also where a file's name has several."""
    assert refused(fail, "a\nb\r\nc\u2028d: no") == "error: a b c d: no\n"


def test_an_error_steers_no_terminal(refused, preset, capsys):
    """A colour, a cursor that goes back, text from right to left, a lone surrogate: shown as Python writes them; what
    people write stays as it is."""
    assert refused(fail, "\x1b[31m \b\0\t \u202e \udcff café 漢字 😀 \\") == (
        "error: \\x1b[31m \\x08\\x00\\t \\u202e \\udcff café 漢字 😀 \\\n")
    assert "found 'x \\x1b[2J'" in bad(capsys, preset("x \x1b[2J"))
    assert bad(capsys, "@no\x1b[2Jwhere").startswith("error: @no\\x1b[2Jwhere: ")
    parse(Options, ["--out_dir=a", preset("out_dir = b\x1b[2J")])
    assert "out_dir = b\\x1b[2J takes the place" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1000001", "1" * 5000, "x"])
def test_counts_of_commands(text):
    """From one to a million."""
    assert positive_int("1000000") == 10 ** 6
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        positive_int(text)


# ---- ranks

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def surroundings(monkeypatch):
    """surroundings(**variables): of torchrun's, those are set and no others."""
    def change(**variables):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return change


@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 1)), (TORCHRUN, (1, 2)), ({"WORLD_SIZE": "1"}, (0, 1)), ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
    ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, (0, 1)), (dict.fromkeys(TORCHRUN, ""), (0, 1)),
])
def test_ranks_are_torchrun_s(surroundings, variables, expected):
    """All of its variables, or a process by itself."""
    surroundings(**variables)
    assert ranks() == expected


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "1"}, ["RANK=1 but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"]),
    ({"RANK": "0"}, ["RANK=0 but not"]), ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 but not RANK"]),
    ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0 but not"]), ({"RANK": "x"}, ["RANK=x"]),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, ["but not MASTER_ADDR, MASTER_PORT"]),
    (TORCHRUN | {"MASTER_PORT": ""}, ["but not MASTER_PORT"]),
    (TORCHRUN | {"RANK": "2"}, ["RANK=2, WORLD_SIZE=2", "below"]), (TORCHRUN | {"RANK": "-1"}, ["RANK=-1", "a number"]),
    (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "a number"]),
    (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT=http", "a number"]),
    ({"WORLD_SIZE": "1", "RANK": "1"}, ["RANK=1"]),
])
def test_stray_variables_of_torchrun(surroundings, refused, variables, words):
    """Row 55: what is there, what is missing, both ways out; before anything is done."""
    surroundings(**variables)
    error = refused(parse, Options, [])
    assert all(word in error for word in [*words, "torchrun --nproc_per_node=N", "env -u RANK"])


EARLIER = {"sft": ("init_from=scratch num_train_epochs=4 batch_size=64 micro_batch_size=64 optimizer=muon "
                   "learning_rate=0.01 muon_learning_rate=0.02 weight_decay=0.1 warmup_ratio=0.05 eval_interval=250 "
                   "log_interval=10 n_layer=4 n_head=4 n_embd=128 vocab_size=8192 block_size=128 dropout=0"),
           "rm": ("num_train_epochs=1 batch_size=16 micro_batch_size=16 optimizer=muon learning_rate=0.002 "
                  "muon_learning_rate=0.01 weight_decay=0.1 warmup_ratio=0.05 num_scale_samples=1024"),
           "ppo": ("total_episodes=11520 batch_size=192 response_length=48 temperature=1 kl_coef=0.055 "
                   "kl_baseline=0.14 reward_clip=2 missing_eos_penalty=1 gamma=1 lam=0.95 num_ppo_epochs=2 "
                   "num_mini_batches=2 "
                   "micro_batch_size=64 learning_rate=0.0003 value_learning_rate=0 cliprange=0.2 cliprange_value=0.2 "
                   "vf_coef=0.1 ent_coef=0.0245 value_warmup=4 max_grad_norm=1 eval_interval=20 num_eval_prompts=512")}


@pytest.mark.parametrize("stage", EARLIER)
def test_scratch_is_the_earlier_default(stage):
    """@scratch names every value that made the published figures of a model from random weights, in folders of its own:
    each stage starts from what the one before it leaves."""
    o = parse(importlib.import_module(f"train_{stage}").Options, ["@scratch"])
    expected = dict(word.split("=") for word in EARLIER[stage].split()) | {"lora_rank": "0"}
    expected |= {} if stage == "ppo" else {"max_steps": "0", "num_eval_texts": "0"}
    assert {name: f"{getattr(o, name):g}" if type(getattr(o, name)) is not str else getattr(o, name)
            for name in expected} == expected
    assert o.out_dir == f"out/scratch/{stage}" and (stage == "sft" or o.init_from == "out/scratch/sft/ckpt.pt")
    assert stage != "ppo" or o.reward_model == "out/scratch/rm/ckpt.pt"


# ---- stages

def help_of(script, capsys):
    """{heading: names of the options under it} of a script's --help."""
    with pytest.raises(SystemExit):
        parse(script.Options, ["--help"])
    text = capsys.readouterr().out
    return {heading: re.findall(r"^  --(\w+)", part, re.M) for heading, part in re.findall(
        r"^(\S[^\n]*):\n(.*?)(?=^\S|\Z)", text, re.M | re.S)}


@pytest.mark.parametrize("script, heading, last", [(train_sft, "model, data, output", "last_turn_only"),
                                                   (train_rm, "model, data, output", "long_prompts"),
                                                   (train_ppo, "models, data, output", "long_prompts")])
def test_each_option_stands_under_its_heading(script, heading, last, capsys):
    """What a stage declares again stays where all stages have it."""
    found = help_of(script, capsys)
    assert found[heading][0] == "data_dir" and found[heading][-1] == last
    assert "dtype" in found["the run"] and found["what learns"] == [*adapters.OPTIONS]
    assert sum(map(len, found.values())) == len(script.Options.__dataclass_fields__)


def test_a_section_that_is_not_known(tmp_path, capsys):
    """Refused whatever section stands before it; those of other stages are passed over."""
    file = tmp_path / "mine"
    for text, line in (("[PPO]\nseed = 1", 1), ("[sft]\nseed = 1\n[PPO]\nseed = 2", 3), ("[rm]\nx\n[foo]", 3)):
        file.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            parse(train_sft.Options, [f"@{file}"])
        assert f"{file}:{line}: [" in (error := capsys.readouterr().err) and "there are no sections but" in error
    file.write_text("[sft]\nseed = 1\n[ppo]\nseed = 2")
    assert [parse(s.Options, [f"@{file}"]).seed for s in (train_sft, train_rm, train_ppo)] == [1, 1337, 2]


def test_a_folder_named_as_a_preset(tmp_path, monkeypatch):
    """@scratch is the package's, unless a file has the name."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("scratch")
    assert parse(train_sft.Options, ["@scratch"]).init_from == "scratch"
    os.rmdir("scratch")
    (tmp_path / "scratch").write_text("seed = 5")
    assert parse(train_sft.Options, ["@scratch"]) == train_sft.Options(seed=5)


def test_the_next_command_of_a_preset():
    """Names nothing that the preset has for the next stage."""
    o = parse(train_sft.Options, ["@scratch"])
    found = [runtime.next_command("train_rm.py", o, init_from=path) for path in ("out/scratch/sft/ckpt.pt", "x")]
    assert found[0].endswith("train_rm.py @scratch") and found[1].endswith("train_rm.py @scratch --init_from x")


PUBLISHED = {"gpt2-imdb": dict(total_episodes=51200, batch_size=256, response_length=16, num_ppo_epochs=4,
                               learning_rate=1.41e-5, kl_coef=0.2, adaptive_kl_target=6.0),
             "hh-helpful": dict(total_episodes=256000, batch_size=512, num_mini_batches=8, num_ppo_epochs=1,
                                learning_rate=9.65e-6, value_learning_rate=9e-6, kl_coef=0.02)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    """Each stage takes the file; the stages follow one another; stage 3 has what was published and none of the four
    additions; what is not measured is said to be so."""
    sft, rm, ppo = (parse(importlib.import_module(f"train_{stage}").Options, [f"@{name}"])
                    for stage in ("sft", "rm", "ppo"))
    assert {key: getattr(ppo, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert (ppo.kl_baseline, ppo.reward_clip, ppo.ent_coef, ppo.value_warmup, ppo.lora_rank) == (0, 0, 0, 0, 0)
    assert rm.init_from == ppo.init_from == f"{sft.out_dir}/ckpt.pt" and ppo.reward_model == f"{rm.out_dir}/ckpt.pt"
    assert sft.init_from in hub.NAMES and sft.data_dir == rm.data_dir == ppo.data_dir
    with open(config.presets()[name]) as file:
        text = " ".join(file.read().replace("\n#", "").split())
    assert "Nothing of it has been run yet" in text and " GB " in text and "To compare with: " in text
