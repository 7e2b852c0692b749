"""A task scores what a model does with held-out examples."""

from __future__ import annotations

from typing import ClassVar

from lmray.config import MemberConfig
from lmray.data.base import Example


class Task(MemberConfig):
    """Base of `lmray/tasks/*.py`. A task either scores generated answers or needs the loss only."""

    generates: ClassVar[bool] = False

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Metrics of one generated answer by name, each 0 to 1; their mean over the examples is `eval.NAME`."""
        raise NotImplementedError(f"{self.name} scores no generated answers")
