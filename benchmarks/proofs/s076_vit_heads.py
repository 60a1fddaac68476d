"""Which heads of a vision transformer matter, how far do they look, and which patterns are there?

    python benchmarks/proofs/s076_vit_heads.py [--maps 1000]

The vision transformer of the proof of S033, which reads scikit-learn's digits, classifies held-out digits without each
of its 24 heads. Wanted: the loss of probability of the true class and the divergence of all classes rank heads alike
(Spearman's correlation at least 0.5), and without the quarter of the heads with the greatest divergence the accuracy is
at least 0.1 lower than without the quarter with the least. Then maps of 16 x 16 tokens are planted: diagonal, row,
column, one key, even, with 10 % noise; clusters of the autoencoder's latent numbers must be the templates (adjusted
Rand index at least 0.9). Rings and the patterns of the network's own maps are printed. Li et al., 2023, arXiv
2303.13731.
"""

from __future__ import annotations

import argparse

import torch
import vit_bed
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from glocal.inspect import (
    MapAutoencoder,
    cluster_maps,
    head_maps,
    image_heads,
    map_templates,
    masked_heads,
    measure,
    name_map,
    patch_distance,
    record,
    ring_mass,
)
from glocal.papers.verdict import verdict

GRID = (4, 4)


def planted(count: int) -> tuple[Tensor, Tensor]:
    """Maps ``(count, 16, 16)`` of five templates in turn, a tenth of them noise, scaled to 1; and which."""
    generator = torch.Generator().manual_seed(0)
    named = map_templates(GRID, 0)
    key = torch.zeros(16, 16, dtype=torch.float64)
    key[:, 5] = 1
    templates = torch.stack([named["self"], named["row"], named["column"], key, named["uniform"]]).float()
    truth = torch.arange(count) % 5
    noise = torch.rand(count, 16, 16, generator=generator)
    maps = 0.9 * templates[truth] + 0.1 * noise / noise.sum(-1, keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True), truth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--maps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, (x, y) = vit_bed.bed(), vit_bed.images()
    held, labels = x[vit_bed.TRAIN :], y[vit_bed.TRAIN :]
    effects = image_heads(model, held, labels)
    means, ranks = effects.mean(), effects.rank_correlations()
    kept = record(model, held[:100])
    looks = measure(kept, {"rings": ring_mass(GRID), "distance": patch_distance(GRID)})
    print("layer: mass on rings 0 to 3 and the class token; mean distance; divergence of its heads")
    for layer in range(len(kept)):
        rings = " ".join(f"{value:.3f}" for value in looks["rings"][layer].mean(0).tolist())
        distance = float(looks["distance"][layer].mean())
        parts = " ".join(f"{value:.3f}" for value in means["divergence"][layer].tolist())
        print(f"{layer:>5}: {rings}; {distance:.2f}; {parts}", flush=True)
    for (a, b), value in ranks.items():
        print(f"rank correlation of {a} and {b}: {value:.3f}")
    flat = means["divergence"].flatten().argsort(descending=True).tolist()
    heads = [divmod(place, 8) for place in flat]
    base, without = vit_bed.accuracy(model, held, labels), {}
    for name, gone in (("top", heads[:6]), ("lowest", heads[-6:])):
        with masked_heads(model, gone):
            without[name] = vit_bed.accuracy(model, held, labels)
    print(f"accuracy {base:.3f}; without the top quarter {without['top']:.3f}, the lowest {without['lowest']:.3f}")

    maps, truth = planted(arguments.maps)
    torch.manual_seed(0)
    network = MapAutoencoder(16)
    error = network.learn(maps)
    clusters = cluster_maps(network.encode(maps))
    rand = float(adjusted_rand_score(truth.numpy(), clusters.labels.numpy()))
    print(f"planted: {clusters.count} clusters of 5 templates, adjusted Rand {rand:.3f}, error {error:.4f}", flush=True)

    own = head_maps(kept)
    torch.manual_seed(0)
    network = MapAutoencoder(16)
    network.learn(own.pictures(), epochs=10)
    clusters = cluster_maps(network.encode(own.pictures()))
    signatures = clusters.signatures(own.heads)
    for number, pattern in enumerate(clusters.patterns(own.maps)):
        name, cosines = name_map(pattern, GRID)
        share = float((clusters.labels == number).double().mean())
        best = divmod(int(signatures[..., number].argmax()), 8)
        print(f"pattern {number}: {share:.0%} of the maps, most like {name} ({cosines[name]:.2f}), most of head {best}")
    correlation, apart = ranks["true", "divergence"], without["lowest"] - without["top"]
    verdict(
        "vit-head-analytics",
        f"loss of the true class and divergence rank 24 heads with Spearman {correlation:.2f}; accuracy {base:.3f}, "
        f"without the six heads of greatest divergence {without['top']:.3f}, of least {without['lowest']:.3f}; planted "
        f"patterns found with adjusted Rand {rand:.2f}",
        correlation >= 0.5 and apart >= 0.1 and rand >= 0.9,
    )


if __name__ == "__main__":
    main()
