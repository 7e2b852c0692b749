"""From a job's data section to examples: read every source, map its rows, hold some out, weigh the rest.

Sources are read once, row by row, into an entry of the cache; what is held in memory is some forty bytes a row.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lmray.artifacts.files import sha256_file, sha256_json
from lmray.config import dump
from lmray.data.base import Example, Row
from lmray.data.base import Mapping as RowMapping
from lmray.data.detect import NUM_ROWS, Reading, check_alike, detect
from lmray.data.entries import entry, map_arrays, save_arrays
from lmray.data.sources import OpenSource, open_source
from lmray.data.spec import DataSource, DataSpec, EvalData
from lmray.data.split import group_number, held_out, weighted
from lmray.data.stored import Pool, PoolMaker, StoredExamples
from lmray.errors import DataError
from lmray.metrics.counter import Counter

PARTS = "parts.safetensors"


@dataclass(frozen=True)
class Summary:
    """What is known of all examples without reading them again."""

    digest: str
    has_chats: bool


@dataclass(frozen=True)
class Examples:
    """The examples of a job; nothing is in both parts."""

    train: Sequence[Example]
    eval: Sequence[Example]
    formats: tuple[str, ...]
    """For the plan, one line a source: what it was read as, how many rows it has, and what becomes of them."""
    mixture: tuple[tuple[str, int], ...] = ()
    """Each source, and how many different ones of `train` it gave; they are in this order."""
    summary: Summary | None = None

    @property
    def digest(self) -> str:
        """Of all content, in order: another digest is another run. That of the JSON of both parts' contents."""
        return self.summary.digest if self.summary else _digest((self.train, self.eval))

    @property
    def has_chats(self) -> bool:
        """Whether any example is a conversation, which needs a chat template."""
        if self.summary:
            return self.summary.has_chats
        return any(example.text is None for example in chain(self.train, self.eval))


def read_examples(spec: DataSpec, *, preferences: bool = False) -> Examples:
    """All examples of `spec`; with `preferences` those that hold more than one good answer too.

    The split is taken first, then the rest of each source is weighed (`weighted`). Raises DataError for missing,
    malformed or empty data, naming file, row and column; CapacityError where the cache cannot be written.
    """
    split = spec.eval if spec.eval is not None and spec.eval.split is not None else None
    own = spec.eval.sources if spec.eval is not None else ()
    reader = _Reader(spec.train, own, split, preferences=preferences)
    return entry("examples", reader.key(), make=reader.make, read=_read)


def _read(folder: Path, facts: Mapping[str, Any]) -> Examples:
    pool, parts = Pool(folder, facts), map_arrays(folder / PARTS)
    train, held = (StoredExamples(pool, parts[name]) for name in ("train", "eval"))
    mixture = tuple((name, count) for name, count in facts["mixture"])
    return Examples(train, held, tuple(facts["formats"]), mixture, Summary(facts["digest"], facts["has_chats"]))


@dataclass
class _Count:
    """What one source holds."""

    reading: Reading
    taken: int = 0
    passed_over: int = 0
    """Rows that the mapping does not take."""
    has_tools: bool = False

    @property
    def format(self) -> str:
        """For people: `messages with tools, could also be read as text`."""
        tools = " with tools" if self.has_tools else ""
        also = f", could also be read as {', '.join(self.reading.also)}" if self.reading.also else ""
        return f"{self.reading.mapping.name}{tools}{also}"


class _Reader:
    """Reads the sources of one data section: those to train on, then held-out ones of their own."""

    def __init__(
        self, train: Sequence[DataSource], own: Sequence[DataSource], split: EvalData | None, *, preferences: bool
    ):
        self.train, self.own, self.split, self.preferences = train, own, split, preferences
        self.opened = [open_source(source.source, source.mapping) for source in (*train, *own)]
        self.groups, self.has_chats = array("Q"), False

    def key(self) -> str:
        """Of all that decides what is read and what becomes of it."""
        sources = [[dump(source) for source in part] for part in (self.train, self.own)]
        split = dump(self.split) if self.split else None
        inputs = [one.inputs for one in self.opened]
        return sha256_json([code_digest(), sources, inputs, split, self.preferences])

    def make(self, folder: Path) -> dict[str, Any]:
        """Fills `folder`; what `_read` needs to know of it."""
        with Counter("read", None, unit="rows") as self.counter, PoolMaker(folder) as maker:
            counts = [
                self._add(opened, source, maker)
                for opened, source in zip(self.opened, (*self.train, *self.own), strict=True)
            ]
            self.counter.at(len(maker))
            parts, told = self._parts(counts)
            facts = maker.facts()
        save_arrays(parts, folder / PARTS)
        pool = Pool(folder, facts)
        digest = _digest([StoredExamples(pool, part) for part in parts.values()])
        return facts | told | {"digest": digest, "has_chats": self.has_chats}

    def _add(self, opened: OpenSource, source: DataSource, maker: PoolMaker) -> _Count:
        head = list(islice(opened.rows, NUM_ROWS))
        if not head:
            raise DataError(f"data source `{source.source}`", "is empty: no row in it")
        count = _Count(Reading(opened.mapping) if opened.mapping else detect(head))
        mapping = count.reading.mapping
        maker.begin(mapping, assistant_only_loss=source.assistant_only_loss)
        for row in chain(head, opened.rows):
            if not mapping.takes(row):
                count.passed_over += 1
                continue
            example = _example(row, mapping, is_detected=opened.mapping is None)
            example = replace(example, assistant_only_loss=source.assistant_only_loss)
            if not self.preferences:
                _check_supervised(example)
            count.taken += 1
            count.has_tools = count.has_tools or example.has_tools
            self.has_chats = self.has_chats or example.text is None
            self.groups.append(group_number(example, self.split) if self.split else 0)
            maker.add(row, example)
            self.counter.at(len(maker))
        if not count.taken:
            found = f"has no row that the mapping `{mapping.name}` takes"
            raise DataError(f"data source `{source.source}`", found, hint="see whether the rows are blank")
        return count

    def _parts(self, counts: Sequence[_Count]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The examples of `train` and `eval`, by their place; what each source gave, for people and in numbers."""
        ends = np.cumsum([count.taken for count in counts])
        num_own = sum(count.taken for count in counts[len(self.train) :])
        is_held = np.zeros(ends[-1] - num_own, dtype=bool)
        if self.split:
            is_held = held_out(np.array(self.groups, dtype=np.uint64)[: len(is_held)], self.split)
        train, formats, mixture = [], [], []
        for count, source, end in zip(counts, self.train, ends, strict=False):
            left = np.flatnonzero(~is_held[end - count.taken : end]) + end - count.taken
            train.append(weighted(left, source))
            mixture.append((source.source, len(np.unique(train[-1]))))
            formats.append(_line(count, source, num_held_out=count.taken - len(left), num_seen=len(train[-1])))
        if not sum(map(len, train)):
            raise DataError("data.train", "no example is left to train on", hint="lower `eval.split` or add data")
        for count, source in zip(counts[len(self.train) :], self.own, strict=True):
            formats.append(_line(count, source, num_held_out=count.taken, num_seen=0))
        held = np.concatenate([np.flatnonzero(is_held), np.arange(len(is_held), ends[-1])])
        return {"train": np.concatenate(train), "eval": held}, {"formats": formats, "mixture": mixture}


@cache
def code_digest() -> str:
    """Of the code that reads: where it changes, data is read anew."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256_json([sha256_file(file) for file in files])


def _example(row: Row, mapping: RowMapping, *, is_detected: bool) -> Example:
    try:
        return mapping.example(row)
    except DataError:
        if is_detected:
            check_alike(row, mapping)
        raise


def _check_supervised(example: Example) -> None:
    if example.is_preference:
        hint = "train on the better answers alone: `mapping: {name: preference, use: chosen}`"
        found = "is a preference, with an answer that is not to be learnt"
        raise DataError(example.where, found, allowed="conversations or text for supervised training", hint=hint)


def _line(count: _Count, source: DataSource, *, num_held_out: int, num_seen: int) -> str:
    parts = [f"{count.taken} rows"]
    if count.passed_over:
        parts.append(f"{count.passed_over} more passed over")
    if num_held_out:
        parts.append(f"{num_held_out} held out")
    if num_seen:
        parts.append(f"{num_seen} an epoch" + (f" (weight {source.weight})" if source.weight != 1.0 else ""))
    return f"{source.source}: {count.format}; {', '.join(parts)}"


def _digest(parts: Sequence[Sequence[Example]]) -> str:
    """`sha256_json` of the contents of `parts`, one example at a time."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b",[" if number else b"[[")
        for index, example in enumerate(part):
            text = json.dumps(_content(example), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            digest.update(b"," * bool(index) + text.encode("utf-8", "surrogatepass"))
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def _content(example: Example) -> list[Any]:
    """What `example` teaches. Fields it does not have are left out, so that a new field changes no old digest."""
    more = {
        "tools": example.tools,
        "text": example.text,
        "rejected": example.rejected,
        "label": example.label,
        "assistant_only_loss": None if example.assistant_only_loss else False,
    }
    given = {name: value for name, value in more.items() if value is not None}
    return [*example.messages, example.accepted, *([given] if given else [])]
