"""Held-out loss and perplexity, over the supervised tokens of all held-out examples."""

from __future__ import annotations

from lmray.tasks.base import Task


class Loss(Task):
    """`eval.loss` and `eval.perplexity`."""
