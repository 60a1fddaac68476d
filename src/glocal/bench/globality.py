"""How many patches must be seen at once before they tell anything of the label.

The globality degree of Lotfi et al., 2024, arXiv 2410.08165, by two estimates: mutual information over all sets of
patches, for tiny pictures, and the accuracy of a model that sees a share of the patches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["Globality", "globality_degree", "hide_patches", "mutual_information", "visibility_curve"]


def mutual_information(codes: Tensor, labels: Tensor, chances: Tensor | None = None) -> float:
    """Of two variables, in nats, from counts.

    Args:
        codes, labels: integers ``(N,)``.
        chances: of each row, where rows are all cases there are, ``(N,)``: the information is then exact. Where None,
            rows are a sample, and the bias of the counts is taken off (Miller and Madow, 1955); that may end below 0.

    Raises:
        ValueError: shapes that do not fit each other.

    >>> bits = torch.tensor([0, 0, 1, 1])
    >>> round(mutual_information(bits, bits, torch.full((4,), 0.25)) / math.log(2), 6)
    1.0
    """
    if codes.dim() != 1 or codes.shape != labels.shape or (chances is not None and chances.shape != codes.shape):
        raise ValueError(
            f"codes, labels and chances must be of one length; they were {tuple(codes.shape)}, {tuple(labels.shape)}"
            + ("" if chances is None else f" and {tuple(chances.shape)}")
        )
    weights = torch.ones(len(codes), dtype=torch.float64) if chances is None else chances.double()
    weights = weights / weights.sum()
    x, y = (torch.unique(v, return_inverse=True)[1] for v in (codes, labels))
    joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.float64)
    joint.index_put_((x, y), weights, accumulate=True)
    found = sum(float(torch.special.entr(p).sum()) for p in (joint.sum(0), joint.sum(1)))
    found -= float(torch.special.entr(joint).sum())
    if chances is None:
        found += (sum(joint.shape) - int((joint > 0).sum()) - 1) / (2 * len(codes))
    return found


@dataclass(frozen=True)
class Globality:
    """What sets of patches tell of the label, by their size. Made by `globality_degree`.

    Args:
        information: of the set that tells most, in nats, of sizes 0 (the histogram alone), 1, 2 and so on.
        thresholds: what of it counts as nothing.
        patches: that set, for each size.
    """

    information: tuple[float, ...]
    thresholds: tuple[float, ...]
    patches: tuple[tuple[int, ...], ...]

    @property
    def degree(self) -> int | None:
        """The smallest size that tells something; None where none of those tried does."""
        sizes = zip(self.information, self.thresholds, strict=True)
        return next((k for k, (found, least) in enumerate(sizes) if found > least), None)


def globality_degree(
    patches: Tensor,
    labels: Tensor,
    most: int,
    *,
    chances: Tensor | None = None,
    shuffles: int = 199,
    level: float = 0.99,
    generator: torch.Generator | None = None,
) -> Globality:
    """Information of sets of patches, together with the histogram of all patches, about the label.

    All sets of up to ``most`` patches are tried, so that this is for few patches of few kinds: a sample must be large
    against the number of patterns that a set can show.

    Args:
        patches: what each patch shows, integers ``(N, P)``.
        labels: integers ``(N,)``.
        most: patches in a set, up to which to try.
        chances: of each row, where rows are all cases there are, ``(N,)``: information is then exact, and any above
            rounding counts.
        shuffles: of the labels; the threshold is the quantile ``level`` of the best set's information under them.
        generator: of the shuffles; seed 0 where None.

    Raises:
        ValueError: patches and labels that do not fit each other, or sets larger than there are patches.

    >>> from glocal.bench.cycles import every_cycle
    >>> tables, labels, chances = every_cycle(3)
    >>> globality_degree(tables, labels, 3, chances=chances).degree  # a triangle
    3
    """
    if patches.dim() != 2 or patches.is_floating_point() or labels.shape != patches.shape[:1]:
        raise ValueError(
            f"patches must be integers (N, P) and labels (N,); they were {patches.dtype} {tuple(patches.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not 0 <= most <= patches.shape[1]:
        raise ValueError(f"most must be from 0 to the {patches.shape[1]} patches; it was {most}")
    if shuffles < 1 or not 0 < level < 1:
        raise ValueError(f"shuffles must be at least 1 and level between 0 and 1; they were {shuffles} and {level}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    histogram = torch.unique(patches.sort(1).values, dim=0, return_inverse=True)[1]
    orders = [] if chances is not None else [torch.randperm(len(labels), generator=generator) for _ in range(shuffles)]
    best: list[tuple[float, tuple[int, ...]]] = []
    thresholds = []
    for size in range(most + 1):
        found: tuple[float, tuple[int, ...]] = -math.inf, ()
        by_chance = torch.full((max(1, len(orders)),), -torch.inf, dtype=torch.float64)
        for chosen in itertools.combinations(range(patches.shape[1]), size):
            shown = torch.cat([histogram[:, None], patches[:, list(chosen)]], 1)
            codes = torch.unique(shown, dim=0, return_inverse=True)[1]
            found = max(found, (mutual_information(codes, labels, chances), chosen))
            for n, order in enumerate(orders):
                by_chance[n] = max(float(by_chance[n]), mutual_information(codes, labels[order]))
        best.append(found)
        thresholds.append(1e-9 if chances is not None else float(by_chance.quantile(level)))
    information, sets = zip(*best, strict=True)
    return Globality(information, tuple(thresholds), sets)


def hide_patches(
    images: Float[Tensor, "B C H W"], share: float, patch: int, generator: torch.Generator, fill: float = 0.5
) -> Float[Tensor, "B C H W"]:
    """Leave a share of each picture's patches to be seen, others for each picture.

    Args:
        images: with sides that ``patch`` divides.
        share: of the patches that are seen, rounded to whole ones.
        patch: side of a patch, in pixels.
        generator: on the CPU.
        fill: what the others become.

    Raises:
        ValueError: a share out of range, or sides that ``patch`` does not divide.

    >>> hide_patches(torch.ones(1, 1, 4, 4), 0.5, 2, torch.Generator().manual_seed(0)).mean()
    tensor(0.7500)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1; it was {share}")
    if images.dim() != 4 or images.shape[-2] % patch or images.shape[-1] % patch:
        raise ValueError(f"images must be (B, C, H, W) with sides that {patch} divides; it was {tuple(images.shape)}")
    grid = images.shape[-2] // patch, images.shape[-1] // patch
    rank = torch.rand(len(images), grid[0] * grid[1], generator=generator).argsort(1).argsort(1)
    seen = (rank < round(share * rank.shape[1])).view(-1, 1, *grid)
    seen = seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(images.device)
    return images.where(seen, images.new_tensor(fill))


def visibility_curve(
    fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    shares: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 1.0),
    *,
    patch: int = 16,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Accuracy of a probe that is trained and tested on pictures of which a share of the patches is seen.

    Local tasks rise early; global ones stay at chance until nearly everything is seen.

    Args:
        fit: from pictures ``(N, C, H, W)`` and labels ``(N,)`` to a function from pictures to labels.
        train, test: pictures and labels.
        shares: of patches.
        patch, seed: of `hide_patches`.

    Returns:
        Share and accuracy on the test pictures, in the order of ``shares``.

    >>> x = torch.rand(100, 1, 4, 4)
    >>> rule = lambda x, y: lambda x: (x[:, 0, 0, 0] > 0.5).long()
    >>> visibility_curve(rule, (x, x), (x, (x[:, 0, 0, 0] > 0.5).long()), (1.0,), patch=2)
    [(1.0, 1.0)]
    """
    found = []
    for share in shares:
        draw = torch.Generator().manual_seed(seed)
        probe = fit(hide_patches(train[0], share, patch, draw), train[1])
        guessed = probe(hide_patches(test[0], share, patch, draw))
        found.append((share, float((guessed == test[1]).double().mean())))
    return found
