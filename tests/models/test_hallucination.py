"""S106: the contrastive loss by a double loop, the network by its parts, its size as published."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from glocal import models
from glocal.models.graph.hallucination import GraphGrader, contrastive_embedder, supervised_contrastive_loss
from glocal.nn import cosine_edges
from tests.models.networks import assert_a_step_changes


def by_loops(x, labels, temperature):
    losses = []
    for i in range(len(x)):
        s = [float(cosine_similarity(x[i], x[k], 0)) / temperature for k in range(len(x))]
        positives = [p for p in range(len(x)) if p != i and labels[p] == labels[i]]
        if positives:
            total = math.log(sum(math.exp(v) for v in s))
            losses.append(sum(total - s[p] for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_contrastive_loss_by_a_double_loop(temperature):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 1, 3])  # two alone in their class
    found = supervised_contrastive_loss(x, labels, temperature=temperature)
    assert float(found) == pytest.approx(by_loops(x, labels, temperature))
    assert float(supervised_contrastive_loss(3 * x, labels, temperature=temperature)) == pytest.approx(float(found))
    assert torch.autograd.gradcheck(lambda t: supervised_contrastive_loss(t, labels), x.requires_grad_())


def test_a_batch_without_pairs_is_no_loss():
    x = torch.randn(3, 4, requires_grad=True)
    loss = supervised_contrastive_loss(x, torch.arange(3))
    loss.backward()
    assert float(loss.detach()) == 0 and bool((x.grad == 0).all())


def test_the_network_is_its_parts_and_linear_after_the_embedder():
    torch.manual_seed(0)
    model = GraphGrader(6, contrastive_embedder(8, out_dim=6), hidden=5).double().eval()
    x = torch.randn(7, 8, dtype=torch.double)
    edges = cosine_edges(x, 0.2)
    embedded = model.embedder(x)
    assert torch.equal(embedded, model.embedder[2](model.embedder[0](x).relu()))
    torch.testing.assert_close(model(x, edges), model.attention(model.reduce(embedded), edges))
    # With no edges the rest is one linear map: logits of a mean are the mean of logits.
    alone = GraphGrader(6, hidden=5).double().eval()
    a, b = torch.randn(2, 1, 6, dtype=torch.double)
    none = edges[:, :0]
    torch.testing.assert_close(alone((a + b) / 2, none), (alone(a, none) + alone(b, none)) / 2)


def test_the_published_size_and_that_every_weight_learns():
    assert models.parameters("gat_hallucination") == 768 * 769 + 769 * 128 + 129 * 32 + 32 * 6 + 12 + 3
    model = models.create("gat_hallucination", channels=10, dim=6, hidden=5)
    x = torch.randn(12, 10)
    model(x, cosine_edges(x, 0.1)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert_a_step_changes(model)


def test_bad_input():
    with pytest.raises(ValueError, match=r"embeddings must be \(N, d\) and labels \(N,\)"):
        supervised_contrastive_loss(torch.randn(3, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        supervised_contrastive_loss(torch.randn(3, 4), torch.zeros(3), temperature=0)
