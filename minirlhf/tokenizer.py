"""Text to token ids: byte-level BPE whose merges are learned from the data, GPT-2's, or those of a model's folder.

All run as a tiktoken.Encoding. Invariants: no text can produce a special token, "<|endoftext|>" in it is plain text; a
row begins with the token that the model's own training began with, so that an empty prompt has something to condition
on. For GPT-2 and for what is trained here that is eos.

Left out: chat templates and padding tokens. Rows are padded with eos and masked by their lengths.
"""
import contextlib
import heapq
import itertools
import json
import os
import tempfile
import time
import unicodedata
from array import array
from collections import Counter, defaultdict

import regex  # tiktoken stands on it
import tiktoken

from minirlhf.chat import END, Form, form_of
from minirlhf.config import fail, say

EOS = "<|endoftext|>"
# GPT-2's pattern (Radford et al. 2019, encoder.py), with possessive quantifiers: the same splits, no backtracking
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# the same after every digit has been split off, as SmolLM2 does it
DIGITS_APART = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s"""
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that files of byte-level BPE write as Latin-1
BYTE_OF = dict(zip(map(chr, [*PRINTABLE, *range(256, 324)]),  # the others, in order, as the letters from U+0100 on
                   [*PRINTABLE, *(b for b in range(256) if b not in PRINTABLE)]))


class Tokenizer:
    """ranks: a token's bytes -> its id, where the order of ids is that of the merges. By default they are 0..n-1, all
    single bytes are among them, and eos is id n.

    special: {text: id} of further tokens, eos and `opening`, which begins a row, among them. vocab_size: of the model;
    an id without a token decodes to U+FFFD. nfc: texts are brought into normalization form C first. form: of messages,
    None for Human/Assistant text; `open_form` says why it is not known, where that is so.
    """

    def __init__(self, ranks: dict[bytes, int], name: str, pattern: str = PATTERN,
                 special: dict[str, int] | None = None, eos: int | None = None, opening: int | None = None,
                 vocab_size: int | None = None, nfc: bool = False, form: Form | None = None):
        self.ranks, self.name, self.pattern, self.nfc = ranks, name, pattern, nfc
        self.form, self.open_form = form, ""
        self.special = {EOS: len(ranks)} if special is None else special
        self.eos = len(ranks) if eos is None else eos
        self.opening = self.eos if opening is None else opening
        self.vocab_size = vocab_size or 1 + max([*ranks.values(), *self.special.values()])
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]  # tiktoken panics at a byte without an id
        extra = {byte: self.vocab_size + n for n, byte in enumerate(missing)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks | extra, special_tokens={})
        self.missing = b"".join(missing)
        self.ids = list(range(self.vocab_size + len(extra)))  # one object an id: lists that share them take 8 bytes a
        self.bytes = ["\ufffd".encode()] * self.vocab_size  # token, not 40
        for token, i in [*ranks.items(), *((text.encode("utf-8", "replace"), i) for text, i in self.special.items())]:
            self.bytes[i] = token

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. A lone surrogate becomes U+FFFD; a byte that has no id is dropped from its word, as
        the `tokenizers` package does it."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        try:
            ids = [self.ids[i] for i in self.encoding.encode_ordinary(text)]
        except BaseException as error:  # where the pattern tries too many ways, tiktoken raises what is no Exception
            if type(error).__name__ != "PanicException":
                raise
            fail(f"a text of {len(text):,} characters cannot be split by the tokenizer's pattern {self.pattern[:60]!r}")
        if self.missing and ids and max(ids) >= self.vocab_size:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = [self.ids[i] for word in regex.finditer(_for_regex(self.pattern), text)
                   if (kept := word[0].encode().translate(None, self.missing))
                   for i in self.encoding._core_bpe.encode_single_piece(kept)]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return [self.opening] + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        return self.encode(text) + [self.eos]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; a row's first token and an answer's end are left out, bytes that are not UTF-8 become
        U+FFFD."""
        return b"".join(self.bytes[i] for i in self._said(ids)).decode("utf-8", "replace")

    def count_bytes(self, ids: list[int]) -> int:
        """UTF-8 bytes of the text of the ids."""
        return sum(len(self.bytes[i]) for i in self._said(ids))

    def _said(self, ids):
        ids = ids[1:] if len(ids) and ids[0] == self.opening else ids
        return ids[:-1] if len(ids) and ids[-1] in self.ends() else ids

    def ends(self) -> set[int]:
        """The tokens that end an answer: eos, and that of the form of messages."""
        return {self.eos, self.special[END.text]} if self.form else {self.eos}

    def state(self) -> dict:
        """What a checkpoint stores: plain values, because it is read with weights_only=True. Of what is as by default,
        nothing."""
        n = len(self.ranks)
        state = {"name": self.name, "ranks": [token.decode("latin-1") for token in self.ranks]}
        more = {"ids": [*self.ranks.values()], "special": self.special, "eos": self.eos, "opening": self.opening,
                "vocab_size": self.vocab_size}
        if [*more.values()] != [[*range(n)], {EOS: n}, n, n, n + 1]:
            state |= more
        if self.pattern != PATTERN:
            state["pattern"] = self.pattern
        return state | ({"nfc": True} if self.nfc else {}) | ({"form": self.form._asdict()} if self.form else {})

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """Raises ValueError where these are no ranks: a token or an id twice, or a byte that could not be encoded."""
        ids = state.get("ids", range(len(state["ranks"])))
        ranks = {token.encode("latin-1"): i for token, i in zip(state["ranks"], ids, strict=True)}
        more = {name: value for name, value in state.items() if name not in ("ids", "ranks", "name")}
        every = [*ids, *more.get("special", {}).values()]
        size = more.get("vocab_size", len(ranks) + 1)
        if len(ranks) < len(ids) or "ids" not in state and not {bytes([b]) for b in range(256)} <= ranks.keys():
            raise ValueError("the ranks of its tokenizer hold a token twice, or not every byte")
        if (any(type(i) is not int or not 0 <= i < size for i in every + [more.get(k, 0) for k in ("eos", "opening")])
                or len({*every}) < len(every) or [*ids] != sorted(ids)):
            raise ValueError("the ids of its tokenizer are not those of tokens in order, each once")
        return cls(ranks, state["name"], **more | {"form": Form.of(state.get("form"), more.get("special", {}))})

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids, under whatever name; messages are another matter."""
        ignored = {"name": "", "form": None}
        return self.state() | ignored == other.state() | ignored

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own ranks, from tiktoken's cache or, the first time, from the network."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' many errors, or a broken file in the cache
            cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or os.path.join(
                tempfile.gettempdir(), "data-gym-cache")
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            fail(f"GPT-2's ranks are not in {cache} and could not be fetched ({reason}); run once with a network, copy "
                 "that folder here and name it in TIKTOKEN_CACHE_DIR, or train a tokenizer with --tokenizer bpe")
        ranks = encoding._mergeable_ranks
        return cls(dict(sorted(ranks.items(), key=lambda item: item[1])), "gpt2")

    @classmethod
    def train(cls, texts: list[str], vocab_size: int, say=say) -> "Tokenizer":
        """Byte-level BPE (Sennrich et al. 2016) of the texts: merge the most frequent pair until vocab_size - 1 ranks.

        Pairs never cross the split pattern's words. Ties go to the pair whose bytes come first, so that the result is a
        function of the texts alone. Stops early when no pair occurs twice; tokens that were never seen do not arise but
        for single bytes. A merge costs in proportion to the places that it changes, so that one word of megabytes takes
        no longer than as much prose; what takes seconds says so.
        """
        if vocab_size < 257:
            fail(f"--vocab_size {vocab_size}: byte-level BPE needs at least 257 (256 bytes and the end-of-text token)")
        watch, words = Watch(say), Counter()
        for text in texts:
            words.update(regex.findall(PATTERN, text))
            watch(lambda: f"{len(words):,} different words")
        names, ranks = [bytes([b]) for b in range(256)], {bytes([b]): b for b in range(256)}
        # All words one after another, a token a place; a merge leaves the pair's second place empty. Arrays of numbers
        # take 4 bytes a place, lists of objects ten times that
        tokens, times, before, after = array("i"), array("q"), array("i"), array("i")
        pair_counts, where = Counter(), defaultdict(lambda: array("i"))  # where: places that hold (or once held) a pair
        for word, count in words.items():
            piece, start = word.encode("utf-8", "replace"), len(tokens)
            end = start + len(piece)
            tokens.extend(piece)
            times.extend(array("q", [count]) * len(piece))
            before.extend(range(start - 1, end - 1))
            after.extend(range(start + 1, end + 1))
            before[start] = after[-1] = -1
            for i, pair in enumerate(zip(piece, piece[1:]), start):
                pair_counts[pair] += count
                where[pair].append(i)
            watch(lambda: f"{end:,} bytes of different words")
        heap = [(-n, names[a], names[b], (a, b)) for (a, b), n in pair_counts.items()]
        heapq.heapify(heap)
        while heap and len(ranks) < vocab_size - 1:
            n, first, second, pair = heapq.heappop(heap)
            if -n != pair_counts[pair]:  # an outdated entry; the current count has its own
                continue
            if -n < 2:
                break
            merged = ranks.setdefault(first + second, len(ranks))
            if merged == len(names):
                names.append(first + second)
            changed = Counter()
            for i in sorted(where.pop(pair)):  # from the left, as "aaa" must give aa + a
                j = after[i]
                if j < 0 or (tokens[i], tokens[j]) != pair:
                    continue
                left, right, count = before[i], after[j], times[i]
                changed[pair] -= count
                tokens[i], tokens[j], after[i] = merged, -1, right
                if left >= 0:
                    changed[tokens[left], pair[0]] -= count
                    changed[tokens[left], merged] += count
                    where[tokens[left], merged].append(left)
                if right >= 0:
                    before[right] = i
                    changed[pair[1], tokens[right]] -= count
                    changed[merged, tokens[right]] += count
                    where[merged, tokens[right]].append(i)
            for (a, b), difference in changed.items():
                if difference:
                    pair_counts[a, b] += difference
                    heapq.heappush(heap, (-pair_counts[a, b], names[a], names[b], (a, b)))
            watch(lambda: f"{len(ranks):,} of {vocab_size - 1:,} tokens")
        return cls(ranks, "bpe")


class Watch:
    """Says how far the learning is, once it has taken 3 seconds, then at twice the time of the last line."""

    def __init__(self, say):
        self.say, self.began, self.due = say, time.monotonic(), 3

    def __call__(self, progress):
        seconds = time.monotonic() - self.began
        if seconds > self.due:
            self.say(f"learning a vocabulary: {progress()}, {seconds:.0f} s")
            self.due = 2 * seconds


# ---- of other programs

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
CLASSES = {"GPT2Tokenizer": (PATTERN, False), "Qwen2Tokenizer": (QWEN2, True)}  # how they split, and whether with NFC
GGUF_PATTERNS = {"gpt-2": PATTERN, "smollm": DIGITS_APART, "qwen2": QWEN2}


# How a tokenizer.json may split: what `tokenizers`, tiktoken and `regex` read alike, so no ^ $ \w \b \< and no sets of
# sets; and no group that comes more than once, which could take very long
SPLIT = r"""(?x)
    (?(DEFINE) (?P<escape> \\ (?: [sSdDrnt] | [pP] \{ (?: [LMNPSZC][a-z]? | Han ) \} | [^\w\s<>] ) )
               (?P<set> \[ \^? (?: (?&escape) | [^][\\&~-] | -(?!-) | &(?!&) | ~(?!~) )+ \] )
               (?P<times> [?*+][?+]? | \{ \d+ (?: , \d* )? \} )
               (?P<group> \( (?: \?[=!] (?&either) \) | (?: \?i: [][|'a-zA-Z]+ | (?: \?: | (?!\?) ) (?&either)
                              ) \) \?? ) )
               (?P<item> (?: (?&escape) | (?&set) | [^][\\(){}*+?|^$] ) (?&times)? | (?&group) )
               (?P<either> (?&item)* (?: \| (?&item)* )* ) )
    (?&either) \Z"""
LONGEST = 1 << 27  # the sum of the squares of the tokens' lengths in bytes: half a minute of checks


def from_folder(folder, vocab_size=None):
    """The tokenizer of a folder that holds tokenizer.json, or vocab.json with merges.txt: byte-level BPE only.

    vocab_size: of the model, if it is not the tokenizer's; special tokens beyond it, as one for padding, are left out.
    eos and the token that opens a row are those that tokenizer_config.json, special_tokens_map.json, config.json or
    generation_config.json name, in this order; a row opens with eos where they name none.
    The form of messages is that of chat_template.jinja, else of tokenizer_config.json. Exits 2, naming file, key and
    reason, on what tiktoken would split or merge otherwise.
    """
    path = os.path.join(folder, "tokenizer.json")
    settings = [_object(os.path.join(folder, name), optional=True) for name in (
        "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")]
    reader = _class_of(settings)
    if settings[0].get("add_prefix_space") and reader in CLASSES:
        fail(f"{folder}/tokenizer_config.json: add_prefix_space {settings[0]['add_prefix_space']!r}: a blank would be "
             "put before every text")
    if os.path.isfile(path):
        parts = _object(path)
        with understanding(path):
            model = parts["model"]
            if (kind := model.get("type", "BPE")) != "BPE":
                fail(f"{path}: model.type {kind!r}: only byte-level BPE is read")
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
                if model.get(key):
                    fail(f"{path}: model.{key} {model[key]!r}: tiktoken has no such thing")
            special = {token["content"]: token["id"] for token in parts.get("added_tokens") or []}
            pattern, nfc = _split_pattern_of(parts, path), _is_nfc(parts.get("normalizer"), path)
            opening = _opening_of(parts.get("post_processor"), special, path)
            vocab, merges, ignore_merges = model["vocab"], model["merges"], bool(model.get("ignore_merges"))
            merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
            if model.get("unk_token") and any(letter not in vocab for letter in BYTE_OF):
                fail(f"{path}: model.unk_token {model['unk_token']!r}: stands for bytes that have no token")
    else:
        path, merges_path = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
        vocab, opening, ignore_merges = _object(path), None, False
        if reader not in CLASSES:
            fail(f"{folder}: tokenizer_class {reader!r}: without a tokenizer.json only {' and '.join(CLASSES)} are "
                 "known")
        pattern, nfc = CLASSES[reader]
        lines = [line for line in _text(merges_path).split("\n") if line and not line.startswith("#version")]
        merges = [tuple(line.split(" ")) for line in lines]
        joined = {"".join(pair) for pair in merges}
        special = {token: i for token, i in vocab.items() if token not in joined and token not in BYTE_OF}
        special |= _object(os.path.join(folder, "added_tokens.json"), optional=True)
        with understanding(f"{folder}/tokenizer_config.json"):
            special |= {token["content"]: int(i)
                        for i, token in (settings[0].get("added_tokens_decoder") or {}).items()}
    with understanding(path):
        named = {"eos": None, "bos": opening}
        for name in named:
            for setting in settings:
                token, i = setting.get(f"{name}_token"), setting.get(f"{name}_token_id")
                token = token["content"] if isinstance(token, dict) else token
                i = i[0] if isinstance(i, list) and i else i
                if named[name] is None:
                    named[name] = special.get(token, vocab.get(token)) if token is not None else i
        beyond = {token for token, i in special.items() if vocab_size and type(i) is int and i >= vocab_size}
        special, vocab = ({token: i for token, i in d.items() if token not in beyond} for d in (special, vocab))
        tokenizer = from_merges(path, vocab, merges, special, named["eos"], named["bos"], pattern, vocab_size, nfc,
                                ignore_merges)
    texts = {name: token["content"] if isinstance(token, dict) and "content" in token else token
             for name, token in (settings[1] | settings[0]).items() if name.endswith("_token")}
    tokenizer.form = form_of(folder, template_in(folder, settings[0]), special, **{
        name: text for name, text in texts.items() if isinstance(text, str)})
    return tokenizer


def _class_of(settings):
    """The class of transformers that reads a folder: a Qwen's always, else the one that is named."""
    family = settings[2].get("model_type", "gpt2")
    if family in ("qwen2", "qwen3"):
        return "Qwen2Tokenizer"
    usual = "GPT2Tokenizer" if family == "gpt2" else ""
    return str(settings[0].get("tokenizer_class") or settings[2].get("tokenizer_class") or usual).removesuffix("Fast")


def template_in(folder, settings):
    """A folder's chat template: the file's, or tokenizer_config.json's, the default one of several; or None."""
    path, template = os.path.join(folder, "chat_template.jinja"), settings.get("chat_template")
    if os.path.isfile(path):
        return _text(path)
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
        return template.get("default")
    return template


def from_gguf(path, metadata):
    """The tokenizer that a GGUF file's metadata (a dict) holds. Exits 2 as `from_folder` does."""
    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    with understanding(path):
        if (kind := get("model")) != "gpt2":
            fail(f"{path}: tokenizer.ggml.model {kind!r}: only byte-level BPE, 'gpt2', is read")
        if (pattern := GGUF_PATTERNS.get(get("pre"))) is None:
            fail(f"{path}: tokenizer.ggml.pre {get('pre')!r}: only {', '.join(GGUF_PATTERNS)} are known ways to split")
        if get("add_space_prefix"):
            fail(f"{path}: tokenizer.ggml.add_space_prefix True: a blank would be put before every text")
        tokens, kinds = get("tokens"), get("token_type")
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != 1}
        vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 1}
        if len(special) + len(vocab) < len(tokens):
            fail(f"{path}: tokenizer.ggml.tokens holds a token twice")
        tokenizer = from_merges(path, vocab, [tuple(m.split(" ")) for m in get("merges")], special, get("eos_token_id"),
                                get("bos_token_id"), pattern, len(tokens), nfc=get("pre") == "qwen2")
        named = {f"{name}_token": tokens[get(f"{name}_token_id")] for name in ("bos", "eos")
                 if get(f"{name}_token_id") is not None}
    tokenizer.form = form_of(path, metadata.get("tokenizer.chat_template"), special, **named)
    return tokenizer


def from_merges(path, vocab, merges, special, eos, opening, pattern, vocab_size=None, nfc=False, ignore_merges=False):
    """-> Tokenizer of {token as files write it: id}, merges [(left, right)] in order and special tokens {text: id}.

    tiktoken merges the pair whose token has the lowest id, other programs the pair that stands first in their list: the
    same where ids have the order of the merges and each token's bytes lead to it. Exits 2 where that is not so.
    """
    single = {letter: vocab[letter] for letter in BYTE_OF if letter in vocab}
    own, merged = {**single}, {}
    for n, pair in enumerate(merges):
        if len(pair) != 2 or not all(part in own for part in pair) or (token := "".join(pair)) not in vocab:
            fail(f"{path}: merge {n} {' '.join(map(str, pair))[:40]!r}: not of two earlier tokens into one of the "
                 "vocabulary")
        if token in own and not ignore_merges:
            fail(f"{path}: merge {n} {' '.join(pair)[:40]!r}: makes a token that an earlier merge has made")
        own[token] = vocab[token]
        merged.setdefault(token, set()).add(pair)
    order = [vocab[token] for token in merged]
    if order != sorted(order):
        fail(f"{path}: its tokens' ids are not in the order of its merges, which tiktoken needs")
    if lost := [token for token in vocab if token not in own and token not in special]:
        fail(f"{path}: token {lost[0][:40]!r}: no merge makes it, and it is no special token")
    if sum(len(token) ** 2 for token in own) > LONGEST:
        fail(f"{path}: token {max(own, key=len)[:40]!r} of {max(map(len, own)):,} bytes: its tokens are too long, this "
             "one most")
    ranks = {bytes(BYTE_OF[letter] for letter in token): own[token] for token in sorted(own, key=own.get)}
    for token, pairs in merged.items():
        piece = bytes(BYTE_OF[letter] for letter in token)
        if ignore_merges:
            splits = {(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in own and token[i:] in own}
            right = splits == pairs
        else:
            right = tuple(_merge(piece, ranks, own[token])) == tuple(
                bytes(BYTE_OF[letter] for letter in part) for part in next(iter(pairs)))
        if not right:
            fail(f"{path}: token {token[:40]!r}: tiktoken would make it of other parts")
    size = vocab_size or max(i for i in [*own.values(), *special.values()] if type(i) is int) + 1
    holders = {}
    for token, i in [*own.items(), *special.items()]:
        if type(i) is not int or not 0 <= i < size or i in holders:
            fail(f"{path}: token {token[:40]!r} has the id {json.dumps(i, default=str)[:40]}" + (
                f", as {holders[i][:40]!r} has" if type(i) is int and i in holders else "")
                + f": the tokens' ids are not different numbers from 0 to {size - 1}, the model's last")
        holders[i] = token
    if eos is None:
        eos = special.get(EOS)
    place = "tokenizer.ggml" if path.endswith(".gguf") else (
        "tokenizer_config.json, special_tokens_map.json, config.json or generation_config.json")
    for name, i in (("eos_token", eos), ("bos_token", eos if opening is None else opening)):
        if type(i) is not int or not 0 <= i < size:
            fail(f"{path}: {name} is {i!r}: expected the id of one of the {size} tokens, or its text, in {place}")
    if eos in ranks.values():
        fail(f"{path}: eos_token {eos}: a text could hold it; expected a special token")
    file, end = os.path.splitext(os.path.abspath(path))
    name = os.path.basename(file if end == ".gguf" else os.path.dirname(file))
    tokenizer = Tokenizer(ranks, name, pattern, special, eos, opening, size, nfc)
    probe = "".join(chr(c) for c in [*range(9, 0x3000, 7), 0x1F600, 0xE000, 0xE0001]) + "a1 \r\n  b\t "
    if not tokenizer.missing and tokenizer.decode(tokenizer.encode(probe)) != (
            unicodedata.normalize("NFC", probe) if nfc else probe):
        fail(f"{path}: its split pattern {pattern[:60]!r} leaves out some characters")
    return tokenizer


def to_json(tokenizer, special):
    """A tokenizer.json's values, with which other programs find the same ids. special: {text: id} of special tokens,
    those that open a row and end an answer among them.

    A text becomes `encode_prompt` of it, a pair of texts the row that a reward model reads: what opens it, prompt,
    completion, eos. Other programs take the text of a special token for the token, unless they are told otherwise
    (split_special_tokens=True). Raises ValueError where a special token is spelled as another token.
    """
    named = {i: text for text, i in special.items()}
    opening, eos = ({"SpecialToken": {"id": named[i], "type_id": 0}} for i in (tokenizer.opening, tokenizer.eos))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    letter = {byte: letter for letter, byte in BYTE_OF.items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in tokenizer.ranks}
    vocab = {spelled[token]: i for token, i in tokenizer.ranks.items()} | special
    if len(vocab) < len(spelled) + len(special):
        raise ValueError("a special token of its tokenizer is spelled as a token of texts is")
    merges, whole = _merges_of(tokenizer.ranks)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    steps = {PATTERN: [level], DIGITS_APART: [{"type": "Digits", "individual_digits": True}, level]}.get(
        tokenizer.pattern, [split, level | {"use_regex": False}])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": special[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for text in sorted(special, key=special.get)],
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": level if steps == [level] else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {
            "type": "TemplateProcessing", "single": [opening, first], "pair": [opening, first, second, eos],
            "special_tokens": {named[i]: {"id": named[i], "ids": [i], "tokens": [named[i]]}
                               for i in (tokenizer.opening, tokenizer.eos)}},
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole,
                  "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                  "merges": [" ".join(spelled[part] for part in pair) for pair in merges]}}


def _merges_of(ranks):
    """-> [(left, right)] in order, and whether a word that is a token is taken whole (ignore_merges).

    Other programs merge a token from the one pair that their list has. Where that is the pair to which the merges
    before it lead, they do as tiktoken does; a token that these do not leave in two parts needs every pair of its own.
    """
    parts = {token: _merge(token, ranks, i) for token, i in ranks.items() if len(token) > 1}
    if all(len(pair) == 2 for pair in parts.values()):
        return [*parts.values()], False
    return [(token[:i], token[i:]) for token in parts for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks], True


def _merge(piece, ranks, below):
    """The parts of a piece after all merges whose id is less than `below`."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while True:
        best, at = below, -1
        for i, pair in enumerate(zip(parts, parts[1:])):
            if (rank := ranks.get(pair[0] + pair[1], below)) < best:
                best, at = rank, i
        if at < 0:
            return parts
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


def _split_pattern_of(parts, path):
    """How a tokenizer.json splits a text into words, as one pattern."""
    steps = parts.get("pre_tokenizer") or {}
    steps = (steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]) or [{}]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        fail(f"{path}: pre_tokenizer {json.dumps(last)[:100]}: expected to end in ByteLevel without add_prefix_space")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return PATTERN
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return DIGITS_APART
    if (kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and not steps[0].get("invert")
            and steps[0].get("behavior") == "Isolated" and "Regex" in steps[0]["pattern"]):
        return _checked(steps[0]["pattern"]["Regex"], path)
    fail(f"{path}: pre_tokenizer {' + '.join(map(str, kinds))}: not a way to split that one pattern can express")


def _checked(pattern, path):
    """A split pattern as it is. Exits 2 where one of tiktoken and `tokenizers` would make other words of a text."""
    if pattern in (PATTERN, DIGITS_APART):
        return pattern
    shown = f"{path}: its split pattern {pattern[:60]!r}"
    if len(pattern) > 2000 or regex.search(r"\{\d*,?\d*\d{3}|\)\{", pattern):
        fail(f"{shown} could take very long")
    try:
        match = regex.compile(_for_regex(pattern)).match
    except (regex.error, RecursionError) as error:
        fail(f"{shown} is not one: {str(error)[:100]}")
    kinds = {unicodedata.category(chr(c)): chr(c) for c in range(0x3000)}  # one of each, what is named, and beside it
    some = {*map(chr, range(128)), *kinds.values(), *"\x85\u2028\u3000\ue000漢"}
    named = sorted({*pattern} - some)
    beside = {chr(c + n) for c in map(ord, pattern) for n in (-1, 1) if not 0xD7FF <= c <= 0xE000 and c < 0x10FFFF}
    found = [match(a + b) for a in {*some, *named, *beside} for b in ("", *some, *named[:50])]
    if None in found:
        fail(f"{shown} leaves out some characters")
    if not all(word[0] for word in found):
        fail(f"{shown} finds a word of no characters")
    if not regex.match(SPLIT, pattern):
        fail(f"{shown} holds what tiktoken may read otherwise than other programs, or what could take very long")
    return pattern


def _for_regex(pattern):
    """A pattern for the `regex` package, whose \\s and $ take more than tiktoken's. In a set $ is a character."""
    others = {r"\s": r"\p{White_Space}", r"\S": r"\P{White_Space}"}

    def other(found):
        return r"\Z" if found[0] == "$" else regex.sub(r"(?s)\\.", lambda part: others.get(part[0], part[0]), found[0])

    return regex.sub(r"(?s)\\.|\[(?:\\.|[^\\\]])*\]|\$", other, pattern)


def _is_nfc(normalizer, path):
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer.get("type") == "Sequence":
        steps = normalizer["normalizers"]
    if any(step.get("type") != "NFC" for step in steps):
        fail(f"{path}: normalizer {json.dumps(normalizer)[:100]}: only none and NFC are read")
    return bool(steps)


def _opening_of(processor, special, path):
    """The id of the token that a tokenizer.json puts before a text, or None. What it puts behind one is not asked."""
    opening = []
    for step in (processor or {}).get("processors", [processor or {}]):
        if (kind := step.get("type")) not in (None, "ByteLevel", "TemplateProcessing"):
            fail(f"{path}: post_processor {kind!r}: only ByteLevel and TemplateProcessing are read")
        ids = {name: [i] for name, i in special.items()} | {
            name: token["ids"] for name, token in (step.get("special_tokens") or {}).items()}
        for part in itertools.takewhile(lambda part: "SpecialToken" in part, step.get("single") or []):
            opening += ids[part["SpecialToken"]["id"]]
    if len(opening) > 1:
        fail(f"{path}: post_processor: opens a text with {len(opening)} tokens, {opening[:4]}; one is read")
    return opening[0] if opening else None


@contextlib.contextmanager
def understanding(path):
    """What goes wrong within comes from the file's contents: exits 2 naming it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        fail(f"{path}: not a tokenizer that is understood: {type(error).__name__}: {reason}")


def _open(path):
    """A text file. Raises OSError for what is none: reading a pipe would never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(0, "it is no file", path)
    return open(path, encoding="utf-8")


def _text(path):
    """What is in a file. Exits 2 where it cannot be read."""
    try:
        with _open(path) as f:
            return f.read()
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _object(path, optional=False):
    """A file's JSON object; {} where there is no such file and it is optional."""
    if optional and not os.path.isfile(path):
        return {}
    try:
        with _open(path) as f:
            found = json.load(f)
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON ({str(error)[:100]})")
    if not isinstance(found, dict):
        fail(f"{path}: expected an object")
    return found
