"""One tree of errors, each saying where, what was found, what is allowed, and a hint.

The command line prints an error as it stands and leaves with its `exit_code`: 1 the job failed, 2 the input is wrong.
Errors cross process borders (Ray pickles them), so every one can be rebuilt from its fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class LmrayError(Exception):
    """Base of everything lmray raises on purpose.

    `where`: file, dotted path, row or service; `found`: what is wrong there; `allowed`: what would be right;
    `hint`: what to do next.
    """

    exit_code = 1
    final = False
    """True where the same job would fail in the same way again: such a failure is not tried again."""

    def __init_subclass__(cls) -> None:
        cls.final = cls.final or cls.exit_code == 2

    def __init__(self, where: str, found: str, *, allowed: str | None = None, hint: str | None = None):
        super().__init__(where, found)
        self.where, self.found, self.allowed, self.hint = where, found, allowed, hint

    def __reduce__(self):
        return _rebuild, (type(self), self.__dict__)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}"]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


def _rebuild(cls: type[LmrayError], fields: dict) -> LmrayError:
    error = cls.__new__(cls)
    Exception.__init__(error, fields.get("where"), fields.get("found"))
    error.__dict__.update(fields)
    return error


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a job file: `where` is `file:line: dotted.path`."""

    where: str
    found: str
    allowed: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        return str(LmrayError(self.where, self.found, allowed=self.allowed, hint=self.hint))


class ConfigError(LmrayError):
    """A job that cannot be decoded or contradicts itself; carries every problem of the file at once."""

    exit_code = 2

    def __init__(self, where: str, found: str, *, allowed: str | None = None, hint: str | None = None):
        super().__init__(where, found, allowed=allowed, hint=hint)
        self.problems: tuple[Problem, ...] = (Problem(where, found, allowed, hint),)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> ConfigError:
        """One error that prints all `problems` (at least one), one below the other."""
        first = problems[0]
        error = cls(first.where, first.found, allowed=first.allowed, hint=first.hint)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DataError(LmrayError):
    """Training or evaluation data that is missing, malformed or empty."""

    exit_code = 2


class ArtifactError(LmrayError):
    """An artifact, model or stage that is unknown, corrupted or not what it says."""

    exit_code = 2


class CapacityError(LmrayError):
    """Something asked for (GPUs, workers, a port) that is not there."""

    exit_code = 2


class NoRoomError(CapacityError):
    """An adapter for which those that must stay leave no room."""


class CheckpointError(LmrayError):
    """A run's own state that cannot be written, read or trusted."""


class DivergenceError(LmrayError):
    """A training run whose loss is not finite any more, or ran away."""

    final = True


class OutOfMemoryError(LmrayError):
    """A training step, or a model to train, that there was not memory enough for. Raised on the rank that ran out
    alone."""

    final = True
    micro_batch: int | None = None
    """Rows of a forward pass with which the run can go on from its last checkpoint; None where it ends with this."""


class HangError(LmrayError):
    """A training run of which a step or a collective made no progress, again and again."""


class RemoteError(LmrayError):
    """A cluster or endpoint that does not answer, or answers with a failure."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest of `known`, or None when nothing is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else None
