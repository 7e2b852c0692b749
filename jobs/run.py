"""Runs a job: what `ray job submit --working-dir . -- python jobs/run.py CONFIG [a.b=c ...]` starts. As `lmray run`."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [ROOT, os.environ.get("PYTHONPATH")])
)  # for a local Ray's workers

from lmray.cli import main  # noqa: E402  # found through the line above where lmray is not installed

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
