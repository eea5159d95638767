"""The three scripts as a user runs them, once in real processes, on a small data set written here; then variations."""
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest

from conftest import Command, scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOOD, BAD = ["kind", "bright", "warm", "calm"], ["cruel", "dull", "cold", "rude"]
NOUNS = ["cat", "dog", "sun", "sea", "king", "tree", "boat", "town"]
SFT = scratch("sft") + ("--device cpu --dtype float32 --n_layer 2 --n_head 2 --n_embd 32 --vocab_size 320 --block_size 48 "
       "--num_train_epochs 3 --batch_size 32 --learning_rate 1e-2 --muon_learning_rate 2e-2 --eval_interval 20").split()
RM = scratch("rm") + ("--device cpu --batch_size 16 --learning_rate 2e-3 --num_scale_samples 128 --response_length 16 "
      "--dropout 0").split()
PPO = scratch("ppo") + ("--device cpu --total_episodes 640 --batch_size 32 --learning_rate 1e-3 --response_length 16 --kl_coef 0.05 "
       "--eval_interval 10 --num_eval_prompts 64 --num_ppo_epochs 2 --num_mini_batches 4 "
       "--value_warmup 2 --ent_coef 0").split()
TWO_RANKS = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def run(*command, cwd, code=0):
    """Standard output of a command that succeeds, standard error of one that ends with that status."""
    if command[0] == "-m":
        command = command[1:]
    if command[0] == "torch.distributed.run":
        done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=cwd, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
        status, out, error = done.returncode, done.stdout, done.stderr
    else:
        status, out, error = Command(*command, cwd=cwd).wait()
    assert status == code, f"{command}: exit {status}\n{out[-3000:]}\n{error[-3000:]}"
    return out if code == 0 else error


def script(stage):
    return os.path.join(ROOT, f"train_{stage}.py")


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def sentence(rng, words=3):
    return rng.choices(GOOD + BAD, weights=[1] * 4 + [2] * 4, k=words)  # the likeliest answer is not the best one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world where people prefer the sentence with more good words."""
    folder, rng = tmp_path_factory.mktemp("pipeline"), random.Random(0)
    (folder / "data").mkdir()
    texts = {" ".join(["the", noun, "is", *sentence(rng)]) + "." for noun in NOUNS * 200}
    texts = sorted(texts)
    rng.shuffle(texts)
    for split, part in (("train", texts[:1100]), ("val", texts[1100:])):
        rows = [(" ".join(t.split()[:2]), t) for t in part]
        write(folder / "data" / f"sft.{split}.jsonl", [{"prompt": p, "completion": t[len(p):]} for p, t in rows])
        pairs = []
        for a, b in zip(part, part[1:]):
            a_good, b_good = (sum(w.strip(".") in GOOD for w in t.split()) for t in (a, b))
            if a_good != b_good:
                best, worst = (a, b) if a_good > b_good else (b, a)
                pairs.append({"prompt": "", "chosen": best, "rejected": worst, "margin": abs(a_good - b_good)})
        write(folder / "data" / f"preferences.{split}.jsonl", pairs)
    write(folder / "data" / "prompts.train.jsonl", [{"prompt": f"the {noun}"} for noun in NOUNS])
    write(folder / "data" / "prompts.val.jsonl", [{"prompt": f"the {noun} is"} for noun in NOUNS] * 2)
    return folder


@pytest.fixture(scope="module")
def stages(folder):
    """All three stages run once; their output by name."""
    data = ["--data_dir", "data"]
    return {"sft": run(script("sft"), *data, *SFT, cwd=folder), "rm": run(script("rm"), *data, *RM, cwd=folder),
            "ppo": run(script("ppo"), *data, *PPO, cwd=folder)}


def metrics(folder, stage):
    return [json.loads(line) for line in (folder / "out" / stage / "metrics.jsonl").read_text().splitlines()]


def test_each_stage_names_the_next_and_leaves_its_files(folder, stages):
    """A person can follow the printed commands from stage to stage, and finds what each stage promises."""
    assert f"python {script('rm')}" in stages["sft"] and f"python {script('ppo')}" in stages["rm"]
    assert "python -m minirlhf.sample" in stages["ppo"]
    for stage in ("sft", "rm", "ppo"):
        for name in ("ckpt.pt", "config.json", "metrics.jsonl"):
            assert (folder / "out" / stage / name).stat().st_size > 0
    assert not list(folder.glob("out/*/lock")) and not list(folder.glob("out/*/*.tmp"))


def test_sft_learns_the_manner(folder, stages):
    """A completion is " is", 3 adjectives, "." and eos: 6 decisions, 3 of them with the adjectives' entropy, 3 with
    none. The loss ends near that floor."""
    evals = [m["eval"]["all"] for m in metrics(folder, "sft") if "eval" in m]
    entropy = -sum(4 * p * math.log(p) for p in (1 / 12, 2 / 12))
    assert evals[-1]["nats_per_token"] == pytest.approx(3 * entropy / 6, abs=0.04)
    assert evals[-1]["nats_per_token"] < evals[0]["nats_per_token"]


def test_reward_model_beats_chance_and_length(folder, stages):
    """Which sentence holds more good words is fully learnable."""
    final = metrics(folder, "rm")[-1]["final"]
    assert final["figures"]["all"]["low"] > max(0.75, final["figures"]["all"]["length_only"])
    assert "Good enough" in stages["rm"]


def test_policy_scores_higher_and_says_other_things(folder, stages):
    """After PPO held-out answers score higher, are preferred to the SFT model's, and greedy answers differ."""
    rows = metrics(folder, "ppo")
    last, final = [m["eval"] for m in rows if "eval" in m][-1], rows[-1]["final"]
    assert final["after"]["score"][0] > final["before"]["score"][0] + 0.5
    assert last["score"][0] > 0.5 and last["win_rate"][0] > 0.6 and 0 < last["kl"][0] < 40
    out = run("-m", "minirlhf.sample", "out/sft", "out/ppo", "--prompts", "data/prompts.val.jsonl", "--temperature",
              "0", "--response_length", "16", "--output", "greedy.jsonl", cwd=folder)
    assert "the cat is" in out
    rows = [json.loads(line) for line in (folder / "greedy.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"checkpoint", "prompt", "completion", "finished"}
    texts = {stage: [r["completion"] for r in rows if stage in r["checkpoint"]] for stage in ("sft", "ppo")}
    assert len(texts["sft"]) == len(texts["ppo"]) == 2 * len(NOUNS) and texts["sft"] != texts["ppo"]


def test_evaluate_says_what_the_run_said(folder, stages):
    """The closing figures of stage 3 again, to the last digit, from the command; the baseline against itself wins half;
    a paired difference, best-of-n rows, thirds by length and a verdict a policy; all of it in the file."""
    out = run("-m", "minirlhf.evaluate", "out/ppo", "out/sft", "--prompts", "data/prompts.val.jsonl", "--num_prompts",
              "64", "--best_of", "1,2", "--judge", "out/rm", "--output", "evaluation.json", cwd=folder)
    found = json.loads((folder / "evaluation.json").read_text())
    final = metrics(folder, "ppo")[-1]["final"]
    for name, figure in final["after"].items():
        assert found["policies"]["out/ppo"][name] == figure
    assert {k: v for k, v in found["policies"]["out/sft"].items() if not k.startswith("judge")} == final["before"]
    assert found["policies"]["out/ppo"]["judge_win_rate"] == final["after"]["win_rate"]  # the same model judges
    assert found["best_of"]["1"]["score"] == final["before"]["score"] < found["best_of"]["2"]["score"]
    assert found["best_of"]["2"]["kl_bound"] == pytest.approx(math.log(2) - 0.5)
    gain = final["after"]["score"][0] - final["before"]["score"][0]
    assert found["differences"][0]["mean"] == pytest.approx(gain)
    assert found["verdicts"]["out/ppo"].startswith("believable") and "verdict on out/ppo: believable" in out
    assert found["verdicts"]["out/sft"].startswith("not to be told from the baseline")
    assert len(found["by_length"]["out/ppo"]) == 3 and "KL <= 0.19" in out


@pytest.mark.parametrize("arguments, expected", [
    (["out/rm"], "holds a reward model, expected an SFT model, a PPO policy or a DPO policy"),
    (["nowhere"], "nowhere: no such checkpoint"),
    (["out/ppo", "--reward_model", "out/sft"], "holds an SFT model, expected a reward model"),
    (["out/ppo", "--reward_model", "nothing.py:f"], "--reward_model nothing.py:f: expected FILE.py:FUNCTION"),
    (["out/ppo", "--best_of", "0"], "--best_of 0: each n must be"), (["out/ppo", "--best_of", "x"], "--best_of x"),
    (["out/ppo", "--response_length", "47"], "--response_length 47: leaves no room"),
    (["out/ppo", "--output", "out/ppo/ckpt.pt"], "--output out/ppo/ckpt.pt: is out/ppo/ckpt.pt, which"),
    (["out/ppo", "--output", "out/ppo/config.json"], "--output out/ppo/config.json"),
    (["out/ppo", "--temperature", "0"], "--temperature 0"),
])
def test_evaluate_refuses(folder, stages, declined, arguments, expected):
    """What does not fit costs one line, and nothing is written."""
    assert expected in declined(folder, "minirlhf.evaluate", "--prompts", "data/prompts.val.jsonl", *arguments)


def test_an_option_that_another_makes_idle_is_named(folder, stages, ran):
    """Given together: a line each; the idle one alone: none."""
    (folder / "zero.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n")
    short = ["--data_dir", "data", *PPO, "--total_episodes", "96", "--num_eval_prompts", "4", "--overwrite"]
    out, _ = ran(folder, "train_ppo.py", *short, "--reward", "zero.py:f", "--reward_clip", "1", "--value_init", "rm",
                 "--out_dir", "out/idle")
    assert "warning: --reward_clip has no effect with --reward" in out and "--value_init has no effect" in out
    assert "--reward_model has no effect" not in out
    assert "no effect" not in ran(folder, "train_ppo.py", *short, "--reward_clip", "1", "--out_dir", "out/idle").out


def test_a_judge_is_logged_over_the_run(folder, stages, ran):
    """--judge, a model or a function, stands beside the reward in every evaluation and in the closing table."""
    (folder / "judge.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    out, _ = ran(folder, "train_ppo.py", "--data_dir", "data", *PPO, "--total_episodes", "96", "--eval_interval", "1",
                 "--judge", "judge.py:short", "--out_dir", "out/judged")
    rows = metrics(folder, "judged")
    assert all(len(row["eval"]["judge_win_rate"]) == 3 and row["eval"]["judge_score"][0] < 0 for row in rows[:-1])
    assert "; judge: score -" in out and "preferred by the judge" in out and "judge_score" in rows[-1]["final"]["after"]


def test_a_checkpoint_with_old_option_names_is_refused(folder, stages, declined):
    """--resume names them in one line."""
    import torch

    (folder / "out" / "old").mkdir(exist_ok=True)
    payload = torch.load(folder / "out" / "ppo" / "ckpt.pt", weights_only=True)
    payload["options"] |= {"kl_length_credit": 0.1, "target_kl": 0.0}
    torch.save(payload, folder / "out" / "old" / "ckpt.pt")
    error = declined(folder, "train_ppo.py", "--resume", "--out_dir", "out/old")
    assert "options that this version does not know: kl_length_credit, target_kl;" in error


def test_first_update_starts_from_a_ratio_of_one(folder, stages):
    """Until the value network's two steps of warm-up are over the policy is the SFT model: KL is 0, and the sampler's
    log-probabilities are the trainer's. Then it moves."""
    rows = metrics(folder, "ppo")
    for row in rows[:2]:
        assert abs(row["objective/kl"]) < 1e-3 and row["objective/kl_k3"] < 1e-4 and row["val/sampler_gap"] < 1e-4
        assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[3]["objective/kl_k3"] > 1e-4
    for row in rows[:-1]:
        charged = 0.05 * (1 - 0.14) * row["objective/kl"]  # --kl_coef, less --kl_baseline of the mean
        assert row["objective/non_score_reward"] == pytest.approx(-charged, rel=1e-4, abs=1e-6)
        assert row["objective/rlhf_reward"] + charged <= 2 and row["objective/entropy"] > 0
        a_decision = row["objective/entropy"] / row["completions/mean_length"]  # -log p of what was drawn: entropy too
        assert row["policy/entropy_avg"] == pytest.approx(a_decision, rel=0.3, abs=0.1)
    assert [row["lr"] for row in rows[:-1]] == pytest.approx([1e-3 * (1 - step / 20) for step in range(20)])


CHECK = {"sft": [*SFT, "--init_from", "out/sft"], "rm": RM, "ppo": PPO}


@pytest.fixture
def checked(folder, stages, monkeypatch, capsys):
    """checked(stage, *options) -> (exit status, lines) of the script's --check, run in this process."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def check(stage, *options):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [stage, "--data_dir", "data", *CHECK[stage], "--check", *options])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"train_{stage}").main()
        return stop.value.code, capsys.readouterr().out.splitlines()
    yield check
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.parametrize("stage, options, count", [
    ("sft", [], 7), ("sft", ["--init_from", "scratch", "--dtype", "bfloat16"], 8), ("rm", [], 7),
    ("sft", ["--long_prompts", "trim", "--block_size", "8", "--init_from", "scratch"], 6),
    ("rm", ["--dtype", "bfloat16"], 7), ("ppo", ["--temperature", "0.7"], 12),
    ("ppo", ["--out_dir", "out/new", "--ent_coef", "0.1", "--dtype", "bfloat16", "--compile", "false"], 12),
])
def test_check_passes_on_what_is_right(folder, checked, stage, options, count):
    """--check prints a line for each invariant, all hold, the exit status is 0, and no file is written or changed."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, lines = checked(stage, *options)
    assert status == 0 and lines[-1] == "all checks passed"
    assert [line[:6] for line in lines[1:-1]] == ["ok    "] * count
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_check_of_a_trained_policy_and_a_custom_reward(folder, checked):
    """--resume checks the run's own policy, whose KL is no longer 0; --reward a function's scores."""
    status, lines = checked("ppo", "--resume")
    assert status == 0 and len(lines) == 11 + 2 and not any("KL from the SFT" in line for line in lines)
    (folder / "one.py").write_text("def f(prompts, completions):\n    return [len(c) / 10 for c in completions]\n")
    assert checked("ppo", "--reward", "one.py:f")[0] == 0


def test_check_says_when_answers_cannot_end(checked):
    """A limit of one token, where answers take six, is found before a run is wasted on it."""
    status, lines = checked("ppo", "--response_length", "1")
    assert status == 1 and any(line.startswith("FAIL  eos is reachable: 0% of") for line in lines)


def test_custom_reward(folder, stages, ran):
    """--reward file.py:function takes the reward model's place, and what it prefers is what the policy learns."""
    (folder / "short.py").write_text("def fewer_letters(prompts, completions):\n"
                                     "    return [-len(c) / 10 for c in completions]\n")
    ran(folder, "train_ppo.py", "--data_dir", "data", *PPO, "--reward", "short.py:fewer_letters", "--total_episodes",
        "448", "--out_dir", "out/short")
    evals = [m["eval"] for m in metrics(folder, "short") if "eval" in m]
    assert evals[-1]["mean_length"] < 9 and evals[-1]["win_rate"][0] > 0.7
    assert all(m["val/sampler_gap"] < 1e-4 for m in metrics(folder, "short")[:-1])  # answers of many lengths


@pytest.mark.parametrize("body, expected", [
    ("raise ValueError('boom')", "raised ValueError: boom"),
    ("return [0.0]", "returned 1 scores for"),
    ("return [float('nan')] * len(prompts)", "row 0: nan"),
    ("return ['x'] * len(prompts)", "row 0: expected a number"),
])
def test_bad_custom_reward(folder, stages, declined, body, expected):
    """A reward function that raises, or returns too few, non-finite or non-numbers ends the run, its row named."""
    (folder / "bad.py").write_text(f"def f(prompts, completions):\n    {body}\n")
    assert expected in declined(folder, "train_ppo.py", "--data_dir", "data", *PPO, "--reward", "bad.py:f", "--out_dir",
                                "out/bad", "--overwrite")


@pytest.mark.parametrize("stage, arguments, expected", [
    ("sft", ["--data_dir", "data"], "holds a run"),
    ("sft", ["--data_dir", "nowhere", "--out_dir", "out/x"], "sft.train.jsonl: no such file"),
    ("ppo", ["--data_dir", "data", "--out_dir", "out/x", "--init_from", "out/rm/ckpt.pt"], "holds a reward model"),
    ("ppo", ["--data_dir", "data", "--out_dir", "out/x", "--init_from", "nowhere.pt"],
     "run train_sft.py or train_ppo.py or python -m minirlhf.dpo first"),
    ("ppo", ["--data_dir", "data", "--out_dir", "out/x", "--num_mini_batches", "5"], "--num_mini_batches 5"),
    ("ppo", ["--data_dir", "data", "--out_dir", "out/x", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
])
def test_errors_of_use(folder, stages, declined, stage, arguments, expected):
    """What a user gets wrong costs them one line that names it, and exit status 2."""
    assert expected in declined(folder, f"train_{stage}.py", *arguments)


@pytest.mark.slow  # test_state.py has it within one process, test_faults.py from outside on less
@pytest.mark.parametrize("stage, options", [
    ("sft", [*SFT, "--num_train_epochs", "1"]), ("rm", [*RM, "--num_train_epochs", "0.5"]),
    ("ppo", [*PPO, "--total_episodes", "224"])])
def test_resume_is_exact(folder, stages, stage, options):
    """Stopped by SIGTERM midway and resumed, each stage ends with the weights and metrics of the uninterrupted run."""
    import torch

    options = [*options, "--data_dir", "data", "--out_dir", f"out/{stage}_again", "--eval_interval", "5"]
    straight = [*options[:-4], "--out_dir", f"out/{stage}_straight", "--eval_interval", "5"]
    run(script(stage), *straight, cwd=folder)
    assert Command(script(stage), *options, cwd=folder, stop_after=3).wait()[0] == 128 + signal.SIGTERM
    run(script(stage), *options, "--resume", cwd=folder)
    a, b = (torch.load(folder / "out" / f"{stage}_{kind}" / "ckpt.pt", weights_only=True)["model"]
            for kind in ("straight", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    clock = ("tokens_per_second", "eps", "seconds", "rollout_seconds", "elapsed", "eval")  # eval: where the signal came
    rows = [[{k: v for k, v in m.items() if k not in clock} for m in metrics(folder, f"{stage}_{kind}")]
            for kind in ("straight", "again")]
    assert rows[0] == rows[1]
    assert "finished" in run(script(stage), *options, "--resume", cwd=folder)


def test_a_kl_blow_up_ends_the_run_with_advice(folder, stages):
    """Three batches above --max_ref_kl: exit 1, and the options that help, with this run's numbers."""
    error = run(script("ppo"), "--data_dir", "data", *PPO, "--max_ref_kl", "0.0001", "--out_dir", "out/far", cwd=folder,
                code=1)
    assert "third batch in a row" in error and "--max_ref_kl is 0.0001" in error and "raise --kl_coef above 0.05" in error
    updates = [row["policy/updates"] for row in metrics(folder, "far")]
    assert updates == [0, 0, 8, 4, 4, 4]  # none in the warm-up; 2 epochs x 4 minibatches; one where the KL is too high
    assert "or lower --learning_rate below 0.001" in error and "Traceback" not in error


def test_resume_keeps_the_run_s_own_options(folder, stages, ran, declined):
    """A bare --resume goes on as the run was; a difference that is named is listed; one that would make it another run
    is refused."""
    own = lambda: json.loads((folder / "out" / "ppo" / "config.json").read_text())  # noqa: E731
    before = own()
    out, _ = ran(folder, "train_ppo.py", "--resume", "--eval_interval", "7")
    assert "this run is finished" in out and "resume: --eval_interval 7: this run had 10" in out
    after = own()
    assert {k for k in after if after[k] != before[k]} == {"eval_interval", "resume"} and after["learning_rate"] == 1e-3
    error = declined(folder, "train_ppo.py", "--resume", "--temperature", "0.5")
    assert "--temperature 0.5: this run had 1.0, which cannot change" in error


def test_what_is_refused_leaves_nothing(folder, stages, declined):
    """A new folder of a run that ends before it began is gone; an old run that --overwrite would replace is not."""
    declined(folder, "train_ppo.py", "--data_dir", "data", "--out_dir", "new/x", "--init_from", "nowhere.pt")
    (folder / "broken").mkdir()
    for name in ("sft.train", "sft.val"):
        (folder / "broken" / f"{name}.jsonl").write_text((folder / "data" / f"{name}.jsonl").read_text())
    (folder / "broken" / "prompts.val.jsonl").write_text("{")
    declined(folder, "train_sft.py", "--data_dir", "broken", *SFT, "--overwrite")


def test_an_adaptive_kl_coef_follows_the_kl_of_a_response(folder, stages, ran, declined):
    """Each step beta changes by what its KL a response asks for; a beta of 0 could not follow and is refused."""
    ran(folder, "train_ppo.py", "--data_dir", "data", *PPO, "--total_episodes", "192", "--adaptive_kl_target", "0.6",
        "--value_warmup", "0", "--out_dir", "out/adaptive")
    rows = [m for m in metrics(folder, "adaptive") if "objective/kl_coef" in m]
    for row, following in zip(rows, rows[1:]):
        error = min(max(row["objective/kl"] / 0.6 - 1, -0.2), 0.2)
        assert following["objective/kl_coef"] == pytest.approx(row["objective/kl_coef"] * (1 + error * 32 / 10_000))
    assert rows[1]["objective/kl_coef"] < 0.05 and rows[-1]["objective/kl_coef"] > rows[-2]["objective/kl_coef"]
    declined(folder, "train_ppo.py", "--data_dir", "data", *PPO, "--kl_coef", "0", "--adaptive_kl_target", "1",
             "--out_dir", "out/none")


def test_own_data_in_other_forms(folder, ran):
    """Messages, plain texts, implicit prompts and rankings go through all three stages; so does a data set smaller than
    a batch, with prompts that must be trimmed, and the next commands name the folders."""
    data = folder / "chat"
    data.mkdir()
    talk = [("hello", "hi there"), ("how are you", "fine"), ("bye", "see you"), ("thanks", "you are welcome")] * 3
    ask = "\n\nHuman: {}\n\nAssistant:".format
    for split in ("train", "val"):
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in talk]
        write(data / f"sft.{split}.jsonl", [{"messages": chat} for chat in chats] + [{"text": "hello world"}])
        write(data / f"preferences.{split}.jsonl",
              [{"chosen": f"{ask(q)} {a}", "rejected": f"{ask(q)} no"} for q, a in talk]
              + [{"prompt": ask("x"), "completions": [" a b c", " a b", " a"], "scores": [3, 2, 2]}])
        write(data / f"prompts.{split}.jsonl", [{"messages": [{"role": "user", "content": "hello " * 50}]}]
              + [{"prompt": ask(q)} for q, _ in talk])
    own = ["--data_dir", "chat", "--long_prompts", "trim"]
    out, _ = ran(folder, "train_sft.py", *own, *SFT, "--block_size", "64", "--out_dir", "out/c/sft")
    assert f"python {script('rm')} @scratch --data_dir chat --init_from out/c/sft/ckpt.pt" in out
    out, _ = ran(folder, "train_rm.py", *own, *RM, "--init_from", "out/c/sft/ckpt.pt", "--out_dir", "out/c/rm")
    assert (f"python {script('ppo')} @scratch --data_dir chat --init_from out/c/sft/ckpt.pt --reward_model "
            "out/c/rm/ckpt.pt" in out)
    out, _ = ran(folder, "train_ppo.py", *own, *PPO, "--total_episodes", "128", "--init_from", "out/c/sft",
                 "--reward_model", "out/c/rm", "--out_dir", "out/c/ppo")
    assert "1 of 13" in out and "trimmed at the left" in out and "KL from SFT" in out


@pytest.mark.slow
@pytest.mark.parametrize("stage, options", [
    ("sft", SFT), ("sft", [*SFT, "--init_from", "out/sft", "--freeze_layers", "1"]),
    ("rm", [*RM, "--dtype", "float32"]),
    ("rm", [*RM, "--dtype", "float32", "--lora_rank", "4", "--optimizer", "adamw"])],  # Muon amplifies noise
    ids=["sft", "sft frozen", "rm", "rm adapters"])
def test_two_ranks_train_as_one(folder, stages, stage, options):
    """Under torchrun each rank takes half of every batch; sums over ranks make the same model, up to rounding."""
    losses = []
    for n, launcher in ((1, []), (2, TWO_RANKS)):
        run(*launcher, script(stage), "--data_dir", "data", *options, "--out_dir", f"out/{stage}{n}", "--overwrite",
            cwd=folder)
        losses.append([m["loss"] for m in metrics(folder, f"{stage}{n}") if "loss" in m])
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.1, abs=0.01)  # rounding grows from step to step


@pytest.mark.slow
def test_two_ranks_improve_one_policy(folder, stages):
    """Each rank samples its own half of the answers; the policy improves as with one."""
    run(*TWO_RANKS, script("ppo"), "--data_dir", "data", *PPO, "--out_dir", "out/ppo2", cwd=folder)
    rows = metrics(folder, "ppo2")
    assert rows[0]["val/ratio"] == pytest.approx(1, abs=1e-5) and rows[0]["episode"] == 32
    assert rows[-1]["final"]["after"]["score"][0] > rows[-1]["final"]["before"]["score"][0] + 0.5


@pytest.mark.slow
def test_the_loop_goes_twice_round(folder, stages, tmp_path):
    """Answers of the policy, ranked by one who knows what people prefer -> reward model, from the earlier one and on
    old and new preferences -> policy, from the earlier one and with the SFT model as reference -> again: by that judge,
    who is no model, its answers score higher in each round. The best of n answers fine-tune the SFT model, whose
    answers are preferred then, too."""
    for name in ("data", "out"):
        os.symlink(folder / name, tmp_path / name)
    os.mkdir(tmp_path / "best")
    write(tmp_path / "p.jsonl", [{"prompt": f"the {noun} is {word}"} for noun in NOUNS for word in GOOD + BAD])
    (tmp_path / "people.py").write_text(
        f"GOOD, BAD = {GOOD}, {BAD}\n\n\ndef score(prompts, completions):\n    return [sum(c.count(w) for w in GOOD) - "
        "sum(c.count(w) for w in BAD) for c in completions]\n")
    few, people = ["--response_length", "16", "--device", "cpu"], ["--reward_model", "people.py:score"]
    asked = ["--prompts", "p.jsonl", "--n", "6", *few, *people]
    policy, reward_model, names, finals = "out/sft", "out/rm", ["preferences"], []
    for n in (1, 2):
        run("-m", "minirlhf.sample", policy, *asked, "--rank", "--output", f"ranked{n}.jsonl", cwd=tmp_path)
        names.append(f"./ranked{n}.jsonl")
        out = run(script("rm"), *RM, "--init_from", reward_model, "--val_share", "0.2", "--out_dir", f"rm{n}", *(
            word for name in names for word in ("--preferences", name)), "--data_dir", "data", cwd=tmp_path)
        assert f"trunk and head from {reward_model}" in out and f"from data/preferences.*.jsonl, {names[1]}" in out
        run(script("ppo"), *PPO, "--data_dir", "data", "--init_from", policy, "--reference", "out/sft",
            "--reward_model", f"rm{n}", "--out_dir", f"ppo{n}", "--judge", "people.py:score", "--total_episodes", "224",
            cwd=tmp_path)
        policy, reward_model = f"ppo{n}", f"rm{n}"
        rows = [json.loads(line) for line in open(tmp_path / policy / "metrics.jsonl")]
        finals += [row["final"] for row in rows if "final" in row]
    scores = [figures["judge_score"][0] for figures in (finals[0]["before"], *(final["after"] for final in finals))]
    assert scores[0] + 0.2 < scores[1] < scores[2]
    run("-m", "minirlhf.sample", "out/sft", *asked, "--best", "--output", "best/sft.train.jsonl", cwd=tmp_path)
    run(script("sft"), *SFT, "--init_from", "out/sft", "--data_dir", "best", "--out_dir", "better", "--val_share",
        "0.2", cwd=tmp_path)
    run("-m", "minirlhf.evaluate", "better", "--baseline", "out/sft", "--prompts", "p.jsonl", *few, *people, "--output",
        "e.json", cwd=tmp_path)
    assert json.load(open(tmp_path / "e.json"))["policies"]["better"]["win_rate"][1] > 0.5
