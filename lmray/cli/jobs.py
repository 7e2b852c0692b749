"""`lmray jobs`: what runs and ran on a cluster."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from lmray.cli.output import Address, AsJson, emit, say, table
from lmray.cli.run import print_logs, report

app = typer.Typer(help="Jobs that were submitted to a cluster.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="A run's id, or how it begins.")]


@app.command("list")
def list_(address: Address = None, as_json: AsJson = False) -> None:
    """All runs of the cluster, oldest first."""
    from lmray.on_ray.jobs import list_jobs

    rows = [facts(info) for info in list_jobs(address)]
    head = ("id", "status", "kind", "name", "started", "seconds")
    emit({"jobs": rows}, table(head, [[row[key] for key in head] for row in rows]), as_json=as_json)


@app.command()
def status(id: Id, address: Address = None, as_json: AsJson = False) -> None:
    """What one run is doing."""
    from lmray.on_ray.jobs import find

    info = find(id, address).info()
    row = facts(info) | {"message": info.message or ""}
    emit(row, "\n".join(f"{key:<8} {value}" for key, value in row.items()), as_json=as_json)


@app.command()
def logs(
    id: Id,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends.")] = False,
) -> None:
    """What a run printed."""
    from lmray.on_ray.jobs import find

    run = find(id, address)
    if follow:
        print_logs(run)
    else:
        typer.echo(run.logs(), nl=False)


@app.command()
def stop(id: Id, address: Address = None, as_json: AsJson = False) -> None:
    """Ask a run to save and end, and wait until it did."""
    from lmray.on_ray.jobs import find

    run = find(id, address)
    if not run.stop():
        say(f"run {run.id} had ended already")
    ended = run.wait()
    emit({"id": run.id, "status": ended}, ended, as_json=as_json)


@app.command()
def wait(id: Id, address: Address = None, as_json: AsJson = False) -> None:
    """Wait for a run's end and print its result; the exit code is the job's."""
    from lmray.on_ray.jobs import find

    report(find(id, address).result(), as_json=as_json)


def facts(info: Any) -> dict[str, Any]:
    """The fields of Ray's job record that people ask for; what is not known is `-`. Times: local, seconds."""
    metadata = info.metadata or {}
    began = (info.start_time or 0) / 1000
    ended = info.end_time / 1000 if info.end_time else time.time()
    return {
        "id": info.submission_id,
        "status": info.status.value.lower(),
        "kind": metadata.get("lmray.kind", "-"),
        "name": metadata.get("lmray.name", "-"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)) if began else "-",
        "seconds": round(ended - began) if began else 0,
    }
