"""Choosing rows, as beam search does: the chosen rows go on as if they had been so from the start."""

from __future__ import annotations

import pytest
import torch

from glocal import cache as caches
from glocal.cache import (
    BestTokens,
    BlockCache,
    Cache,
    CompressedCache,
    CoreCache,
    DilatedWindowCache,
    FullCache,
    HeavyHitters,
    LatentCache,
    QueryCache,
    SelectedTokens,
    TokenRoles,
    WindowCache,
)

LENGTH, HEADS, DIM = 17, 2, 4
POLICIES = {
    "full": FullCache,
    "window": lambda: WindowCache(4, 2),
    "windows": lambda: WindowCache((2, 5), 1),
    "dilated": lambda: DilatedWindowCache(2, 3),
    "heavy": lambda: HeavyHitters(3, 2),
    "heavy, whole": lambda: HeavyHitters(3, 2, prompt="whole"),
    "blocks": lambda: BlockCache(3),
    "compressed": lambda: CompressedCache(4, 2),
    "cores": lambda: CoreCache(2, 3, 0.5),
    "latents": LatentCache,
    "latents, window": lambda: LatentCache(WindowCache(4)),
    "latents, compressed": lambda: LatentCache(CompressedCache(4, 2)),
    "queries": lambda: QueryCache(3),
    "roles": lambda: TokenRoles(3),
    "chunks of roles": lambda: TokenRoles(4, 2),
    "selected": SelectedTokens,
    "best": lambda: BestTokens(4),
}


def text(batch: int):
    """Everything that a policy may ask for, token by token, different in every row."""
    torch.manual_seed(0)
    k, v = torch.randn(batch, HEADS, LENGTH, DIM + 2), torch.randn(batch, HEADS, LENGTH, DIM)
    k[:, 1:, :, DIM:] = k[:, :1, :, DIM:]  # as latent attention has it: one rotary key for all groups
    return {
        "k": k,
        "v": v,
        "queries": 3 * torch.randn(batch, 2 * HEADS, LENGTH, DIM + 2),
        "query": torch.randn_like(k),
        "turned": torch.randn_like(k),
        "roles": torch.randint(3, (batch, HEADS, LENGTH)),
        "scores": torch.randn(batch, HEADS, LENGTH, 3),
        "score": torch.randn(batch, HEADS, LENGTH),
        "chosen": torch.randint(4, (batch, 1, LENGTH, 3)),
    }


WANTED = {
    QueryCache: {"queries": "queries"},
    HeavyHitters: {"queries": "queries"},
    CoreCache: {"query": "query", "turned": "turned"},
    TokenRoles: {"roles": "roles"},
    BestTokens: {"score": "score"},
    SelectedTokens: {"chosen": "chosen"},
}


def feed(cache: Cache, rows, pieces, start: int = 0) -> None:
    wanted = WANTED.get(type(cache), {})
    if isinstance(cache, TokenRoles) and cache.chunk > 1:
        wanted = {"roles": "scores"}
    for n in pieces:
        at = slice(start, start + n)
        cache.update(rows["k"][:, :, at], rows["v"][:, :, at], **{a: rows[b][:, :, at] for a, b in wanted.items()})
        start += n


def assert_same(a: Cache, b: Cache) -> None:
    assert a.seen == b.seen and a.nbytes == b.nbytes
    for x, y in zip(a.kept(), b.kept(), strict=True):
        position = x.position.expand(x.k.shape[:3])
        assert x.heads == y.heads and torch.equal(position, y.position.expand(y.k.shape[:3]))
        real = (position >= 0)[..., None]
        torch.testing.assert_close(x.k * real, y.k * real)
        torch.testing.assert_close(x.v * real, y.v * real)


def test_every_policy_is_here():
    kinds = {type(make()) for make in POLICIES.values()}
    known = (getattr(caches, name) for name in caches.__all__)
    # A state keeps no tokens; its layers' tests choose rows of it.
    apart = (Cache, caches.StateCache)
    assert kinds == {c for c in known if isinstance(c, type) and issubclass(c, Cache) and c not in apart}


@pytest.mark.parametrize("first", [(8,), (7, 1, 1)])
@pytest.mark.parametrize(
    ("batch", "rows"), [(3, [2, 0, 0]), (3, [1]), (2, [0, 0, 0, 1]), (1, [0, 0, 0]), (3, [0, 1, 2])]
)
@pytest.mark.parametrize("name", POLICIES)
def test_chosen_rows_go_on_as_those_rows(name, batch, rows, first):
    used, fresh, data = POLICIES[name](), POLICIES[name](), text(batch)
    feed(used, data, first)
    used.select(torch.tensor(rows))
    mine = {key: value[rows] for key, value in data.items()}
    later = text(len(rows))  # rows that were the same part
    for key, value in mine.items():
        value[:, :, sum(first) :] = later[key][:, :, sum(first) :]
    feed(fresh, mine, first)
    if not name.endswith("roles"):
        assert_same(used, fresh)
    rest = [1] * (LENGTH - sum(first))
    feed(used, mine, rest, sum(first))
    feed(fresh, mine, rest, sum(first))
    assert_same(used, fresh)


def test_rows_of_a_ring_are_copies():
    """A ring is written in place: two rows that were one must not share it."""
    cache, data = WindowCache(4), text(1)
    feed(cache, data, (6,))
    cache.select(torch.tensor([0, 0]))
    k, v = (data[name][:, :, :1].expand(2, -1, -1, -1).clone() for name in ("k", "v"))
    k[1] += 1
    cache.update(k, v)
    (part,) = cache.kept()
    newest = (part.position[0, 0] == 6).nonzero()
    assert not torch.equal(part.k[0, :, newest], part.k[1, :, newest])


@pytest.mark.parametrize("name", POLICIES)
def test_choosing_from_nothing_does_nothing(name):
    cache = POLICIES[name]()
    cache.select(torch.tensor([1, 0]))
    feed(cache, text(2), (5, 1))
    assert cache.seen == 6
