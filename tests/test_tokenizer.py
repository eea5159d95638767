"""Byte-level BPE: learned as the definition says, round trips on any text, and never a special token from text."""
import contextlib
import copy
import io
import json
import os
import random
import time
from collections import Counter

import pytest
import regex
import tiktoken
import torch

from minirlhf import pretrained
from minirlhf import tokenizer as tok
from minirlhf.tokenizer import EOS, PATTERN, Tokenizer

TEXTS = ["the cat sat on the mat, the cat sat.", "A thin thing thinks; there, then, that's all!",
         "don't we'll they're 1234", "  two  spaces\n\nand lines\t", "na\u00efve caf\u00e9 \u00fcber",
         "aaaa aaaa aaaaaaa", ""] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


@pytest.mark.parametrize("text", [
    "", " ", "the cat", "the cat sat on the moon", "\U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "NUL \0 in it", "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627", "tabs\t\r\n   ends with blanks   ", "\ufeffBOM",
    "e\u0301 is not \u00e9", "a" * 5000,
], ids=range(11))
def test_round_trip(tokenizer, text):
    """decode(encode(text)) is the text, with prompts' and completions' eos left out."""
    for encode in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.encode_completion):
        assert tokenizer.decode(encode(text)) == text


def test_random_unicode_round_trips(tokenizer):
    """Any code points but surrogates."""
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(12))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    """Half of a pair is no text: U+FFFD, no crash, in encoding as in training."""
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    Tokenizer.train(["a\ud83db", "a\udc00"], 300)


def test_half_a_character_decodes_to_the_replacement_character(tokenizer):
    """A sampled sequence may stop within a character's bytes."""
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([ord("a"), 0xE2, 0x82]) == "a\ufffd"


def test_the_end_of_text_marker_in_a_text_is_plain_text(tokenizer):
    """No text can produce eos; it round-trips as the thirteen characters that it is."""
    ids = tokenizer.encode(f"one {EOS} two")
    assert tokenizer.eos not in ids and tokenizer.decode(ids) == f"one {EOS} two"
    assert tokenizer.eos not in Tokenizer.train([EOS] * 20, 300).encode(EOS)


def test_prompts_begin_and_completions_end_with_eos(tokenizer):
    """eos is the last id; an empty prompt and an empty completion are eos alone."""
    assert tokenizer.eos == tokenizer.vocab_size - 1 == len(tokenizer.ranks)
    ids = tokenizer.encode("the cat")
    assert tokenizer.encode_prompt("the cat") == [tokenizer.eos] + ids
    assert tokenizer.encode_completion("the cat") == ids + [tokenizer.eos]
    assert tokenizer.encode_prompt("") == tokenizer.encode_completion("") == [tokenizer.eos]


# Training


def test_merges_by_hand():
    """"abab ab" holds a-b three times and b-a once: first "ab" (256); then "ab"+"ab" and " "+"ab" are there once each,
    too rare to merge."""
    tokenizer = Tokenizer.train(["abab ab"], 300)
    assert [token for token, rank in tokenizer.ranks.items() if rank >= 256] == [b"ab"]
    assert tokenizer.encode("abab ab") == [256, 256, ord(" "), 256]
    assert tokenizer.eos == 257 and tokenizer.vocab_size == 258


def test_ties_go_to_the_smaller_bytes():
    """"xy" and "ab" twice each: "ab" comes first, whatever the order of the texts; then "xy"."""
    for texts in (["xy ab", "xy\nab"], ["ab xy", "ab\nxy"]):
        tokens = [t for t in Tokenizer.train(texts, 258 + 1).ranks if len(t) > 1]
        assert tokens == sorted(tokens) and len(tokens) == 2


def test_overlapping_pairs():
    """"aaa" merges from the left: aa + a."""
    tokenizer = Tokenizer.train(["aaa"] * 3, 258)
    assert list(tokenizer.ranks)[256:] == [b"aa"] and tokenizer.encode("aaa") == [256, ord("a")]


def naive_bpe(texts, vocab_size):
    """The definition: count all pairs anew, merge the most frequent one everywhere, until done."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1:
        pairs = Counter()
        for word, piece in pieces.items():
            for pair in zip(piece, piece[1:]):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        ranks.setdefault(best[0] + best[1], len(ranks))
        for word, piece in pieces.items():
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i:i + 2] = [best[0] + best[1]]
                i += 1
    return ranks


@pytest.mark.parametrize("seed", range(3))
def test_training_equals_the_definition(seed):
    """The heap and its counts, kept up to date merge by merge, choose the pairs that a fresh count would."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aab\u00e9", k=rng.randint(1, 9))) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(40)]
    assert list(Tokenizer.train(texts, 400).ranks.items()) == list(naive_bpe(texts, 400).items())
    assert list(Tokenizer.train(TEXTS, 320).ranks.items()) == list(naive_bpe(TEXTS, 320).items())


@pytest.mark.parametrize("text", ["ab" * 40, "a" * 97, "abcab" * 9 + "ba" * 5, "aab" * 20 + "aaab" * 7, "xyzzy" * 12],
                         ids=range(5))
def test_training_on_one_long_word_equals_the_definition(text):
    """Where a pair meets itself, and merges make pairs that were there before: the merges of a fresh count."""
    for texts in ([text], [text, text[3:] + " " + text[:40]], [text * 2 + "c"] * 2):
        assert list(Tokenizer.train(texts, 300).ranks.items()) == list(naive_bpe(texts, 300).items())


@pytest.mark.parametrize("make", [
    lambda rng, n: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n)), lambda rng, n: "ab" * (n // 2),
    lambda rng, n: "a" * n, lambda rng, n: "\u6f22\u5b57" * (n // 6), lambda rng, n: " " * n], ids=range(5))
def test_training_and_encoding_a_word_of_any_length_take_linear_time(make):
    """Ten times the letters without a blank cost about ten times the time, not a hundred times, and come back whole."""
    seconds = []
    for n in (10_000, 100_000):
        text, began = make(random.Random(0), n), time.process_time()
        tokenizer = Tokenizer.train([text], 1000)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        seconds.append(time.process_time() - began)
    assert seconds[1] < 40 * seconds[0] + 1


def test_long_training_says_how_far_it_is(monkeypatch, capsys):
    """Nothing in the first 3 seconds; then a line, at ever longer intervals, while reading and while merging."""
    clock = iter(range(10 ** 9))
    monkeypatch.setattr("minirlhf.tokenizer.time.monotonic", lambda: 0.25 * next(clock))
    Tokenizer.train(["a b"] * 5, 258)
    assert capsys.readouterr().out == ""
    said = []
    Tokenizer.train(iter(TEXTS), 500, say=said.append)
    assert said[0].startswith("learning a vocabulary: ") and "different words, 3 s" in said[0] and len(said) < 6
    assert "of 499 tokens" in said[-1]


def test_training_is_a_function_of_the_texts(tokenizer):
    """Again, and with the texts in another order: the same ranks."""
    assert Tokenizer.train(TEXTS, 320).ranks == Tokenizer.train(TEXTS[::-1], 320).ranks == tokenizer.ranks


def test_tokens_do_not_cross_words(tokenizer):
    """GPT-2's split: a blank may open a token, never stand within or end one that holds letters."""
    learned = [token.decode("utf-8", "replace") for token in tokenizer.ranks if len(token) > 1]
    assert " the" in learned and not [t for t in learned if t.strip() and " " in t[1:]]
    assert regex.findall(PATTERN, "I'll go,  now") == ["I", "'ll", " go", ",", " ", " now"]


def test_vocabulary_size(tokenizer, refused):
    """vocab_size counts bytes, merges and eos; 257 is the least, below it the flag and the value are named."""
    assert tokenizer.vocab_size == 320
    assert Tokenizer.train(TEXTS, 257).encode("the") == list(b"the")
    assert "--vocab_size 256" in refused(Tokenizer.train, TEXTS, 256)


# Storage


def test_state_round_trip(tokenizer):
    """Through torch.save and weights_only=True: the same ranks in the same order, the same ids, the same name."""
    file = io.BytesIO()
    torch.save(tokenizer.state(), file)
    file.seek(0)
    other = Tokenizer.from_state(torch.load(file, weights_only=True))
    assert list(other.ranks.items()) == list(tokenizer.ranks.items())
    assert (other.name, other.eos, other.vocab_size) == (tokenizer.name, tokenizer.eos, tokenizer.vocab_size)
    assert other.encode("the cat \U0001f600") == tokenizer.encode("the cat \U0001f600")


# Other implementations


def test_equals_hugging_face_tokenizers(tokenizer):
    """The `tokenizers` package with the same merges and GPT-2's byte-level split gives the same ids."""
    tokenizers = pytest.importorskip("tokenizers")

    def written(token):
        return "".join(LETTER[b] for b in token)

    ranks = tokenizer.ranks
    merges = [(written(t[:i]), written(t[i:])) for t in ranks if len(t) > 1 for i in range(1, len(t))
              if t[:i] in ranks and t[i:] in ranks]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({written(t): rank for t, rank in ranks.items()}, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*TEXTS, EOS, "\U0001f600 the then\u00e9  x", "that thin cat's there\n\n\nall 12 at"]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_merges_equal_hugging_face_s():
    """Their trainer learns the same tokens in the same order, where no two pairs are equally frequent."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdef", k=rng.randint(3, 7))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, weights=range(200), k=20_000))]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=256 + 30, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    learned = [t for t, _ in sorted(theirs.get_vocab().items(), key=lambda item: item[1])][256:]
    ours = [t.decode().replace(" ", "\u0120") for t in list(Tokenizer.train(texts, 257 + 30).ranks)[256:]]
    assert len(ours) == 30 and ours == learned


def test_gpt2_ranks_become_a_tokenizer(monkeypatch, tokenizer):
    """Ranks that tiktoken holds in any order get their ids back; the name says which they are."""
    shuffled = dict(random.Random(0).sample(list(tokenizer.ranks.items()), len(tokenizer.ranks)))
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=shuffled, special_tokens={EOS: len(shuffled)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    gpt2 = Tokenizer.gpt2()
    assert gpt2.name == "gpt2" and gpt2.encode("the cat") == tokenizer.encode("the cat")
    assert Tokenizer.from_state(gpt2.state()).ranks == tokenizer.ranks  # a state lists tokens in the order of their ids


def test_gpt2_ranks_missing_and_no_network(monkeypatch, tmp_path, refused):
    """An empty cache and a dead proxy: exit 2 with the folder looked at and two ways out."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # whatever was loaded before
    error = refused(Tokenizer.gpt2)
    assert str(tmp_path) in error and "TIKTOKEN_CACHE_DIR" in error and "--tokenizer bpe" in error


@pytest.mark.parametrize("error", [ValueError("first line\nsecond line"), KeyError("x"), OSError()],
                         ids=["two lines", "key", "no message"])
def test_a_broken_cache_of_gpt2_ranks_is_refused_too(monkeypatch, refused, error):
    """Whatever tiktoken raises, an error without a message included, ends in one line."""
    def get_encoding(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert "TIKTOKEN_CACHE_DIR" in refused(Tokenizer.gpt2)


# Of other programs

LETTER = {b: letter for letter, b in tok.BYTE_OF.items()}
PIECES = ["the", " cat", "é", "e\u0301", "漢字", " 12", "½", "Ⅷ", "'ll", "'S", "ſ", "\U0001f600", "\0", "\4", "\x13",
          "\x1c", "\x1d", "\x85", "\u2028", "\ufeff", "\u00a0", " ", "   ", "\n", "\r\n", "\t", "!", "?!", "!\4!",
          "1\4", "\U00040000", "\U000a1234", "a" * 70, EOS, "<|im_end|>", "\n3"]


def nasty(n):
    rng = random.Random(n)
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 9))) for _ in range(n)]


def learned(kind, specials=(), alphabet=range(256)):
    """A tokenizer of the `tokenizers` package: `specials` first, then the alphabet's bytes, then merges."""
    t = pytest.importorskip("tokenizers")
    level = t.pre_tokenizers.ByteLevel
    theirs = t.Tokenizer(t.models.BPE())
    theirs.pre_tokenizer = {
        "gpt2": level(add_prefix_space=False),
        "digits": t.pre_tokenizers.Sequence([t.pre_tokenizers.Digits(True), level(add_prefix_space=False)]),
        "qwen": t.pre_tokenizers.Sequence([t.pre_tokenizers.Split(t.Regex(tok.QWEN2), "isolated"),
                                           level(add_prefix_space=False, use_regex=False)])}[kind]
    if kind == "qwen":
        theirs.normalizer = t.normalizers.NFC()
    texts = [text for text in [*TEXTS, *nasty(300)] if {*text.encode()} <= {*alphabet}]
    theirs.train_from_iterator(texts, t.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=[*specials], limit_alphabet=256,
        initial_alphabet=[LETTER[b] for b in alphabet]))
    return theirs


@pytest.mark.parametrize("kind", ["gpt2", "digits", "qwen"])
@pytest.mark.parametrize("specials", [(), (EOS, "<|im_start|>", "<|im_end|>")], ids=["plain", "special first"])
def test_a_folder_s_ids_equal_hugging_face_s(tmp_path, kind, specials):
    """Three ways to split, NFC, special tokens before the bytes and behind the vocabulary, from tokenizer.json and,
    where it can say as much, from vocab.json with merges.txt: ids of 1,000 nasty strings. A text's special tokens are
    plain text here, so that the other program is compared without its own."""
    theirs = learned(kind, specials)
    theirs.save(str(path := tmp_path / "tokenizer.json"))
    parts = json.loads(path.read_text())
    parts["added_tokens"].append({"id": 500, "content": "<|last|>", "special": True})
    path.write_text(json.dumps(parts))
    (tmp_path / "config.json").write_text('{"eos_token_id": [500, 1], "bos_token_id": null}')
    ours = [tok.from_folder(tmp_path, 512)]
    if kind == "gpt2":
        (tmp_path / "more").mkdir()
        theirs.model.save(str(tmp_path / "more"))
        (tmp_path / "more" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
        vocab = json.loads((tmp_path / "more" / "vocab.json").read_text())
        (tmp_path / "more" / "vocab.json").write_text(json.dumps(vocab | {"<|end|>": 511}))
        ours.append(tok.from_folder(tmp_path / "more"))
        assert ours[1].eos == ours[1].opening == 511 and ours[1].vocab_size == 512
    assert ours[0].eos == ours[0].opening == 500 and ours[0].vocab_size == 512
    ours += [Tokenizer.from_state(ours[0].state())]
    bare = type(theirs).from_str(json.dumps(parts | {"added_tokens": []}))
    for text in nasty(1000):
        expected = bare.encode(text).ids
        for own in ours:
            assert own.encode(text) == expected
        if not ours[0].nfc:
            assert ours[0].decode(ours[0].encode_prompt(text)) == text


def test_where_eos_is_named(tmp_path):
    """tokenizer_config.json, special_tokens_map.json, config.json, generation_config.json: the first that does."""
    added = [{"id": 258 + n, "content": f"<{n}>"} for n in range(4)]
    parts = written(added_tokens=[*added, {"id": 270, "content": EOS}])
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    assert tok.from_folder(tmp_path).eos == 270
    for n, (name, value) in enumerate([("generation_config.json", {"eos_token_id": [258, 270]}),
                                       ("config.json", {"eos_token_id": 259}),
                                       ("special_tokens_map.json", {"eos_token": {"content": "<2>"}}),
                                       ("tokenizer_config.json", {"eos_token": "<3>"})]):
        (tmp_path / name).write_text(json.dumps(value))
        assert tok.from_folder(tmp_path).eos == 258 + n


def test_a_template_names_the_eos_of_another_file(tmp_path):
    """special_tokens_map.json's, as transformers gives it to the template."""
    names = ("<|im_start|>", "<|im_end|>")
    parts = written(added_tokens=[{"id": 258 + n, "content": name} for n, name in enumerate(names)])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": names[1]}}))
    template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    own = read(tmp_path, parts, chat_template=template)
    assert own.eos == 259 and own.form is not None and own.form.system is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": names[0]}}))
    own = read(tmp_path, parts, chat_template=template, eos_token=names[1])  # which comes first
    assert own.eos == 259 and own.form is not None


def test_normalizers_one_after_another(tmp_path):
    for steps, nfc in (([], False), ([{"type": "NFC"}], True)):
        assert read(tmp_path, written(normalizer={"type": "Sequence", "normalizers": steps})).nfc is nfc


def test_a_class_without_a_tokenizer_json(tmp_path, refused):
    """vocab.json with merges.txt: Qwen2's class splits by its own pattern and knows NFC, GPT-2's does not; tokens are
    added by two other files."""
    vocab = {LETTER[b]: b for b in range(256)} | {"11": 256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 1\n")

    def settings(**values):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        return tok.from_folder(tmp_path)

    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 257, "<|im_end|>": 258}')
    own = settings(eos_token="<|im_end|>")
    assert own.encode("11") == [256] and own.eos == 258 and own.special == {"<|im_start|>": 257, "<|im_end|>": 258}
    for more in ({"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "Qwen2TokenizerFast"}):
        own = settings(eos_token="<|im_end|>", **more)
        assert settings(eos_token="<|im_end|>").pattern == PATTERN
        assert own.encode("11") == [49, 49] and own.encode("e\u0301") == [*"\u00e9".encode()]
    own = settings(eos_token="<|x|>", added_tokens_decoder={"300": {"content": "<|x|>"}})
    assert own.eos == 300 and own.encode("e\u0301") == [*"e\u0301".encode()]
    for config, name, nfc in (({"model_type": "qwen3"}, None, True), ({"model_type": "qwen2"}, "GPT2Tokenizer", True),
                              ({"model_type": "llama", "tokenizer_class": "Qwen2Tokenizer"}, None, True),
                              ({"model_type": "llama"}, "GPT2TokenizerFast", False),
                              ({"model_type": "llama", "tokenizer_class": "Qwen2Tokenizer"}, "GPT2Tokenizer", False),
                              ({"model_type": "gpt2"}, None, False)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert settings(eos_token="<|im_end|>", tokenizer_class=name).nfc is nfc
    assert "tokenizer_class 'BertTokenizer'" in refused(settings, tokenizer_class="BertTokenizer")
    assert "add_prefix_space True: a blank" in refused(settings, eos_token="<|im_end|>", add_prefix_space=True)
    parts = written()
    assert "add_prefix_space True" in refused(read, tmp_path, parts, add_prefix_space=True)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert read(tmp_path, parts, add_prefix_space=True, **fast).encode("the") == [257]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read(tmp_path, parts, add_prefix_space=True).encode("the") == [257]


def test_bytes_without_a_token_are_dropped_from_their_words(tmp_path):
    """Five bytes that no token holds: the ids are still those of the other program, which drops them before it merges;
    tiktoken alone would panic."""
    absent = {4, 0x13, 0x1D, 0xF1, 0xF2}
    theirs = learned("digits", (EOS,), [b for b in range(256) if b not in absent])
    parts = json.loads(theirs.to_str())
    gone = [token for token in parts["model"]["vocab"] if any(LETTER[b] in token for b in absent)]
    assert not [token for token in gone if len(token) > 1]  # else its merges would have to go, too
    for token in gone:
        del parts["model"]["vocab"][token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    ours = tok.from_folder(tmp_path)
    bare = type(theirs).from_str(json.dumps(parts | {"added_tokens": []}))
    for text in nasty(1000):
        assert ours.encode(text) == bare.encode(text).ids
    assert ours.decode(ours.encode("!\4!")) == "!!" and len(ours.missing) == len(absent)
    assert Tokenizer.from_state(ours.state()).encode("a\4b") == ours.encode("a\4b")


def written(**changes):
    """A tokenizer.json of all bytes, the merges "t h" and "th e", and eos; `changes` by dotted names."""
    vocab = {LETTER[b]: b for b in range(256)} | {"th": 256, "the": 257}
    parts = {"added_tokens": [{"id": 258, "content": EOS}], "normalizer": None, "post_processor": None,
             "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
             "model": {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e"]}}
    for name, value in changes.items():
        *path, last = name.split("__")
        inside = parts
        for step in path:
            inside = inside[step]
        inside[last] = value
    return parts


def read(folder, parts, **settings):
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tok.from_folder(folder)


def test_what_opens_a_row(tmp_path, refused):
    """The token that the template puts first, else bos_token, else eos; "the" is one token, a marker plain text."""
    parts = written(added_tokens=[{"id": 258, "content": EOS}, {"id": 300, "content": "<s>"}])
    assert read(tmp_path, parts).encode_prompt("the") == [258, 257]
    assert read(tmp_path, parts, bos_token="<s>").encode_prompt("the") == [300, 257]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    for processor in (template, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}):
        own = read(tmp_path, parts | {"post_processor": processor}, bos_token=EOS)
        assert own.encode_prompt("<s>")[:2] == [300, ord("<")]
    numbered = template | {"special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}}}
    assert read(tmp_path, parts | {"post_processor": numbered}).opening == 258
    numbered["special_tokens"]["<s>"]["ids"] = [258, 300]
    assert "opens a text with 2 tokens, [258, 300]" in refused(read, tmp_path, parts | {"post_processor": numbered})
    two = template | {"single": [{"SpecialToken": {"id": "<s>"}}, *template["single"]]}
    assert "opens a text with 2 tokens, [300, 300]" in refused(read, tmp_path, parts | {"post_processor": two})
    own = read(tmp_path, parts, bos_token="<s>")
    assert own.encode_completion("the") == [257, 258] and own.vocab_size == 301
    assert own.decode([300, 257, 299, 258]) == "the\ufffd" and own.count_bytes([300, 257, 258]) == 3
    assert own.decode([257, 300]) == "the<s>"


def test_special_tokens_beyond_the_model_are_left_out(tmp_path, refused):
    """A model of 259 tokens has no <pad>, and its rows cannot end with one."""
    parts = written(added_tokens=[{"id": 258, "content": EOS}, {"id": 300, "content": "<pad>"}])
    assert read(tmp_path, parts).vocab_size == 301
    own = tok.from_folder(tmp_path, 259)
    assert own.special == {EOS: 258} and own.vocab_size == 259
    assert "'the' has the id 257: the tokens' ids are not different numbers from 0 to 256" in refused(
        tok.from_folder, tmp_path, 257)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 258}')
    assert "eos_token is 300" in refused(tok.from_folder, tmp_path, 259)


def says(path, words):
    return lambda error: f"{path}: " in error and all(word in error for word in words)


@pytest.mark.parametrize("changes, words", [
    ({"model__type": "Unigram"}, ["model.type 'Unigram'"]),
    ({"model__dropout": 0.1}, ["model.dropout 0.1"]),
    ({"model__byte_fallback": True}, ["model.byte_fallback"]),
    ({"normalizer": {"type": "Lowercase"}}, ["normalizer", "Lowercase"]),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}}, ["normalizer", "NFD"]),
    ({"pre_tokenizer": {"type": "Metaspace"}}, ["pre_tokenizer", "Metaspace"]),
    ({"pre_tokenizer": None}, ["pre_tokenizer"]),
    ({"pre_tokenizer__add_prefix_space": True}, ["add_prefix_space"]),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]}},
     ["Punctuation + ByteLevel"]),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "use_regex": False}]}}, ["leaves out some characters"]),
    ({"model__merges": ["th e", "t h"]}, ["merge 0 'th e'"]),
    ({"model__merges": ["t h"]}, ["token 'the'", "no merge"]),
    ({"model__merges": ["t h", "th e", "t he"]}, ["merge 2", "two earlier tokens"]),
    ({"model__vocab__th": 257, "model__vocab__the": 256}, ["order of its merges"]),
    ({"model__vocab__the": 3}, ["order of its merges"]),
    ({"model__vocab__the": 258}, ["not different numbers"]),
    ({"model__vocab__the": -1}, ["order of its merges"]),
    ({"model__vocab__the": 2.5}, []),
    ({"model__vocab__the": 10 ** 30, "added_tokens": []}, []),
    ({"added_tokens": []}, ["eos_token is None"]),
    ({"added_tokens": [{"id": 258}]}, ["KeyError"]),
    ({"model": 3}, ["AttributeError"]),
    ({"model__merges": [["t"], ["th", "e"]]}, ["merge 0"]),
    ({"added_tokens": [{"id": 257, "content": EOS}]}, [f"'{EOS}' has the id 257, as 'the' has"]),
    ({"added_tokens": [{"id": "258", "content": EOS}]}, ['has the id "258"', "not different numbers"]),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, ["pre_tokenizer {}", "ByteLevel"]),
    ({"post_processor": {"type": "RobertaProcessing", "cls": [EOS, 258], "sep": [EOS, 258]}}, ["RobertaProcessing"]),
], ids=range(27))
def test_what_tiktoken_cannot_do_is_refused(tmp_path, refused, changes, words):
    """By file, key and value, in one line."""
    assert says(tmp_path / "tokenizer.json", words)(refused(read, tmp_path, written(**changes)))


def split(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+",
    "GPT-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{WORD}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              rf"|\p{{N}}{{1,3}}|[^\r\n\p{{L}}\p{{N}}]?{WORD}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "dollar": r"[$]+|[^$]{1,3}",
    "sets": "[\u4e00-\u9fff\u3040-\u30ff]+|" r"[!\"#$%'()*+,./:;=?@\\^_`{|}\-]+|\$+ ?|\p{L}+|\n|[^\p{L}\n]",
    "other": r"(?=the)the?+|(cat|\d+) ?|\p{Han}+|[^\[\]\-a-f&~]{2,}|[\s\S]"}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_pattern_gives_the_other_program_s_words(tmp_path, name):
    """Of a vocabulary whose merges cross every boundary, so that a word that differs shows."""
    t = pytest.importorskip("tokenizers")
    learner = t.Tokenizer(t.models.BPE())
    learner.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.train_from_iterator([text * 2 for text in [*TEXTS, *nasty(300)]], t.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=[*LETTER.values()]))
    parts = json.loads(learner.to_str()) | {"pre_tokenizer": split(SPLITS[name])}
    theirs = t.Tokenizer.from_str(json.dumps(parts))
    ours = read(tmp_path, parts | {"added_tokens": [{"id": 900, "content": EOS}]})
    for text in [*nasty(1000), "123456789", "the 1234cat'S HELLO/\n/x", "[-]--&&~~ab", "$$ a.$b\\s {^} \u3042x"]:
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("pattern, words", [
    ("[^c]+", "leaves out"), ("[^\u3042]+", "leaves out"), ("[\\s\\S]{2}", "leaves out"),
    (r"((a{0,1000}){1000})|[\s\S]", "very long"), ("(?:ab){2}|[\\s\\S]", "very long"),
    ("[" + "".join(map(chr, range(0x4E00, 0x5000 + 2000))) + "]|[\\s\\S]", "very long"), ("(" * 1000, "is not one"),
    ("(" * 900 + "a" + ")" * 900 + "|[\\s\\S]", "is not one"), ("\\<+|[^<]+", "read otherwise"),
    ("a(?!b)|[^a]", "leaves out"), ("(?=ab)|[\\s\\S]", "no characters"),
    ("|[\\s\\S]", "no characters"), ("\\s*|\\S", "no characters"), ("a{,2}|[\\s\\S]", "no characters"),
    ("(?=a)|[\\s\\S]", "no characters"),
    ("[\\s\\S", "is not one"), *((pattern, "read otherwise") for pattern in (
        "\\s+$|[\\s\\S]", "^the|[\\s\\S]", "\\w+|[\\s\\S]", "\\bthe|[\\s\\S]", "(?m:.+)|[\\s\\S]", "(?s:.)",
        "[[:alpha:]]+|[\\s\\S]", "\\p{Word}+|[\\s\\S]", "(?i:\\p{Lu})+|[\\s\\S]", "(?i:\u017f)|[\\s\\S]",
        "[a-z&&b]|[\\s\\S]", "a{1,2}+|[\\s\\S]", "(?<=a)b|[\\s\\S]", "(x+x+)+(?=y)|[\\s\\S]", "(a|b)*c|[\\s\\S]"))])
def test_a_split_pattern_that_tiktoken_may_read_otherwise(tmp_path, refused, pattern, words):
    """What leaves characters out, finds words of none (at which tiktoken panics), means another thing elsewhere, or may
    take very long."""
    error = refused(read, tmp_path, written(pre_tokenizer=split(pattern)))
    assert "tokenizer.json: its split pattern" in error and words in error


def test_a_text_that_a_pattern_cannot_split(refused):
    """tiktoken gives up after a million ways, in its own manner, which is told in ours."""
    own = Tokenizer({bytes([b]): b for b in range(256)}, "x", r"\p{L}*\p{L}*\p{L}*(?=1)1|[\s\S]")
    assert own.encode("ab") == [97, 98]
    assert "a text of 3,000 characters cannot be split" in refused(own.encode, "a" * 3000)


def test_tokens_that_would_take_hours_to_check(tmp_path, refused):
    """Each twice the one before: the last of 2^14 bytes."""
    sizes = [1 << n for n in range(15)]
    vocab = {LETTER[b]: b for b in range(256)} | {"a" * size: 255 + n for n, size in enumerate(sizes) if n}
    merges = [["a" * size] * 2 for size in sizes[:-1]]
    for whole in (False, True):
        parts = written(model__vocab=vocab, model__merges=merges, model__ignore_merges=whole)
        parts["added_tokens"][0]["id"] = 300
        assert "of 16,384 bytes: its tokens are too long" in refused(read, tmp_path, parts)


def test_a_name_that_stands_twice_among_many(tmp_path, refused):
    names = ", ".join(f'"{n}": 0' for n in range(200_000))
    (tmp_path / "tokenizer.json").write_text(f'{{{names}, "7": 1}}')
    assert "'7' stands twice" in refused(pretrained.read_json, str(tmp_path / "tokenizer.json"))


def test_a_pipe_is_no_file(tmp_path, refused):
    """Nobody writes into it: reading would never end."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                 "vocab.json", "merges.txt"):
        os.mkfifo(tmp_path / name)
    assert "vocab.json: cannot be read (it is no file)" in refused(tok.from_folder, tmp_path)
    os.remove(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text("{}")
    assert "merges.txt: cannot be read (it is no file)" in refused(tok.from_folder, tmp_path)
    os.remove(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps(written()))
    assert tok.from_folder(tmp_path).form is None


def test_a_token_that_two_orders_of_merging_make(tmp_path, refused):
    """"abc" by (a, bc), where ab is merged before bc: tiktoken makes it of ab and c, the other program never. With
    ignore_merges, where the list holds every pair that makes a token, both do as tiktoken does."""
    vocab = {LETTER[b]: b for b in range(256)} | {"ab": 256, "bc": 257, "abc": 258}
    parts = written(model__vocab=vocab, model__merges=["a b", "b c", "a bc"])
    parts["added_tokens"][0]["id"] = 259
    assert "'abc': tiktoken would make it of other parts" in refused(read, tmp_path, parts)
    parts["model"] |= {"ignore_merges": True}
    assert "'abc'" in refused(read, tmp_path, parts)
    parts["model"]["merges"] = ["a b", "b c", "a bc", "ab c"]
    assert read(tmp_path, parts).encode("abcab") == [258, 256]


@pytest.mark.parametrize("content, words", [
    (None, ["vocab.json: cannot be read (No such file"]), (b"", ["not JSON"]), (b"[1]", ["expected an object"]),
    (b"\xff", ["not JSON"]), (b"[" * 100_000, ["not JSON"]), (b'{"model": {}}', ["pre_tokenizer"])],
    ids=range(6))
def test_a_broken_tokenizer_file(tmp_path, refused, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    error = refused(tok.from_folder, tmp_path)
    assert str(tmp_path) in error and all(word in error for word in words)


def test_a_gguf_s_tokenizer(refused):
    """Tokens in the order of their ids, kinds 3 and 4 special; a way to split that nobody knows here is refused."""
    tokens = [EOS, "<|im_start|>", *LETTER.values(), "th", "the"]
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3, 4] + [1] * 258,
                "merges": ["t h", "th e"], "eos_token_id": 0, "bos_token_id": 1, "add_bos_token": False}
    get = lambda **changes: tok.from_gguf("x.gguf", {  # noqa: E731
        f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items()})
    own = get()
    assert own.encode_prompt("the12") == [1, 259, 2 + [*LETTER].index(ord("1")), 2 + [*LETTER].index(ord("2"))]
    assert own.eos == 0 and own.vocab_size == 260 and own.pattern == tok.DIGITS_APART
    for changes, words in (({"pre": "unheard-of"}, "pre 'unheard-of'"), ({"model": "llama"}, "model 'llama'"),
                           ({"add_space_prefix": True}, "add_space_prefix"), ({"token_type": [3]}, "not a tokenizer"),
                           ({"tokens": tokens[:-1] + ["th"]}, "twice"), ({"eos_token_id": 5}, "a text could hold it"),
                           ({"eos_token_id": 999}, "eos_token is 999"), ({"merges": None}, "not a tokenizer")):
        assert words in refused(get, **changes)


def test_a_changed_tokenizer_file_is_refused_or_read(tmp_path):
    """Parts of a good file dropped, doubled, swapped or of another type: one line, or a tokenizer that round-trips."""
    rng, good, refusals = random.Random(0), written(), 0
    for case in range(150):
        parts = copy.deepcopy(good)
        for _ in range(rng.randint(1, 2)):
            inside = rng.choice([parts, parts["model"] if isinstance(parts.get("model"), dict) else parts])
            for _ in range(rng.randrange(3)):
                values = inside.values() if isinstance(inside, dict) else inside
                deeper = [v for v in values if isinstance(v, (dict, list))]
                inside = rng.choice(deeper) if deeper else inside
            keys = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
            if keys:
                inside[rng.choice(keys)] = rng.choice([None, 0, -1, 1.5, "x", [], {}, True, 10 ** 20, "\udc00", [[]]])
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error):
                own = read(tmp_path, parts)
        except SystemExit as stop:
            assert stop.code == 2 and error.getvalue().count("\n") == 1, (case, error.getvalue())
            refusals += 1
            continue
        assert own.decode(own.encode("the cat, then 12\n")).replace("\ufffd", "") != "", case
        assert Tokenizer.from_state(own.state()).encode("the cat") == own.encode("the cat")
    assert 30 < refusals < 150
