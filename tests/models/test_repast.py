"""S022, the network: sizes, the world's frame, order of views, rays by themselves, the decoder by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

import glocal
from glocal.models.vision.repast import RePAST
from glocal.poses import RayEncoding, Rays, to_cameras
from tests.models.networks import assert_a_step_changes
from tests.test_poses import motions, moved, random, units


def tiny(**options):
    torch.manual_seed(0)
    return glocal.create("repast_tiny", **options).double().eval()


def scene(views=3, size=(16, 24), rays=5, batch=2):
    torch.manual_seed(1)
    images, cameras = torch.rand(batch, views, 3, *size).double(), motions(batch, views)
    return images, cameras, units(batch, views, *size), Rays(random(batch, rays, 3), units(batch, rays))


@pytest.mark.parametrize(("name", "dim", "hidden"), [("repast_clevr", 384, 768), ("repast_msn", 768, 1536)])
def test_parameters_piece_by_piece(name, dim, hidden):
    """The sum that a reading of the public implementation gives, which a count of it confirms."""
    stem = 9 * (3 * 96 + 96 * 192 + 192 * 192 + 192 * 384 + 384 * 384 + 384 * 768) + 768 * dim + dim
    encoder = 2 * dim * (dim + 180) + dim * dim + (dim * dim + dim) + (dim * 2 * dim + 2 * dim) + (2 * dim * dim + dim)
    cross = 180 * dim + (dim + 180) * dim + dim * dim + (dim * 180 + 180)
    cross += (180 * 2 * dim + 2 * dim) + (2 * dim * 180 + 180)
    query = 180 * 360 + 360 + 360 * 180 + 180
    render = 180 * hidden + hidden + 3 * (hidden * hidden + hidden) + 3 * hidden + 3
    wanted = stem + 5 * (encoder + 4 * dim) + query + 2 * (cross + 4 * 180) + render
    assert glocal.models.registry.parameters(name) == wanted


def test_the_worlds_frame_does_not_count():
    model = tiny(encoding=RayEncoding())
    images, cameras, directions, rays = scene()
    motion = motions(2)
    others, turned = moved(motion, cameras, rays)
    ways = (directions.flatten(1, 3) @ motion[:, :3, :3].mT).view_as(directions)
    found = model(images, others, ways, turned)
    assert found.std() > 1e-3
    torch.testing.assert_close(found, model(images, cameras, directions, rays), atol=1e-9, rtol=0)


def test_in_float32_with_few_octaves():
    model = tiny(encoding=RayEncoding(4, -3, 3)).float()
    images, cameras, directions, rays = scene()
    motion = motions(2)
    others, turned = moved(motion, cameras, rays)
    ways = (directions.flatten(1, 3) @ motion[:, :3, :3].mT).view_as(directions)

    def colours(cameras, directions, rays):
        return model(images.float(), cameras.float(), directions.float(), Rays(*(t.float() for t in rays)))

    torch.testing.assert_close(colours(others, ways, turned), colours(cameras, directions, rays), atol=1e-5, rtol=0)


def test_poses_count():
    model = tiny()
    images, cameras, directions, rays = scene()
    found = model(images, cameras, directions, rays)
    nearer = cameras.clone()
    nearer[:, 0, 2, 3] += 0.1
    assert (model(images, nearer, directions, rays) - found).abs().max() > 1e-6


def test_order_of_views_and_rays():
    model, order = tiny(), torch.tensor([2, 0, 1])
    images, cameras, directions, rays = scene()
    one = model.encode(images, cameras, directions)
    other = model.encode(images[:, order], cameras[:, order], directions[:, order])
    torch.testing.assert_close(other.tokens, one.tokens[:, order])
    found = model.decode(one, rays)
    torch.testing.assert_close(model.decode(other, rays), found)
    apart = [model.decode(one, Rays(*(t[:, i : i + 1] for t in rays))) for i in range(5)]
    torch.testing.assert_close(torch.cat(apart, 1), found)


def test_a_token_has_the_ray_behind_its_middle():
    model = tiny()
    images, cameras, directions, _ = scene()
    found = model.encode(images, cameras, directions)
    assert found.tokens.shape == (2, 3, 6, 32)
    row, column = 1, 2
    way = cameras[0, 1, :3, :3] @ directions[0, 1, 8 * row + 4, 8 * column + 4]
    wanted = model.encoding(Rays(torch.zeros(3).double(), way))
    torch.testing.assert_close(found.poses[0, 1, 3 * row + column], wanted)


def test_the_decoder_by_hand():
    """Copies of a query stay apart but for what attention gives, which goes to all."""
    model = tiny()
    images, cameras, directions, rays = scene(batch=1)
    world = model.encode(images, cameras, directions)
    width = model.encoding.channels
    copies = [model.query(model.encoding(Rays(*(t[0, v] for t in to_cameras(cameras, rays))))) for v in range(3)]
    block, attention = model.decoder[0], model.decoder[0].attention
    normed = [layer_norm(c, (width,), block.norm1.weight, block.norm1.bias) for c in copies]
    scores, values = [], []
    for v in range(3):
        q = attention.q_proj(normed[v]).unflatten(-1, (4, 8))
        k = attention.k_proj(world.tokens[0, v]) + attention.k_pose(world.poses[0, v])
        scores.append(torch.einsum("nhd,lhd->hnl", q, k.unflatten(-1, (4, 8))) * 8**-0.5)
        values.append(attention.v_proj(world.tokens[0, v]).unflatten(-1, (4, 8)))
    mixed = torch.einsum("hnl,lhd->nhd", torch.cat(scores, -1).softmax(-1), torch.cat(values))
    given = attention.o_proj(mixed.flatten(1))
    ends = []
    for copy in copies:
        x = copy + given
        normal = layer_norm(x, (width,), block.norm2.weight, block.norm2.bias)
        ends.append(x + block.mlp.fc2(gelu(block.mlp.fc1(normal))))
    wanted = model.render(sum(ends) / 3)
    torch.testing.assert_close(model(images, cameras, directions, rays)[0], wanted)


def test_one_step_of_training_reaches_every_weight():
    model = tiny(value_pose=True).float().train()
    images, cameras, directions, rays = scene()
    found = model(images.float(), cameras.float(), directions.float(), Rays(*(t.float() for t in rays)))
    assert found.min() >= 0 and found.max() <= 1
    (found - torch.rand(2, 5, 3)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert_a_step_changes(model)


def test_dropout_is_for_training():
    model = tiny(dropout=0.5)
    given = scene()
    assert torch.equal(model(*given), model(*given))
    model.train()
    assert not torch.equal(model(*given), model(*given))
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(rates) == 6 and set(rates) == {0.5}


def test_state_dict_and_export():
    model, other = tiny(), tiny().apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
    given = scene()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*given), model(*given))
    exported = torch.export.export(model, given).module()
    torch.testing.assert_close(exported(*given), model(*given))


def test_half_precision():
    model = tiny().float()
    images, cameras, directions, rays = scene()
    images, cameras, directions, rays = (
        *(t.float() for t in (images, cameras, directions)),
        Rays(*(t.float() for t in rays)),
    )
    wanted = model(images, cameras, directions, rays)
    found = model.bfloat16()(images.bfloat16(), cameras, directions, rays)  # poses stay in float32
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="conv_dim must be a multiple of 8"):
        RePAST(32, 4, conv_dim=12)
    with pytest.raises(ValueError, match="dim 30 must be a multiple of num_heads 4"):
        RePAST(30, 4)
    model, (images, cameras, directions, rays) = tiny(), scene()
    with pytest.raises(ValueError, match="images must be"):
        model(images[..., 1:], cameras, directions, rays)
    with pytest.raises(ValueError, match="images must be"):
        model(images[:, :0], cameras[:, :0], directions[:, :0], rays)
    with pytest.raises(ValueError, match=r"cameras must be \(2, 3, 4, 4\)"):
        model(images, cameras[..., :3, :], directions, rays)
    with pytest.raises(ValueError, match=r"directions must be \(2, 3, 16, 24, 3\)"):
        model(images, cameras, directions[..., 1:, :], rays)
    with pytest.raises(ValueError, match="origins of rays must be"):
        model(images, cameras, directions, Rays(*(t[:1] for t in rays)))
