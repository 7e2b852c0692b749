"""`lmray check`, `show` and `schema`: what a job is, before anything runs."""

from __future__ import annotations

import json
import sys
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from lmray.cli.output import AsJson, Overrides, clean_stdout, emit, table, yaml_text
from lmray.cli.run import Config

if TYPE_CHECKING:
    from lmray.train.data_facts import Piece


def check(
    config: Config,
    overrides: Overrides = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Training examples to show with their loss mask.")
    ] = 2,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Ask the nodes of the cluster also where RAY_ADDRESS names none.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job and print its plan. Finds out what can be known before a worker starts."""
    from lmray.cli.preflight import CHECKS, wants_cluster
    from lmray.job import load

    with clean_stdout(as_json):
        job = load(config, *(overrides or ()))
        found = CHECKS[job.kind](job, cluster=wants_cluster(cluster), examples=examples)
    emit(found.value, "\n".join(found.lines), as_json=as_json)
    if not as_json:
        _print_examples(found.examples)


def _print_examples(examples: list[list[Piece]]) -> None:
    """What the loss is taken on stands out: in colour on a terminal, elsewhere between « and »."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False, emoji=False)
    coloured = console.color_system is not None and not console.no_color
    for number, pieces in enumerate(examples, start=1):
        how = "in green" if coloured else "between « and »"
        console.print(Text(f"\nexample {number}, the loss is taken on what stands {how}:"))
        text = Text()
        for piece in pieces:
            marked = piece.text if coloured or not piece.supervised else f"«{piece.text}»"
            text.append(marked, style="bold green" if piece.supervised and coloured else "")
        console.print(text)


def show(
    what: Annotated[str, typer.Argument(metavar="CONFIG|FAMILY|models", help="A job file, a family, or models")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a job, every default written out; a family; or the models of the catalogue. A family: methods, adapters,
    sharding, tasks, ..."""
    if what == "models":
        _show_models(as_json)
        return
    from lmray.config import dump
    from lmray.job import load
    from lmray.registry import FAMILIES

    if what in FAMILIES:
        members = {name: _member(FAMILIES[what].load(name)) for name in FAMILIES[what].names()}
        emit({"family": what, "members": members}, _family_text(members), as_json=as_json)
        return
    tree = dump(load(what, *(overrides or ())))
    emit(tree, yaml_text(tree), as_json=as_json)


def _show_models(as_json: bool) -> None:
    """Every model that is found by name alone, with where it comes from and under which licence."""
    from lmray.models.catalogue import CATALOGUE

    head = ("name", "licence", "sha256", "origin", "source")
    rows = [(one.name, one.licence, one.sha256, one.origin, one.source) for one in CATALOGUE.values()]
    models = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    emit({"models": models}, table(head, [(*row[:2], row[2][:16], *row[3:]) for row in rows]), as_json=as_json)


def schema(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="train, evaluate, sweep, serve, generate")],
) -> None:
    """Print the JSON schema of a kind of job. For editors and other programs."""
    from lmray.errors import ConfigError, did_you_mean
    from lmray.job import KINDS

    if kind not in KINDS:
        raise ConfigError(f"kind `{kind}`", "unknown", allowed=", ".join(KINDS), hint=did_you_mean(kind, KINDS))
    body = KINDS[kind].model_json_schema()
    for part in (body, body.get("$defs", {}).get("TrainJob")):
        if part is not None:
            _allow_parent(part)
    print(json.dumps(body, indent=2, ensure_ascii=False))


def _allow_parent(body: dict[str, Any]) -> None:
    """A file may name a parent with `extends:`, which may give the fields that are required."""
    body["properties"]["extends"] = {"type": "string", "description": "A job file this one is laid over."}
    body["anyOf"] = [{"required": ["extends"]}, {"required": body.pop("required", [])}]


def _member(cls: Any) -> dict[str, Any]:
    fields = {}
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        fields[name] = {"type": _type_name(field.annotation), "default": default, "help": field.description or ""}
    return {"help": (cls.__doc__ or "").strip().split("\n")[0], "fields": fields}


def _type_name(annotation: Any) -> str:
    """As a reader of a job file sees it: values and alternatives, without what a value is checked by."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, parts))
    if annotation is NoneType:
        return "None"
    if origin is not None and isinstance(origin, type):
        return f"{origin.__name__}[{', '.join('...' if part is ... else _type_name(part) for part in parts)}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _family_text(members: dict[str, dict[str, Any]]) -> str:
    blocks = []
    for name, member in members.items():
        rows = [
            (f"  {key}", field["type"], field["default"], field["help"].replace("\n", " "))
            for key, field in member["fields"].items()
        ]
        blocks.append(
            f"{name}: {member['help']}" + ("\n" + table(("  field", "type", "default", ""), rows) if rows else "")
        )
    return "\n\n".join(blocks)
