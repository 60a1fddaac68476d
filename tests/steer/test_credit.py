"""The clipped loss against GRPO's formula by hand, token by token; factors against sorting by hand."""

import math

import numpy as np
import pytest
import torch

from glocal.steer.credit import (
    STRATEGIES,
    coupled_factors,
    credit_factors,
    group_advantages,
    policy_loss,
    random_factors,
    token_entropy,
    token_log_probs,
    top_factors,
)
from glocal.steer.rhythm import rhythm


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def responses(batch=4, length=15):
    """Of different lengths, none of them the whole row."""
    at = torch.arange(length)
    return torch.stack([(at >= 2 + n) & (at < length - n) for n in range(batch)])


def signals(batch=4, length=15, seed=0):
    """``waad``, ``delta``, ``fai`` of random attention."""
    draw = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(batch, 6, length, length, generator=draw, dtype=torch.float64)
    maps = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return rhythm([maps], responses(batch, length), window=4, horizon=(1, 6))


# The loss.


def grpo(log_probs, old, rewards, response, group, low=0.2, high=0.2, factors=None):
    """The formula of the GRPO paper without its KL term, in floats, a token at a time."""
    total = 0.0
    for i in range(len(rewards)):
        first = i - i % group
        mine = [float(r) for r in rewards[first : first + group]]
        mean = sum(mine) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in mine) / (group - 1))
        advantage = (float(rewards[i]) - mean) / (std + 1e-4)
        tokens = []
        for t in range(response.shape[1]):
            if response[i, t]:
                a = advantage * (1.0 if factors is None else float(factors[i, t]))
                ratio = math.exp(float(log_probs[i, t]) - float(old[i, t]))
                tokens.append(min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a))
        total += sum(tokens) / len(tokens)
    return -total / len(rewards)


def setting(seed=0):
    log_probs, old = numbers(4, 15, seed=seed) * 0.3 - 2, numbers(4, 15, seed=seed + 1) * 0.3 - 2
    return log_probs, old, torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64), responses()


def numeric_gradient(loss, at, step=1e-6):
    found = torch.zeros_like(at)
    for index in np.ndindex(*at.shape):
        moved = at.clone()
        moved[index] += step
        found[index] = loss(moved)
        moved[index] -= 2 * step
        found[index] = (found[index] - loss(moved)) / (2 * step)
    return found


@pytest.mark.parametrize("clips", [(0.2, None), (0.1, 0.3)])
@pytest.mark.parametrize("factored", [False, True])
def test_the_loss_is_grpo(clips, factored):
    log_probs, old, rewards, response = setting()
    factors = numbers(4, 15, seed=9).abs() if factored else None
    low, high = clips[0], clips[0] if clips[1] is None else clips[1]
    given = log_probs.clone().requires_grad_()
    advantages = group_advantages(rewards, 2)
    loss = policy_loss(given, old, advantages, response, factors=factors, clip=clips[0], clip_high=clips[1])
    wanted = lambda logs: grpo(logs, old, rewards, response, 2, low, high, factors)  # noqa: E731
    assert loss.item() == pytest.approx(wanted(log_probs), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(given.grad, numeric_gradient(wanted, log_probs), atol=1e-8, rtol=1e-6)
    assert (given.grad[~response] == 0).all() and (given.grad[response] == 0).any()


def loss_and_gradient(**options):
    log_probs, old, rewards, response = setting()
    given = log_probs.requires_grad_()
    loss = policy_loss(given, old, group_advantages(rewards, 2), response, **options)
    (gradient,) = torch.autograd.grad(loss, given)
    return loss, gradient


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("neutral", [dict(amplify=1.0), dict(share=0.0)])
def test_neutral_factors_leave_the_loss_as_it_is(strategy, neutral):
    found, response = signals(), responses()
    entropy = numbers(4, 15, seed=4)
    factors = credit_factors(strategy, response, rhythm=found, entropy=entropy, **neutral)
    for mine, plain in zip(loss_and_gradient(factors=factors), loss_and_gradient(), strict=True):
        assert torch.equal(mine, plain)
    if strategy != "none":
        other = credit_factors(strategy, response, rhythm=found, entropy=entropy)
        assert not torch.equal(loss_and_gradient(factors=other)[1], loss_and_gradient()[1])


def test_factors_carry_no_gradient():
    log_probs, old, rewards, response = setting()
    factors = numbers(4, 15, seed=9).requires_grad_()
    loss = policy_loss(log_probs.requires_grad_(), old, group_advantages(rewards, 2), response, factors=factors)
    assert torch.autograd.grad(loss, factors, allow_unused=True) == (None,)


def test_factors_on_positive_advantages_only():
    log_probs, old, rewards, response = setting()
    advantages, factors = group_advantages(rewards, 2), numbers(4, 15, seed=9).abs()
    found = policy_loss(log_probs, old, advantages, response, factors=factors, sign="positive")
    mixed = torch.where(advantages[:, None] >= 0, factors, 1.0)
    assert float(found) == pytest.approx(grpo(log_probs, old, rewards, response, 2, factors=mixed))
    assert float(found) != pytest.approx(grpo(log_probs, old, rewards, response, 2, factors=factors))


def test_means_advantages_by_token_and_positions_outside():
    log_probs, old, rewards, response = setting()
    advantages = group_advantages(rewards, 2)
    whole = policy_loss(log_probs, old, advantages, response)
    spread = advantages[:, None].expand(4, 15)
    assert torch.equal(policy_loss(log_probs, old, spread, response), whole)
    wild = log_probs.masked_fill(~response, -torch.inf).requires_grad_()
    loss = policy_loss(wild, old.masked_fill(~response, -torch.inf), advantages, response)
    assert torch.equal(loss, whole) and bool(torch.autograd.grad(loss, wild)[0].isfinite().all())
    each = [
        policy_loss(log_probs[n : n + 1], old[n : n + 1], advantages[n : n + 1], response[n : n + 1]) for n in range(4)
    ]
    counts = response.sum(1)
    by_token = sum(x * c for x, c in zip(each, counts, strict=True)) / counts.sum()
    torch.testing.assert_close(policy_loss(log_probs, old, advantages, response, mean="token"), by_token)
    some = response.clone()
    some[3] = False  # an empty response does not count
    torch.testing.assert_close(policy_loss(log_probs, old, advantages, some), sum(each[:3]) / 3)


def test_group_advantages_against_numpy():
    rewards = numbers(12)
    each = rewards.numpy().reshape(3, 4)
    wanted = (each - each.mean(1, keepdims=True)) / (each.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4).numpy(), wanted.ravel())
    centred = (each - each.mean(1, keepdims=True)).ravel()
    np.testing.assert_allclose(group_advantages(rewards, 4, scale=False).numpy(), centred)
    assert (group_advantages(torch.ones(4), 4) == 0).all()


def test_log_probs_and_entropy_are_of_the_tokens_own_position():
    logits, ids = numbers(2, 6, 5), torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(0))
    logs, entropy = token_log_probs(logits, ids), token_entropy(logits)
    assert (logs[:, 0] == 0).all() and (entropy[:, 0] == 0).all()
    for b in range(2):
        for t in range(1, 6):
            shares = np.exp(logits[b, t - 1].numpy())
            shares /= shares.sum()
            assert float(logs[b, t]) == pytest.approx(math.log(shares[ids[b, t]]))
            assert float(entropy[b, t]) == pytest.approx(-(shares * np.log(shares)).sum())
    sure = torch.tensor([[[0.0, -torch.inf], [0.0, 0.0]]])
    assert token_entropy(sure).tolist() == [[0.0, 0.0]]
    assert token_log_probs(logits.bfloat16(), ids).dtype == torch.float32


# Factors.


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.5, 1.0])
def test_top_factors_by_sorting(share):
    values, response = numbers(4, 15), responses()
    found = top_factors(values, response, share=share)
    for row in range(4):
        inside = [t for t in range(15) if response[row, t]]
        take = math.ceil(round(share * len(inside), 6))
        best = sorted(inside, key=lambda t: -float(values[row, t]))[:take]
        wanted = [1.5 if t in best else 1.0 for t in range(15)]
        assert found[row].tolist() == wanted
    together = top_factors(values * torch.tensor([1.0, 100, 0.01, -1])[:, None], response, share=share)
    assert torch.equal(together[:3], found[:3])  # of each response by itself


def test_ties_go_to_the_earlier_token_and_counts_are_exact():
    response = torch.ones(1, 15, dtype=torch.bool)
    found = top_factors(torch.zeros(1, 15), response)  # 0.4 * 15 in floats is 6
    assert found[0].tolist() == [1.5] * 6 + [1.0] * 9
    assert (top_factors(torch.zeros(1, 15), response, share=0.2) > 1).sum() == 3  # 0.2 * 15 is a little more than 3


def test_strategies_are_what_they_say():
    found, response = signals(), responses()
    entropy = numbers(4, 15, seed=4)
    for strategy, values in (
        ("local", found.delta),
        ("anchor", found.fai),
        ("bottom", -found.fai),
        ("entropy", entropy),
    ):
        factors = credit_factors(strategy, response, rhythm=found, entropy=entropy, amplify=2.0, share=0.3)
        assert torch.equal(factors, top_factors(values, response, amplify=2.0, share=0.3))
    draws = [credit_factors("random", response, generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal((draws[2] > 1).sum(1), (top_factors(entropy, response) > 1).sum(1))
    often = sum(random_factors(response, amplify=2.0) - 1 for _ in range(2000)) / 2000
    share = torch.ceil(response.sum(1) * 0.4) / response.sum(1)
    assert (often - share[:, None])[response].abs().max() < 0.06 and (often[~response] == 0).all()


def coupled(waad, delta, fai, response, alpha, back, amplify=1.5, share=0.4):
    """The section's sets, by loops."""
    gamma = np.ones(response.shape)
    handed = 0
    for row in range(len(response)):
        inside = [t for t in range(response.shape[1]) if response[row, t]]
        best = set(sorted(inside, key=lambda t: -fai[row, t])[: math.ceil(round(share * len(inside), 6))])
        low, high = np.median([waad[row, t] for t in inside]), np.median([delta[row, t] for t in inside])
        introducing = {}
        for t in best:
            before = [u for u in range(t - back, t) if u in inside]
            if before and waad[row, t] <= low and max(delta[row, u] for u in before) >= high:
                introducing[t] = max(before, key=lambda u: delta[row, u])
        for t in inside:
            extra = (t in best and t not in introducing) + (1 - alpha) * (t in introducing)
            extra += alpha * (t in introducing.values())
            gamma[row, t] += (amplify - 1) * extra
        handed += len(introducing)
    return gamma, handed


@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_coupled_factors_against_loops(alpha, back):
    handed = 0
    for seed in range(5):
        found = signals(seed=seed)
        response = responses()
        given = found.waad, found.delta, found.fai
        wanted, count = coupled(*(t.numpy() for t in given), response.numpy(), alpha, back)
        mine = coupled_factors(*given, response, alpha=alpha, back=back)
        np.testing.assert_allclose(mine.numpy(), wanted)
        assert torch.equal(mine, credit_factors("coupled", response, rhythm=found, alpha=alpha, back=back))
        anchors = top_factors(found.fai, response)
        if alpha == 0:
            assert torch.equal(mine, anchors)
        handed += count
    assert handed > 5


def test_coupled_without_planned_anchors_is_global_anchor():
    found, response = signals(), responses()
    waad = found.waad + 100 * (top_factors(found.fai, response) > 1)  # every anchor looks farther back than the median
    mine = coupled_factors(waad, found.delta, found.fai, response, alpha=0.7)
    assert torch.equal(mine, top_factors(found.fai, response))


def test_credit_is_handed_on_and_not_lost():
    """Introducing tokens that are distinct and no anchors: the sum does not depend on alpha."""
    response = torch.ones(1, 10, dtype=torch.bool)
    fai, delta = torch.zeros(1, 10), torch.zeros(1, 10)
    fai[0, [3, 8]] = 1.0
    delta[0, [2, 6]] = 1.0
    waad = torch.tensor([[0.0, 5, 5, 0, 0, 0, 5, 5, 0, 5]])
    rows = {a: coupled_factors(waad, delta, fai, response, share=0.2, alpha=a)[0] for a in (0.0, 0.3, 0.5, 1.0)}
    assert all(float((row - 1).sum()) == pytest.approx(1.0) for row in rows.values())
    assert rows[0.3].tolist() == pytest.approx([1, 1, 1.15, 1.35, 1, 1, 1.15, 1, 1.35, 1])
    assert rows[1.0].tolist() == [1, 1, 1.5, 1, 1, 1, 1.5, 1, 1, 1]


def test_bad_input():
    log_probs, old, rewards, response = setting()
    advantages = group_advantages(rewards, 2)
    for options, message in (
        (dict(factors=torch.ones(4, 3)), "factors must have response's shape"),
        (dict(sign="negative"), "sign must be"),
        (dict(mean="batch"), "mean must be"),
        (dict(clip=2.0), "clip must be"),
        (dict(clip_high=-1.0), "clip_high must be"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_loss(log_probs, old, advantages, response, **options)
    with pytest.raises(ValueError, match="advantages must be"):
        policy_loss(log_probs, old, advantages[:2], response)
    with pytest.raises(ValueError, match="response must be booleans"):
        policy_loss(log_probs, old, advantages, response.long())
    with pytest.raises(ValueError, match="at least one position"):
        policy_loss(log_probs, old, advantages, response & False)
    with pytest.raises(ValueError, match="group must be"):
        group_advantages(rewards, 3)
    with pytest.raises(ValueError, match="strategy must be one of"):
        credit_factors("best", response)
    with pytest.raises(ValueError, match="needs rhythm"):
        credit_factors("anchor", response)
    with pytest.raises(ValueError, match="needs entropy"):
        credit_factors("entropy", response)
    for options, message in ((dict(alpha=2), "alpha must"), (dict(back=0), "back must"), (dict(share=2), "share must")):
        with pytest.raises(ValueError, match=message):
            coupled_factors(log_probs, old, old, response, **options)
