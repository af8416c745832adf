"""In which type normalized images come: autocast's only where the network's first convolution gets the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import registry
from training.build import build_data_specs
from training.planning import Place, plan_run
from training.planning.plan import _CONVOLVE_FIRST

# px; the models that compute with pixels before a convolution are not listed in training/planning/plan.py
SIZES = {"alexnet": 67, "alexnet_torchvision": 63, "alexnetish": 24, "resnet20": 8, "resnet_digits": 8, "vit_digits": 8}
PLAIN = (
    "blurpool={}",
    "channels_last={}",
    "cutmix={}",
    "ema={decay: 0.9}",
    "label_smoothing={}",
    "sam={}",
    "selective_backprop={}",
    "stochastic_depth={}",
)


@pytest.mark.parametrize("name", registry.names())
def test_a_listed_network_does_to_rounded_images_what_autocast_does(name: str) -> None:
    torch.manual_seed(0)
    network, size = registry.find(name)(num_classes=5).eval(), SIZES.get(name, 32)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        same = torch.equal(network(images), network(images.bfloat16()))
    assert same == (name in _CONVOLVE_FIRST)


def pixel_type(short_recipe: Any, *algorithms: str, precision: str = "amp_bf16", model: str = "resnet_digits") -> str:
    names = {one.partition("=")[0] for one in algorithms}
    off = [f"algorithms.{name}=null" for name in ("mixup", "randaugment") if name not in names]
    given = [f"algorithms.{one}" for one in algorithms]
    recipe = short_recipe(*off, *given, f"precision={precision}", f"model={model}")
    return plan_run(recipe, Place("gpu")).pixel_type


def test_it_is_that_of_autocast_where_nothing_computes_with_pixels(short_recipe: Any) -> None:
    assert pixel_type(short_recipe) == "bfloat16"
    assert pixel_type(short_recipe, *PLAIN) == "bfloat16"
    assert pixel_type(short_recipe, precision="amp_fp16") == "float16"
    assert pixel_type(short_recipe, precision="fp32") == "float32"


@pytest.mark.parametrize(
    "algorithm", ["mixup={}", "randaugment={}", "blurpool={min_channels: 3}", "composer.cutout={}"]
)
def test_what_computes_with_pixels_gets_float32(short_recipe: Any, algorithm: str) -> None:
    assert pixel_type(short_recipe, algorithm) == "float32"


def test_a_library_s_network_gets_float32(short_recipe: Any) -> None:
    assert pixel_type(short_recipe, model="torchvision.mobilenet_v3_small") == "float32"


def test_batches_come_in_it(short_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader(list):
        mean, std = (100.0, 110.0, 120.0), (50.0, 55.0, 60.0)

    plan = plan_run(short_recipe())
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.tensor([0, 1])
    in_float32 = build_data_specs(plan, (Loader(), Loader()))[0].batch_transforms(batch)[0]
    assert in_float32.dtype == torch.float32
    monkeypatch.setattr(type(plan), "pixel_type", "float16")
    for spec in build_data_specs(plan, (Loader(), Loader())):
        assert torch.equal(spec.batch_transforms(batch)[0], in_float32.half())
