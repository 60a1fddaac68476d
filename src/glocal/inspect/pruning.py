"""Heads taken out of a model for good: smaller projections, fewer operations."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.hf.cache import STACK
from glocal.hf.install import crosses
from glocal.inspect.importance import Heads
from glocal.inspect.places import Operator, Place, intercept
from glocal.nn import Attention

__all__ = ["head_counts", "prune_heads", "pruned"]

# What a projection's outputs are, in families of transformers: blocks of all heads one after the other, ...
_BLOCKS = (
    {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    {"query": "q", "key": "k", "value": "v"},
    {"q_lin": "q", "k_lin": "k", "v_lin": "v"},
    {"q_attn": "q", "c_attn": "kv"},
    {"c_attn": "qkv"},
    {"Wqkv": "qkv"},
    {"qkv_proj": "qkv"},
)
_BY_HEAD = "query_key_value"  # ... or each head's queries, keys and values together.
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo", "out_lin")
_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size")
_KEPT = "_glocal_heads"


class _Layout(NamedTuple):
    """The projections of a layer."""

    inputs: list[tuple[nn.Module, str]]
    """Each with what its outputs are, a letter a block: queries, keys, values, gates."""
    by_head: bool
    out: nn.Module
    size: int
    """Channels of a head."""
    heads: int
    groups: int
    """Query heads, key heads."""


class _Plan(NamedTuple):
    """What is to be done to a layer: made for all layers before anything is changed."""

    module: nn.Module
    rows: list[tuple[nn.Module, Tensor]]
    out: nn.Module
    columns: Tensor
    kept: list[int]
    numbers: dict[str, tuple[int, int]]
    """Attributes that count heads: before and after."""
    cross: bool


def prune_heads(model: nn.Module, heads: Heads) -> None:
    """Remove heads of a model, in place: rows of its query, key and value projections, columns of the output one.

    The model then computes what it computed under `masked_heads`, with fewer parameters and operations. Of grouped
    queries, keys and values that no query head reads are removed too; where groups are left unequal, keys and values
    are repeated so that groups are equal again, as large as can be: each remaining query head at worst has its own. A
    layer without heads gives its output bias. Michel et al., 2019, arXiv 1905.10650.

    For layers of `glocal.nn.Attention` itself and for models of transformers with projections as in Llama (also with
    normalised heads), BERT, RoBERTa, ViT, CLIP, Whisper, GPT-2, GPT-NeoX, ModernBERT or Phi-3.

    Args:
        model: it is changed; take a ``copy.deepcopy`` first to keep the other. An optimizer made before does not know
            its new parameters.
        heads: pairs of layer and head, numbered as in `edit_heads`, among the heads that are there now.

    Raises:
        TypeError, ValueError: as `intercept`; an architecture that is not known; no such head; a model that is adapted
            or steered. Nothing has been changed then.

    >>> from glocal.inspect import masked_heads
    >>> layer, x = Attention(16, 4, num_kv_heads=2), torch.randn(1, 5, 16)
    >>> with masked_heads(layer, [(0, 0), (0, 1), (0, 2)]):
    ...     wanted = layer(x)
    >>> prune_heads(layer, [(0, 0), (0, 1), (0, 2)])
    >>> torch.allclose(layer(x), wanted, atol=1e-6), layer.num_heads, layer.k_proj.weight.shape
    (True, 1, torch.Size([4, 16]))
    """
    if vars(model).get(STACK):
        raise ValueError("model is adapted (glocal.hf.adapt): restore it first, then prune, then adapt")
    places = _places(model)
    gone: dict[int, set[int]] = {}
    for layer, head in heads:
        if layer not in places:
            raise ValueError(f"heads must be of the {len(places)} layers; one was of layer {layer}")
        gone.setdefault(layer, set()).add(head)
    plans = [_plan(model, places[layer], removed) for layer, removed in gone.items()]
    for plan in plans:
        _apply(plan)


def pruned(model: nn.Module) -> dict[str, list[int]]:
    """Which of the first heads each pruned layer still has, by the path of its attention module.

    >>> layer = Attention(16, 4)
    >>> prune_heads(layer, [(0, 1)])
    >>> pruned(layer)
    {'': [0, 2, 3]}
    """
    return {name: list(vars(module)[_KEPT]) for name, module in model.named_modules() if _KEPT in vars(module)}


def head_counts(model: nn.Module) -> dict[str, int]:
    """How many heads each layer has, by the path of its attention module, in the order of their numbers.

    Raises:
        TypeError, ValueError: as `prune_heads`.

    >>> head_counts(nn.Sequential(Attention(16, 4), Attention(16, 2)))
    {'0': 4, '1': 2}
    """
    return {place.name: _layout(model, place).heads for place in _places(model).values()}


def _places(model: nn.Module) -> dict[int, Place]:
    """Layers by the number that they have in `edit_heads`."""
    places: dict[int, Place] = {}

    def note(place: Place) -> Operator:
        places[len(places)] = place
        return attend

    with intercept(model, note):
        return places


def _layout(model: nn.Module, place: Place) -> _Layout:
    module = place.module
    where = f"{place.name or 'the layer'} ({type(module).__name__})"
    inputs, by_head, out = _ours(module, where) if isinstance(module, Attention) else _theirs(model, place)
    size = next((int(getattr(module, name)) for name in _HEAD_DIMS if getattr(module, name, None)), 0)
    count, left = divmod(_width(out, 1), max(1, size))
    queries = keys = 0
    for linear, parts in inputs:
        width = _width(linear, 0)
        if "q" in parts and len(parts) > 1:  # fused: keys may have fewer heads
            queries, keys = count * size, (width - count * size) // 2
        else:
            queries, keys = queries + width * ("q" in parts), keys + width * ("k" in parts) // len(parts)
    groups = keys // max(1, size)
    known = size and not left and queries == count * size and keys == groups * size
    if not known or (count and (not groups or count % groups or (by_head and groups != count))):
        raise ValueError(f"{where} has projections of sizes that prune_heads does not know")
    those = {id(p) for m in [*(m for m, _ in inputs), out] for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in those and not ("norm" in name and parameter.numel() == size):
            raise ValueError(f"{where} has {name} {tuple(parameter.shape)}, which is of all heads together")
    return _Layout(inputs, by_head, out, size, count, groups)


def _plan(model: nn.Module, place: Place, gone: set[int]) -> _Plan:
    it = _layout(model, place)
    size, count, groups = it.size, it.heads, it.groups
    wrong = sorted(head for head in gone if not 0 <= head < count)
    if wrong:
        raise ValueError(f"heads must be of the {count} of {place.name or 'the layer'}; one was {wrong[0]}")
    kept = [head for head in range(count) if head not in gone]
    keys, group = _regroup(kept, count // max(1, groups))
    own, shared = (_columns(kept, size), count * size), (_columns(keys, size), groups * size)
    blocks = {"q": own, "g": own, "k": shared, "v": shared}
    rows = []
    for linear, parts in it.inputs:
        starts = [sum(blocks[part][1] for part in parts[:n]) for n in range(len(parts))]
        index = torch.cat([blocks[part][0] + start for part, start in zip(parts, starts, strict=True)])
        rows.append((linear, _columns(kept, 3 * size) if it.by_head else index))
    numbers = dict.fromkeys(("num_heads", "num_attention_heads"), (count, len(kept)))
    numbers |= dict.fromkeys(("num_kv_heads", "num_key_value_heads"), (groups, len(keys)))
    numbers |= dict.fromkeys(("split_size", "all_head_size"), (count * size, len(kept) * size))
    numbers["num_key_value_groups"] = (count // max(1, groups), group)
    before = vars(place.module).get(_KEPT, list(range(count)))
    return _Plan(place.module, rows, it.out, own[0], [before[head] for head in kept], numbers, crosses(place.name))


def _ours(layer: Attention, where: str) -> tuple[list[tuple[nn.Module, str]], bool, nn.Module]:
    """Projections, by what their outputs are; whether by heads; the output projection."""
    kind = type(layer)
    for part in ("where", "make", "share", "score", "mix", "combine", "decode", "new_cache", "signals"):
        if getattr(kind, part) is not getattr(Attention, part):
            raise ValueError(f"{where} has a {part} of its own, which may be made for all its heads")
    if layer.lepe is not None or layer.qk_norm == "rms_all":
        what = "lepe" if layer.lepe is not None else "qk_norm='rms_all'"
        raise ValueError(f"{where} has {what}, which is of all heads together")
    inputs = [(layer.q_proj, "q"), (layer.k_proj, "k"), (layer.v_proj, "v")]
    return [*inputs, *([(layer.g_proj, "g")] if layer.g_proj is not None else [])], False, layer.o_proj


def _theirs(model: nn.Module, place: Place) -> tuple[list[tuple[nn.Module, str]], bool, nn.Module]:
    module, children = place.module, dict(place.module.named_children())
    if any(name.rpartition(".")[2] == "relative_attention_bias" for name, _ in model.named_modules()):
        raise ValueError(f"{type(model).__name__} has a table of positions by heads that its layers share")
    out = next((children[name] for name in _OUTPUTS if name in children), None)
    if out is None:  # beside it, as in BERT
        parent = model.get_submodule(place.name.rpartition(".")[0])
        out = getattr(getattr(parent, "output", None), "dense", None)
    layout = next((layout for layout in _BLOCKS if all(name in children for name in layout)), None)
    by_head = layout is None and _BY_HEAD in children
    inputs = [(children[name], parts) for name, parts in ({_BY_HEAD: "qkv"} if by_head else layout or {}).items()]
    linear = [m for m in [*(m for m, _ in inputs), out] if type(m).__name__ in ("Linear", "Conv1D")]
    if out is None or not inputs or len(linear) <= len(inputs):
        raise ValueError(
            f"{place.name} ({type(module).__name__}) is of an architecture that prune_heads does not know: it has "
            f"{', '.join(f'{name} ({type(m).__name__})' for name, m in children.items()) or 'no projections'}"
        )
    return inputs, by_head, out


def _regroup(kept: Sequence[int], group: int) -> tuple[list[int], int]:
    """Key heads that remaining query heads need, in order, some repeated; and query heads of each.

    >>> _regroup([0, 1, 4, 5], 4), _regroup([0, 1, 2, 3, 4, 5], 4), _regroup([3, 4, 5], 4)
    (([0, 1], 2), ([0, 0, 1], 2), ([0, 1, 1], 1))
    """
    counts: dict[int, int] = {}
    for head in kept:
        counts[head // group] = counts.get(head // group, 0) + 1
    each = gcd(*counts.values()) or 1
    return [key for key, count in counts.items() for _ in range(count // each)], each


def _columns(heads: Sequence[int], size: int) -> Tensor:
    """Channels of heads, one head after the other."""
    return (torch.tensor(heads, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def _width(linear: nn.Module, axis: int) -> int:
    """Outputs (axis 0) or inputs (axis 1) of a linear layer; transformers' Conv1D has its weights the other way."""
    weight: Any = linear.weight
    return int(weight.shape[axis if isinstance(linear, nn.Linear) else 1 - axis])


def _apply(plan: _Plan) -> None:
    module = plan.module
    for linear, index in plan.rows:
        _take(linear, index, 0)
    _take(plan.out, plan.columns, 1)
    for name, (before, after) in plan.numbers.items():
        if vars(module).get(name) == before:
            setattr(module, name, after)
    vars(module)[_KEPT] = plan.kept
    if not plan.kept:
        theirs = _their_cross_bias if plan.cross else _their_bias
        vars(module)["forward"] = MethodType(_our_bias if isinstance(module, Attention) else theirs, module)


@torch.no_grad()
def _take(linear: Any, index: Tensor, axis: int) -> None:
    plain = isinstance(linear, nn.Linear)
    for name, dim in (("weight", axis if plain else 1 - axis), ("bias", 0)):
        old = getattr(linear, name)
        if old is None or (name == "bias" and axis == 1):
            continue
        part = old.index_select(dim, index.to(old.device))
        setattr(linear, name, nn.Parameter(part, requires_grad=old.requires_grad))
    name = (("out_features", "in_features") if plain else ("nf", "nx"))[axis]
    setattr(linear, name, len(index))


def _bias(out: Any, x: Tensor) -> Tensor:
    bias = x.new_zeros(_width(out, 0)) if out.bias is None else out.bias
    return bias.expand(*x.shape[:-1], -1).to(x.dtype)


def _our_bias(layer: Attention, x: Tensor, *given: Any, **options: Any) -> Tensor:
    """What a layer without heads gives."""
    return _bias(layer.o_proj, x)


def _their_bias(module: Any, hidden_states: Tensor, *given: Any, **options: Any) -> tuple[Tensor, None]:
    """The same in transformers; where the output projection lies beside the module, an input without channels."""
    from transformers import Cache

    cache = next((each for each in (*given, *options.values()) if isinstance(each, Cache)), None)
    if cache is not None:  # which counts tokens by their keys
        one = hidden_states.new_zeros(*hidden_states.shape[:-1], 1)[:, None]
        getattr(cache, "self_attention_cache", cache).update(one, one, module.layer_idx)
    return _their_cross_bias(module, hidden_states)


def _their_cross_bias(module: nn.Module, hidden_states: Tensor, *given: Any, **options: Any) -> tuple[Tensor, None]:
    """Of a layer whose keys come from another sequence."""
    out = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
    return (hidden_states[..., :0] if out is None else _bias(out, hidden_states)), None
