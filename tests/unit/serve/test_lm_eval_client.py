"""The lm-evaluation-harness through `local-completions` finds what its own `hf` backend finds, in fp32: for the base
model, an adapter and the two merged, on a task with choices, one with answers and one with a perplexity."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from lmray.models.load import load_model, load_tokenizer
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.jobs import write_jsonl
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder, tiny_tokenizer
from tests.unit.serve.servers import MAX_LENGTH, EngineBackend

for package in ("lm_eval", "tenacity"):
    pytest.importorskip(package)

CHOICES = ["red", "green", "青い🙂"]
ROWS = [
    {
        "question": f"say {word}:",
        "choices": CHOICES,
        "answer": place % 3,
        "text": f"{word} は {CHOICES[place % 3]} です",
    }
    for place, word in enumerate(("a", "bb", "赤", "d e f", "one", "ひとつ"))
]
TASKS: dict[str, dict[str, Any]] = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "saying": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n", "é"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Any:
    """The tasks, and folders of the model, an adapter, and the two merged."""
    root = tmp_path_factory.mktemp("lm_eval_client")
    # as wide as the tokenizer: the harness cuts a model with an adapter to that, which would change what is likely
    base = tiny_model_folder(root / "tiny", vocab_size=len(tiny_tokenizer()))
    adapter = tiny_adapter_folder(base, root / "adapter", seed=3)
    merged: Any = PeftModel.from_pretrained(load_model(base, "float32"), str(adapter)).merge_and_unload()
    merged.save_pretrained(root / "merged")
    load_tokenizer(base).save_pretrained(root / "merged")
    (root / "tasks").mkdir()
    data = write_jsonl(root / "tasks" / "rows.jsonl", ROWS)
    for name, fields in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        text = yaml.safe_dump({"task": name, **source, **fields}, allow_unicode=True)
        (root / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return SimpleNamespace(tasks=root / "tasks", base=base, adapter=adapter, merged=root / "merged")


@pytest.fixture(scope="module")
def urls(place) -> Iterator[dict[str, tuple[str, str]]]:
    """Where each of the three is served, and under which name."""
    attached, merged = EngineBackend(place.base, {"helper": place.adapter}), EngineBackend(place.merged)
    tokenizer, settings = load_tokenizer(place.base), GatewaySettings("tiny", MAX_LENGTH)
    try:
        with (
            listening(make_app(attached, tokenizer, settings), path="/v1") as url,
            listening(make_app(merged, tokenizer, settings), path="/v1") as merged_url,
        ):
            yield {"base": (url, "tiny"), "adapter": (url, "helper"), "merged": (merged_url, "tiny")}
    finally:
        for backend in (attached, merged):
            asyncio.run(backend.engine.close())


def answers(model: Any, folder: Path) -> dict[str, list[list[Any]]]:
    """What `model` answered to each question of each task: log probabilities and whether they are greedy, or texts."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    told: Any = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    samples = lm_eval.simple_evaluate(model, **told)["samples"]
    ordered = {name: sorted(found, key=lambda one: one["doc_id"]) for name, found in samples.items()}
    return {name: [list(flat(one["resps"])) for one in found] for name, found in ordered.items()}


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from flat(one)
    else:
        yield value


@pytest.mark.parametrize("target", ["base", "adapter", "merged"])
def test_the_harness_finds_through_http_what_it_finds_with_the_model_itself(place, urls, monkeypatch, target):
    remote = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    local = pytest.importorskip("lm_eval.models.huggingface").HFLM
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    torch.set_num_threads(1)
    folder = place.merged if target == "merged" else place.base
    peft = {"peft": str(place.adapter)} if target == "adapter" else {}
    own = local(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, max_length=MAX_LENGTH - 1, **peft)
    url, name = urls[target]
    told = {"tokenizer_backend": "huggingface", "tokenizer": str(place.base), "max_length": MAX_LENGTH - 1}
    asked = remote(model=name, base_url=f"{url}/completions", batch_size=2, num_concurrent=2, **told)
    found, expected = answers(asked, place.tasks), answers(own, place.tasks)
    assert found["saying"] == expected["saying"]
    assert any(text for [text] in expected["saying"]), "nothing was said"
    for task in ("choosing", "reading"):
        for one, other in zip(found[task], expected[task], strict=True):
            assert [float(value) for value in one] == pytest.approx([float(value) for value in other], abs=1e-3)


def test_the_three_are_told_apart(place, urls, monkeypatch):
    """Or the adapter was never asked."""
    remote = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    told = {"tokenizer_backend": "huggingface", "tokenizer": str(place.base), "max_length": MAX_LENGTH - 1}
    found = {
        target: answers(remote(model=name, base_url=f"{url}/completions", batch_size=4, **told), place.tasks)[
            "choosing"
        ]
        for target, (url, name) in urls.items()
    }
    first = {target: float(one[0][0]) for target, one in found.items()}
    assert first["adapter"] == pytest.approx(first["merged"], abs=1e-2) != pytest.approx(first["base"], abs=1e-2)
