"""The types of single values: how each is read from TOML and written back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from workerd.config.text import found, toml
from workerd.units import format_duration, format_size, parse_duration, parse_size

T = TypeVar("T")

YEAR = 365 * 86_400.0
MILLISECOND = 0.001


class Unexpected(ValueError):
    """What was expected instead; `Scalar.problem` adds what was found."""


# No dataclass, here and in `fields`: making one takes several times as long, and `submit` waits.
class Scalar(NamedTuple, Generic[T]):
    """One value. `read` takes what TOML gave and raises ValueError; `show` writes TOML text.

    A `secret` value is not quoted in problems and shows as `***`. `none` is the TOML value that
    stands for None, when there is one.
    """

    read: Callable[[Any], T]
    show: Callable[[T], str] = toml
    secret: bool = False
    none: str | None = None

    def problem(self, value: Any, error: ValueError) -> str:
        """The problem of a value that `read` refused with `error`."""
        if isinstance(error, Unexpected):
            return f"expected {error}, found {'something else' if self.secret else found(value)}"
        return str(error)


def boolean() -> Scalar[bool]:
    def read(value: Any) -> bool:
        if type(value) is not bool:
            raise Unexpected("true or false")
        return value

    return Scalar(read)


def whole(low: int, high: int) -> Scalar[int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Unexpected(f"a whole number from {low} to {high}")
        return value

    return Scalar(read)


def whole_or_never(high: int) -> Scalar[int | None]:
    """A number of times, where 0 means that it never happens."""
    read_whole = whole(0, high).read
    return Scalar(lambda value: read_whole(value) or None, none="0")


def number(low: float, high: float) -> Scalar[float]:
    def read(value: Any) -> float:
        # Every comparison with nan is false, so it is refused along with what is out of range.
        if type(value) not in (int, float) or not low <= value <= high:
            raise Unexpected(f"a number from {low:g} to {high:g}")
        return float(value)

    return Scalar(read)


def duration(low: float = 0.0, high: float = YEAR) -> Scalar[float]:
    """A time in seconds; `low` and `high` included."""

    def read(value: Any) -> float:
        seconds = value
        if isinstance(value, str):
            try:
                seconds = parse_duration(value)
            except ValueError:
                seconds = None
        if type(seconds) not in (int, float):
            raise Unexpected('a duration such as "30s" or a number of seconds')
        if not low <= seconds <= high:
            bounds = f"{format_duration(low)} to {format_duration(high)}"
            raise Unexpected(f"a duration from {bounds}")
        return float(seconds)

    return Scalar(read, lambda seconds: toml(format_duration(seconds)))


def size(low: int, high: int) -> Scalar[int]:
    """A number of bytes; `low` and `high` included."""

    def read(value: Any) -> int:
        count = value
        if isinstance(value, str):
            try:
                count = parse_size(value)
            except ValueError:
                count = None
        if type(count) is not int:
            raise Unexpected('a size such as "64KiB" or a number of bytes')
        if not low <= count <= high:
            raise Unexpected(f"a size from {format_size(low)} to {format_size(high)}")
        return int(count)

    return Scalar(read, lambda count: toml(format_size(count)))


def one_of(literal: Any) -> Scalar[Any]:
    """One of the strings of a `Literal`."""
    names = get_args(literal)

    def read(value: Any) -> Any:
        if value not in names:
            raise Unexpected("one of " + ", ".join(map(toml, names)))
        return value

    return Scalar(read)


def text(expected: str = "a string") -> Scalar[str]:
    """A string that the operating system takes: not empty, without NUL."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise Unexpected(expected)
        return value

    return Scalar(read)


def matching(pattern: str, expected: str) -> Scalar[str]:
    """A string that the whole of a regular expression matches."""
    compiled = re.compile(pattern)

    def read(value: Any) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise Unexpected(expected)
        return value

    return Scalar(read)


def path() -> Scalar[Path]:
    """An absolute path: a relative one would mean another file in every directory."""
    read_text = text('an absolute path such as "/srv/app"').read

    def read(value: Any) -> Path:
        if not read_text(value).startswith("/"):
            raise Unexpected('an absolute path such as "/srv/app"')
        return Path(value)

    return Scalar(read)


def array(item: Scalar[T], example: str) -> Scalar[tuple[T, ...]]:
    """One or more values of a type; every wrong item is named by its number, from 1."""

    def read(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or not value:
            raise Unexpected(f"an array such as {example}")
        items, problems = [], []
        for index, entry in enumerate(value, start=1):
            try:
                items.append(item.read(entry))
            except ValueError as error:
                problems.append(f"item {index}: {item.problem(entry, error)}")
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(items)

    def show(values: tuple[T, ...]) -> str:
        return "[" + ", ".join(map(item.show, values)) + "]"

    return Scalar(read, show, secret=item.secret)
