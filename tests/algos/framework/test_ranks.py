"""DistributedDataParallel averages the parameters trained after a change, in a custom loop on two gloo ranks."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algos import FixRes, freeze_for_fixres
from algos.framework import ranks
from algos.framework.ranks import average_what_is_trained

WAYS = {"plain": {}, "static": {"static_graph": True}, "views": {"gradient_as_bucket_view": True}, "hooked": {}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)).double()


def images(step: int) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(model: nn.Module, inner: nn.Module, shard: slice) -> dict[str, Tensor]:
    """Two steps of all layers, two of the classifier alone, two of all again; weight decay would tell a stale one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(6):
        if step == 2:
            freeze_for_fixres(model, train="classifier")
        if step == 4:
            with average_what_is_trained(model):
                model.requires_grad_(True)
        optimizer.zero_grad()
        model(images(step)[shard]).square().mean().backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in inner.named_parameters()}


def train_ranks(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, found, averaged = torch.distributed.get_rank(), {}, [0]

    def average(state, bucket):  # torch compares annotations with its own, which are no strings
        averaged[0] += bucket.buffer().numel()
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    for way, settings in WAYS.items():
        inner = network()
        model = DistributedDataParallel(inner, **settings)
        if way == "hooked":
            model.register_comm_hook(None, average)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[way] = train(model, inner, slice(4 * rank, 4 * rank + 4))
    torch.save((found, averaged[0]), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_ranks_average_what_is_trained_and_no_more(tmp_path: Path) -> None:
    run_ranks(2, __file__, str(tmp_path), timeout=100)
    alone = network()
    expected = train(alone, alone, slice(8))
    everything = sum(parameter.numel() for parameter in alone.parameters())
    classifier = sum(parameter.numel() for parameter in alone[-1].parameters())
    for rank in (0, 1):
        found, averaged = torch.load(tmp_path / f"rank{rank}.pt")
        assert list(found) == list(WAYS)
        for way in WAYS:
            for name, weight in expected.items():
                torch.testing.assert_close(found[way][name], weight, rtol=0, atol=1e-14, msg=f"{way}: {name}")
        assert averaged == 4 * everything + 2 * classifier


def test_a_torch_without_the_means_looks_for_unused_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not FixRes(epochs=1).find_unused_parameters
    monkeypatch.setattr(ranks, "_BUILDERS", ("_not_there",))
    assert FixRes(epochs=1).find_unused_parameters
    assert not FixRes(epochs=1, train="all").find_unused_parameters


if __name__ == "__main__":
    train_ranks(Path(sys.argv[1]))
