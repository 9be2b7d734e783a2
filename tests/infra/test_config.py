"""Identities of configs: what of a config digests are made from."""

from typing import Annotated

from pydantic import Field

from infra.config import RUNTIME, Config, OmittedAt


class Inner(Config):
    uri: Annotated[str, RUNTIME] = "somewhere"
    size: Annotated[int, OmittedAt(0), Field(ge=0)] = 0


class Outer(Config):
    uri: str = "decides"
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    pairs: tuple[tuple[str, float], ...] = ()
    compile: Annotated[bool | None, OmittedAt(None, False)] = None


def test_runtime_settings_are_left_out_at_any_depth_and_by_mark_not_by_name() -> None:
    config = Outer(inner=Inner(uri="elsewhere"), many=(Inner(uri="a"), Inner(uri="b", size=2)))
    assert config.identity() == {"uri": "decides", "inner": {}, "many": [{}, {"size": 2}], "pairs": []}


def test_a_field_is_left_out_at_its_values_alone() -> None:
    plain = {"uri": "decides", "inner": {}, "many": [], "pairs": []}
    assert Outer(compile=False).identity() == Outer().identity() == plain
    assert Outer(compile=True, inner=Inner(size=1)).identity() == plain | {"inner": {"size": 1}, "compile": True}


def test_what_is_stored_holds_everything() -> None:
    stored = Outer(pairs=(("a", 1.0),)).as_json()
    assert stored["inner"] == {"uri": "somewhere", "size": 0}
    assert (stored["compile"], stored["pairs"]) == (None, [["a", 1.0]])
