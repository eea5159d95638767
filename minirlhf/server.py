"""A page for one person on this machine: HTTP on 127.0.0.1, behind a token that only the page's URL has.

Invariant: nothing changes but by a POST that has the token, names this server as its Host and, where a browser says
from which page it comes, this page; that is small, and came whole within SECONDS. Data go to the page as JSON alone,
and its scripts and styles are known to the browser by their hashes, so that no text of a model's can become one.

Left out: encryption and accounts, for nothing leaves the machine; connections that stay open.
"""
import base64
import hashlib
import hmac
import io
import json
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

SECONDS = 10  # that a request may take to come, and an answer to go
LARGEST = 4096  # bytes of a POST
CONNECTIONS = 512  # at a time; more are closed at once


class Server(ThreadingHTTPServer):
    """Serves a page, `look()` as JSON at "state" and, by POST, `actions[name](its JSON object)` at each name.

    All of them return what JSON takes; an action that raises ValueError is a bad request. page: HTML as text, whose
    <script> and <style> elements alone may act.
    """
    daemon_threads, request_queue_size = True, 128

    def __init__(self, port, page, look, actions):
        super().__init__(("127.0.0.1", port), Handler)
        self.look, self.actions, self.page = look, actions, page.encode()
        self.token, self.busy = secrets.token_urlsafe(24), set()  # busy: connections
        self.hosts = hosts_of(self.server_port)
        self.url = f"http://{self.hosts[0]}/{self.token}/"
        scripts, styles = (" ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)) for tag in ("script", "style"))
        self.policy = (f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src "
                       "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

    def server_bind(self):
        TCPServer.server_bind(self)  # without asking the network what the host is called
        self.server_name, self.server_port = self.server_address

    def process_request(self, request, client_address):
        if len(self.busy) >= CONNECTIONS:
            return self.shutdown_request(request)
        self.busy.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.busy.discard(request)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        """Ends when the answers that are under way have gone, or after a second."""
        self.shutdown()
        self.server_close()
        until = time.monotonic() + 1
        while time.monotonic() < until and self.busy:
            time.sleep(0.01)

    def handle_error(self, request, client_address):
        """A connection that broke is its client's matter."""


def hosts_of(port):
    """What a browser calls this server: it leaves out the port that is usual."""
    names = ["127.0.0.1", "localhost"]
    return [f"{name}:{port}" for name in names] + names * (port == 80)


class Timely(io.RawIOBase):
    """What a socket receives until a deadline, however slowly it comes."""

    def __init__(self, socket, deadline):
        self.socket, self.deadline = socket, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)
        return self.socket.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "minirlhf", ""
    error_content_type, error_message_format = "text/plain", "%(code)d %(message)s\n"

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Timely(self.connection, time.monotonic() + SECONDS))

    def log_message(self, *arguments):
        """No log: the terminal is the person's."""

    def end_headers(self):
        for name, value in (("Content-Security-Policy", self.server.policy), ("X-Content-Type-Options", "nosniff"),
                            ("Referrer-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"),
                            ("Cross-Origin-Opener-Policy", "same-origin"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        super().end_headers()

    def asked(self):
        """What the path names behind the token; None, having refused, where the request may not come in."""
        hosts, origins = self.server.hosts, self.headers.get_all("Origin", [])
        behind = f"/{self.server.token}/"
        if len(self.headers.get_all("Host", [])) != 1 or self.headers["Host"] not in hosts or any(
                origin not in [f"http://{host}" for host in hosts] for origin in origins):
            return self.send_error(403)
        if not hmac.compare_digest(self.path[:len(behind)].encode("latin-1"), behind.encode()):
            return self.send_error(404)
        return self.path[len(behind):]

    def do_GET(self):
        name = self.asked()
        if name == "":
            self.give(self.server.page, "text/html; charset=utf-8")
        elif name == "state":
            self.give_json(self.server.look)
        elif name in self.server.actions:
            self.send_error(405)
        elif name is not None:
            self.send_error(404)

    def do_POST(self):
        name = self.asked()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        if name not in self.server.actions:
            self.send_error(404)
        elif self.headers.get_content_type() != "application/json":  # which no form of another page can send
            self.send_error(415)
        elif "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,20}", length):
            self.send_error(411)
        elif int(length) > LARGEST:
            self.send_error(413)
        else:
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                self.give_json(lambda: self.server.actions[name](read_object(body)))

    def give_json(self, make):
        try:
            content = json.dumps(make()).encode()
        except ValueError:
            return self.send_error(400)
        self.give(content, "application/json")

    def give(self, content, kind):
        self.connection.settimeout(SECONDS)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def read_object(body):
    try:
        value = json.loads(body)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
