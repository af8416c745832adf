"""The images of every epoch and step: their size, how many of them in a batch, and how many of their patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from algos.fixres import FixRes
from algos.patch_dropout import PatchDropout
from algos.progressive_resizing import ProgressiveResizing
from training.planning.plan import Plan
from training.recipe import Recipe, RecipeError, users_mistake


def epoch_shapes(plan: Plan, algorithms: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(image size, global batch size) of every epoch; where each step draws its own, those of the largest images."""
    recipe, world_size = plan.recipe, plan.place.world_size
    size = recipe.data.train.image_size
    shapes = [(size, plan.global_batch_size)] * recipe.epochs
    resizing, fixres = algorithms.get("progressive_resizing"), algorithms.get("fixres")
    try:
        if isinstance(resizing, ProgressiveResizing):
            resizing.prepare(
                total_epochs=recipe.epochs,
                image_size=size,
                per_device_batch_size=plan.per_device_batch_size,
                num_ranks=world_size,
                num_images=plan.facts.num_train,
                drop_last=recipe.data.train.drop_last,
                seed=recipe.seed,
            )
            shapes = [
                (resizing.stage(epoch).image_size, resizing.per_device_batch_size(epoch, world_size) * world_size)
                for epoch in range(recipe.epochs)
            ]
        if isinstance(fixres, FixRes):
            start = fixres.start_epoch(recipe.epochs)
            if isinstance(resizing, ProgressiveResizing):
                fixres.check_draws(resizing, recipe.epochs)
            if fixres.image_size is not None:
                _refuse_two_sizes(fixres, shapes[start:], resized=resizing is not None)
                shapes[start:] = [(fixres.image_size, batch) for _, batch in shapes[start:]]
    except ValueError as error:
        raise RecipeError("algorithms", str(error)) from None
    return shapes


def drawn_shapes(plan: Plan, algorithms: Mapping[str, Any]) -> dict[int, list[tuple[int, int]]]:
    """(image size, global batch size) of each step of the epochs whose steps draw their own."""
    resizing = algorithms.get("progressive_resizing")
    if not isinstance(resizing, ProgressiveResizing):
        return {}
    ranks = plan.place.world_size
    drawn = {epoch: resizing.shapes(epoch) for epoch in range(plan.recipe.epochs)}
    return {epoch: [(size, batch * ranks) for size, batch in shapes] for epoch, shapes in drawn.items() if shapes}


def keep_rates(recipe: Recipe, algorithms: Mapping[str, Any]) -> list[float]:
    """The share of a Vision Transformer's patches that every epoch trains on."""
    dropout = algorithms.get("patch_dropout")
    if not isinstance(dropout, PatchDropout):
        return [1.0] * recipe.epochs
    with users_mistake("algorithms"):
        return [dropout.rate_at(epoch, recipe.epochs) for epoch in range(recipe.epochs)]


def pass_sizes(plan: Plan, global_batch_size: int) -> tuple[int, ...]:
    """Images per forward pass of a rank in training: of whole batches or microbatches, and of the remainders."""
    train, ranks = plan.recipe.data.train, plan.place.world_size
    images = [global_batch_size // ranks]
    left = plan.facts.num_train % global_batch_size // ranks
    if left and not train.drop_last:
        images.append(left)
    if isinstance(train.per_device_microbatch_size, int):
        size = train.per_device_microbatch_size
        images = [part for whole in images for part in (min(size, whole), whole % size)]
    return tuple(sorted(set(images) - {0}))


def _refuse_two_sizes(fixres: FixRes, shapes: list[tuple[int, int]], *, resized: bool) -> None:
    others = {size for size, _ in shapes} - {fixres.image_size}
    if resized and others:
        raise ValueError(
            f"fixres.image_size is {fixres.image_size} px and progressive_resizing trains its epochs at "
            f"{', '.join(map(str, sorted(others)))} px; give its last stages that size, or leave fixres.image_size out"
        )
