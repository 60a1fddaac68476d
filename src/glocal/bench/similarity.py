"""How alike two sets of features are, and how often they agree with people on the odd one out of three objects."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.similarity import check_triplets, cosines, in_float, pair_products

__all__ = ["neighbourhood_overlap", "object_folds", "odd_one_out_accuracy", "representational_similarity"]


def object_folds(triplets: Tensor, folds: int = 4, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Splits of triplets ``(T, 3)`` by objects: to train, and to test, each time with other objects held out.

    The objects are dealt into ``folds``. What is held out are the triplets of one fold's objects only, to train are
    those without any of them; a triplet with objects of both is in neither. The authors use the first split.

    Raises:
        ValueError: triplets that are none; folds below 2.
    """
    check_triplets(triplets)
    if folds < 2:
        raise ValueError(f"folds must be at least 2; it was {folds}")
    objects, places = triplets.unique(return_inverse=True)
    order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(seed)).to(triplets.device)
    fold = (order % folds)[places]
    return [(triplets[(fold != n).all(1)], triplets[(fold == n).all(1)]) for n in range(folds)]


@torch.no_grad()
def odd_one_out_accuracy(x: Tensor, triplets: Tensor) -> float:
    """Share of triplets whose first two have the greatest dot product; ties are wrong.

    Shapes and errors as for `glocal.steer.similarity.odd_one_out_loss`. For cosines give rows of length 1.
    """
    scores = pair_products(x, triplets)
    return float((scores[:, 0] > scores[:, 1:].amax(1)).double().mean())


@torch.no_grad()
def neighbourhood_overlap(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Share of the ``k`` nearest neighbours by cosine that rows have in common in ``x (M, C)`` and ``y (M, D)``.

    Raises:
        ValueError: rows of different numbers, or not more than ``k`` of them.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not 0 < k < len(x):
        raise ValueError(
            f"x and y must be (M, C) and (M, D), M above k = {k} > 0; they were {tuple(x.shape)}, {tuple(y.shape)}"
        )
    near = [cosines(in_float(each)).fill_diagonal_(-math.inf).topk(k, dim=1).indices for each in (x, y)]
    return float((near[0][:, :, None] == near[1][:, None, :].to(x.device)).any(2).double().mean())


@torch.no_grad()
def representational_similarity(
    x: Tensor, y: Tensor, *, similarity: Literal["correlation", "cosine", "dot", "given"] = "correlation"
) -> float:
    """Spearman's rank correlation of what is alike in two sets of features: representational similarity analysis.

    Args:
        x: ``(M, C)``.
        y: ``(M, D)``, of the same objects.
        similarity: of two rows; ``given`` where both are matrices ``(M, M)`` of similarities already, of which the
            upper triangles count.

    Raises:
        ValueError: rows of different numbers, or fewer than three; another similarity.
    """
    if similarity not in ("correlation", "cosine", "dot", "given"):
        raise ValueError(f"similarity must be 'correlation', 'cosine', 'dot' or 'given'; it was {similarity!r}")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"x and y must be (M, C) and (M, D), M at least 3; they were {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if similarity == "given" and not (x.shape == y.shape == (len(x), len(x))):
        raise ValueError(f"given similarities must be (M, M); they were {tuple(x.shape)} and {tuple(y.shape)}")
    ranks = []
    for each in (x.double(), y.double().to(x.device)):
        if similarity == "correlation":
            each = each - each.mean(1, keepdim=True)
        if similarity != "given":
            each = each @ each.T if similarity == "dot" else cosines(each)
        values = each[torch.triu(torch.ones_like(each, dtype=torch.bool), 1)]
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        rank = (count.cumsum(0) - (count.double() - 1) / 2)[place]  # ties share their mean rank
        ranks.append(rank - rank.mean())
    return float(F.cosine_similarity(ranks[0], ranks[1], dim=0))
