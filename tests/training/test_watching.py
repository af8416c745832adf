"""Trackers and profile from the command line: the same values under each engine, and mistakes in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import cli
from training.results.history import read_metrics

ROOT = Path(__file__).parents[2]
PLAIN = ("algorithms=null", "duration.epochs=2", "parallelism.sync_batchnorm=false", "logging.progress_bar=false")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_run_is_tracked_and_profiled_under_each_engine(tmp_path: Path, cache_dir: Path, engine: str) -> None:
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    command = [
        sys.executable, "run.py", "-f", "yamls/digits_medium.yaml", *PLAIN, f"results_dir={tmp_path}", "run_name=seen",
        f"data.cache_dir={cache_dir}", f"parallelism.strategy={engine}", "logging.trackers.tensorboard={}",
        "logging.tracker_interval_steps=11", "logging.profile.steps=[3,4]",
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr

    rows = read_metrics(tmp_path / "seen" / "metrics.csv")
    events = EventAccumulator(str(tmp_path / "seen"))
    events.Reload()
    for tag, name in (("eval/top1", "eval_top1"), ("eval/loss", "eval_loss"), ("epoch/train_loss", "train_loss")):
        assert [event.step for event in events.Scalars(tag)] == [22, 44]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[name] for row in rows], rel=1e-5)
    losses = [event.value for event in events.Scalars("train/loss")]
    assert [event.step for event in events.Scalars("train/loss")] == [11, 22, 33, 44]
    assert sum(losses[:2]) / 2 == pytest.approx(rows[0]["train_loss"], rel=1e-5)  # batches of one size
    assert events.Scalars("train/learning_rate")[1].value == pytest.approx(rows[0]["learning_rate"])
    assert all(0 <= row["data_wait_share"] <= 1 for row in rows)
    assert sorted(path.name for path in (tmp_path / "seen" / "profile").iterdir()) == [
        "operators_steps_3-4_rank0.txt", "trace_steps_3-4_rank0.json.gz",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("logging.profile.steps=[40,45]", "logging.profile.steps: is [40, 45], and the run has 44 steps"),
        ("logging.trackers.tensorbord={}", "did you mean tensorboard?"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    paths = (f"results_dir={tmp_path / 'results'}", f"data.cache_dir={cache_dir}")
    assert cli.main(["-f", str(ROOT / "yamls" / "digits_medium.yaml"), *PLAIN, *paths, override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "results").exists()
