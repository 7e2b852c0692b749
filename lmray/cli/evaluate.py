"""`lmray evaluate`: models side by side on one data set, by tasks and by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmray.cli.output import AsJson, clean_stdout, emit, say, yaml_text

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="TARGET...", help="`base`, NAME, NAME@STAGE, NAME@VERSION, or a folder. With --votes: RUN."),
]
Data = Annotated[list[str] | None, typer.Option(help="File, glob, folder or pypi:PACKAGE to measure on.")]
Tasks = Annotated[str, typer.Option(help="Comma-separated; fields after a colon: `bleu:tokenize=char,loss`.")]
Mapping = Annotated[str | None, typer.Option(help="A mapping, or columns: `prompt=question,completion=answer`.")]
MaxExamples = Annotated[int | None, typer.Option(min=1, help="Questions asked, spread evenly. Empty: all.")]


def evaluate(
    targets: Targets = None,
    tasks: Tasks = "",
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Base model. Empty: the first artifact's.")] = None,
    mapping: Mapping = None,
    split: Annotated[float | None, typer.Option(help="Fraction held out. Empty: all of the data.")] = None,
    by: Annotated[str | None, typer.Option(help="Column whose values a split keeps whole.")] = None,
    max_examples: MaxExamples = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run. Empty: made of the targets.")] = None,
    review: Annotated[str | None, typer.Option(metavar="RUN", help="Write a blind review sheet of a run.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --review: where to. Empty: sheet.html in the run.")] = None,
    seed: Annotated[int, typer.Option(help="With --review: shuffles left and right.")] = 0,
    votes: Annotated[Path | None, typer.Option(help="Votes saved from a sheet; adds eval.human_win_rate.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side. --review and --votes: let people judge a run's answers, blind."""
    if review is not None:
        _review(review, out, seed=seed, max_examples=max_examples, as_json=as_json)
    elif votes is not None:
        _votes(votes, targets or [], as_json=as_json)
    else:
        from lmray.cli.run import ended, report
        from lmray.evaluate.command import Words, make_job

        words = Words(targets or (), tasks, data or (), model, mapping, split, by, max_examples, max_new_tokens, name)
        with clean_stdout(as_json):
            result = ended(make_job(words))
        if result.status == "succeeded":
            say(f"comparison: {result.run}/comparison.html")
        report(result, as_json=as_json)


def _review(run: str, out: Path | None, *, seed: int, max_examples: int | None, as_json: bool) -> None:
    from lmray.evaluate.review import write_sheet

    folder = _run_folder(run)
    sheet = out or folder / "sheet.html"
    count = write_sheet(folder, sheet, seed=seed, max_examples=max_examples)
    say(f"{count} questions; then: lmray evaluate --votes FILE {run}")
    emit({"sheet": str(sheet), "questions": count, "run": str(folder)}, str(sheet), as_json=as_json)


def _votes(votes: Path, runs: list[str], *, as_json: bool) -> None:
    from dataclasses import asdict

    from lmray.errors import ConfigError
    from lmray.evaluate.review import count_votes

    if len(runs) != 1:
        raise ConfigError("--votes", f"{len(runs)} runs given", allowed="one: lmray evaluate --votes FILE RUN")
    review = asdict(count_votes(_run_folder(runs[0]), votes))
    emit({"run": runs[0], "human_review": review}, yaml_text(review), as_json=as_json)


def _run_folder(run: str) -> Path:
    """The folder of a run given as a folder or by its name."""
    from lmray.artifacts.store import open_store
    from lmray.errors import ArtifactError, did_you_mean

    runs = open_store().root / "runs"
    for folder in (Path(run).expanduser(), runs / run):
        if folder.is_dir():
            return folder
    names = sorted(path.name for path in runs.glob("*") if path.is_dir())
    raise ArtifactError(
        f"run `{run}`",
        f"neither a folder nor a run in {runs}",
        allowed=", ".join(names) or None,
        hint=did_you_mean(run, names),
    )
