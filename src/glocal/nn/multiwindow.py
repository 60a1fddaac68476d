"""Multi-window attention: each head has its own partition into blocks, some heads see everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.nn.frame import Attention, Call
from glocal.patterns import Block, Causal, Full, Pattern, PerHead
from glocal.scores import RelativePosition, Score

__all__ = ["MultiWindowAttention", "divisor_windows"]

_NO_CROSS = "blocks align queries and keys of one sequence"


def divisor_windows(tokens: int, num_heads: int) -> tuple[int, ...]:
    """The paper's windows: the divisors of ``tokens`` between 1 and itself, the other heads global (0).

    Raises:
        ValueError: more divisors than heads.

    >>> divisor_windows(250, 8)
    (2, 5, 10, 25, 50, 125, 0, 0)
    """
    found = [w for w in range(2, tokens) if tokens % w == 0]
    if len(found) > num_heads:
        raise ValueError(f"num_heads must be at least {len(found)}, the divisors of {tokens}; it was {num_heads}")
    return (*found, *(0,) * (num_heads - len(found)))


class MultiWindowAttention(Attention):
    """Head ``h`` attends inside blocks of ``windows[h]`` tokens that do not overlap; 0 is a global head.

    A head with a window ``w`` has a bias of ``2 w - 1`` learned values, one an offset; a global head has none. The
    last block is short where ``w`` does not divide the length. Yadav et al., 2023, arXiv 2306.00561.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        windows: ``num_heads`` sizes, 0 for a global head; `divisor_windows` gives the paper's.
        shift: blocks begin ``w // 2`` tokens later, as in every other layer of Swin; the border is cut, not rolled.

    Raises:
        ValueError: not one size a head, a size below 0, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import MultiWindowAttention
    >>> layer = MultiWindowAttention(64, 8, windows=(2, 5, 10, 25, 50, 125, 0, 0), qkv_bias=True)
    >>> layer(torch.randn(1, 250, 64)).shape, [len(values) for values in layer.bias]
    (torch.Size([1, 250, 64]), [3, 9, 19, 49, 99, 249])
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"windows": (3, 0)}

    def __init__(
        self, dim: int, num_heads: int, *, windows: Sequence[int], shift: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        windows = tuple(windows)
        if len(windows) != num_heads or any(isinstance(w, bool) or not isinstance(w, int) or w < 0 for w in windows):
            raise ValueError(f"windows must be {num_heads} integers, 0 for a global head; it was {windows!r}")
        self.windows, self.shift = windows, shift
        # Entry o of a head's bias is for the offset key - query = o - (w - 1).
        self.bias = nn.ParameterList(nn.init.trunc_normal_(torch.empty(2 * w - 1), std=0.02) for w in windows if w)

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return PerHead([self._head(w) for w in self.windows])

    def _head(self, window: int) -> Pattern:
        if not window:
            return Causal() if self.causal else Full()
        blocks = Block(window, shift=window // 2 if self.shift else 0)
        return blocks & Causal() if self.causal else blocks

    def score(self, call: Call) -> Tensor | Score | None:
        reach = max(self.windows)
        if not reach:
            return None
        tables = iter(self.bias)
        # One table over offsets for all heads, zero where a head's own does not reach.
        rows = [pad(next(tables), (reach - w, reach - w)) if w else self._none(reach) for w in self.windows]
        return RelativePosition(torch.stack(rows))

    def _none(self, reach: int) -> Tensor:
        return torch.zeros(2 * reach - 1, dtype=self.q_proj.weight.dtype, device=self.q_proj.weight.device)

    def extra_repr(self) -> str:
        return f"windows={self.windows}, shift={self.shift}"
