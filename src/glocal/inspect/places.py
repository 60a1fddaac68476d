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
        top = None if ours else _adaptation(model, stack)
        places = _of_transformers(model) if top is not None else ours
        if not places:
            raise ValueError(
                f"model must have layers of softmax attention, of transformers or glocal.nn; {type(model).__name__} "
                "has none"
            )
        operators: dict[int, Operator] = {}
        for place in places:  # in their order, by which who makes them may number them
            if isinstance(place.module, Attention):
                _take(place, make(place), stack)
            else:
                operators[id(place.module)] = make(place)
        if top is not None:
            stack.callback(setattr, top, "operator", top.operator)
            top.operator = lambda module: operators.get(id(module), attend)
        yield places


def _is_softmax(layer: Attention) -> bool:
    return type(layer).mix is Attention.mix


def _take(place: Place, operator: Operator, stack: ExitStack) -> None:
    """Put an operator into a layer of `glocal.nn`."""
    layer = place.module
    before = vars(layer).pop("operator", None)
    vars(layer)["operator"] = operator

    def restore() -> None:
        del vars(layer)["operator"]
        if before is not None:
            vars(layer)["operator"] = before

    stack.callback(restore)

    def note(module: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        context = more.get("context") if len(given) < 2 else given[1]
        place.cross = context is not None

    stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)


def _adaptation(model: nn.Module, stack: ExitStack) -> Any:
    """What adapts a model of transformers, or an adaptation that changes nothing; None for other models."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return None
    if not isinstance(model, PreTrainedModel):
        return None
    from glocal.hf.adapt import adapt
    from glocal.hf.cache import STACK
    from glocal.steer.steering import _KEY

    if _KEY in vars(model):
        raise ValueError("model is being steered (glocal.steer): leave that block first")
    return vars(model)[STACK][-1] if vars(model).get(STACK) else stack.enter_context(adapt(model))


def _of_transformers(model: nn.Module) -> list[Place]:
    """Layers by path; where a mechanism is in a layer's place, its own frame if that is softmax."""
    from glocal.hf.cache import STACK
    from glocal.hf.install import attention_modules, crosses

    frames = {path: frame for handle in vars(model)[STACK] for path, frame in handle.frames.items()}
    found = [Place(path, frames.get(path, module), crosses(path)) for path, module in attention_modules(model).items()]
    return [place for place in found if not isinstance(place.module, Attention) or _is_softmax(place.module)]
