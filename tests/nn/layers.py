"""What the tests of layers share: a layer computed by the oracle under a mask that a test wrote out."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.nn import Attention
from tests import oracle


def project(layer: Attention, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's queries, keys and values for a sequence."""
    context = x if context is None else context
    at = torch.arange(context.shape[1])
    return layer.project(x, context, at[-x.shape[1] :], at)


def by_mask(layer: Attention, x: Tensor, mask: Tensor, context: Tensor | None = None, bias=None) -> Tensor:
    """What the layer should give if its queries saw exactly ``mask (*lead, Nq, Nk)``."""
    q, k, v = project(layer, x, context)
    out, _ = oracle.attend(q, k, v, mask, scale=layer.scale, bias=bias)
    return layer.o_proj(out.to(x.dtype).movedim(1, -2).flatten(-2))


def steps(layer: Attention, x: Tensor, prompt: int = 0):
    """The outputs of decoding token by token after a prompt, and the cache."""
    cache = layer.new_cache()
    outs = [layer(x[:, :prompt], cache=cache)] if prompt else []
    outs += [layer(x[:, t : t + 1], cache=cache) for t in range(prompt, x.shape[1])]
    return torch.cat(outs, 1), cache


def gradients_agree(layer: Attention, x: Tensor, mask: Tensor, bias=None) -> None:
    """Gradients of all parameters and of the input, against those under the mask."""
    x = x.detach().requires_grad_()
    weights = torch.randn_like(x)
    found = []
    for out in (layer(x), by_mask(layer, x, mask, bias=bias)):
        inputs = [x, *layer.parameters()]
        found.append(torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
