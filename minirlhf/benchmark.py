"""How fast this machine trains: `python -m minirlhf.benchmark` times what the three scripts run, on work that is fixed.

    S   4 layers x 256, 4 heads, vocabulary 2048; PPO: 64 prompts of 8 tokens, 32 new ones, 4 epochs x 4 minibatches
    M   GPT-2 124M: 12 layers x 768, 12 heads, vocabulary 50257; PPO: 16 prompts of 16, 32 new, 4 epochs x 1 minibatch
    L   M's model; PPO: 64 prompts of 64 tokens, 128 new ones, 4 epochs x 4 minibatches
    smollm2  SmolLM2-135M's shape: 30 layers x 576, vocabulary 49152; PPO: 64 prompts of 8, 24 new, 2 epochs x 2
    SFT: 32 rows of 64 tokens, a loss on 63 of each; reward model: 32 pairs of two rows of 64 tokens; both with AdamW

Weights and tokens are random, and no token is the end of text, so that every answer has its full length. Policy,
reference, value network and reward model are of one size. PPO has no entropy bonus here, as other trainers have none.
With --lora_rank, PPO's four networks stand on two trunks, or on one below the blocks that have adapters.

Invariant: what is timed is imported from the scripts; this is the one module that imports them. Figures are medians
over iterations after a warm-up; memory is read before the machine itself is measured. Not timed: log lines, looks at
held-out prompts, checkpoints. Memory is the process's peak, which cannot be divided among phases.

The floor of a phase is the larger of its FLOPs at the fastest product that this machine was seen to do and its bytes at
the fastest reading: the passes that are made here, nothing for norms, softmax, dropped caches or Python. In the table
a sample is a prompt, row or pair, seen once an epoch by the update; tokens are all of them, but those that are new in a
rollout and in an iteration.
"""
import json
import math
import resource
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

import train_ppo
import train_rm
import train_sft
from minirlhf import adapters, kernels, runtime, sizes
from minirlhf.config import all_printed, fail, launch, parse, ranks, say, unprinted, warn_idle
from minirlhf.data import Row
from minirlhf.generate import compile_model
from minirlhf.memory import adapter_weights, linear_weights
from minirlhf.model import GPT, GPTConfig
from minirlhf.rewards import RewardModel

NO_EOS = -1  # no token has this id


@dataclass
class Work:
    """A model's shape and one PPO iteration's."""
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    prompt: int
    response: int
    epochs: int
    minibatches: int
    more: dict = field(default_factory=dict)  # values of GPTConfig, for a model of the Llama family


SIZES = {"S": Work(4, 256, 4, 2048, batch=64, prompt=8, response=32, epochs=4, minibatches=4),
         "M": Work(12, 768, 12, 50257, batch=16, prompt=16, response=32, epochs=4, minibatches=1),
         "L": Work(12, 768, 12, 50257, batch=64, prompt=64, response=128, epochs=4, minibatches=4),
         "smollm2": Work(30, 576, 9, 49152, batch=64, prompt=8, response=24, epochs=2, minibatches=2,
                         more=dict(family="llama", n_kv_head=3, n_inner=1536, rope_theta=1e5))}
ROWS, LENGTH = 32, 64  # of SFT; the reward model has as many pairs


@dataclass
class Options:
    """Times SFT, reward model and PPO: the code that the scripts run, on random tokens. Reads and writes no files.

    S: 4 layers x 256, vocabulary 2048, 64 prompts of 8 tokens and 32 new ones. M: GPT-2 124M, 16 x (16 + 32) tokens.
    L: the same, 64 x (64 + 128). smollm2: 30 layers x 576, vocabulary 49,152, 64 x (8 + 24). SFT: 32 rows of 64 tokens.
    Reward model: 32 pairs of two such rows.
    """
    what: Literal["all", "sft", "reward", "ppo"] = "all"  # all: each in a process of its own, for its own peak memory
    size: Literal["S", "M", "L", "smollm2"] = "S"  # of the model and of PPO's batch
    lora_rank: int = 0  # rank of adapters on the linear layers, all else frozen; 0 = all is trained [0..4096]
    lora_layers: int = 0  # adapters in the last so many blocks only; 0 = in all [0..]
    batch: int = 0  # rows of SFT, pairs of the reward model, prompts of PPO; 0 = the size's own [0..1000000]
    iters: int = 0  # timed iterations after one to warm up; 0 = 5 of PPO, 20 of the others [0..1000000]
    micro_batch: int = 0  # rows (or pairs) a forward pass; 0 = the scripts' own default [0..1000000]
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto takes the GPU when there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of matmuls; auto: bfloat16 where the chip has it
    compile: bool = False  # run the networks through torch.compile
    threads: int = 0  # CPU threads; 0 = torch's own choice [0..1024]
    scaling: bool = False  # instead: PPO's s/iteration against batch, response length, width and depth, and the slopes
    json: bool = False  # print one JSON object a line instead of a table; PPO's comes last


# ---- what the work costs at least

def config_of(w):
    return GPTConfig(w.layers, w.heads, w.width, w.vocab, max(128, w.prompt + w.response), **w.more)


def passes(w, rows, tokens, pairs, selected, words, layers=None):
    """FLOPs of the matmuls of one forward pass through the last `layers` blocks (None: all) and the head, 2 for a
    multiplication and its addition -> those of queries, keys and values; other linear layers; attention; head.

    2 rows (L a tokens, (L - 1) b tokens + b selected, 2 H D L pairs, C words selected): a block's linear layers hold
    a + b weights, of which the last block needs a, for queries, keys and values, for a row's tokens and b for those
    that are selected; each of `pairs` (query, key) costs H D in q k^T and as much in the weighted sum; selected tokens
    meet a head of `words` outputs. In GPT-2 a = 3 C^2, b = 9 C^2 and H D = C.
    """
    c, L = config_of(w), w.layers if layers is None else layers
    a, b = linear_weights(c)
    return [2 * rows * n for n in (L * a * tokens, (L - 1) * b * tokens + b * selected,
                                   2 * c.n_head * c.head_size * L * pairs, c.n_embd * words * selected)]


def forward_flops(*work):
    return sum(passes(*work))


def below_flops(w, o, rows, tokens):
    """FLOPs of a forward pass through the blocks below those that learn, where no place is selected."""
    c = config_of(w)
    return 2 * rows * (w.layers - blocks_of(w, o)) * (sum(linear_weights(c)) * tokens
                                                      + 2 * c.n_head * c.head_size * causal(tokens))


def blocks_of(w, o):
    """How many blocks learn, the last ones: those that have adapters, or all."""
    return min(o.lora_layers or w.layers, w.layers) if o.lora_rank else w.layers


def adapter_flops(w, o, rows, tokens, selected):
    """FLOPs of a forward pass through the adapters alone."""
    (a, b), L = adapter_weights(config_of(w), o.lora_rank), blocks_of(w, o)
    return 2 * rows * (L * a * tokens + (L - 1) * b * tokens + b * selected)


def training_flops(w, o, rows, tokens, pairs, selected, words):
    """FLOPs of a pass forward and backward, which costs twice as much; with adapters, through their blocks alone.

    There frozen weights get no gradient, nor does what enters the first of these blocks. A scalar head learns.
    """
    if not o.lora_rank:
        return 3 * forward_flops(w, rows, tokens, pairs, selected, words)
    layers = blocks_of(w, o)
    qkv, other, attention, head = passes(w, rows, tokens, pairs, selected, words, layers)
    entering = 2 * rows * tokens * o.lora_rank * w.width
    return (2 * (qkv + other) - qkv // layers + 3 * attention + (3 if words == 1 else 2) * head
            + 3 * adapter_flops(w, o, rows, tokens, selected) - entering)


def causal(tokens):
    """Pairs of a query and a key that it sees, itself included."""
    return tokens * (tokens + 1) // 2


def parameters(w, head):
    """Weights of a model, embeddings and head included."""
    return runtime.count_parameters(sizes.outline(config_of(w), head))


def learned(w, o):
    """Numbers that learn in a policy or SFT model, and in a value network or reward model."""
    if not o.lora_rank:
        return [parameters(w, head) for head in ("lm", "scalar")]
    own = sum(adapter_weights(config_of(w), o.lora_rank)) * blocks_of(w, o)
    return [own, own + w.width + 1]


def ppo_cost(w, o, itemsize=4):
    """-> {phase: (FLOPs, bytes)} of one iteration; itemsize: bytes a weight is read as by matmuls.

    Rollout: each of P + R - 1 tokens goes through the policy once, R of them to the head; the weights are read at each
    of R steps, and the keys and values of the tokens so far. Scoring: policy, reference and value network on T - 1
    tokens, the reward model on T; each one's weights are read once, the two scalar ones without a head.
    Update: policy and value network forward and backward in each epoch; an optimizer step reads gradient, weight and
    two moments and writes the last three, in float32. With adapters scoring computes once, for all four networks, what
    lies below the blocks that have some.
    """
    P, R, T = w.prompt, w.response, w.prompt + w.response
    c, layers = config_of(w), blocks_of(w, o)
    block, head = sum(linear_weights(c)), w.vocab * w.width
    policy = forward_flops(w, w.batch, T - 1, causal(T - 1), R, w.vocab)
    rows = (w.batch, T - 1, causal(T - 1), R)
    scoring = [forward_flops(w, *rows, words, layers) for words in (w.vocab, w.vocab, 1)]
    scoring.append(forward_flops(w, w.batch, T, causal(T), 1, 1, layers))
    scoring.append(below_flops(w, o, w.batch, T) + 2 * adapter_flops(w, o, w.batch, T - 1, R))
    cached = 2 * w.layers * c.n_kv_head * c.head_size * w.batch * sum(range(P + 1, T))  # read at each decode step
    update = sum(training_flops(w, o, *rows, words) for words in (w.vocab, 1))
    return {"rollout": (policy, itemsize * (R * (block * w.layers + head) + cached)),
            "scoring": (sum(scoring), itemsize * (block * (w.layers + 3 * layers) + 2 * head)),
            "update": (w.epochs * update, w.epochs * w.minibatches * 7 * 4 * sum(learned(w, o)))}


def step_cost(w, what, batch, o):
    """-> {"step": (FLOPs, bytes)} of one SFT step (rows) or reward-model step (pairs)."""
    rows, tokens, selected, words = ((batch, LENGTH - 1, LENGTH - 1, w.vocab) if what == "sft" else
                                     (2 * batch, LENGTH, 1, 1))
    flops = below_flops(w, o, rows, tokens) + training_flops(w, o, rows, tokens, causal(tokens), selected, words)
    return {"step": (flops, 7 * 4 * learned(w, o)[what != "sft"])}


# ---- what the machine can do

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fastest(function, device, seconds=0.3):
    """The shortest of repeated calls, in seconds, after two to warm up."""
    best, spent = math.inf, -2
    while spent < seconds:
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        took = time.perf_counter() - began
        if spent < 0:
            spent += 1
        else:
            best, spent = min(best, took), spent + took
    return best


def matmul_peak(device, dtype):
    """-> GFLOP/s of the fastest square product in `dtype`, and of each way that torch has: {name: GFLOP/s}.

    On a CPU float32 has two: MKL ("highest") and oneDNN ("medium"), which counts where it is still float32.
    """
    before, found = torch.get_float32_matmul_precision(), {}
    for precision in ("highest", "medium") if device.type == "cpu" and dtype == torch.float32 else (before,):
        torch.set_float32_matmul_precision(precision)
        if precision == "medium" and kernels.matmul_error() > kernels.MATMUL_ERROR:
            continue
        for n in (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            rate = 2e-9 * n ** 3 / fastest(lambda: torch.mm(a, b, out=out), device)
            name = {"highest": "mkl", "medium": "onednn"}.get(precision) if dtype == torch.float32 else None
            name = name if name and device.type == "cpu" else str(dtype)[6:]
            found[name] = round(max(rate, found.get(name, 0)), 1)
    torch.set_float32_matmul_precision(before)
    return max(found.values()), found


def read_bandwidth(device):
    """GB/s at which a vector far larger than the caches is read."""
    x = torch.ones(2 ** (26 if device.type == "cpu" else 28), device=device)
    return 4e-9 * x.numel() / fastest(x.sum, device)


def peak_memory(device):
    """-> {"peak_rss_mb": of the process, "peak_gpu_mb": of CUDA's tensors, if there are any}."""
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    found = {"peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)}
    if device.type == "cuda":
        found["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    return found


# ---- the scripts' own steps, timed

def make_model(w, head, device, seed):
    return GPT(config_of(w), head).init_weights(torch.Generator().manual_seed(seed)).to(device)


def random_ids(w, rows, length):
    return torch.randint(1, w.vocab, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()


def start(o, script, **changes):
    """-> (the script's options with these changes, its Run, which claims no folder)."""
    options = script.Options(device=o.device, dtype=o.dtype, compile=o.compile, check=True, lora_rank=o.lora_rank,
                             lora_layers=o.lora_layers, **changes)
    if o.micro_batch:
        options = replace(options, micro_batch_size=o.micro_batch)
    if o.threads:
        torch.set_num_threads(o.threads)
    run = runtime.Run(options, "benchmark")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # there is nothing to save
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return options, run


def time_ppo(o, w, iters):
    """-> the run, seconds of rollout, scoring and update of each iteration after the first, seconds of the first."""
    options, run = start(
        o, train_ppo, batch_size=w.batch, num_ppo_epochs=w.epochs, num_mini_batches=w.minibatches,
        response_length=w.response, learning_rate=1e-5, value_warmup=0, ent_coef=0.0)
    ref, reward = make_model(w, "lm", run.device, 1), make_model(w, "scalar", run.device, 3)
    if o.lora_rank:
        policy, value = (adapters.learner(model, model.head, options, torch.Generator()) for model in (ref, reward))
        for name, p in adapters.below(policy, policy.first):
            reward.get_parameter(name).data = value.get_parameter(name).data = p.data
    else:
        policy, value = make_model(w, "lm", run.device, 1), make_model(w, "scalar", run.device, 2)
    sizes.check_rollout(f"--batch {w.batch}", policy, w.batch, w.prompt + w.response)
    kernels.pick_matmul(policy)
    kernels.pack_frozen(run, [policy, value], [ref, reward])
    reward = RewardModel(reward, None, run)
    if o.compile:
        compile_model(policy, decode=True), compile_model(value)
    optimizers = train_ppo.make_optimizers(policy, value, options)
    prompts, seconds = random_ids(w, w.batch, w.prompt), []
    for step in range(iters + 1):
        marks = [time.perf_counter()]

        def mark():
            synchronize(run.device)
            marks.append(time.perf_counter())

        rollout = train_ppo.roll_out(policy, prompts, [*range(len(prompts))], NO_EOS, step, options, run)
        mark()
        train_ppo.score_rollout(rollout, policy, ref, value, reward, options, run)
        mark()
        train_ppo.credit(rollout, options.kl_coef, options, run)
        train_ppo.update(rollout, policy, value, optimizers, step, options.num_ppo_epochs, options, run)
        mark()
        seconds.append([after - before for before, after in zip(marks, marks[1:])])
    assert rollout.tokens.shape == (w.batch, w.prompt + w.response)
    return run, seconds[1:], sum(seconds[0])


def time_step(o, w, iters, batch):
    """-> the run, the seconds of each SFT or reward-model step after the first, the first's seconds."""
    script = train_sft if o.what == "sft" else train_rm
    options, run = start(o, script, batch_size=batch, optimizer="adamw", learning_rate=1e-5)
    model = make_model(w, "lm" if o.what == "sft" else "scalar", run.device, 1)
    model = adapters.learner(model, model.head, options, torch.Generator()) if o.lora_rank else model
    kernels.pick_matmul(model)
    kernels.pack_frozen(run, [model])
    optimizers = runtime.make_optimizers(model, options)
    if o.compile:
        compile_model(model)
    rows = [Row(ids, 1) for ids in random_ids(w, batch * (1 if o.what == "sft" else 2), LENGTH)]
    data = rows if o.what == "sft" else [(pair, [(0, 1)], {}) for pair in zip(rows[::2], rows[1::2])]
    seconds = []
    for _ in range(iters + 1):
        began = time.perf_counter()
        loss = script.batch_gradients(model, data, 0, options, run)
        runtime.optimizer_step(model, optimizers, loss if o.what == "sft" else loss[0], "benchmark", options)
        synchronize(run.device)
        seconds.append(time.perf_counter() - began)
    return run, seconds[1:], seconds[0]


# ---- results

def measure(o):
    """One part, in this process -> its result, flat enough for a line of JSON."""
    load, w = kernels.Load(), SIZES[o.size]
    if o.what == "ppo":
        w = replace(w, batch=o.batch or w.batch)
        run, seconds, first = time_ppo(o, w, o.iters or 5)
        totals = [sum(s) for s in seconds]
        total = statistics.median(totals)
        phases = dict(zip(("rollout", "scoring", "update"), map(statistics.median, zip(*seconds))))
        cost, new = ppo_cost(w, o, run.dtype.itemsize), w.batch * w.response
        result = {"batch": w.batch, "prompt": w.prompt, "response": w.response, "epochs": w.epochs,
                  "minibatches": w.minibatches, "iters": len(seconds), "total_s": total, "min_total_s": min(totals),
                  "max_total_s": max(totals), "first_s": first, **{f"{name}_s": s for name, s in phases.items()},
                  "rollout_tok_s": new / phases["rollout"], "samples_s": w.batch / total, "tok_s": new / total}
    else:
        batch = o.batch or ROWS
        run, seconds, first = time_step(o, w, o.iters or 20, batch)
        step, cost = statistics.median(seconds), step_cost(w, o.what, batch, o)
        tokens, phases = batch * LENGTH * (1 if o.what == "sft" else 2), {"step": step}
        result = {"batch": batch, "length": LENGTH, "iters": len(seconds), "step_s": step, "min_step_s": min(seconds),
                  "first_s": first, "steps_s": 1 / step, "samples_s": batch / step, "tok_s": tokens / step}
    result |= peak_memory(run.device)
    peak, peaks = matmul_peak(run.device, run.dtype)
    bandwidth = read_bandwidth(run.device)
    floor = {name: max(flops / peak, moved / bandwidth) / 1e9 for name, (flops, moved) in cost.items()}
    if o.what == "ppo":
        phases["total"], floor["total"] = total, sum(floor.values())
        cost["total"] = tuple(map(sum, zip(*cost.values())))
    result |= {"floor_s": floor, "floor_ratio": {name: phases[name] / floor[name] for name in floor},
               "mfu": {name: cost[name][0] / phases[name] / peak / 1e9 for name in floor},
               "gflop": {name: flops / 1e9 for name, (flops, _) in cost.items()}}
    return {"what": o.what, "peer": "minirlhf", "size": o.size, "device": str(run.device), "dtype": str(run.dtype)[6:],
            "compile": o.compile, "threads": torch.get_num_threads(),
            "fast_matmul": torch.get_float32_matmul_precision() != "highest", "malloc": sys.platform == "linux",
            **rounded(result), "peak_gflops": peak, "peaks_gflops": peaks, "read_gb_s": round(bandwidth, 1),
            "versions": {"torch": torch.__version__}, "others_cpu": load.others()}


def rounded(value):
    """Five significant digits in all of a nested dict."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def slope(x, y):
    """The k of y ~ x^k by least squares in logarithms."""
    x, y = ([math.log(v) for v in values] for values in (x, y))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def scaling(o):
    """Yields, for each of four dimensions: its values, s/iteration of PPO there, and the slopes of time and FLOPs."""
    w = replace(SIZES[o.size], batch=o.batch or SIZES[o.size].batch)
    for name, factors in (("batch", (0.5, 1, 2, 4)), ("response", (0.5, 1, 2, 4)), ("width", (0.5, 1, 2)),
                          ("layers", (0.5, 1, 2))):
        points = [replace(w, **{name: round(getattr(w, name) * factor)}) for factor in factors]
        seconds = [statistics.median(map(sum, time_ppo(o, point, o.iters or 3)[1])) for point in points]
        flops = [sum(f for f, _ in ppo_cost(point, o).values()) for point in points]
        values = [getattr(point, name) for point in points]
        yield rounded({"what": "scaling", "size": o.size, "of": name, "values": values, "total_s": seconds,
                       "slope": slope(values, seconds), "flops_slope": slope(values, flops)})


TABLE = (("sft", "step", "SFT"), ("reward", "step", "reward model"), ("ppo", "rollout", "PPO rollout"),
         ("ppo", "scoring", "PPO scoring"), ("ppo", "update", "PPO update"), ("ppo", "total", "PPO iteration"))


def show(result):
    """A part's lines of the table."""
    gpu = f", GPU {result['peak_gpu_mb']:,} MB" if "peak_gpu_mb" in result else ""
    say(f"\n{result['what']} {result['size']}: {result['device']}, {result['dtype']}, {result['threads']} threads; "
        f"peak memory {result['peak_rss_mb']:,} MB{gpu}; matmuls at most {result['peak_gflops']:,.0f} GFLOP/s "
        f"({', '.join(f'{k} {v:,.0f}' for k, v in result['peaks_gflops'].items())}), reading "
        f"{result['read_gb_s']:.0f} GB/s; other processes took "
        + ("an unknown part" if result["others_cpu"] is None else f"{result['others_cpu']:.0%}") + " of the cores")
    say(f"{'':<16}{'s/iteration':>12}{'samples/s':>12}{'tokens/s':>12}{'MFU':>8}{'floor, s':>12}{'x floor':>9}")
    for what, phase, label in TABLE:
        if what == result["what"]:
            s = result[f"{phase}_s"]
            samples = result["batch"] * (result["epochs"] if phase == "update" else 1)
            length = result["response"] if phase in ("rollout", "total") else result["prompt"] + result["response"] \
                if what == "ppo" else result["length"] * (2 if what == "reward" else 1)
            say(f"{label:<16}{s:>12.4f}{samples / s:>12.1f}{samples * length / s:>12,.0f}"
                f"{result['mfu'][phase]:>8.1%}{result['floor_s'][phase]:>12.4f}{result['floor_ratio'][phase]:>9.2f}")


def alone(o, what):
    """measure(o) of one part in a process of its own."""
    given = [f"--{name}={value}" for name, value in asdict(replace(o, what=what, json=True)).items()]
    done = subprocess.run([sys.executable, "-m", "minirlhf.benchmark", *given], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    o = parse(Options, argv)
    if ranks()[1] > 1:
        fail("the benchmark is of one process: run it without torchrun")
    warn_idle(o, "lora_rank 0", not (o.lora_rank or o.json), "lora_layers")  # JSON is for programs
    if o.scaling and o.what not in ("all", "ppo"):
        fail(f"--what {o.what}: --scaling is of PPO")
    all_printed()
    least = SIZES[o.size].minibatches * (2 if o.scaling else 1)  # scaling halves the batch
    if o.what in ("all", "ppo") and o.batch % least:
        fail(f"--batch {o.batch}: must be a multiple of {least}, for the minibatches of size {o.size}")
    if o.scaling:
        for line in scaling(o):
            if o.json:
                say(json.dumps(line))
            else:
                points = ", ".join(f"{v}: {s:.3f}" for v, s in zip(line["values"], line["total_s"]))
                say(f"s/iteration against {line['of']:<9} {points}: slope {line['slope']:.2f} (its FLOPs "
                    f"{line['flops_slope']:.2f})")
            all_printed()
        return
    for what in ("sft", "reward", "ppo") if o.what == "all" else (o.what,):
        result = alone(o, what) if o.what == "all" else measure(o)
        say(json.dumps(result)) if o.json else show(result)
        all_printed()


if __name__ == "__main__":
    launch(main)
