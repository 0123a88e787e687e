"""Shards on servers: whatever a server does, what is read is right or the run ends in time with a sentence."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from http_server import Server

from vllava.data.address import RemotePath, is_remote, local_path, shown
from vllava.data.cache import ShardCache
from vllava.data.patience import Remote
from vllava.data.remote import PIECE, Store
from vllava.data.streams import within
from vllava.errors import UserError

SMALL = np.random.default_rng(0).bytes(300_000)
LARGE = np.random.default_rng(1).bytes(PIECE + 1_500_000)
OTHER = np.random.default_rng(2).bytes(300_000)
NAME = "/shards/0.tar"


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server():
    server = Server()
    server.files[NAME] = SMALL
    yield server
    server.close()


def settings(**changes):
    return Remote(**{"seconds": 0.2, "retries": 2, **changes})


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**8, Store(settings()))


@pytest.fixture
def address(server):
    return RemotePath(server.url + NAME)


def fetch(cache, address, data=SMALL):
    with cache.open(address, len(data), sha(data)) as file:
        return file.read()


def failure(call):
    """The sentence of a UserError, and how long it took to come."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value), time.monotonic() - began


def left(cache, suffix):
    return sorted(cache.folder.glob(f"*{suffix}"))


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "remote"),
    [
        *[(f"{kind}://bucket/folder", True) for kind in ("s3", "gs", "https", "hf", "memory", "S3")],
        *[(path, False) for path in ("/data/shards", "data", "", "a:b", "file:///data", "FILE://data", Path("/data"))],
        (RemotePath("s3://b/x"), True),
        (3, False),
    ],
)
def test_an_address_has_a_protocol_and_a_path_has_none(source, remote):
    assert is_remote(source) is remote


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "PIPE:aws s3 cp s3://b/x -", "simplecache::s3://b/x", "a b://x"])
def test_commands_and_chains_are_refused(source):
    with pytest.raises(UserError):
        is_remote(source)


def test_a_local_address_is_a_path():
    assert [local_path(one) for one in ("file:///a/b", "/a/b", "FILE://a")] == ["/a/b", "/a/b", "a"]


@pytest.mark.parametrize(
    ("folder", "name", "url"),
    [
        ("s3://bucket/folder", "0.tar", "s3://bucket/folder/0.tar"),
        ("s3://bucket/folder/", "sub/a b%.tar", "s3://bucket/folder/sub/a b%.tar"),
        ("https://host/folder/", "sub/a b%?#é.tar", "https://host/folder/sub/a%20b%25%3F%23%C3%A9.tar"),
        ("https://host/folder?sig=a/b&x=1", "0.tar", "https://host/folder/0.tar?sig=a/b&x=1"),
        ("https://host/folder/?sig=a", "manifest.json", "https://host/folder/manifest.json?sig=a"),
        ("https://host", "0.tar", "https://host/0.tar"),
        ("https://host?sig=a", "0.tar", "https://host/0.tar?sig=a"),
    ],
)
def test_a_name_is_joined_to_a_folder_and_the_query_stays(folder, name, url):
    path = RemotePath(folder) / name
    assert path.url == url
    assert path.with_name("other").url == url.partition("?")[0].rpartition("/")[0] + "/other" + "".join(
        url.partition("?")[1:] if "sig=" in url else ()
    )


def test_the_last_part_of_a_path_is_its_name():
    assert RemotePath("https://host/a/b.tar?sig=c/d").name == "b.tar" and RemotePath("s3://b/x/").name == "x"


@pytest.mark.parametrize("url", ["https://host/a#b", "/local", "s3://a\nb", "file:///x"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError):
        RemotePath(url)


def test_secrets_of_an_address_are_not_shown():
    path = RemotePath("https://me:word@host/a/b.tar?sig=secret")
    assert str(path) == f"{path}" == "https://host/a/b.tar?…"
    said = shown("403, url='https://me:word@host/a?sig=secret', and s3://b/c (ftp://x?y), a@b? no")
    assert said == "403, url='https://host/a?…', and s3://b/c (ftp://x?…), a@b? no"


def test_one_file_has_one_identity_however_it_is_spelt():
    def same(*urls):
        return len({RemotePath(url).identity for url in urls}) == 1

    assert same(
        "https://Host/a/0.tar", "https://host:443/a//0.tar", "https://host/./a/./0.tar/", "HTTPS://host/a/0.tar"
    )
    assert same("s3://b/a/0.tar", "s3a://b//a/0.tar")
    assert not same("https://host/a/0.tar", "https://host/A/0.tar")
    assert not same("https://host/get?id=1", "https://host/get?id=2")


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"seconds": value} for value in (0, "1", float("nan"))],
        *[{"retries": value} for value in (1.5, -1, True)],
        *[{"options": value} for value in ({"s3": 3}, None)],
        *[{"folder": value} for value in ("", None)],
        {"gigabytes": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=f"data.cache.{next(iter(wrong))}"):
        Remote(**wrong)


# --- one file over HTTP -----------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_verified(server, cache, address):
    assert fetch(cache, address) == fetch(cache, address) == SMALL
    assert server.ranges(NAME) == ["bytes=0-"]
    assert [path.name for path in left(cache, ".copy")] == [f"{sha(SMALL)}-{len(SMALL)}.copy"]


PASSING = ["hang up", "cut", "stall", "stall midway", "drip", 500, 503, 429, 408, "wrong byte", "other bytes"]


@pytest.mark.parametrize("fault", [*PASSING, "slow", "whole", "whole, cut", "no length", "no mark"])
def test_what_passes_is_overcome(fault, server, cache, address):
    server.faults.append(fault)
    began = time.monotonic()
    assert fetch(cache, address) == SMALL
    assert time.monotonic() - began < 8 and not left(cache, ".part")


@pytest.mark.parametrize("fault", ["hang up", "cut", "stall", "stall midway", "drip", 500, "other bytes", "whole, cut"])
def test_what_lasts_ends_in_time_with_a_sentence(fault, server, cache, address):
    server.always = fault
    said, seconds = failure(lambda: fetch(cache, address))
    assert f"{address} cannot be read (" in said and "tried 3 times" in said and "data.cache.retries=2" in said
    assert seconds < 8 and not left(cache, ".part") and not left(cache, ".copy")


@pytest.mark.parametrize(("fault", "meaning"), [(404, "does not exist"), (403, "allows no access, 403"), (400, "400")])
def test_what_asking_again_cannot_mend_is_not_asked_again(fault, meaning, server, cache, address):
    server.always = fault
    said, _ = failure(lambda: fetch(cache, address))
    assert meaning in said and len(server.asked) == 1


def test_what_came_before_an_error_is_not_fetched_again(server, cache, address):
    server.faults.extend(["stall midway"] * 2)
    assert fetch(cache, address) == SMALL
    assert server.ranges(NAME) == ["bytes=0-", "bytes=150000-", "bytes=225000-"]


def test_a_long_file_may_fail_more_often_than_a_short_one(server, address, tmp_path):
    cache = ShardCache(tmp_path, 10**8, Store(settings(retries=1)))
    server.faults.extend(["cut", "cut"])
    assert "tried 2 times" in failure(lambda: fetch(cache, address))[0]
    server.files[NAME] = LARGE * 2
    server.faults.extend(["stall midway"] * 2)  # in the second piece and in the third
    assert fetch(cache, address, LARGE * 2) == LARGE * 2


def test_a_slow_server_is_waited_for_while_anything_comes(server, cache, address):
    server.always = "slow"  # more than 0.15 s in all
    cache.store = Store(settings(seconds=0.1))
    assert fetch(cache, address) == SMALL


def test_a_file_that_is_not_as_listed_is_an_error_that_names_both(server, cache, address):
    said, _ = failure(lambda: fetch(cache, address, OTHER))
    assert str(address) in said and sha(OTHER) in said and sha(SMALL) in said and len(server.asked) == 2
    said, _ = failure(lambda: cache.open(address, len(SMALL) + 1, sha(SMALL)))
    assert f"{len(SMALL)} bytes" in said and str(len(SMALL) + 1) in said
    server.always = "no length"
    for size in (len(SMALL) - 1, len(SMALL) + 1):
        said, _ = failure(lambda size=size: cache.open(address, size, sha(SMALL)))
        assert str(size) in said
    assert not left(cache, ".copy") and not left(cache, ".part")


def test_a_file_that_changes_in_between_is_begun_again(server, cache, address):
    server.files[NAME] = OTHER
    server.then[NAME] = lambda: server.files.update({NAME: SMALL})
    server.faults.append("stall midway")
    assert fetch(cache, address) == SMALL
    assert server.ranges(NAME) == ["bytes=0-", "bytes=150000-", "bytes=0-"]


def test_a_file_that_keeps_changing_is_given_up(server, address, tmp_path):
    versions = cycle([SMALL, OTHER])

    def change():
        server.files[NAME] = next(versions)
        server.then[NAME] = change

    server.always = "stall midway"
    change()
    cache = ShardCache(tmp_path, 10**8, Store(settings(retries=5)))
    said, _ = failure(lambda: cache.open(address))
    assert "changed while it was read" in said and not left(cache, ".copy")


def test_servers_that_differ_in_their_marks_are_believed_where_a_checksum_decides(server, cache, address):
    server.faults.extend(["stall midway", "no mark"] * 2)
    assert fetch(cache, address) == SMALL


def test_without_a_checksum_the_size_and_the_mark_stand_for_the_content(server, cache, address):
    assert cache.open(address).read() == cache.open(address).read() == SMALL
    assert server.ranges(NAME) == ["bytes=0-0", "bytes=0-", "bytes=0-0"]
    server.files[NAME] = OTHER
    assert cache.open(address).read() == OTHER
    assert "its manifest lists 5" in failure(lambda: cache.open(address, 5))[0]
    server.always = "no length"
    assert "a cut would not show" in failure(lambda: cache.open(address))[0]


@pytest.mark.parametrize("size", [len(SMALL), None])
def test_redirects_are_followed_and_ranges_with_them(size, server, cache):
    address = RemotePath(server.url + "/link?sig=a")
    server.always = None
    server.files["/link"] = b"never sent"
    server.faults.extend([f"to {NAME}", None] if size else [f"to {NAME}", None, f"to {NAME}"])
    assert cache.open(address, size, sha(SMALL)).read() == SMALL


def test_the_query_and_headers_of_the_settings_are_sent_and_bytes_asked_for_as_they_are(server, tmp_path):
    options = {"http": {"headers": {"X-Mine": "yes"}}}
    Store(settings(options=options)).read(RemotePath(server.url + NAME + "?sig=a%2Fb"), 10**6)
    assert server.asked == [(NAME + "?sig=a%2Fb", "bytes=0-")]
    assert server.headers[0]["X-Mine"] == "yes" and server.headers[0]["Accept-Encoding"] == "identity"


def test_signatures_and_passwords_appear_in_no_message(server, cache):
    for fault in (403, 400, 404, 500, "stall"):
        server.always = fault
        address = RemotePath(server.url.replace("//", "//me:word@") + NAME + "?sig=secret")
        with pytest.raises(UserError) as caught:
            cache.open(address, 10, "0" * 64)
        assert "secret" not in str(caught.value) and "word@" not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__  # a log shows no more


def test_a_compressed_answer_is_refused(server, cache, address):
    server.always = "compressed"
    assert "compressed" in failure(lambda: fetch(cache, address))[0]


def test_a_server_that_is_not_there_is_an_error_in_time(cache):
    said, seconds = failure(lambda: fetch(cache, RemotePath("http://127.0.0.1:9/x")))
    assert "http://127.0.0.1:9/x" in said and "tried 3 times" in said and seconds < 8


def test_connections_are_kept(server):
    store = Store(settings())
    for place in range(5):
        assert store.read_at(RemotePath(server.url + NAME), place, 3) == SMALL[place : place + 3]
    assert len({headers["Host"] for headers in server.headers}) == 1
    assert server.connections == 1


# --- small files and parts --------------------------------------------------------------------------------------------


def test_a_small_file_is_read_whole_up_to_a_limit(server, address):
    store = Store(settings())
    assert store.read(address, len(SMALL)) == SMALL
    for fault in (None, "whole", "no length"):
        server.always = fault
        assert "more than 299999 bytes" in failure(lambda: store.read(address, len(SMALL) - 1))[0]
    server.files["/empty"] = b""
    server.always = None
    assert store.read(RemotePath(server.url + "/empty"), 5) == b""


@pytest.mark.parametrize("fault", ["cut", "stall", "stall midway", 500, "slow", "whole", "no length", "whole, cut"])
def test_a_small_file_survives_what_passes(fault, server, address):
    server.faults.append(fault)
    assert Store(settings()).read(address, 10**6) == SMALL


@pytest.mark.parametrize("fault", [None, "hang up", "cut", "stall midway", 503, "other bytes"])
def test_a_part_is_read_without_the_rest(fault, server, address):
    if fault:
        server.faults.append(fault)
    part = SMALL[1000:3000]
    assert Store(settings()).read_at(address, 1000, 2000, zlib.crc32(part)) == part
    assert set(server.ranges(NAME)) == {"bytes=1000-2999"}


def test_a_part_with_another_checksum_is_asked_for_again_and_never_returned(server, address):
    store, part = Store(settings()), SMALL[1000:3000]
    server.faults.append("wrong byte")
    assert store.read_at(address, 1000, 2000, zlib.crc32(part)) == part
    server.always = "wrong byte"
    assert "are not those of its index" in failure(lambda: store.read_at(address, 1000, 2000, zlib.crc32(part)))[0]


def test_a_part_beyond_the_end_is_an_error_and_of_no_bytes_needs_no_request(server, address):
    store = Store(settings(retries=0))
    assert "of the 10 bytes" in failure(lambda: store.read_at(address, len(SMALL) - 5, 10))[0]
    assert "of the 10 bytes" in failure(lambda: store.read_at(address, len(SMALL), 10))[0]
    asked = len(server.asked)
    assert store.read_at(address, 5, 0) == b"" and len(server.asked) == asked


def test_a_server_without_ranges_is_of_no_use_for_parts(server, address):
    server.always = "whole"
    store = Store(settings())
    assert store.read_at(address, 0, 10) == SMALL[:10]
    assert "data.cache.gigabytes" in failure(lambda: store.read_at(address, 1, 10))[0]


# --- other file systems -----------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a b/0.tar", SMALL)
    yield fs
    fs.store.clear()


def test_any_file_system_of_fsspec_serves(memory, cache):
    address = RemotePath("memory://bucket/a b") / "0.tar"
    assert fetch(cache, address) == SMALL
    memory.pipe("/bucket/a b/0.tar", OTHER)
    assert fetch(cache, address) == SMALL  # its copy
    assert cache.open(address, len(SMALL)).read() == OTHER
    assert cache.store.read(address, 10**6) == OTHER
    assert cache.store.read_at(address, 7, 9) == OTHER[7:16]
    assert "not exist" in failure(lambda: cache.open(RemotePath("memory://bucket/none")))[0]
    assert "it is a folder" in failure(lambda: cache.open(RemotePath("memory://bucket")))[0]


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("s3://b/x", "pip install s3fs"),
        ("s3a://b/x", "pip install s3fs"),
        ("gs://b/x", "pip install gcsfs"),
        ("az://b/x", "pip install adlfs"),
        ("oci://b/x", "pip install ocifs"),
        ("no-such://b/x", "Protocol not known"),
    ],
)
def test_what_is_not_installed_is_named(url, word):
    if "pip" in word:
        try:
            fsspec.get_filesystem_class(url.partition(":")[0])
            pytest.skip("it is installed")
        except ImportError:
            pass
    assert word in failure(lambda: Store(settings()).state(RemotePath(url)))[0]


def test_wrong_options_are_named(server, address):
    store = Store(settings(options={"http": {"client_kwargs": {"no_such": 1}}}))
    assert "no_such" in failure(lambda: store.read(address, 10))[0]


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said, seconds = failure(lambda: Store(settings()).state(RemotePath("hf://datasets/a/b/0.tar")))
    assert "hf://datasets/a/b/0.tar" in said and seconds < 9


def test_a_call_that_does_not_return_is_left_behind():
    began, over = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        within(0.1, lambda: over.wait(20))
    assert time.monotonic() - began < 5
    over.set()
    with pytest.raises(KeyError):
        within(1, lambda: {}[1])


# --- the cache --------------------------------------------------------------------------------------------------------


def files_of(server, count, size=1000):
    server.files.update({f"/{number}": bytes([number]) * size for number in range(count)})
    return [(RemotePath(f"{server.url}/{number}"), server.files[f"/{number}"]) for number in range(count)]


def test_the_copies_used_longest_ago_make_room(server, tmp_path):
    cache = ShardCache(tmp_path, 3000, Store(settings()))
    files = files_of(server, 4)
    for address, data in [*files[:3], files[0], files[3]]:
        assert fetch(cache, address, data) == data
    kept = {path.name[:64] for path in left(cache, ".copy")}
    assert kept == {sha(data) for _, data in (files[0], files[2], files[3])}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.*")) <= 3000


def test_an_open_file_stays_readable_when_its_copy_makes_room(server, tmp_path):
    cache = ShardCache(tmp_path, 1500, Store(settings()))
    (first, data), (second, other) = files_of(server, 2)
    with cache.open(first, 1000, sha(data)) as file:
        assert fetch(cache, second, other) == other
        assert len(left(cache, ".copy")) == 1 and file.read() == data


def test_a_file_larger_than_the_cache_is_refused(server, tmp_path):
    cache = ShardCache(tmp_path, 100, Store(settings()))
    said, _ = failure(lambda: fetch(cache, *files_of(server, 1)[0]))
    assert "data.cache.gigabytes=1e-07" in said and not server.asked


def test_a_copy_that_was_cut_is_fetched_again(server, cache, address):
    fetch(cache, address)
    (copy,) = left(cache, ".copy")
    copy.chmod(0o644)
    os.truncate(copy, 10)
    assert fetch(cache, address) == SMALL and len(server.asked) == 2


def test_the_same_content_at_another_address_needs_no_second_copy(server, cache, address):
    fetch(cache, address)
    assert fetch(cache, RemotePath(server.url + NAME + "?sig=new")) == SMALL and len(server.asked) == 1


@pytest.mark.parametrize("checksum", ["../../x", "", "0" * 63, "g" * 64])
def test_a_checksum_that_is_none_names_no_file(checksum, cache, address):
    assert "SHA-256" in failure(lambda: cache.open(address, 5, checksum))[0]


def test_a_folder_that_cannot_be_written_is_an_error(server, tmp_path, address):
    (tmp_path / "file").write_text("")
    cache = ShardCache(tmp_path / "file" / "cache", 10**8, Store(settings()))
    assert "data.cache.folder" in failure(lambda: fetch(cache, address))[0]


def opened(cache, address, data, start, answers):
    start.wait()
    try:
        answers.put(fetch(cache, address, data) == data)
    except Exception as error:
        answers.put(str(error))


def test_many_processes_fetch_a_file_once(server, tmp_path, address):
    cache = ShardCache(tmp_path, 10**8, Store(settings(seconds=10)))
    server.files[NAME] = LARGE
    server.always = "slow"
    context = multiprocessing.get_context("fork")
    cache.store.state(address)  # makes a loop of this process, which is none of its children's
    server.asked.clear()
    start, answers = context.Event(), context.SimpleQueue()
    several = [context.Process(target=opened, args=(cache, address, LARGE, start, answers)) for _ in range(4)]
    for one in several:
        one.start()
    start.set()
    for one in several:
        one.join(20)
    assert [answers.get() for _ in several] == [True] * 4
    assert server.ranges(NAME) == ["bytes=0-"]


def test_threads_and_their_files_fit_a_bound_that_is_tight(server, tmp_path):
    cache = ShardCache(tmp_path, 2500, Store(settings()))
    files = files_of(server, 8)
    most = []
    server.always = "slow"

    def work(address, data):
        assert fetch(cache, address, data) == data
        with FileLock(tmp_path / "locks" / "room.lock"):  # nothing makes room meanwhile, and would be counted twice
            most.append(held())

    def held():
        while True:
            with suppress(FileNotFoundError):  # another thread's .part became a .copy between two looks
                return sum(path.stat().st_size for path in (*left(cache, ".copy"), *left(cache, ".part")))

    threads = [threading.Thread(target=work, args=one) for one in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 8 and max(most) <= 2500


CHILD = """
import sys
from pathlib import Path
from vllava.data.address import RemotePath
from vllava.data.cache import ShardCache
from vllava.data.patience import Remote
from vllava.data.remote import Store
url, size, checksum, folder = sys.argv[1:]
print("ready", flush=True)
ShardCache(Path(folder), 400_000, Store(Remote(seconds=30))).open(RemotePath(url), int(size), checksum)
"""


def test_a_process_that_is_killed_leaves_nothing_wrong(server, tmp_path, address):
    server.faults.append("stall midway")
    command = [sys.executable, "-c", CHILD, address.url, str(len(SMALL)), sha(SMALL), str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
    cache = ShardCache(tmp_path, 400_000, Store(settings()))
    until = time.monotonic() + 15
    while not left(cache, ".part") and time.monotonic() < until:
        time.sleep(0.02)
    assert left(cache, ".part")
    # alive, it keeps its place: there is no room for another file, and none is taken from it
    files = files_of(server, 1, 200_000)
    assert (
        "no room" in failure(lambda: fetch(ShardCache(tmp_path, 400_000, Store(settings(seconds=0.05))), *files[0]))[0]
    )
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    began = time.monotonic()
    assert fetch(cache, address) == SMALL
    assert time.monotonic() - began < 8 and not left(cache, ".part") and len(left(cache, ".copy")) == 1


def test_a_process_that_stands_still_is_not_waited_for_for_ever(server, tmp_path, address):
    server.faults.append("stall midway")
    command = [sys.executable, "-c", CHILD, address.url, str(len(SMALL)), sha(SMALL), str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
    cache = ShardCache(tmp_path, 10**6, Store(settings(seconds=0.1)))
    try:
        until = time.monotonic() + 15
        while not left(cache, ".part") and time.monotonic() < until:
            time.sleep(0.02)
        child.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert fetch(cache, address) == SMALL
        assert 0.6 <= time.monotonic() - began < 10  # two times three tries of 0.1 s
    finally:
        child.kill()
        child.wait()


def test_settings_travel_to_other_processes_and_connections_do_not(server, cache, address):
    cache.store.state(address)
    copy = pickle.loads(pickle.dumps(cache))
    assert fetch(copy, address) == SMALL and partial(fetch, copy)(address) == SMALL
