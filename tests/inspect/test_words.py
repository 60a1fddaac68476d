"""Tokens to words against loops; attention of words from a record against that of whole maps."""

import pytest
import torch

from glocal.inspect import merge_words, record, word_attention, word_ids
from glocal.nn import Attention, NeighborhoodAttention


def causal_maps(batch=2, heads=3, length=9):
    torch.manual_seed(0)
    scores = torch.randn(batch, heads, length, length).double()
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


WORDS = torch.tensor([[-1, -1, 0, 1, 1, 2, 2, 2, 3], [-1, 0, 0, 1, 2, -1, -1, -1, -1]])


def test_by_loops():
    maps = causal_maps()
    wanted = torch.zeros(2, 3, 4, 4).double()
    for b in range(2):
        for i in range(4):
            for j in range(4):
                asks = [t for t in range(9) if WORDS[b, t] == i]
                keys = [t for t in range(9) if WORDS[b, t] == j]
                for t in asks:
                    for s in keys:
                        wanted[b, :, i, j] += maps[b, :, t, s] / len(asks)
    got = merge_words(maps, WORDS)
    torch.testing.assert_close(got, wanted)
    assert got.triu(1).abs().max() == 0


def test_one_token_a_word_is_the_identity():
    maps = causal_maps()
    torch.testing.assert_close(merge_words(maps, torch.arange(9)), maps)


def test_sums_of_rows_are_kept():
    """Each word's row sums to the mean over its tokens of what they pay to any word."""
    words = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4])
    sums = merge_words(causal_maps(), words).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_of_a_record(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Attention(12, 3, causal=True), Attention(12, 2)).double()
    found = record(model, torch.randn(2, 9, 12).double())
    wanted = [merge_words(layer.weights(), WORDS) for layer in found]
    tiles = type(found[0]).tiles
    monkeypatch.setattr(type(found[0]), "tiles", lambda self: tiles(self, at_once=120))
    got = word_attention(found, WORDS)
    assert [m.shape for m in got] == [(2, 3, 4, 4), (2, 2, 4, 4)]
    torch.testing.assert_close(got, wanted)


def test_tokens_make_up_words():
    tokens = ["<s>", "ĠTrans", "late", ":", "ĠThe", "Ġread", "er", "'s", "Ġeye", ".", "\n"]
    got = word_ids(tokens, ["The", "reader's", "eye."], start=4)
    assert got.tolist() == [-1, -1, -1, -1, 0, 1, 1, 1, 2, 2, -1]


def test_bad_input():
    with pytest.raises(ValueError, match=r"for word 1, 'fiancée', they gave 'fiance'"):
        word_ids(["a", " fiance", "e"], ["a", "fiancée"], start=0)
    with pytest.raises(ValueError, match=r"for word 1, 'b', they gave ''"):
        word_ids(["a"], ["a", "b"], start=0)
    with pytest.raises(ValueError, match=r"start must be from 0 to the 1 tokens; it was 2"):
        word_ids(["a"], ["a"], start=2)
    maps = causal_maps()
    with pytest.raises(ValueError, match=r"words must be integers \(2, 9\); it was torch.int64 \(8,\)"):
        merge_words(maps, torch.arange(8))
    with pytest.raises(ValueError, match=r"words must be from -1, .*-2"):
        merge_words(maps, torch.arange(9) - 2)
    with pytest.raises(ValueError, match=r"weights must be \(B, H, N, N\)"):
        merge_words(maps[0], torch.arange(9))
    grid = record(NeighborhoodAttention(8, 2, window=3), torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match="record must be of self-attention over a sequence"):
        word_attention(grid, torch.arange(16))
