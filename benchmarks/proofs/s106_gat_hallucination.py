"""Do neighbours in embedding space, and a contrastive embedding, tell grades that few nodes were told?

    python benchmarks/proofs/s106_gat_hallucination.py [--seeds 3]

700 digits of scikit-learn stand for sentences, in four ordinal grades (0 to 2, 3 and 4, 5 to 7, 8 and 9). Edges where
the cosine of pixels is at least 0.92; 60 nodes are told, the last 500 of a random order are asked. With the graph and
without (each node sees itself only), on pixels and on a contrastive embedding of them. Nonkes et al., 2024, arXiv
2407.04485.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from glocal.inspect import baseline_grades, grade_report, train_embedder, train_grader
from glocal.models.graph.hallucination import GraphGrader, contrastive_embedder
from glocal.nn import cosine_edges
from glocal.papers.verdict import verdict

NODES, TOLD, ASKED, THRESHOLD = 700, 60, 500, 0.92
WAYS = ("graph, embedding", "graph, pixels", "alone, pixels", "alone, embedding")


def measured(x: Tensor, grades: Tensor, seed: int) -> dict[str, float]:
    """Macro recall of each way on the nodes asked."""
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(seed))
    told, asked = order[:TOLD], order[-ASKED:]
    edges = cosine_edges(x, THRESHOLD)
    torch.manual_seed(seed)
    embedder = contrastive_embedder(64, 64, 32)
    train_embedder(embedder, x[told], grades[told], epochs=150, batch=None, lr=1e-3, seed=seed)
    found = {}
    for way in WAYS:
        torch.manual_seed(seed)
        embedded = way.endswith("embedding")
        model = GraphGrader(32 if embedded else 64, copy.deepcopy(embedder) if embedded else None)
        seen = edges if way.startswith("graph") else edges[:, :0]
        train_grader(model, x, seen, grades, told, steps=80, lr=5e-3)
        with torch.no_grad():
            found[way] = grade_report(grades[asked], model.eval()(x, seen)[asked]).macro_recall
    nearest = baseline_grades("neighbours", x[told], grades[told], x[asked])
    found["five nearest, pixels"] = sum(float((nearest[grades[asked] == k] == k).float().mean()) / 4 for k in range(4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits()
    x = torch.from_numpy(data.data[:NODES]).float() / 16
    grades = torch.from_numpy(data.target[:NODES]) * 4 // 10
    edges = cosine_edges(x, THRESHOLD)
    alike = float((grades[edges[0]] == grades[edges[1]]).float().mean())
    print(
        f"{NODES} nodes, {edges.shape[1]} edges, {alike:.0%} of them between nodes of one grade; macro recall of grades"
    )
    names = (*WAYS, "five nearest, pixels")
    print(f"{'seed':<6}" + "".join(f"{name:>22}" for name in names))
    rows = []
    for seed in range(arguments.seeds):
        rows.append(measured(x, grades, seed))
        print(f"{seed:<6}" + "".join(f"{rows[-1][name]:>22.3f}" for name in names), flush=True)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    print(f"{'mean':<6}" + "".join(f"{mean[name]:>22.3f}" for name in names))
    both, graph, alone, embedding = (mean[way] for way in WAYS)
    verdict(
        "gat-hallucination",
        f"macro recall of four grades with 60 of 700 nodes told: graph and contrastive embedding {both:.3f}, graph on "
        f"pixels {graph:.3f}, each node alone on pixels {alone:.3f}, alone on the embedding {embedding:.3f}; five "
        f"nearest {mean['five nearest, pixels']:.3f}",
        both - graph >= 0.03 and graph - alone >= 0.03 and both > embedding,
    )


if __name__ == "__main__":
    main()
