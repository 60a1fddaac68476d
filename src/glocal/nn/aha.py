"""All-or-here attention: a learned gate sends each token and head to the whole context or to a local window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.nn.frame import Attention, Call
from glocal.patterns import Causal, Choose, Full, Pattern, Sliding

__all__ = ["AllOrHereAttention", "gate_rate"]

_NO_CROSS = "here needs one index for queries and keys"


class AllOrHereAttention(Attention):
    """Each token and head sees all keys where ``sigmoid(gate(x)) > 0.5``, a window where not.

    In training both are computed and the hard gate is applied straight through: its gradient is that of the sigmoid.
    `gate_rate` is what the loss is to hold down. Otherwise each query is sent to its own branch, in one softmax. The
    cache stays complete, as any head may ask for all of it later. Luo et al., 2025, arXiv 2512.22562.

    Args:
        dim, num_heads: as in `Attention`, with all its options. OLMo-2, its base model, has ``qk_norm="rms_all"``.
        window: keys of the local branch, the query's own included; to both sides without causality.
        offset: added to the gate's logits, which have no bias: new rows then start near "all".
            0 is the function of the released weights, whose widened query projection has ``gate.weight`` as last rows.
        mode: outside training, ``"routed"`` computes the branch that was chosen, ``"dual"`` both; they agree.

    Raises:
        ValueError: a window below 1, another mode, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import AllOrHereAttention, gate_rate
    >>> layer = AllOrHereAttention(64, 4, window=8, causal=True)
    >>> out = layer(torch.randn(2, 20, 64))
    >>> loss = out.square().mean() + 1e-2 * gate_rate(layer)
    >>> loss.backward()
    >>> layer.gate.weight.grad.shape, layer.gates.shape
    (torch.Size([4, 64]), torch.Size([2, 4, 20]))
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"window": 3, "offset": 0.0}

    gates: Tensor | None
    """Of the last forward, ``(B, H, *grid)``: 1 for all, 0 for here. In training they carry the graph of that
    forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 128,
        offset: float = 0.1,
        mode: str = "routed",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer of at least 1; it was {window!r}")
        if mode not in ("routed", "dual"):
            raise ValueError(f"mode must be 'routed' or 'dual'; it was {mode!r}")
        self.window, self.offset, self.mode = window, float(offset), mode
        self.gate = nn.Linear(dim, num_heads, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)
        self.gates = None
        self._real: Tensor | None = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        soft = self.soft_gates(call.x)
        hard = soft > 0.5
        self._real = None if call.cache is not None else call.real
        everything, here = self.branches()
        if not self.training and self.mode == "routed":
            self.gates = hard.to(q.dtype)
            out: Tensor = self.attend(q, k, v, Choose(hard, everything, here), call)
            return out
        # soft + (hard - soft) is exactly 0 or 1, so that the other branch leaves no trace.
        gate = soft + (hard.to(soft.dtype) - soft).detach() if self.training else hard
        self.gates = gate = gate.to(q.dtype)
        share = gate.unsqueeze(-1)
        out = share * self.attend(q, k, v, everything, call) + (1 - share) * self.attend(q, k, v, here, call)
        return out

    def soft_gates(self, x: Tensor) -> Tensor:
        """``sigmoid(gate(x) + offset)``, ``(B, H, *grid)``, in float32 or better."""
        logits = self.heads(self.gate(x), self.num_heads).squeeze(-1)
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.offset).sigmoid()

    def branches(self) -> tuple[Pattern, Pattern]:
        """All, and here."""
        reach = self.window - 1
        return (Causal(), Sliding(reach, 0)) if self.causal else (Full(), Sliding(reach, reach))

    def gate_rate(self) -> Tensor:
        """Share of the last forward's real tokens and heads that saw all."""
        if self.gates is None:
            raise ValueError("gate_rate is of the last forward; there was none")
        gates = self.gates.flatten(2)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
        if self._real is None:
            return gates.mean()
        real = self._real[:, None].to(gates.dtype).expand_as(gates)
        return (gates * real).sum() / real.sum().clamp(min=1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has not run: tensors with a graph cannot be copied.
        return self.__dict__ | {"gates": None, "_real": None}

    def extra_repr(self) -> str:
        return f"window={self.window}, offset={self.offset}, mode={self.mode!r}"


def gate_rate(model: nn.Module) -> Tensor:
    """Mean share of tokens and heads that saw all in the last forward of every `AllOrHereAttention` of a model.

    A scalar with gradient in training: ``loss + weight * gate_rate(model)`` is the paper's penalty. Outside training,
    the rate to report.

    Raises:
        ValueError: the model has no such layer, or has not run.
    """
    rates = [layer.gate_rate() for layer in model.modules() if isinstance(layer, AllOrHereAttention)]
    if not rates:
        raise ValueError("model must have an AllOrHereAttention layer; it had none")
    return torch.stack(rates).mean()
