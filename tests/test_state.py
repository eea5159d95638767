"""What a run carries from step to step and from one process to the next: modes, the best so far, counters, options,
streams of random numbers, and what is on the disk when."""
import builtins
import json
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import fields

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from conftest import scratch
from minirlhf import checkpoint, data, dpo, evaluate, runtime, sample
from minirlhf.model import GPT
from minirlhf.tokenizer import Tokenizer

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo, "dpo": dpo}
EVERY = pytest.mark.parametrize("stage", SCRIPTS)
CLOCKS = ("tokens_per_second", "eps", "seconds", "rollout_seconds", "elapsed")
DROPOUT = {"sft": ["--dropout", "0.5"], "rm": ["--dropout", "0.5"], "ppo": [], "dpo": []}
LONGER = {**{stage: ["--num_train_epochs", "2"] for stage in ("sft", "rm", "dpo")}, "ppo": ["--total_episodes", "12"]}


def tensors(value, name=""):
    """{dotted name: tensor} of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, x in inside for k, v in tensors(x, f"{name}.{key}".lstrip(".")).items()}


def equal(a, b):
    """Whether all tensors of two payloads, their optimizers' included, are the same to the last bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_clocks(rows, *also):
    return [{k: v for k, v in row.items() if k not in (*CLOCKS, *also)} for row in rows]


@pytest.fixture
def stopping(monkeypatch):
    """stopping(*steps): runs get a signal in those steps, counted over all runs from now on. Where DPO asks the
    reference, before its steps, it gets none."""
    def arm(*steps):
        asked = iter(range(1, 1000))
        monkeypatch.setattr(runtime.Run, "should_stop", lambda run: sys._getframe(1).f_code.co_name
                            != "reference_logprobs" and next(asked) in steps)
    return arm


# ---- modes


@pytest.fixture
def passes(monkeypatch):
    """A list that notes each pass through a model: (its head, dropout, in training mode, with gradients, rows)."""
    noted, hidden = [], GPT.hidden

    def noting(self, tokens, *more, **named):
        noted.append((self.head, self.config.dropout, self.training, torch.is_grad_enabled(), len(tokens)))
        return hidden(self, tokens, *more, **named)
    monkeypatch.setattr(GPT, "hidden", noting)
    return noted


@pytest.mark.parametrize("stage, looks", [
    ("sft", ["evaluate.held_out_loss", "train_sft.show_samples"]),
    ("rm", ["evaluate.reward_model_figures", "evaluate.show_pairs"])])
def test_dropout_is_on_in_training_and_nowhere_else(tiny, passes, monkeypatch, stage, looks):
    """Every pass with gradients has dropout, every other one has none: held-out losses and pairs, samples, scores that
    set the scale. Evaluations stand between the steps, and each part of one leaves dropout on."""
    left = []

    def noting(look):
        def call(model, *more, **named):
            found = look(model, *more, **named)
            left.append((look.__name__, model.training))
            return found
        return call
    for look in looks:
        module, name = look.split(".")
        module = {"evaluate": evaluate, "train_sft": train_sft}[module]
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    assert tiny.train(stage, "--dropout", "0.5", "--eval_interval", "1").code == 0
    assert {*left} == {(look.split(".")[1], True) for look in looks} and len(left) == 6
    assert {(p, training, gradients) for _, p, training, gradients, _ in passes if p} == {
        (0.5, True, True), (0.5, False, False)}
    assert all(p for _, p, _, gradients, _ in passes if gradients)
    assert not any(training for _, _, training, gradients, _ in passes if not gradients)
    order = [gradients for *_, gradients, _ in passes]
    assert sum(a != b for a, b in zip(order, order[1:])) >= 5  # steps and looks in turn


@pytest.mark.parametrize("part", [[], ["--lora_rank", "2"]])
def test_dropout_begins_with_the_first_step(tiny, passes, part):
    """Also where stage 1 starts from a model, which is loaded without."""
    assert tiny.train("sft", "--init_from", tiny.sft, "--dropout", "0.5", *part).code == 0
    steps = [(p, training) for _, p, training, gradients, _ in passes if gradients]
    assert {*steps} == {(0.5, True)} and len(steps) >= 3


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_stage_3_and_dpo_have_no_dropout_anywhere(tiny, passes, stage):
    """The SFT model was trained with it. A rollout or reference with dropout would sample and score another policy."""
    assert tiny.train(stage, "--eval_interval", "1").code == 0
    assert json.loads((tiny.folder / "sft" / "config.json").read_text())["dropout"] == 0.1
    assert passes and not any(p for _, p, *_ in passes)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_dropout_differs_at_each_step_and_not_on_resume(tiny, stopping, stage):
    """At learning rate 0 and with all rows in each batch only dropout moves the loss: each step has its own, a second
    run has the same ones, and so has a run that was stopped after every step."""
    still = ["--dropout", "0.5", "--batch_size", "16", "--micro_batch_size", "16", "--num_train_epochs", "3",
             "--learning_rate", "0", "--muon_learning_rate", "0"]
    losses = [[row["loss"] for row in tiny.train(stage, *still).rows() if "loss" in row] for _ in range(2)]
    assert len({round(loss, 3) for loss in losses[0]}) == 3 and losses[0] == losses[1]
    stopping(1, 2)
    ended = tiny.train(stage, *still)
    while ended.code:
        ended = tiny.train(stage, *still, "--resume", out=ended.folder)
    assert [row["loss"] for row in ended.rows() if "loss" in row] == losses[0]
    plain = tiny.train(stage, *still, "--dropout", "0")
    assert len({round(row["loss"], 3) for row in plain.rows() if "loss" in row}) == 1


# ---- what survives a resume


@EVERY
def test_a_run_that_is_stopped_after_every_step_is_the_run(tiny, stopping, stage):
    """Each process takes one step, with dropout, a rate that changes and a kl_coef that adapts: weights, optimizers,
    counters and figures end as those of one process, to the last bit."""
    options = [*DROPOUT[stage], *LONGER[stage], "--eval_interval", "2"]
    options += ["--adaptive_kl_target", "0.01", "--whiten_rewards", "--kl_coef", "5"] if stage == "ppo" else []
    straight = tiny.train(stage, *options)
    assert straight.code == 0
    steps = 3 if stage == "ppo" else 6
    stopping(*range(1, steps))
    ended = tiny.train(stage, *options)
    for done in range(1, steps):
        assert ended.code == 143 and len(ended.rows()) == done
        ended = tiny.train(stage, *options, "--resume", out=ended.folder)
    assert ended.code == 0
    one, other = straight.payload(), ended.payload()
    assert equal(one["model"], other["model"]) and equal(one["training"], other["training"])
    assert {k: v for k, v in one["training"].items() if k in ("kl_coef", "high", "step")} == {
        k: v for k, v in other["training"].items() if k in ("kl_coef", "high", "step")}
    assert without_clocks(straight.rows()) == without_clocks(ended.rows())
    assert straight.rows("samples.jsonl") == ended.rows("samples.jsonl")


@pytest.fixture
def scripted(monkeypatch):
    """scripted(losses) -> weights at each evaluation: stage 1's held-out losses are these, in this order."""
    real = evaluate.held_out_loss

    def arm(*losses):
        found, seen = iter(losses), []

        def held_out_loss(model, *more):
            real(model, *more)
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"all": {"nats_per_token": next(found), "bits_per_byte": 1.0}}
        monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)
        return seen
    return arm


@pytest.mark.parametrize("stops", [(2,), (3,), (2, 3, 4, 5)])
def test_the_best_stays_the_best(tiny, scripted, stopping, stops):
    """Held-out losses of 3, 1, 2, 1, 4, 5: what is saved for others are the weights of the second evaluation, a copy
    that training after it does not change; of a tie the first. Also where the run was stopped and went on, after
    the best evaluation or just with it: and it goes on from the last weights, not from the best."""
    options, runs = ["--num_train_epochs", "2", "--eval_interval", "1"], []
    for when in ((), stops):
        seen = scripted(3.0, 1.0, 2.0, 1.0, 4.0, 5.0)
        stopping(*when)
        ended = tiny.train("sft", *options)
        while ended.code:
            ended = tiny.train("sft", *options, "--resume", out=ended.folder)
        payload = ended.payload()
        assert len(seen) == 6 and equal(payload["model"], seen[1]) and equal(payload["training"]["model"], seen[5])
        assert not equal(seen[1], seen[5]) and payload["info"]["nats_per_token"] == 1.0
        assert payload["info"]["held_out"]["all"]["nats_per_token"] == 1.0
        assert "best held-out loss: 1.0000 nats/token" in ended.said
        runs.append(seen)
    assert all(map(equal, *runs))


def test_the_best_of_the_last_evaluation_is_the_last(tiny, scripted):
    """Losses that fall to the end: others get the last weights."""
    seen = scripted(3.0, 2.0, 1.0)
    payload = tiny.train("sft", "--eval_interval", "1").payload()
    assert equal(payload["model"], seen[2]) and equal(payload["training"]["model"], seen[2])


def test_a_run_that_was_stopped_before_its_first_evaluation(tiny, stopping):
    """Nothing is the best yet: the last weights are there for others, and the first evaluation is."""
    stopping(2)
    ended = tiny.train("sft")
    payload = ended.payload()
    assert ended.code == 143 and payload["info"]["nats_per_token"] == math.inf
    assert payload["training"].get("model") is None
    ended = tiny.train("sft", "--resume", out=ended.folder)
    assert ended.code == 0 and "best so far" in ended.said and ended.payload()["info"]["nats_per_token"] < math.inf


def test_what_the_optimizers_hold_is_no_alias_of_the_file(tiny, stopping):
    """A payload in memory that a run went on from stays as it was read, whatever the run does then."""
    stopping(2)
    ended = tiny.train("sft")
    kept = []
    real = checkpoint.unpack

    def unpack(path, mmap=False):
        payload = real(path, mmap)
        if not mmap:
            kept.append(({**payload["model"]}, {k: v.clone() for k, v in payload["model"].items()}))
        return payload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "unpack", unpack)
        assert tiny.train("sft", "--resume", out=ended.folder).code == 0
    assert kept and all(equal(now, then) for now, then in kept)


def test_the_count_of_divergent_batches_survives_a_resume(tiny, stopping):
    """Every batch is too far from the SFT model, but the first, in which both are the same: whether the run is
    stopped in between or not, the fourth step ends it with the same words."""
    options = ["--total_episodes", "20", "--max_ref_kl", "1e-2"]
    straight = tiny.train("ppo", *options)
    stopping(3)
    first = tiny.train("ppo", *options)
    assert first.code == 143 and first.payload()["training"]["high"] == 2
    second = tiny.train("ppo", *options, "--resume", out=first.folder)
    assert straight.code == second.code == 1
    assert "error: step 4: for the third batch in a row" in straight.error
    assert second.error.replace(str(second.folder), "") == straight.error.replace(str(straight.folder), "")


def test_an_adapted_kl_coef_gives_way_to_one_that_is_named(tiny, stopping):
    """It goes on from where it had adapted to, unless --kl_coef is changed: then from there."""
    stopping(2)
    options = ["--adaptive_kl_target", "1e-6", "--kl_coef", "1.0", "--total_episodes", "16"]
    folder = tiny.train("ppo", *options).folder
    adapted = torch.load(folder / "ckpt.pt", weights_only=True)["training"]["kl_coef"]
    assert adapted != 1.0
    stopping(1)
    same = tiny.train("ppo", *options, "--resume", out=folder).rows()
    assert same[2]["objective/kl_coef"] == adapted
    stopping()
    other = tiny.train("ppo", *options, "--resume", "--kl_coef", "2.0", out=folder).rows()
    assert other[3]["objective/kl_coef"] == 2.0


def test_what_is_frozen_stays(tiny, loaded):
    """Stage 3 trains the policy and the value network, which begin as the SFT model and the reward model: neither of
    those has moved at the end, though both of these have."""
    payload = tiny.train("ppo").payload()
    assert all(equal(model.state_dict(), before) for model, before in loaded.values()) and len(loaded) == 2
    for name, stage in (("model", "sft"), ("value_model", "rm")):
        network = {**payload, **payload["training"]}[name]
        assert not any(torch.equal(network[name], loaded[stage][1][name]) for name in ("wte.weight", "ln_f.bias"))


# ---- each option has an effect

class Alone:
    """An option whose effect a test of its own below shows."""

    def __init__(self, test):
        self.test = test


def row(value, *differs):
    """What an option is changed to, and what must then differ from the base run. Of "weights" (of all networks) and
    "steps" (figures of every step) what is not named must stay the same; "evals", "samples", "said" and "passes" (rows
    of each pass) only have to differ where they are named. "rounding": weights may differ a little, for AdamW makes a
    whole step of the rounding of a gradient that is 0, as that of the keys' biases is."""
    return value, set(differs)


COMMON = {
    "val_share": row(0.3, "said"),  # that it has no effect where there are held-out files, as here
    "device": row("cpu:0", "said"), "dtype": row("bfloat16", "weights", "steps"), "seed": row(5, "weights", "steps"),
    "compile": Alone("test_compile"), "resume": Alone("test_resume_and_overwrite"),
    "overwrite": Alone("test_resume_and_overwrite"), "check": Alone("test_check_is_said_to_be_one"),
    "checkpoint_activations": row(True), "force": row(True),
    "out_dir": Alone("test_resume_and_overwrite"), "keep_checkpoints": Alone("test_further_files"),
    "lora_rank": Alone("test_a_part_learns"), "lora_alpha": Alone("test_a_part_learns"),
    "lora_layers": Alone("test_a_part_learns"), "freeze_layers": Alone("test_a_part_learns")}
TRAINING = {
    "dropout": row(0.5, "weights", "steps"), "num_train_epochs": row(2, "weights", "steps"),
    "max_steps": row(1, "weights", "steps"),
    "batch_size": row(2, "weights", "steps"), "micro_batch_size": row(1, "passes", "rounding"),
    "optimizer": row("adamw", "weights", "steps"), "learning_rate": row(0.2, "weights", "steps"),
    "muon_learning_rate": row(0.2, "weights", "steps"), "weight_decay": row(5.0, "weights", "steps"),
    "lr_schedule": row("constant", "weights", "steps"),
    "warmup_ratio": row(1.0, "weights", "steps"), "max_grad_norm": row(0.01, "weights", "steps"),
    "eval_interval": row(1, "evals", "samples"), "num_eval_texts": row(2, "evals"), "log_interval": row(1, "said"),
    "long_prompts": row("trim", "weights", "steps"), "data_dir": row("{folder}/other", "weights", "steps")}
EFFECTS = {
    "sft": COMMON | TRAINING | {
        "init_from": row("{folder}/sft", "weights", "steps"), "tokenizer": row("gpt2", "weights", "steps"),
        "vocab_size": row(258, "weights", "steps"), "family": row("llama", "weights", "steps"),
        "n_layer": row(2, "weights", "steps"),
        "n_head": row(1, "weights", "steps"), "n_embd": row(4, "weights", "steps"),
        "block_size": row(24, "weights", "steps"), "response_length": row(2, "samples"),
        "last_turn_only": Alone("test_earlier_answers_train_unless_told_otherwise")},
    "rm": COMMON | TRAINING | {
        "init_from": row("{folder}/other_sft", "weights", "steps"), "num_eval_texts": row(8, "evals"),
        "preferences": row("judge", "weights", "steps"), "reference": row("{folder}/other_sft", "weights"),
        "response_length": row(2, "weights"), "num_scale_samples": row(3, "weights")},  # the head's gain and bias
    "ppo": COMMON | {
        "data_dir": row("{folder}/other", "weights", "steps"),
        "init_from": row("{folder}/other_sft", "weights", "steps"),
        "reference": row("{folder}/other_sft", "weights", "steps"),
        "reward_model": row("{folder}/other_rm", "weights", "steps"),
        "reward": row("{folder}/reward.py:length", "weights", "steps"),
        "at_most": Alone("test_a_limit_and_its_rate"), "multiplier_rate": Alone("test_a_limit_and_its_rate"),
        "judge": row("{folder}/reward.py:length", "evals"), "value_init": row("sft", "weights", "steps"),
        "long_prompts": row("trim", "weights", "steps"), "total_episodes": row(12, "weights", "steps"),
        "batch_size": row(8, "weights", "steps"), "response_length": row(4, "weights", "steps"),
        "group_size": row(2, "weights", "steps"), "advantages": Alone("test_advantages_of_several_answers"),
        "temperature": row(0.7, "weights", "steps"), "kl_coef": row(1.0, "weights", "steps"),
        "kl_baseline": row(0.9, "weights", "steps"),
        "adaptive_kl_target": row(1.0, "steps", "rounding"),  # moves kl_coef by 8e-5 of it
        "reward_clip": row(0.1, "weights", "steps"), "missing_eos_penalty": row(0.0, "weights", "steps"),
        "whiten_rewards": row(True, "weights", "steps"), "gamma": row(0.5, "weights", "steps"),
        "lam": row(0.1, "weights", "steps"), "num_ppo_epochs": row(1, "weights", "steps"),
        "num_mini_batches": row(4, "weights", "steps"), "micro_batch_size": row(1, "passes", "rounding"),
        "learning_rate": row(0.01, "weights", "steps"), "value_learning_rate": row(0.01, "weights", "steps"),
        "lr_schedule": row("constant", "weights", "steps"), "max_grad_norm": row(0.01, "weights", "steps"),
        "cliprange": row(0.001, "weights", "steps"), "cliprange_value": row(0.001, "weights", "steps"),
        "vf_coef": row(1e-4, "weights", "steps"), "ent_coef": row(1.0, "weights", "steps"),
        "value_warmup": row(1, "weights", "steps"), "max_update_kl": row(1e-6, "weights", "steps"),
        "max_ref_kl": row(1e-4, "weights", "steps"), "eval_interval": row(1, "evals", "samples"),
        "num_eval_prompts": row(3, "evals"), "save_rollouts": Alone("test_further_files")},
    "dpo": COMMON | {name: effect for name, effect in TRAINING.items() if name not in (
        "dropout", "optimizer", "muon_learning_rate", "weight_decay")} | {
        "init_from": row("{folder}/other_sft", "weights", "steps"), "num_eval_texts": row(8, "evals"),
        "reference": row("{folder}/other_sft", "weights", "steps"), "preferences": row("judge", "weights", "steps"),
        "loss": row("ipo", "weights", "steps"), "beta": row(0.5, "weights", "steps"),
        "label_smoothing": row(0.2, "weights", "steps"), "simpo_gamma": Alone("test_a_margin_of_simpo"),
        "response_length": row(2, "evals"), "num_eval_prompts": row(3, "evals")}}


def look(ended, passes):
    """What a person or another program sees of a run that ended well: {kind: nested values}."""
    assert ended.code == 0, ended
    rows, payload = without_clocks(ended.rows()), ended.payload()
    networks = {k: v for k, v in payload["training"].items() if k in ("model", "value_model")}
    said = ended.said.replace(str(ended.folder), "OUT")
    return {"weights": tensors({"model": payload["model"], **networks}),
            "steps": [{k: v for k, v in m.items() if k != "eval"} for m in rows if "final" not in m],
            "evals": [[m.get("eval"), m.get("final")] for m in rows], "samples": ended.rows("samples.jsonl"),
            "said": re.sub(r"\d+:\d\d|[\d,]+ tokens/s|in [\d.]+ s|memory: .*", "", said).splitlines(),
            "passes": Counter(rows for *_, rows in passes)}


def alike(a, b):
    """The same up to rounding, for nested values."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=2e-6)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=3e-5, abs_tol=2e-6)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


@pytest.fixture(scope="module")
def base(tiny):
    """base(stage) -> what is seen of it with the options of the tiny world, run once."""
    (tiny.folder / "reward.py").write_text("def length(prompts, completions):\n    return [*map(len, completions)]\n")
    found = {}

    def of(stage, passes):
        if stage not in found:
            found[stage] = look(tiny.train(stage), passes)
            passes.clear()
        return found[stage]
    return of


@EVERY
def test_every_option_is_in_the_table(stage):
    """A new option needs a row above, which says what it changes."""
    beside = {"tensorboard", "wandb"}  # tests/test_trackers.py: a run is the same without them
    assert EFFECTS[stage].keys() | beside == {f.name for f in fields(SCRIPTS[stage].Options)}
    alone = [effect.test for effect in EFFECTS[stage].values() if isinstance(effect, Alone)]
    assert all(test in globals() for test in alone)


@pytest.mark.parametrize("stage, name", [(stage, name) for stage in EFFECTS for name, effect in EFFECTS[stage].items()
                                         if not isinstance(effect, Alone)])
def test_an_option_has_its_effect(tiny, base, passes, monkeypatch, stage, name):
    """Trained with the option changed, what the table names differs from the base run, and weights and figures that it
    does not name are the same."""
    value, differs = EFFECTS[stage][name]
    usual = {word[2:].partition("=")[0]: word.partition("=")[2] for word in scratch(stage)}
    assert str(value) != usual.get(name, str(getattr(SCRIPTS[stage].Options, name)))
    before = base(stage, passes)
    if "evals" not in differs:  # saves a quarter of the time
        monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *arguments: None)
    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls: cls({bytes([b]): b for b in range(256)}, "gpt2")))
    after = look(tiny.train(stage, f"--{name}", str(value).format(folder=tiny.folder)), passes)
    found = {kind for kind in before if not alike(before[kind], after[kind])}
    if "rounding" in differs:
        found = found - {"weights"} | {"rounding"}
    assert differs <= found, f"--{name} {value} changes only {sorted(found)}"
    assert found & {"weights", "steps"} <= differs, f"--{name} {value} changes {sorted(found)}"


def test_earlier_answers_train_unless_told_otherwise(tiny, tmp_path):
    """Of " ab", " a" and eos six bytes train, or the last three alone; other records train as always."""
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["x", "ab", "y", "a"])]
    for split in ("train", "val"):
        (tmp_path / f"sft.{split}.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    sizes = ["--vocab_size", "257", "--block_size", "64"]
    runs = [tiny.train("sft", "--data_dir", tmp_path, *sizes, *more) for more in ([], ["--last_turn_only"])]
    assert " 6 of them are trained, 3 of these in earlier answers of conversations; " in runs[0].said
    assert " 3 of them are trained; " in runs[1].said
    assert not equal(runs[0].payload()["model"], runs[1].payload()["model"])
    plain = [tiny.train("sft", *more).payload() for more in ([], ["--last_turn_only"])]
    assert equal(plain[0]["model"], plain[1]["model"])


@EVERY
def test_compile(tiny, monkeypatch, stage):
    """--compile compiles the networks that are trained, stage 3's decode steps too, and says that it takes long."""
    compiled = []
    monkeypatch.setattr(SCRIPTS[stage], "compile_model",
                        lambda model, decode=False: compiled.append((model.head, decode)))
    ended = tiny.train(stage, "--compile")
    assert ended.code == 0 and " --compile: the first steps take minutes" in ended.said
    assert "--compile" not in tiny.train(stage).said
    assert compiled == {"sft": [("lm", False)], "rm": [("scalar", False)],
                        "ppo": [("lm", True), ("scalar", False)], "dpo": [("lm", False)] * 2}[stage]


def test_a_margin_of_simpo(tiny):
    """--simpo_gamma moves SimPO's weights, and the loss of the first step; of the others it is said to be idle."""
    runs = [tiny.train("dpo", "--loss", "simpo", "--beta", beta, "--simpo_gamma", gamma) for beta, gamma in (
        ("2", "0.5"), ("2", "1.5"), ("0.1", "0.5"))]
    losses = [ended.rows()[0]["loss"] for ended in runs]
    assert losses[1] > losses[0] + 0.3 and not equal(*(ended.payload()["model"] for ended in runs[:2]))
    assert ["warning: --beta" in ended.said for ended in runs] == [False, False, True]
    assert "--simpo_gamma has no effect with --loss sigmoid" in tiny.train("dpo", "--simpo_gamma", "1").said
    assert "--label_smoothing has no effect with --loss ipo" in tiny.train(
        "dpo", "--loss", "ipo", "--label_smoothing", "0.1").said


@EVERY
def test_resume_and_overwrite(tiny, stage):
    """What a run leaves is in its folder. A folder with a run is refused; --resume finds it finished and changes no
    weight; --overwrite with another seed gives another one."""
    before = {*tiny.folder.rglob("*")}
    first = tiny.train(stage)
    new = {*tiny.folder.rglob("*")} - before
    assert {p.name for p in new} == {first.folder.name, "ckpt.pt", "config.json", "metrics.jsonl", "samples.jsonl",
                                     *["tokens.jsonl"] * (stage == "ppo")}
    assert all(first.folder in (path, path.parent) for path in new)
    weights = first.payload()["model"]
    again = tiny.train(stage, out=first.folder)
    assert again.code == 2 and "use --resume, --overwrite or another folder" in again.error
    resumed = tiny.train(stage, "--resume", out=first.folder)
    assert resumed.code == 0 and "finished" in resumed.said and equal(first.payload()["model"], weights)
    over = tiny.train(stage, "--overwrite", "--seed", "8", out=first.folder)
    assert over.code == 0 and not equal(over.payload()["model"], weights)


@pytest.fixture(scope="module")
def deep(tiny):
    """-> what starts a stage from models of two blocks: {stage: options}."""
    sft = tiny.train("sft", "--n_layer", "2", "--num_train_epochs", "4", "--learning_rate", "0.05").folder
    rm = tiny.train("rm", "--init_from", sft).folder
    start = ["--init_from", sft]
    return {"sft": ["--n_layer", "2", *start], "rm": start, "dpo": start, "ppo": [*start, "--reward_model", rm]}


@EVERY
def test_a_part_learns(tiny, deep, passes, monkeypatch, stage):
    """--lora_rank, --lora_alpha, --lora_layers and --freeze_layers: each value gives other weights, figures and counts
    of what learns."""
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *arguments: None)
    seen = []
    for options in ("", "--lora_rank 2", "--lora_rank 3", "--lora_rank 2 --lora_alpha 4",
                    "--lora_rank 2 --lora_layers 1", "--freeze_layers 1"):
        found = look(tiny.train(stage, *deep[stage], *options.split()), passes)
        learns = re.search(r"(\S+) of them learn", " ".join(found["said"]))
        seen.append((found["weights"], found["steps"], learns and learns[1]))
    for i, (weights, steps, _) in enumerate(seen):
        assert not any(alike(weights, other) or alike(steps, figures) for other, figures, _ in seen[:i])
    counts = [learns for *_, learns in seen]
    assert counts[0] is None and counts[1] == counts[3] and len({*counts}) == 5


def test_advantages_of_several_answers(tiny, passes, monkeypatch):
    """--advantages: each gives other weights and figures, of the same answers in the first step."""
    monkeypatch.setattr(evaluate.AgainstSFT, "closing_report", lambda *arguments: None)
    seen = [look(tiny.train("ppo", "--group_size", "2", "--advantages", name), passes)
            for name in ("gae", "rloo", "grpo")]
    for i, found in enumerate(seen):
        assert found["steps"][0]["objective/scores"] == seen[0]["steps"][0]["objective/scores"]
        assert not any(alike(found[kind], other[kind]) for other in seen[:i] for kind in ("weights", "steps"))


@EVERY
def test_further_files(tiny, stage):
    """--keep_checkpoints 1 leaves the last step's under its number too, --save_rollouts the answers, and stage 3 some
    of them token by token; nothing else."""
    ended = tiny.train(stage, "--keep_checkpoints", "1", *["--save_rollouts"] * (stage == "ppo"))
    names = {path.name for path in ended.folder.iterdir()} - {"ckpt.pt", "config.json", "metrics.jsonl", "samples.jsonl",
                                                              "ckpt.previous.pt"}
    last = f"ckpt.{ended.payload()['training']['step']:06}.pt"
    assert names == {last} | ({"rollouts.jsonl", "tokens.jsonl"} if stage == "ppo" else set())


def test_a_limit_and_its_rate(tiny, base, passes):
    """In the first step the multiplier is 0; what follows differs with the limit and with the rate."""
    base("ppo", passes)  # which writes the function
    words = ["--reward", f"{tiny.folder}/reward.py:length", "--at_most"]
    first, *others = (tiny.train("ppo", *words, *more) for more in (["1"], ["0"], ["1", "--multiplier_rate", "5"]))
    for other in others:
        steps = [[{k: v for k, v in r.items() if k in ("objective/scores", "objective/multiplier/length")}
                  for r in ended.rows() if "lr" in r] for ended in (first, other)]
        assert steps[0][0] == steps[1][0] and steps[0][1] != steps[1][1]
        assert not equal(first.payload()["model"], other.payload()["model"])


def test_check_is_said_to_be_one(tiny):
    """--check trains nothing and writes nothing; tests/test_check.py has the rest."""
    ended = tiny.train("sft", "--check")
    assert ended.code == 0 and ended.said.endswith("all checks passed\n") and not ended.folder.exists()


# ---- streams of random numbers

# Streams that are asked for more than once on purpose, and why. All others are asked for once a run
FIXED = {
    "prompts": "each step reads on in the permutation of its epoch where the one before it had stopped",
    "samples": "an evaluation of stage 1 draws as the one before, so that what has changed is the model",
    "held-out 0": "the SFT model's answers and each evaluation's, so that a comparison is of models"}
# Streams of the same name in different stages: each stage has rows of its own, so the numbers meet other things
SHARED = {"dropout": "rows of stage 1, rows of stage 2", "order": "rows of stage 1, records of stage 2 and of DPO",
          "policy": "adapters of stage 3 and of DPO", "held-out": "`evaluate` gives the figures that stage 3 gave"}


@pytest.fixture
def asked(monkeypatch):
    """Lists every stream that is asked for: (seed, step, rank, purpose), or the name of a random.Random."""
    found, seed_of, Random = [], runtime.seed_of, random.Random

    def noting(*four):
        found.append(four)
        return seed_of(*four)

    class Noting(Random):
        def __init__(self, name):
            found.append(name)
            super().__init__(name)
    monkeypatch.setattr(runtime, "seed_of", noting)
    monkeypatch.setattr(data.random, "Random", Noting)
    return found


def purpose_of(stream):
    return stream.split()[0] if isinstance(stream, str) else stream[3]


def test_no_two_uses_share_a_stream(tiny, asked):
    """Every stream that the three stages, an evaluation and `sample` ask for: within each of them no stream is asked
    for twice, but for FIXED; the same one in two of them is in SHARED. Numbers of different streams differ."""
    uses = {}
    for stage in SCRIPTS:
        more = ["--num_scale_samples", "130"] if stage == "rm" else []  # in batches of 128
        ended = tiny.train(stage, *DROPOUT[stage], *LONGER[stage], "--eval_interval", "2", *more)
        assert ended.code == 0
        uses[stage] = asked.copy()
        asked.clear()
    prompts = str(tiny.folder / "data" / "prompts.val.jsonl")
    evaluate.main([str(ended.folder), "--baseline", tiny.sft, "--reward_model", tiny.rm, "--prompts", prompts,
                   "--best_of", "1,3", "--device", "cpu"])
    uses["evaluate"] = asked.copy()
    asked.clear()
    sample.main([tiny.sft, "--prompt", "ad", "--n", "130", "--response_length", "3", "--device", "cpu"])
    uses["sample"] = asked.copy()
    times = {use: {purpose_of(stream): n for stream, n in Counter(streams).items() if n > 1}
             for use, streams in uses.items()}
    assert times == {"sft": {"samples": 3}, "rm": {}, "ppo": {"prompts": 3, "held-out 0": 4}, "sample": {},
                     "dpo": {"held-out 0": 4}, "evaluate": {"held-out 0": 2}}  # of the SFT model, two evaluations and the end; of two models
    assert {purpose for found in times.values() for purpose in found} == FIXED.keys()
    meet = Counter(stream for streams in uses.values() for stream in {*streams})
    assert {purpose_of(stream).split()[0] for stream, n in meet.items() if n > 1} == SHARED.keys()
    assert {purpose_of(s) for s in uses["sft"]} == {"order", "init", "dropout", "samples"}
    assert {purpose_of(s) for s in uses["rm"]} == {"order", "reward", "head", "dropout", "scale"}
    assert {purpose_of(s) for s in uses["ppo"]} == {"policy", "value", "prompts", "rollout", "epoch 0", "epoch 1",
                                                    *(f"held-out {draw}" for draw in range(evaluate.BEST_OF))}
    assert {purpose_of(s) for s in uses["dpo"]} == {"order", "policy", "held-out 0"}
    assert {purpose_of(s) for s in uses["evaluate"]} == {f"held-out {draw}" for draw in range(3)}
    assert len({*uses["sample"]}) == len(uses["sample"]) == 3  # 130 completions in batches of 64
    streams = {stream for streams in uses.values() for stream in streams}
    first = [float(torch.rand((), generator=runtime.generator(*s), dtype=torch.double)) if isinstance(s, tuple)
             else random.Random(s).random() for s in streams]
    assert len({*first}) == len(streams) >= 30


@EVERY
def test_a_stream_depends_on_the_run_s_seed_and_step(tiny, asked, stage):
    """With another seed every stream is another one; each training step has its own."""
    found = []
    for seed in ("1", "2"):
        assert tiny.train(stage, "--seed", seed, *DROPOUT[stage], *LONGER[stage]).code == 0
        found.append({*asked})
        asked.clear()
    assert len(found[0]) == len(found[1]) and not found[0] & found[1]
    for purpose, steps in {"ppo": [("rollout", 3), ("epoch 1", 3)], "dpo": []}.get(stage, [("dropout", 6)]):
        assert sorted(s[1] for s in found[0] if s[3] == purpose) == [*range(steps)]


@EVERY
def test_nothing_else_is_random(tiny, stage):
    """What Python's and torch's own generators hold when a run begins changes nothing in it."""
    options = [*DROPOUT[stage], *LONGER[stage], "--eval_interval", "2"]
    payloads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        ended = tiny.train(stage, *options)
        payloads.append((ended.payload(), without_clocks(ended.rows()), ended.rows("samples.jsonl")))
    (one, *first), (other, *second) = payloads
    assert equal(one["model"], other["model"]) and first == second


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_ranks_draw_their_own_numbers(tiny, asked, monkeypatch, stage):
    """Dropout, rollouts and the order of minibatches are a rank's own; initial weights, the reward's scale and held-out
    answers are those of rank 0 everywhere, and so are batches, which ranks share."""
    own, common = [], []
    for rank in (0, 1):
        real = runtime.Run.__init__

        def with_rank(run, options, name):
            real(run, options, name)
            run.rank = rank
        monkeypatch.setattr(runtime.Run, "__init__", with_rank)
        folder = tiny.folder / "out" / f"rank {rank} of {stage}"
        folder.mkdir(parents=True)
        assert tiny.train(stage, *DROPOUT[stage], out=folder).code == 0
        of_ranks = {s for s in asked if purpose_of(s).split()[0] in ("dropout", "rollout", "epoch")}
        own.append(of_ranks), common.append({*asked} - of_ranks)
        assert all(s[2] == rank for s in of_ranks) and all(isinstance(s, str) or s[2] == 0 for s in common[-1])
        asked.clear()
        monkeypatch.setattr(runtime.Run, "__init__", real)
    assert own[0] and not own[0] & own[1] and common[0] == common[1]


def answers(tiny, prompts, draw=0, batch_size=128, seed=3):
    """Texts of the tiny SFT model's held-out answers, by evaluate.answer."""
    model, tokenizer, _ = checkpoint.load(tiny.sft, ["sft"], torch.device("cpu"))
    o = train_ppo.Options(seed=seed, response_length=6)
    run = runtime.Precision(model.wte.weight.device, "float32")
    rows = evaluate.answer(model, model, {}, prompts, tokenizer, o, run, draw, batch_size)
    return [row["completion"] for row in rows]


def test_draws_of_an_evaluation(tiny):
    """One prompt twelve times, in batches of four: answers differ within a batch, between batches and between draws; a
    second evaluation's are the first's; those of the first five prompts do not depend on how many follow."""
    prompts = [[259, 97]] * 12
    tokenizer = checkpoint.load(tiny.sft, ["sft"], "cpu")[1]
    assert tokenizer.eos == 259
    drawn = [answers(tiny, prompts, draw, 4) for draw in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0] != answers(tiny, prompts, 0, 4, seed=4)
    batches = [tuple(drawn[0][at:at + 4]) for at in (0, 4, 8)] + [tuple(drawn[1][at:at + 4]) for at in (0, 4, 8)]
    assert len({*batches}) == 6 and all(len({*batch}) > 1 for batch in batches)
    assert answers(tiny, prompts[:5], 0, 4) == drawn[0][:5]


def test_draws_of_a_rollout(tiny):
    """The same prompt several times in a batch of stage 3 has several answers, and others in the next step."""
    model, tokenizer, _ = checkpoint.load(tiny.sft, ["sft"], torch.device("cpu"))
    o = train_ppo.Options(response_length=6, device="cpu", check=True, out_dir="none")
    run = runtime.Run(o, "ppo")
    prompts = [[tokenizer.eos, 97]]
    drawn = [tuple(map(tuple, train_ppo.roll_out(model, prompts, [0] * 8, tokenizer.eos, step, o, run).responses()))
             for step in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1] and len({*drawn[0]}) > 2 and {*drawn[0]} != {*drawn[1]}


# ---- what is on the disk, and when


@pytest.fixture
def calls(monkeypatch):
    """Every open for writing, write, flush, fsync, rename, link and removal, in order: ("fsync", name). A handle of a
    folder has the folder's name."""
    noted, handles = [], {}
    real = {name: getattr(os, name) for name in ("open", "close", "fsync", "replace", "link", "remove")}

    class File:
        def __init__(self, file, name):
            self.file, self.name = file, name

        def write(self, content):
            if not noted or noted[-1] != ("write", self.name):
                noted.append(("write", self.name))
            return self.file.write(content)

        def flush(self):
            noted.append(("flush", self.name))
            return self.file.flush()

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def open_(path, mode="r", *more, **named):
        file = builtins.open(path, mode, *more, **named)
        if set(mode) & set("wa"):
            handles[file.fileno()] = os.path.basename(path)
            noted.append(("open", os.path.basename(path)))
            return File(file, os.path.basename(path))
        return file

    def os_open(path, *more):
        handle = real["open"](path, *more)
        handles[handle] = os.path.basename(os.path.abspath(path)) + "/"
        return handle

    def fsync(handle):
        noted.append(("fsync", handles[handle]))
        return real["fsync"](handle)

    def two(name):
        def call(*paths):
            noted.append((name, *map(os.path.basename, paths)))
            return real[name](*paths)
        return call
    for module in (runtime, checkpoint):
        monkeypatch.setattr(module, "open", open_, raising=False)
    monkeypatch.setattr(os, "open", os_open)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link", "remove"):
        monkeypatch.setattr(os, name, two(name))
    return noted


def tidy(calls):
    """Without the lock, removals, and flushes after which more is written (torch.save's, before the seal)."""
    events = [e for e in calls if e[0] != "remove" and e[1] != "lock"]
    events = [e for e, then in zip(events, [*events[1:], ("",)]) if e[0] != "flush" or then[0] != "write"]
    return [e for e, before in zip(events, [("",), *events]) if e[0] != "write" or e != before]


def whole(name, folder):
    """A file's way to the disk: under another name first, and the folder that holds the names last."""
    return [("open", f"{name}.tmp"), ("write", f"{name}.tmp"), ("flush", f"{name}.tmp"), ("fsync", f"{name}.tmp"),
            ("replace", f"{name}.tmp", name), ("fsync", f"{folder}/")]


@EVERY
def test_what_is_on_the_disk_when(tiny, calls, stage):
    """config.json whole and its folder synced, before a step is; then lines of the logs; they and their folder are
    synced before the checkpoint is written that counts on them; it is whole before it has its name, the one before it
    keeps a name, and the folder is synced last."""
    ended = tiny.train(stage, "--eval_interval", "2", *LONGER[stage])
    assert ended.code == 0
    name = ended.folder.name
    events = tidy(calls)
    begun = whole("config.json", name) + [("fsync", "out/")]  # the folder itself, whose name its parent holds
    assert events[:len(begun)] == begun
    logged, saves = {"metrics.jsonl", "samples.jsonl", "tokens.jsonl"}, 0
    for at, event in enumerate(events):
        if event == ("open", "ckpt.pt.tmp"):
            save = whole("ckpt.pt", name)
            if saves:
                save[4:4] = [("link", "ckpt.pt", "ckpt.previous.pt.tmp"),
                             ("replace", "ckpt.previous.pt.tmp", "ckpt.previous.pt")]
            assert events[at:at + len(save)] == save
            seen = {e[1] for e in events[:at] if e[0] == "write" and e[1] in logged}
            synced = [e for n in runtime.LOGS if n in seen for e in (("open", n), ("fsync", n))]
            synced.append(("fsync", f"{name}/"))
            assert events[at - len(synced):at] == synced and "metrics.jsonl" in seen
            saves += 1
    assert saves >= 2


def test_logs_that_are_cut_are_whole(tiny, calls, stopping):
    """On resume each log is replaced as a whole, then config.json; the checkpoint is not touched."""
    stopping(2)
    folder = tiny.train("sft").folder
    (folder / "metrics.jsonl").open("a").write('{"step": 3}\n{"st')
    calls.clear()
    assert tiny.train("sft", "--resume", out=folder).code == 0
    events = tidy(calls)
    expected = whole("metrics.jsonl", folder.name) + whole("config.json", folder.name)
    assert events[:len(expected)] == expected
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3]


def test_an_old_run_goes_before_its_checkpoint(tiny, calls):
    """--overwrite removes config.json first and the logs after the checkpoints: a death in between leaves a run or
    nothing, never logs without one that a new run would go on from."""
    folder = tiny.train("sft", "--eval_interval", "2").folder
    calls.clear()
    assert tiny.train("sft", "--overwrite", out=folder).code == 0
    removed = [name for what, *names in calls if what == "remove" for name in names if not name.endswith(".tmp")]
    assert removed == ["config.json", "ckpt.previous.pt", "ckpt.pt", "metrics.jsonl", "samples.jsonl", "lock"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    """Some network file systems refuse it (EINVAL): then there is nothing to be done. A disk that fails is an error."""
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(22, "Invalid argument")))
    runtime.sync_folder(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        runtime.sync_folder(tmp_path)
    assert not before or len(os.listdir("/proc/self/fd")) == before  # the handle was closed


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_max_steps_ends_a_run(tiny, stage):
    """After the steps of all epochs or so many, whichever are fewer; the schedule falls over these, so that a run of
    half an epoch is the same to the last bit. It does not change on resume, nor do epochs make the run longer."""
    steps = [len([row for row in ended.rows() if "lr" in row]) for ended in (
        tiny.train(stage), tiny.train(stage, "--max_steps", "2"), tiny.train(stage, "--max_steps", "99"))]
    assert steps[0] == steps[2] > steps[1] == 2
    half, capped = tiny.train(stage, "--num_train_epochs", str(2 / steps[0])), tiny.train(stage, "--max_steps", "2")
    assert equal(half.payload()["model"], capped.payload()["model"])
    for option, value, words in (("max_steps", "3", "cannot change"), ("num_train_epochs", "2", "ends at --max_steps 2")):
        again = tiny.train(stage, "--resume", f"--{option}", value, out=capped.folder)
        assert again.code == 2 and words in again.error
