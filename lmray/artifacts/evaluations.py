"""What versions of an artifact measured over time: `artifacts/NAME/evaluations/`, an object an evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from lmray.artifacts.store import Store
from lmray.errors import ArtifactError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one version."""

    version: str
    """`NAME@VERSION`."""
    asked: str
    """Digest of what was measured, on what data; only evaluations that asked the same can be compared."""
    metrics: Mapping[str, float]
    run: str
    """Folder of the run."""
    worse: Mapping[str, float] = field(default_factory=dict)
    """Metrics that got worse by more than allowed, each with what it was before."""
    time: float = 0.0
    """Seconds since 1970."""


class Evaluations:
    """Of all artifacts in a store."""

    def __init__(self, store: Store):
        self._store = store

    def add(self, evaluation: Evaluation) -> None:
        name = evaluation.version.partition("@")[0]
        content = {**asdict(evaluation), "time": round(time.time(), 3)}
        key = f"artifacts/{name}/evaluations/{time.time_ns()}.json"
        self._store.put(key, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def of(self, name: str) -> list[Evaluation]:
        """Those of all versions of `name`, oldest first. Raises ArtifactError for a record that is none."""
        return [self._read(key) for key in self._store.list(f"artifacts/{name}/evaluations")]

    def newest_first(self, name: str) -> Iterator[Evaluation]:
        """The same from the other end, each read when it is asked for."""
        for key in reversed(list(self._store.list(f"artifacts/{name}/evaluations"))):
            yield self._read(key)

    def _read(self, key: str) -> Evaluation:
        try:
            return Evaluation(**json.loads(self._store.get(key) or b""))
        except (ValueError, TypeError):
            raise ArtifactError(
                f"{self._store.root}/{key}", "is no record of an evaluation", hint="remove the file"
            ) from None
