"""Completions and scores of checkpoints side by side: `python -m minirlhf.sample CKPT [CKPT ...]`.

Policies complete prompts; reward models and functions beside them score each completion as stage 3 does, on ids as they
were sampled.
Reward models alone score the texts of a file as stage 2 does. Each prompt's n-th completion draws the same random
numbers in every checkpoint, so that differences are the models'.
"""
import argparse
import contextlib
import itertools
import json
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch

from minirlhf import checkpoint, evaluate, kernels, mixture, rewards, runtime
from minirlhf.chat import Message, Talk, describe
from minirlhf.config import all_printed, escaped, fail, launch, positive_int, say, temperature_number, unprinted
from minirlhf.data import (Preference, blank_ends, clean, encode_prompts, encode_row, load_asked, load_demonstrations,
                           load_preferences, present, read_records, refuse, too_long)
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.objectives import best_of_n_kl
from minirlhf.tokenizer import Tokenizer

LONGEST_LINE = 1 << 20  # bytes of a prompt on standard input
SAMPLING = {"n": 1, "temperature": 1.0, "seed": 1337, "response_length": None}  # options of policies, and what is usual
DESCRIPTION = """\
Completions of policies side by side, with the scores that reward models among the checkpoints give them, or functions,
as FILE.py:FUNCTION, which get the other columns of --prompts that they ask for. Without --prompt and --prompts it asks
for prompts until end of input. With --chat one policy holds a conversation: each line is the user's turn, read in the
form of messages that the model knows.

Reward models alone score the records of --prompts: {"prompt", "completion"} gets "score"; {"prompt", "chosen",
"rejected"} gets "score_chosen" and "score_rejected", and a ranking "score_completions", with the share of pairs that
are ordered rightly at the end (ties half, 95 % interval). All other forms of demonstrations and preferences that the
scripts read will do. Of several reward models the columns end in the model's path: "score out/rm".

With --rank or --best the answers of all policies to a prompt become one record that the scripts read: a ranking by
score, for stage 2 and DPO, or the best of n, for stage 1. Answers that were cut are left out, for what reads a record
takes an answer for whole."""


class Loaded(NamedTuple):
    """A checkpoint. path: as it was named; options: those of its training. Of a reward function the path alone."""
    path: str
    model: GPT | None
    tokenizer: Tokenizer | None
    stage: str
    options: dict


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minirlhf.sample", allow_abbrev=False, description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="ckpt.pt of any stage, its folder, another "
                        "program's model, or the name of a published one, as gpt2")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help='prompts from a file of {"prompt": ...} records; for '
                        "reward models alone, the records to score")
    parser.add_argument("--chat", action="store_true", help="talk with the policy, a line a turn, until end of input; "
                        "the oldest turns are dropped where the context is full")
    parser.add_argument("--n", type=positive_int, help="completions a prompt (default: 1)")
    parser.add_argument("--reward_model", metavar="PATH", help="what scores the completions, besides reward models "
                        "among the checkpoints; FILE.py:FUNCTION, too")
    parser.add_argument("--rank", action="store_true", help="write a record a prompt, its answers ordered by score: "
                         '{"prompt", "completions", "scores"}')
    parser.add_argument("--best", action="store_true", help="write the answer a prompt that has the highest score: "
                         '{"prompt", "completion", "score"}')
    parser.add_argument("--temperature", type=temperature_number, help="0 takes the likeliest token (default: 1.0)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same completions (default: 1337)")
    parser.add_argument("--response_length", type=positive_int, help="longest completion in tokens (default: 48, "
                        "with --chat 256, or half the context of a model where that is less)")
    parser.add_argument("--long_prompts", choices=("drop", "trim"), help="records that are longer than the context of "
                        "a reward model get no score (null), or their prompt is trimmed at its left (default: as that "
                        "model was trained); a policy's prompts are always trimmed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--output", metavar="FILE.jsonl", help="also write one object a completion: checkpoint, "
                        "prompt, completion, finished (ended with eos) and scores; for reward models alone, the "
                        "records with all their columns and the scores, which then are not printed")
    a = parser.parse_args(argv)
    a.given = [name for name in SAMPLING if getattr(a, name) is not None]
    for name, usual in SAMPLING.items():
        setattr(a, name, usual if getattr(a, name) is None else getattr(a, name))
    if a.n > 1_000_000:
        fail(f"--n {a.n}: at most 1000000")
    if a.chat and (idle := [name for name in ("prompt", "prompts") if getattr(a, name)] + ["n"] * ("n" in a.given)):
        fail(f"--{idle[0]}: has no effect with --chat, in which the turns come from standard input; leave it out")
    if a.chat and len(a.checkpoints) > 1:
        fail(f"--chat: talks with one policy, found {len(a.checkpoints)} checkpoints")
    for name in ("reward_model", "rank", "best"):
        if a.chat and getattr(a, name):
            fail(f"--{name}: has no effect with --chat; leave it out")
    if a.rank and a.best:
        fail("--rank and --best exclude each other: they write different records")
    if len(set(named(a))) < len(named(a)):
        fail(f"{next(path for path in named(a) if named(a).count(path) > 1)}: named twice")
    return a


def named(a):
    """The paths of what is loaded, that of --reward_model last."""
    return [*a.checkpoints, *filter(None, [a.reward_model])]


def load(path, device, stages=tuple(checkpoint.STAGES)):
    if rewards.is_function(path):
        return Loaded(path, None, None, "rm", {})
    model, tokenizer, payload = checkpoint.load(path, stages, device)
    kernels.pick_matmul(model)
    return Loaded(path, model, tokenizer, payload["stage"], payload["options"])


def warn(line):
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Progress:
    """A line on standard error every 5 seconds: how many are done, the time used and the time left."""

    def __init__(self, total, what):
        self.total, self.what, self.began = total, what, time.monotonic()
        self.told = self.began

    def __call__(self, done):
        now = time.monotonic()
        if now > self.told + 5 and done < self.total:
            self.told, used = now, now - self.began
            warn(f"{done:,} of {self.total:,} {self.what}  {runtime.clock(used)}<"
                 f"{runtime.clock(used / done * (self.total - done))}")


def spelled(score):
    return "null" if score is None else f"{score:+.2f}"


def summary(scores):
    """"mean score 0.12, standard deviation 0.98", without those that are None."""
    scores = [score for score in scores if score is not None]
    if not scores:
        return "applies to none"
    x = torch.tensor(scores, dtype=torch.double)
    return f"mean score {float(x.mean()):.3f}, standard deviation {float(x.std(correction=0)):.3f}"


def suffixes(judges, one_is_plain=True):
    """What the names of a reward model's columns end in, a model."""
    return [""] if len(judges) == 1 and one_is_plain else [f" {judge.path}" for judge in judges]


def opened(a, also=()):
    """The file of --output, as lines; `also`: what the command reads besides checkpoints and --prompts."""
    models, prompts = map(rewards.files, named(a)), [a.prompts] if a.prompts else []
    return runtime.Output(a.output, ".jsonl", [*itertools.chain(*models), *prompts, *also])


# ---- policies complete prompts

def limits(policy, a):
    """Most tokens of a completion and of a prompt."""
    context = policy.model.config.block_size
    limit = a.response_length or min(256 if a.chat else 48, context // 2)
    if limit < 1 or context - limit < 2:
        fail(f"--response_length {limit}: leaves no room for a prompt in the context of {policy.path}, {context} "
             f"tokens; at most {context - 2}")
    return limit, context - limit


def complete(policy, judges, prompts, a, batch_size=64):
    """Yields (prompt, completion, finished, a score of each judge), n for each prompt in order; long prompts are
    trimmed at the left; None for what a judge does not apply to. judges: of `scorers_of`."""
    limit, room = limits(policy, a)
    encoded, long = encode_prompts(policy.tokenizer, prompts, room, "trim")
    rows = [(prompt, ids) for prompt, ids in zip(prompts, encoded) for _ in range(a.n)]
    if long:
        warn(f"warning: {policy.path}: {long} prompts longer than {room} tokens are trimmed at the left")
    for at in range(0, len(rows), batch_size):
        part = rows[at:at + batch_size]
        rollout = generate(policy.model, [ids for _, ids in part], limit, policy.tokenizer.eos, a.temperature,
                           runtime.generator(a.seed, at, 0, "sample"))
        scores = zip(*(judge(rollout).tolist() for judge in judges)) if judges else [()] * len(part)
        for (prompt, _), ids, finished, marks in zip(part, rollout.responses(), rollout.finished.tolist(), scores):
            yield prompt, policy.tokenizer.decode(ids), finished, runtime.finite(marks)


def scorers_of(policy, judges, prompts, a):
    """What scores the policy's completions."""
    run = runtime.Precision(a.device, "float32")
    found = [rewards.RewardModel(j.model, j.tokenizer, run, j.path) if j.model else rewards.RewardFunction(
        j.path, policy.tokenizer, run, "--reward_model" if j.path == a.reward_model else "reward") for j in judges]
    mixture.give_columns(found, prompts, a.prompts or "the prompt")
    return found


def show(policies, judges, prompts, a, output):
    """Print, and write, all completions of some prompts as they are made -> {policy: [scores of a completion]}."""
    width, found = max(len(policy.path) for policy in policies), {policy.path: [] for policy in policies}
    scorers = [scorers_of(policy, judges, prompts, a) for policy in policies]
    names = [f"score{suffix}" for suffix in suffixes(judges)]
    progress = Progress(len(prompts) * a.n, "completions of each policy")
    for k, answers in enumerate(zip(*(
            complete(policy, own, prompts, a) for policy, own in zip(policies, scorers)))):
        if k % a.n == 0:
            say(f"\n{answers[0][0]} ...")
        for path, (prompt, completion, finished, scores) in zip(found, answers):
            marks = "".join(f" {spelled(score)}" for score in scores)
            say(f"  {path:<{width}}{marks} |{completion}{'' if finished else ' [cut]'}")
            row = {"checkpoint": path, "prompt": prompt, "completion": completion, "finished": finished}
            output.write(json.dumps(row | dict(zip(names, scores)), ensure_ascii=False) + "\n")
            found[path].append(scores)
        if a.output is None:
            all_printed()
        progress(k + 1)
    return found


def lines_from_standard_input(what, otherwise):
    """Yields prompts or turns, a line each, until end of input; asks for them on a terminal."""
    if sys.stdin is None:
        fail(f"standard input is closed: {otherwise}")
    try:
        while sys.stdin.isatty() and sys.stdout:
            yield clean(input(f"{what}> "))
        while line := sys.stdin.buffer.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                fail(f"standard input: a line of {LONGEST_LINE:,} bytes or more; each line is a {what}")
            yield line.decode().rstrip("\r\n")
    except (EOFError, KeyboardInterrupt):
        say()
    except UnicodeDecodeError as error:
        fail(f"standard input: not UTF-8 ({error.reason})")
    except OSError as error:
        fail(f"standard input: cannot be read ({error.strerror or error})")


def sample(policies, judges, a):
    """Completions of --prompt and --prompts, or of what a person types."""
    for policy in policies:
        limits(policy, a)
        for judge in (judge for judge in judges if judge.model):
            checkpoint.compatible(policy[1:3], policy.path, judge[1:3], judge.path)
    if a.rank or a.best:
        check_choice(policies, judges, a)
    prompts = [clean(p) for p in a.prompt] + (load_asked(a.prompts) if a.prompts else [])
    for line in blank_ends(prompts, "prompts"):
        warn(line)
    with opened(a, () if prompts else ["/dev/stdin"]) as output:
        if judges:
            say("scores by " + ", ".join(judge.path for judge in judges))
        if a.rank or a.best:
            choose(policies, judges, prompts, a, output)
        elif prompts:
            found = show(policies, judges, prompts, a, output)
            if judges:
                say()
            for k, judge in enumerate(judges):
                say(f"{judge.path}: " + "; ".join(
                    f"{path} {summary([scores[k] for scores in rows])}" for path, rows in found.items()))
        else:
            for prompt in lines_from_standard_input("prompt", "name prompts with --prompt or --prompts"):
                show(policies, judges, [prompt], a, output)
                if unprinted:  # whoever asked has gone
                    break


# ---- the answers to a prompt become a record

def check_choice(policies, judges, a):
    """Exits 2 where --rank and --best have nothing to choose from, nothing to choose by, or no file."""
    option = "--rank" if a.rank else "--best"
    if len(judges) != 1:
        fail(f"{option}: needs one reward model, found {', '.join(judge.path for judge in judges) or 'none'}; name it "
             "with --reward_model")
    if not a.output or not (a.prompt or a.prompts):
        fail(f"{option}: writes records; name their file with --output, and the prompts' with --prompts")
    if a.n * len(policies) < 2:
        fail(f"{option}: chooses among the answers to a prompt; ask for several with --n")
    if a.temperature == 0 and a.n > 1:
        fail(f"--temperature 0: the {a.n} answers of a policy would be the same; leave it out")


def choose(policies, judges, prompts, a, output):
    """--rank and --best: the answers of all policies to each prompt, as one record that stage 2, or stage 1, reads.

    Left out and counted: answers that were cut, answers whose text another has, prompts with too few left.
    """
    counts, progress, scores = Counter(), Progress(len(prompts) * a.n, "completions of each policy"), {}
    streams = [complete(policy, scorers_of(policy, judges, prompts, a), prompts, a) for policy in policies]
    for k, prompt in enumerate(prompts):
        ended = [(score, policy.path, text) for policy, stream in zip(policies, streams)
                 for _, text, finished, (score,) in itertools.islice(stream, a.n) if finished]
        answers = [answer for answer in ended if answer[0] is not None]  # None: the reward does not apply
        counts["cut"] += a.n * len(policies) - len(ended)
        counts["unscored"] += len(ended) - len(answers)
        ranked = {}
        for score, path, text in sorted(answers, key=lambda answer: -answer[0]):
            ranked.setdefault(text, (score, path))
        counts["repeated"] += len(answers) - len(ranked)
        if len(ranked) > a.rank:
            record = ranking(prompt, ranked, several=len(policies) > 1) if a.rank else {
                **asked(prompt), "completion": next(iter(ranked)), "score": next(iter(ranked.values()))[0]}
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            marks = [score for score, _ in ranked.values()]
            counts["records"] += 1
            counts["answers"] += len(marks)
            counts["pairs"] += sum(x > y for x, y in itertools.combinations(marks, 2))
            for name, mark in (("best", marks[:1]), ("all", marks)):
                scores.setdefault(name, []).extend(mark)
        progress((k + 1) * a.n)
    if not counts["records"]:
        fail(f"{'--rank' if a.rank else '--best'}: no prompt has {'two answers that differ' if a.rank else 'an answer'}"
             f" and end within {limits(policies[0], a)[0]} tokens; raise --response_length or --n")
    pairs = f", {counts['pairs']:,} pairs" if a.rank else ""
    say(f"{counts['records']:,} records ({counts['answers']:,} answers{pairs}) of {len(prompts):,} prompts; left out: "
        f"{counts['cut']:,} answers that were cut, {counts['repeated']:,} that repeat another, "
        + f"{counts['unscored']:,} to which the reward does not apply, " * bool(counts["unscored"])
        + f"{len(prompts) - counts['records']:,} prompts")
    say(f"best answers: {summary(scores['best'])}; all: {summary(scores['all'])}" + (
        f"; KL of the best from {policies[0].path} <= {best_of_n_kl(a.n):.2f} nats, where no answer was left out"
        if len(policies) == 1 else ""))


def ranking(prompt, ranked, several):
    """A record for stage 2: answers best first. ranked: {text: (score, who wrote it)}, in that order."""
    scores, paths = zip(*ranked.values())
    return {**asked(prompt), "completions": [*ranked], "scores": [*scores],
            **({"checkpoints": [*paths]} if several else {})}


def asked(prompt):
    """A prompt as the column of a record: its messages, if it is made of some."""
    if not isinstance(prompt, Talk):
        return {"prompt": prompt}
    return {"messages": [{"role": m.role, "content": m.text, **(
        {"tool_calls": [{"type": "function", "function": json.loads(call)} for call in m.calls]} if m.calls else {})}
        for m in prompt.messages]}


# ---- a conversation

def converse(policy, a):
    """--chat: answers a person's turns, a line each, as the newest of a conversation."""
    (limit, room), talk, turn = limits(policy, a), [], 0
    tokenizer = policy.tokenizer
    say(f"{policy.path} reads {describe(tokenizer.form)}; end of input (Ctrl-D) or Ctrl-C ends the conversation")
    with opened(a, ["/dev/stdin"]) as output:
        for line in lines_from_standard_input("turn", "--chat takes the turns from it"):
            if not line.strip():
                continue
            kept, turn = [*talk, Message("user", line)], turn + 1
            while kept and not (prompt := encode_prompts(tokenizer, [Talk.prompt(kept, "--chat")], room, "drop")[0]):
                kept = kept[2:]  # the oldest turn and its answer
            if not kept:
                say(f"(this turn is not answered: it takes more than the {room} tokens that an answer leaves to it)")
                continue
            if dropped := (len(talk) + 1 - len(kept)) // 2:
                say(f"(the context is full: the oldest {f'{dropped} turns are' if dropped > 1 else 'turn is'} dropped)")
            rollout = generate(policy.model, prompt, limit, tokenizer.eos, a.temperature,
                               runtime.generator(a.seed, turn, 0, "sample"))
            finished, answer = bool(rollout.finished), tokenizer.decode(rollout.responses()[0])
            say(f"{answer}{'' if finished else ' [cut]'}")
            output.write(json.dumps({"checkpoint": policy.path, "prompt": prompt[0].text, "completion": answer,
                                     "finished": finished}, ensure_ascii=False) + "\n")
            talk = [*kept, Message("assistant", answer if tokenizer.form else answer.removeprefix(" "))]
            if unprinted:  # whoever asked has gone
                break


# ---- reward models score records

def read_texts(path):
    """-> [("file:line", record)], and what each record holds: a prompt and its completions, best first."""
    records = []
    for where, record in read_records(path):
        try:
            records.append((where, runtime.finite(record)))
        except RecursionError:
            fail(f"{where}: a column is nested too deeply to be written back")
    where, first = records[0]
    if present(first, "chosen", "rejected", "completions"):
        return records, load_preferences(path)
    if not present(first, "completion", "messages", "text"):
        refuse(where, first, "a reward model scores answers, and here are none: give 'completion', or 'chosen' and "
                             "'rejected', or name a policy too, which writes them")
    return records, [Preference(d.prompt, [d.completion]) for d in load_demonstrations(path, trained=False)]


def score_columns(record, scores, suffix):
    """The scores of a record's texts, as columns to be added to it."""
    if present(record, "completions"):
        return {f"score_completions{suffix}": scores}
    names = ("score_chosen", "score_rejected") if len(scores) == 2 else ("score",)
    return {f"{name}{suffix}": score for name, score in zip(names, scores)}


def pick_suffixes(records, texts, judges):
    """Ends of the columns' names, with which no column of the records would be lost."""
    def taken(ends):
        return next(((where, record, name) for (where, record), p in zip(records, texts) for end in ends
                     for name in score_columns(record, p.completions, end) if name in record), None)

    plain = suffixes(judges)
    if len(judges) == 1 and (found := taken(plain)):
        ends = suffixes(judges, one_is_plain=False)
        say(f"the records have a column {found[2]!r} of their own: the new one is {found[2] + ends[0]!r}")
    else:
        ends = plain
    if found := taken(ends):
        refuse(*found[:2], f"the column {found[2]!r} is there already; leave it out")
    return ends


def encode(judge, texts, a):
    """-> Rows of each record's texts, None for one that is too long. Exits 2 where all are."""
    context = judge.model.config.block_size
    way = a.long_prompts or ("trim" if judge.options.get("long_prompts") == "trim" else "drop")
    progress, rows = Progress(len(texts), f"records encoded for {judge.path}"), []
    for k, p in enumerate(texts):
        rows.append([encode_row(judge.tokenizer, p.prompt, c, context, way) for c in p.completions])
        progress(k + 1)
    flat = [row for record in rows for row in record]
    if not any(flat):
        fail(f"{a.prompts}: no text fits the context of {judge.path}, {context} tokens; use --long_prompts trim")
    if long := too_long(flat, context, way):
        say(f"{judge.path}: {long}" + (", their score is null" if way == "drop" else ""))
    return rows


@torch.no_grad()
def score(judge, rows, run):
    """Rows of some records' texts, some of them None -> their scores, in the same order and lists."""
    kept = [row for record in rows for row in record if row]
    scores = evaluate.score_all(judge.model, run, kept, judge.tokenizer.eos).tolist() if kept else []
    for row, number in zip(kept, scores):
        if not abs(number) < 1e300:
            fail(f"{judge.path}: gives the score {number} to {judge.tokenizer.decode(row.ids)[:60]!r}")
    left = iter(scores)
    return [[next(left) if row else None for row in record] for record in rows]


def accuracy(texts, rows, scores):
    """Over all pairs that stage 2 would learn from: "right on 0.756 of 1,234 pairs (95% 0.731-0.780)"."""
    pairs = [(rows[k][i], rows[k][j], scores[k][i], scores[k][j]) for k, p in enumerate(texts) for i, j in p.pairs()
             if rows[k][i] and rows[k][j] and rows[k][i].ids != rows[k][j].ids]
    if not pairs:
        return "no pair of texts that differ and are not tied"
    share, low, high = evaluate.accuracy_with_interval(
        *(torch.tensor([pair[k] for pair in pairs]) for k in (2, 3)),
        [(tuple(better.ids), tuple(worse.ids)) for better, worse, *_ in pairs])
    interval = evaluate.spelled(low, high, len(pairs), "95% ")
    return f"right on {share:.3f} of {len(pairs):,} pair{'s' * (len(pairs) != 1)} {interval}"


def score_records(judges, a, batch_size=256):
    """Scores of all records of --prompts, printed or, in their order, written as they are made."""
    if not a.prompts:
        fail(f"{judges[0].path}: holds a reward model, expected an SFT model or a policy, which writes answers; or "
             "name a file of answers to score with --prompts")
    for name in [*a.given, *(name for name in ("prompt", "reward_model", "rank", "best") if getattr(a, name))]:
        fail(f"--{name}: has no effect on reward models; name a policy too, or leave it out")
    if functions := [judge.path for judge in judges if not judge.model]:
        fail(f"{functions[0]}: a function scores what policies write; name a policy too")
    records, texts = read_texts(a.prompts)
    ends, run = pick_suffixes(records, texts, judges), runtime.Precision(a.device, "float32")
    rows = [encode(judge, texts, a) for judge in judges]
    found, progress = [[] for _ in judges], Progress(len(texts), "records scored")
    with opened(a) as output:
        if a.output is None:
            say("scores by " + ", ".join(judge.path for judge in judges))
        for at in range(0, len(texts), batch_size):
            stop = min(at + batch_size, len(texts))
            for judge, all_rows, scores in zip(judges, rows, found):
                scores += score(judge, all_rows[at:stop], run)
            for k in range(at, stop):
                marks = [scores[k] for scores in found]
                if a.output is None:
                    show_scores(texts[k], marks)
                row = records[k][1]
                for end, mark in zip(ends, marks):
                    row = row | score_columns(row, mark, end)
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
            progress(stop)
        if a.output is None:
            say()
        for judge, all_rows, scores in zip(judges, rows, found):
            flat = [mark for record in scores for mark in record if mark is not None]
            say(f"{judge.path}: {len(flat):,} text{'s' * (len(flat) != 1)}, {summary(flat)}" + (
                f"; {accuracy(texts, all_rows, scores)}" if any(len(p.completions) > 1 for p in texts) else ""))


def show_scores(p, marks):
    """A record's prompt, and each of its texts behind its scores. marks: a list a reward model."""
    say(f"\n{escaped(p.prompt)} ...")
    for k, text in enumerate(p.completions):
        scores = (mark[k] for mark in marks)
        say("  " + " ".join(f"{spelled(s):>6}" for s in scores) + f" |{escaped(text)}")
    all_printed()


# ---- the command

def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    a = parse(argv)
    runtime.check_output(a.output)
    if a.output is None:
        all_printed()
    a.device = runtime.pick_device(a.device)
    models = [load(path, a.device) for path in a.checkpoints]
    models += [load(a.reward_model, a.device, ["rm"])] if a.reward_model else []
    policies, judges = ([m for m in models if (m.stage == "rm") == rm] for rm in (False, True))
    if a.chat and judges:
        fail(f"--chat: {judges[0].path} holds a reward model, expected an SFT model or a policy, which answers")
    if a.chat:
        converse(policies[0], a)
    elif policies:
        sample(policies, judges, a)
    else:
        score_records(judges, a)
    if a.output is None:
        all_printed()


if __name__ == "__main__":
    launch(main)
