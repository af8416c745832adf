"""Gradient checkpointing changes memory and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from algos import apply_blurpool, apply_stochastic_depth
from models.checkpointing import checkpoint_blocks
from models.registry import find

NETWORKS = {
    "resnet_digits": {},
    "resnet18": {},
    "vit_digits": {"dropout": 0.2, "attention_dropout": 0.2},
    "torchvision.mobilenet_v2": {},
    "torchvision.convnext_tiny": {},
    "torchvision.swin_t": {},
    "torchvision.efficientnet_b0": {},
    "torchvision.regnet_y_400mf": {},
    "torchvision.shufflenet_v2_x0_5": {},
}


def pair(name: str, **settings) -> tuple[nn.Module, nn.Module]:
    made = []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        made.append(find(name)(num_classes=10, gradient_checkpointing=gradient_checkpointing, **settings))
    return made[0], made[1]


def train_step(network: nn.Module, size: int = 32) -> tuple[torch.Tensor, int]:
    """The output, and the bytes that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)
    images = torch.randn(4, 3, size, size)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network.train()(images)
        held = sum(kept.values())
        output.square().mean().backward()
    return output.detach(), held


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_statistics_are_the_same(name) -> None:
    plain, checkpointed = pair(name, **NETWORKS[name])
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    for _ in range(2):
        results = [train_step(network) for network in (plain, checkpointed)]
    assert torch.equal(results[0][0], results[1][0])
    for (key, ours), theirs in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=0, atol=0, msg=key)
    for (key, ours), theirs in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("vit_digits", 32)])
def test_less_is_kept_for_the_backward_pass(name, size) -> None:
    plain, checkpointed = pair(name)
    assert train_step(checkpointed, size)[1] < 0.7 * train_step(plain, size)[1]


def test_batch_norm_would_move_twice_without_care() -> None:
    """What `_running_statistics_at_rest` is there for."""
    from torch.utils.checkpoint import checkpoint

    norm = nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    output = checkpoint(norm, images, use_reentrant=False)
    assert isinstance(output, torch.Tensor)
    output.square().mean().backward()
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 2


def test_frozen_norms_stay_frozen() -> None:
    _, network = pair("resnet_digits")
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("checkpoint_first", [True, False])
def test_composes_with_blurpool_and_stochastic_depth(checkpoint_first) -> None:
    outputs = []
    for gradient_checkpointing in (True, False):
        torch.manual_seed(0)
        network = find("resnet18")(num_classes=10, gradient_checkpointing=checkpoint_first and gradient_checkpointing)
        apply_stochastic_depth(apply_blurpool(network), drop_rate=0.5)
        if gradient_checkpointing and not checkpoint_first:
            checkpoint_blocks(network)
        outputs.append(train_step(network)[0])
        outputs.append(network.get_parameter("conv1.weight").grad)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("name", ["resnet_digits", "vit_digits"])
def test_compiled_it_is_the_same(name) -> None:
    _, network = pair(name)
    results = []
    for forward in (network, torch.compile(copy.deepcopy(network), backend="aot_eager")):
        torch.manual_seed(1)
        forward.train()(torch.randn(4, 3, 16, 16)).square().mean().backward()
        results.append([*(parameter.grad for parameter in forward.parameters()), *forward.buffers()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_twice_is_once_and_copies_work() -> None:
    _, network = pair("resnet_digits")
    kinds = [type(module) for module in network.modules()]
    assert [type(module) for module in checkpoint_blocks(network).modules()] == kinds
    images = torch.randn(2, 3, 16, 16)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert [type(module) for module in other.modules()] == kinds
        assert torch.equal(other.eval()(images), network.eval()(images))


@pytest.mark.parametrize("name", ["torchvision.alexnet", "torchvision.vgg11", "torchvision.squeezenet1_1"])
def test_networks_without_blocks_are_refused(name) -> None:
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing is true and .* no residual blocks .* set it to false"
    ):
        find(name)(num_classes=10, gradient_checkpointing=True)
