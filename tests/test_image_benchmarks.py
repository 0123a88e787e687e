"""The image benchmarks are read from both layouts, and what is wrong with their files is named."""

import hashlib
import json
import pickle
from http.server import BaseHTTPRequestHandler

import benchmark_fixtures as fixtures
import huggingface_hub
import pytest
from benchmark_fixtures import (
    LAYOUTS,
    LETTER,
    NAMES,
    PREPARED,
    SHORT,
    answered,
    asked,
    benchmark,
    damaged,
    figures,
    settings,
    write,
)
from http_server import LocalServer

from vllava.errors import UserError
from vllava.evaluation.questions import FileMedium

# --- what they share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_questions_have_unique_ids_and_images_that_can_be_read(name, layout, tmp_path):
    found, questions = asked(name, layout, tmp_path)
    assert len({question.id for question in questions}) == len(questions) >= 3
    for question in questions:
        for medium in question.media:
            medium = pickle.loads(pickle.dumps(medium))
            assert medium.kind == "image" and medium.read().startswith(b"the image ")
    built = {("text_vqa", "tables"), ("science_qa", "tables")}
    assert [warning.split(" are")[0] for warning in found.warnings] == ["prompts"] * ((name, layout) in built)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_ask_the_same(name, tmp_path):
    _, files = asked(name, "files", tmp_path / "eval")
    _, tables = asked(name, "tables", tmp_path / "hub")
    if name == "science_qa":
        files = [question for question in files if question.media]
    key = (lambda question: question.id) if name == "text_vqa" else None
    files, tables = (sorted(questions, key=key) if key else questions for questions in (files, tables))
    assert [question.prompt for question in files] == [question.prompt for question in tables]
    assert [question.truth for question in files] == [question.truth for question in tables]
    contents = [[[medium.read() for medium in question.media] for question in group] for group in (files, tables)]
    same = [len({medium.key for question in group for medium in question.media}) for group in (files, tables)]
    assert same[0] == same[1], "an image is one in both"
    assert len({str(content) for content in contents[1]}) == len({str(content) for content in contents[0]})


@pytest.mark.parametrize("name", NAMES)
def test_a_questions_row_is_wrong_where_it_could_not_be_asked(name, tmp_path):
    found, questions = asked(name, "files", tmp_path)
    rows = found.rows(answered(questions, {}), {})
    if found.metrics:
        assert rows and figures(found, rows)[next(m.name for m in found.metrics if m.headline)] == 0
    else:
        assert rows == []


@pytest.mark.parametrize("name", NAMES)
def test_the_published_lines_hold_what_was_asked_and_answered(name, tmp_path):
    found, questions = asked(name, "files", tmp_path)
    answers = answered(questions, {question.id: "B" for question in questions[1:]})
    lines = found.exports(answers)["merge.jsonl"]
    assert len(lines) == len(questions) - 1  # what could not be asked has no line
    assert lines == json.loads(json.dumps(lines)) == found.exports(answers)["merge.jsonl"]
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= set(lines[0])
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert all(line["text"] == "B" and line["metadata"] == {} for line in lines)


def test_prompts_of_lines_are_those_of_the_original_s_runners(tmp_path):
    def first(name):
        found, questions = asked(name, "files", tmp_path)
        return found.exports(answered(questions, {q.id: "x" for q in questions}))["merge.jsonl"][0]

    assert first("pope")["prompt"] == "Is there a dog in the image?" + SHORT
    assert first("science_qa")["prompt"] == "<image>\nWhich is solid?\nA. milk\nB. rock" + LETTER
    mmbench = first("mmbench")
    assert mmbench["prompt"] == "Look.\nWhat is it?\nA. cat\nB. dog"
    assert (mmbench["round_id"], mmbench["options"], mmbench["option_char"]) == (0, ["cat", "dog"], ["A", "B"])
    added = ["round_id", "prompt", "text", "options", "option_char"]
    assert list(mmbench) == ["question_id", *added, "answer_id", "model_id", "metadata"]
    assert first("text_vqa")["question_id"] == "bb2"  # the image, as published


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_data_is_refused_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(UserError, match=r"No data of this benchmark at .*neither .*nor .*nor a Parquet file"):
        benchmark(name, tmp_path).questions()


def test_a_name_on_a_hub_that_cannot_be_reached_is_refused():
    with pytest.raises(UserError, match="There is no folder some/where, and the hub gives no data set"):
        benchmark("pope", "some/where").questions()


def test_the_folder_of_the_benchmark_itself_is_found_too(tmp_path):
    fixtures.pope_files(tmp_path)
    assert benchmark("pope", tmp_path / "pope").questions() == benchmark("pope", tmp_path).questions()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_another_number_than_was_published_is_said(name, layout, tmp_path):
    found, questions = asked(name, layout, tmp_path, expected=settings(name).expected)
    [said] = [warning for warning in found.warnings if "published" in warning and "found" in warning]
    assert said.startswith(f"{len(questions)} questions are found, {settings(name).expected:,} ")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mmbench"])
def test_images_that_are_missing_are_counted_with_an_example(name, tmp_path):
    write(name, "files", tmp_path)
    image = benchmark(name, tmp_path).questions()[0].media[0]
    assert isinstance(image, FileMedium)
    image.path.unlink()
    found = benchmark(name, tmp_path)
    found.questions()
    assert [warning for warning in found.warnings if "1 of" in warning and str(image.path) in warning]


def test_warnings_are_said_once_however_often_questions_are_read(tmp_path):
    found, _ = asked("text_vqa", "tables", tmp_path)
    found.questions()
    assert len(found.warnings) == 1


# --- files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREPARED)
def test_a_line_that_is_cut_is_named(name, tmp_path):
    error, path = damaged(name, tmp_path, lambda lines: [lines[0], lines[1][:20]])
    assert f"{path}:2: this is no JSON" in error


@pytest.mark.parametrize("name", ["vizwiz", "vqav2", "gqa"])
def test_an_id_twice_is_named(name, tmp_path):
    error, path = damaged(name, tmp_path, lambda lines: [*lines, lines[0]])
    assert repr(str(json.loads(path.read_text().splitlines()[0])["question_id"])) in error and "twice" in error


@pytest.mark.parametrize("name", PREPARED)
def test_a_field_that_is_missing_is_named(name, tmp_path):
    error, path = damaged(name, tmp_path, lambda lines: [lines[0].replace('"text"', '"txt"'), *lines[1:]])
    assert f"{path}:1: the record has no 'text'" in error


@pytest.mark.parametrize("name", PREPARED)
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    def change(lines):
        return [json.dumps(json.loads(lines[0]) | {"image": "../secret.jpg"}), *lines[1:]]

    error, _ = damaged(name, tmp_path, change)
    assert "../secret.jpg" in error


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json"),
        ("science_qa", "scienceqa/problems.json"),
        ("text_vqa", "textvqa/TextVQA_0.5.1_val.json"),
        ("vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json"),
        ("pope", "pope/coco/coco_pope_random.json"),
    ],
)
def test_a_file_of_answers_that_is_missing_or_cut_is_named(name, path, tmp_path):
    write(name, "files", tmp_path)
    (tmp_path / path).write_text((tmp_path / path).read_text()[:-30])
    with pytest.raises(UserError, match=rf"{path}:\d+: this is no JSON"):
        benchmark(name, tmp_path).questions()
    (tmp_path / path).unlink()
    with pytest.raises(UserError, match=f"There is no file .*{path}"):
        benchmark(name, tmp_path).questions()


@pytest.mark.parametrize("content", ["[1]", '{"201": 3, "4": 3, "data": 3}'])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json"),
        ("science_qa", "scienceqa/problems.json"),
        ("text_vqa", "textvqa/TextVQA_0.5.1_val.json"),
    ],
)
def test_a_file_of_answers_that_holds_something_else_is_named(name, path, content, tmp_path):
    write(name, "files", tmp_path)
    (tmp_path / path).write_text(content)
    with pytest.raises(UserError, match=rf"{path}.*(holds no|is no record)"):
        benchmark(name, tmp_path).questions()


def test_an_image_s_number_that_is_none_is_named(tmp_path):
    fixtures.vqav2_files(tmp_path)
    path = tmp_path / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(path.read_text().replace('"image_id": 2', '"image_id": "two"'))
    with pytest.raises(UserError, match="questions, record 2: image_id 'two' is no number"):
        benchmark("vqav2_val", tmp_path).questions()


def test_a_table_that_is_cut_is_named(tmp_path):
    fixtures.vizwiz_tables(tmp_path)
    path = tmp_path / "data" / "val-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"val-00000-of-00001\.parquet cannot be read"):
        benchmark("vizwiz_val", tmp_path).questions()


def test_a_table_without_a_column_is_refused_with_what_it_has(tmp_path):
    fixtures.write_table(tmp_path / "test.parquet", [{"id": 1, "text": "?"}])
    with pytest.raises(UserError, match=r"no Parquet file with the columns question_id, question, image.*id, text"):
        benchmark("vizwiz", tmp_path).questions()


def test_a_split_is_not_taken_for_another(tmp_path):
    fixtures.vizwiz_tables(tmp_path)
    (tmp_path / "data" / "val-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="no split val or validation; it has test"):
        benchmark("vizwiz_val", tmp_path).questions()


def test_a_table_of_any_name_is_read_by_its_columns(tmp_path):
    fixtures.vizwiz_tables(tmp_path)
    (tmp_path / "data" / "val-00000-of-00001.parquet").rename(tmp_path / "mine.parquet")
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert len(benchmark("vizwiz_val", tmp_path).questions()) == 3


# --- tables -----------------------------------------------------------------------------------------------------------


def test_an_image_in_a_table_is_read_with_its_row_group_alone(tmp_path, monkeypatch):
    from vllava.evaluation import tables

    fixtures.write_table(tmp_path / "x.parquet", [{"id": n, "image": fixtures.stored(n)} for n in range(6)], group=2)
    records = tables.read_table(tmp_path, {"id": ("id",), "image": ("image",)})
    media = [record["image"] for record in records]
    assert [(medium.row_group, medium.row) for medium in media] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({medium.key for medium in media}) == 6
    tables._cells.cache_clear()
    assert [medium.read() for medium in media] == [f"the image {n}".encode() for n in range(6)]
    assert tables._cells.cache_info().misses == 3 and tables._cells.cache_info().maxsize == 1


def test_an_image_beside_a_table_is_found(tmp_path):
    from vllava.evaluation import tables

    rows = [{"id": 1, "image": {"bytes": None, "path": "a.jpg"}}]
    fixtures.write_table(tmp_path / "x.parquet", rows)
    fixtures.write_images(tmp_path, "a.jpg")
    [record] = tables.read_table(tmp_path, {"id": ("id",), "image": ("image",)})
    assert record["image"].read() == b"the image a.jpg"


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A hub with one data set, owner/pope, at one revision; `world.files`: name -> bytes."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files, sha = self.world.files, "5" * 40
        path = self.path.partition("?")[0]
        name = path.rpartition(f"/resolve/{sha}/")[2]
        if path.startswith("/api/datasets/owner/pope/tree"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha} for name, data in files.items()]
            status, data, kind = 200, json.dumps(tree).encode(), "application/json"
        elif path.startswith("/api/datasets/owner/pope"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            about = {"id": "owner/pope", "sha": sha, "siblings": siblings, "private": False, "tags": []}
            status, data, kind = 200, json.dumps(about).encode(), "application/json"
        elif path.startswith("/datasets/owner/pope/resolve/") and name in files:
            status, data, kind = 200, files[name], "application/octet-stream"
            self.world.fetched.add(name)
        else:
            status, data, kind = 404, b"", "text/plain"
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": sha}
        for header in {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def test_a_data_set_on_a_hub_is_fetched_with_a_word_about_it_and_only_what_is_needed(tmp_path, monkeypatch, caplog):
    fixtures.pope_tables(tmp_path / "here")
    hub = LocalServer(Hub)
    hub.fetched = set()
    hub.files = {str(p.relative_to(tmp_path / "here")): p.read_bytes() for p in (tmp_path / "here").rglob("*.parquet")}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    try:
        with caplog.at_level("WARNING"):
            questions = benchmark("pope", "owner/pope").questions()
    finally:
        hub.close()
    assert len(questions) == 9 and questions[0].media[0].read() == b"the image im1"
    assert hub.fetched == {f"Full/{setting}-00000-of-00001.parquet" for setting in fixtures.POPE}
    assert "owner/pope: 3 files, 0.00 GB, are fetched from the hub" in caplog.text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what was fetched is found
    assert len(benchmark("pope", "owner/pope").questions()) == 9
