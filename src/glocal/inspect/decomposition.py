"""What makes a head look from one token at another: a few directions of the stream, and who wrote along them.

The score of a head is a bilinear form in the normed stream of the query and that of the key. Its singular value
decomposition splits each score into as many slices as the head is wide. A few of them make most of the score, and each
is a sum over all that wrote to the stream before. Franco and Crovella, 2024, arXiv 2410.00340.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from glocal.inspect.projections import head_weights
from glocal.inspect.recording import Record, block_of

__all__ = ["Firing", "HeadForms", "LayerForms", "firings", "head_forms", "signal_set"]


@dataclass(frozen=True, eq=False)
class LayerForms:
    """The bilinear forms of a layer's heads on the normed stream ``[x; 1]``, and what its heads write.

    ``u[h] * s[h] @ v[h].mT`` gives scores before they are scaled: of ``[x_i; 1]`` from the left and ``[x_j; 1]`` from
    the right. All in float64.

    Args:
        name: the path of the layer's attention.
        u, v: singular vectors, ``(H, C + 1, r)``, the constant last.
        s: singular values, ``(H, r)``.
        reading: from the normed stream without its constant to queries, keys and values, ``(H, C, D)`` each.
        write: ``(H, D, C)``, centred.
        bias: what a head gives of each value's bias, ``(H, D)``, which belongs to the layer's bias.
        constant: that bias and the outputs', centred, ``(C,)``.
        eps: of the norm.
    """

    name: str
    u: Tensor
    s: Tensor
    v: Tensor
    reading: tuple[Tensor, Tensor, Tensor]
    write: Tensor
    bias: Tensor
    constant: Tensor
    eps: float

    @classmethod
    def of(cls, name: str, norm: nn.LayerNorm, attention: nn.Module) -> Self:
        """From the weights, with the norm's gain and bias put into those of queries, keys and values."""
        weights = head_weights(attention)
        each = [t.double() for t in weights]
        q, k, v, o, bq, bk, bv, bo = each
        width = q.shape[1]
        gain = torch.ones(width).to(q) if norm.weight is None else norm.weight.detach().double()
        shift = torch.zeros(width).to(q) if norm.bias is None else norm.bias.detach().double()
        left, right = (
            torch.cat([gain[:, None] * w, (b + shift @ w)[:, None]], 1) for w, b in ((q, bq), (k, bk))
        )  # (H, C + 1, D)
        (a, ra), (b, rb) = (torch.linalg.qr(t) for t in (left, right))
        inner, s, outer = torch.linalg.svd(ra @ rb.mT)
        s = s.masked_fill(s <= s[:, :1] * width * torch.finfo(s.dtype).eps, 0)  # rounding
        bias = bv + shift @ v
        constant = torch.einsum("hd,hdc->c", bias, o) + bo
        return cls(
            name,
            a @ inner,
            s,
            b @ outer.mT,
            (gain[:, None] * q, gain[:, None] * k, gain[:, None] * v),
            _centred(o),
            bias,
            _centred(constant),
            norm.eps,
        )

    def scale(self, stream: Tensor) -> Tensor:
        """What the norm divides a stream ``(..., C)`` by, ``(...)``."""
        found: Tensor = (_centred(stream).square().mean(-1) + self.eps).sqrt()
        return found

    def read(self, stream: Tensor) -> Tensor:
        """The stream that enters the block, ``(..., C)``, as the forms take it: normed, with the constant."""
        normed = _centred(stream.double()) / self.scale(stream.double())[..., None]
        return nn.functional.pad(normed, (0, 1), value=1.0)

    def slices(self, head: int, x: Tensor, y: Tensor) -> Tensor:
        """What each pair of singular vectors gives to scores, ``(..., r)``; their sum is the score times sqrt(D).

        Args:
            head: its number.
            x, y: of queries and keys, from `read`, ``(..., C + 1)``.
        """
        return (x @ self.u[head]) * self.s[head] * (y @ self.v[head])

    def written(self, outputs: Tensor) -> Tensor:
        """What heads with outputs ``(..., H, N, D)`` write to the stream, ``(..., H, N, C)``, without biases."""
        return (outputs.double() - self.bias[:, None]) @ self.write


class Firing(NamedTuple):
    """A head that looks from one token mostly at one other.

    Args:
        layer, head: which.
        row: of the batch.
        query, key: the tokens.
        signal: which slices make the score, booleans ``(r,)``.
    """

    layer: int
    head: int
    row: int
    query: int
    key: int
    signal: Tensor


@dataclass(frozen=True, eq=False)
class HeadForms:
    """A model's heads on one batch: their forms, and what each wrote. Made by `head_forms`.

    Args:
        layers: forms, one a layer.
        record: of the batch.
        streams: entering each layer, as its forms take it, ``(B, N, C + 1)``.
        written: by the heads of each layer, ``(B, H, N, C)``.
    """

    layers: list[LayerForms]
    record: Record
    streams: list[Tensor] = field(repr=False)
    written: list[Tensor] = field(repr=False)

    def slices(self, firing: Firing) -> Tensor:
        """Of a firing's score, ``(r,)``."""
        stream = self.streams[firing.layer][firing.row]
        return self.layers[firing.layer].slices(firing.head, stream[firing.query], stream[firing.key])

    def contributions(self, firing: Firing, signal: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How much each earlier head wrote, along a firing's signal, to the query's and to the key's stream.

        Args:
            firing: of `firings`.
            signal: which slices, booleans ``(r,)``; those of the firing where None.

        Returns:
            Two of ``(layers before, H)``: at the query (the destination) and at the key (the source).
        """
        form, head = self.layers[firing.layer], firing.head
        stream, entering = self.streams[firing.layer][firing.row], self.record[firing.layer].entering[firing.row]
        signal = firing.signal if signal is None else signal
        scales = form.scale(entering.double())
        sign = (stream[firing.query] @ form.u[head]).sign()
        weight = sign * form.s[head].sqrt() * signal
        found = []
        for vectors, token in ((form.u[head], firing.query), (form.v[head], firing.key)):
            direction = vectors @ weight
            rows = [
                (written[firing.row, :, token] @ direction[:-1] + direction[-1]) / scales[token]
                for written in self.written[: firing.layer]
            ]
            found.append(torch.stack(rows) if rows else direction.new_empty(0, 0))
        return found[0], found[1]

    def projectors(self, firing: Firing) -> tuple[Tensor, Tensor]:
        """Onto the signal's directions, of the query's stream and of the key's, ``(C + 1, C + 1)`` each."""
        form = self.layers[firing.layer]
        u, v = (each[firing.head][:, firing.signal] for each in (form.u, form.v))
        return u @ u.mT, v @ v.mT

    def signal(self, firing: Firing, layer: int, head: int, *, source: bool) -> Tensor:
        """What an earlier head wrote along a firing's signal, ``(C,)``, centred: to be taken away, or added once more.

        Args:
            firing: of `firings`.
            layer, head: who wrote.
            source: at the key, and not at the query.
        """
        token, projector = (
            (firing.key, self.projectors(firing)[1]) if source else (firing.query, self.projectors(firing)[0])
        )
        written = nn.functional.pad(self.written[layer][firing.row, head, token], (0, 1), value=1.0)
        return _centred((projector @ written)[:-1])


@torch.no_grad()
def head_forms(model: nn.Module, record: Record) -> HeadForms:
    """Split a model's heads, for a batch.

    Args:
        model: with layer norms before its attention and positions that are added to the embeddings: GPT-2 of
            transformers, or blocks that hold an attention layer of `glocal.nn` and its norm as ``norm1`` or ``ln_1``.
        record: of that batch, kept with ``"attention"``, ``"outputs"`` and ``"residual"``.

    Raises:
        TypeError: no such norms.

    >>> from glocal.inspect import record
    >>> from glocal.nn import MLP, Attention, Block
    >>> model = nn.Sequential(Block(8, Attention(8, 2, causal=True), MLP(8, 8)))
    >>> found = head_forms(model, record(model, torch.randn(1, 5, 8), keep=["attention", "outputs", "residual"]))
    >>> x = found.streams[0][0]
    >>> scores = found.layers[0].slices(1, x[:, None], x[None]).sum(-1) / 4**0.5
    >>> torch.allclose(scores.tril(), found.record[0].scores(torch.arange(5))[0, 1].double().tril(), atol=1e-5)
    True
    """
    modules = dict(model.named_modules())
    layers = []
    for layer in record:
        block = modules[block_of(layer.name)]
        norm = next((getattr(block, name) for name in ("norm1", "ln_1") if hasattr(block, name)), None)
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(
                f"{block_of(layer.name)} must hold a LayerNorm before its attention, norm1 or ln_1; it was {norm}"
            )
        layers.append(LayerForms.of(layer.name, norm, modules[layer.name]))
    streams = [form.read(layer.entering) for form, layer in zip(layers, record, strict=True)]
    written = [form.written(layer.outputs) for form, layer in zip(layers, record, strict=True)]
    return HeadForms(layers, record, streams, written)


def signal_set(slices: Tensor, share: float = 1.0) -> Tensor:
    """The fewest slices that make more than a share of a score, the largest first: booleans ``(..., r)``.

    Where no number of them does, as where none is against it, all that are not 0. Of scores below 0, the lowest first.

    Args:
        slices: ``(..., r)``.
        share: of the score.

    >>> signal_set(torch.tensor([4.0, -2.0, 3.0, 0.5])).tolist(), signal_set(torch.tensor([1.0, 3.0]), 0.7).tolist()
    ([True, False, True, False], [False, True])
    """
    total = slices.sum(-1, keepdim=True)
    slices = torch.where(total < 0, -slices, slices)
    ordered, order = slices.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(slices, dtype=torch.bool).scatter(
        -1, order, (before <= share * total.abs()) & (ordered != 0)
    )


@torch.no_grad()
def firings(forms: HeadForms, *, weight: float = 0.5, share: float = 1.0) -> Iterator[Firing]:
    """All pairs of tokens where a head fires: much attention, to a key that is not the first, with a score above 0.

    Args:
        forms: of a batch.
        weight: the least attention.
        share: of the score that the signal makes, as in `signal_set`.
    """
    for number, layer in enumerate(forms.record):
        for tile in layer.tiles():
            many = (tile.weights >= weight) & (layer.scores(tile.rows) >= 0)
            many[..., 0] = False
            for row, head, query, key in many.nonzero().tolist():
                at = int(tile.at[query])
                stream = forms.streams[number][row]
                found = forms.layers[number].slices(head, stream[at], stream[key])
                yield Firing(number, head, row, at, key, signal_set(found, share))


def _centred(t: Tensor) -> Tensor:
    return t - t.mean(-1, keepdim=True)
