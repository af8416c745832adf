"""Self-attention of images' tokens with the parameters of torch's MultiheadAttention, and fewer copies than there.

Shapes: N images, T tokens, D features, H heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Tokens [N, T, D] -> softmax(Q K^T / sqrt(D / H)) V, projected; Q, K and V from one projection (Vaswani 2017).

    It takes over the parameters of `attention`, under their names, and draws its dropout as that does. torch's module
    puts tokens first and copies queries, keys and values apart; here they stay views of the projection's output.

    Raises ValueError unless `attention` has batches first, keys and values of D features, and no tokens of its own.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        others = {
            "batch_first=False": not attention.batch_first,
            "kdim or vdim": not attention._qkv_same_embed_dim,
            "add_bias_kv": attention.bias_k is not None,
            "add_zero_attn": attention.add_zero_attn,
        }
        if any(others.values()):
            found = ", ".join(setting for setting, is_set in others.items() if is_set)
            raise ValueError(f"received an attention with {found}, which is not known here; make it without")
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj_weight = attention.in_proj_weight  # [3 D, D]
        self.in_proj_bias: Any = attention.in_proj_bias  # [3 D], or None
        self.out_proj = attention.out_proj

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        images, count, features = tokens.shape
        each = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        each = each.view(images, count, 3, self.num_heads, features // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = each.unbind()  # [N, H, T, D / H]
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        # Not a call of the layer: as in torch's, it belongs to this module where products are counted.
        return F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"
