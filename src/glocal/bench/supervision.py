"""Losses that teach a model's attention where people look, all with a gradient.

The ways that the survey of Cartella et al., 2024, arXiv 2402.18673, collects: an attention map is compared with the
people's as a distribution, a picture, or at the fixations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from glocal.bench.saliency import correlation, divergence, normalised_scanpath, shares
from glocal.shapes import Bool, Float

__all__ = ["SUPERVISIONS", "attention_map", "log_error", "supervision_loss"]


def log_error(
    found: Float[Tensor, "*lead H W"], wanted: Float[Tensor, "*lead H W"], *, floor: float = 1e-3
) -> Float[Tensor, "*lead"]:
    """Mean squared error of the logs of two maps, each over its mean.

    Args:
        found, wanted: ``(..., H, W)``, not below 0.
        floor: added before the log, so that pixels without any weight count as this share of the mean.

    >>> import torch
    >>> float(log_error(torch.ones(2, 2), 3 * torch.ones(2, 2)))
    0.0
    """
    if found.shape != wanted.shape:
        raise ValueError(f"found must have the shape of wanted, {tuple(wanted.shape)}; it was {tuple(found.shape)}")
    p, g = ((shares(t.double().flatten(-2)) * t.shape[-2:].numel() + floor).log() for t in (found, wanted))
    return (p - g).square().mean(-1).to(found.dtype)


SUPERVISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divergence": divergence,
    "correlation": lambda found, wanted: 1 - correlation(found, wanted),
    "scanpath": lambda found, fixations: -normalised_scanpath(found, fixations),
    "log_error": log_error,
}
"""Losses by name; ``scanpath`` takes fixations, the others a density. A constant map has no gradient in ``correlation``
and ``scanpath``."""


def attention_map(
    weights: Float[Tensor, "B H Nq Nk"],
    grid: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    heads: Sequence[int] | None = None,
    skip: int = 0,
) -> Float[Tensor, "B h w"]:
    """Where attention lies on the image: the mean over heads and queries, on the patch grid, enlarged.

    Args:
        weights: of queries on keys, ``(B, H, Nq, Nk)``; give the class token's alone as ``weights[:, :, :1]``.
        grid: rows and columns of patches.
        size: rows and columns of the result, bilinear; those of ``grid`` where None.
        heads: which to average; all where None.
        skip: keys before the patches, as class tokens and registers.

    Raises:
        ValueError: keys that are not ``skip`` and the grid.

    >>> import torch
    >>> attention_map(torch.rand(2, 3, 1, 17), (4, 4), (8, 8), skip=1).shape
    torch.Size([2, 8, 8])
    """
    if weights.dim() != 4 or weights.shape[-1] != skip + grid[0] * grid[1]:
        wanted = f"(B, H, Nq, {skip} + {grid[0]} * {grid[1]})"
        raise ValueError(f"weights must be {wanted} for skip and grid; it was {tuple(weights.shape)}")
    chosen = weights if heads is None else weights[:, list(heads)]
    flat = chosen[..., skip:].mean((1, 2)).unflatten(-1, grid)
    return flat if size is None else interpolate(flat[:, None], size, mode="bilinear")[:, 0]


def supervision_loss(
    found: Float[Tensor, "B H W"],
    wanted: Float[Tensor, "B H W"] | Bool[Tensor, "B H W"],
    kind: str = "divergence",
) -> Float[Tensor, ""]:
    """Mean over the batch of one loss of attention maps against people's maps.

    Args:
        found: attention, ``(B, H, W)``, as `attention_map` gives it.
        wanted: density of people's fixations, or the fixations, above 0, for ``"scanpath"``.
        kind: of `SUPERVISIONS`: ``"divergence"`` (Kullback-Leibler, people's map first), ``"correlation"`` (1 - CC),
            ``"scanpath"`` (-NSS) or ``"log_error"``.

    Raises:
        ValueError: another kind.

    >>> import torch
    >>> looked = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> round(supervision_loss(torch.ones(1, 2, 2), looked).item(), 4)  # ln 4
    1.3863
    """
    if kind not in SUPERVISIONS:
        raise ValueError(f"kind must be one of {', '.join(SUPERVISIONS)}; it was {kind!r}")
    return SUPERVISIONS[kind](found, wanted).mean()
