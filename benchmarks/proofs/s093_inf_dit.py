"""Does memory grow with the width of an image, not with its area, when it is computed block by block?

    python benchmarks/proofs/s093_inf_dit.py [--seeds 2]

A small Inf-DiT with random weights (4 layers, blocks of 4 x 4 tokens) on images of 4 x 4, 8 x 8 and 12 x 12 blocks: all
blocks at once, and in raster order with the keys and values of one block row kept. Compared: the keys and values of all
layers, counted for all blocks and measured in the caches; and the measured peak of all tensors' bytes in the forward
pass, input and output aside (what a kernel takes for itself is not seen). The outputs must be equal.
Image quality is not measured. Yang et al., 2024, arXiv 2405.04312.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import glocal
from glocal.cache import BlockRowCache
from glocal.models.vision.infdit import InfDiT
from glocal.papers.verdict import verdict

SIZES = (4, 8, 12)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of the storages made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most, self.known = 0, 0, set[int]()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in given:
                    self.known.add(key)
                    self.alive += size
                    weakref.finalize(storage, self._free, key, size)
        self.most = max(self.most, self.alive)
        return out


def blockwise(model: InfDiT, given: list[Tensor], want: Tensor, rows: list[BlockRowCache]) -> Iterator[float]:
    """The error of each piece, none of which is kept."""
    for (vertical, horizontal), piece in model.pieces(*given, rows=rows):
        yield float((piece - want[:, :, vertical, horizontal]).abs().max())


@torch.no_grad()
def measure(size: int, seed: int) -> tuple[int, int, int, int, float]:
    """Live keys and values and peak bytes, at once and block by block, and the largest difference of outputs."""
    torch.manual_seed(seed)
    model = glocal.create("infdit_tiny", depth=4)
    assert isinstance(model, InfDiT)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pixels = model.block * size
    low = pixels // model.scale
    given = [torch.randn(1, 3, pixels, pixels), torch.zeros(1), torch.randn(1, 3, low, low)]
    with Peak() as full:
        want = model(*given)
    rows, held, error = [BlockRowCache(size) for _ in range(4)], 0, 0.0
    with Peak() as cached:
        for one in blockwise(model, given, want, rows):
            error = max(error, one)
            held = max(held, sum(layer.numel for layer in rows))
    tokens = (pixels // model.patch) ** 2
    return 2 * tokens * 32 * 4, held, full.most - want.nbytes, cached.most, error / float(want.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"{'blocks':<10}{'kv full':>12}{'kv rows':>12}{'peak full':>14}{'peak rows':>14}{'error':>12}")
    table = {}
    for size in SIZES:
        runs = [measure(size, seed) for seed in range(seeds)]
        table[size] = [max(column) for column in zip(*runs, strict=True)]
        kv, held, full, cached, error = table[size]
        print(f"{f'{size}x{size}':<10}{kv:>12,}{held:>12,}{full:>14,}{cached:>14,}{error:>12.1e}")
    growth = [last / first for first, last in zip(table[SIZES[0]][:4], table[SIZES[-1]][:4], strict=True)]
    error = max(row[4] for row in table.values())
    verdict(
        "inf-dit",
        f"from 4x4 to 12x12 blocks live keys and values grow {growth[0]:.1f} times at once (of all layers), "
        f"{growth[1]:.1f} times by blocks, peak bytes {growth[2]:.1f} and {growth[3]:.1f} times; "
        f"outputs differ by {error:.0e} of their deviation",
        growth[0] > 8 and growth[2] > 7 and growth[1] < 3.1 and growth[3] < 3.1 and error < 1e-4,
    )


if __name__ == "__main__":
    main()
