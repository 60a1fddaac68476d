"""How much of an encoder's last states comes from each token of its input, without gradients (GlobEnc).

A layer's contributions (`LayerAttribution`) are multiplied through the layers. Modarressi et al., 2022, arXiv
2205.03286.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from glocal.inspect.attribution import pulled, start_row
from glocal.inspect.contributions import LayerAttribution, shares
from glocal.inspect.recorder import record
from glocal.inspect.recording import LayerRecord, block_of

__all__ = ["attribution_flow", "attribution_rollout", "layer_attributions"]

_LAYOUTS = (
    ("attention.output.dense", "attention.output.LayerNorm", "output.LayerNorm"),  # BERT, RoBERTa, ELECTRA, MiniLM
    ("attention.out_lin", "sa_layer_norm", "output_layer_norm"),  # DistilBERT
)


@torch.no_grad()
def layer_attributions(model: nn.Module, inputs: Any, **options: Any) -> list[LayerAttribution]:
    """Run a post-norm encoder once and take apart what each layer makes of its tokens.

    Args:
        model: of transformers, with BERT's or DistilBERT's blocks. It runs in evaluation mode and is left as it was.
        inputs: as of `record`.
        **options: further arguments of the model.

    Returns:
        Its layers, in order.

    Raises:
        TypeError, ValueError: as `record`.
        ValueError: blocks of another layout, among them pre-norm ones, whose streams do not add up so.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    >>> found = layer_attributions(BertModel(BertConfig(**sizes)), torch.randint(50, (1, 7)))
    >>> found[0].matrix("N-Enc").shape, attribution_rollout(found, query=0).shape
    (torch.Size([1, 7, 7]), torch.Size([1, 7]))
    """
    blocks = _blocks(model)
    read: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in blocks}
    with ExitStack() as stack:
        for path, (_, *norms) in blocks.items():
            for norm, kept in zip(norms, read[path], strict=True):
                stack.callback(norm.register_forward_pre_hook(_keeper(kept)).remove)
        found = record(model, inputs, keep=("attention", "values", "residual"), **options)
    layers = []
    for layer in found:
        path = block_of(layer.name)
        if layer.cross or path not in blocks:
            raise ValueError(f"model must be an encoder of post-norm blocks; {layer.name!r} is in none")
        dense, *norms = blocks[path]
        summed, fed = (kept[0].double() for kept in read[path])
        layers.append(_layer(layer, dense, norms, summed, fed))
    return layers


def _keeper(kept: list[Tensor]) -> Any:
    return lambda module, given: kept.append(given[0].detach())


def _blocks(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.LayerNorm, nn.LayerNorm]]:
    """Post-norm blocks by their paths: output projection and both norms."""
    modules, found = dict(model.named_modules()), {}
    for dense_at, first_at, second_at in _LAYOUTS:
        for path in modules:
            if path == dense_at or path.endswith(f".{dense_at}"):
                block = path[: -len(dense_at)]
                dense, first, second = (modules.get(block + at) for at in (dense_at, first_at, second_at))
                norms = isinstance(first, nn.LayerNorm) and isinstance(second, nn.LayerNorm)
                if isinstance(dense, nn.Linear) and norms:
                    found[block.removesuffix(".")] = (dense, first, second)
    if not found:
        raise ValueError(
            f"model must have post-norm blocks, as BERT or DistilBERT; {type(model).__name__} has none. Pre-norm "
            "blocks add up differently, and these formulas do not hold for them"
        )
    return found  # type: ignore[return-value]


def _layer(
    layer: LayerRecord, dense: nn.Linear, norms: Sequence[nn.Module], summed: Tensor, fed: Tensor
) -> LayerAttribution:
    values = layer.v.double()
    heads = values @ dense.weight.double().unflatten(1, (values.shape[1], -1)).permute(1, 2, 0)
    bias = torch.zeros_like(summed[0, 0]) if dense.bias is None else dense.bias.double()
    one, two = (_affine(norm, bias) for norm in norms)
    made = LayerAttribution(layer, layer.entering.double(), summed, fed, heads, bias, (one, two))
    # One state is enough to tell a block that only has post-norm's names.
    at = summed.new_zeros(1, dtype=torch.long) if layer.real is None else layer.real.long().argmax(1)[:1]
    whole = (made.parts("N-Res", at).sum(2) + made.constant("N-Res")[:, at])[0]
    close = torch.finfo(layer.v.dtype).eps ** 0.5 * float(summed.abs().max())
    if not torch.allclose(whole, summed[0, at], atol=close, rtol=0):
        raise ValueError(
            f"model must have post-norm blocks: in {layer.name!r} attention and what enters do not add up to what the "
            "norm after it reads"
        )
    return made


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor, float]:
    gain = torch.ones_like(like) if norm.weight is None else norm.weight.detach().double()
    return gain, torch.zeros_like(like) if norm.bias is None else norm.bias.detach().double(), norm.eps


@torch.no_grad()
def attribution_rollout(layers: Sequence[LayerAttribution], query: Tensor | int = 0, kind: str = "N-Enc") -> Tensor:
    """How much of a last state comes from each token of the input: a row of the product of the layers' matrices.

    The row is pulled down through the layers, so that no product of matrices is held. Rows are not normalised: lengths
    grow from layer to layer, and only their order within a row means something. What a gradient says of any layer's
    state, to compare with, is `gradient_times_input` with its length as objective.

    Args:
        layers: of `layer_attributions`, from the first.
        query: whose state, one for all rows of the batch or integers ``(B,)``; negative ones from the end. Or what each
            state counts for, floats ``(B, N)``, for pooled states.
        kind: of `ATTRIBUTIONS`.

    Returns:
        ``(B, N)`` in float64.

    Raises:
        ValueError: no layers, another kind, a query out of range.
    """
    row = _start(layers, query)
    for layer in reversed(layers):
        row = pulled(row, layer.tiles(kind, row.any(0).nonzero()[:, 0]))
    return row


def _start(layers: Sequence[LayerAttribution], query: Tensor | int) -> Tensor:
    if not layers:
        raise ValueError("layers must hold at least one layer; it was empty")
    return start_row(query, layers[0].summed[..., 0])


@torch.no_grad()
def attribution_flow(layers: Sequence[LayerAttribution], query: Tensor | int = 0, kind: str = "N-Enc") -> Tensor:
    """How much could flow to a last state from each token of the input: maximum flow through the layers.

    Pairs of tokens are pipes between layers, as wide as the matrix says, its rows made to sum to 1 (Abnar and Zuidema,
    2020, arXiv 2005.00928). One maximum flow for each token, for inputs that are short; needs scipy.

    Args:
        layers, kind: as of `attribution_rollout`.
        query: whose state, one for all rows of the batch or integers ``(B,)``.

    Returns:
        ``(B, N)`` in float64, to 1e-7.

    Raises:
        ValueError: as `attribution_rollout`.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    start = _start(layers, query)
    count, depth = start.shape[1], len(layers)
    whole = [(shares(layer.matrix(kind)) * 1e7).round().int() for layer in layers]
    found = torch.zeros_like(start)
    for b, top in enumerate(start.argmax(-1).tolist()):
        graph = torch.zeros((depth + 1) * count, (depth + 1) * count, dtype=torch.int32)
        for n, each in enumerate(whole, 1):
            graph[n * count : (n + 1) * count, (n - 1) * count : n * count] = each[b]
        sparse = csr_array(graph.numpy())
        for token in range(count):
            found[b, token] = maximum_flow(sparse, depth * count + top, token).flow_value / 1e7
    return found
