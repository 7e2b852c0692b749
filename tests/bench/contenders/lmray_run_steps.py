"""The same training as a user starts it: `lmray run` with its own Ray. Run as `python lmray_run_steps.py FILE.json`.

Rows come in the sampler's order, so every step's tokens are reported beside its seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lmray.metrics.events import read_events


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "kind": "train",
            "name": "bench",
            "storage": folder,
            "model": {"source": settings["model"], **settings["options"]},
            "data": {"train": [{"source": settings["data"]}], "max_length": 1024},
            "method": "sft",
            "adapter": {"name": "lora", "r": 8, "lora_alpha": 16},
            "sharding": "single",
            "train": {
                "per_device_train_batch_size": settings["batch_size"],
                "max_steps": settings["steps"],
                "learning_rate": settings["learning_rate"],
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
            },
        }
        config = Path(folder) / "job.yaml"  # JSON is YAML
        config.write_text(json.dumps(job), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "lmray", "run", str(config)], check=True, stdout=sys.stderr)
        events = read_events(Path(folder) / "runs" / "bench" / "events.jsonl")
    tokens = [event["train.tokens"] for event in events]
    seconds = [count / event["train.tokens_per_s"] for count, event in zip(tokens, events, strict=True)]
    found = {"seconds": seconds, "tokens": tokens, "losses": [event["train.loss"] for event in events]}
    found |= {"peak_bytes": events[-1]["train.peak_memory_bytes"], "first_step_at": events[0]["time"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
