"""Runs a command for as long as its standard input stays open: `python _watch.py COMMAND...`, a file by itself.

Whoever starts it holds the other end of that pipe, which closes however that process ends; then the command's whole
process group is ended. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 5.0
"""Between asking the group to end and ending it."""


def watch(command: list[str]) -> int:
    """The exit code of `command`; nothing of its group is left when this returns."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_until_closed, args=(process,), daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _until_closed(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _signal(process.pid, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # that has ended; macOS denies what is a zombie
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1:]))
