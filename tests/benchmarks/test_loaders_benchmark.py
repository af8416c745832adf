"""The benchmark of loaders: it runs, its arithmetic is right, and it leaves out what fails and reports why."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks import photos
from benchmarks.contender_process import ContenderError, ContenderProcess, memory_mib
from benchmarks.loader_contenders import CONTENDERS, Job, checked_length
from benchmarks.loaders import TITLES, Row, contender_command, goals, main, measure, parse, ratios, table

ROOT = Path(__file__).parents[2]

# Contenders of a few lines: each answers as benchmarks/loader_contenders.py does, for a while.
ANSWER = """
import json, sys, time
def answer(**more):
    line = dict(images=100, cpu_seconds=0.1, wall_seconds=0.2, first_batch_at=time.monotonic(), turnaround_seconds=0.01)
    print(json.dumps(line | more), flush=True)
"""
WELL = ANSWER + "for line in sys.stdin: answer(cpu_seconds=json.loads(line)['image_size'] / 1000)"
CRASHES_AT_ONCE = "raise ModuleNotFoundError('no such library')"
CRASHES_LATER = ANSWER + "sys.stdin.readline(); answer(); sys.stdin.readline(); raise ValueError('images ran out')"
HANGS = ANSWER + "sys.stdin.readline(); answer(); time.sleep(600)"
ENDS_SILENTLY = "import os; os._exit(3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    return tmp_path_factory.mktemp("photos")


def run_quick(folder: Path, tmp_path: Path, *only: str, timeout: float) -> tuple[dict[str, Any], str, str]:
    """(what the JSON file says, stdout, stderr) of a quick run."""
    written, chart = tmp_path / "deep" / "figures.json", tmp_path / "figures.png"
    arguments = ["--quick", "--folder", str(folder), "--json", str(written), "--chart", str(chart), "--only", *only]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loaders", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(chart) as picture:
        assert picture.format == "PNG"
    return json.loads(written.read_text()), done.stdout, done.stderr


@pytest.mark.timeout(300)
def test_a_quick_run_without_ffcv(folder: Path, tmp_path: Path) -> None:
    # No FFCV to write the file either, nor scikit-image for photos: this package and scikit-learn stand in.
    code = "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name, *a: None if name in ('ffcv', 'skimage') else find(name, *a)\n"
    code += "runpy.run_module('benchmarks.loaders', run_name='__main__')"
    written = tmp_path / "figures.json"
    only = ["ours", "torchvision", "torchvision_v2", "limit_crop", "limit_entropy"]
    done = subprocess.run(
        [sys.executable, "-c", code, "--quick", "--folder", str(folder), "--json", str(written), "--only", *only],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(written.read_text())
    assert "scikit-image is left out" in done.stderr
    assert "FFCV's writer is left out: FFCV is not installed" in done.stderr
    assert report["images"]["photos"] == ["china.jpg", "flower.jpg"]
    assert report["images"]["beton_writer"] == "brisk-vision"
    assert 90_000 <= report["images"]["mean_bytes"] <= 130_000
    measured = [row["contender"] for row in report["rows"]]
    assert set(measured) | set(report["absent"]) == set(only)
    assert {"ours", "torchvision", "torchvision_v2"} <= set(measured)  # the limits need a compiler
    for row in report["rows"]:
        assert row["n"] == 1
        assert row["cpu_seconds_per_1000"]["median"] > 0
        assert row["ratio_to_ffcv"] is None
    assert any("torchvision" in goal["what"] for goal in report["goals"])
    assert "FFCVLoader, native decoder" in done.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_a_quick_run_beside_ffcv(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    if find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    report, said, _ = run_quick(folder, tmp_path, "ours", "ours_libffcv", "ffcv", timeout=380)
    assert report["absent"] == {}
    assert report["images"]["beton_writer"] == "ffcv"
    assert len(report["images"]["photos"]) > 5
    assert [row["ratio_to_ffcv"]["median"] for row in report["rows"] if row["contender"] == "ffcv"] == [1.0]
    what = [goal["what"] for goal in report["goals"]]
    assert "CPU-seconds at 224 px over FFCV's" in what
    assert "memory over FFCV's" in what
    assert "over FFCV" in said


def commands(**codes: str) -> dict[str, list[str]]:
    return {name: [sys.executable, "-c", code] for name, code in codes.items()}


@pytest.mark.timeout(120)
def test_contenders_that_fail_are_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    codes = {
        "ours": WELL,
        "dali": CRASHES_AT_ONCE,
        "ffcv": CRASHES_LATER,
        "torchvision": HANGS,
        "limit_crop": ENDS_SILENTLY,
    }
    rows, first, absent = measure(commands(**codes), [100, 200], rounds=2, starts=2, timeout_seconds=5)
    assert absent == {
        "dali": "ModuleNotFoundError: no such library",
        "ffcv": "ValueError: images ran out",
        "torchvision": "no answer within 5 s",
        "limit_crop": "it ended with status 3 and said nothing",
    }
    said = capsys.readouterr().err
    assert all(f"{name} is left out: {reason}" in said for name, reason in absent.items())
    assert {(row.contender, row.image_size): row.cpu_seconds for row in rows} == {
        ("ours", 100): pytest.approx([1.0, 1.0]),
        ("ours", 200): pytest.approx([2.0, 2.0]),
    }
    assert rows[0].images_per_second == pytest.approx([500, 500])
    # The warm-up ended with the second size. The round after it has both, in either order.
    assert 2 <= sum(len(row.turnaround_seconds) for row in rows) <= 4
    assert list(first) == ["ours"]
    assert len(first["ours"]) == 2


@pytest.mark.timeout(60)
def test_nothing_is_left_of_a_contender_that_hangs() -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    process = ContenderProcess([sys.executable, "-c", code + "time.sleep(600)"], timeout_seconds=2)
    with pytest.raises(ContenderError, match="no answer within 2 s"):
        process.ask({"image_size": 1, "epoch": 0})
    family = psutil.Process(process._process.pid).children()
    assert len(family) == 1
    process.kill()
    process.kill()
    psutil.wait_procs(family, timeout=10)
    assert not family[0].is_running() or family[0].status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(60)
def test_memory_counts_children_and_shared_pages_once() -> None:
    if memory_mib(psutil.Process().pid) is None:
        pytest.skip("this system does not tell")
    code = """
import mmap, os, sys
shared = mmap.mmap(-1, 64 << 20)
shared.write(b"x" * (64 << 20))
own = b"y" * (32 << 20)
if os.fork() == 0:
    total = sum(shared[::4096]) + sum(own[::4096])
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        found = memory_mib(process.pid)
        process.communicate()
    assert found is not None
    assert 96 <= found <= 125


def row(contender: str, size: int, cpu: list[float], *, memory: float | None = 100.0) -> Row:
    return Row(contender, size, cpu, [1000.0] * len(cpu), [0.1] * len(cpu), [memory] * len(cpu))


def test_ratios_are_of_the_same_round() -> None:
    # Rounds of three different speeds, and no spread at all.
    mine, theirs = row("ours", 128, [1.0, 2.0, 3.0] * 3), row("ffcv", 128, [2.0, 4.0, 6.0] * 3)
    assert ratios(mine, theirs) == [0.5] * 9


def test_goals_are_judged_at_every_size() -> None:
    rows = [
        *(row("ours", 128, [0.5] * 9), row("ffcv", 128, [1.0] * 9), row("torchvision", 128, [2.0] * 9)),
        *(row("ours", 224, [0.6] * 9, memory=130.0), row("ffcv", 224, [1.0] * 9), row("torchvision", 224, [1.5] * 9)),
    ]
    found = {goal["what"]: (goal["values"]["median"], goal["verdict"]) for goal in goals(rows, {"ours": [1.5, 3.0]})}
    assert found == {
        "CPU-seconds at 128 px over FFCV's": (0.5, "met"),
        "CPU-seconds at 224 px over FFCV's": (0.6, "missed"),
        "CPU-seconds at 128 px over torchvision, PIL's": (0.25, "met"),
        "CPU-seconds at 224 px over torchvision, PIL's": (0.4, "missed"),
        "memory over FFCV's": (1.3, "missed"),
        "seconds from the start to the first batch": (2.25, "open"),
        "seconds from the last batch to the first of another size": (0.1, "met"),
    }


def test_goals_without_the_other_are_not_judged() -> None:
    assert goals([row("ffcv", 128, [1.0])], {"ffcv": [9.0]}) == []
    found = goals([row("ours", 128, [1.0], memory=None), row("ffcv", 128, [2.0])], {})
    assert [goal["what"] for goal in found] == [
        "CPU-seconds at 128 px over FFCV's",
        "seconds from the last batch to the first of another size",
    ]


def test_a_report_is_read_and_printed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stored in sorted((ROOT / "benchmarks" / "results").glob("loaders_*.json")):
        main(["--read", str(stored), "--chart", str(tmp_path / "figures.png")])
        assert capsys.readouterr().out.strip() == table(json.loads(stored.read_text())).strip()
        assert (tmp_path / "figures.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "10"], "--images 10: they do not fill a batch of 64"),
        (["--least-area", "1.5"], "--least-area 1.5: give a number above 0 and up to 1"),
        (["--rounds", "0"], "--rounds 0: give a number above 0"),
        (["--image-sizes", "128", "-1"], "--image-sizes -1: give a number above 0"),
        (["--read", "absent.json"], "--read absent.json: there is no such file"),
        (["--json", "{folder}"], "no file can be written there"),
        (["--json", "{folder}/file/deeper.json"], "no file can be written there"),
        (["--only", "cafe"], "invalid choice: 'cafe'"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        parse([argument.format(folder=tmp_path) for argument in arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_photos_are_as_they_should_be(folder: Path) -> None:
    found = photos.find_photos()
    for index in range(8):
        data = photos.cut(index, found)
        assert data == photos.cut(index, found)
        assert 90_000 <= len(data) <= 130_000
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) == 500
            assert 375 <= min(image.size) <= 400
            assert np.asarray(image).std() > 5


def test_a_set_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    original = photos.cut

    def breaks(index: int, photos: Any) -> bytes:
        if index == 3:
            raise OSError("no space left")
        return original(index, photos)

    monkeypatch.setattr(photos, "cut", breaks)
    with pytest.raises(OSError, match="no space left"):
        photos.make_photos(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    made = photos.make_photos(tmp_path, 20)
    assert made.num_images == 20
    assert [len(list(one.glob("*.jpg"))) for one in made.folder.glob("class_*")] == [2] * 10
    begin = time.time()
    assert photos.make_photos(tmp_path, 20) == made
    assert all(path.stat().st_mtime < begin for path in made.folder.rglob("*.jpg"))


def test_batches_are_looked_at() -> None:
    torch = pytest.importorskip("torch")
    assert checked_length(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), 8) == 5
    assert checked_length(torch.zeros(5, 8, 8, 3, dtype=torch.uint8), 8) == 5
    for wrong in (torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 9, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not uint8 images of 8 px"):
            checked_length(wrong, 8)


def test_every_contender_has_a_title_and_a_command() -> None:
    assert set(TITLES) == set(CONTENDERS)
    job = Job("photos", "file.beton", 64, 2, 0.08)
    assert Job(**json.loads(contender_command("ours", job)[-1])) == job
    assert dataclasses.asdict(job)["batch_size"] == 64
    assert job.crop_scale == (0.08, 1.0)
