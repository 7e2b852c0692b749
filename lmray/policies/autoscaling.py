"""How many replicas there are, and how fast they come and go: three presets, each with what it costs.

A policy looks at what waits: prompt tokens that no replica has read yet against how fast replicas read them, requests
against rows of a batch, and the time to the first token against its target. Ray Serve then holds its answer within the
job's bounds, and waits `upscale_delay_s` or `downscale_delay_s` for it to stay the same. Measured with Ray's own policy
from the start of overload to the first extra replica: 35 s with its defaults, 7 s with delay 0 and look-back 2 s,
besides the time a replica takes to load its model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REPORT_S = 1.0
"""Replicas and gateways tell Ray Serve what they have to do this often; its own default is 10 s."""
SPARE_S = 10.0
"""Beyond the longest answer: until a replica knows that it is to go, and what it has said is on its way."""


@dataclass(frozen=True)
class Preset:
    """Numbers behind one word."""

    load_fraction: float
    """Share of a replica's batch that is in use when another is asked for."""
    first_token_s: float
    """Target: a request should have its first token after so long."""
    upscale_delay_s: float
    downscale_delay_s: float
    look_back_period_s: float


PRESETS = {
    "cheap": Preset(1.0, first_token_s=10.0, upscale_delay_s=30.0, downscale_delay_s=120.0, look_back_period_s=30.0),
    "balanced": Preset(0.75, first_token_s=2.0, upscale_delay_s=5.0, downscale_delay_s=300.0, look_back_period_s=5.0),
    "fast": Preset(0.5, first_token_s=0.5, upscale_delay_s=0.0, downscale_delay_s=600.0, look_back_period_s=2.0),
}


@dataclass(frozen=True)
class Demand:
    """What all replicas have to do, and how they fare."""

    replicas: int
    requests: float
    """Running and waiting, those that wait for a replica too."""
    waiting_tokens: float = 0.0
    """Of prompts that are not read yet."""
    tokens_per_s: float = 0.0
    """Prompt tokens that one busy replica reads; 0 while that is not known."""
    first_token_s: float = 0.0
    """How long requests lately waited for it, on the replica where they wait longest."""


def replicas_for(demand: Demand, preset: Preset, *, max_batch_size: int) -> int:
    """How many replicas would meet `demand`; none where there is nothing to do, and no more than there are requests:
    one prompt is read by one replica."""
    if demand.requests <= 0:
        return 0
    by_rows = demand.requests / (preset.load_fraction * max_batch_size)
    by_tokens = 0.0
    if demand.tokens_per_s > 0:
        by_tokens = demand.waiting_tokens / (demand.tokens_per_s * preset.first_token_s)
    wanted = max(1, math.ceil(by_rows), math.ceil(by_tokens))
    late = demand.first_token_s > preset.first_token_s and demand.waiting_tokens > 0
    return min(max(wanted, demand.replicas + 1) if late else wanted, math.ceil(demand.requests))


class TokenPolicy:
    """`replicas_for` as Ray Serve calls it. Its replicas report `requests`, `waiting_tokens`, `tokens_per_s`,
    `tokens_per_request` and `first_token_s`."""

    def __init__(self, preset: str, max_batch_size: int):
        self._preset, self._max_batch_size = PRESETS[preset], max_batch_size

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        demand = demand_of(
            context.aggregated_metrics or {},
            replicas=context.current_num_replicas,
            requests=context.total_num_requests,
            unassigned=context.total_queued_requests or 0.0,
        )
        return replicas_for(demand, self._preset, max_batch_size=self._max_batch_size), {}


def demand_of(
    reported: Mapping[str, Mapping[Any, float]], *, replicas: int, requests: float, unassigned: float
) -> Demand:
    """`reported`: metric -> replica -> value. `unassigned` requests wait for a replica; each counts with as many tokens
    as requests had lately. `requests`, which has looks at a replica in it as well, counts until a replica reports."""

    def values(name: str) -> list[float]:
        return [value for value in reported.get(name, {}).values() if value > 0]

    speeds, sizes = values("tokens_per_s"), values("tokens_per_request")
    size = sum(sizes) / len(sizes) if sizes else 0.0
    return Demand(
        replicas=replicas,
        requests=unassigned + sum(values("requests")) if "requests" in reported else requests,
        waiting_tokens=sum(values("waiting_tokens")) + unassigned * size,
        tokens_per_s=sum(speeds) / len(speeds) if speeds else 0.0,
        first_token_s=max(values("first_token_s"), default=0.0),
    )


def autoscaling_arguments(preset: str, *, min_replicas: int, max_replicas: int) -> dict[str, Any]:
    """Keyword arguments of Ray Serve's `AutoscalingConfig` besides its policy. An endpoint that may have no replica
    starts with one all the same, so that what keeps it from starting shows at once.

    Raises KeyError for a preset that is not in PRESETS; a job's decoding refuses it before.
    """
    chosen = PRESETS[preset]
    return {
        "min_replicas": min_replicas,
        "initial_replicas": max(min_replicas, 1),
        "max_replicas": max_replicas,
        "upscale_delay_s": chosen.upscale_delay_s,
        "downscale_delay_s": chosen.downscale_delay_s,
        "look_back_period_s": chosen.look_back_period_s,
        "metrics_interval_s": REPORT_S,
    }


def shutdown_s(answer_timeout_s: float) -> float:
    """How long a replica that is to go may take for the answers it has begun: none takes longer than
    `answer_timeout_s`."""
    return answer_timeout_s + SPARE_S
