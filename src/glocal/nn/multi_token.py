"""Multi-token attention: scores and weights are convolved over neighbouring queries and keys, and mixed over heads."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.cache import Cache, QueryCache
from glocal.nn.convolved_scores import kernel_reach, multi_token_attend
from glocal.nn.frame import Attention, Call

__all__ = ["MultiTokenAttention"]


class MultiTokenAttention(Attention):
    """Attention that can look for several tokens together: `multi_token_attend`, then a norm and a gate a head.

    Kernels and mixing start as the identity, so that up to norm and gate it starts as `Attention`. Without
    convolutions and mixing it is `Attention` with norm and gate, on any backend; otherwise weights are formed tile by
    tile, which no backend does. It has no cross form. Over both sides of a query it is ours; the paper has the causal
    one. Decoding keeps all tokens and the queries of the last few (`QueryCache`): ``query_kernel - 1`` for each of the
    two convolutions, as weights depend on earlier weights, and those on earlier scores. Golovneva et al., 2025, arXiv
    2504.00927; in their models every fourth layer has convolutions, each the rest.

    Args:
        dim, num_heads: as in `Attention`.
        query_kernel, key_kernel: queries and keys of the convolutions' kernels, the latter odd.
        convolve: which of ``"scores"`` and ``"weights"`` are convolved.
        mix_heads: which of ``"scores"`` and ``"weights"`` are mixed over heads.
        group: heads that mix weights with each other, a divisor of ``num_heads``; all where None.
        head_norm: RMS norm over the channels of each head, with one weight for all heads.
        depth: number of the layer in its network, from 0, by which the norm is multiplied with
            ``0.2 + 0.6 exp(-0.3 depth)``; with 1 where None, as in the released models.
        head_gate: multiplies each head by the sigmoid of a projection of itself to one number.
        tile_size: as in `multi_token_attend`.
        options: as in `Attention`, without softcap and backend where there are convolutions or mixing.

    Weight decay would pull the identity to zero: `glocal.nn.no_weight_decay` lists what to leave out of it.

    Raises:
        ValueError: sizes that do not fit, an input that is no sequence, a bias on the scores, or what `Attention`
            refuses.

    >>> import torch
    >>> from glocal.nn import MultiTokenAttention
    >>> layer = MultiTokenAttention(64, 4, query_kernel=3, key_kernel=5, causal=True)
    >>> layer(torch.randn(2, 20, 64)).shape, layer.score_kernel.shape
    (torch.Size([2, 20, 64]), torch.Size([4, 3, 5]))
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("noncausal-cross", "causal-cross"), "it is defined where queries and keys are the same tokens"
    )
    tiny: ClassVar[dict[str, Any]] = {"query_kernel": 3, "key_kernel": 3}
    undecayed: tuple[str, ...] = ("score_kernel", "weight_kernel", "score_mix", "weight_mix")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        query_kernel: int = 6,
        key_kernel: int = 11,
        convolve: Collection[str] = ("scores", "weights"),
        mix_heads: Collection[str] = ("scores", "weights"),
        group: int | None = None,
        head_norm: bool = True,
        depth: int | None = None,
        head_gate: bool = True,
        tile_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if query_kernel < 1:
            raise ValueError(f"query_kernel must be at least 1; it was {query_kernel}")
        if key_kernel < 1 or key_kernel % 2 == 0:
            raise ValueError(f"key_kernel must be odd; it was {key_kernel}")
        for name, chosen in (("convolve", convolve), ("mix_heads", mix_heads)):
            if isinstance(chosen, str) or not set(chosen) <= {"scores", "weights"}:
                raise ValueError(f"{name} must be of 'scores' and 'weights'; it was {chosen!r}")
        group = num_heads if group is None else group
        if group < 1 or num_heads % group:
            raise ValueError(f"group must divide num_heads {num_heads}; it was {group}")
        if depth is not None and (depth < 0 or not head_norm):
            raise ValueError(f"depth must be at least 0, and is of the norm; it was {depth}, head_norm {head_norm}")
        if tile_size is not None and tile_size < 1:
            raise ValueError(f"tile_size must be at least 1 or None; it was {tile_size}")
        self.query_kernel, self.key_kernel, self.tile_size = query_kernel, key_kernel, tile_size
        self.plain = not convolve and not mix_heads
        if not self.plain and (self.softcap is not None or self.backend != "auto"):
            raise ValueError(
                "softcap must be None and backend 'auto' where scores or weights are convolved or mixed; they were "
                f"{self.softcap} and {self.backend!r}"
            )
        kernel, square = (num_heads, query_kernel, key_kernel), (num_heads // group, group, group)
        self.score_kernel = _parameter(kernel if "scores" in convolve else None)
        self.weight_kernel = _parameter(kernel if "weights" in convolve else None)
        self.score_mix = _parameter((num_heads, num_heads) if "scores" in mix_heads else None)
        self.weight_mix = _parameter(square if "weights" in mix_heads else None)
        self.undecayed = tuple(name for name in type(self).undecayed if getattr(self, name) is not None)
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if head_norm else None
        self.norm_scale = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        self.head_gate = nn.Linear(self.head_dim, 1) if head_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        for kernel in (self.score_kernel, self.weight_kernel):
            if kernel is not None:
                nn.init.zeros_(kernel)
                with torch.no_grad():
                    kernel[:, kernel_reach(kernel, self.causal)[0], self.key_kernel // 2] = 1
        for mix in (self.score_mix, self.weight_mix):
            if mix is not None:
                with torch.no_grad():
                    mix.copy_(torch.eye(mix.shape[-1], device=mix.device))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return super().mix(q, k, v, call) if self.plain else self._spread(q, k, v, call, 0)

    def _spread(self, q: Tensor, k: Tensor, v: Tensor, call: Call, halo: int) -> Tensor:
        if q.dim() != 4:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}); it was {tuple(call.x.shape)}")
        if self.score(call) is not None:
            raise ValueError("score must be None: a bias does not go with scores that are convolved")
        return multi_token_attend(
            *(q, k, v, self.where(q, k, call)),
            causal=self.causal,
            score_kernel=self.score_kernel,
            score_mix=self.score_mix,
            weight_kernel=self.weight_kernel,
            weight_mix=self.weight_mix,
            keys=call.real,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            halo=halo,
            tile_size=self.tile_size,
        )

    def combine(self, mixed: Tensor, call: Call) -> Tensor:
        mixed = super().combine(mixed, call)
        if self.head_norm is not None:
            mixed = self.head_norm(mixed) * self.norm_scale
        return mixed if self.head_gate is None else mixed * self.head_gate(mixed).sigmoid()

    def new_cache(self) -> Cache:
        """All tokens, and the queries that weights of the next one depend on."""
        if self.plain:
            return super().new_cache()
        kernels = (self.score_kernel, self.weight_kernel)
        return QueryCache(sum(kernel_reach(kernel, True)[0] for kernel in kernels))

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        if self.plain:
            return super().step(q, k, v, call, cache)
        if not isinstance(cache, QueryCache):
            raise ValueError(f"cache must be a QueryCache, of new_cache(); it was a {type(cache).__name__}")
        before = cache.queries
        cache.update(k, v, queries=q)
        (part,) = cache.kept()
        halo = 0 if before is None else before.shape[2]
        return self._spread(q if before is None else torch.cat([before, q], 2), part.k, part.v, call, halo)

    def extra_repr(self) -> str:
        return f"query_kernel={self.query_kernel}, key_kernel={self.key_kernel}"


def _parameter(shape: tuple[int, ...] | None) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape))
