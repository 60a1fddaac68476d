"""Head embeddings: one narrow projection for all heads, and a small vector that makes each head another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn.frame import Attention
from glocal.shapes import Float

__all__ = ["HeadEmbeddingAttention"]


class HeadEmbeddingAttention(Attention):
    """Queries, keys and values of one head's width, from which each head makes its own by a learned vector.

    The projections are ``num_heads`` times narrower than in `Attention`; scores, the cache and the output projection
    are the same size. Xue and Aletras, 2023, arXiv 2310.07911, as MHE-MUL and MHE-ADD; without the embeddings it would
    be ``Attention(dim, 1, head_dim=dim // num_heads)``, their single-head baseline.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        form: ``"mul"`` multiplies by ``1 + embedding``, ``"add"`` adds the embedding. With ``"add"``, the embedding of
            keys changes nothing unless there are rotary positions or norms: it shifts all scores of a query.

    Raises:
        ValueError: another form, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import Attention, HeadEmbeddingAttention
    >>> layer = HeadEmbeddingAttention(64, 8)
    >>> layer(torch.randn(2, 10, 64)).shape, layer.q_proj.weight.shape, layer.q_embedding.shape
    (torch.Size([2, 10, 64]), torch.Size([8, 64]), torch.Size([8, 8]))
    >>> [sum(p.numel() for p in kind(64, 8).parameters()) for kind in (Attention, HeadEmbeddingAttention)]
    [16384, 5824]
    """

    def __init__(self, dim: int, num_heads: int, *, form: str = "mul", **options: Any) -> None:
        if form not in ("mul", "add"):
            raise ValueError(f"form must be 'mul' or 'add'; it was {form!r}")
        super().__init__(dim, num_heads, **options)
        self.form, bias = form, self.q_proj.bias is not None
        self.q_proj = nn.Linear(dim, self.head_dim, bias=bias)
        self.k_proj = nn.Linear(self.kv_dim, self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.kv_dim, self.head_dim, bias=bias)
        self.q_embedding = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.k_embedding = nn.Parameter(torch.empty(self.num_kv_heads, self.head_dim))
        self.v_embedding = nn.Parameter(torch.empty(self.num_kv_heads, self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings near zero, where all heads would be the same."""
        for embedding in (self.q_embedding, self.k_embedding, self.v_embedding):
            nn.init.normal_(embedding, std=0.02)

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.embed(self.q_proj(x), self.q_embedding),
            self.embed(self.k_proj(context), self.k_embedding),
            self.embed(self.v_proj(context), self.v_embedding),
        )

    def embed(self, t: Float[Tensor, "B *grid D"], embedding: Float[Tensor, "H D"]) -> Float[Tensor, "B H *grid D"]:
        """What all heads have in common, as each head sees it."""
        embedding = embedding.view(len(embedding), *[1] * (t.dim() - 2), -1)
        common = t.unsqueeze(1)
        return common + embedding if self.form == "add" else common * (1 + embedding)

    def extra_repr(self) -> str:
        return f"form={self.form!r}"
