"""LMFlow's files: `{"type": TYPE, "instances": [...]}`; every instance is a row that carries its file's type."""

from __future__ import annotations

from lmray.data.base import Example, Mapping, Row
from lmray.data.mappings.alpaca import Alpaca
from lmray.data.mappings.messages import Messages
from lmray.data.mappings.text import Text
from lmray.data.turns import optional_text, with_system
from lmray.errors import DataError, did_you_mean

READ = {
    "text_only": Text(),
    "text2text": Alpaca(instruction="input", input=None, system=None, history=None, tools=None),
    "conversation": Messages(),
}
KNOWN = (
    *READ,
    "paired_conversation",
    "paired_text_to_text",
    "text_to_textlist",
    "text_to_scored_textlist",
    "float_only",
    "image_text",
)
"""Types that LMFlow writes."""


class Lmflow(Mapping):
    """Types `text_only` (plain text), `text2text` (one turn each) and `conversation` (with `system` and `tools`)."""

    def takes(self, row: Row) -> bool:
        return row.value.get("type") != "text_only" or READ["text_only"].takes(row)

    def example(self, row: Row) -> Example:
        found = row.value.get("type")
        if not isinstance(found, str) or found not in READ:
            hint = did_you_mean(str(found), READ)
            if found in ("paired_conversation", "paired_text_to_text"):
                hint = "write pairs as rows with `prompt`, `chosen`, `rejected`"
            raise DataError(f"{row.where}: column `type`", f"is {found!r}", allowed=", ".join(READ), hint=hint)
        example = READ[found].example(row)
        if found != "conversation":
            return example
        messages = with_system(example.messages, optional_text(row, "system"))
        return Example(messages, row.where, columns=row.value, tools=example.tools)
