"""Residual networks: torchvision's for photographs, and a small one for images of a few dozen pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock


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


def resnet_digits(*, num_classes: int, width: int = 16, blocks_per_stage: int = 1) -> nn.Module:
    """A ResNet-8 with SiLU for images of 8 to 32 px; about 78,000 parameters at width 16.

    With ReLU, a rounding difference that flips the sign of one activation changes the gradient by a jump, and two runs
    that differ by rounding alone drift apart within ten steps (measured: 3e-2 in the loss at step 20; with SiLU 4e-6).
    A smooth activation keeps runs on different machines and numbers of ranks comparable.

    width: channels of the first stage (16 or more lets BlurPool see every strided convolution).
    """
    if width < 1 or blocks_per_stage < 1:
        raise ValueError(f"width {width} and blocks_per_stage {blocks_per_stage} must both be at least 1")
    return SmallResNet(num_classes=num_classes, width=width, blocks_per_stage=blocks_per_stage, activation=nn.SiLU)


def resnet20(*, num_classes: int) -> nn.Module:
    """The CIFAR ResNet-20 (He 2016), with projection shortcuts; about 0.27 M parameters."""
    return SmallResNet(num_classes=num_classes, width=16, blocks_per_stage=3)


def resnet18(*, num_classes: int, zero_gamma: bool = False) -> nn.Module:
    """torchvision's ResNet-18 without weights. zero_gamma starts each block as the identity (Goyal 2017)."""
    return torchvision_resnet.resnet18(num_classes=num_classes, zero_init_residual=zero_gamma)


def resnet34(*, num_classes: int, zero_gamma: bool = False) -> nn.Module:
    """torchvision's ResNet-34 without weights. zero_gamma starts each block as the identity (Goyal 2017)."""
    return torchvision_resnet.resnet34(num_classes=num_classes, zero_init_residual=zero_gamma)


def resnet50(*, num_classes: int, zero_gamma: bool = False) -> nn.Module:
    """torchvision's ResNet-50 (v1.5) without weights. zero_gamma starts each block as the identity (Goyal 2017)."""
    return torchvision_resnet.resnet50(num_classes=num_classes, zero_init_residual=zero_gamma)


def resnet101(*, num_classes: int, zero_gamma: bool = False) -> nn.Module:
    """torchvision's ResNet-101 (v1.5) without weights. zero_gamma starts each block as the identity (Goyal 2017)."""
    return torchvision_resnet.resnet101(num_classes=num_classes, zero_init_residual=zero_gamma)


def _stage(in_channels: int, channels: int, *, stride: int, num_blocks: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
    first = BasicBlock(in_channels, channels, stride=stride, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(num_blocks - 1)))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _replace_relu(model: nn.Module, activation: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, activation(inplace=True))
