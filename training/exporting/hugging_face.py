"""Folders that transformers and timm load: config.json and model.safetensors, with class names."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from models.libraries.hugging_face import HuggingFaceClassifier
from training.exporting.preprocessing import unit_scale
from training.exporting.rebuild import State, as_timm, computes_the_same, is_vit, library_name, vit_config, weights_of
from training.exporting.samples import Samples
from training.trained import Trained

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_FOR_PYTORCH = {"format": "pt"}

# torchvision's names of a Vision Transformer's parameters -> those in transformers' files, applied in turn.
_VIT_NAMES = (
    (r"^conv_proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^class_token$", "vit.embeddings.cls_token"),
    (r"^encoder\.pos_embedding$", "vit.embeddings.position_embeddings"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.ln_1\.", ".layernorm_before."),
    (r"\.ln_2\.", ".layernorm_after."),
    (r"\.self_attention\.out_proj\.", ".attention.output.dense."),
    (r"\.mlp\.0\.", ".intermediate.dense."),
    (r"\.mlp\.3\.", ".output.dense."),
    (r"^encoder\.ln\.", "vit.layernorm."),
    (r"^heads\.head\.", "classifier."),
)
_JOINED = re.compile(r"(.*)\.self_attention\.in_proj_(weight|bias)$")  # query, key and value in one


def write_transformers(trained: Trained, folder: Path, samples: Samples) -> str | None:
    """Write what AutoModelForImageClassification loads; returns how to call it, or None if transformers lacks it."""
    network = trained.network
    if isinstance(network, HuggingFaceClassifier):
        return _write_own(trained, network, folder, samples)
    if is_vit(network):
        return _write_vit(trained, folder, samples)
    if write_timm(trained, folder, samples):
        return ""
    return None


def write_timm(trained: Trained, folder: Path, samples: Samples) -> bool:
    """Write what timm.create_model("local-dir:...") and "hf-hub:..." load; returns whether timm has this network."""
    rebuilt = as_timm(trained, samples)
    if rebuilt is None:
        return False
    save_weights(weights_of(trained), folder)
    (folder / CONFIG_FILE).write_text(json.dumps(_timm_config(trained, rebuilt.network), indent=2) + "\n")
    return True


def save_weights(state: State, folder: Path) -> None:
    """Write model.safetensors, as transformers, timm and safetensors' own reader take it."""
    from safetensors.torch import save_file

    path = folder / WEIGHTS_FILE
    save_file(state, path, metadata=_FOR_PYTORCH)
    path.chmod(folder.stat().st_mode & 0o666)  # its writer lets only the owner read it


def _write_own(trained: Trained, network: HuggingFaceClassifier, folder: Path, samples: Samples) -> str | None:
    """A network that came from transformers, unless an algorithm has changed its layers."""
    from transformers import AutoModelForImageClassification

    inner: Any = network.network
    config = copy.deepcopy(inner.config)
    config.id2label, config.label2id = _labels(trained)
    model = AutoModelForImageClassification.from_config(config)
    try:
        model.load_state_dict(inner.state_dict())
    except RuntimeError:
        return None
    if not computes_the_same(HuggingFaceClassifier(model), trained, samples):
        return None
    model.save_pretrained(folder)
    # Position embeddings for another size than the configuration's are interpolated at each call, as in training.
    other_size = getattr(config, "image_size", None) not in (None, trained.preprocessing.image_size)
    return ", interpolate_pos_encoding=True" if other_size and network._settings else ""


def _write_vit(trained: Trained, folder: Path, samples: Samples) -> str | None:
    """torchvision's Vision Transformer, which has the same arithmetic as transformers' under other names."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = ViTConfig(**vit_config(trained))
    config.id2label, config.label2id = _labels(trained)
    config.architectures = ["ViTForImageClassification"]
    state: State = {}
    for name, value in weights_of(trained).items():
        joined = _JOINED.match(name)
        if joined is None:
            state[_vit_name(name)] = value
            continue
        block, kind = _vit_name(joined[1] + "."), joined[2]
        for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
            state[f"{block}attention.attention.{part}.{kind}"] = tensor.clone()
    save_weights(state, folder)
    config.save_pretrained(folder)
    model: nn.Module = ViTForImageClassification.from_pretrained(folder)
    return "" if computes_the_same(HuggingFaceClassifier(model), trained, samples) else None


def _vit_name(name: str) -> str:
    for pattern, replacement in _VIT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _labels(trained: Trained) -> tuple[dict[int, str], dict[str, int]]:
    names = dict(enumerate(trained.class_names))
    return names, {name: index for index, name in names.items()}


def _timm_config(trained: Trained, network: Any) -> dict[str, Any]:
    """timm's config.json, with the keys that its own models on the hub have."""
    preprocessing, classes = trained.preprocessing, len(trained.class_names)
    size = [3, preprocessing.image_size, preprocessing.image_size]
    own = network.pretrained_cfg
    config: dict[str, Any] = {
        "architecture": library_name(trained)[1].partition(".")[0],
        "num_classes": classes,
        "num_features": network.num_features,
        "label_names": list(trained.class_names),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": bool(own.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": preprocessing.crop_ratio,
            "crop_mode": "center",
            "mean": unit_scale(preprocessing.mean),
            "std": unit_scale(preprocessing.std),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }
    if trained.recipe.model.get("image_size") is not None:
        config["model_args"] = {"img_size": trained.recipe.model["image_size"]}
    return config
