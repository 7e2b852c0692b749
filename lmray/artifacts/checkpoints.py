"""A run's checkpoint folders: committed by a rename, verified when they are taken up again, tidied after a kill.

What lies in the run folder is the only truth: a folder `checkpoint-STEP` that is what its manifest says was committed,
whoever was killed meanwhile. A folder that is not is set aside as `rejected-checkpoint-STEP` until the run is past it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lmray.artifacts.files import MANIFEST, fsync, read_sealed, replace_folder, temporary_beside, write_json
from lmray.errors import ArtifactError, CheckpointError
from lmray.pulse import PULSE

CHECKPOINTS_KEPT = 2
"""Older committed checkpoints of a run are removed."""
REJECTED = "rejected-"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"checkpoint-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders of a run that carry their manifest, oldest first."""
    return [path for path in _folders(folder) if (path / MANIFEST).is_file()]


def _folders(folder: Path) -> list[Path]:
    """With or without a manifest, oldest first. What is being written has another name: these were whole once."""
    return sorted(folder.glob("checkpoint-*"))


def commit(source: Path, folder: Path, step: int) -> None:
    """Makes the finished folder `source` the checkpoint of `step` of the run in `folder`: it is there whole or not at
    all. Raises OSError where it cannot, also where the run folder is gone: making it anew would write below the place
    where a store was mounted."""
    if not folder.is_dir():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    replace_folder(source, folder / checkpoint_name(step))


def staging_for(folder: Path, step: int) -> Path:
    """Where the ranks of the run in `folder` put their parts of the checkpoint of `step`; `tidy` removes what is left
    of it."""
    return temporary_beside(folder / checkpoint_name(step))


def add_part(part: Path, staging: Path, rank: int) -> None:
    """Copies the sealed folder `part` of `rank` into `staging`, its manifest under the rank's name; done again, it
    gives the same. Raises OSError where it cannot, also where the run folder is gone."""
    staging.mkdir(exist_ok=True)
    for source in sorted(path for path in part.rglob("*") if path.is_file()):
        name = source.relative_to(part)
        target = staging / (_part_manifest(rank) if name == Path(MANIFEST) else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        PULSE.beat(f"copying {name}")
        shutil.copyfile(source, target)
        fsync(target)


def commit_parts(staging: Path, folder: Path, step: int, *, num_parts: int) -> None:
    """Makes `staging`, to which every rank has added its part, `num_parts` in all, the checkpoint of `step`; done
    again, it goes on where it failed. Raises OSError where it cannot, also where parts are not seen (yet)."""
    target = folder / checkpoint_name(step)
    if not staging.exists() and (target / MANIFEST).is_file():  # only the last of it failed
        fsync(folder)
        return
    parts = [staging / _part_manifest(rank) for rank in range(num_parts)]
    if not (staging / MANIFEST).is_file():
        manifests = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
        files = [item for one in manifests for item in one["files"].items()]
        assert len(dict(files)) == len(files), "two ranks wrote a file of the same name"
        write_json(staging / MANIFEST, {**manifests[0], "files": dict(sorted(files))})
    for path in parts:
        path.unlink(missing_ok=True)
    for path in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
        fsync(path)
    if target.exists():
        _remove(target)
    os.replace(staging, target)
    fsync(folder)


def _part_manifest(rank: int) -> str:
    return f"part-{rank:05d}.json"


def newest_good(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is what its manifest says, or None where none was ever committed.

    Newer ones that are not, or lost it, are set aside, and `say` hears what is wrong with each. Raises CheckpointError
    where there are checkpoints and none is good; then nothing is moved.
    """
    bad: list[tuple[Path, ArtifactError]] = []
    for path in reversed(_folders(folder)):
        try:
            read_sealed(path)
        except ArtifactError as error:
            bad.append((path, error))
            continue
        for spoilt, error in bad:
            say(f"warning: {error.where}: {error.found}; {spoilt.name} is set aside, going on from {path.name}")
            _remove(folder / (REJECTED + spoilt.name))
            os.replace(spoilt, folder / (REJECTED + spoilt.name))
        return path
    if not bad:
        return None
    _, error = bad[0]
    hint = f"restore it, or remove {folder} to start over"
    raise CheckpointError(error.where, f"{error.found}; no checkpoint of this run is good", hint=hint)


def tidy(folder: Path) -> None:
    """Removes what a killed writer of the run in `folder` left: temporary files, and checkpoints beyond the last
    CHECKPOINTS_KEPT. To be called by the run's only writer."""
    for path in list(folder.rglob(".*.tmp")):
        _remove(path)
    remove_old(folder)


def remove_old(folder: Path) -> None:
    """Removes all but the last CHECKPOINTS_KEPT checkpoints, and what is no good and the run is past."""
    there = committed(folder)
    if not there:
        return
    for path in _folders(folder):
        if path < there[-1] and path not in there[-CHECKPOINTS_KEPT:]:
            _remove(path)
    for path in folder.glob(f"{REJECTED}checkpoint-*"):
        if path.name.removeprefix(REJECTED) <= there[-1].name:
            _remove(path)


def _remove(path: Path) -> None:
    """Folders by another name first: what is left of a removal that is killed is no checkpoint."""
    if path.is_dir():
        aside = path if path.suffix == ".tmp" else temporary_beside(path)
        if aside != path:
            os.replace(path, aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)
