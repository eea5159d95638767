"""The label page in a real Chromium, kill -9 again and again, and the loop from choices to a policy, twice round."""
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import player
from browser import Browser, needs_browser
from conftest import ROOT, scratch
from minirlhf import chart, label, server
from minirlhf.choices import Choices, visible
from minirlhf.data import load_preferences
from player import Page, address
from test_label import HOSTILE, POLICY, lines, options, pair

pytestmark = pytest.mark.slow
CONTRASTS = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
const ground = e => { while (e) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0)
  return c; e = e.parentElement; } return [255, 255, 255]; };
const found = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own || !e.getClientRects().length || e.tagName === "SCRIPT") continue;
  const [high, low] = [luminance(rgb(getComputedStyle(e).color)), luminance(ground(e))].sort((a, b) => b - a);
  found.push([e.outerHTML.slice(0, 80), (high + .05) / (low + .05)]);
}
return found;"""


class Session:
    """A label page over pairs that are there already, in this process."""

    def __init__(self, path, pairs, **changes):
        self.choices, ready = Choices(str(path), []), label.queue.Queue()
        for one in pairs:
            ready.put(one)
        ahead = type("Ahead", (), {"ready": ready, "problem": ""})
        self.session = label.Session(self.choices, ahead, options(**changes))
        page = (ROOT / "minirlhf" / "label.html").read_text("utf-8").replace("LOOK", chart.look(chart.PAGE))
        self.server = server.Server(0, page, self.session.look, {
            "choose": self.session.choose, "undo": self.session.undo, "end": self.session.end})

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *error):
        self.server.__exit__()
        self.choices.close()


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


def shows(browser, n):
    browser.wait(f"return document.querySelector('#left').textContent === ' l{n}' && !busy")


def pairs(count):
    return [pair(k, f" l{k}", f" r{k}", f"prompt {k}") for k in range(count)]


@needs_browser
def test_keys_and_controls_choose(browser, tmp_path):
    """Each key once; a held key, a key with Ctrl or Alt, and keys that are switched off do nothing; each control does
    what its key does, by Tab and Enter alone; the figures on the page are those of the file."""
    with Session(tmp_path / "c.jsonl", pairs(12)) as s:
        browser.open(s.server.url)
        shows(browser, 0)
        for n, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "s"), 1):
            browser.press(key)
            shows(browser, n)
        assert [r["choice"] for r in lines(tmp_path / "c.jsonl")] == ["left", "right", "tie", "skip"]
        browser.press("u")
        shows(browser, 3)
        browser.press("U")
        shows(browser, 2)
        browser.press("Control+ArrowLeft", "Shift+Tab", "x", "Enter", "Escape")
        browser.run("for (const repeat of [true]) dispatchEvent(new KeyboardEvent('keydown', {key: 's', repeat}))")
        time.sleep(0.2)
        shows(browser, 2)
        browser.point("#keys", click=True)
        browser.press("s", "ArrowLeft")
        time.sleep(0.2)
        shows(browser, 2)
        browser.point("#keys", click=True)
        browser.run("document.activeElement.blur(); document.querySelector('#asked').focus()")
        browser.press("Tab", "Enter")  # left
        shows(browser, 3)
        assert browser.run("return document.activeElement.id") == "asked"  # where the next pair begins
        browser.press("Tab", "Tab", "Enter")
        shows(browser, 4)
        for at, n in ((3, 5), (4, 6)):
            browser.run("document.querySelector('#asked').focus()")
            browser.press(*["Tab"] * at, "Enter")
            shows(browser, n)
        records = lines(tmp_path / "c.jsonl")
        assert [r["choice"] for r in records] == ["left", "right", "left", "right", "tie", "skip"]
        text = browser.run("return document.querySelector('#figures').innerText").replace("\n", " ")
        assert "choices 5 (1 tied, 1 skipped)" in text
        median = sorted(r["seconds"] for r in records)
        assert f"pairs an hour {3600 / max(0.1, (median[2] + median[3]) / 2):,.0f}" in text
        browser.run("document.querySelector('#asked').focus()")
        browser.press("Tab", "Tab", "Tab", "Tab", "Tab", "Enter")  # undo
        shows(browser, 5)
        browser.press("q")
        browser.wait("return document.title === 'Ended'")
        assert s.session.ended.is_set() and browser.run("return document.querySelector('main').hidden")
        assert browser.console() == []


@needs_browser
def test_the_focus_can_be_seen_and_every_control_has_a_name(browser, tmp_path):
    with Session(tmp_path / "c.jsonl", pairs(3)) as s:
        browser.open(s.server.url)
        shows(browser, 0)
        seen = []
        for _ in range(7):
            browser.press("Tab")
            seen.append(browser.run(
                "const e = document.activeElement, c = getComputedStyle(e);"
                "return [e.innerText || e.labels[0].innerText, c.outlineStyle, parseFloat(c.outlineWidth)]"))
        assert len({name for name, *_ in seen}) == 7 and all(name.strip() for name, *_ in seen)
        assert all(style == "solid" and width >= 2 for _, style, width in seen)
        tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n["name"]["value"]) for n in tree if n.get("name", {}).get("value")}
        buttons = "\u2190 Left is better", "Right is better \u2192", "\u2193 Equally good", "S Skip", "U Undo", "Q End"
        assert {*(("button", name) for name in buttons), ("checkbox", "These keys choose"), ("region", "Prompt"),
                ("region", "Left answer"), ("region", "Right answer")} <= named


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, zoom", [(1440, 1), (800, 1), (390, 1), (1440, 2), (780, 2)])
def test_it_can_be_read_at_any_width(width, zoom, scheme, browser, tmp_path):
    """Nothing is wider than the window, also 10,000 letters without a blank; all text has a contrast of 4.5."""
    with Session(tmp_path / "c.jsonl", [pair(0, "x" * 10_000, " short", "p" * 300)], against="out/" + "y" * 300) as s:
        browser.resize(width, 900, zoom)
        browser.scheme(scheme)
        browser.open(s.server.url)
        browser.wait("return document.querySelector('#left').textContent.length === 10000")
        assert browser.overflow() <= 0
        found = browser.run(CONTRASTS)
        assert len(found) > 12 and [one for one in found if one[1] < 4.5] == []
    browser.resize(1440, 900)


@needs_browser
def test_hostile_text_is_text(browser, tmp_path):
    """In prompts, answers, and the names of files and policies: it makes no element, runs nothing, and the browser has
    nothing to complain of."""
    folder = tmp_path / "<img src=x onerror=alert(1)> \u202e"
    folder.mkdir()
    bad = "<script>document.title='bad'</script>"
    for part in (HOSTILE[:6], HOSTILE[6:]):  # fewer than are shown before one is shown again
        shown = [pair(k, text, f" r{k}", text, writers=(POLICY, bad)) for k, text in enumerate(part)]
        with Session(folder / "c.jsonl", shown, against=bad) as s:
            browser.open(s.server.url)
            for k, text in enumerate(part):
                browser.wait("return document.querySelector('#right').textContent === ' r%d' && !busy" % k)
                expected = s.session.look()["pair"]
                got = browser.run("return [document.querySelector('#prompt'), document.querySelector('#left')]"
                                  ".map(e => [e.textContent, e.children.length])")
                assert got == [[expected["prompt"], 0], [expected["texts"][0], 0]]
                assert browser.run("return document.title") == "Which answer is better?"
                browser.press("ArrowLeft")
            browser.wait("return document.querySelector('main').hidden")
            assert "<img src=x onerror=alert(1)> \\u202e" in browser.run(
                "return document.querySelector('#file').textContent")
            assert bad in browser.run("return document.querySelector('#figures').textContent")
            assert browser.run("return document.querySelectorAll('img, #figures script').length") == 0
            assert browser.console() == []
            browser.open("about:blank")  # or the page may ask a server that has ended
            browser.console()
        read = load_preferences(str(folder / "c.jsonl"))
        assert [p.completions[0] for p in read] == [text.replace("\ud800", "\ufffd") for text in part]
        os.remove(folder / "c.jsonl")


@needs_browser
def test_a_program_that_is_gone_is_told_and_one_that_is_slow_waited_for(browser, tmp_path):
    with Session(tmp_path / "c.jsonl", []) as s:
        browser.open(s.server.url)
        browser.wait("return document.querySelector('#news').textContent.includes('being written')")
        s.session.ahead.ready.put(pair(0, " l0", " r0"))
        shows(browser, 0)
        browser.press("ArrowLeft")
        browser.wait("return document.querySelector('#news').textContent.includes('Saved in line 1')")
        s.session.ahead.ready.put(pair(1, " l1", " r1"))
        shows(browser, 1)
    browser.press("ArrowLeft")
    browser.wait("return document.querySelector('#problem').textContent.includes('cannot be reached')")
    assert len(lines(tmp_path / "c.jsonl")) == 1


@needs_browser
def test_the_picture_of_the_page_in_the_readme(browser, tmp_path):
    """`LABEL_PICTURE=.figures/label.png pytest -m slow tests/test_label_page.py -k picture` draws it anew."""
    texts = [("The film is", " a warm and funny story, well told to its last scene.",
              " not as clever as it would like to be, and far too long."),
             ("I bought this", " for my father, who uses it every day.", " and it broke.")]
    made = [pair(k, *texts[k % 2][1:], texts[k % 2][0], writers=("out/sft", "out/ppo"))._replace(finished=[True, True])
            for k in range(20)]
    with Session(tmp_path / "preferences.train.jsonl", made, against="out/ppo", num_pairs=50) as s:
        browser.resize(760, 500)
        browser.scheme("light")
        for k in range(14):
            turn = s.session.look()["turn"]
            s.session.since -= (6.2, 5.4, 7.1)[k % 3]
            s.session.choose({"turn": turn, "choice": "right" if k % 3 else "left"})
        browser.open(s.server.url)
        browser.wait("return !document.querySelector('main').hidden")
        browser.run("document.querySelector('#file').textContent = 'data/mine/preferences.train.jsonl'")
        path = os.environ.get("LABEL_PICTURE", str(tmp_path / "label.png"))
        browser.screenshot(ROOT / path, whole=False)
        assert os.path.getsize(ROOT / path) < 60_000
    browser.resize(1440, 900)


def test_kill_9_at_random_moments_loses_at_most_one_choice(tiny, tmp_path):
    """Twelve times, while choices and undos go on as fast as they can; the file always holds what was acknowledged."""
    rng, path = random.Random(0), tmp_path / "c.jsonl"
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}{b}"}}\n' for a in "abc" for b in "defg"))
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-m", "minirlhf.label", tiny.sft, "--prompts", "prompts.jsonl", "--output", "c.jsonl",
             "--no_browser", "--temperature", "2"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        page = Page(next(filter(None, map(address, process.stdout))))
        page.look()
        told = len(lines(path)) if path.exists() else 0
        until = time.monotonic() + rng.uniform(0, 0.3)
        killer = subprocess.Popen(["sh", "-c", f"sleep {rng.uniform(0, 0.3)}; kill -9 {process.pid}"])
        try:
            while time.monotonic() < until + 10:
                if page.look()["pair"]:
                    undo = rng.random() < 0.2 and page.state["undo"]
                    page.press("undo" if undo else rng.choice(["left", "right", "tie"]))
                    told += -1 if undo else 1
        except (OSError, ValueError, http.client.HTTPException):
            pass
        killer.wait()
        assert process.wait() == -signal.SIGKILL
        kept = [line for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
        assert abs(len(kept) - told) <= 1 and all(map(json.loads, kept))


def test_the_loop_goes_twice_round_with_tiny_models(tiny, tmp_path):
    """Choices by a rule through the page, a reward model of all of them, a policy from the one before; each round's
    choices are between the newest policy's answers, and stand in one file."""
    shared = "--device cpu --dtype float32 --response_length 4 --batch_size 4".split()
    rm = [*scratch("rm"), *shared, "--val_share", "0.3", "--num_scale_samples", "8", "--num_train_epochs", "4"]
    ppo = [*scratch("ppo"), *shared, "--total_episodes", "64", "--micro_batch_size", "4", "--num_eval_prompts", "4",
           "--value_warmup", "0", "--learning_rate", "0.01"]
    found = player.loop(tmp_path, tiny.sft, tiny.folder / "data", player.shorter, 20, 2, 40, rm, ppo)
    assert len(found) == 2 and all(0 <= share <= 1 for share in found)
    records = lines(tmp_path / "preferences.train.jsonl")
    fresh = [r for r in records if "again" not in r]
    assert len(fresh) == 40 and {w for r in fresh[:20] for w in r["writers"]} == {tiny.sft}
    assert {w for r in fresh[20:] for w in r["writers"]} == {str(tmp_path / "ppo1")}
    assert all(len(visible(r["chosen"])) < len(visible(r["rejected"])) for r in fresh if "chosen" in r)
    config = json.loads((tmp_path / "ppo2" / "config.json").read_text())
    assert config["init_from"] == str(tmp_path / "ppo1") and config["reference"] == tiny.sft
