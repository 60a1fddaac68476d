"""S040: Luong's attention by loops over frames, its limits, its gradients; the frame of alignment attention."""

import itertools
import math

import pytest
import torch

from glocal.nn import AdditiveAttention, AlignmentAttention, LuongAttention, aligned_softmax

B, T, D = 2, 9, 4


def inputs(dim=D, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(B, D, generator=draw, dtype=torch.double)
    memory = torch.randn(B, T, dim, generator=draw, dtype=torch.double)
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 6:] = False
    return query, memory, real


def make(dim=D, **options):
    torch.manual_seed(1)
    return LuongAttention(D, dim, **options).double()


def score(layer, query, frame, at):
    """One score, by definition."""
    if layer.score == "dot":
        return query @ frame
    weight = layer.score_proj.weight
    if layer.score == "general":
        return frame @ weight @ query
    if layer.score == "location":
        return weight[at] @ query
    inner = frame if layer.score == "concat_code" else layer.memory_proj.weight @ frame
    return layer.energy.weight[0] @ torch.tanh(weight @ query + inner)


def by_hand(layer, query, memory, real, step=0):
    """The weights, frame by frame."""
    rows = []
    for b in range(B):
        length = int(real[b].sum())
        middle = standing = None
        if layer.place == "local_m":
            middle = standing = min(step, length - 1)
        if layer.place == "local_p":
            inner = torch.tanh(layer.place_proj.weight @ query[b])
            middle = length * torch.sigmoid(layer.place_energy.weight[0] @ inner)
            standing = math.floor(middle.detach())
        shares = {}
        for at in range(length):
            if layer.place != "global" and abs(at - standing) > layer.window:
                continue
            if layer.score == "location" and at >= layer.longest:
                continue
            shares[at] = torch.exp(score(layer, query[b], memory[b, at], at))
        total = sum(shares.values())
        row = [shares[at] / total if at in shares else torch.zeros((), dtype=torch.double) for at in range(T)]
        if layer.place == "local_p":
            row = [w * torch.exp(-((at - middle) ** 2) / (2 * (layer.window / 2) ** 2)) for at, w in enumerate(row)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


CASES = list(
    itertools.product(["dot", "general", "concat", "concat_code", "location"], ["global", "local_m", "local_p"])
)


@pytest.mark.parametrize("score,place", CASES)
def test_by_definition_with_gradients(score, place):
    layer = make(score=score, place=place, window=2, longest=7)
    query, memory, real = inputs()
    learned = [p for name, p in layer.named_parameters() if "out" not in name]
    given = [query.requires_grad_(), memory.requires_grad_(), *learned]
    state = layer.start(memory, real)
    for step in range(3):
        context, state = layer(query, state)
        wanted = by_hand(layer, query, memory, real, step)
        assert torch.allclose(state.weights, wanted, atol=1e-12)
        assert torch.allclose(context, torch.einsum("bt,btd->bd", wanted, memory), atol=1e-12)
        some = torch.sin(torch.arange(context.numel())).view(context.shape)
        grads = [
            torch.autograd.grad((c * some).sum(), given, retain_graph=True, allow_unused=True)
            for c in (context, torch.einsum("bt,btd->bd", wanted, memory))
        ]
        for mine, theirs in zip(*grads, strict=True):
            assert (mine is None) == (theirs is None) and (mine is None or torch.allclose(mine, theirs, atol=1e-10))


def test_general_with_the_identity_is_dot():
    query, memory, real = inputs()
    layer = make(score="general")
    torch.nn.init.eye_(layer.score_proj.weight)
    states = [one(query, one.start(memory, real))[1] for one in (layer, make(score="dot"))]
    assert torch.equal(states[0].weights, states[1].weights)


def test_a_window_over_all_with_a_wide_gaussian_is_global():
    query, memory, real = inputs()
    near, far = make(score="dot", place="local_p", window=2_000_000), make(score="dot")
    found, wanted = (one(query, one.start(memory, real))[1].weights for one in (near, far))
    assert torch.allclose(found, wanted, atol=1e-9)


def test_the_weights_of_a_gaussian_sum_to_at_most_one():
    query, memory, real = inputs()
    sums = []
    for window in (1, 2, 4, 8, 64):
        layer = make(score="dot", place="local_p", window=window)
        sums.append(layer(query, layer.start(memory, real))[1].weights.sum(-1))
    assert all((s <= 1).all() for s in sums) and (sums[-1] > 0.98).all() and (sums[0] < 0.98).all()


def test_derivatives_of_the_place_by_finite_differences():
    query, memory, real = inputs()
    layer = make(score="dot", place="local_p", window=3)
    with torch.no_grad():
        place = layer(query, layer.start(memory, real))[1].position
    assert ((place % 1 > 0.01) & (place % 1 < 0.99)).all()  # away from where the window jumps

    def run(first, last, query, memory):
        weights = {"place_proj.weight": first, "place_energy.weight": last}
        start = layer.start(memory, real)
        return torch.func.functional_call(layer, weights, (query, start))[0]

    given = [layer.place_proj.weight.detach(), layer.place_energy.weight.detach(), query, memory]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in given])


def test_scores_can_be_weakened_instead_of_weights():
    query, memory, real = inputs()
    layer = make(score="dot", place="local_p", window=2, renorm_scores=True)
    _, state = layer(query, layer.start(memory, real))
    assert torch.allclose(state.weights.sum(-1), torch.ones(B, dtype=torch.double))
    for b in range(B):
        p = state.position[b, 0]
        at = torch.arange(math.floor(p.detach()) - 2, math.floor(p.detach()) + 3)
        at = at[(at >= 0) & (at < real[b].sum())]
        wanted = torch.softmax(memory[b, at] @ query[b] * torch.exp(-((at - p) ** 2) / 2), 0)
        assert torch.allclose(state.weights[b, at], wanted, atol=1e-12)


def test_all_steps_at_once_are_the_steps():
    _, memory, real = inputs()
    layer, queries = make(score="general", place="local_m", window=1), torch.randn(B, 5, D, dtype=torch.double)
    contexts, weights = layer.over(queries, memory, real)
    state = layer.start(memory, real)
    for n, query in enumerate(queries.unbind(1)):
        context, state = layer(query, state)
        assert torch.equal(contexts[:, n], context) and torch.equal(weights[:, n], state.weights)
    assert state.step == 5 and torch.allclose(state.total, weights.sum(1))


@pytest.mark.parametrize("filters", [0, 3])
def test_additive_attention_by_definition(filters):
    torch.manual_seed(0)
    layer = AdditiveAttention(D, 5, hidden=6, filters=filters, width=3).double()
    query, memory, real = inputs(5)
    state = layer.start(memory, real)
    for _ in range(3):
        before = state
        _, state = layer(query, state)
        for b in range(B):
            energies = []
            for t in range(int(real[b].sum())):
                inner = layer.memory_proj.weight @ memory[b, t] + layer.query_proj(query[b])
                if filters:
                    row = torch.stack([before.weights[b], before.total[b]])
                    cut = torch.nn.functional.pad(row, (1, 1))[:, t : t + 3]
                    inner = inner + layer.location_proj.weight @ (layer.location.weight * cut).sum((1, 2))
                energies.append(layer.energy.weight[0] @ torch.tanh(inner))
            wanted = torch.softmax(torch.stack(energies), 0)
            assert torch.allclose(state.weights[b, : len(energies)], wanted, atol=1e-12)
            assert (state.weights[b, len(energies) :] == 0).all()


def test_a_row_that_sees_nothing_gets_zeros_and_no_broken_gradient():
    energies = torch.randn(2, 3, requires_grad=True)
    weights = aligned_softmax(energies, torch.tensor([[True, True, False], [False, False, False]]))
    weights.square().sum().backward()
    assert (weights[1] == 0).all() and energies.grad.isfinite().all() and (energies.grad[1] == 0).all()


def test_half_precision():
    layer = LuongAttention(D, D, place="local_p").bfloat16()
    query, memory, _ = (t.bfloat16() if t.is_floating_point() else t for t in inputs())
    context, state = layer(query, layer.start(memory))
    assert context.dtype == state.weights.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change,match",
    [
        (dict(score="magic"), "score must be one of dot"),
        (dict(place="near"), "place must be one of global"),
        (dict(window=0), "window and longest must be at least 1"),
        (dict(renorm_scores=True), "needs the Gaussian of place 'local_p'"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ValueError, match=match):
        LuongAttention(D, D, **change)


def test_bad_shapes():
    with pytest.raises(ValueError, match="memory_dim equal to query_dim 4"):
        LuongAttention(4, 5, score="dot")
    layer = LuongAttention(4, 5)
    with pytest.raises(ValueError, match=r"memory must be \(B, T, 5\)"):
        layer.start(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="with T above 0"):
        layer.start(torch.randn(2, 0, 5))
    with pytest.raises(ValueError, match=r"real must be booleans \(2, 3\)"):
        layer.start(torch.randn(2, 3, 5), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"query must be \(2, 4\)"):
        layer(torch.randn(1, 4), layer.start(torch.randn(2, 3, 5)))
    with pytest.raises(ValueError, match="width must be odd"):
        AdditiveAttention(4, 5, filters=2, width=4)
    with pytest.raises(ValueError, match="memory_dim must be at least 1"):
        AlignmentAttention(4, 0)
