"""FixRes: a last phase at the test resolution, with the test-time crop, that trains only the layers affected.

Touvron 2019 (arXiv 1906.06423): random crops make objects look larger in training than at test time, so activation
statistics differ at test time. Fine-tuning the classifier and the batch norm before it on test-like images corrects
that, at a fraction of a full epoch's cost since nothing below them needs a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, act_last
from .framework.protocols import CropSwitchingLoader, ResizableLoader
from .framework.ranks import average_what_is_trained, can_change_what_is_trained
from .learning_rate import require_schedule, run_epochs

Trained = Literal["classifier_and_norm", "classifier", "all"]
Crop = Literal["test", "keep"]


def freeze_for_fixres(model: nn.Module, *, train: Trained = "classifier_and_norm") -> list[str]:
    """Leave only the last layers of `model` trainable, in place; returns the names of the parameters still trained.

    The classifier is the last `nn.Linear` (or, without one, the last convolution) in registration order, and the norm
    the last batch norm registered before it. Every other batch norm is frozen with its statistics: it normalizes with
    its running mean and variance even after `model.train()`. Gradients of frozen parameters are dropped, so that no
    optimizer applies an old one. Calling it again changes nothing. A model wrapped in DistributedDataParallel does not
    need find_unused_parameters: from here on its ranks average only the gradients of what is still trained.

    train: "classifier_and_norm" (the paper's choice), "classifier", or "all", which freezes nothing.

    Raises ValueError when the model has no such layer, or `train` is none of the three.
    """
    _check_trained(train)
    if train == "all":
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = _kept_modules(model, with_norm=train == "classifier_and_norm")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module not in kept:
            _freeze_statistics(module)
    kept_parameters = {id(parameter) for module in kept for parameter in module.parameters(recurse=False)}
    names = []
    with average_what_is_trained(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in kept_parameters)
            if parameter.requires_grad:
                names.append(name)
            else:
                parameter.grad = None  # one left from the last step would be applied again, with decay and momentum
    return names


@contextmanager
def briefly_frozen(model: nn.Module, *, train: Trained) -> Iterator[None]:
    """Inside, `model` is as `freeze_for_fixres` leaves it; afterwards as before, but that gradients are dropped.

    For compiling the phase's model before the phase. Give the model itself, not a wrapper of it such as DDP.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = sorted(trained - set(freeze_for_fixres(model, train=train)))
    try:
        yield
    finally:
        _thaw(model, frozen)


def hold_frozen_statistics(model: nn.Module) -> None:
    """Put the norms that `freeze_for_fixres` froze into evaluation mode, as their next forward pass would."""
    for module in model.modules():
        if any(hook is _stay_in_eval for hook in module._forward_pre_hooks.values()):
            module.training = False


def phase_learning_rate(epoch: float, *, start_epoch: float, total_epochs: float, learning_rate: float) -> float:
    """Rate after `epoch` epochs: r (1 + cos(pi t)) / 2, t the completed share of the epochs from start to total."""
    share = (epoch - start_epoch) / max(total_epochs - start_epoch, 1e-12)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))


class FixRes(SpeedUp):
    """Trains the run's last `epochs` at the test resolution with the test-time crop.

    epochs: length of the phase; it is part of the run, not added to it.
    image_size: px; None keeps the loader's size at that point (the last stage's under ProgressiveResizing).
    train: which layers to train: the classifier and the last batch norm (the paper's choice), the classifier, or all.
    learning_rate: of every parameter group at the phase's start, falling to 0 along a cosine; it needs a LearningRate
        among the algorithms. None keeps the run's schedule.
    plain_images: suspend the algorithms that change images (MixUp, CutMix, RandAugment) in the phase.
    crop: "test" switches the loader to the test-time crop in the phase; "keep" leaves the loader's crop as it is, for
        loaders that cannot be switched, and fine-tunes on the images that they serve.

    The loader must be a `CropSwitchingLoader` unless crop is "keep", and a `ResizableLoader` when image_size is given;
    others are refused before the first step, as are a phase longer than the run and a model without the layers to
    train. A run whose length is given in batches has as many epochs as it starts. Another `fit` of the same Trainer
    extends the run and moves the phase to its end: until then, all layers train again.
    """

    contract = Contract(
        owns=[Resource.CROP, Resource.TRAINABLE],
        writes=[Resource.LOADER_SHAPE],
        after=[Resource.MODEL, Resource.LOADER_SHAPE],
    )
    events = (Event.INIT, Event.FIT_START, Event.EPOCH_START)

    def __init__(
        self,
        *,
        epochs: int = 5,
        image_size: int | None = None,
        train: Trained = "classifier_and_norm",
        learning_rate: float | None = None,
        plain_images: bool = True,
        crop: Crop = "test",
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs {epochs} must be at least 1, the phase's length; to do without, leave FixRes out")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size {image_size} must be at least 1 px; leave it out to keep the loader's")
        _check_trained(train)
        if learning_rate is not None and not 0 <= learning_rate < math.inf:
            raise ValueError(
                f"learning_rate {learning_rate} must be 0 or more and finite; leave it out to keep the run's schedule"
            )
        self.epochs = epochs
        self.image_size = image_size
        self.train: Trained = train
        self.learning_rate = learning_rate
        if crop not in ("test", "keep"):
            raise ValueError(f"crop {crop!r} must be 'test' or 'keep', which leaves the loader's crop as it is")
        self.plain_images = plain_images
        self.crop: Crop = crop
        self._frozen: list[str] = []  # parameters that the phase has frozen

    @property
    def find_unused_parameters(self) -> bool:
        """Whether DDP must look for unused parameters in every step, because it cannot be told of them later."""
        return self.train != "all" and not can_change_what_is_trained()

    def start_epoch(self, total_epochs: int) -> int:
        """First epoch of the phase, counted from 0. Raises ValueError when the phase is longer than the run."""
        if self.epochs > total_epochs:
            raise ValueError(
                f"fixres.epochs is {self.epochs} and the run has {total_epochs} epochs, of which the phase is a part; "
                f"make it at most {total_epochs}"
            )
        return total_epochs - self.epochs

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError when `model` lacks the layers that the phase is to train."""
        if self.train != "all":
            _kept_modules(model, with_norm=self.train == "classifier_and_norm")

    def check_draws(self, resizing: Any, total_epochs: int) -> None:
        """Raises ValueError when `resizing`, a ProgressiveResizing, draws sizes in the phase, which is at one."""
        start = self.start_epoch(total_epochs)
        if any(resizing.shapes(epoch) for epoch in range(start, total_epochs)):
            raise ValueError(
                f"fixres trains the last {self.epochs} epochs at one size, and progressive_resizing draws a size for "
                f"each of their steps; give it final_epochs={self.epochs}, which are at its last size"
            )

    def suspends(self, algorithm: Any) -> TypeGuard[SpeedUp]:
        """Whether `algorithm` changes images and is suspended in the phase."""
        if not (self.plain_images and isinstance(algorithm, SpeedUp)):
            return False
        # Progressive resizing, which changes images if the loader cannot, stays on: it sets their size.
        writes = algorithm.contract.writes
        return Resource.IMAGES in writes and Resource.LOADER_SHAPE not in writes

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set loader and model for the current phase of the run."""
        if event == Event.INIT:
            act_last(self, state)  # after ProgressiveResizing, whose size this may override, however they are listed
            return
        if event == Event.FIT_START:
            self._check_run(state)
        in_phase = state.timestamp.epoch.value >= self.start_epoch(run_epochs(state))
        self._set_loader(state.dataloader, in_phase=in_phase)
        for other in filter(self.suspends, state.algorithms):
            other.suspended = in_phase
        if in_phase:
            trainable = {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}
            self._frozen += sorted(trainable - set(freeze_for_fixres(state.model, train=self.train)))
        else:
            _thaw(state.model, self._frozen)
            self._frozen = []

    def modify_learning_rate(self, learning_rate: float, epoch: float, total_epochs: float) -> float:
        """The phase's own rate once it has started."""
        start_epoch = self.start_epoch(math.ceil(total_epochs))
        if self.learning_rate is None or epoch < start_epoch:
            return learning_rate
        return phase_learning_rate(
            epoch, start_epoch=start_epoch, total_epochs=total_epochs, learning_rate=self.learning_rate
        )

    def _set_loader(self, loader: Any, *, in_phase: bool) -> None:
        if self.crop == "test":
            loader.set_test_crop(in_phase)
        if in_phase and self.image_size is not None:
            loader.set_image_size(self.image_size)

    def _check_run(self, state: State) -> None:
        loader = state.dataloader
        if self.crop == "test" and not isinstance(loader, CropSwitchingLoader):
            raise ValueError(
                f"fixres trains on the test-time crop, and the loader, a {type(loader).__name__}, cannot be switched "
                f"to it; write FixRes(epochs={self.epochs}, crop='keep') to train on the images that it serves, or use "
                "a loader with set_test_crop (algos.framework.protocols.CropSwitchingLoader)"
            )
        if self.image_size is not None and not isinstance(loader, ResizableLoader):
            raise ValueError(
                f"fixres.image_size is {self.image_size}, and the loader, a {type(loader).__name__}, cannot change its "
                "size; leave image_size out, or use a loader with set_image_size "
                "(algos.framework.protocols.ResizableLoader)"
            )
        if self.learning_rate is not None:
            require_schedule(state, "fixres.learning_rate")
        for other in state.algorithms:
            if hasattr(other, "shapes"):
                self.check_draws(other, run_epochs(state))
        self.check_model(state.model)  # fail now rather than at the phase's start


def _kept_modules(model: nn.Module, *, with_norm: bool) -> set[nn.Module]:
    modules = list(model.modules())
    classifiers = [module for module in modules if isinstance(module, nn.Linear)]
    classifiers = classifiers or [module for module in modules if isinstance(module, nn.Conv2d)]
    if not classifiers:
        raise ValueError(
            f"fixres found no linear layer or convolution to train in {type(model).__name__}; use train: all"
        )
    kept: set[nn.Module] = {classifiers[-1]}
    if with_norm:
        norms = [module for module in modules[: modules.index(classifiers[-1])] if isinstance(module, _BatchNorm)]
        if not norms:
            raise ValueError(
                f"fixres.train is classifier_and_norm and {type(model).__name__} has no batch norm before its "
                "classifier; use train: classifier"
            )
        kept.add(norms[-1])
    return kept


def _freeze_statistics(norm: _BatchNorm) -> None:
    norm.eval()
    if not any(hook is _stay_in_eval for hook in norm._forward_pre_hooks.values()):
        norm.register_forward_pre_hook(_stay_in_eval)


def _thaw(model: nn.Module, frozen: list[str]) -> None:
    """Undo `freeze_for_fixres` for the parameters that it froze."""
    parameters = dict(model.named_parameters())
    with average_what_is_trained(model):
        for name in frozen:
            parameters[name].requires_grad_(True)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _stay_in_eval:
                del module._forward_pre_hooks[key]
                module.train()


def _stay_in_eval(norm: nn.Module, inputs: Any) -> None:
    # Every loop calls model.train() before an epoch, which undoes norm.eval() but not a hook. torch.compile does not
    # notice new hooks, nor torch 2.7's in every case that a parameter's requires_grad has changed: for recipes see
    # training/engines/compiling.py.
    norm.training = False


def _check_trained(train: str) -> None:
    if train not in ("classifier_and_norm", "classifier", "all"):
        raise ValueError(f"train {train!r} must be 'classifier_and_norm', 'classifier' or 'all'")
