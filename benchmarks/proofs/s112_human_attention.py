"""Is habit of position told apart from attention that reads, and are readers resembled by what they follow?

    python benchmarks/proofs/s112_human_attention.py [--steps 600]

Two causal models of the standard library's source, byte by byte (2 layers of 32 channels, 4 layers of 96, 4 heads
each), over 120 lines of unseen modules; words are what white space parts. Reliance: share of the variance of attention
between words that itself, the previous word and the first one explain, of both models and of the larger one with 0.8 of
its attention replaced by the mean of these patterns. Readers are generated: 40 of them, whose saccades are drawn from
10 times 0.4 previous + 0.2 first + 0.4 overlap of pairs of letters, whose rows sum to 1 as the others' do, where a
word shares any (in a first run they did not: rows of the overlap summed to 0.05, so that readers hardly followed it,
and resemblance was 0.079 against 0.033). Resemblance: R2 of their saccades on four heads that attend by that overlap,
each with its own noise, against the same numbers shuffled within each word's row; then once more of what trivial
patterns leave of both. Gao et al., 2023, arXiv 2310.19084.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glocal.bench.bytes import bits_per_byte, library_source, train_bytes
from glocal.inspect import (
    bigram_overlap,
    fit_trivial,
    human_resemblance,
    noise_ceiling,
    part_divergence,
    record,
    simulated_readers,
    trivial_patterns,
    trivial_reliance,
    word_attention,
    word_ids,
)
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention
from glocal.nn.rope import Rope
from glocal.papers.verdict import verdict

LINES, WORDS, LENGTH, HEADS, READERS, LOOKS = 120, (5, 20), 128, 4, 40, 10.0
MIXED = 0.8


def model(dim: int, depth: int, steps: int, seed: int) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(256, dim, [lambda dim: Attention(dim, HEADS, causal=True, rope=Rope())] * depth)
    train_bytes(made, length=LENGTH, batch=16, steps=steps, seed=seed)
    return made


def lines() -> list[str]:
    """Of unseen modules, in ASCII, evenly spread."""
    text = bytes(library_source()[1].tolist()).decode("ascii", "ignore")
    fit = [line.strip() for line in dict.fromkeys(text.split("\n"))]
    fit = [line for line in fit if WORDS[0] <= len(line.split()) <= WORDS[1] and len(line) < LENGTH]
    return fit[:: len(fit) // LINES][:LINES]


def words_of(made: Transformer, text: list[str]) -> list[Tensor]:
    """Attention between words; each line stands behind a line break, as its begin token."""
    tokens = torch.zeros(len(text), LENGTH, dtype=torch.long)
    of = torch.full((len(text), LENGTH), -1)
    for n, line in enumerate(text):
        raw = "\n" + line
        tokens[n, : len(raw)] = torch.tensor(list(raw.encode()))
        of[n, : len(raw)] = word_ids(list(raw), line.split())
    return word_attention(record(made, tokens), of)


def shuffled(maps: Tensor, lengths: Tensor, draw: torch.Generator) -> Tensor:
    """Each word's numbers in another order, within the lower triangle."""
    out = maps.clone()
    for b, n in enumerate(lengths.tolist()):
        for i in range(n):
            out[b, :, i, : i + 1] = maps[b, :, i, torch.randperm(i + 1, generator=draw)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = lines()
    lengths = torch.tensor([len(line.split()) for line in text])
    count = int(lengths.max())

    reliance, maps = {}, {}
    for name, dim, depth in (("small", 32, 2), ("large", 96, 4)):
        made = model(dim, depth, options.steps, 0)
        maps[name] = words_of(made, text)
        reliance[name] = trivial_reliance(maps[name], lengths)
        print(f"{name}: {dim} channels, {depth} layers, {bits_per_byte(made):.2f} bits a byte", flush=True)
    habit = trivial_patterns(count).mean(0)
    maps["planted"] = [MIXED * habit + (1 - MIXED) * layer for layer in maps["large"]]
    reliance["planted"] = trivial_reliance(maps["planted"], lengths)
    for name, each in reliance.items():
        print(f"{name:<10} reliance {float(each.mean()):.3f}, by layer {', '.join(f'{x:.3f}' for x in each.tolist())}")
    apart = part_divergence(maps["small"], maps["large"], 2).mean(1).tolist()
    print(f"small against large: Jensen-Shannon by halves of the depth {apart[0]:.4f}, {apart[1]:.4f} nats", flush=True)

    draw = torch.Generator().manual_seed(0)
    overlap = torch.zeros(len(text), count, count, dtype=torch.float64)
    for b, line in enumerate(text):
        n = len(line.split())
        overlap[b, :n, :n] = bigram_overlap(line.split())
    overlap = overlap / overlap.sum(-1, keepdim=True).clamp(min=1e-9)
    _, previous, first = trivial_patterns(count)
    people = simulated_readers(LOOKS * (0.4 * previous + 0.2 * first + 0.4 * overlap), lengths, READERS, draw).counts
    noise = torch.randn(len(text), HEADS, count, count, generator=draw, dtype=torch.float64)
    scores = 8 * overlap[:, None] + noise
    aware = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
    other = shuffled(aware, lengths, draw)
    ceiling = float(noise_ceiling(people, lengths).mean())
    found: dict[str, tuple[float, float]] = {}
    rest = fit_trivial(people.transpose(0, 1), lengths).residual.transpose(0, 1)
    judged = {"aware": aware, "shuffled": other, "small": maps["small"][-1], "large": maps["large"][-1]}
    for name, heads in judged.items():
        left = fit_trivial(heads, lengths).residual
        found[name] = human_resemblance([heads], people, lengths).score, human_resemblance([left], rest, lengths).score
        print(f"{name:<10} resemblance {found[name][0]:.3f}, of what trivial patterns leave {found[name][1]:.3f}")
    print(f"noise ceiling {ceiling:.3f}; without trivial patterns {float(noise_ceiling(rest, lengths).mean()):.3f}")

    mean = {name: float(each.mean()) for name, each in reliance.items()}
    (whole, effective), (chance, chance_left) = found["aware"], found["shuffled"]
    verdict(
        "model-human-attention",
        f"trivial patterns explain {mean['small']:.2f} of the small model's attention, {mean['large']:.2f} of the "
        f"large one's, {mean['planted']:.2f} where they are planted; R2 of readers {whole:.2f} by attention to like "
        f"words, shuffled {chance:.2f}, without trivial patterns {effective:.2f} and {chance_left:.2f}, "
        f"ceiling {ceiling:.2f}",
        mean["planted"] >= max(mean["small"], mean["large"]) + 0.2
        and whole >= chance + 0.1
        and effective > chance_left,
    )


if __name__ == "__main__":
    main()
