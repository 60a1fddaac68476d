"""S057: the task of the nearest point by loops, and its transformer against torch's own layers."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from glocal.bench.nearest import (
    NearestPoint,
    PointEncoder,
    RankResult,
    rank_table,
    squared_error,
    train_points,
)
from glocal.nn import LowRankAttention


@pytest.mark.parametrize("kind", ["uniform", "orthogonal", "doubled"])
@pytest.mark.parametrize("queries", [None, 3])
def test_targets_by_loops(kind, queries):
    points, wanted, targets = NearestPoint(5, 4, queries, kind).batch(20, torch.Generator().manual_seed(0))
    count = 8 if kind == "doubled" else 4
    assert points.shape == (20, count, 5) and targets.shape == wanted.shape == (20, queries or count, 5)
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(20, count))
    torch.testing.assert_close(wanted.norm(dim=-1), torch.ones(wanted.shape[:2]))
    for item in range(20):
        for query, target in zip(wanted[item], targets[item], strict=True):
            distances = [float((query - point).square().sum()) for point in points[item]]
            assert target.tolist() in points[item].tolist()
            best = max(distances) if queries is None else min(distances)  # orthogonal points are equally far away
            assert float((query - target).square().sum()) == pytest.approx(best, abs=1e-5)
    if kind == "orthogonal":
        torch.testing.assert_close(points @ points.mT, torch.eye(4).expand(20, -1, -1), atol=1e-5, rtol=0)
    if kind == "doubled":
        assert torch.equal(points[:, 4:], -points[:, :4])
        if queries is None:
            assert torch.equal(targets, -points)


def test_points_are_spread_evenly():
    points = NearestPoint(3, 50).batch(400, torch.Generator().manual_seed(0)).points.flatten(0, 1)
    assert float(points.mean(0).abs().max()) < 0.02
    torch.testing.assert_close(points.mT @ points / len(points), torch.eye(3) / 3, atol=0.01, rtol=0)


def test_error_is_summed_over_channels_and_averaged_over_queries():
    found, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = sum(float(((found - targets)[b, n] ** 2).sum()) for b in range(2) for n in range(3)) / 6
    assert float(squared_error(found, targets)) == pytest.approx(wanted, rel=1e-5)


class Sphere(nn.Module):
    """The norm of the sweep, for torch's layer."""

    def forward(self, x):
        return 1.5 * normalize(x, dim=-1)


@pytest.mark.parametrize("width", [1, 3])
def test_layers_of_torch(width):
    """Averaged attention modules of torch's own encoder layer, on equal weights."""
    torch.manual_seed(0)
    peer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True).double()
    peer.norm1, peer.norm2 = Sphere(), Sphere()
    modules = [nn.MultiheadAttention(8, 2, batch_first=True).double() for _ in range(width)]
    model = PointEncoder(8, 2, 1, width=width, hidden=32).double()
    (layer,) = model.layers
    with torch.no_grad():
        for module in modules:
            module.in_proj_bias.normal_()
            module.out_proj.bias.normal_()
        for norm in (layer.norm1, layer.norm2):
            norm.scale.fill_(1.5)
        for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
            mine = getattr(layer.attention, name)
            mine.weight.copy_(torch.cat([m.in_proj_weight.chunk(3)[number] for m in modules]))
            mine.bias.copy_(torch.cat([m.in_proj_bias.chunk(3)[number] for m in modules]))
        layer.attention.o_proj.weight.copy_(torch.cat([m.out_proj.weight for m in modules], 1))
        layer.attention.o_proj.bias.copy_(sum(m.out_proj.bias for m in modules))
        for name in ("linear1", "linear2"):
            getattr(layer, name).load_state_dict(getattr(peer, name).state_dict())
    x = torch.randn(3, 6, 8).double()
    wanted = peer.norm1(x + sum(m(x, x, x, need_weights=False)[0] for m in modules) / width)
    wanted = peer.norm2(wanted + peer._ff_block(wanted))
    torch.testing.assert_close(model(x), wanted)
    if width == 1:
        peer.self_attn.load_state_dict(modules[0].state_dict())
        torch.testing.assert_close(model(x), peer.train()(x))


def test_weights_are_drawn_as_torch_draws_them():
    torch.manual_seed(0)
    mine, peer = PointEncoder(64, 4, 1, hidden=8).layers[0], nn.TransformerEncoderLayer(64, 4, 8)
    ours = {
        "in": torch.cat([getattr(mine.attention, f"{name}_proj").weight for name in "qkv"]),
        "out": mine.attention.o_proj.weight,
        "one": mine.linear1.weight,
    }
    theirs = {
        "in": peer.self_attn.in_proj_weight,
        "out": peer.self_attn.out_proj.weight,
        "one": peer.linear1.weight,
    }
    for name, weight in ours.items():
        assert float(weight.detach().std()) == pytest.approx(float(theirs[name].detach().std()), rel=0.06)
        assert float(weight.detach().abs().max()) == pytest.approx(float(theirs[name].detach().abs().max()), rel=0.02)


def test_a_transformer_that_is_exact():
    """The official construction: a sharp head of full rank, then layers that pass through."""
    model = PointEncoder(4, 1, 3, hidden=8)
    with torch.no_grad():
        for p in model.layers.parameters():
            if p.dim():  # all but the lengths of norms
                p.zero_()
        first = model.layers[0].attention
        first.q_proj.weight.copy_(-1e6 * torch.eye(4))
        first.k_proj.weight.copy_(torch.eye(4))
        first.v_proj.weight.copy_(torch.eye(4))
        first.o_proj.weight.copy_(1e6 * torch.eye(4))
    batch = NearestPoint(4, 9).batch(20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch.points), batch.targets, atol=1e-4, rtol=0)


def test_order_of_points_counts_only_with_positions():
    torch.manual_seed(0)
    x, order = torch.randn(2, 5, 6), torch.tensor([3, 1, 4, 0, 2])
    for options in ({}, {"position_dim": 2, "max_points": 5}, {"add_positions": True, "max_points": 7}):
        model = PointEncoder(6, 2, 2, hidden=16, **options)
        same = torch.allclose(model(x[:, order]), model(x)[:, order], atol=1e-6)
        assert same == (not options) and model(x).shape == x.shape
        model(x).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.dim())


@pytest.mark.parametrize("queries", [None, 4])
def test_training_learns(queries):
    """In the plane, where it is easy."""
    torch.manual_seed(0)
    task = NearestPoint(2, 3, queries)
    before = train_points(LowRankAttention(2, 1, rank=2), task, steps=1, lr=1e-9, held=500)
    after = train_points(LowRankAttention(2, 1, rank=2), task, steps=300, lr=0.05, held=500)
    assert before > 0.4 and after < 0.25
    again = [train_points(make(), task, steps=5, batch=8, held=300, seed=3) for make in [_model] * 2]
    assert again[0] == again[1]


def _model():
    torch.manual_seed(1)
    return LowRankAttention(2, 2, rank=1)


def test_the_table_goes_by_depth_and_size():
    rows = rank_table(
        [RankResult(1, 32, 1, 0.5), RankResult(8, 1, 3, 0.01), RankResult(2, 4, 1, 0.4), RankResult(8, 1, 1, 0.05)]
    ).rows
    assert [row[:3] for row in rows] == [("8", "1", "1"), ("2", "4", "1"), ("1", "32", "1"), ("8", "1", "3")]
    assert rows[0][3:] == ("8", "0.050")


def test_bad_input():
    with pytest.raises(ValueError, match="dim must be at least 1"):
        NearestPoint(0, 3)
    with pytest.raises(ValueError, match="at most dim 3"):
        NearestPoint(3, 4, kind="orthogonal")
    with pytest.raises(ValueError, match="kind must be"):
        NearestPoint(3, 4, kind="grid")
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        PointEncoder(6, 2, 1, position_dim=1, max_points=3)
    with pytest.raises(ValueError, match="width must be at least 1"):
        PointEncoder(6, 2, 1, width=0)
    with pytest.raises(ValueError, match="max_points must be at least 1"):
        PointEncoder(6, 2, 1, add_positions=True)
    with pytest.raises(ValueError, match="at most max_points 3"):
        PointEncoder(6, 2, 1, hidden=4, add_positions=True, max_points=3)(torch.randn(1, 4, 6))
    with pytest.raises(ValueError, match="context must be None"):
        PointEncoder(6, 2, 1, hidden=4)(torch.randn(1, 4, 6), torch.randn(1, 4, 6))
