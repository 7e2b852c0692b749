"""The storage port: a few verbs over keys like `artifacts/NAME/stages.json`; everything that lasts goes through it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lmray.artifacts.file_store import FileStore
from lmray.config.places import store_root
from lmray.errors import ConfigError


class HasRuns(Protocol):
    """What of a job says where it runs."""

    @property
    def name(self) -> str: ...

    @property
    def storage(self) -> str | None: ...


class Store(Protocol):
    """Keys are relative paths with `/`. Every write is seen whole or not at all."""

    root: Path
    """Where programs lay out their run folders beside the artifacts."""

    def get(self, key: str) -> bytes | None:
        """The content of `key`, or None."""
        ...

    def put(self, key: str, content: bytes | Path) -> None:
        """Sets `key` to `content` (bytes, or a file to copy)."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Keys below folder `prefix`, sorted."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below folder `prefix`, sorted."""
        ...

    def stamp(self, key: str) -> tuple[int, ...] | None:
        """Something that is another whenever `key` was written again, without reading it; None where it is missing."""
        ...

    def compare_and_swap(self, key: str, expected: bytes | None, content: bytes) -> bool:
        """Sets `key` if it still holds `expected` (None: nothing); says whether it did."""
        ...


def open_store(root: str | None = None) -> Store:
    """The store at folder `root`. Empty: `$LMRAY_STORE`, else `~/.lmray/store`. Raises ConfigError for a URL."""
    place = root or str(store_root())
    if "://" in place:
        raise ConfigError("storage", f"`{place}` is a URL", allowed="a folder that every node sees")
    return FileStore(Path(place).expanduser().absolute())


def run_folder(job: HasRuns) -> Path:
    """Where a job of any kind runs: below its store, by name."""
    return open_store(job.storage).root / "runs" / job.name
