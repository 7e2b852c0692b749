"""Who asks, for those who treat equal visitors equally, and which stage of an adapter was asked for.

Context variables carry them past the layers that have no use for them.
"""

from __future__ import annotations

from contextvars import ContextVar

VISITOR: ContextVar[str] = ContextVar("visitor", default="")
"""Name of the request's key; empty where no key is asked for, whatever clients send."""
STAGE: ContextVar[str] = ContextVar("stage", default="")
"""Of `NAME@STAGE` in the request; empty: whatever version the name stands for, with its share of the next one."""
