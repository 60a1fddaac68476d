"""S022, the layer: loops, torch's attention in limiting cases, and that the world's frame does not count."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import Attention, KnockingHeadsAttention, RelativePoseAttention
from glocal.patterns import Sliding
from glocal.poses import RayEncoding, Rays, RelativePoses
from tests.test_poses import motions, moved, random, units

SMALL = RayEncoding(2, -1, 2)  # 24 channels
SELF_AND_CROSS = pytest.mark.parametrize("cross", [False, True])


def layer(**options):
    torch.manual_seed(0)
    settings = {"pose_dim": SMALL.channels, **options}
    made = RelativePoseAttention(8, 2, **settings).double()
    torch.nn.init.normal_(made.o_proj.bias)
    return made


def scene(views=3, count=4, asks=None, *, encoding=SMALL, batch=2):
    """Cameras, views, rays that ask (those of the views where None), and poses."""
    torch.manual_seed(1)
    cameras, directions = motions(batch, views), units(batch, views, count)
    rays = None if asks is None else Rays(random(batch, asks, 3), units(batch, asks))
    return cameras, directions, rays, encoding.relative(cameras, directions, rays)


def inputs(cross, views=3, count=4, asks=5, batch=2):
    torch.manual_seed(2)
    context = random(batch, views, count, 8)
    return (random(batch, asks, 8), context) if cross else (context, None)


def heads(module, *parts):
    """A projection of parts side by side, by the two weights as one, ``(..., 2, 4)``."""
    content, pose = module
    weight = torch.cat([content.weight, pose.weight], 1) if len(parts) > 1 else content.weight
    return (torch.cat(parts, -1) @ weight.mT).unflatten(-1, (2, -1))


def by_loops(made, x, context, poses, *, real=None, live=None):
    """One logit after the other, then torch's softmax over all of a query."""
    source = x if context is None else context
    batch, views, count = source.shape[:3]
    own = x if made.q_pose is None else None
    asks = x.flatten(1, 2) if context is None else x
    number = asks.shape[-2]
    out = []
    for b in range(batch):
        for i in range(number):
            mixed = []
            for h in range(2):
                logits, values = [], []
                for v in range(views):
                    if own is None:
                        q = heads((made.q_proj, made.q_pose), asks[b, i], poses.queries[b, v, i])[h]
                    else:
                        q = heads((made.q_proj, None), own[b, v, i])[h]
                    for j in range(count):
                        if real is not None and not real[b, v, j]:
                            continue
                        if live is not None and not live[i, v * count + j]:
                            continue
                        k = heads((made.k_proj, made.k_pose), source[b, v, j], poses.keys[b, v, j])[h]
                        parts = (source[b, v, j], poses.keys[b, v, j])[: 1 if made.v_pose is None else 2]
                        logits.append(made.scale * (q @ k))
                        values.append(heads((made.v_proj, made.v_pose), *parts)[h])
                if logits:
                    mixed.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                else:
                    mixed.append(torch.zeros(4, dtype=x.dtype))
            out.append(made.o_proj(torch.cat(mixed)))
    found = torch.stack(out).view(batch, number, -1)
    return found.view(x.shape) if context is None else found


@SELF_AND_CROSS
@pytest.mark.parametrize("options", [{}, {"value_pose": True}, {"scale": 1.0}])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_loops_over_queries_views_and_keys(cross, options, backend):
    made = layer(backend=backend, **options)
    x, context = inputs(cross)
    poses = scene(asks=5 if cross else None)[-1]
    torch.testing.assert_close(made(x, context, poses=poses), by_loops(made, x, context, poses))


@SELF_AND_CROSS
def test_padding_by_loops(cross):
    made = layer()
    x, context = inputs(cross)
    poses = scene(asks=5 if cross else None)[-1]
    keys = torch.rand(2, 3, 4) > 0.4
    keys[0, 1] = False  # a whole view
    keys[1] = False  # everything
    torch.testing.assert_close(made(x, context, poses=poses, keys=keys), by_loops(made, x, context, poses, real=keys))


def test_copies_for_each_camera_by_loops():
    made, (x, context) = layer(query_pose=False), inputs(True)
    poses = RelativePoses(None, scene(asks=5)[-1].keys)
    copies = random(2, 3, 5, 8)
    found = made(copies, context, poses=poses)
    assert found.shape == x.shape
    torch.testing.assert_close(found, by_loops(made, copies, context, poses))


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_a_pattern_over_all_views(backend):
    class Near(RelativePoseAttention):
        def where(self, q, k, call):
            return Sliding(3, 2)

    made = layer()
    made.__class__, made.backend = Near, backend
    x, _ = inputs(False)
    poses = scene()[-1]
    keys = torch.rand(2, 3, 4) > 0.3
    live = Sliding(3, 2).mask(12)
    wanted = by_loops(made, x, None, poses, real=keys, live=live)
    torch.testing.assert_close(made(x, poses=poses, keys=keys), wanted)


def side_by_side(made, x, poses, q_pose):
    """torch's attention on content and pose of all tokens as one sequence."""
    k_pose = poses.keys.flatten(1, 2)
    flat = x.flatten(1, 2)
    q = heads((made.q_proj, made.q_pose), flat, q_pose).transpose(1, 2)
    k = heads((made.k_proj, made.k_pose), flat, k_pose).transpose(1, 2)
    v = heads((made.v_proj, None), flat).transpose(1, 2)
    return made.o_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)


def test_one_view_is_torchs_attention_on_both_side_by_side():
    made, (x, _) = layer(), inputs(False, views=1)
    poses = scene(views=1)[-1]
    torch.testing.assert_close(poses.queries[:, 0], poses.keys[:, 0])
    torch.testing.assert_close(made(x, poses=poses), side_by_side(made, x, poses, poses.keys[:, 0]))


def test_equal_cameras_are_one():
    made, (x, _) = layer(), inputs(False)
    cameras, directions, _, _ = scene()
    poses = SMALL.relative(cameras[:, :1].expand(-1, 3, -1, -1), directions)
    torch.testing.assert_close(made(x, poses=poses), side_by_side(made, x, poses, poses.queries[:, 0]))


@SELF_AND_CROSS
def test_without_weights_of_poses_it_is_plain_attention(cross):
    made = layer()
    for part in (made.q_pose, made.k_pose):
        torch.nn.init.zeros_(part.weight)
    plain = Attention(8, 2, out_bias=True).double()
    plain.load_state_dict({name: t for name, t in made.state_dict().items() if "pose" not in name})
    x, context = inputs(cross)
    poses = scene(asks=5 if cross else None)[-1]
    flat = (x, context.flatten(1, 2)) if cross else (x.flatten(1, 2),)
    torch.testing.assert_close(made(x, context, poses=poses), plain(*flat).view(x.shape))
    torch.testing.assert_close(made(*flat), plain(*flat))  # and so it is where there are no poses


@pytest.mark.parametrize(("cross", "copies"), [(False, False), (True, False), (True, True)])
def test_the_worlds_frame_does_not_count(cross, copies):
    full = RayEncoding()
    made = layer(pose_dim=180, query_pose=not copies, value_pose=True)
    x, context = inputs(cross)
    x = random(2, 3, 5, 8) if copies else x
    cameras, directions, rays, poses = scene(asks=5 if cross else None, encoding=full)
    motion = motions(2)
    others, turned = moved(motion, cameras, Rays(random(2, 1, 3), units(2, 1)) if rays is None else rays)
    ways = (directions.flatten(1, 2) @ motion[:, :3, :3].mT).view_as(directions)
    later = full.relative(others, ways, None if rays is None else turned)
    if copies:
        poses, later = (RelativePoses(None, each.keys) for each in (poses, later))
    one, other = (made(x, context, poses=each) for each in (poses, later))
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_the_worlds_frame_does_not_count_in_float32_with_few_octaves():
    few = RayEncoding(4, -3, 3)
    made, (x, _) = layer(pose_dim=few.channels).float(), inputs(False)
    cameras, directions, _, _ = scene()
    motion = motions(2)
    others = cameras @ motion.inverse()[:, None]
    ways = (directions.flatten(1, 2) @ motion[:, :3, :3].mT).view_as(directions)
    one, other = (
        made(x.float(), poses=few.relative(c.float(), d.float())) for c, d in ((cameras, directions), (others, ways))
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_order_of_views():
    made, order = layer(), torch.tensor([2, 0, 1])
    x, _ = inputs(False)
    cameras, directions, _, poses = scene()
    other = SMALL.relative(cameras[:, order], directions[:, order])
    torch.testing.assert_close(made(x[:, order], poses=other), made(x, poses=poses)[:, order])
    x, context = inputs(True)
    cameras, directions, rays, poses = scene(asks=5)
    other = SMALL.relative(cameras[:, order], directions[:, order], rays)
    torch.testing.assert_close(made(x, context[:, order], poses=other), made(x, context, poses=poses))


def test_gradients():
    made = layer(value_pose=True)
    poses = scene(views=2, count=2, batch=1)[-1]
    x = random(1, 2, 2, 8).requires_grad_()
    queries, keys = (t.detach().requires_grad_() for t in poses)
    assert torch.autograd.gradcheck(lambda x, q, k: made(x, poses=RelativePoses(q, k)), (x, queries, keys))
    found = torch.autograd.grad((made(x, poses=poses) * x).sum(), list(made.parameters()))
    wanted = torch.autograd.grad((by_loops(made, x, None, poses) * x).sum(), list(made.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("norm", ["rms", "layer", "rms_all"])
def test_norms_see_content_and_pose(norm):
    made = layer(qk_norm=norm, num_kv_heads=1)
    x, context = inputs(True)
    poses = scene(asks=5)[-1]
    q = made.q_proj(x)[:, None] + made.q_pose(poses.queries)
    k = made.k_proj(context) + made.k_pose(poses.keys)
    q, k = (t if norm == "rms_all" else t.unflatten(-1, (-1, 4)) for t in (q, k))
    q, k = (m(t).reshape(*t.shape[:3], -1, 4) for m, t in ((made.q_norm, q), (made.k_norm, k)))
    scores = torch.einsum("bvihd,bvlgd->bhivl", q, k).flatten(3) * made.scale
    v = made.v_proj(context).flatten(1, 2)
    wanted = made.o_proj((scores.softmax(-1) @ v[:, None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x, context, poses=poses), wanted)


def test_together_with_another_mechanism():
    class Both(KnockingHeadsAttention, RelativePoseAttention):
        pass

    torch.manual_seed(0)
    both = Both(8, 2, pose_dim=SMALL.channels).double()
    for name, p in both.named_parameters():
        if "pose" not in name:
            torch.nn.init.normal_(p, std=0.3)
    x, _ = inputs(False)
    poses = scene()[-1]
    q, k, v = both.share(*both.make(x, x.flatten(1, 2)))
    q = q.flatten(2, 3)[:, :, None] + both.heads(both.q_pose(poses.queries), 2)
    k = k.view(2, 2, 3, 4, 4) + both.heads(both.k_pose(poses.keys), 2)
    scores = torch.einsum("bhvid,bhvld->bhivl", q, k).flatten(3) * both.scale
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(both(x, poses=poses), both.o_proj(mixed).view(x.shape))


def test_half_precision():
    made = layer().float()
    x, _ = inputs(False)
    poses = scene()[-1]
    wanted = made(x.float(), poses=poses)
    found = made.bfloat16()(x.bfloat16(), poses=poses)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.1)


def test_start():
    torch.manual_seed(0)
    made = RelativePoseAttention(64, 4)
    std = (64 + 180) ** -0.5
    # What is left of a normal's deviation between two of them.
    weights = made.state_dict()
    both = torch.cat([weights["q_proj.weight"], weights["q_pose.weight"]], 1)
    assert float(both.std()) == pytest.approx(0.88 * std, rel=0.05)
    assert float(weights["k_pose.weight"].abs().max()) <= 2 * std
    assert float(weights["v_proj.weight"].std()) == pytest.approx(0.88 / 8, rel=0.05)
    assert not made.o_proj.bias.any()


def test_bad_input():
    for name, value in (("rope", object()), ("lepe", 3), ("gate", True)):
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            RelativePoseAttention(8, 2, **{name: value})
    with pytest.raises(ValueError, match="views have no order"):
        RelativePoseAttention(8, 2, causal=True)
    with pytest.raises(ValueError, match="pose_dim must be at least 1"):
        RelativePoseAttention(8, 2, pose_dim=0)
    made, (x, context) = layer(), inputs(True)
    poses, own = scene(asks=5)[-1], scene()[-1]
    with pytest.raises(ValueError, match=r"x must be \(B, V, L, 8\)"):
        made(x, poses=own)
    with pytest.raises(ValueError, match=r"x must be \(2, N, 8\)"):
        made(x[:1], context, poses=poses)
    with pytest.raises(ValueError, match=r"queries of poses must be \(2, 3, 12, 24\)"):
        made(context, poses=poses)
    with pytest.raises(ValueError, match=r"keys of poses must be \(2, 2, 4, 24\)"):
        made(x, context[:, :2], poses=poses)
    with pytest.raises(ValueError, match=r"keys must be booleans \(2, 3, 4\)"):
        made(x, context, poses=poses, keys=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="positions must be left out"):
        made(x, context, poses=poses, positions=torch.arange(5))
    copies = layer(query_pose=False)
    with pytest.raises(ValueError, match="context must be given"):
        copies(context, poses=own)
    with pytest.raises(ValueError, match=r"x must be \(2, 3, N, 8\)"):
        copies(x, context, poses=poses)
    with pytest.raises(ValueError, match="queries of poses must be None"):
        copies(random(2, 3, 5, 8), context, poses=poses)
