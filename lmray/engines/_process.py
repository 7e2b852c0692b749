"""A server as a process of this one's: started, waited for, and ended with it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from lmray.errors import RemoteError

WATCH = Path(__file__).with_name("_watch.py")
POLL_S = 0.1
NUM_LINES, NUM_BYTES = 12, 8192
"""Of the log's end, in messages."""
END_S = 30.0
"""Longest wait for a process group that was told to end."""


class ServerProcess:
    """A running `command`, whose process group ends on `close` and also when this process dies."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, name: str):
        """Raises RemoteError where it cannot be started."""
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        flags = fcntl.fcntl(self._log, fcntl.F_GETFL)
        fcntl.fcntl(self._log, fcntl.F_SETFL, flags | os.O_APPEND)  # at its end, also where its beginning was cut off
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WATCH), *command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C is for this process, which then closes the engine
        )

    def wait_until_healthy(self, url: str, timeout_s: float) -> None:
        """Returns once `url` answers 200. Raises RemoteError, with what the process said last, where it ended or took
        too long; it is closed then."""
        deadline = time.monotonic() + timeout_s
        try:
            with httpx.Client(trust_env=False, timeout=5.0) as client:
                while self.failure() is None:
                    with suppress(httpx.HTTPError):
                        if client.get(url).status_code == 200:
                            return
                    if time.monotonic() > deadline:
                        hint = "raise `engine.start_timeout_s`"
                        raise RemoteError(self.name, f"is not up after {timeout_s:g} s; {self._said()}", hint=hint)
                    time.sleep(POLL_S)
            raise RemoteError(self.name, f"did not start: {self.failure()}")
        except BaseException:
            self.close()
            raise

    def failure(self) -> str | None:
        """Why it does not run any more; None while it does."""
        code = self._process.poll()
        return None if code is None else f"it ended with exit code {code}; {self._said()}"

    def close(self) -> None:
        """Ends the process with all that it started; waits for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _said(self) -> str:
        """The end of its log."""
        if self._log.closed:
            return "it was closed"
        log = self._log.fileno()
        start = max(0, os.fstat(log).st_size - NUM_BYTES)
        lines = os.pread(log, NUM_BYTES, start).decode(errors="replace").splitlines()[-NUM_LINES:]  # it goes on writing
        return "its last words:\n" + "\n".join(lines) if lines else "it said nothing"
