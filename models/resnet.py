"""Residual networks: torchvision's for photographs, and a small one for images of a few dozen pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from .libraries.torchvision_models import build_torchvision
from .weights import finish

_MOST_CHANNELS, _MOST_BLOCKS = 2048, 512  # beyond them no machine holds the weights


class SmallResNet(nn.Module):
    """Three stages of basic blocks at 1, 1/2 and 1/4 of the image's side (He 2016, section 4.2), any side from 8 px.

    Input [N, 3, S, S], output logits [N, num_classes]. The CIFAR stem: a 3x3 convolution at full resolution, no pool.
    """

    def __init__(
        self, *, num_classes: int, width: int, blocks_per_stage: int, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = (width, 2 * width, 4 * width)
        self.layer1 = _stage(width, widths[0], stride=1, num_blocks=blocks_per_stage)
        self.layer2 = _stage(widths[0], widths[1], stride=2, num_blocks=blocks_per_stage)
        self.layer3 = _stage(widths[1], widths[2], stride=2, num_blocks=blocks_per_stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)
        _initialize(self)
        if activation is not nn.ReLU:
            _replace_relu(self, activation)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(torch.flatten(self.avgpool(features), 1))


def resnet_digits(
    *,
    num_classes: int,
    width: int = 16,
    blocks_per_stage: int = 1,
    weights: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A ResNet-8 with SiLU for images of 8 to 32 px; about 78,000 parameters at width 16.

    With ReLU, a rounding difference that flips the sign of one activation makes the gradient jump, and two runs that
    differ only by rounding drift apart within ten steps (measured: 3e-2 in the loss at step 20; with SiLU 4e-6).
    A smooth activation keeps runs on different machines and numbers of ranks comparable.

    width: channels of the first stage (16 or more lets BlurPool blur every strided convolution).
    weights, gradient_checkpointing: as for `resnet50`; weights are a file.
    """
    if not (1 <= width <= _MOST_CHANNELS and 1 <= blocks_per_stage <= _MOST_BLOCKS):
        raise ValueError(
            f"width {width} must be 1 to {_MOST_CHANNELS}, and blocks_per_stage {blocks_per_stage} 1 to {_MOST_BLOCKS}"
        )
    model = SmallResNet(num_classes=num_classes, width=width, blocks_per_stage=blocks_per_stage, activation=nn.SiLU)
    return finish(model, weights, gradient_checkpointing=gradient_checkpointing)


def resnet20(*, num_classes: int, weights: str | None = None, gradient_checkpointing: bool = False) -> nn.Module:
    """The CIFAR ResNet-20 (He 2016), with projection shortcuts; about 0.27 M parameters at 10 classes.

    weights, gradient_checkpointing: as for `resnet50`; weights are a file.
    """
    model = SmallResNet(num_classes=num_classes, width=16, blocks_per_stage=3)
    return finish(model, weights, gradient_checkpointing=gradient_checkpointing)


def _torchvision_resnet(name: str, parameters: str) -> Callable[..., nn.Module]:
    def build(
        *,
        num_classes: int,
        zero_init_residual: bool = False,
        bce_head_bias: bool = False,
        initialization: Literal["torchvision", "mosaicml"] = "torchvision",
        weights: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> nn.Module:
        model = build_torchvision(name, num_classes=num_classes, zero_init_residual=zero_init_residual)
        if initialization == "mosaicml":
            _initialize_as_mosaicml(model, zero_init_residual=zero_init_residual)
        if bce_head_bias:
            nn.init.constant_(model.get_parameter("fc.bias"), -math.log(num_classes))
        return finish(model, weights, architecture=name, gradient_checkpointing=gradient_checkpointing)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""torchvision's {name} (v1.5 where it has bottlenecks): {parameters} parameters for 1000 classes.

    zero_init_residual: start each block as the identity, with zeros in its last norm's weight (Goyal 2017).
    bce_head_bias: start the classifier's bias at -log(num_classes), so that under binary cross entropy each class has
        an initial probability of 1 / (1 + num_classes) instead of 1/2.
    initialization: mosaicml draws the weights of convolutions and of the classifier from N(0, 2 / fan_in), and those of
        batch norm from U(0, 1), as MosaicML's ResNet recipes do. torchvision has N(0, 2 / fan_out) for convolutions,
        a uniform classifier, and ones for batch norm.
    weights: torchvision's name for them (IMAGENET1K_V1 ...) or a file; see `models.weights.load_weights`.
    gradient_checkpointing: compute each block's activations again in the backward pass.
    """
    return build


resnet18 = _torchvision_resnet("resnet18", "11,689,512")
resnet34 = _torchvision_resnet("resnet34", "21,797,672")
resnet50 = _torchvision_resnet("resnet50", "25,557,032")
resnet101 = _torchvision_resnet("resnet101", "44,549,160")


def _stage(in_channels: int, channels: int, *, stride: int, num_blocks: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
    from torchvision.models.resnet import BasicBlock

    first = BasicBlock(in_channels, channels, stride=stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(num_blocks - 1)))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _initialize_as_mosaicml(model: nn.Module, *, zero_init_residual: bool) -> None:
    if zero_init_residual:
        raise ValueError(
            "zero_init_residual is true and initialization is mosaicml, which draws the same norms' weights from "
            "U(0, 1); leave one of them out"
        )
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _replace_relu(model: nn.Module, activation: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, activation(inplace=True))
