"""What a run has made: the network with its best weights, and all that a picture needs on its way into it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import normalize, prepare_image
from training.arrangement import network_as_trained, without_weights
from training.checkpoints.weights import find_checkpoint, read_network_weights
from training.optimizers import SCHEDULE_FREE
from training.recipe import Recipe, RecipeError, load_recipe
from training.results.summary import write_json

log = logging.getLogger(__name__)

_MOST_SIDE_PX = 8192  # of the square that a network sees
MODEL_FILE = "model.json"  # beside a run's recipe.yaml


@dataclass(frozen=True)
class Preprocessing:
    """From an image of any size to what the network takes.

    image_size: of the square that the network sees, in px.
    crop_ratio: side of the centered square that is cut out, as a share of the image's shorter side.
    mean, std: per channel, on the 0..255 scale.
    """

    image_size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """An RGB image, uint8 [H, W, 3], as uint8 [3, image_size, image_size]: what the evaluation's loader gives."""
        return prepare_image(image, image_size=self.image_size, crop_ratio=self.crop_ratio)

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, S, S] -> float32, on the same device."""
        return normalize(images, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class Trained:
    """The network of a run, ready for images.

    network: in evaluation mode on the CPU, with the weights that the run's evaluations used.
    averaged: whether these are the averages that EMA or a schedule-free optimizer kept.
    """

    network: nn.Module
    recipe: Recipe
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    checkpoint: Path
    averaged: bool

    @property
    def averaged_by(self) -> str:
        """What kept the averages, in a sentence's words."""
        return "the optimizer" if self.recipe.optimizer["name"] in SCHEDULE_FREE else "EMA"

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.checkpoint.parent.parent


def load_trained(source: str | os.PathLike[str], *, trust_checkpoint: bool = False) -> Trained:
    """Load what a run has trained.

    source: a run's folder, for its best checkpoint (the newest if none is called best), or one of its checkpoints.
    trust_checkpoint: read it with Python's unrestricted unpickler, which runs what the file says.

    Raises ValueError if there is no such run or checkpoint, or it does not fit its recipe, and RecipeError for a
    checkpoint that is damaged or names code.
    """
    checkpoint = _checkpoint_of(source)
    recipe, class_names, preprocessing = describe_trained(source)
    network = _network_to_fill(recipe, num_classes=len(class_names))
    weights, averaged = read_network_weights(checkpoint, trust=trust_checkpoint)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        described = checkpoint.parent.parent / "recipe.yaml"
        raise ValueError(f"{checkpoint} does not hold the network of {described}: {reason}") from None
    return Trained(network.eval(), recipe, class_names, preprocessing, checkpoint, averaged)


def describe_trained(source: str | os.PathLike[str]) -> tuple[Recipe, tuple[str, ...], Preprocessing]:
    """What `load_trained` would load, without its weights: the run's recipe, class names and preprocessing."""
    run_dir = _checkpoint_of(source).parent.parent
    recipe, about = _recipe_of(run_dir), _read_about(run_dir)
    return recipe, tuple(about["class_names"]), about["preprocessing"]


def write_about(run_dir: Path, *, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
    """Write model.json, which makes a run's checkpoints usable without its data."""
    write_json({"class_names": list(class_names), **asdict(preprocessing)}, run_dir / MODEL_FILE)


def _checkpoint_of(source: str | os.PathLike[str]) -> Path:
    return find_checkpoint(source, names=("best.pt", "latest.pt"))


def _network_to_fill(recipe: Recipe, *, num_classes: int) -> nn.Module:
    """The network without its weights; a ViT with those it started from, which decide its layer norms' epsilon."""
    if recipe.model["name"].startswith("vit_") and recipe.model.get("weights") is not None:
        try:
            return network_as_trained(recipe, num_classes=num_classes)
        except RecipeError as error:
            log.warning("the layer norms' epsilon is torchvision's, since its source is not there: %s", error)
    return network_as_trained(without_weights(recipe), num_classes=num_classes)


def _recipe_of(run_dir: Path) -> Recipe:
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} has no recipe.yaml, so it is no run's folder; give results/RUN, or a checkpoint within it"
        )
    try:
        return load_recipe(path, ["checkpoints.remote=null"])  # what it needs to upload may not be here
    except RecipeError as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from None


def _read_about(run_dir: Path) -> dict[str, Any]:
    path = run_dir / MODEL_FILE
    try:
        read = json.loads(path.read_text())
        names = [str(name) for name in read.pop("class_names")]
        made = Preprocessing(**{**read, "mean": tuple(read["mean"]), "std": tuple(read["std"])})
        _check_ranges(names, made)
    except FileNotFoundError:
        raise ValueError(
            f"{run_dir} has no {MODEL_FILE}, which training writes before its first step; continue that run with "
            "load=latest to have it written"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); continue that run with load=latest to have it written"
        ) from None
    return {"class_names": names, "preprocessing": made}


def _check_ranges(class_names: Sequence[str], made: Preprocessing) -> None:
    """Raises ValueError for what training never writes, such as images too large for any memory."""
    if not class_names:
        raise ValueError("class_names is empty")
    if not (isinstance(made.image_size, int) and 1 <= made.image_size <= _MOST_SIDE_PX):
        raise ValueError(f"image_size must lie in [1, {_MOST_SIDE_PX}]")
    if not 0 < made.crop_ratio <= 1:
        raise ValueError("crop_ratio must lie in (0, 1]")
    if not (len(made.mean) == len(made.std) == 3 and all(0 <= mean <= 255 for mean in made.mean) and min(made.std) > 0):
        raise ValueError("mean must be three numbers in [0, 255], and std three above 0")
