"""CIFAR from small files made here in its published format; the real files' checksums match torchvision's."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

import data.sources.cifar
from data.sources import cifar10, cifar100
from data.sources.cifar import load_pickle

pytestmark = pytest.mark.timeout(60)

NUM_TRAIN, NUM_TEST = 200, 40  # images of all training files and of the test file


def python2_pickle(entries: dict[str, object]) -> bytes:
    """What Python 2's cPickle with protocol 2 writes, as in the published files: text and bytes are one type."""

    def short(number: int) -> bytes:
        return b"J" + struct.pack("<i", number)

    def of(value: object) -> bytes:
        if isinstance(value, (str, bytes)):
            raw = value.encode() if isinstance(value, str) else value
            return b"T" + struct.pack("<I", len(raw)) + raw
        if isinstance(value, int):
            return short(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(of, value)) + b"e"
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.uint8
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + short(-1) * 2 + b"K\x00tb"
        shape = b"(" + b"".join(map(short, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + kind + b"\x89" + of(value.tobytes()) + b"tb"

    return b"\x80\x02}" + b"".join(of(key) + of(value) + b"s" for key, value in entries.items()) + b"."


@pytest.fixture(params=["cifar10", "cifar100"])
def published(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(name, root, images, labels): small files in the published form, and their checksums in the program's table."""
    name, root = request.param, tmp_path / "datasets"
    files = data.sources.cifar._CIFAR[name]
    num_classes = {"cifar10": 10, "cifar100": 100}[name] // 5
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_TRAIN + NUM_TEST, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % num_classes
    parts = dict(zip(files.train, np.array_split(np.arange(NUM_TRAIN), len(files.train)), strict=True))
    parts |= dict.fromkeys(files.test, NUM_TRAIN + np.arange(NUM_TEST))
    written = {
        part: {"data": images[which].transpose(0, 3, 1, 2).reshape(len(which), -1)}
        | {files.label_key.decode(): labels[which].tolist(), "batch_label": part}
        for part, which in parts.items()
    }
    written[next(iter(files.meta))] = {files.names_key.decode(): [f"class {i}" for i in range(num_classes)]}
    folder = root / files.folder
    folder.mkdir(parents=True)
    for part, entries in written.items():
        (folder / part).write_bytes(python2_pickle(entries))
    archive = tmp_path / "elsewhere" / files.archive
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, files.folder)
    table = dataclasses.replace(
        files,
        url=archive.as_uri(),
        archive_md5=md5(archive),
        **{kind: {part: md5(folder / part) for part in getattr(files, kind)} for kind in ("train", "test", "meta")},
    )
    monkeypatch.setitem(data.sources.cifar._CIFAR, name, table)
    return name, root, images, labels


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def source(name: str, root: Path, **settings):
    return {"cifar10": cifar10, "cifar100": cifar100}[name](path=root, **settings)


def held(found) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([found.image(i) for i in range(len(found))]), np.array([found.label(i) for i in range(len(found))])


def test_images_labels_and_names(published):
    name, root, images, labels = published
    for split, which in (
        ("train", slice(NUM_TRAIN)),
        ("eval", slice(NUM_TRAIN, None)),
        ("test", slice(NUM_TRAIN, None)),
    ):
        found = source(name, root, split=split, download=False)
        assert np.array_equal(held(found)[0], images[which])
        assert np.array_equal(held(found)[1], labels[which])
        assert found.class_names[:2] == ("class 0", "class 1")
        assert found.name == f"{name} {split}"


def test_a_share_of_the_training_images_for_evaluation(published):
    name, root, images, labels = published
    parts = [held(source(name, root, split=split, eval_fraction=0.25)) for split in ("train", "eval", "test")]
    counts = [np.bincount(part[1], minlength=labels.max() + 1) for part in parts]
    assert len(parts[2][1]) == NUM_TEST
    assert np.array_equal(counts[0] + counts[1], np.bincount(labels[:NUM_TRAIN]))
    assert np.abs(counts[1] - 0.25 * (counts[0] + counts[1])).max() <= 0.5
    together = {image.tobytes() for part in parts[:2] for image in part[0]}
    assert together == {image.tobytes() for image in images[:NUM_TRAIN]}
    other = held(source(name, root, split="eval", eval_fraction=0.25, split_seed=1))
    assert not np.array_equal(parts[1][0], other[0])


def test_the_archive_is_fetched_and_unpacked(published, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, _, images, _ = published
    fresh = tmp_path / "fresh"
    assert np.array_equal(held(source(name, fresh))[0], images[:NUM_TRAIN])
    files = data.sources.cifar._CIFAR[name]
    assert f"downloading {files.url}" in capsys.readouterr().err
    (fresh / files.folder / next(iter(files.train))).unlink()  # the archive is still there
    assert len(source(name, fresh, download=False)) == NUM_TRAIN
    assert sorted(p.name for p in fresh.iterdir()) == sorted([files.folder, files.archive])


def test_without_files_and_network(published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, _, _, _ = published
    files = data.sources.cifar._CIFAR[name]
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match=f"no {files.title} in .*, and download is off: put {files.archive}"):
        source(name, empty, download=False)
    missing = dataclasses.replace(files, url=(tmp_path / "nowhere" / files.archive).as_uri())
    monkeypatch.setitem(data.sources.cifar._CIFAR, name, missing)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded .*No such file.*: put .* into .*empty, from"):
        source(name, empty)
    assert list(empty.iterdir()) == []


def test_files_that_are_not_the_published_ones(published):
    name, root, _, _ = published
    files = data.sources.cifar._CIFAR[name]
    path = root / files.folder / next(iter(files.test))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is not the published file: its MD5 is \w{32} and should be \w{32}. Remove"):
        source(name, root, split="eval")
    path.unlink()
    (root / files.archive).write_bytes(b"cut short")
    with pytest.raises(ValueError, match=f"{files.archive} is not the published file"):
        source(name, root, split="eval")


@pytest.mark.parametrize(("name", "theirs"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_the_checksums_are_torchvisions(name: str, theirs):
    files = data.sources.cifar._CIFAR[name]
    assert (files.url, files.archive_md5, files.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
    assert list(map(list, files.train.items())) == theirs.train_list
    assert list(map(list, files.test.items())) == theirs.test_list
    assert files.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
    assert files.names_key.decode() == theirs.meta["key"]


class Runs:
    """Runs a command when it is unpickled as Python would by itself."""

    def __reduce__(self):
        return os.system, ("touch should-not-exist",)


def test_pickles_of_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for value in (Runs(), {b"data": [Runs()]}):
        with pytest.raises(ValueError, match=r"it wants .*system, and only arrays of numbers are read"):
            load_pickle(pickle.dumps(value))
    huge = b"\x80\x02cnumpy\nndarray\nJ\x00\x00\x00\x7f\x85R."  # numpy.ndarray(2**31 - 2**24) outright
    shaped = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\x00\x00\x7f\x85U\x01b\x87R."
    for hostile in (huge, shaped, b"", b"not a pickle", pickle.dumps(io.BytesIO())):
        with pytest.raises(ValueError, match="the pickle cannot be read"):
            load_pickle(hostile)
    assert list(tmp_path.iterdir()) == []
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(load_pickle(pickle.dumps({b"data": array}, protocol=4))[b"data"], array)
