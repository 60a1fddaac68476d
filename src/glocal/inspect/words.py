"""Attention between words instead of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from glocal.inspect.recording import Record
from glocal.shapes import Float

__all__ = ["merge_words", "word_attention", "word_ids"]


def word_ids(tokens: Sequence[str], words: Sequence[str], *, start: int = 1, marks: str = "▁Ġ") -> Tensor:
    """Which word each token is part of, found by putting tokens' texts together until they make up the next word.

    Where a tokenizer tells it (``BatchEncoding.word_ids`` of transformers), take that; None is -1 here.

    Args:
        tokens: texts, as ``tokenizer.convert_ids_to_tokens`` or a decoder gives them.
        words: of the sentence, in order.
        start: tokens before it are of no word: the begin token, and an instruction where there is one.
        marks: characters that stand for spaces; they and white space are left out.

    Returns:
        Integers ``(N,)``, -1 for tokens of no word: those before ``start`` and those after the last word.

    Raises:
        ValueError: texts that do not make up the words, as where the tokenizer changes characters; the message says at
            which word.

    >>> word_ids(["<s>", "▁Eye", "s", "▁jump", "."], ["Eyes", "jump."]).tolist()
    [-1, 0, 0, 1, 1]
    """
    if not 0 <= start <= len(tokens):
        raise ValueError(f"start must be from 0 to the {len(tokens)} tokens; it was {start}")
    found, at = [-1] * len(tokens), start
    for number, word in enumerate(words):
        text = ""
        while text != word:
            if at == len(tokens) or not word.startswith(text):
                raise ValueError(f"tokens must make up the words; for word {number}, {word!r}, they gave {text!r}")
            text += "".join("" if c in marks or c.isspace() else c for c in tokens[at])
            found[at] = number
            at += 1
    return torch.tensor(found, dtype=torch.long)


def _one_hot(words: Tensor, batch: int, count: int) -> Tensor:
    """Which word a token is of, ``(B, N, n)`` in float64; zeros for tokens of none."""
    if words.is_floating_point() or words.dim() not in (1, 2) or words.shape[-1] != count:
        raise ValueError(f"words must be integers ({batch}, {count}); it was {words.dtype} {tuple(words.shape)}")
    if words.dim() == 2 and len(words) not in (1, batch):
        raise ValueError(f"words must be of {batch} sentences; it was {tuple(words.shape)}")
    if int(words.min()) < -1 or int(words.max()) < 0:
        raise ValueError(f"words must be from -1, some above it; they went from {int(words.min())} to {words.max()}")
    return one_hot(words + 1, int(words.max()) + 2)[..., 1:].double().expand(batch, -1, -1)


def _mean(of: Tensor) -> Tensor:
    """What each token counts in the mean over its word, ``(B, N, n)``."""
    return of / of.sum(1, keepdim=True).clamp(min=1)


def _merged(mean: Tensor, weights: Tensor, of: Tensor) -> Tensor:
    """Rows of weights, ``(B, H, R, N)``, to what they add to words, ``(B, H, n, n)``."""
    return mean[:, None].mT @ (weights.double() @ of[:, None])


@torch.no_grad()
def merge_words(weights: Float[Tensor, "B H N N"], words: Tensor) -> Float[Tensor, "B H n n"]:
    """Attention between words: the sum over a word's tokens as keys, the mean over them as queries.

    Gao et al., 2023, arXiv 2310.19084. Rows do not sum to 1 where some of the attention went to tokens of no word.

    Args:
        weights: after the softmax, queries by keys, ``(B, H, N, N)``.
        words: number of each token's word, -1 for tokens of none, ``(B, N)``, or ``(N,)`` for all alike.

    Returns:
        ``(B, H, n, n)`` in float64; ``n`` is the longest sentence, shorter ones end with zeros.

    Raises:
        ValueError: shapes that do not fit each other, or words below -1.

    >>> weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.2, 0.6]])
    >>> merge_words(weights[None, None], torch.tensor([0, 1, 1])).tolist()
    [[[[1.0, 0.0], [0.35..., 0.65...]]]]
    """
    if weights.dim() != 4 or weights.shape[2] != weights.shape[3]:
        raise ValueError(f"weights must be (B, H, N, N); it was {tuple(weights.shape)}")
    of = _one_hot(words.to(weights.device), len(weights), weights.shape[-1])
    return _merged(_mean(of), weights, of)


@torch.no_grad()
def word_attention(record: Record, words: Tensor) -> list[Tensor]:
    """Attention between words of all layers of a record, as `merge_words`, without a map between all tokens.

    Args:
        record: with attention, of self-attention over sequences.
        words: as in `merge_words`.

    Returns:
        ``(B, H, n, n)`` in float64 for each layer.

    Raises:
        ValueError: layers that attend to another sequence or over a grid, or words as in `merge_words`.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> found = record(Attention(8, 2, causal=True, scale=0.0), torch.randn(1, 5, 8))
    >>> word_attention(found, torch.tensor([-1, 0, 0, 1, 1]))[0][0, 0].round(decimals=3).tolist()
    [[0.583, 0.0], [0.45, 0.325]]
    """
    found = []
    for layer in record:
        if layer.cross or layer.queries != layer.keys or len(layer.grid_k) != 1:
            raise ValueError(f"record must be of self-attention over a sequence; {layer.name!r} is not")
        batch, heads = layer.q.shape[:2]
        of = _one_hot(words.to(layer.q.device), batch, layer.keys)
        mean = _mean(of)
        total = of.new_zeros(batch, heads, of.shape[-1], of.shape[-1])
        for tile in layer.tiles():
            total += _merged(mean[:, tile.rows], tile.weights, of)
        found.append(total)
    return found
