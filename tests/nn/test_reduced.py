"""S065: torch's own module on multiplied weights, loops over tokens, kernels whose effect is known, counts, leaks."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from glocal.inspect import verify
from glocal.models.language.transformer import Transformer
from glocal.nn import (
    USES,
    Attention,
    KnockingHeadsAttention,
    MixtureOfHeadsAttention,
    OptimisedAttention,
    Rope,
    SliceAttention,
    SlidingWindowAttention,
    SuperAttention,
    no_weight_decay,
)
from tests.nn.layers import steps

DIM, HEADS, LENGTH, LONGEST = 24, 4, 9, 12
KINDS = (OptimisedAttention, SliceAttention, SuperAttention)


def make(kind, dim=DIM, heads=HEADS, **options):
    """A layer whose alignment kernel, if it has one, is random."""
    torch.manual_seed(0)
    if issubclass(kind, SuperAttention):
        options = {"max_length": LONGEST} | options
    layer = kind(dim, heads, **options).double()
    for name, p in layer.named_parameters():
        if "alignment" in name:
            torch.nn.init.normal_(p, std=0.5)
    return layer


def tokens(length=LENGTH, dim=DIM):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def join(layer, heads):
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


def slices(t, heads=HEADS):
    """Features h D to (h + 1) D - 1 for each head h."""
    width = t.shape[-1] // heads
    return torch.stack([t[..., h * width : (h + 1) * width] for h in range(heads)], 1)


def values_by_loops(layer, context):
    """A head's slices, and what the kernel makes of them, token by token."""
    plain = slices(context, layer.num_kv_heads)
    if not isinstance(layer, SuperAttention):
        return plain
    out, length = torch.zeros_like(plain), plain.shape[2]
    for h in range(plain.shape[1]):
        kernel = layer.alignment[h if layer.per_head else 0]
        for j in range(length):
            for i in range(j + 1 if layer.causal else length):
                out[:, h, j] += kernel[j, i] * plain[:, h, i]
            if layer.alignment_bias is not None:
                out[:, h, j] += layer.alignment_bias[j]
    return out


def heads_by_loops(layer, x, mask=None, context=None):
    """Outputs of the heads, ``(B, H, N, D)``, one head after the other."""
    context = x if context is None else context
    q, v = slices(x @ layer.q_proj.weight.T, layer.num_heads), values_by_loops(layer, context)
    k = slices(context @ layer.k_proj.weight.T if hasattr(layer, "k_proj") else context, layer.num_kv_heads)
    group = layer.num_heads // layer.num_kv_heads
    outs = [
        scaled_dot_product_attention(q[:, h], k[:, h // group], v[:, h // group], attn_mask=mask)
        for h in range(layer.num_heads)
    ]
    return torch.stack(outs, 1)


def triangle(length=LENGTH, window=LENGTH):
    i = torch.arange(length)
    return (i[:, None] - window < i) & (i <= i[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_every_head_and_token_by_itself(kind, causal):
    layer, x = make(kind, causal=causal), tokens()
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, triangle() if causal else None)))
    layer, context = make(kind, kv_dim=12, num_kv_heads=2), tokens(7, 12)
    torch.testing.assert_close(layer(x, context), join(layer, heads_by_loops(layer, x, None, context)))


@pytest.mark.parametrize("options", [{"per_head": True}, {"alignment_bias": True}, {"per_head": True, "causal": True}])
def test_a_kernel_for_each_head_and_a_bias(options):
    layer, x = make(SuperAttention, **options), tokens()
    mask = triangle() if layer.causal else None
    torch.testing.assert_close(layer(x), join(layer, heads_by_loops(layer, x, mask)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
def test_in_a_sliding_window(kind, backend):
    class Sliding(kind, SlidingWindowAttention):
        """Both mechanisms."""

    layer, x = make(Sliding, window=3, causal=True, backend=backend), tokens()
    expected = join(layer, heads_by_loops(layer, x, triangle(window=3)))
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        for prompt in (0, 5):
            torch.testing.assert_close(steps(layer, x, prompt)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_knocking_and_a_mixture_of_heads(kind):
    class All(KnockingHeadsAttention, kind, MixtureOfHeadsAttention):
        """Three mechanisms with different parts."""

    layer, x = make(All, form="linear", on="v", shared_heads=1, top_k=2), tokens()
    torch.nn.init.normal_(layer.v_share.weight)
    out = layer(x)
    # What is applied to the channels of values can be applied after the sums over tokens.
    heads = heads_by_loops(layer, x) @ layer.v_share.weight
    torch.testing.assert_close(out, join(layer, layer.gates.unsqueeze(-1) * heads))


def test_with_one_head_they_are_torchs_attention_with_weights_multiplied():
    peer = torch.nn.MultiheadAttention(DIM, 1, batch_first=True).double()
    w_q, w_k, w_v = peer.in_proj_weight.detach().chunk(3)
    w_o = peer.out_proj.weight.detach()
    x, context = tokens(), tokens(5)
    with torch.no_grad():
        peer.in_proj_bias[2 * DIM :].normal_()
        bias = w_o @ peer.in_proj_bias[2 * DIM :] + peer.out_proj.bias
    expected = peer(x, context, context)[0]
    optimised, sliced = make(OptimisedAttention, heads=1), make(SliceAttention, heads=1)
    optimised.load_state_dict(
        {"q_proj.weight": w_q, "k_proj.weight": w_k, "o_proj.weight": w_o @ w_v, "o_proj.bias": bias}
    )
    sliced.load_state_dict({"q_proj.weight": w_k.T @ w_q, "o_proj.weight": w_o @ w_v, "o_proj.bias": bias})
    torch.testing.assert_close(optimised(x, context), expected)
    torch.testing.assert_close(sliced(x, context), expected)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_at_the_start_super_attention_is_that_of_slices(per_head, causal):
    layer = SuperAttention(DIM, HEADS, max_length=LONGEST, per_head=per_head, alignment_bias=True, causal=causal)
    peer, x = SliceAttention(DIM, HEADS, causal=causal), tokens().float()
    peer.load_state_dict({name: t for name, t in layer.state_dict().items() if "alignment" not in name})
    assert torch.equal(layer(x), peer(x))


def test_a_kernel_that_permutes_is_a_permutation_of_values():
    layer, x, order = make(SuperAttention, max_length=LENGTH), tokens(), torch.randperm(LENGTH)
    with torch.no_grad():
        layer.alignment.copy_(torch.eye(LENGTH)[order])
    q, k = slices(x @ layer.q_proj.weight.T), slices(x)
    torch.testing.assert_close(layer(x), join(layer, scaled_dot_product_attention(q, k, k[:, :, order])))


def test_a_shorter_input_is_a_longer_one_whose_rest_is_padding():
    layer, x = make(SuperAttention), tokens(LONGEST)
    real = torch.arange(LONGEST).expand(2, -1) < 7
    torch.testing.assert_close(layer(x, keys=real)[:, :7], layer(x[:, :7]))
    broken = x.masked_fill(~real.unsqueeze(-1), torch.inf)
    torch.testing.assert_close(layer(x, broken, keys=real)[:, :7], layer(x[:, :7]))


def test_a_grid_counts_row_by_row():
    layer, x = make(SuperAttention), tokens(12)
    torch.testing.assert_close(layer(x.view(2, 3, 4, DIM)).flatten(1, 2), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_only_super_attention_knows_the_order_of_tokens(kind):
    layer, x, order = make(kind), tokens(), torch.randperm(LENGTH)
    same = torch.allclose(layer(x[:, order]), layer(x)[:, order])
    assert same == (kind is not SuperAttention)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("per_head", [False, True])
def test_every_use_with_a_kernel_that_is_not_the_identity(use, per_head):
    class Random(SuperAttention):
        tiny = SuperAttention.tiny | {"per_head": per_head, "alignment_bias": True}

        def reset_parameters(self):
            torch.nn.init.normal_(self.alignment)
            torch.nn.init.normal_(self.alignment_bias)

    assert verify(Random, use).holds


@pytest.mark.parametrize("prompt", [0, 4, LENGTH])
def test_decoding_with_padding_before(prompt):
    layer, x = make(SuperAttention, causal=True, rope=Rope()), tokens()
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[1, :2] = False
    cache, outs = layer.new_cache(), []
    with torch.no_grad():
        ends = [*([prompt] if prompt else []), *range(prompt + 1, LENGTH + 1)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            outs.append(layer(x[:, start:end], keys=keys[:, :end], cache=cache))
        torch.testing.assert_close(torch.cat(outs, 1), layer(x, keys=keys))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer, x = make(kind, dim=6, heads=2, causal=True), tokens(3, 6)
    names, values = zip(*layer.named_parameters(), strict=True)
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,)), inputs
    )


def test_counts_of_parameters():
    dim, longest = 64, 16

    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    counts = [count(kind(dim, 8, out_bias=False)) for kind in (Attention, OptimisedAttention, SliceAttention)]
    assert counts == [4 * dim**2, 3 * dim**2, 2 * dim**2]
    kernel = {"max_length": longest, "out_bias": False}
    assert count(SuperAttention(dim, 8, **kernel)) == 2 * dim**2 + longest**2
    assert count(SuperAttention(dim, 8, per_head=True, **kernel)) == 2 * dim**2 + 8 * longest**2
    assert count(SuperAttention(dim, 8, alignment_bias=True, **kernel)) == 2 * dim**2 + longest**2 + longest
    assert count(OptimisedAttention(dim, 8)) == 3 * dim**2 + dim


@pytest.mark.parametrize("per_head", [False, True])
def test_operations(per_head):
    dim, length, work = 64, 10, []
    layers = [Attention(dim, 8), OptimisedAttention(dim, 8), SliceAttention(dim, 8)]
    for layer in (*layers, SuperAttention(dim, 8, max_length=16, per_head=per_head)):
        with FlopCounterMode(display=False) as counted:
            layer(torch.randn(3, length, dim))
        work.append(counted.get_total_flops() // 3)
    projection = 2 * length * dim**2
    assert [w - work[0] for w in work] == [0, -projection, -2 * projection, -2 * projection + 2 * length**2 * dim]


def test_the_identity_outlives_initialisers_and_is_spared_weight_decay():
    model = Transformer(11, 16, [lambda dim: SuperAttention(dim, 2, max_length=5, causal=True)] * 2)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(block.attention.alignment, torch.eye(5)[None]) for block in model.blocks)
    assert no_weight_decay(model) == {"blocks.0.attention.alignment", "blocks.1.attention.alignment"}


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_bad_sizes(kind):
    options = {"max_length": 5} if kind is SuperAttention else {}
    with pytest.raises(ValueError, match=r"kv_dim must be num_kv_heads 4 times head_dim 6, .*; it was 20"):
        kind(DIM, HEADS, kv_dim=20, **options)
    with pytest.raises(ValueError, match=r"kv_dim must be num_kv_heads 2 times head_dim 6"):
        kind(DIM, HEADS, num_kv_heads=2, **options)
    with pytest.raises(ValueError, match=f"project must be True for {kind.__name__}"):
        kind(DIM, HEADS, project=False, **options)


def test_refuses_more_tokens_than_the_kernel_has():
    with pytest.raises(ValueError, match="max_length must be at least 1; it was 0"):
        SuperAttention(DIM, HEADS, max_length=0)
    layer = make(SuperAttention, causal=True)
    message = "max_length 12 is the most keys that the kernel has; there were 13"
    with pytest.raises(ValueError, match=message):
        layer(tokens(13))
    with pytest.raises(ValueError, match=message):
        layer(tokens(), tokens(13))
    cache = layer.new_cache()
    layer(tokens(12), cache=cache)
    with pytest.raises(ValueError, match=message):
        layer(tokens(1), cache=cache)
    assert cache.seen == 12


def test_refuses_a_cache_that_drops_tokens():
    layer, window = make(SuperAttention, causal=True), SlidingWindowAttention(DIM, HEADS, window=3, causal=True)
    with pytest.raises(ValueError, match=r"cache must keep all tokens.*WindowCache"):
        layer(tokens(), cache=window.new_cache())
