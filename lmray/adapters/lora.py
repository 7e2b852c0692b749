"""LoRA: a frozen weight W gets a trained low-rank side path, W x + (alpha / r) B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3, through the `peft`
library. Its variants: rank-stabilised scaling (arXiv 2312.03732), DoRA (arXiv 2402.09353), LoRA+ (arXiv 2402.12354),
and A and B started from the weight itself, by its largest singular values (PiSSA, arXiv 2404.02948) or its QR
decomposition (OLoRA, arXiv 2406.01775), or from what quantising took from it (LoftQ, arXiv 2310.08659).
Differs from the papers in: nothing; B starts at zero, A as `peft` starts it (Kaiming uniform), unless told otherwise.
PiSSA and OLoRA take A_0 and B_0 out of W, LoftQ makes up with them for its quantising; what is kept is [A, A_0] and
[B, -B_0] of twice the rank, for W as it was. Of LoftQ one iteration (see `_loftq`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from pydantic import Field, model_validator

from lmray.adapters._loftq import start_from_residuals
from lmray.adapters._peft import HANDLE, PeftAdapter

Positive = Annotated[float, Field(gt=0.0)]
Rank = Annotated[int, Field(ge=1)]


class Lora(PeftAdapter):
    """Low-rank adaptation."""

    r: Rank = 8
    """Rank of the update."""
    lora_alpha: Positive = 16
    """Scale: the update is multiplied by `lora_alpha / r`."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an update; `all-linear` means all but the output head."""
    use_rslora: bool = False
    """Multiply by `lora_alpha / sqrt(r)` instead, so that high ranks learn as fast as low ones."""
    use_dora: bool = False
    """Train the length of each weight's columns apart from their direction."""
    lora_plus_ratio: Positive | None = None
    """LoRA+: the learning rate of B is this multiple of A's; its authors take 16. Empty: the same."""
    init_lora_weights: (
        Literal[True, "gaussian", "orthogonal", "pissa", "olora", "loftq"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = True
    """How A and B start. `true`: A random, B zero. `pissa`: from the weight's largest singular values;
    `pissa_niter_16`: the same by 16 rounds of a fast approximation. `olora`: from its QR decomposition. `loftq`: from
    what `model.quantization: nf4` took from it."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and kept with the adapter, like `lm_head`."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the decoder layers, from 0, that get an update. Empty: all."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Other ranks than `r`, by the end of a layer's name or a regular expression."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Other scales than `lora_alpha`, in the same way."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the model that are trained as well."""

    @model_validator(mode="after")
    def _fits(self):
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "gives `layers_to_transform` without names in `target_modules`; hint: name the linear layers, like "
                "`target_modules: [q_proj, v_proj]`"
            )
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("starts `orthogonal` with an odd rank; hint: make `r` even")
        if self._has_start and (self.use_dora or self.modules_to_save or self.bias != "none"):
            raise ValueError(
                f"starts from `{self.init_lora_weights}` with `use_dora`, `modules_to_save` or `bias`; "
                "hint: `init_lora_weights: true` goes with them"
            )
        return self

    @property
    def takes_from_base(self) -> bool:
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def starts_from_residual(self) -> bool:
        return self.init_lora_weights == "loftq"

    @property
    def _has_start(self) -> bool:
        """Whether the update is not zero at first, so that what is kept is its difference to that."""
        return self.takes_from_base or self.starts_from_residual

    @property
    def starts_from_base(self) -> bool:
        return self._has_start or self.use_dora or bool(self.modules_to_save) or self.bias != "none"

    @property
    def changes_base(self) -> bool:
        return self.takes_from_base or self.bias != "none"

    def config(self) -> LoraConfig:
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r,
            lora_alpha=_whole(self.lora_alpha),  # type: ignore[arg-type]  # PEFT divides by r; a fraction is fine
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.starts_from_residual or self.init_lora_weights,  # type: ignore[arg-type]
            modules_to_save=list(self.modules_to_save) or None,
            ensure_weight_tying=bool(self.modules_to_save),
            layers_to_transform=None if self.layers_to_transform is None else list(self.layers_to_transform),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern={name: _whole(alpha) for name, alpha in self.alpha_pattern.items()},
            bias=self.bias,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: torch.nn.Module, *, seed: int) -> torch.nn.Module:
        if not self._has_start:
            return super().attach(model, seed=seed)
        if next(model.parameters()).device.type == "meta":  # nothing to decompose; the shapes are the same
            return self.model_copy(update={"init_lora_weights": True}).attach(model, seed=seed)
        adapted: Any = super().attach(model, seed=seed)
        if self.starts_from_residual:
            start_from_residuals(adapted)
        adapted.initial_factors = {name: tensor.detach().cpu().clone() for name, tensor in self._state(adapted).items()}
        return adapted

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        if self.lora_plus_ratio is None:
            return super().parameter_groups(model)
        trained = self.trained(model)
        fast = [one for name, one in trained.items() if "lora_B" in name or "lora_embedding_B" in name]
        slow = [one for name, one in trained.items() if not ("lora_B" in name or "lora_embedding_B" in name)]
        return [{"params": slow}, {"params": fast, "lr_scale": self.lora_plus_ratio}]

    def resume_state(self, model: Any) -> dict[str, torch.Tensor]:
        """LoftQ's start: on another machine quantising may round otherwise, and the same base give another."""
        return dict(model.initial_factors) if self.starts_from_residual else {}

    def resume(self, model: Any, state: Mapping[str, torch.Tensor], *, step: int) -> None:
        if self.starts_from_residual:
            model.initial_factors = dict(state)

    def kept_config(self, model: torch.nn.Module) -> dict[str, Any]:
        config = super().kept_config(model)
        if self._has_start:
            grown = math.sqrt(2) if self.use_rslora else 2
            config |= {"r": 2 * config["r"], "lora_alpha": grown * config["lora_alpha"], "init_lora_weights": True}
            config["rank_pattern"] = {name: 2 * r for name, r in config["rank_pattern"].items()}
            config["alpha_pattern"] = {name: grown * alpha for name, alpha in config["alpha_pattern"].items()}
        return config

    def to_kept(self, model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._has_start:
            return state
        first = model.initial_factors
        return {
            name: torch.cat(_pair(name, tensor.cpu(), first[name]), dim=_axis(name)) for name, tensor in state.items()
        }

    def from_kept(self, model: Any, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The trained factors; the base is made what is left of it without those the kept adapter started from, if it
        is a start that takes them out."""
        if not self._has_start:
            return state
        halves = {name: tensor.chunk(2, dim=_axis(name)) for name, tensor in state.items()}
        first = {name: _pair(name, *pair)[1] for name, pair in halves.items()}
        if any(not torch.equal(first[name], tensor) for name, tensor in model.initial_factors.items()):
            for sign, factors in ((1, model.initial_factors), (-1, first)) if self.takes_from_base else ():
                self._set_state(model, factors)
                _add_updates(model, sign)
            model.initial_factors = {name: tensor.clone() for name, tensor in first.items()}
        return {name: pair[0].contiguous() for name, pair in halves.items()}


def _axis(name: str) -> int:
    """The dimension of a factor that counts ranks."""
    return 0 if "lora_A" in name else 1


def _pair(name: str, trained: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and A_0, or B and -B_0."""
    return trained, first if "lora_A" in name else -first


@torch.no_grad()
def _add_updates(model: torch.nn.Module, sign: int) -> None:
    """Adds the update of every layer's factors to its weight, or takes it away."""
    for layer in model.modules():
        if hasattr(layer, "lora_A") and HANDLE in layer.lora_A:  # type: ignore[operator]
            one: Any = layer
            weight = one.get_base_layer().weight
            weight.add_(sign * one.get_delta_weight(HANDLE).to(weight.dtype))


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
