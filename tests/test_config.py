"""A dataclass as a command line: types, ranges, choices, presets, and what is refused."""
from dataclasses import dataclass
from typing import Literal

import pytest

from minirlhf.config import RunOptions, parse


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
                  "--seed INT every random choice is a function of"):
        assert words in text


def test_a_stage_may_give_an_inherited_option_its_own_line():
    """Its default, comment and range are what counts."""
    assert parse(Stage, []).seed == 7
    for seed in (4, 9):
        with pytest.raises(SystemExit):
            parse(Stage, [f"--seed={seed}"])
