"""Whole runs in processes of their own, with faults, next to one that was not disturbed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_python

STEPS_AN_EPOCH = 22
_SHORT = (
    "duration.epochs=3", "algorithms.progressive_resizing=null", "data.train.image_size=8", "data.eval.image_size=8",
    "algorithms.fixres=null", "logging.progress_bar=false",
)  # fmt: skip


@dataclass
class Runs:
    """Short runs of the digits' recipe in one folder."""

    folder: Path

    def arguments(self, name: str, *more: str) -> list[str]:
        """Of run.py; `more` has the last word."""
        given = [*_SHORT, f"results_dir={self.folder}", f"data.cache_dir={self.folder / 'cache'}", f"run_name={name}"]
        keys = {one.partition("=")[0] for one in more}
        return ["-f", "yamls/digits_medium.yaml", *(one for one in given if one.partition("=")[0] not in keys), *more]

    def start(self, name: str, *more: str, fault: str = "", timeout: float = 100) -> CompletedProcess[str]:
        """A run to its end, with a fault if asked."""
        script = ["tests/faults/faulty_run.py", fault] if fault else ["run.py"]
        return run_python(*script, *self.arguments(name, *more), timeout=timeout)

    def checkpoint(self, name: str, file: str = "latest.pt") -> Path:
        """The path of a run's checkpoint."""
        return self.folder / name / "checkpoints" / file

    def step(self, name: str, file: str = "latest.pt") -> int:
        """The step at which a run's checkpoint was written."""
        saved = torch.load(self.checkpoint(name, file), weights_only=False)
        return int(saved["state"]["timestamp"]["Timestamp"]["batch"])

    def assert_goes_on(self, name: str, *settings: str, as_one: str = "whole") -> None:
        """Raise AssertionError unless the same command, resuming, ends as a run that was not disturbed."""
        again = self.start(name, "autoresume=true", *settings)
        assert again.returncode == 0, again.stderr
        self.assert_same_end(name, as_one)

    @staticmethod
    def assert_one_line(ended: CompletedProcess[str], status: int, *words: str) -> None:
        """Raise AssertionError unless it ended with this status and one line that has all these words."""
        assert ended.returncode == status, ended.stderr
        assert "Traceback" not in ended.stderr
        (line,) = (line for line in ended.stderr.splitlines() if line.startswith("run.py: "))
        for word in words:
            assert word in line, line

    def assert_same_end(self, one: str, other: str) -> None:
        """Raise AssertionError unless weights, optimizer state and metrics of two runs are equal bit for bit.

        Of checkpoints that are folders of shards, the losses of all steps speak.
        """
        rows = [self._metrics(name) for name in (one, other)]
        assert rows[0] == rows[1]
        losses = [np.load(self.folder / name / "metrics.npz")["step_loss"] for name in (one, other)]
        np.testing.assert_array_equal(*losses)
        if self.checkpoint(one).is_dir():
            return
        states = [torch.load(self.checkpoint(name), weights_only=False)["state"] for name in (one, other)]
        first, second = (dict(_flat({key: state[key] for key in ("model", "optimizers")})) for state in states)
        assert first.keys() == second.keys()
        for path, value in first.items():
            same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
            assert same, f"{path} differs"

    def _metrics(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / name / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        timed = ("images_per_second", "train_seconds", "data_wait_share")
        return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}/{index}")
    else:
        yield path, value


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of all runs, with one, `whole`, that was not disturbed."""
    made = Runs(tmp_path_factory.mktemp("faults"))
    done = made.start("whole")
    assert done.returncode == 0, done.stderr
    return made
