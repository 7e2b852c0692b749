"""The plan's memory estimate beside the measured peak of a training process, for a few settings.

    python tests/bench/memory.py [--steps 3] [--settings 0,3] [--kernels auto]

Each setting is a process of its own that takes a few steps through lmray's learner, on the longest rows of the demo's
data, and reports its largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lmray.context import LocalContext
from lmray.data.batch import collate
from lmray.job import load
from lmray.train.model import make_learner
from lmray.train.plan import make_plan
from lmray.train.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "train" / "demo.yaml"
Setting = tuple[int, int, bool, str]
"""Micro-batch, length, packing, dtype."""
SETTINGS: tuple[Setting, ...] = (
    (1, 256, False, "float32"),
    (1, 512, True, "bfloat16"),
    (2, 512, True, "bfloat16"),
    (4, 256, True, "float32"),
    (4, 512, False, "bfloat16"),
    (2, 256, False, "bfloat16"),
    (8, 256, True, "float32"),
    (3, 512, True, "bfloat16"),
)
MIB = 2**20


def overrides(setting: Setting, kernels: str) -> list[str]:
    """The demo's job with one setting."""
    batch, length, packing, dtype = setting
    return [
        f"train.per_device_train_batch_size={batch}",
        f"data.max_length={length}",
        f"data.packing={str(packing).lower()}",
        f"model.dtype={dtype}",
        f"model.kernels={kernels}",
    ]


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(setting: Setting, steps: int, kernels: str) -> dict[str, Any]:
    """In a process of its own: estimate and peak of a few optimizer steps."""
    imported = peak_bytes()
    job = load(CONFIG, *overrides(setting, kernels))
    prepared = prepare(job)
    plan = make_plan(job, prepared)
    planned = peak_bytes()
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        context = LocalContext(Path(scratch) / "run", scratch=Path(scratch) / "own", threads=threads)
        learner = make_learner(job, plan, prepared, context)
    loaded = peak_bytes()
    rows = sorted(prepared.rows, key=lambda row: -sum(map(len, row)))[: setting[0]]
    batch = collate(learner.joined(rows), pad_token_id=0, padded=learner.padded)
    for _ in range(steps):
        learner.step([batch], learning_rate=1e-4)
    return {
        "imported": imported,
        "planned": planned,
        "loaded": loaded,
        "peak": peak_bytes(),
        "estimate": plan.memory_bytes["total"],
        "parts": plan.memory_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--settings", default=",".join(map(str, range(len(SETTINGS)))))
    parser.add_argument("--kernels", choices=("auto", "plain", "fused"), default="auto")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(SETTINGS[args.child], args.steps, args.kernels)))
        return
    print("batch  length  packing  dtype     peak MiB  estimate MiB  estimate/peak")
    for index in map(int, args.settings.split(",")):
        command = [sys.executable, __file__, "--child", str(index), "--steps", str(args.steps)]
        command += ["--kernels", args.kernels]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        batch, length, packing, dtype = SETTINGS[index]
        print(
            f"{batch:5}  {length:6}  {'yes' if packing else 'no':7}  {dtype:8}  {found['peak'] / MIB:8.0f}  "
            f"{found['estimate'] / MIB:12.0f}  {found['estimate'] / found['peak']:13.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
