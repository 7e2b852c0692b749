"""Adapters that every replica of an endpoint keeps loaded by an operator's wish: a list in the store, so that it holds
for replicas that start later and for the endpoint's next life."""

from __future__ import annotations

import json

from lmray.artifacts.store import Store
from lmray.errors import ArtifactError


class Pins:
    """Names of artifacts that are pinned at one endpoint."""

    def __init__(self, store: Store, endpoint: str):
        self._store, self._key = store, f"endpoints/{endpoint}/pins.json"
        self._stamp: object = None
        self._names: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Sorted; read again where somebody changed them. Raises ArtifactError for a file that is no list of names."""
        if (stamp := self._store.stamp(self._key)) != self._stamp:
            self._names, self._stamp = self._decode(self._store.get(self._key)), stamp
        return self._names

    def change(self, name: str, *, pinned: bool) -> tuple[str, ...]:
        """Adds `name` or takes it out; returns all names."""
        while True:
            document = self._store.get(self._key)
            before = set(self._decode(document))
            names = tuple(sorted(before | {name} if pinned else before - {name}))
            content = (json.dumps(names, ensure_ascii=False) + "\n").encode()
            if set(names) == before or self._store.compare_and_swap(self._key, document, content):
                return names

    def _decode(self, document: bytes | None) -> tuple[str, ...]:
        try:
            names = json.loads(document or b"[]")
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return tuple(names)
        except ValueError:
            pass
        raise ArtifactError(f"{self._store.root}/{self._key}", "is no list of names", hint="remove the file")
