"""What every way of steering is: settings and a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from math import inf
from types import TracebackType
from typing import Any, Self

from glocal.steer.hooks import Hooks
from glocal.steer.spans import SpanMap
from glocal.steer.steering import Steering, language_layers

__all__ = ["Method", "check_range", "layer_range"]


@dataclass
class Method(Hooks):
    """Base of the methods that act inside a model: a ``with`` block puts it in, and takes it out whatever happens.

    A subclass is a dataclass of settings that overrides what it needs of `Hooks`. Several methods may be in one model
    at a time: they act in the order in which they were entered.

    Args:
        model: a transformers model with a causal language model in it.
        layers: the layers that it acts on; negative ones count from the end; its own default where None.
        spans: what the prompt's positions are, where that cannot be read from ``input_ids``.

    Raises:
        TypeError, ValueError: the model is one that the method does not fit, or a setting is out of range.
    """

    model: Any
    _: KW_ONLY
    layers: Iterable[int] | None = None
    spans: SpanMap | None = None
    numbers: frozenset[int] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        count = len(language_layers(self.model))
        self.numbers = layer_range(self.layers, count) if self.layers is not None else self.default_layers(count)

    def default_layers(self, count: int) -> frozenset[int]:
        """Numbers of the layers that it acts on unless told otherwise."""
        return frozenset(range(count))

    # The with block.

    def __enter__(self) -> Self:
        Steering.of(self.model).push(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Steering.of(self.model).pop(self)


def layer_range(layers: Iterable[int], count: int, name: str = "layers") -> frozenset[int]:
    """Numbers of layers, negative ones counted from the end.

    Raises:
        ValueError: none, or one that is not there.

    >>> sorted(layer_range([0, -1], 4))
    [0, 3]
    """
    numbers: Sequence[int] = list(layers)
    wrong = [n for n in numbers if not -count <= n < count]
    if wrong or not numbers:
        raise ValueError(f"{name} must be numbers from {-count} to {count - 1}, at least one; they were {numbers}")
    return frozenset(n % count for n in numbers)


def check_range(name: str, value: float, low: float, high: float = inf) -> None:
    """Raise a ValueError where a setting is not from ``low`` to ``high``."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {bound}; it was {value:g}")
