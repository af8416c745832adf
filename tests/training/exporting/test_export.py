"""Exports: what another process without this project makes of them, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.sources import digits
from models.weights import read_weights
from training import export
from training.exporting.checking import NotTheSame, check_export
from training.exporting.export_run import as_exported, export_run
from training.exporting.formats import FORMATS, Written
from training.exporting.samples import largest_difference, sample_images
from training.trained import load_trained

pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("exports")]

# What a stranger does: no folder of this project, and none of its installed packages.
STRANGER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("algos", "brisk", "models", "data", "training", "composer"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
"""


def stranger(folder: Path, code: str, tmp_path: Path) -> str:
    """What `code` prints in `folder`, run by a process that cannot import this project."""
    script = tmp_path / "stranger.py"
    script.write_text(code)
    command = [sys.executable, "-I", "-c", STRANGER, str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a model card, and its code."""
    text = (folder / "README.md").read_text()
    _, matter, body = text.split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    return yaml.safe_load(matter), code


def ours(run: Path, image: np.ndarray) -> dict[str, float]:
    """Class name -> probability, by the run's own network and preprocessing."""
    trained = load_trained(run)
    pixels = trained.preprocessing.normalized(trained.preprocessing.pixels(image)[None])
    with torch.no_grad():
        return dict(zip(trained.class_names, trained.network(pixels).softmax(1)[0].tolist(), strict=True))


def a_picture(*, height: int = 60, width: int = 80) -> np.ndarray:
    """A digit on a larger canvas, so that resizing and cropping matter."""
    image = Image.fromarray(digits(split="eval").image(3)).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)


def check_card(run: Path, folder: Path, tmp_path: Path) -> None:
    """Run the card's code as a stranger does, on a picture; the five best classes must be those of the run."""
    picture = a_picture()
    Image.fromarray(picture).save(folder / "picture.png")
    said = stranger(folder, card_of(folder)[1], tmp_path)
    best = {name: float(value) for name, value in (line.rsplit(": ", 1) for line in said.splitlines())}
    expected = ours(run, picture)
    assert len(best) == 5
    assert max(best, key=lambda name: best[name]) == max(expected, key=lambda name: expected[name])
    # Libraries round the resized pixels to whole levels in ways of their own.
    assert best == {name: pytest.approx(expected[name], abs=0.03) for name in best}


def test_a_trained_run_with_blurpool_ema_and_fixres_goes_to_onnx(trained_run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "onnx"
    arguments = [str(trained_run), "--to", "onnx", "-o", str(folder), "--push-to-hub", "me/digits"]
    assert export.main(arguments) == 0
    said = capsys.readouterr().out
    assert "averaged by EMA" in said
    assert f"huggingface-cli upload me/digits {folder} ." in said
    check_card(trained_run, folder, tmp_path)

    import onnx

    (images,) = onnx.load(folder / "model.onnx").graph.input
    assert [one.dim_param or one.dim_value for one in images.type.tensor_type.shape.dim] == [
        "batch", 3, "height", "width"
    ]  # fmt: skip
    matter, _ = card_of(folder)
    summary = json.loads((trained_run / "summary.json").read_text())
    (result,) = matter["model-index"][0]["results"]
    assert matter["pipeline_tag"] == "image-classification"
    assert result["metrics"][0]["value"] == pytest.approx(summary["best_top1"], abs=1e-5)


def test_the_averages_are_exported_and_not_the_weights_beside_them(trained_run: Path, tmp_path: Path) -> None:
    made = export_run(trained_run, "safetensors", tmp_path / "out")
    tensors = read_weights(str(made.folder / "model.safetensors"))
    weights = {
        name.removeprefix("module."): value
        for name, value in read_weights(str(trained_run / "checkpoints" / "best.pt")).items()
    }
    assert tensors.keys() == weights.keys()
    assert largest_difference(tensors["fc.weight"], weights["fc.weight"]) > 1e-3
    averages = load_trained(trained_run).network.state_dict()
    assert all(torch.equal(value, averages[name]) for name, value in tensors.items())
    assert made.written.needs_project
    assert "apply_blurpool(network, filter_size=3" in card_of(made.folder)[1]


@pytest.mark.parametrize("format_name", ["torch", pytest.param("torchscript", marks=pytest.mark.exhaustive)])
def test_graphs_of_a_blurred_network(format_name: str, made_run: Any, tmp_path: Path) -> None:
    run = made_run("blurred", "algorithms.blurpool={}", crop_ratio=0.875)
    made = export_run(run, format_name)
    assert made.folder == run / "export" / format_name
    assert made.written.any_size
    check_card(run, made.folder, tmp_path)


def test_a_vit_goes_to_transformers(made_run: Any, tmp_path: Path) -> None:
    # Positions for 32 px, images of 20: the export's are those of 20.
    run = made_run("vit", "model=vit_digits", "model.image_size=32")
    made = export_run(run, "hf")
    config = json.loads((made.folder / "config.json").read_text())
    assert (config["model_type"], config["image_size"], config["id2label"]["3"]) == ("vit", 20, "digit 3")
    check_card(run, made.folder, tmp_path)
    picture = a_picture(width=60)  # of others, the libraries round the longer side to whole pixels
    Image.fromarray(picture).save(made.folder / "square.png")
    said = stranger(
        made.folder,
        "import numpy, PIL.Image\nfrom transformers import AutoImageProcessor\n"
        "image = PIL.Image.open('square.png')\n"
        "made = AutoImageProcessor.from_pretrained('.')(image, return_tensors='np')['pixel_values'][0]\n"
        "numpy.save('pixels.npy', made)",
        tmp_path,
    )
    assert said == ""
    preprocessing = load_trained(run).preprocessing
    expected = preprocessing.normalized(preprocessing.pixels(picture)[None])[0]
    # Two levels of 255, over the smallest std of 40.
    assert np.abs(np.load(made.folder / "pixels.npy") - expected.numpy()).max() < 2.1 / 40


@pytest.mark.exhaustive
def test_a_vit_goes_to_torchvision(made_run: Any, tmp_path: Path) -> None:
    run = made_run("vit", "model=vit_digits", "model.image_size=32")
    made = export_run(run, "safetensors")
    assert "torchvision.models.VisionTransformer(" in card_of(made.folder)[1]
    check_card(run, made.folder, tmp_path)


def test_a_vit_goes_to_onnx_at_its_own_size(made_run: Any, tmp_path: Path) -> None:
    rates = ["optimizer.learning_rate=null", "optimizer.learning_rate_per_256_images=0.1"]
    sizes = ["data.train.global_batch_size=null", "data.train.per_device_batch_size=64"]
    run = made_run("vit", "model=vit_digits", "model.image_size=20", *rates, *sizes)
    made = export_run(run, "onnx")
    assert made.written.any_size is False
    card = (made.folder / "README.md").read_text()
    assert "for 20 px only" in card
    assert "peak learning rate 0.1 per 256 images of a batch" in card
    assert "20 px, 64 a step on each device" in card


@pytest.mark.parametrize("format_name", [pytest.param("safetensors", marks=pytest.mark.exhaustive), "hf"])
def test_a_resnet_goes_to_torchvision_timm_and_transformers(format_name: str, made_run: Any, tmp_path: Path) -> None:
    run = made_run("resnet", "model=resnet18", "algorithms.stochastic_depth={drop_rate: 0.1}", image_size=32)
    made = export_run(run, format_name)
    check_card(run, made.folder, tmp_path)
    if format_name == "hf":
        config = json.loads((made.folder / "config.json").read_text())
        assert config["architecture"] == "resnet18"
        assert config["label_names"][3] == "digit 3"
        assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
        code = "import timm\nprint(timm.create_model('local-dir:.', pretrained=True).pretrained_cfg['crop_pct'])"
        assert stranger(made.folder, code, tmp_path) == "1.0\n"
    else:
        assert "torchvision.models.get_model('resnet18'" in card_of(made.folder)[1]


@pytest.mark.exhaustive
def test_timms_network_keeps_timms_layout(made_run: Any, tmp_path: Path) -> None:
    run = made_run("timm", "model=timm.resnet10t", image_size=32)
    made = export_run(run, "safetensors")
    assert made.written.library == "timm"
    check_card(run, made.folder, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--to", "onnx"], "nowhere is not there; give results/RUN"),
        (["RUN", "--to", "hf"], "resnet_digits with blurpool does; give --to torch, onnx or torchscript"),
        (["RUN", "--to", "torch", "-o", "THERE"], "is there already; remove it, or give another folder with -o"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(arguments, said, made_run: Any, tmp_path: Path, capsys) -> None:
    run = made_run("blurred", "algorithms.blurpool={}")
    there = tmp_path / "there"
    there.mkdir()
    before = sorted(tmp_path.rglob("*"))
    names = {"RUN": str(run), "THERE": str(there)}
    assert export.main([names.get(one, one) for one in arguments]) == 2
    _, err = capsys.readouterr()
    assert said in err
    assert err.startswith("export: ")
    assert err.count("\n") == 1
    left = set(tmp_path.rglob("*")) - set(before)
    assert left <= {run / "export"}


def test_an_unknown_format_is_refused_by_name(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        export.main(["results/x", "--to", "tflite"])
    assert stop.value.code == 2
    assert "'tflite' (choose from" in capsys.readouterr().err
    assert tuple(FORMATS) == export._NAMES
    with pytest.raises(ValueError, match=r"'tflite' is no format of an export; give one of safetensors, torch, onnx"):
        export_run("results/x", "tflite")


def test_layers_that_only_a_recipe_makes_are_no_safetensors(made_run: Any) -> None:
    run = made_run("squeezed", "algorithms.composer.squeeze_excite={min_channels: 16}")
    with pytest.raises(ValueError, match=r"resnet_digits with composer.squeeze_excite is rebuilt by its recipe only"):
        export_run(run, "safetensors")
    assert not list((run / "export").iterdir())


def test_an_export_that_computes_something_else_is_found(made_run: Any, tmp_path: Path) -> None:
    trained = as_exported(load_trained(made_run("plain")))
    samples = sample_images(trained)
    assert samples.origin == "16 evaluation images of digits"
    wrong = Written(
        "x", "import torch\n\ndef network(images):\n    return images.mean((2, 3)) @ torch.ones(3, 10)", (), ""
    )
    with pytest.raises(NotTheSame, match=r"differ from the network's by .* and 0\.0001 is the limit"):
        check_export(tmp_path, wrong, trained, samples)
    broken = Written("x", "import algos", (), "")
    with pytest.raises(NotTheSame, match=r"cannot be loaded again .*must load without it"):
        check_export(tmp_path, broken, trained, samples)
