"""Training further: a policy that was trained before, a reference of its own, a run that is made longer; schedules, kept
checkpoints, kept rollouts. The three stages run in this process, on models of one layer."""
import json
import os
import random
import shlex
import shutil
import signal
import types
from dataclasses import replace

import pytest
import torch

import train_ppo
import train_rm
import train_sft
from minirlhf import checkpoint, evaluate, runtime, sample
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
STEPS, TWICE = 4, {"sft": ["--num_train_epochs", "2"], "rm": ["--num_train_epochs", "2"],
                   "ppo": ["--total_episodes", "32"]}
CLOCKS = {"eps", "tokens_per_second", "rollout_seconds", "seconds"}
EVERY = pytest.mark.parametrize("stage", STAGES)
EXPECTED = {"linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553, 0.5, 0.146447], "constant": [1, 1, 1, 1]}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


@pytest.fixture(autouse=True)
def signals():
    """A run takes two signals; the tests take them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small data set and all three stages run on it, four steps each."""
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
    STAGES[stage].main([*COMMON, *OWN[stage], *more, "--out_dir", out or f"out/{stage}"])


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
@pytest.mark.parametrize("schedule", EXPECTED)
def test_each_stage_follows_its_schedule(folder, stage, schedule):
    """All groups of all optimizers, from the first step to the last, and what is learned depends on it; stages 1 and 2
    have a cosine and stage 3 a line where none is named."""
    seen, before = [], runtime.set_rate

    def spy(optimizers, factor):
        before(optimizers, factor)
        seen.append([group["lr"] / group["peak"] for one in optimizers for group in one.param_groups])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "set_rate", spy)
        train(stage, "--lr_schedule", schedule, out="out/new")
    ratio = None if stage == "ppo" else 0.05
    expected = [rate_factor(schedule, step, STEPS, ratio) for step in range(STEPS)]
    assert [set(map(lambda x: round(x, 9), factors)) for factors in seen] == [{round(x, 9)} for x in expected]
    peak = load("out/new")["options"]["learning_rate"]
    assert [row["lr"] for row in steps_of("out/new")] == pytest.approx([peak * x for x in expected])
    usual = {"sft": "cosine", "rm": "cosine", "ppo": "linear"}[stage]
    assert same(state("out/new")["optimizers"], state(f"out/{stage}")["optimizers"]) == (schedule == usual)


def test_the_value_network_has_a_rate_of_its_own(folder):
    """It moves its weights alone: the policy of the first step that it learns from is the same, later ones see other
    values; 0 is the policy's rate; it falls in the same manner and is kept on resume; without a value loss it is
    idle."""
    train("ppo", "--value_learning_rate", "0.01", out="out/other")
    a, b = state("out/ppo"), state("out/other")
    assert [[g["peak"] for g in s["param_groups"]] for s in b["optimizers"]] == [[3e-3], [0.01]]
    assert b["optimizers"][1]["param_groups"][0]["lr"] == pytest.approx(0.01 / 4)
    assert not same(a["value_model"], b["value_model"])
    train("ppo", "--value_learning_rate", "0.003", out="out/named")
    assert same(a, state("out/named"))
    train("ppo", "--total_episodes", "8", "--value_warmup", "0", "--num_mini_batches", "1", out="out/one")
    train("ppo", "--total_episodes", "8", "--value_warmup", "0", "--num_mini_batches", "1", "--value_learning_rate",
          "0.01", out="out/two")
    first = [steps_of(f"out/{name}")[0] for name in ("one", "two")]
    assert first[0] == first[1]


def test_without_a_value_loss_its_rate_is_idle(folder, capsys):
    """A line says so; with a loss there is none."""
    train("ppo", "--vf_coef", "0", "--value_learning_rate", "0.01", out="out/idle")
    assert "warning: --value_learning_rate has no effect with --vf_coef 0" in capsys.readouterr().out
    train("ppo", "--value_learning_rate", "0.01", out="out/busy")
    assert "no effect" not in capsys.readouterr().out


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
    """With a constant rate, twice as many steps in two parts are those of one run: weights, optimizers, logs."""
    constant = ["--lr_schedule", "constant", *(["--warmup_ratio", "0"] if stage != "ppo" else [])]
    train(stage, *constant, *TWICE[stage], out="out/straight")
    train(stage, *constant, out="out/parts")
    assert load("out/parts")["training"]["step"] == STEPS
    capsys.readouterr()
    STAGES[stage].main(["--resume", *TWICE[stage], "--out_dir", "out/parts"])
    out = capsys.readouterr().out
    assert f"resume: {TWICE[stage][0]} {TWICE[stage][1]}" in out and f"goes on from step {STEPS}" in out
    assert same(state("out/straight"), state("out/parts"))
    assert load("out/parts")["training"]["step"] == 2 * STEPS
    logs = [[{k: v for k, v in row.items() if k != "eval"} for row in rows(f"out/{name}")]
            for name in ("straight", "parts")]
    assert logs[0] == logs[1]
    if stage != "rm":  # whose last step has its figures in the closing report
        assert rows("out/straight") == rows("out/parts")
        assert rows("out/straight", "samples") == rows("out/parts", "samples")
    STAGES[stage].main(["--resume", "--out_dir", "out/parts"])
    assert "this run is finished (8 steps)" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_warm_up_stays_as_long_as_it_was(folder, stage, capsys):
    """Half of four steps are two: of eight steps a quarter, which is what the longer run's options say."""
    constant = ["--lr_schedule", "constant", "--warmup_ratio"]
    train(stage, *constant, "0.25", *TWICE[stage], out="out/straight")
    train(stage, *constant, "0.5", out="out/parts")
    STAGES[stage].main(["--resume", *TWICE[stage], "--out_dir", "out/parts"])
    assert "resume: --warmup_ratio 0.25: the warm-up stays as long as it was" in capsys.readouterr().out
    assert same(state("out/straight"), state("out/parts"))
    assert load("out/parts")["options"]["warmup_ratio"] == 0.25


@EVERY
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_where_the_rate_has_fallen_it_says_how(folder, stage, schedule, refused):
    """One line, nothing touched; the command that it ends with runs."""
    train(stage, "--lr_schedule", schedule, out="out/new")
    before = {path: path.read_bytes() for path in (folder / "out" / "new").iterdir()}
    error = refused(STAGES[stage].main, ["--resume", *TWICE[stage], "--out_dir", "out/new"])
    assert f"{TWICE[stage][0]} {TWICE[stage][1]}: this run had " in error and "learning rate falls to 0" in error
    assert before == {path: path.read_bytes() for path in (folder / "out" / "new").iterdir()}
    words = shlex.split(error[error.index("python train_"):])
    assert words[1] == f"train_{stage}.py"
    STAGES[stage].main(words[2:])
    done = load("out/new-longer")
    if stage == "rm":  # from the start, with as many steps as were asked for
        assert done["training"]["step"] == 2 * STEPS and done["options"]["init_from"] == "out/sft"
    else:  # the steps that were missing
        assert done["training"]["step"] == STEPS and done["options"]["init_from"] == "out/new/ckpt.pt"
    if stage == "ppo":
        assert done["options"]["reference"] == "out/sft"


@EVERY
def test_a_run_cannot_become_shorter_than_it_is(folder, stage, refused):
    """Four steps are taken, two are asked for: both numbers are named; three more are possible."""
    train(stage, "--lr_schedule", "constant", out="out/new")
    name, half = TWICE[stage][0], {"sft": "0.5", "rm": "0.5", "ppo": "8"}[stage]
    error = refused(STAGES[stage].main, ["--resume", name, half, "--out_dir", "out/new"])
    assert f"{name} {half}: 2 steps, but the run of out/new/ckpt.pt has taken 4" in error


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

def test_a_policy_is_trained_further(folder, capsys):
    """Alone, it is its own reference: a KL of 0 at first. With --reference out/sft the KL is that from the SFT model,
    whose answers are those compared with; the start-up lines say which. That changes what is learned."""
    capsys.readouterr()
    train("ppo", "--init_from", "out/ppo", out="out/own")
    own = capsys.readouterr().out
    train("ppo", "--init_from", "out/ppo", "--reference", "out/sft", out="out/from_sft")
    from_sft = capsys.readouterr().out
    assert "from out/ppo; reference of the KL: the same model" in own and "preferred to the reference answer" in own
    assert "from out/ppo; reference of the KL: out/sft" in from_sft and "preferred to the SFT answer" in from_sft
    assert "KL from reference" in own and "SFT" not in own.split("held-out prompts, 95%")[1]
    assert "held-out prompts, 95% intervals: 4                 reference                   after" in from_sft
    start = [steps_of(f"out/{name}")[0]["objective/kl_k3"] for name in ("own", "from_sft")]
    assert start[0] == 0 < 1e-6 < start[1]
    before = {name: rows(f"out/{name}")[-1]["final"]["before"] for name in ("ppo", "own", "from_sft")}
    assert before["from_sft"] == before["ppo"] != before["own"]  # the SFT model's answers, in the run before too
    assert not same(state("out/own")["model"], state("out/from_sft")["model"])


def test_reference_of_the_same_model_changes_nothing(folder):
    """--reference with the model of --init_from is the default, to the last bit."""
    train("ppo", "--reference", "out/sft/ckpt.pt", out="out/named")
    assert same(state("out/ppo"), state("out/named")) and steps_of("out/ppo") == steps_of("out/named")


def test_the_reference_of_a_run_is_the_sft_models_distribution(folder):
    """The KL of the first step, a second way: the policy's and the reference's log-probabilities of the same answers,
    each from the model that was named."""
    train("ppo", "--init_from", "out/ppo", "--reference", "out/sft", "--save_rollouts", "--total_episodes", "8",
          "--value_warmup", "0", out="out/new")
    (policy, tokenizer, _), (sft, _, _) = (checkpoint.load(f"out/{name}", checkpoint.POLICIES, torch.device("cpu"))
                                           for name in ("ppo", "sft"))
    for row in rows("out/new", "rollouts")[:4]:
        prompt, nats, answer = tokenizer.encode_prompt(row["prompt"]), 0.0, None
        answer = tokenizer.encode(row["completion"]) + [tokenizer.eos] * row["finished"]
        if len(answer) != row["length"]:  # its text is encoded otherwise than it was sampled
            continue
        for model, sign in ((policy, 1), (sft, -1)):
            with torch.no_grad():
                states = model.hidden(torch.tensor([prompt + answer]))[0]
            log_p = (states @ model.wte.weight.T).log_softmax(-1)
            nats += sign * sum(float(log_p[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))
        assert row["kl"] == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("given, says", [
    (["--reference", "out/rm"], "out/rm/ckpt.pt: holds a reward model, expected an SFT model or a PPO policy"),
    (["--reference", "nowhere"], "nowhere: no such checkpoint"),
    (["--reference", "out/long"], "has a context of 32 tokens, out/long one of 24"),
    (["--reference", "out/words"], "have different tokenizers"),
    (["--init_from", "out/rm"], "holds a reward model, expected an SFT model or a PPO policy"),
    (["--reference", "out/new", "--overwrite"], "holds --reference out/new"),
])
def test_what_cannot_be_a_reference(folder, given, says, refused):
    """Another stage's, another context's, another tokenizer's, or what the run would replace; nothing is left."""
    if "long" in given[1]:
        train("sft", "--block_size", "24", out="out/long")
    if "words" in given[1]:
        train("sft", "--vocab_size", "266", out="out/words")
    if "new" in given[1]:
        shutil.copytree("out/sft", "out/new")
    before = sorted(folder.rglob("*"))
    assert says in refused(train, "ppo", *given, out="out/new")
    assert sorted(folder.rglob("*")) == before


def test_resume_compares_the_reference(folder, refused, capsys):
    """Its content is an input of the run: at another path it is taken, changed, left out or added it is refused."""
    train("ppo", "--init_from", "out/ppo", "--reference", "out/sft", out="out/new")
    shutil.copytree("out/sft", "out/moved")
    train_ppo.main(["--resume", "--reference", "out/moved/ckpt.pt", "--out_dir", "out/new"])
    assert "resume: --reference out/moved/ckpt.pt: this run had out/sft" in capsys.readouterr().out
    assert "began with --reference out/sft" in refused(
        train_ppo.main, ["--resume", "--reference", "", "--out_dir", "out/new"])
    assert "began without --reference out/sft" in refused(
        train_ppo.main, ["--resume", "--reference", "out/sft", "--out_dir", "out/ppo"])
    train("sft", "--overwrite", "--learning_rate", "1e-4")
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
    train_sft.main([*COMMON, "--init_from", "out/ppo", "--num_train_epochs", "0.25", "--learning_rate", "0",
                    "--muon_learning_rate", "0", "--out_dir", "out/new"])
    new = load("out/new")
    assert new["stage"] == "sft" and same(new["model"], load("out/ppo")["model"])
    for name in train_sft.SIZES:
        assert new["options"][name] == {**load("out/sft")["options"], "vocab_size": new["config"]["vocab_size"]}[name]
    error = refused(train_sft.main, [*COMMON, "--init_from", "out/ppo", "--n_layer", "2", "--out_dir", "out/x"])
    assert "--n_layer 2: out/ppo has 1" in error


def test_stage_2_starts_from_a_policy(folder):
    """Its trunk is the policy's, and so are the answers that set the scale."""
    train("rm", "--init_from", "out/ppo", "--learning_rate", "0", "--muon_learning_rate", "0", out="out/new")
    new, policy = load("out/new"), load("out/ppo")
    assert new["stage"] == "rm" and torch.equal(new["model"]["wte.weight"], policy["model"]["wte.weight"])


# ---- kept checkpoints

def kept(path):
    return sorted(name for name in os.listdir(path) if name.startswith("ckpt.0"))


@EVERY
def test_the_latest_checkpoints_are_kept(folder, stage):
    """A save every second step: --keep_checkpoints 2 of eight steps leaves 6 and 8, which are that run's at these steps;
    without it there are none, and all else is the same."""
    constant = ["--lr_schedule", "constant"]
    train(stage, *constant, *TWICE[stage], "--keep_checkpoints", "2", out="out/new")
    assert kept("out/new") == ["ckpt.000006.pt", "ckpt.000008.pt"] and kept(f"out/{stage}") == []
    assert same(load("out/new/ckpt.000008.pt"), load("out/new")) and not list(folder.glob("out/*/*.tmp"))
    assert load("out/new/ckpt.000006.pt")["training"]["step"] == 6
    train(stage, *constant, *TWICE[stage], out="out/plain")
    assert same(state("out/new"), state("out/plain"))
    if stage != "rm":
        sample.main(["out/new/ckpt.000006.pt", "--prompt", "the cat", "--response_length", "4", "--device", "cpu"])


def test_a_kept_policy_is_a_model_like_any(folder):
    """It starts a run, is a reference, and is evaluated."""
    train("ppo", "--keep_checkpoints", "9", out="out/new")
    assert kept("out/new") == ["ckpt.000002.pt", "ckpt.000004.pt"]
    early = "out/new/ckpt.000002.pt"
    train("ppo", "--init_from", early, "--reference", early, "--total_episodes", "8", out="out/more")
    evaluate.main([early, "--baseline", "out/sft", "--reward_model", "out/rm", "--prompts", "data/prompts.val.jsonl",
                   "--device", "cpu"])


@pytest.mark.parametrize("at", [2, 4, 6])
def test_kept_checkpoints_after_a_kill(folder, at, monkeypatch):
    """Killed while it saves, at any renaming or removal, and resumed: the files are those of a run that was not; none
    is half made, and none is later than the checkpoint that the run went back to."""
    more = ["--lr_schedule", "constant", "--total_episodes", "24", "--keep_checkpoints", "2"]
    train("ppo", *more, out="out/straight")
    for function in ("link", "replace", "remove"):
        own, calls = getattr(os, function), []

        def die(path, *rest):
            wanted = str(rest[0] if rest else path).split("/")[-1]
            if f"{at:06}" in wanted or function == "remove" and f"{at - 4:06}" in wanted:
                calls.append(path)
                raise KeyboardInterrupt
            return own(path, *rest)
        shutil.rmtree("out/new", ignore_errors=True)
        monkeypatch.setattr(os, function, die)
        try:
            train("ppo", *more, out="out/new")
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, function, own)
        assert calls or function == "remove"
        if calls:
            for name in kept("out/new"):
                if name.endswith(".pt"):
                    checkpoint.check_whole(f"out/new/{name}")
            train_ppo.main(["--resume", "--out_dir", "out/new"])
        assert kept("out/new") == kept("out/straight") == ["ckpt.000004.pt", "ckpt.000006.pt"]
        assert not list(folder.glob("out/new/*.tmp"))
        assert all(same(state(f"out/new/{name}"), state(f"out/straight/{name}")) for name in kept("out/new"))


def test_going_back_removes_what_is_later(folder):
    """The last checkpoint is damaged, the one before it counts: later ones go, and come again."""
    train("ppo", "--keep_checkpoints", "3", out="out/new")
    (folder / "out/new/ckpt.pt").unlink()  # a second name of the kept one: to write into it would damage both
    (folder / "out/new/ckpt.pt").write_bytes(b"damaged")
    (folder / "out/new/ckpt.000009.pt.tmp").write_bytes(b"of a save that was killed")
    (folder / "out/new/ckpt.5.pt").write_bytes(b"somebody's")
    seen, before = [], train_ppo.roll_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "roll_out", lambda *a: (seen.append(kept("out/new")), before(*a))[1])
        train_ppo.main(["--resume", "--out_dir", "out/new"])
    assert seen == [["ckpt.000002.pt"]] * 2 and kept("out/new") == ["ckpt.000002.pt", "ckpt.000004.pt"]
    assert (folder / "out/new/ckpt.5.pt").exists()


def test_overwrite_removes_kept_checkpoints(folder, refused):
    """They are the run's, also where nothing else of it is left."""
    train("ppo", "--keep_checkpoints", "3", "--save_rollouts", out="out/new")
    for name in os.listdir("out/new"):
        if name != "ckpt.000002.pt":
            os.remove(f"out/new/{name}")
    assert "holds a run (ckpt.000002.pt)" in refused(train, "ppo", out="out/new")
    train("ppo", "--overwrite", out="out/new")
    assert kept("out/new") == []


def test_where_there_are_no_second_names_they_are_copies(folder, monkeypatch):
    """A file system without links: the same files, each by itself."""
    def no_links(*_):
        raise OSError("not supported")
    monkeypatch.setattr(os, "link", no_links)
    train("ppo", "--keep_checkpoints", "2", out="out/new")
    assert kept("out/new") == ["ckpt.000002.pt", "ckpt.000004.pt"]
    assert same(load("out/new/ckpt.000004.pt"), load("out/new")) and os.stat("out/new/ckpt.pt").st_nlink == 1


def test_a_copy_for_which_there_is_no_room_leaves_what_was_there(folder, monkeypatch):
    """One line with the path, exit status 1, nothing half made; with room it goes on."""
    def no_links(*_):
        raise OSError("not supported")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "link", no_links)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(SystemExit, match="No space left on device"):
            train("ppo", "--keep_checkpoints", "2", out="out/new")
    assert [name for name in os.listdir("out/new") if name.startswith("ckpt")] == []
    train("ppo", "--keep_checkpoints", "2", "--overwrite", out="out/new")
    assert kept("out/new") == ["ckpt.000002.pt", "ckpt.000004.pt"]


# ---- kept rollouts

def test_every_training_answer_is_kept(folder):
    """A line each, whose means are the step's figures; rewards are scores within the clip, less the penalty where an
    answer did not end. Without the option there is no such file, and all else is the same."""
    train("ppo", "--save_rollouts", "--reward_clip", "0.5", out="out/new")
    found = rows("out/new", "rollouts")
    assert [row["step"] for row in found] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert list(found[0]) == ["step", "prompt", "completion", "score", "reward", "kl", "length", "finished"]
    for step in steps_of("out/new"):
        own = [row for row in found if row["step"] == step["step"]]
        for name, key in (("score", "objective/scores"), ("kl", "objective/kl"), ("finished",
                          "completions/eos_rate"), ("length", "completions/mean_length")):
            assert sum(row[name] for row in own) / 4 == pytest.approx(step[key], abs=1e-5)
        assert all(row["prompt"] in [f"the {noun}" for noun in NOUNS] for row in own)
    for row in found:
        assert row["reward"] == pytest.approx(min(0.5, max(-0.5, row["score"])) - (not row["finished"]))
        assert 1 <= row["length"] <= 6
    assert {row["finished"] for row in found} <= {True, False} and any(row["score"] != row["reward"] for row in found)
    assert not os.path.exists("out/ppo/rollouts.jsonl")
    train("ppo", "--reward_clip", "0.5", out="out/plain")
    assert same(state("out/new"), state("out/plain"))


def test_kept_rollouts_belong_to_the_run(folder, capsys):
    """Stopped, torn and resumed: no line twice, none lost; the option survives; --overwrite removes them."""
    more = ["--lr_schedule", "constant", "--total_episodes", "24", "--save_rollouts"]
    train("ppo", *more, out="out/straight")
    own, calls = train_ppo.credit, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt  # in the fourth step; the last checkpoint is of the second
        return own(*arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ppo, "credit", stop)
        train("ppo", *more, out="out/new")
    assert len(rows("out/new", "rollouts")) == 12
    with open("out/new/rollouts.jsonl", "a") as f:
        f.write('{"step": 4, "prompt": "the c')
    train_ppo.main(["--resume", "--out_dir", "out/new"])
    assert rows("out/new", "rollouts") == rows("out/straight", "rollouts") and len(rows("out/new", "rollouts")) == 24
    train("ppo", "--overwrite", out="out/new")
    assert not os.path.exists("out/new/rollouts.jsonl")


def test_rollouts_are_on_the_disk_before_a_checkpoint(folder, monkeypatch):
    """As the other logs: every save is preceded by an fsync of them."""
    events, fsync, save = [], os.fsync, checkpoint.save

    def named(number):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        return fsync(number)
    monkeypatch.setattr(os, "fsync", named)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (events.append("save"), save(*a, **k))[1])
    train("ppo", "--save_rollouts", out="out/new")
    for at in [n for n, event in enumerate(events) if event == "save"]:
        assert set(events[max(0, at - 3):at]) == {"metrics.jsonl", "samples.jsonl", "rollouts.jsonl"}


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


# ---- advantages that say nothing

@pytest.mark.parametrize("changes, white, words", [
    ({}, 1.0, None), ({}, 0.02, None),
    ({}, 0.0, "what moved the policy is the entropy bonus (--ent_coef 0.0245) alone"),
    ({"ent_coef": 0.0}, 0.0, "nothing moved the policy but the optimizer's momentum"),
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
    against = types.SimpleNamespace(run=run, o=o, warned={"variance"}, ref_name="SFT",
                                    sft={"mean_length": 1.0, "ref_logprob_per_token": -4.0})
    said = [*evaluate.AgainstSFT.warnings(against, batch, record)]
    assert len(said) == told and all("the advantages of step 7 do not differ" in line for line in said)
    assert [*evaluate.AgainstSFT.warnings(against, batch, record)] == []  # once a run


@pytest.mark.parametrize("bonus, moved", [("0.0245", "is the entropy bonus (--ent_coef 0.0245) alone"),
                                          ("0", "nothing moved the policy but the optimizer's momentum")])
def test_one_decision_is_told(folder, bonus, moved, capsys):
    """A batch of one answer of one token: a line, once, and what moved the policy, which without the bonus is
    nothing."""
    train("ppo", "--batch_size", "1", "--num_mini_batches", "1", "--response_length", "1", "--total_episodes", "3",
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
        assert ("--reference STR" in out) == ("--save_rollouts" in out) == (stage == "ppo")
    assert RunOptions.keep_checkpoints == 0
