"""Makes every decision about a run once: batch sizes, stages, learning rates, algorithms, multiply-adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from algos.distillation import Distillation
from algos.fixres import FixRes
from algos.framework.protocols import LearningRateModifier
from algos.learning_rate import LearningRate
from algos.patch_dropout import keeping_patches
from algos.sam import SAM
from algos.selective_backprop import SelectiveBackprop
from models.roles import hidden_matrices
from models.summary import count_forward_macs, count_parameters
from training.arrangement import SCHEDULE, arrange_algorithms
from training.facts import DataFacts, class_weights, data_facts
from training.network import change_network, make_network, shapes_suffice
from training.optimizers import peak_learning_rate
from training.planning.place import Place, choose_place
from training.planning.plan import Epoch, Plan, PlannedAlgorithm, Steps
from training.planning.selecting import plan_selecting
from training.planning.shapes import drawn_shapes, epoch_shapes, keep_rates, pass_sizes
from training.recipe import Recipe, RecipeError, users_mistake
from training.recipe.watching import check_profiled_steps
from training.teachers import Teacher, find_teacher


def plan_run(recipe: Recipe, place: Place | None = None) -> Plan:
    """Inspect the recipe's data and make the plan. place: None for `choose_place`'s. Raises RecipeError."""
    return make_plan(recipe, data_facts(recipe), place or choose_place(recipe))


def make_plan(recipe: Recipe, facts: DataFacts, place: Place) -> Plan:
    """Plan `recipe` for the data of `facts` at `place`. Raises RecipeError if it cannot run."""
    if recipe.schedule["warmup_epochs"] > recipe.epochs:
        raise RecipeError(
            "schedule.warmup_epochs",
            f"is {recipe.schedule['warmup_epochs']:g}, longer than the run of {recipe.epochs} epochs; make it shorter",
        )
    algorithms, settings = arrange_algorithms(recipe)
    network = make_network(recipe, num_classes=facts.num_classes, shapes_only=shapes_suffice(algorithms))
    matrices = _matrices(network, recipe)
    network = change_network(network, recipe, algorithms)
    if isinstance(fixres := algorithms.get("fixres"), FixRes):
        with users_mistake("algorithms"):
            fixres.check_model(network)
    per_device = per_device_batch_size(recipe, world_size=place.world_size)
    plan = Plan(
        recipe=recipe,
        facts=facts,
        place=place,
        per_device_batch_size=per_device,
        peak_learning_rate=peak_learning_rate(recipe.optimizer, global_batch_size=per_device * place.world_size),
        algorithms=tuple(
            PlannedAlgorithm(name, settings[name], tuple(str(event.value) for event in one.events))
            for name, one in algorithms.items()
        ),
        parameters=count_parameters(network),
        epochs=(),
        class_weights=class_weights(recipe, facts),
        matrices=matrices,
    )
    plan = _add_epochs(plan, algorithms, network)
    plan = _add_selecting(plan, algorithms, network)
    plan = _add_teacher(plan, algorithms)
    check_profiled_steps(recipe.logging.profile, total_steps=plan.steps)
    return plan


def teacher_of(recipe: Recipe) -> Teacher | None:
    """The teacher that `recipe` names, None without distillation. Raises RecipeError if it is not there."""
    settings = recipe.algorithms.get("distillation")
    if settings is None:
        return None
    name, where = settings["teacher"], "algorithms.distillation.teacher"
    if Path(name).resolve().is_relative_to(recipe.run_dir.resolve()):
        raise RecipeError(where, f"is {name}, which this run replaces; give the run another run_name")
    with users_mistake(where):
        return find_teacher(name, trust=recipe.trust_checkpoint)


def per_device_batch_size(recipe: Recipe, *, world_size: int) -> int:
    """Images per rank in a training batch, unless a stage overrides it. Raises RecipeError if unevenly divided."""
    train = recipe.data.train
    if train.per_device_batch_size is not None:
        return train.per_device_batch_size
    assert train.global_batch_size is not None, "checked with the recipe"
    if train.global_batch_size % world_size:
        raise RecipeError(
            "data.train.global_batch_size",
            f"is {train.global_batch_size} and there are {world_size} ranks; make it a multiple of {world_size}",
        )
    return train.global_batch_size // world_size


def without_algorithms(recipe: Recipe, run_name: str) -> Recipe:
    """The same recipe with every speed-up off."""
    off = dict.fromkeys(recipe.algorithms)
    settings = {**recipe.settings, "algorithms": off, "run_name": run_name}
    return replace(recipe, algorithms={}, run_name=run_name, settings=settings)


def _matrices(network: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    if recipe.optimizer["name"] != "muon":
        return ()
    with users_mistake("data.eval.image_size"):
        found = hidden_matrices(network, image_size=recipe.data.eval.image_size)
    if not found:
        raise RecipeError(
            "optimizer.name",
            f"is muon, and {recipe.model['name']} has no matrices between its first layer and its classifier; use "
            f"{recipe.optimizer['others']['name']}",
        )
    return tuple(found)


def _add_epochs(plan: Plan, algorithms: Mapping[str, Any], network: nn.Module) -> Plan:
    """`plan` with every epoch's images, steps, learning rates and multiply-adds."""
    shapes = epoch_shapes(plan, algorithms)
    rates = keep_rates(plan.recipe, algorithms)
    drawn = drawn_shapes(plan, algorithms)
    each = {
        (shape, rate)
        for epoch, (whole, rate) in enumerate(zip(shapes, rates, strict=True))
        for shape in {whole, *drawn.get(epoch, ())}
    }
    macs = {
        (size, batch, rate): _macs(network, size, rate, pass_sizes(plan, batch), plan.recipe)
        for (size, batch), rate in sorted(each)
    }
    epochs = []
    for index, (shape, rate) in enumerate(zip(shapes, rates, strict=True)):
        steps = _steps_of(drawn.get(index, []), macs, rate, plan.facts)
        epoch = _plan_epoch(index, plan, algorithms, shape=shape, drawn=steps, macs=macs[(*shape, rate)])
        epochs.append(replace(epoch, keep_rate=rate))
    return replace(plan, epochs=tuple(epochs))


def _steps_of(
    shapes: list[tuple[int, int]],
    macs: Mapping[tuple[int, int, float], int],
    keep_rate: float,
    facts: DataFacts,
) -> tuple[Steps, ...]:
    """The drawn steps of an epoch, those of a shape together, smallest images first."""
    missing = max(0, sum(batch for _, batch in shapes) - facts.num_train)  # of the last one, which is not full
    return tuple(
        Steps(size, batch, steps, steps * batch - missing * ((size, batch) == shapes[-1]), macs[size, batch, keep_rate])
        for (size, batch), steps in sorted(Counter(shapes).items())
    )


def _add_selecting(plan: Plan, algorithms: Mapping[str, Any], network: nn.Module) -> Plan:
    """`plan` with the steps of each epoch that select samples, and what their forward passes take."""
    selective = algorithms.get("selective_backprop")
    if not isinstance(selective, SelectiveBackprop):
        return plan
    if any(epoch.drawn for epoch in plan.epochs):
        raise RecipeError(
            "algorithms.selective_backprop",
            "selects from batches of one size, and progressive_resizing draws a size for each step; give that stages",
        )
    epochs, first_step, ranks = [], 0, plan.place.world_size
    macs: dict[int, int] = {}
    for index, epoch in enumerate(plan.epochs):
        selecting = plan_selecting(
            selective, epoch=index, total_epochs=len(plan.epochs), first_step=first_step, steps=epoch.steps,
            images=epoch.images, global_batch_size=epoch.global_batch_size, image_size=epoch.image_size, ranks=ranks,
        )  # fmt: skip
        if selecting is not None:
            size = selecting.image_size
            if size not in macs:
                whole = (epoch.global_batch_size // ranks,)
                macs[size] = _macs(network, size, 1.0, whole, plan.recipe)
            selecting = replace(selecting, forward_macs=macs[size])
        epochs.append(replace(epoch, selecting=selecting))
        first_step += epoch.steps
    return replace(plan, epochs=tuple(epochs))


def _mean_macs(epoch: Epoch, macs: Mapping[int, int]) -> int:
    """Of an image of `epoch`, given those at each size."""
    if not epoch.drawn:
        return macs[epoch.image_size]
    return round(sum(steps.images * macs[steps.image_size] for steps in epoch.drawn) / epoch.images)


def _add_teacher(plan: Plan, algorithms: Mapping[str, Any]) -> Plan:
    """`plan` with what a teacher's passes and weights take. Raises RecipeError if it does not suit the run."""
    if not isinstance(algorithms.get("distillation"), Distillation):
        return plan
    teacher = teacher_of(plan.recipe)
    assert teacher is not None
    where = "algorithms.distillation.teacher"
    with users_mistake(where):
        teacher.check_classes(plan.facts.class_names if plan.facts.present else [""] * plan.facts.num_classes)
        network = teacher.outline()
    macs: dict[int, int] = {}
    drawn = {steps.image_size for epoch in plan.epochs for steps in epoch.drawn}
    for size in sorted({epoch.image_size for epoch in plan.epochs} | drawn):
        try:
            macs[size] = count_forward_macs(network, image_size=size)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(where, f"is {teacher.name}, which cannot take images of {size} px: {reason}") from None
    return replace(
        plan,
        teacher_parameters=count_parameters(network),
        epochs=tuple(replace(epoch, teacher_macs=_mean_macs(epoch, macs)) for epoch in plan.epochs),
    )


def _plan_epoch(
    index: int,
    plan: Plan,
    algorithms: Mapping[str, Any],
    *,
    shape: tuple[int, int],
    drawn: tuple[Steps, ...],
    macs: int,
) -> Epoch:
    recipe, facts = plan.recipe, plan.facts
    image_size, batch = shape
    if recipe.data.train.drop_last and batch > facts.num_train:
        raise RecipeError(
            "data.train",
            f"a global batch of {batch} is larger than the {facts.num_train} training images; make it smaller",
        )
    steps = facts.num_train // batch if recipe.data.train.drop_last else -(-facts.num_train // batch)
    images = steps * batch if recipe.data.train.drop_last else facts.num_train
    if drawn:
        steps, images = sum(one.steps for one in drawn), sum(one.images for one in drawn)
        batch = max(one.global_batch_size for one in drawn)
        macs = round(sum(one.images * one.forward_macs for one in drawn) / images)
    sam, fixres = algorithms.get("sam"), algorithms.get("fixres")
    in_fixres = isinstance(fixres, FixRes) and index >= fixres.start_epoch(recipe.epochs)
    ends = [_learning_rate(epoch, plan, algorithms) for epoch in (index, index + (steps - 1) / steps)]
    return Epoch(
        image_size=image_size,
        global_batch_size=batch,
        steps=steps,
        images=images,
        learning_rate=(ends[0], ends[1]),
        forward_macs=macs,
        passes=1 + 1 / sam.interval if isinstance(sam, SAM) else 1,
        frozen=in_fixres and isinstance(fixres, FixRes) and fixres.train != "all",
        test_crop=in_fixres and isinstance(fixres, FixRes) and fixres.crop == "test",
        suspended=tuple(
            name
            for name, algorithm in algorithms.items()
            if in_fixres and isinstance(fixres, FixRes) and fixres.suspends(algorithm)
        ),
        drawn=drawn,
    )


def _learning_rate(epoch: float, plan: Plan, algorithms: Mapping[str, Any]) -> float:
    schedule = algorithms[SCHEDULE]
    assert isinstance(schedule, LearningRate)
    modifiers = [one for one in algorithms.values() if isinstance(one, LearningRateModifier)]
    return schedule.learning_rate(
        epoch, total_epochs=plan.recipe.epochs, initial=plan.peak_learning_rate, modifiers=modifiers
    )


def _macs(network: nn.Module, image_size: int, keep_rate: float, pass_sizes: tuple[int, ...], recipe: Recipe) -> int:
    """Multiply-adds of one image. Tries a forward pass of every batch size."""
    macs = 0
    for images in pass_sizes:
        try:
            with keeping_patches(network, keep_rate, in_evaluation=True):
                macs = count_forward_macs(network, image_size=image_size, num_images=images)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason, name = str(error).splitlines()[0], recipe.model["name"]
            raise RecipeError(
                "model", f"{name} cannot take images of {image_size} px in batches of {images} a device: {reason}"
            ) from None
    return macs
