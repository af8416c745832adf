"""Tar shards, tables and lists hold what the folder has of which they were made: the same files, reports and splits."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kept_elsewhere import many_images, write_arrow, write_csv, write_parquet, write_shards

from data import TorchLoader, build_source, write_beton
from data.beton.format import report_path, sidecar_path
from data.convert import main
from data.sources import FileSource, channel_statistics, folder, source_stamp

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return many_images(tmp_path_factory.mktemp("kept") / "images", 60)


FORMS: dict[str, Callable[[Path, Path], str]] = {
    "shards": lambda images, room: f"{write_shards(images, room)}/train-{{000000..000002}}.tar",
    "GNU shards": lambda images, room: f"{write_shards(images, room, form=tarfile.GNU_FORMAT)}/train-*.tar",
    "ustar shard": lambda images, room: (
        f"{write_shards(images, room, shards=1, form=tarfile.USTAR_FORMAT)}/train-000000.tar"
    ),
    "parquet": lambda images, room: str(write_parquet(images, room / "x.parquet")),
    "parquets": lambda images, room: str(write_parquet(images, room / "x.parquet", files=3).with_name("x-*.parquet")),
    "arrow stream": lambda images, room: str(write_arrow(images, room / "x.arrow")),
    "arrow file": lambda images, room: str(write_arrow(images, room / "x.arrow", stream=False)),
    "csv": lambda images, room: str(write_csv(images, images.parent / "list.csv")),
}


def converted(source: str, out: Path, *options: str) -> tuple[bytes, dict, list[str]]:
    """The file's bytes, its sidecar without the source, and the reasons in its report."""
    assert main([source, str(out), "--max-side", "60", *options]) == 0
    told = json.loads(sidecar_path(out).read_text())
    del told["source"]
    return out.read_bytes(), told, [line.split("\t")[1] for line in report_path(out).read_text().splitlines()]


def assert_the_same(images: Path, room: Path, form: str, workers: str) -> None:
    """Everything but where the images come from, which is in the sidecar's source and in the report's first column."""
    expected = converted(str(images), room / "folder.beton", "--workers", "2")
    assert len(expected[2]) == expected[1]["left_out"] > 0
    assert expected[1]["class_names"] == ["ant", "bee", "cat"]
    assert converted(FORMS[form](images, room), room / "other.beton", "--workers", workers) == expected


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bytes_as_from_the_folder(images: Path, tmp_path: Path, form: str):
    assert_the_same(images, tmp_path, form, "3" if form == "parquet" else "0")


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", ["0", "1", "2", "5"])
@pytest.mark.parametrize("form", ["shards", "parquet", "parquets", "arrow stream", "csv"])
def test_the_same_bytes_of_2000_images(tmp_path_factory: pytest.TempPathFactory, form: str, workers: str):
    room = tmp_path_factory.mktemp("many")
    assert_the_same(many_images(room / "images", 2000), room, form, workers)


def source_of(path: str, **settings: object):
    kind = {".tar": "webdataset", ".csv": "csv"}.get(path[-4:], "hf")
    return build_source(kind, path=path, **settings)


@pytest.mark.parametrize("form", ["shards", "parquets", "arrow stream", "csv"])
def test_images_one_by_one_also_in_another_process(images: Path, tmp_path: Path, form: str):
    source, plain = source_of(FORMS[form](images, tmp_path)), folder(images)
    assert isinstance(source, FileSource)
    again = pickle.loads(pickle.dumps(source))
    for index in np.random.default_rng(0).permutation(len(plain)).tolist():
        assert source.read(index) == again.read(index) == plain.read(index)
        assert source.label(index) == plain.label(index)
    with pytest.raises(ValueError, match=r"cannot be read as an image .*: repair or remove"):
        source.image(next(i for i in range(len(plain)) if not plain.read(i)))


@pytest.mark.parametrize("form", ["shards", "parquet", "csv"])
def test_training_without_a_conversion(tmp_path: Path, form: str):
    """In worker processes, and with the folder's pixels."""
    images = many_images(tmp_path / "images", 11)
    loaders = [
        TorchLoader(source, per_device_batch_size=5, image_size=16, train=True, seed=3, num_workers=workers)
        for source, workers in ((folder(images), 0), (source_of(FORMS[form](images, tmp_path)), 1))
    ]
    for expected, found in zip(*loaders, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))
    assert loaders[0].mean == loaders[1].mean


def test_shards_and_lists_are_divided_as_the_folder_is(images: Path, tmp_path: Path):
    settings = {"eval_fraction": 0.2, "test_fraction": 0.1, "split_seed": 4}
    shards, listed = FORMS["shards"](images, tmp_path), str(write_csv(images, images / "list.csv"))
    (images / "list.csv").rename(tmp_path / "list.csv")
    listed = str(tmp_path / "list.csv")
    for split in ("train", "eval", "test"):
        plain = folder(images, split=split, **settings)
        expected = [(plain.read(index), plain.label(index)) for index in range(len(plain))]
        for source in (
            source_of(shards, split=split, **settings),
            source_of(listed, split=split, root=str(images), **settings),
        ):
            assert [(source.read(index), source.label(index)) for index in range(len(source))] == expected


def test_tables_are_divided_too(images: Path, tmp_path: Path):
    path = FORMS["parquets"](images, tmp_path)
    parts = [source_of(path, split=split, eval_fraction=0.25) for split in ("train", "eval")]
    rows = [part.where(index) for part in parts for index in range(len(part))]
    assert len(set(rows)) == len(rows) == len(folder(images))
    assert np.abs(np.bincount([parts[1].label(i) for i in range(len(parts[1]))]) - 5).max() == 0


def test_splits_by_the_names_in_a_folder(images: Path, tmp_path: Path):
    shards = write_shards(images, tmp_path / "shards")
    (shards / "train-000002.tar").rename(shards / "val-000000.tar")
    assert len(source_of(str(shards / "x.tar").replace("/x.tar", "/*.tar"))) == 60
    for split, number in (("train", 40), ("eval", 20)):
        assert len(build_source("webdataset", path=str(shards), split=split)) == number
    with pytest.raises(FileNotFoundError, match=r"no files \*.tar of the split test in the folder"):
        build_source("webdataset", path=str(shards), split="test")
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    write_arrow(images, tmp_path / "train" / "data-00000-of-00001.arrow")
    write_arrow(images, tmp_path / "validation" / "data-00000-of-00001.arrow")
    assert build_source("hf", path=str(tmp_path), split="eval").where(0).startswith(str(tmp_path / "validation"))
    assert build_source("hf", path=str(tmp_path), config="train").where(0).startswith(str(tmp_path / "train"))


def test_the_stamp_follows_the_files(images: Path, tmp_path: Path):
    for form in ("shards", "parquet", "csv"):
        path = FORMS[form](images, tmp_path)
        kind = {"shards": "webdataset", "parquet": "hf"}.get(form, form)
        before = source_stamp(kind, path=path, split="train")
        assert before == source_stamp(kind, path=path, split="train") != ""
        local = tmp_path / "train-000001.tar" if form == "shards" else Path(path)
        with local.open("ab") as file:
            file.write(b"\0" * 512)
        assert source_stamp(kind, path=path, split="train") != before


def test_statistics_are_the_folders(tmp_path: Path):
    images = many_images(tmp_path / "images", 10)
    assert channel_statistics(folder(images)) == channel_statistics(source_of(FORMS["shards"](images, tmp_path)))


def test_a_source_of_two_bad_images_is_strict_or_not(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = FORMS["shards"](images, tmp_path)
    with tarfile.open(tmp_path / "train-000002.tar", "a") as tar:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    out = tmp_path / "x.beton"
    assert main([path, str(out)]) == 0
    line = f"{tmp_path / 'train-000002.tar'}:link.jpg"
    assert f"1 images cannot be used, as {line}: it is a symbolic link" in capsys.readouterr().out
    assert report_path(out).read_text().splitlines()[0].startswith(f"{line}\tit is a symbolic link, and only plain")
    assert json.loads(sidecar_path(out).read_text())["left_out"] == 7
    with pytest.raises(ValueError, match=r"link\.jpg cannot be stored: it is a symbolic link"):
        write_beton(source_of(path), tmp_path / "y.beton", progress=False)
