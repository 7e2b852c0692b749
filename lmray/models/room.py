"""Whether workers fit on machines, before a cluster is asked for what it never has: cores and GPUs, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lmray.errors import CapacityError
from lmray.models.workers import Workers


class Place(Protocol):
    """A machine, or a node of a cluster, with all that it offers, used or not."""

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...


def room_for(places: Sequence[Place], *, cpus: float, gpus: float) -> int:
    """How many workers of that size fit, each whole on one place."""
    return sum(_fits(place, cpus, gpus) for place in places)


def check_room(places: Sequence[Place], *, workers: Workers, cpus: int | None, gpus: int) -> None:
    """Raises CapacityError where not even the fewest `workers`, with so many cores and GPUs each, can ever run side by
    side."""
    cores, all_gpus = sum(one.cpus for one in places), sum(one.gpus for one in places)
    there = f"{cores:g} cores and {all_gpus:g} GPUs on {len(places)} machine(s)"
    if gpus and not all_gpus:
        hint = "set `resources.gpus_per_worker=0` to use CPUs, or RAY_ADDRESS to the cluster with the GPUs"
        raise CapacityError(
            "resources.gpus_per_worker", f"{gpus} GPU(s) a worker, but there is none", allowed=there, hint=hint
        )
    room = room_for(places, cpus=cpus or 1, gpus=gpus)
    if room < workers.min:
        least, field = ("at least ", "resources.workers.min") if workers.elastic else ("", "resources.workers")
        wanted = f"{least}{workers.min} worker(s) with {cpus or 1} core(s) and {gpus} GPU(s) each"
        smaller = "lower `resources.cpus_per_worker`" + (" or `gpus_per_worker`" if gpus else "")
        hint = f"lower `{field}` to {room}" if room else smaller
        raise CapacityError("resources", f"{wanted} do not fit; there is room for {room}", allowed=there, hint=hint)


def _fits(place: Place, cpus: float, gpus: float) -> int:
    shares = [offered // wanted for offered, wanted in ((place.cpus, cpus), (place.gpus, gpus)) if wanted > 0]
    return int(min(shares, default=0))
