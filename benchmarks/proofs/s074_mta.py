"""Does attention find the block that has two given letters at once when scores of neighbours are convolved?

    python benchmarks/proofs/s074_mta.py [--seeds 1] [--steps 3000]

Six blocks of three of twelve letters, with separators, then two letters that only one block has both of: the answer is
that block. Two layers of 64 channels and 2 heads, kernels of 2 queries and 5 keys on scores alone, against the same
network without. Share of 2,000 new examples whose three letters are not all right, every 500 steps. Golovneva et al.,
2025, arXiv 2504.00927.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.models.language.mta import mta
from glocal.papers.verdict import verdict

LETTERS, BLOCKS, SIDE, ASKED, BATCH, RATE, TESTS = 12, 6, 3, 2, 64, 1e-3, 2000
DOT, ASK, VOCAB = LETTERS, LETTERS + 1, LETTERS + 2


def examples(count: int, rng: torch.Generator) -> Tensor:
    """Rows of tokens: blocks with separators, the question, and the answer as the last three."""

    def blocks(many: int) -> Tensor:
        return torch.rand(many, LETTERS, generator=rng).argsort(1)[:, :SIDE]

    target = blocks(count)
    asked = target.gather(1, torch.rand(count, SIDE, generator=rng).argsort(1)[:, :ASKED])
    others = blocks(count * (BLOCKS - 1)).view(count, BLOCKS - 1, SIDE)
    while bool((both := (others[..., None] == asked[:, None, None]).any(2).all(-1)).any()):
        others[both] = blocks(int(both.sum()))
    every = torch.cat([target[:, None], others], 1)
    order = torch.rand(count, BLOCKS, generator=rng).argsort(1)
    every = every.gather(1, order[..., None].expand_as(every))
    dots = torch.full((count, BLOCKS, 1), DOT)
    text = torch.cat([every, dots], 2).flatten(1)[:, :-1]
    return torch.cat([text, torch.full((count, 1), ASK), asked, target], 1)


@torch.no_grad()
def error(model: nn.Module, rows: Tensor) -> float:
    """Share of rows whose answer is not all right; greedy decoding is right just where all next letters are."""
    model.eval()
    right = [(model(part[:, :-1])[:, -SIDE:].argmax(-1) == part[:, -SIDE:]).all(1) for part in rows.split(500)]
    model.train()
    return 1 - float(torch.cat(right).float().mean())


def train(name: str, seed: int, steps: int, held: Tensor) -> float:
    torch.manual_seed(seed)
    convolve = ("scores",) if name == "multi-token" else ()
    sizes = {"query_kernel": 2, "key_kernel": 5, "mix_heads": (), "head_norm": False, "head_gate": False}
    model = mta(VOCAB, 64, 2, 2, period=1, place=0, hidden=192, theta=1e4, convolve=convolve, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rng, found = torch.Generator().manual_seed(seed), 1.0
    for step in range(1, steps + 1):
        rows = examples(BATCH, rng)
        loss = cross_entropy(model(rows[:, :-1])[:, -SIDE:].flatten(0, 1), rows[:, -SIDE:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == steps:
            found = error(model, held)
            print(f"seed {seed}, {name:11} {step:5} steps: error {found:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    held, errors = examples(TESTS, torch.Generator().manual_seed(10**6)), {"multi-token": 0.0, "attention": 0.0}
    for seed in range(options.seeds):
        for name in errors:
            errors[name] += train(name, seed, options.steps, held) / options.seeds
    mine, baseline = errors.values()
    verdict(
        "mta",
        f"error {mine:.3f} at finding a block by two of its letters after {options.steps} steps, {baseline:.3f} of "
        "attention without convolution",
        mine <= 0.1 and mine <= baseline / 4,
    )


if __name__ == "__main__":
    main()
