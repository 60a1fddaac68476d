"""Token merging, and AgentSD: fewer tokens, and agents, in the self-attention of a pretrained diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from glocal.nn.agent import agent_attend
from glocal.shapes import Float

__all__ = ["AgentSD", "Matching", "Phase", "match_tokens"]

_AT_ONCE = 1 << 22
"""Similarities that are held at a time."""


class Matching(NamedTuple):
    """Which tokens merge into which, most similar first: made by `match_tokens`.

    Merged tokens are the sources that stay, then the targets.
    """

    sources: Tensor
    """Positions of the tokens that may be merged, most similar first, ``(B, S)``."""
    into: Tensor
    """The number of the best target of each, ``(B, S)``."""
    targets: Tensor
    """Positions of the tokens that others are merged into, ``(T,)``."""

    def merge(self, x: Float[Tensor, "B N C"], count: int) -> Float[Tensor, "B K C"]:
        """Merge the ``count`` most similar sources: a target is the mean of itself and of what is merged into it.

        Returns:
            ``(B, N - count, C)``.

        Raises:
            ValueError: tokens that were not matched, a count that is not from 0 to S.
        """
        batch, number = self.sources.shape
        if x.dim() != 3 or x.shape[:2] != (batch, number + len(self.targets)):
            wanted = (batch, number + len(self.targets), "C")
            raise ValueError(f"x must be the matched tokens {wanted}; it was {tuple(x.shape)}")
        if not 0 <= count <= number:
            raise ValueError(f"count must be from 0 to {number}; it was {count}")
        moved = _take(x, self.sources)
        index = self.into[:, :count, None].expand(-1, -1, x.shape[-1])
        targets = x[:, self.targets].scatter_reduce(1, index, moved[:, :count], "mean", include_self=True)
        return torch.cat([moved[:, count:], targets], 1)

    def unmerge(self, y: Float[Tensor, "B K C"]) -> Float[Tensor, "B N C"]:
        """Back to all tokens: those that were merged get what their target has."""
        batch, number = self.sources.shape
        stay = y.shape[1] - len(self.targets)
        if y.dim() != 3 or len(y) != batch or not 0 <= stay <= number:
            raise ValueError(
                f"y must be merged tokens, (B, K, C) with B = {batch} and K from {len(self.targets)} to "
                f"{number + len(self.targets)}; it was {tuple(y.shape)}"
            )
        targets = y[:, stay:]
        count = number - stay
        moved = torch.cat([_take(targets, self.into[:, :count]), y[:, :stay]], 1)
        out = y.new_empty(batch, number + len(self.targets), y.shape[-1])
        out[:, self.targets] = targets
        return out.scatter(1, self.sources[..., None].expand_as(moved), moved)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index (B, n)`` of ``x (B, N, C)``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def match_tokens(
    x: Float[Tensor, "B N C"],
    grid: tuple[int, int],
    cell: int = 2,
    *,
    generator: torch.Generator | None = None,
) -> Matching:
    """Bipartite soft matching on an image: in each cell one token is a target, the others look for their nearest one.

    Near by cosine similarity, anywhere in the image. Bolya et al., 2022, arXiv 2210.09461; with cells, Bolya and
    Hoffman, 2023, arXiv 2303.17604.

    Args:
        x: what is compared, ``(B, N, C)``, row by row.
        grid: rows and columns, N together. What does not fill a cell, at the right and the bottom, is no target.
        cell: rows and columns of a cell.
        generator: on the CPU, chooses a target in each cell, the same ones for the batch; the first tokens where None.

    Raises:
        ValueError: tokens that are not those of the grid, a grid smaller than a cell.

    >>> x = torch.randn(1, 8, 4)
    >>> found = match_tokens(x, (2, 4))
    >>> found.targets.tolist(), found.merge(x, 3).shape, found.unmerge(found.merge(x, 3)).shape
    ([0, 2], torch.Size([1, 5, 4]), torch.Size([1, 8, 4]))
    """
    rows, columns = grid
    if x.dim() != 3 or x.shape[1] != rows * columns:
        raise ValueError(f"x must be (B, {rows * columns}, C), the tokens of grid {grid}; it was {tuple(x.shape)}")
    if not 1 <= cell <= min(grid):
        raise ValueError(f"cell must be from 1 to the shorter side of grid {grid}; it was {cell}")
    high, wide = rows // cell, columns // cell
    place = torch.zeros(high, wide, dtype=torch.long)
    if generator is not None:
        place = torch.randint(cell**2, (high, wide), generator=generator)
    row = torch.arange(high)[:, None] * cell + place // cell
    column = torch.arange(wide) * cell + place % cell
    targets = (row * columns + column).flatten().to(x.device)
    others = torch.ones(rows * columns, dtype=torch.bool, device=x.device)
    others[targets] = False
    sources = others.nonzero()[:, 0]
    if not len(sources):
        none = sources.new_zeros(len(x), 0)
        return Matching(none, none, targets)
    with torch.no_grad():
        unit = normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        against = unit[:, targets].mT
        step = max(1, _AT_ONCE // (len(x) * len(targets)))
        parts = [(unit[:, some] @ against).max(-1) for some in sources.split(step)]
        likeness = torch.cat([part.values for part in parts], 1)
        into = torch.cat([part.indices for part in parts], 1)
        order = likeness.argsort(dim=-1, descending=True, stable=True)
    return Matching(sources[order], into.gather(1, order), targets)


class Phase(NamedTuple):
    """How AgentSD acts from some step on."""

    cell: int
    """Rows and columns of a cell that has one target."""
    ratio: float
    """Share of the tokens that are merged."""
    agent_ratio: float
    """Share that is merged to get the agents; there are none unless they are fewer than half of what attends."""


_PUBLISHED = {0: Phase(4, 0.4, 0.95), 20: Phase(2, 0.4, 0.5)}


@dataclass
class AgentSD:
    """Agent attention in a trained diffusion model, without training (Han et al., 2024, arXiv 2312.08874).

    In the self-attention of its finest transformer blocks tokens are merged, and a few tokens, merged further, are the
    agents; later steps only merge. A ``with`` block puts it in and takes it out, whatever happens. The rest of a block
    stays as it is. It fits modules with an ``attn1`` that has ``to_q``, ``to_k``, ``to_v``, ``to_out`` and ``heads``,
    as the transformer blocks of latent diffusion and of diffusers have::

        with AgentSD(unet):
            for t in timesteps:
                noise = unet(latents, t, text)

    Args:
        model: takes its latent images ``(B, C, H, W)`` as the first such tensor among its arguments.
        schedule: the `Phase` from each step on, for 50 steps where not given; before the first one nothing is done.
        shortcut: share of the values that is added where there are agents.
        power: the second softmax has the scale of the first to this power.
        max_downsample: acts on maps that are smaller than the latent images by at most this.
        seed: of the choice of targets. Where the batch is odd, the first token of each cell is taken instead.

    Attributes:
        step: number of the denoising step, 0 on entering; each call of the model counts one on. Set it where a model is
            called more than once a step.

    Raises:
        ValueError: a model without such blocks, or with an attention that does more; settings out of range. In the
            model: a mask for the self-attention, no latent images, a map that is not theirs.
        RuntimeError: it is entered twice.

    >>> AgentSD(nn.Linear(2, 2))
    Traceback (most recent call last):
    ValueError: model must have transformer blocks whose attn1 has to_q, to_k, to_v, to_out and heads; Linear has none
    """

    model: nn.Module
    _: KW_ONLY
    schedule: Mapping[int, Phase] = field(default_factory=lambda: dict(_PUBLISHED))
    shortcut: float = 0.075
    power: float = 0.3
    max_downsample: int = 1
    seed: int = 0
    step: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for start, phase in self.schedule.items():
            if start < 0 or phase.cell < 1 or not 0 <= phase.ratio < 1 or not 0 <= phase.agent_ratio < 1:
                raise ValueError(
                    f"schedule must map steps from 0 to phases with a cell of at least 1 and ratios from 0 to less "
                    f"than 1; it had {start}: {phase}"
                )
        self._blocks = [block for block in self.model.modules() if _fits(getattr(block, "attn1", None))]
        if not self._blocks:
            raise ValueError(
                f"model must have transformer blocks whose attn1 has {', '.join(_PARTS[:-1])} and {_PARTS[-1]}; "
                f"{type(self.model).__name__} has none"
            )
        for block in self._blocks:
            _refuse(block.attn1)
        self._undo: list[Callable[[], None]] = []
        self._size: tuple[int, int] | None = None
        self._found: Matching | None = None

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError("this AgentSD is already in its model")
        self.step, self._found = 0, None
        self._generator = torch.Generator().manual_seed(self.seed)
        self._undo.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(self.model.register_forward_hook(self._end).remove)
        for block in self._blocks:
            self._undo.append(block.register_forward_pre_hook(self._match, with_kwargs=True).remove)
            self._undo.append(self._replace(block.attn1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._undo:
            self._undo.pop()()
        self._found = self._size = None

    # In the model.

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
        if not images:
            raise ValueError("AgentSD needs latent images (B, C, H, W) among the arguments of the model")
        self._size = images[0].shape[2], images[0].shape[3]

    def _end(self, *_: Any) -> None:
        self.step += 1

    def _phase(self) -> Phase | None:
        started = [start for start in self.schedule if start <= self.step]
        return self.schedule[max(started)] if started else None

    def _match(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a block: what it is given is compared, not yet normalised."""
        phase, self._found = self._phase(), None
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if phase is None or self._size is None:
            return
        rows, columns = self._size
        smaller = math.ceil(math.sqrt(rows * columns // x.shape[1]))
        if smaller > self.max_downsample or not (phase.ratio or phase.agent_ratio):
            return
        grid = math.ceil(rows / smaller), math.ceil(columns / smaller)
        self._found = match_tokens(x, grid, phase.cell, generator=self._generator if len(x) % 2 == 0 else None)

    def _replace(self, attention: Any) -> Callable[[], None]:
        """Put our forward before an attention's own, and return what takes it out."""
        was, own = attention.forward, "forward" in vars(attention)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            found, phase = self._found, self._phase()
            context = args[0] if args else kwargs.get("context", kwargs.get("encoder_hidden_states"))
            if found is None or phase is None or context is not None:
                return was(x, *args, **kwargs)
            if any(isinstance(t, Tensor) for t in (*args, *kwargs.values())):
                raise ValueError("AgentSD has no mask, nor another tensor, for the self-attention of a block")
            length = x.shape[1]
            merged = min(int(length * phase.ratio), found.sources.shape[1])
            further = min(int(length * phase.agent_ratio), found.sources.shape[1])
            if 2 * (length - further) < length - merged:
                out = self._attend(attention, found.merge(x, merged), found.merge(x, further))
            elif merged:
                out = was(found.merge(x, merged), *args, **kwargs)
            else:
                return was(x, *args, **kwargs)
            return found.unmerge(out)

        def back() -> None:
            if own:
                attention.forward = was
            else:
                del attention.forward

        attention.forward = forward
        return back

    def _attend(self, attention: Any, x: Tensor, agents: Tensor) -> Tensor:
        """Tokens ``(B, K, C)`` to the same, by agents ``(B, n, C)``."""

        def heads(t: Tensor) -> Tensor:
            split: Tensor = t.unflatten(-1, (attention.heads, -1))
            return split.transpose(1, 2)

        q, a = heads(attention.to_q(x)), heads(attention.to_q(agents))
        k, v = heads(attention.to_k(x)), heads(attention.to_v(x))
        scale = float(getattr(attention, "scale", q.shape[-1] ** -0.5))
        out = agent_attend(q, k, v, a, scale=scale, spread_scale=scale**self.power) + self.shortcut * v
        out = out.transpose(1, 2).flatten(2)
        for part in attention.to_out if isinstance(attention.to_out, nn.ModuleList) else [attention.to_out]:
            out = part(out)
        result: Tensor = out
        return result


_PARTS = ("to_q", "to_k", "to_v", "to_out", "heads")


def _fits(attention: Any) -> bool:
    return isinstance(attention, nn.Module) and all(hasattr(attention, part) for part in _PARTS)


def _refuse(attention: Any) -> None:
    """What some attentions of diffusers do besides, which would be left out."""
    more = [n for n in ("norm_q", "norm_k", "group_norm", "spatial_norm") if getattr(attention, n, None) is not None]
    if getattr(attention, "residual_connection", False):
        more.append("residual_connection")
    if getattr(attention, "rescale_output_factor", 1) != 1:
        more.append("rescale_output_factor")
    if more:
        raise ValueError(f"model has an attn1 that does more than project and attend: {', '.join(more)}")
