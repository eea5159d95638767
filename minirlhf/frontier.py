"""Methods side by side on one ground: `python -m minirlhf.frontier` runs what is missing, measures all, and draws it.

One SFT model, one reward model, one judge that no policy saw, one set of held-out prompts. A run is a command that
anybody can repeat; it has a folder of its own and goes on where it was stopped. For every policy: how far it went from
the SFT model (KL) against what the reward model and the judge think of its answers.   Gao et al. 2022

Each method is tuned first: at one strength of its penalty it is trained at several learning rates, and the one with the
best score - PRICE * KL serves all of its points; where that is at an end of what was tried, more is tried. The table
keeps the rows of this sweep. They are judged on the prompts that all figures are of, by the reward model alone.

Left out: other models than @scratch's. For these, change METHODS, which holds all that is particular to them.
"""
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from minirlhf import checkpoint, chart, evaluate, kernels, rewards, runtime
from minirlhf.config import fail, launch, parse, say, unprinted
from minirlhf.data import encode_prompts, fingerprint
from minirlhf.objectives import best_of_n_kl

PRESET = "@scratch"
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # learning rates that a sweep may try
MOST = 5  # of them, for one method
PRICE = 0.05  # of a nat of KL, in standard deviations of the score, where learning rates are compared
SEEDS = (1337, 1, 2, 3, 4)
BEST_OF = (1, 2, 4, 16, 64)
ANSWERS = 4  # to each prompt, of which rankings are made
TOLD = 10  # seconds between lines on a run in progress


class Method(NamedTuple):
    script: str  # or module
    option: str  # what holds the policy near the SFT model
    values: tuple  # of it, the points
    middle: float  # the one at which learning rates are tried
    rates: tuple  # those that are tried first, neighbours in RATES
    words: tuple  # options of all its runs


RL = tuple("--total_episodes 3840 --batch_size 96 --eval_interval 1000 --num_eval_prompts 64".split())
DPO = tuple("--eval_interval 100000 --num_eval_texts 512 --num_eval_prompts 64".split())
METHODS = {
    "ppo": Method("train_ppo.py", "kl_coef", (0.01, 0.03, 0.1, 0.3), 0.03, (1e-4, 3e-4, 1e-3), RL),
    "rloo": Method("train_ppo.py", "kl_coef", (0.01, 0.03, 0.1), 0.03, (1e-4, 3e-4, 1e-3),
                   (*RL, "--advantages", "rloo", "--group_size", "4")),
    "dpo": Method("minirlhf.dpo", "beta", (0.03, 0.1, 0.3, 1.0), 0.1, (3e-5, 1e-4, 3e-4),
                  (*DPO, "--num_train_epochs", "1")),
    "dpo-on-policy": Method("minirlhf.dpo", "beta", (0.03, 0.1, 0.3, 1.0), 0.1, (3e-5, 1e-4, 3e-4),
                            (*DPO, "--num_train_epochs", "2")),
    "best-of-n": None}
CALLED = {"ppo": "PPO", "rloo": "RLOO", "dpo": "DPO, people's pairs", "dpo-on-policy": "DPO, ranked samples",
          "best-of-n": "best of n"}


@dataclass
class Options:
    """Methods side by side: KL from the SFT model against the reward model's and a judge's scores. Runs what is missing
    with @scratch, writes frontier.json, frontier.md and frontier.svg, and goes on where it was stopped."""
    # ---- what
    methods: str = "ppo,rloo,dpo,dpo-on-policy,best-of-n"  # those to compare, of these
    seeds: int = 1  # runs of each point, with the seeds 1337, 1, 2, 3, 4 [1..5]
    num_prompts: int = 512  # held-out prompts that every policy answers [2..1000000]
    # ---- where
    out: str = "out/frontier"  # folder of runs and results
    data_dir: str = "data/sentiment"  # folder of the data; the default is prepared when it is missing
    sft: str = "out/scratch/sft"  # the SFT model; these three are trained where they are missing
    reward_model: str = "out/scratch/rm"  # what policies are trained with
    judge: str = "out/scratch/judge"  # what only looks on
    dry_run: bool = False  # show the commands, run nothing


class Job(NamedTuple):
    """A run, and the row of the table that it becomes."""
    name: str
    script: str
    words: tuple
    row: dict = {}

    def folder(self):
        """Where the run is, "" for one that leaves a file."""
        return self.words[-1] if self.words[-2] == "--out_dir" else ""

    def command(self):
        return " ".join([runtime.start_of(self.script), *map(shlex.quote, self.words)])


# ---- what there is to run

def base_jobs(o):
    """What makes the three models and the ranked samples: {name: (Job, the file that it leaves)}."""
    data = ("--data_dir", o.data_dir) if o.data_dir != Options.data_dir else ()
    trunk = ("--init_from", o.sft, *data)
    jobs = {"sft": (Job("sft", "train_sft.py", (PRESET, *data, "--out_dir", o.sft)), o.sft),
            "rm": (Job("rm", "train_rm.py", (PRESET, *trunk, "--out_dir", o.reward_model)), o.reward_model),
            "judge": (Job("judge", "train_rm.py", (PRESET, *trunk, "--preferences", "judge", "--out_dir", o.judge)),
                      o.judge)}
    if "dpo-on-policy" in o.methods.split(","):
        path = os.path.join(o.out, "ranked.jsonl")
        jobs["ranked"] = Job("ranked", "minirlhf.sample", (
            o.sft, o.reward_model, "--rank", "--n", str(ANSWERS), "--prompts",
            os.path.join(o.data_dir, "prompts.train.jsonl"), "--output", path)), path
    return jobs


def job_of(method, value, rate, seed, o):
    m = METHODS[method]
    name = f"{method}-{m.option}-{value:g}-lr-{rate:g}-seed-{seed}"
    words = [PRESET, "--init_from", o.sft]
    words += ["--data_dir", o.data_dir] if o.data_dir != Options.data_dir else []
    words += ["--reward_model", o.reward_model] if m.script == "train_ppo.py" else []
    words += ["--preferences", os.path.join(o.out, "ranked.jsonl")] if method == "dpo-on-policy" else []
    words += [*m.words, f"--{m.option}", f"{value:g}", "--learning_rate", f"{rate:g}", "--seed", str(seed), "--out_dir",
              os.path.join(o.out, name)]
    return Job(name, m.script, tuple(words), {"method": method, m.option: value, "learning_rate": rate, "seed": seed})


def worth(row):
    """What learning rates are compared by: the mean score, less PRICE a nat of KL. A run that failed is worth least."""
    return -math.inf if "failed" in row else row["score"][0] - PRICE * row["kl"][0]


def sweep(method, rows, o):
    """-> jobs of a method's learning rates, as far as they are known, and the best rate, None before all are run.

    The best shall have a neighbour on both sides that is worse, unless MOST were tried.
    """
    m = METHODS[method]
    low, high = RATES.index(m.rates[0]), RATES.index(m.rates[-1])
    while True:
        jobs = [job_of(method, m.middle, rate, SEEDS[0], o) for rate in RATES[low:high + 1]]
        if not all(job.name in rows for job in jobs):
            return jobs, None
        best = max(jobs, key=lambda job: worth(rows[job.name]))
        rate = best.row["learning_rate"]
        if high + 1 - low >= MOST or worth(rows[best.name]) == -math.inf:
            return jobs, rate
        if best is jobs[0] and low > 0:
            low -= 1
        elif best is jobs[-1] and high + 1 < len(RATES):
            high += 1
        else:
            return jobs, rate


def jobs_of(method, rows, o):
    """-> a method's jobs as far as they are known, how many more there are, and its points: the names of those at the
    best learning rate, before that is known of the best so far."""
    jobs, rate = sweep(method, rows, o)
    if rate is None:
        best = max((job.name for job in jobs if job.name in rows), key=lambda name: worth(rows[name]), default=None)
        return jobs, len(METHODS[method].values) * o.seeds - 1, [best] if best else []
    points = [job_of(method, value, rate, seed, o) for seed in SEEDS[:o.seeds] for value in METHODS[method].values]
    tried = {job.name for job in jobs}
    return [*jobs, *(job for job in points if job.name not in tried)], 0, [job.name for job in points]


# ---- running

class Runner:
    """Runs jobs, one at a time, each a process of its own; tells how far all of them are.

    Invariant: "exit status 0" is the last line of OUT/logs/NAME.log where a run has ended, which is not run again.
    """

    def __init__(self, o):
        self.o, self.child, self.stop, self.left = o, None, 0, []  # left: [(kind, how many)] of runs to come
        self.began, self.pace = time.monotonic(), runtime.Pace()

    def log_of(self, job):
        return os.path.join(self.o.out, "logs", f"{job.name}.log")

    def ended(self, job):
        """Whether a job has run to its end."""
        try:
            with open(self.log_of(job), encoding="utf-8") as f:
                return f.read().endswith("exit status 0\n")
        except FileNotFoundError:
            return False

    def on_signal(self, number, frame):
        """The run in progress ends its step and saves, as it does when it is asked itself."""
        self.stop = number
        if self.child:
            self.child.send_signal(signal.SIGTERM)

    def run(self, job):
        """-> its exit status, and the last line that it wrote. A run that was begun before goes on."""
        folder, kind = job.folder(), job.row.get("method", job.name)
        begun = any(os.path.exists(os.path.join(folder, name)) for name in ("config.json", "ckpt.pt"))
        self.wait_for(folder)
        words = [*job.words, *(["--resume"] if begun else [])]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        program = [os.path.join(root, job.script)] if job.script.endswith(".py") else ["-m", job.script]
        began, told, last = time.monotonic(), time.monotonic(), ""
        with open(self.log_of(job), "a", encoding="utf-8") as log:
            log.write(f"$ {job.command()}{' --resume' * begun}\n")
            self.child = subprocess.Popen(  # of its own session, so that Ctrl-C comes to it once, from here
                [sys.executable, *program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))})
            for line in self.child.stdout:
                log.write(line)
                log.flush()
                last = line.strip() or last
                progress = re.match(r" *\d+/\d+ +\d+% \S+", line)
                if progress and time.monotonic() > told + TOLD:
                    told = time.monotonic()
                    say(f"    {self.clock(kind, told - began)}  {job.name}: {progress[0].strip()}")
            status = self.child.wait()
            self.child = None
            self.check_stop()
            log.write(f"exit status {status}\n" if status >= 0 else f"ended by signal {-status}\n")
        if status == 0 and not begun:
            self.pace.add(kind, time.monotonic() - began)
        return status, last

    def check_stop(self):
        if self.stop:
            say(f"stopped; go on with: {again(self.o)}")
            raise SystemExit(128 + self.stop)

    def wait_for(self, folder):
        """Until a run that outlived an earlier frontier has ended."""
        try:
            with open(os.path.join(folder, "lock"), "rb") as f:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(f"    waits for the run with pid {f.read().decode()} in {folder}")
                    fcntl.flock(f, fcntl.LOCK_EX)
        except FileNotFoundError:
            pass

    def clock(self, kind="", used=0.0):
        """"1:02<48:10": time used, and left for all that is to come, as long as runs take that are like it."""
        every = [s for found in self.pace.seconds.values() for s in found]
        usual = sum(every) / len(every) if every else 0.0
        left = sum(self.pace.left(k, n) or n * usual for k, n in self.left)
        return f"{runtime.clock(time.monotonic() - self.began)}<{runtime.clock(max(0.0, left - used)) if left else '?'}"


def again(o):
    return " ".join([runtime.start_of("minirlhf.frontier"), *(f"--{k}" if v is True else runtime.option(k, v) for k, v in
                    vars(o).items() if k != "given" and v != getattr(Options, k))])


# ---- measuring

class Ground:
    """What all policies stand on: SFT model, reward model, judge and prompts, and the SFT model's own answers."""

    def __init__(self, o):
        device = runtime.pick_device("auto")
        self.o, self.run = o, runtime.Precision(device, "float32")
        self.settings = SimpleNamespace(seed=SEEDS[0], temperature=1.0, response_length=48)
        self.sft, self.tokenizer, _ = checkpoint.load(o.sft, checkpoint.POLICIES, device)
        kernels.pick_matmul(self.sft)
        self.scorers = {name: rewards.load(spec, f"--{option}", self.sft, self.tokenizer, o.sft, self.run)
                        for name, option, spec in (("score", "reward_model", o.reward_model), ("judge", "judge", o.judge))}
        path = os.path.join(o.data_dir, "prompts.val.jsonl")
        self.settings.response_length = min(48, self.sft.config.block_size // 2)
        self.prompts = encode_prompts(self.tokenizer, evaluate.held_out_prompts(path, 0.05)[0],
                                      self.sft.config.block_size - self.settings.response_length, "drop")[0]
        self.prompts = self.prompts[:o.num_prompts]
        self.base = self.answers(self.sft)

    def answers(self, policy, draw=0):
        return evaluate.answer(policy, self.sft, self.scorers, self.prompts, self.tokenizer, self.settings, self.run,
                               draw)

    def measure(self, path):
        """A policy's figures, as train_ppo.py's closing report and `python -m minirlhf.evaluate` have them."""
        policy, tokenizer, _ = checkpoint.load(path, checkpoint.POLICIES, self.run.device)
        checkpoint.compatible((policy, tokenizer), path, (self.sft, self.tokenizer), self.o.sft)
        return evaluate.summary(self.answers(policy), self.base)

    def best_of(self, runner):
        """Yields (n, figures) of the SFT model's best answer of n. Draws are kept in OUT/draws.jsonl, one a line."""
        path, draws = os.path.join(self.o.out, "draws.jsonl"), [self.base]
        if os.path.exists(path):
            with open(path, "rb+") as f:
                for line in f:
                    if not line.endswith(b"\n"):  # torn
                        f.truncate(f.seek(-len(line), os.SEEK_CUR))
                        break
                    draws.append(json.loads(line))
        for n in BEST_OF:
            while len(draws) < n:
                draws.append(self.answers(self.sft, len(draws)))
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(draws[-1], ensure_ascii=False) + "\n")
                runner.check_stop()
            best = evaluate.summary(evaluate.best_of(draws[:n]), self.base)
            yield n, {k: v for k, v in best.items() if k not in ("kl", "kl_k3")} | {"kl_bound": best_of_n_kl(n)}


def seconds_of(folder):
    """Seconds of all steps of a run, evaluations and start-up apart."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        return sum(json.loads(line).get("seconds", 0.0) for line in f)


# ---- what is kept

class Results:
    """frontier.json: what was measured, on what. Each row is on the disk before the next run begins."""

    def __init__(self, o):
        self.o, self.path, self.state = o, os.path.join(o.out, "frontier.json"), {"ground": {}, "baseline": {}, "rows": {}}
        if os.path.exists(self.path):
            try:
                with open(self.path, encoding="utf-8") as f:
                    self.state = json.load(f)
                self.rows = self.state["rows"]
                assert all(isinstance(row, dict) and "command" in row for row in self.rows.values())
            except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
                fail(f"{self.path}: does not fit ({type(error).__name__}); move it away, or choose another --out")
        self.rows = self.state["rows"]

    def check_ground(self, ground):
        """Exits 2 where the rows that are there were measured on something else."""
        o = self.o
        now = {"prompts": len(ground.prompts), "seed": ground.settings.seed,
               "response_length": ground.settings.response_length, **{
                   name: fingerprint(*(rewards.files(spec))) for name, spec in (
                       ("sft", o.sft), ("reward_model", o.reward_model), ("judge", o.judge))}}
        for name, value in now.items():
            if self.state["ground"].get(name, value) != value:
                fail(f"--out {o.out}: its rows were measured with another {name.replace('_', ' ')}; choose another --out")
        self.state |= {"ground": now, "baseline": evaluate.summary(ground.base, ground.base)}

    def check(self, job):
        """Exits 2 where a row of this name is another command's."""
        if job.name in self.rows and self.rows[job.name]["words"] != [*job.words]:
            fail(f"--out {self.o.out}: the row {job.name} was made with other options: {self.rows[job.name]['command']}; "
                 "choose another --out")

    def add(self, job, figures):
        self.rows[job.name] = {**job.row, **figures, "command": job.command(), "words": [*job.words]}
        self.write()

    def write(self):
        """All files, from what is there by now."""
        state = runtime.finite(self.state)
        for name, content in (("frontier.json", json.dumps(state, ensure_ascii=False, indent=1) + "\n"),
                              ("frontier.md", "\n".join(report(self.state, self.o)) + "\n"),
                              ("frontier.svg", figure(self.state, self.o))):
            path = os.path.join(self.o.out, name)
            try:
                with open(f"{path}.tmp", "w", encoding="utf-8") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(f"{path}.tmp", path)
            except OSError as error:
                raise SystemExit(f"error: {path}: could not be written ({error.strerror}); what was there before is "
                                 "untouched")


# ---- what is told

def kl_of(row):
    """KL from the SFT model, nats a response: k1's estimate, or the bound of best-of-n."""
    return max(0.0, row["kl_bound"] if "kl_bound" in row else row["kl"][0])


def points_of(method, state, o):
    """A method's rows at its best learning rate, by KL."""
    rows = state["rows"]
    names = [name for name, row in rows.items() if row["method"] == method]
    if METHODS[method]:
        names = [name for name in jobs_of(method, rows, o)[2] if name in rows]
    return sorted((rows[name] for name in names if "failed" not in rows[name]), key=kl_of)


def over_seeds(points, o):
    """One point a strength: means over its seeds, of several with the lowest and the highest in place of intervals."""
    groups = {}
    for row in points:
        groups.setdefault(row.get("n") or row[METHODS[row["method"]].option], []).append(row)
    for group in groups.values():
        first, out = group[0], dict(group[0])
        for name in ("score", "judge_score", "kl") if len(group) > 1 else ():
            values = [row[name][0] for row in group]
            mean = sum(values) / len(values)
            out[name] = mean, max(max(values) - mean, mean - min(values))
        yield out


def strength(row):
    """"kl_coef 0.03", "best of 16"."""
    if row["method"] == "best-of-n":
        return f"best of {row['n']}"
    option = METHODS[row["method"]].option
    return f"{option} {row[option]:g}"


def figure(state, o):
    """frontier.svg: two panels, one line a method from the SFT model on, intervals as bars."""
    panels = []
    for name, title in (("score", "By the reward model that was optimised"), ("judge_score", "By a judge that only looks on")):
        series = {}
        for method in o.methods.split(","):
            points = [*over_seeds(points_of(method, state, o), o)]
            if points:
                series[CALLED[method]] = [chart.Point(0, state["baseline"][name][0], name="the SFT model"), *(
                    chart.Point(math.sqrt(kl_of(row)), row[name][0], row[name][0] - row[name][1],
                                row[name][0] + row[name][1], *root_of_interval(row), strength(row)) for row in points)]
        panels.append(chart.lines(series, "square root of the KL from the SFT model, nats a response",
                                  "mean score, SFT = 0 with deviation 1", title, x_range=(0,)))
    return chart.beside(*panels)


def root_of_interval(row):
    if "kl_bound" in row:
        return None, None
    return math.sqrt(max(0.0, row["kl"][0] - row["kl"][1])), math.sqrt(max(0.0, row["kl"][0] + row["kl"][1]))


def at(points, kl, base, name):
    """A score where a method's line has this KL, None beyond its end: straight between points, in the root of KL."""
    line = [(0.0, base[name][0]), *((math.sqrt(kl_of(row)), row[name][0]) for row in points)]
    x = math.sqrt(kl)
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x0 <= x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def findings(state, o):
    """Sentences: who gets most of the judge for a nat, from where on the reward model misleads, what best-of-n gives."""
    lines = {method: [*over_seeds(points_of(method, state, o), o)] for method in o.methods.split(",")}
    lines, base = {method: points for method, points in lines.items() if len(points) > 1}, state["baseline"]
    if len(lines) > 1:
        kl = min(kl_of(points[-1]) for points in lines.values())
        gains = {method: at(points, kl, base, "judge_score") - base["judge_score"][0] for method, points in lines.items()}
        order = sorted(gains, key=gains.get, reverse=True)
        yield (f"At a KL of {kl:.2f} nats, as far as all methods went, the judge's score has risen most with "
               f"{CALLED[order[0]]}: " + ", ".join(f"{CALLED[m]} {gains[m]:+.2f}" for m in order) + ".")
    for method, points in lines.items():
        yield f"{CALLED[method]}: {over_optimised(points)}."
    best = lines.get("best-of-n", [])[-1:]
    for row in best:
        others = []
        for method in (m for m in lines if m != "best-of-n"):
            reached = next((kl_of(p) for p in lines[method] if p["judge_score"][0] >= row["judge_score"][0]), None)
            others.append(f"{CALLED[method]} reaches that " + (f"by a KL of {reached:.2f}" if reached else "nowhere"))
        yield (f"Without any training the best of {row['n']} answers has a judge's score of {row['judge_score'][0]:+.2f} "
               f"(reward model {row['score'][0]:+.2f}) at a KL of {row['kl_bound']:.2f} at most"
               + "".join(f"; {other}" for other in others) + ".")


def over_optimised(points):
    """From which KL on the reward model's score rises and the judge's falls, by more than their intervals."""
    peak = max(points, key=lambda row: row["judge_score"][0])
    for row in points[points.index(peak) + 1:]:
        fall, noise = peak["judge_score"][0] - row["judge_score"][0], math.hypot(peak["judge_score"][1],
                                                                                row["judge_score"][1])
        if row["score"][0] > peak["score"][0] and fall > noise:
            return (f"over-optimised from a KL of {kl_of(peak):.2f} on: at {kl_of(row):.2f} the reward model's score has "
                    f"risen by {row['score'][0] - peak['score'][0]:.2f}, the judge's fallen by {fall:.2f}")
    return (f"the judge's score does not fall while the reward model's rises, up to a KL of {kl_of(points[-1]):.2f}")


COLUMNS = (("KL (k1)", "kl", "{:.2f} +- {:.2f}"), ("KL (k3)", "kl_k3", "{:.2f} +- {:.2f}"),
           ("score", "score", "{:.3f} +- {:.3f}"), ("judge", "judge_score", "{:.3f} +- {:.3f}"),
           ("preferred", "win_rate", "{:.1%} ({:.1%}-{:.1%})"),
           ("by the judge", "judge_win_rate", "{:.1%} ({:.1%}-{:.1%})"), ("length", "mean_length", "{:.1f}"),
           ("distinct-2", "distinct_2", "{:.3f}"), ("repeated", "repeated", "{:.1%}"), ("ends", "eos_rate", "{:.1%}"),
           ("log-prob. a token", "ref_logprob_per_token", "{:.3f}"), ("seconds", "seconds", "{:.0f}"))


def cells(row):
    for _, name, form in COLUMNS:
        if name == "kl" and "kl_bound" in row:
            yield f"<= {row['kl_bound']:.2f}"
        else:
            value = row.get(name)
            yield "" if value is None else form.format(*(value if isinstance(value, (list, tuple)) else [value]))


def table(rows, state):
    yield "| method | at | learning rate | seed | " + " | ".join(name for name, *_ in COLUMNS) + " |"
    yield "|---" * (4 + len(COLUMNS)) + "|"
    yield "| SFT | | | | " + " | ".join(cells(state["baseline"])) + " |"
    for row in rows:
        yield (f"| {CALLED[row['method']]} | {strength(row)} | {row.get('learning_rate', '')} | {row.get('seed', '')} | "
               + (f"failed: {row['failed']}" if "failed" in row else " | ".join(cells(row))) + " |")


def report(state, o):
    """Lines of frontier.md."""
    methods, ground = o.methods.split(","), state["ground"]
    points = [row for method in methods for row in points_of(method, state, o)]
    others = [row for row in state["rows"].values() if row not in points and row["method"] in methods]
    yield from ("# Methods side by side", "", *findings(state, o), "", (
        f"On {ground['prompts']} held-out prompts, with 95 % intervals of the mean over these. KL from the SFT model in "
        "nats a response; scores in standard deviations of the SFT model's answers; \"preferred\" to the SFT model's "
        "answer, by the reward model; log-probability a token under the SFT model; seconds of training steps."), "",
        *table(points, state), "", "## Learning rates that were tried and not taken", "",
        f"Compared by the score, less {PRICE:g} a nat of KL.", "", *table(others, state), "", "## Commands", "")
    for name, row in state["rows"].items():
        yield f"- {name}: `{row['command']}`"


# ---- the command

def show_plan(o, results):
    """What would be run, as far as it is known before the learning rates are."""
    runner = Runner(o)
    for job, path in base_jobs(o).values():
        say(f"{'there' if there(job, path, runner) else 'run  '}  {job.command()}")
    for method in o.methods.split(","):
        if not METHODS[method]:
            say(f"{'there' if best_of_job(BEST_OF[-1], o).name in results.rows else 'run  '}  "
                f"{best_of_job(','.join(map(str, BEST_OF)), o).command()}")
            continue
        jobs, more, _ = jobs_of(method, results.rows, o)
        for job in jobs:
            say(f"{'there' if job.name in results.rows else 'run  '}  {job.command()}")
        if more:
            m = METHODS[method]
            say(f"run    {more} more of {method} at the best of these learning rates, with --{m.option} "
                f"{', '.join(f'{v:g}' for v in m.values if v != m.middle)}")


def best_of_job(n, o):
    prompts = os.path.join(o.data_dir, "prompts.val.jsonl")
    return Job(f"best-of-{n}", "minirlhf.evaluate", (
        o.sft, "--baseline", o.sft, "--reward_model", o.reward_model, "--judge", o.judge, "--prompts", prompts,
        "--num_prompts", str(o.num_prompts), "--seed", str(SEEDS[0]), "--dtype", "float32", "--best_of", str(n)),
        {"method": "best-of-n", "n": n})


def there(job, path, runner):
    """Whether what a base job makes is there: made to the end, or by somebody else."""
    if not os.path.exists(checkpoint.file_of(path)) and not (job.folder() and checkpoint.is_foreign(path)):
        return False
    return runner.ended(job) or not os.path.exists(runner.log_of(job))


def run_base(o, runner):
    for job, path in base_jobs(o).values():
        if there(job, path, runner):
            continue
        say(f"{runner.clock()}  {job.command()}")
        status, last = runner.run(job)
        if status:
            give_up(job, status, last, runner)


def give_up(job, status, last, runner):
    """Exits, for a command has ended so that nothing can be measured."""
    told = f"{job.name}: {last.removeprefix('error: ')} (log: {runner.log_of(job)}; command: {job.command()})"
    fail(told) if status == 2 else sys.exit(f"error: {told}; exit status {status}; once more goes on")


def run_all(o, runner, results):
    run_base(o, runner)
    ground = Ground(o)
    results.check_ground(ground)
    methods = o.methods.split(",")
    if "best-of-n" in methods and best_of_job(BEST_OF[-1], o).name not in results.rows:
        for n, figures in ground.best_of(runner):
            results.add(best_of_job(n, o), figures)
            say(described(best_of_job(n, o).name, figures))
    while True:
        known = {method: jobs_of(method, results.rows, o) for method in methods if METHODS[method]}
        to_do = {method: [job for job in jobs if job.name not in results.rows] for method, (jobs, *_) in known.items()}
        for job in (job for jobs, *_ in known.values() for job in jobs):
            results.check(job)
        runner.left = [(method, len(to_do[method]) + more) for method, (_, more, _) in known.items()]
        left = sum(n for _, n in runner.left)
        if not left:
            return
        job = next(job for jobs in to_do.values() for job in jobs)
        say(f"{runner.clock()}  {left} to go: {job.command()}")
        if not runner.ended(job):
            status, last = runner.run(job)
            began = os.path.exists(os.path.join(job.folder(), "metrics.jsonl"))
            if status and not (began and status > 0):
                give_up(job, status, last, runner)
            if status:  # it diverged, which is a result
                results.add(job, {"failed": last})
                say(f"  {job.name}: failed: {last}")
                continue
        figures = ground.measure(job.folder()) | {"seconds": seconds_of(job.folder())}
        runner.check_stop()
        results.add(job, figures)
        say(described(job.name, figures))


def described(name, f):
    kl = f"KL <= {f['kl_bound']:.2f}" if "kl_bound" in f else f"KL {f['kl'][0]:.2f} +- {f['kl'][1]:.2f}"
    return (f"  {name}: {kl}, score {f['score'][0]:+.3f}, preferred {f['win_rate'][0]:.1%}; judge "
            f"{f['judge_score'][0]:+.3f}, {f['judge_win_rate'][0]:.1%}; length {f['mean_length']:.1f}")


def check_options(o):
    methods = o.methods.split(",")
    if unknown := [m for m in methods if m not in METHODS] or [m for m in methods if methods.count(m) > 1]:
        fail(f"--methods {o.methods}: {unknown[0] or 'nothing'!s}: choose of {', '.join(METHODS)}, each once")


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    o = parse(Options, argv)
    check_options(o)
    results = Results(o)
    if o.dry_run:
        return show_plan(o, results)
    try:
        os.makedirs(os.path.join(o.out, "logs"), exist_ok=True)
        lock = open(os.path.join(o.out, "lock"), "a+b", buffering=0)
    except OSError as error:
        fail(f"--out {o.out}: cannot be written ({error.strerror})")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            fail(f"--out {o.out}: another run of this command, with pid {lock.read().decode()}, is writing there")
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        runner = Runner(o)
        before = {number: signal.signal(number, runner.on_signal) for number in runtime.STOPS}
        try:
            run_all(o, runner, results)
            results.write()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    for line in findings(results.state, o):
        say(line)
    say(f"written: {', '.join(os.path.join(o.out, f'frontier.{end}') for end in ('json', 'md', 'svg'))}")


if __name__ == "__main__":
    launch(main)
