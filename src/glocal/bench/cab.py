"""The Comprehensive Attention Benchmark's measures: four uses, one length at which a method pays, one index of quality.

Zhang et al., 2022, arXiv 2210.07661.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "COLUMNS",
    "LENGTHS",
    "SUPPORT",
    "Columns",
    "Efficiency",
    "compositional_index",
    "consistency",
    "efficiency_length",
    "is_causal",
    "middle_mean",
    "z_index",
]

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
"""At which the paper measures."""

SUPPORT = {
    "local": ("noncausal-self", "causal-self"),
    "abc": ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
    "nystrom": ("noncausal-self",),
    "performer": ("noncausal-self", "noncausal-cross", "causal-cross"),
    "lara": ("noncausal-self",),
    "cosformer": ("noncausal-self", "noncausal-cross"),
    "probsparse": ("noncausal-self",),
    "s4d": ("noncausal-self", "causal-self"),
    "longshort": ("noncausal-self", "causal-self"),
    "vanilla": ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross"),
}
"""The uses of the paper's methods, as its code registers them."""


@dataclass(frozen=True)
class Columns:
    """The metrics of one use.

    Args:
        names: of the metrics.
        mean, spread: of each over the paper's methods.
        better: ``+`` where more is better, ``-`` where less is, one sign a metric.
        tasks: name of each task, with how many of the metrics, in order, are its.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    better: str
    tasks: tuple[tuple[str, int], ...]


_ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
_LSTF = ("ETT MSE", "ETT MAE", "ECL MSE", "ECL MAE", "weather MSE", "weather MAE")
COLUMNS = {
    "noncausal-self": Columns(
        ("FastSpeech MCD", "FastSpeech MSD", "TTS MCD", "TTS MSD", *_ROUGE, "PSNR", "SSIM", "perplexity"),
        (3.4245, 1.97429, 4.06947, 2.19021, 34.88667, 6.79333, 31.96889, 23.208, 0.6758, 36.292),
        (0.06832, 0.0361768, 0.09422, 0.03866, 1.39697, 1.41078, 1.31499, 0.27499, 0.01557, 62.30827),
        "----+++++-",
        (("speech", 4), ("summaries", 3), ("super-resolution", 2), ("masked language", 1)),
    ),
    "causal-self": Columns(
        ("TTS MCD", "TTS MSD", *_ROUGE, "perplexity"),
        (4.08325, 2.20085, 32.9575, 6.0925, 30.2575, 22.26),
        (0.04529, 0.01372, 1.92754, 0.41007, 1.61951, 8.29944),
        "--+++-",
        (("speech", 2), ("summaries", 3), ("language", 1)),
    ),
    "noncausal-cross": Columns(
        ("Chamfer L1", "Chamfer L2", "F-score", *_LSTF),
        (7.7025, 0.24775, 0.7625, 1.18933, 0.80625, 0.47575, 0.511, 0.62025, 0.58075),
        (0.64789, 0.03366, 0.03906, 0.05615, 0.02193, 0.01057, 0.00601, 0.18948, 0.10312),
        "--+------",
        (("points", 3), ("series", 6)),
    ),
    "causal-cross": Columns(
        ("TTS MCD", "TTS MSD", *_ROUGE),
        (5.5037, 2.6278, 31.35, 5.26, 28.8),
        (1.29239, 0.42726, 3.77103, 1.26028, 3.28638),
        "--+++",
        (("speech", 2), ("summaries", 3)),
    ),
}
"""What the paper's index is computed from, by use."""


def compositional_index(use: str, scores: Sequence[float]) -> tuple[dict[str, float], float]:
    """How much better than the paper's methods on the whole: z-scores, their mean in each task, the mean over tasks.

    Args:
        use: of `COLUMNS`.
        scores: the metrics in the order of its names.

    Returns:
        The index of each task, and of the use.

    Raises:
        ValueError: another use, or another number of scores.

    >>> tasks, total = compositional_index("causal-cross", COLUMNS["causal-cross"].mean)
    >>> total
    0.0
    """
    if use not in COLUMNS:
        raise ValueError(f"use must be of {', '.join(COLUMNS)}; it was {use!r}")
    columns = COLUMNS[use]
    if len(scores) != len(columns.names):
        raise ValueError(f"scores must be {len(columns.names)}: {', '.join(columns.names)}; there were {len(scores)}")
    z = [
        (1 if sign == "+" else -1) * (score - mean) / spread
        for score, mean, spread, sign in zip(scores, columns.mean, columns.spread, columns.better, strict=True)
    ]
    found, at = {}, 0
    for name, count in columns.tasks:
        found[name] = sum(z[at : at + count]) / count
        at += count
    return found, sum(found.values()) / len(found)


def z_index(scores: Mapping[str, Mapping[str, float]], better: Mapping[str, str]) -> dict[str, float]:
    """The same index over methods of one's own: z-scores among them, the mean over the tasks that a method did.

    Args:
        scores: of each method, by task; a task that a method cannot do is left out.
        better: of each task, ``"+"`` where more is better, ``"-"`` where less is.

    Returns:
        Of each method; nan for one without a task. A task on which all are equal counts 0.

    >>> z_index({"a": {"t": 1.0}, "b": {"t": 3.0}}, {"t": "+"})
    {'a': -1.0, 'b': 1.0}
    """
    found: dict[str, list[float]] = {name: [] for name in scores}
    for task, sign in better.items():
        values = {name: mine[task] for name, mine in scores.items() if task in mine}
        if not values:
            continue
        mean = sum(values.values()) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / len(values))
        for name, value in values.items():
            found[name].append(0.0 if spread == 0 else (1 if sign == "+" else -1) * (value - mean) / spread)
    return {name: sum(z) / len(z) if z else math.nan for name, z in found.items()}


def consistency(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """How alike two uses order methods: Pearson's correlation of their indices over the methods that both have.

    Raises:
        ValueError: fewer than two in common.

    >>> consistency({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 0.0, "b": 1.0, "c": 3.0})
    1.0
    """
    shared = [name for name in one if name in other]
    if len(shared) < 2:
        raise ValueError(f"one and other must share at least two methods; they share {len(shared)}")
    pair = torch.tensor([[each[name] for name in shared] for each in (one, other)], dtype=torch.float64)
    return round(float(torch.corrcoef(pair)[0, 1]), 12)


@dataclass(frozen=True)
class Efficiency:
    """From which length on a method is cheaper.

    Args:
        length: None where the curves do not meet.
        vanilla, method: how much of the variance the fits explain.
    """

    length: float | None
    vanilla: float
    method: float


def efficiency_length(
    lengths: Sequence[int], vanilla: Sequence[float], method: Sequence[float], *, drop: int = 0
) -> Efficiency:
    """Where a line through a method's cost cuts the parabola through that of full attention.

    Args:
        lengths: at which both were measured.
        vanilla: time or memory of full attention, at least three.
        method: of the method.
        drop: how many of the shortest lengths the line leaves out; the paper leaves out one for time, none for memory.

    Raises:
        ValueError: lists of other lengths, or too few.

    >>> efficiency_length([1, 2, 3, 4], [n * n for n in (1, 2, 3, 4)], [3.0 * n for n in (1, 2, 3, 4)]).length
    3.0
    """
    if not len(lengths) == len(vanilla) == len(method) or len(lengths) < 3 or len(lengths) - drop < 2:
        raise ValueError(
            f"lengths, vanilla and method must be as many, at least 3 (2 after drop); they were {len(lengths)}, "
            f"{len(vanilla)}, {len(method)} with drop {drop}"
        )
    (a, b, c), curve = _fit(lengths, vanilla, 2)
    (slope, start), line = _fit(lengths[drop:], method[drop:], 1)
    inside = (b - slope) ** 2 - 4 * a * (c - start)
    if inside < 0 or a == 0:
        return Efficiency(None, curve, line)
    root = (-(b - slope) + math.sqrt(inside)) / (2 * a)
    return Efficiency(round(root, 9) if root > 0 else None, curve, line)


def _fit(x: Sequence[int], y: Sequence[float], degree: int) -> tuple[list[float], float]:
    """Coefficients by least squares, highest power first, and the share of the variance that they explain."""
    at, values = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    size = at.max()  # so that powers are of one size
    powers = torch.stack([(at / size) ** n for n in range(degree, -1, -1)], 1)
    found = torch.linalg.lstsq(powers, values[:, None], driver="gelsd").solution[:, 0]
    error = (powers @ found - values).square().sum()
    total = (values - values.mean()).square().sum()
    explained = 1.0 if float(total) == 0 else float(1 - error / total)
    return [float(each / size**n) for n, each in zip(range(degree, -1, -1), found, strict=True)], explained


def middle_mean(samples: Sequence[float]) -> float:
    """The mean of what lies from the first to the third quartile, as the paper takes of its repeats.

    >>> middle_mean([1.0, 2.0, 3.0, 4.0, 100.0])
    3.0
    """
    values = torch.tensor(samples, dtype=torch.float64)
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    return float(values[(values >= low) & (values <= high)].mean())


@torch.no_grad()
def is_causal(layer: Callable[[Tensor], Tensor], x: Tensor, *, tolerance: float = 1e-4) -> bool:
    """The paper's test of causality: outputs of shortened inputs are those of the whole, from the middle on.

    `glocal.inspect.verify` is stricter: it also perturbs, and looks at gradients.

    Args:
        layer: from ``(B, N, C)`` to ``(B, N, C')``; of cross-attention, with the keys bound.
        x: queries. A layer that raises an exception has not the use.
        tolerance: of the sum of absolute differences at a position.

    >>> ones = torch.ones(1, 6, 3)
    >>> is_causal(lambda x: x.cumsum(1), ones), is_causal(lambda x: x + x.sum(1, True), ones)
    (True, False)
    """
    try:
        whole = layer(x)
        return all(
            float((layer(x[:, : t + 1])[:, t] - whole[:, t]).abs().sum()) <= tolerance
            for t in range(x.shape[1] // 2, x.shape[1])
        )
    except Exception:  # whatever a layer raises where it has not this use
        return False
