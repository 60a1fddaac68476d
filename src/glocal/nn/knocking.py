"""Knocking-heads attention: all heads pass through one small matrix before they attend."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from glocal.nn.convert import made_from, plain
from glocal.nn.frame import Attention
from glocal.shapes import Float

__all__ = ["KnockingHeadsAttention", "KnockingLinear", "KnockingMLP"]


class KnockingLinear(nn.Module):
    """``x T`` with one matrix ``T (D, D)`` for all heads, the identity at first.

    >>> x = torch.randn(1, 4, 10, 8)
    >>> torch.equal(KnockingLinear(8)(x), x)
    True
    """

    undecayed = ("weight",)

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        # A bare parameter, which initialisers of linear layers pass over.
        self.weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.eye_(self.weight)

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        """``(..., D)`` to ``(..., D)``."""
        return x @ self.weight


class KnockingMLP(nn.Module):
    """``2 (x U * sigmoid(x G)) W`` with one triple of matrices ``(D, D)`` for all heads, the identity at first.

    ``U`` and ``W`` start as the identity, ``G`` at zero. There are no biases.

    >>> x = torch.randn(1, 4, 10, 8)
    >>> torch.equal(KnockingMLP(8)(x), x)
    True
    """

    undecayed = ("up_weight", "down_weight")

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.gate_weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.down_weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.eye_(self.up_weight)
        nn.init.zeros_(self.gate_weight)
        nn.init.eye_(self.down_weight)

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        """``(..., D)`` to ``(..., D)``."""
        out: Tensor = 2 * (x @ self.up_weight * (x @ self.gate_weight).sigmoid()) @ self.down_weight
        return out


_FORMS: dict[str, type[nn.Module]] = {"mlp": KnockingMLP, "linear": KnockingLinear}


class KnockingHeadsAttention(Attention):
    """Heads share features: all query, key or value heads pass through the same small layer before scoring.

    It starts as the identity, so that the layer starts as `Attention`. It acts before norms and rotary positions; with
    grouped queries on the ``num_kv_heads`` heads of keys and values. 3 D^2 parameters more by default, in either form.
    Zhou et al., 2025, arXiv 2510.23052.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        form: ``"mlp"`` is a gated layer, `KnockingMLP`; ``"linear"`` one matrix, `KnockingLinear`, which `fold` takes
            into the projections when training has ended.
        on: which of queries, keys and values, such as ``"v"``; by default ``"v"`` for ``"mlp"`` and ``"qkv"`` for
            ``"linear"``. Values matter most.

    Weight decay would pull the identity to zero: `glocal.nn.no_weight_decay` lists what to leave out of it.

    Raises:
        ValueError: another form, no or other letters in ``on``, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import KnockingHeadsAttention
    >>> layer, x = KnockingHeadsAttention(64, 8, num_kv_heads=4, form="linear", causal=True), torch.randn(2, 20, 64)
    >>> nn.init.normal_(layer.v_share.weight).shape
    torch.Size([8, 8])
    >>> torch.allclose(layer.fold()(x), layer(x), atol=1e-5)
    True
    """

    def __init__(self, dim: int, num_heads: int, *, form: str = "mlp", on: str | None = None, **options: Any) -> None:
        if form not in _FORMS:
            raise ValueError(f"form must be 'mlp' or 'linear'; it was {form!r}")
        on = {"mlp": "v", "linear": "qkv"}[form] if on is None else on
        if not on or set(on) - set("qkv") or len(set(on)) < len(on):
            raise ValueError(f"on must be letters of 'qkv', each at most once; it was {on!r}")
        super().__init__(dim, num_heads, **options)
        self.form, self.on = form, on
        self.q_share, self.k_share, self.v_share = (
            _FORMS[form](self.head_dim) if name in on else nn.Identity() for name in "qkv"
        )

    @classmethod
    def from_attention(cls, layer: Attention, **options: Any) -> Self:
        """A copy of a trained layer to continue with: it computes the same.

        Args:
            layer: plain `Attention`.
            options: of this class; those of the layer where not given.

        Raises:
            ValueError: a mechanism instead of plain attention, which would be lost.

        >>> import torch
        >>> from glocal.nn import Attention, KnockingHeadsAttention
        >>> trained, x = Attention(64, 8, causal=True), torch.randn(1, 20, 64)
        >>> torch.equal(KnockingHeadsAttention.from_attention(trained)(x), trained(x))
        True
        """
        return made_from(cls, plain(layer), **options)

    def share(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().share(self.q_share(q), self.k_share(k), self.v_share(v))

    @torch.no_grad()
    def fold(self) -> Attention:
        """Plain attention that computes the same, its projections multiplied by the shared matrices.

        Raises:
            ValueError: the form is not linear, or another mechanism is in the layer.
        """
        if self.form != "linear":
            raise ValueError(f"fold needs form 'linear', as only a matrix goes into a projection; it was {self.form!r}")
        if type(self) is not KnockingHeadsAttention:
            raise ValueError(f"fold is for KnockingHeadsAttention alone; it was {type(self).__name__}")
        folded = made_from(Attention, self)
        for name in self.on:
            shared: Tensor = getattr(self, f"{name}_share").weight
            for t in getattr(folded, f"{name}_proj").parameters():
                t.copy_((shared.mT @ t.view(-1, self.head_dim, t[0].numel())).view_as(t))
        return folded

    def extra_repr(self) -> str:
        return f"form={self.form!r}, on={self.on!r}"
