"""`sweep.png`: the objective against each searched key. Trials stopped early are hollow, the best has a ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmray.config.search import Space
from lmray.job import SweepJob
from lmray.metrics.plots import set_fonts
from lmray.sweep.program import Trial, objective_of, shown

BLUE, RED = "#1f4e8c", "#b03a2e"
MAX_COLUMNS = 3


def plot_sweep(path: Path, sweep: SweepJob, trials: Sequence[Trial]) -> None:
    """Writes the picture of `trials` (ranked; those without an objective are left out)."""
    set_fonts()
    measured = [trial for trial in trials if trial.objective is not None]
    columns = min(MAX_COLUMNS, len(sweep.space))
    lines = math.ceil(len(sweep.space) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axis, (key, space) in zip(axes, sweep.space.items(), strict=False):
        _plot_key(axis, key, space, measured)
    for axis in axes[len(sweep.space) :]:
        axis.set_visible(False)
    metric, mode = objective_of(sweep)
    for axis in axes[::columns]:
        axis.set_ylabel(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)")
    figure.suptitle(f"{sweep.name}: {len(trials)} trials", fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _plot_key(axis: Axes, key: str, space: Space, trials: Sequence[Trial]) -> None:
    choices = [shown(value) for value in space.choice or ()]
    axis.set_xlabel(key)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if choices:
        axis.set_xticks(range(len(choices)), choices)
        axis.set_xlim(-0.5, len(choices) - 0.5)
    elif space.loguniform:
        axis.set_xscale("log")
    for state, face, label in (("finished", BLUE, "finished"), ("stopped", "none", "stopped early")):
        points = [(_place(trial, key, choices), trial.objective) for trial in trials if trial.state == state]
        if points:
            axis.scatter(
                *zip(*points, strict=True),
                s=42,
                facecolors=face,
                edgecolors=BLUE,
                linewidths=1.2,
                label=label,
                zorder=3,
            )
    if trials and trials[0].state == "finished":
        x, y = _place(trials[0], key, choices), float(trials[0].objective or 0.0)
        axis.scatter(x, y, s=170, facecolors="none", edgecolors=RED, linewidths=1.8, label="best", zorder=4)


def _place(trial: Trial, key: str, choices: Sequence[str]) -> float:
    value = trial.values[key]
    return choices.index(shown(value)) if choices else float(value)
