"""Several views of one smooth random scene, as tokens, and layers that compare them as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from glocal.nn import Attention

__all__ = ["DIM", "SIDE", "SPECIAL", "VIEWS", "plain", "views"]

VIEWS, SIDE, SPECIAL, DIM = 6, 24, 5, 64


def views(seed: int) -> Tensor:
    """Tokens ``(1, n P, C)``: five special ones and a crop of the map, for each view."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, DIM, SIDE + 24, SIDE + 24, generator=generator)
    for _ in range(2):
        scene = avg_pool2d(scene, 5, stride=1)
    scene = (scene - scene.mean()) / scene.std()
    out = []
    for _ in range(VIEWS):
        y, x = torch.randint(0, scene.shape[-1] - SIDE, (2,), generator=generator).tolist()
        crop = scene[0, :, y : y + SIDE, x : x + SIDE].flatten(1).T
        crop = crop + 0.1 * torch.randn(crop.shape, generator=generator)
        out.append(torch.cat([torch.randn(SPECIAL, DIM, generator=generator), crop]))
    return torch.cat(out)[None]


def plain(layer: Attention) -> Attention:
    """Projections that change nothing: queries, keys and values are the features."""
    with torch.no_grad():
        for part in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            part.weight.copy_(torch.eye(DIM))
    return layer
