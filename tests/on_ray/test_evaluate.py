"""Evaluation on Ray: an interrupt ends the task, and what it had measured stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from lmray.config import Document, decode
from lmray.errors import CapacityError
from lmray.evaluate.kept import kept_path
from lmray.job import EvaluateJob
from lmray.on_ray.evaluate import evaluate
from lmray.testing.jobs import tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_adapter_folder
from lmray.testing.waiting import wait_until


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_one_signal_ends_an_evaluation_and_keeps_what_was_measured(tiny_model, tmp_path, number):
    data = write_jsonl(tmp_path / "data.jsonl", tiny_rows(64))
    adapter = tiny_adapter_folder(tiny_model, tmp_path / "adapter", seed=3)
    words = ("base", str(adapter), "--model", str(tiny_model), "--tasks", "loss,f1", "--data", str(data))
    command = (sys.executable, "-m", "lmray", "evaluate", *words, "--name", "e", "--max-new-tokens", "600", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        kept = kept_path(tmp_path / "store" / "runs" / "e", "base")
        wait_until(lambda: kept.is_file() or running.poll() is not None, "the base's losses")
        running.send_signal(number)
        said, complaint = running.communicate(timeout=300)
    assert running.returncode == 130, complaint
    assert json.loads(said)["status"] == "stopped" and "Traceback" not in complaint
    assert kept.is_file() and not (kept.parent / "result.json").exists()


def test_a_store_that_is_a_file_is_told_before_ray_starts(tiny_model, tiny_data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    tree = {"name": "e", "storage": str(tmp_path / "file"), "model": {"source": str(tiny_model), "dtype": "float32"}}
    tree |= {"data": {"train": [{"source": str(tiny_data)}], "eval": {"split": 0.25}, "max_length": 256}}
    tree |= {"targets": [{"label": "base"}], "evaluate": {"tasks": ["loss"]}}
    monkeypatch.setattr("lmray.on_ray.evaluate.connected", lambda: pytest.fail("Ray started"))
    with pytest.raises(CapacityError, match="is a file"):
        evaluate(decode(EvaluateJob, Document("test", tree)))
