"""Do the score functions of the taxonomy differ in what they can express?

    python benchmarks/proofs/s041_attention_taxonomy.py [--seeds 2] [--steps 800]

A retrieval toy: eight keys at random on the sphere, a query that is one of them turned by a rotation nobody is told,
and some noise. Which key is it? Each score function learns from the softmax of its scores; accuracy on new keys.
Chaudhari et al., 2021, arXiv 1904.02874.
"""

from __future__ import annotations

import argparse

import torch
from bed import fit
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from glocal.nn.score_functions import SCORE_FUNCTIONS, ScoreFunction, score_function
from glocal.papers.verdict import verdict

DIM, KEYS, BATCH, HIDDEN = 8, 8, 256, 128


def draw(count: int, form: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(count, 1, DIM)``, keys ``(count, KEYS, DIM)``, and which key is meant."""
    keys = normalize(torch.randn(count, KEYS, DIM, generator=generator), dim=-1)
    meant = torch.randint(KEYS, (count,), generator=generator)
    query = keys[torch.arange(count), meant] @ form + 0.02 * torch.randn(count, DIM, generator=generator)
    return query[:, None], keys, meant


def train(name: str, seed: int, steps: int) -> float:
    """Share of right keys."""
    torch.manual_seed(seed)
    form, _ = torch.linalg.qr(torch.randn(DIM, DIM))
    generator = torch.Generator().manual_seed(seed)
    f = score_function(name, DIM, DIM, hidden=HIDDEN, longest=KEYS)
    sharp = torch.nn.Linear(1, 1, bias=False)  # any function may be as sharp as it likes
    torch.nn.init.constant_(sharp.weight, 5.0)

    def loss() -> Tensor:
        query, keys, meant = draw(BATCH, form, generator)
        return cross_entropy(sharp(f(query, keys)[:, 0, :, None])[..., 0], meant)

    fit(torch.nn.ModuleList([f, sharp]), loss, steps)
    return accuracy(f, form, generator)


@torch.no_grad()
def accuracy(f: ScoreFunction, form: Tensor, generator: torch.Generator) -> float:
    query, keys, meant = draw(4096, form, generator)
    return float((f(query, keys)[:, 0].argmax(-1) == meant).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print(f"{'score':<20}{'accuracy':>9}   each seed's")
    for name in SCORE_FUNCTIONS:
        each = [train(name, seed, args.steps) for seed in range(args.seeds)]
        found[name] = sum(each) / len(each)
        print(f"{name:<20}{found[name]:>9.3f}   {'  '.join(f'{a:.3f}' for a in each)}", flush=True)
    verdict(
        "attention-taxonomy",
        f"keys found through a rotation that has to be learned: general {found['general']:.3f}, concat "
        f"{found['concat']:.3f}, deep {found['deep']:.3f}, dot {found['dot']:.3f}, kernel {found['kernel']:.3f}, "
        f"location {found['location']:.3f} (chance {1 / KEYS:.3f})",
        min(found["general"], found["concat"]) >= 0.95 and found["dot"] <= 0.6,
    )


if __name__ == "__main__":
    main()
