"""How commands speak: tables or one JSON object on stdout, everything else and all errors on stderr, always UTF-8."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from lmray.errors import LmrayError

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, like http://HOST:8265. Empty: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, local."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Values laid over the file's.")]


def tune_streams() -> None:
    """UTF-8, whatever the locale says: names may be in any script. Libraries' notices to their own users stay away."""
    if not _debugging():
        warnings.simplefilter("ignore", FutureWarning)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def say(text: str) -> None:
    """One message for people."""
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any], text: str, *, as_json: bool) -> None:
    """What the command is for: `value` as one line of JSON, or `text`."""
    print(json.dumps(value, ensure_ascii=False, default=str) if as_json else text, flush=True)


@contextmanager
def clean_stdout(wanted: bool) -> Iterator[None]:
    """Sends whatever libraries print within the block to stderr, where stdout is to hold one JSON object."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, never cut, so that a table can be read by a program as well."""
    from rich.cells import cell_len

    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def yaml_text(value: Any) -> str:
    """`value` (JSON types) as YAML a job file could hold."""
    import yaml

    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=110).rstrip()


@contextmanager
def leaving_with_exit_code(argv: Sequence[str] | None) -> Iterator[None]:
    """Prints whatever goes wrong in the block as `error: ...` without a traceback and leaves with its exit code."""
    try:
        yield
    except LmrayError as error:
        _leave(str(error), error.exit_code, argv)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        where = type(error).__name__
        hint = "" if _debugging() else "\n  hint: LMRAY_DEBUG=1 shows the traceback; this may be a bug in lmray"
        _leave(f"unexpected {where}: {_short(error)}{hint}", 1, argv)


def _leave(message: str, exit_code: int, argv: Sequence[str] | None) -> None:
    if _debugging():
        traceback.print_exc()
    say(f"error: {message}")
    if "--json" in (sys.argv[1:] if argv is None else argv):
        emit({"status": "failed", "run": "", "error": message}, "", as_json=True)
    raise SystemExit(exit_code)


def _debugging() -> bool:
    return bool(os.environ.get("LMRAY_DEBUG"))


def _short(error: BaseException) -> str:
    """The last line of a message: Ray puts a traceback before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "no message")[:500]
