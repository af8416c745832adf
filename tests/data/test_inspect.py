"""python -m data.inspect: what it prints, what it finds, and the contact sheet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Beton, FFCVLoader, digits, write_beton
from data.beton.format import sidecar_path
from data.inspect import contact_sheet, main

pytestmark = pytest.mark.timeout(60)


def copied(beton: Path, to: Path) -> Path:
    shutil.copy(beton, to)
    shutil.copy(sidecar_path(beton), sidecar_path(to))
    return to


def without_checksum_of_each(beton: Path) -> None:
    """A sidecar as it was before 2026-11-29."""
    told = json.loads(sidecar_path(beton).read_text())
    del told["image_checksums"]
    sidecar_path(beton).write_text(json.dumps(told))


def test_what_it_shows(digits_beton: Path, photos_jpg: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(digits_beton)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{digits_beton}: 1,438 images of 10 classes, ")
    assert shown[0].endswith("0 as JPEGs and 1,438 as pixels")
    source = digits()
    counts = np.bincount([source.label(i) for i in range(len(source))])
    for digit, count in enumerate(counts):
        assert f"     {digit} {digit} {count:>9}" in shown
    assert "heights: 8 to 8 px, 8 in the median" in shown
    assert any(line.split() == ["0", "to", "15", "1,438", "#" * 40] for line in shown)
    assert main([str(photos_jpg), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "30 as JPEGs and 0 as pixels" in shown
    assert "all 30 images decode and have the sidecar's checksum" in shown


def test_without_a_sidecar(tmp_path: Path, digits_beton: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "x.beton"
    shutil.copy(digits_beton, path)
    assert main([str(path), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "no sidecar: classes have numbers for names" in shown
    assert "all 1,438 images decode; there is no checksum to compare them with" in shown


def test_damage_that_opening_cannot_see(
    tmp_path: Path, photos_jpg: Path, photos_raw: Path, capsys: pytest.CaptureFixture[str]
):
    jpegs = copied(photos_jpg, tmp_path / "jpegs.beton")
    starts = [int(Beton(jpegs)._starts[i]) for i in (4, 17)]
    with jpegs.open("r+b") as file:
        for start in starts:
            file.seek(start)
            file.write(bytes(300))
    assert main([str(jpegs)]) == 0
    assert main([str(jpegs), "--verify"]) == 2
    assert f"error: 2 images of {jpegs} are damaged: 4, 17; convert" in capsys.readouterr().err

    pixels = copied(photos_raw, tmp_path / "pixels.beton")
    start = int(Beton(pixels)._starts[9])
    with pixels.open("r+b") as file:
        file.seek(start + 100)
        file.write(b"\x01\x02\x03")
    assert main([str(pixels), "--verify"]) == 2
    assert f"error: 1 images of {pixels} are damaged: 9; convert" in capsys.readouterr().err
    without_checksum_of_each(pixels)
    assert main([str(pixels), "--verify"]) == 2
    assert "decode, but are not those that" in capsys.readouterr().err


def test_the_sheet_has_what_the_loader_gives(tmp_path: Path, photos_jpg: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "sheet.png"
    augmentations = [{"name": "rotation", "degrees": 30}, {"name": "color_jitter", "brightness": 0.5}]
    options = ["--rows", "2", "--columns", "3", "--image-size", "96", "--seed", "5", "--crop-scale", "0.5", "1"]
    arguments = [str(photos_jpg), "--sheet", str(sheet), *options, "--augmentations", json.dumps(augmentations)]
    assert main(arguments) == 0
    assert str(sheet) in capsys.readouterr().out
    loader = FFCVLoader(
        photos_jpg, per_device_batch_size=6, image_size=96, train=True, seed=5, crop_scale=(0.5, 1),
        augmentations=augmentations,
    )  # fmt: skip
    images = next(iter(loader))[0].permute(0, 2, 3, 1).numpy()
    shown = np.asarray(Image.open(sheet))
    assert shown.shape == (2 * (96 + 14 + 4), 3 * (96 + 4), 3)
    for place, image in enumerate(images):
        top, left = place // 3 * 114 + 2, place % 3 * 100 + 2
        assert np.array_equal(shown[top : top + 96, left : left + 96], image)
        assert (shown[top + 96 : top + 110, left : left + 96] < 128).any(), "a caption"


def test_small_images_are_enlarged_and_long_names_cut(tmp_path: Path):
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    sheet = np.asarray(contact_sheet(images, ["a", "a very long name of a class that does not fit"], columns=2))
    assert sheet.shape == (96 + 14 + 4, 2 * 100, 3)
    assert np.array_equal(sheet[2:98:12, 2:98:12], images[0])
    assert (sheet[:, -2:] == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sheet", "x.png", "--augmentations", "cutout"], "--augmentations cutout: give JSON"),
        (["--sheet", "x.png", "--augmentations", "{}"], "--augmentations {}: give a list"),
        (["--sheet", "x.png", "--augmentations", '[{"name": "cutuot"}]'], "did you mean cutout?"),
        (["--sheet", "x.png", "--image-size", "0"], "image size 0"),
        (["--sheet", "x.png", "--rows", "0"], "per-device batch size 0"),
        (["--sheet", "missing/x.png"], "No such file or directory"),
    ],
)
def test_mistakes(
    tmp_path: Path, digits_beton: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([str(digits_beton), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_many_classes_are_not_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from data import synthetic

    path = write_beton(synthetic(num_samples=60, num_classes=30, image_size=4), tmp_path / "x.beton", progress=False)
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "classes: 2 to 2 images each" in shown
    assert "and 10 more" in shown
