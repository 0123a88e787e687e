"""Evaluations from the command line: which benchmark, of which checkpoint, one or several."""

import csv
import json
import os
import re
import signal
import time

import pytest
import warm
from config_fixtures import assert_one_paragraph, composed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from result_fixtures import result
from shard_fixtures import image_sample, jpeg, talk, video_sample, write_source

from data_prep.shards import write_manifest
from vllava.answering import log_result
from vllava.chain import run_benchmarks
from vllava.config import check, run_name
from vllava.data.writing import write_tar
from vllava.errors import UserError
from vllava.evaluation.benchmarks.held_out import HeldOut, ShardMedium
from vllava.evaluation.evaluate import evaluate
from vllava.identity import evaluation_identity, identity_of, tells_apart
from vllava.imported import imported
from vllava.model.checkpoint import load
from vllava.model.formats import read_ours, write_original, write_port
from vllava.runs import Run

REMEDY = "Make them."


def settled(*overrides):
    cfg = composed(*overrides)
    check(cfg)
    return OmegaConf.to_container(cfg, resolve=True)


# --- composition ------------------------------------------------------------------------------------------------------


def test_an_evaluation_asks_held_out_samples_where_nothing_else_is_said():
    found = settled("+experiment=evaluate", "world=W")
    assert found["benchmark"]["sources"] == found["evaluation"]["sources"]
    assert found["benchmark"]["max_new_tokens"] == 16 and found["benchmark"]["blind"] is True
    assert found["benchmark"]["groups"] == {"temporal": ["direction", "mover", "order", "change", "events"]}
    assert isinstance(instantiate(found["benchmark"], _convert_="all"), HeldOut)
    own = settled("+experiment=evaluate", "data.held_out.image=[mine]")["benchmark"]
    assert own["sources"] == {"image": {"mine": "mine"}} and own["max_new_tokens"] == 64 and own["groups"] == {}


@pytest.mark.parametrize("experiment", ["stage1", "stage2", "full", "llm"])
def test_training_knows_no_benchmark_and_no_judge(experiment):
    found = settled(f"+experiment={experiment}", "benchmark=held_out", "judge=none")
    assert found["benchmark"] is None and found["judge"] is None


def test_what_is_evaluated_decides_nothing_of_what_is_trained():
    plain, more = settled("+experiment=stage1"), settled("+experiment=stage1", "benchmark=held_out", "judge=none")
    assert identity_of(plain) == identity_of(more)


def test_checkpoint_says_what_is_evaluated():
    found = settled("+experiment=evaluate", "checkpoint=some/where")
    assert found["evaluation"]["checkpoint"] == "some/where"
    assert settled("+experiment=evaluate", "evaluation.checkpoint=a")["evaluation"]["checkpoint"] == "a"
    assert settled("+experiment=evaluate", "checkpoint.every_steps=5")["evaluation"]["checkpoint"] == "auto"
    for experiment in ("stage1", "full"):
        with pytest.raises(UserError, match=r"checkpoint=some/where is for \+experiment=evaluate"):
            settled(f"+experiment={experiment}", "checkpoint=some/where")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[held_out]", {"held_out": None}),
        ("{held_out: /data/here}", {"held_out": "/data/here"}),
    ],
)
def test_several_benchmarks_are_a_list_or_a_mapping_to_their_roots(given, expected):
    assert settled("+experiment=evaluate", f"benchmarks={given}")["benchmarks"] == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[held_ou]", "did you mean 'held_out'"),
        ("[]", "name one or several"),
        ("[held_out,held_out]", "name one or several"),
        ("papers", "did you mean 'paper'"),
        ("5", "but must be"),
    ],
)
def test_benchmarks_that_there_are_not_are_named(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        settled("+experiment=evaluate", f"benchmarks={given}")


def test_benchmarks_are_for_evaluations():
    with pytest.raises(UserError, match=r"benchmarks=\['held_out'\] is for \+experiment=evaluate"):
        settled("+experiment=stage1", "benchmarks=[held_out]")


def test_evaluations_are_told_apart_by_benchmark_checkpoint_and_judge():
    def of(*given):
        return evaluation_identity(settled("+experiment=evaluate", "world=W", "checkpoint=c", *given))

    assert of() == of("evaluation.batch_size=3", "evaluation.workers=0", "trainer=ddp", "runs=elsewhere")
    for other in ("judge=none", "evaluation.max_new_tokens=3", "benchmark.blind=false", "evaluation.template=plain"):
        assert of() != of(other), other
    for override in ("benchmark=pope", "checkpoint=a/b", "judge=local", "judge.model=gpt", "benchmark.root=x"):
        assert tells_apart(override), override
    for override in ("judge.yes=true", "judge.concurrency=3", "evaluation.workers=2", "checkpoint.every_steps=3"):
        assert not tells_apart(override), override
    assert run_name("evaluate", "united", 1, "benchmark=pope") == "evaluate-united-pope-s1"


# --- held-out samples -------------------------------------------------------------------------------------------------


def asked(checkpoint, folder, run, **more):
    run.mkdir(exist_ok=True)
    metrics = evaluate(str(checkpoint), {"image": {"one": str(folder)}}, str(run), REMEDY, max_new_tokens=2, **more)
    return metrics, [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def test_a_broken_sample_is_counted_as_wrong_and_named(checkpoint, tmp_path, caplog):
    broken = ("bad", {"conversations": talk(answer="")}, [("jpg", b"nothing")])
    write_source(tmp_path / "s", [image_sample("good"), broken, video_sample("clip")], per_shard=2)
    metrics, rows = asked(checkpoint, tmp_path / "s", tmp_path / "run", workers=0)
    assert (metrics["image"]["n"], metrics["image"]["broken"]) == (2, 1) and "broken" not in metrics["video"]
    [bad] = [row for row in rows if row["key"] == "bad"]
    assert "unreadable image" in bad["broken"] and bad["correct"] is False and bad["answer"] == bad["truth"] == ""
    assert "1 of 3 questions could not be asked and count as wrong" in caplog.text and "00000.tar:bad" in caplog.text


def test_frames_in_shards_are_asked_about_as_they_are(checkpoint, tmp_path):
    record = {"id": "f", "conversations": talk(placeholder="<video>")}
    members = {"json": json.dumps(record).encode(), **{f"0.frame{n}.jpg": jpeg(50) for n in range(4)}}
    (tmp_path / "s").mkdir()
    write_manifest(tmp_path / "s", [write_tar(tmp_path / "s" / "00000.tar", [("f", members)])], {})
    metrics, [row] = asked(checkpoint, tmp_path / "s", tmp_path / "run", workers=0)
    assert metrics["video"]["n"] == 1 and "broken" not in row and row["medium"] == "video"


def test_a_medium_of_a_shard_gives_the_bytes_of_its_file(tmp_path):
    write_source(tmp_path / "s", [image_sample("a", 70)], per_shard=1)
    [one] = HeldOut("held_out", "", sources={"image": {"one": str(tmp_path / "s")}}).questions()
    [medium] = one.media
    assert isinstance(medium, ShardMedium) and medium.read() == jpeg(70)
    assert (one.prompt, one.truth, one.about["source"], one.about["key"]) == ("What is it?", "a circle", "one", "a")


# --- checkpoints of other formats -------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_format_is_imported_once_and_found_again(checkpoint, tmp_path, capsys, caplog):
    write_original(read_ours(checkpoint), tmp_path / "original")
    into = tmp_path / "runs" / "imported"
    first = imported(str(tmp_path / "original"), into)
    assert first.parent == into and "is imported to" in capsys.readouterr().out
    stamp = (first / "vllava.json").stat().st_mtime_ns
    assert imported(str(tmp_path / "original"), into) == first and "imported from" in capsys.readouterr().out
    assert (first / "vllava.json").stat().st_mtime_ns == stamp
    assert set(load(first)[0].specs) == {"image", "video"} and not caplog.text
    assert imported(str(checkpoint), into) == checkpoint


def test_the_port_is_said_to_have_lost_its_sense_of_time(checkpoint, tmp_path, caplog):
    write_port(read_ours(checkpoint), tmp_path / "port", drop_temporal_attention=True)
    folder = imported(str(tmp_path / "port"), tmp_path / "imported")
    assert "has no temporal attention" in caplog.text and load(folder)


# --- from the command line --------------------------------------------------------------------------------------------


def test_a_benchmark_that_fails_is_named_at_the_end_and_asked_again_alone(monkeypatch, tmp_path, capsys):
    cfg = composed("+experiment=evaluate", f"run_dir={tmp_path}", "checkpoint=c", "benchmarks=[held_out]")
    check(cfg)
    cfg.benchmarks = {"first": None, "second": "/data/second", "third": None}
    asked, broken = [], {"second"}

    def evaluation(experiment, part, *changes):
        asked.append(changes)
        if part.name in broken:
            raise UserError("No file.")
        part.mkdir()
        (part / "metrics.json").write_text(json.dumps({"score": part.name, "seconds": 2.0}))
        Run(part, experiment, "united", 1, {}).finish()

    monkeypatch.setattr("vllava.chain.run_apart", evaluation)
    with pytest.raises(UserError, match=r"1 of 3 benchmarks failed: second"):
        run_benchmarks(cfg)
    assert "error: second: No file." in capsys.readouterr().err and not (tmp_path / "metrics.json").exists()
    assert asked == [("benchmark=first",), ("benchmark=second", "benchmark.root=/data/second"), ("benchmark=third",)]
    broken.clear()
    run_benchmarks(cfg)
    assert len(asked) == 4 and "first: was done already" in capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert list(found["benchmarks"]) == ["first", "second", "third"] and found["seconds"] == 6.0


def test_an_evaluation_that_is_stopped_ends_after_a_block_and_goes_on(train, checkpoint, tmp_path):
    write_source(tmp_path / "s", [image_sample(f"k{n}", n) for n in range(60)], per_shard=60)
    given = ["+experiment=evaluate", f"checkpoint={checkpoint}", "trainer=single", "evaluation.batch_size=1"]
    given += [f"data.held_out.image=[{tmp_path / 's'}]", "evaluation.workers=0", "evaluation.max_new_tokens=20"]
    assert train(*given, f"run_dir={tmp_path / 'whole'}")[0] == 0
    stopped = tmp_path / "stopped"
    arguments = [*given, f"run_dir={stopped}", "logger=none", f"runs={tmp_path / 'elsewhere'}"]
    process = warm.Started(arguments, tmp_path / "log")
    part = stopped / "predictions" / "part-0.jsonl"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    code, _, told = process.end(60)
    assert code == 143 and part.read_bytes().endswith(b"\n")
    assert "stopped by SIGTERM. All answers that were given are kept" in told
    assert train(*arguments)[0] == 0
    for name in ("predictions.jsonl", "blind.jsonl", "answers.jsonl"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_evaluation_does_not_share_a_model_out(train, checkpoint):
    result = train("+experiment=evaluate", f"checkpoint={checkpoint}", "trainer=fsdp")
    assert_one_paragraph(result, "whole model on every device", "trainer=auto, ddp or single")


def test_several_benchmarks_have_a_folder_each_below_the_runs(train, checkpoint, tmp_path):
    write_source(tmp_path / "s", [image_sample("a"), video_sample("b")], per_shard=2)
    given = ["+experiment=evaluate", f"checkpoint={checkpoint}", f"run_dir={tmp_path / 'run'}", "trainer=single"]
    given += ["data.decoder=pyav", f"data.held_out.image=[{tmp_path / 's'}]", "benchmarks=[held_out]"]
    code, printed = train(*given)
    assert code == 0, printed
    part = tmp_path / "run" / "held_out"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["benchmarks"]["held_out"] == json.loads((part / "metrics.json").read_text())
    assert (part / "predictions.jsonl").is_file()


def test_a_result_goes_to_the_loggers_of_the_run(tmp_path):
    settings = settled("+experiment=evaluate", "logger=csv", f"run_dir={tmp_path}", "world=W")
    found = result("pope")
    log_result(settings, found, [])
    with open(tmp_path / "csv" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["pope/accuracy"]) == found.score("accuracy").value
