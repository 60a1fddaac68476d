"""How much of a model's attention is habit of position, and how well it foretells where readers look back.

Gao et al., 2023, arXiv 2310.19084. Attention and eye movements are matrices between words, ``n x n``, the word that is
looked from in rows, the one that is looked at in columns (`glocal.inspect.word_attention`, `glocal.inspect.Saccades`).
Of each sentence the lower triangle counts, its diagonal included: causal attention, regressions and refixations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = [
    "Resemblance",
    "TrivialFit",
    "fit_trivial",
    "human_resemblance",
    "noise_ceiling",
    "sentence_correlation",
    "trivial_patterns",
    "trivial_reliance",
]


def trivial_patterns(words: int) -> Float[Tensor, "3 n n"]:
    """What needs no reading: each word looks at itself, at the one before it, at the first one. Zeros and ones.

    Args:
        words: of the sentence.

    >>> trivial_patterns(3).int().tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [1, 0, 0], [1, 0, 0]]]
    """
    if words < 1:
        raise ValueError(f"words must be at least 1; it was {words}")
    found = torch.zeros(3, words, words, dtype=torch.float64)
    found[0].fill_diagonal_(1)
    found[1].diagonal(-1).fill_(1)
    found[2, :, 0] = 1
    return found


class _Line(NamedTuple):
    """Least squares with an intercept, for several targets at once."""

    slope: Tensor
    """``(K, T)``."""
    intercept: Tensor
    """``(T,)``."""
    rest: Tensor
    """``(M, T)``."""
    r2: Tensor
    """``(T,)``; NaN where there is nothing to explain."""


def _regress(x: Tensor, y: Tensor) -> _Line:
    """Columns of ``y (M, T)`` on those of ``x (M, K)``; of several solutions the shortest one."""
    x, y = x.double().cpu(), y.double().cpu()
    mean_x, mean_y = x.mean(0), y.mean(0)
    away = y - mean_y
    slope = torch.linalg.lstsq(x - mean_x, away, driver="gelsd").solution
    rest = away - (x - mean_x) @ slope
    total = away.square().sum(0)
    # The spread that rounding leaves of a constant.
    still = total <= len(y) * (torch.finfo(y.dtype).eps * y.abs().amax(0)).square()
    r2 = (1 - rest.square().sum(0) / total).masked_fill(still, torch.nan)
    return _Line(slope, mean_y - mean_x @ slope, rest, r2)


def _pairs(lengths: Tensor, count: int, whole: bool) -> Tensor:
    """Which pairs of words count, ``(B, n, n)``."""
    lengths = lengths.cpu()
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise ValueError(f"lengths must be integers (B,); it was {lengths.dtype} {tuple(lengths.shape)}")
    if not len(lengths) or int(lengths.min()) < 1 or int(lengths.max()) > count:
        raise ValueError(f"lengths must be of sentences of 1 to {count} words; they were {lengths.tolist()}")
    word = torch.arange(count)
    real = word < lengths[:, None]
    pairs = real[:, :, None] & real[:, None]
    return pairs if whole else pairs & (word[:, None] >= word)


def _columns(maps: Tensor, pairs: Tensor, name: str) -> Tensor:
    """``(B, H, n, n)`` to ``(M, H)``, sentence by sentence."""
    if maps.dim() != 4 or maps.shape[0] != len(pairs) or maps.shape[2:] != pairs.shape[1:]:
        raise ValueError(
            f"{name} must be (B, H, n, n) with B, n, n = {tuple(pairs.shape)}, as lengths and the other maps; it was "
            f"{tuple(maps.shape)}"
        )
    return maps.detach().cpu().movedim(1, -1)[pairs].double()


def _first(maps: Sequence[Tensor], name: str) -> Tensor:
    if not len(maps) or maps[0].dim() != 4:
        raise ValueError(f"{name} must be (B, H, n, n), one a layer; it was {[tuple(m.shape) for m in maps]}")
    return maps[0]


class TrivialFit(NamedTuple):
    """Maps as sums of the trivial patterns. Made by `fit_trivial`."""

    coefficients: Float[Tensor, "H 3"]
    """Of self, previous and start."""
    intercept: Float[Tensor, " H"]
    r2: Float[Tensor, " H"]
    """Share of the variance that they explain; NaN where there is none."""
    residual: Float[Tensor, "B H n n"]
    """What they leave, the effective part; zeros at pairs that do not count."""


def fit_trivial(maps: Float[Tensor, "B H n n"], lengths: Tensor, *, whole: bool = False) -> TrivialFit:
    """Least squares of each head on the trivial patterns and an intercept, over the word pairs of all sentences.

    Where the patterns cannot be told apart, as in sentences of one word, the shortest solution is taken.

    Args:
        maps: of one layer, or of readers in place of heads, ``(B, H, n, n)``.
        lengths: words of each sentence, ``(B,)``.
        whole: all pairs, not those of the lower triangle: for attention that is not causal.

    Returns:
        In float64, on the CPU.

    Raises:
        ValueError: maps and lengths that do not fit each other.

    >>> maps = 0.5 * trivial_patterns(6)[1] + 0.3 * trivial_patterns(6)[2]
    >>> found = fit_trivial(maps[None, None], torch.tensor([6]))
    >>> found.coefficients[0].abs().round(decimals=3).tolist(), round(float(found.r2), 6)
    ([0.0, 0.5, 0.3], 1.0)
    """
    pairs = _pairs(lengths, maps.shape[-1], whole)
    y = _columns(maps, pairs, "maps")
    patterns = trivial_patterns(maps.shape[-1]).expand(len(pairs), -1, -1, -1)
    found = _regress(_columns(patterns, pairs, "patterns"), y)
    residual = torch.zeros(*pairs.shape, y.shape[1], dtype=torch.float64)
    residual[pairs] = found.rest
    return TrivialFit(found.slope.mT, found.intercept, found.r2, residual.movedim(-1, 1))


def trivial_reliance(
    layers: Sequence[Float[Tensor, "B H n n"]], lengths: Tensor, *, whole: bool = False
) -> Float[Tensor, " layers"]:
    """How much attention is habit of position: the mean over heads of `TrivialFit.r2`, for each layer.

    Args:
        layers: maps, ``(B, H, n, n)`` each.
        lengths, whole: as in `fit_trivial`.

    >>> trivial_reliance([torch.eye(5).expand(2, 4, 5, 5)] * 2, torch.tensor([5, 3])).round(decimals=6).tolist()
    [1.0, 1.0]
    """
    _first(layers, "layers")
    return torch.stack([fit_trivial(maps, lengths, whole=whole).r2.nanmean() for maps in layers])


class Resemblance(NamedTuple):
    """How well heads foretell readers, ``(layers, S)``. Made by `human_resemblance`."""

    r2: Float[Tensor, "layers S"]
    """In the sample: it grows with the number of heads, so that it compares models with as many."""
    adjusted: Float[Tensor, "layers S"]
    """Less what as many heads of noise would explain: compares models with other numbers of heads."""

    @property
    def layer(self) -> int:
        """The best one, by the mean of ``r2`` over readers."""
        return int(self.r2.nanmean(1).argmax())

    @property
    def score(self) -> float:
        """The mean over readers of ``r2`` in the best layer; divided by `noise_ceiling`, the share of what can be."""
        return float(self.r2.nanmean(1).max())

    @property
    def adjusted_score(self) -> float:
        """The same of ``adjusted``, whose best layer may be another."""
        return float(self.adjusted.nanmean(1).max())


def human_resemblance(
    layers: Sequence[Float[Tensor, "B H n n"]],
    people: Float[Tensor, "S B n n"],
    lengths: Tensor,
    *,
    whole: bool = False,
) -> Resemblance:
    """Least squares of each reader's saccades on all heads of a layer.

    For the effective part alone, give `TrivialFit.residual` of both. For a test, pair two models' numbers by readers:
    ``scipy.stats.ttest_rel(a.r2[a.layer], b.r2[b.layer])``.

    Args:
        layers: maps, ``(B, H, n, n)`` each.
        people: counts or durations of saccades of each reader, ``(S, B, n, n)``.
        lengths, whole: as in `fit_trivial`.

    Returns:
        In float64, on the CPU; NaN for readers who never looked back, and for ``adjusted`` where there are too few
        pairs.

    Raises:
        ValueError: maps, readers and lengths that do not fit each other.

    >>> people = torch.rand(3, 2, 5, 5)
    >>> found = human_resemblance([people.transpose(0, 1), torch.rand(2, 4, 5, 5)], people, torch.tensor([5, 4]))
    >>> found.layer, round(found.score, 6)
    (0, 1.0)
    """
    pairs = _pairs(lengths, _first(layers, "layers").shape[-1], whole)
    y = _columns(
        people.transpose(0, 1) if people.dim() == 4 else people, pairs, "people, with the first two axes swapped,"
    )
    r2, adjusted = [], []
    for maps in layers:
        x = _columns(maps, pairs, "layers")
        free = len(x) - x.shape[1] - 1
        r2.append(_regress(x, y).r2)
        adjusted.append(1 - (1 - r2[-1]) * ((len(x) - 1) / free if free > 0 else torch.nan))
    return Resemblance(torch.stack(r2), torch.stack(adjusted))


def noise_ceiling(
    people: Float[Tensor, "S B n n"], lengths: Tensor, *, leave_out: bool = False, whole: bool = False
) -> Float[Tensor, " S"]:
    """How well the group's mean foretells each reader: what a model could reach.

    Args:
        people: as in `human_resemblance`.
        lengths, whole: as in `fit_trivial`.
        leave_out: the mean of the other readers. As published, the reader is part of the mean, which is optimistic.

    Returns:
        R2 of each reader, ``(S,)`` in float64; the ceiling is their mean.

    Raises:
        ValueError: as `human_resemblance`; one reader alone with ``leave_out``.

    >>> noise_ceiling(torch.rand(1, 2, 5, 5).expand(4, -1, -1, -1), torch.tensor([5, 4])).round(decimals=6).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    if people.dim() != 4 or len(people) < 1 + leave_out:
        raise ValueError(f"people must be (S, B, n, n), at least {1 + leave_out} of them; it was {tuple(people.shape)}")
    y = _columns(people.transpose(0, 1), _pairs(lengths, people.shape[-1], whole), "people")
    total, count = y.sum(1, keepdim=True), y.shape[1]
    means = (total - y) / (count - 1) if leave_out else (total / count).expand_as(y)
    return torch.cat([_regress(means[:, [s]], y[:, [s]]).r2 for s in range(count)])


def sentence_correlation(
    maps: Float[Tensor, "B H n n"],
    people: Float[Tensor, "B n n"],
    lengths: Tensor,
    *,
    over: Literal["mean", "max"] = "mean",
    shuffle: torch.Generator | None = None,
    whole: bool = False,
) -> Float[Tensor, " B"]:
    """The other measure: Pearson's r between one layer's heads taken together and saccades, sentence by sentence.

    Args:
        maps: of one layer, ``(B, H, n, n)``.
        people: of one reader or the group's mean, ``(B, n, n)``.
        lengths, whole: as in `fit_trivial`.
        over: how heads are taken together.
        shuffle: the control: puts a sentence's attention into a random order.

    Returns:
        ``(B,)`` in float64; NaN where either does not vary.

    Raises:
        ValueError: maps, saccades and lengths that do not fit each other, or another word for ``over``.

    >>> maps = torch.rand(2, 1, 5, 5)
    >>> sentence_correlation(maps, 2 * maps[:, 0] + 1, torch.tensor([5, 4])).round(decimals=6).tolist()
    [1.0, 1.0]
    """
    if over not in ("mean", "max"):
        raise ValueError(f"over must be 'mean' or 'max'; it was {over!r}")
    pairs = _pairs(lengths, maps.shape[-1], whole)
    heads = _columns(maps, pairs, "maps")
    x = heads.mean(1) if over == "mean" else heads.amax(1)
    y = _columns(people[:, None], pairs, "people, with an axis put in,")[:, 0]
    found = []
    for a, b in zip(x.split(pairs.sum((1, 2)).tolist()), y.split(pairs.sum((1, 2)).tolist()), strict=True):
        if shuffle is not None:
            a = a[torch.randperm(len(a), generator=shuffle)]
        a, b = a - a.mean(), b - b.mean()
        spread = a.norm() * b.norm()
        found.append((a @ b) / spread if spread > 0 else a.new_tensor(torch.nan))
    return torch.stack(found)
