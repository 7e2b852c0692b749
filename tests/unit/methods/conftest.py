"""Jobs that prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmray.job import TrainJob
from lmray.testing.jobs import tiny_job, tiny_rows, write_jsonl
from lmray.testing.pruned import TINY_ATP


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
