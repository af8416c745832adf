"""Which of Composer's own algorithms no recipe can use, and why."""

from __future__ import annotations

from typing import Any

_OF_LANGUAGE_MODELS = "changes {}, and a recipe's model is an image classifier; leave it out"
_OF_DATASETS = (
    "changes images in a torch Dataset of PIL images, and a recipe's loader has none; use {} "
    "(or data.train.augmentations, which change images in the loader)"
)

_REFUSALS: dict[str, str] = {
    "composer.alibi": _OF_LANGUAGE_MODELS.format("the attention of language models"),
    "composer.augmix": _OF_DATASETS.format("algorithms.randaugment"),
    "composer.gated_linear_units": _OF_LANGUAGE_MODELS.format("the feed-forward layers of BERT"),
    "composer.no_op_model": (
        "puts a dummy without classes in the model's place, of which neither loss nor accuracy can be measured; "
        "leave it out"
    ),
    "composer.randaugment": _OF_DATASETS.format("algorithms.randaugment"),
    "composer.seq_length_warmup": _OF_LANGUAGE_MODELS.format("the length of token sequences"),
}


def refusal(name: str, settings: dict[str, Any]) -> str | None:
    """Why a recipe cannot use Composer's `name` (`composer.augmix`) with these settings; None if it can."""
    if name == "composer.colout" and settings.get("batch") is False:
        return "with batch: false " + _OF_DATASETS.format("batch: true")
    return _REFUSALS.get(name)
