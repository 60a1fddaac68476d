"""Only the strongest activations are kept: where a channel is strongest, or what is strongest in a token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["TopKActivation", "insert_top_k"]


class TopKActivation(nn.Module):
    """Keeps the activations of greatest magnitude and makes the others zero; it has no weights.

    With ``axis="space"``, of each channel those at a share of the positions are kept, so that what is spread evenly, as
    texture is, gives way to what stands out. That ranks all positions, those to come and padding with them: for causal
    and for padded sequences take ``axis="channel"``, which keeps a share of each token's channels. Gradients flow
    through what is kept.

    Args:
        fraction: the share that is kept, of n ``max(1, int(fraction * n))``; 1 changes nothing.
        axis: ``"space"`` or ``"channel"``.
        channel_dim: where the channels are: -1, tokens ``(B, *grid, C)``; 1, maps ``(B, C, *grid)``.
        mix: how much of the result is the kept activations; the rest is the input.

    Raises:
        ValueError: a fraction not above 0 and up to 1, another axis, channels elsewhere, a mix outside 0 to 1.

    Source:
        Li, Wen, Li and Lee, 2023, Emergence of shape bias in convolutional neural networks through activation sparsity,
        NeurIPS; for fine-tuned models Li et al., 2025, arXiv 2506.00718.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 0.1], [-5.0, 0.3], [1.0, 0.2], [2.0, -0.4]]])
    >>> TopKActivation(0.5)(x)
    tensor([[[ 3.0000,  0.0000],
             [-5.0000,  0.3000],
             [ 0.0000,  0.0000],
             [ 0.0000, -0.4000]]])
    """

    def __init__(
        self,
        fraction: float = 0.2,
        *,
        axis: Literal["space", "channel"] = "space",
        channel_dim: int = -1,
        mix: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1; it was {fraction}")
        if axis not in ("space", "channel"):
            raise ValueError(f"axis must be 'space' or 'channel'; it was {axis!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1; it was {channel_dim}")
        if not 0 <= mix <= 1:
            raise ValueError(f"mix must be from 0 to 1; it was {mix}")
        self.fraction, self.axis, self.channel_dim, self.mix = fraction, axis, channel_dim, mix

    def forward(self, x: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *rest"]:
        """``(B, *grid, C)``, or ``(B, C, *grid)`` where ``channel_dim`` is 1, to the same.

        Raises:
            ValueError: ``x`` without a grid.
        """
        if x.dim() < 3:
            raise ValueError(f"x must have a batch, channels and a grid; it was {tuple(x.shape)}")
        rows = x if self.channel_dim == 1 else x.movedim(-1, 1)
        rows = rows.flatten(2)  # (B, C, N)
        dim = 2 if self.axis == "space" else 1
        count = max(1, int(self.fraction * rows.shape[dim]))
        if self.fraction == 1 or not x.numel():
            return x
        kept = rows.abs().topk(count, dim, sorted=False).indices
        sparse = rows.new_zeros(rows.shape).scatter(dim, kept, rows.gather(dim, kept))
        if self.mix < 1:
            sparse = self.mix * sparse + (1 - self.mix) * rows
        return sparse.view_as(x) if self.channel_dim == 1 else sparse.unflatten(2, x.shape[1:-1]).movedim(1, -1)

    def extra_repr(self) -> str:
        return f"{self.fraction}, axis={self.axis!r}, channel_dim={self.channel_dim}, mix={self.mix}"


def insert_top_k(
    model: nn.Module, fraction: float = 0.2, *, axis: Literal["space", "channel"] | None = None, mix: float = 1.0
) -> list[TopKActivation]:
    """Put a `TopKActivation` after the activation of every feed-forward of a model, in place; then tune it.

    Feed-forwards are modules with ``fc1``, ``act`` and ``fc2`` over tokens: `glocal.nn.MLP`, and those of timm's vision
    transformers. Names of weights stay. It is on in training and in use.

    Args:
        model: the module that has blocks.
        fraction, axis, mix: as in `TopKActivation`. Where axis is None it is ``"space"``, and ``"channel"`` in blocks
            whose attention says that it is causal.

    Returns:
        What was put in, block by block.

    Raises:
        ValueError: a model without feed-forwards, with Top-K in them already, or causal and ``axis="space"``.

    >>> from glocal.nn import MLP, Attention, Block
    >>> insert_top_k(Block(8, Attention(8, 2), MLP(8, 16)), 0.1)
    [TopKActivation(0.1, axis='space', channel_dim=-1, mix=1.0)]
    """
    hosts = {}
    for block in model.modules():
        attention = getattr(block, "attention", None) or getattr(block, "attn", None)
        for host in block.children():
            if all(isinstance(getattr(host, name, None), nn.Module) for name in ("fc1", "act", "fc2")):
                hosts[host] = bool(getattr(attention, "causal", False))
    if not hosts:
        raise ValueError("model must have feed-forwards with fc1, act and fc2; it has none")
    if any(isinstance(module, TopKActivation) for module in model.modules()):
        raise ValueError("model has TopKActivation in its feed-forwards already")
    if axis == "space" and any(hosts.values()):
        raise ValueError("axis must be 'channel' in a causal model: 'space' ranks tokens that are still to come")
    made = []
    for host, causal in hosts.items():
        top = TopKActivation(fraction, axis=axis or ("channel" if causal else "space"), mix=mix)
        host.act = nn.Sequential(host.get_submodule("act"), top)
        made.append(top)
    return made
