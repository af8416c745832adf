"""Runs to export: one that was trained, and folders as a run leaves them, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from training import session
from training.arrangement import network_as_trained, without_weights
from training.recipe import load_recipe
from training.trained import Preprocessing, write_about

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
PLAIN = ("algorithms=null", "data.train.augmentations=[]")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs on digits with BlurPool, EMA and FixRes, so that averages and test-size layers are what counts."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [
        "duration.epochs=2",
        "schedule.warmup_epochs=1",
        "algorithms.progressive_resizing=null",
        "algorithms.ema={half_life_steps: 10}",
        "algorithms.fixres={epochs: 1, image_size: 20, learning_rate: 0.02}",
        "data.train.image_size=16",
        "logging.progress_bar=false",
        f"results_dir={folder / 'results'}",
        f"data.cache_dir={folder / 'cache'}",
    ]
    recipe = load_recipe(DIGITS, overrides)
    session.train(recipe, say=lambda text: None)
    return recipe.run_dir


@pytest.fixture
def made_run(tmp_path: Path) -> Any:
    """Makes a run's folder with random weights: made_run("resnet20", "model=resnet20", image_size=20)."""

    def make(name: str, *overrides: str, image_size: int = 20, crop_ratio: float = 1.0) -> Path:
        given = [f"run_name={name}", f"results_dir={tmp_path}", f"data.eval.image_size={image_size}", *overrides]
        by_key = {override.partition("=")[0]: override for override in (*PLAIN, *given)}
        recipe = load_recipe(DIGITS, list(by_key.values()))
        network = network_as_trained(without_weights(recipe), num_classes=10)
        _make_it_matter(network)
        (recipe.run_dir / "checkpoints").mkdir(parents=True)
        (recipe.run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.settings))
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state": {"model": state}}, recipe.run_dir / "checkpoints" / "best.pt")
        preprocessing = Preprocessing(image_size, crop_ratio, (70.0, 80.0, 90.0), (60.0, 50.0, 40.0))
        names = [f"digit {index}" for index in range(10)]
        write_about(recipe.run_dir, class_names=names, preprocessing=preprocessing)
        return recipe.run_dir

    return make


def _make_it_matter(network: nn.Module) -> None:
    """Random statistics and biases: zeros and ones would hide a tensor that an export mixes up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith(("bias", "running_mean", "class_token")):
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith(("head.weight", "fc.weight")):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
