"""What a training job needs before a weight is loaded: the model's folder, its tokenizer, tokenised and packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmray.data.batch import Rows, pack, unpacked
from lmray.data.examples import Examples, read_examples
from lmray.data.tokenise import TokenisedData, tokenise_all
from lmray.job import TrainJob
from lmray.models.load import load_tokenizer
from lmray.models.source import FoundModel, find_model

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
    rows: Rows
    """Rows of the training data, in file order; the sampler shuffles them."""
    eval_rows: Rows


def prepare(job: TrainJob) -> Prepared:
    """Finds the model and reads the data. Raises ArtifactError or DataError for what is missing or malformed."""
    model = find_model(job.model.source, job.model.revision)
    tokenizer = load_tokenizer(model.folder)
    examples = read_examples(job.data)
    limits = {"max_length": job.data.max_length, "over_long": job.data.over_long}
    train = tokenise_all(tokenizer, examples.train, **limits)
    held_out = tokenise_all(tokenizer, examples.eval, **limits)
    rows = pack(train.examples, max_length=job.data.max_length) if job.data.packing else unpacked(train.examples)
    eval_rows = pack(held_out.examples, max_length=job.data.max_length)
    return Prepared(model, tokenizer, examples, train, held_out, rows, eval_rows)
