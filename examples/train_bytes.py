"""Train the small byte-level language model that glocal ships, on the source of Python's standard library.

    python examples/train_bytes.py --out runs/bytes               # about an hour and a half on two CPU cores
    python examples/train_bytes.py --out runs/bytes               # again, after a stop: it goes on where it was

A Llama of transformers: 3.2 million parameters, 4 layers of 256, 8 heads on 4 key heads, bytes as tokens, 2,048 tokens
of context. The first three fifths of the steps see pieces of half that length, twice as many. In a fifth of the pieces
a span is repeated at a later place, so that so small a model learns in so short a time to copy from far away.
Attention runs through `glocal.attend`, whose kernel is faster than torch's here.

Every ``--save-every`` steps, and on Ctrl-C, ``checkpoint.safetensors`` is replaced as a whole: weights, optimizer,
step and curve. A run that was stopped and resumed ends with the same weights as one that was not. At the end the folder
holds ``config.json``, ``model.safetensors`` (float16), the tokenizer, and ``training.json`` with the curve.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from glocal.bench.corpus import VOCAB, python_source, to_ids
from glocal.hf import adapt

CHECKPOINT = "checkpoint.safetensors"
LN2 = math.log(2)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, weights and curve.")],
    steps: Annotated[
        int, typer.Option(help="Optimizer steps in all; a resumed run may be given another number.")
    ] = 3000,
    length: Annotated[int, typer.Option(help="Tokens of context.")] = 2048,
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
        out.mkdir(parents=True, exist_ok=True)
        run = Run(_config(length, width, layers), lr=lr, seed=seed)
        if (out / CHECKPOINT).exists():
            run.load(out / CHECKPOINT)
            console.print(f"Going on after step {run.step}.")
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    last = steps if stop_after is None else min(steps, stop_after)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with adapt(run.model, "causal()"), Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=last, completed=run.step)
            while run.step < last:
                loss = run.advance(steps, length, tokens)
                bar.update(task, completed=run.step, description=f"{loss / LN2:.2f} bits")
                if run.step % save_every == 0:
                    run.note(bits_per_byte(run.model, length))
                    run.save(out / CHECKPOINT)
    except KeyboardInterrupt:
        run.save(out / CHECKPOINT)
        console.print(f"Stopped after step {run.step}; the same command goes on from there.")
        raise typer.Exit(130) from None
    run.save(out / CHECKPOINT)
    if run.step < steps:
        console.print(f"Stopped after step {run.step}; the same command goes on from there.")
        return
    held = run.export(out, length)
    console.print(f"Held-out bits per byte at {length} tokens: {held:.4f} (float16 weights). Written to {out}.")


class Run:
    """Model, optimizer, step and curve: all that a checkpoint holds."""

    def __init__(self, config: LlamaConfig, *, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(config)
        self.seed, self.lr, self.step = seed, lr, 0
        self.curve: list[dict[str, float]] = []
        self.seconds, self._since, self._losses = 0.0, time.monotonic(), []
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def advance(self, steps: int, length: int, tokens: int) -> float:
        """One step; the loss of its batch, in nats a byte."""
        size = length // 2 if self.step < steps * 3 // 5 else length
        rows = batch(self.seed, self.step, size, tokens // size)
        self.model.train()
        loss = self.model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            # Warm-up, plateau, and a straight way down over the last third.
            group["lr"] = self.lr * min(1.0, (self.step + 1) / 100, (steps - self.step) / (steps / 3))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses.append(float(loss.detach()))
        return self._losses[-1]

    def note(self, held: float) -> None:
        """Add a point to the curve."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        mean = sum(self._losses) / max(1, len(self._losses)) / LN2
        self.curve.append({"step": self.step, "train": mean, "held_out": held, "seconds": round(self.seconds, 1)})
        self._losses = []

    def save(self, path: Path) -> None:
        """Write all of it beside the target, then rename: a stop half way leaves the older file whole."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        about = {"step": self.step, "curve": self.curve, "seconds": self.seconds, "losses": self._losses}
        about |= {"seed": self.seed, "config": self.model.config.to_dict()}
        part = path.with_suffix(".part")
        save_file(tensors, part, {"training": json.dumps(about)})
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint, or none of it.

        Raises:
            ValueError: the file is damaged, or of another model or seed.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is damaged ({error}); delete it to begin anew") from None
        mine, its = self.model.config.to_dict(), about["config"]
        for what in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
            if mine[what] != its[what]:
                raise ValueError(f"checkpoint {str(path)!r} has {what} {its[what]}, asked for was {mine[what]}")
        if about["seed"] != self.seed:
            raise ValueError(f"checkpoint {str(path)!r} has seed {about['seed']}, asked for was {self.seed}")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                state.setdefault(int(number), {})[key] = value
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.curve = about["step"], about["curve"]
        self.seconds, self._losses = about["seconds"], about["losses"]

    def export(self, out: Path, length: int) -> float:
        """The folder that `transformers` loads; held-out bits per byte of what it holds."""
        half = LlamaForCausalLM(self.model.config)
        half.load_state_dict({name: t.half().float() for name, t in self.model.state_dict().items()})
        held = bits_per_byte(half, length, pieces=64)
        half.half().save_pretrained(out)
        ByT5Tokenizer(extra_ids=0).save_pretrained(out)
        about: dict[str, Any] = {"held_out_bits_per_byte": held, "length": length, "curve": self.curve}
        about |= {"seconds": self.seconds, "torch": torch.__version__, "threads": torch.get_num_threads()}
        (out / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return held


def batch(seed: int, step: int, length: int, count: int) -> Tensor:
    """The pieces of a step, ``(count, length)``: they depend on seed and step only, so that a resumed run sees them."""
    text = python_source()
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length, (count,), generator=draw).tolist()
    rows = torch.stack([to_ids(text[at : at + length]) for at in starts])
    for row in rows:
        if torch.rand((), generator=draw) < 0.2:
            span = int(torch.randint(8, length // 4, (), generator=draw))
            origin = int(torch.randint(length - 2 * span, (), generator=draw))
            target = int(torch.randint(origin + span, length - span + 1, (), generator=draw))
            row[target : target + span] = row[origin : origin + span].clone()
    return rows


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
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _check(steps: int, length: int, tokens: int, width: int, layers: int) -> None:
    if steps < 1:
        raise ValueError(f"--steps must be at least 1; it was {steps}")
    if length < 128 or length % 2:
        raise ValueError(f"--length must be even and at least 128; it was {length}")
    if tokens < length or tokens % length:
        raise ValueError(f"--tokens must be a multiple of --length {length}; it was {tokens}")
    if width < 64 or width % 64:
        raise ValueError(f"--width must be a multiple of 64; it was {width}")
    if layers < 1:
        raise ValueError(f"--layers must be at least 1; it was {layers}")


if __name__ == "__main__":
    typer.run(train)
