"""The .beton file: it holds what was written, FFCV can read it, and damage is found before the first batch."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.beton.format import Beton, sidecar_path
from data.beton.write import write_beton
from data.sources import ArraySource, channel_statistics, digits

pytestmark = pytest.mark.timeout(60)


def pixels(beton: Beton, index: int) -> np.ndarray:
    assert not beton.is_jpeg(index)
    return beton.image_bytes(index).reshape(beton.heights[index], beton.widths[index], 3)


def array_source(images: list[np.ndarray], labels: list[int] | None = None) -> ArraySource:
    source = ArraySource(np.zeros(0), np.array(labels or [0] * len(images)), class_names=("a", "b"), name="arrays")
    source.image = images.__getitem__  # images of several sizes do not make one array
    return source


def test_digits_come_back_as_they_were(digits_beton: Path):
    beton, source = Beton(digits_beton), digits()
    assert len(beton) == len(source)
    assert beton.class_names == source.class_names
    assert beton.labels.tolist() == [source.label(i) for i in range(len(source))]
    assert all(np.array_equal(pixels(beton, i), source.image(i)) for i in range(len(source)))
    assert (beton.mean, beton.std) == channel_statistics(source)


def test_many_pages_and_sizes(tmp_path: Path):
    """Images of all shapes, over 8 MiB in sum, so that pages end within."""
    rng = np.random.default_rng(0)
    sides = [(1, 1), (1500, 1800), (900, 800), (3, 700), (1672, 1672)]
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sides]
    path = write_beton(array_source(images, [0, 1, 1, 0, 1]), tmp_path / "x.beton", progress=False)
    beton = Beton(path)
    assert beton.labels.tolist() == [0, 1, 1, 0, 1]
    assert all(np.array_equal(pixels(beton, i), image) for i, image in enumerate(images))


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, photos: ArraySource):
    paths = [
        write_beton(photos, tmp_path / f"{n}.beton", num_workers=n, write_mode="jpg", progress=False) for n in (0, 1, 3)
    ]
    assert len({p.read_bytes() for p in paths}) == 1


def test_max_side_keeps_the_shape_and_the_content(tmp_path: Path, photos: ArraySource):
    beton = Beton(write_beton(photos, tmp_path / "x.beton", max_side_px=100, progress=False))
    assert set(beton.heights) == {75}
    assert set(beton.widths) == {100}
    halved = photos.image(0).reshape(75, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels(beton, 0) - halved).max() <= 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ffcv_reads_this_file_and_this_reads_ffcvs(tmp_path: Path, digits_beton: Path):
    """Importing FFCV compiles for seconds, so its own reader and writer are asked once."""
    fields, reader, writer = (pytest.importorskip(f"ffcv.{m}") for m in ("fields", "reader", "writer"))
    ours, theirs = Beton(digits_beton), reader.Reader(str(digits_beton))
    assert list(theirs.handlers) == ["image", "label"]
    assert theirs.num_samples == len(ours)
    assert np.array_equal(theirs.metadata["f1"], ours.labels)
    assert np.array_equal(theirs.alloc_table["ptr"], theirs.metadata["f0"]["data_ptr"])

    path = tmp_path / "ffcv.beton"
    names = {"image": fields.RGBImageField(write_mode="raw"), "label": fields.IntField()}
    source = digits(split="eval")
    samples = [(source.image(i), source.label(i)) for i in range(len(source))]
    writer.DatasetWriter(str(path), names, num_workers=2).from_indexed_dataset(samples)
    beton = Beton(path)
    assert not beton.described
    assert beton.labels.tolist() == [label for _, label in samples]
    assert all(np.array_equal(pixels(beton, i), image) for i, (image, _) in enumerate(samples))


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: int(len(whole) * share)]


DAMAGE = {
    "zero bytes": (lambda whole: b"", "0 bytes, fewer than a header"),
    "garbage": (lambda whole: bytes(range(256)) * 400, "does not begin with the header"),
    "half": (cut(0.5), "cut short"),
    "one percent": (cut(0.99), "cut short"),
    "fields": (lambda whole: whole[:1000], "field descriptors"),
    "one byte": (lambda whole: whole[:-1], "allocation table has"),
    "table": (lambda whole: whole[:-240], "allocation table has"),
    "longer": (lambda whole: whole + b"more", "allocation table has"),
}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, digits_beton: Path, damage: str, described: bool):
    path = tmp_path / "damaged.beton"
    spoil, message = DAMAGE[damage]
    path.write_bytes(spoil(digits_beton.read_bytes()))
    if described:
        shutil.copy(sidecar_path(digits_beton), sidecar_path(path))
    with pytest.raises(ValueError, match=f"damaged.beton cannot be used: .*{message}.*python -m data.convert"):
        Beton(path)


def test_entries_that_lead_nowhere_are_refused(tmp_path: Path, digits_beton: Path):
    whole = bytearray(digits_beton.read_bytes())
    first_row = 24 + 2 * 1041
    for offset, value in ((0, 7), (1, 9), (5, 1), (3, 0)):  # mode, width, address, height
        spoiled = bytearray(whole)
        spoiled[first_row + 24 * 5 + offset] = value
        (tmp_path / "x.beton").write_bytes(spoiled)
        with pytest.raises(ValueError, match="the entry of image 5 does not lead to its bytes"):
            Beton(tmp_path / "x.beton")


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1, 2**62, 0])
def test_sizes_whose_sums_wrap_around_are_refused(tmp_path: Path, photos_jpg: Path, size: int):
    whole = bytearray(photos_jpg.read_bytes())
    whole[-8:] = size.to_bytes(8, "little")  # of the last entry of the table
    (tmp_path / "x.beton").write_bytes(whole)
    with pytest.raises(ValueError, match=r"the entry of image \d+ does not lead to its bytes"):
        Beton(tmp_path / "x.beton")


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x.beton: .*data.convert"):
        Beton(tmp_path / "x.beton")


def test_a_sidecar_of_another_file_is_refused(tmp_path: Path, digits_beton: Path, photos_raw: Path):
    path = tmp_path / "x.beton"
    shutil.copy(digits_beton, path)
    assert not Beton(path).described
    shutil.copy(sidecar_path(photos_raw), sidecar_path(path))
    with pytest.raises(ValueError, match=r"not the file .*x.beton.json describes; they differ in: bytes, checksum"):
        Beton(path)
    sidecar_path(path).write_text("{")
    with pytest.raises(ValueError, match=r"description .* cannot be read"):
        Beton(path)
    sidecar = json.loads(sidecar_path(digits_beton).read_text())
    sidecar_path(path).write_text(json.dumps(sidecar | {"class_names": ["only one"]}))
    with pytest.raises(ValueError, match="differ in: class_names"):
        Beton(path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"\[height, width, 3\] is needed, not uint8 \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"not uint8 \[4, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), "not float32"),
        (np.zeros((0, 4, 3), np.uint8), r"not uint8 \[0, 4, 3\]"),
        (np.zeros((1, 70_000, 3), np.uint8), "a side of 70000 px"),
        (np.zeros((1700, 1700, 3), np.uint8), "give a max_side_px, or write_mode 'jpg'"),
    ],
)
def test_an_image_that_cannot_be_stored_leaves_nothing(tmp_path: Path, image, message, num_workers):
    good = np.zeros((4, 4, 3), np.uint8)
    threads = threading.active_count()
    source = array_source([good] * 5 + [image] + [good] * 50)
    with pytest.raises(ValueError, match=f"image 5 of arrays cannot be stored: .*{message}"):
        write_beton(source, tmp_path / "x.beton", num_workers=num_workers, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_a_source_that_raises_leaves_the_old_file(tmp_path: Path, photos: ArraySource):
    path = write_beton(photos, tmp_path / "x.beton", progress=False)
    before = path.read_bytes()

    def image(index: int) -> np.ndarray:
        raise OSError("disk on fire")

    broken = array_source([], [0] * 3)
    broken.image = image
    with pytest.raises(ValueError, match="image 0 of arrays cannot be stored: disk on fire"):
        write_beton(broken, path, progress=False)
    assert path.read_bytes() == before
    assert len(Beton(path)) == len(photos)
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_that_are_refused(tmp_path: Path, photos: ArraySource):
    good = np.zeros((4, 4, 3), np.uint8)
    for source, settings, message in [
        (array_source([]), {}, "has no images"),
        (array_source([good], [2]), {}, "its label is 2, and there are 2 classes"),
        (photos, {"write_mode": "png"}, "write_mode 'png'"),
        (photos, {"num_workers": -1}, "num_workers -1"),
        (photos, {"max_side_px": 0}, "max_side_px 0"),
        (photos, {"jpeg_quality": 101}, "jpeg_quality 101"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_beton(source, tmp_path / "x.beton", progress=False, **settings)
    assert list(tmp_path.iterdir()) == []
