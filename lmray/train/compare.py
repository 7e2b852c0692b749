"""Two or more runs beside each other: what differs between their jobs, their metrics, curves and answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lmray.artifacts.files import write_atomic
from lmray.evaluate.answers import Answer
from lmray.evaluate.page import answer_block
from lmray.metrics.names import METRICS, metric
from lmray.metrics.page import Cell, heading, number, page, paragraph, picture, table
from lmray.metrics.plots import Curve, plot_comparison, series
from lmray.train.record import Record
from lmray.train.report import MAX_ANSWERS, shown

NOT_COMPARED = ("name", "storage")


@dataclass(frozen=True)
class Comparison:
    """Two or more runs, in the order they were named."""

    runs: Sequence[Record]

    @cached_property
    def labels(self) -> list[str]:
        """What each run is called: its name, or its folder where two have one name."""
        times = Counter(run.name for run in self.runs)
        return [run.name if times[run.name] == 1 else str(run.folder) for run in self.runs]

    @cached_property
    def differences(self) -> dict[str, list[Any]]:
        """Dotted keys whose values are not the same in all jobs, each with its value in every run; digests too."""
        trees = [_facts(run) for run in self.runs]
        keys = list(dict.fromkeys(key for tree in trees for key in tree))
        values = {key: [tree.get(key) for tree in trees] for key in keys}
        return {key: given for key, given in values.items() if any(one != given[0] for one in given)}

    @cached_property
    def metrics(self) -> dict[str, list[float | None]]:
        """Every metric that a run has, with its value in each; None where it has none."""
        names = {name for run in self.runs for name in run.metrics}
        order = [*METRICS, *sorted(names - METRICS.keys())]
        return {name: [run.metrics.get(name) for run in self.runs] for name in order if name in names}

    def best(self, name: str) -> frozenset[int]:
        """Places of the runs whose value of metric `name` is best; none where no value is better than another."""
        better, values = metric(name).better, [value for value in self.metrics[name] if value is not None]
        if not better or len(set(values)) < 2 or name.startswith("base."):
            return frozenset()
        wanted = min(values) if better == "min" else max(values)
        return frozenset(place for place, value in enumerate(self.metrics[name]) if value == wanted)

    def to_json(self) -> dict[str, Any]:
        runs = [
            {"label": label, "run": str(run.folder), "status": run.status, "step": run.step, "metrics": {**run.metrics}}
            for label, run in zip(self.labels, self.runs, strict=True)
        ]
        best = {name: [self.labels[place] for place in sorted(self.best(name))] for name in self.metrics}
        return {
            "runs": runs,
            "differences": self.differences,
            "best": {name: labels for name, labels in best.items() if labels},
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The metrics as text, the best marked with `*`."""
        return [(name, *(_value(name, value) + mark for value, mark in self.marked(name))) for name in self.metrics]

    def difference_rows(self) -> list[tuple[str, ...]]:
        """The differences as text."""
        return [(key, *map(_plain, values)) for key, values in self.differences.items()]

    def marked(self, name: str) -> list[tuple[float | None, str]]:
        """Metric `name` in each run, with a mark where it is best."""
        best = self.best(name)
        return [(value, " *" if place in best else "") for place, value in enumerate(self.metrics[name])]

    def answers(self) -> list[tuple[Answer, list[Answer]]]:
        """Questions that every run answered, each with what the runs' own models said."""
        said = [{(one.prompt, one.expected): one for one in run.answers.get("tuned", ())} for run in self.runs]
        asked = [key for key in said[0] if all(key in one for one in said)]
        return [(said[0][key], [one[key] for one in said]) for key in asked]


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the page that shows `comparison`: one self-contained HTML file."""
    labels = comparison.labels
    title = " | ".join(labels)
    marked = [
        (
            Cell(name, title=metric(name).help),
            *(number(_value(name, value), "good" if mark else "") for value, mark in comparison.marked(name)),
        )
        for name in comparison.metrics
    ]
    differing = [(key, *cells) for key, *cells in comparison.difference_rows()]
    body = [
        heading(title, 1),
        paragraph(
            "; ".join(f"{label}: {run.status}" for label, run in zip(labels, comparison.runs, strict=True)), "quiet"
        ),
        heading("What differs"),
        table(differing, ("", *labels)) if differing else paragraph("Nothing: the jobs are the same."),
        heading("Metrics"),
        paragraph("The best of each is green.", "quiet"),
        table(marked, ("", *map(number, labels))),
        heading("Curves"),
        *_curves(comparison),
        *_answers(comparison),
    ]
    write_atomic(path, page(title, body))


def _curves(comparison: Comparison) -> Iterator[str]:
    curves = [Curve(label, run.events) for label, run in zip(comparison.labels, comparison.runs, strict=True)]
    for name, words in (("train.loss", "training loss, smoothed"), ("eval.loss", "held-out loss")):
        held = [curve for curve in curves if series(curve.events, name)[0]]
        if held:
            yield picture(plot_comparison(held, name, by="step", title=f"{words}, by step"), f"{words} by step")
            yield picture(plot_comparison(held, name, by="tokens", title=f"{words}, by token"), f"{words} by token")


def _answers(comparison: Comparison) -> Iterator[str]:
    answered = comparison.answers()
    if not answered:
        return
    yield heading("Answers")
    for asked, given in answered[:MAX_ANSWERS]:
        yield answer_block(asked, zip(comparison.labels, given, strict=True))


def _value(name: str, value: float | None) -> str:
    return "-" if value is None else shown(name, value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(run: Record) -> dict[str, Any]:
    """The job by dotted key, and the digests of model and data: the same job on changed data is another run."""
    tree = {key: value for key, value in yaml.safe_load(run.job).items() if key not in NOT_COMPARED}
    digests = {f"{part} digest": facts["digest"][:12] for part, facts in _digested(run).items()}
    return _dotted(tree) | digests


def _digested(run: Record) -> dict[str, Mapping[str, Any]]:
    return {"model": run.plan.model, "data": run.plan.data}


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key, as overrides name them."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, value in items for name, leaf in _dotted(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}
