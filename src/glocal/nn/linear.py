"""Linear attention as a layer: the frame's projections and uses over `glocal.linear_attend`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from glocal.cache import Cache, StateCache
from glocal.linear import Feature, linear_attend
from glocal.nn.frame import Attention, Call

__all__ = ["LinearAttention"]


class LinearAttention(Attention):
    """Attention by products of features, in time that grows with N; a decoder keeps a state of fixed size.

    Katharopoulos et al., 2020, arXiv 2006.16236. Mechanisms of this family override `products`.

    Args:
        feature: as in `glocal.linear_attend`.
        options: as in `Attention`, but for what acts on single scores: softcap, dropout.

    Raises:
        ValueError: an option that acts on single scores.

    >>> import torch
    >>> layer = LinearAttention(32, 4, causal=True)
    >>> layer(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(self, dim: int, num_heads: int, *, feature: str | Feature = "elu", **options: Any) -> None:
        for name in ("softcap", "dropout"):
            if options.get(name):
                raise ValueError(f"{name} acts on single scores, which linear attention does not have")
        super().__init__(dim, num_heads, **options)
        self.feature = feature

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """What a mechanism writes: ``(B, H, N, D)``, and the state after these keys.

        Args:
            q: ``(B, H, N, D)``, grids flattened.
            k, v: ``(B, Hkv, M, D)``.
            call: its ``real`` says which of these keys are real, ``(B, M)``.
            state: of the keys before these.
        """
        return linear_attend(
            q, k, v, feature=self.feature, causal=self.causal, keys=call.real, state=state, return_state=True
        )

    def new_cache(self) -> Cache:
        """A state of fixed size."""
        return StateCache()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Over the whole grid."""
        out, _ = self.products(q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2), call, None)
        mixed: Tensor = out.unflatten(2, q.shape[2:-1])
        return mixed

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        """Tokens that follow those in the state."""
        if not isinstance(cache, StateCache):
            raise ValueError(f"cache must be a StateCache, of new_cache(); it was a {type(cache).__name__}")
        real = None if call.real is None else call.real[:, -k.shape[2] :]
        out, cache.state = self.products(q, k, v, call._replace(real=real), cache.state)
        cache.seen += k.shape[2]
        return out
