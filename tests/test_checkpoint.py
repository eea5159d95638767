"""A checkpoint gives back every bit, and a file that is not one is named and refused before it can do harm."""
import os
import pickle
import zipfile
from dataclasses import dataclass

import pytest
import torch

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
    """Any one bit wrong in the weights, which torch would load in silence, or in the pickled part."""
    path, _ = save()
    good = open(path, "rb").read()
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.file_size >= 64]
        assert any("data.pkl" in m.filename for m in members) and len(members) > 5
        places = [good.index(archive.read(m), m.header_offset) + m.file_size // 2 for m in members]
    for place in places:
        with open(path, "wb") as f:
            f.write(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        assert f"{path}: " in refused(checkpoint.read, path, ["sft"])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_named(save, refused, share):
    """Cut anywhere, or empty."""
    path, _ = save()
    os.truncate(path, int(share * os.path.getsize(path)))
    assert f"{path}: " in refused(checkpoint.read, path, ["sft"])


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
