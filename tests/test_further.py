"""Training further: a policy that was trained before, a reference of its own, a run that is made longer; schedules,
kept checkpoints, kept rollouts. The three stages run in this process, on models of one layer.

Of each stage there is a run in out/STAGE (four steps), out/short/STAGE (constant rate) and out/long/STAGE (the same for
eight steps, with kept checkpoints, and rollouts in stage 3)."""
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from conftest import ROOT, scratch
from minirlhf import checkpoint, dpo, evaluate, mixture, runtime, sample
from minirlhf.config import RunOptions
from minirlhf.runtime import rate_factor
from test_train_ppo import options, run_of

STAGES = {"sft": train_sft, "rm": train_rm, "ppo": train_ppo}
NOUNS, WORDS = ["cat", "dog", "sun", "sea", "king", "tree"], ["kind", "bright", "warm", "calm", "cold", "rude"]
COMMON = "--data_dir data --device cpu --dtype float32 --batch_size 4 --response_length 6 --eval_interval 2".split()
OWN = {"sft": "--n_layer 1 --n_head 2 --n_embd 8 --vocab_size 270 --block_size 32 --num_train_epochs 1".split(),
       "rm": "--num_scale_samples 8 --num_train_epochs 1 --init_from out/sft".split(),
       "ppo": ("--total_episodes 16 --value_warmup 1 --num_ppo_epochs 1 --num_eval_prompts 4 --learning_rate 3e-3 "
               "--init_from out/sft --reward_model out/rm").split()}
STEPS, TWICE = 4, {"sft": ["--num_train_epochs", "2.0"], "rm": ["--num_train_epochs", "2.0"],
                   "ppo": ["--total_episodes", "32"]}
CONSTANT = {"sft": ["--lr_schedule", "constant"], "rm": ["--lr_schedule", "constant"],
            "ppo": ["--lr_schedule", "constant", "--reward_clip", "0.5"]}
KEEP = {"sft": ["--keep_checkpoints", "2"], "rm": ["--keep_checkpoints", "2"],
        "ppo": ["--keep_checkpoints", "2", "--save_rollouts"]}
CLOCKS = {"eps", "tokens_per_second", "rollout_seconds", "seconds", "elapsed"}
EVERY = pytest.mark.parametrize("stage", STAGES)
EXPECTED = {"linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553, 0.5, 0.146447], "constant": [1, 1, 1, 1]}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """A run takes two signals, which the tests take back; none of them waits for the disk."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small data set and the runs."""
    folder, rng, here = tmp_path_factory.mktemp("further"), random.Random(0), os.getcwd()
    (folder / "data").mkdir()
    for split, n in (("train", 4 * STEPS), ("val", 6)):
        texts = sorted({f"the {rng.choice(NOUNS)} is {rng.choice(WORDS)}." for _ in range(9 * n)})
        rng.shuffle(texts)
        write(folder / "data" / f"sft.{split}.jsonl", [{"prompt": t[:7], "completion": t[7:]} for t in texts[:n]])
        write(folder / "data" / f"preferences.{split}.jsonl",
              [{"prompt": "", "chosen": min(pair), "rejected": max(pair)} for pair in zip(texts, texts[1:])][:n])
        write(folder / "data" / f"prompts.{split}.jsonl", [{"prompt": f"the {noun}"} for noun in NOUNS])
    os.chdir(folder)
    try:
        for stage in STAGES:
            train(stage)
            train(stage, *CONSTANT[stage], out=f"out/short/{stage}")
            train(stage, *CONSTANT[stage], *TWICE[stage], *KEEP[stage], out=f"out/long/{stage}")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(stage, *more, out=None):
    STAGES[stage].main([*scratch(stage), *COMMON, *OWN[stage], *more, "--out_dir", out or f"out/{stage}"])


def load(path):
    return torch.load(path if str(path).endswith(".pt") else f"{path}/ckpt.pt", weights_only=True)


def rows(path, log="metrics"):
    lines = [json.loads(line) for line in open(f"{path}/{log}.jsonl", encoding="utf-8")]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in lines]


def steps_of(path):
    return [row for row in rows(path) if "lr" in row]


def same(a, b):
    """Nested tensors and numbers, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def state(path):
    """What a run has come to: weights, optimizers and what else it trains."""
    payload = load(path)
    return {"model": payload["model"], **{k: v for k, v in payload["training"].items() if k != "data"}}


# ---- schedules

@pytest.mark.parametrize("schedule", EXPECTED)
def test_first_and_last_factor_of_each_schedule(schedule):
    """Four steps without a rise: linear 1 - k/4, cosine (1 + cos(pi k/4)) / 2, constant 1."""
    assert [rate_factor(schedule, step, 4) for step in range(4)] == pytest.approx(EXPECTED[schedule], abs=1e-6)
    assert rate_factor(schedule, 0, 1) == 1  # the only step has the peak


@pytest.mark.parametrize("schedule", EXPECTED)
def test_a_rise_comes_before_each_schedule(schedule):
    """Eight steps, half of them a rise: 1/4, 1/2, 3/4, 1, then the schedule over the other four; a rise over no step
    at all has one, at the peak."""
    assert [rate_factor(schedule, step, 8, 0.5) for step in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, *EXPECTED[schedule]], abs=1e-6)
    assert rate_factor(schedule, 0, 5, 0.0) == 1
    assert [rate_factor(schedule, step, 5, 0.0) for step in range(1, 5)] == pytest.approx(EXPECTED[schedule], abs=1e-6)


@EVERY
def test_each_stage_follows_its_schedule(folder, stage, monkeypatch):
    """All groups of all optimizers, from the first step to the last; where none is named, stages 1 and 2 have a cosine
    and stage 3 a line; what is learned depends on it."""
    peak, ratio, seen, own = load(f"out/{stage}")["options"]["learning_rate"], None if stage == "ppo" else 0.05, [], (
        runtime.set_rate)

    def rates(schedule):
        return [rate_factor(schedule, step, STEPS, ratio) for step in range(STEPS)]

    def spy(optimizers, factor):
        own(optimizers, factor)
        seen.append([group["lr"] / group["peak"] for one in optimizers for group in one.param_groups])
    monkeypatch.setattr(runtime, "set_rate", spy)
    usual, other = ("linear", "cosine") if stage == "ppo" else ("cosine", "linear")
    train(stage, "--lr_schedule", other, out="out/new")
    assert all(factor == pytest.approx(x) for factors, x in zip(seen, rates(other), strict=True) for factor in factors)
    for name, schedule in ((stage, usual), ("new", other), (f"short/{stage}", "constant")):
        assert [row["lr"] for row in steps_of(f"out/{name}")] == pytest.approx([peak * x for x in rates(schedule)])
    assert not same(state("out/new")["optimizers"], state(f"out/{stage}")["optimizers"])


def test_the_value_network_has_a_rate_of_its_own(folder):
    """It falls in the same manner and moves the value network alone: in the value warm-up no answer changes, later ones
    do. 0 is the policy's rate."""
    train("ppo", "--value_learning_rate", "0.01", out="out/new")
    one, other = state("out/ppo"), state("out/new")
    assert [[(g["peak"], g["lr"]) for g in s["param_groups"]] for s in one["optimizers"]] == [[(3e-3, 3e-3 / 4)]] * 2
    assert [g["lr"] for s in other["optimizers"] for g in s["param_groups"]] == pytest.approx([3e-3 / 4, 0.01 / 4])
    scores = [[row["objective/scores"] for row in steps_of(f"out/{name}")] for name in ("ppo", "new")]
    assert scores[0][:2] == scores[1][:2]
    assert not same(one["value_model"], other["value_model"]) and not same(one["model"], other["model"])
    assert load("out/new")["options"]["value_learning_rate"] == 0.01


@pytest.mark.parametrize("loss, idle", [("0", True), ("0.1", False)])
def test_without_a_value_loss_its_rate_is_idle(loss, idle, capsys):
    """A line says so; with a loss there is none."""
    train_ppo.read_options(["--vf_coef", loss, "--value_learning_rate", "0.01"])
    assert ("warning: --value_learning_rate has no effect with --vf_coef 0" in capsys.readouterr().out) == idle


def test_check_holds_with_a_rate_and_a_reference_of_their_own(folder, capsys):
    """At learning rate 0 the value network rests too, and no KL of 0 is asked for where two models differ."""
    with pytest.raises(SystemExit) as stop:
        train("ppo", "--check", "--value_learning_rate", "0.01", "--init_from", "out/ppo", "--reference", "out/sft",
              "--num_mini_batches", "1", out="out/new")
    out = capsys.readouterr().out
    assert "ok    at learning rate 0 KL" in out and "is 0 at the start" not in out and "padding changes" in out
    assert stop.value.code == 0 or "FAIL  eos is reachable" in out and out.count("FAIL") == 1
    assert not os.path.exists("out/new")


# ---- a run that is made longer

@EVERY
def test_a_finished_run_goes_on_for_longer(folder, stage, capsys):
    """With a constant rate, twice as many steps in two parts are those of one run: weights, optimizers, logs. (The last
    step of stage 2 has its figures in the closing report.) Kept checkpoints and rollouts change none of them."""
    assert load(f"out/short/{stage}")["training"]["step"] == STEPS
    STAGES[stage].main(["--resume", *TWICE[stage], "--out_dir", f"out/short/{stage}"])
    out = capsys.readouterr().out
    assert f"resume: {TWICE[stage][0]} {TWICE[stage][1]}" in out and f"goes on from step {STEPS}" in out
    assert same(state(f"out/short/{stage}"), state(f"out/long/{stage}"))
    assert load(f"out/short/{stage}")["training"]["step"] == 2 * STEPS
    for log in ("metrics", "samples"):
        logs = [[{k: v for k, v in row.items() if stage != "rm" or k not in ("eval", "scores")}
                 for row in rows(f"out/{name}/{stage}", log)] for name in ("short", "long")]
        assert logs[0] == logs[1]
    STAGES[stage].main(["--resume", "--out_dir", f"out/short/{stage}"])
    assert "this run is finished (8 steps)" in capsys.readouterr().out


def test_the_warm_up_stays_as_long_as_it_was(capsys):
    """Half of four epochs are two: a quarter of eight, which is what the longer run's options say; named, it is as it
    was named; all of two epochs cannot be more than all of one."""
    was = {"num_train_epochs": 4.0, "warmup_ratio": 0.5, "lr_schedule": "constant"}
    for epochs, given, expected in ((8.0, set(), {"warmup_ratio": 0.25}), (8.0, {"warmup_ratio"}, {}),
                                    (1.0, set(), {"warmup_ratio": 1.0})):
        o = train_sft.Options(num_train_epochs=epochs)
        o.given = given
        assert checkpoint.of_another_length(o, "sft", was, print) == expected
    assert "resume: --warmup_ratio 0.25: the warm-up stays as long as it was" in capsys.readouterr().out
    assert [rate_factor("constant", step, 40, 0.5) for step in range(40)] == [
        rate_factor("constant", step, 80, 0.25) for step in range(40)]


@EVERY
def test_where_the_rate_has_fallen_it_says_how(folder, stage, refused):
    """One line, nothing touched; the command that it ends with runs: from the run's end for the steps that are
    missing."""
    before = {path: path.read_bytes() for path in (folder / "out" / stage).iterdir()}
    name, half = TWICE[stage][0], "8" if stage == "ppo" else "0.5"
    error = refused(STAGES[stage].main, ["--resume", name, half, "--out_dir", f"out/{stage}"])
    assert "learning rate falls to 0; leave the option out or start another run" in error
    error = refused(STAGES[stage].main, ["--resume", *TWICE[stage], "--out_dir", f"out/{stage}/"])
    assert f"{TWICE[stage][0]} {TWICE[stage][1]}: this run had " in error and "learning rate falls to 0" in error
    assert before == {path: path.read_bytes() for path in (folder / "out" / stage).iterdir()}
    words = shlex.split(error[error.index("python ", error.index("learning rate")):])
    assert os.path.samefile(words[1], STAGES[stage].__file__)
    STAGES[stage].main(words[2:])
    done = load(f"out/{stage}-longer")
    assert done["training"]["step"] == 4 and done["options"]["init_from"] == f"out/{stage}/ckpt.pt"
    assert done["options"].get("reference", "out/sft") == "out/sft"


@EVERY
def test_a_run_cannot_become_shorter_than_it_is(folder, stage, refused):
    """Four steps are taken, two are asked for: both numbers are named."""
    name, half = TWICE[stage][0], "8" if stage == "ppo" else "0.5"
    error = refused(STAGES[stage].main, ["--resume", name, half, "--out_dir", f"out/short/{stage}"])
    assert f"{name} {half}: 2 steps, but the run of out/short/{stage}/ckpt.pt has taken 4" in error


@EVERY
def test_a_schedule_cannot_change_on_resume(folder, stage, refused):
    """Steps that were taken would have had other rates."""
    error = refused(STAGES[stage].main, ["--resume", "--lr_schedule", "constant", "--out_dir", f"out/{stage}"])
    assert "--lr_schedule constant: this run had " in error and "which cannot change" in error


def test_an_option_that_an_older_run_did_not_know_has_its_default(folder, refused):
    """What that run did: --resume goes on, and a change is refused as for a run of today."""
    payload = load("out/ppo")
    for name in ("lr_schedule", "reference", "value_learning_rate", "keep_checkpoints", "save_rollouts"):
        del payload["options"][name]
    for group in payload["training"]["optimizers"]:
        del group["param_groups"][0]["peak"]
    torch.save(payload, "out/ppo/ckpt.pt")
    train_ppo.main(["--resume", "--out_dir", "out/ppo"])
    assert "--lr_schedule constant: this run had linear" in refused(
        train_ppo.main, ["--resume", "--lr_schedule", "constant", "--out_dir", "out/ppo"])
    assert "over which its learning rate falls to 0" in refused(
        train_ppo.main, ["--resume", "--total_episodes", "32", "--out_dir", "out/ppo"])


# ---- a policy that was trained before, and its reference

def test_a_policy_is_its_own_reference(folder, capsys):
    """A KL of 0 at first; the lines say so, and nowhere that the model was an SFT model."""
    train("ppo", "--init_from", "out/ppo", "--total_episodes", "8", out="out/new")
    out = capsys.readouterr().out
    assert "from out/ppo; reference of the KL: the same model" in out and "preferred to the reference answer" in out
    assert "KL from reference" in out and "SFT" not in out
    assert steps_of("out/new")[0]["objective/kl_k3"] == 0


def test_a_policy_is_trained_further_with_a_reference_of_its_own(folder, capsys, monkeypatch):
    """The KL is that from the SFT model, whose answers are those compared with; the lines say which. The KL of the
    first step's answers, a second way: both models' log-probabilities of them."""
    batches, own = [], evaluate.save_rollouts
    monkeypatch.setattr(evaluate, "save_rollouts", lambda batch, *a: (batches.append(batch), own(batch, *a)))
    train("ppo", "--init_from", "out/ppo", "--reference", "out/sft", "--total_episodes", "8", "--save_rollouts",
          out="out/new")
    out = capsys.readouterr().out
    assert "from out/ppo; reference of the KL: out/sft" in out and "preferred to the SFT answer" in out
    assert f"{'held-out prompts, 95% intervals: 4':<38}{'reference':>24}{'after':>24}" in out
    befores = [rows(f"out/{name}")[-1]["final"]["before"] for name in ("ppo", "new")]
    assert befores[0] == befores[1]
    policy, sft = (checkpoint.load(f"out/{name}", ["sft", "ppo"], torch.device("cpu"))[0] for name in ("ppo", "sft"))
    for row, ids, n in zip(rows("out/new", "rollouts"), batches[0].tokens.tolist(), batches[0].lengths.tolist()):
        with torch.no_grad():
            logits = [model.hidden(torch.tensor([ids[:n]]))[0] @ model.wte.weight.T for model in (policy, sft)]
        p, q = (x.log_softmax(-1) for x in logits)
        nats = sum(float(p[t, ids[t + 1]] - q[t, ids[t + 1]]) for t in range(n - row["length"] - 1, n - 1))
        assert row["kl"] == pytest.approx(nats, abs=1e-4) and abs(nats) > 1e-3


@pytest.mark.parametrize("given, says", [
    (["--reference", "out/rm"],
     "out/rm/ckpt.pt: holds a reward model, expected an SFT model, a PPO policy or a DPO policy"),
    (["--reference", "nowhere"], "nowhere: no such checkpoint"),
    (["--reference", "out/short_context"], "has a context of 32 tokens, out/short_context one of 24"),
    (["--reference", "out/other_words"], "have different tokenizers"),
    (["--init_from", "out/rm"], "holds a reward model, expected an SFT model, a PPO policy or a DPO policy"),
    (["--reference", "out/long/ppo", "--out_dir", "out/long/ppo", "--overwrite"], "holds --reference out/long/ppo"),
])
def test_what_cannot_be_a_reference(folder, given, says, refused):
    """Another stage's, another context's, another tokenizer's, or what the run would replace; nothing is left."""
    for name in ("short_context", "other_words"):
        (folder / "out" / name).mkdir()
        payload = load("out/sft")
        if name == "short_context":
            payload["config"]["block_size"] = 24
            payload["model"]["wpe.weight"] = payload["model"]["wpe.weight"][:24].clone()
        if name == "other_words":
            payload["tokenizer"]["ranks"][-2:] = payload["tokenizer"]["ranks"][:-3:-1]
        torch.save(payload, f"out/{name}/ckpt.pt")
    before = sorted(folder.rglob("*"))
    assert says in refused(train_ppo.main, [*scratch("ppo"), *COMMON, *OWN["ppo"], "--out_dir", "out/new", *given])
    assert sorted(folder.rglob("*")) == before


def test_resume_compares_the_reference(folder, refused, capsys):
    """Its content is an input of the run: at another path it is taken; changed, left out or added it is refused."""
    train("ppo", "--init_from", "out/ppo", "--reference", "out/sft", "--total_episodes", "8", out="out/new")
    shutil.copytree("out/sft", "out/moved")
    train_ppo.main(["--resume", "--reference", "out/moved/ckpt.pt", "--out_dir", "out/new"])
    assert "resume: --reference out/moved/ckpt.pt: this run had out/sft" in capsys.readouterr().out
    for reference, out, says in (("", "new", "with --reference out/sft"), ("out/sft", "ppo", "without --reference")):
        assert f"began {says}" in refused(
            train_ppo.main, ["--resume", "--reference", reference, "--out_dir", f"out/{out}"])
    shutil.copy("out/short/sft/ckpt.pt", "out/sft/ckpt.pt")
    assert "--resume: --reference out/sft is not what the run of out/new/ckpt.pt began with" in refused(
        train_ppo.main, ["--resume", "--out_dir", "out/new"])


@pytest.mark.parametrize("given, name", [([], "sft"), (["--value_init", "sft"], "sft"),
                                         (["--init_from", "out/ppo", "--reference", "out/sft", "--value_init", "sft"],
                                          "ppo")])
def test_where_the_value_network_starts(folder, monkeypatch, given, name):
    """The reward model; or the trunk of --init_from, the reference notwithstanding."""
    seen = {}

    def stop(policy, value, o):
        seen.update(policy=policy, value=value)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_ppo, "make_optimizers", stop)
    with pytest.raises(KeyboardInterrupt):
        train("ppo", *given, out="out/new")
    trunk = load("out/rm" if "--value_init" not in given else f"out/{name}")["model"]
    assert torch.equal(seen["value"].wte.weight, trunk["wte.weight"])
    assert torch.equal(seen["policy"].wte.weight, load(f"out/{name}")["model"]["wte.weight"])


def test_stage_1_starts_from_a_policy(folder, refused):
    """Its sizes and tokenizer are the policy's, in the options too; another size is refused."""
    train_sft.main([*scratch("sft"), *COMMON, "--init_from=out/ppo", "--num_train_epochs=0.25", "--learning_rate=0",
                    "--muon_learning_rate", "0", "--out_dir", "out/new"])
    new = load("out/new")
    assert new["stage"] == "sft" and same(new["model"], load("out/ppo")["model"])
    for name in train_sft.SIZES:
        assert new["options"][name] == {**load("out/sft")["options"], "vocab_size": new["config"]["vocab_size"]}[name]
    error = refused(train_sft.main, [*scratch("sft"), "--init_from", "out/ppo", "--n_layer", "2", "--out_dir", "out/x"])
    assert "--n_layer 2: out/ppo has 1" in error


def test_stage_2_starts_from_a_policy(folder):
    """Its trunk is the policy's, and so are the answers that set the scale."""
    train("rm", "--init_from", "out/ppo", "--learning_rate", "0", "--muon_learning_rate", "0", "--num_train_epochs",
          "0.25", out="out/new")
    new, policy = load("out/new"), load("out/ppo")
    assert new["stage"] == "rm" and torch.equal(new["model"]["wte.weight"], policy["model"]["wte.weight"])


def test_stage_2_goes_on_from_a_reward_model(folder, capsys, monkeypatch):
    """Trunk and head are those it had, in training without its scale (gain 1, bias 0); the scale is set anew on samples
    of the model that had set it before, which is recorded; a third model finds it through the second. At learning rate
    0 the scores are the same to rounding, for the samples are."""
    begun, own = [], train_rm.batch_gradients
    monkeypatch.setattr(train_rm, "batch_gradients", lambda model, *a: (begun.append(
        {k: v.clone() for k, v in model.state_dict().items()}), own(model, *a))[1])
    still = ["--learning_rate", "0", "--muon_learning_rate", "0", "--num_train_epochs", "0.25"]
    before = load("out/rm")["model"]
    for name, previous in (("second", "rm"), ("third", "second")):
        train("rm", "--init_from", f"out/{previous}", *still, out=f"out/{name}")
        out, new = capsys.readouterr().out, load(f"out/{name}")
        assert f"trunk and head from out/{previous}" in out and "8 samples of out/sft had mean" in out
        assert f"--init_from out/sft --reward_model out/{name}/ckpt.pt" in out
        assert new["options"]["reference"] == "out/sft" and new["training"]["data"].keys() >= {"--reference out/sft"}
        assert all(torch.equal(begun[-1][k], new["model"][k]) for k in before if k not in ("gain", "bias"))
        assert (float(begun[-1]["gain"]), float(begun[-1]["bias"])) == (1, 0)
        assert same({k: v for k, v in before.items() if k not in ("gain", "bias")},
                    {k: v for k, v in new["model"].items() if k not in ("gain", "bias")})
        for name in ("gain", "bias"):
            assert float(new["model"][name]) == pytest.approx(float(before[name]), rel=1e-4)
    train("rm", "--init_from", "out/rm", "--reference", "out/ppo", *still, out="out/other")
    assert "8 samples of out/ppo had mean" in capsys.readouterr().out
    assert float(load("out/other")["model"]["gain"]) != pytest.approx(float(before["gain"]), rel=1e-4)


def test_a_reward_model_goes_on_and_is_resumed(folder, monkeypatch):
    """Stopped after two of four steps and resumed, it is the run that never stopped, also where the reference was found
    by itself."""
    train("rm", "--init_from", "out/rm", out="out/whole")
    own = runtime.Run.should_stop
    monkeypatch.setattr(runtime.Run, "should_stop", lambda run: (folder / "out/parts/metrics.jsonl").exists())
    with pytest.raises(SystemExit):
        train("rm", "--init_from", "out/rm", out="out/parts")
    monkeypatch.setattr(runtime.Run, "should_stop", own)
    assert load("out/parts")["training"]["step"] == 2
    train_rm.main(["--resume", "--out_dir", "out/parts"])
    assert same(state("out/whole"), state("out/parts")) and rows("out/whole") == rows("out/parts")
    assert not same(load("out/whole")["model"], load("out/rm")["model"])


@pytest.mark.parametrize("given, says", [
    ([], "names the SFT model"), (["--reference", "out/rm"], "expected an SFT model, a PPO policy or a DPO policy"),
    (["--reference", "out/small"], "different tokenizers"),
    (["--out_dir", "out/sft", "--overwrite"], "--out_dir out/sft: holds --reference out/sft")])
def test_what_cannot_set_the_scale(folder, given, says, refused):
    """No model, a reward model, one of another tokenizer, one that the run would replace: a line that says so."""
    if not given:
        shutil.move("out/sft", "out/moved")
        says = "--init_from out/rm: a reward model; name the SFT model whose samples set the scale of its scores with"
    if "out/small" in given:
        train("sft", "--vocab_size", "265", out="out/small")
    before = sorted(folder.rglob("*"))
    assert says in refused(train_rm.main, [*scratch("rm"), *COMMON, *OWN["rm"], "--out_dir", "out/new", "--init_from",
                                           "out/rm", *given])
    assert sorted(folder.rglob("*")) == before


# ---- preferences of several sets

def test_several_sets_are_one_joined_file(folder, capsys):
    """Two names, or a name and a path, make the model that the one file of both makes: records in the order of the
    names, each set's held-out records, and the same for --resume; figures come by set. Other records, or another order,
    make another model."""
    lines = {part: open(f"data/preferences.{part}.jsonl").readlines() for part in ("train", "val")}
    for part, n in (("train", 10), ("val", 3)):
        for name, some in (("old", lines[part][:n]), ("new", lines[part][n:])):
            with open(f"data/{name}.{part}.jsonl", "w") as f:
                f.writelines(some)
    for k, names in enumerate((("old", "new"), ("./data/old", "data/new.train.jsonl"), ("new", "old"), ("old",))):
        train("rm", *(word for name in names for word in ("--preferences", name)), out=f"out/{k}")
        out = capsys.readouterr().out
        assert ("\nnew  " in out) == (k in (0, 2)) and ("\ndata/new.train.jsonl  " in out) == (k == 1)
        assert f"{10 if k == 3 else 16} records with" in out and f"from {'./' * (k == 1)}data/{names[0][-3:]}" in out
    models = [load(f"out/{k}")["model"] for k in range(4)]
    assert same(models[0], load("out/rm")["model"]) and same(models[0], models[1])
    assert not same(models[0], models[2]) and not same(models[0], models[3])
    assert load("out/0")["options"]["preferences"] == ("old", "new")
    assert json.load(open("out/0/config.json"))["preferences"] == ["old", "new"]
    train_rm.main(["--resume", "--out_dir", "out/0"])
    assert "this run is finished" in capsys.readouterr().out


def test_dpo_learns_from_several_sets_too(folder):
    """Two halves make the policy that the whole makes."""
    lines, words = open("data/preferences.train.jsonl").readlines(), [
        *scratch("dpo"), *COMMON, "--init_from", "out/sft", "--num_eval_prompts", "2", "--max_steps", "2"]
    for name, some in (("old", lines[:7]), ("new", lines[7:])):
        with open(f"{name}.train.jsonl", "w") as f:
            f.writelines(some)
        shutil.copy("data/preferences.val.jsonl", f"{name}.val.jsonl")
    dpo.main([*words, "--out_dir", "out/whole"])
    dpo.main([*words, "--preferences", "./old", "--preferences", "new.train.jsonl", "--out_dir", "out/halves"])
    assert same(load("out/whole")["model"], load("out/halves")["model"])
    assert load("out/halves")["options"]["preferences"] == ("./old", "new.train.jsonl")


def test_resume_knows_the_sets_by_their_content(folder, refused, capsys):
    """A run of one name, as older versions kept it, goes on; a changed second set is refused."""
    payload = load("out/rm")
    assert payload["options"]["preferences"] == ("preferences",)
    payload["options"]["preferences"] = "preferences"
    torch.save(payload, "out/rm/ckpt.pt")
    train_rm.main(["--resume", "--out_dir", "out/rm"])
    assert "this run is finished (4 steps)" in capsys.readouterr().out
    for part in ("train", "val"):
        shutil.copy(f"data/preferences.{part}.jsonl", f"data/more.{part}.jsonl")
    train("rm", "--preferences", "preferences", "--preferences", "more", out="out/new")
    for part in ("train", "val"):
        whole = open(f"data/more.{part}.jsonl").read()
        for content, changed in ((whole + '{"prompt": "", "chosen": "a", "rejected": "b"}\n', True), (whole, False)):
            with open(f"data/more.{part}.jsonl", "w") as f:
                f.write(content)
            if changed:
                assert "--resume: data/preferences.*.jsonl, data/more.*.jsonl is not what the run" in refused(
                    train_rm.main, ["--resume", "--out_dir", "out/new"])


# ---- kept checkpoints

def kept(path):
    return sorted(name for name in os.listdir(path) if name.startswith("ckpt.0"))


@EVERY
def test_the_latest_checkpoints_are_kept(folder, stage):
    """A save every second step: --keep_checkpoints 2 of eight steps leaves 6 and 8, which are the run's at these steps;
    without it there are none."""
    out = f"out/long/{stage}"
    assert kept(out) == ["ckpt.000006.pt", "ckpt.000008.pt"] and kept(f"out/short/{stage}") == []
    assert same(load(f"{out}/ckpt.000008.pt"), load(out)) and not list(folder.glob("out/*/*.tmp"))
    assert load(f"{out}/ckpt.000006.pt")["training"]["step"] == 6
    assert load(out)["options"]["keep_checkpoints"] == 2


def test_a_kept_policy_is_a_model_like_any(folder, capsys):
    """It starts a run, is a reference, is sampled from and evaluated."""
    early = "out/long/ppo/ckpt.000006.pt"
    train("ppo", "--init_from", early, "--reference", early, "--total_episodes", "8", out="out/new")
    sample.main([early, "--prompt", "the cat", "--response_length", "4", "--device", "cpu"])
    capsys.readouterr()
    for baseline, name in (("out/sft", "SFT"), (early, "baseline")):
        evaluate.main([early, "--baseline", baseline, "--reward_model", "out/rm", "--prompts", "data/prompts.val.jsonl",
                       "--device", "cpu"])
        out = capsys.readouterr().out
        assert f"verdict on {early}" in out and f"KL from {name}, nats" in out and f"to the {name} answer" in out


def test_going_back_removes_what_is_later(folder):
    """The last checkpoint is damaged, the one before it counts: later ones go, and come again; so does what a killed
    save left, and nothing that is not the run's."""
    out = folder / "out/long/ppo"
    (out / "ckpt.pt").unlink()  # a second name of the kept one: to write into it would damage both
    (out / "ckpt.pt").write_bytes(b"damaged")
    (out / "ckpt.000010.pt.tmp").write_bytes(b"of a save that was killed")
    (out / "ckpt.5.pt").write_bytes(b"somebody's")
    seen, own = [], train_ppo.roll_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "roll_out", lambda *a: (seen.append(kept(out)), own(*a))[1])
        train_ppo.main(["--resume", "--out_dir", "out/long/ppo"])
    assert seen == [["ckpt.000006.pt"]] * 2 and kept(out) == ["ckpt.000006.pt", "ckpt.000008.pt"]
    assert (out / "ckpt.5.pt").exists()


class Saves:
    """A run that only saves, every second step up to the sixth, and keeps two."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.tokenizer = types.SimpleNamespace(state=lambda: {"name": "bpe", "ranks": []})

    def go(self, **how):
        o = train_ppo.Options(out_dir=str(self.folder), device="cpu", keep_checkpoints=2, **how)
        with runtime.Run(o, "ppo") as run:
            done = load(self.folder)["training"]["step"] if o.resume else 0
            training = checkpoint.Training(run, self.tokenizer, self.model, [], {})
            run.start_logs(done)
            for step in range(done + 2, 7, 2):
                for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
                    run.write(name, {"step": step})
                training.save(step, {"step": step})


@pytest.fixture
def saves(tmp_path, make_model):
    return Saves(tmp_path / "out", make_model("lm", n_layer=1))


@pytest.mark.parametrize("function", ["link", "replace", "remove"])
def test_kept_checkpoints_after_a_kill(saves, function, monkeypatch):
    """Killed before any one linking, renaming or removal of its saves and resumed: the files are those of a run
    that was not killed, none is half made, none is later than the checkpoint that the run went back to."""
    own = getattr(os, function)
    for nth in range(100):
        shutil.rmtree(saves.folder, ignore_errors=True)
        calls = []

        def die(*arguments, **named):
            if not str(arguments[0]).endswith("lock"):  # whose end this process would not survive as another does
                calls.append(arguments)
                if len(calls) == nth + 1:
                    raise KeyboardInterrupt
            return own(*arguments, **named)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, die)
            try:
                saves.go()
            except KeyboardInterrupt:
                pass
        if len(calls) <= nth:
            break
        for path in saves.folder.glob("ckpt.*.pt"):
            checkpoint.check_whole(path)
        saves.go(resume=True) if (saves.folder / "ckpt.pt").exists() else saves.go(overwrite=True)
        assert kept(saves.folder) == ["ckpt.000004.pt", "ckpt.000006.pt"] and not list(saves.folder.glob("*.tmp"))
        assert [load(saves.folder / name)["info"]["step"] for name in kept(saves.folder)] == [4, 6]
    assert nth >= 5


def test_overwrite_removes_kept_checkpoints(saves, refused):
    """They are the run's, also where nothing else of it is left."""
    saves.go()
    for path in saves.folder.iterdir():
        if path.name != "ckpt.000004.pt":
            path.unlink()
    assert "holds a run (ckpt.000004.pt)" in refused(saves.go)
    with runtime.Run(train_ppo.Options(out_dir=str(saves.folder), device="cpu", overwrite=True), "ppo") as run:
        run.start_logs(0)
        assert kept(saves.folder) == []


def test_the_numbers_of_kept_checkpoints(tmp_path):
    """Six digits or more, by step and not by name; other files are not the run's."""
    for name in ("ckpt.999999.pt", "ckpt.1000000.pt", "ckpt.000002.pt", "ckpt.pt", "ckpt.old.pt", "ckpt.000003.pt.tmp",
                 "ckpt.5.pt", "ckpt.000004.x.pt"):
        (tmp_path / name).touch()
    assert [*runtime.Run.numbered(types.SimpleNamespace(out_dir=tmp_path)).items()] == [
        (2, "ckpt.000002.pt"), (999999, "ckpt.999999.pt"), (1000000, "ckpt.1000000.pt")]


def no_links(*_):
    raise OSError("not supported")


def test_where_there_are_no_second_names_they_are_copies(saves, monkeypatch):
    """A file system without links: the same files, each by itself, on the disk before it bears its name."""
    synced, replace = set(), os.replace

    def renamed(old, new):
        assert os.stat(old).st_ino in synced and os.path.basename(old) != "ckpt.pt"  # which is never without its name
        replace(old, new)

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "replace", renamed)
    saves.go()
    assert kept(saves.folder) == ["ckpt.000004.pt", "ckpt.000006.pt"]
    assert (saves.folder / "ckpt.000006.pt").read_bytes() == (saves.folder / "ckpt.pt").read_bytes()
    assert os.stat(saves.folder / "ckpt.pt").st_nlink == 1 and (saves.folder / "ckpt.previous.pt").exists()


def test_a_copy_for_which_there_is_no_room_leaves_what_was_there(saves, monkeypatch):
    """One line with the path, exit status 1, nothing half made; with room it goes on."""
    copy, calls, there = shutil.copyfileobj, [], []

    def full(source, target, *more):
        calls.append(os.path.basename(target.name))
        if calls.count(name) == nth:
            there.append({path for path in os.listdir(saves.folder) if not path.endswith(".tmp") and path != "lock"})
            raise OSError(28, "No space left on device")
        copy(source, target, *more)
    monkeypatch.setattr(os, "link", no_links)
    for name, nth in (("ckpt.000002.pt.tmp", 1), ("ckpt.previous.pt.tmp", 2)):  # of the first save, of the third
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="ckpt.pt: could not .*No space left"):
            patch.setattr(shutil, "copyfileobj", full)
            saves.go(overwrite=bool(there))
        assert {*os.listdir(saves.folder)} == there[-1]
    assert there[0] & {"ckpt.pt", "ckpt.previous.pt"} == set() and len(there) == 2
    assert {"ckpt.pt", "ckpt.previous.pt", "ckpt.000002.pt", "ckpt.000004.pt"} <= there[1]
    saves.go(overwrite=True)
    assert kept(saves.folder) == ["ckpt.000004.pt", "ckpt.000006.pt"]


def test_all_logs_are_on_the_disk_before_a_checkpoint(saves, monkeypatch):
    """Every save is preceded by an fsync of each of the three."""
    events, own, save = [], {}, checkpoint.save

    def named(number):
        own.update({os.stat(path).st_ino: path.name for path in saves.folder.iterdir()})
        events.append(own.get(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (events.append("save"), save(*a, **k))[1])
    saves.go()
    places = [n for n, event in enumerate(events) if event == "save"]
    assert len(places) == 3
    for at, before in zip(places, [0, *places]):
        assert {"metrics.jsonl", "samples.jsonl", "rollouts.jsonl"} <= {*events[before:at]}


# ---- kept rollouts

def test_every_training_answer_is_kept(folder):
    """A line each, whose means are the step's figures; rewards are scores within the clip of 0.5, less the penalty of 1
    where an answer did not end. Without the option there is no such file."""
    found = rows("out/long/ppo", "rollouts")
    assert [row["step"] for row in found] == [step for step in range(1, 9) for _ in range(4)]
    assert list(found[0]) == ["step", "prompt", "completion", "score", "reward", "kl", "length", "finished"]
    for step in steps_of("out/long/ppo"):
        own = [row for row in found if row["step"] == step["step"]]
        for name, key in (("score", "objective/scores"), ("kl", "objective/kl"), ("finished", "completions/eos_rate"),
                          ("length", "completions/mean_length")):
            assert sum(row[name] for row in own) / 4 == pytest.approx(step[key], abs=1e-5)
        assert all(row["prompt"] in [f"the {noun}" for noun in NOUNS] for row in own)
    for row in found:
        assert row["reward"] == pytest.approx(min(0.5, max(-0.5, row["score"])) - (not row["finished"]))
        assert 1 <= row["length"] <= 6 and isinstance(row["finished"], bool)
    assert any(abs(row["score"]) > 0.5 for row in found) and len({row["completion"] for row in found}) > 4
    assert not os.path.exists("out/short/ppo/rollouts.jsonl")


def test_kept_rollouts_belong_to_the_run(folder):
    """Stopped, torn and resumed: no line twice, none lost, the option survives; --overwrite removes them."""
    own, calls = train_ppo.credit, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt  # in the fourth step; the last checkpoint is of the second
        return own(*arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ppo, "credit", stop)
        train("ppo", *CONSTANT["ppo"], *TWICE["ppo"], *KEEP["ppo"], out="out/new")
    assert len(rows("out/new", "rollouts")) == 12
    with open("out/new/rollouts.jsonl", "a") as f:
        f.write('{"step": 4, "prompt": "the c')
    train_ppo.main(["--resume", "--out_dir", "out/new"])
    assert rows("out/new", "rollouts") == rows("out/long/ppo", "rollouts")
    with runtime.Run(train_ppo.Options(out_dir="out/new", device="cpu", overwrite=True), "ppo") as run:
        run.start_logs(0)
    assert not os.path.exists("out/new/rollouts.jsonl")


def test_rows_of_all_ranks_come_together(monkeypatch):
    """The first rank has them all, in the order of ranks; the others write nothing."""
    run = types.SimpleNamespace(world=2, main=True)

    def gather(own, parts):
        if parts is not None:
            parts[:] = [own, ["b", "c"]]
    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    assert runtime.Run.gather(run, ["a"]) == ["a", "b", "c"]
    run.main = False
    assert runtime.Run.gather(run, ["b", "c"]) == []
    assert runtime.Run.gather(types.SimpleNamespace(world=1, main=True), ["a"]) == ["a"]


@pytest.mark.slow
def test_two_ranks_keep_all_answers(folder):
    """Under torchrun each step has the answers of both, whose means are the figures over all ranks."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train_ppo.py"),
                    *scratch("ppo"), *COMMON, *OWN["ppo"], "--save_rollouts", "--keep_checkpoints", "1",
                    "--out_dir", "out/new"],
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=170)
    found = rows("out/new", "rollouts")
    assert [row["step"] for row in found] == [step for step in range(1, 5) for _ in range(4)]
    for step in steps_of("out/new"):
        own = [row for row in found if row["step"] == step["step"]]
        assert sum(row["score"] for row in own) / 4 == pytest.approx(step["objective/scores"], abs=1e-5)
        assert sum(row["kl"] for row in own) / 4 == pytest.approx(step["objective/kl"], abs=1e-5)
    assert kept("out/new") == ["ckpt.000004.pt"]


# ---- advantages that say nothing

def test_samples_in_a_context_shorter_than_an_answer(folder, capsys):
    """A context of 10 does not hold the 48 tokens that an answer may have by default: prompts take at most a half of
    it, answers the rest."""
    write(folder / "data" / "prompts.val.jsonl", [{"prompt": "the cat is " * 4}])
    train_sft.main([*scratch("sft"), *COMMON[:8], *OWN["sft"][:8], "--block_size", "10", "--long_prompts", "trim",
                    "--num_train_epochs", "0.3", "--out_dir", "out/new"])
    _, tokenizer, _ = checkpoint.load("out/new", ["sft"], "cpu")
    assert {len(tokenizer.encode_prompt(row["prompt"])) for row in rows("out/new", "samples")} == {5}


def test_the_guard_names_what_the_kl_is_from(folder, capsys):
    """A policy as the reference is no SFT model, in warnings and in the error."""
    with pytest.raises(SystemExit, match="third batch in a row the KL from the reference model is"):
        train("ppo", "--reference", "out/long/ppo", "--max_ref_kl", "1e-6", "--kl_coef", "0", "--value_warmup", "0",
              out="out/new")
    assert "warning: the KL from the reference model is" in capsys.readouterr().out


@pytest.mark.parametrize("changes, white, words", [
    ({}, 1.0, None), ({}, 0.02, None),
    ({}, 0.0, "what moved the policy is the entropy bonus (--ent_coef 0.0245), what is left of earlier gradients"),
    ({"ent_coef": 0.0}, 0.0, "what moved the policy is what is left of earlier gradients in the optimizer; a larger"),
    ({"value_warmup": 7}, 0.0, None),  # the policy rests in step 7
    ({"value_warmup": 6}, 0.0, "the entropy bonus"),
])
def test_advantages_that_do_not_differ_are_told(changes, white, words):
    """With what moved the policy instead; not while it rests."""
    record = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": 0.05, "completions/mean_length": 10.0,
              "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9}
    o = replace(options(ent_coef=0.0245), **changes)
    found = dict(evaluate.concerns(record, 1.0, {"mean_length": 10.0, "ref_logprob_per_token": -4.0}, o, white))
    assert set(found) == ({"advantages"} if words else set())
    assert not words or "the advantages of step 7 do not differ" in found["advantages"] and words in found["advantages"]


@pytest.mark.parametrize("changes, moves", [
    ({}, "is the KL penalty, the value network's errors, the entropy bonus (--ent_coef 0.0245)"),
    ({"ent_coef": 0.0}, "is the KL penalty, the value network's errors"),
    ({"kl_coef": 0.0}, "is the value network's errors, the entropy bonus (--ent_coef 0.0245)")])
def test_equal_scores_say_what_moves_the_policy(changes, moves):
    """All that is left of what does, and nothing that is off."""
    o = replace(options(ent_coef=0.0245, kl_coef=0.05), **changes)
    record = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": o.kl_coef, "completions/mean_length": 10.0,
              "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9}
    found = dict(evaluate.concerns(record, 0.0, {"mean_length": 10.0, "ref_logprob_per_token": -4.0}, o))
    assert found["variance"].endswith(f"there is nothing to learn from; what moves the policy {moves}")


@pytest.mark.parametrize("scores, told", [([2.0, 2.0, 2.0], True), ([2.0, 2.0, 2.5], False), ([1e3, 1e3, 1e3], True)])
def test_equal_advantages_are_found_by_what_whitening_leaves(scores, told):
    """Three answers of one token whose advantages are their scores: alike, they leave nothing; rounding of large ones
    counts for nothing. A padding's advantage is not read."""
    batch = train_ppo.Batch(
        torch.tensor([[1, 2, 0], [1, 3, 0], [1, 4, 0]]), torch.ones(3, dtype=torch.long),
        torch.full((3,), 2), torch.ones(3, dtype=torch.bool), torch.zeros(3, 2))
    batch.scores, batch.logprobs, batch.values = torch.tensor(scores), torch.zeros(3, 2), torch.zeros(3, 2)
    batch.ref_logprobs = torch.zeros(3, 2)
    o = options()
    run = run_of(o)
    train_ppo.credit(batch, 0.05, o, run)
    batch.advantages[:, 1] = 9.0
    record = {"step": 7, "objective/scores": 0.5, "objective/kl_coef": 0.05, "completions/mean_length": 1.0,
              "policy/entropy_avg": 4.0, "completions/eos_rate": 0.9}
    against = types.SimpleNamespace(run=run, scorers={"score": mixture.Reward([], [], named=False)}, o=o,
                                    warned={"variance"}, ref_name="SFT",
                                    sft={"mean_length": 1.0, "ref_logprob_per_token": -4.0})
    said = [*evaluate.AgainstSFT.warnings(against, batch, record)]
    assert len(said) == told and all("the advantages of step 7 do not differ" in line for line in said)
    assert [*evaluate.AgainstSFT.warnings(against, batch, record)] == []  # once a run


@pytest.mark.parametrize("bonus, moved", [("0.0245", "is the entropy bonus (--ent_coef 0.0245), what is left"),
                                          ("0", "is what is left of earlier gradients in the optimizer")])
def test_one_decision_is_told(folder, bonus, moved, capsys):
    """A batch of one answer of one token: a line, once, and what moved the policy, which without the bonus is
    nothing."""
    train("ppo", "--batch_size", "1", "--num_mini_batches", "1", "--response_length", "1", "--total_episodes", "3",
          "--num_eval_prompts", "1", "--eval_interval", "9",
          "--ent_coef", bonus, out="out/new")
    out = capsys.readouterr().out
    assert out.count("do not differ, so that whitened they are 0") == 1 and moved in out
    assert same(load("out/new")["model"], load("out/sft")["model"]) == (bonus == "0")


def test_every_stage_has_the_options(capsys):
    """--help shows them with their choices and meanings."""
    for stage, module in STAGES.items():
        with pytest.raises(SystemExit):
            module.main(["--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert "--lr_schedule {linear,cosine,constant}" in out and "--keep_checkpoints INT" in out
        assert ("--reference STR" in out) == (stage != "sft") and ("--save_rollouts" in out) == (stage == "ppo")
    assert RunOptions.keep_checkpoints == 0
