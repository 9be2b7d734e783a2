"""What the environment decides: where things are kept and which services are used."""

from pathlib import Path

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read from environment variables when constructed; an empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    store: str = Field(
        "./store", validation_alias="SFTOK_STORE", description="folder or s3://bucket/prefix that keeps all artifacts"
    )
    home: Path = Field(
        Path("~/.sftok"), validation_alias="SFTOK_HOME", description="local folder of the temporary servers' files"
    )
    ray_address: str | None = Field(
        None,
        validation_alias=AliasChoices("SFTOK_RAY_ADDRESS", "RAY_ADDRESS"),
        description="Ray cluster to join, as host:port or auto; without it a local one is started",
    )
    prefect_api_url: str | None = Field(
        None,
        validation_alias="PREFECT_API_URL",
        description="Prefect server to report to; without it a temporary one is started",
    )

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()
