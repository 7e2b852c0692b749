"""The example every row becomes, and the base of the mappings that make it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from collections.abc import Mapping as Mapping_
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmray.config import MemberConfig
from lmray.errors import DataError


@dataclass(frozen=True)
class Example:
    """One conversation, or one piece of plain text. The last message is the answer that generation tasks compare
    with."""

    messages: tuple[dict[str, Any], ...]
    """`{"role": ..., "content": ...}`; loss is taken on assistant turns. Empty where `text` is given.

    An assistant turn may carry `tool_calls` (`{"type": "function", "function": {"name", "arguments": {...}}}`, with its
    `id` where the data has one); its content is then a text that may be empty. Turns of `tool` hold what came back."""
    where: str
    """`file:row`, for messages about it."""
    columns: Mapping_[str, Any] = field(default_factory=dict)
    """Columns a split can group by."""
    accepted: Any = None
    """What a task accepts as right, where that is more than the one answer; see `lmray.tasks.json_match`."""
    tools: tuple[dict[str, Any], ...] | None = None
    """What the chat template takes as `tools`: `{"type": "function", "function": {...}}`."""
    text: str | None = None
    """Plain text for continual pre-training: every token is supervised, no template is applied."""
    assistant_only_loss: bool = True
    """False: loss is taken on every token of the conversation."""
    rejected: tuple[dict[str, Any], ...] | None = None
    """For preference methods: the conversation that is worse than `messages`, whole, prompt included."""
    label: bool | None = None
    """For preference methods on single answers: whether the answer is a wanted one."""

    @property
    def is_preference(self) -> bool:
        return self.rejected is not None or self.label is not None

    @property
    def num_chars(self) -> int:
        """Of what is said in it."""
        return len(self.text or "") + sum(len(turn["content"]) for turn in self.messages)

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) or any(turn["role"] == "tool" or "tool_calls" in turn for turn in self.messages)

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        self._check_conversation()
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn; where that only calls functions, the call as JSON, several as an array."""
        self._check_conversation()
        last = self.messages[-1]
        calls = [call["function"] for call in last.get("tool_calls", ())]
        if last["content"] or not calls:
            return last["content"]
        return json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)

    def _check_conversation(self) -> None:
        if not self.messages:
            hint = "evaluate plain text by its loss, and give answers to compare as conversations"
            raise DataError(self.where, "is plain text: there is no prompt and no answer in it", hint=hint)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a conversation that waits for its next turn, or plain text to go on with."""

    messages: tuple[dict[str, Any], ...]
    """As in `Example`, without the answer. Empty where `text` is given."""
    where: str
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Row:
    """One record of a file, with where it stood."""

    where: str
    value: dict[str, Any]


class Mapping(MemberConfig):
    """Base of `lmray/data/mappings/*.py`: turns rows into examples."""

    def rows(self, files: tuple[Path, ...], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
        """All rows of a source's files, in order; `read` gives those of one. A mapping that joins files overrides
        this and `reads`."""
        for file in files:
            yield from read(file)

    def reads(self, files: tuple[Path, ...]) -> tuple[Path, ...]:
        """All files that `rows` reads for `files`: where one changes, the source is read anew."""
        return files

    def members(self) -> tuple[str, ...] | None:
        """For a source that names an archive and no path in it: the paths to read. None: the path must be named."""
        return None

    def takes(self, row: Row) -> bool:
        """Whether `row` becomes an example at all: a mapping may pass over rows that hold nothing to learn from."""
        return True

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The example in `row`. Raises DataError naming file, row and column."""
        raise NotImplementedError

    def question(self, row: Row) -> Prompt:
        """What `row` asks, its answer left out; plain text is gone on with. Where rows without an answer make sense, a
        mapping overrides this. Raises DataError naming file, row and column."""
        example = self.example(row)
        if example.text is not None:
            return Prompt((), row.where, text=example.text)
        return Prompt(example.prompt, row.where, tools=example.tools)
