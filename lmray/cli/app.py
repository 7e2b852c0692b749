"""All commands under one roof."""

from __future__ import annotations

from typing import Annotated

import typer

from lmray import __version__
from lmray.cli import artifacts, bench, chat, check, doctor, evaluate, jobs, report, run

app = typer.Typer(
    help="Fine-tune, sweep, keep and serve language models on a Ray cluster, through one job API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # halves the time to the first line of help
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("submit")(run.submit)
app.add_typer(jobs.app, name="jobs")
app.command("report")(report.report)
app.command("check")(check.check)
app.command("show")(check.show)
app.command("schema")(check.schema)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(artifacts.app, name="artifacts")
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench.bench)


@app.command()
def demo() -> None:
    """Train, promote, serve and ask a small model. On this machine, in a few minutes."""
    from lmray.cli import demo as scenario

    scenario.main()
