"""Sorts a GPU's kernels into groups by their names: cuDNN's, cuBLAS's, CUTLASS's, ATen's and those of torch's compiler.

The first rule that fits counts. A fused kernel of torch's compiler carries the names of the operations that it does
(`triton_poi_fused__native_batch_norm_legit_functional_relu_3`) and counts under the heaviest of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GROUPS = (
    "convolution", "matrix product", "attention", "norm", "elementwise", "copies and formats", "optimizer", "others",
)  # fmt: skip
GAPS = "gaps"

# What torch's compiler calls its own kernels: a heuristic (pointwise, reduction, persistent reduction, split scan,
# foreach, template), "fused", and the operations' names, of which old versions cut off the end.
_TRITON = re.compile(r"triton_(?P<kind>poi|red|per|spl|unk|mix|for|tem|mm)_fused_(?P<operations>\w*?)(?:_\d+)?$")
# Operations that only move or cast; the compiler also names the convolution whose input or weight it reorders.
_MOVES = re.compile(
    r"^(?:_*(?:to_copy|copy|clone|convert_element_type|convolution(?:_backward)?|permute|transpose|view|unsqueeze|"
    r"expand|slice|select|reshape|cat|empty|t)(?=_|$))+$"
)

_RULES: tuple[tuple[str, str], ...] = (
    # cuDNN's attention says fprop, as its convolutions do, and so goes first.
    ("attention", r"flash|fmha|sdpa|attention(?!.*gemm)|mem_?eff"),
    ("optimizer", r"multi_tensor_apply|foreach|fused_?(?:sgd|adam)|optimizer"),
    # Before convolution, for these are cuDNN's conversions around one.
    ("copies and formats", r"nchwtonhwc|nhwctonchw|nhwcaddpadding|nhwcslicepadding|kern_?shuffle|convert_?tensor|"
                           r"(?:tensor)?transpose|permutationkernel"),
    ("norm", r"batch_?norm|layer_?norm|group_?norm|instance_?norm|rms_?norm|\bbn_(?:fw|bw)|bn_(?:fw|bw)_|"
             r"normalization|gammabeta|rowwisemoments"),
    ("convolution", r"fprop|dgrad|wgrad|implicit_?(?:gemm|convolve)|convolve|conv\dd|conv_depthwise|mkldnn_convolution|"
                    r"aten::(?:cudnn_)?convolution|winograd|scudnn|cudnn.*(?:gemm|cutlass)|im2col|col2im"),
    ("matrix product", r"gemm|gemv|nvjet|matmul|splitkreduce|cutlass.*(?:kernel|tensorop)|"
                       r"aten::(?:add)?(?:b|bad)?mm\b|aten::linear|dot_kernel|xmma"),
    ("copies and formats", r"memcpy|memset|copy_kernel|direct_copy|catarray|aten::(?:copy_|_to_copy|to|clone|cat|"
                           r"contiguous)\b"),
    ("optimizer", r"aten::_foreach|aten::_fused"),
    ("elementwise", r"elementwise|pointwise|threshold|dropout|relu|gelu|silu|"
                    r"aten::(?:add|mul|div|sub|where|lerp|neg|sqrt|exp|zero|fill)_?\b"),
)  # fmt: skip
_COMPILED_RULES = tuple((group, re.compile(rule, re.IGNORECASE)) for group, rule in _RULES)


def kernel_group(name: str) -> str:
    """The group of `GROUPS` that a kernel, or an operation of torch on a CPU, belongs to by its name."""
    compiled = _TRITON.search(name)
    if compiled is not None:
        return _compiled_group(compiled["kind"], compiled["operations"])
    for group, rule in _COMPILED_RULES:
        if rule.search(name):
            return group
    return "others"


def _compiled_group(kind: str, operations: str) -> str:
    if kind in ("tem", "mm"):  # a template of a product or a convolution, which the compiler chose by measuring
        return "convolution" if "convolution" in operations else "matrix product"
    if kind == "for" or "foreach" in operations:
        return "optimizer"
    if re.search(r"batch_norm|layer_norm|group_norm", operations):
        return "norm"
    if _MOVES.match(operations):
        return "copies and formats"
    # Reductions of something else: the loss, a bias's gradient, a pool.
    return "elementwise" if kind == "poi" and "pool" not in operations else "others"


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, in μs. start_us: on the trace's clock; None for sums, which have no place in time."""

    name: str
    duration_us: float
    start_us: float | None = None
    count: int = 1


def shares(kernels: Sequence[Kernel], *, span_us: float) -> list[dict[str, float | str | int]]:
    """A row for each of `GROUPS`, the longest first, and one for the gaps: the time in which nothing ran.

    span_us: the whole time; shares are of it. Kernels that ran at once count fully each, so that shares can add up to
    more than 1.
    """
    rows = []
    for group in GROUPS:
        mine = [kernel for kernel in kernels if kernel_group(kernel.name) == group]
        total = sum(kernel.duration_us for kernel in mine)
        rows.append({"group": group, "us": total, "share": total / span_us, "count": sum(k.count for k in mine)})
    rows.sort(key=lambda row: -row["us"])
    gaps = max(0.0, span_us - busy_us(kernels))
    return [*rows, {"group": GAPS, "us": gaps, "share": gaps / span_us, "count": 0}]


def top(kernels: Iterable[Kernel], *, number: int, span_us: float) -> list[dict[str, float | str | int]]:
    """The `number` kernels that took longest, by name, with their group, time, share of `span_us` and count."""
    sums: dict[str, list[float]] = {}
    for kernel in kernels:
        total = sums.setdefault(kernel.name, [0.0, 0])
        total[0] += kernel.duration_us
        total[1] += kernel.count
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:number]
    return [
        {"name": name, "group": kernel_group(name), "us": us, "share": us / span_us, "count": int(count)}
        for name, (us, count) in longest
    ]


def busy_us(kernels: Sequence[Kernel]) -> float:
    """The time in which at least one kernel ran; the sum where they have no place in time."""
    placed = sorted((kernel.start_us, kernel.duration_us) for kernel in kernels if kernel.start_us is not None)
    busy, until = sum(kernel.duration_us for kernel in kernels if kernel.start_us is None), float("-inf")
    for start, duration in placed:
        busy += max(0.0, start + duration - max(start, until))
        until = max(until, start + duration)
    return busy
