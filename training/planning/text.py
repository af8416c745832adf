"""A plan as text: phases, the order of algorithms, multiply-adds, the network's layers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from models.summary import summarize
from training.arrangement import network_as_trained, without_weights
from training.facts import planned_facts
from training.optimizers import other_peak_learning_rate
from training.planning.graphs import graphs_of
from training.planning.make import make_plan, without_algorithms
from training.planning.place import Place, choose_place
from training.planning.plan import Epoch, Plan, Steps
from training.recipe import Recipe, RecipeError

_WEIGHT_FILES = (".bin", ".pt", ".pth", ".safetensors")


def plan_text(recipe: Recipe) -> str:
    """The plan of `recipe`, compared with the same recipe with every speed-up off. Trains nothing."""
    _refuse_absent_files(recipe)
    recipe = without_weights(recipe)
    facts, (place, note) = planned_facts(recipe), _place(recipe)
    plan = make_plan(recipe, facts, place)
    baseline = make_plan(without_algorithms(recipe, recipe.run_name), facts, place)
    network = network_as_trained(recipe, num_classes=plan.facts.num_classes, shapes_only=True)
    size = recipe.data.train.image_size
    layers = summarize(network, image_size=size, num_images=plan.per_device_batch_size)
    return "\n\n".join([format_plan(plan, baseline), *note, layers])


def _refuse_absent_files(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe's weights or checkpoint are missing, although a plan does not read them."""
    weights, load = recipe.model.get("weights"), recipe.load
    if weights is not None and Path(weights).suffix in _WEIGHT_FILES and not Path(weights).expanduser().exists():
        raise RecipeError("model.weights", f"is {weights}, and there is no such file; correct it, or leave it out")
    if load not in (None, "latest") and not Path(load).exists():
        raise RecipeError("load", f"is {load}, and there is no such file or folder; give latest or a checkpoint's path")


def _place(recipe: Recipe) -> tuple[Place, list[str]]:
    """Where it would run. A machine that cannot train a recipe still plans it, with a note that says why."""
    try:
        return choose_place(recipe), []
    except RecipeError as error:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return Place("gpu" if recipe.device == "auto" else recipe.device, world_size), [f"not on this machine: {error}"]


def format_plan(plan: Plan, baseline: Plan) -> str:
    """The plan as text, with the savings over `baseline`, the same recipe with every speed-up off."""
    facts = plan.facts
    lines = [
        f"{plan.recipe.run_name}: {facts.num_train:,} training and {facts.num_eval:,} held-out images of "
        f"{facts.num_classes} classes, {plan.parameters:,} parameters",
        *([] if facts.present else ["(the data are not here: counts are data.expected's)"]),
        _place_line(plan),
        *_classes_line(plan),
        "",
        "algorithms, in the order they act",
        *(f"  {one.name:<28}{', '.join(one.events)}" for one in plan.algorithms),
        "",
        f"{'epochs':>9}{'image':>8}{'batch':>8}{'steps':>9}{'learning rate':>22}{'MMACs/image':>14}  notes",
        *_phase_lines(plan),
        "",
        f"{plan.steps:,} steps, {_images_seen(plan)}; evaluation at {plan.recipe.data.eval.image_size} px",
        *_teacher_line(plan),
        *_graphs_line(plan),
        f"forward: {_engineering(plan.forward_macs)}MACs in all; with the backward passes: "
        f"{_engineering(plan.total_macs)}MACs",
        _savings(plan, baseline),
    ]
    return "\n".join(lines)


def _images_seen(plan: Plan) -> str:
    trained = sum(epoch.trained_images for epoch in plan.epochs)
    seen = f"{plan.images:,} images seen"
    return seen if trained == plan.images else f"{seen}, {trained:,} of them trained"


def _place_line(plan: Plan) -> str:
    recipe, ranks = plan.recipe, plan.place.world_size
    microbatch = recipe.data.train.per_device_microbatch_size
    parts = [
        f"{plan.place.device}, {ranks} {'rank' if ranks == 1 else 'ranks'}",
        *([recipe.parallelism.strategy] if ranks > 1 else []),
        recipe.precision,
        f"{plan.per_device_batch_size} images a rank and step",
        *([f"in microbatches of {microbatch}"] if microbatch else []),
        f"{recipe.optimizer['name']} at a peak learning rate of {plan.peak_learning_rate:g}",
        *_others(plan),
    ]
    return ", ".join(parts)


def _classes_line(plan: Plan) -> list[str]:
    """What a setting for uneven classes does, with the numbers of images that it starts from."""
    weights, counts = plan.class_weights, plan.facts.class_counts
    balanced = plan.recipe.data.train.sampler == "balanced"
    if not balanced and plan.recipe.class_weights is None:
        return []
    parts = []
    if counts is not None:
        present = [count for count in counts if count]
        parts += [f"classes of {min(present):,} to {max(present):,} training images"]
        parts += [f"{len(counts) - len(present):,} without any"] if len(present) < len(counts) else []
        share = sum(counts) / len(present)
        parts += [f"sampled equally, {share:,.0f} images of each in an epoch"] if balanced else []
    elif balanced:
        parts += ["classes sampled equally"]
    if weights is not None:
        parts += [f"loss weights from {min(weights):.3g} to {max(weights):.3g}"]
    elif plan.recipe.class_weights is not None:
        parts += ["loss weights from the numbers of images in each class, which are not here"]
    return [", ".join(parts)]


def _others(plan: Plan) -> list[str]:
    """Under muon: how many matrices it has, and what updates the other weights."""
    optimizer = plan.recipe.optimizer
    if not plan.matrices:
        return []
    rate = other_peak_learning_rate(optimizer, plan.peak_learning_rate)
    return [f"of {len(plan.matrices)} matrices", f"{optimizer['others']['name']} at {rate:g} of the rest"]


def _graphs_line(plan: Plan) -> list[str]:
    settings = plan.recipe.compile
    if settings is None:
        return []
    graphs = graphs_of(plan)
    auto = plan.recipe.data.train.per_device_microbatch_size == "auto"
    when = "before the first step" if settings.ahead and not auto else "at the first step of each"
    more = ", and more for other microbatches" if auto else ""
    many = "graphs" if len(graphs) > 1 else "graph"
    return [f"{len(graphs)} {many} to compile {when}{more}: {'; '.join(map(str, graphs))}"]


def _phase_lines(plan: Plan) -> list[str]:
    lines, first = [], 0
    for _, run in groupby(plan.epochs, key=_alike):
        epochs = list(run)
        start, end = epochs[0], epochs[-1]
        drawn = [steps for epoch in epochs for steps in epoch.drawn]
        notes = [
            *_shares(drawn),
            *(["test-time crop"] if start.test_crop else []),
            *(["last layers only"] if start.frozen else []),
            *(f"no {name}" for name in start.suspended),
            *([f"{start.passes:g} passes a step"] if start.passes > 1 else []),
            *([f"{start.keep_rate:g} of the patches"] if start.keep_rate < 1 else []),
            *_selecting_notes(epochs),
        ]
        rates = f"{start.learning_rate[0]:.3g} to {end.learning_rate[1]:.3g}"
        macs = sum(one.images * one.forward_macs for one in epochs) / sum(one.images for one in epochs)
        size, batch = f"{start.image_size} px", f"{start.global_batch_size:,}"
        lines.append(
            f"{f'{first + 1}-{first + len(epochs)}':>9}{'drawn' if drawn else size:>8}{'drawn' if drawn else batch:>8}"
            f"{sum(epoch.steps for epoch in epochs):>9,}{rates:>22}{macs / 1e6:>14.2f}"
            f"  {', '.join(notes)}".rstrip()
        )
        first += len(epochs)
    return lines


def _shares(drawn: list[Steps]) -> list[str]:
    """For each size and batch size that is drawn, its share of the steps."""
    total, counts = sum(one.steps for one in drawn), Counter[tuple[int, int]]()
    for one in drawn:
        counts[one.image_size, one.global_batch_size] += one.steps
    return [f"{steps / total:.0%} at {px} px in {batch:,}" for (px, batch), steps in sorted(counts.items())]


def _alike(epoch: Epoch) -> tuple[object, ...]:
    """What the epochs of a line share; epochs whose steps draw their sizes stand in one."""
    return (
        None if epoch.drawn else (epoch.image_size, epoch.global_batch_size), epoch.frozen, epoch.test_crop,
        epoch.suspended, epoch.passes,
        epoch.keep_rate, epoch.selecting is None,
    )  # fmt: skip


def _selecting_notes(epochs: Sequence[Epoch]) -> list[str]:
    found = [epoch.selecting for epoch in epochs if epoch.selecting is not None]
    if not found:
        return []
    note = f"{found[0].keep:g} of the images in {sum(len(one.steps) for one in found):,} of the steps"
    return [f"{note}, found at {found[0].image_size} px"]


def _teacher_line(plan: Plan) -> list[str]:
    if not plan.teacher_parameters:
        return []
    name, largest = plan.recipe.algorithms["distillation"]["teacher"], max(e.teacher_macs for e in plan.epochs)
    memory = f"{_engineering(4 * plan.teacher_parameters)}B"
    return [
        f"teacher {name}: {plan.teacher_parameters:,} parameters, {memory} on every rank, up to "
        f"{largest / 1e6:.2f} MMACs an image, forward only"
    ]


def _savings(plan: Plan, baseline: Plan) -> str:
    def change(ours: float, theirs: float) -> str:
        share = ours / theirs - 1
        return f"{abs(share):.1%} {'more' if share > 0 else 'less'}"

    return (
        f"against every speed-up off ({_engineering(baseline.forward_macs)}MACs forward, "
        f"{_engineering(baseline.total_macs)}MACs in all): {change(plan.forward_macs, baseline.forward_macs)} forward, "
        f"{change(plan.total_macs, baseline.total_macs)} in all"
    )


def _engineering(value: float) -> str:
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "
