"""Shards: rows that are answered together and written as one file, each whole or not at all.

A shard's file lies among the answers; its record, written after it, in the run folder: what has no record that holds is
answered again.
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmray.artifacts.files import remove_abandoned, sha256_file, write_atomic, write_json
from lmray.errors import LmrayError

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("adapter", pa.string()),
        (
            "choices",
            pa.list_(pa.struct([("index", pa.int64()), ("text", pa.string()), ("finish_reason", pa.string())])),
        ),
        ("usage", pa.struct([("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64())])),
        ("error", pa.string()),
    ]
)
"""A row of the answers."""
Answered = dict[str, Any]
"""One of those rows."""


@dataclass(frozen=True)
class ShardRecord:
    """One shard that is done."""

    index: int
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    began: float
    """Seconds since 1970."""
    ended: float
    files: Mapping[str, Mapping[str, Any]]
    """`{name: {sha256, bytes}}`."""


class Shards:
    """The shards of a run on disk."""

    def __init__(self, run: Path, answers: Path, *, num_rows: int, size: int, suffixes: Sequence[str] = ("jsonl",)):
        self.folder, self.answers = run / "shards", answers
        self.num_rows, self.size, self.suffixes = num_rows, size, tuple(suffixes)

    def __len__(self) -> int:
        return -(-self.num_rows // self.size)

    def rows(self, index: int) -> range:
        """The rows of shard `index`."""
        return range(index * self.size, min((index + 1) * self.size, self.num_rows))

    def done(self) -> dict[int, ShardRecord]:
        """Every shard whose files are what its record says, by index."""
        return {index: record for index in range(len(self)) if (record := self._record(index)) is not None}

    def tidy(self) -> None:
        """Forgets attempts, and removes what killed writers left. To be called by the only run there is."""
        for folder in (self.folder, self.answers):
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder)
        for path in self.folder.glob("*.attempts"):
            path.unlink(missing_ok=True)

    def begin(self, index: int, *, max_failures: int) -> None:
        """Notes an attempt at shard `index`. Raises LmrayError where as many workers as are allowed died of it: more
        would die too."""
        path = self._path(index, "attempts")
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        failed = before.count("\n")
        if failed > max_failures:
            rows = self.rows(index)
            where = f"shard {index} (rows {rows.start} to {rows.stop - 1})"
            hint = "see whether memory is enough: lower `engine.max_batch_size`; `resources.max_failures` allows more"
            raise LmrayError(where, f"{failed} workers died while they answered it", hint=hint)
        write_atomic(path, f"{before}{platform.node()} {os.getpid()}\n")

    def write(self, index: int, answered: Sequence[Answered], *, began: float, ended: float) -> ShardRecord:
        """Keeps the answers to shard `index`; once this returns, it is done."""
        files = {}
        for suffix in self.suffixes:
            path = self.answers / f"part-{index:06d}.{suffix}"
            write_atomic(path, _WRITERS[suffix](answered))
            files[path.name] = _facts(path)
        record = ShardRecord(
            index=index,
            rows=len(answered),
            errors=sum(row["error"] is not None for row in answered),
            prompt_tokens=sum(row["usage"]["prompt_tokens"] for row in answered),
            completion_tokens=sum(row["usage"]["completion_tokens"] for row in answered),
            began=began,
            ended=ended,
            files=files,
        )
        write_json(self._path(index, "json"), asdict(record))
        self._path(index, "attempts").unlink(missing_ok=True)
        return record

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:06d}.{suffix}"

    def _record(self, index: int) -> ShardRecord | None:
        """That of a shard that is done."""
        names = {f"part-{index:06d}.{suffix}" for suffix in self.suffixes}
        try:
            record = ShardRecord(**json.loads(self._path(index, "json").read_text(encoding="utf-8")))
            found = {name: _facts(self.answers / name) for name in names}
        except (OSError, ValueError, TypeError):
            return None
        return record if record.index == index and record.files == found else None


def busy_seconds(records: Sequence[ShardRecord]) -> float:
    """How long at least one of `records` was in the making, over all attempts and workers."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted((record.began, record.ended) for record in records):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def _facts(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _json_lines(answered: Sequence[Answered]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in answered)
    return "".join(lines).encode("utf-8", "replace")


def _parquet(answered: Sequence[Answered]) -> bytes:
    table, file = pa.Table.from_pylist(list(answered), schema=SCHEMA), io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


_WRITERS = {"jsonl": _json_lines, "parquet": _parquet}
