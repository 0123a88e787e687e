"""The toy world: reproducible, its splits disjoint, and every answer and caption true of its scene."""

import hashlib
import io
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data_prep import toy
from data_prep.toy_language import caption, cells_in_words, existence, in_words, question_conversation
from data_prep.toy_render import RGB, encode_jpeg, encode_mp4, render
from data_prep.toy_scene import (
    CELL,
    IMAGE_SIZE,
    NOVEL_PAIRS,
    POPULAR_PAIRS,
    RADIUS,
    Scene,
    Thing,
    draw_clip,
    draw_picture,
)
from vllava.data.media import decode_image
from vllava.data.video import video_decoder
from vllava.model.build import load_tokenizer

ROOT = Path(__file__).parents[1]
COLOURS = "red|green|blue|yellow|purple|orange|white|black"
SHAPES = "circle|square|triangle|cross|ring"
THING = f"({COLOURS}) ({SHAPES})"
PLACES = "top left|top right|bottom left|bottom right|top|left|centre|right|bottom"
SHOWN = rf"<|frame one |nothing |({PLACES}) (small|large) |.*[a-z]\.$"  # a placeholder, cells in words or a caption
SOURCES = {source.name: source for sources in toy.SPLITS.values() for source in sources}
TRAINING = [name for name, source in SOURCES.items() if not name.startswith("eval/")]
TESTS = [name for name, source in SOURCES.items() if source.talk == "test"]


def scenes(draw, count, seed=0, **kwargs):
    rng = random.Random(seed)
    return [draw(rng, **kwargs) for _ in range(count)]


def samples_of(name, count, monkeypatch, seed=0):
    """(scene, record) of a source's first samples, without drawing a pixel."""
    monkeypatch.setattr(toy, "_media", lambda medium, scene: scene)
    return [(scene, record) for _, record, scene in toy._samples(SOURCES[name], seed, 0, count)]


def rounds(record):
    """(question without what is shown, answer) of each round."""
    turns = [message["value"] for message in record["conversations"]]
    for number, (asked, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        lines = asked.split("\n")
        if number == 0:
            assert len(lines) == 2
            asked = next(line for line in lines if not re.match(SHOWN, line) or is_instruction(line))
        yield asked, answer


def is_instruction(line):
    return re.match(r"(Describe the|Give a short|Write a caption|Tell me what)", line) is not None


# --- an independent reading of a scene: only its states, frame by frame -----------------------------------------------


def visible(scene, frame):
    """(thing, state) of what can be seen at a frame."""
    states = [(thing, scene.state(index, frame)) for index, thing in enumerate(scene.things)]
    return [(thing, state) for thing, state in states if state.visible]


def history(scene, index):
    return [scene.state(index, frame) for frame in range(scene.frames)]


def place_at(state):
    """The place by distance from the centre of the picture; half-way to the next cell still counts as the middle."""
    names = [["top left", "top", "top right"], ["left", "centre", "right"], ["bottom left", "bottom", "bottom right"]]
    half_way = CELL * 8 / 15
    column, row = (int(np.digitize(v - IMAGE_SIZE / 2, (-half_way, half_way))) for v in (state.x, state.y))
    return names[row][column]


def direction_of(scene, index):
    first, last = history(scene, index)[0], history(scene, index)[-1]
    dx, dy = last.x - first.x, last.y - first.y
    if max(abs(dx), abs(dy)) < 1:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def when(scene, index, verb):
    """The frame at which a thing starts to move, appears or vanishes."""
    states = history(scene, index)
    if verb == "moves":
        return next(f for f, s in enumerate(states) if (s.x, s.y) != (states[0].x, states[0].y))
    seen = [f for f, s in enumerate(states) if s.visible]
    return {"appears": seen[0], "vanishes": seen[-1]}[verb]


def blinks(scene, index):
    seen = "".join("x" if state.visible else "." for state in history(scene, index))
    return len(re.findall(r"(?<=x)\.+(?=x)", seen))


NUMBERS = ["zero", "one", "two", "three", "four"]
READINGS = []


def reads(*patterns):
    def add(function):
        READINGS.extend((re.compile(pattern + "$"), function) for pattern in patterns)
        return function

    return add


def answer_to(scene, question):
    """What the scene says; None for an instruction to describe it."""
    for pattern, read in READINGS:
        match = pattern.match(question)
        if match:
            return read(scene, *match.groups())
    raise AssertionError(f"no reading for {question!r}")


def only(found):
    """The one thing that fits; a question with two would be ambiguous."""
    assert len(found) == 1, found
    return found[0]


def find(scene, *words):
    """Index of the only thing that ever fits all the words."""

    def fits(index):
        thing, colours = scene.things[index], {state.colour for state in history(scene, index)}
        return all(word == thing.shape or word in colours for word in words)

    return only([index for index in range(len(scene.things)) if fits(index)])


@reads("(?:Describe|Give|Write|Tell) .*", "What does the (?:image|video) show", "What happens in the video")
def _(scene):
    return None


@reads(f"What colour is the ({SHAPES})", f"Which colour does the ({SHAPES}) have", f"The ({SHAPES}) has which colour")
def _(scene, shape):
    return only(list({state.colour for state in history(scene, find(scene, shape))}))


@reads(
    f"What shape is the ({COLOURS}) object", f"Which shape is ({COLOURS})", f"The ({COLOURS}) object has which shape"
)
def _(scene, colour):
    return scene.things[find(scene, colour)].shape


@reads(f"Is the {THING} small or large", f"What size is the {THING}")
def _(scene, colour, shape):
    return scene.things[find(scene, colour, shape)].size


@reads(f"Where is the {THING}", f"In which place is the {THING}")
def _(scene, colour, shape):
    return only(list({place_at(state) for state in history(scene, find(scene, colour, shape))}))


@reads("How many objects are there", "How many objects does the .* show", "What is the number of objects")
def _(scene):
    return NUMBERS[len({thing for frame in range(scene.frames) for thing, _ in visible(scene, frame)})]


@reads(f"Is the {THING} left or right of the {THING}")
def _(scene, *words):
    sides = {a.x < b.x for a, b in _both(scene, words[:2], words[2:])}
    return "left" if only(list(sides)) else "right"


@reads(f"On which side of the {THING} is the {THING}, left or right")
def _(scene, *words):
    sides = {a.x < b.x for a, b in _both(scene, words[2:], words[:2])}
    return "left" if only(list(sides)) else "right"


@reads(f"Is the {THING} above or below the {THING}")
def _(scene, *words):
    sides = {a.y < b.y for a, b in _both(scene, words[:2], words[2:])}
    return "above" if only(list(sides)) else "below"


def _both(scene, first, second):
    return zip(history(scene, find(scene, *first)), history(scene, find(scene, *second)), strict=True)


@reads(f"Is there a {THING}", f"Can you see a {THING}", f"Does the (?:image|video) show a {THING}")
def _(scene, colour, shape):
    shown = {(state.colour, thing.shape) for frame in range(scene.frames) for thing, state in visible(scene, frame)}
    return "yes" if (colour, shape) in shown else "no"


@reads(
    f"In which direction does the {THING} move",
    f"Which way does the {THING} go",
    f"Where does the {THING} move to, left, right, up or down",
)
def _(scene, colour, shape):
    return direction_of(scene, find(scene, colour, shape))


@reads("What colour is the object that moves", "Which colour has the moving object")
def _(scene):
    return scene.things[only([i for i in range(len(scene.things)) if direction_of(scene, i)])].colour


@reads(f"(?:Which object|What) (moves|appears|vanishes) (first|last), the {THING} or the {THING}")
def _(scene, verb, end, *words):
    times = {when(scene, find(scene, *pair), verb): " ".join(pair) for pair in (words[:2], words[2:])}
    assert len(times) == 2
    return times[min(times) if end == "first" else max(times)]


@reads(f"What colour does the ({SHAPES}) become", f"Which colour does the ({SHAPES}) have in the end")
def _(scene, shape):
    return history(scene, find(scene, shape))[-1].colour


@reads(f"What colour is the ({SHAPES}) at first", f"Which colour does the ({SHAPES}) have at the start")
def _(scene, shape):
    return history(scene, find(scene, shape))[0].colour


@reads(f"How many times does the {THING} blink", f"How often does the {THING} blink")
def _(scene, colour, shape):
    return NUMBERS[blinks(scene, find(scene, colour, shape))]


def said_in(text):
    """What a caption says: {(size, colour, shape, place)} -> what happens to it."""
    described = {}
    pattern = f"a (small|large) {THING} (?:at|in|on) the ({PLACES})(.*?)(?=,? (?:and )?a (?:small|large)|\\.$)"
    for size, colour, shape, place, happening in re.findall(pattern, text.lower()):
        described[size, colour, shape, place] = happening.strip()
    return described


# --- what the words say is true of the scene --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TESTS)
def test_test_answers_are_true_of_their_scenes(name, monkeypatch):
    found = Counter()
    for scene, record in samples_of(name, 360, monkeypatch):
        [(question, answer)] = rounds(record)
        assert answer_to(scene, question.rstrip("?.")) == answer, (question, scene)
        assert answer in record["question"]["options"]
        found[record["question"]["type"]] += 1
    assert len(found) == (9 if "images" in name else 14)  # every type was there to be checked
    assert min(found.values()) >= 8


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.talk == "questions"])
def test_training_answers_are_true_of_their_scenes(name, monkeypatch):
    checked = 0
    for scene, record in samples_of(name, 200, monkeypatch):
        for question, answer in rounds(record):
            expected = answer_to(scene, question.rstrip("?."))
            checked += expected is not None
            assert expected in (None, answer), (question, scene)
    assert checked > 400


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_captions_name_every_thing_and_its_place(draw):
    rng = random.Random(1)
    for scene in scenes(draw, 300):
        starts = [scene.state(index, 0) for index in range(len(scene.things))]
        pairs = zip(scene.things, starts, strict=True)
        expected = {(thing.size, thing.colour, thing.shape, place_at(state)) for thing, state in pairs}
        assert set(said_in(caption(scene, rng))) == expected


def test_captions_of_clips_tell_what_happens():
    rng = random.Random(1)
    told = Counter()
    for scene in scenes(draw_clip, 400):
        happenings = {(colour, shape): text for (_, colour, shape, _), text in said_in(caption(scene, rng)).items()}
        for index, thing in enumerate(scene.things):
            expected, states = happening(scene, index), history(scene, index)
            said = happenings[thing.colour, thing.shape]
            assert re.fullmatch(expected, said), (expected, said, states)
            told[said.split()[0]] += 1
    assert min(told[verb] for verb in ("moves", "goes", "appears", "vanishes", "turns", "blinks", "stays")) > 10


def happening(scene, index):
    """A pattern for what a caption should say of a thing, from its states."""
    states = history(scene, index)
    direction = direction_of(scene, index)
    if direction:
        return f"(moves|goes) {direction}{rank(scene, index, 'moves')}"
    if states[0].colour != states[-1].colour:
        return f"turns {states[-1].colour}"
    if not states[0].visible:
        return "appears" + rank(scene, index, "appears")
    if not states[-1].visible:
        return "(vanishes|disappears)" + rank(scene, index, "vanishes")
    count = blinks(scene, index)
    return f"blinks {NUMBERS[count]} time{'s' if count > 1 else ''}" if count else "(stays|rests)"


def rank(scene, index, verb):
    """' first', ' second' or ' last' among the things that do the same."""
    does = {
        "moves": lambda i: direction_of(scene, i) is not None,
        "appears": lambda i: not history(scene, i)[0].visible,
        "vanishes": lambda i: not history(scene, i)[-1].visible,
    }[verb]
    times = sorted(when(scene, i, verb) for i in range(len(scene.things)) if does(i))
    place = times.index(when(scene, index, verb))
    return "" if len(times) == 1 else " last" if place == len(times) - 1 else (" first", " second")[place]


FRAME_NAMES = [f"frame {number}" for number in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_cells_in_words_list_what_each_cell_of_each_frame_shows(draw):
    names = [f"{row} {column}".strip() for row in ("top", "", "bottom") for column in ("left", "", "right")]
    names[4] = "centre"
    for scene in scenes(draw, 200):
        text = cells_in_words(scene)
        parts = re.split(" ?frame [a-z]+ ", text)[1:] if scene.frames > 1 else [text]
        assert re.findall("frame [a-z]+", text) == (FRAME_NAMES if scene.frames > 1 else [])
        frames = np.linspace(0, scene.frames - 1, 8).astype(int) if scene.frames > 1 else [0]
        for frame, part in zip(frames, parts, strict=True):
            cells = {place_at(state): (thing, state) for thing, state in visible(scene, int(frame))}
            expected = [
                f"{name} {cells[name][0].size} {cells[name][1].colour} {cells[name][0].shape}"
                if name in cells
                else "nothing"
                for name in names
            ]
            assert part == " ".join(expected)


def test_every_cell_is_one_token():
    tokenizer = load_tokenizer(str(ROOT / "assets" / "tokenizer"))
    for draw, tokens in ((draw_picture, 9), (draw_clip, 8 * 10)):
        for scene in scenes(draw, 100):
            ids = tokenizer(f" {cells_in_words(scene)}", add_special_tokens=False)["input_ids"]
            assert len(ids) == tokens
            assert " ".join(t.lstrip("Ġ") for t in tokenizer.convert_ids_to_tokens(ids)) == cells_in_words(scene)


def test_scenes_in_words_are_captions_or_cells():
    rng = random.Random(2)
    kinds = Counter(
        "caption" if said_in(text) else "cells"
        for scene in scenes(draw_picture, 400)
        if (text := in_words(scene, rng)) == cells_in_words(scene) or said_in(text)
    )
    assert kinds.total() == 400 and 50 < kinds["caption"] < 120


# --- pixels agree with the scene --------------------------------------------------------------------------------------


def background_of(scene):
    return render(Scene((), scene.background))[0].astype(float)


def colour_at(pixels, thing, state):
    """The colour of the pixel in the middle of what a shape fills: its centre, or a ring's band."""
    x = state.x - (0.75 * RADIUS[thing.size] if thing.shape == "ring" else 0)
    return pixels[int(state.y), int(x)].astype(int)


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_a_visible_thing_has_its_colour_where_it_is(draw):
    for scene in scenes(draw, 60):
        for frame, pixels in enumerate(render(scene)):
            for thing, state in visible(scene, frame):
                assert np.abs(colour_at(pixels, thing, state) - RGB[state.colour]).max() <= 2


def test_nothing_is_drawn_where_a_thing_is_invisible():
    hidden = 0
    for scene in scenes(draw_clip, 60):
        background = background_of(scene)
        for frame, pixels in enumerate(render(scene)):
            if not visible(scene, frame):
                assert np.abs(pixels - background).max() <= 1
                hidden += 1
    assert hidden > 5


def covered_by(shape, size):
    """Which pixels a white thing covers, cut to its bounding box."""
    thing = Thing("white", shape, size, 1, 1)
    drawn, empty = render(Scene((thing,), 7))[0].astype(float), background_of(Scene((), 7))
    mask = ((drawn - empty) / (np.array(RGB["white"]) - empty)).mean(-1) > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@pytest.mark.parametrize("size", RADIUS)
def test_a_shape_looks_like_its_name(size):
    shapes = {shape: covered_by(shape, size) for shape in SHAPES.split("|")}
    share = {shape: mask.mean() for shape, mask in shapes.items()}
    middle = {shape: mask[len(mask) // 2] for shape, mask in shapes.items()}
    corners = {shape: mask[[0, 0, -1, -1], [0, -1, 0, -1]] for shape, mask in shapes.items()}
    assert share["square"] == 1
    assert (
        not corners["circle"].any() and middle["circle"].all() and share["circle"] == pytest.approx(np.pi / 4, abs=0.12)
    )
    assert not corners["cross"].any() and middle["cross"].all() and share["cross"] < 0.7
    assert not corners["ring"].any() and not middle["ring"][len(middle["ring"]) // 2]
    widths = shapes["triangle"].sum(1)
    assert (np.diff(widths) >= 0).all() and widths[0] <= 3 and widths[-1] >= len(widths)


@pytest.mark.parametrize("size", RADIUS)
def test_every_two_shapes_differ_by_enough_pixels_to_be_told_apart(size):
    drawn = {s: render(Scene((Thing("red", s, size, 1, 1),), 7))[0].astype(int) for s in SHAPES.split("|")}
    different = {(a, b): int((np.abs(drawn[a] - drawn[b]).max(-1) > 60).sum()) for a, b in combinations(drawn, 2)}
    assert min(different.values()) >= 12, different


def test_files_show_what_was_rendered():
    for scene in scenes(draw_picture, 10):
        pixels = render(scene)[0].astype(int)
        shown = np.asarray(decode_image(encode_jpeg(render(scene)[0])), int)
        assert np.abs(shown - pixels).mean() < 8
    for scene in scenes(draw_clip, 10):
        frames = render(scene)
        shown = video_decoder("pyav")(encode_mp4(frames), 8)
        for index, picture in zip((0, 2, 4, 6, 8, 10, 12, 15), shown, strict=True):
            assert np.abs(np.asarray(picture, int) - frames[index].astype(int)).mean() < 12


# --- scenes that training never shows ---------------------------------------------------------------------------------


def pairs_shown(scene):
    return {(scene.state(i, f).colour, t.shape) for i, t in enumerate(scene.things) for f in range(scene.frames)}


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_an_ordinary_scene_never_shows_a_novel_pair(draw):
    for scene in scenes(draw, 2000):
        assert not pairs_shown(scene) & NOVEL_PAIRS


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_a_novel_scene_always_shows_a_novel_pair_and_every_one_has_its_turn(draw):
    found = Counter()
    for scene in scenes(draw, 500, novel=True):
        shown = pairs_shown(scene) & NOVEL_PAIRS
        assert shown
        found.update(shown)
        text = caption(scene, random.Random(0)).lower()
        assert {pair for pair in NOVEL_PAIRS if " ".join(pair) in text} & shown
    assert set(found) == NOVEL_PAIRS and min(found.values()) > 50


@pytest.mark.parametrize("name", TRAINING)
def test_training_text_never_names_a_novel_pair(name, monkeypatch):
    named = Counter()
    for _, record in samples_of(name, 300, monkeypatch):
        text = json.dumps(record).lower()
        named.update(re.findall(THING, text))
        for answer in (message["value"] for message in record["conversations"][1::2]):
            for (_, _, shape, _), happening in said_in(answer).items():
                named.update((colour, shape) for colour in re.findall(f"turns ({COLOURS})", happening))
    assert len(named) > 30  # most of the 35 known pairs
    assert not set(named) & NOVEL_PAIRS


@pytest.mark.parametrize("name", TESTS)
def test_only_the_novel_test_sources_show_novel_pairs(name, monkeypatch):
    for scene, _ in samples_of(name, 200, monkeypatch):
        assert bool(pairs_shown(scene) & NOVEL_PAIRS) == SOURCES[name].novel


@pytest.mark.parametrize("draw", [draw_picture, draw_clip])
def test_every_known_colour_and_shape_of_a_novel_pair_is_seen_in_training(draw):
    shown = set().union(*(pairs_shown(scene) for scene in scenes(draw, 500)))
    for colour, shape in NOVEL_PAIRS:
        assert colour in {c for c, _ in shown} and shape in {s for _, s in shown}


def test_an_existence_question_can_be_asked_of_any_scene():
    pairs = [("red", shape) for shape in ("circle", "square", "cross", "ring")]  # all that training shows in red
    things = tuple(Thing(*pair, "small", number % 3, number // 3) for number, pair in enumerate(pairs))
    for probe in toy.PROBES:
        for present in (True, False):
            question = existence(Scene(things, 0), random.Random(0), probe, present)
            assert (
                answer_to(Scene(things, 0), question.text.rstrip("?"))
                == question.answer
                == ("yes" if present else "no")
            )


def test_existence_answers_are_true_also_where_a_thing_changes_its_colour():
    rng = random.Random(0)
    for index in range(2000):
        scene, question = toy._test_question(draw_clip, False, rng, ("exist",), index)
        assert answer_to(scene, question.text.rstrip("?")) == question.answer, (question, scene)


# --- balance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eval/images", "eval/videos"])
def test_each_answer_that_fits_a_question_is_equally_often_the_true_one(name, monkeypatch):
    counts = defaultdict(Counter)
    for _, record in samples_of(name, 3000, monkeypatch):
        question, answer = record["question"], record["conversations"][-1]["value"]
        options = ("named first", "named last") if question["type"] == "order" else question["options"]
        if question["type"] == "order":
            text = record["conversations"][0]["value"]
            answer = options[0] if text.index(answer) == min(text.index(o) for o in question["options"]) else options[1]
        counts[question["type"], options][answer] += 1
    for (kind, options), found in counts.items():
        total = sum(found.values())
        expected = total / len(options)
        surprise = sum((found[option] - expected) ** 2 / expected for option in options)  # chi-squared
        freedom = len(options) - 1
        assert surprise < freedom + 6 * np.sqrt(2 * freedom), (kind, found)
    assert len(counts) == (15 if "video" in name else 10)


@pytest.mark.parametrize("name", ["eval/images", "eval/videos"])
def test_the_words_of_a_question_do_not_give_its_answer_away(name, monkeypatch):
    """A reader who has learned 3,000 other questions by heart, and sees no picture, stays near chance."""

    learned = defaultdict(Counter)
    for _, record in samples_of(name, 3000, monkeypatch, seed=1):
        for clue in clues(record):
            learned[clue][record["conversations"][-1]["value"]] += 1
    right, chance = defaultdict(list), {}
    for _, record in samples_of(name, 3000, monkeypatch, seed=2):
        question, answer = record["question"], record["conversations"][-1]["value"]
        words, kind = (learned[clue] for clue in clues(record))
        guess = max(question["options"], key=lambda option: (words[option], kind[option]))
        right[question["type"]].append(guess == answer)
        chance[question["type"]] = 1 / len(question["options"])
    for kind, guesses in right.items():
        noise = np.sqrt(chance[kind] * (1 - chance[kind]) / len(guesses))
        assert np.mean(guesses) < chance[kind] + 0.08 + 3 * noise, kind


def clues(record):
    """What of a question could give its answer away: its type with the words that tell, and its type alone."""
    text = record["conversations"][0]["value"].split("\n")[1]
    kind = record["question"]["type"]
    return (kind, *re.findall(f"{COLOURS}|{SHAPES}|first|last", text)), (kind,)


def probes(count, monkeypatch, seed=0):
    """(scene, setting, question without what is shown, answer) of the first probes."""
    for scene, record in samples_of("eval/probes", count, monkeypatch, seed):
        [(question, answer)] = rounds(record)
        yield scene, record["question"]["type"].removeprefix("exist_"), question, answer


def test_probes_are_true_of_their_scenes_and_each_setting_has_as_many_of_yes_as_of_no(monkeypatch):
    count = SOURCES["eval/probes"].samples
    found = Counter()
    for scene, setting, question, answer in probes(count, monkeypatch):
        assert answer_to(scene, question.rstrip("?")) == answer, (question, scene)
        found[setting, answer] += 1
    assert count == 1500
    assert found == {(setting, answer): 250 for setting in toy.PROBES for answer in ("yes", "no")}


def test_what_a_probe_asks_for_in_vain_is_chosen_as_its_setting_says(monkeypatch):
    lured = []
    for scene, setting, question, answer in probes(1500, monkeypatch):
        pair = re.search(THING, question).groups()
        assert pair not in NOVEL_PAIRS
        if setting == "popular":
            assert pair in POPULAR_PAIRS
        if setting == "adversarial" and answer == "no":
            here = [thing.pair for thing in scene.things]
            both = [(c, s) for c, _ in here for _, s in here if (c, s) not in here and (c, s) not in NOVEL_PAIRS]
            lured.append(bool(both))
            assert pair in both if both else pair[0] in {colour for colour, _ in here}
    assert sum(lured) > 100  # of 250: the others show one thing, or a few that share a colour or shape


def test_the_words_of_a_probe_do_not_give_its_answer_away(monkeypatch):
    """A reader who has learned other probes by heart, and sees no picture, stays near one half."""
    learned = defaultdict(Counter)
    for _, setting, question, answer in probes(3000, monkeypatch, seed=1):
        learned[setting, re.search(THING, question).group()][answer] += 1
    right = Counter()
    for _, setting, question, answer in probes(1500, monkeypatch, seed=2):
        words = learned[setting, re.search(THING, question).group()]
        right[setting] += max(("yes", "no"), key=lambda option: words[option]) == answer
    assert all(found / 500 < 0.5 + 0.03 + 3 * 0.5 / np.sqrt(500) for found in right.values()), right


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval/images", "4d4cb508841682bd"),
        ("eval/videos", "4f1dce01f20b2858"),
        ("eval/novel-images", "456e3340bbbe382a"),
        ("eval/novel-videos", "625b8655edd761fe"),
    ],
)
def test_held_out_questions_are_those_that_published_figures_are_of(name, expected, monkeypatch):
    records = [record for _, record in samples_of(name, 140, monkeypatch)]
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16] == expected


# --- shards -----------------------------------------------------------------------------------------------------------


def made(out, split, scale, processes=1, seed=0):
    arguments = [split, "--out", out, "--scale", scale, "--processes", processes, "--seed", seed]
    assert toy.main([str(argument) for argument in arguments]) == 0
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_shards_are_identical_from_run_to_run_and_for_any_number_of_processes(tmp_path):
    scale = 1.1 * toy.SHARD_SAMPLES / SOURCES["foundations/text"].samples
    one = made(tmp_path / "one", "foundations", scale)
    assert sum(name.startswith("foundations/text/") and name.endswith(".tar") for name in one) == 2
    assert made(tmp_path / "two", "foundations", scale, processes=2) == one


def test_another_seed_makes_another_world(tmp_path):
    one, other = (made(tmp_path / str(seed), "stage1", 0.002, seed=seed) for seed in (0, 1))
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_a_smaller_scale_is_the_beginning_of_a_larger_one(tmp_path):
    small, large = (contents(made(tmp_path / str(scale), "stage2", scale)) for scale in (0.002, 0.004))
    assert len(small) < len(large)
    assert small.items() <= large.items()


def contents(files):
    """Members of all shards by name."""
    found = {}
    for name, data in files.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_no_two_sources_share_a_scene(tmp_path):
    seen = {}
    parts_of_others = ("-demo", "-video")
    for split in (split for split in toy.SPLITS if not split.endswith(parts_of_others)):
        scale = {"foundations": 0.001, "foundations-test": 0.05}.get(split, 0.02)
        for name, data in contents(made(tmp_path / split, split, scale)).items():
            if name.endswith(".json"):
                continue
            assert hashlib.sha256(data).digest() not in seen, (name, seen[hashlib.sha256(data).digest()])
            seen[hashlib.sha256(data).digest()] = name
    assert len(seen) > 300


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_demos_part_of_a_stage_is_the_beginning_of_it(stage, tmp_path):
    part, whole = (contents(made(tmp_path / split, split, 0.01)) for split in (f"{stage}-demo", stage))
    assert 30 < len(part) < len(whole) and all(whole[name] == data for name, data in part.items())


def test_no_two_shards_of_a_source_share_a_sample(monkeypatch):
    monkeypatch.setattr(toy, "_media", lambda medium, scene: scene)
    first, second = ({str(scene) for _, _, scene in toy._samples(SOURCES["stage1/images"], 0, n, 200)} for n in (0, 1))
    assert not first & second


def test_the_manifest_agrees_with_the_files(tmp_path):
    made(tmp_path, "stage2", 0.01)
    for name, medium in (("images", "image"), ("videos", "video"), ("text", "text")):
        folder = tmp_path / "stage2" / name
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {shard["name"] for shard in manifest["shards"]} == {path.name for path in folder.glob("*.tar")}
        assert manifest["settings"]["seed"] == 0
        for shard in manifest["shards"]:
            data = (folder / shard["name"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            with tarfile.open(folder / shard["name"]) as tar:
                keys = [member.name for member in tar if member.name.endswith(".json")]
            assert shard["samples"] == len(keys)
            assert shard["modalities"] == {medium: len(keys)}
        assert sum(shard["samples"] for shard in manifest["shards"]) == manifest["settings"]["samples"]


def test_records_carry_their_key_and_one_placeholder_for_their_medium(tmp_path):
    members = contents(made(tmp_path, "stage2", 0.01))
    for name in (name for name in members if name.endswith(".json")):
        key = name.removesuffix(".json")
        record = json.loads(members[name])
        text = json.dumps(record)
        assert record["id"] == key
        assert text.count("<image>") == (f"{key}.0.jpg" in members)
        assert text.count("<video>") == (f"{key}.0.mp4" in members)
        assert [m["from"] for m in record["conversations"][:2]] == ["human", "gpt"]


def test_a_conversation_varies_its_question_types():
    rng = random.Random(3)
    for scene in scenes(draw_clip, 50):
        asked = [m["value"] for m in question_conversation(scene, rng, "<video>", rounds=6)[::2]]
        assert len(set(asked)) == len(asked)
