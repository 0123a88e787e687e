"""Many questions to a model: cut into blocks, answered once each, and written so that nothing is lost or mixed up."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, replace

import lightning as L
import pytest
from answering_run import ASKED, QUIET, ask_in_process, asked_of
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import jpeg, mp4

from vllava.batch import MediumSpec
from vllava.data.build import sample_decoder
from vllava.data.samples import Sample
from vllava.errors import UserError
from vllava.evaluation.answers import ask
from vllava.evaluation.blocks import blind, blocks
from vllava.evaluation.generate import Asking, answer
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import FileMedium, question


@pytest.fixture
def asking(model, make_packer):
    return Asking(model, make_packer(model), sample_decoder(model.specs, decoder="pyav"), 8, batch_size=4, workers=0)


@pytest.fixture
def counted(asking, monkeypatch):
    """How many media of each kind went through their encoder."""
    found = Counter()
    features = type(asking.model).features

    def count(self, kind, pixels):
        found[kind] += len(pixels)
        return features(self, kind, pixels)

    monkeypatch.setattr(type(asking.model), "features", count)
    return found


def by_id(answers):
    return {one.question.id: one.text for one in answers}


# --- blocks -----------------------------------------------------------------------------------------------------------

SPECS = {"image": MediumSpec(32, 5), "video": MediumSpec(32, 20, 4)}


@dataclass(frozen=True)
class Named:
    kind: str
    key: str


def about(drawn):
    return [question(str(n), text, *(Named("image", key) for key in keys)) for n, (text, keys) in enumerate(drawn)]


_shown = st.lists(st.sampled_from("uvwxyz"), max_size=2)
_questions = st.lists(st.tuples(st.text("abc ", max_size=30), _shown), max_size=40).map(about)


@settings(max_examples=100, deadline=None)
@given(_questions, st.integers(1, 9))
def test_every_question_is_in_one_block_and_with_all_others_about_its_medium(asked, size):
    cut = blocks(asked, SPECS, size)
    assert sorted(number for block in cut for number in block) == list(range(len(asked)))
    of_medium = {}
    for number, block in enumerate(cut):
        groups = Counter(asked[n].media[0].key if len(asked[n].media) == 1 else n for n in block)
        assert len(block) <= size or len(groups) == 1  # a batch, or all about one medium
        for n in block:
            if len(asked[n].media) == 1:
                assert of_medium.setdefault(asked[n].media[0].key, number) == number


@settings(max_examples=50, deadline=None)
@given(_questions, st.integers(1, 9))
def test_blocks_come_with_the_longest_prompts_first(asked, size):
    lengths = [len(one.conversation[-1]["value"]) + 4 * 5 * len(one.media) for one in asked]
    longest = [max(lengths[number] for number in block) for block in blocks(asked, SPECS, size)]
    assert longest == sorted(longest, reverse=True)


def test_a_block_is_filled_with_whole_groups_up_to_the_batch_size():
    keys = [key for key in ("x", "yy", "zzz") for _ in range(3)]
    asked = [question(str(n), "a" * (9 - len(key)), Named("image", key)) for n, key in enumerate(keys)]
    assert [len(block) for block in blocks(asked, SPECS, 6)] == [6, 3]
    assert [len(block) for block in blocks(asked, SPECS, 5)] == [3, 3, 3]
    assert [len(block) for block in blocks(asked, SPECS, 2)] == [3, 3, 3]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_loop_over_one_question_at_a_time(asking, tmp_path):
    asked = asked_of(tmp_path)
    found = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    for one, answered in zip(asked, found, strict=True):
        media = [getattr(asking.decode, medium.kind)(medium.read()) for medium in one.media]
        [alone] = ask(asking.model, asking.packer, [Sample(one.id, list(one.conversation), media)], 8)
        assert (answered.question, answered.text, answered.broken) == (one, alone, "")
    assert len(set(by_id(found).values())) > 5  # or nothing was compared


@pytest.mark.parametrize("workers", [0, 2])
def test_a_medium_is_decoded_and_encoded_once_for_all_its_questions(asking, tmp_path, counted, workers):
    asked = asked_of(tmp_path)
    answer(replace(asking, workers=workers), asked, Predictions(tmp_path, "predictions", ASKED))
    read = Counter((tmp_path / "log").read_text().split())
    assert set(read.values()) == {1} and len(read) == 6
    assert counted == {"image": 3, "video": 3}


def test_the_file_of_predictions_is_in_the_order_of_the_questions_and_alone(asking, tmp_path):
    asked = asked_of(tmp_path)
    found = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines == [{"id": one.question.id, "answer": one.text} for one in found]
    assert [line["id"] for line in lines] == [one.id for one in asked]
    assert not (tmp_path / "predictions").exists()


def test_workers_change_no_answer(asking, tmp_path):
    asked = asked_of(tmp_path)
    answer(asking, asked, Predictions(tmp_path, "alone", ASKED))
    answer(replace(asking, workers=2), asked, Predictions(tmp_path, "with", ASKED))
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "with.jsonl").read_bytes()


def test_blind_questions_show_no_medium(asking, tmp_path):
    asked = [blind(one) for one in asked_of(tmp_path)]
    assert not any(one.media or "<" in one.conversation[-1]["value"] for one in asked)
    found = answer(asking, asked, Predictions(tmp_path, "blind", ASKED))
    assert not (tmp_path / "log").exists() and all(one.text is not None for one in found)
    same = {}
    for one in found:  # without the medium, equal words have one answer
        assert same.setdefault(one.question.prompt, one.text) == one.text


def test_no_questions_have_no_answers(asking, tmp_path):
    assert answer(asking, [], Predictions(tmp_path, "predictions", ASKED)) == []


# --- what cannot be asked ---------------------------------------------------------------------------------------------


def test_a_broken_or_missing_medium_breaks_its_questions_and_no_other(asking, tmp_path):
    asked = asked_of(tmp_path)
    whole = by_id(answer(asking, asked, Predictions(tmp_path, "whole", ASKED)))
    (tmp_path / "image-2").write_bytes(b"no picture")
    (tmp_path / "video-3").unlink()
    (tmp_path / "video-5").write_bytes(mp4()[:200])
    found = answer(replace(asking, workers=1), asked, Predictions(tmp_path, "damaged", ASKED))
    broken = {one.question.id: one.broken for one in found if one.text is None}
    assert set(broken) == {f"q{number}-{i}" for number in (2, 3, 5) for i in range(4)}
    assert "unreadable image" in broken["q2-0"] and "No such file" in broken["q3-0"] and broken["q5-0"]
    assert {id: text for id, text in by_id(found).items() if text is not None} == {
        id: text for id, text in whole.items() if id not in broken
    }
    again = answer(asking, asked, Predictions(tmp_path, "damaged", ASKED))
    assert again == found  # a broken one is done


def test_a_prompt_that_leaves_no_room_for_an_answer_is_broken_and_never_cut(asking, tmp_path):
    asked = [question("long", "Why? " * 300), question("short", "Why?")]
    long, short = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    assert long.text is None and "context is 512" in long.broken and short.text is not None


def test_a_prompt_near_the_end_of_the_context_has_as_much_room_as_is_left(asking, tmp_path):
    def length(one):
        return len(asking.packer.prompt(Sample("q", list(one.conversation), [])))

    near = next(one for n in range(400) if length(one := question("near", "Why? " * n)) > 490)
    short, room = question("short", "Why?"), 512 - length(near)
    most = replace(asking, max_new_tokens=40)
    found = answer(most, [near, short], Predictions(tmp_path, "predictions", ASKED))
    [alone] = ask(asking.model, asking.packer, [Sample("q", list(near.conversation), [])], room)
    assert 0 < room < 40 and found[0].text == alone


def test_a_placeholder_that_is_text_is_not_taken_for_a_medium(asking, tmp_path):
    (tmp_path / "i").write_bytes(jpeg())
    image = FileMedium("image", tmp_path / "i")
    asked = [question("own", "What does <image> mean?", image), question("other", "What does <video> mean?", image)]
    asked.append(question("none", "What does <image> mean?"))
    own, other, none = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    assert own.text is None and "itself holds <image>" in own.broken
    assert other.text is not None and none.text is not None


# --- stopped and started again ----------------------------------------------------------------------------------------


class StopAfter(L.Callback):
    def __init__(self, blocks):
        self.blocks = blocks

    def on_predict_batch_end(self, *_):
        self.blocks -= 1
        if not self.blocks:
            raise KeyError("stop")


def one_process(*callbacks):
    return L.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **QUIET)


def test_only_what_is_missing_is_asked_again(asking, tmp_path, counted):
    asked = asked_of(tmp_path)
    answer(asking, asked, Predictions(tmp_path, "whole", ASKED))
    assert counted == {"image": 3, "video": 3}
    for _ in range(3):
        with pytest.raises(KeyError):
            answer(asking, asked, Predictions(tmp_path, "stopped", ASKED), one_process(StopAfter(2)))
        assert (tmp_path / "stopped" / "part-0.jsonl").is_file() and not (tmp_path / "stopped.jsonl").exists()
    answer(asking, asked, Predictions(tmp_path, "stopped", ASKED))
    assert counted == {"image": 6, "video": 6}  # none was encoded twice
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "log").unlink()
    answer(asking, asked, Predictions(tmp_path, "stopped", ASKED))
    assert not (tmp_path / "log").exists()  # finished


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_was_cut_is_asked_again_and_hurts_no_other(asking, tmp_path, cut):
    asked = asked_of(tmp_path)
    answer(asking, asked, Predictions(tmp_path, "whole", ASKED))
    with pytest.raises(KeyError):
        answer(asking, asked, Predictions(tmp_path, "cut", ASKED), one_process(StopAfter(3)))
    part = tmp_path / "cut" / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    with pytest.raises(KeyError):
        answer(asking, asked, Predictions(tmp_path, "cut", ASKED), one_process(StopAfter(1)))
    answer(asking, asked, Predictions(tmp_path, "cut", ASKED))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("finished", [False, True])
def test_answers_to_something_else_are_set_aside_with_a_warning(asking, tmp_path, caplog, finished):
    asked = asked_of(tmp_path)
    other = Predictions(tmp_path, "predictions", {**ASKED, "checkpoint": "another"})
    with pytest.raises(KeyError):
        answer(asking, asked, other, one_process(StopAfter(2)))
    lines = (tmp_path / "predictions" / "part-0.jsonl").read_text().replace('"answer": "', '"answer": "stale ')
    (tmp_path / "predictions" / "part-0.jsonl").write_text(lines)
    if finished:
        answer(asking, asked, other)
    with caplog.at_level(logging.WARNING):
        found = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    assert "answers to something else (other checkpoint): set aside" in caplog.text
    assert not any("stale" in one.text for one in found)
    aside = tmp_path / "predictions.other-1"
    assert "stale" in "".join(path.read_text() for path in aside.rglob("*.jsonl"))


def test_parts_that_do_not_say_what_they_answer_are_set_aside(asking, tmp_path, caplog):
    asked = asked_of(tmp_path)
    (tmp_path / "predictions").mkdir()
    stale = [{"id": one.id, "answer": "stale"} for one in asked]
    (tmp_path / "predictions" / "part-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stale))
    found = answer(asking, asked, Predictions(tmp_path, "predictions", ASKED))
    assert "nothing says to what" in caplog.text and "stale" not in by_id(found).values()


def test_answers_of_another_run_are_taken_where_the_same_was_asked(tmp_path):
    lines = [{"id": "a", "answer": "one"}, {"id": "b", "broken": "gone"}]
    for name, asked in (("first", ASKED), ("second", {**ASKED, "max_new_tokens": 5})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        run = Predictions(tmp_path / "runs" / name, "predictions", asked)
        run.prepare()
        run.append(0, lines)
        run.finish(["a", "b"])
    (tmp_path / "runs" / "mine").mkdir()
    mine = Predictions(tmp_path / "runs" / "mine", "predictions", ASKED)
    assert mine.take(tmp_path / "runs", ["a", "b", "c"]) is None
    assert mine.take(tmp_path / "runs", ["a", "b"]) == tmp_path / "runs" / "first"
    assert mine.read() == {"a": lines[0], "b": lines[1]}


def test_a_prediction_that_is_missing_in_the_end_is_an_error(tmp_path):
    mine = Predictions(tmp_path, "predictions", ASKED)
    mine.prepare()
    mine.append(0, [{"id": "a", "answer": "one"}])
    with pytest.raises(UserError, match="1 questions have no answer, the first 'b'"):
        mine.finish(["a", "b"])
    assert not mine.file.exists()


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starter():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllava.run", "data_prep.shards"])  # what takes long to import
    return context


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_run_that_is_killed_again_and_again_ends_with_the_predictions_of_an_undisturbed_one(
    starter, checkpoint, tmp_path
):
    """By one process and by two in turn, with a kill of either, or of both, at any moment."""
    chance = random.Random(0)
    media, whole, killed = (tmp_path / name for name in ("media", "whole", "killed"))
    for folder in (media, whole, killed):
        folder.mkdir()

    def start(folder, ranks):
        port = free_port()
        given = [(str(checkpoint), media, folder, rank, ranks, port) for rank in range(ranks)]
        processes = [starter.Process(target=ask_in_process, args=one) for one in given]
        for process in processes:
            process.start()
        return processes

    def end(processes):
        for process in processes:
            process.join(120)
        assert all(process.exitcode == 0 for process in processes)

    asked_of(media, media=12)  # their files are there
    end(start(whole, 1))
    kills, lives, seen = 0, 0, set()
    while kills < 12:
        shutil.rmtree(killed)
        killed.mkdir()
        for turn in range(100):
            ranks = 1 + (turn + lives) % 2
            processes = start(killed, ranks)
            part = killed / "predictions"
            before = sum(path.stat().st_size for path in part.glob("part-*")) if part.exists() else 0
            limit = time.monotonic() + 60
            # Let it get somewhere, so that kills fall among the answers and not all before them.
            while (
                time.monotonic() < limit
                and any(process.is_alive() for process in processes)
                and (sum(path.stat().st_size for path in part.glob("part-*")) if part.exists() else 0) <= before
            ):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.25))
            alive = [process for process in processes if process.is_alive()]
            if not alive or kills >= 12:
                end(processes)
                break
            os.kill(chance.choice(alive).pid, signal.SIGKILL)
            kills += 1
            seen.add(ranks)
            time.sleep(chance.choice([0, 0.05]))
            for process in processes:
                process.kill()
                process.join()
        else:
            pytest.fail("it does not come to an end")
        lives += 1
        assert (killed / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert seen == {1, 2}
