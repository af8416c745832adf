"""PatchDropout (Liu 2022, arXiv 2208.07220): a Vision Transformer trains on a random part of each image's patches.

The class of the layer behind the position embeddings is replaced in place by a subclass of it. Parameters, their names,
hooks, optimizers and checkpoints are unaffected: the same weights load before and after.

Shapes: N samples, P patches of an image, K kept patches, F tokens in front of them (the class token), D features.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank
from .framework.batches import split_batch
from .framework.changed_layers import Changed, change_class
from .framework.randomness import MicrobatchDraws, generator_at, microbatch_draws
from .learning_rate import run_epochs


def apply_patch_dropout(model: nn.Module, *, keep_rate: float = 0.5) -> nn.Module:
    """Have the Vision Transformer `model` process K of each image's P patches in training mode. In place.

        K = max(1, floor(keep_rate · P)),   tokens [N, F + P, D] -> [N, F + K, D]

    The choice is uniform and independent for each image, made after positions were added, so that a kept patch knows
    where it is. The order of the kept patches stays, and the class token and other tokens in front are always kept. In
    evaluation mode all patches are processed.

    keep_rate: in (0, 1]; 1 keeps all.

    Known are torchvision's VisionTransformer, this project's, timm's VisionTransformer, and the ViT, DeiT and DINOv2
    classifiers of transformers. Each forward pass draws from torch's generator of the device; the class draws once per
    device batch instead.

    Returns the same model. Applying it again with the same setting changes nothing. Warns when nothing changed.
    Raises ValueError for a keep_rate out of range or other than that of an earlier call, for a network that drops
    patches by itself already, and for one that does not make them with a single convolution.

    Liu et al. 2022, "PatchDropout: Economizing Vision Transformers Using Patch Dropout", section 3.
    """
    _check(keep_rate)
    found = [(module, known) for module in model.modules() if (known := _known(module)) is not None]
    for module, known in found:
        layer: Any = _get(module, known.tokens)
        prefix: Any = known.prefix if known.prefix is not None else module.num_prefix_tokens
        if isinstance(layer, _Dropping):
            if layer.keep_rate != keep_rate:
                raise ValueError(
                    f"the model keeps {layer.keep_rate} of its patches already, and is now asked to keep {keep_rate}; "
                    "apply patch dropout once: build the model anew to change the setting"
                )
            continue
        if "PatchDropout" in type(layer).__name__:
            raise ValueError(
                f"{type(module).__name__} was made with a patch_drop_rate of its own; build it without, or leave patch "
                "dropout out"
            )
        _change_layer(layer, keep_rate, _patch_convolution(module, known), prefix=prefix)
    if not found:
        warnings.warn(
            f"patch dropout changed nothing in {type(model).__name__}: it has none of the Vision Transformers of "
            "torchvision, timm and transformers that are known",
            stacklevel=2,
        )
    return model


def count_kept_patches(num_patches: int, keep_rate: float) -> int:
    """K = max(1, floor(keep_rate · P)), with products that rounding left just below a whole number rounded up."""
    return max(1, math.floor(num_patches * keep_rate + 1e-9))


def draw_kept_patches(num_samples: int, num_patches: int, keep_rate: float, *, generator: torch.Generator) -> Tensor:
    """Draw the patches that each of N samples keeps: int64 [N, K] on the CPU, rising along a row.

    generator: a CPU generator, the only source of randomness.
    """
    keys = torch.rand(num_samples, num_patches, generator=generator)
    return _lowest(keys, count_kept_patches(num_patches, keep_rate))


class PatchDropout(SpeedUp):
    """Trains a Vision Transformer on a random part of each image's patches; see `apply_patch_dropout`.

    keep_rate: share of the patches that are kept in training, in (0, 1].
    final_epochs: of the run's epochs, the last ones train on all patches, as the network is evaluated.

    Draws once per device batch, whatever the microbatch size. A draw is a function of the run's seed, the rank and the
    number of batches done, so ranks draw differently, and a resumed run repeats and skips nothing. Batches are pairs
    (images, targets).
    """

    contract = Contract(writes=[Resource.MODEL], after=[Resource.SAMPLES])  # draws for those that are trained
    events = (
        Event.INIT,
        Event.FIT_START,
        Event.EPOCH_START,
        Event.BATCH_START,
        Event.BEFORE_TRAIN_BATCH,
        Event.BEFORE_FORWARD,
        Event.BATCH_END,
    )

    def __init__(self, *, keep_rate: float = 0.5, final_epochs: int = 0) -> None:
        _check(keep_rate)
        if final_epochs < 0:
            raise ValueError(f"final_epochs {final_epochs} must be 0 or more: the last epochs, with all patches")
        self.keep_rate = keep_rate
        self.final_epochs = final_epochs
        self._draws: list[PatchDraws] = []  # the model's own
        self._kept: Tensor | None = None  # of the device batch, [N, K]
        self._first_row = 0  # of the next microbatch

    def rate_at(self, epoch: int, total_epochs: int) -> float:
        """The share of the patches that are kept in `epoch`, from 0. Raises ValueError if the run is too short."""
        if self.final_epochs > total_epochs:
            raise ValueError(
                f"patch_dropout.final_epochs is {self.final_epochs} and the run has {total_epochs} epochs, of which "
                f"these are a part; make it at most {total_epochs}"
            )
        return 1.0 if epoch >= total_epochs - self.final_epochs else self.keep_rate

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the model in place; then draw for each batch, and pass the layer each microbatch's part."""
        if event == Event.INIT:
            self._change_model(state, logger)
        elif event in (Event.FIT_START, Event.EPOCH_START):
            rate = self.rate_at(state.timestamp.epoch.value, run_epochs(state))
            for draws in self._draws:
                draws.keep_rate = rate
        elif event == Event.BATCH_START:
            self._kept = self._draw(state)
        elif event == Event.BEFORE_TRAIN_BATCH:  # again after a step that ran out of memory
            self._first_row = 0
        elif event == Event.BEFORE_FORWARD:
            self._pass_rows(len(split_batch(state.batch)[0]))
        else:
            self._share(None)

    def _change_model(self, state: State, logger: Logger) -> None:
        apply_patch_dropout(state.model, keep_rate=self.keep_rate)
        self._draws = _draws_of(state.model)
        logger.log_hyperparameters({"patch_dropout/keep_rate": self.keep_rate if self._draws else 1.0})

    def _draw(self, state: State) -> Tensor | None:
        if not self._draws:
            return None
        images, _ = split_batch(state.batch)
        generator = generator_at(
            state.rank_zero_seed, rank=global_rank(), step=state.timestamp.batch.value, stream="patch_dropout"
        )
        kept = self._draws[0].draw(images, generator)
        return None if kept is None else state.device.tensor_to_device(kept)

    def _pass_rows(self, num_samples: int) -> None:
        last_row = self._first_row + num_samples
        self._share(None if self._kept is None else self._kept[self._first_row : last_row])
        self._first_row = last_row

    def _share(self, kept: Tensor | None) -> None:
        for draws in self._draws:
            draws.of_rows = kept


class PatchDraws(MicrobatchDraws):
    """The patches that are kept of each sample of the microbatch: of_rows is int64 [N, K].

    keep_rate: in this epoch; 1 or more keeps all. in_evaluation: whether patches are left out in evaluation too.
    """

    def __init__(self, keep_rate: float, patches: nn.Conv2d) -> None:
        super().__init__()
        self.keep_rate = keep_rate
        self.in_evaluation = False
        self._kernel, self._stride = patches.kernel_size, patches.stride

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """For [N, C, H, W], on the CPU; None if all patches are kept."""
        if self.keep_rate >= 1:
            return None
        shapes = zip(images.shape[-2:], self._kernel, self._stride, strict=True)
        patches = math.prod((side - int(kernel)) // int(stride) + 1 for side, kernel, stride in shapes)
        return draw_kept_patches(len(images), patches, self.keep_rate, generator=generator)

    def example(self, images: Tensor) -> Tensor | None:
        kept = self.draw(images, torch.Generator())
        return None if kept is None else kept.to(images.device)


@contextmanager
def keeping_patches(model: nn.Module, keep_rate: float, *, in_evaluation: bool = False) -> Iterator[None]:
    """Within this context, a model that patch dropout has changed keeps `keep_rate` of its patches in training, and if
    asked in evaluation too, as for counting what training costs."""
    found = _draws_of(model)
    before = [(draws.keep_rate, draws.in_evaluation) for draws in found]
    for draws in found:
        draws.keep_rate, draws.in_evaluation = keep_rate, in_evaluation
    try:
        yield
    finally:
        for draws, (rate, evaluates) in zip(found, before, strict=True):
            draws.keep_rate, draws.in_evaluation = rate, evaluates


def _draws_of(model: nn.Module) -> list[PatchDraws]:
    return [draws for draws in microbatch_draws(model) if isinstance(draws, PatchDraws)]


class _Known(NamedTuple):
    """Where a kind of network keeps what matters here, as dotted paths of attributes."""

    tokens: str  # the layer whose output is the tokens with their positions
    patches: str  # the convolution that makes the patches
    prefix: int | None  # tokens in front of the patches; None: the network's num_prefix_tokens


_TORCHVISIONS = _Known("encoder.dropout", "conv_proj", 1)
_HUGGING_FACES = _Known("dropout", "patch_embeddings.projection", 1)
# By name, so that importing this needs none of these libraries.
_KNOWN = {
    "torchvision.models.vision_transformer.VisionTransformer": _TORCHVISIONS,
    "models.vit.VisionTransformer": _TORCHVISIONS,
    "brisk.models.vit.VisionTransformer": _TORCHVISIONS,
    "timm.models.vision_transformer.VisionTransformer": _Known("patch_drop", "patch_embed.proj", None),
    "transformers.models.vit.modeling_vit.ViTEmbeddings": _HUGGING_FACES,
    "transformers.models.deit.modeling_deit.DeiTEmbeddings": _HUGGING_FACES._replace(prefix=2),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings": _HUGGING_FACES,
}


class _Dropping(Changed):
    """The layer behind the position embeddings."""

    named = "Dropping"
    keep_rate: float
    num_prefix_tokens: int
    microbatch_draws: PatchDraws

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = super().forward(tokens)
        draws = self.microbatch_draws
        # In this order: compiled for evaluation, it does not depend on the epoch's rate.
        if not (self.training or draws.in_evaluation) or draws.keep_rate >= 1:
            return tokens
        front, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        kept = self._draw(patches).unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        return torch.cat([front, patches.gather(1, kept)], dim=1)

    def _draw(self, patches: Tensor) -> Tensor:
        """Indices of the kept patches, [N, K]."""
        num_samples, num_patches = patches.shape[:2]
        count, drawn = count_kept_patches(num_patches, self.microbatch_draws.keep_rate), self.microbatch_draws.of_rows
        if drawn is None:
            return _lowest(torch.rand(num_samples, num_patches, device=patches.device), count)
        if drawn.shape != (num_samples, count):
            raise ValueError(
                f"patch dropout drew {list(drawn.shape)} patches for a batch of {num_samples} images with "
                f"{num_patches} patches; the images must be as they were at the start of the step"
            )
        return drawn

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"keeps {self.keep_rate:.3g} of the patches"]))


def _lowest(keys: Tensor, count: int) -> Tensor:
    """The places of the `count` lowest keys of each row, rising: a uniform choice, if all keys are alike."""
    return keys.argsort(dim=1)[:, :count].sort(dim=1).values


def _known(module: Any) -> _Known | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def _get(module: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def _patch_convolution(module: nn.Module, known: _Known) -> nn.Conv2d:
    convolution = _get(module, known.patches)
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(
            f"{type(module).__name__} makes its patches with a {type(convolution).__name__}, and patch dropout knows "
            "those of a single convolution; leave it out, or use a network without a stem of convolutions"
        )
    return convolution


def _check(keep_rate: float) -> None:
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate {keep_rate} must lie in (0, 1]; 0.5 is usual, and 1 keeps every patch")


def _change_layer(layer: Any, keep_rate: float, patches: nn.Conv2d, *, prefix: int) -> None:
    change_class(layer, _Dropping)
    layer.keep_rate, layer.num_prefix_tokens = keep_rate, prefix
    layer.microbatch_draws = PatchDraws(keep_rate, patches)
