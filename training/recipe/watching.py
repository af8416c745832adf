"""The parts of the section logging that need more than a type: trackers, and the steps to profile."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from training.recipe.schema import RecipeError, parse, refuse_unknown

_MOST_PROFILED_STEPS = 100  # of the small ResNet on 8x8 digits, the trace of four takes 0.14 MB, compressed


@dataclass
class TensorBoard:
    """TensorBoard's event files. folder: null for the results folder; the files go to FOLDER/RUN_NAME/."""

    folder: str | None = None


@dataclass
class WandB:
    """Weights & Biases. name: null for run_name. mode offline: keeps the run in its results folder, to sync later."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass
class MLflow:
    """MLflow. tracking_uri: null for MLFLOW_TRACKING_URI, or else RESULTS_DIR/mlflow.db.

    synchronous: each value is stored before training goes on, instead of in batches from another thread.
    """

    tracking_uri: str | None = None
    experiment_name: str = "brisk"
    run_name: str | None = None
    synchronous: bool = False


@dataclass
class Profile:
    """torch's profiler. steps: the first and the last one, from 1 on. all_ranks: a trace of each rank, not of 0."""

    steps: tuple[int, int] = MISSING
    all_ranks: bool = False


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
# What each needs to be installed: module -> what to give pip.
_NEEDS = {
    "tensorboard": {"tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
    "mlflow": {"mlflow": "mlflow"},
}


def parse_trackers(given: Any) -> dict[str, dict[str, Any] | None]:
    """The section logging.trackers: the settings of each, with their defaults; None for one that is off."""
    path = "logging.trackers"
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError(path, f"is {given!r}; it must be a mapping of names ({', '.join(TRACKERS)}) to settings")
    parsed: dict[str, dict[str, Any] | None] = {}
    for name, settings in given.items():
        where = f"{path}.{name}"
        refuse_unknown(name, list(TRACKERS), path=where, what="tracker")
        if settings is None:
            parsed[name] = None
            continue
        parsed[name] = parse(TRACKERS[name], settings, path=where)
        _check_installed(name, parsed[name] or {}, path=where)
    return parsed


def parse_profile(given: Any) -> dict[str, Any] | None:
    """The section logging.profile, None if there is none."""
    if given is None:
        return None
    path = "logging.profile"
    parsed = parse(Profile, given, path=path)
    steps = parsed["steps"]
    if not isinstance(steps, (list, tuple)) or len(steps) != 2:
        raise RecipeError(f"{path}.steps", f"is {steps!r}; give the first and the last step, as in [100, 110]")
    first, last = steps
    if first < 1 or last < first:
        raise RecipeError(
            f"{path}.steps", f"is [{first}, {last}]; the first is at least 1, and the last not before it: [100, 110]"
        )
    if last - first >= _MOST_PROFILED_STEPS:
        raise RecipeError(
            f"{path}.steps",
            f"is [{first}, {last}], {last - first + 1} steps; no viewer opens the trace of more than "
            f"{_MOST_PROFILED_STEPS}; give fewer",
        )
    return {**parsed, "steps": [first, last]}


def check_profiled_steps(profile: dict[str, Any] | None, *, total_steps: int) -> None:
    """Raise RecipeError if the run ends before the steps to profile do."""
    if profile is not None and profile["steps"][1] > total_steps:
        first, last = profile["steps"]
        raise RecipeError(
            "logging.profile.steps",
            f"is [{first}, {last}], and the run has {total_steps} steps; give steps from 1 to {total_steps}",
        )


def _check_installed(name: str, settings: dict[str, Any], *, path: str) -> None:
    needs = dict(_NEEDS[name])
    if name == "mlflow" and not (settings["tracking_uri"] or "").startswith("http"):
        needs["sqlalchemy"] = "mlflow"  # mlflow-skinny, without a database, speaks to servers only
    for module, package in needs.items():
        if importlib.util.find_spec(module) is None:
            raise RecipeError(path, f"needs {module}, which is missing: pip install {package}, or set {path}=null")
