"""What a target has answered so far, on disk: an interrupted run goes on with what it has not asked yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmray.artifacts.files import sha256_json, write_json

FILES = "measured-*.json"


def kept_path(folder: Path, label: str) -> Path:
    """Where a run in `folder` keeps target `label`'s."""
    return folder / FILES.replace("*", label)


def forget(folder: Path) -> None:
    """Removes what is kept in `folder`: the run's result holds it, or another run begins."""
    for path in folder.glob(FILES):
        path.unlink()


class Kept:
    """Losses, answers and likelihoods of one target, each made once. Without a path nothing is kept."""

    def __init__(
        self, path: Path | None = None, key: Any = None, *, write: Callable[[Callable[[], None]], None] | None = None
    ):
        """`key` (JSON types) is all that the answers depend on: with another one they are made again. `write` does the
        writing it is handed, for who has patience."""
        self._path, self._key, self._write = path, sha256_json(key), write or (lambda act: act())
        found = _read(path) if path else {}
        self._made: dict[str, Any] = found["made"] if found.get("key") == self._key else {}

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make` gives (JSON types; tuples may come back as lists), or gave an earlier attempt."""
        if what not in self._made:
            self._made[what] = make()
            if (path := self._path) is not None:
                self._write(lambda: write_json(path, {"key": self._key, "made": self._made}))
        return self._made[what]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
