"""Two runs of one name: the second is refused while the first lives, and changes nothing of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(200), pytest.mark.slow, pytest.mark.xdist_group("faults")]


def test_the_second_is_refused_and_the_first_ends_undisturbed(runs: Any) -> None:
    script = [sys.executable, "tests/faults/faulty_run.py", "batch_end:30:SIGSTOP", *runs.arguments("twice")]
    with subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.1)
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
        first.send_signal(signal.SIGCONT)
        said = first.communicate(timeout=100)[1]
        assert first.returncode == 0, said
    runs.assert_same_end("twice", "whole")
    runs.assert_same_end("twice-2", "whole")
    assert not (runs.folder / "twice.1").exists()


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
