"""The frozen base of every config object, and the annotation that lets a field name a member of a family."""

from __future__ import annotations

import re
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator, model_serializer
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from lmray.errors import ConfigError
from lmray.registry import Family


class Config(BaseModel):
    """Frozen, refuses unknown keys; the string under a field is its documentation and its JSON schema description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """To Python `true` is 1; to people it is not."""
        types = set(_types(cls.model_fields[info.field_name or ""].annotation))
        if {int, float} & types and not {bool, Any} & types and _has_bool(value):
            raise PydanticKnownError("float_type" if float in types else "int_type")
        return value


def _types(annotation: Any) -> Iterator[Any]:
    """What `annotation` is made of; of literals, their types."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        yield from map(type, inner)
    elif inner:
        for one in inner:
            yield from _types(one)
    else:
        yield annotation


def _has_bool(value: Any) -> bool:
    return any(map(_has_bool, value)) if isinstance(value, (list, tuple)) else isinstance(value, bool)


class MemberConfig(Config):
    """Base of a family's members: the config is the object. Its `name` is its file's name and needs no field."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @model_serializer(mode="wrap")
    def _with_name(self, handler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


class Member:
    """Annotation: the field holds a member of `family`, written `{name: MEMBER, ...}` or just `MEMBER`.

    A mapping without `name` means `default`, where one is given.
    """

    def __init__(self, family: Family, *, default: str | None = None):
        self.family, self.default = family, default

    def __get_pydantic_core_schema__(self, source: type, handler):
        return core_schema.no_info_plain_validator_function(
            lambda value: self.decode(value, source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda member: member.model_dump(mode="json"), when_used="always"
            ),
        )

    def __get_pydantic_json_schema__(self, schema, handler) -> dict[str, Any]:
        options = []
        for name in self.family.names():
            body = handler.resolve_ref_schema(handler(self.family.load(name).__pydantic_core_schema__))
            properties = {"name": {"const": name}, **body.get("properties", {})}
            required = [*body.get("required", []), *([] if name == self.default else ["name"])]
            options.append({**body, "properties": properties, "required": required})
        return {"oneOf": [*options, {"enum": list(self.family.names())}]}

    def member_class(self, value: Any) -> type[MemberConfig] | None:
        """The class that `value` names, or None when it names none."""
        name = (
            value if isinstance(value, str) else value.get("name", self.default) if isinstance(value, Mapping) else None
        )
        return self.family.load(name) if name in self.family.names() else None

    def decode(self, value: Any, base: type = MemberConfig) -> MemberConfig:
        """The member that `value` describes. A member made in Python passes where it is a `base`."""
        if isinstance(value, MemberConfig) and isinstance(value, base):
            return value
        if isinstance(value, str):
            value = {"name": value}
        context = {"word": self.family.word, "allowed": ", ".join(self.family.names())}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("member", "names no {word}: neither a name nor a mapping with `name`", context)
        fields = dict(value)
        name = fields.pop("name", self.default)
        if name is None:
            raise PydanticCustomError("member", "names no {word}", context)
        try:
            cls = self.family.load(str(name))
        except ConfigError as error:
            raise PydanticCustomError(
                "member", "{found}", {**context, "found": error.found, "hint": error.hint}
            ) from None
        return cls.model_validate(fields)


_NAME = re.compile(r"\w[\w.\-]{0,63}")


def checked_name(value: str) -> str:
    """`value` in normal form (NFC). Raises PydanticCustomError for what is no name."""
    value = unicodedata.normalize("NFC", value)
    if not _NAME.fullmatch(value):
        raise PydanticCustomError(
            "name",
            "not a name",
            {"allowed": "1 to 64 letters (of any script), digits, `.`, `_`, `-`, the first a letter or digit; no `/`"},
        )
    return value


def is_name(value: str) -> bool:
    """Whether `value` is a name as it stands."""
    return unicodedata.is_normalized("NFC", value) and _NAME.fullmatch(value) is not None


Name = Annotated[str, AfterValidator(checked_name)]
"""A name of a job, artifact or adapter: becomes part of a path, so it holds no separator and starts with no dot."""
