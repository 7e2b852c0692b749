"""What a training run keeps: of which kind, from which parents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.errors import ConfigError
from lmray.models.source import find_model
from lmray.testing.jobs import run_here, tiny_job
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder
from lmray.train.plan import make_plan


class Norms(Adapter):
    """Trains the norms of the model itself, so that a whole model comes out."""

    def attach(self, model, *, seed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model

    @property
    def kept(self) -> str:
        return "model"

    def save(self, model, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model, folder: Path) -> None:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


@pytest.fixture
def job(tiny_model, tiny_data, tmp_path):
    changes = {"output": {"artifact": "kept"}, "evaluate": {"tasks": []}, "model__kernels": "plain"}
    return lambda **more: tiny_job(tiny_model, tiny_data, tmp_path / "store", **(changes | more))


def test_a_run_that_trains_the_model_itself_keeps_a_whole_model(job, tiny_model, tmp_path):
    whole = job().model_copy(update={"adapter": Norms()})
    result = run_here(whole, tmp_path / "scratch")
    assert result.details["model"] == str(run_folder(whole) / "model")
    kept = Artifacts(open_store(str(tmp_path / "store")))
    artifact = kept.find("kept")
    assert artifact.kind == "model" and artifact.base["source"] == str(tiny_model) and artifact.parents == ()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(artifact.files)
    found = find_model("artifact:kept", storage=whole.storage)
    assert found.digest != find_model(str(tiny_model)).digest
    next_one = job(name="next", model__source="artifact:kept")
    run_here(next_one, tmp_path / "scratch")
    assert kept.find("kept").parents == (artifact.ref,) and kept.find("kept").kind == "adapter"


def test_a_run_on_an_artifact_records_its_version_and_is_another_run_once_the_stage_moves(job, tiny_model, tmp_path):
    kept = Artifacts(open_store(str(tmp_path / "store")))
    base = {"source": str(tiny_model), "revision": None, "digest": find_model(str(tiny_model)).digest}
    first = kept.keep("calls", tiny_adapter_folder(tiny_model, tmp_path / "one", seed=1), base=base)
    kept.promote(first.ref, "production")
    one = job(model__source="artifact:calls@production")
    result = run_here(one, tmp_path / "scratch")
    artifact = kept.find(result.artifact)
    assert artifact.parents == (first.ref,)
    assert artifact.base["source"] == f"artifact:{first.ref}"
    assert artifact.base["digest"] == find_model(f"artifact:{first.ref}", storage=one.storage).digest
    assert json.loads((run_folder(one) / "plan.json").read_text())["model"]["source"] == f"artifact:{first.ref}"
    before = make_plan(one).run_key
    second = kept.keep("calls", tiny_model_folder(tmp_path / "two", seed=2), base=base, kind="model")
    assert make_plan(one).run_key == before
    kept.promote(second.ref, "production")
    assert make_plan(one).run_key != before
    with pytest.raises(ConfigError, match="model digest"):
        run_here(one, tmp_path / "scratch")
