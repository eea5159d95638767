"""What the test files share: the package on the path, and small models whose leaks would show."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minirlhf.model import GPT, GPTConfig  # noqa: E402


@pytest.fixture
def make_model():
    """make_model(head="lm", **shape) -> GPT in eval mode, every parameter N(0, 0.4), LayerNorms' weights N(1, 0.4).

    That is 20 times GPT-2's initial weights: attention is sharp and biases are not 0, so that whatever reaches a token
    that should not moves its numbers by far more than rounding does.
    """
    def make(head="lm", seed=9, dtype=torch.float32, **shape):
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 13, "block_size": 32} | shape
        model = GPT(GPTConfig(**shape), head)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            torch.nn.init.normal_(p, mean, 0.4, generator=generator)
        return model.to(dtype).eval()
    return make


@pytest.fixture
def refused(capsys):
    """refused(function, *arguments) -> what it said on standard error, having ended with exit status 2 in one line."""
    def check(function, *arguments, **options):
        with pytest.raises(SystemExit) as stop:
            function(*arguments, **options)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error
    return check
