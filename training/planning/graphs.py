"""What torch.compile makes of a plan: a graph for each shape of a forward pass, in the order of their first use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from algos.selective_backprop import count_kept
from training.planning.plan import Epoch, Plan


@dataclass(frozen=True)
class Graph:
    """A compiled form of the network, with its backward pass in training.

    images: of a forward pass on this rank. frozen: only the last layers are trained. training: else without, for an
    evaluation or to find the losses of samples.
    keep_rate: share of a Vision Transformer's patches that are trained on.
    """

    image_size: int
    images: int
    training: bool = True
    frozen: bool = False
    keep_rate: float = 1.0

    def __str__(self) -> str:
        what = [] if self.training else ["evaluation"]
        what += ["last layers only"] if self.frozen else []
        what += [f"{self.keep_rate:g} of the patches"] if self.keep_rate < 1 else []
        return ", ".join([f"{self.image_size} px", f"batch {self.images}", *what])


def graphs_of(plan: Plan, *, rank: int = 0, first_epoch: int = 0) -> list[Graph]:
    """The graphs that this rank's epochs take from `first_epoch` on; each once.

    Evaluation is one graph: `images_of_evaluation` fills up its smaller batches. Training batches cannot be filled up,
    since batch norm would count the filling, so an epoch's smaller last batch is a graph of its own. With
    per_device_microbatch_size "auto", the sizes are not known, and whole batches are assumed.
    """
    found: dict[Graph, None] = {}
    for index, epoch in list(enumerate(plan.epochs))[first_epoch:]:
        for size, images, selects in _batches(plan, epoch, rank):
            if selects and epoch.selecting is not None:
                found[Graph(epoch.selecting.image_size, images, training=False)] = None
                images = count_kept(images, epoch.selecting.keep)
            for part in _parts(images, plan.recipe.data.train.per_device_microbatch_size):
                found[Graph(size, part, frozen=epoch.frozen, keep_rate=epoch.keep_rate)] = None
        if (index + 1) % plan.recipe.data.eval.every_epochs == 0 or index + 1 == len(plan.epochs):
            found[Graph(plan.recipe.data.eval.image_size, images_of_evaluation(plan), training=False)] = None
    return list(found)


def images_of_evaluation(plan: Plan) -> int:
    """Images of the largest evaluation batch of any rank."""
    ranks = plan.place.world_size
    num_batches = -(-plan.facts.num_eval // (plan.recipe.data.eval.per_device_batch_size * ranks))
    return -(-plan.facts.num_eval // (ranks * num_batches))


def shapes_of_selection(plan: Plan, *, rank: int = 0) -> frozenset[tuple[int, int]]:
    """(images, image size) of the passes of this rank that find losses, each a graph of its own."""
    selecting = [epoch for epoch in plan.epochs if epoch.selecting is not None]
    return frozenset(
        (images, epoch.selecting.image_size)
        for epoch in selecting
        for _, images, selects in _batches(plan, epoch, rank)
        if selects and epoch.selecting is not None
    )


def _batches(plan: Plan, epoch: Epoch, rank: int) -> list[tuple[int, int, bool]]:
    """(image size, images, whether its step selects) of each kind of batch of an epoch, as loaders make them."""
    if not epoch.drawn:
        return [(epoch.image_size, *one) for one in _batches_of(plan, epoch, rank, plan.facts.num_train)]
    return [
        (steps.image_size, *one)
        for steps in epoch.drawn
        for one in _batches_of(plan, replace(epoch, global_batch_size=steps.global_batch_size), rank, steps.images)
    ]


def _batches_of(plan: Plan, epoch: Epoch, rank: int, num_images: int) -> list[tuple[int, bool]]:
    """(images, whether its step selects) of each kind of batch of `num_images`, as data/loading/order.py makes them."""
    ranks, full_steps = plan.place.world_size, num_images // epoch.global_batch_size
    left = num_images % epoch.global_batch_size
    chosen = epoch.selecting.steps if epoch.selecting is not None else range(0)
    selecting = sum(step < full_steps for step in chosen)
    kinds = {False: selecting < full_steps, True: selecting > 0}
    batches = [(epoch.global_batch_size // ranks, selects) for selects, there in kinds.items() if there]
    if left >= ranks and not plan.recipe.data.train.drop_last:
        batches.append((left // ranks + (rank < left % ranks), full_steps in chosen))
    return batches


def _parts(images: int, microbatch_size: int | str | None) -> list[int]:
    """Images of each kind of forward pass, as the Trainer splits a batch."""
    if not isinstance(microbatch_size, int):
        return [images]
    sizes = {min(microbatch_size, images), images % microbatch_size if images > microbatch_size else 0}
    return sorted(sizes - {0}, reverse=True)
