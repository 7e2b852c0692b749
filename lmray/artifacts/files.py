"""Files written so that a reader sees the old content or the new, never half of it; and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmray.errors import ArtifactError, CapacityError

MANIFEST = "manifest.json"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes `content` to `path` by temporary name, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name that nothing else uses, hidden, on the same file system as `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps a second writer out of `folder` for the length of the block; the lock ends with its process, however that
    ends. Raises CapacityError where another process writes there already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        hint = "wait for it, stop it, or choose another `name`"
        raise CapacityError(str(folder), "another process is running this run", hint=hint) from None
    try:
        yield
    finally:
        lock.release()


def replace_folder(source: Path, target: Path) -> None:
    """Copies folder `source` next to `target`, then renames it into place; an older `target` is replaced."""
    temporary, replaced = temporary_beside(target), temporary_beside(target)
    try:
        shutil.copytree(source, temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    fsync_folder(target.parent)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_digests(folder: Path, *, skip: Iterable[str] = (MANIFEST,)) -> dict[str, dict[str, Any]]:
    """`{relative path: {sha256, bytes}}` of every file below `folder`, sorted by path."""
    skipped = set(skip)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in found
    }


def seal(folder: Path, **facts: Any) -> None:
    """Writes the manifest of a finished folder, last: digests of all its files, and `facts`."""
    write_json(folder / MANIFEST, {**facts, "files": folder_digests(folder)})


def read_sealed(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after checking every file against it. Raises ArtifactError naming the first that
    differs."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(str(path), f"no readable manifest: {error}", hint="the folder was not finished") from None
    found = folder_digests(folder)
    for name, facts in manifest["files"].items():
        if found.get(name) != facts:
            raise ArtifactError(
                str(folder / name), "is missing or not what its manifest says", hint="restore it or remove the folder"
            )
    return manifest
