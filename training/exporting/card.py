"""The model card: README.md with the hub's front matter, the measured figures, and code that works as it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.exporting.formats import Written
from training.exporting.preprocessing import numpy_code, resize_px, torchvision_code
from training.recipe.keys import TrainData
from training.results.text import format_exact_seconds, format_loss, format_top1
from training.trained import Trained

PICTURE = "picture.png"  # the file that the card's code classifies


@dataclass(frozen=True)
class Figures:
    """What was measured of the exported weights; None where nothing was.

    split: the images, in words. chosen_on_it: whether the checkpoint is the best of its run on these same images.
    """

    top1: float | None
    top5: float | None
    loss: float | None
    split: str
    chosen_on_it: bool
    evaluation: Mapping[str, Any] | None


def measured(trained: Trained) -> Figures:
    """The figures of this checkpoint: from its evaluation, else from the run's summary if that speaks of it."""
    evaluation, summary = (_read(trained.run_dir / name) for name in ("evaluation/evaluation.json", "summary.json"))
    name, data = trained.checkpoint.name, trained.recipe.data.source["name"]
    if evaluation.get("checkpoint") and Path(str(evaluation["checkpoint"])).name == name:
        split = str(evaluation.get("split") or "eval")
        words = f"{split} split of {data}, {evaluation.get('images')} images at {evaluation.get('image_size')} px"
        top1, top5, loss = (evaluation.get(key) for key in ("top1", "top5", "loss"))
        return Figures(top1, top5, loss, words, split == "eval" and name == "best.pt", evaluation)
    # The summary speaks of the best evaluation and of the last; other checkpoints were not measured at the end.
    top1 = summary.get({"best.pt": "best_top1", "latest.pt": "top1"}.get(name, ""))
    loss = summary.get("loss") if name == "latest.pt" else None
    return Figures(top1, None, loss, f"eval split of {data}", name == "best.pt", None)


def card_code(written: Written, trained: Trained) -> str:
    """The whole script that classifies a picture, with the export as the current folder."""
    if written.arrays == "numpy":
        imports, transform = "import json\n\nimport numpy as np\nfrom PIL import Image", numpy_code
        call = "logits = network(transform(image)[None])[0]"
        softmax = "probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()"
        best = "np.argsort(-probabilities)[:5]"
    else:
        imports = "import json\n\nimport torch\nfrom PIL import Image\nfrom torchvision.transforms import v2"
        transform = torchvision_code
        call = "with torch.inference_mode():\n    logits = network(transform(image)[None])[0]"
        softmax = "probabilities = logits.softmax(0)"
        best = "probabilities.argsort(descending=True)[:5].tolist()"
    return f"""\
{imports}

{written.code}

{transform(trained.preprocessing)}

class_names = json.load(open("class_names.json", encoding="utf-8"))
image = Image.open("{PICTURE}").convert("RGB")
{call}
{softmax}
for index in {best}:
    print(f"{{class_names[index]}}: {{probabilities[index]:.4f}}")
"""


def model_card(trained: Trained, written: Written, *, checked: str) -> str:
    """README.md of an export. checked: how the export was compared with the network, in words."""
    figures, recipe = measured(trained), trained.recipe
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(trained, written, figures), sort_keys=False, allow_unicode=True)}---\n",
        f"# {recipe.run_name}\n",
        f"`{recipe.model['name']}` for {len(trained.class_names)} classes, trained on {recipe.data.source['name']} for "
        f"{recipe.epochs} epochs with Brisk's speed-ups: {', '.join(recipe.algorithms) or 'none'}.\n",
        _figures_table(figures),
        _weights_text(trained, written, checked),
        f"## Classify a picture\n\n    pip install {' '.join(_requirements(written))}\n\n"
        f"In this folder, with a picture as `{PICTURE}`:\n\n```python\n{card_code(written, trained)}```\n",
        _input_text(trained, written),
        _training_text(trained),
        _limits_text(figures),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(trained: Trained, written: Written, figures: Figures) -> dict[str, Any]:
    recipe = trained.recipe
    matter: dict[str, Any] = {
        "library_name": written.library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "brisk", *(["onnx"] if written.library == "onnx" else []), *recipe.algorithms],
        "metrics": ["accuracy"],
    }
    if figures.top1 is not None:
        data = recipe.data.source["name"]
        metrics = [{"type": "accuracy", "name": "top-1", "value": round(figures.top1, 6)}]
        if figures.top5 is not None:
            metrics.append({"type": "accuracy", "name": "top-5", "value": round(figures.top5, 6)})
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data, "split": (figures.evaluation or {}).get("split") or "eval"},
            "metrics": metrics,
        }
        matter["model-index"] = [{"name": recipe.run_name, "results": [result]}]
    return matter


def _figures_table(figures: Figures) -> str:
    evaluation = figures.evaluation or {}
    rows = [("top-1", format_top1(figures.top1)), ("top-5", format_top1(figures.top5))]
    rows += [
        ("balanced accuracy", format_top1(evaluation.get("balanced"))),
        ("loss", format_loss(figures.loss)),
        ("calibration error", format_top1(evaluation.get("calibration_error"))),
    ]
    rows += [("same answer when shifted", format_top1(evaluation.get("shift_consistency")))]
    rows = [(name, value) for name, value in rows if value != "n/a"]
    if not rows:
        return "These weights were not evaluated.\n"
    lines = [f"| {figures.split} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    note = "\nOf all evaluations of the run this was the best, on these same images, so expect less on others.\n"
    return "\n".join(lines) + "\n" + (note if figures.chosen_on_it else "")


def _weights_text(trained: Trained, written: Written, checked: str) -> str:
    kind = f"averaged by {trained.averaged_by}, as in the run's evaluations" if trained.averaged else "as trained"
    needs = ""
    if written.needs_project:
        needs = (
            "\n\nOnly Brisk's packages build this network (`pip install .` in its checkout); "
            "`--to torch`, `onnx` and `torchscript` make exports that need no class of it."
        )
    return (
        f"`{written.file}` holds the weights of `{trained.checkpoint.name}`, {kind}. {checked}{needs}\n\n"
        "`class_names.json` lists the classes in the order of the logits, `preprocessor_config.json` the preprocessing "
        "with transformers' keys.\n"
    )


def _input_text(trained: Trained, written: Written) -> str:
    pre = trained.preprocessing
    sizes = {
        True: f"Images of other sizes than {pre.image_size} px work too.",
        False: f"The graph is for {pre.image_size} px only; batches may have any size.",
        None: "",
    }[written.any_size]
    return (
        f"## Input\n\nFloat32 `[N, 3, {pre.image_size}, {pre.image_size}]`, RGB: the shorter side resized to "
        f"{resize_px(pre)} px (bilinear, antialiased), the central {pre.image_size} px cut out, pixels scaled to 0..1, "
        f"and normalized per channel as above. Output: logits `[N, {len(trained.class_names)}]`. {sizes}\n"
    )


def _training_text(trained: Trained) -> str:
    recipe, summary = trained.recipe, _read(trained.run_dir / "summary.json")
    hardware = summary.get("hardware") or {}
    gpus = ", ".join(f"{count} x {name}" for name, count in (hardware.get("gpus") or {}).items())
    versions = summary.get("versions") or {}
    rows = [
        ("optimizer", f"{recipe.optimizer['name']}, peak learning rate {_rate_text(recipe.optimizer)}"),
        ("loss function", recipe.loss.replace("_", " ") + (", with class weights" if recipe.class_weights else "")),
        ("training images", f"{recipe.data.train.image_size} px, {_batch_text(recipe.data.train)}"),
        ("parameters", f"{summary['parameters']:,}" if summary.get("parameters") else ""),
        ("training time", format_exact_seconds(summary.get("train_seconds"))),
        ("hardware", gpus or hardware.get("cpu") or ""),
        ("seed", str(recipe.seed)),
        ("torch", versions.get("torch") or ""),
    ]
    shown = [f"| {name} | {value} |" for name, value in rows if value not in ("", "n/a")]
    given = {name: recipe.settings["algorithms"][name] for name in recipe.algorithms}
    settings = yaml.safe_dump(given, sort_keys=False) if given else ""
    block = f"\nThe speed-ups' settings:\n\n```yaml\n{settings}```\n" if settings else ""
    return "## Training\n\n| | |\n|---|---|\n" + "\n".join(shown) + "\n" + block


def _batch_text(train: TrainData) -> str:
    if train.global_batch_size is not None:
        return f"{train.global_batch_size} a step"
    return f"{train.per_device_batch_size} a step on each device"


def _rate_text(optimizer: dict[str, Any]) -> str:
    if optimizer["learning_rate"] is not None:
        return f"{optimizer['learning_rate']:g}"
    return f"{optimizer['learning_rate_per_256_images']:g} per 256 images of a batch"


def _limits_text(figures: Figures) -> str:
    worst = (figures.evaluation or {}).get("worst_classes") or []
    lines = [
        f"| {one.get('class')} | {format_top1(one.get('recall'))} | {format_top1(one.get('precision'))} | "
        f"{one.get('mistaken_for') or ''} |"
        for one in worst[:5]
    ]
    table = "\n\n| class | recall | precision | mistaken for |\n|---|---|---|---|\n" + "\n".join(lines) if lines else ""
    return (
        "## Limits\n\nA picture of none of these classes gets one of them all the same. The figures are of the images "
        f"named above, and of no others.{table}\n"
    )


def _requirements(written: Written) -> list[str]:
    reading = ["pillow"] if written.arrays == "numpy" else ["pillow", "torchvision"]
    return sorted({*written.requires, *reading} - {"brisk-vision"})


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):  # a run that was stopped has no summary
        return {}
    return read if isinstance(read, dict) else {}
