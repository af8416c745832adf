"""Channels-last: strides change, and nothing else does."""

import copy

import pytest
import torch
from torch import nn

from algos.channels_last import ChannelsLast, apply_channels_last


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 2),
    )


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def formats_of_convolutions(model, images):
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(is_channels_last(output)))
        for module in model
        if isinstance(module, nn.Conv2d)
    ]
    output = model(images)
    for hook in hooks:
        hook.remove()
    return seen, output


@pytest.mark.parametrize("weights", [True, False])
def test_convolutions_return_channels_last_and_the_same_values(weights):
    model = small_net().double()
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    before, expected = formats_of_convolutions(model, images)
    assert apply_channels_last(model, weights=weights) is model
    after, output = formats_of_convolutions(model, images)
    assert not any(before)
    assert after == [True, True, True]
    torch.testing.assert_close(output, expected)


def test_weights_stay_the_same_objects():
    model = small_net()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    values = copy.deepcopy(model.state_dict())
    apply_channels_last(model)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert is_channels_last(model[0].weight)
    assert not model[3].weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    model(torch.randn(1, 3, 20, 20)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, values["0.weight"])


def test_five_dimensional_parameters_are_left_alone():
    model = nn.ModuleList([nn.Conv3d(3, 4, 2), nn.Conv2d(3, 4, 2)])
    apply_channels_last(model)
    assert model[0].weight.is_contiguous()
    assert is_channels_last(model[1].weight)


@pytest.mark.parametrize("weights", [True, False])
def test_twice_is_once(weights):
    model = apply_channels_last(apply_channels_last(small_net(), weights=weights), weights=weights)
    assert all(len(module._forward_pre_hooks) <= 1 for module in model)


def test_inputs_alone_leave_the_weights_contiguous():
    model = apply_channels_last(small_net(), weights=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("weights", [True, False])
def test_nothing_to_convert_warns(weights):
    with pytest.warns(UserWarning, match="Linear has no four-dimensional parameters"):
        apply_channels_last(nn.Linear(2, 2), weights=weights)


def test_class_acts_at_init_and_spares_sharded_weights():
    from types import SimpleNamespace

    from composer.core import Event

    algorithm = ChannelsLast()
    assert [event for event in Event if algorithm.match(event, SimpleNamespace(algorithms=[algorithm]))] == [Event.INIT]
    for config, converted in ((None, True), (object(), False)):
        model = small_net()
        algorithm.apply(Event.INIT, SimpleNamespace(model=model, fsdp_config=config), None)
        assert is_channels_last(model[0].weight) is converted
        assert formats_of_convolutions(model, torch.randn(1, 3, 20, 20))[0] == [True, True, True]
