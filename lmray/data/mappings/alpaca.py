"""Instructions as Stanford Alpaca wrote them: `instruction`, `input`, `output`; LLaMA-Factory adds `system`,
`history`."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Prompt, Row
from lmray.data.turns import Turn, kind, optional_text, optional_tools, parse_list, read_text, with_system
from lmray.errors import DataError


class Alpaca(Mapping):
    """One instruction with an optional input, after the turns of an optional history."""

    instruction: str = "instruction"
    input: str | None = "input"
    """Column that is added to the instruction on a line of its own. Rows without it have none."""
    output: str = "output"
    system: str | None = "system"
    """Column with a system message. Rows without it have none."""
    history: str | None = "history"
    """Column with earlier turns as `[[instruction, output], ...]`. Rows without it have none."""
    tools: str | None = "tools"
    """Column with function schemas. Rows without it have none."""

    def example(self, row: Row) -> Example:
        prompt = self.prompt_turns(row)
        messages = (*prompt, {"role": "assistant", "content": read_text(row, self.output)})
        return Example(messages, row.where, columns=row.value, tools=optional_tools(row, self.tools))

    def question(self, row: Row) -> Prompt:
        return Prompt(self.prompt_turns(row), row.where, tools=optional_tools(row, self.tools))

    def prompt_turns(self, row: Row) -> tuple[Turn, ...]:
        """System, history and instruction. Raises DataError naming the column."""
        parts = (read_text(row, self.instruction), optional_text(row, self.input))
        asked = {"role": "user", "content": "\n".join(part for part in parts if part)}
        return with_system((*self._history(row), asked), optional_text(row, self.system))

    def _history(self, row: Row) -> list[Turn]:
        value = row.value.get(self.history) if self.history else None
        where = f"{row.where}: column `{self.history}`"
        pairs = parse_list(value, where) if value else []
        if not isinstance(pairs, list):
            raise DataError(where, f"holds {kind(pairs)}", allowed="a list of [instruction, output]")
        turns = []
        for index, pair in enumerate(pairs, start=1):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise DataError(f"{where}, pair {index}", "is no pair of texts", allowed="[instruction, output]")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return turns
