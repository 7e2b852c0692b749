"""How a batch of prompts is answered, and where the answers go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmray.config.base import Config

MAX_ANSWERS = 128
"""To one prompt."""


class SamplingArgs(Config):
    """How answers are drawn; the names are OpenAI's."""

    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Most tokens of an answer; `engine.max_length` may end one before."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """0: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Least probability of a token that may be drawn, as a share of the likeliest token's."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones."""
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """Taken off a token's logit for each time it is in the answer."""
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """Taken off the logits of tokens in the answer, once."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Every answer draws by a seed of its own, made of this one, its row's number and its place: what a row is answered
    does not depend on which worker does it, or when."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer; they are not part of it."""
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    """Answers to each prompt."""
    json_schema: dict[str, Any] | None = None
    """Hold answers to JSON of this schema. Empty: free text."""

    @model_validator(mode="after")
    def _answers_differ(self):
        if self.n > 1 and self.temperature == 0.0:
            raise ValueError(f"`n: {self.n}` greedy answers are one and the same; hint: set a `temperature` above 0")
        return self


class AnswerFiles(Config):
    folder: str | None = None
    """Where the answers are written; every worker must see it. Empty: `answers` in the run folder."""
    format: Literal["jsonl", "parquet", "both"] = "jsonl"
    shard_size: Annotated[int, Field(ge=1)] = 256
    """Rows of a file. A file is written when its last row is answered, by one worker, which answers its rows side by
    side; an interrupted run goes on with the files that are missing."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that each shard becomes."""
        return ("jsonl", "parquet") if self.format == "both" else (self.format,)
