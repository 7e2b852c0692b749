"""Tuning and pruning in one run, on a model small enough for a test."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, OlmoConfig

from lmray.adapters.lora import Lora
from lmray.artifacts.store import run_folder
from lmray.config import dump
from lmray.errors import ConfigError, DataError, DivergenceError
from lmray.job import TrainJob
from lmray.methods.atp import Atp
from lmray.metrics.events import read_events
from lmray.models.load import load_model
from lmray.pruning.masks import Budget
from lmray.pruning.record import Pruning
from lmray.pruning.structure import structure_of
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.kills import Killed, file_operations
from lmray.testing.pruned import TINY_ATP
from lmray.train.learner import Learner
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path):
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(40))

    def make(storage: str = "store", **changes: Any) -> TrainJob:
        fields = {key.removeprefix("method__"): changes.pop(key) for key in [*changes] if "method__" in key}
        settings: dict[str, Any] = {
            "method": {**TINY_ATP, **fields},
            "train__max_steps": 10,
            "train__eval_steps": 5,
            "resources__step_timeout_s": None,
            **changes,
        }
        return tiny_job(tiny_model, rows, tmp_path / storage, **settings)

    return make


def folder_of(job: TrainJob) -> Path:
    return run_folder(job)


def logged(job: TrainJob) -> list[dict[str, Any]]:
    return read_events(folder_of(job) / "masks.jsonl")


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(folder_of(job) / "model" / "model.safetensors")


def test_a_run_ends_with_a_smaller_model_that_plain_transformers_loads(job, tmp_path):
    one = job(evaluate__tasks=["loss"], output={"artifact": "smaller"})
    result = run_here(one, tmp_path / "scratch")
    assert result.status == "succeeded" and result.artifact
    model = AutoModelForCausalLM.from_pretrained(folder_of(one) / "model")
    base = AutoModelForCausalLM.from_pretrained(one.model.source)
    record = json.loads((folder_of(one) / "model" / "pruning.json").read_text())
    read = Pruning.beside(folder_of(one) / "model")
    assert read is not None and read.model_dump(mode="json") == record, "what a run wrote, its class reads"
    assert record["parameters"] == {"before": base.num_parameters(), "after": model.num_parameters()}
    assert result.metrics["model.parameters"] == model.num_parameters() < base.num_parameters()
    assert base.num_parameters() - model.num_parameters() == record["prunable"]["before"] - record["prunable"]["after"]
    assert 0.5 < record["remaining"] <= record["asked"] == 0.6
    assert record["parent"]["digest"] == make_plan(one).model["digest"]
    assert len(set(map(len, record["kept"]["channels"]))) == 1, "uniform"
    # What was masked in training and what was cut give one held-out loss, and the base one of its own.
    assert result.metrics["eval.loss"] == pytest.approx(curve(one, "eval.loss")[-1], abs=1e-4)
    assert abs(result.metrics["base.loss"] - result.metrics["eval.loss"]) > 1e-2
    assert [line["phase"] for line in logged(one)] == ["search"] * 5 + ["frozen"] * 2
    assert logged(one)[-1]["channels"] == [len(units) for units in record["kept"]["channels"]]
    assert logged(one)[-1]["groups"] == [len(units) for units in record["kept"]["groups"]]


def test_layers_of_different_widths_end_as_what_was_masked(job, tmp_path):
    one = job(method__shape="hetero", train__load_best_model_at_end=False)
    result = run_here(one, tmp_path / "scratch")
    folder = folder_of(one) / "model"
    record = Pruning.beside(folder)
    model: Any = load_model(folder, "float32")
    assert record is not None and record.shape == "hetero" and record.remaining <= 0.6
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == list(map(len, record.kept["channels"])) == logged(one)[-1]["channels"], "nothing is filled up"
    assert result.metrics["eval.loss"] == pytest.approx(curve(one, "eval.loss")[-1], abs=1e-4)
    assert result.metrics["model.parameters"] == model.num_parameters()


def test_whole_layers_are_left_out_of_the_model(job, tmp_path):
    one = job(method__layers=1, method__remaining=0.4, train__load_best_model_at_end=False)
    result = run_here(one, tmp_path / "scratch")
    folder = folder_of(one) / "model"
    model, record = AutoModelForCausalLM.from_pretrained(folder), Pruning.beside(folder)
    assert model.config.num_hidden_layers == 1 and record is not None and record.remaining <= 0.4
    assert sorted(map(len, record.kept["groups"]))[0] == 0 == logged(one)[-1]["groups"].count(0) - 1
    assert result.metrics["eval.loss"] == pytest.approx(curve(one, "eval.loss")[-1], abs=1e-4)
    assert result.metrics["model.parameters"] == model.num_parameters()


def test_the_budget_is_met_from_the_freeze_on_and_removed_slices_stay_zero(job, tmp_path):
    one = job()
    run_here(one, tmp_path / "scratch")
    remaining, removed = curve(one, "prune.remaining"), curve(one, "prune.removed_norm")
    assert remaining[5:] == [remaining[-1]] * 5 and remaining[-1] <= 0.6
    assert len(curve(one, "prune.search_loss")) == 5, "nothing is searched any more"
    assert removed[0] == 0 < min(removed[1:5]) and removed[5:] == [0.0] * 5
    trained = load_file(max(folder_of(one).glob("*/weights.safetensors")))
    kept = json.loads((folder_of(one) / "model" / "pruning.json").read_text())["kept"]["channels"]
    for layer, units in enumerate(kept):
        (up_B,) = (one for name, one in trained.items() if f"layers.{layer}.mlp.up_proj.lora_B" in name)
        zero = up_B.abs().sum(1) == 0
        assert (~zero).nonzero().flatten().tolist() == units and zero.any()


def test_the_masks_follow_the_budget_while_they_are_searched(job, tmp_path):
    one = job(train__max_steps=60, method__remaining=0.5, method__freeze_after=0.9, train__eval_steps=60)
    run_here(one, tmp_path / "scratch")
    remaining = curve(one, "prune.remaining")
    assert remaining[:6] == [1.0] * 6, "units are weighed first"
    assert remaining == sorted(remaining, reverse=True) and remaining[-1] <= 0.5
    assert 0.6 < remaining[12] < 0.95, "what is removed is removed little by little"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method__shape": "padded", "method__gate": "deterministic"},
        {"method__shape": "hetero", "method__layers": 1, "method__remaining": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [3, 8], ids=["searching", "frozen"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(job, tmp_path, changes, stop_at):
    whole, parts = job("whole", **changes), job("parts", **changes)
    run_here(whole, tmp_path / "scratch")
    assert run_here(parts, tmp_path / "scratch", stop_at=stop_at).status == "stopped"
    assert run_here(parts, tmp_path / "scratch").status == "succeeded"
    for name in ("train.loss", "prune.search_loss", "prune.remaining", "prune.removed_norm", "eval.loss"):
        assert curve(parts, name) == curve(whole, name), name
    assert logged(parts) == logged(whole)
    expected = weights(whole)
    assert expected and all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts).items())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(job, tmp_path, share):
    whole = job("whole")
    operations = file_operations(tmp_path / "whole", lambda: run_here(whole, tmp_path / "scratch"))
    parts = job("parts")
    with pytest.raises(Killed):
        at = round(share * len(operations))
        file_operations(tmp_path / "parts", lambda: run_here(parts, tmp_path / "scratch-2"), kill_at=at)
    assert run_here(parts, tmp_path / "scratch").status == "succeeded"
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts).items())
    assert logged(parts) == logged(whole)


def test_no_row_is_both_trained_and_searched_on(job):
    prepared = prepare(job())
    sets = [{example.where for example in part.examples} for part in (prepared.train, prepared.search, prepared.eval)]
    assert all(sets) and sum(map(len, sets)) == len(set().union(*sets)) == 40
    topics = [
        {example.columns["topic"] for example in prepared.examples.train if example.where in one} for one in sets[:2]
    ]
    assert topics[0] and topics[1] and not topics[0] & topics[1], "`data.eval.by` keeps rows together here, too"
    assert len(sets[1]) == pytest.approx(0.25 * (len(sets[0]) + len(sets[1])), abs=4)
    assert {example.where for row in prepared.search_rows for example in row} == sets[1]
    assert {example.where for row in prepared.rows for example in row} == sets[0]


def test_a_row_that_repeats_goes_to_one_side(job, tiny_model, tmp_path):
    one = job()
    sources = [{**dump(source), "weight": 2.0} for source in one.data.train]
    prepared = prepare(one.changed({"data.train": sources}))
    searched = {example.where for example in prepared.search.examples}
    assert searched and not searched & {example.where for example in prepared.train.examples}


def test_the_report_says_which_rows_each_part_had(job, tmp_path):
    one = job()
    run_here(one, tmp_path / "scratch")
    facts = json.loads((folder_of(one) / "data.json").read_text())
    assert sum(facts[name]["rows"] for name in ("train", "search", "eval")) == 40
    assert len({facts[name]["rows_digest"] for name in ("train", "search", "eval")}) == 3
    assert any("to search masks on" in line for line in make_plan(one).lines())


def test_one_row_cannot_be_set_aside(job, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", tiny_rows(1))
    one = job().changed({"data.train": [{"source": str(path)}], "data.eval": None, "train.eval_steps": None})
    with pytest.raises(DataError, match=r"1 row\(s\) of one group, and none would be left"):
        prepare(one)
    write_jsonl(path, [{**row, "prompt": "the same"} for row in tiny_rows(5)])
    with pytest.raises(DataError, match=r"5 row\(s\) of one group"):
        prepare(one)


def test_rows_that_share_a_prompt_go_to_one_side(job, tmp_path):
    rows = [{**row, "prompt": f"question {number % 9}"} for number, row in enumerate(tiny_rows(36))]
    path = write_jsonl(tmp_path / "twice.jsonl", rows)
    changes = {"data.train": [{"source": str(path)}], "data.eval": None, "train.eval_steps": None}
    prepared = prepare(job().changed(changes))
    asked = {example.where: example.prompt[0]["content"] for example in prepared.examples.train}
    trained, searched = (
        {asked[example.where] for example in part.examples} for part in (prepared.train, prepared.search)
    )
    assert len(searched) == 2 and trained and not trained & searched, "2 of 9 are as near to a quarter as it comes"


def test_layers_that_run_again_change_no_number(job, tmp_path):
    kept, again = job("kept"), job("again", train__gradient_checkpointing=True)
    for one in (kept, again):
        run_here(one, tmp_path / "scratch")
    for name in ("train.loss", "prune.search_loss", "prune.remaining"):
        assert curve(again, name) == pytest.approx(curve(kept, name), abs=1e-5), name


def test_the_plan_counts_the_work_of_searching(job):
    plain = make_plan(job(method="sft")).flops
    pruned, taught = make_plan(job()).flops, make_plan(job(method__distill=0.5)).flops
    assert pruned["total"] / pruned["step"] == pytest.approx(plain["total"] / plain["step"] + 5, rel=0.05)
    assert taught["total"] > 1.4 * pruned["total"]


def test_distilling_gives_another_curve_and_the_same_kind_of_model(job, tmp_path):
    plain, taught = job("plain"), job("taught", method__distill=1.0)
    for one in (plain, taught):
        assert run_here(one, tmp_path / "scratch").status == "succeeded"
    assert curve(taught)[-1] > curve(plain)[-1], "the divergence counts in the loss"
    assert len(weights(taught)) == len(weights(plain))


def test_in_stages_each_removes_a_third_at_most(job, tmp_path):
    one = job(
        method__remaining=0.4,
        method__schedule="progressive",
        method__shape="padded",
        train__max_steps=90,
        train__eval_steps=90,
        method__freeze_after=0.9,
    )
    run_here(one, tmp_path / "scratch")
    remaining = curve(one, "prune.remaining")
    assert all(late / early >= 0.6 for early, late in pairwise(remaining)), "a third, and the width of a head"
    assert 0.55 < remaining[20] < 0.8 and remaining[-1] <= 0.4


def test_the_best_model_is_looked_for_among_those_of_the_budget(job, tmp_path):
    one = job(train__load_best_model_at_end=True, train__eval_steps=1)
    result = run_here(one, tmp_path / "scratch")
    assert result.metrics["train.best_step"] > 5


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a share above one": ({"method__remaining": 1.2}, "method.remaining", "less than or equal to 1"),
    "none left": ({"method__remaining": 0.0}, "method.remaining", "greater than 0"),
    "less than a group": ({"method__remaining": 0.2}, "method.remaining", "0.2 is less than the narrowest model"),
    "no lora": ({"adapter": "full"}, "adapter.target_modules", "has no plain LoRA"),
    "ia3": ({"adapter": {"name": "ia3"}}, "adapter.target_modules", "has no plain LoRA"),
    "dora": ({"adapter": {"name": "lora", "use_dora": True}}, "adapter.target_modules", "has no plain LoRA"),
    "lora on few": ({"adapter__target_modules": ["q_proj"]}, "adapter.target_modules", "`self_attn.k_proj` has no"),
    "quantised": ({"model__quantization": "nf4"}, "model.quantization", "cannot be cut"),
    "compiled": ({"train__torch_compile": True}, "train.torch_compile", "would not see the masks"),
    "averages": ({"train__optim": "schedule_free_adamw"}, "train.optim", "would not be"),
    "fused": ({"model__kernels": "fused"}, "model.kernels", "masks lie between"),
    "an engine": (
        {"sharding": {"name": "deepspeed", "stage": 2}},
        "sharding.name",
        "through the engine of `deepspeed`",
    ),
    "devices": (
        {"method__tensor_parallel": 3, "method__multiple_of": 6},
        "method.tensor_parallel",
        "3 devices do not divide 2",
    ),
    "no step to search": ({"method__freeze_after": 0.09}, "method.freeze_after", "0.09 of 10 step(s) leaves none"),
    "one step": ({"train__max_steps": 1, "train__eval_steps": 1}, "method.freeze_after", "a run of at least 2 steps"),
    "more layers than there are": ({"method__layers": 3}, "method.layers", "the model has 2 layers, not 3"),
    "too few layers": ({"method__layers": 1}, "method.layers", "1 of 2 layers are less than the 0.6"),
    "wide steps": ({"method__multiple_of": 65}, "method.multiple_of", "is 65"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(job, name):
    changes, where, found = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        make_plan(job(**changes))
    assert where in str(caught.value) and found in str(caught.value)


def test_a_budget_that_is_too_small_is_told_the_least(job):
    with pytest.raises(ConfigError, match=r"allowed: 0\.\d+ to 1: 1 key-value head\(s\) and 8 MLP channel\(s\)"):
        make_plan(job(method__remaining=0.1))
    with pytest.raises(ConfigError, match=r"2 key-value head\(s\)"):
        make_plan(job(method__remaining=0.1, method__tensor_parallel=2))


def test_devices_divide_the_heads_that_are_kept(job, tmp_path):
    one = job(method__tensor_parallel=2, method__remaining=0.7)
    run_here(one, tmp_path / "scratch")
    assert logged(one)[-1]["groups"] == [2, 2]


@pytest.mark.parametrize("shape", ["padded", "hetero"])
def test_devices_and_layers_of_different_widths_do_not_go_together(job, shape):
    with pytest.raises(ConfigError, match="keeps different heads in every layer"):
        job(method__shape=shape, method__tensor_parallel=2)


def test_devices_divide_the_width_of_the_mlp(job):
    with pytest.raises(ConfigError, match=r"2 devices do not divide `multiple_of: 7`") as caught:
        job(method__tensor_parallel=2, method__multiple_of=7)
    assert "a `multiple_of` that `tensor_parallel` divides" in str(caught.value)


def test_more_than_a_third_at_once_is_warned_of(job):
    assert any("40% of the prunable weights go at once" in line for line in make_plan(job()).warnings)
    assert not any("at once" in line for line in make_plan(job(method__schedule="progressive")).warnings)
    assert not any("at once" in line for line in make_plan(job(method__remaining=0.67)).warnings)


def test_kernels_are_plain_and_the_plan_says_why(job):
    plan = make_plan(job())
    assert plan.kernels == "plain" and "masks lie between" in plan.reasons["kernels"]


def adapted_to(config: Any) -> Any:
    with torch.device("meta"):
        return Lora(r=2).attach(AutoModelForCausalLM.from_config(config), seed=0)


def sized(groups: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": groups,
        "num_key_value_heads": groups,
        "vocab_size": 50,
        "pad_token_id": 0,
    }


def test_a_tensor_that_goes_with_the_heads_undescribed_is_found_before_training():
    model = adapted_to(Olmo2Config(**sized(4, 64)))
    with pytest.raises(ConfigError, match=r"q_norm.weight` goes with the heads .*: \[64\] would be left") as caught:
        Atp(remaining=0.6, multiple_of=8).check(model, steps=10)
    assert caught.value.where == "method.name" and "LAYOUTS" in str(caught.value.hint)


def test_heads_that_no_config_is_written_for_are_never_kept():
    model = adapted_to(LlamaConfig(**sized(4, 64), attention_bias=True))
    structure = structure_of(model, block=1)
    budget = Atp(remaining=0.8, multiple_of=8).budget(model, structure)
    assert budget.group_counts == (1, 2, 4), "3 heads do not divide 64"
    scores: Any = {"groups": torch.tensor([[4.0, 4.0, 4.0, -9.0]] * 2), "channels": torch.zeros(2, 32)}
    assert budget.cut(scores)["groups"].sum(1).tolist() != [3, 3]
    free = Budget(structure.sizes, 0.8, "uniform")
    assert free.cut(scores)["groups"].sum(1).tolist() == [3, 3], "which is what they are worth"
    Atp(remaining=0.8, multiple_of=8).check(model, steps=10)
    with pytest.raises(ConfigError, match="configs of 1, 2, 4 of them only") as caught:
        Atp(remaining=0.8, multiple_of=8, shape="padded").check(model, steps=10)
    assert caught.value.where == "method.shape" and "uniform" in str(caught.value.hint)


def test_what_layers_add_is_known_only_of_architectures_that_are_described():
    model = adapted_to(OlmoConfig(**sized(4, 64)))
    Atp(remaining=0.4, multiple_of=8).check(model, steps=10)
    with pytest.raises(ConfigError, match="a layer of `olmo` of which nothing is kept may still change") as caught:
        Atp(remaining=0.4, multiple_of=8, layers=1).check(model, steps=10)
    assert caught.value.where == "method.layers"


def test_three_digits_say_that_layers_stay_whole():
    model = adapted_to(LlamaConfig(**{**sized(4, 64), "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="2 of 3 layers are less") as caught:
        Atp(remaining=0.7, multiple_of=8, layers=2).check(model, steps=10)
    assert "`remaining: 0.667`" in str(caught.value)
    Atp(remaining=0.667, multiple_of=8, layers=2).check(model, steps=10)


def test_what_is_read_by_few_is_warned_of(job):
    assert any(
        "plain `transformers` and vLLM do not read" in one for one in make_plan(job(method__shape="hetero")).warnings
    )


def test_a_layer_that_adds_something_of_its_own_cannot_go():
    config = {**sized(4, 64), "num_key_value_heads": 2}
    model = adapted_to(LlamaConfig(**config, mlp_bias=True))
    with pytest.raises(ConfigError, match=r"`mlp.down_proj` has a bias") as caught:
        Atp(remaining=0.4, multiple_of=8, layers=1).check(model, steps=10)
    assert caught.value.where == "method.layers"


@pytest.mark.parametrize("shape", ["uniform", "padded", "hetero"])
def test_a_llama_without_biases_may_keep_any_number_of_heads(shape):
    model = adapted_to(LlamaConfig(**sized(3, 48)))
    Atp(remaining=0.8, multiple_of=8, shape=shape).check(model, steps=10)


def test_a_model_of_which_no_part_has_a_config_is_refused():
    model = adapted_to(LlamaConfig(**{**sized(4, 64), "num_key_value_heads": 2}, attention_bias=True))
    model.get_base_model().config.hidden_size = 61
    with pytest.raises(ConfigError, match="no config can be written"):
        Atp(remaining=0.8, multiple_of=8).check(model, steps=10)


def test_a_search_that_is_not_finite_ends_the_run_and_names_its_rows(job, tmp_path, monkeypatch):
    def gradients(self, share, leaves):
        return math.nan, [torch.zeros_like(leaf) for leaf in leaves]

    monkeypatch.setattr(Learner, "_gradients", gradients)
    one = job()
    with pytest.raises(DivergenceError, match="step 1: the search loss is nan") as caught:
        run_here(one, tmp_path / "scratch")
    written = json.loads((folder_of(one) / "diverged.json").read_text())
    searched = {example.where for example in prepare(one).search.examples}
    assert written["step"] == 1 and written["rows"] and set(written["rows"]) <= searched
    assert caught.value.final and (folder_of(one) / "report.html").exists()
