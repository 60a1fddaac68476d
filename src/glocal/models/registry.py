"""Networks by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["create", "maker", "names", "parameters", "register"]

Maker = TypeVar("Maker", bound=Callable[..., nn.Module])

_MAKERS: dict[str, Callable[..., nn.Module]] = {}


def register(maker: Maker) -> Maker:
    """Make a function known to `create` under its own name. A decorator."""
    name = maker.__name__
    if name in _MAKERS:
        raise ValueError(f"two networks are called {name!r}")
    _MAKERS[name] = maker
    return maker


@cache
def _load() -> None:
    package = importlib.import_module("glocal.models")
    for module in pkgutil.walk_packages(package.__path__, "glocal.models."):
        importlib.import_module(module.name)


def names(text: str = "") -> tuple[str, ...]:
    """The networks that `create` makes, in order; those whose name contains ``text``.

    >>> "zebra_tiny" in names()
    True
    """
    _load()
    return tuple(sorted(name for name in _MAKERS if text in name))


def maker(name: str) -> Callable[..., nn.Module]:
    """The function that `create` calls, whose docstring tells the variant and its options.

    Raises:
        ValueError: no network has that name; the message says which are near.

    >>> maker("favit_b0").__module__
    'glocal.models.vision.favit'
    """
    _load()
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "glocal.models.names() lists them"
        raise ValueError(f"no network is called {name!r}; {hint}")
    return _MAKERS[name]


def create(name: str, **options: Any) -> nn.Module:
    """A network by its name, with random weights; options override those of the published variant.

    Raises:
        ValueError: no network has that name; the message says which are near.
        TypeError: an option that the network does not have.

    >>> import glocal
    >>> glocal.create("zebra_tiny", vocab=100).vocab
    100
    """
    return maker(name)(**options)


def parameters(name: str, **options: Any) -> int:
    """How many parameters `create(name, **options)` has, without memory for them.

    Raises:
        ValueError, TypeError: as of `create`.

    >>> parameters("favit_b0")
    3427704
    """
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **options).parameters())
