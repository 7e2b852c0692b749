from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmray.generate.plan import answers_folder, check_begin, make_plan, prepare
from lmray.generate.program import generate, in_this_process
from lmray.job import GenerateJob
from lmray.testing.jobs import tiny_generate_job, write_jsonl

QUESTIONS = (
    "say red",
    "赤と言って",
    "緑?",
    "one two three",
    "長い質問" * 3,
    "a",
    "blue or green",
    "青",
    "say two two",
    "終",
)


@pytest.fixture
def questions(tmp_path) -> Path:
    """Ten rows: two shards of four and one of two."""
    return write_jsonl(tmp_path / "質問.jsonl", [{"prompt": text, "key": f"k{i}"} for i, text in enumerate(QUESTIONS)])


@pytest.fixture
def job(tiny_model, questions, tmp_path):
    """Makes a job of `questions`, with changes."""
    return lambda **changes: tiny_generate_job(
        tiny_model, changes.pop("data", questions), tmp_path / "store", **changes
    )


@pytest.fixture
def run():
    """Runs a job in this process, as `lmray run` does on a cluster."""

    def run(job: GenerateJob, workers=in_this_process):
        plan = make_plan(job, prepare(job))
        check_begin(job, plan)
        return generate(job, plan, workers)

    return run


def parts(job: GenerateJob) -> dict[str, bytes]:
    """The files of the answers but the manifest, which holds times."""
    return {path.name: path.read_bytes() for path in sorted(answers_folder(job).glob("part-*"))}


def rows_of(job: GenerateJob) -> list[dict]:
    """All answers, in order."""
    return [json.loads(line) for content in parts(job).values() for line in content.decode().split("\n") if line]


def texts_of(job: GenerateJob) -> list[str]:
    return [row["choices"][0]["text"] for row in rows_of(job)]
