"""Batch inference on Ray Data: a pool of workers, of which one dies, and what is told before Ray starts."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmray.artifacts.store import run_folder
from lmray.context import Result
from lmray.errors import ArtifactError, ConfigError
from lmray.generate.plan import answers_folder, make_plan, prepare
from lmray.generate.program import generate as generate_program
from lmray.generate.program import in_this_process
from lmray.on_ray.generate import generate
from lmray.on_ray.portable import portable
from lmray.testing.jobs import tiny_generate_job, tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_model_folder
from lmray.testing.waiting import wait_until


@pytest.fixture
def job(tiny_model, tmp_path):
    """Makes a job of twelve rows, two to a shard."""
    data = write_jsonl(tmp_path / "質問.jsonl", tiny_rows(12))
    small = {"output__shard_size": 2, "sampling__temperature": 1.0}
    return lambda **changes: tiny_generate_job(tiny_model, data, tmp_path / "store", **{**small, **changes})


def parts(job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(answers_folder(job).glob("part-*"))}


def kill_a_worker(job, killed: list[int]) -> None:
    """Once it has begun a shard."""

    def kill() -> bool:
        for path in (run_folder(job) / "shards").glob("*.attempts"):
            with suppress(FileNotFoundError):  # it is done already: then another one's
                _, pid = path.read_text(encoding="utf-8").split()
                os.kill(int(pid), signal.SIGKILL)
                killed.append(int(pid))
                return True
        return False

    wait_until(kill, "a shard that is begun")


def test_shards_of_a_worker_that_is_killed_are_answered_all_the_same(ray_cluster, job, capfd):
    long = {"sampling__max_tokens": 100, "engine__max_length": 256}
    whole, two = job(name="whole", **long), job(name="two", resources__workers=2, **long)
    generate_program(whole, make_plan(whole, prepare(whole)), in_this_process)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(two, killed))
    killer.start()
    result = generate(two)
    killer.join()
    assert killed, "else the test says nothing"
    assert result.status == "succeeded" and result.metrics["generate.rows"] == 12
    assert parts(two) == parts(whole)
    said = capfd.readouterr()
    assert "rows 12/12" in said.err and "tokens/s" in said.err and "Traceback" not in said.err
    again = generate(two)
    assert again.status == "already-done" and again.metrics == result.metrics
    assert again.details == {"answers": str(answers_folder(two)), "digest": result.details["digest"]}


def test_what_a_worker_raises_is_raised(ray_cluster, job, tmp_path, capfd):
    model = tiny_model_folder(tmp_path / "model")
    weights = model / "model.safetensors"
    save_file({**load_file(weights), "model.norm.weight": torch.zeros(7)}, weights, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="cannot be loaded") as raised:
        generate(job(name="spoilt", model__source=str(model)), progress=False)
    assert str(model) in raised.value.where and raised.value.hint == "download or convert it again"
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_cannot_begin_is_told_before_ray_starts(job, monkeypatch):
    monkeypatch.setattr("lmray.on_ray.generate.connected", lambda: pytest.fail("Ray started"))
    one = job(name="one", resources__workers=2)
    generate_program(one, make_plan(one, prepare(one)), in_this_process)
    assert isinstance(generate(one), Result)
    with pytest.raises(ConfigError, match=r"sampling\.seed: 0 -> 1"):
        generate(job(name="one", sampling__seed=1))


def test_relative_paths_of_a_batch_become_absolute(job, tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "adapter").mkdir()
    relative = {"data__sources": [{"source": "rows.jsonl"}], "adapter": "adapter", "output__folder": "made"}
    moved = portable(job(**relative), folder=tmp_path)
    assert moved.data.sources[0].source == str(tmp_path / "rows.jsonl") and moved.adapter == str(tmp_path / "adapter")
    assert Path(moved.output.folder).is_absolute()
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.source: relative path `gone.jsonl`"):
        portable(job(data__sources=[{"source": "gone.jsonl"}]), folder=tmp_path)
