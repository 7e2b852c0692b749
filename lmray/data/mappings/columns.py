"""Any two columns as prompt and completion."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Prompt, Row
from lmray.data.turns import (
    Turn,
    check_answered,
    dialect_of,
    optional_tools,
    read_column,
    read_text,
    read_turns,
    without_answer,
)


class Columns(Mapping):
    """`{prompt: COLUMN, completion: COLUMN}`: one user turn, one assistant turn; or both columns lists of turns."""

    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = None
    """Column with a system message. Empty: none."""

    def example(self, row: Row) -> Example:
        if isinstance(row.value.get(self.prompt), list) and isinstance(row.value.get(self.completion), list):
            return self._conversation(row)
        roles = {"system": self.system, "user": self.prompt, "assistant": self.completion}
        messages = tuple({"role": role, "content": read_text(row, column)} for role, column in roles.items() if column)
        return Example(messages, row.where, columns=row.value)

    def _conversation(self, row: Row) -> Example:
        turns = []
        for column in (self.prompt, self.completion):
            value = read_column(row, column)
            turns += read_turns(value, f"{row.where}: column `{column}`", dialect_of(value))
        check_answered(tuple(turns), f"{row.where}: column `{self.completion}`")
        if self.system:
            turns = [{"role": "system", "content": read_text(row, self.system)}, *turns]
        return Example(tuple(turns), row.where, columns=row.value, tools=optional_tools(row, "tools"))

    def question(self, row: Row) -> Prompt:
        value, where = read_column(row, self.prompt), f"{row.where}: column `{self.prompt}`"
        if isinstance(value, list):
            asked = without_answer(read_turns(value, where, dialect_of(value)), where)
        else:
            asked = ({"role": "user", "content": read_text(row, self.prompt)},)
        system: tuple[Turn, ...] = ()
        if self.system:
            system = ({"role": "system", "content": read_text(row, self.system)},)
        return Prompt((*system, *asked), row.where, tools=optional_tools(row, "tools"))
