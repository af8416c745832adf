"""Image sizes drawn for each step: the distribution is timm's, and an epoch has every image once."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from algos.resizing.sampled_sizes import SampledSizes, size_probabilities

SIZES = (128, 160, 192, 224)
BATCHES = (96, 64, 48, 32)


def timms(batch_sizes, *, epochs, seed=0, images=1000, **settings):
    module = pytest.importorskip("timm.data.scheduled_sampler", reason="timm of July 2026 or later")
    return module.ScheduledBatchSampler(
        torch.utils.data.SequentialSampler(range(images)), batch_sizes, choice_schedule="progressive",
        schedule_epochs=epochs, seed=seed, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.65, 2.0])
@pytest.mark.parametrize("uniform_share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_probabilities_are_timms(spread, uniform_share, epochs):
    theirs = timms(BATCHES, epochs=epochs, schedule_spread=spread, schedule_random_mix=uniform_share)
    ours = SampledSizes(SIZES, spread=spread, uniform_share=uniform_share)
    for epoch in range(epochs):
        expected = theirs.choice_weights_for_epoch(epoch).numpy()
        np.testing.assert_allclose(ours.probabilities(epoch, epochs), expected, rtol=0, atol=1e-15)


def test_the_sizes_of_a_run_are_distributed_as_timms():
    epochs, images = 12, 60_000
    ours, theirs = collections.Counter(), collections.Counter()
    sampled = SampledSizes(SIZES)
    reference = timms((64,) * 4, epochs=epochs, images=images)
    for epoch in range(epochs):
        shapes = sampled.shapes(epoch, total_epochs=epochs, num_images=images, seed=0, per_device_batch_size=64)
        ours.update(size for size, _ in shapes)
        reference.set_epoch(epoch)
        theirs.update(SIZES[choice] for choice, _ in reference.schedule)
    steps = ours.total()
    assert steps == epochs * -(-images // 64)
    expected = sum(sampled.probabilities(epoch, epochs) for epoch in range(epochs)) / epochs
    for size, probability in zip(SIZES, expected, strict=True):
        error = (probability * (1 - probability) / steps) ** 0.5
        assert abs(ours[size] / steps - probability) < 4 * error
        assert abs(theirs[size] / theirs.total() - probability) < 4 * error


def test_a_window_as_narrow_as_wanted_stays_over_the_nearest_size():
    np.testing.assert_allclose(size_probabilities(3, progress=0.3, spread=1e-3, uniform_share=0.0), [0, 1, 0])


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("batch_sizes", [None, BATCHES, (7, 5, 3, 2)])
def test_an_epoch_has_every_image_once(num_ranks, batch_sizes):
    sampled = SampledSizes(SIZES, batch_sizes)
    for epoch, images in enumerate((50, 331, 1000, 4096)):
        shapes = sampled.shapes(
            epoch, total_epochs=4, num_images=images, seed=epoch, per_device_batch_size=16, num_ranks=num_ranks
        )
        sizes = sampled.batch_sizes(16)
        assert set(shapes) <= set(zip(SIZES, sizes, strict=True))
        global_batches = [images_of * num_ranks for _, images_of in shapes]
        assert sum(global_batches[:-1]) < images <= sum(global_batches)
        # Only the last one may be cut short, and only where no other would fit.
        assert sum(global_batches) - images < min(sizes) * num_ranks


def test_global_batches_are_divided_over_the_ranks():
    sampled = SampledSizes(SIZES, global_batch_sizes=BATCHES)
    given = dict(total_epochs=4, num_images=3000, seed=1)
    alone, together = (sampled.shapes(1, num_ranks=ranks, **given) for ranks in (1, 4))
    assert [(size, 4 * images) for size, images in together] == alone
    with pytest.raises(ValueError, match=r"\[96, 64, 48, 32\] and there are 5 ranks; make them multiples of 5"):
        sampled.shapes(1, num_ranks=5, **given)


def test_draws_depend_on_seed_and_epoch_alone():
    sampled = SampledSizes(SIZES, BATCHES)
    given = dict(total_epochs=5, num_images=20_000)
    once = sampled.shapes(2, seed=3, **given)
    assert once == sampled.shapes(2, seed=3, **given)
    assert once != sampled.shapes(2, seed=4, **given)
    # Those of fewer images begin alike.
    fewer = sampled.shapes(2, seed=3, total_epochs=5, num_images=10_000)
    assert fewer[:60] == once[:60]


def test_the_final_epochs_are_at_the_last_size():
    sampled = SampledSizes(SIZES, BATCHES, final_epochs=2)
    for epoch in (8, 9):
        assert set(sampled.shapes(epoch, total_epochs=10, num_images=640, seed=0)) == {(224, 32)}
    np.testing.assert_array_equal(
        sampled.probabilities(7, 10), size_probabilities(4, progress=1.0), "the window has arrived before them"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sizes": (224,)}, r"sizes \[224\] must be at least two"),
        ({"sizes": (224, 128)}, r"sizes \[224, 128\] must be .* in rising order"),
        ({"sizes": (0, 128)}, r"sizes \[0, 128\] must be whole numbers of at least 1"),
        ({"per_device_batch_sizes": (32, 16)}, "per_device_batch_sizes has 2 entries and sizes has 4"),
        ({"per_device_batch_sizes": (8, 8, 8, 0)}, r"per_device_batch_sizes \[8, 8, 8, 0\] must be whole numbers"),
        ({"per_device_batch_sizes": BATCHES, "global_batch_sizes": BATCHES}, "are both given; give one of them"),
        ({"final_epochs": -1}, "final_epochs -1 must be a whole number of at least 0"),
        ({"spread": -0.1}, "spread -0.1 must be 0 or more"),
        ({"uniform_share": 1.5}, r"uniform_share 1.5 must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SampledSizes(**{"sizes": SIZES, **settings})
