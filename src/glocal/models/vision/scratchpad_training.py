"""How models with a scratchpad are trained: what is lost, on whose frames, and how frames are rounded.

Lotfi et al., 2024, arXiv 2410.08165.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from glocal.models.vision.scratchpad import Drawn
from glocal.shapes import Float

__all__ = ["draw_next", "nearest_colour", "scratchpad_loss"]


def nearest_colour(palette: Float[Tensor, "colours C"]) -> Callable[..., Tensor]:
    """Rounds each pixel of a frame to the nearest colour of a palette.

    >>> settle = nearest_colour(torch.eye(3))
    >>> settle(torch.tensor([0.2, 0.9, 0.3]).view(1, 3, 1, 1)).flatten()
    tensor([0., 1., 0.])
    """

    def settle(drawn: Tensor, before: Tensor | None = None) -> Tensor:
        colours = palette.to(drawn)
        pixels = drawn.detach().movedim(1, -1)
        far = torch.stack([(pixels - colour).square().sum(-1) for colour in colours], -1)
        return colours[far.argmin(-1)].movedim(-1, 1)

    return settle


@torch.no_grad()
def draw_next(
    model: nn.Module,
    before: Float[Tensor, "B channels H W"],
    frame: Float[Tensor, "B channels H W"],
    settle: Callable[..., Tensor],
    own: Tensor,
) -> Float[Tensor, "B channels H W"]:
    """Frames to train an inductive model on: the true ones, or what it makes itself of those before, without gradient.

    It narrows the gap between training and drawing on one's own frames.

    Args:
        model: of the inductive scratchpad.
        before: the frames before, ``(B, channels, H, W)``.
        frame: the true ones.
        settle: as in `ScratchpadViT.roll_out`.
        own: which ones are to be the model's own, booleans ``(B,)``; not those that are the puzzle itself.

    Returns:
        ``(B, channels, H, W)``.
    """
    if not bool(own.any()):
        return frame
    made = frame.clone()
    made[own] = settle(model(before[own]).frame, before[own])
    return made


def scratchpad_loss(
    out: Drawn,
    labels: Tensor,
    target: Float[Tensor, "*B drawn H W"] | None = None,
    last: Tensor | None = None,
    *,
    weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of the label, squared error of the pixels, and whether to halt.

    Args:
        out: of the model.
        labels: integers ``(B,)``; of a model of many frames the last frame gives the answer.
        target: what is to be drawn, as ``out.frame``.
        last: which of the frames that were given are the last ones of their puzzles, booleans ``(B,)``, for inductive
            scratchpads: only there the label counts.
        weight: of the pixels.

    Raises:
        ValueError: a model that draws without ``target``, or halts without ``last``.

    >>> from glocal.models.vision.scratchpad import ScratchpadViT
    >>> model = ScratchpadViT(32, 1, 2, scratchpad="none", size=32)
    >>> scratchpad_loss(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).shape
    torch.Size([])
    """
    if (out.frame is None) != (target is None) or (out.halt is None) != (last is None):
        raise ValueError("target must be given for models that draw, last for those that halt, and for no others")
    logits = out.label[:, -1] if out.label.dim() == 3 else out.label
    if last is None:
        loss = cross_entropy(logits, labels)
    else:
        each = cross_entropy(logits, labels, reduction="none") * last
        loss = each.sum() / last.sum().clamp(min=1)
        assert out.halt is not None
        loss = loss + binary_cross_entropy_with_logits(out.halt, last.to(out.halt))
    if out.frame is not None and target is not None:
        loss = loss + weight * mse_loss(out.frame, target)
    return loss
