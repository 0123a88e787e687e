"""Plots for the page, as inline SVG."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 150, 44, 22, 14
COLOURS = {"image": "#3f76b5", "video": "#d8812a", "mixed": "#7d5ba6", "text": "#6f8f4e"}


def token_histogram(edges: np.ndarray, counts: dict[str, np.ndarray], limit: int) -> Markup:
    """Samples by their number of tokens, stacked by modality; a line where `limit` is. Logarithmic in tokens."""
    total = np.sum(list(counts.values()), axis=0) if counts else np.zeros(len(edges) - 1)
    used = np.flatnonzero(total)
    below = int(np.searchsorted(edges, limit)) - 1  # the bin of the limit
    first = max(min([below, *used]) - 1, 0)
    places = np.log2(np.maximum(edges, edges[1] / 2))
    low, high = places[first], places[-1]
    most = max(int(total.max(initial=0)), 1)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="samples by number of tokens">']
    parts += [_text(LEFT - 5, y(value) + 4, f"{value:,}", "end") for value in (0, most)]
    floor = np.zeros(len(total))
    for kind, count in counts.items():
        for n in np.flatnonzero(count):
            left, right = x(places[n]), x(places[n + 1])
            name = f"{count[n]:,} {kind}, {int(np.ceil(edges[n])):,} to {int(np.ceil(edges[n + 1])) - 1:,} tokens"
            parts.append(
                f'<rect x="{left + 0.5:.1f}" y="{y(floor[n] + count[n]):.1f}" width="{max(right - left - 1, 1):.1f}" '
                f'height="{max(y(floor[n]) - y(floor[n] + count[n]), 0.8):.1f}" fill="{COLOURS[kind]}">'
                f"<title>{name}</title></rect>"
            )
        floor = floor + count
    ground = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{ground}" y2="{ground}" stroke="#8894a8"/>')
    for power in range(int(np.ceil(low)), int(high) + 1):
        parts.append(_text(x(power), HEIGHT - 7, f"{2**power:,}", "middle"))
    line = x(np.log2(limit))
    parts.append(
        f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{TOP - 2}" y2="{ground}" stroke="#b42318" stroke-dasharray="4 3"/>'
    )
    parts.append(_text(line - 4, TOP + 6, f"data.max_length {limit:,}", "end", "#b42318"))
    return Markup("".join(parts) + "</svg>")


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#5b667a") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{colour}">{text}</text>'
