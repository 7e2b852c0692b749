"""Continual pre-training: next-token cross-entropy on every token of a corpus.

Documents are joined, the tokenizer's end-of-document token between them, and cut into full rows (`lmray.data.stream`).
Conversations may be mixed in against forgetting; a source says whether they are learned whole or by their answers. Runs
on every rank.
Differs from the paper in: nothing; there is no one paper.
"""

from __future__ import annotations

from lmray.data.spec import Joined
from lmray.methods.base import Method, Objective
from lmray.methods.sft import sft_loss


class Pretrain(Method):
    """Continual pre-training on plain text. Rows are always full: `data.packing` and `over_long` say nothing here."""

    cross_document_attention: bool = True
    """A document sees those before it in its row. False: each sees only itself, and its positions start at 0."""

    @property
    def joins(self) -> Joined:
        return "through" if self.cross_document_attention else "apart"

    def objectives(self) -> tuple[Objective, ...]:
        return (Objective("pretrain", sft_loss, lambda batch: batch.num_supervised),)
