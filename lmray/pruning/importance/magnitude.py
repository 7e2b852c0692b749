"""A unit is worth the squared norm of its weights. Needs no data.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626; summed over coupled
weights as in Ma et al., "LLM-Pruner", arXiv 2305.11627, section 3.2.
"""

from __future__ import annotations

from typing import Any

from lmray.pruning.importance.base import Rows, Scores, relative, unit_scores
from lmray.pruning.structure import Structure


def magnitude(model: Any, structure: Structure, rows: Rows = ()) -> Scores:
    """Scores of all units of `model`, relative to their layer and kind."""
    return relative(unit_scores(model, structure, lambda linear, part: linear.weight.detach().double() ** 2), structure)
