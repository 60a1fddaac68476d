"""Which heads a trained model needs: the gradients of their gates, and the order in which they can go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.heads import edit_heads
from glocal.inspect.metrics import stacked
from glocal.inspect.places import Operator, Place, intercept
from glocal.inspect.recording import real_queries
from glocal.nn.modes import evaluating
from glocal.patterns import Full, Pattern, parse

__all__ = ["Heads", "head_importance", "masked_heads", "prune_order", "pruning_curve"]

Heads = Iterable[tuple[int, int]]
"""Heads as pairs, the number of the layer and that of the head; layers are numbered as in `edit_heads`."""
_LEVELS = ("token", "example", "batch")


@contextmanager
def masked_heads(model: nn.Module, heads: Heads, *, rescale: bool = False) -> Iterator[list[Place]]:
    """Let heads give zeros until the block ends, as if they were removed (`prune_heads` removes them).

    Args:
        model: as for `edit_heads`.
        heads: pairs of layer and head; of a mask ``(layers, H)`` they are ``(mask == 0).nonzero().tolist()``.
        rescale: multiply the heads of a layer that stay by H / how many stay.

    Yields:
        The layers, in the order of their numbers.

    Raises:
        TypeError, ValueError: as `edit_heads`; no such layer or, when the layer runs, no such head.

    >>> from glocal.nn import Attention
    >>> layer, x = Attention(8, 2), torch.randn(1, 5, 8)
    >>> with masked_heads(layer, [(0, 0), (0, 1)]):
    ...     layer(x).abs().sum().item()
    0.0
    """
    gone = _by_layer(heads)

    def edit(number: int, out: Tensor) -> Tensor:
        return out * _gate(gone[number], out, rescale) if number in gone else out

    with edit_heads(model, edit) as places:
        _there(gone, places)
        yield places


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    abs_level: str = "token",
    normalize_by_layer: bool = True,
    last_by_example: bool = False,
    without: Heads = (),
) -> Tensor:
    """How much the loss would change with each head's gate: ``|heads' output . gradient of the loss there|``.

    One pass forward and back a batch, in evaluation mode; the gradients of parameters are neither computed nor
    touched. Queries that are padding do not count. Michel et al., 2019, arXiv 1905.10650.

    Args:
        model: as for `edit_heads`.
        batches: what the loss takes; a part of the training data will do.
        loss: of the model on a batch, a number with a gradient, e.g. ``lambda model, batch: model(**batch).loss``.
        abs_level: where absolute values are taken: of each query (``"token"``, as in the authors' code), of each
            example (as in the paper's formula) or of the batch. The mean over what they are taken of is returned.
        normalize_by_layer: divide each layer by its Euclidean norm, as in the published experiments. It makes layers
            equally important, so that heads of an unneeded layer look needed.
        last_by_example: divide the last layer by examples and not by tokens, for classifiers that read one token.
        without: heads that give zeros meanwhile, as in `masked_heads`.

    Returns:
        ``(layers, H)`` in float64; NaN for heads that a layer has not. Each layer is of one kind of attention (encoder,
        decoder, cross): it is kept apart until the order is made.

    Raises:
        TypeError, ValueError: as `edit_heads`; no batches, a loss that is no number or does not depend on the heads.

    >>> from glocal.nn import Attention
    >>> layer = Attention(8, 2)
    >>> layer.o_proj.weight.data[:, 4:] = 0  # the second head says nothing
    >>> head_importance(layer, [torch.randn(1, 5, 8)], lambda model, x: model(x).square().mean()).tolist()
    [[1.0, 0.0]]
    """
    if abs_level not in _LEVELS:
        raise ValueError(f"abs_level must be of {', '.join(_LEVELS)}; it was {abs_level!r}")
    gone = _by_layer(without)
    calls: list[tuple[str, Tensor, Tensor | None]] = []
    numbers: dict[str, int] = {}

    def make(place: Place) -> Operator:
        numbers.setdefault(place.name, len(numbers))

        def compute(q: Tensor, k: Tensor, v: Tensor, where: Pattern | str = Full(), **options: Any) -> Any:  # noqa: B008
            found = attend(q, k, v, where, **options)
            plain = found[0] if isinstance(found, tuple) else found
            out = plain.flatten(2, -2)
            # A factor that wants a gradient, so that the heads have one also where all parameters are frozen.
            gate = _gate(gone.get(numbers[place.name], set()), out, False).requires_grad_()
            out = out * gate
            pattern = parse(where) if isinstance(where, str) else where
            calls.append((place.name, out, real_queries(pattern, out.shape[2], place.cross)))
            return (out.view_as(plain), *found[1:]) if isinstance(found, tuple) else out.view_as(plain)

        return compute

    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    with evaluating(model), intercept(model, make) as places, torch.enable_grad():
        _there(gone, places)
        seen = False
        for batch in batches:
            seen = True
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(f"loss must give one number; it gave {getattr(value, 'shape', type(value).__name__)}")
            if not calls or not value.requires_grad:
                raise ValueError("loss must depend on the heads of the model, with a gradient")
            slopes = torch.autograd.grad(value, [out for _, out, _ in calls], allow_unused=True)
            _add(calls, slopes, abs_level, sums, counts, last_by_example and places[-1].name)
            calls.clear()
        if not seen:
            raise ValueError("batches must hold at least one batch; it was empty")
    rows = [sums[name] / counts[name] if name in sums else torch.empty(0).double() for name in numbers]
    found = stacked(rows)
    if normalize_by_layer:
        found = found / (found.nan_to_num().square().sum(1, keepdim=True).sqrt() + 1e-20)
    return found


def _add(
    calls: Sequence[tuple[str, Tensor, Tensor | None]],
    slopes: Sequence[Tensor | None],
    level: str,
    sums: dict[str, Tensor],
    counts: dict[str, float],
    by_example: str | bool,
) -> None:
    """One batch's part of the sums over tokens, examples or batches, and of how many these are."""
    whole: dict[str, Tensor] = {}
    size: dict[str, float] = {}
    for (name, out, real), slope in zip(calls, slopes, strict=True):
        each = torch.zeros(out.shape[:-1]).double() if slope is None else (out.detach() * slope).double().sum(-1).cpu()
        real = torch.ones(out.shape[0], out.shape[2]) if real is None else real.cpu()
        each = each * real[:, None]
        if level == "token":
            part, count = each.abs().sum((0, 2)), float(len(out) if name == by_example else real.sum())
        elif level == "example":
            part, count = each.sum(2).abs().sum(0), float(len(out))
        else:
            part, count = each.sum((0, 2)), 0.0
        whole[name] = whole[name] + part if name in whole else part
        size[name] = size.get(name, 0.0) + count
    for name, part in whole.items():
        sums[name] = sums.get(name, torch.zeros(())) + part.abs()
        counts[name] = counts.get(name, 0.0) + (1.0 if level == "batch" else size[name])


def prune_order(
    importance: Tensor | Callable[[list[tuple[int, int]]], Tensor],
    *,
    keep_at_least: int = 0,
    step: int = 1,
    layers: Iterable[int] | None = None,
) -> list[tuple[int, int]]:
    """Heads from the least important on: the order in which to mask (`masked_heads`) or remove them (`prune_heads`).

    Args:
        importance: ``(layers, H)``, NaN where there is no head; or, to compute it anew as heads go, a function that is
            given the heads removed so far, e.g. ``lambda gone: head_importance(model, batches, loss, without=gone)``.
        keep_at_least: as many top heads of each layer are left out of the order; with 1 and the whole order removed,
            each layer keeps its top head alone.
        step: how many heads go between two calls of the function.
        layers: numbers of the layers to take from, e.g. those of one kind of attention; all where None.

    Returns:
        Pairs of layer and head.

    Raises:
        ValueError: an importance of another shape.

    >>> prune_order(torch.tensor([[0.3, 0.1], [0.2, 0.4]]))
    [(0, 1), (1, 0), (0, 0), (1, 1)]
    >>> prune_order(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), keep_at_least=1)
    [(0, 1), (1, 0)]
    """
    if keep_at_least < 0 or step < 1:
        raise ValueError(f"keep_at_least must be at least 0 and step at least 1; they were {keep_at_least} and {step}")
    wanted = None if layers is None else set(layers)
    gone: list[tuple[int, int]] = []
    scores = importance if isinstance(importance, Tensor) else importance([])
    if scores.dim() != 2:
        raise ValueError(f"importance must be (layers, H); it was {tuple(scores.shape)}")
    left = (~scores.isnan()).sum(1).tolist()
    while True:
        taken = 0
        ranked = scores.flatten().argsort(stable=True).tolist()
        for layer, head in (divmod(place, scores.shape[1]) for place in ranked):
            if math.isnan(float(scores[layer, head])) or (layer, head) in gone or left[layer] <= keep_at_least:
                continue
            if wanted is not None and layer not in wanted:
                continue
            gone.append((layer, head))
            left[layer] -= 1
            taken += 1
            if taken == step and not isinstance(importance, Tensor):
                break
        if isinstance(importance, Tensor) or not taken:
            return gone
        scores = importance(list(gone))


@torch.no_grad()
def pruning_curve(
    model: nn.Module,
    order: Sequence[tuple[int, int]],
    evaluate: Callable[[nn.Module], float],
    counts: Iterable[int],
    *,
    rescale: bool = False,
) -> list[float]:
    """What a model does without the first heads of an order.

    Args:
        model: as for `edit_heads`; in evaluation mode meanwhile.
        order: of `prune_order`.
        evaluate: gives a number of the model.
        counts: how many heads are masked, for each number; the published quotas are ``floor(share * heads)``.
        rescale: as in `masked_heads`.

    Returns:
        A number for each count.

    Raises:
        TypeError, ValueError: as `masked_heads`; a count that the order does not have.
    """
    found = []
    with evaluating(model):
        for count in counts:
            if not 0 <= count <= len(order):
                raise ValueError(f"counts must be from 0 to the {len(order)} heads of order; one was {count}")
            with masked_heads(model, order[:count], rescale=rescale):
                found.append(float(evaluate(model)))
    return found


def _by_layer(heads: Heads) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for layer, head in heads:
        if layer < 0 or head < 0:
            raise ValueError(f"heads must be pairs of layer and head, from 0 on; one was ({layer}, {head})")
        found.setdefault(int(layer), set()).add(int(head))
    return found


def _there(gone: dict[int, set[int]], places: Sequence[Place]) -> None:
    for layer in gone:
        if layer >= len(places):
            raise ValueError(f"heads must be of the {len(places)} layers; one was of layer {layer}")


def _gate(gone: set[int], out: Tensor, rescale: bool) -> Tensor:
    """1 for heads ``(B, H, N, D)`` that stay, 0 for the others, ``(H, 1, 1)``."""
    count = out.shape[1]
    if gone and max(gone) >= count:
        raise ValueError(f"heads must be of the {count} that the layer has; one was {max(gone)}")
    gate = out.new_ones(count, 1, 1)
    gate[sorted(gone)] = 0
    return gate * (count / max(1, count - len(gone))) if rescale else gate
