"""Rollout against the product of whole matrices, gradient times input against finite differences."""

import pytest
import torch

from glocal.inspect import gradient_times_input, record, rollout
from glocal.nn import Attention
from tests.hf.models import build, inputs
from tests.hf.test_attention import bert, tokens


def test_rollout_is_a_row_of_the_product(monkeypatch):
    torch.manual_seed(0)
    model, batch = bert().double(), tokens()
    found = record(model, batch)
    whole = torch.eye(found[0].queries).double()
    for layer in found:
        whole = (0.3 * torch.eye(layer.queries) + 0.7 * layer.weights().mean(1)) @ whole
    tiles = type(found[0]).tiles
    monkeypatch.setattr(type(found[0]), "tiles", lambda self: tiles(self, at_once=300))
    torch.testing.assert_close(rollout(found, query=0, residual=0.3), whole[:, 0])
    several = torch.tensor([2, -1, 5])
    torch.testing.assert_close(rollout(found, several, residual=0.3), whole[torch.arange(3), several])
    torch.testing.assert_close(rollout(found).sum(-1), torch.ones(3).double())
    shares = torch.rand(3, found[0].queries).double()
    torch.testing.assert_close(rollout(found, shares, residual=0.3), torch.einsum("bq,bqk->bk", shares, whole))


def test_gradient_times_input_is_a_derivative():
    """Growing one token's embedding by a share moves the objective by its product's sum."""
    torch.manual_seed(0)
    model, batch = build("llama").double(), inputs("llama", batch=1, length=7)
    objective = lambda output: output.logits[:, -1, 3].sum()  # noqa: E731
    lengths = gradient_times_input(model, batch, objective)
    table = model.get_input_embeddings()
    base = table(batch["input_ids"]).detach()
    at = base.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(model(inputs_embeds=at)), at)
    torch.testing.assert_close(lengths, (gradient * base).norm(dim=-1))
    for token in (0, 4):
        ends = []
        for share in (0.99, 1.01):  # wide, because Llama's norms are in float32
            moved = base.clone()
            moved[:, token] *= share
            with torch.no_grad():
                ends.append(objective(model(inputs_embeds=moved)))
        change = (ends[1] - ends[0]) / 0.02
        torch.testing.assert_close((gradient * base)[0, token].sum(), change, rtol=1e-2, atol=1e-6)
    assert not table._forward_hooks and not model.training


def test_gradient_of_pixels():
    model, batch = build("vit").double(), inputs("vit", batch=2)
    batch["pixel_values"] = batch["pixel_values"].double()
    found = gradient_times_input(model, batch, lambda output: output.last_hidden_state[:, 0, 0].sum())
    assert found.shape == (2, 16, 16) and (found != 0).any()


def test_bad_input():
    model, batch = bert(), tokens()
    found = record(model, batch)
    with pytest.raises(ValueError, match="residual must be from 0 to 1; it was 2"):
        rollout(found, residual=2)
    with pytest.raises(ValueError, match="query must be one of 21 tokens; it was 21"):
        rollout(found, 21)
    with pytest.raises(ValueError, match=r"query of floats must be \(3, 21\); it was \(3,\)"):
        rollout(found, torch.ones(3))
    with pytest.raises(ValueError, match="other keys"):
        rollout(record(Attention(8, 2), (torch.randn(1, 3, 8), torch.randn(1, 6, 8))))
    with pytest.raises(ValueError, match="input_ids or pixel_values; they held labels"):
        gradient_times_input(model, {"labels": torch.ones(1)}, lambda output: output)
