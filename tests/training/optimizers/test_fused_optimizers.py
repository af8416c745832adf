"""Optimizers by one kernel against those that they derive from: same weights, same state, each continues the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from composer import optim as composers
from ranks import needs_fsdp, run_ranks
from torch import nn
from torch._dynamo.testing import CompileCounter

from training.optimizers import decoupled, fused

STEPS = 4
SGDS = [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {}]
ADAMS = [{}, {"amsgrad": True}]
PAIRS = [
    *((fused.SGD, torch.optim.SGD, {"weight_decay": 0.01, **more}) for more in SGDS),
    *((decoupled.DecoupledSGDW, composers.DecoupledSGDW, {"weight_decay": 5e-4, **more}) for more in SGDS),
    *((fused.AdamW, torch.optim.AdamW, {"weight_decay": 0.01, **more}) for more in ADAMS),
    *((decoupled.DecoupledAdamW, composers.DecoupledAdamW, {"weight_decay": 5e-4, **more}) for more in ADAMS),
]
NAMES = [f"{theirs.__name__}-{'-'.join(more)}" for _, theirs, more in PAIRS]
ONE_EACH = [PAIRS[1], PAIRS[4], PAIRS[6], PAIRS[8]]
every_pair = pytest.mark.parametrize(("ours", "theirs", "more"), PAIRS, ids=NAMES)
one_of_each = pytest.mark.parametrize(
    ("ours", "theirs", "more"), ONE_EACH, ids=[theirs.__name__ for _, theirs, _ in ONE_EACH]
)


def network(dtype: torch.dtype = torch.float64) -> Any:
    """Weights of several shapes, among them one of more elements than go one by one, and a frozen one."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5), nn.Linear(150, 250), nn.Linear(2, 2))
    made[4].requires_grad_(False)
    return made.to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, start: int = 0, stop: int = STEPS) -> None:
    """Steps along gradients that depend on the step alone, at a rate that falls; the second misses a gradient."""
    for step in range(start, stop):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        give_gradients(model, step)
        if step == 1:
            next(model.parameters()).grad = None
        optimizer.step()


def give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, dtype=weight.dtype))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}]


def assert_same(a: nn.Module, b: nn.Module, *, tolerance: float = 1e-14) -> None:
    for name, weight in a.named_parameters():
        torch.testing.assert_close(weight, b.get_parameter(name), rtol=tolerance, atol=tolerance, msg=name)


@every_pair
def test_weights_and_state_are_those_of_the_class_it_derives_from(ours: Any, theirs: Any, more: Any) -> None:
    a, b = network(), network()
    own, other = ours(groups_of(a), lr=0.1, **more), theirs(groups_of(b), lr=0.1, **more)
    assert isinstance(own, theirs)
    assert type(own).__qualname__ == theirs.__qualname__  # Composer's checkpoints name it so
    train(a, own)
    train(b, other)
    assert_same(a, b)
    own_state, other_state = own.state_dict(), other.state_dict()
    assert own_state["param_groups"] == other_state["param_groups"]
    for key, state in other_state["state"].items():
        torch.testing.assert_close(own_state["state"][key], state, rtol=1e-13, atol=1e-13)


@one_of_each
def test_a_checkpoint_of_either_continues_the_other(ours: Any, theirs: Any, more: Any) -> None:
    whole = network()
    train(whole, theirs(groups_of(whole), lr=0.1, **more))
    for first, second in ((ours, theirs), (theirs, ours)):
        begun = network()
        saved = first(groups_of(begun), lr=0.1, **more)
        train(begun, saved, stop=2)
        continued = copy.deepcopy(begun)
        loaded = second(groups_of(continued), lr=0.1, **more)
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
        train(continued, loaded, start=2)
        assert_same(continued, whole)


@one_of_each
def test_gradients_and_state_may_lie_otherwise_in_memory(ours: Any, theirs: Any, more: Any) -> None:
    """As after channels_last converts the model of a checkpoint; torch's kernel would mix up the elements."""
    whole, begun = network(), network()
    train(whole, theirs(groups_of(whole), lr=0.1, **more))
    saved = ours(groups_of(begun), lr=0.1, **more)
    train(begun, saved, stop=2)
    converted: Any = copy.deepcopy(begun).to(memory_format=torch.channels_last)
    loaded = ours(groups_of(converted), lr=0.1, **more)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(converted, loaded, start=2, stop=3)
    give_gradients(converted, 3)
    for weight in converted.parameters():
        weight.grad = weight.grad if weight.grad is None else weight.grad.contiguous()
    assert converted[0].weight.stride() != converted[0].weight.grad.stride()
    loaded.param_groups[0]["lr"] = 0.1 / 4
    loaded.step()
    assert_same(converted, whole)
    assert next(iter(loaded.state[converted[0].weight].values())).stride() in ((), converted[0].weight.stride())


@one_of_each
def test_weights_that_no_kernel_takes_are_updated_too(ours: Any, theirs: Any, more: Any) -> None:
    made, stepped = [], []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        gaps = nn.Parameter(torch.randn(4, 6, dtype=torch.float64)[:, :3])
        optimizer = kind([gaps, nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1, **more)
        optimizer.register_step_post_hook(lambda *_: stepped.append(1))
        for _ in range(STEPS):
            gaps.grad = torch.randn(4, 3, dtype=torch.float64)
            optimizer.step()
        made.append(gaps.detach())
    torch.testing.assert_close(*made, rtol=1e-14, atol=1e-14)
    assert len(stepped) == 2 * STEPS


@one_of_each
def test_a_closure_and_a_rate_that_is_a_tensor(ours: Any, theirs: Any, more: Any) -> None:
    a, b = network(), network()
    rate = torch.tensor(0.1, dtype=torch.float64)
    own, other = ours(a.parameters(), lr=rate, **more), theirs(b.parameters(), lr=0.1, **more)

    def closure(model: nn.Module, seed: int) -> float:
        assert torch.is_grad_enabled()
        give_gradients(model, seed)
        return 1.5

    for step in range(STEPS):
        rate.fill_(0.1 / (1 + step))
        other.param_groups[0]["lr"] = 0.1 / (1 + step)
        assert own.step(lambda step=step: closure(a, step)) == 1.5
        other.step(lambda step=step: closure(b, step))
    assert_same(a, b)


@one_of_each
def test_a_gradient_scaler_leaves_division_and_skipping_to_the_kernel(ours: Any, theirs: Any, more: Any) -> None:
    """The first step overflows: it changes neither weights nor what the second does."""
    a, b = network(torch.float32), network(torch.float32)
    own, other = ours(a.parameters(), lr=0.1, **more), theirs(b.parameters(), lr=0.1, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # pyright: ignore[reportPrivateImportUsage]
    for step in range(STEPS):
        give_gradients(a, step)
        for weight in a[:4].parameters():
            weight.grad = scaler.scale(weight.grad)
        if step == 0:
            a[0].weight.grad.view(-1)[0] = torch.inf
        before = [weight.clone() for weight in a.parameters()]
        assert own._step_supports_amp_scaling
        scaler.step(own)
        scaler.update()
        if step == 0:
            assert all(map(torch.equal, before, a.parameters()))
            continue
        give_gradients(b, step)
        other.step()
    assert_same(a, b, tolerance=1e-6)
    assert not any(hasattr(own, name) for name in ("grad_scale", "found_inf"))


@one_of_each
def test_a_step_compiles_to_one_graph_for_all_rates(ours: Any, theirs: Any, more: Any) -> None:
    counter = CompileCounter()
    a, b = network(), network()
    rate = torch.tensor(0.1, dtype=torch.float64)
    own, other = ours(a.parameters(), lr=rate, **more), theirs(b.parameters(), lr=0.1, **more)
    give_gradients(a, 0)
    own.step()  # makes the state
    give_gradients(b, 0)
    other.step()
    compiled = torch.compile(own.step, backend=counter, fullgraph=True)
    for step in range(1, STEPS):
        rate.fill_(0.1 / (1 + step))
        other.param_groups[0]["lr"] = 0.1 / (1 + step)
        give_gradients(a, step)
        give_gradients(b, step)
        compiled()
        other.step()
    assert_same(a, b)
    assert counter.frame_count == 1


@needs_fsdp
def test_two_ranks_update_their_shards() -> None:
    run_ranks(2, "tests/training/optimizers/fused_optimizer_ranks.py", timeout=60)
