"""Pruning in two stages, the first: a model is cut before it is tuned. The second is a training job on what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmray.errors import ConfigError, did_you_mean
from lmray.models.load import load_config, load_model, load_tokenizer
from lmray.models.precision import round_weights, stored_dtype
from lmray.pruning.depth import block_influence, layers_to_keep, shallower
from lmray.pruning.gates import kept_units
from lmray.pruning.importance.base import Rows, Scores
from lmray.pruning.importance.magnitude import magnitude
from lmray.pruning.importance.taylor import taylor
from lmray.pruning.importance.wanda_sp import wanda_sp
from lmray.pruning.masks import project
from lmray.pruning.shrink import group_counts, shrunk
from lmray.pruning.structure import Structure, structure_of

IMPORTANCE: Mapping[str, Callable[[Any, Structure, Rows], Scores]] = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "taylor": taylor,
}
DEPTH = "depth"
WAYS = (*IMPORTANCE, DEPTH)


def smaller_model(model: Any, way: str, rows: Rows, *, remaining: float, multiple_of: int = 64) -> Any:
    """What `way` (one of WAYS) leaves of `model`: at most `remaining` of its prunable weights, the same width in every
    layer, the MLP's a multiple of `multiple_of`; `depth`: fewer layers. `rows`: calibration rows of training data.

    Raises ConfigError for an unknown way, an architecture that is not described, and a budget too small for it.
    """
    if way == DEPTH:
        return shallower(model, layers_to_keep(block_influence(model, rows), remaining))
    if way not in IMPORTANCE:
        raise ConfigError("importance", f"`{way}` is not known", allowed=", ".join(WAYS), hint=did_you_mean(way, WAYS))
    structure = structure_of(model, block=1)
    scores = IMPORTANCE[way](model, structure, rows)
    masks = project(
        scores,
        structure.sizes,
        remaining,
        shape="uniform",
        multiple_of=multiple_of,
        group_counts=group_counts(model, structure, "uniform"),
        worth=lambda score: score,
    )
    return shrunk(model, structure, kept_units(masks), "uniform")


def write_pruned(folder: Path, target: Path, way: str, rows: Rows, *, remaining: float, multiple_of: int = 64) -> None:
    """Writes what `way` leaves of the model in `folder` to `target`, with its tokenizer, for plain `from_pretrained`;
    weights are weighed in float32 and written as they were. Raises what `smaller_model` raises, and ArtifactError for a
    model that cannot be read."""
    model: Any = load_model(folder, "float32")
    smaller = smaller_model(model, way, rows, remaining=remaining, multiple_of=multiple_of)
    round_weights(smaller, stored_dtype(load_config(folder))).save_pretrained(target)
    load_tokenizer(folder, chat=False).save_pretrained(target)
