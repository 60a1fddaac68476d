"""Latent tokens beside a sequence: cross-attention between the two, and attention causal from group to group."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.nn.block import MLP
from glocal.nn.frame import Attention, Call
from glocal.patterns import Between, Pattern
from glocal.shapes import Float

__all__ = ["GroupCausalAttention", "LatentCrossAttention"]


class LatentCrossAttention(nn.Module):
    """``x + attention(norm(x), norm(context))``, the heads together as wide as the narrower of the two.

    The step between tokens and latents of FIT (Chen and Li, 2023, arXiv 2305.12689), in both directions; with
    ``hidden`` it is Perceiver's (Jaegle et al., 2021, arXiv 2103.03206).

    Args:
        dim: channels of ``x``.
        context_dim: channels of the context.
        num_heads: heads of ``min(dim, context_dim) // num_heads`` channels.
        hidden: channels of a feed-forward after it; none where None.
        eps: of the norms.
        backend: as in `glocal.attend`.

    Raises:
        ValueError: the narrower width is no multiple of ``num_heads``.

    >>> import torch
    >>> from glocal.nn.latents import LatentCrossAttention
    >>> read = LatentCrossAttention(64, 32, 4)
    >>> read(torch.randn(2, 8, 64), torch.randn(2, 100, 32)).shape, read.attention.head_dim
    (torch.Size([2, 8, 64]), 8)
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        *,
        hidden: int | None = None,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        width = min(dim, context_dim)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads must divide {width}, the lesser of the widths; it was {num_heads}")
        self.norm, self.context_norm = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(context_dim, eps=eps)
        self.attention = Attention(
            dim,
            num_heads,
            head_dim=width // num_heads,
            kv_dim=context_dim,
            qkv_bias=True,
            out_bias=True,
            backend=backend,
        )
        self.mlp_norm = None if hidden is None else nn.LayerNorm(dim, eps=eps)
        self.mlp = None if hidden is None else MLP(dim, hidden)

    def forward(
        self, x: Float[Tensor, "B N dim"], context: Float[Tensor, "B M context_dim"]
    ) -> Float[Tensor, "B N dim"]:
        """``x (B, N, dim)`` after reading ``context (B, M, context_dim)``."""
        out: Tensor = x + self.attention(self.norm(x), self.context_norm(context))
        if self.mlp is not None and self.mlp_norm is not None:
            out = out + self.mlp(self.mlp_norm(out))
        return out


class GroupCausalAttention(Attention):
    """Each query sees the tokens of its own group of ``group`` and of all groups before, later ones of its own too.

    Causal from group to group, not from token to token, so it is not among `glocal.nn`'s layers, whose causal form is
    the latter. With a cache, give it whole groups.

    Args:
        dim, num_heads: as in `Attention`, with all its options but ``causal``.
        group: tokens of a group.

    Raises:
        ValueError: a group below 1, a length that is no multiple of it, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn.latents import GroupCausalAttention
    >>> layer = GroupCausalAttention(32, 4, group=3)
    >>> cache, x = layer.new_cache(), torch.randn(1, 12, 32)
    >>> steps = torch.cat([layer(part, cache=cache) for part in x.split(3, 1)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5)
    True
    """

    uses = ("causal-self",)
    refuses: ClassVar[dict[str, str]] = {"causal-cross": "groups align queries and keys of one sequence"}

    def __init__(self, dim: int, num_heads: int, *, group: int, **options: Any) -> None:
        if group < 1:
            raise ValueError(f"group must be at least 1; it was {group}")
        super().__init__(dim, num_heads, **(options | {"causal": True}))
        self.group = group

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        queries, keys = q.shape[2], k.shape[2]
        if queries % self.group or keys % self.group:
            raise ValueError(
                f"x must have whole groups of {self.group} tokens; it had {queries} after {keys - queries}"
            )
        at = torch.arange(keys - queries, keys, device=q.device)
        return Between(torch.zeros_like(at), (at // self.group + 1) * self.group)

    def extra_repr(self) -> str:
        return f"group={self.group}"
