"""The trained network as other libraries build it: which of them has it, and the code that loads it there.

Nothing is taken on trust from a name. A library's own network gets the weights, and counts if its logits are the
trained network's: BlurPool, for one, keeps every weight and changes every logit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import registry as models
from models.weights import POSITIONS, interpolate_positions
from training.exporting.samples import TOLERANCE, Samples, largest_difference, logits_of
from training.trained import Trained

_TORCHVISION_NAMES = {"alexnet_torchvision": "alexnet", "vit_b16": "vit_b_16"}
_RESNETS = ("resnet", "resnext", "wide_resnet")
_NOT_OF_THE_SHAPE = ("name", "weights", "gradient_checkpointing")  # settings that no rebuilt network needs

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rebuilt:
    """A network of another library with the trained weights.

    code: Python that makes it as `network`, without the weights.
    """

    network: nn.Module
    code: str


def weights_of(trained: Trained) -> State:
    """The weights to export: float32, contiguous, each in memory of its own.

    A ViT's position embeddings are those of the evaluation's image size, so that no reader has to interpolate them.
    """
    state = {
        name: (value.float() if value.is_floating_point() else value).contiguous().clone()
        for name, value in trained.network.state_dict().items()
    }
    patch_px = getattr(trained.network, "patch_size", None)
    if isinstance(patch_px, int) and POSITIONS in state:
        side = trained.preprocessing.image_size // patch_px
        state[POSITIONS] = interpolate_positions(state[POSITIONS], (side, side)).contiguous()
    return state


def library_name(trained: Trained) -> tuple[str, str]:
    """The library whose networks may be this one, and its name for it there; ("", name) for this project's own."""
    name: str = trained.recipe.model["name"]
    for library in ("torchvision", "timm", "hf"):
        if name.startswith(f"{library}."):
            return library, name.removeprefix(f"{library}.")
    if name in _TORCHVISION_NAMES or name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        return "torchvision", _TORCHVISION_NAMES.get(name, name)
    return "", name


def as_torchvision(trained: Trained, samples: Samples) -> Rebuilt | None:
    """torchvision's own network, if it computes the same."""
    library, name = library_name(trained)
    if library != "torchvision" and name != "vit_digits":
        return None
    import torchvision

    settings: dict[str, Any] = {"num_classes": len(trained.class_names)}
    if name in ("googlenet", "inception_v3"):
        settings.update(aux_logits=False, init_weights=False)
    if is_vit(trained.network):
        settings["image_size"] = trained.preprocessing.image_size
    if name == "vit_digits":
        settings.update(_vit_shape(trained.network))
        call = f"torchvision.models.VisionTransformer({_arguments(settings)})"
        build: Callable[..., nn.Module] = torchvision.models.VisionTransformer
    else:
        call = f"torchvision.models.get_model({name!r}, weights=None, {_arguments(settings)})"
        build = functools.partial(torchvision.models.get_model, name, weights=None)
    return _tried(trained, samples, build, settings, f"import torchvision\n\nnetwork = {call}")


def as_timm(trained: Trained, samples: Samples) -> Rebuilt | None:
    """timm's own network, if it computes the same; timm has torchvision's ResNets under the same names."""
    library, name = library_name(trained)
    if not (library == "timm" or (library == "torchvision" and name.startswith(_RESNETS))):
        return None
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return None
    architecture = name.partition(".")[0]  # what follows names pretrained weights
    if architecture not in timm.list_models():
        return None
    settings: dict[str, Any] = {"num_classes": len(trained.class_names)}
    if trained.recipe.model.get("image_size") is not None:
        settings["img_size"] = trained.recipe.model["image_size"]

    def build(**given: Any) -> nn.Module:
        return timm.create_model(architecture, pretrained=False, **given)

    code = f"import timm\n\nnetwork = timm.create_model({architecture!r}, {_arguments(settings)})"
    return _tried(trained, samples, build, settings, code)


def as_here(trained: Trained, samples: Samples) -> Rebuilt | None:
    """This project's network, with its BlurPool if it has one, from the code that README shows."""
    from algos import apply_blurpool

    name = trained.recipe.model["name"]
    settings = {key: value for key, value in trained.recipe.model.items() if key not in _NOT_OF_THE_SHAPE}
    settings = {"num_classes": len(trained.class_names), **settings}
    if library_name(trained)[0] == "hf":
        settings["weights"] = None
    blurpool = trained.recipe.algorithms.get("blurpool")
    lines = ["from brisk.models.registry import find", "", f"network = find({name!r})({_arguments(settings)})"]
    if blurpool is not None:
        lines.insert(0, "from algos import apply_blurpool")
        lines.append(f"apply_blurpool(network, {_arguments(blurpool)})" if blurpool else "apply_blurpool(network)")

    def build(**given: Any) -> nn.Module:
        network = models.find(name)(**given)
        return network if blurpool is None else apply_blurpool(network, **blurpool)

    # The state as it was trained: this project's ViT interpolates positions itself.
    return _tried(trained, samples, build, settings, "\n".join(lines), state=trained.network.state_dict())


def is_vit(network: nn.Module) -> bool:
    """Whether these are the layers, and the names, of torchvision's Vision Transformer."""
    return POSITIONS in network.state_dict() and hasattr(network, "conv_proj")


def computes_the_same(network: nn.Module, trained: Trained, samples: Samples) -> bool:
    """Whether both give the same logits."""
    try:
        theirs = logits_of(network.eval(), samples.images)
    except Exception:  # of another library, for a size that it does not take
        return False
    return largest_difference(logits_of(trained.network, samples.images), theirs) <= TOLERANCE


def _tried(
    trained: Trained,
    samples: Samples,
    build: Callable[..., nn.Module],
    settings: Mapping[str, Any],
    code: str,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> Rebuilt | None:
    state = weights_of(trained) if state is None else state
    with torch.random.fork_rng(devices=[]):
        network = build(**settings)
    try:
        network.load_state_dict(state)
    except RuntimeError:  # other names or shapes: an algorithm has replaced layers
        return None
    return Rebuilt(network, code) if computes_the_same(network, trained, samples) else None


def _vit_shape(network: Any) -> dict[str, int]:
    """torchvision's arguments for a Vision Transformer of these layers."""
    blocks = network.encoder.layers
    return {
        "patch_size": network.conv_proj.kernel_size[0],
        "num_layers": len(blocks),
        "num_heads": blocks[0].num_heads,
        "hidden_dim": network.conv_proj.out_channels,
        "mlp_dim": blocks[0].mlp[0].out_features,
    }


def vit_config(trained: Trained) -> dict[str, Any]:
    """transformers' arguments for a Vision Transformer of these layers."""
    shape, network = _vit_shape(trained.network), trained.network
    positions = weights_of(trained)[POSITIONS].shape[1] - 1
    norm = network.get_submodule("encoder.ln")
    assert isinstance(norm, nn.LayerNorm)
    return {
        "hidden_size": shape["hidden_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": shape["mlp_dim"],
        "patch_size": shape["patch_size"],
        "image_size": math.isqrt(positions) * shape["patch_size"],
        "layer_norm_eps": norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _arguments(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
