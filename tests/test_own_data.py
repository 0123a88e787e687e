"""A user's own data take the place of all of the toy world's, in every experiment, by one spelling."""

import json
import logging
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf
from shard_fixtures import ROOT, image_sample, text_sample, video_sample, write_source

from vllava import plan
from vllava.chain import require_folders
from vllava.config import NAME_BYTES, composed, run_name, settle
from vllava.errors import UserError
from vllava.evaluation.evaluate import evaluate
from vllava.evaluation.preview import SHOWN, Preview
from vllava.sources import REMEDY

STAGES = ["stage1", "stage2", "stage2_lora"]
IMAGE = "data.sources.image=[data/mine]"


def settled(*overrides):
    """The part of a command line's configuration that says which folders are read."""
    cfg = composed(list(overrides))
    assert "toy" not in cfg and not {"stage1", "stage2", "held_out"} & set(cfg.data)
    parts = {"sources": cfg.data.get("sources"), "preview": cfg.preview, "evaluation": cfg.evaluation}
    return {key: OmegaConf.to_container(part) if part is not None else None for key, part in parts.items()}


# --- whose data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", STAGES)
def test_one_own_source_replaces_all_of_the_toy_world(experiment):
    cfg = composed([f"+experiment={experiment}", IMAGE])
    assert OmegaConf.to_container(cfg.data.sources) == {"image": ["data/mine"]}
    assert cfg.preview is None and cfg.evaluation is None
    assert cfg.data.remedy == REMEDY
    assert "toy" not in re.sub("conf/|assets/", "", OmegaConf.to_yaml(cfg.data))


def test_without_one_the_toy_world_is_read():
    found = settled("+experiment=stage2", "world=W")
    assert found["sources"] == {"image": ["W/stage2/images"], "video": ["W/stage2/videos"], "text": ["W/stage2/text"]}
    toys = {"image": ["W/eval/images"], "video": ["W/eval/videos"]}
    assert found["preview"] == {**toys, "remedy": "Make them with `python -m data_prep.toy eval --out W`."}
    asked = settled("+experiment=evaluate", "world=W")["evaluation"]
    assert asked["sources"]["video"] == {"unseen scenes": "W/eval/videos", "unseen pairs": "W/eval/novel-videos"}
    assert "data_prep.toy eval" in asked["remedy"] and asked["max_new_tokens"] == 16


def test_settling_again_changes_nothing():
    cfg = composed(["+experiment=stage2", IMAGE, "data.held_out.image=[data/other]"])
    before = OmegaConf.to_container(cfg)
    settle(cfg)
    assert OmegaConf.to_container(cfg) == before


@pytest.mark.parametrize(
    ("named", "sources"),
    [
        ("data.sources.image=data/mine", {"image": ["data/mine"]}),
        ("data.sources={video: [a, b]}", {"video": ["a", "b"]}),
        ("+data.sources.text=[s3://bucket/t]", {"text": ["s3://bucket/t"]}),
    ],
)
def test_a_folder_is_a_list_of_one(named, sources):
    assert settled("+experiment=stage1", named)["sources"] == sources


# --- stages and chains ------------------------------------------------------------------------------------------------


def test_each_stage_may_have_data_of_its_own_by_the_same_words_in_stages_and_chain():
    first, second = "data.stage1.sources.image=[captions]", "data.stage2.sources.video=[talks]"
    both = {"image": ["captions"], "video": ["talks"]}
    assert settled("+experiment=full", first, second)["sources"] == both
    assert settled("+experiment=stage1", first, second)["sources"] == {"image": ["captions"]}
    for experiment in ("stage2", "stage2_lora"):
        assert settled(f"+experiment={experiment}", first, second)["sources"] == {"video": ["talks"]}
    assert settled("+experiment=stage1", IMAGE, second)["sources"] == {"image": ["data/mine"]}
    assert settled("+experiment=stage2", IMAGE, second)["sources"] == {"video": ["talks"]}


@pytest.mark.parametrize("experiment", ["stage2", "full"])
def test_a_stage_without_data_is_an_error_that_names_the_key(experiment):
    with pytest.raises(UserError, match=r"stage2 has no data.*data\.stage2\.sources\.image="):
        settled(f"+experiment={experiment}", "data.stage1.sources.image=[captions]")


def test_a_stages_block_holds_any_key_of_the_data(tmp_path):
    given = ["+data.stage1.max_length=99", "+data.stage1.image_fit=pad", IMAGE]
    first, second = (composed([f"+experiment={stage}", *given]).data for stage in ("stage1", "stage2"))
    assert (first.max_length, first.image_fit, second.max_length) == (99, "pad", 3072)
    with pytest.raises(UserError, match="Unknown key 'max_lenght' in data: did you mean 'max_length'"):
        composed(["+experiment=stage1", "+data.stage1.max_lenght=99"])


@pytest.fixture
def conf(tmp_path):
    """A copy of the configuration with two files of data: the example, and one whose stages differ."""
    folder = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    both = {"defaults": ["conversation", "_self_"], "max_length": 1000}
    stages = {f"stage{n}": {"sources": {"image": [f"file{n}"]}, "max_length": n} for n in (1, 2)}
    (folder / "data" / "apart.yaml").write_text(yaml.safe_dump({**both, **stages}))
    return folder


def test_the_command_line_has_the_last_word_over_a_file(conf):
    def data(*overrides):
        return composed(["+experiment=stage2", "data=apart", *overrides], conf).data

    assert (data().sources, data().max_length) == ({"image": ["file2"]}, 2)
    changed = data("data.sources.video=[mine]", "data.max_length=7")
    assert (changed.sources, changed.max_length) == ({"video": ["mine"]}, 7)
    assert data("data.sources.video=[mine]", "data.stage2.sources.text=[t]").sources == {
        "image": ["file2"],
        "text": ["t"],
    }


def test_the_example_file_names_own_data_for_both_stages_and_held_out_shards():
    for experiment in ("stage1", "stage2", "full"):
        assert settled(f"+experiment={experiment}", "data=mine")["sources"] == {"image": ["data/mine/train"]}
    shown = settled("+experiment=stage2", "data=mine")["preview"]
    asked = settled("+experiment=evaluate", "data=mine")["evaluation"]
    assert shown == {"image": ["data/mine/held-out"], "remedy": REMEDY}
    assert asked["sources"] == {"image": {"data/mine/held-out": "data/mine/held-out"}} and asked["remedy"] == REMEDY
    example = (ROOT / "conf" / "data" / "mine.yaml").read_text()
    commented = "\n".join(line[2:] for line in example.splitlines() if re.match(r"#   ?\S|# stage\d", line))
    assert set(yaml.safe_load(commented[commented.index("stage1:") :])) == {"stage1", "stage2"}  # can be uncommented


# --- held-out shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("evaluation.sources.image=[a, b]", {"image": {"a": "a", "b": "b"}}),
        ("evaluation.sources.image=a", {"image": {"a": "a"}}),
        ("evaluation.sources.video={mine: a}", {"video": {"mine": "a"}}),
        ("data.held_out.text=[a]", {"text": {"a": "a"}}),
    ],
)
def test_held_out_shards_are_a_list_or_have_names_also_in_a_chain(given, asked):
    evaluation = settled("+experiment=evaluate", given)["evaluation"]
    assert evaluation["sources"] == asked and evaluation["max_new_tokens"] == 64
    assert settled("+experiment=full", given, IMAGE)["evaluation"]["sources"] == asked


def test_the_older_spelling_of_what_to_evaluate_goes_on_to_work():
    found = settled("+experiment=evaluate", "~evaluation.sources", "+evaluation.sources={image: {mine: data/test}}")
    assert found["evaluation"]["sources"] == {"image": {"mine": "data/test"}}


def test_previews_and_evaluations_may_have_folders_of_their_own():
    given = ["data.held_out.image=[both]", "preview.video=[shown]", "evaluation.sources.video=[asked]", IMAGE]
    assert settled("+experiment=stage2", *given)["preview"] == {"video": ["shown"], "remedy": REMEDY}
    assert settled("+experiment=evaluate", *given)["evaluation"]["sources"] == {"video": {"asked": "asked"}}
    assert settled("+experiment=stage2", "preview=null")["preview"] is None


def test_an_evaluation_of_own_data_without_held_out_shards_is_an_error_and_no_part_of_a_chain():
    with pytest.raises(UserError, match=r"nothing to evaluate.*data\.held_out\.image="):
        settled("+experiment=evaluate", IMAGE)
    assert settled("+experiment=full", IMAGE)["evaluation"] is None
    assert settled("+experiment=full")["evaluation"] is not None  # the toy world's


def test_held_out_shards_that_are_trained_on_are_said_to_be(caplog):
    settled("+experiment=full", IMAGE, "data.held_out.image=[data/mine]")
    assert "data/mine is evaluated on and trained on" in caplog.text


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_source_that_an_ablation_does_not_take_is_said_to_be_unused(caplog):
    with caplog.at_level(logging.WARNING):
        found = settled("+experiment=stage2", "+ablation=video_only", IMAGE, "data.sources.video=[clips]")
    assert found["sources"] == {"video": ["clips"]}
    assert len(caplog.records) == 1 and "data.sources.image is not used" in caplog.text


@pytest.mark.parametrize("experiment", ["stage1", "full"])
def test_an_ablation_that_leaves_nothing_is_an_error(experiment):
    with pytest.raises(UserError, match=r"Nothing is left to train on.*takes video alone.*data\.sources\.image"):
        settled(f"+experiment={experiment}", "+ablation=video_only", IMAGE)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.sources.images=[a]", "did you mean data.sources.image?"),
        ("+data.sources.vidoe=[a]", "did you mean data.sources.video?"),
        ("data.stage2.sources.audio=[a]", "there are: image, video, text"),
        ("data.held_out.imgae=[a]", "did you mean data.held_out.image?"),
        ("evaluation.sources.pictures=[a]", "there are: image, video, text"),
        ("data.source.image=[a]", "did you mean data.sources?"),
        ("data.sources=[a]", "write data.sources.image=[FOLDER, …]"),
        ("preview=a", "write preview.image=[FOLDER, …]"),
        ("data.sources={images: [a]}", "did you mean data.sources.image?"),
        ("data.sources.image={mine: a}", "data.sources.image=[FOLDER, …]"),
        ("data.sources.image=[3]", "3 is none"),
        ("data.sources.text=[]", "data.modalities=[image, video]"),
    ],
)
def test_a_wrong_spelling_is_an_error_with_the_right_one(given, message):
    with pytest.raises(UserError) as error:
        composed(["+experiment=stage2", given])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_name_of_a_run_fits_into_a_file_system():
    names = {run_name("stage2", "united", 1, f"data.sources.image=[{'/long/path' * 40}{n}]") for n in (1, 2)}
    assert len(names) == 2 and all(len(name.encode()) <= NAME_BYTES for name in names)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_counts_own_shards_alone_and_otherwise_takes_the_papers_numbers(tmp_path, capsys):
    write_source(tmp_path / "mine", [text_sample(f"t{i}") for i in range(3)], per_shard=2)
    given = ["model=video_llava_7b", f"data.sources.text=[{tmp_path}/mine]"]
    plan.main(["+experiment=stage2", *given, "--shards", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == {"text": 3}
    assert plan.make(plan.configured(["+experiment=stage2", *given]), 8).samples == {"text": 40_000}
    with pytest.raises(SystemExit, match=r"error: .*text_tokens\.text=NUMBER"):
        plan.main(["+experiment=stage1", *given, "--shards"])


# --- what is shown and asked ------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(tmp_path):
    """A folder of pictures, clips and texts, as prepared from one's own files."""
    samples = [image_sample("a"), video_sample("b"), text_sample("c"), image_sample("d")]
    write_source(tmp_path / "held-out", samples, per_shard=3)
    return str(tmp_path / "held-out")


def test_a_preview_takes_the_first_samples_of_own_folders_whatever_they_hold(model, tokenizer, held_out, tmp_path):
    write_source(tmp_path / "more", [text_sample(f"t{i}") for i in range(9)], per_shard=9)
    settings = {"data": {"image_fit": "crop", "decoder": "auto", "template": "vicuna_v1"}}
    preview = Preview({"image": [held_out], "text": [str(tmp_path / "more")]}, model.specs, tokenizer, settings)
    rows = preview.rows(model)
    assert [row["key"] for row in rows] == ["a", "b", "c", "d", *(f"t{i}" for i in range(SHOWN))]
    assert [len(row["pictures"]) for row in rows[:3]] == [1, model.specs["video"].frames, 0]
    assert Preview({}, model.specs, tokenizer, settings).rows(model) == []
    with pytest.raises(UserError, match=r"No shards at .*nowhere.*prepare"):
        Preview({"image": [str(tmp_path / "nowhere")]}, model.specs, tokenizer, settings, REMEDY)


def test_own_samples_are_counted_by_what_they_hold_and_the_report_says_what_is_right(
    checkpoint, held_out, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    sources = {"image": {held_out: held_out}}
    metrics = evaluate(str(checkpoint), sources, str(tmp_path / "run"), REMEDY, max_new_tokens=2)
    assert {kind: metrics[kind]["n"] for kind in ("image", "video", "text")} == {"image": 2, "video": 1, "text": 1}
    assert metrics["image"]["chance"] is None
    page, printed = (tmp_path / "run" / "report.html").read_text(), capsys.readouterr().out
    for said in ("word for word", "TEXT"):
        assert said in printed
    assert "word for word" in page and held_out in page and "<td>text</td>" in page


# --- from shards to a trained model -----------------------------------------------------------------------------------


def test_a_chain_runs_on_own_data_where_there_is_no_toy_world(tmp_path):
    write_source(tmp_path / "mine", [image_sample("a"), video_sample("b"), image_sample("c")], per_shard=2)
    run = tmp_path / "run"
    given = [f"data.sources.image=[{tmp_path}/mine]", f"run_dir={run}", f"world={tmp_path}/none", "logger=none"]
    one = ["trainer=single", "data.workers=0"]
    command = [sys.executable, "train.py", "+experiment=full", *given, *one]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing was evaluated" in done.stdout and "data.held_out.image=" in done.stdout
    for stage in ("stage1", "stage2"):
        part = run / f"{stage}-united-s1"
        config = yaml.safe_load((part / "config.yaml").read_text())
        assert config["data"]["sources"] == {"image": [f"{tmp_path}/mine"]} and config["preview"] is None
        assert json.loads((part / "metrics.json").read_text())["samples"] == 3
    assert not (run / "evaluate-united-s1").exists() and (run / "report.html").is_file()
    assert set(json.loads((run / "metrics.json").read_text())["seconds"]) == {"stage1", "stage2", "total"}


def test_a_chain_looks_for_all_its_shards_before_it_starts(tmp_path):
    write_source(tmp_path / "mine", [image_sample("a")], per_shard=1)
    mine = f"data.stage1.sources.image=[{tmp_path}/mine]"
    for missing in ("data.stage2.sources.image", "data.held_out.image", "preview.video", "evaluation.sources.image"):
        given = [mine, f"data.stage2.sources.video=[{tmp_path}/mine]", f"{missing}=[{tmp_path}/later]"]
        with pytest.raises(UserError, match=rf"No shards at {tmp_path}/later.*data_prep\.prepare"):
            require_folders(composed(["+experiment=full", *given]))
    require_folders(composed(["+experiment=full", mine, f"data.sources.video=[{tmp_path}/mine]"]))
    require_folders(composed(["+experiment=full", "world=/nowhere"]))  # the toy's are looked for part by part
