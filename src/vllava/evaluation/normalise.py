"""What makes answers comparable: each benchmark's own rules to the letter, slips of the published code included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

# With an apostrophe left out (one of them where there are several) they are written in full: dont -> don't.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the published table has this one the wrong way round
# I'm, I've and I'd've are in it with a capital I, which no text that was lowered has: they are never restored.

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")  # the server's; LLaVA's processor, which takes ",,", has no comma left by then
# Published as (?!<=\d)(\.)(?!\d), whose first part is always true, with the flag re.UNICODE in the place of the count.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32


@lru_cache(maxsize=2**16)  # the same few answers, again and again
def vqa_answer(text: str) -> str:
    """An answer as TextVQA, and LLaVA's uploads to VQAv2 and VizWiz, have it: the processor of the VQA challenges."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(text.replace("\n", " ").replace("\t", " ").strip())


@lru_cache(maxsize=2**16)
def vqa_words(text: str) -> str:
    """The part of it that the server of the VQA challenge runs: punctuation, numbers, articles and contractions."""
    found = text
    grouped = _GROUPED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or grouped else " ")
    found = _PERIOD.sub("", found, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(answer: str, answers: Sequence[str]) -> float:
    """The share of credit that people who answered give an answer; all are in one form.

    It is right in the eyes of three others, a third for each: the mean over leaving each of them out. Of ten, those
    who gave it make it 0.3, 0.6, 0.9 or, four and more, 1.
    """
    same = sum(other == answer for other in answers)
    left_out = same * min((same - 1) / 3, 1.0) + (len(answers) - same) * min(same / 3, 1.0)
    return left_out / len(answers)


def textvqa_accuracy(text: str, answers: Iterable[str]) -> float:
    """Of TextVQA, and of VizWiz where its answers are public: everything in the same form."""
    return agreement(vqa_answer(text), [vqa_answer(answer) for answer in answers])


def vqav2_accuracy(uploaded: str, answers: Iterable[str]) -> float:
    """Of the VQA challenge, for an answer that was uploaded: where all people said the same it must be that exactly."""
    given = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    uploaded = uploaded.replace("\n", " ").replace("\t", " ").strip()
    if len(set(given)) > 1:
        return agreement(vqa_words(uploaded), [vqa_words(answer) for answer in given])
    return agreement(uploaded, given)


def gqa_answer(text: str) -> str:
    """An answer as GQA's script compares it: without full stops at its end, in lower case, and nothing else."""
    return text.rstrip(".").lower()


def pope_says_yes(text: str) -> bool:
    """Whether an answer counts as yes: whatever has no word No, no or not before its first full stop."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_is_plain(text: str) -> bool:
    """Whether an answer says what it counts as, and does not count as yes for want of a no."""
    return not pope_says_yes(text) or re.search(r"\byes\b", text, re.IGNORECASE) is not None


_THE_ANSWER_IS = re.compile("The answer is ([A-Z]).")  # whatever follows the letter, as published


def scienceqa_letter(text: str) -> str | None:
    """The option that an answer names by ScienceQA's rule: `B`, `B. …` or, once, `The answer is B.`"""
    if text and text[0] in "ABCDE" and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = _THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


# fmt: off
_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)
# fmt: on


def mmbench_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names by MMBench's rule without a judge: its letter, else its text in the answer.

    options: letter -> text. A letter counts, there or not, where it is the only one of A to E that stands alone among
    blanks, but for an A among more than three words, an article perhaps; else where it is the only one with a full
    stop, a bracket, … about it.
    """
    words = text.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    if len(bare) == 1 and not (bare == ["A"] and len(words) > 3):
        return bare[0]
    for before, after in _AROUND:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    said = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return said[0] if len(said) == 1 else None
