"""Conversions that were killed or interrupted go on where they were, to the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_elsewhere import many_images, write_parquet, write_shards

import data.beton.journal
from data import Beton, build_source, write_beton
from data.beton.format import report_path, sidecar_path, tier_path
from data.beton.journal import journal_path, writer_of
from data.build import build_loader
from data.convert import main
from data.sources import ArraySource, FolderSource, folder
from data.whole_files import BeingWrittenError, kept_file, kept_path, whole_file

pytestmark = pytest.mark.timeout(120)

NUM_IMAGES = 60
SETTINGS: dict[str, Any] = {
    "write_mode": "proportion", "jpeg_share": 0.7, "sizes": (30, 50), "strict": False, "progress": False,
    "num_workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return many_images(tmp_path_factory.mktemp("resumed") / "images", NUM_IMAGES)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    room = tmp_path_factory.mktemp("whole")
    write_beton(folder(images), room / "x.beton", **SETTINGS)
    return contents(room)


@pytest.fixture(autouse=True)
def every_image_is_noted_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data.beton.journal, "_FLUSH_SECONDS", 0)


class Stops:
    """A source that calls `stop` when image `at` is read; its fingerprint is that of the source."""

    def __init__(self, source: Any, at: int, stop: Callable[[], Any]) -> None:
        self.name, self.class_names, self.odd = source.name, source.class_names, getattr(source, "odd", ())
        self.label, self.image, self.where, self.fingerprint = (
            source.label,
            source.image,
            source.where,
            source.fingerprint,
        )
        self._source, self._at, self._stop = source, at, stop
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes:
        if index == self._at:
            self._stop()
        self.reads.append(index)
        return self._source.read(index)


def contents(room: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(room.iterdir())}


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(source: Any, path: Path, at: int, **settings: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_beton(Stops(source, at, interrupt), path, resumable=True, **SETTINGS | settings)
    assert not path.exists()


def resumed(source: Any, path: Path, **settings: Any) -> tuple[int, list[str]]:
    """How many images were read, and what was said."""
    said: list[str] = []
    counting = Stops(source, -1, interrupt)
    write_beton(counting, path, resumable=True, say=said.append, **SETTINGS | settings)
    return len(counting.reads), said


def killed(source: Any, path: Path, at: int) -> None:
    """In a process of its own, by SIGKILL."""
    process = os.fork()
    if process == 0:
        write_beton(Stops(source, at, lambda: os.kill(os.getpid(), signal.SIGKILL)), path, resumable=True, **SETTINGS)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("at", [0, 1, 37, NUM_IMAGES - 1])
def test_killed_in_mid_write(images: Path, whole: dict[str, bytes], tmp_path: Path, at: int):
    path, source = tmp_path / "x.beton", folder(images)
    killed(source, path, at)
    assert not path.exists()
    assert resumed(source, path) == (
        NUM_IMAGES - at,
        [f"going on after {at} of {NUM_IMAGES} images, which an earlier conversion has written"] if at else [],
    )
    assert contents(tmp_path) == whole


def test_stopped_again_and_again(images: Path, whole: dict[str, bytes], tmp_path: Path):
    path, source = tmp_path / "x.beton", folder(images)
    for at in (5, 5, 23, 24, 50):
        interrupted(source, path, at)
    assert resumed(source, path)[0] == NUM_IMAGES - 50
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_with_threads(images: Path, whole: dict[str, bytes], tmp_path: Path, workers: int):
    path, source = tmp_path / "x.beton", folder(images)
    interrupted(source, path, 40, num_workers=workers)
    assert resumed(source, path, num_workers=workers)[1]
    assert contents(tmp_path) == whole


def cut(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - num_bytes))


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


FIRST_PAGE = 8 << 20
LOSSES: dict[str, Callable[[Path], None]] = {
    "the journal's last line is half there": lambda path: cut(journal_path(path), 9),
    "half of the journal is there": lambda path: cut(journal_path(path), journal_path(path).stat().st_size // 2),
    "the journal is empty": lambda path: cut(journal_path(path), 1 << 30),
    "the journal is gone": lambda path: journal_path(path).unlink(),
    "the journal is garbage": lambda path: journal_path(path).write_bytes(b"\xff" * 999 + b"\n"),
    "a line of the journal is damaged": lambda path: overwrite(journal_path(path), 1500, b"0"),
    "the images' end is not there": lambda path: cut(kept_path(path), 2000),
    "more images than the journal knows of": lambda path: overwrite(
        kept_path(path), kept_path(path).stat().st_size, b"x" * 99
    ),
    "an image is damaged": lambda path: overwrite(kept_path(path), FIRST_PAGE + 3000, b"\x55\xaa"),
    "an image of the smaller size is damaged": lambda path: overwrite(
        kept_path(tier_path(path, 30)), FIRST_PAGE + 2000, b"\x55\xaa"
    ),
    "the smaller images are gone": lambda path: kept_path(tier_path(path, 30)).unlink(),
    "all images are gone": lambda path: kept_path(path).unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_did_not_reach_the_disk(images: Path, whole: dict[str, bytes], tmp_path: Path, loss: str):
    """As after a power failure."""
    path, source = tmp_path / "x.beton", folder(images)
    interrupted(source, path, 40)
    LOSSES[loss](path)
    reads, _ = resumed(source, path)
    assert reads >= NUM_IMAGES - 40
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jpeg_quality": 80}, "other settings"),
        ({"sizes": (30, 51)}, "other settings"),
        ({"restart": True}, None),
    ],
)
def test_other_settings_begin_anew(images: Path, tmp_path: Path, change: dict[str, Any], said: str | None):
    path, source = tmp_path / "x.beton", folder(images)
    interrupted(source, path, 10)
    reads, told = resumed(source, path, **change)
    assert reads == len(source)
    assert told == ([f"what an earlier conversion has left is of {said}: beginning anew"] if said else [])
    other = tmp_path / "other"
    settings = {key: value for key, value in (SETTINGS | change).items() if key != "restart"}
    write_beton(source, other / "x.beton", **settings)
    for path in other.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_changed_source_begins_anew(tmp_path: Path):
    images = many_images(tmp_path / "images", 12)
    paths = {
        "folder": images,
        "webdataset": write_shards(images, tmp_path / "shards", shards=1) / "train-000000.tar",
        "hf": write_parquet(images, tmp_path / "x.parquet"),
    }
    for kind, source_path in paths.items():
        path = tmp_path / f"{kind}.beton"
        interrupted(build_source(kind, path=str(source_path)), path, 6)
        touched = images / "ant" / "00003.jpg" if kind == "folder" else source_path
        os.utime(touched, ns=(5, 5))
        reads, said = resumed(build_source(kind, path=str(source_path)), path)
        assert reads == 12, kind
        assert said == ["what an earlier conversion has left is of another source: beginning anew"], kind


def test_a_source_that_cannot_tell_of_changes_begins_anew(tmp_path: Path):
    class Plain:
        name, class_names = "plain", ("a", "b")

        def __len__(self) -> int:
            return 8

        def image(self, index: int) -> np.ndarray:
            if index == 5 and stops:
                raise KeyboardInterrupt
            return np.full((4, 4, 3), index, np.uint8)

        def label(self, index: int) -> int:
            return index % 2

    stops, said = [True], []
    with pytest.raises(KeyboardInterrupt):
        write_beton(Plain(), tmp_path / "x.beton", resumable=True, progress=False, num_workers=0)
    stops.clear()
    write_beton(Plain(), tmp_path / "x.beton", resumable=True, progress=False, num_workers=0, say=said.append)
    assert said == [
        "what an earlier conversion has left is of a source that cannot tell whether it has changed: beginning anew"
    ]
    assert len(Beton(tmp_path / "x.beton")) == 8


def test_arrays_are_told_apart_by_their_pixels(tmp_path: Path):
    pixels = np.zeros((6, 4, 4, 3), np.uint8)
    labels = np.arange(6) % 2

    def source() -> ArraySource:
        return ArraySource(pixels.copy(), labels, class_names=("a", "b"), name="arrays")

    before = source().fingerprint()
    assert source().fingerprint() == before
    pixels[3, 2, 1, 0] = 1
    assert source().fingerprint() != before


def test_an_error_leaves_nothing(images: Path, tmp_path: Path):
    def fail() -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_beton(Stops(folder(images), 30, fail), tmp_path / "x.beton", resumable=True, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(images: Path, tmp_path: Path, whole: dict[str, bytes]):
    path, source = tmp_path / "x.beton", folder(images)

    def try_too() -> None:
        assert writer_of(path).startswith(f"process {os.getpid()} on ")
        with pytest.raises(BeingWrittenError, match=r"x\.beton is being written by another process"):
            write_beton(source, path, resumable=True, **SETTINGS)

    write_beton(Stops(source, 30, try_too), path, resumable=True, **SETTINGS)
    assert contents(tmp_path) == whole


def test_a_conversion_at_first_use_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a run that was killed while it converted."""
    settings = {"source": "folder", "source_settings": {"path": str(images)}, "split": "train", "cache_dir": tmp_path}
    settings |= {"per_device_batch_size": 5, "image_size": 16, "num_workers": 0}
    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, index: read(self, index) if index < 20 else interrupt())
    settings["source_settings"] |= {"eval_fraction": 0.2}
    with pytest.raises(KeyboardInterrupt):
        build_loader(**settings)
    monkeypatch.setattr(FolderSource, "read", read)
    log: list[str] = []
    build_loader(**settings, log=log.append)
    assert any(line.startswith("going on after ") for line in log)


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    path, read = tmp_path / "x.beton", FolderSource.read
    for options in ([], ["--restart"]):
        monkeypatch.setattr(FolderSource, "read", lambda self, index: read(self, index) if index < 30 else interrupt())
        assert main([str(images), str(path), "--workers", "0", *options]) == 130
        assert f"{path} is not complete; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(FolderSource, "read", read)
    assert main([str(images), str(path)]) == 0
    assert f"going on after 30 of {NUM_IMAGES} images" in capsys.readouterr().out
    assert main([str(images), str(tmp_path / "y.beton")]) == 0
    for name in (path, sidecar_path(path), report_path(path)):
        assert name.read_bytes() == name.with_name(name.name.replace("x.", "y.")).read_bytes()


def test_kept_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x"

    def write(content: bytes, error: type[BaseException] | None = None) -> bytes:
        with kept_file(path) as file:
            found = file.read()
            file.write(content)
            if error is not None:
                raise error
            return found

    with pytest.raises(KeyboardInterrupt):
        write(b"one", KeyboardInterrupt)
    assert not path.exists()
    assert kept_path(path).read_bytes() == b"one"
    assert write(b" two") == b"one"
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"one two", [path])
    with pytest.raises(OSError, match=r"^$"):
        write(b"three", OSError)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"one two", [path])
    with whole_file(path) as plain:  # another kind of writer, which the two do not disturb
        assert write(b"four") == b""
        plain.write(b"five")
    assert path.read_bytes() == b"five"
    monkeypatch.setattr("data.whole_files._lock", lambda file: None)  # a file system without locks: nothing is kept
    with pytest.raises(KeyboardInterrupt):
        write(b"six", KeyboardInterrupt)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"five", [path])
