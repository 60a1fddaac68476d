"""TB3: a small language model of text in which one token decides what the next twelve can be.

A text is a start token and four sentences; a sentence is a topic and four words of three letters, drawn from the four
words of that topic. Words of different topics share letters, so that only the topic tells which letter can follow.

Training takes half a minute; weights are kept in ``build/beds``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bed import fit, kept, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

TOPICS, WORDS, LETTERS, CHARS = 8, 4, 8, 3  # words a topic; letters there are; letters of a word
START, TOPIC, LETTER = 0, 1, 1 + TOPICS  # tokens: start, first topic, first letter
VOCAB = LETTER + LETTERS
SENTENCES, SAID = 4, 4  # of a text; words of a sentence
SENTENCE = 1 + SAID * CHARS
LENGTH = 1 + SENTENCES * SENTENCE


def lexicon() -> Tensor:
    """Letters of each topic's words, ``(topics, words, 3)``; no word belongs to two topics."""
    draw = torch.Generator().manual_seed(3)
    every = torch.cartesian_prod(*[torch.arange(LETTERS)] * CHARS)
    chosen = every[torch.randperm(len(every), generator=draw)[: TOPICS * WORDS]]
    return chosen.view(TOPICS, WORDS, CHARS) + LETTER


def texts(count: int, draw: torch.Generator) -> Tensor:
    """``(count, 53)``."""
    topics = torch.randint(TOPICS, (count, SENTENCES), generator=draw)
    words = torch.randint(WORDS, (count, SENTENCES, SAID), generator=draw)
    letters = lexicon()[topics[..., None], words].flatten(2)
    sentences = torch.cat([topics[..., None] + TOPIC, letters], 2).flatten(1)
    return F.pad(sentences, (1, 0), value=START)


def topic_places() -> Tensor:
    """Positions of the topics of a text, ``(4,)``."""
    return 1 + torch.arange(SENTENCES) * SENTENCE


def words_of(letters: Tensor) -> list[tuple[int, ...]]:
    """The words of letters ``(3 n,)``."""
    return [tuple(word) for word in letters.view(-1, CHARS).tolist()]


def in_topic(sentences: Tensor, topic: int) -> Tensor:
    """How many of the words after the topics of sentences ``(B, 13)`` belong to a topic, ``(B,)``."""
    said = sentences[:, 1:].view(len(sentences), SAID, 1, CHARS)
    return (said == lexicon()[topic].to(said.device)).all(-1).any(-1).sum(1)


def new_model() -> LlamaForCausalLM:
    """Three layers of 64 with four heads, random weights."""
    return tiny_llama(VOCAB, 3)


def train(model: LlamaForCausalLM, steps: int = 500, seed: int = 0) -> LlamaForCausalLM:
    """64 texts a step."""
    draw = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        ids = texts(64, draw)
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    return fit(model, loss, steps)


def text_bed() -> LlamaForCausalLM:
    """TB3, trained."""
    return kept("tb3", new_model, train)


@torch.no_grad()
def obeyed(model: LlamaForCausalLM, count: int = 200) -> float:
    """Share of words of sampled sentences that belong to the sentence's topic."""
    torch.manual_seed(1)
    start = torch.full((count, 1), START)
    said = model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=SENTENCE, do_sample=True, top_k=0
    )[:, 1:]
    right = [int(in_topic(row[None], int(row[0]) - TOPIC)) for row in said if TOPIC <= int(row[0]) < LETTER]
    return sum(right) / (SAID * count)


def main() -> None:
    draw = torch.Generator().manual_seed(99)
    model = text_bed()
    ids = texts(500, draw)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    least = (
        SENTENCES * (torch.log(torch.tensor(float(TOPICS))) + SAID * torch.log(torch.tensor(float(WORDS)))) / 52
    ).item()
    print(f"TB3: loss {loss:.4f} nats a token, at least {least:.4f}; words of their topic {obeyed(model):.3f}")


if __name__ == "__main__":
    main()
