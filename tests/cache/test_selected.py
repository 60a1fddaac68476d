"""Caches of chosen tokens, as masks written out."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import BestTokens, SelectedTokens, replay
from glocal.condense import best


def kv(length=12, batch=2, heads=2):
    torch.manual_seed(0)
    return torch.randn(batch, heads, length, 4), torch.randn(batch, heads, length, 3)


def test_selected_tokens_see_the_set_that_came_with_them():
    k, v = kv(6)
    chosen = torch.tensor(
        [
            [[0, -1], [1, 0], [2, -1], [0, 3], [1, 2], [0, 5]],
            [[-1, -1], [1, -1], [0, 1], [0, 3], [3, 2], [3, 4]],  # one set an item
        ]
    )
    mask = torch.tensor(
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0],
                [1, 0, 0, 1, 0, 0],
                [0, 1, 1, 0, 0, 0],  # what was left out comes back
                [1, 0, 0, 0, 0, 1],
            ],
            [
                [0, 0, 0, 0, 0, 0],
                [0, 1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0, 0],
                [0, 0, 0, 1, 1, 0],
            ],
        ]
    ).bool()
    found = replay(SelectedTokens, k, v, chosen=chosen[:, None])
    assert torch.equal(found, mask[:, None].expand(-1, 2, -1, -1))
    by_head = torch.stack([chosen, chosen.flip(0)], 1)
    assert torch.equal(replay(SelectedTokens, k, v, chosen=by_head), torch.stack([mask, mask.flip(0)], 1))
    assert torch.equal(replay(SelectedTokens, k, v), torch.ones(6, 6).tril().bool().expand(2, 2, -1, -1))


def test_selected_tokens_keep_everything():
    (k, v), cache = kv(), SelectedTokens()
    cache.update(k, v)
    cache.update(k[:, :, :1], v[:, :, :1], chosen=torch.tensor([3, 12]).expand(2, 1, 1, 2))
    (part,) = cache.kept()
    assert torch.equal(part.k, torch.stack([k[:, :, 3], k[:, :, 0]], 2)) and part.position[0, 0].tolist() == [3, 12]
    assert cache.nbytes == 13 * 2 * 2 * (4 + 3) * 4
    cache.update(k[:, :, :1], v[:, :, :1])
    assert cache.kept()[0].k.shape[2] == 14


def test_selected_tokens_refuse_what_is_not_there():
    k, v = kv(1)
    with pytest.raises(ValueError, match="chosen must be positions from -1"):
        SelectedTokens().update(k, v, chosen=torch.tensor([1]).view(1, 1, 1, 1))
    with pytest.raises(ValueError, match="chosen must be integers"):
        SelectedTokens().update(k, v, chosen=torch.zeros(1, 1, 2, 1, dtype=torch.long))


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_best_tokens_are_the_best_of_all_so_far(top_k):
    k, v = kv()
    score = torch.randint(4, (2, 2, 12)).float()  # many ties
    mask = torch.zeros(2, 2, 12, 12, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(12)).tolist():
        best = sorted(range(i + 1), key=lambda j: (-score[b, h, j].item(), -j))[:top_k]
        mask[b, h, i, best] = True
    assert torch.equal(replay(lambda: BestTokens(top_k), k, v, score=score), mask)


@pytest.mark.parametrize("first", [1, 5, 11])
def test_many_tokens_at_once_are_as_good_as_one_at_a_time(first):
    k, v = kv()
    score, whole, cut = torch.randint(4, (2, 2, 12)).float(), BestTokens(3), BestTokens(3)
    whole.update(k, v, score=score)
    for part in (slice(0, first), slice(first, 12)):
        cut.update(k[:, :, part], v[:, :, part], score=score[:, :, part])
    (a,), (b,) = whole.kept(), cut.kept()
    assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v) and torch.equal(a.position, b.position)
    assert torch.equal(a.k, k.gather(2, a.position[..., None].expand(-1, -1, -1, 4)))
    assert whole.nbytes == 2 * 2 * 3 * (4 + 3 + 1) * 4


def test_best_tokens_need_scores():
    k, v = kv()
    with pytest.raises(ValueError, match="score must be"):
        BestTokens(3).update(k, v)
    with pytest.raises(ValueError, match="top_k must be"):
        BestTokens(0)


def test_ties_go_to_the_last_allowed_place():
    scores = torch.tensor([2.0, 1.0, 2.0, 2.0])
    assert best(scores, 2, ties="last").tolist() == [3, 2]
    assert best(scores, 3, allowed=torch.tensor([True, True, True, False]), ties="last").tolist() == [2, 0, 1]
    assert best(scores, 2, allowed=torch.tensor([False, True, False, False]), ties="last").tolist() == [1, -1]
