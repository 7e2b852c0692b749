"""The command line: words -> one call. Text for people goes to stderr, data to stdout.

Heavy imports stay inside the commands, so that `lmray --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lmray ARGV...` and leaves with its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    from lmray.cli.output import leaving_with_exit_code, tune_streams

    tune_streams()
    atexit.register(gc.freeze)  # Python would look once more for cycles among a million objects, for a second
    with leaving_with_exit_code(argv):
        from lmray.cli.app import app

        app(args=None if argv is None else list(argv), prog_name="lmray")
