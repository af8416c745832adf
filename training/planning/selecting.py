"""The steps of an epoch in which selective backpropagation trains only a part of the images."""

from __future__ import annotations

from dataclasses import dataclass

from algos.selective_backprop import SelectiveBackprop, count_kept


@dataclass(frozen=True)
class Selecting:
    """Steps of an epoch that select. Each has a forward pass over its whole batch before it trains on a part.

    steps: those steps of the epoch, from 0. images: of their batches, on all ranks. left_out: those that are not
    trained. keep: share of each batch that is. image_size: of that forward pass, in px. forward_macs: its multiply-adds
    for one image.
    """

    steps: range
    images: int
    left_out: int
    keep: float
    image_size: int
    forward_macs: int = 0


def plan_selecting(
    algorithm: SelectiveBackprop,
    *,
    epoch: int,
    total_epochs: int,
    first_step: int,
    steps: int,
    images: int,
    global_batch_size: int,
    image_size: int,
    ranks: int,
) -> Selecting | None:
    """What `algorithm` does in `epoch`, from 0, of so many steps and images; None if no step selects.

    first_step: steps of the run before the epoch. Batches are full but the epoch's last.
    """
    chosen = algorithm.selecting_steps(epoch, total_epochs=total_epochs, steps=steps, first_step=first_step)
    if not chosen:
        return None
    batches = [global_batch_size] * len(chosen)
    if chosen[-1] == steps - 1:
        batches[-1] = images - (steps - 1) * global_batch_size
    kept = {size: _kept(size, ranks, algorithm.keep) for size in set(batches)}
    return Selecting(
        steps=chosen,
        images=sum(batches),
        left_out=sum(size - kept[size] for size in batches),
        keep=algorithm.keep,
        image_size=algorithm.selection_size(image_size),
    )


def _kept(batch: int, ranks: int, keep: float) -> int:
    """Images of all ranks that are trained of a batch, of which each rank has its even share."""
    each, more = divmod(batch, ranks)
    return (ranks - more) * (count_kept(each, keep) if each else 0) + more * count_kept(each + 1, keep)
