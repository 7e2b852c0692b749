"""API keys: read from a file, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import ip_address
from pathlib import Path

from lmray.errors import ConfigError


def read_key_hashes(path: str | None) -> tuple[str, ...]:
    """SHA-256 of each key in the file, one a line; blank lines and lines with `#` in front do not count.

    No path: no key is asked for. Raises ConfigError for a file that cannot be read or holds none.
    """
    if path is None:
        return ()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        raise ConfigError("http.api_keys_file", found, hint="write one key a line into it") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError("http.api_keys_file", f"{path} holds no key", hint="write one key a line into it")
    return tuple(_hash(key) for key in keys)


def is_known(key: str, key_hashes: tuple[str, ...]) -> bool:
    """Whether `key` is one of those hashed; takes equally long for every wrong key."""
    given = _hash(key)
    matches = [hmac.compare_digest(given, known) for known in key_hashes]
    return any(matches)


def check_exposure(host: str, key_hashes: tuple[str, ...]) -> None:
    """Raises ConfigError for an address that others can reach while no key is asked for."""
    if not key_hashes and not _is_loopback(host):
        hint = "set `http.api_keys_file` to a file with one key a line"
        raise ConfigError("http.host", f"{host} is open to other machines and no API key is asked for", hint=hint)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
