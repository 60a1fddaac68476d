"""MAViT: a pyramid with magnitude-aware linear attention in its two finest levels, softmax in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glocal.models.registry import register
from glocal.models.vision.pyramid import Level, Pyramid
from glocal.nn import Attention, MagnitudeAwareAttention, Rope

__all__ = ["MAViT", "mavit_base", "mavit_large", "mavit_small", "mavit_tiny"]


class MAViT(Pyramid):
    """Magnitude-Aware Vision Transformer (Fan et al., 2025, arXiv 2507.00698).

    Args:
        dims, depths, num_heads: channels, blocks and heads of each level.
        linear: how many levels, the finest first, have linear attention.
        layer_scale: start values of the branches' scales, one a level.
        mlp_ratio: hidden channels of the feed-forward over a level's.
        options: as in `Pyramid`.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.mavit import MAViT
    >>> model = MAViT((16, 32), (1, 1), (1, 2), linear=1, layer_scale=(1.0, 1.0), projected=64, num_classes=10).eval()
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        *,
        linear: int = 2,
        layer_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        mlp_ratio: float = 3.5,
        projected: int = 2048,
        **options: Any,
    ) -> None:
        if not dims or not len(dims) == len(depths) == len(num_heads) == len(layer_scale):
            raise ValueError(
                f"dims, depths, num_heads and layer_scale must have one entry a level; they were {tuple(dims)}, "
                f"{tuple(depths)}, {tuple(num_heads)} and {tuple(layer_scale)}"
            )

        def level(n: int) -> Level:
            kind = MagnitudeAwareAttention if n < linear else Attention

            def mixer(_: int) -> Attention:
                common: dict[str, Any] = dict(lepe=5, gate=True, qkv_bias=True, out_bias=True)
                return kind(dims[n], num_heads[n], rope=Rope(axes=2, interleaved=True, endpoint=True), **common)

            return Level(dims[n], depths[n], mlp_ratio, mixer, layer_scale[n])

        half = dims[0] // 2
        stem = ((half, 2), (half, 1), (half, 1), (dims[0], 2))
        super().__init__([level(n) for n in range(len(dims))], stem=stem, projected=projected, **options)


@register
def mavit_tiny(**options: Any) -> MAViT:
    """16.4 million parameters; 224 pixels."""
    return MAViT(**({"drop_path": 0.1} | options))


@register
def mavit_small(**options: Any) -> MAViT:
    """27.1 million parameters; 224 pixels."""
    settings: dict[str, Any] = {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "drop_path": 0.15,
    }
    return MAViT(**(settings | options))


@register
def mavit_base(**options: Any) -> MAViT:
    """49.8 million parameters; 224 pixels."""
    settings: dict[str, Any] = {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "drop_path": 0.4,
    }
    return MAViT(**(settings | {"layer_scale": (1.0, 1.0, 1e-6, 1e-6)} | options))


@register
def mavit_large(**options: Any) -> MAViT:
    """97.8 million parameters; 224 pixels."""
    settings: dict[str, Any] = {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "drop_path": 0.55,
    }
    return MAViT(**(settings | {"layer_scale": (1e-6,) * 4, "projected": 2560} | options))
