"""Settings declared once: a dataclass field has the name, the type and the default of a key.

A TOML table takes three steps, so that files can override each other and no mistake in one hides
behind another: `read` checks one file's table against the dataclass,
`merge` lays it over the files before it, and `build` makes the dataclass.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields
from typing import Any, NamedTuple, Protocol, TypeVar

from workerd.config.text import did_you_mean, dotted, found
from workerd.config.types import Scalar

T = TypeVar("T")
D = TypeVar("D")

Path = tuple[str, ...]
Report = Callable[[Path, str], None]

# Stands for a value that was refused: the key was given, but its default has to do.
_REFUSED = object()


class ValueType(Protocol):
    """What a key may hold: a single value, or a table of one of three sorts."""

    def read(self, value: Any, path: Path, report: Report) -> Any: ...

    def build(self, value: Any) -> Any: ...


class Value(NamedTuple):
    """A single value."""

    scalar: Scalar[Any]

    def read(self, value: Any, path: Path, report: Report) -> Any:
        try:
            return self.scalar.read(value)
        except ValueError as error:
            report(path, self.scalar.problem(value, error))
        return _REFUSED

    def build(self, value: Any) -> Any:
        return value


class Section(NamedTuple):
    """A table whose keys are the fields of a dataclass."""

    cls: type[Any]

    def read(self, value: Any, path: Path, report: Report) -> dict[str, Any]:
        return read(self.cls, value, path, report)

    def build(self, value: dict[str, Any]) -> Any:
        return build(self.cls, value)


class Named(NamedTuple):
    """A table of sections, each under a name that the operator chose."""

    cls: type[Any]
    name: Scalar[str]

    def read(self, value: Any, path: Path, report: Report) -> dict[str, Any]:
        result = {}
        for name, table in _items(value, path, report):
            try:
                self.name.read(name)
            except ValueError as error:
                report((*path, name), f"this name cannot be used: expected {error}")
            else:
                result[name] = read(self.cls, table, (*path, name), report)
        return result

    def build(self, value: dict[str, Any]) -> Any:
        return {name: build(self.cls, table, name=name) for name, table in value.items()}


class Pairs(NamedTuple):
    """A table of free keys and values of one type, which override the default key by key."""

    key: Scalar[Any]
    value: Scalar[Any]
    default: Mapping[Any, Any]

    def read(self, value: Any, path: Path, report: Report) -> dict[str, Any]:
        result = {}
        for key, entry in _items(value, path, report):
            try:
                self.key.read(key)
            except ValueError as error:
                report((*path, key), f"this key cannot be used: expected {error}")
            else:
                result[key] = Value(self.value).read(entry, (*path, key), report)
        return result

    def build(self, value: dict[str, Any]) -> Any:
        given = {self.key.read(key): entry for key, entry in _usable(value)}
        return {**self.default, **given}


def option(scalar: Scalar[T], default: D) -> T | D:
    """A dataclass field for a single value."""
    result: T | D = field(default=default, metadata={"type": Value(scalar)})
    return result


def section(cls: type[T]) -> T:
    """A dataclass field for a nested table."""
    result: T = field(default_factory=cls, metadata={"type": Section(cls)})
    return result


def named(cls: type[T], name: Scalar[str]) -> Mapping[str, T]:
    """A dataclass field for a table of tables; each gets its key as its `name`."""
    result: Mapping[str, T] = field(default_factory=dict, metadata={"type": Named(cls, name)})
    return result


def pairs(key: Scalar[T], value: Scalar[D], default: Mapping[T, D]) -> Mapping[T, D]:
    """A dataclass field for a table of free keys; its values stay out of the repr if secret."""
    result: Mapping[T, D] = field(
        default_factory=lambda: dict(default),
        repr=not value.secret,
        metadata={"type": Pairs(key, value, default)},
    )
    return result


def value_types(cls: type[Any]) -> dict[str, ValueType]:
    """The keys of a dataclass and what each may hold, in the order of their declaration."""
    return {entry.name: entry.metadata["type"] for entry in fields(cls) if entry.metadata}


def read(cls: type[Any], value: Any, path: Path, report: Report) -> dict[str, Any]:
    """Check one file's table against a dataclass, reporting whatever is wrong with it."""
    known = value_types(cls)
    result = {}
    for key, entry in _items(value, path, report):
        if key in known:
            result[key] = known[key].read(entry, (*path, key), report)
        else:
            report((*path, key), f"unknown key{did_you_mean(key, known)}")
    return result


def merge(
    into: dict[str, Any],
    layer: dict[str, Any],
    origins: dict[str, Any],
    origin: object,
    path: Path = (),
) -> None:
    """Lay what `read` returned over `into`, and note in `origins` where each value came from."""
    for key, value in layer.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value, origins, origin, (*path, key))
        else:
            into[key] = value
            origins[dotted((*path, key))] = origin


def build(cls: type[T], merged: dict[str, Any], **given: Any) -> T:
    """Make the dataclass; what is absent or was refused has its default."""
    known = value_types(cls)
    return cls(**given, **{key: known[key].build(value) for key, value in _usable(merged)})


def _items(value: Any, path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    else:
        report(path, f"expected a table, found {found(value)}")


def _usable(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in table.items() if value is not _REFUSED)
