"""What a training job needs before a weight is loaded: the model's folder, its tokenizer, tokenised and packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmray.artifacts.files import sha256_json
from lmray.data.batch import Rows, pack, unpacked
from lmray.data.cache import tokenise_cached, tokenizer_digest
from lmray.data.examples import Examples, read_examples
from lmray.data.rules import Rules
from lmray.data.tokenise import TokenisedData
from lmray.evaluate.measure import check_tasks
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

    @property
    def digest(self) -> str:
        """Of the data as it is trained on: with other examples, another tokenizer or template it is another run."""
        return sha256_json([self.examples.digest, tokenizer_digest(self.tokenizer)])


def prepare(job: TrainJob) -> Prepared:
    """Finds the model and reads the data. Raises ArtifactError or DataError for what is missing or malformed."""
    model = find_model(job.model.source, job.model.revision, trust_remote_code=job.model.trust_remote_code)
    examples = read_examples(job.data)
    check_tasks(job.evaluate.tasks, examples.eval)
    tokenizer = load_tokenizer(model.folder, chat=examples.has_chats, trust_remote_code=job.model.trust_remote_code)
    rules = Rules.of(job.data, model.folder, trust_remote_code=job.model.trust_remote_code)
    train, held_out = (tokenise_cached(tokenizer, part, rules) for part in (examples.train, examples.eval))
    rows = pack(train.examples, max_length=job.data.max_length) if job.data.packing else unpacked(train.examples)
    eval_rows = pack(held_out.examples, max_length=job.data.max_length)
    return Prepared(model, tokenizer, examples, train, held_out, rows, eval_rows)
