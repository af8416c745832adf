"""The blur's Triton kernel in Triton's interpreter, on the CPU, against torch's padding and convolution in float64.

TRITON_INTERPRET must be 1 before triton is imported, so this is a script: `python blur_kernel_cases.py [all]`.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch

from algos.blurring import blur, blur_kernel

FORMATS = (torch.contiguous_format, torch.channels_last)
TAPS = [(taps, taps) for taps in range(2, 8)] + [(3, 1), (1, 4), (5, 2)]
STRIDES = [(1, 1), (2, 2), (2, 1), (3, 2)]
SIZES = [(1, 1), (2, 3), (4, 5), (7, 6), (9, 12)]
QUICK = [
    ((5, 4), (3, 3), (2, 2), "reflect", torch.channels_last),
    ((5, 4), (3, 3), (2, 2), "reflect", torch.contiguous_format),
    ((6, 5), (4, 7), (1, 2), "zeros", torch.channels_last),
    ((2, 3), (5, 6), (1, 1), "reflect", torch.contiguous_format),
]


def check_case(size: Any, taps: Any, stride: Any, pad: str, memory_format: Any) -> None:
    """Values, derivative, derivative of the derivative, and both along directions."""
    case = size, taps, stride, pad, memory_format
    kernel = functools.partial(blur.convolve, stride=stride, pad=pad)
    images = torch.randn(2, 3, *size).contiguous(memory_format=memory_format).requires_grad_()
    exact = images.detach().double().requires_grad_()
    ours, theirs = (kernel(one, blur.binomial_kernel(taps, like=one)) for one in (images, exact))
    close(ours, theirs, case)
    assert ours.is_contiguous(memory_format=memory_format), case
    gradient = torch.randn(ours.shape).requires_grad_()
    wide = gradient.detach().double().requires_grad_()
    (back,) = torch.autograd.grad(ours, images, gradient, create_graph=True)
    (right,) = torch.autograd.grad(theirs, exact, wide, create_graph=True)
    close(back, right, case)
    assert back.is_contiguous(memory_format=memory_format), case
    direction = torch.randn(images.shape)
    (again,) = torch.autograd.grad(back, gradient, direction, create_graph=True)
    close(again, torch.autograd.grad(right, wide, direction.double())[0], case)


def close(ours: torch.Tensor, theirs: torch.Tensor, case: Any) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6, msg=lambda text: f"{case}: {text}")


def check_transforms() -> None:
    """torch.func's vmap, jvp, and a derivative of a derivative."""
    images, filter = torch.randn(2, 2, 3, 4, 5), blur.binomial_kernel((3, 3), like=torch.empty(()))
    blurred = functools.partial(blur.convolve, kernel=filter, stride=(2, 2), pad="reflect")
    one_by_one = torch.stack([blurred(one) for one in images])
    assert torch.equal(torch.func.vmap(blurred)(images), one_by_one)
    at_dim_1 = torch.func.vmap(blurred, in_dims=1)(images.transpose(0, 1))
    assert torch.equal(at_dim_1, one_by_one)
    forth, along, *_ = torch.func.jvp(blurred, (images[0],), (images[1],))
    assert torch.equal(forth, one_by_one[0])
    assert torch.equal(along, one_by_one[1])

    def cubes(one: torch.Tensor) -> torch.Tensor:
        return blurred(one).pow(3).sum()

    def exact_cubes(one: torch.Tensor) -> torch.Tensor:
        return blur.convolve(one, filter.double(), stride=(2, 2), pad="reflect").pow(3).sum()

    for outer in (torch.func.jacrev, torch.func.jacfwd):
        hessian = outer(torch.func.grad(cubes))(images[0, :1])
        torch.testing.assert_close(
            hessian, torch.func.hessian(exact_cubes)(images[0, :1].double()).float(), rtol=1e-5, atol=1e-5
        )


def check_types_and_strides() -> None:
    """Half types add in float32; images may be slices; what lies beyond a border is not read."""
    images = torch.randn(3, 4, 9, 10)[1:, 1:, ::2, 3:]
    blurred = functools.partial(blur.blur, filter_size=5, stride=2)
    for dtype in blur_kernel.DTYPES:
        rounded = images.to(dtype)
        places = 1 if dtype == torch.bfloat16 else 0.5  # the interpreter cuts bfloat16 off where a GPU rounds
        rtol = places * torch.finfo(dtype).eps + 1e-6  # of the result's one rounding
        torch.testing.assert_close(blurred(rounded).double(), blurred(rounded.double()), rtol=rtol, atol=1e-6)
    images = torch.zeros(1, 1, 9, 9)
    images[..., 0, 0] = torch.nan
    assert int(torch.isnan(blur.blur(images, filter_size=2, pad="zeros")).sum()) == 1
    assert blur.blur(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert blur.blur(torch.zeros(3, 4, 4)).shape == (3, 4, 4)


def main() -> None:
    blur._has_kernel = lambda images: images.dtype in blur_kernel.DTYPES and not blur._is_traced()
    blur.SMALL_MAP_PIXELS = 0
    launches, launch = [], blur_kernel._launch
    blur_kernel._launch = lambda *given: (launches.append(1), launch(*given))[1]
    torch.manual_seed(0)
    every = itertools.product(SIZES, TAPS, STRIDES, ("reflect", "zeros"), FORMATS)
    cases = list(every) if "all" in sys.argv else QUICK
    for case in cases:
        check_case(*case)
    assert len(launches) == 3 * len(cases)
    check_transforms()
    check_types_and_strides()


if __name__ == "__main__":
    main()
