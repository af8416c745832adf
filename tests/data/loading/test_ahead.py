"""How far the loader decodes ahead: the rule, its bounds, and that no pixel depends on it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data import FFCVLoader
from data.loading.ahead import MOST_AHEAD_BYTES, Ahead, batches_for_spread
from data.loading.to_device import HostBuffers

pytestmark = pytest.mark.timeout(60)


def test_the_rule():
    """The backlog at a load of 95 % is exponential with a mean of 10 cv²; one in 1,000 is above ln(1000) of that."""
    assert [batches_for_spread(cv) for cv in (0.0, 0.1, 0.17, 0.2, 0.3, 0.5, 1.0)] == [2, 2, 2, 3, 7, 18, 70]
    for cv in (0.2, 0.4, 0.8):
        assert math.exp(-batches_for_spread(cv) / (10 * cv**2)) <= 0.001


def test_the_rule_covers_a_queue_as_it_happens():
    """Gamma-distributed times at a load of 95 %: fewer than one backlog in 1,000 exceeds the rule, and some do."""
    cv = 0.5
    times = np.random.default_rng(0).gamma(1 / cv**2, 0.95 * cv**2, 2_000_000)
    deficit = np.cumsum(times - 1.0)
    backlog = deficit - np.minimum.accumulate(deficit)  # Lindley's recursion, in steps of the consumer
    assert 0.0001 < (backlog > batches_for_spread(cv)).mean() < 0.001
    assert (backlog > 2).mean() > 0.2


def feed(ahead: Ahead, seconds: list[float]) -> list[int]:
    return [ahead.after(one) for one in seconds]


def test_auto_follows_the_spread_of_the_last_batches():
    ahead = Ahead("auto")
    assert ahead.begin(1000) == 2
    assert feed(ahead, [1.0, 2.0] * 16) == [2] * 31 + [batches_for_spread(1 / 3)]
    assert ahead.begin(1000) == batches_for_spread(1 / 3) == 8
    assert feed(ahead, [1.0] * 1024)[-1] == 2
    feed(ahead, [1.0, 2.0] * 512)
    assert ahead.begin(1000) == 8
    assert ahead.begin(2000) == 2  # another size has other times


def test_auto_keeps_to_its_memory():
    for batch_bytes, most in ((MOST_AHEAD_BYTES // 5, 5), (MOST_AHEAD_BYTES, 2), (3 * MOST_AHEAD_BYTES, 2)):
        ahead = Ahead("auto")
        ahead.begin(batch_bytes)
        assert feed(ahead, [1.0, 9.0] * 16)[-1] == most


def test_a_given_number_is_kept():
    ahead = Ahead(5)
    assert ahead.begin(10**12) == 5
    assert feed(ahead, [1.0, 9.0] * 100) == [5] * 200


@pytest.mark.parametrize("setting", [0, -1, 1.5, "many", True, None])
def test_other_settings_are_refused(setting: object):
    with pytest.raises(ValueError, match=f"batches_ahead {setting}: give auto or a whole number of at least 1"):
        Ahead(setting)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_order_and_pixels_do_not_depend_on_it(digits_beton: Path, num_workers: int):
    def batches(batches_ahead: int | str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = FFCVLoader(
            digits_beton, per_device_batch_size=30, image_size=12, train=True, num_workers=num_workers,
            batches_ahead=batches_ahead,
        )  # fmt: skip
        loader.set_position(2, 5)
        return list(loader)

    expected = batches(2)
    for batches_ahead in (1, 7, 100, "auto"):
        found = batches(batches_ahead)
        assert len(found) == len(expected) == 42
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batches_ahead", [1, 4])
def test_no_more_memory_is_taken_than_promised(digits_beton: Path, monkeypatch: pytest.MonkeyPatch, batches_ahead: int):
    taken: list[int] = []
    original = HostBuffers.take
    monkeypatch.setattr(HostBuffers, "take", lambda self, n, px: taken.append(n) or original(self, n, px))
    loader = FFCVLoader(
        digits_beton, per_device_batch_size=32, image_size=8, train=True, num_workers=4, batches_ahead=batches_ahead
    )
    for served, _ in enumerate(loader, start=1):
        # Four parts a batch: one batch is being decoded, and the next part may belong to another.
        assert len(taken) <= served + batches_ahead + 2
    assert len(taken) == served == 44
