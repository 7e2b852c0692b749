"""The store on a file system: rename for whole writes, a lock file for compare-and-swap."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock

from lmray.artifacts.files import fsync, remove_abandoned, temporary_beside, write_atomic


class FileStore:
    """Keys are files below `root`; a shared file system makes it a cluster's store."""

    def __init__(self, root: Path):
        self.root = root

    def get(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, content: bytes | Path) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        if isinstance(content, bytes):
            write_atomic(path, content)
            return
        temporary = temporary_beside(path)
        try:
            shutil.copyfile(content, temporary)
            fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def stamp(self, key: str) -> tuple[int, ...] | None:
        try:
            facts = os.stat(f"{self.root}/{key}")  # asked often, for many keys
        except FileNotFoundError:
            return None
        return facts.st_mtime_ns, facts.st_ino, facts.st_size  # a write is a rename: another inode at once

    def compare_and_swap(self, key: str, expected: bytes | None, content: bytes) -> bool:
        with self._lock(key):
            if self.get(key) != expected:
                return False
            self.put(key, content)
            return True

    def _lock(self, key: str) -> FileLock:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_name(f".{path.name}.lock"))
