"""Bytes from object stores: every fault ends in the right bytes or in one clear error, and soon."""

import io
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from pretrain.errors import InputError, StorageError
from pretrain.storage import retry, store
from pretrain.storage.retry import Timeouts
from pretrain.storage.shardfile import open_shard
from pretrain.storage.store import Extent, check_url, is_remote, list_shards, stat

SHORT = Timeouts(connect=2, stall=1, deadline=20, first_backoff=0.01, most_backoff=0.05)
SIZE = 3_000_000
DATA = np.random.default_rng(0).bytes(SIZE)
KINDS = ("http", "s3", "gs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    (folder / "a.tar").write_bytes(DATA)
    return folder


@pytest.fixture
def server(serve, folder):
    return serve(folder)


def read_range(url, begin, end, etag="", size=0, **options):
    return store.read_range(Extent(url, begin, end, etag, size), **options)


def fault(function, *arguments, **options):
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        function(*arguments, **{"timeouts": SHORT, **options})
    assert time.monotonic() - begin < SHORT.deadline + SHORT.stall + 1
    assert error.value.__context__ is None or error.value.__suppress_context__
    message = str(error.value)
    assert "wJalr" not in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_is_exactly_what_was_asked_for(server, kind):
    url = f"{getattr(server, kind)}/a.tar"
    etag = stat(url).etag
    assert (stat(url).size, len(etag)) == (SIZE, 10)
    for begin, end in ((0, 1), (0, SIZE), (SIZE - 1, SIZE), (1000, 401_000), (512, 512)):
        assert read_range(url, begin, end, etag) == DATA[begin:end]
    server.requests.clear()
    read_range(url, 1000, 401_000, etag)
    (request,) = server.requests
    assert (request.begin, request.end, request.sent) == (1000, 401_000, 400_000)
    assert request.headers["if-match"] == etag


@pytest.mark.parametrize("etag", ["strong", "weak", "none"])
def test_servers_with_weak_etags_or_none_serve_as_well(server, etag):
    server.etag = etag
    url = f"{server.http}/a.tar"
    server.faults.extend(["reset", "short"])
    assert read_range(url, 5, 2_000_005, stat(url).etag, timeouts=SHORT) == DATA[5:2_000_005]
    assert all(request.headers.get("if-match", "").startswith("W/") is False for request in server.requests)


FAULTS = [[503, 503, 503, 500, 502, 504], [429, 408], ["reset"] * 12]
STALLS = [["stall first"], ["reset", 503, "stall", "short", "cut"]]


@pytest.mark.parametrize(
    ("kind", "faults"), [*((kind, faults) for kind in KINDS for faults in FAULTS), *(("http", one) for one in STALLS)]
)
def test_what_passes_by_is_outlasted(server, kind, faults):
    server.faults.extend(faults)
    assert read_range(f"{getattr(server, kind)}/a.tar", 100, 2_000_100, timeouts=SHORT) == DATA[100:2_000_100]
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize("broken", ["reset", "stall", "short", "cut"])
def test_a_broken_transfer_goes_on_from_the_byte_it_reached(server, broken):
    server.faults.extend([broken] * 2)
    assert read_range(f"{server.http}/a.tar", 0, 2_000_000, timeouts=SHORT) == DATA[:2_000_000]
    assert server.ranges() == [(begin, 2_000_000) for begin in (0, 1_000_000, 1_500_000)]
    assert server.sent == 2_000_000


@pytest.mark.parametrize(
    ("status", "found"),
    [(400, "400 Bad Request"), (401, "401 Unauth"), (403, "403 Forbidden"), (404, "404 Not Found"), (410, "410 Gone")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_is_told_at_once(server, kind, status, found):
    server.usual = status
    url = f"{getattr(server, kind)}/a.tar"
    message = fault(read_range, url, 7, 700)
    assert message.startswith(f"{url}: bytes 7-700: {found}")
    assert found in fault(stat, url)
    assert len(server.requests) == 2
    if kind == "s3" and status == 403:
        assert "credentials come from the AWS_* variables" in message


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (["whole"], "does not serve byte ranges"),
        (["shifted"], "answered with other bytes than those asked for"),
        (["new etag"], 'changed since it was indexed: etag "another", not'),
        (["reset", "new etag"], 'changed since it was indexed: etag "another", not'),
        (["reset", "grown"], "changed while it was read: 3000512 bytes, not 3000000"),
    ],
)
def test_another_object_than_the_one_indexed_is_refused_at_once(server, script, found):
    url = f"{server.http}/a.tar"
    etag = stat(url).etag
    server.requests.clear()
    server.faults.extend(script)
    assert found in fault(read_range, url, 7, 500, etag)
    assert len(server.requests) == len(script)


def test_where_no_etag_tells_the_version_the_size_may(server):
    url, etag = f"{server.http}/a.tar", stat(f"{server.http}/a.tar").etag
    assert read_range(url, 0, 500, size=SIZE) == DATA[:500]
    server.faults.append("grown")
    assert "changed since it was indexed: 3000512 bytes, not 3000000" in fault(read_range, url, 0, 500, size=SIZE)
    server.etag = "none"
    assert f"its server tells no etag, the index has one ({etag})" in fault(read_range, url, 0, 500, etag)


@pytest.mark.parametrize("etag", ["weak", "none"])
def test_without_a_strong_etag_a_broken_transfer_begins_anew(server, etag):
    """Bytes of two versions could not be told apart, and are never joined."""
    server.etag = etag
    server.faults.extend(["reset", "short"])
    assert read_range(f"{server.http}/a.tar", 0, 2_000_000, timeouts=SHORT) == DATA[:2_000_000]
    assert server.ranges() == [(0, 2_000_000)] * 3


def test_an_object_no_index_knows_the_etag_of_is_held_to_what_was_seen_first(tmp_path, serve):
    (tmp_path / "a.tar").write_bytes(b"1" * 1000)
    url = f"{serve(tmp_path).http}/a.tar"
    assert read_range(url, 0, 10, timeouts=SHORT) == b"1" * 10
    (tmp_path / "a.tar").write_bytes(b"2" * 1000)
    assert "changed while it was read: its etag is no longer" in fault(read_range, url, 0, 10)


def test_the_attempts_of_one_range_see_one_version_though_none_was_recorded(server, folder, serve, tmp_path):
    url = f"{server.http}/a.tar"
    server.faults.extend(["reset", "new etag"])
    assert 'changed while it was read: etag "another"' in fault(read_range, url, 0, 1000)
    store._seen.clear()
    server.etag = "none"
    server.faults.extend(["short", "grown"])
    assert "changed while it was read: 3000512 bytes" in fault(read_range, url, 0, 1000)
    # A server that keeps to If-Match says so itself.
    server.etag = "strong"
    assert "its etag is no longer" in fault(read_range, url, 0, 1000, '"older"')


def test_what_ends_too_soon_is_truncated(server):
    url = f"{server.http}/a.tar"
    assert "truncated: bytes 10-3000001 are asked for, it has 3000000" in fault(read_range, url, 10, SIZE + 1)
    assert "416" in fault(read_range, url, SIZE, SIZE + 1)


@pytest.mark.parametrize(
    ("usual", "found"), [(503, "503 Service Unavailable"), ("stall first", "timed out"), ("cut", "ended at byte")]
)
def test_what_never_passes_is_given_up_at_the_deadline(server, usual, found):
    server.usual = usual
    with pytest.raises(StorageError) as error:
        read_range(f"{server.http}/a.tar", 0, SIZE, timeouts=Timeouts(1, 0.3, 0.7, 0.01, 0.3))
    message = str(error.value)
    assert f"bytes 0-{SIZE}: cannot be read: " in message
    assert found in message
    assert f"given up after {len(server.requests)} attempts in " in message


def test_a_server_that_is_not_there_is_told(server, folder, serve):
    gone = serve(folder)
    gone.close()
    assert "connection refused; given up after" in fault(stat, f"{gone.http}/a.tar", timeouts=Timeouts(1, 1, 0.5))


def test_a_name_that_was_never_found_is_not_waited_for_as_one_that_has_gone_away(monkeypatch):
    monkeypatch.setattr(retry, "_NEW_HOST_DEADLINE", 0.2)
    # Attempts end short of the deadline by one pause at most: a drawn one, so none is long.
    timeouts = Timeouts(deadline=0.8, first_backoff=0.05, most_backoff=0.05)
    host = f"{'a' * 64}.invalid"  # too long for a name: no name server has to be asked, which may be slow to answer
    url, seconds = f"http://{host}/a.tar", r"host not found; given up after \d+ attempts? in (\d\.\d) s"
    message = fault(stat, url, timeouts=timeouts)
    assert float(re.search(seconds, message)[1]) < 0.7
    with pytest.raises(InputError) as refused:
        stat(url, timeouts)
    assert not isinstance(refused.value, StorageError), "no later attempt finds a mistyped name"
    with pytest.raises(StorageError) as error:
        read_range(url, 0, 1, timeouts=timeouts)  # of an object that has been asked for before, if not by this process
    assert float(re.search(seconds, str(error.value))[1]) >= 0.7
    monkeypatch.setattr(retry, "_found", {host})
    assert float(re.search(seconds, fault(stat, url, timeouts=timeouts))[1]) >= 0.7


def test_a_redirection_that_goes_round_is_told_at_once(server):
    server.usual = "circle"
    assert fault(stat, f"{server.http}/a.tar").endswith("/a.tar: redirected in a circle")
    assert fault(read_range, f"{server.http}/a.tar", 7, 700).endswith("bytes 7-700: redirected in a circle")
    assert len(server.requests) == 2 * 11, "one attempt each"


def test_pauses_grow_and_are_drawn(server, monkeypatch):
    drawn = []
    monkeypatch.setattr("pretrain.storage.retry._jitter.uniform", lambda low, high: drawn.append((low, high)) or 0.0)
    server.faults.extend([503] * 7 + ["reset", 503])
    read_range(f"{server.http}/a.tar", 0, 1000, timeouts=Timeouts(first_backoff=0.5, most_backoff=10))
    # Bytes came with the reset: the pauses start again.
    assert drawn == [(0, high) for high in (0.5, 1, 2, 4, 8, 10, 10, 0.5, 1)]


def test_a_stop_ends_the_waiting(server):
    stop = threading.Event()
    server.usual = 503
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(CancelledError):
        read_range(f"{server.http}/a.tar", 0, 10, timeouts=Timeouts(first_backoff=60), stop=stop)
    assert time.monotonic() - begin < 5


def test_long_waiting_is_told_while_it_lasts(server, monkeypatch, caplog):
    monkeypatch.setattr("pretrain.storage.retry._WARN_AFTER", 0.0)
    server.faults.extend([503, 503])
    with caplog.at_level(logging.WARNING):
        read_range(f"{server.s3}/a.tar", 0, 10, timeouts=SHORT)
    assert [record.message for record in caplog.records] == [
        f"{server.s3}/a.tar: bytes 0-10: 503 Service Unavailable; tried again for 20 s in all"
    ]


def test_threads_wait_side_by_side(server):
    server.latency = 0.05
    url = f"{server.http}/a.tar"
    read_range(url, 0, 1)
    with ThreadPoolExecutor(32) as threads:
        begin = time.monotonic()
        found = list(threads.map(lambda number: read_range(url, number, number + 1000), range(256)))
        seconds = time.monotonic() - begin
    assert found == [DATA[number : number + 1000] for number in range(256)]
    assert seconds < 256 * 0.05 / 8  # one after another: 12.8 s


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_names_are_found(tmp_path, serve, kind):
    names = ["a b/ü+%.tar", "été~'(1)[2]&=,;@:!$*.tar", "100%25.tar", "日本/x#y.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    server = serve(tmp_path)
    for name in names:
        # In an http URL a % begins a code, in a bucket it is a letter, as for the stores' own tools.
        written = name.replace("%", "%25").replace("#", "%23").replace(" ", "%20") if kind == "http" else name
        data = name.encode()
        assert read_range(f"{getattr(server, kind)}/{written}", 0, len(data)) == data


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_folder_in_a_bucket_is_listed(tmp_path, serve, kind):
    for name in ("t/b.tar", "t/a.tar", "t/c.tar", "t/.d.tar", "t/deep/e.tar", "t/index.vfi", "tt/f.tar", "g.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    root = getattr(serve(tmp_path), kind)
    assert list_shards(f"{root}/t/") == list_shards(f"{root}/t") == [f"{root}/t/{name}.tar" for name in "abc"]
    assert list_shards(f"{root}/") == list_shards(root) == [f"{root}/g.tar"]
    assert list_shards(f"{root}/nothing/") == []


def test_a_folder_over_http_is_not_listed(server):
    message = fault(list_shards, f"{server.http}/train/")
    assert message.endswith(f"name its shards, e.g. {server.http}/train/shard-{{000000..000099}}.tar")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://me:secret@host/a.tar", "a user or password"),
        ("s3://AKID:secret@bucket/a.tar", "a user or password"),
        ("https://host/a.tar?X-Amz-Signature=secret", "a query string"),
        ("gs://bucket/a.tar?token=secret", "a query string"),
        ("http://me:secret/word@host/a.tar", "no host"),
        ("s3:///a.tar", "no bucket"),
        ("http://host/a#secret", "a fragment"),
        ("s3://bucket/a//b.tar", "empty, '.' and '..' parts"),
        ("http://host/%2e%2e/b.tar", "empty, '.' and '..' parts"),
        ("http://host/a%0a.tar", "control char"),
    ],
)
def test_urls_that_carry_more_than_a_name_are_refused_unquoted(url, found):
    assert is_remote(url)
    with pytest.raises(InputError, match=found) as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_no_credentials_is_what_is_said(folder):
    """In a process of its own: no metadata service is asked, since the address given for it refuses."""
    code = (
        "from pretrain.storage.retry import Timeouts\nfrom pretrain.storage.store import stat\n"
        "try: stat('s3://some-bucket/a.tar', Timeouts(1, 1, 1))\n"
        "except Exception as error: print(error, repr(error.__context__))"
    )
    environment = {"PATH": "/usr/bin", "AWS_METADATA_ENDPOINT": "http://169.254.0.1:1", "no_proxy": "*"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("s3://some-bucket/a.tar: ")
    assert "no credentials; credentials come from the AWS_* variables" in done.stdout
    assert done.stdout.endswith("None\n")


class TestFile:
    """A remote shard as a file."""

    def test_it_reads_and_seeks_as_a_local_file(self, server):
        random = np.random.default_rng(1)
        local = io.BytesIO(DATA)
        with open_shard(f"{server.http}/a.tar") as remote:
            for _ in range(200):
                if random.random() < 0.5:
                    offset, whence = int(random.integers(0, SIZE)), int(random.integers(0, 3))
                    offset = {0: offset, 1: (offset - local.tell()) // 3, 2: -offset}[whence]
                    assert remote.seek(offset, whence) == local.seek(offset, whence)
                size = int(random.choice([0, 1, 512, 30_000, 300_000]))
                assert remote.read(size) == local.read(size)
                assert remote.tell() == local.tell()
            remote.seek(SIZE - 10)
            local.seek(SIZE - 10)
            assert (remote.read(), remote.read(), remote.read(5)) == (local.read(), b"", b"")

    def test_read_on_it_asks_for_ever_more(self, server):
        target = io.BytesIO()
        with open_shard(f"{server.http}/a.tar") as remote:
            shutil.copyfileobj(remote, target, 4096)
        assert target.getvalue() == DATA
        sizes = [end - begin for begin, end in server.ranges()]
        assert sizes[:4] == [16 << 10, 32 << 10, 64 << 10, 128 << 10]
        assert len(sizes) == 8
        assert server.sent == SIZE

    def test_jumps_ask_for_little(self, server):
        with open_shard(f"{server.http}/a.tar") as remote:
            for place in range(0, SIZE - 1000, 100_000):
                remote.seek(place)
                assert remote.read(1000) == DATA[place : place + 1000]
        assert len(server.ranges()) == 30
        assert server.sent == 30 * (16 << 10)

    def test_all_its_ranges_are_of_the_version_it_was_opened_at(self, server):
        for etag in ("strong", "none"):
            server.etag = etag
            with open_shard(f"{server.http}/a.tar") as remote:
                remote.read(10)
                server.faults.append("grown")
                remote.seek(1_000_000)
                with pytest.raises(InputError, match="changed while it was read: 3000512 bytes, not 3000000"):
                    remote.read(10)
