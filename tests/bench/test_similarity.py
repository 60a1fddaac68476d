"""Measures against scikit-learn and scipy; folds by sets of objects."""

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group, spearmanr
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from glocal.bench.similarity import (
    neighbourhood_overlap,
    object_folds,
    odd_one_out_accuracy,
    representational_similarity,
)
from tests.steer.judged import normal, planted, some_triplets


def test_a_rotation_leaves_neighbours():
    x, rotation = normal(40, 7), torch.from_numpy(ortho_group.rvs(7, random_state=0))
    assert neighbourhood_overlap(x, x @ rotation, 5) == 1
    assert neighbourhood_overlap(x, x @ normal(7, 7, seed=3), 5) < 0.8
    assert representational_similarity(x, x @ rotation, similarity="cosine") == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 5, 29])
def test_overlap_against_nearest_neighbours(k):
    x, y = normal(30, 6), normal(30, 4, seed=1)
    # Without arguments kneighbors leaves each row's own out.
    near = [NearestNeighbors(n_neighbors=k, metric="cosine").fit(each).kneighbors()[1] for each in (x, y)]
    wanted = np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)])
    assert neighbourhood_overlap(x, y, k) == pytest.approx(wanted)


@pytest.mark.parametrize("similarity", ["correlation", "cosine", "dot", "given"])
def test_representational_similarity_against_scipy(similarity):
    if similarity == "given":  # with many ties, and a lower triangle that must not count
        draw = np.random.default_rng(0)
        x, y = (torch.from_numpy(draw.integers(0, 5, (25, 25)).astype(float)) for _ in range(2))
        y = y + x
        matrices = x.numpy(), y.numpy()
    else:
        x = normal(25, 6)
        y = torch.cat([x[:, :4], normal(25, 2, seed=1)], 1)
        of = {"correlation": np.corrcoef, "cosine": cosine_similarity, "dot": lambda each: each @ each.T}[similarity]
        matrices = of(x.numpy()), of(y.numpy())
    upper = np.triu_indices(25, 1)
    wanted = spearmanr(matrices[0][upper], matrices[1][upper]).statistic
    assert 0.2 < wanted < 0.95
    assert representational_similarity(x, y, similarity=similarity) == pytest.approx(wanted, abs=1e-10)


def test_ties_are_wrong():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    assert odd_one_out_accuracy(x, torch.tensor([[0, 1, 2]])) == 1
    assert odd_one_out_accuracy(x, torch.tensor([[0, 1, 3]])) == 0
    assert odd_one_out_accuracy(x, torch.tensor([[0, 4, 1]])) == 0
    assert odd_one_out_accuracy(x, torch.tensor([[0, 1, 2], [0, 1, 4], [0, 4, 1], [0, 2, 1]])) == 0.5


def test_folds_share_no_object():
    triplets = some_triplets(40, 4000)
    folds = object_folds(triplets)
    tested = []
    for train, test in folds:
        objects = [set(each.flatten().tolist()) for each in (train, test)]
        assert not objects[0] & objects[1]
        assert len(objects[1]) == 10 and len(objects[0]) == 30
        # All triplets inside of a side are in it.
        for side, inside in zip((train, test), objects, strict=True):
            assert len(side) == sum(set(triplet) <= inside for triplet in triplets.tolist())
        tested.append(objects[1])
    assert set().union(*tested) == set(range(40)) and sum(map(len, tested)) == 40
    assert torch.equal(object_folds(triplets)[0][0], folds[0][0])
    assert not torch.equal(object_folds(triplets, seed=1)[0][0], folds[0][0])


def test_bad_input_is_named():
    x, triplets = planted()
    cases = [
        (lambda: neighbourhood_overlap(x, x, 60), "above k = 60"),
        (lambda: representational_similarity(x, x, similarity="given"), "given similarities must be"),
        (lambda: representational_similarity(x, x, similarity="l2"), "similarity must be"),
        (lambda: object_folds(triplets, 1), "folds must be at least 2"),
    ]
    for call, named in cases:
        with pytest.raises(ValueError, match=named):
            call()
