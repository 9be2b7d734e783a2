"""The doctor finds what works and what does not, and always says what to do."""

import json

from flows import doctor
from flows.cli import main
from flows.doctor import examine


def test_everything_works_here(prefect_api, tmp_path, monkeypatch, capfd, home):
    monkeypatch.setenv("SFTOK_HOME", str(home))
    monkeypatch.setenv("SFTOK_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        main(["doctor", "--json"])
    except SystemExit as ended:
        code = ended.code
    found = json.loads(capfd.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert (code, found["ok"]) == (0, True)
    assert list(checks) == ["python", "packages", "devices", "home", "store", "prefect", "ray"]
    assert "worked" in checks["ray"]["detail"]
    assert prefect_api in checks["prefect"]["detail"]


def test_what_is_broken_is_said_with_its_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "BELOW", {"fastapi": (0, 1)})
    found = {check.name: check for check in examine(str(tmp_path / "file" / "store"))}
    broken = {name for name, check in found.items() if not check.ok}
    assert broken == {"packages", "store", "prefect", "ray"}
    assert "constraints" in found["packages"].remedy
    assert "PREFECT_API_URL" in found["prefect"].remedy
    assert all(found[name].detail and found[name].remedy for name in broken)
