"""Shards are verified against their manifests: whatever was changed, lost or damaged is named."""

import json
import os
import shutil

import pytest
from prepare_fixtures import many, prepared
from shard_fixtures import image_sample, jpeg, talk, text_sample, video_sample, write_source

from data_prep.executors import LocalProcesses
from data_prep.verify import main, verify
from vllava.data.index import read_index, write_index


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    many(folder / "files", 20)
    prepared(folder / "files", folder / "out")
    return folder / "out"


@pytest.fixture
def shards(whole, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "shards")


def problems(folder, decode=0.0, processes=1):
    (found,) = verify(folder, decode, LocalProcesses(processes), shown=False).values()
    return found.problems


def relist(folder, **changes):
    """Let the manifest's first entry say something else."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def recount(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["counts"].update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_shards_have_no_problems(shards, processes):
    (found,) = verify(shards, 1.0, LocalProcesses(processes), shown=False).values()
    assert (found.problems, found.samples, found.decoded) == ([], 16, 16)
    assert found.modalities == {"image": 8, "text": 4, "video": 4}


def test_any_changed_byte_of_a_shard_is_found(shards):
    with open(shards / "00001.tar", "r+b") as file:
        file.seek(700)
        byte = file.read(1)
        file.seek(700)
        file.write(bytes([byte[0] ^ 1]))
    assert any("00001.tar" in problem and "checksum" in problem for problem in problems(shards))


def test_a_shard_that_is_gone_or_cut_is_named_and_the_others_are_looked_at(shards):
    (shards / "00000.tar").unlink()
    os.truncate(shards / "00002.tar", 2048)
    found = problems(shards)
    assert any(problem.startswith("00000.tar: ") and "No such file" in problem for problem in found)
    assert any(problem.startswith("00002.tar: it has 2048 bytes") for problem in found)
    assert any("the manifest counts 16" in problem for problem in found)
    assert not any("00001" in problem or "00003" in problem for problem in found)


def test_a_count_that_is_not_the_shards_is_found(shards):
    relist(shards, samples=7)
    assert any("00000.tar: it holds 3 samples, the manifest says 7" in problem for problem in problems(shards))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"written": 17}, "the shards hold 16 samples, the manifest counts 17"),
        ({"rejected": 3}, "lists 4 rows, the manifest counts 3"),
        ({"rows": 21}, "21 rows are not 16 written and 4 rejected ones"),
        ({"modalities": {"image": 16}}, "the manifest counts {'image': 16}"),
    ],
)
def test_rows_that_are_not_accounted_for_are_found(shards, change, words):
    recount(shards, **change)
    assert any(words in problem for problem in problems(shards))


def test_a_lost_reject_is_found(shards):
    lines = (shards / "rejects.jsonl").read_text().splitlines()
    (shards / "rejects.jsonl").write_text("\n".join(lines[1:]))
    assert problems(shards) == ["rejects.jsonl lists 3 rows, the manifest counts 4"]
    (shards / "rejects.jsonl").unlink()
    assert "rejects.jsonl cannot be read" in problems(shards)[0]


def test_an_index_of_another_shard_is_found(shards):
    shutil.copy(shards / "00000.tar.index", shards / "00001.tar.index")
    assert any(problem.startswith("00001.tar: ") and "index" in problem for problem in problems(shards))


def test_an_index_that_leads_elsewhere_is_found(shards):
    path, size = shards / "00000.tar.index", (shards / "00000.tar").stat().st_size
    first, *others = read_index(path, size)
    moved = {name: place._replace(offset=place.offset + 512) for name, place in first.files.items()}
    write_index(path, "00000.tar", size, [first._replace(files=moved), *others])
    assert any("its index does not say where its members lie" in problem for problem in problems(shards))


def test_a_medium_that_cannot_be_decoded_is_found_only_where_it_is_decoded(tmp_path):
    broken = ("b", {"id": "b", "conversations": talk()}, [("jpg", jpeg()[:300])])
    write_source(tmp_path / "shards", [image_sample("a"), broken, video_sample("c"), text_sample("d")], 4)
    assert problems(tmp_path / "shards") == []
    (found,) = problems(tmp_path / "shards", decode=1.0)
    assert found.startswith("00000.tar, b: unreadable image")


def test_a_share_of_the_samples_is_decoded_always_the_same(tmp_path):
    write_source(tmp_path / "shards", [image_sample(f"{n:04d}") for n in range(200)], 200)
    counts = {verify(tmp_path / "shards", 0.2, LocalProcesses(1), False)[tmp_path / "shards"].decoded for _ in "ab"}
    assert len(counts) == 1 and 20 < counts.pop() < 60


def test_a_sample_that_is_none_is_named(tmp_path):
    strange = ("b", {"id": "b"}, [])
    write_source(tmp_path / "shards", [image_sample("a"), strange], 2)
    assert any(problem.startswith("00000.tar, b: ") for problem in problems(tmp_path / "shards"))


def test_the_command_fails_where_something_is_wrong(shards, capsys):
    assert main([str(shards), "--decode", "all", "--processes", "1"]) == 0
    assert "16 samples (image 8, text 4, video 4), 16 decoded, 0 problems" in capsys.readouterr().out
    relist(shards, samples=7)
    assert main([str(shards), "--processes", "1"]) == 1
    assert "the manifest says 7" in capsys.readouterr().out
    (shards / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"error: .* holds no manifest\.json"):
        main([str(shards)])
