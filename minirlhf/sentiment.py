"""The default data: published human ratings of sentences -> demonstrations, preferences and prompts.

Every sentence ends up in exactly one of six pools, along with all of its document or block of raters; all files are
functions of the archive and the seed.

`sentiment` is the ground truth of Hutto & Gilbert 2014 (ICWSM): sentences that 15 to 99 people each rated
from -4 to 4. Left out: the word list and the scorer that come in the same archive. Nothing here may learn from them, so
that they can still serve as an independent judge.
"""
import hashlib
import html
import io
import itertools
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import fail, say
from minirlhf.fetch import by_pip

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SOURCE = "the source distribution of the Python package vaderSentiment 3.3.2"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {"amazon": "amazonReviewSnippets", "movie": "movieReviewSnippets", "nyt": "nytEditorialSnippets",
           "tweets": "tweets"}

SHARES = {"main.train": 0.76, "main.val": 0.06, "judge.train": 0.10, "judge.val": 0.02, "prompts.train": 0.03,
          "prompts.val": 0.03}  # of each domain's sentences
BLOCK = 30  # consecutive film reviews that the same people rated, each of them in a column of their own
FEW_WORDS = (2, 5)  # fewest and most words of a prompt
WHOLE = 0.9  # share of demonstrations for training with an empty prompt, which teach how sentences open as well
MIN_REST = 3  # words that the original sentence had left after a prompt of the prompts files
K = 8  # most sentences in a ranking
MIN_GAP = 0.2  # between any two mean ratings in a ranking
ROUNDS = {"preferences": 4, "judge": 12}  # times that each sentence is ranked by its mean
PERSON_ROUNDS = 1  # times that each film review is ranked by one person
PAIRS_PER_BLOCK = 8  # single choices of one person in the training files
VAL_PAIRS = {"preferences": {"mean": 12000, "person": 4000}, "judge": {"mean": 1000, "person": 500}}
FILES = [f"{name}.{part}.jsonl" for name in ("sft", "preferences", "prompts", "judge") for part in ("train", "val")]


class Sentence(NamedTuple):
    domain: str
    group: str  # what must not be divided between pools
    block: str | None  # set when ratings[j] is the same person's in all sentences of this block
    text: str
    ratings: list[int]
    mean: float  # of the ratings, to three places


def make_data(folder, seed, source=None):
    """-> {file name: records} and the text of README.md. source: the archive, if it is at hand; else it is looked for,
    or fetched and kept, in `folder`."""
    sentences, counts = clean(read(fetch(folder, source)))
    say("splitting, ranking and pairing")
    pools = split(sentences, seed)
    files = make_records(pools, seed)
    return files, describe(counts, pools, files, ceilings(sentences), seed)


# The archive


def fetch(folder, source=None):
    """The archive's bytes, their SHA-256 checked: from `source`, from `folder`, or by pip and then kept in `folder`."""
    path = Path(source) if source else folder / ARCHIVE
    if source and not path.is_file():
        fail(f"--source {source}: no such file")
    if path.is_file():
        say(f"reading {path}")
        data = path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != SHA256:
            fail(f"{path} is not the expected archive (its SHA-256 is {found}, not {SHA256}): it is {SOURCE}")
        return data
    say(f"fetching {ARCHIVE} with pip")
    fetched, problem = by_pip(ARCHIVE, "vaderSentiment==3.3.2", SHA256, folder, "--no-binary", ":all:")
    if fetched:
        return fetched.read_bytes()
    fail(f"could not fetch the data: put {ARCHIVE}, {SOURCE} (SHA-256 {SHA256}), at {path}, "
         f"or name it with --source; pip said: {problem}")


def read(data):
    """(domain, id, text, published mean, ratings) of every sentence, straight from the nested archive's members."""
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        inner = outer.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        def rows(prefix, kind):
            text = archive.extractfile(f"hutto_ICWSM_2014/{prefix}_{kind}.txt").read().decode("utf-8-sig")
            return [line.split("\t") for line in text.split("\r\n") if line]

        for domain, prefix in DOMAINS.items():
            # The two files hold the same ids, though not always in the same order.
            ratings = {name: json.loads(numbers) for name, _, _, numbers in rows(prefix, "anonDataRatings")}
            for name, mean, text in rows(prefix, "GroundTruth"):
                yield domain, name, text, float(mean), ratings[name]


# Sentences


def clean_text(text, domain):
    while (plain := html.unescape(text)) != text:  # some were escaped twice: &amp;#38; is &#38; is &
        text = plain
    text = text.replace("''", '"').replace("``", '"').strip()
    if domain == "movie":
        text = re.sub(r"(?<=\S) {3,}(?=\S)", " - ", text)  # the blanks that a lost dash has left
    return re.sub(r"\s+", " ", text)


def clean(rows):
    """The sentences worth keeping, and a Counter by (domain, what was found or done)."""
    rows = list(rows)
    people = defaultdict(set)  # movie block -> numbers of raters
    for domain, name, _, _, ratings in rows:
        if domain == "movie":
            people[(int(name) - 1) // BLOCK].add(len(ratings))
    counts, sentences, seen = Counter(), [], set()
    for domain, name, raw, published, ratings in rows:
        text = clean_text(raw, domain)
        key = "".join(filter(str.isalpha, text.lower()))
        mean = round(sum(ratings) / len(ratings), 3)
        counts[domain, "read"] += 1
        counts[domain, "ratings"] += len(ratings)
        counts[domain, "text cleaned"] += text != raw
        counts[domain, "outdated means"] += abs(mean - published) > 0.001
        if not key:
            counts[domain, "dropped: no letter"] += 1
        elif key in seen:
            counts[domain, "dropped: near-duplicate"] += 1
        else:
            seen.add(key)
            group, block = f"{domain} {name}", None
            if domain in ("amazon", "nyt"):
                group = f"{domain} {name.split('_')[0]}"  # the id is DOCUMENT_SENTENCE
            elif domain == "movie":
                number = (int(name) - 1) // BLOCK
                group = f"movie {number}"
                block = group if len(people[number]) == 1 else None
            sentences.append(Sentence(domain, group, block, text, ratings, mean))
            counts[domain, "kept"] += 1
    counts["movie", "blocks"] = len(people)
    counts["movie", "blocks without persons"] = sum(len(numbers) > 1 for numbers in people.values())
    return sentences, counts


def split(sentences, seed):
    """{pool: sentences}: whole groups at random, each pool with its share of every domain's sentences.

    Groups that are positive on the whole and those that are not are dealt out separately: film-review blocks are nearly
    all good or all bad, and a small pool would else lean to one side by chance.
    """
    groups = defaultdict(list)
    for sentence in sentences:
        groups[sentence.group].append(sentence)
    strata = defaultdict(list)
    for group in groups.values():
        strata[group[0].domain, sum(sentence.mean for sentence in group) > 0].append(group)
    pools = {pool: [] for pool in SHARES}
    for stratum, members in sorted(strata.items()):
        random.Random(f"{seed} split {stratum}").shuffle(members)
        wanting = {pool: share * sum(map(len, members)) for pool, share in SHARES.items()}
        for group in members:
            pool = max(wanting, key=wanting.get)
            pools[pool] += group
            wanting[pool] -= len(group)
    return pools


# Records


def make_records(pools, seed):
    """{file name: records}, each file's in a random order."""
    files = {}
    for part in ("train", "val"):
        files[f"sft.{part}.jsonl"] = demonstrations(pools[f"main.{part}"], WHOLE if part == "train" else 0,
                                                    random.Random(f"{seed} sft {part}"))
    train = sorted({opening for s in pools["prompts.train"] for opening in openings(s)})
    rng, used = random.Random(f"{seed} prompts val"), {prompt for prompt, _ in train}
    drawn = [rng.choice(some) for s in pools["prompts.val"] if (some := openings(s))]
    held_out = sorted({opening for opening in drawn if opening[0] not in used})
    for part, found in (("train", train), ("val", held_out)):
        unique = dict(found)  # an opening that two domains share counts once
        files[f"prompts.{part}.jsonl"] = [{"prompt": prompt, "domain": domain} for prompt, domain in unique.items()]
    for name, pool in (("preferences", "main"), ("judge", "judge")):
        rng = random.Random(f"{seed} {name}")
        train, val, number = pools[f"{pool}.train"], pools[f"{pool}.val"], VAL_PAIRS[name]
        rankings = mean_rankings(train, ROUNDS[name], rng) + person_rankings(train, rng)
        drawn = [choice for block in blocks(train) for choice in draw(choices(block), PAIRS_PER_BLOCK, rng)]
        once = {(chosen.text, rejected.text): (chosen, rejected, person) for chosen, rejected, person in drawn}
        files[f"{name}.train.jsonl"] = rankings + [person_pair(choice, "pair") for choice in once.values()]
        every = [choice for block in blocks(val) for choice in choices(block)]
        files[f"{name}.val.jsonl"] = mean_pairs(val, number["mean"], rng) + [
            person_pair(choice, "person") for choice in draw(every, number["person"], rng)]
    for name, records in files.items():
        random.Random(f"{seed} order {name}").shuffle(records)
    return files


def demonstrations(sentences, whole, rng):
    """The first few words and the rest; a share `whole` has no prompt. The rest begins with the blank, where GPT-2's
    pattern may divide a text: so the token ids of prompt and completion are those of the sentence."""
    records = []
    for sentence in sentences:
        words = sentence.text.split(" ")
        few = 0 if rng.random() < whole else rng.randint(*FEW_WORDS)
        prompt = " ".join(words[:min(few, len(words) - 1)])
        records.append({"prompt": prompt, "completion": sentence.text[len(prompt):], "domain": sentence.domain})
    return records


def openings(sentence):
    """Every (prompt, domain) that leaves the sentence at least MIN_REST words."""
    words = sentence.text.split(" ")
    most = min(FEW_WORDS[1], len(words) - MIN_REST)
    return [(" ".join(words[:k]), sentence.domain) for k in range(FEW_WORDS[0], most + 1)]


def draw(items, count, rng):
    return rng.sample(items, min(count, len(items)))


def blocks(sentences):
    """Lists of sentences that the same people rated."""
    found = defaultdict(list)
    for sentence in sentences:
        if sentence.block:
            found[sentence.block].append(sentence)
    return list(found.values())


def mean_rankings(sentences, rounds, rng):
    """Rankings by the mean of all raters. Each round deals every sentence to the first ranking with room that holds no
    mean nearer than MIN_GAP: nearer means are mostly noise (20 raters with sd 0.8 give a standard error of 0.18)."""
    records = []
    for _ in range(rounds):
        full, growing = [], []
        for sentence in rng.sample(sentences, len(sentences)):
            group = next((g for g in growing if all(abs(sentence.mean - s.mean) > MIN_GAP - 1e-9 for s in g)), None)
            if group is None:
                growing.append(group := [])
            group.append(sentence)
            if len(group) == K:
                growing = [g for g in growing if g is not group]
                full.append(group)
        for group in full + [g for g in growing if len(g) > 1]:
            group.sort(key=lambda s: -s.mean)
            records.append({"prompt": "", "completions": [s.text for s in group], "scores": [s.mean for s in group],
                            "people": [len(s.ratings) for s in group], "kind": "mean"})
    return records


def person_rankings(sentences, rng):
    """Rankings of film reviews of one block by one person's own ratings."""
    records = []
    for block in blocks(sentences) * PERSON_ROUNDS:
        block = rng.sample(block, len(block))
        for start in range(0, len(block), K):
            group = block[start:start + K]
            person = rng.randrange(len(group[0].ratings))
            group.sort(key=lambda s: -s.ratings[person])
            scores = [s.ratings[person] for s in group]
            if scores[0] != scores[-1]:
                records.append({"prompt": "", "completions": [s.text for s in group], "scores": scores,
                                "domain": "movie", "kind": "person"})
    return records


def mean_pairs(sentences, count, rng):
    """Random pairs in the order of their means, however near."""
    n, records = len(sentences), []
    for number in draw(range(n * n), 3 * count, rng):  # about half of these are i < j
        i, j = divmod(number, n)
        chosen, rejected = sorted((sentences[i], sentences[j]), key=lambda s: -s.mean)
        if i < j and chosen.mean > rejected.mean and len(records) < count:
            records.append({"prompt": "", "chosen": chosen.text, "rejected": rejected.text,
                            "margin": round(chosen.mean - rejected.mean, 3),
                            "domains": [chosen.domain, rejected.domain], "kind": "mean"})
    return records


def choices(block):
    """Every (chosen, rejected, person) of a block in which that person rated the two differently."""
    found = []
    for a, b in itertools.combinations(block, 2):
        for person, (x, y) in enumerate(zip(a.ratings, b.ratings)):
            if x != y:
                found.append((a, b, person) if x > y else (b, a, person))
    return found


def others_margin(chosen, rejected, person):
    """How much higher the mean of the block's other people is for what this person chose."""
    total = sum(chosen.ratings) - sum(rejected.ratings) - chosen.ratings[person] + rejected.ratings[person]
    return total / (len(chosen.ratings) - 1)


def person_pair(choice, kind):
    chosen, rejected, person = choice
    both = list(zip(chosen.ratings, rejected.ratings))
    return {"prompt": "", "chosen": chosen.text, "rejected": rejected.text,
            "margin": round(chosen.mean - rejected.mean, 3), "people_for": sum(x > y for x, y in both),
            "people_against": sum(x < y for x, y in both), "others_margin": round(others_margin(*choice), 3),
            "domain": "movie", "kind": kind}


# What was made


def ceilings(sentences):
    """{least gap: share}: how often the mean of the other people predicts a person's choice within a film-review block,
    among the choices where that mean differs by the gap or more. A tie of the others is right half the time."""
    margins = Counter(others_margin(*choice) for block in blocks(sentences) for choice in choices(block))
    shares = {}
    for gap in (0, 0.5, 1):
        far = {margin: n for margin, n in margins.items() if abs(margin) >= gap}
        shares[gap] = sum(n * ((margin > 0) + (margin >= 0)) / 2 for margin, n in far.items()) / sum(far.values())
    return shares


def table(*rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def count_tables(counts, pools, files):
    """Three tables: what was read and kept, what is in each pool, what is in each file."""
    whats = ["read", "ratings", "text cleaned", "outdated means", "dropped: no letter", "dropped: near-duplicate",
             "kept"]
    domains = [*DOMAINS, "all"]

    def row(name, numbers):
        return [name, *numbers, sum(numbers)]

    yield table(["sentences", *domains], *(row(what, [counts[domain, what] for domain in DOMAINS]) for what in whats))
    yield table(["pool", *domains], *(row(pool, [sum(s.domain == domain for s in members) for domain in DOMAINS])
                                      for pool, members in pools.items()))
    kinds = {name: Counter(record.get("kind", "") for record in records) for name, records in files.items()}
    yield table(["file", "records", "of kind"], *(
        [name, len(files[name]), ", ".join(f"{kind} {n}" for kind, n in sorted(kinds[name].items()) if kind)]
        for name in files))


README = """\
# People's ratings of sentences, as demonstrations, preferences and prompts

Made by `python -m minirlhf.prepare sentiment --seed {seed}`. The task is Ziegler et al. 2019's sentiment continuation:
a prompt is the first few words of a sentence, the answer is the rest, and people prefer the more positive text.

## Where it comes from

C.J. Hutto and Eric Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
Eighth International Conference on Weblogs and Social Media (ICWSM-14), Ann Arbor, 2014: please cite it where you use
the data. They had each sentence rated by 15 to 99 people from -4 (extremely negative) to 4 (extremely positive).

Archive: {archive}, {source}
SHA-256: {sha}
Licence: The MIT License (MIT), Copyright (c) 2016 C.J. Hutto

The texts are other people's: `movie` are film-review snippets from Rotten Tomatoes (Pang and Lee 2005), `amazon`
product reviews (Hu and Liu 2004), `nyt` New York Times editorials, `tweets` posts on Twitter with names and links
taken out. Only sentences and ratings are read: the word list and the scorer in that archive are not, so that they
stay an independent judge.

## Counts

{tables}

## How it was cleaned

HTML entities undone, also those escaped twice; `''` and doubled backquotes made `"`; in film reviews, three or more
blanks between words made ` - ` (a dash was lost there); all other white space made one blank. Case, accents and
spelling are as they were (`amazon` came in lower case). Dropped: sentences without a letter, and near-duplicates,
which have the same letters in the same order, case aside; the first stays. Every mean is computed from the single
ratings, since some of the published ones are outdated (counted above).

## How it was split

Six pools without a common sentence, with these shares of every domain's sentences:
{shares}.
Groups stay whole: the document in `amazon` and `nyt`, the block of {block} in `movie`, the sentence in `tweets`. Groups
that are positive on the whole and the others are dealt out separately. `sft` and `preferences` come from the main
pools, `judge` (for a second reward model that shares no sentence with the first) and `prompts` from theirs. Every
choice and the order of the records are functions of the seed.

A person can be followed in `movie` only, where the same people rated {block} consecutive sentences, in columns that
keep their order. {without} of {blocks} blocks have a varying number of raters and were not used so.

## Columns

- `sft.*`: `prompt` (the first {few} words), `completion` (the rest, with its leading blank), `domain`. In training
  {whole:.0%} of the prompts are empty: the completion is the sentence.
- `prompts.*`: `prompt`, `domain`. Openings of {few} words that had at least {rest} more; none is in both files.
- `preferences.train`, `judge.train`: rankings, with an empty `prompt`, `completions` (up to {k}, best first), `scores`,
  and `kind`:
  - `mean`: `scores` are means over all raters, any two at least {gap} apart; `people`: how many rated each.
  - `person`: `scores` are one person's own ratings within a block; equal scores say nothing about their order.
  - `pair`: not a ranking but one person's choice, with the columns of `person` below.
- `preferences.val`, `judge.val`: pairs, with an empty `prompt`, `chosen`, `rejected`, `margin` (the mean rating of the
  chosen less that of the rejected), and `kind`:
  - `mean`: random pairs in the order of their means, however near; `domains` of the two.
  - `person`: what one random person preferred within a block, so `margin` may be negative. `people_for` and
    `people_against` rated the chosen higher and lower; `others_margin` is the margin without that person; `domain`.

## Ceilings

The mean of the other people predicts a person's choice between two sentences of a block (ties left out) in {all:.3f} of
the cases, in {half:.3f} where it differs by 0.5 or more, in {one:.3f} where by 1 or more. That is about the best that a
reward model can reach on pairs of kind `person`.
"""


def describe(counts, pools, files, ceilings, seed):
    """README.md, and the counts on the screen."""
    tables = "\n\n".join(count_tables(counts, pools, files))
    say(f"\n{tables}\n")
    say(f"ceiling: the mean of the others predicts a person's choice of a film review in {ceilings[0]:.3f} of cases")
    return README.format(
        seed=seed, archive=ARCHIVE, sha=SHA256, source=SOURCE, tables=tables,
        shares=", ".join(f"{pool} {share:.0%}" for pool, share in SHARES.items()), block=BLOCK,
        without=counts["movie", "blocks without persons"], blocks=counts["movie", "blocks"],
        few=" to ".join(map(str, FEW_WORDS)), rest=MIN_REST, k=K, gap=MIN_GAP, whole=WHOLE,
        all=ceilings[0], half=ceilings[0.5], one=ceilings[1])
