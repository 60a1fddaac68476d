"""What heads do: the taxonomy of their functions, and the scores by which some of them are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glocal.inspect.metrics import measure
from glocal.inspect.recording import LayerRecord, Record, Tile

__all__ = [
    "HEAD_FUNCTIONS",
    "STAGES",
    "TARGETS",
    "HeadFunction",
    "MassOn",
    "Targets",
    "detect",
    "matches",
    "negative_attention",
    "offset",
    "rare",
    "retrieval_score",
]

STAGES = {
    "KR": "knowledge recalling, in the first and middle layers",
    "ICI": "in-context identification, in the first and middle layers",
    "LR": "latent reasoning, in the middle layers",
    "EP": "expression preparation, in the last layers",
}
"""Stages of what heads do (Zheng et al., 2024, arXiv 2409.03752), with where in a model such heads tend to be."""


class HeadFunction(NamedTuple):
    """A function that heads have been found to have.

    Args:
        stage: of `STAGES`.
        category: within it.
        detector: what finds such heads here, where anything does.
    """

    stage: str
    category: str
    detector: str | None = None


_NAMES = {
    ("KR", "general"): "associative memory, memory",
    ("KR", "specific"): "constant, single-letter, negative",
    ("ICI", "structural"): "previous, positional, rare-words, duplicate, retrieval, global retrieval",
    ("ICI", "syntactic"): (
        "subword-merge, syntactic, mover, name-mover, backup name-mover, negative name-mover, letter-mover"
    ),
    ("ICI", "semantic"): "context, content-gatherer, sentiment-summariser, semantic-induction, subject, relation",
    ("LR", "in-context learning"): "summary-reader, function-vector, induction, in-context",
    ("LR", "effective reasoning"): "truthfulness, accuracy, consistency, vulnerable",
    ("LR", "task-specific"): "correct-letter, iteration, successor, inhibition",
    ("EP", "aggregation"): "mixed",
    ("EP", "amplification"): "amplification, correct",
    ("EP", "alignment"): "coherence, faithfulness",
}
_FOUND_BY = {
    "previous": "previous",
    "rare-words": "rare",
    "duplicate": "duplicate",
    "induction": "induction",
    "retrieval": "retrieval_score",
    "negative": "negative_attention",
}
HEAD_FUNCTIONS = {
    name: HeadFunction(stage, category, _FOUND_BY.get(name))
    for (stage, category), names in _NAMES.items()
    for name in names.split(", ")
}
"""Functions of heads by name (Zheng et al., 2024, arXiv 2409.03752)."""

Targets = Callable[[Tile], Tensor]
"""Of some rows of a layer's attention, which keys heads of a kind look at: booleans that broadcast to the weights."""


@dataclass(frozen=True)
class MassOn:
    """How much of a query's attention goes to keys of a kind: a metric. Queries that see no such key do not count.

    Args:
        targets: these keys.
        highest: counts 1 where the key with the highest weight is of the kind and 0 elsewhere, in place of weights.
        corrected: less what attention that is even over all keys that are seen would give.
    """

    targets: Targets
    highest: bool = False
    corrected: bool = False

    def __call__(self, tile: Tile) -> Tensor:
        """``(B, H, R)``, from -1 to 1; NaN for queries that do not count."""
        weights, live = tile.weights, tile.live.expand_as(tile.weights)
        targets = self.targets(tile) & live
        if self.highest:
            mass = targets.gather(-1, weights.argmax(-1, keepdim=True))[..., 0].to(weights)
        else:
            mass = (weights * targets).sum(-1)
        if self.corrected:
            mass = mass - targets.sum(-1) / live.sum(-1).clamp(min=1)
        return mass.masked_fill(~targets.any(-1), torch.nan)


def offset(steps: int = 1) -> Targets:
    """The key that stands ``steps`` tokens before the query, on a sequence."""
    return lambda tile: tile.at[:, None] - torch.arange(tile.weights.shape[-1], device=tile.at.device) == steps


def matches(after: int = 0) -> Targets:
    """Keys before the query that stand ``after`` tokens behind a token that is the query's own.

    0 for duplicate-token heads, 1 for induction heads (Olsson et al., 2022, arXiv 2209.11895).

    Raises:
        ValueError: ``after`` is negative; later, a record without tokens.
    """
    if after < 0:
        raise ValueError(f"after must be at least 0; it was {after}")

    def targets(tile: Tile) -> Tensor:
        tokens, key = _tokens(tile.layer), torch.arange(tile.weights.shape[-1], device=tile.at.device)
        same = tokens[:, tile.at, None] == tokens.roll(after, 1)[:, None]
        inside = key >= after
        if tile.layer.real is not None:  # the token that is compared must be none of the padding
            inside = inside & tile.layer.real.roll(after, 1)[:, None]
        return (same & inside & (key < tile.at[:, None]))[:, None]

    return targets


def rare(tile: Tile) -> Tensor:
    """Keys whose token is as rare in its sequence as any there."""
    tokens = _tokens(tile.layer)
    real = torch.ones_like(tokens, dtype=torch.bool) if tile.layer.real is None else tile.layer.real
    counts = ((tokens[:, :, None] == tokens[:, None]) & real[:, None]).sum(-1)
    least = counts.masked_fill(~real, tokens.shape[1]).amin(1, keepdim=True)
    return ((counts == least) & real)[:, None, None]


TARGETS: dict[str, Targets] = {
    "previous": offset(1),
    "duplicate": matches(0),
    "induction": matches(1),
    "rare": rare,
}
"""Kinds of keys by name."""


def detect(
    record: Record, kinds: Iterable[str] | Mapping[str, Targets] = tuple(TARGETS), *, corrected: bool = False
) -> dict[str, Tensor]:
    """How far each head is one that looks at the previous token, at duplicates, by induction, at rare tokens.

    The mean attention to such keys, over the queries that see one; of rare tokens the share of queries whose highest
    weight is on one.

    Args:
        record: with attention and tokens, of causal self-attention.
        kinds: names of `TARGETS`, or targets by names of one's own.
        corrected: less what attention that is even over all keys that are seen would give.

    Returns:
        Each kind ``(layers, H)`` in float64, as from `measure`.

    Raises:
        ValueError: no such kind, or a record without tokens.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> found = detect(record(Attention(8, 2, causal=True, scale=0.0), torch.randn(1, 3, 8)), ["previous"])
    >>> found["previous"].round(decimals=4).tolist()  # 1/2 and 1/3
    [[0.4167, 0.4167]]
    """
    if not isinstance(kinds, Mapping):
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        for name in names:
            if name not in TARGETS:
                raise ValueError(f"kinds must be of {', '.join(TARGETS)}; one was {name!r}")
        kinds = {name: TARGETS[name] for name in names}
    return measure(record, {n: MassOn(each, each is rare, corrected) for n, each in kinds.items()})


@torch.no_grad()
def retrieval_score(record: Record, needle: Tensor, start: int) -> Tensor:
    """How much of a needle each head copies into the answer.

    A token of the needle is copied by a head if the head's highest weight is on it where the same token is emitted (Wu
    et al., 2024, arXiv 2404.15574). Retrieval heads are those above 0.1.

    Args:
        record: with attention and tokens, of prompts and the model's own greedy answers in one sequence ``(B, N)``.
        needle: which tokens are the needle, booleans ``(B, N)``.
        start: where the answers begin.

    Returns:
        The share of the needle that is copied, mean over prompts, ``(layers, H)`` in float64.

    Raises:
        ValueError: a record without tokens, a needle of another shape or an empty one.
    """
    shares = []
    for layer in record:
        tokens = _tokens(layer)
        if needle.shape != tokens.shape or needle.dtype != torch.bool or not needle.any(1).all():
            raise ValueError(
                f"needle must be booleans {tuple(tokens.shape)}, with some true in each prompt; it was "
                f"{needle.dtype} {tuple(needle.shape)}"
            )
        if not 1 <= start < tokens.shape[1]:
            raise ValueError(f"start must be from 1 to {tokens.shape[1] - 1}; it was {start}")
        copied = needle.new_zeros(*layer.q.shape[:2], tokens.shape[1])
        emitted = tokens[:, torch.arange(1, tokens.shape[1] + 1).clamp(max=tokens.shape[1] - 1)]
        for tile in layer.tiles():
            answers = (tile.at >= start - 1) & (tile.at < tokens.shape[1] - 1)
            key = tile.weights.argmax(-1)  # (B, H, R)
            wanted, given = emitted[:, None, tile.at], _at(tokens, key)
            hit = answers & (wanted == given) & _at(needle, key)
            copied |= torch.zeros_like(copied, dtype=torch.long).scatter_add_(-1, key, hit.long()) > 0
        shares.append((copied.sum(-1) / needle.sum(1)[:, None]).double().mean(0))
    return torch.stack(shares)


@torch.no_grad()
def negative_attention(record: Record, yes: Tensor, no: Tensor) -> Tensor:
    """How much more a head looks at the word "no" of the instructions than at "yes": negative attention scores.

    The sum over queries that see both of ``(a_yes + a_no) ln(a_no / a_yes)``, mean over prompts (Yu et al., 2024,
    arXiv 2408.00137).

    Args:
        record: with attention.
        yes, no: places of the two words, ``(B,)``.

    Returns:
        ``(layers, H)`` in float64; above 0 for a bias to "no".

    Raises:
        ValueError: places of another shape.
    """
    found = []
    for layer in record:
        for name, value in (("yes", yes), ("no", no)):
            if value.shape != (len(layer.q),):
                raise ValueError(
                    f"{name} must hold a place of each prompt, ({len(layer.q)},); it was {tuple(value.shape)}"
                )
        score = torch.zeros(layer.q.shape[:2], dtype=torch.float64, device=layer.q.device)
        for tile in layer.tiles():
            live = tile.live.expand_as(tile.weights)
            seen = _column(live, yes) & _column(live, no) & tile.asks
            a, b = (_column(tile.weights, at).double().clamp(min=1e-12) for at in (yes, no))
            score += ((a + b) * (b / a).log()).masked_fill(~seen, 0).sum(-1)
        found.append(score.mean(0))
    return torch.stack(found)


def _tokens(layer: LayerRecord) -> Tensor:
    if layer.tokens is None:
        raise ValueError(
            f"record must hold the tokens of {layer.name!r}: give the model's input_ids by that name, (B, N)"
        )
    return layer.tokens


def _at(values: Tensor, key: Tensor) -> Tensor:
    """``values (B, Nk)`` at keys ``(B, H, R)``."""
    return values[:, None].expand(-1, key.shape[1], -1).gather(-1, key)


def _column(weights: Tensor, at: Tensor) -> Tensor:
    """``weights (B, H, R, Nk)`` of a key of each prompt, ``(B, H, R)``."""
    return weights[torch.arange(len(at), device=at.device), :, :, at]
