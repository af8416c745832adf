"""The benchmark of token merging: it merges as the paper says, and compares equal multiply-adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_python
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from algos import apply_patch_dropout
from benchmarks.token_merging import MergingBlocks, equal_keep_rate, main, merge, vit_digits_merging
from models.vit import vit_digits


def merged_one_by_one(tokens: Tensor, size: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Of one image, pair by pair."""
    cosine = lambda a, b: float(keys[a] @ keys[b] / keys[a].norm() / keys[b].norm())  # noqa: E731
    even, odd = range(2, len(tokens), 2), range(1, len(tokens), 2)
    best = sorted(((max((cosine(a, b), b) for b in odd), a) for a in even), reverse=True)[:r]
    groups = {place: [place] for place in [0, *even, *odd]}
    for (_, into), gone in best:
        groups[into] += groups.pop(gone)
    sizes = torch.stack([size[group].sum(0) for group in groups.values()])
    return torch.stack([(tokens[group] * size[group]).sum(0) for group in groups.values()]) / sizes, sizes


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("count", [9, 10])
def test_the_most_similar_are_merged_by_their_sizes(r: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tokens, keys = (torch.randn(3, count, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    size = torch.randint(1, 5, (3, count, 1), generator=generator).double()
    found = merge(tokens, size, keys, r)
    expected = [merged_one_by_one(*one, r) for one in zip(tokens, size, keys, strict=True)]
    for ours, reference in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(reference))
    torch.testing.assert_close(merge(tokens, None, keys, r), merge(tokens, torch.ones_like(size), keys, r))


def with_merging(model: Any, r: int) -> Any:
    model.encoder.layers = MergingBlocks(model.encoder.layers, r)
    return model


def classifying(model: Any) -> Any:
    torch.nn.init.normal_(model.heads.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_a_network_that_merges_nothing_is_as_before() -> None:
    model, images = classifying(vit_digits(num_classes=10)), torch.randn(2, 3, 32, 32)
    expected = model(images)
    torch.testing.assert_close(with_merging(model, 0)(images), expected)


def test_a_merged_token_counts_as_often_as_its_patches() -> None:
    # Without positions, an image of equal patches has equal keys, whose merging changes nothing.
    model, image = classifying(vit_digits(num_classes=10).double()), torch.ones(1, 3, 32, 32, dtype=torch.float64)
    torch.nn.init.zeros_(model.encoder.pos_embedding)
    expected = model(image)
    torch.testing.assert_close(with_merging(model, 8)(image), expected)


@pytest.mark.parametrize("r", [2, 8])
def test_patch_dropout_gets_as_many_multiply_adds(r: int) -> None:
    counts = []
    patches = round(64 * equal_keep_rate(vit_digits(num_classes=10), r))
    dropping = [apply_patch_dropout(vit_digits(num_classes=10), keep_rate=kept / 64) for kept in (patches, patches + 1)]
    for model in (dropping[0], vit_digits_merging(num_classes=10, merged=r), dropping[1]):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        matching = sum(counter.get_flop_counts()["Global"].get(one, 0) for one in (torch.ops.aten.bmm,))
        counts.append(counter.get_total_flops() - matching)
    assert counts[0] <= counts[1] < counts[2]


def test_steps_are_measured_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "--merged", "8", "--rounds", "1"]) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["variant", "the network as it is", "merging 8", "keeping 73.4% of patches"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_a_quick_training_compares_both(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    figures = tmp_path / "figures.json"
    command = ["-m", "benchmarks.token_merging", "train", "--merged", "8", "--quick", "--seeds", "0"]
    done = run_python(*command, "--cache", str(tmp_path / "cache"), "--json", str(figures), timeout=280)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(figures.read_text())["data"]["digits"]) == ["merging_0", "merging_8", "dropping_as_8"]
