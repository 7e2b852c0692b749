"""Which of ever more names are used most, so that what is told of each by name stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
FORGET_EVERY = 10_000
"""Uses after which all counts are halved: what was used long ago counts less, and names used no more are forgotten."""
LEAD = 2
"""A name takes another's place once it was used so many times as often; names used alike do not take turns."""


class MostUsed(Generic[T]):
    """At most `limit` names at a time. `dropped` is told of each that others took the place of."""

    def __init__(self, limit: int, dropped: Callable[[T], None]):
        self._limit, self._dropped = limit, dropped
        self._uses: dict[T, int] = {}
        self._top: dict[T, None] = {}  # in the order they came: ties fall alike every time
        self._num_uses = 0

    def __contains__(self, name: T) -> bool:
        """Whether `name` is one of the most used now."""
        return name in self._top

    def use(self, name: T) -> bool:
        """Counts a use of `name`; whether it is one of the most used now."""
        self._num_uses += 1
        if self._num_uses % FORGET_EVERY == 0:
            self._uses = {one: count // 2 for one, count in self._uses.items() if count > 1 or one in self._top}
        self._uses[name] = self._uses.get(name, 0) + 1
        if name in self._top:
            return True
        if len(self._top) >= self._limit:
            least = min(self._top, key=self._uses.__getitem__)
            if self._uses[name] <= LEAD * self._uses[least]:
                return False
            del self._top[least]
            self._dropped(least)
        self._top[name] = None
        return True
