"""How far the loader decodes ahead: the rule, its bounds, and that no pixel depends on it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data import FFCVLoader
from data.loading.ahead import MOST_AHEAD_BYTES, Ahead, batches_for_times
from data.loading.to_device import HostBuffers

pytestmark = pytest.mark.timeout(60)


def test_the_rule_is_the_largest_backlog():
    """Step by step, for times in any order; and 2 where none is larger."""
    rng = np.random.default_rng(0)
    for times in (rng.gamma(4, 1, 500), np.sort(rng.gamma(4, 1, 500)), np.repeat(rng.gamma(4, 1, 50), 10)):
        backlog = largest = 0.0
        for one in times / times.mean() * 0.95:
            backlog = max(0.0, backlog + one - 1)
            largest = max(largest, backlog)
        assert batches_for_times(times) == max(2, math.ceil(largest))
    assert batches_for_times(np.ones(100)) == 2
    assert batches_for_times(rng.normal(1, 0.05, 1000)) == 2


def test_independent_times_need_what_theory_says():
    """Kingman 1962: the backlog is nearly exponential with a mean of cv² / (2 (1 - load)) = 10 cv² batches."""
    cv = 0.5
    found = [batches_for_times(np.random.default_rng(seed).gamma(1 / cv**2, cv**2, 1024)) for seed in range(50)]
    assert 10 * cv**2 * math.log(20) < np.median(found) < 10 * cv**2 * math.log(5000)


def test_slow_batches_in_a_row_need_more_than_the_same_ones_apart():
    apart = np.tile([1.0] * 9 + [2.0], 100)
    in_a_row = np.sort(apart.reshape(10, 100), axis=1).ravel()
    assert batches_for_times(apart) == 2
    assert batches_for_times(in_a_row) >= 7


def feed(ahead: Ahead, seconds: list[float]) -> list[int]:
    return [ahead.after(one) for one in seconds]


def test_auto_follows_the_times_of_the_last_batches():
    slow_in_a_row = [1.0] * 16 + [2.0] * 16
    asked = batches_for_times(np.array(slow_in_a_row))
    assert asked == 5
    ahead = Ahead("auto")
    assert ahead.begin(1000) == 2
    assert feed(ahead, slow_in_a_row) == [2] * 31 + [asked]
    assert ahead.begin(1000) == asked
    assert feed(ahead, [1.0] * 1024)[-1] == 2
    feed(ahead, slow_in_a_row)
    assert ahead.begin(1000) > 2
    assert ahead.begin(2000) == 2  # another size has other times


def test_auto_keeps_to_its_memory():
    for batch_bytes, most in ((MOST_AHEAD_BYTES // 5, 5), (MOST_AHEAD_BYTES, 2), (3 * MOST_AHEAD_BYTES, 2)):
        ahead = Ahead("auto")
        ahead.begin(batch_bytes)
        assert feed(ahead, [1.0] * 16 + [9.0] * 16)[-1] == most


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
