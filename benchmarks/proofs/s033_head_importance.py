"""Do gradients of gates tell which heads a trained model can go without?

    python benchmarks/proofs/s033_head_importance.py [--orders 10]

A vision transformer of 3 layers of 8 heads learns scikit-learn's digits. Its heads are masked in the order of their
importance, in the reverse order and in random ones, up to 80 % of them. Wanted: the mean accuracy over 20 to 60 % is
0.05 above that of random orders, and the reverse order is worst. The model with heads removed for good must say what
the masked one says. Then, as figures only: how many heads can go at 1 % loss in MiniLM, of the cosine with its own
embeddings, and in the byte model that glocal ships, of the bits per byte of held-out text; normalised by layer or not.
Michel et al., 2019, arXiv 1905.10650.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable

import torch
import vit_bed
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from glocal.bench import encoder, text
from glocal.bench.corpus import python_source, to_ids
from glocal.hf import byte_llama
from glocal.inspect import head_importance, masked_heads, prune_heads, prune_order, pruning_curve
from glocal.papers.verdict import verdict

SHARES = (0.2, 0.4, 0.5, 0.6, 0.8)
Order = list[tuple[int, int]]


def on_digits(orders: int) -> tuple[dict[str, list[float]], float, float]:
    """Accuracies by order, of the whole network, and how far removing is from masking."""
    model, (x, y) = vit_bed.bed(), vit_bed.images()
    held, labels = x[vit_bed.TRAIN :], y[vit_bed.TRAIN :]
    batches = list(zip(x[: vit_bed.TRAIN].split(100), y[: vit_bed.TRAIN].split(100), strict=True))
    found = head_importance(model, batches, lambda net, batch: cross_entropy(net(batch[0]).logits, batch[1]))
    order = prune_order(found)
    counts = [math.floor(share * len(order)) for share in SHARES]

    def curve(order: Order) -> list[float]:
        return pruning_curve(model, order, lambda net: vit_bed.accuracy(net, held, labels), counts)

    generator = torch.Generator().manual_seed(0)
    shuffled = [[order[n] for n in torch.randperm(len(order), generator=generator).tolist()] for _ in range(orders)]
    chance = torch.tensor([curve(each) for each in shuffled]).mean(0).tolist()
    curves = {"importance": curve(order), "random": chance, "reverse": curve(order[::-1])}
    smaller, gone = copy.deepcopy(model), order[: len(order) // 2]
    prune_heads(smaller, gone)
    with torch.no_grad(), masked_heads(model, gone):
        apart = float((smaller(held).logits - model(held).logits).abs().max())
    print(f"half of the heads removed: {model.num_parameters():,} to {smaller.num_parameters():,} parameters")
    return curves, vit_bed.accuracy(model, held, labels), apart


def can_go(model: nn.Module, order: Order, lost: Callable[[nn.Module], float]) -> float:
    """The share of the heads that can be masked, one after the other, until more than 1 % is lost."""
    for count in range(1, len(order) + 1):
        if pruning_curve(model, order, lost, [count])[0] > 0.01:
            return (count - 1) / len(order)
    return 1.0


def on_minilm() -> dict[str, float]:
    model = encoder.load()
    passages = [" ".join(passage.split()[:40]) for passage in text.from_library(96)]
    batches = [ids for _, ids in encoder.batches(model, passages)]
    learn, held = batches[::2], batches[1::2]

    def embed(net: nn.Module, ids: Tensor) -> Tensor:
        states: Tensor = net(input_ids=ids).last_hidden_state
        return states.mean(1)

    with torch.no_grad():
        whole = [embed(model.model, ids) for ids in held]
    generator = torch.Generator().manual_seed(0)

    def loss(net: nn.Module, ids: Tensor) -> Tensor:
        """A move in a random direction: the cosine with the embedding as it is has no gradient."""
        found = normalize(embed(net, ids), dim=-1)
        return (found * torch.randn(found.shape, generator=generator)).sum()

    def lost(net: nn.Module) -> float:
        with torch.no_grad():
            pairs = zip(held, whole, strict=True)
            return 1 - float(torch.cat([cosine_similarity(embed(net, ids), own) for ids, own in pairs]).mean())

    return both(model.model, learn, loss, lost)


def on_bytes() -> dict[str, float]:
    model = byte_llama()
    learn = list(to_ids(python_source()[: 16 * 256]).view(16, 256).split(4))
    source = python_source(held_out=True)
    held = to_ids(torch.stack([source[at : at + 256] for at in range(0, 256 * 2000, 256 * 125)]))

    def loss(net: nn.Module, ids: Tensor) -> Tensor:
        return cross_entropy(net(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def bits(net: nn.Module) -> float:
        with torch.no_grad():
            return float(loss(net, held)) / math.log(2)

    whole = bits(model)
    print(f"byte model: {whole:.3f} bits per byte")
    return both(model, learn, loss, lambda net: bits(net) / whole - 1)


def both(
    model: nn.Module, batches: list[Tensor], loss: Callable[..., Tensor], lost: Callable[[nn.Module], float]
) -> dict[str, float]:
    """Shares that can go, normalised by layer or not."""
    found = {}
    for name, by_layer in (("normalised", True), ("raw", False)):
        order = prune_order(head_importance(model, batches, loss, abs_level="example", normalize_by_layer=by_layer))
        found[name] = can_go(model, order, lost)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--orders", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves, base, apart = on_digits(arguments.orders)
    print(f"accuracy {base:.3f} with all heads; masked:" + "".join(f"{share:>8.0%}" for share in SHARES))
    for name, values in curves.items():
        print(f"{name:<35}" + "".join(f"{value:>8.3f}" for value in values), flush=True)
    mean = {name: sum(values[:4]) / 4 for name, values in curves.items()}
    encoders, decoders = on_minilm(), on_bytes()
    for name, found in (("MiniLM", encoders), ("byte model", decoders)):
        print(f"{name}: heads that can go at 1 % loss: " + ", ".join(f"{k} {v:.0%}" for k, v in found.items()))
    verdict(
        "head-importance",
        f"accuracy over 20 to 60 % of the heads masked {mean['importance']:.3f} by importance, {mean['random']:.3f} at "
        f"random, {mean['reverse']:.3f} in reverse (all heads {base:.3f}); removed against masked {apart:.0e}; at 1 % "
        f"loss {encoders['normalised']:.0%} of MiniLM's heads can go ({encoders['raw']:.0%} unnormalised), "
        f"{decoders['normalised']:.0%} of the byte model's ({decoders['raw']:.0%})",
        mean["importance"] - mean["random"] >= 0.05 and mean["reverse"] == min(mean.values()) and apart < 1e-4,
    )


if __name__ == "__main__":
    main()
