"""Features that were computed once give the loss that media give, and neither decoder nor encoder is asked again."""

import json
import shutil
import threading
import time

import pytest
import torch
from conftest import TOKENIZER
from shard_fixtures import image_sample, talk, text_sample, video_sample, write_source
from torch.testing import assert_close

from data_prep.shards import write_manifest, write_shard
from vllava.data.build import conversation_data, conversation_packer, sample_decoder
from vllava.data.samples import Sample, SampleDecoder
from vllava.errors import UserError
from vllava.evaluation.answers import pictures
from vllava.evaluation.benchmarks.held_out import HeldOut, sample_of
from vllava.evaluation.blocks import decoded
from vllava.evaluation.evaluate import digest
from vllava.evaluation.generate import Asking, answer
from vllava.evaluation.predictions import Predictions
from vllava.features import AT_ONCE, FeatureWriter, bytes_in, use_features
from vllava.model.build import load_tokenizer
from vllava.model.device import computes_in_bf16

SETTINGS = {
    "image": {"_target_": "vllava.model.encoders.ClipEncoder", "path": "a", "medium": "image", "feature_layer": -2},
    "video": {"_target_": "vllava.model.encoders.ClipEncoder", "path": "b", "medium": "video", "feature_layer": -2},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Several shards of images, one of them broken, of videos and of text; more samples than are encoded at once."""
    root = tmp_path_factory.mktemp("world")
    images = [image_sample(f"image{i}", shade=10 * i) for i in range(AT_ONCE + 4)]
    images[3] = ("torn", {"id": "torn", "conversations": talk()}, [("jpg", b"no picture")])
    both = {"id": "both", "conversations": talk("And this? <video>")}
    images.append(("both", both, [image_sample("", 90)[2][0], video_sample("", 200)[2][0]]))
    write_source(root / "images", images, per_shard=15)
    write_source(root / "videos", [video_sample(f"video{i}", shade=30 * i) for i in range(5)], per_shard=3)
    write_source(root / "text", [text_sample(f"text{i}") for i in range(3)], per_shard=3)
    return {kind: root / kind for kind in ("images", "videos", "text")}


@pytest.fixture
def world(sources, tmp_path):
    """A copy of the shards, to which nothing was added yet."""
    copied = {}
    for kind, folder in sources.items():
        shutil.copytree(folder, tmp_path / kind)
        copied[kind.removesuffix("s")] = [str(tmp_path / kind)]
    return copied


def data_of(model, world, **changes):
    settings = {"global_batch": 7, "seed": 0, "workers": 0, "modalities": list(world), **changes}
    return conversation_data(model.specs, load_tokenizer(str(TOKENIZER)), world, **settings)


@torch.no_grad()
def epoch(model, data, half=False):
    """Of each step: keys, reasons of what is broken, and the loss of each micro-batch."""
    for step in data.train_dataloader():
        broken = [(key.rsplit("/")[-1], reason) for key, reason in step.broken]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = [model.loss(batch) for batch in step.micro_batches]
        yield [batch.keys for batch in step.micro_batches], broken, losses


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-6), (True, 1e-3)])
def test_the_loss_of_every_micro_batch_is_that_of_the_media(half, tolerance, model, world):
    online, cached = data_of(model, world), data_of(model, world, features="cache")
    assert cached.wants_features and not online.wants_features
    use_features(cached, model, SETTINGS, half)
    expected, found = list(epoch(model, online, half)), list(epoch(model, cached, half))
    assert sum(len(broken) for _, broken, _ in expected) == 1
    assert [(keys, broken) for keys, broken, _ in found] == [(keys, broken) for keys, broken, _ in expected]
    for (_, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
        assert_close(torch.stack(ours), torch.stack(theirs), atol=tolerance, rtol=0)


def test_nothing_is_decoded_or_encoded_a_second_time(model, world, monkeypatch):
    use_features(data_of(model, world, features="cache"), model, SETTINGS, half=False)
    for encoder in model.encoders.values():
        monkeypatch.setattr(encoder, "forward", None)
    again = data_of(model, world, features="cache")
    monkeypatch.setattr(type(again.decode), "image", None)
    monkeypatch.setattr(type(again.decode), "video", None)
    use_features(again, model, SETTINGS, half=False)
    assert sum(len(keys) for batches, _, _ in epoch(model, again) for keys in batches) == AT_ONCE + 5 + 5 + 3 - 1


def asked(model, tmp_path, name, benchmark):
    """What a model answers to held-out samples, or why it could not be asked; with the hash of what was asked."""
    questions = benchmark.questions()
    packer = conversation_packer(model.specs, load_tokenizer(str(TOKENIZER)))
    asking = Asking(model, packer, decoder(model), 4, workers=0)
    found = answer(asking, questions, Predictions(tmp_path, name, {}))
    return [(one.question.id, one.text, one.broken) for one in found], digest(questions)


def decoder(model):
    return sample_decoder(model.specs, decoder="pyav")


def test_held_out_samples_get_the_same_answers_with_nothing_decoded_or_encoded_again(
    model, world, tmp_path, monkeypatch, capsys
):
    sources = {kind: {"all": folder} for kind, [folder] in world.items()}
    online = HeldOut("held_out", "", sources=sources)
    expected = asked(model, tmp_path, "online", online)
    assert sum(bool(broken) for _, _, broken in expected[0]) == 1
    held = [HeldOut("held_out", "", sources=sources) for _ in range(2)]
    made = FeatureWriter(model, decoder(model), SETTINGS, computes_in_bf16())
    held[0].use_features(made, gigabytes=1e-9)
    assert not held[0].features and "do not fit" in capsys.readouterr().out
    for one in held:
        one.use_features(made, None)
    assert asked(model, tmp_path, "first", held[0]) == expected
    theirs, shown = (next(q for q in of.questions() if q.about["key"] == "both") for of in (online, held[1]))
    for of in (lambda q: sample_of(q, decoder(model)).media, lambda q: [decoded(m, decoder(model)) for m in q.media]):
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(of(shown), of(theirs), strict=True))
    features = Sample("both", [], [medium.encoded.decoded(decoder(model)) for medium in shown.media])
    assert len(pictures(sample_of(shown, decoder(model)), frames=4)) == 5 and not pictures(features)
    for encoder in model.encoders.values():
        monkeypatch.setattr(encoder, "forward", None)
    monkeypatch.setattr(SampleDecoder, "image", None)
    monkeypatch.setattr(SampleDecoder, "video", None)
    assert asked(model, tmp_path, "again", held[1]) == expected


def writer(model, world, half=False, settings=SETTINGS, **changes):
    return FeatureWriter(model, data_of(model, world, **changes).decode, settings, half)


def test_other_data_encoders_preprocessing_or_precision_have_features_of_their_own(model, make_model, world, tmp_path):
    images = tmp_path / "images"
    first = writer(model, world).folder(images)
    assert first == writer(make_model(seed=5), world).folder(images)  # another LLM, the same encoders
    assert first != writer(model, world, half=True).folder(images)
    assert first != writer(model, world, image_fit="pad").folder(images)
    deeper = {**SETTINGS, "image": {**SETTINGS["image"], "feature_layer": -3}}
    assert first != writer(model, world, settings=deeper).folder(images)
    model.encoder("image").sha256 = "another"
    assert first != writer(model, world).folder(images)


def test_features_depend_on_the_encoders_of_the_media_there_are_and_on_no_others(model, world, tmp_path):
    before = {kind: writer(model, world).folder(tmp_path / kind) for kind in ("images", "videos")}
    model.encoder("image").sha256 = "another"
    after = {kind: writer(model, world).folder(tmp_path / kind) for kind in ("images", "videos")}
    assert before["videos"] == after["videos"] and before["images"] != after["images"]


def test_changed_shards_are_encoded_anew(model, world, tmp_path):
    before = writer(model, world).folder(tmp_path / "videos")
    manifest = tmp_path / "videos" / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["shards"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(changed))
    assert before != writer(model, world).folder(tmp_path / "videos")


def test_rows_of_text_stay_where_they_are(model, world, tmp_path):
    assert writer(model, world).write(tmp_path / "text", "") == tmp_path / "text"


def test_an_interrupted_encoding_goes_on_with_the_shards_that_are_missing(model, world, tmp_path):
    one = writer(model, world)
    folder = one.write(tmp_path / "videos", "")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "manifest.json").unlink()
    (folder / "00001.json").unlink()
    (folder / "00001.tar").write_bytes(b"half a shard")
    untouched = (folder / "00000.tar").stat().st_mtime_ns
    one.write(tmp_path / "videos", "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert (folder / "00000.tar").stat().st_mtime_ns == untouched


def source_of(folder, parts):
    """A folder whose manifest lists these shards, `name -> samples`, wherever below it they lie."""
    entries = []
    for name, samples in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        entries.append({**write_shard(folder / name, samples), "name": name})
    write_manifest(folder, entries, {})
    return folder


@pytest.mark.parametrize("names", [("a/0.tar", "b/0.tar"), ("0.tar", "0.bin"), ("manifest.tar", "0.json")])
def test_shards_whose_names_resemble_each_other_keep_features_of_their_own(model, tmp_path, names):
    parts = {name: [image_sample(f"{i}-{n}", 40 * i + n) for n in range(2)] for i, name in enumerate(names)}
    source = source_of(tmp_path / "s", parts)
    data = data_of(model, {"image": [str(source)]}, features="cache")
    use_features(data, model, SETTINGS, half=False)
    seen = [key for batches, broken, _ in epoch(model, data) for keys in batches for key in keys if not broken]
    assert sorted(seen) == ["0-0", "0-1", "1-0", "1-1"]


def test_a_shard_rewritten_without_its_manifest_is_encoded_anew(model, tmp_path):
    source = source_of(tmp_path / "s", {"0.tar": [image_sample("a", 40)]})
    before = writer(model, {"image": [str(source)]}).folder(source)
    entry = write_shard(source / "0.tar", [image_sample("a", 41)])
    assert entry["bytes"] == json.loads((source / "manifest.json").read_text())["shards"][0]["bytes"]
    assert writer(model, {"image": [str(source)]}).folder(source) != before


def test_a_damaged_shard_of_features_is_written_again(model, world, tmp_path):
    one = writer(model, world)
    folder = one.write(tmp_path / "videos", "")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "manifest.json").unlink()  # as where the writer was killed
    (folder / "00000.tar").write_bytes(whole["00000.tar"][:-1])
    (folder / "00001.json").write_text("{")
    one.write(tmp_path / "videos", "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_damaged_features_of_a_finished_folder_are_an_error_with_the_remedy(model, world, tmp_path):
    folder = writer(model, world).write(tmp_path / "videos", "")
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(whole[:-1])
    data = data_of(model, {"video": [str(tmp_path / "videos")]}, features="cache")
    with pytest.raises(UserError, match=rf"{folder}/00000.tar has {len(whole) - 1} bytes.*Delete features/ there"):
        use_features(data, model, SETTINGS, half=False)


def test_a_manifest_that_hides_a_kind_of_media_is_refused(model, tmp_path):
    """Its features would be kept under a name that does not stand for the encoder that made them."""
    source = source_of(tmp_path / "s", {"0.tar": [image_sample("a"), video_sample("b")]})
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["shards"][0]["modalities"] = {"image": 2}
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"0\.tar holds media of kind video, which its manifest does not list"):
        writer(model, {"image": [str(source)]}).write(source, "")


@pytest.mark.parametrize("modalities", [None, 5, [["image"]], {"unreadable": 1}, {}])
def test_a_manifest_that_says_nothing_of_media_is_no_obstacle(model, tmp_path, modalities):
    source = source_of(tmp_path / "s", {"0.tar": [image_sample("a")]})
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["shards"][0]["modalities"] = modalities
    (source / "manifest.json").write_text(json.dumps(manifest))
    data = data_of(model, {"image": [str(source)]}, features="cache")
    use_features(data, model, SETTINGS, half=False)
    assert [keys for batches, _, _ in epoch(model, data) for keys in batches] == [["a"]]


def test_features_of_another_size_are_refused_by_name_of_the_sample(model, world, tmp_path, make_clip, tokenizer):
    data = data_of(model, world, features="cache")
    use_features(data, model, SETTINGS, half=False)
    specs = {**model.specs, "video": type(model.specs["video"])(32, 99, 4)}
    [folder] = {str(shard.path.parent) for shard in data.shards if "videos" in str(shard.path)}
    other = conversation_data(specs, tokenizer, {"video": [folder]}, ["video"], 7, seed=0, workers=0)
    broken = [reason for step in other.train_dataloader() for _, reason in step.broken]
    assert len(broken) == 5 and "features of shape (20, 32), the model's video encoder gives 99" in broken[0]


def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy(model, world, tmp_path):
    (tmp_path / "videos" / "features").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written to .*videos.*data\.features=online"):
        writer(model, world).write(tmp_path / "videos", "")


def test_an_unknown_kind_of_features_is_an_error(model, world):
    with pytest.raises(UserError, match=r"data\.features='off'.*online, cache"):
        data_of(model, world, features="off")


def test_processes_that_need_the_same_features_share_the_shards_out(model, world, tmp_path, monkeypatch):
    """Each shard is encoded once: who finds one under work takes another, and waits for it at the end."""
    encoded, inside = [], {}
    first, second = writer(model, world), writer(model, world)
    original = FeatureWriter._entry

    def counted(self, shard, path, kinds):
        before = path.exists()
        if self is first and not inside:  # the second comes while the first is at work on the first shard
            inside["thread"] = threading.Thread(target=second.write, args=(tmp_path / "images", ""))
            inside["thread"].start()
            while not any(path.name == "00001.tar" for _, path in encoded):
                time.sleep(0.01)
        entry = original(self, shard, path, kinds)
        if not before:
            encoded.append((self, path))
        return entry

    monkeypatch.setattr(FeatureWriter, "_entry", counted)
    folder = first.write(tmp_path / "images", "")
    inside["thread"].join()
    assert sorted(path.name for _, path in encoded) == ["00000.tar", "00001.tar"]
    assert {one is first for one, _ in encoded} == {True, False}
    assert not [*folder.glob("*.lock")]


@pytest.mark.parametrize(("gigabytes", "fits"), [(1e-3, True), (1e-5, False)])
def test_features_that_do_not_fit_are_not_written_and_that_is_said(gigabytes, fits, model, world, tmp_path, capsys):
    data = data_of(model, world, features="cache", features_gigabytes=gigabytes)
    use_features(data, model, SETTINGS, half=False)
    told = capsys.readouterr().out
    assert ("Media are encoded at every step" in told) is not fits
    assert (f"data.features_gigabytes={gigabytes:g}" in told) is not fits
    assert bool([*tmp_path.glob("*/features/*")]) is fits
    assert sum(len(keys) for batches, _, _ in epoch(model, data) for keys in batches) == AT_ONCE + 5 + 5 + 3 - 1


def test_the_size_of_features_is_known_before_they_are_written(model, world, tmp_path):
    one = writer(model, world)
    told = one.bytes_missing(tmp_path / "videos", "")
    tokens, width = model.specs["video"].tokens, 32
    assert told == 5 * tokens * width * 4
    folder = one.write(tmp_path / "videos", "")
    assert one.bytes_missing(tmp_path / "videos", "") == 0 and bytes_in(folder) > told
