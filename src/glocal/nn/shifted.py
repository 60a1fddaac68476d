"""Groups of tokens, half of the heads with shifted borders: cheap tuning of a model that attends in full later."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.nn.frame import Attention, Call
from glocal.patterns import Between, Block, Causal, Pattern, PerHead, Sinks, Tokens

__all__ = ["ShiftedSparseAttention"]

_NO_CROSS = "queries and keys are cut into groups together"


class ShiftedSparseAttention(Attention):
    """Each query reads its own group of ``group_size`` tokens and the sinks; some heads have shifted groups.

    The first half of the heads cuts the sequence at multiples of the group size, the second half at half a group
    before them, so that what one half separates the other one joins (S2-Attn of LongLoRA; Chen et al., 2023, arXiv
    2309.12307). SF-Attn of SinkLoRA returns a share of the shifted heads to the first cut, and lets every query see
    the first tokens (Zhang, 2024, arXiv 2406.05678). There are no parameters: tune with it, then set ``sparse`` to
    False and the same weights attend in full. Decoding follows the setting: groups count from the first token.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        group_size: tokens of a group, an even number; the paper takes a quarter of the training length.
        unshift_ratio: share of the shifted heads that goes back, ``round(unshift_ratio * heads)`` of them, the last
            ones. 0 with ``sinks=0`` is S2-Attn.
        sinks: tokens at the start that every query sees, itself not before them; without causality they see all.
        wrap: ``"split"``: the two half groups at the ends are groups of their own. ``"leak"``: they are one group, as
            rolling the sequence makes them, so that **the first tokens see the last ones**, causal or not. It is for
            comparison only; it needs whole groups and cannot decode.
        sparse: groups, or full (causal) attention; may be set at any time.

    Raises:
        ValueError: settings outside their ranges, cross-attention, ``wrap="leak"`` with a cache or a group that is not
            whole, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import ShiftedSparseAttention
    >>> layer = ShiftedSparseAttention(64, 4, group_size=16, causal=True)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    >>> layer.shifted
    (False, False, True, False)
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"group_size": 4, "unshift_ratio": 0.0, "sinks": 1}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: int = 2048,
        unshift_ratio: float = 0.5,
        sinks: int = 4,
        wrap: str = "split",
        sparse: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if group_size < 2 or group_size % 2:
            raise ValueError(f"group_size must be even and at least 2, half of it is the shift; it was {group_size}")
        if not 0 <= unshift_ratio <= 1:
            raise ValueError(f"unshift_ratio must be from 0 to 1; it was {unshift_ratio}")
        if sinks < 0:
            raise ValueError(f"sinks must not be negative; it was {sinks}")
        if wrap not in ("split", "leak"):
            raise ValueError(f"wrap must be 'split' or 'leak'; it was {wrap!r}")
        self.group_size, self.unshift_ratio, self.sinks, self.wrap = group_size, unshift_ratio, sinks, wrap
        self.sparse = sparse

    @property
    def shifted(self) -> tuple[bool, ...]:
        """Which heads have shifted groups."""
        first = self.num_heads // 2
        last = self.num_heads - round(self.unshift_ratio * (self.num_heads - first))
        return tuple(first <= head < last for head in range(self.num_heads))

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not self.sparse:
            return super().where(q, k, call)
        length = k.shape[2:-1].numel()
        if self.wrap == "leak":
            if call.cache is not None:
                raise ValueError("wrap='leak' shows the first tokens the last ones: use wrap='split' with a cache")
            if length % self.group_size:
                raise ValueError(
                    f"wrap='leak' needs a multiple of group_size {self.group_size} tokens; it was {length}"
                )
        half = self.group_size // 2
        cuts = [self._with_sinks(Block(self.group_size, half if shifted else 0), length) for shifted in self.shifted]
        if self.wrap == "leak":
            cuts = [cut | self._ends(length, q.device) if s else cut for cut, s in zip(cuts, self.shifted, strict=True)]
        return PerHead(cuts)

    def _with_sinks(self, cut: Pattern, length: int) -> Pattern:
        if self.causal:
            return cut & Causal() | Sinks(self.sinks)
        return cut | Tokens(range(min(self.sinks, length)))

    def _ends(self, length: int, device: torch.device) -> Pattern:
        """What the group that wraps around adds: its first tokens come from the end of the sequence."""
        half, at = self.group_size // 2, torch.arange(length, device=device)
        wrapped: Pattern = Between(torch.full_like(at, length - half), torch.where(at < half, length, 0))
        if not self.causal:
            wrapped = wrapped | Between(torch.zeros_like(at), torch.where(at >= length - half, half, 0))
        return wrapped

    def extra_repr(self) -> str:
        text = f"group_size={self.group_size}, unshift_ratio={self.unshift_ratio}, sinks={self.sinks}"
        return text + f", wrap={self.wrap!r}, sparse={self.sparse}"
