"""GPT-2's architecture and the Llama family's, with a language-model head or a scalar head on one trunk.

Blocks, heads, cache and selection are the same in both families. Where a part differs there are two branches, GPT-2's
first: norms, positions, MLP, biases. Llama's are RMSNorm, rotary positions, SwiGLU, and heads of keys and values that
several queries share; with biases on queries, keys and values it is Qwen2, with norms of queries and keys Qwen3.

Invariant: padding lies on the right, so a causal mask alone keeps every real token from seeing it. With a cache, query
t of row b sits in slot positions[b, t] and sees slots <= that: prefill and decode are one code path.

Shapes: B rows, T tokens, S cache slots, C channels, H heads, K heads of keys and values, D head size, V words; N
selected places of the B T.

Left out: attention masks, position shifts, vocabularies padded to a round size (their extra tokens would have to be
masked in every softmax), sliding windows, and rotary positions that are scaled to longer contexts.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


def flat_indices(mask):
    """Where a mask (B, T) is True, row after row, as indices into (B T,): (N,)."""
    return mask.flatten().nonzero().squeeze(1)


def last_places(tokens, lengths):
    """Where each row's last token is: tokens (B, T), lengths (B,) -> (B,), indices into (B T,)."""
    return torch.arange(len(tokens), device=tokens.device) * tokens.shape[1] + lengths - 1


def at_least_float32(x):
    """In half precision losses, KL and log-softmax lose their digits."""
    return x.float() if x.dtype.itemsize < 4 else x


@dataclass
class GPTConfig:
    """A network's sizes. Those below `family` are Llama's to choose, and 0 among them gives what GPT-2 always has.

    Raises ValueError where they make no network.
    """
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    dropout: float = 0.0
    family: Literal["gpt2", "llama"] = "gpt2"
    n_kv_head: int = 0  # K, of which each serves n_head / n_kv_head queries; 0 = n_head
    head_size: int = 0  # D; 0 = n_embd / n_head
    n_inner: int = 0  # channels within the MLP; 0 = 4 n_embd
    rope_theta: float = 10000.0  # rotary positions: the slowest pair of channels turns by about 1 / rope_theta a token
    norm_eps: float = 1e-5  # added to the mean square, or the variance, under the root
    qkv_bias: bool = False  # Qwen2: biases on queries, keys and values
    qk_norm: bool = False  # Qwen3: RMSNorm of each head's queries and keys, before they are rotated
    tied: bool = True  # the output matrix is the token embedding; else a matrix of its own

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        usual = dict(n_kv_head=self.n_head, head_size=self.n_embd // self.n_head, n_inner=4 * self.n_embd)
        for name, value in usual.items():
            setattr(self, name, getattr(self, name) or value)
        usual |= dict(rope_theta=10000.0, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied=True)
        if self.family == "gpt2":
            if other := [name for name, value in usual.items() if getattr(self, name) != value]:
                raise ValueError(f"{other[0]} {getattr(self, other[0])} is not GPT-2's, which is {usual[other[0]]}")
        elif self.family != "llama":
            raise ValueError(f"family {self.family!r} is neither gpt2 nor llama")
        elif self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}, and head_size "
                             f"{self.head_size} even")

    @property
    def leaves_padding_out(self):
        """Whether passes do: a narrower model is no faster by it."""
        return self.n_embd >= 256


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the quotient in float32 or wider.   Zhang & Sennrich 2019, eq. 4"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = at_least_float32(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(config):
    return nn.LayerNorm(config.n_embd) if config.family == "gpt2" else RMSNorm(config.n_embd, config.norm_eps)


def turns(positions, config):
    """Cosine and sine of the angle positions * rope_theta^(-2i/D) of pair i, channels i and i + D/2: (B or 1, T) -> two
    (B or 1, T, 1, D), the sine of channel i negated."""
    D = config.head_size
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=positions.device).float() / D)
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotary positions: channels i and i + D/2 of each head of x (B, T, H, D) are turned as a pair, by what `turns`
    gives.   Su et al. 2021"""
    wide = at_least_float32(x)  # once, not for each product
    return wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        H, K, D = self.sizes = config.n_head, config.n_kv_head, config.head_size
        self.dropout, gpt2 = config.dropout, config.family == "gpt2"
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * K) * D, bias=gpt2 or config.qkv_bias)
        self.c_proj = nn.Linear(H * D, config.n_embd, bias=gpt2)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)

    def forward(self, x, mask, extend=None, select=None, rope=None, among=None):
        """(B, T, C) -> (B, T, C), or of the places in `select` alone (N, C).

        among: (B, T, places), where x (N, C) and what is returned hold some places of the B T alone.
        mask: None for plain causal attention, else additive (B or 1, 1, T, S) with -inf where a slot is unseen.
        extend: takes this layer's new keys and values (B, K, T, D) into a cache, returns all of them (B, K, S, D).
        rope: what `turns` gives, where positions are rotary.
        """
        (B, T, places), (H, K, D) = among or (*x.shape[:2], None), self.sizes
        qkv = self.c_attn(x).contiguous()  # attention's kernels want D to be the innermost
        qkv = qkv if places is None else qkv.new_zeros(B * T, qkv.shape[1]).index_put((places,), qkv)
        qk, v = qkv.view(B, T, H + 2 * K, D).split([H + K, K], 2)  # (B, T, H + K or K, D)
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], 2)
        if rope is not None:
            qk = rotate(qk, *rope).to(v.dtype)
        q, k, v = (y.transpose(1, 2) for y in (*qk.split([H, K], 2), v))  # (B, H or K, T, D)
        if extend is not None:
            k, v = extend(k, v)  # (B, K, S, D)
        stacked = q.reshape(B, K, -1, D)  # queries that share a head of keys, one below the other (B, K, H/K T, D)
        dropout = self.dropout if self.training else 0.0
        # for several queries of a head explicit matmuls beat F.scaled_dot_product_attention's CPU kernels under oneDNN
        if x.device.type == "cpu" and mask is not None and (T > 1 or K < H):
            weights = (stacked @ k.mT).view(B, H, T, -1).mul_(1 / math.sqrt(D)).add_(mask).softmax(-1)
            y = F.dropout(weights, dropout).view(B, K, stacked.shape[2], -1) @ v
        else:
            mask = None if mask is None else mask.to(q.dtype)
            y = F.scaled_dot_product_attention(stacked if T == 1 else q, k, v, attn_mask=mask, dropout_p=dropout,
                                               is_causal=mask is None, enable_gqa=T > 1 and K < H)
        y = y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)
        select = places if select is None else select
        y = y if select is None else y.flatten(0, 1).index_select(0, select)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout, self.gpt2 = config.dropout, config.family == "gpt2"
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * (1 if self.gpt2 else 2), bias=self.gpt2)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=self.gpt2)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gpt2:
            x = F.gelu(x, approximate="tanh")
        else:
            gate, x = x.chunk(2, -1)
            x = F.silu(gate) * x  # SwiGLU   Shazeer 2020
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, mask, extend=None, select=None, rope=None, among=None):
        y = self.attn(self.ln_1(x), mask, extend, select, rope, among)
        if select is not None:
            x = x.flatten(0, -2).index_select(0, torch.searchsorted(among[2], select) if among else select)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Norms come before attention and MLP, whose outputs are added to the stream.

    gpt2: LayerNorm, learned positions, tanh GELU, biases, output tied to the token embedding.   Radford et al. 2019
    llama: RMSNorm, rotary positions, SwiGLU, output tied or not, no biases.   Touvron et al. 2023
    head="lm":     logits = hidden @ wte.T, or hidden @ lm_head.T where the output is not tied
    head="scalar": scalar = (hidden @ w + b) * gain + bias; gain and bias are buffers that set the reward's scale
    Parameter names are GPT-2's; linear weights are (out, in), the transpose of GPT-2's own files. c_attn holds queries,
    keys and values one below the other, Llama's c_fc gate and up.
    """

    def __init__(self, config: GPTConfig, head: str = "lm"):
        super().__init__()
        assert head in ("lm", "scalar")
        self.config, self.head = config, head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.family == "gpt2":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        if head == "scalar":
            self.score_head = nn.Linear(config.n_embd, 1)
            self.register_buffer("gain", torch.ones(()))
            self.register_buffer("bias", torch.zeros(()))
        elif not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator):
        """GPT-2's, in both families: N(0, 0.02), residual projections divided by sqrt(2 n_layer), norms 1, biases 0.
        Scalar head: `init_score`."""
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
        it is copied, its scale included; to a language model leads no way back unless the output is tied."""
        assert head == "scalar" or self.head == "lm" or self.config.tied
        other = GPT(replace(self.config, dropout=dropout), head).to(self.wte.weight.device)
        if head == "scalar":
            nn.init.zeros_(other.score_head.weight)
            nn.init.zeros_(other.score_head.bias)
        own = other.state_dict()
        other.load_state_dict(own | {k: v for k, v in self.state_dict().items() if k in own})
        return other

    # ---- from tokens to hidden states (B, T, C)

    first = 0  # the first block that learns: adapters.learner sets it; what lies below is the same at every step
    base = None  # another program's model that this one is made from: checkpoint sets it

    @torch.no_grad()
    def below(self, tokens, lengths):
        """What enters block `first`: tokens (B, T), lengths (B,) -> (B, T, C), or None where that is the first of
        all."""
        if not self.first:
            return None
        return self.hidden(tokens, last=self.first, places=self.needed(tokens, last_places(tokens, lengths)))

    def hidden(self, tokens, cache=None, positions=None, select=None, below=None, last=None, places=None):
        """Hidden states after the last norm: tokens (B, T) -> (B, T, C), or of some places alone (N, C).

        cache: a generate.KVCache, in which the tokens take the slots `positions` (B or 1, T).
        select: `flat_indices` of the states that are wanted; of the others the last block makes only keys and values.
        below: what enters block `first`, where that is not 0, so that nothing below it is computed. last: the block
        whose input is returned. places: those that are computed at all, as `needed` gives them.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None or tokens.device.type == "cpu":
            slots = torch.arange(T if cache is None else cache.filled, device=tokens.device)
            unseen = slots > positions[:, None, :, None]  # (B or 1, 1, T, S)
            mask = torch.zeros(unseen.shape, device=tokens.device).masked_fill_(unseen, -torch.inf)
        rope = None if self.config.family == "gpt2" else turns(positions, self.config)
        from_below = below is not None and self.first
        if not from_below:
            x = self.wte(tokens)  # (B, T, C)
            x = F.dropout(x + self.wpe(positions) if rope is None else x, self.config.dropout, self.training)
        else:
            x = below
        among = None if places is None else (*tokens.shape, places)
        x = x if among is None else x.flatten(0, 1).index_select(0, places)
        for i in range(self.first if from_below else 0, len(self.h) if last is None else last):
            x = self.h[i](x, mask, partial(cache.extend, i, positions) if cache is not None else None,
                          select if i + 1 == len(self.h) else None, rope, among)
        if last is None:
            return self.ln_f(x)
        return x if among is None else x.new_zeros(tokens.numel(), x.shape[1]).index_put(
            (places,), x).view(*tokens.shape, -1)

    compiled_hidden = decoder = None  # generate.compile_model sets them, generate a GPU's decoder

    def states(self, tokens, select, below=None):
        """Hidden states (N, C) of some places in tokens (B, T), by the compiled function where there is one."""
        places = self.needed(tokens, select)
        return (self.compiled_hidden or self.hidden)(tokens, select=select, below=below, places=places)

    def needed(self, tokens, select):
        """What a pass for some places of tokens (B, T) computes: those up to each row's last one (N,), or None for all.

        Attention is causal, so that what follows them, as padding does, reaches none of them.
        """
        if not self.config.leaves_padding_out:
            return None
        B, T = tokens.shape
        last = select.new_full((B,), -1).scatter_reduce(0, select // T, select % T, "amax")
        places = flat_indices(torch.arange(T, device=select.device) <= last[:, None])
        return places if len(places) < B * T else None

    # ---- from hidden states to what a head says

    @property
    def unembedding(self):
        """The output matrix (V, C)."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def logits(self, hidden):
        """(..., C) -> (..., V), float32 or wider."""
        return at_least_float32(F.linear(hidden, self.unembedding))

    def scalar(self, hidden):
        """(..., C) -> (...), float32 or wider."""
        return at_least_float32(self.score_head(hidden).squeeze(-1)) * self.gain + self.bias

    def logprobs(self, tokens, decisions, temperature=1.0, below=None):
        """log pi of the tokens that were chosen, and of all tokens, at some decisions: -> (N,), (N, V), in nats.

        tokens (B, T); decisions (N,): places on the grid (B, T-1), where t chooses tokens[:, t+1]. The head runs on
        them only. log pi = log-softmax(logits / temperature), the temperature that the sampler takes. below: what
        `below` gives of the tokens, if it is there already; so in `values` and `score`.
        """
        states = self.states(tokens[:, :-1], decisions, None if below is None else below[:, :-1])  # (N, C)
        logits = self.logits(states / temperature)  # dividing C states costs less than dividing V logits
        logprobs = logits.log_softmax(-1)  # (N, V)
        return logprobs.gather(1, tokens[:, 1:].flatten()[decisions, None]).squeeze(1), logprobs

    def values(self, tokens, decisions, below=None):
        """The scalar head at some decisions: tokens (B, T), decisions (N,) on the grid (B, T-1) -> (N,)."""
        return self.scalar(self.states(tokens[:, :-1], decisions, None if below is None else below[:, :-1]))

    def score(self, tokens, lengths, below=None):
        """The scalar head at each row's last real token: tokens (B, T), lengths (B,) -> (B,)."""
        return self.scalar(self.states(tokens, last_places(tokens, lengths), below))

    def forward(self, tokens):
        """(B, T) -> logits (B, T, V), or scalars (B, T)."""
        h = self.hidden(tokens)
        return self.logits(h) if self.head == "lm" else self.scalar(h)
