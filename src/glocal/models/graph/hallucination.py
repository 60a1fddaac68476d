"""Sentences graded by how true they are, from a contrastive embedding and the neighbours in it.

Nonkes et al., 2024, arXiv 2407.04485.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from glocal.models.registry import register
from glocal.nn import GraphAttention
from glocal.shapes import Float

__all__ = ["GraphGrader", "contrastive_embedder", "gat_hallucination", "supervised_contrastive_loss"]


def contrastive_embedder(dim: int, hidden: int | None = None, out_dim: int = 128) -> nn.Sequential:
    """What the contrastive loss trains: two linear layers with ReLU between them.

    Args:
        dim: channels of a sentence's features.
        hidden: of the layer between; ``dim`` where None.
        out_dim: channels of the embedding.
    """
    hidden = dim if hidden is None else hidden
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


def supervised_contrastive_loss(
    embeddings: Float[Tensor, "N d"], labels: Tensor, *, temperature: float = 0.07
) -> Float[Tensor, ""]:
    """Nodes of one class are to be more alike than others: InfoNCE over every other node of the class.

    For a node the mean over these of ``logsumexp_k(s_ik) - s_ip``, ``s`` the cosine over ``temperature``; k goes over
    all nodes, the node itself too.

    Args:
        embeddings: ``(N, d)``.
        labels: classes, ``(N,)``.
        temperature: of the cosines.

    Returns:
        The mean over nodes that have another one of their class; 0 if there are none.

    Raises:
        ValueError: other shapes, or a temperature not above 0.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> together, apart = (supervised_contrastive_loss(x, torch.tensor(y)) for y in ([0, 0, 1], [0, 1, 0]))
    >>> bool(together < apart)
    True
    """
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        shapes = f"{tuple(embeddings.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"embeddings must be (N, d) and labels (N,); they were {shapes}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0; it was {temperature}")
    unit = normalize(embeddings, dim=-1)
    scores = unit @ unit.T / temperature
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    count = same.sum(1)
    each = scores.logsumexp(1) - (scores * same).sum(1) / count.clamp(min=1)
    return (each * (count > 0)).sum() / (count > 0).sum().clamp(min=1)


class GraphGrader(nn.Module):
    """Embedder, a linear layer, one graph attention layer that gives ordinal logits; no nonlinearity between.

    Args:
        dim: channels of what the embedder gives, or of the nodes without one.
        embedder: maps the nodes' features first, and is trained on.
        hidden: channels of the linear layer.
        num_heads: of the graph attention, averaged.
        levels: ordinal bits: one class less than there are.
        dropout: of attention weights, in training.

    >>> import torch
    >>> model = GraphGrader(16, contrastive_embedder(32, out_dim=16))
    >>> model(torch.randn(5, 32), torch.tensor([[0, 1], [1, 0]])).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        embedder: nn.Module | None = None,
        *,
        hidden: int = 32,
        num_heads: int = 2,
        levels: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedder = nn.Identity() if embedder is None else embedder
        self.reduce = nn.Linear(dim, hidden)
        self.attention = GraphAttention(hidden, levels, num_heads, dropout=dropout)

    def forward(self, x: Float[Tensor, "N channels"], edges: Tensor) -> Float[Tensor, "N levels"]:
        """Logits of the bits ``class > 0``, ``class > 1`` and so on.

        Args:
            x: features of all nodes, ``(N, channels)``.
            edges: ``(2, E)``, as `glocal.nn.cosine_edges` gives them.
        """
        out: Tensor = self.attention(self.reduce(self.embedder(x)), edges)
        return out


@register
def gat_hallucination(**options: Any) -> GraphGrader:
    """As published, for BERT's class token: 768 channels, embedded in 128; four classes. 693,359 parameters."""
    settings: dict[str, Any] = {"channels": 768, "dim": 128} | options
    return GraphGrader(embedder=contrastive_embedder(settings.pop("channels"), out_dim=settings["dim"]), **settings)
