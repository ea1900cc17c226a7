"""Durations and sizes as people write them: "250ms", "30s", "5m", "1h", "2d"; "64KiB", "1MiB"."""

import re
from decimal import Decimal

# Largest first, so that the first unit that divides a value evenly is the shortest spelling.
_SECONDS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_BYTES = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)")


def parse_duration(text: str) -> float:
    """The seconds of a duration such as "30s" or "1.5h"; raises ValueError for anything else."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError('expected a duration such as "30s"')
    number, unit = match.groups()
    if unit == "ms":
        # Division is exact where multiplying by 0.001 is not: 250 ms is 0.25 s.
        return float(number) / 1000
    return float(number) * _SECONDS[unit]


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back as the same number of seconds."""
    for unit, factor in _SECONDS.items():
        count = round(seconds / factor) if seconds else 0
        text = f"{count}{unit}"
        if count and parse_duration(text) == seconds:
            return text
    return f"{Decimal(repr(seconds)):f}s" if seconds else "0s"


def parse_size(text: str) -> int:
    """The bytes of a size such as "64KiB"; raises ValueError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError('expected a size such as "64KiB"')
    return int(match[1]) * _BYTES[match[2]]


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads back as the same number of bytes."""
    unit = next(unit for unit, factor in _BYTES.items() if size % factor == 0) if size else "B"
    return f"{size // _BYTES[unit]}{unit}"


def age(seconds: float | None) -> str:
    """A duration in two digits or so: 45s, 12m, 3h, 20d; "" for None."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"
