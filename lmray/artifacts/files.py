"""Files written so that a reader sees the old content or the new, never half of it; and digests of files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmray.errors import ArtifactError, CapacityError
from lmray.pulse import PULSE

MANIFEST = "manifest.json"
ABANDONED_S = 24 * 3600.0
"""A temporary file that nobody touched for so long is nobody's."""


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
    fsync(path.parent)


def temporary_beside(path: Path) -> Path:
    """A name that nothing else uses, hidden, on the same file system as `path`; it tells whose it is."""
    return path.with_name(f".{path.name}.{_writer()}-{secrets.token_hex(4)}.tmp")


def _writer() -> str:
    return f"{platform.node()}-{os.getpid()}"


def remove_abandoned(folder: Path) -> None:
    """Removes temporary files in `folder` that a killed process left: its number is free on this machine, or the file
    is older than ABANDONED_S, for those of other machines."""
    for path in folder.glob(".*.tmp"):
        writer, _, _ = path.name.rpartition("-")
        node, _, pid = writer.rpartition("-")
        try:
            if node.endswith("." + platform.node()) and pid.isdigit():
                abandoned = not _runs(int(pid))
            else:
                abandoned = time.time() - path.stat().st_mtime > ABANDONED_S
            if abandoned:
                path.unlink()
        except FileNotFoundError:  # its writer was done, or another process tidies too
            continue


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, hint: str) -> Any:
    """What the JSON file `path` holds. Raises ArtifactError with `hint` where it is spoilt, OSError where it cannot be
    read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(str(path), f"is spoilt: {error}", hint=hint) from None


def fsync(path: Path) -> None:
    """Makes the content of a file durable, or the names inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raises CapacityError where `folder`, which need not be there yet, cannot be written to; writes nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = "cannot be written to" if there.is_dir() else "is a file"
        hint = "set `storage` in the job, or LMRAY_STORE, to a folder that can be written to"
        raise CapacityError(
            str(there), found, allowed="a folder of yours, on a file system mounted to write", hint=hint
        )


@contextmanager
def only_writer(folder: Path, *, lock_name: str = ".lock", wait_s: float = 0) -> Iterator[None]:
    """Keeps a second writer out of `folder` for the length of the block; the lock ends with its process, however that
    ends. Raises CapacityError where another process still writes there after `wait_s`."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / lock_name, timeout=wait_s)
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
    PULSE.beat(f"copying {source} to {target}")
    try:
        shutil.copytree(source, temporary)
        for path in (temporary, *temporary.rglob("*")):
            fsync(path)
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    fsync(target.parent)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` where it is not there yet: whole or not at all, once, however many processes ask.

    `build` is given the path of a folder to make; what a killed one left is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.tmp")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                build(scratch)
                for path in (scratch, *scratch.rglob("*")):
                    fsync(path)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            fsync(folder.parent)
    return folder


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    PULSE.beat(f"reading {path}")
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
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise ArtifactError(str(folder), "has no manifest", hint="the folder was not finished") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(str(path), f"no readable manifest: {error}", hint="the folder was not finished") from None
    found = folder_digests(folder)
    for name, facts in files.items():
        if found.get(name) != facts:
            raise ArtifactError(
                str(folder / name), "is missing or not what its manifest says", hint="restore it or remove the folder"
            )
    return manifest
