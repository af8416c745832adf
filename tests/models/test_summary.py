"""What a summary counts, against formulas and published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from algos import apply_blurpool
from models.registry import find
from models.summary import count_forward_macs, count_parameters, find_layers, summarize


class Nested(nn.Module):
    """A parameter of its own, a layer that runs twice, one that never runs, and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False)
        self.twice = nn.Conv2d(4, 4, 1)
        self.alias = self.twice
        self.unused = nn.Linear(5, 5)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.twice(self.alias(self.stem(images) * self.scale)))


def test_layers_are_counted_by_hand() -> None:
    layers = {layer.name: layer for layer in find_layers(Nested(), image_size=6)}
    macs = {"stem": 36 * 3 * 4 * 9, "twice": 2 * 36 * 16, "unused": 0, "head": 8, "head.2": 8, "head.0": 0}
    parameters = {"scale": 4, "stem": 108, "twice": 20, "unused": 30, "head": 10, "head.2": 10, "head.0": 0}
    shapes = {"": (2,), "stem": (4, 6, 6), "twice": (4, 6, 6), "unused": None, "head": (2,), "head.0": (4, 1, 1)}
    assert {name: layers[name].macs for name in macs} == macs
    assert {name: layers[name].parameters for name in parameters} == parameters
    assert {name: layers[name].shape for name in shapes} == shapes
    assert layers[""].macs == 36 * 3 * 4 * 9 + 2 * 36 * 16 + 8 == count_forward_macs(Nested(), image_size=6)
    assert layers[""].parameters == 4 + 108 + 20 + 30 + 10 == count_parameters(Nested())
    assert [name for name in layers if layers[name].depth == 2] == ["head.0", "head.1", "head.2"]


@pytest.mark.parametrize(
    ("name", "image_size", "gmacs", "digits"),
    [
        ("alexnet_torchvision", 224, 0.714, 3),  # torchvision's documentation, as are the next four
        ("resnet18", 224, 1.814, 3),
        ("resnet50", 224, 4.089, 3),
        ("torchvision.mobilenet_v2", 224, 0.301, 3),
        ("vit_b16", 224, 17.564, 3),
        ("alexnet", 227, 0.724, 3),
    ],
)
def test_macs_are_the_published_ones(name, image_size, gmacs, digits) -> None:
    network = find(name)(num_classes=1000)
    assert round(count_forward_macs(network, image_size=image_size) / 1e9, digits) == gmacs


@pytest.mark.parametrize("name", ["alexnet", "resnet50", "vit_b16"])
def test_every_parameter_and_mac_is_in_one_leaf(name) -> None:
    layers = find_layers(find(name)(num_classes=10), image_size=224)
    parents = {layer.name.rpartition(".")[0] for layer in layers}
    leaves = [layer for layer in layers if layer.name not in parents]
    assert sum(layer.parameters for layer in leaves) == layers[0].parameters
    # Attention's products belong to the module that holds its projections, not to those.
    counted = [layer for layer in layers if layer.macs and layer.kind in ("Conv2d", "Linear", "SelfAttention")]
    assert sum(layer.macs or 0 for layer in counted) == layers[0].macs


def test_text_shows_the_tree() -> None:
    network = find("resnet18")(num_classes=1000)
    for parameter in network.get_submodule("layer1").parameters():
        parameter.requires_grad_(False)
    lines = summarize(network, image_size=224, depth=1).splitlines()
    assert lines[0].split() == ["layer", "output", "of", "one", "image", "parameters", "MMACs"]
    assert lines[1].split() == ["ResNet", "1000", "11,689,512", "1,814.07"]
    assert lines[2] == "  conv1: Conv2d               64 x 112 x 112            9,408    118.01"
    assert len(lines) == 2 + 10 + 1
    assert lines[-1].startswith("11,689,512 parameters (11,541,544 trainable), 1.814 GMACs at 224 px")
    assert sum("BasicBlock" in line for line in summarize(network, image_size=224, depth=2).splitlines()) == 8


def test_the_network_is_left_as_it_is() -> None:
    network = apply_blurpool(find("resnet18")(num_classes=10)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    summarize(network, image_size=64)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_a_size_that_the_network_cannot_take_is_the_networks_error() -> None:
    with pytest.raises(ValueError, match="do not divide into patches"):
        summarize(find("vit_digits")(num_classes=10), image_size=30)


def test_a_batch_norm_of_other_channels_is_refused_as_it_refuses_itself() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(16))
    with pytest.raises(RuntimeError, match="running_mean should contain 8 elements"):
        count_forward_macs(network, image_size=8)
