"""What stage 2 says of its model: intervals, calibration, verdict."""
import contextlib
import math
import types

import pytest
import torch

import train_rm
from minirlhf.data import Preference, Row, encode_preferences, load_parts, load_prompts
from minirlhf.evaluate import accuracy_with_interval, calibration, score_all, verdict
from minirlhf.tokenizer import Tokenizer


def test_scores_do_not_depend_on_the_batch(make_model):
    """Rows of any length, in any order, some twice: each score, and its gradient, is that of the row alone."""
    class Here:
        device = torch.device("cpu")
        autocast = contextlib.nullcontext

    g = torch.Generator().manual_seed(0)
    model = make_model(head="scalar", dtype=torch.float64)
    rows = [Row(torch.randint(13, (n,), generator=g).tolist(), 1) for n in (3, 9, 2, 5, 9, 4, 1)]
    rows += [rows[1], rows[0]]
    scores = score_all(model, Here, rows, 12, 2)
    alone = torch.cat([model.score(torch.tensor([row.ids]), torch.tensor([len(row.ids)])) for row in rows])
    torch.testing.assert_close(scores, alone)
    weights = torch.randn(len(rows), generator=g, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * x).sum(), list(model.parameters())) for x in (scores, alone)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_the_scale_is_set_on_the_prompts_of_training(tmp_path):
    """In their order, as often as it takes; those that leave no room for an answer are left out; where there are none
    the preferences' own are taken. Held-out ones never, also where they stand in the same file."""
    tokenizer = types.SimpleNamespace(encode_prompt=lambda text: [0, *map(ord, text)], eos=0)
    o = types.SimpleNamespace(data_dir=str(tmp_path), preferences=("p",), response_length=4, long_prompts="drop",
                              num_scale_samples=5, val_share=0.05)
    (tmp_path / "p.train.jsonl").write_text('{"prompt": "c", "chosen": "x", "rejected": "y"}\n')
    (tmp_path / "prompts.val.jsonl").write_text('{"prompt": "v"}\n')
    assert train_rm.read_scale_prompts(o, tokenizer, 8) == ([[0, ord("c")]] * 5, [])
    path = tmp_path / "prompts.train.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "too long"}\n{"prompt": "bb"}\n')
    a, b = [0, ord("a")], [0, ord("b"), ord("b")]
    assert train_rm.read_scale_prompts(o, tokenizer, 8) == ([a, b, a, b, a], [str(path)])
    (tmp_path / "prompts.val.jsonl").unlink()
    path.write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdefghij"))
    o.val_share, o.num_scale_samples = 0.3, 40
    _, held_out, *_ = load_parts(load_prompts, "prompts", o)
    drawn = {chr(ids[1]) for ids in train_rm.read_scale_prompts(o, tokenizer, 8)[0]}
    assert held_out and drawn == {*"abcdefghij"} - {*held_out}


def test_scores_of_sft_samples_get_mean_0_and_deviation_1(make_model):
    """Gain and bias are set so, from a scale and bias that are neither, over the samples that stage 3 would see."""
    sft, model = make_model(), make_model("scalar", seed=2)
    model.score_head.bias.data.fill_(3.0)
    model.gain.fill_(0.4), model.bias.fill_(-1.5)
    run = types.SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    o, tokenizer = types.SimpleNamespace(seed=1, response_length=8), types.SimpleNamespace(eos=0)
    prompts = [[1 + n % 12, 1 + n % 5] for n in range(200)]
    train_rm.set_scale(model, sft, run, tokenizer, prompts, o)
    mean, std = train_rm.set_scale(model, sft, run, tokenizer, prompts, o)  # the same samples, looked at again
    assert mean == pytest.approx(0, abs=1e-5) and std == pytest.approx(1, abs=1e-5)


def test_accuracy_by_hand():
    """Three of five pairs are right, one is tied and counts half: 3.5 / 5."""
    better, worse = torch.tensor([1.0, 2, 3, 0, 5]), torch.tensor([0.0, 1, 4, 0, 4])
    accuracy, low, high = accuracy_with_interval(better, worse, [(("a", i), ("b", i)) for i in range(5)])
    assert accuracy == pytest.approx(0.7) and low <= 0.7 <= high


def test_interval_knows_that_pairs_share_texts():
    """400 pairs of 40 texts tell less than 400 pairs of 800: the interval is wider than the binomial one, 1.96
    sqrt(p q / n) on each side, where one text is in many pairs, and about that where each is in one."""
    g = torch.Generator().manual_seed(0)
    quality = torch.rand(40, generator=g)  # how often a text is scored rightly
    pairs = [(int(i), int(j)) for i, j in torch.randint(40, (400, 2), generator=g) if i != j]
    right = torch.tensor([float(torch.rand((), generator=g) < (quality[i] + quality[j]) / 2) for i, j in pairs])
    _, low, high = accuracy_with_interval(right, torch.full_like(right, 0.5), [((i,), (j,)) for i, j in pairs])
    p = float(right.mean())
    assert high - low > 1.2 * 2 * 1.96 * math.sqrt(p * (1 - p) / len(pairs))


def figures(**changes):
    return {"all": {"pairs": 500, "accuracy": 0.75, "low": 0.72, "high": 0.78, "length_only": 0.52} | changes}


@pytest.mark.parametrize("changes, opening", [
    ({}, "Good enough"), ({"low": 0.49}, "Not good enough"), ({"length_only": 0.73}, "Not good enough"),
    ({"accuracy": 0.6, "low": 0.56}, "Weak"), ({"pairs": 12}, "Too few"),
])
def test_verdict(changes, opening):
    """Chance, length alone, a low accuracy and too small a sample each have their sentence."""
    assert verdict(figures(**changes), {"ece_with_temperature": 0.01, "temperature": 1.0}).startswith(opening)


def test_calibration_finds_the_temperature():
    """Outcomes drawn with probability sigmoid(d / 2) need a temperature of 2; dividing by it makes them calibrated."""
    g = torch.Generator().manual_seed(0)
    d = 3 * torch.randn(20000, generator=g, dtype=torch.double)
    won = torch.rand(20000, generator=g, dtype=torch.double) < torch.sigmoid(d / 2)
    found = calibration(torch.where(won, d, -d))
    assert found["temperature"] == pytest.approx(2, rel=0.05)
    assert found["ece_with_temperature"] < 0.02 < found["ece"]


def test_records_without_a_usable_pair_are_dropped():
    """Equal texts, tied texts and, once cut to the context, equal ids teach nothing; of a ranking the rest stays."""
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, "bytes")
    records = [Preference("", ["a", "a"]), Preference("", ["a", "b"], [1.0, 1.0]),
               Preference("", ["abcdefX", "abcdefY"]), Preference("", ["a", "b", "b"], [2.0, 1.0, 1.0])]
    kept, dropped, rows = encode_preferences(tokenizer, records, 6, "trim")
    assert dropped == {"no two texts that differ and are not tied": 3} and len(rows) == 9
    assert [pairs for _, pairs, _ in kept] == [[(0, 1), (0, 2)]]
