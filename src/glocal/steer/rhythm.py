"""How far back a model looks, and what it will look back at: two signals of every token of a response."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glocal.nn.modes import evaluating
from glocal.steer.hooks import Site
from glocal.steer.method import Method, check_range
from glocal.steer.spans import prompt_of
from glocal.steer.steering import language_layers

__all__ = [
    "Rhythm",
    "alternatives",
    "jaccard",
    "middle_layers",
    "read_rhythm",
    "receiver_heads",
    "rhythm",
    "rhythm_of_rows",
]


@dataclass(frozen=True)
class Rhythm:
    """Signals of the tokens of responses (Li et al., 2025, arXiv 2510.13554), from attention of ``L`` layers.

    All are indexed by the token's own position: ``waad[:, t]`` is of the row of token ``t``, whose output predicts
    token ``t + 1``; ``fai[:, t]`` is of the column of token ``t``.

    Args:
        layers: numbers of the layers.
        response: which positions are the response, booleans ``(B, N)``.
        spans: of each head, how far back it looks, the mean over the response, ``(B, L, H)``.
        distance: of each head and row, how far back it looks, no key counting as farther than the window,
            ``(B, L, H, N)``; 0 outside the response.
        influence: of each head and column, the mean attention that it gets from the response's rows within the
            horizon, ``(B, L, H, N)``; 0 where there is none.
        received: of each head and column, the mean attention that it gets from all the response's rows, same shape.
        local_heads, global_heads: the heads that look least and most far back, booleans ``(B, L, H)``, of each response
            by itself.
    """

    layers: tuple[int, ...]
    response: Tensor
    spans: Tensor
    distance: Tensor
    influence: Tensor
    received: Tensor
    local_heads: Tensor
    global_heads: Tensor

    @property
    def waad(self) -> Tensor:
        """Windowed average attention distance: how far back the local heads look, ``(B, N)``."""
        return _mean(self.distance, self.local_heads)

    @property
    def fai(self) -> Tensor:
        """Future attention influence: how much the global heads will look back at the token, ``(B, N)``."""
        return _mean(self.influence, self.global_heads)

    @property
    def delta(self) -> Tensor:
        """How much ``waad`` changes to the next token, ``(B, N)``; 0 at the end of a response and outside it."""
        waad, found = self.waad, torch.zeros_like(self.waad)
        both = self.response[:, :-1] & self.response[:, 1:]
        found[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs() * both
        return found

    @property
    def kurtosis(self) -> Tensor:
        """Of each head, excess kurtosis of what the response's tokens receive, ``(B, L, H)``.

        It is high where few tokens receive most; NaN where all receive alike.
        """
        real = self.response[:, None, None]
        count = real.sum(-1)
        centred = (self.received - (self.received * real).sum(-1, keepdim=True) / count[..., None]) * real
        variance = centred.square().sum(-1) / count
        found: Tensor = centred.pow(4).sum(-1) / count / variance.square() - 3
        return found

    def with_heads(self, local_heads: Tensor, global_heads: Tensor) -> Rhythm:
        """The same with other sets of heads, say those of a calibration text: booleans ``(L, H)`` or ``(B, L, H)``.

        Raises:
            ValueError: other shapes, no booleans, or an empty set.
        """
        sets = []
        for name, given in (("local_heads", local_heads), ("global_heads", global_heads)):
            shape = self.spans.shape
            if given.dtype != torch.bool or given.shape not in (shape, shape[1:]):
                raise ValueError(
                    f"{name} must be booleans {tuple(shape[1:])} or {tuple(shape)}; it was {given.dtype} "
                    f"{tuple(given.shape)}"
                )
            each = given.to(self.spans.device).expand(shape)
            if not bool(each.flatten(1).any(1).all()):
                raise ValueError(f"{name} must hold at least one head")
            sets.append(each)
        return replace(self, local_heads=sets[0], global_heads=sets[1])


def middle_layers(count: int, take: int = 5) -> list[int]:
    """The layers to read: evenly spaced over the middle third of ``count``, fewer where there are fewer.

    >>> middle_layers(36), middle_layers(3)
    ([12, 15, 18, 21, 24], [1, 2])
    """
    for name, value in (("count", count), ("take", take)):
        check_range(name, value, 1)
    first, last = count // 3, min(2 * count // 3, count - 1)
    steps = max(1, take - 1)
    return sorted({first + (2 * n * (last - first) + steps) // (2 * steps) for n in range(take)})


def rhythm(
    maps: Iterable[Tensor],
    response: Tensor,
    *,
    window: int = 10,
    horizon: tuple[int, int] = (10, 50),
    share: float = 0.3,
    sinks: int = 0,
    real: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Rhythm:
    """Signals from attention maps that are at hand.

    Args:
        maps: of each layer ``(B, H, N, N)``, after the softmax and causal; they may come one by one.
        response: which positions are the response, booleans ``(B, N)``, at least one in each row.
        window: no key counts as farther than this in ``waad``.
        horizon: from how far behind, and up to how far, rows count in ``fai``; the paper's other version ends at 100.
        share: of all heads read, how many are local, and how many global.
        sinks: this many of the first tokens are left out, and what is left of a row is scaled to sum to 1: start tokens
            draw attention that means nothing and makes every head seem to look far. Ours; the paper has none.
        real: which positions are no padding, booleans ``(B, N)``: where sinks are counted from.
        layers: the maps' numbers, where they are not the first.

    Raises:
        ValueError: shapes that do not fit, no maps, or a setting out of range.

    >>> uniform = torch.tril(torch.ones(1, 1, 30, 30)) / torch.arange(1, 31)[:, None]
    >>> found = rhythm([uniform], torch.ones(1, 30, dtype=torch.bool), window=30)
    >>> found.waad[0, :4]
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    settings: dict[str, Any] = {"window": window, "horizon": horizon, "share": share, "sinks": sinks}
    return rhythm_of_rows(_whole(maps, response), response, real=real, layers=layers, **settings)


def _whole(maps: Iterable[Tensor], response: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    shape = (len(response), response.shape[-1], response.shape[-1])
    for one in maps:
        if one.dim() != 4 or (one.shape[0], *one.shape[2:]) != shape:
            raise ValueError(
                f"each of maps must be (B, H, N, N), here {shape[0]}, H, {shape[1]}, {shape[2]}; one was "
                f"{tuple(one.shape)}"
            )
        yield [(torch.arange(one.shape[2], device=one.device), one)]


def rhythm_of_rows(
    maps: Iterable[Iterable[tuple[Tensor, Tensor]]],
    response: Tensor,
    *,
    window: int = 10,
    horizon: tuple[int, int] = (10, 50),
    share: float = 0.3,
    sinks: int = 0,
    real: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Rhythm:
    """Signals from attention maps of which some rows are at hand at a time; else as `rhythm`.

    Args:
        maps: for each layer, pairs of rows' places ``(R,)`` and their weights ``(B, H, R, N)``, all rows in all.
        response, window, horizon, share, sinks, real, layers: as in `rhythm`.
    """
    _check(response, window, horizon, share, sinks)
    parts = []
    for layer in maps:
        part = _Sums(response, window, horizon, sinks, real)
        for rows, weights in layer:
            part.add(weights, rows, 0)
        parts.append(part)
    if not parts:
        raise ValueError("maps must hold at least one layer's; there was none")
    numbers = tuple(range(len(parts))) if layers is None else tuple(layers)
    if len(numbers) != len(parts):
        raise ValueError(f"layers must name the {len(parts)} maps; it was {numbers}")
    return _together(numbers, parts, share)


def read_rhythm(
    model: Any,
    inputs: Mapping[str, Any],
    response: Tensor,
    *,
    layers: Iterable[int] | None = None,
    window: int = 10,
    horizon: tuple[int, int] = (10, 50),
    share: float = 0.3,
    sinks: int = 0,
) -> Rhythm:
    """Signals of responses that stand in a model's input, from one more forward without gradient and dropout.

    Only the response's rows are computed with weights, a few at a time, and of each head only sums over rows or keys
    are kept: no map is. Memory is that of ``L * H * N`` numbers a response.

    Args:
        model: a transformers model with a causal language model in it.
        inputs: its arguments, prompt and response together; padding may be on either side.
        response: which positions are the response, booleans ``(B, N)``, at least one in each row.
        layers: which to read; `middle_layers` where None.
        window, horizon, share, sinks: as in `rhythm`.

    Raises:
        TypeError: a model without a causal language model.
        ValueError: as in `rhythm`; layers that are not there; a response of another shape than the input.
    """
    _check(response, window, horizon, share, sinks)
    given = prompt_of(inputs).shape[:2]
    if given != response.shape:
        raise ValueError(
            f"inputs must hold ids or embeddings of response's {tuple(response.shape)}; they were {tuple(given)}"
        )
    if layers is None:
        layers = middle_layers(len(language_layers(model)))
    mask = inputs.get("attention_mask")
    real = mask.bool() if mask is not None and mask.shape == response.shape else None
    if real is not None and bool((response & ~real.to(response.device)).any()):
        raise ValueError("response must not hold padding: attention_mask is 0 at some of its positions")
    settings = (response, window, horizon, sinks, real)
    reader = _Reader(model, layers=layers, settings=settings)
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluating(model), torch.no_grad(), reader:
        model(**dict(inputs) | more)
    numbers = tuple(sorted(reader.numbers))
    return _together(numbers, [reader.sums[n] for n in numbers], share)


def receiver_heads(found: Rhythm, count: int) -> list[tuple[int, int]]:
    """The heads whose attention falls on few tokens of the response, (layer, head), highest kurtosis first.

    Args:
        found: of some responses; the kurtosis is their mean.
        count: how many; all where there are fewer.

    Raises:
        ValueError: a count below 1.
    """
    check_range("count", count, 1)
    mean = found.kurtosis.nanmean(0).nan_to_num(nan=-torch.inf)
    heads = mean.shape[1]
    order = mean.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [(found.layers[n // heads], n % heads) for n in order]


@torch.no_grad()
def alternatives(model: Any, input_ids: Tensor, position: int, count: int, **generate: Any) -> Tensor:
    """What a model goes on with where the token at a position is replaced by each of its likeliest alternatives.

    Args:
        model: a transformers language model.
        input_ids: ``(1, N)`` without padding.
        position: of the token, from 1 on; what stands behind it is generated anew.
        count: how many alternatives, likeliest first; the token itself is none.
        **generate: for the model's generate, such as ``max_new_tokens``.

    Returns:
        ``(count, position + 1 + new)``.

    Raises:
        ValueError: more than one row, a position that is not there, or more alternatives than tokens.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be (1, N); it was {tuple(input_ids.shape)}")
    check_range("position", position, 1, input_ids.shape[1] - 1)
    before = input_ids[:, :position]
    logits = model(input_ids=before).logits[0, -1].float()
    check_range("count", count, 1, len(logits) - 1)
    logits[input_ids[0, position]] = -torch.inf
    chosen = logits.topk(count).indices[:, None]
    prompts = torch.cat([before.expand(count, -1), chosen.to(before)], 1)
    found: Tensor = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **generate)
    return found


def jaccard(one: Iterable[Hashable], other: Iterable[Hashable]) -> float:
    """How many different words are in both, of those in either; 1 where there are none.

    >>> jaccard("a b c".split(), "b c d".split())
    0.5
    """
    left, right = set(one), set(other)
    return len(left & right) / len(left | right) if left | right else 1.0


class _Sums:
    """Of one layer, what its rows add up to: all signals are linear in the weights, so that no map is needed."""

    def __init__(
        self, response: Tensor, window: int, horizon: tuple[int, int], sinks: int, real: Tensor | None
    ) -> None:
        self.response, self.window, self.horizon = response, window, horizon
        order = torch.ones_like(response) if real is None else real.to(response.device)
        self.sink = (order.cumsum(1) <= sinks) & order if sinks else None
        self.rows_seen = torch.zeros_like(response, dtype=torch.float32)
        self.sums: dict[str, Tensor] = {}

    def add(self, weights: Tensor, rows: Tensor, first_key: int) -> None:
        """Weights ``(B, H, R, K)`` of the rows at positions ``(R,)``, over keys from ``first_key`` on."""
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        batch, heads, _, count = wide.shape
        length = self.response.shape[1]
        if not self.sums:
            shape = (batch, heads, length)
            self.sums = {name: wide.new_zeros(shape) for name in ("distance", "influence", "received")}
            self.sums["span"] = wide.new_zeros(batch, heads)
        end = first_key + count
        if self.sink is not None:
            wide = wide * ~self.sink[:, None, None, first_key:end]
            total = wide.sum(-1, keepdim=True)
            wide = wide / torch.where(total > 0, total, 1.0)
        mine = self.response[:, rows].to(wide.dtype)
        wide = wide * mine[:, None, :, None]
        back = (rows[:, None] - torch.arange(first_key, end, device=rows.device)).clamp(min=0)
        within = ((back >= self.horizon[0]) & (back <= self.horizon[1])).to(wide.dtype)
        back = back.to(wide.dtype)
        self.sums["span"] += torch.einsum("bhrk,rk->bh", wide, back)
        self.sums["distance"][:, :, rows] = torch.einsum("bhrk,rk->bhr", wide, back.clamp(max=self.window))
        self.sums["influence"][..., first_key:end] += torch.einsum("bhrk,rk->bhk", wide, within)
        self.sums["received"][..., first_key:end] += wide.sum(2)
        self.rows_seen[:, first_key:end] += (mine @ within).to(self.rows_seen)


def _together(numbers: tuple[int, ...], parts: Sequence[_Sums], share: float) -> Rhythm:
    response = parts[0].response
    device = parts[0].sums["span"].device

    def stacked(name: str) -> Tensor:
        return torch.stack([part.sums[name].to(device) for part in parts], 1)

    rows = response.sum(1).to(device)[:, None, None]
    seen = parts[0].rows_seen.to(device)[:, None, None]
    spans = stacked("span") / rows
    influence = stacked("influence") / seen.clamp(min=1)
    flat = spans.flatten(1)
    take = max(1, round(share * flat.shape[1]))
    order = flat.argsort(dim=1, stable=True)
    ends = order[:, :take], order[:, -take:]
    sets = [torch.zeros_like(flat, dtype=torch.bool).scatter(1, some, True).view_as(spans) for some in ends]
    distance, received = stacked("distance"), stacked("received") / rows[..., None]
    return Rhythm(numbers, response.to(device), spans, distance, influence, received, sets[0], sets[1])


@dataclass
class _Reader(Method):
    """Hands the response's rows to the sums of their layer."""

    _: KW_ONLY
    settings: tuple[Tensor, int, tuple[int, int], int, Tensor | None] = field(repr=False)
    sums: dict[int, _Sums] = field(default_factory=dict, init=False, repr=False)

    def edits(self, site: Site) -> bool:
        return True

    def rows(self, site: Site) -> Tensor:
        return self.settings[0].any(0).to(site.rows.device)[site.rows].nonzero()[:, 0]

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        if site.layer not in self.sums:
            response, window, horizon, sinks, real = self.settings
            self.sums[site.layer] = _Sums(response.to(weights.device), window, horizon, sinks, real)
        self.sums[site.layer].add(weights, site.rows, site.first_key)
        return weights


def _mean(values: Tensor, heads: Tensor) -> Tensor:
    """Mean of ``(B, L, H, N)`` over a set of heads, ``(B, N)``."""
    chosen = heads[..., None].to(values.dtype)
    return (values * chosen).sum((1, 2)) / chosen.sum((1, 2))


def _check(response: Tensor, window: int, horizon: tuple[int, int], share: float, sinks: int) -> None:
    if response.dtype != torch.bool or response.dim() != 2:
        raise ValueError(f"response must be booleans (B, N); it was {response.dtype} {tuple(response.shape)}")
    if not len(response) or not bool(response.any(1).all()):
        raise ValueError("response must mark at least one position in each row")
    check_range("window", window, 1)
    check_range("sinks", sinks, 0)
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5; it was {share}")
    if not 1 <= horizon[0] <= horizon[1]:
        raise ValueError(f"horizon must be two distances, 1 <= first <= last; it was {horizon}")
