"""How far differences between targets can be trusted: the paired bootstrap over examples.

Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile intervals); paired as in Koehn 2004,
Statistical Significance Tests for Machine Translation Evaluation. All targets are measured on the same examples, so a
resample draws the same examples for all, and each task makes its metrics afresh from what was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmray.tasks.base import Scored, Task

NUM_RESAMPLES = 1000
LEVEL = 0.95
Evidence = Sequence[tuple[Task, Sequence[Scored]]]
"""A target's tasks with what they made of each example; see `lmray.evaluate.measure.Measured`."""


@dataclass(frozen=True)
class Delta:
    """A metric's difference to the reference, with its 95 % interval. Without zero in it, the difference is no chance
    of these examples."""

    delta: float
    low: float
    high: float
    num_examples: int


def reference_label(labels: Sequence[str]) -> str:
    """The target that others are compared with: `base`, where there is one, else the first."""
    return "base" if "base" in labels else labels[0]


def deltas(
    targets: Mapping[str, Evidence], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Delta]]:
    """`{label: {eval.NAME: Delta}}` of every target but the reference. All targets hold the same tasks on the same
    examples; equal seeds give equal intervals."""
    if len(targets) < 2:
        return {}
    reference = reference_label([*targets])
    others = [label for label in targets if label != reference]
    found: dict[str, dict[str, Delta]] = {label: {} for label in others}
    for place, (task, scored) in enumerate(targets[reference]):
        evidence = {label: (target[place][1]) for label, target in targets.items()}
        drawn = _resampled(task, evidence, np.random.default_rng(seed), num_resamples)
        observed = {label: task.aggregate(one) for label, one in evidence.items()}
        for label in others:
            for name in observed[label].keys() & observed[reference].keys():
                differences = drawn[label][name] - drawn[reference][name]
                low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
                delta = observed[label][name] - observed[reference][name]
                found[label][f"eval.{name}"] = Delta(float(delta), float(low), float(high), len(scored))
    return {label: dict(sorted(one.items())) for label, one in found.items()}


def deltas_json(targets: Mapping[str, Evidence]) -> dict[str, dict[str, dict[str, Any]]]:
    """`deltas` as a result's `details` hold them."""
    if not targets:
        return {}
    return {label: {name: asdict(one) for name, one in found.items()} for label, found in deltas(targets).items()}


def _resampled(
    task: Task, evidence: Mapping[str, Sequence[Scored]], generator: np.random.Generator, num_resamples: int
) -> dict[str, dict[str, np.ndarray]]:
    """Each target's metrics over the resamples, float64, the same examples drawn for all."""
    values: dict[str, dict[str, list[float]]] = {label: {} for label in evidence}
    (count,) = {len(scored) for scored in evidence.values()}
    for _ in range(num_resamples):
        chosen = generator.integers(0, count, count).tolist()
        for label, scored in evidence.items():
            for name, value in task.aggregate([scored[index] for index in chosen]).items():
                values[label].setdefault(name, []).append(value)
    return {label: {name: np.array(drawn) for name, drawn in one.items()} for label, one in values.items()}
