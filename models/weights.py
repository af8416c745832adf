"""Pretrained weights: from a file, from torchvision by name, from a Hugging Face folder; matched by parameter name.

Pickles are read with torch's restricted unpickler, which creates tensors, arrays and plain values and runs no code.
"""

from __future__ import annotations

import difflib
import logging
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpointing import checkpoint_blocks
from .data_only import data_only, named_by, reason_of

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

POSITIONS = "encoder.pos_embedding"  # torchvision's name of a ViT's position embeddings, [1, 1 + g², D]
# Keys under which training scripts store weights; Composer's checkpoints, and so this project's, use state.model.
_WRAPPERS = ("state", "state_dict", "model", "model_state_dict")
_MOST_EXPANDED_BYTES = 1 << 20  # of a tensor that repeats what is stored
_PREFIXES = ("module.", "_orig_mod.")  # of parameters under DistributedDataParallel and torch.compile
# Heads that torchvision's GoogLeNet and Inception have in training only.
_AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\.")


def load_weights(model: nn.Module, weights: str, *, architecture: str | None = None) -> nn.Module:
    """Load `weights` into `model`, in place; returns the same model.

    weights: a file (.safetensors, or what torch.save wrote: .pt, .pth, .bin, a run's best.pt), or one of torchvision's
        names for the weights of `architecture` (IMAGENET1K_V2), downloaded at first use.
    architecture: torchvision's name of the network; None if torchvision does not have it.

    Names are torchvision's or those of antialiased-cnns, whose fixed filters are left out, so that its weights load
    into a network with or without BlurPool. If the weights have no classifier, or one for another number of classes,
    the model keeps its initialized one; position embeddings of another grid are interpolated. Both are logged.

    Raises ValueError, naming the source, for weights that are missing, unreadable, or of another network.
    """
    state = read_weights(weights, architecture=architecture)
    return copy_weights(model, _translate_antialiased(state, model), source=weights)


def finish(
    model: nn.Module, weights: str | None, *, architecture: str | None = None, gradient_checkpointing: bool = False
) -> nn.Module:
    """The last step of every builder: weights, unless None (see `load_weights`), and gradient checkpointing if set."""
    if weights is not None:
        load_weights(model, weights, architecture=architecture)
    return checkpoint_blocks(model) if gradient_checkpointing else model


def read_weights(weights: str, *, architecture: str | None = None, trust: bool = False) -> StateDict:
    """The tensors that `weights` names, on the CPU; see `load_weights`.

    trust: read a file with Python's unrestricted unpickler, which runs what the file says.
    """
    names = _torchvision_names(architecture)
    if weights in names:
        return _unwrap(_download(weights, architecture), weights)
    path = Path(weights).expanduser()
    if path.is_file():
        return _unwrap(_read_file(path, trust), weights)
    near = difflib.get_close_matches(weights, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f", or one of torchvision's for {architecture}: {', '.join(names)}" if names else ""
    raise ValueError(
        f"weights {weights!r} are not there: give the path of a .pt, .pth or .safetensors file{known}{hint}"
    )


def copy_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> nn.Module:
    """Copy `state` into `model` by name, in place; see `load_weights` for what may differ."""
    own = model.state_dict()
    state = {name: value for name, value in state.items() if not _AUXILIARY.match(name) or name in own}
    if POSITIONS in own and POSITIONS in state:
        state[POSITIONS] = _fit_positions(state[POSITIONS], own[POSITIONS], source=source)
    head = classifier_names(model)
    new_head = [name for name in head if name not in state or state[name].shape != own[name].shape]
    state = {name: value for name, value in state.items() if name not in new_head}
    # Files from before torch 0.4.1 do not count batches; only a norm without momentum reads the count.
    missing = [n for n in own if n not in state and n not in new_head and not n.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    misshapen = [name for name in state if name in own and state[name].shape != own[name].shape]
    _refuse_misfits(model, source, missing=missing, extra=extra, misshapen=misshapen, state=state)
    model.load_state_dict(state, strict=False)
    if new_head:
        classes = own[new_head[0]].shape[0]
        log.warning("%s: everything but the classifier, which is new for %d classes", source, classes)
    return model


def plain_tensors(state: Mapping[str, Tensor], source: str) -> StateDict:
    """The same tensors; raises ValueError if one of them is not dense, real and all there."""
    strange = next((_printable(name) for name, value in state.items() if not _is_plain(value)), None)
    if strange is not None:
        raise ValueError(
            f"{source}: {strange} is no plain tensor of numbers: it is quantized, sparse, complex, without data, or "
            "expanded far beyond what is stored; save it dense and contiguous"
        )
    return dict(state)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the classifier: the last nn.Linear, or without one the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        layers = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if layers:
            return [f"{layers[-1]}.{name}" for name, _ in model.get_submodule(layers[-1]).named_parameters()]
    return []


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, 1 + g², D] of a square grid, resampled to `grid` rows and columns: [1, 1 + r c, D].

    Bicubic with align_corners=False, as in DeiT and Hugging Face's ViT; the class token's is kept.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    if (side, side) == grid:
        return positions
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([token, resampled.flatten(2).transpose(1, 2)], dim=1)


def _torchvision_names(architecture: str | None) -> list[str]:
    if architecture is None:
        return []
    from torchvision.models import get_model_weights

    return list(get_model_weights(architecture).__members__)


def _download(name: str, architecture: str | None) -> Any:
    from torchvision.models import get_model_weights

    assert architecture is not None
    weights = get_model_weights(architecture)[name]
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:  # no network, no space; a truncated or wrong file
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        reason = " ".join(str(error).split())
        raise ValueError(
            f"weights {name} of {architecture} could not be had from {weights.url} ({reason}); "
            f"download that file to {cache}, or give the path of another"
        ) from None


def _read_file(path: Path, trust: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if trust:
            return torch.load(path, map_location="cpu", weights_only=False)
        with data_only():
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ValueError(f"reading {path} needs safetensors: pip install 'brisk-vision[hf]'") from None
    except pickle.UnpicklingError as error:
        what = named_by(error, path) or reason_of(error)
        raise ValueError(
            f"{path} holds more than tensors ({what}), which only an unpickler that runs a stranger's "
            "code could read; save the state dict alone: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # torch and safetensors raise many kinds of errors for truncated or foreign files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}); "
            "give a whole .pt, .pth or .safetensors file"
        ) from None


def _unwrap(loaded: Any, source: str) -> StateDict:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(map(_is_named_tensor, loaded.items())):
        raise ValueError(
            f"{source} holds no state dict (parameter names and tensors, at the top or under one of "
            f"{', '.join(_WRAPPERS)}); save one: torch.save(model.state_dict(), path)"
        )
    state = plain_tensors(loaded, source)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _printable(name: str) -> str:
    """A stranger's file may have any name."""
    return name if name.isprintable() and len(name) < 200 else f"{name[:200]!r}"


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_plain(value: Tensor) -> bool:
    """Whether its numbers are all there. A few bytes can be a tensor of any shape, with strides of zero."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        return False
    return value.numel() * value.element_size() <= max(value.untyped_storage().nbytes(), _MOST_EXPANDED_BYTES)


def _translate_antialiased(state: StateDict, model: nn.Module) -> StateDict:
    """antialiased-cnns keeps torchvision's layers in order, with fixed filters in between: match them by position."""
    if not any(name.endswith(".filt") for name in state):
        return state
    theirs = {name: value for name, value in state.items() if not name.endswith((".filt", "num_batches_tracked"))}
    ours = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    if [name.rpartition(".")[2] for name in theirs] != [name.rpartition(".")[2] for name in ours]:
        return theirs  # another network: the names that do not fit are reported with the rest
    return dict(zip(ours, theirs.values(), strict=True))


def _fit_positions(theirs: Tensor, ours: Tensor, *, source: str) -> Tensor:
    sides = [math.isqrt(max(positions.shape[1] - 1, 0)) for positions in (theirs, ours)]
    if theirs.shape == ours.shape or theirs.ndim != 3 or sides[0] ** 2 != theirs.shape[1] - 1:
        return theirs
    log.warning("%s: position embeddings interpolated from %dx%d to %dx%d", source, sides[0], sides[0], *sides[1:] * 2)
    return interpolate_positions(theirs, (sides[1], sides[1]))


def _refuse_misfits(
    model: nn.Module,
    source: str,
    *,
    missing: list[str],
    extra: list[str],
    misshapen: list[str],
    state: Mapping[str, Tensor],
) -> None:
    if not (missing or extra or misshapen):
        return
    own = model.state_dict()
    said = [
        f"{len(names)} {what} ({_printable(names[0])}{detail(names[0])} first)"
        for names, what, detail in (
            (missing, "parameters of the model are not in it", lambda name: ""),
            (extra, "of its tensors have no place in the model", lambda name: ""),
            (
                misshapen,
                "differ in shape",
                lambda name: f", {list(state[name].shape)} where the model has {list(own[name].shape)},",
            ),
        )
        if names
    ]
    raise ValueError(
        f"weights {source} do not fit {type(model).__name__}: {'; '.join(said)}; "
        "name the model that they were trained with"
    )
