"""What scores an answer: a reward model, or a user's function of texts.

Both are called with a Rollout and give scores (B,), one an answer, each answer scored by itself.
"""
import importlib.util
import os
import sys
import traceback

import torch

from minirlhf import checkpoint
from minirlhf.config import fail


class RewardModel:
    """Scores by the scalar head at each answer's last token, on ids as they were sampled."""

    def __init__(self, model, tokenizer, run, name=""):
        self.model, self.tokenizer, self.run, self.name = model, tokenizer, run, name

    @torch.no_grad()
    def __call__(self, rollout, micro_batch_size=None):
        """Rollout -> scores (B,), float32. Exits 2 on one that is not finite, before anything is learned from it."""
        rows = torch.arange(len(rollout.lengths), device=rollout.lengths.device)
        scores = []
        for part in map(rollout.take, rows.split(micro_batch_size or len(rows))):
            with self.run.autocast():
                scores.append(self.model.score(part.tokens, part.lengths))
        scores = torch.cat(scores)
        if not scores.isfinite().all():
            row = int(scores.isfinite().int().argmin())
            fail(f"{self.name}: gives the score {float(scores[row])} to the completion "
                 f"{self.tokenizer.decode(rollout.responses()[row])[:60]!r}: stopped before the update; try "
                 "--dtype float32")
        return scores


class RewardFunction:
    """Scores by a function(prompts: list[str], completions: list[str]) -> list of numbers, in FILE.py:FUNCTION."""
    model = None

    def __init__(self, spec, tokenizer, run, option="--reward"):
        self.function, self.tokenizer, self.run, self.name = load_function(spec, option), tokenizer, run, spec
        self.option = option

    def __call__(self, rollout, micro_batch_size=None):
        """Rollout -> scores (B,), float32, all answers at once. Exits 2 where the function does not give numbers."""
        prompts = [self.tokenizer.decode(row[:n]) for row, n in
                   zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist())]
        completions = [self.tokenizer.decode(ids) for ids in rollout.responses()]
        told = f"{self.option} {self.name}"
        try:
            scores = list(self.function(list(prompts), list(completions)))
        except (Exception, SystemExit) as error:
            fail(f"{told}: raised {described(error)}")
        if len(scores) != len(prompts):
            fail(f"{told}: returned {len(scores)} scores for {len(prompts)} answers")
        for i, s in enumerate(scores):
            try:
                scores[i] = float(s)
            except Exception:
                fail(f"{told}: row {i}: expected a number, found {type(s).__name__}")
            if not abs(scores[i]) < 1e6:
                fail(f"{told}: row {i}: {scores[i]}, no number below a million, for the completion "
                     f"{completions[i][:60]!r}")
        return torch.tensor(scores, device=self.run.device)


def described(error):
    """"ValueError: its message (file.py:12)", the place being the last of the user's code."""
    places = traceback.extract_tb(error.__traceback__)
    where = f" ({places[-1].filename}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {error}{where}"


def load_function(spec, option="--reward"):
    """"path/module.py:function" -> the function. Exits 2 where there is none."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not os.path.isfile(path):
        fail(f"{option} {spec}: expected FILE.py:FUNCTION, with a file that exists")
    module_spec = importlib.util.spec_from_file_location("reward", path)
    module = sys.modules["reward"] = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # for what it imports from beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"{option} {spec}: importing it raised {described(error)}")
    if not callable(getattr(module, name, None)):
        fail(f"{option} {spec}: {path} has no function {name}")
    return getattr(module, name)


def is_function(spec):
    """True for "FILE.py:FUNCTION", as against the path of a reward model."""
    return spec.rpartition(":")[0].endswith(".py")


def load(spec, option, policy, tokenizer, policy_path, run):
    """A reward model's path, or FILE.py:FUNCTION -> what scores answers of `policy`. Exits 2 where they do not fit."""
    if option == "--reward" or is_function(spec):
        return RewardFunction(spec, tokenizer, run, option)
    model, own_tokenizer, _ = checkpoint.load(spec, ["rm"], run.device)
    checkpoint.compatible((policy, tokenizer), policy_path, (model, own_tokenizer), spec)
    return RewardModel(model, own_tokenizer, run, spec)


def files(spec):
    """The files that a reward is made of: what a resumed run must find unchanged."""
    return [spec.rpartition(":")[0] if is_function(spec) else checkpoint.file_of(spec)]
