"""Two runs of one name: the second is refused while the first lives, and changes nothing of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import run_python

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(500), pytest.mark.slow, pytest.mark.xdist_group("faults of commands")]


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


@contextmanager
def under_way(runs: Any, name: str) -> Iterator[subprocess.Popen[str]]:
    """A run that is stopped after step 30, and is continued to its end when the block ends."""
    script = [sys.executable, "tests/faults/faulty_run.py", "batch_end:30:SIGSTOP", *runs.arguments(name)]
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        try:
            wait_until_stopped(first)
            yield first
            first.send_signal(signal.SIGCONT)
            said = first.communicate(timeout=200)[1]
            assert first.returncode == 0, said
        finally:
            first.kill()


def test_the_second_is_refused_and_the_first_ends_undisturbed(runs: Any) -> None:
    with under_way(runs, "twice"):
        before = {path: path.stat().st_mtime_ns for path in (runs.folder / "twice").rglob("*")}
        for how in ("autoresume=false", "autoresume=true", "load=latest"):
            second = runs.start("twice", how)
            assert second.returncode == 2
            assert f"run_name: {runs.folder / 'twice'} belongs to a run that is still going: process " in second.stderr
            assert second.stderr.count("\n") == 1
        beside = runs.start("twice", "run_name_taken=next")
        assert beside.returncode == 0, beside.stderr
        assert beside.stdout.rstrip().endswith(f"results: {runs.folder / 'twice-2'}/")
        assert {path: path.stat().st_mtime_ns for path in (runs.folder / "twice").rglob("*")} == before
    runs.assert_same_end("twice", "whole")
    runs.assert_same_end("twice-2", "whole")
    assert not (runs.folder / "twice.1").exists()


@pytest.mark.exhaustive
def test_a_run_under_way_is_read_by_other_commands(runs: Any, tmp_path: Path) -> None:
    name = "read"
    with under_way(runs, name):
        folder = runs.folder / name
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        sibling = runs.start("sibling", f"load={runs.checkpoint(name)}")
        assert sibling.returncode == 0, sibling.stderr
        for given in (
            ("evaluate", str(folder), "-o", str(tmp_path / "evaluation"), "--no-shifts"),
            ("training.export", str(folder), "--to", "safetensors", "-o", str(tmp_path / "export")),
        ):
            done = run_python("-m", *given, timeout=250)
            assert done.returncode == 0, done.stderr
        unfinished = run_python(
            "-m", "training.results.report", str(folder), "-o", str(tmp_path / "x.html"), timeout=100
        )
        assert unfinished.returncode == 2
        assert "Traceback" not in unfinished.stderr
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    runs.assert_same_end(name, "whole")
    runs.assert_same_end("sibling", "whole")


@pytest.mark.exhaustive
def test_two_conversions_into_one_file(tmp_path: Path) -> None:
    """The first is held when it has written everything, so that they certainly meet: the other is refused."""
    path, whole = tmp_path / "digits.beton", tmp_path / "whole.beton"
    assert run_python("-m", "data.convert", "digits", str(whole), "--split", "train", timeout=100).returncode == 0
    script = [sys.executable, "tests/faults/faulty_run.py", f"name={path}:1:pause=3", "-m", "data.convert"]
    both = [
        subprocess.Popen(
            [*script, "digits", str(path), "--split", "train"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=200)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 2]
    (refused,) = (text for one, text in zip(both, said, strict=True) if one.returncode)
    assert f"error: {path} is being written by another process: wait for its end, or stop it (process " in refused
    assert path.read_bytes() == whole.read_bytes()
    assert {one.name for one in tmp_path.iterdir() if one.name.startswith("digits")} == {path.name, f"{path.name}.json"}


@pytest.mark.exhaustive
def test_two_runs_that_convert_at_once_into_one_folder(runs: Any, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    fault = "name=*.beton:1:pause=3"
    script = [sys.executable, "tests/faults/faulty_run.py", fault]
    both = [subprocess.Popen([*script, *runs.arguments(f"converts {n}", cache)], cwd=ROOT) for n in range(2)]
    assert [one.wait(timeout=250) for one in both] == [0, 0]
    for number in range(2):
        runs.assert_same_end(f"converts {number}", "whole")
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.exhaustive
def test_the_second_of_two_ablations_is_refused(runs: Any, tmp_path: Path) -> None:
    off = [f"algorithms.{one}=null" for one in ("blurpool", "channels_last", "label_smoothing", "sam")]
    short = [f"results_dir={tmp_path}", "duration.epochs=1", "schedule.warmup_epochs=0"]
    given = ("-m", "training.ablate", "--seeds", "1", "--equal", "epochs", *runs.arguments("ablated", *short, *off))
    script = [sys.executable, "tests/faults/faulty_run.py", "batch_end:10:SIGSTOP", *given]
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        try:
            wait_until_stopped(first)
            second = run_python(*given, timeout=200)
            assert second.returncode == 2
            assert "belongs to a run that is still going: process " in second.stderr
            first.send_signal(signal.SIGCONT)
            said = first.communicate(timeout=250)[1]
            assert first.returncode == 0, said
        finally:
            first.kill()
    assert (tmp_path / "ablated_ablation" / "recommended.yaml").is_file()


def test_no_number_ends_the_run_and_a_resumption_leaves_the_step_out(runs: Any) -> None:
    stopped = runs.start("nan", "checkpoints.every_steps=5", fault="after_train_batch:34:nan")
    assert stopped.returncode == 1
    assert stopped.stderr.startswith("run.py: step 34, in epoch 2, gave gradients of ")
    assert stopped.stderr.count("\n") == 1
    assert runs.step("nan") == 30
    again = runs.start(
        "nan", "load=latest", "on_nan=skip", "checkpoints.every_steps=5", fault="after_train_batch:4:nan"
    )
    assert again.returncode == 0, again.stderr
    assert "step 34, in epoch 2, gave gradients of" in again.stderr
    assert "the step is left out" in again.stderr


@pytest.mark.parametrize("rate", ["1e6"])
def test_a_learning_rate_far_too_high_is_told_at_its_step(runs: Any, rate: str) -> None:
    stopped = runs.start("hot", f"optimizer.learning_rate={rate}")
    assert stopped.returncode == 1
    assert "step " in stopped.stderr
    assert "Lower the learning rate" in stopped.stderr
