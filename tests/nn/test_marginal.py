"""S063: marginals by enumeration of all sets of edges, as derivatives of log Z, and at their limits."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal import attend
from glocal.nn.marginal import (
    MultiHopAttention,
    expanding_attention,
    hopfield_retrieve,
    marginal_attention,
    marginals,
    slot_step,
)
from glocal.patterns import Causal, Sliding
from tests.nn.layers import project

CASES = [("categorical", 1), ("bernoulli", 1), ("subset", 1), ("subset", 2), ("subset", 4), ("span", 1)]


def sets(structure, edges, size):
    """All sets of edges that a structure allows, as rows of ones."""
    for chosen in itertools.product([0, 1], repeat=edges):
        ones = [i for i, on in enumerate(chosen) if on]
        runs = bool(ones) and ones == list(range(ones[0], ones[-1] + 1))
        allowed = {"categorical": len(ones) == 1, "bernoulli": True, "subset": len(ones) == size, "span": runs}
        if allowed[structure]:
            yield torch.tensor(chosen, dtype=torch.double)


@pytest.mark.parametrize("edges", [4, 6])
@pytest.mark.parametrize("structure,size", CASES)
@pytest.mark.parametrize("closed", [(), (2,), (0, 3)])
def test_by_enumeration_and_as_derivatives(structure, size, edges, closed):
    torch.manual_seed(0)
    logits = (2 * torch.randn(3, edges)).double()
    for edge in closed:
        logits[1, edge] = -torch.inf
    logits.requires_grad_()
    found, log_z = marginals(logits, structure, size=size)
    for row, mine, total in zip(logits.detach(), found, log_z, strict=True):
        weights, expected = [], torch.zeros(edges, dtype=torch.double)
        for chosen in sets(structure, edges, size):
            weights.append(row[chosen > 0].sum().exp())
            expected += weights[-1] * chosen
        if sum(weights) == 0:
            assert total == -torch.inf and (mine == 0).all()
            continue
        assert torch.allclose(total, sum(weights).log(), atol=1e-10)
        assert torch.allclose(mine, expected / sum(weights), atol=1e-10)
    (by_z,) = torch.autograd.grad(log_z[log_z.isfinite()].sum(), logits, retain_graph=True)
    assert torch.allclose(by_z[log_z.isfinite()], found[log_z.isfinite()], atol=1e-10)
    (grad,) = torch.autograd.grad(found.square().sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("structure,size", CASES)
def test_derivatives_by_finite_differences(structure, size):
    logits = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: marginals(t, structure, size=size), (logits,))


def test_subsets_of_one_and_of_all():
    logits = torch.randn(3, 5)
    assert torch.allclose(marginals(logits, "subset", size=1)[0], logits.softmax(-1), atol=1e-6)
    assert torch.allclose(marginals(logits, "subset", size=5)[0], torch.ones(3, 5), atol=1e-6)
    assert torch.allclose(marginals(logits, "subset", size=3)[0].sum(-1), torch.full((3,), 3.0), atol=1e-5)


@pytest.mark.parametrize("structure,size", CASES)
def test_large_logits(structure, size):
    found, log_z = marginals(torch.tensor([[900.0, -900.0, 500.0, 899.0, -3.0]]), structure, size=size)
    assert found.isfinite().all() and log_z.isfinite().all() and (found <= 1 + 1e-5).all() and (found >= 0).all()


def tensors(n=7, m=7, dtype=torch.double):
    torch.manual_seed(0)
    return (
        torch.randn(2, 3, n, 4, dtype=dtype),
        torch.randn(2, 3, m, 4, dtype=dtype),
        torch.randn(2, 3, m, 5, dtype=dtype),
    )


def test_one_edge_is_softmax_attention_with_masks_and_biases_as_priors():
    q, k, v = tensors()
    prior = torch.rand(7, 7).double().log()
    assert torch.allclose(marginal_attention(q, k, v), scaled_dot_product_attention(q, k, v), atol=1e-12)
    found = marginal_attention(q, k, v, Causal(), prior=prior)
    mask = torch.ones(7, 7).tril() > 0
    wanted = scaled_dot_product_attention(q, k, v, prior.masked_fill(~mask, -torch.inf))
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("structure,size", CASES[1:])
@pytest.mark.parametrize("where", [None, Causal(), Sliding(2, 1)])
def test_other_structures_row_by_row(structure, size, where):
    q, k, v = tensors()
    found = marginal_attention(q, k, v, where, structure=structure, size=size, scale=0.7)
    mask = torch.ones(7, 7).bool() if where is None else where.mask((7,), (7,))
    for i in range(7):
        seen = mask[i].nonzero()[:, 0]
        if len(seen) < size:
            assert (found[:, :, i] == 0).all()
            continue
        weights, _ = marginals(0.7 * torch.einsum("bhd,bhmd->bhm", q[:, :, i], k[:, :, seen]), structure, size=size)
        assert torch.allclose(found[:, :, i], torch.einsum("bhm,bhme->bhe", weights, v[:, :, seen]), atol=1e-10)


def test_retrieval_by_hand_and_to_a_fixed_point():
    torch.manual_seed(0)
    memories, state = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1).double(), torch.randn(3, 16).double()
    one = hopfield_retrieve(state, memories, beta=2.0, steps=1)
    assert torch.allclose(one, torch.softmax(2.0 * state @ memories.T, -1) @ memories)
    near = memories[[4, 1]] + 0.1 * torch.randn(2, 16).double()
    assert torch.allclose(hopfield_retrieve(near, memories, beta=500.0, steps=1), memories[[4, 1]], atol=1e-6)
    fixed = hopfield_retrieve(state, memories, beta=4.0, steps=500, tolerance=1e-12)
    assert torch.allclose(hopfield_retrieve(fixed, memories, beta=4.0, steps=1), fixed, atol=1e-10)


def test_slots_by_hand():
    torch.manual_seed(0)
    slots, inputs = torch.randn(2, 3, 4).double(), torch.randn(2, 9, 4).double()
    found, weights = slot_step(slots, inputs)
    for b in range(2):
        share = torch.stack([torch.softmax(slots[b] @ x / 2, 0) for x in inputs[b]], 1)  # (S, M), by input
        share = share / share.sum(1, keepdim=True)
        assert torch.allclose(weights[b], share) and torch.allclose(found[b], share @ inputs[b])
    order = torch.randperm(9)
    assert torch.allclose(slot_step(slots, inputs[:, order])[0], found)


def test_an_expanding_window_at_its_limits():
    q, k, v = tensors()
    flat = expanding_attention(q, k, v, b=1e6)
    assert torch.allclose(flat.out, scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-4)
    own = expanding_attention(q, k, v, a=1e6, b=1e-3)
    assert torch.allclose(own.out, v, atol=1e-6)


def test_an_expanding_window_step_by_step():
    from scipy.special import digamma

    q, k, v = tensors(5, 5)
    found = expanding_attention(q, k, v, a=1.0, b=4.0, steps=2)
    scores = (q @ k.mT / 2)[1, 2]
    for i in range(5):
        a, b = 1.0, 4.0
        for _ in range(2):
            stop, go = digamma(a) - digamma(a + b), digamma(b) - digamma(a + b)
            logits = torch.tensor([float(scores[i, j]) + stop + go * (i - j) for j in range(i + 1)])
            weights = torch.softmax(logits.double(), 0)
            a, b = 2.0, 4.0 + float(sum(weights[j] * (i - j) for j in range(i + 1)))
        assert torch.allclose(found.weights[1, 2, i, : i + 1], weights, atol=1e-6)
        assert abs(float(found.b[1, 2, i]) - b) < 1e-6 and found.a[1, 2, i] == a


def test_gradients_of_the_expanding_window():
    q, k, v = (t[:1, :1, :4].requires_grad_() for t in tensors())
    assert torch.autograd.gradcheck(lambda *t: expanding_attention(*t).out, (q, k, v))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_two_hops_are_products_of_the_attention_matrix(num_kv_heads):
    torch.manual_seed(0)
    layer = MultiHopAttention(16, 4, num_kv_heads=num_kv_heads).double()
    x = torch.randn(2, 9, 16).double()
    q, k, v = project(layer, x)
    far = layer.heads(layer.far_proj(x), num_kv_heads)
    k, v, far = (t.repeat_interleave(4 // num_kv_heads, 1) for t in (k, v, far))
    a = torch.softmax(q @ k.mT / 2, -1)
    wanted = layer.o_proj((a @ v + a @ a @ far).movedim(1, -2).flatten(-2))
    assert torch.allclose(layer(x), wanted, atol=1e-10)


def test_two_hops_through_a_window():
    class Windowed(MultiHopAttention):
        def where(self, q, k, call):
            return Sliding(2, 2)

    torch.manual_seed(0)
    layer = Windowed(16, 2).double()
    x = torch.randn(1, 12, 16).double()
    q, k, v = project(layer, x)
    far = attend(q, k, layer.heads(layer.far_proj(x), 2), Sliding(2, 2), backend="dense")
    wanted = attend(q, k, v + far, Sliding(2, 2), backend="dense")
    assert torch.allclose(layer(x), layer.o_proj(wanted.movedim(1, -2).flatten(-2)), atol=1e-10)


def test_bad_input():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="structure must be one of categorical, bernoulli"):
        marginals(torch.zeros(3), "tree")
    with pytest.raises(ValueError, match="size must be from 1 to the 3 edges; it was 4"):
        marginals(torch.zeros(3), "subset", size=4)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        hopfield_retrieve(torch.zeros(1, 2), torch.zeros(3, 2), steps=0)
    with pytest.raises(ValueError, match="a and b must be above 0"):
        expanding_attention(q, k, v, a=0.0)
    with pytest.raises(ValueError, match="q and k must be of one sequence"):
        expanding_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="MultiHopAttention has no causal-self form: a new token would need"):
        MultiHopAttention(16, 2, causal=True)
