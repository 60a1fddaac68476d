"""Which patterns the attention maps of a vision transformer show, and which heads show which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glocal.inspect.recording import Record

__all__ = ["HeadMaps", "MapAutoencoder", "MapClusters", "cluster_maps", "head_maps", "map_templates", "name_map"]


class HeadMaps(NamedTuple):
    """Attention maps of heads. Made by `head_maps`.

    Args:
        maps: from patches to all tokens, ``(M, N, first + N)``.
        heads: layer and head of each, ``(M, 2)``.
        first: tokens before the patches.
    """

    maps: Tensor
    heads: Tensor
    first: int

    def pictures(self, boost: float = 0.0) -> Tensor:
        """Among patches alone, from 0 to 1, ``(M, N, N)``: by the greatest weight of each, which is `scales`.

        Args:
            boost: where it is not 0, ``log(1 + boost w) / log(1 + boost)`` instead of ``w``, which shows small weights.
        """
        found = self.maps[..., self.first :] / self.scales.clamp_min(1e-30)[:, None, None]
        return torch.log1p(boost * found) / torch.log1p(torch.tensor(boost)) if boost else found

    @property
    def scales(self) -> Tensor:
        """The greatest weight of each map among patches, ``(M,)``: how strong what a picture shows is."""
        return self.maps[..., self.first :].amax((1, 2))


@torch.no_grad()
def head_maps(record: Record, *, first: int = 1, limit: int = 50_000) -> HeadMaps:
    """All heads' maps of all images of a record.

    Args:
        record: with attention, of layers over as many tokens.
        first: tokens before the patches: 1 for a class token.
        limit: of the maps; of more, as many are taken at even distances.

    Raises:
        ValueError: layers over different numbers of tokens.
    """
    if len({layer.keys for layer in record}) > 1:
        raise ValueError("record must be of layers over as many tokens: choose them, record(..., layers=...)")
    sizes = [(layer.q.shape[0], layer.q.shape[1]) for layer in record]
    count = sum(batch * heads for batch, heads in sizes)
    wanted = torch.linspace(0, count - 1, min(limit, count)).round().long()
    maps, owners, seen = [], [], 0
    for number, (layer, (batch, heads)) in enumerate(zip(record, sizes, strict=True)):
        mine = wanted[(wanted >= seen) & (wanted < seen + batch * heads)] - seen
        seen += batch * heads
        maps.append(layer.weights()[:, :, first:].flatten(0, 1)[mine].float().cpu())
        owners.append(torch.stack([torch.full_like(mine, number), mine % heads], 1))
    return HeadMaps(torch.cat(maps), torch.cat(owners), first)


class MapAutoencoder(nn.Module):
    """Maps of ``tokens x tokens`` to a few numbers and back; three convolutions each way.

    Args:
        tokens: side of the maps; they are padded with zeros to a multiple of 8, which count for nothing.
        latent: numbers for a map.

    >>> MapAutoencoder(10)(torch.rand(3, 10, 10)).shape
    torch.Size([3, 10, 10])
    """

    def __init__(self, tokens: int, latent: int = 32) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1; it was {tokens}")
        self.tokens, self.padded = tokens, -(-tokens // 8) * 8
        side = self.padded // 8
        steps = ((1, 16), (16, 32), (32, 64))
        down = [m for a, b in steps for m in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
        up = [m for a, b in steps[::-1] for m in (nn.ReLU(), nn.ConvTranspose2d(b, a, 3, 2, 1, 1))]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(64 * side * side, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64 * side * side), nn.Unflatten(1, (64, side, side)), *up)

    def encode(self, maps: Tensor) -> Tensor:
        """``(M, N, N)`` from 0 to 1 to ``(M, latent)``."""
        if maps.dim() != 3 or maps.shape[1:] != (self.tokens, self.tokens):
            raise ValueError(f"maps must be (M, {self.tokens}, {self.tokens}); it was {tuple(maps.shape)}")
        found: Tensor = self.encoder(F.pad(maps[:, None], (0, self.padded - self.tokens) * 2))
        return found

    def forward(self, maps: Tensor) -> Tensor:
        """``(M, N, N)`` to the same, by way of the latent numbers."""
        found: Tensor = self.decoder(self.encode(maps)).sigmoid()
        return found[:, 0, : self.tokens, : self.tokens]

    def learn(self, maps: Tensor, *, epochs: int = 30, batch: int = 128, rate: float = 1e-3, seed: int = 0) -> float:
        """Learn to give maps back, by Adam; the mean squared error of the last epoch.

        Args:
            maps: ``(M, N, N)`` from 0 to 1.
            epochs, batch, rate: of training.
            seed: of the order.
        """
        optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        generator, error = torch.Generator().manual_seed(seed), 0.0
        for _ in range(epochs):
            error = 0.0
            for picked in torch.randperm(len(maps), generator=generator).split(batch):
                part = maps[picked.to(maps.device)]
                loss = F.mse_loss(self(part), part)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                error += float(loss.detach()) * len(picked) / len(maps)
        return error


@dataclass(frozen=True, eq=False)
class MapClusters:
    """Maps put together by their latent numbers. Made by `cluster_maps`.

    Args:
        labels: cluster of each map, ``(M,)``.
        count: of clusters.
        silhouette: of each count that was tried.
    """

    labels: Tensor
    count: int
    silhouette: dict[int, float]

    def patterns(self, maps: Tensor) -> Tensor:
        """Each cluster's mean map, ``(count, ...)`` of ``maps (M, ...)``."""
        return torch.stack([maps[self.labels == n].mean(0) for n in range(self.count)])

    def signatures(self, heads: Tensor) -> Tensor:
        """Which share of a head's maps is in each cluster, ``(layers, H, count)``; NaN for heads without maps.

        Args:
            heads: layer and head of each map, ``(M, 2)``.
        """
        layers, count = (int(n) + 1 for n in heads.amax(0))
        found = torch.zeros(layers, count, self.count, dtype=torch.float64)
        found.index_put_((heads[:, 0], heads[:, 1], self.labels), torch.ones(len(heads)).double(), accumulate=True)
        return found / found.sum(-1, keepdim=True)


def cluster_maps(latents: Tensor, counts: Iterable[int] = range(4, 13), *, seed: int = 0) -> MapClusters:
    """Cluster maps by k-means over their latent numbers, with as many clusters as have the best silhouette.

    Args:
        latents: ``(M, latent)``, of `MapAutoencoder.encode`.
        counts: numbers of clusters to try.
        seed: of k-means, and of the 2,000 maps at most on which silhouettes are measured.

    Raises:
        ValueError: a count that is not from 2 to one less than the maps.

    >>> points = torch.cat([torch.randn(20, 3) + 20 * torch.eye(3)[n % 3] * (1 + n // 3) for n in range(4)])
    >>> cluster_maps(points, range(2, 7)).count
    4
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    data: Any = latents.detach().cpu().double().numpy()
    found: dict[int, Any] = {}
    silhouette = {}
    for count in counts:
        if not 2 <= count < len(data):
            raise ValueError(f"counts must be from 2 to {len(data) - 1}, for {len(data)} maps; one was {count}")
        found[count] = KMeans(count, n_init=10, random_state=seed).fit_predict(data)
        size = min(2000, len(data))
        silhouette[count] = float(silhouette_score(data, found[count], sample_size=size, random_state=seed))
    best = max(silhouette, key=lambda count: silhouette[count])
    return MapClusters(torch.from_numpy(found[best]).long(), best, silhouette)


def map_templates(grid: tuple[int, int], first: int = 1) -> dict[str, Tensor]:
    """Attention maps as they are drawn in textbooks, from patches to all tokens, ``(N, first + N)``.

    ``"self"``; ``"local"``: to the patches around, itself among them; ``"row"`` and ``"column"``; ``"uniform"``: to all
    patches; ``"class"``: to the tokens before the patches, where there are such. A fixed key is no single template, see
    `name_map`.

    Args:
        grid: rows and columns of patches.
        first: tokens before the patches.
    """
    rows, columns = grid
    at = torch.arange(rows * columns)
    down = (at[:, None] // columns - at // columns).abs()
    across = (at[:, None] % columns - at % columns).abs()
    masks = {
        "self": down + across == 0,
        "local": torch.maximum(down, across) <= 1,
        "row": down == 0,
        "column": across == 0,
        "uniform": down >= 0,
    }
    found = {name: F.pad(mask.double() / mask.sum(1, keepdim=True), (first, 0)) for name, mask in masks.items()}
    if first:
        found["class"] = F.pad(torch.full((rows * columns, first), 1 / first).double(), (0, rows * columns))
    return found


def name_map(pattern: Tensor, grid: tuple[int, int], first: int = 1) -> tuple[str, dict[str, float]]:
    """The template that a map is most like, and its cosine with each; ``"key"`` is the patch with the most attention.

    Args:
        pattern: from patches to all tokens, ``(N, first + N)``, e.g. of `MapClusters.patterns` over `HeadMaps.maps`.
        grid, first: as in `map_templates`.

    Raises:
        ValueError: a map of another size.

    >>> name_map(map_templates((3, 4))["row"], (3, 4))[0]
    'row'
    """
    count = grid[0] * grid[1]
    if tuple(pattern.shape) != (count, first + count):
        raise ValueError(f"pattern must be ({count}, {first + count}); it was {tuple(pattern.shape)}")
    templates = map_templates(grid, first)
    key = first + int(pattern[:, first:].sum(0).argmax())
    templates["key"] = F.one_hot(torch.full((count,), key), first + count).double()
    flat = pattern.double().cpu().flatten()
    cosines = {name: float(F.cosine_similarity(flat, other.flatten(), dim=0)) for name, other in templates.items()}
    return max(cosines, key=lambda name: cosines[name]), cosines
