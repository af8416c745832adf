"""Every registered model builds, trains and restores its state; unknown names are refused."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from composer.models import Initializer
from torch import nn

from models import registry
from models.resnet import resnet18, resnet50
from models.summary import count_parameters

# name -> smallest sensible image, px
SMALLEST = {
    "alexnet": 67,
    "alexnet_torchvision": 63,
    "alexnetish": 24,
    "resnet101": 64,
    "resnet18": 32,
    "resnet20": 8,
    "resnet34": 64,
    "resnet50": 64,
    "resnet_digits": 8,
    "vit_b16": 32,
    "vit_digits": 8,
}


def test_the_list_below_is_the_registrys() -> None:
    assert sorted(SMALLEST) == registry.names()


@pytest.mark.parametrize("name", [*SMALLEST, "torchvision.mobilenet_v3_small"])
def test_builds_trains_a_step_and_keeps_its_state(name, tmp_path) -> None:
    size = SMALLEST.get(name, 32)
    torch.manual_seed(0)
    network = registry.find(name)(num_classes=7)
    images, targets = torch.randn(4, 3, size, size), torch.tensor([0, 6, 3, 3])
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001)
    loss = nn.functional.cross_entropy(network.train()(images), targets)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in network.parameters())
    moved = [not torch.equal(*two) for two in zip(before, network.parameters(), strict=True)]
    assert moved[-1]  # the classifier's bias, and more than it
    assert sum(moved) > 1

    torch.save(network.state_dict(), tmp_path / "w.pt")
    other = registry.find(name)(num_classes=7, weights=str(tmp_path / "w.pt"))
    with torch.no_grad():
        expected = network.eval()(images)
        assert torch.isfinite(expected).all()
        assert torch.equal(other.eval()(images), expected)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_resnets_have_the_published_number_of_parameters(name, parameters) -> None:
    build = registry.find(name)
    assert count_parameters(build(num_classes=1000)) == parameters
    assert build.__doc__ is not None
    assert f"{parameters:,} parameters" in build.__doc__


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_equal_torchvisions(name) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=10).eval()
    ours = registry.find(name)(num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("build", "last_norm"), [(resnet18, "bn2"), (resnet50, "bn3")])
def test_zero_init_residual_starts_each_block_as_the_identity(build, last_norm) -> None:
    network = build(num_classes=10, zero_init_residual=True)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    zeros = {name for name, norm in norms.items() if not norm.weight.any()}
    assert zeros == {name for name in norms if name.endswith(last_norm) and name.startswith("layer")}
    block = network.get_submodule("layer1.1").eval()
    values = torch.rand(1, 64 if build is resnet18 else 256, 4, 4)
    assert torch.equal(block(values), values)  # of ReLU's output


def test_bce_head_bias_makes_every_class_unlikely_at_first() -> None:
    network = resnet18(num_classes=1000, bce_head_bias=True)
    nn.init.zeros_(network.get_parameter("fc.weight"))
    logits = network.eval()(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(torch.sigmoid(logits), torch.full((2, 1000), 1 / 1001), rtol=1e-5, atol=0)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(1000)[:2], reduction="sum") / 2
    assert loss.item() == pytest.approx(1000 * torch.log(torch.tensor(1001 / 1000)).item() + 6.9078, rel=1e-4)


def test_mosaicmls_initialization_is_that_of_composers_initializers() -> None:
    torch.manual_seed(0)
    ours = resnet50(num_classes=1000, initialization="mosaicml", bce_head_bias=True)
    theirs = resnet50(num_classes=1000)
    for initializer in (
        Initializer.KAIMING_NORMAL,
        Initializer.BN_UNIFORM,
        Initializer.LINEAR_LOG_CONSTANT_BIAS,
    ):
        theirs.apply(initializer.get_initializer())
    for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not name.endswith("weight"):
            torch.testing.assert_close(own, other)
            continue
        count = own.numel()
        assert abs(own.mean() - other.mean()) < 5 * other.std() * (2 / count) ** 0.5, name
        assert own.std() == pytest.approx(other.std().item(), rel=5 / count**0.5), name
        assert (own.min() >= 0) == (other.min() >= 0), name  # batch norm's
    with pytest.raises(ValueError, match="zero_init_residual is true and initialization is mosaicml"):
        resnet50(num_classes=10, initialization="mosaicml", zero_init_residual=True)


def test_dropout_reaches_every_layer_of_torchvisions() -> None:
    network = registry.find("torchvision.vgg11")(num_classes=10, dropout=0.25)
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25]
    with pytest.raises(ValueError, match="torchvision's resnet18 has no dropout; leave it out"):
        registry.find("torchvision.resnet18")(num_classes=10, dropout=0.25)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet5", "unknown model 'resnet5'; known: alexnet, .*; did you mean resnet50"),
        ("vit", r"unknown model 'vit'; known: .*torchvision\.<name>, timm\.<name>, hf\.<id or folder>"),
        ("torchvision.resnet5", "torchvision has no classifier 'resnet5'; did you mean torchvision.resnet50"),
        ("torchvision.fasterrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("hf.", "'' has no config.json; name the folder that save_pretrained wrote, or an id"),
        ("hf./no/such/folder", "'/no/such/folder' has no config.json"),
    ],
)
def test_other_names_are_refused_with_the_nearest(name, said) -> None:
    with pytest.raises(ValueError, match=said) as error:
        registry.find(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "library", "said"),
    [
        ("timm.resnet50", "timm", "timm.resnet50 needs timm: pip install timm"),
        ("hf.a/b", "transformers", r"hf.a/b needs transformers: pip install 'brisk-vision\[hf\]'"),
    ],
)
def test_a_library_that_is_missing_is_named(name, library, said, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=said):
        registry.find(name)
