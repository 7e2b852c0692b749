"""What is refused before an endpoint starts, and what a replica checks again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.data.filters import base as filters
from lmray.errors import ArtifactError, CapacityError, ConfigError
from lmray.job import ServeJob
from lmray.models import quantised
from lmray.models.load import load_empty_model, load_model, load_tokenizer, stop_token_ids
from lmray.models.source import find_model
from lmray.serve.plan import PlannedDraft, check_out, check_out_engine
from lmray.serve.prepare import check_port, prepare
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("prepare")
        patch.setenv("LMRAY_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def model(root):
    return tiny_model_folder(root / "tiny")


@pytest.fixture(scope="module")
def artifacts(root, model) -> Artifacts:
    """`helper` in production, `other` on another base, `whole` that is a model, `wide` whose base is mistold."""
    artifacts = Artifacts(open_store(str(root / "store")))
    folder = tiny_adapter_folder(model, root / "adapter", seed=1)
    base = {"source": str(model), "revision": None, "digest": find_model(str(model)).digest}
    artifacts.keep("helper", folder, base=base)
    artifacts.promote("helper", "production")
    artifacts.keep("other", folder, base={"source": "another-model", "revision": None, "digest": "0" * 64})
    artifacts.keep("whole", tiny_model_folder(root / "whole", seed=5), base=base, kind="model")
    artifacts.promote("whole", "production")
    deeper = tiny_model_folder(root / "deeper", num_hidden_layers=2, hidden_size=64)
    artifacts.keep("wide", tiny_adapter_folder(deeper, root / "wide", seed=1), base=base)
    return artifacts


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def job(root, model, artifacts, free_port) -> ServeJob:
    return ServeJob.model_validate(
        {
            "name": "endpoint",
            "model": {"source": str(model)},
            "adapters": [{"artifact": "helper", "stage": "production"}],
            "engine": {"name": "native", "max_length": 512},
            "http": {"port": free_port},
            "storage": str(root / "store"),
        }
    )


def test_a_filter_whose_library_is_missing_is_refused(job, monkeypatch):
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`pii` needs the package `presidio_analyzer`(.|\n)*lmray\[pii\]"):
        prepare(ServeJob.model_validate({**job.model_dump(exclude={"kind"}), "filters": ["pii"]}))


def test_a_plan_names_versions_and_digests(job, model, artifacts):
    plan = prepare(job)
    assert plan.model_name == "tiny"
    assert plan.digest == find_model(str(model)).digest
    assert plan.adapters == {"helper": artifacts.find("helper@production").id}
    assert check_out(plan) == model


def test_a_replica_refuses_a_model_that_is_not_the_planned_one(job):
    plan = dataclasses.replace(prepare(job), digest="f" * 64)
    with pytest.raises(ArtifactError, match="has other weights on this node"):
        check_out(plan)


def test_a_draft_is_planned_by_version_and_digest_and_checked_like_the_model(job, model, root, artifacts):
    assert prepare(job).draft is None and check_out_engine(prepare(job), job.engine) is job.engine
    drafted = job.changed({"engine.speculation": {"name": "draft", "model": "artifact:whole@production"}})
    plan = prepare(drafted)
    folder = check_out_engine(plan, drafted.engine).draft
    assert folder is not None
    assert (Path(folder) / "model.safetensors").read_bytes() == (root / "whole" / "model.safetensors").read_bytes()
    assert plan.draft == PlannedDraft(f"artifact:{artifacts.find('whole').ref}", find_model(folder).digest)
    with pytest.raises(ArtifactError, match="has other weights on this node"):
        changed = PlannedDraft(plan.draft.source, "f" * 64)
        check_out_engine(dataclasses.replace(plan, draft=changed), drafted.engine)
    other = tiny_model_folder(root / "other-vocabulary", vocab_size=280)
    with pytest.raises(ConfigError, match="has a vocabulary of 280"):
        prepare(job.changed({"engine.speculation": {"name": "draft", "model": str(other)}}))
    with pytest.raises(ArtifactError, match="smollm2"):
        prepare(job.changed({"engine.speculation": {"name": "draft", "model": "smollm-2"}}))


@pytest.mark.parametrize(
    ("adapters", "found"),
    [
        ([{"artifact": "helpr"}], "did you mean `helper`"),
        ([{"artifact": "helper", "stage": "staging"}], "no version or stage `staging`"),
        ([{"artifact": "other"}], "was trained on `another-model` (000000000000)"),
        ([{"artifact": "whole"}], "is a model\n  allowed: adapter\n  hint: serve it as `model.source: artifact:whole`"),
        ([{"artifact": "wide"}], "allowed: [32, rank], rank up to 512"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(job, adapters, found):
    with pytest.raises(ArtifactError) as caught:
        prepare(job.changed({"adapters": adapters}))
    assert found in str(caught.value)


def test_a_kept_model_is_served_under_its_name_and_by_its_version(job, root, artifacts):
    plan = prepare(job.changed({"model.source": "artifact:whole@production", "adapters": []}))
    assert (plan.model_name, plan.source) == ("whole", f"artifact:{artifacts.find('whole').ref}")
    served = check_out(plan)
    assert (served / "model.safetensors").read_bytes() == (root / "whole" / "model.safetensors").read_bytes()
    merged = prepare(job.changed({"model.source": "artifact:helper@production", "adapters": []}))
    assert merged.model_name == "helper" and check_out(merged).name == merged.digest
    with pytest.raises(ArtifactError, match="was trained on"):
        prepare(job.changed({"model.source": "artifact:whole"}))


def test_two_versions_under_one_name_are_refused(job):
    twice = [{"artifact": "helper"}, {"artifact": "helper", "stage": "production"}]
    with pytest.raises(ConfigError, match="the name `helper` is taken"):
        prepare(job.changed({"adapters": twice}))


def test_more_adapters_than_the_engine_holds_are_refused(job):
    for artifact in ("helper", "h*"):
        with pytest.raises(ConfigError, match="1 are more than the engine holds"):
            prepare(job.changed({"engine.max_adapters": 0, "adapters": [{"artifact": artifact}]}))


def test_an_unknown_model_and_an_open_address_are_refused(job, root):
    with pytest.raises(ArtifactError, match="holds no model"):
        prepare(job.changed({"model.source": str(root)}))
    with pytest.raises(ConfigError, match="is open to other machines"):
        prepare(job.changed({"http.host": "0.0.0.0"}))


def test_admin_keys_are_keys_of_their_own(job, root):
    ours, theirs = root / "keys", root / "admin-keys"
    ours.write_text("one\ntwo\n")
    theirs.write_text("three\n")
    files = {"http.api_keys_file": str(ours), "http.admin_keys_file": str(theirs)}
    assert len(prepare(job.changed(files)).admin_keys) == 1
    theirs.write_text("two\n")
    with pytest.raises(ConfigError, match=r"http\.admin_keys_file: holds a key of `http\.api_keys_file`"):
        prepare(job.changed(files))
    theirs.write_text("# none\n")
    with pytest.raises(ConfigError, match=r"http\.admin_keys_file: .* holds no key"):
        prepare(job.changed(files))


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("models: [helper]", r"http\.admin_keys_file: key `ops` has models, which `/admin` does not know"),
        ("requests_per_minute: 3", "has requests_per_minute"),
        ("model: helper", r"admin-keys\.yaml:1: keys\.0\.model"),
    ],
)
def test_admin_keys_have_hashes_too_and_no_limits(job, root, told, found):
    file = root / "admin-keys.yaml"
    changes = {"http.admin_keys_file": str(file)}
    file.write_text(f"keys: [{{name: ops, sha256: {'a' * 64}}}]\n")
    assert [key.name for key in prepare(job.changed(changes)).admin_keys] == ["ops"]
    file.write_text(f"keys: [{{name: ops, sha256: {'a' * 64}, {told}}}]\n")
    with pytest.raises(ConfigError, match=found):
        prepare(job.changed(changes))


def test_a_model_that_the_engine_cannot_run_is_refused_before_it_is_loaded(job):
    with pytest.raises(ConfigError, match=r"engine\.max_length: 2000 tokens are more than LlamaForCausalLM has"):
        prepare(job.changed({"engine.max_length": 2000}))


@pytest.mark.parametrize(
    ("kind", "found"), [("nothing-we-know", "cannot be loaded"), ("vit", "is no causal language model")]
)
def test_a_folder_that_holds_no_causal_model_is_refused(job, model, tmp_path, kind, found):
    folder = Path(shutil.copytree(model, tmp_path / "odd"))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ArtifactError, match=found):
        prepare(job.changed({"model.source": str(folder), "adapters": []}))


def test_workers_mean_nothing_to_an_endpoint(job):
    with pytest.raises(ConfigError, match="2 says nothing to an endpoint"):
        prepare(job.changed({"resources.workers": 2}))


def test_a_port_in_use_is_refused(job):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", job.http.port))
        taken.listen()
        with pytest.raises(CapacityError, match="cannot listen there: Address already in use"):
            prepare(job)
    check_port(job.http.host, job.http.port)
    with pytest.raises(CapacityError, match="cannot listen there"):
        check_port("192.0.2.1", job.http.port)


def test_the_page_can_be_left_out(job):
    assert prepare(job).page is True
    assert prepare(job.changed({"http.page": False})).page is False


def test_an_endpoint_runs_no_code_of_a_model(job):
    with pytest.raises(ConfigError, match="runs no code"):
        prepare(job.changed({"model.trust_remote_code": True}))


def test_a_merged_adapter_is_a_model_of_its_own_at_the_version_its_stage_holds(job, root, model, artifacts):
    merged = {"artifact": "helper", "stage": "production", "merged": True}
    plan = prepare(job.changed({"adapters": [merged], "engine.max_adapters": 0}))
    own = plan.merged["helper"]
    assert plan.adapters == {}
    assert own.source == f"artifact:{artifacts.find('helper@production').ref}" and own.digest != plan.digest
    assert check_out(own).name == own.digest
    assert own.model_name == plan.model_name and own.served == ()


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        ({"artifact": "*", "merged": True}, "`*` names many, and `merged` makes replicas for each"),
        ({"artifact": "helper", "merged": True, "canary": {}}, "`canary` is for adapters beside the base model"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_job(job, adapter, found):
    with pytest.raises(ConfigError) as caught:
        job.changed({"adapters": [adapter]})
    assert found in str(caught.value)


def test_a_merged_adapter_must_fit_the_base_and_have_a_name_of_its_own(job):
    merged = {"artifact": "helper", "stage": "production", "merged": True}
    with pytest.raises(ConfigError, match="the name `helper` is taken"):
        prepare(job.changed({"adapters": [merged, {"artifact": "helper"}]}))
    with pytest.raises(ArtifactError, match="was trained on `another-model`"):
        prepare(job.changed({"adapters": [{"artifact": "other", "merged": True}]}))


def test_a_quantised_model_is_planned_where_it_can_be_quantised(job, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: name)
    assert prepare(job).quantization is None
    assert prepare(job.changed({"model.quantization": "int8"})).quantization == "int8"
    with pytest.raises(ConfigError, match="`nf4` has blocks of 64 weights"):
        prepare(job.changed({"model.quantization": "nf4"}))
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the library `bitsandbytes`"):
        prepare(job.changed({"model.quantization": "int8"}))


@pytest.mark.parametrize(
    "changes", [{"quantization": "int8"}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}]
)
@pytest.mark.parametrize("engine", [{"name": "openai", "url": "http://x", "model": "m"}, {"name": "vllm"}])
def test_weights_that_are_elsewhere_cannot_be_changed_here(job, changes, engine):
    changed = {f"model.{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError, match="is applied where the weights are"):
        job.changed({"engine": engine, **changed})


@pytest.mark.parametrize("speculation", [{"name": "prompt_lookup"}, {"name": "draft", "model": "/nowhere"}])
def test_nobody_speculates_for_quantised_weights(job, speculation):
    with pytest.raises(ConfigError, match="cannot speculate with quantised weights"):
        job.changed({"model.quantization": "int8", "engine.speculation": speculation})


def test_a_server_with_a_model_of_its_own_serves_no_merged_one(job):
    engine = {"name": "openai", "url": "http://x", "model": "m"}
    with pytest.raises(ConfigError, match="asks a server for its own model"):
        job.changed({"engine": engine, "adapters": [{"artifact": "helper", "merged": True}]})


def test_an_engine_without_weights_is_planned_without_its_server(job, artifacts):
    engine = {"name": "openai", "url": "http://nowhere", "model": "m", "max_length": 512}
    plan = prepare(job.changed({"engine": engine}))
    assert plan.adapters == {"helper": artifacts.find("helper@production").id}


def test_a_model_without_weights_knows_its_type_and_where_answers_end(model):
    empty = load_empty_model(model, dtype="bfloat16")
    assert empty.dtype == torch.bfloat16 and empty.device.type == "meta"
    assert empty.name_or_path == str(model)
    assert stop_token_ids(empty, load_tokenizer(model)) == stop_token_ids(
        load_model(model, "float32"), load_tokenizer(model)
    )


def test_a_draft_that_was_saved_quantised_is_refused(job, quantised_model):
    asked = {"engine.speculation": {"name": "draft", "model": str(quantised_model)}}
    with pytest.raises(ConfigError, match=r"engine\.speculation\S*: .*saved \(gptq\)"):
        prepare(job.changed({**asked, "adapters": []}))


def test_weights_that_were_saved_quantised_are_refused(job, quantised_model):
    with pytest.raises(ConfigError, match=r"saved \(gptq\)"):
        prepare(job.changed({"model.source": str(quantised_model), "adapters": []}))
