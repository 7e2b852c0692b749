"""Examples to pieces of text, each learned or only read, before anything is encoded.

The tokenizer's own chat template is rendered up to each assistant turn and through it. The border between prompt and
answer is that between the two renderings, so it needs no markers in the template. Where a template renders earlier
turns anew (reasoning models leave earlier thoughts out), every turn from there on is a document of its own, whose
prompt is what the model will be asked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmray.data.base import Example
from lmray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is encoded by itself."""

    text: str
    supervised: bool
    context: str = ""
    """Encoded before it and cut off again: what it follows may change how a tokenizer begins a text."""


Document = tuple[Piece, ...]
"""The pieces of one sequence of tokens."""


@dataclass(frozen=True)
class Conventions:
    """How a tokenizer begins and ends things."""

    stops: Mapping[str, int]
    """Tokens that end an answer, and their ids."""
    start: str | None
    """The token it puts before every document itself."""
    anchor: str
    """Context of a text that goes on: without it, tokenizers that put a space before a text would put one in the
    middle. Empty where there is no such space."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int] = ()) -> Conventions:
        """Those of `tokenizer`; `stop_token_ids` end an answer besides its own end of sequence."""
        ids = dict.fromkeys((tokenizer.eos_token_id, *stop_token_ids))
        named = {tokenizer.convert_ids_to_tokens(id): id for id in ids if isinstance(id, int)}
        stops = {
            token: id for token, id in named.items() if isinstance(token, str) and encode(tokenizer, token) == [id]
        }
        starts = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # type: ignore[index]
        apart, after = encode(tokenizer, "x"), encode(tokenizer, "\nx")
        goes_on = after[len(encode(tokenizer, "\n")) :] == apart
        return cls(stops, str(tokenizer.bos_token) if starts else None, "" if goes_on else "\n")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text`, whose special tokens are written out; nothing is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, ask: bool, tools: Tools = None) -> str:
    """`messages` in the tokenizer's chat template; `ask` adds the opening of the assistant's turn."""
    given = None if tools is None else list(tools)
    return tokenizer.apply_chat_template(list(messages), tools=given, tokenize=False, add_generation_prompt=ask)  # type: ignore[return-value, arg-type]


def documents(example: Example, turns: Sequence[Turn], conventions: Conventions) -> Iterator[Document]:
    """What becomes of `example`, whose `turns` are rendered: one document, or more where the template renders earlier
    turns anew. Raises DataError where a turn's place cannot be told exactly."""
    if example.text is not None:
        yield _text(example, conventions)
        return
    pieces: list[Piece] = []
    done, last, all_learned = "", "", not example.assistant_only_loss
    for turn in turns:
        if not turn.answered.startswith(turn.asked):
            hint = "the chat template does not go on from its own generation prompt; mend it"
            raise DataError(turn.where, "its place in the template cannot be told exactly", hint=hint)
        if not turn.asked.startswith(done):
            yield tuple(pieces)
            pieces, done, last = [], "", ""
        answer, last_here = _through_stop(conventions.stops, turn)
        pieces.append(Piece(turn.asked[len(done) :], all_learned, context=last))
        pieces.append(Piece(answer, all_learned or turn.supervised, context=conventions.anchor))
        done, last = turn.asked + answer, last_here
    yield tuple(pieces)


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn in the template."""

    asked: str
    """Everything before it, and the opening of the turn."""
    answered: str
    """Everything through it."""
    where: str
    supervised: bool


def rendered_turns(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, mask_history: bool
) -> list[list[Turn]]:
    """The assistant turns of every example; one that opens a conversation was not asked for and is read only. With
    `mask_history`, the last one alone is supervised."""
    places = [
        (number, index)
        for number, example in enumerate(examples)
        for index, message in enumerate(example.messages)
        if message["role"] == "assistant" and index > 0
    ]
    asked = _render_all(tokenizer, [(examples[number], index) for number, index in places], ask=True)
    answered = _render_all(tokenizer, [(examples[number], index + 1) for number, index in places], ask=False)
    turns: list[list[Turn]] = [[] for _ in examples]
    final = dict(places)
    for (number, index), before, through in zip(places, asked, answered, strict=True):
        where = f"{examples[number].where}, turn {index + 1}"
        turns[number].append(Turn(before, through, where, not mask_history or index == final[number]))
    return turns


def _render_all(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[Example, int]], *, ask: bool) -> list[str]:
    """The first messages of each example in the template; together where no tools differ, which is faster."""
    plain = [list(example.messages[:end]) for example, end in parts if example.tools is None]
    try:
        together: Any = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask) if plain else ()
    except Exception:
        together = (None for _ in plain)  # one by one, to name the example
    known = iter(together)
    texts = (next(known) if example.tools is None else None for example, _ in parts)
    return [
        _render_one(tokenizer, *part, ask=ask) if text is None else text
        for part, text in zip(parts, texts, strict=True)
    ]


def _render_one(tokenizer: PreTrainedTokenizerBase, example: Example, end: int, *, ask: bool) -> str:
    try:
        return render(tokenizer, example.messages[:end], ask=ask, tools=example.tools)
    except Exception as error:  # a template is a program of the model's own
        hint = "change the conversation (order of roles, system message, content), or the model's chat template"
        raise DataError(
            f"{example.where}, turn {end}", f"the chat template refuses the conversation: {error}", hint=hint
        ) from None


def _through_stop(stops: Mapping[str, int], turn: Turn) -> tuple[str, str]:
    """The answer with its stop token, and that token."""
    text = turn.answered[len(turn.asked) :]
    end, stop = max(((text.rfind(stop), stop) for stop in stops), default=(-1, ""))
    if not text.strip():
        hint = "the model would learn nothing; give it a chat template that renders assistant turns"
        raise DataError(turn.where, "the chat template leaves the assistant's turn out", hint=hint)
    if end < 0:
        named = ", ".join(map(repr, stops)) or "(the tokenizer names none)"
        hint = "a model trained so would never stop; mend the chat template or the tokenizer's `eos_token`"
        raise DataError(turn.where, f"the template ends the assistant's turn without the stop token {named}", hint=hint)
    return text[: end + len(stop)], stop


def _text(example: Example, conventions: Conventions) -> Document:
    """A document as the tokenizer begins one, ended by one stop token."""
    text, start = example.text or "", conventions.start
    stop = next(iter(conventions.stops), None)
    if stop is None:
        hint = "set `eos_token` in tokenizer_config.json"
        raise DataError(example.where, "the tokenizer names no token that ends a document", hint=hint)
    pieces = (Piece(text.removesuffix(stop), True), Piece(stop, True))
    return (Piece(start, True), *pieces) if start and not text.startswith(start) else pieces
