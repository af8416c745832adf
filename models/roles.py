"""Which weights of a network are hidden matrices: those of a layer that is neither its first nor its classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SelfAttention
from .summary import copy_on_meta

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTIONS = (nn.MultiheadAttention, SelfAttention)  # read their layers' weights without calling them
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


def hidden_matrices(network: nn.Module, *, image_size: int, num_images: int = 2) -> list[str]:
    """Names of the weights that map features to features, in the network's order.

    They are the weights of linear layers, of attention, and of convolutions that are not grouped (seen as
    [out, in x height x width]), in layers that a forward pass calls, except

    - those of the first such layer that it calls, whose inputs are pixels;
    - those of the last one, whose outputs are logits, and of linear layers of the same shape called right before it
      (the second head of a distilled network).

    A vector in a matrix's clothes (one row or one column) is none. Everything else, such as norms, biases, tokens,
    position embeddings and tables, is no hidden matrix either.

    The pass runs on meta tensors, on num_images images of image_size px. Raises what it raises.
    """
    calls: list[str] = []
    shadow = copy_on_meta(network)
    modules = dict(shadow.named_modules())
    for name, module in modules.items():
        if isinstance(module, (*_LAYERS, *_ATTENTIONS)):
            module.register_forward_hook(partial(_note_call, calls, name))
    with torch.no_grad():
        shadow(torch.empty(num_images, 3, image_size, image_size, device="meta"))
    ends = _ends([name for name in calls if isinstance(modules[name], _LAYERS)], modules)
    inside = [weight for name in dict.fromkeys(calls) if name not in ends for weight in _weights(name, modules[name])]
    return [name for name, weight in shadow.named_parameters() if name in inside and _is_matrix(weight)]


def _note_call(calls: list[str], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    calls.append(name)


def _ends(calls: list[str], modules: dict[str, nn.Module]) -> set[str]:
    """The first layer called, and the classifier: the last one and its twins right before it."""
    if not calls:
        return set()
    last, ends = modules[calls[-1]], {calls[0], calls[-1]}
    for name in reversed(calls[:-1]):
        twin = modules[name]
        if not (isinstance(last, nn.Linear) and isinstance(twin, nn.Linear) and twin.weight.shape == last.weight.shape):
            break
        if last.in_features == last.out_features:  # a stack of equal hidden layers
            break
        ends.add(name)
    return ends


def _weights(name: str, module: nn.Module) -> list[str]:
    if isinstance(module, _ATTENTIONS):
        return [f"{name}.{one}" for one in _OF_ATTENTION]
    grouped = getattr(module, "groups", 1) > 1
    return [] if grouped else [f"{name}.weight"]


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) > 1
