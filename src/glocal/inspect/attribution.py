"""What of the input an answer rests on: through attention alone, and through the gradient of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from glocal.inspect.recording import Record
from glocal.nn.modes import evaluating

__all__ = ["gradient_times_input", "rollout"]


@torch.no_grad()
def rollout(record: Record, query: Tensor | int = -1, residual: float = 0.5) -> Tensor:
    """How much of a query's last state comes from each token, if states were only mixed by attention.

    A row of the product of the layers' matrices ``residual * I + (1 - residual) * A``, ``A`` the mean over heads
    (Abnar and Zuidema, 2020, arXiv 2005.00928, whose share of the residual stream is a half). It is pulled down
    through the layers row by row, so that no matrix of all pairs is held.

    Args:
        record: with attention, of self-attention over one sequence.
        query: whose, one for all rows of the batch or integers ``(B,)``, negative ones from the end; or what each
            state counts for, floats ``(B, N)``, for pooled states.
        residual: what of a state passes by attention.

    Returns:
        ``(B, N)``, rows sum to 1 where every query sees a key.

    Raises:
        ValueError: cross-attention, layers over different tokens, a share or a query out of range.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> rollout(record(Attention(8, 2, causal=True, scale=0.0), torch.randn(1, 4, 8))).tolist()
    [[0.125, 0.125, 0.125, 0.625]]
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be from 0 to 1; it was {residual}")
    count = record[0].queries
    if any(layer.cross or layer.queries != count or layer.keys != count for layer in record):
        raise ValueError("record must be of self-attention over one sequence; it has layers over other keys")
    row = start_row(query, record[0].lse[:, 0])
    for layer in reversed(record.layers):
        mixed = pulled(row, ((tile.rows, tile.weights.mean(1)) for tile in layer.tiles()))
        row = residual * row + (1 - residual) * mixed
    return row


def start_row(query: Tensor | int, like: Tensor) -> Tensor:
    """Ones at the queries, zeros elsewhere, of the shape ``(B, N)`` and the kind of ``like``; or floats as given."""
    if isinstance(query, Tensor) and query.is_floating_point():
        if query.shape != like.shape:
            raise ValueError(f"query of floats must be {tuple(like.shape)}; it was {tuple(query.shape)}")
        return query.to(like)
    count = like.shape[1]
    place = torch.as_tensor(query, device=like.device).expand(len(like))
    if not bool(((-count <= place) & (place < count)).all()):
        raise ValueError(f"query must be one of {count} tokens; it was {query}")
    return nn.functional.one_hot(place % count, count).to(like.dtype)


def pulled(row: Tensor, tiles: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """A row ``(B, N)`` times a matrix that comes a few rows ``(B, R, N)`` at a time, with their places."""
    found = torch.zeros_like(row)
    for rows, part in tiles:
        found += torch.einsum("br,brk->bk", row[:, rows], part.to(row.dtype))
    return found


def gradient_times_input(model: nn.Module, inputs: Mapping[str, Any], objective: Callable[[Any], Tensor]) -> Tensor:
    """How much each token's embedding, or each pixel, moves an objective: the gradient times the input.

    Args:
        model: of transformers; it runs in evaluation mode and is left as it was.
        inputs: its arguments, with ``input_ids (B, N)`` or ``pixel_values (B, channels, height, width)``.
        objective: a number, of the model's output; rows of the batch must not meet.

    Returns:
        Of text the length of the product over the embedding's channels, ``(B, N)``; of images the sum over the colour
        channels, ``(B, height, width)``.

    Raises:
        ValueError: inputs of another kind.

    Example::

        gradient_times_input(model, tokens, lambda output: output.logits[:, -1].amax())
    """
    kept: list[Tensor] = []

    def leaf(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    named = dict(inputs)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if "input_ids" in named:
            embeddings: Any = model
            stack.callback(embeddings.get_input_embeddings().register_forward_hook(leaf).remove)
        elif "pixel_values" in named:
            kept.append(named["pixel_values"].detach().requires_grad_())
            named["pixel_values"] = kept[0]
        else:
            raise ValueError(f"inputs must hold input_ids or pixel_values; they held {', '.join(named) or 'nothing'}")
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(model(**named)), kept[:1])
    product = (kept[0] * gradient).detach()
    return product.norm(dim=-1) if "input_ids" in inputs else product.sum(1)
