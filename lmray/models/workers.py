"""How many workers train one model: a number, or a range that a run keeps to while machines come and go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from lmray.config import Config


class Workers(Config):
    """Written as a number, or as `{min: 1, max: 4}`: then the run starts with what there is room for, and starts again
    from its last checkpoint when that changes.

    A step is over the rows of `max` workers at whatever number there is, and so is the curve; with dropout or noise it
    depends on the number all the same, for every worker draws its own.
    """

    min: Annotated[int, Field(ge=1)]
    """With fewer the run waits."""
    max: Annotated[int, Field(ge=1)]
    """More are not taken. May be more than the cluster has: machines may come."""
    resize_interval_s: Annotated[float, Field(gt=0.0)] = 60.0
    """How often a run looks for room for more workers, in seconds. Growing costs a start and the steps since the last
    checkpoint: seldom is better."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any):
        if isinstance(value, (Mapping, Workers)):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{value!r} is no number of workers; hint: a number from 1 on, or `{{min: 1, max: 4}}`")
        return {"min": value, "max": value}

    @model_validator(mode="after")
    def _ascending(self):
        if self.min > self.max:
            raise ValueError(f"`min` {self.min} is above `max` {self.max}")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler) -> Any:
        return self.max if self == _number(self.max) else handler(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema, handler) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 1}, handler(schema)]}

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.min < self.max

    def within(self, room: int) -> int:
        """How many run where there is room for `room`."""
        return max(self.min, min(self.max, room))

    def __str__(self) -> str:
        return f"{self.min} to {self.max}" if self.elastic else str(self.max)


def _number(count: int) -> Workers:
    return Workers(min=count, max=count)


ONE = _number(1)
