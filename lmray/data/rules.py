"""What decides, besides tokenizer and examples, which tokens come out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmray.data.spec import DataSpec
from lmray.models.load import embedding_rows, stop_token_ids_in


@dataclass(frozen=True)
class Rules:
    """From a job and its model; part of the key under which tokenised data is kept."""

    max_length: int | None
    """None: whole examples, however long, for rows that they are cut into later."""
    over_long: str = "drop"
    mask_history: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """End an answer besides the tokenizer's end of sequence."""
    vocab_size: int | None = None
    """Rows of the model's embedding, where they are known."""

    @classmethod
    def of(cls, spec: DataSpec, model: Path, *, trust_remote_code: bool = False) -> Rules:
        """Those of a job's data section for the model in folder `model`. Raises ArtifactError for a config that cannot
        be read."""
        rows = embedding_rows(model, trust_remote_code=trust_remote_code)
        return cls(spec.max_length, spec.over_long, spec.mask_history, stop_token_ids_in(model), rows)
