"""NATS: what the policy keeps, token by token, against the mask written out."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import FullCache, TokenRoles, WindowCache, replay


def visible(roles, window):
    """The mask by three loops over the definition, for one head."""
    length = len(roles)
    ends = []  # the first global token from each one on
    for j in range(length):
        ends.append(next((t for t in range(j, length) if roles[t] == 0), length))
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = roles[j] == 0 or (roles[j] == 1 and i <= ends[j]) or (roles[j] == 2 and i <= j + window)
    return mask


def keys(heads=3, length=48, batch=2):
    torch.manual_seed(0)
    return torch.randn(2, batch, heads, length, 4)


@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 8, 4), (0, 1, 1)])
def test_replay_equals_the_mask_written_out(window, shares):
    k, v = keys()
    roles = torch.multinomial(torch.tensor(shares).float(), 2 * 3 * 48, replacement=True).view(2, 3, 48)
    mask = replay(lambda: TokenRoles(window), k, v, roles=roles)
    for b in range(2):
        for h in range(3):
            assert torch.equal(mask[b, h], visible(roles[b, h].tolist(), window))


def test_limits_are_the_full_cache_and_the_window():
    k, v = keys()
    for role, policy in ((0, FullCache), (1, FullCache), (2, lambda: WindowCache(6))):
        roles = torch.full(k.shape[:-1], role)
        assert torch.equal(replay(lambda: TokenRoles(5), k, v, roles=roles), replay(policy, k, v))


def test_many_tokens_at_once_are_as_good_as_one_by_one():
    k, v = keys()
    roles = torch.randint(3, k.shape[:-1])
    at_once, one_by_one = TokenRoles(4), TokenRoles(4)
    at_once.update(k, v, roles=roles)
    for t in range(48):
        at = slice(t, t + 1)
        one_by_one.update(k[:, :, at], v[:, :, at], roles=roles[:, :, at])
    for a, b in zip(at_once.kept(), one_by_one.kept(), strict=True):
        assert a.heads == b.heads and torch.equal(a.position, b.position)
        real = (a.position >= 0)[..., None]
        assert torch.equal(a.k * real, b.k * real) and torch.equal(a.v * real, b.v * real)


def test_each_head_holds_what_it_needs_and_the_right_entries():
    k, v = keys(heads=3)
    roles = torch.stack([torch.zeros(48), torch.full((48,), 2), torch.full((48,), 2)]).long().expand(2, 3, 48)
    cache = TokenRoles(3)
    cache.update(k, v, roles=roles)
    narrow, wide = cache.kept()
    assert narrow.heads == (1, 2) and narrow.k.shape[2] == 4
    assert wide.heads == (0,) and wide.k.shape[2] == 48
    assert torch.equal(narrow.k, k[:, 1:, -4:]) and torch.equal(wide.v, v[:, :1])
    full = FullCache()
    full.update(k, v)
    assert cache.nbytes < full.nbytes


def visible_by_chunks(roles, window, chunk, length):
    """The same mask of chunks, each spread over its tokens, and causal within."""
    mask = visible(roles, window // chunk).repeat_interleave(chunk, 0).repeat_interleave(chunk, 1)
    return mask[:length, :length].tril()


def decided(scores, chunk):
    """Roles of chunks by loops, for one head: the first is global, others have the highest sum."""
    sums = [sum(scores[t : t + chunk]) for t in range(0, len(scores), chunk)]
    return [0, *(int(s.argmax()) for s in sums[1:])]


@pytest.mark.parametrize(("window", "chunk"), [(0, 4), (8, 4), (6, 3), (5, 5), (100, 50)])
def test_chunks_replay_equals_the_mask_written_out(window, chunk):
    k, v = keys(length=46)
    scores = torch.randn(2, 3, 46, 3) + torch.tensor([-0.5, 0.3, 0.3])
    mask = replay(lambda: TokenRoles(window, chunk), k, v, roles=scores)
    for b in range(2):
        for h in range(3):
            assert torch.equal(mask[b, h], visible_by_chunks(decided(scores[b, h], chunk), window, chunk, 46))
    if chunk == 4:
        assert not bool(mask[..., -1, :].all())


@pytest.mark.parametrize("sizes", [[46], [1, 44, 1], [3, 1, 9, 20, 13], [4, 4, 38], [1] * 46])
def test_chunks_taken_in_any_portions_are_the_same(sizes):
    k, v = keys(length=46)
    scores = torch.randn(2, 3, 46, 3)
    whole, parts = TokenRoles(8, 4), TokenRoles(8, 4)
    whole.update(k, v, roles=scores)
    for part in zip(*(t.split(sizes, 2) for t in (k, v, scores)), strict=True):
        parts.update(part[0], part[1], roles=part[2])
    for a, b in zip(whole.kept(), parts.kept(), strict=True):
        assert a.heads == b.heads and torch.equal(a.position, b.position)
        real = (a.position >= 0)[..., None]
        assert torch.equal(a.k * real, b.k * real) and torch.equal(a.v * real, b.v * real)


def test_chunks_of_one_token_are_tokens():
    k, v = keys(length=20)
    scores = torch.randn(2, 3, 20, 3)
    roles = scores.argmax(-1)
    roles[..., 0] = 0
    mask = replay(lambda: TokenRoles(4), k, v, roles=roles)
    for b in range(2):
        for h in range(3):
            assert torch.equal(mask[b, h], visible_by_chunks(decided(scores[b, h], 1), 4, 1, 20))


def test_errors_name_the_argument():
    k, v = keys()
    with pytest.raises(ValueError, match="window must not be negative; it was -1"):
        TokenRoles(-1)
    with pytest.raises(ValueError, match="roles must be integers"):
        TokenRoles(1).update(k, v)
    with pytest.raises(ValueError, match="roles must be integers"):
        TokenRoles(1).update(k, v, roles=torch.zeros(2, 3, 48))
    with pytest.raises(ValueError, match="chunk must be at least 1 and divide window 6; it was 4"):
        TokenRoles(6, 4)
    with pytest.raises(ValueError, match="roles must be scores"):
        TokenRoles(8, 4).update(k, v, roles=torch.zeros(2, 3, 48, dtype=torch.long))
