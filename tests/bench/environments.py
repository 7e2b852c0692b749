"""An environment for each peer: their requirements exclude each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmray.artifacts.files import build_once
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
PACKAGES = {"optipfair": "optipfair==0.4.2"}
"""Peers without libraries of their own."""


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


def peer_packages(name: str) -> Path:
    """A folder with peer `name` alone, which runs on the libraries that are here; installs it the first time."""
    place = cache_root() / "bench" / name

    def install(folder: Path) -> None:
        print(f"installing {name} into {place}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, PACKAGES[name]], check=True)

    return build_once(place, install)
