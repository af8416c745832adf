"""A rank: Muon and schedule-free optimizers on FSDP2's shards against whole weights, one of them of one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.optimizers.fused import AdamW
from training.optimizers.muon import Muon
from training.optimizers.schedule_free import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 2), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(3, 1, bias=False)]
    return nn.Sequential(*layers).double()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and len(weight) > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1 or len(weight) == 1]
    return Muon(matrices, lr=0.1, others=AdamW(others, lr=0.01))


def free_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return ScheduleFreeSGD(model.parameters(), lr=0.1, weight_decay=0.01)


def free_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return ScheduleFreeAdamW(model.parameters(), lr=0.1, weight_decay=0.01)


def assert_same(sharded: nn.Module, whole: nn.Module) -> None:
    for mine, weight in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor(), weight, rtol=0, atol=1e-14)


def main() -> None:
    distributed.init_process_group("gloo")
    for make in (muon, free_sgd, free_adamw):
        sharded, whole = network(), network()
        fully_shard(sharded)
        own, other = make(sharded), make(whole)
        for step in range(3):
            torch.manual_seed(step)
            for mine, weight in zip(sharded.parameters(), whole.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                weight.grad = torch.randn_like(weight)
                mine.grad = distribute_tensor(weight.grad, mine.device_mesh, mine.placements)
            own.step()
            other.step()
        assert_same(sharded, whole)
        if isinstance(own, ScheduleFree) and isinstance(other, ScheduleFree):
            own.eval()
            other.eval()
            assert_same(sharded, whole)
        states: Any = own.state.values()
        for state in states:
            assert all(isinstance(value, DTensor) for key, value in state.items() if key != "step"), state.keys()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
