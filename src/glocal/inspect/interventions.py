"""What heads give, changed by directions, ablation and patching, what that does, and what a head says by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glocal.inspect.heads import edit_heads
from glocal.inspect.importance import Heads
from glocal.inspect.projections import HeadWeights, head_weights
from glocal.inspect.recorder import record
from glocal.inspect.recording import Record, block_of
from glocal.nn.modes import evaluating

__all__ = [
    "Edit",
    "HeadEffect",
    "ablate",
    "add_direction",
    "copying_score",
    "head_effect",
    "head_logits",
    "patch_heads",
    "project_out",
]

Edit = Callable[[int, Tensor], Tensor]
"""Of a layer's number and its heads' outputs ``(B, H, N, D)``, what goes on instead: for `edit_heads`."""


def _edit(heads: Heads, change: Callable[[Tensor, int, int], Tensor], at: Tensor | None) -> Edit:
    """``change`` gives new outputs ``(B, N, D)`` of one head; at tokens ``at``, ``(N,)`` or ``(B, N)``."""
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        chosen.setdefault(layer, []).append(head)
    if not chosen:
        raise ValueError("heads must name at least one head, (layer, head); it was empty")
    if at is not None and at.dtype != torch.bool:
        raise ValueError(f"at must be booleans (N,) or (B, N), true for tokens to change; it was {at.dtype}")

    def edit(number: int, outputs: Tensor) -> Tensor:
        if number not in chosen:
            return outputs
        changed = outputs.clone()
        for head in chosen[number]:
            if not 0 <= head < outputs.shape[1]:
                raise ValueError(f"heads must be from 0 to {outputs.shape[1] - 1} in layer {number}; one was {head}")
            new = change(outputs[:, head], number, head).to(outputs)
            changed[:, head] = new if at is None else torch.where(at[..., None], new, outputs[:, head])
        return changed

    return edit


def add_direction(heads: Heads, direction: Tensor, alpha: float = 1.0, *, at: Tensor | None = None) -> Edit:
    """``alpha`` times a direction is added to what heads give, or subtracted where ``alpha`` is negative.

    Args:
        heads: ``(layer, head)`` each.
        direction: ``(D,)``, or of each sequence and token what broadcasts to ``(B, N, D)``.
        alpha: how much of it.
        at: which tokens, booleans ``(N,)`` or ``(B, N)``; all where None.

    >>> from glocal.inspect import edit_heads
    >>> from glocal.nn import Attention
    >>> layer, x = Attention(8, 2), torch.randn(1, 5, 8)
    >>> with edit_heads(layer, add_direction([(0, 1)], torch.tensor([1.0, 0, 0, 0]), -2.0)):
    ...     changed = layer(x)
    >>> torch.allclose(changed - layer(x), -2 * layer.o_proj.weight[:, 4], atol=1e-6)
    True
    """
    return _edit(heads, lambda z, *_: z + alpha * direction.to(z), at)


def project_out(heads: Heads, direction: Tensor, *, at: Tensor | None = None) -> Edit:
    """Nothing is left of a direction in what heads give: ``z - (z . u) u``, with ``u`` of length 1.

    Args:
        heads: ``(layer, head)`` each.
        direction: ``(D,)``, of any length.
        at: which tokens, booleans ``(N,)`` or ``(B, N)``; all where None.
    """

    def change(z: Tensor, *_: int) -> Tensor:
        u = nn.functional.normalize(direction.to(z), dim=-1)
        return z - (z @ u)[..., None] * u

    return _edit(heads, change, at)


def ablate(heads: Heads, mean: Record | None = None, *, pooled: bool = False, at: Tensor | None = None) -> Edit:
    """Heads give zeros, or what they give on average.

    Zeros may be unlike anything that the model has met; prefer the mean.

    Args:
        heads: ``(layer, head)`` each.
        mean: of other inputs, kept with ``"outputs"``; zeros where None.
        pooled: the mean is over all tokens, and not of each place by itself.
        at: which tokens, booleans ``(N,)`` or ``(B, N)``; all where None.
    """

    def change(z: Tensor, layer: int, head: int) -> Tensor:
        if mean is None:
            return torch.zeros_like(z)
        outputs = mean[layer].outputs[:, head]
        average: Tensor = outputs.mean((0, 1)) if pooled else outputs.mean(0)
        return average.expand_as(z)

    return _edit(heads, change, at)


def patch_heads(heads: Heads, source: Record, *, at: Tensor | None = None) -> Edit:
    """Heads give what they gave in another run: activation patching, of a corrupted run, or to restore a clean one.

    Args:
        heads: ``(layer, head)`` each.
        source: that run, kept with ``"outputs"``, with as many tokens.
        at: which tokens, booleans ``(N,)`` or ``(B, N)``; all where None.
    """
    return _edit(heads, lambda z, layer, head: source[layer].outputs[:, head].expand_as(z), at)


class HeadEffect(NamedTuple):
    """Changes of a metric by an edit.

    Args:
        total: with everything that follows from it.
        direct: by what heads write to the stream alone, everything between it and the last norm held still.
        indirect: the rest.
    """

    total: Tensor
    direct: Tensor
    indirect: Tensor


@torch.no_grad()
def head_effect(model: nn.Module, inputs: Any, edit: Edit, metric: Callable[[Any], Tensor]) -> HeadEffect:
    """What an edit of heads does to a model.

    Args:
        model: as for `record`; of a kind that adds what attention writes to the stream as it is (Gemma 2 does not).
        inputs: as for `record`.
        edit: such as `ablate` and `patch_heads` give.
        metric: of the model's output, a tensor of any shape, such as a loss or a difference of logits.

    Raises:
        TypeError: attention without known projections.
        ValueError: as `record`.

    >>> from glocal.nn import MLP, Attention, Block
    >>> model = nn.Sequential(*[Block(8, Attention(8, 2), MLP(8, 8)) for _ in range(2)])
    >>> effect = head_effect(model, torch.randn(1, 5, 8), ablate([(0, 1)]), lambda out: out[0, -1, 0])
    >>> torch.allclose(effect.direct + effect.indirect, effect.total)
    True
    """
    clean = record(model, inputs, keep=["outputs"])
    modules = dict(model.named_modules())
    written = torch.zeros(())
    for number, layer in enumerate(clean):
        change = edit(number, layer.outputs) - layer.outputs
        if change.any():
            written = written + torch.einsum("bhnd,hdc->bnc", change, head_weights(modules[layer.name]).o)

    def write(module: nn.Module, given: Any, out: Any) -> Any:
        stream = out if isinstance(out, Tensor) else out[0]
        stream = stream + written.to(stream)
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    def run() -> Tensor:
        if isinstance(inputs, Mapping):
            return metric(model(**inputs))
        return metric(model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,))))

    with evaluating(model):
        before = run()
        with edit_heads(model, edit):
            total = run() - before
        hook = modules[block_of(clean[-1].name)].register_forward_hook(write)
        try:
            direct = run() - before
        finally:
            hook.remove()
    return HeadEffect(total, direct, total - direct)


@torch.no_grad()
def head_logits(written: Tensor, stream: Tensor, norm: nn.Module, unembedding: Tensor) -> Tensor:
    """What a part of the stream says of the next token: the logit lens, with the last norm's scale held still.

    Parts add up: over all that is in the stream, to the model's logits less what the norm's bias says.

    Args:
        written: by a head, ``(..., C)``; with `HeadWeights`, ``outputs[:, h] @ weights.o[h]``.
        stream: which the norm meets in the real run, ``(..., C)``.
        norm: the last one, LayerNorm or RMSNorm.
        unembedding: ``(V, C)``.

    Returns:
        ``(..., V)``.

    >>> norm, x = nn.LayerNorm(8), torch.randn(2, 8)
    >>> torch.allclose(head_logits(x, x, norm, torch.eye(8)), norm(x), atol=1e-6)
    True
    """
    centred = isinstance(norm, nn.LayerNorm)
    eps = next(
        (float(getattr(norm, n)) for n in ("eps", "variance_epsilon") if getattr(norm, n, None) is not None), 0.0
    )
    if centred:
        written, stream = (t - t.mean(-1, keepdim=True) for t in (written, stream))
    scale = (stream.square().mean(-1, keepdim=True) + eps).sqrt()
    gain = getattr(norm, "weight", None)
    normed = written / scale if gain is None else written / scale * gain
    return normed @ unembedding.to(normed).mT


@torch.no_grad()
def copying_score(weights: HeadWeights, embedding: Tensor, unembedding: Tensor) -> Tensor:
    """How far heads raise the logits of the tokens that they look at: the share of positive eigenvalues, by their size.

    Of the map from tokens to logits through values and outputs, ``W_E W_V W_O W_U`` (Elhage et al., 2021); all of its
    eigenvalues that are not 0 are those of a matrix of the heads' width.

    Args:
        weights: of a layer.
        embedding, unembedding: ``(V, C)``.

    Returns:
        From 0 to 1, ``(H,)`` in float64: 1 for copying, 0 for its opposite.

    >>> from glocal.nn import Attention
    >>> layer = Attention(6, 1)
    >>> layer.o_proj.weight.data = torch.linalg.inv(layer.v_proj.weight.data)
    >>> copying_score(head_weights(layer), torch.eye(6), torch.eye(6)).tolist()
    [1.0]
    """
    into = embedding.double() @ weights.v.double()  # (H, V, D)
    out = weights.o.double() @ unembedding.double().mT  # (H, D, V)
    values = torch.linalg.eigvals(out @ into)
    share: Tensor = (values.abs() * (values.real > 0)).sum(-1) / values.abs().sum(-1)
    return share
