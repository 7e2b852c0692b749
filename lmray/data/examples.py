"""From a job's data section to examples: read every source, map its rows, hold some out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from lmray.artifacts.files import sha256_json
from lmray.data.base import Example, Mapping, Row
from lmray.data.files import find_files, read_rows
from lmray.data.mappings.columns import Columns
from lmray.data.mappings.messages import Messages
from lmray.data.spec import DataSource, DataSpec, EvalData
from lmray.errors import ConfigError, DataError


@dataclass(frozen=True)
class Examples:
    """The examples of a job; nothing is in both parts."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    formats: tuple[str, ...]
    """What each training source was read as, for the plan."""

    @property
    def digest(self) -> str:
        """Of all content, in order: another digest is another run."""
        parts = ([[*example.messages, example.accepted] for example in part] for part in (self.train, self.eval))
        return sha256_json(list(parts))


def read_examples(spec: DataSpec) -> Examples:
    """All examples of `spec`. Raises DataError for missing, malformed or empty data, naming file, row and column."""
    read = [_read_source(source) for source in spec.train]
    weights = [source.weight for source in spec.train]
    train = tuple(
        one for (examples, _), weight in zip(read, weights, strict=True) for one in _weighted(examples, weight)
    )
    held_out: tuple[Example, ...] = ()
    if spec.eval is not None and spec.eval.split is not None:
        everything = tuple(chain.from_iterable(examples for examples, _ in read))
        chosen = _held_out_groups(everything, spec.eval)
        held_out = tuple(example for example in everything if _group(example, spec.eval) in chosen)
        train = tuple(example for example in train if _group(example, spec.eval) not in chosen)
    elif spec.eval is not None:
        held_out = tuple(chain.from_iterable(_read_source(source)[0] for source in spec.eval.sources))
    if not train:
        raise DataError("data.train", "no example is left to train on", hint="lower `eval.split` or add data")
    formats = tuple(f"{source.source}: {name}" for (_, name), source in zip(read, spec.train, strict=True))
    return Examples(train, held_out, formats)


def _read_source(source: DataSource) -> tuple[tuple[Example, ...], str]:
    files = find_files(source.source, source.mapping)
    rows = source.mapping.rows(files, read_rows) if source.mapping else chain.from_iterable(map(read_rows, files))
    head = list(islice(rows, 1))
    if not head:
        raise DataError(f"data source `{source.source}`", f"is empty: no row in {len(files)} file(s)")
    mapping = source.mapping or detect_mapping(head[0])
    return tuple(mapping.example(row) for row in chain(head, rows)), mapping.name


def detect_mapping(row: Row) -> Mapping:
    """The mapping that `row`'s columns call for. Raises DataError where none fits."""
    if "messages" in row.value:
        return Messages()
    if {"prompt", "completion"} <= row.value.keys():
        return Columns()
    hint = "say which columns: `mapping: {prompt: COLUMN, completion: COLUMN}`"
    raise DataError(
        row.where, f"columns {', '.join(row.value)}", allowed="`messages`, or `prompt` and `completion`", hint=hint
    )


def _weighted(examples: tuple[Example, ...], weight: float) -> tuple[Example, ...]:
    """`examples` repeated `weight` times; the fraction is spread evenly over them."""
    whole, count = int(weight), round(len(examples) * (weight % 1))
    return examples * whole + tuple(examples[index * len(examples) // count] for index in range(count))


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
