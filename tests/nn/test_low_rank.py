"""S057: heads of any rank, against torch's own attention, loops, a hard limit, and another mechanism in the frame."""

import pytest
import torch
from torch import nn

from glocal.nn import Attention, LowRankAttention, SlidingWindowAttention, hard_attend, low_rank_attention
from glocal.patterns import Causal, Keys, PerHead, Sliding, Window


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(points, queries, q, k, vo, sharpness=1.0):
    out = torch.zeros(*queries.shape[:2], vo.shape[-1], dtype=points.dtype)
    for b in range(len(points)):
        for n in range(queries.shape[1]):
            for h in range(len(q)):
                scores = torch.stack([(q[h] @ queries[b, n]) @ (k[h] @ x) for x in points[b]]) / q.shape[1] ** 0.5
                shares = (sharpness * scores).softmax(0)
                out[b, n] += vo[h].mT @ sum(share * x for share, x in zip(shares, points[b], strict=True))
    return out


@pytest.mark.parametrize(("heads", "rank"), [(1, 5), (3, 2), (4, 1), (2, 7)])
def test_by_loops(heads, rank):
    points, queries = drawn(2, 6, 5), drawn(2, 3, 5, seed=1)
    q, k, vo = drawn(heads, rank, 5, seed=2), drawn(heads, rank, 5, seed=3), drawn(heads, 5, 4, seed=4)
    torch.testing.assert_close(low_rank_attention(points, queries, q, k, vo), by_loops(points, queries, q, k, vo))
    torch.testing.assert_close(
        low_rank_attention(points, queries, q, k, vo, backend="dense", scale=3 / rank**0.5),
        by_loops(points, queries, q, k, vo, 3.0),
    )


def test_torch_where_ranks_add_up_to_the_channels():
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    q, k, v = (w.unflatten(0, (3, 4)) for w in peer.in_proj_weight.chunk(3))
    out = peer.out_proj.weight.unflatten(1, (3, 4))
    vo = torch.einsum("hrd,ehr->hde", v, out)
    points, queries = drawn(2, 7, 12), drawn(2, 5, 12, seed=1)
    wanted, _ = peer(queries, points, points)
    torch.testing.assert_close(low_rank_attention(points, queries, q, k, vo), wanted)
    layer = LowRankAttention(12, 3).double()
    with torch.no_grad():
        layer.q_proj.weight.copy_(q.flatten(0, 1))
        layer.k_proj.weight.copy_(k.flatten(0, 1))
        layer.o_proj.weight.copy_(vo.flatten(0, 1).mT)
    torch.testing.assert_close(layer(queries, points), wanted)


def test_the_frame_with_values_and_output_in_one_matrix():
    """Where VO has a low rank, it is plain attention of the frame, with a pattern, groups and biases."""
    torch.manual_seed(0)
    plain = SlidingWindowAttention(12, 4, num_kv_heads=2, window=3, causal=True, qkv_bias=True).double()

    class Both(LowRankAttention, SlidingWindowAttention):
        """Two mechanisms with different parts."""

    both = Both(12, 4, num_kv_heads=2, window=3, causal=True, qkv_bias=True).double()
    v = plain.v_proj.weight.unflatten(0, (2, 3)).repeat_interleave(2, 0)
    vo = torch.einsum("hrd,ehr->hde", v, plain.o_proj.weight.unflatten(1, (4, 3)))
    nn.init.zeros_(plain.v_proj.bias)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(both, name).load_state_dict(getattr(plain, name).state_dict())
        both.o_proj.weight.copy_(vo.flatten(0, 1).mT)
    x = drawn(2, 9, 12)
    keys = torch.arange(9) < torch.tensor([[9], [6]])
    torch.testing.assert_close(both(x, keys=keys), plain(x, keys=keys))


@pytest.mark.parametrize("backend", ["dense", "sdpa", "native"])
@pytest.mark.parametrize("where", [None, Sliding(2, 1), Causal()])
def test_layer_and_function_are_one(backend, where):
    torch.manual_seed(0)

    class Looking(LowRankAttention):
        """Sees what the test says."""

        def where(self, q, k, call):
            return super().where(q, k, call) if where is None else where

    layer = Looking(8, 3, rank=2, backend=backend)
    x = torch.randn(2, 7, 8)
    wanted = low_rank_attention(x, x, *layer.matrices(), where=where, backend="dense")
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", [None, Sliding(1, 2), PerHead([Sliding(0, 0), Sliding(3, 3), Causal()])])
def test_hard_is_a_softmax_at_temperature_near_zero(where):
    points, queries = drawn(2, 6, 5), drawn(2, 6, 5, seed=1)
    q, k, vo = drawn(3, 2, 5, seed=2), drawn(3, 2, 5, seed=3), drawn(3, 5, 5, seed=4)
    hard = low_rank_attention(points, queries, q, k, vo, where=where, hard=True)
    soft = low_rank_attention(points, queries, q, k, vo, where=where, scale=1e6, backend="dense")
    torch.testing.assert_close(hard, soft)
    torch.manual_seed(0)
    layer = LowRankAttention(5, 3, rank=2, hard=True, causal=True).double()
    soft_layer = LowRankAttention(5, 3, rank=2, scale=1e6, causal=True).double()
    soft_layer.load_state_dict(layer.state_dict())
    keys = torch.tensor([[False, True, True, True, True, False]] * 2)
    torch.testing.assert_close(layer(points, keys=keys), soft_layer(points, keys=keys))


def test_hard_by_loops_on_maps_and_groups(monkeypatch):
    monkeypatch.setattr("glocal.nn.low_rank._AT_ONCE", 2 * 4 * 20 * 3)  # three queries at a time
    q, k, v = drawn(2, 4, 4, 5, 3), drawn(2, 2, 4, 5, 3, seed=1), drawn(2, 2, 4, 5, 6, seed=2)
    where = Window((3, 3)) & Keys(torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.9)
    found = hard_attend(q, k, v, where, scale=-1.0).flatten(2, 3)
    mask = where.mask((4, 5)).expand(2, 1, 20, 20)
    empty = 0
    for b in range(2):
        for h in range(4):
            for n in range(20):
                seen = mask[b, 0, n].nonzero().flatten().tolist()
                empty += not seen
                query, keys = q[b, h].flatten(0, 1)[n], k[b, h // 2].flatten(0, 1)
                best = min(seen, key=lambda m: float(query @ keys[m]), default=None)
                wanted = torch.zeros(6) if best is None else v[b, h // 2].flatten(0, 1)[best]
                torch.testing.assert_close(found[b, h, n], wanted.to(found))
    assert empty


def test_hard_takes_the_first_of_equals_and_gives_values_gradients():
    v = drawn(1, 1, 4, 2).requires_grad_()
    out = hard_attend(torch.zeros(1, 1, 3, 2).double(), drawn(1, 1, 4, 2, seed=1), v)
    assert torch.equal(out, v[:, :, :1].expand(-1, -1, 3, -1))
    out.sum().backward()
    assert v.grad.flatten().tolist() == [3, 3, 0, 0, 0, 0, 0, 0]


def test_gradients():
    points, queries = drawn(1, 4, 3).requires_grad_(), drawn(1, 2, 3, seed=1).requires_grad_()
    matrices = [drawn(2, *shape, seed=n).requires_grad_() for n, shape in enumerate(((2, 3), (2, 3), (3, 3)))]
    assert torch.autograd.gradcheck(lambda *t: low_rank_attention(*t), (points, queries, *matrices))


def test_weights_are_drawn_within_their_ranges():
    torch.manual_seed(0)
    layer = LowRankAttention(64, 16, rank=2)
    q, k, vo = layer.matrices()
    for matrix, wanted in ((q, (6 / 66) ** 0.5), (k, (6 / 66) ** 0.5), (vo, (6 / (17 * 64)) ** 0.5)):
        assert 0.99 * wanted < float(matrix.detach().abs().max()) <= wanted
        assert float(matrix.detach().std()) == pytest.approx(wanted / 3**0.5, rel=0.05)
    assert layer.scale == 2**-0.5 and "v_proj.weight" not in layer.state_dict()


def test_a_context_of_other_channels():
    layer = LowRankAttention(8, 2, rank=3, kv_dim=5)
    assert layer(torch.randn(2, 4, 8), torch.randn(2, 6, 5)).shape == (2, 4, 8)


class Biased(Attention):
    """Scores with a bias."""

    def score(self, call):
        return -torch.arange(float(call.context.shape[1]))


def test_bad_input():
    points, matrix = torch.randn(2, 4, 3), torch.randn(2, 1, 3)
    with pytest.raises(ValueError, match="q_weight and k_weight must both be"):
        low_rank_attention(points, points, matrix, matrix[:1], torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match=r"vo_weight must be \(2, 3, e\)"):
        low_rank_attention(points, points, matrix, matrix, torch.randn(1, 3, 3))
    with pytest.raises(ValueError, match=r"queries must be \(2, n, 3\)"):
        low_rank_attention(points, points[:1], matrix, matrix, torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match="q and k must be"):
        hard_attend(torch.randn(1, 3, 4, 2), torch.randn(1, 2, 4, 2), torch.randn(1, 2, 4, 2))
    with pytest.raises(ValueError, match="v must be"):
        hard_attend(torch.randn(1, 2, 4, 2), torch.randn(1, 2, 4, 2), torch.randn(1, 2, 5, 2))
    for name, value in (("lepe", 3), ("gate", True), ("head_dim", 4)):
        with pytest.raises(ValueError, match=f"{name} is not for LowRankAttention"):
            LowRankAttention(8, 2, **{name: value})

    class Both(LowRankAttention, Biased):
        """Hard, with a bias."""

    assert Both(8, 2)(torch.randn(1, 4, 8)).shape == (1, 4, 8)
    with pytest.raises(ValueError, match="takes no bias"):
        Both(8, 2, hard=True)(torch.randn(1, 4, 8))
