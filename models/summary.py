"""A network's layers, shapes, parameters and multiply-adds, without running it on data.

A copy of the network runs once on meta tensors, which have shapes but no values, so it takes almost no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Layer:
    """One row of a summary. `shape` is the output's for one image, None if the forward pass skips the layer."""

    name: str  # dotted path from the root, empty for the root
    kind: str
    depth: int
    shape: tuple[int, ...] | None
    parameters: int  # including its children's; shared ones count once
    macs: int | None  # None for a bare parameter


def summarize(module: nn.Module, *, image_size: int, num_images: int = 1, depth: int = 2) -> str:
    """The tree of `module`'s layers down to `depth` as text, with the figures of `find_layers` for one image."""
    found = find_layers(module, image_size=image_size, num_images=num_images)
    layers = [layer for layer in found if layer.depth <= depth]
    rows = [("layer", "output of one image", "parameters", "MMACs"), *map(_row, layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    lines = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {parameters:>{widths[2]}}  {macs:>{widths[3]}}".rstrip()
        for name, shape, parameters, macs in rows
    ]
    total = layers[0]
    assert total.macs is not None
    return "\n".join(
        [
            *lines,
            f"{total.parameters:,} parameters ({trainable:,} trainable), {total.macs / 1e9:.3f} GMACs at "
            f"{image_size} px; convolutions and matrix products are counted",
        ]
    )


def find_layers(module: nn.Module, *, image_size: int, num_images: int = 1) -> list[Layer]:
    """Every module of `module`, parents first, and each parameter that a module with children holds itself.

    image_size: px. num_images: batch size of the counted pass, for networks that do not accept a single image.
    MACs are multiply-adds of one image's forward pass in convolutions and matrix products (including attention); a
    layer that runs twice counts twice. Raises what the forward pass raises for that size.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    counts = _count_on_meta(module, image_size=image_size, num_images=num_images, shapes=shapes)
    root = type(module).__name__
    layers = []
    for name, part in module.named_modules():
        depth = name.count(".") + 1 if name else 0
        flops = sum(counts.get(f"{root}.{name}" if name else "Global", {}).values())
        macs = flops // 2 // num_images
        layers.append(Layer(name, type(part).__name__, depth, shapes.get(name), count_parameters(part), macs))
        if next(part.children(), None) is not None:
            layers.extend(_own_parameters(part, name, depth + 1))
    return layers


def count_parameters(module: nn.Module) -> int:
    """Number of scalars in the parameters of `module`; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def copy_on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` without values, in evaluation mode, whose forward pass computes shapes alone."""
    shadow = deepcopy(module).to("meta").eval()
    for part in shadow.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.forward = partial(_leave_shape, part)
    return shadow


def count_forward_macs(module: nn.Module, *, image_size: int, num_images: int = 1) -> int:
    """Multiply-adds of one image's forward pass at `image_size` px: those of convolutions and matrix products.

    num_images: batch size of the counted pass, divided out again; some networks do not accept a single image. Raises
    what the forward pass raises.
    """
    counts = _count_on_meta(module, image_size=image_size, num_images=num_images, shapes={})
    return sum(counts.get("Global", {}).values()) // 2 // num_images


@torch.no_grad()
def _count_on_meta(
    module: nn.Module, *, image_size: int, num_images: int, shapes: dict[str, tuple[int, ...]]
) -> Mapping[str, Mapping[Any, int]]:
    """Dotted path with the root's class first -> operation -> flops; fills `shapes`, path without the root -> shape."""
    shadow = copy_on_meta(module)
    for name, part in shadow.named_modules():
        part.register_forward_hook(partial(_note_shape, shapes, name))
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(num_images, 3, image_size, image_size, device="meta"))
    return counter.get_flop_counts()


def _leave_shape(norm: nn.BatchNorm2d, input: Tensor) -> Tensor:
    """Batch norm keeps the shape; on meta tensors its own forward takes longer than a convolution's."""
    fits = input.ndim == 4 and input.shape[1] == norm.num_features
    return input if fits else type(norm).forward(norm, input)  # which raises the error


def _note_shape(shapes: dict[str, tuple[int, ...]], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    tensor = next(_tensors(output), None)
    if tensor is not None:
        shapes[name] = tuple(tensor.shape[1:])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


def _own_parameters(part: nn.Module, name: str, depth: int) -> Iterator[Layer]:
    for own, parameter in part.named_parameters(recurse=False):
        path = f"{name}.{own}" if name else own
        yield Layer(path, "Parameter", depth, tuple(parameter.shape), parameter.numel(), None)


def _row(layer: Layer) -> tuple[str, str, str, str]:
    name = layer.name.rpartition(".")[2]
    return (
        "  " * layer.depth + (f"{name}: {layer.kind}" if name else layer.kind),
        "" if layer.shape is None else " x ".join(map(str, layer.shape)),
        f"{layer.parameters:,}" if layer.parameters else "",
        f"{layer.macs / 1e6:,.2f}" if layer.macs else "",
    )
