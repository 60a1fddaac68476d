"""S106: grades as bits and back, measures by hand and by scikit-learn, training that learns and leaves no trace."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score

from glocal.inspect import (
    baseline_grades,
    decode_grades,
    grade_report,
    grade_shares,
    ordinal_targets,
    train_embedder,
    train_grader,
)
from glocal.models.graph.hallucination import GraphGrader, contrastive_embedder
from glocal.nn import cosine_edges


def test_targets_as_published_and_back():
    grades = torch.arange(4)
    assert ordinal_targets(grades).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert torch.equal(decode_grades(2 * ordinal_targets(grades) - 1), grades)


def test_every_pattern_of_bits_gives_its_highest():
    """The rule as it is told: 3 if the third is set, else 2, 1, 0; a bit at one half is not set."""
    for number in range(8):
        bits = [(number >> k) & 1 for k in range(3)]
        wanted = 3 if bits[2] else 2 if bits[1] else 1 if bits[0] else 0
        assert int(decode_grades(torch.tensor(bits) - 0.5)) == wanted
        assert int(decode_grades(torch.tensor(bits).float())) == wanted


def test_shares_telescope_and_are_probabilities_where_bits_fall():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    shares = grade_shares(logits)
    assert bool((shares >= 0).all()) and torch.allclose(shares.sum(-1), torch.ones(50))
    # What is expected of the grade is the sum of the bits' probabilities.
    assert torch.allclose(shares @ torch.arange(4.0), logits.sigmoid().sum(-1))


def test_measures_by_hand_and_by_scikit_learn():
    draw = torch.Generator().manual_seed(1)
    grades = torch.randint(4, (200,), generator=draw)
    logits = 2 * ordinal_targets(grades) - 1 + 1.5 * torch.randn(200, 3, generator=draw)
    report, found = grade_report(grades, logits), decode_grades(logits)
    hits = [float((found[grades == k] == k).float().mean()) for k in range(4)]
    right = [float((grades[found == k] == k).float().mean()) for k in range(4)]
    assert report.macro_recall == pytest.approx(np.mean(hits))
    assert report.macro_recall == pytest.approx(recall_score(grades, found, average="macro"))
    assert report.macro_precision == pytest.approx(np.mean(right))
    assert report.accuracy == pytest.approx(float((found == grades).float().mean()))
    assert report.one_off == pytest.approx(float(((found - grades).abs() <= 1).float().mean()))
    assert report.reference_recall == pytest.approx(float((found[grades == 3] != 0).float().mean()))
    one_hot = np.eye(4)[grades.numpy()]
    areas = average_precision_score(one_hot, grade_shares(logits).numpy(), average="macro")
    assert report.macro_auprc == pytest.approx(areas, abs=1e-6)


def test_measures_at_their_limits():
    grades = torch.tensor([0, 1, 2, 3])
    best = grade_report(grades, 20 * ordinal_targets(grades) - 10)
    assert (best.macro_recall, best.macro_precision, best.macro_auprc, best.one_off, best.reference_recall) == (1,) * 5
    worst = grade_report(grades, -torch.ones(4, 3))
    assert (worst.macro_recall, worst.macro_precision, worst.one_off, worst.reference_recall) == (0.25, 1 / 16, 0.5, 0)
    assert math.isnan(grade_report(grades[:3], torch.ones(3, 3)).reference_recall)
    assert grade_report(grades[:2], torch.tensor([[-1.0] * 3, [1.0, -1, -1]])).macro_recall == 1  # of two grades


def cloud(seed=0, count=60):
    """Four grades as directions, with noise."""
    draw = torch.Generator().manual_seed(seed)
    grades = torch.randint(4, (count,), generator=draw)
    middles = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    return middles[grades] + 0.8 * torch.randn(count, 12, generator=draw), grades


def test_the_embedder_brings_a_grade_together():
    x, grades = cloud()
    torch.manual_seed(0)
    embedder = contrastive_embedder(12, 16, 8).eval()
    same = (grades[:, None] == grades).fill_diagonal_(False)

    def gap():
        unit = torch.nn.functional.normalize(embedder(x), dim=-1).detach()
        cosines = unit @ unit.T
        return float(cosines[same].mean() - cosines[~same].mean())

    before = gap()
    losses = train_embedder(embedder, x, grades, epochs=40, batch=25, lr=1e-2)
    assert len(losses) == 40 and losses[-1] < losses[0] and gap() > before + 0.3
    assert not embedder.training


def test_what_is_left_over_of_a_pass_is_left_out():
    """With a batch of all but one node there is one step a pass: as many as there are passes."""
    seen = []

    class Counting(torch.nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    x, grades = cloud(count=9)
    train_embedder(Counting(12, 4), x, grades, epochs=3, batch=8)
    train_embedder(Counting(12, 4), x, grades, epochs=2, batch=None)
    assert seen == [8, 8, 8, 9, 9]


def test_a_network_learns_grades_that_it_was_not_told():
    x, grades = cloud(count=120)
    edges, train, rest = cosine_edges(x, 0.5), torch.arange(40), torch.arange(40, 120)
    torch.manual_seed(0)
    model = GraphGrader(12, hidden=16).eval()
    before = grade_report(grades[rest], model(x, edges)[rest].detach()).macro_recall
    hidden = grades.clone()
    hidden[rest] = 999  # would be refused if it were read
    losses = train_grader(model, x, edges, hidden, train, steps=120, lr=2e-2)
    after = grade_report(grades[rest], model(x, edges)[rest].detach()).macro_recall
    assert losses[-1] < 0.5 * losses[0] and after > 0.7 > before
    assert not model.training


def test_the_step_that_is_kept_is_the_best_of_the_held():
    """Told wrong grades, a network gets worse: what is kept is no worse on the held than any step that was seen."""
    x, grades = cloud(count=80)
    edges, train, held = cosine_edges(x, 0.5), torch.arange(40), torch.arange(40, 80)
    wrong = grades.clone()
    wrong[train] = 3 - wrong[train]
    seen = []

    class Watched(GraphGrader):
        def forward(self, x, edges):
            out = super().forward(x, edges)
            if not self.training:
                seen.append(grade_report(grades[held], out[held]).macro_recall)
            return out

    torch.manual_seed(1)
    model = Watched(12, hidden=16)
    train_grader(model, x, edges, wrong, train, held, steps=60, lr=2e-2)
    assert model.training and seen[-1] < max(seen)
    model.eval()
    with torch.no_grad():
        kept = grade_report(grades[held], GraphGrader.forward(model, x, edges)[held]).macro_recall
    assert kept == max(seen)


@pytest.mark.parametrize("kind", ["neighbours", "mlp", "pca"])
def test_baselines_tell_what_is_easy(kind):
    x, grades = cloud(count=160)
    found = baseline_grades(kind, x[:80], grades[:80], x[80:])
    assert found.dtype == grades.dtype and float((found == grades[80:]).float().mean()) > 0.7


def test_neighbours_are_by_angle():
    x = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 9.0]] * 3)
    found = baseline_grades("neighbours", x, torch.tensor([0] * 3 + [2] * 3), torch.tensor([[0.1, 0.2], [90.0, 10.0]]))
    assert found.tolist() == [2, 0]


def test_modes_come_back_after_an_exception():
    class Broken(torch.nn.Linear):
        def forward(self, *_):
            raise RuntimeError("broken")

    x, grades = cloud(count=8)
    model = Broken(12, 3).eval()
    for call in (
        lambda: train_embedder(model, x, grades, epochs=1, batch=None),
        lambda: train_grader(model, x, torch.zeros(2, 0, dtype=torch.long), grades, torch.arange(4), steps=1),
    ):
        with pytest.raises(RuntimeError, match="broken"):
            call()
        assert not model.training


def test_bad_input():
    x, grades = cloud(count=8)
    with pytest.raises(ValueError, match="grades must be from 0 to levels 2; they were from 0 to 3"):
        ordinal_targets(torch.tensor([0, 3]), 2)
    with pytest.raises(ValueError, match=r"grades must be \(N,\) and logits \(N, levels\)"):
        grade_report(grades, torch.ones(7, 3))
    with pytest.raises(ValueError, match="batch must be from 1 to the 8 nodes, or None; it was 9"):
        train_embedder(torch.nn.Linear(12, 2), x, grades, batch=9)
    with pytest.raises(ValueError, match="train and held"):
        train_grader(GraphGrader(12), x, cosine_edges(x, 0.5), grades, torch.arange(0))
    with pytest.raises(ValueError, match="kind must be one of neighbours, mlp, pca; it was 'oracle'"):
        baseline_grades("oracle", x, grades, x)
