"""Sampling with one KV cache for prefill and decode.

Invariant: row b's token number n lies in slot n, written over whatever padding was there, and sees slots <= n. So rows
with prompts of different lengths share a batch, and no row's answer depends on which other rows are in it.

Left out: top-k and top-p. RL trains the full softmax, so it must sample from it.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from minirlhf.config import fail
from minirlhf.data import Prompt, response_mask
from minirlhf.kernels import matmul_dtype, packed
from minirlhf.model import flat_indices, last_places

ROW_MULTIPLE = 16  # rows are dropped down to a multiple of it: libraries make kernels for each shape, so few is better
SHAPES = 4  # of caches that a Decoder keeps
POLL_INTERVAL = {"cpu": 1}  # tokens between checks which rows have ended; elsewhere 16: each waits for the device


class KVCache:
    """Keys and values of all layers: (L, B, K, S, D), S = slots; `filled` slots are in use."""

    def __init__(self, model, rows, slots):
        c, device, dtype = model.config, model.wte.weight.device, matmul_dtype(model)
        # zeros, not empty: a masked weight of 0 times an unwritten slot must be 0, and 0 * NaN is not
        self.k = torch.zeros(c.n_layer, rows, c.n_kv_head, slots, c.head_size, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.filled = 0

    def extend(self, layer, positions, k, v):
        """Write k, v (B, K, T, D) into slots positions (B or 1, T); return the filled part (B, K, filled, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer, :, :, :self.filled], self.v[layer, :, :, :self.filled]

    def keep(self, rows):
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Decoder:
    """A model's pass over one token a row, as one CUDA graph: a launch a token, not one for each of its many kernels.

    Every step sees all slots, those of later tokens masked, and no row leaves the batch. The caches are kept, one for
    each shape, for a graph reads and writes at fixed addresses; their slots are a power of two, that shapes be few.
    compiled: the pass goes through torch.compile, with static shapes; on a CPU, where there are no graphs, that is all.
    """

    def __init__(self, model, compiled=False, **options):
        def logits(tokens, cache, positions):  # a function of its own: torch.compile counts the shapes of each
            return model.logits(model.hidden(tokens, cache, positions)[:, 0])

        self.model, self.caches, self.graphs, self.copies, self.addresses = model, {}, {}, {}, None
        self.logits = torch.compile(logits, dynamic=False, **options) if compiled else logits

    def cache(self, rows, slots):
        """A KVCache for `rows` of at least `slots` tokens, with what earlier answers have left in it."""
        addresses = [p.data_ptr() for p in self.model.parameters()]
        if addresses != self.addresses:  # other weights than the graphs read
            self.graphs.clear()
            self.addresses = addresses
        slots = min(2 ** math.ceil(math.log2(slots)), self.model.config.block_size)
        shape = rows, slots, matmul_dtype(self.model)
        cache = self.caches.pop(shape, None) or KVCache(self.model, rows, slots)
        if len(self.caches) == SHAPES:  # what was used longest ago goes
            self.graphs.pop(self.caches.pop(next(iter(self.caches))), None)
        self.caches[shape] = cache
        return cache

    def step(self, tokens, cache, positions):
        """tokens, positions (B, 1) -> logits (B, V), which the next step overwrites."""
        cache.filled = cache.k.shape[3]
        if tokens.device.type != "cuda":
            return self.logits(tokens, cache, positions)
        if cache not in self.graphs:
            self.graphs[cache] = self.capture(tokens.clone(), cache, positions.clone())
        graph, inputs, logits = self.graphs[cache]
        for own, given in zip(inputs, (tokens, positions)):
            own.copy_(given)
        graph.replay()
        return logits

    def capture(self, tokens, cache, positions):
        """-> the graph, the tensors that it reads (tokens, positions) and the logits that it writes."""
        dtype = matmul_dtype(self.model)
        # without autocast's own copies of weights: they are freed with the rollout, and the graph would read on
        with (torch.cuda.device(tokens.device),
              torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16, cache_enabled=False)):
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries choose their kernels, torch.compile makes its own
                    self.logits(tokens, cache, positions)
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.logits(tokens, cache, positions)
        return graph, (tokens, positions), logits


def compile_model(model, decode=False):
    """--compile: whole rows, and with `decode` the steps of `generate` too, go through torch.compile from now on."""
    torch._dynamo.config.recompile_limit = 64  # variants: with and without gradients, padding, states from below
    model.compiled_hidden = torch.compile(model.hidden, dynamic=True)
    model.decoder = Decoder(model, compiled=True) if decode else None


@dataclass
class Rollout:
    """Prompts with their answers. On the grid (B, T-1), decision t chooses tokens[:, t+1]. "eos" is the token that ends
    a row's answer."""
    tokens: torch.Tensor  # (B, T): prompt, response, then eos as padding
    prompt_lengths: torch.Tensor  # (B,) tokens of each prompt
    lengths: torch.Tensor  # (B,) real tokens: prompt and response, eos included
    finished: torch.Tensor  # (B,) bool: the response ended with eos within the limit
    sampler_logprobs: torch.Tensor  # (B, T-1) log-probabilities as the sampler saw them, 0 outside the response
    prompt_texts: list = None  # (B,) each prompt's whole text, where `data.Prompt` knows it
    below: torch.Tensor = None  # (B, T, C) what enters the first block in which policy and reference differ, if known
    value_below: torch.Tensor = None  # the same of value network and reward model
    parts: list = None  # (B,) {name: score} of each --reward, None where it does not apply

    @property
    def response_mask(self):
        """(B, T-1) bool: the decisions that chose a token of the response. Made from lengths, never from token ids."""
        return response_mask(self.prompt_lengths, self.lengths, self.tokens.shape[1])

    @cached_property
    def decisions(self):
        """The same as flat indices, row after row: (N,)."""
        return flat_indices(self.response_mask)

    def flat(self, x):
        """What x (B, T-1) holds for the response's decisions: (N,)."""
        return x.flatten()[self.decisions]

    def grid(self, x):
        """The reverse: x (N,) -> (B, T-1), 0 outside the response."""
        mask = self.response_mask
        return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_scatter(mask, x)

    def take(self, rows):
        """The same columns of some rows, cut to the longest of them."""
        T, padded = int(self.lengths[rows].max()), self.tokens.shape[1]
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{
            name: x if x is None else [x[i] for i in rows.tolist()] if isinstance(x, list)
            else x[rows] if x.dim() == 1 else x[rows, :T - padded + x.shape[1]] for name, x in columns.items()})

    def responses(self) -> list[list[int]]:
        return [row[p:n] for row, p, n in
                zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())]


def sample(logits, temperature, u):
    """One token a row by inverse CDF: logits (B, V), u (B,) uniform in [0, 1) -> ids (B,), log-probabilities (B,).

    Temperature 0 takes the most likely token (log-probability 0: the choice is certain).
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    probabilities = (logits if temperature == 1 else logits / temperature).softmax(-1)
    cdf = probabilities.cumsum(-1)
    total = cdf[:, -1]
    # the cap keeps u * total below total after rounding, so that a token of probability 0 is never taken
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cdf, target[:, None], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)  # if NaN
    return token, probabilities.gather(1, token[:, None]).squeeze(1).log()


@torch.no_grad()
def generate(model, prompts: list[list[int]], response_length: int, eos: int, temperature=1.0, generator=None):
    """Answer each prompt with up to `response_length` tokens, eos included -> Rollout. A `Prompt` may know another end.

    The uniform numbers are drawn at the start, one a row and step, so an answer depends on its row's numbers and not on
    when other rows end. Rows that ended leave the batch, down to a multiple of ROW_MULTIPLE; the loop ends with the
    last of them. On a GPU, and with --compile, the steps are a Decoder's; the weights are `packed` meanwhile. Raises
    ValueError for an empty prompt or one that does not leave room in the model's context.
    """
    if not all(prompts):
        raise ValueError("a prompt must hold at least one token")
    device, limit = model.wte.weight.device, model.config.block_size
    if device.type == "cuda" and model.decoder is None:
        model.decoder = Decoder(model)
    decoder = model.decoder
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, eos).to(device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = torch.tensor([getattr(prompt, "end", eos) for prompt in prompts], device=device)
    B, P = tokens.shape
    if P + response_length > limit:
        raise ValueError(f"a prompt of {P} tokens and {response_length} new ones exceed the context of {limit}")
    u = torch.rand(B, response_length, generator=generator).to(device)
    tokens = torch.cat([tokens, tokens.new_full((B, response_length), eos)], 1)  # (B, P + response_length)
    logprobs = torch.zeros(B, P + response_length - 1, device=device, dtype=model.wte.weight.dtype)
    lengths, finished = prompt_lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)

    cache = decoder.cache(B, P + response_length) if decoder else KVCache(model, B, P + response_length)
    cache.filled = P
    rows = torch.arange(B, device=device)  # cache row -> batch row
    live = torch.ones(B, dtype=torch.bool, device=device)
    with nullcontext() if decoder and device.type == "cpu" else packed(model, decoder and decoder.copies):
        last = last_places(tokens[:, :P], prompt_lengths)
        logits = model.logits(model.hidden(tokens[:, :P], cache, torch.arange(P, device=device)[None], last,
                                           places=model.needed(tokens[:, :P], last)))
        for n in range(response_length):
            new, logprob = sample(logits, temperature, u[rows, n])
            new = new.masked_fill(~live, eos)  # a row that ended re-reads its eos until it is dropped
            at = prompt_lengths[rows] + n  # the slot of the new token
            tokens[rows, at] = new
            logprobs[rows, at - 1] = logprob.masked_fill(~live, 0)
            lengths[rows] += live
            finished[rows] |= live & (new == ends[rows])
            live = live & (new != ends[rows])
            if n + 1 == response_length:
                break
            if (n + 1) % POLL_INTERVAL.get(device.type, 16) == 0:
                left = int(live.sum())
                if left == 0:
                    break
                left = math.ceil(left / ROW_MULTIPLE) * ROW_MULTIPLE
                if left <= 0.8 * len(rows) and not decoder:  # dropping rows copies the cache: only several at once
                    kept = (~live).argsort(stable=True)[:left]
                    cache.keep(kept)
                    rows, at, live = rows[kept], at[kept], live[kept]
            step = tokens[rows, at][:, None], cache, at[:, None]
            if decoder:
                logits = decoder.step(*step)
            else:
                cache.filled = P + n + 1
                logits = model.logits(model.hidden(*step)[:, 0])
    if not logprobs.isfinite().all():
        fail("the model's logits are not finite: its weights are not, or are too large; try a lower --learning_rate")
    T = int(lengths.max())
    texts = [prompt.text for prompt in prompts] if all(isinstance(prompt, Prompt) for prompt in prompts) else None
    return Rollout(tokens[:, :T], prompt_lengths, lengths, finished, logprobs[:, :T - 1], texts)
