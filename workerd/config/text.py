"""How keys and values are written, in problems and in TOML, and what a misspelt word meant."""

import json
import re
from collections.abc import Iterable

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# What JSON leaves as it is although TOML forbids it, or although it could steer a terminal.
_CONTROL = re.compile("[\x7f-\x9f\u2028\u2029]")
_USERINFO = re.compile(r"//.*@", re.DOTALL)
_LONGEST = 80


def toml(value: object) -> str:
    """A string, number, boolean or array of them as TOML text; a path counts as a string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    text = json.dumps(str(value), ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def dotted(path: Iterable[str]) -> str:
    """A key path as TOML writes it: `handlers.sleep.timeout`, `handlers."a.b".timeout`."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else toml(key) for key in path)


def found(value: object) -> str:
    """A value as a problem shows it: short, and without the user and password of a URL."""
    if isinstance(value, dict):
        return "a table"
    text = _USERINFO.sub("//***@", toml(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean "concurrency"?`, or nothing when no known word is close."""
    from difflib import get_close_matches  # rarely needed, and `submit` must start fast

    close = get_close_matches(word, list(known), n=1)
    return f", did you mean {toml(close[0])}?" if close else ""
