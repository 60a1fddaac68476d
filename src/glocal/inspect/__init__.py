"""Reading a layer or a model: what reaches what, and how it can be used."""

from glocal.inspect.calls import HeadCall, layer_call, record_heads
from glocal.inspect.density import HeadDensity, attention_density
from glocal.inspect.distance import Locality, layer_localities, locality
from glocal.inspect.heads import head_reach, pwcca
from glocal.inspect.memory_beta import BetaFit, effective_beta, fit_beta, optimal_radius
from glocal.inspect.normalisers import dilution_bounds, normalise
from glocal.inspect.overlaps import ball_overlaps, cap_overlap
from glocal.inspect.rank import (
    LowRankHeads,
    MapRank,
    WeightedHeads,
    equally_spaced_heads,
    exact_heads,
    head_overlaps,
    head_targets,
    map_rank,
    random_heads,
    random_projection_heads,
    weigh_heads,
)
from glocal.inspect.selection import (
    HeadSelection,
    SelectionDistance,
    Sensitivity,
    critical_size,
    finite_sensitivity,
    gradient_sensitivity,
    selection_distance,
    selection_report,
    separability,
)
from glocal.inspect.sparse_memory import Settled, SparseMemory, hamming, neuron_read, settle
from glocal.inspect.uses import Verdict, layers, reach, uses, verify

__all__ = [
    "BetaFit",
    "HeadCall",
    "HeadDensity",
    "HeadSelection",
    "Locality",
    "LowRankHeads",
    "MapRank",
    "SelectionDistance",
    "Sensitivity",
    "Settled",
    "SparseMemory",
    "Verdict",
    "WeightedHeads",
    "attention_density",
    "ball_overlaps",
    "cap_overlap",
    "critical_size",
    "dilution_bounds",
    "effective_beta",
    "equally_spaced_heads",
    "exact_heads",
    "finite_sensitivity",
    "fit_beta",
    "gradient_sensitivity",
    "hamming",
    "head_overlaps",
    "head_reach",
    "head_targets",
    "layer_call",
    "layer_localities",
    "layers",
    "locality",
    "map_rank",
    "neuron_read",
    "normalise",
    "optimal_radius",
    "pwcca",
    "random_heads",
    "random_projection_heads",
    "reach",
    "record_heads",
    "selection_distance",
    "selection_report",
    "separability",
    "settle",
    "uses",
    "verify",
    "weigh_heads",
]
