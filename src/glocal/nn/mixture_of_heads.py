"""Mixture-of-head attention: each token weighs its heads, some shared by all tokens, a few chosen by each."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from glocal.condense import best
from glocal.nn.convert import made_from, plain
from glocal.nn.frame import Attention, Call
from glocal.patterns import Choose, Prefix
from glocal.shapes import Float

__all__ = ["MixtureOfHeadsAttention", "head_balance"]


class MixtureOfHeadsAttention(Attention):
    """Heads as experts: the first ``shared_heads`` serve every token, of the others each token takes ``top_k``.

    The outputs of heads are multiplied by gates before the output projection. Gates depend on the query's token alone,
    so every use and any cache of full attention stays as it is. `head_balance` is what the loss is to hold down, times
    0.01 in the paper. Jin et al., 2024, arXiv 2410.11842.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        shared_heads: the first heads, on for every token; half of them where None.
        top_k: heads that a token takes of the others; half of the others, rounded up, where None. 0 where all are
            shared.
        router: ``"input"`` learns gates from the layer's input: a softmax over the shared heads and one over the others
            of which the ``top_k`` highest are kept, each with a mean of 1, and one that weighs the two kinds.
            ``"query_norm"`` has no parameters, to continue training a finished model: a token takes the heads whose
            queries are longest, gates are 0 or 1, and in training their gradient is that of the softmax of the norms.
        skip: outside training, leave out the scores of heads that a token did not take. Exact. Kernels work on tiles
            of queries, so that time is saved only where few tokens take a head.

    Raises:
        ValueError: numbers of heads that do not fit, another router, norms of queries that were normalised by head, or
            what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import MixtureOfHeadsAttention, head_balance
    >>> layer = MixtureOfHeadsAttention(64, 8, shared_heads=2, top_k=4)
    >>> out = layer(torch.randn(2, 20, 64))
    >>> loss = out.square().mean() + 1e-2 * head_balance(layer)
    >>> layer.gates.shape, int((layer.gates[0, :, 0] > 0).sum())
    (torch.Size([2, 8, 20]), 6)
    """

    tiny: ClassVar[dict[str, Any]] = {"num_heads": 6, "shared_heads": 2, "top_k": 2}

    gates: Tensor | None
    """Of the last forward, ``(B, H, *grid)``, 0 for heads that a token did not take. In training they carry the graph
    of that forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        top_k: int | None = None,
        router: str = "input",
        skip: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        shared_heads = num_heads // 2 if shared_heads is None else shared_heads
        if not 0 <= shared_heads <= num_heads:
            raise ValueError(f"shared_heads must be from 0 to num_heads {num_heads}; it was {shared_heads}")
        others = num_heads - shared_heads
        top_k = (others + 1) // 2 if top_k is None else top_k
        if not min(1, others) <= top_k <= others:
            least = min(1, others)
            raise ValueError(f"top_k must be from {least} to {others}, the heads not shared; it was {top_k}")
        if router not in ("input", "query_norm"):
            raise ValueError(f"router must be 'input' or 'query_norm'; it was {router!r}")
        if router == "query_norm" and self.qk_norm in ("rms", "layer"):
            raise ValueError(
                f"router 'query_norm' needs queries of unequal norms: qk_norm must be None or 'rms_all'; "
                f"it was {self.qk_norm!r}"
            )
        self.shared_heads, self.top_k, self.router, self.skip = shared_heads, top_k, router, skip
        if router == "input":
            # Only gates that can differ from 1 have a router.
            if others:
                self.routed_gate = nn.Linear(dim, others, bias=False)
            if shared_heads > 1:
                self.shared_gate = nn.Linear(dim, shared_heads, bias=False)
            if others and shared_heads:
                self.kind_gate = nn.Linear(dim, 2, bias=False)
        self.gates = None
        self._balance: Tensor | None = None

    @classmethod
    def from_attention(cls, layer: Attention, **options: Any) -> Self:
        """A copy of a trained layer to continue with, its routers at zero.

        With ``router="input"`` and all heads on it computes the same. With fewer on, tokens take the first of the
        others until the routers have learned to differ.

        Args:
            layer: plain `Attention`.
            options: of this class; those of the layer where not given.

        Raises:
            ValueError: a mechanism instead of plain attention, which would be lost.

        >>> import torch
        >>> from glocal.nn import Attention, MixtureOfHeadsAttention
        >>> trained = Attention(64, 8, causal=True)
        >>> layer = MixtureOfHeadsAttention.from_attention(trained, shared_heads=4, top_k=4)
        >>> x = torch.randn(1, 20, 64)
        >>> torch.equal(layer(x), trained(x))
        True
        """
        made = made_from(cls, plain(layer), **options)
        trained = layer.state_dict()
        for name, p in made.named_parameters():
            if name not in trained:
                nn.init.zeros_(p)
        return made

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        real = None if call.real is None or call.cross else call.real[:, -q.shape[2:-1].numel() :]
        gates = self.route(q, call.x, real).movedim(-1, 1)
        self.gates = gates = gates.to(q.dtype)
        where = self.where(q, k, call)
        if self.skip and not self.training and self.top_k < self.num_heads - self.shared_heads:
            where = Choose(gates > 0, where, Prefix(0))
        out: Tensor = gates.unsqueeze(-1) * self.attend(q, k, v, where, call)
        return out

    def route(self, q: Tensor, x: Tensor, real: Tensor | None = None) -> Float[Tensor, "B *grid H"]:
        """Gates in float32 or better, the shared heads first; ``real (B, N)`` are the tokens that are no padding."""
        learned, parts = self.router == "input", []
        if self.shared_heads:
            if learned and self.shared_heads > 1:
                parts.append(self.shared_heads * _wide(self.shared_gate(x)).softmax(-1))
            else:
                parts.append(_wide(q.new_ones(q.shape[0], *q.shape[2:-1], self.shared_heads)))
        if self.top_k:
            logits = self.logits(q, x)
            soft = logits.softmax(-1)
            hard = torch.zeros_like(soft).scatter(-1, best(logits, self.top_k), 1.0)
            self._balance = _balance(soft, hard, real)
            if learned:
                # The top_k of E shares sum to top_k / E at least: there is no division by zero.
                taken = soft * hard
                parts.append(taken / taken.sum(-1, keepdim=True) * self.top_k)
            else:
                parts.append(hard + (soft - soft.detach()) if self.training else hard)
        if learned and len(parts) == 2:
            kinds = 2 * _wide(self.kind_gate(x)).softmax(-1)
            parts = [part * kind for part, kind in zip(parts, kinds.split(1, -1), strict=True)]
        return torch.cat(parts, -1)

    def logits(self, q: Tensor, x: Tensor) -> Float[Tensor, "B *grid E"]:
        """By which a token takes heads that are not shared, in float32 or better."""
        if self.router == "input":
            return _wide(self.routed_gate(x))
        # Norms before rotary positions are meant; queries come rotated, which does not change their norm.
        norms = _wide(q[:, self.shared_heads :]).norm(dim=-1).movedim(1, -1)
        spread = norms.std(-1, keepdim=True, correction=min(1, norms.shape[-1] - 1))
        out: Tensor = norms / torch.where(spread > 0, spread, 1)
        return out

    def head_balance(self) -> Tensor:
        """How unevenly the last forward's real tokens took heads: ``top_k`` where evenly, more where not."""
        if self._balance is None:
            raise ValueError("head_balance is of the last forward of a layer that chooses heads; there was none")
        return self._balance

    def __getstate__(self) -> dict[str, Any]:
        # A copy has not run: tensors with a graph cannot be copied.
        return self.__dict__ | {"gates": None, "_balance": None}

    def extra_repr(self) -> str:
        return f"shared_heads={self.shared_heads}, top_k={self.top_k}, router={self.router!r}, skip={self.skip}"


def head_balance(model: nn.Module) -> Tensor:
    """Mean of `MixtureOfHeadsAttention.head_balance` over the last forward of a model's layers that choose heads.

    A scalar with gradient: ``loss + 0.01 * head_balance(model)`` is the paper's loss.

    Raises:
        ValueError: the model has no such layer, or has not run.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfHeadsAttention) and layer.top_k]
    if not layers:
        raise ValueError("model must have a MixtureOfHeadsAttention layer with heads to choose; it had none")
    return torch.stack([layer.head_balance() for layer in layers]).mean()


def _balance(soft: Tensor, hard: Tensor, real: Tensor | None) -> Tensor:
    """``E`` times the sum over heads of the mean probability and the share of tokens that took the head."""
    soft, hard = soft.flatten(1, -2), hard.flatten(1, -2)
    real = torch.ones_like(soft[..., 0]) if real is None else real.to(soft.dtype)
    weight = (real / real.sum().clamp(min=1)).unsqueeze(-1)
    return soft.shape[-1] * ((weight * soft).sum((0, 1)) * (weight * hard).sum((0, 1))).sum()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
