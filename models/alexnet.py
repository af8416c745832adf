"""AlexNet: the paper's, torchvision's, and a small variant for a few hundred classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .libraries.torchvision_models import build_torchvision
from .weights import finish

_IMAGENET_PIXEL_STD = 57.6  # of ImageNet's 0 to 255 pixels, mean of the three channels


class AlexNet(nn.Module):
    """Input [N, 3, S, S] of 67 px or more, output logits [N, num_classes]; see `alexnet`."""

    def __init__(self, *, num_classes: int, groups: int, dropout: float, pixel_std: float) -> None:
        super().__init__()
        self.pixel_std = pixel_std
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4),
            nn.ReLU(inplace=True),
            _paper_response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(96, 256, 5, padding=2, groups=groups),
            nn.ReLU(inplace=True),
            _paper_response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)  # the identity at the paper's 227 px
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        _initialize_as_paper(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.avgpool(self.features(images * self.pixel_std))
        return self.classifier(torch.flatten(features, 1))


class AlexNetish(nn.Module):
    """Input [N, 3, S, S] of 24 px or more, output logits [N, num_classes]; see `alexnetish`."""

    def __init__(self, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(7, alpha=1e-4, beta=0.75, k=4.0),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(7, alpha=1e-4, beta=0.75, k=4.0),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 64, 3, stride=2, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 32, 3, stride=2, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(7)  # the identity at 227 px
        self.classifier = nn.Sequential(
            nn.Linear(32 * 7 * 7, 256), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(256, num_classes)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, mean=0.001, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))


def alexnet(
    *,
    num_classes: int,
    groups: Literal[1, 2] = 2,
    dropout: float = 0.5,
    pixel_std: float = _IMAGENET_PIXEL_STD,
    weights: str | None = None,
) -> nn.Module:
    """AlexNet as in its paper (Krizhevsky 2012), at 227 px: 60,965,224 parameters for 1000 classes.

    Convolutions of 96, 256, 384, 384 and 256 channels, max-pools of 3x3 at stride 2, two hidden layers of 4096, and
    after the first two convolutions' ReLU a response norm over n = 5 neighboring channels,

        b_i = a_i / (k + alpha sum_j a_j²)^beta,   k = 2, alpha = 1e-4, beta = 0.75.

    Weights are drawn from N(0, 0.01²); biases are 1 in convolutions 2, 4 and 5 and in the hidden layers, else 0.

    groups: 2 splits the channels of convolutions 2, 4 and 5 into two independent halves, as on the paper's two GPUs;
        1 connects all (62,378,344 parameters). The response norm spans both halves either way.
    dropout: of the two hidden layers' outputs, in [0, 1).
    pixel_std: positive factor on the images. The paper trained on pixels of 0 to 255 minus their mean, and its
        initialization and response norm depend on that scale; loaders here divide by the standard deviation, and
        this multiplies by ImageNet's again. 1 leaves images unchanged.
    weights: a file; see `models.weights.load_weights`.
    """
    _check_dropout(dropout)
    if groups not in (1, 2):
        raise ValueError(f"groups {groups} must be 2 (the paper's two halves) or 1 (all connected)")
    if not pixel_std > 0:
        raise ValueError(f"pixel_std {pixel_std} must be positive; 1 leaves images as the loader normalizes them")
    return finish(AlexNet(num_classes=num_classes, groups=groups, dropout=dropout, pixel_std=pixel_std), weights)


def alexnet_torchvision(*, num_classes: int, dropout: float = 0.5, weights: str | None = None) -> nn.Module:
    """torchvision's AlexNet, after Krizhevsky 2014: no response norm, one tower, 61,100,840 parameters at 1000 classes.

    dropout: of the two hidden layers' inputs, in [0, 1).
    weights: IMAGENET1K_V1 or a file; see `models.weights.load_weights`.
    """
    return build_torchvision("alexnet", num_classes=num_classes, dropout=dropout, weights=weights)


def alexnetish(*, num_classes: int, dropout: float = 0.2, weights: str | None = None) -> nn.Module:
    """A small variant of AlexNet for 227 px: five convolutions of 32 to 128 channels, two linear layers.

    799,405 parameters for 525 classes. The response norm spans 7 channels, with k = 4, beta = 0.75 and PyTorch's
    definition of alpha = 1e-4, which divides it by 7. Weights are drawn from N(0.001, 0.02²).

    dropout: of the hidden layer's output, in [0, 1).
    weights: a file; see `models.weights.load_weights`.
    """
    _check_dropout(dropout)
    return finish(AlexNetish(num_classes=num_classes, dropout=dropout), weights)


def _paper_response_norm() -> nn.LocalResponseNorm:
    # PyTorch divides alpha by the number of channels summed over; the paper does not.
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def _initialize_as_paper(model: AlexNet) -> None:
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for index, layer in enumerate(layers):
        assert layer.bias is not None
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(layer.bias, 1.0 if index in (1, 3, 4, 5, 6) else 0.0)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must lie in [0, 1); 0 drops nothing")
