"""Information of patches about labels: exact cases, planted ones, and bias of small samples."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score

from glocal.bench.cycles import every_cycle
from glocal.bench.globality import globality_degree, hide_patches, mutual_information, visibility_curve


def bits(count, patches, seed=0):
    return torch.randint(2, (count, patches), generator=torch.Generator().manual_seed(seed))


def test_small_cycles_are_seen_when_all_their_edges_are():
    """Of 3 points each, two cycles are told apart from one by 3 pairs of points and no fewer; exactly."""
    tables, labels, chances = every_cycle(3)
    found = globality_degree(tables, labels, 3, chances=chances)
    assert all(abs(x) < 1e-12 for x in found.information[:3])
    assert found.degree == 3
    pairs = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    triangle = [n for n, (a, b) in enumerate(pairs) if b < 3]
    codes = tables[:, triangle] @ torch.tensor([1, 2, 4])
    assert mutual_information(codes, labels, chances) > 0.01
    assert float(chances[(codes == 7) & (labels == 0)].sum()) == pytest.approx(1 / 20)
    # Three pairs without a common point tell even more: all joined in 2 of 15 large cycles, never in small ones.
    assert len({node for at in found.patches[3] for node in pairs[at]}) == 6
    assert found.information[3] > mutual_information(codes, labels, chances)


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_parity_of_some_patches_has_their_number_as_degree(weight):
    """The label is the parity of three, of five, patches; the histogram alone tells the parity of all five."""
    patches = bits(3000, 4)
    labels = patches[:, :weight].sum(1) % 2
    found = globality_degree(patches, labels, 3, shuffles=19, level=0.9)
    # With one bit of the histogram known, the parity of w patches of 4 is that of the other 4 - w.
    assert found.degree <= min(weight, 4 - weight)
    assert globality_degree(patches, bits(3000, 1, seed=3)[:, 0], 2).degree is None


def test_all_cases_of_parity_exactly():
    """Without the histogram's help: patches of 4 kinds, two of each bit's value, so that kinds do not add up to it."""
    cases = torch.cartesian_prod(*[torch.arange(2)] * 6)
    cases = cases[cases.sum(1) == 3]  # the same histogram for all
    labels = cases[:, :2].sum(1) % 2
    chances = torch.full((len(cases),), 1 / len(cases)).double()
    found = globality_degree(cases, labels, 2, chances=chances)
    assert found.information[0] == pytest.approx(0, abs=1e-12)
    entropy = -sum(p * math.log(p) for p in (0.6, 0.4))
    assert found.information[2] == pytest.approx(entropy) and found.patches[2] in ((0, 1), (1, 0))


def test_information_by_sklearn_and_without_the_bias():
    x, y = bits(500, 3).matmul(torch.tensor([1, 2, 4])), bits(500, 1, seed=1)[:, 0]
    plain = mutual_info_score(x.numpy(), y.numpy())
    exact = mutual_information(x, y, torch.full((500,), 1 / 500).double())
    assert exact == pytest.approx(plain)
    assert mutual_information(x, y) == pytest.approx(plain + (8 + 2 - 16 - 1) / 1000)
    # Independent variables: the mean of the estimate is nearly 0, that of the plain one is not.
    corrected = [
        mutual_information(bits(200, 3, s) @ torch.tensor([1, 2, 4]), bits(200, 1, s + 500)[:, 0]) for s in range(200)
    ]
    assert abs(sum(corrected) / 200) < 0.002 < 7 / 400


def test_hidden_patches():
    images = torch.rand(20, 3, 12, 8) + 1
    seen = hide_patches(images, 0.5, 4, torch.Generator().manual_seed(0), fill=0.0)
    cells = (seen != 0).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).permute(0, 2, 3, 1, 4).flatten(3)
    assert torch.equal(cells.any(-1), cells.all(-1))  # whole patches
    assert (cells.any(-1).flatten(1).sum(1) == 3).all()
    assert len(cells.any(-1).flatten(1).unique(dim=0)) > 10  # others for each picture
    assert torch.equal(hide_patches(images, 1.0, 4, torch.Generator()), images)


def test_a_local_task_rises_early_and_a_global_one_late():
    """Pictures of 4 patches: any patch tells the local label, all together the global one."""

    def fit(x, y):
        def features(x):  # a patch each, -1, 0 where hidden, 1; and all products
            cells = (x[:, 0, ::2, ::2].flatten(1) - 0.5).sign() * (x[:, 0, ::2, ::2].flatten(1) != 0.5)
            return torch.cat([cells, cells.prod(1, keepdim=True)], 1).numpy()

        probe = LogisticRegression().fit(features(x), y)
        return lambda x: torch.from_numpy(probe.predict(features(x)))

    signs = bits(4000, 4).float()
    whole = signs.view(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    parity = signs.sum(1).long() % 2
    same = bits(4000, 1)
    local = same.float().expand(-1, 4).reshape(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    curves = [
        dict(visibility_curve(fit, (x[:2000], y[:2000]), (x[2000:], y[2000:]), (0.25, 0.75, 1.0), patch=2))
        for x, y in ((local, same[:, 0]), (whole, parity))
    ]
    assert curves[0][0.25] == 1 and curves[0][1.0] == 1
    assert curves[1][0.25] < 0.55 and curves[1][0.75] < 0.55 and curves[1][1.0] == 1


def test_bad_input():
    x, y = bits(10, 3), bits(10, 1)[:, 0]
    with pytest.raises(ValueError, match="most must be from 0 to the 3 patches; it was 4"):
        globality_degree(x, y, 4)
    with pytest.raises(ValueError, match=r"patches must be integers \(N, P\).*float32 \(10, 3\)"):
        globality_degree(x.float(), y, 1)
    with pytest.raises(
        ValueError, match=r"shuffles must be at least 1 and level between 0 and 1; they were 0 and 0.99"
    ):
        globality_degree(x, y, 1, shuffles=0)
    with pytest.raises(ValueError, match=r"of one length; they were \(10,\), \(9,\)"):
        mutual_information(y, y[1:])
    with pytest.raises(ValueError, match="share must be from 0 to 1; it was 2"):
        hide_patches(torch.ones(1, 1, 4, 4), 2, 2, torch.Generator())
    with pytest.raises(ValueError, match="sides that 3 divides"):
        hide_patches(torch.ones(1, 1, 4, 4), 1, 3, torch.Generator())
