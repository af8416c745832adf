"""Muon against its formula, torch's, pytorch_optimizer's; one object for all weights; sharded and resumed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from ranks import needs_fsdp, run_ranks
from torch import nn

from training.optimizers import build_optimizer, check_settings, other_peak_learning_rate, settings_of
from training.optimizers.fused import AdamW
from training.optimizers.muon import SCALES, Muon, orthogonalize, update_scale
from training.recipe.schema import parse

SHAPES = ((24, 8), (8, 24), (6, 6), (6, 6))
CONVOLUTION = (8, 3, 2, 2)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(parameters: Any, seed: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def step_both(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, *, steps: int = 4) -> None:
    for step in range(steps):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            give_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()


def newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """By singular values: the polynomial acts on each alone."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_orthogonalization_acts_on_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack([newton_schulz(one) for one in matrices])
    torch.testing.assert_close(orthogonalize(matrices), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(orthogonalize(matrices[0]), expected[0], rtol=0, atol=1e-12)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert orthogonalize(torch.zeros(3, 4)).equal(torch.zeros(3, 4))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_follow_the_formula(scale: Any, nesterov: bool) -> None:
    made = weights((9, 4), CONVOLUTION, dtype=torch.float64)
    expected = [one.detach().clone() for one in made]
    momenta = [torch.zeros_like(one) for one in expected]
    optimizer = Muon(made, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2, adjust_lr_fn=scale)
    for step in range(3):
        give_gradients(made, step)
        optimizer.step()
        for index, one in enumerate(made):
            assert one.grad is not None
            momenta[index] = 0.9 * momenta[index] + 0.1 * one.grad
            update = 0.1 * one.grad + 0.9 * momenta[index] if nesterov else momenta[index]
            flat = update.reshape(len(update), -1)
            rows, columns = flat.shape
            factor = 0.2 * math.sqrt(max(rows, columns)) if scale != "original" else math.sqrt(max(1, rows / columns))
            step_taken = 0.1 * factor * newton_schulz(flat).reshape(update.shape)
            expected[index] = expected[index] * (1 - 0.1 * 0.2) - step_taken
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=1e-5)  # orthogonalized in float32


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("scale", SCALES)
def test_matrices_are_updated_as_by_torchs(scale: Any) -> None:
    apart, batched = weights(*SHAPES[:3]), weights(*SHAPES[2:])  # matrices of one shape go in batches, by other kernels
    for mine, tolerance in ((apart, 0.0), (batched, 4e-4)):
        theirs = copy.deepcopy(mine)
        step_both(
            Muon(mine, lr=0.1, adjust_lr_fn=scale, newton_schulz_dtype="bfloat16"),
            torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn=scale),  # pyright: ignore[reportAttributeAccessIssue]
        )
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_matrices_and_convolutions_are_updated_as_by_pytorch_optimizers() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    mine = weights(*SHAPES[:3], CONVOLUTION)
    theirs = copy.deepcopy(mine)
    step_both(
        Muon(mine, lr=0.1, weight_decay=0.1, newton_schulz_dtype="bfloat16"),
        library.Muon([{"params": theirs, "use_muon": True}], lr=0.1, weight_decay=0.1, weight_decouple=True),
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # bfloat16, whose operations it orders otherwise


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))


def muon_settings(**given: Any) -> dict[str, Any]:
    others = {"learning_rate": 0.003, "weight_decay": 0.05, **given.pop("others", {})}
    name = others.pop("name", "adamw")
    parsed = parse(settings_of("muon"), {"learning_rate": 0.02, **given}, path="optimizer")
    return {"name": "muon", **parsed, "others": {"name": name, **parse(settings_of(name), others, path="others")}}


def test_all_other_weights_are_updated_as_by_adamw_alone_and_all_rates_scale_together() -> None:
    network, alone = small_network(), small_network()
    optimizer = build_optimizer(network, muon_settings(), learning_rate=0.04, matrices=["2.weight"])
    others = [weight for name, weight in alone.named_parameters() if name != "2.weight"]
    decayed = [weight for weight in others if weight.ndim > 1]
    rest = [weight for weight in others if weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    reference = AdamW(groups, lr=0.006)  # in the recipe's proportion to the given one
    assert [group["lr"] for group in optimizer.param_groups] == [0.04, 0.006, 0.006]
    for step in range(3):
        give_gradients(network.parameters(), step)
        give_gradients(alone.parameters(), step)
        optimizer.step()
        reference.step()
    for (name, mine), theirs in zip(network.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs) == (name != "2.weight"), name


@pytest.mark.parametrize("others", ["adamw", "sgd"])
def test_a_saved_state_continues_bit_for_bit(others: str) -> None:
    settings = muon_settings(others={"name": others})
    whole, cut = small_network(), small_network()
    first = build_optimizer(whole, settings, learning_rate=0.02, matrices=["2.weight"])
    second = build_optimizer(cut, settings, learning_rate=0.02, matrices=["2.weight"])
    for step in range(5):
        if step == 2:
            second = build_optimizer(cut, settings, learning_rate=0.02, matrices=["2.weight"])
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for network, optimizer in ((whole, first), (cut, second)):
            give_gradients(network.parameters(), step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn is 'none'; it must be one of original, match_rms_adamw"),
        ({"newton_schulz_dtype": "fp8"}, "newton_schulz_dtype is 'fp8'; it must be one of auto, bfloat16, float32"),
        ({"newton_schulz_steps": 0}, r"newton_schulz_steps is 0; it must lie in \[1, 20\]"),
        (
            {"learning_rate": None, "learning_rate_per_256_images": 0.1},
            "learning_rate_per_256_images is given for the matrices; give others.learning_rate_per_256_images too",
        ),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_settings(muon_settings(**given))


def test_both_rates_go_with_the_batch() -> None:
    rates = {"learning_rate": None, "learning_rate_per_256_images": 0.1}
    settings = muon_settings(**rates, others={"learning_rate": None, "learning_rate_per_256_images": 0.02})
    assert other_peak_learning_rate(settings, 0.4) == pytest.approx(0.08)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a weight of shape \[3\] is no matrix"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_the_update_of_match_rms_adamw_has_adamws_size() -> None:
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    update = update_scale(64, 256, "match_rms_adamw") * orthogonalize(matrix)
    assert 0.15 < float(update.square().mean().sqrt()) < 0.25


@needs_fsdp
def test_two_ranks_update_shards_as_one_process_updates_the_whole() -> None:
    run_ranks(2, "tests/training/optimizers/sharded_ranks.py", timeout=60)
