"""MHLA for language: causal linear attention with a mixture of the past's blocks for every block of queries."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.linear import Feature
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.nn.mhla import Positions, SiLULinear, check, grouped, turn
from glocal.nn.rope import Rope
from glocal.shapes import Bool, Float

__all__ = ["BlockSums", "CausalMultiHeadLinearAttention", "causal_multi_head_linear"]


class BlockSums(NamedTuple):
    """What causal multi-head linear attention keeps of the past; it grows by one sum a block."""

    done: Tensor
    """Sums of key features times values of the blocks that are full, ``(B, Hkv, blocks, F, E)``."""
    running: Tensor
    """The same of the block that is not, ``(B, Hkv, F, E)``."""


def causal_multi_head_linear(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N E"],
    mixing: Float[Tensor, "m m"],
    *,
    chunk: int = 64,
    scale: float | None = None,
    feature: Feature = torch.relu,
    keys: Bool[Tensor, "B N"] | None = None,
    rope: Rope | None = None,
    positions: Positions = (None, None),
    start: int = 0,
    state: BlockSums | None = None,
) -> tuple[Float[Tensor, "B H N E"], BlockSums]:
    """``o_i = scale sum_(j <= i) M_ij f(q_i) f(k_j) v_j``, where M is that of the tokens' blocks; nothing divides.

    MHLA's form for language, 2026, arXiv 2601.07832. All at once, or in pieces of any length with ``state``.

    Args:
        q: ``(B, H, N, D)``.
        k: ``(B, Hkv, N, D)``, H a multiple of Hkv.
        v: ``(B, Hkv, N, E)``.
        mixing: M, ``(m, m)``, of which the upper triangle is not read; there may be ``m * chunk`` tokens.
        chunk: tokens of a block.
        scale: ``D ** -0.5`` where None.
        feature: from ``(..., D)`` to ``(..., F)``.
        keys: which keys are real, booleans ``(B, N)``.
        rope: rotates the features.
        positions: of queries and keys, for ``rope``.
        start: tokens before these, whose sums are in ``state``.
        state: of the call that ended there.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these tokens.

    Raises:
        ValueError: shapes that do not fit, more tokens than ``mixing`` has blocks for, a state of another length.

    >>> q, k, v = torch.randn(3, 1, 2, 10, 4).unbind()
    >>> whole, _ = causal_multi_head_linear(q, k, v, torch.ones(3, 3), chunk=4)
    >>> first, state = causal_multi_head_linear(q[:, :, :7], k[:, :, :7], v[:, :, :7], torch.ones(3, 3), chunk=4)
    >>> last = (t[:, :, 7:] for t in (q, k, v))
    >>> then, _ = causal_multi_head_linear(*last, torch.ones(3, 3), chunk=4, start=7, state=state)
    >>> torch.allclose(torch.cat([first, then], 2), whole, atol=1e-5)
    True
    """
    check(q, k, v, mixing, keys)
    length, end = q.shape[2], start + q.shape[2]
    if q.dim() != 4 or k.shape[2] != length:
        raise ValueError(f"k must have the {length} tokens of q, in a row; it was {tuple(k.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; it was {chunk}")
    if end > len(mixing) * chunk:
        raise ValueError(f"mixing has {len(mixing)} blocks of {chunk} tokens, {len(mixing) * chunk}; there were {end}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    fq, fk, v = feature(q.to(dtype)), feature(k.to(dtype)), v.to(dtype)
    fq = fq * (q.shape[-1] ** -0.5 if scale is None else scale)
    if keys is not None:
        fk = fk * keys[:, None, :, None]
    fq, fk = (turn(t, rope, at) for t, at in zip((fq, fk), positions, strict=True))
    first, inside = divmod(start, chunk)
    if state is None:
        empty = fk.new_zeros(*k.shape[:2], 0, fk.shape[-1], v.shape[-1])
        state = BlockSums(empty, empty.sum(2))
    if state.done.shape[2] != first:
        raise ValueError(f"state must hold {first} blocks where start is {start}; it held {state.done.shape[2]}")
    if inside + length <= chunk:  # a step of decoding
        fq, fk, v = (t[:, :, None] for t in (fq, fk, v))
    else:
        fq, fk, v = (pad(t, (0, 0, inside, -end % chunk)).unflatten(2, (-1, chunk)) for t in (fq, fk, v))
    sums = fk.mT @ v  # (B, Hkv, new blocks, F, E)
    sums = torch.cat([sums[:, :, :1] + state.running[:, :, None], sums[:, :, 1:]], 2)
    count = sums.shape[2]
    rows = mixing.to(dtype)[first : first + count, : first + count]
    own, before = rows.diagonal(first), rows.tril(first - 1)
    mixed = torch.einsum("ib,nhbfe->nhife", before[:, :first], state.done)
    mixed = mixed + torch.einsum("ib,nhbfe->nhife", before[:, first:], sums)
    mixed = torch.cat([mixed[:, :, :1] + own[0] * state.running[:, :, None], mixed[:, :, 1:]], 2)
    fq = grouped(fq, k.shape[1])
    scores = (fq @ fk[:, :, None].mT).tril() * own[:, None, None]
    out = (fq @ mixed[:, :, None] + scores @ v[:, :, None]).flatten(1, 2).flatten(2, 3)
    out = out[:, :, inside : inside + length] if out.shape[2] > length else out
    full = end // chunk - first  # of the new blocks
    done = torch.cat([state.done, sums[:, :, :full]], 2) if full else state.done
    running = sums[:, :, full] if full < count else torch.zeros_like(state.running)
    return out.to(q.dtype), BlockSums(done, running)


class CausalMultiHeadLinearAttention(LinearAttention):
    """MHLA for language (2026, arXiv 2601.07832): a decoder keeps one sum for each block of the past.

    Features are ReLU, then rotated; no sum divides, an RMSNorm of each head with a gate of SiLU stands in its place.

    Args:
        dim, num_heads: as in `Attention`.
        chunk: tokens of a block.
        max_blocks: how many there may be; ``chunk * max_blocks`` tokens in all.
        value_dim: channels of a head's values; ``head_dim`` where None. The published models have half as many channels
            of queries and keys: ``head_dim=dim // num_heads // 2, value_dim=dim // num_heads``.
        gate: whether there is the gate.
        causal: always.
        options: as in `Attention`.

    Entries of the mixing matrix are held between 1e-5 and 1; gradients pass as if they were not.

    Raises:
        ValueError: settings that do not fit each other, more tokens than there are blocks for.

    >>> layer = CausalMultiHeadLinearAttention(32, 2, chunk=8, max_blocks=4)
    >>> cache, x = layer.new_cache(), torch.randn(1, 20, 32)
    >>> steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(20)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5), cache.state.done.shape[2]
    (True, 2)
    """

    uses = ("causal-self",)
    _WHY = "its blocks are those of one sequence, in which a query sees the past"
    refuses: ClassVar[dict[str, str]] = {
        "noncausal-self": "that is MultiHeadLinearAttention",
        "noncausal-cross": _WHY,
        "causal-cross": _WHY,
    }
    tiny: ClassVar[dict[str, Any]] = {"chunk": 3, "max_blocks": 6}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        chunk: int = 64,
        max_blocks: int = 32,
        value_dim: int | None = None,
        gate: bool = True,
        causal: bool = True,
        **options: Any,
    ) -> None:
        for name, value in (("chunk", chunk), ("max_blocks", max_blocks), ("value_dim", value_dim)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        super().__init__(dim, num_heads, feature=torch.relu, causal=causal, **options)
        self.chunk, self.max_blocks = chunk, max_blocks
        value_dim = self.head_dim if value_dim is None else value_dim
        if value_dim != self.head_dim:
            self.v_proj = nn.Linear(self.kv_dim, self.num_kv_heads * value_dim, bias=options.get("qkv_bias", False))
            self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=options.get("out_bias", False))
        self.out_norm = nn.RMSNorm(value_dim, eps=1e-6)
        self.g_proj = SiLULinear(dim, num_heads * value_dim, bias=options.get("qkv_bias", False)) if gate else None
        share = 1 / torch.arange(1, max_blocks + 1)
        self.mixing = nn.Parameter(share[:, None].expand(-1, max_blocks).tril())

    def rotate(self, t: Tensor, at: Tensor | None) -> Tensor:
        """Not before the features are taken."""
        return t

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`causal_multi_head_linear` and the norm."""
        mixing = self.mixing + (self.mixing.clamp(1e-5, 1) - self.mixing).detach()
        start = 0 if call.cache is None else call.cache.seen
        options: dict[str, Any] = dict(chunk=self.chunk, scale=self.scale, keys=call.real, start=start, state=state)
        out, state = causal_multi_head_linear(q, k, v, mixing, rope=self.rope, positions=call.at, **options)
        return self.out_norm(out), state

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, max_blocks={self.max_blocks}"
