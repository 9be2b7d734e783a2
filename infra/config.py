"""Define the base class of every config (frozen, described, unknown keys rejected) and types that configs share."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Runtime:
    """Mark a field that says how a computation runs, not what it computes: left out of identities."""


@dataclass(frozen=True, init=False)
class OmittedAt:
    """Mark a field that is left out of identities at these values: digests from before the field existed stay valid."""

    values: tuple[object, ...]

    def __init__(self, *values: object) -> None:
        object.__setattr__(self, "values", values)


RUNTIME = Runtime()


class Config(BaseModel):
    """A frozen pydantic model in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, JsonValue]:
        """Return the config as plain JSON values, in field order."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, JsonValue]:
        """Return the values that decide what is computed, as plain JSON in field order: digests are made from these.

        Fields marked `RUNTIME` are left out, those marked `OmittedAt` at the values named there, at any depth.
        """
        dumped = self.as_json()
        return {
            name: _identity(getattr(self, name), dumped[name])
            for name, field in type(self).model_fields.items()
            if not any(_omits(mark, getattr(self, name)) for mark in field.metadata)
        }


def _identity(value: object, dumped: JsonValue) -> JsonValue:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, tuple) and isinstance(dumped, list):
        return [_identity(item, plain) for item, plain in zip(value, dumped, strict=True)]
    return dumped


def _omits(mark: object, value: object) -> bool:
    return isinstance(mark, Runtime) or (isinstance(mark, OmittedAt) and value in mark.values)
