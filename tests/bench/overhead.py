"""What Ray costs a training step: `lmray run` against the same program under plain `torchrun`, in interleaved pairs.

    LMRAY_BENCH_DATA=FOLDER lmray bench overhead [--workers 1,2] [--steps 16] [--pairs 5] [--rows FILE] [--out FILE]

SmolLM2-135M, LoRA r=8 on all linear layers, E2E rows, one thread a worker. Measured from the end of step 3 to that of
the last step but one: tokens a second, and the CPU seconds that all processes of the command spent on a token, Ray's
own among them. Overhead is the mean of the pairs' ratios less one, with a 95 % interval (Student's t over the
logarithms of the ratios); the middle value is the ratios' median. The CPU time of processes that do not train (driver,
controller, Ray's daemons; torchrun's launcher) over that of those that do is taken within each run, and so is free of
the machine's drift from run to run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from lmray.artifacts.files import write_atomic
from lmray.artifacts.store import run_folder
from lmray.job import load
from lmray.metrics.events import read_events
from lmray.testing.waiting import POLL_S
from lmray.train.group import torchrun_context
from lmray.train.program import train

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from machine import describe  # noqa: E402

WARM_UP = 3
"""Steps that are left out: the first ones compile products and grow the heap."""
BATCH_SIZE = 4
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""
SYSTEMS = ("torchrun", "lmray run")
TRAINS = ("RayTrainWorker", "--child")
"""What the command line of a process that trains contains, under Ray and under torchrun."""


def job_of(data: Path, folder: Path, workers: int, steps: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": "overhead",
        "storage": str(folder),
        "model": {"source": "smollm2-135m"},
        "data": {
            "train": [{"source": str(data), "mapping": {"name": "columns", "prompt": "mr", "completion": "ref"}}],
            "max_length": 512,
        },
        "method": "sft",
        "adapter": {"name": "lora", "r": 8, "lora_alpha": 16},
        "sharding": "single" if workers == 1 else "ddp",
        "train": {"per_device_train_batch_size": BATCH_SIZE, "max_steps": steps, "save_steps": 10 * steps},
        "resources": {"workers": workers, "cpus_per_worker": 1},
    }


def cpu_seconds(root: psutil.Process) -> tuple[float, float]:
    """User and system time of a process and all below it that are alive: of those that train, and of the others."""
    train, other = 0.0, 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times, line = process.cpu_times(), process.cmdline()
        except psutil.NoSuchProcess:
            continue
        spent = times.user + times.system
        if any(mark in part for part in line for mark in TRAINS) and "torch.distributed.run" not in line:
            train += spent
        else:
            other += spent
    return train, other


def measure(system: str, data: Path, workers: int, steps: int) -> dict[str, float]:
    """One run: `tokens_per_s`, `cpu_s_per_token`, and `beside`: CPU time of what does not train over what does."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "job.yaml"  # JSON is YAML
        config.write_text(json.dumps(job_of(data, Path(folder), workers, steps)), encoding="utf-8")
        command = [sys.executable, "-m", "lmray", "run", str(config)]
        if system == "torchrun":
            alone = ["--standalone", "--nproc-per-node", str(workers)]
            command = [sys.executable, "-m", "torch.distributed.run", *alone, __file__, "--child", str(config)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"}
        log = Path(folder) / "log"
        with open(log, "wb") as output:
            child = psutil.Popen(command, env=env, stdout=output, stderr=output)
        path = Path(folder) / "runs" / "overhead" / "events.jsonl"
        spent: dict[int, tuple[float, float]] = {}
        while child.poll() is None:
            step = max((event["step"] for event in read_events(path)), default=0)
            if step in (WARM_UP, steps - 1) and step not in spent:
                spent[step] = cpu_seconds(child)
            time.sleep(POLL_S)
        if child.returncode or len(spent) < 2:
            raise SystemExit(f"{system} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
        events = {event["step"]: event for event in read_events(path)}
    tokens = sum(events[step]["train.tokens"] for step in range(WARM_UP + 1, steps))
    seconds = events[steps - 1]["time"] - events[WARM_UP]["time"]
    trained, other = (after - before for before, after in zip(spent[WARM_UP], spent[steps - 1], strict=True))
    return {
        "tokens_per_s": tokens / seconds,
        "cpu_s_per_token": (trained + other) / tokens,
        "beside": other / trained,
    }


def child(config: Path) -> None:
    """A rank under torchrun."""
    job = load(config)
    with torchrun_context(run_folder(job), threads=1) as context:
        train(job, context)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Mean overhead and its 95 % interval, as fractions."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half = T_975[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half)


def table(made: dict[tuple[int, int, str], dict[str, float]], workers: list[int], pairs: int) -> str:
    """One row a number of workers and measure; overhead is what `lmray run` takes more, in time or CPU time."""
    lines = ["| workers | | torchrun | lmray run | overhead (95 % interval) | median |", "|---|---|---|---|---|---|"]
    for count in workers:
        for name, unit, worse in (("tokens_per_s", "tokens/s", -1), ("cpu_s_per_token", "CPU ms/token", 1)):
            one, other = ([made[count, pair, system][name] for pair in range(pairs)] for system in SYSTEMS)
            ratios = [(b / a) ** worse for a, b in zip(one, other, strict=True)]
            mean, low, high = interval(ratios)
            scale, shown = (1, ".0f") if worse < 0 else (1000, ".3f")
            cells = [f"{scale * statistics.median(values):{shown}}" for values in (one, other)]
            over = f"{mean:+.1%} ({low:+.1%} to {high:+.1%})"
            lines.append(f"| {count} | {unit} | {' | '.join(cells)} | {over} | {statistics.median(ratios) - 1:+.1%} |")
        lines.append(
            _beside([[made[count, pair, system]["beside"] for pair in range(pairs)] for system in SYSTEMS], count)
        )
    return "\n".join(lines) + "\n"


def _beside(shares: list[list[float]], count: int) -> str:
    """The row of CPU time spent beside the training processes; overhead is the difference, in points."""
    extra = [b - a for a, b in zip(*shares, strict=True)]
    mean = statistics.fmean(extra)
    half = T_975[len(extra) - 2] * statistics.stdev(extra) / math.sqrt(len(extra)) if len(extra) > 1 else math.inf
    cells = " | ".join(f"{statistics.median(values):.2%}" for values in shares)
    over = f"{mean:+.2%} ({mean - half:+.2%} to {mean + half:+.2%})"
    return f"| {count} | CPU beside training | {cells} | {over} | {statistics.median(extra):+.2%} |"


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        child(arguments.child)
        return
    data = Path(os.environ.get("LMRAY_BENCH_DATA", "")) / "e2e_nlg" / "dev.jsonl"
    if not data.is_file():
        raise SystemExit("set LMRAY_BENCH_DATA to the folder that holds e2e_nlg/")
    workers = [int(count) for count in arguments.workers.split(",")]
    made: dict[tuple[int, int, str], dict[str, float]] = {}
    if arguments.rows and arguments.rows.is_file():
        lines = map(json.loads, arguments.rows.read_text(encoding="utf-8").splitlines())
        made = {(one["workers"], one["pair"], one["system"]): one["measured"] for one in lines}
    for pair in range(arguments.pairs):
        for count in workers:
            for system in SYSTEMS if pair % 2 == 0 else SYSTEMS[::-1]:
                if (count, pair, system) not in made:
                    made[count, pair, system] = one = measure(system, data, count, arguments.steps)
                    print(f"pair {pair + 1}  {count} workers  {system}: {one}", file=sys.stderr, flush=True)
                    if arguments.rows:
                        row = {"workers": count, "pair": pair, "system": system, "measured": one}
                        with open(arguments.rows, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
    command = shlex.join(["lmray", "bench", "overhead", *sys.argv[1:]])
    text = f"\n## Orchestration overhead, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n"
    text += f"{arguments.steps} steps of {BATCH_SIZE} rows a worker, {arguments.pairs} pairs; {describe(1)}\n\n"
    text += table(made, workers, arguments.pairs)
    print(text)
    if arguments.out:
        before = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else "# Results\n"
        write_atomic(arguments.out, before + text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lmray bench overhead", description=__doc__)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, comma-separated")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="JSON lines to append each measurement to, and to go on from")
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
