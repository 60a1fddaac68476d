"""Can features agree with people on what is alike and keep their neighbours, and does that help with few labels?

    python benchmarks/proofs/s088_glocal_transform.py [--seeds 3]

Scikit-learn's digits; features are the tanh of a random projection to 40 numbers, and 24 of pure noise. "People" call
digits alike that are round (0, 6, 8), straight (1, 4, 7, 9) or curvy (2, 3, 5). Their triplets are of the classes 0, 1,
2, 3, 4, 6 and 7. On pictures of 8, 9 and 5, which no fit has seen: how often the odd one out is right, how many of the
10 nearest neighbours stay, and a classifier of three examples a class; that last also for all ten classes.
Muttenthaler et al., 2023, arXiv 2306.04507.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from glocal.bench.similarity import neighbourhood_overlap, odd_one_out_accuracy
from glocal.papers.verdict import verdict
from glocal.steer.similarity import align

KINDS = {0: 0, 6: 0, 8: 0, 1: 1, 4: 1, 7: 1, 9: 1, 2: 2, 3: 2, 5: 2}
UNSEEN = (8, 9, 5)
STEPS, BATCH, PENALTY = 400, 256, 0.01


def features(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(1797, 64)``, digits and superclasses ``(1797,)``."""
    pixels, digits = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    seen = np.tanh((pixels / 16 - 0.3) @ draw.standard_normal((64, 40)) / 2)
    noise = 1.5 * draw.standard_normal((len(pixels), 24))
    kinds = torch.tensor([KINDS[int(digit)] for digit in digits])
    return torch.tensor(np.concatenate([seen, noise], 1), dtype=torch.float32), torch.tensor(digits), kinds


def judged(kinds: Tensor, pool: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Triplets ``(count, 3)`` out of a pool of pictures: two of one superclass, and one of another."""
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        triplets = pool[torch.randint(len(pool), (4 * count, 3), generator=draw)]
        a, b, c = kinds[triplets].T
        found.append(triplets[(a == b) & (a != c) & (triplets[:, 0] != triplets[:, 1])])
    return torch.cat(found)[:count]


def few_shot(x: Tensor, digits: Tensor, seed: int, repeats: int = 10) -> float:
    """Accuracy of logistic regression on three pictures a class, mean over draws of them."""
    draw, right = np.random.default_rng(seed), []
    labels, classes = digits.numpy(), digits.unique().tolist()
    values = ((x - x.mean()) / x.std()).numpy()
    for _ in range(repeats):
        chosen = np.concatenate([draw.choice(np.flatnonzero(labels == digit), 3, replace=False) for digit in classes])
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        found = LogisticRegression(max_iter=2000).fit(values[chosen], labels[chosen])
        right.append(found.score(values[rest], labels[rest]))
    return float(np.mean(right))


def measured(seed: int) -> dict[str, tuple[float, ...]]:
    """Odd one out, overlap, three shots of unseen classes and of all, for each kind of fit."""
    x, digits, kinds = features(seed)
    unseen = torch.isin(digits, torch.tensor(UNSEEN))
    draw = torch.Generator().manual_seed(seed)
    train = judged(kinds, torch.where(~unseen)[0], 40 * BATCH, draw)
    test = judged(kinds[unseen], torch.arange(int(unseen.sum())), 4000, draw)
    mine, labels = x[unseen], digits[unseen]
    steps = dict(optimizer="adam", lr=1e-2, epochs=STEPS // 40, ramp=1, batch=BATCH, local_batch=256, scale=0.1)

    def fit(**settings: object) -> Callable[[Tensor], Tensor]:
        transform = align(x, train, local_features=x[~unseen], penalty=PENALTY, seed=seed, **steps, **settings)  # type: ignore[arg-type]
        return lambda each: transform(each).detach()

    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "original": lambda each: (each - x.mean()) / x.std(),
        "naive": fit(kind="naive"),
        "global": fit(kind="global"),
        "gLocal, alpha 0.25": fit(alpha=0.25),
        "gLocal, alpha 0.5": fit(alpha=0.5),
    }
    return {
        name: (
            odd_one_out_accuracy(map_(mine), test),
            neighbourhood_overlap(mine, map_(mine)),
            few_shot(map_(mine), labels, seed),
            few_shot(map_(x), digits, seed),
        )
        for name, map_ in maps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    runs = [measured(seed) for seed in range(arguments.seeds)]
    print(f"{'':<20}{'':>13}{'neighbours':>12}{'3 shots,':>10}{'3 shots,':>10}   odd one out")
    print(f"{'features':<20}{'odd one out':>13}{'kept':>12}{'unseen':>10}{'all':>10}   of each seed")
    mean = {}
    for name in runs[0]:
        mean[name] = tuple(np.mean([run[name] for run in runs], axis=0))
        each = "  ".join(f"{run[name][0]:.3f}" for run in runs)
        columns = "".join(f"{value:>{width}.3f}" for value, width in zip(mean[name], (13, 12, 10, 10), strict=True))
        print(f"{name:<20}{columns}   {each}")
    before, naive, glocal = mean["original"], mean["naive"], mean["gLocal, alpha 0.25"]
    verdict(
        "glocal-transform",
        f"odd one out {glocal[0]:.3f} against {before[0]:.3f} before and {naive[0]:.3f} naive; of 10 neighbours "
        f"{glocal[1]:.3f} stay against {naive[1]:.3f} naive; 3 shots {glocal[3]:.3f} against {before[3]:.3f}",
        glocal[1] >= 2 * naive[1] and glocal[0] >= before[0] + 0.01 and glocal[3] >= before[3] + 0.10,
    )


if __name__ == "__main__":
    main()
