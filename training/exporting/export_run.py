"""One run -> one folder with its network, for people without this project."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.arrangement import network_as_trained, without_weights
from training.exporting.card import model_card
from training.exporting.checking import check_export
from training.exporting.formats import FORMATS, Written, write
from training.exporting.preprocessing import preprocessor_config
from training.exporting.samples import Samples, sample_images
from training.exporting.whole_folder import refuse_existing, whole_folder
from training.trained import Trained, load_trained


@dataclass(frozen=True)
class Exported:
    """The folder of an export, what it holds, and the largest difference that its check found."""

    folder: Path
    written: Written
    difference: float
    checked: str


def export_run(
    source: str | Path,
    format_name: str,
    target: Path | None = None,
    *,
    trust_checkpoint: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export the best checkpoint of a run, or the checkpoint `source`, and check the export in another process.

    target: a new folder; None: export/FORMAT within the run's folder. It is written completely or not at all.

    Raises ValueError for an unknown format, a target that exists, no such run, or a network that the format cannot
    take; RecipeError for a damaged checkpoint; NotTheSame if the export does not compute what the network does.
    """
    if format_name not in FORMATS:
        raise ValueError(f"{format_name!r} is no format of an export; give one of {', '.join(FORMATS)}")
    if target is not None:
        refuse_existing(target)
    trained = as_exported(load_trained(source, trust_checkpoint=trust_checkpoint))
    target = target or trained.run_dir / "export" / format_name
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as folder:
        samples = sample_images(trained)
        say(
            f"{trained.checkpoint}{f', averaged by {trained.averaged_by}' if trained.averaged else ''} -> {format_name}"
        )
        written = write(format_name, trained, folder, samples)
        write_about(trained, folder)
        difference = check_export(folder, written, trained, samples)
        checked = _in_words(written, samples, difference)
        (folder / "README.md").write_text(model_card(trained, written, checked=checked), encoding="utf-8")
    return Exported(target, written, difference, checked)


def as_exported(trained: Trained) -> Trained:
    """The same network in float32, in the default memory format, and without gradient checkpointing."""
    network, recipe = trained.network, trained.recipe
    if recipe.model.get("gradient_checkpointing"):
        recipe = without_weights(replace(recipe, model={**recipe.model, "gradient_checkpointing": False}))
        weights = network.state_dict()
        network = network_as_trained(recipe, num_classes=len(trained.class_names))
        network.load_state_dict(weights)
    network = network.eval().float().to(memory_format=torch.contiguous_format)
    return replace(trained, network=network.requires_grad_(False))


def write_about(trained: Trained, folder: Path) -> None:
    """The class names and the preprocessing, which every format leaves out or keeps in words of its own."""
    for name, content in (
        ("class_names.json", list(trained.class_names)),
        ("preprocessor_config.json", preprocessor_config(trained.preprocessing)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def upload_command(folder: Path, repository: str) -> str:
    """The command that puts the folder on the Hugging Face hub."""
    return f"huggingface-cli upload {shlex.quote(repository)} {shlex.quote(str(folder))} ."


def _in_words(written: Written, samples: Samples, difference: float) -> str:
    where = "this project's network" if written.needs_project else "another process, without this project"
    sizes = " at two sizes" if written.any_size else ""
    found = f"differ from the run's by at most {difference:.1g}" if difference else "equal the run's"
    return f"Loaded in {where}, its logits of {samples.origin}{sizes} {found}."
