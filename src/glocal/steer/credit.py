"""Reinforcement learning in which some tokens of a response get more of the reward: factors, and the clipped loss."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from glocal.steer.method import check_range
from glocal.steer.rhythm import Rhythm

__all__ = [
    "STRATEGIES",
    "coupled_factors",
    "credit_factors",
    "group_advantages",
    "policy_loss",
    "random_factors",
    "token_entropy",
    "token_log_probs",
    "top_factors",
]

STRATEGIES = ("none", "local", "anchor", "coupled", "entropy", "random", "bottom")
"""Ways to choose tokens: three of the paper, its controls, and the least influential ones, which should hurt."""


def credit_factors(
    strategy: str,
    response: Tensor,
    *,
    rhythm: Rhythm | None = None,
    entropy: Tensor | None = None,
    amplify: float = 1.5,
    share: float = 0.4,
    alpha: float = 0.5,
    back: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Factors of the tokens' advantages by one of `STRATEGIES` (Li et al., 2025, arXiv 2510.13554).

    ``local``: tokens at which the local heads' distance jumps. ``anchor``: tokens that later tokens will look back at.
    ``coupled``: anchors, some of whose credit goes to the token that introduces them. ``entropy``, ``random``,
    ``bottom`` are controls; ``none`` gives ones.

    Args:
        strategy: one of `STRATEGIES`.
        response: which positions are the response, booleans ``(B, N)``.
        rhythm: what ``local``, ``anchor``, ``coupled`` and ``bottom`` need.
        entropy: of the distribution that each token was drawn from, ``(B, N)``, for ``entropy``.
        amplify, share: as in `top_factors`.
        alpha, back: as in `coupled_factors`.
        generator: of ``random``.

    Returns:
        ``(B, N)``, without gradient, 1 outside the response.

    Raises:
        ValueError: an unknown strategy, what it needs missing, or a setting out of range.
    """
    signals: dict[str, Callable[[Rhythm], Tensor]] = {
        "local": lambda found: found.delta,
        "anchor": lambda found: found.fai,
        "bottom": lambda found: -found.fai,
    }
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; it was {strategy!r}")
    if strategy == "none":
        return torch.ones(response.shape, device=response.device)
    if strategy == "random":
        return random_factors(response, amplify=amplify, share=share, generator=generator)
    if strategy == "entropy":
        if entropy is None:
            raise ValueError("strategy 'entropy' needs entropy=token_entropy(logits)")
        return top_factors(entropy, response, amplify=amplify, share=share)
    if rhythm is None:
        raise ValueError(f"strategy {strategy!r} needs rhythm=read_rhythm(model, inputs, response)")
    if strategy == "coupled":
        waad, delta, fai = rhythm.waad, rhythm.delta, rhythm.fai
        return coupled_factors(waad, delta, fai, response, amplify=amplify, share=share, alpha=alpha, back=back)
    return top_factors(signals[strategy](rhythm), response, amplify=amplify, share=share)


def top_factors(values: Tensor, response: Tensor, *, amplify: float = 1.5, share: float = 0.4) -> Tensor:
    """``amplify`` at the highest ``share`` of each response's tokens, 1 elsewhere.

    The count is rounded up; of equal values the earlier token comes first.

    Args:
        values: a signal, ``(B, N)``.
        response: booleans ``(B, N)``.

    Returns:
        ``(B, N)`` in float32 or wider, without gradient.

    Raises:
        ValueError: shapes that differ, ``share`` not from 0 to 1, a negative ``amplify``.

    >>> top_factors(torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.tensor([[False, True, True, True]]), share=0.3)
    tensor([[1.0000, 1.0000, 1.5000, 1.0000]])
    """
    chosen = _top(values, response, share)
    check_range("amplify", amplify, 0)
    return 1 + (amplify - 1) * chosen.to(torch.promote_types(values.dtype, torch.float32))


def random_factors(
    response: Tensor, *, amplify: float = 1.5, share: float = 0.4, generator: torch.Generator | None = None
) -> Tensor:
    """The control: ``amplify`` at as many tokens of each response, drawn without regard to anything."""
    device = response.device if generator is None else generator.device
    values = torch.rand(response.shape, generator=generator, device=device).to(response.device)
    return top_factors(values, response, amplify=amplify, share=share)


def coupled_factors(
    waad: Tensor,
    delta: Tensor,
    fai: Tensor,
    response: Tensor,
    *,
    amplify: float = 1.5,
    share: float = 0.4,
    alpha: float = 0.5,
    back: int = 3,
) -> Tensor:
    """As `top_factors` of ``fai``, but anchors that the model has already planned hand a part on.

    Such an anchor's local heads look no farther back than the median of the response, and among the ``back`` tokens
    before it is one at which ``waad`` jumped, by the median of ``delta`` at least. It keeps ``1 - alpha`` of its
    extra credit, and the token with the greatest jump, the nearest of equals, gets ``alpha``, once, whatever number of
    anchors it introduces; on top of its own credit where it is an anchor too. Medians and the choice of that token are
    our reading: the paper does not fix them.

    Args:
        waad, delta, fai: the signals of `Rhythm`, ``(B, N)``.
        response: booleans ``(B, N)``.
        amplify, share: as in `top_factors`.
        alpha: what is handed on, from 0 to 1; 0 gives `top_factors`.
        back: how many tokens before an anchor may have introduced it.

    Returns:
        ``(B, N)``, without gradient.

    Raises:
        ValueError: as `top_factors`; ``alpha`` not from 0 to 1, ``back`` below 1.
    """
    check_range("alpha", alpha, 0, 1)
    check_range("back", back, 1)
    check_range("amplify", amplify, 0)
    anchors = _top(fai, response, share)
    for name, each in (("waad", waad), ("delta", delta)):
        _same(name, each, response)
    extra = anchors.to(torch.promote_types(fai.dtype, torch.float32))
    for row in range(len(response)):
        at = response[row].nonzero()[:, 0]
        if not len(at):
            continue
        jump = delta[row].detach()
        low, high = (_median(each[row, at].detach()) for each in (waad, delta))
        introducing = torch.zeros_like(response[row])
        for t in anchors[row].nonzero()[:, 0].tolist():
            before = [u for u in range(max(0, t - back), t) if bool(response[row, u])]
            if not before or bool(waad[row, t] > low):
                continue
            best = max(before, key=lambda u: (float(jump[u]), u))
            if bool(jump[best] >= high):
                extra[row, t] -= alpha
                introducing[best] = True
        extra[row] += alpha * introducing
    return 1 + (amplify - 1) * extra


def group_advantages(rewards: Tensor, group: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Rewards relative to the other answers to the same prompt (GRPO; Shao et al., 2024, arXiv 2402.03300).

    Args:
        rewards: ``(B,)``; answers to one prompt stand together.
        group: answers a prompt, at least 2.
        scale: divide by the group's standard deviation plus ``eps``; without, it is Dr. GRPO's.

    Returns:
        ``(B,)``; 0 throughout a group whose rewards are all equal.

    Raises:
        ValueError: a group that does not divide the batch.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if rewards.dim() != 1 or group < 2 or len(rewards) % group:
        raise ValueError(f"group must be at least 2 and divide the rewards {tuple(rewards.shape)}; it was {group}")
    each = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group)
    centred = each - each.mean(1, keepdim=True)
    found: Tensor = (centred / (each.std(1, keepdim=True) + eps) if scale else centred).flatten()
    return found


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response: Tensor,
    *,
    factors: Tensor | None = None,
    sign: Literal["both", "positive"] = "both",
    clip: float = 0.2,
    clip_high: float | None = None,
    mean: Literal["response", "token"] = "response",
) -> Tensor:
    """The clipped loss of PPO and GRPO, the advantage of each token times its factor; no KL and no entropy term.

    ``-mean min(r A, clamp(r, 1 - clip, 1 + clip_high) A)`` with ``r = exp(log_probs - old_log_probs)``. All are indexed
    by the token's own position: a factor belongs to the log-probability of the token that it was computed for.

    Args:
        log_probs: of the tokens under the policy, ``(B, N)``, as `token_log_probs` gives them; they carry the gradient.
        old_log_probs: of the policy that drew them, same shape.
        advantages: ``(B,)``, or ``(B, N)`` from a critic.
        response: which positions count, booleans ``(B, N)``.
        factors: ``(B, N)``; ones where None. No gradient goes through them.
        sign: whether factors act on all advantages, as in the paper's later version, or on those from 0 up only.
        clip: how far the ratio counts, below 1 and above.
        clip_high: above 1, where it differs.
        mean: over the tokens of each response, then over responses; or over all tokens.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that differ, no response, or a setting out of range.
    """
    for name, each in (("log_probs", log_probs), ("old_log_probs", old_log_probs), ("factors", factors)):
        if each is not None:
            _same(name, each, response)
    if advantages.shape not in (response.shape, response.shape[:1]):
        given = tuple(advantages.shape)
        raise ValueError(f"advantages must be (B,) or (B, N) of response's {tuple(response.shape)}; they were {given}")
    if sign not in ("both", "positive"):
        raise ValueError(f"sign must be 'both' or 'positive'; it was {sign!r}")
    if mean not in ("response", "token"):
        raise ValueError(f"mean must be 'response' or 'token'; it was {mean!r}")
    check_range("clip", clip, 0, 1)
    high = clip if clip_high is None else clip_high
    check_range("clip_high", high, 0)
    if not bool(response.any()):
        raise ValueError("response must mark at least one position")
    worth = (advantages if advantages.dim() == 2 else advantages[:, None].expand(response.shape)).detach()
    if factors is not None:
        each = factors.detach().to(worth.device)
        worth = worth * (each if sign == "both" else torch.where(worth >= 0, each, torch.ones_like(each)))
    # Positions outside may hold anything, minus infinity too: they must not reach the gradient as NaN.
    change = torch.where(response, log_probs - old_log_probs.detach(), 0.0)
    ratio = change.exp()
    each = torch.minimum(ratio * worth, ratio.clamp(1 - clip, 1 + high) * worth)
    each = torch.where(response, each, 0.0)
    if mean == "token":
        return -each.sum() / response.sum()
    counts = response.sum(1)
    return -(each.sum(1) / counts.clamp(min=1))[counts > 0].mean()


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token given those before, ``(B, N)``, from logits ``(B, N, V)``; 0 for the first."""
    logs = logits[:, :-1].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    found = logs.gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (1, 0))


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of what each token was drawn from, ``(B, N)``, from logits ``(B, N, V)``; 0 for the first."""
    wide = logits[:, :-1].detach().to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.pad(torch.special.entr(wide.softmax(-1)).sum(-1), (1, 0))


def _top(values: Tensor, response: Tensor, share: float) -> Tensor:
    _same("values", values, response)
    check_range("share", share, 0, 1)
    response = response.to(values.device)
    ranked = values.detach().masked_fill(~response, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    # As whole numbers: 0.4 * 15 must not be a little more than 6.
    counts = [ceil(share * count - 1e-9) for count in response.sum(1).tolist()]
    first = torch.arange(response.shape[1], device=values.device) < torch.tensor(counts, device=values.device)[:, None]
    return torch.zeros_like(response).scatter(1, order, first) & response


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5) if values.dtype in (torch.float32, torch.float64) else values.float().quantile(0.5)


def _same(name: str, given: Tensor, response: Tensor) -> None:
    if response.dtype != torch.bool or response.dim() != 2:
        raise ValueError(f"response must be booleans (B, N); it was {response.dtype} {tuple(response.shape)}")
    if given.shape != response.shape:
        raise ValueError(f"{name} must have response's shape {tuple(response.shape)}; it was {tuple(given.shape)}")
