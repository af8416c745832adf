"""The network as a graph that needs no class of its own: torch.export, ONNX, TorchScript."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.exporting.samples import TOLERANCE, largest_difference, logits_of

_MOST_BYTES_IN_ONE_FILE = 1_800_000_000  # protobuf ends at 2 GiB; larger weights go beside the .onnx file
_MOST_IMAGES = 2**31 - 1  # in a batch; torch 2.7 cannot trace a ViT for a batch without a limit
_OPTIONAL = "pip install 'brisk-vision[export]'"


def write_program(network: nn.Module, images: Tensor, path: Path) -> bool:
    """Write a torch.export program; returns whether it takes images of any size."""
    program, any_size = _traced(network, images)
    with _quiet():
        torch.export.save(program, path)
    return any_size


def write_onnx(network: nn.Module, images: Tensor, path: Path) -> bool:
    """Write an ONNX graph from `images` [batch, 3, height, width] to `logits`; returns whether it takes any size."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter is made of it
    except ModuleNotFoundError as error:
        raise ValueError(f"an ONNX export needs {error.name}: {_OPTIONAL}") from None
    program, any_size = _traced(network, images)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    with _quiet():
        torch.onnx.export(
            program,
            (images,),
            path,
            input_names=["images"],
            output_names=["logits"],
            external_data=size_bytes > _MOST_BYTES_IN_ONE_FILE,
            dynamo=True,
            verbose=False,
        )
    model = onnx.load(str(path), load_external_data=False)
    _name_dimensions(model, any_size=any_size)
    onnx.save(model, str(path))
    return any_size


def write_torchscript(network: nn.Module, images: Tensor, path: Path) -> bool:
    """Write a TorchScript trace; returns whether it takes images of any size."""
    with _quiet():
        traced: Any = torch.jit.trace(network, (images,), check_trace=False)
        traced.save(str(path))
    return _agrees_at_other_sizes(network, traced, images)


def other_size(images: Tensor) -> Tensor:
    """The same images at half as many pixels again per side."""
    size_px = images.shape[-1] * 3 // 2
    return nn.functional.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True)


def _traced(network: nn.Module, images: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    """The network's program for any batch, and for any size where the network allows it; and whether it does."""
    batch, any_size = torch.export.Dim("batch", min=1, max=_MOST_IMAGES), {}
    try:
        logits_of(network, other_size(images))
        any_size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    except Exception:  # each library's networks refuse other sizes with errors of their own
        pass
    if any_size:
        with contextlib.suppress(Exception):  # the tracer found a decision that depends on the size
            program = _export(network, images, {0: batch, **any_size})
            if _agrees_at_other_sizes(network, program.module(), images):
                return program, True
    try:
        return _export(network, images, {0: batch}), False
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"torch.export cannot trace {type(network).__name__} ({type(error).__name__}: {reason}); "
            "give --to safetensors, which needs no graph"
        ) from None


def _export(network: nn.Module, images: Tensor, dimensions: dict[int, Any]) -> torch.export.ExportedProgram:
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for all of it, which no exporter knows
    try:
        with _quiet(), torch.no_grad():
            # Not strict: torch 2.7's default reads bytecode, and finds less that it can trace.
            return torch.export.export(network, (images,), dynamic_shapes=(dimensions,), strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _agrees_at_other_sizes(network: nn.Module, traced: Any, images: Tensor) -> bool:
    other = other_size(images)
    try:
        pairs = [(logits_of(network, given), logits_of(traced, given)) for given in (other, other[:1], images[:1])]
    except Exception:  # an assertion of the graph, or a shape that does not fit
        return False
    return all(largest_difference(*pair) <= TOLERANCE for pair in pairs)


def _name_dimensions(model: Any, *, any_size: bool) -> None:
    """torch names the dynamic dimensions of an ONNX graph s34, s14 ...; people read `batch`, `height`, `width`."""
    names = ("batch", None, "height" if any_size else None, "width" if any_size else None)
    given = model.graph.input[0].type.tensor_type.shape.dim
    new = {one.dim_param: name for one, name in zip(given, names, strict=True) if one.dim_param and name}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for one in value.type.tensor_type.shape.dim:
            if one.dim_param in new:
                one.dim_param = new[one.dim_param]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of constants in the graph, which the comparison at several sizes judges, and print progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
