"""Which heads speak to which: signals followed back from where heads fire, and taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.decomposition import Firing, HeadForms
from glocal.inspect.places import Operator, Place, intercept

__all__ = ["Signal", "StreamEdit", "edit_stream", "random_signal", "signal_graph", "trace_signals"]


class Signal(NamedTuple):
    """What one head said to another.

    Args:
        row: of the batch.
        sender: layer and head that wrote.
        reader: layer and head that fired.
        token: where it was written.
        source: at the key of the firing, and not at its query.
        contribution: to the score, along the signal's directions.
    """

    row: int
    sender: tuple[int, int]
    reader: tuple[int, int]
    token: int
    source: bool
    contribution: float


@torch.no_grad()
def trace_signals(
    forms: HeadForms, fired: Iterable[Firing], roots: Iterable[Firing] | None = None, *, share: float = 0.7
) -> list[Signal]:
    """Follow signals back: from a firing to the heads that contributed most, and from these, where they fire there, on.

    Args:
        forms: of a batch.
        fired: all firings, of `firings`.
        roots: where to begin; at all firings where None.
        share: of all contributions that those of the heads that are kept exceed.

    Returns:
        The signals, each once, those of the last layers first.
    """
    by_query: dict[tuple[int, int, int, int], list[Firing]] = {}
    every = list(fired)
    for each in every:
        by_query.setdefault((each.layer, each.head, each.row, each.query), []).append(each)
    open_ = every if roots is None else list(roots)
    seen: set[tuple[int, int, int, int, int]] = set()
    found = []
    while open_:
        one = open_.pop(0)
        if one[:5] in seen:
            continue
        seen.add(one[:5])
        for source, amounts in zip((False, True), forms.contributions(one), strict=True):
            token = one.key if source else one.query
            for layer, head in _most(amounts, share):
                amount = float(amounts[layer, head])
                found.append(Signal(one.row, (layer, head), (one.layer, one.head), token, source, amount))
                open_.extend(by_query.get((layer, head, one.row, token), ()))
    return sorted(found, key=lambda signal: (-signal.reader[0], signal.row))


def _most(amounts: Tensor, share: float) -> list[list[int]]:
    """Heads with the largest contributions that together exceed a share of the sum of all."""
    if not amounts.numel():
        return []
    ordered = amounts.flatten().sort(descending=True).values
    over = ordered.cumsum(0) > share * amounts.sum()
    cut = ordered[int(over.long().argmax()) if over.any() else -1]
    found: list[list[int]] = (amounts >= cut).nonzero().tolist()
    return found


def signal_graph(signals: Iterable[Signal], role: Callable[[int, int], Any] = lambda row, token: token) -> Any:
    """Signals of all rows as one graph.

    Args:
        signals: of `trace_signals`.
        role: of a row and a token, what the token is there, such as "subject"; its place where not given.

    Returns:
        A `networkx.MultiDiGraph` of heads ``(layer, head)``; an edge goes from who wrote to who fired, its key is
        ``(role, "source" or "destination")``, its ``weight`` the mean contribution over the rows and ``count`` their
        number.

    >>> said = [Signal(row, (0, 1), (1, 2), 5, True, 2.0 + row) for row in range(2)]
    >>> list(signal_graph(said).edges(data=True, keys=True))
    [((0, 1), (1, 2), (5, 'source'), {'weight': 2.5, 'count': 2})]
    """
    import networkx  # type: ignore[import-untyped]

    rows: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for each in signals:
        edge = (each.sender, each.reader, (role(each.row, each.token), "source" if each.source else "destination"))
        rows.setdefault(edge, {}).setdefault(each.row, []).append(each.contribution)
    graph = networkx.MultiDiGraph()
    for (sender, reader, key), by_row in rows.items():
        means = [sum(amounts) / len(amounts) for amounts in by_row.values()]
        graph.add_edge(sender, reader, key=key, weight=sum(means) / len(means), count=len(means))
    return graph


def random_signal(firing: Firing, generator: torch.Generator | None = None) -> Firing:
    """A control: the firing with as many other slices, at random, in the place of its signal, as far as there are."""
    others = (~firing.signal).nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=generator)[: int(firing.signal.sum())].to(others.device)]
    return firing._replace(signal=torch.zeros_like(firing.signal).index_fill(0, chosen, True))


class StreamEdit(NamedTuple):
    """Something to add to the stream.

    Args:
        row: of the batch.
        token: where.
        vector: what, ``(C,)``; for `HeadForms.signal`, with a minus to take it away.
        layer: after whose attention.
        reader: layer and head that alone are to read it; the norm's divisor stays as it was. All that follows where
            None.
    """

    row: int
    token: int
    vector: Tensor
    layer: int
    reader: tuple[int, int] | None = None


@contextmanager
def edit_stream(model: nn.Module, forms: HeadForms, edits: Iterable[StreamEdit]) -> Iterator[None]:
    """Add vectors to a model's stream until the block ends; the model runs on the batch that the forms are of.

    Args:
        model: that of the forms.
        forms: of `head_forms`.
        edits: what to add, and where.

    Raises:
        ValueError: a reader that does not come after the layer.
    """
    modules = dict(model.named_modules())
    numbers = {form.name: number for number, form in enumerate(forms.layers)}
    for_all: dict[int, list[StreamEdit]] = {}
    for_one: dict[int, list[StreamEdit]] = {}
    for edit in edits:
        if edit.reader is None:
            for_all.setdefault(edit.layer, []).append(edit)
        elif edit.reader[0] <= edit.layer:
            raise ValueError(f"reader must be in a layer after {edit.layer}; it was {edit.reader}")
        else:
            for_one.setdefault(edit.reader[0], []).append(edit)

    def add(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, out: Any) -> Any:
            stream = (out if isinstance(out, Tensor) else out[0]).clone()
            for edit in for_all[layer]:
                stream[edit.row, edit.token] += edit.vector.to(stream)
            return stream if isinstance(out, Tensor) else (stream, *out[1:])

        return hook

    def make(place: Place) -> Operator:
        number = numbers[place.name]

        def compute(q: Tensor, k: Tensor, v: Tensor, *given: Any, **options: Any) -> Any:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).clone() for t in (k, v))
            q = q.clone()
            for edit in for_one.get(number, ()):
                _, head = edit.reader or (0, 0)
                entering = forms.record[number].entering[edit.row, edit.token]
                change = edit.vector.double() / forms.layers[number].scale(entering.double())
                for part, weight in zip((q, k, v), forms.layers[number].reading, strict=True):
                    part[edit.row, head, edit.token] += (change @ weight[head]).to(part)
            return attend(q, k, v, *given, **options)

        return compute

    with ExitStack() as stack:
        for layer in for_all:
            hook = modules[forms.layers[layer].name].register_forward_hook(add(layer))
            stack.callback(hook.remove)
        if for_one:
            stack.enter_context(intercept(model, make))
        yield
