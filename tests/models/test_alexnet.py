"""AlexNet against the paper's formulas, written out here, and against torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from models.alexnet import alexnet, alexnet_torchvision, alexnetish
from models.summary import count_parameters, find_layers


def paper_response_norm(a: np.ndarray, *, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75):
    """b_i = a_i / (k + alpha sum_{j = max(0, i - n/2)}^{min(N - 1, i + n/2)} a_j²)^beta, channels in axis 1."""
    channels = a.shape[1]
    b = np.empty_like(a)
    for i in range(channels):
        window = a[:, max(0, i - n // 2) : min(channels - 1, i + n // 2) + 1]
        b[:, i] = a[:, i] / (k + alpha * (window**2).sum(axis=1)) ** beta
    return b


def paper_forward(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The paper's figure 2 in functions: two towers as separate convolutions, pools and norms by formula."""
    weights = dict(network.named_parameters())

    def conv(x: torch.Tensor, index: int, *, towers: int, **how: int) -> torch.Tensor:
        parts = [weights[f"features.{index}.{kind}"].chunk(towers) for kind in ("weight", "bias")]
        halves = zip(x.chunk(towers, dim=1), *parts, strict=True)
        return torch.cat([F.relu(F.conv2d(half, w, b, **how)) for half, w, b in halves], dim=1)

    def norm_pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(torch.from_numpy(paper_response_norm(x.numpy())), 3, stride=2)

    x = norm_pool(conv(images * 57.6, 0, towers=1, stride=4))
    x = norm_pool(conv(x, 4, towers=2, padding=2))
    x = conv(x, 8, towers=1, padding=1)
    x = conv(x, 10, towers=2, padding=1)
    x = F.max_pool2d(conv(x, 12, towers=2, padding=1), 3, stride=2).flatten(1)
    for index in (0, 3):
        x = F.relu(x @ weights[f"classifier.{index}.weight"].T + weights[f"classifier.{index}.bias"])
    return x @ weights["classifier.6.weight"].T + weights["classifier.6.bias"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return alexnet(num_classes=1000)


def test_response_norm_is_the_papers(network: nn.Module) -> None:
    activations = np.random.default_rng(0).normal(0, 300, (2, 96, 5, 4))  # large, so that alpha matters
    norms = [module for module in network.modules() if isinstance(module, nn.LocalResponseNorm)]
    assert len(norms) == 2
    for norm in norms:
        ours = norm(torch.from_numpy(activations)).numpy()
        np.testing.assert_allclose(ours, paper_response_norm(activations), rtol=1e-12)
    torchs_reading = paper_response_norm(activations, alpha=1e-4 / 5)
    assert np.abs(ours / torchs_reading - 1).max() > 0.1  # PyTorch's alpha would have been another function


@torch.no_grad()
def test_output_is_the_papers(network: nn.Module) -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, 227, 227)
    expected = paper_forward(network, images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(network.eval()(images), expected, rtol=1e-5, atol=1e-5)


def test_initialization_is_the_papers(network: nn.Module) -> None:
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert [sorted(set(layer.bias.tolist())) for layer in layers] == [[b] for b in (0, 1, 0, 1, 1, 1, 1, 0)]
    for layer in layers:
        count = layer.weight.numel()
        assert abs(layer.weight.mean()) < 5 * 0.01 / count**0.5
        assert layer.weight.std().item() == pytest.approx(0.01, rel=5 / (2 * count) ** 0.5)


@torch.no_grad()
def test_pixels_have_the_scale_that_the_initialization_is_for() -> None:
    """At the paper's scale the signal's share of the deepest features does not drown in the biases of 1."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 227, 227)
    spread = {}
    for pixel_std in (57.6, 1.0):
        torch.manual_seed(1)
        features = alexnet(num_classes=10, pixel_std=pixel_std).features(images * pixel_std)
        spread[pixel_std] = (features.std(dim=0).mean() / features.mean()).item()
    assert spread[57.6] > 10 * spread[1.0]


def test_parameter_counts_are_the_published_ones(network: nn.Module) -> None:
    assert count_parameters(network) == 60_965_224
    assert count_parameters(alexnet(num_classes=1000, groups=1)) == 62_378_344
    assert count_parameters(alexnet_torchvision(num_classes=1000)) == 61_100_840
    with_two_linear_layers = 2_432 + 9_280 + 204_928 + 36_928 + 9_248 + (1568 + 1) * 256 + (256 + 1) * 525
    assert count_parameters(alexnetish(num_classes=525)) == with_two_linear_layers == 799_405


def test_shapes_are_the_papers(network: nn.Module) -> None:
    shapes = [layer.shape for layer in find_layers(network, image_size=227) if layer.kind in ("Conv2d", "MaxPool2d")]
    assert shapes == [
        (96, 55, 55),
        (96, 27, 27),
        (256, 27, 27),
        (256, 13, 13),
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
        (256, 6, 6),
    ]


@torch.no_grad()
def test_torchvisions_equals_torchvision() -> None:
    torch.manual_seed(0)
    theirs, ours = torchvision.models.alexnet(num_classes=10).eval(), alexnet_torchvision(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_alexnetish_is_its_description() -> None:
    """Its layers in functions; PyTorch's reading of alpha, which divides it by the window of 7."""
    torch.manual_seed(0)
    network = alexnetish(num_classes=525).eval()
    weights = dict(network.named_parameters())
    images = torch.randn(1, 3, 227, 227)

    def conv(x: torch.Tensor, index: int, **how: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], **how))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(paper_response_norm(x.numpy(), n=7, k=4.0, alpha=1e-4 / 7))

    x = F.max_pool2d(norm(conv(images, 0)), 2)
    x = F.max_pool2d(norm(conv(x, 4, padding=1, groups=2)), 2)
    x = conv(x, 8, padding=2)
    x = conv(x, 10, stride=2, padding=1, groups=2)
    x = F.max_pool2d(conv(x, 12, stride=2, padding=1, groups=2), 2).flatten(1)
    assert x.shape == (1, 32 * 7 * 7)
    x = F.relu(F.linear(x, weights["classifier.0.weight"], weights["classifier.0.bias"]))
    expected = F.linear(x, weights["classifier.3.weight"], weights["classifier.3.bias"])
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    for name, weight in weights.items():
        if name.endswith("weight"):
            assert weight.mean().item() == pytest.approx(0.001, abs=5 * 0.02 / weight.numel() ** 0.5)
            assert weight.std().item() == pytest.approx(0.02, rel=5 / (2 * weight.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [
        (alexnet, {"groups": 3}, "groups 3 must be 2"),
        (alexnet, {"dropout": 1.0}, r"dropout 1.0 must lie in \[0, 1\)"),
        (alexnet, {"pixel_std": 0.0}, "pixel_std 0.0 must be positive"),
        (alexnet_torchvision, {"dropout": -0.1}, r"dropout -0.1 must lie in \[0, 1\)"),
        (alexnetish, {"dropout": 2.0}, r"dropout 2.0 must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(build, settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        build(num_classes=10, **settings)
