"""Conversations as the field writes them: `messages: [{role, content}, ...]`, the last turn the assistant's.

With tools: a column of function schemas, assistant turns with `tool_calls`, turns of `tool` with what came back.
"""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Prompt, Row
from lmray.data.turns import check_answered, optional_tools, read_column, read_turns, without_answer


class Messages(Mapping):
    """One column with a list of turns."""

    column: str = "messages"
    tools: str | None = "tools"
    """Column with the function schemas that the conversation may call. Rows without it have none."""

    def example(self, row: Row) -> Example:
        where = f"{row.where}: column `{self.column}`"
        messages = read_turns(read_column(row, self.column), where)
        check_answered(messages, where)
        return Example(messages, row.where, columns=row.value, tools=optional_tools(row, self.tools))

    def question(self, row: Row) -> Prompt:
        where = f"{row.where}: column `{self.column}`"
        messages = without_answer(read_turns(read_column(row, self.column), where), where)
        return Prompt(messages, row.where, tools=optional_tools(row, self.tools))
