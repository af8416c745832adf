"""`smoke=true`: the same run at small scale, on synthetic images, to check it within a minute on two CPU cores.

What stays: the model in full, the algorithms, the loaders, the order of the phases, the optimizer, and the shapes of
the schedule. What shrinks:

    data        a few batches of synthetic images, with as many classes; only digits and CIFAR keep their image size
    image sizes scaled by one factor, so that the largest is 112 px, in multiples of 16
    epochs      one per stage of progressive resizing, the last of them FixRes's; at least two
    batches     scaled by one factor, so that the smallest has 2 images per device; learning rates scale with them
    schedule    warm-up, milestones and points in proportion to the epochs
    the rest    one checkpoint, at the end; no profile, whose steps are those of the whole run; new weights instead of
                downloaded ones; fp32 on the CPU unless the recipe names another device; a single process runs without
                an engine
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_LARGEST_IMAGE_PX = 112
_MULTIPLE_PX = 16  # ViT's patch size
_SMALLEST_BATCH = 2  # images per device: batch norm and MixUp need two
_SMALL_SOURCES_PX = {"digits": 8, "cifar10": 32, "cifar100": 32}
_SMALL_SOURCES_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` is a whole recipe as plain data, defaults filled in; returns the settings of the small run."""
    algorithms = dict(settings["algorithms"])
    stages = (algorithms.get("progressive_resizing") or {}).get("stages") or []
    epochs = max(2, len(stages))
    shared = _batch_sizes(settings, stages)
    ratio = _SMALLEST_BATCH / min(shared)
    largest = max(_smaller(size, ratio) for size in shared)
    pixels = _pixels(settings, stages)
    if stages:
        algorithms["progressive_resizing"] = {
            **algorithms["progressive_resizing"],
            "stages": [_shrink_stage(stage, ratio, pixels) for stage in stages],
        }
    if algorithms.get("fixres"):
        algorithms["fixres"] = _shrink_fixres(algorithms["fixres"], ratio, pixels)
    device = "cpu" if settings["device"] == "auto" else settings["device"]
    return {
        **settings,
        "smoke": False,  # already applied: the result describes the small run itself
        "run_name": f"{settings['run_name']}_smoke",
        "model": {**settings["model"], **({"weights": None} if "weights" in settings["model"] else {})},
        "data": _shrink_data(
            settings,
            ratio=ratio,
            pixels=pixels,
            num_samples=_world_size() * max(2 * _SMALLEST_BATCH, largest),
        ),
        "algorithms": algorithms,
        "optimizer": _shrink_optimizer(settings["optimizer"], ratio),
        "schedule": _shrink_schedule(settings["schedule"], epochs / settings["duration"]["epochs"]),
        "duration": {"epochs": epochs},
        "precision": "fp32" if device == "cpu" else settings["precision"],
        "device": device,
        "parallelism": {**settings["parallelism"], **({"strategy": "none"} if _world_size() == 1 else {})},
        "logging": {**settings["logging"], "profile": None},
        "checkpoints": {"every_epochs": epochs, "keep_best": settings["data"]["test"] is not None},
    }


def _batch_sizes(settings: dict[str, Any], stages: list[dict[str, Any]]) -> list[int]:
    """Batch sizes of the recipe and of every stage: per device, or global where the recipe gives those."""
    sizes = [_batch_size(settings["data"]["train"])]
    return sizes + [_batch_size(stage) or sizes[0] for stage in stages]


def _batch_size(of: dict[str, Any]) -> int:
    return of["per_device_batch_size"] or of["global_batch_size"]


def _smaller(batch_size: int, ratio: float) -> int:
    return max(_SMALLEST_BATCH, round(batch_size * ratio))


def _pixels(settings: dict[str, Any], stages: list[dict[str, Any]]) -> Callable[[int], int]:
    """Scales an image size."""
    data = settings["data"]
    largest = max(part["image_size"] for part in (data["train"], data["eval"], *stages))
    share = _LARGEST_IMAGE_PX / largest
    return lambda size: size if share >= 1 else max(1, round(size * share / _MULTIPLE_PX)) * _MULTIPLE_PX


def _shrink_stage(stage: dict[str, Any], ratio: float, pixels: Callable[[int], int]) -> dict[str, Any]:
    size = _batch_size(stage)
    return {
        "epochs": 1,
        "image_size": pixels(stage["image_size"]),
        "per_device_batch_size": _smaller(size, ratio) if size else None,
    }


def _shrink_fixres(fixres: dict[str, Any], ratio: float, pixels: Callable[[int], int]) -> dict[str, Any]:
    size, rate = fixres["image_size"], fixres["learning_rate"]
    return {
        **fixres,
        "epochs": 1,
        "image_size": None if size is None else pixels(size),
        "learning_rate": None if rate is None else rate * ratio,
    }


def _shrink_data(
    settings: dict[str, Any], *, ratio: float, pixels: Callable[[int], int], num_samples: int
) -> dict[str, Any]:
    data, train, evaluation = settings["data"], settings["data"]["train"], settings["data"]["eval"]
    name = data["source"]["name"]
    num_classes = (data["expected"] or data["source"]).get("num_classes") or _SMALL_SOURCES_CLASSES.get(name, 10)
    if isinstance(settings["loss"], dict) and settings["loss"]["class_weights"] != "auto":
        num_classes = len(settings["loss"]["class_weights"])
    source = {
        "name": "synthetic",
        "num_samples": num_samples,
        "num_classes": num_classes,
        "image_size": _SMALL_SOURCES_PX.get(name) or round(pixels(evaluation["image_size"]) / evaluation["crop_ratio"]),
    }
    small = {"path": None, "num_workers": 1}
    per_device = _smaller(_batch_size(train), ratio)
    return {
        **data,
        "source": source,
        "expected": None,
        "test": data["test"] and {"path": None},
        "train": {
            **train,
            **small,
            "sizes": None,
            "image_size": pixels(train["image_size"]),
            "global_batch_size": None,
            "per_device_batch_size": per_device,
            "per_device_microbatch_size": None,
        },
        "eval": {
            **evaluation,
            **small,
            "image_size": pixels(evaluation["image_size"]),
            "per_device_batch_size": _SMALLEST_BATCH,
            "every_epochs": 1,
        },
    }


def _shrink_optimizer(optimizer: dict[str, Any], ratio: float) -> dict[str, Any]:
    rate = optimizer["learning_rate"]  # a rate given per 256 images shrinks by itself
    others = {"others": _shrink_optimizer(optimizer["others"], ratio)} if optimizer.get("others") else {}
    return {**optimizer, "learning_rate": None if rate is None else rate * ratio, **others}


def _shrink_schedule(schedule: dict[str, Any], share: float) -> dict[str, Any]:
    return {
        **schedule,
        "warmup_epochs": schedule["warmup_epochs"] * share,
        "milestones_epochs": [epoch * share for epoch in schedule["milestones_epochs"]],
        "points": [[epoch * share, factor] for epoch, factor in schedule["points"]],
    }


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # as every launcher sets it
