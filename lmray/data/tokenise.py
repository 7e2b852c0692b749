"""Conversations to token ids with an exact loss mask: supervised are the assistant's tokens and the stop token after
them.

The tokenizer's own chat template is rendered up to each answer and through it; prompt and answer are encoded apart,
as they are when the model is asked later, so that no token straddles the border. Special tokens come from the
template alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lmray.data.base import Example
from lmray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Tokenised:
    """One example: `labels[t]` is `input_ids[t]` where it is supervised, else IGNORED."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str = field(default="", compare=False)
    """`file:row` of the example."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens a loss is taken on; the first has nothing before it to predict it from."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class TokenisedData:
    """Examples that fit, and what became of those that did not."""

    examples: tuple[Tokenised, ...]
    num_dropped: int = 0
    num_truncated: int = 0


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text`, whose special tokens are written out; nothing is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
    """`messages` in the tokenizer's chat template; `ask` adds the opening of the assistant's turn."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)  # type: ignore[return-value]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Ids that ask the assistant to answer `messages`."""
    return tuple(encode(tokenizer, render(tokenizer, messages, ask=True)))


def tokenise(tokenizer: PreTrainedTokenizerBase, example: Example) -> Tokenised:
    """`example` as ids and labels. Raises DataError where the template rewrites earlier turns or ends without a
    stop."""
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, example.messages[:index], ask=True)
        answered = render(tokenizer, example.messages[: index + 1], ask=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            hint = "the chat template changes earlier turns; keep one assistant turn an example"
            raise DataError(
                f"{example.where}, turn {index + 1}", "its place in the template cannot be told exactly", hint=hint
            )
        answer, rest = _through_stop(tokenizer, answered[len(asked) :], f"{example.where}, turn {index + 1}")
        for text, supervised in ((asked[len(done) :], False), (answer, True), (rest, False)):
            piece = encode(tokenizer, text)
            ids += piece
            labels += piece if supervised else [IGNORED] * len(piece)
        done = answered
    last = max((place for place, label in enumerate(labels) if label != IGNORED), default=-1)
    return Tokenised(tuple(ids[: last + 1]), tuple(labels[: last + 1]), example.where)


def _through_stop(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> tuple[str, str]:
    stop = tokenizer.eos_token
    end = text.rfind(stop) if isinstance(stop, str) else -1
    if end < 0:
        hint = "a model trained so would never stop; mend the chat template"
        raise DataError(where, f"the template ends the assistant's turn without the stop token {stop!r}", hint=hint)
    assert isinstance(stop, str)
    return text[: end + len(stop)], text[end + len(stop) :]


def tokenise_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, over_long: str
) -> TokenisedData:
    """All `examples`, longer ones dropped, cut at the end, or refused. Raises DataError where nothing supervised is
    left."""
    kept, dropped, truncated = [], 0, 0
    first = None
    for example in examples:
        tokens = tokenise(tokenizer, example)
        first = first or example.where
        if len(tokens) > max_length:
            if over_long == "error":
                hint = "raise `max_length`, or `over_long: drop`"
                raise DataError(
                    example.where, f"is {len(tokens)} tokens long", allowed=f"at most {max_length}", hint=hint
                )
            if over_long == "drop":
                dropped += 1
                continue
            truncated += 1
            tokens = replace(tokens, input_ids=tokens.input_ids[:max_length], labels=tokens.labels[:max_length])
        kept.append(tokens)
    supervised = sum(tokens.num_supervised for tokens in kept)
    if examples and supervised == 0:
        found = f"no supervised token in {len(examples)} example(s), {dropped} too long"
        hint = f"`max_length` is {max_length}; see whether the answers are empty"
        raise DataError(f"{first} and after", found, allowed="at least one answer token", hint=hint)
    return TokenisedData(tuple(tokens for tokens in kept if tokens.num_supervised), dropped, truncated)
