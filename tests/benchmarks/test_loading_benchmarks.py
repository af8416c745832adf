"""The benchmarks of our own loader: they run in small, and their arithmetic is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.loaders import main
from benchmarks.loading.ahead import share_waited
from benchmarks.loading.cores import cores
from benchmarks.loading.files import tiered_file
from benchmarks.loading.tiers import difference
from data import write_beton
from data.sources import synthetic

pytestmark = pytest.mark.timeout(240)

SMALL = ("--images", "24", "--rounds", "1", "--batch-size", "8", "--workers", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small set, made beforehand."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("photos")
    tiered_file(folder, 24)
    return folder


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """(what the JSON file says, the table)."""
    written = tmp_path / "deep" / "figures.json"
    main([*arguments, *SMALL, "--json", str(written)])
    return json.loads(written.read_text()), capsys.readouterr().out


def test_tiers(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, said = run(capsys, tmp_path, "--tiers", "--folder", str(photos), "--image-sizes", "128", "224")
    read = {(row["contender"], row["image_size"]): row["file"] for row in report["rows"]}
    assert read["tiers", 128].endswith(".256.beton")
    assert read["tiers", 224] == read["single", 224] == read["single", 128] != read["encoded", 128]
    pixels = report["pixels"]
    assert pixels["file"] == read["tiers", 128]
    assert 0 < pixels["differences"]["single and exact"]["mean_absolute"] < 4
    assert 0 < pixels["differences"]["tier and single"]["mean_absolute"] < 16
    assert 20 < pixels["differences"]["tier and single"]["psnr_db"] < 60
    small, large = (report["stored_bytes_per_image"][read["tiers", px]] for px in (128, 224))
    assert small < large / 2
    assert "CPU-seconds at 128 px over the single file's; goal at most 0.6" in said


def test_restarts(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, said = run(capsys, tmp_path, "--restarts", "--folder", str(photos), "--image-sizes", "96")
    assert [(row["file"], row["least_area"]) for row in report["rows"]] == [
        (name, area) for area in (0.08, 0.35) for name in ("copied", "encoded")
    ]
    for without, restarts in report["bytes_per_image"].values():
        assert 0.9 * without < restarts < 1.05 * without
    assert "copied: " in said


def test_cores(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cores(0.5, 2500, 224) == pytest.approx(1.25)
    assert cores(0.5, 2500, 128) == pytest.approx(1.25 * 4.09 / 1.34)
    report, said = run(capsys, tmp_path, "--cores", "--folder", str(photos), "--image-sizes", "128")
    assert len(report["rows"]) == 3
    assert "H100, MLPerf: 7,160/s" in said


def test_ahead(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ahead", "--folder", str(photos), "--image-sizes", "64", "--disturbers", "1"]
    report, said = run(capsys, tmp_path, *arguments)
    (row,) = report["rows"]
    assert row["batches"] == 3
    assert row["cv"] > 0
    assert "rule: " in said


def test_pace_beside_training_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = synthetic(num_samples=24, image_size=48)
    path = write_beton(source, tmp_path / "x.beton", sizes=(24, 48), write_mode="jpg", progress=False)
    arguments = ["--device", "cpu", "--path", str(path), "--batches", "2"]
    report, said = run(capsys, tmp_path, *arguments, "--model", "resnet18", "--image-sizes", "12")
    (row,) = report["rows"]
    assert all(values["median"] > 0 for values in row["images_per_second"].values())
    assert 0 <= row["waited"]["median"] < 1
    assert "a step is resnet18 on cpu" in said
    waits = ["--step-ms", "20", "--batches-ahead", "3", "--image-sizes", "12", "32"]
    report, said = run(capsys, tmp_path, *arguments, *waits)
    assert "a step is a wait of 20 ms on cpu" in said
    assert [row["file"] for row in report["rows"]] == ["x.24.beton", "x.beton"]
    assert report["rows"][0]["images_per_second"]["step"]["median"] < 8 / 0.02


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tiers", "--images", "8"], "--images 8: they do not fill a batch of 64; give more"),
        (["--cores", "--rounds", "0"], "0: give a whole number of at least 1"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device=cpu", "--batches-ahead", "few"], "--batches-ahead: batches_ahead few: give auto or a whole number"),
        (["--device", "cpu", "--path", "none.beton"], "nothing was measured: no file none.beton"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_differences() -> None:
    left = np.zeros((1, 2, 2, 3), np.uint8)
    assert difference(left, left) == {"mean_absolute": 0, "psnr_db": math.inf}
    assert difference(left, left + 5) == {"mean_absolute": 5, "psnr_db": pytest.approx(20 * math.log10(51))}


def test_no_waiting_for_a_faster_loader_and_all_the_difference_for_a_slower_one() -> None:
    """Four parts of a batch on two threads, each a second: a batch every two seconds."""
    times = np.ones((200, 4))
    for ahead in (1, 2, 8):
        assert share_waited(times, 2, ahead, 2.0) == pytest.approx(0)
        assert share_waited(times, 2, ahead, 1.0) == pytest.approx(0.5, abs=0.02)


def test_batches_ahead_cover_one_that_is_slow() -> None:
    """On one thread, batches of 0.8 of a step, and one of 5 steps: as many must be ready, or their time is lost."""
    times = np.full((200, 1), 0.8)
    times[100] = 5.0
    waits = [share_waited(times, 1, ahead, 1.0) * 200 for ahead in (1, 2, 3, 4, 5, 6)]
    assert waits == pytest.approx([3, 2, 1, 0, 0, 0], abs=0.6)
    assert waits == sorted(waits, reverse=True)
