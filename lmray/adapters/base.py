"""What an adapter does: say which weights of a model are trained, give and take them, and follow the training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmray.config import MemberConfig

if TYPE_CHECKING:
    import torch


class Adapter(MemberConfig):
    """Base of `lmray/adapters/*.py`."""

    kept: ClassVar[Literal["adapter", "model"]] = "adapter"
    """What a saved folder holds: PEFT's layout, to be put on the base, or a whole model in Hugging Face's."""

    @abstractmethod
    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        """`model`, whose weights are all frozen, ready to be trained: what learns has `requires_grad`, and fresh
        weights are a function of `seed`. Also for a model on the meta device, of which the plan counts the weights."""
        raise NotImplementedError

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes what is kept into `folder`. `state`: the model's whole `state_dict` on the CPU, where it is
        sharded."""
        raise NotImplementedError

    @abstractmethod
    def load(self, model: torch.nn.Module, folder: Path) -> None:
        """Sets the trained weights to those in `folder`. Raises CheckpointError where names or shapes differ."""
        raise NotImplementedError

    def for_steps(self, steps: int) -> Adapter:
        """This adapter for a run of `steps` optimizer steps. Raises ConfigError where it needs more."""
        return self

    @property
    def virtual_tokens(self) -> int:
        """Tokens that it puts before every row: such rows cannot be packed, nor run by the native engine."""
        return 0

    @property
    def needs_whole_weights(self) -> bool:
        """Whether every worker must hold the whole of what is trained: it is looked at, or changes, between steps."""
        return False

    @property
    def starts_from_base(self) -> bool:
        """Whether attaching it takes the values of the model's weights, so that they must be there by then."""
        return False

    @property
    def starts_from_residual(self) -> bool:
        """Whether attaching it takes what NF4 took from the model's weights, so that they must be quantised, and their
        files read as they lie."""
        return False

    @property
    def takes_from_base(self) -> bool:
        """Whether it begins with parts of the base's weights, which the base is without while it is trained."""
        return False

    @property
    def changes_base(self) -> bool:
        """Whether switching it off does not give the base back."""
        return self.kept == "model"

    def trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """By name, every parameter that learns at some step of the run: with `resume_state` all that a checkpoint
        needs of the model."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """What the optimizer is made of. A group with `lr_scale` has its learning rate multiplied by it."""
        return [{"params": list(self.trained(model).values())}]

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        """What is minimised once a step besides the method's loss a token; reported losses are without it."""
        return None

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Called after optimizer step `step` (1, 2, ...), while its gradients are still there. The optimizer's state of
        weights that are frozen in here is freed."""

    def resume_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides the trained weights."""
        return {}

    def resume(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, step: int) -> None:
        """Goes on after step `step`, whose weights are set already, with what `resume_state` gave there."""
