"""Models by name: the folders that Hugging Face publishes, fetched once into the cache of fetched models.

Of each file the server is asked first: how large it is, what identifies it, of which commit it is. Then comes what is
not there yet. Invariant: a file has its own name only when it is whole and what was published; until then it is a part,
whose name tells which file it is a part of, so that it never goes on as another one. All files are of one commit.

Left out: other repositories (a folder will do), access tokens, shards. None of these models needs them.
"""
import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from minirlhf import fetch
from minirlhf.config import fail, fitting, say
from minirlhf.runtime import clock

HUB = "https://huggingface.co"
MODELS = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
          "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
          "distilgpt2": "distilbert/distilgpt2", "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
          "smollm2-360m": "HuggingFaceTB/SmolLM2-360M", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
          "qwen3-0.6b-base": "Qwen/Qwen3-0.6B-Base"}
NAMES = ("smollm2", *MODELS)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")  # fetched in this order
OPTIONAL = "tokenizer_config.json"  # a model works without, where config.json names what ends a text
RECORD = "fetched.json"  # which commit the files are of, and their SHA-256

CONNECT, SILENCE = 2.5, 20  # seconds that a connection, and the next piece of an answer, may take
TRIES, LONGEST_WAIT = 5, 300  # in a row that bring less than a megabyte; seconds that a server may ask to wait
PIECE = 1 << 20
BUSY = (408, 425, 429, 500, 502, 503, 504)
REDIRECTS = 8


class Again(Exception):
    """What may go better after `wait` seconds, or soon."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """What will not go better."""


def fetched(name):
    """The path of the model of that name: from the cache, or fetched into it. Exits 2 where it is neither there nor to
    be had."""
    if name == "smollm2":
        return fetch.smollm2()
    folder = fetch.cache_folder() / name
    with fetch.kept(name, folder):
        record = read_record(folder)
        if missing(folder, record):
            with fetch.alone(folder, name):
                download(name, folder)
        else:
            for file, sha256 in record["sha256"].items():
                fetch.check(folder / file, sha256)
    return str(folder)


def missing(folder, record):
    """The files that are not there, of those that a model needs or had."""
    return [file for file in FILES if (file != OPTIONAL or file in record["sha256"]) and not (folder / file).is_file()]


def read_record(folder):
    """{"revision", "sha256": {file: of what was fetched}}. What was put there by hand is in no record."""
    record = {"revision": "main", "sha256": {}}
    if (folder / RECORD).is_file():
        with fitting(folder / RECORD):
            record |= json.loads((folder / RECORD).read_text("utf-8"))
            record["sha256"] = {file: record["sha256"][file] for file in FILES if file in record["sha256"]}
    return record


def download(name, folder):
    """All files that are not there yet. Exits 2 where one cannot be had, naming what to put where by hand."""
    record = read_record(folder)
    if not missing(folder, record):
        return  # another process has fetched them
    server, began, checks = Server(), time.monotonic(), {}
    say(f"fetching {name} ({MODELS[name]} at {server.address}) into {folder}")
    try:
        for file in FILES:
            if not (folder / file).is_file():
                checks[file] = patiently(partial(take, server, name, file, folder, record), file, server)
    except Refused as refused:
        kept = "; what has come so far is kept, and the same command goes on from there"
        absent = ", ".join(file for file in FILES if not (folder / file).is_file())
        fail(f"could not fetch {name}: {refused}{kept * any(folder.glob('*.part'))}; by hand: put {absent} of "
             f"{server.address}/{MODELS[name]}/resolve/{record['revision']}/ into {folder}; HF_ENDPOINT names a mirror"
             f", MINIRLHF_CACHE another place than {fetch.cache_folder()}")
    size = sum((folder / file).stat().st_size for file, how in checks.items() if how)
    by = {how: [file for file in checks if checks[file] == how] for how in checks.values() if how}
    say(f"fetched {name}, revision {record['revision']}: {size / 1e6:.1f} MB in {clock(time.monotonic() - began)}; "
        "checked by " + "; by ".join(f"{how}: {', '.join(files)}" for how, files in by.items()))


def patiently(attempt, file, server):
    """attempt()'s result, which may end in `Again` before: Refused after TRIES in a row that got less than a megabyte
    further."""
    tries, furthest = 0, 0
    while True:
        server.have = 0
        try:
            return attempt()
        except Refused as refused:
            raise Refused(f"{file}: {refused}")
        except Again as again:
            tries = 1 if server.have >= furthest + PIECE else tries + 1
            furthest = max(furthest, server.have)
            wait = 2 ** (tries - 1) if again.wait is None else again.wait
            if tries == TRIES:
                raise Refused(f"{file}: {again}; {TRIES} times in a row")
            if wait > LONGEST_WAIT:
                raise Refused(f"{file}: {again}; it asks to wait {wait:,.0f} seconds")
            say(f"{file}: {again}; again in {wait:.0f} s")
            time.sleep(wait)


# ---- a file

class Published(NamedTuple):
    """What is told of a file. digest: its SHA-256 or git's SHA-1, or "" where neither is published."""
    size: int
    etag: str
    digest: str
    commit: str


def take(server, name, file, folder, record):
    """Fetch a file, or the rest of it -> by what it was checked; None for an optional one that is not published."""
    url = f"{server.address}/{MODELS[name]}/resolve/{record['revision']}/{file}"
    published = server.look(url)
    if published is None:
        if file == OPTIONAL:
            return None
        raise Refused(f"{server.address} has no {file} of {MODELS[name]} at revision {record['revision']} (HTTP 404)"
                      + f"; to begin anew, remove {folder}" * bool(record["sha256"]))
    part = folder / f"{file}.{hashlib.sha256(published.etag.encode()).hexdigest()[:16]}.part"
    for other in folder.glob(f"{file}.*.part"):
        if other != part or not published.etag or other.stat().st_size > published.size:
            other.unlink()  # of what has changed since
    begun = part.stat().st_size if part.exists() else 0
    if begun < published.size:
        server.fill(part, begun, url, file, published)
    how, sha = {64: ("SHA-256", hashlib.sha256()), 0: ("size", None), 40: (
        "git's SHA-1", hashlib.sha1(b"blob %d\0" % published.size, usedforsecurity=False))}[len(published.digest)]
    digest = fetch.digest_of(part, sha) if sha else ""
    problem = (f"its {how} is {digest}, {published.digest} was published" if digest != published.digest else
               "" if looks_right(part, file) else "it holds something else, as a page of the network's own")
    if problem:
        part.unlink()
        raise (Again if begun else Refused)(problem)
    record["revision"] = published.commit or record["revision"]
    record["sha256"][file] = digest if how == "SHA-256" else fetch.sha256_of(part)
    (folder / f"{RECORD}.tmp").write_text(json.dumps({"repository": MODELS[name], **record}, indent=1) + "\n", "utf-8")
    os.replace(folder / f"{RECORD}.tmp", folder / RECORD)
    os.replace(part, folder / file)
    return how


def looks_right(path, file):
    """Whether a file can be what its name says: a JSON object, or 8 bytes and then one, as safetensors begin."""
    with open(path, "rb") as f:
        if not file.endswith(".json"):
            return f.read(9)[8:] == b"{"
        try:
            return isinstance(json.loads(f.read().decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False


# ---- a server

class InTime:
    """A connection that stands, or is given up, after CONNECT seconds. The system may take longer to find that it
    cannot look up a name, and does so in a thread of its own."""

    def connect(self):
        outcome = []

        def connect():
            try:
                outcome.append(super(InTime, self).connect())
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(CONNECT)
        if not outcome:
            raise TimeoutError(f"no connection within {CONNECT} seconds")
        if outcome[0]:
            raise outcome[0]


class HTTP(InTime, http.client.HTTPConnection):
    pass


class HTTPS(InTime, http.client.HTTPSConnection):
    pass


class OneStep(urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler):
    """Requests over these connections. Redirects are left to `Server.ask`, which reads what they tell."""

    def http_open(self, request):
        return self.do_open(HTTP, request)

    def https_open(self, request):
        return self.do_open(HTTPS, request)

    def http_error_302(self, *_):
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Server:
    """The hub, or the mirror that HF_ENDPOINT names. have: bytes of the file that is being fetched."""

    def __init__(self):
        self.address, self.answered, self.have = endpoint(), False, 0
        self.own = {host(address) for address in (self.address, HUB)}  # a mirror may lead to the hub
        self.opener = urllib.request.build_opener(OneStep)
        self.opener.addheaders = [("User-Agent", "minirlhf")]

    @contextlib.contextmanager
    def network(self, url):
        """A failure within is final before the first answer of all, for then there is no network."""
        try:
            yield
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise (Again if self.answered else Refused)(f"{host(url)}: {reason}") from None

    def ask(self, method, url, headers={}, at_home=False):
        """-> the answer, after redirects, where the last one leads ("" without one), and the headers that tell of the
        file. at_home: a redirect away from the hub is the answer."""
        told = {}
        for _ in range(REDIRECTS):
            with self.network(url):
                try:
                    answer = self.opener.open(urllib.request.Request(url, headers=headers, method=method),
                                              timeout=SILENCE)
                except urllib.error.HTTPError as error:
                    answer = error
            self.answered = True
            location = answer.headers.get("Location", "") if 300 <= answer.code < 400 else ""
            if host(url) in self.own:  # what others call an ETag says nothing
                for name in ("X-Repo-Commit", "X-Linked-Size", "X-Linked-ETag", *["ETag"] * (not location)):
                    if value := answer.headers.get(name):
                        told.setdefault(name, value.removeprefix("W/").strip('"'))
            following = redirected(url, location) if location else ""
            if not following or at_home and host(following) not in self.own:
                return answer, following, told
            answer.close()
            url = following
        raise Refused(f"{host(url)}: redirects without end")

    def look(self, url):
        """What is published of a file, or None where there is no such file."""
        answer, elsewhere, told = self.ask("HEAD", url, at_home=True)
        with answer:
            if answer.code == 404:
                return None
            if not elsewhere:
                check_answer(answer, 200)
            size = told.get("X-Linked-Size") or ("" if elsewhere else answer.headers.get("Content-Length", ""))
        if not re.fullmatch("[1-9][0-9]{0,14}", size):
            raise Refused(f"{host(answer.url)}: does not say how large it is" + (
                f", and redirects to {host(elsewhere)}" * bool(elsewhere)))
        commit = told.get("X-Repo-Commit", "")
        commit = commit if re.fullmatch("[0-9a-f]{40}", commit) else ""
        digest = told.get("X-Linked-ETag") or told.get("ETag", "") * bool(commit)  # elsewhere it may be anything
        digest = digest if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) else ""
        return Published(int(size), etag_of(told), digest, commit)

    def fill(self, part, begun, url, file, published):
        """Write what a part lacks; `begun` is its size."""
        size = published.size
        if (free := shutil.disk_usage(part.parent).free) < size - begun:
            fail(f"{part.parent}: {file} takes {(size - begun) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; make "
                 "room, or name another folder in MINIRLHF_CACHE")
        answer, _, told = self.ask("GET", url, {"Range": f"bytes={begun}-"} if begun else {})
        with answer:
            if begun and answer.code in (206, 416) and answer.headers.get("Content-Range") != (
                    f"bytes {begun}-{size - 1}/{size}"):
                part.unlink()
                raise Again(f"does not go on at byte {begun:,}")
            check_answer(answer, 200, 206 if begun else 200)
            begun = begun if answer.code == 206 else 0
            if etag_of(told) not in ("", published.etag):
                raise Again("has just changed")
            if (length := answer.headers.get("Content-Length", str(size - begun))) != str(size - begun):
                raise Again(f"{length} bytes are sent, {size - begun} were announced")
            if begun:
                say(f"{file} goes on at {begun / 1e6:.1f} of {size / 1e6:.1f} MB")
            self.have, tell = begun, progress(file, begun, size)
            try:
                with open(part, "ab" if begun else "wb") as f:
                    block = b"any"
                    while block and self.have <= size:
                        with self.network(answer.url):
                            block = answer.read1(PIECE)
                        f.write(block)
                        f.flush()  # what has come is kept whenever the process dies
                        self.have += len(block)
                        tell(self.have)
                    os.fsync(f.fileno())
            except OSError as error:
                fail(f"{part}: could not be written ({error.strerror}) at {self.have:,} of {size:,} bytes; what is "
                     "there is kept; make room, or name another folder in MINIRLHF_CACHE")
        if self.have < size:
            raise Again(f"was cut at {self.have:,} of {size:,} bytes")
        if self.have > size:
            part.unlink()
            raise Again(f"more than the {size:,} bytes are sent that were announced")


def host(url):
    return urlsplit(url).netloc


def etag_of(told):
    return told.get("X-Linked-ETag") or told.get("ETag", "")


def check_answer(answer, *expected):
    """Raises Again or Refused where an answer brings no file. expected: the codes of one that does."""
    what = f"{host(answer.url)}: HTTP {answer.code} {http.client.responses.get(answer.code, '')}".rstrip()
    if answer.code in BUSY:
        raise Again(what, asked_to_wait(answer))
    if answer.code not in expected:
        raise Refused(what)
    if answer.headers.get_content_type() == "text/html":
        raise Refused(f"{host(answer.url)}: sends a page of HTML, as networks do where one has to sign in")


def endpoint():
    """Where the hub is asked for: HF_ENDPOINT, or its own address."""
    address = os.environ.get("HF_ENDPOINT") or HUB
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment:
            return address.rstrip("/")
    fail(f"HF_ENDPOINT {address}: expected the address of a mirror, as {HUB} is the hub's own")


def redirected(url, location):
    """The address that a redirect leads to. Refused where it is no such address, or less safe than the one before."""
    with contextlib.suppress(ValueError):
        following = urljoin(url, location)
        if urlsplit(following).scheme == "https" or urlsplit(following).scheme == urlsplit(url).scheme:
            return following
    raise Refused(f"{host(url)}: redirects to {location[:100]}, where no model is fetched from")


def asked_to_wait(answer):
    """Seconds that a server that is busy asks for: by Retry-After, a number or a date, or by the rest of its limit's
    window; None where it does not."""
    after = answer.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", after):
        return int(after)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    window = re.search(r"\bt=([0-9]{1,9})", answer.headers.get("RateLimit", "")) if answer.code == 429 else None
    return int(window[1]) if window else None


def progress(file, begun, size):
    """-> a function that is told how many bytes there are, and says so once 3 seconds have gone, then at twice the
    time of the last line, at the latest after 30."""
    began = time.monotonic()
    pause, due = fetch.FIRST_WORD, began + fetch.FIRST_WORD

    def tell(have):
        nonlocal pause, due
        if (now := time.monotonic()) > due:
            rate = max(1, have - begun) / (now - began)
            say(f"{file}: {have / 1e6:.1f} of {size / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, "
                f"{clock((size - have) / rate)} left")
            pause = min(2 * pause, 30)
            due = now + pause
    return tell
