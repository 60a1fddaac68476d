"""S016, latents: DeepSeek-V3's attention on equal weights, two forms, groups, and the layers of ASA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, KnockingHeadsAttention, LatentAttention, LatentSparseAttention, Rope, asa_layers
from tests import oracle
from tests.nn.layers import project, steps
from tests.nn.test_nsa import SIZES, gated, reference


def make(kind=LatentAttention, **options):
    torch.manual_seed(0)
    settings = {"rank": 12, "rope_dim": 4, "v_head_dim": 6, "rope": Rope(), "causal": True}
    return kind(32, 4, **(settings | options)).double()


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("absorb", [True, False])
def test_equals_deepseek_v3(q_rank, interleaved, absorb):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peers

    config = transformers.DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, kv_lora_rank=12,
        q_lora_rank=q_rank, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, rope_interleave=interleaved,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    peer = peers.DeepseekV3Attention(config, 0).double().eval()
    for parameter in peer.parameters():  # its norms start at 1
        nn.init.normal_(parameter, std=0.5)
    rope = Rope(interleaved=interleaved)
    layer = LatentAttention(
        32, 4, rank=12, rope_dim=4, v_head_dim=6, q_rank=q_rank, rope=rope, causal=True, absorb=absorb
    ).double()
    names = {"kv_a_proj_with_mqa": "k_proj", "kv_a_layernorm": "kv_norm", "kv_b_proj": "up_proj"}
    names |= {"q_a_proj": "q_down.0", "q_a_layernorm": "q_down.1", "q_b_proj": "q_proj"}
    own = {}
    for name, weight in peer.state_dict().items():
        head, _, tail = name.partition(".")
        own[f"{names.get(head, head)}.{tail}"] = weight
    layer.load_state_dict(own)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    at = peers.DeepseekV3RotaryEmbedding(config)(x, torch.arange(11)[None])
    causal = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    theirs = peer(x, tuple(t.double() for t in at), causal)[0]
    torch.testing.assert_close(layer(x), theirs, atol=1e-5, rtol=1e-5)  # its angles are float32


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_absorbed_and_decompressed_agree_in_values_and_gradients(num_groups):
    layer = make(num_groups=num_groups)
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    outs, grads = [], []
    for layer.absorb in (True, False):
        out = layer(x)
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*outs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_with_one_latent_twice_are_multi_head_latent_attention():
    one, two = make(), make(num_groups=2)
    with torch.no_grad():
        state = one.state_dict()
        latent, rope = state["k_proj.weight"].split((12, 4))
        two.load_state_dict(state | {"k_proj.weight": torch.cat([latent, latent, rope])})
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(two(x), one(x))
    with torch.no_grad():
        two.k_proj.weight[12:24] *= -1  # the second half of the heads reads this group only
        two.o_proj.weight.copy_(torch.eye(32)[:, :24])
        one.o_proj.weight.copy_(torch.eye(32)[:, :24])
    assert torch.allclose(two(x)[..., :12], one(x)[..., :12])
    assert not torch.allclose(two(x)[..., 12:24], one(x)[..., 12:24])


def test_groups_with_keys_and_values_as_latents_are_grouped_queries():
    layer = make(rank=16, num_groups=2, rope_dim=0, v_head_dim=8, rope=None)
    layer.kv_norm = nn.Identity()
    peer = Attention(32, 4, num_kv_heads=2, causal=True).double()
    with torch.no_grad():
        layer.up_proj.weight.copy_(torch.eye(16).repeat(4, 1))  # keys are [I, 0] of the latent, values [0, I]
        k, v = (t.weight.unflatten(0, (2, 8)) for t in (peer.k_proj, peer.v_proj))
        layer.k_proj.weight.copy_(torch.cat([k, v], 1).flatten(0, 1))
        layer.q_proj.load_state_dict(peer.q_proj.state_dict())
        layer.o_proj.load_state_dict(peer.o_proj.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x))


def test_decoding_keeps_latents_only():
    layer, x = make(num_groups=2), torch.randn(2, 15, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x, 6)
        torch.testing.assert_close(out, layer(x))
    assert cache.nbytes == 2 * 15 * (2 * 12 + 4) * 8


def test_images_and_cross_attention():
    layer = make(causal=False, rope=Rope(axes=2), kv_dim=10, num_groups=2)
    x, context = torch.randn(1, 3, 4, 32, dtype=torch.float64), torch.randn(1, 3, 4, 10, dtype=torch.float64)
    outs = []
    for layer.absorb in (True, False):
        outs.append(layer(x, context))
    torch.testing.assert_close(*outs)
    at = layer.positions((3, 4), 0, x.device)
    q, k, v = layer.project(x, context, at, at)
    q, (k, v) = q.flatten(2, -2), (t.flatten(2, -2) for t in layer.decompressed(k, v))
    mixed = oracle.attend(q, k, v, torch.ones(12, 12, dtype=torch.bool), scale=12**-0.5)[0]
    torch.testing.assert_close(outs[0].flatten(1, 2), layer.o_proj(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be at least 1; it was 0"),
        ({"num_groups": 3}, "num_groups must divide num_heads 4; it was 3"),
        ({"num_kv_heads": 2}, "num_kv_heads is not for latents"),
        ({"qk_norm": "rms"}, "qk_norm is not for latents"),
        ({"q_rank": 0}, "q_rank must be at least 1; it was 0"),
    ],
    ids=str,
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_refuses_what_needs_keys_by_head():
    """`project` makes latents, through which `share` does not go: it would do nothing, unsaid."""

    class Both(LatentAttention, KnockingHeadsAttention):
        pass

    with pytest.raises(ValueError, match="Both combines latents with a mechanism that acts on keys and values"):
        make(Both, form="linear")


def test_a_local_layer_is_a_window_over_latents_in_a_ring():
    layer = make(LatentSparseAttention, branches=("slide",), window=5)
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    q, k, v = project(layer, x)
    i, j = torch.arange(21)[:, None], torch.arange(21)
    mixed = oracle.attend(q, *layer.decompressed(k, v), (j <= i) & (j > i - 5), scale=layer.scale)[0]
    theirs = layer.o_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), theirs)
    for prompt in (0, 3, 9):
        with torch.no_grad():
            out, cache = steps(layer, x, prompt)
            torch.testing.assert_close(out, theirs)
        assert cache.nbytes == 2 * 5 * (12 + 4) * 8


@pytest.mark.parametrize("branches", [("compress", "select"), ("compress", "select", "slide")])
def test_a_global_layer_chooses_as_on_decompressed_keys(branches):
    """Pooling latents and pooling each head's keys are the same, as the matrices between are linear."""
    layer = make(LatentSparseAttention, num_groups=2, branches=branches, **SIZES)
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    q, k, v = project(layer, x)
    outs, _ = reference(layer, q, *layer.decompressed(k, v), 2)
    torch.testing.assert_close(layer(x), gated(layer, x, outs))
    with torch.no_grad():
        out, cache = steps(layer, x, 10)
        torch.testing.assert_close(out, layer(x))
    blocks = (41 - 6) // 3 + 1
    assert cache.nbytes == 2 * (41 + blocks) * (2 * 12 + 4) * 8


def test_asa_alternates_and_generates():
    torch.manual_seed(0)
    layers = asa_layers(4, 4, num_groups=2, rank=24, rope_dim=4, rope=Rope(), **SIZES)
    model = Transformer(50, 32, layers).double()
    kinds = [block.attention.branches for block in model.blocks]
    assert kinds == [("slide",), ("compress", "select")] * 2
    tokens = torch.randint(50, (1, 20))
    more = model.generate(tokens, 6)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(more, tokens)


def test_asa_refuses():
    with pytest.raises(ValueError, match="rank must be a multiple of num_groups 3; it was 16"):
        asa_layers(2, 6, num_groups=3, rank=16)
    with pytest.raises(ValueError, match="compress must be 'mean' over latents; it was 'mlp'"):
        make(LatentSparseAttention, compress="mlp")
    with pytest.raises(ValueError, match="absorb must not be False"):
        make(LatentSparseAttention, absorb=False)
