"""What can be read off heads' outputs, by a linear classifier a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glocal.inspect.recording import Record

__all__ = ["probe_heads"]


def probe_heads(record: Record, labels: Any, *, at: Tensor | int = -1, folds: int = 5, strength: float = 1.0) -> Tensor:
    """How well a property of each sequence can be read off each head's output at one token.

    Logistic regression with an L2 penalty, balanced accuracy on what was held out, mean over folds.

    Args:
        record: kept with ``"outputs"``, a sequence a row.
        labels: of the sequences, ``(B,)``, two or more classes.
        at: which token, one for all or one each, ``(B,)``.
        folds: parts of the sequences, each held out once; every part has all classes.
        strength: scikit-learn's ``C``, the inverse of the penalty.

    Returns:
        ``(layers, H)`` in float64.

    Raises:
        ValueError: labels of another number, or a class with fewer sequences than folds.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> x = torch.randn(40, 3, 8, generator=torch.Generator().manual_seed(0))
    >>> x[:20] += 9.0
    >>> probe_heads(record(Attention(8, 2), x, keep=["outputs"]), [0] * 20 + [1] * 20).shape
    torch.Size([1, 2])
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    count = len(record[0].outputs)
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (count,):
        raise ValueError(f"labels must be one of each sequence, ({count},); it was {tuple(labels.shape)}")
    least = int(labels.unique(return_counts=True)[1].min())
    if least < folds or len(labels.unique()) < 2:
        raise ValueError(f"labels must have two classes, each at least {folds} times; the rarest came {least} times")
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    scores = []
    for layer in record:
        rows = torch.arange(count, device=layer.outputs.device)
        found = layer.outputs[rows, :, torch.as_tensor(at, device=rows.device)]  # (B, H, D)
        model = LogisticRegression(C=strength, max_iter=1000)
        scores.append(
            [
                cross_val_score(model, z, labels.numpy(), cv=split, scoring="balanced_accuracy").mean()
                for z in found.double().cpu().unbind(1)
            ]
        )
    return torch.tensor(scores, dtype=torch.float64)
