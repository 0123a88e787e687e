"""What an evaluation writes: the result, its resamples and its page."""

import base64
import hashlib
import io
import json
import math
import random
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from result_fixtures import JUDGE, colours

from vllava.errors import UserError
from vllava.evaluation.questions import FileMedium, question
from vllava.evaluation.result_files import read_draws, read_result, without_secrets, write_result
from vllava.evaluation.result_page import chosen, thumbnail, write_result_page
from vllava.evaluation.results import Counts, Judge, counted, fingerprint, judge_of, logged_figures, logged_samples
from vllava.evaluation.statistics import Score, difference


def test_a_result_is_what_was_asked_and_counted():
    found, _ = colours()
    assert found.counts == Counts(expected=3, answered=2, broken=1, published=4, judged=1, unjudged=1)
    assert found.score("accuracy").value == pytest.approx(100 / 3)
    assert found.score("accuracy", "kind/warm").value == 100.0
    assert found.score("accuracy", "kind/cold").value == 0.0
    assert found.score("accuracy", "kind/none") is None
    assert [one.value for one in found.blind if not one.group] == [0.0, 25.0]
    assert (found.split, found.n, found.seconds, found.paper) == ("test", 3, 1.2, {"accuracy": 70.0})
    assert found.versions["vllava"] and found.versions["torch"]


def test_a_result_is_read_as_it_was_written(tmp_path):
    found, draws = colours()
    path = write_result(tmp_path / "new", found, draws)
    again, drawn = read_result(path), read_draws(path)
    assert repr(again) == repr(found)  # in which NaN is NaN
    assert math.isnan(again.score("accuracy", "kind/warm").low)
    assert "NaN" not in path.read_text()
    assert difference(draws, drawn, "accuracy").value == 0.0
    assert sorted(one.name for one in path.parent.iterdir()) == ["draws.json", "result.json"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content.pop("scores"), "scores is missing"),
        (lambda content: content["scores"][0].pop("low"), "without low"),
        (lambda content: content["scores"][0].update(value="high"), "scores.value is the text 'high'"),
        (lambda content: content["counts"].pop("broken"), "counts.broken is missing"),
        (lambda content: content["counts"].update(broken=-1), r"counts.broken is -1"),
        (lambda content: content["counts"].update(answered=3), "are not counts.expected together"),
        (lambda content: content.update(asking=[]), "asking is"),
        (lambda content: content.update(counts="???"), "cannot be read|damaged"),
        (lambda content: content.update(shiny=1), "Unknown key 'shiny'"),
        (lambda content: content.update(version=2), "version 2; this vllava reads version 1"),
        (lambda content: content.pop("version"), "is not a result of an evaluation"),
    ],
)
def test_a_damaged_result_is_named_with_what_is_wrong(tmp_path, spoil, said):
    path = write_result(tmp_path, colours()[0])
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as raised:
        read_result(path)
    assert str(path) in str(raised.value) and "valuate again" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100000])
def test_what_is_no_result_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / "result.json")):
        read_result(tmp_path / "result.json")


def test_a_result_cut_off_anywhere_is_an_error(tmp_path):
    path = write_result(tmp_path, colours()[0])
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            read_result(path)


def test_no_key_reaches_a_result(tmp_path):
    settings = {
        "temperature": 0,
        "max_tokens": 64,
        "api_key": "sk-1",
        "OPENAI_API_KEY": "sk-2",
        "base_url": "https://me:sk-3@judge.example:8000/v1?key=sk-4",
        "headers": {"Authorization": "Bearer sk-5", "x-token": "sk-6", "accept": "json"},
    }
    found, draws = colours(judge=replace(JUDGE, settings=settings))
    path = write_result(tmp_path, found, draws)
    assert "sk-" not in "".join(one.read_text() for one in tmp_path.iterdir())
    assert read_result(path).judge.settings == without_secrets(settings)
    kept = {"temperature": 0, "max_tokens": 64, "base_url": "https://judge.example:8000/v1"}
    assert without_secrets(settings) == {**kept, "headers": {"accept": "json"}}


def test_two_people_see_by_the_fingerprint_whether_they_asked_the_same(tmp_path):
    def asked(folder, prompt="What?", truth=("a", "b")):
        media = [FileMedium("image", folder / f"{number}.jpg") for number in range(3)]
        return [question(str(number), prompt, one, truth=truth) for number, one in enumerate(media)]

    here = asked(tmp_path)
    there = asked(tmp_path / "other", truth=["a", "b"])
    random.Random(0).shuffle(there)
    assert fingerprint(here) == fingerprint(there)
    everything, ids = fingerprint(here)
    others = [fingerprint(asked(tmp_path, "Who?")), fingerprint(asked(tmp_path, truth=("a",)))]
    assert all(one[0] != everything and one[1] == ids for one in others)
    assert fingerprint(here[:2])[1] != ids


def test_what_became_of_the_questions_is_said_in_words():
    said = " ".join(counted(colours()[0]))
    assert "3 questions, 2 answered, 1 broken." in said
    assert "4 were published" in said
    assert "cannot be read, so nobody was asked. They count as wrong, with a score of 0." in said
    assert "Answers judged: 1; unjudged: 1." in said
    other = replace(colours()[0], counting={"unjudged": "are left out"})
    assert "after several tries. They are left out." in " ".join(counted(other))
    whole = replace(colours()[0], counts=Counts(3, 3, 0, 3), judge=None)
    assert counted(whole) == ["3 questions, 3 answered, 0 broken."]


def test_a_judge_is_what_decides_its_verdicts_apart_from_what_they_took():
    about = {
        "name": "openai",
        "model": "gpt-x",
        "temperature": 0,
        "snapshots": {"gpt-x-2": 5, "gpt-x-1": 1},
        "prompts": {"video_qa": "f" * 64},
        "requests": 6,
        "judged": 5,
        "unjudged": 1,
        "tokens": {"input": 10, "output": 2},
    }
    prompts = {"video_qa": "f" * 64}
    usage = {"tokens": {"input": 10, "output": 2}}
    assert judge_of(about) == Judge("openai", "gpt-x", ["gpt-x-1", "gpt-x-2"], prompts, {"temperature": 0}, usage)
    assert judge_of({"name": "exact", "requests": 3, "judged": 3, "unjudged": 0}) == Judge("exact")


def test_what_a_logger_keeps_has_no_gaps():
    found = logged_figures(colours()[0])
    assert found["accuracy"] == pytest.approx(100 / 3) and found["accuracy/low"] <= found["accuracy"]
    assert (found["kind/warm/accuracy"], found["expected"], found["broken"]) == (100.0, 3, 1)
    single, _ = colours(scores=[Score("accuracy", "", 50.0, math.nan, math.nan, 2, True)])
    assert logged_figures(single).keys() == {
        "accuracy",
        "expected",
        "answered",
        "broken",
        "published",
        "judged",
        "unjudged",
    }
    (row,) = logged_samples([sample(1, "broken", answer=None, truth=["a", "b"])])
    assert row["answer"] == "" and row["truth"] == "['a', 'b']" and row["pictures"] == [PICTURE]


# --- the page ---------------------------------------------------------------------------------------------------------

PICTURE = thumbnail(Image.new("RGB", (300, 200), "red"))
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\udc80\u202e"


def sample(number, state="right", **changes):
    made = {"id": f"q{number}", "group": "kind/warm", "question": "What colour?", "answer": "red", "truth": "red"}
    return {**made, "state": state, "words": "", "pictures": [PICTURE], **changes}


class Page(HTMLParser):
    """What is on a page: its tags, its attributes, its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_a_page_shows_figures_counts_and_samples(tmp_path):
    samples = [
        sample(1),
        sample(2, "wrong", answer="", truth=["blue", "blue", "navy"], words="No."),
        sample(3, "broken", answer=None, truth=None, words="cut off after 10 bytes", pictures=[]),
    ]
    page = Page(write_result_page(tmp_path, colours()[0], samples))
    for said in (
        *counted(colours()[0]),
        "accuracy 33.3",
        "blind 0.00 · chance 25.0 · paper 70.0",
        "By kind",
        "all (3) right (1) wrong (1) broken (1) unjudged (0)",
        "truth blue (2), navy judge No.",
        "wrong: (empty)",
        "broken: (nobody was asked) why cut off after 10 bytes",
        "3 of 3 questions",
        "gpt-x-2026-01-01",
        "a" * 64,
    ):
        assert said in page.text
    assert [value for name, value in page.attributes if name == "data-state"] == ["right", "wrong", "broken"]
    assert page.tags.count("img") == 2
    assert not [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("data:")]


def test_what_strangers_wrote_is_text_and_nothing_else(tmp_path):
    texts = {
        "id": HOSTILE,
        "group": HOSTILE,
        "question": HOSTILE,
        "answer": HOSTILE,
        "truth": HOSTILE,
        "words": HOSTILE,
    }
    found, _ = colours()
    hostile = replace(
        found,
        warnings=[HOSTILE],
        checkpoint=replace(found.checkpoint, path=HOSTILE),
        scores=[replace(score, group=HOSTILE) if score.group else score for score in found.scores],
        judge=replace(JUDGE, snapshots=[HOSTILE]),
    )
    pictures = ["https://example.org/x.png", "javascript:alert(3)", f'data:image/png;base64,"><script>{HOSTILE}']
    page = Page(write_result_page(tmp_path, hostile, [{**sample(1), **texts, "pictures": pictures}]))
    assert page.tags.count("script") == 1 and page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for _, value in page.attributes if value and value.startswith(("https:", "javascript:"))]
    assert page.text.count("alert(1)") >= 9


def test_only_the_pages_own_script_may_run(tmp_path):
    path = write_result_page(tmp_path, colours()[0], [sample(1)])
    script = path.read_text().partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (value for name, value in Page(path).attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_page_shows_the_broken_first_and_the_others_evenly():
    states = ["right", "wrong"] * 2000
    assert chosen(states[:150]) == list(range(150))
    shown = chosen(states)
    assert len(shown) == 200 and max(np.diff(shown)) <= 21 and min(np.diff(shown)) >= 19
    for number in range(100, 400, 3):
        states[number] = "broken"
    states[3999] = "unjudged"
    shown = chosen(states)
    assert len(shown) == len(set(shown)) == 200 and shown == sorted(shown)
    assert sum(states[number] == "broken" for number in shown) == 40
    assert 3999 in shown
    assert len(chosen(["broken"] * 500)) == 40


def test_a_page_stays_small_however_large_its_samples_are(tmp_path):
    long = "data:image/jpeg;base64," + "A" * 1_000_000
    samples = [sample(number, pictures=[long], answer="word " * 100_000) for number in range(60)]
    path = write_result_page(tmp_path, colours()[0], samples)
    assert path.stat().st_size < 26 << 20
    text = path.read_text()
    assert text.count("page would be too large") == 60 - text.count("<img ")
    assert "… (500,000 characters)" in text


def test_a_thumbnail_is_a_small_jpeg():
    small = Image.open(io.BytesIO(base64.b64decode(thumbnail(Image.new("RGBA", (1000, 500))).partition(",")[2])))
    assert (small.format, small.size) == ("JPEG", (224, 112))
