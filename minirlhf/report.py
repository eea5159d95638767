"""What a folder of runs has come to, on one page that opens from the disk: `python -m minirlhf.report out`.

Invariant: each figure is one that the runs' own files hold, or a sum or a share of such; what a file lacks, the page
says. The page makes no request, and its content security policy knows this module's one script: a text of data or
models is text, whatever it holds.

Of each stage one run is shown in full, that of the folder named after the stage or else the latest; the others are in
the first table, and `python -m minirlhf.report out/OTHER` shows them. Left out: what only a checkpoint knows.
"""
import argparse
import base64
import hashlib
import importlib
import json
import math
import os
import re
from dataclasses import fields
from typing import NamedTuple

from minirlhf import evaluate, runtime, trackers
from minirlhf.chart import CHART, PAGE, SHADES, Point, figure, is_number, lines, look, text
from minirlhf.config import all_printed, as_fields, check_spelling, fail, launch, say, unprinted
from minirlhf.objectives import wilson_interval

STAGES = {"sft": "SFT model", "rm": "reward model", "ppo": "PPO policy", "dpo": "DPO policy"}
SHOWN = 12  # answers before and after at a time
LONGEST = 2000  # characters of a text
ANSWERS, ROLLOUTS = 200_000, 240_000  # bytes of the page that answers, and rollouts, may take
ROWS = 100  # of a table of steps


class Run(NamedTuple):
    """A run's folder as its files tell it. faults: what of them cannot be read."""
    folder: str
    stage: str
    options: dict
    metrics: list
    samples: list
    tokens: list
    faults: list

    @property
    def steps(self):
        return [row for row in self.metrics if "final" not in row]

    @property
    def final(self):
        """What the closing report has kept, or None."""
        return next((row["final"] for row in self.metrics[::-1] if isinstance(row.get("final"), dict)), None)


# ---- files

def read_rows(path, faults):
    """The objects of a .jsonl file, those that can be read; of the others `faults` gets a line."""
    rows, bad = [], []
    if not os.path.isfile(path):
        return rows
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict) and is_number(row.get("step")):
                    rows.append(row)
                elif line.strip():
                    bad.append((number, line))
    except OSError as error:
        faults.append(f"{path} cannot be read ({error.strerror}).")
    if bad:
        torn = len(bad) == 1 and not bad[0][1].endswith(b"\n")
        faults.append(f"{path}: " + ("the last line is torn, as where a run was killed; it is left out." if torn else
                                     f"1 line is no row and is left out: {bad[0][0]}." if len(bad) == 1 else
                                     f"{len(bad)} lines are no rows and are left out, the first is {bad[0][0]}."))
    return rows


def read_object(path, faults):
    """The object of a .json file; {} and a line in `faults` where there is none."""
    try:
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                found = json.load(f)
            if isinstance(found, dict):
                return found
        faults.append(f"{path} is " + ("no JSON object." if os.path.isfile(path) else "missing."))
    except OSError as error:
        faults.append(f"{path} cannot be read ({error.strerror}).")
    except (ValueError, RecursionError):
        faults.append(f"{path} is no JSON.")
    return {}


def read_run(folder):
    """-> Run, or None where the folder holds none."""
    held = {name: os.path.join(folder, name) for name in ("config.json", *runtime.KEPT)}
    if not any(map(os.path.isfile, held.values())):
        return None
    faults = []
    options, name = read_object(held["config.json"], faults), os.path.basename(os.path.abspath(folder))
    stage = options.get("stage") if isinstance(options.get("stage"), str) else name
    if not os.path.isfile(held["metrics.jsonl"]):
        faults.append(f"{held['metrics.jsonl']} is missing: the run has not logged a step.")
    rows = [read_rows(held[name], faults) for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl")]
    return Run(folder, stage, options, *rows, faults)


def find_runs(folder):
    """The runs in a folder and in those directly below it, in the order of the stages."""
    below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    runs = [*filter(None, map(read_run, [folder, *below]))]
    return sorted(runs, key=lambda run: [*STAGES, run.stage].index(run.stage))


def shown_in_full(runs):
    """{stage: the run that is shown}: the folder of the stage's name, or the one that was written last."""
    def rank(run):
        log = os.path.join(run.folder, "metrics.jsonl")
        return (os.path.basename(os.path.abspath(run.folder)) == run.stage,
                os.path.getmtime(log) if os.path.exists(log) else 0.0)
    return {stage: max(found, key=rank) for stage in STAGES
            if (found := [run for run in runs if run.stage == stage])}


# ---- values

def get(value, *path):
    """value[a][b]..., None where that is not there."""
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        else:
            value = value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None
    return value


def entries(value, *path):
    """The dict that stands there, {} where none does."""
    found = get(value, *path)
    return found if isinstance(found, dict) else {}


def points(rows, *path):
    """Of each row that has it: (step, value), with an interval where it is [mean, half] or [share, low, high]."""
    for row in rows:
        value = get(row, *path)
        mean, *ends = value if isinstance(value, list) and value else [value]
        if is_number(mean):
            if not all(map(is_number, ends)):  # of one prompt a mean has no interval
                ends = []
            yield Point(row["step"], mean, *([mean - ends[0], mean + ends[0]] if len(ends) == 1 else ends[:2]))


def ends_of(rows):
    """The first and the last step."""
    steps = [row["step"] for row in rows] or [0]
    return min(steps), max(steps)


def seconds(run):
    """What the run has taken -> words. `elapsed` counts all of it, `seconds` of an older run its steps alone."""
    for name, also in (("elapsed", ""), ("seconds", " in steps")):
        found = [row[name] for row in run.metrics if is_number(row.get(name))]
        if found:
            return runtime.clock(sum(found)) + also
    return "not recorded"


def command(run):
    """The command line that repeats the run, of the options that its script knows today, without trackers, which this
    machine may lack; None without a script."""
    if run.stage not in STAGES or not run.options:
        return None
    script = importlib.import_module("minirlhf.dpo" if run.stage == "dpo" else f"train_{run.stage}")
    was = as_fields(script.Options, run.options)
    known = {f.name: value for f in fields(script.Options) if f.name not in trackers.NAMES
             and type(value := was.get(f.name)) is type(f.default)
             and (type(value) is not tuple or all(isinstance(one, str) for one in value))}
    if run.stage == "sft" and known.get("init_from", "scratch") != "scratch":  # whose sizes the run has noted
        known = {name: value for name, value in known.items() if name not in script.SIZES[:-1]}
    return runtime.command_line(run.stage, script.Options(**known), resume=False, overwrite=False)


def planned(run):
    """The steps that the run has or shall have, as its script counts them; None where that cannot be told."""
    episodes, batch, epochs, most = (run.options.get(name) for name in (
        "total_episodes", "batch_size", "num_train_epochs", "max_steps"))
    if run.stage == "ppo":
        return -(-episodes // batch) if all(is_number(n) and n >= 1 for n in (episodes, batch)) else None
    an_epoch = next((round(row["step"] / row["epoch"]) for row in run.steps
                     if is_number(row.get("epoch")) and row["epoch"] > 1e-9), None)
    if an_epoch is None or not all(map(is_number, (epochs, most))):
        return None
    steps = max(1, round(epochs * an_epoch))
    return min(steps, most) if most > 0 else steps


def progress(run):
    """"36 of 36 steps", and whether the closing figures are still to come."""
    done, steps = max((row["step"] for row in run.metrics), default=0), planned(run)
    ended = run.final if run.stage in ("rm", "ppo") else steps is None or done >= steps
    return f"{figure(done)}{'' if steps is None else f' of {figure(steps)}'} steps{'' if ended else ', not finished'}"


def result(run):
    """The run's closing figures in a line."""
    final, said = run.final or {}, []
    if run.stage == "sft" and (looks := [*points(run.steps, "eval", "all", "nats_per_token")]):
        best = min(looks, key=lambda p: p.y)
        said = [f"lowest held-out loss {figure(best.y)} nats a token, at step {figure(best.x)}"]
    if run.stage == "rm":
        said = [str(final.get("verdict", ""))]
    if run.stage == "ppo":
        rate = get(final, "after", "win_rate")
        if isinstance(rate, list) and len(rate) == 3 and all(map(is_number, rate)):
            said.append("preferred to the SFT answer {:.1%} ({:.1%}-{:.1%})".format(*rate))
        if is_number(kl := get(final, "after", "kl", 0)):
            said.append(f"KL {figure(kl)} nats a response")
    if run.stage == "dpo" and (looks := [row["eval"] for row in run.steps if entries(row, "eval")]):
        if is_number(share := get(looks[-1], "rewards/accuracies")):
            said.append(f"held-out pairs ordered rightly {share:.1%}")
        if is_number(kl := get(looks[-1], "answers", "kl", 0)):
            said.append(f"KL {figure(kl)} nats a response")
    return "; ".join(filter(None, said)) or "none yet"


# ---- HTML

def missing(words):
    return f'<p class="missing">{text(words)}</p>'


def table(head, rows, caption, texts=1):
    """Rows of cells, the first `texts` of each as text, the very first the row's name; the table scrolls by itself
    where the page is narrow."""
    def classes(cell, k):
        return f' class="text{" long" * (len(str(cell)) > 40)}"' if k < texts else ""

    def cells(row, tag, first):
        return "".join(f'<{tag if k else first}{classes(cell, k)}>{text(cell)}</{tag if k else first[:2]}>'
                       for k, cell in enumerate(row))
    body = "".join(f"<tr>{cells(row, 'td', 'th scope=row')}</tr>" for row in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table><caption>'
            f'{text(caption)}</caption><thead><tr>{cells(head, "th", "th")}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def chart(title, series, x_label, y_label, should, where, **more):
    """A figure whose points can be read with the mouse or arrow keys, and a line on what it should look like."""
    series = {name: found for name, points in series.items() if (found := [*points])}
    svg = lines(series, x_label, y_label, title, **more)
    if not svg:
        return missing(f"{title}: {where} has no figures of it.")
    return (f'<figure class="chart" tabindex="0" role="group" aria-label="{text(title)}: arrow keys read its points">'
            f'{svg}<figcaption>{text(should)} <output class="screen"></output></figcaption></figure>')


def evenly(rows, most=ROWS):
    """At most so many rows, spread evenly, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[k * (len(rows) - 1) // (most - 1)] for k in range(most)]


def steps_table(run, columns):
    """{heading: path of a value in a row}: the figures of steps, for who reads no chart."""
    rows = evenly(run.steps)
    cells = [[figure(row["step"]), *(figure(v) if is_number(v := get(row, *path)) else ""
                                     for path in columns.values())] for row in rows]
    some = f"{len(rows)} of {len(run.steps)} steps" if len(rows) < len(run.steps) else "all steps"
    return (f"<details><summary>The figures of {some}</summary>"
            f"{table(['step', *columns], cells, f'{run.folder}, {some}', 0)}</details>") if rows else ""


def what_was_run(runs, shown):
    out, rows = ["<h2 id=run>What was run</h2>"], [
        [run.folder, STAGES.get(run.stage, run.stage), data_of(run), progress(run), seconds(run)] for run in runs]
    if runs:
        out.append(table(["folder", "stage", "data", "steps", "time, h:min:s"], rows, "Runs", 3))
    out += [f"<p><b>{text(run.folder)}</b>: {text(result(run))}</p>" for run in runs]
    if commands := [*filter(None, map(command, runs))]:
        out.append('<h3>The commands</h3><pre class="panel">' + re.sub(  # an option's name is not broken
            r"(--\w+)", r"<span>\1</span>", "\n".join(map(text, commands))) + "</pre>")
    for stage, name in STAGES.items():
        if stage not in shown and stage != "dpo":  # which is beside the three
            out.append(missing(f"There is no run of the {name} here, and so nothing of it below."))
    return "".join(out) + "".join(missing(fault) for run in runs for fault in run.faults)


def data_of(run):
    """"data/sentiment", and which preferences where these are not the usual ones."""
    of = run.options.get("preferences", "preferences")
    of = ", ".join(map(str, of)) if isinstance(of, list) else of
    return f"{run.options.get('data_dir', 'not recorded')}" + f", {of}" * (
        run.stage in ("rm", "dpo") and of != "preferences")


def sft_curves(run):
    log = f"{run.folder}/metrics.jsonl"
    kinds = [k for k in dict.fromkeys(k for row in run.steps for k in entries(row, "eval")) if k != "all"][:8]
    return [
        chart("SFT loss", {"training batch": points(run.steps, "loss"),
                           "held out": points(run.steps, "eval", "all", "nats_per_token")}, "step",
              "loss, nats a token", "Falls fast, then ever slower. Held out rising while training falls: it learns the "
              "rows by heart.", log),
        chart("SFT, held out by kind of text", {k: points(run.steps, "eval", k, "bits_per_byte") for k in kinds} or
              {"all": points(run.steps, "eval", "all", "bits_per_byte")}, "step", "held-out loss, bits a byte",
              "Falls for every kind; bits a byte compare models of different vocabularies.", log)], {
        "loss, nats a token": ["loss"], "held out, nats a token": ["eval", "all", "nats_per_token"],
        "held out, bits a byte": ["eval", "all", "bits_per_byte"], "learning rate": ["lr"],
        "gradient norm": ["grad_norm"]}


def by_margin(figures):
    """{kind: points of its accuracy}: x is the middle of a range of margins, and for the last what it begins with."""
    found = {}
    for name, f in figures.items():
        kind, _, margin = name.rpartition(", margin ")
        low, _, high = margin.partition("-")
        edges = [margin[2:], margin[2:]] if margin == f"> {evaluate.BINS[-2]}" else [low, high]
        values = [get(f, k) for k in ("accuracy", "low", "high", "pairs")]
        if kind and all(re.fullmatch(r"\d+(\.\d+)?", edge) for edge in edges) and all(map(is_number, values)):
            x, n = (float(edges[0]) + float(edges[1])) / 2, values[3]
            found.setdefault(kind, []).append(Point(x, *values[:3 if n >= evaluate.FEW else 1],
                                                    name=f"margin {margin}, {figure(n)} pairs"))
    return {kind: sorted(rows) for kind, rows in found.items()}


def reliability_points(bins):
    """[(mean probability, share, pairs)] -> points with Wilson's interval."""
    for row in bins if isinstance(bins, list) else []:
        if isinstance(row, list) and len(row) == 3 and all(map(is_number, row)) and row[2] >= 1:
            given, share, n = row
            yield Point(given, share, *wilson_interval(share * n, n), name=f"{figure(n)} pairs")


def rm_curves(run):
    log, final = f"{run.folder}/metrics.jsonl", run.final or {}
    figures = {k: f for k, f in entries(final, "figures").items() if isinstance(f, dict)}
    kept = {"as it is": get(final, "reliability", "as_is"),
            "divided by the temperature": get(final, "reliability", "with_temperature")}
    return [
        chart("Reward model's loss", {"training batch": points(run.steps, "loss")}, "step", "loss, nats a pair",
              "Falls from the 0.693 of chance, and stays above 0: people do not agree.", log,
              guides={"chance": [(x, math.log(2)) for x in ends_of(run.steps)]}),
        chart("Reward model's accuracy by margin", by_margin(figures), "margin between two texts, middle of its range",
              "pairs ordered rightly, share", "Rises with the margin: clear preferences are learned first. Bars: 95 % "
              "intervals. The last point: all margins above its own.", log, y_range=(0.5, 1)),
        chart("Reliability diagram", {k: reliability_points(bins) for k, bins in kept.items()},
              "probability that a text is better, as predicted", "share of pairs in which it was",
              "On the diagonal a prediction of 70 % is right in 70 % of pairs. Below it on the right: too sure.", log,
              guides={"as predicted": [(0, 0), (1, 1)]}, x_range=(0, 1), y_range=(0, 1))], {
        "loss, nats a pair": ["loss"], "accuracy": ["accuracy"],
        "held-out accuracy": ["eval", "all", "accuracy"], "learning rate": ["lr"], "gradient norm": ["grad_norm"]}


def rm_figures(run):
    """The closing table of a reward model, as the script printed it."""
    final = run.final or {}
    rows = []
    for name, f in entries(final, "figures").items():
        value = {k: get(f, k) for k in ("pairs", "accuracy", "low", "high", "length_only", "ceiling")}
        if all(is_number(value[k]) for k in ("pairs", "accuracy", "low", "high")):
            rows.append([name, figure(value["pairs"]), f"{value['accuracy']:.3f}",
                         evaluate.spelled(value["low"], value["high"], value["pairs"]),
                         *(f"{value[k]:.3f}" if is_number(value[k]) else "" for k in ("length_only", "ceiling"))])
    if not rows:
        return missing(f"{run.folder} has no closing figures: accuracy, margins and calibration come when it ends.")
    told = {k: get(final, "calibration", k) for k in ("ece", "ece_with_temperature", "temperature")}
    line = ("Calibration error {ece:.3f}; {ece_with_temperature:.3f} after dividing score differences by a temperature "
            "of {temperature:.2f}.".format(**told) if all(map(is_number, told.values())) else "")
    return (table(["held out", "pairs", "accuracy", "95 % interval", "length only", "ceiling"], rows,
                  "What the reward model is worth on held-out pairs") + f"<p>{text(line)}</p>")


PPO_COLUMNS = {"score": ["objective/scores"], "KL, nats a response": ["objective/kl"],
               "KL by k3": ["objective/kl_k3"], "length, tokens": ["completions/mean_length"],
               "answers that end": ["completions/eos_rate"], "entropy, nats a decision": ["policy/entropy_avg"],
               "clip fraction": ["policy/clipfrac_avg"], "explained variance": ["val/explained_variance"],
               "policy loss": ["loss/policy_avg"], "value loss": ["loss/value_avg"],
               "held-out score": ["eval", "score", 0], "held-out KL": ["eval", "kl", 0],
               "preferred, held out": ["eval", "win_rate", 0]}


def ppo_curves(run):
    log, rows, judge = f"{run.folder}/metrics.jsonl", run.steps, [*points(run.steps, "eval", "judge_win_rate")]
    ends, usual = ends_of(rows), get(run.final, "before", "mean_length")
    guide = {"guides": {"reference model's": [(x, usual) for x in ends]}} if is_number(usual) else {}
    names = [*dict.fromkeys(key for row in rows for key in row)]
    rewards, multipliers = ({key.removeprefix(start): points(rows, key) for key in names if key.startswith(start)}
                            for start in ("objective/scores/", "objective/multiplier/"))
    more = {key.removeprefix("objective/"): [key] for key in names if key.startswith((
        "objective/scores/", "objective/multiplier/", "groups/"))}

    def of(title, series, y_label, should, **more):
        return chart(title, series, "step", y_label, should, log, **more)

    return [
        of("Score", {"training batch": points(rows, "objective/scores"), "held out": points(rows, "eval", "score")},
           "score of the reward model",
           "Rises, then levels off. Still rising while answers grow alike: reward hacking."),
        *([of("Each reward", dict([*rewards.items()][:8]), "mean score of training answers", "One that falls while "
              "the others rise is what they are bought with.")] if len(rewards) > 1 else []),
        *([of("Multipliers", dict([*multipliers.items()][:8]), "multiplier of a limit", "Levels off where the limit is "
              "kept. Growing to the end: it cannot be kept, or not at this rate.")] if multipliers else []),
        of("Preferred to the reference's answer", {"by the reward model": points(rows, "eval", "win_rate"),
                                                   **({"by the judge": judge} if judge else {})},
           "held-out prompts, share", "Rises from one half. The judge far below the reward model: over-optimised.",
           guides={"even": [(x, 0.5) for x in ends]}, y_range=(0, 1)),
        of("KL from the reference", {"k1": points(rows, "objective/kl"), "k3": points(rows, "objective/kl_k3"),
                                     "held out, k1": points(rows, "eval", "kl")}, "KL, nats a response",
           "Rises slowly and bends as the penalty holds it; k1 and k3 stay close. A jump: too large a step."),
        of("Length", {"mean": points(rows, "completions/mean_length")}, "length of an answer, tokens",
           "Stays near the reference model's. Steadily longer or shorter: length is what the score likes.", **guide),
        of("Entropy", {"mean": points(rows, "policy/entropy_avg")}, "entropy, nats a decision",
           "Falls a little. Towards 0: the same answer to every prompt."),
        of("Clip fraction", {"policy": points(rows, "policy/clipfrac_avg")}, "decisions with a clipped ratio, share",
           "Between 0 and about 0.2. Always 0: steps could be larger. Above: they are too large."),
        of("Groups of equal scores", {"training batch": points(rows, "groups/equal_scores")},
           "groups whose answers have one score, share", "Low: such a group does not say which answer is better.")
        if run.options.get("advantages", "gae") != "gae" else
        of("Value network", {"explained variance": points(rows, "val/explained_variance")},
           "explained variance of returns, share", "Rises towards 1. At 0 values predict nothing; below, they harm.")
    ], PPO_COLUMNS | dict([*more.items()][:17])


def dpo_curves(run):
    log, rows = f"{run.folder}/metrics.jsonl", run.steps

    def of(title, names, y_label, should, **more):
        series = {label: points(rows, *path, name) for name, said in names.items() for label, path in (
            (f"{said}training batch", []), (f"{said}held out", ["eval"]))}
        return chart(title, series, "step", y_label, should, log, **more)

    return [
        of("DPO loss", {"loss": ""}, "loss of a pair", "Falls. Held out rising while training falls: it learns the "
           "pairs by heart."),
        of("Pairs ordered rightly by the policy", {"rewards/accuracies": ""}, "pairs, share",
           "Rises from one half.", guides={"chance": [(x, 0.5) for x in ends_of(rows)]}, y_range=(0, 1)),
        of("Log-probability of texts", {"logps/chosen": "chosen, ", "logps/rejected": "rejected, "},
           "log-probability, nats a text", "That both fall is usual; chosen ones should fall less."),
        chart("KL of answers from the reference", {"held out, k1": points(rows, "eval", "answers", "kl")}, "step",
              "KL, nats a response", "Rises, and stays near the reference the more beta is.", log)], {
        "loss of a pair": ["loss"], "pairs ordered rightly": ["rewards/accuracies"], "margin": ["rewards/margins"],
        "log-probability, chosen": ["logps/chosen"], "log-probability, rejected": ["logps/rejected"],
        "held out, loss": ["eval", "loss"], "held out, ordered rightly": ["eval", "rewards/accuracies"],
        "held out, chosen": ["eval", "logps/chosen"], "held out, rejected": ["eval", "logps/rejected"],
        "held-out KL": ["eval", "answers", "kl", 0], "learning rate": ["lr"], "gradient norm": ["grad_norm"]}


def before_and_after(run):
    """The closing comparison, and answers to the same held-out prompts side by side."""
    final, out = run.final or {}, []
    rows = [[label, *(cell(get(final, when, key), form) for when in ("before", "after"))]
            for key, label, form in evaluate.FIGURES if get(final, "after", key) is not None]
    parts = [*entries(final, "after", "parts")]
    rows += [[f"{name}: {label}", *(cell(get(final, when, "parts", name, key), form) for when in ("before", "after"))]
             for name in parts[:8] if len(parts) > 1 for key, label, form in evaluate.FIGURES[:2]]
    if rows:
        n = get(final, "after", "prompts")
        caption = "Held-out prompts, with 95 % intervals" + (f": {figure(n)}" if is_number(n) else "")
        out.append(f'<div class="compared">{table(["figure", "before", "after"], rows, caption)}</div>')
    answers = [row for row in run.samples if row.get("final") and is_number(row.get("score"))
               and is_number(row.get("sft_score")) and all(isinstance(row.get(k), str) for k in (
                   "prompt", "completion", "sft_completion"))]
    if not answers:
        return "".join(out) + missing(f"{run.folder}/samples.jsonl has no answers before and after: they come with the "
                                      "closing report, when the run ends.")
    return "".join(out) + side_by_side(answers)


def cell(value, form):
    """A figure as the script prints it, "" where it is not there in that form."""
    values = value if isinstance(value, list) else [value]
    return form.format(*values) if all(map(is_number, values)) and len(values) == form.count("{") else ""


def side_by_side(answers):
    """The first answers shown, the others behind the controls; the best and the worst first where not all have room."""
    ranked = sorted(range(len(answers)), key=lambda i: answers[i]["score"])
    kept, used = set(), 0
    for i in dict.fromkeys([*range(SHOWN), *ranked[:SHOWN], *ranked[-SHOWN:], *range(len(answers))]):
        if i < len(answers) and used < ANSWERS:
            used += len(article(answers[i], False).encode())
            kept.add(i)
    shown = sorted(kept)
    body = "".join(article(answers[i], k >= SHOWN) for k, i in enumerate(shown))
    orders = ("as in the file", "best score after", "worst score after", "gained most", "lost most")
    options = "".join(f"<option value={k}>{name}</option>" for k, name in enumerate(orders))
    some = f"{len(shown)} of the {len(answers)} held-out prompts are on this page" if len(shown) < len(answers) else (
        f"all {len(answers)} held-out prompts are on this page")
    return ("<h3>Answers</h3><p>Before: the reference model. After: the policy. Scores are the reward model's; "
            f'{some}.</p><div class="controls screen" hidden>'
            f'<label>Order <select id="order">{options}</select></label> '
            '<label>Filter by words <input id="filter" type="search"></label> '
            '<button id="more" type="button">Show 12 more</button> <output id="count"></output></div>'
            f'<div id="answers">{body}</div>')


def article(row, hidden):
    one, two = figure(row["sft_score"]), figure(row["score"])
    return (f'<article class="panel" data-before="{one}" data-after="{two}"{" hidden" * hidden}><h4 dir="auto">'
            f'{cut(row["prompt"])}</h4><div class="pair"><div><b>before {one}</b><p dir="auto">'
            f'{cut(row["sft_completion"])}</p></div><div><b>after {two}</b><p dir="auto">'
            f'{cut(row["completion"])}</p></div></div></article>')


def cut(value):
    """A text as HTML, at most LONGEST characters of it and how many are left out."""
    more = f' <i>({len(value) - LONGEST:,} more characters)</i>' if len(value) > LONGEST else ""
    return text(value[:LONGEST]) + more


# ---- the token viewer

MEASURES = {"advantage": "advantages", "KL, nats": "kl", "value": "values", "reward-to-go": "rewards_to_go",
            "ratio after the update": "ratios"}
COLUMNS = {"log p, policy": "logprobs", "log p, reference": "ref_logprobs", "KL, nats": "kl", "value": "values",
           "reward": "rewards", "advantage": "advantages", "return": "returns", "reward-to-go": "rewards_to_go",
           "ratio after the update": "ratios"}


def token_viewer(run):
    rows = [*filter(None, map(whole, run.tokens))]
    if not rows:
        return missing(f"{run.folder}/tokens.jsonl has no answers token by token: train_ppo.py keeps some at each "
                       "look, after --eval_interval steps.")
    clip = run.options.get("cliprange")
    clip = clip if is_number(clip) and clip > 0 else None
    scales = {name: scale(rows, key) for name, key in MEASURES.items()}
    parts, used, names = [], 0, []
    for k, row in enumerate(rows[::-1]):  # the latest first, should not all have room
        part = rollout(row, scales, clip, k)
        used += len(part.encode())
        if used > ROLLOUTS and parts:
            break
        parts.append(part)
        names.append(f"step {figure(row['step'])}, score {cell(row.get('score'), '{:+.2f}') or 'unknown'}")
    left = len(rows) - len(parts)
    left = f" {left} earlier answers of {run.folder}/tokens.jsonl are left out." if left else ""
    legends = "".join(f'<p class="legend"{" hidden" * (k > 0)}>{legend(name, scales[name], clip)}</p>'
                      for k, name in enumerate(MEASURES))
    picks = ["".join(f"<option value={k}>{text(name)}</option>" for k, name in enumerate(found))
             for found in (names, MEASURES)]
    return (f"<p>Answers that the policy was trained on, from the lowest score of a step to its highest, and what each "
            f"token's decision got: darker is further from 0.{text(left)} With the arrow keys on the text, or a click, "
            "a token's figures are read out; the table has them all.</p>"
            f'<div class="controls screen" hidden><label>Answer <select id="answer">{picks[0]}</select></label> '
            f'<label>Colour by <select id="measure">{picks[1]}</select></label></div>{legends}'
            f'<div id="rollouts">{"".join(parts)}</div>')


def whole(row):
    """A row of tokens.jsonl with all columns, None where a token lacks the figure; None where it is no such row."""
    tokens = row.get("tokens")
    if not (isinstance(tokens, list) and tokens and all(isinstance(t, str) for t in [*tokens, row.get("prompt")])):
        return None
    row = {key: [None] * len(tokens) for key in COLUMNS.values()} | row
    fits = all(isinstance(row[key], list) and len(row[key]) == len(tokens)
               and all(v is None or is_number(v) for v in row[key]) for key in COLUMNS.values())
    return row if fits else None


def scale(rows, key):
    """What gets the darkest colour: the size that a twentieth of all tokens exceed, for a ratio that of its distance
    from 1."""
    sizes = sorted(abs(v - (key == "ratios")) for row in rows for v in row[key] if v is not None)
    return (sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0) or 1.0


def shade(value, name, size, clip):
    """Class of a token's colour: "low4" to "low1", "none", "high1" to "high4". A ratio's darkest is a clipped one."""
    if value is None:
        return "none"
    if MEASURES[name] == "ratios":
        value -= 1
        if clip:
            level = SHADES if abs(value) > clip else min(SHADES - 1, round((SHADES - 1) * abs(value) / clip))
            return f"{'high' if value > 0 else 'low'}{level}" if level else "none"
    level = min(SHADES, round(SHADES * abs(value) / size))
    return f"{'high' if value > 0 else 'low'}{level}" if level else "none"


def legend(name, size, clip):
    """The shades with what they stand for."""
    if MEASURES[name] == "ratios" and clip:
        return (f'<span class="low{SHADES}">below {figure(1 - clip)}</span> <span class="low2">less</span> '
                f'<span>1</span> <span class="high2">more</span> <span class="high{SHADES}">above {figure(1 + clip)}'
                "</span> the darkest would be clipped, were the batch used again, where the advantage has their sign")
    middle = 1 if MEASURES[name] == "ratios" else 0
    steps = [(f"{end}{k}" if k else "none", middle + (k if end == "high" else -k) / SHADES * size)
             for end, ks in (("low", range(SHADES, 0, -1)), ("high", range(SHADES + 1))) for k in ks]
    return " ".join(f'<span class="{name}">{figure(float(f"{x:.2g}"))}</span>' for name, x in steps)


def rollout(row, scales, clip, k):
    """One answer: its tokens in colours, and their figures in a table."""
    classes = [" ".join(shade(row[key][t], name, scales[name], clip) for name, key in MEASURES.items())
               for t in range(len(row["tokens"]))]
    tokens = "".join(f'<span class="{c.split()[0]}" data-c="{c}">{visible(t)}</span>'
                     for t, c in zip(row["tokens"], classes))
    score, reward = cell(row.get("score"), "{:.4g}"), cell(row.get("reward"), "{:.4g}")
    cells = [[f"{t + 1}", f"{token!r}"[1:-1], *(figure(row[key][t]) if row[key][t] is not None else ""
                                               for key in COLUMNS.values())] for t, token in enumerate(row["tokens"])]
    length = row.get("length")
    shortened = f"; the first {len(row['tokens'])} of {figure(length)} tokens" if is_number(length) and length > len(
        row["tokens"]) else ""
    about = (f"Step {figure(row['step'])}: score {score or 'unknown'}, reward at the last token {reward or 'unknown'}"
             f"{'' if row.get('finished') else ', did not end'}{shortened}")
    return (f'<section{" hidden" * (k > 0)}><h3>{text(about)}</h3><p class="faint" dir="auto">{cut(row["prompt"])}</p>'
            '<p class="tokens panel" tabindex="0" role="group" aria-label="Tokens: arrow keys read their figures">'
            f'{tokens}</p><p class="screen"><output></output>&nbsp;</p>'
            f"{table(['no.', 'token', *COLUMNS], cells, 'The figures of each token', 2)}</section>")


def visible(token):
    """A token's text with its line ends in sight."""
    return text(token.replace("\n", "↵\n"))


# ---- the frontier

def frontier(folder):
    """What `python -m minirlhf.frontier` has measured: for each method its points, and what it found."""
    path, faults = frontier_file(folder), []
    state = read_object(path, faults)
    rows, kept = get(state, "rows"), get(state, "points")
    if faults or not isinstance(rows, dict) or not isinstance(kept, dict):
        return missing(f"No frontier: {faults[0] if faults else f'{path} holds no rows and points.'}")
    points = {method: [(name, get(rows, name)) for name in names if isinstance(name, str) and place(get(rows, name))]
              for method, names in kept.items() if isinstance(names, list)}
    charts = []
    for key, title in (("score", "The reward model that was optimised"), ("judge_score", "A judge that looks on")):
        start = get(state, "baseline", key, 0)
        first = [Point(0, start, name="the SFT model")] if is_number(start) else []
        charts.append(chart(title, {method: first + sorted(filter(None, (at_kl(row, key, name) for name, row in found)))
                                    for method, found in points.items()},
                            "root of the KL from the SFT model, nats a response", "mean score", "Higher and further "
                            "left is better. Where the judge falls and the reward model rises: over-optimised.", path))
    cells = [[method, name, ("<= " * ("kl_bound" in row)) + figure(place(row)[0]), *(
        cell(get(row, key), form) for key, _, form in evaluate.FIGURES if key not in ("kl", "kl_k3"))]
        for method, found in points.items() for name, row in found]
    said = state.get("findings") if isinstance(state.get("findings"), list) else []
    head = ["method", "run", "KL, nats", *(label for key, label, _ in evaluate.FIGURES if key not in ("kl", "kl_k3"))]
    return (f'<div class="charts">{"".join(charts)}</div>'
            + "".join(f"<p>{cut(line)}</p>" for line in said if isinstance(line, str))
            + (table(head, cells, f"The points of {path}", 2) if cells else ""))


def frontier_file(folder):
    paths = [os.path.join(folder, *names) for names in (("frontier", "frontier.json"), ("frontier.json",))]
    return next(filter(os.path.isfile, paths), paths[0])


def place(row):
    """A row's KL and the half-width of its interval: by k1, or the bound of best-of-n; None where it has neither."""
    kl = [get(row, "kl_bound"), 0.0] if is_number(get(row, "kl_bound")) else get(row, "kl")
    return kl if isinstance(kl, list) and len(kl) == 2 and all(map(is_number, kl)) else None


def at_kl(row, key, name):
    """A row as a point of its chart, intervals on both axes; None where it lacks the figure."""
    value, (kl, around) = get(row, key), place(row)
    if not (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))):
        return None
    mean, half = value
    x = [math.sqrt(max(0.0, v)) for v in (kl, kl - around, kl + around)]
    return Point(x[0], mean, mean - half, mean + half, *x[1:], name)


# ---- the page

STYLE = """
nav a { margin-right: 1rem; white-space: nowrap; }
[hidden] { display: none !important; }
.missing { border-left: 4px solid var(--line1); padding: .25rem .75rem; background: var(--panel); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 0; max-width: 36rem; }
figure svg { width: 100%; }
figcaption { font-size: .9rem; color: var(--faint); min-height: 4.5em; }
figcaption output { display: block; color: var(--ink); }
.now { stroke: var(--ink); stroke-width: 3; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; max-width: calc(100vw - 3rem); }
th, td { overflow-wrap: normal; }
td { white-space: nowrap; }
.text { white-space: pre; }
.text.long { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 16rem; max-width: 28rem; }
.compared th, .compared td { white-space: normal; min-width: 5rem; }
@media (max-width: 30rem) { th, td { padding: .2rem .3rem; } }
summary { cursor: pointer; margin: .5rem 0; }
pre { margin: .5rem 0; white-space: pre-wrap; }
pre span { white-space: nowrap; }
tbody th { font-weight: normal; }
.controls { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; margin: .75rem 0; }
article { margin: .75rem 0; break-inside: avoid; }
article h4 { margin: 0 0 .5rem; font-weight: 600; white-space: pre-wrap; }
article p { margin: .25rem 0; white-space: pre-wrap; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.tokens { white-space: pre-wrap; line-height: 2; max-width: none; }
.tokens span, .legend span { padding: .15rem 0; }
.legend span { padding: .15rem .4rem; border: 1px solid var(--rule); }
.tokens .now { outline: 2px solid var(--ink); }
tr.now { background: var(--panel); outline: 2px solid var(--focus); outline-offset: -2px; }
@media print { body { max-width: none; font-size: 9pt; } .scroll { overflow: visible; }
  .text.long { min-width: 0; } th, td { padding: .1rem .25rem; } }
""" + "".join(f".{end}{k} {{ background: var(--{end}{k}); border-bottom: 2px {line} var(--ink); }}\n"
              for end, line in (("low", "dashed"), ("high", "solid")) for k in range(1, SHADES + 1))

SCRIPT = r"""
"use strict";
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const one = (selector, from = document) => from.querySelector(selector);
const moves = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -1e9, End: 1e9};
for (const controls of all(".controls")) controls.hidden = false;

// arrow keys go through items; show is told which
function readable(element, items, show) {
  let at = -1;
  const go = k => {
    if (items[at]) items[at].classList.remove("now");
    at = Math.max(0, Math.min(items.length - 1, k));
    items[at].classList.add("now");
    show(at);
  };
  element.addEventListener("keydown", event => {
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(at + moves[event.key]);
  });
  return go;
}

for (const figure of all("figure.chart")) {
  const marks = all("path", figure).filter(path => one("title", path)), svg = one("svg", figure);
  const output = one("output", figure);
  const places = marks.map(mark => mark.getAttribute("d").slice(1).split(/[ m]/, 2).map(Number));
  const go = readable(figure, marks, k => { output.textContent = one("title", marks[k]).textContent; });
  svg.addEventListener("pointermove", event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const away = places.map(([x, y]) => Math.hypot(x - point.x, (y - point.y) / 3));
    go(away.indexOf(Math.min(...away)));
  });
}

if (one("#answers")) {
  const articles = all("#answers article"), size = 12, order = one("#order"), filter = one("#filter");
  const number = (article, name) => Number(article.dataset[name]);
  const gain = article => number(article, "after") - number(article, "before");
  const keys = [null, a => -number(a, "after"), a => number(a, "after"), a => -gain(a), gain];
  const texts = articles.map(article => article.textContent.toLowerCase());
  let limit = size;
  const update = () => {
    const key = keys[order.value], words = filter.value.toLowerCase();
    let found = articles.filter((article, k) => texts[k].includes(words));
    if (key) found = found.map(a => [key(a), a]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
    for (const article of articles) article.hidden = true;
    for (const article of found.slice(0, limit)) article.hidden = false;
    one("#answers").append(...found);
    one("#more").disabled = limit >= found.length;
    one("#count").textContent = `${Math.min(limit, found.length)} of ${found.length} shown`;
  };
  const fresh = () => { limit = size; update(); };
  order.addEventListener("change", fresh);
  filter.addEventListener("input", fresh);
  one("#more").addEventListener("click", () => { limit += size; update(); });
  update();
}

if (one("#rollouts")) {
  const sections = all("#rollouts section"), answer = one("#answer"), measure = one("#measure");
  const update = () => {
    sections.forEach((section, k) => { section.hidden = k != answer.value; });
    all(".legend").forEach((legend, k) => { legend.hidden = k != measure.value; });
    for (const token of all(".tokens span", sections[answer.value])) {
      const now = token.classList.contains("now");
      token.className = token.dataset.c.split(" ")[measure.value] + (now ? " now" : "");
    }
  };
  for (const section of sections) {
    const tokens = all(".tokens span", section), rows = all("tbody tr", section);
    const head = all("thead th", section).map(cell => cell.textContent), output = one("output", section);
    const go = readable(one(".tokens", section), tokens, k => {
      for (const row of rows) row.classList.toggle("now", row === rows[k]);
      const cells = all("th, td", rows[k]).map(cell => cell.textContent);
      output.textContent = `token ${k + 1} of ${tokens.length} “${tokens[k].textContent}”: ` +
        cells.slice(2).map((value, n) => `${head[n + 2]} ${value}`).join("; ");
    });
    tokens.forEach((token, k) => token.addEventListener("click", () => go(k)));
  }
  answer.addEventListener("change", update);
  measure.addEventListener("change", update);
  update();
}
"""


def page(folder):
    """The report on a folder of runs -> HTML. Exits 2 where it holds none."""
    try:
        runs = find_runs(folder)
    except OSError as error:
        fail(f"{folder}: cannot be read ({error.strerror}); name the folder that holds the runs, as out")
    if not runs and not os.path.isfile(frontier_file(folder)):
        fail(f"{folder}: holds no run, nor do the folders in it; name the one in which train_sft.py, train_rm.py and "
             "train_ppo.py have written, as out")
    shown = shown_in_full(runs)
    out = [what_was_run(runs, shown), "<h2 id=answers-before-and-after>Before and after</h2>"]
    out.append(before_and_after(shown["ppo"]) if "ppo" in shown else missing("There is no PPO policy's run here."))
    out.append("<h2 id=curves>Curves</h2><p>On a chart, the mouse or the arrow keys read out a point.</p>")
    for stage, run in shown.items():
        curves, columns = {"sft": sft_curves, "rm": rm_curves, "ppo": ppo_curves, "dpo": dpo_curves}[stage](run)
        out += [f"<h3>{STAGES[stage].capitalize() if stage == 'rm' else STAGES[stage]}: {text(run.folder)}</h3>",
                f'<div class="charts">{"".join(curves)}</div>', rm_figures(run) if stage == "rm" else "",
                steps_table(run, columns)]
    out += ["<h2 id=frontier>Frontier</h2>", frontier(folder), "<h2 id=tokens>Token by token</h2>"]
    out.append(token_viewer(shown["ppo"]) if "ppo" in shown else missing("There is no PPO policy's run here."))
    style = look(PAGE, CHART, STYLE)
    allowed = "; ".join(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
                        for kind, s in (("style", style), ("script", SCRIPT)))
    links = "".join(f'<a href="#{name}">{words}</a>' for name, words in (
        ("run", "What was run"), ("answers-before-and-after", "Before and after"), ("curves", "Curves"),
        ("frontier", "Frontier"), ("tokens", "Token by token")))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {allowed}; base-uri \'none\'; '
            f'form-action \'none\'"><title>RLHF report: {text(folder)}</title>'
            f'<style>{style}</style></head><body><header><h1>RLHF report: {text(folder)}</h1>'
            f'<nav aria-label="Sections">{links}</nav></header><main>{"".join(out)}</main>'
            f'<script>{SCRIPT}</script></body></html>\n')


def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    parser = argparse.ArgumentParser(prog="python -m minirlhf.report", allow_abbrev=False, description="What a folder "
                                     "of runs has come to, as one HTML page that opens from the disk.")
    parser.add_argument("folder", nargs="?", default="out", help="folder of the runs, or of one run (default: out)")
    parser.add_argument("--output", metavar="FILE.html", help="(default: report.html in that folder)")
    a = parser.parse_args(argv)
    for path in (a.folder, a.output or ""):
        check_spelling("file", path)
    a.output = os.path.join(a.folder, "report.html") if a.output is None else a.output
    if not os.path.isdir(a.folder):
        fail(f"{a.folder}: is no folder; name the one that holds the runs, as out")
    runtime.check_output(a.output)
    html = page(a.folder)
    with runtime.Output(a.output, ".html", []) as output:
        output.write(html)
    say(f"{len(html.encode()):,} bytes; open it in a browser")
    all_printed()


if __name__ == "__main__":
    launch(main)
