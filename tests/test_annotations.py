"""Data sets as their files say them, and the rows of annotation files of every kind."""

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_fixtures import turns

from data_prep import json_rows as json_module
from data_prep.annotations import annotation_files, count, read_dataset, rows
from data_prep.dataset import CONF
from data_prep.rows import draft
from vllava.errors import UserError

ROWS = [{"id": n, "image": f"{n}.jpg", "conversations": turns("<image>\nWhat?", f"Ünï {n}")} for n in range(5)]
JPEG = b"\xff\xd8\xff\xe0 a picture"


def mine(folder, *overrides, annotations="a.json"):
    return read_dataset("mine", [f"root={folder}", f"annotations={annotations}", *overrides])


def read(folder, *overrides, annotations="a.json"):
    return list(rows(mine(folder, *overrides, annotations=annotations)))


def why(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        result = function(*args, **kwargs)
        if result is not None and not isinstance(result, (list, int)):
            list(result)
    return error.value.paragraph


# --- the published data sets ------------------------------------------------------------------------------------------


def published(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def drafts(name, root, *overrides):
    dataset = read_dataset(name, [f"root={root}", *overrides])
    return [draft(row, dataset) for _, row in rows(dataset)]


def places(made, root):
    return [[(ref.kind, ref.path.relative_to(root).as_posix()) for ref in one.media] for one in made]


def test_llava_pretrain_lies_as_it_is_published(tmp_path):
    row = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns("Describe.\n<image>", "foam")}
    published(tmp_path, "blip_laion_cc_sbu_558k.json", [row])
    assert places(drafts("llava_pretrain", tmp_path), tmp_path) == [[("image", "00453/004539375.jpg")]]
    (tmp_path / "images").mkdir()
    assert places(drafts("llava_pretrain", tmp_path), tmp_path) == [[("image", "images/00453/004539375.jpg")]]


@pytest.mark.parametrize("file", ["valley_.json", "valley.json", "valley_llavaimage.json"])
def test_valley_lies_as_video_llava_released_it(tmp_path, file):
    video = {"id": 0, "video": "valley/000001_000050/1066674784.mp4", "conversations": turns("<video>\nSay.", "A sea.")}
    image = {"id": 0, "image": "llava_image/00453/004539375.jpg", "conversations": turns("<image>\nSay.", "foam")}
    published(tmp_path, file, [video, image] if "image" in file else [video])
    made = places(drafts("valley", tmp_path), tmp_path)
    assert made[0] == [("video", "valley/000001_000050/1066674784.mp4")]
    assert made[1:] == [[("image", "llava_image/00453/004539375.jpg")]] * ("image" in file)


def test_the_mix_of_665k_rows_has_five_folders_of_images_and_rows_without_one(tmp_path):
    images = [
        "coco/train2017/000000033471.jpg",
        "gqa/images/2354786.jpg",
        "ocr_vqa/images/140031996.jpg",
        "textvqa/train_images/2f8b2b8c.jpg",
        "vg/VG_100K/2.jpg",
        "vg/VG_100K_2/1.jpg",
    ]
    content = [
        {"id": n, "image": image, "conversations": turns("<image>\nWhat?", "A.")} for n, image in enumerate(images)
    ]
    content += [{"id": "wgByO4Y_0", "model": "", "conversations": turns("Hi", "Ho", "Hu", "Ha")}]
    published(tmp_path, "llava_v1_5_mix665k.json", content)
    made = drafts("llava_mix665k", tmp_path)
    assert places(made, tmp_path) == [*([("image", image)] for image in images), []]
    assert made[-1].record == {
        "id": "wgByO4Y_0",
        "source": "llava_mix665k",
        "conversations": content[-1]["conversations"],
    }


def test_texts_of_video_llavas_release_are_a_file_of_their_own(tmp_path):
    published(
        tmp_path,
        "llava_image_tune_.json",
        [{"image": "llava_image_tune/vg/VG_100K/2.jpg", "conversations": turns("<image>", "A.")}],
    )
    published(tmp_path, "nlp_tune.json", [{"id": "7", "model": "", "conversations": turns("Hi", "Ho")}])
    made = drafts("llava_mix665k", tmp_path, "annotations=[llava_image_tune_.json,nlp_tune.json]")
    assert places(made, tmp_path) == [[("image", "llava_image_tune/vg/VG_100K/2.jpg")], []]


def test_videochatgpt_lies_as_video_llava_released_it(tmp_path):
    row = {"id": 0, "video": "videochatgpt_tune/v_x-Y_1.mp4", "conversations": turns("<video>\nWhat?", "A.")}
    (tmp_path / "videochatgpt_tune").mkdir()
    for file in ("videochatgpt_llavaimage_tune.json", "videochatgpt_tune_.json"):
        published(tmp_path, file, [row])
        assert places(drafts("videochatgpt", tmp_path), tmp_path) == [[("video", "videochatgpt_tune/v_x-Y_1.mp4")]]


def test_video_instruct_is_questions_answers_and_ids(tmp_path):
    published(tmp_path, "VideoInstruct_Dataset.json", [{"q": "What?", "a": "A man.", "video_id": "v_x-Y_1"}])
    assert places(drafts("videochatgpt", tmp_path), tmp_path) == [[("video", "v_x-Y_1")]]
    (tmp_path / "Activity_Videos").mkdir()
    (made,) = drafts("videochatgpt", tmp_path)
    assert places([made], tmp_path) == [[("video", "Activity_Videos/v_x-Y_1")]]
    assert made.record["conversations"] == turns("<video>\nWhat?", "A man.")
    (elsewhere,) = drafts("videochatgpt", tmp_path, "videos=/films", "videos_by_id=/films")
    assert elsewhere.media[0].path == Path("/films/v_x-Y_1")


# --- data sets --------------------------------------------------------------------------------------------------------


def test_every_data_set_of_conf_says_where_its_files_are(tmp_path):
    names = {path.stem for path in CONF.glob("*.yaml")}
    assert names >= {"llava_pretrain", "valley", "llava_mix665k", "videochatgpt", "mine"}
    for name in names:
        assert read_dataset(name, [f"root={tmp_path}"]).name == name


def test_a_data_set_may_be_a_file_anywhere(tmp_path):
    file = tmp_path / "cats.yaml"
    file.write_text("root: ${oc.env:PWD}\nannotations: a.json\nfields: {image: picture}\nspeakers: {cat: gpt}\n")
    dataset = read_dataset(file, [f"root={tmp_path}", "outside=true", "fields.answer=[reply,a]", "split=1"])
    assert (dataset.name, dataset.root, dataset.outside, dataset.split) == ("cats", tmp_path, True, "1")
    assert (dataset.fields.image, dataset.fields.answer) == (("picture",), ("reply", "a"))
    assert dataset.speakers == {"cat": "gpt"}


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
    root = f"root={tmp_path}"
    assert "Did you mean 'llava_pretrain'?" in why(read_dataset, "llava_pretrian")
    assert "There is no file" in why(read_dataset, "none.yaml")
    assert "add root=…" in why(read_dataset, "valley")
    assert "There is no folder /nowhere" in why(read_dataset, "valley", ["root=/nowhere"])
    assert "did you mean 'images'?" in why(read_dataset, "valley", [root, "image=x"])
    assert "did you mean 'video_id'?" in why(read_dataset, "valley", [root, "fields.videoid=x"])
    assert "no setting" in why(read_dataset, "valley", [root, "outside"])
    assert "true or false" in why(read_dataset, "valley", [root, "outside=maybe"])
    assert "a text or a list of texts" in why(read_dataset, "valley", [root, "annotations=[1,2]"])
    assert "of the form" in why(read_dataset, "valley", [root, "speakers={cat: dog}"])
    assert "of the form" in why(read_dataset, "valley", [root, "fields=image"])
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "no mapping" in why(read_dataset, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    assert "cannot be read" in why(read_dataset, tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "does not say root" in why(read_dataset, tmp_path / "empty.yaml")


def test_files_are_read_in_the_order_given_and_globs_in_that_of_names(tmp_path):
    for name in ("b.json", "a.json", "x[1].json"):
        (tmp_path / name).write_text("[]")
    assert [f.name for f in annotation_files(mine(tmp_path, annotations="[b.json,a.json]"))] == ["b.json", "a.json"]
    assert [f.name for f in annotation_files(mine(tmp_path, annotations="?.json"))] == ["a.json", "b.json"]
    assert [f.name for f in annotation_files(mine(tmp_path, annotations="'x[1].json'"))] == ["x[1].json"]
    assert [f.name for f in annotation_files(mine(tmp_path, annotations=f"{tmp_path}/b*"))] == ["b.json"]
    assert "There is no" in why(annotation_files, mine(tmp_path, annotations="c.json"))
    assert "named twice" in why(annotation_files, mine(tmp_path, annotations="[a.json,a*]"))


# --- JSON -------------------------------------------------------------------------------------------------------------

TEXTS = {
    "list": json.dumps(ROWS),
    "list over many lines": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "list with a comma too many": json.dumps(ROWS)[:-1] + ",\n]\n",
    "lines": "\n".join(map(json.dumps, ROWS)),
    "lines with empty ones": "\r\n\n".join(map(json.dumps, ROWS)) + "\n\n",
    "byte order mark": "\ufeff" + json.dumps(ROWS),
    "lines with a byte order mark": "\ufeff" + "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_read_whatever_its_form_and_name(tmp_path, text, pack, name):
    (tmp_path / name).write_bytes(pack(TEXTS[text].encode()))
    found = read(tmp_path, annotations=name)
    assert [row for _, row in found] == ROWS
    assert found[3][0].startswith(f"{name} {'line' if 'lines' in text else 'row'} ") or "many" in text
    assert count(mine(tmp_path, annotations=name)) == len(ROWS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_rows_do_not_depend_on_where_the_reader_pauses(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(json_module, "CHUNK", chunk)
    values = [
        {"é": '\\"\U0001f600\ud83d'},
        {"n": [1.5e3, -2, True, None, "\t"]},
        {},
        {"a": {"b": [[]]}},
        12345,
        "x",
        None,
    ]
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert [row for _, row in json_module.json_rows(tmp_path / "a.json")] == values


def test_a_row_says_where_it_stands(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]))
    assert [where for where, _ in read(tmp_path, annotations="[a.json,b.jsonl]")] == [
        *(f"a.json row {n}" for n in range(5)),
        "b.jsonl line 2",
        "b.jsonl line 4",
    ]


def test_what_is_no_row_is_said_and_the_others_are_read(tmp_path):
    (tmp_path / "a.json").write_text('[1, "x", null, [], {"a": NaN, "b": "raw\ttab"}]')
    assert [row for _, row in read(tmp_path)][:4] == [
        f"the row is not an object but {kind}" for kind in ("int", "str", "NoneType", "list")
    ]
    lines = [
        b'{"a": 1}',
        b'{"a": ',
        b"x",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b"7",
        b'{"b": 2}',
    ]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    found = [row for _, row in read(tmp_path, annotations="b.jsonl")]
    assert [row for row in found if isinstance(row, dict)] == [{"a": 1}, {"a": "\udcff"}, {"b": 2}]
    assert [row.split(":")[0] for row in found if isinstance(row, str)] == [
        *["the line is no JSON"] * 4,
        "the row is not an object but int",
    ]
    assert count(mine(tmp_path, annotations="b.jsonl")) == len(lines)


def test_a_line_beyond_measure_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(json_module, "ROW_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 500 + '"}\n{"b": 2}\n')
    assert [row for _, row in read(tmp_path, annotations="a.jsonl")] == [
        {"a": 1}, "the line is longer than 100 bytes", {"b": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"id,image\n1,a.jpg\n", "neither JSON nor Parquet nor Arrow"),
        (json.dumps(ROWS).encode()[:-40], "cannot be read from row 4 on"),
        (json.dumps(ROWS).encode()[:-1], "ends after row 4"),
        (b'[{"a": 1}, {"a": oops}, {"a": 2}]', "cannot be read from row 1 on"),
        (b'[{"a": "' + b"\\uZZZZ" + b'"}' + b" " * 100 + b"]", "cannot be read from row 0 on"),
        (b"[" * 100_000, "cannot be read from row 0 on"),
        (json.dumps(ROWS).encode() * 2, "goes on after its list"),
        (json.dumps(ROWS).encode("utf-16"), "UTF-16"),
        (gzip.compress(json.dumps(ROWS).encode())[:-20], "cannot be read"),
        (b'{"info": 1, "data": [{}]}', "add rows=data"),
        (b'{\n"info": {"data": []}, "x": 2}', "one object without a list of rows; its keys: 'info', 'x'"),
        (b"PAR1 not really", "cannot be read"),
        (b"ARROW1 not really", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_refused_by_name(tmp_path, content, reason):
    if reason == "add rows=data":
        content = content.replace(b",", b",\n")
    (tmp_path / "a.json").write_bytes(content)
    message = why(read, tmp_path)
    assert reason in message and "a.json" in message


def test_rows_inside_an_object_are_found_by_their_key(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"info": {"data": [1]}, "data": ROWS, "end": 1}))
    assert [row for _, row in read(tmp_path, "rows=data")] == ROWS
    assert "without a list of rows under 'rows'" in why(read, tmp_path, "rows=rows")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "saved"])
def test_memory_is_bounded_whatever_the_number_of_rows(tmp_path, name):
    number, row = 20_000, {"id": 1, "conversations": turns("x" * 200, "y" * 200)}
    text = json.dumps(row)
    if name == "a.parquet":
        pq.write_table(
            pa.Table.from_pylist([row] * number), tmp_path / name, row_group_size=5_000, use_dictionary=False
        )
    elif name == "saved":
        save_to_disk(tmp_path / name, pa.Table.from_pylist([row] * number), chunk=1_000)
    else:
        content = f"[{', '.join([text] * number)}]" if name == "a.json" else "\n".join([text] * number)
        (tmp_path / name).write_text(content)
    dataset, arrow = mine(tmp_path, annotations=name), pa.total_allocated_bytes()
    tracemalloc.start()
    most = max(pa.total_allocated_bytes() - arrow for _ in rows(dataset))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most + peak < 7 * 2**20 < number * len(text) * 0.75


# --- tables -----------------------------------------------------------------------------------------------------------


def table(number=5, media=True):
    content = {
        "id": list(range(number)),
        "image": [{"bytes": JPEG + bytes([n]), "path": f"{n}.jpg"} for n in range(number)],
        "conversations": [turns("<image>\nWhat?", f"It is {n}.") for n in range(number)],
        "embedding": [[0.5] * 4] * number,
    }
    return pa.table(content if media else {**content, "image": [f"{n}.jpg" for n in range(number)]})


def save_to_disk(folder, content, files=2, stream=True, chunk=2):
    """A folder as `datasets` writes it: Arrow streams, in the order that state.json says."""
    folder.mkdir(parents=True)
    size = -(-content.num_rows // files)
    names = []
    for number in range(files):
        names.append(f"data-{number:05d}-of-{files:05d}.arrow")
        opened = pa.ipc.new_stream if stream else pa.ipc.new_file
        with opened(str(folder / names[-1]), content.schema) as writer:
            writer.write_table(content.slice(number * size, size), max_chunksize=chunk)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_parquet_file_gives_rows_with_media_as_bytes_or_as_paths(tmp_path):
    for media in (True, False):
        pq.write_table(table(media=media), tmp_path / "a.parquet", row_group_size=2)
        dataset = mine(tmp_path, annotations="a.parquet")
        found = list(rows(dataset))
        assert [where for where, _ in found] == [f"a.parquet row {n}" for n in range(5)]
        assert set(found[0][1]) == {"id", "image", "conversations"}
        made = draft(found[3][1], dataset)
        assert made.media[0].data == (JPEG + b"\3" if media else None)
        assert made.media[0].path == (None if media else tmp_path / "3.jpg")
        assert made.record["conversations"][1]["value"] == "It is 3."
        assert count(dataset) == 5


def test_a_column_of_bytes_and_turns_of_parts_are_read(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]
    pq.write_table(
        pa.table({"images": [[JPEG, JPEG]], "messages": [[messages[0], messages[1], messages[0], messages[1]]]}),
        tmp_path / "a.parquet",
    )
    dataset = mine(tmp_path, annotations="a.parquet")
    (made,) = [draft(row, dataset) for _, row in rows(dataset)]
    assert [ref.data for ref in made.media] == [JPEG, JPEG]
    assert made.record["conversations"] == turns("<image>\nWhat?", "A.", "<image>\nWhat?", "A.")


@pytest.mark.parametrize("stream", [True, False])
def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path, stream):
    save_to_disk(tmp_path / "saved", table(), stream=stream)
    dataset = mine(tmp_path, annotations="saved")
    found = list(rows(dataset))
    assert [row["id"] for _, row in found] == list(range(5))
    assert found[3][0] == "saved/data-00001-of-00002.arrow row 0"
    assert draft(found[4][1], dataset).media[0].data == JPEG + b"\4"
    assert count(dataset) == 5


def test_all_rows_of_a_large_batch_are_read(tmp_path):
    save_to_disk(tmp_path / "saved", table(50), files=1, chunk=50)
    assert [row["id"] for _, row in read(tmp_path, annotations="saved")] == list(range(50))


def test_one_of_several_saved_splits_is_chosen(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        save_to_disk(tmp_path / split, table(number), files=1)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert "several splits: 'train', 'test'. Choose one: split=NAME" in why(read, tmp_path, annotations=".")
    assert len(read(tmp_path, "split=test", annotations=".")) == 2
    assert "no split 'dev'" in why(read, tmp_path, "split=dev", annotations=".")


def test_a_snapshot_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    for number, name in enumerate(["train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"]):
        pq.write_table(table(number + 1), tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / "data" / f"{name}.parquet").symlink_to(tmp_path / "blobs" / str(number))
    assert "several splits" in why(read, tmp_path, annotations="snapshot")
    found = read(tmp_path, "split=train", annotations="snapshot")
    assert [where.split("/")[-1] for where, _ in found] == [
        "train-00000-of-00002.parquet row 0",
        "train-00000-of-00002.parquet row 1",
        "train-00001-of-00002.parquet row 0",
    ]
    assert len(read(tmp_path, annotations="snapshot/data/test*")) == 3


def test_a_snapshot_of_json_files_is_read(tmp_path):
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "dataset_infos.json").write_text("{}")
    for number, name in enumerate(["b.jsonl", "a.json"]):
        (tmp_path / "snapshot" / "data" / name).write_text(json.dumps(ROWS[number]))
    assert [row for _, row in read(tmp_path, annotations="snapshot")] == [ROWS[1], ROWS[0]]


def test_what_is_wrong_with_a_table_is_said(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no file of rows" in why(read, tmp_path, annotations="folder")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    message = why(read, tmp_path, annotations="a.parquet")
    assert "none of the columns" in message and "it has x" in message
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-10])
    assert "cannot be read" in why(read, tmp_path, annotations="a.parquet")
    save_to_disk(tmp_path / "saved", table())
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    assert "gone.arrow cannot be read" in why(read, tmp_path, annotations="saved")
    (tmp_path / "saved" / "state.json").write_text("[]")
    assert "state.json cannot be read" in why(read, tmp_path, annotations="saved")


def test_without_pyarrow_tables_say_what_to_install(tmp_path, monkeypatch):
    pq.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'vllava[prepare]'" in why(read, tmp_path, annotations="a.parquet")
