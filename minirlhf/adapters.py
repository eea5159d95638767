"""Low-rank adapters, and blocks that stay frozen: a large model learns by few numbers, in little memory.

Invariant: what does not learn is one memory for all models made from it, and nothing here writes to it. A policy is its
reference and adapters, a value network its reward model and adapters: two trunks in memory instead of four.

Left out: adapters of embeddings and norms, dropout of what enters an adapter.   Hu et al. 2021
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.config import fail, warn_idle
from minirlhf.sizes import outline


OPTIONS = ("lora_rank", "lora_alpha", "lora_layers", "freeze_layers")  # what a run cannot change


class LowRank(nn.Module):
    """y = W x + b + scale B A x, scale = alpha / rank; W and b are frozen, A (rank, in) and B (out, rank) learn.

    B is 0 at the start, so nothing changes; A is U(-1/sqrt(in), 1/sqrt(in)).   Hu et al. 2021, eq. 3
    """

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(linear.weight))
        self.b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    @property
    def weight(self):
        """The one matrix that does the same: W + scale B A."""
        return torch.addmm(self.linear.weight, self.b, self.a, alpha=self.scale)

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b * self.scale)


def check_options(o):
    """Exits 2 where options of what learns exclude each other."""
    if o.lora_rank and o.freeze_layers:
        fail(f"--freeze_layers {o.freeze_layers}: excludes --lora_rank {o.lora_rank}, with which all blocks are "
             "frozen; add --lora_rank 0")
    for name in ("lora_rank", "freeze_layers"):
        if getattr(o, name) and o.init_from == "scratch" and o.stage == "sft":
            fail(f"--{name} {getattr(o, name)}: freezes random weights of --init_from scratch; use --{name} 0, or "
                 "@scratch, which has all options of a model from scratch")
    warn_idle(o, "lora_rank 0", not o.lora_rank, "lora_alpha", "lora_layers")


def learner(model, head, o, generator, dropout=0.0):
    """A copy of `model` under `head` that learns as the options say; what stays frozen is the model's own memory.

    o: lora_rank, lora_alpha, lora_layers, freeze_layers. A scalar head learns in any case, and is the copy's own; so
    are all weights where the options name neither adapters nor frozen blocks. `first` of both models is the first block
    in which they differ. Exits 2 where no block is left to learn.
    """
    if not (o.lora_rank or o.freeze_layers):
        return model.with_head(head, dropout)
    layers = model.config.n_layer
    if o.freeze_layers >= layers:
        fail(f"--freeze_layers {o.freeze_layers}: the model has {layers} blocks, and one at least must learn")
    first = max(0, layers - (o.lora_layers or layers)) if o.lora_rank else o.freeze_layers
    other = sharing(model, head, dropout)
    for block in other.h[first:]:
        if not o.lora_rank:
            own_weights(block)
        for part, name, layer in layers_of(block, nn.Linear) if o.lora_rank else ():
            setattr(part, name, LowRank(layer, o.lora_rank, o.lora_alpha, generator))
    for name in ["score_head"] if o.lora_rank else ["score_head", "ln_f", "lm_head"]:
        own_weights(getattr(other, name, nn.Module()))
    other.first = model.first = first
    if o.lora_rank and model.base:
        own = {"head": head, "lora_rank": o.lora_rank, "lora_alpha": o.lora_alpha, "lora_layers": layers - first}
        other.base = {**model.base, "adapters": [*model.base["adapters"], own]}
    return other.train(model.training)


def sharing(model, head, dropout):
    """A model under `head` whose frozen weights are the memory of `model`; a scalar head as `with_head` makes it, gain
    and bias its own."""
    other = outline(replace(model.config, dropout=dropout), head)
    state = model.state_dict()
    if head == "scalar":
        device = model.wte.weight.device
        new = {"score_head.weight": torch.zeros(1, model.config.n_embd), "score_head.bias": torch.zeros(1),
               "gain": torch.ones(()), "bias": torch.zeros(())}
        state |= {name: (state[name].clone() if name in state else tensor.to(device)) for name, tensor in new.items()}
    other.load_state_dict({name: state[name] for name in other.state_dict()}, assign=True)
    return other.requires_grad_(False)


def layers_of(block, kind):
    """(owner, name, layer) of a block's layers of one kind."""
    return [(part, name, layer) for part in (block.attn, block.mlp) for name, layer in part.named_children()
            if isinstance(layer, kind)]


def own_weights(module):
    """Its weights are copied, and learn."""
    for part in module.modules():
        for name, p in [*part.named_parameters(recurse=False)]:
            setattr(part, name, nn.Parameter(p.detach().clone()))


def is_partial(model):
    """Whether a part of the model is frozen."""
    return not all(p.requires_grad for p in model.parameters())


def trained(model):
    """{name: tensor} of what learns, and of the buffers: all that sets the model apart from the one it is made from."""
    learns = {name for name, p in model.named_parameters() if p.requires_grad} | {name for name, _ in
                                                                                  model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in learns}


def merged(model, state=None):
    """The state_dict of a plain GPT of the same function, its adapters added to the matrices.

    state: what `trained` gave at another time, in place of the model's own.
    """
    found = model.state_dict() | (state or {})
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}
    for name, layer in layers.items():
        a, b = found.pop(f"{name}.a"), found.pop(f"{name}.b")
        for part in ("weight", "bias"):
            if f"{name}.linear.{part}" in found:
                found[f"{name}.{part}"] = found.pop(f"{name}.linear.{part}")
        found[f"{name}.weight"] = torch.addmm(found[f"{name}.weight"], b, a, alpha=layer.scale)
    return found


@torch.no_grad()
def merge(model):
    """The adapted model as a plain one: its adapters are added to the matrices, in the memory of the model that it was
    made from, which nobody may use any more."""
    for block in model.h:
        for part, name, layer in layers_of(block, LowRank):
            layer.linear.weight.addmm_(layer.b, layer.a, alpha=layer.scale)
            setattr(part, name, layer.linear)
    model.first = 0
    return model.requires_grad_(True)


def share_below(model, *others):
    """Each weight below the first block that learns which another model has too is one memory for both; where that is
    all of them, what `model` computes there is the other's as well.

    So it is where a reward model's adapters stand in the same blocks as the policy's, or higher ones.
    """
    for other in others:
        if other is None or not model.first or model.config != other.config:
            continue
        theirs = dict(below(other, model.first))
        for name, p in below(model, model.first):
            if torch.equal(p, theirs[name]):
                theirs[name].data = p.data
        if same_memory(model, other, model.first):
            other.first = model.first


def same_memory(a, b, first):
    """Whether all below a block is one memory for both models."""
    pointers = [{name: p.data_ptr() for name, p in below(model, first)} for model in (a, b)]
    return pointers[0] == pointers[1]


def below(model, first):
    """(name, parameter) of the embeddings and of the blocks below one."""
    for name, p in model.named_parameters():
        if name.startswith(("wte.", "wpe.")) or name.startswith("h.") and int(name.split(".")[1]) < first:
            yield name, p


@torch.no_grad()
def add_states_below(batch, policy, value, run, rows=128):
    """Two columns of a Rollout: what enters the first block that learns, of the policy and of the value network, whose
    reward model may be given as well.

    They are the same for the reference and the reward model, and in all epochs, and so are computed once: for both
    networks, where they share memory. rows: how many a pass takes. Nothing, where the first block learns.
    """
    for name, model in (("below", policy), ("value_below", value)):
        if model is None or not model.first:
            continue
        if batch.below is not None and same_memory(model, policy, policy.first):
            batch.value_below = batch.below
            continue
        column = model.wte.weight.new_zeros(*batch.tokens.shape, model.config.n_embd)
        for part in torch.arange(len(column), device=column.device).split(rows):
            some = batch.take(part)
            with run.autocast():
                column[part, :some.tokens.shape[1]] = model.below(some.tokens, some.lengths).to(column.dtype)
        setattr(batch, name, column)
