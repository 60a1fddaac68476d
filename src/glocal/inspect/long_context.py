"""Which heads need far keys, for which queries: told from near keys and two moments of the far ones, and from all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.places import Operator, Place, intercept
from glocal.inspect.recording import LayerRecord, Record
from glocal.patterns import Causal, Choose, Full, Keys, Pattern, Sinks, Sliding, parse

__all__ = ["FarMass", "KeyMoments", "LocalReport", "adaptive_heads", "far_mass", "far_moments", "local_report"]


@dataclass(frozen=True)
class KeyMoments:
    """Mean and covariance of keys, in float64.

    Args:
        mean: ``(Hkv, D)``, or ``(B, Hkv, D)`` of each sequence.
        covariance: ``(Hkv, D, D)``, or with a batch; divided by the number of keys.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Self:
        """Of keys ``(..., Hkv, T, D)``."""
        keys = keys.double()
        mean = keys.mean(-2)
        apart = keys - mean[..., None, :]
        return cls(mean, apart.mT @ apart / keys.shape[-2])

    def log_mass(self, q: Tensor, count: Tensor, scale: float) -> Tensor:
        """What the log-sum-exp of ``count`` keys' scores is, were these Gaussian, ``(B, H, R)``.

        Args:
            q: ``(B, H, R, D)``.
            count: how many keys each query has, ``(R,)``; minus infinity where none.
            scale: of the scores.
        """
        q = q.double() * scale
        mean, covariance = (t if t.dim() == n else t[None] for t, n in ((self.mean, 3), (self.covariance, 4)))
        group = q.shape[1] // mean.shape[1]
        mean, covariance = mean.repeat_interleave(group, 1), covariance.repeat_interleave(group, 1)
        middle = (q @ mean[..., None])[..., 0]
        return count.double().log() + middle + ((q @ covariance) * q).sum(-1) / 2


class FarMass(NamedTuple):
    """Of a layer's queries, how much more weight near keys have than far ones, as a difference of logarithms.

    Args:
        ratio: from all keys, ``(B, H, N)`` in float64; infinite where no key is far.
        estimate: from near keys and moments, likewise.
        far: how many keys are far, ``(N,)``.
    """

    ratio: Tensor
    estimate: Tensor
    far: Tensor

    def local(self, tau: float = 0.6, *, estimated: bool = False) -> Tensor:
        """Whether near keys have a share of ``tau`` of the weight at least, booleans ``(B, H, N)``."""
        return (self.estimate if estimated else self.ratio) >= _log_odds(tau)


def far_moments(record: Record, *, sinks: int = 16, window: int = 1024) -> list[KeyMoments]:
    """Moments of far keys, of each layer and key head, from prompts that are like those to come in length.

    Args:
        record: with attention, of one batch of prompts; natural text, or random words.
        sinks: keys at the beginning that are not counted.
        window: keys at the end that are not.

    Raises:
        ValueError: prompts without far keys, or with padding.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> found = far_moments(record(Attention(8, 2, causal=True), torch.randn(3, 20, 8)), sinks=1, window=4)
    >>> found[0].covariance.shape
    torch.Size([2, 4, 4])
    """
    found = []
    for layer in record:
        _check(layer, sinks, window)
        far = layer.k[:, :, sinks : layer.keys - window]
        if not far.shape[2]:
            raise ValueError(f"sinks {sinks} and window {window} leave no far keys in {layer.keys} tokens")
        found.append(KeyMoments.of(far.movedim(1, 0).flatten(1, 2)))
    return found


@torch.no_grad()
def far_mass(
    record: Record, *, sinks: int = 16, window: int = 1024, moments: Sequence[KeyMoments] | None = None
) -> list[FarMass]:
    """How much weight each head's queries give to far keys, and what is estimated without reading these.

    Far keys' scores are taken for Gaussian: their log-sum-exp is then known from the keys' mean and covariance. A heavy
    upper tail, as of a needle that is found, makes it too low (Donhauser et al., 2025, arXiv 2502.09647).

    Args:
        record: with attention, of causal self-attention without padding.
        sinks: keys at the beginning that are near to all queries.
        window: keys before a query that are near, with its own.
        moments: of far keys, a layer each, of `far_moments`; where None, of each query's own far keys, as running sums
            give them.

    Returns:
        A `FarMass` for each layer.

    Raises:
        ValueError: padding, cross-attention, scores with a bias or a cap.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> layer = Attention(8, 2, causal=True, scale=0.0)
    >>> (found,) = far_mass(record(layer, torch.randn(1, 10, 8)), sinks=1, window=3)
    >>> found.ratio[0, 0, -1].exp().item(), found.estimate[0, 0, -1].exp().item()  # 4 keys near, 6 far
    (0.666..., 0.666...)
    """
    found = []
    for number, layer in enumerate(record):
        _check(layer, sinks, window)
        q, k, near = layer.q.double(), layer.k.double(), _near(sinks, window)
        ours, far = (
            attend(q, k, k, where, scale=layer.scale, return_lse=True)[1]
            for where in (Causal() & near, Causal() & ~near)
        )
        estimate = _estimate(q, k, layer.scale, sinks, window, None if moments is None else moments[number])
        count = _far(layer.queries, layer.keys, sinks, window, q.device)
        found.append(FarMass(ours - far, ours - estimate, count))
    return found


class LocalReport(NamedTuple):
    """How well it was told which pairs of head and query need no far keys; of pairs that have some.

    Args:
        sparsity: the share that is taken for local.
        agreement: the share that is told rightly.
        majority: what always telling the commoner one would give.
        recall: of the pairs that need far keys, the share that is told: those that are missed cost most.
        precision: of those taken for such pairs, the share that are.
    """

    sparsity: float
    agreement: float
    majority: float
    recall: float
    precision: float


def local_report(local: Sequence[Tensor], taken: Sequence[Tensor], mass: Sequence[FarMass]) -> LocalReport:
    """Counts of what is told against what is, over layers.

    Args:
        local: what is, of each layer booleans ``(B, H, N)``: `FarMass.local`.
        taken: what is told, likewise; or fixed by head, ``(H, 1)``.
        mass: of `far_mass`, for which queries have far keys.
    """
    true, told = (
        torch.cat([t.expand_as(each.ratio)[..., each.far > 0].flatten() for t, each in zip(labels, mass, strict=True)])
        for labels in (local, taken)
    )
    both = (~true & ~told).sum()
    share = float(true.double().mean())
    return LocalReport(
        float(told.double().mean()),
        float((true == told).double().mean()),
        max(share, 1 - share),
        float(both / (~true).sum()),
        float(both / (~told).sum()),
    )


@contextmanager
def adaptive_heads(
    model: nn.Module,
    moments: Sequence[KeyMoments] | None = None,
    *,
    sinks: int = 16,
    window: int = 1024,
    tau: float = 0.6,
) -> Iterator[list[Place]]:
    """Let heads read far keys only for queries whose near keys seem not to be enough, until the block ends.

    Args:
        model: as for `intercept`; causal, with plain scores.
        moments: of far keys, a layer each; where None, those of the sequence that is read, at each call.
        sinks, window: near keys, as in `far_mass`.
        tau: the share of the weight at which near keys are enough.

    Yields:
        The layers, in the order of their numbers.

    Raises:
        TypeError, ValueError: as `intercept`; sizes out of range; when it runs, padding, or scores that are not plain.

    >>> from glocal.nn import Attention
    >>> layer, x = Attention(8, 2, causal=True), torch.randn(1, 10, 8)
    >>> with adaptive_heads(layer, sinks=1, window=10):  # no key is far
    ...     torch.equal(layer(x), layer(x))
    True
    """
    _sizes(sinks, window)
    _log_odds(tau)
    numbers: dict[str, int] = {}

    def make(place: Place) -> Operator:
        number = numbers.setdefault(place.name, len(numbers))

        def compute(q: Tensor, k: Tensor, v: Tensor, where: Pattern | str = Full(), **options: Any) -> Any:  # noqa: B008
            where = parse(where) if isinstance(where, str) else where
            if any(isinstance(node, Keys) and not bool(node.real.all()) for node in where.walk()):
                raise ValueError(f"inputs must be without padding, of one length; those of {place.name!r} had some")
            if options.get("bias") is not None or options.get("softcap"):
                raise ValueError(f"model must have plain scores; those of {place.name!r} have a bias or a cap")
            if k.shape[2] <= sinks + window:
                return attend(q, k, v, where, **options)
            scale = options.get("scale")
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            near = _near(sinks, window)
            ours = attend(q, k, k, where & near, scale=scale, return_lse=True)[1]
            estimate = _estimate(q, k, scale, sinks, window, None if moments is None else moments[number])
            local = ours.double() - estimate >= _log_odds(tau)
            return attend(q, k, v, where & Choose(local, near, Full()), **options)

        return compute

    with intercept(model, make) as places:
        yield places


def _near(sinks: int, window: int) -> Pattern:
    return Sliding(window - 1, 0) | Sinks(sinks)


def _far(queries: int, keys: int, sinks: int, window: int, device: torch.device) -> Tensor:
    """How many keys are far from each query, ``(Nq,)``; queries are the last ones."""
    at = torch.arange(keys - queries, keys, device=device)
    return (at + 1 - window - sinks).clamp(min=0)


def _estimate(q: Tensor, k: Tensor, scale: float, sinks: int, window: int, moments: KeyMoments | None) -> Tensor:
    """The log-sum-exp of far keys' scores, ``(B, H, Nq)`` in float64, by moments that are given or of these keys."""
    count = _far(q.shape[2], k.shape[2], sinks, window, q.device)
    if moments is not None:
        return moments.log_mass(q, count, scale)
    k = k.double()
    centre = k.mean(2, keepdim=True)  # taken off, so that the running sums lose no digits
    k, steps = k - centre, []
    start = int(count[0])
    kept = k[:, :, sinks : sinks + start]
    total, squares = kept.sum(2), kept.mT @ kept
    for n, many in enumerate(count.tolist()):
        if many > start:
            new = k[:, :, sinks + many - 1]
            total, squares, start = total + new, squares + new[..., None] * new[..., None, :], many
        mean = total / max(many, 1)
        own = KeyMoments(mean + centre[:, :, 0], squares / max(many, 1) - mean[..., None] * mean[..., None, :])
        steps.append(own.log_mass(q[:, :, n : n + 1], count[n : n + 1], scale))
    return torch.cat(steps, 2)


def _check(layer: LayerRecord, sinks: int, window: int) -> None:
    _sizes(sinks, window)
    if layer.cross or len(layer.grid_q) > 1 or layer.queries != layer.keys:
        raise ValueError(f"record must be of causal self-attention over one sequence; {layer.name!r} is not")
    if layer.real is not None and not bool(layer.real.all()):
        raise ValueError("record must be of inputs without padding, of one length")
    if layer.softcap or {"bias", "table"} & set(layer.tensors):
        raise ValueError(f"record must be of plain scores; those of {layer.name!r} have a bias or a cap")


def _sizes(sinks: int, window: int) -> None:
    if sinks < 0 or window < 1:
        raise ValueError(f"sinks must be at least 0 and window at least 1; they were {sinks} and {window}")


def _log_odds(tau: float) -> float:
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1; it was {tau}")
    return math.log(tau / (1 - tau))
