"""`run.py -f RECIPE --probe`: measures a recipe on this machine for about a minute, and says what the run will take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from data.whole_files import replace_file
from training.facts import data_facts
from training.planning import Plan, choose_place, make_plan
from training.probing.communication import all_reduce_seconds
from training.probing.machines import Machine, Prices, machines_with, read_prices
from training.probing.measure import Measured, measure
from training.probing.phases import Phase, phases_of
from training.probing.predict import Prediction, bottleneck, due_count, predict
from training.recipe import Recipe

SECONDS = 36.0  # for the phases; slow evaluations, compilation and communication come on top. With imports: a minute
_MATMUL_SIDE, _MATMUL_SECONDS = 1024, 0.5


@dataclass(frozen=True)
class Report:
    """All that a probe found. bottlenecks: by index of the measured phases. peak_flops: of one device, None if unknown;
    peak_source: where it is from. communication_seconds: of a step; None if unknown. machines: rented ones with this
    device. load: of the machine before the measurement, in running processes.
    """

    plan: Plan
    prediction: Prediction
    measured: Measured
    bottlenecks: dict[int, str]
    peak_flops: float | None
    peak_source: str
    communication_seconds: float | None
    prices: Prices
    machines: tuple[Machine, ...]
    device_name: str
    load: float
    took_seconds: float


def probe(recipe: Recipe, *, ranks: int = 1, seconds: float = SECONDS, say: Callable[[str], None] = print) -> Report:
    """Measure `recipe` and predict its run on `ranks` ranks. Raises RecipeError if it cannot run here."""
    started, load = time.monotonic(), os.getloadavg()[0]
    prices = read_prices()
    plan = make_plan(recipe, data_facts(recipe), replace(choose_place(recipe), world_size=ranks))
    measured = measure(plan, seconds=seconds, say=say)
    on_gpu = plan.place.device == "gpu"
    communication = 0.0
    if ranks > 1:
        say(f"measuring the sum of gradients over {ranks} ranks ...")
        communication = all_reduce_seconds(num_parameters=plan.parameters, ranks=ranks, on_gpu=on_gpu)
    device_name = torch.cuda.get_device_name() if on_gpu else plan.place.device
    machines = tuple(machines_with(prices, device_name))
    peak, source = _peak(plan, machines)
    phases = phases_of(plan)
    return Report(
        plan=plan,
        prediction=prediction_of(plan, measured, communication_seconds=communication or 0.0),
        measured=measured,
        bottlenecks={index: _bottleneck(measured, index) for index in measured.phases if index < len(phases)},
        peak_flops=peak,
        peak_source=source,
        communication_seconds=communication,
        prices=prices,
        machines=machines,
        device_name=device_name,
        load=load,
        took_seconds=time.monotonic() - started,
    )


def prediction_of(plan: Plan, measured: Measured, *, communication_seconds: float = 0.0) -> Prediction:
    """What the measurements say of the whole run."""
    recipe, epochs = plan.recipe, len(plan.epochs)
    checkpoints = due_count(epochs, every=recipe.checkpoints.every_epochs)
    if recipe.checkpoints.every_steps is not None:
        checkpoints += plan.steps // recipe.checkpoints.every_steps
    return predict(
        phases_of(plan),
        {index: times.windows for index, times in measured.phases.items()},
        {index: times.between_epochs for index, times in measured.phases.items()},
        evaluations=measured.evaluations,
        checkpoints=measured.checkpoints,
        evaluation_count=due_count(epochs, every=recipe.data.eval.every_epochs),
        checkpoint_count=checkpoints,
        communication_seconds=communication_seconds,
    )


def write_profile(report: Report, path: Path) -> None:
    """A hardware profile with what was measured here: it holds the settings that the measured steps had."""
    recipe = report.plan.recipe
    cores = os.cpu_count() or 1
    starved = "loader" in report.bottlenecks.values()
    workers = {
        name: max(section.num_workers, cores) if starved else min(section.num_workers, cores)
        for name, section in (("train", recipe.data.train), ("eval", recipe.data.eval))
    }
    settings: dict[str, Any] = {
        "data": {
            "train": {
                "num_workers": workers["train"],
                "per_device_microbatch_size": recipe.data.train.per_device_microbatch_size,
            },
            "eval": {
                "num_workers": workers["eval"],
                "per_device_batch_size": recipe.data.eval.per_device_batch_size,
            },
        },
        "precision": recipe.precision,
        "compile": recipe.settings["compile"],
        "device": report.plan.place.device,
    }
    rows = _rows(phases_of(report.plan), report.plan) if _has_rows(recipe) else {}
    if rows:
        settings["algorithms"] = {"progressive_resizing": {"stages": rows}}
    rates = ", ".join(
        f"{one.phase.image_size} px {one.images_per_second:,.0f}" for one in report.prediction.phases if one.measured
    )
    workers_note = "raised to the number of cores: steps waited for the loader" if starved else "as measured"
    header = [
        f"# {report.device_name}, {cores} CPU cores: written by --probe with {recipe.run_name}.",
        f"# Measured: {time.strftime('%Y-%m-%d')}, load {report.load:.1f} beforehand; images/s: {rates}.",
        f"# Changes the training: {'yes, by batch sizes of stages' if rows else 'no'}. Loader threads: {workers_note}.",
    ]
    text = "\n".join(header) + "\n" + yaml.safe_dump(settings, sort_keys=False)
    replace_file(path, lambda file: file.write(text.encode()))


def _has_rows(recipe: Recipe) -> bool:
    stages = (recipe.algorithms.get("progressive_resizing") or {}).get("stages") or []
    return any(stage.per_device_batch_size or stage.global_batch_size for stage in stages)


def _rows(phases: Sequence[Phase], plan: Plan) -> dict[int, dict[str, int]]:
    ranks = plan.place.world_size
    return {
        phase.image_size: {"per_device_batch_size": phase.global_batch_size // ranks}
        for phase in sorted(phases, key=lambda one: one.image_size)
    }


def _bottleneck(measured: Measured, index: int) -> str:
    times = measured.phases[index]
    step = sum(times.windows) / len(times.windows)
    return bottleneck(step=step, cached=times.cached or step, loader=times.loader or 0.0, busy_share=times.busy_share)


def _peak(plan: Plan, machines: Sequence[Machine]) -> tuple[float | None, str]:
    """The device's peak in floating-point operations per second, and where that number is from."""
    precision = plan.recipe.precision
    for machine in machines:
        known = (machine.tflops or {}).get(precision)
        if known:
            return known * 1e12, f"the maker's peak in {precision}"
    if plan.place.device != "cpu":
        return None, "unknown"
    return _matmul_flops(), "what a product of 1,024 x 1,024 matrices reaches here"


def _matmul_flops() -> float:
    a, b = torch.rand(_MATMUL_SIDE, _MATMUL_SIDE), torch.rand(_MATMUL_SIDE, _MATMUL_SIDE)
    torch.mm(a, b)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _MATMUL_SECONDS:
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * _MATMUL_SIDE**3 / best
