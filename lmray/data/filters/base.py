"""What a filter is to the rest: it lets a text through in pieces, without what must not be in it.

What it lets through depends on the text alone, never on where the pieces are cut.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal, Protocol

from lmray.config import MemberConfig, Name
from lmray.errors import ConfigError

Action = Literal["redact", "refuse"]


@dataclass(frozen=True)
class Found:
    """One match, of which nothing is told but what it is."""

    label: str
    """Of the filter."""
    kind: str
    """Of a few that the filter knows."""
    action: Action


class Passage(Protocol):
    """One text on its way through one filter."""

    stopped: bool
    """Whether the filter ended the text: nothing may follow."""

    def push(self, piece: str, *, last: bool) -> tuple[str, Sequence[str]]:
        """What passes of the text so far, and the kinds of what was found, once a match. `last`: nothing follows."""
        ...


class TextFilter(MemberConfig):
    """Base of `lmray/data/filters/*.py`."""

    package: ClassVar[str] = ""
    """The optional package it needs; empty where lmray brings it."""

    label: Name | None = None
    """What clients, logs and metrics are told. Empty: the filter's name."""
    on: Literal["prompts", "answers", "both"] = "both"

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    @abstractmethod
    def takes(self) -> Action:
        """What becomes of a match: it is replaced, or the text ends (a prompt: the request is refused)."""
        raise NotImplementedError

    @abstractmethod
    def open(self) -> Passage:
        """The way of another text."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError where the package it needs is not installed."""
        if self.package and find_spec(self.package) is None:
            hint = f'pip install "lmray[{self.name}]", here and where the endpoint runs'
            raise ConfigError("filters", f"`{self.name}` needs the package `{self.package}`", hint=hint)
