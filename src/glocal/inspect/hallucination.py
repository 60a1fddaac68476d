"""Which generated sentences are true, from a few graded ones and the neighbourhood of all in embedding space.

Sentences are nodes, linked where their features are alike (`glocal.nn.cosine_edges`); a network that sees them all
learns the grades of some and tells those of the others, without any search. Grades are ordinal, such as false, true,
true by a source, reference. Nonkes et al., 2024, arXiv 2407.04485.

The features of sentences that are not graded take part in training: sentences that come later need new edges, and
figures hold for such a graph only. Sentences of one question belong on one side of a split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from glocal.models.graph.hallucination import supervised_contrastive_loss
from glocal.shapes import Float

__all__ = [
    "GradeReport",
    "baseline_grades",
    "decode_grades",
    "grade_report",
    "grade_shares",
    "ordinal_targets",
    "train_embedder",
    "train_grader",
]


def ordinal_targets(grades: Tensor, levels: int = 3) -> Tensor:
    """Bits ``grade > 0``, ``grade > 1`` and so on, as floats.

    Args:
        grades: whole numbers from 0 to ``levels``, ``(...)``.
        levels: how many bits.

    Returns:
        ``(..., levels)``.

    Raises:
        ValueError: a grade out of range.

    >>> ordinal_targets(torch.tensor([0, 2])).tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """
    if grades.numel() and (int(grades.min()) < 0 or int(grades.max()) > levels):
        raise ValueError(f"grades must be from 0 to levels {levels}; they were from {grades.min()} to {grades.max()}")
    return (grades[..., None] > torch.arange(levels, device=grades.device)).float()


def decode_grades(logits: Float[Tensor, "*lead levels"]) -> Tensor:
    """The highest bit that is more likely than not, even where lower ones are not; ``(...)``.

    >>> decode_grades(torch.tensor([[-1.0, -1.0, -1.0], [3.0, -1.0, -1.0], [-1.0, -1.0, 2.0]]))
    tensor([0, 1, 3])
    """
    places = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    return (places * (logits > 0)).amax(-1)


def grade_shares(logits: Float[Tensor, "*lead levels"]) -> Float[Tensor, "*lead grades"]:
    """A score of each grade, its bit's probability less that of the next; ``(..., levels + 1)``, summing to 1.

    Bits are judged one by one, so that a score may be below 0.

    >>> grade_shares(torch.tensor([0.0, -99.0]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    bits = logits.sigmoid()
    ones, zeros = torch.ones_like(bits[..., :1]), torch.zeros_like(bits[..., :1])
    return torch.cat([ones, bits], -1) - torch.cat([bits, zeros], -1)


@dataclass(frozen=True)
class GradeReport:
    """How well grades were told, each from 0 to 1."""

    macro_recall: float
    macro_precision: float
    macro_auprc: float
    """Mean over grades of the area under precision over recall."""
    accuracy: float
    one_off: float
    """Share of grades that are right or next to it."""
    reference_recall: float
    """Of the highest grade's nodes, the share not told to be of the lowest; NaN where there are none."""


def grade_report(grades: Tensor, logits: Float[Tensor, "N levels"]) -> GradeReport:
    """Compare the grades that logits tell with the right ones, by scikit-learn.

    Args:
        grades: right ones, ``(N,)``; those that do not occur do not count in means over grades.
        logits: ``(N, levels)``.

    Raises:
        ValueError: shapes that do not fit, or no nodes.

    >>> logits = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [2.0, 2.0]])
    >>> grade_report(torch.tensor([0, 1, 1]), logits).macro_recall
    0.75
    """
    if logits.dim() != 2 or grades.shape != logits.shape[:1] or not len(grades):
        shapes = f"{tuple(grades.shape)} and {tuple(logits.shape)}"
        raise ValueError(f"grades must be (N,) and logits (N, levels) with N above 0; they were {shapes}")
    from sklearn.metrics import accuracy_score, average_precision_score, precision_score, recall_score

    found, shares = decode_grades(logits).cpu().numpy(), grade_shares(logits.detach().double()).cpu().numpy()
    right = grades.cpu().numpy()
    kinds = sorted(set(right.tolist()))
    settings: dict[str, Any] = {"labels": kinds, "average": "macro", "zero_division": 0}
    highest = right == logits.shape[1]
    return GradeReport(
        macro_recall=float(recall_score(right, found, **settings)),
        macro_precision=float(precision_score(right, found, **settings)),
        macro_auprc=sum(float(average_precision_score(right == k, shares[:, k])) for k in kinds) / len(kinds),
        accuracy=float(accuracy_score(right, found)),
        one_off=float((abs(found - right) <= 1).mean()),
        reference_recall=float((found[highest] > 0).mean()) if highest.any() else float("nan"),
    )


def train_embedder(
    embedder: nn.Module,
    x: Float[Tensor, "N channels"],
    grades: Tensor,
    *,
    epochs: int = 1000,
    batch: int | None = 256,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    temperature: float = 0.07,
    seed: int = 0,
) -> list[float]:
    """Train an embedder, in place, so that nodes of one grade lie together (`supervised_contrastive_loss`).

    AdamW whose rate falls to a fiftieth along a cosine.

    Args:
        embedder: of `glocal.models.graph.hallucination.contrastive_embedder`, say.
        x: features of graded nodes, ``(N, channels)``.
        grades: ``(N,)``.
        epochs: passes.
        batch: nodes of a step, drawn at random; what is left over at the end of a pass is left out. All where None.
        lr, weight_decay, temperature: as published.
        seed: of the order.

    Returns:
        The mean loss of each pass.

    Raises:
        ValueError: fewer nodes than a batch.
    """
    size = len(x) if batch is None else batch
    if not 1 <= size <= len(x):
        raise ValueError(f"batch must be from 1 to the {len(x)} nodes, or None; it was {batch}")
    draw, was = torch.Generator().manual_seed(seed), embedder.training
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=lr / 50)
    losses = []
    try:
        embedder.train()
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=draw).to(x.device)
            parts = [part for part in order.split(size) if len(part) == size]
            total = 0.0
            for part in parts:
                loss = supervised_contrastive_loss(embedder(x[part]), grades[part], temperature=temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            schedule.step()
            losses.append(total / len(parts))
    finally:
        embedder.train(was)
    return losses


def train_grader(
    model: nn.Module,
    x: Float[Tensor, "N channels"],
    edges: Tensor,
    grades: Tensor,
    train: Tensor,
    held: Tensor | None = None,
    *,
    steps: int = 500,
    lr: float = 1e-3,
    weight_decay: float = 5e-4,
) -> list[float]:
    """Train a network over the whole graph, in place, on the grades of some nodes.

    Args:
        model: from ``x`` and ``edges`` to ordinal logits, as `glocal.models.graph.hallucination.GraphGrader`.
        x: features of all nodes, ``(N, channels)``.
        edges: ``(2, E)``.
        grades: ``(N,)``; only those of ``train`` and ``held`` are read.
        train: nodes whose grades are learned, ``(n,)``.
        held: nodes that choose the step with the best macro recall, which the model is left at; the last where None.
        steps, lr, weight_decay: of Adam, the whole graph a step.

    Returns:
        The loss of each step, cross-entropy of the bits.

    Raises:
        ValueError: no nodes to learn from or to hold.
    """
    if not len(train) or (held is not None and not len(held)):
        raise ValueError("train and held must name at least one node each; held may be None")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    levels, was, losses = None, model.training, []
    best, kept = -1.0, None
    try:
        for _ in range(steps):
            model.train()
            logits = model(x, edges)[train]
            levels = ordinal_targets(grades[train], logits.shape[1]) if levels is None else levels
            loss = binary_cross_entropy_with_logits(logits, levels.to(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if held is not None:
                model.eval()
                with torch.no_grad():
                    recall = grade_report(grades[held], model(x, edges)[held]).macro_recall
                if recall > best:
                    best, kept = recall, {name: t.clone() for name, t in model.state_dict().items()}
        if kept is not None:
            model.load_state_dict(kept)
    finally:
        model.train(was)
    return losses


def baseline_grades(
    kind: Literal["neighbours", "mlp", "pca"],
    x: Float[Tensor, "n channels"],
    grades: Tensor,
    asked: Float[Tensor, "m channels"],
    *,
    seed: int = 0,
) -> Tensor:
    """Grades without a graph, by scikit-learn.

    Args:
        kind: ``"neighbours"``: the majority of the five nearest by cosine; ``"mlp"``: a network of one hidden layer;
            ``"pca"``: the five nearest on the 32 (or as many as there are) main components.
        x, grades: graded nodes, ``(n, channels)`` and ``(n,)``.
        asked: ``(m, channels)``.
        seed: of the network.

    Returns:
        ``(m,)``.

    Raises:
        ValueError: another kind.

    >>> x = torch.eye(2).repeat(5, 1)
    >>> baseline_grades("neighbours", x, torch.tensor([0, 3]).repeat(5), torch.tensor([[0.1, 0.9]]))
    tensor([3])
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline

    def nearest() -> Any:
        return KNeighborsClassifier(min(5, len(x)), metric="cosine")

    kinds: dict[str, Callable[[], Any]] = {
        "neighbours": nearest,
        "mlp": lambda: MLPClassifier((128,), max_iter=500, random_state=seed),
        "pca": lambda: make_pipeline(PCA(min(32, *x.shape)), nearest()),
    }
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; it was {kind!r}")
    fitted = kinds[kind]().fit(x.detach().cpu().numpy(), grades.cpu().numpy())
    return torch.as_tensor(fitted.predict(asked.detach().cpu().numpy())).to(grades)
