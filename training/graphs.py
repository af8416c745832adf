"""What torch.compile makes of a plan: a graph for each shape of a forward pass, in the order of their first use."""

from __future__ import annotations

from dataclasses import dataclass

from training.plan import Epoch, Plan


@dataclass(frozen=True)
class Graph:
    """A compiled form of the network, with its backward pass in training.

    images: of a forward pass on this rank. frozen: only the last layers are trained. training: else of an evaluation.
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
        for size, images in _passes_of(plan, epoch, rank):
            found[Graph(size, images, frozen=epoch.frozen, keep_rate=epoch.keep_rate)] = None
        if (index + 1) % plan.recipe.data.eval.every_epochs == 0 or index + 1 == len(plan.epochs):
            found[Graph(plan.recipe.data.eval.image_size, images_of_evaluation(plan), training=False)] = None
    return list(found)


def images_of_evaluation(plan: Plan) -> int:
    """Images of the largest evaluation batch of any rank."""
    ranks = plan.place.world_size
    num_batches = -(-plan.facts.num_eval // (plan.recipe.data.eval.per_device_batch_size * ranks))
    return -(-plan.facts.num_eval // (ranks * num_batches))


def _passes_of(plan: Plan, epoch: Epoch, rank: int) -> list[tuple[int, int]]:
    """(image size, images) of each kind of forward pass of an epoch, as the loader and the Trainer split it."""
    if not epoch.drawn:
        images = _images_of_passes(plan, epoch.global_batch_size, plan.facts.num_train, rank)
        return [(epoch.image_size, one) for one in images]
    return [
        (steps.image_size, one)
        for steps in epoch.drawn
        for one in _images_of_passes(plan, steps.global_batch_size, steps.images, rank)
    ]


def _images_of_passes(plan: Plan, global_batch_size: int, num_images: int, rank: int) -> list[int]:
    """Images of each kind of forward pass over `num_images`, as data/loading/order.py and the Trainer split them."""
    train, ranks = plan.recipe.data.train, plan.place.world_size
    whole = global_batch_size // ranks
    left = num_images % global_batch_size
    batches = [whole] if num_images >= global_batch_size else []
    if left >= ranks and not train.drop_last:
        batches.append(left // ranks + (rank < left % ranks))
    size = train.per_device_microbatch_size
    if isinstance(size, int):
        batches = [part for batch in batches for part in (min(size, batch), batch % size if batch > size else 0)]
    return [batch for batch in batches if batch]
