"""Pictures of a pruning: what every layer keeps while masks are searched, how near they come to the budget, and what
quality costs in size and time.

R and G are those of arXiv 2412.14426: the log ratio of what is kept and what was to be, and the norms of the LoRA
slices of what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lmray.metrics.plots import png_of, series, set_fonts

PANELS = {"groups": "key-value groups kept", "channels": "MLP channels kept"}
COLOURS = ("#1f4e8c", "#c8502d", "#3c8d5a", "#8a5fb0", "#b58a1b", "#4a4a4a", "#5aa7c7", "#c75a8a")
PANELS_ACROSS = 3
AXES = {
    "remaining": "share of prunable weights kept",
    "prefill_1_tokens_per_s": "prefill of one row, ms a token",
    "decode_1_tokens_per_s": "decode of one row, ms a token",
    "prefill_8_tokens_per_s": "prefill of eight rows, ms a token",
    "decode_8_tokens_per_s": "decode of eight rows, ms a token",
}
"""What quality is drawn against, with its axis; of rates, the time that a token takes."""


def freeze_step(masks: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step of the log of masks that tells them final; None while they are searched."""
    return next((one["step"] for one in masks if one["phase"] == "frozen"), None)


def plot_kept(masks: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of what every layer kept at each line of the log of `masks`: layers from the bottom up, steps to the
    right, one panel a kind of unit."""
    set_fonts()
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    figure.suptitle(title)
    frozen = freeze_step(masks)
    steps = [one["step"] for one in masks]
    for axis, (kind, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        by_layer = list(zip(*(one[kind] for one in masks), strict=True))
        drawn = axis.pcolormesh(_edges(steps), range(len(by_layer) + 1), by_layer, cmap="viridis", vmin=0)
        axis.set(title=label, xlabel="optimizer step")
        axis.set_yticks([layer + 0.5 for layer in _some(len(by_layer))], [str(one) for one in _some(len(by_layer))])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if frozen is not None:
            axis.axvline(frozen, color="white", linestyle="--", linewidth=1.5)
        bar = figure.colorbar(drawn, ax=axis)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("layer")
    return png_of(figure)


def plot_search(events: Sequence[Mapping[str, Any]], frozen: int | None) -> bytes | None:
    """A PNG of what is kept, R and G against the step, with the step from which masks are final; None where no event
    tells of a pruning."""
    curves = {
        "kept": series(events, "prune.remaining"),
        "R, distance to the budget": series(events, "prune.budget_loss"),
        "G, norms of what is removed": series(events, "prune.removed_norm"),
    }
    if not any(steps for steps, _ in curves.values()):
        return None
    set_fonts()
    figure = Figure(figsize=(9.2, 2.6), layout="constrained")
    for axis, (label, (steps, values)) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axis.plot(steps, values, color=COLOURS[0], linewidth=1.6)
        if frozen is not None:
            axis.axvline(frozen, color=COLOURS[1], linestyle="--", linewidth=1.2, label=f"final from step {frozen}")
        axis.set_title(label, fontsize=10, loc="left")
        axis.set(ylim=(0, None), xlabel="optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if frozen is not None:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return png_of(figure)


def pareto(rows: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of held-out loss against size, and against time where it was measured. A row has `method`, `remaining`,
    `loss`, and may have any other of AXES. Filled points are those that no other row beats in both, with a line through
    them."""
    set_fonts()
    shown = [name for name in AXES if any(name in row for row in rows)]
    across, down = min(PANELS_ACROSS, len(shown)), -(-len(shown) // PANELS_ACROSS)
    figure = Figure(figsize=(1.2 + 4.2 * across, 0.6 + 3.6 * down), layout="constrained")
    figure.suptitle(title)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for unused in axes[len(shown) :]:
        unused.remove()
    for axis, name in zip(axes, shown, strict=False):
        points = [(_place(row, name), row["loss"], row["method"]) for row in rows if name in row]
        best = front([(x, y) for x, y, _ in points])
        axis.plot(*zip(*best, strict=True), color="#9aa4b0", linestyle="--", linewidth=1.2, zorder=1)
        for number, method in enumerate(methods):
            colour = COLOURS[number % len(COLOURS)]
            for x, y in ((x, y) for x, y, its in points if its == method):
                filled = colour if (x, y) in best else "white"
                axis.plot(x, y, "o", color=colour, markerfacecolor=filled, markersize=7)
            axis.plot([], [], "o", color=colour, label=method)
        axis.set_xlabel(AXES[name])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("held-out loss, nats/token")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(methods), PANELS_ACROSS * across)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return png_of(figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of `points` than which no other is as low in both and lower in one, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _place(row: Mapping[str, Any], name: str) -> float:
    return 1000.0 / row[name] if name.endswith("_per_s") else row[name]


def _edges(steps: Sequence[int]) -> list[float]:
    """A cell a step, from it to the next; the last one is as wide as that before it."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return [*steps, steps[-1] + last]


def _some(layers: int) -> range:
    """Layers that are labelled, at most about ten."""
    return range(0, layers, max(1, -(-layers // 10)))
