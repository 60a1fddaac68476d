"""S092: torch's own module with the weights that the embeddings amount to, one head n times, loops, counts."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from glocal.models.language.transformer import Transformer
from glocal.nn import (
    Attention,
    HeadEmbeddingAttention,
    KnockingHeadsAttention,
    MixtureOfHeadsAttention,
    Rope,
    SlidingWindowAttention,
)

DIM, HEADS, LENGTH = 24, 4, 9
FORMS = ("mul", "add")


class Sliding(HeadEmbeddingAttention, SlidingWindowAttention):
    """Both mechanisms."""


class All(KnockingHeadsAttention, HeadEmbeddingAttention, MixtureOfHeadsAttention):
    """Three mechanisms with different parts; `form` goes to the first of them."""


def make(kind=HeadEmbeddingAttention, dim=DIM, heads=HEADS, **options):
    torch.manual_seed(0)
    layer = kind(dim, heads, **options).double()
    for name, p in layer.named_parameters():
        if "_embedding" in name:
            torch.nn.init.normal_(p)
    return layer


def tokens(length=LENGTH, dim=DIM):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_by_loops(layer, x, mask, context=None):
    """Outputs of the heads, ``(B, H, N, D)``, one head after the other, by the section's formulas."""
    group, outs = layer.num_heads // layer.num_kv_heads, []
    context = x if context is None else context
    for h in range(layer.num_heads):
        parts = []
        for name, t, own in (("q", x, h), ("k", context, h // group), ("v", context, h // group)):
            e = getattr(layer, f"{name}_embedding")[own]
            made = t @ getattr(layer, f"{name}_proj").weight.T
            parts.append(made + e if layer.form == "add" else made * (1 + e))
        outs.append(scaled_dot_product_attention(*parts, attn_mask=mask))
    return torch.stack(outs, 1)


def join(layer, heads):
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_head_by_itself(form, kv_heads):
    layer, x = make(form=form, num_kv_heads=kv_heads, causal=True), tokens()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask)))
    layer, context = make(form=form, num_kv_heads=kv_heads, kv_dim=10), tokens(5, 10)
    torch.testing.assert_close(layer(x, context), join(layer, heads_by_loops(layer, x, None, context)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
def test_in_a_sliding_window(form, backend):
    layer, x = make(Sliding, form=form, window=3, causal=True, backend=backend), tokens()
    i = torch.arange(LENGTH)
    mask = (i[:, None] - 3 < i) & (i <= i[:, None])
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask)))


def test_with_knocking_and_a_mixture_of_heads():
    layer, x = make(All, form="linear", on="v", shared_heads=1, top_k=2), tokens()
    out = layer(x)
    heads = join(layer, layer.gates.unsqueeze(-1) * heads_by_loops(layer, x, None))
    torch.testing.assert_close(out, heads)
    # The weights of softmax attention add up to 1 and multiply values: T can be applied after them.
    torch.nn.init.normal_(layer.v_share.weight)
    heads = heads_by_loops(layer, x, None) @ layer.v_share.weight
    torch.testing.assert_close(layer(x), join(layer, layer.gates.unsqueeze(-1) * heads))


def test_on_a_grid_heads_are_those_of_the_flattened_grid():
    layer, x = make(), tokens(12)
    torch.testing.assert_close(layer(x.view(2, 3, 4, DIM)).flatten(1, 2), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_without_embeddings_each_head_is_a_single_head(form):
    layer, x = make(form=form), tokens()
    for name in "qkv":
        torch.nn.init.zeros_(getattr(layer, f"{name}_embedding"))
    single = Attention(DIM, 1, head_dim=DIM // HEADS).double()
    single.load_state_dict(layer.state_dict() | {"o_proj.weight": layer.o_proj.weight[:, :6]}, strict=False)
    one = scaled_dot_product_attention(layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    torch.testing.assert_close(layer(x), layer.o_proj(torch.cat([one] * HEADS, -1)))
    torch.testing.assert_close(single(x), single.o_proj(one))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_own_module_has_the_same_with_weights_of_each_head(form, bias):
    layer, x, context = make(form=form, qkv_bias=bias), tokens(), tokens(5)
    peer = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        weights, biases = [], []
        for name in "qkv":
            proj, embedding = getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_embedding")
            own = proj.bias if bias else torch.zeros(6, dtype=torch.float64)
            for e in embedding:
                weights.append(torch.diag(1 + e) @ proj.weight if form == "mul" else proj.weight)
                biases.append(own * (1 + e) if form == "mul" else own + e)
        peer.in_proj_weight.copy_(torch.cat(weights))
        peer.in_proj_bias.copy_(torch.cat(biases))
        peer.out_proj.weight.copy_(layer.o_proj.weight)
        peer.out_proj.bias.zero_()
    torch.testing.assert_close(layer(x, context), peer(x, context, context)[0])


def test_added_to_keys_an_embedding_cancels_without_positions():
    x, found = tokens(), {}
    for options in ((), ("rope",), ("qk_norm",)):
        layer = make(form="add", causal=True, **{name: {"rope": Rope(), "qk_norm": "rms"}[name] for name in options})
        before = layer(x)
        gradient = torch.autograd.grad(before.square().sum(), layer.k_embedding)[0]
        torch.nn.init.normal_(layer.k_embedding, std=3.0)
        found[options] = torch.allclose(layer(x), before), float(gradient.abs().max()) < 1e-12
    assert found == {(): (True, True), ("rope",): (False, False), ("qk_norm",): (False, False)}


def test_added_to_values_an_embedding_is_a_constant():
    layer, x = make(form="add"), tokens()
    before, shift = layer(x), torch.randn(HEADS, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.v_embedding += shift
    torch.testing.assert_close(layer(x), before + layer.o_proj.weight @ shift.flatten())


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    layer, x = make(dim=6, heads=3, form=form, causal=True, rope=Rope()), tokens(3, 6)
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,)), inputs
    )


@pytest.mark.parametrize(("heads", "width", "added", "saved"), [(8, 16, 384, 42624), (4, 8, 96, 2208)])
def test_counts_of_parameters_are_those_of_the_paper(heads, width, added, saved):
    dim = heads * width
    layer, full, single = (
        HeadEmbeddingAttention(dim, heads),
        Attention(dim, heads),
        Attention(dim, 1, head_dim=width),
    )

    def count(part, projections=False):
        return sum(p.numel() for name, p in part.named_parameters() if not (projections and "o_proj" in name))

    assert count(layer, True) - count(single, True) == added == 3 * heads * width
    assert count(full) - count(layer) == saved == (3 * heads**2 - 3 * heads) * width**2 - 3 * heads * width
    assert layer.o_proj.weight.shape == (dim, dim) and single.o_proj.weight.shape == (dim, width)


def test_embeddings_start_small_and_outlive_initialisers_of_linear_layers():
    model = Transformer(11, 512, [lambda dim: HeadEmbeddingAttention(dim, 8, causal=True)])
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name in "qkv":
        embedding = getattr(model.blocks[0].attention, f"{name}_embedding")
        assert 0.017 < float(embedding.detach().std()) < 0.023 and abs(float(embedding.detach().mean())) < 0.004


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cat"}, "form must be 'mul' or 'add'; it was 'cat'"),
        ({"project": False}, "project must be True for HeadEmbeddingAttention"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        HeadEmbeddingAttention(DIM, HEADS, **options)
