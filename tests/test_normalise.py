"""What makes answers comparable, benchmark by benchmark."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllava.evaluation.normalise import (
    CONTRACTIONS,
    agreement,
    gqa_answer,
    mmbench_letter,
    pope_is_plain,
    pope_says_yes,
    scienceqa_letter,
    textvqa_accuracy,
    vqa_answer,
    vqa_words,
    vqav2_accuracy,
)

# --- the processor of the VQA challenges ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("The cat", "cat"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("John's", "john 's"),
        ("10:30", "10:30"),
        ("U.S.A.", "usa"),
        ("semi-final", "semi final"),
        ("semi - final", "semi final"),
        ("none", "0"),
        ("isnt", "isn't"),
        ("Im", "im"),
        ("A", ""),
        ("", ""),
        ("ten an\tapple\na", "10 apple"),
        ("what's that?", "what 's that"),
        ("somebody'd", "somebodyd"),
        ("shouldnt've", "shouldn't've"),
        ("y'alld've", "y'all'd've"),
        ("'ow'sat", "'ow 'sat"),  # its 's is taken for a genitive before contractions are looked up
        ("a/b (c)", "b c"),
        ("x-b c -d", "xb c d"),
    ],
)
def test_an_answer_is_processed_as_published(text, expected):
    assert vqa_answer(text) == expected


def test_at_most_32_full_stops_go():
    assert vqa_answer("." * 40) == "." * 8


def test_punctuation_beside_a_space_goes_everywhere_else_it_is_a_space():
    assert vqa_answer("well-known - x-y") == "wellknown xy"
    assert vqa_answer("well-known x-y") == "well known x y"


@given(st.text(alphabet="abc'.,-/ 01\n", max_size=20))
def test_a_processed_answer_has_no_outer_spaces_no_articles_and_no_capitals(text):
    found = vqa_answer(text.upper())
    assert found == found.strip().lower()
    assert not {"a", "an", "the"} & set(found.split(" "))


def test_every_contraction_loses_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    for short, whole in CONTRACTIONS.items():
        assert short.replace("'", "") == whole.replace("'", "")
        assert abs(len(short) - len(whole)) == 1


# --- what an answer is worth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("people", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)]
)
def test_an_answer_is_worth_three_tenths_for_each_who_gave_it(people, expected):
    assert agreement("yes", ["yes"] * people + ["no"] * (10 - people)) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abc"))
def test_the_worth_is_the_mean_over_leaving_each_person_out(answers, answer):
    worth = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        worth.append(min(1, others.count(answer) / 3))
    assert agreement(answer, answers) == pytest.approx(sum(worth) / len(worth))


def test_textvqa_compares_answers_in_one_form():
    assert textvqa_accuracy("The two", ["2", "two", "Two.", *["3"] * 7]) == pytest.approx(0.9)


def test_vqav2_processes_people_s_answers_only_where_they_differ():
    assert vqav2_accuracy("stop sign", ["stop sign."] * 10) == 0
    assert vqav2_accuracy("stop sign", ["stop sign."] * 9 + ["sign"]) == 1


def test_the_vqa_server_takes_one_comma_between_digits_for_a_large_number():
    assert vqa_words("1,000 (x)-y") == "1000 xy"
    assert vqa_words("1,,000 (x)-y") == "1 000 x y"


# --- GQA and POPE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("Left..", "left"), ("yes. ", "yes. "), ("The car", "the car"), (".", ""), ("a.b", "a.b")]
)
def test_gqa_strips_full_stops_at_the_end_and_nothing_else(text, expected):
    assert gqa_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "yes", "plain"),
    [
        ("Yes", True, True),
        ("No", False, True),
        ("no, there is", False, True),
        ("There is not. Yes", False, True),
        ("Yes. No", True, True),
        ("", True, False),
        ("NO", True, False),
        ("no\nthere", True, False),
        ("None", True, False),
        ("Nothing", True, False),
        ("I see a dog", True, False),
        ("yes,no", True, True),
    ],
)
def test_pope_takes_for_yes_what_has_no_plain_no(text, yes, plain):
    assert pope_says_yes(text) is yes
    assert pope_is_plain(text) is plain


# --- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B. rock", "B"),
        ("E", "E"),
        ("The answer is C.", "C"),
        ("So The answer is C, I think", "C"),
        ("The answer is F.", "F"),
        ("The answer is A. The answer is B.", None),
        ("The answer is A", None),
        ("A.", None),
        ("(A)", None),
        ("A)", None),
        ("a", None),
        ("F", None),
        ("AB. x", None),
        ("", None),
    ],
)
def test_scienceqa_letters_are_found_as_published(text, expected):
    assert scienceqa_letter(text) == expected


OPTIONS = {"A": "cat", "B": "dog", "C": "red dog"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("B). dog", "B"),
        (":A", "A"),
        ("Answer: B", "B"),
        ("A dog", "A"),  # three words and fewer: a letter
        ("A cat sits here", "A"),  # more: an article, but the only option's text
        ("A bird sits here", None),
        ("A or B", None),
        ("A. or B.", None),
        ("I say (A) not B.", "B"),  # a full stop is looked for before brackets
        ("the CAT", "A"),
        ("a red dog", None),  # dog is in it too
        ("E", "E"),  # an option that is not there
        ("b", None),
        ("", None),
    ],
)
def test_mmbench_letters_are_found_as_published(text, expected):
    assert mmbench_letter(text, OPTIONS) == expected
