"""The conversion command: what it prints, and what it leaves on disk however it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Beton
from data.beton.format import sidecar_path
from data.beton.journal import journal_path
from data.convert import main
from data.whole_files import kept_path, partial_files, remove_abandoned, whole_file

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
ENDLESS = ("synthetic", "--set", "num_samples=1000000", "--set", "image_size=64", "--workers", "1")


def command(source: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "data.convert", source, str(out), *options]


def start(source: str, out: Path, *options: str, **settings) -> subprocess.Popen[str]:
    """A conversion in a process of its own."""
    return subprocess.Popen(
        command(source, out, *options), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def being_written(out: Path) -> bool:
    partial = kept_path(out)
    return partial.exists() and partial.stat().st_size > 9 << 20


def image_folder(root: Path, images: int = 3) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (40, 30), (10 * i, 0, 9)).save(root / name / f"{i}.jpg")
    return root


def test_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = image_folder(tmp_path / "images")
    Image.new("L", (40, 30)).save(images / "bee" / "grey.jpg")
    (images / "bee" / "bad.jpg").write_bytes(b"")
    (images / "bee" / "notes.txt").write_text("not an image")
    out = tmp_path / "x.beton"
    assert main([str(images), str(out), "--workers", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("8 images of 2 classes")
    assert printed[1] == "1 files are no images by their names and are passed over"
    assert printed[2].startswith(f"{out}: 7 images, ")
    assert printed[2].endswith("6 JPEGs stored as they were, 1 encoded as JPEGs")
    assert "images/s" in printed[2]
    assert printed[3:] == ["made RGB: 1 grey", f"1 images left out, listed with the reasons in {out}.report.txt"]

    assert main([str(images), str(tmp_path / "y.beton"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert "bee/bad.jpg cannot be stored: it has no bytes" in error
    assert not (tmp_path / "y.beton").exists()


def test_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images, out = image_folder(tmp_path / "images"), tmp_path / "x.beton"
    assert main([str(images), str(out), "--max-side", "20", "--jpeg-quality", "80"]) == 0
    told = json.loads(sidecar_path(out).read_text())
    assert told["class_names"] == ["ant", "bee"]
    assert told["class_counts"] == [3, 3]
    assert (told["heights"], told["widths"]) == ([15, 15, 15], [20, 20, 20])
    assert told["source"]["settings"] == {"path": str(images)}
    assert told["written_as"] == {"write_mode": "jpg", "jpeg_share": 1.0, "max_side_px": 20, "jpeg_quality": 80}
    np.testing.assert_allclose(told["mean"], [10, 0, 9], atol=2)
    capsys.readouterr()


def test_jpeg_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images, out = image_folder(tmp_path / "images", images=40), tmp_path / "x.beton"
    assert main([str(images), str(out), "--jpeg-share", "0.5"]) == 0
    assert 20 < Beton(out).is_jpeg(np.arange(80)).sum() < 60
    assert main([str(images), str(out), "--jpeg-share", "0.5", "--write-mode", "raw"]) == 2
    assert main([str(images), str(out), "--jpeg-share", "1.5"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "error: --jpeg-share and --write-mode raw: give one of them"
    assert error[1] == "error: jpeg_share 1.5: give a number from 0 to 1"


def test_killed_outright_it_leaves_nothing_usable_and_another_conversion_takes_its_place(tmp_path: Path):
    out = tmp_path / "x.beton"
    process = start(ENDLESS[0], out, *ENDLESS[1:])
    try:
        wait_until(lambda: being_written(out), process)
        second = subprocess.run(command("digits", out), cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: {out} is being written by another process: wait for its end, or stop it")
    assert f"(process {process.pid} on " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == [kept_path(out), journal_path(out)]
    with pytest.raises(ValueError, match="does not begin with the header"):
        Beton(kept_path(out))

    done = subprocess.run(
        command("synthetic", out, "--set", "num_samples=9"), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "what an earlier conversion has left is of another source: beginning anew" in done.stdout
    assert len(Beton(out)) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(tmp_path: Path, number: int):
    out = tmp_path / "x.beton"
    process = start(ENDLESS[0], out, *ENDLESS[1:])
    try:
        wait_until(lambda: being_written(out), process)
        process.send_signal(number)
        _, error = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert error.strip() == (
        f"interrupted: {out} is not complete; the same command goes on where this one was, --restart begins anew"
    )
    assert sorted(tmp_path.iterdir()) == [kept_path(out), journal_path(out)]


def test_no_room_left(tmp_path: Path):
    """A limit on the size of files, which the operating system refuses to go beyond as it does on a full disk."""
    out = tmp_path / "x.beton"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))

    process = start(ENDLESS[0], out, *ENDLESS[1:], preexec_fn=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(error.strip().splitlines()) == 1
    assert error.startswith(f"error: {out} cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["digits", str(tmp_path / "file" / "x.beton")]) == 2
    assert main(["digits", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert "x.beton cannot be written: File exists" in error[0]
    assert error[1].startswith(f"error: {tmp_path} is a folder: give the name of the file to write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert main(["digits", str(folder / "x.beton")]) == 2
    assert "x.beton cannot be written: Permission denied" in capsys.readouterr().err


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    train, valid = image_folder(tmp_path / "set" / "train"), image_folder(tmp_path / "set" / "valid")
    (valid / "bee").rename(valid / "wasp")
    out, differ = str(tmp_path / "x.beton"), f"of {train} and {valid} differ: {valid} alone has wasp, which no image"
    for arguments, message in [
        (["./missing"], "no folder missing"),
        ([str(tmp_path / "empty")], "has no folders in it"),
        ([str(tmp_path / "set"), "--split", "train"], differ),
        ([str(tmp_path / "set"), "--split", "eval"], differ),
    ]:
        assert main([arguments[0], out, *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not Path(out).exists()


def test_a_whole_file_or_none(tmp_path: Path):
    path = tmp_path / "odd [name]*.txt"
    with whole_file(path) as file:
        file.write(b"first")
        assert partial_files(path) == [Path(file.name)]
        assert not path.exists()
        assert remove_abandoned(path) == []

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write(b"second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"first"
    abandoned = tmp_path / f"{path.name}.12345678.partial"
    abandoned.write_bytes(b"of a process that was killed")
    other = tmp_path / "odd nX.txt.12345678.partial"
    other.write_bytes(b"of another file")
    assert remove_abandoned(path) == [abandoned]
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_what_cannot_be_flushed_names_its_file(tmp_path: Path) -> None:
    """As on a full disk, where closing the file fails once more."""
    path = tmp_path / "a.beton"

    def write_to_nothing() -> None:
        with whole_file(path) as file:
            file.write(b"more")
            os.close(file.fileno())

    with pytest.raises(OSError, match="Bad file descriptor") as told:
        write_to_nothing()
    assert told.value.filename == str(path)
    assert not list(tmp_path.iterdir())
