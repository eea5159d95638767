"""A checkpoint gives back every bit, and a file that is not one is named and refused before it can do harm."""
import hashlib
import os
import pickle
import re
import zipfile
from dataclasses import dataclass

import pytest
import torch

from conftest import LLAMA
from minirlhf import checkpoint
from minirlhf.tokenizer import Tokenizer


@dataclass
class Options:
    learning_rate: float = 1e-3
    out_dir: str = "out/x"


@pytest.fixture
def save(tmp_path, make_model):
    """save(stage, path, **replaced) -> the path of a checkpoint of a small model, and that model."""
    def make(stage="sft", path=tmp_path / "ckpt.pt", **replaced):
        model = make_model("scalar" if stage == "rm" else "lm", dropout=0.2, vocab_size=258)
        parts = dict(stage=stage, model=model, tokenizer=Tokenizer.train(["abab"] * 3, 258), options=Options(),
                     info={"accuracy": 0.8}, training={"step": 3})
        checkpoint.save(str(path), **parts | replaced)
        return str(path), model
    return make


def rewrite(path, change):
    """The checkpoint with its payload changed in place."""
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)


def test_round_trip_is_bit_equal(save):
    """Weights, buffers, optimizer state, tokenizer, options, info, head: all as they were; in eval mode."""
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([w])
    w.square().sum().backward(), optimizer.step()
    path, model = save("rm", training={"step": 7, "optimizer": optimizer.state_dict(), "kl_coef": 0.1})
    loaded, tokenizer, payload = checkpoint.load(path, ["sft", "rm"], torch.device("cpu"))
    assert loaded.head == "scalar" and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys() and "gain" in model.state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert tokenizer.encode("abab") == [256, 256] and tokenizer.eos == 257
    assert payload["options"] == {"learning_rate": 1e-3, "out_dir": "out/x"} and payload["info"] == {"accuracy": 0.8}
    assert payload["training"]["step"] == 7 and payload["training"]["kl_coef"] == 0.1
    state = payload["training"]["optimizer"]["state"][0]
    assert all(torch.equal(state[key], value) for key, value in optimizer.state_dict()["state"][0].items())


def test_dropout_is_the_loader_s_choice(save):
    """A model comes back without dropout unless training goes on with it."""
    path, _ = save()
    payload = checkpoint.read(path, ["sft"])
    assert checkpoint.build(payload, path, "cpu")[0].config.dropout == 0.0
    assert checkpoint.build(payload, path, "cpu", dropout=0.3)[0].h[0].attn.dropout == 0.3


def test_others_get_the_weights_that_were_named(save, make_model):
    """weights: the best model is what is loaded, though the last one was given."""
    best = make_model(seed=5, vocab_size=258)
    path, last = save(weights=best.state_dict())
    loaded, _, _ = checkpoint.load(path, ["sft"], "cpu")
    assert torch.equal(loaded.wte.weight, best.wte.weight) and not torch.equal(loaded.wte.weight, last.wte.weight)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_llama_comes_back(save, make_model, head):
    """Its sizes and weights, an output of its own included."""
    model, stage = make_model(head, vocab_size=258, **LLAMA), "rm" if head == "scalar" else "sft"
    loaded, _, _ = checkpoint.load(save(stage, model=model)[0], [stage], "cpu")
    assert loaded.config == model.config and loaded.head == head
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_gpt2_is_described_as_ever(save):
    """Six values, which a version that knew no other family reads too."""
    payload = checkpoint.read(save()[0], ["sft"])
    assert payload["config"] == {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 258, "block_size": 32,
                                 "dropout": 0.2}


# Damage


class Payload:
    """What a hostile pickle does when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_never_runs(save, tmp_path, refused):
    """A pickle that would make a folder is refused, in torch's format and bare, and the folder is not there."""
    path, mark = str(tmp_path / "evil.pt"), str(tmp_path / "mark")
    with open(path, "wb") as f:
        pickle.dump(Payload(mark), f)
    assert path in refused(checkpoint.read, path, ["sft"])
    torch.save({"format": 1, "stage": "sft", "model": Payload(mark)}, path)
    assert path in refused(checkpoint.read, path, ["sft"])
    assert not os.path.exists(mark)
    torch.load(path, weights_only=False)
    assert os.path.exists(mark)  # the trap was a real one


def test_a_flipped_byte_is_found(save, refused):
    """One bit wrong anywhere: in each part of the zip, in its headers and directory, in the seal itself."""
    path, _ = save()
    good = open(path, "rb").read()
    with zipfile.ZipFile(path) as archive:
        parts = [m.header_offset for m in archive.infolist()]
        assert len(parts) > 5 and archive.comment == hashlib.sha256(good[:-34] + b"\0\0").digest()
    for place in [*range(0, len(good), 997), *parts, *range(len(good) - 60, len(good))]:
        with open(path, "wb") as f:
            f.write(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        assert f"{path}: " in refused(checkpoint.read, path, ["sft"])


def test_a_file_without_a_seal_is_read(save, refused):
    """What torch.save alone wrote has its CRCs: one edited by a person loads, a wrong bit in a weight is found."""
    path, _ = save()
    rewrite(path, lambda payload: payload["info"].update(mine=1))
    assert checkpoint.read(path, ["sft"])["info"]["mine"] == 1
    good = open(path, "rb").read()
    with zipfile.ZipFile(path) as archive:
        weight = max(archive.infolist(), key=lambda m: m.file_size)
        place = good.index(archive.read(weight), weight.header_offset) + 100
    with open(path, "wb") as f:
        f.write(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
    assert "fails its checksum" in refused(checkpoint.read, path, ["sft"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_named(save, refused, share):
    """Cut anywhere, or empty."""
    path, _ = save()
    os.truncate(path, int(share * os.path.getsize(path)))
    assert f"{path}: " in refused(checkpoint.read, path, ["sft"])


def test_every_piece_of_a_large_file_is_looked_at(save):
    """It is read a megabyte at a time: whole, or a byte has changed in the first, the second or the third."""
    path, _ = save(training={"step": 3, "zeros": torch.zeros(700_000)})
    checkpoint.check_whole(path)
    content = open(path, "rb").read()
    assert len(content) > 5 << 19
    for at in (1 << 19, 3 << 19, 5 << 19):
        with open(path, "r+b") as f:
            f.seek(at)
            f.write(bytes([content[at] ^ 1]))
        with pytest.raises(checkpoint.Damaged, match="a byte of it has changed"):
            checkpoint.check_whole(path)
        open(path, "wb").write(content)


@pytest.mark.parametrize("stage, head", [("rm", "lm"), ("sft", "scalar")])
def test_a_stage_has_its_own_head(save, refused, stage, head):
    """A reward model gives scalars, the others logits."""
    path, _ = save(stage)
    rewrite(path, lambda payload: payload.update(head=head))
    assert f"{path}: holds {checkpoint.STAGES[stage]} with the head {head!r}" in refused(checkpoint.read, path, [stage])


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04", b'{"format": 1}'])
def test_another_kind_of_file_is_named(tmp_path, refused, content):
    """Text, a torn zip, JSON."""
    path = str(tmp_path / "x.pt")
    open(path, "wb").write(content)
    assert f"{path}: " in refused(checkpoint.read, path, ["sft"])


@pytest.mark.parametrize("thing", [torch.zeros(3), {"weight": torch.zeros(3)}, [1, 2]], ids=["tensor", "state", "list"])
def test_somebody_else_s_torch_file_is_named(tmp_path, refused, thing):
    """A file that torch reads and that is no checkpoint of ours."""
    torch.save(thing, tmp_path / "x.pt")
    assert "not a minirlhf checkpoint" in refused(checkpoint.read, str(tmp_path / "x.pt"), ["sft"])


def test_a_missing_file_names_the_script_that_makes_it(tmp_path, refused):
    """No such checkpoint: run train_rm.py first."""
    error = refused(checkpoint.read, str(tmp_path / "none.pt"), ["rm"])
    assert "none.pt" in error and "train_rm.py" in error


@pytest.mark.parametrize("stage, expected, words", [
    ("rm", ["sft"], ["a reward model", "expected an SFT model"]),
    ("sft", ["rm"], ["an SFT model", "expected a reward model"]),
    ("ppo", ["sft", "rm"], ["a PPO policy", "expected an SFT model or a reward model"]),
])
def test_another_stage_is_refused(save, refused, stage, expected, words):
    """A reward model given as a policy, or the reverse: stage found, stage expected."""
    path, _ = save(stage)
    error = refused(checkpoint.read, path, expected)
    assert path in error and all(word in error for word in words)


def test_a_newer_format_is_refused(save, refused):
    """Format 99, and this program reads up to its own."""
    path, _ = save()
    rewrite(path, lambda payload: payload.update(format=99))
    error = refused(checkpoint.read, path, ["sft"])
    assert path in error and "99" in error and str(checkpoint.FORMAT) in error


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("wpe.weight"), ["missing wpe.weight"]),
    (lambda state: state.update(extra=torch.zeros(2)), ["unexpected extra"]),
    (lambda state: state.update({"ln_f.bias": torch.zeros(17)}), ["ln_f.bias", "17", "16"]),
    (lambda state: state["h.1.mlp.c_fc.bias"].__setitem__(3, torch.nan), ["h.1.mlp.c_fc.bias", "not finite"]),
    (lambda state: state["wte.weight"].__setitem__((0, 0), -torch.inf), ["wte.weight", "not finite"]),
], ids=["missing", "extra", "shape", "NaN", "inf"])
def test_weights_that_do_not_fit_are_refused(save, refused, change, words):
    """Keys missing or extra, other shapes, numbers that are none: the file and the parameter."""
    path, _ = save()
    rewrite(path, lambda payload: change(payload["model"]))
    error = refused(checkpoint.load, path, ["sft"], "cpu")
    assert path in error and all(word in error for word in words)


@pytest.mark.parametrize("change, words", [
    (lambda p: p["config"].update(rope=True), ["does not fit", "rope"]),
    (lambda p: p.update(head="critic"), ["does not fit"]),
    (lambda p: p.update(model=[1, 2]), ["lacks model"]),
    (lambda p: p["tokenizer"]["ranks"].pop(), ["257 tokens", "258"]),
    (lambda p: p["tokenizer"]["ranks"].__setitem__(3, "ab"), ["does not fit", "twice"]),
    (lambda p: p["config"].update(n_layer=10 ** 9), ["does not fit", "1000000000 layers"]),
    (lambda p: p["config"].update(n_embd=10 ** 6), ["does not fit", "1000000"]),
    (lambda p: p["tokenizer"].pop("ranks"), ["does not fit", "ranks"]),
], ids=["config", "head", "model", "rank", "twice", "layers", "width", "ranks"])
def test_parts_that_do_not_fit_are_refused(save, refused, change, words):
    """A model of another program, or a tokenizer that lost a token: one line, no traceback."""
    path, _ = save()
    rewrite(path, change)
    error = refused(checkpoint.load, path, ["sft"], "cpu")
    assert path in error and all(word in error for word in words)


@pytest.mark.parametrize("change, words", [
    ({"family": "mamba"}, ["family 'mamba'"]), ({"family": 7}, ["family 7"]), ({"family": "gpt2"}, ["GPT-2's"]),
    ({"n_kv_head": 3}, ["n_kv_head 3"]), ({"n_kv_head": True}, ["n_kv_head is 'True'"]),
    ({"n_kv_head": 1}, ["attn.c_attn", "(48, 16)", "(36, 16)"]), ({"n_inner": -1}, ["n_inner is '-1'"]),
    ({"head_size": 7}, ["head_size 7"]), ({"head_size": 10 ** 9}, ["attn.c_attn", "1000000000"]),
    ({"rope_theta": float("nan")}, ["rope_theta is 'nan'"]), ({"rope_theta": 0.0}, ["rope_theta is '0.0'"]),
    ({"rope_theta": 10}, ["rope_theta is '10'"]), ({"norm_eps": float("inf")}, ["norm_eps is 'inf'"]),
    ({"tied": 1}, ["tied is '1'"]), ({"tied": True}, ["unexpected lm_head.weight"]),
    ({"qkv_bias": False}, ["unexpected h.0.attn.c_attn.bias"]), ({"qk_norm": "no"}, ["qk_norm is 'no'"]),
])
def test_a_llama_s_sizes_that_do_not_fit_are_refused(save, make_model, refused, change, words):
    """Values of another type or that make no network, and sizes that the weights do not have: named, and no memory."""
    path, _ = save(model=make_model(vocab_size=258, **LLAMA))
    rewrite(path, lambda payload: payload["config"].update(change))
    error = refused(checkpoint.load, path, ["sft"], "cpu")
    assert f"{path}: does not fit" in error and all(word in error for word in words)


def test_a_scalar_head_s_nan_scale_is_refused(save, refused):
    """Buffers count as weights."""
    path, _ = save("rm")
    rewrite(path, lambda payload: payload["model"]["gain"].fill_(torch.nan))
    assert "gain" in refused(checkpoint.load, path, ["rm"], "cpu")


def test_other_tokenizers_and_contexts_are_refused(make_model, refused):
    """Names, vocabularies, contexts and files of both; equal ranks and contexts pass."""
    first, second = Tokenizer.train(["abab"] * 3, 258), Tokenizer.train(["xyxy"] * 3, 258)
    model, longer = make_model(vocab_size=258), make_model(vocab_size=258, block_size=64)
    checkpoint.compatible((model, first), "a.pt", (model, Tokenizer.from_state(first.state())), "b.pt")
    error = refused(checkpoint.compatible, (model, first), "a.pt", (model, second), "b.pt")
    assert "a.pt" in error and "b.pt" in error and "258" in error
    error = refused(checkpoint.compatible, (model, first), "a.pt", (longer, first), "b.pt")
    assert "a.pt has a context of 32 tokens, b.pt one of 64" in error


# Writing


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(save, monkeypatch, broken):
    """Disk full half-way, at the sync, or a rename that fails: the old checkpoint loads, no temporary is left, and the
    message names path and size. The status is not 0."""
    path, old = save()
    before = open(path, "rb").read()

    def half(payload, file):
        file.write(b"x" * 12_345)
        raise OSError(28, "No space left on device")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"torch": torch, "os": os}[broken[:broken.index(".")]], broken.split(".")[1],
                      half if broken == "torch.save" else fail)
        with pytest.raises(SystemExit) as stop:
            save(info={"accuracy": 0.9})
    assert path in stop.value.code and "No space left" in stop.value.code
    assert "12,345 bytes" in stop.value.code or broken != "torch.save"
    assert open(path, "rb").read() == before and not os.path.exists(f"{path}.tmp")
    assert checkpoint.read(path, ["sft"])["info"] == {"accuracy": 0.8}


def test_a_stale_temporary_is_replaced(save):
    """What a killed save left behind neither hinders the next nor outlives it."""
    path, _ = save()
    open(path + ".tmp", "wb").write(b"half of a file" * 100_000)
    save(info={"accuracy": 0.9})
    assert checkpoint.read(path, ["sft"])["info"] == {"accuracy": 0.9}
    assert sorted(os.listdir(os.path.dirname(path))) == ["ckpt.previous.pt", "ckpt.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_good_file_before_is_kept(save, monkeypatch, links):
    """A second save leaves the first as ckpt.previous.pt; a third the second; a damaged one never takes its place. Also
    on a file system that knows no second names."""
    if not links:
        def link(*names):
            raise OSError(95, "Operation not supported")
        monkeypatch.setattr(os, "link", link)
    path, _ = save()
    previous = os.path.join(os.path.dirname(path), "ckpt.previous.pt")
    assert not os.path.exists(previous)
    for step in (1, 2):
        save(training={"step": step})
    assert [checkpoint.read(p, ["sft"])["training"]["step"] for p in (path, previous)] == [2, 1]
    os.truncate(path, 1000)
    save(training={"step": 3})
    assert [checkpoint.read(p, ["sft"])["training"]["step"] for p in (path, previous)] == [3, 1]


def test_a_damaged_file_points_at_the_one_before(save, refused):
    """Who reads it is told of the earlier one."""
    path, _ = save()
    save()
    os.truncate(path, 1000)
    earlier = path.replace("ckpt", "ckpt.previous")
    assert f"there is an earlier one: {earlier}" in refused(checkpoint.read, path, ["sft"])


def test_what_is_not_finite_is_not_saved(save, make_model):
    """Exit 1 naming the weight; what was there stays."""
    path, _ = save()
    ruined = make_model(vocab_size=258)
    ruined.h[1].attn.c_proj.bias.data[2] = torch.nan
    with pytest.raises(SystemExit) as stop:
        save(model=ruined)
    assert f"{path}: not written, for model.h.1.attn.c_proj.bias is no longer finite" in stop.value.code
    assert os.listdir(os.path.dirname(path)) == ["ckpt.pt"]


def test_a_save_says_what_it_cost(save, tmp_path, make_model):
    """Size and seconds."""
    path = str(tmp_path / "x.pt")
    said = checkpoint.save(path, stage="sft", model=make_model(vocab_size=258), tokenizer=Tokenizer.train([], 257),
                           options=Options(), info={}, training={})
    assert re.fullmatch(rf"  saved {path}: {os.path.getsize(path) / 1e6:.1f} MB in \d\.\d\d s", said)


def optimised(learning_rate, steps=3, width=4):
    """A parameter and its AdamW after a few steps."""
    w = torch.nn.Parameter(torch.arange(1.0, width + 1))
    optimizer = torch.optim.AdamW([w], lr=learning_rate)
    for _ in range(steps):
        w.square().sum().backward(), optimizer.step(), optimizer.zero_grad()
    return w, optimizer


def test_optimizers_keep_the_options_rates(refused):
    """Moments come from the file, the learning rate and the like from this run's options; other shapes are refused."""
    _, old = optimised(0.1)
    w, new = optimised(0.7, steps=0)
    checkpoint.load_optimizers([new], [old.state_dict()], "x.pt")
    assert new.param_groups[0]["lr"] == 0.7 and int(new.state[w]["step"]) == 3
    assert torch.equal(new.state[w]["exp_avg"], old.state_dict()["state"][0]["exp_avg"])
    _, other = optimised(0.1, width=5)
    assert "x.pt: does not fit: exp_avg of a weight of shape (4,)" in refused(
        checkpoint.load_optimizers, [new], [other.state_dict()], "x.pt")
    assert "x.pt: does not fit" in refused(checkpoint.load_optimizers, [new], [], "x.pt")


def test_the_file_is_synced_before_it_is_renamed(save, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder: a power cut finds one whole file."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    save()
    assert done == ["sync", "rename", "sync"]


def test_a_folder_that_is_gone(save, tmp_path):
    """No traceback: the path is named."""
    with pytest.raises(SystemExit) as stop:
        save(path=tmp_path / "gone" / "ckpt.pt")
    assert str(tmp_path / "gone") in stop.value.code
