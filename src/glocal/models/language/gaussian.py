"""A classifier of Gaussian gates on the frozen layers of a pretrained encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glocal.nn import GaussianBlock, importance_factor
from glocal.shapes import Bool, Float

__all__ = ["GaussianClassifier"]


class GaussianClassifier(nn.Module):
    """Features of an encoder's last layers, gated by `GaussianBlock`, averaged, and one linear map.

    Ioannides et al., 2024, arXiv 2401.11143. Only gates and the linear map learn: ``2 * num_heads * num_gaussians``
    numbers a gate. What the features of a token weigh is in `importance`.

    Args:
        encoder: a model of transformers that gives ``hidden_states``; it is frozen and stays in evaluation mode.
        num_classes: logits.
        layers: how many of its last layers' outputs are read.
        num_heads, num_gaussians: of the gates along the features.
        gates: gates after one another.

    Raises:
        ValueError: more layers than the encoder has, numbers below 1.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    >>> model = GaussianClassifier(BertModel(BertConfig(**sizes)), 3, layers=2)
    >>> ids = torch.randint(50, (2, 7))
    >>> model(model.features(ids)).shape
    torch.Size([2, 3])
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # gates, and 16 x 3 + 3
    59
    """

    def __init__(
        self,
        encoder: Any,
        num_classes: int,
        *,
        layers: int = 1,
        num_heads: int = 4,
        num_gaussians: int = 1,
        gates: int = 1,
    ) -> None:
        super().__init__()
        has = encoder.config.num_hidden_layers
        if not 1 <= layers <= has:
            raise ValueError(f"layers must be from 1 to the encoder's {has}; it was {layers}")
        if num_classes < 1 or gates < 1:
            raise ValueError(f"num_classes and gates must be at least 1; they were {num_classes} and {gates}")
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers = layers
        self.block = GaussianBlock([(-1, num_heads, num_gaussians)] * gates)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)

    def train(self, mode: bool = True) -> GaussianClassifier:
        """The encoder stays as it is."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, ids: Tensor, real: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B L N C"]:
        """What the last layers make of tokens ``(B, N)``; it does not change in training."""
        mask = torch.ones_like(ids) if real is None else real.long()
        states = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack(states[-self.layers :], 1)

    def forward(
        self, features: Float[Tensor, "B L N C"], real: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B classes"]:
        """Logits of `features`; ``real`` says which tokens are no padding."""
        gated = self.block(features)
        assert isinstance(gated, Tensor)
        if real is None:
            mean = gated.mean((1, 2))
        else:
            shown = real[:, None, :, None].to(gated.dtype)
            mean = (gated * shown).sum(2).mean(1) / shown.sum((1, 2)).clamp(min=1)
        out: Tensor = self.head(mean)
        return out

    @torch.no_grad()
    def importance(self, features: Float[Tensor, "B L N C"]) -> Float[Tensor, " C"]:
        """Of each feature, from 0 to 1, by the weights of the first gate."""
        _, gates = self.block(features, return_weights=True)
        return importance_factor(gates[0])
