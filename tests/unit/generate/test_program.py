"""A batch of prompts answered in this process: the engine's answers, whole files, and runs that go on."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lmray.artifacts.store import run_folder
from lmray.data.tokenise import prompt_ids
from lmray.engines._worker import NativeEngine
from lmray.engines.native import generate as engine_generate
from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, RemoteError
from lmray.generate import worker as worker_module
from lmray.generate.plan import answers_folder, make_plan, prepare
from lmray.generate.program import finished, in_this_process
from lmray.generate.worker import Worker
from lmray.metrics.events import read_events
from lmray.models.load import load_model
from lmray.testing.jobs import tiny_generate_job, write_jsonl
from lmray.testing.kills import Killed
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_tokenizer
from tests.unit.engines.remote import Scripted, chunk
from tests.unit.engines.vllm_server import NAME
from tests.unit.generate.conftest import QUESTIONS, parts, rows_of, texts_of

DRAWN = {"sampling__temperature": 1.0, "sampling__n": 2, "sampling__seed": 7}


def greedy(folder, texts, *, adapter=None, count=8) -> list[str]:
    """What the engine's own `generate` answers."""
    tokenizer, model = tiny_tokenizer(), load_model(folder, "float32")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    attached = "default" if adapter else None
    options = {"adapter": attached, "stop_token_ids": (2,), "max_new_tokens": count, "batch_size": 3, "threads": 1}
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in engine_generate(model, prompts, **options)]


def test_greedy_answers_are_the_engines(job, run, tiny_model):
    result = run(job(data__id="key"))
    rows = rows_of(job())
    assert texts_of(job()) == greedy(tiny_model, QUESTIONS)
    assert [(row["index"], row["id"], row["adapter"], row["error"]) for row in rows] == [
        (index, f"k{index}", None, None) for index in range(len(QUESTIONS))
    ]
    tokenizer = tiny_tokenizer()
    asked = [len(prompt_ids(tokenizer, [{"role": "user", "content": text}])) for text in QUESTIONS]
    assert [row["usage"]["prompt_tokens"] for row in rows] == asked
    assert all(row["usage"]["completion_tokens"] <= 8 for row in rows)
    assert result.status == "succeeded" and result.metrics["generate.rows"] == 10
    assert result.metrics["generate.prompt_tokens"] == sum(asked) and result.metrics["generate.errors"] == 0
    assert result.metrics["generate.completion_tokens"] == sum(row["usage"]["completion_tokens"] for row in rows)


def test_penalties_are_those_of_transformers(job, run, tiny_model):
    run(job(sampling__repetition_penalty=1.5))
    tokenizer, model = tiny_tokenizer(), load_model(tiny_model, "float32")
    expected = []
    for text in QUESTIONS:
        ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": text}])])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        found = model.generate(ids, **told, repetition_penalty=1.5, eos_token_id=2, pad_token_id=0)
        expected.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    assert texts_of(job()) == expected != greedy(tiny_model, QUESTIONS)


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_tokens_that_were_said_are_said_less(job, run, penalty):
    def repeated() -> int:
        return sum(len(text) - len(set(text)) for text in texts_of(job()))

    run(job())
    before = repeated()
    shutil.rmtree(run_folder(job()))
    run(job(**{f"sampling__{penalty}": 2.0}))
    assert repeated() < before


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_model_answers_as_the_engine_over_it(wide_model, questions, tmp_path, run, quantization):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which `make test-full` installs")
    told = {"model__quantization": quantization, "sampling__max_tokens": 8}
    quantised = tiny_generate_job(wide_model, questions, tmp_path / "store", **told)
    run(quantised)
    model = load_model(wide_model, "float32", quantization=quantization, device="cpu")
    tokenizer = tiny_tokenizer()
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    options = {"stop_token_ids": (2,), "max_new_tokens": 8, "batch_size": 3, "threads": 1}
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in engine_generate(model, prompts, **options)]
    assert texts_of(quantised) == expected != greedy(wide_model, QUESTIONS)


def test_the_manifest_and_the_events_say_what_there_is(job, run):
    result = run(job())
    manifest = json.loads((answers_folder(job()) / "manifest.json").read_text(encoding="utf-8"))
    assert [*manifest["files"]] == [*parts(job())] == [f"part-00000{index}.jsonl" for index in range(3)]
    assert (manifest["rows"], manifest["errors"]) == (10, 0)
    assert manifest["digest"] == result.details["digest"] and manifest["seconds"] > 0
    assert manifest["tokens_per_s"] == pytest.approx(manifest["completion_tokens"] / manifest["seconds"], rel=0.01)
    events = read_events(run_folder(job()) / "events.jsonl")
    assert [event["generate.rows"] for event in events] == [4, 8, 10]


def killed_after(count: int):
    """Workers that are gone after so many shards."""

    def workers(job, plan, shards):
        for done, record in enumerate(in_this_process(job, plan, shards), start=1):
            yield record
            if done == count:
                raise Killed("killed")

    return workers


@pytest.mark.parametrize("changes", [{}, DRAWN, {"output__format": "both"}], ids=["greedy", "drawn", "both"])
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_gives(job, run, changes):
    undisturbed, disturbed = job(name="whole", **changes), job(name="cut", **changes)
    whole = run(undisturbed)
    with pytest.raises(Killed):
        run(disturbed, killed_after(1))
    assert len(parts(disturbed)) == len(disturbed.output.suffixes)
    first = {path: path.stat().st_mtime_ns for path in answers_folder(disturbed).glob("part-*")}
    result = run(disturbed)
    assert parts(disturbed) == parts(undisturbed) and result.details["digest"] == whole.details["digest"]
    assert {path: path.stat().st_mtime_ns for path in first} == first, "what was done is not done again"
    same = ("generate.rows", "generate.prompt_tokens", "generate.completion_tokens")
    assert [result.metrics[name] for name in same] == [whole.metrics[name] for name in same]
    rows = [event["generate.rows"] for event in read_events(run_folder(disturbed) / "events.jsonl")]
    assert rows == [4, 8, 10]


def test_a_run_that_is_done_says_so_until_a_file_is_spoilt(job, run):
    first = run(job())
    plan = make_plan(job(), prepare(job()))
    before = parts(job())
    again = finished(job(), plan)
    assert again is not None and again.status == "already-done" and again.metrics == first.metrics
    (answers_folder(job()) / "part-000001.jsonl").write_text("spoilt", encoding="utf-8")
    assert finished(job(), plan) is None
    asked = []
    run(job(), lambda job, plan, shards: in_this_process(job, plan, asked.append([*shards]) or shards))
    assert asked == [[1]] and parts(job()) == before


def test_a_row_is_answered_alike_whatever_it_is_answered_with(job, run):
    """Its seed is its own, not its shard's or its worker's."""
    for size in (1, 4, 10):
        run(job(name=f"s{size}", output__shard_size=size, **DRAWN))
    found = [rows_of(job(name=f"s{size}")) for size in (1, 4, 10)]
    assert found[0] == found[1] == found[2]
    choices = [choice["text"] for row in found[0] for choice in row["choices"]]
    assert len(set(choices)) > 15, "each draws by its own"
    run(job(name="other", **{**DRAWN, "sampling__seed": 8}))
    assert rows_of(job(name="other")) != found[0]


def test_parquet_holds_what_json_lines_hold(job, run):
    run(job(output__format="both"))
    tables = [pq.read_table(path) for path in sorted(answers_folder(job()).glob("*.parquet"))]
    assert [row for table in tables for row in table.to_pylist()] == [
        json.loads(line)
        for name, content in parts(job()).items()
        if name.endswith("jsonl")
        for line in content.decode().split("\n")
        if line
    ]


def test_stop_strings_end_answers_and_are_not_in_them(job, run):
    run(job())
    whole = texts_of(job())
    text = next(text for text in whole if len(text) > 4)
    run(job(name="cut", sampling__stop=[text[2:4]]))
    row = rows_of(job(name="cut"))[whole.index(text)]
    (choice,) = row["choices"]
    assert choice["text"] == text[: text.index(text[2:4])] and choice["finish_reason"] == "stop"
    assert row["usage"]["completion_tokens"] < 8


def test_answers_are_held_to_a_schema(job, run):
    pytest.importorskip("llguidance")
    schema = {"enum": ["大阪", "Rome"]}
    run(job(sampling__json_schema=schema, sampling__max_tokens=40))
    assert {json.loads(text) for text in texts_of(job())} <= {"大阪", "Rome"}


def test_plain_text_is_gone_on_with_without_a_template(job, run, tiny_model, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "昔々"}])
    run(job(data=path))
    tokenizer, model = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(tiny_model)
    asked = tokenizer("昔々", return_tensors="pt")
    ids = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert texts_of(job()) == [tokenizer.decode(ids, skip_special_tokens=True)]


def test_each_row_is_answered_by_the_adapter_it_names(job, run, tiny_model, tmp_path):
    one, two = (str(tiny_adapter_folder(tiny_model, tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2))
    named = [None, one, two, one, None]
    rows = [{"prompt": QUESTIONS[index], "who": who} for index, who in enumerate(named)]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    run(job(data=path, data__adapter="who"))
    assert [row["adapter"] for row in rows_of(job())] == named
    expected = [greedy(tiny_model, [QUESTIONS[index]], adapter=who)[0] for index, who in enumerate(named)]
    assert texts_of(job()) == expected and len({*expected}) == 5
    run(job(name="all", adapter=two))
    assert texts_of(job(name="all"))[2] == expected[2] and rows_of(job(name="all"))[0]["adapter"] == two


def test_what_a_row_cannot_be_answered_with_is_its_own_error(job, run, tmp_path):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "長" * 200, "b", "\ud800", "c")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(job(data=path))
    found = rows_of(job())
    assert [row["error"] is None for row in found] == [True, False, True, False, True]
    assert found[1]["choices"] == [] and found[1]["usage"] == {"prompt_tokens": 0, "completion_tokens": 0}
    assert found[1]["error"].startswith("the prompt has 6") and "engine.max_length" in found[1]["error"]
    assert "cannot be put to the model" in found[3]["error"]
    assert result.status == "succeeded" and result.metrics["generate.errors"] == 2


def test_an_engine_that_fails_ends_the_run_and_not_its_rows(job, run, monkeypatch):
    async def submit(self, request):
        self._end = LmrayError("engine", "a step failed")
        raise self._end
        yield

    monkeypatch.setattr("lmray.engines._worker.NativeEngine.submit", submit)
    with pytest.raises(LmrayError, match="a step failed"):
        run(job())
    assert parts(job()) == {}


@pytest.fixture
def failing(monkeypatch):
    """Has the engine raise `error` for row 5 so many times, or always."""
    submit = NativeEngine.submit

    def failing(error: LmrayError, times: int = 10**9) -> None:
        left = iter(range(times))

        async def submit_or_fail(self, request):
            if request.id == "5-0" and next(left, None) is not None:
                raise error
            async for event in submit(self, request):
                yield event

        monkeypatch.setattr(NativeEngine, "submit", submit_or_fail)
        monkeypatch.setattr(worker_module, "PAUSES_S", (0.0, 0.0))

    return failing


@pytest.mark.parametrize(("kind", "times"), [(RemoteError, 1), (ArtifactError, 1), (CapacityError, 3)])
def test_a_server_that_does_not_do_its_part_ends_the_run_which_then_goes_on(job, run, failing, kind, times):
    run(job(name="whole"))
    failing(kind("http://there", "HTTP 500: no words"), times)
    with pytest.raises(kind, match="no words"):
        run(job())
    assert [*parts(job())] == ["part-000000.jsonl"], "the shard of that row is not done"
    assert run(job()).status == "succeeded"
    assert parts(job()) == parts(job(name="whole"))


def test_a_server_that_is_busy_is_asked_again(job, run, failing):
    run(job(name="whole"))
    failing(CapacityError("the model's server", "is busy"), times=2)
    assert run(job()).metrics["generate.errors"] == 0
    assert parts(job()) == parts(job(name="whole"))


def test_what_the_server_refuses_of_a_row_is_its_error(job, run, failing):
    failing(DataError("the model's server", "refused the request: too odd"))
    run(job())
    assert [row["error"] for row in rows_of(job())] == [None] * 5 + ["refused the request: too odd"] + [None] * 4


def test_a_server_that_tells_text_alone_answers_too(job, run):
    server = Scripted(chunk(text="赤です", finish_reason="stop"))
    engine = {"name": "openai", "model": NAME, "tokens": "text", "max_length": 128}
    with listening(server.app()) as url:
        run(job(engine={**engine, "url": url}))
    assert texts_of(job()) == ["赤です"] * len(QUESTIONS)


def test_an_answer_that_breaks_off_is_its_rows_error(job, run, monkeypatch):
    async def submit(self, request):
        return
        yield

    monkeypatch.setattr("lmray.engines._worker.NativeEngine.submit", submit)
    run(job())
    assert {row["error"] for row in rows_of(job())} == {"the answer broke off"}


def test_workers_that_end_without_their_shards_are_told(job, run):
    with pytest.raises(LmrayError, match="ended without 2 of 3 shards"):
        run(job(), lambda job, plan, shards: in_this_process(job, plan, shards[:1]))


def test_a_shard_that_its_workers_die_of_ends_the_run(job):
    one = job(resources__max_failures=1)
    worker = Worker(one, make_plan(one, prepare(one)))
    try:
        for _ in range(2):
            worker._shards.begin(0, max_failures=1)  # and then it died
        with pytest.raises(LmrayError, match=r"shard 0 \(rows 0 to 3\): 2 workers died") as raised:
            worker.answer(0)
        assert "max_failures" in str(raised.value)
        assert worker.answer(1).rows == 4
    finally:
        worker.close()
