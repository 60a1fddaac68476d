"""The encoder of LongT5, with local attention or with transient global tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import Block, GatedGELU, LongT5Attention

__all__ = [
    "LongT5Encoder",
    "longt5_local_base",
    "longt5_local_large",
    "longt5_tglobal_base",
    "longt5_tglobal_large",
    "longt5_tglobal_xl",
    "longt5_tiny",
]


class LongT5Encoder(nn.Module):
    """LongT5's encoder: RMS norms, `LongT5Attention`, gated GELU, no biases, one table of relative biases for all.

    The layers share the biases by position, of tokens and of global tokens; each has its own norm of global tokens.
    Weights start as T5's. Guo et al., 2021, arXiv 2112.07916.

    Args:
        vocab: tokens.
        dim, depth, num_heads, head_dim, hidden: channels, layers, heads, channels of a head and of the feed-forward.
        radius: how far a token sees to either side.
        global_block_size: tokens for each global token; None is the local variant.
        num_buckets, max_distance: of the relative biases.
        dropout: in training, of the embedding, the attention probabilities, the feed-forward and the output.
        eps: of the norms.
        backend: as in `glocal.attend`.

    Raises:
        ValueError: what `LongT5Attention` refuses.

    >>> import torch
    >>> from glocal.models.language.longt5 import LongT5Encoder
    >>> model = LongT5Encoder(100, 32, depth=2, num_heads=2, head_dim=16, hidden=64, radius=7, global_block_size=4)
    >>> model(torch.randint(100, (1, 50))).shape
    torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        vocab: int = 32128,
        dim: int = 768,
        *,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int = 64,
        hidden: int = 2048,
        radius: int = 127,
        global_block_size: int | None = 16,
        num_buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.0,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.vocab, self.dim = vocab, dim
        self.embed, self.drop = nn.Embedding(vocab, dim), nn.Dropout(dropout)
        settings: dict[str, Any] = {
            "head_dim": head_dim,
            "radius": radius,
            "global_block_size": global_block_size,
            "max_distance": max_distance,
            "bias": nn.Embedding(num_buckets, num_heads),
            "side_bias": None if global_block_size is None else nn.Embedding(num_buckets, num_heads),
            "eps": eps,
            "dropout": dropout,
            "backend": backend,
        }
        self.blocks = nn.ModuleList(
            Block(
                dim,
                LongT5Attention(dim, num_heads, **settings),
                GatedGELU(dim, hidden, dropout=dropout),
                norm=nn.RMSNorm,
                eps=eps,
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=eps)
        self._init(head_dim)

    def _init(self, head_dim: int) -> None:
        """T5's start: no scale in the scores, so queries start smaller."""
        nn.init.normal_(self.embed.weight)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                small = head_dim if name.endswith("q_proj") else 1
                nn.init.normal_(module.weight, std=(module.in_features * small) ** -0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.dim**-0.5)

    def forward(self, tokens: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Tokens ``(B, N)`` to normalised states ``(B, N, dim)``; ``keys (B, N)`` are true for real tokens."""
        x = self.drop(self.embed(tokens))
        for block in self.blocks:
            x = block(x, keys=keys)
        return cast(Tensor, self.drop(self.norm(x)))


_LARGE = {"dim": 1024, "depth": 24, "num_heads": 16, "hidden": 2816}


@register
def longt5_local_base(**options: Any) -> LongT5Encoder:
    """The encoder of LongT5 local, base: 109,628,544 parameters, the embedding's 24,674,304 among them."""
    return LongT5Encoder(**({"global_block_size": None} | options))


@register
def longt5_local_large(**options: Any) -> LongT5Encoder:
    """The encoder of LongT5 local, large: 341,231,104 parameters."""
    return LongT5Encoder(**({"global_block_size": None} | _LARGE | options))


@register
def longt5_tglobal_base(**options: Any) -> LongT5Encoder:
    """The encoder of LongT5 with transient global tokens, base: 109,638,144 parameters."""
    return LongT5Encoder(**options)


@register
def longt5_tglobal_large(**options: Any) -> LongT5Encoder:
    """The encoder of LongT5 with transient global tokens, large: 341,256,192 parameters."""
    return LongT5Encoder(**(_LARGE | options))


@register
def longt5_tglobal_xl(**options: Any) -> LongT5Encoder:
    """The encoder of LongT5 with transient global tokens, xl: 1,223,577,600 parameters."""
    sizes = {"dim": 2048, "depth": 24, "num_heads": 32, "hidden": 5120}
    return LongT5Encoder(**(sizes | options))


@register
def longt5_tiny(**options: Any) -> LongT5Encoder:
    """A LongT5 encoder for tests and small machines: 2 layers of 64 channels, radius 15, blocks of 8."""
    sizes = {"vocab": 256, "dim": 64, "depth": 2, "num_heads": 4, "head_dim": 16, "hidden": 128}
    return LongT5Encoder(**(sizes | {"radius": 15, "global_block_size": 8} | options))
