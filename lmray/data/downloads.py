"""Files behind URLs, brought once into lmray's cache; any protocol `fsspec` speaks (http, https, s3, gs, ...)."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
from filelock import FileLock

from lmray.artifacts.files import temporary_beside
from lmray.config.places import cache_root
from lmray.data.files import SUFFIXES, TABLES
from lmray.errors import DataError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "size")
"""What file systems call the things that change with a file's content."""


def is_url(source: str) -> bool:
    return bool(_URL.match(source))


def download(url: str) -> dict[Path, str]:
    """The files behind `url` (one file, or outside of http also a glob or a folder) in the cache, each with its URL.

    The cache knows a file by its URL and what the server says of its version (ETag, date, size), so changed data is
    fetched again. Raises DataError where nothing can be had.
    """
    where = f"data source `{url}`"
    try:
        filesystem, path = fsspec.url_to_fs(url)
        found = _listed(filesystem, path, where)
        return {_cached(filesystem, file, where): filesystem.unstrip_protocol(file) for file in found}
    except DataError:
        raise
    except ImportError as error:
        raise DataError(where, f"a library is missing: {error}", hint="install it, or use a local file") from None
    except Exception as error:  # every protocol brings errors of its own
        said = next(iter(str(error).splitlines()), "")
        hint = "check the address and the network, or use a local file"
        raise DataError(where, f"could not be downloaded: {type(error).__name__}: {said}", hint=hint) from None


def _listed(filesystem: Any, path: str, where: str) -> list[str]:
    """The files that `path` names, sorted. A web server has no folders, so there `path` is one file."""
    if _suffix(path) in SUFFIXES and "*" not in path:
        return [path]
    if path.startswith(("http://", "https://")):
        raise DataError(where, f"unknown kind of file `{_suffix(path)}`", allowed=" ".join(SUFFIXES))
    listed = filesystem.glob(path) if "*" in path else filesystem.find(path)
    found = sorted(file for file in listed if _suffix(file) in (SUFFIXES if "*" in path else TABLES))
    if not found:
        raise DataError(where, "names no data files", allowed=" ".join(SUFFIXES))
    return found


def _cached(filesystem: Any, path: str, where: str) -> Path:
    facts = filesystem.info(path)
    version = {key: str(facts[key]) for key in _VERSION_KEYS if facts.get(key) is not None}
    name = filesystem.unstrip_protocol(path)
    digest = hashlib.sha256(f"{name} {sorted(version.items())}".encode()).hexdigest()
    file = cache_root() / "data" / f"{digest[:32]}{_suffix(path)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        if not file.is_file():
            _fetch(filesystem, path, file, where)
    return file


def _fetch(filesystem: Any, path: str, file: Path, where: str) -> None:
    temporary = temporary_beside(file)
    try:
        filesystem.get_file(path, str(temporary))
        size = filesystem.info(path).get("size")
        if size is not None and size != temporary.stat().st_size:
            raise DataError(where, f"{temporary.stat().st_size} of {size} bytes came", hint="try again")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _suffix(path: str) -> str:
    return Path(unquote(urlsplit(path).path)).suffix.lower()
