"""Runs that end in the middle and go on, and whether they end as if nothing had been: for the tests of resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from composer.core import Callback

from training import session
from training.engines import composer
from training.engines.deepspeed import run as deepspeed
from training.recipe import Recipe


class _Stopped(Exception):
    pass


def _stop() -> NoReturn:
    raise _Stopped


class _EndAt(Callback):
    def __init__(self, event: str, step: int, end: Callable[[], None]) -> None:
        setattr(self, event, lambda state, logger: end() if state.timestamp.batch.value == step else None)


def quiet(text: str) -> None:
    """In place of print."""


def train(recipe: Recipe) -> session.Result:
    """Without a word."""
    return session.train(recipe, say=quiet)


def train_until(step: int, recipe: Recipe, *, event: str = "batch_end", end: Callable[[], None] = _stop) -> None:
    """Train until `end` is called, after all other callbacks have heard `event` at `step`; by default it ends the run.

    event: "batch_end" stands for a kill between two checkpoints; "batch_checkpoint" and "epoch_checkpoint" come right
    after a checkpoint of that step, which exists on every rank then.
    """
    with (
        mock.patch.object(composer, "build_callbacks", _and(composer.build_callbacks, _EndAt(event, step, end))),
        mock.patch.object(deepspeed, "build_callbacks", _and(deepspeed.build_callbacks, _EndAt(event, step, end))),
    ):
        try:
            train(recipe)
        except _Stopped:
            return
    raise AssertionError(f"the run has ended before {event} of step {step}")


def _and(build: Callable[..., list[Callback]], callback: Callback) -> Callable[..., list[Callback]]:
    return lambda *given, **named: [*build(*given, **named), callback]


def last_state(run_dir: Path) -> dict[str, Any]:
    """What Composer keeps as a run's state in its last checkpoint, on the CPU."""
    return _last_checkpoint(run_dir)["state"]


def assert_same_training(one: Path, other: Path) -> None:
    """Two runs' steps and last checkpoints are equal bit for bit, random states and algorithms' states too."""
    losses = [np.load(run_dir / "metrics.npz")["step_loss"] for run_dir in (one, other)]
    assert len(losses[0])
    assert np.array_equal(*losses)
    saved = [_last_checkpoint(run_dir) for run_dir in (one, other)]
    kept = ("model", "optimizers", "algorithms", "schedulers")
    mine, theirs = (
        flat({"rng": whole["rng"], **{part: whole["state"][part] for part in kept if part in whole["state"]}})
        for whole in saved
    )
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        if "repr" not in path:  # an algorithm's own words name its place in memory
            same = torch.equal if isinstance(value, torch.Tensor) else np.array_equal
            assert same(value, theirs[path]), f"{path} differs"


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their paths: {"/model/conv1.weight": tensor, ...}."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in flat(item, f"{path}/{key}").items()}
    return {path: value}


def _last_checkpoint(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "latest.pt", weights_only=False, map_location="cpu")
