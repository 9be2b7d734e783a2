"""The doctor finds what works and what does not, and always says what to do."""

import json

import pytest
import torch

from flows.cli.main import main
from flows.requests import doctor
from flows.requests.doctor import examine
from infra.compute import precision
from infra.settings import Settings


def test_everything_works_here(prefect_api, tmp_path, monkeypatch, capfd, home):
    monkeypatch.setenv("SFTOK_HOME", str(home))
    monkeypatch.setenv("SFTOK_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert len(str(tmp_path)) > 45, "a path that is too long for Ray's sockets"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        main(["doctor", "--json"])
    except SystemExit as ended:
        code = ended.code
    found = json.loads(capfd.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert [name for name, check in checks.items() if not check["ok"]] == []
    assert (code, found["ok"]) == (0, True)
    assert list(checks) == ["python", "packages", "devices", "precisions", "home", "store", "prefect", "ray"]
    assert "fp32" in checks["precisions"]["detail"]
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


def test_variable_that_prefect_cannot_read_is_named(monkeypatch, tmp_path):
    """Guards against the advice to install everything again."""
    monkeypatch.setenv("SFTOK_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("HTTP_PROXY", ":::")
    found = doctor._tried("prefect", lambda: doctor._prefect(Settings()))
    assert found.detail.startswith("HTTP_PROXY = :::: ")
    assert found.remedy == "write http://host:port, or unset it"


@pytest.mark.parametrize(
    ("bf16", "said"),
    [
        (0.058, "bf16 0.058, fp16 0.03: fp32 is faster than bf16 and fp16"),
        (4.2, "bf16 4.2, fp16 0.03: fp32 is faster than fp16"),
    ],
)
def test_precisions_that_this_processor_is_slow_in_are_named(bf16, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "precision_ratio", {"bf16": bf16, "fp16": 0.03}.__getitem__)
    found = doctor._precisions()
    assert found.startswith("products beside fp32, times as fast, on this CPU (")
    assert found.endswith(said)


@pytest.mark.parametrize(
    ("capability", "said"),
    [((9, 0), "bf16 and fp16 are faster than fp32"), ((7, 5), "Tesla T4 has no bf16 instructions: fp32 is faster")],
)
def test_precisions_of_a_gpu(capability, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert doctor._precisions() == said
