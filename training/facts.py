"""Facts about a recipe's data, found without reading an image: number of images, classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data import build_source
from training.recipe import Recipe, RecipeError, users_mistake


@dataclass(frozen=True)
class DataFacts:
    """Facts about the recipe's data."""

    num_train: int
    num_eval: int
    class_names: tuple[str, ...]
    present: bool = True  # False: taken from data.expected

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
    return DataFacts(num_train=len(train), num_eval=len(evaluation), class_names=train.class_names)


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
