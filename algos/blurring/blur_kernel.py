"""A separable filter of few taps as one Triton kernel, for GPUs: borders, strides and transposes are tables.

An axis is filtered by two tables: output pixel o is the sum over k of weights[o, k] times input pixel sources[o, k].
The transpose of a filter is one too, and adds in a fixed order like any other, so runs repeat bit for bit. Sums are in
float32 whatever the images' type. Images are read about once, since neighbors come from the cache, and no padded copy
is made.

Shapes: N samples, C channels, H x W pixels, K taps.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 512  # output values of a program
_INT32_PLACES = 2**31


Taps = Sequence[
    dict[int, float]
]  # of an axis: {source: weight} for each output pixel, one pixel with a source at least


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether it runs on `device`, found by trying it, unless BRISK_TRITON is 0.

    Warns where Triton is there and fails, as without a C compiler, which it needs at its first kernel.
    """
    if os.environ.get("BRISK_TRITON") == "0" or importlib.util.find_spec("triton") is None:
        return False
    pixel = torch.ones(1, 1, 1, 1, device=device)
    try:
        _launch(
            pixel, torch.empty_like(pixel), (*_tables_of([{0: 1.0}], device), *_tables_of([{0: 1.0}], device)), False
        )
    except Exception as error:  # of Triton, the compiler it calls, and the driver
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"blurs go without their Triton kernel, in torch's own operations: {reason}; BRISK_TRITON=0 leaves it out "
            "without this warning",
            stacklevel=2,
        )
        return False
    return True


class Filter:
    """A filter of both axes and its transpose. Not a tuple, so that torch.func does not take it for images."""

    def __init__(self, rows: Taps, columns: Taps, *, transposed: tuple[Taps, Taps]) -> None:
        self.size = len(rows), len(columns)
        self._axes, self._transposed_axes = (rows, columns), transposed
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    @functools.cached_property
    def transpose(self) -> Filter:
        return Filter(*self._transposed_axes, transposed=self._axes)

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """For rows and for columns, sources int32 and weights float32, both [pixels, K]; a weight of 0 has no source.

        Only where images have memory: torch.func would make tensors of its own kind of them.
        """
        if device not in self._tables:
            with torch.inference_mode(False):
                self._tables[device] = tuple(table for taps in self._axes for table in _tables_of(taps, device))
        return self._tables[device]


def filter_images(images: Tensor, by: Filter, *, channels_last: bool) -> Tensor:
    """[N, C, H, W] of one of DTYPES at any strides, each channel filtered: [N, C, H', W'].

    It has derivatives of every order, in both directions. channels_last: how the result lies in memory; a derivative
    lies as the images do.
    """
    return cast(Tensor, _Filtered.apply(images, by, channels_last))


class _Filtered(torch.autograd.Function):
    """Not an operator of torch.library: torch.func takes none that has a derivative."""

    @staticmethod
    def forward(images: Tensor, by: Filter, channels_last: bool) -> Tensor:
        samples, channels = images.shape[:2]
        height, width = by.size
        if channels_last:
            filtered = images.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
        else:
            filtered = images.new_empty(samples, channels, height, width)
        if filtered.numel():
            _launch(images, filtered, by.tables(images.device), channels_last)
        return filtered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Filter, bool], output: Tensor) -> None:
        images, ctx.by, ctx.channels_last = inputs
        ctx.images_channels_last = images.shape[1] > 1 and images.stride(1) == 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return filter_images(gradient, ctx.by.transpose, channels_last=ctx.images_channels_last), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return filter_images(tangent, ctx.by, channels_last=ctx.channels_last)

    @staticmethod
    def vmap(info: Any, in_dims: Any, images: Tensor, by: Filter, channels_last: bool) -> tuple[Tensor, int]:
        images = images.movedim(in_dims[0], 0)
        filtered = filter_images(images.flatten(0, 1), by, channels_last=channels_last)
        return filtered.unflatten(0, images.shape[:2]), 0


def _tables_of(taps: Taps, device: torch.device) -> tuple[Tensor, Tensor]:
    most = max(map(len, taps))
    sources = [[*row, *[0] * (most - len(row))] for row in taps]
    weights = [[*row.values(), *[0.0] * (most - len(row))] for row in taps]
    return torch.tensor(sources, dtype=torch.int32).to(device), torch.tensor(weights, dtype=torch.float32).to(device)


def _launch(images: Tensor, filtered: Tensor, tables: Sequence[Tensor], channels_last: bool) -> None:
    blocks = -(-filtered.numel() // _BLOCK)
    reach = sum((size - 1) * stride for size, stride in zip(images.shape, images.stride(), strict=True))
    with torch.cuda.device_of(images):
        _kernel()[(blocks,)](
            images,
            filtered,
            *tables,
            *filtered.shape[1:],
            filtered.numel(),
            *images.stride(),
            ROW_TAPS=tables[0].shape[1],
            COLUMN_TAPS=tables[2].shape[1],
            CHANNELS_LAST=channels_last,
            WIDE=max(reach, filtered.numel() + _BLOCK) >= _INT32_PLACES,
            BLOCK=_BLOCK,
        )


@functools.cache
def _kernel() -> Any:
    import triton
    from triton import language as tl

    globals()["tl"] = tl  # where Triton looks names up

    @triton.jit
    def filter_block(
        images, filtered, row_sources, row_weights, column_sources, column_weights,
        channels, height, width, places, sample_stride, channel_stride, row_stride, column_stride,
        ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        if WIDE:
            program = program.to(tl.int64)
        place = program * BLOCK + tl.arange(0, BLOCK)  # in the order of memory
        inside = place < places
        if CHANNELS_LAST:
            channel, pixel = place % channels, place // channels
            column, row, sample = pixel % width, pixel // width % height, pixel // width // height
        else:
            column, line = place % width, place // width
            row, channel, sample = line % height, line // height % channels, line // height // channels
        plane = images + sample * sample_stride + channel * channel_stride
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for i in tl.static_range(ROW_TAPS):  # pyright: ignore[reportGeneralTypeIssues]
            row_weight = tl.load(row_weights + row * ROW_TAPS + i, mask=inside, other=0.0)
            source_row = tl.load(row_sources + row * ROW_TAPS + i, mask=inside, other=0)
            line_start = plane + source_row.to(place.dtype) * row_stride
            for j in tl.static_range(COLUMN_TAPS):  # pyright: ignore[reportGeneralTypeIssues]
                tap = column * COLUMN_TAPS + j
                weight = row_weight * tl.load(column_weights + tap, mask=inside, other=0.0)
                source = tl.load(column_sources + tap, mask=inside, other=0)
                value = tl.load(
                    line_start + source.to(place.dtype) * column_stride, mask=inside & (weight != 0), other=0.0
                )
                total += weight * value.to(tl.float32)
        tl.store(filtered + place, total.to(filtered.dtype.element_ty), mask=inside)

    return filter_block
