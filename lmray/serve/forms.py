"""The two forms of OpenAI's completions: how what is asked becomes prompts, and how answers look on the wire."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lmray.data.filters.base import TextFilter
from lmray.data.pieces import Messages, Tools
from lmray.data.tokenise import prompt_ids
from lmray.engines.base import Request
from lmray.serve.answer import Answer, Piece, Question
from lmray.serve.failures import RequestError
from lmray.serve.json_text import changed_values
from lmray.serve.openai import ChatRequest, CompletionRequest, GenerationRequest
from lmray.serve.tokens import chat_logprobs, prompt_logprobs, text_logprobs
from lmray.serve.tool_forms import TAGGED, form_of

Choice = dict[str, Any]
"""One entry of `choices`."""
MAX_TOLD = 2**20
"""Log probabilities in one answer: tokens times what is told of each. More would fill the gateway's memory."""


class Form(Protocol):
    """One HTTP request in its form."""

    id: str
    param: str
    """The field that holds the prompt."""
    whole_object: str
    piece_object: str

    @property
    def asked(self) -> GenerationRequest:
        """What was sent."""
        ...

    def questions(self) -> list[Question]:
        """The prompts. Raises RequestError for what the model cannot be asked."""
        ...

    def rewrite(self, change: Callable[[str], str]) -> bool:
        """Puts every text of the prompts through `change`; whether that changed any."""
        ...

    def answer(self, question: Question, filters: Sequence[TextFilter]) -> Answer:
        """An answer before its first token, that goes out through `filters`."""
        ...

    def opening(self, index: int) -> list[Choice]:
        """What is streamed before an answer's first piece."""
        ...

    def streamed(self, index: int, piece: Piece) -> Iterator[Choice]:
        """`piece` of answer `index`, in as many chunks as it takes."""
        ...

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        """Answer `index`, of which these are all pieces."""
        ...


class Chat:
    """`POST /v1/chat/completions`."""

    param, whole_object, piece_object = "messages", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: ChatRequest, tokenizer: PreTrainedTokenizerBase):
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.asked, self._tokenizer = asked, tokenizer
        self._messages = [message.plain() for message in asked.messages]
        self._form = form_of(tokenizer.chat_template)
        asked.written_in(self._form or TAGGED)
        self._num_calls: dict[int, int] = {}

    def rewrite(self, change: Callable[[str], str]) -> bool:
        """What is said, and what functions were called with; not the tools, which are the application's own words."""
        before, self._messages = self._messages, [_rewritten(message, change) for message in self._messages]
        return self._messages != before

    def questions(self) -> list[Question]:
        messages, tools = self._messages, self.asked.offered_tools
        try:
            ids = prompt_ids(self._tokenizer, messages, tools)
            _check_shown(self._tokenizer, messages, tools, ids)
        except TemplateError as error:
            raise RequestError("messages", f"the model's chat template refuses them: {error}") from None
        return [Question(ids, "")]

    def answer(self, question: Question, filters: Sequence[TextFilter]) -> Answer:
        """Its calls are read where the template asks for a form we know, or a grammar for one."""
        asked, calls = self.asked, None
        form = self._form or (None if asked.grammar is None else TAGGED)
        if asked.offered_tools and form is not None:
            calls = form.reader({tool.function.name for tool in asked.tools}, asked.max_calls)
        return Answer(self._tokenizer, asked.stop_strings, calls=calls, filters=filters)

    def opening(self, index: int) -> list[Choice]:
        return [_chat_chunk(index, {"role": "assistant", "content": ""})]

    def streamed(self, index: int, piece: Piece) -> Iterator[Choice]:
        if piece.text or piece.told:
            told = chat_logprobs(self._tokenizer, piece.told) if piece.told else None
            yield _chat_chunk(index, {"content": piece.text}, logprobs=told)
        start = self._num_calls.get(index, 0)
        for place, call in enumerate(piece.calls, start=start):
            yield _chat_chunk(index, {"tool_calls": [{"index": place, **call}]})
        self._num_calls[index] = start + len(piece.calls)
        if piece.finish_reason is not None:
            yield _chat_chunk(index, {}, finish_reason=piece.finish_reason)

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        text, calls = "".join(piece.text for piece in pieces), [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text.strip() or None, "tool_calls": calls}
        asked = self.asked.num_logprobs is not None
        told = chat_logprobs(self._tokenizer, [one for piece in pieces for one in piece.told]) if asked else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": pieces[-1].finish_reason}


class Completion:
    """`POST /v1/completions`."""

    param, whole_object, piece_object = "prompt", "text_completion", "text_completion"

    def __init__(self, asked: CompletionRequest, tokenizer: PreTrainedTokenizerBase):
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.asked, self._tokenizer = asked, tokenizer
        self._prompts = asked.prompt

    def rewrite(self, change: Callable[[str], str]) -> bool:
        """A prompt of tokens stays as it is where its text does."""
        before = self._prompts
        texts = [(one, one if isinstance(one, str) else self._text(one)) for one in before]
        changed = [(one, text, change(text)) for one, text in texts]
        self._prompts = tuple(one if new == text else self._as_sent(one, new) for one, text, new in changed)
        return self._prompts != before

    def _as_sent(self, prompt: str | tuple[int, ...], text: str) -> str | tuple[int, ...]:
        """`text` as text or as tokens, whichever `prompt` was; tokens bring their own first one."""
        if isinstance(prompt, str):
            return text
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def questions(self) -> list[Question]:
        return [self._question(prompt) for prompt in self._prompts]

    def _question(self, prompt: str | tuple[int, ...]) -> Question:
        if isinstance(prompt, str):
            return Question(tuple(self._tokenizer(prompt)["input_ids"]), prompt)  # type: ignore[arg-type]
        if (odd := next((token for token in prompt if not 0 <= token < len(self._tokenizer)), None)) is not None:
            allowed = f"0 to {len(self._tokenizer) - 1}"
            raise RequestError("prompt", f"token {odd} is none of the model's", allowed=allowed)
        return Question(prompt, self._text(prompt) if self.asked.echo else "")

    def _text(self, prompt: tuple[int, ...]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(prompt), **options))

    def answer(self, question: Question, filters: Sequence[TextFilter]) -> Answer:
        echo = question if self.asked.echo else None
        return Answer(self._tokenizer, self.asked.stop_strings, echo=echo, filters=filters)

    def opening(self, index: int) -> list[Choice]:
        return []

    def streamed(self, index: int, piece: Piece) -> Iterator[Choice]:
        if piece.text or piece.told or piece.finish_reason is not None:
            yield self._choice(index, piece.text, piece.told, piece.finish_reason)

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        text, told = "".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.told]
        choice = self._choice(index, text, told, pieces[-1].finish_reason)
        if self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, pieces[0].read)
        return choice

    def _choice(self, index: int, text: str, told: Sequence[Any], finish_reason: str | None) -> Choice:
        logprobs = text_logprobs(self._tokenizer, told) if self.asked.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def engine_requests(
    form: Form, adapter: str | None, max_length: int, *, cache_salt: str = ""
) -> list[tuple[Request, Question]]:
    """What the engine is asked, in the order of `choices`: the answers to the first prompt, then to the next. Raises
    RequestError for a prompt that the model cannot be asked, or that leaves no room for an answer."""
    found: list[tuple[Request, Question]] = []
    questions, asked = form.questions(), form.asked
    alone = len(questions) * asked.n == 1
    for question in questions:
        room = max_length - len(question.ids)
        if room < min(1, asked.limit(1)):
            raise _too_long(form.param, len(question.ids), max_length)
        for place in range(asked.n):
            name = form.id if alone else f"{form.id}-{len(found)}"
            sampling = asked.sampling(room, place)
            found.append((Request(name, question.ids, sampling, adapter, cache_salt), question))
    _check_told([request for request, _ in found])
    return found


def _check_told(requests: Sequence[Request]) -> None:
    """Raises RequestError for more log probabilities than one answer holds."""
    told = 0
    for request in requests:
        sampling = request.sampling
        told += 0 if sampling.logprobs is None else sampling.max_tokens * (1 + sampling.logprobs)
        told += 0 if sampling.prompt_logprobs is None else len(request.prompt_ids) * (1 + sampling.prompt_logprobs)
    if told > MAX_TOLD:
        hint = "lower `n`, `max_tokens` or how many are told of each token, or send fewer prompts"
        raise RequestError("logprobs", f"come to {told}", allowed=f"up to {MAX_TOLD} in one answer", hint=hint)


def _too_long(param: str, num_tokens: int, max_length: int) -> RequestError:
    what, hint = {
        "messages": ("the messages are", "leave out earlier turns"),
        "prompt": ("the prompt is", "shorten it"),
    }[param]
    found, allowed = f"{what} {num_tokens} tokens long", f"at most {max_length - 1} tokens"
    return RequestError(param, found, allowed=allowed, hint=hint)


def _rewritten(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": changed_values(call["function"]["arguments"], change)}}
        for call in message.get("tool_calls", ())
    ]
    said = {field: change(message[field]) for field in ("content", "name") if field in message}
    return {**message, **said} | ({"tool_calls": calls} if calls else {})


def _chat_chunk(index: int, delta: Any, *, logprobs: Any = None, finish_reason: str | None = None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _check_shown(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools, ids: tuple[int, ...]) -> None:
    """Raises RequestError where the model would be asked the same without the tools, or without earlier calls."""
    if tools and prompt_ids(tokenizer, messages) == ids:
        hint = "leave them out, or serve a model that was trained to call functions"
        raise RequestError("tools", "the model's chat template has no place for them", hint=hint)
    silent = [{key: value for key, value in one.items() if key != "tool_calls"} for one in messages]
    if silent != messages and prompt_ids(tokenizer, silent, tools) == ids:
        raise RequestError("messages", "the model's chat template has no place for `tool_calls`")
