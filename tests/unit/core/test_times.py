"""Times on a command line, in several zones, above all where the clock is put forward or back."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workerd.core.times import instant, seconds_until, utc

# As POSIX writes them, so that no time zone needs to be installed. Put forward from 2:00 to 3:00
# on 29 March 2026, and back from 3:00 to 2:00 on 25 October.
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"
LORD_HOWE = "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"  # by half an hour, in the southern summer
KOLKATA = "IST-5:30"

Zone = Callable[[str], None]


@pytest.fixture
def zone() -> Iterator[Zone]:
    """A function that sets the local time zone."""
    with pytest.MonkeyPatch.context() as patch:

        def set_zone(name: str) -> None:
            patch.setenv("TZ", name)
            time.tzset()

        yield set_zone
    time.tzset()


def at(text: str) -> float:
    """An instant, from what the standard library makes of a full date with an offset."""
    return datetime.datetime.fromisoformat(text).timestamp()


NOON = at("2026-06-15T12:00:00+00:00")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-12-24T18:30:00Z", "2026-12-24T18:30:00+00:00"),
        ("2026-12-24t18:30:00z", "2026-12-24T18:30:00+00:00"),
        ("2026-12-24 18:30:00Z", "2026-12-24T18:30:00+00:00"),
        ("2026-12-24T18:30Z", "2026-12-24T18:30:00+00:00"),
        ("2026-12-24T18:30:00+01:00", "2026-12-24T18:30:00+01:00"),
        ("2026-12-24T18:30:00-05:30", "2026-12-24T18:30:00-05:30"),
        ("2026-12-24T18:30:00-00:00", "2026-12-24T18:30:00+00:00"),
        ("2026-12-24 18:30:00 +0100", "2026-12-24T18:30:00+01:00"),
        ("2026-12-24T18:30:00.25Z", "2026-12-24T18:30:00.250+00:00"),
        ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00+00:00"),
        ("2039-01-19T03:14:08Z", "2039-01-19T03:14:08+00:00"),
    ],
)
@pytest.mark.parametrize("local", [BERLIN, KOLKATA, "UTC0"])
def test_a_time_with_an_offset_is_the_same_everywhere(
    zone: Zone, local: str, text: str, meant: str
) -> None:
    zone(local)
    assert instant(text, NOON) == at(meant)


@pytest.mark.parametrize(
    ("local", "offset"), [(BERLIN, "+02:00"), (NEW_YORK, "-04:00"), (KOLKATA, "+05:30")]
)
@pytest.mark.parametrize(
    "text", ["2026-07-01 09:05", "2026-07-01 09:05:00", "2026-07-01T09:05", "2026-07-01T09:05:00"]
)
def test_a_date_without_an_offset_is_of_the_local_zone(
    zone: Zone, local: str, offset: str, text: str
) -> None:
    zone(local)
    assert instant(text, NOON) == at(f"2026-07-01T09:05:00{offset}")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        # It is 14:00 in Berlin.
        ("14:01", "2026-06-15T14:01:00+02:00"),
        ("23:59", "2026-06-15T23:59:00+02:00"),
        ("14:00:01", "2026-06-15T14:00:01+02:00"),
        ("13:59", "2026-06-16T13:59:00+02:00"),
        ("13:59:59", "2026-06-16T13:59:59+02:00"),
        ("0:00", "2026-06-16T00:00:00+02:00"),
        ("9:05", "2026-06-16T09:05:00+02:00"),
        ("14:00:00.5", "2026-06-15T14:00:00.500+02:00"),
    ],
)
def test_a_time_of_day_is_the_next_one(zone: Zone, text: str, meant: str) -> None:
    zone(BERLIN)
    assert instant(text, NOON) == at(meant)


@pytest.mark.parametrize(("text", "lasts"), [("14:00", 60), ("14:00:00", 1)])
def test_a_minute_or_second_that_has_begun_is_not_past_until_it_is_over(
    zone: Zone, text: str, lasts: int
) -> None:
    zone(BERLIN)
    for passed in (0, lasts - 0.001):
        assert instant(text, NOON + passed) == NOON
    assert instant(text, NOON + lasts) == NOON + 86_400


def test_today_is_that_of_the_local_zone(zone: Zone) -> None:
    zone(NEW_YORK)
    assert instant("22:00", at("2026-06-16T01:00:00+00:00")) == at("2026-06-15T22:00:00-04:00")


def test_a_full_date_that_is_past_stays_what_it_is(zone: Zone) -> None:
    zone(BERLIN)
    assert instant("2026-06-15 13:59", NOON) == NOON - 60
    assert instant("2026-03-29 02:30", NOON) == at("2026-03-29T03:30:00+02:00")


# The clock is put forward: 2:00 to 3:00 is skipped.


@pytest.mark.parametrize("text", ["2026-03-29 02:30", "02:30"])
def test_a_time_that_is_skipped_is_as_long_after_the_skips_beginning(zone: Zone, text: str) -> None:
    zone(BERLIN)
    assert instant(text, at("2026-03-28T12:00:00+01:00")) == at("2026-03-29T03:30:00+02:00")


def test_a_skip_may_be_of_half_an_hour(zone: Zone) -> None:
    zone(LORD_HOWE)
    assert instant("2026-10-04 02:10", NOON) == at("2026-10-04T02:40:00+11:00")


def test_the_day_after_is_a_shorter_way_off_when_an_hour_is_skipped(zone: Zone) -> None:
    zone(BERLIN)
    now = at("2026-03-28T12:01:00+01:00")
    assert instant("12:00", now) - now == 23 * 3600 - 60


# The clock is put back: 2:00 to 3:00 comes twice.


@pytest.mark.parametrize("text", ["2026-10-25 02:30", "02:30"])
def test_a_time_that_comes_twice_is_the_first_of_the_two_that_is_still_to_come(
    zone: Zone, text: str
) -> None:
    zone(BERLIN)
    first, second = at("2026-10-25T02:30:00+02:00"), at("2026-10-25T02:30:00+01:00")
    assert instant(text, first - 3600) == first
    assert instant(text, first + 60) == second
    # As long as the clock shows it for the first time, that is not past.
    assert instant(text, first + 59) == first
    # The clock shows 2:20 for the second time.
    assert instant(text, second - 600) == second


def test_a_time_that_came_twice_is_past(zone: Zone) -> None:
    zone(BERLIN)
    second = at("2026-10-25T02:30:00+01:00")
    assert instant("02:30", second + 60) == at("2026-10-26T02:30:00+01:00")
    assert instant("2026-10-25 02:30", second + 60) <= second


@pytest.mark.parametrize("local", [BERLIN, NEW_YORK, LORD_HOWE, KOLKATA, "UTC0"])
def test_a_time_of_day_is_what_the_clock_shows_then_and_not_before(zone: Zone, local: str) -> None:
    zone(local)

    @given(st.integers(0, 366 * 1440 - 1), st.times())
    @example(0, datetime.time(0, 0))
    def check(minute: int, clock: datetime.time) -> None:
        now = at("2026-01-01T00:00:00+00:00") + minute * 60
        when = instant(clock.strftime("%H:%M"), now)
        assert 0 <= when - now <= 25 * 3600
        shown = datetime.datetime.fromtimestamp(when)
        wanted = datetime.datetime.combine(shown, datetime.time(clock.hour, clock.minute))
        skipped = shown - wanted
        assert skipped in (datetime.timedelta(0), size_of_skip(wanted))

    check()


def size_of_skip(local: datetime.datetime) -> datetime.timedelta:
    """By how much the clock is put forward at this time; 0 when it shows it."""
    sides = [local.replace(fold=fold).timestamp() for fold in (0, 1)]
    return datetime.timedelta(seconds=max(0, sides[0] - sides[1]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a time such as"),
        ("noon", "expected a time such as"),
        ("tomorrow 10:00", "expected a time such as"),
        ("2026-12-24", "expected a time such as"),
        ("1830", "expected a time such as"),
        ("18:3", "expected a time such as"),
        ("18:30 ", "expected a time such as"),
        ("18:30pm", "expected a time such as"),
        ("24.12.2026 18:30", "expected a time such as"),
        ("2026-12-24T18:30:00 Europe/Berlin", "expected a time such as"),
        ("\u0661\u0662:30", "expected a time such as"),
        ("24:00", "no such time: hour"),
        ("18:60", "no such time: minute"),
        ("18:30:60", "no such time: second"),
        ("2026-13-01 10:00", "no such time: month"),
        ("2026-02-29 10:00", "no such time: day"),
        ("2026-12-24T18:30:00+24:00", "no such time: the offset"),
        ("2026-12-24T18:30:00+01:60", "no such time: the offset"),
        ("18:30+01:00", "no such time: an offset needs a date"),
        ("0001-01-01 00:00", "no such time: "),
        ("9999-12-31 23:59", "no such time: "),
    ],
)
def test_anything_else_is_no_time(zone: Zone, text: str, said: str) -> None:
    zone(BERLIN)
    with pytest.raises(ValueError, match=said):
        instant(text, NOON)


@pytest.mark.parametrize(
    ("left", "seconds"),
    [(-5.0, 0), (0.0, 0), (0.001, 1), (1.0, 1), (1.001, 2), (599.9, 600), (600.0, 600)],
)
def test_what_is_left_is_rounded_up_to_seconds(left: float, seconds: int) -> None:
    assert seconds_until(NOON + left, NOON) == seconds


@given(st.floats(1e9, 4e9), st.integers(0, 2**25 - 1))
def test_a_number_of_seconds_stays_that_number(now: float, seconds: int) -> None:
    assert seconds_until(now + seconds, now) == seconds


@given(st.floats(1e9, 4e9), st.floats(0, 2**25))
def test_no_second_is_lost(now: float, left: float) -> None:
    assert now + seconds_until(now + left, now) >= now + left - 1e-6


def test_an_instant_is_shown_in_utc() -> None:
    assert utc(NOON + 0.25) == "2026-06-15T12:00:00.250Z"
