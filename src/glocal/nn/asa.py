"""Alternating sparse attention: the branches of native sparse attention divided among layers, over latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from glocal.nn.latent import LatentAttention
from glocal.nn.nsa import NativeSparseAttention
from glocal.nn.rope import Rope

__all__ = ["LatentSparseAttention", "asa_layers"]


class LatentSparseAttention(LatentAttention, NativeSparseAttention):
    """Branches of `NativeSparseAttention` over the latents of `LatentAttention`: a layer of ASA.

    Compressing and choosing work on the latents themselves, in absorbed form, with one choice for each group: the mean
    of latents is the latent of the mean. Hu et al., 2025, arXiv 2511.00819.

    Args:
        dim, num_heads: as in `Attention`, with the options of `LatentAttention` and `NativeSparseAttention` but for
            ``compress``.

    Raises:
        ValueError: learned compression, or what one of the two refuses.

    >>> import torch
    >>> from glocal.nn import LatentSparseAttention
    >>> layer = LatentSparseAttention(64, 4, rank=16, branches=("slide",), window=8, causal=True)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    tiny: ClassVar[dict[str, Any]] = LatentAttention.tiny | NativeSparseAttention.tiny

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        if options.get("compress", "mean") != "mean":
            raise ValueError(f"compress must be 'mean' over latents; it was {options['compress']!r}")
        super().__init__(dim, num_heads, **options)
        if self.branches != ("slide",):
            if self.absorb is False:
                raise ValueError("absorb must not be False: blocks are compressed and chosen among latents")
            self.absorb = True


def asa_layers(
    depth: int,
    num_heads: int,
    *,
    num_groups: int = 1,
    rank: int = 512,
    rope_dim: int | None = None,
    window: int = 512,
    compress_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    top_k: int = 16,
    causal: bool = True,
    rope: Rope | None = None,
    **options: Any,
) -> list[Callable[[int], LatentSparseAttention]]:
    """The layers of ASA, for `Transformer`: local, global, local, ...

    Local layers have the window alone, over one latent (MLA), and their cache is a ring. Global layers have the
    compressed and the chosen blocks, over a latent for each group (GLA). Hu et al., 2025, arXiv 2511.00819.

    Args:
        depth: layers.
        num_heads: query heads.
        num_groups: latents of a token in global layers.
        rank: channels of all latents of a token, in either kind of layer; a multiple of ``num_groups``.
        rope_dim, window, compress_size, compress_stride, block_size, top_k, causal, rope: as in the layers.
        options: more of them, for all layers.

    Returns:
        One function a layer, from ``dim`` to the layer.

    Raises:
        ValueError: a rank that cannot be divided among the groups.

    >>> from glocal.nn import asa_layers
    >>> for make in asa_layers(3, 4, num_groups=2, rank=32):
    ...     layer = make(64)
    ...     print(layer.branches, layer.num_groups, layer.rank)
    ('slide',) 1 32
    ('compress', 'select') 2 16
    ('slide',) 1 32
    """
    if num_groups < 1 or rank % num_groups:
        raise ValueError(f"rank must be a multiple of num_groups {num_groups}; it was {rank}")
    shared = {"rope_dim": rope_dim, "rope": rope, "causal": causal} | options

    def local(dim: int) -> LatentSparseAttention:
        return LatentSparseAttention(dim, num_heads, rank=rank, branches=("slide",), window=window, **shared)

    def far(dim: int) -> LatentSparseAttention:
        return LatentSparseAttention(
            dim,
            num_heads,
            rank=rank // num_groups,
            num_groups=num_groups,
            branches=("compress", "select"),
            compress_size=compress_size,
            compress_stride=compress_stride,
            block_size=block_size,
            top_k=top_k,
            **shared,
        )

    return [far if number % 2 else local for number in range(depth)]
