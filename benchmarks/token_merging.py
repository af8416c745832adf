"""Token merging (Bolya 2023, arXiv 2210.09461) in training, against patch dropout with as many multiply-adds.

    python -m benchmarks.token_merging steps                            # CPU-seconds of a step of vit_digits at 32 px
    python -m benchmarks.token_merging steps --model vit_b16            # of ViT-B/16 at 224 px
    python -m benchmarks.token_merging train --json figures.json        # top-1, as benchmarks.effects and its options

Merging is section 3 of the paper: after the attention of each block, bipartite soft matching on the keys, averaged over
heads, merges r pairs of tokens. They are weighted by their sizes, whose logarithms are added to attention's scores.

Shapes: N images, T tokens, D features, H heads.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from algos import apply_patch_dropout
from benchmarks import effects
from benchmarks.algorithm_variants import NUM_CLASSES, OURS, Bench, Variant
from benchmarks.algorithms import build_groups, described, keep_freed_memory, measure
from benchmarks.measuring import columns
from models import registry

SIZES = {"vit_digits": (32, 64), "vit_b16": (224, 2)}  # px, images of a batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure steps, or train with the options of benchmarks.effects."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_merging")
    parser.add_argument("what", choices=("steps", "train"))
    parser.add_argument("--model", choices=SIZES, default="vit_digits")
    parser.add_argument("--merged", nargs="+", type=int, default=[2, 4, 8], metavar="R", help="r, of each block")
    parser.add_argument("--rounds", type=int, default=20)
    options, others = parser.parse_known_args(arguments)
    return measure_steps(options) if options.what == "steps" else train(options.merged, others)


def train(merged: Sequence[int], arguments: Sequence[str]) -> int:
    """Top-1 and CPU-seconds against the same blocks without either; in one process, which alone knows the variants."""
    registry._MODELS["vit_digits_merging"] = ("benchmarks.token_merging", "vit_digits_merging")
    blocks = (*effects.ON_VIT, "model.name=vit_digits_merging")
    added = {}
    for r in merged:
        dropping = f"algorithms.patch_dropout={{keep_rate: {equal_keep_rate(vit_digits_merging(num_classes=10), r)}}}"
        added[f"merging_{r}"] = effects.Variant((*blocks, f"model.merged={r}"), "", "merging_0")
        added[f"dropping_as_{r}"] = effects.Variant((*blocks, dropping), "patch_dropout", "merging_0")
    effects.VARIANTS.update(merging_0=effects.Variant(blocks), **added)
    return effects.main(["--only", *added, "--data", "digits", *arguments])


def measure_steps(options: argparse.Namespace) -> int:
    """Print the cost of training steps, with ratios to the same blocks without either."""
    torch.set_num_threads(1)
    keep_freed_memory()
    build = partial(merging, options.model)
    variants = {"the network as it is": registry.find(options.model)(num_classes=NUM_CLASSES)}
    for r in options.merged:
        keep = equal_keep_rate(build(), r)
        variants[f"merging {r}"] = build(merged=r)
        variants[f"keeping {keep:.1%} of patches"] = apply_patch_dropout(build(), keep_rate=keep)
    form = torch.contiguous_format
    bench = Bench(options.model, *SIZES[options.model], torch.device("cpu"), form, False, build=build)
    make = lambda bench, model: bench.step(bench.ready(model))  # noqa: E731
    steps = [Variant("token_merging", OURS, how, partial(make, model=model)) for how, model in variants.items()]
    groups = build_groups(bench, steps)
    measure(groups, bench, rounds=options.rounds, steps=1)
    lines = [["variant", "GMAC", "CPU-ms", "ratio", "95 % interval of the median"]]
    for row in map(described, groups[0].rows):
        cost, ratio = row["cost_ms"], row["ratio_to_baseline"]
        lines.append([row["how"], f"{row['gmac']:.3f}", f"{cost['median']:.1f}", f"{ratio['median']:.3f}"])
        lines[-1].append(f"{ratio['low']:.3f} to {ratio['high']:.3f}")
    print(columns(lines))
    return 0


def equal_keep_rate(model: Any, r: int) -> float:
    """Of patch dropout: with the multiply-adds in blocks that merge r tokens each, or just below."""
    blocks, (_, tokens, dim) = len(model.encoder.layers), model.encoder.pos_embedding.shape
    attention, rest = (lambda count: 4 * count * dim + 2 * count**2), (lambda count: 8 * count * dim)
    lengths = itertools.pairwise(tokens - r * block for block in range(blocks + 1))
    merging = sum(attention(before) + rest(after) for before, after in lengths)
    kept = (count for count in range(tokens) if blocks * (attention(count + 1) + rest(count + 1)) <= merging)
    return max(kept) / (tokens - 1)


def vit_digits_merging(*, num_classes: int, merged: int = 0) -> nn.Module:
    """vit_digits whose blocks merge `merged` tokens each, in training and in evaluation."""
    return merging("vit_digits", num_classes=num_classes, merged=merged)


def merging(name: str, *, num_classes: int = NUM_CLASSES, merged: int = 0) -> nn.Module:
    """A network of models.vit, each of whose blocks merges `merged` pairs of its tokens."""
    model: Any = registry.find(name)(num_classes=num_classes)
    model.encoder.layers = MergingBlocks(model.encoder.layers, merged)
    return model


class MergingBlocks(nn.Sequential):
    """The blocks of a network without dropout, on tokens [N, T, D]; each passes the tokens' sizes on to the next."""

    def __init__(self, blocks: nn.Sequential, r: int) -> None:
        super().__init__(*blocks)
        self.r = r

    def forward(self, tokens: Tensor) -> Tensor:
        size = None  # [N, T, 1]; None: all 1
        for block in self:
            tokens, size = self._run(block, tokens, size)
        return tokens

    def _run(self, block: Any, tokens: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attention = block.self_attention
        projected = functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if size is None else size.log().transpose(1, 2).unsqueeze(1)  # [N, 1, 1, T]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # [N, H, T, D / H]
        tokens = tokens + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        if self.r:
            tokens, size = merge(tokens, size, key.mean(1), self.r)
        return tokens + block.mlp(block.ln_2(tokens)), size


def merge(tokens: Tensor, size: Tensor | None, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge r of the tokens in even places, except the class token, each into the most similar one in an odd place.

    Those r have the highest cosine of keys [N, T, D / H]. Returns N x (T - r) tokens, the class token first, and sizes.
    """
    with torch.no_grad():
        keys = functional.normalize(keys, dim=-1)
        similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)
        similarity[:, 0] = -torch.inf
        order = similarity.argsort(dim=-1, descending=True)
        merged, left = order[:, :r], order[:, r:].sort(dim=1).values
        into = partner.gather(1, merged)

    def summed(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        gone, stay, target = (one.unsqueeze(-1).expand(-1, -1, values.shape[-1]) for one in (merged, left, into))
        return torch.cat([even.gather(1, stay), odd.scatter_add(1, target, even.gather(1, gone))], dim=1)

    size = torch.ones_like(tokens[..., :1]) if size is None else size
    sums, sizes = summed(tokens * size), summed(size)
    return sums / sizes, sizes


if __name__ == "__main__":
    sys.exit(main())
