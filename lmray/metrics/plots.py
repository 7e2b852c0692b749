"""Pictures of a run. Matplotlib without a window; Japanese through the font that `matplotlib-fontja` ships, other
scripts where the machine has a font for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FONTS = ("DejaVu Sans", "IPAexGothic", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS", "Hiragino Sans")
"""Asked in this order for each character."""


@cache
def set_fonts() -> None:
    """Lets matplotlib fall back to whatever of FONTS there is."""
    font_manager.fontManager.addfont(str(files("matplotlib_fontja") / "fonts" / "ipaexg.ttf"))
    there = {font.name for font in font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in FONTS if name in there]


@dataclass(frozen=True)
class Curve:
    """One run's line in a picture."""

    label: str
    events: Sequence[Mapping[str, Any]]


SMALL = {
    "train.learning_rate": "learning rate",
    "train.grad_norm": "gradient norm",
    "train.tokens_per_s": "tokens/s",
    "train.peak_memory_bytes": "peak memory, MiB",
    "train.peak_gpu_memory_bytes": "peak GPU memory, MiB",
}
"""Metrics that a report shows beside the loss, with their axis."""


def plot_losses(events: Sequence[Mapping[str, Any]], path: Path, *, title: str, base_loss: float | None = None) -> None:
    """Training loss of each step and smoothed, and held-out loss where it was taken, against the step."""
    figure, axis = _figure((6.6, 3.8))
    steps, losses = series(events, "train.loss")
    axis.plot(steps, losses, color="#9bb8d9", linewidth=1, label="train, each step")
    axis.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="train, smoothed")
    held_out = series(events, "eval.loss")
    if held_out[0]:
        axis.plot(*held_out, "o-", color="#c8502d", label="held out")
    if base_loss is not None:
        axis.axhline(base_loss, color="#7a7a7a", linestyle=":", label="held out, untouched model")
    axis.set(ylabel="loss, nats/token", xlabel="optimizer step", title=title)
    if steps:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=140)


def plot_metric(events: Sequence[Mapping[str, Any]], name: str) -> bytes | None:
    """A small PNG of one metric of SMALL against the step; None where no event holds it."""
    steps, values = series(events, name)
    if not steps:
        return None
    figure, axis = _figure((4.6, 2.3))
    scale = 2**20 if name.endswith("_bytes") else 1
    axis.plot(steps, [value / scale for value in values], color="#1f4e8c", linewidth=1.5)
    if name in ("train.tokens_per_s", "train.peak_memory_bytes", "train.peak_gpu_memory_bytes"):
        axis.set_ylim(0, 1.1 * max(values) / scale or 1)
    axis.set_title(SMALL[name], fontsize=10, loc="left")
    return png_of(figure)


def plot_lengths(edges: Sequence[int], counts: Sequence[int]) -> bytes:
    """A histogram PNG: `counts[i]` examples have a length from `edges[i]` up to `edges[i + 1]` tokens."""
    figure, axis = _figure((4.6, 2.3))
    widths = [right - left for left, right in pairwise(edges)]
    axis.bar(edges[:-1], counts, width=widths, align="edge", color="#1f4e8c", edgecolor="white", linewidth=0.5)
    axis.set_title("examples by length in tokens", fontsize=10, loc="left")
    return png_of(figure)


def plot_comparison(curves: Sequence[Curve], name: str, *, by: str, title: str) -> bytes:
    """Metric `name` of several runs over each other in one PNG, against the `step` or the `tokens` trained on."""
    figure, axis = _figure((6.6, 3.4))
    for index, curve in enumerate(curves):
        steps, values = series(curve.events, name)
        if name == "train.loss":
            values = smoothed(values)
        places = tokens_at(curve.events, steps) if by == "tokens" else steps
        style = "o-" if name == "eval.loss" else "-"
        axis.plot(places, values, style, color=f"C{index}", linewidth=1.8, markersize=4, label=curve.label)
    axis.set(title=title, xlabel="tokens trained on" if by == "tokens" else "optimizer step", ylabel="loss, nats/token")
    axis.legend(frameon=False)
    return png_of(figure)


def series(events: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the events that hold metric `name`."""
    held = [event for event in events if name in event]
    return [event["step"] for event in held], [event[name] for event in held]


def tokens_at(events: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[float]:
    """Tokens trained on up to each of `steps`."""
    totals, total = {}, 0.0
    for event in events:
        total += event.get("train.tokens", 0.0)
        totals[event["step"]] = total
    return [totals[step] for step in steps]


def png_of(figure: Figure) -> bytes:
    """The figure's PNG."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    set_fonts()
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure, axis


def smoothed(values: Sequence[float], share: float = 0.85) -> list[float]:
    """Exponential mean with start-up correction: the first value is itself."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        result.append(mean / weight)
    return result
