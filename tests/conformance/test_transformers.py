"""Hugging Face transformers: the mask functions that its models are built on. Models are in ``test_witnesses``."""

import pytest
import torch

from glocal import Block, Causal, Full, Keys, Segments, Sliding
from glocal.patterns import from_hf
from tests.conformance.cases import BACKENDS, Case, check, having, inputs

masking = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")


def mask_of(function, queries: int, keys: int, batch: int = 1, padding=None):
    """Its boolean mask ``(B, 1, Nq, Nk)``, as its sdpa path builds it with a cache of ``keys - queries``."""
    return masking.sdpa_mask(
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        mask_function=function,
        attention_mask=padding,
        allow_is_causal_skip=False,
    )


def theirs(reach):
    """Their mask function for a reach, and our pattern through `from_hf`; None where they have no such setting."""
    left, right = reach
    if (left, right) == (-1, -1):
        return masking.bidirectional_mask_function, from_hf(None, causal=False)
    if (left, right) == (-1, 0):
        return masking.causal_mask_function, from_hf(None)
    if right == 0:
        return masking.sliding_window_causal_mask_function(left + 1), from_hf(left + 1)
    if left == right:
        return masking.sliding_window_bidirectional_mask_function(left), from_hf(left, causal=False)
    return None


@pytest.mark.parametrize("case", [c for c in having("reach") if theirs(c.reach) and c.grid_q <= c.grid], ids=str)
def test_masks(case: Case):
    function, where = theirs(case.reach)
    mask = mask_of(function, *case.grid_q, *case.grid)[0, 0]
    assert torch.equal(where.mask(case.grid_q, case.grid), mask)
    assert torch.equal(case.pattern.mask(case.grid_q, case.grid), mask)


@pytest.mark.parametrize("case", [c for c in having("block") if len(c.grid) == 1 and c.causal], ids=str)
def test_chunks(case: Case):
    function = masking.chunked_causal_mask_function(case.block[0], torch.zeros(1, dtype=torch.long))
    assert torch.equal((Block(case.block) & Causal()).mask(case.grid), mask_of(function, *case.grid, *case.grid)[0, 0])


def test_chunks_start_after_left_padding():
    """Their chunks are counted from the first real token; a shifted block says the same for one row."""
    padding = torch.tensor([[False] * 3 + [True] * 8])
    function = masking.chunked_causal_mask_function(4, torch.tensor([3]))
    mask = mask_of(function, 11, 11, padding=padding)
    ours = (Block(4, shift=3) & Causal() & Keys(padding)).mask(11)
    assert torch.equal(ours, mask)


def test_padding():
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :4] = False
    mask = mask_of(masking.sliding_window_causal_mask_function(3), 9, 9, batch=2, padding=padding)
    assert torch.equal((from_hf(3) & Keys(padding)).mask(9), mask)


def test_packed_sequences():
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    function = masking.and_masks(masking.causal_mask_function, masking.packed_sequence_mask_function(numbers))
    assert torch.equal((Segments([3, 2, 4]) & Causal()).mask(9), mask_of(function, 9, 9)[0, 0])


DIFFERENCES = [
    # their mask function, what it might be taken for, what it is, distances query - key that tell them apart, why
    (masking.sliding_window_causal_mask_function(3), Sliding(3, 0), from_hf(3), {3}, "W counts the query itself"),
    (
        masking.sliding_window_bidirectional_mask_function(3),
        Sliding(1, 1),
        from_hf(3, causal=False),
        {-3, -2, 2, 3},
        "without causal, W is the reach to each side, 2 W + 1 keys in all",
    ),
]


@pytest.mark.parametrize(("function", "mistaken", "actual", "distances", "why"), DIFFERENCES, ids=["causal", "both"])
def test_known_differences(function, mistaken, actual, distances, why):
    mask = mask_of(function, 9, 9)[0, 0]
    assert torch.equal(mask, actual.mask(9)), why
    apart = (mask ^ mistaken.mask(9)).nonzero()
    assert set((apart[:, 0] - apart[:, 1]).tolist()) == distances, why


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [None, 1, 4])
def test_outputs_with_padding(backend, width):
    """Their sdpa path, with left padding: rows of padding see nothing, which we answer with zeros."""
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :3] = False
    causal = masking.causal_mask_function
    mask = mask_of(causal if width is None else masking.sliding_window_causal_mask_function(width), 7, 7, 2, padding)

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check(backend, inputs((7,), batch=2), from_hf(width) & Keys(padding), sdpa)


def test_full_and_causal_names():
    assert (from_hf(None), from_hf(None, causal=False)) == (Causal(), Full())
