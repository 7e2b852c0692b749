"""Runs a command for as long as its standard input stays open: `python _watch.py COMMAND...`, a file by itself.

Whoever starts it holds the other end of that pipe, which closes however that process ends; then the command's whole
process group is ended. Its standard output is the command's log, a file open to read and to append, of which the end
is kept. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 5.0
"""Between asking the group to end and ending it."""
LOOK_S = 60.0
"""Between looks at the log."""
LOG_BYTES, KEPT_BYTES = 4_000_000, 100_000
"""How long the log may grow, and what of its end is kept then."""


def watch(command: list[str]) -> int:
    """The exit code of `command`; nothing of its group is left when this returns."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_until_closed, args=(process,), daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _until_closed(process: subprocess.Popen[bytes]) -> None:
    is_open = True
    while is_open:
        told, _, _ = select.select([0], [], [], LOOK_S)
        is_open = not told or bool(os.read(0, 4096))
        _cut(log=1)
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _signal(process.pid, signal.SIGKILL)


def _cut(log: int) -> None:
    """Keeps the end of a log that has grown too long."""
    size = os.fstat(log).st_size
    if size > LOG_BYTES:
        end = os.pread(log, KEPT_BYTES, size - KEPT_BYTES)
        os.ftruncate(log, 0)
        os.write(log, end)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # that has ended; macOS denies what is a zombie
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1:]))
