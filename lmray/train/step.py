"""What training steps do to the model besides forward and backward: layers that run again, or compiled; noise."""

from __future__ import annotations

from functools import partial

import torch

from lmray.job import TrainArgs
from lmray.models.fused import Fused
from lmray.models.layers import Compiled, checkpoint_layers
from lmray.models.noise import noisy_embeddings
from lmray.models.precision import computing
from lmray.train.learner import Around


def layers_and_noise(args: TrainArgs, model: torch.nn.Module, fused: Fused | None) -> list[Around]:
    """Prepares the placed `model`; returns what is to hold around each micro-batch's loss."""
    around: list[Around] = []
    if args.torch_compile:
        compiled = Compiled(model)
        around.append(lambda _: compiled.running())
    if (alpha := args.neftune_noise_alpha) is not None:
        around.append(lambda batch: noisy_embeddings(model, alpha, batch.example_lengths))
    if args.gradient_checkpointing:
        again = fused.again if fused else partial(computing, model)
        checkpoint_layers(model, None if args.torch_compile else again)
    return around
