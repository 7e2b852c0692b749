"""Data sets of the Hugging Face Hub through the `datasets` library: `hf:OWNER/NAME[:CONFIG][:SPLIT]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets

from lmray.data.base import Row
from lmray.data.files import without_gaps
from lmray.errors import DataError, did_you_mean

_ID = re.compile(r"hf:(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.-]+(\[[\w:%.-]*\])?))?")
LOCAL = "check the id and the network, or use what is on this machine: a file, a folder, a glob of files you downloaded"


def open_dataset(source: str) -> tuple[Iterator[Row], str]:
    """The rows of one split (`train` where none is named), each with its place `SOURCE:row`, and the fingerprint of
    their content. Rows are read out of the library's mapped files a few at a time.

    Raises DataError where the id is none, or the data set, its configuration or its split cannot be had.
    """
    found = _ID.fullmatch(source)
    where = f"data source `{source}`"
    if found is None:
        allowed = "hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT"
        raise DataError(where, "is no id of a data set", allowed=allowed)
    split = found["split"] or "train"
    loaded = _load(found["id"], found["config"], split, where)
    name = f"hf:{found['id']}:" + (f"{found['config']}:" if found["config"] else "") + split
    return _rows(loaded, name), loaded._fingerprint


def _load(name: str, config: str | None, split: str, where: str) -> Any:
    try:
        with _bars_on_terminals():
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises a dozen kinds, from its own to the network's
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(where, f"cannot be had: {said}", hint=_hint(str(error), split)) from None


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Progress bars of the library only where someone sees them move."""
    hidden = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _hint(said: str, split: str) -> str:
    """For a wrong split or configuration the nearest there is; else what works without the Hub."""
    known = re.findall(r"'([\w.-]+)'", said.partition("[")[2])
    if "split" in said.lower() and known:
        return did_you_mean(split, known) or f"write one of its splits after the id: {', '.join(known)}"
    if "config" in said.lower() and known:
        return f"write a configuration and a split after the id: `:{known[0]}:train`"
    return LOCAL


def _rows(loaded: Any, name: str) -> Iterator[Row]:
    for number, value in enumerate(loaded, start=1):
        yield Row(f"{name}:{number}", without_gaps(value))
