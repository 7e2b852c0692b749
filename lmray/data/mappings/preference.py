"""Preferences: `prompt` with `chosen` and `rejected`, or `prompt`, `completion` and a `label` that is true or false.

Each may be text or turns (`role`/`content` or `from`/`value`). `chosen` and `rejected` may also be whole conversations;
then `prompt` is not read.
"""

from __future__ import annotations

from typing import Any, Literal

from lmray.data.base import Example, Mapping, Row
from lmray.data.turns import (
    Turn,
    check_answered,
    dialect_of,
    kind,
    optional_text,
    optional_tools,
    read_column,
    read_turns,
    with_system,
)
from lmray.errors import DataError


class Preference(Mapping):
    """A better and a worse answer, or one answer and whether it is wanted."""

    prompt: str = "prompt"
    input: str | None = None
    """Column that is added to a prompt of plain text on a line of its own. Rows without it have none."""
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    """Column that says whether `completion` is wanted, for rows without `chosen`."""
    system: str | None = None
    """Column with a system message. Empty: none."""
    tools: str | None = "tools"
    """Column with function schemas. Rows without it have none."""
    use: Literal["both", "chosen"] = "both"
    """`chosen`: the better answers alone, as conversations for supervised fine-tuning; rows whose label is false are
    passed over."""

    def takes(self, row: Row) -> bool:
        return self.use == "both" or self._is_pair(row) or label_of(row.value.get(self.label)) is not False

    def example(self, row: Row) -> Example:
        tools = optional_tools(row, self.tools)
        if not self._is_pair(row):
            label = label_of(read_column(row, self.label))
            if label is None:
                where = f"{row.where}: column `{self.label}`"
                raise DataError(where, f"holds {kind(row.value[self.label])}", allowed="true or false")
            label = label if self.use == "both" else None
            return Example(self._conversation(row, self.completion), row.where, row.value, tools=tools, label=label)
        chosen, rejected = self._conversation(row, self.chosen), self._conversation(row, self.rejected)
        if chosen[0] != rejected[0]:
            where = f"{row.where}: columns `{self.chosen}`, `{self.rejected}`"
            raise DataError(where, "begin with different turns", allowed="two answers to one prompt")
        worse = rejected if self.use == "both" else None
        return Example(chosen, row.where, row.value, tools=tools, rejected=worse)

    def _is_pair(self, row: Row) -> bool:
        return self.label not in row.value or self.chosen in row.value

    def _conversation(self, row: Row, column: str) -> tuple[Turn, ...]:
        where = f"{row.where}: column `{column}`"
        answer = _turns(read_column(row, column), where, "assistant")
        check_answered(answer, where)
        if answer[0]["role"] in ("system", "user"):  # a whole conversation
            return with_system(answer, optional_text(row, self.system))
        value = read_column(row, self.prompt)
        prompt = _turns(value, f"{row.where}: column `{self.prompt}`", "user")
        added = optional_text(row, self.input)
        if added and isinstance(value, str):
            prompt = (*prompt[:-1], {"role": "user", "content": "\n".join(filter(None, (value, added)))})
        return with_system((*prompt, *answer), optional_text(row, self.system))


def label_of(value: Any) -> bool | None:
    """A truth value, or how CSV writes one; None where `value` is neither."""
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())


def _turns(value: Any, where: str, role: str) -> tuple[Turn, ...]:
    """Turns in either dialect; text is one turn of `role`, and an object one turn."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    turns = [value] if isinstance(value, dict) else value
    return read_turns(turns, where, dialect_of(turns))
