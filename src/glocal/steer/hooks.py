"""The places of a model at which a method may act, and what it is told there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from glocal.steer.spans import SpanMap, known

__all__ = ["Hooks", "Run", "Site"]


@dataclass
class Run:
    """One ``generate``, or one call of the model: what its prompt was, and how far it is.

    Args:
        inputs: the arguments of the call by name.
        prompt: tokens of the prompt, N.
        spans: what the prompt's positions are; None where it cannot be told.
        generating: whether ``generate`` runs, or the model was called by itself.
        step: tokens chosen so far.
        chosen: the newest of them, ``(B, 1)``.
    """

    inputs: dict[str, Any]
    prompt: int
    spans: SpanMap | None
    generating: bool
    step: int = 0
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Site:
    """A layer's attention at one call of the model.

    Args:
        layer: the layer's number in the language model.
        module: its attention module.
        run: the ``generate`` that it is part of.
        rows: positions of the queries at hand, ``(R,)``, counted over prompt and answer.
        first_key: position of the first key; more than 0 where a cache has dropped keys.
        keys: how many keys there are.
        batch: rows of the batch.
        prefill: whether the prompt is being read.
    """

    layer: int
    module: nn.Module
    run: Run
    rows: Tensor
    first_key: int
    keys: int
    batch: int
    prefill: bool

    @property
    def last(self) -> Tensor:
        """The newest token's place among ``rows``, ``(1,)`` or empty."""
        return (self.rows == self.first_key + self.keys - 1).nonzero()[:, 0]

    def spans(self) -> SpanMap:
        """What the keys' positions are, for every row of the batch.

        Raises:
            ValueError: the prompt was given as embeddings, and no spans with it.
        """
        return known(self.run.spans).repeated(self.batch).extended(self.first_key + self.keys)

    def where(self, kind: str) -> Tensor:
        """The keys of a kind, booleans ``(B, keys)``."""
        return self.spans().mask(kind)[:, self.first_key : self.first_key + self.keys]

    def repeated(self, values: Tensor) -> Tensor:
        """Of values ``(B, ...)`` of prompts, each as often as generate has its prompt: ``(batch, ...)``."""
        return values.repeat_interleave(self.batch // len(values), 0)

    def over_keys(self, values: Tensor) -> Tensor:
        """Values ``(B, N)`` of the prompt's positions at the keys, 0 or false at others: ``(batch, keys)``."""
        end = self.first_key + self.keys
        return self.repeated(F.pad(values, (0, max(0, end - values.shape[1])))[:, self.first_key : end])


class Hooks:
    """What a method overrides: nothing here changes anything.

    Scores and weights are computed only for the query rows that `rows` names; all others stay on the fused kernel.
    """

    fuses = False
    """Whether it changes logits by a second branch: beam search is then refused, and so is another such method."""
    beams = True
    """Whether it can follow beam search, whose rows move, where it does not fuse; else that is refused."""
    acts_in_attention = True
    """Whether it reads or changes queries, scores or weights."""
    numbers: frozenset[int] = frozenset()
    """The layers that it acts on."""
    spans: SpanMap | None = None
    """What the prompt's positions are, where that cannot be read from ``input_ids``."""

    def begin(self, run: Run) -> None:
        """A ``generate`` begins; ``run.inputs`` may be changed. State of an earlier one is dropped here."""

    def end(self, run: Run) -> None:
        """It is over, or has failed."""

    def edits(self, site: Site) -> bool:
        """Whether scores or weights at this layer and time are read or changed."""
        return False

    def rows(self, site: Site) -> Tensor | None:
        """Places among ``site.rows`` of the queries that it needs; all where None."""
        return None

    def query(self, site: Site, query: Tensor) -> Tensor:
        """Queries ``(B, H, Nq, D)`` after rotation; called for every layer in ``numbers``."""
        return query

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Scores ``(B, H, R, keys)``, scaled and masked with minus infinity, before the softmax."""
        return scores

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Weights ``(B, H, R, keys)`` after the softmax."""
        return weights

    def residual(self, layer: int, run: Run, states: Tensor) -> Tensor:
        """The stream that enters a layer in ``numbers``, ``(B, N, C)``."""
        return states

    def logits(self, run: Run, logits: Tensor) -> Tensor:
        """Raw logits ``(B, V)`` of the next token, before any processor; in ``generate`` only."""
        return logits
