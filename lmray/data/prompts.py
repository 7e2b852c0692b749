"""From a job's prompts to questions in a fixed order: every source is read once, into an entry of the cache.

What is held in memory is a number a row; a question is read when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lmray.artifacts.files import sha256_json
from lmray.config import dump
from lmray.data.base import Mapping as RowMapping
from lmray.data.base import Prompt, Row
from lmray.data.detect import NUM_ROWS, check_alike, detect
from lmray.data.entries import entry, map_arrays, save_arrays
from lmray.data.examples import code_digest
from lmray.data.lazy import LazySequence
from lmray.data.sources import OpenSource, open_source
from lmray.data.spec import PromptSource, PromptSpec
from lmray.data.turns import kind, read_column
from lmray.errors import DataError
from lmray.metrics.counter import Counter

ROWS, STARTS = "prompts.jsonl", "starts.safetensors"


@dataclass(frozen=True)
class Question:
    """One row to answer."""

    prompt: Prompt
    id: str | None = None
    adapter: str | None = None
    """As the row names it; None: the job's."""


class Questions(LazySequence[Question]):
    """All rows of a job, in their order."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self._file = open(folder / ROWS, "rb", buffering=0)  # noqa: SIM115
        self._starts = map_arrays(folder / STARTS)["starts"]
        self.digest: str = facts["digest"]
        """Of all that is asked, in order, wherever it stands."""
        self.has_chats: bool = facts["has_chats"]
        """Whether any is a conversation, which needs a chat template."""
        self.formats: tuple[str, ...] = tuple(facts["formats"])
        """For people, one line a source."""
        self.adapters: dict[str, str] = facts["adapters"]
        """Every adapter that a row names -> where the first of these rows stands."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def item(self, index: int) -> Question:
        start, stop = map(int, self._starts[index : index + 2])
        read = json.loads(os.pread(self._file.fileno(), stop - start, start))
        asked = read["asked"]
        tools = tuple(asked["tools"]) if asked["tools"] else None
        prompt = Prompt(tuple(asked["messages"]), read["where"], tools, asked["text"])
        return Question(prompt, asked["id"], asked["adapter"])


def read_questions(spec: PromptSpec) -> Questions:
    """All rows that `spec` asks for. Raises DataError for missing, malformed or empty data, naming file, row and
    column; CapacityError where the cache cannot be written."""
    opened = [open_source(source.source, source.mapping) for source in spec.sources]
    key = sha256_json([code_digest(), dump(spec), [one.inputs for one in opened]])
    return entry("prompts", key, make=lambda folder: _Reader(spec, folder).make(opened), read=Questions)


class _Reader:
    """Reads the sources of one job into `folder`."""

    def __init__(self, spec: PromptSpec, folder: Path):
        self.spec, self.folder = spec, folder
        self.starts, self.digest = array("q", [0]), hashlib.sha256()
        self.has_chats, self.adapters = False, dict[str, str]()

    def make(self, opened: list[OpenSource]) -> dict[str, Any]:
        """What `Questions` needs to know of the folder."""
        formats = []
        with Counter("read", None, unit="rows") as self.counter, open(self.folder / ROWS, "wb") as self.file:
            for source, one in zip(self.spec.sources, opened, strict=True):
                formats.append(self._add(source, one))
        save_arrays({"starts": np.array(self.starts, dtype=np.int64)}, self.folder / STARTS)
        facts = {"digest": self.digest.hexdigest(), "has_chats": self.has_chats}
        return facts | {"formats": formats, "adapters": self.adapters}

    def _add(self, source: PromptSource, opened: OpenSource) -> str:
        before, where = len(self.starts), f"data source `{source.source}`"
        head = list(islice(opened.rows, NUM_ROWS))
        if not head:
            raise DataError(where, "is empty: no row in it")
        mapping = opened.mapping or detect(head, answered=False).mapping
        for row in self._wanted(chain(head, opened.rows)):
            if mapping.takes(row):
                self._write(row, _prompt(row, mapping, is_detected=opened.mapping is None))
        count, full = len(self.starts) - before, self.spec.max_rows and len(self.starts) > self.spec.max_rows
        if not count and not full:
            found = f"has no row that the mapping `{mapping.name}` takes"
            raise DataError(where, found, hint="see whether the rows are blank")
        return f"{source.source}: {mapping.name}; {count} rows"

    def _wanted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            if self.spec.max_rows is not None and len(self.starts) > self.spec.max_rows:
                return
            yield row

    def _write(self, row: Row, prompt: Prompt) -> None:
        adapter = _named(row, self.spec.adapter)
        if adapter is not None:
            self.adapters.setdefault(adapter, row.where)
        self.has_chats = self.has_chats or prompt.text is None
        asked = {"messages": prompt.messages, "tools": prompt.tools, "text": prompt.text}
        asked |= {"id": _named(row, self.spec.id), "adapter": adapter}
        self.digest.update(_line(asked))
        self.starts.append(self.starts[-1] + self.file.write(_line({"where": row.where, "asked": asked})))
        self.counter.at(len(self.starts) - 1)


def _prompt(row: Row, mapping: RowMapping, *, is_detected: bool) -> Prompt:
    try:
        return mapping.question(row)
    except DataError:
        if is_detected:
            check_alike(row, mapping, answered=False)
        raise


def _named(row: Row, column: str | None) -> str | None:
    """What `column` of `row` holds, as text; None where it is empty or there is no such column to read."""
    value = None if column is None else read_column(row, column)
    if isinstance(value, (dict, list, bool)):
        raise DataError(f"{row.where}: column `{column}`", f"holds {kind(value)}", allowed="a text or a number")
    return None if value in (None, "") else str(value).encode("utf-8", "replace").decode()  # no half characters


def _line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"
