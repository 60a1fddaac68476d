"""What networks of levels do with an image, once their parts are made."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["Levels"]


class Levels(nn.Module):
    """A network that embeds an image as a map, and halves it between levels of blocks; a base class.

    A subclass makes ``embed`` (images to maps ``(B, h, w, C)``), ``down`` (one fewer than levels), ``levels``, ``norm``
    and ``head``.
    """

    embed: nn.Module
    down: nn.ModuleList
    levels: nn.ModuleList
    norm: nn.Module
    head: nn.Module

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each level, finest first, ``(B, h, w, C)``, not normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        x, maps = self.embed(x), []
        for number, blocks in enumerate(self.levels):
            x = self.down[number - 1](x) if number else x
            x = cast(Tensor, blocks(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits, by the mean of the last map."""
        out: Tensor = self.head(self.norm(self.forward_features(x)[-1]).mean((1, 2)))
        return out
