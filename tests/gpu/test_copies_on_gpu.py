"""The copy of a state that a thread writes while training goes on."""

from __future__ import annotations

import pytest
import torch

from training.checkpoints.background import Copies

pytestmark = pytest.mark.gpu


def test_a_copy_of_a_state_is_complete_before_the_next_step(device: torch.device) -> None:
    weights = torch.randn(4096, 4096, device=device)
    state = {"weights": weights, "momentum": weights.to(torch.bfloat16), "step": torch.tensor(3.0)}
    copies, expected = Copies(), {name: value.cpu().clone() for name, value in state.items()}
    for _ in range(2):  # the second time into the memory of the first
        copy = copies.of(state)
        for value in state.values():
            value.zero_()
        assert all(torch.equal(copy[name], expected[name]) for name in expected)
        for name, value in state.items():
            value.copy_(expected[name])
