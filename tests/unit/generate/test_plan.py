"""What is refused before a worker starts, and what a worker refuses on its node."""

from __future__ import annotations

import json
import shutil

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.files import write_json
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError, LmrayError
from lmray.generate.plan import answers_folder, check_begin, make_plan, prepare
from lmray.generate.program import in_this_process
from lmray.generate.worker import Worker
from lmray.models.source import find_model
from lmray.testing.jobs import write_jsonl
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder


@pytest.fixture
def artifacts(tiny_model, tmp_path) -> Artifacts:
    """`helper` in production, with an older version in staging; `other` on another base; `whole`, a model."""
    artifacts = Artifacts(open_store(str(tmp_path / "store")))
    base = {"source": str(tiny_model), "revision": None, "digest": find_model(str(tiny_model)).digest}
    for seed, stage in ((1, "staging"), (2, "production")):
        folder = tiny_adapter_folder(tiny_model, tmp_path / f"adapter-{seed}", seed=seed)
        artifacts.promote(artifacts.keep("helper", folder, base=base).ref, stage)
    artifacts.keep("other", folder, base={"source": "another", "revision": None, "digest": "0" * 64})
    artifacts.keep("whole", tiny_model_folder(tmp_path / "whole", seed=5), base=base, kind="model")
    return artifacts


def test_the_plan_names_versions_and_counts(job, artifacts):
    one = job(adapter="helper@staging")
    plan = make_plan(one, prepare(one))
    version = artifacts.find("helper@staging")
    assert plan.adapters == {"helper@staging": {"name": version.ref, "digest": version.id}}
    assert (plan.data["rows"], plan.num_shards) == (10, 3)
    text = "\n".join(plan.lines())
    assert version.ref in text and "10 in 3 shard(s) of 4" in text
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


OPENAI = {"name": "openai", "url": "http://x", "model": "m", "max_length": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_placement_is_no_part_of_the_run_and_what_is_asked_is(job, artifacts):
    def key(**changes) -> str:
        return make_plan(job(**changes), prepare(job(**changes))).run_key

    same = key()
    assert key(resources__workers=3) == key(engine__max_batch_size=9) == key(output__folder="/elsewhere") == same
    changed = ({"sampling__seed": 1}, {"output__shard_size": 5}, {"adapter": "helper"}, {"data__max_rows": 9})
    assert len({same, *(key(**one) for one in changed)}) == 5
    before = key(adapter="helper@production")
    artifacts.promote(artifacts.find("helper@staging").ref, "production")
    assert key(adapter="helper@production") != before


@pytest.mark.parametrize(
    ("engine", "same", "other"),
    [
        (
            {"name": "native", "max_length": 128},
            ({"cache_tokens": 999}, {"max_prefill_tokens": 9}, {"speculation": {"name": "prompt_lookup"}}),
            ({"max_length": 127},),
        ),
        (
            OPENAI,
            ({"api_key_file": "key"}, {"read_timeout_s": 9.0}, {"max_batch_size": 9}),
            ({"url": "http://y"}, {"model": "n"}, {"tokens": "text"}, {"adapters": "{name}"}),
        ),
        (
            {"name": "vllm", "max_length": 128},
            ({"python": "/there/python"}, {"max_loras": 1}, {"max_lora_rank": 8}, {"start_timeout_s": 9.0}),
            ({"arguments": ["--quantization", "fp8"]}, {"max_length": 99}),
        ),
    ],
    ids=["native", "openai", "vllm"],
)
def test_what_of_an_engine_decides_answers_is_part_of_the_run(job, engine, same, other):
    ready = prepare(job())

    def key(changes) -> str:
        return make_plan(job(engine={**engine, **changes}), ready).run_key

    assert {key(one) for one in ({}, *same)} == {key({})}
    assert len({key(one) for one in ({}, *other)}) == 1 + len(other)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"adapter": "nobody"}, ArtifactError, "adapter: artifact `nobody`: "),
        ({"adapter": "other"}, ArtifactError, "was trained on another base than"),
        ({"adapter": "whole"}, ArtifactError, "is a model"),
        ({"engine__max_length": 2000}, ConfigError, "2000 tokens are more than LlamaForCausalLM has positions for"),
        ({"sampling__temperature": 1e-5}, DataError, "temperature: is 1e-05"),
        ({"sampling__repetition_penalty": 0.0}, DataError, "repetition_penalty: is 0.0"),
        ({"data__id": "kee"}, DataError, "did you mean `key`"),
        ({"sampling__json_schema": {"type": "nothing"}}, ConfigError, "sampling.json_schema"),
        ({"model__source": "/nowhere"}, ArtifactError, "holds no model"),
    ],
    ids=["unknown", "other-base", "whole", "positions", "temperature", "penalty", "id", "schema", "model"],
)
def test_what_cannot_be_answered_with_is_told_before(job, artifacts, changes, error, said):
    with pytest.raises(error, match=said):
        prepare(job(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling__n": 2}, "`n: 2` greedy answers are one and the same"),
        ({"sampling__max_tokens": 128}, "leaves no room for a prompt"),
        ({"engine": OPENAI, "model__quantization": "nf4"}, "is applied where the weights are"),
        ({"sampling__presence_penalty": 2.1}, "sampling.presence_penalty"),
        ({"engine": OPENAI, "model__rope_scaling": LINEAR}, "is applied where the weights are"),
        ({"sampling__top_p": 0}, "sampling.top_p"),
        ({"output__shard_size": 0}, "output.shard_size"),
        ({"sampling__stop": [""]}, "sampling.stop"),
        ({"output__format": "csv"}, "output.format"),
        ({"data__sources": []}, "data.sources"),
    ],
)
def test_a_job_that_contradicts_itself_is_no_job(job, changes, said):
    with pytest.raises(ConfigError, match=said):
        job(**changes)


def test_the_row_that_names_an_unknown_adapter_is_told(job, artifacts, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "who": "helper"}, {"prompt": "b", "who": "helpr"}])
    with pytest.raises(ArtifactError, match=r"rows.jsonl:2: column `who`: artifact `helpr`"):
        prepare(job(data=path, data__adapter="who"))


def test_more_adapters_than_the_engine_holds_are_told(job, artifacts, tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a", "who": f"helper@{at}"} for at in ("staging", "production")]
    )
    with pytest.raises(ConfigError, match="2 adapters are more than the engine holds") as raised:
        prepare(job(data=path, data__adapter="who", engine__max_adapters=1))
    assert "engine.max_adapters` to 2" in str(raised.value)
    assert len(prepare(job(data=path, data__adapter="who")).adapters) == 2


def test_chats_need_a_template_and_texts_do_not(job, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    write_json(bare / "tokenizer_config.json", config)
    with pytest.raises(ArtifactError, match="has no chat template"):
        prepare(job(model__source=str(bare)))
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    prepare(job(model__source=str(bare), data=texts))


def test_a_schema_needs_the_extra_and_a_fast_tokenizer(job, monkeypatch):
    one = job(sampling__json_schema={"type": "object"})
    with monkeypatch.context() as patch:
        patch.setattr("lmray.generate.plan.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"install `lmray\[guided\]`"):
            prepare(one)
    pytest.importorskip("llguidance")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ConfigError, match="needs a fast tokenizer"):
        prepare(one)


def test_an_engine_that_is_told_text_holds_answers_to_no_schema(job):
    changes = {"engine": OPENAI, "engine__tokens": "text", "sampling__json_schema": {"type": "object"}}
    with pytest.raises(ConfigError, match=r"sampling.json_schema: engine `openai` holds answers to none"):
        prepare(job(**changes))


def test_a_run_of_the_same_name_with_other_content_is_told(job, run, artifacts):
    run(job())
    other = job(sampling__max_tokens=9, adapter="helper")
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens: 8 -> 9") as raised:
        check_begin(other, make_plan(other, prepare(other)))
    assert "adapters" in str(raised.value) and "another `name`" in str(raised.value)
    check_begin(job(), make_plan(job(), prepare(job())))
    (run_folder(job()) / "plan.json").write_text('{"run_key": 1}', encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no plan of batch inference"):
        check_begin(job(), make_plan(job(), prepare(job())))


def test_answers_go_to_a_folder_of_their_own(job, run, tmp_path):
    one = job(output__folder=str(tmp_path / "答え"))
    run(one)
    assert answers_folder(one) == tmp_path / "答え" and (tmp_path / "答え" / "manifest.json").is_file()
    two = job(name="two", output__folder=str(tmp_path / "答え"))
    with pytest.raises(ConfigError, match=r"output.folder: .* holds manifest.json"):
        check_begin(two, make_plan(two, prepare(two)))
    (tmp_path / "file").write_text("", encoding="utf-8")
    three = job(name="three", output__folder=str(tmp_path / "file"))
    with pytest.raises(CapacityError, match="is a file"):
        check_begin(three, make_plan(three, prepare(three)))


def test_no_run_goes_on_into_the_answers_of_another(job, run, tmp_path):
    folder = tmp_path / "answers"
    cut = job(output__folder=str(folder))
    with pytest.raises(LmrayError, match="ended without 2 of 3 shards"):
        run(cut, lambda job, plan, shards: in_this_process(job, plan, shards[:1]))
    run(job(name="two", sampling__max_tokens=4))
    two = job(name="two", sampling__max_tokens=4, output__folder=str(folder))
    with pytest.raises(ConfigError, match=r"output.folder: .* holds part-000000.jsonl, run.json already"):
        check_begin(two, make_plan(two, prepare(two)))
    assert run(cut).status == "succeeded"
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / ".run.json.node-1-ab.tmp").write_text("left by a writer that was killed", encoding="utf-8")
    moved = job(output__folder=str(tmp_path / "moved"))
    assert run(moved).metrics["generate.rows"] == 10 and (tmp_path / "moved" / "manifest.json").is_file()


def test_a_worker_refuses_what_was_not_planned(job, tiny_model, questions, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    one = job(model__source=str(model))
    plan = make_plan(one, prepare(one))
    tiny_model_folder(model, seed=9)
    with pytest.raises(ArtifactError, match="finds another model on this node"):
        Worker(one, plan)
    tiny_model_folder(model, seed=0)
    write_jsonl(questions, [{"prompt": "other", "key": 1}])
    with pytest.raises(ArtifactError, match="finds another data on this node"):
        Worker(one, plan)


def test_a_worker_takes_the_version_that_was_planned_wherever_the_stage_is_now(job, artifacts):
    one = job(adapter="helper@production")
    plan = make_plan(one, prepare(one))
    artifacts.promote(artifacts.find("helper@staging").ref, "production")
    Worker(one, plan).close()


def test_weights_that_were_saved_quantised_are_refused(job, quantised_model):
    with pytest.raises(ConfigError, match=r"saved \(gptq\)"):
        prepare(job(model__source=str(quantised_model)))
