"""Keys from a file, and who is let in."""

from __future__ import annotations

import pytest

from lmray.errors import ConfigError
from lmray.serve.keys import ApiKey, check_exposure, find_key, read_keys


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst key\n\n  鍵  \n")
    return path


def test_each_line_is_a_key_and_only_its_hash_is_kept(file):
    keys = read_keys(str(file))
    assert [key.name for key in keys] == ["key-1", "key-2"]
    assert "first" not in repr(keys)
    assert find_key("first key", keys) == keys[0]
    assert find_key("鍵", keys) == keys[1]
    assert not any(find_key(wrong, keys) for wrong in ("", "# ours", "first", keys[0].sha256))


HASH = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
"""Of `foo`, as `printf %s foo | sha256sum` prints it."""


def test_a_yaml_file_holds_hashes_and_what_each_key_may_do(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - {{name: team-a, sha256: {HASH}, models: [helper], requests_per_minute: 3}}\n")
    [key] = read_keys(str(path))
    assert key == ApiKey(name="team-a", sha256=HASH, models=("helper",), requests_per_minute=3)
    assert find_key("foo", (key,)) == key
    assert find_key("bar", (key,)) is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"keys: [{{name: a, sha256: {HASH}, request_per_minute: 3}}]", "did you mean `requests_per_minute`"),
        ("keys: [{name: a, sha256: foo}]", r"keys\.0\.sha256"),
        ("keys: [{name: 'a b', sha256: " + HASH + "}]", r"keys\.0\.name"),
        (f"keys: [{{name: a, sha256: {HASH}, tokens_per_day: 0}}]", r"keys\.0\.tokens_per_day"),
        (f"keys: [{{name: a, sha256: {HASH}}}, {{name: b, sha256: {HASH}}}]", "two keys have the sha256"),
        ("keys: []", "keys"),
    ],
)
def test_a_yaml_file_with_anything_else_is_refused_by_name(tmp_path, content, found):
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=found):
        read_keys(str(path))


def test_without_a_file_no_key_is_asked_for():
    assert read_keys(None) == ()


@pytest.mark.parametrize("content", ["", "# only this\n\n"])
def test_a_file_without_keys_is_refused(file, content):
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(str(file))


def test_a_file_that_cannot_be_read_is_refused(file):
    with pytest.raises(ConfigError, match=r"http\.api_keys_file: .* cannot be read: No such file"):
        read_keys(str(file) + "x")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8"):
        read_keys(str(file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    check_exposure(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_address_needs_a_key(host):
    with pytest.raises(ConfigError, match="is open to other machines and no API key is asked for"):
        check_exposure(host, ())
    check_exposure(host, (ApiKey(name="a", sha256=HASH),))
