"""RandAugment (Cubuk 2020, arXiv 1909.13719): a few random operations of one magnitude on every image, on the device.

Shapes: N samples, C channels, H x W pixels, R rounds.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank
from .framework.batches import split_batch
from .framework.mixing import check_seed
from .framework.randomness import generator_at

Interpolation = Literal["nearest", "bilinear"]
Pixels = tuple[float, float, float]  # red, green, blue on the 0..255 scale
Normalization = Literal["imagenet", "unit"]

MAX_MAGNITUDE = 30

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_SIGNED = frozenset(OPERATIONS[1:10])  # those with a random sign

# Mean and std on the 0..255 scale; one number applies to all channels.
_NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "unit": ((0.0,), (255.0,)),
}


def randaugment_batch(
    images: Tensor, *, operations: Tensor, signs: Tensor, magnitude: int = 9, interpolation: Interpolation = "nearest"
) -> Tensor:
    """Apply each image's own operations, one after the other.

    With m = magnitude / 30 and s a sign: shear by 0.3 s m, translate by s m · 150/331 of the side, rotate by 30 s m
    degrees, brightness, color, contrast and sharpness times 1 + 0.9 s m, posterize to 8 - round(4 m) bits, solarize
    above 255 (1 - m), autocontrast, equalize, or nothing: torchvision's space, with its functions. Uncovered pixels
    become black.

    images: uint8 [N, C, H, W] with C 1 or 3, not normalized; the result keeps the memory format.
    operations: integers [R, N], indices into OPERATIONS; round r of sample i is operations[r, i].
    signs: [R, N], -1 or 1; unsigned operations ignore theirs.
    magnitude: 0 to 30; interpolation: for shears, translations and rotations.

    Images with the same operation in a round are processed together, so a round costs as many calls as it has kinds of
    operations, not images. Returns a new tensor. Deterministic; `draw_randaugment` draws.
    Raises ValueError for invalid images, shapes, indices or settings, and ModuleNotFoundError without torchvision.

    Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space", section 3.
    """
    _check_settings(operations.shape[0] if operations.ndim == 2 else 0, magnitude, interpolation)
    _check_arguments(images, operations, signs)
    with contextlib.nullcontext() if images.device.type == "cpu" else _WithoutWaiting():
        for operation_n, sign_n in zip(operations.cpu(), signs.cpu(), strict=True):
            images = _one_round(images, operation_n, sign_n, magnitude, interpolation)
    return images


def draw_randaugment(num_samples: int, *, num_ops: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (operations, signs), each [num_ops, N], uniformly and independently.

    generator: a CPU generator, the only source of randomness. Raises ValueError for less than one sample or operation.
    """
    for name, value in (("num_samples", num_samples), ("num_ops", num_ops)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    shape = (num_ops, num_samples)
    operations = torch.randint(len(OPERATIONS), shape, generator=generator)
    return operations, 2 * torch.randint(2, shape, generator=generator) - 1


class RandAugment(SpeedUp):
    """Augments every training batch on the device, but not in evaluation.

    num_ops: operations per image, 1 or more. magnitude: of all of them, 0 to 30.
    interpolation: nearest or bilinear.
    mean, std: of the images' normalization, a number per channel on the 0..255 scale; None reads the loader's `mean`
        and `std`. The normalization is undone for the augmentation, which expects 0..255, and then reapplied.
    normalization: a name in place of mean and std: "imagenet", with ImageNet's mean and standard deviation, or "unit",
        for values from 0 to 1 (torchvision's ToTensor alone).
    seed: of the draws, 0 or more; None uses the run's seed.

    A draw is a function of the seed, the rank and the number of batches done, so ranks draw differently, and a resumed
    run repeats and skips nothing. Acts before samples are mixed.
    """

    contract = Contract(writes=[Resource.IMAGES])
    events = (Event.BATCH_START,)

    def __init__(
        self,
        *,
        num_ops: int = 2,
        magnitude: int = 9,
        interpolation: Interpolation = "nearest",
        mean: Pixels | None = None,
        std: Pixels | None = None,
        normalization: Normalization | None = None,
        seed: int | None = None,
    ) -> None:
        _check_settings(num_ops, magnitude, interpolation)
        if (mean is None) != (std is None) or (std is not None and min(std) <= 0):
            raise ValueError(
                f"mean is {mean} and std is {std}; give both, std above 0, or neither to read the loader's"
            )
        check_seed(seed)
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.interpolation: Interpolation = interpolation
        self.mean: Sequence[float] | None = mean
        self.std: Sequence[float] | None = std
        if normalization is not None:
            _check_normalization(normalization, mean)
            self.mean, self.std = _NORMALIZATIONS[normalization]
        self.seed = seed
        self._checked = False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the batch's images with augmented ones."""
        images, targets = split_batch(state.batch)
        seed = state.rank_zero_seed if self.seed is None else self.seed
        generator = generator_at(seed, rank=global_rank(), step=state.timestamp.batch.value, stream="randaugment")
        operations, signs = draw_randaugment(images.shape[0], num_ops=self.num_ops, generator=generator)
        settings: dict[str, Any] = dict(
            operations=operations, signs=signs, magnitude=self.magnitude, interpolation=self.interpolation
        )
        if images.dtype == torch.uint8:
            state.batch = randaugment_batch(images, **settings), targets
            return
        mean, std = self._normalization(state, images)
        pixels = images.float() * std + mean
        if not self._checked:  # once per run: reading an accelerator's values waits for it
            _check_pixels(pixels)
            self._checked = True
        augmented = randaugment_batch(pixels.round_().clamp_(0, 255).byte(), **settings)
        state.batch = ((augmented.float() - mean) / std).to(images.dtype), targets

    def _normalization(self, state: State, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean if self.mean is not None else getattr(state.dataloader, "mean", None)
        std = self.std if self.std is not None else getattr(state.dataloader, "std", None)
        if mean is None or std is None:
            raise ValueError(
                f"received normalized images of a {type(state.dataloader).__name__}, which does not tell its mean and "
                "std; write RandAugment(normalization='imagenet') for ImageNet's, RandAugment(normalization='unit') "
                "for values from 0 to 1, or RandAugment(mean=(...), std=(...)) with your own on the 0..255 scale"
            )
        if not {len(mean), len(std)} <= {1, images.shape[1]}:
            raise ValueError(
                f"received images of {images.shape[1]} channels, and the mean has {len(mean)} numbers and the std "
                f"{len(std)}; give RandAugment a number a channel for both"
            )
        return _per_channel(mean, images), _per_channel(std, images)


def _one_round(images: Tensor, operations: Tensor, signs: Tensor, magnitude: int, interpolation: str) -> Tensor:
    augmented = images.clone()
    for index in operations.unique().tolist():
        name = OPERATIONS[index]
        if name == "identity":
            continue
        of_kind = operations == index
        for sign in (-1, 1) if name in _SIGNED else (0,):
            samples = (of_kind & (signs == sign) if sign else of_kind).nonzero().squeeze(1)
            if len(samples):
                samples = samples.to(images.device, non_blocking=True)
                function = _operation(name, sign or 1, magnitude, interpolation, images.shape[-2:])
                augmented[samples] = function(images[samples])
    return augmented


def _operation(
    name: str, sign: int, magnitude: int, interpolation: str, size: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """The function that applies `name` to images [n, C, H, W]."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = size
    mode = InterpolationMode(interpolation)
    factor = 1 + sign * _level(0.9, magnitude)
    shear = math.degrees(math.atan(sign * _level(0.3, magnitude)))
    angle = sign * _level(30.0, magnitude)
    left, up = (sign * int(_level(150 / 331 * side, magnitude)) for side in (width, height))
    bits = 8 - round(4 * magnitude / MAX_MAGNITUDE)

    def affine(images: Tensor, **change: Any) -> Tensor:
        still: dict[str, Any] = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], interpolation=mode)
        return functional.affine(images, **still | change)

    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "shear_x": lambda images: affine(images, shear=[shear, 0.0], center=[0, 0]),
        "shear_y": lambda images: affine(images, shear=[0.0, shear], center=[0, 0]),
        "translate_x": lambda images: affine(images, translate=[left, 0]),
        "translate_y": lambda images: affine(images, translate=[0, up]),
        "rotate": lambda images: functional.rotate(images, angle=angle, interpolation=mode),
        "brightness": lambda images: functional.adjust_brightness(images, factor),
        "color": lambda images: functional.adjust_saturation(images, factor),
        "contrast": lambda images: functional.adjust_contrast(images, factor),
        "sharpness": lambda images: functional.adjust_sharpness(images, factor),
        "posterize": lambda images: functional.posterize(images, bits=bits),
        "solarize": lambda images: functional.solarize(images, threshold=255 * _level(1.0, MAX_MAGNITUDE - magnitude)),
        "autocontrast": functional.autocontrast,
        "equalize": functional.equalize,
    }
    return operations[name]


def _level(maximum: float, magnitude: int) -> float:
    # torchvision's levels, float32 rounding included.
    return float(torch.linspace(0.0, maximum, MAX_MAGNITUDE + 1)[magnitude])


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return _constant(tuple(values), images.device).view(-1, 1, 1)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.as_tensor(values, dtype=torch.float32, device=device)


class _WithoutWaiting(TorchFunctionMode):
    """Inside, torchvision's small tensors of numbers go to a GPU without the host waiting until they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is not torch.tensor or device is None or torch.device(device).type == "cpu":
            return func(*args, **kwargs)
        made = torch.tensor(*args, **{**kwargs, "device": "cpu"})
        if torch.device(device).type == "cuda":
            made = made.pin_memory()
        return made.to(device, non_blocking=True)


def _check_settings(num_ops: int, magnitude: int, interpolation: str) -> None:
    if num_ops < 1:
        raise ValueError(f"num_ops {num_ops} must be at least 1; to augment nothing leave RandAugment out")
    if not 0 <= magnitude <= MAX_MAGNITUDE or magnitude != int(magnitude):
        raise ValueError(f"magnitude {magnitude} must be a whole number from 0 to {MAX_MAGNITUDE}; 9 is usual")
    if interpolation not in ("nearest", "bilinear"):
        raise ValueError(f"interpolation {interpolation!r} must be 'nearest' or 'bilinear'")


def _check_normalization(normalization: str, mean: Any) -> None:
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"normalization {normalization!r} must be {' or '.join(map(repr, _NORMALIZATIONS))}; "
            "for another, leave it out and give mean and std"
        )
    if mean is not None:
        raise ValueError(f"normalization is {normalization!r} beside mean and std; give one or the other")


def _check_arguments(images: Tensor, operations: Tensor, signs: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"received images of shape {list(images.shape)} and type {images.dtype}; they must be uint8 "
            "[N, 1 or 3, H, W]: augment before normalizing"
        )
    if operations.shape[1] != images.shape[0] or signs.shape != operations.shape:
        raise ValueError(
            f"received operations {list(operations.shape)} and signs {list(signs.shape)} for {images.shape[0]} images; "
            f"both must be [rounds, {images.shape[0]}]: draw them for this batch"
        )
    if int(operations.min()) < 0 or int(operations.max()) >= len(OPERATIONS):
        raise ValueError(
            f"received operations {int(operations.min())}..{int(operations.max())}; they must lie in "
            f"0..{len(OPERATIONS) - 1}: draw them with draw_randaugment"
        )


def _check_pixels(pixels: Tensor) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1 or high > 256:
        raise ValueError(
            f"received images that taking normalization back puts at {low:.0f}..{high:.0f}, not within 0..255; "
            "give RandAugment the mean and std that they were normalized with, on the 0..255 scale"
        )
