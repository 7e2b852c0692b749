"""Pictures of a run. Matplotlib without a window; Japanese through the font that `matplotlib-fontja` ships, other
scripts where the machine has a font for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

FONTS = ("DejaVu Sans", "IPAexGothic", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS", "Hiragino Sans")
"""Asked in this order for each character."""


@cache
def set_fonts() -> None:
    """Lets matplotlib fall back to whatever of FONTS there is."""
    font_manager.fontManager.addfont(str(files("matplotlib_fontja") / "fonts" / "ipaexg.ttf"))
    there = {font.name for font in font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.family"] = [name for name in FONTS if name in there]


def plot_losses(events: Sequence[Mapping[str, Any]], path: Path, *, title: str, base_loss: float | None = None) -> None:
    """Training loss, held-out loss where it was taken, and the learning rate below, against the step."""
    set_fonts()
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    loss_axis, rate_axis = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [event["step"] for event in events]
    losses = [event["train.loss"] for event in events]
    loss_axis.plot(steps, losses, color="#9bb8d9", linewidth=1, label="train, each step")
    loss_axis.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="train, smoothed")
    held_out = [(event["step"], event["eval.loss"]) for event in events if "eval.loss" in event]
    if held_out:
        loss_axis.plot(*zip(*held_out, strict=True), "o-", color="#c8502d", label="held out")
    if base_loss is not None:
        loss_axis.axhline(base_loss, color="#7a7a7a", linestyle=":", label="held out, untouched model")
    loss_axis.set_ylabel("loss, nats/token")
    loss_axis.set_title(title)
    loss_axis.grid(alpha=0.25)
    loss_axis.legend(frameon=False)
    rate_axis.plot(steps, [event["train.learning_rate"] for event in events], color="#4c7a3d")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_xlabel("optimizer step")
    rate_axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def smoothed(values: Sequence[float], share: float = 0.85) -> list[float]:
    """Exponential mean with start-up correction: the first value is itself."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        result.append(mean / weight)
    return result
