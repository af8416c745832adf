"""Faulty files: an error that says what to do, never a hang, wrong images or a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_python

from data.beton.format import Beton, sidecar_path
from data.loading.ffcv_loader import FFCVLoader

pytestmark = pytest.mark.timeout(240)  # up to five processes in a row

# Takes one pass over a file, as a run does. The alarm ends the process if it waits for ever.
TAKE_A_PASS = """
import signal, sys
from data.build import build_loader
path, num_classes = sys.argv[1], int(sys.argv[2])
signal.alarm(5)
names = [str(i) for i in range(num_classes)]
settings = {"per_device_batch_size": 10, "image_size": 16, "num_workers": 2}
try:
    loader = build_loader(source="digits", split="train", path=path, class_names=names, log=lambda _: None, **settings)
    print(sum(len(labels) for _, labels in loader))
except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}")
"""


def take_a_pass(path: Path | str, num_classes: int = 10) -> str:
    done = run_python("-c", TAKE_A_PASS, str(path), str(num_classes), timeout=50)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr}"
    (line,) = done.stdout.splitlines()
    return line


def nothing(path: Path) -> None:
    pass


def gone(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def becomes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return spoil


def damaged_image(path: Path) -> None:
    start = int(Beton(path)._starts[3])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(500))


def one_bit_of_an_image(path: Path) -> None:
    """Of its coded data, where libjpeg hardly ever notices it."""
    beton = Beton(path)
    with path.open("r+b") as file:
        file.seek(int(beton._starts[3] + beton._sizes[3] // 2))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 2]))


def huge_image(path: Path) -> None:
    """The first row's mode, width and height; neither is the frame's checksum there nor a sidecar."""
    sidecar_path(path).unlink()
    whole = bytearray(path.read_bytes())
    whole[2107:2111] = (65_500).to_bytes(2, "little") * 2
    path.write_bytes(whole)


def sidecar(**changes: object) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        told = json.loads(sidecar_path(path).read_text())
        sidecar_path(path).write_text(json.dumps(told | changes))

    return spoil


def sidecar_of_text(text: str) -> Callable[[Path], None]:
    return lambda path: (sidecar_path(path).write_text(text), None)[1]


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (nothing, "30"),
    "missing": (gone, "no file"),
    "a folder": (folder, "no file"),
    "zero bytes": (becomes(lambda whole: b""), "0 bytes, fewer than a header"),
    "garbage": (becomes(lambda whole: os.urandom(100_000)), "does not begin with the header"),
    "text": (becomes(lambda whole: b"<html>not found</html>" * 99), "does not begin with the header"),
    "cut by 1 %": (becomes(lambda whole: whole[: len(whole) * 99 // 100]), "cut short"),
    "cut in half": (becomes(lambda whole: whole[: len(whole) // 2]), "cut short"),
    "cut inside the table": (becomes(lambda whole: whole[:-30]), "its allocation table has 690 bytes, and 30 images"),
    "as many images as can be said": (
        becomes(lambda whole: whole[:8] + b"\xff" * 8 + whole[16:]),
        "cut short",
    ),
    "zeros in the table": (becomes(lambda whole: whole[:-720] + bytes(720)), "does not lead to its bytes"),
    "an image inside": (damaged_image, "image 3 of"),
    "one bit of an image": (one_bit_of_an_image, "image 3 of"),
    "a huge image": (huge_image, "its image 0 is of 65500x65500 px, and an image may have 89,478,485 pixels; convert"),
    "another label": (becomes(lambda whole: whole[:2122] + b"\x02" + whole[2123:]), "they differ in: checksum"),
    "sidecar of another file": (sidecar(checksum=1), "they differ in: checksum"),
    "sidecar with fewer classes": (sidecar(class_names=["a", "b"]), "they differ in: class_names"),
    "sidecar without numbers": (sidecar(mean=["a", "b", "c"]), "cannot be read"),
    "sidecar with too few numbers": (sidecar(std=[1, 2]), "they differ in: std"),
    "sidecar with too few checksums": (sidecar(image_checksums="AAAAAA=="), "they differ in: image_checksums"),
    "sidecar with checksums that are none": (sidecar(image_checksums="AA=A"), "cannot be read"),
    "sidecar of nothing": (sidecar_of_text(""), "cannot be read"),
    "sidecar of a list": (sidecar_of_text("[1, 2]"), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_an_error_or_no_fault(tmp_path: Path, photos_jpg: Path, fault: str):
    path = tmp_path / "x.beton"
    shutil.copy(photos_jpg, path)
    told = json.loads(sidecar_path(photos_jpg).read_text()) | {"class_names": ["0", "1", "2"]}
    sidecar_path(path).write_text(json.dumps(told))
    spoil, message = FAULTS[fault]
    spoil(path)
    line = take_a_pass(path, num_classes=3)
    assert message in line
    if fault != "none":
        assert line.startswith("error: ")
        assert str(path) in line


def test_labels_beyond_the_models_classes(tmp_path: Path, photos_jpg: Path):
    assert f"{photos_jpg} has labels of 3 classes, and the model has 2: give data of" in take_a_pass(photos_jpg, 2)
    assert f"{photos_jpg} has other classes than the model: label 0 is 'ant' there and '0' here" in take_a_pass(
        photos_jpg, 3
    )
    plain = tmp_path / "x.beton"
    shutil.copy(photos_jpg, plain)  # without a sidecar its labels are all that is known
    assert "has labels of 3 classes, and the model has 2" in take_a_pass(plain, 2)
    assert take_a_pass(plain, 3) == "30"
    assert take_a_pass(plain, 9) == "30"


def test_places_that_are_no_files():
    assert take_a_pass("s3://bucket/x.beton").startswith("error: no file s3:/bucket/x.beton: correct the path")


CUT_SHORT = """
import os, sys, time
from data.loading.ffcv_loader import FFCVLoader
loader = FFCVLoader(sys.argv[1], per_device_batch_size=4, image_size=32, train=True, num_workers=2)
passes = iter(loader)
next(passes)
time.sleep(1)  # the threads have decoded what they may ahead, and wait
os.truncate(sys.argv[1], 4096)
try:
    for batch in passes: pass
except OSError as error:
    print(error)
"""


@pytest.mark.timeout(100)
def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path, photos_jpg: Path):
    path = tmp_path / "photos.beton"
    path.write_bytes(photos_jpg.read_bytes())
    done = run_python("-c", CUT_SHORT, str(path), timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path} was cut short while it was read: it had ")


@pytest.mark.parametrize("decoder", ["native", "libffcv"])
def test_a_height_that_is_not_the_jpegs_is_refused_by_every_decoder(tmp_path: Path, photos_jpg: Path, decoder: str):
    whole = bytearray(photos_jpg.read_bytes())
    first_row = 24 + 2 * 1041
    width, height = first_row + 1, first_row + 3
    assert whole[width : height + 2] == bytes([200, 0, 150, 0])
    whole[height : height + 2] = (1500).to_bytes(2, "little")
    path = tmp_path / "tall.beton"
    path.write_bytes(whole)
    loader = FFCVLoader(path, decoder=decoder, per_device_batch_size=30, image_size=32, train=False)
    with pytest.raises(ValueError, match=r"image 0 of .*tall\.beton cannot be decoded: .*(1500x200|of another size)"):
        next(iter(loader))
