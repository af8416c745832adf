"""Facts about a recipe's data, found without reading an image: number of images, classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import Beton, build_source
from data.sources import Source, labels_of
from models.losses import inverse_frequency_weights
from training.recipe import Recipe, RecipeError, users_mistake


@dataclass(frozen=True)
class DataFacts:
    """Facts about the recipe's data.

    class_counts: training images of each class; None where no setting needs them, or the data are not here.
    """

    num_train: int
    num_eval: int
    class_names: tuple[str, ...]
    present: bool = True  # False: taken from data.expected
    class_counts: tuple[int, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def data_facts(recipe: Recipe) -> DataFacts:
    """Inspect the recipe's sources. Raises RecipeError if they are missing or their classes differ."""
    _refuse_absent_files(recipe)
    splits = ("train", "eval", *(["test"] if recipe.data.test else []))
    with users_mistake("data.source"):
        train, evaluation, *test = (build_source(**recipe.data.source, split=split) for split in splits)
    for what, other in zip(("evaluate", "test"), (evaluation, *test), strict=False):
        if train.class_names != other.class_names:
            raise RecipeError(
                "data.source",
                f"the classes to train on ({len(train.class_names)}) and to {what} on ({len(other.class_names)}) "
                "differ; all splits need the same class folders",
            )
    return DataFacts(
        num_train=len(train),
        num_eval=len(evaluation),
        class_names=train.class_names,
        class_counts=_class_counts(recipe, train),
    )


def planned_facts(recipe: Recipe) -> DataFacts:
    """As `data_facts`, or the recipe's data.expected if the data are missing. Downloads nothing.

    Raises RecipeError if the data are missing and the recipe has no data.expected.
    """
    source, expected = dict(recipe.data.source), recipe.data.expected
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


def class_weights(recipe: Recipe, facts: DataFacts) -> tuple[float, ...] | None:
    """The weight of each class in the training loss. None: all weigh the same, or the data are not here to be counted.

    Raises RecipeError if the recipe lists another number of weights than there are classes.
    """
    given = recipe.class_weights
    if given == "auto":
        return None if facts.class_counts is None else tuple(inverse_frequency_weights(facts.class_counts))
    if given is not None and len(given) != facts.num_classes:
        raise RecipeError(
            "loss.class_weights",
            f"has {len(given)} weights, and the data have {facts.num_classes} classes; give one for each, or auto",
        )
    return None if given is None else tuple(given)


def _class_counts(recipe: Recipe, train: Source) -> tuple[int, ...] | None:
    path = recipe.data.train.path
    if recipe.class_weights != "auto" and recipe.data.train.sampler != "balanced":
        return None
    with users_mistake("data.train.path"):
        labels = labels_of(train) if path is None else Beton(path).labels
    counts = np.bincount(labels, minlength=len(train.class_names)).tolist()
    if len(counts) > len(train.class_names):
        raise RecipeError(
            "data.train.path",
            f"is {path}, with labels of {len(counts)} classes, and data.source has {len(train.class_names)}; give data "
            "of the same classes",
        )
    return tuple(counts)


def _refuse_absent_files(recipe: Recipe) -> None:
    """Raise RecipeError for a named file that does not exist, in plans too: missing data do not excuse a wrong path."""
    data = recipe.data
    for split, path in (("train", data.train.path), ("eval", data.eval.path), ("test", data.test and data.test.path)):
        if path is not None and not Path(path).is_file():
            raise RecipeError(
                f"data.{split}.path",
                f"is {path}, and there is no such file; correct it, write it with python -m data.convert, or leave it "
                "out to have it converted from data.source",
            )
