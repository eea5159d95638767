"""Methods side by side on one ground: `python -m minirlhf.frontier` runs what is missing, measures all, and draws it.

One SFT model, one reward model, one judge that no policy saw, one set of held-out prompts. For every policy: how far it
went from the SFT model (KL), and what the reward model and the judge think of its answers.   Gao et al. 2022

Each method is tuned first: at one strength of its penalty it is trained at several learning rates, and the one of the
highest score less PRICE a nat of KL serves all of its points; where that is at an end of what was tried, more is tried.
Rates are compared on the prompts that all figures are of, but by the reward model alone. Their rows are kept.

Invariant: a row is what its command makes. A run is a process with a folder of its own, which goes on where it was
stopped; its row is on the disk before the next one begins.

Left out: other models than @scratch's; METHODS holds what is particular to it.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

from minirlhf import chart, checkpoint, evaluate, kernels, mixture, prepare, rewards, runtime
from minirlhf.config import RunOptions, fail, launch, one_line, parse, say, unprinted
from minirlhf.data import encode_prompts, fingerprint
from minirlhf.objectives import best_of_n_kl

PRESET = "@scratch"
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # learning rates that may be tried
MOST = 5  # of them, for one method
PRICE = 0.05  # of a nat of KL, in deviations of the score, where learning rates are compared
SEEDS = (1337, 1, 2, 3, 4)
BEST_OF = (1, 2, 4, 16, 64)
RANKED = 4  # answers to each prompt that are ordered into a ranking
TOLD = 10  # seconds between lines on the runs in progress
DIVERGED = "the policy is leaving|not finite"  # what a run that fails by its own options says
ENDED = "exit status 0"  # the last line of a log of a run that has come to its end


class Method(NamedTuple):
    script: str  # or module
    option: str  # what holds the policy near the SFT model
    values: tuple  # of it: the points
    middle: float  # the one at which learning rates are tried
    rates: tuple  # those that are tried first, neighbours in RATES
    words: tuple  # options of all of its runs


RL = tuple("--total_episodes 5760 --batch_size 96 --eval_interval 20 --num_eval_prompts 64".split())
DPO = tuple("--eval_interval 50 --num_eval_texts 512 --num_eval_prompts 64".split())
METHODS = {
    "ppo": Method("train_ppo.py", "kl_coef", (0.01, 0.03, 0.1, 0.3), 0.03, (1e-4, 3e-4, 1e-3), RL),
    "rloo": Method("train_ppo.py", "kl_coef", (0.03, 0.1, 0.3), 0.03, (1e-4, 3e-4, 1e-3),
                   (*RL, "--advantages", "rloo", "--group_size", "4", "--ent_coef", "0")),  # a bonus outweighs rewards
    "dpo": Method("minirlhf.dpo", "beta", (0.03, 0.1, 0.3, 1.0), 0.1, (3e-5, 1e-4, 3e-4),
                  (*DPO, "--max_steps", "250")),
    "dpo-on-policy": Method("minirlhf.dpo", "beta", (0.03, 0.1, 0.3, 1.0), 0.1, (3e-5, 1e-4, 3e-4), DPO),
    "best-of-n": None}  # which is not trained
CALLED = {"ppo": "PPO", "rloo": "RLOO", "dpo": "DPO, people's pairs", "dpo-on-policy": "DPO, ranked samples",
          "best-of-n": "best of n"}


@dataclass
class Options:
    """Methods side by side: KL from the SFT model against the reward model's and a judge's scores. Runs what is missing
    with @scratch; writes frontier.json, frontier.md and frontier.svg; the same command goes on where it was stopped."""
    # ---- what
    methods: str = "ppo,rloo,dpo,dpo-on-policy,best-of-n"  # those to compare, of these
    seeds: int = 1  # runs of each point, with the seeds 1337, 1, 2, 3, 4 [1..5]
    num_prompts: int = 512  # held-out prompts that each policy answers [2..1000000]
    jobs: int = 2  # runs at a time, each with its share of the cores [1..64]
    dry_run: bool = False  # show the commands, run nothing
    # ---- where
    out: str = "out/frontier"  # folder of the runs and of the results
    data_dir: str = "data/sentiment"  # folder of the data; the default is prepared when it is missing
    sft: str = "out/scratch/sft"  # the SFT model; it and the next two are trained where they are missing
    reward_model: str = "out/scratch/rm"  # what policies are trained with
    judge: str = "out/scratch/judge"  # what only looks on; FILE.py:FUNCTION, too


class Job(NamedTuple):
    """A command, where its output goes, what of the table's row is known before it runs, and its OMP_NUM_THREADS, ""
    for all cores: other threads round otherwise, so they are a part of the command."""
    name: str
    script: str
    words: tuple
    path: str
    row: dict
    threads: str

    def command(self):
        threads = [f"OMP_NUM_THREADS={self.threads}"] if self.threads else []
        return " ".join([*threads, runtime.start_of(self.script), *map(shlex.quote, self.words)])


# ---- what there is to run

def common(o):
    return ["--data_dir", o.data_dir] if o.data_dir != Options.data_dir else []


def threads(jobs):
    """Of each of so many processes at a time: what the user said, or its share of the cores; "" for all."""
    share = str(max(1, kernels.cores_allowed() // jobs)) if jobs > 1 else ""
    return os.environ.get("OMP_NUM_THREADS", share)


def base_jobs(o):
    """What makes the three models and the ranked samples: groups, each of which needs those before it."""
    trunk, prompts = [*common(o), "--init_from", o.sft], os.path.join(o.data_dir, "prompts.train.jsonl")
    jobs = [("sft", "train_sft.py", [PRESET, *common(o), "--out_dir", o.sft], o.sft),
            ("rm", "train_rm.py", [PRESET, *trunk, "--out_dir", o.reward_model], o.reward_model),
            ("judge", "train_rm.py", [PRESET, *trunk, "--preferences", "judge", "--out_dir", o.judge], o.judge)]
    if rewards.is_function(o.judge):
        del jobs[-1]
    if "dpo-on-policy" in o.methods.split(","):
        jobs.append(("ranked", "minirlhf.sample", [o.sft, o.reward_model, "--rank", "--n", str(RANKED), "--prompts",
                                                   prompts, "--output", ranked(o)], ranked(o)))
    jobs = [Job(name, script, tuple(words), path, {}, threads(o.jobs if name in ("rm", "judge") else 1))
            for name, script, words, path in jobs]
    return [[job for job in jobs if job.name in names] for names in (("sft",), ("rm", "judge"), ("ranked",))]


def ranked(o):
    return os.path.join(o.out, "ranked.jsonl")


def job_of(method, value, rate, seed, o):
    m = METHODS[method]
    name = f"{method}-{m.option}-{value:g}-lr-{rate:g}-seed-{seed}"
    path = os.path.join(o.out, name)
    words = [PRESET, *common(o), "--init_from", o.sft]
    words += ["--reward_model", o.reward_model] if m.script == "train_ppo.py" else []
    words += ["--preferences", ranked(o)] if method == "dpo-on-policy" else []
    words += [*m.words, f"--{m.option}", f"{value:g}", "--learning_rate", f"{rate:g}", "--seed", str(seed), "--out_dir",
              path]
    return Job(name, m.script, tuple(words), path, {"method": method, m.option: value, "learning_rate": rate,
                                                    "seed": seed}, threads(o.jobs))


def best_of_job(n, o):
    return Job(f"best-of-{n}", "minirlhf.evaluate", (o.sft, *measuring(o), "--best_of", str(n)), "",
               {"method": "best-of-n", "n": n}, threads(1))


def measuring(o):
    """Options of `minirlhf.evaluate`, with which it gives a row's figures."""
    prompts = os.path.join(o.data_dir, "prompts.val.jsonl")
    return ("--baseline", o.sft, "--reward_model", o.reward_model, "--judge", o.judge, "--prompts", prompts,
            "--num_prompts", str(o.num_prompts), "--seed", str(SEEDS[0]), "--dtype", "float32")


def worth(row):
    """What learning rates are compared by. A run that failed is worth least."""
    return -math.inf if "failed" in row else row["score"][0] - PRICE * row["kl"][0]


def sweep(method, rows, o):
    """-> jobs of a method's learning rates, as far as they are known, and the best rate, None before all have run.

    The best has a worse neighbour on both sides, unless MOST were tried or there is none.
    """
    m = METHODS[method]
    low, high = RATES.index(m.rates[0]), RATES.index(m.rates[-1])
    while True:
        jobs = [job_of(method, m.middle, rate, SEEDS[0], o) for rate in RATES[low:high + 1]]
        if not all(job.name in rows for job in jobs):
            return jobs, None
        best = max(jobs, key=lambda job: worth(rows[job.name]))
        if len(jobs) < MOST and best is jobs[0] and low > 0:
            low -= 1
        elif len(jobs) < MOST and best is jobs[-1] and high + 1 < len(RATES):
            high += 1
        else:
            return jobs, best.row["learning_rate"]


def jobs_of(method, rows, o):
    """-> a method's jobs, as far as they are known; how many more there will be; the names of its points: at the best
    learning rate or, before that is known, the best so far."""
    (jobs, rate), values = sweep(method, rows, o), METHODS[method].values
    if rate is None:
        found = sorted((job.name for job in jobs if job.name in rows), key=lambda name: worth(rows[name]))
        return jobs, len(values) * o.seeds - 1, found[-1:]
    points = [job_of(method, value, rate, seed, o) for seed in SEEDS[:o.seeds] for value in values]
    tried = {job.name for job in jobs}
    return [*jobs, *(job for job in points if job.name not in tried)], 0, [job.name for job in points]


# ---- running

class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float
    goes_on: bool  # a run that was begun before


class Runner:
    """Runs jobs, --jobs at a time, each a process with a log; says how far they are, and all of them.

    lock: an open file whose lock each process holds too, so that those which outlive this one are waited for.
    """

    def __init__(self, o, lock=None):
        self.o, self.lock, self.running, self.stop = o, lock, {}, 0  # running: {a job's name: Running}
        self.left = []  # [(kind, how many)] of the runs to come, those in progress among them
        self.began = self.told = time.monotonic()
        self.pace = runtime.Pace()

    def log_of(self, job):
        return os.path.join(self.o.out, "logs", f"{job.name}.log")

    def lines_of(self, job):
        """The last lines of a job's log, if there is one."""
        with contextlib.suppress(FileNotFoundError), open(self.log_of(job), "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 10_000))
            return f.read().decode("utf-8", "replace").splitlines()
        return []

    def ended(self, job):
        """Whether a job has run to its end; None where it was never begun here."""
        lines = self.lines_of(job)
        return lines[-1] == ENDED if lines else None

    def there(self, job):
        """Whether what a job makes is there, made to its end, by this command or by somebody."""
        ended = self.ended(job)
        return ended is not False and not (ended is None and half_done(job.path)) and (
            os.path.exists(checkpoint.file_of(job.path)) or checkpoint.is_foreign(job.path))

    def as_begun(self, job):
        """A job with the threads with which it was begun, as its log tells: others would round otherwise."""
        with contextlib.suppress(FileNotFoundError), open(self.log_of(job), encoding="utf-8", errors="replace") as f:
            if begun := re.match(r"\$ (?:OMP_NUM_THREADS=(\S+) )?", f.readline()):
                return job._replace(threads=begun[1] or "")
        return job

    def on_signal(self, number, frame):
        """The runs in progress end their steps and save, as if they had been asked themselves."""
        self.stop = number
        for run in self.running.values():
            run.process.send_signal(signal.SIGTERM)

    def check_stop(self):
        if self.stop:
            self.end()
            say(f"stopped; go on with: {again(self.o)}")
            raise SystemExit(128 + self.stop)

    def end(self):
        """Waits for the runs in progress, which end as on a signal."""
        for run in self.running.values() if not self.stop else ():
            run.process.send_signal(signal.SIGTERM)
        for run in self.running.values():
            run.process.wait()
        self.running.clear()

    def start(self, job):
        """A run that was begun before goes on."""
        job = self.as_begun(job)
        begun = job.script != "minirlhf.sample" and any(
            os.path.exists(os.path.join(job.path, name)) for name in ("config.json", "ckpt.pt"))
        root, resume = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ["--resume"] * begun
        program = [os.path.join(root, job.script)] if job.script.endswith(".py") else ["-m", job.script]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
               "OMP_NUM_THREADS": job.threads}
        left = f"{sum(n for _, n in self.left)} to go: " if "method" in job.row else ""
        say(f"{self.clock()}  {left}{job.command()}")
        with open(self.log_of(job), "ab") as log:
            log.write(f"$ {' '.join([job.command(), *resume])}\n".encode())
            log.flush()
            process = subprocess.Popen(  # in a session of its own: Ctrl-C comes to it once, from `on_signal`
                [sys.executable, *program, *job.words, *resume], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[self.lock.fileno()],
                env={name: value for name, value in (os.environ | own).items() if value or name not in own})
        self.running[job.name] = Running(job, process, time.monotonic(), begun)
        if self.stop:  # a signal that came before it was there
            process.send_signal(signal.SIGTERM)

    def any_ended(self):
        """One of the runs in progress, where there is one, that has come to its end; says how far they are."""
        if time.monotonic() > self.told + TOLD:
            self.told = time.monotonic()
            for run in self.running.values():
                said = "\n".join(self.lines_of(run.job)).rpartition("\n$ ")[2]  # since it began, or began again
                if found := re.findall(r"^ *(\d+/\d+ +\d+% \S+)(?!.*under the reference$)", said, re.MULTILINE):
                    say(f"    {self.clock()}  {run.job.name} {found[-1]}")
        return next((run for run in self.running.values() if run.process.poll() is not None), None)

    def wait(self):
        """Until one ends -> its job, its exit status, and the last line that it wrote."""
        while not (ended := self.any_ended()):
            time.sleep(0.05)
        self.check_stop()
        job, process, began, goes_on = ended
        status = process.wait()
        del self.running[job.name]
        last = next((line.strip() for line in reversed(self.lines_of(job)) if line.strip()), "")
        with open(self.log_of(job), "a", encoding="utf-8") as log:
            log.write(f"{ENDED}\n" if not status else f"exit status {status}\n")
        if not status and not goes_on:
            self.pace.add(job.row.get("method", job.name), time.monotonic() - began)
        return job, status, "" if last.startswith("$ ") else last

    def took(self, row):
        """What a run of an earlier command took: the seconds of its steps, at least."""
        if "seconds" in row:
            self.pace.add(row["method"], row["seconds"])

    def clock(self):
        """"1:02<48:10": time used, and time left for all runs, as long as they take what others of their kind took."""
        now, taken = time.monotonic(), [seconds for found in self.pace.seconds.values() for seconds in found]
        usual = sum(taken) / max(1, len(taken))
        left = sum(self.pace.left(name, n) or n * usual for name, n in self.left)
        for run in self.running.values():
            if method := run.job.row.get("method"):
                left -= min(now - run.began, self.pace.left(method, 1) or usual)
        at_a_time = max(1, min(self.o.jobs, sum(n for _, n in self.left)))
        shown = runtime.clock(max(0.0, left) / at_a_time) if taken and self.left else "?"
        return f"{runtime.clock(now - self.began)}<{shown}"


def half_done(folder):
    """Whether a folder holds a run of stage 1 or 2 that has not come to its end, by what its files tell."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            o = json.load(f)
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
            last = json.loads(f.read().rpartition("\n")[0].rpartition("\n")[2] or "{}")
        if o["stage"] not in ("sft", "rm"):
            return False  # a policy, with which nothing here goes on
        if o["stage"] == "rm":
            return "final" not in last
        if not last or last["step"] == o["max_steps"]:
            return not last
        return last["epoch"] * (1 + 0.5001 / last["step"]) < o["num_train_epochs"]  # whose steps are rounded
    except (OSError, ValueError, LookupError, TypeError):
        return False  # a model without the files of its run


def take(lock, o):
    """Locks the folder for this command. Exits 2 where another holds it; waits for a run that outlived a killed one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        pid = lock.read().decode()
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid), 0)
            fail(f"--out {o.out}: another run of this command, with pid {pid}, is writing there")
        say(f"waits for the run that the command with pid {pid}, which was killed, had begun")
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())


def again(o):
    """The command once more."""
    return " ".join([runtime.start_of("minirlhf.frontier"), *(
        runtime.option(f.name, getattr(o, f.name)) for f in fields(Options) if getattr(o, f.name) != f.default)])


# ---- measuring

class Ground:
    """What all policies stand on: SFT model, reward model, judge, prompts, and the SFT model's own answers."""

    def __init__(self, o):
        device = runtime.pick_device("auto")
        self.o, self.run = o, runtime.Precision(device, "float32")
        self.sft, self.tokenizer, _ = checkpoint.load(o.sft, checkpoint.POLICIES, device)
        kernels.pick_matmul(self.sft)
        self.scorers = {name: rewards.load(getattr(o, option), f"--{option}", self.sft, self.tokenizer, o.sft, self.run)
                        for name, option in (("score", "reward_model"), ("judge", "judge"))}
        context = self.sft.config.block_size
        self.settings = SimpleNamespace(seed=SEEDS[0], temperature=1.0, response_length=min(48, context // 2))
        texts, path = evaluate.held_out_prompts(os.path.join(o.data_dir, "prompts.val.jsonl"), RunOptions.val_share)
        self.prompts = encode_prompts(self.tokenizer, texts, context - self.settings.response_length, "drop")[0]
        self.prompts = self.prompts[:o.num_prompts]
        if not self.prompts:
            fail(f"{path}: no prompt leaves room for an answer in the context of {o.sft}, {context} tokens")
        mixture.give_columns(self.scorers.values(), self.prompts, path)
        self.base = self.answers(self.sft)
        self.start = self.summary(self.base, o.sft)

    def answers(self, policy, draw=0):
        return evaluate.answer(policy, self.sft, self.scorers, self.prompts, self.tokenizer, self.settings, self.run,
                               draw)

    def summary(self, rows, path):
        """Figures of answers of a policy. Exits 2 where a function that judges applies to none of them."""
        figures = evaluate.summary(rows, self.base)
        if "judge_win_rate" not in figures:
            fail(f"--judge {self.o.judge}: applies to no answer of {path} whose prompt has one of {self.o.sft} that it "
                 "applies to; choose a judge that applies to more")
        return figures

    def measure(self, path):
        """A policy's figures, as `python -m minirlhf.evaluate` has them."""
        policy, tokenizer, _ = checkpoint.load(path, checkpoint.POLICIES, self.run.device)
        checkpoint.compatible((policy, tokenizer), path, (self.sft, self.tokenizer), self.o.sft)
        return self.summary(self.answers(policy), path)

    def best_of(self, runner):
        """Yields (n, figures) of the SFT model's best answer of n, and after each draw of an answer to all prompts how
        many there are, without figures. Draws are kept in OUT/draws.jsonl, one a line."""
        path, draws = os.path.join(self.o.out, "draws.jsonl"), [self.base]
        if os.path.exists(path):
            with open(path, "rb+") as f:
                lines = f.read().split(b"\n")
                f.truncate(f.tell() - len(lines[-1]))  # what is torn
            draws += map(json.loads, lines[:-1])
        for n in BEST_OF:
            while len(draws) < n:
                draws.append(self.answers(self.sft, len(draws)))
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(draws[-1], ensure_ascii=False) + "\n")
                runner.check_stop()
                yield len(draws), {}
            figures = self.summary(evaluate.best_of(draws[:n]), self.o.sft) | {"kl_bound": best_of_n_kl(n)}
            yield n, {name: value for name, value in figures.items() if name not in ("kl", "kl_k3")}


def seconds_of(folder):
    """Seconds of all steps of a run, start-up and evaluations apart."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        return sum(json.loads(line).get("seconds", 0.0) for line in f)


# ---- what is kept

class Results:
    """frontier.json, and the table and the figure of it. rows: {name: what was measured}."""

    def __init__(self, o):
        self.o, self.path, self.state = o, os.path.join(o.out, "frontier.json"), {"rows": {}}
        if os.path.exists(self.path):
            try:
                with open(self.path, encoding="utf-8") as f:
                    self.state = json.load(f)
                assert all(row["command"] and row["method"] in METHODS for row in self.state["rows"].values())
            except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
                fail(f"{self.path}: cannot be read as a frontier ({type(error).__name__}); move it away, or choose "
                     "another --out")
        self.rows = self.state["rows"]

    def stand_on(self, ground):
        """Exits 2 where the rows that are there were measured on something else."""
        o = self.o
        now = {"prompts": hashlib.sha256(json.dumps(ground.prompts).encode()).hexdigest()[:16],
               "sft": fingerprint(*checkpoint.files_of(o.sft)),
               "reward_model": fingerprint(*rewards.files(o.reward_model)),
               "judge": fingerprint(*rewards.files(o.judge))}
        if os.path.exists(ranked(o)):
            now["set_of_ranked_samples"] = fingerprint(ranked(o))
        for name, value in now.items():
            if self.rows and self.state["ground"].get(name, value) != value:
                fail(f"--out {o.out}: its rows were measured with another {name.replace('_', ' ')}; choose another "
                     "--out, or remove this one")
        self.state |= {"ground": self.state.get("ground", {}) | now, "num_prompts": len(ground.prompts),
                       "baseline": ground.start}

    def check(self, job):
        """Exits 2 where a row of this name was made with other options."""
        if job.name in self.rows and self.rows[job.name]["words"] != [*job.words]:
            fail(f"--out {self.o.out}: {job.name} was made by another command ({self.rows[job.name]['command']}); "
                 "choose another --out, or remove this one")

    def add(self, job, figures):
        self.rows[job.name] = {**job.row, **figures, "command": job.command(), "words": [*job.words]}
        self.write()

    def write(self):
        """All files, from what is there by now."""
        points = {method: points_of(method, self.rows, self.o) for method in self.o.methods.split(",")}
        self.state |= {"points": {CALLED[method]: [*found] for method, found in points.items()},
                       "findings": [*findings(points, self.state["baseline"], self.o)]}
        for end, content in (("json", json.dumps(runtime.finite(self.state), ensure_ascii=False, indent=1) + "\n"),
                             ("md", "\n".join(report(points, self.state, self.o)) + "\n"),
                             ("svg", figure(points, self.state["baseline"], self.o))):
            path = os.path.join(self.o.out, f"frontier.{end}")
            try:
                with open(f"{path}.tmp", "w", encoding="utf-8") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(f"{path}.tmp", path)
            except OSError as error:
                raise SystemExit(one_line(f"error: {path}: could not be written ({error.strerror}); what was there "
                                          "before is untouched"))


# ---- what is told

def kl_of(row):
    """KL from the SFT model, nats a response: the estimate by k1, or the bound of best-of-n."""
    return row["kl_bound"] if "kl_bound" in row else max(0.0, row["kl"][0])


def points_of(method, rows, o):
    """{name: row} of a method's points, by KL."""
    names = jobs_of(method, rows, o)[2] if METHODS[method] else [best_of_job(n, o).name for n in BEST_OF]
    found = [(name, rows[name]) for name in names if name in rows and "failed" not in rows[name]]
    return dict(sorted(found, key=lambda item: kl_of(item[1])))


def over_seeds(points):
    """One row a strength, by KL: of several seeds the mean, with the farthest of them in place of an interval."""
    groups = {}
    for row in points.values():
        groups.setdefault(strength(row), []).append(row)
    out = []
    for group in groups.values():
        out.append({**group[0]})
        for name in ("score", "judge_score", "kl") if len(group) > 1 else ():
            values = [row[name][0] for row in group]
            mean = sum(values) / len(values)
            out[-1][name] = mean, max(abs(value - mean) for value in values)
    return sorted(out, key=kl_of)


def strength(row):
    """"kl_coef 0.03", "best of 16"."""
    if row["method"] == "best-of-n":
        return f"best of {row['n']}"
    option = METHODS[row["method"]].option
    return f"{option} {row[option]:g}"


def figure(points, base, o):
    """frontier.svg: two panels, a line a method from the SFT model on, intervals as bars."""
    panels = []
    for name, title in (("score", "The reward model that was optimised"), ("judge_score", "A judge that looks on")):
        series = {}
        for method, found in points.items():
            line = [chart.Point(0, base[name][0], name="the SFT model")]
            for row in over_seeds(found):
                kl, (mean, half) = kl_of(row), row[name]
                around = row["kl"][1] if "kl" in row else 0.0
                line.append(chart.Point(math.sqrt(kl), mean, mean - half, mean + half, math.sqrt(max(0.0, kl - around)),
                                        math.sqrt(kl + around), strength(row)))
            if len(line) > 1:
                series[CALLED[method]] = line
        panels.append(chart.lines(series, "root of the KL from the SFT model, nats a response",
                                  "mean score, in deviations of SFT answers", title, x_range=(0, 1)))
    return chart.beside(*panels)


def at(points, kl, base, name):
    """A score where a method's line has this KL: straight between points, in the root of KL; None beyond its end."""
    line, x = [(0.0, base), *((math.sqrt(kl_of(row)), row[name][0]) for row in points)], math.sqrt(kl)
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x0 <= x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def findings(points, base, o):
    """Sentences: who gets most of the judge for a nat, where the reward model misleads, what best-of-n gives."""
    lines = {method: over_seeds(found) for method, found in points.items() if len(found) > 1}
    if len(lines) > 1:
        kl, zero = min(kl_of(line[-1]) for line in lines.values()), base["judge_score"][0]
        gains = {method: at(line, kl, zero, "judge_score") - zero for method, line in lines.items()}
        order = sorted(gains, key=gains.get, reverse=True)
        yield (f"At a KL of {kl:.2f} nats, as far as each method went, the judge's score has risen most by "
               f"{CALLED[order[0]]}: " + "; ".join(f"{CALLED[method]} {gains[method]:+.2f}" for method in order) + ".")
    for method, line in lines.items():
        yield f"{CALLED[method]}: {over_optimised(line)}."
    if best := lines.pop("best-of-n", None):
        row, others = best[-1], []
        for method, line in lines.items():
            reached = next((p for p in line if p["judge_score"][0] >= row["judge_score"][0]), None)
            others.append(f"; {CALLED[method]} has as much " + (
                f"at {kl_of(reached):.2f} ({strength(reached)})" if reached else "nowhere"))
        yield (f"Without any training the best of {row['n']} answers has a judge's score of "
               f"{row['judge_score'][0]:+.2f} and a reward model's of {row['score'][0]:+.2f} at a KL of "
               f"{row['kl_bound']:.2f} at most{''.join(others)}.")


def over_optimised(line):
    """From which KL on the reward model's score rises and the judge's falls, by more than their intervals."""
    peak = max(line, key=lambda row: row["judge_score"][0])
    for row in line[line.index(peak) + 1:]:
        fall = peak["judge_score"][0] - row["judge_score"][0]
        if row["score"][0] > peak["score"][0] and fall > math.hypot(peak["judge_score"][1], row["judge_score"][1]):
            return (f"over-optimised from a KL of {kl_of(peak):.2f} on: at {kl_of(row):.2f} the reward model's score "
                    f"has risen by {row['score'][0] - peak['score'][0]:.2f}, and the judge's fallen by {fall:.2f}")
    return f"up to a KL of {kl_of(line[-1]):.2f} the judge's score does not fall where the reward model's rises"


COLUMNS = (("KL (k1)", "kl", "{:.2f} +- {:.2f}"), ("KL (k3)", "kl_k3", "{:.2f} +- {:.2f}"),
           ("score", "score", "{:.3f} +- {:.3f}"), ("judge", "judge_score", "{:.3f} +- {:.3f}"),
           ("preferred", "win_rate", "{:.1%} ({:.1%}-{:.1%})"),
           ("by the judge", "judge_win_rate", "{:.1%} ({:.1%}-{:.1%})"), ("length", "mean_length", "{:.1f}"),
           ("distinct-2", "distinct_2", "{:.3f}"), ("repeated", "repeated", "{:.1%}"), ("ends", "eos_rate", "{:.1%}"),
           ("log-probability a token", "ref_logprob_per_token", "{:.3f}"), ("seconds", "seconds", "{:.0f}"))


def cells(row):
    for _, name, form in COLUMNS:
        if name == "kl" and "kl_bound" in row:
            yield f"<= {row['kl_bound']:.2f}"
        elif name in row:
            value = row[name]
            yield form.format(*(value if isinstance(value, (list, tuple)) else [value]))
        else:
            yield ""


def table(rows):
    """rows: [(what stands at the left, 4 cells, row)] -> lines of Markdown."""
    yield "| method | at | learning rate | seed | " + " | ".join(name for name, *_ in COLUMNS) + " |"
    yield "|---" * (4 + len(COLUMNS)) + "|"
    for row in rows:
        left = [CALLED[row["method"]], strength(row)] if "method" in row else ["SFT", ""]
        left += [f"{row['learning_rate']:g}", str(row["seed"])] if "seed" in row else ["", ""]
        right = [row["failed"].replace("|", "/")] if "failed" in row else cells(row)
        yield f"| {' | '.join([*left, *right])} |"


def report(points, state, o):
    """Lines of frontier.md."""
    chosen = {name for found in points.values() for name in found}
    others = [row for name, row in state["rows"].items() if name not in chosen and row["method"] in points]
    yield from ("# Methods side by side", "", *(f"- {line}" for line in state["findings"]), "", (
        f"{state['num_prompts']} held-out prompts; 95 % intervals over them. KL: from the SFT model, nats a response. "
        "Score: mean, by the reward model and by the judge, in deviations of the SFT model's answers. Preferred: to "
        "the SFT model's answer. Log-probability: under the SFT model. Seconds: of training steps."), "")
    yield from table([state["baseline"], *(row for found in points.values() for row in found.values())])
    yield from ("", "## Learning rates that were not taken", "",
                f"Compared by the score, less {PRICE:g} a nat of KL.", "", *table(others), "", "## Commands", "",
                f"Measured by `{best_of_job(1, o).command().partition(' ' + o.sft)[0]} RUN "
                f"{shlex.join(measuring(o))}`.", "")
    yield from (f"- {name}: `{row['command']}`" for name, row in state["rows"].items())


# ---- the command

def show_plan(o, runner, results):
    """What would be run, as far as it is known before the learning rates are."""
    def show(is_there, command):
        say(f"{'there' if is_there else 'run  '}  {command}")

    for job in sum(base_jobs(o), []):
        show(runner.there(job), job.command())
    for method in o.methods.split(","):
        if not METHODS[method]:
            for n in BEST_OF:
                show(best_of_job(n, o).name in results.rows, best_of_job(n, o).command())
            continue
        jobs, more, _ = jobs_of(method, results.rows, o)
        for job in jobs:
            show(job.name in results.rows, job.command())
        if more:
            m = METHODS[method]
            say(f"run    {more} more of {method} at the best of these learning rates, --{m.option} "
                + ", ".join(f"{value:g}" for value in m.values) + ", with that of above where it is the same")


def give_up(job, status, last, runner):
    """Exits: a command has ended so that nothing can be measured."""
    told = f"{job.name}: {last.removeprefix('error: ')} (exit status {status} of {job.command()}; {runner.log_of(job)})"
    fail(told) if status == 2 else sys.exit(one_line(f"error: {told}"))


def run_all(o, runner, results):
    if os.path.normpath(o.data_dir) == Options.data_dir:
        prepare.ensure(o.data_dir)
    to_come(o, runner, results)
    for row in results.rows.values():
        runner.took(row)
    for group in base_jobs(o):
        to_do = [job for job in group if not runner.there(job)]
        while to_do or runner.running:
            while to_do and len(runner.running) < o.jobs:
                runner.start(to_do.pop(0))
            job, status, last = runner.wait()
            if status:
                give_up(job, status, last, runner)
    ground = Ground(o)
    results.stand_on(ground)
    best = iter(())
    if "best-of-n" in o.methods.split(",") and not all(best_of_job(n, o).name in results.rows for n in BEST_OF):
        say(f"{runner.clock()}  {max(BEST_OF)} answers of {o.sft} to each of {len(ground.prompts)} prompts, "
            "beside runs")
        best = ground.best_of(runner)
    while True:
        runner.check_stop()
        jobs = to_come(o, runner, results)
        for job in jobs:
            results.check(job)
        to_do = [job for job in jobs if job.name not in results.rows and job.name not in runner.running]
        if ended := next(filter(runner.ended, to_do), None):  # which was not measured
            results.add(runner.as_begun(ended), outcome(ended, 0, "", ground, runner))
            runner.took(results.rows[ended.name])
        elif to_do and len(runner.running) < o.jobs:
            runner.start(to_do[0])
        elif not runner.any_ended() and (drawn := next(best, None)):
            n, figures = drawn
            if figures:
                results.add(best_of_job(n, o), figures)
                say(described(f"best of {n}", figures))
        elif runner.running:
            job, status, last = runner.wait()
            results.add(job, outcome(job, status, last, ground, runner))
        else:
            return


def to_come(o, runner, results):
    """-> all jobs, as far as they are known; tells the runner how many runs are left."""
    jobs, runner.left = [], []
    for method in filter(METHODS.get, o.methods.split(",")):
        found, more, _ = jobs_of(method, results.rows, o)
        jobs, new = jobs + found, [job for job in found if job.name not in results.rows]
        runner.left.append((method, len(new) + more))
    return jobs


def outcome(job, status, last, ground, runner):
    """-> the figures of an ended run's policy, or that it failed."""
    began = os.path.exists(os.path.join(job.path, "metrics.jsonl"))
    if status and not (began and last.startswith("error: ") and re.search(DIVERGED, last)):
        give_up(job, status, last, runner)
    if status:  # it left the language that it knew, or diverged, which is a result
        say(f"  {job.name}: failed: {last}")
        return {"failed": last}
    figures = ground.measure(job.path) | {"seconds": seconds_of(job.path)}
    runner.check_stop()
    say(described(job.name, figures))
    return figures


def described(name, f):
    kl = f"KL <= {f['kl_bound']:.2f}" if "kl_bound" in f else f"KL {f['kl'][0]:.2f} +- {f['kl'][1]:.2f}"
    return (f"  {name}: {kl}, score {f['score'][0]:+.3f}, preferred {f['win_rate'][0]:.1%}; judge "
            f"{f['judge_score'][0]:+.3f}, {f['judge_win_rate'][0]:.1%}; length {f['mean_length']:.1f}")


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    o = parse(Options, argv)
    methods = o.methods.split(",")
    if wrong := [method for method in methods if method not in METHODS or methods.count(method) > 1]:
        fail(f"--methods {o.methods}: {wrong[0]!r}: name each of these once: {', '.join(METHODS)}")
    if rewards.is_function(o.reward_model):
        fail(f"--reward_model {o.reward_model}: expected a reward model, of which PPO makes a value network, too")
    for name in ("sft", "reward_model", "judge"):  # a folder, in which a run may go on
        setattr(o, name, getattr(o, name).removesuffix("/ckpt.pt"))
    results = Results(o)
    if o.dry_run:
        return show_plan(o, Runner(o), results)
    try:
        os.makedirs(os.path.join(o.out, "logs"), exist_ok=True)
        lock = open(os.path.join(o.out, "lock"), "a+b", buffering=0)
    except OSError as error:
        fail(f"--out {o.out}: cannot be written ({error.strerror})")
    with lock:
        take(lock, o)
        results, runner = Results(o), Runner(o, lock)
        before = {number: signal.signal(number, runner.on_signal) for number in runtime.STOPS}
        try:
            run_all(o, runner, results)
        except OSError as error:
            raise SystemExit(one_line(f"error: {error.filename or o.out}: {error.strerror or error}; go on with: "
                                      f"{again(o)}"))
        finally:
            runner.end()
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        results.write()
    for line in results.state["findings"]:
        say(line)
    say(f"written: {', '.join(os.path.join(o.out, f'frontier.{end}') for end in ('json', 'md', 'svg'))}")


if __name__ == "__main__":
    launch(main)
