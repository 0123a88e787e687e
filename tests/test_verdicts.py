"""A study's report: figures, verdicts and pages from the folders that a study leaves."""

import json
import math
import re

import numpy as np
import pytest
from study_fixtures import CLAIMS, SKILLS, history, write_study

from vllava import report
from vllava.errors import UserError
from vllava.verdicts import plots
from vllava.verdicts.answers import of_types, pope, read_sheet
from vllava.verdicts.curves import curves_of
from vllava.verdicts.figures import Figure, left_out
from vllava.verdicts.findings import NOT_REPRODUCED, REPRODUCED, UNDECIDED, find
from vllava.verdicts.report import as_html, as_json, as_text, plots_of, report_on
from vllava.verdicts.statistics import over_seeds
from vllava.verdicts.study_file import read_study
from vllava.verdicts.tables import tables_of

SMALL = {"questions": 60, "probes": 36}


def found_in(folder, **changes):
    return find(read_study(write_study(folder / "study", **{"skills": SKILLS, **SMALL, **changes})))


def verdicts(found):
    return {(one.claim.name, one.claim.worse): one for one in found.verdicts}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of five systems and four seeds, of which one run failed, one is unfinished, and one is not there."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    states = {
        ("separated_clip", 2): {"state": "failed", "error": "The disk is <full>: free some space."},
        ("video_only", 3): {"state": "unfinished"},
    }
    write_study(folder, SKILLS, seeds=(1, 2, 3, 4), states=states, questions=200, probes=120)
    content = json.loads((folder / "study.json").read_text())
    content["runs"] = [run for run in content["runs"] if (run["arm"], run["seed"]) != ("image_only", 4)]
    content["title"] = "A <b>study</b> & more"
    (folder / "study.json").write_text(json.dumps(content))
    return folder


def accuracy(study, arm, seed, medium, probes=False):
    lines = (study / f"../runs/{arm}-all-s{seed}/evaluate/answers.jsonl").read_text().splitlines()
    own = [one for one in map(json.loads, lines) if one["medium"] == medium and ("probes" in one["key"]) == probes]
    return sum(one["correct"] for one in own) / len(own)


# --- figures and verdicts ---------------------------------------------------------------------------------------------


def test_a_figure_is_the_mean_of_its_finished_seeds_and_probes_count_for_themselves(whole):
    found = find(read_study(whole))
    for arm, seeds in (("united", (1, 2, 3, 4)), ("separated_clip", (1, 3, 4)), ("image_only", (1, 2, 3))):
        for figure, probes in (("image", False), ("probes", True)):
            one = found.figure(arm, "all", figure)
            expected = {seed: accuracy(whole, arm, seed, "image", probes) for seed in seeds}
            assert one.by_seed == pytest.approx(expected)
            assert one.spread.mean == pytest.approx(np.mean([*expected.values()]))
            assert (one.blind, one.chance) == pytest.approx((0.5, 0.4))
    assert found.figure("video_only", "all", "image") is None


def test_blind_and_chance_are_those_of_the_sources_of_a_figure_weighted_by_their_questions(tmp_path):
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1,), **SMALL)
    path = tmp_path / "runs/united-all-s1/evaluate/metrics.json"
    metrics = json.loads(path.read_text())
    rows = {"seen": (0.2, 30), "unseen": (0.5, 10), "probes": (0.9, 50)}
    metrics["image"]["by_source"] = {name: {"blind": b, "chance": None, "n": n} for name, (b, n) in rows.items()}
    path.write_text(json.dumps(metrics))
    found = find(read_study(folder))
    assert found.figure("united", "all", "image").blind == pytest.approx((0.2 * 30 + 0.5 * 10) / 40)
    assert found.figure("united", "all", "probes").blind == pytest.approx(0.9)
    assert found.figure("united", "all", "image").chance is None


def test_a_seed_left_out_is_looked_for_where_the_others_expect_it():
    def figure(*shares):
        return Figure("united", "all", "image", "", over_seeds(shares), dict(enumerate(shares, 1)))

    close = figure(0.90, 0.91, 0.92, 0.91)  # by hand, the one of 0.90: 0.9133 ± 4.303 · 0.00577 · √(4/3)
    assert left_out([close]) == (4, 4)
    assert left_out([close, figure(0.90, 0.9001, 0.9002, 0.99)]) == (7, 8)  # three are where the 0.99 makes it wide
    assert left_out([figure(0.9, 0.2)]) == (0, 0)  # one seed alone expects nothing


def test_a_large_difference_is_reproduced_and_the_seeds_that_both_have_are_compared(whole):
    one = verdicts(find(read_study(whole)))["alignment_images", "separated_mae"]
    assert one.ruling == REPRODUCED and one.corrected < 0.001
    assert one.by_seed.keys() == {1, 2, 3, 4} and one.gain.value == pytest.approx(np.mean([*one.by_seed.values()]))
    clip = verdicts(find(read_study(whole)))["alignment_images", "separated_clip"]
    assert clip.by_seed.keys() == {1, 3, 4} and clip.gain.seeds == 3


def test_what_is_missing_is_named_with_its_reason(whole):
    missing = find(read_study(whole)).missing
    assert missing == [
        "separated_clip, seed 2 failed: The disk is <full>: free some space.",
        "video_only is not finished with seed 3.",
        "image_only has no run with seed 4.",
    ]


def test_a_finished_run_whose_evaluation_is_gone_is_named_and_left_out(tmp_path):
    folder = write_study(tmp_path / "study", SKILLS, **SMALL)
    (tmp_path / "runs/united-all-s2/evaluate").rename(tmp_path / "elsewhere")
    found = find(read_study(folder))
    assert len(found.missing) == 1 and "united, seed 2" in found.missing[0] and "gone" in found.missing[0]
    assert found.figure("united", "all", "image").by_seed.keys() == {1, 3}


def test_the_other_direction_is_not_reproduced(tmp_path):
    skills = {"united": SKILLS["separated_mae"], "separated_mae": SKILLS["united"]}
    claims = {"alignment_images": {**CLAIMS["alignment_images"], "worse": ["separated_mae"]}}
    one = verdicts(found_in(tmp_path, skills=skills, claims=claims))["alignment_images", "separated_mae"]
    assert one.ruling == NOT_REPRODUCED and one.gain.value < 0


def test_equal_systems_are_undecided_and_it_is_said_what_gain_is_unlikely(tmp_path):
    skills = {"united": SKILLS["united"], "image_only": SKILLS["united"]}
    one = verdicts(found_in(tmp_path, skills=skills))["joint_images", "image_only"]
    assert one.ruling == UNDECIDED and one.gain.low < 0 < one.gain.high
    assert f"a gain above {100 * one.gain.high:.1f} points is unlikely" in one.why


def test_one_seed_decides_nothing_however_large_the_difference(tmp_path):
    found = found_in(tmp_path, seeds=(1,))
    for one in found.verdicts:
        assert one.ruling == UNDECIDED and "one seed says nothing about seeds" in one.why
        assert one.gain.over == "questions" and math.isnan(one.corrected)
    assert verdicts(found)["alignment_images", "separated_mae"].gain.p < 1e-4
    assert any(line.startswith("With one seed, nothing is known about seeds: united") for line in found.remarks)


def test_a_claim_whose_systems_share_no_seed_is_undecided(tmp_path):
    lost = {("image_only", seed): {"state": "failed", "error": "x"} for seed in (1, 2, 3)}
    one = verdicts(found_in(tmp_path, states=lost))["joint_images", "image_only"]
    assert (one.gain, one.ruling, one.why) == (None, UNDECIDED, "No seed has finished with both systems.")


def test_p_is_corrected_for_all_tests_also_those_that_could_not_be_made(tmp_path):
    lost = {("image_only", seed): {"state": "failed", "error": "x"} for seed in (1, 2, 3)}
    found = found_in(tmp_path, states=lost)
    known = sorted((one for one in found.verdicts if one.gain), key=lambda one: one.gain.p)
    assert len(found.verdicts) == 6 and len(known) == 4
    assert known[0].corrected == pytest.approx(min(1, 6 * known[0].gain.p))
    assert "for the 6 tests made here" in found.rule


def test_a_claim_about_types_is_about_their_kinds_in_all_sources_of_the_medium(tmp_path):
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1,), **SMALL)
    sheet = read_sheet(read_study(folder).runs[0].parts["evaluate"])
    wanted = of_types("image", ["exist"])
    kinds = {asked.type for asked in sheet.values() if wanted(asked)}
    assert kinds == {"exist_random", "exist_popular", "exist_adversarial"}
    assert not any(map(of_types("image", ["exi"]), sheet.values()))


def test_questions_that_some_runs_lack_are_left_out_of_a_difference_and_counted(tmp_path):
    folder = write_study(tmp_path / "study", SKILLS, **SMALL)
    path = tmp_path / "runs/separated_mae-all-s1/evaluate/answers.jsonl"
    lines = path.read_text().splitlines()
    assert '"medium": "image"' in lines[0] and '"medium": "image"' in lines[1]
    path.write_text("\n".join(lines[2:]) + "\n")
    found = find(read_study(folder))
    assert verdicts(found)["alignment_images", "separated_mae"].gain.questions == SMALL["questions"] - 2
    assert "separated_mae and united were not asked all the same image questions: 2 that" in " ".join(found.remarks)


def test_pope_by_hand(tmp_path):
    """Of six probes: yes to two of three things that are there, and to one of three that are not."""
    said = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "no")]
    lines = [
        {"key": f"eval-probes-{n:06d}", "medium": "image", "type": "exist_popular", "question": "?", "truth": truth,
         "answer": answer.title() + ".", "options": [], "correct": truth == answer}
        for n, (truth, answer) in enumerate(said)
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = pope(read_sheet(tmp_path), "popular")
    assert found == pytest.approx({"accuracy": 100 * 4 / 6, "f1": 100 * 2 * 2 / (3 + 3), "yes": 50.0})
    assert pope(read_sheet(tmp_path), "random") is None


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arms": None}, "arms"),
        ({"baseline": "unted"}, "did you mean 'united'"),
        ({"claims": {"c": {"says": "x", "medium": "image", "better": "united"}}}, "claims.c lacks worse"),
        ({"claims": {"c": {**CLAIMS["joint_images"], "medium": "images"}}}, "did you mean 'image'"),
        ({"claims": {"c": {**CLAIMS["joint_images"], "worse": ["image_alone"]}}}, "did you mean 'image_only'"),
        ({"claims": {"c": {**CLAIMS["joint_images"], "typs": ["x"]}}}, "did you mean 'types'"),
        ({"runs": [{"arm": "united"}]}, "runs.0 lacks level, seed"),
        ({"levels": {"all": {"x": "much"}}}, "levels.all.x"),
    ],
)
def test_a_damaged_study_is_named_with_what_is_wrong(change, named, tmp_path):
    folder = write_study(tmp_path / "study", SKILLS, seeds=(1,), **SMALL)
    content = {**json.loads((folder / "study.json").read_text()), **change}
    (folder / "study.json").write_text(
        json.dumps({k: v for k, v in content.items() if k not in change or v is not None})
    )
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        read_study(folder)
    assert str(folder / "study.json") in str(caught.value)


def test_a_study_without_a_finished_run_has_no_report_and_says_what_became_of_them(tmp_path):
    states = {("united", 1): {"state": "failed", "error": "No shards."}}
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1,), states=states)
    with pytest.raises(UserError, match=r"no finished run.*united, seed 1 failed: No shards\."):
        report_on(folder)


@pytest.mark.parametrize("damage", ['{"key"', '{"key": "a"}\n', "[]\n"])
def test_answers_that_cannot_be_read_are_named(damage, tmp_path):
    folder = write_study(tmp_path / "study", SKILLS, seeds=(1,), **SMALL)
    path = tmp_path / "runs/united-all-s1/evaluate/answers.jsonl"
    path.write_text(damage)
    with pytest.raises(UserError, match=r"answers\.jsonl cannot be read"):
        report_on(folder)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_the_papers_tables_stand_beside_ours_with_its_figures_in_columns_of_their_own(whole):
    tables = {table.title.partition(":")[0]: table for table in tables_of(find(read_study(whole)))}
    assert {"All systems", "Table 5", "Figure 4", "Table 6", "Figure 5", "Table 4"} <= {*tables}
    table = tables["Table 5"]
    heads = [(column.benchmark, column.figure) for column in table.columns]
    assert heads[:2] == [("images", "this study"), ("POPE probes", "this study")]
    columns = ["VQAv2", "GQA", "VisWiz", "SQA-I", "VQA-T", "POPE", "MMB", "LLaVA-W", "MM-Vet"]
    assert heads[2:] == [(name, "paper") for name in columns]
    lines = {line.name: line.cells for line in table.lines}
    assert lines["United (united)"][0].value == pytest.approx(
        100 * np.mean([accuracy(whole, "united", seed, "image") for seed in (1, 2, 3, 4)])
    )
    # as the paper prints it: united over Separated-CLIP
    differences = [round(cell.value, 1) for cell in lines["united more than separated_clip"][2:]]
    assert differences == [0.1, 0.4, 0.3, -0.9, 0.3, 0.0, 0.7, 4.2, 1.4]
    more = [round(cell.value, 1) for cell in tables["Table 6"].lines[-1].cells[1:]]
    assert more == [5.9, 0.9, 2.2, 4.6]


def test_the_page_needs_nothing_else_and_shows_strangers_text_as_text(whole):
    page = as_html(report_on(whole))
    assert not re.search(r"""(src|href)=["'](?!data:)|<script|@import|url\(""", page)
    assert "default-src 'none'" in page and 'name="viewport"' in page
    assert (
        "A &lt;b&gt;study&lt;/b&gt; &amp; more" in page and "The disk is &lt;full&gt;" in page and "<full>" not in page
    )
    for one in find(read_study(whole)).verdicts:
        assert one.claim.says in page and one.ruling in page
    titles = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert "Gain of every claim with its 95 % interval" in titles
    assert {f"Accuracy, {name}" for name in ("images", "videos", "POPE probes")} <= {*titles}
    assert {f"{stage}: {what}" for stage in ("stage1", "stage2") for what in ("loss", "held-out loss, image")} <= {
        *titles
    }


def test_the_page_is_the_same_every_time(whole):
    assert as_html(report_on(whole)) == as_html(report_on(whole))


def test_markdown_has_a_line_for_every_verdict_in_whole_tables(whole):
    text = as_text(report_on(whole))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) > 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1, block
    assert sum("helps images | separated_mae | reproduced" in line for line in text.splitlines()) == 1


def test_json_has_the_numbers_and_null_for_what_is_not_defined(tmp_path):
    folder = write_study(tmp_path / "study", SKILLS, seeds=(1,), **SMALL)
    content = json.loads(as_json(report_on(folder)), parse_constant=lambda name: pytest.fail(name))
    assert content["verdicts"][0]["ruling"] == UNDECIDED and content["verdicts"][0]["corrected"] is None
    assert content["figures"][0]["spread"]["low"] is None
    assert content["figures"][0]["spread"]["mean"] == pytest.approx(accuracy(folder, "united", 1, "image"))


def test_over_levels_every_claim_has_a_curve_and_each_level_is_corrected_for_itself(tmp_path):
    skills = {
        "united": lambda x: {"image": 1.5 + 2 * x, "video": 1.5, "probes": 1.5},
        "image_only": {"image": 1.5, "probes": 1.5},
    }
    claims = {"joint_images": CLAIMS["joint_images"]}
    levels = {"few": 0.13, "half": 0.5, "most": 1.0}
    sizes = {"questions": 300, "probes": 30}
    folder = write_study(
        tmp_path / "study", skills, seeds=(1, 2, 3, 4), levels=levels, axis="share of videos", claims=claims, **sizes
    )
    made = report_on(folder)
    rulings = {one.level: one.ruling for one in made.found.verdicts}
    assert rulings["most"] == REPRODUCED and rulings["few"] == UNDECIDED
    assert "for the 1 tests made at each level" in made.found.rule
    assert [one.level for one in made.found.verdicts] == [*levels]
    assert all(one.corrected == one.gain.p for one in made.found.verdicts)
    page = as_html(made)
    shown = ["Joint training helps images (vs image_only)", "Accuracy, images", "Accuracy, videos"]
    assert re.findall("<figcaption>(.*?)</figcaption>", page)[:3] == shown
    [curve, accuracy, *_] = plots_of(made)
    assert all(f">{level}<".encode() in plot.svg for plot in (curve, accuracy) for level in levels)
    assert "Images, by share of videos" in page and "few (0.13)" in page and "most (1)" not in page
    assert not any(one.startswith("Where on the axis") for one in made.found.remarks)
    assert "| Joint training helps images | most | image_only | reproduced |" in as_text(made)


def test_a_level_whose_place_is_not_known_is_named_and_in_the_tables_alone(tmp_path):
    skills, claims = {arm: SKILLS[arm] for arm in ("united", "image_only")}, {"joint_images": CLAIMS["joint_images"]}
    levels = {"measured": 0.2, "unmeasured": None}
    made = report_on(write_study(tmp_path / "study", skills, levels=levels, axis="retrieval", claims=claims, **SMALL))
    assert "Where on the axis it stands is not known of unmeasured: in the tables alone." in made.found.remarks
    assert "unmeasured" in as_text(made) and not any(b"unmeasured" in plot.svg for plot in plots_of(made))


@pytest.mark.parametrize("asked", [["half", "most"], ["half"]])
def test_levels_that_were_not_asked_for_are_left_out_and_the_others_named(asked, tmp_path):
    skills, claims = {arm: SKILLS[arm] for arm in ("united", "image_only")}, {"joint_images": CLAIMS["joint_images"]}
    levels = {"scant": 0.1, "half": 0.5, "most": 1.0}
    folder = write_study(tmp_path / "study", skills, levels=levels, axis="share", claims=claims, **SMALL)
    content = json.loads((folder / "study.json").read_text())
    content["runs"] = [run for run in content["runs"] if run["level"] in asked]
    (folder / "study.json").write_text(json.dumps(content))
    made = report_on(folder)
    assert f"Of its levels the study was run at {', '.join(asked)} alone." in made.found.remarks
    assert not made.found.missing and [one.level for one in made.found.verdicts] == asked
    assert "scant" not in as_text(made) and as_html(made)


@pytest.mark.parametrize(("levels", "scale"), [({"a": 0.05, "1.0": 1}, "log"), ({"a": 0.1, "1.0": 1}, "linear")])
def test_levels_that_lie_far_apart_stand_on_a_logarithmic_scale_with_numbers(tmp_path, levels, scale, monkeypatch):
    scales, drawn = [], plots._drawn

    def noted(canvas, title):
        scales.append(canvas.axes[0].get_xscale())
        return drawn(canvas, title)

    monkeypatch.setattr(plots, "_drawn", noted)
    skills = {arm: SKILLS[arm] for arm in ("united", "image_only")}
    claims = {"joint_images": CLAIMS["joint_images"]}
    made = report_on(write_study(tmp_path / "study", skills, levels=levels, axis="share", claims=claims, **SMALL))
    [curve, *_] = plots_of(made)
    assert set(scales) == {scale}
    assert f">({levels['a']:g})<".encode() in curve.svg and b">1.0<" in curve.svg and b">1<" not in curve.svg


def test_labels_that_would_run_into_each_other_are_a_row_lower():
    assert plots.staggered(["a", "b", "c"], [0.0, 0.5, 1.0]) == ["a", "b", "c"]
    close = plots.staggered(["a", "b\n(1)", "c", "d", "e"], [0.0, 0.75, 0.9, 0.95, 1.0])
    assert close == ["a", "b\n(1)", "\n\nc", "\n\n\n\nd", "e"]
    assert plots.staggered(["alone"], [0.0]) == ["alone"]


# --- learning curves --------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_of_its_seeds_between_the_lowest_and_the_highest(tmp_path):
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1, 2), **SMALL)
    curves, lost = curves_of(read_study(folder), "all")
    assert lost == []
    one = next(c for c in curves if (c.part, c.metric) == ("stage2", "val_loss"))
    rows = [[row["val_loss"] for row in history(3.0, seed) if "val_loss" in row] for seed in (1, 2)]
    assert one.x.tolist() == [320, 640, 960]
    assert one.mean == pytest.approx(np.mean(rows, axis=0))
    assert one.low == pytest.approx(np.min(rows, axis=0)) and one.high == pytest.approx(np.max(rows, axis=0))


def test_what_tells_the_same_as_another_metric_has_no_curve_of_its_own(tmp_path):
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1, 2), **SMALL)
    for path in (tmp_path / "runs").glob("*/stage2/history.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        both = [{**row, "val_loss/images": row["val_loss/image"]} if "val_loss" in row else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in both))
    curves, _ = curves_of(read_study(folder), "all")
    assert [one.metric for one in curves if one.part == "stage2"] == ["loss", "val_loss", "val_loss/image"]


def test_a_history_that_breaks_off_counts_as_far_as_it_goes_and_one_that_is_not_there_is_named(tmp_path):
    folder = write_study(tmp_path / "study", {"united": SKILLS["united"]}, seeds=(1, 2, 3), **SMALL)
    path = tmp_path / "runs/united-all-s1/stage1/history.jsonl"
    path.write_text(path.read_text()[:2000])
    (tmp_path / "runs/united-all-s2/stage1/history.jsonl").unlink()
    curves, lost = curves_of(read_study(folder), "all")
    assert lost == ["No history of stage1, and so no learning curve: united, seed 2."]
    one = next(c for c in curves if (c.part, c.metric) == ("stage1", "loss"))
    assert one.seeds == 2 and one.low[0] < one.high[0] and one.low[-1] == one.high[-1]  # at its end, of one seed alone


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_leaves_all_three_in_the_studys_folder_and_says_the_verdicts(whole, capsys):
    assert report.main([str(whole)]) == 0
    said = capsys.readouterr().out
    assert "Alignment before projection helps images (against separated_mae): reproduced." in said
    assert "separated_clip, seed 2 failed: The disk is <full>: free some space." in said
    assert all((whole / name).read_text() for name in ("report.html", "report.md", "report.json"))


def test_the_command_writes_one_format_where_it_is_told(whole, tmp_path, capsys):
    assert report.main([str(whole / "study.json"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "paper"
    assert report.main([str(whole), "--format", "html", "--out", str(tmp_path / "a/page.html")]) == 0
    assert report.main([str(whole), "--out", str(tmp_path / "by its name.HTML")]) == 0
    assert all(page.read_text().startswith("<!doctype html>") for page in tmp_path.rglob("*.[hH]*"))
    assert report.main([str(whole), "--out", str(tmp_path / "plain")]) == 0
    assert "| claim | against |" in (tmp_path / "plain").read_text()


def test_the_pictures_of_a_markdown_file_lie_beside_it_and_no_older_ones(whole, tmp_path):
    (tmp_path / "my study-pictures").mkdir()
    (tmp_path / "my study-pictures/07-of-another-report.svg").write_text("<svg/>")
    (tmp_path / "my study-pictures/mine.svg").write_text("<svg/>")
    assert report.main([str(whole), "--format", "markdown", "--out", str(tmp_path / "my study.md")]) == 0
    links = re.findall(r'<img src="(.+?)" alt=".+?"', (tmp_path / "my study.md").read_text())
    assert len(links) > 8 and all(link.startswith("my%20study-pictures/") for link in links)
    for link in links:
        assert "<svg" in (tmp_path / link.replace("%20", " ")).read_text()
    assert len([*(tmp_path / "my study-pictures").iterdir()]) == len(links) + 1


def test_a_study_is_reported_on_alone(whole, capsys):
    with pytest.raises(SystemExit, match="alone"):
        report.main([str(whole), str(whole)])
