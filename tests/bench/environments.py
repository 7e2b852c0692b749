"""An environment for each peer: their requirements exclude each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmray.config.places import cache_root

TORCH = "torch==2.13.0"
INSTALLS = {
    "trl": (("trl[peft]==1.16.0",),),
    "llamafactory": (
        ("--no-deps", "llamafactory==0.9.5"),
        (
            "transformers==4.57.6",
            "datasets==4.0.0",
            "accelerate==1.11.0",
            "peft==0.18.1",
            "trl==0.24.0",
            "tyro<0.9",
            *("omegaconf", "fire", "pandas", "scipy", "matplotlib", "einops", "sentencepiece", "tiktoken", "protobuf"),
            *("safetensors", "pyyaml", "pydantic", "packaging", "uvicorn", "fastapi", "sse-starlette", "pillow"),
        ),
    ),
}


def peer_python(name: str) -> Path:
    """The interpreter of peer `name`; installs it the first time."""
    place = cache_root() / "bench" / name
    python = place / "bin" / "python"
    if not (place / "ready").is_file():
        print(f"installing {name} into {place}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        for packages in ((TORCH,), *INSTALLS[name]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (place / "ready").touch()
    return python
