"""Agent attention: a few agents read all keys for all queries, which then read the agents."""

from __future__ import annotations

from math import isqrt
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, interpolate, pad

from glocal.attention import attend
from glocal.cache import Cache, FullCache, StateCache
from glocal.nn.conv import Depthwise
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Keys
from glocal.shapes import Bool, Float

__all__ = ["AgentAttention", "AgentBias", "AgentState", "agent_attend", "causal_agents"]


def agent_attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k E"],
    agents: Float[Tensor, "B H n D"],
    *,
    agent_keys: Float[Tensor, "B H n D"] | None = None,
    gather_bias: Tensor | None = None,
    spread_bias: Tensor | None = None,
    scale: float | None = None,
    spread_scale: float | None = None,
    keys: Bool[Tensor, "B M"] | None = None,
    real_agents: Bool[Tensor, "B n"] | None = None,
    **options: Any,
) -> Float[Tensor, "B H *grid_q E"]:
    """``softmax(q a^T s2 + B2) softmax(a k^T s1 + B1) v``: two attentions in a row, in O((N + M) n D).

    Agents gather values as queries, then spread them as keys. No matrix is larger than ``N x n`` or ``n x M``, and the
    implied ``N x M`` weights are those of a linear attention, not negative, each row summing to one. Han et al., 2024,
    arXiv 2312.08874.

    Args:
        q: ``(B, H, *grid_q, D)``.
        k: ``(B, Hkv, *grid_k, D)``, H a multiple of Hkv.
        v: ``(B, Hkv, *grid_k, E)``.
        agents: ``(B, H, n, D)``.
        agent_keys: what queries compare themselves with, ``(B, H, n, D)``; the agents themselves where None.
        gather_bias: B1, broadcasts to ``(B, H, n, M)``, grids flattened.
        spread_bias: B2, broadcasts to ``(B, H, N, n)``.
        scale: s1; ``D ** -0.5`` where None.
        spread_scale: s2; ``scale`` where None.
        keys: which keys are real, booleans ``(B, M)``.
        real_agents: which agents are real, booleans ``(B, n)``.
        options: ``softcap``, ``dropout_p``, ``backend`` of `glocal.attend`, for both.

    Returns:
        ``(B, H, *grid_q, E)``.

    Raises:
        ValueError: agents that do not fit the queries, or what `glocal.attend` refuses.

    >>> q, k, v = torch.randn(3, 1, 2, 8, 8, 4).unbind()
    >>> agent_attend(q, k, v, torch.randn(1, 2, 5, 4)).shape
    torch.Size([1, 2, 8, 8, 4])
    """
    wanted = (*q.shape[:2], "n", q.shape[-1])
    for name, t in (("agents", agents), ("agent_keys", agents if agent_keys is None else agent_keys)):
        if t.dim() != 4 or t.shape[:2] != q.shape[:2] or t.shape[-1] != q.shape[-1] or t.shape[2] != agents.shape[2]:
            raise ValueError(f"{name} must be {wanted} like q's {tuple(q.shape)}; it was {tuple(t.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat_q, flat_k, flat_v = (t.flatten(2, -2) if t.dim() != 4 else t for t in (q, k, v))
    read = Full() if keys is None else Keys(keys)
    gathered = attend(agents, flat_k, flat_v, read, bias=gather_bias, scale=scale, **options)
    read = Full() if real_agents is None else Keys(real_agents)
    against = agents if agent_keys is None else agent_keys
    spread = scale if spread_scale is None else spread_scale
    out: Tensor = attend(flat_q, against, gathered, read, bias=spread_bias, scale=spread, **options)
    return out.unflatten(2, q.shape[2:-1]) if q.dim() != 4 else out


class AgentState(NamedTuple):
    """What causal agents keep of the past: ``n (E + 2)`` numbers a head, in float32 or wider."""

    top: Tensor
    """Largest score of each agent, ``(B, H, n)``."""
    total: Tensor
    """Sum of ``exp(score - top)``, ``(B, H, n)``."""
    values: Tensor
    """Sum of ``exp(score - top)`` times values, ``(B, H, n, E)``."""


def causal_agents(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    agents: Float[Tensor, "B H n D"],
    *,
    scale: float | None = None,
    spread_scale: float | None = None,
    keys: Bool[Tensor, "B M"] | None = None,
    state: AgentState | None = None,
    chunk: int = 16,
) -> tuple[Float[Tensor, "B H N E"], AgentState]:
    """`agent_attend` where an agent has, for each query, read the keys up to it only: our extension.

    The agents must not depend on what comes later. Each keeps a running softmax, rescaled as its largest score grows.
    Time and memory grow with ``N n (chunk + D + E)``.

    Args:
        q: ``(B, H, N, D)``; queries are the last positions of the keys.
        k: ``(B, Hkv, M, D)``, H a multiple of Hkv, M at least N.
        v: ``(B, Hkv, M, E)``.
        agents: ``(B, H, n, D)``.
        scale, spread_scale: as in `agent_attend`.
        keys: which keys are real, booleans ``(B, M)``. A query without a real key gets zeros.
        state: of earlier keys.
        chunk: positions that are compared pair by pair; changes the speed only.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these keys.

    Raises:
        ValueError: more queries than keys, a chunk below 1.

    >>> q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
    >>> agents = torch.randn(1, 2, 5, 8)
    >>> last = causal_agents(q, k, v, agents)[0][:, :, -1:]
    >>> torch.allclose(last, agent_attend(q[:, :, -1:], k, v, agents), atol=1e-5)
    True
    """
    ahead = k.shape[2] - q.shape[2]
    if ahead < 0:
        raise ValueError(f"q must have at most as many tokens as k, {k.shape[2]}; it had {q.shape[2]}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; it was {chunk}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide_q, wide_k, wide_v, wide_a = (t.to(dtype) for t in (q, k, v, agents))
    if group > 1:
        wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (wide_k, wide_v))
    shares = (wide_q @ wide_a.mT * (scale if spread_scale is None else spread_scale)).softmax(-1)
    shares = pad(shares, (0, 0, ahead, 0))
    scores = wide_a @ wide_k.mT * scale
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    if state is None:
        none = wide_v.new_zeros(scores.shape[:-1])
        state = AgentState(none - torch.inf, none, wide_v.new_zeros(*none.shape, v.shape[-1]))
    outs = []
    for start in range(0, k.shape[2], chunk):
        at = slice(start, start + chunk)
        out, state = _some(shares[:, :, at], scores[..., at], wide_v[:, :, at], state)
        outs.append(out)
    found = torch.cat(outs, 2) if outs else wide_v
    return found[:, :, ahead:].to(q.dtype), state


def _some(shares: Tensor, scores: Tensor, v: Tensor, state: AgentState) -> tuple[Tensor, AgentState]:
    """A chunk: ``shares (B, H, c, n)`` of the agents, their ``scores (B, H, n, c)``, ``v (B, H, c, E)``."""
    # Subtracted and divided out again, so without a gradient.
    top = torch.maximum(scores.detach().cummax(-1).values, state.top[..., None])
    least = top.clamp(min=torch.finfo(top.dtype).min)  # where no key is real yet
    before = (state.top[..., None] - least).exp()  # what the largest score so far leaves of the state
    length = scores.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    pairs = (scores[..., None, :] - least[..., :, None]).masked_fill(later, -torch.inf).exp()  # (B, H, n, c, c)
    total = before * state.total[..., None] + pairs.sum(-1)
    weights = shares.mT / torch.where(total > 0, total, 1.0)
    out = (weights[..., None] * pairs).sum(2) @ v + (weights * before).mT @ state.values
    values = before[..., -1:] * state.values + pairs[..., -1, :] @ v
    return out, AgentState(top[..., -1], total[..., -1], values)


class AgentBias(nn.Module):
    """A learned bias between agents and the positions of an image: a map, a row's and a column's part, summed.

    Args:
        num_heads, num_agents: H and n.
        grid: rows and columns that the tables of rows and columns have; the map has 7 x 7. For an image of another
            size all three are resized, linearly between the centres of their cells.

    >>> AgentBias(2, 9, (14, 14))((10, 12)).shape
    torch.Size([2, 9, 120])
    """

    def __init__(self, num_heads: int, num_agents: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be rows and columns; it was {grid}")
        self.map = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7))
        self.rows = nn.Parameter(torch.empty(num_heads, num_agents, grid[0]))
        self.columns = nn.Parameter(torch.empty(num_heads, num_agents, grid[1]))
        for p in self.parameters():
            nn.init.trunc_normal_(p, std=0.02)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """``(H, n, N)`` for an image of ``grid``, flattened row by row."""
        if len(grid) != 2:
            raise ValueError(f"a layer with grid= has biases over images (B, H, W, dim); the grid was {tuple(grid)}")
        whole = interpolate(self.map, grid, mode="bilinear")
        rows, columns = (
            t if t.shape[-1] == size else interpolate(t, size, mode="linear")
            for t, size in zip((self.rows, self.columns), grid, strict=True)
        )
        return (whole + rows[..., None] + columns[..., None, :]).flatten(2)


class AgentAttention(Attention):
    """Agent attention (Han et al., 2024, arXiv 2312.08874): linear in the tokens, with two softmaxes.

    Agents are means of the queries over a grid of cells of the image (over pieces of a sequence), or learned. With
    ``grid``, ``lepe=3``, ``qkv_bias=True`` and ``out_bias=True`` it is the layer of the paper's networks.

    Args:
        dim, num_heads: as in `Attention`.
        num_agents: n, a square for images.
        learned: the agents are parameters, ``(H, n, D)``, instead of pooled. The causal form, which is ours, needs
            that: pooled agents would know what comes later.
        grid: rows and columns of the images that it is made for: gives both softmaxes an `AgentBias`, which other
            sizes resize.
        reduction: keys and values come from a convolution of this side and stride, and a norm, as in PVT.
        lepe: as in `Attention`; with ``reduction`` the values are resized to the queries' grid first.
        options: as in `Attention`.

    Raises:
        ValueError: settings that do not fit each other or the input.

    >>> layer = AgentAttention(32, 4, num_agents=9, grid=(14, 14), lepe=3)
    >>> layer(torch.randn(2, 14, 14, 32)).shape
    torch.Size([2, 14, 14, 32])
    """

    tiny: ClassVar[dict[str, Any]] = {"num_agents": 4, "learned": True}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_agents: int = 49,
        learned: bool = False,
        grid: tuple[int, int] | None = None,
        reduction: int = 1,
        lepe: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        for name, value in (("num_agents", num_agents), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if self.causal and not learned:
            raise ValueError("AgentAttention has no causal form with pooled agents, which see the future: learned=True")
        if self.causal and (self.softcap or self.dropout):
            raise ValueError("softcap and dropout act on single scores, which the causal form does not keep")
        if self.causal and not (grid is None and lepe is None and reduction == 1):
            raise ValueError("grid, lepe and reduction are of images: the causal form takes a sequence")
        if self.rope is not None and reduction > 1:
            raise ValueError("rope needs keys where the tokens are: not with reduction")
        if lepe is not None and self.num_kv_heads != num_heads:
            raise ValueError(f"lepe needs values of every head: num_kv_heads must be {num_heads} or None")
        if grid is not None and not learned and isqrt(num_agents) ** 2 != num_agents:
            raise ValueError(f"num_agents must be a square for images; it was {num_agents}")
        self.num_agents, self.reduction = num_agents, reduction
        self.agents = nn.Parameter(torch.empty(num_heads, num_agents, self.head_dim)) if learned else None
        if self.agents is not None:
            nn.init.normal_(self.agents)
        self.gather_bias = self.spread_bias = None
        if grid is not None:
            reduced = (max(1, grid[0] // reduction), max(1, grid[1] // reduction))
            self.gather_bias = AgentBias(num_heads, num_agents, reduced)
            self.spread_bias = AgentBias(num_heads, num_agents, grid)
        self.reduce = nn.Conv2d(self.kv_dim, self.kv_dim, reduction, stride=reduction) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(self.kv_dim) if reduction > 1 else None
        # Not the frame's: it must resize the values.
        self.local = None if lepe is None else Depthwise(num_heads * self.head_dim, lepe)

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the reduced image."""
        if self.reduce is not None and self.reduce_norm is not None:
            if context.dim() != 4 or min(context.shape[1:3]) < self.reduction:
                raise ValueError(
                    f"reduction={self.reduction} needs an image (B, H, W, {self.kv_dim}) at least as large; it was "
                    f"{tuple(context.shape)}"
                )
            context = self.reduce_norm(self.reduce(context.movedim(-1, 1)).movedim(1, -1))
        return super().project(x, context, at_q, at_k)

    def pool(self, q: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Agents ``(B, H, n, D)`` of queries ``(B, H, *grid, D)``, and which of them have real ones, ``(B, n)``.

        Args:
            q: over a sequence or an image.
            real: which queries are real, ``(B, N)``, the grid flattened.
        """
        if q.dim() not in (4, 5):
            raise ValueError(f"agents are pooled over a sequence or an image; the grid was {tuple(q.shape[2:-1])}")
        side = isqrt(self.num_agents)
        if q.dim() == 5 and side**2 != self.num_agents:
            raise ValueError(f"num_agents must be a square for images; it was {self.num_agents}")

        def means(t: Tensor) -> Tensor:
            """``(B, channels, *grid)`` to ``(B, channels, n)``."""
            if q.dim() == 4:
                return adaptive_avg_pool1d(t, self.num_agents)
            return adaptive_avg_pool2d(t, side).flatten(2)

        weights = None if real is None else real.view(len(q), 1, *q.shape[2:-1]).to(q.dtype)
        channels = q.movedim(-1, 2).flatten(1, 2)
        agents = means(channels if weights is None else channels * weights)
        some = None
        if weights is not None:
            share = means(weights)
            some = share[:, 0] > 0
            agents = agents / torch.where(share > 0, share, 1.0)
        return agents.unflatten(1, (q.shape[1], -1)).mT, some

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Both softmaxes, and the convolution of the values."""
        if self.causal:
            return self._after(q, k, v, call.real, None)[0]
        grid = tuple(q.shape[2:-1])
        if call.real is not None and self.reduction > 1:
            raise ValueError("keys (padding) cannot be told where reduction has mixed the tokens")
        some = None
        if self.agents is not None:
            agents = self.agents.to(q.dtype).expand(len(q), -1, -1, -1)
        else:
            agents, some = self.pool(q, None if call.cross else call.real)
        out = agent_attend(
            q,
            k,
            v,
            agents,
            gather_bias=None if self.gather_bias is None else self.gather_bias(tuple(k.shape[2:-1])),
            spread_bias=None if self.spread_bias is None else self.spread_bias(grid).mT,
            scale=self.scale,
            keys=call.real,
            real_agents=some,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        if self.local is None:
            return out
        if call.cross or len(grid) != 2:
            raise ValueError(f"lepe needs an image (B, H, W, {self.dim}) and no context; the grid was {grid}")
        return out + self.heads(self.near(v, grid), self.num_heads)

    def near(self, v: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The convolution of values ``(B, H, *grid_k, D)`` on the queries' grid, ``(B, *grid, H * D)``."""
        assert self.local is not None
        image = v.movedim(1, -2).flatten(-2)
        if tuple(image.shape[1:3]) != grid:
            image = interpolate(image.movedim(-1, 1), grid, mode="bilinear").movedim(1, -1)
        out: Tensor = self.local(image)
        return out

    def new_cache(self) -> Cache:
        """A state of fixed size."""
        return StateCache() if self.causal else FullCache()

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        """Tokens that follow those in the state."""
        if not isinstance(cache, StateCache):
            raise ValueError(f"cache must be a StateCache, of new_cache(); it was a {type(cache).__name__}")
        real = None if call.real is None else call.real[:, -k.shape[2] :]
        out, cache.state = self._after(q, k, v, real, cache.state)
        cache.seen += k.shape[2]
        return out

    def _after(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: AgentState | None
    ) -> tuple[Tensor, AgentState]:
        if q.dim() != 4:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}) for the causal form")
        assert self.agents is not None
        agents = self.agents.expand(len(q), -1, -1, -1)
        return causal_agents(q, k, v, agents, scale=self.scale, keys=real, state=state)

    def extra_repr(self) -> str:
        return f"num_agents={self.num_agents}, learned={self.agents is not None}"
