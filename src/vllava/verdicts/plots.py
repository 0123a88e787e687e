"""Plots of a study, as SVG. Each is as wide as a telephone, so that pages can put them side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from vllava.verdicts.curves import HELD_OUT, Curve
from vllava.verdicts.figures import Figure
from vllava.verdicts.findings import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Findings, Verdict

COLOURS = ("#1f4e9c", "#c2571a", "#7d5ba6", "#2e8b57", "#8a6d1b", "#b03060", "#3a8fa8", "#555555")
RULINGS = {REPRODUCED: "#1a6b31", NOT_REPRODUCED: "#b42318", UNDECIDED: "#6b7688"}
WIDE = 20  # points of gain, from which the scale is logarithmic beyond LINEAR points
LINEAR = 2
TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)
ROOM = 0.2  # of an axis, for the label of a level
FAR = 15  # times the least, from which levels stand on a logarithmic scale
WIDTH = 4.8  # inches of 72 pixels
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vllava",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid.axis": "y",
}


@dataclass(frozen=True)
class Plot:
    """A picture, and what it shows, for those who cannot see it."""

    title: str
    svg: bytes

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


def colours(arms: Sequence[str]) -> dict[str, str]:
    return {arm: COLOURS[number % len(COLOURS)] for number, arm in enumerate(arms)}


def forest(verdicts: Sequence[Verdict]) -> Plot:
    """The gain of every claim with its interval, in the colour of its verdict."""
    known = [one for one in verdicts if one.gain is not None][::-1]
    canvas, axes = _axes(0.9 + 0.55 * len(known))
    for place, one in enumerate(known):
        assert one.gain is not None
        colour = RULINGS[one.ruling]
        axes.plot([100 * one.gain.low, 100 * one.gain.high], [place, place], color=colour, linewidth=2.5)
        axes.plot([100 * gain for gain in one.by_seed.values()], [place - 0.2] * len(one.by_seed), "|", color=colour)
        axes.plot([100 * one.gain.value], [place], "o", color=colour, markersize=6)
    axes.axvline(0, color="#1c2430", linewidth=0.8)
    axes.set_yticks(range(len(known)), [f"{one.claim.name.replace('_', ' ')}\nvs {one.claim.worse}" for one in known])
    axes.set_xlabel("points gained; | one seed" + _spread_out(axes))
    axes.set_ylim(-0.6, len(known) - 0.4)
    return _drawn(canvas, "Gain of every claim with its 95 % interval")


def _spread_out(axes: Axes) -> str:
    """Where a gain of a few points would vanish beside the largest, a scale on which both can be read; its name."""
    low, high = axes.get_xlim()
    if max(high, -low) <= WIDE:
        return ""
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.6)
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    return f"\nlogarithmic beyond {LINEAR}"


def bars(found: Findings, level: str, figure: str, title: str) -> Plot:
    """The accuracy of every arm with its interval and its seeds, beside blind and chance."""
    own = [one for arm in found.study.arms if (one := found.figure(arm, level, figure)) is not None][::-1]
    colour = colours(found.study.arms)
    canvas, axes = _axes(1.05 + 0.42 * len(own))
    for place, one in enumerate(own):
        _bar(axes, place, one, colour[one.arm])
    axes.set_yticks(range(len(own)), [one.arm for one in own])
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent right; thin: one more seed\no seeds, dashes blind, dots chance")
    return _drawn(canvas, f"Accuracy, {title}")


def _bar(axes: Axes, place: int, one: Figure, colour: str) -> None:
    axes.barh([place], [100 * one.spread.mean], height=0.6, color=colour, alpha=0.35)
    if one.spread.seeds > 1:
        further = np.clip([100 * one.spread.next_low, 100 * one.spread.next_high], 0, 100)
        axes.plot(further, [place, place], color=colour, linewidth=1)
        axes.plot([100 * one.spread.low, 100 * one.spread.high], [place, place], color=colour, linewidth=3)
    axes.plot([100 * value for value in one.by_seed.values()], [place] * len(one.by_seed), "o", color=colour,
              markersize=3.5, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
    for value, style, tint in ((one.blind, "--", "#a3461b"), (one.chance, ":", "#1c2430")):
        if value is not None:
            axes.plot([100 * value, 100 * value], [place - 0.36, place + 0.36], style, color=tint, linewidth=1.6)


def learning(curves: Sequence[Curve], arms: Sequence[str]) -> list[Plot]:
    """For each stage and metric, all arms over one another: means of seeds, within the lowest and the highest."""
    colour, plots = colours(arms), []
    for part, metric in dict.fromkeys((one.part, one.metric) for one in curves):
        canvas, axes = _axes(3.0)
        own = [one for one in curves if (one.part, one.metric) == (part, metric)]
        for one in own:
            mark = "o-" if len(one.x) < 15 else "-"
            axes.fill_between(one.x, one.low, one.high, color=colour[one.arm], alpha=0.15, linewidth=0)
            axes.plot(one.x, one.mean, mark, markersize=3, color=colour[one.arm], linewidth=1.4, label=one.arm)
        whole = np.concatenate([one.high[len(one.high) // 20 :] for one in own])  # the first steps lie far above
        least = min(float(np.nanmin(one.low)) for one in own)
        axes.set_ylim(max(0.0, least - 0.05 * (np.nanmax(whole) - least)), float(np.nanmax(whole)))
        axes.set_xlabel("samples seen")
        axes.set_ylabel("nats per supervised token" if "loss" in metric else "share right")
        axes.legend(frameon=False, fontsize=9.5)
        name, _, of = metric.partition("/")
        what = HELD_OUT.get(name, name) + (f", {of}" if of else "")
        plots.append(_drawn(canvas, f"{part}: {what}"))
    return plots


def gains_over_levels(found: Findings) -> list[Plot]:
    """For each claim its gain over what the levels differ in, with intervals."""
    places = _places(found)
    plots = []
    for claim in found.study.claims:
        own = [one for one in found.verdicts if one.claim == claim and one.level in places and one.gain is not None]
        own.sort(key=lambda one: places[one.level])
        if not own:
            continue
        canvas, axes = _axes(3.0)
        x = [places[one.level] for one in own]
        gains = [one.gain for one in own if one.gain is not None]
        axes.fill_between(x, [100 * g.low for g in gains], [100 * g.high for g in gains], color="#1f4e9c", alpha=0.15)
        axes.plot(x, [100 * g.value for g in gains], color="#1f4e9c", linewidth=1.2)
        for one, place, gain in zip(own, x, gains, strict=True):
            colour = RULINGS[one.ruling]
            axes.plot([place, place], [100 * gain.low, 100 * gain.high], color=colour, linewidth=2)
            axes.plot([place], [100 * gain.value], "o", color=colour, markersize=6)
        axes.axhline(0, color="#1c2430", linewidth=0.8)
        _level_axis(axes, found)
        axes.set_ylabel("points gained")
        plots.append(_drawn(canvas, f"{claim.says} (vs {claim.worse})"))
    return plots


def accuracy_over_levels(found: Findings, figure: str, title: str) -> Plot:
    """The accuracy of every arm over what the levels differ in, with intervals over seeds."""
    places, colour = _places(found), colours(found.study.arms)
    canvas, axes = _axes(3.0)
    for arm in found.study.arms:
        figures = {x: own for level, x in places.items() if (own := found.figure(arm, level, figure)) is not None}
        if not figures:
            continue
        at = {x: figures[x].spread for x in sorted(figures)}
        axes.plot([*at], [100 * one.mean for one in at.values()], "o-", color=colour[arm], markersize=4, linewidth=1.4,
                  label=arm)  # fmt: skip
        for x, one in at.items():
            if one.seeds > 1:
                axes.plot([x, x], [100 * one.low, 100 * one.high], color=colour[arm], linewidth=1.6, alpha=0.6)
    _level_axis(axes, found)
    axes.set_ylabel("percent right")
    axes.legend(frameon=False, fontsize=8)
    return _drawn(canvas, f"Accuracy, {title}")


def _places(found: Findings) -> dict[str, float]:
    """Where each level stands, of those that stand anywhere."""
    return {level: x for level, x in found.study.levels.items() if x is not None}


def _level_axis(axes: Axes, found: Findings) -> None:
    """Levels by name, and by number where that is another; far apart on a logarithmic scale."""
    places = _places(found)
    least, most = min(places.values()), max(places.values())
    if least > 0 and most / least >= FAR:
        axes.set_xscale("log")
    axes.set_xticks([], minor=True)
    at = sorted((x, found.study.label(level).replace(" (", "\n(")) for level, x in places.items())
    scaled = axes.transScale.transform([(x, 0) for x, _ in at])[:, 0]
    shares = (scaled - scaled[0]) / (np.ptp(scaled) or 1)
    axes.set_xticks([x for x, _ in at], staggered([label for _, label in at], shares.tolist()))
    axes.set_xlabel(found.study.axis or "level")


def staggered(labels: Sequence[str], shares: Sequence[float]) -> list[str]:
    """Labels of an axis from left to right, at shares of its length: one that would run into another is a row lower."""
    lines = 1 + max(label.count("\n") for label in labels)
    last: list[float] = []  # of each row
    rows = []
    for share in shares:
        free = (row for row, taken in enumerate(last) if share - taken >= ROOM)
        row = next(free, len(last))
        last[row : row + 1] = [share]
        rows.append(row)
    return ["\n" * lines * row + label for row, label in zip(rows, labels, strict=True)]


def _axes(height: float) -> tuple[Canvas, Axes]:
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes = canvas.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _drawn(canvas: Canvas, title: str) -> Plot:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(title, buffer.getvalue())
