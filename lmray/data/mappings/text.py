"""Plain text for continual pre-training: a column, or the whole of a `.txt` file."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Row
from lmray.data.turns import read_text


class Text(Mapping):
    """One column of text; every token is supervised and no chat template is applied. Blank rows are passed over."""

    column: str = "text"

    def takes(self, row: Row) -> bool:
        value = row.value.get(self.column)
        return not isinstance(value, str) or bool(value.strip())

    def example(self, row: Row) -> Example:
        return Example((), row.where, columns=row.value, text=read_text(row, self.column))
