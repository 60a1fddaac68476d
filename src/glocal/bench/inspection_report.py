"""What a model attends to, as one HTML page that works offline: pick a head, see its map over the tokens or patches."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from glocal.bench.inspection import Inspection
from glocal.bench.report import page
from glocal.bench.table import Table

__all__ = ["ABOUT", "headline", "heads_table", "render", "tables"]

ABOUT = {
    "distance": ("mean distance", "How far a query looks, in tokens (of a picture in patches), the mean over queries."),
    "entropy": ("entropy", "How evenly a query looks, in nats: 0 where it sees one key alone."),
    "local": (
        "local mass",
        "Share of the attention on keys nearer than 8 tokens (of a picture: the 8 patches around).",
    ),
    "sink": ("sink mass", "Share of the attention on the first token."),
    "previous": ("previous token", "Share of the attention on the token before."),
    "future": ("future influence", "Attention that a token gets from those 10 to 50 tokens on, the mean over tokens."),
    "cost": ("cost of pruning", "What the model loses on this input without the head."),
}
"""A metric's name for people, and what it is."""


def headline(result: Inspection) -> str:
    """One sentence: which head is dearest, what can go, what draws most."""
    drawn = result.subject.labels[int(result.received.argmax())]
    parts = [f"{_shown(drawn)} draws {float(result.received.max()):.0%} of all attention"]
    cost = result.metrics.get("cost")
    if cost is not None and result.pruned:
        layer, head = divmod(int(cost.nan_to_num(nan=-math.inf).argmax()), cost.shape[1])
        parts.append(
            f"the head that it can spare least is {head + 1} of layer {layer + 1} "
            f"(+{float(cost[layer, head]):.3g} {result.subject.unit})"
        )
    return f"{'; '.join(parts)}."


def heads_table(result: Inspection, count: int = 12) -> Table:
    """The heads that cost most to prune, or look farthest where that was not measured."""
    key = "cost" if "cost" in result.metrics else "distance"
    order = result.metrics[key].flatten().nan_to_num(nan=-math.inf).argsort(descending=True)[:count].tolist()
    wide = result.metrics[key].shape[1]
    names = [name for name in ABOUT if name in result.metrics]
    rows = [
        (str(n // wide + 1), str(n % wide + 1), *(_number(float(result.metrics[name].flatten()[n])) for name in names))
        for n in order
        if not math.isnan(float(result.metrics[key].flatten()[n]))
    ]
    title = f"Heads by {ABOUT[key][0]}" + (f", in {result.subject.unit}" if key == "cost" else "")
    legend = ("counted from 1", "counted from 1", *(ABOUT[name][1] for name in names))
    return Table(title, ("layer", "head", *(ABOUT[name][0] for name in names)), legend, tuple(rows))


def tables(result: Inspection) -> tuple[Table, ...]:
    """What the command prints."""
    subject = result.subject
    order = result.received.argsort(descending=True)[:8].tolist()
    methods = list(result.attributions)
    shares = {name: value / value.sum().clamp(min=1e-30) for name, value in result.attributions.items()}
    rows = tuple(
        (
            _shown(subject.labels[n]),
            str(n + 1),
            f"{float(result.received[n]):.1%}",
            *(f"{float(shares[name][n]):.1%}" for name in methods),
        )
        for n in order
    )
    legend = (
        "",
        "counted from 1",
        "what it gets, the mean over layers, heads and queries",
        *(f"its share of what {subject.question} rests on, by {name}" for name in methods),
    )
    drawn = Table("Tokens that draw most attention", ("token", "place", "attention", *methods), legend, rows)
    found = [heads_table(result), drawn]
    if result.pruned:
        lost = tuple((f"{share:.0%}", f"{loss:.4g}") for share, loss in result.pruned)
        legend = ("share of all heads, those first that cost least by themselves", "on this input")
        found.append(Table("Without the cheapest heads", ("heads gone", subject.unit), legend, lost))
    return tuple(found)


def render(result: Inspection) -> str:
    """The page, as text of an HTML file: its script and Plotly's are in it, nothing is asked for outside."""
    from plotly.offline import get_plotlyjs

    subject = result.subject
    return page(
        "inspection.html.j2",
        command="inspect",
        result={"model": subject.name, "threads": torch.get_num_threads()},
        headline=headline(result),
        subject=subject,
        table=heads_table(result),
        data=_data(result),
        about={name: list(said) for name, said in ABOUT.items() if name in result.metrics},
        plotly=Markup(get_plotlyjs()),
    )


def _data(result: Inspection) -> dict[str, Any]:
    subject, size = result.subject, result.cells
    labels = [
        "".join(subject.labels[at : at + size]) if subject.grid is None else " / ".join(subject.labels[at : at + size])
        for at in range(0, len(subject.labels), size)
    ]
    numbers = result.to_dict()
    return {
        "layers": result.layers,
        "metrics": {name: numbers["metrics"][name] for name in ABOUT if name in result.metrics},
        "maps": [[_packed(head) for head in layer] for layer in result.maps],
        "labels": labels,
        "tokens": subject.labels,
        "size": size,
        "grid": subject.grid,
        "first": len(subject.labels) - math.prod(subject.grid) if subject.grid else 0,
        "picture": None if subject.picture is None else _png(subject.picture),
        "attributions": numbers["attributions"],
        "received": numbers["received"],
        "pruned": result.pruned,
        "unit": subject.unit,
        "causal": subject.kind == "causal",
    }


def _packed(weights: Tensor) -> list[Any]:
    """The largest weight, rows and columns, and roots of the shares of it as bytes, so that faint ones stay apart."""
    top = float(weights.max())
    shares = (weights / max(top, 1e-30)).clamp(0, 1).sqrt() * 255
    raw = shares.round().to(torch.uint8).contiguous().numpy().tobytes()
    return [top, *weights.shape, base64.b64encode(raw).decode()]


def _png(picture: Tensor) -> str:
    from PIL import Image

    found = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    stream = io.BytesIO()
    found.resize((found.width * max(1, 384 // found.width), found.height * max(1, 384 // found.height))).save(
        stream, "PNG"
    )
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _shown(token: str) -> str:
    """A token in quotation marks, white space made visible.

    >>> _shown("the"), _shown(" "), _shown(chr(10))
    ("'the'", "'␣'", "'⏎'")
    """
    if token.isspace():
        token = token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return f"'{token.strip()}'"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
