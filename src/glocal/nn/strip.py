"""Strip self-attention: keys and values on a smaller map, queries and keys of one channel a head."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from glocal.nn.frame import Attention

__all__ = ["StripAttention"]

_NO_CAUSAL = "the strided convolution mixes what comes before a place with what comes after it"


class StripAttention(Attention):
    """Softmax attention over a map reduced by a strided convolution, compared by ``key_dim`` channels a head.

    With one channel the scores of a head are the products of two vectors: a query chooses only how sharply, and from
    which end, it looks at keys that have one order for all. Xu et al., 2025, arXiv 2505.22195, whose code is not
    public: the form and its numbers are our reading of the text.

    Args:
        dim, num_heads: as in `Attention`, with its options but rope, qk_norm, lepe and head_dim.
        key_dim: channels of queries and keys a head; values have ``dim // num_heads``.
        reduction: side and stride of the convolution before keys and values, with a layer norm after it; none where 1.

    Raises:
        ValueError: settings out of range, padding, a causal use, maps that are smaller than the reduction.

    >>> import torch
    >>> from glocal.nn.strip import StripAttention
    >>> StripAttention(32, 4, reduction=2)(torch.randn(1, 9, 11, 32)).shape
    torch.Size([1, 9, 11, 32])
    """

    uses = ("noncausal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {"causal-self": _NO_CAUSAL, "causal-cross": _NO_CAUSAL}
    tiny: ClassVar[dict[str, Any]] = {"grid": (4, 5), "reduction": 2}

    def __init__(self, dim: int, num_heads: int, *, key_dim: int = 1, reduction: int = 1, **options: Any) -> None:
        for name, value in (("key_dim", key_dim), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        for name in ("rope", "qk_norm", "lepe", "head_dim"):
            if options.get(name) is not None:
                raise ValueError(f"{name} does not go with keys of another size than values; it was {options[name]!r}")
        options = {"qkv_bias": True, "out_bias": True, "scale": key_dim**-0.5} | options
        super().__init__(dim, num_heads, **options)
        bias: bool = options["qkv_bias"]
        self.q_proj = nn.Linear(dim, num_heads * key_dim, bias=bias)
        self.k_proj = nn.Linear(self.kv_dim, self.num_kv_heads * key_dim, bias=bias)
        self.key_dim, self.reduction = key_dim, reduction
        self.reduce = nn.Conv2d(self.kv_dim, self.kv_dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(self.kv_dim) if reduction > 1 else None

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(B, H, *grid, key_dim)``, and keys and values of the reduced map."""
        if self.reduce is not None and self.norm is not None:
            context = self.norm(self.reduce(context.movedim(-1, 1)).movedim(1, -1))
        return super().project(x, context, at_q, at_k)

    def forward(self, x: Tensor, context: Tensor | None = None, *, keys: Tensor | None = None, **more: Any) -> Tensor:
        """``(B, H, W, dim)`` to the same; keys and values from ``context (B, h, w, kv_dim)`` where given."""
        if keys is not None:
            raise ValueError("keys (padding) are refused: the reduction mixes what is padding with what is not")
        if x.dim() != 4:
            raise ValueError(f"x must be (B, *grid, {self.dim}) with a grid of 2 axes; it was {tuple(x.shape)}")
        name, source = ("x", x) if context is None else ("context", context)
        if min(source.shape[1:3]) < self.reduction:
            raise ValueError(
                f"{name} must have {self.reduction} places or more a side, the reduction; it was {tuple(source.shape)}"
            )
        return super().forward(x, context, **more)

    def extra_repr(self) -> str:
        return f"key_dim={self.key_dim}, reduction={self.reduction}"
