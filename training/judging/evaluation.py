"""The whole judgement of a trained network on one split: figures as JSON, tables as CSV, pictures as PNG."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import Loader, build_loader
from data.whole_files import replace_file
from training.judging import pictures
from training.judging.metrics import (
    accuracy,
    calibration_error,
    class_figures,
    confusion_matrix,
    consistency,
    probabilities,
    reliability,
)  # fmt: skip
from training.judging.predicting import Mistake, Network, Predictions, predict, predict_shifted, with_margin
from training.results.summary import write_json
from training.trained import Trained

_MISTAKES = 25  # shown in the picture
_WORST_CLASSES = 20
_SHIFTS = 5
_MOST_SHIFTED = 2_000  # images: the share of pairs is then known to within about 1 %
_LARGEST_SHIFT = 1 / 14  # of the image size; 16 px at 224 px, as in Zhang 2019


@dataclass(frozen=True)
class Question:
    """What to judge.

    split: of the recipe's data: eval, test or train.
    data: a .beton file, or a folder with a folder for each class, instead of the recipe's data.
    image_sizes: further sizes to measure accuracy at, in px.
    flip: average the logits of an image and its mirror image.
    shifts: measure the consistency under shifts, which takes five more passes.
    """

    split: str = "eval"
    data: Path | None = None
    image_sizes: tuple[int, ...] = ()
    flip: bool = False
    shifts: bool = True
    cache_dir: str | None = None
    num_workers: int | None = None
    per_device_batch_size: int | None = None


def evaluate(
    trained: Trained, question: Question, *, device: str, rank: int = 0, world_size: int = 1, say: Callable[[str], None]
) -> tuple[dict[str, Any], Predictions]:
    """Measure everything; returns what evaluation.json holds, and the predictions. Every rank must call this."""
    started = time.monotonic()
    network = Network(trained, device=device, flip=question.flip)
    size, loss = trained.preprocessing.image_size, trained.recipe.loss
    loader = _loader(trained, question, rank=rank, world_size=world_size, say=say)
    found = predict(network, loader, what=f"{size} px", keep_mistakes=_MISTAKES)
    sizes = {size: accuracy(found.logits, found.labels, loss=loss)}
    for other in sorted({*question.image_sizes} - {size}):
        loader.set_image_size(other)
        with _naming_the_size(other, trained):
            seen = predict(network, loader, what=f"{other} px")
        sizes[other] = accuracy(seen.logits, seen.labels, loss=loss)
    believed = probabilities(found.logits, loss=loss)
    confusion = confusion_matrix(believed.argmax(dim=1), found.labels, num_classes=len(trained.class_names))
    shifted = None
    every = -(-len(found.labels) // _MOST_SHIFTED)
    if question.shifts:
        shifted = _shift_consistency(network, trained, question, every=every, rank=rank, world_size=world_size, say=say)
    return {
        "run_name": trained.recipe.run_name,
        "checkpoint": trained.checkpoint.name,
        "averaged": trained.averaged,
        "split": question.split if question.data is None else str(question.data),
        "images": len(found.labels),
        "classes": len(trained.class_names),
        "image_size": size,
        "flip": question.flip,
        **asdict(sizes[size]),
        "calibration_error": calibration_error(believed, found.labels),
        "reliability": reliability(believed, found.labels),
        "shift_consistency": shifted,
        "shifted_every": every,
        "sizes": [{"image_size": one, **asdict(sizes[one])} for one in sorted(sizes)],
        "worst_classes": _worst(confusion, trained.class_names),
        "confused": _confused(confusion, trained.class_names),
        "mistakes": [_plain(one, trained.class_names) for one in found.mistakes],
        "confusion": confusion.tolist() if len(confusion) <= 100 else None,
        "seconds": time.monotonic() - started,
    }, found


def write_evaluation(measured: dict[str, Any], found: Predictions, trained: Trained, folder: Path) -> None:
    """Write evaluation.json, classes.csv, confusion.csv and the pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = trained.class_names
    confusion = confusion_matrix(found.logits.argmax(dim=1), found.labels, num_classes=len(names))
    classes = [{"class": name, **one} for name, one in zip(names, class_figures(confusion), strict=True)]
    for one in classes:
        one["mistaken_for"] = None if one["mistaken_for"] is None else names[one["mistaken_for"]]
    _write_csv([list(classes[0]), *(list(one.values()) for one in classes)], folder / "classes.csv")
    _write_csv([["true \\ predicted", *names], *([n, *row] for n, row in zip(names, confusion, strict=True))],
               folder / "confusion.csv")  # fmt: skip
    pictures.draw_confusion(confusion, names, measured["confused"], folder / "confusion.png")
    pictures.draw_calibration(measured["reliability"], measured["calibration_error"], folder / "calibration.png")
    pictures.draw_mistakes(found.mistakes, names, folder / "mistakes.png")
    pictures.draw_sizes(measured["sizes"], trained.preprocessing.image_size, folder / "sizes.png")
    write_json(measured, folder / "evaluation.json")  # last: a folder that has it is whole


def _loader(
    trained: Trained, question: Question, *, rank: int, world_size: int, say: Callable[[str], None], **changed: Any
) -> Loader:
    recipe, seen = trained.recipe, trained.preprocessing
    source = dict(recipe.data.source)
    name, path = (
        source.pop("name"),
        {"eval": recipe.data.eval.path, "train": recipe.data.train.path}.get(question.split),
    )
    if question.split == "test" and recipe.data.test is not None:
        path = recipe.data.test.path
    if question.data is not None:
        path = question.data if question.data.is_file() else None
        name, source = "folder", {"path": str(question.data), "split": None}
    evaluation = recipe.data.eval
    ours = question.split == "train" and question.data is None and path is None and evaluation.loader != "torch"
    settings = {
        "per_device_batch_size": question.per_device_batch_size or evaluation.per_device_batch_size,
        "image_size": seen.image_size,
        "num_workers": evaluation.num_workers if question.num_workers is None else question.num_workers,
        "eval_crop_ratio": seen.crop_ratio,
        "train": False,
        "sizes": recipe.data.train.sizes if ours else None,  # the files that training has written
        **changed,
    }
    return build_loader(
        source=name, source_settings=source, split=question.split, path=path, class_names=trained.class_names,
        loader="auto" if path is not None else evaluation.loader, cache_dir=question.cache_dir or recipe.data.cache_dir,
        seed=recipe.seed, rank=rank, world_size=world_size, log=say, **settings,
    )  # fmt: skip


def _shift_consistency(network: Network, trained: Trained, question: Question, *, every: int, **place: Any) -> float:
    seen = trained.preprocessing
    margin = max(1, round(seen.image_size * _LARGEST_SHIFT))
    size = seen.image_size + 2 * margin
    ratio = seen.crop_ratio * size / seen.image_size
    if ratio <= 1:  # the image has more pixels around its test crop
        loader = _loader(trained, question, image_size=size, eval_crop_ratio=ratio, **place)
    else:
        loader = with_margin(_loader(trained, question, **place), margin)
    classes = predict_shifted(
        network, loader, image_size=seen.image_size, shifts=_SHIFTS, seed=trained.recipe.seed, every=every
    )
    return consistency(classes)


@contextmanager
def _naming_the_size(image_size: int, trained: Trained) -> Iterator[None]:
    """Says which size it was that the network does not take."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        said = f"{trained.recipe.model['name']} does not take images of {image_size} px; leave that size out"
        raise ValueError(f"{said} ({' '.join(str(error).split())[:120]})") from None


def _worst(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes with the lowest recall."""
    found = [
        {
            "class": names[index],
            **one,
            "mistaken_for": None if one["mistaken_for"] is None else names[one["mistaken_for"]],
        }
        for index, one in enumerate(class_figures(confusion))
        if one["images"]
    ]
    return sorted(found, key=lambda one: one["recall"])[:_WORST_CLASSES]


def _confused(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are mistaken most often."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_WORST_CLASSES]
    pairs = [divmod(int(place), len(names)) for place in order]
    return [
        {"class": names[true], "predicted": names[predicted], "images": int(wrong[true, predicted])}
        for true, predicted in pairs
        if wrong[true, predicted]
    ]


def _plain(mistake: Mistake, names: Sequence[str]) -> dict[str, Any]:
    return {
        "index": mistake.index,
        "label": names[mistake.label],
        "predicted": names[mistake.predicted],
        "confidence": mistake.confidence,
    }


def _write_csv(rows: Sequence[Sequence[Any]], path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))
