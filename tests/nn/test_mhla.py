"""S060: multi-head linear attention by definition, its limits, its rank, and the causal form in one and in pieces."""

import math
from itertools import product

import pytest
import torch

from glocal.nn import Rope
from glocal.nn.mhla import MultiHeadLinearAttention, mixing_matrix, multi_head_linear
from glocal.nn.mhla_causal import CausalMultiHeadLinearAttention, causal_multi_head_linear
from tests.nn.layers import project, steps


def feature(x):
    return x.relu() + 1e-6


def block_of(grid, blocks):
    """The number of each token's block, row by row, by counting."""
    sides = [math.ceil(n / b) for n, b in zip(grid, blocks, strict=True)]
    found = []
    for at in product(*[range(n) for n in grid]):
        number = 0
        for place, side, count in zip(at, sides, blocks, strict=True):
            number = number * count + place // side
        found.append(number)
    return torch.tensor(found)


def weights(q, k, mixing, at_q, at_k, mask=1.0):
    """Of the definition, not normalised: ``(..., N, M)``."""
    return mixing[at_q][:, at_k] * (q @ k.mT) * mask


def tensors(grid=(12,), grid_k=None, heads=2, kv_heads=2, d=4, e=3):
    torch.manual_seed(0)
    sizes = (heads, *grid, d), (kv_heads, *(grid_k or grid), d), (kv_heads, *(grid_k or grid), e)
    return [torch.randn(2, *size, dtype=torch.double).requires_grad_() for size in sizes]


def matrix(m):
    return torch.rand(m, m, dtype=torch.double).requires_grad_()


@pytest.mark.parametrize(
    "grid,blocks",
    [((12,), (4,)), ((13,), (4,)), ((2,), (4,)), ((8, 8), (2, 4)), ((7, 5), (3, 2)), ((4, 6, 4), (2, 3, 1))],
)
def test_by_definition(grid, blocks):
    q, k, v = tensors(grid)
    mixing, at = matrix(math.prod(blocks)), block_of(grid, blocks)
    fq, fk = (feature(t).flatten(2, -2) for t in (q, k))
    scores = weights(fq, fk, mixing, at, at)
    wanted = (scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v.flatten(2, -2)).view(*q.shape[:-1], 3)
    found = multi_head_linear(q, k, v, mixing, blocks)
    assert torch.allclose(found, wanted, atol=1e-12)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v, mixing)) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-8, rtol=1e-6) for a, b in zip(one, other, strict=True))


def test_other_grids_of_queries_fewer_key_heads_padding():
    q, k, v = tensors((5, 4), (9, 6), heads=4)
    mixing, keys = matrix(6), torch.rand(2, 54) > 0.3
    fq, fk = (feature(t).flatten(2, -2) for t in (q, k))
    fk = fk.repeat_interleave(2, 1)
    scores = weights(fq, fk, mixing, block_of((5, 4), (3, 2)), block_of((9, 6), (3, 2)), keys[:, None, None])
    wanted = scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v.flatten(2, -2).repeat_interleave(2, 1)
    found = multi_head_linear(q, k, v, mixing, (3, 2), keys=keys)
    assert torch.allclose(found.flatten(2, 3), wanted, atol=1e-12)


def test_the_released_divisor_mixes_the_products_of_other_blocks_queries():
    q, k, v = tensors((6, 4))
    mixing, at = matrix(4), block_of((6, 4), (2, 2))
    fq, fk = (feature(t).flatten(2, -2) for t in (q, k))
    counts = torch.stack([fk[:, :, at == b].sum(2) for b in range(4)], 2)
    dots = torch.stack([(fq[:, :, at == b] @ counts[:, :, b, :, None])[..., 0] for b in range(4)], 2)
    below = torch.empty(2, 2, 24, dtype=torch.double)
    for b in range(4):
        below[:, :, at == b] = sum(mixing[b, c] * dots[:, :, c] for c in range(4))
    scores = weights(fq, fk, mixing, at, at) / (below + 1e-6)[..., None]
    found = multi_head_linear(q, k, v, mixing, (2, 2), norm="released").flatten(2, 3)
    assert torch.allclose(found, scores @ v.flatten(2, 3), atol=1e-12)
    assert not torch.allclose(scores.sum(-1), torch.ones(()).double(), atol=0.1)


def test_one_mixture_is_linear_attention_and_none_is_local():
    q, k, v = tensors((12,))
    fq, fk = feature(q), feature(k)
    plain = fq @ (fk.mT @ v) / (fq @ fk.sum(2)[..., None] + 1e-6)
    assert torch.allclose(multi_head_linear(q, k, v, torch.ones(4, 4).double(), (4,)), plain, atol=1e-12)
    alone = [multi_head_linear(*(t[:, :, n : n + 3] for t in (q, k, v)), torch.ones(1, 1), (1,)) for n in (0, 3, 6, 9)]
    assert torch.allclose(multi_head_linear(q, k, v, torch.eye(4), (4,)), torch.cat(alone, 2), atol=1e-12)


def test_constant_values_are_kept():
    q, k, v = (t.abs() + 0.1 for t in tensors((8, 8)))
    found = multi_head_linear(q, k, torch.full_like(v, 3), mixing_matrix((4, 4)), (4, 4))
    assert torch.allclose(found, torch.full_like(found, 3), atol=1e-4)


def test_it_has_more_than_the_rank_of_linear_attention():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, 8, dtype=torch.double).unbind()
    eye = torch.eye(64, dtype=torch.double)[None, None]
    ranks = {
        name: int(torch.linalg.matrix_rank(multi_head_linear(q, k, eye, mixing, (8,))[0, 0], rtol=1e-9))
        for name, mixing in {"one": torch.ones(8, 8), "linear": mixing_matrix((8,))}.items()
    }
    assert ranks["one"] == 8 and 32 < ranks["linear"] <= 64
    assert torch.linalg.matrix_rank(multi_head_linear(q, k, eye, mixing_matrix((2,)), (2,))[0, 0]) <= 16


def test_blocks_that_change_places_do_so_in_the_output():
    q, k, v = tensors((12,))
    mixing, order = matrix(4), torch.tensor([2, 0, 3, 1])
    moved = [t.unflatten(2, (4, 3))[:, :, order].flatten(2, 3) for t in (q, k, v)]
    found = multi_head_linear(*moved, mixing[order][:, order], (4,))
    wanted = multi_head_linear(q, k, v, mixing, (4,)).unflatten(2, (4, 3))[:, :, order].flatten(2, 3)
    assert torch.allclose(found, wanted, atol=1e-12)


def test_the_first_mixture():
    at = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double()
    far = torch.cdist(at, at)
    largest = math.sqrt(5)
    for kind, wanted in {
        "linear": 1 - far / largest,
        "cos": torch.cos(math.pi / 4 * far / largest),
        "exp": torch.exp(-far / 1.5),
        "local": (far < 1.6).double(),
    }.items():
        found = mixing_matrix((2, 3), kind, sigma=1.5).double()
        assert torch.allclose(found, wanted / wanted.sum(0, keepdim=True), atol=1e-6), kind
    gaussian = torch.exp(-(far**2) / (2 * (largest / 3) ** 2))
    assert torch.allclose(mixing_matrix((2, 3), "gaussian").double(), gaussian, atol=1e-6)
    assert mixing_matrix((1,)).tolist() == [[1.0]]
    rows = mixing_matrix((4, 4)).sum(1)
    assert rows.max() - rows.min() > 0.1  # columns sum to one, rows do not


def causal_weights(q, k, mixing, chunk, n):
    at = torch.arange(n) // chunk
    return weights(q.relu() * 0.5, k.relu(), mixing, at, at, torch.ones(n, n, dtype=torch.double).tril())


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("n", [1, 13])
def test_causal_by_definition(n, chunk):
    q, k, v = tensors((n,), heads=4)
    mixing = matrix(13)
    wanted = causal_weights(q, k.repeat_interleave(2, 1), mixing, chunk, n) @ v.repeat_interleave(2, 1)
    found, state = causal_multi_head_linear(q, k, v, mixing, chunk=chunk)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert state.done.shape == (2, 2, n // chunk, 4, 3)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v, mixing)) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("pieces", [[1] * 13, [4, 4, 5], [3, 1, 9], [5, 8], [12, 1]])
def test_causal_in_pieces(pieces):
    q, k, v = tensors((13,))
    keys = torch.arange(13) >= torch.tensor([[3], [0]])
    mixing = matrix(4)
    whole, last = causal_multi_head_linear(q, k, v, mixing, chunk=4, keys=keys)
    outs, state, start = [], None, 0
    for length in pieces:
        part = slice(start, start + length)
        given = (t[:, :, part] for t in (q, k, v))
        out, state = causal_multi_head_linear(*given, mixing, chunk=4, keys=keys[:, part], start=start, state=state)
        outs.append(out)
        start += length
    assert torch.allclose(torch.cat(outs, 2), whole, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(state, last, strict=True))


def test_the_future_changes_nothing_at_all():
    q, k, v = (t.detach() for t in tensors((13,)))
    mixing = matrix(4)
    whole = causal_multi_head_linear(q, k, v, mixing, chunk=4)[0]
    for t in range(1, 13):
        changed = [torch.cat([x[:, :, :t], torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]
        assert torch.equal(causal_multi_head_linear(*changed, mixing, chunk=4)[0][:, :, :t], whole[:, :, :t])


def test_the_layer_of_language():
    """Fewer channels of keys than of values, rotated features, no divisor, norm and gate; longer than one chunk."""
    torch.manual_seed(0)
    rope = Rope()
    layer = CausalMultiHeadLinearAttention(24, 2, chunk=4, max_blocks=5, head_dim=6, value_dim=12, rope=rope).double()
    torch.nn.init.uniform_(layer.mixing, -0.5, 2)
    x = torch.randn(2, 18, 24).double()
    q, k, v = project(layer, x)
    assert q.shape == (2, 2, 18, 6) and v.shape == (2, 2, 18, 12)
    at, blocks = torch.arange(18), torch.arange(18) // 4
    mixing = layer.mixing.clamp(1e-5, 1)
    scores = weights(rope(q.relu(), at), rope(k.relu(), at), mixing, blocks, blocks)
    out = 6**-0.5 * scores.tril() @ v
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight
    gate = x @ layer.g_proj.weight.T
    wanted = layer.o_proj(out.movedim(1, -2).flatten(-2) * gate * gate.sigmoid())
    assert torch.allclose(layer(x), wanted, atol=1e-10)
    for prompt in (0, 7, 8):
        found, cache = steps(layer, x, prompt)
        assert torch.allclose(found, wanted, atol=1e-10)
        assert cache.nbytes == 8 * 2 * 2 * (4 + 1) * 6 * 12


def test_entries_are_held_but_still_learn():
    layer = CausalMultiHeadLinearAttention(16, 2, chunk=2, max_blocks=3)
    assert torch.allclose(layer.mixing, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))
    torch.nn.init.constant_(layer.mixing, 7.0)
    layer(torch.randn(1, 6, 16)).square().sum().backward()
    assert (layer.mixing.grad.tril().abs() > 0).equal(torch.ones(3, 3).tril() > 0)


def test_the_layer_of_images():
    torch.manual_seed(0)
    layer = MultiHeadLinearAttention(24, 3, blocks=(2, 2), lepe=5, out_bias=True).double()
    x = torch.randn(2, 6, 4, 24).double()
    q, k = layer.q_proj(x), layer.k_proj(x)
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    v = layer.v_proj(x)
    q, k, by_head = (t.flatten(1, 2).unflatten(-1, (3, 8)).movedim(2, 1) for t in (q, k, v))
    at = block_of((6, 4), (2, 2))
    scores = weights(feature(q), feature(k), layer.mixing, at, at)
    out = (scores / (scores.sum(-1, keepdim=True) + 1e-6) @ by_head).movedim(1, 2).reshape(2, 6, 4, 24)
    near = torch.nn.functional.conv2d(
        v.movedim(-1, 1), layer.lepe.weight, layer.lepe.bias, padding=2, groups=24
    ).movedim(1, -1)
    assert torch.allclose(layer(x), layer.o_proj(out + near), atol=1e-10)


def test_the_layer_of_video():
    """Rotary features above the line only; norm of each head, convolution over time and space, gate."""
    torch.manual_seed(0)
    rope = Rope(axes=3)
    layer = MultiHeadLinearAttention(36, 3, blocks=(2, 1, 2), rope=rope, out_norm=True, gate=True, lepe=3).double()
    grid = (4, 3, 5)
    x = torch.randn(1, *grid, 36).double()
    at = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    fq, fk = (feature(t.flatten(2, -2)) for t in layer.project(x, x, None, None)[:2])
    v = layer.v_proj(x)
    by_head = v.flatten(1, 3).unflatten(-1, (3, 12)).movedim(2, 1)
    block = block_of(grid, (2, 1, 2))
    below = weights(fq, fk, layer.mixing, block, block).sum(-1, keepdim=True)
    out = weights(rope(fq, at), rope(fk, at), layer.mixing, block, block) @ by_head / (below + 1e-6)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    near = layer.near(v.movedim(-1, 1)).movedim(1, -1)
    gate = layer.g_proj.weight @ x[..., None]
    mixed = (out.movedim(1, 2).reshape(1, *grid, 36) + near) * torch.nn.functional.silu(gate[..., 0])
    assert torch.allclose(layer(x), layer.o_proj(mixed), atol=1e-6)
    assert layer.near.weight.shape == (36, 1, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    q, k, v = (t.detach().to(dtype) for t in tensors((200,)))
    mixing = mixing_matrix((8,))
    found = multi_head_linear(q, k, v, mixing, (8,))
    wanted = multi_head_linear(*(t.double() for t in (q, k, v)), mixing, (8,))
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=0.02)
    found = causal_multi_head_linear(q, k, v, torch.ones(4, 4, dtype=dtype))[0]
    wanted = causal_multi_head_linear(*(t.double() for t in (q, k, v)), torch.ones(4, 4))[0]
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=0.05, rtol=0.02)


def test_bad_input():
    q, k, v = (t.detach() for t in tensors((6, 4)))
    with pytest.raises(ValueError, match="blocks must be a number for each of 2 axes"):
        multi_head_linear(q, k, v, torch.ones(4, 4), (4,))
    with pytest.raises(ValueError, match="blocks must be a number for each of 2 axes, 5 in all"):
        multi_head_linear(q, k, v, torch.ones(5, 5), (2, 2))
    with pytest.raises(ValueError, match="norm must be"):
        multi_head_linear(q, k, v, torch.ones(4, 4), (2, 2), norm="none")
    with pytest.raises(ValueError, match="kind must be"):
        mixing_matrix((2,), "cubic")
    with pytest.raises(ValueError, match="lepe must be"):
        MultiHeadLinearAttention(16, 2, blocks=(4,), lepe=3)
    with pytest.raises(ValueError, match="axes of blocks"):
        MultiHeadLinearAttention(16, 2, blocks=(2, 2))(torch.randn(1, 8, 16))
    q, k, v = (t.detach() for t in tensors((9,)))
    with pytest.raises(ValueError, match="2 blocks of 4 tokens, 8; there were 9"):
        causal_multi_head_linear(q, k, v, torch.ones(2, 2), chunk=4)
    with pytest.raises(ValueError, match="state must hold 1 blocks"):
        causal_multi_head_linear(q, k, v, torch.ones(9, 9), chunk=4, start=6)
