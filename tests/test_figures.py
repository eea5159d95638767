"""Every figure that is printed, logged or stored, a second time from raw rows: small runs of the three stages under a
clock of our own, each stopped halfway and resumed, beside loops over rows and tokens that share no code with them.

Of printed lines the numbers are compared, not the words.
"""
import contextlib
import copy
import json
import math
import random
import re
import signal
import statistics
import time
import types

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from conftest import scratch
from minirlhf import benchmark, check, checkpoint, evaluate, kernels, runtime, sample
from minirlhf.data import Row

WORDS = "good bad fine sad the cat dog sun ran sat né".split()
SFT = scratch("sft") + ("--data_dir data --device cpu --dtype float32 --n_layer 1 --n_head 1 --n_embd 8 --vocab_size 270 --block_size "
       "48 --num_train_epochs 2 --batch_size 4 --micro_batch_size 3 --eval_interval 3 --log_interval 2 --warmup_ratio "
       "0.3 --learning_rate 0.02 --max_grad_norm 0.01 --response_length 6").split()
RM = scratch("rm") + ("--data_dir data --device cpu --dtype float32 --batch_size 3 --micro_batch_size 2 --num_scale_samples 131 "
      "--response_length 6 --eval_interval 2 --log_interval 2 --num_train_epochs 1.6 --warmup_ratio 0.4 "
      "--max_grad_norm 0.01").split()
PPO = scratch("ppo") + ("--data_dir data --device cpu --batch_size 6 --micro_batch_size 4 --total_episodes 21 --response_length 6 "
       "--temperature 0.7 --eval_interval 3 --num_eval_prompts 13 --value_warmup 1 --learning_rate 8e-3 --reward_clip "
       "0.8 --missing_eos_penalty 0.5 --kl_coef 0.1 --kl_baseline 0.3 --adaptive_kl_target 0.5 --ent_coef 0 "
       "--judge judge.py:length").split()


def numbers(line):
    """The numbers of a line, as they stand there."""
    return re.findall(r"(?<![\w.%])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?%?", line)


def close(expected, tolerance=1e-4):
    return pytest.approx(expected, rel=tolerance, abs=tolerance / 100)


# ---- the world: data, and three runs of which all raw rows are kept

def rows_of(rng, part):
    """{file: records}; among them rows too long for the context, repeats, ties, and columns of several kinds."""
    def text(words):
        return " ".join(rng.choices(WORDS, k=words))

    long = "".join(rng.choices("bcdfghjklm", k=90))  # over a context of 48 tokens
    n, many = {"train": (13, 5), "val": (7, 9)}[part]
    kinds = ["a", "b", None, "b"]
    sft = [{"prompt": text(i % 3), "completion": " " + text(1 + i % 5), "domain": kinds[i % 4]} for i in range(n)]
    sft.insert(4, {"prompt": "x", "completion": long, "domain": "a"})
    if part == "train":  # three rankings prefer the longer text, in nine pairs; five records prefer the shorter one
        preferences = [{"prompt": "", "completions": [text(6), text(4), text(2) + str(i)], "scores": [3, 2, 1]}
                       for i in range(3)]
        preferences += [{"prompt": "the", "chosen": " " + text(1), "rejected": " " + text(5)} for i in range(5)]
        preferences += [{"prompt": "", "completions": ["tied", "ties"], "scores": [1, 1]},
                        {"prompt": "", "completions": ["even", "ever"], "scores": [2, 2]},
                        {"prompt": "", "chosen": long, "rejected": "short"}]
    else:
        texts = [text(1 + i % 4) + str(i) for i in range(7)] + ["dog sat 7"]
        pairs = [(0, 1), (2, 3), (1, 4), (5, 6), (2, 0), (6, 3), (4, 5), (0, 6), (7, 1), (3, 5), (5, 2), (1, 6)]
        margins = [0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, -0.4, None, 4, 1.2, 0.1]
        others = [0.5, -0.5, 0, 1, None, 2, -1, 0, 0.3, 1, 2, 3]
        preferences = [{"prompt": "", "chosen": texts[i], "rejected": texts[j], "margin": m, "others_margin": o,
                        "kind": "person" if k % 2 else "mean"}
                       for k, ((i, j), m, o) in enumerate(zip(pairs, margins, others))]
    prompts = [{"prompt": text(1 + i % 3) + part[0] + str(i)} for i in range(many)]
    return {"sft": sft, "preferences": preferences, "prompts": prompts[:4] if part == "train" else prompts}


class World:
    """A folder, a clock that moves only where it is told to, and what was said, called and returned."""

    def __init__(self, folder, patch):
        self.folder, self.patch, self.now, self.said, self.calls = folder, patch, 1000.0, [], {}
        rng, self.records = random.Random(3), {}
        (folder / "data").mkdir()
        for part in ("train", "val"):
            for name, records in rows_of(rng, part).items():
                self.records[name, part] = records
                (folder / "data" / f"{name}.{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (folder / "judge.py").write_text("def length(prompts, completions):\n    return [*map(len, completions)]\n")
        patch.chdir(folder)
        patch.setattr(time, "perf_counter", lambda: self.now)
        patch.setattr(runtime, "say", self.said.append)
        patch.setattr(evaluate, "say", lambda text="": self.said.append(text))
        patch.setattr(evaluate.accuracy_with_interval, "__defaults__", (0, 50))  # replicates
        self.watch(kernels, "pick_matmul", lambda n: 3.0)
        self.watch(runtime, "optimizer_step", lambda n: 0.125)

    def watch(self, owner, name, seconds=lambda n: 0.0, before=lambda *a: a, after=lambda out, *a: out, label=""):
        """Keep what a function was given and what it returned; it takes `seconds` of its n-th call."""
        inner, calls = getattr(owner, name), self.calls.setdefault(label or name, [])

        def call(*arguments, **options):
            given = before(*arguments)
            out = inner(*arguments, **options)
            self.now += seconds(len(calls))
            calls.append((given, after(out, *arguments), self.now))
            return out
        self.patch.setattr(owner, name, call)

    def train(self, main, arguments, stop_at, stepping):
        """Run, stopped after step `stop_at`, and again with --resume -> the lines of both."""
        self.patch.setattr(runtime.Run, "should_stop", lambda run: len(self.calls[stepping]) == stop_at)
        self.said.clear()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 128 + signal.SIGTERM
        first, self.said[:] = [*self.said], []
        main([*arguments, "--resume"])
        second, self.said[:] = [*self.said], []
        self.patch.setattr(runtime.Run, "should_stop", lambda run: False)
        self.first = {name: [*calls] for name, calls in self.calls.items()}  # of these runs alone
        return first, second

    def metrics(self, stage):
        return [json.loads(line) for line in (self.folder / "out" / stage / "metrics.jsonl").read_text().splitlines()]

    def samples(self, stage):
        return [json.loads(line) for line in (self.folder / "out" / stage / "samples.jsonl").read_text().splitlines()]


def step_lines(lines):
    return [line for line in lines if re.match(r" *\d+/\d+ ", line)]


def after(lines, words):
    """The numbers of the first line that holds some words."""
    return numbers(next(line for line in lines if words in line))


def gradient_norm(model):
    return math.sqrt(sum(float(x) ** 2 for p in model.parameters() for x in p.grad.flatten()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("figures"), patch)
    for number, handler in handlers:
        signal.signal(number, handler)


def batch_and_model(model, batch, *_):
    return copy.deepcopy(model), batch


def with_norm(out, model, *_):
    return out, gradient_norm(model)


@pytest.fixture(scope="module")
def sft(world):
    """The world after stage 1."""
    world.watch(train_sft, "batch_gradients", lambda n: 2.25 + n, batch_and_model, with_norm, "sft steps")
    world.watch(evaluate, "held_out_loss", lambda n: 40.0, lambda model, *_: copy.deepcopy(model))
    world.watch(train_sft, "show_samples", lambda n: 7.0)
    world.sft = world.train(train_sft.main, SFT, 4, "sft steps")
    return world


@pytest.fixture(scope="module")
def rm(sft):
    """The world after stage 2."""
    world = sft
    nudge_towards_eos(world.folder / "out" / "sft" / "ckpt.pt")
    world.watch(train_rm, "batch_gradients", lambda n: 1.75 + n, batch_and_model, with_norm, "rm steps")
    world.watch(train_rm, "set_scale", lambda n: 11.0, lambda model, *more: (copy.deepcopy(model), *more))
    world.watch(train_rm, "generate", label="scale samples")
    world.watch(evaluate, "reward_model_figures", lambda n: 50.0, lambda model, run, records, eos, longer: (
        copy.deepcopy(model), records, longer))
    world.rm = world.train(train_rm.main, RM, 2, "rm steps")
    return world


@pytest.fixture(scope="module")
def ppo(rm):
    """The world after stage 3."""
    world = rm
    for name, seconds in (("generate", 0.0), ("answer", 20.0)):
        world.watch(evaluate, name, lambda n, seconds=seconds: seconds, lambda policy, *a: (copy.deepcopy(policy), *a))
    world.watch(train_ppo, "roll_out", lambda n: 1.5 + n)
    world.watch(train_ppo, "update", lambda n: 4.0, lambda batch, policy, value, *_: (
        copy.deepcopy(batch), copy.deepcopy(policy), copy.deepcopy(value)))
    world.watch(evaluate.AgainstSFT, "evaluation", lambda n: 60.0)
    world.ppo = world.train(train_ppo.main, PPO, 2, "update")
    world.answers = world.first["answer"]
    return world


def nudge_towards_eos(path):
    """So little training leaves eos as likely as a byte: its logit is raised by 2."""
    payload = torch.load(path, weights_only=True)
    weights = payload["model"]
    eos = weights["wte.weight"][-1]
    weights["ln_f.bias"] += 2 * eos / eos.dot(eos)
    torch.save(payload, path)


@torch.no_grad()
def log_shares(model, ids, start, temperature):
    """Before each of ids[start:], log p of all tokens given those before it; the row alone."""
    logits = (model.hidden(torch.tensor([ids]))[0] @ model.wte.weight.T).double().tolist()
    for t in range(start, len(ids)):
        z = [x / temperature for x in logits[t - 1]]
        total = math.log(sum(map(math.exp, z)))
        yield [x - total for x in z]


def surprises(model, ids, start, temperature=1.0):
    """-log p of each of ids[start:]."""
    return [-p[token] for p, token in zip(log_shares(model, ids, start, temperature), ids[start:])]


@torch.no_grad()
def scalar(model, ids):
    """The scalar head's number after the last of some ids."""
    h = model.hidden(torch.tensor([ids]))[0, -1]
    return float((h @ model.score_head.weight[0] + model.score_head.bias[0]) * model.gain + model.bias)


def clock_text(seconds):
    whole = math.floor(seconds + 0.5)
    return f"{whole // 60}", f"{whole % 60:02}"


def expected_progress(done, steps, used, left):
    return [f"{done}", f"{steps}", f"{math.floor(100 * done / steps)}%", *clock_text(used), *clock_text(left)]


def seconds_a_step(spent):
    """The median of [(usual steps, seconds), ...], without the first where there are others."""
    return statistics.median(seconds / steps for steps, seconds in spent[1:] or spent)


def to_come(done, steps, every):
    """How many of the steps from `done` on end with an evaluation."""
    return sum(step % every == 0 or step == steps for step in range(done, steps + 1))


def peak_share(step, steps, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# ---- stage 1

def expected_sft_steps(world):
    """The record of each step but its evaluation, and after each second step the numbers of its line."""
    rows, steps = 13, 8  # 14 less one that is too long, 4 a batch: 4 batches an epoch, the last of one row
    records, lines, seen, seconds, used, told, spent, looks = [], [], 0, 0.0, 3.0, 0.0, [], []
    usual, held_out = tokens_read(world, "train") / 4, tokens_read(world, "val")
    look = (7 / 3 + held_out / usual) / 2 / 3  # 7 rows, 3 a pass; to go forward is a third of a step
    for step, ((model, batch), (_, norm), _) in enumerate(world.first["sft steps"]):
        if step == 4:  # resumed
            seen, seconds, used, told, spent, looks = 0, 0.0, 3.0, 0.0, [], []
        tokens = sum(len(row.ids) - 1 for row in batch)
        spent.append(((1 + tokens / usual) / 2, 2.25 + step + 0.125))
        nats = [x for row in batch for x in surprises(model, row.ids, row.prompt_length)]
        seen, seconds = seen + sum(len(row.ids) - 1 for row in batch), seconds + 2.25 + step + 0.125
        used += 2.25 + step + 0.125
        rate = 0.02 * peak_share(step, steps, 2)
        records.append({"step": step + 1, "epoch": (step + 1) / math.ceil(rows / 4), "loss": sum(nats) / len(nats),
                        "lr": rate, "grad_norm": norm, "tokens_per_second": seen / seconds})
        if step % 2:
            left = seconds_a_step(spent) * (steps - step - 1) + to_come(step + 1, steps, 3) * (
                looks[-1] if looks else look * seconds_a_step(spent))
            lines.append([*expected_progress(step + 1, steps, used, left),
                          f"{sum(nats) / len(nats):.3f}", f"{rate:.1e}", f"{norm:.2f}", f"{seen / seconds:,.0f}"])
            seen, seconds = 0, 0.0
        if step in (2, 5, 7):
            looks.append(47)  # an evaluation and samples
            used += 47
        records[-1]["elapsed"], told = used - told, used
    return records, lines


def tokens_read(world, part):
    """Of the rows that fit, each but its last."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    lengths = [len(tokenizer.encode(r["prompt"])) + len(tokenizer.encode(r["completion"])) + 2
               for r in world.records["sft", part]]
    return sum(n - 1 for n in lengths if n <= 48)


def test_the_steps_of_sft(sft):
    """Each record, from the rows of its batch: nats a trained token, the norm before clipping, tokens read a second
    since the last line, evaluations not counted, the rate of this step, epochs of whole batches; and the lines."""
    records, lines = expected_sft_steps(sft)
    found = sft.metrics("sft")
    assert len(found) == 8
    for record, expected in zip(found, records):
        assert {k: v for k, v in record.items() if k != "eval"} == close(expected)
        assert record["grad_norm"] > 0.05
    said = [step_lines(part) for part in sft.sft]
    assert [len(part) for part in said] == [2, 2]
    assert [numbers(line) for part in said for line in part] == lines


def naive_held_out(sft, model):
    """{kind: {nats a token, bits a byte}} from the texts in the file."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    sums = {}
    for r in sft.records["sft", "val"]:
        p, c = tokenizer.encode_prompt(r["prompt"]), tokenizer.encode_completion(r["completion"])
        if len(p) + len(c) > 48:
            continue
        nats = sum(surprises(model, p + c, len(p)))
        for kind in {"all", r["domain"]} - {None}:
            n, tokens, size = sums.get(kind, (0, 0, 0))
            sums[kind] = n + nats, tokens + len(c), size + len(r["completion"].encode())
    return {kind: {"nats_per_token": n / tokens, "bits_per_byte": n / math.log(2) / size}
            for kind, (n, tokens, size) in sums.items()}


def held_out_numbers(figures):
    kinds = [f"{figures[kind]['bits_per_byte']:.3f}" for kind in sorted(figures) if kind != "all"]
    return [f"{figures['all']['nats_per_token']:.4f}", f"{figures['all']['bits_per_byte']:.3f}", *kinds]


def test_held_out_losses_of_sft(sft):
    """Nats a token, eos counted; bits a byte of UTF-8, eos not; of all rows and of each domain. The stored figures are
    those of the lowest loss."""
    evaluations = [r["eval"] for r in sft.metrics("sft") if "eval" in r]
    expected = [naive_held_out(sft, model) for model, *_ in sft.first["held_out_loss"]]
    assert len(evaluations) == len(expected) == 3 and evaluations[0].keys() == {"all", "a", "b"}
    for ours, theirs in zip(evaluations, expected):
        assert ours == {kind: close(figures) for kind, figures in theirs.items()}
    said = [numbers(line) for line in sft.sft[0] + sft.sft[1] if "nats/token" in line and "lr" not in line]
    assert said == [*map(held_out_numbers, expected), held_out_numbers(min(
        expected, key=lambda f: f["all"]["nats_per_token"]))]
    info = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[2]["info"]
    assert info["nats_per_token"] == min(e["all"]["nats_per_token"] for e in evaluations)
    assert info["held_out"] in evaluations


def test_the_counts_that_sft_begins_with(sft):
    """Rows kept and dropped, tokens an epoch and trained ones, parameters, steps, tokens a step."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    model = sft.first["sft steps"][0][0][0]
    coded = [(len(tokenizer.encode(r["prompt"])), len(tokenizer.encode(r["completion"])))
             for r in sft.records["sft", "train"]]
    kept = [(p, c) for p, c in coded if p + c + 2 <= 48]
    read, trained = sum(p + c + 1 for p, c in kept), sum(c + 1 for _, c in kept)
    lines = sft.sft[0]
    assert after(lines, "held out, from") == ["13", "7"] and len(kept) == 13
    assert after(lines, "training rows") == ["1", "14", "48"] and after(lines, "held-out rows") == ["1", "8", "48"]
    assert after(lines, "tokens an epoch") == [f"{read:,}", f"{trained:,}", f"{tokenizer.vocab_size}"]
    parameters = sum(len(p.flatten()) for p in model.parameters())
    assert after(lines, "parameters") == ["1", "8", "1", f"{parameters:,}"]
    assert after(lines, "steps of") == ["1", "8", "4", f"{read // 4}"]
    assert after(sft.sft[1], "goes on from step")[-1] == "4"


def test_what_is_best_so_far(tmp_path, sft, monkeypatch):
    """Held-out losses of 3, 2, 2 and 4: the second is the best, an equal one is none, and the stored weights are those
    that it was found with."""
    losses, states = [3.0, 2.0, 2.0, 4.0], []

    def preset(model, *_):
        states.append(copy.deepcopy(model.state_dict()))
        return {"all": {"nats_per_token": losses[len(states) - 1], "bits_per_byte": 1.0}}
    monkeypatch.setattr(evaluate, "held_out_loss", preset)
    sft.said.clear()
    train_sft.main([*SFT, "--eval_interval", "2", "--out_dir", str(tmp_path / "out")])
    said = [line for line in sft.said if "held out: " in line]
    assert ["best" in line for line in said] == [True, True, False, False]
    payload = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert payload["info"]["nats_per_token"] == 2.0 and after(sft.said, "best held-out")[0] == "2.0000"
    assert all(torch.equal(payload["model"][name], states[1][name]) for name in states[1])
    assert all(torch.equal(payload["training"]["model"][name], states[3][name]) for name in states[3])


def test_samples_of_sft(sft):
    """Each evaluation shows what follows the first four held-out prompts, and keeps it with its step."""
    prompts, kept = [r["prompt"] for r in sft.records["prompts", "val"][:4]], sft.samples("sft")
    assert [(r["step"], r["prompt"]) for r in kept] == [(step, p) for step in (3, 6, 8) for p in prompts]
    shown = [line.strip("\n") for line in sft.sft[0] + sft.sft[1] if line.startswith("    ") and " |" in line]
    assert shown == [f"    {r['prompt']} |{r['completion']}" for r in kept]
    assert len({r["completion"] for r in kept[-4:]}) > 1


# ---- stage 2

def pairs_of(record):
    """[(better, worse)] texts of a record."""
    if "chosen" in record:
        return [(record["chosen"], record["rejected"])]
    texts, scores = record["completions"], record["scores"]
    return [(a, b) for i, (a, s) in enumerate(zip(texts, scores)) for b, t in zip(texts[i:], scores[i:]) if s > t]


def expected_rm_steps(rm):
    """The record of each step but its evaluation, and the numbers of each line, from the pairs of each batch."""
    records, lines, used, told = [], [], 3.0, 0.0
    steps = 5  # 8 records, 3 a batch: 3 batches an epoch; 1.6 epochs are 5 steps
    seen = seconds = right = pairs = 0
    usual, look, scale = rm_work(rm)
    spent, looks = [], []
    for step, ((model, batch), (_, norm), _) in enumerate(rm.first["rm steps"]):
        if step == 2:
            used, told, seen, seconds, right, pairs, spent, looks = 3.0, 0.0, 0, 0, 0, 0, [], []
        tokens = sum(len(row.ids) for rows, _, _ in batch for row in rows)
        spent.append(((1 + tokens / usual) / 2, 1.75 + step + 0.125))
        losses, won = [], 0
        for rows, index, _ in batch:
            scores = [scalar(model, row.ids) for row in rows]
            losses += [math.log(1 + math.exp(scores[j] - scores[i])) for i, j in index]
            won += sum(scores[i] > scores[j] for i, j in index)
            seen += sum(len(row.ids) for row in rows)
        right, pairs, seconds = right + won, pairs + len(losses), seconds + 1.75 + step + 0.125
        used += 1.75 + step + 0.125
        rate = 2e-3 * peak_share(step, steps, 2)
        records.append({"step": step + 1, "epoch": (step + 1) / 3, "loss": sum(losses) / len(losses), "lr": rate,
                        "accuracy": won / len(losses), "grad_norm": norm, "tokens_per_second": seen / seconds})
        if step % 2 or step == 4:
            left = seconds_a_step(spent) * (steps - step - 1 + scale) + to_come(step + 1, steps, 2) * (
                looks[-1] if looks else look * seconds_a_step(spent))
            lines.append([*expected_progress(step + 1, steps, used, left),
                          f"{sum(losses) / len(losses):.3f}", f"{right / pairs:.3f}", f"{rate:.1e}", f"{norm:.2f}",
                          f"{seen / seconds:,.0f}"])
            seen = seconds = right = pairs = 0
        if step in (1, 3):
            looks.append(50)
            used += 50
        records[-1]["elapsed"], told = used - told, used
    return records, lines


def rm_work(rm):
    """Tokens of a usual step; what an evaluation takes in such steps, and what the samples for the scale do."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]

    def length(*texts):
        return sum(len(tokenizer.encode(text)) + 1 for text in texts)
    train = [r for r in rm.records["preferences", "train"] if pairs_of(r) and max(
        length(r["prompt"], t) for pair in pairs_of(r) for t in pair) <= 48]
    read = sum(length(r["prompt"], t) for r in train for t in {t for pair in pairs_of(r) for t in pair})
    texts = {t for r in rm.records["preferences", "val"] for t in (r["chosen"], r["rejected"])}
    prompts = [length(r["prompt"]) for r in rm.records["prompts", "train"]]
    asked = sum(prompts[i % 4] for i in range(131))
    usual = read / 3
    return usual, sum(length("", t) for t in texts) / usual / 3, (6 / 4 + (asked + 131 * 3) / usual) / 6


def test_the_steps_of_a_reward_model(rm):
    """Each record, from the pairs of its batch: nats a pair, pairs ordered rightly (those of all since the last line in
    the line), the norm before clipping, tokens of all texts a second, the rate of this step."""
    records, lines = expected_rm_steps(rm)
    found = [r for r in rm.metrics("rm") if "final" not in r]
    assert len(found) == 5
    for record, expected in zip(found, records):
        assert {k: v for k, v in record.items() if k != "eval"} == close(expected)
    said = [step_lines(part) for part in rm.rm]
    assert [numbers(line) for part in said for line in part] == lines and len(said[0]) == 1


def test_the_counts_that_a_reward_model_begins_with(rm):
    """Records, texts and pairs that are kept; dropped ones by cause; tokens a step."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    train, lines = rm.records["preferences", "train"], rm.rm[0]
    fits = [r for r in train if all(len(tokenizer.encode(t)) <= 46 for pair in pairs_of(r) for t in pair)]
    kept = [r for r in fits if pairs_of(r)]
    texts = [(r["prompt"], t) for r in kept for t in r.get("completions") or [r["chosen"], r["rejected"]]]
    read = sum(len(tokenizer.encode(p)) + len(tokenizer.encode(t)) + 2 for p, t in texts)
    assert after(lines, "records with") == ["8", "19", "14", "12"] == [
        f"{len(x)}" for x in (kept, texts, sum(map(pairs_of, kept), []), rm.records["preferences", "val"])]
    assert after(lines, "training texts") == ["1", "25", "48"]
    assert after(lines, "dropped, too long") == ["1"] and after(lines, "not tied") == ["2"]
    assert after(lines, "steps of") == ["1", "5", "3", f"{read // 3}"]


def ordered(record_pairs, key):
    """[(better, worse)] -> share with key(better) > key(worse), ties half."""
    points = [1.0 if key(a) > key(b) else 0.5 if key(a) == key(b) else 0.0 for a, b in record_pairs]
    return sum(points) / len(points)


def quantile(values, share):
    """By straight lines between the sorted values."""
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def naive_interval(points, names, replicates=50):
    """Texts drawn with replacement, a pair counted as often as both its texts were: 95 % of the means lie between."""
    g, texts, means = torch.Generator().manual_seed(0), sorted({t for pair in names for t in pair}), []
    for _ in range(replicates):
        drawn = [texts[i] for i in torch.randint(len(texts), (len(texts),), generator=g).tolist()]
        weights = [drawn.count(a) * drawn.count(b) for a, b in names]
        if sum(weights):
            means.append(sum(w * p for w, p in zip(weights, points)) / sum(weights))
    return quantile(means, 0.025), quantile(means, 0.975)


def naive_groups(records):
    """{name of a group: its records}: all, by kind, and by kind and how clear the preference was."""
    groups = {"all": records}
    for r in records:
        m = r["margin"]
        inside = [f"{low}-{high}" for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 4)) if m and low < m <= high]
        for name in ("", *(f", margin {bin}" for bin in inside), *[", margin > 1"] * (m is not None and m > 1)):
            groups.setdefault(r["kind"] + name, []).append(r)
    return groups


def test_held_out_figures_of_a_reward_model(rm):
    """Accuracy with ties half, its 95 % interval, the one length that training pairs prefer, how often others agree, of
    all pairs, each kind and each bin of margins: from the texts of the file and scores of texts alone. Training
    prefers the longer text in 9 of its 14 pairs, though in 3 of its 8 records; held-out pairs do not count."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    records, memo = rm.records["preferences", "val"], {}

    def ids(text):
        return tuple(tokenizer.encode_prompt("") + tokenizer.encode_completion(text))

    looks = [r["eval"] for r in rm.metrics("rm") if "eval" in r]
    looks.append(rm.metrics("rm")[-1]["final"]["figures"])
    said = [numbers(line) for line in rm.rm[0] + rm.rm[1] if line.startswith("  held out: ")]
    assert len(looks) == 3 and len(said) == 2
    for look, ((model, _, longer), _, _) in zip(looks, rm.first["reward_model_figures"]):
        assert longer
        score = {t: scalar(model, ids(t)) for r in records for t in (r["chosen"], r["rejected"])}
        groups = naive_groups(records)
        assert look.keys() == groups.keys()
        for name, group in groups.items():
            pairs = [(r["chosen"], r["rejected"]) for r in group]
            points = [1.0 * (score[a] > score[b]) for a, b in pairs]
            low, high = naive_interval(points, [(ids(a), ids(b)) for a, b in pairs])
            expected = {"pairs": len(pairs), "accuracy": sum(points) / len(pairs), "low": low, "high": high,
                        "length_only": ordered(pairs, lambda t: len(ids(t)))}
            if all(r["others_margin"] is not None for r in group):
                expected["ceiling"] = sum((r["others_margin"] > 0) + (r["others_margin"] == 0) / 2
                                          for r in group) / len(group)
            assert look[name] == close(expected, 1e-5), name
        memo[id(look)] = score
    assert said == [[f"{look[name]['accuracy']:.3f}" for name in ("all", "mean", "person")] for look in looks[:2]]
    table = [line for line in rm.rm[1] if re.match(r"(all|mean|person)\b", line)]
    for line, (name, f) in zip(table, looks[-1].items(), strict=True):
        shown = [f"{f['pairs']}", *(f"{f[k]:.3f}" for k in ("accuracy", "length_only"))]  # and no interval: 12 pairs
        assert numbers(line.removeprefix(name)) == shown + ([f"{f['ceiling']:.3f}"] if "ceiling" in f else [])


def test_the_table_of_a_reward_model():
    """Columns stand below their headings; of fewer than 50 pairs no interval is given, of as many one is."""
    row = {"accuracy": 0.7564, "low": 0.7306, "high": 0.7802, "length_only": 0.5193}
    figures = {"all": row | {"pairs": 16000}, "person": row | {"pairs": 50, "ceiling": 0.8471},
               "person, margin > 4": row | {"pairs": 49, "ceiling": 0.8471}}
    assert [*evaluate.reward_model_table(figures, {"ece": 0.0131, "ece_with_temperature": 0.0121,
                                                   "temperature": 1.018})] == [
        "held out                      pairs  accuracy (95% interval)         length only   ceiling",
        "all                           16000  0.756  (0.731-0.780)                  0.519",
        "person                           50  0.756  (0.731-0.780)                  0.519     0.847",
        "person, margin > 4               49  0.756  (too few for an interval)      0.519     0.847",
        "calibration: ECE 0.013; 0.012 after dividing score differences by a temperature of 1.02"]


def naive_temperature(differences):
    """Where the mean of log(1 + exp(-d / T)) is least, by a search that narrows."""
    def loss(log_t):
        return sum(math.log1p(math.exp(-d / math.exp(log_t))) for d in differences)
    low, high = -6.0, 6.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp(low)


def naive_ece(differences, temperature):
    """Of the odd pairs, each second one asked the other way round, in ten bins of the probability that was given."""
    bins = [[] for _ in range(10)]
    for k, d in enumerate(differences):
        if k % 2:
            sign = 1 if k % 4 == 1 else -1
            p = 1 / (1 + math.exp(-sign * d / temperature))
            bins[min(int(p * 10), 9)].append((sign > 0) - p)
    return sum(abs(sum(b)) for b in bins) / sum(map(len, bins))


def test_calibration_by_halves():
    """The temperature that is judged is fitted on the even pairs, and the judged ones are odd; the one that is told is
    of all. Halves of different scales, some wrong, tell which was which."""
    rng = random.Random(0)
    d = [rng.gauss(1, 1) * (3 if k % 2 else 1) for k in range(200)]
    found = evaluate.calibration(torch.tensor(d, dtype=torch.double))
    assert found == close({"temperature": naive_temperature(d), "ece": naive_ece(d, 1),
                           "ece_with_temperature": naive_ece(d, naive_temperature(d[::2]))}, 1e-6)
    halves = [naive_temperature(d[k::2]) for k in (0, 1)]
    assert abs(halves[0] / halves[1] - 1) > 0.2 and abs(found["temperature"] / halves[0] - 1) > 0.1


def test_the_closing_report_of_a_reward_model(rm):
    """Calibration of the differences as they are after scaling; what is printed is what is stored."""
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    model, _, payload = checkpoint.load("out/rm", ["rm"], torch.device("cpu"))
    final = rm.metrics("rm")[-1]
    d = [scalar(model, tokenizer.encode_prompt("") + tokenizer.encode_completion(r["chosen"]))
         - scalar(model, tokenizer.encode_prompt("") + tokenizer.encode_completion(r["rejected"]))
         for r in rm.records["preferences", "val"]]
    told = final["final"]["calibration"]
    assert final["step"] == 5 and told == close({
        "temperature": naive_temperature(d), "ece": naive_ece(d, 1),
        "ece_with_temperature": naive_ece(d, naive_temperature(d[::2]))}, 1e-3)
    lines = rm.rm[1]
    assert after(lines, "calibration: ") == [f"{told[k]:.3f}" for k in ("ece", "ece_with_temperature")] + [
        f"{told['temperature']:.2f}"]
    bins = {name: [*map(list, rows)] for name, rows in payload["info"]["reliability"].items()}  # JSON has no tuples
    assert payload["info"] | {"reliability": bins} == final["final"] and final["final"]["verdict"] in lines
    assert numbers(final["final"]["verdict"]) == ["12"]


def test_the_scale_of_the_reward(rm):
    """Mean and deviation of the scores of SFT samples, two batches of them, as they were before; then 0 and 1."""
    ((before, _, _, _, prompts, _), (mean, std), _), = rm.first["set_scale"]
    model = checkpoint.load("out/rm", ["rm"], torch.device("cpu"))[0]
    drawn = [(p, r) for (_, part, *_), rollout, _ in rm.first["scale samples"]
             for p, r in zip(part, rollout.responses())]
    assert len(drawn) == 131 and [p for p, _ in drawn] == prompts
    scores = [scalar(before, p + r) for p, r in drawn]
    assert (mean, std) == close((statistics.fmean(scores), statistics.pstdev(scores)))
    assert after(rm.rm[1], "scale: ") == ["131", f"{mean:.3f}", f"{std:.3f}", "0", "1"]
    scores = [scalar(model, p + r) for p, r in drawn]
    assert (statistics.fmean(scores), statistics.pstdev(scores)) == close((0, 1), 1e-3)
    assert len({(*p, *r) for p, r in drawn}) > 60 and prompts[128:] == prompts[:3]
    assert drawn[128:] != drawn[:3]  # the second batch has other draws


def test_pairs_that_are_shown(rm):
    """Better and worse text with their scores, right where the better one's is higher; the file has the same."""
    model = checkpoint.load("out/rm", ["rm"], torch.device("cpu"))[0]
    tokenizer = checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[1]
    kept = [r for r in rm.samples("rm") if r["step"] == 5]
    lines = [line for line in rm.rm[1] if re.match("    (right|wrong|tied)", line)][-4:]
    for r, row, line in zip(rm.records["preferences", "val"], kept, lines, strict=False):
        scores = [scalar(model, tokenizer.encode_prompt("") + tokenizer.encode_completion(r[k]))
                  for k in ("chosen", "rejected")]
        assert [row["chosen"], row["rejected"]] == [r["chosen"], r["rejected"]] and row["scores"] == close(scores)
        assert line.startswith("    right") == (scores[0] > scores[1])
        assert line == line and [f"{s:+.2f}" in line for s in scores] == [True, True]
    assert len(kept) == len(lines) == 4 and {r["step"] for r in rm.samples("rm")} == {2, 4, 5}


def test_equal_scores_are_half_right(make_model):
    """In the accuracy of training batches too: a head of zeros orders no pair; nor is a tie shown as right or wrong."""
    model = make_model("scalar")
    torch.nn.init.zeros_(model.score_head.weight)
    rows = [Row([0, 1, 2], 1), Row([0, 3], 1), Row([0, 4, 4, 4], 1)]
    said, run = [], types.SimpleNamespace(
        share=lambda x: x, device=torch.device("cpu"), autocast=contextlib.nullcontext, total=lambda t: t,
        sum_gradients=lambda parameters: None, write=lambda *a: None, say=lambda text: said.append(text))
    records = [(rows, [(0, 1), (0, 2), (1, 2)], {}), (rows[:2], [(1, 0)], {})]
    loss, right, pairs = train_rm.batch_gradients(model, records, 0, train_rm.Options(), run)
    assert (loss, right, pairs) == (close(math.log(2)), 2.0, 4)
    evaluate.show_pairs(model, run, types.SimpleNamespace(eos=0, decode=str), records, 1)
    assert [line.split(":")[0].strip() for line in said] == ["tied", "tied"]


# ---- stage 3

def models():
    """The SFT model, its tokenizer, the reward model."""
    return (*checkpoint.load("out/sft", ["sft"], torch.device("cpu"))[:2],
            checkpoint.load("out/rm", ["rm"], torch.device("cpu"))[0])


def naive_returns(scores, kls, values, penalty):
    """What is still to come at each decision: the lambda-return of rewards -penalty KL, and the score at the end."""
    rewards = [-penalty * kl for kl in kls]
    rewards[-1] += scores
    following, out = values[1:] + [0.0], []
    for t in reversed(range(len(values))):
        delta = rewards[t] + following[t] - values[t]
        out.insert(0, delta + 0.95 * (out[0] if out else 0.0))
    return [a + v for a, v in zip(out, values)]


def naive_rollout(batch, policy, value, ref, reward, kl_coef):
    """A batch's figures from its ids alone, by their names."""
    rows, n = [], len(batch.lengths)
    for ids, start, end in zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist()):
        ids = ids[:end]
        p, q = (surprises(m, ids, start, 0.7) for m in (policy, ref))
        H = [-sum(x * math.exp(x) for x in shares) for shares in log_shares(policy, ids, start, 0.7)]
        rows.append((ids, p, [b - a for a, b in zip(p, q)], H, scalar(reward, ids),
                     [scalar(value, ids[:t]) for t in range(start, end)]))
    decisions = sum(len(p) for _, p, *_ in rows)
    kls = [kl for row in rows for kl in row[2]]
    free = 0.3 * sum(kls) / decisions
    final = [min(max(score, -0.8), 0.8) - 0.5 * (ids[-1] != 269) for ids, *_, score, _ in rows]
    values = [v for row in rows for v in row[5]]
    returns = [R for row, score in zip(rows, final)
               for R in naive_returns(score, [kl - free for kl in row[2]], row[5], kl_coef)]
    charged = kl_coef * (sum(kls) - free * decisions) / n
    return {"objective/kl": sum(kls) / n, "objective/kl_k3": sum(math.exp(-kl) - 1 + kl for kl in kls) / n,
            "objective/entropy": sum(sum(p) for _, p, *_ in rows) / n,
            "objective/scores": sum(row[4] for row in rows) / n, "objective/non_score_reward": -charged,
            "objective/rlhf_reward": sum(final) / n - charged, "objective/kl_coef": kl_coef,
            "policy/entropy_avg": sum(sum(row[3]) for row in rows) / decisions,
            "val/explained_variance": 1 - statistics.pvariance([R - V for R, V in zip(returns, values)])
            / statistics.pvariance(returns), "completions/mean_length": decisions / n,
            "completions/eos_rate": sum(ids[-1] == 269 for ids, *_ in rows) / n}


def work_of(prompts):
    """Answers to at most 128 prompts: half of the time of 128 does not depend on how many they are."""
    return (1 + prompts / 128) / 2


def more_for_the_policy(batch, policy):
    """How much longer an update of the policy takes than one of the value network: the head's numbers beside those of
    the block, twice, on the share of tokens that are responses."""
    mask = [n - p for n, p in zip(batch.lengths.tolist(), batch.prompt_lengths.tolist())]
    block = sum(p.numel() for name, p in policy.named_parameters() if name.startswith("h."))
    return 2 * 270 * 8 / block * sum(mask) / sum(batch.lengths.tolist())


def test_the_steps_of_ppo(ppo):
    """Each record, from the ids of its batch and the networks as they were: KL and the like in nats a response, all at
    the run's temperature, scores before they are clipped, the coefficient before it adapts, answers and their tokens a
    second, episodes, a rate that falls to a share of 1/steps; and the line of each step."""
    ref, _, reward = models()
    found = [r for r in ppo.metrics("ppo") if "final" not in r]
    lines = [step_lines(part) for part in ppo.ppo]
    assert len(found) == 4 and [len(part) for part in lines] == [2, 2]  # 21 episodes, 6 a batch, rounded up
    kl_coef, used, spent = 0.1, 23.0, []  # the first answers took 20 seconds
    for step, (record, line, ((batch, policy, value), _, _)) in enumerate(zip(
            found, lines[0] + lines[1], ppo.first["update"], strict=True)):
        expected = naive_rollout(batch, policy, value, ref, reward, kl_coef)
        seconds = 1.5 + step + 4.0 + (1.0 if step else 0.5)  # 4 optimizer steps of each network, 1 network in warm-up
        length = expected["completions/mean_length"]
        expected |= {"step": step + 1, "episode": 6 * (step + 1), "lr": 8e-3 * (4 - step) / 4, "seconds": seconds,
                     "rollout_seconds": 1.5 + step, "eps": 6 / seconds, "tokens_per_second": 6 * length / seconds,
                     "policy/updates": 4 if step else 0}
        assert {k: record[k] for k in expected} == close(expected, 1e-3), step
        assert 0 <= record["val/sampler_gap"] < 1e-5 and record["objective/kl_coef"] == pytest.approx(kl_coef, rel=1e-6)
        used, spent = (23.0, []) if step == 2 else (used, spent)
        used += seconds
        spent.append((1, 1.5 + step))  # before the update, which takes 5 seconds where both networks learn
        update = 5.0 if step else 4.5 * (2 + more_for_the_policy(batch, policy))
        answering = 20 / work_of(3 if step == 3 else 9)
        left = (3 - step) * (seconds_a_step(spent) + update) + answering * (
            (to_come(step + 1, 4, 3) + 3) * work_of(3) + work_of(9))
        shown = [f"{record['objective/scores']:+.3f}", f"{record['objective/kl']:.2f}",
                 f"{record['objective/kl_k3']:.2f}", f"{record['policy/entropy_avg']:.2f}",
                 f"{record['policy/clipfrac_avg']:.3f}", f"{record['val/explained_variance']:+.2f}",
                 f"{record['completions/mean_length']:.1f}", f"{record['completions/eos_rate']:.2f}",
                 f"{record['tokens_per_second']:,.0f}"]
        assert numbers(line) == [*expected_progress(step + 1, 4, used, left), *shown]
        kl_coef *= 1 + min(max(expected["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 6 / 10_000
        used += 60 + 20 if step == 2 else 0
    rates = [r["completions/eos_rate"] for r in found]
    assert 0 < sum(rates) < 4 and found[-1]["objective/kl_k3"] > 0.01


def test_what_ppo_begins_and_ends_with(ppo):
    """Prompts, steps, epochs and minibatches; megabytes of the checkpoint, and the time of this process."""
    lines, model = ppo.ppo[0], models()[0]
    assert after(lines, "prompts for training") == ["4", "9"]
    assert after(lines, "answers of up to") == ["1", "4", "6", "6", "2", "2"]
    assert after(lines, "policy: ")[0] == f"{sum(len(p.flatten()) for p in model.parameters()):,}"
    assert after(ppo.ppo[1], "goes on from step")[-1] == "2"
    size = (ppo.folder / "out" / "ppo" / "ckpt.pt").stat().st_size
    assert after(ppo.ppo[1][::-1], " MB in ")[0] == f"{size / 1e6:.1f}"
    used = 23.0 + sum(r["seconds"] for r in ppo.metrics("ppo")[2:4]) + 2 * (60 + 20) + 4 * 20
    assert after(ppo.ppo[1], "ckpt.pt after")[:2] == [*clock_text(used)]


def eos_of(row):
    return [269] * row["finished"]


def test_held_out_answers(ppo):
    """Each row of an evaluation, from its prompt and ids: KL from the SFT model by k1 and k3, the log-probability under
    it, all at the run's temperature, at which it was drawn too; its length with eos; its score and the judge's. The
    SFT model's answers are the same in each process; others for each draw."""
    ref, tokenizer, reward = models()
    assert [len(rows) for _, rows, _ in ppo.answers] == [9, 9, 3, 3, 9, 3, 3, 3]
    for (policy, _, _, prompts, *_), rows, _ in ppo.answers:
        for ids, row in zip(prompts, rows, strict=True):
            answer = [*row["ids"], *eos_of(row)]
            p, q = (surprises(m, ids + answer, len(ids), 0.7) for m in (policy, ref))
            kls = [b - a for a, b in zip(p, q)]
            assert {k: v for k, v in row.items() if k not in ("ids", "prompt", "completion")} == close({
                "k1": sum(kls), "k3": sum(math.exp(-kl) - 1 + kl for kl in kls), "ref_logprob": -sum(q),
                "length": len(answer), "score": scalar(reward, ids + answer),
                "judge": len(row["completion"]), "finished": row["finished"]}, 1e-3)
            assert row["completion"] == tokenizer.decode(row["ids"]) and row["prompt"] == tokenizer.decode(ids)
            assert row["finished"] or len(row["ids"]) == 6
    for (policy, prompts, *_), rollout, _ in ppo.first["generate"]:
        for ids, answer, told in zip(prompts, rollout.responses(), rollout.sampler_logprobs):
            assert -float(told.sum()) == close(sum(surprises(policy, ids + answer, len(ids), 0.7)), 1e-3)
    trained = checkpoint.load("out/ppo", ["ppo"], torch.device("cpu"))[0]
    for k, ((policy, *_), _, _) in enumerate(ppo.answers):  # at the start, at step 3, at step 4 and in the report
        same = [all(map(torch.equal, policy.parameters(), m.parameters())) for m in (ref, trained)]
        assert same == [k not in (2, 3, 4), k in (3, 4)]
    texts = [[r["completion"] for r in rows] for _, rows, _ in ppo.answers]
    assert texts[0] == texts[1]
    assert len({*map(tuple, [texts[0][:3], *texts[5:]])}) == 4


def naive_share(points):
    """A share with the two shares q that it is 1.96 of q's deviations from: (p - q)^2 = z^2 q (1 - q) / n."""
    n, p = len(points), sum(points) / len(points)
    a, b = 1 + 1.96 ** 2 / n, 2 * p + 1.96 ** 2 / n
    root = math.sqrt(max(b * b - 4 * a * p * p, 0))
    return p, (b - root) / (2 * a), (b + root) / (2 * a)


def naive_mean(values):
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def preferred(rows, base, name):
    return [1.0 if a[name] > b[name] else 0.5 if a[name] == b[name] else 0.0 for a, b in zip(rows, base, strict=True)]


def naive_summary(rows, base):
    n, seen, pairs = len(rows), set(), 0
    for row in rows:
        for k in range(1, len(row["ids"])):
            seen.add((row["ids"][k - 1], row["ids"][k]))
            pairs += 1
    lengths = [len(row["ids"]) + row["finished"] for row in rows]
    return {"prompts": n, "score": naive_mean([r["score"] for r in rows]), "kl": naive_mean([r["k1"] for r in rows]),
            "kl_k3": naive_mean([r["k3"] for r in rows]), "win_rate": naive_share(preferred(rows, base, "score")),
            "judge_score": naive_mean([r["judge"] for r in rows]),
            "judge_win_rate": naive_share(preferred(rows, base, "judge")),
            "eos_rate": sum(1 for r in rows if r["finished"]) / n, "mean_length": sum(lengths) / n,
            "distinct_2": len(seen) / max(pairs, 1), "repeated": sum(
                any(rows[j]["completion"] == rows[i]["completion"] for j in range(i)) for i in range(n)) / n,
            "ref_logprob_per_token": sum(r["ref_logprob"] for r in rows) / sum(lengths)}


def same_summary(found, rows, base):
    expected = naive_summary(rows, base)
    assert found.keys() - {"kl_bound"} == expected.keys()
    for name, value in expected.items():
        assert (tuple(found[name]) if isinstance(value, tuple) else found[name]) == pytest.approx(
            value, rel=1e-6, abs=1e-9), name


def test_evaluations_of_ppo(ppo):
    """A quarter of --num_eval_prompts, against the SFT model's answers to the same prompts."""
    base = ppo.answers[0][1][:3]
    looks = [r for r in ppo.metrics("ppo") if "eval" in r]
    said = [numbers(line) for line in ppo.ppo[1] if line.startswith("  held out: ")]
    shown = [numbers(line[line.rindex("("):]) for line in ppo.ppo[1] if line.startswith("    ") and " -> " in line]
    kept = [r for r in ppo.samples("ppo") if "final" not in r]
    assert [r["step"] for r in looks] == [3, 4]
    for k, (look, (_, rows, _), line) in enumerate(zip(looks, ppo.answers[2:4], said, strict=True)):
        f = look["eval"]
        same_summary(f, rows, base)
        assert line == [f"{f['score'][0]:+.3f}", f"{f['kl'][0]:.2f}", f"{f['win_rate'][0]:.1%}", f"{f['eos_rate']:.2f}",
                        f"{f['judge_score'][0]:+.3f}", f"{f['judge_win_rate'][0]:.1%}"]
        assert shown[3 * k:3 * k + 3] == [[f"{a['score']:+.2f}", f"{b['score']:+.2f}"] for a, b in zip(base, rows)]
        assert kept[3 * k:3 * k + 3] == [
            {"step": look["step"], "prompt": r["prompt"], "completion": r["completion"], "score": close(r["score"])}
            for r in rows]


FORMS = {"score": "{:.3f} {:.3f}", "win_rate": "{:.1%} {:.1%} {:.1%}", "judge_score": "{:.3f} {:.3f}",
         "judge_win_rate": "{:.1%} {:.1%} {:.1%}", "kl": "{:.2f} {:.2f}", "kl_k3": "{:.2f} {:.2f}",
         "eos_rate": "{:.1%}", "mean_length": "{:.1f}", "distinct_2": "{:.3f}", "repeated": "{:.1%}",
         "ref_logprob_per_token": "{:.3f}"}


def cells(columns):
    """The rows of numbers that a table of summaries has."""
    return [[number for f in columns for number in form.format(
        *(f[key] if isinstance(f[key], (tuple, list)) else [f[key]])).split()] for key, form in FORMS.items()]


def table_in(lines, title, count):
    at = next(i for i, line in enumerate(lines) if line.startswith(title))
    return numbers(lines[at]), [numbers(line[38:]) for line in lines[at + 1:at + 1 + count]]


def test_the_closing_report_of_ppo(ppo):
    """Before and after, in this order, on all held-out prompts, in the file and in the table; and for comparison the
    best by score of four SFT answers to a quarter of them."""
    (base, *_, rows), draws = [rows for _, rows, _ in ppo.answers[1:5]], [rows for _, rows, _ in ppo.answers[5:]]
    final = ppo.metrics("ppo")[-1]
    assert final["step"] == 4
    same_summary(final["final"]["before"], base, base)
    same_summary(final["final"]["after"], rows, base)
    assert table_in(ppo.ppo[1], "held-out prompts", 11) == (
        ["95%", "9"], cells([final["final"]["before"], final["final"]["after"]]))
    best = [max([base[i], *(d[i] for d in draws)], key=lambda row: row["score"])["score"] for i in range(3)]
    assert after(ppo.ppo[1], "for comparison") == ["4", "3", f"{sum(best) / 3:.3f}", f"{math.log(4) - 3 / 4:.2f}"]
    kept = [r for r in ppo.samples("ppo") if "final" in r]
    assert kept == [{"step": 4, "final": True, "prompt": b["prompt"], "completion": a["completion"],
                     "score": close(a["score"]), "sft_completion": b["completion"], "sft_score": close(b["score"])}
                    for a, b in zip(rows, base, strict=True)]
    scores = [line.split("|")[0] for line in ppo.ppo[1][-20:]]
    for k in range(4):
        assert any(f"{base[k]['score']:+.2f} " in line for line in scores)


# ---- commands

def test_the_figures_of_evaluate(ppo):
    """At the run's own temperature: a column a policy, wins by thirds of length, paired differences with their 95 %
    interval, the best of n, perplexity."""
    ppo.calls["answer"].clear(), ppo.said.clear()
    evaluate.main("out/ppo out/sft --judge judge.py:length --prompts data/prompts.val.jsonl --num_prompts 8 --best_of "
                  "1,3 --output found.json".split())
    found = json.loads((ppo.folder / "found.json").read_text())
    base, ours, theirs, one, two = (rows for _, rows, _ in ppo.calls["answer"])
    assert found["temperature"] == 0.7 and found["response_length"] == 6 and found["num_prompts"] == 8
    assert len({tuple(r["completion"] for r in rows) for rows in (base, one, two)}) == 3  # other draws each
    assert all(given[5].temperature == 0.7 for given, _, _ in ppo.calls["answer"])
    same_summary(found["policies"]["out/ppo"], ours, base)
    same_summary(found["policies"]["out/sft"], theirs, base)
    columns = [*found["policies"].values()]
    title, rows = table_in(ppo.said, "held-out prompts", 12)
    assert title == ["95%", "8"] and rows[:11] == cells([found["policies"]["out/sft"], found["policies"]["out/ppo"]])
    tokens = [-sum(r["ref_logprob"] for r in rows) / sum(r["length"] for r in rows) for rows in (base, ours)]
    assert rows[11] == [f"{math.exp(nats):.1f}" for nats in tokens] and len(columns) == 2
    for n, draws in ((1, [base]), (3, [base, one, two])):
        best = [max((d[i] for d in draws), key=lambda row: row["score"]) for i in range(8)]
        same_summary(found["best_of"][f"{n}"], best, base)
        bound = found["best_of"][f"{n}"]["kl_bound"]
        assert bound == close(math.log(n) - (n - 1) / n)
        f = naive_summary(best, base)
        assert after(ppo.said, f"best of {n} ") == [
            f"{n}", f"{f['score'][0]:.3f}", f"{f['win_rate'][0]:.1%}", f"{f['judge_win_rate'][0]:.1%}", f"{bound:.2f}"]
    longer = sorted(range(8), key=lambda i: ours[i]["length"] - base[i]["length"])
    thirds = []
    for part in (longer[:2], longer[2:5], longer[5:]):
        gaps = [ours[i]["length"] - base[i]["length"] for i in part]
        thirds.append([min(gaps), max(gaps), *naive_share(preferred([ours[i] for i in part], [base[i] for i in part],
                                                                    "score"))])
    for third, expected in zip(found["by_length"]["out/ppo"], thirds, strict=True):
        assert third == pytest.approx(expected, abs=1e-9)
    line = next(line for line in ppo.said if line.startswith("\nout/ppo: "))
    assert numbers(line) == sum(([f"{a:+d}", f"{b:+d}", *(f"{x:.1%}" for x in s)] for a, b, *s in
                                 found["by_length"]["out/ppo"]), [])
    assert [d["by"] for d in found["differences"]] == ["score", "judge"]
    for d in found["differences"]:
        gaps = [a[d["by"]] - b[d["by"]] for a, b in zip(ours, theirs)]
        drawn = torch.randint(8, (2000, 8), generator=torch.Generator().manual_seed(0)).tolist()
        means = [sum(gaps[i] for i in row) / 8 for row in drawn]
        assert (d["of"], d["from"], d["mean"]) == ("out/ppo", "out/sft", close(sum(gaps) / 8))
        assert d["interval"] == close([quantile(means, 0.025), quantile(means, 0.975)])
        assert after(ppo.said, f"mean difference of the {d['by']}") == [
            f"{x:+.3f}" for x in (d["mean"], *d["interval"])]


def test_completions_of_sample(ppo, monkeypatch, capsys):
    """--n completions a prompt of each checkpoint, other draws each; finished where eos was drawn; long prompts are
    counted once, however many completions they have."""
    rollouts, inner, (model, tokenizer, _) = [], sample.generate, models()
    prompts = [r["prompt"] for r in ppo.records["prompts", "val"]]
    lengths = sorted(len(tokenizer.encode_prompt(p)) for p in prompts)
    monkeypatch.setattr(sample, "generate", lambda *a, **k: rollouts.append(inner(*a, **k)) or rollouts[-1])
    sample.main(f"out/sft out/ppo --prompts data/prompts.val.jsonl --n 3 --response_length {48 - lengths[4]} "
                "--temperature 2 --output s.jsonl".split())
    error = capsys.readouterr().err
    rows = [json.loads(line) for line in (ppo.folder / "s.jsonl").read_text().splitlines()]
    drawn = [rollout.responses() for rollout in rollouts]
    expected = [{"checkpoint": path, "prompt": prompts[k // 3], "completion": tokenizer.decode(ids[k]),
                 "finished": ids[k][-1] == 269}
                for k in range(27) for path, ids in zip(("out/sft", "out/ppo"), drawn, strict=True)]
    assert [{k: r[k] for k in expected[0]} for r in rows] == expected and len({r["finished"] for r in rows}) == 2
    assert all(len({r["completion"] for r in rows if r["checkpoint"] == "out/sft" and r["prompt"] == p}) > 1
               for p in prompts)
    ids = tokenizer.encode_prompt(prompts[0])
    if len(ids) <= lengths[4]:
        nats = sum(surprises(model, ids + drawn[0][0], len(ids), 2.0))
        assert -float(rollouts[0].sampler_logprobs[0].sum()) == close(nats, 1e-3)
    long = sum(n > lengths[4] for n in lengths)
    assert 0 < long < 9 and [numbers(line) for line in error.splitlines()] == [[f"{long}", f"{lengths[4]}"]] * 2


# ---- ranks

@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_figures_over_two_ranks(request, tmp_path, monkeypatch, stage):
    """Two ranks with every second row of each batch, the other one's sums as large as this one's: tokens, answers and
    pairs are those of the whole batch, losses and shares sums over both."""
    main, arguments = {"sft": (train_sft.main, SFT), "rm": (train_rm.main, RM), "ppo": (train_ppo.main, PPO)}[stage]
    calls = request.getfixturevalue(stage).calls["update" if stage == "ppo" else f"{stage} steps"]
    before = len(calls)
    for owner, name in ((train_rm, "set_scale"), (evaluate.AgainstSFT, "closing_report")):  # the steps are enough
        monkeypatch.setattr(owner, name, lambda *a: (_ for _ in ()).throw(InterruptedError))
    monkeypatch.setattr(runtime.Run, "share", lambda run, rows: rows[::2])
    monkeypatch.setattr(runtime.Run, "total", lambda run, t: 2 * t)
    with contextlib.suppress(InterruptedError):
        main([*arguments, "--eval_interval", "99", "--out_dir", str(tmp_path / "out")])
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    seen = seconds = 0
    assert len(calls) - before == {"sft": 8, "rm": 5, "ppo": 4}[stage]
    for k, (record, (given, _, _)) in enumerate(zip(records, calls[before:])):
        if stage == "ppo":
            lengths = (given[0].lengths - given[0].prompt_lengths).tolist()
            assert len(lengths) == 3 and record["completions/mean_length"] == close(sum(lengths) / 3)
            assert record["tokens_per_second"] == close(6 * sum(lengths) / 3 / record["seconds"])
            assert record["eps"] == close(6 / record["seconds"]) and record["episode"] == 6 * (k + 1)
            change = 1 + min(max(record["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 6 / 10_000
            assert k == 3 or records[k + 1]["objective/kl_coef"] == pytest.approx(
                record["objective/kl_coef"] * change, rel=1e-6)
            continue
        model, batch = given
        if stage == "sft":
            nats = sum(sum(surprises(model, row.ids, row.prompt_length)) for row in batch[::2])
            assert record["loss"] == close(2 * nats / sum(len(row.ids) - row.prompt_length for row in batch))
            read = sum(len(row.ids) - 1 for row in batch)
        else:
            won = sum(scalar(model, rows[i].ids) > scalar(model, rows[j].ids) for rows, index, _ in batch[::2]
                      for i, j in index)
            assert record["accuracy"] == close(2 * won / sum(len(index) for _, index, _ in batch))
            read = sum(len(row.ids) for rows, _, _ in batch for row in rows)
        seen, seconds = seen + read, seconds + {"sft": 2.25, "rm": 1.75}[stage] + before + k + 0.125
        assert record["tokens_per_second"] == close(seen / seconds)
        seen, seconds = (0, 0) if k % 2 else (seen, seconds)  # a line was printed


# ---- what is printed of figures that are stored

def test_the_line_of_a_step():
    """Each figure has its own place and as many digits as it is given."""
    record = {"objective/scores": -1.23456, "objective/kl": 12.3456, "objective/kl_k3": 7.8912,
              "policy/entropy_avg": 2.3456, "policy/clipfrac_avg": 0.12345, "val/explained_variance": -0.4567,
              "completions/mean_length": 33.456, "completions/eos_rate": 0.8765, "tokens_per_second": 12345.6}
    assert numbers(evaluate.describe_step(record)) == [
        "-1.235", "12.35", "7.89", "2.35", "0.123", "-0.46", "33.5", "0.88", "12,346"]
    del record["val/explained_variance"]  # where there is no value network
    line = evaluate.describe_step(record)
    assert numbers(line) == ["-1.235", "12.35", "7.89", "2.35", "0.123", "33.5", "0.88", "12,346"]
    assert "  clip 0.123  length 33.5  " in line


def test_the_line_of_held_out_losses():
    figures = {"all": {"nats_per_token": 4.56789, "bits_per_byte": 2.34567},
               "a": {"nats_per_token": 1.0, "bits_per_byte": 1.98765}}
    assert numbers(evaluate.describe(figures)) == ["4.5679", "2.346", "1.988"]


def test_verdicts_name_their_figures():
    """Accuracy and its interval, then what length alone has; calibration where the model is good enough."""
    f = {"pairs": 1234, "accuracy": 0.7654, "low": 0.7321, "high": 0.7987, "length_only": 0.5432}
    calibrated = {"ece": 0.9, "ece_with_temperature": 0.0345, "temperature": 1.2345}
    span = ["0.765", "95%", "0.732", "0.799"]
    for changes, told in (({}, [*span, "0.543", "0.035", "1.23"]), ({"low": 0.5}, ["0.765", "95%", "0.500", "0.799"]),
                          ({"length_only": 0.7321}, [*span, "0.732"]), ({"pairs": 49}, ["49"]),
                          ({"accuracy": 0.6499, "low": 0.6}, ["0.650", "95%", "0.600", "0.799"]),
                          ({"accuracy": 0.65}, ["0.650", *span[1:], "0.543", "0.035", "1.23"])):
        sentence = evaluate.verdict({"all": f | changes, "mean": {}}, calibrated)
        assert numbers(sentence) == told and sentence.startswith("Good") == (told[-1] == "1.23")
    assert evaluate.verdict({"all": f | {"pairs": 50}}, calibrated).startswith("Good")


@pytest.mark.parametrize("seconds, text", [(0.49, "0:00"), (0.5, "0:01"), (59.5, "1:00"), (3599.4, "59:59"),
                                           (3599.5, "1:00:00"), (36061, "10:01:01")])
def test_clock(seconds, text):
    """To the nearest second, carried over."""
    assert runtime.clock(seconds) == text


def test_gradient_norms_are_those_before_clipping(make_model):
    """Over all weights at once, whatever the limit; afterwards the gradient has the limit's norm, where it was more."""
    for limit, after_clipping in ((0.5, 0.5), (0.0, None), (1e9, None)):
        model = make_model()
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        norm = gradient_norm(model)
        assert runtime.clip_gradients(model, 1.0, "here", types.SimpleNamespace(max_grad_norm=limit)) == close(norm)
        assert gradient_norm(model) == close(after_clipping or norm)


def test_the_first_and_last_rates_of_a_schedule():
    """Of 7 steps, 3 of them warm-up: 1/3, 2/3, 1, then the cosine from its top; the last one is not 0. The warm-up is
    at least one step, at most all of them."""
    assert [runtime.rate_factor("cosine", step, 7, 0.4) for step in range(7)] == close([
        1 / 3, 2 / 3, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2])
    assert [runtime.rate_factor("cosine", step, 2, 0.0) for step in range(2)] == [1, 1]
    assert [runtime.rate_factor("cosine", step, 2, 1.0) for step in range(2)] == [0.5, 1]
    model = torch.nn.Linear(2, 2)
    optimizers = [torch.optim.SGD([{"params": [model.weight], "lr": 4.0}, {"params": [model.bias], "lr": 2.0}])]
    for group in optimizers[0].param_groups:
        group["peak"] = group["lr"]
    for _ in range(2):  # of the peak, not of what it was
        runtime.set_rate(optimizers, 0.25)
    assert [group["lr"] for group in optimizers[0].param_groups] == [1.0, 0.5]


def test_tables_keep_each_figure_in_its_column():
    """One column a policy, in the order given; one without a figure has an empty place."""
    one = {"score": (1.5, 0.25), "win_rate": (0.5, 0.4, 0.6), "eos_rate": 0.875, "mean_length": 12.34}
    two = {"score": (-2.5, 0.75), "win_rate": (0.25, 0.125, 0.5), "judge_score": (3.0, 0.5), "eos_rate": 0.5,
           "mean_length": 5.0}
    lines = [*evaluate.table({"one": one, "two": two}, "title")]
    assert lines[0].split() == ["title", "one", "two"]
    assert [numbers(line[38:62]) for line in lines[1:]] == [["1.500", "0.250"], ["50.0%", "40.0%", "60.0%"], [],
                                                            ["87.5%"], ["12.3"]]
    assert [numbers(line[62:]) for line in lines[1:]] == [["-2.500", "0.750"], ["25.0%", "12.5%", "50.0%"],
                                                          ["3.000", "0.500"], ["50.0%"], ["5.0"]]


def test_ties_in_held_out_accuracy():
    """Of pairs won, lost, tied and tied: a half, and the interval is that of their points."""
    better, worse = torch.tensor([2.0, 0, 1, 1]), torch.tensor([1.0, 1, 1, 1])
    names = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    low, high = naive_interval([1, 0, 0.5, 0.5], names)
    assert evaluate.accuracy_with_interval(better, worse, names, 0, 50) == close((0.5, low, high))


# ---- --check

def checks(dtype):
    said = []
    run = types.SimpleNamespace(say=said.append, dtype=dtype, hardware="cpu", stop=0, world=1, total=lambda t: t)
    return check.Checks(run), said


def test_differences_that_check_gives():
    """In standard deviations of what is compared; of a gradient, in its norm: 1e-4 at most, 0.03 in bfloat16. Three
    numbers of deviation sqrt(2/3) differ by 0, 0 and .003."""
    a, b = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 3.003])
    for make, gap in ((lambda c: c.close("x", a, b, "y"), 0.003 / math.sqrt(3) / math.sqrt(2 / 3)),
                      (lambda c: check.microbatches(c, a, b), 0.003 / math.sqrt(14))):
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
            checking, said = checks(dtype)
            make(checking)
            assert numbers(said[-1])[:2] == [f"{gap:.1e}", f"{limit:.0e}"] and checking.failed == (gap > limit)
            assert said[-1].startswith("FAIL" if gap > limit else "ok  ")


def test_rows_that_check_takes():
    """Of eight rows of 16 tokens the first 2, 4, ... 16."""
    rows = check.ragged([Row([*range(16)], 3)] * 9)
    assert [row.ids for row in rows] == [[*range(2 * k)] for k in range(1, 9)]


def test_a_check_counts_its_failures():
    checking, said = checks(torch.float32)
    for holds in (True, False, True, False, False):
        checking("claim", holds, "found", "cause")
    with pytest.raises(SystemExit) as stop:
        checking.end()
    assert stop.value.code == 1 and numbers(said[-1]) == ["3"]


# ---- the benchmark

def test_the_derived_figures_of_the_benchmark(monkeypatch):
    """Medians over iterations, of all and of each phase; rates from them; the least, the most and the first iteration
    besides. Shares of a peak of 100 GFLOP/s, and of the floor under it and 20 GB/s."""
    work = benchmark.Work(3, 16, 2, 29, batch=4, prompt=3, response=5, epochs=2, minibatches=2)
    monkeypatch.setitem(benchmark.SIZES, "S", work)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device, dtype: (100.0, {"mkl": 100.0}))
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 20.0)
    run = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr(benchmark, "time_ppo", lambda o, w, iters: (run, [[3, 8, 20], [1, 2, 10], [2, 5, 60]], 99.0))
    monkeypatch.setattr(benchmark, "time_step", lambda o, w, iters, batch: (run, [4.0, 1.0, 2.0, 16.0], 50.0))
    said = []
    monkeypatch.setattr(benchmark, "say", said.append)
    monkeypatch.setattr(kernels.Load, "others", lambda load: 0.25)
    r = benchmark.measure(benchmark.Options(what="ppo"))
    assert {k: r[k] for k in ("rollout_s", "scoring_s", "update_s", "total_s", "min_total_s", "max_total_s", "first_s")
            } == {"rollout_s": 2, "scoring_s": 5, "update_s": 20, "total_s": 31, "min_total_s": 13, "max_total_s": 67,
                  "first_s": 99}
    assert r["iters"] == 3 and r["samples_s"] == close(4 / 31) and r["tok_s"] == close(20 / 31)
    assert r["rollout_tok_s"] == 10
    seconds = {"rollout": 2, "scoring": 5, "update": 20, "total": 31}
    cost = benchmark.ppo_cost(work, benchmark.Options(), 4)
    floors = {k: max(flops / 100e9, moved / 20e9) for k, (flops, moved) in cost.items()}
    floors["total"], flops = sum(floors.values()), {k: c[0] for k, c in cost.items()}
    flops["total"] = sum(flops.values())
    for k, s in seconds.items():
        assert r["floor_s"][k] == close(floors[k]) and r["floor_ratio"][k] == close(s / floors[k])
        assert r["gflop"][k] == close(flops[k] / 1e9) and r["mfu"][k] == close(flops[k] / s / 100e9)
    benchmark.show(r)
    rows = {line[:16].strip(): numbers(line[16:]) for line in said[2:]}
    assert {k: v[:3] for k, v in rows.items()} == {
        "PPO rollout": ["2.0000", "2.0", "10"], "PPO scoring": ["5.0000", "0.8", "6"],
        "PPO update": ["20.0000", "0.4", "3"], "PPO iteration": ["31.0000", "0.1", "1"]}
    for what, texts in (("sft", 1), ("reward", 2)):
        said.clear()
        r = benchmark.measure(benchmark.Options(what=what, batch=6))
        assert (r["step_s"], r["min_step_s"], r["first_s"], r["iters"]) == (3, 1, 50, 4)
        assert (r["steps_s"], r["samples_s"], r["tok_s"]) == close((1 / 3, 2, 2 * 64 * texts))
        assert r["mfu"]["step"] == close(benchmark.step_cost(work, what, 6, benchmark.Options())["step"][0] / 3 / 100e9)
        benchmark.show(r)
        assert numbers(said[-1][16:])[:3] == ["3.0000", "2.0", f"{128 * texts}"]
