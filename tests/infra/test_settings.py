from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.settings import Settings

NAMES = ("SFTOK_STORE", "SFTOK_HOME", "SFTOK_S3_PATIENCE", "SFTOK_RAY_ADDRESS", "RAY_ADDRESS", "PREFECT_API_URL")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_defaults_need_nothing() -> None:
    settings = Settings()
    assert settings.store == "./store"
    assert settings.home == Path.home() / ".sftok"
    assert settings.s3_retry_seconds == 60
    assert settings.ray_address is None
    assert settings.prefect_api_url is None


def test_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTOK_STORE", "s3://bucket/x")
    monkeypatch.setenv("SFTOK_HOME", "home")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    settings = Settings()
    assert settings.store == "s3://bucket/x"
    assert settings.home == tmp_path / "home"
    assert settings.ray_address == "auto"
    assert settings.prefect_api_url == "http://127.0.0.1:4200/api"


def test_own_ray_address_goes_before_ray_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "theirs:1")
    monkeypatch.setenv("SFTOK_RAY_ADDRESS", "ours:1")
    assert Settings().ray_address == "ours:1"


def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
    assert Settings().store == "./store"
    assert Settings().ray_address is None


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().store = "other"  # type: ignore[misc]
