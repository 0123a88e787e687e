"""`python -m vllava.report`: results of evaluations, or a study, as the paper's tables, beside its figures."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllava.commands import Parser
from vllava.data.writing import appearing
from vllava.errors import UserError, reason, stop
from vllava.evaluation.comparison import find_results
from vllava.evaluation.layout import Table, as_html, as_json, as_markdown, as_text
from vllava.evaluation.paper_tables import against, tables_of
from vllava.verdicts import report as study
from vllava.verdicts.study_file import is_study

Format = Callable[[Sequence[Table], Sequence[str]], str]
FILE_WIDTH = 160  # of a text that goes to no terminal
FORMATS: dict[str, Format] = {
    "text": lambda tables, remarks: as_text(tables, remarks, _width()),
    "markdown": as_markdown,
    "json": as_json,
    "html": as_html,
}
STUDY_FORMATS: dict[str, Callable[[study.Report], str]] = {
    "text": study.as_text,
    "markdown": study.as_text,
    "json": study.as_json,
    "html": study.as_html,
}
OF_SUFFIX = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html", ".htm": "html"}
STUDY_FILES = {"report.html": "html", "report.md": "markdown", "report.json": "json"}  # in a study's folder


def laid_out(paths: Sequence[str | Path], baseline: str | Path | None = None) -> tuple[list[Table], list[str]]:
    """The tables of all results in files and folders, and what is to be said below them.

    Raises UserError where there are none, or where one cannot be read.
    """
    found = find_results(paths)
    tables, remarks = tables_of(found)
    if baseline is not None:
        others = find_results([baseline])
        if len(others) > 1:
            listed = ", ".join(str(one.path) for one in others)
            raise UserError(f"--baseline is one result; in {baseline} there are {len(others)}: {listed}.")
        tables.append(against(found, others[0]))
    return tables, remarks


def write(path: Path, text: str) -> None:
    """Write what a report says, whole or not at all; raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}). Choose another place with --out.") from error


def format_of(out: Path | None, asked: str | None) -> str:
    """The format that was asked for, else that of the file's name, else text."""
    return asked or OF_SUFFIX.get(out.suffix.lower() if out else "", "text")


def on_study(path: Path, form: str | None, out: Path | None) -> str:
    """The report of a study in one format, on the screen or in a file; or all three in its folder. Returns what to say.

    Beside a Markdown file lie its pictures, in a folder of their own.
    Raises UserError where the study cannot be read, or has no finished run.
    """
    report = study.report_on(path)
    if form is None and out is None:
        files = {report.found.study.path.with_name(name): kind for name, kind in STUDY_FILES.items()}
    elif out is None:
        return STUDY_FORMATS[form or "text"](report).rstrip()
    else:
        files = {out: format_of(out, form)}
    for file, kind in files.items():
        if kind == "markdown":
            pictures = file.with_name(f"{file.stem}-pictures")
            for old in pictures.glob("[0-9][0-9]-*.svg"):  # of an earlier report, which may have had others
                old.unlink()
            for name, plot in study.pictures_of(report).items():
                write(pictures / name, plot.svg.decode())
            write(file, study.as_text(report, pictures.name))
        else:
            write(file, STUDY_FORMATS[kind](report))
    return f"{study.in_brief(report)}\nwritten to {', '.join(map(str, files))}"


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else FILE_WIDTH


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.report",
        "Results of evaluations as the paper's Tables 2, 3 and 4, beside the paper's figures. What keeps a figure from "
        "being compared stands in a note; figures of different judges stand in columns of their own. Of a study: its "
        "ablations as Tables 5 and 6 and Figures 4 and 5, with a verdict for each claim.",
        "outputs/runs/evaluate-* --format markdown --out tables.md",
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULT",
        help="a result.json, or a folder that is searched for them at any depth; or a study's folder, alone",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="how it is written (default: by the ending of FILE, else text; of a study without FILE html, markdown and "
        "json, into its folder)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, instead of on the screen")
    parser.add_argument(
        "--baseline", metavar="RESULT", help="a result that the others of its benchmark are tested against, in pairs"
    )
    options = parser.parse_args(arguments)
    try:
        if any(map(is_study, options.results)):
            if len(options.results) > 1 or options.baseline:
                raise UserError("A study is reported on alone, and has a baseline of its own: give its folder only.")
            print(on_study(Path(options.results[0]), options.format, options.out))
            return 0
        text = FORMATS[format_of(options.out, options.format)](*laid_out(options.results, options.baseline))
        if options.out:
            write(options.out, text)
    except UserError as error:
        stop(error)
    print(f"written to {options.out}" if options.out else text.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
