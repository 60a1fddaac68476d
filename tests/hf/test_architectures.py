"""Every architecture: full attention is the model's own, a pattern is what its mask does to eager attention."""

import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from glocal import Full, PerHead, Sinks, Sliding, parse
from glocal.hf import adapt
from glocal.hf.install import attention_modules, crosses
from glocal.patterns import Block, Causal, Pattern
from tests.hf import models

PADDINGS = [(None, False), (0, False), (4, False), (4, True)]
PATTERN = parse("sliding(3, 2) | tokens([0, 7])")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def state(model) -> dict[str, Any]:
    """Everything that an adaptation could leave behind."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "config": [dict(vars(config)) for config in configs.values()],
        "vars": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
    }


@pytest.mark.parametrize("name", models.TABLE)
def test_full_is_the_models_own_attention(name):
    model = models.build(name)
    before, first = state(model), models.inputs(name)
    known = models.outputs(model, first)
    for pad, left in PADDINGS if name in models.TOKENS else PADDINGS[:1]:
        batch = models.inputs(name, pad=pad, left=left)
        own = models.real_only(name, models.outputs(model, batch), batch)
        assert own.isfinite().all()
        with adapt(model, "full()") as handle:
            assert list(handle.where) == [p for p in attention_modules(model) if not crosses(p)]
            mine = models.real_only(name, models.outputs(model, batch), batch)
        assert far(mine, own) < 2e-6
    handle = adapt(model, "sliding(1, 1)")
    assert far(models.outputs(model, first), known) > 1e-4
    handle.restore()
    assert state(model) == before
    assert torch.equal(models.outputs(model, first), known)


def mask_instead(model, chosen: dict[str, Pattern]) -> list[Any]:
    """Hooks that hand a pattern's mask, with causality in it, to a model's own attention, whatever its own masks."""

    def hook(path: str, signature: inspect.Signature) -> Any:
        at = "mask" if "mask" in signature.parameters else "attention_mask"

        def give(module, args, kwargs):
            given = dict(signature.bind(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
            live = chosen[path].mask(given["hidden_states"].shape[1])
            if given.get("is_causal", module.is_causal):
                live = live & torch.ones_like(live).tril()
            bias = torch.zeros(live.shape).masked_fill(~live, torch.finfo(torch.float32).min)
            return (), given | {at: bias.view((1,) * (4 - bias.dim()) + bias.shape)}

        return give

    modules = attention_modules(model)
    return [
        modules[path].register_forward_pre_hook(hook(path, inspect.signature(modules[path].forward)), with_kwargs=True)
        for path in chosen
    ]


def own_mask(model, name: str) -> dict[str, Pattern]:
    """What is left of the models' own masks where own_window is False: chunks."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 9
    chunked = [kind == "chunked_attention" for kind in kinds]
    paths = models.own_attention(model)
    return {p: Block(5) if name == "llama4" and chunked[i] else Full() for i, p in enumerate(paths)}


@pytest.mark.parametrize("heads", ["all", "each"])
@pytest.mark.parametrize("name", models.TABLE)
def test_a_pattern_is_its_mask(name, heads):
    """A witness from outside: the mask of the pattern, given to transformers' own eager attention."""
    pattern = PATTERN if heads == "all" else PerHead([Sliding(1, 1), PATTERN, Full(), Sliding(4, 0) | Sinks(2)])
    model, batch = models.build(name, "eager"), models.inputs(name)
    with adapt(model, pattern, own_window=False):
        mine = models.outputs(model, batch)
    plain = models.outputs(model, batch)
    hooks = mask_instead(model, {p: pattern & own for p, own in own_mask(model, name).items()})
    theirs = models.outputs(model, batch)
    assert far(mine, theirs) < 2e-6 and far(plain, theirs) > 1e-4
    for one in hooks:
        one.remove()


def test_the_witness_by_the_models_own_argument():
    """The same through the argument that models take: a mask of pairs."""
    for name in ("llama", "gpt2", "bert"):
        model, batch = models.build(name, "eager"), models.inputs(name)
        with adapt(model, PATTERN):
            mine = models.outputs(model, batch)
        live = (PATTERN & Causal() if name != "bert" else PATTERN).mask(21).expand(3, 1, 21, 21)
        bias = torch.where(live, 0.0, torch.finfo(torch.float32).min)
        assert far(mine, models.outputs(model, batch | {"attention_mask": bias})) < 2e-6
        # What a user's own mask says is kept beside the pattern, floats or booleans.
        more = torch.rand(3, 1, 21, 21, generator=torch.Generator().manual_seed(4)) < 0.7
        more = (
            more | torch.eye(21, dtype=torch.bool) if name == "bert" else more.tril() | torch.eye(21, dtype=torch.bool)
        )
        theirs = models.outputs(model, batch | {"attention_mask": bias.masked_fill(~more, bias.min())})
        with adapt(model, PATTERN):
            for mask in (torch.where(more, 0.0, bias.min()), more):
                assert far(models.outputs(model, batch | {"attention_mask": mask}), theirs) < 2e-6


def windowed(name: str, types: list[str]):
    """A model with a window of 5 in the sliding layers, and the same weights without."""
    more: dict[str, Any] = {"layer_types": types}
    if name == "mistral":
        more = {}
    if name.startswith("qwen"):
        more |= {"use_sliding_window": True, "max_window_layers": 0}
    narrow = models.build(name, **more, sliding_window=5)
    wide_types = {} if name == "mistral" else {"layer_types": ["full_attention"] * 2}
    wide = models.build(name, **wide_types, sliding_window=None if name == "mistral" else 5)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide


WINDOWED = [
    ("mistral", ["sliding_attention"] * 2),
    ("qwen2", ["sliding_attention"] * 2),
    ("qwen2", ["full_attention", "sliding_attention"]),
    ("qwen3", ["sliding_attention", "full_attention"]),
    ("gemma2", ["sliding_attention", "full_attention"]),
    ("gemma2", ["full_attention", "sliding_attention"]),
]


@pytest.mark.parametrize("pad,left", PADDINGS)
@pytest.mark.parametrize("name,types", WINDOWED)
def test_causal_and_sliding_is_the_models_own_window(name, types, pad, left):
    narrow, wide = windowed(name, types)
    batch = models.inputs(name, pad=pad, left=left)
    theirs = models.real_only(name, models.outputs(narrow, batch), batch)
    plain = models.real_only(name, models.outputs(wide, batch), batch)
    assert far(plain, theirs) > 1e-4
    patterns = ["causal() & sliding(4, 0)" if kind == "sliding_attention" else "full()" for kind in types]
    with adapt(wide, patterns):
        assert far(models.real_only(name, models.outputs(wide, batch), batch), theirs) < 2e-6
    with adapt(narrow, patterns, own_window=False):
        assert far(models.real_only(name, models.outputs(narrow, batch), batch), theirs) < 2e-6
    with adapt(narrow, own_window=False):
        assert far(models.real_only(name, models.outputs(narrow, batch), batch), plain) < 2e-6


def test_gemma3_and_modernbert_windows():
    """Their sliding layers have rotary angles of their own, so there the window alone is exchanged."""
    for name, pattern in (("gemma3", "causal() & sliding(4, 0)"), ("modernbert", "sliding(4, 4)")):
        model, batch = models.build(name), models.inputs(name, pad=3, left=True)
        kinds = model.config.layer_types
        assert "sliding_attention" in kinds
        theirs = models.real_only(name, models.outputs(model, batch), batch)
        patterns = [pattern if kind == "sliding_attention" else "full()" for kind in kinds]
        with adapt(model, patterns, own_window=False):
            assert far(models.real_only(name, models.outputs(model, batch), batch), theirs) < 2e-6
        with adapt(model, own_window=False):
            assert far(models.real_only(name, models.outputs(model, batch), batch), theirs) > 1e-4


def test_only_adapted_layers_lose_their_window():
    model, batch = models.build("gemma3", layer_types=["sliding_attention"] * 2), models.inputs("gemma3")
    theirs = models.outputs(model, batch)
    with adapt(model, {0: "full()", 1: "sliding(4, 0)"}, own_window=False):
        first = models.outputs(model, batch)
    with adapt(model, layers=[0], own_window=False):
        assert far(models.outputs(model, batch), first) < 2e-6
        with adapt(model, layers=[0]):  # the newer one has it again
            assert far(models.outputs(model, batch), theirs) < 2e-6
    assert far(first, theirs) > 1e-4


@pytest.mark.parametrize("name", ["bert", "gpt2", "whisper", "t5"])
def test_cross_attention(name):
    """Untouched by default; adapted where it is named."""
    more = {} if name in ("whisper", "t5") else {"add_cross_attention": True}
    if name == "bert":
        more["is_decoder"] = True
    model = models.build(name, "eager", **more)
    batch = models.inputs(name)
    if more:
        states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(5))
        batch |= {"encoder_hidden_states": states, "encoder_attention_mask": models.padding(3, 9, 2, False)}
    elif name == "t5":
        batch["attention_mask"] = models.padding(3, 21, 3, False)
    own = models.outputs(model, batch)
    cross = [path for path in attention_modules(model) if crosses(path)]
    assert len(cross) == 2
    with adapt(model) as handle:
        assert not set(cross) & set(handle.where)
        assert far(models.outputs(model, batch), own) < 2e-6
    expression = "crossattention|encoder_attn|EncDecAttention"
    with adapt(model, "full()", layers=expression) as handle:
        assert list(handle.where) == cross
        assert far(models.outputs(model, batch), own) < 2e-6
    with adapt(model, "prefix(2)", layers=expression):
        named = models.outputs(model, batch)
    with adapt(model, {path: "prefix(2)" for path in cross}):
        assert torch.equal(models.outputs(model, batch), named)
    assert far(named, own) > 1e-4
    # The witness: only the first two tokens of the encoder exist. A mask of keys says that, where the model takes it.
    if more:
        keys = batch["encoder_attention_mask"] * (torch.arange(9) < 2)
        assert far(models.outputs(model, batch | {"encoder_attention_mask": keys}), named) < 2e-6
