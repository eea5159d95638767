"""Text to token ids: GPT-2's byte-level BPE ranks, or ranks learned from the data; both run as a tiktoken.Encoding.

Invariant: there is one special token, eos, and no text can produce it: `encode` treats "<|endoftext|>" as plain text.
A row begins with eos, as documents did in GPT-2's training, so that an empty prompt has something to condition on.

Left out: chat templates and padding tokens. Rows are padded with eos and masked by their lengths.
"""
import heapq
import os
import tempfile
import time
from array import array
from collections import Counter, defaultdict

import regex  # tiktoken stands on it
import tiktoken

from minirlhf.config import fail, say

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
