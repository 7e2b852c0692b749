"""What is done to a model's decoder layers for the length of a training step: run again instead of kept, compiled.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 4: of every layer only its
inputs are kept, and the rest is computed again when its gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"
"""What `torch.compile` compiles with."""


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The layers of `model` that `transformers` can run again; none where its code knows nothing of it."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: Any, again: Callable[[], AbstractContextManager[object]] | None) -> None:
    """From now on training keeps the inputs of decoder layers only. `again`: what must hold while one runs again,
    besides random numbers and autocast, which PyTorch sees to; None where layers are compiled, for then what runs again
    is part of the compiled code."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    settings: dict[str, Any] = {"use_reentrant": False}
    if again is not None:
        settings["context_fn"] = lambda: (nullcontext(), again())
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class Compiled:
    """A model's decoder layers, compiled when they first run, for all lengths of rows."""

    def __init__(self, model: torch.nn.Module):
        self.layers = decoder_layers(model)
        self.calls = [torch.compile(layer._call_impl, dynamic=True, backend=BACKEND) for layer in self.layers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block the layers run compiled; outside, where answers are generated and weights kept, the model
        is as it was."""
        before = [layer._compiled_call_impl for layer in self.layers]
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer, call in zip(self.layers, before, strict=True):
                layer._compiled_call_impl = call
