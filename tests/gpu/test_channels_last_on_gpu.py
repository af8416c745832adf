"""Channels-last stays through forward and backward, whatever else acts on the network or the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from algos.framework.registry import names

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

OTHERS = sorted(set(names()) - {"channels_last"})


def watch_formats(network: nn.Module) -> dict[str, list[Any]]:
    """What convolutions return and the gradients that come back to them, filled in as the network runs: its name and
    strides where it is not channels-last. `seen` counts them."""
    found: dict[str, list[Any]] = {"forward": [], "backward": [], "seen": []}

    def note(direction: str, name: str, tensor: torch.Tensor) -> None:
        found["seen"].append(direction)
        # Of one channel or one pixel every order of the axes is the same.
        trivial = tensor.shape[1] == 1 or tensor.shape[2] * tensor.shape[3] == 1
        if not trivial and not tensor.is_contiguous(memory_format=torch.channels_last):
            found[direction].append((name, tuple(tensor.shape), tensor.stride()))

    def after_forward(name: str, output: torch.Tensor) -> None:
        note("forward", name, output)
        if output.requires_grad:
            output.register_hook(lambda gradient: note("backward", name, gradient))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output, name=name: after_forward(name, output))
    return found


@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
@pytest.mark.parametrize("chosen", [[], *([name] for name in OTHERS), OTHERS], ids=["alone", *OTHERS, "all"])
def test_the_format_stays(chosen: list[str], precision: str, device: torch.device) -> None:
    from composer.core import Callback
    from gpu_runs import fit, make_trainer, small_network

    class Watch(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:  # after the algorithms have changed the network
            self.found = watch_formats(state.model)

    if device.type == "cpu" and precision != "fp32":
        pytest.skip("needs CUDA itself: Composer has no fp16 on the CPU")
    watch = Watch()
    fit(make_trainer(device, small_network(), ["channels_last", *chosen], callbacks=[watch], precision=precision))
    assert watch.found["seen"].count("forward") > 50
    assert watch.found["seen"].count("backward") > 50
    assert not watch.found["forward"], watch.found["forward"][:3]
    assert not watch.found["backward"], watch.found["backward"][:3]


@pytest.mark.parametrize("model", ["resnet50", "resnet_digits"])
def test_values_are_those_of_the_other_format(model: str, device: torch.device) -> None:
    from algos import apply_blurpool, apply_channels_last
    from models import registry

    torch.manual_seed(0)
    network = apply_blurpool(registry.find(model)(num_classes=4)).to(device).double().eval()
    images = torch.randn(2, 3, 32, 32, device=device, dtype=torch.float64)
    results = []
    for changed in (network, apply_channels_last(copy.deepcopy(network))):
        output = changed(images)
        output.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in changed.parameters() if parameter.grad is not None]
        results.append([output.detach(), *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
