"""The teacher of a distillation: a finished run, or a published classifier, for images as the student gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.libraries.published import PREFIXES, find_published
from training.arrangement import network_as_trained, without_weights


@dataclass(frozen=True)
class Teacher:
    """What is known of a teacher before its weights are read.

    class_names: None for a published classifier, which may call the classes anything. mean, std: per channel, on the
    0..255 scale, of the images that it expects. outline: the network without its weights, perhaps on torch's meta
    device. load: the network with them, in evaluation mode; it raises ValueError if they cannot be read.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    outline: Callable[[], nn.Module]
    load: Callable[[], nn.Module]

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raises ValueError unless the student's classes are the teacher's."""
        if self.num_classes != len(class_names):
            raise ValueError(
                f"is {self.name}, which tells {self.num_classes} classes apart, and the data have {len(class_names)}; "
                "use a teacher that was trained on these classes"
            )
        if self.class_names is None:
            return
        pairs = zip(self.class_names, class_names, strict=True)
        other = next((index for index, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
        if other is not None:
            raise ValueError(
                f"is {self.name}, whose class {other} is {self.class_names[other]!r}, and the data's is "
                f"{class_names[other]!r}; use a teacher that was trained on these classes"
            )


def find_teacher(name: str, *, trust: bool = False) -> Teacher:
    """The teacher `name`: a run's folder, a checkpoint in one, torchvision.NAME, timm.NAME or hf.NAME.

    trust: read a checkpoint with Python's unrestricted unpickler, which runs what the file says.

    Raises ValueError if there is none.
    """
    if name.startswith(PREFIXES) and not Path(name).exists():
        return _published(name)
    # Here, because a run without a teacher needs none of it, and a plan is to start quickly.
    from training.trained import describe_trained, load_trained

    try:
        recipe, class_names, made = describe_trained(name)
    except ValueError as error:
        raise ValueError(f"is {name!r}: {error}; or use torchvision.NAME, timm.NAME or hf.NAME") from None
    return Teacher(
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        mean=made.mean,
        std=made.std,
        outline=lambda: network_as_trained(without_weights(recipe), num_classes=len(class_names), shapes_only=True),
        load=lambda: load_trained(name, trust_checkpoint=trust).network,
    )


def for_images_of(network: nn.Module, teacher: Teacher, *, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """`network`, for images that were normalized with the student's `mean` and `std` (0..255), not the teacher's."""
    if tuple(mean) == tuple(teacher.mean) and tuple(std) == tuple(teacher.std):
        return network
    return _Renormalized(network, teacher, mean=mean, std=std)


class _Renormalized(nn.Module):
    """Images normalized with one mean and deviation -> a network that expects others."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, teacher: Teacher, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        channels = [
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
            for values in (mean, std, teacher.mean, teacher.std)
        ]
        our_mean, our_std, their_mean, their_std = channels
        self.register_buffer("scale", (our_std / their_std).float())
        self.register_buffer("shift", ((our_mean - their_mean) / their_std).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images * self.scale.to(images.dtype) + self.shift.to(images.dtype))


def _published(name: str) -> Teacher:
    found = find_published(name)
    return Teacher(
        name=name,
        num_classes=found.num_classes,
        class_names=None,
        mean=found.mean,
        std=found.std,
        outline=lambda: found.build(False),
        load=lambda: found.build(True).eval(),
    )
