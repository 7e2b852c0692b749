"""Optimizers that keep their running means of matrices in fewer dimensions, and the projections into them.

Shapes: a matrix of A x B, A >= B, has means of A x r and a projection of r x B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from lmray.errors import ConfigError
from lmray.optim.base import OptimizerConfig, Shapes, decayed


class Projected(OptimizerConfig):
    """What GaLore and APOLLO share."""

    packages = ("bitsandbytes",)
    options: ClassVar[dict[str, Any]] = {}
    """Of the library's groups, besides the fields."""
    rank: Annotated[int, Field(ge=1)] = 128
    """Dimensions that remain; matrices no wider than this are not projected."""
    update_proj_gap: Annotated[int, Field(ge=1)] = 200
    """Steps between two projections."""
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the projected steps."""

    def check(self, shapes: Shapes, *, device: str) -> None:
        if not any(map(self._is_projected, shapes)):
            found = f"`{self.name}` projects matrices wider than its rank, {self.rank}, and none is trained"
            raise ConfigError("train.optim", found, hint="train the whole model, or take `adamw_torch`")
        super().check(shapes, device=device)

    def groups(self, groups: Any, weight_decay: float) -> list[dict[str, Any]]:
        """`groups`, divided into what is projected and what is not."""
        projection = {"rank": self.rank, "update_proj_gap": self.update_proj_gap, "scale": self.scale, **self.options}
        split = [
            {**group, **extra, "params": [one for one in group["params"] if self._is_projected(one.shape) == projected]}
            for group in decayed(groups, weight_decay)
            for projected, extra in ((True, projection), (False, {}))
        ]
        return [group for group in split if group["params"]]

    def state_bytes(self, shapes: Shapes) -> int:
        return sum(4 * self._numbers(shape) for shape in shapes)

    def _numbers(self, shape: Sequence[int]) -> int:
        return 2 * max(shape) * self.rank + min(shape) * self.rank if self._is_projected(shape) else 2 * prod(shape)

    def _is_projected(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and min(shape) > self.rank


def keep_projectors(
    optimizer: torch.optim.Optimizer,
    make: Callable[..., Any],
    names: Sequence[str],
) -> torch.optim.Optimizer:
    """`optimizer`, whose `state_dict` holds the attributes `names` of its projectors in place of these objects, which
    `make` makes again.

    A projection is cut out of a matrix that LAPACK has laid out by columns. From each step on it is a tensor of its
    own, by rows, as files have it: products of another layout may be rounded otherwise, and a resumed run would not be
    the uninterrupted one; and the rest of the matrix is not held.
    """

    def as_values(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            index: {
                key: {name: getattr(value, name) for name in names} if key == "projector" else value
                for key, value in facts.items()
            }
            for index, facts in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def as_objects(loaded: torch.optim.Optimizer) -> None:
        for group in loaded.param_groups:
            for facts in (loaded.state[parameter] for parameter in group["params"] if parameter in loaded.state):
                if "projector" in facts:
                    settings = {name: group[name] for name in ("update_proj_gap", "scale", "proj_type")}
                    values, facts["projector"] = facts["projector"], make(group["rank"], **settings)
                    vars(facts["projector"]).update(values)

    def own_tensors(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for projector in (facts["projector"] for facts in stepped.state.values() if "projector" in facts):
            for name in names:
                setattr(projector, name, _own(getattr(projector, name)))

    optimizer.register_step_post_hook(own_tensors)
    optimizer.register_state_dict_post_hook(as_values)
    optimizer.register_load_state_dict_post_hook(as_objects)
    return optimizer


def _own(value: Any) -> Any:
    """A tensor by rows that holds no more than itself."""
    if not isinstance(value, torch.Tensor):
        return value
    is_part = value.untyped_storage().nbytes() > value.nbytes
    return value.clone(memory_format=torch.contiguous_format) if is_part or not value.is_contiguous() else value
