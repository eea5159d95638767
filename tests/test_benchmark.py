"""The benchmark: its counts against torch's own, its lines against what comparisons read. No times are judged."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_ppo
from conftest import LLAMA
from minirlhf import benchmark, kernels

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = benchmark.Work(3, 16, 2, 29, batch=4, prompt=3, response=5, epochs=2, minibatches=2)
TINY_LLAMA = replace(TINY, heads=4, more={k: v for k, v in LLAMA.items() if k != "n_head"})
both_works = pytest.mark.parametrize("work", [TINY, TINY_LLAMA], ids=["gpt2", "llama"])
WHOLE = benchmark.Options()
ADAPTERS = pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}, {"lora_rank": 3, "lora_layers": 2}],
                                   ids=["whole", "adapters", "in two blocks"])
CPU = torch.device("cpu")
PPO_KEYS = {"what", "peer", "size", "batch", "prompt", "response", "epochs", "minibatches", "threads", "fast_matmul",
            "malloc", "iters", "total_s", "min_total_s", "max_total_s", "first_s", "rollout_s", "scoring_s", "update_s",
            "rollout_tok_s", "samples_s", "peak_rss_mb", "versions", "others_cpu"}  # those of other trainers' lines
STEP_KEYS = {"what", "peer", "size", "batch", "length", "threads", "fast_matmul", "malloc", "iters", "step_s",
             "min_step_s", "steps_s", "tok_s", "peak_rss_mb", "versions", "others_cpu"}
OWN_KEYS = {"device", "dtype", "compile", "floor_s", "floor_ratio", "mfu", "gflop", "peak_gflops", "peaks_gflops",
            "read_gb_s"}


@pytest.fixture
def tiny(monkeypatch):
    """Size S is tiny, and the machine is measured in no time."""
    monkeypatch.setitem(benchmark.SIZES, "S", TINY)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device, dtype: (100.0, {"mkl": 90.0, "onednn": 100.0}))
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 20.0)


def lines(capsys, *arguments):
    benchmark.main(["--device", "cpu", *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_forward_pass_by_hand():
    """2 layers of width 3, 2 rows of 4 tokens of which 1 is counted, 5 words, all 10 causal pairs:
    2 x 2 x (9 x (15 x 4 + 9 x 1) + 2 x 3 x 2 x 10 + 3 x 5 x 1) = 4 x (621 + 120 + 15)."""
    w = benchmark.Work(2, 3, 1, 5, 2, 0, 0, 1, 1)
    assert benchmark.forward_flops(w, 2, 4, benchmark.causal(4), 1, 5) == 4 * (621 + 120 + 15)


def test_a_llama_s_forward_pass_by_hand():
    """2 layers of width 6, 2 heads of size 4 that share one of keys and values, 10 channels in the MLP: queries, keys
    and values take 6 x (8 + 4 + 4) = 96 weights, the rest 8 x 6 + 3 x 6 x 10 = 228. 2 rows of 4 tokens of which 1 is
    counted, 5 words: 2 x 2 x (2 x 96 x 4 + 228 x 4 + 228 x 1 + 2 x 8 x 2 x 10 + 6 x 5) = 4 x 2258."""
    w = benchmark.Work(2, 6, 2, 5, 2, 0, 0, 1, 1, dict(family="llama", n_kv_head=1, head_size=4, n_inner=10))
    assert benchmark.forward_flops(w, 2, 4, benchmark.causal(4), 1, 5) == 4 * 2258


def test_parameters_by_hand():
    """3 layers of width 16: embeddings of 29 tokens and 128 places, 12 x 16^2 weights and 13 x 16 biases and norms a
    block, the last norm; a scalar head has 17 more. Llama's: c_attn 16 x 48 + 48, c_proj 24 x 16, 3 x 24 x 16 in the
    MLP, norms 2 x 16 + 2 x 6 a block, the last norm, no places; only a language model has a second 29 x 16."""
    gpt2, llama = (29 + 128) * 16 + 3 * (12 * 256 + 13 * 16) + 32, 29 * 16 + 3 * (816 + 384 + 1152 + 44) + 16
    assert [benchmark.parameters(TINY, head) for head in ("lm", "scalar")] == [gpt2, gpt2 + 17]
    assert [benchmark.parameters(TINY_LLAMA, head) for head in ("lm", "scalar")] == [llama + 29 * 16, llama + 17]


@both_works
@ADAPTERS
def test_flops_are_those_that_torch_counts(monkeypatch, tiny, work, lora):
    """Scoring and update of a whole iteration, forward and backward, to the last one. Torch counts a product of all
    pairs, seen or not, as explicit attention makes it; a prefill works for whole prompts where the floor needs less."""
    monkeypatch.setattr(benchmark, "causal", lambda tokens: tokens * tokens)
    counted = {"rollout": 0, "scoring": 0, "update": 0}

    def counting(name, phase):
        inner = getattr(train_ppo, name)

        def call(*arguments):
            with FlopCounterMode(display=False) as counter:
                out = inner(*arguments)
            counted[phase] += counter.get_total_flops()
            return out
        monkeypatch.setattr(train_ppo, name, call)

    for name, phase in (("roll_out", "rollout"), ("score_rollout", "scoring"), ("update", "update")):
        counting(name, phase)
    o = benchmark.Options(what="ppo", device="cpu", **lora)
    benchmark.time_ppo(o, work, 0)
    cost = {phase: flops for phase, (flops, _) in benchmark.ppo_cost(work, o).items()}
    assert counted["scoring"] == cost["scoring"] and counted["update"] == cost["update"]
    assert 0.85 < counted["rollout"] / cost["rollout"] < 1.3


@both_works
@ADAPTERS
@pytest.mark.parametrize("what", ["sft", "reward"])
def test_flops_of_a_step_are_those_that_torch_counts(monkeypatch, tiny, what, work, lora):
    monkeypatch.setattr(benchmark, "causal", lambda tokens: tokens * tokens)
    monkeypatch.setattr(kernels, "pick_matmul", lambda model: None)  # which multiplies
    with FlopCounterMode(display=False) as counter:
        o = benchmark.Options(what=what, device="cpu", **lora)
        benchmark.time_step(o, work, 0, 3)
    assert counter.get_total_flops() == benchmark.step_cost(work, what, 3, o)["step"][0]


def test_bytes_by_hand():
    """An optimizer step moves 7 float32 numbers a weight; a decode step reads the policy's matrices and its cache."""
    trained = sum(benchmark.parameters(TINY, head) for head in ("lm", "scalar"))
    matrices, cached = 3 * 12 * 16 ** 2 + 29 * 16, 2 * 3 * 16 * 4 * (4 + 5 + 6 + 7)  # keys of 4 to 7 tokens, 4 rows
    moved = {phase: moved for phase, (_, moved) in benchmark.ppo_cost(TINY, WHOLE, itemsize=2).items()}
    assert moved == {"rollout": 2 * (5 * matrices + cached), "scoring": 2 * (4 * matrices - 2 * 29 * 16),
                     "update": 2 * 2 * 7 * 4 * trained}
    # Llama's caches hold 2 heads of 6 channels, not 16 channels: the rest of a rollout is its matrices, read 5 times
    matrices, cached = 3 * (768 + 384 + 1152) + 29 * 16, 2 * 3 * 12 * 4 * 22
    assert benchmark.ppo_cost(TINY_LLAMA, WHOLE, itemsize=2)["rollout"][1] == 2 * (5 * matrices + cached)


def test_every_answer_has_its_full_length(monkeypatch, tiny):
    """No token is the end of text, so all rows decode to the last step."""
    rollouts, inner = [], train_ppo.roll_out
    monkeypatch.setattr(train_ppo, "roll_out", lambda *arguments: rollouts.append(inner(*arguments)) or rollouts[-1])
    benchmark.time_ppo(benchmark.Options(what="ppo", device="cpu"), TINY, 1)
    assert [r.lengths.tolist() for r in rollouts] == [[8] * 4] * 2
    assert not torch.equal(rollouts[0].tokens, rollouts[1].tokens)


def test_ppo_s_line(tiny, capsys):
    """The keys that comparisons read; sums and ratios of its own figures."""
    (r,) = lines(capsys, "--what", "ppo", "--iters", "3", "--json")
    assert PPO_KEYS | OWN_KEYS <= r.keys() and (r["what"], r["iters"], r["batch"]) == ("ppo", 3, 4)
    assert r["min_total_s"] <= r["total_s"] <= r["max_total_s"]
    for phase in ("rollout", "scoring", "update", "total"):
        flops, moved = benchmark.ppo_cost(TINY, WHOLE).get(phase, (0, 0))
        if phase != "total":
            assert r["floor_s"][phase] == pytest.approx(max(flops / 100, moved / 20) / 1e9, rel=1e-3)
        assert r["floor_ratio"][phase] == pytest.approx(r[f"{phase}_s"] / r["floor_s"][phase], rel=1e-3)
        assert r["mfu"][phase] == pytest.approx(r["gflop"][phase] / r[f"{phase}_s"] / 100, rel=1e-3)
    assert r["rollout_tok_s"] == pytest.approx(4 * 5 / r["rollout_s"], rel=1e-3)
    assert r["floor_s"]["total"] == pytest.approx(sum(r["floor_s"][p] for p in ("rollout", "scoring", "update")),
                                                  rel=1e-3)


@pytest.mark.parametrize("what, rows", [("sft", 1), ("reward", 2)])
def test_a_step_s_line(tiny, capsys, what, rows):
    (r,) = lines(capsys, "--what", what, "--iters", "2", "--batch", "3", "--json")
    assert STEP_KEYS | OWN_KEYS <= r.keys() and (r["what"], r["batch"], r["length"]) == (what, 3, 64)
    assert r["tok_s"] == pytest.approx(3 * rows * 64 / r["step_s"], rel=1e-3)


def test_what_others_take(monkeypatch):
    """In 10 seconds the cores were busy for 14, 4 of them with this: of two cores' 20 seconds others had a half."""
    monkeypatch.setattr(kernels, "cores_allowed", lambda: 2)
    at = iter([(5.0, 100.0, 7.0), (15.0, 114.0, 11.0), (16.0, 114.5, 12.0)])
    monkeypatch.setattr(kernels.Load, "read", staticmethod(lambda: next(at)))
    load = kernels.Load()
    assert load.others() == 0.5
    assert load.others() == round(9.5 / 11 / 2, 3)
    monkeypatch.setattr(kernels.Load, "read", staticmethod(lambda: None))
    assert kernels.Load().others() is None


def test_the_table(tiny, capsys):
    """One line a phase, with its rate: 4 x 5 new tokens a rollout."""
    benchmark.main(["--what", "ppo", "--iters", "1", "--device", "cpu"])
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert {"PPO rollout", "PPO scoring", "PPO update", "PPO iteration"} <= rows.keys()
    seconds, _, tokens = rows["PPO rollout"][:3]
    assert float(tokens.replace(",", "")) * float(seconds) == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_slope_of_a_power_law(exponent):
    assert benchmark.slope([1, 2, 4, 8], [3 * x ** exponent for x in (1, 2, 4, 8)]) == pytest.approx(exponent)


def test_slope_is_least_squares():
    """Through log points (0, 0), (1, 0), (2, 3): (-1 x -1 + 0 x -1 + 1 x 2) / 2 = 1.5."""
    assert benchmark.slope([1, math.e, math.e ** 2], [1, 1, math.e ** 3]) == pytest.approx(1.5)


def test_scaling_varies_one_dimension_at_a_time(monkeypatch, tiny, capsys):
    """A machine that takes a second a token and layer and none for width: slopes 1, R / (P + R), 0 and 1."""
    def timed(o, w, iters):
        return None, [[w.batch * (w.prompt + w.response) * w.layers]] * iters, 0.0
    monkeypatch.setattr(benchmark, "time_ppo", timed)
    found = {r["of"]: r for r in lines(capsys, "--scaling", "--json")}
    assert found["batch"]["slope"] == pytest.approx(1, abs=1e-3) and found["batch"]["values"] == [2, 4, 8, 16]
    assert 0.4 < found["response"]["slope"] < 1
    assert found["width"]["slope"] == 0 and found["layers"]["values"] == [2, 3, 6]
    assert 1 < found["width"]["flops_slope"] < 2


def test_adapters_in_more_blocks_than_there_are(monkeypatch, tiny, capsys):
    """They are in all: --scaling halves the blocks. --lora_layers without --lora_rank is told to have no effect."""
    half, o = replace(TINY, layers=1), benchmark.Options(lora_rank=2, lora_layers=2)
    for cost in (lambda o: benchmark.ppo_cost(half, o), lambda o: benchmark.step_cost(half, "sft", 3, o),
                 lambda o: benchmark.learned(half, o)):
        assert cost(o) == cost(replace(o, lora_layers=0))
    monkeypatch.setattr(benchmark, "measure", lambda o: {})
    monkeypatch.setattr(benchmark, "show", lambda result: None)
    for more in ([], ["--lora_rank", "2"]):
        benchmark.main(["--what", "ppo", "--device", "cpu", "--lora_layers", "2", *more])
        said = capsys.readouterr().out
        assert ("warning: --lora_layers has no effect with --lora_rank 0" in said) is (not more)


@pytest.mark.slow
def test_as_a_process():
    """What a user types: one JSON line a part, PPO's last, with a peak and a bandwidth that were measured."""
    done = subprocess.run([sys.executable, "-m", "minirlhf.benchmark", "--device", "cpu", "--batch", "4", "--iters", "1",
                           "--threads", "1", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=170,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["what"] for r in found] == ["sft", "reward", "ppo"]
    for r in found:
        assert r["peak_gflops"] == max(r["peaks_gflops"].values()) > 0 and r["read_gb_s"] > 0
        assert r["threads"] == 1 and r["device"] == "cpu" and r["dtype"] == "float32" and r["peak_rss_mb"] > 100


@pytest.mark.parametrize("arguments, said", [
    (["--batch", "6"], "--batch 6: must be a multiple of 4, for the minibatches of size S"),
    (["--scaling", "--batch", "4"], "--batch 4: must be a multiple of 8"),
    (["--scaling", "--what", "sft"], "--what sft: --scaling is of PPO"),
    (["--threads", "99999999999"], "--threads 99999999999: must be at most 1024"),
    (["--what", "ppo", "--device", "cuda:99"], "--device cuda:99: there is no such CUDA device"),
    (["--size", "XL"], "--size: invalid choice"),
])
def test_what_it_refuses(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert said in capsys.readouterr().err
