"""A run's report: one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from vllava.batch import MEDIA_KINDS
from vllava.data.samples import Sample
from vllava.evaluation.answers import Answer, data_uri, pictures
from vllava.evaluation.statistics import share_interval

KINDS = (*MEDIA_KINDS, "text")
MATCH = (
    "An answer is right where it is the last one of the conversation word for word, but for case, spaces and a final "
    "full stop."
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
 h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
 table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; }
 td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #8894a8; font-weight: 600; }
 tr.head td { font-weight: 600; padding-top: .7rem; } tr.part td:first-child { padding-left: 1.2rem; }
 .sample { border-top: 1px solid #dde3ec; padding: .8rem 0; } .sample img { height: 72px; image-rendering: pixelated; margin: 0 3px 4px 0; }
 .right { color: #1a7f37; } .wrong { color: #b42318; } .key { color: #6b7688; font-size: .8rem; }
 figure { margin: 0 0 1rem; } figure img { max-width: 100%; } .wide { overflow-x: auto; } .interval { color: #566274; font-size: .8rem; white-space: nowrap; }
 .figure { display: grid; grid-template-columns: 5rem 11rem minmax(8rem, 1fr); gap: 0 1rem; align-items: center; margin: .6rem 0; } .figure .name { font-weight: 600; } .figure .marks { grid-column: 3; font-size: .85rem; }
 @media (max-width: 40rem) { .figure { grid-template-columns: 4rem 1fr; } .figure .bar, .figure .marks { grid-column: 1 / 3; } }
 .bar { position: relative; height: 14px; background: #e6eaf0; min-width: 8rem; } .bar div { position: absolute; top: 0; bottom: 0; } .bar .value { left: 0; background: #8fb3da; }
 .bar .between { top: 6px; bottom: 6px; background: #14375e; } .bar .end { width: 2px; margin-left: -1px; top: 3px; bottom: 3px; background: #14375e; }
 .bar .mark { width: 0; margin-left: -1px; top: -3px; bottom: -3px; border-left: 2px solid; } .blind { color: #a3461b; } .bar .blind { border-left-style: dashed; } .chance { color: #4d5866; } .bar .chance { border-left-style: dotted; border-left-width: 3px; }
</style></head><body>
<h1>{{ title }}</h1>
{% macro bar(row) %}{% if row.bar %}<div class="bar" role="img" aria-label="{{ row.name }}: {{ "%.3f"|format(row.accuracy) }}{% for name, place in row.bar.marks.items() %}, {{ name }} {{ "%.3f"|format(place) }}{% endfor %}"><div class="value" style="width: {{ row.accuracy|percent }}%"></div>
<div class="between" style="left: {{ row.bar.low|percent }}%; width: {{ (row.bar.high - row.bar.low)|percent }}%"></div><div class="end" style="left: {{ row.bar.low|percent }}%"></div><div class="end" style="left: {{ row.bar.high|percent }}%"></div>
{% for name, place in row.bar.marks.items() %}<div class="mark {{ name }}" style="left: {{ place|percent }}%"></div>{% endfor %}</div>{% endif %}{% endmacro %}
{% macro interval(row) %}{% if row.bar %}<span class="interval">{{ "%.3f"|format(row.bar.low) }} to {{ "%.3f"|format(row.bar.high) }}</span>{% endif %}{% endmacro %}
{% if figures %}<h2>Figures</h2>
{% for row in figures if row.style == "head" and row.bar %}<div class="figure"><div class="name">{{ row.name }}</div><div>{{ "%.3f"|format(row.accuracy) }} {{ interval(row) }}</div>{{ bar(row) }}
<div class="marks">{% for name, place in row.bar.marks.items() %}<span class="{{ name }}">{{ name }} {{ "%.3f"|format(place) }}</span>{{ " · " if not loop.last }}{% endfor %}</div></div>
{% endfor %}<div class="wide"><table><tr><th></th><th>accuracy</th><th>blind</th><th>chance</th><th>n</th><th>95 %</th><th></th></tr>
{% for row in figures %}<tr class="{{ row.style }}"><td>{{ row.name }}</td>{% for value in (row.accuracy, row.blind, row.chance) %}<td>{{ "-" if value is none else "%.3f"|format(value) }}</td>{% endfor %}
<td>{{ row.n }}</td><td>{{ interval(row) }}</td><td>{{ bar(row) }}</td></tr>
{% endfor %}</table></div>
<p>blind: the same model asked the same questions without the image or video. chance: a guess among the answers that fit, where a question says which do. Behind a figure and on its bar: its 95 % interval, for other questions of the kind; another seed is not in it. {{ match }}</p>{% endif %}
{% if facts %}<h2>Run</h2><table>{% for name, value in facts.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>{% endif %}
{% if plots %}<h2>Loss</h2>{% for name, uri in plots.items() %}<figure><figcaption>{{ name }}</figcaption><img alt="loss of {{ name }}" src="{{ uri }}"></figure>{% endfor %}{% endif %}
{% if rows %}<h2>Held-out samples</h2>
{% for row in rows %}<div class="sample"><div>{% for uri in row.pictures %}<img alt="frame {{ loop.index }}" src="{{ uri }}">{% endfor %}</div>
<div>{{ row.question }}</div>
<div class="{{ 'key' if row.truth is none else 'right' if row.correct else 'wrong' }}">{{ row.answer or "(no answer)" }}{% if row.truth is none %} — not scored{% elif not row.correct %} — truth: {{ row.truth }}{% endif %}</div>
<div class="key">{{ row.key }} · {{ row.type }}</div></div>
{% endfor %}{% endif %}
</body></html>
"""


def sample_rows(samples: Sequence[Sample], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """What the report shows of each sample: its pictures as data URIs, question, answer and truth."""
    return [
        {
            "key": answer.key,
            "type": f"{answer.medium}, {answer.type}",
            "question": answer.question,
            "answer": answer.answer,
            "truth": answer.truth,
            "correct": answer.correct if answer.scored else None,
            "pictures": [data_uri(picture) for picture in pictures(sample)],
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]


def write_report(
    folder: Path,
    title: str,
    metrics: dict,
    rows: list[dict[str, Any]],
    plots: dict[str, Path] | None = None,
    facts: dict | None = None,
) -> None:
    """Write `report.html`: evaluation figures, facts of the run, loss curves (name -> PNG file) and sample answers."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["percent"] = lambda share: round(100 * share, 2)
    uris = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for name, path in (plots or {}).items()
        if path.is_file()
    }
    page = environment.from_string(_PAGE).render(
        title=title, figures=list(_figures(metrics)), rows=rows, plots=uris, facts=facts or {}, match=MATCH
    )
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _figures(metrics: dict) -> Iterator[dict[str, Any]]:
    """A row for each medium, then its sources and its types of questions."""
    for medium in KINDS:
        if medium in metrics:
            yield _figure(medium, "head", metrics[medium])
            for name, part in metrics[medium]["by_source"].items():
                yield _figure(name, "part", part)
            for kind, row in metrics["by_type"].items():
                if kind.startswith(f"{medium}/"):
                    yield _figure(kind.split("/", 1)[1], "part", row)


def _figure(name: str, style: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row, with its interval and what it is compared with for a bar; without a bar where there is no accuracy."""
    bar = None
    if row["accuracy"] is not None:
        low, high = share_interval(row["accuracy"], row["n"])
        bar = {"low": low, "high": high, "marks": {k: row[k] for k in ("blind", "chance") if row[k] is not None}}
    return {"name": name, "style": style, "bar": bar, **row}
