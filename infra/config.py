"""The base of every config that leaves the process: frozen, described, unknown keys refused."""

from pydantic import BaseModel, ConfigDict, JsonValue


class Config(BaseModel):
    """A frozen pydantic model in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, JsonValue]:
        """The config as plain JSON values, in field order; what a digest is made from."""
        return self.model_dump(mode="json")
