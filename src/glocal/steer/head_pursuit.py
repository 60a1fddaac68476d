"""What each attention head writes, which heads write a concept, and a block that scales them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from glocal.hf.install import attention_modules, crosses
from glocal.steer.method import Method, layer_range
from glocal.steer.pursuit import lens, pursuit
from glocal.steer.steering import _KEY, language_layers, speaker

__all__ = ["HeadRank", "HeadScale", "head_writes", "rank_heads", "top_heads", "unembedding"]

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "projection", "proj")
_TOWER = re.compile(r"(^|\.)(vision_model|vision_tower|visual)\.")


class HeadRank(NamedTuple):
    """A head and how much of what it writes the dictionary explains."""

    layer: int
    head: int
    score: float


class _Heads(NamedTuple):
    """Where heads meet: a layer's output projection ``(..., H * D) -> (..., C)``."""

    output: nn.Module
    heads: int
    weight: Tensor  # (C, H * D)


def _layers(model: Any, tower: bool) -> list[_Heads]:
    """Of each layer of the language model, or of the image tower."""
    if not tower:
        return [_heads(path, module) for path, module in language_layers(model).items()]
    found = {path: module for path, module in attention_modules(model).items() if not crosses(path)}
    within = {path: module for path, module in found.items() if _TOWER.search(path)} or found
    if not within:
        raise TypeError(f"{type(model).__name__} has no attention in the registry of transformers")
    return [_heads(path, module) for path, module in within.items()]


def _heads(path: str, module: nn.Module) -> _Heads:
    output = next((child for name in _OUTPUTS if (child := getattr(module, name, None)) is not None), None)
    weight = getattr(output, "weight", None)
    if output is None or weight is None or weight.dim() != 2:
        raise TypeError(f"{path} has no output projection named {', '.join(_OUTPUTS)}")
    if type(output).__name__ == "Conv1D":  # GPT-2's weights are (in, out)
        weight = weight.mT
    config = getattr(module, "config", None)
    heads = next(
        (
            int(count)
            for owner in (module, config)
            for name in ("num_heads", "num_attention_heads")
            if (count := getattr(owner, name, None))
        ),
        0,
    )
    if not heads or weight.shape[1] % heads:
        raise TypeError(f"{path}: {weight.shape[1]} inputs of its output projection are not {heads} heads")
    return _Heads(output, heads, weight)


@torch.no_grad()
def head_writes(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    where: int | Tensor | None = None,
    layers: Iterable[int] | None = None,
    tower: bool = False,
) -> dict[int, Tensor]:
    """What each head adds to the residual stream, at one position of each row or the mean of several.

    ``out_h @ W_O,h``: the heads of a layer and the projection's bias sum to the attention block's output. In models
    with grouped queries a head is a query head. A model that norms the block's output before adding it (Gemma 2 and 3)
    is read before that norm.

    Args:
        model: a transformers model, in eval mode.
        inputs: its arguments; a batch of prompts that end at the same place (pad on the left), with answers for
            ``where`` to be on them.
        where: a position for all rows, one each ``(B,)``, or which positions to take the mean of, booleans ``(B, N)``.
            Where None, the last one, and in a tower the mean of all; CLIP's class token is 0.
        layers: numbers of the layers; all where None.
        tower: whether the image tower is read instead of the language model: rows are then the pictures, or their
            tiles, that it sees.

    Returns:
        For each layer ``(H, B, C)`` in float32 or the model's wider type.

    Raises:
        TypeError: attention without a known output projection.
        ValueError: layers or positions that are not there, padding on the right.
    """
    places = _layers(model, tower)
    numbers = range(len(places)) if layers is None else sorted(layer_range(layers, len(places)))
    mask = inputs.get("attention_mask")
    if where is None and not tower:
        where = -1
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise ValueError("attention_mask ends with padding: pad on the left, or give where")
    found: dict[int, Tensor] = {}

    def keep(number: int, states: Tensor) -> None:
        place = places[number]
        if states.dim() != 3:
            raise TypeError(f"{type(model).__name__} packs all pictures into one row; its tower cannot be read")
        at = _at(states, where)
        at = at.to(torch.promote_types(at.dtype, torch.float32)).unflatten(-1, (place.heads, -1))
        weight = place.weight.to(at).unflatten(1, (place.heads, -1))
        found[number] = torch.einsum("bhd,chd->hbc", at, weight)

    with _before([(places[n].output, n) for n in numbers], keep):
        model(**inputs)
    return {n: found[n] for n in numbers}


def _at(states: Tensor, where: int | Tensor | None) -> Tensor:
    """Of states ``(B, N, ...)`` those at ``where``, ``(B, ...)``."""
    count, length = states.shape[:2]
    if where is None:
        return states.mean(1)
    if isinstance(where, Tensor) and where.dtype == torch.bool:
        if where.shape != (count, length) or not bool(where.any(1).all()):
            raise ValueError(
                f"where must be true somewhere in each row, {(count, length)}; it was {tuple(where.shape)}"
            )
        share = where.to(states) / where.sum(1, keepdim=True)
        return torch.einsum("bn,bnc->bc", share, states)
    at = torch.as_tensor(where, device=states.device).expand(count)
    if bool((at >= length).any() | (at < -length).any()):
        raise ValueError(f"where must be from {-length} to {length - 1}; it was {where}")
    return states[torch.arange(count, device=states.device), at % length]


@contextmanager
def _before(outputs: list[tuple[nn.Module, int]], keep: Any) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, args, number=number: keep(number, args[0]))
        for module, number in outputs
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unembedding(
    model: Any,
    tokens: Sequence[int | Sequence[int]] | None = None,
    *,
    gain: bool = True,
    several: Literal["first", "mean"] = "first",
) -> Tensor:
    """Directions of the residual stream that raise the logits of tokens: the rows of the language model's head.

    Args:
        model: a transformers model with a language model's head.
        tokens: which rows, such as those of a concept's words; all where None. A word of several tokens is a list.
        gain: whether the rows are multiplied by the gain of the final norm, through which the stream reaches the head.
        several: of a word of several tokens take the first, or the mean of their rows.

    Returns:
        ``(K, C)``, not normalised: `pursuit` does that.

    Raises:
        TypeError: a model without a head.
        ValueError: no tokens, or with ``gain`` no final norm that is found.
    """
    head = getattr(speaker(model), "get_output_embeddings", lambda: None)()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no head over a vocabulary")
    if several not in ("first", "mean"):
        raise ValueError(f"several must be 'first' or 'mean'; it was {several!r}")
    rows: Tensor = head.weight.detach()
    if tokens is not None:
        words = [[word] if isinstance(word, int) else list(word) for word in tokens]
        if not words or not all(words):
            raise ValueError(f"tokens must be at least one, and no word empty; they were {list(tokens)}")
        rows = torch.stack([rows[word].mean(0) if several == "mean" else rows[word[0]] for word in words])
    return rows * _gain(model, rows.shape[1]).to(rows) if gain else rows


@torch.no_grad()
def _gain(model: Any, width: int) -> Tensor:
    """The final norm's, read off what it makes of plus and minus one: Gemma's is one more than its weight."""
    path = next(iter(language_layers(model)))
    stack = re.split(r"\.\d+\.", path)[0]
    parent = model.get_submodule(stack.rpartition(".")[0])
    norms = [
        m for name, m in parent.named_children() if type(m).__name__.lower().endswith("norm") and "emb" not in name
    ]
    if not norms:
        raise ValueError(f"no norm is found after the layers of {type(model).__name__}; pass gain=False")
    weight = next(norms[-1].parameters())
    probe = torch.ones(width, dtype=weight.dtype, device=weight.device)
    probe[1::2] = -1
    found: Tensor = (norms[-1](probe[None, None]) - norms[-1](-probe[None, None]))[0, 0] / 2 * probe
    return found


def rank_heads(
    writes: Mapping[int, Tensor],
    dictionary: Tensor,
    *,
    steps: int | None = None,
    by: Literal["pursuit", "lens"] = "pursuit",
    center: bool = True,
    normalise: bool = True,
) -> list[HeadRank]:
    """Heads in the order in which a concept's directions explain what they write (Basile et al., 2025, 2510.21518).

    That a head writes a concept does not say that the model needs it for that: scale it, and see.

    Args:
        writes: of `head_writes`, for each layer ``(H, n, C)`` over n samples.
        dictionary: a concept's directions ``(K, C)``, of `unembedding`.
        steps: atoms to take; ``min(K, 50)`` where None.
        by: the share of the variance explained at the last step, or as a baseline `lens`, of the centred writes too.
        center, normalise: as for `pursuit`.

    Raises:
        ValueError: as `pursuit`; no such way.

    >>> writes = {3: torch.stack([torch.eye(3)[[0, 1, 0, 1]], torch.eye(3)[[0, 2, 2, 0]]])}
    >>> [(rank.layer, rank.head) for rank in rank_heads(writes, torch.eye(3)[[2]])]
    [(3, 1), (3, 0)]
    """
    if by not in ("pursuit", "lens"):
        raise ValueError(f"by must be 'pursuit' or 'lens'; it was {by!r}")
    ranks = []
    for layer, each in writes.items():
        if by == "lens":
            scores = lens(each - each.mean(-2, keepdim=True) if center else each, dictionary, normalise=normalise)
        else:
            count = min(len(dictionary), 50) if steps is None else steps
            scores = pursuit(each, dictionary, count, center=center, normalise=normalise).explained[:, -1]
        ranks += [HeadRank(layer, head, float(score)) for head, score in enumerate(scores)]
    return sorted(ranks, key=lambda rank: -rank.score)


def top_heads(ranks: Sequence[HeadRank], share: float = 0.01) -> list[tuple[int, int]]:
    """The first of a ranking, at least one: layers and heads for `HeadScale`.

    >>> top_heads([HeadRank(0, 1, 0.9), HeadRank(2, 0, 0.1)])
    [(0, 1)]
    """
    return [(rank.layer, rank.head) for rank in ranks[: max(1, round(share * len(ranks)))]]


@dataclass
class HeadScale(Method):
    """Multiplies what chosen heads write, at all positions (Basile et al., 2025, arXiv 2510.21518).

    -1 suppresses what they write, 0 takes them out, more than 1 (5, say) enhances it; 1 changes nothing. The attention
    itself is not touched, whichever kernel computes it.

    Args:
        model: a transformers model; of a model of pictures alone, or of pictures and texts, with ``tower``.
        heads: layers and heads, such as `top_heads` gives; negative numbers count from the end.
        factor: what they are multiplied by.
        tower: whether the layers are the image tower's.

    Raises:
        TypeError: attention without a known output projection.
        ValueError: no heads, some that are not there, or ``layers``, which ``heads`` says.

    Example::

        ranks = rank_heads(head_writes(model, inputs), unembedding(model, tokens=months))
        with HeadScale(model, heads=top_heads(ranks), factor=-1):
            model.generate(**inputs)
    """

    _: KW_ONLY
    heads: Sequence[tuple[int, int]] = ()
    factor: float = -1.0
    tower: bool = False
    _hooks: list[Any] = field(default_factory=list, init=False, repr=False)

    acts_in_attention = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            raise ValueError("layers are said by heads, pairs of a layer and a head; layers must be None")
        places = _layers(self.model, self.tower)
        if not self.heads:
            raise ValueError("heads must be pairs of a layer and a head, at least one; there were none")
        self.numbers = layer_range([layer for layer, _ in self.heads], len(places), "heads' layers")
        self._scales: list[tuple[nn.Module, Tensor]] = []
        for number in sorted(self.numbers):
            place = places[number]
            mine = [head for layer, head in self.heads if layer % len(places) == number]
            scale = torch.ones(place.heads, device=place.weight.device)
            scale[sorted(layer_range(mine, place.heads, "heads"))] = self.factor
            self._scales.append((place.output, scale.repeat_interleave(place.weight.shape[1] // place.heads)))

    def __enter__(self) -> Self:
        if self._hooks:
            raise ValueError("HeadScale is in its with block already")
        if not self.tower:
            super().__enter__()
        self._hooks = [
            output.register_forward_pre_hook(lambda _, args, scale=scale: self._scaled(args, scale))
            for output, scale in self._scales
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not self.tower:
            super().__exit__(kind, error, trace)

    def _rests(self) -> bool:
        """Whether another method runs the model without the others, as for its second branch."""
        steering = vars(self.model).get(_KEY)
        alone = None if steering is None else steering._alone
        return steering is not None and (steering.paused or (alone is not None and alone is not self))

    def _scaled(self, args: tuple[Any, ...], scale: Tensor) -> tuple[Any, ...] | None:
        if self._rests():
            return None
        return args[0] * scale.to(args[0]), *args[1:]
