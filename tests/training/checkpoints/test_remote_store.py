"""Files at real servers: whole or absent under their names, however the line to them breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from remote_servers import Place, place_of

from training.checkpoints.remote.store import Store, connect, reason_of

pytestmark = pytest.mark.timeout(120)
OLD, NEW = b"old" * 100_000, os.urandom(1_000_000)


@pytest.fixture(scope="module", params=["sftp", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with (
        pytest.MonkeyPatch.context() as environment,
        place_of(request.param, tmp_path_factory.mktemp("home") / "of", environment) as made,
    ):
        yield made


def file_of(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def test_what_is_written_is_read(place: Place, tmp_path: Path) -> None:
    store = Store(place.url, "run")
    assert store.read("index.json") is None
    assert Store(place.url, "another run").names() == []
    store.write("index.json", b"one")
    store.write("index.json", b"two")
    store.put(file_of(NEW, tmp_path / "new"), "ep1-ba2")
    store.put(file_of(OLD, tmp_path / "old"), "shards/__0_0.distcp")
    assert store.read("index.json") == b"two"
    assert {"ep1-ba2", "index.json", "shards"} <= set(store.names())
    store.get("ep1-ba2", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == NEW
    store.get("shards/__0_0.distcp", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == OLD
    with pytest.raises(FileNotFoundError):
        store.get("ep3-ba4", tmp_path / "back")
    store.remove("shards")
    store.remove("shards")
    store.remove("index.json")
    assert not {"shards", "index.json"} & set(store.names())


@pytest.mark.parametrize("sent_bytes", [pytest.param(1, marks=pytest.mark.exhaustive), 400_000])
def test_a_cut_in_the_middle_leaves_what_was_there(place: Place, tmp_path: Path, sent_bytes: int) -> None:
    store, new = Store(place.url, "run"), file_of(NEW, tmp_path / "new")
    store.put(file_of(OLD, tmp_path / "old"), "latest")
    drops = place.line.drops
    place.line.cut_after(sent_bytes, stays_down=True)  # libraries try again by themselves
    with pytest.raises(Exception) as failure:  # noqa: PT011  (of each library its own)
        store.put(new, "latest")
    assert place.line.drops == drops + 1
    assert "\n" not in reason_of(failure.value)
    place.line.down = False
    store.disconnect()
    assert store.read("latest") == OLD
    store.put(new, "latest")
    assert store.read("latest") == NEW


def test_a_bucket_that_is_not_there_cannot_be_written_to(place: Place) -> None:
    if place.kind == "s3":
        with pytest.raises(FileNotFoundError):
            Store("s3://nobodys-bucket/runs", "run").write("index.json", b"")


def test_a_host_with_another_key_or_an_unknown_one_is_refused(place: Place) -> None:
    if place.kind == "sftp":
        known = Path.home() / ".ssh" / "known_hosts"
        host, _, key = known.read_text().partition(" ")
        known.write_text(f"{host} {asyncssh.generate_private_key('ssh-ed25519').export_public_key().decode()}")
        with pytest.raises(Exception, match=r"[Hh]ost key"):
            connect(place.url)
        known.unlink()
        with pytest.raises(Exception, match=r"known_hosts does not have \[127.0.0.1\]:\d+; add its key .*SHA256:"):
            connect(place.url)
        known.write_text(f"{host} {key}")
