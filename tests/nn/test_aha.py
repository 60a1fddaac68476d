"""S024: gates against torch's attention and hand formulas; the base model against transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import AllOrHereAttention, Rope, gate_rate
from tests.nn.layers import by_mask, project, steps

LENGTH, WINDOW = 96, 16


def make(window=WINDOW, *, gates=None, **options):
    """A layer whose gates are all open, all closed, or as they come (about half of them open)."""
    torch.manual_seed(0)
    settings = {"num_kv_heads": 2, "causal": True, "offset": 0.0, "rope": Rope()} | options
    layer = AllOrHereAttention(32, 4, window=window, **settings).double()
    if gates is not None:
        torch.nn.init.zeros_(layer.gate.weight)
        layer.offset = 1.0 if gates else -1.0
    return layer


def tokens(length=LENGTH, batch=2):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masks(length=LENGTH, window=WINDOW):
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal, causal.triu(1 - window)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gates", [True, False])
def test_all_open_and_all_closed_are_torchs_attention(gates, training):
    layer, x = make(gates=gates).train(training), tokens()
    q, k, v = project(layer, x)
    mask = masks()[0 if gates else 1]
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(layer(x), layer.o_proj(theirs.transpose(1, 2).flatten(2)))
    assert gate_rate(layer).item() == float(gates)


def test_each_row_is_exactly_that_of_its_branch():
    layer, x = make(), tokens()
    layer.o_proj = torch.nn.Identity()
    mixed, gates = layer(x), layer.gates.bool()
    assert 0.2 < float(gates.double().mean()) < 0.8
    layer.offset = 100.0
    everything = layer(x)
    layer.offset = -100.0
    here = layer(x)
    pick = gates.transpose(1, 2).repeat_interleave(layer.head_dim, -1)
    assert torch.equal(mixed, torch.where(pick, everything, here))
    assert not torch.equal(everything, here)


def test_a_gate_of_exactly_a_half_is_local():
    layer, x = make(), tokens(batch=1)
    torch.nn.init.zeros_(layer.gate.weight)
    torch.testing.assert_close(layer(x), by_mask(layer, x, masks()[1]))


@pytest.mark.parametrize("window", [1, WINDOW, LENGTH])
def test_routed_equals_dual_and_a_mask_written_out(window):
    layer, x = make(window).eval(), tokens()
    causal, local = masks(window=window)
    with torch.no_grad():
        routed = layer(x)
        gates = layer.gates.bool()
        layer.mode = "dual"
        torch.testing.assert_close(layer(x), routed)
        torch.testing.assert_close(layer.train()(x), routed)
    mask = torch.where(gates.unsqueeze(-1), causal, local)
    torch.testing.assert_close(routed, by_mask(layer, x, mask))


def test_a_window_as_long_as_the_sequence_leaves_nothing_to_learn():
    layer, x = make(LENGTH), tokens()
    out = layer(x)
    grad = torch.autograd.grad((out * torch.randn_like(out)).sum(), layer.gate.weight)[0]
    torch.testing.assert_close(grad, torch.zeros_like(grad))
    layer.offset = -100.0
    torch.testing.assert_close(layer(x), out)


def test_the_gradient_goes_straight_through():
    layer, x = make(), tokens()
    out = layer(x)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), layer.gate.weight)[0]
    with torch.no_grad():
        soft = layer.soft_gates(x)
        q, k, v = project(layer, x)
        everything, here = (scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True) for m in masks())
        grad_out = (weights @ layer.o_proj.weight).unflatten(-1, (4, -1)).transpose(1, 2)
        logits = ((everything - here) * grad_out).sum(-1) * soft * (1 - soft)
        torch.testing.assert_close(found, torch.einsum("bhn,bnc->hc", logits, x))


def test_the_penalty_presses_on_every_real_gate():
    layer, x = make(), tokens()
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[1, 60:] = False
    layer(x, keys=keys)
    rate = gate_rate(layer)
    soft = layer.soft_gates(x).detach()
    real = keys[:, None].expand_as(soft)
    torch.testing.assert_close(rate.detach(), (soft > 0.5).double()[real].mean())
    found = torch.autograd.grad(rate, layer.gate.weight)[0]
    torch.testing.assert_close(found, torch.einsum("bhn,bnc->hc", soft * (1 - soft) * real, x) / real.sum())


def test_a_penalty_closes_the_gates():
    layer, x = make(offset=0.1), tokens()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    layer(x)
    before = gate_rate(layer).item()
    for _ in range(30):
        layer(x)
        optimizer.zero_grad()
        gate_rate(layer).backward()
        optimizer.step()
    layer(x)
    assert before > 0.7 and gate_rate(layer).item() < 0.5 * before


@pytest.mark.parametrize("mode", ["routed", "dual"])
@pytest.mark.parametrize("prompt", [0, 13])
def test_decoding_keeps_every_token(mode, prompt):
    layer, x = make(4, mode=mode).eval(), tokens(30)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.kept()[0].k.shape[2] == 30


def test_without_causality_the_window_has_two_sides():
    layer, x = make(4, causal=False).eval(), tokens(30)
    with torch.no_grad():
        out = layer(x)
        distance = (torch.arange(30)[:, None] - torch.arange(30)).abs()
        mask = layer.gates.bool().unsqueeze(-1) | (distance < 4)
        torch.testing.assert_close(out, by_mask(layer, x, mask))


def test_a_layer_that_ran_in_training_can_be_copied():
    layer, x = make(), tokens()
    out = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), out)


def test_open_gates_are_olmo2():
    """The widened query projection of the released weights, its last rows taken off, in transformers' Olmo2."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Olmo2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Olmo2Model(config).double().eval()
    ids = torch.randint(50, (2, 40))

    class Ours(torch.nn.Module):
        def __init__(self, theirs):
            super().__init__()
            self.layer = make(8, qk_norm="rms_all", rope=Rope(config.rope_parameters["rope_theta"])).eval()
            widened = torch.cat([theirs.q_proj.weight, torch.zeros(4, 32, dtype=torch.float64)])
            state = theirs.state_dict() | {"q_proj.weight": widened[:32], "gate.weight": widened[32:]}
            self.layer.load_state_dict(state)

        def forward(self, hidden_states, **_):
            return self.layer(hidden_states), None

    with torch.no_grad():
        theirs = model(ids).last_hidden_state
        for block in model.layers:
            block.self_attn = Ours(block.self_attn)
        for offset, same in ((1.0, True), (-1.0, False)):
            for block in model.layers:
                block.self_attn.layer.offset = offset
            near = torch.allclose(model(ids).last_hidden_state, theirs, atol=1e-5)  # its angles are float32
            assert near == same


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("window", 2.5), ("mode", "both")])
def test_refuses_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        AllOrHereAttention(32, 4, **{name: value})
    with pytest.raises(ValueError, match="gate_rate is of the last forward"):
        gate_rate(AllOrHereAttention(32, 4))
    with pytest.raises(ValueError, match="AllOrHereAttention layer"):
        gate_rate(torch.nn.Linear(2, 2))
