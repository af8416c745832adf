"""From a checked recipe to the objects that train: data, network, algorithms, optimizer, Trainer."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import reproducibility
from torch import nn

from algos import LearningRate, SpeedUp, arrange
from algos.framework.registry import maker as algorithm_maker
from data import Normalizer, build_loader, build_source
from models import registry as models
from models.classifier import ImageClassifier
from models.sync_batchnorm import synchronize_batchnorm
from training.optimizers import build_optimizer, peak_learning_rate
from training.recipe import Recipe, RecipeError

log = logging.getLogger(__name__)

_TORCH_DEVICES = {"cpu": "cpu", "gpu": "cuda", "mps": "mps"}


@dataclass(frozen=True)
class DataFacts:
    """What the recipe's data is like, known without reading an image."""

    num_train: int
    num_eval: int
    class_names: tuple[str, ...]
    present: bool = True  # False: as the recipe expects them

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def data_facts(recipe: Recipe) -> DataFacts:
    """Look at the recipe's sources. Raises RecipeError when they are not there or do not match."""
    splits = ("train", "eval", *(["test"] if recipe.data.test else []))
    with _users_mistake("data.source"):
        train, evaluation, *test = (build_source(**_source(recipe), split=split) for split in splits)
    for what, other in zip(("evaluate", "test"), (evaluation, *test), strict=False):
        if train.class_names != other.class_names:
            raise RecipeError(
                "data.source",
                f"the classes to train on ({len(train.class_names)}) and to {what} on ({len(other.class_names)}) "
                "differ; all splits need the same class folders",
            )
    return DataFacts(num_train=len(train), num_eval=len(evaluation), class_names=train.class_names)


def planned_facts(recipe: Recipe) -> DataFacts:
    """As `data_facts`, or where the data are not here what the recipe expects of them. Fetches nothing.

    Raises RecipeError when the data are not here and the recipe expects nothing.
    """
    source, expected = _source(recipe), recipe.data.expected
    if "download" in source:
        source["download"] = False
    try:
        return data_facts(replace(recipe, data=replace(recipe.data, source=source)))
    except RecipeError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        if expected is None:
            told = "data.expected={num_classes: 1000, num_train: 1281167, num_eval: 50000}"
            raise RecipeError(
                error.path, f"{error.__cause__}; to plan without the data, tell of them: {told}"
            ) from None
    names = tuple(f"class {index}" for index in range(expected.num_classes))
    return DataFacts(num_train=expected.num_train, num_eval=expected.num_eval, class_names=names, present=False)


def resolve_device(recipe: Recipe) -> str:
    """cpu, gpu or mps: what `device: auto` comes to here. Raises RecipeError when the one asked for is not there."""
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
    if device == "cpu" and recipe.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RecipeError("compile", "is true, which takes a C++ compiler on a CPU; install g++, or set compile=false")
    return device


def per_device_batch_size(recipe: Recipe, *, world_size: int) -> int:
    """Images a device in a training batch. Raises RecipeError when the global batch does not divide over the ranks."""
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


def initial_learning_rate(recipe: Recipe, *, world_size: int) -> float:
    """The learning rate at the schedule's peak, before any algorithm has its say."""
    global_batch_size = per_device_batch_size(recipe, world_size=world_size) * world_size
    return peak_learning_rate(recipe.optimizer, global_batch_size=global_batch_size)


def build_network(recipe: Recipe, facts: DataFacts) -> nn.Module:
    """The recipe's network, initialized from its seed alike on every rank."""
    reproducibility.seed_all(recipe.seed)
    settings = {key: value for key, value in recipe.model.items() if key != "name"}
    with _users_mistake("model"):
        return models.find(recipe.model["name"])(num_classes=facts.num_classes, **settings)


def arrange_algorithms(recipe: Recipe) -> dict[str, SpeedUp]:
    """The recipe's algorithms, and the learning rate's schedule, in the order in which they act."""
    made: dict[str, SpeedUp] = {"learning_rate": LearningRate(**recipe.schedule)}
    for name, settings in recipe.algorithms.items():
        with _users_mistake(f"algorithms.{name}"):
            made[name] = algorithm_maker(name)(**settings)
    if recipe.optimizer["clip_norm"] is not None:
        _add_clipping(made, recipe.optimizer["clip_norm"])
    with _users_mistake("algorithms"):
        order = arrange({name: algorithm.contract for name, algorithm in made.items()})
    return {name: made[name] for name in order}


def _add_clipping(algorithms: dict[str, SpeedUp], clip_norm: float) -> None:
    name = "composer.gradient_clipping"
    if name in algorithms:
        raise RecipeError(
            "optimizer.clip_norm", f"is {clip_norm:g} beside algorithms.{name}, which does the same; drop one"
        )
    algorithms[name] = algorithm_maker(name)(clipping_type="norm", clipping_threshold=clip_norm)


def build_loaders(recipe: Recipe, *, rank: int, world_size: int, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The training and the evaluation loader of this rank; converts the data at first use."""
    data, common = recipe.data, _loader_settings(recipe, rank=rank, world_size=world_size, say=say)
    with _users_mistake("data.train"):
        train = build_loader(
            split="train",
            loader=data.train.loader,
            path=data.train.path,
            per_device_batch_size=per_device_batch_size(recipe, world_size=world_size),
            image_size=data.train.image_size,
            num_workers=data.train.num_workers,
            drop_last=data.train.drop_last,
            crop_scale=data.train.crop_scale,
            crop_aspect=data.train.crop_aspect_ratio,
            crop_ratio=data.train.crop_ratio,
            flip_probability=data.train.flip_probability,
            augmentations=data.train.augmentations,
            eval_crop_ratio=data.eval.crop_ratio,
            **common,
        )
    with _users_mistake("data.eval"):
        evaluation = build_loader(split="eval", path=data.eval.path, **_judging(recipe), **common)
    return train, evaluation


def build_test_loader(recipe: Recipe, *, rank: int, world_size: int, say: Callable[[str], None]) -> Any:
    """The loader of this rank for the test split, None where the recipe names none; converts the data at first use."""
    if recipe.data.test is None:
        return None
    common = _loader_settings(recipe, rank=rank, world_size=world_size, say=say)
    with _users_mistake("data.test"):
        return build_loader(split="test", path=recipe.data.test.path, **_judging(recipe), **common)


def build_model(recipe: Recipe, facts: DataFacts, *, world_size: int) -> ImageClassifier:
    """The recipe's network as what an engine trains, before any algorithm has changed it."""
    network = build_network(recipe, facts)
    if recipe.parallelism.sync_batchnorm and world_size > 1:
        network = synchronize_batchnorm(network, device_type=_TORCH_DEVICES[resolve_device(recipe)])
    return ImageClassifier(
        network,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        loss=recipe.loss,  # pyright: ignore[reportArgumentType]
    )


def build_optimizer_of(model: ImageClassifier, recipe: Recipe, *, world_size: int) -> torch.optim.Optimizer:
    """The recipe's optimizer over the weights of `model`, at the learning rate that the schedule begins from."""
    with _users_mistake("optimizer"):
        rate = initial_learning_rate(recipe, world_size=world_size)
        return build_optimizer(model.module, recipe.optimizer, learning_rate=rate)


def build_data_specs(recipe: Recipe, loaders: tuple[Any, Any]) -> tuple[DataSpec, DataSpec]:
    """The training and the evaluation loader, with what is done to their batches on the device."""
    train, evaluation = loaders
    normalize = Normalizer(train.mean, train.std)  # of what the network was trained on, for what it is judged on too
    torch_device = _TORCH_DEVICES[resolve_device(recipe)]
    return _data_spec(train, normalize, torch_device), _data_spec(evaluation, normalize, torch_device)


def _source(recipe: Recipe) -> dict[str, Any]:
    return dict(recipe.data.source)


def _loader_settings(recipe: Recipe, *, rank: int, world_size: int, say: Callable[[str], None]) -> dict[str, Any]:
    source = _source(recipe)
    return {
        "source": source.pop("name"),
        "source_settings": source,
        "cache_dir": recipe.data.cache_dir,
        "seed": recipe.seed,
        "rank": rank,
        "world_size": world_size,
        "device": _TORCH_DEVICES[resolve_device(recipe)],
        "log": say,
    }


def _judging(recipe: Recipe) -> dict[str, Any]:
    """What evaluation and test have in common."""
    evaluation = recipe.data.eval
    return {
        "loader": evaluation.loader,
        "per_device_batch_size": evaluation.per_device_batch_size,
        "image_size": evaluation.image_size,
        "num_workers": evaluation.num_workers,
        "eval_crop_ratio": evaluation.crop_ratio,
    }


def _data_spec(loader: Any, normalize: Normalizer, torch_device: str) -> DataSpec:

    def to_device_and_normalize(batch: Any) -> Any:
        # uint8 crosses the bus, a quarter of what floats would be.
        return normalize(tuple(part.to(torch_device, non_blocking=True) for part in batch))

    return DataSpec(
        dataloader=loader,
        batch_transforms=to_device_and_normalize,
        get_num_samples_in_batch=lambda batch: len(batch[1]),
        split_batch=_split_batch,
    )


def _split_batch(batch: tuple[torch.Tensor, ...], microbatch_size: int | float) -> list[tuple[torch.Tensor, ...]]:
    # Composer's own warns about every batch that is smaller than its microbatch, as an epoch's last one may be.
    return list(zip(*(part.split(int(microbatch_size)) for part in batch), strict=True))


@contextlib.contextmanager
def _users_mistake(path: str) -> Iterator[None]:
    """Turn the errors that the layers below raise for users' mistakes into one that names the recipe's key."""
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise RecipeError(path, str(error)) from error
