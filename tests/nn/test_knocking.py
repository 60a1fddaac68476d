"""S056: at the start torch's attention, then loops over heads and tokens, folded weights, torch's own module."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from glocal.models.language.transformer import Transformer
from glocal.nn import (
    Attention,
    KnockingHeadsAttention,
    MixtureOfHeadsAttention,
    Rope,
    SlidingWindowAttention,
    no_weight_decay,
)

DIM, HEADS, LENGTH = 24, 4, 9
FORMS = ("mlp", "linear")
ON = ("q", "k", "v", "qk", "qkv")


class Sliding(KnockingHeadsAttention, SlidingWindowAttention):
    """Both mechanisms."""


class Mixture(KnockingHeadsAttention, MixtureOfHeadsAttention):
    """Both mechanisms."""


def make(kind=KnockingHeadsAttention, dim=DIM, heads=HEADS, random=True, **options):
    torch.manual_seed(0)
    layer = kind(dim, heads, **options).double()
    for name, p in layer.named_parameters():
        if "_share" in name and random:
            torch.nn.init.normal_(p, std=0.5)
    return layer


def tokens(length=LENGTH, dim=DIM, dtype=torch.float64):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


def shared(layer, name, x):
    """What the section says that becomes of one head's vector."""
    if name not in layer.on:
        return x
    if layer.form == "linear":
        return x @ getattr(layer, f"{name}_share").weight
    part = getattr(layer, f"{name}_share")
    return 2 * ((x @ part.up_weight) / (1 + (-(x @ part.gate_weight)).exp())) @ part.down_weight


def heads_by_loops(layer, x, mask):
    """Outputs of the heads, ``(B, H, N, D)``, each head and token on its own."""
    count = {"q": layer.num_heads, "k": layer.num_kv_heads, "v": layer.num_kv_heads}
    t = {}
    for name in "qkv":
        weight = getattr(layer, f"{name}_proj").weight.view(count[name], layer.head_dim, -1)
        t[name] = torch.stack(
            [torch.stack([torch.stack([shared(layer, name, w @ token) for token in row]) for w in weight]) for row in x]
        )
    group = layer.num_heads // layer.num_kv_heads
    return torch.stack(
        [
            scaled_dot_product_attention(t["q"][:, h], t["k"][:, h // group], t["v"][:, h // group], attn_mask=mask)
            for h in range(layer.num_heads)
        ],
        1,
    )


def join(layer, heads):
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", [None, *ON])
def test_at_the_start_it_is_torchs_attention_exactly(form, on):
    trained = Attention(DIM, HEADS, num_kv_heads=2, causal=True)
    layer, x = KnockingHeadsAttention.from_attention(trained, form=form, on=on), tokens(dtype=torch.float32)
    assert torch.equal(layer(x), trained(x))
    q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (trained.q_proj, trained.k_proj, trained.v_proj))
    torch.testing.assert_close(
        layer(x), join(trained, scaled_dot_product_attention(q, k, v, None, 0, True, enable_gqa=True))
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_and_token_by_itself(form, kv_heads, causal):
    layer, x = make(form=form, on="qkv", num_kv_heads=kv_heads, causal=causal), tokens()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask.tril() if causal else mask)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
def test_in_a_sliding_window(form, backend):
    layer, x = make(Sliding, form=form, on="qkv", window=3, causal=True, backend=backend), tokens()
    i = torch.arange(LENGTH)
    mask = (i[:, None] - 3 < i) & (i <= i[:, None])
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask)))


def test_with_a_mixture_of_heads():
    layer, x = make(Mixture, form="linear", shared_heads=1, top_k=2, causal=True), tokens()
    out = layer(x)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    torch.testing.assert_close(out, join(layer, layer.gates.unsqueeze(-1) * heads_by_loops(layer, x, mask)))
    assert bool((layer.gates == 0).any())


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("norm", [None, "rms", "layer", "rms_all"])
def test_folded_weights_compute_the_same(on, norm):
    options = {"qkv_bias": True, "num_kv_heads": 2, "qk_norm": norm, "rope": Rope(), "causal": True, "kv_dim": 20}
    layer, x, context = make(form="linear", on=on, **options), tokens(), tokens(11, 20)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    folded = layer.fold()
    assert type(folded) is Attention and folded.o_proj.weight is not layer.o_proj.weight
    torch.testing.assert_close(folded(x, context), layer(x, context))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in layer.parameters()) - 36 * len(on)


def test_folding_in_float32_is_near_and_keeps_the_mode():
    layer, x = make(form="linear").float().eval(), tokens(dtype=torch.float32)
    folded = layer.fold()
    torch.testing.assert_close(folded(x), layer(x), atol=2e-6, rtol=1e-5)
    assert not folded.training and folded.q_proj.weight.dtype == torch.float32
    assert all(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("heads", [1, 4])
def test_torchs_own_module_with_multiplied_weights_is_the_linear_form(heads):
    layer, x = make(heads=heads, form="linear", qkv_bias=True, out_bias=True), tokens()
    peer = torch.nn.MultiheadAttention(DIM, heads, batch_first=True).double()
    with torch.no_grad():
        weights, biases = [], []
        for name in "qkv":
            # A row vector x W^T is multiplied by T from the right, in every head.
            whole = torch.block_diag(*[getattr(layer, f"{name}_share").weight] * heads)
            weights.append(whole.T @ getattr(layer, f"{name}_proj").weight)
            biases.append(getattr(layer, f"{name}_proj").bias @ whole)
        peer.in_proj_weight.copy_(torch.cat(weights))
        peer.in_proj_bias.copy_(torch.cat(biases))
        peer.out_proj.load_state_dict(layer.o_proj.state_dict())
    torch.testing.assert_close(layer(x), peer(x, x, x)[0])


@pytest.mark.parametrize("form", FORMS)
def test_heads_in_another_order_give_the_same(form):
    layer, other, x, order = make(form=form, on="qkv"), make(form=form, on="qkv"), tokens(), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer, name).weight.unflatten(0, (HEADS, -1))
            getattr(other, name).weight.copy_(weight[order].flatten(0, 1))
        other.o_proj.weight.copy_(layer.o_proj.weight.unflatten(1, (HEADS, -1))[:, order].flatten(1))
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    layer, x = make(dim=6, heads=2, form=form, on="qkv", causal=True), tokens(3, 6)
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,)), inputs
    )


@pytest.mark.parametrize("form", FORMS)
def test_three_small_matrices_more(form):
    count = [sum(p.numel() for p in kind(64, 8).parameters()) for kind in (Attention, KnockingHeadsAttention)]
    assert count[1] - count[0] == 3 * 8**2
    layer = KnockingHeadsAttention(64, 8, form=form)
    assert sum(p.numel() for p in layer.parameters()) - count[0] == 3 * 8**2


@pytest.mark.parametrize("form", FORMS)
def test_operations_more_than_plain_attention(form):
    dim, heads, length, work = 64, 8, 50, []
    for layer in (Attention(dim, heads), KnockingHeadsAttention(dim, heads, form=form)):
        x = torch.randn(1, length, dim, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            out = layer(x)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        work.append((forward.get_total_flops(), backward.get_total_flops()))
    more = 6 * length * dim**2 // heads
    assert (work[1][0] - work[0][0], work[1][1] - work[0][1]) == (more, 2 * more)


@pytest.mark.parametrize("form", FORMS)
def test_the_identity_outlives_initialisers(form):
    def layer(dim):
        return KnockingHeadsAttention(dim, 2, form=form, on="qkv", causal=True)

    model = Transformer(11, 16, [layer] * 2)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for block in model.blocks:
        x = torch.randn(1, 2, 5, 8)
        assert all(torch.equal(a, x) for a in block.attention.share(x, x, x))


@pytest.mark.parametrize("form", FORMS)
def test_the_identity_outlives_weight_decay_where_it_is_spared(form):
    model = Transformer(11, 16, [lambda dim: KnockingHeadsAttention(dim, 2, form=form, on="qv", causal=True)] * 2)
    names = no_weight_decay(model)
    ends = ["weight"] if form == "linear" else ["up_weight", "down_weight"]
    assert names == {f"blocks.{n}.attention.{t}_share.{end}" for n in range(2) for t in "qv" for end in ends}
    assert no_weight_decay(model.blocks[0].attention.q_share) == set(ends)
    spared = [p for name, p in model.named_parameters() if name in names]
    others = [p for name, p in model.named_parameters() if name not in names]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": spared, "weight_decay": 0.0}], weight_decay=1.0)
    before = model.blocks[0].attention.q_proj.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, torch.eye(8)) for p in spared)
    torch.testing.assert_close(model.blocks[0].attention.q_proj.weight, before * (1 - 1e-3))


def test_a_conversion_keeps_settings_and_weights():
    settings = {"num_kv_heads": 2, "kv_dim": 20, "qkv_bias": True, "qk_norm": "rms", "rope": Rope(500.0), "scale": 0.3}
    trained = Attention(DIM, HEADS, softcap=5.0, gate=True, causal=True, **settings).double().eval()
    layer, x, context = KnockingHeadsAttention.from_attention(trained), tokens(5), tokens(9, 20)
    assert torch.equal(layer(x, context), trained(x, context))
    assert not layer.training and layer.v_share.up_weight.dtype == torch.float64
    assert layer.q_proj.weight is not trained.q_proj.weight
    with pytest.raises(ValueError, match="layer must be plain Attention; it was Sliding"):
        KnockingHeadsAttention.from_attention(SlidingWindowAttention(16, 2, window=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "silu"}, "form must be 'mlp' or 'linear'; it was 'silu'"),
        ({"on": ""}, "on must be letters of 'qkv'"),
        ({"on": "qx"}, "on must be letters of 'qkv', each at most once; it was 'qx'"),
        ({"on": "vv"}, "each at most once"),
        ({"project": False}, "project must be True for KnockingHeadsAttention"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        KnockingHeadsAttention(DIM, HEADS, **options)


def test_refuses_to_fold_what_is_not_a_matrix_or_not_alone():
    with pytest.raises(ValueError, match=r"fold needs form 'linear'.*it was 'mlp'"):
        KnockingHeadsAttention(DIM, HEADS).fold()
    with pytest.raises(ValueError, match="fold is for KnockingHeadsAttention alone; it was Sliding"):
        Sliding(DIM, HEADS, form="linear").fold()
