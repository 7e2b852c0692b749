"""`lmray demo`: train, compare, keep, export, serve and ask, on one machine, with the jobs in `configs/`.

Function calling on Berkeley Function Calling questions: functions and a request go in, one call as JSON comes out. The
held-out questions call functions that no training example calls.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lmray
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.cli.output import say, table
from lmray.context import Result
from lmray.data.mappings.bfcl import SYSTEM
from lmray.errors import ConfigError
from lmray.evaluate.answers import read_answers
from lmray.job import load
from lmray.models.export import export
from lmray.on_ray.cluster import connected
from lmray.on_ray.run import run
from lmray.on_ray.serve import serve
from lmray.serve.client import chat_stream
from lmray.units import human_seconds

CONFIGS = Path(lmray.__file__).resolve().parents[1] / "configs"
COLUMNS = (("json_match", "JSON match"), ("json_name_match", "name match"), ("loss", "held-out loss"))
FRESH = (
    '{"name": "book_table", "description": "Books a table in a restaurant.", "parameters": {"restaurant": "string: '
    'Name of the restaurant.", "people": "integer: Number of guests.", "time": "string: Time as HH:MM."}}',
    "Please get us a table for 4 at Sakura (桜) at 19:30.",
)
"""A function and a request from no data set."""


def main() -> None:
    """The whole walk; stops at the first thing that fails, with its error."""
    started = time.monotonic()
    jobs = {kind: _job(kind) for kind in ("train", "evaluate", "serve")}
    with connected():
        _head(1, "train: LoRA on function calls, then the held-out questions, before and after")
        trained = _done(run(jobs["train"]))
        _head(2, "compare: the untouched model with three solved examples before each question")
        three_shot = _done(run(jobs["evaluate"]))
        say(scores(trained, three_shot))
        say(three_answers(Path(trained.run)))
        _head(3, "keep: promote the adapter, export it merged")
        merged = _keep(trained)
        _head(4, "serve and ask: base and adapter behind one OpenAI-compatible endpoint")
        with serve(jobs["serve"]) as service:
            for model in (jobs["serve"].model.source, jobs["train"].output.artifact):
                say(f"  {model}: {_ask(service.url, model)}")
    say(_where(trained, merged, time.monotonic() - started))


def _job(kind: str) -> Any:
    path = CONFIGS / kind / "demo.yaml"
    if not path.is_file():
        raise ConfigError(str(path), "is not there", hint="the demo's jobs lie in the repository: run it from a clone")
    return load(path)


def _done(result: Result) -> Result:
    """`result`, unless the run was asked to stop: then the demo ends as Ctrl-C does."""
    if result.status == "stopped":
        raise KeyboardInterrupt
    return result


def _head(number: int, text: str) -> None:
    say(f"\n[{number}/4] {text}")


def scores(trained: Result, three_shot: Result) -> str:
    """Base with no and with three examples, and the tuned model."""
    base = {name: trained.metrics[f"base.{name}"] for name, _ in COLUMNS}
    shots = {name: three_shot.metrics.get(f"eval.{name}") for name, _ in COLUMNS}
    tuned = {name: trained.metrics[f"eval.{name}"] for name, _ in COLUMNS}
    rows = [("untouched, zero-shot", base), ("untouched, three-shot", shots), ("tuned, zero-shot", tuned)]
    cells = [[label, *(_cell(name, metrics[name]) for name, _ in COLUMNS)] for label, metrics in rows]
    gain = 100 * (tuned["json_match"] - max(base["json_match"], shots["json_match"] or 0.0))
    compared = table(["", *(title for _, title in COLUMNS)], cells)
    return f"\n{compared}\n{gain:+.1f} points of JSON match over the better base\n"


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name == "loss" else f"{value:.1%}"


def three_answers(folder: Path) -> str:
    """Three held-out questions that the tuned model gets right, or the first ones, before and after."""
    answers = read_answers(folder)
    before, after = answers["base"], answers["tuned"]
    order = sorted(range(len(after)), key=lambda index: (-after[index].scores["json_match"], index))[:3]
    blocks = []
    for one, other in ((before[index], after[index]) for index in order):
        said = {"asked": one.prompt, "before": one.answer, "after": other.answer}
        blocks.append("\n".join(f"{label:<8}{_line(text)}" for label, text in said.items()))
    return "\n\n".join(blocks)


def _line(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def _keep(trained: Result) -> Path:
    artifacts = Artifacts(open_store())
    assert trained.artifact is not None
    artifact = artifacts.promote(trained.artifact, "production")
    say(f"  {artifact.ref} is now {artifact.name}@production")
    merged = Path(trained.run) / "merged"
    if not merged.is_dir():
        export(artifacts, artifact, merged)
    say(f"  merged for plain transformers: {merged}")
    return merged


def _ask(url: str, model: str) -> str:
    messages = [{"role": "system", "content": SYSTEM + FRESH[0]}, {"role": "user", "content": FRESH[1]}]
    return _line("".join(chat_stream(url, model, messages, max_tokens=96)))


def _where(trained: Result, merged: Path, seconds: float) -> str:
    name = str(trained.artifact).partition("@")[0]
    return f"""
done in {human_seconds(seconds)}
  report   {trained.run}/report.html
  plot     {trained.run}/loss.png
  adapter  {trained.run}/adapter   (kept as {trained.artifact})
  merged   {merged}

next
  lmray run configs/serve/demo.yaml                     the endpoint again, until Ctrl-C
  lmray chat http://127.0.0.1:8000 --model {name}
  lmray run configs/sweep/demo.yaml                     sweep rank, alpha and learning rate
  lmray artifacts show {name}
  lmray check configs/train/demo.yaml                   what a job will do, before it does it
"""
