"""Load a recipe from its name or TOML file with the user's overrides, and write a recipe as TOML."""

import difflib
import inspect
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flows.recipes.registry import RECIPES
from flows.recipes.schema import Recipe
from infra.training.config import TrainingConfig, or_list

Section = dict[str, Any]
SHOWN = 3  # problems of a recipe named at once


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
        raise ValueError(f"{where}: {_problems(error, settings)}") from None


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with `section.field=value` overrides.

    Raises:
        ValueError: a setting does not fit.
    """
    settings = recipe.model_dump(mode="json")
    for override in overrides:
        _apply(settings, override)
    return Recipe.model_validate(settings)


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


def _problems(error: ValidationError, settings: Section) -> str:
    """Describe the first problems in one line, by the names that a recipe has."""
    problems = list(dict.fromkeys(_told(problem, settings) for problem in error.errors(include_url=False)))
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _told(problem: Mapping[str, Any], settings: Section) -> str:
    where = ".".join(_written(problem["loc"], settings))
    if problem["type"] == "extra_forbidden":
        *sections, field = problem["loc"]
        return f"{where}: unknown field{_did_you_mean(str(field), _fields_at(sections))}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] == "value_error":  # from our validators, which name field and value themselves
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    if problem["type"] == "union_tag_invalid":
        return f"{where}.kind = {problem['ctx']['tag']!r}: give {problem['ctx']['expected_tags'].replace(', ', ' or ')}"
    if problem["type"] == "union_tag_not_found":
        return f"{where} = {_short(problem['input'])}: give a section with a kind, {where}.kind"
    return f"{where} = {_short(problem['input'])}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _written(place: Sequence[int | str], settings: Section) -> Iterator[str]:
    """Yield the parts of a place that are written in a recipe; others say which kind of section was tried."""
    here: Any = settings
    for at, part in enumerate(place):
        if isinstance(here, dict) and part not in here and at + 1 < len(place):
            continue
        yield str(part)
        is_there = isinstance(here, list) or (isinstance(here, dict) and part in here)
        here = here[part] if is_there else None


def _fields_at(place: Sequence[int | str]) -> set[str]:
    """Return the names of the fields of the section at a place."""
    models: list[type[BaseModel]] = [Recipe]
    for part in place:
        fields = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        of_kind = [model for model in models if (kind := model.model_fields.get("kind")) and kind.default == part]
        models = [inner for field in fields for inner in _models_in(field.annotation)] if fields else of_kind
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the models that a field can hold."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


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
    if isinstance(model, TrainingConfig):
        yield from (f"# {line}" for line in textwrap.wrap(_ranks_of(model), 110))
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


def _ranks_of(training: TrainingConfig) -> str:
    """Say how many ranks a training allows, and why."""
    count = training.micro_batches
    steps = f"{count} micro-batch{'es' if count > 1 else ''} a step, which ranks share equally"
    return f"{steps}: --ranks {or_list(training.rank_counts)}"


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
