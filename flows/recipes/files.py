"""Load a recipe from its name or TOML file with the user's overrides, and write a recipe as TOML."""

import difflib
import inspect
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe

Section = dict[str, Any]


def load_recipe(name: str, *, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Load the recipe called `name`, or the TOML file `name`, with `section.field=value` overrides.

    Raises:
        ValueError: one line that names the problem and, if it can be guessed, what was meant.
    """
    if name.endswith(".toml") or "/" in name:
        where, settings = f"recipe file {name}", _read(Path(name))
    else:
        where, settings = f"recipe {name}", _named(name)
    for override in overrides:
        _apply(settings, override)
    if seed is not None:
        settings["seed"] = seed
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(_problems(error))}") from None


def _named(name: str) -> Section:
    if name not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        raise ValueError(f"unknown recipe {name!r}{_did_you_mean(name, RECIPES)}; known: {known}, or a .toml file")
    return RECIPES[name]().model_dump(mode="json")


def _read(path: Path) -> Section:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"recipe file {path} does not exist; `sftok recipes NAME --toml` prints one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"recipe file {path} cannot be read: {error}") from None


def _apply(settings: Section, override: str) -> None:
    """Set one `section.field=value` in place; unknown fields are left for the model to reject."""
    path, equals, text = override.partition("=")
    *sections, field = path.strip().split(".")
    if not equals or not field or not all(sections):
        raise ValueError(f"--set {override}: write section.field=value, such as --set teacher.training.steps=100")
    here = settings
    for depth, section in enumerate(sections, 1):
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: {'.'.join(sections[:depth])} is a value, not a section")
        here = inner
    here[field] = _parse(text.strip())


def _parse(text: str) -> Any:
    """Parse a TOML value (1e-3, true, [1, 2]); anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# --- errors ----------------------------------------------------------------------------------------------------------


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        *sections, field = problem["loc"] or ("",)
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            model = _model_at(sections)
            yield f"{where}: unknown field{_did_you_mean(str(field), model.model_fields if model else ())}"
        elif problem["type"] == "missing":
            yield f"{where}: missing"
        elif problem["type"] == "value_error":  # from our validators, which name field and value themselves
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{where}: {message}" if where else message
        else:
            yield f"{where} = {_short(problem['input'])}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _model_at(sections: Sequence[int | str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Recipe
    for section in sections:
        field = model.model_fields.get(str(section)) if model else None
        model = _section_model(field) if field else None
    return model


def _section_model(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 60, placeholder="…")


# --- TOML ------------------------------------------------------------------------------------------------------------


def to_toml(recipe: Recipe) -> str:
    """Write a full TOML file with each field's description as a comment; it loads back into an equal recipe."""
    about = inspect.getdoc(RECIPES[recipe.name]) if recipe.name in RECIPES else None
    head = [f"# {line}".rstrip() for line in (about or "A recipe.").splitlines()]
    return "\n".join([*head, "", *_table(recipe, ())]) + "\n"


def _table(model: BaseModel, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of one table: values first, since a value after a sub-table would belong to that."""
    values = model.model_dump(mode="json")
    sections = []
    for name, field in type(model).model_fields.items():
        inner = getattr(model, name)
        if isinstance(inner, BaseModel):
            sections.append((name, inner))
        elif values.get(name) is None:  # or excluded: nothing uses it
            yield f"# {name} is not set{': ' if field.description else ''}{field.description or ''}"
        else:
            yield from _commented(name, values[name], field)
    for name, inner in sections:
        about = (inspect.getdoc(type(inner)) or "").splitlines()
        yield from ("", f"# {about[0]}" if about else "#", f"[{'.'.join((*path, name))}]")
        yield from _table(inner, (*path, name))


def _commented(name: str, value: object, field: FieldInfo) -> Iterator[str]:
    notes = [field.description] if field.description else []
    if typing.get_origin(field.annotation) is Literal:
        notes.append("one of " + ", ".join(repr(choice) for choice in typing.get_args(field.annotation)))
    line = f"{name} = {_toml(value)}"
    if notes:
        yield from textwrap.wrap("; ".join(notes), 110, initial_indent="# ", subsequent_indent="#   ")
    yield line


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()
