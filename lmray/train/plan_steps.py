"""What the plan decides of training steps: attention, loss, and what of it goes together."""

from __future__ import annotations

from lmray.errors import ConfigError
from lmray.job import TrainArgs, TrainJob
from lmray.models.shape import ModelShape

GPU_ATTENTION = {
    "flash_attention_2": "its kernels are a GPU's",
    "flex_attention": "PyTorch takes its gradient on GPUs only",
}
"""Why an attention cannot train on a CPU."""


def attention_asked(name: str, device: str) -> str | None:
    """The attention a model is to be made with; None leaves it to `transformers`. Raises ConfigError for one that
    cannot train on `device`."""
    if device == "cpu" and name in GPU_ATTENTION:
        found = f"`{name}` cannot train on a CPU: {GPU_ATTENTION[name]}"
        raise ConfigError("model.attn_implementation", found, allowed="auto, eager, sdpa")
    return None if name == "auto" else name


def check_layers(args: TrainArgs, shape: ModelShape) -> None:
    """Raises ConfigError where decoder layers are to be run again or compiled, and the model's code has none that
    can."""
    for name in ("gradient_checkpointing", "torch_compile"):
        if getattr(args, name) and not shape.layers_again:
            found = f"`{name}` needs decoder layers as `transformers` builds them, and this model has none"
            raise ConfigError(f"train.{name}", found, hint="leave it out")


def fused_conflict(job: TrainJob) -> str | None:
    """Why fused kernels and what the job says of its steps do not go together, or None."""
    if job.model.attn_implementation != "auto":
        return f"attention is to be computed by `{job.model.attn_implementation}`"
    return "`torch_compile` compiles the model's own layers" if job.train.torch_compile else None


def step_reasons(job: TrainJob, shape: ModelShape) -> dict[str, str]:
    """Why attention and loss are computed as they are."""
    chosen = "what `transformers` takes for the architecture"
    chunks = "chunk by chunk: nothing follows the output head"
    return {
        "attention": chosen if job.model.attn_implementation == "auto" else "as the job says",
        "loss": chunks if shape.plain_head else "from all logits at once: something follows or adapts the head",
    }
