"""BlurPool (Zhang 2019, arXiv 1904.11486): low-pass filter before subsampling, so that small shifts change little.

Each changed layer's class is replaced in place by a subclass of it. Parameters, their names, ties and requires_grad,
hooks, optimizers and checkpoints are unaffected: the same weights load before and after.

Shapes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blurring.blur import Pair, binomial_kernel, check_filter, convolve, pair, to_channels_last
from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State


def apply_blurpool(
    model: nn.Module,
    *,
    filter_size: int = 3,
    placement: Literal["before", "after"] = "before",
    pad: Literal["reflect", "zeros"] = "reflect",
    min_channels: int = 16,
    convolutions: bool = True,
    max_pools: bool = True,
) -> nn.Module:
    """Add a blur where `model` subsamples: in convolutions and max-pools with a stride above 1. In place.

    The blur is a depthwise convolution along each axis that is subsampled, with the binomial filter of n taps
    (`filter_size`), C(n-1, k) / 2^(n-1) for k = 0..n-1, which sums to 1.

        max-pool, stride s            ->  max-pool, stride 1; blur, stride s
        convolution, stride s         ->  blur, stride 1; the convolution unchanged      (placement "before")
        1x1 convolution, stride s     ->  blur, stride s; 1x1 convolution, stride 1      (same result as the line above)
        convolution s, activation, f  ->  convolution 1, activation; blur, stride s; f   (placement "after")

    filter_size: taps, 2 to 7. An even filter shifts the image by half a pixel.
    placement: "before" works on any model and adds little work. "after" is the paper's: the strided convolution runs
        at stride 1, at s² times the cost, and the blur follows the activation. It needs to know what follows a
        convolution, which it does for torchvision's ResNet, VGG, AlexNet, MobileNetV2 and DenseNet and for other
        models made of their blocks; DenseNet's average-pools become blurs, and ResNet's first max-pool becomes 2x2,
        as in the authors' models.
    pad: the values beyond the border. "reflect" leaves a constant image constant (an axis too short to reflect repeats
        its last pixel); "zeros" darkens borders.
    min_channels: convolutions with fewer input channels are not blurred; 16 excludes the first one.
    convolutions, max_pools: which of the two to change.

    Output sizes do not change, even with ceil_mode, except for odd sizes under "after": ResNet's first pool and
    DenseNet's average-pools differ as in the authors' models. A changed layer's `stride` is that of the layer itself;
    the blur's stride is in its repr. Max-pools that return indices are left alone with a warning.

    Returns the same model. Applying it again with the same settings changes nothing. Warns when nothing changed.
    Raises ValueError for settings out of range, for settings that differ from those of an earlier call, for lazy
    layers that have not seen a batch, and for "after" on a model of unknown structure.

    Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
    """
    settings = _Settings(filter_size, placement, pad, min_channels, convolutions, max_pools)
    earlier = _blurred_layers(model)
    _refuse_other_settings(earlier, settings)
    _refuse_lazy(model)
    changes = (_plan_before if placement == "before" else _plan_after)(model, settings)
    if not changes and not earlier:
        warnings.warn(
            f"BlurPool changed nothing in {type(model).__name__}: it has no convolution or max-pool to blur "
            f"under {settings}",
            stacklevel=2,
        )
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(()))
    for layer, change in changes.items():
        _change_layer(layer, change, settings, like=like)
    return model


class BlurPool(SpeedUp):
    """Blurs where the model subsamples, from the start of training; see `apply_blurpool` for the settings."""

    contract = Contract(writes=[Resource.MODEL])
    events = (Event.INIT,)

    def __init__(
        self,
        *,
        filter_size: int = 3,
        placement: Literal["before", "after"] = "before",
        pad: Literal["reflect", "zeros"] = "reflect",
        min_channels: int = 16,
        convolutions: bool = True,
        max_pools: bool = True,
    ) -> None:
        self.settings = _Settings(filter_size, placement, pad, min_channels, convolutions, max_pools)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the model in place and log how many layers changed."""
        apply_blurpool(state.model, **self.settings.as_arguments())
        logger.log_hyperparameters({"blurpool/layers": len(_blurred_layers(state.model))})


@dataclass(frozen=True)
class _Settings:
    filter_size: int
    placement: str
    pad: str
    min_channels: int = 16
    convolutions: bool = True
    max_pools: bool = True

    def __post_init__(self) -> None:
        check_filter(self.filter_size, self.pad)
        if self.placement not in ("before", "after"):
            raise ValueError(f"placement {self.placement!r} must be 'before' or 'after' (the paper's)")
        if self.min_channels < 1:
            raise ValueError(
                f"min_channels {self.min_channels} must be at least 1, which blurs every strided convolution"
            )
        if not (self.convolutions or self.max_pools):
            raise ValueError("convolutions and max_pools are both False, which leaves nothing to blur; set one to True")

    def as_arguments(self) -> dict[str, Any]:
        return dict(zip((field.name for field in fields(self)), astuple(self), strict=True))

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.as_arguments().items())


@dataclass(frozen=True)
class _Change:
    """How one layer changes. None: not at all, or without that blur."""

    blur_input: Pair | None = None  # stride of a blur before the layer
    blur_output: Pair | None = None  # stride of a blur after the layer (pools only)
    taps: Pair = (1, 1)  # of the filter, along rows and columns
    stride: Pair | None = None  # new value of the layer's own stride
    kernel_size: Pair | None = None  # new window of a max-pool, then unpadded


_Changes = dict[nn.Module, _Change]

# --- plans: which layers change, and how ---------------------------------------------------------------------------


def _plan_before(model: nn.Module, settings: _Settings) -> _Changes:
    changes = _plan_max_pools(model, settings)
    for layer in _strided_convolutions(model, settings):
        if _is_pointwise(layer):
            changes[layer] = _blur_then_pointwise(layer, settings)
        else:
            changes[layer] = _Change(blur_input=(1, 1), taps=_taps(pair(layer.stride), settings))
    return changes


def _plan_after(model: nn.Module, settings: _Settings) -> _Changes:
    changes = _plan_max_pools(model, settings)
    for module in model.modules():
        for name, plan in _PLANS_AFTER.items():
            if any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(module).__mro__):
                plan(module, settings, changes)
    unknown = [layer for layer in _strided_convolutions(model, settings) if layer not in changes]
    if unknown:
        names = {layer: name for name, layer in model.named_modules()}
        raise ValueError(
            f"placement 'after' does not know what follows the strided convolution {names[unknown[0]]!r} of "
            f"{type(model).__name__}; it knows torchvision's ResNet, VGG, AlexNet, MobileNetV2 and DenseNet: "
            "use placement='before', which works on any model"
        )
    return changes


def _plan_max_pools(model: nn.Module, settings: _Settings) -> _Changes:
    if not settings.max_pools:
        return {}
    changes: _Changes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.MaxPool2d) or isinstance(layer, _Blurred) or max(pair(layer.stride)) == 1:
            continue
        if layer.return_indices:
            warnings.warn(
                f"BlurPool leaves max-pool {name!r} alone: a blurred maximum has no index to return", stacklevel=4
            )
            continue
        stride = pair(layer.stride)
        changes[layer] = _Change(blur_output=stride, taps=_taps(stride, settings), stride=(1, 1))
    return changes


def _plan_residual_block(block: Any, settings: _Settings, changes: _Changes) -> None:
    convolutions = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
    _blur_behind_activation(convolutions, settings, changes)
    shortcut: Any = block.downsample[0] if isinstance(block.downsample, nn.Sequential) else None
    if shortcut in _strided_convolutions(block, settings) and _is_pointwise(shortcut):
        changes[shortcut] = _blur_then_pointwise(shortcut, settings)


def _plan_inverted_residual(block: Any, settings: _Settings, changes: _Changes) -> None:
    convolutions = [layer for layer in block.conv.modules() if isinstance(layer, nn.Conv2d)]
    _blur_behind_activation(convolutions, settings, changes)


def _plan_resnet(model: Any, settings: _Settings, changes: _Changes) -> None:
    pool = getattr(model, "maxpool", None)
    if pool not in changes:
        return
    if (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)) == ((3, 3), (2, 2), (1, 1)):
        # The authors' window: the blur replaces the overlap of 3x3 windows.
        changes[pool] = _Change(blur_output=(2, 2), taps=_taps((2, 2), settings), stride=(1, 1), kernel_size=(2, 2))
    if model.conv1 in _strided_convolutions(model, settings):
        _blur_between(model.conv1, pool, pair(model.conv1.stride), (1, 1), settings, changes)


def _plan_alexnet(model: Any, settings: _Settings, changes: _Changes) -> None:
    first, pool = model.features[0], model.features[2]
    if first in _strided_convolutions(model, settings) and pair(first.stride) == (4, 4) and pool in changes:
        # The authors keep half of the stride of 4: at stride 1 the 11x11 convolution would cost 16 times as much.
        _blur_between(first, pool, (2, 2), (2, 2), settings, changes)


def _plan_dense_transition(transition: Any, settings: _Settings, changes: _Changes) -> None:
    pool = transition.pool
    if settings.max_pools and isinstance(pool, nn.AvgPool2d) and not isinstance(pool, _Blurred):
        stride = pair(pool.stride)
        changes[pool] = _Change(blur_output=stride, taps=_taps(stride, settings))


# Classes whose order of layers is known -> plan; by name, so that torchvision is not needed.
_PLANS_AFTER: dict[str, Callable[[Any, _Settings, _Changes], None]] = {
    "torchvision.models.resnet.BasicBlock": _plan_residual_block,
    "torchvision.models.resnet.Bottleneck": _plan_residual_block,
    "torchvision.models.resnet.ResNet": _plan_resnet,
    "torchvision.models.mobilenetv2.InvertedResidual": _plan_inverted_residual,
    "torchvision.models.alexnet.AlexNet": _plan_alexnet,
    "torchvision.models.densenet._Transition": _plan_dense_transition,
}


def _blur_behind_activation(layers: Sequence[nn.Conv2d], settings: _Settings, changes: _Changes) -> None:
    """For layers in sequence with activations between: strided ones pass their stride on to the next."""
    for layer, following in pairwise(layers):
        if layer in _strided_convolutions(layer, settings):
            _blur_between(layer, following, pair(layer.stride), (1, 1), settings, changes)


def _blur_between(
    layer: nn.Module, following: nn.Module, blur_stride: Pair, own_stride: Pair, settings: _Settings, changes: _Changes
) -> None:
    behind = changes.get(following, _Change())
    taps = _taps(blur_stride, settings)
    changes[layer] = _Change(stride=own_stride)
    changes[following] = _Change(blur_stride, behind.blur_output, taps, behind.stride, behind.kernel_size)


def _blur_then_pointwise(layer: nn.Conv2d, settings: _Settings) -> _Change:
    # A 1x1 convolution commutes with subsampling; after it, it processes 1/s² of the pixels.
    stride = pair(layer.stride)
    return _Change(blur_input=stride, taps=_taps(stride, settings), stride=(1, 1))


def _strided_convolutions(model: nn.Module, settings: _Settings) -> list[nn.Conv2d]:
    if not settings.convolutions:
        return []
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
        and not isinstance(layer, _Blurred)
        and max(pair(layer.stride)) > 1
        and layer.in_channels >= settings.min_channels
    ]


def _is_pointwise(layer: nn.Module) -> bool:
    # Not a subclass, whose forward pass may do more.
    return type(layer) is nn.Conv2d and pair(layer.kernel_size) == (1, 1) and layer.padding in ((0, 0), "valid")


def _taps(stride: Pair, settings: _Settings) -> Pair:
    # An axis that is not subsampled cannot alias and is not blurred.
    rows, columns = (settings.filter_size if axis > 1 else 1 for axis in stride)
    return rows, columns


# --- layers --------------------------------------------------------------------------------------------------------


class _Blurred(nn.Module):
    """First base of every changed layer's class; the layer's former class is the second."""

    blur_kernel: Tensor  # [1, 1, taps, taps], not in the state dict
    blur_change: _Change
    blur_settings: _Settings

    def forward(self, images: Tensor) -> Tensor:
        change = self.blur_change
        if change.blur_input is not None:
            images = self._blurred(images, change.blur_input)
        if change.blur_output is None:
            return super().forward(images)
        if isinstance(self, nn.AvgPool2d):  # the blur is itself an average, and replaces the pool
            return self._blurred(images, change.blur_output)
        if isinstance(self, nn.MaxPool2d) and self.ceil_mode:
            images = _extend_for_ceil_mode(images, self, change.blur_output)
        if not _pools_slowly(images):
            return self._blurred(super().forward(images), change.blur_output)
        pooled = super().forward(to_channels_last(images))
        return self._blurred(pooled, change.blur_output).contiguous()

    def _blurred(self, images: Tensor, stride: Pair) -> Tensor:
        return convolve(images, self.blur_kernel, stride=stride, pad=self.blur_settings.pad)

    def extra_repr(self) -> str:
        change = self.blur_change
        blurs = [("input", change.blur_input), ("output", change.blur_output)]
        said = [f"{where} blurred {change.taps} at stride {stride}" for where, stride in blurs if stride is not None]
        return ", ".join([super().extra_repr(), *said])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _Blurred:
        super()._apply(fn, recurse)
        # Materializing a model that was built on the meta device leaves buffers unset; no checkpoint holds this one.
        if not self.blur_kernel.is_meta:
            with torch.no_grad():
                self.blur_kernel.copy_(binomial_kernel(self.blur_change.taps, like=self.blur_kernel))
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes created at run time cannot be found by name: rebuild this one from the layer's former class. Other
        # libraries' subclasses of it (for parametrization, sharding) copy themselves.
        first, *others = type(self).__bases__
        if first is not _Blurred:
            return super().__reduce_ex__(protocol)
        return _rebuild, tuple(others), self.__dict__.copy()


def _change_layer(layer: Any, change: _Change, settings: _Settings, *, like: Tensor) -> None:
    layer.__class__ = _blurred_class(type(layer))
    layer.blur_change, layer.blur_settings = change, settings
    own = next(layer.parameters(recurse=False), like)
    layer.register_buffer("blur_kernel", binomial_kernel(change.taps, like=own), persistent=False)
    if change.stride is not None:
        layer.stride = change.stride
    if change.kernel_size is not None:
        layer.kernel_size, layer.padding = change.kernel_size, (0, 0)


@functools.cache
def _blurred_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Blurred{cls.__name__}", (_Blurred, cls), {"__module__": __name__})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    blurred = _blurred_class(cls)
    return blurred.__new__(blurred)


def _pools_slowly(images: Tensor) -> bool:
    # On CPU, PyTorch (2.7) vectorizes max-pools only in channels-last: a dense 3x3 one takes 18 times as long in NCHW,
    # and changing the format takes a fifth of the difference. A compiler generates its own kernels.
    on_cpu = images.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and images.dim() == 4 and images.is_contiguous()


def _extend_for_ceil_mode(images: Tensor, pool: nn.MaxPool2d, stride: Pair) -> Tensor:
    """Pad with -inf below and to the right, so that the dense max-pool covers the last window of ceil_mode."""
    extra = [
        _missing_in_ceil_mode(size, *sizes)
        for size, *sizes in zip(
            images.shape[-2:], pair(pool.kernel_size), stride, pair(pool.padding), pair(pool.dilation), strict=True
        )
    ]
    return F.pad(images, (0, extra[1], 0, extra[0]), value=-math.inf) if any(extra) else images


def _missing_in_ceil_mode(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    dense = size + 2 * padding - dilation * (kernel_size - 1)
    last = -((1 - dense) // stride)  # ⌈(dense - 1) / stride⌉, index of the last window
    if last * stride >= size + padding:  # it would begin in the right padding, and is dropped
        last -= 1
    return max(0, last * stride + 1 - dense)


# --- checks --------------------------------------------------------------------------------------------------------


def _blurred_layers(model: nn.Module) -> list[_Blurred]:
    return [layer for layer in model.modules() if isinstance(layer, _Blurred)]


def _refuse_other_settings(earlier: Iterable[_Blurred], settings: _Settings) -> None:
    for layer in earlier:
        if layer.blur_settings != settings:
            raise ValueError(
                f"the model is blurred already with {layer.blur_settings}, and now asked for {settings}; "
                "blur once: build the model anew to change the settings"
            )


def _refuse_lazy(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.LazyConv2d):
            raise ValueError(
                f"layer {name!r} is a LazyConv2d that does not know its channels yet; "
                "BlurPool needs them: run one batch through the model first"
            )
