"""What a run will need of memory, by part, said before it starts, and what to do where the device has less.

The phases of a step take turns, so a run's peak is what stays (weights, moments, the program itself) and the largest of
what comes and goes. `of_sft`, `of_rm`, `of_dpo` and `of_ppo` give {phase: {part: bytes}} from options and shapes
alone, so that they can be asked what other options would need; answers are taken to be as long as they may become.

Left out: what torch.compile saves and costs, the scratch memory of matmuls, what other processes take meanwhile.
"""
import contextlib
import heapq
import math
import os
import resource
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minirlhf import adapters, kernels, sizes
from minirlhf.config import fail, ranks

FLOAT = 4  # bytes of a weight, gradient, moment or logit
LIBRARIES = 50e6  # bytes of code and of oneDNN's kernels that come when torch computes (measured: 40 to 120 million)
GAPS = 1.5  # how far a CPU's heap outgrows what comes and goes, whose sizes differ (measured: 1.2 to 1.9, glibc 2.36)
BATCH, ROWS = 128, 32  # prompts that an evaluation answers at once, rows of its forward passes; stage 2's in training
SHOWN, PROMPT = 4, 64  # samples that stage 1 shows, and tokens of a prompt there
PARTS = ("weights", "packed", "best", "gradients", "moments", "logits", "activations", "states", "cache", "copies",
         "program")


# ---- what stays

def linear_weights(c):
    """Weights of a block's linear layers: those that make queries, keys and values, and the others."""
    matrices = 2 if c.family == "gpt2" else 3  # of the MLP
    return ((c.n_head + 2 * c.n_kv_head) * c.head_size * c.n_embd,
            c.n_head * c.head_size * c.n_embd + matrices * c.n_inner * c.n_embd)


def adapter_weights(c, rank):
    """Numbers in one block's adapters, rank (in + out) each: those of queries, keys and values; the others."""
    own, out = c.n_head * c.head_size, (c.n_head + 2 * c.n_kv_head) * c.head_size
    wide = c.n_inner * (1 if c.family == "gpt2" else 2)
    return rank * (c.n_embd + out), rank * (own + wide + c.n_inner + 3 * c.n_embd)


def blocks_of(c, o):
    """How many blocks learn, the last ones."""
    return min(o.lora_layers or c.n_layer, c.n_layer) if o.lora_rank else c.n_layer - o.freeze_layers


def learned(model, o):
    """Numbers that learn under these options: of the blocks' matrices, and others. The model may have been made without
    the adapters that they ask for."""
    own, c = {name: p for name, p in model.named_parameters() if p.requires_grad}, model.config
    if o.lora_rank and not any(name.endswith(".a") for name in own):
        return blocks_of(c, o) * sum(adapter_weights(c, o.lora_rank)), (c.n_embd + 1) * (model.head == "scalar")
    matrices = sum(p.numel() for name, p in own.items() if p.dim() == 2 and name.startswith("h."))
    return matrices, sum(p.numel() for p in own.values()) - matrices


def held(models):
    """Bytes of the weights of models that may share them; of None, none."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                for model in models if model for p in (*model.parameters(), *model.buffers())}.values())


def lasting(o, run, learners, others=()):
    """{part: bytes} of what is there throughout. learners: networks that learn; others: that do not."""
    now, then = ([learned(model, options) for model in learners] for options in (run.options, o))
    one = 1 if getattr(o, "optimizer", "") == "muon" else 2  # moments of a number in a matrix
    return {"weights": held([*learners, *others]) + FLOAT * (sum(map(sum, then)) - sum(map(sum, now))),
            "packed": packed(o, run, learners, others), "moments": FLOAT * sum(one * a + 2 * b for a, b in then)}


def packed(o, run, learners, others):
    """Bytes of what kernels.pack_frozen copies: weights of linear layers that do not learn, once for all models that
    share them, and once more where a backward pass goes through them."""
    if not kernels.packs_frozen(run):
        return 0
    found, back = {}, {}  # {address: numbers}, of passes forward and backward
    asked = others and o.lora_rank and not run.options.lora_rank and not o.reference  # adapters will share others' then

    def matrices(blocks):
        return {p.data_ptr(): p.numel() for block in blocks for name, p in block.named_parameters()
                if name.endswith("weight") and p.dim() == 2}

    for model in filter(None, (*learners, *others)):
        c, learns, head = model.config, model in learners, model.unembedding if model.head == "lm" else None
        frozen = c.n_layer if o.lora_rank or not learns else o.freeze_layers
        top = {}
        if head is not None and (not learns or o.lora_rank or frozen and c.tied):
            top = {head.data_ptr(): head.numel()}
        if not (learns and asked):
            found |= matrices(model.h[:frozen]) | top
        if learns:
            back |= top
            if o.lora_rank:  # what enters the first block that learns needs no gradient
                blocks = model.h[c.n_layer - blocks_of(c, o):]
                first = {p.data_ptr() for p in blocks[0].attn.c_attn.parameters()}
                back |= {at: n for at, n in matrices(blocks).items() if at not in first}
    return run.dtype.itemsize * (sum(found.values()) + sum(back.values()))


def gradients(o, *learners):
    """{part: bytes} of the gradients of networks that learn in turns. Where the output is the embedding, it has two."""
    heads = [model.unembedding.nbytes for model in learners if model.wte.weight.requires_grad and model.head == "lm"]
    return {"gradients": max(FLOAT * sum(learned(model, o)) for model in learners)
            + max(heads, default=0) * (not o.lora_rank)}


# ---- what comes and goes

def kept_by_block(c, o, w, cpu):
    """(a, g, h, d): a block keeps tokens a + places (g + h length of their rows) + selected tokens d bytes for the
    backward pass; places: tokens and padding.

    w: bytes of a number in matmuls. What enters a norm is float32, so is the quotient, kept where a weight learns; the
    rest are what linear layers read, queries, keys, values, attention's weights, and the factors of SwiGLU.
    """
    C, own, shared, inner = c.n_embd, c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_inner
    dropped, rank = getattr(o, "dropout", 0) > 0, o.lora_rank
    norm = FLOAT * C * (1 if c.family == "gpt2" or rank else 2)
    heads = (FLOAT + w * (not rank)) * (own + shared) + FLOAT * shared * (w == FLOAT)  # the same of queries and keys
    a, g = norm + w * (C + rank), w * (own + 2 * shared) + c.qk_norm * heads
    h = w * c.n_head * (3 if dropped else 1) * cpu  # elsewhere attention's kernels keep no weights
    d = norm + w * (own + C + (2 if c.family == "gpt2" else 4) * inner + 2 * C * dropped + 3 * rank)
    return a, g, h, d


def training(c, o, passes, logits, w, cpu):
    """{part: bytes} of a microbatch, forward and backward. passes: what `a_pass` says of each; logits: bytes of them
    and their copies, which have gone when the backward pass takes a block's activations once more."""
    a, g, h, d = kept_by_block(c, o, w, cpu)
    block = sum(tokens * (a + d) + rows * length * (g + h * length) for tokens, rows, length, _ in passes)
    last = sum(tokens * a + rows * length * (g + h * length) + select * d for tokens, rows, length, select in passes)
    blocks, again = blocks_of(c, o), block
    kept = (blocks - 1) * block + last
    if o.checkpoint_activations:  # what enters each block, and one that is computed again
        kept, again = blocks * FLOAT * c.n_embd * sum(tokens for tokens, *_ in passes), 2 * block
    packs = cpu and kernels.CAN_PACK_BFLOAT16 and not o.compile  # what is frozen is no cast then
    own, head = not (packs and o.lora_rank), not (packs and (o.lora_rank or o.freeze_layers and c.tied))
    casts = w * (blocks * sum(linear_weights(c)) * own + c.vocab_size * c.n_embd * head * (logits > 0)) * (w < FLOAT)
    return {"activations": kept + max(0, again - logits), "logits": logits, "copies": casts}


def a_pass(c, lengths, selected):
    """(tokens that are computed, rows, longest row, selected tokens) of a pass over rows of some lengths."""
    return (sum(lengths) if c.leaves_padding_out else len(lengths) * max(lengths)), len(lengths), max(lengths), selected


def sampling(c, o, rows, prompt, response, w, cpu):
    """{part: bytes} of `generate`: the cache, part of which is there twice when rows end, and which has a power of two
    slots on a GPU; packed weights; the logits' softmax and its sums."""
    a, g, h, d = kept_by_block(c, o, w, cpu)
    packs = kernels.CAN_PACK and (w < FLOAT or c.n_embd >= 128) if cpu else w < FLOAT
    slots = 1.4 * (prompt + response) if cpu else min(2 ** math.ceil(math.log2(prompt + response)), c.block_size)
    return {"cache": 2 * c.n_layer * rows * slots * c.n_kv_head * c.head_size * w,
            "copies": w * (c.n_layer * sum(linear_weights(c)) + c.vocab_size * c.n_embd) * packs,
            "logits": 3 * FLOAT * rows * c.vocab_size, "activations": rows * prompt * (a + g + h * prompt + d)}


# ---- the stages: {part: bytes} that stay, and of each phase those that come and go

def of_sft(o, run, model, batches, held_out):
    """batches: rows of the largest; held_out: rows of an evaluation."""
    c, w, cpu = model.config, run.dtype.itemsize, run.device.type == "cpu"
    stays, logit = lasting(o, run, [model]), FLOAT * c.vocab_size
    if o.lora_rank and not run.options.lora_rank:  # the model would be what adapters are added to
        stays["weights"] += held([model])
    stays["best"] = FLOAT * sum(learned(model, o))  # the weights of the lowest held-out loss so far
    steps = {a_pass(c, [len(row.ids) - 1 for row in part], answered(part))
             for batch in batches for part in parts(run.share(batch) or batch, o)}
    longest = sorted(len(row.ids) - row.prompt_length for row in held_out)[-o.micro_batch_size:]
    passes = most(training(c, o, [step], 4 * logit * step[-1], w, cpu) for step in steps)
    return stays, [*in_turn(passes, gradients(o, model), o.batch_size > o.micro_batch_size * run.world),
                   {"logits": 3 * logit * sum(longest)}, sampling(c, o, SHOWN, PROMPT, o.response_length, w, cpu)]


def of_rm(o, run, model, sft, batches, text, prompt):
    """batches: records of the largest, each with its rows first; text, prompt: tokens of the longest that is held out,
    and that is answered for the scale."""
    c, w, cpu = model.config, run.dtype.itemsize, run.device.type == "cpu"
    steps = set()
    for part in (part for batch in batches for part in parts(run.share(batch) or batch, o)):
        lengths = sorted(len(row.ids) for record in part for row in record[0])
        together = [lengths[at:at + ROWS] for at in range(0, len(lengths), ROWS)]
        steps.add(tuple(a_pass(c, group, len(group)) for group in together))
    passes, (a, g, h, d) = most(training(c, o, step, 0, w, cpu) for step in steps), kept_by_block(c, o, w, cpu)
    return lasting(o, run, [model], [sft]) | {"packed": packed(o, run, [model], [])}, [
        {"activations": ROWS * text * (a + g + h * text + d)},
        *in_turn(passes, gradients(o, model), o.batch_size > o.micro_batch_size * run.world),
        sampling(c, o, min(BATCH, o.num_scale_samples), prompt, o.response_length, w, cpu)]


def of_dpo(o, run, policy, ref, batches, held_out, prompt):
    """batches: records of the largest, each with its rows first, a pass a microbatch; held_out: rows of an evaluation;
    prompt: tokens of the longest that is answered."""
    c, w, cpu = policy.config, run.dtype.itemsize, run.device.type == "cpu"
    logit, steps = FLOAT * c.vocab_size, set()
    for part in (part for batch in batches for part in parts(run.share(batch) or batch, o)):
        rows = [row for record in part for row in record[0]]
        steps.add(a_pass(c, [len(row.ids) - 1 for row in rows], answered(rows)))
    passes = most(training(c, o, [step], 4 * logit * step[-1], w, cpu) for step in steps)
    longest = sorted(held_out, key=lambda row: len(row.ids))[-ROWS:]
    return lasting(o, run, [policy], [ref]), [
        {"logits": 3 * logit * max(answered(longest), *(step[-1] for step in steps))},
        *in_turn(passes, gradients(o, policy), o.batch_size > o.micro_batch_size * run.world),
        sampling(c, o, min(BATCH, o.num_eval_prompts), prompt, o.response_length, w, cpu)]


def answered(rows):
    """Tokens of the rows' answers."""
    return sum(len(row.ids) - row.prompt_length for row in rows)


def of_ppo(o, run, policy, value, others, prompt):
    """value: None where there is none; others: models that do not learn; prompt: tokens of the longest."""
    c, w, cpu = policy.config, run.dtype.itemsize, run.device.type == "cpu"
    rows, length = o.batch_size // run.world, prompt + o.response_length
    learning, scored = (min(o.micro_batch_size, n) for n in (rows // o.num_mini_batches, rows))
    logits = FLOAT * c.vocab_size * o.response_length  # of an answer
    learners, scalar = [policy, value] if value else [policy], value or others[1]
    apart = scalar and scalar.first > 0 and not adapters.same_memory(policy, scalar, policy.first)
    below = FLOAT * length * c.n_embd * ((policy.first > 0) + bool(apart))  # of an answer
    update = training(c, o, [a_pass(c, learning * [length - 1], learning * o.response_length)],
                      (5 if o.ent_coef else 3) * logits * learning, w, cpu)
    return lasting(o, run, learners, others), [
        *(sampling(c, o, n, prompt, o.response_length, w, cpu) for n in (rows, min(BATCH, o.num_eval_prompts))),
        {"logits": 4 * logits * scored, "states": below * rows},
        *in_turn(update | {"states": below * (rows + rows // o.num_mini_batches)}, gradients(o, *learners),
                 learning < rows // o.num_mini_batches)]


def in_turn(passes, gradients, several):
    """A step's phases: the gradients come as the activations go, but for those of several microbatches."""
    return [passes | gradients] if several else [passes, gradients]


def heaviest(order, steps):
    """Rows of the batches that take most of an epoch's: the largest by their padded tokens, of the steps there are."""
    batches = map(order.batch, range(min(steps, order.steps_per_epoch)))
    return heapq.nlargest(16, batches, key=lambda rows: len(rows) * max(order.lengths[i] for i in rows))


def parts(rows, o):
    return [rows[at:at + o.micro_batch_size] for at in range(0, len(rows), o.micro_batch_size)]


def most(found):
    return max(found, key=lambda parts: sum(parts.values()))


# ---- beside what there is

def peak(stays, phases, cpu):
    """Bytes at a time."""
    return sum(stays.values()) + (GAPS if cpu else 1) * max(sum(parts.values()) for parts in phases)


def check(run, o, stage, *about):
    """-> the line to say of what a run needs and what the device has; exits 2 where that is less, unless --force.

    stage: an `of_STAGE`; about: what it takes after o and run. run.smaller becomes the first (changes of options,
    bytes) with clearly less, for the case that memory ends all the same.
    """
    cpu, (stays, phases) = run.device.type == "cpu", stage(o, run, *about)
    loaded = sum(stays.values()) - stays["packed"] if o.resume else stays["weights"]  # what is packed comes later
    stays["program"] = program = max(0, resident() - loaded) + LIBRARIES if cpu else 0

    def needs(**changes):
        stays, phases = stage(replace(o, **changes), run, *about)
        return peak(stays | {"program": program}, phases, cpu)

    need, there = peak(stays, phases, cpu), available(run.device)
    ways = [(changes, needs(**changes)) for changes in smaller(o)]
    fits, run.smaller = (next((way for way in ways if way[1] <= limit), None)
                         for limit in (there, min(0.9 * need, there)))
    shares = {part: max(found.get(part, 0) for found in (stays, *phases)) for part in PARTS}
    line = (f"memory: {', '.join(f'{part} {size(number)}' for part, number in shares.items() if number)}; at most "
            f"{size(need)} at a time, and {run.device} has {size(there)}")
    if need <= there:
        return line
    if o.force:
        return f"warning: {line}: --force"
    changes, least = fits or min(ways, key=lambda way: way[1], default=({"micro_batch_size": 1}, need))
    name = next(iter(changes))
    fail(f"--{name} {getattr(o, name)}: {line}: {words(changes)} needs {size(least)}"
         + ("" if fits else ", which is too much as well") + "; --force starts all the same")


def size(number):
    """"9.1 GB", "14.2 MB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def smaller(o):
    """Changes of options that need less memory, those first that change no result but for rounding; of a run that goes
    on these alone."""
    micro = [{"micro_batch_size": o.micro_batch_size >> n} for n in range(1, o.micro_batch_size.bit_length())]
    again = [{"checkpoint_activations": True}] * (not o.checkpoint_activations and not o.compile)
    yield from (*micro, *again, *(way | again[0] for way in micro if again))
    if o.resume:
        return
    least = {name: value for way in (*micro[-1:], *again) for name, value in way.items()}
    if not o.lora_rank and not o.freeze_layers and o.init_from != "scratch":
        yield from ({"lora_rank": 16}, {"lora_rank": 16} | least)
    if o.stage == "ppo":
        _, world = ranks()
        fewer = (o.batch_size >> n for n in range(1, o.batch_size.bit_length()))
        yield from ({"batch_size": size} | least for size in fewer
                    if size % (o.num_mini_batches * world) == 0 == size % (o.group_size * world))


def words(changes):
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())


def available(device):
    """Bytes that this process can have on a device in all: what is free there, and what it has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    free = min(field("/proc/meminfo", "MemAvailable"), group_room())
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # ranks of this machine
    return min(free / beside + resident(), sizes.memory_of(device))


def resident():
    """Bytes of memory that this process has; where the system does not tell, those it had at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return min(field("/proc/self/status", "VmRSS"), most)


def field(path, name):
    """Bytes of a line "name: N kB"; infinity where there is none, as on other systems than Linux."""
    with contextlib.suppress(OSError), open(path) as f:
        for line in f:
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return math.inf


def group_room(root="/"):
    """Bytes that are left below the memory limits of this process's control groups, v1 or v2, and of those they lie
    in; infinity where there are none."""
    rooms = [math.inf]
    with contextlib.suppress(OSError, ValueError), open(os.path.join(root, "proc/self/cgroup")) as f:
        for line in f:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            if controllers == "":
                place, names = "", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                place, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            for inner in (group, *map(str, Path(group).parents)):
                rooms.append(room_below(Path(root, "sys/fs/cgroup", place, inner.lstrip("/")), *names))
    return min(rooms)


def room_below(folder, limit, usage, reclaimable):
    """A control group's limit, less what it uses that could not go at once as copies of files can."""
    with contextlib.suppress(OSError, ValueError):  # without a limit v2 says "max"
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most - used + int(counts.get(reclaimable, 0))
    return math.inf


# ---- less of it: --checkpoint_activations

def recompute(model):
    """The model's blocks keep for the backward pass only what enters them, and are computed once more in it. The
    gradients are the same to the last bit: so is every sum, and dropout draws the same numbers.   Chen et al. 2016"""
    for block in model.h:
        block.forward = partial(recomputed, block.forward, [p for p in block.parameters() if p.requires_grad])


def recomputed(forward, parameters, x, mask, extend, *more):
    """Block.forward; parameters: those of it that learn."""
    if not torch.is_grad_enabled() or extend is not None:
        return forward(x, mask, extend, *more)
    return Recomputed.apply(lambda x: forward(x, mask, None, *more), x, *parameters)


class Recomputed(torch.autograd.Function):
    """y = function(x), a function of parameters too, of which only x is kept."""

    @staticmethod
    def forward(ctx, function, x, *parameters):
        kind, ctx.function, ctx.parameters, ctx.random = x.device.type, function, parameters, random_state(x.device)
        ctx.precision = dict(device_type=kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False,
                             enabled=torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x)
        with torch.autocast(**ctx.precision):  # casts that are kept here would have no gradients later
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        now = random_state(x.device)
        random_state(x.device, ctx.random)
        with torch.enable_grad(), torch.autocast(**ctx.precision):
            y = ctx.function(x)
        random_state(x.device, now)
        learn = [t for t in (x, *ctx.parameters) if t.requires_grad]
        found = torch.autograd.grad(y, learn, gradient)
        return None, *(found if x.requires_grad else (None, *found))


def random_state(device, state=None):
    """What dropout draws from on a device, put there if it is given."""
    numbers = torch if device.type == "cpu" else getattr(torch, device.type)
    place = (device,) if device.type == "cuda" else ()
    return numbers.get_rng_state(*place) if state is None else numbers.set_rng_state(state, *place)
