"""S100: roles against loops, limits, the surrogate mask written out, and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch

from glocal.nn import NeuralAttentionSearch, Rope
from glocal.nn.nats import _RoleGradient
from tests.cache.test_roles import visible, visible_by_chunks
from tests.nn.layers import by_mask, gradients_agree, project, steps


def make(window=5, **options):
    torch.manual_seed(0)
    layer = NeuralAttentionSearch(32, 4, num_kv_heads=2, window=window, rope=Rope(), **options).double().eval()
    torch.nn.init.normal_(layer.q_proj.weight, std=0.3)
    return layer


def sample(length, batch=2):
    return torch.randn(batch, length, 32, dtype=torch.float64)


def fixed(layer, x, role):
    """Make every token's role ``role``, by a channel that is always 1."""
    x[..., 0] = 1
    with torch.no_grad():
        layer.scorer.weight.zero_()
        layer.scorer.weight.view(-1, 3, 32)[:, role, 0] = 1
    return x


def brute_force(layer, x):
    """The mask by loops from the scorer's weights, ``(B, H, N, N)``."""
    roles = (x @ layer.scorer.weight.T).unflatten(-1, (2, 3)).argmax(-1)
    roles[:, 0] = 0
    masks = [[visible(roles[b, :, h].tolist(), layer.window) for h in (0, 0, 1, 1)] for b in range(x.shape[0])]
    return torch.stack([torch.stack(rows) for rows in masks])


@pytest.mark.parametrize("window", [0, 5])
def test_equals_loops_with_random_roles(window):
    layer, x = make(window), sample(48)
    mask = brute_force(layer, x)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    pattern = layer.visible(layer.last.argmax(-1))
    assert torch.equal(pattern.mask(48), mask) and torch.equal(pattern.boxes(48).mask(), mask)
    assert len(pattern.boxes(48)) == 3
    gradients_agree(layer, x, mask)


def test_limits_are_causal_and_sliding_window_attention():
    masking = pytest.importorskip("transformers.masking_utils")
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    layer = make()
    for role in (0, 1):  # all global; all local after the first token, so that nothing closes
        x = fixed(layer, sample(48), role)
        torch.testing.assert_close(layer(x), by_mask(layer, x, causal))
    x = fixed(layer, sample(48), 2)
    sliding, at = masking.sliding_window_causal_mask_function(layer.window + 1), torch.arange(48)
    peer = torch.stack([torch.stack([torch.as_tensor(sliding(0, 0, i, j)) for j in at]) for i in at])
    peer[:, 0] = True  # the first token is global
    torch.testing.assert_close(layer(x), by_mask(layer, x, peer))


def test_a_global_token_ends_the_local_ones_before_it():
    layer, x = make(), sample(48)
    x = fixed(layer, x, 1)
    with torch.no_grad():
        layer.scorer.weight.view(-1, 3, 32)[:, 0, 1] = 1
    x[..., 1] = 0
    x[:, 20, 1] = 9
    mask = torch.ones(48, 48, dtype=torch.bool).tril()
    mask[21:, 1:20] = False
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))


@pytest.mark.parametrize("prompt", [0, 9])
def test_decodes_with_what_the_roles_keep(prompt):
    layer, x = make(), sample(48)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
    torch.testing.assert_close(out, by_mask(layer, x, brute_force(layer, x)))
    last = brute_force(layer, x)[:, ::2, -1]
    assert sum(int((part.position >= 0).sum()) for part in cache.kept()) == int(last.sum())
    assert max(part.k.shape[2] for part in cache.kept()) == int(last.sum(-1).max()) < 48


def surrogate(chosen, window):
    """``M (B, Hkv, N, N)`` of the definition, from roles that need not be one-hot."""
    ever, until, some = chosen.unbind(-1)
    length = chosen.shape[2]
    rows = []
    for i in range(length):
        row = []
        for j in range(length):
            if j > i:
                row.append(torch.zeros_like(ever[..., 0]))
                continue
            open_ = (1 - ever[..., j + 1 : i]).prod(-1)
            row.append(ever[..., j] + until[..., j] * open_ + some[..., j] * (i - j <= window))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def weighted(q, k, v, mask):
    """Attention with a mask that multiplies ``exp(score)``."""
    weights = mask.repeat_interleave(2, 1) * (q @ k.repeat_interleave(2, 1).mT).exp()
    return weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)


def parts(length=14):
    torch.manual_seed(0)
    q = torch.randn(1, 4, length, 3, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, length, 3, dtype=torch.float64)
    roles = torch.randint(3, (1, 2, length))
    roles[:, :, 0] = 0
    roles[:, 0, 2:9] = torch.tensor([1, 1, 0, 1, 1, 0, 1])
    chosen = torch.nn.functional.one_hot(roles, 3).double()
    return q, k, v, chosen, torch.randn(1, 4, length, 3, dtype=torch.float64)


def test_surrogate_is_the_mask_at_hard_roles():
    chosen = parts()[3]
    mask = surrogate(chosen, 3)
    for h in range(2):
        assert torch.equal(mask[0, h].bool(), visible(chosen[0, h].argmax(-1).tolist(), 3))


@pytest.mark.parametrize("budget", [1 << 21, 1])
def test_role_gradient_is_the_finite_difference_of_the_surrogate(budget, monkeypatch):
    monkeypatch.setattr("glocal.nn.nats._BUDGET", budget)
    q, k, v, chosen, towards = parts()
    own = chosen.clone().requires_grad_()
    out = weighted(q, k, v, surrogate(chosen, 3))
    (_RoleGradient.apply(out, own, q, k, v, None, 1.0, 3, 1, False) * towards).sum().backward()
    numeric, step = torch.zeros_like(chosen), 1e-6
    for place in range(chosen.numel()):
        change = torch.zeros_like(chosen)
        change.view(-1)[place] = step
        up, down = ((weighted(q, k, v, surrogate(chosen + s * change, 3)) * towards).sum() for s in (1, -1))
        numeric.view(-1)[place] = (up - down) / (2 * step)
    torch.testing.assert_close(own.grad, numeric, atol=1e-7, rtol=1e-6)


def test_bounded_gradient_scales_each_query_by_what_it_sees():
    q, k, v, chosen, towards = parts()
    own, soft = chosen.clone().requires_grad_(), chosen.clone().requires_grad_()
    mask = surrogate(soft, 3)
    scores = (q @ k.repeat_interleave(2, 1).mT).exp()
    seen = (mask.repeat_interleave(2, 1) * scores).sum(-1) / scores.tril().sum(-1)
    out = weighted(q, k, v, mask)
    (out * (towards * seen[..., None]).detach()).sum().backward()
    (_RoleGradient.apply(out.detach(), own, q, k, v, None, 1.0, 3) * towards).sum().backward()
    torch.testing.assert_close(own.grad, soft.grad)


def test_training_draws_roles_and_reaches_the_scorer():
    layer, x = make().train(), sample(48).requires_grad_()
    torch.manual_seed(3)
    out = layer(x)
    roles = layer.last.argmax(-1)
    mask = torch.stack([torch.stack([visible(roles[b, h].tolist(), 5) for h in (0, 0, 1, 1)]) for b in range(2)])
    torch.testing.assert_close(out, by_mask(layer, x, mask))
    out.square().sum().backward()
    assert bool(layer.scorer.weight.grad.isfinite().all()) and float(layer.scorer.weight.grad.abs().sum()) > 0
    q, k, v = (t.detach() for t in project(layer, x))
    chosen = layer.last.detach().requires_grad_()
    out = out.detach().requires_grad_()
    again = layer.o_proj(layer_mixed(layer, q, k, v, chosen)).square().sum()
    (grad,) = torch.autograd.grad(again, chosen)
    torch.manual_seed(3)
    soft = torch.nn.functional.gumbel_softmax(layer.heads(layer.scorer(x), 2), 1.0, hard=True)
    (expected,) = torch.autograd.grad(soft, layer.scorer.weight, grad * (torch.arange(48) > 0)[:, None])
    torch.testing.assert_close(layer.scorer.weight.grad, expected)


def layer_mixed(layer, q, k, v, chosen):
    """The output before its projection, with the bounded gradient by autograd on the mask written out."""
    mask = surrogate(chosen, layer.window).repeat_interleave(2, 1)
    scores = (q @ k.repeat_interleave(2, 1).mT * layer.scale).exp()
    seen = ((mask * scores).sum(-1) / scores.tril().sum(-1)).detach()
    weights = mask * scores
    out = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    if out.requires_grad:
        out.register_hook(lambda g: g * seen[..., None])
    return out.transpose(1, 2).flatten(2)


def test_detached_scorer_gives_the_input_no_gradient_of_roles():
    grads = []
    for detach in (True, False):
        layer, x = make(detach_scorer=detach).train(), sample(20)
        torch.manual_seed(1)
        x = x.requires_grad_()
        layer(x)
        if detach:
            layer.lifetime().backward()
            assert x.grad is None and layer.scorer.weight.grad is not None
        else:
            layer.lifetime().backward()
            grads.append(x.grad)
    assert float(grads[0].abs().sum()) > 0


def test_lifetimes_in_closed_form():
    layer, length = make(), 48
    for role, value in (
        (0, sum(length - j for j in range(length))),
        (1, length + sum(length - 1 - j for j in range(1, length))),
        (2, length),
    ):
        layer(fixed(layer, sample(length), role))
        assert float(layer.lifetime()) == pytest.approx(value / length / length)
    layer = make()
    layer(sample(length))
    layer.last.requires_grad_()
    (grad,) = torch.autograd.grad(layer.lifetime(), layer.last)
    total = 0
    for roles, pulls in zip(layer.last.argmax(-1).flatten(0, 1).tolist(), grad.flatten(0, 1), strict=True):
        for j, role in enumerate(roles):
            end = next((t for t in range(j + 1, length) if roles[t] == 0), length - 1)
            total += (length - j, end - j, 0)[role]
            assert (pulls[j] * length**2 * 4).tolist() == pytest.approx([length - j, end - j, 0])
    assert layer.lifetime().item() == pytest.approx(total / length / length / 4)


def test_padding_closes_no_segment():
    layer, x = make(), sample(30)
    keys = torch.ones(2, 30, dtype=torch.bool)
    keys[:, :4] = False
    keys[0, 10:12] = False
    out = layer(x, keys=keys)
    torch.testing.assert_close(out[1:, 4:], by_rest(layer, x[1:, 4:]))
    other = x.clone()
    other[0, 10:12] = torch.randn(2, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(other, keys=keys)[:, 12:], out[:, 12:])


def by_rest(layer, x):
    return by_mask(layer, x, brute_force(layer, x))  # rotary positions are relative


def test_ties_go_to_global_then_local():
    layer, x = make(), sample(5)
    with torch.no_grad():
        layer.scorer.weight.zero_()
        layer(x)
    assert bool((layer.last.argmax(-1) == 0).all())


def by_chunks(layer, x):
    """The mask by loops, roles from the scorer on the mean of each chunk's inputs, ``(B, H, N, N)``."""
    size, length = layer.chunk, x.shape[1]
    means = torch.stack([x[:, t : t + size].mean(1) for t in range(0, length, size)], 1)
    roles = (means @ layer.scorer.weight.T).unflatten(-1, (2, 3)).argmax(-1)
    roles[:, 0] = 0
    masks = [
        [visible_by_chunks(roles[b, :, h].tolist(), layer.window, size, length) for h in (0, 0, 1, 1)] for b in (0, 1)
    ]
    return torch.stack([torch.stack(rows) for rows in masks])


@pytest.mark.parametrize(("window", "chunk"), [(0, 4), (8, 4), (5, 5)])
def test_chunks_equal_loops(window, chunk):
    layer, x = make(window, chunk=chunk), sample(50)
    mask = by_chunks(layer, x)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    assert layer.last.shape[2] == -(-50 // chunk) and len(mask[:, ::2].flatten(0, 1).unique(dim=0)) == 4
    pattern = layer.visible(layer.last.argmax(-1), 50)
    assert torch.equal(pattern.mask(50), mask) and torch.equal(pattern.boxes(50).mask(), mask)
    gradients_agree(layer, x, mask)


@pytest.mark.parametrize("prompt", [0, 9, 16])
def test_chunks_decode_as_in_parallel_and_no_token_learns_of_a_later_one(prompt):
    """A chunk's role depends on its last token, and its earlier queries must not notice."""
    layer, x = make(8, chunk=4), sample(50)
    mask = by_chunks(layer, x)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, by_mask(layer, x, mask))
        for t in (7, 23, 30):
            other = x.clone()
            other[:, t] = 30 * torch.randn(2, 32, dtype=torch.float64)
            torch.testing.assert_close(layer(other)[:, :t], layer(x)[:, :t])
    kept = sum(int((part.position >= 0).sum()) for part in cache.kept())
    assert kept == int(mask[:, ::2, -1].sum()) < 2 * 2 * 50


def test_one_chunk_of_all_is_causal_attention():
    layer, x = make(0, chunk=64), sample(48)
    torch.testing.assert_close(layer(x), by_mask(layer, x, torch.ones(48, 48, dtype=torch.bool).tril()))


@pytest.mark.parametrize("budget", [1 << 21, 1])
def test_role_gradient_of_chunks_is_the_finite_difference_of_the_surrogate(budget, monkeypatch):
    monkeypatch.setattr("glocal.nn.nats._BUDGET", budget)
    q, k, v, _, towards = parts()
    roles = torch.tensor([[[0, 1, 0, 1, 2], [0, 2, 1, 1, 0]]])
    chosen = torch.nn.functional.one_hot(roles, 3).double()

    def over_tokens(chosen):
        mask = surrogate(chosen, 1).repeat_interleave(3, 2).repeat_interleave(3, 3)
        return weighted(q, k, v, mask[..., :14, :14].tril())

    own = chosen.clone().requires_grad_()
    (_RoleGradient.apply(over_tokens(chosen), own, q, k, v, None, 1.0, 3, 3, False) * towards).sum().backward()
    numeric, step = torch.zeros_like(chosen), 1e-6
    for place in range(chosen.numel()):
        change = torch.zeros_like(chosen)
        change.view(-1)[place] = step
        up, down = ((over_tokens(chosen + s * change) * towards).sum() for s in (1, -1))
        numeric.view(-1)[place] = (up - down) / (2 * step)
    torch.testing.assert_close(own.grad, numeric, atol=1e-7, rtol=1e-6)


def test_chunks_with_padding_learn_and_have_means_of_what_is_real():
    layer, x = make(8, chunk=4).train(), sample(30)
    keys = torch.ones(2, 30, dtype=torch.bool)
    keys[:, :6] = False
    keys[:, 13:15] = False
    keys[0, 26:] = False
    torch.manual_seed(5)
    out = layer(x, keys=keys)
    (out.square().sum() + layer.lifetime()).backward()
    assert bool(layer.scorer.weight.grad.isfinite().all()) and float(layer.scorer.weight.grad.abs().sum()) > 0
    other = torch.where(keys[..., None], x, 99 * torch.randn_like(x))
    torch.manual_seed(5)
    torch.testing.assert_close(layer(other, keys=keys)[keys], out[keys])  # the same drawing
    layer.eval()
    torch.testing.assert_close(layer(other, keys=keys)[keys], layer(x, keys=keys)[keys])
    chosen = layer.last.argmax(-1)
    assert bool((chosen[:, :, 0] == 2).all()) and bool((chosen[:, :, 1] == 0).all())


def test_copies_and_errors():
    layer = make().train()
    layer(sample(8))
    assert copy.deepcopy(layer).last is None
    with pytest.raises(ValueError, match="there was none"):
        make().lifetime()
    with pytest.raises(ValueError, match="window must not be negative; it was -1"):
        make(window=-1)
    with pytest.raises(ValueError, match="chunk must be at least 1 and divide window 5; it was 2"):
        make(chunk=2)
    with pytest.raises(ValueError, match="tau must be positive; it was 0"):
        make(tau=0)
    with pytest.raises(ValueError, match="no noncausal-self form"):
        make(causal=False)(sample(4))
    with pytest.raises(ValueError, match="must be a sequence"):
        layer(torch.randn(1, 3, 3, 32, dtype=torch.float64))
