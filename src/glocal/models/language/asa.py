"""Alternating sparse attention in Llama's network: local layers over a latent, global ones over latents of groups."""

from __future__ import annotations

from typing import Any

from glocal.models.language.transformer import Transformer
from glocal.models.registry import register
from glocal.nn import Rope, asa_layers

__all__ = ["asa", "asa_340m", "asa_tiny"]


def asa(
    vocab: int = 32000,
    dim: int = 1024,
    depth: int = 24,
    num_heads: int = 32,
    *,
    num_groups: int = 2,
    rank: int = 224,
    head_dim: int = 32,
    rope_dim: int = 32,
    v_head_dim: int = 64,
    hidden: int | None = 2816,
    theta: float = 10000.0,
    tied: bool = True,
    **sizes: Any,
) -> Transformer:
    """ASA: layers with a window and layers with compressed and chosen blocks in turn, over latents (`asa_layers`).

    Hu et al., 2025, arXiv 2511.00819; the block is that of Llama.

    Args:
        vocab, dim, depth, hidden, tied: as in `Transformer`.
        num_heads, num_groups, rank, rope_dim: as in `asa_layers`.
        head_dim, v_head_dim: as in `LatentAttention`.
        theta: base of the rotary positions.
        sizes: ``window``, ``compress_size``, ``compress_stride``, ``block_size`` and ``top_k`` of `asa_layers`.

    >>> model = asa(10, 32, 3, 4, rank=8, head_dim=4, rope_dim=4, v_head_dim=8, hidden=64)
    >>> [block.attention.branches for block in model.blocks]
    [('slide',), ('compress', 'select'), ('slide',)]
    """
    layers = asa_layers(
        depth,
        num_heads,
        num_groups=num_groups,
        rank=rank,
        rope_dim=rope_dim,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        rope=Rope(theta),
        **sizes,
    )
    return Transformer(vocab, dim, layers, hidden=hidden, tied=tied)


@register
def asa_340m(**options: Any) -> Transformer:
    """ASA in the sizes of flash-linear-attention's NSA of 340M: 360,567,744 parameters.

    The paper's own sizes of heads and latents are not known to us. Here queries, keys and values have 64 channels a
    head, as there, and a token's latents and rotary key have 256 channels together, as its keys and values there.
    """
    return asa(**options)


@register
def asa_tiny(**options: Any) -> Transformer:
    """An ASA for tests and small machines: 4 layers of 64 channels, windows and blocks of 16."""
    sizes = {"vocab": 256, "dim": 64, "depth": 4, "num_heads": 4, "rank": 32, "hidden": 128}
    sizes |= {"head_dim": 8, "rope_dim": 8, "v_head_dim": 16}
    sizes |= {"window": 16, "compress_size": 8, "compress_stride": 4, "block_size": 16, "top_k": 4}
    return asa(**(sizes | options))
