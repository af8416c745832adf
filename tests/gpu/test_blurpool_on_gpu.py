"""BlurPool's filter and its derivative on a GPU, where it has a kernel, against torch's padding and convolution."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from algos.blurring import blur_kernel
from algos.blurring.blur import binomial_kernel, convolve

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

PADS = {"reflect": "reflect", "zeros": "constant"}


def pad_and_convolve(images: torch.Tensor, taps: Any, stride: Any, pad: str) -> torch.Tensor:
    """What a blur is, in torch's own operations and with their derivatives."""
    kernel = binomial_kernel(taps, like=images)
    (above, left), (below, right) = ([(size - 1) // 2 for size in taps], [size // 2 for size in taps])
    padded = F.pad(images, (left, right, above, below), mode=PADS[pad])
    return F.conv2d(padded, kernel.expand(images.shape[1], -1, -1, -1), stride=stride, groups=images.shape[1])


SIZES = [(4, 5), (9, 12), (56, 56)]
TAPS = [(3, 3), (2, 2), (5, 7), (4, 1)]
FORMATS = [torch.contiguous_format, torch.channels_last]
STRIDES = [(1, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_derivatives_are_those_of_padding_and_convolving(pad: str, memory_format: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    for size, taps, stride in itertools.product(SIZES, TAPS, STRIDES):
        images = torch.randn(2, 3, *size, dtype=torch.float64, device=device).contiguous(memory_format=memory_format)
        ours = functools.partial(convolve, kernel=binomial_kernel(taps, like=images), stride=stride, pad=pad)
        theirs = functools.partial(pad_and_convolve, taps=taps, stride=stride, pad=pad)
        blurred, back = torch.func.vjp(ours, images)
        close(blurred, theirs(images))
        assert blurred.is_contiguous(memory_format=memory_format), (size, taps, stride)
        gradient = torch.randn_like(blurred)
        (own,) = back(gradient)
        close(own, torch.func.vjp(theirs, images)[1](gradient)[0])
        close(torch.func.jvp(ours, (images,), (images,))[1], theirs(images))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_the_derivative_is_deterministic_and_right(dtype: Any, memory_format: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 16, 28, 28, device=device).to(dtype).contiguous(memory_format=memory_format)
    blur = functools.partial(convolve, kernel=binomial_kernel((3, 3), like=images), stride=(2, 2), pad="reflect")
    blurred, back = torch.func.vjp(blur, images)
    gradient = torch.randn_like(blurred)
    first, second = back(gradient)[0], torch.func.vjp(blur, images)[1](gradient)[0]
    assert torch.equal(first, second)
    exact = functools.partial(
        convolve, kernel=binomial_kernel((3, 3), like=images.double()), stride=(2, 2), pad="reflect"
    )
    right, back = torch.func.vjp(exact, images.double())
    tolerance = 8 * torch.finfo(dtype).eps  # a pixel is a sum of at most nine products of up to about four
    torch.testing.assert_close(blurred.double(), right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.double(), back(gradient.double())[0], rtol=tolerance, atol=tolerance)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("only_on_gpu", "deterministic", "no_tf32")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_the_kernel_gives_what_torch_does(
    dtype: Any, memory_format: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same bits; values, derivative and its derivative within a rounding of those in float64."""
    launches, launch = [], blur_kernel._launch
    pytest.importorskip("triton")
    monkeypatch.setattr(blur_kernel, "_launch", lambda *given: (launches.append(1), launch(*given)))
    torch.manual_seed(0)
    for size, taps, stride, pad in itertools.product([*SIZES, (2, 3), (1, 1)], TAPS, STRIDES, PADS):
        images = torch.randn(8, 64, *size, device=device).to(dtype).contiguous(memory_format=memory_format)
        results = [_with_derivatives(images, taps, stride, pad) for _ in range(2)]
        assert all(map(torch.equal, *results)), (size, taps, stride, pad)
        places = torch.finfo(dtype).eps * (0.5 if dtype in HALVES else 8) + 1e-6
        for ours, right in zip(results[0], _with_derivatives(images.double(), taps, stride, pad), strict=True):
            # The derivatives' directions are rounded to `dtype` in both.
            torch.testing.assert_close(ours.double(), right, rtol=places, atol=places)
    assert len(launches) >= 6


def _with_derivatives(images: torch.Tensor, taps: Any, stride: Any, pad: str) -> list[torch.Tensor]:
    """A blur, its derivative along ones and that one's along the images."""
    images = images.detach().requires_grad_()
    blurred = convolve(images, binomial_kernel(taps, like=images), stride=stride, pad=pad)
    direction = torch.ones_like(blurred).requires_grad_()
    (back,) = torch.autograd.grad(blurred, images, direction, create_graph=True)
    (again,) = torch.autograd.grad(back, direction, images.detach())
    return [blurred.detach(), back.detach(), again]
