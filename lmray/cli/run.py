"""`lmray run` and `lmray submit`: a job here, or the same job through the Ray Jobs API."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmray.cli.output import Address, AsJson, Overrides, clean_stdout, emit, say, table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lmray.context import Result
    from lmray.on_ray.jobs import Run

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A job file.")]
EXIT_CODES = {"succeeded": 0, "already-done": 0, "failed": 1, "stopped": 130}


def run(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a job to its end. On the cluster RAY_ADDRESS names, else on a local Ray started for it.

    An endpoint reads its file anew at a SIGUSR1, and changes without a lost request."""
    from lmray.job import load

    def read() -> Any:
        return load(config, *(overrides or ()))

    with clean_stdout(as_json):
        result = ended(read(), again=read)
    report(result, as_json=as_json)


def ended(job: Any, *, again: Callable[[], Any] | None = None) -> Result:
    """Runs `job` to its end, also to the one that Ctrl-C makes. `again`: see `lmray.on_ray.run.run`."""
    from lmray.on_ray.run import run as run_job

    try:
        return run_job(job, again=again)
    except KeyboardInterrupt:
        return interrupted(job)


def interrupted(job: Any) -> Result:
    """What is said of a run that was ended before it could say anything itself."""
    from lmray.artifacts.store import run_folder
    from lmray.context import Result

    folder = run_folder(job)
    return Result("stopped", run=str(folder) if folder.is_dir() else "")


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end and print the result.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print what it prints, then the result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job on a cluster, by the Ray Jobs API. A job that is still going there is not started twice."""
    from lmray.job import load

    job = load(config, *(overrides or ()))
    from lmray.on_ray.jobs import submit as submit_job

    started = submit_job(job, address=address)
    say(f"run {started.id}: `lmray jobs logs {started.id} --follow` shows it, `lmray jobs stop {started.id}` ends it")
    if follow:
        print_logs(started)
    if wait or follow:
        report(started.result(), as_json=as_json)
    else:
        emit({"id": started.id, "status": started.status()}, started.id, as_json=as_json)


def print_logs(run: Run) -> None:
    """What a submitted job prints, on stderr, until it ends."""
    for piece in run.follow():
        sys.stderr.write(piece)
        sys.stderr.flush()


def report(result: Result, *, as_json: bool) -> None:
    """Prints how a run ended and leaves with its exit code."""
    emit(result.to_json(), "\n".join(_lines(result)), as_json=as_json)
    raise typer.Exit(EXIT_CODES[result.status])


def _lines(result: Result) -> list[str]:
    from lmray.units import human_seconds

    lines = [f"{result.status} in {human_seconds(result.seconds)}"]
    lines += [f"run       {result.run}"] if result.run else []
    lines += [f"artifact  {result.artifact}"] if result.artifact else []
    lines += [f"answers   {result.details['answers']}"] if "answers" in result.details else []
    lines += [f"worse     {one}" for one in result.details.get("worse", ())]
    deltas = result.details.get("deltas", {})
    if deltas and "targets" in result.details:
        from lmray.evaluate.comparison import comparison_rows

        return [*lines, table(*comparison_rows(result.details))]
    width = max((len(name) for name in result.metrics), default=0)
    changes = {name: _change(delta) for name, delta in deltas.get("tuned", {}).items()}
    return lines + [
        f"{name:<{width}}  {_number(value)}{changes.get(name, '')}" for name, value in result.metrics.items()
    ]


def _change(delta: Mapping[str, float]) -> str:
    from lmray.evaluate.page import delta_text

    return f"  ({delta_text(delta)} to base, 95 %)"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
