"""API keys: read from a file, known by their hash alone, compared in constant time.

A text file holds a key a line; each may do everything. A YAML file holds hashes, with what each key may do:

    keys:
      - {name: team-a, sha256: 9f86d0..., models: [function-calls], requests_per_minute: 60, tokens_per_day: 100000}
"""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lmray.config import Config, decode, read_document
from lmray.errors import ConfigError

Limit = Annotated[int, Field(ge=1)] | None


class ApiKey(Config):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    """What logs and metrics call it; the key itself is in neither."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, in hexadecimal."""
    models: tuple[str, ...] = ()
    """Models and adapters it may ask, by name. Empty: all."""
    requests_per_minute: Limit = None
    max_concurrent_requests: Limit = None
    tokens_per_minute: Limit = None
    """Tokens of prompts and answers. A prompt for which not enough is left is refused; what runs when they are used up
    is answered to its end."""
    tokens_per_day: Limit = None
    metrics: bool = False
    """Whether it may read `/metrics`, which tells of all keys."""

    def may_ask(self, name: str) -> bool:
        """Whether it may ask the model or adapter `name`, in whatever version (`NAME@VERSION`)."""
        return not self.models or name.partition("@")[0] in self.models


class KeyFile(Config):
    keys: Annotated[tuple[ApiKey, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self):
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"two keys have the {field} `{twice}`")
        return self


def read_keys(path: str | None, *, field: str = "http.api_keys_file") -> tuple[ApiKey, ...]:
    """The keys in a file: YAML (`.yaml`, `.yml`, `.json`), else text with a key a line, where blank lines and lines
    with `#` in front do not count.

    No path: no key is asked for. Raises ConfigError for a file that cannot be read or holds none, `field` being the
    job's that names it.
    """
    if path is None:
        return ()
    file = Path(path).expanduser()
    if file.suffix in (".yaml", ".yml", ".json"):
        return decode(KeyFile, read_document(file)).keys
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        raise ConfigError(field, found, hint="write one key a line into it") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise ConfigError(field, f"{path} holds no key", hint="write one key a line into it")
    return tuple(ApiKey(name=f"key-{place}", sha256=_hash(key), metrics=True) for place, key in enumerate(found, 1))


def find_key(given: str, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    """The one of `keys` that `given` is; takes equally long for every wrong key."""
    hashed = _hash(given)
    matches = [key for key in keys if hmac.compare_digest(hashed, key.sha256)]
    return matches[0] if matches else None


def check_exposure(host: str, keys: tuple[ApiKey, ...]) -> None:
    """Raises ConfigError for an address that others can reach while no key is asked for."""
    if not keys and not _is_loopback(host):
        hint = "set `http.api_keys_file` to a file with one key a line"
        raise ConfigError("http.host", f"{host} is open to other machines and no API key is asked for", hint=hint)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
