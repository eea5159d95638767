"""minirlhf.dpo against a second implementation without vectors, against a known optimum, and as a user runs it."""
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from conftest import ROOT, scratch, script
from minirlhf import adapters, checkpoint, config, dpo, evaluate, export, runtime, sample
from minirlhf.config import parse
from minirlhf.data import Order, Row, is_held_out, load_preferences
from minirlhf.model import GPT, GPTConfig

EOS = 0
DOUBLE = {"rtol": 1e-9, "atol": 1e-10}


def options(**changes):
    return replace(parse(dpo.Options, ["@scratch"]), **{"micro_batch_size": 2, "out_dir": "out"} | changes)


def run_of(rank=0, world=1):
    """What the functions need of a Run; sums over ranks are left to the test."""
    return types.SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext, world=world,
                                 share=lambda rows: rows[rank::world], sum_gradients=lambda parameters: None,
                                 totals=lambda sums: sums, total=lambda t: t, should_stop=lambda: False,
                                 say=lambda text: None, progress=lambda *told: "")


def record(*lengths, prompt=2, pairs=None, seed=0):
    """A record of texts that answer one prompt, as (rows, pairs, extra). They end with eos, which may stand in them."""
    g = random.Random(str((lengths, prompt, seed)))
    asked = [EOS, *(g.randrange(1, 13) for _ in range(prompt - 1))]
    rows = [Row([*asked, *(g.randrange(13) for _ in range(n - 1)), EOS], prompt) for n in lengths]
    return rows, pairs or [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))], {}


RECORDS = [record(3, 7), record(1, 5, 4, prompt=5), record(9, 2, 6, 4, prompt=1, pairs=[(0, 1), (0, 3), (2, 3)]),
           record(2, 2, prompt=3, seed=1), record(6, 1, prompt=8)]
RECORDS[4] = [replace(row, earlier=((2, 5),)) for row in RECORDS[4][0]], *RECORDS[4][1:]  # of a conversation


@pytest.fixture
def nets(make_model):
    """nets(o) -> policy and reference in float64; where a part of the policy learns, the rest is the reference's."""
    def make(o):
        policy, ref = (make_model(seed=seed, dtype=torch.double) for seed in (1, 2))
        if o.lora_rank or o.freeze_layers:
            g = torch.Generator().manual_seed(5)
            policy = adapters.learner(ref, "lm", o, g)
            for p in runtime.learning(policy):
                p.data += 0.2 * torch.randn(p.shape, dtype=p.dtype, generator=g)
        return policy, ref
    return make


# ---- a second implementation: pairs, tokens and terms one at a time


def naive_logp(model, row):
    total = 0.0
    for n in range(row.prompt_length, len(row.ids)):
        logits = model.hidden(torch.tensor([row.ids[:n]]))[0, -1] @ model.wte.weight.T
        total = total + logits[row.ids[n]] - torch.logsumexp(logits, 0)
    return total


def naive(policy, ref, records, o):
    """The gradient of the mean loss over pairs, and the means of what is logged, by name."""
    sums, count = dict.fromkeys(dpo.FIGURES, 0.0), 0
    for rows, pairs, *_ in records:
        own, theirs = [naive_logp(policy, row) for row in rows], [naive_logp(ref, row).item() for row in rows]
        for i, j in pairs:
            pi, base = [own[k] for k in (i, j)], [theirs[k] for k in (i, j)]
            length = [len(rows[k].ids) - rows[k].prompt_length for k in (i, j)]
            of = [pi[k] / length[k] if o.loss == "simpo" else pi[k] - base[k] for k in (0, 1)]
            h = of[0] - of[1]
            if o.loss == "ipo":
                loss = (h - 1 / (2 * o.beta)) ** 2
            elif o.loss == "simpo":
                loss = torch.log(1 + torch.exp(o.simpo_gamma - o.beta * h))
            else:
                right, wrong = (torch.log(1 + torch.exp(sign * o.beta * h)) for sign in (-1, 1))
                loss = (1 - o.label_smoothing) * right + o.label_smoothing * wrong
            r = [o.beta * x.item() for x in of]
            for name, x in zip(dpo.FIGURES, (loss, *r, (r[0] > r[1]) + 0.5 * (r[0] == r[1]), r[0] - r[1],
                                           *(x.item() for x in pi))):
                sums[name] = sums[name] + x
            count += 1
    (sums["loss"] / count).backward()
    return {name: float(x) / count for name, x in (sums | {"loss": sums["loss"].item()}).items()}


def with_reference(ref, records):
    return [(rows, pairs, torch.stack([naive_logp(ref, row).detach() for row in rows])) for rows, pairs, _ in records]


def gradients(model):
    found = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("changes", [
    {"beta": 0.1}, {"beta": 0.3, "label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.4},
    {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.7}, {"lora_rank": 3, "lora_layers": 1}, {"freeze_layers": 1}],
    ids=["dpo", "smoothed", "ipo", "simpo", "adapters", "the first block frozen"])
def test_a_batch_equals_the_naive_one(nets, changes):
    """Pairs and rankings, ragged, an answer of eos alone, an earlier answer in a prompt: loss, gradients and all
    figures are those of loops over pairs and tokens, in float64, whatever the microbatches."""
    o = options(**changes)
    policy, ref = nets(o)
    expected = naive(policy, ref, RECORDS, o)
    theirs = gradients(policy)
    batch = with_reference(ref, RECORDS)
    for size in (1, 2, 5):
        figures, pairs = dpo.batch_gradients(policy, batch, EOS, replace(o, micro_batch_size=size), run_of())
        assert pairs == 9 and figures == pytest.approx(expected, rel=1e-9)
        for ours, other in zip(gradients(policy), theirs, strict=True):
            assert (ours is None) == (other is None)
            assert ours is None or torch.allclose(ours, other, **DOUBLE)
    assert not any(p.grad is not None for p in ref.parameters())


def test_ranks_divide_by_the_pairs_of_all(nets):
    """Gradients and sums of two ranks, and of a third without a record, add up to those of one."""
    o = options()
    policy, ref = nets(o)
    batch = with_reference(ref, RECORDS[:2])
    whole, _ = dpo.batch_gradients(policy, batch, EOS, o, run_of())
    expected, parts, found, asked = gradients(policy), [], [], []
    for rank in range(3):
        run = run_of(rank, 3)
        run.sum_gradients = lambda parameters: asked.append(len([*parameters]))
        parts.append(dpo.batch_gradients(policy, batch, EOS, o, run)[0])
        found.append(gradients(policy))
    assert asked == [len(expected)] * 3  # after the last microbatch, of all parameters
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole)
    assert parts[2]["loss"] == 0
    for of_ranks, one in zip(zip(*found), expected):
        torch.testing.assert_close(sum(g for g in of_ranks if g is not None), one, **DOUBLE)


def test_many_texts_are_as_one(nets):
    """In passes of like length, each different one once, in any order; the same ids after a longer prompt are not the
    same answer."""
    policy, _ = nets(options())
    rows = [row for rows, *_ in RECORDS for row in rows]
    rows += [replace(rows[3], prompt_length=rows[3].prompt_length - 1), rows[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "ROWS", 3)
        found = dpo.text_logprobs(policy, run_of(), rows, EOS)
    torch.testing.assert_close(found, torch.stack([naive_logp(policy, row) for row in rows]), **DOUBLE)
    assert found[3] != found[-2] and found[0] == found[-1]


def test_the_reference_s_log_probabilities_do_not_depend_on_stops(make_model):
    """In float32, to the last bit: of a run that is stopped, prolonged, or has more epochs; those of a record are what
    its first epoch's passes give; nothing is computed that no step trains."""
    ref, run, o = make_model(), run_of(), options(batch_size=2)
    order = Order([9] * len(RECORDS), 2, 5)
    whole = dpo.reference_logprobs(ref, RECORDS, order, 0, 3, EOS, o, run)
    for step in range(3):
        some = order.batch(step)
        rows = [row for i in some for row in RECORDS[i][0]]
        assert torch.equal(torch.cat([whole[i] for i in some]), dpo.answer_logprobs(ref, run, rows, EOS))
    for first, steps in ((0, 2), (1, 3), (2, 3), (0, 4), (4, 7)):
        found = dpo.reference_logprobs(ref, RECORDS, order, first, steps, EOS, o, run)
        trained = {i for step in range(first, steps) for i in order.batch(step)}
        assert all(torch.equal(found[i], whole[i]) for i in trained)
        assert steps > 3 or all((found[i] != 0).any() == (i in trained) for i in range(len(RECORDS)))
    parts = [dpo.reference_logprobs(ref, RECORDS, order, 0, 3, EOS, o, run_of(rank, 2)) for rank in (0, 1)]
    for one, other, both in zip(*parts, whole):
        torch.testing.assert_close(one + other, both)
        assert not (one * other).any()


# ---- a known optimum: ref exp(r / beta) / Z, as PPO's


def test_one_token_reaches_the_known_optimum():
    """Answers of one token, pairs drawn by Bradley-Terry from a table of rewards: DPO's policy ends within a total
    variation of .03 of ref exp(r / beta) / Z, from above .3 at the start.   Rafailov et al. 2023, eq. 4"""
    rewards, beta, g = torch.tensor([0.5, -1.0, 1.0, 0.0, -0.5]), 0.7, torch.Generator().manual_seed(0)
    ref = GPT(GPTConfig(1, 1, 16, 5, 4)).init_weights(torch.Generator().manual_seed(0)).eval()
    ref.wte.weight.data *= 6  # an uneven start
    policy, run, o = ref.with_head("lm"), run_of(), options(beta=beta, lora_rank=0)
    pairs = [(i, j) for i in range(5) for j in range(i)] * 500
    wins = torch.rand(len(pairs), generator=g) < torch.tensor([rewards[i] - rewards[j] for i, j in pairs]).sigmoid()
    pairs = [pair if won else pair[::-1] for pair, won in zip(pairs, wins.tolist())]
    rows = [Row([1, token], 1) for token in range(5)]
    batch = [(rows, pairs, dpo.text_logprobs(ref, run, rows, EOS))]
    (adam,) = dpo.make_optimizers(policy, o)
    for step in range(120):
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 120)
        figures, _ = dpo.batch_gradients(policy, batch, EOS, o, run)
        adam.step(), adam.zero_grad()
    before, after = (model(torch.tensor([[1]]))[0, 0].detach().softmax(0) for model in (ref, policy))
    best = before * (rewards / beta).exp()
    best /= best.sum()
    assert (before - best).abs().sum() / 2 > 0.3
    assert (after - best).abs().sum() / 2 < 0.03
    assert figures["rewards/chosen"] > figures["rewards/rejected"]


# ---- a run: what it writes, says and leaves


@pytest.fixture(scope="module")
def ended(tiny):
    """A run of three steps, with an evaluation after each, on pairs."""
    ended = tiny.train("dpo", "--eval_interval", "1", "--num_eval_texts", "0", "--learning_rate", "0.03")
    assert ended.code == 0, ended
    return ended


def held_out(tiny, tokenizer, folder="data"):
    """(chosen, rejected) rows of the tiny world's held-out pairs that fit, by hand."""
    found = []
    for p in load_preferences(str(tiny.folder / folder / "preferences.val.jsonl")):
        prompt = [tokenizer.eos, *tokenizer.encode(p.prompt)]
        rows = [Row([*prompt, *tokenizer.encode(text), tokenizer.eos], len(prompt)) for text in p.completions]
        if all(len(row.ids) <= 12 for row in rows) and rows[0].ids != rows[1].ids:
            found.append(rows)
    return found


def test_the_held_out_figures_are_those_of_a_recount(tiny, ended):
    """Of the last evaluation: loss, rewards, accuracy and log-probabilities in metrics.jsonl and on the screen are what
    loops over the held-out pairs give for the saved policy; the KL's that of the answers."""
    policy, tokenizer, payload = checkpoint.load(str(ended.folder), ["dpo"], torch.device("cpu"))
    ref = checkpoint.load(tiny.sft, ["sft"], torch.device("cpu"))[0]
    rows, pairs = [], held_out(tiny, tokenizer)
    with torch.no_grad():
        for chosen, rejected in pairs:
            rows.append([(naive_logp(policy, row).item(), naive_logp(ref, row).item()) for row in (chosen, rejected)])
    r = [[0.1 * (pi - base) for pi, base in pair] for pair in rows]
    n, mean = len(rows), ended.rows()[-1]["eval"]
    expected = {
        "loss": sum(math.log1p(math.exp(lose - win)) for win, lose in r) / n,
        "rewards/chosen": sum(win for win, _ in r) / n, "rewards/rejected": sum(lose for _, lose in r) / n,
        "rewards/margins": sum(win - lose for win, lose in r) / n, "rewards/accuracies": sum(w > v for w, v in r) / n,
        "logps/chosen": sum(pair[0][0] for pair in rows) / n, "logps/rejected": sum(pair[1][0] for pair in rows) / n,
        "ref_logps/chosen": sum(pair[0][1] for pair in rows) / n,
        "ref_logps/rejected": sum(pair[1][1] for pair in rows) / n}
    assert {name: mean[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert mean["pairs"]["all"]["pairs"] == n and mean["pairs"]["all"]["accuracy"] == expected["rewards/accuracies"]
    assert payload["info"]["loss"] == mean["loss"]
    chosen, rejected = (f"{mean[f'logps/{k}']:.1f} ({mean[f'logps/{k}'] - mean[f'ref_logps/{k}']:+.1f})"
                        for k in ("chosen", "rejected"))
    assert (f"  held out: loss {mean['loss']:.4f}, accuracy {expected['rewards/accuracies']:.3f}, margin "
            f"{mean['rewards/margins']:+.3f}; log-probability of chosen texts {chosen}, of rejected {rejected}\n"
            ) in ended.said
    kl, end, length = mean["answers"]["kl"][0], mean["answers"]["eos_rate"], mean["answers"]["mean_length"]
    assert f"  answers: KL {kl:.2f} nats from the SFT model's, {end:.1%} end, {length:.1f} tokens\n" in ended.said
    assert re.search(rf"^KL from SFT, nats a response \(k1\) +0.00 \+- 0.00 +{kl:.2f} \+- ", ended.said, re.M)
    assert re.search(rf"^all +{n}  {expected['rewards/accuracies']:.3f}  ", ended.said, re.M)
    margins = [json.loads(line)["margin"] for line in
               (tiny.folder / "data" / "preferences.val.jsonl").read_text().splitlines()[:-1]]
    assert mean["pairs"]["pairs, margin 0.5-1"]["pairs"] == margins.count(1)


def test_the_first_step_is_that_of_a_recount(tiny, ended):
    """At the start policy and reference are one: the loss is log 2, rewards are 0 and pairs tied, to the last bit; the
    log line says the last step's."""
    first, *_, last = ended.rows()
    assert first["loss"] == pytest.approx(math.log(2)) and first["rewards/accuracies"] == 0.5
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert first["epoch"] == pytest.approx(1 / 3) and first["pairs"] == 4 and first["lr"] == 0.03
    line = (f"loss {last['loss']:.3f}  accuracy {last['rewards/accuracies']:.3f}  rewards "
            f"{last['rewards/chosen']:+.2f} {last['rewards/rejected']:+.2f}  lr {last['lr']:.1e}  grad "
            f"{last['grad_norm']:.2f}  {last['tokens_per_second']:,.0f} tokens/s")
    assert line in ended.said
    assert {*dpo.FIGURES, "step", "epoch", "lr", "grad_norm", "tokens_per_second", "pairs"} <= first.keys()


def test_the_log_probabilities_of_chosen_and_rejected_are_logged_apart(ended):
    """Chosen and rejected need not part in opposite directions: each has its own column and its own line."""
    rows = ended.rows()
    for name in ("chosen", "rejected"):
        assert len({row[f"logps/{name}"] for row in rows}) == 3 and all(row[f"logps/{name}"] < 0 for row in rows)
        change = [(row["eval"][f"logps/{name}"] - row["eval"][f"ref_logps/{name}"]) * 0.1 for row in rows]
        assert change == pytest.approx([row["eval"][f"rewards/{name}"] for row in rows], rel=1e-3, abs=1e-6)


def test_samples_are_the_answers_of_evaluate(tiny, ended, tmp_path):
    """`python -m minirlhf.evaluate` gives the KL, length and rates that the run gave, on the same prompts."""
    evaluate.main([str(ended.folder), "--baseline", tiny.sft, "--reward_model", tiny.rm, "--device", "cpu",
                   "--num_prompts", "4", "--prompts", str(tiny.folder / "data" / "prompts.val.jsonl"),
                   "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["policies"][str(ended.folder)]
    own = ended.rows()[-1]["eval"]["answers"]
    assert {name: found[name] for name in own} == own and {"score", "win_rate"} <= found.keys() - own.keys()
    assert [row["step"] for row in ended.rows("samples.jsonl")] == [1] * 4 + [2] * 4 + [3] * 4


def test_the_policy_goes_wherever_one_of_stage_3_goes(tiny, ended, tmp_path, capsys):
    """sample, inspect, export, PPO and a reward model that start from it, DPO once more with the first reference."""
    sample.main([tiny.sft, str(ended.folder), tiny.rm, "--prompt", "ad", "--response_length", "3", "--device", "cpu"])
    assert str(ended.folder) in capsys.readouterr().out
    export.inspect(str(ended.folder))
    export.export(str(ended.folder), str(tmp_path / "out"))
    assert capsys.readouterr().out.count("a DPO policy") == 2
    for stage, more in (("ppo", ["--reference", tiny.sft]), ("rm", []), ("dpo", ["--reference", tiny.sft])):
        further = tiny.train(stage, "--init_from", ended.folder, *more)
        assert further.code == 0, further
    assert "KL from SFT" in further.said and further.rows()[0]["rewards/chosen"] != 0


def test_the_command_that_it_prints_works(ended, capsys):
    command = re.search(r"next: (.*)\n", ended.said)[1]
    words = command[command.index("minirlhf.sample") + len("minirlhf.sample"):].split()
    sample.main([*words, "--device", "cpu", "--response_length", "3"])
    assert "ad" in capsys.readouterr().out


def test_the_reference_does_not_move(tiny, loaded):
    """Nor does the model that both start from, while the policy does."""
    payload = tiny.train("dpo").payload()
    (model, before), = loaded.values()
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    assert not torch.equal(payload["model"]["wte.weight"], before["wte.weight"])


def test_a_ranking_gives_all_its_pairs(tiny, tmp_path):
    """Three texts, of which two are tied, and one that is too long: two pairs of one record, in one pass."""
    for split in ("train", "val"):
        (tmp_path / f"preferences.{split}.jsonl").write_text(json.dumps(
            {"prompt": "a", "completions": ["df", "eg", "dh", "abcdefgh" * 3], "scores": [2, 1, 1, 0]}) + "\n")
    run = tiny.train("dpo", "--data_dir", tmp_path)
    assert "1 records with 3 texts and 2 pairs for training" in run.said and run.rows()[0]["pairs"] == 2
    assert "training texts: 1 of 4 longer than 12 tokens: dropped" in run.said


def test_length_alone_is_learned_from_training_pairs(tiny, tmp_path):
    """The longer text is the better one in training, the shorter one among held-out pairs: length alone is never
    right there."""
    for split, (chosen, rejected) in {"train": ("dfg.", "e"), "val": ("e", "dfg.")}.items():
        (tmp_path / f"preferences.{split}.jsonl").write_text(json.dumps(
            {"prompt": "a", "chosen": chosen, "rejected": rejected}) + "\n")
    run = tiny.train("dpo", "--data_dir", tmp_path)
    assert run.rows()[-1]["eval"]["pairs"]["all"]["length_only"] == 0


@pytest.mark.parametrize("options", [[], ["--loss", "ipo"], ["--loss", "simpo", "--beta", "2"], ["--lora_rank", "2"]],
                         ids=["dpo", "ipo", "simpo", "adapters"])
def test_training_parts_chosen_from_rejected(tiny, options):
    """A few epochs on the same pairs: held-out pairs of the same kind are parted, margins grow."""
    run = tiny.train("dpo", *options, "--num_train_epochs", "4", "--learning_rate", "0.03")
    first, last = run.rows()[0], run.rows()[-1]
    assert last["rewards/margins"] > first["rewards/margins"] and last["loss"] < first["loss"]
    assert last["eval"]["rewards/accuracies"] > 0.6


# ---- stops, refusals, warnings


def test_a_stop_before_the_first_step(tiny, monkeypatch):
    """While the reference is asked: what is saved is the start, and --resume ends as the run that never stopped."""
    straight = tiny.train("dpo")
    monkeypatch.setattr(runtime.Run, "should_stop", lambda run: True)
    stopped = tiny.train("dpo")
    assert stopped.code == 143 and "stopped; go on with: " in stopped.said and "minirlhf.dpo" in stopped.said
    assert stopped.payload()["training"]["step"] == 0
    monkeypatch.undo()
    again = tiny.train("dpo", "--resume", out=stopped.folder)
    assert again.code == 0
    assert all(torch.equal(x, again.payload()["model"][name]) for name, x in straight.payload()["model"].items())


def test_a_policy_is_prolonged_against_the_first_reference(tiny, ended):
    """A run whose rate fell to 0 is not made longer: the command of a run that goes on from it keeps its reference."""
    refused = tiny.train("dpo", "--resume", "--num_train_epochs", "2", out=ended.folder)
    assert refused.code == 2 and f"--reference {tiny.sft}" in refused.error and "minirlhf.dpo" in refused.error
    changed = tiny.train("dpo", "--resume", "--loss", "ipo", out=ended.folder)
    assert changed.code == 2 and "--loss ipo: this run had sigmoid, which cannot change" in changed.error


def test_a_longer_run_is_the_run_that_was_longer(tiny):
    """At a constant rate --resume --num_train_epochs 2 ends, to the last bit, as two epochs at once."""
    constant = ["--lr_schedule", "constant", "--warmup_ratio", "0"]
    straight = tiny.train("dpo", *constant, "--num_train_epochs", "2")
    short = tiny.train("dpo", *constant)
    longer = tiny.train("dpo", "--resume", "--num_train_epochs", "2", out=short.folder)
    assert longer.code == 0 and len(longer.rows()) == len(straight.rows()) == 6
    assert all(torch.equal(x, longer.payload()["model"][name]) for name, x in straight.payload()["model"].items())


@pytest.mark.parametrize("words, says", [
    (["--beta", "0"], "--beta 0.0: must be greater than 0"), (["--label_smoothing", "0.5"], "must be less than 0.5"),
    (["--loss", "hinge"], "invalid choice: 'hinge'"), (["--init_from", "{rm}"], "holds a reward model"),
    (["--init_from", "none.pt"], "run train_sft.py"), (["--response_length", "12"], "leaves room for it"),
    (["--preferences", "nothing"], "no such file"), (["--max_steps", "-1"], "must be at least 0"),
    (["--reference", "{rm}"], "holds a reward model"), (["--checkpoint_activations", "--compile"], "excludes"),
    (["--lora_rank", "2", "--freeze_layers", "1"], "excludes")])
def test_what_is_refused(tiny, words, says):
    """In one line, with nothing written."""
    run = tiny.train("dpo", *(word.format(rm=tiny.rm) for word in words))
    assert run.code == 2 and says in run.error and not run.folder.exists()
    assert "invalid" in says or run.error.count("\n") == 1


def test_what_is_not_finite_stops_before_the_update(tiny):
    """A rate that destroys the weights: one line, and the last good checkpoint is kept."""
    run = tiny.train("dpo", "--learning_rate", "1e30", "--max_grad_norm", "0", "--num_train_epochs", "3")
    assert run.code in (1, 2) and "finite" in run.error and "--learning_rate" in run.error


def test_no_pair_is_left(tiny, tmp_path):
    """Equal once they are cut to the context, or tied: refused before anything is written."""
    for split in ("train", "val"):
        (tmp_path / f"preferences.{split}.jsonl").write_text(json.dumps(
            {"prompt": "a", "chosen": "abcdefgh" * 3 + "a", "rejected": "abcdefgh" * 3 + "b"}) + "\n")
    run = tiny.train("dpo", "--data_dir", tmp_path, "--long_prompts", "trim")
    assert run.code == 2 and "no record is left" in run.error and not run.folder.exists()


MEANS = {"loss": 0.6, "rewards/accuracies": 0.75, "rewards/margins": 0.25, "logps/chosen": -41.04,
         "ref_logps/chosen": -40.0, "logps/rejected": -45.5, "ref_logps/rejected": -42.0}


def test_what_an_evaluation_says():
    assert dpo.describe(MEANS) == ("loss 0.6000, accuracy 0.750, margin +0.250; log-probability of chosen texts -41.0 "
                                   "(-1.0), of rejected -45.5 (-3.5)")


@pytest.mark.parametrize("lost, eos, says", [
    (4.0, 0.45, {}), (4.5, 0.45, {"chosen": "chosen texts have lost 4.5 nats"}), (-9.0, 0.5, {}),
    (0.0, 0.44, {"eos": "44% of the answers end within 48 tokens, of the reference's 90%"})])
def test_what_a_person_is_warned_about(lost, eos, says):
    """More than a tenth of what chosen texts had, under half of the ends."""
    found = dict(dpo.concerns(MEANS | {"logps/chosen": -40.0 - lost}, {"eos_rate": 0.9}, {"eos_rate": eos},
                              options(response_length=48)))
    assert found.keys() == says.keys() and all(says[cause] in text for cause, text in found.items())


def test_a_warning_is_said_once(tiny):
    run = tiny.train("dpo", "--num_train_epochs", "4", "--learning_rate", "0.3", "--eval_interval", "3")
    assert run.said.count("warning: chosen texts have lost ") == 1 and len(run.rows()) == 12


def test_prompts_of_the_preferences_where_there_are_no_others(tiny, tmp_path):
    """Each once, those held out; with prompts.val.jsonl its own."""
    rows = [{"prompt": p, "chosen": "x", "rejected": c} for p in "abcdefgh" for c in "yz"]
    (tmp_path / "preferences.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = checkpoint.load(tiny.sft, ["sft"], torch.device("cpu"))[1]
    o = options(data_dir=str(tmp_path), response_length=3, val_share=0.4, num_eval_prompts=9)
    found = [prompt.text for prompt in dpo.read_prompts(o, tokenizer, 12)]
    assert found == [p for p in "abcdefgh" if is_held_out(p, 0.4)] and 1 < len(found) < 8
    assert [prompt.text for prompt in dpo.read_prompts(replace(o, num_eval_prompts=1), tokenizer, 12)] == found[:1]
    (tmp_path / "prompts.val.jsonl").write_text('{"prompt": "zz"}\n')
    assert [prompt.text for prompt in dpo.read_prompts(o, tokenizer, 12)] == ["zz"]


def test_commands_of_the_stage(monkeypatch):
    """As it is started: as a module, by torchrun where the run was, with the file of options that has most of it."""
    o = parse(dpo.Options, ["@scratch", "--beta", "0.3"])
    monkeypatch.chdir(ROOT)
    assert runtime.command_line("dpo", o, resume=True) == "python -m minirlhf.dpo @scratch --resume --beta 0.3"
    for name, value in zip(config.RANKS, ("0", "2", "0", "localhost", "29500")):
        monkeypatch.setenv(name, value)
    assert runtime.command_line("dpo", o).startswith("torchrun --nproc_per_node=2 -m minirlhf.dpo @scratch")
    assert runtime.start_of("minirlhf.sample") == "python -m minirlhf.sample"


def test_files_of_options_fit_the_earlier_stages():
    """Each file of options has a section for it, in a folder of its own, and starts from what stage 1 leaves."""
    for name in config.presets():
        sft, o = (parse(script(stage).Options, [f"@{name}"]) for stage in ("sft", "dpo"))
        assert o.init_from == f"{sft.out_dir}/ckpt.pt" and o.out_dir == sft.out_dir[:-3] + "dpo"
        assert (o.data_dir, o.lora_rank, o.max_steps, o.beta) == (sft.data_dir, 0, 0, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--lora_rank", "4"]], ids=["all", "adapters"])
def test_two_ranks_train_as_one(tiny, tmp_path, options):
    """Under torchrun each rank takes half of every batch, and asks the reference about its half."""
    losses = []
    for n, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--nproc_per_node=2"])):
        words = [*scratch("dpo"), "--device", "cpu", "--dtype", "float32", "--data_dir", tiny.folder / "data",
                 "--init_from", tiny.sft, *tiny.STAGES["dpo"].split(), "--num_train_epochs", "3", *options]
        subprocess.run([sys.executable, *launcher, "-m", "minirlhf.dpo", *map(str, words), "--out_dir", f"out{n}"],
                       cwd=tmp_path, check=True, capture_output=True, timeout=600,
                       env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""})
        losses.append([json.loads(line)["loss"] for line in open(tmp_path / f"out{n}" / "metrics.jsonl")])
    assert len(losses[0]) == 9 and losses[0] == pytest.approx(losses[1], rel=1e-3)
