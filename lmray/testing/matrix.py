"""The equivalence matrix: strategies and adapters under which a tiny job has one and the same curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEP_ROWS = 8
"""Rows of a step, whatever the number of workers."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"name": "lora", "r": 3, "lora_alpha": 8}},  # four workers cannot share three rows evenly
    "full": {"adapter": "full", "train__learning_rate": 1e-3},
    "partial": {"adapter": {"name": "partial", "last_n": 1}},
    "qlora": {"model__quantization": "nf4"},
}
"""What is trained, as changes of `tiny_job`. `qlora` needs a model whose widths NF4's blocks divide."""


def sharding(name: str, folder: Path) -> Any:
    """What a job says of strategy `name`: `ddp`, `fsdp2`, `zero 1` to `zero 3`; settings of the last are written to
    `folder`."""
    kind, _, stage = name.partition(" ")
    if not stage:
        return kind
    path = folder / "deepspeed.json"
    # Else what is small stays whole on every worker, and is stepped on at once.
    settings = {"stage3_param_persistence_threshold": 0, "sub_group_size": 4096}
    path.write_text(json.dumps({"zero_optimization": settings}), encoding="utf-8")
    return {"name": "deepspeed", "stage": int(stage), "config": str(path)}


def shared_by(workers: int) -> dict[str, Any]:
    """A job's changes for so many workers."""
    return {"train__per_device_train_batch_size": STEP_ROWS // workers, "resources__workers": workers}
