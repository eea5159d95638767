"""A PPO run in one picture, which a README can open with: `python -m minirlhf.picture out/ppo --output run.svg`.

Score, judge and KL over the steps, and an answer before and after: that of the prompt whose score rose by the median of
those that train_ppo.py prints at its end, so that nobody has picked it. Invariant: each number drawn is one of
metrics.jsonl or samples.jsonl; where the run had no judge, there is no such curve.

The file holds no script, no font and no address, is light or dark as the page around it, and on a narrow screen has
larger letters and shorter lines: both forms of the answers are in it, and CSS shows one. Left out: what
`python -m minirlhf.report` has, all else.
"""
import os
import textwrap
import unicodedata

from minirlhf import evaluate, runtime
from minirlhf.chart import HIDDEN, Point, figure, is_number, look, shortened, span, text, thinned, ticks
from minirlhf.config import Parser, check_spelling, fail, fitting, launch, say, unprinted
from minirlhf.data import read_records

CURVES = (("score", "score", "objective/scores"), ("judge_score", "judge's score", ""),
          ("kl", "KL, nats", "objective/kl"))  # a summary's name, what it is called here, a step's name
WIDTH, EDGE, GAP, TOP, PANEL = 720, 20, 14, 56, 232  # the picture's, its margin, between panels, where they begin, high
LONGEST = 170  # characters of a text
FORMS = {"wide": (19, 30, 66), "narrow": (23, 29, 53)}  # of texts: size of letters, from line to line, letters a line
NOTES = {"wide": "line: training answers; dots: answers to held-out prompts, 95 % intervals",
         "narrow": "line: training; dots: held out, 95 % intervals"}
NARROW = 540  # CSS pixels below which the second form shows
STYLE = f"""
svg {{ font: 15px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }}
text {{ fill: var(--faint); }}
.paper {{ fill: var(--paper); stroke: var(--rule); }} .panel {{ fill: var(--panel); }}
.title {{ fill: var(--ink); font-size: 20px; font-weight: 600; }} .name {{ fill: var(--ink); font-weight: 600; }}
.grid {{ stroke: var(--rule); }} .line, .bar {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
.wide .said {{ font-size: {FORMS["wide"][0]}px; }} .narrow .said {{ font-size: {FORMS["narrow"][0]}px; }}
.narrow {{ display: none; }} .said {{ fill: var(--ink); }} .before {{ fill: var(--faint); font-weight: 600; }}
.after {{ fill: var(--line0); font-weight: 600; }}
""" + "".join(f".of{k} {{ stroke: var(--line{k}); }} .at{k} {{ fill: var(--line{k}); }}\n" for k in range(3)) + f"""
@media (max-width: {NARROW}px) {{ svg {{ font-size: 21px; }} .title {{ font-size: 26px; }} .wide {{ display: none; }}
  .narrow {{ display: inline; }} }}
"""


# ---- what the run's files hold

def read(folder):
    """-> a run's options, its rows of metrics, the figures before and after, the answers before and after.

    Exits 2 where the folder holds no PPO run, or one without a closing report.
    """
    held = {name: os.path.join(folder, name) for name in ("metrics.jsonl", "samples.jsonl")}
    for path in held.values():
        if not os.path.isfile(path):
            fail(f"{path}: no such file; name the folder of a run of train_ppo.py")
    (metrics, samples) = ([record for _, record in read_records(path)] for path in held.values())
    final = next((row["final"] for row in metrics if isinstance(row.get("final"), dict)), {})
    answers = [row for row in samples if "sft_completion" in row]
    steps = [row for row in metrics if "final" not in row and is_number(row.get("objective/scores"))]
    if not {"before", "after"} <= final.keys() or not answers or not steps:
        fail(f"{folder}: holds no closing report of PPO: wait for the end of the run, or go on with --resume")
    return steps, final, answers


def curves(steps, final):
    """-> {what: ([Point of each step's training answers], [Point of held-out answers, with their interval])} of those
    that the run has. The first and the last look are those of the closing report."""
    found, end = {}, steps[-1]["step"]
    for name, title, own in CURVES:
        looks = [(0, final["before"]), *((row["step"], row["eval"]) for row in steps if "eval" in row and
                                         row["step"] < end), (end, final["after"])]
        held_out = [Point(step, mean, *((mean - half, mean + half) if is_number(half) else ()))
                    for step, figures in looks if name in figures
                    for mean, half in [figures[name]] if is_number(mean)]  # of one prompt there is no interval
        if held_out:
            found[title] = [Point(row["step"], row[own]) for row in steps if is_number(row.get(own))], held_out
    return found


def of_median_gain(answers):
    """The one whose score rose by the median; of an even number the lower of the two in the middle."""
    gains = sorted((row["score"] - row["sft_score"], n) for n, row in enumerate(answers)
                   if is_number(row["score"]) and is_number(row["sft_score"]))
    return answers[gains[(len(gains) - 1) // 2][1]] if gains else answers[0]


# ---- the picture

def panel(k, title, own, held_out, y_range, left, right):
    """A curve: a line of training answers, a mark and a bar for each look at held-out prompts."""
    top, bottom = TOP + 70, TOP + PANEL - 30
    line = thinned(own or held_out, 120)
    x1, (y0, y1) = held_out[-1].x, y_range
    inner = left + 46

    def at(x, y):
        return (f"{inner + x / x1 * (right - inner):.1f} "
                f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}")

    yield (f'<text class="name" x="{left}" y="{TOP + 18}">{text(title)}</text><text class="at{k}" x="{left}" '
           f'y="{TOP + 46}">{held_out[0].y:.2f} → {held_out[-1].y:.2f}</text>')
    for y, label in ticks(y0, y1):
        yield (f'<path class="grid" d="M{at(0, y)}H{right}"/><text x="{inner - 7}" y="{at(0, y).split()[1]}" '
               f'dy=".35em" text-anchor="end">{label}</text>')
    yield (f'<text x="{inner}" y="{bottom + 24}">0</text><text x="{right}" y="{bottom + 24}" text-anchor="end">{x1} '
           "steps</text>")
    yield f'<path class="line of{k}" d="M{"L".join(at(p.x, p.y) for p in line)}"/>'
    for p in held_out:
        interval = ""
        if p.low is not None:
            interval = f" ({figure(p.low)} to {figure(p.high)})"
            yield f'<path class="bar of{k}" d="M{at(p.x, p.low)}L{at(p.x, p.high)}"/>'
        yield (f'<path class="at{k}" d="M{at(p.x, p.y)}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"><title>step {p.x}: '
               f'{figure(p.y)}{interval}</title></path>')


def answer_lines(row, form, top):
    """A prompt and its answers before and after, as lines of a form -> SVG, where they end."""
    size, height, most = FORMS[form]
    out, y = [f'<text x="{EDGE}" y="{top - 22}">{NOTES[form]}</text>'], top
    for kind, start, said in (("name", "prompt", row["prompt"]),
                              ("before", f"before {row['sft_score']:+.2f}", row["sft_completion"]),
                              ("after", f"after {row['score']:+.2f}", row["completion"])):
        words = shortened(visible(" ".join(str(said).split())), LONGEST)
        wide = any(unicodedata.east_asian_width(c) in "WF" for c in words)  # takes the room of two letters
        for n, line in enumerate(textwrap.wrap(f"{'_' * len(start)} {words}", most // 2 if wide else most)):
            y += height
            line = f'<tspan class="{kind}">{text(start)}</tspan>{text(line[len(start):])}' if n == 0 else text(line)
            out.append(f'<text class="said" x="{EDGE + 14}" y="{y}">{line}</text>')
        y += height // 3
    return f'<g class="{form}">{"".join(out)}</g>', y


def visible(value):
    """What would be invisible or turn the direction of its neighbours, as Python writes it: before lines are cut."""
    return HIDDEN.sub(lambda c: c[0].encode("unicode_escape").decode(), value)


def described(steps, found, row):
    """The same in words, for who does not see it."""
    said = [f"{title}: {points[0].y:.2f} before, {points[-1].y:.2f} after" for title, (_, points) in found.items()]
    return (f"On held-out prompts, {'; '.join(said)}. Prompt: {row['prompt']} Before: {row['sft_completion']} After: "
            f"{row['completion']}")


def draw(folder):
    """-> the picture as SVG, and which curves it has."""
    steps, final, answers = read(folder)
    found, row = curves(steps, final), of_median_gain(answers[:2 * evaluate.SHOWN])
    width = (WIDTH - 2 * EDGE - (len(found) - 1) * GAP) / len(found)
    heights = {title: [v for p in own + held_out for v in (p.y, p.low, p.high)] for title, (own, held_out) in
               found.items()}
    scores = span([v for title in found if "score" in title for v in heights[title]], [0])  # one scale for both
    parts = []
    for k, (title, curve) in enumerate(found.items()):
        left = EDGE + k * (width + GAP)
        parts += panel(k, title, *curve, scores if "score" in title else span(heights[title], [0]),
                       round(left), round(left + width))
    under = TOP + PANEL + 46
    forms = [answer_lines(row, form, under + 4) for form in FORMS]
    end = max(y for _, y in forms) + 6
    title = f"PPO, {steps[-1]['step']} steps, {steps[-1]['episode']:,} answers"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end + EDGE}" width="{WIDTH}" '
            f'height="{end + EDGE}" role="img" aria-labelledby="title desc"><title id="title">{text(title)}</title>'
            f'<desc id="desc">{text(described(steps, found, row))}</desc><style>{look(STYLE)}</style>'
            f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{end + EDGE - 1}" rx="8"/>'
            f'<text class="title" x="{EDGE}" y="38">{text(title)}</text>{"".join(parts)}'
            f'<rect class="panel" x="{EDGE}" y="{under}" width="{WIDTH - 2 * EDGE}" height="{end - under}" rx="6"/>'
            f'{"".join(svg for svg, _ in forms)}</svg>\n'), [*found]


# ---- python -m minirlhf.picture

def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    parser = Parser(prog="python -m minirlhf.picture", description="A run of train_ppo.py as one picture: score, judge "
                    "and KL over the steps, an answer before and after. SVG, for light and dark pages.")
    parser.add_argument("run", nargs="?", default="out/ppo", metavar="OUT_DIR", help="the run's folder (default: "
                        "%(default)s)")
    parser.add_argument("--output", default="run.svg", metavar="FILE.svg", help="(default: %(default)s)")
    a = parser.parse_args(argv)
    for path in (a.run, a.output):
        check_spelling("file", path)
    runtime.check_output(a.output)
    with fitting(a.run):
        svg, found = draw(a.run)
    with runtime.Output(a.output, ".svg", [os.path.join(a.run, name) for name in runtime.KEPT]) as output:
        if "judge's score" not in found:
            say("no judge looked on (train_ppo.py --judge), so there is no curve of its scores")
        output.write(svg)


if __name__ == "__main__":
    launch(main)
