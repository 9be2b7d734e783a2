"""Define the base of every config (frozen, described, unknown keys rejected) and types that configs share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

Precision = Literal["fp32", "bf16", "fp16"]


class Config(BaseModel):
    """A frozen pydantic model in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, JsonValue]:
        """The config as plain JSON values, in field order; what a digest is made from."""
        return self.model_dump(mode="json")
