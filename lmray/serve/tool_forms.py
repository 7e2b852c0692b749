"""The forms of tool calls there are, and which of them a chat template asks for."""

from __future__ import annotations

from lmray.serve.tools import CallForm, Calls
from lmray.serve.tools_bare import Llama, Mistral
from lmray.serve.tools_tagged import Tagged

TAGGED = Tagged()
FORMS: tuple[CallForm, ...] = (TAGGED, Llama(), Mistral())


def form_of(template: object) -> CallForm | None:
    """The form in which a chat template asks for calls; None where it does not, or in one not known here."""
    return next((one for one in FORMS if one.is_of(template)), None) if isinstance(template, str) else None


def read_whole(answer: str) -> tuple[str, Calls]:
    """Text and calls of a whole answer in any form."""
    for form in FORMS:
        reading = form.reader()
        text, calls = reading.push(answer)
        rest, more = reading.finish()
        if calls + more:
            return text + rest, calls + more
    return answer, ()
