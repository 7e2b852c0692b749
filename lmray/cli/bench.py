"""`lmray bench`: the benchmarks of the repository, from a clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import lmray

BENCHES = Path(lmray.__file__).resolve().parents[1] / "tests" / "bench"


def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="train, serve, speculation, endpoint, soak, prune, memory, overhead, rope"),
    ],
) -> None:
    """Run a benchmark of the repository. What follows the name is the benchmark's; `--help` lists it."""
    from lmray.errors import ConfigError, did_you_mean

    parts = ("machine", "environments", "prune_data", "prune_rows")
    there = sorted(path.stem for path in BENCHES.glob("*.py") if path.stem not in parts)
    if name not in there:
        hint = did_you_mean(name, there) or "benchmarks lie in the repository: run it from a clone"
        raise ConfigError(f"benchmark `{name}`", "is not there", allowed=", ".join(there) or "none here", hint=hint)
    raise typer.Exit(subprocess.call([sys.executable, str(BENCHES / f"{name}.py"), *context.args]))
