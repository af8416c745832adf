"""Loaders of the same images, which a test tells apart by their labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data import FFCVLoader, Loader, TorchLoader, write_beton
from data.sources import ArraySource


@pytest.fixture(params=["native", "libffcv", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each loader; the first two are decoders of the FFCV loader."""
    return request.param


@pytest.fixture
def loader_of(tmp_path: Path) -> Callable[..., Loader]:
    """Makes a training loader of a source: loader_of(source, "torch", seed=1)."""

    def make(source: ArraySource, kind: str, **settings) -> Loader:
        settings = {"per_device_batch_size": 5, "image_size": 8, "train": True, "num_workers": 0} | settings
        if kind == "torch":
            return TorchLoader(source, **settings)
        path = tmp_path / "source.beton"
        if not path.exists():
            write_beton(source, path, progress=False)
        return FFCVLoader(path, decoder=kind, **settings)

    return make
