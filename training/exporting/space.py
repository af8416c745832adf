"""A Hugging Face Space of the page: a folder that runs with gradio and ONNX Runtime, without this project."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml

from training.exporting.checking import check_export
from training.exporting.export_run import as_exported
from training.exporting.formats import write
from training.exporting.samples import sample_images
from training.exporting.whole_folder import whole_folder
from training.trained import Trained

_HERE = Path(__file__).parent
_IMAGE_FILE = Path(__file__).parents[2] / "data" / "sources" / "image_file.py"
_IMPORT = ("from data.sources.image_file import", "from image_file import")

_APP = '''\
"""The page of page.py with the networks of this folder, run by ONNX Runtime."""

import json
from pathlib import Path

import onnxruntime
from page import Classifier, build_page, launch

HERE = Path(__file__).parent


def classifier(about):
    session = onnxruntime.InferenceSession(str(HERE / about.pop("file")))
    return Classifier(network=lambda images: session.run(["logits"], {"images": images})[0], **about)


described = json.loads((HERE / "networks.json").read_text(encoding="utf-8"))
demo = build_page([classifier(one) for one in described["networks"]], title=described["title"])

if __name__ == "__main__":
    launch(demo)
'''


def write_space(runs: Sequence[Trained], target: Path, *, title: str) -> None:
    """Write a Space of one network or two to the new folder `target`, completely or not at all.

    Raises ValueError if it exists or a network has no ONNX graph, NotTheSame if a graph computes something else.
    """
    with whole_folder(target) as folder:
        networks = []
        for index, (run, name) in enumerate(zip(runs, distinct_names(runs), strict=True)):
            trained, file = as_exported(run), f"network-{index}.onnx"
            samples = sample_images(trained)
            written = write("onnx", trained, folder, samples)
            check_export(folder, written, trained, samples)
            (folder / written.file).rename(folder / file)
            names = list(trained.class_names)
            networks.append({"file": file, "name": name, "class_names": names, **asdict(trained.preprocessing)})
        described = {"title": title, "networks": networks}
        page = (_HERE / "page.py").read_text(encoding="utf-8")
        assert page.count(_IMPORT[0]) == 1
        for name, text in (
            ("networks.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n"),
            ("app.py", _APP),
            ("page.py", page.replace(*_IMPORT)),
            ("image_file.py", _IMAGE_FILE.read_text(encoding="utf-8")),
            ("requirements.txt", "".join(f"{name}=={version(name)}\n" for name in ("onnxruntime", "numpy", "pillow"))),
            ("README.md", _readme(title)),
        ):
            (folder / name).write_text(text, encoding="utf-8")


def distinct_names(runs: Sequence[Trained]) -> list[str]:
    """The runs' names, with their checkpoints' where two are the same, numbered where those are, too."""
    names = [run.recipe.run_name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} {run.checkpoint.name}" for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({index + 1})" for index, name in enumerate(names)]
    return names


def _readme(title: str) -> str:
    matter = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "pinned": False,
    }
    return (
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n"
        "Drop a picture: the five best classes, the time, and what shifting the picture does to the answer.\n\n"
        f"On your own machine: `pip install gradio=={version('gradio')} -r requirements.txt`, then `python app.py`.\n"
    )
