"""Every check of a recipe that needs neither data nor network, cheap ones first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from training.recipe.compiling import parse_compile
from training.recipe.keys import RecipeKeys, TrainData
from training.recipe.remote import check_remote
from training.recipe.schema import RecipeError, parse, schema_of
from training.recipe.sections import (
    check_schedule_free,
    parse_algorithms,
    parse_loss,
    parse_model,
    parse_optimizer,
    parse_source,
    try_composers,
    try_settings,
)
from training.recipe.watching import parse_profile, parse_trackers

_NAME = re.compile(r"(?![. ])[\w\-.+=,@() {}]{1,128}")  # a hidden file beside the folder has its name too


def check(raw: dict[str, Any]) -> dict[str, Any]:
    """Every section checked and filled with its defaults. Checks that cost an import come last."""
    from algos import LearningRate
    from data.beton.format import check_sizes
    from data.decoding.crops import check_flip
    from data.loading.ahead import Ahead
    from data.loading.augment import build_augmentations

    top = parse(RecipeKeys, raw, path="")
    top["data"]["source"] = parse_source(top["data"]["source"])
    top["loss"] = parse_loss(top["loss"])
    top["algorithms"] = parse_algorithms(top["algorithms"])
    top["logging"]["trackers"] = parse_trackers(top["logging"]["trackers"])
    top["logging"]["profile"] = parse_profile(top["logging"]["profile"])
    top["compile"] = parse_compile(top["compile"])
    top["schedule"] = parse(schema_of(LearningRate), top["schedule"], path="schedule")
    try_settings(LearningRate.for_planning, top["schedule"], path="schedule")
    try_settings(
        build_augmentations, {"entries": top["data"]["train"]["augmentations"]}, path="data.train.augmentations"
    )
    flip = {key: top["data"]["train"][key] for key in ("flip", "flip_probability")}
    try_settings(check_flip, flip, path="data.train.flip")
    if top["data"]["train"]["sizes"] is not None:
        try_settings(check_sizes, {"sizes": top["data"]["train"]["sizes"]}, path="data.train.sizes")
    try_settings(Ahead, {"setting": top["data"]["train"]["batches_ahead"]}, path="data.train.batches_ahead")
    _check_together(top)
    top["optimizer"] = parse_optimizer(top["optimizer"])
    check_schedule_free(top)
    top["model"] = parse_model(top["model"])
    try_composers(top["algorithms"])
    return top


def _check_together(top: dict[str, Any]) -> None:
    """Checks that involve several keys."""
    train = top["data"]["train"]
    sizes = [train["global_batch_size"], train["per_device_batch_size"]]
    if sum(size is not None for size in sizes) != 1:
        raise RecipeError(
            "data.train",
            f"global_batch_size is {sizes[0]} and per_device_batch_size is {sizes[1]}; give exactly one of them",
        )
    microbatch_size = train["per_device_microbatch_size"]
    if isinstance(microbatch_size, str) and microbatch_size != "auto":
        raise RecipeError(
            "data.train.per_device_microbatch_size",
            f"is {microbatch_size!r}; it must be a whole number, auto, or null for the whole batch",
        )
    if isinstance(microbatch_size, int) and microbatch_size < 1:
        raise RecipeError("data.train.per_device_microbatch_size", f"is {microbatch_size}; it must be at least 1")
    if top["compile"] and top["parallelism"]["strategy"] == "deepspeed":
        raise RecipeError(
            "compile",
            "is true, and parallelism.strategy is deepspeed, which runs the model as it is; "
            "set compile=false, or parallelism.strategy to ddp or fsdp",
        )
    if not _NAME.fullmatch(top["run_name"]):
        raise RecipeError(
            "run_name",
            f"is {top['run_name']!r}; it names a folder: letters, digits, spaces and - _ . + = , @ ( ), at most 128, "
            "not a dot or a space first",
        )
    if top["run_name_taken"] == "next" and (top["autoresume"] or top["load"] == "latest"):
        key = "autoresume: true" if top["autoresume"] else "load: latest"
        raise RecipeError(
            "run_name_taken", f"is next, and {key} continues the run of exactly this name; set run_name_taken=refuse"
        )
    check_remote(top["checkpoints"]["remote"], run_dir=Path(top["results_dir"]) / top["run_name"])
    if train["crop_ratio"] is not None and _other_crop(train):
        raise RecipeError(
            "data.train.crop_ratio", f"is {train['crop_ratio']} beside {_other_crop(train)}; leave one of them out"
        )
    if train["sampler"] == "balanced" and isinstance(top["loss"], dict) and top["loss"]["class_weights"] == "auto":
        raise RecipeError(
            "loss.class_weights",
            "is auto, and data.train.sampler is balanced: each makes up for rare classes, and both together do so "
            "twice; set loss.class_weights=none, or data.train.sampler=shuffled",
        )
    for key, given in (("path", train["path"]), ("loader", "torch" if train["loader"] == "torch" else None)):
        if train["sizes"] is not None and given is not None:
            raise RecipeError(
                "data.train.sizes",
                f"is {train['sizes']} beside data.train.{key}: {given}, for which no files are written; leave one out",
            )
    if top["data"]["test"] is not None and not top["checkpoints"]["keep_best"]:
        raise RecipeError(
            "data.test", "is judged by best.pt, which checkpoints.keep_best: false does not keep; drop one"
        )


def _other_crop(train: dict[str, Any]) -> str:
    """The crop keys whose values differ from the defaults."""
    default = TrainData()
    names = ("crop_scale", "crop_aspect_ratio")
    return " and ".join(name for name in names if tuple(train[name]) != getattr(default, name))
