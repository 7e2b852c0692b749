"""Keys from a file, and who is let in."""

from __future__ import annotations

import pytest

from lmray.errors import ConfigError
from lmray.serve.keys import check_exposure, is_known, read_key_hashes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst key\n\n  鍵  \n")
    return path


def test_each_line_is_a_key_and_only_its_hash_is_kept(file):
    hashes = read_key_hashes(str(file))
    assert len(hashes) == 2
    assert not any("key" in one for one in hashes)
    assert is_known("first key", hashes)
    assert is_known("鍵", hashes)
    assert not any(is_known(wrong, hashes) for wrong in ("", "# ours", "first", hashes[0]))


def test_without_a_file_no_key_is_asked_for():
    assert read_key_hashes(None) == ()


@pytest.mark.parametrize("content", ["", "# only this\n\n"])
def test_a_file_without_keys_is_refused(file, content):
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no key"):
        read_key_hashes(str(file))


def test_a_file_that_cannot_be_read_is_refused(file):
    with pytest.raises(ConfigError, match=r"http\.api_keys_file: .* cannot be read: No such file"):
        read_key_hashes(str(file) + "x")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8"):
        read_key_hashes(str(file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    check_exposure(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_address_needs_a_key(host):
    with pytest.raises(ConfigError, match="is open to other machines and no API key is asked for"):
        check_exposure(host, ())
    check_exposure(host, ("a hash",))
