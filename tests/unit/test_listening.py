"""A server of a test leaves the process as it was."""

from __future__ import annotations

import logging

from fastapi import FastAPI

from lmray.testing.listening import listening


class _Handler(logging.Handler):
    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


def test_handlers_of_others_stay_open():
    """absl's, which tensorboard brings, closes the stream of whoever runs the tests."""
    handler = _Handler()
    with listening(FastAPI()):
        assert not handler.closed
