"""What a run needs from the machine: device, precision, ranks, seeds, an output folder, signals, log lines.

Invariant: a random choice is a function of (seed, step, rank, purpose), so a resumed run needs no generator state.

Ranks: under `torchrun` each process takes its share of every batch; `Run.total` sums over them. A process by itself is
rank 0 of 1.
"""
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shlex
import signal
import stat
import statistics
import sys
import threading
import time
import traceback
import weakref
from collections import defaultdict, deque
from dataclasses import asdict, fields, replace

import torch

from minirlhf import memory, trackers
from minirlhf.config import (fail, lines_for, one_line, out_of_memory, preset_values, presets, ranks, say,
                             weighted)
from minirlhf.data import clean
from minirlhf.kernels import AdamW, Muon, keep_freed_memory, share_cores
from minirlhf.sizes import check_batch

try:
    import fcntl
except ModuleNotFoundError:
    fail("minirlhf runs on Linux and macOS; on Windows use it within WSL")

LATELY = 100  # steps by which the time left is told
STOPS = (signal.SIGINT, signal.SIGTERM)
LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "tokens.jsonl")
KEPT = ("ckpt.previous.pt", "ckpt.pt", *LOGS)  # what makes a folder that of a run
HALF = ("ckpt.pt.tmp", "config.json.tmp", *(f"{name}.tmp" for name in LOGS))  # what a killed run may leave beside it


def seed_of(seed: int, step: int, rank: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed} {step} {rank} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """A CPU generator whose numbers depend on the four arguments only, not on the device or on what ran before."""
    return torch.Generator().manual_seed(seed_of(seed, step, rank, purpose))


class Precision:
    """Where and how exactly a model runs, for a command that is no run."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, pick_dtype(dtype, device)
        share_cores()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ---- forks: a reward function may start workers, and these are no part of the run

RUNS, FORKING = weakref.WeakSet(), threading.local()


def before_fork():
    FORKING.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # one that came now would be lost in the child


def after_fork_in_child():
    for run in [*RUNS]:
        run.disown()
    after_fork()


def after_fork():
    signal.pthread_sigmask(signal.SIG_SETMASK, FORKING.mask)


os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)


class Run:
    """The device, ranks and output folder of one run of a script.

    options: a RunOptions with out_dir. Refuses an out_dir that holds a run unless --resume or --overwrite, or whose
    other run is still alive (exit 2). `stop` is the number of the signal that asked the run to end, or 0.
    """

    def __init__(self, options, stage: str):
        self.options, self.stage, self.stop, self.lock, self.begun, self.made = options, stage, 0, None, False, []
        self.logging = False  # whether the folder's old run, if any, has gone
        self.pid, self.signals = os.getpid(), {}  # signals: what acted on them before
        self.smaller = None  # (changes of options, bytes they need), where `memory.check` found any
        self.trackers = []  # processes that tell TensorBoard and the like
        self.rescue = None  # saves what was learned up to the last whole step, while the weights are those of its end
        RUNS.add(self)
        self.rank, self.world = ranks()
        self.device = pick_device(options.device)
        if self.world > 1:
            with self.together():
                torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        self.hardware = f"{self.device} x {self.world}, {str(self.dtype).removeprefix('torch.')}"
        keep_freed_memory()
        share_cores()
        self.main = self.rank == 0
        self.out_dir = options.out_dir
        check_batch(options)
        if options.checkpoint_activations and options.compile:
            fail("--checkpoint_activations: excludes --compile, which chooses itself what to keep; leave one of them "
                 "out")
        if self.main and not options.check:
            self._claim_out_dir()
        if threading.current_thread() is threading.main_thread():  # no other may
            self.signals = {number: signal.signal(number, self._on_signal) for number in STOPS}
        self.started = self.told = time.perf_counter()  # told: when the last row of metrics.jsonl was written

    # ---- output folder

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def _claim_out_dir(self):
        o = self.options
        folder = os.path.abspath(self.out_dir)
        while not os.path.lexists(folder):
            self.made.append(folder)
            folder = os.path.dirname(folder)
        try:
            self._lock()
        except OSError as error:
            self.release()
            fail(f"--out_dir {self.out_dir}: cannot be written ({error.strerror})")
        self.spare("init_from", "reference", "reward_model", "judge")
        held = self.held()
        if held and not o.resume and not o.overwrite:
            self.release()
            fail(f"--out_dir {self.out_dir} holds a run ({', '.join(held)}); use --resume, --overwrite or another "
                 "folder")

    def spare(self, *names):
        """Exits 2 where an option of these names a model in out_dir, which a new run replaces; a --reward, too."""
        models = [(name, getattr(self.options, name, "")) for name in names]
        several = [("reward", path) for path, _ in map(weighted, getattr(self.options, "reward", ())) if path != "rm"]
        for name, path in models + several if self.lock else ():
            folder = (path if os.path.isdir(path) else os.path.dirname(path)) or "."
            if not self.options.resume and os.path.exists(path) and os.path.samefile(folder, self.out_dir):
                self.release()
                fail(f"--out_dir {self.out_dir}: holds --{name} {path}, which the run would replace; choose another "
                     "folder")

    def _lock(self):
        """Make the folder and take its lock. A run that ends meanwhile may remove both; then they are made again."""
        for attempt in range(1000):
            try:
                os.makedirs(self.out_dir, exist_ok=True)
                self._check_names()
                new = not os.path.exists(self.path("lock"))
                lock = open(self.path("lock"), "a+b", buffering=0)
            except FileNotFoundError:
                if attempt == 999:
                    raise
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none, whoever has its pid
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path("lock"))):
                    self.lock = lock
                    self.lock.truncate(0)
                    self.lock.write(str(os.getpid()).encode())
                    return
                lock.close()
            except FileNotFoundError:  # the run that held it has just removed it
                lock.close()
            except BlockingIOError:
                lock.seek(0)
                fail(f"--out_dir {self.out_dir}: a run with pid {lock.read().decode()} is writing there; wait for it "
                     "or choose another folder")
            except OSError:  # a file system without locks, or full
                lock.close()
                if new:
                    os.remove(self.path("lock"))
                raise

    def _check_names(self):
        """Exits 2 where something that is no file bears the name of one of the run's."""
        for name in ("lock", "config.json", *KEPT, *HALF):
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(self.path(name)).st_mode
                if stat.S_ISLNK(mode) and os.path.exists(self.path(name)):
                    mode = os.stat(self.path(name)).st_mode
                if not stat.S_ISREG(mode):
                    kind = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link to nothing"}.get(
                        stat.S_IFMT(mode), "a pipe or device")
                    fail(f"--out_dir {self.out_dir}: {self.path(name)} is {kind}, where the run keeps a file; move it "
                         "away, or choose another folder")

    def start_logs(self, step):
        """Begin to write: remove an old run, or cut from its logs what will be written again; write config.json.

        That is what is torn, later than `step`, or of a closing report. Call it when all inputs have been checked:
        until then an old run is untouched. All ranks meet here: where one was refused, none begins.
        """
        self.total(torch.zeros(()))
        self.logging = True
        if not self.main:
            return
        old = [*HALF, *glob.glob("ckpt.*.pt.tmp", root_dir=self.out_dir)]
        if self.options.resume:
            old += [name for number, name in self.numbered().items() if number > step]
        else:
            old += ["config.json", *self.held()]  # in this order a death halfway leaves the old run, or none
            old += trackers.left_by(self.out_dir, self.options)
        for name in old:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(name))
        for name in self.logs():
            kept = []
            with open(self.path(name), "rb") as f:
                for line in f:
                    with contextlib.suppress(ValueError, LookupError, TypeError):  # a torn last line
                        row = json.loads(line)
                        if row["step"] <= step and "final" not in row:
                            kept.append(line.rstrip(b"\n") + b"\n")
            self.replace(name, b"".join(kept))
        self.begun = not os.path.exists(self.path("config.json"))
        self.replace("config.json", json.dumps({"stage": self.stage, **asdict(self.options)}, indent=2).encode())
        for folder in self.made:
            sync_folder(os.path.dirname(folder))
        self.trackers = [trackers.Follower(name, self.out_dir, self.say, " ".join([
            start_of("minirlhf.trackers"), as_path(self.out_dir), f"--{name}"]))
            for name in trackers.NAMES if getattr(self.options, name)]

    def replace(self, name, content):
        """Write out_dir/name whole: whenever the process dies, the old content or the new one is there."""
        with self.writing(name):
            with open(self.path(f"{name}.tmp"), "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(self.path(f"{name}.tmp"), self.path(name))
            sync_folder(self.out_dir)

    def write(self, name, *records):
        """Append JSON objects to out_dir/name, one a line. Those of metrics.jsonl get "elapsed", the seconds since the
        one before or since the process began: over a run they add up to what it took, evaluations included."""
        if self.main:
            if name == "metrics.jsonl":
                self.told, before = time.perf_counter(), self.told
                records = [record | {"elapsed": self.told - before} for record in records]
            with self.writing(name), open(self.path(name), "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records))
            for tracker in self.trackers:
                tracker.look()

    def sync(self):
        """The logs on the disk, before a checkpoint is that counts on them."""
        for name in self.logs():
            with self.writing(name), open(self.path(name), "ab") as f:
                os.fsync(f.fileno())
        sync_folder(self.out_dir)

    def logs(self):
        return [name for name in LOGS if os.path.exists(self.path(name))]

    def numbered(self):
        """{step: ckpt.STEP.pt} of the checkpoints that --keep_checkpoints has kept, by step."""
        found = (re.fullmatch(r"ckpt\.(\d{6,})\.pt", name) for name in glob.glob("ckpt.*.pt", root_dir=self.out_dir))
        return dict(sorted((int(match[1]), match[0]) for match in found if match))

    def held(self):
        """Names of what a run has left here."""
        return [*(name for name in KEPT if os.path.exists(self.path(name))), *self.numbered().values()]

    @contextlib.contextmanager
    def writing(self, name):
        """Exits 1 naming the file when the disk is full or the folder gone."""
        try:
            yield
        except OSError as error:
            size = os.path.getsize(self.path(name)) if os.path.exists(self.path(name)) else 0
            raise SystemExit(one_line(f"error: {self.path(name)}: could not be written ({error.strerror}) at {size:,} "
                                      "bytes; a checkpoint, if any, is whole: go on with --resume"))

    def release(self):
        if os.getpid() != self.pid:
            self.disown()
        if self.lock is not None:
            if self.begun and not self.held():  # it has come to nothing
                with contextlib.suppress(OSError):
                    os.remove(self.path("config.json"))
            with contextlib.suppress(OSError):
                os.remove(self.path("lock"))  # the last thing, for then another run may begin
            self.lock.close()
            self.lock = None
        for folder in self.made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self.made = []

    def disown(self):
        """In a forked child: it is a process like any other, to which signals do what they did before the run, and the
        run's folder is not its own."""
        for number, before in self.signals.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before or signal.SIG_DFL)
        if self.lock is not None:
            self.lock.close()  # it would keep the lock when the run is dead
        self.signals, self.lock, self.main, self.trackers = {}, None, False, []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        advice = self.without_memory(error, trace) if out_of_memory(error) else ""
        try:
            with contextlib.suppress(KeyboardInterrupt):  # of a person who waits no longer
                trackers.end(self.trackers)
            self.release()
            if self.world > 1 and kind is None:
                with self.together():
                    torch.distributed.barrier()  # the first process may still be writing
                torch.distributed.destroy_process_group()
        finally:
            RUNS.discard(self)
            for number, before in self.signals.items():
                signal.signal(number, before or signal.SIG_DFL)
        if kind is None and self.stop:  # it came when all was done but the last lines
            raise SystemExit(128 + self.stop)
        if advice:
            raise SystemExit(one_line(advice)) from None

    def without_memory(self, error, trace):
        """Saves what it can, and returns what to say where memory has ended: how much was asked for, what needs less,
        how to go on."""
        traceback.clear_frames(trace)  # which hold what the step was made of
        if self.rescue:
            with contextlib.suppress(MemoryError, RuntimeError, SystemExit):
                self.rescue()
        changes, need = self.smaller or ({}, 0)
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        ways = {"resume": True, "overwrite": False} if self.logging and self.held() else {}
        return (f"error: {self.device} has no memory left" + f" (torch {asked[0].lower()})" * bool(asked)
                + (f"; {memory.words(changes)} needs {memory.size(need)}" if changes else "; take a smaller model")
                + ("; the last checkpoint, if any, is whole: " if ways else "; nothing was written: ")
                + command_line(self.stage, self.options, **ways, **changes))

    # ---- signals

    def _on_signal(self, number, frame):
        if os.getpid() != self.pid:  # in a child that was forked behind Python's back
            self.disown()
            return os.kill(os.getpid(), number)
        if self.stop:
            if hasattr(sys, "ps1"):  # a notebook or a prompt outlives its run
                raise KeyboardInterrupt
            self.release()
            os._exit(128 + number)
        self.stop = number
        if self.main:  # not print, which a signal may have interrupted
            what = "ending after this check" if self.options.check else "finishing this step, then saving"
            with contextlib.suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: {what}; once more quits\n".encode())

    def should_stop(self):
        """True when any rank got a signal: all ranks stop after the same step."""
        return self.total(torch.tensor(float(self.stop))) > 0 if self.world > 1 else bool(self.stop)

    def exit_stopped(self):
        self.say(f"stopped; go on with: {command_line(self.stage, self.options, resume=True, overwrite=False)}")
        raise SystemExit(128 + (self.stop or signal.SIGTERM))

    # ---- ranks

    @contextlib.contextmanager
    def together(self):
        """Exits 2 where another rank has ended: what all do together can then not be done."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            reason = re.sub(r"^\[\S*\] ", "", str(error) or type(error).__name__).partition(". ")[0][:120]
            fail(f"rank {self.rank} of {self.world}: stopped, for another rank has ended, and says why, or cannot be "
                 f"reached ({reason})")

    def total(self, t):
        """Sum of a tensor over all ranks."""
        if self.world > 1:
            t = t.to(self.device)
            with self.together():
                torch.distributed.all_reduce(t)
        return t

    def totals(self, sums):
        """{name: number on one rank} -> {name: sum over all ranks}, in one exchange."""
        return dict(zip(sums, self.total(torch.stack([*sums.values()])))) if sums else {}

    def gather(self, rows):
        """The lists of all ranks as one, at the first rank; empty at others."""
        if self.world == 1:
            return rows
        parts = [None] * self.world if self.main else None
        torch.distributed.gather_object(rows, parts)
        return [row for part in parts for row in part] if self.main else []

    def share(self, rows):
        """This rank's rows of a batch."""
        return rows[self.rank::self.world]

    def sum_gradients(self, parameters):
        if self.world > 1:
            with self.together():
                for p in parameters:
                    if not p.requires_grad:
                        continue
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    torch.distributed.all_reduce(p.grad)

    # ---- precision, seeds

    def environment(self, before=None):
        """What must stay, besides options and data, for a resumed run to be the same to the last bit.

        before: that of the run that is resumed; differences are told.
        """
        now = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "hardware": self.hardware,
               "float32 matmul precision": torch.get_float32_matmul_precision()}
        for name, value in (before or {}).items():
            if value != now.get(name):
                self.say(f"warning: this run had {name} {value}, now {now.get(name)}: it goes on, but not the same to "
                         "the last bit")
        return now

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def generator(self, step, purpose):
        """For what differs by rank. What all ranks must agree on takes `generator` with rank 0."""
        return generator(self.options.seed, step, self.rank, purpose)

    def seed_dropout(self, step):
        torch.manual_seed(seed_of(self.options.seed, step, self.rank, "dropout"))

    # ---- what the person sees

    def say(self, text=""):
        if self.main:
            say(text)

    def announce(self, stage, lines, first=0):
        """What is about to happen: lines under the stage's name, then where the output goes."""
        lines = [*lines, *["--compile: the first steps take minutes, and print nothing"] * self.options.compile,
                 f"output: {self.out_dir}" + (f"; goes on from step {first}" if first else "")]
        for n, line in enumerate(lines):
            self.say(line if line.startswith("warning") else f"{stage + ':' if n == 0 else '':<4} {line}")

    def saved(self, following=""):
        """The closing line: where the checkpoint is, how long it took, which command comes next."""
        self.say(f"saved {self.path('ckpt.pt')} after {clock(time.perf_counter() - self.started)}"
                 + (f"; next: {following}" if following else ""))

    def progress(self, done, total, left):
        """"  37/200 18% 0:12<0:54": steps, share, time used and time left. left: seconds, as `Pace` tells them."""
        used = time.perf_counter() - self.started
        return f"{done:>{len(str(total))}}/{total} {100 * done // total:>3}% {clock(used)}<{clock(left)}"


class Pace:
    """What a run's work has taken so far, by kind, and so how long the rest of it will take: as long as the median of
    what came lately, for the first of a kind and the largest so far warm up, whatever else the machine does.

    Work is counted in usual steps, of `tokens` tokens each: half of a step's time goes with its tokens, the other half
    comes with every step. What comes between and after the steps is another kind.
    """

    def __init__(self, tokens=1):
        self.tokens, self.seconds = tokens, defaultdict(lambda: deque(maxlen=LATELY))  # {kind: a step's, of the last}

    def steps(self, tokens, passes=1):
        """Work on so many tokens, in so many passes, as a number of steps."""
        return (passes + tokens / self.tokens) / 2

    def add(self, kind, seconds, steps=1.0):
        self.seconds[kind].append(seconds / steps)

    def left(self, kind, steps, like="", share=1.0):
        """Seconds that so many steps of a kind will take; as long as it has not come, `share` of what the kind `like`
        takes."""
        if not self.seconds[kind]:
            return share * self.left(like, steps) if like else 0.0
        found = [*self.seconds[kind]]
        return steps * statistics.median(found[1:] or found)


def looks_left(done, steps, interval):
    """How many evaluations are to come, that of step `done` included: one each `interval` steps, one at the end."""
    return steps // interval - (done - 1) // interval + (steps % interval > 0)


def forward_share(model, o):
    """The share of a training step that its forward pass takes: to go back through a block takes as long where it has
    adapters, twice as long where its weights learn."""
    return 1 / (1 + (1 if o.lora_rank else 2) * (1 - model.first / len(model.h)))


def check_output(path):
    """Exits 2 where --output lies in no folder: before models are loaded, long before it is opened."""
    if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
        fail(f"--output {path}: cannot be written (there is no folder {os.path.dirname(path)})")


class Output:
    """The file of a command's --output; a context that says what was written, and leaves no file that is empty.

    It is opened where the input has been checked, and emptied by the first `write`. What stands in it is whole writes,
    also after a kill or on a full disk. Exits 2 where it would destroy what is no such file, or what the command reads:
    `reads`, under whatever name. ending: of its files, as ".json". path None: no file.
    """

    def __init__(self, path, ending, reads):
        self.path, self.size, self.writes, self.file = path, 0, 0, None
        if path is None:
            return
        for read in filter(os.path.exists, reads):
            if os.path.exists(path) and os.path.samefile(path, read):
                fail(f"--output {path}: is {read}, which this command reads; name another file")
        if os.path.isfile(path) and not path.endswith(ending):
            fail(f"--output {path}: exists and is no {ending} file; name another")
        if os.path.basename(os.path.realpath(path)) in (*KEPT, "config.json", "lock"):
            fail(f"--output {path}: has the name of a file that belongs to the run of that folder; name another")
        if os.path.isfile(path) and os.path.realpath(path).endswith((".train.jsonl", ".val.jsonl")):
            fail(f"--output {path}: exists and has the name of a file of data; name another")
        self.made = not os.path.exists(path)
        try:
            self.file = open(path, "ab", buffering=0)
        except OSError as error:
            fail(f"--output {path}: cannot be written ({error.strerror})")

    def write(self, text):
        """All of the text or, where the disk is full, none of it, and exit 1."""
        if self.file:
            data = clean(text).encode()
            try:
                if not self.size:
                    self.cut()
                done = 0
                while done < len(data):  # one call may take only a part
                    done += self.file.write(data[done:])
                self.size, self.writes = self.size + done, self.writes + 1
            except OSError as error:
                self.cut()
                raise SystemExit(one_line(f"error: --output {self.path}: could not be written ({error.strerror}) at "
                                          f"{self.size:,} bytes"))

    def cut(self):
        with contextlib.suppress(OSError):  # a pipe or device has no length
            self.file.truncate(self.size)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.file:
            self.file.close()
            if self.made and not self.size:
                os.remove(self.path)
            elif self.size and not isinstance(error, SystemExit):
                say(f"{'' if kind is None else 'stopped; '}written: {self.path}"
                    + f", {self.writes:,} line{'s' * (self.writes != 1)}" * self.path.endswith(".jsonl"))


def sync_folder(path):
    """The names in a folder on the disk: what was made or renamed in it is found there after a power cut."""
    handle = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know how
            raise
    finally:
        os.close(handle)


def finite(value):
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line(stage, options, **changes):
    """"python train_STAGE.py --name value ...", or "python -m minirlhf.dpo ...": the options that differ, after
    `changes`, from their defaults, or from those of a file of options in the package if these are fewer."""
    start = start_of("minirlhf.dpo" if stage == "dpo" else f"train_{stage}.py")
    return " ".join([start, *shortest(options, **changes)])


def shortest(options, **changes):
    """The words of the shortest command line that gives these options."""
    values, found = asdict(replace(options, **changes)), []
    for name, path in [("", ""), *(presets().items() if options.stage else ())]:
        usual = {f.name: f.default for f in fields(options)} | (preset_values(type(options), path) if path else {})
        found.append([f"@{name}"] * bool(path) + [
            f"--{k}" if values[k] is True else option(k, values[k]) for k in usual if values[k] != usual[k]])
    return min(found, key=len)


def option(name, value):
    """"--name value" as a shell takes it, "--name=value" where the value looks like an option itself; again for each of
    several."""
    if isinstance(value, tuple):
        return " ".join(option(name, one) for one in value or [""])
    return f"--{name}{'=' if str(value).startswith('-') else ' '}{shlex.quote(str(value))}"


def as_path(name):
    """A file's name as a shell's word that no command takes for an option."""
    return shlex.quote(os.path.join(".", name) if name.startswith("-") else name)


def start_of(script):
    """"python SCRIPT" or "python -m MODULE", as it is started from the folder where the user stands; what trains by
    torchrun, where the run was."""
    root, here = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.getcwd()
    _, world = ranks()
    python = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    if not script.endswith(".py"):
        elsewhere = "" if os.path.samefile(root, here) else f"PYTHONPATH={shlex.quote(root)} "
        return f"{elsewhere}{python if script == 'minirlhf.dpo' else 'python'} -m {script}"
    path = os.path.join(root, script)
    path = os.path.relpath(path, here) if os.path.commonpath([root, here]) in (root, here) else path
    return f"{python} {shlex.quote(path)}"


USUAL = {"data_dir": "data/sentiment", "val_share": 0.05, "init_from": "out/sft/ckpt.pt",
         "reward_model": "out/rm/ckpt.pt"}


def next_command(script, after, **options):
    """"python SCRIPT --name value ...", without options that have the stages' usual values. after: the options of the
    stage before, whose file of options, if they are those of one in the package, is for the next stage too."""
    preset = [word for word in shortest(after) if word.startswith("@")]
    usual = USUAL | {name.strip(): value.strip().strip("'\"") for word in preset for name, _, value in (
        line.partition("=") for _, line in lines_for(presets()[word[1:]], script[6:-3]))}
    return " ".join([start_of(script), *preset, *(option(name, value) for name, value in options.items()
                                                  if value != usual.get(name))])


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def pick_device(name):
    """auto, cpu, cuda[:N] or mps -> torch.device; exits 2 where it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        fail(f"--device {name}: there is no such CUDA device; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {name}: there is no MPS device; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        fail(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name, device):
    """auto -> bfloat16 where the GPU or the CPU multiplies it in hardware, else float32. Weights stay float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def make_optimizers(model, o):
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest; weight decay on matrices only.

    Each group carries its "peak" learning rate.   Loshchilov & Hutter 2019; Jordan et al. 2024 (Muon).
    """
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learns.items() if p.dim() == 2 and name.startswith("h.")]
    others = [p for name, p in learns.items() if p.dim() == 2 and not name.startswith("h.")]
    vectors = [p for p in learns.values() if p.dim() < 2]
    decayed = others if o.optimizer == "muon" else others + matrices
    optimizers = [AdamW([{"params": decayed, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                        lr=o.learning_rate, betas=(0.9, 0.95), fused=True)]
    if o.optimizer == "muon":
        slow = matrices[0].device.type == "cpu" and pick_dtype("auto", matrices[0].device) == torch.float32
        optimizers.append((Muon if slow else torch.optim.Muon)(
            matrices, lr=o.muon_learning_rate, weight_decay=o.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers, factor):
    """Each group's learning rate: its peak, times the factor that `rate_factor` gives."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def rate_factor(schedule, step, steps, warmup_ratio=None):
    """Factor of the peak learning rate at `step`, 0 <= step < steps.

    A linear rise over warmup_ratio of the steps, at least one (None: no rise); then, where a share x of the others is
    taken: linear 1 - x, cosine (1 + cos pi x) / 2, constant 1.
    """
    warmup = 0 if warmup_ratio is None else max(1, round(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    taken, all_of_them = step - warmup, max(1, steps - warmup)
    return {"linear": 1 - taken / all_of_them, "cosine": 0.5 * (1 + math.cos(math.pi * taken / all_of_them)),
            "constant": 1.0}[schedule]


def fail_before_update(what, o):
    """Exits 2. what: where, and what is not finite there."""
    fail(f"{what}: stopped before the update; the last good checkpoint, if any, is in {o.out_dir}; try a "
         f"--learning_rate below {o.learning_rate:g}")


def check_finite(o, where, **tensors):
    """Exits 2, before the update, where a tensor holds NaN or infinity. where: names the batch."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            fail_before_update(f"{where}: the {name} are not finite", o)


def clip_gradients(model, loss, where, o, check_weights=True):
    """Scale the gradient down to o.max_grad_norm (0 = never) -> its norm before.

    Exits 2, before the update, where the loss, the gradient or, with check_weights, a weight is not finite.
    where: names the batch.
    """
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    size = torch.nn.utils.get_total_norm(p.detach() for p in learning(model)) if check_weights else 0.0
    found = float(loss), float(norm), float(size)
    if not all(map(math.isfinite, found)):
        fail_before_update(f"{where}: not finite (loss {found[0]:.4g}, norm of the gradient {found[1]:.4g}"
                           + (f", of the weights {found[2]:.4g})" if check_weights else ")"), o)
    if 0 < o.max_grad_norm < found[1]:  # to multiply by 1 would cost a pass over all gradients
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.max_grad_norm, norm)
    return found[1]


def optimizer_step(model, optimizers, loss, where, o, check_weights=True):
    """`clip_gradients`, a step of each optimizer, no gradients left -> the gradient's norm before clipping."""
    norm = clip_gradients(model, loss, where, o, check_weights)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def learning(model):
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def describe_parameters(model):
    """"1,234 parameters", and how many of them learn, where not all do."""
    learn, every = sum(p.numel() for p in learning(model)), count_parameters(model)
    return f"{every:,} parameters" + (f" ({learn:,} of them learn)" if learn < every else "")
