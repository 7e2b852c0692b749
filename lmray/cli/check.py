"""`lmray check`, `show` and `schema`: what a job is, before anything runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lmray.cli.output import AsJson, Overrides, clean_stdout, emit, say, table, yaml_text
from lmray.cli.run import Config


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a job and print its plan. Finds out what can be known before a worker starts."""
    from lmray.config import dump
    from lmray.job import load

    with clean_stdout(as_json):
        job = load(config, *(overrides or ()))
        if job.kind == "train":
            from lmray.train.plan import make_plan

            plan = make_plan(job)
            value, text = plan.to_json(), "\n".join(plan.lines())
        else:
            say(f"a job of kind `{job.kind}` has no plan: it decodes, and this is it")
            value, text = dump(job), yaml_text(dump(job))
    emit(value, text, as_json=as_json)


def show(
    what: Annotated[str, typer.Argument(metavar="CONFIG|FAMILY", help="A job file, or methods, adapters, tasks, ...")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a job, every default written out; or a family. A family: methods, adapters, sharding, tasks, ..."""
    from lmray.config import dump
    from lmray.job import load
    from lmray.registry import FAMILIES

    if what in FAMILIES:
        members = {name: _member(FAMILIES[what].load(name)) for name in FAMILIES[what].names()}
        emit({"family": what, "members": members}, _family_text(members), as_json=as_json)
        return
    tree = dump(load(what, *(overrides or ())))
    emit(tree, yaml_text(tree), as_json=as_json)


def schema(kind: Annotated[str, typer.Argument(metavar="KIND", help="train, evaluate, sweep, serve")]) -> None:
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
