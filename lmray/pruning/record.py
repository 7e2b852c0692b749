"""`pruning.json`: beside the weights of a pruned model, what was removed, and from which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lmray.artifacts.files import write_json
from lmray.config import Config
from lmray.errors import ArtifactError, ConfigError
from lmray.models.merge import PRUNING
from lmray.pruning.structure import KINDS, Kind, Sizes

Kept = Mapping[Kind, Sequence[Sequence[int]]]
"""By kind and layer, the units that are kept, in order."""


class Counts(Config):
    """A number of weights."""

    before: int = Field(ge=1)
    after: int = Field(ge=1)


class Parent(Config):
    """The model that was pruned, as the base of an artifact says it."""

    source: str
    revision: str | None = None
    digest: str


class Pruning(Config):
    """What is left of a model: `kept` units of `sizes`, which are the parent's."""

    shape: Literal["uniform", "padded", "hetero"]
    """`uniform`: layers keep as many units. `padded`: what is narrower is filled up with zeros. `hetero`: layers of
    different widths."""
    asked: float = Field(gt=0, le=1)
    """The share of prunable weights that was to remain."""
    remaining: float = Field(gt=0, le=1)
    """The share that does."""
    parent: Parent
    prunable: Counts
    """Of what units are made of; zeros that fill up a `padded` layer are not counted."""
    parameters: Counts
    """Of the whole model as it lies on disk."""
    sizes: Sizes
    kept: dict[Kind, list[list[int]]]
    """By kind and layer, the units that are kept. A layer of which none is, is not there any more."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Pruning:
        sizes = self.sizes
        if sorted(self.kept) != sorted(KINDS):
            raise ValueError(f"`kept` holds {', '.join(self.kept) or 'nothing'}, and needs {', '.join(KINDS)}")
        for kind, layers in self.kept.items():
            _check_layers(kind, layers, sizes)
        if self.shape == "uniform":
            _check_alike(self.kept)
        left = num_kept(self.kept, sizes)
        if (self.prunable.before, self.prunable.after) != (sizes.prunable, left):
            raise ValueError(f"`prunable` is not {sizes.prunable} before and {left} after, as units and sizes say")
        return self

    def save(self, folder: Path) -> None:
        """Beside the weights."""
        write_json(folder / PRUNING, self.model_dump(mode="json"))

    @classmethod
    def beside(cls, folder: Path) -> Pruning | None:
        """What `save` wrote into `folder`; None for a model that was not pruned. Raises ArtifactError where it cannot
        be read, or contradicts itself."""
        path = folder / PRUNING
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            hint = "copy the model again, or prune it again"
            raise ArtifactError(str(path), f"is no record of a pruning: {_first(error)}", hint=hint) from None


def record_of(
    sizes: Sizes, kept: Kept, *, shape: str, asked: float, parent: Mapping[str, Any], parameters: Counts
) -> Pruning:
    """The record of keeping units `kept`, of which `asked` was to be kept. Raises ConfigError where it contradicts
    itself, such as layers that keep different numbers of units under `uniform`."""
    prunable = Counts(before=sizes.prunable, after=num_kept(kept, sizes))
    try:
        return Pruning(
            shape=shape,  # type: ignore[arg-type]  # checked by the class
            asked=asked,
            remaining=prunable.after / prunable.before,
            parent=Parent(**{name: parent.get(name) for name in Parent.model_fields}),  # type: ignore[arg-type]
            prunable=prunable,
            parameters=parameters,
            sizes=sizes,
            kept={kind: [list(units) for units in kept[kind]] for kind in KINDS},
        )
    except ValidationError as error:
        raise ConfigError("method", f"leaves no model: {_first(error)}") from None


def num_kept(kept: Kept, sizes: Sizes) -> int:
    """Prunable weights that units `kept` have."""
    costs = {kind: sizes.costs(kind) for kind in KINDS}
    return sum(costs[kind][unit] for kind in kept for units in kept[kind] for unit in units)


def _check_layers(kind: Kind, layers: list[list[int]], sizes: Sizes) -> None:
    if len(layers) != sizes.layers:
        raise ValueError(f"`kept.{kind}` has {len(layers)} layers of {sizes.layers}")
    for number, units in enumerate(layers):
        if units != sorted(set(units)) or not set(units) <= set(range(sizes.units(kind))):
            raise ValueError(f"`kept.{kind}` of layer {number} is not in order, or goes beyond {sizes.units(kind)}")
    if not any(layers):
        raise ValueError(f"`kept.{kind}` is empty in every layer")


def kept_layers(kept: Kept) -> list[int]:
    """The layers of which anything is kept."""
    return [number for number, units in enumerate(zip(*(kept[kind] for kind in KINDS), strict=True)) if any(units)]


def _check_alike(kept: Kept) -> None:
    for kind in KINDS:
        counts = sorted({len(kept[kind][number]) for number in kept_layers(kept)})
        if len(counts) > 1:
            raise ValueError(f"`kept.{kind}` has {counts[0]} to {counts[-1]} units a layer, which is not uniform")


def _first(error: ValidationError) -> str:
    one = error.errors()[0]
    where = ".".join(map(str, one["loc"]))
    return f"{where}: {one['msg']}" if where else one["msg"]
