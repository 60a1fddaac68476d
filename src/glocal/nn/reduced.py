"""Attention with fewer projections: the input's own slices as values, or as keys and values, mixed along the tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.cache import Cache, FullCache
from glocal.nn.frame import Attention, Call
from glocal.shapes import Float

__all__ = ["OptimisedAttention", "SliceAttention", "SuperAttention"]


class OptimisedAttention(Attention):
    """No value projection: a head's values are its own slice of the input's channels.

    3 C^2 weights instead of 4 C^2. With one head nothing is lost, as ``o_proj`` can take a value matrix in; a head of
    several sees only its slice. Hosseini and Hosseini, 2024, arXiv 2403.01643, under this name.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        out_bias: as in `Attention`, on by default.

    Raises:
        ValueError: the context's channels are not as many as the heads', or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import OptimisedAttention
    >>> layer = OptimisedAttention(64, 8, out_bias=False)
    >>> layer(torch.randn(2, 10, 64)).shape, sum(p.numel() for p in layer.parameters()) == 3 * 64**2
    (torch.Size([2, 10, 64]), True)
    """

    def __init__(self, dim: int, num_heads: int, *, out_bias: bool = True, **options: Any) -> None:
        super().__init__(dim, num_heads, out_bias=out_bias, **options)
        if self.kv_dim != self.num_kv_heads * self.head_dim:
            raise ValueError(
                f"kv_dim must be num_kv_heads {self.num_kv_heads} times head_dim {self.head_dim}, as heads take slices "
                f"of the context; it was {self.kv_dim}"
            )
        del self.v_proj

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.heads(self.q_proj(x), self.num_heads), self.heads(self.k_proj(context), self.num_kv_heads)
        return q, k, self.heads(context, self.num_kv_heads)


class SliceAttention(OptimisedAttention):
    """No key and no value projection: both are the head's slice of the input's channels.

    2 C^2 weights instead of 4 C^2; with one head nothing is lost, as ``q_proj`` can take a key matrix in. This is the
    Efficient Attention of Hosseini and Hosseini, 2024, arXiv 2403.01643; `EfficientAttention` is another paper's.

    Args:
        dim, num_heads, out_bias: as in `OptimisedAttention`, with all options of `Attention`.

    Raises:
        ValueError: as in `OptimisedAttention`.

    >>> import torch
    >>> from glocal.nn import SliceAttention
    >>> layer = SliceAttention(64, 8, out_bias=False)
    >>> layer(torch.randn(2, 10, 64)).shape, sum(p.numel() for p in layer.parameters()) == 2 * 64**2
    (torch.Size([2, 10, 64]), True)
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        del self.k_proj

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slices = self.heads(context, self.num_kv_heads)
        return self.heads(self.q_proj(x), self.num_heads), slices, slices


class SuperAttention(SliceAttention):
    """`SliceAttention` whose values are first mixed along the tokens by a learned matrix, the alignment kernel.

    ``max_length^2`` weights more, and as much work a channel: for inputs of a fixed length, or of at most that. The
    kernel starts as the identity. A shorter input uses its corner, a grid counts row by row; causal, it is lower
    triangular. Padding adds nothing to other tokens. A step of decoding mixes all values again. Hosseini and Hosseini,
    2024, arXiv 2403.01643, under this name.

    Args:
        dim, num_heads, out_bias: as in `OptimisedAttention`, with all options of `Attention`.
        max_length: the most keys that there can be.
        per_head: a kernel of its own for each of the ``num_kv_heads`` heads.
        alignment_bias: a learned number a token, added to all channels of its value; zero at first.

    Weight decay would pull the identity to zero: `glocal.nn.no_weight_decay` lists what to leave out of it.

    Raises:
        ValueError: no room for a token, an input that is longer, a cache that drops tokens, or what
            `OptimisedAttention` refuses.

    >>> import torch
    >>> from glocal.nn import SuperAttention
    >>> layer = SuperAttention(64, 8, max_length=16, out_bias=False)
    >>> layer(torch.randn(2, 10, 64)).shape, sum(p.numel() for p in layer.parameters()) == 2 * 64**2 + 16**2
    (torch.Size([2, 10, 64]), True)
    """

    tiny: ClassVar[dict[str, Any]] = {"max_length": 20}
    undecayed = ("alignment",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int,
        per_head: bool = False,
        alignment_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1; it was {max_length}")
        self.max_length, self.per_head = max_length, per_head
        self.alignment = nn.Parameter(torch.empty(self.num_kv_heads if per_head else 1, max_length, max_length))
        self.alignment_bias = nn.Parameter(torch.empty(max_length)) if alignment_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The kernel as the identity, and no bias."""
        with torch.no_grad():
            self.alignment.copy_(torch.eye(self.max_length, device=self.alignment.device))
        if self.alignment_bias is not None:
            nn.init.zeros_(self.alignment_bias)

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._has_room(context.shape[1:-1].numel())
        return super().make(x, context)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return super().mix(q, k, self.align(v, call.real), call)

    def align(self, v: Float[Tensor, "B H *grid D"], real: Tensor | None = None) -> Float[Tensor, "B H *grid D"]:
        """Values mixed along the tokens; ``real (B, N)`` are those that are no padding."""
        length = v.shape[2:-1].numel()
        kernel = self.alignment[:, :length, :length]
        if self.causal:
            kernel = kernel.tril()
        flat = v.flatten(2, -2)
        if real is not None:
            flat = flat.masked_fill(~real[:, None, :, None], 0)
        grouped = flat.unflatten(1, (len(kernel), -1))
        mixed = torch.einsum("gij,bgujd->bguid", kernel, grouped).flatten(1, 2)
        if self.alignment_bias is not None:
            mixed = mixed + self.alignment_bias[:length, None]
        return mixed.view_as(v)

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        if not cache.complete:
            raise ValueError(f"cache must keep all tokens, as new_cache() does; it was a {type(cache).__name__}")
        self._has_room(cache.seen + k.shape[2])
        return super().step(q, k, v, call, cache)

    def new_cache(self) -> Cache:
        """All tokens, whatever a query sees: the kernel mixes values from farther away."""
        return FullCache()

    def _has_room(self, count: int) -> None:
        if count > self.max_length:
            raise ValueError(f"max_length {self.max_length} is the most keys that the kernel has; there were {count}")

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, per_head={self.per_head}"
