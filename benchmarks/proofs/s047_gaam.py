"""Do Gaussian gates on frozen features do what an attention head on them does, and do they say which features count?

    python benchmarks/proofs/s047_gaam.py [--seeds 3] [--steps 300]

MiniLM's token features of lines of the standard library, comments or code with what a comment starts with taken off,
each line's features times a random gain. A linear map of the mean, the same after a Gaussian gate, and after a layer
of self-attention. Accuracy on held-out lines; then without the quarter of the features that the gate finds most
important, and without the least important quarter. Ioannides et al., 2024, arXiv 2401.11143.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from bed import fit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glocal.bench.encoder import Encoder, load
from glocal.models.language.gaussian import GaussianClassifier
from glocal.nn import Attention
from glocal.papers.verdict import verdict

LINES, LENGTH, BATCH = 3000, 16, 64


def lines() -> list[tuple[str, int]]:
    """Lines of the standard library and whether each is a comment; as many of both."""
    found: tuple[set[str], set[str]] = (set(), set())
    for path in sorted(Path(random.__file__).parent.glob("*.py")):
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            text = line.strip()
            comment = text.startswith("# ")
            text = text.lstrip("# ")
            if len(text) > 20 and "#" not in text and not text.startswith(('"', "'")):
                found[comment].add(text)
    draw = random.Random(0)
    picked = [(text, kind) for kind in (0, 1) for text in draw.sample(sorted(found[kind]), LINES // 2)]
    draw.shuffle(picked)
    return picked


class Pooled(nn.Module):
    """A linear map of the mean of what tokens become."""

    def __init__(self, dim: int, attention: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, 6) if attention else None
        self.head = nn.Linear(dim, 2)

    def forward(self, features: Tensor, real: Tensor) -> Tensor:
        x = features[:, 0]
        if self.attention is not None:
            x = x + self.attention(x, keys=real)
        shown = real[..., None].to(x.dtype)
        out: Tensor = self.head((x * shown).sum(1) / shown.sum(1))
        return out


def featured(encoder: Encoder, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Features ``(B, 1, N, C)`` and which tokens are real."""
    reader = GaussianClassifier(encoder.model, 2)
    for at in range(0, len(texts), 100):
        made = encoder.tokenizer(
            texts[at : at + 100], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        real = made["attention_mask"].bool()
        yield reader.features(made["input_ids"], real), real


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder, picked = load(), lines()
    features, real = (torch.cat(t) for t in zip(*featured(encoder, [text for text, _ in picked]), strict=True))
    gain = torch.empty(len(picked), 1, 1, 1).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).exp()
    features, labels = gain * features, torch.tensor([kind for _, kind in picked])
    dim, cut = features.shape[-1], len(picked) // 3

    ways = {
        "linear": lambda: Pooled(dim, False),
        "gate": lambda: GaussianClassifier(encoder.model, 2, num_heads=1, num_gaussians=2),
        "attention": lambda: Pooled(dim, True),
    }
    accuracy: dict[str, list[float]] = {name: [] for name in [*ways, "without most", "without least"]}
    sizes = {}

    @torch.no_grad()
    def score(model: nn.Module, keep: Tensor) -> float:
        model.eval()
        held = zip(features[:cut].split(100), real[:cut].split(100), strict=True)
        found = torch.cat([model(part * keep, shown).argmax(-1) for part, shown in held])
        return float((found == labels[:cut]).float().mean())

    for seed in range(args.seeds):
        for name, make in ways.items():
            torch.manual_seed(seed)
            draw, model = torch.Generator().manual_seed(seed), make()
            assert isinstance(model, GaussianClassifier | Pooled)
            gates = model.block if isinstance(model, GaussianClassifier) else model.attention
            sizes[name] = 0 if gates is None else sum(p.numel() for p in gates.parameters())

            def loss(model: nn.Module = model, draw: torch.Generator = draw) -> Tensor:
                some = cut + torch.randint(len(labels) - cut, (BATCH,), generator=draw)
                return cross_entropy(model(features[some], real[some]), labels[some])

            fit(model, loss, args.steps)
            accuracy[name].append(score(model, torch.ones(dim)))
            if isinstance(model, GaussianClassifier):
                order = model.importance(features[cut : cut + 500]).argsort()
                for kind, out in (("without most", order[-dim // 4 :]), ("without least", order[: dim // 4])):
                    accuracy[kind].append(score(model, torch.ones(dim).index_fill(0, out, 0.0)))
    mean = {name: sum(each) / len(each) for name, each in accuracy.items()}
    print(f"{'head':<15}{'parameters':>11}{'accuracy':>10}   each seed's")
    for name, each in accuracy.items():
        print(f"{name:<15}{sizes.get(name, ''):>11}{mean[name]:>10.4f}   {'  '.join(f'{a:.4f}' for a in each)}")
    verdict(
        "gaam",
        f"comments told from code by MiniLM's features: linear {mean['linear']:.4f}, with a gate of {sizes['gate']} "
        f"numbers {mean['gate']:.4f}, with attention of {sizes['attention']:,} {mean['attention']:.4f}; without the "
        f"quarter of features that weigh most {mean['without most']:.4f}, least {mean['without least']:.4f}",
        mean["gate"] >= mean["linear"] - 0.005
        and sizes["gate"] < 0.01 * sizes["attention"]
        and mean["without most"] < mean["without least"],
    )


if __name__ == "__main__":
    main()
