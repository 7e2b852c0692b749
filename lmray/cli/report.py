"""`lmray report`: the page of one run, or several runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmray.cli.output import AsJson, clean_stdout, emit, say, table

if TYPE_CHECKING:
    from lmray.train.compare import Comparison

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN ...", help="Training runs: names in the store, or their folders.")
]
Out = Annotated[Path | None, typer.Option(help="Where the page that compares them is written.")]
StoreFolder = Annotated[
    str | None, typer.Option("--store", help="Store folder. Empty: $LMRAY_STORE, else ~/.lmray/store.")
]


def report(runs: Runs, out: Out = None, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Write a run's report again, or compare runs. Also of one that goes on or was stopped."""
    from lmray.errors import ConfigError

    if len(runs) == 1 and out is not None:
        raise ConfigError("--out", "is for two or more runs", hint="the report of one is in its own folder")
    with clean_stdout(as_json):
        from lmray.train.compare import Comparison, write_comparison
        from lmray.train.record import read_record
        from lmray.train.report import write_report

        folders = [_folder(run, store) for run in runs]
        comparison = Comparison([read_record(folder) for folder in folders])
        written = out
        if len(runs) == 1:
            written = write_report(folders[0])
        elif out is not None:
            write_comparison(comparison, out)
    if written is not None:
        say(f"report    {written}")
    value = comparison.to_json() | {"report": str(written) if written else None}
    emit(value, _text(comparison), as_json=as_json)


def _folder(run: str, store: str | None) -> Path:
    """A folder that is there, else the run of that name in the store."""
    from lmray.artifacts.store import open_store

    return Path(run) if Path(run).is_dir() else open_store(store).root / "runs" / run


def _text(comparison: Comparison) -> str:
    head = ("", *comparison.labels)
    rows = [("status", *(run.status for run in comparison.runs)), *comparison.rows()]
    text = table(head, rows)
    if len(comparison.runs) > 1:
        different = comparison.difference_rows()
        text += "\n\n* best\n\n" + (table(("what differs", *comparison.labels), different) if different else "same job")
    return text
