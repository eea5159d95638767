"""The picture of a PPO run: every number in it is one of the run's files, it can be read anywhere, texts do nothing."""
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from browser import Browser, needs_browser
from conftest import ROOT
from minirlhf import picture
from minirlhf.chart import figure

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ('</text><script>alert(1)</script><image href="http://x/y"/> &amp; \x00\x1b[31m\u202e\ud800 ]]> <!-- "\' '
           + "W" * 90)


def summary(score, judge, kl):
    return {"prompts": 4, "score": [score, 0.25], "kl": [kl, 0.5], "win_rate": [0.9, 0.8, 0.95]} | (
        {"judge_score": [judge, 0.125]} if judge is not None else {})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_folder(tmp_path):
    """run_folder(judge=True, **changes of the first answer) -> the folder of a run of four steps, with looks after the
    second and the last."""
    def make(judge=True, steps=4, **answer):
        rows = [{"step": n, "episode": 8 * n, "objective/scores": n * n / 8 - 0.3, "objective/kl": 1.7 * n}
                for n in range(1, steps + 1)]
        rows[1]["eval"] = summary(0.5, 0.25 if judge else None, 3.5)
        rows[-1]["eval"] = summary(9.0, 9.0 if judge else None, 9.0)
        final = {"before": summary(0.0625, -0.5 if judge else None, 0.0), "after": summary(1.75, 1.5 if judge else None,
                                                                                         6.5)}
        answers = [{"step": steps, "final": True, "prompt": f"p{n}", "completion": f"after {n}", "score": score,
                    "sft_completion": f"before {n}", "sft_score": sft_score}
                   for n, (score, sft_score) in enumerate([(3.0, 0.0), (1.0, 0.5), (1.5, 0.0), (2.0, -2.0), (-3.0, 0.0),
                                                                 (-2.0, 0.0), (-1.0, 0.0), (6.0, 0.0), *[(100.0, 0.0)] * 3])]
        answers[1] |= answer  # its gain, 0.5, is the lower one in the middle of the first eight, not of the first four
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        write(folder / "metrics.jsonl", [*rows, {"step": steps, "final": final}])
        write(folder / "samples.jsonl", [{"step": 2, "prompt": "early", "completion": "x", "score": 1.0}, *answers])
        return folder
    return make


def drawn(folder):
    """-> the picture's text, its root, {curve: its elements}."""
    svg, _ = picture.draw(str(folder))
    root = ET.fromstring(svg)
    groups = {}
    for k in range(3):
        of = [e for e in root.iter(f"{SVG}path") if e.get("class", "").split()[-1:] in ([f"of{k}"], [f"at{k}"])]
        words = [e.text for e in root.iter(f"{SVG}text") if e.get("class") == f"at{k}"]
        if words:
            groups[k] = {"line": [e for e in of if e.get("class") == f"line of{k}"],
                         "bars": [e for e in of if e.get("class") == f"bar of{k}"],
                         "marks": [e for e in of if e.get("class") == f"at{k}"], "words": words}
    return svg, root, groups


def pairs(element):
    """The points of a path: what stands after M and each L."""
    return [tuple(map(float, point.split())) for point in re.split("[ML]", element.get("d").split("m")[0])[1:]]


def frame_of(k, panels):
    """Where the k-th of so many panels draws: left, top, right, bottom."""
    width = (720 - 2 * 20 - (panels - 1) * 14) / panels
    left = round(20 + k * (width + 14))
    return left + 46, 56 + 70, round(20 + k * (width + 14) + width), 56 + 232 - 30


def check(folder):
    """Each mark, bar and point of a line stands where the run's files say, on one straight scale a curve, and the words
    are those figures. -> the scales"""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps, final = [row for row in rows if "final" not in row], rows[-1]["final"]
    looks = {0: final["before"]} | {row["step"]: row["eval"] for row in steps if "eval" in row} | {
        steps[-1]["step"]: final["after"]}
    _, root, groups = drawn(folder)
    scales = []
    names = [name for name in ("score", "judge_score", "kl") if name in final["after"]]
    assert len(groups) == len(names)
    for group, name in zip(groups.values(), names):
        held_out = [(step, *figures[name]) for step, figures in looks.items()]
        own = {"score": "objective/scores", "kl": "objective/kl"}.get(name)
        line = [(row["step"], row[own]) for row in steps] if own else [(step, mean) for step, mean, _ in held_out]
        assert group["words"] == [f"{held_out[0][1]:.2f} → {held_out[-1][1]:.2f}"]
        assert [mark.find(f"{SVG}title").text for mark in group["marks"]] == [
            f"step {step}: {figure(mean)}" + (
                f" ({figure(mean - half)} to {figure(mean + half)})" if half is not None else "")
            for step, mean, half in held_out]
        there = [pairs(mark)[0] for mark in group["marks"]] + pairs(group["line"][0]) + [
            point for bar in group["bars"] for point in pairs(bar)]
        values = [(s, m) for s, m, _ in held_out] + line + [
            (s, m + side * half) for s, m, half in held_out if half is not None for side in (-1, 1)]
        assert len(there) == len(values)
        (x0, s0), (x1, s1) = ((there[i][0], values[i][0]) for i in (0, len(held_out) - 1))
        low, high = (pick(range(len(values)), key=lambda i: values[i][1]) for pick in (min, max))
        (y0, v0), (y1, v1) = ((there[i][1], values[i][1]) for i in (low, high))
        for (x, y), (step, value) in zip(there, values):
            assert abs(x0 + (step - s0) * (x1 - x0) / (s1 - s0) - x) < 0.2
            assert abs(y0 + (value - v0) * (y1 - y0) / (v1 - v0) - y) < 0.2
        scales.append((y1 - y0) / (v1 - v0))
        assert scales[-1] < 0  # up is more
        left, top, right, bottom = frame_of(len(scales) - 1, len(names))
        assert all(left <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1 for x, y in there)
        labels = [t for t in root.iter(f"{SVG}text") if left - 60 < float(t.get("x")) <= right and t.get("dy")]
        assert 2 <= len(labels) <= 6 and all(abs(y0 + (float(t.text) - v0) * scales[-1] - float(t.get("y"))) < 0.3
                                             for t in labels)
        ends = {t.text: float(t.get("x")) for t in root.iter(f"{SVG}text") if left <= float(t.get("x")) <= right
                and float(t.get("y")) == bottom + 24}
        assert ends == {"0": there[0][0], f"{steps[-1]['step']} steps": there[len(held_out) - 1][0]}
    return scales


@pytest.mark.parametrize("judge", [True, False])
def test_every_number_is_one_of_the_run(run_folder, judge):
    """Also that the last look is the closing report's, on all prompts; score and judge share a scale."""
    scales = check(run_folder(judge))
    assert len(scales) == 2 + judge and (not judge or abs(scales[0] / scales[1] - 1) < 0.01)


@pytest.mark.parametrize("kl", [0.004, 0.9, 1.9, 4.1, 8.0, 950.0])
def test_each_axis_has_two_labels_or_more(run_folder, kl):
    """Whatever it reaches, above and below 0."""
    folder = run_folder()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    for row, value in zip(rows, (-kl, kl, 0.0, 0.0)):
        row["objective/kl"] = value
    rows[1]["eval"]["kl"] = rows[-1]["final"]["before"]["kl"] = rows[-1]["final"]["after"]["kl"] = [0.0, kl / 4]
    write(folder / "metrics.jsonl", rows)
    check(folder)


def test_the_answers_are_those_of_median_gain(run_folder):
    """In both forms, of which CSS shows one; the closing report's, not an earlier look's, of the eight it prints."""
    folder = run_folder()
    _, root, _ = drawn(folder)
    forms = ["".join(g.itertext()) for g in root.iter(f"{SVG}g")]
    assert [re.sub(".*intervals", "", form) for form in forms] == [
        "prompt p1before +0.50 before 1after +1.00 after 1"] * 2
    assert [g.get("class") for g in root.iter(f"{SVG}g")] == ["wide", "narrow"]
    words = root.find(f"{SVG}desc").text
    assert words == ("On held-out prompts, score: 0.06 before, 1.75 after; judge's score: -0.50 before, 1.50 after; "
                     "KL, nats: 0.00 before, 6.50 after. Prompt: p1 Before: before 1 After: after 1")
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"
    assert root.find(f"{SVG}title").text == "PPO, 4 steps, 32 answers"


def test_a_text_does_nothing_but_show(run_folder):
    """Markup, controls, halves of characters, turns of direction; each line has at most a form's letters."""
    folder = run_folder(prompt=HOSTILE, completion=HOSTILE * 40, sft_completion="短い文。" * 60)
    svg, root, _ = drawn(folder)
    assert {element.tag for element in root.iter()} == {SVG + tag for tag in (
        "svg", "title", "desc", "style", "rect", "text", "tspan", "path", "g")}
    assert not re.search("[\x00-\x08\x1b\u202e]", svg) and "\\u202e" in svg
    for form, (_, _, most) in picture.FORMS.items():
        (group,) = [g for g in root.iter(f"{SVG}g") if g.get("class") == form]
        lines = ["".join(t.itertext()) for t in group.iter(f"{SVG}text") if t.get("class") == "said"]
        assert max(map(len, lines)) <= most and any(line.endswith("…") for line in lines)
        assert all(len(line) <= most // 2 for line in lines if "短" in line)
        heights = [int(t.get("y")) for t in group.iter(f"{SVG}text")]
        assert heights == sorted({*heights}) and heights[-1] < int(root.get("height"))


def test_the_file_needs_nothing_and_is_small(run_folder):
    """No script, no address but the name of SVG itself, no font to fetch; of 10,000 steps it draws 120."""
    svg, root, groups = drawn(run_folder(steps=10_000))
    assert re.findall(r"\w+://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"url\(|@import|@font-face|\bhref|\bon\w+=|<script|<image|<foreignObject", svg)
    assert len(svg.encode()) < 60_000
    assert len(pairs(groups[0]["line"][0])) <= 120 and pairs(groups[0]["line"][0])[-1][0] == max(
        x for x, _ in pairs(groups[0]["line"][0]))
    assert "prefers-color-scheme: dark" in svg and f"max-width: {picture.NARROW}px" in svg


# ---- the command

def test_the_command_writes_it_and_says_what_is_not_there(run_folder, tmp_path, capsys, refused):
    target = tmp_path / "run.svg"
    picture.main([str(run_folder()), "--output", str(target)])
    assert capsys.readouterr().out == f"written: {target}\n"
    before = target.read_text("utf-8")
    assert before == picture.draw(str(run_folder()))[0]
    picture.main([str(run_folder(judge=False)), "--output", str(target)])
    assert capsys.readouterr().out == (
        f"no judge looked on (train_ppo.py --judge), so there is no curve of its scores\nwritten: {target}\n")
    assert target.read_text("utf-8") == picture.draw(str(run_folder(judge=False)))[0] != before


def test_what_it_refuses(run_folder, tmp_path, refused):
    target = tmp_path / "run.svg"

    def no(*argv):
        error = refused(picture.main, [*map(str, argv)])
        assert not target.exists()
        return error
    folder = run_folder()
    assert "metrics.jsonl: no such file; name the folder of a run of train_ppo.py" in no(tmp_path, "--output", target)
    assert "is " in no(folder, "--output", folder / "metrics.jsonl")
    assert "there is no folder" in no(folder, "--output", tmp_path / "none" / "run.svg")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "holds no closing report of PPO" in no(folder, "--output", target)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + "{\n")
    assert "metrics.jsonl:3: not JSON" in no(folder, "--output", target)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + '{"step": 4, "final": {"before": 1, "after": []}}\n')
    assert "does not fit" in no(folder, "--output", target)


def test_a_real_run_becomes_a_picture(tiny, tmp_path):
    """Of train_ppo.py, with a judge that looks on."""
    ended = tiny.train("ppo", "--judge", tiny.rm, "--eval_interval", "1")
    assert ended.code == 0
    picture.main([str(ended.folder), "--output", str(tmp_path / "run.svg")])
    check(ended.folder)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_overlaps_or_is_cut(run_folder, tmp_path, width):
    """In Chromium, as a page on its own at both widths: each text that shows lies within the picture, and no two of
    them on each other; no letter is below 10 pixels."""
    folder = run_folder(prompt="The film, which", completion="it is a wonderful and truly moving piece of work. " * 5,
                        sft_completion="was made in the north. " * 9)
    (tmp_path / "run.svg").write_text(picture.draw(str(folder))[0], "utf-8")
    (tmp_path / "page.html").write_text("<!doctype html><body style='margin:16px'><div style='max-width:100%'>"
                                        f"{(tmp_path / 'run.svg').read_text('utf-8')}</div><style>svg {{ max-width: "
                                        "100%; height: auto }</style>", "utf-8")
    with Browser(width, 900) as browser:
        browser.open((tmp_path / "page.html").as_uri())
        boxes = browser.run("""
            const all = document.querySelector('svg').getBoundingClientRect();
            return [...document.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t]).filter(
                ([r]) => r.width).map(([r, t]) => [r.left - all.left, r.top - all.top, all.right - r.right,
                all.bottom - r.bottom, r.left, r.top, r.right, r.bottom, t.textContent,
                parseFloat(getComputedStyle(t).fontSize) * all.width / 720]);""")
    assert len(boxes) > 20
    for i, (left, top, right, bottom, *box, words, size) in enumerate(boxes):
        assert min(left, top, right, bottom) >= 0 and size >= 10, words
        for *_, x0, y0, x1, y1, other, _ in boxes[:i]:
            overlap = min(box[2], x1) - max(box[0], x0), min(box[3], y1) - max(box[1], y0)
            assert min(overlap) < 4, (words, other)


def test_the_picture_of_the_front_page_is_small_and_safe():
    """And is what this version of the command draws in form: its style is the same."""
    path = Path(ROOT, ".figures", "run.svg")
    if not path.exists():
        pytest.skip("there is none yet")
    svg = path.read_text("utf-8")
    assert len(svg.encode()) < 60_000 and picture.look(picture.STYLE) in svg.replace("&#x27;", "'")
    assert re.findall(r"\w+://[^\"]*", svg) == ["http://www.w3.org/2000/svg"] and "<script" not in svg
