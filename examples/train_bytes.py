"""Train the small byte-level language model that glocal ships, on the source of Python's standard library.

    python examples/train_bytes.py --out runs/bytes               # about an hour and a half on two CPU cores
    python examples/train_bytes.py --out runs/bytes               # again, after a stop: it goes on where it was

A Llama of transformers: 3.2 million parameters, 4 layers of 256, 8 heads on 4 key heads, bytes as tokens, 2,048 tokens
of context. Attention runs through `glocal.attend`, whose kernel is faster than torch's here; matrices are trained by
Muon (Jordan et al. 2024), which needs about half of AdamW's steps.

Most text says nothing of far tokens, and so small a model does not learn in so short a time to copy from far away.
Two things make it: lengths that grow (`STAGES`; with few keys to choose from, copying is found within 300 steps), and
pieces in which something comes again: noise with a period, a span of noise or of the text, a line that gives a made-up
name a value. About half of the pieces are plain text.

Every ``--save-every`` steps, and on Ctrl-C, ``checkpoint.safetensors`` is replaced as a whole: weights, optimizer,
step and curve. A run that was stopped and resumed ends with the same weights as one that was not. At the end the folder
holds ``config.json``, ``model.safetensors`` (float16), the tokenizer, and ``training.json`` with the curve.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from glocal.bench.corpus import VOCAB, python_source, to_ids
from glocal.bench.training import Training
from glocal.hf import adapt

STAGES = ((0.12, 32), (0.18, 8), (0.35, 2), (0.35, 1))
"""Shares of the steps, and by what the length of their pieces is divided."""
SHORTEST = 64
LN2 = math.log(2)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, weights and curve.")],
    steps: Annotated[
        int, typer.Option(help="Optimizer steps in all; a resumed run may be given another number.")
    ] = 4000,
    length: Annotated[int, typer.Option(help="Tokens of context, a multiple of 128.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens of a step, a multiple of the length.")] = 4096,
    width: Annotated[int, typer.Option(help="Channels, a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stop_after: Annotated[int | None, typer.Option(help="Stop, resumable, at this step.")] = None,
) -> None:
    """Train, or go on with training that was stopped."""
    console = Console(stderr=True)
    try:
        _check(steps, length, tokens, width, layers)
        run = start(_config(length, width, layers), lr=lr, seed=seed)
        run.take_up(out, console)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    last = steps if stop_after is None else min(steps, stop_after)
    model = run.model
    assert isinstance(model, LlamaForCausalLM)

    def loss_of(step: int) -> Tensor:
        size = size_at(step / steps, length)
        rows = batch(seed, step, size, tokens // size)
        loss: Tensor = model(input_ids=rows, labels=rows).loss
        return loss

    with adapt(model, "causal()"):
        reached = run.run(
            out,
            loss_of,
            lambda: {"held_out": bits_per_byte(model, length), "copied": copied(model, length)},
            steps=steps,
            last=last,
            save_every=save_every,
            say=lambda loss: f"{loss / LN2:.2f} bits",
            console=console,
        )
    if run.step < steps:
        raise typer.Exit(0 if reached else 130)
    held = export(run, out, length)
    console.print(f"Held-out bits per byte at {length} tokens: {held:.4f} (float16 weights). Written to {out}.")


def start(config: LlamaConfig, *, lr: float, seed: int) -> Training:
    """A model with random weights, and its optimizers."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    names = ("hidden_size", "num_hidden_layers", "max_position_embeddings")
    identity = {"seed": seed} | {name: getattr(config, name) for name in names}
    return Training(model, model.model.layers, lr=lr, identity=identity)


def export(run: Training, out: Path, length: int) -> float:
    """The folder that `transformers` loads; held-out bits per byte of what it holds."""
    half = LlamaForCausalLM(run.model.config)
    half.load_state_dict({name: t.half().float() for name, t in run.model.state_dict().items()})
    held = bits_per_byte(half, length, pieces=64)
    half.half().save_pretrained(out)
    ByT5Tokenizer(extra_ids=0).save_pretrained(out)
    run.write(out, held_out_bits_per_byte=held, length=length)
    return held


def size_at(done: float, length: int) -> int:
    """Tokens of a piece when this share of the steps is done."""
    for share, divisor in STAGES:
        if done < share:
            return max(min(SHORTEST, length), length // divisor)
        done -= share
    return length


def batch(seed: int, step: int, length: int, count: int) -> Tensor:
    """The pieces of a step, ``(count, length)``: they depend on seed and step only, so that a resumed run sees them."""
    text = python_source()
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length, (count,), generator=draw).tolist()
    rows = torch.stack([to_ids(text[at : at + length]) for at in starts])
    known = rows.unique()
    # Where pieces are short, noise with a period is what copying is learned from.
    periodic = 0.5 if length <= SHORTEST else 0.12
    for row in rows:
        kind = float(torch.rand((), generator=draw))
        if kind < periodic:
            period = _between(5, length * 3 // 8, draw)
            row[:] = _noise(known, period, draw).repeat(length // period + 1)[:length]
        elif kind < 0.5 and length > SHORTEST:
            span = _noise(known, _between(12, length // 4, draw), draw)
            if kind < 0.22:
                origin = _between(0, length - len(span), draw)
                span = row[origin : origin + len(span)].clone()
            elif kind < 0.37:
                span = _line(draw)
            _twice(row, span, draw)
            if kind >= 0.3:
                _twice(row, _line(draw), draw)
    return rows


def _twice(row: Tensor, span: Tensor, draw: torch.Generator) -> None:
    """Put a span at two places that do not overlap."""
    first = _between(0, len(row) - 2 * len(span), draw)
    second = _between(first + len(span), len(row) - len(span), draw)
    row[first : first + len(span)] = span
    row[second : second + len(span)] = span


def _line(draw: torch.Generator) -> Tensor:
    """A line that gives a made-up name a made-up value."""
    letters = to_ids("abcdefghijklmnopqrstuvwxyz")
    signs = torch.cat([letters, to_ids("0123456789")])
    words = [_noise(letters, _between(2, 8, draw), draw) for _ in range(_between(1, 3, draw))]
    name = torch.cat([part for word in words for part in (word, to_ids("_"))])
    number = to_ids(str(_between(0, 99, draw)))
    value = _noise(signs, _between(3, 12, draw), draw)
    quote = to_ids("\"'"[_between(0, 1, draw)])
    return torch.cat([to_ids("\n"), name, number, to_ids(" = "), quote, value, quote, to_ids("\n")])


def _noise(known: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return known[torch.randint(len(known), (count,), generator=draw)]


def _between(low: int, high: int, draw: torch.Generator) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=draw))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, length: int, pieces: int = 16) -> float:
    """Of held-out text, in pieces of ``length`` spread evenly over it."""
    text = python_source(held_out=True)
    model.eval()
    losses = []
    for at in torch.linspace(0, len(text) - length, pieces).long().tolist():
        ids = to_ids(text[at : at + length])[None]
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(losses) / len(losses) / LN2


@torch.no_grad()
def copied(model: LlamaForCausalLM, length: int, pieces: int = 16, span: int = 24) -> float:
    """Share of bytes that are the likeliest where noise at the end of held-out text stands earlier too, anywhere."""
    text = python_source(held_out=True)
    draw = torch.Generator().manual_seed(0)
    model.eval()
    right = 0.0
    for at in torch.linspace(0, len(text) - length, pieces).long().tolist():
        ids = to_ids(text[at : at + length])
        noise = _noise(ids.unique(), span, draw)
        first = _between(0, length - 2 * span, draw)
        ids[first : first + span] = ids[-span:] = noise
        guess = model(input_ids=ids[None]).logits[0, -span - 1 : -1].argmax(-1)
        right += float((guess == noise)[8:].float().mean())  # the first few say where to look
    return right / pieces


def _config(length: int, width: int, layers: int) -> LlamaConfig:
    heads = width // 32
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},  # more channels that are alike at all distances
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _check(steps: int, length: int, tokens: int, width: int, layers: int) -> None:
    if steps < 1:
        raise ValueError(f"--steps must be at least 1; it was {steps}")
    if length < 128 or length % 128:
        raise ValueError(f"--length must be a multiple of 128; it was {length}")
    if tokens < length or tokens % length:
        raise ValueError(f"--tokens must be a multiple of --length {length}; it was {tokens}")
    if width < 64 or width % 64:
        raise ValueError(f"--width must be a multiple of 64; it was {width}")
    if layers < 1:
        raise ValueError(f"--layers must be at least 1; it was {layers}")


if __name__ == "__main__":
    typer.run(train)
