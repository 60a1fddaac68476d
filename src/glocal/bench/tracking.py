"""How well an object was followed: boxes against the truth, frame by frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["iou", "normalised_precision", "precision", "success_auc"]


def iou(boxes: Any, truth: Any) -> Tensor:
    """Intersection over union of boxes ``(T, 4)``, one with one: ``(T,)`` in float64; 0 of boxes without area.

    >>> iou([[0, 0, 2, 2]], [[1, 0, 3, 2]])
    tensor([0.3333], dtype=torch.float64)
    """
    a, b = _pair(boxes, truth)
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    areas = [(c[:, 2:] - c[:, :2]).clamp(min=0).prod(1) for c in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-300)


def success_auc(boxes: Any, truth: Any) -> float:
    """Mean over 21 thresholds from 0 to 1 of the share of frames whose `iou` is above: at best 20/21.

    Args:
        boxes: ``(T, 4)``.
        truth: ``(T, 4)``; frames whose box has no area, where the object cannot be seen, do not count.

    Raises:
        ValueError: of this and the other measures: boxes of other shapes, no frame that counts.
    """
    a, b = _visible(boxes, truth)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64, device=a.device)
    return float((iou(a, b)[:, None] > levels).double().mean())


def precision(boxes: Any, truth: Any, pixels: float = 20.0) -> float:
    """Share of frames whose centre is at most so many pixels off; arguments as for `success_auc`."""
    a, b = _visible(boxes, truth)
    return float((_offset(a, b).norm(dim=1) <= pixels).double().mean())


def normalised_precision(boxes: Any, truth: Any) -> float:
    """Mean over 51 thresholds from 0 to 0.5 of the share of frames whose centre is at most so far off.

    The offset counts in widths and heights of the true box; arguments as for `success_auc`.
    """
    a, b = _visible(boxes, truth)
    off = (_offset(a, b) / (b[:, 2:] - b[:, :2])).norm(dim=1)
    levels = torch.linspace(0, 0.5, 51, dtype=torch.float64, device=a.device)
    return float((off[:, None] <= levels).double().mean())


def _offset(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :2] + a[:, 2:]) / 2 - (b[:, :2] + b[:, 2:]) / 2


def _pair(boxes: Any, truth: Any) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(each).double() for each in (boxes, truth))
    if a.ndim != 2 or a.shape[1] != 4 or a.shape != b.shape:
        raise ValueError(f"boxes and truth must both be (T, 4); they were {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b.to(a.device)


def _visible(boxes: Any, truth: Any) -> tuple[Tensor, Tensor]:
    a, b = _pair(boxes, truth)
    there = (b[:, 2:] > b[:, :2]).all(1)
    if not bool(there.any()):
        raise ValueError("truth must have a box with an area; there was none")
    return a[there], b[there]
