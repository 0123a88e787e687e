"""The page: one HTML file that needs no other one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jinja2

from vllava.errors import UserError, reading
from vllava.inspection.batches import ShownBatch
from vllava.inspection.findings import Finding
from vllava.inspection.plots import COLOURS, token_histogram
from vllava.inspection.statistics import SourceStatistics, Survey
from vllava.inspection.texts import Texts

MARK = "<!doctype html><!-- written by vllava.inspect_data -->"  # a page that begins so may be replaced
COLUMNS = {  # of the statistics: their names on the page, and what they count
    "tokens": "tokens of a sample (estimated)",
    "characters": "characters of a conversation",
    "turns": "turns of a conversation",
    "width": "width of a picture",
    "height": "height of a picture",
    "seconds": "seconds of a video",
    "frames": "frames of a video, in its file",
}


def write_page(
    path: Path,
    title: str,
    settings: dict[str, object],
    found: Sequence[Finding],
    survey: Survey,
    texts: Sequence[Texts],
    batches: Sequence[ShownBatch],
    token_budget: int,
) -> None:
    """Write the page, which takes the place of an older one, but of nothing else: that raises UserError.

    settings: what of the configuration is shown, by its keys.
    """
    require_ours(path)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    text = MARK + template.render(
        title=title,
        settings=settings,
        findings=found,
        survey=survey,
        sources=[_Shown(source, measured) for source, measured in zip(survey.sources, texts, strict=True)],
        batches=batches,
        budget=token_budget,
        columns=COLUMNS,
        colours=COLOURS,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"The page cannot be written to {path} ({error}). Choose another place with --out.") from error


def require_ours(path: Path) -> None:
    """Raises UserError where something lies that is no page of ours."""
    if not path.exists():
        return
    if path.is_file():
        with reading(path, "Choose another place with --out."), open(path, "rb") as file:
            if file.read(len(MARK)) == MARK.encode():
                return
    raise UserError(f"{path} is there already and is no page of this command. Choose another place with --out.")


class _Shown:
    """A source with its plot, for the template."""

    def __init__(self, statistics: SourceStatistics, texts: Texts) -> None:
        self.statistics, self.texts = statistics, texts
        edges, counts = statistics.histogram()
        self.kinds = list(counts)
        self.plot = token_histogram(edges, counts, statistics.max_length)


def number(value: float) -> str:
    """A number as a table shows it."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
