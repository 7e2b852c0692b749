"""Training steps of lmray's learner on rows in file order; run as `python lmray_steps.py SETTINGS.json`."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from lmray.config import Document, decode
from lmray.context import LocalContext
from lmray.data.batch import collate
from lmray.job import TrainJob
from lmray.models.load import pad_token_id
from lmray.train.model import make_learner
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    size = settings["batch_size"]
    tree = {
        "kind": "train",
        "name": "bench",
        "model": {"source": settings["model"], **settings["options"]},
        "data": {"train": [{"source": settings["data"]}], "max_length": 1024},
        "method": "sft",
        "adapter": {"name": "lora", "r": 8, "lora_alpha": 16},
        "sharding": "single",
        "train": {"per_device_train_batch_size": size, "max_steps": settings["steps"]},
    }
    job = decode(TrainJob, Document("bench", tree))
    prepared = prepare(job)
    with tempfile.TemporaryDirectory() as folder:
        context = LocalContext(Path(folder), scratch=Path(folder) / "scratch", threads=settings["threads"])
        learner = make_learner(job, make_plan(job, prepared), prepared, context)
        seconds, losses = [], []
        for step in range(settings["steps"]):
            start = time.perf_counter()
            rows = prepared.rows[step * size : (step + 1) * size]
            batch = collate(
                learner.joined(rows),
                pad_token_id=pad_token_id(prepared.tokenizer),
                padded=learner.padded,
            )
            losses.append(learner.step([batch], learning_rate=settings["learning_rate"]).loss)
            seconds.append(time.perf_counter() - start)
            first = time.time() if step == 0 else first  # noqa: F821
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak, "first_step_at": first}))


if __name__ == "__main__":
    main()
