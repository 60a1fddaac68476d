"""Relevance against finite differences and against eager attention."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from glocal.steer.method import Method
from glocal.steer.relevance import attention_relevance, gradient_relevance
from tests.steer import models


@dataclass
class Nudge(Method):
    """Adds a little to one weight of the last row."""

    head: int = 0
    key: int = 0
    row: int = 0
    by: float = 0.0

    def edits(self, site):
        return True

    def rows(self, site):
        return site.last

    def weights(self, site, weights):
        changed = weights.clone()
        changed[self.row, self.head, 0, self.key] += self.by
        return changed


@dataclass
class Read(Method):
    """Keeps the last row's weights."""

    def edits(self, site):
        return True

    def rows(self, site):
        return site.last

    def weights(self, site, weights):
        self.kept = weights
        return weights


def margin(logits):
    return logits[:, 20] - logits[:, 30]


@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_gradients_are_finite_differences(name):
    model = models.build(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in models.inputs(name, model).items()}
    for module in model.modules():  # transformers' norms compute in float32, too coarse to take differences of
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    layer, row, step = 1, 0, 1e-5
    found = attention_relevance(model, inputs, margin, layers=[layer])[0]
    with torch.no_grad(), Read(model, layers=[layer]) as read:
        model(**inputs, use_cache=False)
    keys = read.kept.shape[-1]
    wanted = torch.zeros(keys, dtype=torch.float64)
    for key in range(keys):
        for head in range(4):
            values = []
            for by in (step, -step):
                with torch.no_grad(), Nudge(model, layers=[layer], head=head, key=key, row=row, by=by):
                    values.append(margin(model(**inputs, use_cache=False).logits[:, -1])[row])
            slope = (values[0] - values[1]) / (2 * step)
            wanted[key] += read.kept[row, head, 0, key] * slope.clamp(min=0) / 4
    assert wanted.max() > 1e-4 and torch.allclose(found[row], wanted, atol=1e-8)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "gemma3", "blip_2", "mistral"])
def test_the_same_by_eager_attention(name):
    model = models.build(name)
    inputs = models.inputs(name, model)
    found = attention_relevance(model, inputs, margin)
    model.set_attn_implementation("eager")
    output = model(**inputs, use_cache=False, output_attentions=True)
    maps = getattr(output, "language_model_outputs", output).attentions
    gradients = torch.autograd.grad(margin(output.logits[:, -1]).sum(), maps)
    for layer, (a, g) in enumerate(zip(maps, gradients, strict=True)):
        wanted = gradient_relevance(a, g)[:, :, -1].mean(1)
        assert torch.allclose(found[layer], wanted, atol=1e-6), layer


def test_frozen_parameters_and_no_grad():
    model = models.build("llava")
    inputs = models.inputs("llava", model)
    wanted = attention_relevance(model, inputs, margin)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.allclose(attention_relevance(model, inputs, margin), wanted, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert attention_relevance(model, inputs, margin, layers=[-1]).shape == (1, 2, 24)


def test_what_is_refused():
    model = models.build("llama")
    inputs = models.inputs("llama", model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        attention_relevance(model, inputs, margin)
    with pytest.raises(ValueError, match="a number for each of 2 rows"):
        attention_relevance(model, inputs, lambda logits: logits.sum())
    with pytest.raises(ValueError, match="layers"):
        attention_relevance(model, inputs, margin, layers=[7])
    assert "_glocal_steering" not in vars(model)
