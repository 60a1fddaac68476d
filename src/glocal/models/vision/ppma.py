"""PPMA: a pyramid with polyline path masks on its attention, along lines in the finest levels, whole in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glocal.models.registry import register
from glocal.models.vision.pyramid import Level, Pyramid
from glocal.nn import Rope
from glocal.nn.polyline import PathDecay, PolylineAttention

__all__ = ["PPMA", "ppma_base", "ppma_small", "ppma_tiny"]


class PPMA(Pyramid):
    """Polyline Path Masked Attention for Vision Transformer (Zhao et al., 2025, arXiv 2506.15940).

    Args:
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads of each level, and hidden channels of its
            feed-forward over its own.
        criss_cross: how many levels, the finest first, attend along rows and columns.
        layer_scale: start values of the branches' scales, one a level; none where None.
        options: as in `Pyramid`.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.ppma import PPMA
    >>> model = PPMA((16, 32), (1, 1), (2, 2), (3, 3), criss_cross=1, projected=64, num_classes=10).eval()
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        *,
        criss_cross: int = 2,
        layer_scale: Sequence[float | None] | None = None,
        projected: int = 1024,
        **options: Any,
    ) -> None:
        scales = (None,) * len(dims) if layer_scale is None else tuple(layer_scale)
        if not dims or not len(dims) == len(depths) == len(num_heads) == len(mlp_ratios) == len(scales):
            raise ValueError(
                f"dims, depths, num_heads, mlp_ratios and layer_scale must have one entry a level; they were "
                f"{tuple(dims)}, {tuple(depths)}, {tuple(num_heads)}, {tuple(mlp_ratios)} and {scales}"
            )

        def level(n: int) -> Level:
            def mixer(_: int) -> PolylineAttention:
                common: dict[str, Any] = dict(lepe=5, qkv_bias=True, out_bias=True)
                rope = Rope(interleaved=True, endpoint=True)
                return PolylineAttention(dims[n], num_heads[n], criss_cross=n < criss_cross, rope=rope, **common)

            return Level(dims[n], depths[n], mlp_ratios[n], mixer, scales[n])

        half = dims[0] // 2
        stem = ((half, 2), (half, 1), (dims[0], 2), (dims[0], 1))
        super().__init__([level(n) for n in range(len(dims))], stem=stem, projected=projected, **options)

    def no_weight_decay(self) -> set[str]:
        """Names of what is trained without weight decay: biases and rates of the paths' decays."""
        return {
            f"{name}.{own}"
            for name, module in self.named_modules()
            if isinstance(module, PathDecay)
            for own in ("bias", "log_rate")
        }


@register
def ppma_tiny(**options: Any) -> PPMA:
    """14.3 million parameters; 224 pixels."""
    return PPMA(**({"drop_path": 0.1} | options))


@register
def ppma_small(**options: Any) -> PPMA:
    """27.0 million parameters; 224 pixels."""
    settings: dict[str, Any] = {"depths": (3, 4, 18, 4), "mlp_ratios": (4, 4, 3, 3), "criss_cross": 3}
    return PPMA(**(settings | {"drop_path": 0.15} | options))


@register
def ppma_base(**options: Any) -> PPMA:
    """54.2 million parameters; 224 pixels."""
    settings: dict[str, Any] = {
        "dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "criss_cross": 3,
        "layer_scale": (None, None, 1e-6, 1e-6),
    }
    return PPMA(**(settings | {"drop_path": 0.4} | options))
