"""Which answers are scored, when, how, and what is left of them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Sequence

import pytest

from lmray.artifacts.file_store import FileStore
from lmray.config.monitor import Monitor
from lmray.data.filters.regex import Regex
from lmray.engines.base import Request, Sampling, TokenEvent, TokenLogprob
from lmray.errors import LmrayError, RemoteError
from lmray.serve import sampled, samples
from lmray.serve.drift import Drift
from lmray.serve.sampled import SampledReplicas, Scoring
from lmray.serve.samples import KeptAnswers, Scorer

VERSION = "helper@aaaaaaaaaaaa"
SECRET = "the client's secret"


class Replicas:
    """Answers with `ids`; the base model finds token i of what it reads to have log probability -i."""

    def __init__(self, ids: Sequence[int] = ()):
        self.ids = tuple(ids)
        self.read: list[Request] = []
        self.error: LmrayError | None = None
        self.begins = asyncio.Event()
        self.begins.set()
        self.tells = True

    async def stream(self, request: Request):
        if request.sampling.max_tokens == 0:
            self.read.append(request)
            told = (None, *(TokenLogprob(one, -float(place)) for place, one in enumerate(request.prompt_ids[1:], 1)))
            yield TokenEvent(request.id, None, "length", prompt_logprobs=told if self.tells else None)
            return
        await self.begins.wait()
        for token_id in self.ids:
            yield TokenEvent(request.id, token_id)
        if self.error is not None:
            raise self.error
        yield TokenEvent(request.id, None, "stop")

    async def everywhere(self, method: str, *arguments):
        return [method, *arguments]


class Place:
    """Sampled replicas over a store."""

    def __init__(self, store: FileStore, tokenizer, replicas: Replicas, **settings):
        told = Monitor(**{"sample_fraction": 1.0, **settings})
        self.drift, self.scores = Drift(store, "endpoint", told), []
        add = self.drift.add

        async def noted(version: str, scores) -> None:
            self.scores.append((version, scores))
            await add(version, scores)

        self.drift.add = noted  # type: ignore[method-assign]
        kept = KeptAnswers(store, "endpoint", told.retention) if told.retention else None
        self.scoring = Scoring(self.drift, Scorer(replicas, tokenizer, told), kept=kept)
        self.how = {"fraction": told.sample_fraction, "draw": random.Random(0)}
        self.sampled = SampledReplicas(replicas, self.scoring, name="tiny@dddddddddddd", **self.how)

    async def ask(self, prompt_ids=(10, 11, 12), *, adapter: str | None = VERSION, take: int | None = None, num=9):
        """An answer, or its first `take` events."""
        stream = self.sampled.stream(Request("r", tuple(prompt_ids), Sampling(max_tokens=num), adapter))
        seen = []
        async for event in stream:
            seen.append(event)
            if len(seen) == take:
                break
        await stream.aclose()
        return seen


@pytest.fixture
def place(tmp_path, tokenizer):
    return lambda replicas, **settings: Place(FileStore(tmp_path), tokenizer, replicas, **settings)


def test_an_answer_is_passed_on_whole_and_scored_by_its_version(place, ids):
    async def main():
        replicas = Replicas(ids("abc"))
        here = place(replicas)
        events = await here.ask()
        assert [event.token_id for event in events] == [*ids("abc"), None]
        await here.ask(adapter=None)
        await here.scoring.settle()
        scores = {"length": 3.0, "refusal": 0.0, "log_perplexity": (3 + 4 + 5) / 3}
        assert here.scores == [(VERSION, scores), ("tiny@dddddddddddd", scores)]
        one = replicas.read[0]
        assert (one.adapter, one.prompt_ids) == (None, (10, 11, 12, *ids("abc")))
        assert one.cache_salt == one.id, "what is scored is in nobody's cache"
        assert await here.sampled.everywhere("manage", "list") == ["manage", "list"]

    asyncio.run(main())


def test_an_answer_of_a_merged_model_goes_by_the_version_that_comes_with_it(place, ids):
    class Merged(Replicas):
        version: str | None = None

        async def stream(self, request):
            version = self.version  # of the replica that answers, whatever replaces it meanwhile
            async for event in super().stream(request):
                yield dataclasses.replace(event, version=version)
                version = None

    async def main():
        base, own = Replicas(), Merged(ids("abc"))
        here = place(base)
        here.sampled = SampledReplicas(own, here.scoring, name=None, **here.how)
        for own.version in ("support@aaaaaaaaaaaa", "support@bbbbbbbbbbbb", None):
            await here.ask(adapter=None)
            await here.scoring.settle()
        assert [version for version, _ in here.scores] == ["support@aaaaaaaaaaaa", "support@bbbbbbbbbbbb"]
        assert own.read == [] and len(base.read) == 2, "the perplexity is the base model's"

    asyncio.run(main())


def test_refusals_are_told_also_by_phrases_of_ones_own(place, ids):
    async def main():
        here = place(Replicas(ids("申し訳ありません")))
        await here.ask()
        own = place(Replicas(ids("No puedo.")), refusals=("no puedo",))
        await own.ask()
        for one in (here, own):
            await one.scoring.settle()
            assert one.scores[0][1]["refusal"] == 1.0

    asyncio.run(main())


def test_without_perplexity_the_base_model_reads_nothing(place, ids):
    async def main():
        replicas = Replicas(ids("abc"))
        here = place(replicas, perplexity=False)
        await here.ask()
        await here.scoring.settle()
        assert here.scores == [(VERSION, {"length": 3.0, "refusal": 0.0})] and replicas.read == []

    asyncio.run(main())


def test_what_the_base_model_reads_is_bounded(place, ids, monkeypatch):
    monkeypatch.setattr(samples, "MAX_CONTEXT_TOKENS", 2)
    monkeypatch.setattr(samples, "MAX_ANSWER_TOKENS", 3)

    async def main():
        replicas = Replicas(ids("abcdefgh"))
        here = place(replicas)
        await here.ask()
        await here.scoring.settle()
        assert replicas.read[0].prompt_ids == (11, 12, *ids("abc"))
        assert here.scores[0][1] == {"length": 8.0, "refusal": 0.0, "log_perplexity": 3.0}

    asyncio.run(main())


def test_an_answer_that_a_stop_string_cut_has_no_length(place, ids):
    async def main():
        here = place(Replicas(ids("abcdef")), perplexity=False)
        await here.ask(take=2)
        await here.scoring.settle()
        assert here.scores == [(VERSION, {"refusal": 0.0})]

    asyncio.run(main())


def test_no_score_of_failures_of_clients_that_left_and_of_prompts_that_were_only_read(place, ids):
    async def main():
        replicas = Replicas(ids("abc"))
        here = place(replicas)
        await here.ask(num=0)
        replicas.error = RemoteError("endpoint", "died")
        with pytest.raises(RemoteError):
            await here.ask()
        replicas.begins.clear()
        left = asyncio.ensure_future(here.ask())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait({left})
        await here.scoring.settle()
        assert here.scores == []
        replicas.error = None
        replicas.begins.set()
        await here.ask()
        await here.scoring.settle()
        assert len(here.scores) == 1, "those that ended are not waited for"

    asyncio.run(main())


def test_only_the_share_that_was_asked_for_is_scored(place, ids):
    async def main():
        here = place(Replicas(ids("a")), sample_fraction=0.1, perplexity=False)
        for _ in range(1000):
            await here.ask()
            await here.scoring.settle()
        return len(here.scores)

    assert 70 <= asyncio.run(main()) <= 130


def test_nothing_is_scored_while_a_request_waits_and_the_oldest_give_way(place, ids, monkeypatch):
    monkeypatch.setattr(sampled, "MAX_PENDING", 4)

    async def main():
        replicas, others = Replicas(ids("abc")), Replicas(ids("abc"))
        here = place(replicas)
        replicas.begins.clear()
        waits = asyncio.ensure_future(here.ask())
        await asyncio.sleep(0)
        here.sampled._replicas = others
        for place_ in range(6):
            await here.ask(prompt_ids=(place_ + 20,))
        await here.scoring.settle()
        assert others.read == [] == replicas.read and here.drift.missed == 2
        replicas.begins.set()
        await waits
        await here.scoring.settle()
        assert [one.prompt_ids[0] for one in replicas.read] == [23, 24, 25, 10] and here.drift.missed == 3

    asyncio.run(main())


@pytest.mark.parametrize("retention", [0, 3])
def test_what_is_kept_of_answers(place, tmp_path, tokenizer, ids, retention):
    async def main():
        here = place(Replicas(ids("an answer of the model's")), retention=retention, window=20)
        for turn in range(25):
            await here.ask(prompt_ids=ids(f"{SECRET} {turn}"))
            await here.scoring.settle()

    asyncio.run(main())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files, "the baseline at least"
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert (SECRET in text) == ("an answer" in text) == bool(retention)
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("endpoints/endpoint/samples/*.json"))]
    assert len(kept) == retention
    if retention:
        assert sorted(one["prompt"] for one in kept) == [f"{SECRET} {turn}" for turn in (22, 23, 24)]
        assert kept[0]["answer"] == "an answer of the model's" and kept[0]["version"] == VERSION
        assert set(kept[0]["scores"]) == {"length", "refusal", "log_perplexity"}


def test_kept_answers_go_on_after_a_restart(tmp_path):
    store = FileStore(tmp_path)
    first = KeptAnswers(store, "endpoint", 3)
    for turn in range(4):
        first.keep({"turn": turn, "answer": ""})
    again = KeptAnswers(store, "endpoint", 3)
    again.keep({"turn": 4, "answer": ""})
    turns = [json.loads(path.read_text())["turn"] for path in sorted(tmp_path.glob("endpoints/endpoint/samples/*"))]
    assert turns == [3, 4, 2]


def test_what_a_filter_takes_out_of_answers_is_not_kept(tmp_path):
    hidden = Regex(pattern="[0-9]+", replacement="#", on="answers")
    KeptAnswers(FileStore(tmp_path), "endpoint", 3, [hidden]).keep({"answer": "call 110"})
    [path] = tmp_path.glob("endpoints/endpoint/samples/*")
    assert json.loads(path.read_text()) == {"answer": "call #"}


def test_a_call_is_kept_as_filters_read_it(tmp_path):
    hidden = Regex(pattern="bob@", replacement="#", on="answers")
    called = r'So: <tool_call>{"name": "f", "arguments": {"to": "bob\u0040x.org"}}</tool_call>'
    KeptAnswers(FileStore(tmp_path), "endpoint", 3, [hidden]).keep({"answer": called})
    [path] = tmp_path.glob("endpoints/endpoint/samples/*")
    assert "#x.org" in path.read_text() and "u0040" not in path.read_text()


def test_an_engine_that_tells_no_log_probabilities_is_named_and_the_watch_goes_on(place, ids, caplog):
    async def main():
        replicas = Replicas(ids(SECRET))
        replicas.tells = False
        here = place(replicas)
        await here.ask(ids(SECRET))
        await here.scoring.settle()
        assert here.scores == [] and here.drift.missed == 1
        assert "tells no log probabilities of prompts" in caplog.text and "monitor.perplexity: false" in caplog.text
        assert SECRET not in caplog.text
        replicas.tells = True
        await here.ask()
        await here.scoring.settle()
        assert len(here.scores) == 1

    asyncio.run(main())


def test_a_store_that_cannot_be_written_to_does_not_stop_the_watch(place, ids, caplog):
    async def main():
        here = place(Replicas(ids("a")), retention=3, perplexity=False)

        def fail(facts):
            raise OSError(28, "No space left on device")

        assert here.scoring._kept is not None
        here.scoring._kept.keep = fail  # type: ignore[method-assign]
        await here.ask()
        await here.scoring.settle()
        await here.ask()
        await here.scoring.settle()
        assert len(here.scores) == 2 and caplog.text.count("No space left on device") == 2

    asyncio.run(main())


def test_a_failure_that_nobody_expected_is_told_without_the_answer_and_the_watch_goes_on(
    place, ids, caplog, monkeypatch
):
    async def main():
        replicas = Replicas(ids("abc"))
        here = place(replicas, perplexity=False)
        score = here.scoring._scorer.score

        async def fail(sample):
            monkeypatch.setattr(here.scoring._scorer, "score", score)
            raise ValueError(SECRET)

        monkeypatch.setattr(here.scoring._scorer, "score", fail)
        replicas.begins.clear()
        waits = [asyncio.ensure_future(here.ask()) for _ in range(2)]
        await asyncio.sleep(0)
        replicas.begins.set()
        await asyncio.gather(*waits)
        await here.scoring.settle()
        assert (len(here.scores), here.drift.missed) == (1, 1), "one task scores both"
        assert f"an answer of `{VERSION}` is not scored: ValueError" in caplog.text and SECRET not in caplog.text

    asyncio.run(main())
