"""From a job's data section to examples: read every source, map its rows, hold some out, weigh the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from itertools import chain, islice
from typing import Any

from lmray.artifacts.files import sha256_json
from lmray.data.base import Example, Mapping, Row
from lmray.data.detect import NUM_ROWS, Reading, check_alike, detect
from lmray.data.sources import open_source
from lmray.data.spec import DataSource, DataSpec, EvalData
from lmray.errors import ConfigError, DataError


@dataclass(frozen=True)
class Examples:
    """The examples of a job; nothing is in both parts."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    formats: tuple[str, ...]
    """For the plan, one line a source: what it was read as, how many rows it has, and what becomes of them."""
    mixture: tuple[tuple[str, int], ...] = ()
    """Each source, and how many of `train` it gave; they are in this order."""

    @property
    def digest(self) -> str:
        """Of all content, in order: another digest is another run."""
        return sha256_json([[_content(example) for example in part] for part in (self.train, self.eval)])


@dataclass(frozen=True)
class SourceExamples:
    """What one source holds."""

    examples: tuple[Example, ...]
    reading: Reading
    num_passed_over: int = 0
    """Rows that the mapping does not take."""

    @property
    def format(self) -> str:
        """For people: `messages with tools, could also be read as text`."""
        tools = " with tools" if any(example.has_tools for example in self.examples) else ""
        also = f", could also be read as {', '.join(self.reading.also)}" if self.reading.also else ""
        return f"{self.reading.mapping.name}{tools}{also}"


def read_examples(spec: DataSpec, *, preferences: bool = False) -> Examples:
    """All examples of `spec`; with `preferences` those that hold more than one good answer too.

    The split is taken first, then the rest of each source is weighed (`weighted`). Raises DataError for missing,
    malformed or empty data, naming file, row and column.
    """
    read = [read_source(source) for source in spec.train]
    eval_sources = spec.eval.sources if spec.eval is not None else ()
    own = [read_source(source) for source in eval_sources]
    if not preferences:
        _check_supervised(chain.from_iterable(one.examples for one in (*read, *own)))
    everything = tuple(chain.from_iterable(one.examples for one in read))
    chosen = frozenset()
    if spec.eval is not None and spec.eval.split is not None:
        chosen = _held_out_groups(everything, spec.eval)
    train: list[Example] = []
    formats, mixture = [], []
    for one, source in zip(read, spec.train, strict=True):
        left = tuple(example for example in one.examples if not _is_in(example, chosen, spec.eval))
        seen = weighted(left, source)
        formats.append(_line(one, source, num_held_out=len(one.examples) - len(left), num_seen=len(seen)))
        mixture.append((source.source, len(seen)))
        train += seen
    if not train:
        raise DataError("data.train", "no example is left to train on", hint="lower `eval.split` or add data")
    held_out = tuple(example for example in everything if _is_in(example, chosen, spec.eval))
    for one, source in zip(own, eval_sources, strict=True):
        formats.append(_line(one, source, num_held_out=len(one.examples), num_seen=0))
        held_out += one.examples
    return Examples(tuple(train), held_out, tuple(formats), tuple(mixture))


def read_source(source: DataSource) -> SourceExamples:
    """All examples of one source, unweighed. Raises DataError for every way in which it can be unreadable."""
    opened = open_source(source.source, source.mapping)
    head = list(islice(opened.rows, NUM_ROWS))
    if not head:
        raise DataError(f"data source `{source.source}`", "is empty: no row in it")
    reading = Reading(opened.mapping) if opened.mapping else detect(head)
    examples, num_passed_over = [], 0
    for row in chain(head, opened.rows):
        if reading.mapping.takes(row):
            example = _example(row, reading.mapping, is_detected=opened.mapping is None)
            examples.append(example if source.assistant_only_loss else replace(example, assistant_only_loss=False))
        else:
            num_passed_over += 1
    if not examples:
        found = f"has no row that the mapping `{reading.mapping.name}` takes"
        raise DataError(f"data source `{source.source}`", found, hint="see whether the rows are blank")
    return SourceExamples(tuple(examples), reading, num_passed_over)


def _example(row: Row, mapping: Mapping, *, is_detected: bool) -> Example:
    try:
        return mapping.example(row)
    except DataError:
        if is_detected:
            check_alike(row, mapping)
        raise


def weighted(examples: tuple[Example, ...], source: DataSource) -> tuple[Example, ...]:
    """What an epoch sees of `examples`: `weight` times their number, rounded half up.

    Each is there as often as the whole part of the weight says; of the fraction, examples at even distances once more.
    Nothing is drawn by chance. Raises DataError where a small weight leaves none of them.
    """
    total = (Decimal(str(source.weight)) * len(examples)).to_integral_value(ROUND_HALF_UP)
    if examples and not total:
        found = f"`weight: {source.weight}` of {len(examples)} example(s) leaves none"
        raise DataError(f"data source `{source.source}`", found, hint="raise the weight, or leave the source out")
    whole, count = divmod(int(total), max(1, len(examples)))
    return examples * whole + tuple(examples[index * len(examples) // count] for index in range(count))


def _check_supervised(examples: Iterator[Example]) -> None:
    for example in examples:
        if example.is_preference:
            hint = "train on the better answers alone: `mapping: {name: preference, use: chosen}`"
            found = "is a preference, with an answer that is not to be learnt"
            raise DataError(example.where, found, allowed="conversations or text for supervised training", hint=hint)


def _line(one: SourceExamples, source: DataSource, *, num_held_out: int, num_seen: int) -> str:
    parts = [f"{len(one.examples)} rows"]
    if one.num_passed_over:
        parts.append(f"{one.num_passed_over} more passed over")
    if num_held_out:
        parts.append(f"{num_held_out} held out")
    if num_seen:
        parts.append(f"{num_seen} an epoch" + (f" (weight {source.weight})" if source.weight != 1.0 else ""))
    return f"{source.source}: {one.format}; {', '.join(parts)}"


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


def _is_in(example: Example, groups: frozenset[str], spec: EvalData | None) -> bool:
    return bool(groups) and spec is not None and _group(example, spec) in groups


def _group(example: Example, spec: EvalData) -> str:
    if spec.by is None:
        return example.where
    if spec.by not in example.columns:
        raise ConfigError(
            "data.eval.by", f"no column `{spec.by}` in {example.where}", allowed=", ".join(example.columns)
        )
    return str(example.columns[spec.by])


def _held_out_groups(examples: Sequence[Example], spec: EvalData) -> frozenset[str]:
    """Whole groups, in an order fixed by their names and the seed, until `split` of all examples are held out."""
    assert spec.split is not None
    sizes: dict[str, int] = {}
    for example in examples:
        group = _group(example, spec)
        sizes[group] = sizes.get(group, 0) + 1
    names = {group: group if spec.by else str(index) for index, group in enumerate(sizes)}  # a path is no stable name
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{spec.seed} {names[group]}".encode()).digest())
    wanted, chosen, count = spec.split * len(examples), [], 0
    for group in order:
        if count >= wanted:
            break
        chosen.append(group)
        count += sizes[group]
    return frozenset(chosen)
