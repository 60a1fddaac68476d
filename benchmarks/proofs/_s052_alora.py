"""Can an adapter that attends carry to a token what the frozen model cannot see?

    python benchmarks/proofs/_s052_alora.py [--seeds 2] [--base-steps 300] [--steps 400]

A byte model of two layers of 64 channels whose windows reach 8 bytes back, on the standard library's source; then
frozen. The new task: a marked letter, 29 bytes of source, a sign that asks for the letter. Adapters on the query and
value projections, LoRA and LoRA with attention, with as many parameters. Share of right letters, and bits per byte of
untouched source with the adapters in. After "More Than Catastrophic Forgetting", 2024, arXiv 2405.17830.
"""

from __future__ import annotations

import argparse

import torch
from bed import fit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.bench.bytes import bits_per_byte, library_source, train_bytes
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, Call, Rope, adapters, add_adapters
from glocal.papers.verdict import verdict
from glocal.patterns import Pattern, Sliding

DIM, HEADS, WINDOW, BEFORE, BETWEEN, BATCH = 64, 4, 8, 8, 29, 64
MARK, ASK, LETTERS = 1, 2, 8  # bytes that the source does not have; letters from 128 on, which it has hardly
RANK = 8


class Near(Attention):
    """The last `WINDOW` bytes."""

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return Sliding(WINDOW, 0)


def base(steps: int) -> Transformer:
    """The model that is adapted; the same for all seeds."""
    torch.manual_seed(0)
    rope = Rope()
    model = Transformer(256, DIM, [lambda dim: Near(dim, HEADS, causal=True, rope=rope)] * 2)
    train_bytes(model, steps=steps)
    return model


def asked(count: int, source: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes ``(count, N)`` that end with the sign, and the letters."""
    at = torch.randint(len(source) - BEFORE - BETWEEN, (count,), generator=generator)
    rows = torch.stack([source[i : i + BEFORE + BETWEEN] for i in at.tolist()]).long()
    letter = 128 + torch.randint(LETTERS, (count,), generator=generator)
    mark, ask = (torch.full((count, 1), sign) for sign in (MARK, ASK))
    return torch.cat([rows[:, :BEFORE], mark, letter[:, None], rows[:, BEFORE:], ask], 1), letter


def lora_rank() -> int:
    """With which plain LoRA has as many parameters in a map of DIM x DIM, rounded up."""
    return -(-(2 * DIM * RANK + 3 * RANK**2) // (2 * DIM))


def adapt(model: Transformer, attends: bool) -> int:
    """Put adapters in; how many parameters learn."""
    if attends:
        add_adapters(model, rank=RANK, num_heads=4, dropout=0.0)
    else:
        add_adapters(model, rank=lora_rank(), num_heads=1, dropout=0.0)
        for _, adapter in adapters(model):
            adapter.attended = _nothing  # type: ignore[method-assign]
            for p in (adapter.q_proj, adapter.k_proj, adapter.v_proj):
                p.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _nothing(z: Tensor, v: Tensor) -> Tensor:
    return torch.zeros_like(z)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, held = library_source()
    start = base(args.base_steps).state_dict()
    rope = Rope()

    def fresh() -> Transformer:
        model = Transformer(256, DIM, [lambda dim: Near(dim, HEADS, causal=True, rope=rope)] * 2)
        model.load_state_dict(start)
        return model

    before = bits_per_byte(fresh())
    print(f"the frozen model: {before:.3f} bits per byte\n{'adapter':<10}{'parameters':>11}{'letters':>9}{'bits':>8}")
    right: dict[str, float] = {}
    bits: dict[str, float] = {}
    for name in ("LoRA", "ALoRA"):
        scores, losses, count = [], [], 0
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            generator, model = torch.Generator().manual_seed(seed), fresh()
            count = adapt(model, name == "ALoRA")

            def loss(model: nn.Module = model, generator: torch.Generator = generator) -> Tensor:
                rows, letters = asked(BATCH, train, generator)
                return cross_entropy(model(rows)[:, -1], letters)

            fit(model, loss, args.steps)
            with torch.no_grad():
                rows, letters = asked(1000, held, torch.Generator().manual_seed(99))
                scores.append(float((model(rows)[:, -1].argmax(-1) == letters).float().mean()))
            losses.append(bits_per_byte(model))
        right[name], bits[name] = sum(scores) / len(scores), sum(losses) / len(losses)
        print(f"{name:<10}{count:>11,}{right[name]:>9.3f}{bits[name]:>8.3f}", flush=True)
    verdict(
        "alora",
        f"letters from {BETWEEN + 1} bytes back, in a model that sees {2 * WINDOW}: {right['ALoRA']:.3f} with adapters "
        f"that attend, {right['LoRA']:.3f} with LoRA (chance {1 / LETTERS:.3f}); untouched source {before:.3f} bits "
        f"per byte before, {bits['ALoRA']:.3f} and {bits['LoRA']:.3f} after",
        right["ALoRA"] >= 0.9 and right["LoRA"] <= 0.5 and bits["ALoRA"] <= bits["LoRA"] + 0.02 / 0.6931,
    )


if __name__ == "__main__":
    main()
