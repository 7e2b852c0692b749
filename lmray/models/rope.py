"""Longer contexts: rotary positions scaled through the model's own config, so that all who read that compute the same.

`linear`: positions divided by the factor (Chen et al., arXiv 2306.15595, equation 4). `yarn`: high frequencies kept,
low ones divided, attention sharpened (Peng et al., arXiv 2309.00071, equations 19 and 22). `llama3`: the division
Llama 3.1 was extended by. `dynamic`: a base of the frequencies that grows with the sequence (NTK-aware scaling, Peng
et al., section 3.3 and appendix B.2). `transformers` computes all of them.

It takes the frequencies of `dynamic` from the longest sequence of a forward pass, on which all others would hang; they
are each example's own here (`lmray.models.rope_by_example`). `longrope` would need its cached keys read again where an
answer grows beyond the original length: models that come with it are used up to that, and a job cannot ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lmray.artifacts.files import write_json
from lmray.config import Config
from lmray.errors import ArtifactError, ConfigError

DYNAMIC, LONGROPE = "dynamic", "longrope"
"""Types whose frequencies depend on the length of a sequence."""
FILE = "rope_scaling.json"
"""In an adapter's folder; missing where its positions are the model's own."""
TAKES: dict[str, dict[str, Any]] = {
    "linear": {},
    DYNAMIC: {},
    "yarn": {"original_max_position_embeddings": None, "attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {"original_max_position_embeddings": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""What each type takes besides the factor, with its default; None: as the model's config says, or computed."""
SCALABLE = ("default", "yarn", "llama3")
"""Types of which the original length is known."""
Positive = Annotated[float, Field(gt=0.0)]


class RopeScaling(Config):
    """Field names are those of `rope_parameters` in a `transformers` config."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: Annotated[float, Field(gt=1.0)]
    """How many times the original positions the model gets."""
    original_max_position_embeddings: Annotated[int, Field(ge=1)] | None = None
    """`yarn`, `llama3`: tokens of the sequences the model was first trained on. Empty: as its config says."""
    attention_factor: Positive | None = None
    """`yarn`: what cosine and sine are multiplied by. Empty: 0.1 ln(factor) + 1."""
    beta_fast: Positive | None = None
    """`yarn`: frequencies that turn more often than this over the original length are kept. Empty: 32."""
    beta_slow: Positive | None = None
    """`yarn`: those that turn less often are divided by the factor. Empty: 1."""
    low_freq_factor: Positive | None = None
    """`llama3`: wavelengths above the original length over this are multiplied by the factor. Empty: 1."""
    high_freq_factor: Positive | None = None
    """`llama3`: those below the original length over this are kept. Empty: 4."""

    @field_validator("rope_type", mode="before")
    @classmethod
    def _is_the_same_for_all(cls, value: Any):
        if value == LONGROPE:
            raise ValueError(
                f"`{value}` takes its frequencies from the longest example of a batch, on which all others would hang; "
                "hint: use `yarn`, or `dynamic`, whose are each example's own"
            )
        return value

    @field_validator(*{name: 0 for fields in TAKES.values() for name in fields})
    @classmethod
    def _is_of_its_type(cls, value: Any, info: ValidationInfo):
        rope_type = info.data.get("rope_type")
        if value is not None and rope_type is not None and info.field_name not in TAKES[rope_type]:
            takes = ", ".join(["factor", *TAKES[rope_type]])
            raise ValueError(f"says nothing to `{rope_type}`; hint: that takes {takes}")
        return value

    @model_validator(mode="after")
    def _ordered(self):
        given = self.parameters()
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if low in given and given[low] >= given[high]:
                raise ValueError(f"`{low}` {given[low]} is not below `{high}` {given[high]}")
        return self

    def parameters(self) -> dict[str, Any]:
        """The fields of its type, with their defaults; None where the model's config says the value."""
        own = {name: getattr(self, name) for name in TAKES[self.rope_type]}
        filled = {name: TAKES[self.rope_type][name] if value is None else value for name, value in own.items()}
        return {"rope_type": self.rope_type, "factor": self.factor, **filled}

    def apply(self, config: Any) -> None:
        """Scales the rotary positions of `config`, a `transformers` config, in place. Raises ConfigError for a model
        without them."""
        text = config.get_text_config()
        before = _rope(text)
        if before.get("rope_type") not in SCALABLE:
            how = f"are scaled already: {before['rope_type']}" if "rope_type" in before else "differ by kind of layer"
            found = f"the positions of `{config.model_type}` {how if before else 'are no rotary ones'}"
            raise ConfigError("model.rope_scaling", found, hint="leave it out")
        given = {name: value for name, value in self.parameters().items() if value is not None}
        known = before.get("original_max_position_embeddings") or text.max_position_embeddings
        length = self.original_max_position_embeddings or known
        if "original_max_position_embeddings" in TAKES[self.rope_type]:
            given["original_max_position_embeddings"] = length
        kept = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
        text.rope_parameters = kept | given
        if self.rope_type != DYNAMIC:  # which takes this for the original length
            length = int(length * self.factor)
        text.max_position_embeddings = length

    def save(self, folder: Path) -> None:
        """Beside an adapter, whose weights alone do not say what positions they were trained on."""
        write_json(folder / FILE, self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def beside(cls, folder: Path) -> RopeScaling | None:
        """What `save` wrote into `folder`. Raises ArtifactError where it cannot be read."""
        path = folder / FILE
        try:
            return cls.model_validate_json(path.read_bytes()) if path.is_file() else None
        except (OSError, ValueError):
            raise ArtifactError(str(path), "says no scaling of positions", hint="copy the adapter again") from None

    def __str__(self) -> str:
        """As a job writes it, with the defaults of its type."""
        return ", ".join(f"{name}: {value}" for name, value in self.parameters().items() if value is not None)

    @classmethod
    def of(cls, base: Mapping[str, Any]) -> RopeScaling | None:
        """What `base`, an artifact's entry of its base model, says of it."""
        found = base.get("rope_scaling")
        return None if found is None else cls.model_validate(found)


def check_same_scaling(adapter: str, was: RopeScaling | None, scaling: RopeScaling | None) -> None:
    """Raises ArtifactError where `adapter`, as it is called in messages, was trained on positions that were scaled
    otherwise than by `scaling`."""
    if (was and was.parameters()) == (scaling and scaling.parameters()):
        return
    hint = f"set `model.rope_scaling: {{{was}}}`" if was else "leave `model.rope_scaling` out"
    raise ArtifactError(
        adapter,
        f"was trained on positions scaled by {was or 'nothing'}",
        allowed=f"by {scaling or 'nothing'}, as the job says",
        hint=hint,
    )


def _rope(text: Any) -> Mapping[str, Any]:
    return getattr(text, "rope_parameters", None) or {}


def num_positions(config: Any) -> int | None:
    """Tokens of the longest sequence whose positions are the same whatever it is batched with; None where positions
    have no end."""
    text = config.get_text_config()
    limit, rope = getattr(text, "max_position_embeddings", None), _rope(text)
    if rope.get("rope_type") == LONGROPE:
        return rope.get("original_max_position_embeddings") or limit
    if limit is not None and rope.get("rope_type") == DYNAMIC:
        return int(limit * rope["factor"])
    return limit


def follows_length(config: Any) -> bool:
    """Whether the positions of the model of `config` hang on the length of their example."""
    return _rope(config.get_text_config()).get("rope_type") == DYNAMIC


def check_positions(config: Any, max_length: int, scaling: RopeScaling | None = None) -> None:
    """Raises ConfigError where sequences of `max_length` tokens go beyond the positions of the model of `config`, to
    which the job's `scaling` was applied."""
    limit, rope = num_positions(config), _rope(config.get_text_config())
    if limit is None or max_length <= limit:
        return
    hint = "shorten it"
    if scaling is not None:
        hint += f", or set `model.rope_scaling.factor: {math.ceil(max_length / (limit / scaling.factor))}`"
    elif rope.get("rope_type") in SCALABLE:
        factor = math.ceil(max_length / (rope.get("original_max_position_embeddings") or limit))
        hint += f", or give the model more: `model.rope_scaling: {{rope_type: yarn, factor: {factor}}}`"
    found = f"{max_length} tokens are more than the model has positions for"
    raise ConfigError("data.max_length", found, allowed=f"up to {limit}", hint=hint)
