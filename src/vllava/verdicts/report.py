"""A study's report: one page, a Markdown text and JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from vllava.evaluation.layout import Table, as_markdown
from vllava.verdicts.answers import FIGURES
from vllava.verdicts.curves import Curve, curves_of
from vllava.verdicts.findings import Findings, Verdict, find
from vllava.verdicts.plots import Plot, accuracy_over_levels, bars, forest, gains_over_levels, learning
from vllava.verdicts.study_file import FINISHED, read_study
from vllava.verdicts.tables import TITLES, tables_of

HOW = (
    "An accuracy is the share of questions answered right, in percent. Over seeds: the mean of the finished ones, with "
    "Student's 95 % interval of that mean, and the wider one in which one more seed is expected.",
    "A difference is taken question by question and seed by seed, the same seeds of both on the same questions, "
    "by a linear mixed model in which seeds and questions are crossed random effects, fitted from its mean "
    "squares (which is what REML gives for a layout without gaps) and tested by Student's t with Satterthwaite's "
    "degrees of freedom. So the interval speaks for other seeds and for other questions of the same kind. A bootstrap "
    "over both was not taken: three to five seeds are too few to draw from. In simulation its 95 % intervals held the "
    "truth in 80 to 99 % of studies, depending on how much seeds differ, those of the model in 93 to 99 %.",
    "With one seed the test is McNemar's, over questions alone: it cannot tell a better system from a lucky seed, so "
    "there is no verdict. p is corrected by Holm's method for all tests of a level, also those that could not be made. "
    "Cohen's h: 0.2 is a small effect, 0.5 a medium, 0.8 a large one. Errors mended: the share of the other system's "
    "errors that the better one does not make.",
    "Runs that failed or are not finished are named above and count in nothing.",
)


@dataclass(frozen=True)
class Report:
    """What a study found, and its learning curves."""

    found: Findings
    curves: list[Curve]

    @property
    def by_level(self) -> bool:
        return len(self.found.study.levels) > 1


def report_on(path: str | Path) -> Report:
    """Read a study's folder, or its study.json; raises UserError where it cannot be read or no run has finished."""
    found = find(read_study(path))
    levels = found.study.levels
    curves, lost = curves_of(found.study, next(iter(levels))) if len(levels) == 1 else ([], [])
    found.remarks.extend(lost)
    return Report(found, curves)


def counted(found: Findings) -> str:
    """How many runs there are, and how many of them finished."""
    runs = found.study.runs
    done = sum(run.state == FINISHED for run in runs)
    seeds = ", ".join(map(str, found.study.seeds))
    what = f"{len(found.study.arms)} systems, seeds {seeds}"
    levels = f", {len(found.study.levels)} levels" if len(found.study.levels) > 1 else ""
    return f"{what}{levels}: {done} of {len(runs)} runs finished."


def in_brief(report: Report) -> str:
    """For a terminal: what is missing, and a line for each verdict."""
    found = report.found
    lines = [f"{title_of(found)}: {counted(found)}", *found.missing]
    for one in found.verdicts:
        level = f", {one.level}" if report.by_level else ""
        lines.append(f"{one.claim.says} (against {one.claim.worse}{level}): {one.ruling}. {one.why}")
    return "\n".join([*lines, *found.remarks])


def as_html(report: Report) -> str:
    """A page that needs no other file."""
    found = report.found
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(p=_p, breaks=_breaks)
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title_of(found),
        counted=counted(found),
        found=found,
        by_level=report.by_level,
        main=plots_of(report),
        learning=learning(report.curves, found.study.arms),
        tables=[(table, table.notes) for table in tables_of(found)],
        how=HOW,
        pictures=_pictures,
    )


def plots_of(report: Report) -> list[Plot]:
    """The pictures of the figures: over levels where there are several, else the claims, then every figure."""
    found = report.found
    figures = [figure for figure in FIGURES if any(one.figure == figure for one in found.figures)]
    if report.by_level:
        if all(x is None for x in found.study.levels.values()):
            return []
        return gains_over_levels(found) + [accuracy_over_levels(found, one, TITLES[one]) for one in figures]
    level = next(iter(found.study.levels))
    drawn = [forest(found.verdicts)] if any(one.gain is not None for one in found.verdicts) else []
    return drawn + [bars(found, level, figure, TITLES[figure]) for figure in figures]


def pictures_of(report: Report) -> dict[str, Plot]:
    """All plots by the name of a file for each."""
    drawn = [*plots_of(report), *learning(report.curves, report.found.study.arms)]
    return {
        f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', one.title.lower()).strip('-')}.svg": one
        for number, one in enumerate(drawn)
    }


def as_text(report: Report, folder: str | None = None) -> str:
    """Markdown: the verdicts, then the tables; with the pictures between them where they lie in a folder."""
    found = report.found
    lines = [f"# {title_of(found)}", "", counted(found), ""]
    lines += [f"- {line}" for line in found.missing] + ([""] if found.missing else [])
    if found.verdicts:
        level = "level | " if report.by_level else ""
        lines += [f"| claim | {level}against | verdict | points (95 %) | p | p, corrected | seeds | questions |"]
        lines += ["|" + " --- |" * (9 if report.by_level else 8)]
        lines += [_row(verdict, report.by_level) for verdict in found.verdicts]
        lines += ["", found.rule, ""]
    if folder is not None:
        shown = {name: escape(one.title) for name, one in pictures_of(report).items()}
        picture = '<img src="{}/{}" alt="{}" title="{}" width="345">'  # side by side, where there is room
        lines += [picture.format(quote(folder), name, title, title) for name, title in shown.items()] + [""]
    tables = [Table(t.title, t.columns, t.lines, t.judges) for t in tables_of(found)]
    notes = list(dict.fromkeys(note for table in tables_of(found) for note in table.notes))
    return "\n".join(lines) + "\n" + as_markdown(tables, [*notes, *found.remarks, *HOW])


def as_json(report: Report) -> str:
    """All numbers, null where one is not defined."""
    found = report.found
    content = {
        "name": found.study.name,
        "title": title_of(found),
        "baseline": found.study.baseline,
        "arms": found.study.arms,
        "levels": found.study.levels,
        "axis": found.study.axis,
        "seeds": found.study.seeds,
        "runs": [{**asdict(run), "parts": {k: str(v) for k, v in run.parts.items()}} for run in found.study.runs],
        "missing": found.missing,
        "remarks": found.remarks,
        "rule": found.rule,
        "verdicts": [asdict(one) for one in found.verdicts],
        "figures": [asdict(one) for one in (*found.figures, *found.types)],
        "pope": {a: {s: {k: asdict(v) for k, v in row.items()} for s, row in r.items()} for a, r in found.pope.items()},
        "gains": [{"arm": a, "level": b, "figure": c, **asdict(one)} for (a, b, c), one in found.gains.items()],
        "tables": [asdict(table) for table in tables_of(found)],
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n"


def title_of(found: Findings) -> str:
    """What a study is called."""
    return found.study.title or found.study.name


def _row(one: Verdict, by_level: bool) -> str:
    gain = one.gain
    cells = [one.claim.says, *([one.level] if by_level else []), one.claim.worse, one.ruling]
    if gain is None:
        cells += ["-", "-", "-", "0", "0"]
    else:
        points = f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        cells += [points, _p(gain.p), _p(one.corrected), str(gain.seeds), f"{gain.questions:,}"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def _breaks(name: str) -> Markup:
    """A name that may go on in another line after an underscore."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _pictures(plots: list[Plot]) -> Markup:
    figure = Markup('<figure><figcaption>{}</figcaption><img alt="{}" src="{}"></figure>')
    drawn = Markup("").join(figure.format(one.title, one.title, one.uri) for one in plots)
    return Markup('<div class="plots">{}</div>').format(drawn)


def _finite(value: Any) -> Any:
    """As JSON can hold it: null for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
