"""Commands in the documents are accepted by the command line that there is."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from flows.cli.main import app
from flows.recipes.files import load_recipe
from tests.docs.pages import PAGES, ROOT, blocks, name_of, spans

COMMANDS = typer.main.get_command(app)
OPERATORS = {">", "|", "&&", ";"}


def commands(line: str) -> list[list[str]]:
    """The calls of sftok in a line of shell, without what they are piped to."""
    if "$(" in line:
        return []
    parts: list[list[str]] = [[]]
    for token in shlex.split(line, comments=True):
        if token in OPERATORS:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part[1:] for part in parts if part[:1] == ["sftok"]]


def in_blocks(page: Path) -> list[list[str]]:
    shell = "\n".join(block.text for block in blocks(page) if block.language in ("", "bash", "sh"))
    lines = shell.replace("\\\n", " ").splitlines()
    return [command for line in lines if re.match(r"sftok [a-z-]", line) for command in commands(line)]


def parse(arguments: list[str]) -> None:
    name, *rest = arguments
    command = COMMANDS.commands[name]
    if rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(f"sftok {name}", rest)


@pytest.mark.parametrize("page", [page for page in PAGES if in_blocks(page)], ids=name_of)
def test_commands_in_blocks_parse(page):
    for arguments in in_blocks(page):
        try:
            parse(list(arguments))
        except (typer.TyperException, KeyError) as error:
            pytest.fail(f"{name_of(page)}: sftok {shlex.join(arguments)}: {error}")


def settings() -> list[tuple[str, tuple[str, ...]]]:
    """Recipes of `sftok run` in the documents, with what is set."""
    found = set()
    for page in PAGES:
        for name, *rest in in_blocks(page):
            if name == "run" and rest[0] != "mine.toml":
                made = COMMANDS.commands[name].make_context("sftok run", rest)
                found.add((made.params["recipe"], tuple(made.params["set"] or ())))
    return sorted(found)


@pytest.mark.parametrize(("recipe", "overrides"), settings())
def test_settings_that_commands_change_exist(recipe, overrides):
    assert load_recipe(recipe, overrides=overrides)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_text_exist(page):
    """In running text a command may lack its arguments; its name and its options exist all the same."""
    for span in spans(page):
        if not re.match(r"sftok [a-z]", span):
            continue
        arguments = shlex.split(span)[1:]
        assert arguments[0] in COMMANDS.commands, f"{name_of(page)}: {span}"
        command = COMMANDS.commands[arguments[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help"}
        for option in (token.partition("=")[0] for token in arguments if token.startswith("--")):
            assert option in known, f"{name_of(page)}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_and_modules_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", text, re.MULTILINE):
        assert target in targets, f"{name_of(page)}: make {target}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), f"{name_of(page)}: python -m {module}"


def test_a_wrong_option_is_found():
    """Guards against a check that cannot fail."""
    with pytest.raises(typer.TyperException):
        parse(["run", "digits", "--no-such-option"])
