"""Makes every decision about a run once: device, batch sizes, stages, learning rates, algorithms, multiply-adds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from algos.fixres import FixRes
from algos.framework.composer_algorithms import describe
from algos.framework.ordering import arrange
from algos.framework.protocols import LearningRateModifier
from algos.framework.registry import planner
from algos.learning_rate import LearningRate
from algos.patch_dropout import PatchDropout, keeping_patches
from algos.progressive_resizing import ProgressiveResizing
from algos.sam import SAM
from models.registry import names
from models.roles import hidden_matrices
from models.summary import count_forward_macs, count_parameters
from training.facts import DataFacts, data_facts
from training.network import change_network, make_network, shapes_suffice
from training.optimizers import peak_learning_rate
from training.recipe import Recipe, RecipeError, users_mistake
from training.recipe.compiling import CUDA_GRAPH_MODES
from training.recipe.watching import check_profiled_steps

SCHEDULE = "learning_rate"  # an algorithm of every run; its settings are the recipe's section schedule
_CLIPPING = "composer.gradient_clipping"  # what optimizer.clip_norm turns on
_AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_RGB = 3
# Networks that do nothing to an image before a convolution, which tests/training/test_pixel_type.py looks at.
_CONVOLVE_FIRST = frozenset(names()) - {"alexnet"}
# Algorithms that compute with no pixel: in a recipe progressive_resizing's images come in their size from the loader.
_LEAVE_PIXELS_ALONE = frozenset(
    {
        SCHEDULE, _CLIPPING, "blurpool", "channels_last", "cutmix", "ema", "fixres", "label_smoothing",
        "progressive_resizing", "sam", "stochastic_depth",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run. forward_macs: multiply-adds of one image's forward pass."""

    image_size: int
    global_batch_size: int
    steps: int
    images: int
    learning_rate: tuple[float, float]  # of its first and last step
    forward_macs: int
    passes: float  # forward passes per image; 2 under SAM at every step
    frozen: bool  # only the last layers are trained, with a negligible backward pass
    test_crop: bool
    suspended: tuple[str, ...]  # algorithms of the run that are inactive in this epoch
    keep_rate: float = 1.0  # share of a Vision Transformer's patches that are trained on

    @property
    def total_forward_macs(self) -> float:
        """Multiply-adds of the epoch's forward passes."""
        return self.images * self.passes * self.forward_macs

    @property
    def total_macs(self) -> float:
        """Multiply-adds including the backward passes, each counted as two forward passes."""
        return self.total_forward_macs * (1 if self.frozen else 3)


@dataclass(frozen=True)
class PlannedAlgorithm:
    """An algorithm of the run: its settings, and the events at which it acts."""

    name: str
    settings: dict[str, Any]
    events: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a recipe runs: one rank's device (cpu, gpu, mps), and the number of ranks."""

    device: str
    world_size: int = 1

    @property
    def torch_device(self) -> str:
        """torch's name for the device."""
        return {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}[self.device]


@dataclass(frozen=True)
class Plan:
    """Every decision that follows from a recipe, its data and the place where it runs.

    recipe: the request. Read decisions from the plan; do not derive them from the recipe again.
    per_device_batch_size: images per rank in a training batch, unless a stage overrides it.
    peak_learning_rate: at schedule factor 1, before any algorithm changes it.
    algorithms: in the order in which they act, including the learning-rate schedule and gradient clipping.
    parameters: number of scalars in the network after the algorithms have changed it.
    matrices: names of the weights that the optimizer orthogonalizes, in the network as built; for muon alone.
    """

    recipe: Recipe
    facts: DataFacts
    place: Place
    per_device_batch_size: int
    peak_learning_rate: float
    algorithms: tuple[PlannedAlgorithm, ...]
    parameters: int
    epochs: tuple[Epoch, ...]
    matrices: tuple[str, ...] = ()

    @property
    def global_batch_size(self) -> int:
        """Images of all ranks in a training batch, unless a stage overrides it."""
        return self.per_device_batch_size * self.place.world_size

    @property
    def pixel_type(self) -> str:
        """torch's name for the type in which normalized images reach algorithms and the network.

        That of autocast where nothing computes with pixels before the network's first convolution, whose input is then
        bit for bit the same; else float32.
        """
        blurs_pixels = any((one.settings.get("min_channels") or _RGB + 1) <= _RGB for one in self.algorithms)
        plain = all(one.name in _LEAVE_PIXELS_ALONE for one in self.algorithms) and not blurs_pixels
        if self.recipe.model["name"] in _CONVOLVE_FIRST and plain:
            return _AUTOCAST.get(self.recipe.precision, "float32")
        return "float32"

    @property
    def largest_image_size(self) -> int:
        """The largest training image size, in px."""
        return max(epoch.image_size for epoch in self.epochs)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return sum(epoch.steps for epoch in self.epochs)

    @property
    def images(self) -> int:
        """Training images, each counted as often as it is seen."""
        return sum(epoch.images for epoch in self.epochs)

    @property
    def forward_macs(self) -> float:
        """Multiply-adds of the run's forward passes."""
        return sum(epoch.total_forward_macs for epoch in self.epochs)

    @property
    def total_macs(self) -> float:
        """The same with the backward passes."""
        return sum(epoch.total_macs for epoch in self.epochs)


def choose_place(recipe: Recipe, *, world_size: int | None = None) -> Place:
    """The recipe's device on this machine, and the number of ranks that a launcher started.

    Raises RecipeError if the requested device is missing, or does not support what the recipe needs.
    """
    present = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if recipe.device == "auto":
        device = next(name for name in ("gpu", "mps", "cpu") if present[name])
    elif present[recipe.device]:
        device = recipe.device
    else:
        here = ", ".join(name for name, there in present.items() if there)
        raise RecipeError("device", f"is {recipe.device}, which this machine does not have; here: {here}, or auto")
    if device == "cpu" and recipe.precision != "fp32":
        raise RecipeError("precision", f"is {recipe.precision}, which Composer does not train in on a CPU; use fp32")
    if recipe.compile is not None:
        _check_compile(recipe, recipe.compile.mode, device=device)
    return Place(device, int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)


def _check_compile(recipe: Recipe, mode: str, *, device: str) -> None:
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RecipeError("compile", "is true, which takes a C++ compiler on a CPU; install g++, or set compile=false")
    if device != "gpu" and mode == "reduce-overhead":
        raise RecipeError(
            "compile.mode", f"is {mode}, which records CUDA graphs, and the device is {device}; use default"
        )
    if device != "gpu" or mode not in CUDA_GRAPH_MODES:
        return
    instead = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    if recipe.data.train.per_device_microbatch_size is not None:
        raise RecipeError(
            "compile.mode",
            f"is {mode}, whose CUDA graphs write each microbatch's gradients over those of the one before, and "
            f"data.train.per_device_microbatch_size is set; use {instead}, or set that to null",
        )
    if recipe.parallelism.strategy == "fsdp":
        raise RecipeError(
            "compile.mode",
            f"is {mode}, whose CUDA graphs read weights at fixed addresses, and parallelism.strategy is fsdp, which "
            f"gathers them anew at each step; use {instead}, or ddp",
        )


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
    algorithms, settings = _arrange_algorithms(recipe)
    network = make_network(recipe, num_classes=facts.num_classes, shapes_only=shapes_suffice(algorithms))
    matrices = _matrices(network, recipe)
    network = change_network(network, recipe, algorithms)
    if isinstance(fixres := algorithms.get("fixres"), FixRes):
        with users_mistake("algorithms"):
            fixres.check_model(network)
    per_device = per_device_batch_size(recipe, world_size=place.world_size)
    peak = peak_learning_rate(recipe.optimizer, global_batch_size=per_device * place.world_size)
    shapes = _epoch_shapes(recipe, algorithms, per_device_batch_size=per_device, world_size=place.world_size)
    keep_rates = _keep_rates(recipe, algorithms)
    macs = {
        (size, keep_rate): _macs(network, size, keep_rate, _pass_sizes(batch, recipe, facts, place.world_size), recipe)
        for (size, batch), keep_rate in sorted(set(zip(shapes, keep_rates, strict=True)))
    }
    plan = Plan(
        recipe=recipe,
        facts=facts,
        place=place,
        per_device_batch_size=per_device,
        peak_learning_rate=peak,
        algorithms=tuple(
            PlannedAlgorithm(name, settings[name], tuple(str(event.value) for event in one.events))
            for name, one in algorithms.items()
        ),
        parameters=count_parameters(network),
        epochs=tuple(
            replace(
                _plan_epoch(
                    index, recipe, facts, algorithms, shape=shape, macs=macs[shape[0], keep_rate], initial=peak
                ),
                keep_rate=keep_rate,
            )
            for index, (shape, keep_rate) in enumerate(zip(shapes, keep_rates, strict=True))
        ),
        matrices=matrices,
    )
    check_profiled_steps(recipe.logging.profile, total_steps=plan.steps)
    return plan


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


def network_as_trained(recipe: Recipe, *, num_classes: int, shapes_only: bool = False) -> nn.Module:
    """The recipe's network as its algorithms change it. shapes_only: see `make_network`."""
    algorithms, _ = _arrange_algorithms(recipe)
    shapes_only = shapes_only and shapes_suffice(algorithms)
    network = make_network(recipe, num_classes=num_classes, shapes_only=shapes_only)
    return change_network(network, recipe, algorithms)


def without_algorithms(recipe: Recipe, run_name: str) -> Recipe:
    """The same recipe with every speed-up off."""
    off = dict.fromkeys(recipe.algorithms)
    settings = {**recipe.settings, "algorithms": off, "run_name": run_name}
    return replace(recipe, algorithms={}, run_name=run_name, settings=settings)


def without_weights(recipe: Recipe) -> Recipe:
    """The same recipe with new weights, which need no download."""
    if recipe.model.get("weights") is None:
        return recipe
    return replace(recipe, model={**recipe.model, "weights": None})


def _arrange_algorithms(recipe: Recipe) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The recipe's algorithms for planning, in the order in which they act, and the settings of each."""
    settings = {SCHEDULE: recipe.schedule, **recipe.algorithms}
    made: dict[str, Any] = {SCHEDULE: LearningRate.for_planning(**recipe.schedule)}
    for name, given in recipe.algorithms.items():
        with users_mistake(f"algorithms.{name}"):
            made[name] = planner(name)(**given)
    clip_norm = recipe.optimizer["clip_norm"]
    if clip_norm is not None:
        if _CLIPPING in made:
            raise RecipeError(
                "optimizer.clip_norm",
                f"is {clip_norm:g} beside algorithms.{_CLIPPING}, which does the same; drop one",
            )
        made[_CLIPPING] = describe(_CLIPPING)
        settings[_CLIPPING] = {"clipping_type": "norm", "clipping_threshold": clip_norm}
    with users_mistake("algorithms"):
        order = arrange({name: algorithm.contract for name, algorithm in made.items()})
    return {name: made[name] for name in order}, settings


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


def _epoch_shapes(
    recipe: Recipe, algorithms: Mapping[str, Any], *, per_device_batch_size: int, world_size: int
) -> list[tuple[int, int]]:
    """(image size, global batch size) of every epoch."""
    size = recipe.data.train.image_size
    shapes = [(size, per_device_batch_size * world_size)] * recipe.epochs
    resizing, fixres = algorithms.get("progressive_resizing"), algorithms.get("fixres")
    try:
        if isinstance(resizing, ProgressiveResizing):
            resizing.prepare(
                total_epochs=recipe.epochs,
                image_size=size,
                per_device_batch_size=per_device_batch_size,
                num_ranks=world_size,
            )
            shapes = [
                (resizing.stage(epoch).image_size, resizing.per_device_batch_size(epoch, world_size) * world_size)
                for epoch in range(recipe.epochs)
            ]
        if isinstance(fixres, FixRes):
            start = fixres.start_epoch(recipe.epochs)
            if fixres.image_size is not None:
                _refuse_two_sizes(fixres, shapes[start:], resized=resizing is not None)
                shapes[start:] = [(fixres.image_size, batch) for _, batch in shapes[start:]]
    except ValueError as error:
        raise RecipeError("algorithms", str(error)) from None
    return shapes


def _keep_rates(recipe: Recipe, algorithms: Mapping[str, Any]) -> list[float]:
    """The share of a Vision Transformer's patches that every epoch trains on."""
    dropout = algorithms.get("patch_dropout")
    if not isinstance(dropout, PatchDropout):
        return [1.0] * recipe.epochs
    with users_mistake("algorithms"):
        return [dropout.rate_at(epoch, recipe.epochs) for epoch in range(recipe.epochs)]


def _refuse_two_sizes(fixres: FixRes, shapes: list[tuple[int, int]], *, resized: bool) -> None:
    others = {size for size, _ in shapes} - {fixres.image_size}
    if resized and others:
        raise ValueError(
            f"fixres.image_size is {fixres.image_size} px and progressive_resizing trains its epochs at "
            f"{', '.join(map(str, sorted(others)))} px; give its last stages that size, or leave fixres.image_size out"
        )


def _plan_epoch(
    index: int,
    recipe: Recipe,
    facts: DataFacts,
    algorithms: Mapping[str, Any],
    *,
    shape: tuple[int, int],
    macs: int,
    initial: float,
) -> Epoch:
    image_size, batch = shape
    if recipe.data.train.drop_last and batch > facts.num_train:
        raise RecipeError(
            "data.train",
            f"a global batch of {batch} is larger than the {facts.num_train} training images; make it smaller",
        )
    steps = facts.num_train // batch if recipe.data.train.drop_last else -(-facts.num_train // batch)
    images = steps * batch if recipe.data.train.drop_last else facts.num_train
    sam, fixres = algorithms.get("sam"), algorithms.get("fixres")
    in_fixres = isinstance(fixres, FixRes) and index >= fixres.start_epoch(recipe.epochs)
    ends = [
        _learning_rate(epoch, recipe, algorithms, initial=initial) for epoch in (index, index + (steps - 1) / steps)
    ]
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
    )


def _learning_rate(epoch: float, recipe: Recipe, algorithms: Mapping[str, Any], *, initial: float) -> float:
    schedule = algorithms[SCHEDULE]
    assert isinstance(schedule, LearningRate)
    modifiers = [one for one in algorithms.values() if isinstance(one, LearningRateModifier)]
    return schedule.learning_rate(epoch, total_epochs=recipe.epochs, initial=initial, modifiers=modifiers)


def _pass_sizes(global_batch_size: int, recipe: Recipe, facts: DataFacts, world_size: int) -> tuple[int, ...]:
    """Images per forward pass of a rank in training: of whole batches or microbatches, and of the remainders."""
    train, images = recipe.data.train, [global_batch_size // world_size]
    left = facts.num_train % global_batch_size // world_size
    if left and not train.drop_last:
        images.append(left)
    if isinstance(train.per_device_microbatch_size, int):
        size = train.per_device_microbatch_size
        images = [part for whole in images for part in (min(size, whole), whole % size)]
    return tuple(sorted(set(images) - {0}))


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
