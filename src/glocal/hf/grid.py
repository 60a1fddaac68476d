"""Patterns on the patches of a vision transformer, whose class token and registers stand before them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.attention import merge
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Pattern, parse

__all__ = ["GridAttention"]


class GridAttention(Attention):
    """Patches see each other as a pattern on their grid says; special tokens see all and are seen by all.

    One softmax: a patch's attention over patches and over special tokens is joined exactly (`glocal.merge`).

    Args:
        dim, num_heads: as in `Attention`.
        where: a pattern on the grid, or its text, such as ``"window((7, 7))"``.
        grid: rows and columns of the patches; three numbers for video.
        special: tokens before the patches.

    Raises:
        ValueError: a pattern that does not parse or fit the grid, a negative number, a causal use; other lengths than
            the grid's, or padding, when it runs.

    >>> layer = GridAttention(32, 4, where="window((3, 3))", grid=(4, 5), special=1)
    >>> layer(torch.randn(2, 21, 32)).shape
    torch.Size([2, 21, 32])
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "special tokens see all patches",
        "noncausal-cross": "queries and keys need one grid",
        "causal-cross": "queries and keys need one grid",
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        where: Pattern | str,
        grid: Sequence[int],
        special: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.pattern = parse(where) if isinstance(where, str) else where
        self.grid, self.special = tuple(grid), special
        if special < 0:
            raise ValueError(f"special must not be negative; it was {special}")
        self.pattern.check(self.grid)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        tokens = self.special + prod(self.grid)
        if q.shape[2] != tokens or k.shape[2] != tokens:
            raise ValueError(
                f"a grid of {self.grid} with {self.special} special tokens has {tokens}; it was {k.shape[2]}"
            )
        if call.real is not None:
            raise ValueError("padding cannot be combined with a grid of patches")
        first, rest = slice(self.special), slice(self.special, None)
        on_q, on_k, on_v = (t[:, :, rest].unflatten(2, self.grid) for t in (q, k, v))
        out, lse = self.attend(on_q, on_k, on_v, self.pattern, call, return_lse=True)
        patches: tuple[Tensor, Tensor] = (out.flatten(2, -2), lse.flatten(2))
        if not self.special:
            return patches[0]
        special = self.attend(q[:, :, rest], k[:, :, first], v[:, :, first], Full(), call, return_lse=True)
        own = self.attend(q[:, :, first], k, v, Full(), call)
        return torch.cat([own, merge([patches, special])], 2)

    def extra_repr(self) -> str:
        return f"where={str(self.pattern)!r}, grid={self.grid}, special={self.special}"
