"""Sharding units: transformer blocks, residual stages, otherwise the top-level modules."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from algos import apply_blurpool
from models import registry
from models.sharding import sharding_units


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return registry.find(name)(num_classes=10)


def names_of_units(network: nn.Module) -> list[str]:
    names = {module: name for name, module in network.named_modules()}
    return [names[unit] for unit in sharding_units(network)]


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet_digits", ["layer1", "layer2", "layer3"]),
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"]),
        ("vit_b16", [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("alexnetish", ["features", "classifier.0", "classifier.3"]),
        ("alexnet", ["features", "classifier.0", "classifier.3", "classifier.6"]),
        ("torchvision.convnext_tiny", ["features.1", "features.3", "features.5", "features.7"]),
    ],
)
def test_units(name: str, units: list[str]) -> None:
    assert names_of_units(build(name)) == units


def test_blurpool_changes_no_units() -> None:
    network = registry.find("resnet18")(num_classes=10)
    before = names_of_units(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert names_of_units(apply_blurpool(network)) == before


@pytest.mark.parametrize("name", ["resnet50", "vit_b16", "alexnet", "torchvision.swin_t", "torchvision.densenet121"])
def test_units_are_called_and_none_lies_within_another(name: str) -> None:
    units = sharding_units(build(name))
    inside = {module for unit in units for module in unit.modules() if module is not unit}
    assert units
    assert not inside & set(units)
    assert not any(isinstance(unit, (nn.ModuleList, nn.ModuleDict)) for unit in units)


def test_a_network_with_nothing_to_cut_has_no_units() -> None:
    assert sharding_units(nn.Linear(2, 2)) == []
