"""What a picture goes through before the network, in the words of transformers, torchvision and Pillow."""

from __future__ import annotations

from typing import Any

from training.trained import Preprocessing

_BILINEAR = 2  # Pillow's number


def resize_px(preprocessing: Preprocessing) -> int:
    """To which the shorter side is resized before the central square of `image_size` is cut out."""
    return max(preprocessing.image_size, round(preprocessing.image_size / preprocessing.crop_ratio))


def unit_scale(values: tuple[float, ...]) -> list[float]:
    """From the 0..255 scale to 0..1."""
    return [value / 255 for value in values]


def preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json of transformers, for an image processor that resizes, crops and normalizes."""
    size = preprocessing.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize_px(preprocessing)},
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": unit_scale(preprocessing.mean),
        "image_std": unit_scale(preprocessing.std),
    }


def torchvision_code(preprocessing: Preprocessing) -> str:
    """Python that defines `transform`, from a Pillow image to float32 [3, S, S]."""
    return f"""\
transform = v2.Compose([
    v2.ToImage(),
    v2.Resize({resize_px(preprocessing)}, antialias=True),
    v2.CenterCrop({preprocessing.image_size}),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean={unit_scale(preprocessing.mean)}, std={unit_scale(preprocessing.std)}),
])"""


def numpy_code(preprocessing: Preprocessing) -> str:
    """Python that defines `transform`, from a Pillow image to a float32 array [3, S, S], without torch."""
    size, resized = preprocessing.image_size, resize_px(preprocessing)
    return f"""\
def transform(image):
    scale = {resized} / min(image.size)
    width, height = (max({resized}, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - {size}) // 2, (height - {size}) // 2
    pixels = np.asarray(image.crop((left, top, left + {size}, top + {size})), dtype=np.float32) / 255
    pixels = (pixels - {unit_scale(preprocessing.mean)}) / {unit_scale(preprocessing.std)}
    return pixels.transpose(2, 0, 1).astype(np.float32)"""
