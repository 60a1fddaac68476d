"""S041: score functions by loops over pairs, sparse weights by their definition and against a peer."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from glocal.nn.score_functions import SCORE_FUNCTIONS, entmax15, score_function, sparsemax

B, N, M, D, H = 2, 3, 4, 5, 6


def by_pair(f, q, k, at):
    """One score, for one query and one key, written out."""
    act = torch.tanh
    match f.__class__.__name__:
        case "Similarity":
            return cosine_similarity(q, k, 0)
        case "Dot":
            return (q * k).sum()
        case "ScaledDot":
            return (q * k).sum() / math.sqrt(D)
        case "General":
            return sum(k[i] * f.proj.weight[i, j] * q[j] for i in range(D) for j in range(D))
        case "BiasedGeneral":
            return sum(k[i] * (f.proj.weight[i] @ q + f.proj.bias[i]) for i in range(D))
        case "ActivatedGeneral":
            return act(k @ (f.proj.weight @ q) + f.offset)
        case "Kernel":
            return sum(max(a, 0) * max(b, 0) for a, b in zip(q.tolist(), k.tolist(), strict=True))
        case "Concat":
            return f.energy.weight[0] @ act(f.proj.weight @ torch.cat([q, k]) + f.proj.bias)
        case "Additive":
            return f.energy.weight[0] @ act(f.query_proj(q) + f.key_proj.weight @ k)
        case "Deep":
            return f.energy.weight[0] @ act(f.deeper(act(f.query_proj(q) + f.key_proj.weight @ k)))
        case "Location":
            return act(f.proj.weight[at] @ q)
        case "FeatureBased":
            return f.energy.weight[0] @ act(f.key_proj.weight @ k + f.feature_proj(k.relu()))


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_by_pair(name):
    torch.manual_seed(0)
    f = score_function(name, D, D, hidden=H).double()
    if name == "activated_general":
        torch.nn.init.constant_(f.offset, 0.3)
    q, k = torch.randn(B, N, D).double(), torch.randn(B, M, D).double()
    with torch.no_grad():
        wanted = [[[float(by_pair(f, q[b, n], k[b, m], m)) for m in range(M)] for n in range(N)] for b in range(B)]
    assert torch.allclose(f(q, k), torch.tensor(wanted).double(), atol=1e-12)
    assert torch.autograd.gradcheck(f, (q.requires_grad_(), k.requires_grad_()))


def test_concat_and_additive_are_one_function():
    one, other = score_function("concat", D, 7, hidden=H).double(), score_function("additive", D, 7, hidden=H).double()
    with torch.no_grad():
        one.proj.weight.copy_(torch.cat([other.query_proj.weight, other.key_proj.weight], 1))
        one.proj.bias.copy_(other.query_proj.bias)
        one.energy.weight.copy_(other.energy.weight)
    q, k = torch.randn(B, N, D).double(), torch.randn(B, M, 7).double()
    assert torch.allclose(one(q, k), other(q, k), atol=1e-12)


def nearest(scores):
    """The nearest point of the simplex: what is above a threshold, found by bisection."""
    low, high = scores.min() - 1, scores.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (scores - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (scores - low).clamp(min=0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_sparsemax_by_bisection(spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(6, 9).double()
    found = sparsemax(scores)
    assert torch.allclose(found, torch.stack([nearest(row) for row in scores]), atol=1e-9)
    if spread == 10:
        assert (found == 0).any()


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_entmax_by_bisection(spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(6, 9).double()
    rows = []
    for row in scores:
        low, high = row.min() / 2 - 1, row.max() / 2
        for _ in range(200):
            middle = (low + high) / 2
            more = (row / 2 - middle).clamp(min=0).square().sum() > 1
            low, high = (middle, high) if more else (low, middle)
        rows.append((row / 2 - low).clamp(min=0).square())
    assert torch.allclose(entmax15(scores), torch.stack(rows), atol=1e-9)


@pytest.mark.parametrize("weights", [sparsemax, entmax15])
def test_weights_and_their_gradient(weights):
    torch.manual_seed(0)
    scores = torch.randn(3, 7).double().requires_grad_()
    found = weights(scores)
    assert torch.allclose(found.sum(-1), torch.ones(3).double()) and (found >= 0).all()
    assert torch.autograd.gradcheck(weights, (scores,))
    assert torch.allclose(weights(scores + 5), found)  # only differences count
    order = torch.randperm(7)
    assert torch.equal(weights(scores[:, order]), found[:, order])
    assert torch.allclose(weights(torch.zeros(1, 4)), torch.full((1, 4), 0.25))  # ties


def test_bad_input():
    with pytest.raises(ValueError, match="name must be one of similarity, dot"):
        score_function("magic", 4, 4)
    with pytest.raises(ValueError, match="Dot needs key_dim equal to query_dim 4; it was 5"):
        score_function("dot", 4, 5)
    with pytest.raises(ValueError, match="hidden must be at least 1"):
        score_function("concat", 4, 5, hidden=0)
    f = score_function("location", 4, 4, longest=3)
    with pytest.raises(ValueError, match="k has 5 keys; location has numbers for 3"):
        f(torch.randn(1, 2, 4), torch.randn(1, 5, 4))
    with pytest.raises(ValueError, match=r"q must be \(B, N, 4\)"):
        f(torch.randn(1, 2, 5), torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"k must be \(1, M, 4\)"):
        f(torch.randn(1, 2, 4), torch.randn(2, 3, 4))
