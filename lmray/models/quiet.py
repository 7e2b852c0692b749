"""Keeps `transformers`' own progress bars and advice out of lmray's output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

# `transformers` imports deepspeed where it is installed, which says on stdout what it looked for unless it is told.
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of `transformers` are shown inside."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
