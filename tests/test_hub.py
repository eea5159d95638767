"""Models by name, from a hub that is played on this machine: it redirects as the real one does, and fails in many
ways."""
import contextlib
import email.utils
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import Command
import train_ppo
import train_rm
import train_sft
from minirlhf import checkpoint, fetch, hub, sample
from minirlhf.tokenizer import BYTE_OF
from test_pretrained import KINDS, config_of, safetensors, tensors_of

COMMIT, OTHER = "c0ffee" + "0" * 34, "decade" + "1" * 34
MODEL = "model.safetensors"
SECURE = "https" + "://"  # no address stands anywhere


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """files: {repository: {file: bytes}}. faults: functions of a request, tried in order, of which one that answers
    returns True. log: "METHOD file bytes" of each request but those that a redirect has led to."""
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Request)
        self.files, self.faults, self.log, self.commit = files, [], [], COMMIT
        self.address, self.cdn = (f"http://{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass  # the other side went away

    def close(self):
        self.over.set()
        self.shutdown()
        self.server_close()

    def once(self, method, file, answer):
        """The next such request gets this answer, a function of it."""
        def fault(request):
            if request.command == method and request.file == file and "/resolve/" not in request.path:
                self.faults.remove(fault)
                answer(request)
                return True
        self.faults.append(fault)

    def always(self, method, answer, file=MODEL, at="/resolve/"):
        self.faults.append(lambda request: (request.command == method and request.file == file and at in request.path
                                            and (answer(request), True)[1]))


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        place, self.file = self.path.partition("?")[0].rsplit("/", 1)
        self.range = self.headers.get("Range", "")
        if "/resolve/" in place:
            self.server.log.append(f"{self.command} {self.file} {self.range}".rstrip())
        for fault in [*self.server.faults]:
            if fault(self):
                return
        if "/resolve/" in place:
            repository, revision = place[1:].split("/resolve/")
            data = self.server.files[repository].get(self.file)
            if data is None or revision not in ("main", self.server.commit):
                self.send(404)
            elif self.file == MODEL:
                self.send(302, headers={"Location": f"{self.server.cdn}/bucket/{repository}/{MODEL}?signed=1",
                                        **self.linked(data)})
            else:
                self.send(307, b"Temporary Redirect", {"Location": f"/api/resolve-cache/{repository}/{self.file}?x=",
                                                       "X-Repo-Commit": self.server.commit})
        elif place.startswith("/bucket/") and self.command == "HEAD":
            self.send(403)  # signed for GET alone
        else:
            data = self.server.files["/".join(place.split("/")[-2:])][self.file]
            etag = git_sha1(data) if place.startswith("/api") else sha256(b"of chunks" + data)
            cut(None, data, ETag=f'"{etag}"', X_Repo_Commit=self.server.commit)(self)

    do_GET = do_HEAD = answer

    def linked(self, data):
        return {"X-Repo-Commit": self.server.commit, "X-Linked-Size": len(data), "X-Linked-ETag": f'"{sha256(data)}"'}

    def send(self, code, body=b"", headers={}, length=None, after=lambda: None):
        """length: what is announced, if not the truth; after: called before the connection is closed."""
        self.close_connection = True
        self.send_response(code)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
        after()

    def rest(self):
        """What of gpt2 was asked for."""
        return self.server.gpt2[MODEL][int(self.range[6:-1]) if self.range else 0:]


def cut(at, data=None, **headers):
    """Sends what was asked for of data, or of gpt2, and ends after so many bytes of it."""
    def answer(request):
        whole, begin = data or request.server.gpt2[MODEL], int(request.range[6:-1]) if request.range else 0
        place = {"Content_Range": f"bytes {begin}-{len(whole) - 1}/{len(whole)}"} if request.range else {}
        status(206 if request.range else 200, whole[begin:][:at], len(whole[begin:]), **headers | place)(request)
    return answer


def status(code, body=b"", length=None, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: request.send(code, body, headers, length)


def folder_of(kind, make_model):
    """{file: bytes} of a model as its repository has them: GPT-2's old one has no prefix, but a mask in every block."""
    model = make_model(**KINDS[kind] | {"vocab_size": 259})
    tensors = tensors_of(model)
    if kind == "gpt2":
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        tensors |= {f"h.{n}.attn.bias": torch.ones(32, 32).tril().view(1, 1, 32, 32) for n in range(2)}
    letters = {letter: i for i, letter in enumerate(BYTE_OF)}
    tokenizer = {"added_tokens": [{"id": 258, "content": "<|endoftext|>"}], "normalizer": None, "post_processor": None,
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                 "model": {"type": "BPE", "vocab": letters | {"th": 256, "the": 257}, "merges": ["t h", "th e"]}}
    values = {"config.json": config_of(kind, model) | {"vocab_size": 259}, "tokenizer.json": tokenizer,
              "tokenizer_config.json": {"eos_token": "<|endoftext|>"}}
    return {**{name: json.dumps(value).encode() for name, value in values.items()},
            MODEL: safetensors(tensors, __metadata__={"format": "pt"})}, model


@pytest.fixture
def server(tmp_path, monkeypatch, make_model):
    """A hub with a small gpt2 and a small smollm2-135m, from where models come in this test, into tmp_path/cache. What
    would wait does not: `waits` has the seconds. Silence is soon enough."""
    served = {kind: folder_of(kind, make_model) for kind in ("gpt2", "llama")}
    server = Hub({hub.MODELS[name]: served[kind][0] for name, kind in (("gpt2", "gpt2"), ("smollm2-135m", "llama"))})
    server.models = {name: served[kind][1] for name, kind in (("gpt2", "gpt2"), ("smollm2-135m", "llama"))}
    server.gpt2, server.cache, server.waits = server.files[hub.MODELS["gpt2"]], tmp_path / "cache", []
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=time.monotonic, time=time.time,
                                                     sleep=server.waits.append))
    monkeypatch.setattr(hub, "SILENCE", 0.3)
    for name, value in (("HF_ENDPOINT", server.address), ("MINIRLHF_CACHE", server.cache), ("no_proxy", "*")):
        monkeypatch.setenv(name, str(value))
    yield server
    server.close()


def there(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != hub.RECORD}


def is_whole(server, name="gpt2"):
    """Whether the cache holds what is published, and nothing else."""
    return there(server.cache / name) == server.files[hub.MODELS[name]]


# ---- once

@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_a_model_is_fetched_once(server, name, capsys):
    """All files as published, each asked for and then taken; from then on no network is needed. The record has the
    commit, from which all files but the first were taken, and their SHA-256."""
    assert hub.fetched(name) == str(server.cache / name) and is_whole(server, name)
    assert server.log == [f"{method} {file}" for file in hub.FILES for method in ("HEAD", "GET")]
    record, files = json.loads((server.cache / name / hub.RECORD).read_text()), server.files[hub.MODELS[name]]
    assert record == {"repository": hub.MODELS[name], "revision": COMMIT,
                      "sha256": {file: sha256(files[file]) for file in hub.FILES}}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"fetching {name} ({hub.MODELS[name]} at {server.address}) into {server.cache / name}"
    assert re.fullmatch(rf"fetched {name}, revision {COMMIT}: 0.1 MB in 0:0\d; checked by git's SHA-1: config.json, "
                        f"tokenizer.json, tokenizer_config.json; by SHA-256: {MODEL}", said[1]) and len(said) == 2
    server.close()
    assert hub.fetched(name) == str(server.cache / name) and not capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_the_weights_are_those_that_were_served(server, name):
    """Tensor by tensor, in both families."""
    model, tokenizer, payload = checkpoint.load(name, ["sft"], "cpu")
    published = server.models[name].state_dict()
    assert all(torch.equal(tensor, published[key]) for key, tensor in model.state_dict().items())
    assert payload["stage"] == "sft" and tokenizer.encode("the") == [257] and model.base["path"] == name


def test_every_name_has_its_repository(server, monkeypatch):
    """Nine names; asked for at HF_ENDPOINT, which may have a path and a stroke at its end, or else at the hub."""
    assert sorted(hub.NAMES) == sorted("smollm2 gpt2 gpt2-medium gpt2-large gpt2-xl distilgpt2 smollm2-135m "
                                       "smollm2-360m qwen2.5-0.5b qwen3-0.6b-base".split())
    assert all(name.replace("-base", "") in repository.lower() for name, repository in hub.MODELS.items())
    monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/mirror/")
    asked = []
    server.faults.append(lambda request: asked.append(request.path) or request.send(404) or True)
    with pytest.raises(SystemExit):
        hub.fetched("qwen3-0.6b-base")
    assert asked == ["/mirror/Qwen/Qwen3-0.6B-Base/resolve/main/config.json"]
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub.Server().address == hub.HUB


@pytest.mark.parametrize("address", ["mirror.example", "file:///etc", "ftp://x", "http://", "http://[", "http://x?y",
                                     "http://x#y"])
def test_an_address_that_is_none(server, monkeypatch, refused, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert f"HF_ENDPOINT {address}: " in refused(hub.fetched, "gpt2") and not server.cache.exists()


def test_what_was_put_there_by_hand_is_taken(server):
    """No record, no network; with what is missing it asks for that alone."""
    shutil.copytree(server.cache.parent, server.cache / "gpt2")
    for file in hub.FILES[:2]:
        (server.cache / "gpt2" / file).write_bytes(server.gpt2[file])
    hub.fetched("gpt2")
    assert {line.split()[1] for line in server.log} == {"tokenizer_config.json", MODEL} and is_whole(server)
    os.remove(server.cache / "gpt2" / hub.RECORD)
    os.remove(server.cache / "gpt2" / hub.OPTIONAL)
    server.close()
    assert checkpoint.load("gpt2", ["sft"], "cpu")[0].config.n_layer == 2


@pytest.mark.parametrize("file", hub.FILES)
def test_a_cached_file_that_has_changed_is_named(server, refused, file):
    """One byte, in any of them; removed, it is fetched again from the same commit, and nothing else is."""
    path = Path(hub.fetched("gpt2")) / file
    assert hub.fetched("gpt2")  # which has read them all
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(0, 0))  # a clock may stand still for milliseconds
    error = refused(hub.fetched, "gpt2")
    assert str(path) in error and sha256(content) in error and "remove it" in error
    path.unlink()
    server.log.clear()
    hub.fetched("gpt2")
    assert server.log == [f"HEAD {file}", f"GET {file}"] and is_whole(server)


def test_a_model_without_its_optional_file(server):
    """There is a tokenizer's configuration in every one of the nine today; nothing depends on that."""
    del server.gpt2[hub.OPTIONAL]
    hub.fetched("gpt2")
    assert is_whole(server)
    server.close()
    assert hub.fetched("gpt2")


def test_a_long_fetch_says_how_far_it_is(server, capsys, monkeypatch):
    """Megabytes of all, megabytes a second, time left: by hand, 1 of 4 MB after 5 seconds leaves 15."""
    now = iter([0, 5, 6, 12])
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: next(now)))
    tell = hub.progress("x", 0, 4_000_000)
    for have in (1_000_000, 1_200_000, 3_000_000):
        tell(have)
    assert capsys.readouterr().out == "x: 1.0 of 4.0 MB, 0.2 MB/s, 0:15 left\nx: 3.0 of 4.0 MB, 0.2 MB/s, 0:04 left\n"


# ---- cut, stalled, killed

@pytest.mark.parametrize("at", [0, 1, 7, 3000, -1])
def test_what_was_cut_goes_on_there(server, at, capsys):
    """The next request asks for the bytes that are missing, and no more; the waits grow; the whole is as published."""
    size = len(server.gpt2[MODEL])
    at %= size
    server.once("GET", MODEL, cut(at))
    server.once("GET", MODEL, cut(0))
    hub.fetched("gpt2")
    assert is_whole(server) and server.waits == [1, 2]
    assert [line for line in server.log if line.startswith(f"GET {MODEL}")] == [
        f"GET {MODEL}", *[f"GET {MODEL} bytes={at}-" if at else f"GET {MODEL}"] * 2]
    said = capsys.readouterr().out
    assert f"{MODEL}: was cut at {at:,} of {size:,} bytes; again in 1 s" in said
    assert said.count(f"{MODEL} goes on at ") == 2 * (at > 0)


def test_a_server_that_stalls_is_left(server, capsys):
    """After SILENCE; what has come is kept. Also one that does not even answer."""
    server.once("GET", MODEL, lambda request: request.send(200, request.rest()[:50], {}, len(request.rest()),
                                                           after=server.over.wait))
    server.once("GET", MODEL, lambda request: server.over.wait())
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL} bytes=50-"
    assert capsys.readouterr().out.count("timed out; again in") == 2


def test_tries_are_counted_while_nothing_comes(server, monkeypatch, refused, capsys):
    """Five in a row without a piece; a piece starts the count again, so that any file ends. What came is kept, and the
    next command needs the rest alone."""
    size = len(server.gpt2[MODEL])
    monkeypatch.setattr(hub, "PIECE", 1000)
    for at in [0, 0, 0, 0, 1000, 0, 0, 0, 999]:
        server.once("GET", MODEL, cut(at))
    error = refused(hub.fetched, "gpt2")
    assert f"was cut at 1,999 of {size:,} bytes; 5 times in a row" in error and "goes on from there" in error
    assert server.waits == [1, 2, 4, 8, 1, 2, 4, 8] and f"put {MODEL} of {server.address}/openai-community/" in error
    assert not server.faults
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL} bytes=1999-"


def test_a_server_that_always_cuts_before_the_same_byte_is_given_up(server, monkeypatch, refused):
    """Also where it cannot go on: bytes that come again are no progress."""
    monkeypatch.setattr(hub, "PIECE", 100)
    server.always("HEAD", lambda request: request.send(200, headers={"Content-Length": len(server.gpt2[MODEL])}))
    server.always("GET", cut(500))
    assert "was cut at 500 of" in refused(hub.fetched, "gpt2") and not any("bytes=" in line for line in server.log)
    assert server.waits == [1, 2, 4, 8]


class Killed(BaseException):
    """The process ends here, and nothing that would still be done is done."""


def test_killed_at_any_moment(server, monkeypatch, capsys):
    """Before and after every rename, removal and sync: never is a file under its name that is not whole, and the next
    call ends with all of them, taking no byte twice that had come."""
    def counted(real):
        def call(*arguments, **options):
            for after in (False, True):
                if len(calls) == moment:
                    raise Killed
                calls.append(real)
                if not after:
                    real(*arguments, **options)
        return call

    monkeypatch.setattr(hub, "FILES", ("config.json", MODEL))
    for name in {*server.gpt2} - {*hub.FILES}:
        del server.gpt2[name]
    for moment in range(100):
        shutil.rmtree(server.cache, ignore_errors=True)
        server.once("GET", MODEL, cut(100))
        calls, ended = [], True
        with monkeypatch.context() as m:
            for name in ("replace", "remove", "unlink", "fsync"):
                m.setattr(os, name, counted(getattr(os, name)))
            try:
                hub.fetched("gpt2")
            except Killed:
                ended = False
        server.faults.clear()
        if ended:
            break
        found = {name: data for name, data in there(server.cache / "gpt2").items() if name in hub.FILES}
        assert found == {name: server.gpt2[name] for name in found}
        hub.fetched("gpt2")
        (server.cache / "gpt2" / "lock").unlink(missing_ok=True)  # it ended with all in place but this
        assert is_whole(server)
    assert 15 < moment < 99


def surroundings():
    return {name: os.environ[name] for name in ("HF_ENDPOINT", "MINIRLHF_CACHE", "no_proxy")}


def sampling(cwd, **more):
    """A process that samples from gpt2."""
    cwd.mkdir()
    return Command("minirlhf.sample", "gpt2", "--prompt", "the", "--response_length", "4", "--device", "cpu", cwd=cwd,
                   env=surroundings(), **more)


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def held_back(server, at):
    """The model's first bytes come, the others do not."""
    server.once("GET", MODEL, lambda request: request.send(200, request.rest()[:at], {}, len(request.rest()),
                                                           after=server.over.wait))


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, 137), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_dies_leaves_a_part_that_goes_on(server, tmp_path, number, code):
    """kill -9, SIGTERM, Ctrl-C: at once; its lock does not hold up the next process, which asks for the rest."""
    held_back(server, 500)
    process = sampling(tmp_path / "run")

    def parts():
        with contextlib.suppress(FileNotFoundError):  # a file that came whole meanwhile
            return [path for path in server.cache.glob("gpt2/*.part") if path.stat().st_size == 500]

    wait_for(parts)
    os.kill(process.pid, number)
    assert process.wait()[0] == code and parts()
    hub.fetched("gpt2")
    assert server.log[-1] == f"GET {MODEL} bytes=500-"
    assert {name: data for name, data in there(server.cache / "gpt2").items()} == server.gpt2


def test_a_run_that_still_fetches_ends_at_once(server, tmp_path):
    """Its first step is far; the folder that was made for it goes."""
    held_back(server, 500)
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    process = Command("train_sft.py", "--init_from", "gpt2", "--data_dir", "data", "--out_dir", "out/sft", cwd=tmp_path,
                      env=surroundings())
    wait_for(lambda: [*server.cache.glob("gpt2/*.part")])
    os.kill(process.pid, signal.SIGINT)
    code, out, error = process.wait()
    assert code == 130 and "Traceback" not in error and "finishing" not in error and not (tmp_path / "out").exists()


def test_two_processes_at_once(server, tmp_path):
    """One fetches, the other says that it waits; each file is taken once, and both go on."""
    held = threading.Event()
    server.once("GET", MODEL, lambda request: (held.wait(60), request.send(200, request.rest())))
    first = sampling(tmp_path / "first")
    wait_for(lambda: f"GET {MODEL}" in server.log)
    second = sampling(tmp_path / "second")
    wait_for(lambda: "waiting for another process, which fetches gpt2" in Path(second.logs[0]).read_text())
    held.set()
    (code, out, _), (other_code, other_out, _) = first.wait(), second.wait()
    assert code == other_code == 0 and out.splitlines()[2:] == other_out.splitlines()[1:]
    assert server.log == [f"{method} {file}" for file in hub.FILES for method in ("HEAD", "GET")] and is_whole(server)


def test_the_waiting_process_takes_over(server, tmp_path):
    """From one that was killed, without being told."""
    held_back(server, 500)
    first = sampling(tmp_path / "first")
    wait_for(lambda: f"GET {MODEL}" in server.log)
    second = sampling(tmp_path / "second")
    wait_for(lambda: "waiting for another process" in Path(second.logs[0]).read_text())
    os.kill(first.pid, signal.SIGKILL)
    assert second.wait()[0] == 0 and is_whole(server)


# ---- mirrors and lies


def test_a_mirror_of_few_words(server, capsys):
    """It knows no commits, no ranges and no redirects, and its ETag is a hash of its own: the model is whole all the
    same, and by what little it was checked is said."""
    whole, cuts = server.gpt2[MODEL], iter([500, None])
    server.always("HEAD", status(200, length=len(whole), ETag="ab" * 20))
    server.always("GET", lambda request: status(200, whole[:next(cuts)], len(whole), ETag="ab" * 20)(request))
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL} bytes=500-"
    assert (said := capsys.readouterr().out).endswith(f"; by size: {MODEL}\n") and "goes on at" not in said


def test_a_mirror_that_answers_itself_and_leads_elsewhere(server):
    """What another host calls an ETag is not compared."""
    server.always("HEAD", cut(None, ETag="one"))
    server.always("GET", status(302, Location=f"{server.cdn}/bucket/openai-community/gpt2/{MODEL}"))
    hub.fetched("gpt2")
    assert is_whole(server)


@pytest.mark.parametrize("place", ["bytes 0-{last}/{size}", "bytes 500-{last}/{more}", "bytes */{size}", "", None])
def test_another_range_than_was_asked_for(server, place):
    """It is not taken for the rest: the file begins anew."""
    size = len(server.gpt2[MODEL])
    place = place and place.format(last=size - 1, size=size, more=size + 1)
    server.once("GET", MODEL, cut(500))
    server.once("GET", MODEL, status(206, server.gpt2[MODEL][500:], Content_Range=place))
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL}"

def test_another_commit_between_two_files(server):
    """main moves on while a model is fetched: the rest comes from the commit of what is there, also after a kill."""
    server.once("GET", MODEL, lambda request: setattr(request, "close_connection", True))
    asked = []
    server.faults.insert(0, lambda request: asked.append(request.path) if "/resolve/" in request.path else None)
    hub.fetched("gpt2")
    assert [path.split("/")[4] for path in asked] == ["main"] * 2 + [COMMIT] * (len(asked) - 2) and len(asked) > 8


def test_a_revision_that_is_gone(server, refused):
    """Nothing is mixed: the way to begin anew is told."""
    hub.fetched("gpt2")
    (server.cache / "gpt2" / MODEL).unlink()
    server.commit = OTHER
    error = refused(hub.fetched, "gpt2")
    assert f"revision {COMMIT} (HTTP 404)" in error and f"to begin anew, remove {server.cache / 'gpt2'}" in error


def test_a_file_that_changes_between_two_parts(server):
    """Its ETag is another one: the part is dropped, and the new file is taken from its first byte."""
    def changed(request):
        cut(500)(request)
        server.gpt2[MODEL] = server.gpt2[MODEL][:-1] + b"!"
    server.once("GET", MODEL, changed)
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL}"


def test_a_file_that_changes_between_question_and_answer(server):
    """The same, on a mirror without redirects: the rest that comes has another ETag, and is not taken."""
    etags, cuts = iter(["one"] * 3 + ["two"] * 3), iter([500, None, None])
    server.always("HEAD", lambda request: cut(None, ETag=next(etags))(request))
    server.always("GET", lambda request: cut(next(cuts), ETag=next(etags))(request))
    hub.fetched("gpt2")
    assert [line for line in server.log if line.startswith("GET model")] == [
        f"GET {MODEL}", f"GET {MODEL} bytes=500-", f"GET {MODEL}"] and is_whole(server)


def test_a_part_that_is_not_what_it_seems(server, capsys):
    """Other bytes in it, as after a power cut: the whole has not the SHA-256 that is published, and is fetched anew."""
    server.once("GET", MODEL, cut(500))
    spoiled = []
    server.faults.append(lambda request: spoil(server, spoiled) if request.range else None)
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL}" and spoiled
    assert "its SHA-256 is" in capsys.readouterr().out


def test_a_part_that_is_longer_than_its_file(server, monkeypatch):
    """No part that came from there, then: it is fetched anew."""
    cuts = iter([500, None])
    server.always("HEAD", cut(None, ETag="one"))
    server.always("GET", lambda request: cut(next(cuts), ETag="one")(request))
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: spoil(server, [], server.gpt2[MODEL] + b"x"))
    hub.fetched("gpt2")
    assert is_whole(server) and server.log[-1] == f"GET {MODEL}"


def spoil(server, done, content=bytes(500)):
    for part in [] if done else server.cache.glob("gpt2/model*.part"):
        part.write_bytes(content)
        done.append(part)


@pytest.mark.parametrize("file, how", [(MODEL, "SHA-256"), ("config.json", "git's SHA-1")])
def test_other_bytes_than_were_published_are_refused(server, refused, file, how):
    """At once, for they would come again; nothing of them is kept."""
    at = "/bucket/" if file == MODEL else "/api/"
    server.always("GET", lambda request: request.send(200, b"{" + server.gpt2[file][1:-1] + b"!"), file, at)
    error = refused(hub.fetched, "gpt2")
    assert f"{file}: its {how} is " in error and " was published" in error and server.waits == []
    assert f"put {', '.join(hub.FILES[hub.FILES.index(file):])} of {server.address}/" in error
    assert "kept" not in error and not [*server.cache.glob("**/*.part")]
    assert server.cache.exists() == (file == MODEL)


def lying(request, size, code=302):
    headers = request.linked(request.server.gpt2[MODEL]) | {"X-Linked-Size": size}
    request.send(code, headers=headers | {"Location": f"{request.server.cdn}/bucket/openai-community/gpt2/{MODEL}"})


@pytest.mark.parametrize("difference", [-1, 1, 10 ** 6])
def test_a_size_that_is_wrong(server, refused, difference):
    """What is announced and what is sent must agree, before a byte is taken."""
    size = len(server.gpt2[MODEL])
    server.always("HEAD", lambda request: lying(request, size + difference))
    error = refused(hub.fetched, "gpt2")
    assert f"{size} bytes are sent, {size + difference} were announced; 5 times in a row" in error
    assert not [*server.cache.glob("**/*.part")]


@pytest.mark.parametrize("length, body, told", [
    (10, 10, "10 bytes are sent, {size} were announced"), (None, -1, "was cut at {less} of {size} bytes"),
    (None, 0, ""), (None, 1, "more than the {size} bytes are sent"), ("x", 0, "x bytes are sent"),
    ("-5", 0, "-5 bytes are sent")])
def test_a_length_that_is_wrong(server, refused, length, body, told):
    """Too short, cut, none at all (which is no lie), too long without one, no number."""
    data = server.gpt2[MODEL]
    sent = data[:body] if body in (10, -1) else data + b"x" * body
    answer = lambda request: request.send(200, sent, {"Content-Length": length})  # noqa: E731
    server.always("GET", answer, at="/bucket/")
    if told:
        error = refused(hub.fetched, "gpt2")
        size = f"{len(data):,}" if length is None else str(len(data))
        assert told.format(size=size, less=f"{len(data) - 1:,}") in error
        assert not (server.cache / "gpt2" / MODEL).exists()
    else:
        hub.fetched("gpt2")
        assert is_whole(server)


@pytest.mark.parametrize("size", ["", "0", "-1", "1e3", "٣", "x", "9" * 20])
def test_a_size_that_is_none(server, refused, size):
    server.always("HEAD", lambda request: lying(request, size.encode().decode("latin-1")))
    error = refused(hub.fetched, "gpt2")
    assert f"{MODEL}: {server.address[7:]}: does not say how large it is, and redirects to localhost" in error


def test_a_disk_without_room_is_told_before(server, refused, monkeypatch):
    """What it takes and what is free; nothing stays."""
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    error = refused(hub.fetched, "gpt2")
    assert str(server.cache / "gpt2") in error and "MB are free" in error and not server.cache.exists()
    assert server.log == ["HEAD config.json"]


def test_a_disk_that_fills_up(server, tmp_path):
    """Exit 2 naming the part and how far it is; it goes on when there is room."""
    size = len(server.gpt2[MODEL])
    code, _, error = sampling(tmp_path / "run", largest_file=size - 1000).wait()
    assert code == 2 and error.count("\n") == 1 and "could not be written (File too" in error
    assert f"of {size:,} bytes; what is there is kept" in error and ".part" in error
    hub.fetched("gpt2")
    assert is_whole(server) and re.fullmatch(f"GET {MODEL} bytes=[1-9][0-9]*-", server.log[-1])


# ---- answers that are none

@pytest.mark.parametrize("location, told", [
    ("file:///etc/passwd", "redirects to file:///etc/passwd, where no model is fetched from"),
    ("ftp://x/y", "redirects to ftp://x/y, where"), ("http://[", "redirects to http://[, where"),
    ("{self}", "redirects without end"), ("http://localhost:1/x", "does not say how large it is, and redirects to")])
def test_redirects_that_lead_nowhere(server, refused, location, told):
    """At once, and nothing stays."""
    server.always("HEAD", lambda request: request.send(302, headers={"Location": location.replace(
        "{self}", request.path)}), "config.json")
    assert told in refused(hub.fetched, "gpt2") and server.waits == [] and not server.cache.exists()


def test_redirects_that_lead_on(server):
    """To a new name of the repository, to another address of the same host, and from one mirror to the next."""
    server.files["new/name"] = server.files.pop("openai-community/gpt2")
    server.faults.append(lambda request: "y/gpt2/resolve" in request.path and (request.send(308, headers={
        "Location": server.address + request.path.replace("openai-community/gpt2", "new/name")}), True)[1])
    hub.fetched("gpt2")
    assert there(server.cache / "gpt2") == server.gpt2


@pytest.mark.parametrize("of, to, followed", [
    (SECURE, SECURE, True), ("http://", SECURE, True), ("http://", "http://", True), (SECURE, "http://", False),
    (SECURE, "file://", False), (SECURE, "data:", False), ("http://", "javascript:", False)])
def test_a_redirect_never_leads_to_what_is_less_safe(of, to, followed):
    with contextlib.nullcontext() if followed else pytest.raises(hub.Refused):
        assert hub.redirected(f"{of}a/b", f"{to}c/d") == f"{to}c/d"
    assert hub.redirected(f"{of}a/b", "/c?d") == f"{of}a/c?d"


PAGE = b"<!doctype html><title>Sign in</title>"


@pytest.mark.parametrize("file", ["config.json", MODEL])
def test_a_page_in_place_of_a_file(server, refused, file):
    """By its type; and where it claims another, by what it holds. So is what Git LFS leaves in place of data."""
    for body, kind, told in ((PAGE, "text/html; charset=utf-8", "sends a page of HTML"),
                             (PAGE, "application/json", "holds something else"),
                             (b"version https:" + b"//git-lfs\noid", "text/plain", "holds something else")):
        server.faults.clear()
        answer = lambda request: request.send(200, body, {"Content-Type": kind})  # noqa: E731
        server.always("HEAD", answer, file), server.always("GET", answer, file)
        assert told in refused(hub.fetched, "gpt2")
        assert not [*server.cache.glob("**/*.part")] and not (server.cache / "gpt2" / file).exists()


@pytest.mark.parametrize("file", [file for file in hub.FILES if file != hub.OPTIONAL])
def test_a_file_that_is_not_there(server, refused, file):
    del server.gpt2[file]
    error = refused(hub.fetched, "gpt2")
    assert f"{file}: {server.address} has no {file} of openai-community/gpt2 at revision" in error
    assert "(HTTP 404)" in error and server.waits == []


@pytest.mark.parametrize("code", [400, 401, 403, 410, 418, 304])
def test_an_answer_that_will_stay_the_same(server, refused, code):
    server.always("HEAD", status(code), "config.json")
    assert f"config.json: 127.0.0.1:{server.server_port}: HTTP {code}" in refused(hub.fetched, "gpt2")
    assert server.waits == [] and len(server.log) == 1


@pytest.mark.parametrize("code", hub.BUSY)
def test_a_busy_server_is_asked_again(server, refused, code):
    """Of itself in 1, 2, 4, 8 seconds, and then no more; once it answers, all goes on."""
    server.always("HEAD", status(code), "config.json")
    assert f"HTTP {code} " in (error := refused(hub.fetched, "gpt2")) and "5 times in a row" in error
    assert server.waits == [1, 2, 4, 8] and not server.cache.exists()
    server.faults[:] = [lambda request: len(server.log) < 7 and (request.send(code), True)[1]]
    hub.fetched("gpt2")
    assert is_whole(server) and server.waits[4:] == [1]


@pytest.mark.parametrize("headers, waits", [
    ({"Retry-After": "7"}, [7] * 4), ({"Retry-After": "0"}, [0] * 4), ({"RateLimit": '"resolvers";r=0;t=55'}, [55] * 4),
    ({"Retry-After": "9" * 9}, []), ({"Retry-After": "301"}, []), ({"Retry-After": "soon"}, [1, 2, 4, 8]),
    ({"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, [0] * 4), ({"Retry-After": "9" * 400}, [1, 2, 4, 8])])
def test_a_server_that_asks_to_wait(server, refused, headers, waits):
    """As long as it says, up to five minutes; longer is told, not waited."""
    server.always("HEAD", lambda request: request.send(429, headers=headers), "config.json")
    error = refused(hub.fetched, "gpt2")
    assert server.waits == waits and ("it asks to wait" in error) == (not waits)


def test_a_date_to_wait_for(server, refused):
    when = email.utils.formatdate(time.time() + 100, usegmt=True)
    server.always("HEAD", status(503, Retry_After=when), "config.json")
    refused(hub.fetched, "gpt2")
    assert len(server.waits) == 4 and all(50 < wait <= 100 for wait in server.waits)


# ---- no network

def by_hand(error, server):
    """The line names each file, where it is published, where to put it, and what else there is."""
    return all(part in error for part in (
        "could not fetch gpt2: config.json: ", "by hand: put config.json, tokenizer.json, tokenizer_config.json, "
        f"{MODEL} of ", "/openai-community/gpt2/resolve/main/ into " + str(server.cache / "gpt2"), "HF_ENDPOINT",
        "MINIRLHF_CACHE")) and not server.cache.exists() and server.waits == []


def test_no_network(server, refused, monkeypatch):
    """Nobody listens; a name that nobody knows: one line, no second try, nothing left."""
    server.close()
    assert by_hand(error := refused(hub.fetched, "gpt2"), server) and "Connection refused" in error
    monkeypatch.setenv("HF_ENDPOINT", SECURE + "hub.invalid")
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert by_hand(error := refused(hub.fetched, "gpt2"), server) and "hub.invalid: Name or service not known" in error


@pytest.mark.parametrize("address", ["http://hub.invalid", SECURE + "hub.invalid"])
def test_a_name_that_is_looked_up_for_ever_holds_nobody(server, refused, monkeypatch, address):
    """The system's own time limit is half a minute and more."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: server.over.wait(10) or [])
    monkeypatch.setattr(hub, "CONNECT", 0.1)
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert by_hand(error := refused(hub.fetched, "gpt2"), server) and "no connection within 0.1 seconds" in error


def test_a_server_that_speaks_no_http(server, refused):
    """Before it has ever answered, once; later it is asked again."""
    def garbage(request):
        request.wfile.write(b"\x16\x03\x01 what?\r\n\r\n")
        request.close_connection = True
    server.always("HEAD", garbage, "config.json")
    assert by_hand(refused(hub.fetched, "gpt2"), server)
    server.faults.clear()
    server.once("GET", MODEL, garbage)
    hub.fetched("gpt2")
    assert is_whole(server) and server.waits == [1]


def test_a_network_that_goes_away_is_waited_for(server, refused):
    """Once it has answered, in 1, 2, 4, 8 seconds."""
    server.once("GET", MODEL, lambda request: (cut(500)(request), server.server_close()))
    error = refused(hub.fetched, "gpt2")
    assert "refused; 5 times in a row" in error and "goes on from there" in error and server.waits == [1, 2, 4, 8]


def test_headers_of_every_kind(server, capsys):
    """Random ones: it ends with the model, or in one line and exit status 2, and touches nothing outside the cache."""
    rng, names = random.Random(0), ("X-Linked-Size", "X-Linked-ETag", "X-Repo-Commit", "ETag", "Content-Range",
                                    "Location", "Retry-After", "RateLimit", "Content-Type", "Transfer-Encoding")
    values = ("", "0", "-1", "../../x", '"' * 9, "W/", "a" * 300, "bytes */*", "x;t=9", "text/html", "/", "//", "::",
              "\xff", "chunked", "gzip", "http://127.0.0.1:99999/", "a" * 40, "a" * 64, "%00", "\t;=")
    for _ in range(60):
        shutil.rmtree(server.cache, ignore_errors=True)
        method, file = rng.choice(["HEAD", "GET"]), rng.choice(hub.FILES)
        code = rng.choice([200, 206, 302, 307, 416, 429])
        headers = {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 4))}
        server.faults[:] = [lambda request: request.command == method and request.file == file and (request.send(
            code, server.gpt2[file][:rng.choice([0, 5, 10 ** 6])], headers), True)[1]]
        try:
            hub.fetched("gpt2")
            assert {name: data for name, data in there(server.cache / "gpt2").items() if name != hub.OPTIONAL}.items() \
                <= server.gpt2.items()
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert {path.name for path in server.cache.parent.iterdir()} <= {"cache"}
        server.waits.clear()


# ---- where models are named

def write_data(folder):
    rows = {"sft": {"prompt": "the", "completion": " cat"}, "prompts": {"prompt": "the"},
            "preferences": {"prompt": "the", "chosen": " cat", "rejected": " dog"}}
    for name, row in rows.items():
        for split in ("train", "val"):
            (folder / f"{name}.{split}.jsonl").write_text((json.dumps(row) + "\n") * 8)


RUN = ["--data_dir", "data", "--device", "cpu", "--response_length", "4", "--batch_size", "4", "--lora_rank", "2"]


@pytest.fixture
def world(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data")
    return server


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_a_name_goes_through_all_stages(world, name, capsys):
    """--init_from of each stage, --reference, sample; and what was trained on it resumes, and is sampled from, when
    there is no network any more and the command stands in another folder."""
    train_sft.main(["--init_from", name, "--max_steps", "1", "--out_dir", "out/sft", *RUN])
    assert f"from {name}" in (said := capsys.readouterr().out) and said.count(f"fetching {name} ") == 1
    sample.main([name, "out/sft", "--prompt", "the", "--response_length", "4", "--device", "cpu"])
    assert f"{name} " in capsys.readouterr().out
    world.close()
    train_rm.main(["--init_from", name, "--max_steps", "1", "--out_dir", "out/rm", "--num_scale_samples", "4", *RUN])
    train_ppo.main(["--init_from", "out/sft", "--reference", name, "--reward_model", "out/rm", "--out_dir", "out/ppo",
                    "--total_episodes", "4", "--value_warmup", "0", "--num_mini_batches", "2", *RUN])
    for stage, script in (("sft", train_sft), ("rm", train_rm), ("ppo", train_ppo)):
        capsys.readouterr()
        script.main(["--resume", "--out_dir", f"out/{stage}"])
        assert "this run is finished" in capsys.readouterr().out
    payload = torch.load("out/sft/ckpt.pt", weights_only=True)
    assert payload["base"]["path"] == name == payload["options"]["init_from"]


def test_a_run_goes_on_without_a_network(world, capsys):
    """Stopped after a step: the frozen weights are in the cache."""
    train_sft.main(["--init_from", "gpt2", "--out_dir", "out/sft", "--lr_schedule", "constant", "--max_steps", "0",
                    "--num_train_epochs", "0.5", *RUN])
    world.close()
    train_sft.main(["--resume", "--out_dir", "out/sft", "--num_train_epochs", "1"])
    assert "goes on from step 1" in capsys.readouterr().out
    shutil.rmtree(world.cache)
    with pytest.raises(SystemExit):
        train_sft.main(["--resume", "--out_dir", "out/sft", "--num_train_epochs", "2"])
    assert "could not fetch gpt2" in capsys.readouterr().err


def test_adapters_on_a_name_find_it_anywhere(world, tmp_path, monkeypatch, refused):
    """On another machine the model is fetched; where another one is published by then, the two are told apart."""
    train_sft.main(["--init_from", "gpt2", "--max_steps", "1", "--out_dir", "out/sft", *RUN])
    shutil.rmtree(world.cache)
    assert checkpoint.load("out/sft", ["sft"], "cpu")[0].base["path"] == "gpt2" and is_whole(world)
    shutil.rmtree(world.cache)
    world.gpt2["config.json"] += b" "
    assert "holds adapters on gpt2, which is another model now" in refused(checkpoint.load, "out/sft", ["sft"], "cpu")


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
@pytest.mark.parametrize("what", ["folder", "checkpoint", "file"])
def test_a_model_of_ones_own_stands_in_for_none(world, refused, monkeypatch, name, what):
    """Where a name is also that of a model here, neither is taken: ./NAME is the one here. Any other folder is none."""
    monkeypatch.setattr(fetch, "smollm2", lambda: pytest.fail("fetched"))
    if what == "file":
        Path(name).write_text("x")
    else:
        Path(name).mkdir()
        Path(name, "config.json" if what == "folder" else "ckpt.pt").write_text("{}")
    for call in (lambda: checkpoint.load(name, ["sft"], "cpu"), lambda: checkpoint.files_of(name)):
        error = refused(call)
        assert f"{name}: the name of a published model, and here of one of yours: ./{name} names yours" in error
    assert "published" not in refused(checkpoint.load, f"./{name}", ["sft"], "cpu") and world.log == []


def test_a_folder_that_is_no_model_hides_none(world, monkeypatch):
    """Nor does the cache itself, where that is the working folder."""
    Path("gpt2").mkdir()
    Path("gpt2", "config.json").write_text('{"stage": "sft"}')
    assert checkpoint.load("gpt2", ["sft"], "cpu")[0].config.n_layer == 2
    monkeypatch.chdir(world.cache)
    for cache in (".", str(world.cache)):
        monkeypatch.setenv("MINIRLHF_CACHE", cache)
        assert checkpoint.load("gpt2", ["sft"], "cpu")[0].config.n_layer == 2


def test_a_language_model_is_no_reward_model(world, refused):
    """Told before it is fetched."""
    for name in hub.NAMES:
        assert f"{name}: is a language model, expected a reward model" in refused(checkpoint.load, name, ["rm"], "cpu")
    assert world.log == []


@pytest.mark.parametrize("typed, meant", [
    ("gtp2", "gpt2"), ("GPT2-XL", "gpt2-xl"), ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"), ("qwen3-0.6b", "qwen3-0.6b-base"),
    ("openai-community/gpt2", "gpt2"), ("gpt2/", "gpt2"), ("gpt2_medium", "gpt2-medium"),
    ("smollm2-135", "smollm2-135m")])
def test_a_name_that_is_misspelled(world, refused, typed, meant):
    error = refused(checkpoint.load, typed, ["sft"], "cpu")
    assert f"{typed}: no such checkpoint" in error and "did you mean " in error
    assert meant in error.partition("did you mean ")[2].rstrip("?\n").split(" or ")
    assert "did you mean" not in refused(checkpoint.load, "out/sft/ckpt.pt", ["sft"], "cpu") and world.log == []


def test_a_cache_that_cannot_be_written_is_named(server, refused):
    server.cache.write_text("a file")
    assert str(server.cache) in (error := refused(hub.fetched, "gpt2")) and "MINIRLHF_CACHE" in error
