"""Which requests wait for their adapters, where: what those who send requests tell the router in the same process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

COUNTS: Counter[str] = Counter()
"""Replica -> requests there that wait for their adapters."""


@dataclass(frozen=True)
class WaitsForAdapter:
    """What a replica says first of a request whose adapter it has yet to load: until that request's first token, its
    row is another's."""

    replica: str


def waits(replica: str) -> None:
    """A request has begun to wait on `replica`."""
    COUNTS[replica] += 1


def waits_no_more(replica: str | None) -> None:
    """Of a request that waited on `replica`, if on any."""
    if replica is not None:
        COUNTS[replica] -= 1
        if COUNTS[replica] <= 0:  # replicas come and go
            del COUNTS[replica]
