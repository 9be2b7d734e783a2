"""A number of ranks, or a range of them, is the same in words, in JSON and in configs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from infra.compute.rank_count import ONE, RankCount, RankCountField

ADAPTER = TypeAdapter(RankCountField)


@given(st.integers(1, 999_999), st.integers(1, 999_999))
def test_it_is_read_as_it_is_written(one: int, other: int) -> None:
    count = RankCount(*sorted((one, other)))
    assert count == RankCount.parse(str(count)) == RankCount.parse(count.as_plain()) == RankCount.parse(count)
    assert count == ADAPTER.validate_json(ADAPTER.dump_json(count))
    assert count.is_elastic == (one != other)


def test_a_fixed_number_is_a_number_as_in_records_from_before_ranges() -> None:
    assert ADAPTER.validate_python(4) == RankCount(4, 4)
    assert ADAPTER.dump_python(RankCount(4, 4)) == 4
    assert (str(RankCount(4, 4)), str(RankCount(2, 8)), ONE) == ("4", "2:8", RankCount(1, 1))


@pytest.mark.parametrize("value", [0, -1, True, None, 1.0, "", "0", "0:2", "8:2", "2:", ":2", "1:2:3", "2-8", "9" * 40])
def test_what_is_neither_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no number of training processes, such as 4, and no range, such as 2:8$"):
        RankCount.parse(value)
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(value)
