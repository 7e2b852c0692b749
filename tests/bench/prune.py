"""A smaller model for one task, made in several ways: the same LoRA tokens, the same rows, the same seeds.

    LMRAY_BENCH_DATA=FOLDER lmray bench prune [--data pubmedqa] [--remaining 0.8,0.6] [--seeds 0] [--steps 200]
        [--methods base,dense,taylor,...] [--rows FILE] [--out FILE] [--quick]

`base`: the model as it is. `dense`: LoRA, nothing removed. `atp`: pruned while it is tuned, masks searched on a tenth
of the training rows; `atp:gate=gumbel:distill=1` sets fields of the method. `magnitude`, `wanda_sp`, `taylor`:
heads and MLP channels cut by an importance score, then LoRA. `depth`: layers of least block influence cut, then LoRA.
`optipfair`: that package's width pruning of the MLP, then LoRA. What is cut first is calibrated on training rows
alone. All are merged, and measured from a plain folder: held-out loss of every example and task scores; tokens a
second of CPU time of one thread in plain `transformers`, in turns with the dense model, each in a process of its own.
`relative to dense` is the mean over the task scores and the perplexity of how near a model comes to `dense`.

With `--rows` each model's measurements are kept as a line of JSON, and the same command goes on after an interruption;
training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmray.artifacts.files import build_once, sha256_json, write_atomic
from lmray.config.places import cache_root
from lmray.metrics.page import heading, page, paragraph, picture, verbatim
from lmray.metrics.page import table as page_table
from lmray.metrics.pruning_plots import pareto
from lmray.models.precision import resolve_dtype
from lmray.models.source import find_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from machine import describe  # noqa: E402
from prune_data import DATA, QUESTIONS, majority, read_rows, write_data  # noqa: E402
from prune_rows import METHODS, TWO_STAGE, Cell, Rows, cells, columns, points, table  # noqa: E402

QUICK = {"steps": 4, "batch_size": 4, "max_examples": 12, "pairs": 1, "calibration_rows": 4}
"""Shows that every column is filled; the numbers say nothing."""
KEY = ("data", "model", "dtype", "steps", "batch_size", "learning_rate", "r", "max_length")
KEY += ("max_examples", "calibration_rows", "multiple_of", "quick")
"""Options that measurements belong to; threads do not change what is learnt beyond rounding."""


class FailedError(Exception):
    """A process of one cell failed; the others go on without it."""


class Bench:
    """The settings of one run, and the folder of what it makes."""

    def __init__(self, arguments: argparse.Namespace, data: Path):
        model = find_model(arguments.model)
        arguments.dtype = resolve_dtype(arguments.dtype, "cpu")[0]
        self.arguments = arguments
        self.key = {name: getattr(arguments, name) for name in KEY} | {"model_digest": model.digest[:16]}
        self.model = model.folder
        self.work = arguments.work / sha256_json(self.key)[:16]
        source = data / DATA[arguments.data].folder
        if not source.is_dir():
            raise SystemExit(f"set LMRAY_BENCH_DATA to the folder that holds {source.name}/")
        limit = arguments.max_examples
        made = build_once(self.work / "data", lambda to: write_data(arguments.data, source, to, limit=limit))
        self.data_folder = made

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What the processes of `cell` are told."""
        name = name_of(cell)
        cut_first = cell.method in TWO_STAGE
        return {
            **{key: value for key, value in vars(self.arguments).items() if isinstance(value, (str, int, float))},
            **vars(cell),
            "name": f"{name}-{cell.seed}",
            "model": str(self.model),
            "work": str(self.work),
            "data_folder": str(self.data_folder),
            "cut": str(self.work / "cut" / name) if cut_first else "",
            "tuned": str(self.work / "tuned" / f"{name}-{cell.seed}") if cell.method != "base" else "",
        }

    def made(self, cell: Cell) -> dict[str, Any]:
        """Cuts, tunes and merges `cell`, where that was not done before."""
        settings, found = self.settings(cell), {}
        if settings["cut"]:
            step("cut", settings)
        if settings["tuned"]:
            found = step("tune", settings)
        return found

    def quality(self, cell: Cell) -> dict[str, Any]:
        tuned = self.made(cell)
        return tuned | step("measure", self.settings(cell))

    def speed(self, cell: Cell) -> dict[str, Any]:
        """Pairs of measurements, `own` and `dense`, in turns; both are in memory all the time, one of them computes."""
        settings = self.settings(cell)
        if settings["tuned"] and not Path(settings["tuned"]).is_dir():
            self.made(cell)
        with tempfile.TemporaryFile("w+") as log:
            own, dense = (self._speaker(one, log) for one in (settings["tuned"] or self.model, self.model))
            try:
                pairs, peak = [], 0
                for pair in range(self.arguments.pairs):
                    order = [("own", own), ("dense", dense)]
                    taken = {side: ask(one, log) for side, one in (order if pair % 2 == 0 else order[::-1])}
                    peak, _ = (one.pop("peak_bytes") for one in (taken["own"], taken["dense"]))
                    pairs.append(taken)
            finally:
                for one in (own, dense):
                    one.kill()
                    one.wait()
        return {"pairs": pairs, "peak_bytes": peak}

    def _speaker(self, folder: Any, log: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "contenders" / "prune_speed.py"), str(folder), self.arguments.dtype]
        command += ["1", str(int(self.arguments.quick))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        return subprocess.Popen(command, env=_environment(1), text=True, **pipes)


def name_of(cell: Cell) -> str:
    """Of a cell's runs and folders, without its seed."""
    return re.sub(r"[^\w.]+", "-", f"{cell.method}-{cell.remaining:g}")


def ask(process: subprocess.Popen[str], log: Any) -> dict[str, Any]:
    """What `process` answers to a line."""
    assert process.stdin is not None and process.stdout is not None
    try:
        print("measure", file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())
    except (BrokenPipeError, ValueError):
        log.seek(0)
        raise FailedError(f"measuring speed failed:\n{log.read()[-3000:]}") from None


def step(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What one step of a cell gives, in a process of its own: peaks of memory are its own then."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(settings, file)
        file.flush()
        command = [sys.executable, str(HERE / "contenders" / "prune_cell.py"), name, file.name]
        done = subprocess.run(
            command, env=_environment(settings["threads"]), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise FailedError(f"{name} of {settings['name']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) or {}


def _environment(threads: int) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "LMRAY_BENCH_DATA"}
    env |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return env | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE.parents[1])}


def run(bench: Bench, rows: Rows, wanted: Sequence[Cell]) -> int:
    """Measures what of `wanted` is not there yet; returns how many failed. Speed hangs on a model's shape alone: that
    of the first seed."""
    first, failed = min((cell.seed for cell in wanted if cell.method != "base"), default=0), 0
    for cell in wanted:
        name, started = f"{cell.method} {cell.remaining:g} seed {cell.seed}", time.monotonic()
        try:
            rows.once(cell, "quality", lambda cell=cell: bench.quality(cell))
            if bench.arguments.pairs and (cell.method == "base" or cell.seed == first):
                rows.once(cell, "speed", lambda cell=cell: bench.speed(cell))
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        except FailedError as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        if not bench.arguments.keep:
            shutil.rmtree(bench.work / "tuned" / f"{name_of(cell)}-{cell.seed}", ignore_errors=True)
    return failed


def main() -> None:
    arguments = _arguments()
    bench = Bench(arguments, Path(os.environ.get("LMRAY_BENCH_DATA", "")))
    rows = Rows(arguments.rows, bench.key)
    wanted = cells(arguments.methods, arguments.remaining, arguments.seeds)
    failed = run(bench, rows, wanted)
    answers = [row["completion"] for row in read_rows(bench.data_folder / QUESTIONS)]
    command = shlex.join(["lmray", "bench", "prune", *sys.argv[1:]])
    text = f"\n## Smaller models for one task, {time.strftime('%Y-%m-%d')}\n\n`{command}`\n\n"
    text += f"{arguments.model}, {arguments.data}, {len(answers)} questions; {describe(arguments.threads)}\n"
    if arguments.data == "pubmedqa":
        text += "Always the commonest decision: accuracy {:.4f}, macro-F1 {:.4f}.\n".format(*majority(answers))
    text += f"\n{table(rows, arguments.remaining, DATA[arguments.data].scores)}"
    print(text)
    if arguments.out:
        before = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else "# Results\n"
        write_atomic(arguments.out, before + text)
    write_report(arguments, rows, command)
    if failed:
        raise SystemExit(f"{failed} of {len(wanted)} failed; the same command tries them again")


def write_report(arguments: argparse.Namespace, rows: Rows, command: str) -> None:
    """The table and quality against size and time, as a page that needs no other file, and as a PNG."""
    report = arguments.report or (arguments.rows and arguments.rows.with_suffix(".html"))
    if not (arguments.plot or report) or not (shown := points(rows)):
        return
    title = f"{arguments.model}, {arguments.data}"
    drawn = pareto(shown, title=title)
    if arguments.plot:
        write_atomic(arguments.plot, drawn)
    if report:
        head, *lines = columns(rows, arguments.remaining, DATA[arguments.data].scores)
        about = (
            "Filled points are those that no other model beats in both; tokens a second are of one thread's CPU time."
        )
        body = [heading(f"Smaller models for one task: {title}", 1), verbatim(command), paragraph(about, "quiet")]
        body += [picture(drawn, "Held-out loss against size and against time"), page_table(lines, head)]
        write_atomic(report, page(title, body))
        print(f"report: {report}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="lmray bench prune", description=__doc__, formatter_class=kind)
    parser.add_argument("--data", choices=DATA, default="pubmedqa")
    parser.add_argument("--remaining", type=_list(float), default=[0.8, 0.6], help="shares of the prunable weights")
    parser.add_argument("--seeds", type=_list(int), default=[0])
    parser.add_argument("--methods", type=_list(str), default=list(METHODS), help=f"of: {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of LoRA, whatever the method")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--per-device-batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-examples", type=int, help="held-out examples, and as many questions; default: all")
    parser.add_argument("--calibration-rows", type=int, default=32)
    parser.add_argument("--multiple-of", type=int, default=64, help="of the MLP's width")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of speed; 0: none")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=Path, help="JSON lines to append each measurement to, and to go on from")
    parser.add_argument("--out", type=Path, help="Markdown file to append the table to")
    parser.add_argument("--report", type=Path, help="HTML page with the table and pictures; default: beside --rows")
    parser.add_argument("--plot", type=Path, help="the picture alone, as PNG")
    parser.add_argument("--work", type=Path, default=cache_root() / "bench" / "prune", help="runs and models")
    parser.add_argument("--keep", action="store_true", help="keep the merged models")
    parser.add_argument("--quick", action="store_true", help=f"see that it works: {QUICK}")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    unknown = {one.partition(":")[0] for one in arguments.methods} - {*METHODS}
    if unknown or not all(0 < one < 1 for one in arguments.remaining):
        parser.error(f"methods are {', '.join(METHODS)}; shares are between 0 and 1")
    return arguments


def _list(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
