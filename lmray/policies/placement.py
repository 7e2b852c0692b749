"""Which replica a request goes to, so that an adapter is loaded on few of them and a hot one on as many as it needs,
and what prompts have in common is read once.

Rendezvous hashing (Thaler, Ravishankar 1998) gives each key an order of all replicas that hardly changes when one
comes or goes; bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018) skip those that have much more to do than others.
Standard library only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

SLACK = 1.25
"""How much more than the mean a replica may have to do before requests go on to the next."""
PREFIX = 64
"""Tokens by which prompts to the base model are told apart: what is longer is shared where they agree in these."""


def key_of(adapter: str | None, prompt_ids: Sequence[int], salt: str) -> str:
    """What requests share that should meet: their adapter, which holds what was read of their prompts, too; of the base
    model the beginning of their prompts, where `salt` lets them share it."""
    if adapter is not None:
        return adapter
    return f"\n{salt}\n{' '.join(map(str, prompt_ids[:PREFIX]))}"  # no name of an adapter has line breaks


def ranked(key: str, loads: Mapping[str, int], *, slack: float = SLACK, light: int = 1) -> list[str]:
    """Replicas to try for `key`, one after another. `loads`: replica -> requests it has now.

    First those whose load stays within `slack` times the mean with this request, in the order of `key`; then the
    others, the least loaded first. Below `light` requests a replica is never passed over: to batch a few requests
    costs less than to load their adapter elsewhere.
    """
    bound = max(light, math.ceil(slack * (sum(loads.values()) + 1) / max(len(loads), 1)))
    order = sorted(loads, key=lambda replica: _weight(key, replica), reverse=True)
    within = [replica for replica in order if loads[replica] < bound]
    beyond = sorted((replica for replica in order if loads[replica] >= bound), key=lambda replica: loads[replica])
    return within + beyond


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()
