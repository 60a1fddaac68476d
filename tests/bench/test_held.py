"""Bytes of tensors: made, freed, shared, and kept for a backward pass."""

import gc

import torch

from glocal.bench.held import HeldBytes

KIB = 1024


def floats(kib):
    return torch.zeros(kib * KIB // 4)


def test_what_is_freed_makes_room_and_the_peak_stays():
    with HeldBytes() as held:
        one = floats(100)
        two = one + 1
        assert held.now == held.peak == 200 * KIB
        del two
        assert (held.now, held.peak) == (100 * KIB, 200 * KIB)
        three = floats(50)
        assert (held.now, held.peak) == (150 * KIB, 200 * KIB)
    del one, three
    gc.collect()
    assert held.now == 0


def test_views_and_what_is_done_in_place_hold_nothing_more():
    outside = floats(40)
    with HeldBytes() as held:
        inside = floats(10)
        views = [inside.view(2, -1).T, inside[3:], inside.add_(1), outside[5:], outside.mul_(2), outside.view(-1, 4)]
        assert held.peak == 10 * KIB
        assert len(views) == 6
        broad = floats(1).expand(100, -1)
        assert held.peak == 11 * KIB and broad.numel() == 100 * 256


def test_what_a_backward_pass_needs_is_held_until_it_is_over():
    weight = torch.randn(64, 64, requires_grad=True)
    with HeldBytes() as held:
        hidden = torch.ones(256, 64)
        for _ in range(4):
            hidden = (hidden @ weight).tanh()  # keeps both, in and out
        with_graph = held.now
        del hidden
        assert held.now == 0
        with torch.no_grad():
            hidden = torch.ones(256, 64)
            for _ in range(4):
                hidden = (hidden @ weight).tanh()
        assert held.now == 256 * 64 * 4 and with_graph >= 4 * held.now


def test_a_longer_cache_holds_more():
    """A Llama's keys and values of one more token: layers x heads x channels x 2 floats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    held = []
    for length in (50, 51):
        with HeldBytes() as mode, torch.no_grad():
            cache = model(torch.ones(1, length, dtype=torch.long), logits_to_keep=1).past_key_values
            gc.collect()
            held.append(mode.now)
        del cache
    assert held[1] - held[0] == 3 * 32 * 2 * 4
