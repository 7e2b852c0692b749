"""Where lmray keeps things on this machine: the only environment variables it reads besides Ray's own."""

from __future__ import annotations

import os
from pathlib import Path


def store_root() -> Path:
    """`$LMRAY_STORE`, else `~/.lmray/store`: runs and artifacts."""
    return Path(os.environ.get("LMRAY_STORE") or Path.home() / ".lmray" / "store").expanduser().absolute()


def cache_root() -> Path:
    """`$LMRAY_CACHE`, else `$XDG_CACHE_HOME/lmray`, else `~/.cache/lmray`: what can be made again."""
    cache = os.environ.get("LMRAY_CACHE")
    if cache:
        return Path(cache).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "lmray"
