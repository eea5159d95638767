"""What judges an answer: a reward model, or a user's function on texts."""
import importlib.util
import os
import sys

import torch

from minirlhf.config import fail


class Judge:
    """Scores of answers by a reward model, or by a user's function (row by row on texts)."""

    def __init__(self, run, tokenizer, model=None, function=None, name=""):
        self.run, self.tokenizer, self.model, self.function, self.name = run, tokenizer, model, function, name

    @torch.no_grad()
    def __call__(self, rollout):
        """Rollout -> scores (B,), float32, on the run's device."""
        if self.model is not None:
            with self.run.autocast():
                scores = self.model.score(rollout.tokens, rollout.lengths)
            if not scores.isfinite().all():
                row = int(scores.isfinite().int().argmin())
                fail(f"{self.name}: gives the score {float(scores[row])} to the completion "
                     f"{self.tokenizer.decode(rollout.responses()[row])[:60]!r}: stopped before the update; try "
                     "--dtype float32")
            return scores
        prompts = [self.tokenizer.decode(row[:n]) for row, n in
                   zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist())]
        completions = [self.tokenizer.decode(ids) for ids in rollout.responses()]
        try:
            scores = list(self.function(prompts, completions))
        except (Exception, SystemExit) as error:
            fail(f"--reward {self.name}: raised {type(error).__name__}: {error}")
        if len(scores) != len(prompts):
            fail(f"--reward {self.name}: returned {len(scores)} scores for {len(prompts)} answers")
        for i, s in enumerate(scores):
            try:
                scores[i] = float(s)
            except Exception:
                fail(f"--reward {self.name}: row {i}: expected a number, found {type(s).__name__}")
            if not abs(scores[i]) < 1e6:
                fail(f"--reward {self.name}: row {i}: {scores[i]}, no number below a million, for the completion "
                     f"{completions[i][:60]!r}")
        return torch.tensor(scores, device=self.run.device)


def load_function(spec):
    """"path/module.py:function" -> the function. Exits 2 where there is none."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not os.path.isfile(path):
        fail(f"--reward {spec}: expected FILE.py:FUNCTION, with a file that exists")
    module_spec = importlib.util.spec_from_file_location("reward", path)
    module = sys.modules["reward"] = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # for what it imports from beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"--reward {spec}: importing it raised {type(error).__name__}: {error}")
    if not callable(getattr(module, name, None)):
        fail(f"--reward {spec}: {path} has no function {name}")
    return getattr(module, name)
