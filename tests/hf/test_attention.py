"""The swap: equal to transformers' own attention where it must be, and gone without a trace afterwards."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    MistralConfig,
    MistralModel,
)

from glocal import Full, Sliding
from glocal.hf import adapt, attention, recorded
from glocal.patterns import from_hf
from tests import oracle


def bert(**more) -> BertModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    return BertModel(BertConfig(**sizes, max_position_embeddings=64, **more), add_pooling_layer=False).eval()


def mistral(window: int | None, implementation: str = "sdpa") -> MistralModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=37,
        sliding_window=window,
    )
    config._attn_implementation = implementation
    model = MistralModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # large enough that attention is far from even
    return model


def tokens(batch: int = 3, length: int = 21, pad: int = 0, left: bool = False):
    ids = torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(batch):
        hidden = slice(0, row * pad) if left else slice(length - row * pad, length)
        mask[row, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


def states(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).last_hidden_state


def close(a, b, mask, atol=1e-5):
    assert torch.allclose(a[mask.bool()], b[mask.bool()], atol=atol), (a - b)[mask.bool()].abs().max()


@pytest.mark.parametrize("pad", [0, 4])
@pytest.mark.parametrize("left", [False, True])
def test_full_is_sdpa(pad, left):
    model, batch = bert(), tokens(pad=pad, left=left)
    before = states(model, batch)
    with adapt(model, "full()") as handle:
        assert handle.model is model
        close(before, states(model, batch), batch["attention_mask"])
    assert torch.equal(before, states(model, batch))


def test_padding_never_reaches_real_tokens():
    model, batch = bert(), tokens(pad=4)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    with adapt(model, Sliding(5, 5)):
        close(states(model, batch), states(model, other), batch["attention_mask"], 0)
        assert not torch.allclose(states(model, batch), states(model, {"input_ids": batch["input_ids"]}))


def test_pattern_means_what_it_says():
    """A witness from outside: the pattern's mask, given to transformers' own eager attention."""
    model, batch = bert(), tokens()
    with adapt(model, "sliding(2, 1) | tokens([0])"):
        mine = states(model, batch)
    from glocal import parse

    four = parse("sliding(2, 1) | tokens([0])").mask(21).expand(3, 1, 21, 21)
    model.set_attn_implementation("eager")
    theirs = states(model, {**batch, "attention_mask": torch.where(four, 0.0, torch.finfo(torch.float32).min)})
    close(mine, theirs, batch["attention_mask"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pad,left", [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("window", [None, 5, 64])
def test_mistral_window_is_from_hf(implementation, pad, left, window):
    model, batch = mistral(window, implementation), tokens(pad=pad, left=left)
    theirs = states(model, batch)
    with adapt(model, from_hf(window)):
        close(theirs, states(model, batch), batch["attention_mask"], 2e-5)
    with adapt(model, "full()"):  # still causal, still in its window
        close(theirs, states(model, batch), batch["attention_mask"], 2e-5)
    with adapt(model, "full()", own_window=False):
        wide = states(model, batch)
    close(states(mistral(None), batch), wide, batch["attention_mask"], 2e-5)
    if window == 5:
        assert not torch.allclose(wide, theirs, atol=1e-3)


def test_decoding_with_a_cache():
    model, batch = mistral(5), tokens(batch=2, length=11)
    whole = states(model, batch)
    with adapt(model, from_hf(5)):
        cache, steps = DynamicCache(), []
        for t in range(11):
            ids = batch["input_ids"][:, t : t + 1]
            with torch.no_grad():
                steps.append(model(input_ids=ids, cache=cache, use_cache=True).last_hidden_state)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=2e-5)


def test_packed_documents_stay_apart():
    model = mistral(None)
    ids = tokens(batch=1, length=12)["input_ids"]
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        with adapt(model, "full()"):
            mine = model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
    assert torch.allclose(mine, theirs, atol=2e-5)


def test_four_dimensional_mask_is_kept():
    model, batch = bert(), tokens()
    four = torch.rand(3, 1, 21, 21, generator=torch.Generator().manual_seed(2)) < 0.5
    four |= torch.eye(21, dtype=torch.bool)
    batch["attention_mask"] = four
    theirs = states(model, batch)
    with adapt(model, Full()):
        assert torch.allclose(states(model, batch), theirs, atol=1e-5)


def test_a_pattern_for_each_layer():
    model, batch = bert(), tokens()
    with adapt(model, ["sliding(1, 1)", "full()"]):
        one = states(model, batch)
    with adapt(model, lambda module: Sliding(1, 1) if module.layer_idx == 0 else Full()):
        assert torch.equal(one, states(model, batch))
    with adapt(model, ["full()", "sliding(1, 1)"]):
        assert not torch.allclose(one, states(model, batch), atol=1e-4)


def registries():
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_is_left_as_it_was(implementation):
    model, batch = bert(), tokens()
    model.set_attn_implementation(implementation)
    before, known = model.config.to_dict(), registries()
    with pytest.raises(RuntimeError, match="mine"), adapt(model, Full()), adapt(model, Sliding(1, 1)):
        assert len(registries()[0]) == len(known[0]) + 2
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="Window"), adapt(model, "window(99)"):
        states(model, batch)
    with recorded(model, ["full()"]):
        states(model, batch)
    assert registries() == known and model.config.to_dict() == before
    assert model.config._attn_implementation == implementation


def test_nested_swaps_and_two_models():
    model, other, batch = bert(), bert(), tokens()
    with adapt(model, Sliding(1, 1)):
        narrow = states(model, batch)
        with adapt(other, Full()), adapt(model, Full()):
            assert torch.equal(states(other, batch), states(model, batch))
        assert torch.equal(states(model, batch), narrow)


def test_gradients_and_dropout():
    model, batch = bert(attention_probs_dropout_prob=0.5), tokens(pad=2)
    with adapt(model.train(), Sliding(3, 3)):
        out = model(**batch).last_hidden_state
        out.square().sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "attention" in name]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in grads if g.dim() > 1)


class Plain(torch.nn.Module):
    is_causal = True


def test_core_against_the_oracle():
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, 5), (2, 9), (2, 9)))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    out, weights = attention(Plain(), q, k, v, real, where=Sliding(3, 3), scaling=0.3, softcap=2.0)
    assert weights is None and out.shape == (2, 5, 4, 8)
    past = torch.arange(9) <= torch.arange(5)[:, None] + 4
    mask = (Sliding(3, 3).mask(5, 9) & past)[None, None] & real[:, None, None]
    expected, _ = oracle.attend(q, k, v, mask, scale=0.3, softcap=2.0)
    assert torch.allclose(out.transpose(1, 2).double(), expected, atol=1e-5)


def test_refusals():
    model, batch = bert(), tokens()
    for wrong, kind, word in [
        (3, TypeError, "where"),
        ("nonsense(", ValueError, "nonsense"),
        (["full()"], ValueError, "2 layers"),
        (["full()", 3], TypeError, "where"),
    ]:
        with pytest.raises(kind, match=word), adapt(model, wrong):
            pass
    with pytest.raises(TypeError, match="PreTrainedModel"), adapt(torch.nn.Linear(2, 2), Full()):
        pass
    q = torch.randn(1, 1, 3, 4)
    for name in ("s_aux", "head_mask", "output_attentions"):
        with pytest.raises(ValueError, match=name):
            attention(Plain(), q, q, q, None, where=Full(), **{name: True})
    with pytest.raises(ValueError, match="2 or 4 axes"):
        attention(Plain(), q, q, q, torch.ones(1, 1, 3), where=Full())
    with pytest.raises(ValueError, match="backend"), adapt(model, Full(), backend="abacus"):
        states(model, batch)


def test_a_model_without_the_registry():
    model = bert()
    model._can_set_attn_implementation = lambda: False
    with pytest.raises(TypeError, match="registry"), adapt(model, Full()):
        pass
