"""An argument of a command with placeholders in it: `{body}`, `{body.user}`, `{header.X}`, …

Braces that are meant literally are written twice. Parsing never depends on a job, so every
mistake shows when the configuration is read.
"""

import re
from typing import Literal, NamedTuple, cast

from workerd.config.text import did_you_mean, toml

PlaceholderKind = Literal["id", "type", "queue", "attempt", "body", "body.key", "header"]

_PLAIN = ("id", "type", "queue", "attempt", "body")
_KEYED: dict[str, PlaceholderKind] = {"body": "body.key", "header": "header"}
_KNOWN = [*("{" + name + "}" for name in _PLAIN), "{body.KEY}", "{header.NAME}"]
_TOKEN = re.compile(r"(?P<literal>\{\{|\}\}|[^{}]+)|\{(?P<name>[^{}]*)\}|(?P<lone>[{}])")


class Placeholder(NamedTuple):
    """What stands between braces; `name` is the key of the body or the header, otherwise ""."""

    kind: PlaceholderKind
    name: str = ""


class Template(NamedTuple):
    """An argument cut into literal text and placeholders, in order; "" has no parts."""

    parts: tuple[str | Placeholder, ...]

    @classmethod
    def parse(cls, argument: str) -> "Template":
        """Cut an argument up; raises ValueError for an unknown placeholder or a lone brace."""
        parts: list[str | Placeholder] = []
        literal = ""
        for token in _TOKEN.finditer(argument):
            if token["lone"]:
                brace = token["lone"]
                raise ValueError(
                    f'lone "{brace}" at character {token.start() + 1} of {toml(argument)}: '
                    f'a literal brace is written "{brace * 2}"'
                )
            if token["name"] is None:
                text: str = token["literal"]
                literal += text[0] if text in ("{{", "}}") else text
                continue
            if literal:
                parts.append(literal)
                literal = ""
            parts.append(_placeholder(token["name"]))
        if literal:
            parts.append(literal)
        return cls(tuple(parts))

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        return tuple(part for part in self.parts if isinstance(part, Placeholder))


def _placeholder(text: str) -> Placeholder:
    if text in _PLAIN:
        return Placeholder(cast(PlaceholderKind, text))
    prefix, dot, name = text.partition(".")
    if dot and name and prefix in _KEYED:
        return Placeholder(_KEYED[prefix], name)
    written = "{" + text + "}"
    if not text.replace(".", "").replace("-", "").isidentifier():
        # What xargs, JavaScript or JSON would write.
        hint = f': if it is meant literally, write "{{{written}}}"'
    else:
        known = f": expected one of {' '.join(_KNOWN)}"
        hint = did_you_mean(written, _KNOWN[: len(_PLAIN)]) or known
    raise ValueError(f"unknown placeholder {toml(written)}{hint}")
