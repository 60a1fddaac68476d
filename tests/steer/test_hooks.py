"""What a site says of its keys, number by number."""

import torch

from glocal.steer.hooks import Run, Site
from glocal.steer.spans import SpanMap


def site(first_key=0, keys=5, batch=2, prompt=5):
    ids = torch.arange(2 * prompt).view(2, prompt)
    run = Run({}, prompt, SpanMap.of(ids, image_token=6), True)
    rows = torch.arange(first_key + keys - 1, first_key + keys)
    return Site(0, torch.nn.Identity(), run, rows, first_key, keys, batch, prefill=False)


def test_values_of_the_prompt_at_the_keys():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])
    assert torch.equal(site().over_keys(values), values)
    later = site(first_key=2, keys=5, batch=4).over_keys(values)  # tokens were dropped, others generated
    assert later.tolist() == [[3.0, 4.0, 5.0, 0.0, 0.0]] * 2 + [[8.0, 9.0, 10.0, 0.0, 0.0]] * 2
    assert site(keys=3).over_keys(values).tolist() == [[1.0, 2.0, 3.0], [6.0, 7.0, 8.0]]  # a prompt in pieces
    gone = site(first_key=6, keys=2).over_keys(values > 3)
    assert gone.dtype == torch.bool and gone.tolist() == [[False, False]] * 2


def test_values_of_prompts_for_several_answers():
    assert site(batch=6).repeated(torch.tensor([1, 2])).tolist() == [1, 1, 1, 2, 2, 2]


def test_keys_of_a_kind():
    found = site(first_key=1, keys=6, batch=4)
    assert found.where("image").nonzero().tolist() == [[2, 0], [3, 0]]
    assert found.where("answer").tolist() == [[False] * 4 + [True] * 2] * 4
    assert found.last.tolist() == [0]
