"""Attention of some of a layer's queries with its scores and weights at hand, where fused kernels give neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.hf.masks import Own

__all__ = ["Rows", "probabilities", "product"]


@dataclass(frozen=True)
class Rows:
    """Some queries of a layer, its keys, and what else makes their scores.

    Args:
        query: ``(B, H, R, D)``, after rotation.
        key: ``(B, Hkv, Nk, D)``, likewise; each serves ``H // Hkv`` heads that follow each other.
        live: which keys a query sees by causality, padding and window, booleans ``(R, Nk)`` or with axes before.
        added: to the scores, each ``(B or 1, H or 1, R or 1, Nk)``: masks of pairs, with minus infinity, and biases.
        scale: multiplies the products.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before anything is added.
    """

    query: Tensor
    key: Tensor
    live: Tensor
    added: tuple[Tensor, ...] = ()
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, mine: Own, query: Tensor, key: Tensor, rows: Tensor, options: Mapping[str, Any]) -> Rows:
        """Take rows out of a call of the attention function.

        Args:
            mine: what the model lets a query see.
            query: ``(B, H, Nq, D)``, all of them.
            key: ``(B, Hkv, Nk, D)``; slots behind ``mine.end`` are left out.
            rows: places of the queries wanted, ``(R,)``.
            options: what transformers passes on; ``scaling``, ``softcap`` and ``position_bias`` count.
        """
        key = key[:, :, : mine.end]
        live = mine.pattern.rows(rows, *mine.pattern.check(query.shape[2], key.shape[2]))
        added = []
        for each in (mine.bias, options.get("position_bias")):
            if each is not None:
                each = each[..., : mine.end]
                added.append(each if each.shape[-2] == 1 else each[..., rows, :])
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(query[:, :, rows], key, live, tuple(added), scale, options.get("softcap"))

    def scores(self, shift: Tensor | None = None) -> Tensor:
        """Before the softmax, ``(B, H, R, Nk)`` in float32 or wider, minus infinity where a key is not seen.

        Args:
            shift: added to the queries, ``(H, 1, D)`` or ``(B, H, 1, D)``.
        """
        query = self.query if shift is None else self.query + shift
        scores = product(query, self.key.to(query.dtype).mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        for each in self.added:
            scores = scores + each
        return scores.masked_fill(~self.live, -torch.inf)

    def weights(self, shift: Tensor | None = None) -> Tensor:
        """After the softmax, ``(B, H, R, Nk)``; ``shift`` as for `scores`."""
        return probabilities(self.scores(shift))


def probabilities(scores: Tensor) -> Tensor:
    """The softmax over the last axis; a row that sees nothing (all minus infinity) gives zeros, as everywhere here.

    >>> probabilities(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    return scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)


def product(rows: Tensor, shared: Tensor) -> Tensor:
    """``(B, H, R, X) @ (B, Hkv, X, Y)`` to ``(B, H, R, Y)``, heads in groups; nothing is copied for each head.

    >>> product(torch.ones(1, 4, 3, 2), torch.ones(1, 2, 2, 5)).shape
    torch.Size([1, 4, 3, 5])
    """
    batch, heads, count, width = rows.shape
    groups = shared.shape[1]
    folded = rows.reshape(batch, groups, heads // groups * count, width) @ shared
    return folded.view(batch, heads, count, shared.shape[-1])
