"""Words of the toy world: captions, scenes written out in words, and questions whose answers the scene decides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from data_prep.toy_scene import (
    CELL,
    COLOURS,
    DIRECTIONS,
    IMAGE_SIZE,
    KNOWN_PAIRS,
    MAX_THINGS,
    POPULAR_PAIRS,
    SHAPES,
    SIZES,
    Scene,
)

NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
TEMPORAL_TYPES = ("direction", "mover", "order", "change", "events")  # a single frame does not decide these


@dataclass(frozen=True)
class Question:
    """A question about a scene: its type, wording, true answer and the answers that would fit its wording."""

    type: str
    text: str
    answer: str
    options: tuple[str, ...]

    def record(self) -> dict:
        return asdict(self)


def _place_of(x: float, y: float) -> str:
    # A thing on its way between two cells counts as in the middle one until it is a little more than half-way out.
    column, row = (1 + (cell > 8 / 15) - (cell < -8 / 15) for cell in ((v - IMAGE_SIZE / 2) / CELL for v in (x, y)))
    return PLACES[3 * row + column]


def _start_place(scene: Scene, thing: int) -> str:
    item = scene.things[thing]
    return PLACES[3 * item.row + item.column]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- captions -------------------------------------------------------------------------------------------------------

_AT = {place: (f"at the {place}", f"in the {place}") for place in PLACES}
_AT.update({side: (f"on the {side}", f"at the {side}") for side in ("left", "right")})


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that names every thing with its size, colour, shape, place, and what happens to it."""
    order = rng.sample(range(len(scene.things)), len(scene.things))
    text = _join([_describe(scene, thing, rng) for thing in order])
    if not scene.is_clip:
        text = rng.choice(("", "", "there is ", "a picture of ", "we see ")) + text
    return text[0].upper() + text[1:] + "."


def _describe(scene: Scene, thing: int, rng: random.Random) -> str:
    item = scene.things[thing]
    text = f"a {item.size} {item.name} {rng.choice(_AT[_start_place(scene, thing)])}"
    if not scene.is_clip:
        return text
    happenings = []
    for event in (e for e in scene.events if e.thing == thing and e.kind != "blink"):
        rank = _when(scene, event.kind, thing)
        happenings.append(
            {
                "move": rng.choice((f"moves {event.value}", f"goes {event.value}")) + rank,
                "appear": "appears" + rank,
                "vanish": rng.choice(("vanishes", "disappears")) + rank,
                "recolour": f"turns {event.value}",
            }[event.kind]
        )
    blinks = len(scene.events_of(thing, "blink"))
    if blinks:
        happenings.append(f"blinks {NUMBERS[blinks]} {'time' if blinks == 1 else 'times'}")
    return f"{text} {_join(happenings) if happenings else rng.choice(('stays', 'rests'))}"


def _when(scene: Scene, kind: str, thing: int) -> str:
    """' first', ' second' or ' last' where several things do the same, else nothing."""
    order = _order(scene, kind)
    if len(order) < 2:
        return ""
    rank = order.index(thing)
    return " last" if rank == len(order) - 1 else (" first", " second")[rank]


def _order(scene: Scene, kind: str) -> list[int]:
    """The things to which `kind` happens, earliest first."""
    starts = {event.thing: event.start for event in reversed(scene.events) if event.kind == kind}
    return sorted(starts, key=lambda thing: starts[thing])


# --- a scene written out, for a language model that cannot see ------------------------------------------------------


def in_words(scene: Scene, rng: random.Random) -> str:
    """The scene as text: its caption, or its cells."""
    return caption(scene, rng) if rng.random() < 0.2 else cells_in_words(scene)


def cells_in_words(scene: Scene) -> str:
    """What each of the nine cells shows, row by row; of a clip eight frames, each with its number.

    A thing is a phrase such as `top left small red circle`, and `phrases` makes every such phrase one token. So a
    language model that has learned to read these texts reads several properties out of one vector, in the order
    in which an encoder gives its patches.
    """
    if not scene.is_clip:
        return _cells_of_frame(scene, 0)
    frames = (int(i * (scene.frames - 1) / 7) for i in range(8))
    return " ".join(f"{name} {_cells_of_frame(scene, frame)}" for name, frame in zip(_FRAMES, frames, strict=True))


def _cells_of_frame(scene: Scene, frame: int) -> str:
    cells = dict.fromkeys(PLACES, "nothing")
    for index, item in enumerate(scene.things):
        state = scene.state(index, frame)
        if state.visible:
            place = _place_of(state.x, state.y)
            cells[place] = f"{place} {item.size} {state.colour} {item.shape}"
    return " ".join(cells.values())


_FRAMES = tuple(f"frame {number}" for number in ("one", "two", "three", "four", "five", "six", "seven", "eight"))


def phrases() -> list[str]:
    """The phrases of `cells_in_words` that are one token each."""
    things = (f"{p} {size} {colour} {shape}" for p in PLACES for size in SIZES for colour, shape in KNOWN_PAIRS)
    return [*_FRAMES, *things]


# --- questions ------------------------------------------------------------------------------------------------------


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All questions the scene can answer without ambiguity, in random order; every wording has a balanced answer."""
    found = list(_still_questions(scene, rng))
    if scene.is_clip:
        found += list(_clip_questions(scene, rng))
    rng.shuffle(found)
    return found


def _still_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.things
    medium = "video" if scene.is_clip else "image"
    shapes, colours = [t.shape for t in things], [t.colour for t in things]
    changing = {event.thing for event in scene.events if event.kind == "recolour"}
    for index, thing in enumerate(things):
        if shapes.count(thing.shape) == 1 and index not in changing:
            text = rng.choice((f"What colour is the {thing.shape}?", f"Which colour does the {thing.shape} have?",
                               f"The {thing.shape} has which colour?"))  # fmt: skip
            yield Question("colour", text, thing.colour, COLOURS)
        if changing:
            continue  # "the red thing" would be ambiguous in time
        if colours.count(thing.colour) == 1:
            text = rng.choice((f"What shape is the {thing.colour} object?", f"Which shape is {thing.colour}?",
                               f"The {thing.colour} object has which shape?"))  # fmt: skip
            yield Question("shape", text, thing.shape, SHAPES)
        text = rng.choice((f"Is the {thing.name} small or large?", f"What size is the {thing.name}?"))
        yield Question("size", text, thing.size, SIZES)
        if not scene.events_of(index, "move"):
            text = rng.choice((f"Where is the {thing.name}?", f"In which place is the {thing.name}?"))
            yield Question("position", text, _start_place(scene, index), PLACES)
    text = rng.choice(("How many objects are there?", f"How many objects does the {medium} show?",
                       "What is the number of objects?"))  # fmt: skip
    highest = 3 if scene.is_clip else MAX_THINGS
    yield Question("count", text, NUMBERS[len(things)], NUMBERS[1 : highest + 1])
    if not any(event.kind == "move" for event in scene.events) and not changing:
        yield from _relations(scene, rng)
    if not changing:
        probe = rng.choice(("random", "popular", "adversarial"))
        yield existence(scene, rng, probe, present=rng.random() < 0.5)


def _relations(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.things
    for first in things:
        for second in things:
            if first is second:
                continue
            if first.column != second.column:
                side = "left" if first.column < second.column else "right"
                text = rng.choice(
                    (
                        f"Is the {first.name} left or right of the {second.name}?",
                        f"On which side of the {second.name} is the {first.name}, left or right?",
                    )
                )
                yield Question("relation", text, side, ("left", "right"))
            if first.row != second.row:
                side = "above" if first.row < second.row else "below"
                text = f"Is the {first.name} above or below the {second.name}?"
                yield Question("relation", text, side, ("above", "below"))


def existence(scene: Scene, rng: random.Random, probe: str, present: bool) -> Question:
    """A yes/no question; where the answer is no, `probe` says how the absent thing is chosen (POPE's settings).

    random: any absent pair; popular: an absent pair that is frequent in the data; adversarial: an absent
    pair whose colour and shape are both in the scene where there is one, else one that shares the colour.
    """
    here = [thing.pair for thing in scene.things]
    if present:
        colour, shape = rng.choice(here)
    else:
        colours, shapes = {c for c, _ in here}, {s for _, s in here}
        pools = {
            "random": [[p for p in KNOWN_PAIRS if p not in here]],
            "popular": [[p for p in POPULAR_PAIRS if p not in here]],
            "adversarial": [
                [p for p in KNOWN_PAIRS if p not in here and p[0] in colours and p[1] in shapes],
                [p for p in KNOWN_PAIRS if p not in here and p[0] in colours],
                [p for p in KNOWN_PAIRS if p not in here],
            ],
        }[probe]
        colour, shape = rng.choice(next(pool for pool in pools if pool))
    text = rng.choice((f"Is there a {colour} {shape}?", f"Can you see a {colour} {shape}?",
                       f"Does the {'video' if scene.is_clip else 'image'} show a {colour} {shape}?"))  # fmt: skip
    return Question(f"exist_{probe}", text, "yes" if present else "no", ("yes", "no"))


def _clip_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for kind, verb in (("move", "moves"), ("appear", "appears"), ("vanish", "vanishes")):
        order = _order(scene, kind)
        if kind == "move":
            for thing in order:
                name = scene.things[thing].name
                text = rng.choice((f"In which direction does the {name} move?", f"Which way does the {name} go?",
                                   f"Where does the {name} move to, left, right, up or down?"))  # fmt: skip
                yield Question("direction", text, scene.events_of(thing, "move")[0].value, tuple(DIRECTIONS))
            if len(order) == 1 and len(scene.things) > 1:
                text = rng.choice(("What colour is the object that moves?", "Which colour has the moving object?"))
                yield Question("mover", text, scene.things[order[0]].colour, COLOURS)
        if len(order) < 2:
            continue
        for end in ("first", "last"):
            answer = scene.things[order[0 if end == "first" else -1]].name
            other = scene.things[rng.choice(order[1:] if end == "first" else order[:-1])].name
            pair = rng.sample((answer, other), 2)
            text = rng.choice((f"Which object {verb} {end}, the {pair[0]} or the {pair[1]}?",
                               f"What {verb} {end}, the {pair[0]} or the {pair[1]}?"))  # fmt: skip
            yield Question("order", text, answer, tuple(sorted(pair)))
    for event in scene.events:
        if event.kind == "recolour":
            item = scene.things[event.thing]
            if [t.shape for t in scene.things].count(item.shape) == 1:
                text = rng.choice(
                    (
                        f"What colour does the {item.shape} become?",
                        f"Which colour does the {item.shape} have in the end?",
                    )
                )
                yield Question("change", text, event.value, COLOURS)
                text = rng.choice(
                    (
                        f"What colour is the {item.shape} at first?",
                        f"Which colour does the {item.shape} have at the start?",
                    )
                )
                yield Question("change", text, item.colour, COLOURS)
    blinkers = {event.thing for event in scene.events if event.kind == "blink"}
    for index in blinkers:
        name = scene.things[index].name
        text = rng.choice((f"How many times does the {name} blink?", f"How often does the {name} blink?"))
        yield Question("events", text, NUMBERS[len(scene.events_of(index, "blink"))], NUMBERS[1:4])


# --- conversations --------------------------------------------------------------------------------------------------

_DESCRIBE = {
    "image": ("Describe the image.", "What does the image show?", "Give a short description of the image.",
              "Write a caption for this image.", "Tell me what is in the picture."),
    "video": ("Describe the video.", "What happens in the video?", "Give a short description of the video.",
              "Write a caption for this clip.", "Tell me what happens in the clip."),
}  # fmt: skip


def caption_conversation(scene: Scene, rng: random.Random, seen: str) -> list[dict]:
    """One round: an instruction that contains `seen` (a placeholder, or the scene in words) and the caption."""
    instruction = rng.choice(_DESCRIBE["video" if scene.is_clip else "image"])
    return _conversation(seen, [(instruction, caption(scene, rng))], rng)


def question_conversation(
    scene: Scene, rng: random.Random, seen: str, rounds: int, time_first: bool = False
) -> list[dict]:
    """Up to `rounds` question rounds about one scene, sometimes with a description among them.

    Each type is asked once before a second question of a type; with `time_first`, all questions that need time come
    before the others.
    """
    turns = [(q.text, q.answer) for q in _varied(questions(scene, rng), rounds, time_first)]
    if rng.random() < 0.2:
        instruction = rng.choice(_DESCRIBE["video" if scene.is_clip else "image"])
        turns.insert(rng.randint(0, len(turns)), (instruction, caption(scene, rng)))
    return _conversation(seen, turns, rng)


def _varied(found: list[Question], rounds: int, time_first: bool) -> list[Question]:
    pool = sorted(found, key=lambda q: q.type not in TEMPORAL_TYPES)
    chosen = [question for question in pool if question.type in TEMPORAL_TYPES][:rounds] if time_first else []
    pool = [question for question in pool if question not in chosen]
    while pool and len(chosen) < rounds:
        seen = [q.type for q in chosen]
        pick = min(pool, key=lambda q: seen.count(q.type))
        pool.remove(pick)
        chosen.append(pick)
    return chosen


def _conversation(seen: str, turns: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    messages = []
    for index, (question, answer) in enumerate(turns):
        if index == 0:
            question = f"{seen}\n{question}" if rng.random() < 0.8 else f"{question}\n{seen}"
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return messages
