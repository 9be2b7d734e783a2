"""Options are the fields of configs: a field that is added is an option, and nothing of it is stated again."""

import subprocess
import sys
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from flows.cli.config_options import OptionsOf, config_command
from flows.cli.exits import Refused
from flows.cli.main import app
from flows.cli.options import DeviceOption
from flows.option_texts import sentence
from flows.recipes.schema import EncodeConfig
from flows.runs.run_request import RunArguments
from flows.service.parameters import ServeOptions
from generator.config import SampleConfig
from infra.compute.device import DeviceChoice
from infra.config import Config
from sftok.config import DecodingConfig

COMMANDS = typer.main.get_command(app)


class Toy(Config):
    """Every kind of field."""

    count: PositiveInt = Field(3, description="how many")
    share: float = Field(0.5, gt=0, le=1, description="which part")
    kind: Literal["plain", "fancy"] = Field("plain", description="which sort")
    views: tuple[str, ...] = Field(("center",), description="views")
    pair: tuple[float, float] | None = Field(None, description="two numbers; not given: none")
    compile: bool | None = Field(None, description="compile it; not given: as it pays")
    dry: bool = Field(False, description="do nothing")
    flip: bool = Field(True, description="mirror it")
    shard: NonNegativeInt = Field(4, description="rows per shard")

    @model_validator(mode="after")
    def _few_are_plain(self) -> "Toy":
        if self.count > 9 and self.kind == "plain":
            raise ValueError(f"count = {self.count} is too many for plain ones: give at most 9")
        return self


class Grown(Toy):
    """A config that got another field."""

    late_field: int = Field(7, ge=0, description="added later")


def command_of(config: type[Config], **asked: Any) -> Any:
    """A command that takes the config, and ends with it."""

    def toy(*, word: str = "w", made: Annotated[config, OptionsOf(**asked)]) -> None:  # type: ignore[valid-type]
        if word == "refused":
            raise Refused("count = 3 has no effect: leave it out")
        raise StopIteration(word, made)

    line = typer.Typer(add_completion=False)
    config_command(line, epilog="")(toy)
    return typer.main.get_command(line)


def result(command: Any, *arguments: str) -> Any:
    with pytest.raises(StopIteration) as ended:
        command.main(list(arguments), standalone_mode=False)
    return ended.value.args


def shown(command: Any) -> dict[str, tuple[str, str]]:
    """What the help says of each option or argument: its values and its text."""
    context = typer.Context(command)
    records = {one.opts[0]: one.get_help_record(context) for one in command.get_params(context)}
    return {name: record for name, record in records.items() if record is not None and name != "--help"}


def test_a_field_that_is_added_is_an_option() -> None:
    before, after = shown(command_of(Toy)), shown(command_of(Grown))
    assert list(after) == [*before, "--late-field"]
    assert after["--late-field"] == ("--late-field <int>", "Added later.  [default: 7; x>=0]")
    assert result(command_of(Grown), "--late-field", "9")[1].late_field == 9


def test_the_help_is_the_fields_own() -> None:
    assert list(shown(command_of(Toy)).values())[1:] == [
        ("--count <int>", "How many.  [default: 3; x>0]"),
        ("--share <float>", "Which part.  [default: 0.5; x>0; x<=1]"),
        ("--kind <plain|fancy>", "Which sort.  [default: plain]"),
        ("--views <str>", "Views; repeat it for several.  [default: center]"),
        ("--pair <float> <float>", "Two numbers; not given: none."),
        ("--compile / --no-compile", "Compile it; not given: as it pays."),
        ("--dry", "Do nothing."),
        ("--flip / --no-flip", "Mirror it.  [default: True]"),
        ("--shard <int>", "Rows per shard.  [default: 4; x>=0]"),
    ]


def test_fields_are_left_out_renamed_and_made_arguments() -> None:
    names = {"count": "count", "views": "--view NAME"}
    command = command_of(Toy, names=names, only=("count", "views", "dry", "shard"), omit=("shard",), commas=("views",))
    assert list(shown(command)) == ["--word", "count", "--view", "--dry"]
    assert shown(command)["--view"][0] == "--view NAME"
    assert result(command, "5", "--view", "a, b|c", "--view", "d")[1] == Toy(count=5, views=("a", "b", "c", "d"))
    with pytest.raises(AssertionError, match="Toy"):
        shown(command_of(Toy, omit=("no_such_field",)))


def test_the_command_gets_one_config() -> None:
    assert result(command_of(Toy)) == ("w", Toy())
    given = ["--count", "2", "--share", "1", "--kind", "fancy", "--views", "a,b", "--views", "c", "--pair", "-1", "2"]
    word, made = result(command_of(Toy), "--word", "v", *given, "--no-compile", "--dry", "--no-flip")
    assert word == "v"
    assert made == Toy(
        count=2, share=1, kind="fancy", views=("a,b", "c"), pair=(-1, 2), compile=False, dry=True, flip=False
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--share", "0"], "--share 0: input should be greater than 0"),
        (["--kind", "odd"], "--kind odd: input should be 'plain' or 'fancy'"),
        (["--pair", "1", "x"], "--pair x: input should be a valid number, unable to parse string as a number"),
        (["--count", "10"], "--count = 10 is too many for plain ones: give at most 9"),
        (["--word", "refused"], "--count = 3 has no effect: leave it out"),
        (["--count", "x", "--shard", "-1"], "--count x: input should be a valid integer, unable to parse string as an "
         "integer; --shard -1: input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_an_error_names_the_option_and_its_value(given: list[str], said: str) -> None:
    with pytest.raises(Refused) as refused:
        command_of(Toy).main(given, standalone_mode=False)
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("command", "config", "names", "omitted"),
    [
        ("sample", SampleConfig, {}, {"samples_per_shard"}),
        ("sample", DecodingConfig, {"num_steps": "--decode-steps"}, {"temperature", "precision"}),
        ("encode", EncodeConfig, {}, set()),
        ("reconstruct", DecodingConfig, {"num_steps": "--steps"}, {"precision"}),
        ("run", RunArguments, {"recipe": "recipe", "overrides": "--set"}, set()),
        ("serve", ServeOptions, {"recipes": "--recipe", "overrides": "--set"}, set()),
    ],
)
def test_commands_offer_their_configs(
    command: str, config: type[Config], names: dict[str, str], omitted: set[str]
) -> None:
    """Guards against a default, a choice or a description that the command line states on its own."""
    options = shown(COMMANDS.commands[command])  # type: ignore[attr-defined]
    for name, field in config.model_fields.items():
        if name in omitted:
            continue
        values, text = options[names.get(name, f"--{name.replace('_', '-')}")]
        assert text.startswith(sentence(field.description or "")[:-1])
        if not field.is_required() and field.default not in (None, False, (), ""):
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            assert f"[default: {', '.join(map(str, default))}" in text
        for choice in get_args(field.annotation) if isinstance(field.default, str) else ():
            assert choice in values
    if command == "sample":
        assert "--samples-per-shard" not in options


def test_devices_are_those_of_configs() -> None:
    assert get_args(get_args(get_args(DeviceOption)[0])[0]) == get_args(DeviceChoice)


def test_no_help_loads_what_is_heavy() -> None:
    """Guards against a config whose module imports what takes seconds."""
    script = "import sys\nfrom flows.cli.main import main\nfor name in sys.argv[1:]:\n"
    script += " try: main([name, '--help'])\n except SystemExit: pass\n"
    script += "heavy = {'prefect', 'torch', 'ray', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    names = list(COMMANDS.commands)  # type: ignore[attr-defined]
    subprocess.run([sys.executable, "-c", script, *names], check=True, stdout=subprocess.DEVNULL)
