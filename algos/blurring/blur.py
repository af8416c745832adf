"""The binomial filter of BlurPool (Zhang 2019, arXiv 1904.11486), with its own border handling and derivative.

Shapes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blur_kernel

Pair = tuple[int, int]  # rows, columns

# On CPU, maps up to this size are blurred by a matrix product: most of such a map is border, which PyTorch pads pixel
# by pixel.
SMALL_MAP_PIXELS = 64


def blur(
    images: Tensor, *, filter_size: int = 3, stride: int | Pair = 1, pad: Literal["reflect", "zeros"] = "reflect"
) -> Tensor:
    """Blur [N, C, H, W] with the binomial filter and keep every stride-th pixel: [N, C, ⌈H/stride⌉, ⌈W/stride⌉].

    filter_size, pad: as in `apply_blurpool`; here both axes are blurred. Dtype, device and memory format are kept.
    Raises ValueError for a filter_size that is not 2 to 7 and for an unknown pad.
    """
    check_filter(filter_size, pad)
    return convolve(images, binomial_kernel((filter_size, filter_size), like=images), stride=pair(stride), pad=pad)


def check_filter(filter_size: int, pad: str) -> None:
    """ValueError for a filter that does not exist."""
    if filter_size not in range(2, 8):
        raise ValueError(f"filter_size {filter_size} must be a whole number from 2 to 7; 3 is usual")
    if pad not in ("reflect", "zeros"):
        raise ValueError(f"pad {pad!r} must be 'reflect' or 'zeros'")


def binomial_kernel(taps: Pair, *, like: Tensor) -> Tensor:
    """[1, 1, rows, columns]: C(n-1, k) / 2^(n-1) along each axis of n taps, with dtype and device of `like`."""
    rows, columns = (_binomial(size) for size in taps)
    # Exact in every floating-point type down to bfloat16: numerators below 2^8 over a power of two.
    kernel = [[row * column for column in columns] for row in rows]
    return torch.tensor([[kernel]], dtype=like.dtype, device=like.device)


def convolve(images: Tensor, kernel: Tensor, *, stride: Pair, pad: str) -> Tensor:
    """Filter each channel of [N, C, H, W] or [C, H, W] with a binomial `kernel` and keep every stride-th pixel.

    kernel: [1, 1, rows, columns], from `binomial_kernel`; it gets no gradient. stride, pad: as in `blur`.
    """
    if images.dim() == 3:
        return convolve(images.unsqueeze(0), kernel, stride=stride, pad=pad).squeeze(0)
    traced = _is_traced()
    rows, columns = (
        _Axis.of(size, taps, step, pad, any_size=traced)
        for size, taps, step in zip(images.shape[-2:], kernel.shape[-2:], stride, strict=True)
    )
    if traced:
        return _convolve(images, kernel, rows, columns)
    if images.device.type == "cpu" and rows.size * columns.size <= SMALL_MAP_PIXELS and not _is_channels_last(images):
        return _multiply(images, rows, columns)
    return cast(Tensor, _Blur.apply(images, kernel, rows, columns))


def to_channels_last(images: Tensor) -> Tensor:
    """[N, C, H, W] stored as [N, H, W, C]: `contiguous(memory_format=)`, which torch.vmap does not support."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _is_traced() -> bool:
    # Compilers and exporters get a plain padding and convolution, without our derivative.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def pair(value: Any) -> Pair:
    """(rows, columns) from one number or two."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns


@functools.cache
def _binomial(taps: int) -> tuple[float, ...]:
    return tuple(math.comb(taps - 1, k) / 2 ** (taps - 1) for k in range(taps))


class _Axis(NamedTuple):
    """How one axis is filtered."""

    size: int
    taps: int
    stride: int
    mode: str  # of F.pad
    before: int  # pixels of padding
    after: int

    @classmethod
    def of(cls, size: int, taps: int, stride: int, pad: str, *, any_size: bool) -> _Axis:
        """any_size: whether the padding must work for other sizes as well, as in a traced graph."""
        before = (taps - 1) // 2
        last = (size - 1) // stride * stride  # the first pixel of the last window, padded
        after = taps // 2 if any_size else max(0, last + taps - before - size)
        if pad == "zeros":
            return cls(size, taps, stride, "constant", before, after)
        # Reflecting p pixels requires an axis of more than p.
        return cls(size, taps, stride, "reflect" if taps // 2 < size else "replicate", before, after)

    @property
    def kept(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def padded_size(self) -> int:
        return self.before + self.size + self.after


class _Blur(torch.autograd.Function):
    """`_convolve` with a derivative that keeps no image and adds in a fixed order.

    Autograd would keep the padded copy until the backward pass. The derivative of PyTorch's reflection is one scalar
    addition per pixel for NCHW on CPU, five times the work of the padding; on a GPU it adds in no fixed order, so runs
    differ and torch.use_deterministic_algorithms refuses it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, kernel: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
        return _convolve(images, kernel, rows, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Axis, _Axis], output: Tensor) -> None:
        images, kernel, ctx.rows, ctx.columns = inputs
        ctx.channels_last = _is_channels_last(images)
        ctx.save_for_backward(kernel)
        ctx.save_for_forward(kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (kernel,) = ctx.saved_tensors
        return _transposed(gradient, kernel, ctx.rows, ctx.columns, channels_last=ctx.channels_last), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _convolve(tangent, ctx.saved_tensors[0], ctx.rows, ctx.columns)


def _convolve(images: Tensor, kernel: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    if _has_kernel(images):
        filter = _filter(rows, columns)
        return blur_kernel.filter_images(images, filter, channels_last=_is_channels_last(images))
    padding = _padding_of_convolution(rows, columns)
    if padding is None:
        images, padding = _pad(images, rows, columns), (0, 0)
    weight, channels = _weight(kernel, images)
    return F.conv2d(images, weight, stride=(rows.stride, columns.stride), padding=padding, groups=channels)


def _transposed(gradient: Tensor, kernel: Tensor, rows: _Axis, columns: _Axis, *, channels_last: bool) -> Tensor:
    """The transpose of `_convolve`: from the gradient of its output to that of its input."""
    if _has_kernel(gradient):
        filter = _filter(rows, columns).transpose
        return blur_kernel.filter_images(gradient, filter, channels_last=channels_last)
    weight, channels = _weight(kernel, gradient)
    padding = _padding_of_convolution(rows, columns)
    height, width = (rows.size, columns.size) if padding else (rows.padded_size, columns.padded_size)
    # The derivative needs only the shape and format of the convolution's input.
    like = _empty(gradient, height, width, channels_last=channels_last)
    stride, taken = (rows.stride, columns.stride), (True, False, False)
    padded, *_ = torch.ops.aten.convolution_backward(  # pyright: ignore[reportCallIssue]
        gradient, like, weight, None, stride, padding or (0, 0), (1, 1), False, (0, 0), channels, taken
    )
    return padded if padding else _fold(_fold(padded, -1, columns), -2, rows)


def _padding_of_convolution(rows: _Axis, columns: _Axis) -> Pair | None:
    """The padding if the convolution can do it, which saves a copy: zeros, equally many on both sides."""
    by_convolution = all(axis.mode == "constant" and axis.taps % 2 for axis in (rows, columns))
    return (rows.before, columns.before) if by_convolution else None


def _weight(kernel: Tensor, images: Tensor) -> tuple[Tensor, int]:
    channels = int(images.shape[-3])  # a number for ONNX's tracer too, whose convolutions need weights of known shape
    return kernel.to(images).expand(channels, -1, -1, -1), channels


def _has_kernel(images: Tensor) -> bool:
    if not images.is_cuda or images.dtype not in blur_kernel.DTYPES:
        return False
    # Compilers do the padding along with what comes before it; the tensors of FakeTensorMode have no memory.
    return not _is_traced() and type(images) is Tensor and blur_kernel.is_available(images.device)


@functools.cache
def _filter(rows: _Axis, columns: _Axis) -> blur_kernel.Filter:
    transposed = _targets(rows), _targets(columns)
    return blur_kernel.Filter(_sources(rows), _sources(columns), transposed=transposed)


def _multiply(images: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """`_convolve` as a product with one matrix for all channels, [H·W, H'·W']."""
    vertical, horizontal = (
        torch.tensor(_matrix(axis), dtype=images.dtype, device=images.device) for axis in (rows, columns)
    )
    blurred = images.flatten(-2) @ torch.kron(vertical, horizontal)
    return blurred.unflatten(-1, (vertical.shape[-1], horizontal.shape[-1]))


@functools.cache
def _matrix(axis: _Axis) -> tuple[tuple[float, ...], ...]:
    """[pixels, pixels kept]: the weight of each input pixel in each output pixel."""
    matrix = [[0.0] * axis.kept for _ in range(axis.size)]
    for kept, sources in enumerate(_sources(axis)):
        for pixel, weight in sources.items():
            matrix[pixel][kept] = weight
    return tuple(map(tuple, matrix))


def _sources(axis: _Axis) -> list[dict[int, float]]:
    """For each output pixel: the input pixels that it sums, and their weights."""
    sources: list[dict[int, float]] = [{} for _ in range(axis.kept)]
    for kept, weights in enumerate(sources):
        for tap, weight in enumerate(_binomial(axis.taps)):
            pixel = axis.stride * kept + tap - axis.before
            inside = min(max(pixel, 0), axis.size - 1)
            if axis.mode == "reflect":
                inside = 2 * inside - pixel
            elif axis.mode == "constant" and pixel != inside:
                continue
            weights[inside] = weights.get(inside, 0.0) + weight
    return sources


def _targets(axis: _Axis) -> list[dict[int, float]]:
    """The transpose of `_sources`: for each input pixel, the output pixels that it is part of, and its weights."""
    targets: list[dict[int, float]] = [{} for _ in range(axis.size)]
    for kept, sources in enumerate(_sources(axis)):
        for pixel, weight in sources.items():
            targets[pixel][kept] = weight
    return targets


# --- padding -------------------------------------------------------------------------------------------------------


def _pad(images: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    channels_last, reflect = _is_channels_last(images), rows.mode == columns.mode == "reflect"
    if channels_last and reflect and images.device.type != "cpu" and not _is_traced():
        return _reflect_channels_last(images, rows, columns)
    if rows.mode == columns.mode:
        images = F.pad(images, (columns.before, columns.after, rows.before, rows.after), mode=rows.mode)
    else:
        images = F.pad(images, (columns.before, columns.after, 0, 0), mode=columns.mode)
        images = F.pad(images, (0, 0, rows.before, rows.after), mode=rows.mode)
    # Reflection keeps the format on CPU but not everywhere; if a compiler assumes otherwise, a norm after it gets the
    # wrong gradient (seen with aot_eager before a GroupNorm).
    return to_channels_last(images) if channels_last else images


def _reflect_channels_last(images: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """F.pad(mode="reflect") with one copy of the images; PyTorch's also changes their format on a GPU."""
    padded = _empty(images, rows.padded_size, columns.padded_size, channels_last=True)
    between = padded.narrow(-1, columns.before, columns.size)
    between.narrow(-2, rows.before, rows.size).copy_(images)
    for whole, dim, axis in ((between, -2, rows), (padded, -1, columns)):
        for border, mirrored in _mirrored(whole, dim, axis):
            border.copy_(_flip(mirrored, dim))
    return padded


def _fold(padded: Tensor, dim: int, axis: _Axis) -> Tensor:
    """The transpose of padding an axis, in place: adds values beyond the border to the pixels they came from."""
    inner = padded.narrow(dim, axis.before, axis.size)
    if axis.mode == "reflect":
        for border, mirrored in _mirrored(padded, dim, axis):
            mirrored.add_(_flip(border, dim))
    elif axis.mode == "replicate":
        ends = ((0, axis.before, 0), (axis.before + axis.size, axis.after, axis.size - 1))
        for start, length, edge in ends:
            inner.narrow(dim, edge, 1).add_(padded.narrow(dim, start, length).sum(dim, keepdim=True))
    return inner


def _mirrored(padded: Tensor, dim: int, axis: _Axis) -> list[tuple[Tensor, Tensor]]:
    """The two borders of an axis, each with the pixels that it mirrors; all four are views."""
    end = axis.before + axis.size
    borders = ((0, axis.before + 1, axis.before), (end, end - 1 - axis.after, axis.after))
    return [
        (padded.narrow(dim, border, length), padded.narrow(dim, source, length))
        for border, source, length in borders
        if length
    ]


def _flip(pixels: Tensor, dim: int) -> Tensor:
    return pixels.flip(dim) if pixels.shape[dim] > 1 else pixels  # flip copies


def _empty(like: Tensor, height: int, width: int, *, channels_last: bool) -> Tensor:
    samples, channels = like.shape[:2]
    if channels_last:
        return like.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
    return like.new_empty(samples, channels, height, width)


def _is_channels_last(images: Tensor) -> bool:
    # By strides: torch.vmap does not support is_contiguous(memory_format=).
    return images.shape[1] > 1 and images.stride(1) == 1
