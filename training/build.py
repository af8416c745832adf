"""Builds a plan's loaders, network, algorithms and optimizer. The plan makes every decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from composer.core import DataSpec
from torch import nn

from algos import LearningRate, SpeedUp
from algos.framework.registry import maker
from data import Normalizer, build_loader
from models.classifier import ImageClassifier
from models.sync_batchnorm import synchronize_batchnorm
from training.arrangement import SCHEDULE
from training.network import make_network
from training.optimizers import build_optimizer
from training.planning import Plan, teacher_of
from training.recipe import users_mistake
from training.teachers import for_images_of


def build_network(plan: Plan) -> nn.Module:
    """The plan's network before any algorithm changes it, initialized identically on every rank."""
    return make_network(plan.recipe, num_classes=plan.facts.num_classes)


def build_algorithms(plan: Plan, *, loader: Any = None) -> dict[str, SpeedUp]:
    """New instances of the plan's algorithms, in order. They keep state, so every Trainer needs its own.

    loader: of the training images; a teacher has to know how they are normalized. Only plans without one need none.
    """
    made = {}
    for planned in plan.algorithms:
        with users_mistake(f"algorithms.{planned.name}"):
            factory = LearningRate if planned.name == SCHEDULE else maker(planned.name)
            settings = dict(planned.settings)
            if planned.name == "distillation":
                settings["teacher"] = _build_teacher(plan, loader)
            made[planned.name] = factory(**settings)
    return made


def _build_teacher(plan: Plan, loader: Any) -> nn.Module:
    teacher = teacher_of(plan.recipe)
    assert teacher is not None
    return for_images_of(teacher.load(), teacher, mean=loader.mean, std=loader.std)


def build_loaders(plan: Plan, *, rank: int, say: Callable[[str], None]) -> tuple[Any, Any]:
    """This rank's training and evaluation loaders; converts the data at first use."""
    data, common = plan.recipe.data, _loader_settings(plan, rank=rank, say=say)
    with users_mistake("data.train"):
        train = build_loader(
            split="train",
            loader=data.train.loader,
            path=data.train.path,
            sizes=data.train.sizes,
            tier_headroom=data.train.tier_headroom,
            batches_ahead=data.train.batches_ahead,
            per_device_batch_size=plan.per_device_batch_size,
            image_size=data.train.image_size,
            num_workers=data.train.num_workers,
            drop_last=data.train.drop_last,
            crop_scale=data.train.crop_scale,
            crop_aspect=data.train.crop_aspect_ratio,
            crop_ratio=data.train.crop_ratio,
            flip=data.train.flip,
            flip_probability=data.train.flip_probability,
            augmentations=data.train.augmentations,
            sampler=data.train.sampler,
            eval_crop_ratio=data.eval.crop_ratio,
            **common,
        )
    with users_mistake("data.eval"):
        evaluation = build_loader(split="eval", path=data.eval.path, **_judging(plan), **common)
    return train, evaluation


def build_test_loader(plan: Plan, *, rank: int, say: Callable[[str], None]) -> Any:
    """This rank's loader for the test split, None if the recipe has none; converts the data at first use."""
    if plan.recipe.data.test is None:
        return None
    common = _loader_settings(plan, rank=rank, say=say)
    with users_mistake("data.test"):
        return build_loader(split="test", path=plan.recipe.data.test.path, **_judging(plan), **common)


def build_model(plan: Plan) -> ImageClassifier:
    """The plan's network in the wrapper that engines train, before any algorithm changes it."""
    network = build_network(plan)
    if plan.recipe.parallelism.sync_batchnorm and plan.place.world_size > 1:
        network = synchronize_batchnorm(network, device_type=plan.place.torch_device)
    return ImageClassifier(
        network,
        num_classes=plan.facts.num_classes,
        class_names=plan.facts.class_names,
        loss=plan.recipe.loss,  # pyright: ignore[reportArgumentType]
        class_weights=plan.class_weights,
    )


def build_optimizer_of(model: ImageClassifier, plan: Plan) -> torch.optim.Optimizer:
    """The recipe's optimizer over the weights of `model`, at the schedule's peak learning rate."""
    with users_mistake("optimizer"):
        return build_optimizer(
            model.module, plan.recipe.optimizer, learning_rate=plan.peak_learning_rate, matrices=plan.matrices
        )


def build_data_specs(plan: Plan, loaders: tuple[Any, Any]) -> tuple[DataSpec, DataSpec]:
    """The training and evaluation loaders, with the transforms of their batches on the device."""
    train, evaluation = loaders
    dtype = getattr(torch, plan.pixel_type)
    normalize = Normalizer(train.mean, train.std, dtype=dtype)  # evaluation uses the training set's mean and std too
    torch_device = plan.place.torch_device
    return _data_spec(train, normalize, torch_device), _data_spec(evaluation, normalize, torch_device)


def _loader_settings(plan: Plan, *, rank: int, say: Callable[[str], None]) -> dict[str, Any]:
    source = dict(plan.recipe.data.source)
    return {
        "source": source.pop("name"),
        "source_settings": source,
        "cache_dir": plan.recipe.data.cache_dir,
        "seed": plan.recipe.seed,
        "rank": rank,
        "world_size": plan.place.world_size,
        "device": plan.place.torch_device,
        "log": say,
    }


def _judging(plan: Plan) -> dict[str, Any]:
    """Settings that the evaluation and test loaders share."""
    evaluation = plan.recipe.data.eval
    return {
        "loader": evaluation.loader,
        "per_device_batch_size": evaluation.per_device_batch_size,
        "image_size": evaluation.image_size,
        "num_workers": evaluation.num_workers,
        "eval_crop_ratio": evaluation.crop_ratio,
    }


def _data_spec(loader: Any, normalize: Normalizer, torch_device: str) -> DataSpec:

    def to_device_and_normalize(batch: Any) -> Any:
        # Transfer uint8, a quarter of the bytes of float32.
        return normalize(tuple(part.to(torch_device, non_blocking=True) for part in batch))

    return DataSpec(
        dataloader=loader,
        batch_transforms=to_device_and_normalize,
        get_num_samples_in_batch=lambda batch: len(batch[1]),
        split_batch=_split_batch,
    )


def _split_batch(batch: tuple[torch.Tensor, ...], microbatch_size: int | float) -> list[tuple[torch.Tensor, ...]]:
    # Composer's own split warns about every batch smaller than its microbatch, as an epoch's last one may be.
    return list(zip(*(part.split(int(microbatch_size)) for part in batch), strict=True))
