"""S116: FIT against torch and transformers layers, dense masks, permutations; FITAR's causality and decoding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

import glocal
from glocal.models.language.fit_ar import FITAR
from glocal.models.vision.fit import FIT, format_layers, parse_layers
from glocal.models.vision.fit_image import FITDenoiser, FITImage, group_image
from glocal.nn.latents import GroupCausalAttention, LatentCrossAttention
from tests.nn.layers import by_mask, gradients_agree

SIZES = {"dim": 12, "latent_dim": 8, "num_heads": 2, "latent_heads": 2}


def make(layers, kind=FIT, groups=3, tokens=5, latents=2, **options):
    torch.manual_seed(0)
    sizes = {"groups": groups, "tokens": tokens, "latents": latents, **SIZES} | options
    model = kind(6, layers, **sizes) if kind is FITAR else kind(layers, 6, **sizes)
    for parameter in model.parameters():  # biases and norms too
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Layer strings.


@pytest.mark.parametrize("text", ["(2)4(2)4(2)", "(1)", "(0)3", "(10)12(1)1", "(2)4(2)4(2)4"])
def test_layer_strings_round_trip(text):
    assert format_layers(parse_layers(text)) == text
    assert make(text.replace("12", "2").replace("10", "3"), groups=2, tokens=2).layers == text.replace(
        "12", "2"
    ).replace("10", "3")


def test_layer_strings_are_read():
    assert parse_layers(" (2) 4 (3)") == ((2, 4), (3, 0))
    for bad in ("", "2(4)", "(2)4(2", "(a)2", "(2)4)2(", "(2)-1(2)"):
        with pytest.raises(ValueError, match="layers must be like"):
            parse_layers(bad)
    with pytest.raises(ValueError, match="global layers in every stage but the last"):
        parse_layers("(2)0(2)")


@pytest.mark.parametrize("text", ["(2)3(1)", "(2)", "(1)2(1)2", "(0)1(1)"])
def test_parameter_count_by_formula(text):
    d, e, w = 12, 8, 8

    def layer(c):
        return 12 * c * c + 13 * c

    def cross(to, of):  # two norms, three projections into the narrower width, one back
        return 2 * to + 2 * of + to * w + w + 2 * (of * w + w) + w * to + to

    stages = parse_layers(text)
    count = 6 * d + d + 2 * d + 5 * d + 3 * 2 * e + 2 * d + 2 * e  # stem and norm, positions, latents, last norms
    for number, (a, b) in enumerate(stages):
        count += a * layer(d) + b * layer(e) + (cross(e, d) if b else 0)
        count += cross(d, e) if number < len(stages) - 1 else 0
    assert sum(p.numel() for p in make(text).parameters()) == count


# Pieces.


@pytest.mark.parametrize(("dim", "context_dim"), [(8, 12), (12, 8)])
def test_cross_attention_is_perceivers(dim, context_dim):
    perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
    torch.manual_seed(0)
    mine = LatentCrossAttention(dim, context_dim, 2, hidden=4 * dim, eps=1e-5).double()
    peer = perceiver.PerceiverLayer(
        perceiver.PerceiverConfig(attention_probs_dropout_prob=0.0),
        is_cross_attention=True,
        qk_channels=8,
        v_channels=8,
        num_heads=2,
        q_dim=dim,
        kv_dim=context_dim,
    ).double()
    inner = peer.attention.self
    pairs = [
        (inner.layernorm1, mine.norm),
        (inner.layernorm2, mine.context_norm),
        (inner.query, mine.attention.q_proj),
        (inner.key, mine.attention.k_proj),
        (inner.value, mine.attention.v_proj),
        (peer.attention.output.dense, mine.attention.o_proj),
        (peer.layernorm, mine.mlp_norm),
        (peer.mlp.dense1, mine.mlp.fc1),
        (peer.mlp.dense2, mine.mlp.fc2),
    ]
    for theirs, own in pairs:
        nn.init.normal_(own.weight, std=0.5)
        theirs.load_state_dict(own.state_dict())
    x, context = rand(2, 4, dim), rand(2, 9, context_dim)
    torch.testing.assert_close(mine(x, context), peer(x, inputs=context)[0])


def test_latents_have_the_shape_of_perceivers():
    transformers = pytest.importorskip("transformers")
    config = transformers.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=8, v_channels=16,
    )  # fmt: skip
    theirs = transformers.PerceiverModel(config)(torch.randn(3, 20, 12)).last_hidden_state
    mine = make("(0)2", groups=1, tokens=20, latents=4, latent_dim=16)(rand(3, 1, 20, 6))[1]
    assert mine[:, 0].shape == theirs.shape == (3, 4, 16)


def test_group_causal_attention_by_mask():
    torch.manual_seed(0)
    layer = GroupCausalAttention(16, 4, group=3, num_kv_heads=2).double()
    x, group = rand(2, 12, 16), torch.arange(12) // 3
    mask = group <= group[:, None]
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    gradients_agree(layer, x, mask)
    with pytest.raises(ValueError, match="whole groups of 3"):
        layer(x[:, :10])
    with pytest.raises(ValueError, match="group must be at least 1"):
        GroupCausalAttention(16, 4, group=0)
    with pytest.raises(ValueError, match="has no causal-cross form"):
        layer(x, x)


# The encoder.


def torch_block(block, x, mask=None):
    """A pre-norm layer by torch, with our weights."""
    dim, att = x.shape[-1], block.attention
    peer = nn.TransformerEncoderLayer(
        dim, att.num_heads, 4 * dim, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        for name, kind in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            parts = [getattr(p, name) for p in (att.q_proj, att.k_proj, att.v_proj)]
            getattr(peer.self_attn, kind).copy_(torch.cat(parts))
    pairs = [
        (peer.self_attn.out_proj, att.o_proj),
        (peer.linear1, block.mlp.fc1),
        (peer.linear2, block.mlp.fc2),
        (peer.norm1, block.norm1),
        (peer.norm2, block.norm2),
    ]
    for theirs, own in pairs:
        theirs.load_state_dict(own.state_dict())
    return peer(x, src_mask=mask)


def cross_by_hand(layer, x, context):
    q, k, v = layer.norm(x), layer.context_norm(context), layer.context_norm(context)
    heads = [
        proj(t).unflatten(-1, (2, -1)).transpose(1, 2)
        for proj, t in zip(
            (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj), (q, k, v), strict=True
        )
    ]
    out = scaled_dot_product_attention(*heads)
    return x + layer.attention.o_proj(out.transpose(1, 2).flatten(2))


def stem(model, x):
    return layer_norm(model.stem(x), (12,), model.stem_norm.weight, model.stem_norm.bias, 1e-6) + model.position


def test_one_group_is_a_latent_bottleneck_written_with_torch():
    model, x = make("(1)2(1)", groups=1), rand(2, 1, 5, 6)
    first, last = model.stages
    tokens = torch_block(first.local[0], stem(model, x)[:, 0])
    latents = model.latents.expand(2, -1, -1, -1)[:, 0]
    # The latents are the narrower: here torch's own cross-attention has the same width.
    read = first.read
    peer = nn.MultiheadAttention(8, 2, kdim=12, vdim=12, batch_first=True).double()
    with torch.no_grad():
        for name in "qkv":
            getattr(peer, f"{name}_proj_weight").copy_(getattr(read.attention, f"{name}_proj").weight)
        peer.in_proj_bias.copy_(torch.cat([getattr(read.attention, f"{n}_proj").bias for n in "qkv"]))
    peer.out_proj.load_state_dict(read.attention.o_proj.state_dict())
    context = read.context_norm(tokens)
    latents = latents + peer(read.norm(latents), context, context)[0]
    torch.testing.assert_close(latents, cross_by_hand(read, model.latents.expand(2, -1, -1, -1)[:, 0], tokens))
    for block in first.across:
        latents = torch_block(block, latents)
    tokens = torch_block(last.local[0], cross_by_hand(first.write, tokens, latents))
    out = model(x)
    torch.testing.assert_close(out[0][:, 0], model.norm(tokens))
    torch.testing.assert_close(out[1][:, 0], model.latent_norm(latents))


def test_local_layers_alone_are_a_vit_on_each_group_and_block_diagonal_attention():
    model, x = make("(2)"), rand(2, 3, 5, 6)
    out, latents = model(x)
    tokens = stem(model, x)
    for g in range(3):
        alone = tokens[:, g]
        for block in model.stages[0].local:
            alone = torch_block(block, alone)
        torch.testing.assert_close(out[:, g], model.norm(alone))
    group = torch.arange(15) // 5
    flat, hidden = tokens.flatten(1, 2), group != group[:, None]
    for block in model.stages[0].local:
        flat = torch_block(block, flat, hidden)
    torch.testing.assert_close(out.flatten(1, 2), model.norm(flat))
    torch.testing.assert_close(latents, model.latent_norm(model.latents).expand(2, -1, -1, -1))


def test_groups_and_latents_permuted_together():
    model, x, extra = make("(1)2(1)1", extra_channels=3), rand(2, 3, 5, 6), rand(2, 3, 1, 3)
    order = torch.tensor([2, 0, 1])
    states, latents = model(x, extra=extra)
    with torch.no_grad():
        model.latents.copy_(model.latents[order])
    again = model(x[:, order], extra=extra[:, order])
    torch.testing.assert_close(again[0], states[:, order])
    torch.testing.assert_close(again[1], latents[:, order])
    assert not torch.allclose(model(x[:, order], extra=extra)[0], states[:, order])


def test_what_reaches_what():
    x = rand(1, 3, 5, 6).requires_grad_()

    def groups(model, output, group):
        (grad,) = torch.autograd.grad(model(x)[output][:, group].square().sum(), x, allow_unused=True)
        return (grad.abs().sum((0, 2, 3)) > 0).tolist()

    assert groups(make("(1)"), 0, 1) == [False, True, False]
    assert groups(make("(1)1(1)"), 0, 1) == [True] * 3
    assert groups(make("(1)1"), 0, 1) == [False, True, False]  # the last stage's tokens do not read its latents
    assert groups(make("(1)1"), 1, 1) == [True] * 3
    assert make("(1)1").features(x).shape == (1, 6, 8)
    assert make("(1)").features(x).shape == (1, 15, 12)


def test_gradcheck_through_all_steps():
    model = make("(1)1(1)", groups=2, tokens=2, latents=1)
    x = rand(1, 2, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, table: torch.func.functional_call(model, {"latents": table}, (x,)),
                                    (x, model.latents.detach().requires_grad_()))  # fmt: skip


def test_encoder_refuses():
    with pytest.raises(ValueError, match="num_heads must divide 8"):
        LatentCrossAttention(12, 8, 3)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        make("(1)", tokens=0)
    with pytest.raises(ValueError, match="grid must hold the 5 tokens"):
        make("(1)", grid=(2, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, 3, 5, 6\)"):
        make("(1)")(rand(1, 5, 3, 6))
    with pytest.raises(ValueError, match="extra tokens must be given"):
        make("(1)", extra_channels=3)(rand(1, 3, 5, 6))


# Images.


def test_groups_of_an_image_are_sub_images():
    image = torch.randn(2, 3, 12, 8)
    groups = group_image(image, (3, 2), 2)
    assert groups.shape == (2, 4, 6, 12)
    part = image[1, :, 0:6, 4:8]  # the second of 2 x 2 sub-images; its patch in row 2, column 0
    assert torch.equal(groups[1, 1, 4].view(2, 2, 3), part[:, 4:6, 0:2].permute(1, 2, 0))
    with pytest.raises(ValueError, match="H a multiple of 6"):
        group_image(image, (3, 3), 2)
    with pytest.raises(ValueError, match="size must be a multiple"):
        FITImage("(1)", 10, group=(2, 2), patch=2, **SIZES)


def test_variants():
    for name, groups, tokens in (("fit_640", 16, 100), ("fit_1280", 64, 100), ("fit_6400", 1600, 100)):
        with torch.device("meta"):
            model = glocal.create(name)
        assert (model.fit.groups, model.fit.tokens) == (groups, tokens)
    assert model.fit.groups * model.fit.tokens == 160_000
    with torch.device("meta"):
        assert glocal.create("fit_denoiser_64").fit.layers == "(2)4(2)4(2)"
    small = glocal.create("fit_640", size=320, dim=24, latent_dim=24, num_heads=2, latent_heads=2, layers="(1)1")
    assert small(torch.randn(1, 3, 320, 320)).shape == (1, 1000)


# The denoiser.


def denoiser(**options):
    torch.manual_seed(0)
    model = FITDenoiser("(1)1(1)", 8, group=(2, 2), patch=2, num_classes=4, latents=2, **(SIZES | options))
    return model.double().eval()


def test_time_and_class_reach_every_pixel():
    model, image = denoiser(cross_mlp=True), rand(2, 3, 8, 8)
    time, label = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1, 2])
    out, latents = model(image, time, label)
    assert out.shape == image.shape and latents.shape == (2, 4, 2, 8)
    later, other = model(image, time + 0.1, label)[0], model(image, time, label.flip(0))[0]
    assert bool((later != out).all()) and bool((other != out).all())
    tokens = model.conditions(time, label)
    code = 1000 * time[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    code = torch.cat([code.sin(), code.cos()], 1)
    code = code / code.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tokens[:, 0], model.time2(nn.functional.silu(model.time1(code))), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens[:, 1], model.label.weight[label])
    with pytest.raises(ValueError, match="label must be given"):
        model(image, time)


def test_self_conditioning_starts_at_nothing_and_learns():
    model, image, time = denoiser(), rand(1, 3, 8, 8), torch.tensor([0.5], dtype=torch.float64)
    label = torch.tensor([0])
    out, latents = model(image, time, label)
    torch.testing.assert_close(model(image, time, label, latents=latents)[0], out)
    model(image, time, label, latents=latents.detach())[0].square().sum().backward()
    assert float(model.again_norm.weight.grad.abs().max()) > 0
    with torch.no_grad():
        model.again_norm.weight.fill_(1)
    assert not torch.allclose(model(image, time, label, latents=latents)[0], out)


def test_denoiser_needs_local_layers_at_the_end():
    with pytest.raises(ValueError, match="must end with local layers"):
        FITDenoiser("(1)1", 8, group=(2, 2), patch=2, **SIZES)


# The autoregressive form.


def test_no_logit_depends_on_its_token_or_a_later_one():
    model = make("(1)1(1)1(1)", FITAR, groups=3, tokens=4)
    tokens = torch.randint(6, (1, 12))
    full = model(tokens)
    for s in range(12):
        other = tokens.clone()
        other[0, s] = (other[0, s] + 1) % 6
        changed = (model(other) - full).abs().amax(-1)[0] > 1e-12
        assert not bool(changed[: s + 1].any())
        # Inside the group at once, and in every later group: it reads the latents of the groups before.
        assert bool(changed[s + 1 :].all())


def test_a_group_reads_the_group_before_and_nothing_later():
    model = make("(1)1(1)", FITAR, groups=3, tokens=4)
    tokens = torch.randint(6, (1, 12))
    table = model.latents.detach().requires_grad_()
    logits = torch.func.functional_call(model, {"latents": table}, (tokens,)).view(3, 4, 6)
    for group in range(3):
        (grad,) = torch.autograd.grad(logits[group].square().sum(), table, retain_graph=True, allow_unused=True)
        reached = (grad.abs().sum((1, 2)) > 0).tolist()
        assert reached == [g < group for g in range(3)]


def test_parallel_form_by_dense_masks():
    model = make("(1)1(1)", FITAR, groups=3, tokens=4)
    tokens = torch.randint(6, (2, 12))
    x = torch.cat([torch.zeros(2, 1, 12), model.embed(tokens)[:, :-1]], 1) + model.position.repeat(3, 1)
    first, last = model.stages
    group, slot = torch.arange(12) // 4, torch.arange(6) // 2
    inside = ~((group == group[:, None]) & (torch.arange(12) <= torch.arange(12)[:, None]))
    x = torch_block(first.local[0], x, inside)
    latents = model.latents.expand(2, -1, -1, -1)
    latents = torch.stack([cross_by_hand(first.read, latents[:, g], x[:, group == g]) for g in range(3)], 1)
    latents = torch_block(first.across[0], latents.flatten(1, 2), slot > slot[:, None]).view(2, 3, 2, 8)
    before = torch.cat([torch.zeros(2, 1, 2, 8, dtype=torch.float64), latents[:, :-1]], 1)
    x = torch.cat([cross_by_hand(first.write, x[:, group == g], before[:, g]) for g in range(3)], 1)
    x = torch_block(last.local[0], x, inside)
    torch.testing.assert_close(model(tokens), model.norm(x) @ model.embed.weight.T)


@pytest.mark.parametrize("layers", ["(1)1(1)", "(2)1(1)2(1)", "(0)1(0)1(1)", "(2)"])
def test_decoding_equals_the_parallel_form(layers):
    model = make(layers, FITAR, groups=3, tokens=4, cross_mlp=True)
    tokens = torch.randint(6, (2, 12))
    state, last, out = model.new_state(), None, []
    for t in range(12):
        out.append(model.step(last, state, batch=2))
        last = tokens[:, t]
        assert len(state.held[0]) == (t + 1) % 4  # only the current group's tokens are kept
    torch.testing.assert_close(torch.stack(out, 1), model(tokens))
    with pytest.raises(ValueError, match="complete"):
        model.step(last, state)


def test_generated_tokens_are_the_likeliest_of_the_parallel_form():
    model = make("(1)1(1)", FITAR, groups=3, tokens=4)
    tokens = model.generate(2, temperature=0)
    assert torch.equal(model(tokens).argmax(-1), tokens)
    assert model.generate(3, 5).shape == (3, 5)


def test_autoregressive_refuses():
    with pytest.raises(ValueError, match="must end with local layers"):
        make("(1)1", FITAR)
    model = make("(1)1(1)", FITAR, groups=3, tokens=4)
    with pytest.raises(ValueError, match=r"tokens must be \(B, 12\)"):
        model(torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="last must be None"):
        model.step(torch.zeros(1, dtype=torch.long), model.new_state())
