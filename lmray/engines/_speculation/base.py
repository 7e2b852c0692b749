"""Speculative decoding: somebody cheap proposes the next tokens of a sequence, and the model reads them all in one step
(Leviathan et al., arXiv 2211.17192). What is drawn stays what it would have been.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Sequence_
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from lmray.config import MemberConfig
from lmray.engines._schedule import Limits, Sequence


class Proposer(Protocol):
    """Proposes tokens for the sequences of one engine."""

    def propose(self, asked: Sequence_[tuple[Sequence, int]]) -> list[list[int]]:
        """For each sequence up to so many tokens to follow its own; its blocks have room for them."""
        ...

    def forget(self, blocks: Sequence_[int]) -> None:
        """`blocks` were handed out anew."""
        ...


class Speculation(MemberConfig):
    """Base of `lmray/engines/_speculation/*.py`."""

    num_tokens: Annotated[int, Field(ge=1, le=16)] = 4
    """Tokens that are proposed at most to a sequence in a step; fewer, or none, where that pays better."""

    @property
    def source(self) -> str | None:
        """Of a draft model, written like `model.source`; None: it needs none."""
        return None

    def with_source(self, folder: Path) -> Speculation:
        """The same with that model as a folder of this machine, as `check` and `start` want it."""
        return self

    def check(self, model: Any) -> None:
        """Raises ConfigError for a draft that cannot propose to `model`, which needs no weights."""

    @abstractmethod
    def start(self, model: Any, limits: Limits) -> Proposer:
        """A proposer for an engine over `model`. Raises what `check` raises."""
        raise NotImplementedError
