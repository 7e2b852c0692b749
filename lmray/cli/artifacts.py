"""`lmray artifacts`: what is kept, which version has which stage, and taking one out."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmray.cli.output import AsJson, emit, say, table, yaml_text
from lmray.units import human_bytes

if TYPE_CHECKING:
    from lmray.artifacts.artifact import Artifact, Artifacts

app = typer.Typer(help="What is kept: versions, stages, lineage.", no_args_is_help=True)
Ref = Annotated[str, typer.Argument(metavar="ARTIFACT", help="NAME, NAME@STAGE or NAME@VERSION.")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
StoreFolder = Annotated[
    str | None, typer.Option("--store", help="Store folder. Empty: $LMRAY_STORE, else ~/.lmray/store.")
]


def _artifacts(store: str | None) -> Artifacts:
    from lmray.artifacts.artifact import Artifacts
    from lmray.artifacts.store import open_store

    return Artifacts(open_store(store))


@app.command("list")
def list_(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Every version of everything kept, oldest first."""
    kept = _artifacts(store)
    rows = [_facts(artifact, kept.stages(name)) for name in kept.names() for artifact in kept.versions(name)]
    head = ("artifact", "kind", "stages", "base", "size", "created")
    text = table(head, [[row[key] for key in head] for row in rows]) if rows else "nothing is kept yet"
    emit({"artifacts": rows}, text, as_json=as_json)


@app.command()
def show(artifact: Ref, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """One version in full, the stages of its name and their history."""
    from lmray.artifacts.evaluations import Evaluations

    kept = _artifacts(store)
    found = kept.find(artifact)
    value = asdict(found) | {"stages": kept.stages(found.name), "log": kept.log(found.name)}
    if evaluations := [asdict(one) for one in Evaluations(kept.store).of(found.name) if one.version == found.ref]:
        value["evaluations"] = evaluations
    emit(value, yaml_text({**value, "parents": list(found.parents)}), as_json=as_json)


@app.command()
def verify(artifact: Ref, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Read every stored file again and compare it with its digest."""
    kept = _artifacts(store)
    found = kept.find(artifact)
    kept.verify(found)
    files = f"{len(found.files)} files, {human_bytes(found.num_bytes)}"
    emit({"artifact": found.ref, "verified": True}, f"{found.ref}: {files}, all as they were kept", as_json=as_json)


@app.command()
def promote(
    artifact: Ref,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="candidate, staging or production.")],
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Point a stage at a version."""
    found = _artifacts(store).promote(artifact, stage)
    emit({"artifact": found.ref, "stage": stage}, f"{found.name}@{stage} is now {found.ref}", as_json=as_json)


@app.command()
def rollback(
    name: Name,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="candidate, staging or production.")],
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Point a stage at the version it held before its last change."""
    found = _artifacts(store).rollback(name, stage)
    emit({"artifact": found.ref, "stage": stage}, f"{name}@{stage} is {found.ref} again", as_json=as_json)


@app.command()
def export(
    artifact: Ref,
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write; must not exist yet or be empty.")],
    format: Annotated[str, typer.Option(help="hf, gguf: the whole model; peft: the adapter alone.")] = "hf",
    dtype: Annotated[str, typer.Option(help="Of a model's weights: auto (as they are), float32, bfloat16.")] = "auto",
    gguf_type: Annotated[str, typer.Option(help="Of a GGUF's: auto (as they are), f32, f16, bf16, q8_0.")] = "auto",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write an artifact in a form that other programs read."""
    kept = _artifacts(store)
    found = kept.find(artifact)
    from lmray.models.export import export as write

    say(f"writing {found.ref} as {format} to {target}")
    write(kept, found, target, format, dtype=dtype, gguf_type=gguf_type)
    emit({"artifact": found.ref, "folder": str(target), "format": format}, str(target), as_json=as_json)


def _facts(artifact: Artifact, stages: dict[str, str]) -> dict[str, Any]:
    return {
        "artifact": artifact.ref,
        "kind": artifact.kind,
        "stages": ",".join(stage for stage, version in stages.items() if version == artifact.id) or "-",
        "base": artifact.base.get("source", "-"),
        "size": human_bytes(artifact.num_bytes),
        "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(artifact.created)),
        "metrics": dict(artifact.metrics),
    }
