"""HyenaPixel networks: MetaFormers whose mixers are convolutions as large as the map, in some stages or in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from glocal.models.registry import register
from glocal.models.vision.metaformer import MetaFormer, SepConv, Stage, attention
from glocal.nn.hyena import Hyena, HyenaPixel

__all__ = [
    "HyenaFormer",
    "c_hyenapixel_s18",
    "hyena_a_s18",
    "hyena_b36",
    "hyena_s18",
    "hyenapixel_a_s18",
    "hyenapixel_b36",
    "hyenapixel_s18",
]

MIXERS = ("hyenapixel", "hyena", "sepconv", "attention")


class HyenaFormer(MetaFormer):
    """A MetaFormer with HyenaPixel, or Hyena to both sides (Spravil et al., 2024, arXiv 2402.19305).

    Args:
        dims, depths: channels and blocks of each stage.
        mixers: of each stage: "hyenapixel", "hyena", "sepconv" or "attention".
        size: of the images that kernels are made for: each reaches over the whole map of its stage.
        norm: norms inside the mixers of HyenaPixel and Hyena.
        features: of each kernel's cells, one number a stage; as published for four stages where None.
        options: as in `MetaFormer`.

    Images of other sizes and shapes can be classified too. Larger ones are convolved with what the kernels reach;
    `resize` stretches those of HyenaPixel. Hyena reads a map row by row: its kernels fit the rows of ``size`` alone.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.hyenapixel import HyenaFormer
    >>> model = HyenaFormer((16, 32), (1, 1), ("hyenapixel", "hyena"), size=64, features=(32, 33), num_classes=10)
    >>> model(torch.randn(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 9, 3),
        mixers: Sequence[str] = ("hyenapixel",) * 4,
        *,
        size: int = 224,
        norm: bool = False,
        features: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        wide = (32, 32, 48, 64)
        if features is None and len(mixers) == len(wide):
            features = [wide[n] + (kind == "hyena") for n, kind in enumerate(mixers)]
        if not dims or features is None or not len(dims) == len(depths) == len(mixers) == len(features):
            raise ValueError(
                "dims, depths, mixers and features must have one entry a stage; they were "
                f"{tuple(dims)}, {tuple(depths)}, {tuple(mixers)} and {features if features is None else (*features,)}"
            )
        if unknown := set(mixers) - set(MIXERS):
            raise ValueError(f"mixers must be among {', '.join(MIXERS)}; there was {', '.join(sorted(unknown))}")
        if size < 4:
            raise ValueError(f"size must be at least 4 pixels; it was {size}")
        sides = _sides(size, len(dims))

        def mixer(number: int) -> Callable[[int], nn.Module]:
            kind, side, wide = mixers[number], sides[number], features[number]
            if kind == "hyenapixel":
                return lambda dim: HyenaPixel(dim, side, features=wide, norm=norm)
            if kind == "hyena":
                hidden = 2 * (wide - 1)
                return lambda dim: Hyena(dim, side * side, features=wide, hidden=hidden, norm=norm)
            return SepConv if kind == "sepconv" else attention

        super().__init__([Stage(dims[n], depths[n], mixer(n), scaled=n > 1) for n in range(len(dims))], **options)

    def resize(self, size: int) -> None:
        """Make the kernels of HyenaPixel fit images of another resolution: the same in finer or coarser cells.

        Raises:
            ValueError: fewer than 4 pixels; a stage of Hyena, whose kernels depend on the rows of its maps.
        """
        if size < 4:
            raise ValueError(f"size must be at least 4 pixels; it was {size}")
        if any(isinstance(module, Hyena) for module in self.modules()):
            raise ValueError(
                "resize is for HyenaPixel; this network has stages of Hyena, which reads rows of one length"
            )
        for blocks, side in zip(self.stages, _sides(size, len(self.stages)), strict=True):
            for module in blocks.modules():
                if isinstance(module, HyenaPixel):
                    module.resize(side)


def _sides(size: int, stages: int) -> list[int]:
    """Of the map of each stage."""
    sides = [(size - 3) // 4 + 1]
    for _ in range(stages - 1):
        sides.append((sides[-1] + 1) // 2)
    return sides


B36: dict[str, Any] = {"dims": (128, 256, 512, 768), "depths": (3, 12, 18, 3)}


@register
def hyenapixel_s18(**options: Any) -> HyenaFormer:
    """HyenaPixel everywhere; 29.3 million parameters at 224 pixels."""
    return HyenaFormer(**({"norm": True} | options))


@register
def hyenapixel_b36(**options: Any) -> HyenaFormer:
    """HyenaPixel everywhere; 104.6 million parameters at 224 pixels."""
    return HyenaFormer(**(B36 | {"norm": True} | options))


@register
def hyenapixel_a_s18(**options: Any) -> HyenaFormer:
    """HyenaPixel in the two finest stages, softmax attention in the others; 27.9 million parameters at 224 pixels."""
    return HyenaFormer(**({"mixers": ("hyenapixel",) * 2 + ("attention",) * 2} | options))


@register
def c_hyenapixel_s18(**options: Any) -> HyenaFormer:
    """Separable convolutions in the two finest stages, HyenaPixel in the others; 27.7 million parameters."""
    return HyenaFormer(**({"mixers": ("sepconv",) * 2 + ("hyenapixel",) * 2} | options))


@register
def hyena_s18(**options: Any) -> HyenaFormer:
    """Hyena to both sides everywhere, over rows one after the other; 28.3 million parameters at 224 pixels."""
    return HyenaFormer(**({"mixers": ("hyena",) * 4} | options))


@register
def hyena_b36(**options: Any) -> HyenaFormer:
    """Hyena to both sides everywhere; 102.4 million parameters at 224 pixels."""
    return HyenaFormer(**(B36 | {"mixers": ("hyena",) * 4, "norm": True} | options))


@register
def hyena_a_s18(**options: Any) -> HyenaFormer:
    """Hyena in the two finest stages, softmax attention in the others; 27.2 million parameters at 224 pixels."""
    return HyenaFormer(**({"mixers": ("hyena",) * 2 + ("attention",) * 2} | options))
