"""What a model does without each of its heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glocal.inspect.heads import edit_heads
from glocal.inspect.importance import masked_heads
from glocal.nn.modes import evaluating

__all__ = ["HeadAblation", "head_ablation"]


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """What a model does without each head. Made by `head_ablation`.

    Args:
        base: of the whole model.
        change: without a head minus ``base``, ``(layers, H)`` in float64; NaN for heads that a layer has not.
        p: two-sided, of a paired bootstrap over examples, ``(layers, H)``; None where there was one number only.
    """

    base: float
    change: Tensor
    p: Tensor | None


@torch.no_grad()
def head_ablation(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float | Tensor],
    *,
    alone: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> HeadAblation:
    """Evaluate a model without each head, one at a time, or with one head alone in its layer.

    Args:
        model: as for `edit_heads`; in evaluation mode meanwhile.
        evaluate: gives a number of the model, or one of each example, ``(n,)``, the same examples each time, of which
            the mean counts.
        alone: remove all other heads of the layer instead.
        resamples: of the paired bootstrap.
        seed: of these.

    Returns:
        The table; with numbers of each example also how surely a change differs from none.

    Raises:
        TypeError, ValueError: as `edit_heads`; an evaluation that runs no layer.

    >>> from glocal.nn import Attention
    >>> layer, x = Attention(8, 2), torch.randn(1, 5, 8)
    >>> head_ablation(layer, lambda model: float(model(x).abs().sum())).change.shape
    torch.Size([1, 2])
    """
    heads: dict[int, int] = {}

    def note(number: int, out: Tensor) -> Tensor:
        heads[number] = out.shape[1]
        return out

    with evaluating(model):
        with edit_heads(model, note) as places:
            base = torch.as_tensor(evaluate(model), dtype=torch.float64, device="cpu")
        if not heads:
            raise ValueError("evaluate must run the model; no layer of attention was called")
        change = torch.full((len(places), max(heads.values())), torch.nan).double()
        p = change.clone()
        for number, count in heads.items():
            for head in range(count):
                gone = [(number, other) for other in range(count) if (other == head) != alone]
                with masked_heads(model, gone):
                    value = torch.as_tensor(evaluate(model), dtype=torch.float64, device="cpu")
                if value.shape != base.shape:
                    raise ValueError(
                        f"evaluate must give the same examples each time; it gave {tuple(base.shape)}, then "
                        f"{tuple(value.shape)}"
                    )
                change[number, head] = (value - base).mean()
                if base.dim():
                    p[number, head] = _bootstrap(value - base, resamples, seed)
    return HeadAblation(float(base.mean()), change, p if base.dim() else None)


def _bootstrap(differences: Tensor, resamples: int, seed: int) -> float:
    """Twice the share of resampled means on the other side of zero, or on it; at most 1."""
    generator = torch.Generator().manual_seed(seed)
    means = differences[torch.randint(len(differences), (resamples, len(differences)), generator=generator)].mean(1)
    other = torch.minimum((means <= 0).double().mean(), (means >= 0).double().mean())
    return min(1.0, 2 * float(other))
