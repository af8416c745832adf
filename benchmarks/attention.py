"""Steps of Vision Transformers with our attention, against the same blocks with torch's MultiheadAttention.

python -m benchmarks.attention                  # CPU-seconds on one thread: vit_digits at 12 and 32 px, ViT-B/16
python -m benchmarks.attention --device cuda    # between events on a GPU, with ViT-B/16 in larger batches
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from benchmarks.algorithm_variants import NUM_CLASSES, OURS, Bench, Variant
from benchmarks.algorithms import build_groups, described, keep_freed_memory, measure
from benchmarks.measuring import columns
from models import registry, vit

SIZES = {"cpu": [("vit_digits", 12, 64), ("vit_digits", 32, 64), ("vit_b16", 224, 2)]}  # px, images of a batch
SIZES["cuda"] = [*SIZES["cpu"][:2], ("vit_b16", 224, 128)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cost of training steps, with ratios to torch's attention."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [["network", "px", "batch", "ms a step", "of torch's", "95 % interval of the median"]]
    for name, image_size, batch_size in SIZES[options.device]:
        build = partial(with_torchs_attention, name)
        device, form = torch.device(options.device), torch.contiguous_format
        bench = Bench(name, image_size, batch_size, device, form, False, build=build)
        groups = build_groups(bench, [Variant("attention", OURS, "ours", partial(_step, name=name))])
        measure(groups, bench, rounds=options.rounds, steps=1)
        figures = described(groups[0].rows[0])
        cost, ratio = figures["cost_ms"]["median"], figures["ratio_to_baseline"]
        lines.append([name, str(image_size), str(batch_size), f"{cost:.1f}", f"{ratio['median']:.3f}"])
        lines[-1].append(f"{ratio['low']:.3f} to {ratio['high']:.3f}")
    print(columns(lines))
    return 0


def with_torchs_attention(name: str, *, num_classes: int) -> nn.Module:
    """A network of models.vit made of torchvision's own blocks."""
    with mock.patch.object(vit, "Block", EncoderBlock):
        return registry.find(name)(num_classes=num_classes)


def _step(bench: Bench, *, name: str) -> Any:
    return bench.step(bench.ready(registry.find(name)(num_classes=NUM_CLASSES)))


if __name__ == "__main__":
    sys.exit(main())
