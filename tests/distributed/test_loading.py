"""Through the program: weights read by part or whole, layers run again or not, give one curve; keeping loads none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.artifacts.store import run_folder
from lmray.testing.jobs import curve, run_here, tiny_job
from lmray.testing.ranks import train_ranks

ADAPTERS = {
    "lora": {},
    "full": {"adapter": "full", "train__learning_rate": 1e-3},
    "partial": {"adapter": {"name": "partial", "last_n": 1}},
}


@pytest.fixture
def job(tiny_data, tmp_path):
    def make(model, name: str, sharding="fsdp2", **changes):
        rows = {"train__per_device_train_batch_size": 4, "train__max_steps": 3, "train__eval_steps": 2}
        rows |= {"evaluate": {"tasks": ["loss"]}, "resources": {"workers": 2}, **changes}
        return tiny_job(model, tiny_data, tmp_path / name, sharding=sharding, **rows)

    return make


@pytest.fixture(scope="module")
def written_twice(tiny_model, tmp_path_factory):
    """The same model, in a file that also has the head that is its embedding: such a one is read whole."""
    folder = tmp_path_factory.mktemp("twice") / "model"
    shutil.copytree(tiny_model, folder)
    found = load_file(folder / "model.safetensors")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loading(one) -> tuple[str, str]:
    plan = json.loads((run_folder(one) / "plan.json").read_text(encoding="utf-8"))
    return plan["loading"], plan["reasons"]["loading"]


def kept(one) -> dict[str, torch.Tensor]:
    (path,) = (run_folder(one) / one.adapter.kept).glob("*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_read_by_part_the_curve_is_bit_for_bit_that_of_reading_whole(job, tiny_model, written_twice, adapter):
    part, whole = job(tiny_model, "part", **ADAPTERS[adapter]), job(written_twice, "whole", **ADAPTERS[adapter])
    found, expected = train_ranks(part), train_ranks(whole)
    assert loading(part)[0] == "by part"
    assert loading(whole)[0] == "whole" and "tied to `model.embed_tokens.weight`" in loading(whole)[1]
    assert curve(part)[-1] < curve(part)[0] - 0.01, "the curve must move, else equality says nothing"
    for name in ("train.loss", "eval.loss", "train.grad_norm"):
        assert curve(part, name) == curve(whole, name)
    assert all(found.metrics[name] == expected.metrics[name] for name in ("eval.loss", "base.loss"))
    assert kept(part).keys() == kept(whole).keys()
    assert all(torch.equal(kept(part)[name], tensor) for name, tensor in kept(whole).items())


def test_an_adapter_that_starts_from_the_weights_has_them_read_whole(job, tiny_model, tmp_path):
    one = job(tiny_model, "pissa", adapter={"name": "lora", "r": 4, "init_lora_weights": "pissa"})
    train_ranks(one)
    assert loading(one) == (
        "whole",
        "on every worker, before they are divided: `lora` as it is set starts from the model's weights",
    )
    alone = job(tiny_model, "alone", "single", resources={"workers": 1}, adapter=one.adapter.model_dump(mode="json"))
    alone = alone.changed({"train.per_device_train_batch_size": 8})
    run_here(alone, tmp_path / "scratch")
    # The loss falls by two in three steps, and with it rounding grows: by 2e-6 of it where there is no AVX512.
    assert curve(one) == pytest.approx(curve(alone), rel=5e-6)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_layers_that_run_again_give_the_same_curve(job, tiny_model, sharding):
    plain = job(tiny_model, "plain", sharding, model__kernels="plain")
    again = plain.changed({"train.gradient_checkpointing": True, "name": "again"})
    train_ranks(plain), train_ranks(again)
    assert curve(plain)[-1] < curve(plain)[0] - 0.01
    for name in ("train.loss", "eval.loss"):
        assert curve(again, name) == pytest.approx(curve(plain, name), abs=1e-6)


def test_where_nothing_is_measured_what_was_learnt_is_kept_without_loading_it(job, tiny_model):
    changes = ADAPTERS["full"]
    measured, unmeasured = job(tiny_model, "one", **changes), job(tiny_model, "two", evaluate={"tasks": []}, **changes)
    train_ranks(measured), train_ranks(unmeasured)
    one, two = (sorted((run_folder(run) / "model").iterdir()) for run in (measured, unmeasured))
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
