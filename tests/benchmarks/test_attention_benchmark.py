"""The benchmark of attention: that it runs, and that its two networks are one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import attention
from models.vit import vit_digits


def test_a_ratio_is_printed_for_each_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.SIZES, "cpu", [("vit_digits", 8, 2)])
    assert attention.main(["--rounds", "1"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["network", "px", "batch", "ms"]
    assert row.split()[:3] == ["vit_digits", "8", "2"]
    assert float(row.split()[4]) > 0


def test_both_networks_have_the_same_parameters_and_other_attention() -> None:
    torch.manual_seed(0)
    ours = vit_digits(num_classes=3)
    torch.manual_seed(0)
    theirs = attention.with_torchs_attention("vit_digits", num_classes=3)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert [sum(isinstance(one, nn.MultiheadAttention) for one in net.modules()) for net in (ours, theirs)] == [0, 4]
