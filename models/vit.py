"""Vision Transformers (Dosovitskiy 2021, arXiv 2010.11929) that take images of any size.

Blocks and parameter names are torchvision's, so its weights load unchanged, and code for its blocks (stochastic depth,
gradient checkpointing) works here. Attention is computed with fewer copies (`models.attention`).

Shapes: N images, S px per side, P px per patch, T = 1 + (S / P)² tokens, D features.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from .attention import SelfAttention
from .checkpointing import checkpoint_blocks
from .libraries.hugging_face import find_file
from .weights import StateDict, copy_weights, interpolate_positions, read_weights


class VisionTransformer(nn.Module):
    """Input [N, 3, H, W] with sides that are multiples of the patch, output logits [N, num_classes].

    Position embeddings are for a grid of image_size / patch_size patches per side; for other sizes they are
    interpolated (see `models.weights.interpolate_positions`), with gradients.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv_proj = nn.Conv2d(3, hidden_dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        blocks = (Block(num_heads, hidden_dim, mlp_dim, dropout, attention_dropout) for _ in range(num_layers))
        self.encoder = Encoder(blocks, num_tokens=1 + (image_size // patch_size) ** 2, dim=hidden_dim, dropout=dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(hidden_dim, num_classes)))
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        if (rows * self.patch_size, columns * self.patch_size) != tuple(images.shape[-2:]):
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} px do not divide into patches of {self.patch_size} "
                f"px; make both sides multiples of {self.patch_size}"
            )
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # [N, T - 1, D]
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        return self.heads(self.encoder(tokens, (rows, columns))[:, 0])


class Block(EncoderBlock):
    """torchvision's block of tokens [N, T, D], with an attention of its own."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        torchs: Any = self.self_attention
        self.self_attention = SelfAttention(torchs)

    def forward(self, input: Tensor) -> Tensor:
        tokens = input + self.dropout(self.self_attention(self.ln_1(input)))
        return tokens + self.mlp(self.ln_2(tokens))


class Encoder(nn.Module):
    """Adds positions to tokens [N, T, D], and runs the blocks."""

    def __init__(self, blocks: Iterable[nn.Module], *, num_tokens: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, num_tokens, dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", block) for i, block in enumerate(blocks)))
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = tokens + interpolate_positions(self.pos_embedding, grid)
        return self.ln(self.layers(self.dropout(tokens)))


def vit_b16(
    *,
    num_classes: int,
    image_size: int = 224,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    weights: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """ViT-B/16: 12 layers, 12 heads, 768 features, patches of 16 px; 86,567,656 parameters at 224 px and 1000 classes.

    image_size: px, a multiple of 16: the size that the position embeddings are for. Images of other sizes work too,
        with the embeddings interpolated in every step; set the size that most steps use.
    dropout, attention_dropout: of the embeddings and both branches' outputs, and of attention weights; in [0, 1).
    weights: torchvision's name (IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1 ...), a file, or Hugging Face's folder or id of a
        ViT of this shape (google/vit-base-patch16-224-in21k); a classifier for other classes is left out.
    gradient_checkpointing: recompute each block's activations in the backward pass.
    """
    model = _build(
        num_classes=num_classes,
        image_size=image_size,
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    return _finish(model, weights, architecture="vit_b_16", gradient_checkpointing=gradient_checkpointing)


def vit_digits(
    *,
    num_classes: int,
    image_size: int = 32,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    weights: str | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A ViT for images of 8 to 64 px: 4 layers, 4 heads, 64 features, patches of 4 px; about 0.2 M parameters.

    Settings are those of `vit_b16`; image_size is a multiple of 4, and weights are a file.
    """
    model = _build(
        num_classes=num_classes,
        image_size=image_size,
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=256,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    return _finish(model, weights, architecture=None, gradient_checkpointing=gradient_checkpointing)


def translate_names(state: StateDict) -> StateDict:
    """Rename Hugging Face's and timm's ViT parameters to torchvision's names; others keep theirs.

    Query, key and value are joined into the single matrix of torch's attention; Hugging Face's pooler, which no
    classifier here has, is left out. transformers 5 has names of its own for a model in memory and writes files with
    those of transformers 4; both are known.
    """
    known = (names for sign, names in _NAMES_BY_SIGN.items() if any(sign in name for name in state))
    names = next(known, None)
    if names is None:
        return state
    translated: StateDict = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in names:
            new = re.sub(pattern, replacement, new)
        translated[new] = value
    translated = {name: value for name, value in translated.items() if not name.startswith("pooler.")}
    for query in [name for name in translated if ".query." in name]:
        parts = [translated.pop(query.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        translated[query.replace(".query.", ".in_proj_")] = torch.cat(parts)
    return translated


# Pattern -> replacement, applied in turn.
_HUGGING_FACE_NAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embedding"),
    (r"^embeddings\.patch_embeddings\.projection\.", "conv_proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"encoder.layers.encoder_layer_\2."),
    (r"\.layernorm_before\.", ".ln_1."),
    (r"\.layernorm_after\.", ".ln_2."),
    (r"^layernorm\.", "encoder.ln."),
    (r"^classifier\.", "heads.head."),
)
_TRANSFORMERS_4_NAMES = (
    *_HUGGING_FACE_NAMES,
    (r"\.attention\.attention\.", ".self_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.0."),
    (r"\.output\.dense\.", ".mlp.3."),
)
_TRANSFORMERS_5_NAMES = (
    *_HUGGING_FACE_NAMES,
    (r"\.attention\.q_proj\.", ".self_attention.query."),
    (r"\.attention\.k_proj\.", ".self_attention.key."),
    (r"\.attention\.v_proj\.", ".self_attention.value."),
    (r"\.attention\.o_proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
_TIMM_NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm1\.", ".ln_1."),
    (r"\.norm2\.", ".ln_2."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)
# What only these names contain -> the names.
_NAMES_BY_SIGN = {
    ".attention.attention.query.": _TRANSFORMERS_4_NAMES,
    ".attention.q_proj.": _TRANSFORMERS_5_NAMES,
    ".attn.qkv.": _TIMM_NAMES,
}


def _build(*, image_size: int, patch_size: int, dropout: float, attention_dropout: float, **shape: int) -> nn.Module:
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"image_size {image_size} must be a multiple of the patch, {patch_size} px")
    for name, value in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} must lie in [0, 1); 0 drops nothing")
    return VisionTransformer(
        image_size=image_size, patch_size=patch_size, dropout=dropout, attention_dropout=attention_dropout, **shape
    )


def _finish(
    model: nn.Module, weights: str | None, *, architecture: str | None, gradient_checkpointing: bool
) -> nn.Module:
    if weights is not None:
        path = weights
        if _is_hugging_face(weights):
            _use_norms_epsilon(model, find_file(weights, "config.json"), source=weights)
            path = str(find_file(weights, "model.safetensors"))
        copy_weights(model, translate_names(read_weights(path, architecture=architecture)), source=weights)
    return checkpoint_blocks(model) if gradient_checkpointing else model


def _is_hugging_face(weights: str) -> bool:
    """A folder, or an id: owner/name."""
    path = Path(weights).expanduser()
    return path.is_dir() or (
        not path.suffix and not path.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", weights) is not None
    )


def _use_norms_epsilon(model: nn.Module, config: Path, *, source: str) -> None:
    """Set the layer norms' eps, in sqrt(variance + eps), to the one the weights were trained with."""
    settings = json.loads(config.read_text())
    activation = settings.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"weights {source} were trained with hidden_act {activation!r}, and this network has gelu; "
            f"use model hf.{source}"
        )
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = settings.get("layer_norm_eps", module.eps)


def _initialize(model: VisionTransformer) -> None:
    """As torchvision: N(0, 1 / fan-in) cut at -2 and 2 for patches, and zeros for the classifier."""
    fan_in = model.conv_proj.weight[0].numel()
    head = model.heads.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert model.conv_proj.bias is not None
    nn.init.trunc_normal_(model.conv_proj.weight, std=fan_in**-0.5)
    for parameter in (model.conv_proj.bias, head.weight, head.bias):
        nn.init.zeros_(parameter)
