"""A person for tests of `python -m minirlhf.label`: presses the keys of its page by a rule, over HTTP as a browser does."""
import json
import re
import time
import urllib.error
import urllib.request

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Page:
    """The page at an address. `state` is what it was told last."""

    def __init__(self, url):
        self.url, self.state = url, None

    def ask(self, name="", content=None, **headers):
        """GET, or with content POST -> the answer's bytes. Raises urllib.error.HTTPError."""
        data = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
        headers = ({"Content-Type": "application/json"} if data is not None else {}) | {
            name.replace("_", "-"): value for name, value in headers.items()}
        with OPENER.open(urllib.request.Request(self.url + name, data, headers), timeout=60) as answer:
            return answer.read()

    def refusal(self, *arguments, **headers):
        """The status with which a request is refused."""
        try:
            self.ask(*arguments, **headers)
        except urllib.error.HTTPError as error:
            return error.code

    def look(self, seconds=60):
        """The state, as soon as there is something to be done."""
        until = time.monotonic() + seconds
        while (state := json.loads(self.ask("state")))["waits"]:
            assert time.monotonic() < until, "no pair"
            time.sleep(0.01)
        self.state = state
        return state

    def press(self, choice):
        """left, right, tie, skip, undo or end, of what was seen last."""
        name = choice if choice in ("undo", "end") else "choose"
        self.state = json.loads(self.ask(name, {"turn": self.state["turn"], "choice": choice}))
        return self.state


def address(line):
    """The page's address in what the command says, or None."""
    found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line)
    return found and found[0]


def play(page, rule, seen=None):
    """Chooses the answer to which rule(prompt, text) gives the larger number, until no pair is left; then ends."""
    while pair := page.look()["pair"]:
        left, right = (rule(pair["prompt"], text) for text in pair["texts"])
        if seen is not None:
            seen.append(pair)
        page.press("left" if left > right else "right" if right > left else "tie")
    page.press("end")
