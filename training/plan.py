"""What a recipe will do, worked out without training: phases, learning rates, images and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from composer.core import State
from composer.loggers import Logger
from composer.utils import get_device
from torch import nn

from algos.fixres import FixRes
from algos.framework.base import Event, Resource, SpeedUp
from algos.framework.protocols import LearningRateModifier
from algos.learning_rate import LearningRate
from algos.progressive_resizing import ProgressiveResizing
from algos.sam import SAM
from models.summary import count_forward_macs, count_parameters, summarize
from training.build import DataFacts, arrange_algorithms, build_network, initial_learning_rate, per_device_batch_size
from training.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run. MACs are multiply-adds of one image."""

    image_size: int
    global_batch_size: int
    steps: int
    images: int
    learning_rate: tuple[float, float]  # of its first and last step
    forward_macs: int
    passes: float  # forward passes an image; 2 under SAM at every step
    frozen: bool  # nothing below the classifier is trained: no backward pass to speak of
    test_crop: bool
    suspended: tuple[str, ...]  # algorithms that are on in the run and do nothing in this epoch

    @property
    def total_forward_macs(self) -> float:
        """Multiply-adds of the epoch's forward passes."""
        return self.images * self.passes * self.forward_macs

    @property
    def total_macs(self) -> float:
        """Multiply-adds with the backward passes, each counted as two forward ones."""
        return self.total_forward_macs * (1 if self.frozen else 3)


@dataclass(frozen=True)
class Plan:
    """A run, epoch by epoch, and the algorithms in the order in which they act."""

    run_name: str
    algorithms: tuple[tuple[str, tuple[str, ...]], ...]  # name, events
    parameters: int
    eval_image_size: int
    facts: DataFacts
    epochs: tuple[Epoch, ...]

    @property
    def steps(self) -> int:
        return sum(epoch.steps for epoch in self.epochs)

    @property
    def images(self) -> int:
        return sum(epoch.images for epoch in self.epochs)

    @property
    def forward_macs(self) -> float:
        return sum(epoch.total_forward_macs for epoch in self.epochs)

    @property
    def total_macs(self) -> float:
        return sum(epoch.total_macs for epoch in self.epochs)


def make_plan(recipe: Recipe, facts: DataFacts, *, world_size: int = 1) -> Plan:
    """Work out what `recipe` does on `facts`'s data. Raises RecipeError where the recipe cannot be carried out."""
    if recipe.schedule["warmup_epochs"] > recipe.epochs:
        raise RecipeError(
            "schedule.warmup_epochs",
            f"is {recipe.schedule['warmup_epochs']:g}, longer than the run of {recipe.epochs} epochs; make it shorter",
        )
    algorithms = arrange_algorithms(recipe)
    network = network_as_trained(recipe, facts, algorithms)
    shapes = _epoch_shapes(recipe, algorithms, world_size=world_size)
    initial = initial_learning_rate(recipe, world_size=world_size)
    macs = {
        size: _macs(network, size, _pass_sizes(batch, recipe, facts, world_size), recipe) for size, batch in set(shapes)
    }
    epochs = tuple(
        _plan_epoch(index, recipe, facts, algorithms, shape=shape, macs=macs[shape[0]], initial=initial)
        for index, shape in enumerate(shapes)
    )
    return Plan(
        run_name=recipe.run_name,
        algorithms=tuple((name, tuple(str(e.value) for e in one.events)) for name, one in algorithms.items()),
        parameters=count_parameters(network),
        eval_image_size=recipe.data.eval.image_size,
        facts=facts,
        epochs=epochs,
    )


def network_summary(recipe: Recipe, facts: DataFacts, *, world_size: int = 1) -> str:
    """The network's layers, as the recipe's algorithms make it: shapes, parameters, multiply-adds; for people."""
    network = network_as_trained(recipe, facts, arrange_algorithms(recipe))
    images = per_device_batch_size(recipe, world_size=world_size)
    return summarize(network, image_size=recipe.data.train.image_size, num_images=images)


def network_as_trained(recipe: Recipe, facts: DataFacts, algorithms: Mapping[str, SpeedUp]) -> nn.Module:
    """The recipe's network with `algorithms` having changed it, as they do when training starts."""
    network = build_network(recipe, facts)
    state = State(rank_zero_seed=recipe.seed, model=network, run_name=recipe.run_name, device=get_device("cpu"))
    for algorithm in algorithms.values():
        if Event.INIT in algorithm.events and Resource.MODEL in algorithm.contract.writes:
            algorithm.apply(Event.INIT, state, Logger(state))
    return state.model


def without_algorithms(recipe: Recipe, run_name: str) -> Recipe:
    """The same recipe with every speed-up off."""
    off = dict.fromkeys(recipe.algorithms)
    settings = {**recipe.settings, "algorithms": off, "run_name": run_name}
    return replace(recipe, algorithms={}, run_name=run_name, settings=settings)


def without_weights(recipe: Recipe) -> Recipe:
    """The same recipe with a new network, which costs no download."""
    if recipe.model.get("weights") is None:
        return recipe
    return replace(recipe, model={**recipe.model, "weights": None})


def format_plan(plan: Plan, baseline: Plan) -> str:
    """The plan as text for people, with the savings against `baseline`, the same recipe with every speed-up off."""
    facts = plan.facts
    lines = [
        f"{plan.run_name}: {facts.num_train:,} training and {facts.num_eval:,} held-out images of "
        f"{facts.num_classes} classes, {plan.parameters:,} parameters",
        *([] if facts.present else ["(the data are not here: counts are data.expected's)"]),
        "",
        "algorithms, in the order they act",
        *(f"  {name:<28}{', '.join(events)}" for name, events in plan.algorithms),
        "",
        f"{'epochs':>9}{'image':>8}{'batch':>8}{'steps':>9}{'learning rate':>22}{'MMACs/image':>14}  notes",
        *_phase_lines(plan),
        "",
        f"{plan.steps:,} steps, {plan.images:,} images seen; evaluation at {plan.eval_image_size} px",
        f"forward: {_engineering(plan.forward_macs)}MACs in all; with the backward passes: "
        f"{_engineering(plan.total_macs)}MACs",
        _savings(plan, baseline),
    ]
    return "\n".join(lines)


def _epoch_shapes(recipe: Recipe, algorithms: Mapping[str, SpeedUp], *, world_size: int) -> list[tuple[int, int]]:
    """(image size, global batch size) of every epoch."""
    per_device = per_device_batch_size(recipe, world_size=world_size)
    size = recipe.data.train.image_size
    shapes = [(size, per_device * world_size)] * recipe.epochs
    resizing, fixres = algorithms.get("progressive_resizing"), algorithms.get("fixres")
    try:
        if isinstance(resizing, ProgressiveResizing):
            resizing.prepare(total_epochs=recipe.epochs, image_size=size, per_device_batch_size=per_device)
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
    algorithms: Mapping[str, SpeedUp],
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


def _learning_rate(epoch: float, recipe: Recipe, algorithms: Mapping[str, SpeedUp], *, initial: float) -> float:
    schedule = algorithms["learning_rate"]
    assert isinstance(schedule, LearningRate)
    modifiers = [one for one in algorithms.values() if isinstance(one, LearningRateModifier)]
    return schedule.learning_rate(epoch, total_epochs=recipe.epochs, initial=initial, modifiers=modifiers)


def _pass_sizes(global_batch_size: int, recipe: Recipe, facts: DataFacts, world_size: int) -> tuple[int, ...]:
    """Images of a rank's forward passes in training: of a whole batch or microbatch, and of what is left at the end."""
    train, images = recipe.data.train, [global_batch_size // world_size]
    left = facts.num_train % global_batch_size // world_size
    if left and not train.drop_last:
        images.append(left)
    if isinstance(train.per_device_microbatch_size, int):
        size = train.per_device_microbatch_size
        images = [part for whole in images for part in (min(size, whole), whole % size)]
    return tuple(sorted(set(images) - {0}))


def _macs(network: nn.Module, image_size: int, pass_sizes: tuple[int, ...], recipe: Recipe) -> int:
    """Of one image. Tries a forward pass of every size."""
    macs = 0
    for images in pass_sizes:
        try:
            macs = count_forward_macs(network, image_size=image_size, num_images=images)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason, name = str(error).splitlines()[0], recipe.model["name"]
            raise RecipeError(
                "model", f"{name} cannot take images of {image_size} px in batches of {images} a device: {reason}"
            ) from None
    return macs


def _phase_lines(plan: Plan) -> list[str]:
    lines, first = [], 0
    for _, run in groupby(
        plan.epochs, key=lambda e: (e.image_size, e.global_batch_size, e.frozen, e.test_crop, e.suspended, e.passes)
    ):
        epochs = list(run)
        start, end = epochs[0], epochs[-1]
        notes = [
            *(["test-time crop"] if start.test_crop else []),
            *(["last layers only"] if start.frozen else []),
            *(f"no {name}" for name in start.suspended),
            *([f"{start.passes:g} passes a step"] if start.passes > 1 else []),
        ]
        rates = f"{start.learning_rate[0]:.3g} to {end.learning_rate[1]:.3g}"
        lines.append(
            f"{f'{first + 1}-{first + len(epochs)}':>9}{f'{start.image_size} px':>8}{start.global_batch_size:>8,}"
            f"{sum(epoch.steps for epoch in epochs):>9,}{rates:>22}{start.forward_macs / 1e6:>14.2f}"
            f"  {', '.join(notes)}".rstrip()
        )
        first += len(epochs)
    return lines


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
