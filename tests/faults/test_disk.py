"""A disk that takes no more, or a file that cannot be written: one line says which, and nothing before it is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.xdist_group("faults of disk")]
only_in_all = pytest.mark.exhaustive


def assert_nothing_half_written(folder: Path) -> None:
    left = [path for path in folder.rglob("*") if path.suffix in (".partial", ".tmp")]
    assert not left


TRACKED = "logging.trackers={tensorboard: {}}"


@pytest.mark.parametrize(
    ("file", "event", "error", "status", "says"),
    [
        # Before the first step: a mistake, told at once.
        pytest.param(".lock", "start:1", "EACCES", 2, "results_dir=DIR", marks=only_in_all),
        pytest.param(".lock", "start:1", "ENOSPC", 2, "results_dir=DIR", marks=only_in_all),
        pytest.param("recipe.yaml*", "start:1", "ENOSPC", 2, "results_dir=DIR", marks=only_in_all),
        pytest.param("recipe.yaml*", "start:1", "EROFS", 2, "results_dir=DIR", marks=only_in_all),
        pytest.param("model.json*", "start:1", "ENOSPC", 1, "model.json", marks=only_in_all),
        pytest.param("checkpoints", "start:1", "EACCES", 1, "checkpoints", marks=only_in_all),
        # While it trains. Names of checkpoints begin as those of the files that become them.
        pytest.param("metrics.csv*", "epoch_end:2", "ENOSPC", 1, "metrics.csv", marks=only_in_all),
        pytest.param(".checkpoint-latest.tmp", "epoch_end:2", "ENOSPC", 1, "the last whole checkpoint"),
        pytest.param(".checkpoint-latest.tmp", "epoch_end:2", "EROFS", 1, "whole checkpoint", marks=only_in_all),
        pytest.param(".checkpoint-best.tmp", "epoch_end:2", "ENOSPC", 1, "whole checkpoint", marks=only_in_all),
        pytest.param(".checkpoint-previous.tmp", "epoch_end:2", "EACCES", 1, "whole checkpoint", marks=only_in_all),
        pytest.param("latest.pt", "epoch_end:2", "EROFS", 1, "whole checkpoint", marks=only_in_all),
        # At the end.
        pytest.param("metrics.npz*", "fit_end:1", "ENOSPC", 1, "metrics.npz", marks=only_in_all),
        pytest.param("curves.png*", "fit_end:1", "ENOSPC", 1, "curves.png", marks=only_in_all),
        pytest.param("summary.json*", "fit_end:1", "EROFS", 1, "summary.json", marks=only_in_all),
    ],
)
def test_a_file_that_cannot_be_written(runs: Any, file: str, event: str, error: str, status: int, says: str) -> None:
    name = f"no {file.strip('.*')} {error}"
    deny = f"{event}:deny={error}=*{name}{file if file.startswith('.lock') else '/*' + file}"
    refused = runs.start(name, "autoresume=true", fault=deny)
    runs.assert_one_line(refused, status, str(runs.folder), says)
    assert_nothing_half_written(runs.folder / name)
    runs.assert_goes_on(name)
    wanted = {path.name for path in (runs.folder / "whole").iterdir()}
    assert {path.name for path in (runs.folder / name).iterdir()} == wanted


@pytest.mark.exhaustive
@pytest.mark.parametrize(("event", "status", "says"), [("start:1", 1, ": "), ("epoch_end:1", 0, " failed and is")])
def test_a_tracker_whose_file_cannot_be_written(runs: Any, event: str, status: int, says: str) -> None:
    """It is refused before the first step, and left out later."""
    pytest.importorskip("tensorboard")
    name = f"no events at {event.partition(':')[0]}"
    ended = runs.start(name, "autoresume=true", TRACKED, fault=f"{event}:deny=ENOSPC=*tfevents*")
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.count(f"logging.trackers.tensorboard{says}") == 1
    assert "tfevents" in ended.stderr
    runs.assert_goes_on(name, TRACKED)


def test_a_recipe_that_could_not_be_replaced_is_as_it_was(runs: Any) -> None:
    name = "no second recipe"
    stopped = runs.start(name, fault="batch_end:30:SIGTERM")
    assert stopped.returncode == 143
    recipe = runs.folder / name / "recipe.yaml"
    before = recipe.read_text()
    refused = runs.start(name, "load=latest", fault="start:1:largest=1000")  # the recipe has more
    runs.assert_one_line(refused, 2, "results_dir=DIR", "File too large")
    assert recipe.read_text() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 8 MB and 200 files."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=200", "none", tmp_path], capture_output=True, timeout=20
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True, timeout=20)


@pytest.mark.parametrize(
    ("event", "left"),
    [
        ("batch_end:35", 300_000),  # less than a checkpoint
        pytest.param("batch_end:35", 0, marks=only_in_all),
        pytest.param("epoch_end:2", 4096, marks=only_in_all),  # a page
        pytest.param("fit_end:1", 0, marks=only_in_all),
    ],
)
def test_a_disk_that_is_full(runs: Any, small_disk: Path, event: str, left: int) -> None:
    name = str(small_disk / "run")
    settings = [f"results_dir={small_disk}", "run_name=run", "checkpoints.every_steps=10"]
    settings += ["checkpoints.asynchronous=false"]  # so that the older one is gone before the disk is full
    ended = runs.start(name, *settings, fault=f"{event}:full={small_disk}={left}")
    runs.assert_one_line(ended, 1, str(small_disk), "ake room")
    assert_nothing_half_written(small_disk / "run")
    still_full = runs.start(name, "autoresume=true", *settings)
    runs.assert_one_line(still_full, 2 if left < 4096 else 1, str(small_disk))
    (small_disk / "filler").unlink()
    runs.assert_goes_on(name, *settings)


@pytest.mark.exhaustive
def test_a_disk_that_takes_no_more_files(runs: Any, small_disk: Path) -> None:
    name = str(small_disk / "run")
    settings = [f"results_dir={small_disk}", "run_name=run", "checkpoints.every_steps=10"]
    ended = runs.start(name, *settings, fault=f"batch_end:35:files={small_disk}")
    runs.assert_one_line(ended, 1, str(small_disk), "ake room")
    for path in small_disk.glob("filler*"):
        path.unlink()
    runs.assert_goes_on(name, *settings)


@pytest.mark.exhaustive
@pytest.mark.parametrize("through_a_link", [False, True])
def test_results_on_another_file_system(runs: Any, small_disk: Path, tmp_path: Path, through_a_link: bool) -> None:
    folder = small_disk
    if through_a_link:
        folder = runs.folder / "link to a disk"
        folder.symlink_to(small_disk)
    name = str(folder / "run")
    settings = [f"results_dir={folder}", "run_name=run", "checkpoints.every_steps=10"]
    killed = runs.start(name, *settings, fault="batch_end:35:SIGKILL")
    assert killed.returncode == -9
    again = runs.start(name, "autoresume=true", *settings)
    assert again.returncode == 0, again.stderr
    assert "continuing after epoch" in again.stdout
    runs.assert_same_end(name, "whole")
