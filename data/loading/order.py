"""Assigns images to batches and ranks. Pure functions: a resumed run needs only the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..draws import Operation, occurrences, random_bits


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. num_samples - 1 (int64), the same for the same seed and epoch everywhere."""
    bits = random_bits(np.arange(num_samples), seed=seed, epoch=epoch, operation=Operation.ORDER)
    return np.argsort(bits[:, 0], kind="stable")


def balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """N of the N images of `labels`, as many of each class as of every other, in random order.

    Each of the C classes that have images gets floor(N / C) or, for N mod C classes that the epoch draws, one more. A
    class of n images that gets q shows every image floor(q / n) times, and q mod n of them, drawn without
    replacement, once more: expected q / n times each, as with torch's WeightedRandomSampler, but with less variance.

    labels: int [N], 0 or more.

    Returns:
        int64 [N] occurrences (`data.draws.occurrences`); a pure function of labels, seed and epoch.
    """
    num_samples = len(labels)
    key = {"seed": seed, "epoch": epoch, "operation": Operation.BALANCE}
    bits = random_bits(np.arange(num_samples), **key)[:, 0]
    by_class = np.lexsort((bits, labels))  # within a class in random order
    classes, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    shares = np.full(len(classes), num_samples // len(classes))
    class_bits = random_bits(num_samples + classes, **key)[:, 0]  # other keys than the images'
    shares[np.argsort(class_bits, kind="stable")[: num_samples % len(classes)]] += 1
    place = np.arange(num_samples) - np.repeat(np.cumsum(shares) - shares, shares)  # in its class's share
    counts, starts = np.repeat(counts, shares), np.repeat(starts, shares)
    drawn = occurrences(by_class[starts + place % counts], place // counts)
    order = random_bits(drawn, seed=seed, epoch=epoch, operation=Operation.ORDER)
    return drawn[np.argsort(order[:, 0], kind="stable")]


def train_batches(
    num_samples: int,
    *,
    per_device_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    balanced_labels: np.ndarray | None = None,
) -> list[np.ndarray]:
    """This rank's batches of one epoch, as arrays of image indices.

    Global batch b is a contiguous slice of `epoch_order`, and every rank takes a contiguous part of it: together the
    ranks train on the same batches as one process with that global batch size. All ranks get equally many batches.

    Args:
        drop_last: drop the last global batch if it is not full. Otherwise it is split over the ranks as evenly as
            possible, and dropped only if it has fewer images than there are ranks.
        balanced_labels: int [num_samples], to take `balanced_order` of them instead. The arrays then hold occurrences
            (`data.draws.images_of`).

    Raises:
        ValueError: the data do not fill a single batch.
    """
    _check_rank(rank, world_size)
    global_batch_size = per_device_batch_size * world_size
    smallest = global_batch_size if drop_last else world_size
    if num_samples < smallest:
        raise ValueError(
            f"{num_samples} images do not make one batch of {per_device_batch_size} a device on {world_size} devices: "
            f"at least {smallest} are needed; lower the batch size{', or set drop_last=False' if drop_last else ''}"
        )
    order = _order(num_samples, balanced_labels, seed=seed, epoch=epoch)
    num_full, num_left = divmod(num_samples, global_batch_size)
    full = order[: num_full * global_batch_size].reshape(num_full, world_size, per_device_batch_size)
    batches = list(full[:, rank])
    if not drop_last and num_left >= world_size:
        batches.append(np.array_split(order[-num_left:], world_size)[rank])
    return batches


def mixed_batches(
    num_samples: int,
    *,
    per_device_batch_sizes: Sequence[int],
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
    balanced_labels: np.ndarray | None = None,
) -> list[np.ndarray]:
    """`train_batches`, but batch b has per_device_batch_sizes[b] images on each rank.

    The order is the same, cut into these lengths; images beyond them are left out. The last one may be longer than what
    is left, which is then dropped or split as in `train_batches`.
    """
    _check_rank(rank, world_size)
    order = _order(num_samples, balanced_labels, seed=seed, epoch=epoch)
    ends = np.cumsum(per_device_batch_sizes) * world_size
    batches = []
    for size, end in zip(per_device_batch_sizes, ends.tolist(), strict=True):
        whole = order[end - size * world_size : end]
        if len(whole) == size * world_size or (not drop_last and len(whole) >= world_size):
            batches.append(np.array_split(whole, world_size)[rank])
    return batches


def eval_batches(num_samples: int, *, per_device_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's evaluation batches, as arrays of image indices, in the order of the data.

    Together the ranks see every image exactly once, each in the same number of batches, none of them empty or larger
    than `per_device_batch_size`. Batch sizes differ slightly: nothing is padded, and no rank waits for a batch that
    never comes.

    Raises:
        ValueError: fewer images than ranks, or batches of one that do not divide evenly over the ranks.
    """
    _check_rank(rank, world_size)
    if num_samples < world_size:
        raise ValueError(
            f"{num_samples} images for {world_size} ranks: evaluation needs at least one image a rank; "
            "evaluate on fewer devices"
        )
    num_batches = -(-num_samples // (per_device_batch_size * world_size))
    if num_batches * world_size > num_samples:  # only possible with batches of one
        raise ValueError(
            f"{num_samples} images do not divide into batches of {per_device_batch_size} over {world_size} ranks with "
            "as many batches on every rank; evaluate with a batch size of at least 2"
        )
    own = np.array_split(np.arange(num_samples), world_size)[rank]
    return np.array_split(own, num_batches)


def _order(num_samples: int, balanced_labels: np.ndarray | None, *, seed: int, epoch: int) -> np.ndarray:
    if balanced_labels is None:
        return epoch_order(num_samples, seed=seed, epoch=epoch)
    return balanced_order(balanced_labels, seed=seed, epoch=epoch)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
