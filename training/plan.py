"""Makes every decision about a run once: device, batch sizes, stages, learning rates, algorithms, multiply-adds."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from algos.distillation import Distillation
from algos.fixres import FixRes
from algos.framework.protocols import LearningRateModifier
from algos.learning_rate import LearningRate
from algos.patch_dropout import PatchDropout, keeping_patches
from algos.progressive_resizing import ProgressiveResizing
from algos.sam import SAM
from algos.selective_backprop import SelectiveBackprop
from models.registry import names
from models.roles import hidden_matrices
from models.summary import count_forward_macs, count_parameters
from training.arrangement import CLIPPING, SCHEDULE, arrange_algorithms
from training.facts import DataFacts, class_weights, data_facts
from training.network import change_network, make_network, shapes_suffice
from training.optimizers import peak_learning_rate
from training.recipe import Recipe, RecipeError, users_mistake
from training.recipe.compiling import CUDA_GRAPH_MODES
from training.recipe.watching import check_profiled_steps
from training.selecting import Selecting, plan_selecting
from training.teachers import Teacher, find_teacher

_AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_RGB = 3
# Networks that do nothing to an image before a convolution, which tests/training/test_pixel_type.py looks at.
_CONVOLVE_FIRST = frozenset(names()) - {"alexnet"}
# Algorithms that compute with no pixel: in a recipe progressive_resizing's images come in their size from the loader.
_LEAVE_PIXELS_ALONE = frozenset(
    {
        SCHEDULE, CLIPPING, "blurpool", "channels_last", "cutmix", "ema", "fixres", "label_smoothing",
        "progressive_resizing", "sam", "selective_backprop", "stochastic_depth",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Steps of an epoch that are alike. images: of all of them. forward_macs: as in `Epoch`."""

    image_size: int
    global_batch_size: int
    steps: int
    images: int
    forward_macs: int


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run.

    images: that the loader gives. forward_macs: multiply-adds of one image's forward pass. drawn: its steps, by image
    size and batch size, if each draws its own; image_size and global_batch_size are then the largest, and forward_macs
    is the mean over images. selecting: the steps that train only a part of their images, None if none does.
    teacher_macs: multiply-adds of a teacher's pass of an image.
    """

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
    drawn: tuple[Steps, ...] = ()
    selecting: Selecting | None = None
    teacher_macs: int = 0

    @property
    def trained_images(self) -> int:
        """The images that get a backward pass."""
        return self.images - (self.selecting.left_out if self.selecting else 0)

    @property
    def total_forward_macs(self) -> float:
        """Multiply-adds of the epoch's forward passes."""
        return self._trained_macs + self._other_macs

    @property
    def total_macs(self) -> float:
        """Multiply-adds including the backward passes, each counted as two forward passes."""
        return self._trained_macs * (1 if self.frozen else 3) + self._other_macs

    @property
    def _trained_macs(self) -> float:
        return self.trained_images * self.passes * self.forward_macs

    @property
    def _other_macs(self) -> float:
        """Of passes without a backward pass: those that find losses, and a teacher's."""
        selection = self.selecting.images * self.selecting.forward_macs if self.selecting else 0
        return selection + self.trained_images * self.teacher_macs


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
    class_weights: of the training loss; None where all classes weigh the same.
    teacher_parameters: of a teacher, which every rank holds beside the network; 0 without one.
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
    class_weights: tuple[float, ...] | None = None
    teacher_parameters: int = 0
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
    algorithms, settings = arrange_algorithms(recipe)
    network = make_network(recipe, num_classes=facts.num_classes, shapes_only=shapes_suffice(algorithms))
    matrices = _matrices(network, recipe)
    network = change_network(network, recipe, algorithms)
    if isinstance(fixres := algorithms.get("fixres"), FixRes):
        with users_mistake("algorithms"):
            fixres.check_model(network)
    per_device = per_device_batch_size(recipe, world_size=place.world_size)
    peak = peak_learning_rate(recipe.optimizer, global_batch_size=per_device * place.world_size)
    shapes = _epoch_shapes(
        recipe, algorithms, per_device_batch_size=per_device, world_size=place.world_size, num_images=facts.num_train
    )
    keep_rates = _keep_rates(recipe, algorithms)
    drawn = _drawn_shapes(recipe, algorithms, world_size=place.world_size)
    each_shape = {
        (shape, keep_rate)
        for epoch, (whole, keep_rate) in enumerate(zip(shapes, keep_rates, strict=True))
        for shape in {whole, *drawn.get(epoch, ())}
    }
    macs = {
        (size, batch, keep_rate): _macs(
            network, size, keep_rate, _pass_sizes(batch, recipe, facts, place.world_size), recipe
        )
        for (size, batch), keep_rate in sorted(each_shape)
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
                    index,
                    recipe,
                    facts,
                    algorithms,
                    shape=shape,
                    drawn=_steps_of(drawn.get(index, []), macs, keep_rate, facts),
                    macs=macs[(*shape, keep_rate)],
                    initial=peak,
                ),
                keep_rate=keep_rate,
            )
            for index, (shape, keep_rate) in enumerate(zip(shapes, keep_rates, strict=True))
        ),
        class_weights=class_weights(recipe, facts),
        matrices=matrices,
    )
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


def _epoch_shapes(
    recipe: Recipe, algorithms: Mapping[str, Any], *, per_device_batch_size: int, world_size: int, num_images: int
) -> list[tuple[int, int]]:
    """(image size, global batch size) of every epoch; where each step draws its own, those of the largest images."""
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
                num_images=num_images,
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


def _drawn_shapes(
    recipe: Recipe, algorithms: Mapping[str, Any], *, world_size: int
) -> dict[int, list[tuple[int, int]]]:
    """(image size, global batch size) of each step of the epochs whose steps draw their own."""
    resizing = algorithms.get("progressive_resizing")
    if not isinstance(resizing, ProgressiveResizing):
        return {}
    drawn = {epoch: resizing.shapes(epoch) for epoch in range(recipe.epochs)}
    return {epoch: [(size, batch * world_size) for size, batch in shapes] for epoch, shapes in drawn.items() if shapes}


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


def _keep_rates(recipe: Recipe, algorithms: Mapping[str, Any]) -> list[float]:
    """The share of a Vision Transformer's patches that every epoch trains on."""
    dropout = algorithms.get("patch_dropout")
    if not isinstance(dropout, PatchDropout):
        return [1.0] * recipe.epochs
    with users_mistake("algorithms"):
        return [dropout.rate_at(epoch, recipe.epochs) for epoch in range(recipe.epochs)]


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
    drawn: tuple[Steps, ...],
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
    if drawn:
        steps, images = sum(one.steps for one in drawn), sum(one.images for one in drawn)
        batch = max(one.global_batch_size for one in drawn)
        macs = round(sum(one.images * one.forward_macs for one in drawn) / images)
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
        drawn=drawn,
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
