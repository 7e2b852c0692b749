"""Tuning and pruning in one run, on a model small enough for a test."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmray.adapters.lora import Lora
from lmray.artifacts.store import run_folder
from lmray.config import dump
from lmray.errors import DataError, DivergenceError
from lmray.evaluate.loss import held_out_loss
from lmray.job import TrainJob
from lmray.methods._distill import distilled
from lmray.metrics.events import read_events
from lmray.models.load import load_model
from lmray.models.precision import round_weights
from lmray.models.shape import read_shape
from lmray.models.supervised import IGNORED
from lmray.pruning.gates import Gates
from lmray.pruning.record import Pruning
from lmray.pruning.structure import structure_of
from lmray.testing.jobs import curve, run_here, tiny_rows, write_jsonl
from lmray.testing.kills import Killed, file_operations
from lmray.testing.tiny import tiny_model_folder
from lmray.train.learner import Learner
from lmray.train.memory import Rows, bytes_per_row, memory_parts, searched_at_once
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


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


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_what_is_kept_has_the_type_that_the_base_lies_in_and_is_measured_as_it_is_kept(job, tmp_path, trained):
    base = tiny_model_folder(tmp_path / "base")
    round_weights(load_model(base, "float32"), torch.bfloat16).save_pretrained(base)
    one = job(model__source=str(base), model__dtype=trained, evaluate__tasks=["loss"])
    result = run_here(one, tmp_path / "scratch")
    kept = folder_of(one) / "model"
    assert {tensor.dtype for tensor in weights(one).values()} == {torch.bfloat16}
    assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16"
    assert (kept / "model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    rows = prepare(one).eval_rows
    again = held_out_loss(load_model(kept, trained), rows, batch_size=8, pad_token_id=0, device="cpu")
    assert result.metrics["eval.loss"] == pytest.approx(again, abs=1e-6)


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
    assert "1 of 2" in (folder_of(one) / "report.html").read_text(encoding="utf-8"), "layers kept"
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


@pytest.mark.parametrize(("commits", "goes_on_at"), [(0, 1), (1, 3), (3, 7), (5, None)])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(job, tmp_path, commits, goes_on_at):
    """Before its first checkpoint, in the search, in the frozen phase, and as the model is written."""
    whole = job("whole")
    operations = file_operations(tmp_path / "whole", lambda: run_here(whole, tmp_path / "scratch"))
    written = [at for at, (event, path) in enumerate(operations, 1) if event == "os.rename" and "/.checkpoint" in path]
    assert len(written) == 5
    model = next(at for at, (_, path) in enumerate(operations, 1) if path.endswith("/model"))
    at = [*(at - 3 for at in written), model][commits]  # while the files of the next checkpoint are written
    parts = job("parts")
    with pytest.raises(Killed):
        file_operations(tmp_path / "parts", lambda: run_here(parts, tmp_path / "scratch-2"), kill_at=at)
    assert run_here(parts, tmp_path / "scratch").status == "succeeded"
    second = [event["step"] for event in read_events(folder_of(parts) / "events.jsonl") if event["attempt"] == 2]
    assert second[:1] == ([goes_on_at] if goes_on_at else [])
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


def test_a_search_takes_half_the_rows_at_once_and_the_plan_counts_what_it_keeps(job, tmp_path, monkeypatch):
    seen, gradients = [], Learner._gradients
    monkeypatch.setattr(
        Learner,
        "_gradients",
        lambda self, share, leaves: (
            seen.append([len(one.lengths) for one in share.batches]) or gradients(self, share, leaves)
        ),
    )
    path = write_jsonl(tmp_path / "alike.jsonl", [{"prompt": f"{n:02}?", "completion": "yes"} for n in range(40)])
    one = job().changed({"data.train": [{"source": str(path)}], "data.eval": None, "train.eval_steps": None})
    one = one.changed({"train.max_steps": 2, "train.per_device_train_batch_size": 4})
    run_here(one, tmp_path / "scratch")
    assert seen == [[2, 2]]
    plain = {"method": {"name": "sft"}, "model.kernels": "plain"}
    for rows in (4, 2, 1):
        sized = one.changed({"train.per_device_train_batch_size": rows})
        plan, tuned = make_plan(sized), make_plan(sized.changed(plain))
        alone = plan.memory_bytes["total"] - plan.memory_bytes["search"]
        assert alone == pytest.approx(tuned.memory_bytes["total"], rel=0.05)
        assert 0.1 < plan.memory_bytes["search"] / tuned.row_bytes < 0.6, "one row of a search for two of a step"
        assert plan.row_bytes == tuned.row_bytes
    loss = make_plan(one), make_plan(one.changed({"method.distill": 1.0}))
    assert loss[1].memory_bytes["logits"] > 4 * loss[0].memory_bytes["logits"], "a teacher's logits are there, too"
    assert "teacher" in loss[1].reasons["loss"] and "chunk by chunk" in loss[0].reasons["loss"]


def test_longer_rows_to_search_on_are_what_a_micro_batch_is_planned_for(tiny_model):
    shape = read_shape(tiny_model, lambda model: Lora(r=4).attach(model, seed=0))
    settings = {"device": "cpu", "process_bytes": 0, "optimizer_bytes": 0}
    longest = Rows(1, 400, 40, False, searched=True)
    sizes = {"step": Rows(1, 40, 4, False), "search": longest}
    step, search = (bytes_per_row(shape, one, "float32", device="cpu") for one in sizes.values())
    for count in (1, 2, 3, 4, 8):
        rows = replace(sizes["step"], count=count, search=longest)
        parts = memory_parts(shape, rows, "float32", **settings)
        planned = sum(parts[part] for part in ("activations", "logits", "search"))
        assert planned >= max(count * step, searched_at_once(count) * search)
        assert planned <= count * step + (count / 2 + 1) * search
        assert bytes_per_row(shape, rows, "float32", device="cpu") == -(-search // 2)


def test_a_job_that_says_nothing_of_it_draws_no_noise(job):
    assert job(method={"name": "atp", "remaining": 0.6}).method.gate == "deterministic"


def test_a_row_that_repeats_goes_to_one_side(job, tiny_model, tmp_path):
    one = job()
    sources = [{**dump(source), "weight": 2.0} for source in one.data.train]
    prepared = prepare(one.changed({"data.train": sources}))
    searched = {example.where for example in prepared.search.examples}
    assert searched and not searched & {example.where for example in prepared.train.examples}


def numbers(rows_in: dict[str, str]) -> set[int]:
    (text,) = rows_in.values()
    spans = [[int(one) for one in span.split("-")] for span in text.split(", ")]
    return {number for span in spans for number in range(span[0], span[-1] + 1)}


def test_what_is_held_out_is_neither_trained_nor_searched_on_wherever_it_stands(job, tmp_path):
    """Held-out rows of their own may be rows that are trained on, in another file."""
    rows = tiny_rows(40)
    held = write_jsonl(tmp_path / "held.jsonl", [rows[3], rows[17], {"prompt": "new?", "completion": "yes"}])
    own = [{"source": str(held), "assistant_only_loss": False}]
    eval_of = {"data.eval.split": None, "data.eval.by": None, "data.eval.sources": own}
    one = job().changed(eval_of)
    prepared = prepare(one)
    places = {example.where for part in (prepared.train, prepared.search) for example in part.examples}
    assert len(places) == 38 and not any(place.endswith((":4", ":18")) for place in places)
    assert any("2 training rows are held out, too" in line for line in make_plan(one).warnings)
    all_held = one.changed({"data.eval.sources": [dump(one.data.train[0])]})
    with pytest.raises(DataError, match="every training row is held out"):
        prepare(all_held)
    assert prepare(all_held.changed({"method": {"name": "sft"}})).num_held_out_too == 0


def test_the_report_says_which_rows_each_part_had(job, tmp_path):
    one = job()
    run_here(one, tmp_path / "scratch")
    facts = json.loads((folder_of(one) / "data.json").read_text())
    assert sum(facts[name]["rows"] for name in ("train", "search", "eval")) == 40
    assert len({facts[name]["rows_digest"] for name in ("train", "search", "eval")}) == 3
    told = {name: numbers(facts[name]["rows_in"]) for name in ("train", "search", "eval")}
    assert told["search"] == {int(example.where.rpartition(":")[2]) for example in prepare(one).search.examples}
    assert sum(map(len, told.values())) == len(set().union(*told.values())) == 40
    page = (folder_of(one) / "report.html").read_text()
    assert all(html.escape(text) in page for name in told for text in facts[name]["rows_in"].values())
    lines = "\n".join(make_plan(one).lines())
    assert "to search masks on" in lines and "masks are searched in 5 of 10 steps" in lines


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


@torch.no_grad()
def test_what_is_distilled_is_the_divergence_from_the_same_weights_without_masks(tiny_model):
    """Against its definition, token by token in float64."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear", r=2)
    ).eval()
    gates = Gates(model, structure_of(model, block=1))
    ids_BT = torch.arange(24).view(2, 12)
    labels_BT = ids_BT.masked_fill(torch.arange(12) < 5, IGNORED)
    inputs = {"input_ids": ids_BT}
    given: Any = SimpleNamespace(inputs=inputs, labels_BT=labels_BT)
    open_BTV = model(**inputs).logits.double()
    gates.masks["channels"][:, ::3] = 0.0
    gates.masks["groups"][0, 0] = 0.0
    shut_BTV = model(**inputs).logits.double()
    expected = 0.0
    for row in range(2):
        for place in range(4, 11):
            taught, said = (one[row, place].log_softmax(-1) for one in (open_BTV, shut_BTV))
            expected += float((taught.exp() * (taught - said)).sum()) * 0.7 - float(said[labels_BT[row, place + 1]])
    assert float((open_BTV - shut_BTV).abs().max()) > 1e-3
    assert float(distilled(gates, 0.7)(model, given)) == pytest.approx(expected, rel=1e-5)


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


def test_devices_divide_the_heads_that_are_kept(job, tmp_path):
    one = job(method__tensor_parallel=2, method__remaining=0.7)
    run_here(one, tmp_path / "scratch")
    assert logged(one)[-1]["groups"] == [2, 2]


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
