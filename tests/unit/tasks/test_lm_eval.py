"""Benchmarks of the lm-evaluation-harness, on local files: the same figures as by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from lmray.artifacts.store import run_folder
from lmray.config import Document, decode
from lmray.context import LocalContext
from lmray.errors import ConfigError, DataError
from lmray.evaluate.comparison import comparison_rows, value_text
from lmray.evaluate.measure import check_tasks
from lmray.evaluate.program import evaluate
from lmray.job import EvaluateJob
from lmray.models.load import load_model, load_tokenizer
from lmray.tasks.lm_eval import LmEval, metrics_of
from lmray.testing.jobs import run_here, tiny_job, write_jsonl
from lmray.testing.tiny import tiny_adapter_folder

CHOICES = ["red", "green", "青い"]
QUESTIONS = [f"say {word}" for word in ("a", "bb", "赤", "d e f", "one")]
MAX_TOKENS = 6


def benchmark(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """One benchmark in the harness' YAML, its data beside it."""
    data = write_jsonl(folder / f"{name}.jsonl", rows)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    asked = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **asked, **fields}), encoding="utf-8")


def mean_of(*metrics: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """The tiny model bare and with an adapter, and two benchmarks that the adapter answers by half."""
    root = tmp_path_factory.mktemp("lm_eval")
    adapter, tokenizer = tiny_adapter_folder(tiny_model, root / "adapter", seed=3), load_tokenizer(tiny_model)
    model = PeftModel.from_pretrained(load_model(tiny_model, "float32"), str(adapter)).eval()
    said = [greedy(model, tokenizer, question) for question in QUESTIONS]
    (root / "own").mkdir()
    choosing = [{"question": q, "choices": CHOICES, "answer": place % 3} for place, q in enumerate(QUESTIONS)]
    acc = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": mean_of("acc", "acc_norm")}
    benchmark(root / "own", "choosing", choosing, **acc)
    answers = [{"question": q, "answer": said[place] if place % 2 else "no"} for place, q in enumerate(QUESTIONS)]
    generation = {"until": ["\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False}
    exact = {"output_type": "generate_until", "generation_kwargs": generation, "metric_list": mean_of("exact_match")}
    benchmark(root / "own", "saying", answers, **exact)
    return SimpleNamespace(root=root, own=root / "own", adapter=adapter, model=model, tokenizer=tokenizer, said=said)


@torch.no_grad()
def greedy(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + MAX_TOKENS:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[start:]):
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    start, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, f"{prompt} {answer}"))
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, ids[place]]) for place in range(len(start), len(ids)))


def with_error(name: str, scores: list[float]) -> dict[str, float]:
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return {name: mean, f"{name}_stderr": spread / math.sqrt(len(scores))}


def by_hand(model, tokenizer, said: list[str]) -> dict[str, float]:
    likely = [[log_likelihood(model, tokenizer, question, choice) for choice in CHOICES] for question in QUESTIONS]
    per_letter = [[value / len(choice) for value, choice in zip(one, CHOICES, strict=True)] for one in likely]
    right = [
        [float(max(range(3), key=one.__getitem__) == place % 3) for place, one in enumerate(values)]
        for values in (likely, per_letter)
    ]
    exact = [
        float(bool(place % 2) and greedy(model, tokenizer, question) == said[place])
        for place, question in enumerate(QUESTIONS)
    ]
    return {
        **with_error("lm_eval.choosing.acc", right[0]),
        **with_error("lm_eval.choosing.acc_norm", right[1]),
        **with_error("lm_eval.saying.exact_match", exact),
    }


def test_base_and_tuned_are_measured_as_by_hand_and_shown_side_by_side(place, tiny_model, tmp_path):
    task = {"name": "lm_eval", "tasks": ["choosing", "saying"], "include_path": str(place.own)}
    tree = {
        "kind": "evaluate",
        "name": "benchmarks",
        "storage": str(tmp_path / "store"),
        "model": {"source": str(tiny_model), "dtype": "float32"},
        "targets": [{"label": "base"}, {"label": "tuned", "adapter": str(place.adapter)}],
        "evaluate": {"tasks": [task], "batch_size": 3},
    }
    job = decode(EvaluateJob, Document("test", tree))
    result = evaluate(job, LocalContext(run_folder(job), scratch=tmp_path / "scratch"))
    with place.model.disable_adapter():
        base = by_hand(place.model, place.tokenizer, place.said)
    tuned = by_hand(place.model, place.tokenizer, place.said)
    assert tuned["lm_eval.saying.exact_match"] == 0.4 and base["lm_eval.saying.exact_match"] < 0.4
    for label, expected in (("base", base), ("tuned", tuned)):
        found = result.details["targets"][label]
        assert found == pytest.approx({f"eval.{name}": value for name, value in expected.items()}, abs=1e-9)
    page = (run_folder(job) / "comparison.html").read_text(encoding="utf-8")
    assert f"0.4 ± {tuned['lm_eval.saying.exact_match_stderr']:.2g}" in page and "standard error" in page
    assert "<td title" in page and "exact_match_stderr" not in page
    _, rows = comparison_rows(result.details)
    assert [row[0] for row in rows] == [f"eval.{name}" for name in tuned if not name.endswith("_stderr")]


def test_only_the_first_questions_are_asked_and_one_has_no_standard_error(place):
    task = LmEval(tasks=("choosing",), include_path=str(place.own), limit=1)
    found = task.run(place.model, place.tokenizer, batch_size=1)
    assert set(found) == {"lm_eval.choosing.acc", "lm_eval.choosing.acc_norm"} and set(found.values()) <= {0.0, 1.0}


def test_solved_examples_and_the_chat_template_change_the_question(place, monkeypatch):
    asked, real = [], HFLM.loglikelihood

    def listening(self, requests, **more):
        asked.extend(request.args[0] for request in requests)
        return real(self, requests, **more)

    monkeypatch.setattr(HFLM, "loglikelihood", listening)
    (place.root / "shots").mkdir()
    rows = [{"question": question, "answer": 0, "choices": CHOICES} for question in QUESTIONS]
    acc = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": mean_of("acc")}
    benchmark(place.root / "shots", "shots", rows, **acc, fewshot_split="test")
    settings = {"include_path": str(place.root / "shots"), "limit": 2}
    LmEval(tasks=("shots",), **settings).run(place.model, place.tokenizer, batch_size=2)
    assert set(asked) == set(QUESTIONS[:2])
    asked.clear()
    task = LmEval(tasks=("shots",), num_fewshot=2, apply_chat_template=True, **settings)
    task.run(place.model, place.tokenizer, batch_size=2)
    assert {text.count("<|im_start|>user") for text in asked} == {3}, "two solved examples before the question"


def test_several_ways_of_taking_a_metric_have_names_of_their_own():
    results = {"gsm8k": {"alias": "g", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}}
    assert metrics_of(results) == {
        "lm_eval.gsm8k.exact_match.strict-match": 0.5,
        "lm_eval.gsm8k.exact_match.strict-match_stderr": 0.1,
    }
    assert metrics_of({"a": {"acc,none": 1, "acc_stderr,none": "N/A", "sample_len": 3, "b,none": math.nan}}) == {
        "lm_eval.a.acc": 1.0
    }


def test_what_is_missing_is_told_before_a_model_is_loaded(place, tmp_path, monkeypatch):
    own = str(place.own)
    with pytest.raises(ConfigError, match="a folder"):
        check_tasks([LmEval(tasks=("choosing",), include_path=str(tmp_path / "nowhere"))], [])
    broken = tmp_path / "broken"
    broken.mkdir()
    benchmark(broken, "gone", [{"question": "q", "answer": "a"}], output_type="generate_until")
    (broken / "gone.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot be loaded: .*gone"):
        check_tasks([LmEval(tasks=("gone",), include_path=str(broken))], [])
    (tmp_path / "unsafe").mkdir()
    rows, fields = [{"question": "q", "answer": "a"}], {"output_type": "generate_until", "unsafe_code": True}
    benchmark(tmp_path / "unsafe", "code", rows, **fields)
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        check_tasks([LmEval(tasks=("code",), include_path=str(tmp_path / "unsafe"))], [])
    monkeypatch.setattr("lmray.tasks.lm_eval.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package `lm_eval`") as caught:
        check_tasks([LmEval(tasks=("choosing",), include_path=own)], [])
    assert "pip install 'lmray[lm-eval]'" in str(caught.value.hint)


def test_an_unknown_benchmark_is_refused_with_one_that_is_meant(place, monkeypatch):
    class Few(TaskManager):
        def __init__(self, include_path=None, include_defaults=True):  # the harness' own are thousands of files
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    with pytest.raises(ConfigError, match="did you mean `choosing`"):
        check_tasks([LmEval(tasks=("chosing",), include_path=str(place.own))], [])


def test_a_job_without_data_needs_tasks_that_bring_their_own(place, tiny_model):
    task = {"name": "lm_eval", "tasks": "choosing", "include_path": str(place.own)}
    tree = {"kind": "evaluate", "name": "x", "model": {"source": str(tiny_model)}, "targets": [{"label": "base"}]}
    assert decode(EvaluateJob, Document("test", {**tree, "evaluate": {"tasks": [task]}})).data is None
    with pytest.raises(ConfigError, match="measures on data but has no `data`"):
        decode(EvaluateJob, Document("test", {**tree, "evaluate": {"tasks": [task, "loss"]}}))


def test_a_training_run_measures_benchmarks_before_and_after_without_held_out_data(
    place, tiny_model, tiny_data, tmp_path
):
    task = {"name": "lm_eval", "tasks": ["choosing"], "include_path": str(place.own)}
    changes = {"data__eval": None, "evaluate": {"tasks": [task]}, "train__max_steps": 2}
    job = tiny_job(tiny_model, tiny_data, tmp_path / "store", **changes)
    result = run_here(job, tmp_path / "scratch")
    with place.model.disable_adapter():
        base = by_hand(place.model, place.tokenizer, place.said)
    assert result.metrics["base.lm_eval.choosing.acc"] == base["lm_eval.choosing.acc"]
    assert {"eval.lm_eval.choosing.acc", "eval.lm_eval.choosing.acc_stderr"} <= result.metrics.keys()
    report = (run_folder(job) / "report.html").read_text(encoding="utf-8")
    before = value_text("base.lm_eval.choosing.acc", result.metrics)
    assert "lm_eval.choosing.acc" in report and "±" in before and before in report
