"""Do feature maps show wholes: closure, convexity, and grouping by nearness and likeness.

Pictures and read-outs after Li et al., 2025, arXiv 2506.00718; maps are ``(B, C, h, w)``, a vision transformer's patch
tokens put back in their grid.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from glocal.shapes import Bool, Float

__all__ = [
    "Closure",
    "Convexity",
    "Dots",
    "closure_figures",
    "closure_sensitivity",
    "convex_figures",
    "convexity_preference",
    "dot_grids",
    "grouping_ratio",
    "principal_maps",
]


class Closure(NamedTuple):
    """Kanizsa squares, and controls whose pac-men are turned outward; the border is the same.

    Args:
        figures, controls: ``(B, 1, size, size)``, black discs on white.
        inside, outside: points ``(B, 4, 2)``, rows and columns in pixels, beside the middle of each side.
    """

    figures: Float[Tensor, "B 1 S S"]
    controls: Float[Tensor, "B 1 S S"]
    inside: Float[Tensor, "B 4 2"]
    outside: Float[Tensor, "B 4 2"]


def closure_figures(count: int, size: int, generator: torch.Generator, *, reach: float | None = None) -> Closure:
    """Draw Kanizsa squares of random side and place.

    Args:
        count: how many.
        size: side of a picture, in pixels, at least 32.
        generator: on the CPU.
        reach: how far the points lie from the border; a sixteenth of the size where None.

    Raises:
        ValueError: no pictures, or too small ones.

    >>> drawn = closure_figures(2, 64, torch.Generator().manual_seed(0))
    >>> drawn.figures.shape, drawn.inside.shape
    (torch.Size([2, 1, 64, 64]), torch.Size([2, 4, 2]))
    """
    if count < 1 or size < 32:
        raise ValueError(f"count must be at least 1 and size at least 32; they were {count} and {size}")
    reach = size / 16 if reach is None else reach
    half = size * (0.2 + 0.05 * torch.rand(count, generator=generator))
    radius = 0.45 * half
    room = size / 2 - half - radius
    centre = size / 2 + (2 * torch.rand(count, 2, generator=generator) - 1) * room[:, None]
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    corners = centre[:, None] + half[:, None, None] * signs  # (B, 4, 2)
    at = torch.arange(size) + 0.5
    apart = [at.view(1, 1, -1) - corners[..., axis, None] for axis in (0, 1)]
    down, right = apart[0][..., :, None], apart[1][..., None, :]
    disc = down.square() + right.square() < radius.view(-1, 1, 1, 1).square()

    def picture(turn: int) -> Tensor:
        # The quarter of a disc that is cut out: towards the centre, or away from it.
        cut = (turn * signs[:, 0, None, None] * down < 0) & (turn * signs[:, 1, None, None] * right < 0)
        return 1 - (disc & ~cut).any(1, keepdim=True).float()

    sides = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    points = [centre[:, None] + (half[:, None, None] + way * reach) * sides for way in (-1, 1)]
    return Closure(picture(1), picture(-1), *points)


def closure_sensitivity(
    figure_maps: Float[Tensor, "B C h w"], control_maps: Float[Tensor, "B C h w"], drawn: Closure
) -> float:
    """d' of how alike features are on the two sides of an illusory border: above 0 where the border sets them apart.

    The similarity is the cosine of the features at the points inside and outside; d' is the controls' mean less the
    figures', over the root of their mean variance.

    Raises:
        ValueError: maps that are not of these pictures.

    >>> drawn = closure_figures(8, 64, torch.Generator().manual_seed(0))
    >>> maps = torch.rand(8, 5, 16, 16)
    >>> closure_sensitivity(maps, maps, drawn)
    0.0
    """
    count, size = len(drawn.figures), drawn.figures.shape[-1]
    if figure_maps.dim() != 4 or figure_maps.shape != control_maps.shape or len(figure_maps) != count:
        raise ValueError(
            f"figure_maps and control_maps must be ({count}, C, h, w) both; they were {tuple(figure_maps.shape)} and "
            f"{tuple(control_maps.shape)}"
        )
    alike = []
    for maps in (figure_maps.double(), control_maps.double()):
        inside, outside = _at(maps, drawn.inside, size), _at(maps, drawn.outside, size)
        alike.append(cosine_similarity(inside, outside, dim=-1).flatten())
    apart = alike[1].mean() - alike[0].mean()
    spread = ((alike[0].var() + alike[1].var()) / 2).sqrt()
    return float(apart / spread) if apart != 0 else 0.0


def _at(maps: Tensor, points: Tensor, size: int) -> Tensor:
    """Features ``(B, P, C)`` of the patches in which points lie."""
    scale = torch.tensor(maps.shape[-2:]) / size
    cells = (points * scale).long().clamp(min=0).to(maps.device)
    rows, columns = cells[..., 0].clamp(max=maps.shape[-2] - 1), cells[..., 1].clamp(max=maps.shape[-1] - 1)
    return maps[torch.arange(len(maps), device=maps.device)[:, None], :, rows, columns]


class Convexity(NamedTuple):
    """Pictures of two regions with a scalloped border; ``convex (B, S, S)`` is true on the side that bulges."""

    images: Float[Tensor, "B 1 S S"]
    convex: Bool[Tensor, "B S S"]


def convex_figures(count: int, size: int, generator: torch.Generator, *, bumps: int = 3) -> Convexity:
    """Draw two regions of like area, one with bumps into the other; which is black, and where, is random.

    Raises:
        ValueError: no pictures or bumps, or more than there are pixels for.

    >>> drawn = convex_figures(50, 48, torch.Generator().manual_seed(0))
    >>> 0.45 < float(drawn.convex.float().mean()) < 0.55
    True
    """
    if count < 1 or bumps < 1 or size < 4 * bumps:
        raise ValueError(f"count and bumps must be at least 1, size 4 bumps; they were {count}, {bumps} and {size}")
    at = (torch.arange(size) + 0.5) / size
    radius = 0.5 / bumps
    across = (at * bumps) % 1 / bumps - radius
    bulge = (radius**2 - across.square()).clamp(min=0).sqrt()
    # The border's mean stands in the middle: a half disc is pi / 4 of its square.
    border = 0.5 - math.pi / 4 * radius + bulge
    left = at[None] < border[:, None]  # (rows, columns), convex on the left
    turned = torch.stack([left, left.flip(1), left.mT, left.mT.flip(0)])
    convex = turned[torch.randint(4, (count,), generator=generator)]
    black = torch.rand(count, 1, 1, generator=generator) < 0.5
    return Convexity((convex ^ black).float()[:, None], convex)


def principal_maps(maps: Float[Tensor, "B C h w"], components: int = 3) -> Float[Tensor, "B K h w"]:
    """Principal components of each picture's features over places, in float64.

    The sign is such that the mean over the border of the map is not above 0, so that what stands out is positive.

    Raises:
        ValueError: other shapes, or more components than channels or places.

    >>> principal_maps(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """
    if maps.dim() != 4 or not 1 <= components <= min(maps.shape[1], maps.shape[2] * maps.shape[3]):
        raise ValueError(
            f"maps must be (B, C, h, w) with at least {components} channels and places; they were {tuple(maps.shape)}"
        )
    rows = maps.double().flatten(2).mT
    rows = rows - rows.mean(1, keepdim=True)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    found = (u * s[:, None])[..., :components].mT.unflatten(2, maps.shape[2:])
    border = torch.ones(maps.shape[2:], dtype=torch.bool, device=maps.device)
    border[1:-1, 1:-1] = False
    mean = found[..., border].mean(-1)
    out: Tensor = found * torch.where(mean > 0, -1.0, 1.0)[..., None, None]
    return out


def convexity_preference(maps: Float[Tensor, "B C h w"], convex: Bool[Tensor, "B S S"]) -> Tensor:
    """Share of the leading component's energy on the convex side, ``(B,)``: 1/2 where both stand out alike.

    Args:
        maps: ``(B, C, h, w)``.
        convex: as `convex_figures` gives it; a place belongs to the side of its middle.

    Raises:
        ValueError: sides that are not of these maps, or maps as `principal_maps` refuses them.

    >>> drawn = convex_figures(20, 48, torch.Generator().manual_seed(0))
    >>> noise = torch.randn(20, 1, 48, 48)
    >>> bool((convexity_preference(noise * drawn.convex[:, None], drawn.convex) > 0.9).all())
    True
    """
    if convex.dim() != 3 or len(convex) != len(maps) or convex.dtype != torch.bool:
        raise ValueError(f"convex must be booleans ({len(maps)}, S, S); it was {convex.dtype} {tuple(convex.shape)}")
    leading = principal_maps(maps, 1)[:, 0]
    rows, columns = (
        ((torch.arange(n, device=convex.device) + 0.5) * side / n).long()
        for n, side in zip(leading.shape[1:], convex.shape[1:], strict=True)
    )
    side = convex[:, rows][:, :, columns].to(leading.device)
    energy = leading.square()
    share: Tensor = (energy * side).sum((1, 2)) / energy.sum((1, 2))
    return share


class Dots(NamedTuple):
    """Grids of dots in two or more groups; ``places (P, 2)`` are their middles in pixels, ``groups (P,)`` theirs."""

    images: Float[Tensor, "B 1 S S"]
    places: Float[Tensor, "P 2"]
    groups: Tensor


def dot_grids(
    size: int = 64, *, by: Literal["proximity", "similarity"] = "proximity", side: int = 4, radius: float | None = None
) -> Dots:
    """Draw a grid of dots whose rows belong together in pairs: they are nearer, or of the same grey.

    Args:
        size: of the picture.
        by: what groups them.
        side: dots a side, even.
        radius: of a dot, in pixels; a fifth of the even spacing where None.

    Raises:
        ValueError: another rule, or an odd side.

    >>> dot_grids(by="similarity").groups.tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    if by not in ("proximity", "similarity"):
        raise ValueError(f"by must be 'proximity' or 'similarity'; it was {by!r}")
    if side < 4 or side % 2 or size < 4 * side:
        raise ValueError(f"side must be even, from 4 to size / 4; it was {side} for {size}")
    step = size / side
    radius = step / 5 if radius is None else radius
    even = (torch.arange(side) + 0.5) * step
    pair = torch.arange(side) // 2
    rows = even
    if by == "proximity":
        rows = even + torch.where(torch.arange(side) % 2 == 0, 0.2, -0.2) * step
    places = torch.cartesian_prod(rows, even)
    groups = pair.repeat_interleave(side)
    at = torch.arange(size) + 0.5
    apart = (at.view(1, -1, 1) - places[:, 0, None, None]).square() + (
        at.view(1, 1, -1) - places[:, 1, None, None]
    ).square()
    ink = torch.ones(len(places)) if by == "proximity" else torch.where(groups % 2 == 0, 1.0, 0.4)
    image = 1 - ((apart < radius**2) * ink[:, None, None]).amax(0)
    return Dots(image[None, None], places, groups)


def grouping_ratio(maps: Float[Tensor, "B C h w"], drawn: Dots) -> float:
    """Cosine of dots of one group over that of dots of different groups, means over pairs: above 1 where they group.

    Raises:
        ValueError: maps of another number of pictures, or dots of one group.

    >>> grouping_ratio(torch.ones(1, 3, 16, 16), dot_grids())
    1.0
    """
    if maps.dim() != 4 or len(maps) != len(drawn.images) or len(drawn.groups.unique()) < 2:
        raise ValueError(
            f"maps must be ({len(drawn.images)}, C, h, w), of dots in groups; they were {tuple(maps.shape)}"
        )
    features = _at(maps.double(), drawn.places.expand(len(maps), -1, -1), drawn.images.shape[-1])
    unit = torch.nn.functional.normalize(features, dim=-1)
    alike = (unit @ unit.mT).mean(0)
    same = (drawn.groups[:, None] == drawn.groups).to(alike.device)
    other = ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return float(alike[same & other].mean() / alike[~same].mean())
