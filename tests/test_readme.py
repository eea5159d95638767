"""What README.md and minirlhf/README.md promise: experiments that apply and run; options, files, names that exist."""
import ast
import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import fields, is_dataclass
from importlib import import_module

import pytest
import torch

from conftest import ROOT, scratch

README, REFERENCE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "minirlhf/README.md"))
BOTH = {"README.md": README, "minirlhf/README.md": REFERENCE}
SCRIPTS, PACKAGE, TESTS = (sorted(ROOT.glob(f"{pattern}.py")) for pattern in ("train_*", "minirlhf/*", "tests/*"))
EXPERIMENTS = re.findall(r"^```diff\n(.*?)^```$", README + REFERENCE, re.M | re.S)
NOUNS, WORDS = ["cat", "dog", "sun", "sea", "king", "tree"], ["kind", "bright", "warm", "calm", "cold", "rude"]
TINY = "--data_dir data --device cpu --dtype float32 --batch_size 8 --response_length 8".split()
SFT = "--n_layer 3 --n_head 2 --n_embd 16 --vocab_size 300 --block_size 32 --num_train_epochs 1".split()
PPO = ("--total_episodes 16 --value_warmup 0 --num_ppo_epochs 1 --learning_rate 3e-3 --num_eval_prompts 4 "
       "--init_from out/sft/ckpt.pt --reward_model out/rm/ckpt.pt").split()
CLOCKS = {"eps", "tokens_per_second", "rollout_seconds", "seconds", "elapsed"}


# ---- the experiments

def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


def two_steps(script, folder, out, command):
    """PPO for two steps by that script -> what each logged, clocks apart, and the weights that it left."""
    command(script, *scratch("ppo"), *TINY, *PPO, "--out_dir", out, cwd=folder)
    rows = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if "loss/policy_avg" in row]
    return steps, torch.load(folder / out / "ckpt.pt", weights_only=True)["model"]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in b[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command):
    """A small data set, an SFT model and a reward model of it."""
    folder, rng = tmp_path_factory.mktemp("readme"), random.Random(0)
    (folder / "data").mkdir()
    for split, n in (("train", 48), ("val", 12)):
        texts = sorted({f"the {rng.choice(NOUNS)} is {' and '.join(rng.sample(WORDS, 2))}." for _ in range(4 * n)})
        rng.shuffle(texts)
        write(folder / "data" / f"sft.{split}.jsonl", [{"prompt": t[:7], "completion": t[7:]} for t in texts[:n]])
        write(folder / "data" / f"preferences.{split}.jsonl",
              [{"prompt": "", "chosen": min(pair), "rejected": max(pair)} for pair in zip(texts, texts[1:])][:n])
        write(folder / "data" / f"prompts.{split}.jsonl", [{"prompt": f"the {noun}"} for noun in NOUNS])
    command("train_sft.py", *scratch("sft"), *TINY, *SFT, "--out_dir", "out/sft", cwd=folder)
    command("train_rm.py", *scratch("rm"), *TINY, "--num_scale_samples", "16", "--out_dir", "out/rm", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def unchanged(folder, command):
    """Two steps of the code as it stands, which come out the same a second time."""
    first, again = (two_steps("train_ppo.py", folder, out, command) for out in ("out/first", "out/again"))
    assert same(first, again)
    return first


def hunks(diff):
    """A unified diff of one file -> the file's name and, for each hunk, the text before and after."""
    name = re.match(r"--- a/(.+)\n\+\+\+ b/\1\n", diff)[1]
    parts = [part.splitlines(keepends=True) for part in re.split(r"^@@ .*\n", diff, flags=re.M)[1:]]
    return name, [["".join(line[1:] for line in part if line[0] in kinds) for kinds in (" -", " +")] for part in parts]


def apply(diff, tree):
    """As a reader does, by git or patch, whichever there is; both must do what the hunks say."""
    name, changes = hunks(diff)
    text = (tree / name).read_text("utf-8")
    for before, after in changes:
        assert text.count(before) == 1
        text = text.replace(before, after)
    for program in (["git", "apply"], ["patch", "-p1"]):
        if shutil.which(program[0]):
            subprocess.run(program, cwd=tree, input=diff, text=True, check=True, capture_output=True,
                           env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)})
            assert (tree / name).read_text("utf-8") == text
            return name
    (tree / name).write_text(text, "utf-8")
    return name


def test_there_are_five_experiments_and_all_are_small():
    assert len(EXPERIMENTS) == 5 and all(diff.count("\n") <= 10 for diff in EXPERIMENTS)


@pytest.mark.parametrize("diff", EXPERIMENTS, ids=range(1, len(EXPERIMENTS) + 1))
def test_an_experiment_applies(diff, tmp_path):
    """To the scripts as they stand, which then still are Python."""
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    changed = tmp_path / apply(diff, tmp_path)
    assert changed.name in {script.name for script in SCRIPTS}
    compile(changed.read_text("utf-8"), changed, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("diff", EXPERIMENTS, ids=range(1, len(EXPERIMENTS) + 1))
def test_an_experiment_applies_runs_and_changes_what_is_learned(diff, folder, unchanged, tmp_path, command):
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    assert apply(diff, tmp_path) in {script.name for script in SCRIPTS}  # the package comes from the tree as it stands
    changed = two_steps(tmp_path / "train_ppo.py", folder, tmp_path / "out", command)
    assert len(changed[0]) == len(unchanged[0]) == 2
    assert not same(changed, unchanged)
    frozen = torch.load(folder / "out" / "sft" / "ckpt.pt", weights_only=True)["model"]
    rests = [torch.equal(changed[1][f"{table}.weight"], frozen[f"{table}.weight"]) for table in ("wte", "wpe")]
    assert rests == [".wte.requires_grad_(False)" in diff, ".wpe.requires_grad_(False)" in diff]


# ---- what the text names

def cells(text, *headings):
    """What stands in the columns of those names, in all tables of a Markdown text."""
    columns = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not row:
            columns = []
        elif not columns:
            columns = row
        yield from (cell for name, cell in zip(columns, row) if name in headings and cell != name)


def defined(paths):
    """Names of functions and classes as a reader may write them: f, module.f, Class.f."""
    names = set()
    for path in paths:
        todo = [(ast.parse(path.read_text("utf-8")), path.stem)]
        while todo:
            node, owner = todo.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                    names |= {child.name, f"{owner}.{child.name}"}
                    todo.append((child, child.name))
    return names


def test_the_front_page_is_short_and_finished():
    assert len(README.splitlines()) < 250
    assert not any(mark in text for text in BOTH.values() for mark in ("NNN", "<!--", "TODO"))


def test_the_map_names_every_file_and_about_how_long_it_is():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| .+ \| (\d+) \|$", README, re.M)
    tree = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SCRIPTS + PACKAGE}
    assert {path for path, _ in rows} == tree.keys() - {"minirlhf/__init__.py"}
    assert {path: (int(lines), tree[path]) for path, lines in rows
            if abs(int(lines) - tree[path]) > 0.2 * tree[path]} == {}


@pytest.mark.parametrize("name", BOTH)
def test_files_that_are_named_exist(name):
    assert [path for path in re.findall(r"`((?:minirlhf/|tests/|train_)[\w/]*\.(?:py|md))`", BOTH[name])
            if not (ROOT / path).is_file()] == []
    assert [path for path in re.findall(r"\]\(([^)#]+)\)", BOTH[name]) if not (ROOT / name).parent.joinpath(path).exists()] == []
    for anchor in re.findall(r"\]\(#([^)]+)\)", BOTH[name]):
        assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                          for h in re.findall(r"^#+ (.*)$", BOTH[name], re.M)]


def test_options_that_are_named_exist():
    options = {"help", "nproc_per_node", "logdir"}  # argparse's, torchrun's, TensorBoard's
    for path in SCRIPTS + PACKAGE:
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        options |= set(re.findall(r'add_argument\([^)]*?"--(\w+)"', path.read_text("utf-8")))
        if is_dataclass(getattr(module, "Options", None)):
            options |= {field.name for field in fields(module.Options)}
    options |= {f"{key}_key" for key in import_module("minirlhf.dialects").JSONL_KEYS}
    for name, text in BOTH.items():
        named = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text))
        assert len(named) > 15 and named - options == set(), name


def test_functions_and_tests_that_the_tables_name_exist():
    code, tests = defined(SCRIPTS + PACKAGE), defined(TESTS)
    in_code = {name for cell in cells(REFERENCE, "function", "where") for name in re.findall(r"`([^`]+)`", cell)}
    in_tests = {name for cell in cells(REFERENCE, "test") for name in re.findall(r"`([^`]+)`", cell)}
    assert len(in_code) > 30 and len(in_tests) > 40
    assert sorted(in_code - code) == [] and sorted(in_tests - tests) == []
    paragraphs = re.findall(r"^\d\. \*\*[A-Z]+\*\* \(`(\w+)`\)", README, re.M)
    assert len(paragraphs) == 4 and set(paragraphs) <= code


def test_no_address_stands_anywhere():
    """Package, version and hash say where things are from. The model hub's stands once; what Git LFS leaves in place of
    data begins with its own."""
    found = {}
    for path in [ROOT / "requirements.txt", *map(ROOT.joinpath, BOTH), *SCRIPTS, *PACKAGE, *TESTS]:
        hosts = re.findall(r"https://[\w.-]+|\b(?:pypi|\w+\.pythonhosted|huggingface)\.(?:org|co)",
                           path.read_text("utf-8"))
        if hosts and path.name != "test_readme.py":
            found[str(path.relative_to(ROOT))] = set(hosts)
    assert found == {"tests/test_data.py": {"https://git-lfs.github.com"}, "minirlhf/data.py": {"https://git-lfs"},
                     "minirlhf/hub.py": {"https://huggingface.co"}}
    assert (ROOT / "minirlhf/hub.py").read_text("utf-8").count("huggingface.co") == 1
