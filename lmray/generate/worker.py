"""One worker: an engine with its model and adapters, which answers a shard at a time, all its rows side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lmray.artifacts.store import run_folder
from lmray.data.base import Prompt
from lmray.data.detokenise import AnswerText
from lmray.data.prompts import Question
from lmray.data.tokenise import prompt_ids
from lmray.engines._loading import load_for
from lmray.engines.base import Engine, Request
from lmray.errors import CapacityError, DataError, LmrayError
from lmray.generate.plan import GeneratePlan, Ready, answers_folder, check_same, make_plan, make_sampling, prepare
from lmray.generate.shards import Answered, ShardRecord, Shards
from lmray.job import GenerateJob
from lmray.models.load import stop_token_ids
from lmray.models.machine import keep_few_products
from lmray.models.precision import resolve_dtype

T = TypeVar("T")
PAUSES_S = (1.0, 5.0, 15.0, 45.0)
"""Before a server that is busy is asked again."""


class Worker:
    """Answers shards of `job` as `plan` says. Raises what `prepare` raises, and ArtifactError where this machine does
    not hold what was planned."""

    def __init__(self, job: GenerateJob, plan: GeneratePlan, *, device: str = "cpu", threads: int = 1):
        keep_few_products()
        self._job, self._ready = job, prepare(job, plan)
        check_same(plan, make_plan(job, self._ready))
        self._shards = shards_of(job, plan)
        self._loop = asyncio.Runner()
        self._engine = _start_engine(job, self._ready, device=device, threads=threads)
        self._loop.run(self._add_adapters())

    def answer(self, index: int) -> ShardRecord:
        """Answers shard `index` and keeps the answers. Raises LmrayError where the engine fails, or too many workers
        before this one died of it; RemoteError, ArtifactError or CapacityError where a server does not do its part. A
        row that cannot be answered has an error in the place of its answers."""
        self._shards.begin(index, max_failures=self._job.resources.max_failures)
        began = time.time()
        rows = {row: self._ready.questions[row] for row in self._shards.rows(index)}
        answered = self._loop.run(self._answer(rows, str(index)))
        return self._shards.write(index, answered, began=began, ended=time.time())

    def close(self) -> None:
        """Ends the engine."""
        self._loop.run(self._engine.close())
        self._loop.close()

    async def _add_adapters(self) -> None:
        for name, folder in {one.name: one.folder for one in self._ready.adapters.values()}.items():
            await self._engine.add_adapter(name, folder)

    async def _answer(self, rows: Mapping[int, Question], salt: str) -> list[Answered]:
        """Prompts are encoded before the first is asked, so that the engine gets them together. Only rows of a shard
        share what the engine keeps of common beginnings: an answer does not depend on the shards before."""
        encoded = {row: _encoded(self._ready.tokenizer, question.prompt) for row, question in rows.items()}
        return await _all(self._row(row, question, encoded[row], salt) for row, question in rows.items())

    async def _row(self, row: int, question: Question, ids: tuple[int, ...] | DataError, salt: str) -> Answered:
        named = question.adapter or self._job.adapter
        adapter = self._ready.adapters[named].name if named else None
        answered: Answered = {"index": row, "id": question.id, "adapter": adapter, "choices": []}
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        try:
            if isinstance(ids, DataError):
                raise ids
            requests = [
                Request(f"{row}-{place}", ids, make_sampling(self._job, row, place), adapter, cache_salt=salt)
                for place in range(self._job.sampling.n)
            ]
            said = await _all(self._choice(request) for request in requests)
        except LmrayError as error:
            is_the_rows = isinstance(error, DataError) or type(error) is LmrayError
            if not is_the_rows or self._engine.stats()["failure"] is not None:
                raise
            return answered | {"usage": usage, "error": _one_line(error)}
        choices = [{"index": place, "text": text, "finish_reason": why} for place, (text, why, _) in enumerate(said)]
        usage = {"prompt_tokens": len(ids), "completion_tokens": sum(count for _, _, count in said)}
        return answered | {"choices": choices, "usage": usage, "error": None}

    async def _choice(self, request: Request) -> tuple[str, str, int]:
        """As `_asked`; a server that is busy is given time."""
        for pause_s in PAUSES_S:
            with suppress(CapacityError):
                return await self._asked(request)
            await asyncio.sleep(pause_s)
        return await self._asked(request)

    async def _asked(self, request: Request) -> tuple[str, str, int]:
        """Text, finish reason and number of tokens of one answer."""
        tokenizer, pieces, count = self._ready.tokenizer, list[str](), 0
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        said = AnswerText(lambda ids: str(tokenizer.decode(ids, **options)), self._job.sampling.stop)
        async with aclosing(self._engine.submit(request)) as events:
            async for event in events:
                count += event.token_id is not None
                piece, reason = said.push(event.token_id, event.finish_reason)
                pieces.append(piece)
                if reason is not None:
                    return "".join(pieces), reason, count
        raise LmrayError(f"request {request.id}", "the answer broke off")


def shards_of(job: GenerateJob, plan: GeneratePlan) -> Shards:
    """The shards of `job` on disk."""
    sizes = {"num_rows": plan.data["rows"], "size": job.output.shard_size}
    return Shards(run_folder(job), answers_folder(job), **sizes, suffixes=job.output.suffixes)


def _start_engine(job: GenerateJob, ready: Ready, *, device: str, threads: int) -> Engine:
    dtype, _ = resolve_dtype(job.model.dtype, device)
    how: Any = {name: getattr(job.model, name) for name in ("quantization", "rope_scaling", "trust_remote_code")}
    model = load_for(job.engine, ready.model.folder, dtype=dtype, device=device, **how)
    stops = stop_token_ids(model, ready.tokenizer)
    needs_none = job.engine.needs_weights and job.sampling.json_schema is None  # such read it for grammars alone
    tokenizer = None if needs_none else ready.tokenizer
    return job.engine.start(model, stop_token_ids=stops, threads=threads, tokenizer=tokenizer)


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...] | DataError:
    """The prompt's tokens, or why it has none; plain text begins as the tokenizer begins one."""
    try:
        if prompt.text is not None:
            return tuple(tokenizer(prompt.text)["input_ids"])  # type: ignore[arg-type]
        return prompt_ids(tokenizer, prompt.messages, prompt.tools)
    except Exception as error:  # a template is a program of the model's own, and half a surrogate pair is no text
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return DataError(prompt.where, f"cannot be put to the model: {first[:200]}")


async def _all(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of `asked` give; where one raises, its error, once the others have been ended."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _one_line(error: LmrayError) -> str:
    """What was found and what would help, without the place: the row says that."""
    said = [error.found, error.allowed and f"allowed: {error.allowed}", error.hint and f"hint: {error.hint}"]
    return "; ".join(part for part in said if part)
