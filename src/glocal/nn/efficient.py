"""Efficient attention: keys are normalised over tokens and queries over channels, so that values are summed first."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from glocal.linear import LinearState, check, linear_attend
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.shapes import Bool, Float

__all__ = ["EfficientAttention", "EfficientState", "context_maps", "efficient_attention"]

_NOTHING = -1e30
"""The logarithm of nothing: finite, so that differences of two of them are no NaN."""
_AT_ONCE = 1024
"""Positions whose intermediate results are held at a time in training."""


class EfficientState(NamedTuple):
    """What efficient attention keeps of the keys so far."""

    total: Tensor
    """Of ``form="softmax"`` the logarithm of the sum of ``exp(k)`` in each channel, ``(B, Hkv, D)``; of ``"scaling"``
    the number of keys, ``(B, 1, 1)``."""
    context: Tensor
    """The global context vectors: of each key channel the mean of the values by its weights, ``(B, Hkv, D, E)``."""


def efficient_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    form: str = "softmax",
    causal: bool = False,
    keys: Bool[Tensor, "B M"] | None = None,
    state: EfficientState | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H N E"], EfficientState]:
    """``o = softmax_D(q) (softmax_M(k)^T v)``: the first softmax is over channels, the second over tokens.

    Each channel of the keys makes one mean of all values, and a query mixes these D context vectors. The weights of a
    query over the tokens are at least 0 and sum to one, but are not those of softmax attention; scores have no scale.
    ``form="scaling"`` is ``o = q (k^T v) / M``, which is dot-product attention without softmax, exactly. Shen et al.,
    2018, arXiv 1812.01243. The causal form, with the softmax of the keys over what came before, is not in the paper.

    Args:
        q: queries ``(B, H, N, D)``.
        k: keys ``(B, Hkv, M, D)``, H a multiple of Hkv.
        v: values ``(B, Hkv, M, E)``.
        form: ``"softmax"`` or ``"scaling"``.
        causal: queries are the last positions of the keys, and see those at and before them: M counts these.
        keys: which keys are real, booleans ``(B, M)``; others do not count.
        state: of earlier keys.
        chunk: positions of the causal form that are compared pair by pair, up to the next power of two.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these keys. A query without keys gets zeros.

    Raises:
        ValueError: shapes that do not fit, an unknown form, more causal queries than keys.

    >>> q, k = torch.randn(2, 1, 1, 9, 4).unbind()
    >>> weights, _ = efficient_attention(q, k, torch.eye(9)[None, None])
    >>> torch.allclose(weights.sum(-1), torch.ones(1, 1, 9)), bool((weights >= 0).all())
    (True, True)
    """
    if form not in ("softmax", "scaling"):
        raise ValueError(f"form must be 'softmax' or 'scaling'; it was {form!r}")
    if form == "scaling":
        return _scaling(q, k, v, causal, keys, state, chunk)
    check(q, k, v, causal, keys, None, chunk)
    group, queries = q.shape[1] // k.shape[1], q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    fq, wide_k, wide_v = q.to(dtype).softmax(-1).unflatten(1, (-1, group)), k.to(dtype), v.to(dtype)
    if keys is not None:
        wide_k = wide_k.masked_fill(~keys[:, None, :, None], _NOTHING)
        wide_v = wide_v.masked_fill(~keys[:, None, :, None], 0)
    if state is None:
        lead = (*k.shape[:2], k.shape[3])
        state = EfficientState(wide_k.new_full(lead, _NOTHING), wide_v.new_zeros(*lead, v.shape[3]))
    if not causal:
        state = _take(state, wide_k, wide_v)
        out = fq @ state.context[:, :, None]
    else:
        fq = pad(fq, (0, 0, k.shape[2] - queries, 0))
        width = min(1 << (chunk - 1).bit_length(), 1 << max(k.shape[2] - 1, 0).bit_length())
        outs = []
        for start in range(0, k.shape[2], _AT_ONCE):
            at = slice(start, start + _AT_ONCE)
            given = (fq[:, :, :, at], wide_k[:, :, at], wide_v[:, :, at], *state, width)
            if torch.is_grad_enabled() and k.shape[2] > _AT_ONCE:  # else backward holds a dozen times the inputs
                some, *kept = checkpoint(_causal, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                some, *kept = _causal(*given)
            state = EfficientState(*kept)
            outs.append(some)
        out = torch.cat(outs, 3)[:, :, :, k.shape[2] - queries :] if outs else fq @ state.context[:, :, None]
    return out.flatten(1, 2).to(q.dtype), state


def context_maps(k: Float[Tensor, "B Hkv M D"], keys: Bool[Tensor, "B M"] | None = None) -> Float[Tensor, "B Hkv D M"]:
    """The tokens of which each context vector is the mean: one map a key channel, each summing to one.

    >>> context_maps(torch.zeros(1, 1, 4, 2))[0, 0].tolist()
    [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
    """
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    if keys is not None:
        wide = wide.masked_fill(~keys[:, None, :, None], _NOTHING)
    return wide.softmax(2).mT.to(k.dtype)


class EfficientAttention(LinearAttention):
    """Efficient attention (Shen et al., 2018, arXiv 1812.01243): a few context vectors, mixed by each query.

    The paper's module for images is ``x + layer(x)``, with ``qkv_bias=True, out_bias=True``.

    Args:
        dim, num_heads: as in `Attention`.
        form: as in `efficient_attention`.
        value_head_dim: channels of a head's values; ``head_dim``, those of queries and keys, where None.
        options: as in `Attention`, but for ``scale``: scores have none.

    Raises:
        ValueError: an unknown form, fewer than one value channel, an option that does not apply.

    >>> import torch
    >>> layer = EfficientAttention(32, 4)
    >>> x = torch.randn(2, 7, 9, 32)
    >>> layer(x).shape, layer.maps(x).shape
    (torch.Size([2, 7, 9, 32]), torch.Size([2, 4, 8, 7, 9]))
    """

    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: str = "softmax",
        value_head_dim: int | None = None,
        **options: Any,
    ) -> None:
        if form not in ("softmax", "scaling"):
            raise ValueError(f"form must be 'softmax' or 'scaling'; it was {form!r}")
        for name in ("feature", "scale"):
            if options.get(name) is not None:
                raise ValueError(f"{name} does not apply to efficient attention: form decides how q and k are scaled")
        super().__init__(dim, num_heads, **options)
        self.form = form
        if value_head_dim is None or value_head_dim == self.head_dim:
            return
        if value_head_dim < 1:
            raise ValueError(f"value_head_dim must be at least 1; it was {value_head_dim}")
        if options.get("lepe") is not None or options.get("gate"):
            raise ValueError("lepe and gate are made for values of head_dim channels: leave value_head_dim out")
        wide, narrow = num_heads * value_head_dim, self.num_kv_heads * value_head_dim
        self.v_proj = nn.Linear(self.kv_dim, narrow, bias=self.v_proj.bias is not None)
        self.o_proj = nn.Linear(wide, dim, bias=self.o_proj.bias is not None)

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`efficient_attention`."""
        return efficient_attention(q, k, v, form=self.form, causal=self.causal, keys=call.real, state=state)

    def maps(
        self,
        x: Float[Tensor, "B *grid_q dim"],
        context: Float[Tensor, "B *grid_k kv_dim"] | None = None,
        *,
        keys: Bool[Tensor, "B *grid_k"] | None = None,
    ) -> Float[Tensor, "B Hkv D *grid_k"]:
        """Where each context vector looks, without causality: `context_maps` of the layer's keys.

        Args:
            x, context, keys: as in `forward`.

        Raises:
            ValueError: ``form="scaling"``, whose keys are not normalised.
        """
        if self.form != "softmax":
            raise ValueError("maps need form='softmax': the keys of 'scaling' are no weights")
        kv = x if context is None else context
        at = self.positions(tuple(kv.shape[1:-1]), 0, kv.device)
        k = self.project(x, kv, None, at)[1]
        found = context_maps(k.flatten(2, -2), None if keys is None else keys.flatten(1))
        return cast(Tensor, found.unflatten(-1, kv.shape[1:-1]))


def _take(state: EfficientState, k: Tensor, v: Tensor) -> EfficientState:
    """The state with all these keys in it."""
    total = torch.logaddexp(state.total, k.logsumexp(2)) if k.shape[2] else state.total
    old, new = (state.total - total).exp(), (k - total[:, :, None]).exp()
    return EfficientState(total, old[..., None] * state.context + new.mT @ v)


def _causal(q: Tensor, k: Tensor, v: Tensor, total: Tensor, context: Tensor, width: int) -> tuple[Tensor, ...]:
    """One piece of the causal form: its outputs and the state after it.

    A key's weight at a query is ``exp(k - total)``, the total being that up to the query. It is the product of two
    factors about a total between both, neither of them above 1, whatever the keys: within a chunk at the middle of
    halves, quarters and so on, between chunks at their borders.

    Args:
        q: features of the queries, ``(B, Hkv, group, N, D)``.
        k, v: ``(B, Hkv, N, D)`` and ``(B, Hkv, N, E)``.
        total, context: of the state.
        width: of a chunk, a power of two.
    """
    length = q.shape[3]
    more = -length % width
    q, v, k = pad(q, (0, 0, 0, more)), pad(v, (0, 0, 0, more)), pad(k, (0, 0, 0, more), value=_NOTHING)
    totals = torch.logaddexp(total[:, :, None], k.logcumsumexp(2))
    q = q.unflatten(3, (-1, width))
    k, v, totals = (t.unflatten(2, (-1, width)) for t in (k, v, totals))
    ends = totals[:, :, :, -1]  # (B, Hkv, chunks, D)
    starts = torch.cat([total[:, :, None], ends[:, :, :-1]], 2)
    sums = (k - ends[:, :, :, None]).exp().mT @ v
    fades = (starts - ends).exp()[..., None]
    before = []
    for number in range(sums.shape[2]):
        before.append(context)
        context = fades[:, :, number] * context + sums[:, :, number]
    states = torch.stack(before, 2)[:, :, None]
    k, v, totals = (t[:, :, None] for t in (k, v, totals))  # as q, with one for all queries of a group
    out = (q * (starts[:, :, None, :, None] - totals).exp()) @ states
    out = out + (q * (k - totals).exp()).sum(-1, keepdim=True) * v
    half = 1
    while half < width:
        asked, until, key, value = (t.unflatten(4, (-1, 2, half)) for t in (q, totals, k, v))
        middle = until[..., 0, -1:, :]
        late = asked[..., 1, :, :] * (middle - until[..., 1, :, :]).exp()
        early = (key[..., 0, :, :] - middle).exp()
        part = late @ early.mT @ value[..., 0, :, :]
        out = out + torch.stack([torch.zeros_like(part), part], -3).flatten(4, 6)
        half *= 2
    return out.flatten(3, 4)[:, :, :, :length], ends[:, :, -1], context


def _scaling(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None, state: EfficientState | None, chunk: int
) -> tuple[Tensor, EfficientState]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    past, seen = None, torch.zeros(k.shape[0], 1, 1, device=k.device, dtype=dtype)
    if state is not None:
        seen = state.total
        kv = state.context * seen[..., None]
        past = LinearState(kv, kv.new_zeros(kv.shape[:3]))
    out, after = linear_attend(
        q.to(dtype),
        k,
        v,
        feature="identity",
        causal=causal,
        keys=keys,
        normalise=False,
        state=past,
        return_state=True,
        chunk=chunk,
    )
    real = torch.ones(k.shape[0], k.shape[2], device=k.device, dtype=dtype) if keys is None else keys.to(dtype)
    total = seen + real.sum(1)[:, None, None]
    count = (seen[:, 0] + real.cumsum(1))[:, None, k.shape[2] - q.shape[2] :, None] if causal else total[..., None]
    context = after.kv / total.clamp(min=1)[..., None]
    return (out / count.clamp(min=1)).to(q.dtype), EfficientState(total, context)
