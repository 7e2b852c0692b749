"""A method that prunes tiny models; and what a run that prunes leaves behind, made up: its log of masks, its events."""

from __future__ import annotations

import math
import random
from typing import Any

TINY_ATP: dict[str, Any] = {
    "name": "atp",
    "remaining": 0.6,
    "multiple_of": 8,
    "search_fraction": 0.25,
    "gate": "gumbel",  # the harder to go on with: noise of a step is to be the same again
    "generator_learning_rate": 0.03,
}


def made_up_masks(*, layers: int, steps: int, every: int, frozen: int) -> list[dict[str, Any]]:
    """A line each `every` steps up to `steps`: layers in the middle lose more, until masks are final from step
    `frozen` on."""
    draw = random.Random(0)
    lines = []
    for step in range(0, steps + 1, every):
        done = min(step / max(frozen, 1), 1.0)
        lost = [done * (0.2 + 0.5 * math.sin(math.pi * (layer + 0.5) / layers)) for layer in range(layers)]
        noise = 0.0 if step >= frozen else 0.05
        kept = [max(0.1, 1 - one + noise * (draw.random() - 0.5)) for one in lost]
        lines.append(
            {
                "step": step,
                "remaining": sum(kept) / layers,
                "groups": [max(1, round(4 * one)) for one in kept],
                "channels": [64 * max(1, round(24 * one)) for one in kept],
                "phase": "frozen" if step >= frozen else "search",
            }
        )
    return lines


def made_up_events(*, steps: int, frozen: int) -> list[dict[str, Any]]:
    """An event a step: what is kept falls to 0.6, R with it; G rises, falls, and is zero once masks are final."""
    events = []
    for step in range(1, steps + 1):
        done = min(step / frozen, 1.0)
        kept = 1 - 0.4 * done
        removed = 0.0 if step >= frozen else 8 * done * (1.1 - done)
        facts = {"prune.remaining": kept, "prune.budget_loss": math.log(kept / 0.6), "prune.removed_norm": removed}
        events.append({"step": step, "train.loss": 2 + math.exp(-step / 10), **facts})
    return events
