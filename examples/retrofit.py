"""Give the byte-level language model that glocal ships another attention, by minutes of training of a few parameters.

    python examples/retrofit.py aha --out runs/aha          # each token and head sees all, or a window
    python examples/retrofit.py moh --out runs/moh          # each token takes six of eight heads
    python examples/retrofit.py nats --out runs/nats        # each token is kept for ever, for a while, or for a window
    python examples/retrofit.py cca --out runs/cca          # far tokens in groups
    python examples/retrofit.py sf_attn --out runs/sf       # tuned in groups, full attention afterwards

The model's own weights are frozen. ``aha``, ``moh`` and ``nats`` train their routers; ``moh``, ``cca`` and ``sf_attn``
adapters of low rank in the projections (by peft). Two to four minutes each on one CPU core.

It prints bits per byte of held-out text with full attention, with the mechanism untrained, and tuned, and what each
costs. The folder then holds ``glocal.json`` and ``glocal.safetensors`` (`glocal.hf.readapt`), the adapters
(``peft.PeftModel.from_pretrained``), and ``retrofit.json`` with the figures. Ctrl-C stops training early and keeps
what was learned.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from glocal.bench.corpus import python_source, to_ids
from glocal.hf import Adapted, adapt
from glocal.hf.tuning import tune
from glocal.progress import progress_bar

LN2 = math.log(2)


class Name(StrEnum):
    """What can be retrofitted."""

    aha = "aha"
    moh = "moh"
    nats = "nats"
    cca = "cca"
    sf_attn = "sf_attn"


@dataclass(frozen=True)
class Recipe:
    """How one mechanism is tuned.

    Args:
        text: the mechanism, with ``{quarter}`` for a quarter of the length.
        steps: optimizer steps.
        lr: highest learning rate.
        weight: of the penalty.
        cost: what the mechanism costs after a forward pass, with what it counts.
        counts: its unit.
        alone: the pattern that is left when the router always says no.
        adapters: whether adapters of low rank are trained, beside routers where there are some.
    """

    text: str
    steps: int
    lr: float
    weight: float | None
    cost: Callable[[Adapted, int], float]
    counts: str
    alone: str | None = None
    adapters: bool = False


def retrofit(
    mechanism: Annotated[Name, typer.Argument(help="What to put into the model.")],
    out: Annotated[Path, typer.Option(help="Folder for what is learned.")],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the recipe's own where not given.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a piece, in training and evaluation.")] = 512,
    pieces: Annotated[int, typer.Option(help="Pieces of held-out text for each figure.")] = 32,
    weight: Annotated[float | None, typer.Option(help="Of the penalty; the recipe's own where not given.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of another byte-level model.")] = None,
    seed: Annotated[int, typer.Option(help="Of routers, adapters and data.")] = 0,
) -> None:
    """Tune a mechanism in a pretrained model."""
    console, recipe = Console(stderr=True), RECIPES[mechanism]
    steps = recipe.steps if steps is None else steps
    try:
        if steps < 1 or pieces < 1:
            raise ValueError(f"--steps and --pieces must be at least 1; they were {steps} and {pieces}")
        if length < 64 or length % 8:
            raise ValueError(f"--length must be a multiple of 8 and at least 64; it was {length}")
        base, text = _load(model), recipe.text.format(quarter=length // 4)
        with adapt(base, text):
            pass
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    torch.manual_seed(seed)
    rows: list[dict[str, Any]] = []

    def measure(name: str, handle: Adapted | None = None) -> None:
        bits, costs = [], []
        for loss in held_out(base, length, pieces):
            bits.append(loss / LN2)
            costs.append(math.nan if handle is None else recipe.cost(handle, length))
        share = None if handle is None else round(sum(costs) / len(costs), 4)
        rows.append({"attention": name, "bits_per_byte": round(sum(bits) / len(bits), 4), "cost": share})

    with adapt(base, "full()"):
        measure("full")
    if recipe.alone is not None:
        with adapt(base, recipe.alone):
            measure(recipe.alone)
    began, done = time.monotonic(), 0
    with adapt(base, text) as handle:
        measure(f"{text}, untrained", handle)
        lora = _adapters(base) if recipe.adapters else None
        learned = list(handle.parameters()) + (
            [] if lora is None else [p for p in lora.parameters() if p.requires_grad]
        )
        with progress_bar(console) as bar:
            task = bar.add_task(mechanism.value, total=steps)

            def show(step: int, parts: dict[str, float]) -> None:
                nonlocal done
                done = step
                bits = parts["labels"] / LN2
                bar.update(task, completed=step, description=f"{mechanism.value}: {bits:.2f} bits")

            try:
                tune(
                    handle,
                    batches(seed, length),
                    steps=steps,
                    lr=recipe.lr,
                    parameters=learned,
                    weight=recipe.weight if weight is None else weight,
                    progress=show,
                    seed=seed,
                )
            except KeyboardInterrupt:
                console.print(f"Stopped after step {done}; what was learned is kept.")
        seconds = time.monotonic() - began
        measure(f"{text}, tuned", handle)
        handle.save(out)
    if lora is not None:
        with adapt(base, "full()"):
            measure("full, with the adapters")
        lora.save_pretrained(out)
    about = {"mechanism": text, "steps": done, "seconds": round(seconds, 1), "length": length, "rows": rows}
    about |= {"counts": recipe.counts, "learned": sum(p.numel() for p in learned)}
    (out / "retrofit.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    table = Table("attention", "bits per byte", recipe.counts, title=f"{done} steps, {seconds:.0f} s, {length} tokens")
    for row in rows:
        cost = "" if row["cost"] is None else f"{row['cost']:.1%}"
        table.add_row(row["attention"], f"{row['bits_per_byte']:.4f}", cost)
    Console().print(table)
    console.print(f"Written to {out}.")


# What mechanisms cost, after a forward pass in evaluation.


def seeing_all(handle: Adapted, length: int) -> float:
    """Share of tokens and heads that see everything."""
    return _mean(float(frame.gates.mean()) for frame in _frames(handle))


def active_heads(handle: Adapted, length: int) -> float:
    """Share of heads that a token takes."""
    return _mean(float((frame.gates > 0).float().mean()) for frame in _frames(handle))


def live_tokens(handle: Adapted, length: int) -> float:
    """Share of the past that a query sees, on average over queries and heads."""
    shares = []
    for frame in _frames(handle):
        roles = frame.last.argmax(-1)
        pairs = roles.shape[0] * frame.num_heads * length * (length + 1) / 2
        shares.append(frame.visible(roles, length).count(length) / pairs)
    return _mean(shares)


def entries(handle: Adapted, length: int) -> float:
    """Cache entries after so many tokens, as a share of a full cache's."""
    shares = []
    for frame in _frames(handle):
        (cores,), (near,) = frame.spans(length, length, False, torch.device("cpu"))
        shares.append(float((cores[1] - cores[0] + near[1] - near[0])[-1]) / length)
    return _mean(shares)


def pairs_in_groups(handle: Adapted, length: int) -> float:
    """Share of the pairs of full attention that are scored."""
    shares = []
    for frame in _frames(handle):
        t = torch.empty(1, frame.num_heads, length, 1)
        total = frame.where(t, t, None).count(length)
        shares.append(total / (frame.num_heads * length * (length + 1) / 2))
    return _mean(shares)


RECIPES = {
    Name.aha: Recipe("aha(window=16)", 100, 1e-2, 0.1, seeing_all, "see all", alone="sliding(15, 0)"),
    Name.moh: Recipe("moh(shared_heads=4, top_k=2)", 150, 4e-3, 0.01, active_heads, "active heads", adapters=True),
    Name.nats: Recipe("nats(window=16)", 60, 1e-2, 0.1, live_tokens, "live tokens", alone="sliding(16, 0)"),
    Name.cca: Recipe("cca(group_size=16, window=32)", 150, 2e-3, None, entries, "cache entries", adapters=True),
    Name.sf_attn: Recipe("sf_attn(group_size={quarter})", 150, 2e-3, None, pairs_in_groups, "pairs", adapters=True),
}


# Model and data.


def batches(seed: int, length: int, count: int = 2) -> Iterator[Tensor]:
    """Random pieces of the training text, ``(count, length)`` each, without end."""
    text, draw = python_source(), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (count,), generator=draw).tolist()
        yield torch.stack([to_ids(text[at : at + length]) for at in starts])


@torch.no_grad()
def held_out(model: nn.Module, length: int, pieces: int) -> Iterator[float]:
    """The loss of each of some pieces, spread evenly over held-out text, in nats a byte."""
    text = python_source(held_out=True)
    model.eval()
    for at in torch.linspace(0, len(text) - length, pieces).long().tolist():
        ids = to_ids(text[at : at + length])[None]
        yield float(model(input_ids=ids, labels=ids).loss)


def _load(folder: Path | None) -> Any:
    from glocal.hf import byte_llama, load_causal

    return byte_llama() if folder is None else load_causal(folder)


def _adapters(model: Any) -> Any:
    """Adapters in the projections of all layers; they begin at zero."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM"))


def _frames(handle: Adapted) -> list[Any]:
    return list(handle.frames.values())


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(retrofit)
