"""Batches copied ahead on the side stream hold the pixels of batches that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data import write_beton
    from data.sources import synthetic

    path = tmp_path_factory.mktemp("beton") / "images.beton"
    return write_beton(synthetic(num_samples=512, image_size=96), path, write_mode="jpg", progress=False)


def make_loader(kind: str, beton: Path, device: Any) -> Any:
    """Random crops of 64 px in batches of 64, the last of them smaller."""
    from data import build_loader

    where: dict[str, Any] = {"path": beton} if kind == "ffcv" else {}
    return build_loader(
        source="synthetic", source_settings={"num_samples": 500, "image_size": 96}, split="train", loader=kind,
        per_device_batch_size=64, image_size=64, num_workers=2, drop_last=False, device=device, log=lambda text: None,
        **where,
    )  # fmt: skip


def busy(device: Any, work: torch.Tensor) -> torch.Tensor:
    """Keep the step's stream busy for some milliseconds, so that a copy that does not wait for it would show."""
    for _ in range(20 if device.type == "cuda" else 1):
        work = work @ work
        work = work / work.norm()
    return work


@pytest.mark.parametrize("kind", ["ffcv", "torch"])
def test_the_pixels_are_those_of_no_prefetch(kind: str, device: Any, beton: Path) -> None:
    expected = [(images.clone(), labels.clone()) for images, labels in make_loader(kind, beton, "cpu")]
    loader = make_loader(kind, beton, device)
    work = torch.randn(2048 if device.type == "cuda" else 64, 2048 if device.type == "cuda" else 64, device=device)
    for _ in range(2):
        loader.set_position(0)
        sums, seen = [], []
        for images, labels in loader:
            work = busy(device, work)
            # In the order of the step's stream: a batch whose memory is used again too early would sum to another.
            sums.append(images.sum(dtype=torch.int64))
            seen.append((images.cpu() if len(seen) % 2 else None, labels.cpu()))
            assert images.device.type == device.type
            assert images.dtype == torch.uint8
            assert images.is_contiguous(memory_format=torch.channels_last)
            del images
        assert len(seen) == len(expected) == 8
        for (images, labels), summed, (right, right_labels) in zip(seen, sums, expected, strict=True):
            assert summed.item() == right.sum(dtype=torch.int64).item()
            assert images is None or torch.equal(images, right)
            assert torch.equal(labels, right_labels)


def test_memory_is_pinned_for_some_batches_not_for_each(
    device: Any, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data import FFCVLoader
    from data.loading import to_device

    allocated: list[int] = []
    original = to_device._pinned_bytes
    monkeypatch.setattr(to_device, "_pinned_bytes", lambda size: allocated.append(size) or original(size))
    settings = {"per_device_batch_size": 16, "image_size": 64, "train": True, "num_workers": 2, "batches_ahead": 3}
    expected = [images.clone() for images, _ in FFCVLoader(beton, **settings)]
    loader = FFCVLoader(beton, device=device, **settings)
    found = [images.cpu() for images, _ in loader]
    assert len(found) == len(expected) == 32
    assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))
    assert len(allocated) <= 6
    assert bool(allocated) == (device.type == "cuda")


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_copied_ahead_arrives_whole(device: Any, pinned: bool) -> None:
    """Many batches, each of one value, freed as soon as they were used."""
    from data.loading.to_device import to_device

    def batches() -> Any:
        for value in range(100):
            images = torch.full((32, 3, 64, 64), value, dtype=torch.uint8)
            labels = torch.full((32,), value)
            yield (images.pin_memory(), labels.pin_memory()) if pinned and device.type == "cuda" else (images, labels)

    work = torch.randn(64, 64, device=device)
    wrong = []
    for value, (images, labels) in enumerate(to_device(batches(), device)):
        work = busy(device, work)
        wrong.append((images != value).sum() + (labels != value).sum())
    assert len(wrong) == 100
    assert torch.stack(wrong).sum().item() == 0


def test_a_pass_that_ends_early_leaves_the_next_one_right(device: Any, beton: Path) -> None:
    expected = [images.clone() for images, _ in make_loader("ffcv", beton, "cpu")]
    loader = make_loader("ffcv", beton, device)
    for taken in (1, 3):
        loader.set_position(0)
        for number, (images, _) in enumerate(loader, start=1):
            assert torch.equal(images.cpu(), expected[number - 1])
            if number == taken:
                break
