"""GPT-2's architecture, with a language-model head or a scalar head on one trunk.

Invariant: padding lies on the right, so a causal mask alone keeps every real token from seeing it. With a cache, query
t of row b sits in slot positions[b, t] and sees slots <= that: prefill and decode are one code path.

Shapes: B rows, T tokens, S cache slots, C channels, H heads, D head size, V words; N selected places of the B T.

Left out: attention masks, position shifts, and vocabularies padded to a round size (their extra tokens would have to be
masked in every softmax).
"""
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def flat_indices(mask):
    """Where a mask (B, T) is True, row after row, as indices into (B T,): (N,)."""
    return mask.flatten().nonzero().squeeze(1)


def at_least_float32(x):
    """In half precision losses, KL and log-softmax lose their digits."""
    return x.float() if x.dtype.itemsize < 4 else x


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    dropout: float = 0.0


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, extend=None, select=None):
        """(B, T, C) -> (B, T, C), or of the places in `select` alone (N, C).

        mask: None for plain causal attention, else additive (B or 1, 1, T, S) with -inf where a slot is unseen.
        extend: takes this layer's new keys and values (B, T, H, D) into a cache, returns all of them (B, S, H, D).
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).contiguous()  # attention's kernels want D to be the innermost
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D)
        if extend is not None:
            k, v = extend(k, v)  # (B, S, H, D)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T or S, D)
        dropout = self.dropout if self.training else 0.0
        # for several queries explicit matmuls beat F.scaled_dot_product_attention's CPU kernels under oneDNN
        if x.device.type == "cpu" and mask is not None and T > 1:
            weights = (q @ k.mT).mul_(1 / math.sqrt(C // self.n_head)).add_(mask).softmax(-1)
            y = F.dropout(weights, dropout) @ v
        else:
            mask = None if mask is None else mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        y = y if select is None else y.flatten(0, 1).index_select(0, select)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, mask, extend=None, select=None):
        y = self.attn(self.ln_1(x), mask, extend, select)
        x = (x if select is None else x.flatten(0, 1).index_select(0, select)) + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Radford et al. 2019: pre-LayerNorm, learned positions, tanh GELU, biases, output tied to the token embedding.

    head="lm":     logits = hidden @ wte.T
    head="scalar": scalar = (hidden @ w + b) * gain + bias; gain and bias are buffers that set the reward's scale
    Parameter names are GPT-2's; linear weights are (out, in), the transpose of GPT-2's own files.
    """

    def __init__(self, config: GPTConfig, head: str = "lm"):
        super().__init__()
        assert head in ("lm", "scalar") and config.n_embd % config.n_head == 0
        self.config, self.head = config, head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if head == "scalar":
            self.score_head = nn.Linear(config.n_embd, 1)
            self.register_buffer("gain", torch.ones(()))
            self.register_buffer("bias", torch.zeros(()))

    def init_weights(self, generator: torch.Generator):
        """GPT-2's: N(0, 0.02), residual projections divided by sqrt(2 n_layer), biases 0. Scalar head: `init_score`."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not name.startswith("score_head"):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, 0.0, std, generator=generator)
        if self.head == "scalar":
            self.init_score(generator)
        return self

    def init_score(self, generator: torch.Generator):
        """N(0, 1/(d+1)), that is a standard deviation of 1/sqrt(d+1); bias 0.   Stiennon et al. 2020, code."""
        std = 1 / math.sqrt(self.config.n_embd + 1)
        self.score_head.weight.data.copy_(torch.empty(1, self.config.n_embd).normal_(0.0, std, generator=generator))
        nn.init.zeros_(self.score_head.bias)
        return self

    def with_head(self, head: str, dropout: float = 0.0) -> "GPT":
        """A copy of this model under `head`. From a language model, a scalar head is left at zero; from a scalar one,
        it is copied, its scale included."""
        other = GPT(replace(self.config, dropout=dropout), head).to(self.wte.weight.device)
        if head == "scalar":
            nn.init.zeros_(other.score_head.weight)
            nn.init.zeros_(other.score_head.bias)
        own = other.state_dict()
        other.load_state_dict(own | {k: v for k, v in self.state_dict().items() if k in own})
        return other

    # ---- from tokens to hidden states (B, T, C)

    def hidden(self, tokens, cache=None, positions=None, select=None):
        """Hidden states after the last LayerNorm: tokens (B, T) -> (B, T, C), or of some places alone (N, C).

        cache: a generate.KVCache, in which the tokens take the slots `positions` (B or 1, T).
        select: `flat_indices` of the states that are wanted; of the others the last block makes only keys and values.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None or tokens.device.type == "cpu":
            slots = torch.arange(T if cache is None else cache.filled, device=tokens.device)
            unseen = slots > positions[:, None, :, None]  # (B or 1, 1, T, S)
            mask = torch.zeros(unseen.shape, device=tokens.device).masked_fill_(unseen, -torch.inf)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, mask, partial(cache.extend, i, positions) if cache is not None else None,
                      select if i + 1 == len(self.h) else None)
        return self.ln_f(x)

    compiled_hidden = decoder = None  # generate.compile_model sets them

    def states(self, tokens, select):
        """Hidden states (N, C) of some places in tokens (B, T), by the compiled function where there is one."""
        return (self.compiled_hidden or self.hidden)(tokens, select=select)

    # ---- from hidden states to what a head says

    def logits(self, hidden):
        """(..., C) -> (..., V), float32 or wider."""
        return at_least_float32(F.linear(hidden, self.wte.weight))

    def scalar(self, hidden):
        """(..., C) -> (...), float32 or wider."""
        return at_least_float32(self.score_head(hidden).squeeze(-1)) * self.gain + self.bias

    def logprobs(self, tokens, decisions, temperature=1.0):
        """log pi of the tokens that were chosen, and of all tokens, at some decisions: -> (N,), (N, V), in nats.

        tokens (B, T); decisions (N,): places on the grid (B, T-1), where t chooses tokens[:, t+1]. The head runs on
        them only. log pi = log-softmax(logits / temperature), the temperature that the sampler takes.
        """
        states = self.states(tokens[:, :-1], decisions)  # (N, C)
        logits = self.logits(states / temperature)  # dividing C states costs less than dividing V logits
        logprobs = logits.log_softmax(-1)  # (N, V)
        return logprobs.gather(1, tokens[:, 1:].flatten()[decisions, None]).squeeze(1), logprobs

    def values(self, tokens, decisions):
        """The scalar head at some decisions: tokens (B, T), decisions (N,) on the grid (B, T-1) -> (N,)."""
        return self.scalar(self.states(tokens[:, :-1], decisions))

    def score(self, tokens, lengths):
        """The scalar head at each row's last real token: tokens (B, T), lengths (B,) -> (B,)."""
        B, T = tokens.shape
        last = torch.arange(B, device=tokens.device) * T + lengths - 1  # in (B T,)
        return self.scalar(self.states(tokens, last))

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V), or scalars (B, T)."""
        h = self.hidden(tokens)
        return self.logits(h) if self.head == "lm" else self.scalar(h)
