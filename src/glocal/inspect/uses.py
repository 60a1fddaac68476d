"""How a layer can be used, found out by trying: what reaches what, by truncation, perturbation and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.nn import USES, Attention

__all__ = ["Verdict", "layers", "reach", "uses", "verify"]


def reach(fn: Callable[[Tensor], Tensor], x: Tensor, *, seed: int = 0) -> Tensor:
    """Which input tokens reach which output tokens, by gradients that are not zero.

    Args:
        fn: from ``(1, *grid, C)`` to ``(1, *grid_out, C_out)``.
        x: the input at which gradients are taken. A hard choice passes none: what only decides it does not show.

    Returns:
        Booleans ``(N_out, N_in)``, grids flattened.

    >>> reach(lambda x: x.cumsum(1), torch.randn(1, 3, 2)).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = fn(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
        tokens = (out * weights).sum(-1).flatten()
        found = [torch.autograd.grad(t, x, retain_graph=True, allow_unused=True)[0] for t in tokens]
    return torch.stack([(torch.zeros_like(x) if g is None else g).abs().sum(-1).flatten() > 0 for g in found])


@dataclass(frozen=True)
class Verdict:
    """What was found for one use: ``checks`` by name, or the layer's reason why it has no such use."""

    use: str
    checks: dict[str, bool]
    refused: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the layer has the use and every check came out."""
        return self.refused is None and all(self.checks.values())


def verify(kind: type[Attention], use: str, *, seed: int = 0) -> Verdict:
    """Try one use of a layer on a dozen tokens with its ``tiny`` settings.

    Causal: an output does not depend on what comes after it (*truncation*: the outputs of a shortened input are the
    first outputs; *perturbation*: changing what comes after changes nothing; *gradients*: none from there), and
    *decoding* token by token with the layer's cache gives the same. Noncausal: perturbation and gradients find that
    later tokens do count. Cross: the context counts, and the other queries do not.

    >>> from glocal.nn import SlidingWindowAttention
    >>> verify(SlidingWindowAttention, "causal-self").checks
    {'truncation': True, 'perturbation': True, 'gradients': True, 'decoding': True}
    >>> verify(SlidingWindowAttention, "causal-cross").refused is None
    False
    """
    if use not in USES:
        raise ValueError(f"use must be one of {', '.join(USES)}; it was {use!r}")
    causal, cross = use.startswith("causal"), use.endswith("cross")
    settings = dict(kind.tiny)
    grid: tuple[int, ...] = settings.pop("grid", (12,))
    heads: int = settings.pop("num_heads", 2)
    torch.manual_seed(seed)
    try:
        layer = kind(8 * heads, heads, causal=causal, **settings).double().eval()
        x = torch.randn(1, *grid, 8 * heads, dtype=torch.float64)
        context = torch.randn(1, *(n + 4 for n in grid), 8 * heads, dtype=torch.float64) if cross else None
        with torch.no_grad():
            layer(x, context)
    except ValueError as error:
        if " has no " not in str(error):
            raise
        return Verdict(use, {}, str(error))
    with torch.no_grad():
        if context is not None:
            checks = _cross(layer, x, context, causal)
        elif causal:
            checks = _causal(layer, x)
        else:
            checks = _noncausal(layer, x)
    return Verdict(use, checks)


def uses(kind: type[Attention]) -> tuple[str, ...]:
    """The uses of a layer that were verified.

    >>> from glocal.nn import MixtureOfBlocksAttention
    >>> uses(MixtureOfBlocksAttention)
    ('noncausal-self', 'causal-self', 'noncausal-cross')
    """
    return tuple(use for use in USES if verify(kind, use).holds)


def layers(objects: Iterable[str]) -> list[type[Attention]]:
    """The attention layers among dotted names, such as a catalogue record's objects.

    >>> layers(["glocal.nn.MixtureOfBlocksAttention", "glocal.cache.BlockCache"])
    [<class 'glocal.nn.moba.MixtureOfBlocksAttention'>]
    """
    found = []
    for name in objects:
        module, _, attribute = name.rpartition(".")
        try:
            value = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            continue
        if isinstance(value, type) and issubclass(value, Attention):
            found.append(value)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-9))


def _changed(x: Tensor, rows: slice) -> Tensor:
    x = x.clone()
    x[:, rows] = torch.randn(x[:, rows].shape, dtype=x.dtype)
    return x


def _lower(reached: Tensor, shift: int = 0) -> bool:
    return not bool(reached.triu(1 + shift).any())


def _causal(layer: Attention, x: Tensor) -> dict[str, bool]:
    full, length = layer(x), x.shape[1]
    checks = {
        "truncation": all(_same(layer(x[:, :t]), full[:, :t]) for t in range(1, length)),
        "perturbation": all(_same(layer(_changed(x, slice(t, None)))[:, :t], full[:, :t]) for t in range(1, length)),
        "gradients": _lower(reach(layer, x)),
    }
    if x.dim() == 3:
        cache = layer.new_cache()
        steps = [layer(x[:, t : t + 1], cache=cache) for t in range(length)]
        checks["decoding"] = _same(torch.cat(steps, 1), full)
    return checks


def _noncausal(layer: Attention, x: Tensor) -> dict[str, bool]:
    full, length = layer(x), x.shape[1]
    moved = [not _same(layer(_changed(x, slice(t, None)))[:, :t], full[:, :t]) for t in range(1, length)]
    return {"perturbation": any(moved), "gradients": not _lower(reach(layer, x))}


def _cross(layer: Attention, x: Tensor, context: Tensor, causal: bool) -> dict[str, bool]:
    full, length = layer(x, context), x.shape[1]
    shift = context.shape[1] - length
    to_context = reach(lambda c: layer(x, c), context)
    to_queries = reach(lambda t: layer(t, context), x)
    own = bool((to_queries == torch.eye(len(to_queries), dtype=torch.bool)).all())
    if not causal:
        counts = not _same(layer(x, _changed(context, slice(None))), full)
        return {"perturbation": counts, "gradients": own and bool(to_context.any(-1).all())}
    ends = range(1, length)
    return {
        "truncation": all(_same(layer(x[:, :t], context[:, : t + shift]), full[:, :t]) for t in ends),
        "perturbation": all(
            _same(layer(x, _changed(context, slice(t + shift, None)))[:, :t], full[:, :t]) for t in ends
        ),
        "gradients": own and _lower(to_context, shift),
    }
