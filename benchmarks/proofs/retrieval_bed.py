"""The test beds of the proofs about retrieval: a tiny Llama that looks values up.

TB2: a token for each pair, the sum of its key's and its value's embedding, then questions, a key's embedding plus that
of asking; the answer to each is the key's value. Keys do not repeat. Tagged: each key stands there twice, once tagged
T and once U, with different values; a question may say which of the two, or not, and then either is right.

Training takes under a minute; weights are kept in ``build/beds``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bed import fit, kept, tiny_llama
from torch import Tensor, nn

KEYS, VALUES, QUESTIONS = 40, 16, 4
VALUE, ASK = KEYS, KEYS + VALUES  # the first value, and asking
TAG, CUE, VOCAB = ASK + 1, ASK + 3, ASK + 6  # tags T and U; cues none, T and U
EITHER, T, U = range(3)


@dataclass
class Lookups:
    """Pairs ``key``, ``value`` and ``tag (B, n)``; questions ``asked``, ``cue``, ``answer (B, q)``, ``at``: which pair.

    ``tag`` is 0 for T, 1 for U, and None where pairs have none; keys and values are numbers from 0.
    """

    key: Tensor
    value: Tensor
    asked: Tensor
    at: Tensor
    answer: Tensor
    tag: Tensor | None = None
    cue: Tensor | None = None


def lookups(count: int, pairs: int, draw: torch.Generator, questions: int = QUESTIONS) -> Lookups:
    """TB2: pairs of different keys, and questions about some of them."""
    key = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :pairs]
    value = torch.randint(VALUES, (count, pairs), generator=draw)
    at = torch.randint(pairs, (count, questions), generator=draw)
    return Lookups(key, value, key.gather(1, at), at, value.gather(1, at))


def tagged(count: int, keys: int, draw: torch.Generator, cue: int | None = None, questions: int = QUESTIONS) -> Lookups:
    """The tagged bed: each key twice; cues as given, or half of them none and the others T or U."""
    which = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :keys]
    value = torch.rand(count, keys, VALUES, generator=draw).argsort(2)[:, :, :2].flatten(1)  # two different ones
    key, tag = which.repeat_interleave(2, 1), torch.tensor([0, 1]).repeat(keys).expand(count, -1)
    order = torch.rand(count, 2 * keys, generator=draw).argsort(1)
    key, value, tag = (each.gather(1, order) for each in (key, value, tag))
    asked = which.gather(1, torch.randint(keys, (count, questions), generator=draw))
    cues = torch.randint(1, 3, asked.shape, generator=draw)
    cues = torch.where(torch.rand(asked.shape, generator=draw) < 0.5, EITHER, cues)
    cues = cues if cue is None else torch.full_like(cues, cue)
    wanted = torch.where(cues == EITHER, torch.randint(2, asked.shape, generator=draw), cues - 1)
    at = ((key[:, None] == asked[..., None]) & (tag[:, None] == wanted[..., None])).long().argmax(2)
    return Lookups(key, value, asked, at, value.gather(1, at), tag, cues)


class Retrieval(nn.Module):
    """A Llama of two layers and 64 channels."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.model = tiny_llama(VOCAB, 2, heads=heads, positions=4096)

    def embed(self, seen: Lookups) -> Tensor:
        """Prompts ``(B, n + q, 64)``."""
        words = self.model.get_input_embeddings()
        pairs, asked = words(seen.key) + words(seen.value + VALUE), words(seen.asked) + words.weight[ASK]
        if seen.tag is not None and seen.cue is not None:
            pairs, asked = pairs + words(seen.tag + TAG), asked + words(seen.cue + CUE)
        return torch.cat([pairs, asked], 1)

    def loss(self, seen: Lookups) -> Tensor:
        """Of all answers."""
        logits = self.model(inputs_embeds=self.embed(seen), use_cache=False).logits
        return F.cross_entropy(logits[:, seen.key.shape[1] :].flatten(0, 1), seen.answer.flatten() + VALUE)


def train(bed: Retrieval, batch: Callable[[torch.Generator], Lookups], steps: int) -> Retrieval:
    """Steps of `fit`."""
    draw = torch.Generator().manual_seed(0)
    return fit(bed, lambda: bed.loss(batch(draw)), steps)


def _some(low: int, high: int, draw: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=draw))


def plain_bed(steps: int = 400) -> Retrieval:
    """TB2, trained on 2 to 16 pairs: two heads of 32, base 10000."""
    return kept(
        "tb2", lambda: Retrieval(2), lambda bed: train(bed, lambda draw: lookups(64, _some(2, 16, draw), draw), steps)
    )


def tagged_bed(steps: int = 1200) -> Retrieval:
    """Tagged TB2, trained on 2 to 8 keys: four heads of 16."""
    return kept(
        "tb2_tagged",
        lambda: Retrieval(4),
        lambda bed: train(bed, lambda draw: tagged(64, _some(2, 8, draw), draw), steps),
    )


@torch.no_grad()
def right(bed: Retrieval, seen: Lookups) -> float:
    """Share of right answers."""
    found = bed.model(inputs_embeds=bed.embed(seen), use_cache=False).logits[:, seen.key.shape[1] :].argmax(-1)
    return float((found == seen.answer + VALUE).double().mean())


def main() -> None:
    draw = torch.Generator().manual_seed(99)
    bed = plain_bed()
    print(
        "TB2, share of right answers by pairs:",
        *(f"{n}: {right(bed, lookups(500, n, draw)):.3f}" for n in (2, 8, 16, 32)),
    )
    bed = tagged_bed()
    for name, cue in (("T", T), ("U", U), ("either", EITHER)):
        print(f"tagged, cue {name}: {right(bed, tagged(500, 8, draw, cue)):.3f}")


if __name__ == "__main__":
    main()
