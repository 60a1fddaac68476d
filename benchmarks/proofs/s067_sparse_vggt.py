"""Do pooled scores find the blocks that attention over views needs, so that the others can be left out untrained?

    python benchmarks/proofs/s067_sparse_vggt.py [--seeds 3]

Six views are crops of one smooth random map of 64 channels, each shifted by a few patches, so that every patch has
matches in the other views; VGGT's global layers attend to such matches. Queries and keys are the normalised features
as they are. The output of block-sparse attention is compared with that of full attention, against as many blocks
chosen at random. Two things must hold at every share: chosen blocks err less than a quarter as much as random ones,
and the Hilbert order is no worse than rows. That is judged with blocks of 32 queries and 16 keys, as the 3,456
patches are few; the paper's 128 and 64 are printed beside them. No model is trained, none is loaded: the paper's
speed on VGGT is not measured here. Wang et al., 2025, arXiv 2509.07120.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from glocal.bench.views import DIM, SIDE, SPECIAL, plain, views
from glocal.nn import Attention, BlockSparseAttention
from glocal.papers.verdict import verdict
from glocal.patterns import Selected

KEPT = (0.5, 0.25, 0.1)
SIZES, NAMES = ((32, 16), (128, 64)), ("top, raster", "top, hilbert", "random")


class RandomBlocks(BlockSparseAttention):
    """As many blocks, chosen by chance."""

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, real_q: Tensor | None = None, real_k: Tensor | None = None) -> Selected:
        ranked = super().choose(q, k, real_q, real_k).blocks
        count = -(-k.shape[2] // self.key_size)
        chance = torch.rand(*ranked.shape[:-1], count).argsort(-1)[..., : ranked.shape[-1]]
        return Selected(chance, self.key_size, query_size=self.query_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    common = {"qk_norm": "layer", "scale": 4 * DIM**-0.5}  # as sharp as heads that match
    error: dict[tuple[tuple[int, int], str, float], float] = {}
    for seed in range(seeds):
        x = views(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            full = plain(Attention(DIM, 1, **common))(x)
            for (queries, keys), name, kept in itertools.product(SIZES, NAMES, KEPT):
                layer = (RandomBlocks if name == "random" else BlockSparseAttention)(
                    DIM,
                    1,
                    patches=(SIDE, SIDE),
                    special=SPECIAL,
                    ratio=kept,
                    mass=0.0,
                    query_size=queries,
                    key_size=keys,
                    order="hilbert" if name == "top, hilbert" else "raster",
                    **common,
                )
                off = float((plain(layer)(x) - full).norm() / full.norm())
                error[(queries, keys), name, kept] = error.get(((queries, keys), name, kept), 0.0) + off / seeds
    print(f"{'blocks kept':<26}" + "".join(f"{kept:>9.0%}" for kept in KEPT))
    for (queries, keys), name in itertools.product(SIZES, NAMES):
        row = "".join(f"{error[(queries, keys), name, kept]:>9.4f}" for kept in KEPT)
        print(f"{f'{queries} x {keys}, {name}':<26}{row}")

    top, curve, chance = ([error[SIZES[0], name, kept] for kept in KEPT] for name in NAMES)
    finds = all(a < c / 4 for a, c in zip(top, chance, strict=True))
    helps = all(b <= a for a, b in zip(top, curve, strict=True))

    def line(row: list[float]) -> str:
        return " / ".join(f"{value:.3f}" for value in row)

    verdict(
        "sparse-vggt",
        f"relative error with {' / '.join(f'{kept:.0%}' for kept in KEPT)} of the blocks: chosen {line(top)}, "
        f"at random {line(chance)} ({'under' if finds else 'not under'} a quarter); in Hilbert order {line(curve)} "
        f"({'never' if helps else 'sometimes'} worse)",
        finds and helps,
    )


if __name__ == "__main__":
    main()
