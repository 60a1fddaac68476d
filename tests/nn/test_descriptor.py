"""S072: descriptors against torch's own resizing and dense attention written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

from glocal.cache import DescriptorCache
from glocal.nn import Attention, DescriptorAttention, Rope, choose_keyframes
from tests.peers import load_timm

SPECIAL = 2


def make(patches=(8, 8), **options):
    torch.manual_seed(0)
    options = {"special": SPECIAL, "rope": Rope(100.0, axes=2), "qk_norm": "layer"} | options
    return DescriptorAttention(32, 2, patches=patches, **options).double()


def frames(layer, count=3, batch=2):
    return torch.randn(batch, count, layer.views.tokens, 32, dtype=torch.float64)


def split(x, patches=(8, 8)):
    """Special tokens ``(B, n, S, C)`` and maps ``(B n, C, h, w)``."""
    return x[:, :, :SPECIAL], x[:, :, SPECIAL:].unflatten(2, patches).flatten(0, 1).permute(0, 3, 1, 2)


def dense(layer, x, features, at_q, at_k):
    """Attention of ``x (B, N, C)`` to tokens made of ``features``, by torch."""
    q, k, v = layer.q_proj(x), layer.k_proj(features), layer.v_proj(features)
    q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k, v))
    q, k = layer.rope(layer.q_norm(q), at_q), layer.rope(layer.k_norm(k), at_k)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return layer.o_proj(out.transpose(1, 2).flatten(2))


def places(layer, count):
    """Positions by loops: of all tokens ``(n P, 2)`` and of all descriptors."""
    (h, w), r = layer.views.patches, layer.factor
    full = [(0, 0)] * SPECIAL + [(y + 1, x + 1) for y in range(h) for x in range(w)]
    small = [(0, 0)] * SPECIAL
    small += [(y * h // (h // r) + 1, x * w // (w // r) + 1) for y in range(h // r) for x in range(w // r)]
    return torch.tensor(full * count), torch.tensor(small * count)


def test_factor_one_is_full_attention():
    layer, full = make(factor=1), Attention(32, 2, rope=Rope(100.0, axes=2), qk_norm="layer").double()
    full.load_state_dict(layer.state_dict())
    x = frames(layer).flatten(1, 2)
    torch.testing.assert_close(layer(x), full(x, positions=places(layer, 3)[0]))


def test_factor_one_is_timms_attention():
    layer = make(factor=1, rope=None, qkv_bias=True, out_bias=True)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    peer = load_timm("layers").Attention(32, 2, qkv_bias=True, qk_norm=True, norm_layer=norm).double()
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        peer.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        peer.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        for norms in (layer.q_norm, layer.k_norm):
            torch.nn.init.normal_(norms.weight)
    for theirs, ours in ((peer.proj, layer.o_proj), (peer.q_norm, layer.q_norm), (peer.k_norm, layer.k_norm)):
        theirs.load_state_dict(ours.state_dict())
    x = frames(layer).flatten(1, 2)
    torch.testing.assert_close(layer(x), peer(x))


@pytest.mark.parametrize(("patches", "factor"), [((8, 8), 2), ((9, 6), 3), ((8, 8), 4), ((7, 11), 4)])
@pytest.mark.parametrize("resize", ["bilinear", "nearest", "learned"])
def test_equals_the_dense_formula_on_resized_maps(patches, factor, resize):
    layer = make(patches, factor=factor, resize=resize, num_kv_heads=1)
    x = frames(layer)
    special, maps = split(x, patches)
    size = (patches[0] // factor, patches[1] // factor)
    if resize == "learned":  # at its start a mean, with what does not fit left out
        small = avg_pool2d(maps, factor)
    else:
        small = interpolate(maps, size=size, mode=resize, **({"align_corners": False} if resize == "bilinear" else {}))
    small = small.flatten(2).mT.unflatten(0, (2, 3))
    features = torch.cat([special, small], 2).flatten(1, 2)
    theirs = dense(layer, x.flatten(1, 2), features, *places(layer, 3))
    torch.testing.assert_close(layer(x.flatten(1, 2)), theirs)


def test_maps_that_are_constant_in_each_block_resize_alike():
    x = torch.randn(1, 3, SPECIAL + 64, 32, dtype=torch.float64)
    blocks = torch.randn(3, 32, 4, 4, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x[:, :, SPECIAL:] = blocks.flatten(2).mT
    layers = [make(factor=2, resize=how) for how in ("bilinear", "nearest", "learned")]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict(), strict=False)
    outs = [layer(x.flatten(1, 2)) for layer in layers]
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(outs[0], outs[2])


def test_which_patches_bilinear_reads():
    for factor, side in ((2, 8), (3, 9), (4, 8)):
        layer = make((side, side), factor=factor)
        x = frames(layer, 1, 1).requires_grad_()
        weights = torch.rand(1, 1, SPECIAL + (side // factor) ** 2, 1, dtype=torch.float64) + 0.5
        (grad,) = torch.autograd.grad((layer.descriptors(x) * weights).sum(), x)
        read = grad[0, 0, SPECIAL:].abs().sum(-1).view(side, side) > 0
        place = torch.arange(side) % factor
        inside = {2: place >= 0, 3: place == 1, 4: (place == 1) | (place == 2)}[factor]
        assert torch.equal(read, inside[:, None] & inside)
    layer = make(factor=2)
    x = frames(layer)
    pooled = avg_pool2d(split(x)[1], 2).flatten(2).mT.unflatten(0, (2, 3))
    torch.testing.assert_close(layer.descriptors(x)[:, :, SPECIAL:], pooled)


def test_keyframes_are_prepended_in_full_and_counted_twice():
    layer = make(factor=4)
    x = frames(layer)
    at_q, at_small = places(layer, 3)
    own = at_q[SPECIAL : layer.views.tokens]
    small = layer.descriptors(x).flatten(1, 2)
    features = torch.cat([x[:, 2, SPECIAL:], x[:, 0, SPECIAL:], small], 1)
    theirs = dense(layer, x.flatten(1, 2), features, at_q, torch.cat([own, own, at_small]))
    torch.testing.assert_close(layer(x.flatten(1, 2), keyframes=[2, 0]), theirs)
    # Each item its own, and -1 for none.
    found = layer(x.flatten(1, 2), keyframes=torch.tensor([[2, 0], [1, -1]]))
    torch.testing.assert_close(found[:1], theirs[:1])
    torch.testing.assert_close(found[1:], layer(x[1:].flatten(1, 2), keyframes=[1]))


def test_cross_attention_and_tokens_that_are_over():
    layer = make(factor=4)
    x, context = frames(layer, 2).flatten(1, 2), frames(layer).flatten(1, 2)
    at_q, at_k = places(layer, 2)[0], places(layer, 3)[1]
    small = layer.descriptors(frames_of(layer, context)).flatten(1, 2)
    torch.testing.assert_close(layer(x, context), dense(layer, x, small, at_q, at_k))
    tail = torch.randn(2, 7, 32, dtype=torch.float64)
    over = torch.cat([at_k, places(layer, 1)[0][:7]])
    theirs = dense(layer, x, torch.cat([small, tail], 1), at_q, over)
    torch.testing.assert_close(layer(x, torch.cat([context, tail], 1)), theirs)


def frames_of(layer, x):
    return x.unflatten(1, (-1, layer.views.tokens))


def test_one_chunk_is_the_forward_with_keyframe_zero_and_two_are_the_joined_cache():
    layer = make(factor=4)
    x = frames(layer, 5)
    tokens = layer.views.tokens
    torch.testing.assert_close(layer(x.flatten(1, 2), cache=DescriptorCache()), layer(x.flatten(1, 2), keyframes=[0]))
    cache = DescriptorCache()
    layer(x[:, :3].flatten(1, 2), cache=cache)
    found = layer(x[:, 3:].flatten(1, 2), cache=cache)
    features = torch.cat([x[:, 0, SPECIAL:], layer.descriptors(x).flatten(1, 2)], 1)
    at_q, at_k = places(layer, 5)
    at_k = torch.cat([at_q[SPECIAL:tokens], at_k])
    theirs = dense(layer, x[:, 3:].flatten(1, 2), features, at_q[: 2 * tokens], at_k)
    torch.testing.assert_close(found, theirs)
    assert torch.equal(cache.kept()[0], features)


def test_positions_on_one_axis_go_on_in_a_stream():
    layer = make(factor=2, rope=Rope())
    x = frames(layer, 4)
    cache = DescriptorCache()
    chunks = [layer(chunk.flatten(1, 2), cache=cache) for chunk in x.split(2, 1)]
    torch.testing.assert_close(chunks[1], layer(x.flatten(1, 2), keyframes=[0]).chunk(2, 1)[1])


def test_a_permutation_of_frames_moves_the_outputs():
    layer = make(factor=4)
    x, order = frames(layer, 4), [0, 3, 1, 2]
    moved = layer(x[:, order].flatten(1, 2), keyframes=[0])
    torch.testing.assert_close(
        frames_of(layer, moved), frames_of(layer, layer(x.flatten(1, 2), keyframes=[0]))[:, order]
    )


def test_the_learned_map_learns():
    layer = make(factor=2, resize="learned", kv_dim=16)
    context = torch.randn(1, layer.views.tokens, 16, dtype=torch.float64)
    layer(frames(layer, 1, 1).flatten(1, 2), context).pow(2).sum().backward()
    assert layer.shrink.weight.shape == (16, 1, 2, 2) and bool((layer.shrink.weight.grad.abs() > 0).all())


def test_keyframes_by_brute_force_over_separate_clusters():
    torch.manual_seed(0)
    centers = 20 * torch.eye(4)[:, :3]
    for seed in range(5):
        member = torch.tensor([0] * 6 + [1] * 5 + [2] * 7 + [3] * 4)[torch.randperm(22)]
        x = centers[member] + 0.1 * torch.randn(22, 3)
        nearest = set()
        for c in range(4):
            mean, own = x[member == c].mean(0), (member == c).nonzero().squeeze(1)
            nearest.add(int(own[(x[own] - mean).norm(dim=-1).argmin()]))
        # Lloyd needs a start in every cluster; the frames are sorted so that some seed has one.
        found = [set(choose_keyframes(x[None], 4, seed=s)[0].tolist()) - {-1} for s in range(40)]
        assert nearest | {0} in found, seed


def test_keyframes_do_not_depend_on_the_batch_or_on_chance():
    x = torch.randn(3, 30, 8)
    torch.rand(7)
    found = choose_keyframes(x, 4)
    assert torch.equal(found, choose_keyframes(x, 4)) and found.shape == (3, 5)
    assert torch.equal(found[1:2], choose_keyframes(x[1:2], 4))
    assert bool((found[:, 0] == 0).all())
    for row in found.tolist():
        real = [n for n in row if n >= 0]
        assert real == sorted(set(real)) and row == real + [-1] * (5 - len(real))
    assert choose_keyframes(x, 1).tolist() == choose_keyframes(x, 0).tolist() == [[0]] * 3
    assert choose_keyframes(x, 30)[0].tolist() == [*range(30), -1]


def test_refuses():
    with pytest.raises(ValueError, match="factor must be from 1 to the smaller side"):
        make((3, 8), factor=4)
    with pytest.raises(ValueError, match="resize"):
        make(resize="cubic")
    with pytest.raises(ValueError, match="clusters must be at most the 3 frames"):
        choose_keyframes(torch.zeros(1, 3, 2), 4)
    layer = make()
    x = frames(layer).flatten(1, 2)
    with pytest.raises(ValueError, match="keyframes must be from 0 to 2"):
        layer(x, keyframes=[3])
    with pytest.raises(ValueError, match="keyframes must be numbers"):
        layer(x, keyframes=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="without keyframes"):
        layer(x, keyframes=[0], cache=DescriptorCache())
    with pytest.raises(ValueError, match="whole frames of 66 tokens"):
        layer(x[:, :-1], cache=DescriptorCache())
    with pytest.raises(ValueError, match="context must be"):
        layer(x, x[..., :-1])
