"""Does attention that only moves along the source hold at ten times the length of training, where content breaks?

    python benchmarks/proofs/s071_location_relative.py [--seeds 2] [--steps 800]

A stream of symbols, each to be said for its own number of frames, 1 to 4; the target is the label of every frame, the
one before is given. Trained on 3 to 9 symbols, tried on 6, 24 and 60. One decoder of a GRU with 48 channels over a
bidirectional GRU, with content attention, mixtures of Gaussians as by Graves (v0) and with softplus and biases (v2b),
and dynamic convolutions (DCA). Battenberg et al., 2020, arXiv 1910.10288.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bed import fit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.models.language.aligned import AlignedDecoder
from glocal.nn import AdditiveAttention, AlignmentAttention, DynamicConvolutionAttention, GMMAttention
from glocal.papers.verdict import verdict

SYMBOLS, DIM, BATCH = 16, 48, 16
NONE = -100  # after the last frame
LENGTHS = (6, 24, 60)

WAYS: dict[str, Callable[[], AlignmentAttention]] = {
    "content": lambda: AdditiveAttention(DIM, DIM, hidden=DIM),
    "GMM v0": lambda: GMMAttention(DIM, DIM, version="v0", hidden=DIM),
    "GMM v2b": lambda: GMMAttention(DIM, DIM, version="v2b", hidden=DIM),
    "DCA": lambda: DynamicConvolutionAttention(DIM, DIM, hidden=DIM),
}


class Speaker(nn.Module):
    """Symbols in, labels of frames out."""

    def __init__(self, attention: AlignmentAttention) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, DIM)
        self.encoder = nn.GRU(DIM, DIM // 2, bidirectional=True, batch_first=True)
        self.decoder = AlignedDecoder(SYMBOLS + 1, attention, embed_dim=DIM, hidden=2 * DIM, cell="gru")

    def forward(self, symbols: Tensor, labels: Tensor) -> Tensor:
        """Logits ``(B, frames, SYMBOLS + 1)``; the label before the first is its own symbol."""
        before = torch.cat([torch.full_like(labels[:, :1], SYMBOLS), labels[:, :-1].clamp(min=0)], 1)
        out: Tensor = self.decoder(self.encoder(self.embed(symbols))[0], before)
        return out


def streams(length: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols ``(count, length)`` and labels of frames, with `NONE` after the last."""
    symbols = torch.randint(SYMBOLS, (count, length), generator=draw)
    rows = [torch.repeat_interleave(row, row % 4 + 1) for row in symbols]
    return symbols, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NONE)


def train(way: str, seed: int, steps: int) -> list[float]:
    """Share of right frames at each of the lengths."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Speaker(WAYS[way]())

    def loss() -> Tensor:
        length = int(torch.randint(3, 10, (), generator=draw))
        symbols, labels = streams(length, BATCH, draw)
        return cross_entropy(model(symbols, labels).flatten(0, 1), labels.flatten(), ignore_index=NONE)

    fit(model, loss, steps)
    found = []
    held = torch.Generator().manual_seed(1000)
    for length in LENGTHS:
        symbols, labels = streams(length, 64, held)
        with torch.no_grad():
            right = model(symbols, labels).argmax(-1) == labels
        found.append(float(right[labels != NONE].float().mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    heads = "".join(f"{n:>8}" for n in LENGTHS)
    print(f"{'right, of symbols':<20}{heads}   each seed's at {LENGTHS[-1]}")
    for way in WAYS:
        each = torch.tensor([train(way, seed, args.steps) for seed in range(args.seeds)])
        found[way] = each.mean(0)
        seeds = "  ".join(f"{x:.3f}" for x in each[:, -1].tolist())
        print(f"{way:<20}{''.join(f'{x:>8.3f}' for x in found[way].tolist())}   {seeds}", flush=True)
    last = {way: float(each[-1]) for way, each in found.items()}
    verdict(
        "location-relative",
        f"frames right at 6.7 times the longest training stream, 10 times the mean: "
        f"{', '.join(f'{way} {x:.3f}' for way, x in last.items())}",
        last["DCA"] >= 0.97 and last["GMM v2b"] > max(last["content"], last["GMM v0"]) and last["content"] <= 0.85,
    )


if __name__ == "__main__":
    main()
