"""How many ranks train: a number, or a range within which the number follows the GPUs that there are."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema


@dataclass(frozen=True)
class RankCount:
    """A number of ranks, or an elastic range; written 4, or 2:8."""

    least: int = 1
    most: int = 1

    @classmethod
    def parse(cls, value: object) -> "RankCount":
        """Read a number, or a text such as 4 or 2:8.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(value, RankCount):
            return value
        found = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", str(value)) if type(value) in (int, str) else None
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if most < least:
            raise ValueError(f"{value} is no number of training processes, such as 4, and no range, such as 2:8")
        return cls(least, most)

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change while they train."""
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else str(self.most)

    def as_plain(self) -> int | str:
        """Return it as JSON holds it."""
        return str(self) if self.is_elastic else self.most


ONE = RankCount()

SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[1-9]\d*(:[1-9]\d*)?$"}]}

# The type of a config's field.
RankCountField = Annotated[
    RankCount, PlainValidator(RankCount.parse), PlainSerializer(RankCount.as_plain), WithJsonSchema(SCHEMA)
]
