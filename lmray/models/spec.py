"""What a job says of its model."""

from __future__ import annotations

from typing import Literal

from lmray.config import Config
from lmray.models.rope import RopeScaling


class ModelSpec(Config):
    source: str
    """A catalogue name, a folder, a `.gguf` file, `pypi:PACKAGE[==VERSION][/PATH IN THE WHEEL]`, a Hub id, or
    `artifact:NAME[@STAGE|@VERSION]`: a whole model of the job's store, or an adapter of it merged into its base."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; must stay empty for the other sources."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 where the device computes it in hardware, else float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """Keep the frozen weights of linear layers in 4 or 8 bits (QLoRA), for training and measuring. What is trained is
    not quantised; an export merges it into the weights as they were."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """How training steps are computed: as `transformers` and `peft` do it, or by fused functions. `auto`: fused where
    they fit the device, the architecture and the adapter."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """How training steps compute attention, by the names of `transformers`. `auto`: as it chooses for the
    architecture; fused kernels compute their own."""
    rope_scaling: RopeScaling | None = None
    """Positions beyond those the model was trained with. Empty: its own."""
    trust_remote_code: bool = False
    """Run the Python code that lies beside the weights, on every worker, as the user who runs the job."""
