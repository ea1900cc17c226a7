"""Times as people write them, and the whole seconds until then. Pure, but for the time zone.

What the local zone makes of a clock that is put forward or back follows PEP 495:
docs/messages.md tells it to users.
"""

from __future__ import annotations

import datetime
import math
import re

# Not compiled here: `submit` starts faster without.
_TIME = (
    r"(?:(\d{4})-(\d\d)-(\d\d)[Tt ])?"
    r"(\d{1,2}):(\d\d)(?::(\d\d)(\.\d+)?)?"
    r"( ?[Zz]| ?[+-]\d\d:?\d\d)?"
)
_EXPECTED = 'expected a time such as "18:30", "2026-12-24 18:30" or "2026-12-24T18:30:00+01:00"'


def instant(text: str, now: float) -> float:
    """The instant that a time means, in seconds since 1970; raises ValueError.

    Without an offset it is of the local zone, without a date the next one to come; a minute
    (or second, when it is named) is to come until it is over. A time that the clock shows
    twice is the first of the two that is still to come; one that it skips comes as long
    after the skip's beginning as it would without a skip.
    """
    match = re.fullmatch(_TIME, text, re.ASCII)
    if match is None:
        raise ValueError(_EXPECTED)
    *date, hour, minute, second, fraction, offset = match.groups()
    try:
        clock = datetime.time(int(hour), int(minute), int(second or 0))
        part, lasts = float(fraction or 0), 1.0 if second else 60.0
        if date[0] is None:
            if offset:
                raise ValueError("an offset needs a date")
            return _next(clock, now, lasts) + part
        day = datetime.date(*map(int, date))
        if offset:
            zone = _zone(offset.strip())
            return datetime.datetime.combine(day, clock, zone).timestamp() + part
        first, last = _local(day, clock)
        return (first if now < first + lasts else last) + part
    except (ValueError, OverflowError) as error:
        raise ValueError(f"no such time: {error}") from None


def seconds_until(due: float, now: float) -> int:
    """The whole seconds from ``now`` until nothing can come too early; 0 when it is past."""
    # Two floats of this size differ by a quarter of a microsecond, which is no second.
    return max(0, math.ceil(round(due - now, 6)))


def utc(when: float) -> str:
    """An instant as RFC 3339 has it, in UTC and with milliseconds."""
    time = datetime.datetime.fromtimestamp(when, datetime.UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _next(clock: datetime.time, now: float, lasts: float) -> float:
    today = datetime.datetime.fromtimestamp(now).date()
    for day in (today, today + datetime.timedelta(days=1)):
        for when in _local(day, clock):
            if now < when + lasts:
                return when
    raise AssertionError("tomorrow is never past")


def _local(day: datetime.date, clock: datetime.time) -> tuple[float, float]:
    """When the local clock shows this for the first and for the last time."""
    first, last = (
        datetime.datetime.combine(day, clock.replace(fold=fold)).timestamp() for fold in (0, 1)
    )
    # Of a time that is skipped, the second reading is the earlier one.
    return first, max(first, last)


def _zone(offset: str) -> datetime.timezone:
    if offset in "Zz":
        return datetime.UTC
    hours, minutes = int(offset[1:3]), int(offset[-2:])
    if hours > 23 or minutes > 59:
        raise ValueError("the offset must be less than a day")
    size = datetime.timedelta(hours=hours, minutes=minutes)
    return datetime.timezone(-size if offset[0] == "-" else size)
