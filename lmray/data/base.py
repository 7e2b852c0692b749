"""The example every row becomes, and the base of the mappings that make it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Mapping as Mapping_
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmray.config import MemberConfig


@dataclass(frozen=True)
class Example:
    """One conversation. The last message is the answer that generation tasks compare with."""

    messages: tuple[dict[str, Any], ...]
    """`{"role": ..., "content": ...}`; loss is taken on assistant turns."""
    where: str
    """`file:row`, for messages about it."""
    columns: Mapping_[str, Any] = field(default_factory=dict)
    """Columns a split can group by."""
    accepted: Any = None
    """What a task accepts as right, where that is more than the one answer; see `lmray.tasks.json_match`."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions the assistant may call, for the chat template."""
    text: str | None = None
    """A document instead of a conversation; `messages` is empty then."""

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Row:
    """One record of a file, with where it stood."""

    where: str
    value: dict[str, Any]


class Mapping(MemberConfig):
    """Base of `lmray/data/mappings/*.py`: turns rows into examples."""

    def rows(self, files: tuple[Path, ...], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
        """All rows of a source's files, in order; `read` gives those of one. A mapping that joins files overrides
        this."""
        for file in files:
            yield from read(file)

    def members(self) -> tuple[str, ...] | None:
        """For a source that names an archive and no path in it: the paths to read. None: the path must be named."""
        return None

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The example in `row`. Raises DataError naming file, row and column."""
        raise NotImplementedError
