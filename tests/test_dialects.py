"""Each set that people have, on made-up rows in its published shape, quirks included: what is made, what is counted."""
import json
from pathlib import Path

import pytest

from minirlhf.data import load_demonstrations, load_preferences, load_prompts
from minirlhf.dialects import JSONL_KEYS, MOST_PAIRS, SETS, Row
from minirlhf.prepare import Notes


def read(name, *rows, path="set/train.jsonl", part="train", **options):
    """-> what a set makes of rows, and {what was found: (what was done, how often)}."""
    notes = Notes()
    made = [*SETS[name].read((Row(f"{path}:{n}", row, part, Path(path)) for n, row in enumerate(rows, 1)), notes,
                             **options)]
    return made, {what: (done, times) for (what, done), (times, _) in notes.found.items()}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def hh(*turns):
    """"How do I boil an egg?", "Seven minutes.", ... as hh-rlhf writes them."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


# ---- hh-rlhf

EGG, TALK = hh("How do I boil an egg?"), hh("Hi", "Hello!", "How do I boil an egg?")


def test_hh_rlhf_makes_conversations():
    """What both texts share is the prompt; the part of the set is the kind; a conversation's key is how it opens."""
    (one, two), found = read("hh-rlhf", {"chosen": EGG + "\n\nAssistant: Seven minutes.",
                                         "rejected": EGG + "\n\nAssistant: No."},
                             {"chosen": TALK + "\n\nAssistant: Seven.", "rejected": TALK + "\n\nAssistant: No."},
                             path="hh/harmless-base/train.jsonl.gz")
    asked = [user("How do I boil an egg?")]
    assert one == ("train", ["howdoiboilanegg"],
                   [{"messages": [*asked, assistant("Seven minutes.")], "domain": "harmless-base"}],
                   [{"prompt": asked, "chosen": [assistant("Seven minutes.")], "rejected": [assistant("No.")],
                     "kind": "harmless-base"}], [{"prompt": asked}])
    assert two.keys == ["hi"] and two.preferences[0]["prompt"] == [user("Hi"), assistant("Hello!"), *asked]
    assert not found


@pytest.mark.parametrize("chosen, rejected, what", [
    (TALK + "\n\nAssistant: A.", TALK + "\n\nAssistant: A. ", "both answers are the same"),
    (TALK + "\n\nAssistant: ", TALK + "\n\nAssistant: A.", "an empty answer"),
    (TALK + "\n\nAssistant: A.", TALK + "\n\nAssistant:", "an empty answer"),
    (TALK + "\n\nAssistant: A.\n\nHuman: B", TALK + "\n\nAssistant: A.", "the last turn is not the assistant's"),
    (TALK + "\n\nAssistant: A.", TALK + "\n\nAssistant: B.\n\nHuman:", "the last turn is not the assistant's"),
    (EGG + "\n\nAssistant: A.\n\nAssistant: B.", EGG + "\n\nAssistant: C.", "turns that do not alternate"),
    (hh("Hi", "", "Bye", "A."), hh("Hi", "", "Bye", "B."), "an empty turn before the answer"),
    ("\n\nAssistant: A.", "\n\nAssistant: B.", "a conversation that does not begin with the person's turn"),
    ("Be kind." + EGG + "\n\nAssistant: A.", EGG + "\n\nAssistant: B.",
     "a conversation that does not begin with the person's turn"),
    ("A.", "B.", "a conversation that does not begin with the person's turn"),
    (hh("Hi", "Hello!", "Bye", "A."), hh("Hi", "Hey!", "Bye", "B."), "the conversations differ before the last answer"),
    (hh("Hi", "Hello!", "Bye", "A."), hh("Hey", "A."), "the conversations differ before the last answer"),
    (EGG + "\n\nAssistant: A.", EGG + "\n\nAssistant: B.\n\nHuman: Thanks\n\nAssistant: Sure.",
     'one conversation goes on where the other ends, or "\\n\\nHuman:" stands within an answer'),
])
def test_hh_rlhf_quirks_are_left_out_and_counted(chosen, rejected, what):
    """Whichever of the two texts has it."""
    for row in ({"chosen": chosen, "rejected": rejected}, {"chosen": rejected, "rejected": chosen}):
        assert read("hh-rlhf", row) == ([], {what: ("left out", 1)})


def test_an_answer_that_is_the_beginning_of_the_other_is_kept_and_counted():
    """Whichever of the two it is."""
    for pair in (("Seven minutes.", "Seven"), ("Seven", "Seven minutes.")):
        chosen, rejected = (f"{EGG}\n\nAssistant: {answer}" for answer in pair)
        made, found = read("hh-rlhf", {"chosen": chosen, "rejected": rejected})
        assert len(made[0].preferences) == 1 and found == {"one answer is the beginning of the other": ("kept", 1)}


# ---- summarize-from-feedback

def comparison(**changes):
    return {"info": {"id": "t3_ab", "post": "I broke it. ", "title": "Am I ...", "subreddit": "AskReddit"},
            "summaries": [{"text": " A vase.", "policy": "sup2"}, {"text": " Vase story.", "policy": "ref"}],
            "choice": 0,
            "worker": "w9", "split": "train", "extra": {"confidence": 7}} | changes


ASKED = "SUBREDDIT: r/AskReddit\n\nTITLE: Am I ...\n\nPOST: I broke it.\n\nTL;DR:"


def test_comparisons_of_summaries():
    """The summary that was chosen goes first; the one that people wrote is a demonstration; the post's id decides."""
    (made,), found = read("summarize-from-feedback", comparison())
    assert made == ("train", ["post t3_ab", "ibrokeit"], [{"prompt": ASKED, "completion": " Vase story."}],
                    [{"prompt": ASKED, "chosen": " A vase.", "rejected": " Vase story.", "confidence": 7,
                      "worker": "w9",
                      "kind": "tldr"}], [{"prompt": ASKED}])
    assert not found
    (made,), _ = read("summarize-from-feedback", comparison(choice=1, split="valid2"))
    assert (made.part, made.preferences[0]["chosen"]) == ("val", " Vase story.")


def test_comparisons_quirks():
    """No confidence, an article in place of a post, a missing blank, equal and empty summaries."""
    news = {"id": "x1", "article": "It rained.", "site": "cnn"}
    made, found = read("summarize-from-feedback", comparison(extra={}, info=news),
                       comparison(summaries=[{"text": "A"}, {"text": " B\n"}]),
                       comparison(summaries=[{"text": " A"}, {"text": "A "}]),
                       comparison(summaries=[{"text": " "}, {"text": " A"}]))
    assert [m.preferences[0]["prompt"] for m in made] == ["ARTICLE: It rained.\n\nTL;DR:", ASKED]
    assert [m.preferences[0]["kind"] for m in made] == ["cnn", "tldr"] and "confidence" not in made[0].preferences[0]
    assert (made[1].preferences[0]["chosen"], made[1].preferences[0]["rejected"]) == (" A", " B")
    assert found == {"a choice without its confidence": ("kept", 1), "both answers are the same": ("left out", 1),
                     "a summary without its leading blank": ("given one", 2), "an empty answer": ("left out", 1)}


def test_posts_and_comparisons_have_the_same_prompt():
    """A post's own summary gets the blank that comparisons have; posts and comparisons share the post's key."""
    post = {"id": "t3_ab", "subreddit": "AskReddit", "title": "Am I ...", "post": "I broke it.",
            "summary": "Vase story."}
    (one, two), found = read("summarize-from-feedback", post, comparison())
    assert one == ("train", two.keys, two.sft, [], two.prompts)
    assert found == {"a summary without its leading blank": ("given one", 1)}
    assert read("summarize-from-feedback", post | {"summary": " "}) == ([], {"an empty answer": ("left out", 1)})


# ---- imdb

def review(folder, name, text, urls=""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if urls:
        (path.parent.parent / f"urls_{path.parent.name}.txt").write_text(urls)
    return Row(str(path), {"text": text}, "train", path)


def test_imdb(tmp_path):
    """Line breaks, ratings and films; a pair is one favourable and one unfavourable review, whatever their films."""
    urls = "host/title/tt01/usercomments\nhost/title/tt02/usercomments\n"
    rows = [review(tmp_path, "train/neg/0_3.txt", "Dull.<br /><br />And long.", urls),
            review(tmp_path, "train/pos/0_9.txt", "A film that I will remember, and so will you, for long.", urls),
            review(tmp_path, "train/pos/1_7.txt", "Good.", urls), review(tmp_path, "train/pos/2_8.txt", "Nice."),
            review(tmp_path, "train/unsup/0_0.txt", "A film.", urls), review(tmp_path, "train/neg/1_1.txt", "  ")]
    notes = Notes()
    made = [*SETS["imdb"].read(iter(rows), notes)]
    whole = [m for m in made if m.sft]
    assert whole[0] == ("train", ["film tt01", "dullandlong"],
                        [{"prompt": "", "completion": "Dull.\n\nAnd long.", "domain": "neg", "rating": 3}], [], [])
    assert [m.keys for m in whole[2:]] == [["film tt02", "good"], ["nice"], ["film tt01", "afilm"]]
    assert whole[4].sft == [{"prompt": "", "completion": "A film.", "domain": "unsup"}]
    (pair,) = [m for m in made if m.preferences]
    assert pair.preferences == [{"prompt": "", "chosen": rows[1].record["text"], "rejected": "Dull.\n\nAnd long.",
                                 "margin": 6}]
    assert pair.keys == ["film tt01", whole[1].keys[1], "film tt01", "dullandlong"]
    (prompt,) = [m for m in made if m.prompts]
    words = prompt.prompts[0]["prompt"]
    assert rows[1].record["text"].startswith(words + " ") and 2 <= len(words.split()) <= 8
    assert prompt.keys[:1] == ["film tt01"] and prompt.keys[2] == words.replace(" ", "").replace(",", "").lower()
    assert {what: n for (what, _), (n, _) in notes.found.items()} == {
        "line breaks written as <br />": 1, "an empty review": 1,
        "a review whose film is not known (urls_*.txt is missing or too short)": 1}


def test_imdb_pairs_lie_across_a_clear_gap(tmp_path):
    """A rating between 4 and 7 makes no pair; reviews of different parts make none."""
    rows = [review(tmp_path, f"train/{name}.txt", "x") for name in ("pos/0_5", "neg/0_2", "pos/1_7")]
    assert [m.preferences[0]["margin"] for m in SETS["imdb"].read(iter(rows), Notes()) if m.preferences] == [5]
    apart = [rows[1], rows[2]._replace(part="val")]
    assert not any(m.preferences for m in SETS["imdb"].read(iter(apart), Notes()))


# ---- shp

def asked_twice(**changes):
    return {"post_id": "x1", "domain": "askculinary_train", "history": "Why did it &amp;amp; rise?",
            "human_ref_A": "Too hot.",
            "human_ref_B": "Yeast.", "labels": 1, "score_A": 52, "score_B": 13, "score_ratio": 4.0} | changes


def test_shp():
    """labels 1 prefers A; entities are undone; four times as many votes are a margin of 2."""
    (made, other), found = read("shp", asked_twice(), asked_twice(labels=0, score_ratio=None, domain=None),
                                path="shp/askbaking/train.json")
    asked = [user("Why did it & rise?")]
    assert made == ("train", ["post x1", "whydiditrise"],
                    [{"messages": [*asked, assistant("Too hot.")], "domain": "askculinary"}],
                    [{"prompt": asked, "chosen": [assistant("Too hot.")], "rejected": [assistant("Yeast.")],
                      "margin": 2.0,
                      "kind": "askculinary"}], [{"prompt": asked}])
    assert other.preferences == [{"prompt": asked, "chosen": [assistant("Yeast.")], "rejected": [assistant("Too hot.")],
                                  "kind": "askbaking"}]
    assert found == {"HTML entities in a text": ("undone", 2)}


def test_shp_quirks():
    """A post has so many pairs at most; ties, equal and empty texts make none."""
    rows = [asked_twice(history="Why?", human_ref_A=f"Because {n}.") for n in range(MOST_PAIRS + 2)]
    odd = [asked_twice(post_id="x2", history="Why?", **changes) for changes in (
        {"score_B": 52}, {"human_ref_A": "Yeast."}, {"human_ref_A": ""})]
    made, found = read("shp", *rows, *odd, asked_twice(post_id="x3", history=" "))
    assert len(made) == MOST_PAIRS and found == {
        f"a post that has {MOST_PAIRS} pairs already": ("left out", 2), "the answers are tied": ("left out", 1),
        "both answers are the same": ("left out", 1), "an empty answer": ("left out", 1),
        "an empty question": ("left out", 1)}


# ---- helpsteer2

def rated(prompt, response, helpfulness):
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4, "coherence": 4,
            "complexity": 2, "verbosity": 1}


def test_helpsteer2_rows_of_one_prompt_make_a_pair():
    """Two rows in a row; the more helpful one is the demonstration; ties and single rows make no pair."""
    made, found = read("helpsteer2", rated("c#", "A language.", 1), rated("c#", "C# is a language.", 3),
                       rated("tie", "A", 2),
                       rated("tie", "B", 2), rated("c#", "Alone.", 4), rated("last", "X", 0))
    asked = [user("c#")]
    assert made[0] == ("train", ["c"], [{"messages": [*asked, assistant("C# is a language.")]}],
                       [{"prompt": asked, "chosen": [assistant("C# is a language.")],
                         "rejected": [assistant("A language.")],
                         "margin": 2, "kind": "helpfulness"}], [{"prompt": asked}])
    assert [m.sft[0]["messages"][-1]["content"] for m in made[1:]] == ["A", "Alone.", "X"]
    assert not any(m.preferences for m in made[1:])
    assert found == {"the answers are tied": ("a demonstration only", 1),
                     "a prompt with one answer only": ("a demonstration only", 2)}


def test_helpsteer2_preferences_and_turns():
    """A strength below 0 prefers the first response, 0 neither; its own marks open turns; a row names its part."""
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nBye"
    row = {"prompt": prompt, "response_1": "See you.", "response_2": "Go.", "preference_strength": -2,
           "split": "validation"}
    made, found = read("helpsteer2", row, row | {"preference_strength": 3, "split": "train"},
                       row | {"preference_strength": 0})
    asked = [user("Hi"), assistant("Hello!"), user("Bye")]
    assert [(m.part, m.preferences) for m in made] == [
        ("val", [{"prompt": asked, "chosen": [assistant("See you.")], "rejected": [assistant("Go.")], "margin": 2,
                  "kind": "preference"}]),
        ("train", [{"prompt": asked, "chosen": [assistant("Go.")], "rejected": [assistant("See you.")], "margin": 3,
                    "kind": "preference"}]),
        ("val", [])]
    assert found == {"the answers are tied": ("a demonstration only", 1)}
    assert read("helpsteer2", rated("c#", "", 4), rated("c#", "A", 2)) == ([], {"an empty answer": ("left out", 1)})
    (made,), found = read("helpsteer2", rated("c#", "", 1), rated("c#", "A", 2))
    assert made.sft and not made.preferences and found == {"an empty answer": ("left out", 1)}
    made, found = read("helpsteer2", rated("<extra_id_1>User\nHi", "A", 1))
    assert not made and found == {"turns that do not alternate": ("left out", 1)}


# ---- alpaca, sharegpt

def test_alpaca():
    """With an input and without; empty outputs and instructions are left out."""
    row = {"instruction": "Name three colours.", "input": "", "output": "Red, blue, green."}
    made, found = read("alpaca", row, row | {"input": "Of a flag."}, {"instruction": "Name one.", "output": "Red."},
                       row | {"output": ""}, row | {"instruction": " "})
    assert made[0] == ("train", ["namethreecolours"],
                       [{"messages": [user("Name three colours."), assistant("Red, blue, green.")]}],
                       [], [{"prompt": [user("Name three colours.")]}])
    prompts = [m.prompts[0]["prompt"] for m in made[1:]]
    assert prompts == [[user("Name three colours.\n\nOf a flag.")], [user("Name one.")]]
    assert found == {"an empty answer": ("left out", 1), "an empty instruction": ("left out", 1)}


def spoken(*turns, first="human", **columns):
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    return {"id": "QW_0", "conversations": [{"from": names[i % 2], "value": v} for i, v in enumerate(turns)]} | columns


def test_sharegpt():
    """Whole conversations; pieces of one talk share a key; minimind's roles; cut ends are counted."""
    mind = {"conversations": [user("Hi"), assistant("Hello!")]}
    system = {"id": "s", "conversations": [{"from": "system", "value": "Be kind."}, *mind["conversations"]]}
    made, found = read("sharegpt", spoken("Hi", "Hello!", "Bye", "See you!"), mind, system,
                       spoken("Hello!", "Hi", "Yes?", first="gpt"),
                       spoken("Hi", "Hello!", "Bye", id="QW_1"))
    talk = [user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you!")]
    assert made[0] == ("train", ["talk QW", "hi"], [{"messages": talk}], [], [{"prompt": talk[:3]}])
    assert [m.sft[0]["messages"] for m in made[1:]] == [
        talk[:2], [{"role": "system", "content": "Be kind."}, *talk[:2]], [user("Hi"), assistant("Yes?")], talk[:2]]
    assert [m.keys for m in made[1:]] == [["hi"], ["talk s", "bekindhi"], ["talk QW", "hi"], ["talk QW", "hi"]]
    assert found == {"the first turn is the assistant's": ("that turn cut off", 1),
                     "the last turn is not the assistant's": ("that turn cut off", 1)}


@pytest.mark.parametrize("row, what", [
    (spoken(), "an empty conversation"), (spoken("Hi", "", "Bye", "A."), "an empty turn before the answer"),
    (spoken("Hi", " "), "an empty answer"),
    ({"conversations": [{"from": name, "value": "x"} for name in ("human", "human", "gpt")]},
     "turns that do not alternate"),
    ({"conversations": [{"from": name, "value": "x"} for name in ("human", "gpt", "gpt")]},
     "turns that do not alternate"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "a role that is neither system, user nor assistant"),
])
def test_sharegpt_quirks(row, what):
    assert read("sharegpt", row) == ([], {what: ("left out", 1)})


# ---- ultrafeedback, pku-saferlhf

def pair(chosen="An oak.", rejected="No.", **columns):
    asked = [user("Name a tree.")]
    return {"prompt": "Name a tree.", "chosen": [*asked, assistant(chosen)], "rejected": [*asked, assistant(rejected)],
            "score_chosen": 8.5, "score_rejected": 6.0} | columns


def test_ultrafeedback():
    """The prompt, which stands three times, is read once; the scores' difference is the margin."""
    (made,), found = read("ultrafeedback", pair())
    asked = [user("Name a tree.")]
    assert made == ("train", ["nameatree"], [{"messages": [*asked, assistant("An oak.")]}],
                    [{"prompt": asked, "chosen": [assistant("An oak.")], "rejected": [assistant("No.")],
                      "margin": 2.5}],
                    [{"prompt": asked}])
    assert not found


@pytest.mark.parametrize("row, what", [
    (pair(score_rejected=8.5), "the answers are tied"),
    (pair(score_rejected=9), "the chosen answer has the lower score"),
    (pair("No."), "both answers are the same"), (pair(rejected=""), "an empty answer"),
    (pair(prompt="Name a bird."), "'prompt' is no turn of the conversations"),
    (pair(rejected=[]) | {"rejected": [user("Name a tree."), assistant("x"), user("y"), assistant("z")]},
     "the conversations differ before the last answer"),
    (pair() | {"chosen": [user("Name a tree.")]}, "the last turn is not the assistant's"),
    (pair() | {"chosen": [{"role": "tool", "content": "x"}]}, "a role that is neither system, user nor assistant"),
])
def test_ultrafeedback_quirks(row, what):
    assert read("ultrafeedback", row) == ([], {what: ("left out", 1)})


def test_ultrafeedback_without_scores():
    (made,), found = read("ultrafeedback", pair(score_chosen=float("nan")))
    assert "margin" not in made.preferences[0] and found == {"a pair without scores": ("kept", 1)}


def test_pku_saferlhf():
    """Two preferences of one pair, by kind; a demonstration only where they agree."""
    row = {"prompt": "How?", "response_0": "So.", "response_1": "Never.", "better_response_id": 0,
           "safer_response_id": 1}
    (both, one), found = read("pku-saferlhf", row, row | {"better_response_id": 1})
    asked, so, never = [user("How?")], [assistant("So.")], [assistant("Never.")]
    better = {"prompt": asked, "chosen": so, "rejected": never, "kind": "better"}
    safer = {"prompt": asked, "chosen": never, "rejected": so, "kind": "safer"}
    assert both == ("train", ["how"], [], [better, safer], [{"prompt": asked}])
    assert one.sft == [{"messages": [*asked, *never]}] and one.preferences == [safer | {"kind": "better"}, safer]
    assert found == {"the better answer is not the safer one": ("both preferences kept, no demonstration", 1)}
    assert read("pku-saferlhf", row | {"response_1": "So."})[1] == {"both answers are the same": ("left out", 1)}
    assert read("pku-saferlhf", row | {"prompt": ""})[1] == {"an empty question": ("left out", 1)}


# ---- jsonl

OWN = {name: name for name in JSONL_KEYS}


def test_jsonl_takes_columns_by_name():
    """Pairs, demonstrations and prompts by their columns; a group's rows, or those of like prompts, share a key."""
    keys = {"prompt": "q", "completion": "a", "chosen": "good", "rejected": "bad", "kind": "topic", "group": "doc"}
    made, found = read("jsonl", {"q": "Why?", "good": " So.", "bad": " No.", "topic": "x", "doc": 7},
                       {"q": "Why ?", "a": " So."},
                       {"q": "When?"}, {"q": "Why?", "a": " So.", "good": " So.", "bad": " No."},
                       {"q": "Why?", "a": " "}, keys=keys)
    assert made == [
        ("train", ["group 7", "why"], [], [{"prompt": "Why?", "chosen": " So.", "rejected": " No.", "kind": "x"}],
         [{"prompt": "Why?"}]),
        ("train", ["why"], [{"prompt": "Why ?", "completion": " So."}], [], [{"prompt": "Why ?"}]),
        ("train", ["when"], [], [], [{"prompt": "When?"}]),
        ("train", ["why"], [{"prompt": "Why?", "completion": " So."}],
         [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}],
         [{"prompt": "Why?"}])]
    assert found == {"an empty answer": ("left out", 1)}


def test_jsonl_without_a_prompt():
    """What two texts share is the prompt; without one the texts are the keys; messages stay messages."""
    talk = [user("Hi"), assistant("Hello!"), user("Bye")]
    made, _ = read("jsonl", {"chosen": "A film that is good", "rejected": "A film that bores"},
                   {"chosen": "One", "rejected": "Two"},
                   {"completion": "Three"}, {"prompt": talk, "chosen": [assistant("a")], "rejected": [assistant("b")]},
                   keys=OWN)
    assert [(m.keys, m.preferences or m.sft) for m in made] == [
        (["afilmthat"], [{"prompt": "A film that", "chosen": " is good", "rejected": " bores"}]),
        (["one", "two"], [{"prompt": "", "chosen": "One", "rejected": "Two"}]),
        (["three"], [{"prompt": "", "completion": "Three"}]),
        (["hi"], [{"prompt": talk, "chosen": [assistant("a")], "rejected": [assistant("b")]}])]


@pytest.mark.parametrize("row, words", [
    ({"prompt": "P", "completion": "c", "label": True}, "TRL's unpaired preference"),
    ({"prompt": "P", "completions": ["c"], "labels": [True]}, "TRL's stepwise supervision"),
    ({"prompt": "P", "chosen": "c"}, "'rejected' is missing"), ({"rejected": "c"}, "'chosen' is missing"),
    ({"question": "P", "answer": "c"}, "'prompt' is missing"), ({"prompt": 3}, "'prompt' must be a string, found int"),
    ({"prompt": "P", "chosen": "c", "rejected": [assistant("d")]}, "strings, or all lists of messages"),
    ({"prompt": [user("Hi"), assistant("Hello")]}, "must end before the assistant's answer"),
    ({"chosen": [assistant("c")], "rejected": [assistant("d")]}, "'prompt' is missing"),
])
def test_jsonl_refuses_what_it_cannot_read(row, words, refused):
    assert words in (error := refused(read, "jsonl", row, keys=OWN)) and "set/train.jsonl:1: " in error


# ---- all of them

ROWS = {
    "hh-rlhf": {"chosen": EGG + "\n\nAssistant: Seven minutes.", "rejected": EGG + "\n\nAssistant: No."},
    "summarize-from-feedback": comparison(), "shp": asked_twice(), "helpsteer2": rated("c#", "A language.", 1),
    "alpaca": {"instruction": "Name three colours.", "input": "", "output": "Red, blue, green."},
    "sharegpt": spoken("Hi", "Hello!"),
    "ultrafeedback": pair(),
    "pku-saferlhf": {"prompt": "How?", "response_0": "So.", "response_1": "Never.", "better_response_id": 0,
                     "safer_response_id": 0},
    "jsonl": {"prompt": "P", "chosen": " a", "rejected": " b"}}


def options_of(name):
    return {"keys": OWN} if name == "jsonl" else {}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_made_is_what_the_scripts_read(name, tmp_path):
    """Every record goes through the loaders of the three stages, with each text in it once."""
    (made,), _ = read(name, ROWS[name], **options_of(name))
    for stem, load in (("sft", load_demonstrations), ("preferences", load_preferences), ("prompts", load_prompts)):
        if records := getattr(made, stem):
            (tmp_path / stem).write_text("".join(json.dumps(record) + "\n" for record in records))
            assert len(load(tmp_path / stem)) == len(records)


@pytest.mark.parametrize("name, column", [(name, column) for name, row in ROWS.items() for column in row])
@pytest.mark.parametrize("value", [None, 3.5, {"a": 1}])
def test_a_wrong_column_is_refused_or_read(name, column, value, capsys):
    """A column that is null or of another type: one line with file, line, column and the columns there are, or, where
    the set can do without the column, something is made or counted."""
    try:
        made, found = read(name, ROWS[name] | {column: value}, **options_of(name))
        assert made or found
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1
        assert "set/train.jsonl:1: " in error and "the record has: " in error


@pytest.mark.parametrize("name", ROWS)
def test_another_set_s_rows_are_named(name, refused):
    """Alpaca's rows, given as another set, are refused as such; Alpaca's own reader refuses ShareGPT's."""
    other = "sharegpt" if name == "alpaca" else "alpaca"
    error = refused(read, name, ROWS[other], **options_of(name))
    looks = "ShareGPT" if name == "alpaca" else "Alpaca"
    assert f"this looks like {looks}: python -m minirlhf.prepare {other}" in error
