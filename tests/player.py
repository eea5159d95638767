"""A person for tests of `python -m minirlhf.label`: presses the keys of its page by a rule, over HTTP like a browser.

`python tests/player.py RULE SFT DATA FOLDER CHOICES ROUNDS` goes round the loop from choices to a policy, and says how
far the policy follows the rule.
"""
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


# ---- the loop: choices -> reward model -> policy -> choices

def shorter(prompts, completions):
    """A person who likes the shorter answer better."""
    return [-len(text) for text in completions]


def letters(prompts, completions):
    """A person who likes the letter e: a rule that says nothing of what a text means."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def run(*words):
    """A command of the project -> what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def label(policy, prompts, output, rule, count):
    """The command, its page, and somebody who goes by a rule, until the file has so many choices."""
    words = [policy, "--prompts", prompts, "--output", output, "--num_pairs", str(count), "--no_browser"]
    process = subprocess.Popen([sys.executable, "-m", "minirlhf.label", *words], stdout=subprocess.PIPE, text=True,
                               cwd=ROOT)
    url = next(filter(None, map(address, process.stdout)))
    play(Page(url), lambda prompt, text: rule([prompt], [text])[0])
    said = process.stdout.read()
    assert process.wait() == 0
    return said


def loop(folder, sft, data, rule, count, rounds, held_out=256, rm=(), ppo=()):
    """Rounds of `count` choices each -> after each round, in how many of the held-out comparisons the rule prefers the
    policy's answer to the SFT model's. rm, ppo: more options of train_rm.py and train_ppo.py.

    Each reward model learns from all choices so far, each policy starts from the one before, each is kept close to the
    SFT model, and the next choices are between the newest policy's answers.
    """
    folder, policy, found = Path(folder).resolve(), sft, []
    choices = folder / "preferences.train.jsonl"
    for n in range(1, rounds + 1):
        print(label(policy, f"{data}/prompts.train.jsonl", choices, rule, count * n).split("\nnext")[0], flush=True)
        run("train_rm.py", *rm, "--data_dir", folder, "--init_from", folder / f"rm{n - 1}" if n > 1 else sft,
            "--out_dir", folder / f"rm{n}")
        run("train_ppo.py", *ppo, "--data_dir", data, "--init_from", policy, "--reference", sft, "--reward_model",
            folder / f"rm{n}", "--out_dir", folder / f"ppo{n}")
        policy = folder / f"ppo{n}"
        told = run("-m", "minirlhf.label", sft, "--against", policy, "--prompts", f"{data}/prompts.val.jsonl",
                   "--output", folder / f"held_out{n}.jsonl", "--num_pairs", held_out, "--judge",
                   f"{__file__}:{rule.__name__}")
        share = re.search(r"preferred to .*: (([\d.]+)% \(.*\) of \d+)", told)
        print(f"{count * n} choices: the rule prefers the policy's answer in {share[1]}", flush=True)
        found.append(float(share[2]) / 100)
    return found


def main():
    """`python tests/player.py shorter|letters SFT DATA FOLDER CHOICES ROUNDS`, of an SFT model made by @scratch."""
    rule, sft, data, folder, count, rounds = sys.argv[1:]
    loop(folder, os.path.abspath(sft), os.path.abspath(data), globals()[rule], int(count), int(rounds),
         rm="@scratch --val_share 0.2 --num_train_epochs 8 --batch_size 8 --num_scale_samples 256".split(),
         ppo="@scratch --total_episodes 768 --batch_size 64 --value_warmup 2 --num_eval_prompts 16".split())


if __name__ == "__main__":
    main()
