"""The numbers beside a picture of a pattern: live pairs, share, FLOPs, keys per query; none of them needs the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import Pattern
from glocal.patterns.boxes import Box, BoxForm, Grid, NoBoxForm

_ROW_PAIRS = 1 << 29  # pairs looked at for keys per query where boxes cannot tell


@dataclass(frozen=True)
class Facts:
    """What a pattern costs and how evenly it is spread.

    ``pairs`` counts live pairs over the pattern's own heads and batch; ``share`` is of full attention; ``flops`` is one
    forward pass, ``2 * pairs * (D + Dv)`` for each head and batch element; ``fewest``, ``mean``, ``most`` are keys per
    query; ``empty`` the queries that see nothing; ``boxes`` is None where there is no box form, ``why`` says why.
    Where reading all queries was too much, ``counted`` is how many the spread was read from (else None), and
    ``estimated`` says whether ``pairs``, ``share`` and ``flops`` had to be inferred from these.
    """

    pairs: int
    share: float
    flops: int
    fewest: int
    mean: float
    most: int
    empty: int
    boxes: int | None
    why: str = ""
    counted: int | None = None
    estimated: bool = False


def facts(
    pattern: Pattern,
    grid: int | Sequence[int],
    keys: int | Sequence[int] | None = None,
    *,
    heads: int | None = None,
    head_dim: int = 64,
    batch: int | None = None,
) -> Facts:
    """Live pairs, cost and keys per query, without the mask.

    ``heads`` and ``batch`` are the pattern's own by default, 1 where it has none; ValueError where they disagree.

    >>> from glocal import Window
    >>> found = facts(Window((7, 7), dilation=2), (28, 28))
    >>> found.pairs, round(found.share, 4), found.flops, found.fewest, found.most
    (38416, 0.0625, 9834496, 49, 49)
    """
    gq, gk = pattern.check(grid, keys)
    own = pattern.lead(gq, gk)
    own_batch, own_heads = (1, 1, *own)[-2:]
    for name, given, has in (("heads", heads, own_heads), ("batch", batch, own_batch)):
        if given is not None and (given < 1 or (has > 1 and given != has)):
            right = f"{has}, as the pattern has" if has > 1 else "at least 1"
            raise ValueError(f"{name} must be {right}; it was {given}")
    lead, queries = math.prod(own), math.prod(gq)
    form, why = None, ""
    try:
        form = pattern.boxes(gq, gk)
    except NoBoxForm as error:
        why = str(error)
    spread, counted = _spread(pattern, form, gq, gk, lead)
    pairs = None if form is None else form.count()
    estimated = pairs is None and counted is not None
    if pairs is None:
        pairs = int(spread.sum()) if counted is None else round(float(spread.double().mean()) * queries * lead)
    times = (heads or own_heads) * (batch or own_batch)
    rows, full = max(1, queries * lead), max(1, queries * lead * math.prod(gk))
    few, most = (int(spread.min()), int(spread.max())) if spread.numel() else (0, 0)
    return Facts(
        pairs=pairs,
        share=pairs / full,
        flops=2 * pairs * times // max(1, lead) * 2 * head_dim,
        fewest=few,
        mean=pairs / rows,
        most=most,
        empty=int((spread == 0).sum()),
        boxes=None if form is None else len(form),
        why=why,
        counted=counted,
        estimated=estimated,
    )


def _spread(pattern: Pattern, form: BoxForm | None, gq: Grid, gk: Grid, lead: int) -> tuple[Tensor, int | None]:
    """Keys per query, and how many queries that is where it is not all."""
    queries = math.prod(gq)
    found = None if form is None else _counts(form, 1 << 28)
    if found is not None:
        return found, None
    row = max(1, lead * math.prod(gk))
    some = min(queries, max(64, _ROW_PAIRS // row))
    picked = torch.arange(some, device=pattern.device()) * queries // max(1, some)
    parts = [pattern.rows(p, gq, gk).sum(-1) for p in picked.split(max(1, (1 << 24) // row))]
    return torch.cat(parts, dim=-1), (None if some == queries else some)


def _counts(form: BoxForm, work: int) -> Tensor | None:
    """Keys per query ``(*lead, Nq)`` by inclusion and exclusion of boxes, or None where that takes too long."""
    shape = (*form.lead, math.prod(form.grid_q))
    terms = max(1, min(4096, work // max(1, math.prod(shape))))
    if math.prod(shape) > work:
        return None
    total = torch.zeros(shape, dtype=torch.long)
    for done, (box, sign) in enumerate(_overlaps(form)):
        if done >= terms or box.blocks is not None or box.keys is not None:
            return None
        counts = box.axes[0].counts()
        for axis in box.axes[1:]:
            more = axis.counts()
            counts = (counts.unsqueeze(-1) * more.unsqueeze(-2)).flatten(-2)
        total += sign * (counts if box.rows is None else counts * box.rows)
    return total


def _overlaps(form: BoxForm) -> Iterator[tuple[Box, int]]:
    """Every box, every overlap of two, of three, ... that is not empty, with its sign."""
    stack = [(box, n, 1) for n, box in enumerate(form)]
    while stack:
        box, last, sign = stack.pop()
        yield box, sign
        if box.blocks is None:
            more = [(box.intersect(form.boxes[n], form.grid_k), n) for n in range(last + 1, len(form))]
            stack += [(both, n, -sign) for both, n in more if not both.empty()]
