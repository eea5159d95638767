"""A real Chromium for tests of pages, over WebDriver (W3C) by the standard library alone: needs Debian's packages
chromium and chromium-driver, or their like.

    with Browser() as browser:
        browser.open("file:///tmp/report.html")
        browser.press("Tab", "Enter")
        assert browser.run("return document.activeElement.id") == "next" and not browser.console()
"""
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--force-color-profile=srgb")
KEYS = {name: chr(0xE000 + code) for code, name in enumerate((
    "Backspace Tab 5 Return Enter Shift Control Alt Pause Escape Space PageUp PageDown End Home ArrowLeft ArrowUp "
    "ArrowRight ArrowDown").split(), 3)}


class Browser:
    """One window, as a context; at its end browser and driver are gone."""

    def __init__(self, width=1440, height=900):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        log = Path(self.folder.name, "log")
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=log.open("w"), stderr=subprocess.STDOUT,
                                       start_new_session=True)  # a group of its own, which ends as one
        try:
            while not (found := re.search(r"successfully on port (\d+)", log.read_text())):
                assert self.driver.poll() is None, f"chromedriver does not start: {log.read_text()[-500:]}"
                time.sleep(0.05)
            self.url = f"http://127.0.0.1:{found[1]}/session"
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={self.folder.name}/profile"]}
            self.url += "/" + self.call("", capabilities={"alwaysMatch": {
                "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]
            self.resize(width, height)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        self.folder.cleanup()

    def call(self, path, **what):
        """POST to the driver -> the answer's value; raises AssertionError with the driver's words."""
        request = urllib.request.Request(self.url + path, json.dumps(what).encode(),
                                         {"Content-Type": "application/json; charset=utf-8"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def devtools(self, method, **parameters):
        """A command of the Chrome DevTools protocol."""
        return self.call("/goog/cdp/execute", cmd=method, params=parameters)

    def open(self, url):
        self.call("/url", url=url)

    def run(self, script, *arguments):
        """The value of a JavaScript function's body, as "return document.title"."""
        return self.call("/execute/sync", script=script, args=arguments)

    def wait(self, script, seconds=20):
        """`run` until it is true -> its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"not true within {seconds} seconds: {script}"
            time.sleep(0.05)
        return value

    def press(self, *keys):
        """Keys one after another, by name, as "ArrowLeft", or as characters; "Shift+Tab" holds the first."""
        for key in keys:
            parts = [KEYS.get(k, k) for k in (key.split("+") if len(key) > 1 else [key])]
            actions = [{"type": "keyDown", "value": k} for k in parts]
            actions += [{"type": "keyUp", "value": k} for k in parts[::-1]]
            self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def point(self, selector, click=False, dx=0, dy=0):
        """The mouse to the middle of an element, or dx, dy pixels from there; perhaps a click."""
        x, y = self.run("const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
                        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]", selector)
        actions = [{"type": "pointerMove", "x": round(x + dx), "y": round(y + dy)}]
        actions += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")] * click
        self.call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def resize(self, width, height, zoom=1.0):
        """The page's size in CSS pixels of a window of that many pixels, at a zoom of 1 or, as 2.0, of 200 %."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=round(width / zoom), height=round(height / zoom),
                      deviceScaleFactor=zoom, mobile=False)

    def scheme(self, name, media=""):
        """What the person prefers: "light" or "dark"; media "print" for a page as it is printed."""
        self.devtools("Emulation.setEmulatedMedia", media=media,
                      features=[{"name": "prefers-color-scheme", "value": name}])

    def console(self):
        """What has been logged as an error or a warning since the last call."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")
                if entry["level"] in ("SEVERE", "WARNING")]

    def overflow(self):
        """CSS pixels by which the page is wider than the window."""
        return self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def screenshot(self, path, whole=True):
        """The page, or what of it can be seen, as a PNG file."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))
