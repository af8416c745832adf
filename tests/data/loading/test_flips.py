"""Alternating flips: every loader obeys the formula, in every epoch, for any ranks, workers and resumption."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from data import Loader
from data.decoding.crops import CropSettings, mirrored
from data.draws import Operation, occurrences, uniforms
from data.sources import ArraySource

pytestmark = pytest.mark.timeout(60)

N = 24
SEED = 7
EPOCHS = 5
WHOLE = {"crop_scale": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "drop_last": False, "seed": SEED}


@pytest.fixture(scope="module")
def halves() -> ArraySource:
    """Images that are dark on the left, each with a label of its own."""
    images = np.zeros((N, 8, 8, 3), dtype=np.uint8)
    images[:, :, 4:] = 200
    return ArraySource(images, np.arange(N), class_names=tuple(map(str, range(N))), name="halves")


def seen_mirrored(loader: Loader) -> dict[int, bool]:
    """Whether each image of the next pass comes mirrored."""
    return {
        int(label): bool(image[:, :, 0].float().mean() > 100)
        for images, labels in loader
        for image, label in zip(images, labels, strict=True)
    }


def expected(epoch: int, images: np.ndarray) -> np.ndarray:
    """The formula: a bit of seed and image alone, turned around in odd epochs."""
    first = uniforms(images, seed=SEED, epoch=0, operation=Operation.FLIP)[:, 0] < 0.5
    return ~first if epoch % 2 else first


def test_an_image_is_mirrored_in_every_second_epoch(
    kind: str, halves: ArraySource, loader_of: Callable[..., Loader]
) -> None:
    loader = loader_of(halves, kind, flip="alternating", **WHOLE)
    epochs = [seen_mirrored(loader) for _ in range(EPOCHS)]
    for epoch, seen in enumerate(epochs):
        assert seen == dict(enumerate(expected(epoch, np.arange(N)).tolist()))
    for before, after in pairwise(epochs):
        assert all(before[image] != after[image] for image in range(N))
    assert 0 < sum(epochs[0].values()) < N


def test_ranks_workers_and_resumption_do_not_matter(
    kind: str, halves: ArraySource, loader_of: Callable[..., Loader]
) -> None:
    settings = {"flip": "alternating", "world_size": 2, "per_device_batch_size": 3, "num_workers": 2, **WHOLE}
    ranks = [loader_of(halves, kind, rank=rank, **settings) for rank in (0, 1)]
    for position in ((0, 0), (3, 0), (4, 2)):  # the last in the middle of an epoch
        seen = {}
        for loader in ranks:
            loader.set_position(*position)
            seen.update(seen_mirrored(loader))
        images = np.array(sorted(seen))
        assert len(images) == (N if position[1] == 0 else N - 2 * 6)
        np.testing.assert_array_equal([seen[image] for image in images], expected(position[0], images))


def test_none_mirrors_nothing_and_random_stays_what_it_was(
    kind: str, halves: ArraySource, loader_of: Callable[..., Loader]
) -> None:
    assert not any(seen_mirrored(loader_of(halves, kind, flip="none", **WHOLE)).values())
    loader = loader_of(halves, kind, **WHOLE)
    loader.set_position(3)
    drawn = uniforms(np.arange(N), seed=SEED, epoch=3, operation=Operation.FLIP)[:, 0] < 0.5
    assert seen_mirrored(loader) == dict(enumerate(drawn.tolist()))


@pytest.mark.parametrize("crop_ratio", [None, 0.875])
def test_only_the_flip_changes(crop_ratio: float | None) -> None:
    images, sides = np.arange(200), np.full(200, 90)
    rows = [
        CropSettings(flip=flip, crop_ratio=crop_ratio).rows(images, sides, sides, seed=1, epoch=3, augment=True)
        for flip in ("random", "alternating", "none")
    ]
    for other in rows[1:]:
        np.testing.assert_array_equal(other[:, :4], rows[0][:, :4])
    assert not np.array_equal(rows[1][:, 4], rows[0][:, 4])


def test_the_copies_of_an_image_in_one_epoch_alternate_too() -> None:
    images = np.repeat(np.arange(50), 3)
    drawn = occurrences(images, np.tile([0, 1, 2], 50))
    for epoch in (0, 1):
        flips = mirrored(drawn, seed=SEED, epoch=epoch, flip="alternating").reshape(50, 3)
        np.testing.assert_array_equal(flips[:, 0], expected(epoch, np.arange(50)))
        assert (flips[:, 0] != flips[:, 1]).all()
        assert (flips[:, 0] == flips[:, 2]).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"flip": "sometimes"}, "flip 'sometimes': give one of random, alternating, none"),
        (
            {"flip": "alternating", "flip_probability": 0.3},
            "0.3 beside flip 'alternating', .* set it to 0.5, or leave one of the two out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CropSettings(**settings)
