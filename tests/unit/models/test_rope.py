"""Scaled positions: what a job may ask for, that the model computes them, and that they are kept with what was made."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.config import Document, decode, dump
from lmray.context import LocalContext
from lmray.errors import ArtifactError, ConfigError
from lmray.evaluate.command import Words, make_job
from lmray.evaluate.program import evaluate
from lmray.job import EvaluateJob, ServeJob
from lmray.models.export import export
from lmray.models.load import load_model
from lmray.models.rope import RopeScaling, check_positions, check_same_scaling, num_positions
from lmray.models.spec import ModelSpec
from lmray.serve.prepare import prepare as prepare_serving
from lmray.testing.jobs import run_here, tiny_job
from lmray.testing.tiny import tiny_config, tiny_model_folder
from lmray.train.plan import make_plan

POSITIONS, FACTOR = 64, 4.0
TYPES = {
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "dynamic": {"rope_type": "dynamic", "factor": FACTOR},
    "yarn": {"rope_type": "yarn", "factor": FACTOR},
    "llama3": {"rope_type": "llama3", "factor": FACTOR},
}
every_type = pytest.mark.parametrize("scaling", TYPES.values(), ids=TYPES)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model with few positions."""
    return tiny_model_folder(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=POSITIONS)


def spec(**fields) -> ModelSpec:
    return decode(ModelSpec, Document("job", {"source": "x", "rope_scaling": fields}))


def frequencies(rope_type: str) -> tuple[list[float], float]:
    """Inverse frequencies of the tiny model's heads (8 wide, base 10000) and attention's factor, by the papers."""
    width = 8
    plain = [10000.0 ** (-2 * index / width) for index in range(width // 2)]
    if rope_type in ("linear", "dynamic"):  # the latter as long as sequences are short
        return [one / (FACTOR if rope_type == "linear" else 1.0) for one in plain], 1.0
    if rope_type == "llama3":
        found = []
        for one in plain:
            turns = POSITIONS * one / (2 * math.pi)
            smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
            found.append((1 - smooth) * one / FACTOR + smooth * one)
        return found, 1.0

    def place(turns: float) -> float:
        return width * math.log(POSITIONS / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(place(32.0)), 0), min(math.ceil(place(1.0)), width - 1)
    ramp = [min(max((index - low) / (high - low), 0.0), 1.0) for index in range(width // 2)]
    return [one * (1 - part) + one / FACTOR * part for one, part in zip(plain, ramp, strict=True)], (
        0.1 * math.log(FACTOR) + 1.0
    )


@every_type
def test_it_reaches_the_rotary_embedding_as_the_papers_say(short, scaling):
    rotary = load_model(short, "float32", rope_scaling=RopeScaling(**scaling)).model.rotary_emb
    wanted, attention = frequencies(scaling["rope_type"])
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(wanted), rtol=1e-5, atol=0.0)
    assert rotary.attention_scaling == pytest.approx(attention)


@every_type
def test_logits_are_those_of_plain_transformers_with_the_same_config(short, scaling, tmp_path):
    folder = shutil.copytree(short, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    takes_own = scaling["rope_type"] in ("linear", "dynamic")
    original = {} if takes_own else {"original_max_position_embeddings": POSITIONS}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling["rope_type"] == "llama3" else {}
    config["rope_parameters"] |= scaling | original | bands
    if scaling["rope_type"] != "dynamic":
        config["max_position_embeddings"] = int(POSITIONS * FACTOR)
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.randint(3, 250, (2, 200), generator=torch.Generator().manual_seed(0))
    ours = load_model(short, "float32", rope_scaling=RopeScaling(**scaling))
    with torch.no_grad():
        want, got = AutoModelForCausalLM.from_pretrained(folder)(ids).logits, ours(ids).logits
        assert torch.equal(got, want)
        assert not torch.allclose(got, load_model(short, "float32")(ids).logits, atol=1e-2)
    assert num_positions(ours.config) == 256


def test_what_the_job_says_goes_before_the_models_own():
    config = tiny_config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512})
    RopeScaling(rope_type="yarn", factor=4.0, beta_fast=16.0, attention_factor=1.5).apply(config)
    assert config.max_position_embeddings == 2048
    assert config.rope_parameters == {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    }
    other = tiny_config()
    RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=256).apply(other)
    assert other.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("fields", "where", "found"),
    [
        ({"rope_type": "linear", "factor": 1.0}, "rope_scaling.factor", "found 1.0"),
        ({"rope_type": "linear"}, "rope_scaling.factor", "is missing"),
        ({"rope_type": "ntk", "factor": 2.0}, "rope_scaling.rope_type", "found 'ntk'"),
        ({"rope_type": "dynamic", "factor": 2.0, "beta_fast": 8.0}, "rope_scaling.beta_fast", "nothing to `dynamic`"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 8.0}, "rope_scaling.beta_fast", "nothing to `linear`"),
        (
            {"rope_type": "llama3", "factor": 2.0, "attention_factor": 1.0},
            "rope_scaling.attention_factor",
            "nothing to",
        ),
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 8}, "original", "nothing to"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40.0}, "rope_scaling", "is not below `beta_fast` 32.0"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "rope_scaling", "is not below"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fats": 4.0}, "rope_scaling.beta_fats", "unknown key"),
    ],
)
def test_wrong_fields_are_refused_by_their_path(fields, where, found):
    with pytest.raises(ConfigError, match=found) as caught:
        spec(**fields)
    assert where in caught.value.where


def test_frequencies_that_hang_on_the_rest_of_the_batch_are_refused():
    with pytest.raises(ConfigError, match="longest example of a batch") as caught:
        spec(rope_type="longrope", factor=2.0)
    assert caught.value.where.endswith("rope_scaling.rope_type") and "yarn" in str(caught.value.hint)


def test_a_longrope_model_ends_where_its_first_training_did():
    bands = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 256}
    assert num_positions(tiny_config(rope_parameters={"rope_type": "longrope", "factor": 4.0, **bands})) == 256


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (GPT2Config(), "are no rotary ones"),
        (tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0}), "are scaled already: linear"),
        (
            SimpleNamespace(
                model_type="mixed",
                get_text_config=lambda: SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "default"}}),
            ),
            "differ by kind of layer",
        ),
    ],
)
def test_positions_that_cannot_be_scaled_are_told(config, found):
    with pytest.raises(ConfigError, match=found) as caught:
        RopeScaling(rope_type="yarn", factor=2.0).apply(config)
    assert caught.value.where == "model.rope_scaling"


def test_longer_than_the_model_is_refused_before_anything_is_read(short, tmp_path):
    def plan(**changes):
        return make_plan(tiny_job(short, tmp_path / "nothing.jsonl", tmp_path / "store", **changes))

    with pytest.raises(ConfigError, match="256 tokens are more than the model has positions for") as caught:
        plan(data__max_length=256)
    assert caught.value.where == "data.max_length" and "up to 64" in str(caught.value.allowed)
    assert "`model.rope_scaling: {rope_type: yarn, factor: 4}`" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="256 tokens") as caught:
        plan(data__max_length=256, model__rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert "`model.rope_scaling.factor: 4`" in str(caught.value.hint)


def test_models_without_an_end_take_any_length():
    check_positions(SimpleNamespace(get_text_config=lambda: SimpleNamespace()), 10**6)
    with pytest.raises(ConfigError, match="up to 1024") as caught:
        check_positions(GPT2Config(), 2000)
    assert caught.value.hint == "shorten it"


@pytest.fixture(scope="module")
def kept(short, tmp_path_factory):
    """A run on scaled positions: its job, and the store it kept its artifact in."""
    store = tmp_path_factory.mktemp("scaled")
    rows = store / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} 色は匂へど " * 12}) + "\n" for n in range(8)), encoding="utf-8")
    changes = {"data__eval": {"split": 0.25, "by": None}, "data__max_length": 128, "train__max_steps": 2}
    job = tiny_job(
        short,
        rows,
        store / "store",
        model__rope_scaling=TYPES["yarn"],
        output={"artifact": "long"},
        method="pretrain",
        **changes,
    )
    result = run_here(job, store / "scratch")
    return SimpleNamespace(job=job, result=result, artifacts=Artifacts(open_store(str(store / "store"))))


def test_a_run_prints_it_and_another_scaling_is_another_run(kept):
    plan = make_plan(kept.job)
    line = "positions  rope_type: yarn, factor: 4.0, beta_fast: 32.0, beta_slow: 1.0"
    assert line in plan.lines()
    assert make_plan(kept.job.changed({"model.rope_scaling.factor": 8.0})).run_key != plan.run_key
    assert not any("positions" in line for line in make_plan(kept.job.changed(PLAIN)).lines())


PLAIN = {"model.rope_scaling": None, "data.max_length": 64}


def test_the_artifact_remembers_it_and_is_used_with_no_other(kept):
    base = kept.artifacts.find("long").base
    was = RopeScaling.of(base)
    assert was is not None and was == RopeScaling.beside(kept.artifacts.checkout(kept.artifacts.find("long")))
    check_same_scaling("long", was, kept.job.model.rope_scaling)
    check_same_scaling("short", RopeScaling.of({}), None)
    with pytest.raises(ArtifactError, match=r"scaled by rope_type: yarn, factor: 4\.0") as caught:
        check_same_scaling("long", was, None)
    assert "set `model.rope_scaling: {rope_type: yarn" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match="scaled by nothing") as caught:
        check_same_scaling("short", None, kept.job.model.rope_scaling)
    assert "leave `model.rope_scaling` out" in str(caught.value.hint)


def test_what_is_exported_carries_it_in_its_own_config(kept, tmp_path):
    artifact = kept.artifacts.find("long")
    export(kept.artifacts, artifact, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.rope_parameters["rope_type"] == "yarn" and plain.config.max_position_embeddings == 256
    ours = PeftModel.from_pretrained(
        load_model(Path(artifact.base["source"]), "float32", rope_scaling=RopeScaling.of(artifact.base)),
        str(kept.artifacts.checkout(artifact)),
    )
    ids = torch.randint(3, 250, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def evaluation(kept, *, model: dict, **data) -> EvaluateJob:
    tree = dump(kept.job)
    return decode(
        EvaluateJob,
        Document(
            "test",
            {
                "kind": "evaluate",
                "name": "again",
                "storage": kept.job.storage,
                "model": tree["model"] | model,
                "data": tree["data"] | data,
                "targets": [{"label": "long", "adapter": "long"}],
                "evaluate": {"tasks": ["loss"]},
            },
        ),
    )


def test_an_evaluation_loads_the_base_as_it_was_trained_on(kept, tmp_path):
    here = LocalContext(tmp_path / "run", scratch=tmp_path / "scratch")
    again = evaluate(evaluation(kept, model={}), here).metrics["eval.loss"]
    assert again == pytest.approx(kept.result.metrics["eval.loss"], abs=1e-5)
    for adapter in ("long", str(kept.artifacts.checkout(kept.artifacts.find("long")))):
        job = evaluation(kept, model={"rope_scaling": None}, max_length=64)
        with pytest.raises(ArtifactError, match="was trained on positions scaled by"):
            evaluate(job.changed({"targets.0.adapter": adapter}), here)
    with pytest.raises(ConfigError, match="128 tokens are more than the model has positions for"):
        evaluate(evaluation(kept, model={"rope_scaling": None}), here)


def test_the_command_line_takes_it_from_the_artifact(kept, monkeypatch):
    monkeypatch.setenv("LMRAY_STORE", kept.job.storage)
    folder = kept.artifacts.checkout(kept.artifacts.find("long"))
    for target in ("long", str(folder)):
        job = make_job(Words([target], "loss", ["rows.jsonl"]))
        assert job.model.rope_scaling == kept.job.model.rope_scaling


def test_a_spoilt_note_beside_an_adapter_is_told(tmp_path):
    assert RopeScaling.beside(tmp_path) is None
    (tmp_path / "rope_scaling.json").write_text('{"rope_type": "yarn"}')
    with pytest.raises(ArtifactError, match="says no scaling of positions"):
        RopeScaling.beside(tmp_path)


def test_an_endpoint_takes_longer_prompts_and_only_adapters_of_its_positions(kept):
    tree = {
        "kind": "serve",
        "name": "endpoint",
        "storage": kept.job.storage,
        "model": dump(kept.job)["model"],
        "adapters": [{"artifact": "long"}],
        "engine": {"name": "native", "max_length": 200},
        "http": {"port": free_port()},
    }
    plan = prepare_serving(decode(ServeJob, Document("test", tree)))
    assert plan.rope_scaling == kept.job.model.rope_scaling
    without = tree | {"model": tree["model"] | {"rope_scaling": None}}
    with pytest.raises(ArtifactError, match="was trained on positions scaled by"):
        prepare_serving(decode(ServeJob, Document("test", without)))
    with pytest.raises(ConfigError, match=r"engine\.max_length: 200 tokens"):
        prepare_serving(decode(ServeJob, Document("test", without | {"adapters": []})))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_job_comes_back_from_what_dump_gives(kept):
    assert decode(type(kept.job), Document("dumped", dump(kept.job))) == kept.job


def test_configs_that_read_models_say_the_same_names():
    assert "rope_parameters" in LlamaConfig().to_dict(), "another major version of transformers spells it otherwise"
