"""What a training job needs before a weight is loaded: the model's folder, its tokenizer, tokenised and packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lmray.artifacts.files import sha256_json
from lmray.data.base import Example
from lmray.data.batch import Rows, pack, unpacked
from lmray.data.cache import tokenise_cached, tokenizer_digest
from lmray.data.examples import Examples, read_examples
from lmray.data.rules import Rules
from lmray.data.split import question_group, set_aside
from lmray.data.stored import also_among, once
from lmray.data.stream import Stream
from lmray.data.table import Table
from lmray.data.tokenise import TokenisedData
from lmray.errors import ConfigError, DataError
from lmray.evaluate.measure import check_tasks
from lmray.job import TrainJob
from lmray.models.load import load_config, load_tokenizer
from lmray.models.quantised import check_unquantised
from lmray.models.rope import check_positions, follows_length
from lmray.models.source import FoundModel, model_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """The same on every rank: reading is deterministic."""

    model: FoundModel
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    train: TokenisedData
    eval: TokenisedData
    rows: Rows | Stream
    """Rows of the training data, in file order; the sampler shuffles them."""
    eval_rows: Rows
    search: TokenisedData
    """What was set aside of the training data, and no weight is trained on; empty for most methods."""
    search_rows: Rows | Stream | None
    num_held_out_too: int = 0
    """Rows that are left out of what the method trains and searches on, for held-out ones are the same."""

    @property
    def digest(self) -> str:
        """Of the data as it is trained on: with other examples, another tokenizer or template it is another run."""
        return sha256_json([self.examples.digest, tokenizer_digest(self.tokenizer)])


def prepare(job: TrainJob) -> Prepared:
    """Finds the model and reads the data. Raises ArtifactError or DataError for what is missing or malformed, and
    ConfigError for rows longer than the model has positions."""
    spec, model = job.model, model_of(job)
    config = load_config(model.folder, trust_remote_code=job.model.trust_remote_code, rope_scaling=spec.rope_scaling)
    check_unquantised(config, model.folder)
    check_positions(config, job.data.max_length, spec.rope_scaling)
    if job.adapter.virtual_tokens and follows_length(config):
        found = f"`dynamic` positions of `{job.adapter.name}` would follow the padded row: it counts them by itself"
        raise ConfigError("model.rope_scaling", found, hint="use `yarn`, or an adapter without virtual tokens")
    examples = read_examples(job.data)
    check_tasks(job.evaluate.tasks, examples.eval)
    tokenizer = load_tokenizer(model.folder, chat=examples.has_chats, trust_remote_code=job.model.trust_remote_code)
    rules = Rules.of(job.data, model.folder, trust_remote_code=job.model.trust_remote_code)
    whole = replace(rules, max_length=None) if job.method.joins else rules
    train, held_out = (
        tokenise_cached(tokenizer, examples.train, whole),
        tokenise_cached(tokenizer, examples.eval, rules),
    )
    train, search, num_held_out_too = _set_aside(job, train, examples)
    rows, search_rows = _rows(job, train), _rows(job, search) if len(search.examples) else None
    eval_rows = pack(held_out.examples, max_length=job.data.max_length)
    if job.adapter.virtual_tokens:
        eval_rows = unpacked(held_out.examples)
    return Prepared(model, tokenizer, examples, train, held_out, rows, eval_rows, search, search_rows, num_held_out_too)


def _set_aside(job: TrainJob, train: TokenisedData, examples: Examples) -> tuple[TokenisedData, TokenisedData, int]:
    """What weights are trained on, what the method searches on, and how many rows are in neither, for what they say is
    held out: no row is in two parts. `train` was made of `examples.train`."""
    if not job.method.set_aside:
        return train, TokenisedData(Table([])), 0
    rows: Sequence[Example] = once(examples.train)[0]
    held = also_among(examples.eval, rows)
    if held.all():
        raise DataError("data.eval", "every training row is held out, too", hint="hold out rows of their own")
    train = replace(train, examples=train.examples.only(~held[train.examples.sources]))
    by = job.data.eval.by if job.data.eval is not None and job.data.eval.split is not None else None
    groups = np.fromiter((question_group(row, by) for row in rows), np.uint64, len(rows))
    aside = set_aside(train.examples.sources, groups, job.method.set_aside, job.train.seed)
    searched = TokenisedData(train.examples.only(aside))
    return replace(train, examples=train.examples.only(~aside)), searched, int(held.sum())


def _rows(job: TrainJob, train: TokenisedData) -> Rows | Stream:
    length, joins = job.data.max_length, job.method.joins
    if joins is not None:
        return Stream(train.examples, max_length=length, apart=joins == "apart")
    return pack(train.examples, max_length=length) if job.data.packing else unpacked(train.examples)
