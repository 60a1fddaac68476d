"""Can it find what stands far back: a needle in held-out text, and a span that comes a second time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.bench.decoder import Decoder, forced, greedy, rows_at_once

__all__ = ["DEPTHS", "Copies", "Needles", "copies", "copy_right", "needles", "needles_right"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
"""Where a needle is put, as shares of the text."""
_CHARACTERS = 5
_NAME = "secret_key_17"
_LEAD = 8  # tokens of a copied span that are not counted: they say where to look


@dataclass(frozen=True)
class Needles:
    """Prompts ``(depths * texts, N)``, depths outermost, the question ``(rows, M)`` and the values to find."""

    prompt: Tensor
    query: Tensor
    values: tuple[str, ...]


@dataclass(frozen=True)
class Copies:
    """Rows ``ids (distances * texts, N)``, distances outermost: the last ``span`` tokens stand earlier too."""

    ids: Tensor
    span: int
    distances: tuple[int, ...]


def needles(decoder: Decoder, pieces: Tensor, count: int, seed: int = 0) -> Needles:
    """A line ``secret_key_17 = "..."`` at each of `DEPTHS` in ``count`` pieces ``(P, N)``, and the question at the end.

    Rows have the pieces' length, with the question and the tokens of an answer.

    Raises:
        ValueError: pieces too short to hold a needle and the question.
    """
    draw = random.Random(seed)
    query = decoder.ids(f'\n{_NAME} = "')
    length, prompts, values = pieces.shape[1], [], []
    skip = 0 if decoder.start is None else 1
    for depth in DEPTHS:
        for n in range(count):
            value = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=_CHARACTERS))
            needle = decoder.ids(f'\n{_NAME} = "{value}"\n')
            row = pieces[n % len(pieces)].tolist()
            room = length - len(query) - _CHARACTERS - len(needle)
            if room < skip + 1:
                raise ValueError(f"{length} tokens are too few for a needle of {len(needle)} and its question")
            at = skip + round(depth * (room - skip))
            prompts.append(row[:at] + needle + row[at:room])
            values.append(value)
    return Needles(torch.tensor(prompts), torch.tensor([query] * len(prompts)), tuple(values))


def needles_right(
    decoder: Decoder, probe: Needles, new_cache: Callable[[], Any], by_token: bool, step: Callable[[], None]
) -> tuple[float, ...]:
    """For each depth, the share of the value's characters that greedy decoding gets right, each at its place."""
    right = []
    size = rows_at_once(decoder, probe.prompt.shape[1])
    for at in range(0, len(probe.prompt), size):
        some = slice(at, at + size)
        found = greedy(decoder, probe.prompt[some], probe.query[some], _CHARACTERS, new_cache(), by_token)
        for ids, value in zip(found.tolist(), probe.values[some], strict=True):
            said = decoder.text(ids)[:_CHARACTERS]
            right.append(sum(a == b for a, b in zip(said, value, strict=False)) / _CHARACTERS)
        step()
    return tuple(torch.tensor(right, dtype=torch.float64).view(len(DEPTHS), -1).mean(1).tolist())


def copies(decoder: Decoder, pieces: Tensor, count: int, span: int = 40, seed: int = 0) -> Copies:
    """A span of random tokens in ``count`` pieces ``(P, N)``, at several distances before the end, and at the end.

    Tokens are drawn from those that the pieces hold, so that nothing but the first occurrence tells the second.

    Raises:
        ValueError: pieces shorter than four spans.
    """
    length = pieces.shape[1]
    if length < 4 * span:
        raise ValueError(f"{length} tokens are too few for a span of {span} that comes again far away")
    draw = torch.Generator().manual_seed(seed)
    known = pieces[:, 1:].unique()
    distances = tuple(sorted({max(span, length // 16), length // 4, length // 2, length - 2 * span}))
    rows = []
    for distance in distances:
        for n in range(count):
            row = pieces[n % len(pieces)].clone()
            drawn = known[torch.randint(len(known), (span,), generator=draw)]
            row[-span:] = drawn
            row[length - span - distance : length - distance] = drawn
            rows.append(row)
    return Copies(torch.stack(rows), span, distances)


@torch.no_grad()
def copy_right(
    decoder: Decoder, probe: Copies, new_cache: Callable[[], Any], by_token: bool, step: Callable[[], None]
) -> tuple[float, ...]:
    """For each distance, the share of the second span's tokens that are the likeliest, its first eight aside.

    ``by_token``: the second span is decoded with the cache, else one parallel pass reads all.
    """
    right = []
    scored = probe.span - _LEAD
    for ids in probe.ids.split(rows_at_once(decoder, probe.ids.shape[1])):
        if by_token:
            start = ids.shape[1] - probe.span
            guess = torch.stack([logits.argmax(-1) for logits in forced(decoder, ids, start, new_cache())], 1)
        else:
            guess = decoder.model(input_ids=ids, use_cache=False).logits[:, -probe.span - 1 : -1].argmax(-1)
        right.append((guess == ids[:, -probe.span :])[:, -scored:].double().mean(1))
        step()
    return tuple(torch.cat(right).view(len(probe.distances), -1).mean(1).tolist())
