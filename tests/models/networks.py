"""What the tests of all networks ask for."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_exports(model: nn.Module, x: Tensor) -> None:
    """`torch.export` gives a program that computes the same."""
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


def assert_a_step_changes(model: nn.Module) -> None:
    """A step of gradient descent, by the gradients that are there, changes weights."""
    before = [p.clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
