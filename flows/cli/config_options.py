"""Make options of the command line from the fields of configs: name, choices, bounds, default and help are a field's.

A command takes a whole config as one argument, annotated with `OptionsOf`, and is called with a validated one.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, Literal, NamedTuple, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from flows.cli.exits import Refused
from flows.option_texts import sentence

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from infra.config import Config

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class OptionsOf(NamedTuple):
    """The fields of a config that a command offers: all, or `only` some, but those that it omits."""

    module: str = ""
    """where the config is, if the annotation only names it: imported when the command or its help is asked for."""
    names: Mapping[str, str] = MappingProxyType({})
    """how fields are given, if not as `--field-name`: `--set NAME=VALUE`, or `name` without dashes for an argument."""
    only: Collection[str] = ()
    omit: Collection[str] = ()
    commas: Collection[str] = ()
    """fields of several values that may also be given as one word, with commas or | between them."""

    def flags(self, config: "type[Config]") -> dict[str, str]:
        """Return the option of each field that is offered."""
        assert {*self.names, *self.only, *self.omit, *self.commas} <= set(config.model_fields), config
        names = [name for name in self.only or config.model_fields if name not in self.omit]
        return {name: self.names.get(name, f"--{name.replace('_', '-')}").partition(" ")[0] for name in names}


def config_command(app: typer.Typer, *, epilog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command that takes configs, which are imported when it or its help is asked for, and not to list it."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function, assigned=("__name__", "__doc__"))
        def listed() -> None:
            raise AssertionError("the command's parameters replace it")

        listed.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        app.command(cls=_ConfigCommand, epilog=epilog)(listed)
        return function

    return add


class _ConfigCommand(TyperCommand):
    """A command whose parameters, and the function that takes them, are made when they are first asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.params

    @functools.cached_property
    def params(self) -> list[Any]:  # type: ignore[override]  # it is written to as well
        assert self.callback is not None
        app = typer.Typer(add_completion=False)
        app.command()(with_options(inspect.unwrap(self.callback)))
        made = typer.main.get_command(app)
        self.callback = made.callback
        return made.params


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that takes an option for each field that is offered, and calls `function` with configs."""
    parameters: list[inspect.Parameter] = []
    offers: dict[str, tuple[type[Config], OptionsOf]] = {}
    flags: dict[str, str] = {}
    for parameter in inspect.signature(function).parameters.values():
        config, *marks = get_args(parameter.annotation) or (None,)
        if not marks or not isinstance(asked := marks[0], OptionsOf):
            parameters.append(parameter)
            continue
        if isinstance(config, ForwardRef):
            config = getattr(importlib.import_module(asked.module), config.__forward_arg__)
        offers[parameter.name] = config, asked
        its_flags = asked.flags(config)
        parameters += [_parameter(asked, name, flag, config.model_fields[name]) for name, flag in its_flags.items()]
        flags = {**its_flags, **flags}

    def command(**given: Any) -> None:
        made = {name: _config(config, asked, given) for name, (config, asked) in offers.items()}
        try:
            function(**given, **made)
        except Refused as refused:
            raise Refused(_as_given(str(refused), flags)) from refused

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameter(asked: OptionsOf, name: str, flag: str, field: "FieldInfo") -> inspect.Parameter:
    """Return what typer makes an option or an argument of; values stay words, which the config checks."""
    kind, text = _without_none(field.annotation), field.description or name
    given_as: Any = str
    if kind is bool:
        given_as = bool
    elif get_origin(kind) is tuple and Ellipsis in get_args(kind):
        given_as, text = list[str], f"{text}; repeat it{' or use commas' * (name in asked.commas)} for several"
    elif get_origin(kind) is tuple:
        given_as = tuple.__class_getitem__((str,) * len(get_args(kind)))
    shown: dict[str, Any] = {"help": f"{sentence(text)}  {_notes(field)}".rstrip(), "show_default": False}
    if flag.startswith("--"):
        flags = f"{flag}/--no-{flag[2:]}" if kind is bool and field.default is not False else flag
        metavar = asked.names.get(name, "").partition(" ")[2] or _values(kind)
        info = typer.Option(flags, metavar=metavar, **shown)
    else:
        info = typer.Argument(**shown)
    is_required = field.is_required()
    return inspect.Parameter(
        _variable(flag),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[given_as if is_required else given_as | None, info],
    )


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    return kind


def _values(kind: Any) -> str:
    """Return how the values of a type are shown: <int>, <float> <float>, <auto|cpu|cuda>."""
    if get_origin(kind) is tuple:
        return " ".join(_values(one) for one in get_args(kind) if one is not Ellipsis)
    return f"<{'|'.join(map(str, get_args(kind))) if get_origin(kind) is Literal else kind.__name__}>"


def _notes(field: "FieldInfo") -> str:
    """Return default and bounds; no default that stands for something else, of which the description tells."""
    usual = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    is_told = field.is_required() or field.default is False or usual in ("", "None")
    notes = [] if is_told else [f"default: {usual}"]
    notes += [
        f"x{SIGNS[sign]}{getattr(mark, sign)}" for mark in field.metadata for sign in SIGNS if hasattr(mark, sign)
    ]
    return f"[{'; '.join(notes)}]" * bool(notes)


def _variable(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _config(config: "type[Config]", asked: OptionsOf, given: dict[str, Any]) -> "Config":
    """Take a config's options out of those that are given, and make it.

    Raises:
        Refused: one line that names each option, as it is given, whose value does not fit.
    """
    from pydantic import ValidationError

    flags = asked.flags(config)
    values = {name: value for name, flag in flags.items() if (value := given.pop(_variable(flag))) is not None}
    for name in values.keys() & asked.commas:
        values[name] = [word.strip() for word in re.split(r"[,|]", ",".join(values[name])) if word.strip()]
    try:
        return config(**values)
    except ValidationError as refused:
        raise Refused("; ".join(_refusal(problem, flags) for problem in refused.errors())) from refused


def _refusal(problem: Any, flags: Mapping[str, str]) -> str:
    said = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # of the whole config: it names the field itself
        return _as_given(said, flags)
    value = "" if problem["type"] == "value_error" else f" {problem['input']}"
    return f"{flags[str(problem['loc'][0])]}{value}: {said[:1].lower()}{said[1:]}"


def _as_given(message: str, flags: Mapping[str, str]) -> str:
    """Name the option where a message begins with the field: `top_k = 5 ...`."""
    return re.sub(r"^\w+(?= = )", lambda found: flags.get(found[0], found[0]), message)
