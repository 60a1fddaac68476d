"""S066: gates against formulas and loops, all heads on against torch's attention, chosen heads against a gather."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from glocal.inspect import verify
from glocal.nn import USES, Attention, Call, MixtureOfHeadsAttention, Rope, SlidingWindowAttention, head_balance
from tests.nn.layers import project, steps

DIM, HEADS, LENGTH = 48, 6, 11


def make(shared=2, top_k=2, **options):
    torch.manual_seed(0)
    return MixtureOfHeadsAttention(DIM, HEADS, shared_heads=shared, top_k=top_k, **options).double()


def tokens(length=LENGTH, batch=2, dim=DIM):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_of(layer, x):
    """What torch's attention gives for each head, before gates: ``(B, H, N, D)``."""
    q, k, v = project(layer, x)
    return scaled_dot_product_attention(q, k, v, is_causal=layer.causal, enable_gqa=True)


def join(layer, heads):
    return layer.o_proj(heads.transpose(1, 2).flatten(2))


def top(scores, count):
    """The places of the highest scores by sorting, the lowest place first among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]


def gates_by_loops(layer, x):
    """The section's formulas, token by token."""
    shared, k, out = layer.shared_heads, layer.top_k, torch.zeros(*x.shape[:-1], layer.num_heads, dtype=x.dtype)
    for where in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[:-1]]).tolist():
        token = x[tuple(where)]
        gates = []
        if shared:
            own = torch.softmax(layer.shared_gate.weight @ token, 0) * shared if shared > 1 else token.new_ones(1)
            gates += list(own)
        if k:
            p = torch.softmax(layer.routed_gate.weight @ token, 0)
            kept = top(p.tolist(), k)
            total = sum(p[e] for e in kept)
            gates += [p[e] / total * k if e in kept else p.new_zeros(()) for e in range(len(p))]
        if shared and k:
            a = torch.softmax(layer.kind_gate.weight @ token, 0) * 2
            gates = [g * a[0 if h < shared else 1] for h, g in enumerate(gates)]
        out[tuple(where)] = torch.stack(gates)
    return out.movedim(-1, 1)


@pytest.mark.parametrize(("shared", "top_k"), [(0, 2), (1, 2), (2, 3), (4, 1), (6, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_gates_are_those_of_the_formulas_and_multiply_torchs_heads(shared, top_k, causal):
    layer, x = make(shared, top_k, causal=causal, num_kv_heads=2, rope=Rope()), tokens()
    out, gates = layer(x), gates_by_loops(layer, x)
    torch.testing.assert_close(layer.gates, gates)
    torch.testing.assert_close(out, join(layer, gates.unsqueeze(-1) * heads_of(layer, x)))
    means = [part.sum(1) / count for part, count in ((gates[:, :shared], shared), (gates[:, shared:], top_k)) if count]
    torch.testing.assert_close(sum(means), torch.full_like(means[0], len(means)))


@pytest.mark.parametrize("shared", [0, 1, 3, HEADS])
def test_zero_routers_and_all_heads_are_torchs_attention(shared):
    trained, x = Attention(DIM, HEADS, num_kv_heads=3, causal=True, rope=Rope()).double(), tokens()
    layer = MixtureOfHeadsAttention.from_attention(trained, shared_heads=shared, top_k=HEADS - shared)
    torch.testing.assert_close(layer(x), trained(x))
    torch.testing.assert_close(layer(x), join(trained, heads_of(trained, x)))
    for router in [p for name, p in layer.named_parameters() if "gate" in name]:
        torch.nn.init.normal_(router)
    assert not torch.allclose(layer(x), trained(x))


@pytest.mark.parametrize("shared", [0, 3, HEADS])
def test_all_heads_by_query_norm_are_attention_without_new_parameters(shared):
    trained, x = Attention(DIM, HEADS, qkv_bias=True).double(), tokens()
    options = {"shared_heads": shared, "top_k": HEADS - shared, "router": "query_norm"}
    layer = MixtureOfHeadsAttention.from_attention(trained, **options)
    assert torch.equal(layer(x), trained(x)) and layer.state_dict().keys() == trained.state_dict().keys()


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_a_head_that_is_off_is_a_head_whose_output_columns_are_gone(router):
    layer, x = make(2, 2, router=router), tokens()
    with torch.no_grad():
        x[..., 0] = 1.0
        if router == "input":
            layer.routed_gate.weight[1, 0] = -100.0
        layer.q_proj.weight[3 * 8 : 4 * 8] *= 1e-3
        out = layer(x)
        assert not layer.gates[:, 3].any()
        for head, same in ((3, True), (0, False), (4, False)):
            less = copy.deepcopy(layer)
            less.o_proj.weight[:, 8 * head : 8 * (head + 1)] = 0
            assert torch.equal(less(x), out) == same


def test_the_choice_is_that_of_a_sort_and_ties_go_to_the_lowest_head():
    layer, x = make(1, 3), tokens(50)
    layer(x)
    scores = x @ layer.routed_gate.weight.T
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(50)).tolist():
        assert layer.gates[b, 1:, n].nonzero().flatten().tolist() == sorted(top(scores[b, n].tolist(), 3))
    torch.nn.init.zeros_(layer.routed_gate.weight)
    layer(x)
    assert bool((layer.gates > 0).all((0, 2)).eq(torch.tensor([True] * 4 + [False] * 2)).all())


@pytest.mark.parametrize("rope", [None, Rope()])
def test_the_longest_queries_are_taken_whatever_their_rotation(rope):
    layer, x = make(3, 2, router="query_norm", rope=rope, num_kv_heads=2), tokens()
    layer(x)
    q = layer.q_proj(x).unflatten(-1, (HEADS, -1))  # before any rotation
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(LENGTH)).tolist():
        norms = [float(sum(t * t for t in head) ** 0.5) for head in q[b, n].tolist()]
        on = [0, 1, 2, *(3 + e for e in sorted(top(norms[3:], 2)))]
        assert layer.gates[b, :, n].tolist() == [float(h in on) for h in range(HEADS)]


def test_by_query_norm_the_gradient_goes_straight_through():
    layer, x = make(2, 2, router="query_norm"), tokens()
    out = layer(x)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), layer.q_proj.weight)[0]
    # By hand: what reaches queries through the heads that are on, and, through the softmax, the worth of every head.
    mask = layer.gates.detach()
    heads = heads_of(layer, x)
    norms = layer.q_proj(x).unflatten(-1, (HEADS, -1)).norm(dim=-1)[..., 2:]
    soft = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    worth = ((weights @ layer.o_proj.weight).unflatten(-1, (HEADS, -1)).transpose(1, 2) * heads).sum(-1).detach()
    by_hand = (join(layer, mask.unsqueeze(-1) * heads) * weights).sum() + (worth[:, 2:].mT * soft).sum()
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, layer.q_proj.weight)[0])
    torch.testing.assert_close(layer.eval()(x), out)


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_the_balance_is_top_k_where_all_heads_are_as_likely(top_k, router):
    layer, x = make(2, top_k, router=router), tokens()
    with torch.no_grad():
        if router == "input":
            layer.routed_gate.weight.zero_()
        else:
            layer.q_proj.weight.zero_()
    layer(x)
    assert head_balance(layer).item() == pytest.approx(top_k)


def test_the_balance_of_one_head_for_all_is_the_number_of_heads():
    layer, x = make(2, 1), tokens()
    with torch.no_grad():
        x[..., 0] = 1.0
        layer.routed_gate.weight[2, 0] = 1000.0
    layer(x)
    assert head_balance(layer).item() == pytest.approx(4)


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_the_balance_counts_real_tokens_only(router):
    layer, x = make(2, 2, router=router), tokens()
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[1, 4:] = False
    layer(x, keys=keys)
    if router == "input":
        logits = x @ layer.routed_gate.weight.T
    else:
        norms = layer.q_proj(x).unflatten(-1, (HEADS, -1)).norm(dim=-1)[..., 2:]
        logits = norms / norms.std(-1, keepdim=True)
    real = [logits[b, n].softmax(0) for b in range(2) for n in range(LENGTH) if keys[b, n]]
    taken = [top(p.tolist(), 2) for p in real]
    expected = sum(
        4 * (sum(p[e] for p in real) / len(real)) * (sum(e in t for t in taken) / len(real)) for e in range(4)
    )
    torch.testing.assert_close(head_balance(layer), expected)
    if router == "input":
        found, theirs = (
            torch.autograd.grad(value, layer.routed_gate.weight)[0] for value in (head_balance(layer), expected)
        )
        torch.testing.assert_close(found, theirs)


def test_the_balance_is_the_mean_over_layers_and_leaks_into_no_other_model():
    one, other, x = torch.nn.Sequential(make(2, 2), make(2, 3), make(6, 0)), torch.nn.Sequential(make(2, 1)), tokens()
    one(x)
    expected = (one[0].head_balance() + one[1].head_balance()) / 2
    other(x)
    torch.testing.assert_close(head_balance(one), expected)
    assert head_balance(other).item() == other[0].head_balance().item()
    for model, message in ((make(6, 0), "heads to choose"), (make(2, 2), "last forward"), (one[0].q_proj, "none")):
        with pytest.raises(ValueError, match=message):
            head_balance(model)


def test_holding_the_balance_down_evens_out_the_choice():
    layer, x = make(0, 2), tokens(100)
    with torch.no_grad():
        x += 2 * x[:1, :1]
    optimizer = torch.optim.Adam([layer.routed_gate.weight], lr=1e-2)
    layer(x)
    before = (layer.gates > 0).double().mean((0, 2)).std()
    for _ in range(30):
        layer(x)
        optimizer.zero_grad()
        head_balance(layer).backward()
        optimizer.step()
    layer(x)
    assert (layer.gates > 0).double().mean((0, 2)).std() < 0.5 * before
    assert head_balance(layer).item() < 2.1


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_permuting_tokens_permutes_outputs(router):
    layer, x, order = make(router=router), tokens(), torch.randperm(LENGTH)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("router", ["input", "query_norm"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_skipped_and_gathered_pairs_equal_all_of_them(router, padded, causal):
    layer, x = make(1, 2, router=router, causal=causal, num_kv_heads=3, rope=Rope()).eval(), tokens()
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    if padded:
        keys[1, 7:] = False
    out, gates = layer(x, keys=keys), layer.gates
    layer.skip = True
    torch.testing.assert_close(layer(x, keys=keys), out)
    q, k, v = project(layer, x)
    heads = torch.zeros_like(q)
    for b in range(2):
        for h in range(HEADS):
            chosen = gates[b, h].nonzero().flatten()
            mask = keys[b] & ((chosen[:, None] >= torch.arange(LENGTH)) if causal else True)
            mixed = scaled_dot_product_attention(q[b, h, chosen], k[b, h // 2], v[b, h // 2], attn_mask=mask)
            heads[b, h, chosen] = gates[b, h, chosen, None] * mixed
    torch.testing.assert_close(out, join(layer, heads))


def test_skipped_pairs_are_not_computed():
    layer, x = make(1, 2, skip=True).eval(), tokens()
    seen = []
    layer.attend = lambda q, k, v, where, call: seen.append(where) or torch.zeros_like(q)
    layer(x)
    assert seen[0].count(LENGTH, LENGTH) == 2 * LENGTH * LENGTH * 3
    layer.train()(x)
    assert seen[1].count(LENGTH, LENGTH) == LENGTH * LENGTH


def test_on_a_grid_heads_are_those_of_the_flattened_grid():
    layer, x = make(skip=True).eval(), tokens(12)
    torch.testing.assert_close(layer(x.view(2, 3, 4, DIM)).flatten(1, 2), layer(x))
    assert layer.gates.shape == (2, HEADS, 12)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_every_use_with_both_routers(use, skip, router):
    class Kind(MixtureOfHeadsAttention):
        tiny = MixtureOfHeadsAttention.tiny | {"router": router, "skip": skip}

    assert verify(Kind, use).holds


@pytest.mark.parametrize("router", ["input", "query_norm"])
@pytest.mark.parametrize("prompt", [0, 4])
def test_decoding_chooses_by_the_newest_token(router, prompt):
    layer, x = make(2, 1, router=router, causal=True, num_kv_heads=2, rope=Rope(), skip=True).eval(), tokens()
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.kept()[0].k.shape[2] == LENGTH


def test_a_prompt_with_padding_counts_its_own_tokens():
    layer, x, cache = make(2, 2, causal=True), tokens(), None
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[0, :3] = False
    cache = layer.new_cache()
    layer(x[:, :6], keys=keys[:, :6], cache=cache)
    again = make(2, 2)
    again(x[:, :6], keys=keys[:, :6])
    torch.testing.assert_close(head_balance(layer), head_balance(again))
    layer(x[:, 6:], keys=keys, cache=cache)
    again(x[:, 6:])
    torch.testing.assert_close(head_balance(layer), head_balance(again))


@pytest.mark.parametrize("router", ["input", "query_norm"])
def test_mix_needs_no_projections(router):
    layer, x = make(2, 2, router=router, causal=True), tokens()
    bare = make(2, 2, router=router, causal=True, project=False)
    state = {name: t for name, t in layer.state_dict().items() if "gate" in name}
    assert bare.state_dict().keys() == state.keys()
    bare.load_state_dict(state)
    mixed = bare.mix(*project(layer, x), Call(x, x, None, None, False))
    torch.testing.assert_close(join(layer, mixed), layer(x))


def test_gradients():
    torch.manual_seed(0)
    layer = MixtureOfHeadsAttention(12, 6, shared_heads=2, top_k=2, causal=True).double()
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    layer(x)
    p = (x @ layer.routed_gate.weight.T).detach().sort(-1, descending=True).values
    assert float((p[..., 1] - p[..., 2]).min()) > 1e-4  # away from ties
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,)), inputs
    )


def test_a_conversion_keeps_every_setting():
    settings = {
        "num_kv_heads": 3,
        "head_dim": 4,
        "kv_dim": 20,
        "causal": True,
        "qkv_bias": True,
        "out_bias": True,
        "qk_norm": "rms_all",
        "rope": Rope(500.0),
        "scale": 0.3,
        "softcap": 5.0,
        "dropout": 0.1,
        "backend": "dense",
        "gate": True,
    }
    images = {"lepe"}  # for images without causality: below
    options = inspect.signature(Attention.__init__).parameters.keys() - {"self", "dim", "num_heads", "project"} - images
    assert settings.keys() == options, "another option of Attention, which from_attention must pass on"
    trained = Attention(DIM, HEADS, **settings).double().eval()
    layer = MixtureOfHeadsAttention.from_attention(trained, shared_heads=2, top_k=4)
    x, context = tokens(5), tokens(9, dim=20)
    torch.testing.assert_close(layer(x, context), trained(x, context))
    for name in settings.keys() - {"qkv_bias", "out_bias", "gate"}:
        assert getattr(layer, name) == getattr(trained, name)
    assert not layer.training and layer.q_proj.weight is not trained.q_proj.weight
    trained = Attention(DIM, HEADS, lepe=5).double().eval()
    layer = MixtureOfHeadsAttention.from_attention(trained, shared_heads=2, top_k=4)
    image = tokens(20).unflatten(1, (4, 5))
    torch.testing.assert_close(layer(image), trained(image))
    with pytest.raises(ValueError, match=r"layer must be plain Attention; it was Sliding"):
        MixtureOfHeadsAttention.from_attention(SlidingWindowAttention(16, 2, window=4))


def test_routers_are_in_float32_and_without_biases():
    layer, x = make(2, 2).bfloat16(), tokens().bfloat16()
    q = layer.project(x, x, None, None)[0]
    assert layer.route(q, x).dtype == torch.float32
    routers = {name: tuple(p.shape) for name, p in layer.named_parameters() if "gate" in name}
    assert routers == {
        "routed_gate.weight": (4, DIM),
        "shared_gate.weight": (2, DIM),
        "kind_gate.weight": (2, DIM),
    }
    counts = [sum("gate" in name for name, _ in make(s, k).named_parameters()) for s, k in ((0, 2), (1, 2), (6, 0))]
    assert counts == [1, 2, 1]


def test_one_head_to_choose_and_a_single_head_are_on():
    x = tokens()
    layer = make(5, 1, router="query_norm")
    layer(x).sum().backward()
    assert bool((layer.gates == 1).all()) and bool(layer.q_proj.weight.grad.isfinite().all())
    single = MixtureOfHeadsAttention(DIM, 1).double()
    torch.testing.assert_close(single(x), join(single, heads_of(single, x)))


def test_a_layer_that_ran_in_training_can_be_copied():
    layer, x = make(), tokens()
    out = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": 7}, "shared_heads must be from 0 to num_heads 6; it was 7"),
        ({"shared_heads": -1}, "shared_heads must be"),
        ({"shared_heads": 2, "top_k": 5}, "top_k must be from 1 to 4, the heads not shared; it was 5"),
        ({"shared_heads": 2, "top_k": 0}, "top_k must be"),
        ({"shared_heads": 6, "top_k": 1}, "top_k must be from 0 to 0"),
        ({"router": "norm"}, "router must be"),
        ({"router": "query_norm", "qk_norm": "rms"}, "qk_norm must be None or 'rms_all'"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfHeadsAttention(DIM, HEADS, **options)
