"""A recipe small enough to train in a second or two, with the digits recipe's seven speed-ups on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "yamls" / "digits_medium.yaml"
SHORT = (
    "duration.epochs=4",
    "algorithms.progressive_resizing.stages=[{epochs: 1, image_size: 8, per_device_batch_size: 96},"
    "{epochs: 2, image_size: 12},{epochs: 1, image_size: 16}]",
    "algorithms.fixres={epochs: 1, image_size: 16, learning_rate: 0.02}",
    "logging.progress_bar=false",
)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits are converted once for all tests of this process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def overrides(tmp_path: Path, cache_dir: Path) -> list[str]:
    """Overrides that make the digits recipe short and keep its files out of the checkout."""
    return [*SHORT, f"results_dir={tmp_path / 'results'}", f"data.cache_dir={cache_dir}"]


@pytest.fixture
def short_recipe(overrides: list[str]) -> Any:
    """Makes the short recipe, with more overrides if asked: recipe = short_recipe("algorithms.sam=null")."""

    def make(*more: str) -> Recipe:
        given = {override.partition("=")[0]: override for override in (*overrides, *more)}
        return load_recipe(DIGITS, list(given.values()))

    return make
