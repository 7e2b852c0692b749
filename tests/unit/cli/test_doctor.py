"""`lmray doctor`."""

from __future__ import annotations

import json

from lmray.cli.doctor import PACKAGES


def test_a_machine_where_all_is_well(cli):
    said = cli("doctor", "--json")
    found = json.loads(said.out)
    names = [check["name"] for check in found["checks"]]
    assert names == ["python", *PACKAGES, "cores", "memory", "gpus", "precision", "cluster", "store", "cache"]
    assert found["ok"] and said.code == 0
    assert "BAD" not in cli("doctor").out


def test_a_store_that_is_a_file_and_a_cluster_that_is_away(cli, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("LMRAY_STORE", str(file))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of the session may be connected
    said = cli("doctor")
    bad = {line.split()[1]: line for line in said.out.splitlines() if line.startswith("BAD")}
    assert said.code == 1 and set(bad) == {"cluster", "store"}
    assert "no cluster answers" in bad["cluster"] and "cannot be written" in bad["store"]
