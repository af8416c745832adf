"""Self-attention against torch's own module and the formula: values, derivatives, draws, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vision_transformer import EncoderBlock

from models.attention import SelfAttention
from models.vit import Block

TOKENS = (3, 7, 12)


def torchs(**settings: Any) -> nn.MultiheadAttention:
    """torch's module, with no bias at zero."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **settings)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"dropout": 0.4}], ids=str)
def test_values_derivatives_and_draws_are_torchs(settings: dict[str, Any], training: bool) -> None:
    theirs = torchs(**settings).train(training)
    ours = SelfAttention(copy.deepcopy(theirs)).train(training)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        tokens = torch.randn(TOKENS, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(2)
        mixed = module(tokens, tokens, tokens, need_weights=False)[0] if module is theirs else module(tokens)
        (mixed * torch.linspace(-1, 1, mixed.numel(), dtype=torch.float64).view_as(mixed)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"mixed": mixed, "tokens": tokens.grad, **gradients})
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_it_is_the_formula() -> None:
    ours, tokens = SelfAttention(torchs()), torch.randn(TOKENS, dtype=torch.float64)
    assert ours.in_proj_bias is not None
    query, key, value = (
        (tokens @ matrix.T + bias).view(3, 7, 3, 4).transpose(1, 2)
        for matrix, bias in zip(ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True)
    )
    shares = torch.softmax(query @ key.transpose(-1, -2) / 2, dim=-1)
    expected = (shares @ value).transpose(1, 2).reshape(TOKENS) @ ours.out_proj.weight.T + ours.out_proj.bias
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-12, atol=1e-12)


def test_a_block_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = EncoderBlock(3, 12, 24, 0.0, 0.0).double()
    torch.manual_seed(0)
    ours = Block(3, 12, 24, 0.0, 0.0).double()
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())  # the same draws
    for name, value in state.items():
        value.add_(torch.linspace(-0.3, 0.3, value.numel(), dtype=value.dtype).view_as(value))
        ours.get_parameter(name).data.copy_(value)
    tokens = torch.randn(TOKENS, dtype=torch.float64)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-12, atol=1e-12)


class Copies(TorchDispatchMode):
    """Counts copies."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def test_queries_keys_and_values_are_not_copied() -> None:
    theirs, tokens = torchs(), torch.randn(TOKENS, dtype=torch.float64)
    with Copies() as ours_made:
        SelfAttention(theirs)(tokens)
    with Copies() as theirs_made:
        theirs(tokens, tokens, tokens, need_weights=False)
    assert ours_made.number < theirs_made.number


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_first": False}, "batch_first=False"),
        ({"kdim": 5}, "kdim or vdim"),
        ({"add_bias_kv": True, "add_zero_attn": True}, "add_bias_kv, add_zero_attn"),
    ],
)
def test_other_attentions_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(
        ValueError, match=f"received an attention with {says}, which is not known here; make it without"
    ):
        SelfAttention(nn.MultiheadAttention(12, 3, **{"batch_first": True, **settings}))
