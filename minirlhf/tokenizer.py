"""Text to token ids: GPT-2's byte-level BPE ranks, or ranks learned from the data; both run as a tiktoken.Encoding.

Invariant: there is one special token, eos, and no text can produce it: `encode` treats "<|endoftext|>" as plain text.
A row begins with eos, as documents did in GPT-2's training, so that an empty prompt has something to condition on.

Left out: chat templates and padding tokens. Rows are padded with eos and masked by their lengths.
"""
import heapq
import os
import tempfile
from collections import Counter, defaultdict

import regex  # tiktoken stands on it
import tiktoken

from minirlhf.config import fail

EOS = "<|endoftext|>"
# GPT-2's pattern (Radford et al. 2019, encoder.py), with possessive quantifiers: the same splits, no backtracking
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """ranks: a token's bytes -> its id, ids 0..n-1 in merge order; eos is id n."""

    def __init__(self, ranks: dict[bytes, int], name: str):
        self.ranks, self.name, self.eos = ranks, name, len(ranks)
        self.encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: self.eos})
        self.vocab_size = len(ranks) + 1
        self.ids = list(range(self.vocab_size))  # one object an id: lists that share them take 8 bytes a token, not 40

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. A lone surrogate becomes U+FFFD."""
        return [self.ids[i] for i in self.encoding.encode_ordinary(text)]

    def encode_prompt(self, text: str) -> list[int]:
        return [self.eos] + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        return self.encode(text) + [self.eos]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; eos is left out, bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.eos], errors="replace")

    def count_bytes(self, ids: list[int]) -> int:
        """UTF-8 bytes of the text of the ids."""
        return sum(len(self.encoding.decode_single_token_bytes(i)) for i in ids if i != self.eos)

    def state(self) -> dict:
        """What a checkpoint stores: plain strings, because it is read with weights_only=True."""
        return {"name": self.name, "ranks": [token.decode("latin-1") for token in self.ranks]}

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """Raises ValueError where these are no ranks: a token twice, or a byte that could not be encoded."""
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(state["ranks"])}
        if len(ranks) != len(state["ranks"]) or not {bytes([b]) for b in range(256)} <= ranks.keys():
            raise ValueError("the ranks of its tokenizer hold a token twice, or not every byte")
        return cls(ranks, state["name"])

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
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE (Sennrich et al. 2016) of the texts: merge the most frequent pair until vocab_size - 1 ranks.

        Pairs never cross the split pattern's words. Ties go to the pair whose bytes come first, so that the result is a
        function of the texts alone. Stops early when no pair occurs twice; tokens that were never seen do not arise but
        for single bytes.
        """
        if vocab_size < 257:
            fail(f"--vocab_size {vocab_size}: byte-level BPE needs at least 257 (256 bytes and the end-of-text token)")
        words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
        counts = list(words.values())
        pieces = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in words]
        pair_counts, where = Counter(), defaultdict(set)  # where: the words that hold (or once held) a pair
        for i, piece in enumerate(pieces):
            for pair in zip(piece, piece[1:]):
                pair_counts[pair] += counts[i]
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in pair_counts.items()]
        heapq.heapify(heap)
        ranks = {bytes([b]): b for b in range(256)}
        while heap and len(ranks) < vocab_size - 1:
            n, pair = heapq.heappop(heap)
            if -n != pair_counts[pair]:  # an outdated entry; the current count has its own
                continue
            if -n < 2:
                break
            merged = pair[0] + pair[1]
            ranks.setdefault(merged, len(ranks))
            changed = Counter()
            for i in where.pop(pair):
                piece, new, j = pieces[i], [], 0
                while j < len(piece):
                    if piece[j:j + 2] == [*pair]:
                        new.append(merged)
                        j += 2
                    else:
                        new.append(piece[j])
                        j += 1
                if len(new) == len(piece):
                    continue
                for old in zip(piece, piece[1:]):
                    changed[old] -= counts[i]
                for pair_now in zip(new, new[1:]):
                    changed[pair_now] += counts[i]
                    where[pair_now].add(i)
                pieces[i] = new
            for changed_pair, difference in changed.items():
                if difference:
                    pair_counts[changed_pair] += difference
                    heapq.heappush(heap, (-pair_counts[changed_pair], changed_pair))
        return cls(ranks, "bpe")
