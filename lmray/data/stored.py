"""Examples on disk: the rows they were made of, as JSON lines beside a few numbers each; one is made when asked for.

Only the rows in use take room in memory, so there may be far more of them than it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lmray.data.base import Example, Row
from lmray.data.base import Mapping as RowMapping
from lmray.data.entries import map_arrays, save_arrays
from lmray.data.lazy import LazySequence
from lmray.data.places import Places, PlacesMaker
from lmray.registry import MAPPINGS

ROWS, NUMBERS = "rows.jsonl", "numbers.safetensors"
_DIGEST_BYTES = 16


class Pool:
    """All examples of a folder that `PoolMaker` filled, in the order they came."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self._file = open(folder / ROWS, "rb", buffering=0)  # noqa: SIM115
        arrays = map_arrays(folder / NUMBERS)
        self._starts, self.digests = arrays["starts"], arrays["digests"]
        self.places = Places(tuple(facts["names"]), arrays["files"], arrays["rows"])
        self._firsts = [source["first"] for source in facts["sources"]]
        self._mappings = [_mapping(source["mapping"]) for source in facts["sources"]]
        self._only_answers = [source["assistant_only_loss"] for source in facts["sources"]]

    def __getitem__(self, index: int) -> Example:
        start, stop = map(int, self._starts[index : index + 2])
        value = json.loads(os.pread(self._file.fileno(), stop - start, start))
        source = bisect_right(self._firsts, index) - 1
        example = self._mappings[source].example(Row(self.places[index], value))
        return replace(example, assistant_only_loss=self._only_answers[source])


class StoredExamples(LazySequence[Example]):
    """Those of `pool` at `indices`, which may repeat and leave out."""

    def __init__(self, pool: Pool, indices: np.ndarray):
        self.pool, self.indices = pool, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> Example:
        return self.pool[int(self.indices[index])]

    def once(self) -> tuple[StoredExamples, np.ndarray | None]:
        """The same without repetitions, and the place of each of these examples in it; None where nothing repeats."""
        if np.all(np.diff(self.indices) > 0):
            return self, None
        different, order = np.unique(self.indices, return_inverse=True)
        return StoredExamples(self.pool, different), order


def once(examples: Sequence[Example]) -> tuple[Sequence[Example], np.ndarray | None]:
    """`examples` without those that are there again, and the place of each in it; None where that changes nothing."""
    return examples.once() if isinstance(examples, StoredExamples) else (examples, None)


def places(examples: Sequence[Example]) -> Places:
    """Where each of `examples` stood."""
    if isinstance(examples, StoredExamples):
        return examples.pool.places.chosen(examples.indices)
    return Places.of(example.where for example in examples)


def also_among(others: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Whether each of `examples` is one of `others` too, word for word, wherever it stood and whatever of it is
    learned."""
    if not others:
        return np.zeros(len(examples), bool)  # and nothing is read
    theirs = {_digest(replace(one, assistant_only_loss=True)) for one in others}
    ours = (_digest(replace(one, assistant_only_loss=True)) in theirs for one in examples)
    return np.fromiter(ours, bool, len(examples))


def examples_digest(examples: Sequence[Example]) -> str:
    """Of what is tokenised of `examples`, in order."""
    digest = hashlib.sha256()
    if isinstance(examples, StoredExamples):
        for first in range(0, len(examples), 1 << 16):
            digest.update(examples.pool.digests[examples.indices[first : first + (1 << 16)]].tobytes())
    else:
        for example in examples:
            digest.update(_digest(example))
    return digest.hexdigest()


class PoolMaker:
    """Writes examples to `folder` as they come."""

    def __init__(self, folder: Path):
        self.folder, self.sources = folder, list[dict[str, Any]]()
        self._places, self._starts, self._digests = PlacesMaker(), array("q", [0]), bytearray()
        self._file = open(folder / ROWS, "wb")  # noqa: SIM115

    def __enter__(self) -> PoolMaker:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def begin(self, mapping: RowMapping, *, assistant_only_loss: bool = True) -> None:
        """The examples from here on are made by `mapping`, and learned so."""
        made = {"mapping": mapping.model_dump(mode="json"), "assistant_only_loss": assistant_only_loss}
        self.sources.append({"first": len(self), **made})

    def add(self, row: Row, example: Example) -> None:
        """`example`, which the mapping makes of `row`."""
        text = json.dumps(row.value, ensure_ascii=False, separators=(",", ":"), default=str)
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))
        self._places.add(row.where)
        self._digests += _digest(example)

    def facts(self) -> dict[str, Any]:
        """Completes the folder; what `Pool` needs to know of it."""
        self._file.close()
        found = self._places.made()
        arrays = {
            "starts": np.array(self._starts, dtype=np.int64),
            "digests": np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, _DIGEST_BYTES),
            "files": found.files_M,
            "rows": found.rows_M,
        }
        save_arrays(arrays, self.folder / NUMBERS)
        return {"names": list(found.names), "sources": self.sources}


def _digest(example: Example) -> bytes:
    content = [example.messages, example.tools, example.text, example.assistant_only_loss]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_DIGEST_BYTES]


def _mapping(fields: Mapping[str, Any]) -> RowMapping:
    return MAPPINGS.load(fields["name"])(**{key: value for key, value in fields.items() if key != "name"})
