"""timm's classifiers, if timm is installed."""

from __future__ import annotations

import pytest
import torch

from models.registry import find
from models.vit import translate_names, vit_digits

timm = pytest.importorskip("timm")


@torch.no_grad()
def test_builds_timms_network_and_loads_a_file(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = find("timm.resnet18")(num_classes=10, weights=str(tmp_path / "w.pt")).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_image_size_and_rates_reach_timm() -> None:
    network = find("timm.vit_tiny_patch16_224")(num_classes=10, image_size=64, drop_rate=0.1, drop_path_rate=0.2)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert network.head_drop.p == 0.1
    assert network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["timm.vit_tiny_patch16_224"])
def test_gradient_checkpointing_changes_no_gradient(name) -> None:
    gradients = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        network = find(name)(num_classes=10, image_size=32, gradient_checkpointing=gradient_checkpointing).train()
        network(torch.randn(2, 3, 32, 32)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert network.grad_checkpointing
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
def test_timms_vit_loads_into_ours() -> None:
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=10)
    theirs = timm.models.VisionTransformer(**shape).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = vit_digits(num_classes=10).eval()
    ours.load_state_dict(translate_names(theirs.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("timm.resnet5", None, "timm has no model 'resnet5'; did you mean timm.resnet"),
        ("timm.resnet18", {"drop_rate": 1.0}, r"drop_rate 1.0 must lie in \[0, 1\)"),
        ("timm.resnet18", {"image_size": 64}, "timm cannot build resnet18 with {'img_size': 64}"),
        ("timm.resnet18", {"gradient_checkpointing": True}, "timm's resnet18 has batch norm, whose running statistics"),
        ("timm.resnet18", {"weights": "no.pt"}, "weights 'no.pt' are not there"),
    ],
)
def test_what_timm_refuses_is_one_line(name, settings, said) -> None:
    with pytest.raises(ValueError, match=said) as error:
        find(name)(num_classes=10, **(settings or {}))
    assert "\n" not in str(error.value)
