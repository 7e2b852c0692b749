"""Conversations as ShareGPT wrote them: `conversations: [{from, value}, ...]`, with the tags LLaMA-Factory lets a data
set choose."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Prompt, Row
from lmray.data.turns import (
    SHAREGPT,
    Dialect,
    Turn,
    check_answered,
    optional_text,
    optional_tools,
    read_column,
    read_turns,
    with_system,
    without_answer,
)


class Sharegpt(Mapping):
    """One column with turns of `human`, `gpt`, `system`, `observation` (what a tool gave) and `function_call`."""

    conversations: str = "conversations"
    system: str | None = "system"
    """Column with a system message, for conversations that hold none. Rows without it have none."""
    tools: str | None = "tools"
    """Column with function schemas, as a list or its JSON text. Rows without it have none."""
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    """Role of turns that hold calls as JSON: `{"name", "arguments"}`, or a list of those."""
    system_tag: str = "system"

    def example(self, row: Row) -> Example:
        messages = self.turns(row)
        check_answered(messages, f"{row.where}: column `{self.conversations}`")
        return Example(messages, row.where, columns=row.value, tools=optional_tools(row, self.tools))

    def question(self, row: Row) -> Prompt:
        asked = without_answer(self.turns(row), f"{row.where}: column `{self.conversations}`")
        return Prompt(asked, row.where, tools=optional_tools(row, self.tools))

    def turns(self, row: Row) -> tuple[Turn, ...]:
        """The conversation after its system message. Raises DataError naming the turn that is wrong."""
        where = f"{row.where}: column `{self.conversations}`"
        turns = read_turns(read_column(row, self.conversations), where, self.dialect)
        return with_system(turns, optional_text(row, self.system))

    @property
    def dialect(self) -> Dialect:
        own = {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.system_tag: "system",
            self.observation_tag: "tool",
            self.function_tag: "function_call",
        }
        return Dialect(self.role_tag, self.content_tag, {**SHAREGPT.roles, **own})
