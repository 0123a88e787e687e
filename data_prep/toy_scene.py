"""Scenes of the toy world: which things there are, where, and what happens to them. No pixels, no words.

A scene is a value: the renderer, the captions and the questions all read the same one, so an answer is
true by construction. Pictures have one frame; clips have `CLIP_FRAMES`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

IMAGE_SIZE = 64  # pixels, square
CLIP_FRAMES = 16  # frames of a clip, at CLIP_FPS
CLIP_FPS = 8

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
RADIUS = {"small": 6.2, "large": 9.8}  # pixels
CELL = IMAGE_SIZE / 3  # pixels between the centres of neighbouring cells of the 3 x 3 grid
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MAX_THINGS = 4

# Colour-shape pairs that no training split contains, neither of the foundations nor of the stages.
# Each of their colours and shapes is seen in training, in other pairs.
NOVEL_PAIRS = frozenset(
    {("red", "triangle"), ("blue", "ring"), ("yellow", "cross"), ("green", "circle"), ("purple", "square")}
)
KNOWN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in NOVEL_PAIRS)
# Some pairs are drawn three times as often, so that "popular" means something in the existence probes.
POPULAR_PAIRS = (("red", "circle"), ("blue", "square"), ("green", "triangle"), ("white", "ring"), ("orange", "cross"))
_PAIR_WEIGHTS = tuple(3.0 if pair in POPULAR_PAIRS else 1.0 for pair in KNOWN_PAIRS)


@dataclass(frozen=True)
class Thing:
    """An object: what it looks like and where it is when the scene starts (cell of the 3 x 3 grid plus a jitter)."""

    colour: str
    shape: str
    size: str
    column: int
    row: int
    jitter: tuple[float, float] = (0.0, 0.0)  # of a cell

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """Something that happens to one thing between two frames.

    `kind` is move (`value` = direction, one cell), appear, vanish, recolour (`value` = new colour) or
    blink (invisible from `start` up to, not including, `end`).
    """

    kind: str
    thing: int
    start: int
    end: int
    value: str = ""


@dataclass(frozen=True)
class State:
    """A thing at one frame: whether it is visible, its colour and its centre in pixels."""

    visible: bool
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Things, what happens to them, and the seed of the background."""

    things: tuple[Thing, ...]
    background: int
    frames: int = 1
    events: tuple[Event, ...] = field(default=())

    @property
    def is_clip(self) -> bool:
        return self.frames > 1

    def events_of(self, thing: int, kind: str) -> list[Event]:
        return [event for event in self.events if event.thing == thing and event.kind == kind]

    def state(self, thing: int, frame: int) -> State:
        """The state of a thing at a frame."""
        item = self.things[thing]
        visible, colour = True, item.colour
        x = IMAGE_SIZE / 2 + (item.column - 1 + item.jitter[0]) * CELL
        y = IMAGE_SIZE / 2 + (item.row - 1 + item.jitter[1]) * CELL
        for event in self.events:
            if event.thing != thing:
                continue
            if event.kind == "move":
                done = min(max((frame - event.start) / (event.end - event.start), 0.0), 1.0)
                dx, dy = DIRECTIONS[event.value]
                x, y = x + dx * CELL * done, y + dy * CELL * done
            elif event.kind == "appear":
                visible = visible and frame >= event.start
            elif event.kind == "vanish":
                visible = visible and frame < event.start
            elif event.kind == "recolour":
                colour = event.value if frame >= event.start else colour
            elif event.kind == "blink":
                visible = visible and not event.start <= frame < event.end
        return State(visible, colour, x, y)


def _draw_pairs(rng: random.Random, count: int, novel: bool, even: bool) -> list[tuple[str, str]]:
    """`count` different colour-shape pairs; with `novel`, the first of them is one that training never shows.

    With `even`, no pair is drawn more often than another.
    """
    pairs = [rng.choice(sorted(NOVEL_PAIRS))] if novel else []
    while len(pairs) < count:
        pair = rng.choices(KNOWN_PAIRS, None if even else _PAIR_WEIGHTS)[0]
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def _place(rng: random.Random, pairs: list[tuple[str, str]], cells: list[tuple[int, int]]) -> tuple[Thing, ...]:
    return tuple(
        Thing(colour, shape, rng.choice(SIZES), column, row, (rng.uniform(-1 / 8, 1 / 8), rng.uniform(-1 / 8, 1 / 8)))
        for (colour, shape), (column, row) in zip(pairs, cells, strict=True)
    )


_GRID = [(column, row) for row in range(3) for column in range(3)]


def draw_picture(rng: random.Random, novel: bool = False, even: bool = False, most: int = MAX_THINGS) -> Scene:
    """A still scene of one to `most` things in different cells."""
    pairs = _draw_pairs(rng, rng.randint(1, most), novel, even)
    things = list(_place(rng, pairs, rng.sample(_GRID, len(pairs))))
    rng.shuffle(things)
    return Scene(tuple(things), rng.getrandbits(32))


def draw_clip(rng: random.Random, novel: bool = False, even: bool = False) -> Scene:
    """A clip of one to three things and one story: move, two moves, appear, vanish, recolour or blink."""
    story = rng.choice(("move", "move", "moves", "appear", "vanish", "recolour", "blink"))
    count = rng.randint(2, 3) if story in ("moves", "appear", "vanish") else rng.randint(1, 3)
    pairs = _draw_pairs(rng, count, novel, even)
    rng.shuffle(pairs)
    cells, moves = _plan_cells(rng, count, movers={"move": 1, "moves": 2}.get(story, 0))
    things = _place(rng, pairs, cells)
    return Scene(things, rng.getrandbits(32), CLIP_FRAMES, tuple(_draw_events(rng, story, things, moves)))


def _plan_cells(rng: random.Random, count: int, movers: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Start cells of `count` things, and a direction for each of the first `movers`; no two paths share a cell."""
    while True:
        cells = rng.sample(_GRID, count)
        taken = set(cells)
        directions: list[str] = []
        for column, row in cells[:movers]:
            direction = rng.choice(tuple(DIRECTIONS))
            dx, dy = DIRECTIONS[direction]
            target = (column + dx, row + dy)
            if target not in _GRID or target in taken:
                break
            taken.add(target)
            directions.append(direction)
        if len(directions) == movers:
            return cells, directions


def _draw_events(rng: random.Random, story: str, things: tuple[Thing, ...], moves: list[str]) -> list[Event]:
    count = len(things)
    if story == "move":
        return [Event("move", 0, rng.randint(0, 3), rng.randint(11, 15), moves[0])]
    if story == "moves":  # thing 0 and thing 1 move one after the other, in either order
        spans = [(rng.randint(0, 1), 7), (8, rng.randint(14, 15))]
        rng.shuffle(spans)
        return [Event("move", thing, *spans[thing], moves[thing]) for thing in range(2)]
    if story in ("appear", "vanish"):
        times = [3, 7, 12] if count == 3 else [rng.randint(3, 4), rng.randint(9, 11)]
        rng.shuffle(times)
        return [Event(story, thing, time, time) for thing, time in enumerate(times)]
    if story == "recolour":
        taken = {thing.pair for thing in things}
        thing = things[0]
        new = [c for c in COLOURS if (c, thing.shape) not in NOVEL_PAIRS and (c, thing.shape) not in taken]
        return [Event("recolour", 0, time := rng.randint(6, 9), time, rng.choice(new))]
    starts = sorted(rng.sample([2, 6, 10], rng.randint(1, 3)))
    return [Event("blink", 0, start, start + 2) for start in starts]
