"""Files at several image sizes: what is written, which of them a pass reads, and that nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

import data.build
from data import Beton, FFCVLoader
from data.beton.format import sidecar_path, tier_path
from data.beton.tiers import Tiers
from data.beton.write import write_beton
from data.build import build_loader
from data.convert import main
from data.decoding.crops import CropSettings, random_resized_crops
from data.decoding.decode import present_decoders
from data.inspect import describe
from data.sources import ArraySource, folder
from data.sources.image_file import fitted_size

pytestmark = pytest.mark.timeout(120)

SIZES = (60, 100, 160)
JPEGS = {"write_mode": "jpg", "jpeg_quality": 90, "progress": False, "strict": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files in two classes: smooth ones of several shapes, some gray, turned, small or damaged."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(24):
        where = root / ("ant", "bee")[number % 2]
        where.mkdir(exist_ok=True)
        height, width = [(150, 200), (200, 150), (160, 240), (40, 50)][number % 4]
        rows, columns = np.mgrid[:height, :width] / 200
        waves = [128 + 100 * np.sin(7 * (rows * a + columns * b)) for a, b in rng.uniform(0.3, 1, (3, 2))]
        image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
        turned = Image.Exif()
        turned[0x0112] = 6
        (image.convert("L") if number == 5 else image).save(
            where / f"{number:02}.jpg", quality=95, **({"exif": turned} if number in (6, 7, 8) else {})
        )
    (root / "ant" / "bad.jpg").write_bytes(b"nothing of the kind")
    return root


@pytest.fixture(scope="module")
def tiered(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beton(folder(images), tmp_path_factory.mktemp("tiered") / "x.beton", sizes=SIZES, **JPEGS)


def single(images: Path, path: Path, size: int) -> Path:
    return write_beton(folder(images), path, max_side_px=size, **JPEGS)


def sidecar(path: Path) -> dict:
    return json.loads(sidecar_path(path).read_text())


@pytest.mark.parametrize("size", SIZES)
def test_each_file_has_the_bytes_of_a_conversion_at_its_size_alone(
    images: Path, tiered: Path, tmp_path: Path, size: int
):
    alone = single(images, tmp_path / "alone.beton", size)
    file = tiered if size == max(SIZES) else tier_path(tiered, size)
    assert file.read_bytes() == alone.read_bytes()
    told = sidecar(file)
    tiers = told.pop("tiers", None)
    assert told == sidecar(alone)
    others = {str(other): sidecar(tier_path(tiered, other))["images_checksum"] for other in (100, 60)}
    assert tiers == (others if size == max(SIZES) else None)
    assert "bad.jpg" in Path(f"{file}.report.txt").read_text()


def test_order_labels_and_classes_are_one(tiered: Path):
    largest, *others = [Beton(path) for path in (tiered, tier_path(tiered, 100), tier_path(tiered, 60))]
    assert len(largest) == 24
    for size, other in zip((100, 60), others, strict=True):
        assert np.array_equal(other.labels, largest.labels)
        assert (other.class_names, other.mean, other.std) == (largest.class_names, largest.mean, largest.std)
        shapes = [fitted_size((int(h), int(w)), size) for h, w in zip(largest.heights, largest.widths, strict=True)]
        # 240x160 px become 160x106 in the largest file, and 100x66 in the next, both from 240x160.
        assert np.abs(np.array(shapes) - np.stack([other.heights, other.widths], axis=1)).max() <= 1


def test_each_image_is_decoded_once_by_pillow(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts = []
    original = JpegImagePlugin.JpegImageFile.load_prepare
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "load_prepare", lambda self: counts.append(self) or original(self)
    )
    write_beton(folder(images), tmp_path / "x.beton", sizes=(30, 60, 100), num_workers=0, **JPEGS)
    assert len(counts) == 24


def test_pixels_are_those_of_an_antialiased_resize(photos: ArraySource, tmp_path: Path):
    """150x200 px to 75x100: means of 2x2 px, and on average what Pillow and torchvision make of it; to a level."""
    from torchvision.transforms.v2.functional import resize

    path = write_beton(photos, tmp_path / "x.beton", sizes=(100, 200), progress=False)
    small, whole = Beton(tier_path(path, 100)), Beton(path)
    for index in range(len(photos)):
        image = photos.image(index)
        found = small.image_bytes(index).reshape(75, 100, 3).astype(float)
        assert np.abs(found - image.reshape(75, 2, 100, 2, 3).mean(axis=(1, 3))).max() <= 1
        pillows = np.asarray(Image.fromarray(image).resize((100, 75), Image.Resampling.BILINEAR)).astype(float)
        torchs = resize(torch.from_numpy(image).permute(2, 0, 1), [75, 100], antialias=True).permute(1, 2, 0).numpy()
        for other in (pillows, torchs):
            assert np.abs(found - other).mean() < 1
        assert np.array_equal(whole.image_bytes(index).reshape(150, 200, 3), image)


@pytest.mark.parametrize("decoder", ["native", "libffcv"])
@pytest.mark.parametrize("settings", [{}, {"crop_ratio": 0.875}, {"train": False}])
def test_a_stage_equals_a_loader_of_a_file_of_that_size_alone(
    images: Path, tiered: Path, tmp_path: Path, decoder: str, settings: dict
):
    """Through changes of the size, a resumption in the middle, and ranks."""
    if decoder not in present_decoders():
        pytest.skip(f"{decoder} is not installed")
    common = {"per_device_batch_size": 4, "image_size": 32, "train": True, "seed": 3, "num_workers": 2} | settings
    common |= {"decoder": decoder, "drop_last": False, "world_size": 2}
    alone = {size: single(images, tmp_path / f"{size}.beton", size) for size in SIZES}
    # Training: 42.5 and 70.5 px of the median image, divided by 1.5 or times 0.875. Evaluation: 0.875 x 40 and 66 px.
    read = {
        "": {26: 60, 32: 100, 90: 160},
        "crop_ratio": {26: 60, 50: 100, 90: 160},
        "train": {26: 60, 56: 100, 90: 160},
    }
    for rank in (0, 1):
        loader = FFCVLoader(tiered, rank=rank, **common)
        for epoch, (image_size, size) in enumerate(read["".join(settings)].items()):
            expected = tiered if size == max(SIZES) else tier_path(tiered, size)
            assert loader.file_for(image_size) == expected
            reference = FFCVLoader(alone[size], rank=rank, **common)
            for each in (loader, reference):
                each.set_image_size(image_size)
                each.set_position(epoch, 1 if epoch == 1 else 0)
            batches, references = list(loader), list(reference)
            assert len(batches) == len(references) == (2 if epoch == 1 else 3)
            for (ours, labels), (theirs, their_labels) in zip(batches, references, strict=True):
                assert torch.equal(ours, theirs)
                assert torch.equal(labels, their_labels)


def test_the_test_crop_of_training_reads_what_evaluation_needs(tiered: Path):
    settings = {"per_device_batch_size": 24, "train": True, "image_size": 50, "num_workers": 0, "crop_ratio": 0.5}
    loader = FFCVLoader(tiered, **settings)
    evaluation = FFCVLoader(tiered, **{**settings, "train": False})
    assert loader.file_for(50) == tiered
    assert loader.file_for(50, test_crop=True) == evaluation.file_for(50) == tier_path(tiered, 100)
    loader.set_test_crop(True)
    images, _ = next(iter(loader))
    in_order, _ = next(iter(evaluation))
    assert all(any(torch.equal(image, other) for other in in_order) for image in images)


def test_evaluation_leaves_no_pixel_out_that_it_could_show(tmp_path: Path):
    """A panorama has the smallest crop: its tier decides. An image that no file has larger decides nothing."""
    shapes = [(100, 200)] * 20 + [(20, 30)]
    source = ArraySource(np.zeros(0), np.zeros(21, dtype=int), class_names=("a",), name="shapes")
    source.image = lambda index: np.zeros((*shapes[index], 3), dtype=np.uint8)
    crops = CropSettings(eval_crop_ratio=0.8)
    even = Tiers(write_beton(source, tmp_path / "even.beton", sizes=(100, 200), progress=False))
    assert [even.serving(px, crops, augment=False) is even.largest for px in (40, 41)] == [False, True]
    shapes[7] = (40, 200)
    wide = Tiers(write_beton(source, tmp_path / "wide.beton", sizes=(100, 200), progress=False))
    assert [wide.serving(px, crops, augment=False) is wide.largest for px in (16, 17)] == [False, True]
    assert [wide.serving(px, crops, augment=True) is wide.largest for px in (33, 34)] == [False, True]


def test_headroom(tiered: Path):
    def file(image_size: int, headroom: float | None, **crops: float) -> int:
        serving = Tiers(tiered, headroom=headroom).serving(image_size, CropSettings(**crops), augment=True)
        return serving.sidecar["written_as"]["max_side_px"]

    # The median image's shorter side is 42.5 px in the smallest file (of 40 and 45), 70.5 px in the next (66 and 75).
    assert [file(px, None) for px in (28, 29, 47, 48)] == [60, 100, 100, 160]
    assert [file(px, None, crop_ratio=0.8) for px in (34, 35, 56, 57)] == [60, 100, 100, 160]
    assert [file(px, 1.0) for px in (42, 43, 70, 71)] == [60, 100, 100, 160]
    assert file(1, 1000) == 160
    with pytest.raises(ValueError, match=r"tier headroom 0\.9: give a number of at least 1"):
        Tiers(tiered, headroom=0.9)


@pytest.mark.parametrize("small", [256, 128])
def test_crops_are_the_same_in_proportion(small: int):
    """To the rounding of edges; for few images rounding makes another of the ten attempts the first that fits."""
    rng = np.random.default_rng(0)
    large = np.array([[500, 375], [375, 500], [500, 333], [500, 281], [500, 500]])[rng.integers(0, 5, 20_000)]
    sizes = np.array([fitted_size((w, h), small) for w, h in large.tolist()])
    crops, smaller = (
        random_resized_crops(np.arange(20_000), s[:, 1], s[:, 0], seed=0, epoch=1, scale=(0.08, 1))
        for s in (large, sizes)
    )
    assert np.array_equal(crops[:, 4], smaller[:, 4])
    factors = (sizes / large)[:, ::-1]
    starts = np.abs(crops[:, :2] * factors - smaller[:, :2])
    ends = np.abs((crops[:, :2] + crops[:, 2:4]) * factors - (smaller[:, :2] + smaller[:, 2:4]))
    off = np.maximum(starts, ends).max(axis=1)
    assert (off > 2).mean() < 0.01
    assert np.median(off) < 0.7


def test_the_command_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "x.beton"
    assert main([str(images), str(out), "--sizes", "160,60"]) == 0
    small = tier_path(out, 60)
    said = capsys.readouterr().out
    assert f"{small}: the same images, up to 60 px, {small.stat().st_size / 1e6:.1f} MB" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"x{tier}.beton{end}" for tier in ("", ".60") for end in ("", ".json", ".report.txt")
    )
    for wrong in ("60,60", "0,9", "1,70000"):
        assert main([str(images), str(out), "--sizes", wrong]) == 2
        assert f"sizes {', '.join(wrong.split(','))}: give different longest sides" in capsys.readouterr().err
    for wrong in ("sixty", "", "60,"):
        with pytest.raises(SystemExit):
            main([str(images), str(out), "--sizes", wrong])
        assert f"{wrong}: write longest sides in px as 256,500" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(images), str(out), "--sizes", "60,160", "--max-side", "100"])
    with pytest.raises(ValueError, match="max_side_px 50 beside sizes"):
        write_beton(folder(images), out, max_side_px=50, sizes=(60,), progress=False)


def test_a_failed_conversion_leaves_no_file_at_any_size(images: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be stored"):
        write_beton(folder(images), tmp_path / "x.beton", sizes=SIZES, **JPEGS | {"strict": True})
    assert list(tmp_path.iterdir()) == []


def test_the_largest_file_appears_last(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other ranks wait for it, and then need all the others with their descriptions."""
    appeared = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: appeared.append(Path(new).name) or replace(old, new))
    write_beton(folder(images), tmp_path / "x.beton", sizes=SIZES, **JPEGS)
    files = ["x.60.beton", "x.100.beton", "x.beton"]
    assert [name for name in appeared if name in files] == files
    assert {f"{name}.json" for name in files} < set(appeared[: appeared.index("x.60.beton")])


def copy(tiered: Path, tmp_path: Path) -> Path:
    for path in tiered.parent.iterdir():
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / tiered.name


def remove(path: Path) -> None:
    tier_path(path, 60).unlink()


def of_another_conversion(path: Path) -> None:
    for get in (Path, sidecar_path):
        shutil.copy(get(tier_path(path, 100)), get(tier_path(path, 60)))


def damage(path: Path) -> None:
    with tier_path(path, 60).open("r+b") as file:
        file.truncate(1 << 20)


def without_description(path: Path) -> None:
    sidecar_path(tier_path(path, 60)).unlink()


def tell(tiers: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        sidecar_path(path).write_text(json.dumps(sidecar(path) | {"tiers": tiers}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove, FileNotFoundError, r"has a tier of 60 px, and there is no file .*x\.60\.beton: copy it there, or "
         r"write all sizes anew: python -m data\.convert SOURCE .*x\.beton --sizes 60,100,160"),
        (of_another_conversion, ValueError, r"x\.60\.beton is not the tier of 60 px with which .*x\.beton was written"),
        (without_description, ValueError, r"x\.60\.beton is not the tier of 60 px"),
        (damage, ValueError, r"x\.60\.beton cannot be used: it is cut short"),
        (tell({"500": 1}), ValueError, "they differ in: tiers"),
        (tell({"../60": 1}), ValueError, "its description .* cannot be read"),
        (tell({"60": "1"}), ValueError, "they differ in: tiers"),
        (tell([60]), ValueError, "they differ in: tiers"),
        (tell(60), ValueError, "its description .* cannot be read"),
    ],
)  # fmt: skip
def test_a_tier_that_is_missing_or_another_is_refused_in_one_line(
    tiered: Path, tmp_path: Path, change: Callable[[Path], None], error: type[Exception], message: str
):
    path = copy(tiered, tmp_path)
    change(path)
    with pytest.raises(error, match=message) as raised:
        FFCVLoader(path, per_device_batch_size=4, image_size=16, train=True)
    assert "\n" not in str(raised.value)


def test_a_file_of_before_is_its_own_only_tier(images: Path, tmp_path: Path):
    path = single(images, tmp_path / "x.beton", 160)
    assert "tiers" not in sidecar(path)
    single(images, tier_path(path, 60), 60)  # another file that happens to have the name of a tier
    loader = FFCVLoader(path, per_device_batch_size=4, image_size=16, train=True)
    assert loader.file_for(1) == path
    assert loader.describe_tiers() == []


def build(images: Path, cache_dir: Path, **settings) -> tuple[FFCVLoader, list[str]]:
    log: list[str] = []
    settings = {"split": "train", "per_device_batch_size": 4, "image_size": 16, "log": log.append} | settings
    loader = build_loader(
        source="folder", source_settings={"path": str(images), "eval_fraction": 0.25}, cache_dir=cache_dir, **settings
    )
    assert isinstance(loader, FFCVLoader)
    return loader, log


def test_conversion_at_first_use(images: Path, tmp_path: Path):
    loader, log = build(images, tmp_path, sizes=[160, 60])
    small = loader.file_for(16)
    assert small.name.endswith(".60.beton")
    shorter = np.minimum(Beton(small).heights, Beton(small).widths)
    assert log[-1] == f"{small} serves training at up to {int(np.median(shorter) / 1.5)} px"
    written = small.stat().st_mtime_ns
    build(images, tmp_path, sizes=[60, 160])
    assert small.stat().st_mtime_ns == written
    small.unlink()
    build(images, tmp_path, sizes=[60, 160])  # nobody else has a copy of it
    assert small.is_file()
    assert build(images, tmp_path)[0].file_for(16) != loader.file_for(160)
    with pytest.raises(FileNotFoundError, match="has not come"):
        build(images, tmp_path, sizes=[50, 160], rank=1, world_size=2, stall_timeout_seconds=0.3)


def test_without_a_decoder_sizes_are_told_to_be_of_no_use(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data.build, "present_decoders", list)
    log: list[str] = []
    settings = {"split": "train", "per_device_batch_size": 4, "image_size": 16, "num_workers": 0}
    source = {"source": "folder", "source_settings": {"path": str(images), "eval_fraction": 0.25}}
    build_loader(cache_dir=tmp_path, sizes=[60, 160], batches_ahead=4, log=log.append, **settings, **source)
    assert log[-1] == "the torch loader reads the images themselves: no files of other sizes are written"
    assert list(tmp_path.iterdir()) == []


def test_inspection_lists_the_smaller_files(tiered: Path, tmp_path: Path):
    path = copy(tiered, tmp_path)
    tier_path(path, 60).unlink()
    said = describe(Beton(path)).splitlines()
    size = tier_path(path, 100).stat().st_size / 1e6
    assert f"  smaller images: {tier_path(path, 100)}, {size:,.1f} MB" in said
    assert f"  smaller images: {tier_path(path, 60)}, which is not there" in said


def test_sizes_of_what_has_none_of_our_files(images: Path, tiered: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"sizes 60, 160 beside .*x\.beton, which has the sizes"):
        build(images, tmp_path, sizes=[60, 160], path=tiered)
    with pytest.raises(ValueError, match="sizes 60, 160 beside loader 'torch'"):
        build(images, tmp_path, sizes=[60, 160], loader="torch")
    with pytest.raises(ValueError, match="sizes 60, 60: give different longest sides"):
        build(images, tmp_path, sizes=[60, 60])
