"""AdaLoRA: the update is P diag(E) Q, and ranks whose singular values matter least are pruned while it is trained.

Zhang et al., arXiv 2303.10512: the budget falls by a cubic schedule (equation 12) from `init_r` a layer to `target_r`
on average; importance is the smoothed sensitivity times its smoothed uncertainty (equations 8 to 11); P and Q are kept
orthogonal by a penalty (equation 4). Through the `peft` library.
Differs from the paper in: the penalty is the mean over matrices of the norm, not the sum of squared norms, as in
`peft`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import AdaLoraConfig
from pydantic import Field, PrivateAttr, model_validator
from safetensors.torch import load_file

from lmray.adapters._peft import CONFIG, HANDLE, WEIGHTS, PeftAdapter, peft_config
from lmray.errors import ConfigError
from lmray.models.tensors import check_same_shapes

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
HISTORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator remembers of every weight."""


class Adalora(PeftAdapter):
    """Low-rank adaptation that moves its ranks to where they matter."""

    init_r: Annotated[int, Field(ge=2)] = 12
    """Rank of every update at first."""
    target_r: Annotated[int, Field(ge=1)] = 8
    """Rank of an update in the end, on average over the layers."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 16
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an update; `all-linear` means all but the output head."""
    tinit: Annotated[int, Field(ge=0)] = 0
    """Steps before the first rank is pruned."""
    tfinal: Annotated[int, Field(ge=0)] = 0
    """Steps after the last rank is pruned."""
    deltaT: Annotated[int, Field(ge=1)] = 1  # PEFT's name
    """Steps from one pruning to the next."""
    beta1: Share = 0.85
    """Of the smoothed sensitivity."""
    beta2: Share = 0.85
    """Of the smoothed uncertainty."""
    orth_reg_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the penalty, beside a loss a token."""
    _steps: int = PrivateAttr(1)

    @model_validator(mode="after")
    def _shrinks(self):
        if self.target_r >= self.init_r:
            raise ValueError(f"prunes from {self.init_r} to {self.target_r}; hint: make `target_r` less than `init_r`")
        return self

    def for_steps(self, steps: int) -> Adalora:
        if self.tinit + self.tfinal >= steps:
            found = f"`tinit` {self.tinit} and `tfinal` {self.tfinal} leave none of {steps} steps to prune in"
            raise ConfigError("adapter.tinit", found, allowed=f"together less than {steps}")
        made = self.model_copy()
        made._steps = steps
        return made

    def config(self) -> AdaLoraConfig:
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            total_step=self._steps,
            task_type="CAUSAL_LM",
        )

    @property
    def needs_whole_weights(self) -> bool:
        return True

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not self.orth_reg_weight:
            return None
        norms = []
        for name, one in self.trained(model).items():
            if "lora_A" in name or "lora_B" in name:
                gram = one @ one.T if "lora_A" in name else one.T @ one
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    def resume_state(self, model: Any) -> dict[str, torch.Tensor]:
        allocator = model.base_model.rankallocator
        history = {f"{part}/{name}": one for part in HISTORY for name, one in getattr(allocator, part).items()}
        pattern = peft_config(model).rank_pattern or {}  # type: ignore[attr-defined]
        return history | {f"rank_pattern/{name}": torch.tensor(mask) for name, mask in pattern.items()}

    def resume(self, model: Any, state: Mapping[str, torch.Tensor], *, step: int) -> None:
        pattern = {}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            if part == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(model.base_model.rankallocator, part)[name] = tensor.to(model.device)
        peft_config(model).rank_pattern = pattern or None  # type: ignore[attr-defined]

    def kept_config(self, model: torch.nn.Module) -> dict[str, Any]:
        return super().kept_config(model) | {"rank_pattern": _pattern(model) or None}

    def to_kept(self, model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The ranks that are left, as `peft` keeps them."""
        return _pruned(state, _pattern(model))

    def load(self, model: Any, folder: Path) -> None:
        """The ranks that were pruned stay, as zeros."""
        pattern = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["rank_pattern"] or {}
        whole, found = self._state(model), load_file(folder / WEIGHTS)
        check_same_shapes(folder / WEIGHTS, found, _pruned(whole, pattern))
        for name, tensor in found.items():
            if tensor.shape != whole[name].shape:
                mask = torch.tensor(_mask(name, pattern))
                wide = torch.zeros_like(whole[name], device="cpu")
                wide[_ranks(name, mask)] = tensor
                found[name] = wide
        self._set_state(model, found)
        peft_config(model).rank_pattern = pattern or None  # type: ignore[attr-defined]

    def _state(self, model: Any, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        with _all_ranks(model):
            return super()._state(model, state)

    def _set_state(self, model: Any, state: Mapping[str, torch.Tensor]) -> None:
        with _all_ranks(model):
            super()._set_state(model, state)


@contextmanager
def _all_ranks(model: Any) -> Iterator[None]:
    """Within the block PEFT leaves the shapes as they are."""
    config: Any = peft_config(model)
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def _pattern(model: torch.nn.Module) -> dict[str, list[bool]]:
    """Of every layer which ranks are left, by PEFT's name of its singular values on disk."""
    config: Any = peft_config(model)
    return {name.removesuffix(f".{HANDLE}"): mask for name, mask in (config.rank_pattern or {}).items()}


def _mask(name: str, pattern: Mapping[str, list[bool]]) -> list[bool] | None:
    return pattern.get(f"{name.removeprefix('base_model.model.').rpartition('.')[0]}.lora_E")


def _ranks(name: str, mask: torch.Tensor) -> Any:
    """The index of the ranks in `mask`: columns of B, rows of A and E."""
    return (slice(None), mask) if name.endswith("lora_B") else mask


def _pruned(state: Mapping[str, torch.Tensor], pattern: Mapping[str, list[bool]]) -> dict[str, torch.Tensor]:
    masks = {name: _mask(name, pattern) for name in state}
    return {
        name: tensor if (mask := masks[name]) is None else tensor[_ranks(name, torch.tensor(mask))]
        for name, tensor in state.items()
    }
