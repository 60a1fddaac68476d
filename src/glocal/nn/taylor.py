"""Fastmax: attention by the first terms of the exponential's series, which factorise over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad
from torch.utils.checkpoint import checkpoint

from glocal.linear import LinearState, check, linear_attend
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.shapes import Bool, Float

__all__ = ["FastmaxAttention", "fastmax", "taylor_features"]

NORMALISATIONS = ("standard", "maxnorm", "maxnorm_centred", None)

_AT_ONCE = 1024
"""Positions whose features are held at a time."""


def taylor_features(x: Float[Tensor, "*lead D"], power: int = 2) -> Float[Tensor, "*lead F"]:
    """Features whose products are the series: ``f(x) f(y) = 1 + s`` or ``1 + s + s^2 / 2`` with ``s = x y``.

    Args:
        x: ``(..., D)``.
        power: 1 or 2.

    Returns:
        ``(..., F)`` with ``F = 1 + D``, or ``1 + D + D (D + 1) / 2``: of two equal products only one is kept.

    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    >>> float(taylor_features(x) @ taylor_features(y)), len(taylor_features(x))  # 1 - 1.5 + 1.5 * 1.5 / 2
    (0.625, 6)
    """
    parts = [torch.ones_like(x[..., :1]), x]
    if power == 2:
        rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        weight = x.new_ones(len(rows)).masked_fill(rows == columns, 0.5**0.5)
        parts.append(x[..., rows] * x[..., columns] * weight)
    return torch.cat(parts, -1)


def fastmax(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    power: int = 2,
    normalisation: str | None = "standard",
    temperature: float | None = None,
    causal: bool = False,
    keys: Bool[Tensor, "B M"] | None = None,
    queries: Bool[Tensor, "B N"] | None = None,
    state: LinearState | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H N E"], LinearState]:
    """``o_i = sum_j f(s_ij) v_j / sum_j f(s_ij)`` with ``f(s) = 1 + s`` or ``1 + s + s^2 / 2``, ``s_ij = q_i k_j / t``.

    Time grows with N D^(power + 1), memory with N D: also in training, where features are computed anew for the
    gradients. A state holds about D^(power + 1) numbers a head, so that heads of 32 channels or fewer are for power 2.
    Gerami et al., 2024, arXiv 2402.07901.

    How queries and keys are normalised before:

    - ``"standard"``: of each token the channels have mean 0 and variance 1 (1e-6 is added to it before its root is
      taken), so that ``|s| <= D / t``;
    - ``"maxnorm"``: divided by the largest norm among all queries, or all keys, so that ``|s| <= 1 / t``;
    - ``"maxnorm_centred"``: the same after each token's mean has been taken off;
    - ``None``: not at all.

    Args:
        q: queries ``(B, H, N, D)``.
        k: keys ``(B, Hkv, M, D)``, H a multiple of Hkv.
        v: values ``(B, Hkv, M, E)``.
        power: 1 or 2. Weights are at least 0: with 2 always, with 1 because ``|s| <= 1`` is asked for.
        normalisation: one of the above.
        temperature: ``t``. Where None: 1 for the maxnorms, ``8 sqrt(D)`` without normalisation, for ``"standard"``
            ``sqrt(D)`` with power 2 and ``D`` with power 1.
        causal: queries are the last positions of the keys, and see those at and before them.
        keys: which keys are real, booleans ``(B, M)``.
        queries: which queries are real, ``(B, N)``: the maxnorms look only at these.
        state: of earlier keys.
        chunk: as in `glocal.linear_attend`.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these keys.

    Raises:
        ValueError: shapes that do not fit, an unknown power or normalisation; power 1 with scores that may be below
            -1, whose sum could be 0; a maxnorm that would look at the future, or at keys of another call.

    >>> q, k, v = torch.randn(3, 1, 2, 10, 8).unbind()
    >>> fastmax(q, k, v)[0].shape, fastmax(q, k, v)[1].kv.shape
    (torch.Size([1, 2, 10, 8]), torch.Size([1, 2, 45, 8]))
    """
    t = _temperature(power, normalisation, temperature, q.shape[-1])
    check(q, k, v, causal, keys, None, chunk)
    _sees_all(normalisation, causal, state is not None)
    if queries is not None and (queries.dtype != torch.bool or queries.shape != (q.shape[0], q.shape[2])):
        raise ValueError(
            f"queries must be booleans {(q.shape[0], q.shape[2])}; it was {queries.dtype} {tuple(queries.shape)}"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k = (_each(x.to(dtype), normalisation) for x in (q, k))
    wide_q, wide_k = _largest(wide_q, queries, normalisation), _largest(wide_k, keys, normalisation)
    out, after = _products(wide_q, wide_k, v.to(dtype), power, t, causal, keys, state, chunk)
    return out.to(q.dtype), after


class FastmaxAttention(LinearAttention):
    """FAST's attention (Gerami et al., 2024, arXiv 2402.07901): all pairs by the exponential's series, in linear time.

    Args:
        dim, num_heads: as in `Attention`.
        power, normalisation, temperature: as in `fastmax`. What looks at one token alone is normalised before rotary
            positions turn it.
        options: as in `Attention`, but for ``scale``, which is ``1 / temperature`` here.

    Raises:
        ValueError: what `fastmax` refuses, an option that does not apply.

    >>> import torch
    >>> layer = FastmaxAttention(32, 4, causal=True)
    >>> layer(torch.randn(2, 100, 32)).shape
    torch.Size([2, 100, 32])
    """

    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        power: int = 2,
        normalisation: str | None = "standard",
        temperature: float | None = None,
        **options: Any,
    ) -> None:
        for name, instead in (("feature", "power"), ("scale", "temperature")):
            if options.get(name) is not None:
                raise ValueError(f"{name} does not apply to fastmax: give {instead}")
        super().__init__(dim, num_heads, **options)
        self.power, self.normalisation = power, normalisation
        self.temperature = _temperature(power, normalisation, temperature, self.head_dim)
        _sees_all(normalisation, self.causal, False)

    def rotate(self, t: Tensor, at: Tensor | None) -> Tensor:
        """After the normalisation of single tokens, so that turned scores depend on distances only."""
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        return super().rotate(_each(wide, self.normalisation).to(t.dtype), at)

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`fastmax`, after `rotate`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide_q = _largest(q.to(dtype), None if call.cross else call.real, self.normalisation)
        wide_k = _largest(k.to(dtype), call.real, self.normalisation)
        options = self.power, self.temperature, self.causal, call.real, state
        out, after = _products(wide_q, wide_k, v.to(dtype), *options)
        return out.to(q.dtype), after


def _temperature(power: int, normalisation: str | None, given: float | None, channels: int) -> float:
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2; it was {power!r}")
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation must be one of {', '.join(map(repr, NORMALISATIONS))}; it was {normalisation!r}"
        )
    if given is not None and not given > 0:
        raise ValueError(f"temperature must be more than 0; it was {given}")
    if normalisation is None:
        if power == 1:
            raise ValueError("power 1 needs a normalisation: of scores below -1 the weights are negative, and sum to 0")
        return 8 * channels**0.5 if given is None else given
    least = float(channels) if normalisation == "standard" else 1.0
    if power == 1 and given is not None and given < least:
        raise ValueError(
            f"temperature must be at least {least:g} with power 1 and {normalisation!r}, so that no weight is "
            f"negative; it was {given}"
        )
    if given is not None:
        return given
    return channels**0.5 if power == 2 and normalisation == "standard" else least


def _sees_all(normalisation: str | None, causal: bool, continued: bool) -> None:
    if normalisation in ("standard", None):
        return
    if causal:
        raise ValueError(
            f"causal with {normalisation!r} would leak: its largest norm is over all tokens; use 'standard'"
        )
    if continued:
        raise ValueError(f"state with {normalisation!r}: keys of another call were divided by another norm")


def _each(x: Tensor, normalisation: str | None) -> Tensor:
    """What is done to each token alone."""
    if normalisation == "standard":
        return layer_norm(x, x.shape[-1:], eps=1e-6)
    return x - x.mean(-1, keepdim=True) if normalisation == "maxnorm_centred" else x


def _largest(x: Tensor, real: Tensor | None, normalisation: str | None) -> Tensor:
    """Tokens ``(B, heads, n, D)`` over the largest norm of a head's."""
    if normalisation in ("standard", None) or not x.shape[2]:
        return x
    norms = torch.linalg.vector_norm(x, dim=-1)
    if real is not None:
        # What is no token may be larger than all of them: it becomes 0.
        norms, x = norms.masked_fill(~real[:, None], 0), x.masked_fill(~real[:, None, :, None], 0)
    out: Tensor = x / norms.amax(-1)[:, :, None, None].clamp(min=torch.finfo(x.dtype).tiny)
    return out


def _products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    power: int,
    temperature: float,
    causal: bool,
    keys: Tensor | None,
    state: LinearState | None,
    chunk: int = 64,
) -> tuple[Tensor, LinearState]:
    """Queries and keys that are normalised; some positions after the other, of which only the states are kept."""
    feature: Callable[[Tensor], Tensor] = partial(taylor_features, power=power)
    q, k = q * temperature**-0.5, k * temperature**-0.5
    if state is None:
        channels = q.shape[-1]
        lead = (*k.shape[:2], 1 + channels + (channels * (channels + 1) // 2 if power == 2 else 0))
        state = LinearState(v.new_zeros(*lead, v.shape[-1]), v.new_zeros(lead))
    length, queries = k.shape[2], q.shape[2]

    def some(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, kv: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
        past = LinearState(kv, sums)
        options: dict[str, Any] = dict(causal=causal, keys=real, state=past, chunk=chunk)
        out, after = linear_attend(q, k, v, feature=feature, return_state=True, **options)
        return out, *after

    def part(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: LinearState) -> tuple[Tensor, LinearState]:
        if torch.is_grad_enabled():  # else the features would be kept for the gradients
            out, *after = checkpoint(some, q, k, v, real, *state, use_reentrant=False, preserve_rng_state=False)
        else:
            out, *after = some(q, k, v, real, *state)
        return out, LinearState(*after)

    outs = []
    if causal:
        q = pad(q, (0, 0, length - queries, 0))
    for start in range(0, length, _AT_ONCE):
        at = slice(start, start + _AT_ONCE)
        asked = q[:, :, at] if causal else q[:, :, :0]
        out, state = part(asked, k[:, :, at], v[:, :, at], None if keys is None else keys[:, at], state)
        outs.append(out)
    if not causal:
        nothing = None if keys is None else keys[:, :0]
        outs = [part(some_q, k[:, :, :0], v[:, :, :0], nothing, state)[0] for some_q in q.split(_AT_ONCE, 2)]
        return torch.cat(outs, 2), state
    return torch.cat([q.new_zeros(*q.shape[:2], 0, v.shape[-1]), *outs], 2)[:, :, length - queries :], state
