"""evaluate.py and predict.py on a run of the digits, against the same figures computed from the arrays themselves."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import ROOT, run_ranks

from data import build_source
from training import session
from training.judging import evaluate, predict
from training.judging.predicting import Network
from training.recipe import load_recipe
from training.trained import Trained, load_trained

pytestmark = [pytest.mark.timeout(200), pytest.mark.xdist_group("judging")]  # one worker has the run that these share
OVERRIDES = (
    "duration.epochs=2", "schedule.warmup_epochs=0", "logging.progress_bar=false", "run_name=judged",
    "algorithms.progressive_resizing=null", "algorithms.fixres=null", "algorithms.ema={half_life_steps: 5}",
    "data.train.image_size=12", "data.eval.image_size=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    places = [f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}"]
    recipe = load_recipe(ROOT / "yamls" / "digits_medium.yaml", [*OVERRIDES, *places])
    session.train(recipe, say=lambda text: None)
    return recipe.run_dir


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> Trained:
    return load_trained(run_dir)


@pytest.fixture(scope="module")
def logits_and_labels(trained: Trained) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every held-out digit, from the source's arrays: no loader."""
    source = build_source("digits", split="eval")
    pixels = torch.stack([trained.preprocessing.pixels(source.image(i)) for i in range(len(source))])
    with torch.inference_mode():
        logits = trained.network(trained.preprocessing.normalized(pixels))
    return logits, torch.tensor([source.label(i) for i in range(len(source))])


@pytest.fixture(scope="module")
def evaluation(run_dir: Path) -> dict[str, Any]:
    assert evaluate.main([str(run_dir), "--sizes", "8,16", "--device", "cpu"]) == 0
    return json.loads((run_dir / "evaluation" / "evaluation.json").read_text())


def test_the_averages_are_judged_as_in_training(run_dir: Path, evaluation: dict[str, Any]) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert evaluation["averaged"] is True
    assert evaluation["checkpoint"] == "best.pt"
    assert evaluation["top1"] == pytest.approx(summary["best_top1"], abs=1e-6)


def test_figures_are_those_of_the_arrays(
    evaluation: dict[str, Any], logits_and_labels: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, labels = logits_and_labels
    assert evaluation["images"] == len(labels) == 359
    assert evaluation["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-6)
    assert evaluation["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-3)
    assert np.sum(evaluation["confusion"]) == 359
    assert np.trace(evaluation["confusion"]) == round(evaluation["top1"] * 359)
    assert [one["image_size"] for one in evaluation["sizes"]] == [8, 12, 16]
    assert evaluation["sizes"][1]["top1"] == evaluation["top1"]
    assert 0 < evaluation["shift_consistency"] <= 1


def test_mistakes_are_the_most_confident_ones(
    evaluation: dict[str, Any], logits_and_labels: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, labels = logits_and_labels
    confidence, predicted = logits.softmax(1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    expected = sorted(wrong, key=lambda i: -confidence[i].item())[:25]
    found = evaluation["mistakes"]
    assert len(found) == len(expected) > 3
    assert {one["index"] for one in found[:3]} == set(expected[:3])
    for one in found:
        assert one["label"] == str(labels[one["index"]].item())
        assert one["predicted"] == str(predicted[one["index"]].item())


def test_tables_and_pictures_lie_beside_it(run_dir: Path, evaluation: dict[str, Any]) -> None:
    folder = run_dir / "evaluation"
    for name in ("confusion", "calibration", "mistakes", "sizes"):
        assert matplotlib.image.imread(folder / f"{name}.png").std() > 0.01
    classes = list(csv.DictReader((folder / "classes.csv").open()))
    assert [one["class"] for one in classes] == [str(digit) for digit in range(10)]
    assert sum(int(one["images"]) for one in classes) == 359
    confusion = list(csv.reader((folder / "confusion.csv").open()))
    assert [list(map(int, row[1:])) for row in confusion[1:]] == evaluation["confusion"]


@pytest.mark.slow
def test_ranks_see_every_image_once(run_dir: Path, evaluation: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(2, "evaluate.py", str(run_dir), "--no-shifts", "-o", str(tmp_path), "--device", "cpu", timeout=150)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["confusion"] == evaluation["confusion"]
    assert [one["index"] for one in found["mistakes"]] == [one["index"] for one in evaluation["mistakes"]]
    assert found["loss"] == pytest.approx(evaluation["loss"], rel=1e-5)


def test_mirror_images_are_averaged_in(
    run_dir: Path, trained: Trained, tmp_path: Path, logits_and_labels: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert evaluate.main([str(run_dir), "--flip", "--no-shifts", "-o", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    source = build_source("digits", split="eval")
    mirrored = torch.stack([trained.preprocessing.pixels(source.image(i)) for i in range(len(source))]).flip(3)
    logits, labels = logits_and_labels
    with torch.inference_mode():
        both = (logits + trained.network(trained.preprocessing.normalized(mirrored))) / 2
    # The loader's pixels may be one level off, and mirrored digits lie close to the border between classes.
    assert found["top1"] == pytest.approx((both.argmax(1) == labels).double().mean().item(), abs=3 / 359)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(both, labels).item(), rel=1e-2)


def digit_files(folder: Path) -> list[Path]:
    source = build_source("digits", split="eval")
    for index in range(3):
        Image.fromarray(source.image(index)).save(folder / f"{index}.png")
    return sorted(folder.glob("*.png"))


def test_pictures_in_files_get_the_classes_of_the_arrays(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    logits_and_labels: tuple[torch.Tensor, torch.Tensor],
) -> None:  # fmt: skip
    files = digit_files(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert predict.main([str(run_dir), str(tmp_path), "--json", "--top", "3", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["image"] for one in found] == [str(file) for file in files]
    expected = logits_and_labels[0][:3].softmax(1).topk(3)
    for one, classes, values in zip(found, expected.indices, expected.values, strict=True):
        assert [best["class"] for best in one["top"]] == [str(label.item()) for label in classes]
        assert [best["probability"] for best in one["top"]] == pytest.approx(values.tolist(), abs=1e-3)
    assert err.count("\n") == 1
    assert "broken.jpg cannot be read: it is not an image file" in err

    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{file}\n" for file in files)))
    assert predict.main([str(run_dir), "-", "--device", "cpu"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class_1"] for row in rows] == [one["top"][0]["class"] for one in found]
    assert len(rows[0]) == 11


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str], main: Any = evaluate.main) -> str:
    assert main([*arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


def test_mistakes_of_users_are_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not there; give results/RUN" in ended(["nowhere"], capsys)
    assert "no checkpoint" in ended([str(tmp_path)], capsys)
    assert "--data is nothing.beton" in ended([str(run_dir), "--data", "nothing.beton"], capsys)
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "a.png")
    said = ended([str(run_dir), "--data", str(tmp_path), "--cache-dir", str(tmp_path / "cache")], capsys)
    assert "has labels of 1 classes, and the model has 10" in said
    assert "there is no picture in" in ended([str(run_dir), str(tmp_path / "cache")], capsys, predict.main)
    assert "gone.jpg is not there" in ended([str(run_dir), "gone.jpg"], capsys, predict.main)


def test_a_size_that_the_network_does_not_take_is_named(run_dir: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    forward = Network.__call__

    def picky(network: Network, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-1] != 13, "patches of 4 px"
        return forward(network, images)

    monkeypatch.setattr(Network, "__call__", picky)
    said = ended([str(run_dir), "--sizes", "13", "-o", str(tmp_path)], capsys)
    assert "resnet_digits does not take images of 13 px; leave that size out (patches of 4 px" in said


def test_a_run_that_cannot_be_used_is_told_so(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    os.link((run_dir / "checkpoints" / "best.pt").resolve(), other / "checkpoints" / "best.pt")
    assert "has no recipe.yaml" in ended([str(other)], capsys)
    text = (run_dir / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text)
    assert "has no model.json" in ended([str(other)], capsys)
    (other / "model.json").write_text("{}")
    assert "model.json is damaged" in ended([str(other)], capsys)
    (other / "model.json").write_text((run_dir / "model.json").read_text())
    (other / "recipe.yaml").write_text(text.replace("width: 16", "width: 8"))
    assert "does not hold the network of" in ended([str(other)], capsys)
    (other / "checkpoints" / "best.pt").unlink()
    (other / "checkpoints" / "best.pt").write_bytes(b"damaged")
    assert "is no whole checkpoint" in ended([str(other)], capsys)
