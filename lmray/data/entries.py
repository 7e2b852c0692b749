"""Entries of lmray's cache: folders that are made once, sealed, and read by every later start.

An entry is at its place only when it is whole: it is filled under another name, its manifest is written last, and then
it is renamed. One that is not what its manifest says is made again. All processes of a node share it: the first makes
it, the others wait.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from lmray.artifacts.files import fsync, read_sealed, seal, temporary_beside
from lmray.config.places import cache_root
from lmray.errors import ArtifactError, CapacityError
from lmray.models.tensors import save_tensors

Found = TypeVar("Found")


def entry(
    kind: str,
    key: str,
    *,
    make: Callable[[Path], Mapping[str, Any]],
    read: Callable[[Path, Mapping[str, Any]], Found],
) -> Found:
    """What `read` finds in the entry `kind/key` of the cache. `key` covers all that its content depends on.

    `make` fills an empty folder and gives the facts for its manifest, which `read` is given with the folder. Raises
    what `make` raises, and CapacityError where the cache cannot be written."""
    folder = cache_root() / kind / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{key}.lock")):
            found = _read(folder, read)
            if found is None:
                _write(folder, make)
                found = _read(folder, read)
    except (OSError, SafetensorError) as error:
        hint = "free some space, or set LMRAY_CACHE to a folder that can be written"
        raise CapacityError(str(folder), f"data in use cannot be kept: {error}", hint=hint) from None
    assert found is not None, "what was just written is there"
    return found


def _write(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # by a process that was killed; the lock is ours now
        shutil.rmtree(left, ignore_errors=True)
    temporary = temporary_beside(folder)
    temporary.mkdir()
    try:
        seal(temporary, **make(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(folder: Path, read: Callable[[Path, Mapping[str, Any]], Found]) -> Found | None:
    """The entry in `folder`, or None where there is none that is whole."""
    try:
        return read(folder, read_sealed(folder))
    except (ArtifactError, SafetensorError, AttributeError, KeyError, TypeError, ValueError):
        return None


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes `arrays` to `path`, whole or not at all."""
    save_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in `path`, mapped into memory, so that only what is in use takes room there."""
    with safe_open(path, framework="pt") as file:  # its tensors are maps of the file
        return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
