"""Pages that are generated are those that the code would generate now."""

import pytest

from docs.generate import PAGES, REFERENCE
from flows.recipes.schema import Recipe


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name):
    assert (REFERENCE / name).read_text() == PAGES[name](), "run `python -m docs.generate` and commit what it writes"


def test_every_command_and_every_section_of_a_recipe_is_there():
    commands, settings = PAGES["command-line.md"](), PAGES["configuration.md"]()
    for name in ("run", "encode", "sample", "weights fetch", "export-weights"):
        assert f"## sftok {name}\n" in commands
    assert "`--max-reject-rate" in commands
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in settings
    assert "| `cfg_scale` | float, ≥ 0, ≤ 1000 | `1.0` |" in settings
