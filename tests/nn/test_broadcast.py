"""S086: the mean as attention and as a matrix, masks and running means by loops, and where it stands in a network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from glocal.models.language.transformer import Transformer
from glocal.nn import MLP, Attention, Block, ContextBroadcast, Rope, SwiGLU, UniformHeadAttention, insert_broadcast
from glocal.patterns import Sliding
from tests.models.networks import assert_exports
from tests.peers import load_timm

FORMS = pytest.mark.parametrize("form", ["plain", "scaled"])


def broadcast(form="plain", **options):
    torch.manual_seed(0)
    layer = ContextBroadcast(form, dim=5 if form == "scaled" else None, **options).double()
    if form == "scaled":
        nn.init.normal_(layer.scale)
    return layer


def written_out(layer, x, mean):
    return (x + mean) / 2 if layer.form == "plain" else x + layer.scale * mean


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_it_is_attention_without_scores_and_the_tokens_themselves():
    x = random(2, 7, 5)
    nothing = torch.zeros(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(broadcast()(x), (x + scaled_dot_product_attention(nothing, nothing, x)) / 2)


def test_as_a_matrix_it_keeps_the_mean_and_halves_the_rest():
    matrix = broadcast()(torch.eye(6, dtype=torch.float64)[None])[0]
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(values, torch.tensor([0.5] * 5 + [1.0], dtype=torch.float64))
    torch.testing.assert_close(vectors[:, -1].abs(), torch.full((6,), 6**-0.5, dtype=torch.float64))


def test_the_mean_of_the_tokens_stays():
    x = random(3, 4, 6, 5)
    torch.testing.assert_close(broadcast()(x).mean((1, 2)), x.mean((1, 2)))


@FORMS
def test_order_does_not_count(form):
    layer, x, order = broadcast(form), random(2, 9, 5), torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@FORMS
def test_a_grid_is_one_set_of_tokens(form):
    layer, x = broadcast(form), random(2, 5, 3, 4)
    x = x.movedim(1, -1)  # not contiguous, (2, 3, 4, 5)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer(x.flatten(1, 2)))


@FORMS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 8])
def test_padding_and_the_past_by_loops(form, causal, length):
    layer, x = broadcast(form, causal=causal), random(3, length, 5)
    keys = torch.rand(3, length) > 0.4
    keys[2] = False
    for real in (keys, torch.ones_like(keys)):
        wanted = torch.empty_like(x)
        for item in range(3):
            for i in range(length):
                seen = [x[item, j] for j in range(i + 1 if causal else length) if real[item, j]]
                mean = sum(seen) / len(seen) if seen else torch.zeros(5, dtype=torch.float64)
                wanted[item, i] = written_out(layer, x[item, i], mean)
        torch.testing.assert_close(layer(x, real), wanted)
    torch.testing.assert_close(layer(x), layer(x, torch.ones_like(keys)))


def test_padding_of_a_grid():
    layer, x = broadcast(), random(2, 3, 4, 5)
    keys = torch.rand(2, 3, 4) > 0.4
    torch.testing.assert_close(layer(x, keys).flatten(1, 2), layer(x.flatten(1, 2), keys.flatten(1)))


@FORMS
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(form, causal):
    layer, keys = broadcast(form, causal=causal), torch.tensor([[True, False, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, keys), random(1, 3, 5).requires_grad_())
    if form == "scaled":
        grad = torch.autograd.grad((layer(x := random(1, 3, 5)) * (w := random(1, 3, 5))).sum(), layer.scale)[0]
        torch.testing.assert_close(
            grad, ((x.cumsum(1) / torch.arange(1, 4)[:, None] if causal else x.mean(1)) * w).sum((0, 1))
        )


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_sums_in_float32(causal):
    x = torch.full((1, 3000, 1), 60.0, dtype=torch.float16)  # their sum is no half
    assert torch.equal(ContextBroadcast(causal=causal)(x), x)


def test_scaled_starts_as_nothing():
    x = torch.randn(2, 4, 5)
    assert torch.equal(ContextBroadcast("scaled", dim=5)(x), x)


def test_bad_input():
    with pytest.raises(ValueError, match="form must be 'plain' or 'scaled'"):
        ContextBroadcast("halved")
    with pytest.raises(ValueError, match="dim must be given"):
        ContextBroadcast("scaled")
    with pytest.raises(ValueError, match="dim must be given"):
        ContextBroadcast(dim=4)
    with pytest.raises(ValueError, match=r"x must be \(B, \*grid, dim\)"):
        ContextBroadcast()(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"x must be \(B, N, dim\)"):
        ContextBroadcast(causal=True)(torch.randn(1, 3, 3, 4))
    with pytest.raises(ValueError, match=r"keys must be booleans \(1, 3\)"):
        ContextBroadcast()(torch.randn(1, 3, 4), torch.ones(1, 4, dtype=torch.bool))


# In networks.


def test_in_timms_vision_transformer():
    """Every block computed by hand from timm's own layers."""
    vit = load_timm("models.vision_transformer").vit_tiny_patch16_224(depth=3, img_size=32, num_classes=4)
    model = copy.deepcopy(vit).eval()
    assert len(insert_broadcast(model)) == 3
    x = torch.randn(2, 3, 32, 32)
    t = vit.eval()._pos_embed(vit.patch_embed(x))
    for block in vit.blocks:
        t = t + block.attn(block.norm1(t))
        fed = block.mlp.fc2(gelu(block.mlp.fc1(block.norm2(t))))
        t = t + (fed + fed.mean(1, keepdim=True)) / 2
    torch.testing.assert_close(model.forward_features(x), vit.norm(t))
    assert model.state_dict().keys() == vit.state_dict().keys()
    assert not torch.allclose(model(x), vit(x))


def test_in_timms_windows_the_mean_is_over_the_whole_map():
    swin = load_timm("models.swin_transformer").SwinTransformer
    torch.manual_seed(0)
    model = swin(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,)).eval()
    found = insert_broadcast(model)
    inputs = []
    found[0].register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    model(torch.randn(2, 3, 32, 32))
    assert inputs[0].shape == (2, 16 * 16, 8)


def blocks(layers=2, *, mlp=MLP, **options):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(8, Attention(8, 2, **options), mlp(8, 16)) for _ in range(layers)]).double()


@pytest.mark.parametrize("point", ["mlp", "attention", "before_mlp", "hidden"])
def test_each_point_of_our_block(point):
    model, x = blocks(1), random(2, 6, 8)
    block = model[0]

    def at(here, t):
        return (t + t.mean(1, keepdim=True)) / 2 if here == point else t

    t = x + at("attention", block.attention(block.norm1(x)))
    fed = block.mlp.fc2(gelu(at("hidden", block.mlp.fc1(at("before_mlp", block.norm2(t))))))
    wanted = t + at("mlp", fed)
    insert_broadcast(model, point=point)
    torch.testing.assert_close(model(x), wanted)


def test_what_is_inserted_lives_in_the_model():
    model, x = blocks(), random(2, 6, 8)
    before, weights = model(x), model.state_dict().keys()
    scales = [layer.scale for layer in insert_broadcast(model, "scaled", point="hidden")]
    assert [tuple(scale.shape) for scale in scales] == [(16,), (16,)] and scales[0].dtype == torch.float64
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() - weights == {f"{i}.mlp.fc1.broadcast.scale" for i in range(2)}
    other = copy.deepcopy(model)
    with torch.no_grad():
        scales[0].fill_(1.0)
    assert torch.equal(other(x), before) and not torch.allclose(model(x), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    model(x).sum().backward()
    assert all(scale.grad is not None and scale.grad.abs().max() > 0 for scale in scales)


@pytest.mark.parametrize("point", ["mlp", "attention", "before_mlp", "hidden"])
def test_padding_that_a_block_is_told_of(point):
    block, x = blocks(1)[0], random(2, 6, 8)
    insert_broadcast(block, point=point)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = block(x, keys=keys)
    torch.testing.assert_close(found[1:, :4], block(x[1:, :4]))
    torch.testing.assert_close(found[:1], block(x[:1]))  # and padding of one call is forgotten
    with pytest.raises(ValueError, match="keys must be booleans"):
        block(x, keys=keys[:, 1:])
    torch.testing.assert_close(block(x[:1]), found[:1])


def test_a_causal_model_stays_causal():
    torch.manual_seed(0)
    model = Transformer(11, 16, [lambda dim: Attention(dim, 2, causal=True, rope=Rope())] * 2).eval()
    assert all(layer.causal for layer in insert_broadcast(model))
    tokens = torch.randint(11, (1, 9))
    torch.testing.assert_close(model(tokens)[:, :5], model(tokens[:, :5]))
    assert not any(layer.causal for layer in insert_broadcast(blocks(), causal=False))


def test_causal_models_decode_without_a_cache_only():
    block = blocks(1, causal=True)[0]
    insert_broadcast(block)
    with pytest.raises(ValueError, match="cache must be None"):
        block(random(1, 3, 8), cache=block.attention.new_cache())


def test_it_exports():
    model = blocks().float().eval()
    insert_broadcast(model)
    assert_exports(model, torch.randn(2, 6, 8))


def test_insertion_that_cannot_be():
    with pytest.raises(ValueError, match="point must be one of mlp, attention, before_mlp, hidden"):
        insert_broadcast(blocks(), point="end")
    with pytest.raises(ValueError, match="form must be"):
        insert_broadcast(blocks(), "halved")
    with pytest.raises(ValueError, match="model must have blocks"):
        insert_broadcast(MLP(8, 8))
    with pytest.raises(ValueError, match="fc1"):
        insert_broadcast(blocks(mlp=SwiGLU), point="hidden")
    model = blocks()
    insert_broadcast(model)
    with pytest.raises(ValueError, match="has broadcasts already"):
        insert_broadcast(model)


# A uniform head.


def test_a_uniform_head_gives_the_mean_of_the_values():
    torch.manual_seed(0)
    layer = UniformHeadAttention(12, 3, uniform_heads=2, qk_norm="layer", rope=Rope()).double()
    nn.init.normal_(layer.q_norm.bias)
    plain = Attention(12, 3, qk_norm="layer", rope=Rope()).double()
    plain.load_state_dict(layer.state_dict())
    layer.o_proj = plain.o_proj = nn.Identity()
    x = random(2, 7, 12)
    mean = layer.v_proj(x).mean(1, keepdim=True)
    found, other = layer(x), plain(x)
    torch.testing.assert_close(found[..., :8], mean[..., :8].expand(-1, 7, -1))
    torch.testing.assert_close(found[..., 8:], other[..., 8:])


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_a_uniform_head_under_a_pattern(backend):
    class Near(UniformHeadAttention):
        def where(self, q, k, call):
            return Sliding(2, 1)

    torch.manual_seed(0)
    layer = Near(8, 1, backend=backend).double()
    layer.o_proj = nn.Identity()
    x = random(1, 9, 8)
    values = layer.v_proj(x)
    wanted = torch.stack([values[:, max(0, i - 2) : i + 2].mean(1) for i in range(9)], 1)
    torch.testing.assert_close(layer(x), wanted)


def test_a_number_of_uniform_heads_that_there_is_not():
    with pytest.raises(ValueError, match="uniform_heads must be from 0 to num_heads 2; it was 3"):
        UniformHeadAttention(8, 2, uniform_heads=3)
