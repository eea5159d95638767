"""Models out: folders that transformers reads, the small file to hand on, what a model is; and all of it back again."""
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import LLAMA
from minirlhf import adapters, checkpoint, export, fetch, pretrained, runtime, sizes
from minirlhf import tokenizer as tok
from minirlhf.data import encode_row
from minirlhf.generate import generate
from minirlhf.model import GPT, GPTConfig
from minirlhf.tokenizer import EOS, Tokenizer
from test_fuzz import attempt, case, cases, mutated
from test_tokenizer import LETTER, learned, nasty

CPU, STAGES = torch.device("cpu"), ["sft", "rm", "ppo"]
KINDS = {"gpt2": {}, "llama": {**LLAMA, "qkv_bias": False, "qk_norm": False},
         "llama tied": {**LLAMA, "qkv_bias": False, "qk_norm": False, "n_kv_head": 0, "tied": True},
         "qwen2": {**LLAMA, "qk_norm": False, "tied": True}, "qwen3": {**LLAMA, "qkv_bias": False}}
PROMPTS, COMPLETIONS = ["the cat", "", "12 dogs,", "é the"], [" sat", " on the mat and the dog", "x", ""]


@dataclass
class Options:
    response_length: int = 7
    temperature: float = 0.5


@pytest.fixture(scope="session")
def bpe():
    """A vocabulary of our own."""
    return Tokenizer.train(["the cat sat on the mat", "the cat and the dog", "12 dogs and 100 cats, the"] * 3, 280)


def with_specials(bpe):
    """The same merges as SmolLM2 has them: special tokens first, digits apart, a few bytes without a token. Eos is the
    first, the second opens a row."""
    absent = {bytes([b]) for b in (4, 0x13, 0xF1)}
    ranks = {token: i + 3 for i, token in enumerate(token for token in bpe.ranks if token not in absent)}
    return Tokenizer(ranks, "x", tok.DIGITS_APART, {EOS: 0, "<|im_start|>": 1, "<|im_end|>": 2}, 0, 1)


@pytest.fixture
def made(tmp_path, make_model, bpe):
    """made(kind, head, tokenizer) -> a checkpoint's path, its model and its tokenizer."""
    def make(kind="gpt2", head="lm", tokenizer=bpe, name="ckpt.pt", **shape):
        model = make_model(head, **{"vocab_size": tokenizer.vocab_size} | KINDS[kind] | shape)
        if head == "scalar":
            model.gain.fill_(0.7), model.bias.fill_(-1.3)
        checkpoint.save(str(tmp_path / name), stage="rm" if head == "scalar" else "ppo", model=model, info={},
                        tokenizer=tokenizer, options=Options(), training={"step": 3, "moments": torch.ones(1000)})
        return str(tmp_path / name), model, tokenizer
    return make


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ---- transformers reads them


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_a_language_model(made, out, hf, bpe, kind):
    """Model and tokenizer by from_pretrained alone: the ids of texts, logits to 1e-5, and greedy answers to ragged
    prompts are ours; its generate samples as stage 3 did."""
    path, model, ours = made(kind, tokenizer=Tokenizer(bpe.ranks, "x", tok.QWEN2, nfc=True) if kind == "qwen2" else bpe)
    export.export(path, out)
    theirs, tokenizer = hf.AutoModelForCausalLM.from_pretrained(out).eval(), hf.AutoTokenizer.from_pretrained(out)
    assert type(theirs).__name__.lower().startswith(kind.split()[0]) and theirs.dtype == torch.float32
    for text in [*PROMPTS, *nasty(20)]:
        ids = ours.encode_prompt(text)
        assert tokenizer(text, split_special_tokens=True).input_ids == ids
        assert EOS in text or tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    tokens = torch.randint(model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert logits.std() > 1
        torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    greedy = theirs.generate(**batch, do_sample=False)[:, batch.input_ids.shape[1]:].tolist()
    answers = generate(model, [ours.encode_prompt(p) for p in PROMPTS], 7, ours.eos, temperature=0).responses()
    assert [row[:len(answer)] for row, answer in zip(greedy, answers)] == answers and max(map(len, answers)) == 7
    usual = theirs.generation_config
    assert (usual.do_sample, usual.temperature, usual.top_k, usual.top_p, usual.max_new_tokens) == (True, 0.5, 0, 1, 7)
    assert tokenizer.model_max_length == 32 and usual.eos_token_id == ours.eos == tokenizer.eos_token_id


@pytest.mark.parametrize("special", [False, True], ids=["own padding", "spare token"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_a_reward_model(made, out, hf, bpe, capsys, kind, special):
    """tokenizer(prompts, completions) makes the rows of stage 2, in one ragged batch, and the scores are ours: gain and
    bias are in the weights of a GPT-2, and in those of the others but for a constant that is told."""
    path, model, ours = made(kind, "scalar", with_specials(bpe) if special else bpe)
    export.export(path, out)
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(out)
    batch = tokenizer(PROMPTS, COMPLETIONS, padding=True, return_tensors="pt")
    rows = [encode_row(ours, p, c, 32, "drop") for p, c in zip(PROMPTS, COMPLETIONS)]
    assert [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask.bool())] == [
        row.ids for row in rows]
    padding = tokenizer.pad_token_id
    assert padding == (2 if special else ours.vocab_size) and tokenizer.padding_side == "right"
    assert batch.input_ids[0, -1] == padding != ours.eos and {*batch} == {"input_ids", "attention_mask"}
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0]
        expected = torch.cat([model.score(torch.tensor([row.ids]), torch.tensor([len(row.ids)])) for row in rows])
    assert theirs.config.num_labels == 1 and expected.std() > 0.2
    constant = getattr(theirs.config, "score_bias", 0.0)
    torch.testing.assert_close(scores + constant, expected, rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert constant == 0 and "lack" not in said if kind == "gpt2" else f"its scores lack {constant:+.6g}" in said


def test_folding_by_hand(make_model):
    """w = (3, 4), b = 2, gain 0.5, bias 9: w' = (1.5, 2), c = 10, |w'|^2 = 6.25, so ln_f.bias gets 1.6 w' more. A
    Llama keeps the constant, and so does a head of zeros."""
    def head(model, w):
        model.score_head.weight.data, model.score_head.bias.data = torch.tensor([w]), torch.tensor([2.0])
        model.gain.fill_(0.5), model.bias.fill_(9)
        return model
    gpt2 = head(make_model("scalar", n_embd=2), [3.0, 4.0])
    gpt2.ln_f.bias.data = torch.tensor([1.0, 0.0])
    state, constant = export.folded(gpt2)
    assert constant == 0 and state["score_head.weight"].tolist() == [[1.5, 2.0]]
    torch.testing.assert_close(state["ln_f.bias"], torch.tensor([3.4, 3.2]))
    assert gpt2.ln_f.bias.tolist() == [1, 0] and not {"gain", "bias", "score_head.bias"} & state.keys()
    llama = head(make_model("scalar", **KINDS["llama"] | {"n_embd": 2}), [3.0, 4.0])
    assert export.folded(llama)[1] == 10
    state, constant = export.folded(head(gpt2, [0.0, 0.0]))
    assert constant == 10 and state["ln_f.bias"].tolist() == [1, 0]


def test_a_qwen2_with_another_tokenizer(made, out, bpe, capsys):
    """AutoTokenizer of transformers 5 takes Qwen2's way to split for every Qwen2: what has another is told."""
    for n, (tokenizer, told) in enumerate(((bpe, True), (Tokenizer(bpe.ranks, "x", tok.QWEN2, nfc=True), False))):
        export.export(made("qwen2", tokenizer=tokenizer)[0], f"{out}{n}")
        assert ("PreTrainedTokenizerFast" in capsys.readouterr().out) == told


@pytest.mark.parametrize("kind", ["gpt2", "digits", "qwen", "bytes missing"])
@pytest.mark.parametrize("specials", [(EOS,), (EOS, "<|im_start|>", "<|im_end|>")], ids=["plain", "special first"])
def test_ids_of_a_tokenizer_json(tmp_path, kind, specials):
    """What is written back finds the ids of the tokenizer that it came from, on 500 nasty strings and in pairs."""
    absent = {4, 0x13, 0x1D} if kind == "bytes missing" else {}
    parts = json.loads(learned({"bytes missing": "digits"}.get(kind, kind), specials,
                               [b for b in range(256) if b not in absent]).to_str())
    vocab = parts["model"]["vocab"]
    parts["model"]["vocab"] = {t: i for t, i in vocab.items() if not any(LETTER[b] in t for b in absent)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    compare_ids(tok.from_folder(tmp_path, 450))


def compare_ids(ours, more=()):
    tokenizers = pytest.importorskip("tokenizers")
    back = tokenizers.Tokenizer.from_str(json.dumps(tok.to_json(ours, ours.special)))
    back.encode_special_tokens = True
    for text in [*nasty(500), *more]:
        assert back.encode(text).ids == ours.encode_prompt(text), text
        assert back.encode(text, "the").ids == ours.encode_prompt(text) + ours.encode_completion("the")


def test_a_token_that_merges_do_not_lead_to():
    """"abcd" of ab and cd, where bc is merged first: alone it is one token, within a longer word a, bc, d."""
    ranks = [*(bytes([b]) for b in range(256)), b"bc", b"ab", b"cd", b"abcd"]
    ours = Tokenizer({piece: i for i, piece in enumerate(ranks)}, "x")
    assert ours.encode("abcd") == [259] and ours.encode("abcde") == [97, 256, 100, 101]
    assert tok._merges_of(ours.ranks)[1] and not tok._merges_of(Tokenizer.train(["abab"] * 3, 258).ranks)[1]
    compare_ids(ours, ["abcd", "abcde", "xabcd abcd"])


# ---- and back


def random_tokenizer(rng):
    """Of any kind that is read: bytes missing, special tokens before or behind the others, a padded vocabulary."""
    words = ["".join(rng.choices("abc 1é", k=rng.randint(1, 6))) for _ in range(30)]
    tokens, first = [*Tokenizer.train(words * 2, rng.randint(257, 290)).ranks], rng.choice([0, 0, 3])
    if rng.random() < 0.3:
        tokens = [token for token in tokens if not {*token} & {4, 0x13}]
    ranks = {token: i + first for i, token in enumerate(tokens)}
    ids = [*range(first), *range(first + len(ranks), first + len(ranks) + rng.randint(not first, 3))]
    special = dict(zip(rng.sample([EOS, "<s>", "é</s>", "<pad>", "[ ]", "<|padding|>"], len(ids)), ids))
    eos, opening = rng.choice(ids), rng.choice(ids)
    pattern, nfc = rng.choice([(tok.PATTERN, False), (tok.DIGITS_APART, False), (tok.QWEN2, True)])
    return Tokenizer(ranks, "x", pattern, special, eos, opening, first + len(ranks) + 3 + rng.choice([0, 5]), nfc)


def random_model(rng, head, vocab_size):
    """Of any family and size that is written."""
    shape = {"n_layer": rng.randint(1, 3), "n_head": rng.choice([1, 2, 4]), "n_embd": 4 * rng.randint(1, 3),
             "block_size": rng.randint(4, 40), "vocab_size": vocab_size}
    if rng.random() < 0.7:
        shape |= {"family": "llama", "n_kv_head": rng.choice([k for k in (1, 2, 4) if shape["n_head"] % k == 0]),
                  "head_size": 2 * rng.randint(1, 4), "n_inner": rng.randint(1, 20), "tied": rng.random() < 0.5,
                  "rope_theta": rng.choice([1e4, 1e6, 33.7]), "norm_eps": rng.choice([1e-5, 1e-6]),
                  **rng.choice([{}, {"qkv_bias": True}, {"qk_norm": True}])}
    model = GPT(GPTConfig(**shape), head)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.3, 0.4, generator=torch.Generator().manual_seed(rng.randrange(2 ** 31)))
    if head == "scalar":
        model.gain.fill_(rng.uniform(-2, 2)), model.bias.fill_(rng.uniform(-2, 2))
    return model.eval()


@cases(20, 300)
def test_exported_and_imported_again_is_bit_equal(numbers, tmp_path):
    """A language model of any accepted kind, to the last bit, its tokenizer too; a reward model to rounding, and what
    came in from its folder goes out again as the same bytes."""
    for number in numbers:
        with case(number) as rng:
            head, tokenizer, folder = rng.choice(["lm", "lm", "scalar"]), random_tokenizer(rng), tmp_path / str(number)
            model = random_model(rng, head, tokenizer.vocab_size)
            folder.mkdir()
            checkpoint.save(str(folder / "x.pt"), stage="rm" if head == "scalar" else "sft", model=model, info={},
                            tokenizer=tokenizer, options=Options(), training={})
            export.export(str(folder / "x.pt"), str(folder / "a"))
            back, ids, _ = checkpoint.load(str(folder / "a"), STAGES, CPU)
            assert back.config == model.config and ids.same_ids(tokenizer)
            tokens = torch.randint(model.config.vocab_size, (2, 4))
            assert same_weights(back, model) if head == "lm" else torch.allclose(back(tokens), model(tokens), atol=1e-4)
            export.export(str(folder / "a"), str(folder / "b"))
            for name in export.FILES:
                one, other = folder / "a" / name, folder / "b" / name
                assert one.exists() == other.exists() == (head == "lm" or name != "generation_config.json")
                assert name == "generation_config.json" or not one.exists() or one.read_bytes() == other.read_bytes()


def test_a_padded_vocabulary_survives_a_checkpoint(made, bpe):
    """A model with more rows than its tokenizer has tokens."""
    path, model, _ = made(tokenizer=Tokenizer(bpe.ranks, "x", vocab_size=300))
    back, tokenizer, _ = checkpoint.load(path, STAGES, CPU)
    assert back.config.vocab_size == tokenizer.vocab_size == 300 and same_weights(back, model)


def test_a_row_for_padding_goes_out_and_not_in(made, out, refused):
    """It is behind the vocabulary and 0; one that is not 0, or that is no padding's, is a token, whose text the
    tokenizer knows."""
    path, model, tokenizer = made("llama", "scalar")
    export.export(path, out)
    found = pretrained.read_safetensors(f"{out}/model.safetensors")["model.embed_tokens.weight"]
    rows = torch.cat([*found.pieces()]).view(found.shape)
    assert torch.equal(rows[:-1], model.wte.weight) and not rows[-1].any() and len(rows) == tokenizer.vocab_size + 1
    back, ids, payload = checkpoint.load(out, STAGES, CPU)
    assert back.config == model.config and payload["info"]["vocab_size"] == tokenizer.vocab_size == ids.vocab_size
    config = json.loads(Path(out, "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.vocab_size and config["vocab_size"] == tokenizer.vocab_size + 1
    Path(out, "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    assert checkpoint.load(out, STAGES, CPU)[0].config.vocab_size == tokenizer.vocab_size + 1
    for value in ("1", None, float("nan"), True, [0.5]):
        Path(out, "config.json").write_text(json.dumps(config | {"score_bias": value}))
        assert "score_bias" in refused(checkpoint.load, out, STAGES, CPU)
    Path(out, "config.json").write_text(json.dumps(config))
    raw = Path(out, "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8:begin])["__metadata__"] == {"format": "pt"} and begin % 8 == 0
    place = begin + tokenizer.vocab_size * 16 * 4  # the embedding comes first
    Path(out, "model.safetensors").write_bytes(raw[:place] + b"\0\0\x80\x3f" + raw[place + 4:])
    assert checkpoint.load(out, STAGES, CPU)[0].config.vocab_size == tokenizer.vocab_size + 1


def test_what_no_folder_can_say(made, out, refused, tmp_path, bpe):
    """Sizes that no family has together, tokens without a name or with one that is another's, a name in no UTF-8: one
    line, and nothing is left."""
    both = made("llama", qkv_bias=True, qk_norm=True, name="a.pt")[0]
    assert "no model of transformers has both" in refused(export.export, both, out)
    assert "12 with 8 heads" in refused(export.export, made("llama", n_embd=12, n_head=8, name="b.pt")[0], out)
    unnamed = made(tokenizer=Tokenizer(bpe.ranks, "x", eos=290, vocab_size=291), name="c.pt")[0]
    assert "token 290 opens a row or ends an answer and has no name" in refused(export.export, unnamed, out)
    for text, words in (("at", "a special token of its tokenizer is spelled as"), ("\udc80", "UnicodeEncodeError")):
        named = made(tokenizer=Tokenizer(bpe.ranks, "x", special={EOS: 290, text: 291}, eos=290), name="d.pt")[0]
        assert words in (error := refused(export.export, named, out)) and named in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt", "ckpt.previous.pt", "d.pt"]


# ---- adapters


@pytest.fixture
def adapted(made, tmp_path):
    """adapted(head) -> the path of a checkpoint of adapters on another program's model, and the model that it is."""
    def make(head="lm"):
        path, _, tokenizer = made("llama tied")
        export.export(path, str(tmp_path / "base"))
        base = checkpoint.load(str(tmp_path / "base"), STAGES, CPU)[0]
        model = adapters.learner(base, head, SimpleNamespace(lora_rank=2, lora_alpha=3.0, lora_layers=1,
                                                             freeze_layers=0), torch.Generator().manual_seed(1))
        for n, p in enumerate(p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(p, 0, 0.4, generator=torch.Generator().manual_seed(n))
        path = str(tmp_path / "adapters.pt")
        checkpoint.save(path, stage="rm" if head == "scalar" else "ppo", model=model, tokenizer=tokenizer,
                        options=Options(), info={}, training={"step": 3, "moments": torch.ones(1000)})
        return path, model
    return make


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_adapters_are_in_the_weights(adapted, out, head):
    """A folder stands by itself: the model on which the adapters stood may go."""
    path, model = adapted(head)
    export.export(path, out)
    os.rename(os.path.join(os.path.dirname(path), "base"), os.path.join(os.path.dirname(path), "gone"))
    back, tokens = checkpoint.load(out, STAGES, CPU)[0], torch.arange(12).view(2, 6)
    assert back.head == head and model(tokens).std() > 0.3
    torch.testing.assert_close(back(tokens), model(tokens), rtol=1e-5, atol=1e-5)


# ---- the small file


@pytest.mark.parametrize("kind", ["gpt2", "llama", "adapters", "adapters, scalar"])
def test_the_weights_of_a_checkpoint_alone(made, adapted, tmp_path, kind, capsys):
    """Everything but what --resume needs, under a seal; of adapters on another program's model the adapters."""
    head = "scalar" if "scalar" in kind else "lm"
    path = adapted(head)[0] if "adapters" in kind else made(kind)[0]
    small = str(tmp_path / "small.pt")
    export.main(["export", path, small, "--weights_only"])
    assert f"saved {small}: " in capsys.readouterr().out
    before, after = (torch.load(file, weights_only=True) for file in (path, small))
    assert before.pop("training")["step"] == 3 and after.pop("training") == {}
    assert str(before) == str(after) and ("base" in after) == ("adapters" in kind)
    assert os.path.getsize(small) < os.path.getsize(path) - 4000
    checkpoint.check_whole(small)
    models = [checkpoint.load(file, STAGES, CPU)[0] for file in (path, small)]
    assert same_weights(*models) and models[0].head == head
    export.export(small, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == [
        name for name in export.FILES if head == "lm" or name != "generation_config.json"]


def test_the_small_file_is_taken_as_any_and_not_resumed(tiny, tmp_path):
    """Stage 3 starts from such files of stages 1 and 2; --resume of one says why not, and what to do."""
    for stage, path in (("sft", tiny.sft), ("rm", tiny.rm)):
        (tmp_path / stage).mkdir()
        export.export(path, str(tmp_path / stage / "ckpt.pt"), True)
    ended = [tiny.train("ppo", "--init_from", sft, "--reward_model", rm).payload()["model"] for sft, rm in (
        (tmp_path / "sft", tmp_path / "rm"), (tiny.sft, tiny.rm))]
    assert all(torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())
    for stage in ("sft", "rm"):
        ended = tiny.train(stage, "--resume", out=tmp_path / stage)
        assert ended.code == 2 and "holds the model only" in ended.error
        assert f"with --init_from {tmp_path / stage}" in ended.error
        assert os.listdir(tmp_path / stage) == ["ckpt.pt"]


# ---- nothing is lost, nothing half made


@pytest.mark.parametrize("argv, words", [
    (["ckpt.pt", "there"], "there: exists"), (["ckpt.pt", "there/"], "there/: exists"), (["ckpt.pt", ""], ".: exists"),
    (["ckpt.pt", "ckpt.pt", "--weights_only"], "ckpt.pt: exists"), (["ckpt.pt", "link"], "link: exists"),
    (["ckpt.pt", "no/out"], "there is no folder no"), (["ckpt.pt", "out.pt"], "add --weights_only"),
    (["ckpt.pt", "out.gguf"], "is to be a folder"), (["ckpt.pt", "out", "--weights_only"], "end in .pt"),
    (["no.pt", "out"], "no.pt: no such checkpoint"), (["no.pt", "out.pt", "--weights_only"], "no.pt: no such"),
    (["cut.pt", "out"], "cut.pt: not a checkpoint, or damaged"),
    (["cut.pt", "o.pt", "--weights_only"], "cut.pt: not a checkpoint, or damaged"),
    (["there", "out.pt", "--weights_only"], "--weights_only is for checkpoints"), (["cut", "out"], "cut short"),
    (["ckpt.pt", "ckpt.pt/out"], "no folder ckpt.pt"),
])
def test_an_export_that_is_refused(made, tmp_path, declined, monkeypatch, argv, words):
    """One line; nothing has come or gone."""
    monkeypatch.chdir(tmp_path)
    made()
    for folder in ("there", "cut"):
        export.export("ckpt.pt", folder)
    for name in ("ckpt.pt", "cut/model.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("ckpt", "cut")).write_bytes(content[:-1])
    (tmp_path / "link").symlink_to("nowhere")
    assert words in declined(tmp_path, "minirlhf.export", "export", *argv)


def test_a_folder_has_its_name_when_it_is_whole(made, out, monkeypatch):
    """Until the last file is on the disk there is none; killed anywhere before, the next export takes over what is
    left, and never what somebody else put there."""
    path, model, _ = made()
    write, seen = export.write_safetensors, []

    def watched(file, named):
        seen.append(os.path.exists(out))
        write(file, named)
        seen.append(sorted(os.listdir(f"{out}.tmp")))
    monkeypatch.setattr(export, "write_safetensors", watched)
    export.export(path, out)
    assert seen == [False, sorted(export.FILES)] == [os.path.exists(f"{out}.tmp"), sorted(os.listdir(out))]


@pytest.mark.parametrize("place", ["claimed", "write_json", "write_safetensors", "rename"])
def test_an_export_that_is_killed(made, out, monkeypatch, refused, place):
    """kill -9 when the folder is made, within its files, before it gets its name: the next one just works."""
    path, model, _ = made()
    owner, name = (os, "rename") if place == "rename" else (export, place)
    if (child := os.fork()) == 0:
        def killed(*arguments):
            if place == "claimed":
                os.mkdir(arguments[0])
            elif place != "rename":
                Path(f"{out}.tmp", "model.safetensors").write_text("half")
            os._exit(9)
        setattr(owner, name, killed)
        export.export(path, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert os.path.isdir(f"{out}.tmp") and not os.path.exists(out)
    export.export(path, out)
    assert same_weights(checkpoint.load(out, STAGES, CPU)[0], model) and not os.path.exists(f"{out}.tmp")


def test_a_folder_of_somebody_else(made, out, refused):
    """OUT.tmp that another export writes, that holds what no export wrote, or is a file."""
    path, *_ = made()
    os.mkdir(f"{out}.tmp")
    handle = os.open(f"{out}.tmp", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another export is writing there" in refused(export.export, path, out)
    os.close(handle)
    Path(f"{out}.tmp", "mine").write_text("x")
    assert "holds mine, which no export wrote" in refused(export.export, path, out)
    assert os.listdir(f"{out}.tmp") == ["mine"]
    os.remove(f"{out}.tmp/mine"), os.rmdir(f"{out}.tmp"), Path(f"{out}.tmp").write_text("x")
    assert f"{out}.tmp: cannot be written" in refused(export.export, path, out)
    os.remove(f"{out}.tmp")
    export.export(path, out)


@pytest.mark.parametrize("argv", [["out"], ["out.pt", "--weights_only"]], ids=["folder", "file"])
def test_an_export_on_a_full_disk(made, tmp_path, command, argv):
    """Exit 1, path and size; nothing is left of it."""
    made()
    _, error = command("minirlhf.pretrained", "export", "ckpt.pt", *argv, cwd=tmp_path, code=1, largest_file=8000)
    assert error.startswith(f"error: {argv[0]}: could not be written (") and error.count("\n") == 1
    assert "after 8,000 bytes" in error or "(File too large) after " in error
    assert [name for name in os.listdir(tmp_path) if name[0] != "."] == ["ckpt.pt"]


# ---- what a model is


@pytest.mark.parametrize("kind, head", [("gpt2", "lm"), ("llama", "scalar"), ("adapters", "lm")])
def test_inspect_says_what_a_model_is(made, adapted, out, capsys, kind, head):
    """A checkpoint, its small file, the folder of its export: what it is taken as, its size, its tokenizer."""
    path = adapted()[0] if kind == "adapters" else made(kind, head)[0]
    export.export(path, f"{path}.small.pt", True), export.export(path, out)
    stage = "a reward model" if head == "scalar" else "a PPO policy"
    assert export.what_it_is(os.path.dirname(path)) == "a folder with a checkpoint of this program"
    capsys.readouterr()
    for place, words in ((path, [": a file", f"taken as {stage}", "with what --resume needs"]),
                         (f"{path}.small.pt", [f"taken as {stage}", "weights only"]),
                         (out, ["a folder of another program, model_type", "taken as " + stage.replace(
                             "a PPO policy", "an SFT model")])):
        export.main(["inspect", place])
        said = capsys.readouterr().out
        assert all(word in said for word in [*words, "2 layers of 16", "a context of 32 tokens", "memory: weights ",
                                             f"{EOS} (279) ends an answer"]), said
        assert ("adapters of rank 2 in 1 of 2 blocks, on " in said) == (kind == "adapters" and place != out)


@pytest.mark.parametrize("name, content, words", [
    ("no", None, "no: no such file or folder"), ("/dev/null", None, "pipe or device"),
    ("x.gguf", b"GGUF", "x.gguf: cut short"), ("x", b"GGUF3456", "let it end in .gguf"),
    ("x.safetensors", b"12345678", "weights alone"), ("pytorch_model.bin", b"x", "weights alone"),
    ("x.txt", b"text", "x.txt: not a checkpoint, or damaged"), ("d", {}, "neither ckpt.pt nor config.json"),
    ("d", {"adapter_config.json": "{}"}, "peft"),
    ("d", {"config.json": '{"stage": "sft"}'}, "a run without a checkpoint"),
    ("d", {"config.json": '{"model_type": "mistral"}'}, 'd/config.json: model_type "mistral": slides a window'),
    ("d", {"config.json": "{"}, "config.json: not JSON"), ("d", {"config.json": "{}"}, "model_type null: not known"),
    ("d", {"ckpt.pt": ""}, "d/ckpt.pt: not a checkpoint, or damaged"),
])
def test_inspect_says_why_a_model_is_not_taken(tmp_path, refused, monkeypatch, name, content, words):
    """Exit 2, with the refusal that every command gives, or with what to name instead."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    for file, text in (content if isinstance(content, dict) else {}).items():
        Path(name).mkdir(exist_ok=True)
        Path(name, file).write_text(text)
    if content == {}:
        Path(name).mkdir()
    assert words in refused(export.main, ["inspect", name])


def test_inspect_knows_a_model_that_has_no_room(made, out, refused, monkeypatch):
    """Before its weights are read."""
    path, model, _ = made("llama tied")
    export.export(path, out)
    monkeypatch.setattr(sizes, "memory_of", lambda device: 1000)
    monkeypatch.setattr(pretrained, "fill", None)
    assert f"{out}: a model of {runtime.count_parameters(model):,} parameters cannot be made" in refused(
        export.main, ["inspect", out])


def test_memory_by_hand():
    """10 blocks of 100, 2,000 tokens, a context of 300: 2,300 x 100 + 10 (12 x 100^2 + 13 x 100) + 200 = 1,443,200
    parameters, 5.8 MB; adapters of rank 10 have 10 x 10 (400 + 200 + 500 + 500) = 160,000 numbers, 16 bytes each."""
    lines = export.memory_lines(GPTConfig(10, 1, 100, 2000, 300), 10)
    assert lines[0].startswith("memory: weights 5.8 MB; this machine has ")
    assert lines[1] == "  stages 1 and 2: 8.3 MB with adapters of rank 10, 23.1 MB if all learns"
    assert lines[2] == "  stage 3: 16.0 MB with adapters of rank 10, 52.0 MB if all learns"


def test_what_is_damaged_is_refused_in_a_line(made, out, tmp_path):
    """Bytes of any file of a folder, and of a checkpoint, changed: inspect and export refuse it naming a file, or take
    it; a refused export leaves nothing."""
    path, *_ = made("llama", "scalar")
    export.export(path, out)
    taken = 0
    for number in range(60):
        with case(number) as rng:
            files = [path, *(os.path.join(out, name) for name in sorted(os.listdir(out)))]
            file = rng.choice(files)
            content = Path(file).read_bytes()
            Path(file).write_bytes(mutated(rng, content))
            place, target = path if file == path else out, tmp_path / f"{number}.out"
            for argv in (["inspect", place], ["export", place, str(target)]):
                error = attempt(export.main, argv)[1]
                assert not error or place in error or str(target) in error
                assert target.exists() == (not error and argv[0] == "export") and not list(tmp_path.glob("*.tmp"))
            taken += target.exists()
            Path(file).write_bytes(content)
    assert 0 < taken < 50


# ---- a real one


@pytest.mark.slow
def test_smollm2_goes_out(out, hf):
    """Another program's file, exported: ids, logits and a greedy answer of transformers, and back to the last bit."""
    export.export(fetch.smollm2(), out)
    model, ours, _ = checkpoint.load(fetch.smollm2(), STAGES, CPU)
    back, ids, _ = checkpoint.load(out, STAGES, CPU)
    assert same_weights(back, model) and ids.same_ids(ours)
    theirs, tokenizer = hf.AutoModelForCausalLM.from_pretrained(out).eval(), hf.AutoTokenizer.from_pretrained(out)
    for text in nasty(1000):
        assert tokenizer(text, split_special_tokens=True).input_ids == ours.encode_prompt(text)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    prompts = [ours.encode_prompt(p) for p in PROMPTS]
    with torch.no_grad():
        torch.testing.assert_close(model(batch.input_ids[:1]), theirs(batch.input_ids[:1]).logits, rtol=1e-4, atol=1e-3)
    greedy = theirs.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch.input_ids.shape[1]:].tolist()
    answers = generate(model, prompts, 12, ours.eos, temperature=0).responses()
    assert [row[:len(answer)] for row, answer in zip(greedy, answers)] == answers
