"""Any two columns as prompt and completion."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Row
from lmray.errors import DataError


class Columns(Mapping):
    """`{prompt: COLUMN, completion: COLUMN}`: one user turn, one assistant turn."""

    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = None
    """Column with a system message. Empty: none."""

    def example(self, row: Row) -> Example:
        roles = {"system": self.system, "user": self.prompt, "assistant": self.completion}
        messages = tuple({"role": role, "content": text_of(row, column)} for role, column in roles.items() if column)
        return Example(messages, row.where, columns=row.value)


def text_of(row: Row, column: str) -> str:
    """The text in `column` of `row`. Raises DataError naming file, row and column."""
    if column not in row.value:
        raise DataError(
            f"{row.where}: column `{column}`", "is missing", allowed=", ".join(row.value) or "no columns here"
        )
    value = row.value[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column `{column}`", f"holds a {type(value).__name__}", allowed="text")
    return value
