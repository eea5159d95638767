"""What makes training and sampling fast on a CPU, and sampling on a GPU. Without it the numbers are the same up to
rounding, only later.

`packed` for sampling, `pack_frozen` for training beside frozen weights, `pick_matmul` for float32 matmuls,
`keep_freed_memory` for the allocator, `share_cores` beside other processes, `Muon` where a CPU has no bfloat16, `AdamW`
without a second of imports. Nothing here is part of an algorithm.
"""
import contextlib
import ctypes
import functools
import inspect
import math
import os
import sys
import threading
import time
from functools import partial

import torch
import torch.nn.functional as F

from minirlhf.model import at_least_float32

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # CUDA: batches of many lengths, no gaps
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # kernels it keeps; 1024 of them creep up on memory
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # and for packed weights, 0.7 MB for each number of rows


# ---- sampling: weights packed once

def matmul_dtype(model):
    """The type in which the model's matmuls run here: autocast's, or that of its weights."""
    kind = model.wte.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.wte.weight.dtype


CAN_PACK = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
CAN_PACK_BFLOAT16 = CAN_PACK and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_linear(weight, bias, dtype, gelu=False):
    """-> a function x (..., in) -> (..., out): x @ weight.T + bias, through GELU if asked, in one oneDNN kernel."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
    bias = None if bias is None else bias.to(dtype)
    post = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, *post)


def cast_linear(weight, bias, dtype, gelu=False):
    """The same for a GPU: autocast would cast the weights, or those that are frozen, anew for each token."""
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh") if gelu else F.linear(x, weight, bias)


def in_place(kept, name, tensor):
    """The tensor, always in the same memory: that of the first one that `kept` got under that name."""
    return kept.setdefault(name, tensor).copy_(tensor)


@contextlib.contextmanager
def packed(model, kept=None):
    """While inside, the model's linear layers multiply with copies of the weights: on an x86 CPU in oneDNN's own order,
    on a GPU under autocast in bfloat16.

    Else each matmul would order or cast them anew, which for few rows costs as much as to multiply. The weights must
    stay as they are, and there are no gradients. In float32 a GPU takes them as they are, and so does a CPU for narrow
    models, where that is faster. kept: a dict in which a GPU's copies have the same memory each time.
    """
    replaced, on_cpu = [], model.wte.weight.device.type == "cpu"
    dtype = matmul_dtype(model) if on_cpu and CAN_PACK or model.wte.weight.device.type == "cuda" else None

    def replace(owner, name, function):
        replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, function)

    def pack(weight, bias=None, **options):
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if kept is not None and not on_cpu:
            weight, bias = (x if x is None else in_place(kept, (len(replaced), x.dim()), x.to(dtype))
                            for x in (weight, bias))
        return (packed_linear if on_cpu else cast_linear)(weight, bias, dtype, **options)

    if (dtype == torch.float32 and on_cpu and model.config.n_embd >= 128
            or dtype == torch.bfloat16 and (not on_cpu or CAN_PACK_BFLOAT16)):
        head = pack(model.unembedding)
        replace(model, "logits", lambda hidden: at_least_float32(head(hidden)))
        for block in model.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
                replace(layer, "forward", pack(layer.weight, layer.bias))
            c_fc, gpt2 = block.mlp.c_fc, model.config.family == "gpt2"
            widen = pack(c_fc.weight, c_fc.bias, gelu=gpt2)
            replace(block.mlp if gpt2 else c_fc, "forward", partial(packed_mlp, block.mlp, widen) if gpt2 else widen)
    try:
        yield
    finally:
        for owner, name, before in replaced:
            if before:
                setattr(owner, name, before)
            else:
                delattr(owner, name)


def packed_mlp(mlp, widen, x):
    return F.dropout(mlp.c_proj(widen(x)), mlp.dropout, mlp.training)


# ---- training: frozen weights packed once

class Frozen(torch.autograd.Function):
    """y = product(x), whose gradient with respect to x is back(that of y)."""

    @staticmethod
    def forward(ctx, x, product, back):
        ctx.back = back
        return product(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient.contiguous()), None, None


def packs_frozen(run):
    """Whether `pack_frozen` does anything."""
    return (run.dtype == torch.bfloat16 and run.device.type == "cpu" and CAN_PACK_BFLOAT16
            and not run.options.compile)


def pack_frozen(run, learners, others=()):
    """From now on matmuls with weights that do not learn, and so stay as they are, take copies in bfloat16 and in
    oneDNN's own order, where the run multiplies in bfloat16 on a CPU. others: models that do not learn at all.

    Else autocast would cast and oneDNN order all of them in every pass, forward and backward. The copies are made when
    they are first wanted, those for backward passes too, and models that share weights share them.
    """
    if packs_frozen(run):
        packs = {}  # {(address of a weight, True for a backward pass, else that of the bias): a product}
        for model in filter(None, (*learners, *others)):
            for layer in model.h.modules():
                if isinstance(layer, torch.nn.Linear) and not (layer.weight.requires_grad and model in learners):
                    layer.forward = partial(frozen_linear, packs, layer.weight, layer.bias)
            if model.head == "lm" and not (model.unembedding.requires_grad and model in learners):
                head = partial(frozen_linear, packs, model.unembedding, None)
                model.logits = lambda hidden, head=head: at_least_float32(head(hidden))


def frozen_linear(packs, weight, bias, x):
    """x (..., in) @ weight.T + bias -> (..., out), under autocast in its type."""
    if not torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)

    def product(back):
        at = weight.data_ptr(), back or bias is not None and bias.data_ptr()
        if at not in packs:
            matrix = weight.detach().to(torch.bfloat16)
            packs[at] = packed_linear(*(matrix.T.contiguous(), None) if back else (matrix, bias), torch.bfloat16)
        return packs[at]

    return Frozen.apply(x, product(False), product(True) if x.requires_grad and torch.is_grad_enabled() else None)


# ---- float32 matmuls, memory

def keep_freed_memory():
    """glibc: large tensors reuse warm pages instead of returning them, and the backward thread shares one arena."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


MATMUL_ERROR = 1e-3  # of what matmul_error finds: float32 gives about 1e-4, TF32 1e-2, bfloat16 1e-1


def matmul_error():
    """The largest error, against float64, of float32 matmuls of N(0, 1) entries on the CPU: 512 and 8 rows with
    512 x 512, plain, as a linear layer, also with `packed` weights, and in a batch."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact, bias = a.double() @ b.double(), torch.zeros(512)
    found = [a @ b, torch.nn.functional.linear(a, b.T.contiguous(), bias), torch.bmm(a[None], b[None])[0], a[:8] @ b]
    if CAN_PACK:
        weight = torch.ops.mkldnn._reorder_linear_weight(b.T.contiguous())
        found += [torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") for x in (a, a[:8])]
    return max(float((x - exact[:len(x)]).abs().max()) for x in found)


def pick_matmul(model):
    """For a model on an AMD CPU: float32 matmuls by oneDNN, up to twice as fast there as MKL, if they stay float32.

    "medium" lets oneDNN round to bfloat16, which it does on CPUs with AMX: then nothing changes, as on a GPU. For
    narrow models nothing does either: oneDNN makes a kernel for each new shape, 0.7 ms, and ragged batches have many.
    The choice depends on model and hardware alone, so that a run and its resumption make the same one.
    """
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    if model.wte.weight.device.type == "cpu" and model.config.n_embd >= 128 and "AMD" in name:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        if matmul_error() > MATMUL_ERROR:
            torch.set_float32_matmul_precision(before)


# ---- a machine that others use too

class Load:
    """The share that other processes take, meanwhile, of the cores that this one may use."""

    def __init__(self):
        self.at = self.read()

    @staticmethod
    def read():
        """-> wall, busy and own seconds of all cores; None where there is no /proc/stat."""
        own = os.times()
        try:
            with open("/proc/stat") as f:
                rows = [line.split() for line in f if line.startswith("cpu")]
        except OSError:
            return None
        cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        ticks = sum(int(n) for row in rows if row[0] in cores for n in (*row[1:4], *row[6:9]))  # not idle or iowait
        return (time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"),
                own.user + own.system + own.children_user + own.children_system)

    def others(self):
        """None where there is no /proc/stat."""
        if self.at is None:
            return None
        wall, busy, own = (now - then for then, now in zip(self.at, self.read()))
        return round(max(0.0, busy - own) / wall / cores_allowed(), 3)


def cores_allowed():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def share_cores():
    """From now on OpenMP's threads sleep while they wait for one another, whenever other processes want their cores.

    At the end of a loop that they share, they spin: fastest on an idle machine. But while one spins on its core,
    another may stand still because a process of somebody else has its core, and a step takes 7 to 60 times as long.
    GNU's OpenMP spins 100 rounds instead of 300,000 (libgomp's env.c) as soon as it has more threads than there are
    cores: so a watcher looks twice a second, and as long as cores are wanted, further threads that do nothing are
    there. Which thread computes what stays the same, and so do all results.

    Nothing happens where the environment says how to wait, and on systems without /proc/stat.
    """
    if torch.get_num_threads() > 1 and Load().at and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}:
        threading.Thread(target=watch, name="share_cores", daemon=True).start()


def watch(interval=0.5):
    leave = None
    while True:
        load, cores, threads = Load(), cores_allowed(), torch.get_num_threads()
        time.sleep(interval)
        crowded = load.others() * cores > cores - threads + (0.15 if leave else 0.3)
        if crowded and not leave:
            leave = threading.Event()
            for _ in range(-(-(cores - threads + 1) // max(1, threads - 1))):
                threading.Thread(target=idle_team, args=(leave,), daemon=True).start()
        elif leave and not crowded:
            leave.set()
            leave = None


def idle_team(leave):
    """A thread with an OpenMP team of its own, which lasts as long as the thread."""
    torch.zeros(torch.get_num_threads() << 16).add_(1)
    leave.wait()


# ---- optimizers

for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
    method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
    method.__dynamo_disable = method  # torch looks for it before it imports torch._dynamo, 1.5 s, to make one


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose step imports torch._dynamo too. Left out: `differentiable`."""
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its Newton-Schulz iteration in float32: for CPUs without bfloat16, on which torch's own, which
    always takes bfloat16, is 14 times as slow.   Jordan et al. 2024. Left out: closures, plain momentum."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (a, b, c) = group["lr"], group["ns_coefficients"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                x, tall = p.grad.lerp(momentum, group["momentum"]), len(p) > p.shape[1]  # Nesterov's
                x = (x.T if tall else x) / x.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # x -> a x + (b g + c g^2) x with g = x x^T: singular values near 1
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-lr * math.sqrt(max(1, len(p) / p.shape[1])))
