"""Hugging Face's image classifiers, by id or from a folder; only config.json and .safetensors are read.

Shapes: N images, K classes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INSTALL = "pip install 'brisk-vision[hf]'"


class HuggingFaceClassifier(nn.Module):
    """A transformers classifier as a plain network: images [N, 3, S, S] in, logits [N, K] out.

    Its positions are interpolated for images of another size if the architecture supports it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._settings = {"interpolate_pos_encoding": True} if _interpolates(network) else {}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=images, **self._settings).logits


def find(name: str) -> Callable[..., nn.Module]:
    """The function that builds the classifier `name`, an id (google/vit-base-patch16-224) or a local folder.

    Raises ValueError when transformers is not installed, or the folder has no config.json.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"hf.{name} needs transformers: {_INSTALL}") from None
    if not name or (_is_folder(name) and not (Path(name).expanduser() / _CONFIG).is_file()):
        raise ValueError(
            f"{name!r} has no {_CONFIG}; name the folder that save_pretrained wrote, or an id such as "
            "google/vit-base-patch16-224"
        )

    def build(
        *,
        num_classes: int,
        weights: Literal["pretrained"] | None = "pretrained",
        gradient_checkpointing: bool = False,
    ) -> nn.Module:
        return build_hugging_face(
            name, num_classes=num_classes, weights=weights, gradient_checkpointing=gradient_checkpointing
        )

    return build


def build_hugging_face(
    name: str,
    *,
    num_classes: int,
    weights: Literal["pretrained"] | None = "pretrained",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """The classifier `name` with a head for `num_classes`.

    weights: "pretrained" reads model.safetensors next to the configuration; None initializes randomly. A classifier
        with another number of classes is replaced, which is logged.
    gradient_checkpointing: recompute activations in the backward pass, if the architecture supports it.

    Raises ValueError for an id that is neither cached nor downloadable, a model that is not an image classifier or has
    no .safetensors, weights that do not fit, and checkpointing that the architecture does not support.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    folder = find_file(name, _CONFIG).parent
    settings = {"num_labels": num_classes, "trust_remote_code": False, "local_files_only": True}
    try:
        if weights is None:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder, **settings))
        else:
            if not _is_folder(name):
                find_file(name, _WEIGHTS)
            model = _load(AutoModelForImageClassification, name, folder, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:  # transformers has no error class of its own
        raise ValueError(f"hf.{name} cannot be built: {_first_sentence(error)}") from None
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing is true and {type(model).__name__} has none; set it to false")
        # transformers 5 has another name for it, and warns about this one.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return HuggingFaceClassifier(model)


def find_file(name: str, file: str) -> Path:
    """Path of `file` of the model `name`: in that folder, in Hugging Face's cache, or downloaded to it.

    Raises ValueError when it is in none of them.
    """
    if _is_folder(name):
        path = Path(name).expanduser() / file
        if not path.is_file():
            raise ValueError(f"{name} has no {file}; name the folder that save_pretrained wrote")
        return path
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise ValueError(f"{name} is on Hugging Face's hub, which needs huggingface_hub: {_INSTALL}") from None
    try:
        try:
            return Path(hf_hub_download(name, file, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no {file} in Hugging Face's cache, and it could not be had from the hub "
            f"({_first_sentence(error)}); fetch it where there is a network: huggingface-cli download {name} {file}"
        ) from None


def _load(kind: Any, name: str, folder: Path, settings: dict[str, Any]) -> Any:
    with _quiet_transformers():  # its four lines become one below
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
    # Names; with shapes before transformers 4.51.
    misshapen = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    fresh = [*info["missing_keys"], *misshapen]
    head = {id(parameter) for parameter in _classifier_parameters(model)}
    parameters = dict(model.named_parameters())
    wrong = [key for key in fresh if key not in parameters or id(parameters[key]) not in head]
    if wrong:
        raise ValueError(f"its weights leave {len(wrong)} parameters of {type(model).__name__} out ({wrong[0]} first)")
    if fresh:
        log.warning("%s: everything but the classifier, which is new for %d classes", name, settings["num_labels"])
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    # The architectures call it classifier, or cls_classifier and distillation_classifier (DeiT, LeViT).
    heads = [child for name, child in model.named_children() if "classifier" in name or name in ("head", "fc")]
    return [parameter for head in heads for parameter in head.parameters()]


def _interpolates(network: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(network.forward).parameters


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or Path(name).is_dir()


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:200].rstrip(".")
