"""Sources: what they hold, how they are split, and their errors for bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import data.sources.base
import data.sources.sources
from data import Beton, write_beton
from data.sources import (
    ArraySource,
    FolderSource,
    build_source,
    channel_statistics,
    digits,
    folder,
    source_stamp,
    synthetic,
)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    """A folder for a test may have the name of an earlier one, which pytest removed."""
    data.sources.base.say_once.cache_clear()


def image_folder(root: Path, *, classes: tuple[str, ...] = ("bee", "ant"), images: int = 2) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (12, 8), (number, i, 200)).save(root / name / f"{i}.png")
    return root


def test_digits_are_all_there_once_and_classes_are_split_alike():
    train, evaluation = digits(split="train"), digits(split="eval")
    assert len(train) + len(evaluation) == 1797
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    both = [s.image(i)[..., 0].tobytes() for s in (train, evaluation) for i in range(len(s))]
    assert sorted(both) == sorted(image.tobytes() for image in expected)
    assert train.image(0).shape == (8, 8, 3)
    counts = [np.bincount([s.label(i) for i in range(len(s))], minlength=10) for s in (train, evaluation)]
    assert np.abs(counts[1] - 0.2 * (counts[0] + counts[1])).max() <= 0.5


def test_the_split_of_the_digits_is_fixed_and_follows_its_seed():
    first, again, other = (digits(split="eval", split_seed=s) for s in (0, 0, 1))
    pixels = [np.stack([s.image(i) for i in range(len(s))]) for s in (first, again, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_the_digits_without_scikit_learns_file(monkeypatch: pytest.MonkeyPatch):
    read = data.sources.sources._sklearns_digits
    read.cache_clear()
    with_file = read()
    monkeypatch.setattr("data.sources.sources.find_spec", lambda name: None)
    read.cache_clear()
    for ours, theirs in zip(with_file, read(), strict=True):
        assert np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    read.cache_clear()


def test_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    data.sources.sources._sklearns_digits.cache_clear()
    monkeypatch.setattr("data.sources.sources.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'brisk-vision\[demo\]'"):
        digits()


def test_synthetic_images_follow_from_their_index():
    settings = {"num_samples": 20, "num_classes": 4, "image_size": 16}
    a, b = synthetic(**settings), synthetic(**settings)
    assert all(np.array_equal(a.image(i), b.image(i)) for i in (19, 3, 0))
    assert a.image(0).shape == (16, 16, 3)
    assert a.image(0).dtype == np.uint8
    assert [a.label(i) for i in range(5)] == [0, 1, 2, 3, 0]
    other = synthetic(**settings, split="eval")
    assert not np.array_equal(a.image(0), other.image(0))

    def distance(i: int, j: int) -> float:
        return float(np.abs(a.image(i).astype(float) - other.image(j)).mean())

    assert max(distance(i, i) for i in range(4)) < min(distance(i, j) for i in range(4) for j in range(4) if i != j)


def test_folder_reads_classes_in_alphabetical_order_as_rgb(tmp_path: Path):
    root = image_folder(tmp_path)
    Image.new("L", (12, 8), 7).save(root / "ant" / "grey.png")
    Image.new("RGBA", (12, 8), (1, 2, 3, 4)).save(root / "ant" / "alpha.png")
    source = folder(root)
    assert source.class_names == ("ant", "bee")
    assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 0, 1, 1]
    assert all(source.image(i).shape == (8, 12, 3) for i in range(len(source)))
    assert source.image(4).tolist()[0][0] == [0, 0, 200]


def test_folder_splits(tmp_path: Path):
    image_folder(tmp_path / "train", images=3)
    image_folder(tmp_path / "val", images=1)
    assert len(folder(tmp_path, split="train")) == 6
    assert len(folder(tmp_path, split="eval")) == 2
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.val"):
        folder(tmp_path / "nowhere", split="eval")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "test"])
def test_names_of_the_evaluation_folder(tmp_path: Path, name: str):
    image_folder(tmp_path / "train", images=3)
    image_folder(tmp_path / name, images=1)
    assert folder(tmp_path, split="eval").name == f"folder {tmp_path / name}"
    assert len(folder(tmp_path, split="train")) == 6


def test_train_valid_and_test_folders(tmp_path: Path):
    for number, name in enumerate(("train", "valid", "test"), start=1):
        image_folder(tmp_path / name, images=number)
    assert [len(folder(tmp_path, split=split)) for split in ("train", "eval", "test")] == [2, 4, 6]


def test_splits_whose_classes_differ_are_refused(tmp_path: Path):
    image_folder(tmp_path / "train", classes=("ant", "bee", "cat"))
    image_folder(tmp_path / "valid", classes=("ant", "bee", *(f"x{i}" for i in range(7))))
    train, valid = tmp_path / "train", tmp_path / "valid"
    message = (
        f"the classes of {train} and {valid} differ: {valid} alone has x0, x1, x2, x3, x4 and 2 more, which no image"
    )
    for split in ("train", "eval"):
        with pytest.raises(ValueError, match=message):
            folder(tmp_path, split=split)
    assert folder(train).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_split_to_evaluate_on_may_lack_a_class(tmp_path: Path, empty_folder: bool, caplog: pytest.LogCaptureFixture):
    image_folder(tmp_path / "train", classes=("ant", "bee", "cat"))
    image_folder(tmp_path / "val", classes=("ant", "cat"))
    if empty_folder:
        (tmp_path / "val" / "bee").mkdir()
    train, evaluation = (folder(tmp_path, split=split) for split in ("train", "eval"))
    assert train.class_names == evaluation.class_names == ("ant", "bee", "cat")
    assert [evaluation.label(index) for index in range(len(evaluation))] == [0, 0, 2, 2]
    folder(tmp_path, split="eval")
    assert caplog.messages == [f"{tmp_path / 'val'}: no images of bee; the other 2 classes are there"]
    beton = Beton(write_beton(evaluation, tmp_path / "val.beton", progress=False))
    assert beton.class_names == ("ant", "bee", "cat")
    assert beton.labels.tolist() == [0, 0, 2, 2]


def test_a_split_without_any_image_is_refused(tmp_path: Path):
    image_folder(tmp_path / "train", classes=("ant", "bee"))
    (tmp_path / "val" / "bee").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"no images in {tmp_path / 'val' / 'ant'}"):
        folder(tmp_path, split="eval")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no images in {tmp_path / 'train' / 'cat'}"):
        folder(tmp_path, split="train")


def test_folders_that_programs_make_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for split in ("train", "val"):
        image_folder(tmp_path / split)
        for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found"):
            image_folder(tmp_path / split, classes=(name,))
        image_folder(tmp_path / split / "ant", classes=(".ipynb_checkpoints",))
    for split in ("train", "eval"):
        source = folder(tmp_path, split=split)
        assert (source.class_names, len(source)) == (("ant", "bee"), 4)
    assert len(caplog.messages) == 2
    names = ".git, .ipynb_checkpoints, @eaDir, __MACOSX, lost+found"
    assert caplog.messages[0] == f"{tmp_path / 'train'}: left out, for they hold no class: {names}"


def names(source: FolderSource) -> set[str]:
    return {"/".join(source.path(i).parts[-2:]) for i in range(len(source))}


def test_one_folder_divided_in_three(tmp_path: Path):
    root = image_folder(tmp_path / "all", images=20)
    shares = {"eval_fraction": 0.2, "test_fraction": 0.1}
    parts = {split: folder(root, split=split, **shares) for split in ("train", "eval", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 28, "eval": 8, "test": 4}
    assert all(np.bincount([p.label(i) for i in range(len(p))]).tolist() == [len(p) // 2] * 2 for p in parts.values())
    assert set.union(*map(names, parts.values())) == names(folder(root))
    assert names(folder(root, split="eval", **shares, split_seed=1)) != names(parts["eval"])

    Image.new("RGB", (2, 2)).save(root / "ant" / "0 comes first.png")
    moved = names(folder(root, split="eval", **shares)) ^ names(parts["eval"])
    assert len(moved - {"ant/0 comes first.png"}) <= 1


def test_a_training_folder_divided_beside_a_test_folder(tmp_path: Path):
    image_folder(tmp_path / "train", images=10)
    image_folder(tmp_path / "test", images=3)
    sizes = [len(folder(tmp_path, split=split, eval_fraction=0.3)) for split in ("train", "eval", "test")]
    assert sizes == [14, 6, 6]


def test_fractions_that_are_refused(tmp_path: Path):
    root = image_folder(tmp_path / "all", images=2)
    for fractions, message in [
        ({"eval_fraction": 0.0}, "eval_fraction 0.0: give a number between 0 and 1"),
        ({"eval_fraction": 0.5, "test_fraction": -0.1}, "test_fraction -0.1"),
        ({"eval_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"eval_fraction": 0.1}, "class ant of .* has 2 images, too few for one of them to be in the split eval"),
    ]:
        with pytest.raises(ValueError, match=message):
            folder(root, split="eval", **fractions)
    with pytest.raises(ValueError, match="split 'test' has no images: give a test_fraction"):
        digits(split="test")


def test_digits_in_three_parts():
    sizes = [len(digits(split=split, test_fraction=0.1)) for split in ("train", "eval", "test")]
    assert sum(sizes) == 1797
    assert sizes[2] == pytest.approx(180, abs=5)
    plain = digits(split="eval")
    assert sizes[1] == len(plain)


def test_hidden_and_foreign_files_are_passed_over(tmp_path: Path):
    image_folder(tmp_path, images=2)
    (tmp_path / "ant" / "._0.png").write_bytes(b"")
    (tmp_path / "ant" / "notes.txt").write_text("")
    (tmp_path / "bee" / "deeper").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "bee" / "deeper" / "1.PNG")
    source = folder(tmp_path)
    assert (len(source), source.passed_over) == (5, 1)


def test_folder_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/missing: .*one folder a class"):
        folder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="has no folders in it"):
        folder(tmp_path)
    image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*/cat"):
        folder(tmp_path)
    (tmp_path / "cat" / "1.jpg").write_bytes(b"not a jpeg")
    source = folder(tmp_path)
    with pytest.raises(ValueError, match=r"cat/1.jpg cannot be read as an image"):
        source.image(len(source) - 1)


def test_a_folder_that_gains_a_file_has_another_stamp(tmp_path: Path):
    image_folder(tmp_path)
    before = source_stamp("folder", path=tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "ant" / "new.png")
    assert source_stamp("folder", path=tmp_path) != before
    assert source_stamp("digits", split="train") == ""


def test_unknown_sources_and_settings():
    with pytest.raises(ValueError, match=r"unknown source 'digit'; .* did you mean digits"):
        build_source("digit")
    with pytest.raises(ValueError, match=r"do not fit source 'synthetic'.*'num'"):
        build_source("synthetic", num=3)
    with pytest.raises(ValueError, match=r"do not fit source 'folder': missing .*'path'"):
        build_source("folder", split="train")
    with pytest.raises(ValueError, match="split 'test'"):
        build_source("digits", split="test")
    with pytest.raises(ValueError, match="num_samples 0"):
        build_source("synthetic", num_samples=0)


def test_channel_statistics_are_those_of_the_pixels(photos: ArraySource):
    pixels = np.stack([photos.image(i) for i in range(len(photos))]).reshape(-1, 3)
    mean, std = channel_statistics(photos)
    # A grid of every second pixel is looked at.
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=0.7)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=0.7)
    train = digits()
    pixels = np.stack([train.image(i) for i in range(len(train))]).reshape(-1, 3)
    np.testing.assert_allclose(channel_statistics(train), [pixels.mean(axis=0), pixels.std(axis=0)], rtol=1e-9)
