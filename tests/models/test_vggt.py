"""The aggregator of S067 and S072: equal where nothing is left out, symmetric in the frames, a stream."""

from __future__ import annotations

import pytest
import torch

import glocal


def make(attention="full", **options):
    torch.manual_seed(0)
    # A scale of 1 on the branches, so that attention shows in the output.
    model = glocal.create("vggt_aggregator_tiny", attention=attention, **({"layer_scale": 1.0} | options)).double()
    for token in (model.camera_token, model.register_token):
        torch.nn.init.normal_(token)
    return model


def alike(attention, **options):
    """A full one, and another with its weights."""
    full, model = make(), make(attention, **options)
    model.load_state_dict(full.state_dict())
    return full, model


def frames(count=5, batch=2):
    return torch.randn(batch, count, 3, 32, 48, dtype=torch.float64)


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("sparse", {"ratio": 1.0, "query_size": 16, "key_size": 8}),
        ("sparse", {"ratio": 0.0, "mass": 1.0, "query_size": 16, "key_size": 8, "order": "hilbert"}),
        ("flash", {"factor": 1}),
    ],
)
def test_with_nothing_left_out_it_is_the_full_model(attention, options):
    full, model = alike(attention, **options)
    x = frames()
    torch.testing.assert_close(model(x), full(x))


@pytest.mark.parametrize(
    ("attention", "options"), [("sparse", {"ratio": 0.3, "mass": 0.0, "key_size": 8}), ("flash", {"factor": 2})]
)
def test_with_something_left_out_it_is_not(attention, options):
    full, model = alike(attention, **options)
    x = frames()
    with torch.no_grad():
        out, dense = model(x), full(x)
    assert out.shape == (2, 5, 29, 64)
    assert 1e-3 < float((out - dense).norm() / dense.norm()) < 1


@pytest.mark.parametrize(
    ("attention", "options"),
    [("full", {}), ("flash", {"factor": 2}), ("sparse", {"ratio": 0.5, "mass": 0.0, "query_size": 8, "key_size": 8})],
)
def test_frames_after_the_first_are_a_set(attention, options):
    model, x = make(attention, **options), frames()
    order = [0, 3, 1, 4, 2]
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order])
    swapped = model(x[:, [1, 0, 2, 3, 4]])
    assert not torch.allclose(swapped, model(x)[:, [1, 0, 2, 3, 4]], rtol=1e-3)  # the reference is another


def test_a_stream_of_one_chunk_is_the_forward_and_more_chunks_see_the_past_only():
    model, x = make("flash", factor=2), frames()
    torch.testing.assert_close(model(x, cache=model.new_cache()), model(x))
    cache, other = model.new_cache(), model.new_cache()
    chunks = torch.cat([model(chunk, cache=cache) for chunk in x.split([2, 1, 2], 1)], 1)
    changed = torch.cat([x[:, :3], torch.randn_like(x[:, 3:])], 1)
    again = torch.cat([model(chunk, cache=other) for chunk in changed.split([2, 1, 2], 1)], 1)
    torch.testing.assert_close(again[:, :3], chunks[:, :3])
    torch.testing.assert_close(chunks[:, :2], model(x[:, :2]))
    assert [c.seen for c in cache] == [5, 5] and not torch.allclose(chunks[:, 3:], again[:, 3:])
    # A chunk that sees all of the past is not the same as the last frames of one forward: they have seen each other.
    assert not torch.allclose(chunks[:, :2], model(x)[:, :2])


def test_later_chunks_have_no_frame_zero_of_their_own():
    model, x = make("flash", factor=2), frames(2, 1)
    cache, other = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for one in (cache, other):
            model(x[:, :1], cache=one)
        after = model(x[:, 1:], cache=cache)
        model.camera_token[0], model.register_token[0] = 7, 7  # only frame 0 has these
        torch.testing.assert_close(model(x[:, 1:], cache=other), after)


def test_keyframes_are_chosen_by_the_frames():
    model = make("flash", factor=2, keyframe_every=2)
    x = frames(6)
    x[:, 3:] = x[:, 3:4] + 0.01 * x[:, 3:]
    found, seen = [], model.global_blocks[0].attention
    hook = seen.register_forward_pre_hook(lambda m, a, k: found.append(k["keyframes"]), with_kwargs=True)
    model(x)
    hook.remove()
    assert found[0].shape == (2, 4) and bool((found[0][:, 0] == 0).all())


def test_tokens_are_camera_registers_patches_and_frame_zero_has_its_own():
    model, x = make(), frames(3, 1)
    tokens = model.tokens(x)
    assert torch.equal(tokens[0, 0, :1], model.camera_token[0]) and torch.equal(tokens[0, 1, :1], model.camera_token[1])
    assert torch.equal(tokens[0, 2, 1:5], model.register_token[1])
    assert torch.equal(model.tokens(x, first=False)[0, 0, :1], model.camera_token[1])
    patch = x[0, 1, :, 8:16, 40:48]  # row 1, column 5
    by_hand = (model.patch_embed.weight * patch).sum((1, 2, 3)) + model.patch_embed.bias
    torch.testing.assert_close(tokens[0, 1, 5 + 6 + 5], by_hand)


def test_frame_blocks_stay_inside_a_view_and_pairs_alternate():
    model, x = make(), frames(3, 1)
    local, over = model.features(x)[0].split(32, -1)
    changed = x.clone()
    changed[:, 2] = torch.randn_like(x[:, 2])
    local_, over_ = model.features(changed)[0].split(32, -1)
    torch.testing.assert_close(local_[:, :2], local[:, :2])
    assert not torch.allclose(over_[:, :2], over[:, :2])
    block = model.global_blocks[0]
    at = model.views.positions(29).repeat(3, 1)
    torch.testing.assert_close(block(local.flatten(1, 2), positions=at).view_as(over), over)


@pytest.mark.parametrize("name", ["vggt_aggregator", "vggt_aggregator_sparse", "vggt_aggregator_flash"])
def test_published_sizes(name):
    with torch.device("meta"):
        model = glocal.create(name)
    # 24 pairs of a block of 4 C^2 (attention) + 8 C^2 (MLP) weights, and 909 M with the 304 M of DINOv2-L in VGGT-1B.
    blocks = sum(p.numel() for p in [*model.frame_blocks.parameters(), *model.global_blocks.parameters()])
    vectors = 3 + 1 + 4 + 1 + 2 * 2 + 2  # biases of q, k, v, o; of the MLP 4 + 1; two norms; two scales
    assert blocks == 48 * (12 * 1024**2 + vectors * 1024 + 4 * 64)
    assert model.views.patches == (37, 37) and model.views.tokens == 37 * 37 + 5


def test_gradients_reach_every_weight():
    model = make("flash", factor=2, resize="learned")
    model(frames(3, 1)).pow(2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool((model.global_blocks[0].attention.shrink.weight.grad.abs() > 0).all())


def test_refuses():
    with pytest.raises(ValueError, match="image_size must be multiples of patch 8"):
        make(image_size=30)
    with pytest.raises(ValueError, match="attention must be 'full', 'sparse' or 'flash'; it was 'dense'"):
        make("dense")
    with pytest.raises(ValueError, match="keyframe_every"):
        make("flash", keyframe_every=0)
    with pytest.raises(ValueError, match=r"frames must be \(B, n, 3, 32, 48\)"):
        make()(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match="cache is for attention='flash'"):
        make()(frames(), cache=make("flash", factor=2).new_cache())
