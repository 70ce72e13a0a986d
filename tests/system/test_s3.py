"""Shards in a real S3 server (moto, which checks signatures and rights): index, train, kill, resume, faults.

The server's command is `moto_server`, or what MOTO_SERVER names: it may live in an environment of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from benchmarks.started import Forked
from pretrain.datasets.sources import open_source
from pretrain.index.index import Index
from pretrain.ranks.launcher import free_port
from pretrain.shards.write import ShardLayout, write_shards
from tests.conftest import history, lines

SERVER = shutil.which(
    os.environ.get("MOTO_SERVER", "moto_server"), path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(SERVER is None, reason="needs moto_server (pip install 'moto[server]'; MOTO_SERVER=its path)"),
]

BUCKET, REGION, STEPS, BATCH = "set", "us-east-1", 200, 24
POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


class Server:
    """A moto server with one bucket, and one user who may read and write it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self._log = (folder / "server.log").open("w")
        # It goes with the tests, however they end.
        words = ["setpriv", "--pdeathsig", "KILL", SERVER, "--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(words, stdout=self._log, stderr=self._log)
        try:
            self._wait()
            self._iam(Action="CreateUser", UserName="trainer")
            self._iam(Action="PutUserPolicy", UserName="trainer", PolicyName="all", PolicyDocument=POLICY)
            key = self._iam(Action="CreateAccessKey", UserName="trainer")
            self.key, self.secret = (
                re.search(f"<{name}>(.*)</{name}>", key)[1] for name in ("AccessKeyId", "SecretAccessKey")
            )
            self._ask(f"/{BUCKET}", method="PUT")
            self._ask("/moto-api/reset-auth", data=b"0", method="POST")  # every request from here on must be signed
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a user sets."""
        place = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": REGION}
        return {**place, "AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}

    @property
    def store(self) -> S3Store:
        names = {"access_key_id": self.key, "secret_access_key": self.secret, "region": REGION}
        return S3Store(BUCKET, endpoint=self.endpoint, client_options={"allow_http": True}, **names)

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or replace it."""
        obstore.put(self.store, name, data)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                return self._ask("/moto-api/data.json")
            except OSError:
                said = Path(self._log.name).read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)

    def _ask(self, path: str, *, data: bytes | None = None, method: str = "GET", service: str = "s3") -> str:
        # The server tells by the credential's scope which of AWS's services is meant.
        scope = f"AWS4-HMAC-SHA256 Credential=nobody/20260101/{REGION}/{service}/aws4_request"
        kind = "application/x-www-form-urlencoded" if service == "iam" else "text/plain"
        headers = {"Authorization": scope, "Content-Type": kind}
        request = urllib.request.Request(f"{self.endpoint}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def _iam(self, **fields: str) -> str:
        form = urllib.parse.urlencode({"Version": "2010-05-08", **fields}).encode()
        return self._ask("/", data=form, method="POST", service="iam")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The digits in eight shards on the disk."""
    folder = tmp_path_factory.mktemp("local") / "train"
    write_shards(open_source("digits", "train", None), folder, ShardLayout(samples=200))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        try:
            obstore.list_with_delimiter(server.store, "train")
        except BaseError:
            pytest.skip(f"{SERVER} refuses a list that is signed rightly (moto 5.2.1 does, 5.2.5 does not)")
        yield server
    finally:
        server.close()


@pytest.fixture
def bucket(server, local, monkeypatch) -> Server:
    """The server, with the shards under s3://set/train/; this process's environment leads there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for shard in local.glob("*.tar"):
        server.put(f"train/{shard.name}", shard.read_bytes())
    return server


@pytest.fixture
def index(bucket, run, tmp_path) -> Path:
    """The index of the bucket's shards, with their etags."""
    return indexed(run, tmp_path / "s3.vfi")


@pytest.fixture
def train(tiny_config, index, tmp_path) -> Callable[..., Forked]:
    """train(name, …): start the run `name` on two ranks, from the bucket unless told."""
    config = tiny_config(
        tmp_path / "tiny.json",
        model={"dropout": 0.1},
        data={"train": str(index), "audit": True},
        train={"global_batch": BATCH, "steps": STEPS},
        checkpoint={"every": 10},
    )

    def train(name: str, *words: object) -> Forked:
        return Forked(2, ["--config", config, "--out", tmp_path / name, *words], tmp_path / f"{name}.txt")

    return train


def indexed(run, out: Path, *words: object) -> Path:
    done = run("launch/shards.py", "index", f"s3://{BUCKET}/train/", "--out", out, *words)
    assert done.returncode == 0, done.stderr
    return out


def ended(started: Forked) -> list[int | None]:
    try:
        return started.wait()
    finally:
        started.kill()


def test_the_index_of_a_bucket_is_that_of_the_same_shards_on_a_disk(bucket, local, run, tmp_path):
    there = Index.open(indexed(run, tmp_path / "whole.vfi", "--sha256"))
    here = Index.open(local)
    assert there.hash == here.hash
    names = sorted(shard.name for shard in local.glob("*.tar"))
    assert list(there.shards.urls()) == [f"s3://{BUCKET}/train/{name}" for name in names]
    etags = Index.open(indexed(run, tmp_path / "etags.vfi"))
    assert (etags.sequence, etags.content["etag"]) == (here.sequence, len(names))


def test_a_run_from_a_bucket_is_killed_resumes_and_is_the_run_from_a_disk(train, local, tmp_path):
    whole = train("disk", f"data.train={local}")
    assert ended(whole) == [0, 0], whole.said

    killed = train("s3")
    try:
        while not (tmp_path / "s3" / "checkpoints" / "latest").exists():
            assert killed.running, killed.said
            time.sleep(0.01)
        killed.send(signal.SIGKILL)
    finally:
        killed.kill()
    reached = len(lines(tmp_path / "s3" / "metrics.jsonl"))
    assert 0 < reached < STEPS

    resumed = train("s3")
    assert ended(resumed) == [0, 0], resumed.said
    assert "resumed from" in resumed.said
    assert history(tmp_path / "s3").trained == history(tmp_path / "disk").trained
    assert len(history(tmp_path / "s3").losses) == STEPS


@pytest.mark.parametrize("what", ["missing", "wrong"])
def test_without_its_credentials_index_and_training_say_what_to_set(what, train, run, monkeypatch, tmp_path):
    if what == "missing":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of another user")
    indexing = run("launch/shards.py", "index", f"s3://{BUCKET}/train/", "--out", tmp_path / "none.vfi")
    training = train("none")
    assert (indexing.returncode, ended(training)) == (2, [2, 2]), training.said
    for said in (indexing.stderr, training.said):
        (error,) = (line for line in said.splitlines() if "error: " in line)
        assert f"s3://{BUCKET}/train" in error
        assert "credentials come from the AWS_* variables of the environment" in error
    assert not (tmp_path / "none.vfi").exists()
    assert not lines(tmp_path / "none" / "metrics.jsonl")


def test_a_start_on_an_object_replaced_since_it_was_indexed_is_refused(train, bucket, local, tmp_path):
    shard, url = replaced(bucket, local)
    started = train("run", "data.unreadable_chunks=quarantine")
    assert ended(started) == [2, 2], started.said
    assert f"error: {url}: changed: etag " in started.said
    bucket.put(f"train/{shard.name}", shard.read_bytes())
    again = train("run", "train.steps=3")
    assert ended(again) == [0, 0], again.said


@pytest.mark.parametrize("unreadable", ["stop", "quarantine"])
def test_an_object_replaced_under_a_run_is_not_trained_on(unreadable, train, bucket, local, tmp_path):
    started = train("run", f"data.unreadable_chunks={unreadable}", "data.max_unreadable=0.9")
    while not (tmp_path / "run" / "checkpoints" / "latest").exists():
        assert started.running, started.said
        time.sleep(0.01)
    shard, url = replaced(bucket, local)
    statuses = ended(started)
    found = lines(tmp_path / "run" / "quarantine.jsonl")
    assert {line["url"] for line in found} == {url}, started.said
    assert all("changed since it was indexed" in line["error"] for line in found), found[0]
    if unreadable == "quarantine":
        assert statuses == [0, 0], started.said
        return
    assert statuses == [2, 2], started.said
    assert f"{url}: changed since it was indexed" in started.said
    bucket.put(f"train/{shard.name}", shard.read_bytes())  # as the message says: the same bytes have the same etag
    again = train("run")
    assert ended(again) == [0, 0], again.said
    whole = train("disk", f"data.train={local}")
    assert ended(whole) == [0, 0], whole.said
    assert history(tmp_path / "run").trained == history(tmp_path / "disk").trained


def replaced(bucket: Server, local: Path) -> tuple[Path, str]:
    """Put another object of the same size in the place of a shard: the shard, and its URL."""
    shard = sorted(local.glob("*.tar"))[3]
    changed = bytearray(shard.read_bytes())
    changed[-3000] ^= 1
    bucket.put(f"train/{shard.name}", bytes(changed))
    return shard, f"s3://{BUCKET}/train/{shard.name}"
