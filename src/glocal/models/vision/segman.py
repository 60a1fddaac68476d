"""SegMAN: encoders of windows and scans on a pyramid, and a decoder that scans three levels as one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_unshuffle

from glocal.models.registry import register
from glocal.models.vision.pyramid import Level, Pyramid, PyramidBlock
from glocal.nn.lass import LASS
from glocal.nn.ss2d import CrossScan
from glocal.shapes import Float

__all__ = [
    "MMSCopE",
    "SegMAN",
    "SegMANEncoder",
    "segman_base",
    "segman_encoder_base",
    "segman_encoder_large",
    "segman_encoder_small",
    "segman_encoder_tiny",
    "segman_large",
    "segman_small",
    "segman_tiny",
]


class SegMANEncoder(Pyramid):
    """SegMAN's encoder: `LASS` in every block, and in the coarsest level full attention in the place of its scans.

    Fu et al., 2024, arXiv 2412.11890.

    Args:
        dims, depths, num_heads, windows, mlp_ratio: one entry a level.
        layer_scale: start value of each branch's scale, which then has a shift too; none where None.
        full: sides of the last level's map for which its bias of places is kept; of images of 224 here.
        options: as in `Pyramid`.

    Raises:
        ValueError: settings that do not fit each other.

    >>> model = SegMANEncoder((16, 32), (1, 1), (1, 2), (3, 3), (2, 2), projected=24, num_classes=10).eval()
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        windows: Sequence[int],
        mlp_ratio: Sequence[float],
        *,
        layer_scale: float | None = None,
        full: tuple[int, int] = (7, 7),
        projected: int = 1024,
        **options: Any,
    ) -> None:
        if not dims or not len(dims) == len(depths) == len(num_heads) == len(windows) == len(mlp_ratio):
            raise ValueError(
                f"dims, depths, num_heads, windows and mlp_ratio must have one entry a level; they were {tuple(dims)}, "
                f"{tuple(depths)}, {tuple(num_heads)}, {tuple(windows)} and {tuple(mlp_ratio)}"
            )

        def level(n: int) -> Level:
            def mixer(_: int) -> LASS:
                return LASS(dims[n], num_heads[n], windows[n], full=full if n == len(dims) - 1 else None)

            return Level(dims[n], depths[n], mlp_ratio[n], mixer, layer_scale, scale_bias=layer_scale is not None)

        half = dims[0] // 2
        stem = ((half, 2), (half, 1), (dims[0], 2), (dims[0], 1))
        settings: dict[str, Any] = {"positions": 2, "bias": False} | options
        super().__init__([level(n) for n in range(len(dims))], stem=stem, projected=projected, **settings)


class MMSCopE(nn.Module):
    """SegMAN's decoder: three levels become one map at three scales, which are folded to one size and scanned as one.

    Fu et al., 2024, arXiv 2412.11890: Mamba-based multi-scale context extraction.

    Args:
        dims: channels of the levels at an eighth, a sixteenth and a 32nd of the image's sides.
        num_classes: outputs.
        dim: channels of the map at each scale.
        width: channels to which each level is projected.
        dropout: of whole channels before the classifier, in training.
        state: numbers of state a channel of the scan.

    Raises:
        ValueError: at use, sides of the finest level that are no multiples of 4, or levels of other sides.

    >>> decoder = MMSCopE((8, 16, 24), 5, dim=8, width=12).eval()
    >>> decoder([torch.randn(1, 8 // s, 12 // s, c) for s, c in ((1, 8), (2, 16), (4, 24))]).shape
    torch.Size([1, 5, 8, 12])
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        dim: int,
        width: int,
        dropout: float = 0.1,
        state: int = 1,
    ) -> None:
        super().__init__()
        if len(dims) != 3:
            raise ValueError(f"dims must be the channels of three levels; it was {tuple(dims)}")
        self.proj = nn.ModuleList(nn.Linear(c, width) for c in dims)
        self.join = _conv(3 * width, dim)
        self.by_two, self.by_four = _conv(dim, 2 * dim, 3, 2, 1), _conv(dim, 4 * dim, 5, 4, 1)
        self.fold = nn.ModuleList(_conv(n * dim, dim) for n in (16, 8, 4))
        context = Level(3 * dim, 1, 4.0, lambda _: CrossScan(3 * dim, state))
        self.context = PyramidBlock(context, 0, positions=2)
        self.back, self.local, self.whole = _conv(3 * dim, width), _conv(dim, dim), _conv(dim, dim)
        self.mix = _conv(5 * dim + 3 * width, dim)
        self.drop, self.head = nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B num_classes H W"]:
        """Levels ``(B, H, W, C2)``, ``(B, H / 2, W / 2, C3)``, ``(B, H / 4, W / 4, C4)`` to logits, channels first."""
        self._fits(maps)
        size = tuple(maps[0].shape[1:3])
        levels = [_resize(proj(m).movedim(-1, 1), size) for proj, m in zip(self.proj, maps, strict=True)]
        x = self.join(torch.cat(levels, 1))
        scales = pixel_unshuffle(x, 4), pixel_unshuffle(self.by_two(x), 2), self.by_four(x)
        folded = torch.cat([fold(t) for fold, t in zip(self.fold, scales, strict=True)], 1)
        context = _resize(self.context(folded.movedim(1, -1)).movedim(-1, 1), size)
        whole = self.whole(x.mean((2, 3), keepdim=True)).expand(-1, -1, *size)
        back = self.back(context)
        mixed = self.mix(torch.cat([self.local(x), whole, context, *(level + back for level in levels)], 1))
        out: Tensor = self.head(self.drop(mixed))
        return out

    def _fits(self, maps: Sequence[Tensor]) -> None:
        shapes = [tuple(m.shape) for m in maps]
        if len(maps) != 3 or any(len(shape) != 4 for shape in shapes):
            raise ValueError(f"maps must be three of (B, H, W, channels); they were {shapes}")
        height, width = shapes[0][1:3]
        halves = [(height // n, width // n) for n in (1, 2, 4)]
        if height % 4 or width % 4 or [shape[1:3] for shape in shapes] != halves:
            raise ValueError(
                f"maps must have sides that are multiples of 4, half of those and a quarter; they were {shapes}"
            )


class SegMAN(nn.Module):
    """Semantic segmentation: an encoder's three coarser levels through `MMSCopE`, logits of the image's size.

    Args:
        encoder: gives the maps of four levels by ``forward_features``; its classifier is taken off.
        num_classes: outputs.
        dim, width, dropout: of the decoder.

    Raises:
        ValueError: at use, sides of the image that are no multiples of 32.

    >>> encoder = SegMANEncoder((8, 8, 16, 16), (1,) * 4, (1, 1, 2, 2), (3,) * 4, (2,) * 4, projected=8)
    >>> SegMAN(encoder, 5, dim=8, width=8).eval()(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 5, 64, 96])
    """

    def __init__(self, encoder: Pyramid, num_classes: int = 150, *, dim: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.proj, encoder.head = nn.Sequential(), nn.Identity()
        dims = [cast(PyramidBlock, cast(nn.Sequential, level)[0]).norm1.normalized_shape[0] for level in encoder.levels]
        self.decoder = MMSCopE(dims[1:], num_classes, dim=dim, width=width, dropout=dropout)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes H W"]:
        """Images to logits."""
        if x.dim() != 4 or x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"x must be images (B, channels, H, W), sides multiples of 32; it was {tuple(x.shape)}")
        return _resize(self.decoder(self.encoder.forward_features(x)[1:]), tuple(x.shape[2:]))


def _conv(before: int, after: int, side: int = 1, stride: int = 1, padding: int = 0) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, side, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return x if x.shape[2:] == size else interpolate(x, size, mode="bilinear")


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "dims": (32, 64, 144, 192),
        "depths": (2, 2, 4, 2),
        "num_heads": (1, 2, 4, 8),
        "windows": (11, 9, 9, 7),
        "mlp_ratio": (4, 4, 3, 3),
    },
    "small": {
        "dims": (64, 144, 288, 512),
        "depths": (2, 2, 10, 4),
        "num_heads": (2, 4, 8, 16),
        "windows": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3.4, 3.4),
    },
    "base": {
        "dims": (96, 160, 364, 560),
        "depths": (4, 4, 18, 4),
        "num_heads": (4, 8, 13, 20),
        "windows": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3, 3),
        "layer_scale": 1e-6,
    },
    "large": {
        "dims": (96, 192, 432, 640),
        "depths": (4, 4, 28, 4),
        "num_heads": (4, 8, 12, 20),
        "windows": (11, 9, 7, 7),
        "mlp_ratio": (4, 4, 3, 3),
        "layer_scale": 1e-6,
    },
}


@register
def segman_encoder_tiny(**options: Any) -> SegMANEncoder:
    """3.5 million parameters; 224 pixels."""
    return SegMANEncoder(**(_SIZES["tiny"] | options))


@register
def segman_encoder_small(**options: Any) -> SegMANEncoder:
    """25.5 million parameters; 224 pixels."""
    return SegMANEncoder(**(_SIZES["small"] | options))


@register
def segman_encoder_base(**options: Any) -> SegMANEncoder:
    """45.0 million parameters; 224 pixels."""
    return SegMANEncoder(**(_SIZES["base"] | options))


@register
def segman_encoder_large(**options: Any) -> SegMANEncoder:
    """81.0 million parameters; 224 pixels."""
    return SegMANEncoder(**(_SIZES["large"] | options))


def _segman(size: str, dim: int, width: int, options: dict[str, Any]) -> SegMAN:
    settings: dict[str, Any] = {"dim": dim, "width": width} | options
    encoder = settings.pop("encoder", None)
    return SegMAN(SegMANEncoder(**_SIZES[size]) if encoder is None else encoder, **settings)


@register
def segman_tiny(**options: Any) -> SegMAN:
    """6.4 million parameters, with 150 classes; options are those of `SegMAN`, ``encoder`` among them."""
    return _segman("tiny", 128, 192, options)


@register
def segman_small(**options: Any) -> SegMAN:
    """29.4 million parameters, with 150 classes."""
    return _segman("small", 144, 288, options)


@register
def segman_base(**options: Any) -> SegMAN:
    """51.8 million parameters, with 150 classes."""
    return _segman("base", 180, 320, options)


@register
def segman_large(**options: Any) -> SegMAN:
    """92.3 million parameters, with 150 classes."""
    return _segman("large", 224, 432, options)
