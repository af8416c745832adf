"""A plan: every decision about a run, its epochs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.registry import names
from training.arrangement import CLIPPING, SCHEDULE
from training.facts import DataFacts
from training.planning.place import Place
from training.planning.selecting import Selecting
from training.recipe import Recipe

_AUTOCAST = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_RGB = 3
# Networks that do nothing to an image before a convolution, which tests/training/planning/test_pixel_type.py looks at.
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
