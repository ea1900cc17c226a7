"""Durations and sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerd.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("1h", 3600), ("2d", 172_800), ("1.5h", 5400)],
)
def test_every_unit_of_time_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("512B", 512), ("64KiB", 65_536), ("1MiB", 1 << 20), ("1GiB", 1 << 30)]
)
def test_every_unit_of_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "30", "s", "-1s", "1 s", "1e3s", "1h30m", "٣s", "1s\n"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "64", "64KB", "1.5MiB", "-1B", "64kib", "1B\n"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


def test_the_largest_unit_that_fits_is_written() -> None:
    written = [format_duration(seconds) for seconds in (0, 0.25, 1.5, 90, 1500, 86_400)]
    assert written == ["0s", "250ms", "1500ms", "90s", "25m", "1d"]
    assert [format_size(size) for size in (0, 1, 1536, 65_536)] == ["0B", "1B", "1536B", "64KiB"]


@given(st.floats(min_value=0, max_value=1e9))
def test_a_duration_survives_being_written_and_read(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(min_value=0, max_value=1 << 40))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert parse_size(format_size(size)) == size
