"""What an evaluation writes: the result, its resamples and its page."""

import json
import math
import random
from dataclasses import replace

import pytest
from result_fixtures import JUDGE, colours

from vllava.errors import UserError
from vllava.evaluation.questions import FileMedium, question
from vllava.evaluation.result_files import read_draws, read_result, without_secrets, write_result
from vllava.evaluation.results import Counts, counted, fingerprint
from vllava.evaluation.statistics import difference


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
        (lambda content: content["scores"][0].update(value="high"), r"scores.value is 'high'"),
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
    assert "cannot be read, so nobody was asked. They count as wrong." in said
    assert "Answers judged: 1; unjudged: 1." in said
    whole = replace(colours()[0], counts=Counts(3, 3, 0, 3), judge=None)
    assert counted(whole) == ["3 questions, 3 answered, 0 broken."]
