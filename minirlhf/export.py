"""Models out, and what a model is: `python -m minirlhf.pretrained export CKPT OUT`, and `... inspect PATH`.

    folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json
    .pt:    with --weights_only, a checkpoint without what it takes to go on training

`transformers` reads such a folder, and so does pretrained.py: a language model's weights come back to the last bit.
Invariants: whatever is there already stays; what is written has its name when it is whole, not before.

Left out: shards and half precision. transformers makes both of a folder: `from_pretrained(FOLDER, dtype="bfloat16")`,
then `save_pretrained(OTHER, max_shard_size="5GB")`.
"""
import contextlib
import fcntl
import json
import os
import shutil
import struct

import torch

from minirlhf import checkpoint, pretrained, runtime, sizes
from minirlhf import tokenizer as tokenizers
from minirlhf.adapters import layers_of
from minirlhf.config import Parser, all_printed, escaped, fail, fitting, one_line, say, unprinted

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CLASSES = {"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),  # for a language model, for a reward model
           "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
           "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
           "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification")}
EXPORT = """\
OUT becomes a folder that transformers reads with from_pretrained, model and tokenizer: config.json, model.safetensors
in float32, tokenizer.json, tokenizer_config.json, generation_config.json. A reward model becomes a sequence classifier
with one label. Adapters are added to the weights. What is there already is never replaced."""
INSPECT = """\
Says what PATH is: a checkpoint of this program, a folder or a .gguf file of another; whether this program takes it, and
if not, why not; its size, its tokenizer, and the memory that the stages need for it. Exit status 2 if it is not taken.\
"""


# ---- a model in the words of transformers

def family_of(config, path):
    """The model_type of transformers that computes what a model with these sizes does."""
    if config.family == "gpt2":
        return "gpt2"
    if config.qkv_bias and config.qk_norm:
        fail(f"{path}: has biases on queries, keys and values as Qwen2, and norms as Qwen3: no model of transformers "
             "has both")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if family == "llama" and config.n_embd % config.n_head:
        fail(f"{path}: a width of {config.n_embd} with {config.n_head} heads: transformers takes a Llama only where "
             "the one is a multiple of the other")
    return family


def config_json(model, tokenizer, family, padding, constant):
    """config.json's values. padding: the id that pads a batch; constant: what a classifier's scores lack."""
    c, scalar = model.config, model.head == "scalar"
    values = {"architectures": [CLASSES[family][scalar]], "model_type": family, "torch_dtype": "float32",
              "bos_token_id": tokenizer.opening, "eos_token_id": tokenizer.eos,
              "vocab_size": max(c.vocab_size, padding + 1), "tie_word_embeddings": c.tied}
    if family == "gpt2":
        values |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": None,
                   "n_positions": c.block_size, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                   "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        values |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
                   "hidden_size": c.n_embd, "head_dim": c.head_size, "intermediate_size": c.n_inner,
                   "max_position_embeddings": c.block_size, "hidden_act": "silu", "rms_norm_eps": c.norm_eps,
                   "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    if scalar:
        values |= {"pad_token_id": padding, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return values | ({pretrained.CONSTANT: constant} if constant else {})


def tensors(model, state, family):
    """Yields (name, tensor) as transformers' class has them. state: the model's weights."""
    prefix = "transformer." if family == "gpt2" else "model."
    for name, tensor in state.items():
        names = pretrained.their_names(name, model.config, gguf=False)
        tensor = tensor.T if pretrained.is_transposed(name, model.config) else tensor
        parts = tensor.split(pretrained.rows_of(name, model.config, len(names))) if len(names) > 1 else [tensor]
        for their_name, part in zip(names, parts):
            yield ("" if their_name.startswith(("lm_head.", "score.")) else prefix) + their_name, part


def folded(model):
    """A reward model's weights without b, gain and bias, which no classifier of transformers has; and the constant that
    its scores then lack.

    The score is (h.w + b) gain + bias = h.w' + c, where w' = gain w and c = gain b + bias. GPT-2's last norm has a
    bias, and feeds the head alone: with c w' / |w'|^2 more of it, h.w' is larger by c. Llama's has none.
    """
    state = model.state_dict()
    gain, bias, b = (state.pop(name).double() for name in ("gain", "bias", "score_head.bias"))
    w, constant = gain * state["score_head.weight"].double(), gain * b + bias
    state["score_head.weight"] = w.float()
    if "ln_f.bias" in state and w.any():
        state["ln_f.bias"] = (state["ln_f.bias"].double() + constant * w[0] / w.square().sum()).float()
        return state, 0.0
    return state, float(constant.float())


def padding_of(tokenizer, vocab_size):
    """(id, text) of a classifier's padding token: a special token that neither opens a row nor ends one, else a new
    one behind the vocabulary. The score is read at the last token that is not padding, which eos may be."""
    spare = sorted((i, text) for text, i in tokenizer.special.items() if i not in (tokenizer.eos, tokenizer.opening))
    text = "<|padding|>"
    while text in tokenizer.special:
        text += "|"
    return spare[0] if spare else (vocab_size, text)


# ---- a folder

def write_folder(folder, model, tokenizer, options, path):
    """The files of a model, in a folder that is there -> the class that reads them, and lines about what it lacks.

    options: those of its training; path: what the model is called in a refusal.
    """
    family, scalar, lacks = family_of(model.config, path), model.head == "scalar", []
    named = {i: text for text, i in tokenizer.special.items()}
    for i in (tokenizer.opening, tokenizer.eos):
        if i not in named:
            fail(f"{path}: token {i} opens a row or ends an answer and has no name: no tokenizer.json can say so")
    state, constant, padding = model.state_dict(), 0.0, (tokenizer.eos, named[tokenizer.eos])
    if scalar:
        state, constant = folded(model)
        padding = padding_of(tokenizer, model.config.vocab_size)
        if padding[0] == model.config.vocab_size:
            state["wte.weight"] = torch.cat([state["wte.weight"], torch.zeros(1, model.config.n_embd)])
    special = tokenizer.special | {padding[1]: padding[0]}
    write_json(folder, "tokenizer.json", tokenizers.to_json(tokenizer, special))
    write_json(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": named[tokenizer.opening],
        "eos_token": named[tokenizer.eos], "pad_token": padding[1], "clean_up_tokenization_spaces": False,
        "padding_side": "right" if scalar else "left", "model_max_length": model.config.block_size,
        "model_input_names": ["input_ids", "attention_mask"]})
    tokenizers.from_folder(folder, model.config.vocab_size)  # refuses what could not come back
    write_json(folder, "config.json", config_json(model, tokenizer, family, padding[0], constant))
    if not scalar:  # the whole distribution, as in training
        length = options.get("response_length")
        write_json(folder, "generation_config.json", {
            "bos_token_id": tokenizer.opening, "eos_token_id": tokenizer.eos, "pad_token_id": padding[0],
            "do_sample": True, "temperature": options.get("temperature") or 1.0, "top_k": 0, "top_p": 1.0,
            **({"max_new_tokens": length} if length else {})})
    write_safetensors(os.path.join(folder, "model.safetensors"), dict(tensors(model, state, family)))
    if constant:
        lacks.append(f"its scores lack {constant:+.6g}, the same for every text, for which that class has no place: it "
                     f"is {pretrained.CONSTANT} in config.json, which this program adds and others must")
    if family == "qwen2" and (tokenizer.pattern, tokenizer.nfc) != (tokenizers.QWEN2, True):
        lacks.append("its tokenizer splits texts otherwise than Qwen2's, which AutoTokenizer of transformers 5 takes "
                     "for every Qwen2: read it with PreTrainedTokenizerFast.from_pretrained")
    return CLASSES[family][scalar], lacks


def write_json(folder, name, values):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(values, f, ensure_ascii=False, indent=2)
        f.write("\n")


def write_safetensors(path, named):
    """{name: float32 tensor} as `pretrained.read_safetensors` reads it; each is copied while it is written, at most."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in named.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that numbers begin at a multiple of 8 bytes
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for tensor in named.values():
            f.write(tensor.contiguous().numpy())


@contextlib.contextmanager
def appearing(folder):
    """A folder to fill, which gets its name when all that is in it is on the disk: until then it is FOLDER.tmp, which
    after a kill the next export of that name takes over.

    Exits 1 naming path and size where the disk is full; of what fails or is refused within nothing stays.
    """
    temporary = f"{os.path.normpath(folder)}.tmp"
    files, whole, lock = [os.path.join(temporary, name) for name in FILES], False, claimed(temporary)
    try:
        yield temporary
        for file in filter(os.path.exists, files):
            runtime.sync_folder(file)
        runtime.sync_folder(temporary)
        os.rename(temporary, folder)
        whole = True
        runtime.sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        size = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        raise SystemExit(one_line(f"error: {folder}: could not be written ({error.strerror or error}) after {size:,} "
                                  "bytes"))
    finally:
        if not whole:
            shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def claimed(temporary):
    """Makes a folder, or takes that of an export that was killed -> its lock. Exits 2 where it is somebody else's."""
    try:
        os.makedirs(temporary, exist_ok=True)
        if odd := sorted({*os.listdir(temporary)} - {*FILES}):
            fail(f"{temporary}: holds {odd[0]}, which no export wrote; this one would write there: move it away")
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none
        except OSError:
            os.close(lock)
            raise
    except BlockingIOError:
        fail(f"{temporary}: another export is writing there; wait for it, or name another folder")
    except OSError as error:
        fail(f"{temporary}: cannot be written ({error.strerror})")
    return lock


def check_out(out, weights_only):
    """Exits 2 where OUT cannot be made, or is there already."""
    if os.path.lexists(os.path.abspath(out)):
        fail(f"{out or '.'}: exists, and nothing is replaced; name another")
    if not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        fail(f"{out}: cannot be written (there is no folder {os.path.dirname(out)})")
    if weights_only and not out.endswith(".pt"):
        fail(f"{out}: --weights_only writes one file; let its name end in .pt")
    if not weights_only and out.endswith((".pt", ".gguf", ".safetensors", ".bin")):
        fail(f"{out}: is to be a folder, as transformers reads it"
             + ("; add --weights_only for a checkpoint" if out.endswith(".pt") else ""))


def export(path, out, weights_only=False):
    """A model of this program, or of another, as a folder; or a checkpoint as a smaller one."""
    check_out(out, weights_only)
    if weights_only:
        if checkpoint.is_foreign(checkpoint.located(path)):
            fail(f"{path}: a model of another program, which holds nothing but weights; --weights_only is for "
                 "checkpoints of this one")
        payload = checkpoint.read(path, [*checkpoint.STAGES])
        say(checkpoint.write(out, payload | {"training": {}}).strip())
        return
    with appearing(out) as folder:
        model, tokenizer, payload = checkpoint.load(path, [*checkpoint.STAGES], torch.device("cpu"))
        with fitting(path):
            name, lacks = write_folder(folder, model, tokenizer, payload["options"], path)
    size = sum(os.path.getsize(os.path.join(out, file)) for file in os.listdir(out))
    say(f"written: {out}, {checkpoint.STAGES[payload['stage']]} as {name}, {size / 1e6:.1f} MB")
    for line in lacks:
        say(line)


# ---- what a model is

def inspect(path):
    """Prints what a path is, and of a model that is taken its size, tokenizer and memory. Exits 2 where it is not."""
    place = checkpoint.located(path)
    say(f"{path}: {what_it_is(place)}")
    model, tokenizer, payload = checkpoint.load(path, [*checkpoint.STAGES], torch.device("cpu"))
    c, facts = model.config, [f"taken as {checkpoint.STAGES[payload['stage']]}"]
    if "base" in payload:
        last = payload["base"]["adapters"][-1]
        facts.append(f"adapters of rank {last['lora_rank']} in {last['lora_layers']} of {c.n_layer} blocks, on "
                     + escaped(str(payload["base"]["path"])))
    if not checkpoint.is_foreign(place):
        facts.append("with what --resume needs" if payload["training"] else "weights only")
    say("  " + "; ".join(facts))
    heads = f"{c.n_head} heads" + (f", {c.n_kv_head} of keys and values" if c.n_kv_head < c.n_head else "")
    say(f"  model: {c.family}'s family, {c.n_layer} layers of {c.n_embd}, {heads}, a context of {c.block_size:,} "
        f"tokens: {runtime.count_parameters(model):,} parameters")
    named = {i: escaped(text) for text, i in tokenizer.special.items()}
    say(f"  tokenizer: {escaped(tokenizer.name)}, {tokenizer.vocab_size:,} tokens; {named.get(tokenizer.opening, '')} "
        f"({tokenizer.opening}) opens a row, {named.get(tokenizer.eos, '')} ({tokenizer.eos}) ends an answer")
    for line in memory_lines(c):
        say(f"  {line}")


def what_it_is(path):
    """Words for what lies at a path. Exits 2 where that can be no model, with what to name instead."""
    if os.path.isdir(path):
        with pretrained.readable(path):
            there = {*os.listdir(path)}
        if "ckpt.pt" in there:
            return "a folder with a checkpoint of this program"
        if pretrained.is_foreign(path):
            config = pretrained.read_json(os.path.join(path, "config.json"))
            return f"a folder of another program, model_type {json.dumps(config.get('model_type'))[:60]}"
        fail(f"{path}: a folder that holds no model: " + (
            "adapters of peft; merge them into their model (merge_and_unload) and save that" if "adapter_config.json"
            in there else "a run without a checkpoint so far" if "config.json" in there else
            "neither ckpt.pt nor config.json"))
    if not os.path.isfile(path):
        fail(f"{path}: " + ("a pipe or device" if os.path.exists(path) else "no such file or folder"))
    with pretrained.readable(path), open(path, "rb") as f:
        magic = f.read(4)
    if path.endswith(".gguf"):
        return f"a .gguf file of another program, {os.path.getsize(path) / 1e6:.1f} MB"
    if path.endswith((".safetensors", ".bin")):
        fail(f"{path}: weights alone; name the folder that has their config.json and tokenizer too")
    if magic == b"GGUF":
        fail(f"{path}: a GGUF file, which is known by its name: let it end in .gguf")
    return f"a file, {os.path.getsize(path) / 1e6:.1f} MB"


def memory_lines(config, rank=16):
    """What a model of these sizes takes in memory: lines that say it for each stage.

    Counted in float32: weights (4 bytes a number), gradients (4) and AdamW's two moments (8) of what learns. Stages 1
    and 2 have one network. Stage 3 has four, of which two learn, one after the other; with adapters of rank `rank` in
    all blocks, reference and reward model are what policy and value network stand on.
    """
    def amount(size):
        return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"

    model = sizes.outline(config, "lm")
    linear = [layer for block in model.h for *_, layer in layers_of(block, torch.nn.Linear)]
    n, a = runtime.count_parameters(model), rank * sum(layer.in_features + layer.out_features for layer in linear)
    return [f"memory: weights {amount(4 * n)}; this machine has {sizes.memory_of(torch.device('cpu')) / 1e9:.1f} GB",
            f"  stages 1 and 2: {amount(4 * n + 16 * a)} with adapters of rank {rank}, {amount(16 * n)} if all learns",
            f"  stage 3: {amount(2 * (4 * n + 12 * a) + 4 * a)} with adapters of rank {rank}, "
            f"{amount(4 * 4 * n + 2 * 8 * n + 4 * n)} if all learns",
            "  counted: weights, gradients, moments; activations, logits and the rollout's cache come on top"]


# ---- the command

def main(argv=None):
    unprinted.clear()  # of an earlier call, as in a notebook
    parser = Parser(prog="python -m minirlhf.pretrained", description="Takes models out, and says what a model is.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="write a model as transformers reads it", description=EXPORT)
    command.add_argument("model", metavar="CKPT", help="ckpt.pt of any stage, its folder, or another program's model")
    command.add_argument("out", metavar="OUT", help="the folder to be made; with --weights_only a file, OUT.pt")
    command.add_argument("--weights_only", action="store_true", help="write a checkpoint instead that holds the model "
                         "(of adapters on another program's model, the adapters) and not what --resume needs")
    command = commands.add_parser("inspect", help="say what a model is, and whether it is taken", description=INSPECT)
    command.add_argument("model", metavar="PATH", help="a file or folder")
    a = parser.parse_args(argv)
    if a.command == "inspect":
        all_printed()
        inspect(a.model)
        all_printed()
    else:
        export(a.model, a.out, a.weights_only)
