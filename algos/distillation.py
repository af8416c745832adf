"""Knowledge distillation (Hinton 2015, arXiv 1503.02531): a trained network's outputs as further targets.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, precision_context
from .framework.batches import split_batch
from .framework.passes import evaluating, without_ddp


def distillation_loss(
    outputs: Tensor, teacher_outputs: Tensor, targets: Tensor, *, temperature: float = 4.0, weight: float = 0.9
) -> Tensor:
    """(1 - w) · CE(z, t) + w · T² · KL(softmax(y / T) || softmax(z / T)), a mean over the samples: a scalar.

    outputs: z, the student's logits [N, K]. teacher_outputs: y, those of the teacher, without gradients.
    targets: t, class indices [N] or probabilities [N, K], for the cross entropy.
    temperature: T, above 0; higher values tell more of the classes that the teacher finds unlikely.
    weight: w, the teacher's share, in [0, 1].

    Raises ValueError for values out of range, and for logits of different shapes.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2: T² keeps the gradients' size.
    """
    _check_weight(weight)
    soft = soft_target_loss(outputs, teacher_outputs, temperature=temperature)
    return (1 - weight) * F.cross_entropy(outputs, targets) + weight * soft


def soft_target_loss(outputs: Tensor, teacher_outputs: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(softmax(y / T) || softmax(z / T)), a mean over the samples; see `distillation_loss`."""
    _check_temperature(temperature)
    if outputs.ndim != 2 or outputs.shape != teacher_outputs.shape:
        raise ValueError(
            f"the model's outputs have the shape {list(outputs.shape)}, and the teacher's "
            f"{list(teacher_outputs.shape)}; both must be [N, K], logits of the same classes: use a teacher that was "
            "trained on them"
        )
    student = F.log_softmax(outputs / temperature, dim=1)
    teacher = F.log_softmax(teacher_outputs / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Distillation(SpeedUp):
    """Trains on the outputs of a teacher beside the targets; see `distillation_loss`.

    teacher: the network, images [N, C, H, W] to logits [N, K], of the same classes and with images normalized as the
        model's are. In a recipe a run's folder, a checkpoint in one, or torchvision.NAME, timm.NAME or hf.NAME.
    temperature: of both softmaxes, above 0.
    weight: the teacher's share of the loss, in [0, 1]; the rest is the model's own loss, of whichever kind.

    The teacher gets the images that the model gets (augmented, mixed, resized), once for every microbatch, in
    evaluation mode, without gradients, at the run's precision and in the model's memory format. It is no part of the
    model: neither checkpoints, EMA, DDP, FSDP nor the optimizer see it, and every rank has all of it. A checkpoint has
    the hash of its weights, and a run that is resumed with another teacher is refused before its first step.
    """

    contract = Contract(
        owns=[Resource.LOSS], after=[Resource.IMAGES, Resource.TARGETS, Resource.SAMPLES, Resource.MEMORY_FORMAT]
    )
    events = (Event.INIT, Event.FIT_START, Event.BEFORE_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS)

    def __init__(self, *, teacher: str | nn.Module, temperature: float = 4.0, weight: float = 0.9) -> None:
        if not isinstance(teacher, (str, nn.Module)) or teacher == "":
            raise ValueError(f"teacher is {teacher!r}; give a network, or in a recipe a run's folder or a model's name")
        _check_temperature(temperature)
        _check_weight(weight)
        self.teacher = teacher
        self.temperature = temperature
        self.weight = weight
        self._hash: str | None = None  # of the teacher
        self._loaded_hash: str | None = None  # of that of the run that is resumed
        self._outputs: Tensor | None = None  # the teacher's, of the microbatch

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the model's loss; then evaluate the teacher on each microbatch, and pass the loss its outputs."""
        if event == Event.INIT:
            self._prepare(state)
        elif event == Event.FIT_START:
            self._refuse_another_teacher()
            _move(self._network, state)
        elif event == Event.BEFORE_FORWARD:  # here its activations are gone before the model's are kept
            images, _ = split_batch(state.batch)
            with evaluating(self._network), precision_context(state):
                self._outputs = self._network(images)
        elif event == Event.BEFORE_LOSS:  # SAM keeps this batch for its second pass
            state.batch = (*split_batch(state.batch), self._outputs)
        else:
            state.batch, self._outputs = state.batch[:2], None

    def state_dict(self) -> dict[str, Any]:
        """The teacher's hash, so that a resumed run with another one can be refused."""
        return {"teacher": self._hash}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Keep the hash of the resumed run's teacher, to compare it when training begins."""
        self._loaded_hash = state.get("teacher")

    @property
    def _network(self) -> nn.Module:
        assert isinstance(self.teacher, nn.Module), "checked at the run's start"
        return self.teacher

    def _prepare(self, state: State) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise ValueError(
                f"the teacher is {self.teacher!r}, a name that only recipes know; give the network itself, an nn.Module"
            )
        self._hash = _hash_of(self.teacher)
        model: Any = without_ddp(state.model)
        model.loss = _WithTeacher(model.loss, temperature=self.temperature, weight=self.weight)

    def _refuse_another_teacher(self) -> None:
        loaded, self._loaded_hash = self._loaded_hash, None
        if loaded is not None and loaded != self._hash:
            raise ValueError(
                f"the run that is continued had a teacher whose weights have the hash {loaded[:12]}, and those of this "
                f"one have {str(self._hash)[:12]}; continue it with the same teacher, or start a new run"
            )


class _WithTeacher:
    """A model's loss, with the teacher's term for batches that hold its outputs beside images and targets.

    An attribute of the model, so that whoever computes the loss computes this one: the Trainer, or SAM's second pass.
    """

    def __init__(self, loss: Any, *, temperature: float, weight: float) -> None:
        self._loss, self._temperature, self._weight = loss, temperature, weight

    def __call__(self, outputs: Any, batch: Any, *arguments: Any, **settings: Any) -> Any:
        if len(batch) < 3:
            return self._loss(outputs, batch, *arguments, **settings)
        images, targets, teacher_outputs = batch
        own = self._loss(outputs, (images, targets), *arguments, **settings)
        if not isinstance(own, Tensor):
            raise ValueError(
                f"distillation adds the teacher's term to the model's loss, which is a {type(own).__name__}; it must "
                "be one tensor: have the model's loss return their sum"
            )
        soft = soft_target_loss(outputs, teacher_outputs, temperature=self._temperature)
        return (1 - self._weight) * own + self._weight * soft


def _move(teacher: nn.Module, state: State) -> None:
    """To the model's device, and channels-last where the model is."""
    state.device.module_to_device(teacher)
    if any(_is_channels_last(parameter) for parameter in state.model.parameters()):
        teacher.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _is_channels_last(parameter: Tensor) -> bool:
    # A weight of one channel or one pixel has strides that fit both formats.
    channels_last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not parameter.is_contiguous()


def _hash_of(network: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        plain = value.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be above 0 and finite; 4 is usual, and 1 softens nothing")


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight} must lie in [0, 1]; 0.9 is usual, and 0 leaves the teacher out")
