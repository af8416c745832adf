"""Batches of indices: what all ranks see together."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.order import epoch_order, eval_batches, train_batches

AWKWARD = [(n, b) for n in (8, 9, 10, 40, 41, 101) for b in (2, 3, 7, 16, 64)]


def all_ranks(num_samples: int, world_size: int, batch_size: int, **settings) -> list[list[np.ndarray]]:
    return [
        train_batches(num_samples, per_device_batch_size=batch_size, rank=r, world_size=world_size, **settings)
        for r in range(world_size)
    ]


def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide():
    order = epoch_order(1000, seed=3, epoch=5)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert not np.array_equal(order, epoch_order(1000, seed=3, epoch=6))
    assert not np.array_equal(order, epoch_order(1000, seed=4, epoch=5))


def test_epoch_order_favors_no_place():
    """The mean place of an image over 400 epochs is within 5 standard errors of the middle."""
    places = np.stack([np.argsort(epoch_order(50, seed=0, epoch=e)) for e in range(400)])
    standard_error = np.sqrt((50**2 - 1) / 12 / 400)
    assert np.abs(places.mean(axis=0) - 24.5).max() < 5 * standard_error


def test_the_order_of_recorded_runs_stays():
    """Golden numbers: whatever changes them changes every recorded run."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [9, 5, 6, 2, 3, 4, 7, 1, 8, 0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_train_on_the_batches_of_one_process(world_size: int):
    ranks = all_ranks(100, world_size, 5, seed=1, epoch=2)
    single = all_ranks(100, 1, 5 * world_size, seed=1, epoch=2)[0]
    assert len(single) == 100 // (5 * world_size)
    for b, batch in enumerate(single):
        assert np.array_equal(np.concatenate([rank[b] for rank in ranks]), batch)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_training_without_drop_last_loses_less_than_an_image_a_rank(world_size: int):
    for num_samples, batch_size in AWKWARD:
        ranks = all_ranks(num_samples, world_size, batch_size, seed=0, epoch=0, drop_last=False)
        seen = np.concatenate([np.concatenate(batches) for batches in ranks])
        assert len({len(batches) for batches in ranks}) == 1
        assert len(set(seen)) == len(seen) > num_samples - world_size
        assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_sees_every_image_once(world_size: int):
    for num_samples, batch_size in AWKWARD:
        ranks = [
            eval_batches(num_samples, per_device_batch_size=batch_size, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        assert np.concatenate([np.concatenate(b) for b in ranks]).tolist() == list(range(num_samples))
        assert len({len(batches) for batches in ranks}) == 1
        assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)


def test_evaluation_in_batches_of_one():
    assert [b.tolist() for b in eval_batches(4, per_device_batch_size=1, rank=1, world_size=2)] == [[2], [3]]
    with pytest.raises(ValueError, match="batch size of at least 2"):
        eval_batches(3, per_device_batch_size=1, rank=0, world_size=2)


def test_too_few_images():
    with pytest.raises(ValueError, match=r"10 images do not make one batch of 8 .* at least 16 .* drop_last=False"):
        all_ranks(10, 2, 8, seed=0, epoch=0)
    assert len(all_ranks(10, 2, 8, seed=0, epoch=0, drop_last=False)[0]) == 1
    with pytest.raises(ValueError, match="3 images for 4 ranks"):
        eval_batches(3, per_device_batch_size=8, rank=0, world_size=4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        eval_batches(3, per_device_batch_size=8, rank=2, world_size=2)
