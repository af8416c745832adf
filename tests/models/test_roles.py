"""Which weights of the recipes' kinds of networks are hidden matrices."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from models.registry import find
from models.roles import hidden_matrices

# network -> image size, its settings, and a pattern of the weights of two or more dimensions that are no hidden ones
NETWORKS: dict[str, tuple[int, dict[str, Any], str]] = {
    "resnet_digits": (16, {}, r"stem\.0\.weight|fc\.weight"),
    "resnet20": (32, {}, r"stem\.0\.weight|fc\.weight"),
    "resnet50": (64, {}, r"conv1\.weight|fc\.weight"),
    # Three of AlexNet's convolutions are grouped.
    "alexnet": (128, {}, r"features\.(0|4|10|12)\.weight|classifier\.6\.weight"),
    "alexnetish": (63, {}, r"features\.(0|4|10|12)\.weight|classifier\.3\.weight"),
    "vit_digits": (16, {}, r"conv_proj\.weight|heads\.head\.weight|class_token|encoder\.pos_embedding"),
    "torchvision.vit_b_32": (
        224, {}, r"conv_proj\.weight|heads\.head\.weight|class_token|encoder\.pos_embedding",
    ),
    # Its depthwise convolutions come first in the first block, and second in the others.
    "torchvision.mobilenet_v3_small": (
        32, {}, r"features\.0\.0\.weight|classifier\.3\.weight|features\.1\.block\.0\.0\.weight|.*block\.1\.0\.weight",
    ),
    "timm.resnet18": (32, {}, r"conv1\.weight|fc\.weight"),
    "timm.vit_tiny_patch16_224": (224, {}, r"cls_token|pos_embed|patch_embed\.proj\.weight|head\.weight"),
    "timm.deit_tiny_distilled_patch16_224": (
        224, {}, r"cls_token|dist_token|pos_embed|patch_embed\.proj\.weight|head\.weight|head_dist\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_all_but_the_ends_and_what_is_no_matrix(name: str) -> None:
    size, settings, others = NETWORKS[name]
    if name.startswith("timm."):
        pytest.importorskip("timm")
    with torch.device("meta"):
        network = find(name)(num_classes=7, **settings)
    hidden = hidden_matrices(network, image_size=size)
    rest = [name for name, weight in network.named_parameters() if name not in hidden and weight.ndim > 1]
    assert [name for name in rest if not re.fullmatch(others, name)] == []
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    assert all(re.fullmatch(others, name) is None and len(shapes[name]) > 1 for name in hidden)
    assert len(hidden) >= 2


def test_hugging_faces() -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **settings)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = transformers.ViTForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.vit(images).logits

    network = Logits()
    hidden = hidden_matrices(network, image_size=8)
    rest = [name for name, weight in network.named_parameters() if name not in hidden and weight.ndim > 1]
    ends = r".*(cls_token|position_embeddings|patch_embeddings\.projection\.weight)|vit\.classifier\.weight"
    assert [name for name in rest if not re.fullmatch(ends, name)] == []
    assert len(rest) == 4
    assert len(hidden) == 6


class Odd(nn.Module):
    """Names and an order of registration that say nothing; a grouped convolution, one row, and a layer not called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.stem = nn.Linear(6, 3)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.row = nn.Linear(6, 1)
        self.first = nn.Conv2d(3, 6, 3)
        self.attention = nn.MultiheadAttention(6, 2)
        self.table = nn.Parameter(torch.zeros(6, 6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.head(self.grouped(self.first(images)).mean((2, 3))) @ self.table
        features = self.attention(features, features, features)[0]
        return self.stem(features * self.row(features))


def test_layers_are_told_by_when_they_are_called() -> None:
    assert hidden_matrices(Odd(), image_size=8) == [
        "head.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    ]  # fmt: skip


def test_the_network_stays_as_it_is() -> None:
    network = Odd().train()
    hidden_matrices(network, image_size=8)
    assert network.training
    assert not network.head._forward_hooks
    assert network.head.weight.device.type == "cpu"
