"""Completions of one or more checkpoints side by side: `python -m minirlhf.sample CKPT [CKPT ...]`.

Each prompt's n-th completion draws the same random numbers in every checkpoint, so that differences are the models'.
"""
import argparse
import json
import sys

from minirlhf import checkpoint, kernels, runtime
from minirlhf.config import fail, launch, positive_int, say, temperature_number
from minirlhf.data import clean, load_prompts, trim_left
from minirlhf.generate import generate


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m minirlhf.sample", allow_abbrev=False, description="Completions of checkpoints, side by side. "
        "Without --prompt and --prompts it asks for prompts until end of input.")
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT",
                        help="ckpt.pt of train_sft.py or train_ppo.py, or its folder")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help='prompts from a file of {"prompt": ...} records')
    parser.add_argument("--n", type=positive_int, default=1, help="completions a prompt (default: 1)")
    parser.add_argument("--temperature", type=temperature_number, default=1.0,
                        help="0 takes the likeliest token (default: "
                        "%(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same completions (default: "
                        "%(default)s)")
    parser.add_argument("--response_length", type=positive_int,
                        help="longest completion in tokens (default: 48, or half "
                        "the context of a model where that is less)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--output", metavar="FILE.jsonl",
                        help="also write one object a completion: checkpoint, prompt, completion, finished (ended with "
                        "eos)")
    return parser.parse_args(argv)


def limits(model, a, path):
    """Most tokens of a completion and of a prompt."""
    limit = a.response_length or min(48, model.config.block_size // 2)
    if limit >= model.config.block_size:
        fail(f"--response_length {limit}: the context of {path} is {model.config.block_size} tokens")
    return limit, model.config.block_size - limit


def complete(model, tokenizer, prompts, a, path, batch_size=64):
    """Yields (prompt, completion, finished), n for each prompt in order; long prompts are trimmed at the left."""
    limit, room = limits(model, a, path)
    rows = [(prompt, tokenizer.encode_prompt(prompt)) for prompt in prompts for _ in range(a.n)]
    long = sum(len(ids) > room for _, ids in rows) // a.n
    if long:
        print(f"warning: {path}: {long} prompts longer than {room} tokens are trimmed at the left", file=sys.stderr)
    for at in range(0, len(rows), batch_size):
        part = rows[at:at + batch_size]
        rollout = generate(model, [trim_left(ids, room) for _, ids in part], limit, tokenizer.eos,
                           a.temperature, runtime.generator(a.seed, at, 0, "sample"))
        for (prompt, _), ids, finished in zip(part, rollout.responses(), rollout.finished.tolist()):
            yield prompt, tokenizer.decode(ids), finished


def main(argv=None):
    a = parse(argv)
    device = runtime.pick_device(a.device)
    prompts = [clean(p) for p in a.prompt] + (load_prompts(a.prompts) if a.prompts else [])
    models = []
    for path in a.checkpoints:
        models.append((path, *checkpoint.load(path, ["sft", "ppo"], device)[:2]))
        limits(models[-1][1], a, path)
        kernels.pick_matmul(models[-1][1])
    try:
        output = open(a.output, "wb", buffering=0) if a.output else None
    except OSError as error:
        fail(f"--output {a.output}: cannot be written ({error.strerror})")

    def show(prompts):
        answers = [list(complete(model, tokenizer, prompts, a, path)) for path, model, tokenizer in models]
        width = max(len(path) for path, _, _ in models)
        for k in range(len(prompts) * a.n):
            if k % a.n == 0:
                say(f"\n{answers[0][k][0]} ...")
            for (path, _, _), rows in zip(models, answers):
                prompt, completion, finished = rows[k]
                say(f"  {path:<{width}} |{completion}{'' if finished else ' [cut]'}")
                if output:
                    row = {"checkpoint": path, "prompt": prompt, "completion": completion, "finished": finished}
                    try:
                        output.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                    except OSError as error:
                        raise SystemExit(f"error: --output {a.output}: could not be written ({error.strerror})")

    if prompts:
        show(prompts)
    while not prompts:
        try:
            line = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            say()
            break
        show([clean(line)])
    if output:
        output.close()


if __name__ == "__main__":
    launch(main)
