"""The past of a streaming assistant in few tokens: what stays in the cache after a turn, and how it is learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glocal.steer.steering import language_layers, speaker

__all__ = [
    "BUDGETS",
    "KINDS",
    "Compressor",
    "Place",
    "Segments",
    "beacons",
    "interleave",
    "kept",
    "segment_mask",
    "select_cache",
]

KINDS = ("padding", "system", "question", "low", "high", "reply", "compressed")
"""What a token of a stream can be, in the order of the numbers in tensors of kinds."""
PADDING, SYSTEM, QUESTION, LOW, HIGH, REPLY, COMPRESSED = range(7)
BUDGETS = (10, 12, 15)
"""Compression tokens a turn, one of them drawn for each step of training, in the authors' beacon form."""

Place = Callable[[Tensor, Tensor], Tensor]
"""From kinds ``(N,)`` of a turn and the number of the piece that each token belongs to ``(N,)``, how many compression
tokens follow each token ``(N,)``."""
_MAPS = ("q_proj", "k_proj", "v_proj")


# What stays.


def kept(kinds: Tensor) -> Tensor:
    """The tokens that outlive their turn: of the system's prompt, of questions, and the compression tokens.

    Args:
        kinds: numbers of `KINDS`, any shape.

    Returns:
        Booleans of that shape.

    >>> kept(torch.tensor([1, 2, 3, 3, 6, 4, 5, 6])).int().tolist()
    [1, 1, 0, 0, 1, 0, 0, 1]
    """
    return (kinds == SYSTEM) | (kinds == QUESTION) | (kinds == COMPRESSED)


def select_cache(cache: Any, index: Tensor) -> None:
    """Keep these positions of a transformers cache, in place, in all layers and heads.

    Keys stand in the cache turned by their positions, so that what is kept keeps its own: feed new tokens with
    ``position_ids`` that go on from the true length, not from the cache's.

    Args:
        cache: a ``DynamicCache`` whose layers attend in full.
        index: ``(K,)`` ascending, or ``(B, K)`` where rows of the batch keep different ones.

    Raises:
        TypeError: a layer that keeps a window, a state, or a fixed size.
        ValueError: positions that are not there, or not ascending.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.arange(5.0).view(1, 1, 5, 1), torch.zeros(1, 1, 5, 1), 0)
    >>> select_cache(cache, torch.tensor([0, 3]))
    >>> cache.layers[0].keys.flatten().tolist()
    [0.0, 3.0]
    """
    check_cache(cache)
    if index.dim() not in (1, 2) or index.dtype != torch.long:
        raise ValueError(f"index must be int64, (K,) or (B, K); it was {index.dtype} {tuple(index.shape)}")
    layers = [layer for layer in cache.layers if layer.get_seq_length()]
    length = min((layer.get_seq_length() for layer in layers), default=0)
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < length and bool((index.diff() > 0).all())):
        raise ValueError(f"index must ascend within the cache's {length} positions; it was {index.tolist()}")
    for layer in layers:
        layer.keys, layer.values = (_select(states, index) for states in (layer.keys, layer.values))


def check_cache(cache: Any) -> None:
    """Raise a TypeError where positions cannot be taken out of a cache."""
    from transformers.cache_utils import DynamicLayer

    wrong = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if wrong:
        raise TypeError(
            f"the past can be compressed in layers that attend in full (DynamicLayer); the cache has {sorted(wrong)}"
        )


def _select(states: Tensor, index: Tensor) -> Tensor:
    index = index.to(states.device)
    if index.dim() == 1:
        return states.index_select(2, index)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def segment_mask(kinds: Tensor, turns: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What each token may see when all turns are read in one pass, as they would be with the past dropped.

    A token sees all of its own turn up to itself, and of earlier turns what `kept` says. Give it to a model as
    ``attention_mask``, with ``position_ids`` counted over all tokens.

    Args:
        kinds: ``(B, N)``; padding is seen by nobody, and sees itself.
        turns: ``(B, N)``, the number of each token's turn, never falling.
        dtype: for 0 and the least number of that type instead of booleans, as models with eager attention need it.

    Returns:
        ``(B, 1, N, N)``, true where row sees column.

    Raises:
        ValueError: shapes that differ, or turns that fall.

    >>> segment_mask(torch.tensor([[1, 3, 6, 3]]), torch.tensor([[0, 0, 0, 1]]))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    if kinds.dim() != 2 or kinds.shape != turns.shape:
        raise ValueError(f"kinds and turns must be (B, N) both; they were {tuple(kinds.shape)}, {tuple(turns.shape)}")
    if bool((turns.diff() < 0).any()):
        raise ValueError("turns must never fall along a row")
    n = kinds.shape[1]
    back = torch.ones(n, n, dtype=torch.bool, device=kinds.device).tril()
    seen = (kinds != PADDING)[:, None] & (kept(kinds)[:, None] | (turns[:, :, None] == turns[:, None]))
    mask = (back & seen | torch.eye(n, dtype=torch.bool, device=kinds.device))[:, None]
    if dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


# Where compression tokens stand.


class Segments:
    """The paper's places: so many after each run of low frames, after each high frame, and after each reply.

    Args:
        count: tokens a segment.

    Raises:
        ValueError: fewer than one.

    >>> kinds, pieces = torch.tensor([2, 3, 3, 4, 4, 4, 4, 5]), torch.tensor([0, 1, 2, 3, 3, 4, 4, 5])
    >>> Segments(2)(kinds, pieces).tolist()
    [0, 0, 2, 0, 2, 0, 2, 2]
    """

    def __init__(self, count: int = 1) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1; it was {count}")
        self.count = count

    def __call__(self, kinds: Tensor, pieces: Tensor) -> Tensor:
        """How many follow each token, ``(N,)`` from kinds and pieces ``(N,)``."""
        another = torch.ones_like(kinds, dtype=torch.bool)
        # Frames of a low run are one segment, high frames are each their own.
        another[:-1] = (kinds[1:] != kinds[:-1]) | ((kinds[1:] != LOW) & (pieces[1:] != pieces[:-1]))
        raw = (kinds == LOW) | (kinds == HIGH) | (kinds == REPLY)
        return (another & raw).long() * self.count


def beacons(kinds: Tensor, pieces: Tensor, *, budget: int | None = None, draw: torch.Generator | None = None) -> Tensor:
    """The authors' code's places: one at the turn's end, after high frames and replies; the others at random.

    Args:
        kinds: of the turn's tokens, ``(N,)``.
        pieces: which frame, question or reply each is of, ``(N,)``.
        budget: how many; one of `BUDGETS` where None. More where there are more that must be, fewer where the turn
            has fewer tokens.
        draw: of what is random, on the processor.

    Returns:
        0 or 1 for each token, ``(N,)``.
    """
    if budget is None:
        budget = BUDGETS[int(torch.randint(len(BUDGETS), (1,), generator=draw))]
    if budget < 1:
        raise ValueError(f"budget must be at least 1; it was {budget}")
    must = Segments(1)(kinds, pieces) * (kinds != LOW)
    must[-1] = 1
    order = torch.rand(len(kinds), generator=draw).to(kinds.device) + must
    chosen = order.topk(min(len(kinds), max(budget, int(must.sum())))).indices
    return torch.zeros_like(must).index_fill(0, chosen, 1)


def interleave(embeds: Tensor, kinds: Tensor, counts: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Put compression tokens between the tokens of a turn.

    Args:
        embeds: ``(N, C)``.
        kinds: ``(N,)``.
        counts: how many follow each token, ``(N,)``.
        token: the compression token's embedding, ``(C,)``.

    Returns:
        Embeddings ``(N + K, C)`` and kinds ``(N + K,)``.

    >>> embeds, kinds = interleave(torch.ones(2, 1), torch.tensor([3, 5]), torch.tensor([0, 2]), torch.zeros(1))
    >>> embeds[:, 0].tolist(), kinds.tolist()
    ([1.0, 1.0, 0.0, 0.0], [3, 5, 6, 6])
    """
    places = torch.arange(len(kinds), device=kinds.device) + counts.cumsum(0) - counts
    total = len(kinds) + int(counts.sum())
    spread = token.to(embeds).expand(total, -1).index_copy(0, places, embeds)
    return spread, kinds.new_full((total,), COMPRESSED).index_copy(0, places, kinds)


# What is learned.


class Compressor(nn.Module):
    """The compression token's embedding and its own query, key and value maps, to be trained.

    In a ``with compressor.on(model):`` block the model takes one more argument, ``compressed``: booleans ``(B, N)``,
    which of the tokens are compression tokens. Those go through the maps of their own in every layer, all others
    through the model's, untouched. After the last such block the model is what it was, whatever happened in it.

    Args:
        model: a transformers model whose attention has ``q_proj``, ``k_proj`` and ``v_proj``.
        token: the token, of end say, whose embedding it begins with.
        maps: own maps, which begin as copies of the model's; False for an embedding alone.

    Raises:
        TypeError: a model without these projections.
        ValueError: a token that the model does not have.

    Shapes:
        embedding: ``(C,)``.
    """

    def __init__(self, model: Any, token: int, maps: bool = True) -> None:
        super().__init__()
        words = speaker(model).get_input_embeddings()
        if not 0 <= token < words.num_embeddings:
            raise ValueError(f"token must be from 0 to {words.num_embeddings - 1}; it was {token}")
        with torch.no_grad():
            self.embedding = nn.Parameter(words(torch.tensor([token], device=words.weight.device))[0].clone())
        copies = [copy.deepcopy(layer) for layer in _projections(model)] if maps else []
        self.maps = nn.ModuleList(nn.ModuleDict(layer) for layer in copies).requires_grad_(True)
        self._where: Tensor | None = None
        self._hooks: list[Any] = []
        self._users: list[Any] = []  # a list, so that the model is no part of this module

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Put the maps into the model they were made for.

        Raises:
            ValueError: the model has another number of layers, or the maps are in another one now.
        """
        if self._users and self._users[0] is not model:
            raise ValueError("the compressor is in another model already")
        if not self._users:
            self._put(model)
        self._users.append(model)
        try:
            yield
        finally:
            self._users.pop()
            if not self._users:
                self._take_out()

    def _put(self, model: Any) -> None:
        layers = _projections(model) if len(self.maps) else []
        if len(layers) != len(self.maps):
            raise ValueError(f"the compressor has {len(self.maps)} layers, the model {len(layers)}")
        self._hooks.append(speaker(model).register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, own in zip(layers, self.maps, strict=True):
            for name in _MAPS:
                hook = partial(self._replace, own[name])  # type: ignore[index]
                self._hooks.append(layer[name].register_forward_hook(hook))

    def _take_out(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._where = [], None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # It stays until the next call, so that checkpointed layers find it when they run again.
        where = kwargs.pop("compressed", None)
        if where is not None and where.dtype != torch.bool:
            raise ValueError(f"compressed must be booleans (B, N); it was {where.dtype}")
        self._where = where if where is not None and bool(where.any()) else None
        return args, kwargs

    def _replace(self, own: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        where = self._where
        if where is None:
            return None
        where = where.to(output.device).expand(output.shape[:2])
        found: Tensor = own(args[0][where])
        return output.index_put(where.nonzero(as_tuple=True), found.to(output.dtype))


def _projections(model: Any) -> list[dict[str, nn.Module]]:
    layers = []
    for path, module in language_layers(model).items():
        missing = [name for name in _MAPS if not isinstance(getattr(module, name, None), nn.Module)]
        if missing:
            raise TypeError(f"{path} has no {', '.join(missing)}: its maps cannot be told apart; give maps=False")
        layers.append({name: getattr(module, name) for name in _MAPS})
    return layers
