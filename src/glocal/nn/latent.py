"""Latent attention: keys and values come from a narrow latent, which is all that a cache keeps."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from glocal.cache import Cache, LatentCache
from glocal.nn.frame import Attention, Call
from glocal.nn.rope import Rope

__all__ = ["LatentAttention"]


class LatentAttention(Attention):
    """Multi-head latent attention (MLA), and grouped latent attention (GLA) with more than one latent.

    A token becomes a normalised latent of ``rank`` channels, and one rotary key that all heads share. Each head makes
    its key and its value from the latent of its group by a matrix of its own. Two forms give the same: *decompressed*,
    which makes keys and values; and *absorbed*, which takes the key matrix into the query and the value matrix behind
    the sum, so that it attends to the latents themselves, as grouped-query attention with ``num_groups`` key heads.

    MLA: DeepSeek-AI, 2024, arXiv 2405.04434. GLA: Zadouri et al., 2025, arXiv 2505.21523.

    Args:
        dim, num_heads: as in `Attention`, with all its options but ``num_kv_heads`` and ``qk_norm``.
        rank: channels of a latent.
        num_groups: latents of a token, a divisor of ``num_heads``.
        head_dim: channels of a head's query and key that come from the latent.
        rope_dim: channels of the rotary key, beside them; half of ``head_dim`` where None.
        v_head_dim: channels of a head's value; ``head_dim`` where None.
        q_rank: channels of a latent that queries come from; they come from ``x`` where None.
        absorb: take one form always; where None, a query alone (decoding) is absorbed and others are not.

    Raises:
        ValueError: a size below 1, groups that do not divide, another mechanism's `make` or `share`, or what
            `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import LatentAttention, Rope
    >>> layer, x = LatentAttention(64, 4, rank=24, rope_dim=8, rope=Rope(), causal=True), torch.randn(1, 10, 64)
    >>> cache = layer.new_cache()
    >>> steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(10)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5), cache.nbytes == 10 * (24 + 8) * 4
    (True, True)
    """

    tiny: ClassVar[dict[str, Any]] = {"rank": 6, "rope_dim": 4, "rope": Rope()}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 512,
        num_groups: int = 1,
        rope_dim: int | None = None,
        v_head_dim: int | None = None,
        q_rank: int | None = None,
        absorb: bool | None = None,
        **options: Any,
    ) -> None:
        for name in ("num_kv_heads", "qk_norm"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} is not for latents, which have num_groups and a norm; it was {options[name]!r}"
                )
        if type(self).make is not Attention.make or type(self).share is not Attention.share:
            raise ValueError(
                f"{type(self).__name__} combines latents with a mechanism that acts on keys and values of each head, "
                f"which latents do not make before they attend"
            )
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"num_groups must divide num_heads {num_heads}; it was {num_groups}")
        super().__init__(dim, num_heads, **(options | {"num_kv_heads": num_groups}))
        self.rope_dim = self.head_dim // 4 * 2 if rope_dim is None else rope_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        self.rank, self.num_groups, self.absorb = rank, num_groups, absorb
        for name, value, least in (
            ("rank", rank, 1),
            ("rope_dim", self.rope_dim, 0),
            ("v_head_dim", self.v_head_dim, 1),
            ("q_rank", 1 if q_rank is None else q_rank, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; it was {value}")
        if options.get("scale") is None:
            self.scale = (self.head_dim + self.rope_dim) ** -0.5
        bias, width = self.q_proj.bias is not None, num_heads * (self.head_dim + self.rope_dim)
        # k_proj makes the latents and the rotary key; up_proj, by heads, the keys and the values.
        self.k_proj = nn.Linear(self.kv_dim, num_groups * rank + self.rope_dim, bias=bias)
        del self.v_proj
        self.kv_norm = nn.RMSNorm(rank, eps=1e-6)
        self.up_proj = nn.Linear(rank, num_heads * (self.head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, dim, bias=self.o_proj.bias is not None)
        self.q_down: nn.Module = nn.Identity()
        if q_rank is not None:
            self.q_down = nn.Sequential(nn.Linear(dim, q_rank, bias=bias), nn.RMSNorm(q_rank, eps=1e-6))
        self.q_proj = nn.Linear(dim if q_rank is None else q_rank, width, bias=bias and q_rank is None)

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(B, H, *grid_q, head_dim + rope_dim)``, latents followed by the rotary key, and latents alone."""
        q, q_rope = self.heads(self.q_proj(self.q_down(x)), self.num_heads).split((self.head_dim, self.rope_dim), -1)
        latents, k_rope = self.k_proj(context).split((self.num_groups * self.rank, self.rope_dim), -1)
        latent = self.kv_norm(self.heads(latents, self.num_groups))
        k_rope = self.rotate(k_rope.unsqueeze(1), at_k).expand(*latent.shape[:-1], -1)
        return torch.cat([q, self.rotate(q_rope, at_q)], -1), torch.cat([latent, k_rope], -1), latent

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if self.absorb or (self.absorb is None and q.shape[2:-1].numel() == 1):
            return self.values(super().mix(self.absorbed(q), k, v, call))
        return super().mix(q, *self.decompressed(k, v), call)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self.values(super().decode(self.absorbed(q), k, v, call))

    def decompressed(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of each head, ``(B, H, *grid_k, ...)``, from those of `project`."""
        keys, values = (torch.einsum("bu...r,uger->bug...e", v, up).flatten(1, 2) for up in self._up())
        k_rope = k[:, :1, ..., self.rank :].expand(*keys.shape[:-1], -1)
        return torch.cat([keys, k_rope], -1), values

    def absorbed(self, q: Tensor) -> Tensor:
        """Queries that meet latents, ``(B, H, *grid_q, rank + rope_dim)``."""
        q, q_rope = q.split((self.head_dim, self.rope_dim), -1)
        met = torch.einsum("bug...e,uger->bug...r", q.unflatten(1, (self.num_groups, -1)), self._up()[0])
        return torch.cat([met.flatten(1, 2), q_rope], -1)

    def values(self, mixed: Tensor) -> Tensor:
        """Values of each head from mixed latents: ``(B, H, *grid_q, rank)`` to ``(B, H, *grid_q, v_head_dim)``."""
        grouped = mixed.unflatten(1, (self.num_groups, -1))
        return torch.einsum("bug...r,uger->bug...e", grouped, self._up()[1]).flatten(1, 2)

    def _up(self) -> tuple[Tensor, Tensor]:
        """Key and value matrices, ``(groups, heads of a group, channels, rank)``."""
        weight = self.up_proj.weight.view(self.num_groups, -1, self.head_dim + self.v_head_dim, self.rank)
        return cast(tuple[Tensor, Tensor], weight.split((self.head_dim, self.v_head_dim), 2))

    def new_cache(self) -> Cache:
        return LatentCache(super().new_cache())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, num_groups={self.num_groups}, rope_dim={self.rope_dim}"
