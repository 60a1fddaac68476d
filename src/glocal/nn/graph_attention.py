"""Attention of the nodes of a graph to their neighbours, over a list of edges; nothing of size N x N."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, leaky_relu, normalize

from glocal.shapes import Float

__all__ = ["GraphAttention", "cosine_edges", "edge_softmax"]


def check_edges(edges: Tensor, nodes: int) -> None:
    """Raise ValueError unless ``edges`` is ``(2, E)`` of whole numbers below ``nodes``."""
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype != torch.long:
        raise ValueError(f"edges must be (2, E) of torch.long; it was {tuple(edges.shape)} of {edges.dtype}")
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= nodes):
        raise ValueError(f"edges must name nodes 0 to {nodes - 1}; it went from {edges.min()} to {edges.max()}")


def cosine_edges(x: Float[Tensor, "N d"], threshold: float, *, rows: int = 1024) -> Tensor:
    """Edges both ways between nodes whose features have a cosine of at least ``threshold``; none from a node to itself.

    Args:
        x: features, ``(N, d)``.
        threshold: least cosine.
        rows: nodes that are compared with all at a time: memory is ``rows * N``.

    Returns:
        ``(2, E)``: where from, where to; in order of where from.

    Raises:
        ValueError: features of another shape.

    >>> cosine_edges(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), 0.9)
    tensor([[0, 1],
            [1, 0]])
    """
    if x.dim() != 2:
        raise ValueError(f"x must be (N, d); it was {tuple(x.shape)}")
    unit, found = normalize(x.detach(), dim=-1), []
    for start in range(0, len(unit), rows):
        near = unit[start : start + rows] @ unit.T >= threshold
        near.diagonal(start).fill_(False)
        found.append(near.nonzero() + torch.tensor([start, 0], device=x.device))
    return torch.cat(found).T if found else torch.zeros(2, 0, dtype=torch.long, device=x.device)


def edge_softmax(scores: Float[Tensor, "E *lead"], to: Tensor, nodes: int) -> Float[Tensor, "E *lead"]:
    """Softmax over the edges that come in at the same node.

    Args:
        scores: ``(E, ...)``.
        to: node of each edge, ``(E,)``.
        nodes: how many there are.

    >>> edge_softmax(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    tensor([0.5000, 0.5000, 1.0000])
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    shape = (nodes, *scores.shape[1:])
    index = to.view(-1, *(1,) * (scores.dim() - 1)).expand_as(scores)
    top = wide.new_full(shape, -torch.inf).scatter_reduce(0, index, wide.detach(), "amax")
    weights = (wide - top[to]).exp()
    return (weights / wide.new_zeros(shape).index_add(0, to, weights)[to]).to(scores.dtype)


class GraphAttention(nn.Module):
    """Each node's mean of its neighbours' features, weighed by a score of both ends.

    ``alpha_ij = softmax_j LeakyReLU(a_dst h_i + a_src h_j)``, ``h = W x``, over the neighbours j of i and i itself.
    Velickovic et al., 2018, arXiv 1710.10903. Parameters have the names and shapes of torch_geometric's ``GATConv``.

    Args:
        dim: channels of the nodes.
        out_dim: channels that each head gives.
        num_heads: heads.
        concat: heads side by side, ``num_heads * out_dim``; their mean otherwise.
        slope: of the LeakyReLU below 0.
        dropout: of the weights, in training.
        self_loops: each node sees itself, whether or not the edges say so; otherwise edges are taken as they are.
        bias: one of the output.

    Raises:
        ValueError: sizes below 1, or a dropout that is no share.

    >>> layer = GraphAttention(8, 3, num_heads=2)
    >>> layer(torch.randn(4, 8), torch.tensor([[0, 1], [1, 0]])).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int = 1,
        *,
        concat: bool = False,
        slope: float = 0.2,
        dropout: float = 0.0,
        self_loops: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("out_dim", out_dim), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1; it was {dropout}")
        self.dim, self.out_dim, self.num_heads = dim, out_dim, num_heads
        self.concat, self.slope, self.dropout, self.self_loops = concat, slope, dropout, self_loops
        self.lin = nn.Linear(dim, num_heads * out_dim, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, num_heads, out_dim))
        self.att_dst = nn.Parameter(torch.empty(1, num_heads, out_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * out_dim if concat else out_dim)) if bias else None
        for weight in (self.lin.weight, self.att_src, self.att_dst):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Float[Tensor, "N dim"], edges: Tensor) -> Float[Tensor, "N out"]:
        """Attend.

        Args:
            x: nodes, ``(N, dim)``.
            edges: ``(2, E)``: where from, where to. An edge that is there twice counts twice.

        Returns:
            ``(N, out_dim)``, or ``(N, num_heads * out_dim)`` with ``concat``. A node without edges, where
            ``self_loops`` is off, gives the bias.

        Raises:
            ValueError: shapes that do not fit, nodes that there are not.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be (N, {self.dim}); it was {tuple(x.shape)}")
        check_edges(edges, len(x))
        if self.self_loops:
            own = torch.arange(len(x), device=edges.device).expand(2, -1)
            edges = torch.cat([edges[:, edges[0] != edges[1]], own], 1)
        source, to = edges
        h = self.lin(x).unflatten(-1, (self.num_heads, self.out_dim))
        scores = (h * self.att_src).sum(-1)[source] + (h * self.att_dst).sum(-1)[to]
        weights = edge_softmax(leaky_relu(scores, self.slope), to, len(x))
        weights = dropout(weights, self.dropout, self.training)
        out = torch.zeros_like(h).index_add(0, to, weights[..., None] * h[source])
        out = out.flatten(1) if self.concat else out.mean(1)
        return out if self.bias is None else out + self.bias
