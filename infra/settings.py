"""Settings from environment variables: where things are kept and which services are used."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field, PositiveFloat, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MOST_GPU_MEMORY = 1e6  # GB
ALL_STAGES = "*"  # key of the timeout that applies to every stage not named


class Settings(BaseSettings):
    """Read from environment variables when constructed; an empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    def __init__(self, **values: Any) -> None:
        """Read and check the settings; an invalid one is reported in one line.

        Raises:
            ValueError: a setting is invalid; names the variable, its value and the remedy.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            text = message if where in message else f"{where} = {problem['input']}: {message[:1].lower()}{message[1:]}"
            raise ValueError(text) from None

    store: str = Field(
        "./store", validation_alias="SFTOK_STORE", description="folder or s3://bucket/prefix that keeps all artifacts"
    )
    home: Path = Field(
        Path("~/.sftok"), validation_alias="SFTOK_HOME", description="local folder of the temporary servers' files"
    )
    s3_retry_seconds: float = Field(
        60.0,
        ge=0,
        validation_alias="SFTOK_S3_PATIENCE",
        description="how long to keep retrying an S3 endpoint that has responded before, in seconds",
    )
    ray_address: str | None = Field(
        None,
        validation_alias=AliasChoices("SFTOK_RAY_ADDRESS", "RAY_ADDRESS"),
        description="Ray cluster to join, as host:port or auto; if unset, a local one is started",
    )
    ray_max_gpus: int = Field(
        0,
        ge=0,
        validation_alias="SFTOK_RAY_MAX_GPUS",
        description="most GPUs that the joined Ray cluster can have; if unset, what its autoscaler says or what it has",
    )
    ray_wait: float = Field(
        900.0,
        ge=0,
        validation_alias="SFTOK_RAY_WAIT",
        description="seconds that training waits for the joined Ray cluster to have room for its processes",
    )
    rank_patience: float = Field(
        120.0,
        gt=0,
        validation_alias="SFTOK_RANK_PATIENCE",
        description="seconds after which a training process that does not respond counts as lost",
    )
    gpu_memory: PositiveFloat | None = Field(
        None,
        le=MOST_GPU_MEMORY,
        validation_alias="SFTOK_GPU_MEMORY",
        description="memory of each GPU, in GB, in which trainings have to fit; if unset, the GPUs are asked",
    )
    prefect_api_url: str | None = Field(
        None,
        validation_alias="PREFECT_API_URL",
        description="Prefect server to report to; if unset, a temporary one is started",
    )
    notify: str | None = Field(
        None,
        validation_alias="SFTOK_NOTIFY",
        description="Prefect block that is notified of failures, as TYPE/NAME: custom-webhook/ops, sendgrid-email/ops",
    )
    stage_timeouts: Annotated[dict[str, PositiveFloat], NoDecode] = Field(
        default_factory=dict,
        validation_alias="SFTOK_STAGE_TIMEOUTS",
        description="seconds per attempt at a stage, as encode=7200,align=86400; a bare 86400 is for all others",
    )

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("notify")
    @classmethod
    def _block(cls, notify: str | None) -> str | None:
        if notify is not None and (notify.count("/") != 1 or not all(notify.split("/"))):
            raise ValueError(f"SFTOK_NOTIFY = {notify}: name a Prefect block as TYPE/NAME, such as custom-webhook/ops")
        return notify

    @field_validator("stage_timeouts", mode="before")
    @classmethod
    def _pairs(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        pairs: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in given.split(","))):
            stage, _, seconds = part.rpartition("=")
            try:
                pairs[stage.strip() or ALL_STAGES] = float(seconds)
            except ValueError:
                raise ValueError(
                    f"SFTOK_STAGE_TIMEOUTS = {given}: {part!r} is not of the form stage=seconds, such as encode=7200"
                ) from None
        return pairs
