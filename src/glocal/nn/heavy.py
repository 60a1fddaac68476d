"""Decoding with the tokens that have received most attention: any trained full attention, a small cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from glocal.cache import Cache, HeavyHitters
from glocal.nn.frame import Attention, Call
from glocal.patterns import Causal

__all__ = ["HeavyHitterAttention"]

_FUTURE = "tokens are dropped by the attention that they received from the queries so far"


class HeavyHitterAttention(Attention):
    """Causal attention that decodes with the ``heavy`` tokens of most attention so far and the ``recent`` last ones.

    It has the parameters of `Attention`: load those of a layer that was trained in full. Its cache is
    `glocal.cache.HeavyHitters` (H2O; Zhang et al., 2023, arXiv 2306.14048). What a query sees depends on what earlier
    queries attended to, so the parallel form *is* the replay of decoding, token after token; it is full attention where
    ``heavy + recent`` covers the sequence. Train with `Attention`.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        heavy, recent: past tokens that a query sees of each kind, besides itself.
        causal: only True.

    Raises:
        ValueError: a negative number of tokens, a use but causal self-attention, padding, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import Attention, HeavyHitterAttention
    >>> full = Attention(64, 4, causal=True)
    >>> layer = HeavyHitterAttention(64, 4, heavy=4, recent=4)
    >>> layer.load_state_dict(full.state_dict())
    <All keys matched successfully>
    >>> cache, x = layer.new_cache(), torch.randn(1, 20, 64)
    >>> steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(20)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5), cache.kept()[0].k.shape[2]
    (True, 9)
    """

    uses = ("causal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "noncausal-self": _FUTURE,
        "noncausal-cross": _FUTURE,
        "causal-cross": "there are no queries before the last ones, whose attention would tell what to keep",
    }
    tiny: ClassVar[dict[str, Any]] = {"heavy": 2, "recent": 2}
    no_padding: ClassVar[bool] = True

    def __init__(
        self, dim: int, num_heads: int, *, heavy: int = 256, recent: int = 256, causal: bool = True, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        HeavyHitters(heavy, recent)  # its errors, now
        self.heavy, self.recent = heavy, recent

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.real is not None:
            raise ValueError("keys (padding) cannot be combined with a policy that drops tokens")
        if k.shape[2:-1].numel() <= self.heavy + self.recent + 1:
            out: Tensor = self.attend(q, k, v, Causal(), call)
            return out
        replayed = call._replace(cache=self.new_cache())
        steps = [slice(t, t + 1) for t in range(q.shape[2])]
        return torch.cat([self.decode(q[:, :, t], k[:, :, t], v[:, :, t], replayed) for t in steps], 2)

    def new_cache(self) -> Cache:
        return HeavyHitters(self.heavy, self.recent, scale=self.scale, softcap=self.softcap)

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        return {"queries": q}

    def extra_repr(self) -> str:
        return f"heavy={self.heavy}, recent={self.recent}"
