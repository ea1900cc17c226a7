"""The merged configuration as TOML, each value with the file that it came from."""

from collections.abc import Iterator
from typing import Any

from workerd.config.fields import Named, Pairs, Section, Value, value_types
from workerd.config.model import UNUSED, Handler, Settings
from workerd.config.text import dotted, toml

KeyPath = tuple[str, ...]


def show(settings: Settings) -> str:
    """The values in force, for people and for TOML parsers, without any secret.

    Passwords in URLs and the values of `environment` are left out or shown as `***`. A key that
    has no value is a comment.
    """
    tables = []
    for key, of in value_types(Settings).items():
        value = getattr(settings, key)
        if isinstance(of, Named):
            tables += [_table(settings, (key, name), of.cls, value[name]) for name in value]
        else:
            tables.append(_table(settings, (key,), type(value), value))
    return "\n".join(tables)


def _table(settings: Settings, header: KeyPath, cls: type[Any], value: Any) -> str:
    lines = [f"[{dotted(header)}]", *_lines(settings, header, (), cls, value)]
    return "\n".join(lines) + "\n"


def _lines(
    settings: Settings, header: KeyPath, inside: KeyPath, cls: type[Any], section: Any
) -> Iterator[str]:
    """The keys of a section, and those of the sections in it as dotted keys."""
    unused = UNUSED[section.kind] if isinstance(section, Handler) else frozenset()
    for key, of in value_types(cls).items():
        keys, value = (*inside, key), getattr(section, key)
        if key in unused:
            continue
        if isinstance(of, Section):
            yield from _lines(settings, header, keys, of.cls, value)
        elif isinstance(of, Pairs):
            for name, entry in value.items():
                yield _line(settings, header, (*keys, str(name)), of.value.show(entry))
        elif isinstance(of, Value):
            unset = value is None or value == ()
            text = of.scalar.none if unset else of.scalar.show(value)
            yield _line(settings, header, keys, text)


def _line(settings: Settings, header: KeyPath, keys: KeyPath, text: str | None) -> str:
    if text is None:
        return f"# {dotted(keys)} is not set"
    origin = settings.origins.get(dotted((*header, *keys)), "default")
    # Without its quotes a TOML string is what may stand in a comment: no line end can be in it.
    return f"{dotted(keys)} = {text}  # {toml(origin)[1:-1]}"
