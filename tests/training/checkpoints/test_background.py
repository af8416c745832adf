"""A copy in memory that training does not change, and a thread whose mistakes come back."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch
from ranks import one_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from training.checkpoints.background import Background, Copies


def test_a_copy_is_equal_and_nobody_elses() -> None:
    weight = torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last)
    given = {
        "model": OrderedDict(a=weight, tied=weight.view_as(weight), part=weight[:, 1]),
        "steps": [1, (2, "x")],
        3: None,
    }
    copies = Copies()
    copy = copies.of(given)
    expected = weight.clone()
    weight.add_(1)
    given["steps"].append(4)  # pyright: ignore
    assert torch.equal(copy["model"]["a"], expected)
    assert torch.equal(copy["model"]["part"], expected[:, 1])
    assert copy["model"]["a"].stride() == weight.stride()
    assert copy["model"]["a"] is copy["model"]["tied"]
    assert isinstance(copy["model"], OrderedDict)
    assert copy["steps"] == [1, (2, "x")]
    assert copy[3] is None
    before = copy["model"]["a"].data_ptr()
    again = copies.of(given)
    assert again["model"]["a"].data_ptr() == before
    assert torch.equal(again["model"]["a"], weight)
    assert torch.equal(again["model"]["part"], weight[:, 1])


_NUMBERS = torch.arange(60.0)
LAYOUTS = {
    "whole": _NUMBERS,
    "transposed": _NUMBERS.view(6, 10).t(),
    "with gaps": _NUMBERS[::2],
    "columns": _NUMBERS.view(6, 10)[:, 2:5],
    "a column": _NUMBERS.view(6, 10)[:, 3:4],
    "a row": _NUMBERS.view(6, 10)[2:3],
    "expanded": _NUMBERS[3].expand(4, 5),
    "overlapping": _NUMBERS.as_strided((5, 5), (1, 1)),
    "half": _NUMBERS.bfloat16(),
    "bits": _NUMBERS > 30,
    "a number": _NUMBERS[7],
    "conjugated": torch.complex(_NUMBERS, -_NUMBERS).conj(),
    "negated": torch.complex(_NUMBERS, _NUMBERS).conj().imag,
    "nothing": _NUMBERS[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_copied(layout: str) -> None:
    value, copies = LAYOUTS[layout], Copies()
    for _ in range(2):  # into new memory, and into that of the copy before
        copy = copies.of([value])[0]
        assert (copy.shape, copy.dtype) == (value.shape, value.dtype)
        assert torch.equal(copy, value)
        assert not value.numel() or copy.data_ptr() != value.data_ptr()


def test_a_part_of_a_sharded_tensor_stays_one() -> None:
    with one_rank():
        mesh = init_device_mesh("cpu", (1,))
        weight = DTensor.from_local(torch.arange(6.0).reshape(3, 2), mesh, [Shard(0)])
        copy = Copies().of({"weight": weight})["weight"]
        weight.to_local().zero_()
        assert type(copy) is DTensor
        assert (copy.device_mesh, copy.placements, copy.shape) == (mesh, (Shard(0),), (3, 2))
        assert torch.equal(copy.to_local(), torch.arange(6.0).reshape(3, 2))


def test_one_thing_at_a_time_and_an_error_comes_back_once() -> None:
    background, order, go = Background(), [], threading.Event()

    def first() -> None:
        go.wait(10)
        order.append("first")
        raise OSError("full")

    background.start(first)
    assert not order
    go.set()
    with pytest.raises(OSError, match="full"):
        background.start(lambda: order.append("second"))
    background.start(lambda: order.append("third"))
    background.wait()
    background.wait()
    assert order == ["first", "third"]
