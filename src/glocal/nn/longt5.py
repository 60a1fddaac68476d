"""LongT5's encoder attention: a local window, and one summed token for every block, made anew in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from glocal.attention import merge
from glocal.condense import block_sums
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Sliding
from glocal.patterns.boxes import Grid
from glocal.scores import Score, T5Buckets
from glocal.shapes import Float

__all__ = ["LongT5Attention"]


class LongT5Attention(Attention):
    """Each token sees the tokens at most ``radius`` away and a global token for each block, under one softmax.

    A global token is the normalised sum of a block of the layer's input, with the keys and values of ordinary tokens;
    tokens after the last complete block belong to it. Biases are T5's buckets: of the offset for tokens, of the
    distance in blocks for global tokens. There is no scale. Guo et al., 2021, arXiv 2112.07916.

    Padding joins no block; the tokens after the last complete block before a row's end belong to that block. What
    padding itself gives is finite, and of no use.

    Args:
        dim, num_heads: as in `Attention`, with its options except ``rope`` and ``qk_norm``.
        radius: how far a token sees to either side.
        global_block_size: tokens of a block; no global tokens where None.
        bias: ``Embedding(buckets, num_heads)``, given to share one among layers; an own one where None.
        side_bias: the same for global tokens.
        num_buckets, max_distance: of own biases, as in `glocal.scores.T5Buckets`.
        eps: of the norm of global tokens.

    Raises:
        ValueError: a size that is too small, a bias of other heads, a causal or cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import LongT5Attention
    >>> layer = LongT5Attention(64, 4, radius=15, global_block_size=16)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "windows reach to the right and sums of blocks hold tokens of the future",
        "noncausal-cross": "a window and blocks need one index for queries and keys",
        "causal-cross": "a window and blocks need one index for queries and keys",
    }
    tiny: ClassVar[dict[str, Any]] = {"radius": 2, "global_block_size": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        radius: int = 127,
        global_block_size: int | None = 16,
        bias: nn.Embedding | None = None,
        side_bias: nn.Embedding | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        for name in ("rope", "qk_norm"):
            if options.get(name) is not None:
                raise ValueError(f"{name} must be None: positions are T5's buckets; it was {options[name]!r}")
        super().__init__(dim, num_heads, **({"scale": 1.0} | options))
        if radius < 0:
            raise ValueError(f"radius must be at least 0; it was {radius}")
        if global_block_size is not None and global_block_size < 1:
            raise ValueError(f"global_block_size must be at least 1, or None; it was {global_block_size}")
        self.radius, self.global_block_size, self.max_distance = radius, global_block_size, max_distance
        self.bias = bucket_table(bias, num_buckets, num_heads, max_distance)
        if global_block_size is not None:
            self.side_bias = bucket_table(side_bias, num_buckets, num_heads, max_distance)
            self.side_norm = nn.RMSNorm(dim, eps=eps)

    def score(self, call: Call) -> Score:
        return T5Buckets(self.bias.weight, max_distance=self.max_distance)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        near, size = Sliding(self.radius, self.radius), self.global_block_size
        if size is None or q.shape[2] < size:
            alone: Tensor = self.attend(q, k, v, near, call)
            return alone
        return merge([self.attend(q, k, v, near, call, return_lse=True), self.side(q, call, size)])

    def summaries(
        self, x: Float[Tensor, "B N dim"], real: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Global tokens ``(B, N // size, dim)``, which of them exist (None: all), complete blocks a row ``(B,)``."""
        wide = x if x.dtype == torch.float64 else x.float()  # a sum in float16 may overflow before it is normalised
        length, count = x.shape[1], x.shape[1] // size
        exist, complete = None, torch.full((x.shape[0],), count, device=x.device)
        if real is None:
            sums = block_sums(wide, size)
        else:
            complete = (real * torch.arange(1, length + 1, device=x.device)).amax(1) // size
            # One more channel counts the real tokens.
            wide = pad(wide, (0, 1), value=1.0).masked_fill(~real[..., None], 0)
            sums = block_sums(pad(wide, (0, 0, 0, -length % size)), size)
            number = torch.arange(sums.shape[1], device=x.device)
            rest = sums * (number == complete[:, None])[..., None]  # after the last complete block: moves into it
            sums = (sums + pad(rest[:, 1:], (0, 0, 0, 1)))[:, :count]
            exist = (number[:count] < complete[:, None]) & (sums[..., -1] > 0)
            sums = sums[..., :-1]
        normed = rms_norm(sums, sums.shape[-1:], eps=self.side_norm.eps).to(x.dtype)
        return normed * self.side_norm.weight, exist, complete

    def side(self, q: Tensor, call: Call, size: int) -> tuple[Tensor, Tensor]:
        """Attention to the global tokens alone, ``out (B, H, N, D)`` and ``lse (B, H, N)``, for `merge`.

        The bias depends on the query's block only. So queries form a grid of blocks and places, keys one of blocks
        and a single place, and the bias is a table over that grid.
        """
        length = q.shape[2]
        tokens, exist, complete = self.summaries(call.x, call.real, size)
        k, v = (self.heads(proj(tokens), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        call = call._replace(real=exist)
        blocks = pad(q, (0, 0, 0, -length % size)).unflatten(2, (-1, size))
        bias = _BlockBuckets(self.side_bias.weight, self.max_distance)
        out, lse = self.attend(blocks, k.unsqueeze(3), v.unsqueeze(3), Full(), call, bias=bias, return_lse=True)
        if length % size or exist is not None:
            # The tokens after a row's last complete block count their distances from it.
            at = complete.clamp(max=blocks.shape[2] - 1)
            rest = blocks[torch.arange(len(at), device=at.device), :, at]
            offset = torch.arange(k.shape[2], device=at.device) - (complete - 1).clamp(min=0)[:, None]
            table = T5Buckets(bias.values, max_distance=self.max_distance).table(k.shape[2:3], k.shape[2:3])
            own = table[:, offset + k.shape[2] - 1].transpose(0, 1).unsqueeze(2)
            rest_out, rest_lse = self.attend(rest, k, v, Full(), call, bias=own, return_lse=True)
            here = (torch.arange(blocks.shape[2], device=at.device) == at[:, None])[:, None, :, None]
            out = torch.where(here[..., None], rest_out.unsqueeze(2), out)
            lse = torch.where(here, rest_lse.unsqueeze(2), lse)
        return out.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length]

    def extra_repr(self) -> str:
        return f"radius={self.radius}, global_block_size={self.global_block_size}"


@dataclass(frozen=True, eq=False)
class _BlockBuckets(Score):
    """T5's buckets of the distance in blocks, on a grid of blocks and places."""

    values: Tensor
    max_distance: int

    def table(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        # Block 0 of the queries is block 0 of the keys, also where there is one more: hence the exchanged grids.
        blocks = T5Buckets(self.values, max_distance=self.max_distance).table(grid_k[:1], grid_q[:1])
        return blocks.unsqueeze(-1).expand(-1, -1, grid_q[1] + grid_k[1] - 1)


def bucket_table(given: nn.Embedding | None, num_buckets: int, num_heads: int, max_distance: int) -> nn.Embedding:
    """A table of biases by bucket and head: the one that was given, or a new one, zero."""
    if given is None:
        if num_buckets < 4:
            raise ValueError(f"num_buckets must be at least 4; it was {num_buckets}")
        given = nn.Embedding(num_buckets, num_heads)
        nn.init.zeros_(given.weight)
    if given.embedding_dim != num_heads:
        raise ValueError(f"bias must have one column a head, {num_heads}; it had {given.embedding_dim}")
    if max_distance <= given.num_embeddings // 2:
        raise ValueError(
            f"max_distance must be more than half of the {given.num_embeddings} buckets; it was {max_distance}"
        )
    return given
