"""The one place at which what is computed in attention can be looked at or changed, in models of either kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from glocal.attention import attend
from glocal.nn import Attention

__all__ = ["Operator", "Place", "intercept"]

Operator = Callable[..., Any]
"""Computes attention, with the arguments and the result of `glocal.attend`."""


class Place:
    """A layer's attention.

    Attributes:
        name: the path of its module in the model.
        module: that module.
        cross: whether keys come from another sequence; of layers of `glocal.nn`, in the newest call.
    """

    def __init__(self, name: str, module: nn.Module, cross: bool = False) -> None:
        self.name, self.module, self.cross = name, module, cross


@contextmanager
def intercept(model: nn.Module, make: Callable[[Place], Operator]) -> Iterator[list[Place]]:
    """Let operators of one's own compute the attention of a model, until the block ends.

    Args:
        model: of transformers, as it is or adapted (`glocal.hf.adapt`), or with layers of `glocal.nn` that are softmax
            under a pattern; layers of other kinds are left alone.
        make: gives the operator of each layer; most often it calls `glocal.attend` with what it is given and keeps or
            changes something.

    Yields:
        The layers, in the order in which they stand in the model.

    Raises:
        TypeError: a model of transformers whose attention is fixed.
        ValueError: it has no such layer, or is being steered.

    >>> import torch
    >>> seen = []
    >>> def look(place):
    ...     return lambda q, k, v, where, **options: seen.append(repr(where)) or attend(q, k, v, where, **options)
    >>> layer = Attention(8, 2, causal=True)
    >>> with intercept(layer, look):
    ...     out = layer(torch.randn(1, 5, 8))
    >>> seen
    ['causal()']
    """
    with ExitStack() as stack:
        ours = [Place(n, m) for n, m in model.named_modules() if isinstance(m, Attention) and _is_softmax(m)]
        places = list(ours) if ours else _open(model, make, stack)
        frames = [place for place in places if isinstance(place.module, Attention)]
        for place in frames:
            _take(place, make, stack)
        if not places:
            raise ValueError(
                f"model must have layers of softmax attention, of transformers or glocal.nn; {type(model).__name__} "
                "has none"
            )
        yield places


def _is_softmax(layer: Attention) -> bool:
    return type(layer).mix is Attention.mix


def _take(place: Place, make: Callable[[Place], Operator], stack: ExitStack) -> None:
    """Put an operator into a layer of `glocal.nn`."""
    layer = place.module
    before = vars(layer).get("operator")
    vars(layer)["operator"] = make(place)
    stack.callback(vars(layer).__setitem__, "operator", before) if before else stack.callback(
        vars(layer).pop, "operator", None
    )

    def note(module: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        context = more.get("context") if len(given) < 2 else given[1]
        place.cross = context is not None

    stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)


def _open(model: nn.Module, make: Callable[[Place], Operator], stack: ExitStack) -> list[Place]:
    """Put operators into a model of transformers: through what adapts it, or an adaptation that changes nothing."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    from glocal.hf.adapt import adapt
    from glocal.hf.cache import STACK
    from glocal.hf.install import attention_modules, crosses

    if "_glocal_steering" in vars(model):
        raise ValueError("model is being steered (glocal.steer): leave that block first")
    top = vars(model)[STACK][-1] if vars(model).get(STACK) else stack.enter_context(adapt(model))
    frames = {path: frame for handle in vars(model)[STACK] for path, frame in handle.frames.items()}
    places, operators = [], {}
    for path, module in attention_modules(model).items():
        frame = frames.get(path)
        if frame is None:
            place = Place(path, module, crosses(path))
            operators[id(module)] = make(place)
            places.append(place)
        elif _is_softmax(frame):
            places.append(Place(path, frame))
    before = top.operator
    top.operator = lambda module: operators.get(id(module), attend)
    stack.callback(setattr, top, "operator", before)
    return places
