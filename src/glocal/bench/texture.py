"""Pictures with the texture of another one: noise whose features have the same Gram matrices.

Gatys et al., 2015, arXiv 1505.07376; within a grid of regions, as the distortions of DiSRT, arXiv 2506.00718.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["RandomConvs", "gram_distance", "synthesise"]


class RandomConvs(nn.Module):
    """Convolutions that are drawn and never trained: enough for textures where no trained network is at hand.

    Each layer is a convolution over a padded input, ReLU, and, but for the last, a mean over 2 x 2.

    Args:
        channels: of pictures.
        layers: how many; the more, the larger the texture's scale.
        filters, size: of each convolution; ``size`` is odd.
        seed: of the filters.

    Raises:
        ValueError: an even size, or numbers below 1.

    >>> [tuple(maps.shape) for maps in RandomConvs(3, filters=8, size=5)(torch.rand(1, 3, 16, 16))]
    [(1, 8, 16, 16), (1, 8, 8, 8), (1, 8, 4, 4)]
    """

    def __init__(self, channels: int = 3, *, layers: int = 3, filters: int = 64, size: int = 11, seed: int = 0) -> None:
        super().__init__()
        if min(channels, layers, filters, size) < 1 or size % 2 == 0:
            raise ValueError(
                "channels, layers, filters and size must be at least 1, size odd; they were "
                f"{channels}, {layers}, {filters} and {size}"
            )
        draw = torch.Generator().manual_seed(seed)
        self.convs = nn.ModuleList()
        for number in range(layers):
            conv = nn.Conv2d(filters if number else channels, filters, size, padding=size // 2, bias=False)
            fan = conv.in_channels * size**2
            conv.weight = nn.Parameter(
                torch.randn(conv.weight.shape, generator=draw) * (2 / fan) ** 0.5, requires_grad=False
            )
            self.convs.append(conv)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Maps of each layer, ``(B, filters, h, w)``."""
        x, maps = images, list[Tensor]()
        for number, conv in enumerate(self.convs):
            x = conv(nn.functional.avg_pool2d(x, 2) if number else x).relu()
            maps.append(x)
        return maps


def gram_distance(
    maps: Sequence[Tensor], targets: Sequence[Tensor], *, grid: int = 1, weights: Sequence[float] | None = None
) -> Tensor:
    """How far textures are apart: ``sum_l w_l |G_l - T_l|^2 / (4 C^2 M^2)``, G the Gram matrices over M places.

    Args:
        maps, targets: of each layer, ``(B, C, h, w)``.
        grid: into so many regions a side maps are cut, each with a matrix of its own; what is left at the end of a side
            goes to the last ones.
        weights: of layers; 1 each where None.

    Returns:
        A number, the sum over layers, regions and pictures.

    Raises:
        ValueError: other numbers of layers or weights, or maps smaller than the grid.
    """
    given = [1.0] * len(maps) if weights is None else list(weights)
    if len(maps) != len(targets) or len(given) != len(maps) or not maps:
        raise ValueError(
            f"maps, targets and weights must be one a layer; they were {len(maps)}, {len(targets)} and {len(given)}"
        )
    if grid < 1 or any(min(layer.shape[-2:]) < grid for layer in targets):
        raise ValueError(f"grid must be from 1 to the side of the smallest map; it was {grid}")
    total = maps[0].new_zeros(())
    for found, wanted, weight in zip(maps, targets, given, strict=True):
        for region, target in zip(_regions(found, grid), _regions(wanted, grid), strict=True):
            channels, places = region.shape[1:]
            apart = region @ region.mT - target @ target.mT
            total = total + weight * apart.square().sum() / (4 * channels**2 * places**2)
    return total


def _regions(maps: Tensor, grid: int) -> list[Tensor]:
    """``(B, C, M)`` of each."""
    return [part.flatten(2) for row in maps.tensor_split(grid, -2) for part in row.tensor_split(grid, -1)]


def synthesise(
    images: Float[Tensor, "B C H W"],
    generator: torch.Generator,
    *,
    features: Callable[[Tensor], Sequence[Tensor]] | None = None,
    depth: int | None = None,
    grid: int = 1,
    steps: int = 200,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "B C H W"]:
    """Noise that is given a picture's texture by L-BFGS: its local statistics, another arrangement.

    Args:
        images: ``(B, C, H, W)``, values from 0 to 1; each is treated alone.
        generator: draws the noise, on the CPU.
        features: maps of the layers whose Gram matrices are to agree; `RandomConvs` where None. A trained network gives
            better textures.
        depth: how many of the first layers count; all where None.
        grid: as in `gram_distance`: 1 keeps nothing of the arrangement, 4 much.
        steps: of L-BFGS, at most.
        weights: of layers.

    Raises:
        ValueError: no steps or layers, or as in `gram_distance`.

    >>> image = torch.rand(1, 3, 16, 16)
    >>> synthesise(image, torch.Generator().manual_seed(0), features=RandomConvs(filters=8, size=3), steps=3).shape
    torch.Size([1, 3, 16, 16])
    """
    if images.dim() != 4 or steps < 1 or (depth is not None and depth < 1):
        raise ValueError(
            f"images must be (B, C, H, W), steps and depth at least 1; they were {tuple(images.shape)}, {steps} and "
            f"{depth}"
        )
    net = RandomConvs(images.shape[1]).to(images.device, images.dtype) if features is None else features
    out = []
    for image in images.detach().split(1):
        with torch.no_grad():
            targets = net(image)[:depth]
        noise = torch.rand(image.shape, generator=generator).to(image)
        out.append(_match(noise, net, targets, depth, grid, steps, weights))
    return torch.cat(out)


def _match(
    noise: Tensor,
    net: Callable[[Tensor], Sequence[Tensor]],
    targets: Sequence[Tensor],
    depth: int | None,
    grid: int,
    steps: int,
    weights: Sequence[float] | None,
) -> Tensor:
    x = noise.requires_grad_()
    # The distance starts at 1, whatever the features' unit, so that stopping rules mean the same.
    start = gram_distance(net(x)[:depth], targets, grid=grid, weights=weights).detach().clamp(min=1e-30)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gram_distance(net(x)[:depth], targets, grid=grid, weights=weights) / start
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return x.detach().clamp(0, 1)
