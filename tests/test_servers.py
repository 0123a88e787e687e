"""Sources on servers: the stream is the one from files on this machine, or the run ends with a sentence."""

import gc
import json
import time

import fsspec
import pytest
from http_server import Server
from hydra import compose, initialize_config_dir
from shard_fixtures import SPECS, image_sample, text_sample, write_source

from vllava.config import CONF, register_resolvers
from vllava.data.build import caption_data, conversation_data, sample_decoder
from vllava.data.patience import Remote, RemoteUserError
from vllava.data.shards import ShardReader, read_manifest, read_sources
from vllava.errors import UserError
from vllava.evaluation.answers import read_samples
from vllava.plan import counted

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
REMEDY = "Make them."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two folders of shards with their indexes: 10 pictures in 3 shards and 4 texts in one."""
    root = tmp_path_factory.mktemp("world")
    write_source(root / "images", [image_sample(f"image{i}", 20 * i) for i in range(10)], per_shard=4)
    write_source(root / "texts", [text_sample(f"text{i}") for i in range(4)], per_shard=4)
    return root


@pytest.fixture
def server(root):
    server = Server()
    for path in root.rglob("*.*"):
        server.files[f"/{path.relative_to(root)}"] = path.read_bytes()
    yield server
    server.close()


@pytest.fixture
def remote(tmp_path):
    def made(**changes):
        return {"folder": str(tmp_path / "cache"), "seconds": 0.3, "retries": 3, **changes}

    return made


def data_of(images, texts, tokenizer, cache=None, **changes):
    given = {"sources": {"image": images, "text": texts}, "modalities": ["image", "text"], "global_batch": 4, "seed": 1}
    return conversation_data(SPECS, tokenizer, **{**given, "workers": 0, "cache": cache, **changes})


def epoch(data):
    steps = list(data.train_dataloader())
    if data.workers:
        gc.collect()  # stops the workers here, and not in the thread that waits for servers
    return steps


def seen(steps):
    """All that reaches a model, and what is reported."""
    return [
        (
            [(b.keys, b.token_ids.tolist(), b.labels.tolist(), b.images.tolist()) for b in step.micro_batches],
            step.broken,
        )
        for step in steps
    ]


def at_server(server, root, tokenizer, cache, **changes):
    return data_of([f"{server.url}/images"], [f"{server.url}/texts/"], tokenizer, cache, **changes)


def at_home(root, tokenizer):
    return data_of([str(root / "images")], [f"file://{root / 'texts'}"], tokenizer)


# --- the same stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("gigabytes", [1, 0])
def test_the_stream_from_a_server_is_the_one_from_files(workers, gigabytes, server, root, tokenizer, remote):
    data = at_server(server, root, tokenizer, remote(gigabytes=gigabytes, retries=12), workers=workers)
    server.faults.extend([500, "cut", "hang up", "other bytes", None] * 3)
    steps = epoch(data)
    assert seen(steps) == seen(epoch(at_home(root, tokenizer))) and not any(step.broken for step in steps)
    whole = [asked for name in ("00000", "00001", "00002") for asked in server.ranges(f"/images/{name}.tar")]
    assert ("bytes=0-" in whole) == bool(gigabytes)


def test_a_second_run_reads_the_copies_of_the_first(server, root, tokenizer, remote):
    first = seen(epoch(at_server(server, root, tokenizer, remote())))
    server.asked.clear()
    assert seen(epoch(at_server(server, root, tokenizer, remote()))) == first
    assert {asked for name, asked in server.asked if name.endswith(".tar")} == {"bytes=0-0"}


@pytest.mark.parametrize("gigabytes", [1, 0])
def test_wrong_bytes_of_a_transfer_never_reach_a_sample(gigabytes, server, root, tokenizer, remote):
    data = at_server(server, root, tokenizer, remote(gigabytes=gigabytes))
    server.faults.extend(["wrong byte", None, "wrong byte", None, "wrong byte", None])
    assert seen(epoch(data)) == seen(epoch(at_home(root, tokenizer)))


def test_shards_without_an_index_are_read_from_copies_and_only_from_them(server, root, tokenizer, remote):
    for name in [name for name in server.files if name.endswith(".index")]:
        del server.files[name]
    assert seen(epoch(at_server(server, root, tokenizer, remote()))) == seen(epoch(at_home(root, tokenizer)))
    with pytest.raises(UserError, match=r"python -m data_prep\.index"):
        epoch(at_server(server, root, tokenizer, remote(gigabytes=0)))


def test_captions_come_from_servers_too(server, root, tokenizer, remote):
    arguments = {"modalities": ["image"], "global_batch": 4, "seed": 1, "workers": 0}
    there = caption_data(SPECS, tokenizer, {"image": [f"{server.url}/images"]}, cache=Remote(**remote()), **arguments)
    here = caption_data(SPECS, tokenizer, {"image": [str(root / "images")]}, **arguments)
    for a, b in zip(epoch(there), epoch(here), strict=True):
        assert a.micro_batches[0].pixels.equal(b.micro_batches[0].pixels)


def test_any_file_system_and_this_machine_mix(server, root, tokenizer, remote):
    memory = fsspec.filesystem("memory")
    for path in (root / "texts").iterdir():
        memory.pipe(f"/bucket/texts/{path.name}", path.read_bytes())
    data = data_of([str(root / "images")], ["memory://bucket/texts"], tokenizer, remote())
    try:
        assert seen(epoch(data)) == seen(epoch(at_home(root, tokenizer)))
    finally:
        memory.store.clear()


def test_a_signature_is_sent_with_every_request_and_shown_nowhere(server, root, remote):
    shards = read_manifest(f"{server.url}/images?sig=secret", REMEDY, Remote(**remote()))
    reader = ShardReader(shards, 3)
    assert [reader.read(0, index)[0] for index in range(4)] == [f"image{i}" for i in range(4)]
    assert {name.partition("?")[2] for name, _ in server.asked} == {"sig=secret"}
    assert f"{shards[0].path}" == f"{server.url}/images/00000.tar?…"


def test_facts_are_known_from_the_index_without_the_shard(server, root, remote):
    reader = ShardReader(read_manifest(f"{server.url}/images", REMEDY, Remote(**remote())), 3)
    here = ShardReader(read_manifest(root / "images", REMEDY), 3)
    assert reader.facts(0) == here.facts(0)
    assert set(server.ranges("/images/00000.tar")) == {"bytes=0-0"}


def test_evaluations_and_plans_read_servers_too(server, root, remote, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    samples = list(read_samples(f"{server.url}/images", sample_decoder(SPECS), REMEDY))
    assert [sample.key for sample in samples] == [f"image{i}" for i in range(10)]
    assert list(tmp_path.glob(".cache/vllava/shards/*.copy"))
    samples = read_samples(f"{server.url}/texts", sample_decoder(SPECS), REMEDY, remote=Remote(**remote(gigabytes=0)))
    assert [sample.key for sample in samples] == [f"text{i}" for i in range(4)]
    data = {"sources": {"text": [f"{server.url}/texts"]}, "modalities": ["text"], "remedy": "", "cache": remote()}
    assert counted(data) == {"text": 4}


# --- what is wrong ----------------------------------------------------------------------------------------------------


def refused(server, remote, *folders):
    with pytest.raises(UserError) as caught:
        read_sources(folders or [f"{server.url}/images"], REMEDY, Remote(**remote()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("again", ["{url}/images/", "{url}//images", "{upper}/images", "{url}/images"])
def test_one_folder_named_twice_is_refused(again, server, remote):
    upper = server.url.replace("http", "HTTP")
    said = refused(server, remote, f"{server.url}/images", again.format(url=server.url, upper=upper))
    assert "are the same file" in said


def test_a_folder_without_a_manifest_is_named_with_what_to_do(server, remote):
    del server.files["/images/manifest.json"]
    said = refused(server, remote)
    assert f"No shards at {server.url}/images" in said and said.endswith(REMEDY)
    server.always = 403
    assert "allows no access" in refused(server, remote)


@pytest.mark.parametrize(
    "content", [b"<html>Log in</html>", b"[]", b"\xff", b'{"shards": [{"name": "../x", "samples": 1}]}']
)
def test_what_is_no_manifest_is_named(content, server, remote):
    server.files["/images/manifest.json"] = content
    assert "is not a shard manifest" in refused(server, remote)


def test_a_manifest_without_end_is_not_read_to_its_end(server, remote):
    server.files["/images/manifest.json"] = b" " * (1 << 24) + b"{}"
    assert "more than 16777216 bytes" in refused(server, remote)


def test_shards_that_are_missing_or_of_another_size_are_named_before_the_run(server, remote):
    server.files["/images/00001.tar"] += b"\0"
    said = refused(server, remote)
    assert "/images/00001.tar has" in said and "lists it with" in said
    del server.files["/images/00001.tar"]
    assert "/images/00001.tar does not exist" in refused(server, remote)


def test_counts_that_no_shard_can_hold_are_refused(server, remote):
    manifest = json.loads(server.files["/images/manifest.json"])
    manifest["shards"][0]["samples"] = 10**5
    server.files["/images/manifest.json"] = json.dumps(manifest).encode()
    assert "a sample takes 512" in refused(server, remote)


def failure(run):
    """The sentence that ends a run; workers are stopped here, by this thread."""
    with pytest.raises(RemoteUserError) as caught:
        run()
    said = caught.value.paragraph
    caught.value.with_traceback(None)
    del caught
    gc.collect()
    return said


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("gigabytes", [1, 0])
def test_a_server_that_fails_ends_the_run_and_breaks_no_sample(workers, gigabytes, server, root, tokenizer, remote):
    data = at_server(server, root, tokenizer, remote(gigabytes=gigabytes, seconds=0.2, retries=1), workers=workers)
    if not gigabytes:
        loader = iter(data.train_dataloader())
        next(loader)
    server.always = "stall"
    began = time.monotonic()
    said = failure(lambda: list(loader if not gigabytes else data.train_dataloader()))
    assert time.monotonic() - began < 10
    assert said.startswith(server.url) and "tried 2 times" in said


def test_a_shard_that_was_replaced_ends_the_run(server, root, tokenizer, remote):
    data = at_server(server, root, tokenizer, remote())
    name = "/images/00000.tar"
    place = server.files[name].index(b"\xff\xd8\xff") + 100  # of a picture
    server.files[name] = server.files[name][:place] + b"?" + server.files[name][place + 1 :]
    assert "has the checksum" in failure(lambda: epoch(data))
    data = at_server(server, root, tokenizer, remote(gigabytes=0))
    assert "are not those of its index" in failure(lambda: epoch(data))


def test_a_window_larger_than_the_cache_is_slower_and_nothing_else(server, root, tokenizer, remote):
    size = max(len(data) for name, data in server.files.items() if name.endswith(".tar"))
    steps = epoch(at_server(server, root, tokenizer, remote(gigabytes=1.2 * size / 1e9)))
    assert seen(steps) == seen(epoch(at_home(root, tokenizer)))


@pytest.mark.parametrize("source", ["pipe:cat shards/0.tar", "simplecache::https://host/x", "https://host/x#part"])
def test_sources_that_are_no_addresses_are_refused(source, tokenizer):
    with pytest.raises(UserError):
        data_of([source], [], tokenizer)


def test_features_are_not_written_to_servers(server, tokenizer):
    with pytest.raises(UserError, match="cannot to http://host/images"):
        data_of(["http://host/images?sig=secret"], [], tokenizer, features="cache")


def test_addresses_and_settings_are_given_on_the_command_line():
    register_resolvers()
    overrides = [
        "+experiment=stage2",
        "data.sources.image=['https://host/x?sig=a%2Fb&until=9=',s3://bucket/x,hf://datasets/me/x@main]",
        "+data.cache.options={s3: {endpoint_url: 'http://localhost:9000'}}",
        "data.cache.gigabytes=0.5",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose("train", overrides=overrides).data
    assert list(data.sources.image) == [
        "https://host/x?sig=a%2Fb&until=9=",
        "s3://bucket/x",
        "hf://datasets/me/x@main",
    ]
    assert data.cache.options.s3.endpoint_url == "http://localhost:9000" and data.cache.gigabytes == 0.5
