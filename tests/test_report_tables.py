"""`python -m vllava.report`: results as the paper's tables."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from result_fixtures import ASKING, JUDGE, MODEL, colours, result

from vllava.errors import UserError
from vllava.evaluation.comparison import paper
from vllava.evaluation.layout import as_html, as_markdown, as_text
from vllava.evaluation.result_files import write_result
from vllava.evaluation.results import Counts, Judge
from vllava.evaluation.statistics import Draws, Score
from vllava.report import laid_out, main

VIDEO = replace(ASKING, template="llava_v1", max_new_tokens=1024)
IMAGE = replace(ASKING, max_new_tokens=1024)
OTHER = replace(MODEL, path="/x/outputs/runs/stage2-clip-s1/checkpoint", sha256="b" * 64)
BENCH = replace(JUDGE, prompts={"llava_bench": "1" * 64})


@pytest.fixture
def tables(tmp_path):
    """Lays results out, each in a folder of its own."""

    def lay(*results, **options):
        for number, one in enumerate(results):
            write_result(tmp_path / "runs" / str(number), one)
        return laid_out([tmp_path / "runs"], **options)

    return lay


def cell(table, line, *column):
    """The cell of a line in the column of that benchmark, figure and judge; None if it is empty."""
    names = [(one.benchmark, one.figure, one.judge) for one in table.columns]
    (cells,) = (one.cells for one in table.lines if one.name == line)
    return cells[names.index(column)]


def said(table, found):
    """The notes of a cell."""
    return [table.notes[number - 1] for number in found.notes]


# --- the paper's figures ----------------------------------------------------------------------------------------------


def test_the_papers_rows_have_a_figure_or_none_for_each_column():
    for table in paper()["tables"]:
        for name, row in table["rows"].items():
            assert len(row) == len(table["columns"]), name
        assert {column["benchmark"] for column in table["columns"]} <= set(paper()["benchmarks"])


def test_pope_in_the_papers_table_3_is_the_mean_accuracy_of_its_table_4():
    _, images, pope, _ = paper()["tables"]
    place = [column["benchmark"] for column in images["columns"]].index("pope")
    for name in ("Video-LLaVA 7B", "LLaVA-1.5 7B with LanguageBind"):
        assert np.mean(pope["rows"][name][::3]) == pytest.approx(images["rows"][name][place], abs=0.051)


# --- layout -----------------------------------------------------------------------------------------------------------


def test_results_of_a_model_stand_in_one_line_below_the_papers(tables):
    found, remarks = tables(
        result("msvd_qa", JUDGE, VIDEO),
        result("gqa", None, IMAGE),
        result("pope", None, IMAGE),
        result("llava_bench", BENCH, IMAGE),
        result("gqa", None, IMAGE, OTHER),
    )
    assert [table.title[:7] for table in found] == ["Table 2", "Table 3", "Table 4"]
    videos, images, pope = found
    assert [line.name for line in videos.lines if not line.published] == ["a"]
    assert [line.name for line in images.lines if not line.published] == ["a", "stage2-clip-s1"]
    assert images.lines[-3].name == "Video-LLaVA 7B" and images.lines[-3].published
    assert str(cell(images, "a", "GQA", "", "")) == "61.0 (60.0 to 62.0)"
    assert str(cell(images, "Video-LLaVA 7B", "GQA", "", "")) == "60.3"
    assert cell(images, "a", "VizWiz", "", "") is None
    assert cell(images, "a", "POPE", "", "").value == 84.0
    assert cell(pope, "a", "POPE", "adversarial F1", "").value == 80.0
    assert cell(pope, "a", "POPE", "adversarial yes", "").value == 45.0
    assert cell(pope, "Video-LLaVA 7B", "POPE", "random yes", "").value == 42.0
    assert remarks == []


def test_figures_of_different_judges_never_share_a_column(tables):
    newer = replace(JUDGE, snapshots=["gpt-x-2026-06-01"])
    prompts = replace(JUDGE, prompts={"video_qa": "0" * 64})
    judges = [JUDGE, newer, prompts, Judge("exact"), replace(JUDGE, settings={"temperature": 1})]
    (table,), _ = tables(*(result("msvd_qa", judge, VIDEO) for judge in judges))
    heads = [column.judge for column in table.columns if (column.benchmark, column.figure) == ("MSVD-QA", "accuracy")]
    assert heads == ["paper", "A", "B", "C", "D", "E"]
    for letter in "ABCDE":
        filled = [line.name for line in table.lines if cell(table, line.name, "MSVD-QA", "accuracy", letter)]
        assert filled == ["a"]
    assert cell(table, "a", "MSVD-QA", "accuracy", "paper") is None
    assert cell(table, "Video-LLaVA 7B", "MSVD-QA", "accuracy", "paper").value == 70.7
    assert "gpt-3.5-turbo" in table.judges["paper"] and "gpt-x-2026-06-01" in table.judges["B"]
    assert "video_qa 00000000" in table.judges["C"] and table.judges["D"] == "exact."
    assert "temperature=1" in table.judges["E"]


def test_the_cost_of_a_judge_makes_no_other_judge_of_it(tables):
    (table,), _ = tables(
        result("msvd_qa", replace(JUDGE, usage={"tokens": 5}), VIDEO),
        result("tgif_qa", replace(JUDGE, usage={"tokens": 9}), VIDEO),
    )
    assert set(table.judges) == {"paper", "A"}


@pytest.mark.parametrize(
    ("benchmark", "changes", "note"),
    [
        ("gqa", {"counts": Counts(100, 100, 0, 12578)}, "100 questions, not the 12,578 that were published."),
        ("gqa", {"counts": Counts(100, 97, 3, 100)}, "Broken: 3 of 100; they count as wrong, with a score of 0."),
        ("gqa", {"asking": replace(IMAGE, template="chat")}, "Another prompt template: chat, not vicuna_v1."),
        ("gqa", {"asking": replace(IMAGE, max_new_tokens=16)}, "Answers of at most 16 tokens, not 128."),
        ("vqav2", {"asking": IMAGE, "split": "val"}, "Another split: val, not test-dev."),
        (
            "msvd_qa",
            {"asking": replace(VIDEO, template="vicuna_v1")},
            "Another prompt template: vicuna_v1, not llava_v1.",
        ),
        ("msvd_qa", {"asking": replace(VIDEO, frames=16)}, "16 frames of a video, not 8."),
        ("msvd_qa", {"asking": replace(VIDEO, frame_sampling="time")}, "Frames chosen otherwise: evenly by time."),
        ("msvd_qa", {"checkpoint": replace(MODEL, temporal_attention=False)}, "no temporal attention"),
        ("gqa", {"asking": IMAGE, "warnings": ["OCR of another reader."]}, "A warning: OCR of another reader."),
        ("msvd_qa", {"counts": Counts(9, 9, 0, 9, judged=7, unjudged=2)}, "Unjudged: 2 of 9; they count as wrong"),
    ],
)
def test_what_cannot_be_compared_with_the_paper_has_a_note_that_says_why(tables, benchmark, changes, note):
    judge = JUDGE if benchmark == "msvd_qa" else None
    plain = {"asking": VIDEO if judge else IMAGE, **changes}
    found, _ = tables(result(benchmark, judge, **plain))
    shown = [one for one in found[0].lines[-1].cells if one is not None]
    assert shown and all(any(note in one for one in said(found[0], each)) for each in shown)


def test_what_can_be_compared_has_no_note(tables):
    found, _ = tables(result("msvd_qa", JUDGE, VIDEO), result("gqa", None, IMAGE))
    assert [table.notes for table in found] == [(), ()]


def test_a_model_asked_in_two_ways_has_two_lines_that_say_which(tables):
    wide = replace(VIDEO, frames=16)
    (table,), _ = tables(
        result("msvd_qa", JUDGE, VIDEO), result("msvd_qa", JUDGE, wide), result("tgif_qa", JUDGE, wide)
    )
    assert [line.name for line in table.lines if not line.published] == ["a", "a, frames 16"]
    assert cell(table, "a, frames 16", "TGIF-QA", "accuracy", "A").value == 50.0
    assert cell(table, "a", "TGIF-QA", "accuracy", "A") is None


def test_models_whose_folders_have_the_same_name_are_told_apart(tables):
    (table,), _ = tables(result("gqa", None, IMAGE), result("gqa", None, IMAGE, replace(OTHER, path="b/a/checkpoint")))
    assert [line.name for line in table.lines if not line.published] == ["a (aaaaaaaa)", "a (bbbbbbbb)"]


def test_of_two_results_of_the_same_the_newest_is_shown_and_it_is_said(tables):
    scores = [Score("accuracy", "", 10.0, 9.0, 11.0, 5, True)]
    old = result("gqa", None, IMAGE, date="2026-01-01T00:00:00+00:00", scores=scores)
    (table,), (remark,) = tables(result("gqa", None, IMAGE), old)
    assert cell(table, "a", "GQA", "", "").value == 61.0
    assert "0/result.json is shown" in remark and "not" in remark and "1/result.json" in remark


def test_a_whole_benchmark_is_shown_before_a_newer_part_of_it(tables):
    part = result("gqa", None, IMAGE, counts=Counts(10, 10, 0, 12578), date="2027-01-01T00:00:00+00:00")
    (table,), (remark,) = tables(part, result("gqa", None, IMAGE))
    assert cell(table, "a", "GQA", "", "").notes == ()
    assert "1/result.json is shown" in remark


def test_other_questions_and_other_prompts_are_told_apart(tables):
    mine = result("gqa", None, IMAGE)
    prompts = replace(result("gqa", None, IMAGE, OTHER), data=replace(mine.data, sha256="0" * 64))
    ids = replace(
        result("gqa", None, IMAGE, replace(OTHER, path="c", sha256="c" * 64)),
        data=replace(mine.data, sha256="1" * 64, ids_sha256="1" * 64),
    )
    (table,), _ = tables(mine, prompts, ids)
    assert said(table, cell(table, "a", "GQA", "", "")) == []
    assert said(table, cell(table, "stage2-clip-s1", "GQA", "", "")) == ["Other prompts or truths in GQA than a had."]
    assert said(table, cell(table, "c", "GQA", "", "")) == ["Other questions in GQA than a had."]


def test_what_has_no_figures_says_why(tables):
    found, remarks = tables(
        result("vqav2", None, IMAGE, scores=[]),
        result("mm_vet", None, IMAGE, scores=[]),
        result("msvd_qa", Judge("exact"), VIDEO, scores=[Score("accuracy", "", 50.0, 49.0, 51.0, 5, True)]),
    )
    videos, images = found
    vqa = cell(images, "a", "VQAv2", "", "")
    assert math.isnan(vqa.value) and "a server scores the file to upload" in said(images, vqa)[0]
    score = cell(videos, "a", "MSVD-QA", "score", "A")
    assert math.isnan(score.value) and said(videos, score) == ["This judge or split has no such figure."]
    assert any("have not been judged (judge=none)" in remark for remark in remarks)


def test_benchmarks_that_the_paper_does_not_have_get_a_table_of_their_own(tables):
    (table,), _ = tables(colours()[0])
    assert table.title == "Other benchmarks"
    assert cell(table, "a", "colours", "accuracy", "A").value == pytest.approx(100 / 3)


def test_the_five_scores_are_found_as_groups_or_as_metrics(tables):
    groups = [Score("score", f"aspect/{name}", 2.5, 2.4, 2.6, 5, False, 1.0) for name in ("correctness", "detail")]
    metrics = [Score("temporal", "", 1.5, 1.4, 1.6, 5, False, 1.0), Score("score", "", 2.0, 1.9, 2.1, 5, True, 1.0)]
    (table,), _ = tables(result("video_chatgpt", JUDGE, VIDEO, scores=groups + metrics))
    assert str(cell(table, "a", "Video-ChatGPT", "detail", "A")) == "2.50 (2.40 to 2.60)"
    assert cell(table, "a", "Video-ChatGPT", "temporal", "A").value == 1.5
    assert math.isnan(cell(table, "a", "Video-ChatGPT", "context", "A").value)
    assert str(cell(table, "Video-ChatGPT 7B", "Video-ChatGPT", "correctness", "paper")) == "2.40"


# --- two models -------------------------------------------------------------------------------------------------------


def drawn(values, clusters="c"):
    values = np.asarray(values, float)
    return Draws(clusters, {"accuracy": float(values.mean())}, {"accuracy": values})


def test_a_model_is_tested_against_a_baseline_in_pairs(tmp_path):
    spread = np.linspace(58, 62, 101)
    write_result(tmp_path / "runs/base", result("gqa", None, IMAGE, OTHER), drawn(spread))
    write_result(tmp_path / "runs/better", result("gqa", None, IMAGE), drawn(spread + 2))
    tables, _ = laid_out([tmp_path / "runs/better", tmp_path / "runs"], tmp_path / "runs/base")
    table = tables[-1]
    assert "stage2-clip-s1" in table.title and [line.name for line in table.lines] == ["a"]
    more, p = table.lines[0].cells
    assert str(more) == "2.00 (2.00 to 2.00)" and p.value == pytest.approx(1 / 102)


def test_what_cannot_be_compared_with_a_baseline_says_why(tmp_path):
    mine = result("msvd_qa", JUDGE, VIDEO, OTHER)
    write_result(tmp_path / "base", mine, drawn([60, 61]))
    exact = result("msvd_qa", Judge("exact"), VIDEO)
    other = replace(result("msvd_qa", JUDGE, replace(VIDEO, frames=4)), data=replace(mine.data, ids_sha256="0" * 64))
    moved = result("msvd_qa", JUDGE, replace(VIDEO, frames=16))
    for number, one in enumerate((exact, other, moved)):
        write_result(tmp_path / str(number), one, drawn([60, 61], "others"))
    tables, _ = laid_out([tmp_path], tmp_path / "base")
    notes = [said(tables[-1], line.cells[0])[0] for line in tables[-1].lines]
    assert [re.split("[.:]", note)[0] for note in notes] == [
        "Another judge",
        "Other questions",
        "Its resamples are not those of the other",
    ]


def test_a_baseline_without_a_rival_or_without_resamples_is_an_error(tmp_path):
    write_result(tmp_path / "a", result("gqa", None, IMAGE))
    with pytest.raises(UserError, match="no other result of gqa"):
        laid_out([tmp_path / "a"], tmp_path / "a")
    write_result(tmp_path / "b", result("gqa", None, IMAGE, OTHER))
    with pytest.raises(UserError, match=r"draws\.json cannot be read"):
        laid_out([tmp_path], tmp_path / "b")
    with pytest.raises(UserError, match="--baseline is one result"):
        laid_out([tmp_path], tmp_path)


# --- how it is written ------------------------------------------------------------------------------------------------


def test_text_fits_its_width_and_loses_no_column(tables):
    found, remarks = tables(result("msvd_qa", JUDGE, replace(VIDEO, frames=16)), result("pope", None, IMAGE))
    parts = ("MSVD-QA", "ActivityNet-QA", "random yes", "68.0 (67.0 to 69.0) *1", "*1 16 frames", "[A] openai: gpt-x")
    for width in (80, 120, 400):
        text = as_text(found, remarks, width)
        assert all(len(line) <= width for line in text.splitlines() if not line.startswith(("[", "*")))
        assert all(part in text for part in parts)
        assert text.count("Video-LLaVA 7B") == sum(text.count(head) for head in ("\nFrozenBiLM", "\nOtter", "\nMM-GPT"))


HOSTILE = "a|b<script>alert(1)</script>*c*"


def test_names_of_strangers_break_neither_markdown_nor_a_page(tables):
    found, remarks = tables(result("gqa", None, IMAGE, replace(MODEL, path=f"runs/{HOSTILE[:20]}")))
    text = as_markdown(found, remarks)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:14]}
    assert len(columns) == 1
    assert "<script>" not in text

    class Tags(HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attributes):
            self.found.append(tag)

    Tags().feed(as_html(found, [HOSTILE]))
    assert "table" in Tags.found and "script" not in Tags.found


def test_the_command_prints_and_writes(tmp_path, capsys):
    write_result(tmp_path / "evaluate-a" / "gqa", result("gqa", None, IMAGE))
    assert main([str(tmp_path)]) == 0
    assert "61.0 (60.0 to 62.0)" in capsys.readouterr().out
    out = tmp_path / "new" / "tables.json"
    assert main([str(tmp_path / "evaluate-a"), "--format", "json", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["tables"][0]["columns"][1] == {"benchmark": "GQA", "figure": "", "judge": ""}
    assert content["tables"][0]["lines"][-1]["cells"][1]["low"] == 60.0
    assert main([str(tmp_path), "--format", "markdown"]) == 0
    assert "| a |  | 61.0 (60.0 to 62.0) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (lambda folder: None, ["{folder}"], "There is no result in"),
        (lambda folder: None, ["{folder}/none.json"], "There is no result in"),
        (lambda folder: (folder / "result.json").write_text("{"), ["{folder}"], "result.json cannot be read"),
        (lambda folder: write_result(folder, result("gqa")), ["{folder}", "--format", "pdf"], "invalid choice"),
        (lambda folder: write_result(folder, result("gqa")), ["{folder}", "--out", "{folder}"], "cannot be written"),
    ],
)
def test_mistakes_are_one_paragraph(tmp_path, spoil, arguments, words):
    spoil(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([one.format(folder=tmp_path) for one in arguments])
    assert words in str(ended.value) and "\n" not in str(ended.value)


def test_measured_figures_have_bars_with_their_interval_beside_blind_and_chance(tables):
    one = replace(
        result("gqa", None, IMAGE),
        scores=[Score("accuracy", "", 60.0, 55.0, 65.0, 100, True), Score("chance", "", 20.0, 20.0, 20.0, 100)],
        blind=[Score("accuracy", "", 30.0, 25.0, 35.0, 100, True)],
    )
    found, _ = tables(one, result("msvd_qa", JUDGE, VIDEO))
    bars = {c.value: c.bar for table in found for line in table.lines for c in line.cells if c and c.bar}
    assert bars[60.0] == {"value": 60.0, "low": 55.0, "high": 65.0, "blind": 30.0, "chance": 20.0}
    assert bars[3.7]["value"] == pytest.approx(74.0)  # a score of at most 5
    assert not any(c.bar for table in found for line in table.lines if line.published for c in line.cells if c)
    page = as_html(found, [])
    assert page.count('class="bar"') == len(bars)
    assert 'aria-label="60.0 of 100, blind 30.0, chance 20.0"' in page
    assert 'class="between" style="left: 55.0%; width: 10.0%"' in page and 'class="blind" style="left: 30.0%"' in page
