"""Augmentations of uint8 images in the loader, after crop and flip; pixels do not depend on the workers or ranks.

An image's draws are a hash of (seed, epoch, image index, place in the list). Parameters are distributed as in
torchvision's transforms of the same names. Pillow does the work, which at 224 px takes 0.05 to 0.7 ms per operation
(2 ms for a hue change) and releases the GIL.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from ..draws import Operation, uniforms

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["nearest", "bilinear"]
Color = tuple[int, int, int]  # red, green, blue, 0..255

_BLACK: Color = (0, 0, 0)
_MEAN: Color = (124, 116, 104)  # ImageNet's, about zero after normalization
_ATTEMPTS = 10  # torchvision's number of tries for an area that fits
_BINS = 31  # number of magnitudes


class Augmentation(Protocol):
    """One entry of the list. `apply` takes `num_draws` numbers, uniform in [0, 1), its only randomness."""

    probability: float
    num_draws: ClassVar[int]

    def apply(self, image: Image, draws: np.ndarray) -> Image: ...


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Shifts the image by whole pixels, up to `max_shift` (0..1) of its side each way; `fill` fills the gap."""

    max_shift: float = 0.1
    fill: Color = _BLACK
    probability: float = 1.0
    num_draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check(self, max_shift=(0, 1))

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        across, down = (round((2 * u - 1) * self.max_shift * side) for u, side in zip(draws, image.size, strict=True))
        return _affine(image, (1, 0, -across, 0, 1, -down), "nearest", self.fill)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotates about the center by an angle uniform in [-degrees, degrees], 0..180; `fill` colors the corners."""

    degrees: float
    interpolation: Interpolation = "bilinear"
    fill: Color = _BLACK
    probability: float = 1.0
    num_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check(self, degrees=(0, 180))

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        angle = (2 * draws[0] - 1) * self.degrees
        return image.rotate(angle, _resampling(self.interpolation), fillcolor=self.fill)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue in random order.

    brightness, contrast, saturation: b, at least 0; the factor is uniform in [max(0, 1 - b), 1 + b].
    hue: h, 0..0.5; hue shifts by a share of the circle uniform in [-h, h].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0
    num_draws: ClassVar[int] = 8

    def __post_init__(self) -> None:
        _check(self, brightness=(0, math.inf), contrast=(0, math.inf), saturation=(0, math.inf), hue=(0, 0.5))

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        for part in np.argsort(draws[:4], kind="stable"):
            u = float(draws[4 + part])
            if part == 3:
                if self.hue:
                    image = _turn_hue(image, (2 * u - 1) * self.hue)
                continue
            strength = (self.brightness, self.contrast, self.saturation)[part]
            if strength:
                least, most = max(0.0, 1 - strength), 1 + strength
                image = _enhance(image, ("Brightness", "Contrast", "Color")[part], least + (most - least) * u)
        return image


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """Fills a square around a random pixel, clipped at the border (DeVries and Taylor 2017).

    size: side of the square over the image's side, above 0 and up to 1.
    """

    size: float = 0.5
    fill: Color = _MEAN
    probability: float = 1.0
    num_draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check(self, size=(0, 1))

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        (width, height), half = image.size, round(self.size * min(image.size) / 2)
        x, y = int(draws[0] * width), int(draws[1] * height)
        image.paste(self.fill, (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))
        return image


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Fills a rectangle inside the image (Zhong et al. 2017).

    scale: range of its share of the area. aspect_ratio: range of its height / width, drawn log-uniformly.
    """

    scale: tuple[float, float] = (0.02, 0.33)
    aspect_ratio: tuple[float, float] = (0.3, 3.3)
    fill: Color = _MEAN
    probability: float = 0.5
    num_draws: ClassVar[int] = 4 * _ATTEMPTS

    def __post_init__(self) -> None:
        _check(self, scale=(0, 1), aspect_ratio=(0, math.inf))

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        width, height = image.size
        log_least, log_most = (math.log(ratio) for ratio in self.aspect_ratio)
        for u_area, u_ratio, u_top, u_left in draws.reshape(_ATTEMPTS, 4).tolist():
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * u_area)
            ratio = math.exp(log_least + (log_most - log_least) * u_ratio)
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < height and wide < width:
                top, left = int(u_top * (height - tall + 1)), int(u_left * (width - wide + 1))
                image.paste(self.fill, (left, top, left + wide, top + tall))
                break
        return image


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` operations, each drawn from 14, all of one magnitude, 0..30 (Cubuk et al. 2020, arXiv 1909.13719)."""

    num_ops: int = 2
    magnitude: int = 9
    interpolation: Interpolation = "nearest"
    fill: Color = _BLACK
    probability: float = 1.0

    def __post_init__(self) -> None:
        _check(self, num_ops=(1, math.inf), magnitude=(0, _BINS - 1))

    @property
    def num_draws(self) -> int:
        return 2 * self.num_ops

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        for u_operation, u_sign in draws.reshape(self.num_ops, 2).tolist():
            name = OPERATIONS[int(u_operation * len(OPERATIONS))]
            level = _randaugment_level(name, self.magnitude, image.size)
            image = apply_operation(image, name, _signed(name, level, u_sign), self.interpolation, self.fill)
        return image


@dataclass(frozen=True, kw_only=True)
class TrivialAugment:
    """One operation of 14, its magnitude drawn from 31 (Müller and Hutter 2021, arXiv 2103.10158, the wide space)."""

    interpolation: Interpolation = "nearest"
    fill: Color = _BLACK
    probability: float = 1.0
    num_draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check(self)

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        name = OPERATIONS[int(draws[0] * len(OPERATIONS))]
        level = _trivialaugment_level(name, int(draws[1] * _BINS))
        return apply_operation(image, name, _signed(name, level, draws[2]), self.interpolation, self.fill)


@dataclass(frozen=True, kw_only=True)
class AutoContrast:
    """Stretches each channel so that its darkest pixel becomes 0 and its brightest 255."""

    probability: float = 0.5
    num_draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check(self)

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        return apply_operation(image, "autocontrast", 0.0, "nearest", _BLACK)


@dataclass(frozen=True, kw_only=True)
class VerticalFlip:
    """Turns the image upside down."""

    probability: float = 0.5
    num_draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check(self)

    def apply(self, image: Image, draws: np.ndarray) -> Image:
        from PIL import Image as pillow

        return image.transpose(pillow.Transpose.FLIP_TOP_BOTTOM)


AUGMENTATIONS: dict[str, type] = {
    "autocontrast": AutoContrast,
    "color_jitter": ColorJitter,
    "cutout": Cutout,
    "randaugment": RandAugment,
    "random_erasing": RandomErasing,
    "rotation": Rotation,
    "translate": Translate,
    "trivialaugment": TrivialAugment,
    "vertical_flip": VerticalFlip,
}

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_SIGNED = frozenset(OPERATIONS[1:10])  # those with a random sign


def build_augmentations(entries: Sequence[Mapping[str, Any]]) -> tuple[Augmentation, ...]:
    """Build the augmentations of `[{"name": "color_jitter", "brightness": 0.4}, ...]`, in order.

    Raises:
        ValueError: an unknown name or setting, with the nearest match; a value that is not allowed.
    """
    return tuple(_build(entry, f"augmentations[{place}]") for place, entry in enumerate(entries))


def augment_batch(
    images: np.ndarray, indices: np.ndarray, augmentations: Sequence[Augmentation], *, seed: int, epoch: int
) -> None:
    """Apply the augmentations to a batch, in place.

    Args:
        images: uint8 [B, H, W, 3].
        indices: of the images in the data [B]; the draws depend only on these, the seed and the epoch.
    """
    from PIL import Image as pillow

    drawn = []
    for place, augmentation in enumerate(augmentations):
        draws = uniforms(
            indices,
            seed=seed,
            epoch=epoch,
            operation=Operation.AUGMENTATION + place,
            num_draws=1 + augmentation.num_draws,
        )
        drawn.append((augmentation, draws[:, 0] < augmentation.probability, draws[:, 1:]))
    for row in range(len(images)):
        due = [(augmentation, draws[row]) for augmentation, applies, draws in drawn if applies[row]]
        if not due:
            continue
        image = pillow.fromarray(images[row])
        for augmentation, draws in due:
            image = augmentation.apply(image, draws)
        images[row] = np.asarray(image)


def apply_operation(image: Image, name: str, level: float, interpolation: Interpolation, fill: Color) -> Image:
    """Apply one of OPERATIONS. `level`: tangent of the shear, px of the translation, degrees, factor - 1, bits, or
    threshold / 255; the others ignore it."""
    from PIL import ImageOps

    if name == "shear_x":
        return _affine(image, (1, level, 0, 0, 1, 0), interpolation, fill)
    if name == "shear_y":
        return _affine(image, (1, 0, 0, level, 1, 0), interpolation, fill)
    if name == "translate_x":
        return _affine(image, (1, 0, -int(level), 0, 1, 0), interpolation, fill)
    if name == "translate_y":
        return _affine(image, (1, 0, 0, 0, 1, -int(level)), interpolation, fill)
    if name == "rotate":
        return image.rotate(level, _resampling(interpolation), fillcolor=fill)
    if name in ("brightness", "color", "contrast", "sharpness"):
        return _enhance(image, name.capitalize(), 1 + level)
    if name == "posterize":
        return ImageOps.posterize(image, int(level))
    if name == "solarize":
        return ImageOps.solarize(image, 255 * level)  # pyright: ignore[reportArgumentType] (any number compares)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    assert name == "identity", name
    return image


def _randaugment_level(name: str, magnitude: int, size: tuple[int, int]) -> float:
    share = magnitude / (_BINS - 1)
    if name.startswith("translate"):
        return share * 150 / 331 * size[0 if name == "translate_x" else 1]
    if name == "posterize":
        return 8 - round(4 * share)
    if name == "solarize":
        return 1 - share
    return share * {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0}.get(name, 0.9)


def _trivialaugment_level(name: str, magnitude: int) -> float:
    share = magnitude / (_BINS - 1)
    if name == "posterize":
        return 8 - round(6 * share)
    if name == "solarize":
        return 1 - share
    return share * {"translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0}.get(name, 0.99)


def _signed(name: str, level: float, draw: float) -> float:
    return -level if name in _SIGNED and draw < 0.5 else level


def _affine(image: Image, matrix: tuple[float, ...], interpolation: Interpolation, fill: Color) -> Image:
    from PIL import Image as pillow

    return image.transform(
        image.size, pillow.Transform.AFFINE, matrix, resample=_resampling(interpolation), fillcolor=fill
    )


def _resampling(interpolation: Interpolation) -> Any:
    from PIL import Image as pillow

    return pillow.Resampling[interpolation.upper()]


def _enhance(image: Image, kind: str, factor: float) -> Image:
    from PIL import ImageEnhance

    return getattr(ImageEnhance, kind)(image).enhance(factor)


def _turn_hue(image: Image, share: float) -> Image:
    from PIL import Image as pillow

    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(round(share * 255) % 256)  # wraps around, as hue does
    return pillow.merge("HSV", (pillow.fromarray(turned), saturation, value)).convert("RGB")


def _build(entry: Mapping[str, Any], where: str) -> Augmentation:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"{where} {entry!r}: give a mapping with a name, one of {', '.join(AUGMENTATIONS)}")
    name, settings = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    if name not in AUGMENTATIONS:
        raise ValueError(f"{where} {name!r}: give one of {', '.join(AUGMENTATIONS)}{_nearest(name, AUGMENTATIONS)}")
    known = [field.name for field in fields(AUGMENTATIONS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"{where} {name} has no {key!r}; it has: {', '.join(known)}{_nearest(key, known)}")
    try:
        return AUGMENTATIONS[name](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {name}: {error}") from None


def _nearest(given: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check(augmentation: Any, **ranges: tuple[float, float]) -> None:
    # Checks every setting: numbers and pairs within their ranges, colors, interpolation, probability.
    for name, (least, most) in ({"probability": (0, 1)} | ranges).items():
        value = getattr(augmentation, name)
        pair = isinstance(value, (list, tuple))
        parts = list(value) if pair else [value]
        if not all(_is_number(part) and least <= part <= most for part in parts):
            raise ValueError(f"{name} {value!r}: give {'numbers' if pair else 'a number'} from {least:g} to {most:g}")
        default = type(augmentation).__dataclass_fields__[name].default
        if pair != isinstance(default, tuple):
            raise ValueError(f"{name} {value!r}: give {'a number' if pair else '(least, largest)'}")
        if pair:
            if len(parts) != 2 or not 0 < parts[0] <= parts[1]:
                raise ValueError(f"{name} {value!r}: give (least, largest), above 0 and in this order")
            object.__setattr__(augmentation, name, tuple(parts))
        elif isinstance(default, int) and value != int(value):
            raise ValueError(f"{name} {value!r}: give a whole number")
    if hasattr(augmentation, "fill"):
        fill = augmentation.fill
        whole = isinstance(fill, (list, tuple)) and all(isinstance(v, int) and 0 <= v <= 255 for v in fill)
        if not whole or len(fill) != 3:
            raise ValueError(f"fill {fill!r}: give red, green and blue, whole numbers from 0 to 255")
        object.__setattr__(augmentation, "fill", tuple(fill))
    if getattr(augmentation, "interpolation", "nearest") not in ("nearest", "bilinear"):
        raise ValueError(f"interpolation {augmentation.interpolation!r}: give nearest or bilinear")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
