"""Express a recipe as overrides of another one."""

import json
from collections.abc import Iterator

from pydantic import JsonValue

from flows.recipes.schema import Recipe


def changes_of(recipe: Recipe, base: Recipe) -> tuple[str, ...] | None:
    """Return the `section.field=value` overrides that turn `base` into `recipe`; None if there are none that do."""
    found = tuple(_changes("", base.model_dump(mode="json"), recipe.model_dump(mode="json")))
    return None if None in found else tuple(one for one in found if one is not None)


def _changes(path: str, old: JsonValue, new: JsonValue) -> Iterator[str | None]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:
            yield from _changes(f"{path}.{name}" if path else name, old.get(name), new[name])
    elif old != new:
        # JSON's words are TOML's, but TOML has none for nothing.
        yield None if new is None or isinstance(new, dict) else f"{path}={json.dumps(new, ensure_ascii=False)}"
