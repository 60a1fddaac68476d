"""What each token gives to each state of a post-norm encoder, through attention, residual streams and both norms.

Norms are linear in what they divide once the divisor is known, so a state is a sum of vectors, one a token, and the
length of each says how much that token gives. Modarressi et al., 2022, arXiv 2205.03286; the parts before it are of
Kobayashi et al., 2020, arXiv 2004.10102, and 2021, arXiv 2109.07152.

A vector is ``sum_h A[h, i, j] f_h(x_j)``, plus ``x_i`` for the token itself, so its squared length is a form in the
weights with the products of the ``f_h(x_j)``: H x H numbers a key stand for C channels a pair of tokens, which are
made only where vectors are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glocal.inspect.recording import LayerRecord

__all__ = ["ATTRIBUTIONS", "LayerAttribution"]

ATTRIBUTIONS = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
"""Matrices of a layer, named as in the paper."""
_STAGES = ("N", "N-Res", "N-ResLN", "N-Enc")
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class LayerAttribution:
    """One layer's contributions, in float64. Made by `layer_attributions`.

    Args:
        layer: its record.
        entering: the states that it reads, ``(B, N, C)``.
        summed: what its first norm reads.
        fed: what its second norm reads.
        heads: what each head makes of each token before weights, without bias, ``(B, H, N, C)``.
        bias: of the output projection, ``(C,)``.
        norms: gain, bias and epsilon of both norms.
    """

    layer: LayerRecord
    entering: Tensor
    summed: Tensor
    fed: Tensor
    heads: Tensor
    bias: Tensor
    norms: tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]

    def _through(self, vectors: Tensor, stage: int) -> Tensor:
        """The norms' linear part, before division."""
        for gain, _, _ in self.norms[: max(stage - 1, 0)]:
            vectors = (vectors - vectors.mean(-1, keepdim=True)) * gain
        return vectors

    def _factor(self, rows: Tensor, stage: int) -> Tensor:
        """One over what the norms divide by, ``(B, R)``; 0 for padding, so that it passes nothing on."""
        factor = torch.ones_like(self.summed[:, rows, 0])
        for (_, _, eps), read in list(zip(self.norms, (self.summed, self.fed), strict=True))[: max(stage - 1, 0)]:
            factor = factor * (read[:, rows].var(-1, correction=0) + eps).rsqrt()
        return factor if self.layer.real is None else factor * self.layer.real[:, rows]

    def _weights(self, rows: Tensor) -> Tensor:
        return self.layer.weights(rows).double()

    def _rows(self, rows: Tensor | None) -> Tensor:
        return torch.arange(self.layer.queries, device=self.heads.device) if rows is None else rows

    def parts(self, kind: str = "N-Enc", rows: Tensor | None = None) -> Tensor:
        """What each token gives to each of some states, as vectors, ``(B, R, N, C)``; zeros for padding.

        With `constant` they sum to what the layer has at that place: to what the first norm reads (``"N-Res"``; without
        ``entering``, ``"N"``), to what it gives (``"N-ResLN"``), to the layer's output (``"N-Enc"``).

        Args:
            kind: ``"N"``, ``"N-Res"``, ``"N-ResLN"`` or ``"N-Enc"``.
            rows: places of the states, ``(R,)``; all of them where None, for inputs that are short.

        Raises:
            ValueError: another kind.
        """
        stage, rows = _stage(kind), self._rows(rows)
        found = torch.einsum("bhrn,bhnc->brnc", self._weights(rows), self.heads)
        if stage:
            found[:, torch.arange(len(rows)), rows] += self.entering[:, rows]
        return self._through(found, stage) * self._factor(rows, stage)[..., None, None]

    def constant(self, kind: str = "N-Enc") -> Tensor:
        """What no token gives: biases and, for ``"N-Enc"``, the feed-forward network's output, ``(B, N, C)``.

        Raises:
            ValueError: as `parts`.
        """
        stage, rows = _stage(kind), self._rows(None)
        found = self.bias.expand_as(self.summed)
        if stage > 1:
            found = self._through(found, 2) * self._factor(rows, 2)[..., None] + self.norms[0][1]
        if stage > 2:
            gain, shift, eps = self.norms[0]
            found = found + self.fed - nn.functional.layer_norm(self.summed, gain.shape, gain, shift, eps)
            gain, shift, eps = self.norms[1]
            scale = (self.fed.var(-1, correction=0, keepdim=True) + eps).rsqrt()
            found = (found - found.mean(-1, keepdim=True)) * gain * scale + shift
        return found

    def head_norms(self, rows: Tensor | None = None) -> Tensor:
        """How much each head gives of each token: lengths of ``A[h, i, j] f_h(x_j)``, ``(B, H, R, N)``."""
        lengths: Tensor = self.heads.norm(dim=-1)
        return self._weights(self._rows(rows)) * lengths[:, :, None]

    def mixing_ratio(self, kind: str = "N-Enc", rows: Tensor | None = None) -> Tensor:
        """How much of a state comes from other tokens than its own, from 0 to 1, ``(B, R)``; 0 where nothing does.

        Args:
            kind, rows: as of `parts`.

        Raises:
            ValueError: as `parts`.
        """
        stage, rows = _stage(kind), self._rows(rows)
        lengths = []
        for at in rows.split(self._at_once()):
            weights = self._weights(at)
            own = weights[:, :, torch.arange(len(at)), at]
            weights[:, :, torch.arange(len(at)), at] = 0
            others = torch.einsum("bhrn,bhnc->brc", weights, self.heads)
            itself = torch.einsum("bhr,bhrc->brc", own, self.heads[:, :, at])
            itself = itself + self.entering[:, at] if stage else itself
            both = torch.stack([others, itself])
            lengths.append(self._through(both, stage).norm(dim=-1) * self._factor(at, stage))
        others, itself = torch.cat(lengths, -1).unbind()
        return others / (others + itself).clamp(min=torch.finfo(others.dtype).tiny)

    def matrix(self, kind: str = "N-Enc", rows: Tensor | None = None) -> Tensor:
        """How much each token gives to each of some states, ``(B, R, N)``; rows of padding are zeros.

        Args:
            kind: of `ATTRIBUTIONS`. ``"W"``: mean weight of the heads. ``"N"``: lengths of what attention gives;
                ``"N-Res"``: with the residual stream; ``"N-ResLN"``: and the first norm; ``"N-Enc"``: and the second.
                ``"W-FixedRes"``, ``"N-FixedRes"``: half of it the identity, rows of ``N`` made to sum to 1.
                ``"W-Res"``: the share of other tokens is the mixing ratio of ``"N-Enc"``.
            rows: places of the states, ``(R,)``; all of them where None, for inputs that are short.

        Raises:
            ValueError: another kind.
        """
        if kind not in ATTRIBUTIONS:
            raise ValueError(f"kind must be of {', '.join(ATTRIBUTIONS)}; it was {kind!r}")
        rows = self._rows(rows)
        if kind in _STAGES:
            return self._lengths(kind, rows)
        one = nn.functional.one_hot(rows, self.layer.keys).double()
        real = self._factor(rows, 0)[..., None]
        if kind == "N-FixedRes":
            return (0.5 * shares(self._lengths("N", rows)) + 0.5 * one) * real
        weights = self._weights(rows).mean(1)
        if kind == "W-Res":
            ratio = self.mixing_ratio("N-Enc", rows)[..., None]
            weights = ratio * shares(weights * (1 - one)) + (1 - ratio) * one
        elif kind == "W-FixedRes":
            weights = 0.5 * weights + 0.5 * one
        return weights * real

    def tiles(self, kind: str = "N-Enc", rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of `matrix` a part at a time: their places and they; for inputs of any length."""
        for at in self._rows(rows).split(self._at_once()):
            yield at, self.matrix(kind, at)

    def _at_once(self) -> int:
        return max(1, _AT_ONCE // (len(self.heads) * (self.layer.heads + 1) * self.layer.keys))

    def _lengths(self, kind: str, rows: Tensor) -> Tensor:
        stage = _stage(kind)
        weights = self._weights(rows).permute(0, 3, 2, 1)  # (B, N, R, H)
        given = self.heads.transpose(1, 2)
        if stage:  # the token's own state, as one more head that looks at itself
            one = nn.functional.one_hot(rows, self.layer.keys).to(weights).mT
            weights = torch.cat([weights, one[None, ..., None].expand(len(weights), -1, -1, 1)], -1)
            given = torch.cat([given, self.entering[:, :, None]], 2)
        given = self._through(given, stage)
        squares = (weights @ (given @ given.mT) * weights).sum(-1).clamp(min=0)
        return squares.sqrt().mT * self._factor(rows, stage)[..., None]


def _stage(kind: str) -> int:
    if kind not in _STAGES:
        raise ValueError(f"kind must be of {', '.join(_STAGES)}; it was {kind!r}")
    return _STAGES.index(kind)


def shares(rows: Tensor) -> Tensor:
    """Rows that sum to 1; zeros stay."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
