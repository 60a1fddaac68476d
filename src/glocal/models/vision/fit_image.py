"""FIT over images: a classifier, and a denoiser for diffusion."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from glocal.models.registry import register
from glocal.models.vision.fit import FIT
from glocal.nn import MLP
from glocal.nn.sincos import sincos
from glocal.shapes import Float

__all__ = [
    "FITDenoiser",
    "FITImage",
    "fit_640",
    "fit_1280",
    "fit_6400",
    "fit_denoiser_64",
    "fit_denoiser_tiny",
    "fit_tiny",
    "group_image",
    "ungroup_image",
]


def group_image(
    image: Float[Tensor, "B C H W"], group: tuple[int, int], patch: int
) -> Float[Tensor, "B groups tokens values"]:
    """An image cut into sub-images of ``group`` patches (rows, columns), each of these into its patches.

    Raises:
        ValueError: the image is no multiple of a sub-image.

    >>> group_image(torch.arange(16.0).view(1, 1, 4, 4), (2, 1), 1)[0, :, :, 0].int().tolist()[:2]
    [[0, 4], [1, 5]]
    """
    rows, columns = group[0] * patch, group[1] * patch
    if image.dim() != 4 or image.shape[2] % rows or image.shape[3] % columns:
        raise ValueError(
            f"image must be (B, C, H, W), H a multiple of {rows}, W of {columns}; it was {tuple(image.shape)}"
        )
    cut = image.unflatten(3, (-1, group[1], patch)).unflatten(2, (-1, group[0], patch))
    # B C (group row, row, pixel row) (group column, column, pixel column)
    cut = cut.permute(0, 2, 5, 3, 6, 4, 7, 1)
    out: Tensor = cut.flatten(5).flatten(3, 4).flatten(1, 2)
    return out


def ungroup_image(
    x: Float[Tensor, "B groups tokens values"], size: tuple[int, int], group: tuple[int, int], patch: int
) -> Float[Tensor, "B C H W"]:
    """The image of `group_image`, ``(B, C, *size)``.

    >>> image = torch.randn(1, 3, 8, 8)
    >>> torch.equal(ungroup_image(group_image(image, (2, 2), 2), (8, 8), (2, 2), 2), image)
    True
    """
    rows, columns = size[0] // (group[0] * patch), size[1] // (group[1] * patch)
    cut = x.unflatten(3, (patch, patch, -1)).unflatten(2, group).unflatten(1, (rows, columns))
    out: Tensor = cut.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)
    return out


class _OnImage(nn.Module):
    """What both have: a `FIT` over the groups of an image."""

    def __init__(
        self,
        layers: str,
        size: int | tuple[int, int],
        group: tuple[int, int],
        patch: int,
        channels: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.group, self.patch, self.values = group, patch, channels * patch**2
        rows, columns = group[0] * patch, group[1] * patch
        if self.size[0] % rows or self.size[1] % columns:
            raise ValueError(f"size must be a multiple of a group's {(rows, columns)} pixels; it was {self.size}")
        groups = self.size[0] // rows * (self.size[1] // columns)
        self.fit = FIT(layers, self.values, groups=groups, tokens=group[0] * group[1], **options)


class FITImage(_OnImage):
    """A `FIT` over an image, and a classifier on the mean of what its last layers give.

    Args:
        layers: the layer string.
        size: height and width in pixels.
        group: rows and columns of patches in a group.
        patch: pixels a side.
        latents: of a group.
        num_classes: outputs; the mean itself where 0.
        options: of `FIT`.

    >>> import torch, glocal
    >>> glocal.create("fit_tiny", num_classes=5)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        layers: str,
        size: int | tuple[int, int],
        *,
        group: tuple[int, int],
        patch: int,
        channels: int = 3,
        num_classes: int = 1000,
        latents: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(layers, size, group, patch, channels, latents=latents, **options)
        width = self.fit.latent_dim if self.fit.stages_of[-1][1] else self.fit.dim
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def features(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N dim"]:
        """States of all tokens, or of all latents, ``(B, N, dim)``."""
        return self.fit.features(group_image(image, self.group, self.patch))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images ``(B, C, H, W)`` to logits."""
        return cast(Tensor, self.head(self.features(image).mean(1)))


class FITDenoiser(_OnImage):
    """A `FIT` that predicts an image, or its noise, from a noisy one, the time and a class.

    The latents read two condition tokens in every stage. Latents of an earlier call can be given to the next one
    (self-conditioning, Jabri et al., 2022, arXiv 2212.11972): added through an MLP and a norm that starts at 0.

    Args:
        layers: the layer string; it ends with local layers.
        size, group, patch, channels, latents: as in `FITImage`.
        num_classes: number of class labels; 0 for none.
        options: of `FIT`.

    Raises:
        ValueError: a layer string that ends with global layers.

    >>> import torch, glocal
    >>> model = glocal.create("fit_denoiser_tiny")
    >>> noisy, time = torch.randn(2, 3, 32, 32), torch.rand(2)
    >>> prediction, latents = model(noisy, time, torch.tensor([3, 7]))
    >>> model(noisy, time, torch.tensor([3, 7]), latents=latents)[0].shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        layers: str,
        size: int | tuple[int, int],
        *,
        group: tuple[int, int],
        patch: int,
        channels: int = 3,
        num_classes: int = 0,
        latents: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(layers, size, group, patch, channels, latents=latents, condition=True, **options)
        if self.fit.stages_of[-1][1]:
            raise ValueError(f"layers must end with local layers, which pixels are read from; it was {layers!r}")
        width = self.fit.latent_dim
        self.time1, self.time2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.again, self.again_norm = MLP(width, 4 * width), nn.LayerNorm(width, eps=1e-6)
        nn.init.zeros_(self.again_norm.weight)
        self.head = nn.Linear(self.fit.dim, self.values)

    def conditions(self, time: Tensor, label: Tensor | None) -> Tensor:
        """The condition tokens, ``(B, 1 or 2, latent_dim)``: time in 0 to 1, then the class."""
        if (label is None) != (self.label is None):
            raise ValueError("label must be given if, and only if, the model has classes")
        embedded = normalize(sincos(1000 * time, self.fit.latent_dim).to(self.time1.weight), dim=-1)
        tokens = [self.time2(silu(self.time1(embedded)))]
        if label is not None and self.label is not None:
            tokens.append(self.label(label))
        return torch.stack(tokens, 1)

    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        time: Tensor,
        label: Tensor | None = None,
        *,
        latents: Float[Tensor, "B t m latent_dim"] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B t m latent_dim"]]:
        """Predict.

        Args:
            image: ``(B, C, H, W)``, noisy.
            time: ``(B,)``, 0 to 1.
            label: classes ``(B,)``.
            latents: those returned by an earlier call; a first call, or training without them, has none.

        Returns:
            The prediction, of the image's shape, and the latents for another call.
        """
        again = None if latents is None else self.again_norm(latents + self.again(latents))
        x = group_image(image, self.group, self.patch)
        x, latents = self.fit(x, condition=self.conditions(time, label), added=again)
        return ungroup_image(self.head(x), self.size, self.group, self.patch), latents


_BASE: dict[str, Any] = {"dim": 512, "latent_dim": 768, "num_heads": 8, "latent_heads": 12}
_TINY: dict[str, Any] = {"dim": 32, "latent_dim": 64, "num_heads": 2, "latent_heads": 4}


@register
def fit_tiny(**options: Any) -> FITImage:
    """32 x 32 pixels: 16 groups of 16 patches of 2 x 2."""
    settings = {"layers": "(1)2(1)", "size": 32, "group": (4, 4), "patch": 2, "latents": 4, **_TINY}
    return FITImage(**(settings | options))


def _encoder(size: int, options: dict[str, Any]) -> FITImage:
    settings = {"layers": "(2)4(2)4(2)4", "size": size, "group": (10, 10), "patch": 16, "latents": 16, **_BASE}
    return FITImage(**(settings | {"grid": (10, 10)} | options))


@register
def fit_640(**options: Any) -> FITImage:
    """640 x 640 pixels: 16 groups of 100 patches of 16 x 16, 16 latents a group."""
    return _encoder(640, options)


@register
def fit_1280(**options: Any) -> FITImage:
    """1,280 x 1,280 pixels: 64 groups of 100 patches of 16 x 16, 16 latents a group."""
    return _encoder(1280, options)


@register
def fit_6400(**options: Any) -> FITImage:
    """6,400 x 6,400 pixels, 160,000 patches of 16 x 16 in 1,600 groups, 4 latents a group."""
    return _encoder(6400, {"latents": 4} | options)


@register
def fit_denoiser_tiny(**options: Any) -> FITDenoiser:
    """A denoiser of 32 x 32 pixels and 10 classes for tests and small machines."""
    settings = {"layers": "(1)2(1)", "size": 32, "group": (4, 4), "patch": 2, "latents": 4, "num_classes": 10, **_TINY}
    return FITDenoiser(**(settings | options))


@register
def fit_denoiser_64(**options: Any) -> FITDenoiser:
    """A denoiser of 64 x 64 pixels and 1,000 classes: 16 groups of 64 patches of 2 x 2."""
    settings: dict[str, Any] = {
        "layers": "(2)4(2)4(2)",
        "size": 64,
        "group": (8, 8),
        "patch": 2,
        "latents": 16,
        "num_classes": 1000,
    }
    return FITDenoiser(**(settings | _BASE | {"grid": (8, 8), "cross_mlp": True} | options))
