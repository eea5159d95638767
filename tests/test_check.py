"""--check finds what it says it looks for: each of its lines, in each stage where it stands, is made to fail by
breaking the thing that it tests."""
import pkgutil
from types import SimpleNamespace

import pytest
import torch

from minirlhf import check, checkpoint
from minirlhf.data import Row

CLAIMS = {
    "sft": ["padding changes nothing in the model", "the KV cache changes nothing",
            "microbatch size changes no gradient", "a new model knows nothing", "at learning rate 0 no weight moves",
            "prompts and completions have the same ids wherever they are encoded", "eos is reachable",
            "saved and loaded is the same to the last bit"],
    "rm": ["padding changes nothing in the reward model", "a score does not depend on what else is scored",
           "microbatch size changes no gradient", "at learning rate 0 no weight moves",
           "prompts and completions have the same ids wherever they are encoded", "a text is scored at its eos",
           "saved and loaded is the same to the last bit"],
    "ppo": ["padding changes nothing in the policy", "padding changes nothing in the value network",
            "padding changes nothing in the reward model", "the KV cache changes nothing",
            "the sampler's log-probabilities are the trainer's", "the ratio is 1 before the first update",
            "microbatch size changes no gradient", "the KL from the SFT model is 0 at the start",
            "at learning rate 0 KL, approxkl and clipfrac stay 0",
            "policy and reward model see the same ids for the same text", "eos is reachable",
            "saved and loaded is the same to the last bit"],
    "dpo": ["padding changes nothing in the policy", "the KV cache changes nothing",
            "a log-probability does not depend on what else is in the pass", "all log-ratios are 0 at the start",
            "microbatch size changes no gradient", "the loss changes along its gradient as it should",
            "the reference stays as it is", "at learning rate 0 no weight moves",
            "prompts and completions have the same ids wherever they are encoded", "eos is a part of each answer",
            "saved and loaded is the same to the last bit"]}


@pytest.fixture
def checked(tiny):
    """checked(stage, *options) -> exit status, {claim: its line}, having printed a line for each claim, in order."""
    def call(stage, *options, without=(), **where):
        ended = tiny.train(stage, "--check", *options, **where)
        first, *lines, last = [line for line in ended.said.splitlines() if not line.startswith("warning: ")]
        claims = [claim for claim in CLAIMS[stage] if claim not in without]
        assert first.startswith("checks on cpu") and [line[6:].split(": ")[0] for line in lines] == claims, ended
        failed = [line for line in lines if line.startswith("FAIL  ")]
        assert all(line.startswith("ok    ") for line in lines if line not in failed) and not ended.error
        assert all("; likely cause: " in line for line in failed)
        assert last == (f"{len(failed)} checks failed" if failed else "all checks passed")
        assert ended.code == (1 if failed else 0) and (where or not ended.folder.exists())
        return ended.code, [line[6:].split(": ")[0] for line in failed]
    return call


REWARD = ("padding changes nothing in the reward model", "policy and reward model see the same ids for the same text")


@pytest.fixture
def letters(tiny):
    (tiny.folder / "letters.py").write_text("def count(prompts, completions):\n    return [*map(len, completions)]\n")
    return ["--reward", f"{tiny.folder}/letters.py:count"]


@pytest.mark.parametrize("stage, options, without", [
    ("sft", [], ()), ("sft", ["--optimizer", "adamw", "--long_prompts", "trim"], ()),
    ("sft", ["--init_from", "{sft}", "--dropout", "0.5"], ["a new model knows nothing"]),
    ("rm", ["--optimizer", "adamw"], ()), ("rm", ["--long_prompts", "trim", "--dropout", "0.5"], ()),
    ("ppo", ["--temperature", "0.7", "--ent_coef", "0.1"], ()),
    ("ppo", ["--value_init", "sft", "--num_ppo_epochs", "1", "--num_mini_batches", "4"], ()),
    ("dpo", ["--loss", "ipo", "--long_prompts", "trim"], ()), ("dpo", ["--loss", "simpo", "--beta", "2"], ()),
    ("dpo", ["--loss", "simpo", "--beta", "0.005"], ()),
    ("dpo", ["--reference", "{sft}", "--lora_rank", "2"], ["all log-ratios are 0 at the start"])])
def test_what_is_right_passes(tiny, checked, stage, options, without):
    """Every line says ok and the exit status is 0."""
    assert checked(stage, *(o.format(sft=tiny.sft) for o in options), without=without) == (0, [])


def test_a_reward_function_is_checked(checked, letters):
    """No line speaks of a reward model; the others stand."""
    assert checked("ppo", *letters, without=REWARD) == (0, [])


# ---- sabotage: (what is broken, how: the function -> another)


def leaking(of, over=torch.mean):
    """Hidden states that depend on all tokens of a row, padding included, in the models that `of` picks.

    over=torch.sum: padding of id 0 would not show."""
    def broken(hidden):
        def leak(self, tokens, cache=None, positions=None, select=None, **below):
            if not of(self):
                return hidden(self, tokens, cache, positions, select, **below)
            states = hidden(self, tokens, cache, positions, **below)
            states = states + 1e-2 * over(tokens.float(), 1)[:, None, None]
            return states if select is None else states.flatten(0, 1)[select]
        return leak
    return "minirlhf.model.GPT.hidden", broken


def unmerged():
    """Rows of bytes, where texts are encoded with merges."""
    return "minirlhf.data.encode_row", lambda f: lambda tokenizer, p, c, *more: Row(
        [tokenizer.eos, *p.encode(), *c.encode(), tokenizer.eos], 1 + len(p.encode()))


def drifting(owner):
    """An optimizer whose step moves weights at any rate."""
    return f"{owner}.step", lambda f: lambda self: [p.data.mul_(1.01) for g in self.param_groups for p in g["params"]]


def per_microbatch(loss):
    """A mean where a sum is divided later."""
    def broken(f):
        def mean(*terms):
            found = f(*terms)
            return (found[0] / len(terms[0]), found[1]) if isinstance(found, tuple) else found / len(terms[0])
        return mean
    return loss, broken


def copied(f):
    """A copy of a model under another head that is not quite it."""
    def with_head(self, head, *more):
        other = f(self, head, *more)
        if head == "lm":
            other.wte.weight.data *= 1.1
        return other
    return with_head


def other_tokenizer(f):
    def spoil(first, first_path, second, second_path):
        second[1].encode = lambda text: [*text.encode()]  # bytes, unmerged
    return spoil


def marked(f):
    """`checkpoint.load`, which marks the reward model, so that a sabotage can pick it."""
    def load(path, stages, device):
        model, *rest = f(path, stages, device)
        model.is_reward = stages == ["rm"]
        return model, *rest
    return load


def without_eos(f):
    def sample(logits, temperature, u):
        return f(logits.index_fill(1, torch.tensor([logits.shape[1] - 1]), -1e9), temperature, u)
    return sample


def falling(f):
    """Log-probabilities that are lower each time that they are computed."""
    calls = []

    def score_rollout(batch, *rest):
        f(batch, *rest)
        batch.logprobs = batch.logprobs - 0.1 * len(calls) * batch.response_mask
        calls.append(batch)
    return score_rollout


HALF = ("minirlhf.checkpoint.save", lambda f: lambda path, **parts: f(path, **parts, weights={
    name: value.half() for name, value in parts["model"].state_dict().items()}))
LAST_BIT = ("minirlhf.checkpoint.save", lambda f: lambda path, **parts: f(path, **parts, weights={
    name: value.nextafter(torch.tensor(9.0)) for name, value in parts["model"].state_dict().items()}))
RANKS = ("minirlhf.tokenizer.Tokenizer.from_state", classmethod(
    lambda cls, state: cls({token.encode("latin-1"): rank for rank, token in
                            enumerate([*state["ranks"][:-2], *state["ranks"][:-3:-1]])}, "bpe")))
SHIFTED = ("minirlhf.generate.KVCache.extend", lambda f: lambda self, layer, at, k, v: f(
    self, layer, (at + 1).clamp_max(self.k.shape[3] - 1), k, v))
UNSEEN = ("minirlhf.generate.KVCache.extend", lambda f: lambda self, layer, at, k, v: [
    x.index_fill(2, torch.tensor([0]), 0.0) for x in f(self, layer, at, k, v)])  # slot 0 reads as it was made
NO_EOS = ("minirlhf.tokenizer.Tokenizer.encode_completion", lambda f: lambda self, text: (
    self.encode(text) if len(text) % 2 else f(self, text)))
EVERYWHERE, SCALAR = leaking(lambda model: True), leaking(lambda model: model.head == "scalar")
SABOTAGE = {
    "sft": [
        (CLAIMS["sft"][0], *EVERYWHERE), (CLAIMS["sft"][0], *leaking(lambda model: True, torch.sum)),
        (CLAIMS["sft"][1], *SHIFTED), (CLAIMS["sft"][1], *UNSEEN),
        (CLAIMS["sft"][2], *per_microbatch("train_sft.sft_loss")),
        (CLAIMS["sft"][3], "minirlhf.model.GPT.logits", lambda f: lambda self, hidden: 400 * f(self, hidden)),
        (CLAIMS["sft"][4], *drifting("minirlhf.kernels.AdamW")), (CLAIMS["sft"][4], *drifting("minirlhf.kernels.Muon")),
        (CLAIMS["sft"][5], *unmerged()),
        (CLAIMS["sft"][6], "minirlhf.data.response_mask", lambda f: lambda p, n, T: f(p, n - 1, T)),
        (CLAIMS["sft"][6], *NO_EOS), (CLAIMS["sft"][7], *HALF), (CLAIMS["sft"][7], *LAST_BIT),
        (CLAIMS["sft"][7], *RANKS)],
    "rm": [
        (CLAIMS["rm"][0], *EVERYWHERE),
        (CLAIMS["rm"][1], "minirlhf.model.GPT.score", lambda f: lambda self, t, n: f(self, t, 0 * n + t.shape[1])),
        (CLAIMS["rm"][2], *per_microbatch("train_rm.bradley_terry_loss")),
        (CLAIMS["rm"][3], *drifting("minirlhf.kernels.AdamW")), (CLAIMS["rm"][3], *drifting("minirlhf.kernels.Muon")),
        (CLAIMS["rm"][4], *unmerged()), (CLAIMS["rm"][5], *NO_EOS), (CLAIMS["rm"][6], *HALF),
        (CLAIMS["rm"][6], *RANKS)],
    "ppo": [
        (CLAIMS["ppo"][0], *leaking(lambda model: model.head == "lm")),
        (CLAIMS["ppo"][1], *leaking(lambda model: model.head == "scalar" and not hasattr(model, "is_reward"))),
        (CLAIMS["ppo"][2], *leaking(lambda model: getattr(model, "is_reward", False))),
        (CLAIMS["ppo"][3], *SHIFTED), (CLAIMS["ppo"][3], *UNSEEN),
        (CLAIMS["ppo"][4], "minirlhf.generate.sample", lambda f: lambda logits, T, u: f(logits, 1.1 * T, u)),
        (CLAIMS["ppo"][5], "minirlhf.model.GPT.logprobs", lambda f: lambda self, tokens, decisions, T, below: f(
            self, tokens, decisions, 1.05 * T if torch.is_grad_enabled() else T, below)),
        (CLAIMS["ppo"][6], *per_microbatch("train_ppo.policy_loss")),
        (CLAIMS["ppo"][6], *per_microbatch("train_ppo.value_loss")),
        (CLAIMS["ppo"][7], "minirlhf.model.GPT.with_head", copied),
        (CLAIMS["ppo"][8], *drifting("minirlhf.kernels.AdamW")), (CLAIMS["ppo"][8], "train_ppo.score_rollout", falling),
        (CLAIMS["ppo"][9], "minirlhf.checkpoint.compatible", other_tokenizer),
        (CLAIMS["ppo"][10], "minirlhf.generate.sample", without_eos),
        (CLAIMS["ppo"][11], *HALF), (CLAIMS["ppo"][11], *RANKS)],
    "dpo": [
        (CLAIMS["dpo"][0], *EVERYWHERE), (CLAIMS["dpo"][1], *SHIFTED),
        (CLAIMS["dpo"][2], "minirlhf.dpo.response_mask", lambda f: lambda p, n, T: f(p, 0 * n + T, T)),
        (CLAIMS["dpo"][3], "minirlhf.model.GPT.with_head", copied),
        (CLAIMS["dpo"][4], *per_microbatch("minirlhf.dpo.dpo_loss")),
        (CLAIMS["dpo"][5], "minirlhf.dpo.dpo_loss", lambda f: lambda chosen, rejected, *more: f(
            chosen, rejected.detach(), *more)),
        (CLAIMS["dpo"][6], "minirlhf.model.GPT.with_head", lambda f: lambda self, head, *more: self),
        (CLAIMS["dpo"][7], *drifting("minirlhf.kernels.AdamW")), (CLAIMS["dpo"][8], *unmerged()),
        (CLAIMS["dpo"][9], "minirlhf.dpo.response_mask", lambda f: lambda p, n, T: f(p, n - 1, T)),
        (CLAIMS["dpo"][9], *NO_EOS), (CLAIMS["dpo"][10], *HALF), (CLAIMS["dpo"][10], *RANKS)]}


@pytest.fixture
def broken(monkeypatch):
    """broken(place, how): "module.Class.function" becomes how(it)."""
    def call(place, how):
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        monkeypatch.setattr(owner, name, how if isinstance(how, classmethod) else how(getattr(owner, name)))
    return call


def test_every_line_has_its_sabotage():
    """In every stage."""
    assert {stage: {claim for claim, *_ in rows} for stage, rows in SABOTAGE.items()} == {
        stage: {*claims} for stage, claims in CLAIMS.items()}


@pytest.mark.parametrize("stage, claim, place, how",
                         [(stage, *row) for stage, rows in SABOTAGE.items() for row in rows])
def test_a_sabotage_is_found(checked, broken, monkeypatch, stage, claim, place, how):
    """One thing is broken: its line says FAIL with a likely cause, the others stand as they stood, and the exit status
    is 1."""
    monkeypatch.setattr("minirlhf.runtime.torch.optim.Muon", pkgutil.resolve_name("minirlhf.kernels.Muon"))
    monkeypatch.setattr(checkpoint, "load", marked(checkpoint.load))
    broken(place, how)
    status, failed = checked(stage)
    assert status == 1 and claim in failed
    assert len(failed) < len(CLAIMS[stage]) / 2, failed  # what is sound still says so


@pytest.mark.parametrize("claim, place, how", [
    (CLAIMS["ppo"][0], *leaking(lambda model: model.head == "lm")), (CLAIMS["ppo"][1], *SCALAR),
    (CLAIMS["ppo"][8], *drifting("minirlhf.kernels.AdamW")),
    (CLAIMS["ppo"][10], "minirlhf.generate.sample", without_eos)])
def test_a_sabotage_is_found_with_a_reward_function(checked, broken, letters, claim, place, how):
    """Where there is no reward model the policy and the value network still are."""
    broken(place, how)
    status, failed = checked("ppo", *letters, without=REWARD)
    assert status == 1 and claim in failed


def test_a_run_that_goes_on_is_checked(tiny, checked, broken):
    """--resume --check looks at the run's own policy, whose KL is no longer 0, and leaves the run as it was; a
    weight that moves is found there too."""
    folder = tiny.train("ppo", "--kl_coef", "0").folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    options = {"without": [CLAIMS["ppo"][7]], "out": folder}
    assert checked("ppo", "--resume", "--kl_coef", "0", **options) == (0, [])
    broken(*drifting("minirlhf.kernels.AdamW"))
    status, failed = checked("ppo", "--resume", "--kl_coef", "0", **options)
    assert status == 1 and CLAIMS["ppo"][8] in failed
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_fails_on_another_rank_fails():
    """The first rank prints: it says FAIL, and on how many ranks, where its own figures are sound; all exit with 1."""
    said = []
    run = SimpleNamespace(say=said.append, total=lambda t: t + 2, world=4, dtype=torch.float32, hardware="cpu x 4",
                          stop=0)
    checks = check.Checks(run)
    checks("this holds", True, "0.0", "chance")
    run.total = lambda t: t
    checks("that holds", True, "0.0", "chance")
    checks("so does this", False, "1.0", "chance")
    with pytest.raises(SystemExit) as stop:
        checks.end()
    assert said[1:] == ["FAIL  this holds: 0.0 on 2 of 4 ranks; likely cause: chance", "ok    that holds: 0.0",
                        "FAIL  so does this: 1.0 on 1 of 4 ranks; likely cause: chance", "2 checks failed"]
    assert stop.value.code == 1


def test_limits():
    """What rounding may do is 1e-4 of a standard deviation in float32, 0.03 in bfloat16; not a number is a failure."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        checks = check.Checks(SimpleNamespace(say=print, total=lambda t: t, world=1, dtype=dtype, hardware="", stop=0))
        a = torch.linspace(-1, 1, 101)
        for gap in (2e-5, 2e-4, 1e-2, 0.1, float("nan")):
            checks.failed = 0
            checks.close("near", a, a + gap * a.std(correction=0), "chance")
            found.append(checks.failed)
    assert found == [0, 1, 1, 1, 1, 0, 0, 0, 1, 1]
