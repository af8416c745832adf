"""The balanced sampler: each class equally often, for any ranks, workers and resumption, in every loader."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from data import Loader, TorchLoader
from data.draws import copies_of, images_of, occurrences
from data.loading.order import balanced_order, epoch_order, train_batches
from data.sources import ArraySource

pytestmark = pytest.mark.timeout(60)

LABELS = np.repeat([0, 1, 4], [40, 8, 2])[epoch_order(50, seed=0, epoch=9)]  # classes 2 and 3 have no images
N, C = len(LABELS), 3


def counts_of(order: np.ndarray) -> np.ndarray:
    """How often each image is in an epoch."""
    return np.bincount(images_of(order), minlength=N)


def test_an_epoch_has_its_length_and_each_class_equally_often() -> None:
    more = set()
    for epoch in range(20):
        order = balanced_order(LABELS, seed=3, epoch=epoch)
        of_classes = np.bincount(LABELS[images_of(order)], minlength=5)
        assert sorted(of_classes.tolist()) == [0, 0, 16, 17, 17]
        more |= set(np.flatnonzero(of_classes == 16))
        assert np.array_equal(order, balanced_order(LABELS, seed=3, epoch=epoch))
        assert not np.array_equal(order, balanced_order(LABELS, seed=4, epoch=epoch))
        assert len(set(order.tolist())) == N  # copies of an image have numbers of their own
        assert np.array_equal(occurrences(images_of(order), copies_of(order)), order)
        for label, count in zip((0, 1, 4), (40, 8, 2), strict=True):
            of_images, share = counts_of(order)[label == LABELS], of_classes[label]
            assert of_images.min() == share // count
            assert of_images.max() == -(-share // count)
    assert more == {0, 1, 4}  # which class is one short varies


def test_the_distribution_is_that_of_torchs_weighted_random_sampler() -> None:
    """The mean number of times that an image is in an epoch; bounds are 5 standard errors of torch's."""
    epochs = 400
    ours = np.mean([counts_of(balanced_order(LABELS, seed=0, epoch=epoch)) for epoch in range(epochs)], axis=0)
    weights = 1 / np.bincount(LABELS)[LABELS]
    generator = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(weights.tolist(), N * epochs, generator=generator)
    theirs = np.bincount(list(sampler), minlength=N) / epochs
    expected = N * weights / weights.sum()
    errors = np.sqrt(expected * (1 - expected / N) / epochs)
    assert (np.abs(theirs - expected) < 5 * errors).all()
    assert (np.abs(ours - expected) < 5 * errors).all()


def test_no_class_favors_a_place() -> None:
    epochs = 400
    labels = np.stack([LABELS[images_of(balanced_order(LABELS, seed=0, epoch=epoch))] for epoch in range(epochs)])
    shares = (labels == 0).mean(axis=0)
    assert np.abs(shares - 1 / C).max() < 5 * np.sqrt(1 / C * (1 - 1 / C) / epochs)


def test_the_orders_of_recorded_runs_stay() -> None:
    """Golden numbers: whatever changes them changes every recorded run."""
    order = balanced_order(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2]), seed=0, epoch=0)
    assert images_of(order).tolist() == [6, 2, 8, 6, 3, 7, 1, 8, 8]
    assert copies_of(order).tolist() == [0, 0, 1, 1, 0, 0, 0, 2, 0]


def test_data_of_equally_many_have_every_image_once() -> None:
    order = balanced_order(np.arange(30) % 3, seed=0, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(30))


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_ranks_batches_are_slices_of_the_order(drop_last: bool) -> None:
    settings = {"seed": 5, "epoch": 2, "drop_last": drop_last, "balanced_labels": LABELS}
    ranks = [train_batches(N, per_device_batch_size=7, rank=rank, world_size=2, **settings) for rank in (0, 1)]
    together = np.concatenate([np.concatenate(both) for both in zip(*ranks, strict=True)])
    whole = balanced_order(LABELS, seed=5, epoch=2)
    assert np.array_equal(together, whole[: 42 if drop_last else 50])


# --- loaders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven() -> ArraySource:
    """Images whose pixels tell the crop."""
    images = np.random.default_rng(0).integers(0, 256, (N, 40, 40, 3), dtype=np.uint8)
    return ArraySource(images, LABELS, class_names=tuple("abcde"), name="uneven")


def test_every_loader_serves_that_order(kind: str, uneven: ArraySource, loader_of: Callable[..., Loader]) -> None:
    loader = loader_of(uneven, kind, sampler="balanced", seed=2, drop_last=False)
    for epoch in range(2):
        order = balanced_order(LABELS, seed=2, epoch=epoch)
        indices = np.concatenate([loader.image_indices(epoch, batch) for batch in range(len(loader))])
        assert np.array_equal(indices, images_of(order))
        served = list(loader)
        assert torch.cat([labels for _, labels in served]).tolist() == LABELS[images_of(order)].tolist()
    images = torch.cat([images for images, _ in served])
    twice = np.flatnonzero((LABELS == 4)[images_of(order)])
    assert len(torch.unique(images[twice].flatten(1), dim=0)) == len(twice) > 10  # each copy is cropped in its own way


def test_ranks_workers_and_resumption_do_not_matter(
    kind: str, uneven: ArraySource, loader_of: Callable[..., Loader]
) -> None:
    settings = {"sampler": "balanced", "flip": "alternating", "seed": 2}
    whole = loader_of(uneven, kind, per_device_batch_size=10, **settings)
    whole.set_position(3)
    batches = list(whole)
    ranks = [loader_of(uneven, kind, rank=rank, world_size=2, num_workers=2, **settings) for rank in (0, 1)]
    for loader in ranks:
        loader.set_position(3, 2)
    for (images, labels), *parts in zip(batches[2:], *ranks, strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


def test_evaluation_sees_every_image_once(uneven: ArraySource) -> None:
    loader = TorchLoader(
        uneven, per_device_batch_size=20, image_size=8, train=False, num_workers=0, sampler="balanced"
    )  # fmt: skip
    assert torch.cat([labels for _, labels in loader]).tolist() == LABELS.tolist()


def test_another_sampler_is_refused(uneven: ArraySource) -> None:
    with pytest.raises(ValueError, match="sampler 'fair': give one of shuffled, balanced"):
        TorchLoader(uneven, per_device_batch_size=5, image_size=8, train=True, sampler="fair")
