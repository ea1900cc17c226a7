"""What a command prints: lines, tables and JSON on standard output, errors on standard error.

Texts of publishers, jobs, brokers and peers are made `safe` here, so no command forgets to. An
output that cannot be written is a CommandError with EX_IOERR, once: what is printed after that
goes nowhere, and the one line about it is all that is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from workerd.errors import EX_IOERR, CommandError


def print_line(text: str) -> None:
    """Print one line, whatever is in the text. Raises CommandError."""
    _write(safe(text) + "\n")


def print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Print columns as wide as they must be; the first row has the headings."""
    cells = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _write(indent + "  ".join(padded).rstrip() + "\n")


def print_json(value: object) -> None:
    """Print a value on one line, in ASCII: no locale and no lone surrogate can be in the way."""
    _write(json.dumps(value) + "\n")


def print_bytes(data: bytes) -> None:
    """Write bytes as they are: for programs. Raises CommandError."""
    flush()
    try:
        sys.stdout.buffer.write(data)
    except OSError as error:
        raise _lost(error) from None


def flush() -> None:
    """Have what was printed leave the process now. Raises CommandError."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _lost(error) from None


def warn(text: str, name: str = "workerd") -> None:
    """Print one line on standard error, if there is one; ``name`` is the command's."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{name}: {safe(text)}\n")


def safe(text: str) -> str:
    """The text on one line, with control characters as ``\\x1b``: see `log_formats.safe`."""
    if text.isprintable():
        return text
    from workerd import log_formats  # `submit` seldom needs it

    return log_formats.safe(text)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except OSError as error:
        raise _lost(error) from None


def _lost(error: OSError) -> CommandError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CommandError(EX_IOERR, f"standard output: {error.strerror}")
