"""Does an attribution that follows a whole encoder layer agree with the gradient better than one that stops earlier?

    python benchmarks/proofs/s053_globenc.py [--seeds 2] [--steps 800]

A BERT of 3 layers reads 16 tokens, 5 of them keywords, and says whether most of these are good or bad. Of held-out
sentences, the class token's row of each rollout is ranked against the gradient of the predicted logit times the input
(Spearman). The same on the encoder MiniLM, of the dot product of the pooled embedding with itself held fixed. Wanted on
both: N-Enc above W and above N by 0.1, and at least N-Res. Modarressi et al., 2022, arXiv 2205.03286.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from glocal.bench import encoder, text
from glocal.inspect import ATTRIBUTIONS, attribution_rollout, gradient_times_input, layer_attributions
from glocal.papers.verdict import verdict

WORDS, KEYWORDS, LENGTH, SHOWN = 60, 20, 16, 5  # word 0 is the class token, then keywords, half of them good
HELD = 200

Figures = dict[str, list[float]]


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class token and words, and whether most keywords are good."""
    ids = torch.randint(1 + KEYWORDS, WORDS, (count, LENGTH), generator=generator)
    places = torch.rand(count, LENGTH, generator=generator).argsort(1)[:, :SHOWN]
    keys = torch.randint(1, 1 + KEYWORDS, (count, SHOWN), generator=generator)
    ids.scatter_(1, places, keys)
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), ids], 1), ((keys <= KEYWORDS // 2).sum(1) > 2).long()


def trained(seed: int, steps: int) -> tuple[Any, Tensor, float]:
    """The classifier, held-out sentences, and the accuracy on them."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=WORDS)
    drops = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(BertConfig(**sizes, **drops, max_position_embeddings=32, pad_token_id=None))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        ids, labels = sentences(64, generator)
        optimiser.zero_grad()
        cross_entropy(model(input_ids=ids).logits, labels).backward()
        optimiser.step()
    model.eval()
    ids, labels = sentences(HELD, generator)
    with torch.no_grad():
        right = float((model(input_ids=ids).logits.argmax(1) == labels).double().mean())
    return model, ids, right


def ranks(model: Any, ids: Tensor, objective: Callable[[Any], Tensor], query: Tensor | int) -> Figures:
    """Spearman's correlation of each rollout with the gradient, sentence by sentence."""
    wanted = gradient_times_input(model, {"input_ids": ids}, objective)
    layers = layer_attributions(model, {"input_ids": ids})
    found: Figures = {}
    for kind in ATTRIBUTIONS:
        rows = attribution_rollout(layers, query, kind)
        found[kind] = [float(spearmanr(a, b).statistic) for a, b in zip(rows, wanted, strict=True)]
    return found


def on_minilm(passages: int) -> Figures:
    model = encoder.load()
    cut = [" ".join(passage.split()[:30]) for passage in text.from_library(passages)]
    found: Figures = {kind: [] for kind in ATTRIBUTIONS}

    def objective(output: Any) -> Tensor:
        pooled = output.last_hidden_state.mean(1)
        return (pooled * pooled.detach()).sum()

    for _, ids in encoder.batches(model, cut):
        even = torch.full(ids.shape, 1 / ids.shape[1])
        for kind, values in ranks(model.model, ids, objective, even).items():
            found[kind] += values
    return found


def mean(values: list[float]) -> float:
    return float(torch.tensor(values).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--passages", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'Spearman':<24}" + "".join(f"{kind:>12}" for kind in ATTRIBUTIONS))
    columns: list[dict[str, float]] = []

    def show(name: str, figures: Figures) -> None:
        columns.append({kind: mean(values) for kind, values in figures.items()})
        spread = [float(torch.tensor(values).std()) for values in figures.values()]
        cells = zip(columns[-1].values(), spread, strict=True)
        print(f"{name:<24}" + "".join(f"{m:>7.2f} ±{s:.2f}" for m, s in cells), flush=True)

    for seed in range(arguments.seeds):
        model, ids, right = trained(seed, arguments.steps)
        show(f"seed {seed}, accuracy {right:.3f}", ranks(model, ids, lambda out: out.logits.amax(1).sum(), 0))
    show("MiniLM", on_minilm(arguments.passages))
    toy = {kind: mean([column[kind] for column in columns[:-1]]) for kind in ATTRIBUTIONS}
    real = columns[-1]

    def holds(rho: dict[str, float]) -> bool:
        return rho["N-Enc"] - max(rho["W"], rho["N"]) >= 0.1 and rho["N-Enc"] >= rho["N-Res"]

    named = ("W", "N", "N-Res", "N-ResLN", "N-Enc", "W-FixedRes")
    finding = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {rho[kind]:.2f}" for kind in named) + ("" if holds(rho) else " (not)")
        for name, rho in (("keywords", toy), ("MiniLM", real))
    )
    verdict("globenc", f"Spearman with gradient times input, {finding}", holds(toy) and holds(real))


if __name__ == "__main__":
    main()
