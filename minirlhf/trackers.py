"""TensorBoard and Weights & Biases beside metrics.jsonl: `--tensorboard` and `--wandb` of every stage.

Each is told by a process of its own that reads metrics.jsonl while it grows. So the file is the queue and stays the
truth, and a package that fails, hangs, prints, seeds generators or takes signals does so where no run is: invariant, a
run's numbers and steps are those of a run without. At its end the run waits PATIENCE seconds. The same as a command
tells of a run that has ended, or the rest of what was missed:

    python -m minirlhf.trackers out/ppo --wandb

Left out: texts, histograms and weights, which samples.jsonl and ckpt.pt hold.
"""
import argparse
import contextlib
import errno
import fcntl
import glob
import json
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid

from minirlhf.config import Parser, fail, installed, launch, one_line, say

NAMES = ("tensorboard", "wandb")  # of options and packages
EVENTS = os.path.join("tensorboard", "events.out.tfevents.*")
PATIENCE = 10  # seconds that a run's end waits for all its trackers
HANGS = 600  # seconds after which a call that does not return ends its process
LARGEST = FREE = 1 << 28  # bytes: the largest file that a tracker may write, and what it leaves free on the disk


# ---- what is told

def figures(row):
    """A row of metrics.jsonl -> {name: number}, names within names joined by "/".

    An interval [mean, half-width] or [share, low, high] becomes NAME and NAME_half_width, or NAME_low and NAME_high.
    What is no number (a text, null for NaN) is left out.
    """
    found = {}
    for name, value in row.items():
        if isinstance(value, list):
            ends = {2: ("", "_half_width"), 3: ("", "_low", "_high")}.get(len(value), ())
            value = dict(zip(ends, value))
            found |= {name + end: part for end, part in figures(value).items()}
        elif isinstance(value, dict):
            found |= {f"{name}/{inner}": part for inner, part in figures(value).items()}
        elif type(value) in (int, float):
            found[name] = value
    return found


def place(row):
    """Where a row stands among others: a closing report has the step of the row before it."""
    return [row["step"], "final" in row]


def whole_rows(folder, at=0):
    """The rows of metrics.jsonl from byte `at` on, but for one that is still being written -> rows, where to go on."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "metrics.jsonl"), "rb") as f:
        f.seek(at)
        *lines, rest = f.read().split(b"\n")
        return [json.loads(line) for line in lines], f.tell() - len(rest)
    return [], at


class Known:
    """How far a tracker has been told, in out_dir/NAME.json: up to which row, and the run's id there.

    One process at a time tells: the file is locked. wait: for another one to end, else exits 2.
    """

    def __init__(self, name, folder, wait):
        self.file = open(os.path.join(folder, f"{name}.json"), "r+b", 0,
                         opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            fail(f"{folder}: its run is telling {name} now; wait for its end")
        self.id, self.sent = read_known(name, folder)

    def save(self, sent):
        self.sent = sent
        known = json.dumps({"id": self.id, "sent": sent}).ljust(100)
        os.pwrite(self.file.fileno(), known.encode(), 0)  # at once: a kill leaves this one or the one before


def read_known(name, folder):
    """-> the run's id with a tracker, a new one where there is none, and the place of the last row it was told."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        with open(os.path.join(folder, f"{name}.json"), encoding="utf-8") as f:
            known = json.load(f)
            return str(known["id"]), [int(known["sent"][0]), bool(known["sent"][1])]
    return uuid.uuid4().hex[:12], [0, False]


def left_by(folder, options):
    """Names of what trackers of an earlier run in a folder go on from, and what they show, if nothing takes its
    place."""
    return [*(f"{name}.json" for name in NAMES if os.path.exists(os.path.join(folder, f"{name}.json"))),
            *([] if options.tensorboard else glob.glob(EVENTS, root_dir=folder))]


# ---- the two trackers: known, options, first figures, say -> a function that tells (figures, step), one that ends

def to_tensorboard(folder, known, options, first, say):
    """Events in out_dir/tensorboard, values in float32. A run that goes on writes them again from its first row on:
    what it has cut from its metrics must not stay. Files of earlier processes are emptied, as an open TensorBoard that
    finds one gone looks for no other."""
    known.save([0, False])
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import summary_v2 as hparams
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    for name in glob.glob(EVENTS, root_dir=folder):
        os.truncate(os.path.join(folder, name), 0)
    writer = EventFileWriter(os.path.join(folder, "tensorboard"))

    def write(step=0, **content):
        writer.add_event(Event(wall_time=time.time(), step=step, **content))

    options = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in options.items()}  # no list
    write(session_log=SessionLog(status=SessionLog.START))  # an open TensorBoard forgets the points that it has
    write(summary=hparams.hparams_config_pb([hparams.HParam(name) for name in options],
                                            [hparams.Metric(name) for name in first]))
    write(summary=hparams.hparams_pb(options, trial_id=known.id))
    say(f"look at it by: tensorboard --logdir {shlex.quote(options['out_dir'])}")

    def tell(numbers, step):
        write(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]))
        writer.flush()
    return tell, writer.close


def to_wandb(folder, known, options, first, say):
    """A run of Weights & Biases, the same one when it goes on. WANDB_MODE, WANDB_PROJECT and the like hold as usual.
    Steps that a resumed run takes again keep the figures of the first time: what was sent cannot be taken back."""
    import wandb
    for name, value in (("PROJECT", "minirlhf"), ("NAME", options["out_dir"]), ("CONSOLE", "off")):
        os.environ.setdefault(f"WANDB_{name}", value)
    run = wandb.init(id=known.id, resume="allow", dir=folder, config=options, job_type=options["stage"])
    say(str(run.url or f"offline, in {os.path.join(options['out_dir'], 'wandb')}"))
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def tell(name, folder, going_on, say, wait=False):
    """Tell a tracker of the rows that it does not know yet, while going_on() and once more -> how many it was told.

    Nothing is made before there is a first row. wait: as for `Known`.
    """
    at, told, more, known = 0, 0, True, None
    while more:
        more = going_on()  # False: all that there will ever be has been written
        rows, at = whole_rows(folder, at)
        if rows and known is None:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                options = json.load(f)
            known = Known(name, folder, wait)
            send, end = {"tensorboard": to_tensorboard, "wandb": to_wandb}[name](
                folder, known, options, figures(rows[0]), say)
        for row in rows:
            if place(row) > known.sent:
                if shutil.disk_usage(folder).free < FREE:
                    raise OSError(errno.ENOSPC, f"less than {FREE >> 20} MB are free on the disk of {folder}")
                send({k: v for k, v in figures(row).items() if k != "step"}, row["step"])
                known.save(place(row))
                told += 1
    if known:
        end()
    return told


# ---- beside a run

class Follower:
    """The process that tells a tracker, as the run sees it. again: the command that tells what is missing at the end.

    It has no terminal, takes no signal of it, and has the processor only when nothing else wants it.
    """

    def __init__(self, name, folder, say, again):
        self.name, self.folder, self.say, self.again, self.process = name, folder, say, again, None
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = os.pathsep.join([root, *filter(None, sys.path)])  # it finds what this process finds
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "minirlhf.trackers", os.path.abspath(folder), f"--{name}",
                 f"--follow={os.getpid()}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                bufsize=0, start_new_session=True, env={**os.environ, "PYTHONPATH": path})
            os.set_blocking(self.process.stdout.fileno(), False)
        except (OSError, ValueError) as error:
            self.say(one_line(f"{name}: the run goes on without it: its process cannot be started ({error})"))

    def look(self):
        """Says what has come from the process, and that it has ended, where it has."""
        if self.process is None:
            return
        status = self.process.poll()
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self.process.stdout.fileno(), 1 << 14).decode("utf-8", "replace").splitlines():
                self.say(one_line(f"{self.name}: {line[:500]}"))
        if status is not None:
            if status:
                self.say(f"{self.name}: the run goes on without it: its process "
                         + (f"was ended by signal {-status}" if status < 0 else f"has ended with status {status}")
                         + f", as a call took {HANGS} seconds" * (status == -signal.SIGALRM))
            self.forget()

    def ask(self):
        """The process has a last look at the metrics, and ends."""
        with contextlib.suppress(OSError):
            self.process and self.process.stdin.write(b"\n")

    def end(self, deadline):
        """Waits for it until time.monotonic() is `deadline`, then says what the tracker lacks, if anything."""
        if self.process:
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
                self.look()
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                self.forget()
                self.say(f"{self.name}: has not ended within {PATIENCE} seconds of the run's end, and was stopped")
        with contextlib.suppress(OSError, ValueError, LookupError):  # to count them is no reason to fail
            rows, _ = whole_rows(self.folder)
            _, sent = read_known(self.name, self.folder)
            if missing := sum(place(row) > sent for row in rows):
                self.say(f"{self.name}: lacks {missing} of {len(rows)} rows of metrics.jsonl; it gets them by: "
                         f"{self.again}")

    def forget(self):
        self.process.stdin.close(), self.process.stdout.close()
        self.process = None


def end(followers):
    """The last that a run does: its trackers get a few seconds, all at once."""
    deadline = time.monotonic() + PATIENCE
    for follower in followers:
        follower.ask()
    for follower in followers:
        follower.end(deadline)


def follow(name, folder, run):
    """What the process does: tells the tracker until the run says that it ends, or is no more. run: its process."""
    said, asked, null = os.dup(1), os.dup(0), os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)  # whatever the package prints or asks
    os.nice(19)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST if most < 0 else min(LARGEST, most), most))

    def say(text):
        os.write(said, one_line(text).encode("utf-8", "replace") + b"\n")

    def going_on():
        signal.alarm(HANGS)  # not handled, it ends a process whatever that waits for
        return not select.select([asked], [], [], 1.0)[0] and os.getppid() == run

    try:
        tell(name, folder, going_on, say, wait=True)
    except BaseException as error:
        say(f"the run goes on without it: {type(error).__name__}: {error}")
    os._exit(0)  # what the package does at exit may hang as well


# ---- python -m minirlhf.trackers

def main(argv=None):
    parser = Parser(prog="python -m minirlhf.trackers", description="Tell a tracker of runs that have ended, as "
                    "--tensorboard and --wandb of the stages do while they train.")
    parser.add_argument("folders", nargs="+", metavar="OUT_DIR", help="what train_sft.py, train_rm.py or train_ppo.py "
                        "wrote")
    for name in NAMES:
        parser.add_argument(f"--{name}", action="store_true", help=f"needs: pip install {name}")
    parser.add_argument("--follow", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    chosen = [name for name in NAMES if getattr(a, name)]
    if a.follow:
        follow(chosen[0], a.folders[0], a.follow)
    if not chosen:
        fail("name a tracker: --tensorboard, --wandb or both")
    for name in chosen:
        installed(name)
    for folder in a.folders:
        if not all(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "metrics.jsonl")):
            fail(f"{folder}: no folder of a run: it holds no config.json, or no metrics.jsonl")
    for folder in a.folders:
        for name in chosen:
            try:
                told = tell(name, folder, lambda: False, lambda text: say(f"{name}: {text}"))
            except Exception as error:
                raise SystemExit(one_line(f"error: {folder}: {name}: {type(error).__name__}: {error}"))
            say(f"{name}: {folder}: {told} row{'s' * (told != 1)} of metrics.jsonl")


if __name__ == "__main__":
    launch(main)
